"""DDPO on a small model: the ratio is 1 before learning, IS equals SF there, and what is missing changes nothing."""

from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import SAMPLES, STEPS, distance, equal, finite, learn, pairs, silent, small_config

from ddpo_jax import advantages, algorithms, experts, rewards, window
from ddpo_jax.algorithms.ddpo import Scoring, importance_sampling, score_function
from ddpo_jax.algorithms.judged import Judging
from ddpo_jax.algorithms.parts import scored_rollouts
from ddpo_jax.build import build, init_state
from ddpo_jax.checkpoint import host_copy
from ddpo_jax.errors import RunStopped, UserError
from ddpo_jax.fixed_noise import evaluate
from ddpo_jax.methods import make_advantages
from ddpo_jax.types import Reward
from ddpo_jax.update import make_update, plan, summarize

GUIDANCE = 5.0
CLIP_RANGE = 5e-3
SUM = experts.make(("mine",), np.ones(1, np.float32), reduction="weighted_sum", standardise=False, gates=())
SCORING = Scoring(Judging(SUM, max_missing=0.5), advantages.whiten(), adv_clip_max=5.0)


class World(NamedTuple):
    """A run of importance sampling on stored log-probs, and a round of its samples."""

    run: Any
    start: Any  # the state before any update, on the host
    update: Any
    batch: Any

    def fresh(self):
        """A state that may be donated."""
        return self.run.layout.place(self.start)


def make_world(folder, **changes):
    run = build(small_config(folder, **{"sample.guidance_scale": GUIDANCE, **changes}), silent)
    state = init_state(run, seed=0, ema=False)
    params = run.tuning.merge(run.frozen.denoiser, state.params)
    batch, _, _ = run.algorithm.collect(params, run.frozen, run.draw(0), state.carry, jax.random.key(1))
    update = make_update(run.algorithm, run.tuning, run.tx, ema_decay=0.0, layout=run.layout)
    return World(run, host_copy(state), update, batch)


def every_step(key):
    """No window."""


def make_is(world, *, parts=None, num_updates=2, **settings):
    """Importance sampling on the parts of a run, with other settings."""
    settings = {
        "scoring": SCORING,
        "clip_range": CLIP_RANGE,
        "old_log_prob": "stored",
        "kl_weight": 0.0,
        "kl_budget": 0.0,
        "min_timestep": 0,
        "window": every_step,
    } | settings
    return importance_sampling(parts or world.run.parts, num_updates=num_updates, **settings)


def make_sf(world, **settings):
    settings = {
        "scoring": SCORING,
        "num_updates": 1,
        "kl_weight": 0.0,
        "kl_budget": 0.0,
        "min_timestep": 0,
        "window": every_step,
    } | settings
    return score_function(world.run.parts, **settings)


@pytest.fixture(scope="module")
def world(small_folder):
    return make_world(small_folder)


@pytest.fixture(scope="module")
def half(small_folder):
    """The same in bfloat16, on stored log-probs too."""
    return make_world(small_folder, **{"compute_dtype": "bfloat16", "train.old_log_prob": "stored"})


@pytest.fixture(scope="module")
def learned(world):
    """Two updates on stored log-probs."""
    return learn(world.update, world.run.algorithm, world.fresh(), world.run.frozen, world.batch)


@pytest.fixture(scope="module")
def adapted(world, small_folder):
    """Two updates of adapters with a KL penalty: the run, the parameters before, the state and history after."""
    changes = {"sample.guidance_scale": GUIDANCE, "train.lora_rank": 2, "train.kl_weight": 1.0}
    run = build(small_config(small_folder, **changes), silent)
    state = init_state(run, seed=0, ema=False)
    before = host_copy(state.params)
    update = make_update(run.algorithm, run.tuning, run.tx, ema_decay=0.0, layout=run.layout)
    # At the start the policy is that of full fine-tuning, and so its samples serve.
    return run, before, *learn(update, run.algorithm, state, run.frozen, world.batch)


def test_stored_ratio_is_1_before_the_first_update(world, learned):
    _, history = learned
    assert world.batch.trajectory.log_prob.dtype == jnp.float32
    assert history[0]["ratio_max_deviation"] <= 5e-6
    assert history[1]["ratio_max_deviation"] > 1e-4
    assert summarize(history, 0.0)["ratio_max_deviation"] == history[0]["ratio_max_deviation"]


@pytest.mark.parametrize("precision", ["world", "half"])
def test_recomputed_ratio_is_exactly_1(precision, request):
    world = request.getfixturevalue(precision)
    # Whatever the rollout stored, the recomputed log-probs take its place.
    trajectory = world.batch.trajectory
    batch = world.batch._replace(trajectory=trajectory._replace(log_prob=trajectory.log_prob + 1.0))
    # The loss is that of the stored kind, and so is its program.
    algorithm = make_is(world, old_log_prob="recompute")
    _, history = learn(world.update, algorithm, world.fresh(), world.run.frozen, batch)
    assert history[0]["ratio_max_deviation"] == 0.0
    assert history[1]["ratio_max_deviation"] > 0.0


@pytest.mark.parametrize("precision", ["world", "half"])
def test_recomputed_ratio_is_exactly_1_with_one_update_a_round(precision, request):
    world = request.getfixturevalue(precision)
    algorithm = make_is(world, old_log_prob="recompute", num_updates=1)
    assert algorithm.recompute is None  # the loss is on policy by itself; no second pass
    _, metrics = jax.jit(algorithm.loss)(
        world.fresh().params, world.run.frozen, world.batch, all_rows(world.batch), jax.random.key(0)
    )
    assert float(metrics.max["ratio_max_deviation"].max()) == 0.0


def test_default_recomputes_in_bfloat16(small_folder):
    config = small_config(small_folder, **{"compute_dtype": "bfloat16"})
    assert build(config, silent).algorithm.recompute is not None


def test_one_update_of_sf_equals_one_of_is(world):
    updates = {
        "is": world.update,
        "sf": make_update(make_sf(world), world.run.tuning, world.run.tx, ema_decay=0.0, layout=world.run.layout),
    }
    states, grads = {}, {}
    for name, update in updates.items():
        states[name], _ = learn(
            update, world.run.algorithm, world.fresh(), world.run.frozen, world.batch, num_updates=1
        )
        grads[name] = gradient(update, world, world.batch)
    assert distance(grads["sf"], grads["is"]) < 1e-5
    assert distance(states["sf"].params, states["is"].params) < 1e-5
    assert distance(states["sf"].params, world.start.params) > 1e-4


@pytest.mark.parametrize("changes", [{"train.num_updates": 2}, {"train.num_updates": 1, "train.num_inner_epochs": 2}])
def test_sf_refuses_more_than_one_update(small_folder, changes):
    with pytest.raises(UserError, match=r"one update a round.*= 2"):
        build(small_config(small_folder, **{"algorithm": "ddpo_sf", **changes}), silent)


def test_each_program_is_compiled_once(world, learned):
    learn(world.update, world.run.algorithm, world.fresh(), world.run.frozen, world.batch)
    programs = (world.update.zero, world.update.accumulate, world.update.apply)
    assert {program._cache_size() for program in programs} == {1}


def test_recompute_reaches_the_rows_of_later_passes(world):
    trajectory = world.batch.trajectory
    batch = world.batch._replace(trajectory=trajectory._replace(log_prob=trajectory.log_prob + 10.0))
    algorithm, settings = make_is(world, old_log_prob="recompute"), {"num_updates": 1, "num_inner_epochs": 3}
    _, history = learn(world.update, algorithm, world.fresh(), world.run.frozen, batch, fraction=0.5, **settings)
    assert history[0]["ratio_max_deviation"] == 0.0
    # A row that kept its log-prob alone would add 50 nats / 16 rows.
    assert all(scalars["approx_kl"] < 0.5 for scalars in history)


def test_check_stops_on_perturbed_log_probs(world, learned):
    check = world.run.algorithm.check
    check(learned[1][0])
    trajectory = world.batch.trajectory
    batch = world.batch._replace(trajectory=trajectory._replace(log_prob=trajectory.log_prob + 1e-3))
    with pytest.raises(RunStopped, match=r"train\.old_log_prob=recompute"):
        learn(world.update, world.run.algorithm, world.fresh(), world.run.frozen, batch, check=check)


def test_check_stops_on_bfloat16_rounding_beside_a_small_clip_range(half, world):
    """Of log-probs that were stored in float32: what two bfloat16 programs make of the same rows may be equal."""
    check = make_is(half, clip_range=1e-4).check
    with pytest.raises(RunStopped, match=r"train\.old_log_prob=recompute"):
        learn(half.update, half.run.algorithm, half.fresh(), half.run.frozen, world.batch, check=check)


def test_kl_budget_ends_the_run(world):
    algorithm = make_is(world, kl_budget=1e-3)
    assert algorithm.stop({"kl_reference": 2e-3}).startswith("the KL to the reference is 2.00e-03")
    assert algorithm.stop({"kl_reference": 5e-4}) is None
    assert algorithm.stop({}) is None
    assert make_is(world).stop({"kl_reference": 2e-3}) is None


def test_timestep_fraction_halves_the_rows(world):
    seen = []

    @contextmanager
    def phase(name, total):
        seen.append(total)
        yield lambda count: None

    for fraction in (1.0, 0.5):
        _, history = learn(
            world.update,
            world.run.algorithm,
            world.fresh(),
            world.run.frozen,
            world.batch,
            fraction=fraction,
            num_inner_epochs=2,
            phase=phase,
        )
        assert len(history) == 4
        assert np.isfinite([scalars["grad_norm"] for scalars in history]).all()
    assert seen == [2 * SAMPLES * STEPS // 8, SAMPLES * STEPS // 8]


def test_steps_below_min_timestep_are_not_learned_from(world):
    begins = np.asarray(world.batch.trajectory.t[0, :-1])
    for min_timestep, learned in ((begins[1], 2), (begins[1] + 1, 1), (0, STEPS)):
        slices = make_is(world, min_timestep=int(min_timestep)).slices(world.batch)
        assert slices.shape == (SAMPLES, STEPS)
        assert slices[:, :learned].all() and not slices[:, learned:].any()


def test_the_config_says_which_steps_are_not_learned_from(world, small_folder):
    begins = np.asarray(world.batch.trajectory.t[0, :-1])
    for changes in ({}, {"algorithm": "ddpo_sf", "train.num_updates": 1}):
        config = small_config(small_folder, **{"train.min_timestep": int(begins[1])}, **changes)
        assert build(config, silent).algorithm.slices(world.batch).sum() == 2 * SAMPLES


@pytest.fixture(scope="module")
def narrow(small_folder):
    """A window of the two steps in the middle, of pictures that start from the same noise."""
    return make_world(
        small_folder,
        **{"sample.window": 2, "sample.window_start": 1, "sample.shared_noise": True},
        **{"sample.num_prompts": 2, "sample.num_samples_per_prompt": 4},
    )


def test_only_the_window_is_learned_from(narrow, world):
    slices = narrow.run.algorithm.slices(narrow.batch)
    np.testing.assert_array_equal(slices, np.tile([False, True, True, False], (SAMPLES, 1)))
    np.testing.assert_array_equal(narrow.batch.trajectory.trained, slices)
    seen = []

    @contextmanager
    def phase(name, total):
        seen.append(total)
        yield lambda count: None

    for fraction in (1.0, 0.5):
        learn(
            narrow.update,
            narrow.run.algorithm,
            narrow.fresh(),
            narrow.run.frozen,
            narrow.batch,
            num_updates=1,
            fraction=fraction,
            phase=phase,
        )
    assert seen == [2 * SAMPLES // 8, SAMPLES // 8]
    assert (narrow.run.schedule.micro_batch_size, world.run.schedule.micro_batch_size) == (8, 8)
    # Until the window begins, the pictures of a draw are one.
    states = [len(np.unique(narrow.batch.trajectory.x[:4, i], axis=0)) for i in range(STEPS + 1)]
    assert states == [1, 1, 4, 4, 4]


def test_the_ratio_is_1_before_the_first_update_of_a_window(narrow):
    algorithm, frozen = narrow.run.algorithm, narrow.run.frozen
    state, history = learn(narrow.update, algorithm, narrow.fresh(), frozen, narrow.batch)
    assert history[0]["ratio_max_deviation"] <= 5e-6
    assert history[1]["ratio_max_deviation"] > 1e-4
    assert history[-1]["skipped_steps"] == 0 and finite(state.params)
    trajectory = narrow.batch.trajectory
    batch = narrow.batch._replace(trajectory=trajectory._replace(log_prob=trajectory.log_prob + 1.0))
    recomputing = make_is(narrow, old_log_prob="recompute")
    _, history = learn(narrow.update, recomputing, narrow.fresh(), frozen, batch)
    assert history[0]["ratio_max_deviation"] == 0.0


def test_a_window_that_is_drawn_moves_from_round_to_round(narrow):
    timesteps = np.asarray(narrow.batch.trajectory.t[0])
    run, learned = narrow.run, int(timesteps[2])
    algorithm = make_is(narrow, window=window.make(timesteps, size=1, start=window.ANEW, min_timestep=learned))
    places = set()
    for seed in range(6):
        batch, _, _ = algorithm.collect(
            narrow.fresh().params, run.frozen, run.draw(0), algorithm.init(None), jax.random.key(seed)
        )
        (place,) = np.unique(np.nonzero(np.asarray(batch.trajectory.trained))[1])
        places.add(int(place))
    assert places == {0, 1, 2}
    assert run.parts.sample._cache_size() == 1


def test_evaluations_draw_with_noise_at_every_step(narrow, world):
    def draw(run):
        found = evaluate(
            run.parts,
            world.fresh().params,
            run.frozen,
            run.eval_prompts["train"],
            key_data=world.start.key,
            combination=SUM,
            scale=experts.scale_told(("mine",), []),
        )
        return found.images

    np.testing.assert_array_equal(draw(narrow.run), draw(world.run))


def test_gradient_equals_that_of_one_big_batch_without_the_missing(world):
    # 7 of 8 samples: 28 rows in micro-batches of 8, the last of them filled up.
    weight = np.ones(SAMPLES, np.float32)
    weight[3] = 0
    advantage = np.array(world.batch.advantage)
    advantage[3] = np.nan
    batch = world.batch._replace(weight=weight, advantage=advantage)
    rows = all_rows(batch)
    assert len(rows) == 7 * STEPS

    def mean_loss(params, batch, rows):
        return world.run.algorithm.loss(params, world.run.frozen, batch, rows, jax.random.key(0))[0].mean()

    direct = jax.jit(jax.grad(mean_loss))(world.fresh().params, batch, rows)
    assert distance(gradient(world.update, world, batch), direct) < 5e-5  # guidance 5 magnifies rounding


def test_missing_rewards_change_nothing_for_the_others(world):
    def score(params, images, prompts):
        return np.asarray(images, np.float32)

    def collect(missing, max_missing):
        def result(images):
            scores = images.mean(axis=(1, 2, 3), dtype=np.float32)[:, None]
            scores[missing] = np.nan
            return scores

        parts = world.run.parts._replace(reward=Reward(("mine",), score, result, None))
        algorithm = make_is(world, parts=parts, scoring=SCORING._replace(judging=Judging(SUM, max_missing)))
        params, prompts = world.fresh().params, world.run.draw(0)
        return algorithm, *algorithm.collect(params, world.run.frozen, prompts, algorithm.init(None), jax.random.key(1))

    algorithm, batch, _, report = collect([2, 5], 0.25)
    assert report["reward/missing"] == 2
    others = np.delete(np.arange(SAMPLES), [2, 5])
    _, whole, _, _ = collect([], 0.0)
    assert len(np.unique(whole.advantage)) == SAMPLES
    images = np.asarray(world.run.parts.model.decode(world.run.frozen.vae, whole.trajectory.x[:, -1]))
    found = images.mean(axis=(1, 2, 3))[others]
    np.testing.assert_allclose(batch.advantage[others], (found - found.mean()) / found.std(), rtol=1e-3, atol=1e-4)
    assert (batch.weight[[2, 5]] == 0).all() and (batch.weight[others] == 1).all()
    slices = algorithm.slices(batch)
    assert not slices[[2, 5]].any() and slices[others].all()
    with pytest.raises(RunStopped, match=r"2 of 8 rewards are missing"):
        collect([2, 5], 0.2)


def test_a_scorer_that_gives_nothing_is_not_waited_for_to_the_end(world):
    waited = []

    def result(images):
        waited.append(len(images))
        return np.full((len(images), 1), np.nan, np.float32)

    reward = Reward(("mine",), lambda params, images, prompts: images, result, None, lambda pending: "no server")
    parts = world.run.parts._replace(reward=reward, chunk_size=2)
    algorithm = make_is(world, parts=parts, scoring=SCORING._replace(judging=Judging(SUM, 0.25)))
    params, prompts = world.fresh().params, world.run.draw(0)
    with pytest.raises(RunStopped, match=r"4 of 8 rewards are missing .*The last: no server"):
        algorithm.collect(params, world.run.frozen, prompts, algorithm.init(None), jax.random.key(1))
    assert waited == [2, 2]  # of four chunks


def test_shared_noise_compares_the_pictures_of_a_draw(small_folder, world):
    shared = {"sample.shared_noise": True, "per_prompt_stat_tracking.buffer_size": 0}
    config = small_config(small_folder, **{"sample.num_prompts": 2, "sample.num_samples_per_prompt": 4, **shared})
    run = build(config, silent)
    batch, _, _ = run.algorithm.collect(
        world.fresh().params, run.frozen, run.draw(0), run.algorithm.init(None), jax.random.key(1)
    )
    start, after = np.asarray(batch.trajectory.x[:, 0]), np.asarray(batch.trajectory.x[:, 1])
    assert len(np.unique(start, axis=0)) == 2 and len(np.unique(after, axis=0)) == SAMPLES
    groups = np.reshape(batch.advantage, (2, 4))
    np.testing.assert_allclose([groups.mean(axis=1), groups.std(axis=1)], [[0, 0], [1, 1]], atol=1e-3)

    for wrong, message in (
        ({"per_prompt_stat_tracking.buffer_size": 8}, "buffer_size=8 must be 0"),
        ({"sample.num_prompts": 8, "sample.num_samples_per_prompt": 1}, "a group of 1"),
    ):
        with pytest.raises(UserError, match=message):
            make_advantages(small_config(small_folder, **{**shared, **wrong}), num_prompts=3)


def test_nan_pictures_are_missing_and_never_learned_from(world):
    def sample(params, frozen, tokens, *keys):
        cond, trajectory, images = world.run.parts.sample(params, frozen, tokens, *keys)
        return cond, trajectory._replace(x=trajectory.x.at[1].set(jnp.nan)), images.at[1, 0, 0, 0].set(jnp.nan)

    reward, reward_params = rewards.make("jpeg_compressibility", rewards.Settings(deadline=60.0, num_workers=1))
    parts = world.run.parts._replace(sample=sample, reward=reward)
    algorithm = make_is(world, parts=parts)
    frozen = world.run.frozen._replace(reward=reward_params)
    batch, _, report = algorithm.collect(
        world.fresh().params, frozen, world.run.draw(0), algorithm.init(None), jax.random.key(1)
    )
    assert report["reward/missing"] == 1 and np.isfinite(report["reward/mean"])
    assert batch.weight[1] == 0 and batch.weight.sum() == SAMPLES - 1
    state, history = learn(world.update, algorithm, world.fresh(), frozen, batch)
    assert history[-1]["skipped_steps"] == 0 and np.isfinite(history[-1]["loss"])
    assert finite(state.params)


@pytest.mark.parametrize("group_size", [1, 4])
def test_chunk_size_does_not_change_pictures(world, group_size):
    prompts, params = world.run.draw(0), world.fresh().params

    def draw(size):
        images, scores, _ = scored_rollouts(
            world.run.parts._replace(chunk_size=size),
            params,
            world.run.frozen,
            prompts,
            jax.random.key(1),
            keep=lambda cond, trajectory, images: np.asarray(images),
            group_size=group_size,
        )
        return images, scores

    for found, expected in zip(draw(3), draw(SAMPLES), strict=True):
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_lora_starts_at_the_checkpoint_and_trains_adapters_only(world, adapted):
    run, before, state, history = adapted
    assert equal(run.tuning.merge(run.frozen.denoiser, before), run.frozen.denoiser)
    size = sum(leaf.size for leaf in jax.tree.leaves(before))
    assert 0 < size < 0.2 * sum(leaf.size for leaf in jax.tree.leaves(run.frozen.denoiser))
    assert {leaf for factors in before.values() for leaf in factors} == {"A", "B"}
    assert all("/attn" in name and name.endswith("kernel") for name in before)

    assert history[0]["ratio_max_deviation"] <= 5e-6
    assert history[1]["ratio_max_deviation"] > 0
    assert all(not np.array_equal(state.params[name]["B"], before[name]["B"]) for name in before)
    merged = run.tuning.merge(run.frozen.denoiser, state.params)
    moved = [not np.array_equal(a, b) for a, b in pairs(merged, run.frozen.denoiser)]
    assert sum(moved) == len(before)
    # The reference policy is what it was.
    assert equal(run.frozen.denoiser, world.run.frozen.denoiser)


def test_kl_is_0_at_the_start_and_positive_after(world, adapted):
    run, _, _, history = adapted
    assert run.algorithm.reads_reference and not world.run.algorithm.reads_reference
    assert 0.0 <= history[0]["kl_reference"] < 1e-9  # rounding, squared: two programs of the same network
    assert history[1]["kl_reference"] > 100 * history[0]["kl_reference"]


def test_a_learnable_reward_rises(world):
    reward, reward_params = rewards.make("device:scorers:redness", rewards.Settings(deadline=60.0, num_workers=1))
    parts, frozen = world.run.parts._replace(reward=reward), world.run.frozen._replace(reward=reward_params)
    algorithm = make_is(world, parts=parts)

    def score(params):
        prompts = world.run.eval_prompts["train"]
        return evaluate(
            parts._replace(chunk_size=SAMPLES),
            params,
            frozen,
            prompts,
            key_data=world.start.key,
            combination=SUM,
            scale=experts.scale_told(("mine",), []),
        ).report

    state = world.fresh()
    before = score(state.params)
    for epoch in range(25):
        batch, _, _ = algorithm.collect(
            state.params, frozen, world.run.draw(epoch), algorithm.init(None), jax.random.key(epoch)
        )
        state, _ = learn(world.update, algorithm, state, frozen, batch)
    after = score(state.params)
    assert after["reward/mean"] > before["reward/mean"] + before["reward/std"]


def test_non_finite_gradients_skip_their_step_and_are_counted(world):
    advantage = np.array(world.batch.advantage)
    advantage[4] = np.inf
    batch = world.batch._replace(advantage=advantage)
    state, history = learn(
        world.update, world.run.algorithm, world.fresh(), world.run.frozen, batch, num_updates=SAMPLES
    )
    assert [scalars["skipped_in_a_row"] for scalars in history].count(1) == 1
    assert summarize(history, 0.0)["skipped_steps"] == 1
    assert int(state.step) == SAMPLES
    assert finite(state.params) and finite(state.opt_state)


def test_a_run_stops_after_five_gradients_in_a_row_with_parameters_intact(world):
    batch = world.batch._replace(advantage=np.full(SAMPLES, np.inf, np.float32))
    state, history = learn(world.update, world.run.algorithm, world.fresh(), world.run.frozen, batch, num_updates=4)
    assert summarize(history, 0.0)["skipped_steps"] == 4
    assert equal(state.params, world.start.params)
    # The count goes on in the next round.
    with pytest.raises(RunStopped, match="5 gradients in a row were not finite"):
        learn(world.update, world.run.algorithm, state, world.run.frozen, batch, num_updates=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_range": 0.0}, r"train\.clip_range=0\.0"),
        ({"old_log_prob": "kept"}, r"train\.old_log_prob='kept'"),
    ],
)
def test_wrong_settings_are_refused(world, settings, message):
    with pytest.raises(UserError, match=message):
        make_is(world, **settings)


def test_unknown_algorithm_is_refused(world):
    with pytest.raises(UserError, match=r"expected one of 'ddpo_is', 'ddpo_sf', .*'reward_backprop'"):
        algorithms.make("ppo", world.run.parts, {})


def all_rows(batch):
    sample, step = np.nonzero(np.asarray(batch.trajectory.trained) & (np.asarray(batch.weight) > 0)[:, None])
    return np.stack([sample, step], axis=1).astype(np.int32)


def gradient(update, world, batch):
    """The mean gradient of a whole round, as one optimizer step accumulates it."""
    (micro_batches,) = plan(
        world.run.algorithm.slices(batch), np.random.default_rng(0), num_updates=1, fraction=1.0, micro_batch_size=8
    )
    params, key = world.fresh().params, jax.random.key(0)
    total = update.zero(params, world.run.frozen, batch, micro_batches[0], key)
    for micro_batch in micro_batches:
        total, _ = update.accumulate(params, world.run.frozen, batch, micro_batch, key, total)
    return jax.tree.map(lambda g: g / total.weight, total.grads)
