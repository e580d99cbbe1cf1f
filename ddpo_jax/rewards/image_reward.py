"""ImageReward: how well people would rank a picture for its prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from ddpo_jax.errors import UserError
from ddpo_jax.models import preprocess
from ddpo_jax.models.blip import MAX_LENGTH, BLIPConfig, ImageReward, blip_config
from ddpo_jax.models.encoder import open_tokenizer
from ddpo_jax.models.folder import parsed, read_json, read_weights
from ddpo_jax.models.locate import REWARD_FILES, TOKENIZER_FILES, image_reward_files, locate
from ddpo_jax.models.torch_file import read_torch_weights
from ddpo_jax.rewards.pixels import PixelBatch, as_pixels
from ddpo_jax.sharding import first_device
from ddpo_jax.types import Prompts, PyTree

# By which the published package standardises what the head gives.
MEAN, STD = 0.16717362830052426, 1.0333394966054072

# BLIP's own two tokens, which follow BERT's in the vocabulary. A prompt has them only where it spells them out.
ADDED = ("[DEC]", "[ENC]")

# What the published file holds of BLIP's pretraining.
HEADS = re.compile(r"blip\.(vision_proj|text_proj|text_encoder\.pooler)\.")

Text = tuple[Int32[Any, "b s"], Bool[Any, "b s"]]  # of JAX or numpy: tokens, and which are not padding


def make(source: str, tokenizer: str = "", *, place: Callable = first_device) -> tuple[Callable, Callable, PyTree]:
    """(pure, prepare, params) of ImageReward: a picture and its prompt through BLIP and an MLP, standardised.

    r = (MLP(BLIP(picture, prompt)_[CLS]) - 0.167) / 1.033: Xu et al. 2023, Sec. 3, as its package returns it. About -2
    to 2. The difference of two pictures' is the log-odds that people rank the first higher, but for the 1.033.

    A prompt is cut at 35 tokens. The picture's shorter side is resized to 224 pixels, and the middle cut out; where
    the longer side leaves an odd number of pixels over, it may be cut one pixel beside the published package's.
    inputs: the tokens (b, 35) and which of them are not padding (b, 35). Differentiable in the pictures.

    source: `reward.imagereward_model`: a folder or a hub id, such as zai-org/ImageReward, with ImageReward.pt, of which
    plain tensors are read and nothing is run, or the same as image_reward.safetensors or model.safetensors, and
    med_config.json.  tokenizer: `reward.imagereward_tokenizer`: a folder or a hub id with vocab.txt or tokenizer.json
    of bert-base-uncased; the model's own folder if empty.

    Raises:
        UserError: something is missing, broken or does not fit; the message names the file.
    """
    if source in ("", "tiny"):
        raise UserError(
            f"reward.imagereward_model={source!r}: expected ImageReward: a folder with ImageReward.pt and"
            " med_config.json, or a hub id such as zai-org/ImageReward"
        )
    folder = locate(source, field="reward.imagereward_model", hub_files=image_reward_files)
    path = folder / "med_config.json"
    config = parsed(path, blip_config, read_json(path))
    module, size = ImageReward(config), config.vision.image_size
    how = preprocess.parse({}, size)
    tokenize = load_tokenizer(folder, tokenizer, config.text.vocab_size)
    params = read_parameters(folder, module, config, place=place)

    def pure(params: PyTree, images: PixelBatch, inputs: Text) -> Float[Array, " b"]:
        tokens, mask = map(jnp.asarray, inputs)
        score = module.apply({"params": params}, preprocess.apply(as_pixels(images), how), tokens, mask)
        return (score - MEAN) / STD

    def prepare(prompts: Prompts) -> Text:
        return tokenize(prompts.texts)

    return pure, prepare, params


def load_tokenizer(folder: Path, source: str, vocab_size: int) -> Callable[[Sequence[str]], Text]:
    """texts -> their tokens, cut and padded, and which are not padding. source: where it is, if not in the folder."""
    if source:
        folder = locate(source, field="reward.imagereward_tokenizer", hub_files=lambda names: TOKENIZER_FILES)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES[:2]):
        raise UserError(
            f"{folder}: expected vocab.txt or tokenizer.json of bert-base-uncased, without which ImageReward is"
            " published; copy it there, or set reward.imagereward_tokenizer='google-bert/bert-base-uncased'"
        )
    tokenizer = open_tokenizer(folder, "BertTokenizer", vocab_size, config="med_config.json")
    tokenizer.add_tokens(list(ADDED), special_tokens=True)
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{folder}: the tokenizer knows {len(tokenizer)} tokens with BLIP's {' and '.join(ADDED)}, but"
            f" med_config.json reads vocab_size={vocab_size}; copy both from the published models"
        )

    def tokenize(texts: Sequence[str]) -> Text:
        encoded = tokenizer(list(texts), padding="max_length", truncation=True, max_length=MAX_LENGTH)
        return np.asarray(encoded["input_ids"], np.int32), np.asarray(encoded["attention_mask"], bool)

    return tokenize


def read_parameters(folder: Path, module: ImageReward, config: BLIPConfig, *, place: Callable) -> PyTree:
    """The parameters in a folder, float32. place: as in read_weights."""
    size, tokens = config.vision.image_size, jnp.zeros((1, MAX_LENGTH), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, size, size, 3)), tokens, tokens == 0)
    path = next((folder / name for name in REWARD_FILES if (folder / name).is_file()), None)
    how = {"passed_over": lambda name: HEADS.match(name) is not None, "place": place}
    if path is None:
        raise UserError(f"{folder}: expected one of {', '.join(REWARD_FILES)}; the model folder is not whole")
    if path.suffix == ".safetensors":
        return read_weights((path,), shapes["params"], **how)
    return read_torch_weights(path, shapes["params"], **how)
