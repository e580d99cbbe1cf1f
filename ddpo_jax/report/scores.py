"""scores.html: the pictures of a folder by their scores."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32
from PIL import Image

from ddpo_jax.picture_folder import Entry, read_picture
from ddpo_jax.report import plots
from ddpo_jax.report.page import breakable, page, plot, section, table
from ddpo_jax.report.pictures import TINY, data_uri
from ddpo_jax.report.plots import NARROW
from ddpo_jax.report.told import digits

MAX_BEST, MAX_WORST = 240, 60  # pictures on the page
MAX_TEXT = 120  # letters of a prompt


class Summary(NamedTuple):
    """A column of scores in a few numbers; NaN where nothing is there to count."""

    count: int
    missing: int
    mean: float
    std: float
    lowest: float
    highest: float


def page_of(
    folder: Path,
    entries: tuple[Entry, ...],
    names: Sequence[str],
    values: Float32[np.ndarray, "n experts"],
    reasons: Sequence[str],
    *,
    seconds: float,
) -> str:
    """The whole page. reasons: why a picture has no score; "" where it has, or where that is not known."""
    order = ranking(values[:, 0])
    scored = [i for i in order if np.isfinite(values[i]).any()]
    body = "\n".join(
        [
            header(folder, len(entries), names, seconds=seconds),
            summaries(names, values),
            ranked(entries, names, values, scored),
            missing(entries, names, values, reasons),
        ]
    )
    return page(f"{folder.absolute().name}: scores", body, running=False)


def summary_of(column: Float32[np.ndarray, " n"]) -> Summary:
    found = column[np.isfinite(column)].astype(float)
    absent = len(column) - len(found)
    if not len(found):
        return Summary(0, absent, *[float("nan")] * 4)
    return Summary(len(found), absent, float(found.mean()), float(found.std()), float(found.min()), float(found.max()))


def ranking(column: Float32[np.ndarray, " n"]) -> list[int]:
    """Positions, the highest score first, those without one last; equal ones as they come."""
    return [int(i) for i in np.argsort(-np.nan_to_num(column.astype(float), nan=-np.inf), kind="stable")]


def header(folder: Path, count: int, names: Sequence[str], *, seconds: float) -> str:
    facts = {
        "Pictures": str(count),
        "Reward": ", ".join(names),
        "Time": f"{seconds:.1f} s, {count / seconds:.3g} pictures a second",
    }
    items = "".join(f"<div><dt>{name}</dt><dd>{breakable(fact)}</dd></div>" for name, fact in facts.items())
    title = f"Scores of {escape(folder.absolute().name)}"
    return f'<header>\n<h1>{title}</h1>\n<dl class="facts">{items}</dl>\n</header>'


def summaries(names: Sequence[str], values: Float32[np.ndarray, "n experts"]) -> str:
    """A row an expert, and how its scores are spread."""
    found = [summary_of(column) for column in values.T]
    rows = [
        [name, str(one.count), *map(_digits, (one.mean, one.std, one.lowest, one.highest)), str(one.missing)]
        for name, one in zip(names, found, strict=True)
    ]
    panels = [
        plot(
            short(name),
            f"mean {_digits(one.mean)}, std {_digits(one.std)}",
            plots.histogram(column[np.isfinite(column)], size=NARROW, x_label="score"),
        )
        for name, column, one in zip(names, values.T, found, strict=True)
        if one.count
    ]
    head = ["reward", "pictures", "mean", "std", "min", "max", "missing"]
    return section("summary", "Summary", table(head, rows, figures=True), f'<div class="plots">{"".join(panels)}</div>')


def ranked(
    entries: tuple[Entry, ...], names: Sequence[str], values: Float32[np.ndarray, "n experts"], scored: list[int]
) -> str:
    """The pictures, best first by the first expert; of very many the first and the last. scored: their ranking."""
    if not scored:
        return section("pictures", "Pictures", '<p class="note">No picture has a score.</p>')

    def block(first: int, chosen: list[int]) -> str:
        figures = "\n".join(figure(rank, entries[i], names, values[i]) for rank, i in enumerate(chosen, first))
        return f'<div class="ranked">\n{figures}\n</div>'

    by = f"By {short(names[0])}, the highest first."
    if len(scored) <= MAX_BEST + MAX_WORST:
        return section("pictures", "Pictures", f'<p class="note">{escape(by)}</p>', block(1, scored))
    left_out = len(scored) - MAX_BEST - MAX_WORST
    told = f"{by} {left_out} of {len(scored)} pictures, those between, are not shown; scores.csv has them."
    return section(
        "pictures",
        "Pictures",
        f'<p class="note">{escape(told)}</p>',
        f"<h3>The best {MAX_BEST}</h3>",
        block(1, scored[:MAX_BEST]),
        f"<h3>The last {MAX_WORST}</h3>",
        block(len(scored) - MAX_WORST + 1, scored[-MAX_WORST:]),
    )


def figure(rank: int, entry: Entry, names: Sequence[str], row: Float32[np.ndarray, " experts"]) -> str:
    """A picture over its scores, its prompt and its name."""
    picture = Image.fromarray(read_picture(entry.path))
    smooth = "" if max(picture.size) <= TINY else ' class="smooth"'
    others = "".join(
        f'<span class="other">{breakable(short(name))} <b>{_digits(score)}</b></span>'
        for name, score in zip(names[1:], row[1:], strict=True)
    )
    text = entry.text if len(entry.text) <= MAX_TEXT else entry.text[: MAX_TEXT - 1] + "…"
    prompt = f"<q>{escape(text)}</q>" if text else ""
    return (
        f'<figure><img src="{data_uri(picture)}" alt="{escape(entry.text)}"{smooth}><figcaption>'
        f"<b>{_digits(row[0])}</b><i>{rank}</i>{prompt}{others}<span>{breakable(entry.name)}</span></figcaption></figure>"
    )


def missing(
    entries: tuple[Entry, ...],
    names: Sequence[str],
    values: Float32[np.ndarray, "n experts"],
    reasons: Sequence[str],
) -> str:
    """The pictures that lack a score, with the reason; nothing where none does."""
    rows = [
        [entry.name, ", ".join(short(name) for name, lacks in zip(names, np.isnan(row), strict=True) if lacks), reason]
        for entry, row, reason in zip(entries, values, reasons, strict=True)
        if np.isnan(row).any()
    ]
    if not rows:
        return ""
    shown = rows[:MAX_BEST]
    left_out = [f'<p class="note">{len(rows) - MAX_BEST} more are in scores.csv.</p>'] if len(rows) > MAX_BEST else []
    return section("missing", "Missing scores", table(["picture", "lacks", "because"], shown), *left_out)


def short(name: str) -> str:
    """An expert's name without its module."""
    return name.rpartition(":")[2]


def _digits(value: float | np.floating) -> str:
    return digits(float(value))
