"""python -m ddpo_jax.main --config=configs/NAME.py [--config.train.learning_rate=1e-5] [--workdir=DIR]"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from ddpo_jax.config import parse
from ddpo_jax.errors import Preempted, RunStopped, UserError

EXIT_USER_ERROR = 2
EXIT_STOPPED = 3
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: run the same command again


def main(argv: list[str] | None = None) -> int:
    """Runs a training; the exit status. Errors that a user can mend are one line on standard error."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every save
    try:
        config, workdir = parse(sys.argv[1:] if argv is None else argv)
        import jax

        from ddpo_jax.train import train

        if config.compilation_cache:
            jax.config.update("jax_compilation_cache_dir", str(Path(config.compilation_cache).expanduser()))
        train(config, workdir)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except RunStopped as error:
        print(f"stopped: {one_line(error)}", file=sys.stderr)
        return EXIT_STOPPED
    except Preempted as error:
        print(error, file=sys.stderr)
        return EXIT_PREEMPTED
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last whole round", file=sys.stderr)
        return 130
    return 0


def one_line(error: Exception) -> str:
    """The message without the line breaks that libraries put into theirs."""
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
