"""Supervised fine-tuning on a small model: the loss falls, dropped captions train the unconditional branch."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from small_run import equal, learn, silent, small_config

from ddpo_jax.build import build, init_state
from ddpo_jax.errors import UserError
from ddpo_jax.update import make_update

SFT = {
    "algorithm": "sft",
    "data.source": "scorers:colored",
    "data.batch_size": 12,  # not a multiple of chunk_size
    "train.num_noise_draws": 2,
    "data.prompt_dropout": 0.5,
    "train.learning_rate": 3e-3,
}


@pytest.fixture(scope="module")
def run(small_folder):
    return build(small_config(small_folder, **SFT), silent)


@pytest.fixture(scope="module")
def batch(run):
    return collect(run, epoch=0)


def collect(run, *, epoch):
    batch, _, report = run.algorithm.collect(None, run.frozen, run.draw(epoch), (), jax.random.key(epoch))
    assert report == {"captions/cut": 0}
    return batch


def test_a_batch_is_every_image_once(run, batch):
    images, prompts = run.draw(0)
    assert images.shape == (12, 1, 16, 16, 3) and prompts.texts[:3] == ("red", "green", "blue")
    assert batch.x_0.shape == (12, 4, 4, 4)
    slices = run.algorithm.slices(batch)
    assert slices.shape == (12, 2) and slices.all()


def test_a_batch_is_pure_in_seed_and_epoch(run, batch):
    assert equal(collect(run, epoch=0), batch)
    assert not equal(collect(run, epoch=1), batch)
    assert np.array_equal(run.draw(3)[0], run.draw(3)[0])
    assert not np.array_equal(run.draw(3)[0], run.draw(4)[0])


def test_dropped_captions_are_those_of_the_empty_prompt(run, batch):
    tokens = run.draw(0)[1].tokens
    texts = np.asarray(jax.jit(run.parts.model.encode_text)(run.frozen.text, tokens).context)
    empty = np.asarray(run.frozen.uncond.context)[0]
    near = {
        "text": [np.allclose(row, text, atol=1e-5) for row, text in zip(batch.cond.context, texts, strict=True)],
        "empty": [np.array_equal(row, empty) for row in np.asarray(batch.cond.context)],
    }
    assert all(a != b for a, b in zip(near["text"], near["empty"], strict=True))
    assert 2 <= sum(near["empty"]) <= 10


def test_the_loss_falls(run):
    state = init_state(run, seed=0, ema=True)
    update = make_update(run.algorithm, run.tuning, run.tx, ema_decay=0.9, layout=run.layout)
    losses = []
    for epoch in range(40):
        batch = collect(run, epoch=epoch)
        state, history = learn(update, run.algorithm, state, run.frozen, batch)
        losses += [scalars["loss"] for scalars in history]
        assert history[0]["denoising_mse"] == pytest.approx(history[0]["loss"])
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:4])
    # The running average lags behind the parameters, and is not them.
    assert not equal(state.ema, state.params)


def test_a_folder_is_a_source(run, small_folder, tmp_path):
    rows = []
    for i, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (20, 16 + i), color).save(tmp_path / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"a {color} field"})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder_run = build(small_config(small_folder, **{**SFT, "data.source": str(tmp_path)}), silent)
    images, prompts = folder_run.draw(0)
    assert images.shape == (12, 1, 16, 16, 3)
    assert sorted(prompts.texts) == sorted(4 * [row["text"] for row in rows])
    for image, text in zip(images, prompts.texts, strict=True):
        strongest = ("red", "green", "blue").index(text.split()[1])
        assert image[..., strongest].mean() > 100 and image.sum() == pytest.approx(image[..., strongest].sum())
    # The same shapes as any other source: the same program.
    batch, _, _ = run.algorithm.collect(None, run.frozen, (images, prompts), (), jax.random.key(0))
    assert np.isfinite(batch.x_0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.source": ""}, r"data\.source=''"),
        ({"data.source": "scorers:nothing"}, r"scorers:nothing"),
        ({"data.prompt_dropout": 1.5}, r"data\.prompt_dropout=1\.5"),
        ({"train.num_noise_draws": 0}, r"train\.num_noise_draws=0"),
    ],
)
def test_wrong_settings_are_refused(small_folder, changes, message):
    with pytest.raises(UserError, match=message):
        build(small_config(small_folder, **{**SFT, **changes}), silent)
