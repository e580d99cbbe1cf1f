"""Model folders small enough to make in a test: random weights, the real layout."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpo_jax.diffusers_folder import model_index
from ddpo_jax.models.clip import CLIPModel, clip_config
from ddpo_jax.models.folder import WEIGHTS, write_json, write_weights
from ddpo_jax.models.pipeline import TOKENIZERS, Configs, parse_configs
from ddpo_jax.models.stable_diffusion import parameter_shapes, text_name
from ddpo_jax.tiny import unet as tiny
from ddpo_jax.tiny.tokenizer import MAX_LENGTH, VOCAB_SIZE, write_tokenizer

WIDTH = 16

TEXT = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_LENGTH,
    "bos_token_id": VOCAB_SIZE - 2,
    "eos_token_id": VOCAB_SIZE - 1,
    "pad_token_id": VOCAB_SIZE - 1,
    "projection_dim": WIDTH,
}

UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 2,
    "block_out_channels": [8, 16],
    "cross_attention_dim": WIDTH,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 4,
    "sample_size": 4,
}

VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
    "scaling_factor": 0.5,
}

SCHEDULER = tiny.SCHEDULER | {"prediction_type": "epsilon"}  # as the 1.x family predicts

# What a later family has otherwise, in the shapes that tell: heads that differ between blocks, depths too, linear
# projections; two text encoders of different widths.
UNET_2 = UNET | {
    "attention_head_dim": [2, 4],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "upcast_attention": True,
    "use_linear_projection": True,
}
TEXT_2 = TEXT | {"hidden_act": "gelu", "projection_dim": 512}

WIDTH_XL, POOLED_XL, TIME_ID_SIZE = 24, 20, 8
TEXT_XL = TEXT | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": WIDTH_XL,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "projection_dim": POOLED_XL,
    "eos_token_id": VOCAB_SIZE - 1,
}
UNET_XL = UNET_2 | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_ID_SIZE,
    "cross_attention_dim": WIDTH + WIDTH_XL,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": POOLED_XL + 6 * TIME_ID_SIZE,
    "transformer_layers_per_block": [1, 2],
    "upcast_attention": None,
}


class Family(NamedTuple):
    pipeline: str
    text: dict[str, dict]
    unet: dict
    vae: dict
    scheduler: dict


FAMILIES = {
    "1": Family("StableDiffusionPipeline", {"text_encoder": TEXT}, UNET, VAE, SCHEDULER),
    "2": Family("StableDiffusionPipeline", {"text_encoder": TEXT_2}, UNET_2, VAE, tiny.SCHEDULER),
    "xl": Family(
        "StableDiffusionXLPipeline",
        {"text_encoder": TEXT, "text_encoder_2": TEXT_XL},
        UNET_XL,
        VAE | {"scaling_factor": 0.4, "force_upcast": True},
        SCHEDULER,
    ),
}

CLIP = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": WIDTH,
    "text_config": {**TEXT, "model_type": "clip_text_model"},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "quick_gelu",
        "image_size": 16,
        "patch_size": 4,
    },
}


def random_params(module, seed, *inputs):
    """A network's parameters, as `random_values` gives them."""
    return random_values(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"], seed)


def random_values(shapes, seed):
    """Parameters with every leaf random, biases and norms too, so that no mistake can hide behind a 0 or a 1."""
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 25
        return (rng.normal(size=leaf.shape) / np.sqrt(fan_in) + (len(leaf.shape) == 1) * 0.5).astype(np.float32)

    return jax.tree.unflatten(tree, [draw(leaf) for leaf in leaves])


def configs_of(family: str) -> Configs:
    """What read_configs reads of a folder that `write_folder` wrote."""
    pipeline, text, unet, vae, _ = FAMILIES[family]
    return parse_configs({"_class_name": pipeline}, {**text, "unet": unet, "vae": vae})


def write_folder(folder: Path, family: str = "1", *, seed: int = 0, scheduler: dict | None = None) -> Path:
    """Writes a whole small Stable Diffusion and returns its folder."""
    pipeline, text, unet, vae, its_scheduler = FAMILIES[family]
    for i, (part, shapes) in enumerate(parameter_shapes(configs_of(family)).items()):
        params = random_values(shapes, seed + i)
        write_json(folder / part / "config.json", {**text, "unet": unet, "vae": vae}[part])
        write_weights(
            folder / part / WEIGHTS[part], params, dtype=np.float32, rename=text_name if part in text else str
        )
        if part in text:
            write_tokenizer(folder / TOKENIZERS[part])
    if family != "1":
        pad_with_exclamation_marks(folder / TOKENIZERS[part_that_pads(family)])
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler or its_scheduler)
    write_json(folder / "model_index.json", model_index(pipeline))
    return folder


def part_that_pads(family: str) -> str:
    """The text encoder whose tokenizer fills up with token 0, as OpenCLIP's do."""
    return {"2": "text_encoder", "xl": "text_encoder_2"}[family]


def pad_with_exclamation_marks(folder: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "!"}))


def write_clip(folder: Path, *, seed: int = 0) -> Path:
    """Writes a whole small CLIP, its tokenizer too, and returns its folder."""
    size = CLIP["vision_config"]["image_size"]
    inputs = jnp.zeros((1, MAX_LENGTH), jnp.int32), jnp.zeros((1, size, size, 3))
    params = random_params(CLIPModel(clip_config(CLIP)), seed, *inputs)
    write_tokenizer(folder)
    write_json(folder / "config.json", CLIP)
    write_weights(folder / "model.safetensors", params, dtype=np.float32)
    return folder
