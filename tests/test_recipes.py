"""Every recipe and every variant of one: it loads, and a shrunk epoch of it runs to an export.

A network of two matrices stands in for Stable Diffusion: what a recipe says is all that is asked here, and tracing and
compiling a UNet for each would take minutes. Runs of a whole small model are in test_run.py.
"""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import SCHEDULER, random_params

from ddpo_jax import metrics, process
from ddpo_jax.config import parse, run_name
from ddpo_jax.data import prompt_source
from ddpo_jax.main import main
from ddpo_jax.methods import make_advantages
from ddpo_jax.models import stable_diffusion
from ddpo_jax.models.folder import write_weights
from ddpo_jax.models.mlp import ScoreMLP
from ddpo_jax.models.stable_diffusion import Pretrained, Source
from ddpo_jax.models.tokenizer import load_tokenizer
from ddpo_jax.tiny.tokenizer import VOCAB_SIZE
from ddpo_jax.types import Model, Posterior

CONFIGS = Path(__file__).parents[1] / "configs"


def recipes():
    """Each file of configs/, and each variant that it names, as the command line does."""
    for path in (*sorted(CONFIGS.glob("[a-z]*.py")), *sorted((CONFIGS / "compare").glob("[a-z]*.py"))):
        name = path.relative_to(CONFIGS)
        yield str(name)
        module = ".".join(("configs", *name.with_suffix("").parts))
        for variant in vars(importlib.import_module(module)).get("VARIANTS", ()):
            yield f"{name}:{variant}"


def load(recipe):
    return parse([f"--config={CONFIGS / recipe}"])[0]


def asks_a_server(config):
    return config.reward.name.startswith("vlm_")


RECIPES = tuple(recipes())
ASKING = [recipe for recipe in RECIPES if asks_a_server(load(recipe))]

# Sizes alone: everything else is the recipe's own. Two pictures a prompt, as a draw may be compared within itself.
SHRUNK = {
    "mesh.data": 1,
    "num_epochs": 1,
    "eval_prompts": 2,
    "sample.num_steps": 4,
    "sample.num_prompts": 4,
    "sample.num_samples_per_prompt": 2,
    "sample.chunk_size": 8,
    "train.num_updates": 2,
    "train.micro_batch_size": 8,
    "data.batch_size": 8,
    "dpo.num_pairs": 1,
    "rwr.top_fraction": 1.0,
    "compilation_cache": "",
}

CHANNELS = 4
LATENT = (4, 4, CHANNELS)


def stand_in(folder):
    """What `stable_diffusion.load` gives, of two kernels; `folder` gives the tokenizer and the rest."""
    rng = np.random.default_rng(0)

    def kernel(rows):
        return (0.1 * rng.normal(size=(rows, CHANNELS))).astype(np.float32)

    def predict(params, x_t, t, cond):
        text = cond.mean(axis=1) @ params["attn2"]["to_k"]["kernel"]
        return x_t @ params["attn1"]["to_q"]["kernel"] + text[:, None, None, :]

    def encode(params, images):
        corners = images[:, ::4, ::4]
        mean = jnp.concatenate([corners, corners[..., :1]], axis=-1)
        return Posterior(mean, jnp.zeros_like(mean))

    def sample_latent(posterior, keys):
        return posterior.mean

    def decode(params, x_0):
        return jax.nn.sigmoid(jnp.repeat(jnp.repeat(x_0[..., :3], 4, axis=1), 4, axis=2))

    noise = process.ddim(process.noise_schedule(SCHEDULER))

    def encode_text(params, tokens):
        return params[tokens]

    model = Model(encode_text, encode_text, predict, encode, sample_latent, decode, noise, LATENT)
    denoiser = {"attn1": {"to_q": {"kernel": kernel(CHANNELS)}}, "attn2": {"to_k": {"kernel": kernel(CHANNELS)}}}
    tokenizers = (load_tokenizer(folder / "tokenizer"),)
    pretrained = Pretrained(kernel(VOCAB_SIZE), denoiser, {}, tokenizers, Source(folder, ""))
    return model, pretrained


def write_head(path):
    """An aesthetic predictor's file, for the embedded CLIP."""
    write_weights(path, random_params(ScoreMLP(), 0, jnp.zeros((1, 128))), dtype=np.float32)
    return path


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_shrunk_epoch_runs_to_an_export(recipe, small_folder, tmp_path, monkeypatch):
    model, pretrained = stand_in(small_folder)
    monkeypatch.setattr(stable_diffusion, "load", lambda source, **settings: (model, pretrained))
    for name in ("read_denoiser", "denoiser_shapes"):
        monkeypatch.setattr(stable_diffusion, name, lambda source: pretrained.denoiser)
    config, workdir = load(recipe), tmp_path / run_name(recipe)
    blip = "image_reward" in config.reward.name
    changes = {
        **SHRUNK,
        "data.source": {"sft": "scorers:colored", "diffusion_dpo": "scorers:red_or_blue"}.get(config.algorithm, ""),
        "backprop.min_steps": min(config.backprop.min_steps, 4),
        "backprop.max_steps": min(config.backprop.max_steps, 4),
        "reward.name": "scorers:brightness" if asks_a_server(config) or blip else config.reward.name,
        "reward.pickscore_model": "tiny",
        "reward.hpsv2_model": "tiny",
        "reward.clip_model": "tiny",
        "reward.aesthetic_model": write_head(tmp_path / "head.safetensors"),
        "reward.aesthetic_clip": "tiny",
    }
    passes = changes["train.num_inner_epochs"] = min(config.train.num_inner_epochs, 4)
    if config.algorithm == "ddpo_sf":
        changes["train.num_updates"] = 1
    arguments = (f"--config.{name}={value}" for name, value in changes.items())
    assert main([f"--config={CONFIGS / recipe}", f"--workdir={workdir}", *arguments]) == 0
    (row,) = metrics.read(workdir / "metrics.jsonl")
    assert row["step"] == (1 if config.algorithm == "ddpo_sf" else 2) * passes and row["skipped_steps"] == 0
    shown = metrics.read(workdir / "evaluations.jsonl")
    assert {(0, "train"), (1, "train")} <= {(row["epoch"], row["prompts"]) for row in shown}
    assert all(np.isfinite(row["reward/mean"]) for row in shown)
    assert (workdir / "export" / "model_index.json").is_file() and (workdir / "report.html").is_file()


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if load(recipe).algorithm.startswith("ddpo")])
def test_pictures_can_be_compared_at_a_recipes_own_sizes(recipe):
    make_advantages(load(recipe), num_prompts=45)  # raises what the shrunk epoch may not


# Of a round: samples, updates, learning rate, advantage clip, statistics of a prompt (buffer, least count), prompts.
# From jannerm/ddpo (config/base.py) and, for `lora`, kvablack/ddpo-pytorch (config/dgx.py).
PUBLISHED = {
    "compressibility.py": (256, 4, 1e-5, 10, 32, 16, 398),
    "incompressibility.py": (256, 4, 1e-5, 10, 32, 16, 398),
    "aesthetic.py": (256, 4, 1e-5, 10, 32, 16, 45),
    "alignment.py": (256, 2, 1e-5, 10, 32, 16, 135),
    "compressibility.py:lora": (256, 4, 3e-4, 5, 16, 16, 398),
    "incompressibility.py:lora": (256, 4, 3e-4, 5, 16, 16, 398),
    "aesthetic.py:lora": (256, 2, 3e-4, 5, 32, 16, 45),
    "alignment.py:lora": (288, 2, 3e-4, 5, 32, 16, 135),
    "alignment.py:counting": (256, 2, 1e-5, 10, 32, 16, 315),
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_paper_s_recipe_has_its_numbers(recipe):
    config = load(recipe)
    found = (
        config.sample.num_prompts * config.sample.num_samples_per_prompt,
        config.train.num_updates,
        config.train.learning_rate,
        config.train.adv_clip_max,
        config.per_prompt_stat_tracking.buffer_size,
        config.per_prompt_stat_tracking.min_count,
        len(prompt_source(config.prompts.name).texts),
    )
    assert found == PUBLISHED[recipe]
    assert (config.sample.num_steps, config.sample.eta, config.sample.guidance_scale) == (50, 1.0, 5.0)
    assert (config.train.clip_range, config.train.num_inner_epochs, config.train.min_timestep) == (1e-4, 1, 0)


@pytest.mark.parametrize("recipe", ASKING)
def test_a_server_that_is_not_named_is_asked_for_at_once(recipe, tmp_path, capsys):
    assert main([f"--config={CONFIGS / recipe}", f"--workdir={tmp_path / 'run'}"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "reward.vlm_url='': expected the address of a server" in errors
    assert not (tmp_path / "run").exists()
