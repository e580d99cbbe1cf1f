"""Half of a comparison at full size: torch's, which leaves weights and outputs in a folder, or ours, which reads them.

python full_size.py torch FAMILY PART FOLDER, then python full_size.py ours FAMILY PART FOLDER, each in a process of its
own: there is not memory for both.
"""

import json
import resource
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from benchmarks.families import FAMILIES

LATENT = 32  # pixels of a latent, one side
OUTPUTS = "outputs.npz"


def inputs(family, part):
    """What the part is given, as numpy arrays by name."""
    rng = np.random.default_rng(0)
    fields = FAMILIES[family].parts[part]
    if part == "unet":
        batch = 1 if family == "sdxl" else 2
        found = {
            "x_t": rng.normal(size=(batch, LATENT, LATENT, 4)),
            "t": np.linspace(981, 21, batch),
            "context": rng.normal(size=(batch, 77, fields["cross_attention_dim"])),
        }
        if "addition_time_embed_dim" in fields:
            found |= {"pooled": rng.normal(size=(batch, 1280)), "time_ids": [[1024, 768, 0, 64, 1024, 1024]]}
        return {name: np.asarray(x, np.float32) for name, x in found.items()}
    if part == "vae":
        latent = rng.normal(size=(1, 16, 24, 4)).astype(np.float32)
        return {"images": rng.uniform(-1, 1, (1, 128, 192, 3)).astype(np.float32), "latent": latent}
    tokens = rng.integers(0, 49406, (2, 77), dtype=np.int32)
    tokens[0, 20:], tokens[1, 76:] = 49407, 49407
    return {"tokens": tokens}


def torch_half(family, part, folder):
    """Saves the part with random weights as diffusers or transformers would, and its outputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from random_torch import nchw, nhwc, randomise
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    fields = {name: x for name, x in FAMILIES[family].parts[part].items() if name != "_class_name"}
    given = inputs(family, part)
    if part == "unet":
        model = randomise(UNet2DConditionModel(**fields))
    elif part == "vae":
        model = randomise(AutoencoderKL(**fields))
    else:
        kinds = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
        model = randomise(kinds[fields["architectures"][0]](CLIPTextConfig(**fields)))
    with torch.no_grad():
        if part == "unet":
            x_t, t, context, *added = given.values()
            names = ("text_embeds", "time_ids")
            added = dict(zip(names, map(torch.tensor, added), strict=True)) if added else None
            out = model(nchw(x_t), torch.tensor(t), torch.tensor(context), added_cond_kwargs=added)
            outputs = {"prediction": nhwc(out.sample)}
        elif part == "vae":
            latent = model.encode(nchw(given["images"])).latent_dist
            decoded = model.decode(nchw(given["latent"])).sample
            outputs = {"mean": nhwc(latent.mean), "log_variance": nhwc(latent.logvar), "decoded": nhwc(decoded)}
        else:
            out = model(torch.tensor(given["tokens"]), output_hidden_states=True)
            outputs = {"last": out.last_hidden_state, "penultimate": out.hidden_states[-2]}
            outputs["pooled"] = out.text_embeds if "text_embeds" in out else out.pooler_output
            outputs = {name: x.numpy() for name, x in outputs.items()}
    count = sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(folder)
    np.savez(folder / OUTPUTS, **outputs)
    return {"parameters": count}


def our_half(family, part, folder):
    """Relative errors, the number of parameters, host memory beyond them while loading, and conversion back."""
    import jax
    from random_torch import relative_error

    from benchmarks.families import read_configs
    from ddpo_jax import convert
    from ddpo_jax.models.clip import CLIPTextModel
    from ddpo_jax.models.folder import STEMS, read_tensors, read_weights, weight_files
    from ddpo_jax.models.stable_diffusion import TEXT_PREFIX, parameter_shapes
    from ddpo_jax.models.unet import UNet2DConditionModel
    from ddpo_jax.models.vae import AutoencoderKL

    configs = read_configs(family)
    shapes = parameter_shapes(configs)[part]
    prefix = TEXT_PREFIX if part in configs.text else ""
    jax.block_until_ready(jax.device_put(np.zeros(1)))
    before, begin = peak_memory(), time.monotonic()
    files = weight_files(folder, STEMS[part])
    params = read_weights(files, shapes, prefix=prefix)
    seconds, count = time.monotonic() - begin, sum(leaf.size for leaf in jax.tree.leaves(params))
    beyond = peak_memory() - before - 4 * count

    given, expected = inputs(family, part), np.load(folder / OUTPUTS)
    if part == "unet":
        ours = UNet2DConditionModel(configs.unet)
        found = {"prediction": jax.jit(ours.apply)({"params": params}, *given.values())}
    elif part == "vae":
        ours = AutoencoderKL(configs.vae)
        encode, decode = (jax.jit(lambda p, x, m=method: ours.apply(p, x, method=m)) for method in ("encode", "decode"))
        mean, log_variance = encode({"params": params}, given["images"])
        decoded = decode({"params": params}, given["latent"])
        found = {"mean": mean, "log_variance": log_variance, "decoded": decoded}
    else:
        found = jax.jit(CLIPTextModel(configs.text[part]).apply)({"params": params}, given["tokens"])._asdict()
    errors = {name: float(relative_error(found[name], expected[name])) for name in expected.files}

    # Back to torch one tensor at a time: there is no memory for all of them twice.
    leaves = jax.tree_util.tree_leaves_with_path(params)
    keys = {convert.torch_key(convert.leaf_path(path), leaf.ndim)[0]: (path, leaf) for path, leaf in leaves}
    for name, tensor in read_tensors(files):
        path, leaf = keys.pop(name.removeprefix(prefix))
        nested = leaf
        for entry in reversed(convert.leaf_path(path)):
            nested = {entry: nested}
        ((_, back),) = convert.to_torch(nested).items()
        assert back.dtype == tensor.dtype and np.array_equal(back, tensor), name
    assert not keys
    return {"errors": errors, "parameters": count, "beyond": beyond, "seconds": seconds}


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    half, family, part, folder = sys.argv[1:]
    print(json.dumps({"torch": torch_half, "ours": our_half}[half](family, part, Path(folder))))
