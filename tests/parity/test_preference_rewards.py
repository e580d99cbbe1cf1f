"""Aesthetic score, PickScore, HPSv2 and SciScore beside transformers' CLIP and torch's layers, from files to scores."""

import itertools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ddpo_jax import rewards
from ddpo_jax.errors import UserError
from ddpo_jax.rewards import aesthetic, clip, clip_score
from ddpo_jax.tiny.tokenizer import MAX_LENGTH, VOCAB_SIZE, write_tokenizer
from ddpo_jax.types import Prompts

with warnings.catch_warnings():  # what these warn about on import is not ours to fix
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from random_torch import randomise, relative_error, tensors_of
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPTokenizer
    from transformers import CLIPModel as TorchCLIP

TEXTS = ("a fox", "an owl on a red striped background", "a whale")
SHAPES = [(37, 61), (53, 40), (20, 20), (9, 31)]
SIZE = 20


def tower(**changes):
    return {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3} | changes


# The published families, in small: what tells them apart is the activation and how wide a head and the embedding are.
KINDS = {
    "as OpenAI's": {"act": "quick_gelu", "text": tower(), "vision": tower(num_attention_heads=2), "patch": 5},
    "as OpenCLIP's H": {"act": "gelu", "text": tower(), "vision": tower(hidden_size=30), "patch": 4},
}


def write(folder, kind, *, processor=None):
    """A CLIP with random weights as transformers saves it."""
    fields = KINDS[kind]
    ends = {"bos_token_id": VOCAB_SIZE - 2, "eos_token_id": VOCAB_SIZE - 1, "pad_token_id": VOCAB_SIZE - 1}
    text = {**fields["text"], **ends, "vocab_size": VOCAB_SIZE, "max_position_embeddings": MAX_LENGTH}
    vision = {**fields["vision"], "image_size": SIZE, "patch_size": fields["patch"]}
    acts = {"hidden_act": fields["act"]}
    config = CLIPConfig(text_config=text | acts, vision_config=vision | acts, projection_dim=18)
    randomise(TorchCLIP(config)).save_pretrained(folder)
    write_tokenizer(folder)
    processor = processor or {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    CLIPImageProcessorPil(**processor).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: write(tmp_path_factory.mktemp("clip"), kind) for kind in KINDS}


def photos(height, width):
    rng = np.random.default_rng(height)
    coarse = rng.integers(0, 256, (3, -(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :height, :width]


def theirs(folder, images):
    """transformers' model, unit embeddings of the pictures, as its own processor makes them, and of TEXTS."""
    model = TorchCLIP.from_pretrained(folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(list(images), return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(folder)(list(TEXTS), padding="max_length", return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=tokens["input_ids"], pixel_values=pixels["pixel_values"])
    return model, out.image_embeds, out.text_embeds


def prompts():
    return Prompts(TEXTS, np.zeros((3, 1), int), np.arange(3), ({},) * 3)


SCORES = {
    "pickscore": lambda model, image, text: model.logit_scale.exp() * (image * text).sum(1),
    "sciscore": lambda model, image, text: model.logit_scale.exp() * (image * text).sum(1),
    "hpsv2": lambda model, image, text: (image @ text.T).diagonal(),
    "clip_score": lambda model, image, text: 100 * torch.nn.functional.cosine_similarity(image, text),
}
FIELDS = {"pickscore": "pickscore_model", "sciscore": "sciscore_model", "hpsv2": "hpsv2_model"}


def settings_of(**fields):
    return rewards.Settings(deadline=20.0, num_workers=1, **fields)


def scores_of(name, images, **fields):
    reward, params = rewards.make(name, settings_of(**fields))
    return reward.result(reward.submit(params, jnp.asarray(images), prompts()))[:, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCORES)
def test_scores_of_pictures_that_need_no_resizing(folders, kind, name):
    images = photos(SIZE, SIZE)
    with torch.no_grad():
        expected = SCORES[name](*theirs(folders[kind], images)).numpy()
    found = scores_of(name, images, **{FIELDS.get(name, "clip_model"): str(folders[kind])})
    assert relative_error(found, expected) <= 1e-4
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_from_8_bits_on_and_of_floats(folders, shape):
    folder, images = folders["as OpenCLIP's H"], photos(*shape)
    with torch.no_grad():
        expected = SCORES["hpsv2"](*theirs(folder, images)).numpy()
    found = scores_of("hpsv2", images, hpsv2_model=str(folder))
    np.testing.assert_allclose(found, expected, atol=1e-2)  # of a cosine; measured: 1.4e-4
    floats = scores_of("hpsv2", images.astype(np.float32) / 255, hpsv2_model=str(folder))
    np.testing.assert_allclose(floats, found, rtol=1e-5)


def aesthetic_mlp(width):
    widths = [width, 1024, 128, 64, 16, 1]
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    dropouts = [torch.nn.Dropout(0.2), torch.nn.Dropout(0.2), torch.nn.Dropout(0.1)]
    model = torch.nn.Module()
    model.layers = torch.nn.Sequential(
        layers[0], dropouts[0], layers[1], dropouts[1], layers[2], dropouts[2], layers[3], layers[4]
    )
    return randomise(model)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_aesthetic_score(folders, tmp_path, suffix):
    folder, images, head = folders["as OpenAI's"], photos(SIZE, SIZE), aesthetic_mlp(18)
    path = tmp_path / f"head{suffix}"
    if suffix == ".pth":
        torch.save(head.state_dict(), path)
    else:
        save_file(tensors_of(head), path)
    _, embedded, _ = theirs(folder, images)
    with torch.no_grad():
        expected = head.layers(embedded)[:, 0].numpy()
    found = scores_of("aesthetic_score", images, aesthetic_model=str(path), aesthetic_clip=str(folder))
    assert relative_error(found, expected) <= 1e-4


def test_a_head_for_another_embedding_is_refused(folders, tmp_path):
    torch.save(aesthetic_mlp(32).state_dict(), tmp_path / "head.pth")
    with pytest.raises(UserError, match=r"head\.pth: tensor 'layers\.0\.weight' has shape \(1024, 32\)"):
        aesthetic.make(str(tmp_path / "head.pth"), str(folders["as OpenAI's"]))
    with pytest.raises(UserError, match=r"reward\.aesthetic_model='': expected the file"):
        aesthetic.make("", str(folders["as OpenAI's"]))


@pytest.mark.parametrize("name", FIELDS)
def test_a_model_that_is_not_named_is_asked_for(name):
    with pytest.raises(UserError, match=f"reward.{FIELDS[name]}='': expected a CLIP"):
        rewards.make(name, settings_of())


PROCESSORS = {
    "bilinear": {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}, "resample": 2},
    "squashed": {"size": {"height": SIZE, "width": SIZE}, "do_center_crop": False},
    "cut from a larger one": {"size": {"shortest_edge": 26}, "crop_size": {"height": SIZE, "width": SIZE}},
    "other statistics": {
        "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
        "image_mean": [0.5, 0.4, 0.6],
        "image_std": [0.5, 0.3, 0.2],
    },
}


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_pictures_are_seen_as_the_folder_says(tmp_path, processor):
    folder, images = write(tmp_path / "clip", "as OpenAI's", processor=processor), photos(37, 61)
    found = clip.load(str(folder))
    _, expected, _ = theirs(folder, images)
    embedded = found.embed_images(found.params, jnp.asarray(images))
    np.testing.assert_allclose(embedded, expected.numpy(), atol=5e-3)


@pytest.mark.parametrize("step", ["do_resize", "do_rescale", "do_normalize"])
def test_a_processor_that_leaves_out_a_step_is_refused(tmp_path, step):
    folder = write(tmp_path / "clip", "as OpenAI's", processor=PROCESSORS["bilinear"] | {step: False})
    with pytest.raises(UserError, match=f"preprocessor_config.json: .*{step}.* must be true"):
        clip.load(str(folder))


def test_a_processor_for_another_tower_is_refused(tmp_path):
    folder = write(tmp_path / "clip", "as OpenAI's", processor={"size": 24, "crop_size": {"height": 24, "width": 24}})
    with pytest.raises(UserError, match=r"come out as \(24, 24\) pixels, and the vision tower takes 20"):
        clip.load(str(folder))


def test_an_old_config_json_is_read_as_transformers_reads_it(folders, tmp_path):
    """Files of 2021 and 2022 have *_config_dict beside, which counts, and leave out what is a default."""
    old = tmp_path / "old"
    old.mkdir()
    for path in folders["as OpenAI's"].iterdir():
        (old / path.name).write_bytes(path.read_bytes())
    fields = json.loads((old / "config.json").read_text())
    for name in ("text_config", "vision_config"):
        fields[f"{name}_dict"] = {key: fields[name].pop(key) for key in ("hidden_size", "num_hidden_layers")}
    (old / "config.json").write_text(json.dumps(fields))
    images = photos(SIZE, SIZE)
    found = scores_of("clip_score", images, clip_model=str(old))
    np.testing.assert_array_equal(found, scores_of("clip_score", images, clip_model=str(folders["as OpenAI's"])))


def test_a_caption_and_its_prompt(folders):
    found = clip.load(str(folders["as OpenAI's"]))
    score = clip.text_similarity(found)
    captions = ("a fox in the snow", "a red owl", "a whale")
    model = TorchCLIP.from_pretrained(folders["as OpenAI's"]).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folders["as OpenAI's"])
    with torch.no_grad():
        a, b = (
            model.get_text_features(**tokenizer(list(texts), padding="max_length", return_tensors="pt"))
            for texts in (captions, TEXTS)
        )
    a, b = (getattr(x, "pooler_output", x) for x in (a, b))
    expected = 100 * torch.nn.functional.cosine_similarity(a, b).numpy()
    np.testing.assert_allclose(score(captions, TEXTS), expected, rtol=1e-4)
    np.testing.assert_allclose(score(captions[:1], TEXTS[:1]), expected[:1], rtol=1e-4)
    np.testing.assert_allclose(score(TEXTS, TEXTS), [100, 100, 100], rtol=1e-5)


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (23, 31)], ids=str)
@pytest.mark.parametrize("name", ["clip_score", "pickscore", "hpsv2", "sciscore", "aesthetic_score"])
def test_gradients_equal_finite_differences_in_float64(folders, tmp_path, name, shape):
    folder = str(folders["as OpenCLIP's H"])
    if name == "aesthetic_score":
        torch.save(aesthetic_mlp(18).state_dict(), tmp_path / "head.pth")
        pure, prepare, params = aesthetic.make(str(tmp_path / "head.pth"), folder)
    elif name == "clip_score":
        pure, prepare, params = clip_score.make(folder, "{}")
    else:
        pure, prepare, params = getattr(clip_score, f"make_{name}")(folder)
    inputs, rng = prepare(prompts()), np.random.default_rng(0)
    with jax.enable_x64():
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        images = rng.uniform(0.2, 0.8, (3, *shape, 3))
        direction = rng.normal(size=images.shape)
        score = jax.jit(lambda x: pure(params, x, inputs))
        slopes = jax.jit(jax.grad(lambda x: score(x).sum()))(images)
        assert slopes.dtype == np.float64
        step = 1e-5
        expected = (score(images + step * direction) - score(images - step * direction)) / (2 * step)
        np.testing.assert_allclose((slopes * direction).sum(axis=(1, 2, 3)), expected, rtol=1e-3)


def test_255_in_floats_is_refused_also_by_pure(folders):
    pure, prepare, params = clip_score.make(str(folders["as OpenAI's"]), "{}")
    images = photos(SIZE, SIZE).astype(np.float32)
    with pytest.raises(UserError, match=r"pixels from \d+ to 25\d: pixels are float in \[0, 1\]"):
        pure(params, images, prepare(prompts()))
    with pytest.raises(UserError, match=r"reward clip_score was given pixels from \d+ to 25\d"):
        scores_of("clip_score", images, clip_model=str(folders["as OpenAI's"]))
