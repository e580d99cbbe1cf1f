"""The config.json files of Stable Diffusion 1.5, 2.1 and XL, as their folders have them: for what needs real sizes."""

from typing import Any, NamedTuple

from ddpo_jax.models.pipeline import Configs, parse_configs

UNET_15 = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}

VAE_15 = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}

TEXT_15 = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "vocab_size": 49408,
}

UNET_21 = UNET_15 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}

TEXT_21 = TEXT_15 | {
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,  # of OpenCLIP-H's 24: what is attended to comes from the last but one
    "projection_dim": 512,
}

UNET_XL = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}

VAE_XL = VAE_15 | {"force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}

TEXT_XL = TEXT_15 | {"projection_dim": 768}

TEXT_XL_2 = TEXT_15 | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


class Family(NamedTuple):
    """A published model: what its folder's JSON files say, and how many parameters its parts have."""

    pipeline: str
    parts: dict[str, dict[str, Any]]  # folder -> config.json
    num_parameters: dict[str, int]
    prediction_type: str = "epsilon"


FAMILIES = {
    "sd15": Family(
        "StableDiffusionPipeline",
        {"text_encoder": TEXT_15, "unet": UNET_15, "vae": VAE_15},
        {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863},
    ),
    "sd21": Family(
        "StableDiffusionPipeline",
        {"text_encoder": TEXT_21, "unet": UNET_21, "vae": VAE_15},
        {"text_encoder": 340_387_840, "unet": 865_910_724, "vae": 83_653_863},
        "v_prediction",
    ),
    "sdxl": Family(
        "StableDiffusionXLPipeline",
        {"text_encoder": TEXT_XL, "text_encoder_2": TEXT_XL_2, "unet": UNET_XL, "vae": VAE_XL},
        {
            "text_encoder": 123_060_480,
            "text_encoder_2": 694_659_840,
            "unet": 2_567_463_684,
            "vae": 83_653_863,
        },
    ),
}


def read_configs(name: str) -> Configs:
    """What pipeline.read_configs reads of such a folder."""
    family = FAMILIES[name]
    return parse_configs({"_class_name": family.pipeline}, family.parts)
