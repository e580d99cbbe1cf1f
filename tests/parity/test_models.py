"""Our networks beside diffusers' and transformers', with the same random weights."""

import warnings
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import UNET as SMALL
from small import UNET_XL as SMALL_XL
from small import random_params
from small_run import distance

from benchmarks.families import UNET_15, UNET_21, UNET_XL, VAE_15
from ddpo_jax import convert
from ddpo_jax.models.clip import CLIPModel, CLIPTextModel, clip_config, text_config
from ddpo_jax.models.stable_diffusion import TEXT_PREFIX
from ddpo_jax.models.unet import REMAT, UNet2DConditionModel
from ddpo_jax.models.unet_config import unet_config
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
    from transformers import CLIPTextModelWithProjection as TorchProjected

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
    "Stable Diffusion 1.5, narrow": UNET_15
    | {"block_out_channels": [16, 16, 32, 32], "cross_attention_dim": 24, "norm_num_groups": 8},
    "Stable Diffusion 2.1, narrow": UNET_21
    | {"block_out_channels": [20, 40, 80, 80], "cross_attention_dim": 24, "norm_num_groups": 4},
    "Stable Diffusion XL, narrow": UNET_XL
    | {
        "block_out_channels": [20, 40, 80],
        "cross_attention_dim": 24,
        "norm_num_groups": 4,
        "transformer_layers_per_block": [1, 2, 3],
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 10 + 6 * 6,
    },
    "depths that are not mirrored": UNET
    | {"transformer_layers_per_block": [3, 1], "attention_head_dim": [2, 4], "use_linear_projection": True},
}
UNET_VERSIONS = [name for name in UNETS if "narrow" in name]
VAES = {
    "three blocks": {
        "block_out_channels": [8, 8, 24],
        "layers_per_block": 2,
        "norm_num_groups": 2,
        "latent_channels": 3,
    },
    "Stable Diffusion 1.5, narrow": VAE_15 | {"block_out_channels": [8, 16, 32, 32], "norm_num_groups": 8},
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


def torch_text(fields, kind=None, **options):
    return randomise((kind or TorchText)(CLIPTextConfig(**fields)), **options)


def text_tensors(model):
    return {name.removeprefix(TEXT_PREFIX): tensor for name, tensor in tensors_of(model).items()}


def torch_clip(text=TEXT, vision=VISION, **options):
    return randomise(TorchCLIP(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)), **options)


@cache
def initial(module):
    return jax.jit(module.init)


@cache
def program(module, method):
    """One for all weights."""
    return jax.jit(partial(module.apply, method=method))


def shapes(module, *inputs):
    return jax.eval_shape(initial(module), jax.random.key(0), *inputs)["params"]


def apply(module, params, *inputs, method=None):
    return program(module, method)({"params": params}, *inputs)


def unet_inputs(config, *, batch, height, width, length):
    """x_t, t, context and, where the network wants them, the pooled text and the time ids."""
    rng = np.random.default_rng(0)
    x_t = rng.normal(size=(batch, height, width, config.in_channels)).astype(np.float32)
    context = rng.normal(size=(batch, length, config.cross_attention_dim)).astype(np.float32)
    inputs = x_t, np.linspace(981, 1, batch, dtype=np.float32), context
    if config.time_id_size is None:
        return inputs
    pooled = rng.normal(size=(batch, config.added_size - 6 * config.time_id_size)).astype(np.float32)
    return (*inputs, pooled, rng.uniform(0, 1024, (batch, 6)).round().astype(np.float32))


def torch_prediction(unet, x_t, t, context, pooled=None, time_ids=None):
    added = None if pooled is None else {"text_embeds": torch.tensor(pooled), "time_ids": torch.tensor(time_ids)}
    with torch.no_grad():
        out = unet(nchw(x_t), torch.tensor(t), torch.tensor(context), added_cond_kwargs=added)
    return nhwc(out.sample)


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
    inputs = unet_inputs(config, batch=2, height=8, width=16, length=5)
    params = convert.from_torch(tensors_of(theirs), shapes(ours, *inputs), source="unet")
    assert relative_error(apply(ours, params, *inputs), torch_prediction(theirs, *inputs)) <= TOLERANCE


@pytest.mark.slow
def test_what_is_computed_again_changes_no_gradient():
    config = unet_config(SMALL_XL)
    inputs = tuple(map(jnp.asarray, unet_inputs(config, batch=1, height=4, width=4, length=3)))
    params = random_params(UNet2DConditionModel(config), 0, *inputs)

    def gradient(remat):
        module = UNet2DConditionModel(config, remat=remat)
        assert jax.tree.structure(shapes(module, *inputs)) == jax.tree.structure(params)
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(module.apply({"params": params}, *inputs)))))(params)

    none, *again = map(gradient, REMAT)
    assert [distance(found, none) <= 1e-5 for found in again] == [True] * 3


def test_remat_keeps_less_and_less():
    """Arrays that the backward pass takes from the forward pass, but for the parameters."""
    config = unet_config(SMALL)
    inputs = tuple(map(jnp.asarray, unet_inputs(config, batch=1, height=8, width=8, length=3)))
    params = shapes(UNet2DConditionModel(config), *inputs)

    def kept(remat):
        module = UNet2DConditionModel(config, remat=remat)
        _, backward = jax.eval_shape(
            lambda params: jax.vjp(lambda params: module.apply({"params": params}, *inputs), params), params
        )
        return sum(leaf.size for leaf in jax.tree.leaves(backward)) - sum(x.size for x in jax.tree.leaves(params))

    none, products, blocks, full = map(kept, REMAT)
    assert none > 2 * products > 3 * blocks
    assert full == blocks  # which differ in what a block's own backward pass holds


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
@pytest.mark.parametrize("projects", [False, True])
def test_text(act, eos_token_id, end, gain, projects):
    fields = TEXT | {"hidden_act": act, "eos_token_id": eos_token_id, "layer_norm_eps": 1e-3, "projection_dim": 20}
    theirs = torch_text(fields, TorchProjected if projects else TorchText, gain=gain)
    ours = CLIPTextModel(text_config(fields_of(theirs.config), projects=projects))
    tokens = make_tokens(3, 13, end=end, largest=98)
    params = convert.from_torch(text_tensors(theirs), shapes(ours, tokens), source="text")
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), output_hidden_states=True)
    found = apply(ours, params, tokens)
    assert relative_error(found.last, expected.last_hidden_state) <= TOLERANCE
    assert relative_error(found.penultimate, expected.hidden_states[-2]) <= TOLERANCE
    assert relative_error(found.pooled, expected.text_embeds if projects else expected.pooler_output) <= TOLERANCE


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
    tokens, images = jnp.zeros((1, 13), jnp.int32), jnp.zeros((1, 12, 12, 3))
    vae, text, clip = torch_vae(VAES["three blocks"]), torch_text(TEXT), torch_clip()
    projected = torch_text(TEXT | {"projection_dim": 20}, TorchProjected)
    found = {
        "vae": (vae, AutoencoderKL(vae_config(fields_of(vae))), (images,)),
        "text": (text, CLIPTextModel(text_config(fields_of(text.config))), (tokens,)),
        "projected text": (
            projected,
            CLIPTextModel(text_config(fields_of(projected.config), projects=True)),
            (tokens,),
        ),
        "clip": (clip, CLIPModel(clip_config(fields_of(clip.config))), (tokens, images)),
    }
    for version in UNET_VERSIONS:
        unet = torch_unet(UNETS[version])
        config = unet_config(fields_of(unet))
        inputs = unet_inputs(config, batch=1, height=8, width=8, length=3)
        found[version] = (unet, UNet2DConditionModel(config), inputs)
    return found


@pytest.mark.parametrize("kind", ["vae", "text", "projected text", "clip", *UNET_VERSIONS])
def test_conversion_is_exact_both_ways(kind):
    theirs, ours, inputs = models()[kind]
    tensors = text_tensors(theirs) if "text" in kind else tensors_of(theirs)
    back = convert.to_torch(convert.from_torch(tensors, shapes(ours, *inputs), source=kind))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
        assert back[name].flags.c_contiguous
