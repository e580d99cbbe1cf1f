"""The cells of benchmarks.gpu_suite: which model, what is trained and how, in order of worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.families import FAMILIES, UNET_15, UNET_XL, VAE_15, VAE_XL, Family


class Size(NamedTuple):
    """A model, and how much of it a round is."""

    family: Family
    num_steps: int
    samples: int  # of DDPO, that an optimizer step learns from
    pairs: int  # of Diffusion-DPO, the same
    decode_chunk_size: int


class Cell(NamedTuple):
    """What is measured at a time."""

    model: str
    method: str  # "ddpo" or "dpo"
    trains: str  # "full" or "lora", of rank 4
    attention: str
    remat: str
    chunk_size: int  # pictures that are drawn at a time; 0: none are
    micro_batch_size: int  # rows, or pairs, that are learned from at a time; 0: none are

    @property
    def name(self) -> str:
        sizes = f"{self.chunk_size}-{self.micro_batch_size}"
        return f"{self.model}-{self.method}-{self.trains}-{self.attention}-{self.remat}-{sizes}"


# The published structures in a few channels; no figure of theirs means anything.
SMALL_UNET = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 4}
SMALL_VAE = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
SMALL_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 16,
    "vocab_size": 64,
}
SMALL_15 = SMALL_UNET | {
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
SMALL_XL = SMALL_UNET | {
    "addition_time_embed_dim": 8,
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 32,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
    "transformer_layers_per_block": [1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}


def shrunk(name: str, unet: Mapping, vae: Mapping) -> Family:
    """A published family with these networks, and small text encoders."""
    family = FAMILIES[name]
    text = {part: fields | SMALL_TEXT for part, fields in family.parts.items() if part.startswith("text")}
    return family._replace(parts={**text, "unet": dict(unet), "vae": dict(vae)}, num_parameters={})


SIZES = {
    "full": {
        "sd15": Size(FAMILIES["sd15"], num_steps=50, samples=64, pairs=2048, decode_chunk_size=8),
        "sdxl": Size(FAMILIES["sdxl"], num_steps=20, samples=64, pairs=2048, decode_chunk_size=2),
    },
    "tiny": {
        "sd15": Size(
            shrunk("sd15", UNET_15 | SMALL_15, VAE_15 | SMALL_VAE),
            num_steps=2,
            samples=4,
            pairs=4,
            decode_chunk_size=1,
        ),
        "sdxl": Size(
            shrunk("sdxl", UNET_XL | SMALL_XL, VAE_XL | SMALL_VAE),
            num_steps=2,
            samples=4,
            pairs=4,
            decode_chunk_size=1,
        ),
    },
}

# The first is the main one.
CELLS = {
    "full": (
        Cell("sd15", "ddpo", "full", "cudnn", "products", 16, 32),
        Cell("sd15", "ddpo", "lora", "cudnn", "products", 16, 32),
        Cell("sd15", "dpo", "full", "cudnn", "products", 0, 32),
        Cell("sdxl", "ddpo", "lora", "cudnn", "products", 4, 4),
        Cell("sd15", "ddpo", "full", "xla", "products", 16, 8),  # at most 70 GB, by benchmarks.memory
        Cell("sd15", "ddpo", "full", "cudnn", "none", 32, 16),
        Cell("sd15", "ddpo", "full", "cudnn", "blocks", 0, 64),
        Cell("sd15", "ddpo", "full", "cudnn", "products", 0, 64),
        Cell("sd15", "dpo", "lora", "cudnn", "products", 0, 32),
        Cell("sd15", "ddpo", "lora", "cudnn", "none", 0, 16),
        Cell("sd15", "ddpo", "full", "cudnn", "full", 0, 64),
        Cell("sdxl", "ddpo", "full", "cudnn", "blocks", 8, 8),
        Cell("sd15", "ddpo", "full", "cudnn", "products", 8, 16),
    ),
    "tiny": (
        Cell("sd15", "ddpo", "full", "xla", "products", 2, 2),
        Cell("sdxl", "ddpo", "lora", "xla", "none", 2, 2),
        Cell("sd15", "dpo", "full", "xla", "blocks", 0, 2),
        Cell("sd15", "ddpo", "full", "cudnn", "products", 2, 2),
    ),
}
