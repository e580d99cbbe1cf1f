"""Loading a model folder: what may vary between folders does, and every broken one is named in one line."""

import json
import re
import shutil
from fnmatch import fnmatch
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small import FAMILIES, configs_of, write_folder

from benchmarks import families
from ddpo_jax.errors import UserError
from ddpo_jax.models import folder as model_folder
from ddpo_jax.models import stable_diffusion
from ddpo_jax.models.folder import write_json
from ddpo_jax.models.locate import TINY, locate, pipeline_files
from ddpo_jax.models.pipeline import read_configs
from ddpo_jax.models.tokenizer import tokenize_all

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "text_encoder/model.safetensors"
UNET_INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"


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


def quantise(folder):
    tensors = load_file(folder / UNET_WEIGHTS)
    save_file(tensors | {"conv_out.bias": np.zeros(4, np.int8)}, folder / UNET_WEIGHTS)


def swell(folder):
    tensors = load_file(folder / UNET_WEIGHTS)
    save_file(tensors | {"conv_out.bias": np.full(4, 1e300)}, folder / UNET_WEIGHTS)


def write_null(path, field):
    return lambda folder: write_json(folder / path, json.loads((folder / path).read_text()) | {field: None})


def rename_weights(suffix):
    """Of all parts: `.fp16` makes another variant of them."""

    def rename(folder):
        for path in folder.glob("*/*.safetensors"):
            path.rename(path.with_name(path.stem + suffix + path.suffix))

    return rename


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
    "a refiner": (edit(INDEX, _class_name="StableDiffusionXLImg2ImgPipeline"), INDEX, "StableDiffusionXLImg2ImgPip"),
    "XL without its second encoder": (
        edit(INDEX, _class_name="StableDiffusionXLPipeline"),
        "text_encoder_2/config.json",
        "no such file",
    ),
    "another class": (edit(VAE_CONFIG, _class_name="AutoencoderTiny"), VAE_CONFIG, "AutoencoderTiny"),
    "linear projection": (edit(UNET_CONFIG, use_linear_projection=True), UNET_WEIGHTS, "has shape"),
    "deeper transformers": (edit(UNET_CONFIG, transformer_layers_per_block=2), UNET_WEIGHTS, "is missing"),
    "nested depths": (edit(UNET_CONFIG, transformer_layers_per_block=[[1, 1], 1]), UNET_CONFIG, "whole number a block"),
    "no depth": (edit(UNET_CONFIG, transformer_layers_per_block=0), UNET_CONFIG, "[0, 0]: expected one positive"),
    "text as a width": (edit(UNET_CONFIG, block_out_channels=["8", "16"]), UNET_CONFIG, "['8', '16']: expected a list"),
    "added conditions": (
        edit(UNET_CONFIG, addition_embed_type="text_image"),
        UNET_CONFIG,
        "addition_embed_type='text_image' is not supported",
    ),
    "XL's conditions in 1.x": (
        edit(
            UNET_CONFIG,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=68,
        ),
        UNET_CONFIG,
        "StableDiffusionPipeline expects addition_embed_type=None",
    ),
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
    "an infinity in the dtype": (swell, UNET_WEIGHTS, "'conv_out.bias' holds values that are not finite in float32"),
    "a field of JSON's null": (write_null(TEXT_CONFIG, "layer_norm_eps"), TEXT_CONFIG, "layer_norm_eps=None: expected"),
    "text as a number": (edit(SCHEDULER, beta_start="a"), SCHEDULER, "beta_start='a': expected a number"),
    "text as a count": (edit(SCHEDULER, num_train_timesteps="9"), SCHEDULER, "num_train_timesteps='9': expected a who"),
    "a negative count": (edit(SCHEDULER, num_train_timesteps=-5), SCHEDULER, "num_train_timesteps=-5: expected a who"),
    "a list as a name": (edit(SCHEDULER, beta_schedule=["x"]), SCHEDULER, "a value of another kind"),
    "text as betas": (edit(SCHEDULER, trained_betas="x"), SCHEDULER, "a value of another kind"),
    "no groups": (
        edit(UNET_CONFIG, norm_num_groups=0),
        UNET_CONFIG,
        "norm_num_groups=0: expected a whole number",
    ),
    "no pixels": (edit(VAE_CONFIG, block_out_channels=[]), VAE_CONFIG, "block_out_channels=[]: expected a list"),
    "layers as text": (edit(VAE_CONFIG, layers_per_block="2"), VAE_CONFIG, "layers_per_block='2': expected a whole"),
    "one kind of block too few": (
        edit(VAE_CONFIG, down_block_types=["DownEncoderBlock2D"]),
        VAE_CONFIG,
        "for each width",
    ),
    "half a layer": (edit(TEXT_CONFIG, num_hidden_layers=2.5), TEXT_CONFIG, "num_hidden_layers=2.5: expected a whole"),
    "a list as a class": (edit(INDEX, _class_name=["a"]), INDEX, "['a'] is not supported"),
    "a length as text": (
        edit("tokenizer/tokenizer_config.json", model_max_length="77"),
        "tokenizer",
        "expected model_max_length",
    ),
    "an infinite epsilon": (edit(UNET_CONFIG, norm_eps=float("inf")), UNET_CONFIG, "norm_eps=inf: expected a number"),
    "no scale": (write_null(VAE_CONFIG, "scaling_factor"), VAE_CONFIG, "scaling_factor=None: expected a number"),
    "another activation": (edit(TEXT_CONFIG, hidden_act="relu"), TEXT_CONFIG, "hidden_act='relu'"),
    "text heads": (edit(TEXT_CONFIG, num_attention_heads=3), TEXT_CONFIG, "num_attention_heads=3"),
    "another text width": (edit(UNET_CONFIG, cross_attention_dim=24), "width, 16", "cross_attention_dim=24"),
    "inpainting": (edit(UNET_CONFIG, in_channels=9), UNET_CONFIG, "in_channels=9"),
    "learned variance": (edit(UNET_CONFIG, out_channels=8), UNET_CONFIG, "out_channels=8"),
    "another prediction": (edit(SCHEDULER, prediction_type="sample"), SCHEDULER, "'sample'"),
    "a flow model's scheduler": (
        edit(SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"),
        SCHEDULER,
        "FlowMatch",
    ),
    "a quantised tensor": (quantise, UNET_WEIGHTS, "'conv_out.bias' is stored as I8; expected one of F16"),
    "fp16 alone": (rename_weights(".fp16"), TEXT_WEIGHTS, "set pretrained.variant='fp16'"),
    "an index without its shards": (
        write(UNET_INDEX, b'{"weight_map": {"conv_in.bias": "diffusion_pytorch_model-00001-of-00002.safetensors"}}'),
        UNET_WEIGHTS.replace(".safetensors", "-00001-of-00002.safetensors"),
        "index.json names it",
    ),
    "an index that points elsewhere": (
        write(UNET_INDEX, b'{"weight_map": {"conv_in.bias": "../vae/diffusion_pytorch_model.safetensors"}}'),
        UNET_INDEX,
        "expected a weight_map",
    ),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "/tokenizer", "the model folder is not whole"),
    "another vocabulary": (edit(TEXT_CONFIG, vocab_size=1000), "/tokenizer", "reads 32 out of 1000"),
}


@pytest.mark.parametrize(("break_it", "where", "what"), BROKEN.values(), ids=BROKEN)
def test_broken_folder(folder, break_it, where, what):
    if "index" in what or "weight_map" in what:
        (folder / UNET_WEIGHTS).unlink()
    break_it(folder)
    with pytest.raises(UserError) as raised:
        load(folder)
    message = str(raised.value)
    assert where in message
    assert what in message
    assert "\n" not in message
    assert ("of another kind" in message) == ("of another kind" in what)  # a deliberate message is not wrapped in that


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


@pytest.mark.parametrize("family", FAMILIES)
def test_compute_dtype(tmp_path, family):
    """Kernels are stored in it, and vectors in float32; all of a VAE that asks for it; all that is to stay exact."""
    folder = write_folder(tmp_path, family)
    _, pretrained = load(folder, dtype=jnp.bfloat16, exact=lambda path: path.endswith("attn1/to_q/kernel"))
    for part, tree in {**pretrained.text, "unet": pretrained.denoiser, "vae": pretrained.vae}.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            exact = leaf.ndim < 2 or (path[-2].key == "to_q" and path[-3].key == "attn1")
            exact |= part == "vae" and family == "xl"
            assert leaf.dtype == (jnp.float32 if exact else jnp.bfloat16), (part, path)


@pytest.mark.parametrize("family", ["1", "xl"])
def test_storing_kernels_in_the_compute_dtype_loses_nothing(tmp_path, family):
    """To the bit: the networks round the same kernels to it wherever they come from."""
    folder = write_folder(tmp_path, family)
    model, stored = load(folder, dtype=jnp.bfloat16)
    exact = load(folder, dtype=jnp.float32)[1]
    assert {x.dtype for x in jax.tree.leaves(exact[:3])} == {np.dtype(np.float32)}
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(np.concatenate([tokenize_all(stored.tokenizers, [text]) for text in ("a fox", "two owls")]))
    x_t, t = rng.normal(size=(2, *model.latent_shape)).astype(np.float32), np.array([801.0, 3.0], np.float32)
    images = rng.uniform(size=(2, 16, 16, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 2)

    def outputs(pretrained):
        cond = jax.jit(model.encode_text)(pretrained.text, tokens)
        return (
            cond,
            jax.jit(model.predict)(pretrained.denoiser, x_t, t, cond),
            jax.jit(lambda *given: model.sample_latent(model.encode(*given), keys))(pretrained.vae, images),
            jax.jit(model.decode)(pretrained.vae, x_t),
        )

    jax.tree.map(np.testing.assert_array_equal, outputs(stored), outputs(exact))


def shard(folder, part, stem, suffix=""):
    """Cuts a part's weights into three files and an index, as diffusers (and transformers) write large models."""
    tensors = load_file(folder / part / f"{stem}.safetensors")
    (folder / part / f"{stem}.safetensors").unlink()
    weight_map = {}
    for i in range(3):
        name = f"{stem}{suffix}-{i + 1:05d}-of-00003.safetensors"
        own = dict(list(tensors.items())[i::3])
        save_file(own, folder / part / name)
        weight_map |= dict.fromkeys(own, name)
    index = folder / part / f"{stem}.safetensors.index{suffix}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_same_weights(folder, other, **options):
    jax.tree.map(np.testing.assert_array_equal, load(folder, **options)[1][:3], load(other)[1][:3])


@pytest.mark.parametrize("suffix", ["", ".fp16"])
def test_shards(small_folder, folder, suffix):
    rename_weights(suffix)(folder)
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder / part / f"{stem}{suffix}.safetensors").rename(folder / part / f"{stem}.safetensors")
        shard(folder, part, stem, suffix)
    assert_same_weights(folder, small_folder, variant=suffix[1:])


def test_a_variant_beside_another(small_folder, folder):
    """Each is read where it is asked for; one that is not there is named, with what is."""
    for path in list(folder.glob("*/*.safetensors")):
        tensors = {name: np.zeros_like(tensor) for name, tensor in load_file(path).items()}
        save_file(tensors, path.with_name(path.stem + ".fp16.safetensors"))
    assert_same_weights(folder, small_folder)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(load(folder, variant="fp16")[1][:3]))
    with pytest.raises(UserError, match=r"pretrained\.variant='ema': no file of .* is of it"):
        load(folder, variant="ema")


def test_a_variant_of_some_parts(small_folder, folder):
    """The others are read as they are, as diffusers does; which, is chosen for each by itself."""
    rename_weights(".fp16")(folder)
    (folder / VAE_WEIGHTS.replace(".safetensors", ".fp16.safetensors")).rename(folder / VAE_WEIGHTS)
    assert_same_weights(folder, small_folder, variant="fp16")
    with pytest.raises(UserError, match=r"no such file; there is another: set pretrained\.variant='fp16'"):
        load(folder)


def test_an_index_comes_before_a_file(small_folder, folder):
    """As in diffusers: an old file beside shards is not read."""
    shard(folder, "unet", "diffusion_pytorch_model")
    (folder / UNET_WEIGHTS).write_bytes(b"old")
    assert_same_weights(folder, small_folder)


@pytest.mark.parametrize(("version", "side"), [("0.8.0.dev0", 64), ("0.9.0.dev0", 4), ("0.35.1", 4), (None, 4)])
def test_the_latent_size_of_old_folders(folder, version, side):
    """diffusers' StableDiffusionPipeline does not believe what versions before 0.9 wrote below 64."""
    edit(UNET_CONFIG, _diffusers_version=version)(folder)
    assert read_configs(folder).unet.latent_size == side


def test_a_tensor_in_two_shards(folder):
    shard(folder, "unet", "diffusion_pytorch_model")
    first, second, _ = sorted((folder / "unet").glob("*.safetensors"))
    save_file(load_file(first) | dict(list(load_file(second).items())[:1]), first)
    with pytest.raises(UserError, match=r"is in diffusion_pytorch_model-00001-of-00003\.safetensors too"):
        load(folder)


def test_large_files_are_read_in_portions(small_folder, monkeypatch):
    """Opened anew for each, so that no more of a file than that is in memory."""
    expected, opened = load(small_folder)[1], []

    def count(path, **options):
        opened.append(path)
        return safe_open(path, **options)

    monkeypatch.setattr(model_folder, "MAPPED_BYTES", 2**12)
    monkeypatch.setattr(model_folder, "safe_open", count)
    jax.tree.map(np.testing.assert_array_equal, load(small_folder)[1][:3], expected[:3])
    size = (small_folder / UNET_WEIGHTS).stat().st_size
    assert opened.count(small_folder / UNET_WEIGHTS) > size // 2**13


def test_names_and_shapes_are_checked_before_anything_is_read(folder, monkeypatch):
    """The last part's fault is told before gigabytes of the first are read."""
    edit(VAE_CONFIG, layers_per_block=2)(folder)
    monkeypatch.setattr(model_folder, "_read", lambda *arguments: pytest.fail("weights were read"))
    with pytest.raises(UserError, match="is missing"):
        load(folder)


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
    for source in ("", "a" * 300):
        with pytest.raises(UserError, match=r"pretrained\.model="):
            locate(source)
    with pytest.raises(UserError, match=r"pretrained\.revision='abc' is of a hub id"):
        locate(str(small_folder), revision="abc")
    for source in ("nowhere", "./a/b", "a/b/c", "~/no-such-folder"):
        with pytest.raises(UserError, match=rf"'{source}': no such folder"):
            locate(source)


def test_a_single_file_is_refused_with_the_way_to_convert_it(tmp_path):
    for name, hint in (
        ("model.safetensors", "from_single_file"),
        ("model.ckpt", "a pickle, which can run code"),
        ("model.txt", "expected a model folder"),
    ):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UserError) as raised:
            load(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value) and hint in str(raised.value)


class Hub:
    """A hub that has these files; None: it cannot be reached."""

    def __init__(self, monkeypatch, folder, names):
        self.folder, self.names, self.asked = folder, names, []
        monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", self.list_files)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)

    def list_files(self, source, *, revision):
        if self.names is None:
            raise OSError("no network")
        return self.names

    def download(self, source, *, revision, allow_patterns):
        if self.names is None and self.folder is None:
            raise OSError("no network")
        self.asked.append((revision, allow_patterns))
        return str(self.folder)

    def fetched(self, names):
        (_, patterns) = self.asked[-1]
        return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


WANTED = [
    "model_index.json",
    "tokenizer_2/merges.txt",
    "text_encoder_2/model.fp16-00001-of-00002.safetensors",
    "text_encoder_2/model.safetensors.index.fp16.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]
UNWANTED = [
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.bin",
    "sd_xl_base_1.0.safetensors",
    "vae_1_0/diffusion_pytorch_model.fp16.safetensors",
]


def test_what_is_fetched_from_the_hub(tmp_path, monkeypatch):
    """What is read and no more: no pickle, no other variant of a part that has the right one."""
    hub = Hub(monkeypatch, tmp_path, WANTED + UNWANTED)
    assert locate("some/model", hub_files=partial(pipeline_files, variant="fp16"), revision="abc") == tmp_path
    assert hub.fetched(WANTED + UNWANTED) == WANTED and hub.asked[-1][0] == "abc"
    plain = Hub(monkeypatch, tmp_path, ["model_index.json", *UNWANTED])
    assert locate("some/model") == tmp_path
    assert plain.fetched(UNWANTED) == UNWANTED[:1] and plain.asked[-1][0] is None


def test_without_a_network(tmp_path, monkeypatch):
    """What an earlier download left is found; where there is none, the reason is the hub's."""
    hub = Hub(monkeypatch, tmp_path, None)
    assert locate("some/model", hub_files=partial(pipeline_files, variant="fp16")) == tmp_path
    assert hub.fetched(WANTED) == WANTED and not hub.fetched(UNWANTED[1:])
    Hub(monkeypatch, None, None)
    with pytest.raises(UserError, match=r"'some/thing'.*\(no network\)"):
        locate("some/thing")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model_index.json", "unet/diffusion_pytorch_model.fp16.safetensors"], "set pretrained.variant='fp16'"),
        (["model_index.json", "vae/diffusion_pytorch_model.bin"], "diffusion_pytorch_model.bin is a pickle, which can"),
        (["README.md", "dream.safetensors"], "from_single_file"),
    ],
    ids=["another variant", "pickles", "a single file"],
)
def test_a_repository_that_cannot_be_read_is_not_fetched(tmp_path, monkeypatch, names, message):
    hub = Hub(monkeypatch, tmp_path, names)
    with pytest.raises(UserError, match=message):
        locate("some/model")
    assert not hub.asked


def test_a_folder_with_a_single_file_alone(tmp_path):
    (tmp_path / "dream.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"dream\.safetensors: .*from_single_file"):
        load(tmp_path)


@pytest.mark.parametrize(("name", "latent"), [("sd15", 64), ("sd21", 96), ("sdxl", 128)])
def test_the_published_families_have_their_sizes(name, latent, tmp_path):
    family = families.FAMILIES[name]
    for part, fields in family.parts.items():
        write_json(tmp_path / part / "config.json", fields)
    write_json(tmp_path / "model_index.json", {"_class_name": family.pipeline})
    configs = read_configs(tmp_path)
    assert configs == families.read_configs(name)
    shapes = stable_diffusion.parameter_shapes(configs)
    counts = {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in shapes.items()}
    assert counts == family.num_parameters
    assert stable_diffusion.latent_shape(configs, None) == (latent, latent, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_small_folders_are_what_they_say(tmp_path, family):
    assert read_configs(write_folder(tmp_path, family)) == configs_of(family)


XL_BROKEN = {
    "a refiner's conditions": (
        {"projection_class_embeddings_input_dim": 60},
        "expected 68, 20 of the pooled text and 6",
    ),
    "no added conditions": (
        {"addition_embed_type": None},
        "StableDiffusionXLPipeline expects addition_embed_type='tex",
    ),
    "another width": (
        {"cross_attention_dim": 16},
        "cross_attention_dim=16; expected the text encoder's width, 16 + 24",
    ),
    "no size of the ids": ({"addition_time_embed_dim": ...}, "'addition_time_embed_dim' is missing"),
}


@pytest.mark.parametrize(("changes", "what"), XL_BROKEN.values(), ids=XL_BROKEN)
def test_broken_xl_folder(tmp_path, changes, what):
    folder = write_folder(tmp_path, "xl")
    fields = json.loads((folder / UNET_CONFIG).read_text()) | changes
    write_json(folder / UNET_CONFIG, {name: value for name, value in fields.items() if value is not ...})
    with pytest.raises(UserError) as raised:
        load(folder)
    assert UNET_CONFIG.split("/")[0] in str(raised.value) and what in str(raised.value)
