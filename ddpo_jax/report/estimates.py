"""Numbers with their intervals, in words and in a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from ddpo_jax.report.page import breakable
from ddpo_jax.report.told import digits, signed
from ddpo_jax.statistics import Estimate


def level(found: Estimate, *, sign: str = "-") -> tuple[str, str]:
    """A mean and its interval. sign="+": of a difference."""
    return _parts(found, lambda value: digits(value, sign=sign))


def sigmas(found: Estimate) -> tuple[str, str]:
    """A difference in standard deviations and its interval."""
    return _parts(found, signed)


def percent(found: Estimate) -> tuple[str, str]:
    """A win rate and its interval."""
    return _parts(found, lambda value: f"{100 * value:.1f}", " %")


def said(parts: tuple[str, str], unit: str = "") -> str:
    """Both in a line."""
    number, bounds = parts
    return f"{number}{unit}{f' ({bounds})' if bounds else ''}"


def _parts(found: Estimate, show: Callable[[float], str], unit: str = "") -> tuple[str, str]:
    number = "–" if np.isnan(found.value) else show(found.value) + unit
    return number, "" if np.isnan(found.low) else f"{show(found.low)} to {show(found.high)}"


def estimates(head: Sequence[str], rows: Sequence[tuple[str, list[tuple[str, str]]]]) -> str:
    """A table of numbers above their intervals, as `level` gives them."""
    lines = [
        f"<td>{breakable(name)}</td>"
        + "".join(f'<td class="figure">{number}<small>{bounds}</small></td>' for number, bounds in cells)
        for name, cells in rows
    ]
    first, *others = head
    top = f"<th>{escape(first)}</th>" + "".join(f'<th class="figure">{breakable(text)}</th>' for text in others)
    body = "\n".join(f"<tr>{line}</tr>" for line in (top, *lines))
    return f'<div class="scroll"><table>\n{body}\n</table></div>'
