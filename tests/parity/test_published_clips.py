"""Published CLIPs at their own sizes: every tensor has its place, and embeddings are transformers'."""

import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax import convert
from ddpo_jax.models.clip import CLIPModel, clip_config
from ddpo_jax.models.folder import read_weights, weight_files

with warnings.catch_warnings():  # what these warn about on import is not ours to fix
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from random_torch import fields_of, randomise, relative_error
    from transformers import CLIPConfig
    from transformers import CLIPModel as TorchCLIP


def sizes(projection, text, vision, **both):
    """(width, feed-forward, layers, heads) of each tower, and the patch."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    return {
        "projection_dim": projection,
        "text_config": dict(zip(names, text, strict=False)) | both,
        "vision_config": dict(zip(names, vision, strict=True)) | both,
    }


# Their parameters as transformers counts them.
PUBLISHED = {
    "ViT-B/32": (sizes(512, (512, 2048, 12, 8), (768, 3072, 12, 12, 32)), 151_277_313),
    "ViT-L/14": (sizes(768, (768, 3072, 12, 12), (1024, 4096, 24, 16, 14)), 427_616_513),
    "ViT-H/14": (sizes(1024, (1024, 4096, 24, 16), (1280, 5120, 32, 16, 14), hidden_act="gelu"), 986_109_441),
    "ViT-bigG/14": (
        sizes(1280, (1280, 5120, 32, 20), (1664, 8192, 48, 16, 14), hidden_act="gelu"),
        2_539_567_105,
    ),
}


def shapes_of(module):
    size = module.config.vision.image_size
    tokens = jnp.zeros((1, module.config.text.max_length), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), tokens, jnp.zeros((1, size, size, 3)))["params"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_has_its_place(name):
    fields, count = PUBLISHED[name]
    with torch.device("meta"):
        theirs = TorchCLIP(CLIPConfig(**fields))
    tensors = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    ours = shapes_of(CLIPModel(clip_config(fields_of(theirs.config))))
    convert.match(tensors, ours, source=name)  # raises for one that is missing, left over, or of another shape
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == sum(p.numel() for p in theirs.parameters()) == count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-L/14", "ViT-H/14"])
def test_embeddings_at_full_size(name, tmp_path, capsys):
    fields, _ = PUBLISHED[name]
    theirs = randomise(TorchCLIP(CLIPConfig(**fields)))
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, 224, 224, 3)).astype(np.float32)
    tokens = rng.integers(0, 49406, (2, 77), dtype=np.int32)
    tokens[0, 20:], tokens[1, 76:] = 49407, 49407
    with torch.no_grad():
        out = theirs(torch.tensor(tokens), torch.tensor(pixels.transpose(0, 3, 1, 2).copy()))
    theirs.save_pretrained(tmp_path / "clip")
    module = CLIPModel(clip_config(fields_of(theirs.config)), dtype=None)
    expected = {"encode_image": out.image_embeds.numpy(), "encode_text": out.text_embeds.numpy()}
    del theirs, out
    params = read_weights(weight_files(tmp_path / "clip", "model", None), shapes_of(module))
    shutil.rmtree(tmp_path / "clip")  # up to 4 GB, which pytest would keep
    errors = {}
    for method, given in {"encode_image": pixels, "encode_text": tokens}.items():
        found = jax.jit(lambda params, x, method=method: module.apply({"params": params}, x, method=method))(
            params, given
        )
        errors[method] = relative_error(found, expected[method])
    with capsys.disabled():
        print(f"\n{name}: relative errors {', '.join(f'{key} {error:.1e}' for key, error in errors.items())}")
    assert max(errors.values()) <= 1e-4
