"""The command line: a config file, and its fields overridden."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from ddpo_jax.errors import UserError
from ddpo_jax.workdir import flatten

USAGE = "python -m ddpo_jax.main --config=configs/NAME.py[:VARIANT] [--config.train.learning_rate=1e-5] [--workdir=DIR]"
PROCESSES = {
    "coordinator_address": "host:port of the first process of a run of several",
    "num_processes": "how many there are",
    "process_id": "which of them this is, from 0",
}
OVERRIDE = re.compile(r"^--?(?:no)?config\.([^=]+)")


class Command(NamedTuple):
    """What a command line asks for."""

    config: ConfigDict
    workdir: Path  # runs/<config name> by default
    processes: dict[str, str | None]  # where the others of this run are; None where it does not say


def parse(argv: list[str]) -> Command:
    """The command line, program name left out.

    Raises:
        UserError: a flag, a field or a value is wrong.
    """
    argv = joined(argv)
    plain = _flags([arg for arg in argv if not OVERRIDE.match(arg)])
    if not plain.config:
        raise UserError(f"--config is missing; usage: {USAGE}")
    known = flatten(plain.config.to_dict())
    for arg in argv:
        found = OVERRIDE.match(arg)
        if found and found[1] not in known:
            near = difflib.get_close_matches(found[1], known, n=1, cutoff=0.6)
            hint = f"; did you mean --config.{near[0]}?" if near else "; configs/base.py lists every field"
            raise UserError(f"--config.{found[1]}: there is no such field{hint}")
    values = _flags(argv)
    workdir = values.workdir or Path("runs") / run_name(values["config"].config_filename)
    return Command(values.config, Path(workdir).expanduser(), {name: values[name].value for name in PROCESSES})


def run_name(config_file: str) -> str:
    """`NAME` of `configs/NAME.py`, `NAME-VARIANT` of `configs/NAME.py:VARIANT`."""
    path, _, variant = config_file.partition(":")
    return "-".join([Path(path).stem, *([variant.replace("/", "-")] if variant else [])])


def choose_variant(config: ConfigDict, variants: Mapping[str, Mapping[str, Any]], name: str) -> ConfigDict:
    """`config` with the fields that the recipe's variant `name` changes; "" is the recipe itself.

    Raises:
        UserError: the recipe has no such variant.
    """
    if name and name not in variants:
        near = difflib.get_close_matches(name, variants, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"this recipe has no variant {name!r}.{hint} It has {', '.join(variants)}")
    config.update_from_flattened_dict(variants[name] if name else {})
    return config


def from_data(algorithm: str) -> bool:
    """Whether the method learns from a data set: its run's rewards are then evaluated, and not trained on."""
    return algorithm in ("sft", "diffusion_dpo")


def joined(argv: list[str]) -> list[str]:
    """The arguments with `--config.field value` written as `--config.field=value`."""
    result: list[str] = []
    for arg in argv:
        if result and OVERRIDE.match(result[-1]) and "=" not in result[-1] and not arg.startswith("-"):
            result[-1] += f"={arg}"
        else:
            result.append(arg)
    return result


def _flags(argv: list[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    argv = ["main", *argv]
    # A config file may import its neighbours (`from configs import base`) wherever the command is run.
    for arg in argv:
        if arg.startswith("--config="):
            path = Path(arg.split("=", 1)[1].split(":")[0]).absolute()
            if not path.is_file():
                raise UserError(f"--config={path}: no such file; usage: {USAGE}")
            sys.path += [str(folder) for folder in path.parents[1:3]]  # of configs/NAME.py, configs/GROUP/NAME.py
    config_flags.DEFINE_config_file("config", None, "a config file", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=values)
    for name, told in PROCESSES.items():
        flags.DEFINE_string(name, None, told, flag_values=values)
    try:
        rest = values(argv)
    except Exception as error:  # a config file is Python, and may raise anything
        first = _first(error)
        if isinstance(first, UserError):
            raise UserError(str(first)) from error
        if "get_config() takes 0 positional arguments" in str(first):
            raise UserError("this recipe has no variants: leave out the colon and what is behind it") from error
        raise UserError(f"{error} ({type(error).__name__}); usage: {USAGE}") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; usage: {USAGE}")
    return values


def _first(error: BaseException) -> BaseException:
    """What was raised before all else: ml_collections and absl wrap it, traceback and all."""
    while error.__context__ is not None:
        error = error.__context__
    return error
