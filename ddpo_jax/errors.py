"""Failures that a user reads as one line instead of a traceback."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class UserError(ValueError):
    """Input that cannot be used. The message gives the value, what was expected and what to do."""


class RunStopped(RuntimeError):
    """A run that cannot go on (rewards missing, gradients not finite, a deadline). Its last whole round is saved."""


class Preempted(RuntimeError):
    """A run that was asked to stop. Its last whole round is saved; the same command continues it."""


def number(
    fields: Mapping[str, Any],
    name: str,
    default: int | float | None = None,
    *,
    kind: type = int,
    above: int | float = 0,
) -> Any:
    """The number under `name`, or the default if there is one.

    Raises:
        UserError: it is not a finite number of this kind (int, or float for both) above `above`.
        KeyError: it is missing and has no default.
    """
    value = fields[name] if default is None else fields.get(name, default)
    wanted = (int, float) if kind is float else kind
    if isinstance(value, bool) or not isinstance(value, wanted) or not above < value < math.inf:
        raise UserError(f"{name}={value!r}: expected a {'whole ' if kind is int else ''}number above {above}")
    return value


def numbers(fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The list of positive whole numbers under `name`.

    Raises:
        UserError: it is another thing.
        KeyError: it is missing.
    """
    value = fields[name]
    if not isinstance(value, list | tuple) or not value or not all(type(entry) is int and entry > 0 for entry in value):
        raise UserError(f"{name}={value!r}: expected a list of positive whole numbers")
    return tuple(value)
