"""A reward learned from preferences: it is right about prompts that it has not seen, and a reward like any other."""

import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from small import write_clip
from small_run import equal, silent, small_config

from ddpo_jax import bradley_terry, fit_reward, preferences, rewards, score
from ddpo_jax.bradley_terry import Comparisons
from ddpo_jax.build import build
from ddpo_jax.errors import UserError
from ddpo_jax.models.mlp import PreferenceHead
from ddpo_jax.rewards import clip, learned
from ddpo_jax.tiny.render import render
from ddpo_jax.types import Prompts

SIZE = 16
RED = ["--data=test_fit_reward:redder", "--num_pairs=320", "--held_out=0.25", "--chunk_size=32"]


def plain(index, k):
    """A picture of a colour and some noise."""
    rng = np.random.default_rng((index, k))
    return (rng.uniform(30, 220, 3) + rng.uniform(-20, 20, (SIZE, SIZE, 3))).astype(np.uint8)


def redness(images):
    return images[..., 0].mean(axis=(-1, -2)) - images[..., 1:].mean(axis=(-1, -2, -3))


def redder(index):
    """The redder picture is preferred, of prompts that come several times; every eighth pair is a tie."""
    images = plain(index, 0), plain(index, 1)
    label = 0.5 if index % 8 == 7 else float(redness(images[0]) > redness(images[1]))
    return f"a fox number {index % 20}", *images, label


def by_chance(index):
    return *redder(index)[:3], float(np.random.default_rng((index, 9)).random() < 0.5)


def of_its_prompt(index):
    """A picture that was drawn for its prompt is preferred to one that was drawn for another."""
    (right, caption), (other, _) = render(10**8 + index), render(10**8 + 7919 * (index + 1))
    return (caption, right, other, 1.0) if index % 2 else (caption, other, right, 0.0)


def prompts_of(*texts):
    return Prompts(texts, np.full((len(texts), 3), 9**9), np.arange(len(texts)), ({},) * len(texts))


def run(capsys, *arguments, status=0):
    """What was printed."""
    assert fit_reward.main(["--compilation_cache=", *map(str, arguments)]) == status
    return capsys.readouterr()


def percent(pattern, text):
    return float(re.search(pattern + r" ([\d.]+)%", text)[1]) / 100


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """Do not write to it."""
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def red(small_clip, tmp_path_factory):
    """A learned reward: its file. Do not write to it."""
    path = tmp_path_factory.mktemp("red") / "reward.safetensors"
    assert fit_reward.main([*RED, f"--clip={small_clip}", f"--output={path}", "--compilation_cache="]) == 0
    return path


def make(path, **more):
    return rewards.make(
        "learned_reward", rewards.Settings(deadline=20.0, num_workers=1, learned_model=str(path), **more)
    )


def test_a_colour_is_learned_of_prompts_not_seen(red, small_clip, tmp_path, capsys):
    said = run(capsys, *RED, f"--clip={small_clip}", f"--output={tmp_path / 'again.safetensors'}").out
    assert percent("held-out accuracy", said) >= 0.9
    assert "of 4 prompts that it has not seen" in said and "40 ties are left out" in said
    assert float(re.search(r"log loss ([\d.]+),", said)[1]) <= 0.4
    assert (tmp_path / "again.safetensors").read_bytes() == red.read_bytes()
    assert "--config.reward.learned_model=" in said
    assert [path.name for path in tmp_path.iterdir()] == ["again.safetensors"]
    figures = learned.read_about(red).figures
    assert figures["pairs"] + figures["held_out_pairs"] == 280 and figures["held_out_by"] == "prompt"
    assert figures["accuracy"] >= 0.9 and abs(figures["confidence"] - figures["accuracy"]) <= 0.15


def test_chance_is_not_learned(small_clip, tmp_path, capsys):
    flags = ["--data=test_fit_reward:by_chance", *RED[1:], f"--clip={small_clip}", "--held_out=0.5"]
    said = run(capsys, *flags, f"--output={tmp_path / 'reward.safetensors'}", "--num_epochs=20").out
    assert abs(percent("held-out accuracy", said) - 0.5) <= 0.12


def test_what_fits_its_prompt_is_learned(tmp_path, capsys):
    flags = ["--data=test_fit_reward:of_its_prompt", "--num_pairs=160", "--held_out=0.3", "--chunk_size=32"]
    said = run(capsys, *flags, "--clip=tiny", f"--output={tmp_path / 'reward.safetensors'}").out
    assert percent("held-out accuracy", said) >= 0.85


@pytest.mark.parametrize("hidden", [(), (32, 8)], ids=str)
def test_scores_are_those_of_the_fit(small_clip, tmp_path, capsys, hidden):
    """From a folder with pictures of another size than the CLIP's, to what a run's reward gives them."""
    rows = []
    for i in range(24):
        for k in (0, 1):
            Image.fromarray(plain(i, k)).resize((40, 30)).save(tmp_path / f"{i}_{k}.png")
        rows.append({"prompt": "an owl", "image_0": f"{i}_0.png", "image_1": f"{i}_1.png", "label": i % 2})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert preferences.shorter_side(str(tmp_path)) == 30
    output = tmp_path / "reward.safetensors"
    flags = [f"--data={tmp_path}", f"--clip={small_clip}", f"--output={output}", "--num_epochs=3", "--batch_size=7"]
    said = run(capsys, *flags, f"--hidden={','.join(map(str, hidden))}").out
    assert "held out one by one" in said and "24 pairs of 30 pixels seen" in said
    source = preferences.open_source(str(tmp_path), resolution=30)
    pairs = [source.get(i) for i in range(24)]
    images = np.stack([image for pair in pairs for image in (pair.image_0, pair.image_1)])
    reward, params = make(output)
    found = reward.result(reward.submit(params, images, prompts_of(*["an owl"] * 48)))[:, 0].reshape(24, 2)
    data = fit_reward.embed(clip.load(str(small_clip)), source, count=24, resolution=30, seed=0, chunk_size=5)
    held = bradley_terry.hold_out(data.prompts, fraction=0.1, seed=0)
    assert held.sum() == 2
    head, own = PreferenceHead(hidden), {"params": params[0]["head"]}
    texts = jnp.asarray(data.texts)
    embedded = np.stack([head.apply(own, jnp.asarray(data.pictures[:, k]), texts) for k in (0, 1)], axis=1)
    distance = np.abs(embedded[:, None] - found[None]).max(axis=2)
    order = distance.argmin(axis=1)  # the fit's pairs among the folder's
    assert sorted(order) == list(range(24)) and distance.min(axis=1).max() <= 1e-2
    trained = found[order[~held]]
    np.testing.assert_allclose((trained.mean(), trained.std()), (0, 1), atol=1e-3)


def test_it_is_scored_with_and_trained_on(red, small_folder, tmp_path, capsys):
    for i in range(6):
        Image.fromarray(plain(9**9 + i, 0)).save(tmp_path / f"{i}.png")
    output = tmp_path / "out"
    flags = [f"--images={tmp_path}", f"--output={output}", "--prompt=an owl", "--compilation_cache="]
    assert score.main(["--reward=learned_reward", f"--config.reward.learned_model={red}", *flags]) == 0
    rows = [line.split(",") for line in (output / "scores.csv").read_text().splitlines()[1:]]
    images = np.stack([plain(9**9 + i, 0) for i in range(6)])
    correlation = np.corrcoef([float(row[2]) for row in rows], redness(images))
    assert correlation[0, 1] >= 0.8
    config = small_config(small_folder, **{"reward.name": "learned_reward", "reward.learned_model": str(red)})
    ddpo = build(config, silent)
    assert ddpo.parts.reward.names == ("learned_reward",) and ddpo.parts.reward.pure is not None
    assert "head" in ddpo.frozen.reward[0]


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (23, 31)], ids=str)
@pytest.mark.parametrize("hidden", [(), (8, 4)], ids=str)
def test_gradients_equal_finite_differences_in_float64(small_clip, tmp_path, hidden, shape):
    found = clip.load(str(small_clip))
    head, rng = PreferenceHead(hidden), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), learned.head_shapes(head, found))
    path = tmp_path / "reward.safetensors"
    learned.write(path, params, learned.About(str(small_clip), found.width, found.fingerprint, hidden, {}))
    pure, prepare, params = learned.make(str(path))
    inputs = prepare(prompts_of("a fox", "an owl", "a whale"))
    with jax.enable_x64():
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        images = rng.uniform(0.2, 0.8, (3, *shape, 3))
        direction = rng.normal(size=images.shape)
        scores = jax.jit(lambda x: pure(params, x, inputs))
        slopes = jax.jit(jax.grad(lambda x: scores(x).sum()))(images)
        assert slopes.dtype == np.float64
        step = 1e-5
        expected = (scores(images + step * direction) - scores(images - step * direction)) / (2 * step)
        np.testing.assert_allclose((slopes * direction).sum(axis=(1, 2, 3)), expected, rtol=1e-3)


def test_the_gradient_leads_to_what_is_preferred(red):
    reward, params = make(red)
    images = jnp.full((2, 20, 20, 3), 0.5)
    inputs = reward.prepare(prompts_of("a fox", "an owl"))
    climb = jax.jit(jax.value_and_grad(lambda x: reward.pure(params, x, inputs).sum()))
    first = climb(images)[0]
    for _ in range(10):
        images = jnp.clip(images + 0.02 * jnp.sign(climb(images)[1]), 0, 1)
    assert climb(images)[0] > first + 1 and redness(np.asarray(images)).min() > 0.02


def test_prompts_are_held_out_whole():
    prompts = [f"prompt {i % 20}" for i in range(200)]
    held = bradley_terry.hold_out(prompts, fraction=0.25, seed=0)
    assert held.sum() == 50 and len({p for p, out in zip(prompts, held, strict=True) if out}) == 5
    assert not np.array_equal(held, bradley_terry.hold_out(prompts, fraction=0.25, seed=1))
    few = bradley_terry.hold_out(["a", "b"] * 20, fraction=0.25, seed=0)
    assert few.sum() == 10
    for fraction, count in ((0.01, 2), (0.99, 2)):
        assert 0 < bradley_terry.hold_out(["a", "b"][:count], fraction=fraction, seed=0).sum() < count
    lopsided = ["much"] * 100 + [f"prompt {i}" for i in range(12)]
    assert 1 <= bradley_terry.hold_out(lopsided, fraction=0.1, seed=0).sum() <= 11


def test_labels_in_between_are_learned_as_odds():
    """One feature that says how surely: the margins become the labels' log-odds."""
    rng = np.random.default_rng(0)
    pictures = rng.normal(size=(2000, 2, 3)).astype(np.float32)
    texts = np.ones((2000, 1), np.float32)
    log_odds = pictures[:, 0, 1] - pictures[:, 1, 1]
    data = Comparisons(("",) * 2000, pictures, texts, (1 / (1 + np.exp(-log_odds))).astype(np.float32))
    held = bradley_terry.hold_out(data.prompts, fraction=0.2, seed=0)
    fitted = bradley_terry.fit(data, held, bradley_terry.Settings((), 0.01, 0.0, 64, 30, 0))
    head = partial(PreferenceHead().apply, {"params": fitted.params})
    scores = [head(jnp.asarray(pictures[:, k]), jnp.asarray(texts)) for k in (0, 1)]
    margins = fitted.std * (scores[0] - scores[1])
    np.testing.assert_allclose(margins, log_odds, atol=0.1)
    assert abs(fitted.std - pictures[..., 1].std()) <= 0.1
    assert abs(fitted.held_out.confidence - np.maximum(data.labels, 1 - data.labels).mean()) <= 0.02


def test_folding_changes_nothing_but_the_place():
    head, rng = PreferenceHead((5,)), np.random.default_rng(0)
    picture, text = (jnp.asarray(rng.normal(size=(4, width)), jnp.float32) for width in (7, 3))
    params = head.init(jax.random.key(0), picture, text)["params"]
    params["layers_1"]["kernel"] = jnp.asarray(rng.normal(size=(5, 1)), jnp.float32)
    before = head.apply({"params": params}, picture, text)
    same = bradley_terry.folded(params, jnp.zeros(14), jnp.ones(14))
    assert equal(same, params)
    after = head.apply({"params": bradley_terry.standardised(params, 3.0, 2.0)}, picture, text)
    np.testing.assert_allclose(after, (before - 3) / 2, rtol=1e-5)


def broken(red, tmp_path, what):
    path = tmp_path / "reward.safetensors"
    match what:
        case "gone":
            path.unlink(missing_ok=True)
        case "text":
            path.write_text("no tensors")
        case "another":
            save_file({"x": np.zeros(3, np.float32)}, path)
        case "cut":
            path.write_bytes(red.read_bytes()[:-8])
        case "half":
            save_file({"x": np.zeros(3, np.float32)}, path, metadata={learned.ABOUT: '{"clip": "tiny"}'})
        case "other tensors":
            about = learned.read_about(red)._asdict()
            save_file({"x": np.zeros(3, np.float32)}, path, metadata={learned.ABOUT: json.dumps(about)})
    return path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("gone", "no such file; expected a file that ddpo_jax.fit_reward wrote"),
        ("text", "not a whole safetensors file"),
        ("another", "does not say that it is a learned reward"),
        ("cut", "not a whole safetensors file"),
        ("half", "field 'clip_width' is missing"),
        ("other tensors", r"tensor 'layers\.0\.bias' is missing"),
    ],
)
def test_a_broken_file_is_one_error(red, tmp_path, what, message):
    path = broken(red, tmp_path, what)
    with pytest.raises(UserError, match=message) as raised:
        make(path)
    assert "reward.safetensors" in str(raised.value) and "\n" not in str(raised.value)


def test_a_head_is_for_its_own_clip(red, tmp_path):
    with pytest.raises(UserError, match=r"fitted on a CLIP of width 16.*learned_clip='tiny' has width 128"):
        make(red, learned_clip="tiny")
    other = write_clip(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"fitted on a CLIP with other weights"):
        make(red, learned_clip=str(other))
    with pytest.raises(UserError, match=r"reward\.learned_model='': expected the file"):
        make("")
    moved = write_clip(tmp_path / "moved")
    assert equal(make(red, learned_clip=str(moved))[1], make(red)[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--num_pairs=0"], "--num_pairs=0: expected 1 or more"),
        (["--held_out=1"], "--held_out=1.0: expected a fraction"),
        (["--learning_rate=0"], "--learning_rate=0.0, --weight_decay=0.1: expected finite numbers"),
        (["--hidden=64,-1"], "--hidden=64,-1: expected widths"),
        (["--hidden=wide"], "--hidden=wide: expected widths"),
        (["--output=reward.pth"], "ends in .safetensors"),
        (["--seed=-1"], "--seed=-1"),
        (["--clip=/nowhere/clip"], "--clip='/nowhere/clip': no such folder"),
        (["--data=/nowhere"], "--data='/nowhere': no such folder; expected a folder with pairs.jsonl"),
        (["--data=test_fit_reward:all_ties", "--num_pairs=4"], "0 of 4 pairs are no ties"),
        (
            ["--data=test_fit_reward:no_pair", "--num_pairs=4"],
            "--data, index 0: expected (prompt, image_0, image_1, la",
        ),
        (["--data=test_fit_reward:unlabelled", "--num_pairs=4"], "expected a label from 0 to 1, found nan"),
    ],
)
def test_flags_that_cannot_be_used(small_clip, tmp_path, capsys, changes, message):
    flags = [*RED, f"--clip={small_clip}", f"--output={tmp_path / 'reward.safetensors'}", *changes]
    said = run(capsys, *flags, status=2)
    assert message in said.err and said.err.startswith("error: ") and not list(tmp_path.iterdir())


def test_a_source_without_end_needs_a_number(small_clip, tmp_path, capsys):
    flags = [RED[0], f"--clip={small_clip}", f"--output={tmp_path / 'reward.safetensors'}"]
    assert "give --num_pairs" in run(capsys, *flags, status=2).err


def all_ties(index):
    return *redder(index)[:3], 0.5


def no_pair(index):
    return None


def unlabelled(index):
    return *redder(index)[:3], math.nan
