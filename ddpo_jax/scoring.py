"""Scores of pictures outside of a run: the flags that say how, and the scoring while more pictures are drawn."""

from __future__ import annotations

import difflib
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int
from ml_collections import ConfigDict

from ddpo_jax import rewards
from ddpo_jax.config import OVERRIDE, joined
from ddpo_jax.errors import UserError
from ddpo_jax.rewards.pixels import PixelBatch
from ddpo_jax.types import Prompts, PyTree, Reward

DEFAULTS = rewards.Settings(deadline=300.0, num_workers=2)  # as in configs/base.py
FLAGS = {"reward.name": "--reward"}


def split_fields(argv: list[str] | None) -> tuple[list[str], list[str]]:
    """(flags of the form --config.FIELD=VALUE, the others); of the command line where argv is None."""
    argv = joined(sys.argv[1:] if argv is None else argv)
    return [arg for arg in argv if OVERRIDE.match(arg)], [arg for arg in argv if not OVERRIDE.match(arg)]


def read_settings(fields: Sequence[str], start: rewards.Settings = DEFAULTS) -> rewards.Settings:
    """What rewards are made with: `start` with the fields that flags --config.reward.FIELD=VALUE change.

    Raises:
        UserError: there is no such field, it is nothing to a reward alone, or the value is of another type.
    """
    settings = start
    for arg in fields:
        name, given, value = arg.partition("=")
        name = name.lstrip("-").removeprefix("config.reward.")
        if name == "name":
            raise UserError(f"{arg}: give --reward in place of it")
        if name not in settings._fields:
            near = difflib.get_close_matches(name, settings._fields, n=1)
            hint = f"did you mean --config.reward.{near[0]}?" if near else f"expected {_choices()}"
            raise UserError(f"{arg}: no field that a score depends on; {hint}")
        kind = type(getattr(DEFAULTS, name))
        try:
            if not given:
                raise ValueError
            settings = settings._replace(**{name: kind(value)})
        except ValueError:
            wanted = {int: "a whole number", float: "a number", str: "=VALUE"}[kind]
            raise UserError(f"{arg}: expected {wanted}") from None
    return settings


def run_settings(config: ConfigDict) -> rewards.Settings:
    """What a run's rewards were made with. Configs from before a field have its default."""
    return DEFAULTS._replace(**{name: config.reward[name] for name in DEFAULTS._fields if name in config.reward})


def make_reward(
    name: str, fields: Sequence[str], configs: Sequence[ConfigDict], *, embedded: bool
) -> tuple[Reward, tuple[PyTree, ...], rewards.Settings]:
    """The reward with its parameters, and what it was made with; of the first run where `name` is empty.

    fields: as in `read_settings`, in place of the first run's.  configs: of the models that are runs.
    embedded: whether the pictures are the embedded model's, which the embedded CLIP judges if no other is named.

    Raises:
        UserError: there is no name, or it cannot be made.
    """
    if not name and not configs:
        raise UserError("no reward: give --reward=NAME, such as clip_score, or several with commas between")
    settings = read_settings(fields, run_settings(configs[0]) if configs else DEFAULTS)
    if embedded and not settings.clip_model:
        settings = settings._replace(clip_model="tiny")
    return *rewards.make(name or configs[0].reward.name, settings), settings


def score_chunks(
    reward: Reward,
    params: tuple[PyTree, ...],
    chunks: Iterable[tuple[Any, int, PixelBatch, Prompts]],
    *,
    in_flight: int,
) -> Iterator[tuple[Any, Float32[np.ndarray, "b experts"], str]]:
    """(tag, the scores of the first `count` pictures, why some are missing) of each (tag, count, pictures, prompts).

    in_flight: chunks that are scored while others are made.
    """
    pending: deque = deque()

    def finish() -> tuple[Any, Float32[np.ndarray, "b experts"], str]:
        tag, count, waiting = pending.popleft()
        found = reward.result(waiting)[:count]
        why = reward.why(waiting) if reward.why and np.isnan(found).any() else ""
        if why and np.isnan(found).sum() > 1:  # scorers tell of the last one
            why = f"of this picture or of one that was scored with it: {why}"
        return tag, found, why

    for tag, count, images, prompts in chunks:
        if len(pending) == in_flight:
            yield finish()
        pending.append((tag, count, reward.submit(params, images, prompts)))
    while pending:
        yield finish()


def make_prompts(texts: Sequence[str], ids: Int[np.ndarray, " b"], metadata: Sequence[Mapping[str, Any]]) -> Prompts:
    """Prompts for a reward. No tokens: rewards make their own."""
    return Prompts(tuple(texts), np.zeros((len(texts), 0), np.int32), ids.astype(np.int32), tuple(metadata))


def _choices() -> str:
    return ", ".join(f"--config.reward.{name}" for name in DEFAULTS._fields)
