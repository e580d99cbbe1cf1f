"""The prompts that a command line asks for: of a set, a file or a run, all of them or one side of a split."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax import data
from ddpo_jax.data import PromptSet
from ddpo_jax.errors import UserError
from ddpo_jax.types import Prompts

SIDES = ("all", "train", "held_out")
FLAGS = {"prompts.name": "--prompts", "prompts.list": "--prompt", "prompts.held_out": "--held_out"}


class Asked(NamedTuple):
    """Prompts, and where they are from."""

    origin: str  # in words
    prompts: PromptSet


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompts", default="", help="a set such as common_animals, or a UTF-8 file, .txt or .jsonl; a run's own")
    add("--prompt", action="append", default=[], help="one prompt; may be given several times")
    add("--split", choices=SIDES, help="which of them; held_out by default where some are held out")
    add("--held_out", type=float, help="fraction of the prompts that is held out; of a run's prompts as in the run")
    add("--split_seed", type=int, help="which prompts are held out; of a run's prompts as in the run, or 0")


def read_prompts(flags: argparse.Namespace, configs: Sequence[ConfigDict]) -> Asked:
    """The prompts that the flags give, or else those of the first run. configs: of the models that are runs.

    Raises:
        UserError: there are none, they cannot be read, or the split leaves none.
    """
    own = None
    if flags.prompts or flags.prompt:
        prompts, origin = _given(flags), flags.prompts or "--prompt"
    elif configs:
        own = configs[0].prompts
        prompts, origin = data.prompt_source(own.name, tuple(own.list)), "prompts.list" if own.list else own.name
    else:
        raise UserError("no prompts: give --prompts=FILE, --prompts=SET such as common_animals, or --prompt=TEXT")
    fraction = flags.held_out if flags.held_out is not None else own.held_out if own else 0.0
    seed = flags.split_seed if flags.split_seed is not None else own.split_seed if own else 0
    if seed < 0:
        raise UserError(f"--split_seed={seed}: expected 0 or more")
    train, held_out = data.split(prompts, fraction=fraction, seed=seed)
    side = flags.split or ("held_out" if fraction else "all")
    if side != "all" and not fraction:
        raise UserError(f"--split={side}: no prompts are held out; give --held_out=FRACTION too")
    told = {"all": "", "train": ", not held out", "held_out": ", held out"}[side]
    return Asked(origin + told, {"all": prompts, "train": train, "held_out": held_out}[side])


def spread(prompts: PromptSet, *, num_prompts: int | None, num_images: int) -> Prompts:
    """`num_images` pictures' worth of each of `num_prompts` spread evenly over the set, and round it again; or of all.

    No tokens: each model makes its own.
    """
    count = len(prompts.texts) if num_prompts is None else num_prompts
    tokens = np.zeros((len(prompts.texts), 0), np.int32)
    chosen = data.every(prompts, tokens, count=count).id
    return data.at(prompts, tokens, np.repeat(chosen, num_images))


def _given(flags: argparse.Namespace) -> PromptSet:
    sets = [data.prompt_source("", flags.prompt)] if flags.prompt else []
    sets += [data.prompt_source(flags.prompts)] if flags.prompts else []
    known = {
        text: metadata for one in sets for text, metadata in zip(one.texts, one.metadata, strict=True)
    }  # of a text that comes twice, what the file knows
    return PromptSet(tuple(known), tuple(known.values()))
