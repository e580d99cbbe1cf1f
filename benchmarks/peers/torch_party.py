"""DDPO in torch as fast as we can make it on a CPU, by the same maths as TRL's and ours.

The UNet is diffusers', compiled by inductor where there is a C++ compiler, in channels_last. A round's transitions are
rows in large micro-batches. Adapters are merged into the weights, as nothing is faster: the network is then the plain
one in sampling and in training, and the factors' gradients follow from the weights' by the chain rule, once an update.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from parts import brightness, distance, furthest, part, read, versions
from protocol import Phases, serve, timed
from transformers import CLIPTextModel, CLIPTokenizer

torch.set_num_threads(1)

RANK = 4
TARGETS = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
# Whether inductor can build what it writes: it wants a C++ compiler and Python's headers.
COMPILER = bool(shutil.which(os.environ.get("CXX", "g++"))) and Path(sysconfig.get_path("include"), "Python.h").exists()
# Pictures and rows a call: what is compiled for 16 serves every cell. Results do not depend on them.
CHUNK_SIZE = 16
MICRO_BATCH_SIZE = 16


class Steps(NamedTuple):
    """x_next ~ N(p x_t + q v, std²) of each denoising step, (T,) each."""

    t: torch.Tensor
    p: torch.Tensor
    q: torch.Tensor
    std: torch.Tensor


class Adapter(NamedTuple):
    """W + B A, with alpha = rank."""

    base: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor


class Rollouts(NamedTuple):
    context: torch.Tensor  # (b, s, d)
    x: torch.Tensor  # (b, T+1, c, h, w)
    log_prob: torch.Tensor  # (b, T)
    images: torch.Tensor  # (b, 3, H, W)


class Ready(NamedTuple):
    """All that a round needs."""

    tokenizer: CLIPTokenizer
    text: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDIMScheduler
    transition: Callable  # compiled: x (b, c, h, w), t, p, q, std (b,), context, uncond -> mean
    decode: Callable
    uncond: torch.Tensor  # (1, s, d)
    adapters: dict[str, Adapter]  # by the name of the weight; empty in full fine-tuning
    optimizer: torch.optim.Optimizer
    clip_range: float
    prompts: Sequence[str] = ()
    batch: int = 0
    num_steps: int = 0


def make_steps(scheduler: DDIMScheduler, num_steps: int, eta: float) -> Steps:
    """DDIM's transitions (Song et al. 2021, Eqs. 12 and 16) where the network predicts v; in float64, then rounded."""
    if scheduler.config.prediction_type != "v_prediction" or scheduler.config.clip_sample:
        raise ValueError("written for a model that predicts v, and whose scheduler does not clip")
    scheduler.set_timesteps(num_steps)
    t = scheduler.timesteps
    t_next = t - scheduler.config.num_train_timesteps // num_steps
    alpha_bar = torch.cumprod(1 - scheduler.betas.double(), 0)
    final = torch.ones(()).double() if scheduler.config.set_alpha_to_one else alpha_bar[0]
    now, after = alpha_bar[t], torch.where(t_next >= 0, alpha_bar[t_next.clamp(min=0)], final)
    std = eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt()
    direction = (1 - after - std**2).clamp(min=0).sqrt()
    p = after.sqrt() * now.sqrt() + direction * (1 - now).sqrt()
    q = direction * now.sqrt() - after.sqrt() * (1 - now).sqrt()
    return Steps(t, p.float(), q.float(), std.float())


def make_transition(unet: UNet2DConditionModel, guidance_scale: float) -> Callable:
    def transition(
        x: torch.Tensor, t: torch.Tensor, p: torch.Tensor, q: torch.Tensor, context: torch.Tensor, uncond: torch.Tensor
    ) -> torch.Tensor:
        """The mean of the next x, guided; t, p and q are (b,)."""
        both = torch.cat([uncond.expand_as(context), context])
        without, with_text = unet(torch.cat([x, x]), torch.cat([t, t]), both, return_dict=False)[0].chunk(2)
        v = without + guidance_scale * (with_text - without)
        return p[:, None, None, None] * x + q[:, None, None, None] * v

    return transition


def log_prob(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(b,) nats a latent element. std: (b,)."""
    z = (x - mean) / std[:, None, None, None]
    return -0.5 * (z.square() - 1).mean(dim=(1, 2, 3)) - std.log() - 0.5 * (1 + math.log(2 * math.pi))


def make_ready(*, model: str, lora: bool, guidance_scale: float, clip_range: float, learning_rate: float) -> Ready:
    """For prompts, a batch and steps that are yet to be told."""
    text = CLIPTextModel.from_pretrained(model, subfolder="text_encoder").eval().requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").eval().requires_grad_(not lora)
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").eval().requires_grad_(False)
    unet.to(memory_format=torch.channels_last)
    vae.to(memory_format=torch.channels_last)
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    adapters = {}
    for name, weight in unet.named_parameters():
        if lora and name.endswith(TARGETS):
            weight.requires_grad_(True)
            rows, columns = weight.shape
            a = torch.nn.Parameter(torch.randn(RANK, columns) / RANK)
            adapters[name] = Adapter(weight.detach().clone(), a, torch.nn.Parameter(torch.zeros(rows, RANK)))
    learned = [factor for adapter in adapters.values() for factor in (adapter.a, adapter.b)] or unet.parameters()
    return Ready(
        tokenizer,
        text,
        unet,
        vae,
        DDIMScheduler.from_pretrained(model, subfolder="scheduler"),
        compiled(make_transition(unet, guidance_scale)),
        compiled(vae.decode),
        encode(tokenizer, text, [""]),
        adapters,
        torch.optim.AdamW(learned, lr=learning_rate, weight_decay=1e-4, fused=True),
        clip_range,
    )


def compiled(function: Callable) -> Callable:
    """Compiled where there is a compiler."""
    return torch.compile(function, dynamic=False) if COMPILER else function


def encode(tokenizer: CLIPTokenizer, text: CLIPTextModel, prompts: Sequence[str]) -> torch.Tensor:
    """(b, s, d) states of the text encoder."""
    tokens = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return text(tokens)[0]


def merge(ready: Ready) -> None:
    """Puts W + B A into the UNet."""
    with torch.no_grad():
        for name, (base, a, b) in ready.adapters.items():
            torch.addmm(base, b, a, out=ready.unet.get_parameter(name).data)


@torch.no_grad()
def rollout(ready: Ready, prompts: Sequence[str], noise: torch.Tensor, steps: Steps) -> Rollouts:
    """One picture a prompt, from this noise (b, c, h, w)."""
    made = []
    for index in torch.arange(len(prompts)).split(CHUNK_SIZE):
        context, x, count = encode(ready.tokenizer, ready.text, [prompts[i] for i in index]), noise[index], len(index)
        states, log_probs = [x.contiguous(memory_format=torch.channels_last)], []
        for of_step in zip(*steps, strict=True):
            t, p, q, std = (value.expand(count).contiguous() for value in of_step)
            mean = ready.transition(states[-1], t, p, q, context, ready.uncond)
            states.append(torch.addcmul(mean, std[:, None, None, None], torch.randn_like(mean)))
            log_probs.append(log_prob(states[-1], mean, std))
        images = ready.decode(states[-1] / ready.vae.config.scaling_factor, return_dict=False)[0]
        images = (images / 2 + 0.5).clamp(0, 1)
        made.append(Rollouts(context, torch.stack(states, 1), torch.stack(log_probs, 1), images))
    return Rollouts(*map(torch.cat, zip(*made, strict=True)))


def gradient(ready: Ready, rollouts: Rollouts, advantage: torch.Tensor, steps: Steps) -> torch.Tensor:
    """Puts the gradient of the mean PPO-clip loss over all transitions into the parameters; log-probs (b, T)."""
    (count, num_steps), seen = rollouts.log_prob.shape, []
    x, x_next = rollouts.x[:, :-1].flatten(0, 1), rollouts.x[:, 1:].flatten(0, 1)
    for row in torch.arange(count * num_steps).split(MICRO_BATCH_SIZE):
        sample, step = row // num_steps, row % num_steps
        t, p, q, std = (value[step] for value in steps)
        x_t = x[row].contiguous(memory_format=torch.channels_last)
        mean = ready.transition(x_t, t, p, q, rollouts.context[sample], ready.uncond)
        new = log_prob(x_next[row], mean, std)
        ratio, gain = torch.exp(new - rollouts.log_prob.flatten()[row]), -advantage[sample]
        clipped = ratio.clamp(1 - ready.clip_range, 1 + ready.clip_range)
        (torch.maximum(gain * ratio, gain * clipped).sum() / (count * num_steps)).backward()
        seen.append(new.detach())
    for name, (_, a, b) in ready.adapters.items():
        weight = ready.unet.get_parameter(name)
        a.grad, b.grad, weight.grad = b.detach().T @ weight.grad, weight.grad @ a.detach().T, None
    return torch.cat(seen).view(count, num_steps)


def one_round(ready: Ready) -> Phases:
    """Samples, scores and makes one optimizer step; what its phases took."""
    phases: Phases = {}
    config, steps = ready.unet.config, make_steps(ready.scheduler, ready.num_steps, eta=1.0)
    with timed(phases, "total"):
        with timed(phases, "rollout"):
            prompts = list(itertools.islice(itertools.cycle(ready.prompts), ready.batch))
            noise = torch.randn(ready.batch, config.in_channels, config.sample_size, config.sample_size)
            made = rollout(ready, prompts, noise, steps)
        rewards = brightness(made.images)
        advantage = ((rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-8)).clamp(-5, 5)
        with timed(phases, "update"):
            gradient(ready, made, advantage, steps)
            learned = ready.optimizer.param_groups[0]["params"]
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            ready.optimizer.step()
            ready.optimizer.zero_grad()
            merge(ready)
    return phases


def gradients(ready: Ready) -> dict[str, torch.Tensor]:
    """Of all that is learned, by diffusers' and PEFT's names."""
    if not ready.adapters:
        return {name: parameter.grad.clone() for name, parameter in ready.unet.named_parameters()}
    return {
        f"{name.removesuffix('weight')}lora_{factor}.weight": parameter.grad.clone()
        for name, (_, a, b) in ready.adapters.items()
        for factor, parameter in (("A", a), ("B", b))
    }


def agreement(ready: Ready, prompts: Sequence[str], path: str) -> dict[str, float]:
    """How far this is from the reference at `path`, which is of the same prompts."""
    reference, steps = read(path), make_steps(ready.scheduler, ready.num_steps, eta=1.0)
    with torch.no_grad():
        for name, (_, a, b) in ready.adapters.items():
            module = f"adapter/{name.removesuffix('.weight')}"
            a.copy_(reference[f"{module}.lora_A.weight"])
            b.copy_(reference[f"{module}.lora_B.weight"])
    merge(ready)
    clean = rollout(ready, prompts, reference["noise"], make_steps(ready.scheduler, ready.num_steps, eta=0.0))
    given = Rollouts(clean.context, reference["x"], reference["log_prob"], clean.images)
    new = gradient(ready, given, reference["advantage"], steps)
    grads = gradients(ready)
    ready.optimizer.zero_grad()
    own = rollout(ready, prompts, reference["noise"], steps)
    again = gradient(ready, own, reference["advantage"], steps)
    ready.optimizer.zero_grad()
    return {
        "picture": furthest(clean.images, reference["images"]),
        "log_prob": furthest(new, reference["log_prob"]),
        "ratio": furthest(torch.exp(again - own.log_prob), torch.ones(())),
        "gradient": distance(grads, part(reference, "gradient/")),
    }


def make_jobs() -> dict[str, Callable]:
    """What this party does when it is asked; `prepare` comes first."""
    kept: dict[bool, Ready] = {}  # by whether it is LoRA: what is compiled once serves all cells
    ready: Ready

    def prepare(*, prompts: Sequence[str], batch: int, num_steps: int, lora: bool, **settings: Any) -> None:
        nonlocal ready
        if lora not in kept:
            kept[lora] = make_ready(lora=lora, **settings)
        ready = kept[lora]._replace(prompts=prompts, batch=batch, num_steps=num_steps)

    def one_more() -> Phases:
        return one_round(ready)

    def check(prompts: Sequence[str], path: str) -> dict[str, float]:
        return agreement(ready, prompts, path)

    def told() -> dict[str, str]:
        return versions() | {"compiled": str(COMPILER)}

    return {"versions": told, "prepare": prepare, "round": one_more, "check": check}


if __name__ == "__main__":
    serve(make_jobs())
