"""Whole folders, both ways: what diffusers saves is sampled here as there, and what we export opens there."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small import TEXT, UNET, VAE, write_folder

from ddpo_jax.export import export
from ddpo_jax.models import stable_diffusion
from ddpo_jax.models.tokenizer import load_tokenizer, tokenize
from ddpo_jax.policy import make_policy, make_sampler, sample_keys
from ddpo_jax.tiny.tokenizer import write_tokenizer
from ddpo_jax.types import Frozen

with warnings.catch_warnings():  # what these warn about on import is not ours to fix
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from random_torch import nchw, randomise
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

PROMPTS = [
    "a photo of a cat",
    "two red dogs riding a bike on the moon, and then some words that nobody learned: zygote",
]
NUM_STEPS = 10
SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
DDIM = SCALED_LINEAR | {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}
PNDM = SCALED_LINEAR | {
    "_class_name": "PNDMScheduler",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
}  # as SD 1.5's
ABOUT = {
    "name": "small",
    "model": "small",
    "algorithm": "ddpo",
    "prompt": PROMPTS[0],
    "num_steps": NUM_STEPS,
    "guidance_scale": 5.0,
    "eta": 1.0,
    "figures": {"rounds": 1},
    "config": {"seed": 0},
}


def torch_model(kind, fields):
    return randomise(kind(**{name: value for name, value in fields.items() if name != "_class_name"}))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A small Stable Diffusion made by diffusers."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return StableDiffusionPipeline(
        vae=torch_model(AutoencoderKL, VAE),
        text_encoder=randomise(CLIPTextModel(CLIPTextConfig(**TEXT))),
        tokenizer=CLIPTokenizer.from_pretrained(folder),
        unet=torch_model(UNet2DConditionModel, UNET),
        scheduler=DDIMScheduler.from_config(DDIM),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture
def saved(pipeline, tmp_path):
    """The folder that diffusers and transformers write."""
    pipeline.save_pretrained(tmp_path)
    return tmp_path


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def our_pictures(folder, guidance_scale):
    """Starting noise and images in [0, 1]."""
    model, pretrained = stable_diffusion.load(str(folder), dtype=jnp.float32)
    tokenizer = load_tokenizer(folder / "tokenizer")
    policy = make_policy(model, num_steps=NUM_STEPS, eta=0.0, guidance_scale=guidance_scale)
    uncond = model.encode_text(pretrained.text, jnp.asarray(tokenize(tokenizer, [""])))
    frozen = Frozen(pretrained.text, None, pretrained.vae, uncond, None)
    keys = sample_keys(jax.random.key(0), 0, len(PROMPTS))
    tokens = jnp.asarray(tokenize(tokenizer, PROMPTS))
    _, trajectory, images = make_sampler(model, policy)(pretrained.denoiser, frozen, tokens, keys)
    return trajectory.x[:, 0], np.asarray(images)


def their_pictures(pipeline, noise, guidance_scale):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        latents=nchw(noise),
        num_inference_steps=NUM_STEPS,
        guidance_scale=guidance_scale,
        eta=0.0,
        output_type="np",
    ).images


def check_same_pictures(folder, pipeline, guidance_scale=5.0):
    noise, ours = our_pictures(folder, guidance_scale)
    theirs = their_pictures(pipeline, noise, guidance_scale)
    assert np.mean((theirs > 0) & (theirs < 1)) > 0.5  # saturated pixels prove nothing
    assert theirs.std() > 0.02
    assert ours.shape == theirs.shape
    assert abs(ours - theirs).max() <= 1e-4  # the text moves these pictures by 1e-2


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("scheduler", [DDIM, PNDM | {"clip_sample": False}], ids=["DDIM", "PNDM"])
def test_what_diffusers_saves(saved, scheduler, guidance_scale):
    edit_json(saved / "model_index.json", scheduler=["diffusers", scheduler["_class_name"]])
    (saved / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    opened = StableDiffusionPipeline.from_pretrained(saved)
    opened.scheduler = DDIMScheduler.from_config(opened.scheduler.config)
    check_same_pictures(saved, opened, guidance_scale)


@pytest.mark.parametrize(
    ("scheduler", "stored"),
    [(DDIM, np.float32), (DDIM | {"prediction_type": "v_prediction"}, np.float32), (PNDM, np.float16)],
    ids=["DDIM", "v-prediction", "PNDM that does not speak of clipping, in half precision"],
)
def test_what_we_export(tmp_path, scheduler, stored):
    """Opened with no setting, it is DDIM in float32, and every tensor of the text encoder's file is in the network."""
    source, folder = write_folder(tmp_path / "source", scheduler=scheduler), tmp_path / "exported"
    for path in source.glob("*/*.safetensors"):
        save_file({name: tensor.astype(stored) for name, tensor in load_file(path).items()}, path)
    _, pretrained = stable_diffusion.load(str(source), dtype=jnp.float32)
    export(source, folder, jax.tree.map(lambda x: 0.9 * x, pretrained.denoiser), about=ABOUT)
    opened = StableDiffusionPipeline.from_pretrained(folder)
    assert isinstance(opened.scheduler, DDIMScheduler)
    check_same_pictures(folder, opened)

    written = load_file(folder / "text_encoder" / "model.safetensors")
    loaded = opened.text_encoder.state_dict()
    assert len(loaded) == len(written)
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), written["text_model." + name.removeprefix("text_model.")])


@pytest.mark.parametrize("files", [("vocab.json", "merges.txt"), ("tokenizer.json",)], ids=["pair", "single"])
def test_the_exported_tokenizer(saved, tmp_path, files):
    """From either form alone, in transformers and here; exported from a folder of transformers 5, which has one."""
    folder = tmp_path / "exported"
    _, pretrained = stable_diffusion.load(str(saved), dtype=jnp.float32)
    export(saved, folder, pretrained.denoiser, about=ABOUT)
    expected = tokenize(load_tokenizer(saved / "tokenizer"), ["", *PROMPTS])
    assert len(np.unique(expected[1:])) > 10

    alone = tmp_path / "alone"
    alone.mkdir()
    for name in (*files, "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(folder / "tokenizer" / name, alone)
    for tokenizer in (CLIPTokenizer.from_pretrained(alone), load_tokenizer(alone)):
        np.testing.assert_array_equal(tokenize(tokenizer, ["", *PROMPTS]), expected)


def test_both_names_of_a_text_encoder_load(saved):
    """transformers 4 writes a `text_model.` prefix, transformers 5 does not, nor more of a tokenizer than one file."""
    assert not (saved / "tokenizer" / "merges.txt").exists()
    path = saved / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    loaded = []
    for prefix in ("", "text_model."):
        save_file({prefix + name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}, path)
        loaded.append(stable_diffusion.load(str(saved), dtype=jnp.float32)[1].text)
    jax.tree.map(np.testing.assert_array_equal, *loaded)


def test_model_index(saved, small_folder, tmp_path):
    """An exported folder names the parts that one of diffusers' own does."""
    _, pretrained = stable_diffusion.load(str(small_folder), dtype=jnp.float32)
    export(small_folder, tmp_path / "exported", pretrained.denoiser, about=ABOUT)
    ours, theirs = (json.loads((folder / "model_index.json").read_text()) for folder in (tmp_path / "exported", saved))
    assert ours == theirs | {"_diffusers_version": ours["_diffusers_version"]}
