"""Our networks beside diffusers' and transformers', with the same random weights."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd15

from ddpo_jax import convert
from ddpo_jax.models.clip import CLIPModel, CLIPTextModel, clip_config, text_config
from ddpo_jax.models.folder import WEIGHTS, read_weights
from ddpo_jax.models.unet import UNet2DConditionModel, unet_config
from ddpo_jax.models.vae import AutoencoderKL, vae_config

with warnings.catch_warnings():  # what these warn about on import is not ours to fix
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    from diffusers import AutoencoderKL as TorchVAE
    from diffusers import UNet2DConditionModel as TorchUNet
    from random_torch import fields_of, nchw, nhwc, randomise, relative_error, tensors_of
    from transformers import CLIPConfig, CLIPTextConfig
    from transformers import CLIPModel as TorchCLIP
    from transformers import CLIPTextModel as TorchText

TOLERANCE = 1e-5  # measured: 3e-6 at most, the full-size VAE's; the approximate GELU is 1e-5 away
GAINS = pytest.mark.parametrize("gain", [1.0, 1e-3])

UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "sample_size": 8,
}
UNETS = {
    "lists, a plain block on either side": UNET
    | {
        "block_out_channels": [8, 16, 24],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": [1, 2, 1],
        "attention_head_dim": [1, 2, 3],
        "cross_attention_dim": 20,
        "norm_num_groups": 8,
        "norm_eps": 1e-3,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
    "lists that differ in every block, not mirrored": UNET
    | {
        "block_out_channels": [24, 8, 16],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": [2, 1, 3],
        "attention_head_dim": [3, 2, 8],
        "norm_num_groups": 2,
        "in_channels": 3,
        "out_channels": 3,
    },
    "Stable Diffusion 1.5, narrow": sd15.UNET
    | {"block_out_channels": [16, 16, 32, 32], "cross_attention_dim": 24, "norm_num_groups": 8},
}
VAES = {
    "three blocks": {
        "block_out_channels": [8, 8, 24],
        "layers_per_block": 2,
        "norm_num_groups": 2,
        "latent_channels": 3,
    },
    "Stable Diffusion 1.5, narrow": sd15.VAE | {"block_out_channels": [8, 16, 32, 32], "norm_num_groups": 8},
}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = TOWER | {"vocab_size": 99, "max_position_embeddings": 13, "bos_token_id": 60, "eos_token_id": 61}
VISION = {**TOWER, "hidden_size": 24, "num_attention_heads": 3, "image_size": 12, "patch_size": 4}


def torch_unet(fields, **options):
    return randomise(TorchUNet(**{k: v for k, v in fields.items() if k != "_class_name"}), **options)


def torch_vae(fields, **options):
    counts = len(fields["block_out_channels"])
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * counts, "up_block_types": ["UpDecoderBlock2D"] * counts}
    vae = randomise(TorchVAE(**{k: v for k, v in (fields | kinds).items() if k != "_class_name"}), **options)
    with torch.no_grad():
        vae.quant_conv.bias[-2:] = torch.tensor([100.0, -100.0])  # log-variances that are clipped
    return vae


def torch_text(fields, **options):
    return randomise(TorchText(CLIPTextConfig(**fields)), **options)


def torch_clip(text=TEXT, vision=VISION, **options):
    return randomise(TorchCLIP(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)), **options)


def shapes(module, *inputs):
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def apply(module, params, *inputs, method=None):
    return jax.jit(partial(module.apply, method=method))({"params": params}, *inputs)


def unet_inputs(config, *, batch, height, width, length):
    rng = np.random.default_rng(0)
    x_t = rng.normal(size=(batch, height, width, config.in_channels)).astype(np.float32)
    context = rng.normal(size=(batch, length, config.cross_attention_dim)).astype(np.float32)
    return x_t, np.linspace(981, 1, batch, dtype=np.float32), context


def make_tokens(batch, length, *, end, largest):
    """Ids below `largest`, some above `end`; the texts end at different places and are padded with `end`."""
    tokens = np.random.default_rng(0).integers(0, largest, (batch, length), dtype=np.int32)
    tokens[tokens == end] -= 1
    for i in range(batch):
        tokens[i, length - 1 - i * 3 :] = end
    return tokens


def pixels(batch, height, width):
    return np.random.default_rng(0).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


@GAINS
@pytest.mark.parametrize("fields", UNETS.values(), ids=UNETS)
def test_unet(fields, gain):
    theirs = torch_unet(fields, gain=gain)
    config = unet_config(fields_of(theirs))
    ours = UNet2DConditionModel(config)
    x_t, t, context = unet_inputs(config, batch=2, height=8, width=16, length=5)
    params = convert.from_torch(tensors_of(theirs), shapes(ours, x_t, t, context), source="unet")
    with torch.no_grad():
        expected = theirs(nchw(x_t), torch.tensor(t), torch.tensor(context)).sample
    assert relative_error(apply(ours, params, x_t, t, context), nhwc(expected)) <= TOLERANCE


@GAINS
@pytest.mark.parametrize("fields", VAES.values(), ids=VAES)
def test_vae(fields, gain):
    theirs = torch_vae(fields, gain=gain)
    config = vae_config(fields_of(theirs))
    ours = AutoencoderKL(config)
    images = pixels(2, 16, 32)
    params = convert.from_torch(tensors_of(theirs), shapes(ours, images), source="vae")
    with torch.no_grad():
        latent = theirs.encode(nchw(images)).latent_dist
        decoded = theirs.decode(latent.mean).sample
    mean, log_variance = apply(ours, params, images, method="encode")
    assert relative_error(mean, nhwc(latent.mean)) <= TOLERANCE
    assert relative_error(log_variance, nhwc(latent.logvar)) <= TOLERANCE
    assert (log_variance.min(), log_variance.max()) == (-30, 20)
    assert relative_error(apply(ours, params, nhwc(latent.mean), method="decode"), nhwc(decoded)) <= TOLERANCE


@GAINS
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(("eos_token_id", "end"), [(61, 61), (2, 98)], ids=["proper end", "legacy end"])
def test_text(act, eos_token_id, end, gain):
    theirs = torch_text(TEXT | {"hidden_act": act, "eos_token_id": eos_token_id, "layer_norm_eps": 1e-3}, gain=gain)
    ours = CLIPTextModel(text_config(fields_of(theirs.config)))
    tokens = make_tokens(3, 13, end=end, largest=98)
    params = convert.from_torch(tensors_of(theirs), shapes(ours, tokens), source="text")
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens))
    hidden, pooled = apply(ours, params, tokens)
    assert relative_error(hidden, expected.last_hidden_state) <= TOLERANCE
    assert relative_error(pooled, expected.pooler_output) <= TOLERANCE


@GAINS
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip(act, gain):
    theirs = torch_clip(TEXT, VISION | {"hidden_act": act}, gain=gain)
    ours = CLIPModel(clip_config(fields_of(theirs.config)))
    tokens, images = make_tokens(3, 13, end=61, largest=98), pixels(2, 12, 12)
    params = convert.from_torch(tensors_of(theirs), shapes(ours, tokens, images), source="clip")
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), nchw(images))
    assert relative_error(apply(ours, params, tokens, method="encode_text"), expected.text_embeds) <= TOLERANCE
    assert relative_error(apply(ours, params, images, method="encode_image"), expected.image_embeds) <= TOLERANCE
    assert relative_error(apply(ours, params, tokens, images), expected.logits_per_image) <= TOLERANCE


def models():
    """(torch model, ours, inputs) of every kind."""
    x_t, t, context = jnp.zeros((1, 4, 4, 4)), jnp.zeros(1), jnp.zeros((1, 3, 12))
    tokens, images = jnp.zeros((1, 13), jnp.int32), jnp.zeros((1, 12, 12, 3))
    unet, vae, text, clip = torch_unet(UNET), torch_vae(VAES["three blocks"]), torch_text(TEXT), torch_clip()
    return {
        "unet": (unet, UNet2DConditionModel(unet_config(fields_of(unet))), (x_t, t, context)),
        "vae": (vae, AutoencoderKL(vae_config(fields_of(vae))), (images,)),
        "text": (text, CLIPTextModel(text_config(fields_of(text.config))), (tokens,)),
        "clip": (clip, CLIPModel(clip_config(fields_of(clip.config))), (tokens, images)),
    }


@pytest.mark.parametrize("kind", ["unet", "vae", "text", "clip"])
def test_conversion_is_exact_both_ways(kind):
    theirs, ours, inputs = models()[kind]
    tensors = tensors_of(theirs)
    back = convert.to_torch(convert.from_torch(tensors, shapes(ours, *inputs), source=kind))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
        assert back[name].flags.c_contiguous


def save_and_drop(model, folder, part):
    """Saves as diffusers would, so that the torch copy is gone before ours is made, and returns the file."""
    assert sum(parameter.numel() for parameter in model.parameters()) == sd15.NUM_PARAMETERS[part]
    model.save_pretrained(folder)
    return folder / WEIGHTS[part]


@pytest.mark.slow
def test_full_size_unet(tmp_path, record_property):
    config = unet_config(sd15.UNET)
    ours = UNet2DConditionModel(config)
    inputs = unet_inputs(config, batch=2, height=32, width=32, length=77)
    theirs = torch_unet(sd15.UNET)
    with torch.no_grad():
        expected = nhwc(theirs(nchw(inputs[0]), *map(torch.tensor, inputs[1:])).sample)
    path = save_and_drop(theirs, tmp_path, "unet")
    del theirs
    params = read_weights(path, shapes(ours, *inputs), dtype=jnp.float32)
    error = relative_error(apply(ours, params, *inputs), expected)
    record_property("relative_error", error)
    assert error <= TOLERANCE


@pytest.mark.slow
def test_full_size_vae(tmp_path, record_property):
    ours = AutoencoderKL(vae_config(sd15.VAE))
    images = pixels(1, 128, 192)
    theirs = torch_vae(sd15.VAE)
    with torch.no_grad():
        latent = theirs.encode(nchw(images)).latent_dist
        mean, log_variance, decoded = map(nhwc, (latent.mean, latent.logvar, theirs.decode(latent.mean).sample))
    path = save_and_drop(theirs, tmp_path, "vae")
    del theirs
    params = read_weights(path, shapes(ours, images), dtype=jnp.float32)
    encoded = apply(ours, params, images, method="encode")
    errors = [
        relative_error(encoded[0], mean),
        relative_error(encoded[1], log_variance),
        relative_error(apply(ours, params, mean, method="decode"), decoded),
    ]
    record_property("relative_errors", errors)
    assert max(errors) <= TOLERANCE


@pytest.mark.slow
def test_full_size_text(tmp_path, record_property):
    ours = CLIPTextModel(text_config(sd15.TEXT))
    tokens = make_tokens(2, 77, end=49407, largest=49406)
    theirs = torch_text(sd15.TEXT)
    with torch.no_grad():
        output = theirs(torch.tensor(tokens))
        hidden, pooled = output.last_hidden_state.numpy(), output.pooler_output.numpy()
    path = save_and_drop(theirs, tmp_path, "text_encoder")
    del theirs
    params = read_weights(path, shapes(ours, tokens), dtype=jnp.float32, prefix="text_model.")
    outputs = apply(ours, params, tokens)
    errors = [relative_error(outputs[0], hidden), relative_error(outputs[1], pooled)]
    record_property("relative_errors", errors)
    assert max(errors) <= TOLERANCE
