"""Loading a model folder: what may vary between folders does, and every broken one is named in one line."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import sd15
from safetensors.numpy import load_file, save_file
from small import TEXT, UNET, VAE

from ddpo_jax.errors import UserError
from ddpo_jax.models import stable_diffusion
from ddpo_jax.models.clip import text_config
from ddpo_jax.models.folder import TINY, locate
from ddpo_jax.models.unet import unet_config
from ddpo_jax.models.vae import vae_config

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "text_encoder/model.safetensors"


def load(folder, **options):
    return stable_diffusion.load(str(folder), **{"dtype": jnp.float32, **options})


@pytest.fixture
def folder(small_folder, tmp_path):
    """A copy to break."""
    return shutil.copytree(small_folder, tmp_path / "broken")


def remove(path):
    return lambda folder: (folder / path).unlink()


def write(path, content):
    return lambda folder: (folder / path).write_bytes(content)


def edit(path, **changes):
    """Changes fields of a JSON file; None removes one."""

    def change(folder):
        fields = json.loads((folder / path).read_text()) | changes
        (folder / path).write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))

    return change


def cut(path, share):
    def change(folder):
        content = (folder / path).read_bytes()
        (folder / path).write_bytes(content[: int(len(content) * share)])

    return change


def edit_tensors(path, change):
    def edit_file(folder):
        tensors = load_file(folder / path)
        save_file({name: change(name, tensor) for name, tensor in tensors.items()}, folder / path)

    return edit_file


def spoil(path, tensor_name, *values):
    """Puts values at the start of one tensor."""

    def change(name, tensor):
        if name == tensor_name:
            tensor = tensor.copy()
            tensor.flat[: len(values)] = values
        return tensor

    return edit_tensors(path, change)


def pickle_only(folder):
    (folder / UNET_WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")


INDEX, UNET_CONFIG, VAE_CONFIG, TEXT_CONFIG, SCHEDULER = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)
BROKEN = {  # what is done to the folder, and two things that the message says
    "no unet weights": (remove(UNET_WEIGHTS), UNET_WEIGHTS, "no such file"),
    "no vae weights": (remove(VAE_WEIGHTS), VAE_WEIGHTS, "no such file"),
    "no text weights": (remove(TEXT_WEIGHTS), TEXT_WEIGHTS, "no such file"),
    "a pickle": (pickle_only, UNET_WEIGHTS, "diffusion_pytorch_model.bin is a pickle"),
    "half the weights": (cut(UNET_WEIGHTS, 0.5), UNET_WEIGHTS, "not a whole safetensors file"),
    "half a header": (cut(VAE_WEIGHTS, 0.01), VAE_WEIGHTS, "not a whole safetensors file"),
    "empty weights": (write(TEXT_WEIGHTS, b""), TEXT_WEIGHTS, "not a whole safetensors file"),
    "NaN": (spoil(UNET_WEIGHTS, "conv_out.bias", np.nan), UNET_WEIGHTS, "'conv_out.bias' holds values that are not"),
    "inf": (spoil(VAE_WEIGHTS, "quant_conv.bias", np.inf, -np.inf), VAE_WEIGHTS, "'quant_conv.bias' holds values"),
    "other widths": (edit(UNET_CONFIG, block_out_channels=[8, 24]), UNET_WEIGHTS, "has shape"),
    "one layer more": (edit(UNET_CONFIG, layers_per_block=2), UNET_WEIGHTS, "is missing"),
    "one layer less": (edit(TEXT_CONFIG, num_hidden_layers=1), TEXT_WEIGHTS, "have no place in this network"),
    "no index": (remove(INDEX), INDEX, "no such file"),
    "no unet config": (remove(UNET_CONFIG), UNET_CONFIG, "no such file"),
    "no scheduler": (remove(SCHEDULER), SCHEDULER, "no such file"),
    "half a JSON": (cut(UNET_CONFIG, 0.5), UNET_CONFIG, "not valid JSON"),
    "not text": (write(VAE_CONFIG, b"\xff\xfe{}"), VAE_CONFIG, "not valid JSON"),
    "not an object": (write(TEXT_CONFIG, b"[1]"), TEXT_CONFIG, "expected a JSON object, found list"),
    "SDXL": (edit(INDEX, _class_name="StableDiffusionXLPipeline"), INDEX, "StableDiffusionXLPipeline"),
    "another class": (edit(VAE_CONFIG, _class_name="AutoencoderTiny"), VAE_CONFIG, "AutoencoderTiny"),
    "linear projection": (edit(UNET_CONFIG, use_linear_projection=True), UNET_CONFIG, "use_linear_projection=True"),
    "another block": (
        edit(UNET_CONFIG, down_block_types=["SimpleCrossAttnDownBlock2D", "DownBlock2D"]),
        UNET_CONFIG,
        "SimpleCrossAttnDownBlock2D",
    ),
    "too few blocks": (edit(UNET_CONFIG, down_block_types=["DownBlock2D"]), UNET_CONFIG, "down_block_types"),
    "too many layer counts": (edit(UNET_CONFIG, layers_per_block=[1, 1, 1]), UNET_CONFIG, "3 entries; expected 2"),
    "unet groups": (edit(UNET_CONFIG, norm_num_groups=3), UNET_CONFIG, "norm_num_groups=3"),
    "unet heads": (edit(UNET_CONFIG, attention_head_dim=3), UNET_CONFIG, "number of heads 3"),
    "no width": (edit(UNET_CONFIG, cross_attention_dim=None), "config.json", "cross_attention_dim"),
    "no latent size": (edit(UNET_CONFIG, sample_size=[4, 4]), UNET_CONFIG, "sample_size=[4, 4]"),
    "vae groups": (edit(VAE_CONFIG, norm_num_groups=3), VAE_CONFIG, "norm_num_groups=3"),
    "vae shift": (edit(VAE_CONFIG, shift_factor=0.1), VAE_CONFIG, "shift_factor=0.1"),
    "another activation": (edit(TEXT_CONFIG, hidden_act="relu"), "CLIP", "hidden_act='relu'"),
    "text heads": (edit(TEXT_CONFIG, num_attention_heads=3), "CLIP", "num_attention_heads=3"),
    "another text width": (edit(UNET_CONFIG, cross_attention_dim=24), "16 wide", "cross_attention_dim=24"),
    "inpainting": (edit(UNET_CONFIG, in_channels=9), UNET_CONFIG, "in_channels=9"),
    "learned variance": (edit(UNET_CONFIG, out_channels=8), UNET_CONFIG, "out_channels=8"),
    "another prediction": (edit(SCHEDULER, prediction_type="sample"), "prediction_type", "'sample'"),
}


@pytest.mark.parametrize(("break_it", "where", "what"), BROKEN.values(), ids=BROKEN)
def test_broken_folder(folder, break_it, where, what):
    break_it(folder)
    with pytest.raises(UserError) as raised:
        load(folder)
    message = str(raised.value)
    assert where in message
    assert what in message
    assert "\n" not in message


@pytest.mark.parametrize("resolution", [-8, 4, 12, 17])
def test_wrong_resolution(small_folder, resolution):
    with pytest.raises(UserError, match=rf"resolution={resolution}: expected a positive multiple of 8 pixels"):
        load(small_folder, resolution=resolution)


@pytest.mark.parametrize(("resolution", "shape"), [(None, (4, 4, 4)), (8, (2, 2, 4)), (24, (6, 6, 4))])
def test_resolution(small_folder, resolution, shape):
    assert load(small_folder, resolution=resolution)[0].latent_shape == shape


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files(small_folder, folder, stored):
    """They load as the numbers they hold: the denoiser in float32, whatever the file and the compute dtype."""
    expected = jax.tree.map(lambda x: np.asarray(x, stored).astype(np.float32), load(small_folder)[1][:3])
    for path in (UNET_WEIGHTS, VAE_WEIGHTS, TEXT_WEIGHTS):
        edit_tensors(path, lambda name, tensor: tensor.astype(stored))(folder)
    loaded = load(folder)[1]
    jax.tree.map(np.testing.assert_array_equal, loaded[:3], expected)
    assert {x.dtype for x in jax.tree.leaves(loaded[:3])} == {np.dtype(np.float32)}


def test_compute_dtype(small_folder):
    _, pretrained = load(small_folder, dtype=jnp.bfloat16)
    dtypes = [{str(x.dtype) for x in jax.tree.leaves(tree)} for tree in pretrained[:3]]
    assert dtypes == [{"bfloat16"}, {"float32"}, {"bfloat16"}]


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoder_with_and_without_prefix(small_folder, folder, prefix):
    tensors = load_file(folder / TEXT_WEIGHTS)
    save_file({prefix + name.removeprefix("text_model."): x for name, x in tensors.items()}, folder / TEXT_WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, load(folder)[1].text, load(small_folder)[1].text)


def test_locate(small_folder, tmp_path, monkeypatch):
    assert locate("tiny") == TINY
    assert locate(str(small_folder)) == small_folder
    file = tmp_path / "model.ckpt"
    file.touch()
    with pytest.raises(UserError, match=rf"{re.escape(str(file))}' is a file"):
        locate(str(file))
    for source in ("nowhere", "./a/b", "a/b/c", "~/no-such-folder"):
        with pytest.raises(UserError, match=rf"'{source}': no such folder"):
            locate(source)


def test_locate_on_the_hub(tmp_path, monkeypatch):
    """Neither pickles nor the formats of other frameworks are asked for; a failure says the hub's reason."""
    asked = {}

    def download(repository, *, allow_patterns):
        asked[repository] = allow_patterns
        if repository == "some/thing":
            raise OSError("no network")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("some/model") == tmp_path
    assert all(pattern.endswith((".json", ".txt", ".safetensors")) for pattern in asked["some/model"])
    with pytest.raises(UserError, match=r"'some/thing'.*\(no network\)"):
        locate("some/thing")


def test_stable_diffusion_15_has_its_size():
    configs = stable_diffusion.Configs(text_config(sd15.TEXT), unet_config(sd15.UNET), vae_config(sd15.VAE))
    shapes = stable_diffusion.parameter_shapes(configs)
    assert {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in shapes.items()} == sd15.NUM_PARAMETERS
    assert stable_diffusion.latent_shape(configs, None) == (64, 64, 4)


def test_the_small_folder_is_what_it_says(small_folder):
    configs = stable_diffusion.read_configs(small_folder)
    assert configs == (text_config(TEXT), unet_config(UNET), vae_config(VAE))
