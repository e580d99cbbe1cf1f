"""python -m ddpo_jax.report WORKDIR"""

import sys
from pathlib import Path

from ddpo_jax import report


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        print(__doc__)
        return 0 if argv[:1] in (["--help"], ["-h"]) else 2
    try:
        report.write(Path(argv[0]))
    except (OSError, ValueError, KeyError) as error:  # a KeyError: the files lack what this version reads
        print(f"error: {argv[0]}: no report can be made of it ({type(error).__name__}: {error})", file=sys.stderr)
        return 2
    print(Path(argv[0]) / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
