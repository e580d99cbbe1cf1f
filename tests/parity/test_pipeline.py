"""Whole folders, both ways: what diffusers saves is sampled here as there, and what we export opens there."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small import FAMILIES, WIDTH, pad_with_exclamation_marks, part_that_pads, write_folder

from ddpo_jax import finetune
from ddpo_jax.diffusers_folder import LORA_WEIGHTS, export
from ddpo_jax.errors import UserError
from ddpo_jax.models import stable_diffusion
from ddpo_jax.models.folder import WEIGHTS
from ddpo_jax.models.pipeline import TOKENIZERS, read_configs, read_schedule
from ddpo_jax.models.stable_diffusion import freeze, read_denoiser
from ddpo_jax.models.tokenizer import load_tokenizer, tokenize, tokenize_all
from ddpo_jax.policy import make_policy, make_sampler, sample_keys
from ddpo_jax.saved import export_trained
from ddpo_jax.sharding import one_device
from ddpo_jax.tiny.tokenizer import write_tokenizer

with warnings.catch_warnings():  # what these warn about on import is not ours to fix
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from random_torch import nchw, randomise
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

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
EULER = SCALED_LINEAR | {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}  # as SDXL's
SCHEDULER = "scheduler/scheduler_config.json"
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


PIPELINES = {"StableDiffusionPipeline": StableDiffusionPipeline, "StableDiffusionXLPipeline": StableDiffusionXLPipeline}
TEXT_CLASSES = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}


def make_pipeline(family, folder):
    """A small Stable Diffusion made by diffusers."""
    its = FAMILIES[family]
    parts = {
        "unet": torch_model(UNet2DConditionModel, its.unet),
        "vae": torch_model(AutoencoderKL, its.vae),
        "scheduler": DDIMScheduler.from_config(DDIM | {"prediction_type": its.scheduler["prediction_type"]}),
    }
    for part, fields in its.text.items():
        write_tokenizer(folder / part)
        if family != "1" and part == part_that_pads(family):
            pad_with_exclamation_marks(folder / part)
        (kind,) = fields["architectures"]
        parts[part] = randomise(TEXT_CLASSES[kind](CLIPTextConfig(**fields)))
        parts[TOKENIZERS[part]] = CLIPTokenizer.from_pretrained(folder / part)
    if its.pipeline == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    else:
        parts["add_watermarker"] = False
    return PIPELINES[its.pipeline](**parts)


@pytest.fixture(scope="module", params=FAMILIES)
def pipeline(tmp_path_factory, request):
    return make_pipeline(request.param, tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture
def saved(pipeline, tmp_path):
    """The folder that diffusers and transformers write."""
    pipeline.save_pretrained(tmp_path)
    return tmp_path


def open_pipeline(folder, **options):
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    kind = PIPELINES[name]
    return kind.from_pretrained(folder, **({"add_watermarker": False} if "XL" in name else {}), **options)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


SAMPLERS = {}  # of folders that differ in their weights alone, one is compiled


def our_pictures(folder, guidance_scale):
    """Starting noise and images in [0, 1]."""
    model, pretrained = stable_diffusion.load(str(folder), dtype=jnp.float32)
    configs = read_configs(folder)
    schedule = read_schedule(folder, configs.pipeline)
    known = str(configs), str(schedule._replace(alpha_bar=schedule.alpha_bar.tobytes())), guidance_scale
    if known not in SAMPLERS:
        policy = make_policy(model, num_steps=NUM_STEPS, eta=0.0, guidance_scale=guidance_scale)
        SAMPLERS[known] = make_sampler(model, policy, finetune.full().merge, layout=one_device())
    keys = sample_keys(jax.random.key(0), np.arange(len(PROMPTS)))
    tokens = jnp.asarray(tokenize_all(pretrained.tokenizers, PROMPTS))
    _, trajectory, images = SAMPLERS[known](pretrained.denoiser, freeze(model, pretrained), tokens, keys)
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
def test_what_diffusers_saves(saved, guidance_scale):
    check_same_pictures(saved, open_pipeline(saved), guidance_scale)


@pytest.mark.parametrize(
    "scheduler",
    [PNDM | {"clip_sample": False}, EULER, *(EULER | {"timestep_spacing": name} for name in ("linspace", "trailing"))],
    ids=["PNDM", "Euler", "linspace", "trailing"],
)
def test_another_scheduler_gives_its_schedule_alone(saved, scheduler):
    scheduler = scheduler | {"prediction_type": json.loads((saved / SCHEDULER).read_text())["prediction_type"]}
    edit_json(saved / "model_index.json", scheduler=["diffusers", scheduler["_class_name"]])
    (saved / SCHEDULER).write_text(json.dumps(scheduler))
    opened = open_pipeline(saved)
    opened.scheduler = DDIMScheduler.from_config(opened.scheduler.config, clip_sample=False)
    check_same_pictures(saved, opened)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # it says that the folder is old
def test_what_diffusers_mends_in_an_old_folder(tmp_path):
    """Its pipeline of 1.x and 2.x sets two fields as they should be, whatever the folder says; so do we."""
    make_pipeline("1", tmp_path / "tokenizers").save_pretrained(tmp_path)
    edit_json(tmp_path / SCHEDULER, steps_offset=0, clip_sample=True)
    check_same_pictures(tmp_path, open_pipeline(tmp_path))


def test_zeros_or_the_empty_prompt(tmp_path):
    """What XL's guidance leads away from is in its folder, and moves the pictures."""
    make_pipeline("xl", tmp_path / "tokenizers").save_pretrained(tmp_path)
    zeros = our_pictures(tmp_path, 5.0)[1]
    edit_json(tmp_path / "model_index.json", force_zeros_for_empty_prompt=False)
    check_same_pictures(tmp_path, open_pipeline(tmp_path))
    assert abs(our_pictures(tmp_path, 5.0)[1] - zeros).max() > 1e-2


@pytest.mark.parametrize(("family", "stored"), [*((family, np.float32) for family in FAMILIES), ("xl", np.float16)])
def test_what_we_export(tmp_path, family, stored):
    """Opened with no setting, it is DDIM in float32, and every tensor of a text encoder is in the network."""
    scheduler = PNDM | {"clip_sample": False, "prediction_type": FAMILIES[family].scheduler["prediction_type"]}
    source, folder = write_folder(tmp_path / "source", family, scheduler=scheduler), tmp_path / "exported"
    for path in source.glob("*/*.safetensors"):
        save_file({name: tensor.astype(stored) for name, tensor in load_file(path).items()}, path)
    _, pretrained = stable_diffusion.load(str(source), dtype=jnp.float32)
    export(pretrained.source, folder, jax.tree.map(lambda x: 0.9 * x, pretrained.denoiser), about=ABOUT)
    opened = open_pipeline(folder)
    assert isinstance(opened.scheduler, DDIMScheduler)
    check_same_pictures(folder, opened)
    for part in FAMILIES[family].text:
        written = load_file(folder / part / "model.safetensors")
        loaded = getattr(opened, part).state_dict()
        assert len(loaded) == len(written)
        for name, tensor in loaded.items():
            assert tensor.dtype == torch.float32
            known = name if name in written else "text_model." + name
            np.testing.assert_array_equal(tensor.numpy(), written[known])


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # its new name is not in diffusers 0.35
@pytest.mark.parametrize(("family", "dtype"), [("1", "float16"), ("2", "bfloat16"), ("xl", "float16")])
def test_an_export_in_half_precision(tmp_path, family, dtype):
    """Every weight is stored in it, and opens both as it is and in float32."""
    source, folder = write_folder(tmp_path / "source", family), tmp_path / "exported"
    _, pretrained = stable_diffusion.load(str(source), dtype=jnp.float32)
    export(pretrained.source, folder, pretrained.denoiser, about=ABOUT, dtype=jnp.dtype(dtype))
    found = {str(x.dtype) for path in folder.glob("*/*.safetensors") for x in load_file(path).values()}
    assert found == {dtype}
    check_same_pictures(folder, open_pipeline(folder))
    half = open_pipeline(folder, torch_dtype=getattr(torch, dtype))
    assert {half.unet.dtype, half.text_encoder.dtype, half.vae.dtype} == {getattr(torch, dtype)}


LORAS = {
    "attention": finetune.ATTENTION,
    "attention, feed-forward, convolutions": r"(attn[12]/to_\w+|ff/net_\w+(/proj)?|resnets_\d/conv\d|proj_in)/kernel$",
}


@pytest.mark.parametrize("targets", LORAS.values(), ids=LORAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_lora_in_the_model_that_it_was_trained_on(tmp_path, family, targets):
    """load_lora_weights on the source gives the pictures of our merged model, and they differ from the source's."""
    source, folder = write_folder(tmp_path / "source", family), tmp_path / "exported"
    _, pretrained = stable_diffusion.load(str(source), dtype=jnp.float32)
    tuning, rng = finetune.lora(rank=3, alpha=6.0, targets=targets), np.random.default_rng(0)
    factors = jax.eval_shape(tuning.init, jax.random.key(0), pretrained.denoiser)
    factors = jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), factors)
    export_trained(pretrained.source, folder, tuning, factors, about=ABOUT)

    opened = open_pipeline(source)
    opened.scheduler = open_pipeline(folder).scheduler
    noise, ours = our_pictures(folder, 5.0)
    without = their_pictures(opened, noise, 5.0)
    assert abs(ours - without).max() > 1e-2
    opened.load_lora_weights(folder)
    assert abs(ours - their_pictures(opened, noise, 5.0)).max() <= 1e-4


def test_a_lora_s_file_holds_what_peft_calls_it(tmp_path):
    source = write_folder(tmp_path / "source")
    tuning = finetune.lora(rank=2, alpha=2.0, targets=r"mid_block.*attn2/to_k/kernel$|conv_in/kernel$")
    _, pretrained = stable_diffusion.load(str(source), dtype=jnp.float32)
    factors = jax.device_get(tuning.init(jax.random.key(0), pretrained.denoiser))
    export_trained(pretrained.source, tmp_path / "exported", tuning, factors, about=ABOUT)
    shapes = {name: x.shape for name, x in load_file(tmp_path / "exported" / LORA_WEIGHTS).items()}
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    assert shapes == {
        f"{module}.lora_A.weight": (2, WIDTH),
        f"{module}.lora_B.weight": (16, 2),
        "unet.conv_in.lora_A.weight": (2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": (8, 2, 1, 1),
    }


def test_what_is_not_changed_is_exported_to_the_bit(tmp_path):
    """Even by a run that keeps the denoiser in half precision."""
    source = write_folder(tmp_path / "source")
    tuning = finetune.lora(rank=2, alpha=2.0)
    _, pretrained = stable_diffusion.load(str(source), dtype=jnp.bfloat16, exact=tuning.changes)
    factors = jax.device_get(tuning.init(jax.random.key(0), pretrained.denoiser))  # B is 0: nothing has changed
    export_trained(pretrained.source, tmp_path / "exported", tuning, factors, about=ABOUT)
    for part in ("unet", "vae", "text_encoder"):
        (path,) = (source / part).glob("*.safetensors")
        found = load_file(tmp_path / "exported" / part / path.name)
        assert found.keys() == load_file(path).keys()
        for name, tensor in load_file(path).items():
            np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    jax.tree.map(
        np.testing.assert_array_equal,
        read_denoiser(pretrained.source),
        jax.device_get(stable_diffusion.load(str(source), dtype=jnp.float32)[1].denoiser),
    )


def test_values_that_half_precision_cannot_hold_are_refused(tmp_path):
    source = write_folder(tmp_path / "source")
    _, pretrained = stable_diffusion.load(str(source), dtype=jnp.float32)
    large = jax.tree.map(lambda x: 1e6 * x, pretrained.denoiser)
    with pytest.raises(UserError, match="too large for float16"):
        export(pretrained.source, tmp_path / "exported", large, about=ABOUT, dtype=np.float16)
    assert not (tmp_path / "exported").exists()


def test_an_export_replaces_only_an_export(tmp_path):
    source, folder = write_folder(tmp_path / "source"), tmp_path / "exported"
    _, pretrained = stable_diffusion.load(str(source), dtype=jnp.float32)
    mine = {"clone/README.md": "# ddpo_jax", "exported.new/a": "1", "exported.old/b": "2", ".exported.c": "3"}
    for name, text in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for target, what in (
        (source, "a model that no export wrote"),
        (tmp_path, "other files"),
        (tmp_path / "clone", "a mo"),
    ):
        with pytest.raises(UserError, match=f"holds {what}"):
            export(pretrained.source, target, pretrained.denoiser, about=ABOUT)
    (tmp_path / "link").symlink_to(folder)
    for name, target in (("first", folder), ("second", folder), ("third", tmp_path / "link")):
        export(pretrained.source, target, pretrained.denoiser, about=ABOUT | {"name": name})
        assert f"# {name}" in (folder / "README.md").read_text()
    assert (tmp_path / "link").is_symlink()
    (folder / "thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match=r"holds other files, such as thesis\.tex"):
        export(pretrained.source, folder, pretrained.denoiser, about=ABOUT)
    assert (folder / "thesis.tex").read_text() == "all of it"
    assert {name: (tmp_path / name).read_text() for name in mine} == mine
    left = {path.name for path in tmp_path.iterdir()} - {name.partition("/")[0] for name in mine}
    assert left == {"exported", "link", "source"}


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_broken_part_is_not_exported(tmp_path, part):
    """Not even one that training never reads; and nothing is left of the attempt."""
    source, folder = write_folder(tmp_path / "source"), tmp_path / "exported"
    _, pretrained = stable_diffusion.load(str(source), dtype=jnp.float32)
    (path,) = (source / part).glob("*.safetensors")
    tensors = load_file(path)
    name = max(tensors)
    for broken, what in (
        ({**tensors, name: np.full_like(tensors[name], np.nan)}, "not finite"),
        ({key: value for key, value in tensors.items() if key != name}, "is missing"),
    ):
        save_file(broken, path)
        with pytest.raises(UserError, match=what) as raised:
            export(pretrained.source, folder, pretrained.denoiser, about=ABOUT)
        assert str(path) in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_vae_of_old_times_is_exported_in_today_s_form(tmp_path):
    """Old names and 1x1 convolutions for linear layers, which diffusers no longer reads."""
    source, folder = write_folder(tmp_path / "source"), tmp_path / "exported"
    path = source / "vae" / WEIGHTS["vae"]
    tensors = load_file(path)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        for side in ("encoder", "decoder"):
            key = f"{side}.mid_block.attentions.0.{new}"
            tensors[f"{side}.mid_block.attentions.0.{old}.weight"] = tensors.pop(f"{key}.weight")[:, :, None, None]
            tensors[f"{side}.mid_block.attentions.0.{old}.bias"] = tensors.pop(f"{key}.bias")
    save_file(tensors, path)
    _, pretrained = stable_diffusion.load(str(source), dtype=jnp.float32)
    export(pretrained.source, folder, pretrained.denoiser, about=ABOUT)
    check_same_pictures(source, open_pipeline(folder))


@pytest.mark.parametrize("files", [("vocab.json", "merges.txt"), ("tokenizer.json",)], ids=["pair", "single"])
def test_the_exported_tokenizer(saved, tmp_path, files):
    """From either form alone, in transformers and here; exported from a folder of transformers 5, which has one."""
    folder = tmp_path / "exported"
    _, pretrained = stable_diffusion.load(str(saved), dtype=jnp.float32)
    export(pretrained.source, folder, pretrained.denoiser, about=ABOUT)
    for name in sorted(path.name for path in saved.glob("tokenizer*")):
        expected = tokenize(load_tokenizer(saved / name), ["", *PROMPTS])
        assert len(np.unique(expected[1:])) > 10
        alone = tmp_path / "alone" / name
        alone.mkdir(parents=True)
        for file in (*files, "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(folder / name / file, alone)
        for tokenizer in (CLIPTokenizer.from_pretrained(alone), load_tokenizer(alone)):
            np.testing.assert_array_equal(tokenize(tokenizer, ["", *PROMPTS]), expected)


def test_both_names_of_a_text_encoder_load(saved):
    """transformers 4 writes a `text_model.` prefix, transformers 5 does not, nor more of a tokenizer than one file."""
    assert not (saved / "tokenizer" / "merges.txt").exists()
    loaded = []
    for prefix in ("", "text_model."):
        for path in saved.glob("text_encoder*/model.safetensors"):
            tensors = {name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}
            save_file({prefix * ("text_projection" not in name) + name: x for name, x in tensors.items()}, path)
        loaded.append(stable_diffusion.load(str(saved), dtype=jnp.float32)[1].text)
    jax.tree.map(np.testing.assert_array_equal, *loaded)


def test_model_index(saved, tmp_path):
    """An exported folder names the parts that one of diffusers' own does."""
    _, pretrained = stable_diffusion.load(str(saved), dtype=jnp.float32)
    export(pretrained.source, tmp_path / "exported", pretrained.denoiser, about=ABOUT)
    ours, theirs = (json.loads((folder / "model_index.json").read_text()) for folder in (tmp_path / "exported", saved))
    assert ours == theirs | {"_diffusers_version": ours["_diffusers_version"]}
