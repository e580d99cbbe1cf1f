"""TRL's DDPOTrainer as it is shipped: its own sampling and its own step, in float32."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from parts import brightness, distance, furthest, part, read, versions
from protocol import Phases, serve, timed

torch.set_num_threads(1)
warnings.filterwarnings("ignore")

from accelerate import PartialState  # noqa: E402
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline  # noqa: E402

PartialState()  # its loggers want one before the trainer makes its own


def make_trainer(
    model: str,
    prompts: Sequence[str],
    *,
    batch: int,
    num_steps: int,
    lora: bool,
    guidance_scale: float,
    clip_range: float,
    learning_rate: float,
    eta: float = 1.0,
) -> DDPOTrainer:
    """A trainer of one optimizer step a round, over the whole batch; the others' settings are its own defaults."""
    drawn = itertools.cycle(prompts)
    return DDPOTrainer(
        DDPOConfig(
            log_with=None,
            mixed_precision="no",
            sample_num_steps=num_steps,
            sample_eta=eta,
            sample_guidance_scale=guidance_scale,
            sample_batch_size=batch,
            sample_num_batches_per_epoch=1,
            train_batch_size=batch,
            train_clip_range=clip_range,
            train_learning_rate=learning_rate,
        ),
        lambda images, prompts, metadata: (brightness(images), {}),
        lambda: (next(drawn), {}),
        DefaultDDPOStableDiffusionPipeline(model, use_lora=lora),
    )


def watch(trainer: DDPOTrainer, phases: Phases) -> None:
    """Has the trainer's own two halves of a step put into `phases` what they take."""
    generate, train = trainer._generate_samples, trainer._train_batched_samples

    def rollout(*args: Any, **kwargs: Any) -> Any:
        with timed(phases, "rollout"):
            return generate(*args, **kwargs)

    def update(*args: Any, **kwargs: Any) -> Any:
        with timed(phases, "update"):
            return train(*args, **kwargs)

    trainer._generate_samples, trainer._train_batched_samples = rollout, update


def gradient(trainer: DDPOTrainer, samples: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs (b, T) of the transitions in `samples`, and the gradient of the trainer's loss over all of them."""
    pipeline, seen = trainer.sd_pipeline, []
    step = pipeline.scheduler_step

    def scheduler_step(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        seen.append(output.log_probs.detach())
        return output

    pipeline.scheduler_step = scheduler_step
    embeds = torch.cat([samples["negative_prompt_embeds"], samples["prompt_embeds"]])
    num_steps = samples["timesteps"].shape[1]
    for j in range(num_steps):
        of_step = (samples[name][:, j] for name in ("latents", "timesteps", "next_latents", "log_probs"))
        loss, _, _ = trainer.calculate_loss(*of_step, samples["advantages"], embeds)
        (loss / num_steps).backward()
    pipeline.scheduler_step = step
    grads = {
        name.replace(".default.", "."): parameter.grad.clone()
        for name, parameter in pipeline.unet.named_parameters()
        if parameter.requires_grad
    }
    pipeline.unet.zero_grad()
    return torch.stack(seen, dim=1), grads


def agreement(trainer: DDPOTrainer, prompts: Sequence[str], path: str) -> dict[str, float]:
    """How far the trainer is from the reference at `path`, which is of the same prompts."""
    reference, pipeline = read(path), trainer.sd_pipeline
    with torch.no_grad():
        for name, factor in part(reference, "adapter/").items():
            module, _, kind = name.removesuffix(".weight").rpartition(".")
            pipeline.unet.get_parameter(f"{module}.{kind}.default.weight").copy_(factor)
    (own,), _ = trainer._generate_samples(1, len(prompts))
    made = pipeline(
        prompt_embeds=own["prompt_embeds"],
        negative_prompt_embeds=own["negative_prompt_embeds"],
        num_inference_steps=trainer.config.sample_num_steps,
        guidance_scale=trainer.config.sample_guidance_scale,
        eta=0.0,
        latents=reference["noise"],
        output_type="pt",
    )
    log_prob, grads = gradient(
        trainer,
        own
        | {
            "latents": reference["x"][:, :-1],
            "next_latents": reference["x"][:, 1:],
            "timesteps": reference["t"].long(),
            "log_probs": reference["log_prob"],
            "advantages": reference["advantage"],
        },
    )
    log_prob_own, _ = gradient(trainer, own | {"advantages": reference["advantage"]})
    return {
        "picture": furthest(made.images, reference["images"]),
        "log_prob": furthest(log_prob, reference["log_prob"]),
        "ratio": furthest(torch.exp(log_prob_own - own["log_probs"]), torch.ones(())),
        "gradient": distance(grads, part(reference, "gradient/")),
    }


def make_jobs() -> dict[str, Callable]:
    """What this party does when it is asked; `prepare` comes first."""
    trainer: DDPOTrainer
    phases: Phases = {}

    def prepare(**cell: Any) -> None:
        nonlocal trainer
        trainer = make_trainer(**cell)
        trainer.sd_pipeline.set_progress_bar_config(disable=True)
        watch(trainer, phases)

    def one_more() -> Phases:
        with timed(phases, "total"):
            trainer.step(0, 0)
        return phases

    def check(prompts: Sequence[str], path: str) -> dict[str, float]:
        return agreement(trainer, prompts, path)

    return {"versions": versions, "prepare": prepare, "round": one_more, "check": check}


if __name__ == "__main__":
    serve(make_jobs())
