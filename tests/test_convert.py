"""Names and shapes between Flax and torch, without torch: exact both ways, and nothing missing, extra or misshapen."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from small import TEXT, UNET, VAE, random_params

from ddpo_jax import convert
from ddpo_jax.errors import UserError
from ddpo_jax.models.clip import CLIPTextModel, text_config
from ddpo_jax.models.unet import UNet2DConditionModel
from ddpo_jax.models.unet_config import unet_config
from ddpo_jax.models.vae import AutoencoderKL, vae_config

VAE_ATTENTION = "encoder.mid_block.attentions.0"
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def trees():
    return {
        "text_encoder": random_params(CLIPTextModel(text_config(TEXT)), 0, jnp.zeros((1, 32), jnp.int32)),
        "unet": random_params(
            UNet2DConditionModel(unet_config(UNET)), 1, jnp.zeros((1, 4, 4, 4)), jnp.zeros(1), jnp.zeros((1, 3, 16))
        ),
        "vae": random_params(AutoencoderKL(vae_config(VAE)), 2, jnp.zeros((1, 16, 16, 3))),
    }


@pytest.fixture
def tensors(trees):
    return convert.to_torch(trees["vae"])


def same(a, b):
    """Bit for bit, dtypes too."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_round_trip(trees, part, dtype):
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), trees[part])
    tensors = convert.to_torch(tree)
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())
    assert len(tensors) == len(jax.tree.leaves(tree))
    same(convert.from_torch(tensors, tree, source="file"), tree)


def test_every_leaf_has_a_place_of_its_own(trees):
    """A convolution's and a linear layer's weight, told apart by marking one entry: (out, in, ...) in torch."""
    unet = trees["unet"]
    unet = jax.tree.map(np.zeros_like, unet)
    unet["conv_in"]["kernel"][2, 1, 3, 7] = 1
    unet["time_embedding"]["linear_1"]["kernel"][5, 11] = 1
    tensors = convert.to_torch(unet)
    assert tensors["conv_in.weight"][7, 3, 2, 1] == 1
    assert tensors["time_embedding.linear_1.weight"][11, 5] == 1


@pytest.mark.parametrize("name", ["decoder.conv_in.weight", "quant_conv.bias", f"{VAE_ATTENTION}.to_out.0.weight"])
def test_missing_tensor(trees, tensors, name):
    del tensors[name]
    with pytest.raises(UserError, match=rf"some/file: tensor '{name}' is missing"):
        convert.from_torch(tensors, trees["vae"], source="some/file")


def test_extra_tensors(trees, tensors):
    with pytest.raises(UserError, match=r"some/file: 2 tensors .* \['a\.weight', 'quant_conv\.gain'\]"):
        convert.from_torch(
            tensors | {"quant_conv.gain": np.ones(1), "a.weight": np.ones(1)}, trees["vae"], source="some/file"
        )


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x[None], lambda x: x.T], ids=["cut", "more", "turned"])
def test_wrong_shape(trees, tensors, change):
    tensors["encoder.conv_in.weight"] = change(tensors["encoder.conv_in.weight"])
    with pytest.raises(UserError, match=r"'encoder\.conv_in\.weight' has shape .* implies \(8, 3, 3, 3\)"):
        convert.from_torch(tensors, trees["vae"], source="some/file")


@pytest.mark.parametrize("as_convolution", [False, True])
def test_the_old_names_of_the_vae(trees, tensors, as_convolution):
    for half in ("encoder", "decoder"):
        for new, old in OLD_NAMES.items():
            prefix = f"{half}.mid_block.attentions.0"
            weight, bias = (tensors.pop(f"{prefix}.{new}.{name}") for name in ("weight", "bias"))
            tensors[f"{prefix}.{old}.weight"] = weight[:, :, None, None] if as_convolution else weight
            tensors[f"{prefix}.{old}.bias"] = bias
    same(convert.from_torch(tensors, trees["vae"], source="file"), trees["vae"])


def test_position_ids_are_ignored(trees):
    """A buffer that transformers kept in the file until 4.31."""
    tensors = convert.to_torch(trees["text_encoder"]) | {"embeddings.position_ids": np.arange(32)[None]}
    same(convert.from_torch(tensors, trees["text_encoder"], source="file"), trees["text_encoder"])


def test_a_leaf_without_a_rule():
    with pytest.raises(UserError, match="no conversion rule for the 3-dimensional parameter block/kernel"):
        convert.to_torch({"block": {"kernel": np.zeros((2, 2, 2))}})
