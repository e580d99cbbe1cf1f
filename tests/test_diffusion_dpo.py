"""Diffusion-DPO on a small model: log 2 at the reference, pairs of data and of samples, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_run import SAMPLES, distance, equal, learn, silent, small_config

from ddpo_jax import losses, pairing, preferences
from ddpo_jax.build import build, init_state
from ddpo_jax.errors import RunStopped, UserError
from ddpo_jax.losses import PairErrors
from ddpo_jax.update import make_update, summarize

DPO = {
    "algorithm": "diffusion_dpo",
    "data.source": "scorers:red_or_blue",
    "data.batch_size": 12,  # not a multiple of chunk_size
    "data.prompt_dropout": 0.25,
    "train.num_noise_draws": 2,
    "dpo.beta": 200.0,
}
ONLINE = {
    "algorithm": "online_dpo",
    "sample.num_prompts": 2,
    "sample.num_samples_per_prompt": SAMPLES // 2,
    "reward.name": "device:scorers:redness",
    "dpo.beta": 200.0,
    "dpo.num_pairs": 2,
}


def make_run(folder, settings, **changes):
    run = build(small_config(folder, **{**settings, **changes}), silent)
    return run, make_update(run.algorithm, run.tuning, run.tx, ema_decay=0.0, layout=run.layout)


def a_round(run, state, epoch=0):
    return run.algorithm.collect(state.params, run.frozen, run.draw(epoch), state.carry, jax.random.key(epoch))


def apart(batch):
    """The batch with latents that a network can tell apart at any noise; those of a random encoder are mostly noise."""
    signs = jnp.array([1.0, -1.0])[None, :, None, None, None]
    return batch._replace(x_0=jnp.broadcast_to(signs, batch.x_0.shape))


def rounds(run, update, count, change=lambda batch: batch):
    """The state after some rounds of one update each, and every round's scalars."""
    state, told = init_state(run, seed=0, ema=False), []
    for epoch in range(count):
        batch, carry, report = a_round(run, state, epoch)
        batch = change(batch)
        state, history = learn(update, run.algorithm, state, run.frozen, batch, num_updates=1)
        state = state._replace(carry=carry)
        told.append(report | summarize(history, 0.0))
    return state, told


@pytest.fixture(scope="module")
def offline(small_folder):
    return make_run(small_folder, DPO)


@pytest.fixture(scope="module")
def online(small_folder):
    return make_run(small_folder, ONLINE)


def test_a_round_has_the_winner_first_and_no_ties(offline):
    run, _ = offline
    batch, _, report = a_round(run, init_state(run, seed=0, ema=False))
    assert report["pairs/left_out"] == batch.weight.size - batch.weight.sum() == 1
    assert batch.x_0.shape[1:] == (2, 4, 4, 4) and not run.algorithm.slices(batch)[batch.weight == 0].any()
    decoded = np.asarray(run.parts.model.decode(run.frozen.vae, batch.x_0[:12, 0]))
    assert decoded.shape[0] == 12
    images, labels, _ = run.draw(0)
    winners = images[batch.weight > 0, 0]
    assert all(winner[..., 0].mean() > winner[..., 2].mean() for winner in winners) and 0 < (labels < 0.5).sum() < 12


def test_at_the_reference_the_loss_is_log_2_and_accuracy_is_undefined(offline):
    run, update = offline
    _, (told,) = rounds(run, update, 1)
    assert told["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert np.isnan(told["implicit_accuracy"])
    assert abs(told["win_over_reference"]) < 1e-6


def test_the_preferred_picture_draws_ahead(offline):
    run, update = offline
    state, told = rounds(run, update, 12, apart)
    assert np.mean([one["loss"] for one in told[-3:]]) < 0.5
    assert np.mean([one["implicit_accuracy"] for one in told[-3:]]) > 0.8
    assert told[-1]["margin"] > 0
    assert distance(state.params, run.frozen.denoiser) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ipo", "kto"])
def test_other_losses_learn_too(small_folder, kind):
    run, update = make_run(small_folder, DPO, **{"dpo.loss": kind})
    _, told = rounds(run, update, 12, apart)
    assert told[0]["loss"] == pytest.approx({"ipo": 0.25, "kto": 0.5}[kind], abs=1e-3)
    assert np.mean([one["implicit_accuracy"] for one in told[-3:]]) > 0.7


def test_of_lora_the_reference_is_the_pretrained_model(small_folder):
    run, update = make_run(small_folder, DPO, **{"train.lora_rank": 4})
    _, told = rounds(run, update, 12, apart)
    assert told[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert np.mean([one["loss"] for one in told[-3:]]) < 0.65


def test_shared_t_and_noise_make_equal_pictures_equal(offline):
    run, _ = offline
    state = init_state(run, seed=0, ema=False)
    batch, _, _ = a_round(run, state)
    batch = batch._replace(preference=jnp.asarray(batch.preference))
    same = batch._replace(x_0=jnp.stack([batch.x_0[:, 0]] * 2, axis=1))
    rows = jnp.array([[0, 0], [3, 1]])
    params = jax.tree.map(lambda x: 1.01 * x, state.params)
    _, metrics = run.algorithm.loss(params, run.frozen, same, rows, jax.random.key(0))
    np.testing.assert_allclose(metrics.mean["win_over_reference"], metrics.mean["lose_over_reference"], atol=1e-6)
    np.testing.assert_allclose(metrics.mean["margin"], 0, atol=1e-4)


def test_losses_by_hand():
    errors = PairErrors(*(jnp.array([x]) for x in (0.10, 0.30, 0.12, 0.29)))
    z = -0.5 * 100 * ((0.10 - 0.30) - (0.12 - 0.29))  # 1.5
    loss, metrics = losses.diffusion_dpo(errors, jnp.ones(1), beta=100.0)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-z)), rtol=1e-5)
    assert metrics.mean["implicit_accuracy"] == 1
    smoothed, _ = losses.diffusion_dpo(errors, jnp.full(1, 0.9), beta=100.0)
    np.testing.assert_allclose(smoothed, 0.9 * np.log1p(np.exp(-z)) + 0.1 * np.log1p(np.exp(z)), rtol=1e-5)
    np.testing.assert_allclose(losses.ipo(errors, jnp.ones(1), beta=100.0)[0], (z - 0.5) ** 2, rtol=1e-5)
    sigmoid = 1 / (1 + np.exp(-100 * (0.02 - 0.005)))
    arguments = (jnp.array([0.10]), jnp.array([0.12]))
    liked, _ = losses.kto(*arguments, jnp.ones(1), jnp.array(0.005), beta=100.0)
    disliked, _ = losses.kto(*arguments, jnp.zeros(1), jnp.array(0.005), beta=100.0)
    np.testing.assert_allclose([liked[0], disliked[0]], [1 - sigmoid, sigmoid], rtol=1e-5)


def test_best_against_worst():
    rewards = np.array([1.0, 5.0, 3.0, 2.0, np.nan, 7.0, 7.0, np.nan])
    chosen = pairing.best_against_worst(rewards, group_size=4, num_pairs=2)
    assert chosen.win.tolist()[:2] == [1, 2] and chosen.lose.tolist()[:2] == [0, 3]
    assert chosen.valid.tolist() == [True, True, False, False]  # two equal ones, and two that are missing


def test_a_majority_is_not_outvoted_by_large_numbers():
    scores = np.array([[1.0, 1.0, -1000.0], [0.0, 0.0, 1000.0], [-1.0, -1.0, 0.0], [np.nan, 0.0, 0.0]])
    rewards = pairing.majority(scores, [1.0, 1.0, 1.0], group_size=4)
    assert rewards.tolist()[:3] == [2, 0, -2] and np.isnan(rewards[3])
    assert pairing.majority(scores, [0.0, 0.0, 1.0], group_size=4).tolist() == [-3, 3, 0, 0]


def test_online_pairs_are_the_best_and_the_worst(online):
    run, _ = online
    state = init_state(run, seed=0, ema=False)
    batch, carry, report = a_round(run, state)
    assert batch.x_0.shape == (4, 2, 4, 4, 4) and batch.weight.tolist() == [1] * 4 and carry.round == 1
    images = np.asarray(run.parts.model.decode(run.frozen.vae, batch.x_0.reshape(-1, 4, 4, 4)))
    redness = (images[..., 0].mean(axis=(1, 2)) - images[..., 1:].mean(axis=(1, 2, 3))).reshape(4, 2)
    assert (redness[:, 0] > redness[:, 1]).all()
    assert redness[0, 0] >= redness[1, 0] and redness[0, 1] <= redness[1, 1]
    assert report["reward/missing"] == 0


def test_a_refreshed_reference_follows_the_model(small_folder):
    run, update = make_run(small_folder, ONLINE, **{"dpo.reference_every": 2})
    state, told = rounds(run, update, 3)
    assert told[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert abs(told[1]["win_over_reference"]) > 1e-6  # an update away from it
    assert told[2]["loss"] == pytest.approx(np.log(2), abs=1e-4)  # refreshed before the third
    assert not equal(state.carry.reference, state.params)
    assert distance(state.carry.reference, run.frozen.denoiser) > 1e-4


def test_online_pairs_can_be_kept_and_learned_from(small_folder, tmp_path):
    run, _ = make_run(small_folder, ONLINE, **{"dpo.save_pairs": str(tmp_path / "pairs")})
    state = init_state(run, seed=0, ema=False)
    a_round(run, state)
    later = tmp_path / "pairs" / "pairs-00001.jsonl"
    later.write_text("")  # of a run that was killed, and begins again
    a_round(run, state)
    later.unlink()
    source = preferences.open_source(str(tmp_path / "pairs"), resolution=16)
    assert source.length == 4
    (path,) = (tmp_path / "pairs").glob("*.jsonl")
    assert path.name == "pairs-00000.jsonl"
    for i, line in enumerate(map(json.loads, path.read_text().splitlines())):
        pair = source.get(i)
        better, worse = (pair.image_0, pair.image_1) if pair.label == 1 else (pair.image_1, pair.image_0)
        assert redness(better) > redness(worse)
        assert line["scores"][0 if pair.label == 1 else 1] > line["scores"][1 if pair.label == 1 else 0]
    assert {source.get(i).label for i in range(4)} == {0.0, 1.0}


@pytest.mark.parametrize("broken", ["a file in the way", "another run's rounds"])
def test_pairs_that_cannot_be_kept_stop_the_run(small_folder, tmp_path, broken):
    folder = tmp_path / "pairs"
    if broken == "a file in the way":
        folder.write_text("")
    else:
        folder.mkdir()
        (folder / "pairs-00003.jsonl").write_text("")
    run, _ = make_run(small_folder, ONLINE, **{"dpo.save_pairs": str(folder)})
    with pytest.raises(RunStopped, match=r"dpo\.save_pairs="):
        a_round(run, init_state(run, seed=0, ema=False))


def redness(image):
    return image[..., 0].mean() - image[..., 1:].mean()


def test_a_folder_of_pairs_is_a_source(tmp_path):
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (20, 16), color).save(tmp_path / f"{name}.png")
    row = {"prompt": "a field", "image_0": "a.png", "image_1": "b.png", "label": 1}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"label": 0.5}))
    source = preferences.open_source(str(tmp_path), resolution=16)
    batch = preferences.make_batch(source, batch_size=4, seed=0, epoch=0, resolution=16, horizontal_flip=False)
    assert batch.images.shape == (4, 2, 16, 16, 3) and sorted(batch.labels) == [0.5, 0.5, 1, 1]
    assert (batch.images[:, 0, ..., 0] == 255).all() and (batch.images[:, 1, ..., 2] == 255).all()


def test_flips_are_drawn_for_each_picture(tmp_path):
    def get(index):
        image = np.zeros((4, 4, 3), np.uint8)
        image[:, 0] = 255
        return "x", image, image, 1.0

    source = preferences.Pairs(get, None)
    settings = {"batch_size": 32, "seed": 0, "resolution": 4}
    batch = preferences.make_batch(source, epoch=0, horizontal_flip=True, **settings)
    left = batch.images[..., 0, 0, 0] == 255
    assert 0.2 < left.mean() < 0.8 and (left[:, 0] != left[:, 1]).any()
    again = preferences.make_batch(source, epoch=0, horizontal_flip=True, **settings)
    assert np.array_equal(again.images, batch.images)


@pytest.mark.parametrize("row", [{}, {"label": 2}, {"label": float("nan")}, {"image_1": "absent.png"}, {"prompt": 3}])
def test_lines_that_cannot_be_used_are_named(tmp_path, row):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    line = {"prompt": "x", "image_0": "a.png", "image_1": "a.png", "label": 1} | row if row else {"prompt": "x"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match=r"pairs\.jsonl, line 1: "):
        preferences.open_source(str(tmp_path), resolution=4)


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (DPO, {"data.source": ""}, r"data\.source=''"),
        (DPO, {"dpo.loss": "hinge"}, r"dpo\.loss 'hinge'"),
        (DPO, {"dpo.beta": 0.0}, r"dpo\.beta=0"),
        (DPO, {"dpo.label_smoothing": 0.5}, r"dpo\.label_smoothing=0\.5"),
        (DPO, {"dpo.loss": "kto", "dpo.label_smoothing": 0.1}, r"kto knows no smoothing"),
        (ONLINE, {"dpo.num_pairs": 3}, r"dpo\.num_pairs=3: expected 1 to 2"),
        (ONLINE, {"dpo.vote": "loudest"}, r"dpo\.vote 'loudest'"),
        (ONLINE, {"dpo.reference_every": -1}, r"dpo\.reference_every=-1"),
        (ONLINE, {"train.kl_budget": 1e-3}, r"train\.kl_budget=0\.001: only the ddpo"),
        (DPO, {"reward.shuffled": True}, r"reward\.shuffled: diffusion_dpo learns from no reward"),
    ],
)
def test_wrong_settings_are_refused(small_folder, settings, changes, message):
    with pytest.raises(UserError, match=message):
        build(small_config(small_folder, **{**settings, **changes}), silent)
