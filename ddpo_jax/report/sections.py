"""The parts of the report, each a function of what the workdir tells."""

from __future__ import annotations

import json
import math
import runpy
from html import escape
from pathlib import Path

from ddpo_jax.config import from_data
from ddpo_jax.report import pictures, plots
from ddpo_jax.report.page import breakable, details, keys, plot, section, table
from ddpo_jax.report.pictures import Film
from ddpo_jax.report.plots import NARROW, WIDE, Change, Series, number
from ddpo_jax.report.told import (
    SETS,
    Told,
    column,
    digits,
    duration,
    moment,
    phases,
    prompt_means,
    public,
    result,
    reward_sum,
    reward_weights,
    rounds_done,
)
from ddpo_jax.workdir import flatten

BASE = Path(__file__).parents[2] / "configs" / "base.py"
SHAPES = {"held_out": "square", "train": "round"}
MAX_CHANGES = 60  # prompts in a plot
Films = dict[str, tuple[list[int], list[Film]]]  # by set: epochs, and a film a prompt
NOT_YET = '<p class="note">There is nothing to show yet.</p>'


def header(told: Told, *, running: bool) -> str:
    """What ran, how far it came, and what it gained."""
    config = told.config
    tuned = f"LoRA of rank {config['train.lora_rank']}" if config["train.lora_rank"] else "the whole UNet"
    watched = [name for name, weight in reward_weights(told).items() if not weight]
    spent = [x for phase in phases(told) for x in column(told.rounds, phase) if math.isfinite(x)]
    facts = {
        "Algorithm": config["algorithm"],
        "Reward": reward_sum(told) + (", not trained on" if from_data(config["algorithm"]) else ""),
        **({"Watched": ", ".join(watched)} if watched else {}),
        "Model": f"{public(config['pretrained.model'])}, {tuned}",
        "Rounds": f"{rounds_done(told)} of {config['num_epochs']}",
        "Time in rounds": duration(sum(spent, 0.0)),
        **({"Started": told.starts[0]["utc"][:16].replace("T", " ") + " UTC"} if told.starts else {}),
    }
    items = "".join(f"<div><dt>{name}</dt><dd>{breakable(fact)}</dd></div>" for name, fact in facts.items())
    badge = ' <span class="badge">running</span>' if running else ""
    return (
        f"<header>\n<h1>{escape(told.workdir.name)}{badge}</h1>\n"
        f'<p class="result">{escape(result(told))}</p>\n<dl class="facts">{items}</dl>\n</header>'
    )


def rewards(told: Told) -> str:
    """The reward of the rounds and of the evaluations; each expert's where there are several; the loss without any."""
    main = reward_series(told, "reward/mean", "reward/std")
    contents = []
    if from_data(told.config["algorithm"]):
        contents.append('<p class="note">The run lowers its loss on a data set; the reward is only looked at.</p>')
        losses = [Series("rounds", column(told.rounds, "epoch"), column(told.rounds, "loss"))] if told.rounds else []
        contents.append(both_sizes("loss", losses, x_label="rounds done", log=True))
    contents.append(legend(main))
    contents.append(both_sizes("mean reward", main, x_label="rounds done"))
    weights = reward_weights(told)
    panels = [
        plot(
            name.rpartition(":")[2],
            "" if weight else "Watched: it counts nothing.",
            plots.curves(series, size=NARROW, x_label="rounds done"),
        )
        for name, weight in weights.items()
        if len(weights) > 1 and (series := reward_series(told, f"reward/{name}"))
    ]
    if panels:
        contents += ["<h3>Each reward by itself, before weighting</h3>", f'<div class="plots">{"".join(panels)}</div>']
    return section("reward", "Reward", *contents) if main else section("reward", "Reward", *contents, NOT_YET)


def reward_series(told: Told, key: str, spread: str | None = None) -> list[Series]:
    """The rounds' curve, then the evaluations', of a column; those with a value."""
    rounds = Series(
        "rounds",
        column(told.rounds, "epoch"),
        column(told.rounds, key),
        column(told.rounds, spread) if spread else None,
    )
    evaluated = [
        Series(name, column(rows, "epoch"), column(rows, key)) for name, rows in reversed(told.evaluations.items())
    ]
    return [series for series in (rounds, *evaluated) if any(map(math.isfinite, series.y))]


def legend(series: list[Series]) -> str:
    names = {"rounds": "training rounds, mean ± standard deviation"}
    names |= {name: f"{text}, fixed noise" for name, text in SETS.items()}
    return keys([(one.color, SHAPES.get(one.color, "line"), names[one.color]) for one in series]) if series else ""


def both_sizes(name: str, series: list[Series], *, x_label: str, log: bool = False) -> str:
    """One plot twice: the page shows the one that fits, so that its letters are legible on a phone."""
    if not series:
        return ""
    narrow, wide = (plots.curves(series, size=size, x_label=x_label, log=log) for size in (NARROW, WIDE))
    return (
        f'<figure role="img" aria-label="{name}"><figcaption><span>{name}</span></figcaption>'
        f'<div class="narrow">{narrow}</div><div class="wide">{wide}</div></figure>'
    )


def before_and_after(films: Films) -> str:
    """The first and the last pictures, side by side."""
    contents = [
        '<p class="note">The same prompts and noise; the first picture of each prompt, none picked by hand.</p>'
    ]
    for name, (epochs, found) in films.items():
        contents.append(f"<h3>{SETS[name].capitalize()}</h3>")
        frames = sorted({0, len(epochs) - 1})
        pairs = "\n".join(pair(film, [(frame, moment(epochs[frame])) for frame in frames]) for film in found)
        contents.append(f'<div class="pictures">\n{pairs}\n</div>')
    return section("pictures", "Before and after", *(contents if films else [NOT_YET]))


def pair(film: Film, frames: list[tuple[int, str]]) -> str:
    cells = "".join(
        f"<div>{picture(film, frame, when)}<span>{when}: {said(film.rewards[frame])}</span></div>"
        for frame, when in frames
    )
    return f'<figure class="pair"><figcaption>{escape(film.text)}</figcaption>{cells}</figure>'


def picture(film: Film, frame: int, when: str, *attributes: str) -> str:
    kind = "" if film.tiny else ' class="smooth"'
    extra = "".join(f" {attribute}" for attribute in attributes)
    return f'<img src="{film.pictures[frame]}" alt="{escape(f"{film.text}, {when}")}"{kind}{extra}>'


def said(reward: float | None) -> str:
    return "reward missing" if reward is None else digits(reward)


def progress(films: Films) -> str:
    """The same pictures at every evaluation. Without JavaScript the last ones show."""
    shown = {name: found for name, found in films.items() if len(found[0]) > 1}
    if not shown:
        return section("progress", "Frame by frame", NOT_YET)
    epochs = max((found for found, _ in shown.values()), key=len)
    last = len(epochs) - 1
    moments = "".join(f"<span {at(i, last)}>{moment(epoch)}</span>" for i, epoch in enumerate(epochs))
    slider = (
        f'<div class="slider"><input type="range" min="0" max="{last}" value="{last}" aria-label="evaluation" hidden>'
        f"<output>{moments}</output></div>"
    )
    contents = [slider]
    for name, (own, found) in shown.items():
        frames = [own.index(max((epoch for epoch in own if epoch <= now), default=own[0])) for now in epochs]
        strips = "\n".join(strip(film, frames, epochs) for film in found)
        contents += [f"<h3>{SETS[name].capitalize()}</h3>", f'<div class="films">\n{strips}\n</div>']
    return section("progress", "Frame by frame", *contents)


def strip(film: Film, frames: list[int], epochs: list[int]) -> str:
    last = len(frames) - 1
    images = "".join(picture(film, frame, moment(epochs[i]), at(i, last)) for i, frame in enumerate(frames))
    values = "".join(f"<span {at(i, last)}>{said(film.rewards[frame])}</span>" for i, frame in enumerate(frames))
    return f"<figure>{images}<figcaption>{escape(film.text)} {values}</figcaption></figure>"


def at(frame: int, last: int) -> str:
    """The attributes of what shows at one place of the slider."""
    return f'data-frame="{frame}"' + (" hidden" if frame != last else "")


def prompts(told: Told) -> str:
    """Each prompt's mean reward, before and after."""
    panels, tables = [], []
    for name, rows in told.evaluations.items():
        before, after = prompt_means(rows[0]), prompt_means(rows[-1])
        found = [Change(text, before[text], after.get(text, math.nan)) for text in before]
        found.sort(key=lambda row: -math.inf if math.isnan(row.after - row.before) else row.after - row.before)
        found.reverse()
        drawn = [row for row in found if math.isfinite(row.after - row.before)]
        if len(rows) > 1 and drawn:
            note = f"{sum(row.after > row.before for row in drawn)} of {len(drawn)} prompts gained."
            if len(drawn) > MAX_CHANGES:
                note += f" Shown are {MAX_CHANGES}, evenly from the largest gain to the largest loss."
            svg = plots.changes(pictures.spread(drawn, MAX_CHANGES), color=name, x_label="mean reward of the prompt")
            marks = keys([("muted", "ring", "before"), (name, SHAPES[name], moment(rows[-1]["epoch"]))])
            panels.append(plot(SETS[name].capitalize(), note, marks + svg))
        cells = [[r.text, digits(r.before), digits(r.after), digits(r.after - r.before, sign="+")] for r in found]
        tables += [f"<h3>{SETS[name].capitalize()}</h3>"]
        tables += [table(["prompt", "before", "after", "gain"], cells, figures=True)]
    if not tables:
        return section("prompts", "Prompt by prompt", NOT_YET)
    plotted = f'<div class="plots broad">{"".join(panels)}</div>' if panels else NOT_YET
    return section("prompts", "Prompt by prompt", plotted, details("All prompts as a table", "\n".join(tables)))


def diagnostics(told: Told) -> str:
    """Whether the optimization is healthy, and where the time goes."""
    if not told.rounds:
        return section("diagnostics", "Diagnostics", NOT_YET)
    config = told.config
    nats = "nats of a step" if config["sample.log_prob_reduction"] == "sum" else "nats a latent element"
    clip_range = number(config["train.clip_range"])
    told_loss = (
        "Of the data set." if from_data(config["algorithm"]) else "Of each round's own samples: it need not fall."
    )
    panels = [
        ("ratio_max_deviation", "|ratio − 1| before the first update", "Rounding, and nothing else: it should be far"
         f" below the clip range of {clip_range}."),
        ("clip_fraction", "Clip fraction", f"Share of the denoising steps whose ratio left 1 ± {clip_range}."),
        ("approx_kl", "Approximate KL", f"How far a round's updates moved the policy, in {nats}."),
        ("kl_reference", "KL to the pretrained model", f"How far the policy has moved in all, in {nats}."),
        ("grad_norm", "Gradient norm", f"Before it is scaled down to at most {number(config['train.max_grad_norm'])}."),
        ("loss", "Loss", told_loss),
        ("implicit_accuracy", "Implicit accuracy", "Share of the pairs whose preferred picture has drawn ahead, beside"
         " the reference."),
        ("margin", "Margin", "How far it has, in nats: dpo.beta times the log-ratio."),
        ("win_over_reference", "Preferred, beside the reference", "Its denoising error less the reference's: below 0 is"
         " better. Where both rise, the pairs are pulled apart at the pictures' cost."),
        ("lose_over_reference", "Other, beside the reference", "The same of the picture that is not preferred."),
        ("denoising_mse", "Denoising error", "Of what is learned from."),
        ("effective_samples", "Effective samples", "How many samples of equal weight would say as much."),
        ("reward/missing", "Missing rewards", "Pictures without a reward; they were not learned from."),
        ("skipped_steps", "Skipped updates", "Gradients that were not finite."),
    ]  # fmt: skip
    drawn = [diagnostic(told, *panel) for panel in panels]
    drawn.append(seconds(told))
    return section("diagnostics", "Diagnostics", f'<div class="plots">{"".join(drawn)}</div>')


def diagnostic(told: Told, key: str, title: str, note: str) -> str:
    """One column's plot; nothing where there is nothing to tell."""
    y = column(told.rounds, key)
    if not any(map(math.isfinite, y)) or (key in ("reward/missing", "skipped_steps") and not any(y)):
        return ""
    x = [epoch + 1 for epoch in column(told.rounds, "epoch")]
    log = key in ("ratio_max_deviation", "grad_norm")
    return plot(title, note, plots.curves([Series("train", x, y)], size=NARROW, x_label="round", log=log))


def seconds(told: Told) -> str:
    """Where the rounds' time went."""
    x = [epoch + 1 for epoch in column(told.rounds, "epoch")]
    parts = [Series(f"part{i % 5}", x, column(told.rounds, phase)) for i, phase in enumerate(phases(told))]
    if not parts:
        return ""
    names = [
        (part.color, "square", phase.removeprefix("seconds/")) for part, phase in zip(parts, phases(told), strict=True)
    ]
    return plot(
        "Seconds by phase",
        "The first round of a start also compiles.",
        keys(names) + plots.stacked(parts, size=NARROW, x_label="round"),
    )


def config(told: Told) -> str:
    """What differs from the base, then all of it."""
    contents = []
    if BASE.exists():
        base = flatten(runpy.run_path(str(BASE))["get_config"]().to_dict())
        rows = [
            [name, public(value), public(base[name]) if name in base else "–"]
            for name, value in told.config.items()
            if name not in base or base[name] != value
        ]
        contents.append('<p class="note">What differs from configs/base.py.</p>')
        contents.append(table(["field", "this run", "base"], rows))
    whole = public(json.dumps(told.config, indent=2, ensure_ascii=False))
    return section("config", "Config", *contents, details("The whole config", f"<pre>{escape(whole)}</pre>"))


def environment(told: Told) -> str:
    """Of each start; what changed between them is told in order."""
    names = [name for name in (told.starts[-1] if told.starts else ()) if name not in ("epoch", "utc", "command")]
    rows = [
        [name, " → ".join(dict.fromkeys(str(start[name]) for start in told.starts if name in start))] for name in names
    ]
    return section("environment", "Environment", table(["", ""], rows) if rows else NOT_YET)


def commands(told: Told) -> str:
    """Every start of the run."""
    starts = [
        f'<p class="note">{escape(start["utc"].replace("T", " ").replace("+00:00", " UTC"))},'
        f" {'from the beginning' if start['epoch'] == 0 else 'on from round ' + str(start['epoch'])}</p>"
        f"<pre><span>{escape(start['command']).replace(' --', '</span> <span>--')}</span></pre>"
        for start in told.starts
    ]
    return section("commands", "Command" if len(starts) < 2 else "Commands", *(starts or [NOT_YET]))
