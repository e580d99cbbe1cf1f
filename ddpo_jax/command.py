"""What the small commands share: flags, and errors of one line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from ddpo_jax.errors import RunStopped, UserError

EXIT_USER_ERROR = 2
EXIT_STOPPED = 3


def describe(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def add_base_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of where a model is read from, beside its own."""
    parser.add_argument("--base", default="", help="of a run: the model that it began with, where it has moved")
    parser.add_argument("--variant", default="", help="of the model's weights, such as fp16; a run's own by default")
    parser.add_argument("--revision", default="", help="of a hub id: a branch, tag or commit; a run's own by default")


def base_of(flags: argparse.Namespace) -> dict[str, str]:
    """What `add_base_flags` were given, by the fields of `pretrained`."""
    return {"model": flags.base, "variant": flags.variant, "revision": flags.revision}


def check_output(folder: Path) -> None:
    """Raises UserError if --output cannot be made or written to."""
    output = folder.absolute()
    nearest = next(path for path in (output, *output.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--output={folder}: {nearest} cannot be written; give a folder of yours")


def quieten() -> None:
    """Keeps libraries from telling what no user needs."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every save


def run_command(
    body: Callable, parser: argparse.ArgumentParser, argv: list[str] | None, *, flag_of: Mapping[str, str] = {}
) -> int:
    """Runs `body` with the flags; the exit status. Errors that a user can mend are one line on standard error.

    flag_of: the flag that gives a field of the config, which errors name.
    """
    flags = parser.parse_args(argv)
    quieten()
    try:
        body(flags)
    except UserError as error:
        for field, flag in flag_of.items():
            error = UserError(str(error).replace(field, flag))
        return fail("error", error, EXIT_USER_ERROR)
    except RunStopped as error:
        return fail("stopped", error, EXIT_STOPPED)
    except KeyboardInterrupt:
        return 130
    return 0


def fail(what: str, error: Exception, status: int) -> int:
    """Tells of the error in one line, without the line breaks that libraries put into their messages."""
    print(f"{what}: {' '.join(str(error).split())}", file=sys.stderr)
    return status
