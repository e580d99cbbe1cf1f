"""ImageReward beside transformers' BLIP and torch's layers, under the names of the published file."""

import itertools
import json
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from small_bert import COMMON, TEXTS, edit_json, write_tokenizer

from ddpo_jax import rewards
from ddpo_jax.convert import to_torch
from ddpo_jax.errors import UserError
from ddpo_jax.models.blip import ImageReward, blip_config
from ddpo_jax.models.locate import image_reward_files
from ddpo_jax.rewards import image_reward
from ddpo_jax.types import Prompts

with warnings.catch_warnings():  # what these warn about on import is not ours to fix
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from random_torch import randomise, relative_error
    from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
    from transformers import CLIPImageProcessorPil as Processor

SIZE, VOCAB_SIZE = 24, 40
VISION = {
    **{"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3},
    **{"image_size": SIZE, "patch_size": 8},
}
# As published but for the sizes: the width that it names is not this ViT's, and there are no segments.
MED = COMMON | {
    "model_type": "bert",
    "vocab_size": VOCAB_SIZE + 2,
    "max_position_embeddings": 40,
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
    "add_cross_attention": True,
    "encoder_width": 768,
    "vision_config": VISION,
}
# Of unlike lengths, one longer than is read, an empty one.
PROMPTS = (TEXTS[0], TEXTS[1], "the owl " * 40, "")

# transformers' names -> ImageReward's
VISION_NAMES = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.self_attn\.qkv\.", ".attn.qkv."),
    (r"\.self_attn\.projection\.", ".attn.proj."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"^post_layernorm\.", "norm."),
)


def published_name(name):
    for pattern, replacement in VISION_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def make_theirs():
    vision = BlipVisionModel(BlipVisionConfig(**VISION, hidden_act="gelu", layer_norm_eps=1e-6))
    known = set(BlipTextConfig().to_dict()) - {"model_type"}
    fields = {name: value for name, value in MED.items() if name in known}
    ends = {"bos_token_id": None, "sep_token_id": None}  # not read here
    config = BlipTextConfig(**fields, **ends, encoder_hidden_size=VISION["hidden_size"])
    text = BlipTextModel(config, add_pooling_layer=False)
    widths = [MED["hidden_size"], 1024, 128, 64, 16, 1]
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    dropouts = [torch.nn.Dropout(0.2) for _ in range(3)]
    mlp = torch.nn.Module()
    mlp.layers = torch.nn.Sequential(
        layers[0], dropouts[0], layers[1], dropouts[1], layers[2], dropouts[2], layers[3], layers[4]
    )
    parts = [randomise(part, seed=seed) for seed, part in enumerate((vision, text, mlp))]
    with torch.no_grad():
        for name, parameter in itertools.chain(*(part.named_parameters() for part in parts)):
            if name.endswith(("norm.weight", "LayerNorm.weight")):
                parameter.mul_(2)  # so that the states differ from picture to picture and from text to text
            elif name.endswith("bias"):
                parameter.sub_(0.5)
            elif "crossattention" in name or "embedding" in name:
                parameter.mul_(2)
    return parts


def published_tensors(vision, text, mlp):
    """A state_dict as in ImageReward.pt, with what it holds beside the network."""
    named = {f"blip.visual_encoder.{published_name(name)}": tensor for name, tensor in vision.state_dict().items()}
    named |= {f"blip.text_encoder.{name}": tensor for name, tensor in text.state_dict().items()}
    named |= {f"mlp.{name}": tensor for name, tensor in mlp.state_dict().items()}
    named["blip.text_encoder.embeddings.position_ids"] = torch.arange(MED["max_position_embeddings"])[None]
    for name, width in (("vision_proj", VISION["hidden_size"]), ("text_proj", MED["hidden_size"])):
        named |= {f"blip.{name}.weight": torch.ones(256, width), f"blip.{name}.bias": torch.ones(256)}
    return {name: tensor.clone() for name, tensor in named.items()}


@pytest.fixture(scope="module")
def theirs():
    return make_theirs()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, theirs):
    folder = tmp_path_factory.mktemp("image_reward")
    torch.save(published_tensors(*theirs), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED))
    write_tokenizer(folder, "bert")
    (folder / "tokenizer_config.json").unlink()
    return folder


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copied")


def photos(height, width):
    rng = np.random.default_rng(height)
    coarse = rng.integers(0, 256, (len(PROMPTS), -(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :height, :width]


def their_scores(theirs, folder, images, texts=PROMPTS):
    vision, text, mlp = theirs
    processor = Processor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    tokenizer = BertTokenizer.from_pretrained(folder)
    tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    with torch.no_grad():
        seen = vision(processor(list(images), return_tensors="pt")["pixel_values"]).last_hidden_state
        states = text(
            tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
        ).last_hidden_state
        return ((mlp.layers(states[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072).numpy()


def prompts(texts=PROMPTS):
    return Prompts(tuple(texts), np.zeros((len(texts), 1), int), np.arange(len(texts)), ({},) * len(texts))


def settings_of(folder, **fields):
    return rewards.Settings(deadline=20.0, num_workers=1, imagereward_model=str(folder), **fields)


def scores_of(folder, images):
    reward, params = rewards.make("image_reward", settings_of(folder))
    return reward.result(reward.submit(params, jnp.asarray(images), prompts()))[:, 0]


def test_the_scores_are_theirs(theirs, folder):
    images = photos(SIZE, SIZE)
    expected, found = their_scores(theirs, folder, images), scores_of(folder, images)
    np.testing.assert_allclose(found, expected, rtol=1e-4)  # measured: 3e-6
    # Both the picture and the text matter, or less than all of the network would be compared.
    assert np.std(their_scores(theirs, folder, images, PROMPTS[:1] * 4)) > 0.1 * np.std(expected)
    assert np.std(their_scores(theirs, folder, images[[0] * 4])) > 0.1 * np.std(expected)


@pytest.mark.parametrize("shape", [(37, 61), (31, 9)], ids=str)
def test_the_scores_of_pictures_of_another_shape(theirs, folder, shape):
    images = photos(*shape)
    # Pillow rounds to 8 bits on the way. Measured: 1.3e-2 and 6e-3; cut one pixel beside: 0.67 and 0.43.
    assert relative_error(scores_of(folder, images), their_scores(theirs, folder, images)) <= 3e-2


def test_8_bits_score_as_floats_do(folder):
    images = photos(SIZE, SIZE)
    np.testing.assert_allclose(scores_of(folder, images), scores_of(folder, images.astype(np.float32) / 255), rtol=1e-5)


@pytest.mark.parametrize("name", ["image_reward.safetensors", "model.safetensors"])
def test_safetensors_hold_the_same(theirs, folder, copied, name):
    (copied / "ImageReward.pt").unlink()
    save_file({key: tensor.numpy() for key, tensor in published_tensors(*theirs).items()}, copied / name)
    expected, found = (image_reward.make(str(place))[2] for place in (folder, copied))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    for ours, same in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, same)


def test_the_tokens_are_theirs(folder):
    _, prepare, _ = image_reward.make(str(folder))
    texts = (*PROMPTS, "a [DEC] fox [ENC]", "An OWL's naïve fox")
    tokens, mask = prepare(prompts(texts))
    assert (tokens.dtype, mask.dtype, tokens.shape, mask.shape) == (np.int32, bool, (6, 35), (6, 35))
    tokenizer = BertTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    expected = tokenizer(list(texts), padding="max_length", truncation=True, max_length=35)
    np.testing.assert_array_equal(tokens, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])
    assert {VOCAB_SIZE, VOCAB_SIZE + 1} <= set(tokens[4])
    np.testing.assert_array_equal(mask.sum(axis=1)[[2, 3]], [35, 2])


def test_what_is_padding_does_not_matter(folder):
    pure, prepare, params = image_reward.make(str(folder))
    tokens, mask = prepare(prompts())
    images, score = photos(SIZE, SIZE), jax.jit(pure)
    other = np.where(mask, tokens, 7).astype(np.int32)
    np.testing.assert_allclose(score(params, images, (other, mask)), score(params, images, (tokens, mask)), rtol=1e-6)


def test_gradients_equal_finite_differences_in_float64(folder):
    pure, prepare, params = image_reward.make(str(folder))
    inputs, rng = prepare(prompts()), np.random.default_rng(0)
    with jax.enable_x64():
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        images = rng.uniform(0.2, 0.8, (len(PROMPTS), 27, 35, 3))
        direction = rng.normal(size=images.shape)

        @jax.jit
        def score(x):
            scores, pull = jax.vjp(lambda x: pure(params, x, inputs), x)
            return scores, pull(jnp.ones_like(scores))[0]

        scores, slopes = score(images)
        assert scores.dtype == slopes.dtype == np.float64
        step = 1e-5
        expected = (score(images + step * direction)[0] - score(images - step * direction)[0]) / (2 * step)
        np.testing.assert_allclose((slopes * direction).sum(axis=(1, 2, 3)), expected, rtol=1e-6)


def test_the_published_size_and_names():
    """ViT-L/16 at 224 pixels and BERT-base with cross-attention; the med_config.json is BLIP's own."""
    published = blip_config({"encoder_width": 768, "type_vocab_size": 2})
    assert (published.vision.tower.num_layers, published.text.num_layers) == (24, 12)
    assert (published.vision.tower.num_heads, published.text.layer.num_heads) == (16, 12)
    assert (published.vision.tower.epsilon, published.text.layer.epsilon) == (1e-6, 1e-12)
    module = ImageReward(blip_config({"num_hidden_layers": 2, "vision_config": {"num_hidden_layers": 2}}))
    tokens, pixels = jnp.zeros((1, 35), jnp.int32), jnp.zeros((1, 224, 224, 3))
    tree = jax.eval_shape(module.init, jax.random.key(0), pixels, tokens, tokens == 0)["params"]
    names = {name: tensor.shape for name, tensor in to_torch(jax.tree.map(no_numbers, tree)).items()}
    expected = {
        "blip.visual_encoder.cls_token": (1, 1, 1024),
        "blip.visual_encoder.pos_embed": (1, 197, 1024),
        "blip.visual_encoder.patch_embed.proj.weight": (1024, 3, 16, 16),
        "blip.visual_encoder.blocks.1.norm1.weight": (1024,),
        "blip.visual_encoder.blocks.1.attn.qkv.weight": (3072, 1024),
        "blip.visual_encoder.blocks.1.attn.proj.bias": (1024,),
        "blip.visual_encoder.blocks.1.mlp.fc1.weight": (4096, 1024),
        "blip.visual_encoder.norm.bias": (1024,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (30524, 768),
        "blip.text_encoder.embeddings.position_embeddings.weight": (512, 768),
        "blip.text_encoder.encoder.layer.1.attention.self.key.weight": (768, 768),
        "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight": (768, 1024),
        "blip.text_encoder.encoder.layer.1.crossattention.output.LayerNorm.weight": (768,),
        "blip.text_encoder.encoder.layer.1.output.dense.weight": (768, 3072),
        "mlp.layers.0.weight": (1024, 768),
        "mlp.layers.7.bias": (1,),
    }
    assert {name: names[name] for name in expected} == expected
    # 12 a block of the ViT and 6 around them; 26 a layer of the text encoder and 4 before them; 10 of the MLP
    assert len(names) == 2 * 12 + 6 + 2 * 26 + 4 + 10


def no_numbers(leaf):
    """An array of this shape that takes no memory."""
    return np.broadcast_to(np.zeros((), np.bool_), leaf.shape)


BROKEN = {
    "no weights": (lambda f: (f / "ImageReward.pt").unlink(), r"expected one of image_reward\.safetensors, model"),
    "cut weights": (
        lambda f: (f / "ImageReward.pt").write_bytes((f / "ImageReward.pt").read_bytes()[:999]),
        r"ImageReward\.pt: not a file of torch\.save",
    ),
    "cut safetensors": (
        lambda f: (f / "image_reward.safetensors").write_bytes(b"\0" * 99),
        r"image_reward\.safetensors: not a whole safetensors file",
    ),
    "another network's": (
        lambda f: torch.save({"mlp.layers.0.weight": torch.ones(3)}, f / "ImageReward.pt"),
        r"ImageReward\.pt: tensor 'blip\.text_encoder\.embeddings\.LayerNorm\.bias' is missing",
    ),
    "another width": (
        lambda f: edit_json(f / "med_config.json", intermediate_size=48),
        r"ImageReward\.pt: tensor 'blip\.text_encoder\.\S+' has shape",
    ),
    "no med_config.json": (lambda f: (f / "med_config.json").unlink(), r"med_config\.json: no such file"),
    "a broken med_config.json": (
        lambda f: (f / "med_config.json").write_text("{"),
        r"med_config\.json: not valid JSON",
    ),
    "too few positions": (
        lambda f: edit_json(f / "med_config.json", max_position_embeddings=34),
        r"med_config\.json: max_position_embeddings=34: expected at least 35",
    ),
    "a size between patches": (
        lambda f: edit_json(f / "med_config.json", vision_config=VISION | {"image_size": 23}),
        r"med_config\.json: image_size=23 must be divisible by patch_size=8",
    ),
    "a vision_config of another kind": (
        lambda f: edit_json(f / "med_config.json", vision_config=3),
        r"med_config\.json: a field has a value of another kind",
    ),
    "no tokenizer": (
        lambda f: (f / "vocab.txt").unlink(),
        r"copied: expected vocab\.txt or tokenizer\.json of bert-base-uncased, without which",
    ),
    "no room for BLIP's tokens": (
        lambda f: edit_json(f / "med_config.json", vocab_size=VOCAB_SIZE),
        r"knows 42 tokens with BLIP's \[DEC\] and \[ENC\], but med_config\.json reads vocab_size=40",
    ),
    "another tokenizer": (
        lambda f: edit_json(f / "med_config.json", vocab_size=3 * VOCAB_SIZE),
        r"knows 40 tokens, but med_config\.json reads vocab_size=120",
    ),
}


@pytest.mark.parametrize(("break_it", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named_in_one_line(copied, break_it, message):
    break_it(copied)
    with pytest.raises(UserError, match=message) as raised:
        image_reward.make(str(copied))
    assert "\n" not in str(raised.value)


def test_the_tokenizer_may_lie_elsewhere(folder, copied, tmp_path):
    (tmp_path / "bert").mkdir()
    (copied / "vocab.txt").rename(tmp_path / "bert" / "vocab.txt")
    (_, found, _), (_, expected, _) = (
        image_reward.make(str(copied), str(tmp_path / "bert")),
        image_reward.make(str(folder)),
    )
    for ours, same in zip(found(prompts()), expected(prompts()), strict=True):
        np.testing.assert_array_equal(ours, same)
    rewards.make("image_reward", settings_of(copied, imagereward_tokenizer=str(tmp_path / "bert")))


@pytest.mark.parametrize("source", ["", "tiny"])
def test_a_model_that_is_not_named_is_asked_for(source):
    with pytest.raises(UserError, match=f"reward.imagereward_model='{source}': expected ImageReward: a folder"):
        image_reward.make(source)


def test_what_is_asked_of_the_hub():
    patterns = image_reward_files(("ImageReward.pt", "med_config.json", "README.md"))
    assert {"ImageReward.pt", "med_config.json", "vocab.txt"} <= set(patterns)
    assert not any(name.endswith(".safetensors") for name in patterns)
    both = image_reward_files(("ImageReward.pt", "image_reward.safetensors"))
    assert "image_reward.safetensors" in both and "ImageReward.pt" not in both
    assert "ImageReward.pt" in image_reward_files(None)
    with pytest.raises(UserError, match=r"expected one of .*ImageReward\.pt"):
        image_reward_files(("model.bin",))
