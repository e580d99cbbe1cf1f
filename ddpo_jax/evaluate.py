"""Compare two models by reward, at the same prompts and from the same noise; or look at one.

python -m ddpo_jax.evaluate --model=runs/quickstart --against=tiny --reward=clip_score,jpeg_compressibility \\
  --prompts=common_animals --num_prompts=256 --output=DIR
python -m ddpo_jax.evaluate --model=runs/quickstart --output=DIR

A model is a diffusers folder, a hub id, `tiny`, a run's folder or checkpoints/STEP in it. Of a run are taken, where no
flag says otherwise: its prompts (those that it held out, if any), its reward and what that is made with, and how it
samples; of two runs those of --model. Both models draw in the same way. Writes evaluation.html, a page with the
pictures side by side, evaluation.json, all that was found, and rewards.csv, a row a picture. All intervals are of 95 %.
A reward that a model was not trained on tells of over-optimisation, prompts that it has not seen of generalisation:
--split=held_out, or a set such as unseen_animals. --config.reward.FIELD=VALUE sets what a reward is made with.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from ddpo_jax import prompt_flags, runtime, sampling, saved, scoring, starts
from ddpo_jax.command import base_of, check_output, describe, run_command
from ddpo_jax.drawn import Drawn, draw_and_score, is_embedded, load_features, try_out
from ddpo_jax.errors import UserError
from ddpo_jax.findings import plain, summary, table, weigh
from ddpo_jax.report import comparison as report
from ddpo_jax.report.told import public
from ddpo_jax.saved import Loaded
from ddpo_jax.types import Prompts, PyTree, Reward
from ddpo_jax.workdir import write_atomically

FLAGS = sampling.FLAGS | scoring.FLAGS | prompt_flags.FLAGS


class Plan(NamedTuple):
    """What the flags ask for, loaded and checked."""

    sources: list[str]  # the model, and the one that it is compared with, if there is one
    models: list[Loaded]
    origin: str  # of the prompts
    prompts: Prompts  # of each picture
    settings: sampling.Settings
    reward: Reward
    params: tuple[PyTree, ...]
    in_flight: int  # chunks scored while others are drawn
    embed: Callable | None
    eye: str  # the CLIP that embeds
    notes: tuple[str, ...]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    fields, others = scoring.split_fields(argv)
    line = starts.command(argv, "evaluate")
    return run_command(lambda flags: evaluate(flags, fields, line), parser(), others, flag_of=FLAGS)


def parser() -> argparse.ArgumentParser:
    parser = describe(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="a diffusers folder, a hub id, tiny, a run's folder, or checkpoints/STEP in it")
    add("--against", default="", help="another one that it is compared with")
    add("--reward", default="", help="one, or several with commas between: the first is the main one; a run's own")
    add("--output", required=True, type=Path, help="the folder to write to")
    prompt_flags.add_prompt_flags(parser)
    add("--num_prompts", type=int, help="spread evenly over them, and round again; all of them once by default")
    add(
        "--num_images", type=int, default=1, help="of each prompt; 1 by default; 2 or more tell of diversity within one"
    )
    add("--features", default="", help="the CLIP that diversity is measured by: tiny, a folder or a hub id")
    sampling.add_sampling_flags(parser, chunk_size=8)
    return parser


def evaluate(flags: argparse.Namespace, fields: Sequence[str], line: str = "") -> None:
    """Draws, scores and writes what the flags ask for. fields: flags --config.reward.FIELD=VALUE.  line: the command.

    Raises:
        UserError: a flag, a model, the reward or the output folder cannot be used.
        RunStopped: the reward raised, or gave no scores in time.
    """
    output = flags.output.expanduser()
    plan = prepare(flags, fields)
    begin = time.monotonic()
    drawn = []
    for model in plan.models:
        draw = sampling.make_draw(model, plan.settings, seed=flags.seed)
        scorer = (plan.reward, plan.params)
        drawn.append(
            draw_and_score(
                draw, *scorer, plan.prompts, plan.embed, chunk_size=flags.chunk_size, in_flight=plan.in_flight
            )
        )
    seconds = time.monotonic() - begin
    settings = described(flags, plan, line=line, seconds=seconds, size=drawn[0].size)
    told = weigh(plan.reward.names, plan.prompts, drawn, labels(plan.sources))
    shown = {name: str(value) for name, value in settings.items() if value is not None}
    told = told._replace(facts=facts(settings), notes=(*plan.notes, *why_missing(drawn)), settings=shown)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "rewards.csv", table(told, plan.prompts, drawn))
    write_atomically(output / "evaluation.json", json.dumps(plain(told, settings), indent=2, ensure_ascii=False) + "\n")
    write_atomically(output / "evaluation.html", report.page_of(told))
    for text in summary(told):
        print(text)
    print(f"{output}: {len(told.texts)} pictures{' each' if flags.against else ''} in {seconds:.1f} s, evaluation.html")


def prepare(flags: argparse.Namespace, fields: Sequence[str]) -> Plan:
    """Raises UserError or RunStopped for all that can be told before a picture is drawn."""
    sampling.check_sampling_flags(flags, "num_images", "num_prompts")
    check_output(flags.output.expanduser())
    runtime.set_up(flags.compilation_cache)
    sources = [flags.model, *([flags.against] if flags.against else [])]
    models = [load(source, flags, sources) for source in sources]
    check_shapes(models, sources)
    configs = [model.config for model in models if model.config]
    origin, chosen = prompt_flags.read_prompts(flags, configs)
    prompts = prompt_flags.spread(chosen, num_prompts=flags.num_prompts, num_images=flags.num_images)
    settings = sampling.settings_of(flags, configs)
    embedded = any(map(is_embedded, models))
    reward, params, made_with = scoring.make_reward(flags.reward, fields, configs, embedded=embedded)
    eye = flags.features or made_with.clip_model
    notes = differing(flags, configs, settings)
    notes += [] if eye else ["Diversity is not measured: --features=CLIP names what to measure it by."]
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    sampling.tell_too_long(models[0], chosen.texts)
    embed = load_features(eye) if eye else None
    try_out(reward, params, prompts, models[0])
    return Plan(
        sources, models, origin, prompts, settings, reward, params, made_with.num_workers, embed, eye, tuple(notes)
    )


def load(source: str, flags: argparse.Namespace, sources: Sequence[str]) -> Loaded:
    """One of the models. --base is for those that are runs."""
    base = base_of(flags)
    if any(map(saved.is_run, sources)) and not saved.is_run(source):
        base["model"] = ""
    try:
        return saved.load(source, dtype=flags.compute_dtype, resolution=flags.resolution, base=base)
    except UserError as error:
        if source == flags.model:
            raise
        raise UserError(str(error).replace("pretrained.model", "--against")) from None


def why_missing(drawn: Sequence[Drawn]) -> list[str]:
    """A note where scores are missing and their scorer says why."""
    whys = [why for one in drawn for why in one.whys if why]
    return [f"Scores are missing of {len(whys)} pictures, such as {whys[0]}"] if whys else []


def check_shapes(models: Sequence[Loaded], sources: Sequence[str]) -> None:
    """Raises UserError if the models cannot start from the same noise."""
    shapes = [model.model.latent_shape for model in models]
    if len(set(shapes)) > 1:
        told = " and ".join(f"{source} {shape}" for source, shape in zip(sources, shapes, strict=True))
        raise UserError(
            f"the models' latents are of different shapes, {told}: no noise is the same; give --resolution=PIXELS"
        )


def differing(flags: argparse.Namespace, configs: Sequence[Any], settings: sampling.Settings) -> list[str]:
    """What two runs sample in different ways, where no flag says how."""
    names = [name for name in ("num_steps", "guidance_scale") if getattr(flags, name) is None]
    return [
        f"The runs sample with different {name}, {' and '.join(f'{config.sample[name]:g}' for config in configs)};"
        f" both are drawn with {getattr(settings, name):g}."
        for name in names
        if len({config.sample[name] for config in configs}) > 1
    ]


def labels(sources: Sequence[str]) -> list[str]:
    """Short names, different ones."""
    found = []
    for source in sources:
        path = Path(source)
        if path.parent.name == "checkpoints" and path.name.isdigit():
            found.append(f"{path.parents[1].name}, round {path.name}")
        else:
            found.append((path.parent if path.name in ("checkpoints", "export") else path).name or source)
    if len(set(found)) < len(found):
        return [f"{name} ({letter})" for name, letter in zip(found, "AB", strict=True)]
    return found


def described(flags: argparse.Namespace, plan: Plan, *, line: str, seconds: float, size: int) -> dict[str, Any]:
    """What the evaluation depends on, and what it took. size: pixels of a picture, one side."""
    return {
        "model": public(flags.model),
        "against": public(flags.against) or None,
        "prompts": plan.origin,
        "num_prompts": len(set(plan.prompts.texts)),
        "num_pictures": len(plan.prompts.texts),
        "resolution": size,
        **plan.settings._asdict(),
        "seed": flags.seed,
        "compute_dtype": flags.compute_dtype,
        "reward": ",".join(plan.reward.names),
        "features": public(plan.eye) or None,
        "seconds": round(seconds, 1),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": line or None,
        **starts.environment(),
    }


def facts(settings: Mapping[str, Any]) -> dict[str, str]:
    """What the page says at its top."""
    each = " each" if settings["against"] else ""
    found = {
        "Model": settings["model"],
        "Against": settings["against"],
        "Prompts": f"{settings['num_prompts']} of {settings['prompts']}",
        "Pictures": f"{settings['num_pictures']}{each}, {settings['resolution']} pixels",
        "Sampler": f"{settings['num_steps']} steps, guidance {settings['guidance_scale']:g}, η {settings['eta']:g}",
        "Seed": str(settings["seed"]),
    }
    return {name: fact for name, fact in found.items() if fact}


if __name__ == "__main__":
    sys.exit(main())
