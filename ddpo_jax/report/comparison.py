"""evaluation.html: what a model draws at fixed prompts and noise, alone or beside another one."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ddpo_jax.report import plots
from ddpo_jax.report.estimates import estimates, level, percent, said, sigmas
from ddpo_jax.report.page import breakable, details, page, plot, section, table
from ddpo_jax.report.pictures import choose
from ddpo_jax.report.plots import NARROW, Interval
from ddpo_jax.report.scores import MAX_TEXT, short
from ddpo_jax.report.told import digits
from ddpo_jax.statistics import Comparison, Diversity, Estimate

MAX_PAIRS = 12  # under a heading


class Side(NamedTuple):
    """A model, and what it drew."""

    label: str
    means: tuple[Estimate, ...]  # of each expert
    scores: Float[np.ndarray, "n experts"]  # NaN where missing
    pictures: list[str]  # data URIs
    tiny: bool  # pixels matter
    diversity: Diversity | None  # None: nothing measured it


class Told(NamedTuple):
    """An evaluation."""

    names: tuple[str, ...]  # of the experts; the first is the main one
    texts: tuple[str, ...]  # of each picture
    sides: tuple[Side, ...]  # the model, and the one that it is compared with, if there is one
    comparisons: tuple[Comparison, ...]  # of each expert; empty without the other model
    diversity: Diversity | None  # by how much the model's is more
    facts: dict[str, str]
    notes: tuple[str, ...]
    settings: dict[str, str]


def page_of(told: Told) -> str:
    """The whole page."""
    body = [header(told), summary(told), panels(told), diversity(told), pictures(told), settings(told)]
    return page(f"{title(told)}: ddpo_jax", "\n".join(body), running=False)


def title(told: Told) -> str:
    return " against ".join(side.label for side in told.sides)


def header(told: Told) -> str:
    items = "".join(f"<div><dt>{name}</dt><dd>{breakable(fact)}</dd></div>" for name, fact in told.facts.items())
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in told.notes)
    return (
        f'<header>\n<h1>{escape(title(told))}</h1>\n<p class="result">{escape(result(told))}</p>\n'
        f'<dl class="facts">{items}</dl>{notes}\n</header>'
    )


def result(told: Told) -> str:
    """The evaluation in a sentence or two."""
    name, side = short(told.names[0]), told.sides[0]
    if not told.comparisons:
        return f"The mean {name} of {side.label} is {said(level(side.means[0]))}."
    other, found = told.sides[1], told.comparisons[0]
    if not found.count:
        return f"No pair has a {name} of both models, so that nothing can be compared."
    way = {1: "higher than", -1: "lower than", 0: "equal to"}[int(np.sign(found.difference.value))]
    text = (
        f"At the same prompts and noise the mean {name} of {side.label} is {way} that of {other.label}{_by(found)}."
        f" It wins {said(percent(found.win_rate))} of {found.count} pairs."
    )
    if not clear(found) and found.difference.value:
        text += " The interval of the difference holds 0: it may be chance."
    for name, one in zip(told.names[1:], told.comparisons[1:], strict=True):
        if clear(one):
            text += f" Its {short(name)} is {'higher' if one.difference.value > 0 else 'lower'}{_by(one)}."
    return text


def _by(found: Comparison) -> str:
    if not found.difference.value:
        return ""
    deviations = "" if np.isnan(found.sigmas.value) else f", {said(sigmas(found.sigmas), ' σ')}"
    return f" by {digits(abs(found.difference.value))}{deviations}"


def clear(found: Comparison) -> bool:
    """Whether the interval of the difference leaves no doubt about which model is better."""
    return found.difference.low > 0 or found.difference.high < 0


def summary(told: Told) -> str:
    """A row an expert."""
    missing = sum(int(np.isnan(side.scores).any(axis=1).sum()) for side in told.sides)
    rows = []
    for k, name in enumerate(told.names):
        cells = [level(side.means[k]) for side in told.sides]
        found = np.isfinite([side.scores[:, k] for side in told.sides]).all(axis=0)
        if told.comparisons:
            one = told.comparisons[k]
            cells += [level(one.difference, sign="+"), sigmas(one.sigmas), percent(one.win_rate)]
        cells += [(str(found.sum()), ""), *([(str((~found).sum()), "")] if missing else [])]
        rows.append((short(name), cells))
    compared = ["difference", "in σ", "win rate", "pairs"] if told.comparisons else ["pictures"]
    head = ["reward", *(side.label for side in told.sides), *compared, *(["missing"] if missing else [])]
    explained = "Means, with 95 % bootstrap intervals below them: prompts are drawn anew with all their pictures."
    if told.comparisons:
        explained += (
            f" σ is the standard deviation of the pictures of {told.sides[1].label}. A tie counts as half a win. From"
            " the same noise, models that differ little draw nearly the same pictures, so that the win rate can be far"
            " from 50 % where the difference is small: read both."
        )
    return section(
        "rewards",
        "Rewards",
        estimates(head, rows),
        f'<p class="note">{escape(explained)}</p>',
    )


def panels(told: Told) -> str:
    """The differences of all experts beside each other, then each expert's pictures."""
    found = []
    known = [k for k, one in enumerate(told.comparisons) if np.isfinite(one.sigmas.value)]
    if known:
        rows = [Interval(short(told.names[k]), *told.comparisons[k].sigmas) for k in known]
        found.append(
            plot(
                "Difference of each reward",
                f"Right of the line {told.sides[0].label} is better. A reward that it was not trained on and that falls"
                " is a sign of over-optimisation.",
                plots.intervals(rows, x_label="standard deviations"),
            )
        )
    for k, name in enumerate(told.names):
        columns = [side.scores[:, k].astype(float) for side in told.sides]
        both = np.isfinite(columns).all(axis=0)
        if not both.any():
            continue
        if told.comparisons:
            svg = plots.scatter(
                columns[1][both], columns[0][both], x_label=told.sides[1].label, y_label=told.sides[0].label
            )
            found.append(plot(short(name), f"Each dot is a pair; above the line {told.sides[0].label} is better.", svg))
        else:
            found.append(plot(short(name), "", plots.histogram(columns[0][both], size=NARROW, x_label="score")))
    return f'<div class="plots">{"".join(found)}</div>'


def diversity(told: Told) -> str:
    """How far the pictures are from each other."""
    if told.sides[0].diversity is None:
        return ""
    rows = []
    for name, text in (("overall", "all pictures"), ("within", "pictures of one prompt")):
        cells = [level(getattr(side.diversity, name)) for side in told.sides]
        if np.isfinite(getattr(told.sides[0].diversity, name).value):
            more = [level(getattr(told.diversity, name), sign="+")] if told.diversity else []
            rows.append((text, [*cells, *more]))
    if not rows:
        return section("diversity", "Diversity", '<p class="note">There are too few pictures to tell.</p>')
    head = ["between", *(side.label for side in told.sides), *(["difference"] if told.diversity else [])]
    explained = (
        "Mean 1 − cos between a CLIP's embeddings of two pictures, with 95 % intervals: 0 where all are the same."
        " Where it falls as the reward rises, the model has come to draw fewer things."
    )
    return section("diversity", "Diversity", estimates(head, rows), f'<p class="note">{escape(explained)}</p>')


def pictures(told: Told) -> str:
    """The pairs that changed most for the better and for the worse, and others that nobody picked."""
    main = told.sides[0].scores[:, 0].astype(float)
    gain = main - told.sides[1].scores[:, 0] if told.comparisons else main
    order = [int(i) for i in np.argsort(-gain, kind="stable") if np.isfinite(gain[i])]
    if told.comparisons:
        blocks = [
            ("Biggest gains", first_of_each([i for i in order if gain[i] > 0], told.texts)),
            ("Biggest losses", first_of_each([i for i in order[::-1] if gain[i] < 0], told.texts)),
        ]
        note = f"Each pair began with the same noise. Left: {told.sides[1].label}; right: {told.sides[0].label}."
    else:
        blocks = [
            ("Highest", first_of_each(order, told.texts)),
            ("Lowest", first_of_each(order[::-1], told.texts)),
        ]
        note = f"Of {len(main)} pictures."
    blocks.append(("Not picked by hand: the first of each prompt", choose(told.texts, MAX_PAIRS)))
    contents = [f'<p class="note">{escape(f"{note} By {short(told.names[0])}, one of each prompt.")}</p>']
    kind = "pictures" if told.comparisons else "ranked"
    for heading, chosen in blocks:
        if chosen:
            figures = "\n".join(figure(told, i, gain[i]) for i in chosen)
            contents.append(f'<h3>{heading}</h3>\n<div class="{kind}">\n{figures}\n</div>')
    return section("pictures", "Side by side" if told.comparisons else "Pictures", *contents)


def first_of_each(order: Sequence[int], texts: Sequence[str]) -> list[int]:
    """The first MAX_PAIRS positions of different prompts."""
    found: dict[str, int] = {}
    for i in order:
        found.setdefault(texts[i], i)
    return list(found.values())[:MAX_PAIRS]


def figure(told: Told, i: int, gain: float) -> str:
    """A pair under its prompt, each picture over its scores; a single picture over its own."""
    text = told.texts[i] if len(told.texts[i]) <= MAX_TEXT else told.texts[i][: MAX_TEXT - 1] + "…"
    cells = [
        f'<img src="{side.pictures[i]}" alt="{escape(f"{told.texts[i]}, {side.label}")}"{smooth(side)}>'
        for side in reversed(told.sides)
    ]
    scores = [[digits(float(score)) for score in side.scores[i]] for side in reversed(told.sides)]
    lines = [
        f"{breakable(short(name))} <b>{' → '.join(own)}</b>" for name, *own in zip(told.names, *scores, strict=True)
    ]
    if told.comparisons:
        change = f" <span>{digits(float(gain), sign='+')}</span>" if np.isfinite(gain) else ""
        rows = "".join(f"<span>{line}</span>" for line in lines)
        return (
            f'<figure class="pair"><figcaption>{escape(text)}{change}</figcaption>{"".join(cells)}'
            f'<div class="scores">{rows}</div></figure>'
        )
    others = "".join(f'<span class="other">{line}</span>' for line in lines[1:])
    head = f"<b>{scores[0][0]}</b><q>{escape(text)}</q>"
    return f"<figure>{cells[0]}<figcaption>{head}{others}</figcaption></figure>"


def settings(told: Told) -> str:
    rows = [[name, value] for name, value in told.settings.items()]
    return section("settings", "Settings", details("How it was made", table(["what", "value"], rows)))


def smooth(side: Side) -> str:
    return "" if side.tiny else ' class="smooth"'
