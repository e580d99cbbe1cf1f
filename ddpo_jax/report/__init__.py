"""report.html: one page that tells a run, from the files of its workdir alone.

python -m ddpo_jax.report WORKDIR
"""

from __future__ import annotations

from pathlib import Path

from ddpo_jax.report import sections
from ddpo_jax.report.page import page
from ddpo_jax.report.pictures import make_films
from ddpo_jax.report.told import read
from ddpo_jax.workdir import write_atomically


def write(workdir: Path, *, running: bool = False) -> None:
    """Writes workdir/report.html anew. running: the page says so, and loads itself again from time to time.

    Raises:
        OSError, ValueError, KeyError: there is no run in the folder, or a file of it is broken or of another version.
    """
    told = read(workdir)
    films = {name: make_films(workdir, name, rows) for name, rows in told.evaluations.items()}
    films = {name: (epochs, found) for name, (epochs, found) in films.items() if epochs}
    contents = (
        sections.header(told, running=running),
        sections.rewards(told),
        sections.before_and_after(films),
        sections.progress(films),
        sections.prompts(told),
        sections.diagnostics(told),
        sections.config(told),
        sections.environment(told),
        sections.commands(told),
    )
    write_atomically(
        workdir / "report.html", page(f"{told.workdir.name}: ddpo_jax", "\n".join(contents), running=running)
    )
