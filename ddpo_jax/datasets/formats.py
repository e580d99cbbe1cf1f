"""What a record of a prepared data set holds, and why a row of the input becomes none."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ddpo_jax.errors import UserError

VERSION = "1.0.0"  # of the records; one that older code cannot read gets another
SPLIT = "train"


class Preference(NamedTuple):
    """A comparison. Pictures are the content of JPEG or PNG files: 8-bit RGB, upright, without transparency."""

    prompt: str
    image_0: bytes
    image_1: bytes
    label: float  # how surely image_0 is the better one: 1 is certain, 0 that image_1 is, 0.5 a tie


class Captioned(NamedTuple):
    """A picture and its text. The picture is as in Preference."""

    image: bytes
    text: str


KINDS = {"preference": Preference, "captioned": Captioned}  # by the data set's name
IMAGES = {"preference": ("image_0", "image_1"), "captioned": ("image",)}


class BadRow(Exception):
    """A row that cannot be used, or that is left out as published."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


NOT_UTF8 = "text that is not UTF-8"
NOT_READ = "row that cannot be read"
BAD_LINE = "line that is not of the format"
BAD_TEXT = "text that is missing"
BAD_LABEL = "bad label"
TIE = "tie"
UNLABELLED = "without a label"
NO_FILE = "missing picture"
BAD_PICTURE = "broken picture"
OVERSIZED = "oversized picture"


def checked_text(text: Any, name: str) -> str:
    """The text, if it is one that UTF-8 can hold. Raises BadRow if not."""
    if not isinstance(text, str):
        raise BadRow(BAD_TEXT, f"{name} is {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may spell half of a surrogate pair
        raise BadRow(NOT_UTF8, f"{name}: {error}") from None
    return text


def is_number(value: Any) -> bool:
    """Whether it is a number, which True is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def import_tfds() -> ModuleType:
    """tensorflow_datasets, which takes a moment to import.

    Raises:
        UserError: it is not installed.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise missing_extra(error) from None
    return tfds


def missing_extra(error: ImportError) -> UserError:
    """What to do about a library of the extra that is not there."""
    return UserError(f"prepared data sets need libraries of an extra ({error}): pip install 'ddpo_jax[data]'")


def features(kind: str) -> Any:
    """The records' features, as tensorflow_datasets describes them."""
    tfds = import_tfds()
    types = {str: tfds.features.Text, bytes: tfds.features.Image, float: lambda: tfds.features.Scalar(np.float32)}
    fields = {"preference": (str, bytes, bytes, float), "captioned": (bytes, str)}[kind]
    return tfds.features.FeaturesDict(
        {name: types[field]() for name, field in zip(KINDS[kind]._fields, fields, strict=True)}
    )
