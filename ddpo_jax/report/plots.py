"""The report's plots: arrays in, an `<svg>` out that takes its colours from the page, light or dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

NARROW, WIDE = (350, 230), (1000, 330)  # CSS pixels: a phone, a desktop

# Stand-ins of the page's CSS variables, which matplotlib does not know.
NAMES = ("ink", "muted", "grid", "rounds", "train", "held_out", "part0", "part1", "part2", "part3", "part4")
COLORS = {name: f"#0a0b{i:02x}" for i, name in enumerate(NAMES)}
MARKERS = {"train": "o", "held_out": "s"}

STEPS = (1, 2, 2.5, 5, 10)  # between ticks

STYLE = {
    "svg.fonttype": "none",  # text stays text: small, sharp, and in the page's font
    "svg.hashsalt": "ddpo_jax",  # the same plot gives the same file
    "font.size": 11,
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": COLORS["muted"],
    "axes.labelcolor": COLORS["muted"],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLORS["grid"],
    "grid.linewidth": 1,
    "xtick.color": COLORS["muted"],
    "ytick.color": COLORS["muted"],
    "xtick.labelcolor": COLORS["ink"],
    "ytick.labelcolor": COLORS["ink"],
    "ytick.major.size": 0,
    "lines.linewidth": 2,
    "lines.markersize": 6,
}


class Series(NamedTuple):
    """A curve. NaN is a gap."""

    color: str  # a name of COLORS
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None  # standard deviations: a band of ± one


class Interval(NamedTuple):
    """A number and how far it may be off; NaN where that is not known."""

    text: str
    value: float
    low: float
    high: float


class Change(NamedTuple):
    """A prompt's mean reward."""

    text: str
    before: float
    after: float


def curves(series: Sequence[Series], *, size: tuple[int, int], x_label: str, log: bool = False) -> str:
    """All series in one plot. log: a logarithmic axis where the values are positive and span more than a decade."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(size)
        for one in series:
            color, y = COLORS[one.color], np.asarray(one.y, float)
            if one.spread is not None:
                spread = np.asarray(one.spread, float)
                axes.fill_between(one.x, y - spread, y + spread, color=color, alpha=0.2, linewidth=0)
            marker = MARKERS.get(one.color) or ("." if len(y) <= 30 else None)
            axes.plot(one.x, y, color=color, marker=marker)
        values = np.concatenate([np.asarray(one.y, float) for one in series])
        values = values[np.isfinite(values)]
        if not values.any():
            axes.set_ylim(-0.05, 1)  # a flat line at the bottom
            axes.set_yticks([0.0])
        elif log and values.min() > 0 and values.max() > 10 * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1,) if values.max() > 1e3 * values.min() else (1, 3)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        _label_rounds(axes, x_label)
        return _svg(figure)


def stacked(parts: Sequence[Series], *, size: tuple[int, int], x_label: str) -> str:
    """The parts on top of each other, one step a round."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(size)
        base = np.zeros(len(parts[0].x))
        edges = np.append(np.asarray(parts[0].x), parts[0].x[-1] + 1) - 0.5
        for part in parts:
            top = base + np.nan_to_num(np.asarray(part.y, float))
            axes.stairs(top, edges, baseline=base, fill=True, color=COLORS[part.color], linewidth=0)
            base = top
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        _label_rounds(axes, x_label)
        return _svg(figure)


def changes(rows: Sequence[Change], *, color: str, x_label: str) -> str:
    """A line a prompt, from a small ring before to a full mark after; the first row is at the top."""
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, axes = _figure((NARROW[0], 48 + 17 * len(rows)))
        places = np.arange(len(rows))
        before, after = [row.before for row in rows], [row.after for row in rows]
        axes.hlines(places, before, after, color=COLORS[color], alpha=0.5, linewidth=2)
        axes.plot(before, places, "o", color=COLORS["muted"], markerfacecolor="none", markersize=5, markeredgewidth=1.5)
        axes.plot(after, places, MARKERS[color], color=COLORS[color])
        axes.set_yticks(places, [_shorten(row.text) for row in rows], parse_math=False)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.set_xlabel(x_label)
        return _svg(figure)


def histogram(values: Float[np.ndarray, " n"], *, size: tuple[int, int], x_label: str) -> str:
    """How many of the values, all finite and at least one, are in each of some equal intervals."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(size)
        count = int(np.clip(np.ceil(2 * np.cbrt(len(values))), 5, 40))  # Rice's rule
        heights, edges = np.histogram(np.asarray(values, float), bins=count)
        axes.bar(edges[:-1], heights, np.diff(edges) * 0.92, align="edge", color=COLORS["train"], linewidth=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.set_xlabel(x_label)
        axes.set_ylabel("pictures")
        return _svg(figure)


def intervals(rows: Sequence[Interval], *, x_label: str) -> str:
    """A mark with its interval a row, beside a line at 0; the first row is at the top."""
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, axes = _figure((NARROW[0], 64 + 30 * len(rows)))
        places = np.arange(len(rows))
        axes.axvline(0, color=COLORS["muted"], linewidth=1.5)
        axes.hlines(places, [row.low for row in rows], [row.high for row in rows], color=COLORS["train"], linewidth=3)
        axes.plot([row.value for row in rows], places, "o", color=COLORS["train"], markersize=8)
        axes.set_yticks(places, [_shorten(row.text) for row in rows], parse_math=False)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.set_xlabel(x_label)
        return _svg(figure)


def scatter(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], *, x_label: str, y_label: str) -> str:
    """A dot a pair of finite numbers, at least one, beside the line on which both are the same."""
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "both"}):
        figure, axes = _figure((NARROW[0], 300))
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        margin = 0.05 * (high - low) or 1.0
        axes.plot([low - margin, high + margin], [low - margin, high + margin], color=COLORS["muted"], linewidth=1.5)
        axes.plot(x, y, "o", color=COLORS["train"], alpha=0.45, markersize=5, markeredgewidth=0)
        axes.set_xlim(low - margin, high + margin)
        axes.set_ylim(low - margin, high + margin)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, steps=STEPS))
            axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.set_xlabel(_shorten(x_label), parse_math=False)
        axes.set_ylabel(_shorten(y_label), parse_math=False)
        return _svg(figure)


def number(value: float) -> str:
    """A tick's label: four digits at most."""
    if 1e-3 <= abs(value) < 1e5 or value == 0:
        return f"{value:.4g}".replace("-", "−")
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")


def _figure(size: tuple[int, int]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
    return figure, figure.add_subplot()


def _label_rounds(axes: Axes, x_label: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=(1, 2, 4, 5, 10)))
    axes.set_xlabel(x_label)


def _shorten(text: str) -> str:
    return text if len(text) <= 24 else text[:23] + "…"


def _svg(figure: Figure) -> str:
    """The figure for use inside HTML: without XML's preamble, links, and names that nothing refers to."""
    file = io.StringIO()
    with warnings.catch_warnings():
        # The page draws the letters; matplotlib only guesses their width.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| version="[^"]*"|<!--.*?-->', "", svg).replace("xlink:href", "href")
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 aria-hidden="true"', svg, count=1)
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return re.sub(r"\n\s*", "\n", svg).strip()
