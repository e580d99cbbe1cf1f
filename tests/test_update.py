"""Who is learned from when: every row once a pass, whole samples a step, fillers that weigh nothing."""

import numpy as np
import pytest

from ddpo_jax.update import plan, summarize

SLICES = np.ones((10, 6), bool)
SLICES[3] = False  # a missing reward
SLICES[:, 5] = False  # a deterministic last step
SLICES[7, 2] = False


def steps_of(seed=0, slices=SLICES, **settings):
    settings = {"num_updates": 3, "fraction": 1.0, "micro_batch_size": 7} | settings
    return list(plan(slices, np.random.default_rng(seed), **settings))


def real_rows(step):
    return [tuple(row) for micro_batch in step for row in micro_batch.rows[micro_batch.weight > 0].tolist()]


def test_every_row_comes_exactly_once_a_pass():
    rows = [row for step in steps_of() for row in real_rows(step)]
    assert sorted(rows) == [tuple(row) for row in np.argwhere(SLICES).tolist()]


def test_a_step_covers_whole_samples():
    samples = [{sample for sample, _ in real_rows(step)} for step in steps_of()]
    assert sum(len(some) for some in samples) == len(set.union(*samples)) == 9
    # Ten samples in three steps: 4, 3, 3, one of them missing.
    assert sorted(len(some) for some in samples) in ([2, 3, 4], [3, 3, 3])


def test_fillers_weigh_nothing_and_only_end_a_step():
    for step in steps_of():
        assert {micro_batch.rows.shape for micro_batch in step} == {(7, 2)}
        weight = np.concatenate([micro_batch.weight for micro_batch in step])
        count = len(real_rows(step))
        assert (weight[:count] == 1).all() and (weight[count:] == 0).all()
        assert 0 <= len(weight) - count < 7
        rows = np.concatenate([micro_batch.rows for micro_batch in step])
        assert SLICES[rows[:, 0], rows[:, 1]].all()  # fillers too: what is missing may be NaN


def test_micro_batch_size_does_not_change_who_is_in_a_step():
    assert [sorted(real_rows(step)) for step in steps_of(micro_batch_size=1)] == [
        sorted(real_rows(step)) for step in steps_of(micro_batch_size=64)
    ]


def test_plan_is_pure_in_its_seed():
    def flat(seed):
        return [row for step in steps_of(seed) for row in real_rows(step)]

    assert flat(1) == flat(1) != flat(2)


@pytest.mark.parametrize(("fraction", "taken"), [(0.5, 3), (0.01, 1), (1.0, 6)])
def test_fraction_of_each_sample(fraction, taken):
    steps = steps_of(slices=np.ones((10, 6), bool), fraction=fraction)
    samples = [sample for step in steps for sample, _ in real_rows(step)]
    assert np.bincount(samples).tolist() == [taken] * 10
    assert len({row for step in steps for row in real_rows(step)}) == 10 * taken


def test_fraction_is_of_what_a_sample_has():
    rows = [row for step in steps_of(fraction=0.5) for row in real_rows(step)]
    taken = np.bincount([sample for sample, _ in rows], minlength=10)
    assert taken.tolist() == [2, 2, 2, 0, 2, 2, 2, 2, 2, 2]  # half of 5 is 2, of 4 too
    assert all(SLICES[row] for row in rows)


def test_samples_take_their_slices_independently():
    steps = steps_of(slices=np.ones((200, 4), bool), fraction=0.5)
    chosen = np.bincount([piece for step in steps for _, piece in real_rows(step)], minlength=4)
    assert chosen.sum() == 400 and chosen.min() > 70


def test_a_step_without_rows_is_left_out():
    slices = np.zeros((4, 3), bool)
    slices[2] = True
    assert [len(real_rows(step)) for step in steps_of(slices=slices, num_updates=4)] == [3]
    assert steps_of(slices=np.zeros((4, 3), bool)) == []


def scalars(loss, *, in_a_row=0.0, skipped=0.0, deviation=0.0):
    return {
        "loss": loss,
        "ratio_max_deviation": deviation,
        "skipped_in_a_row": in_a_row,
        "skipped_steps": skipped,
    }


def test_summary_of_a_round():
    history = [scalars(1.0, deviation=0.25, skipped=2.0), scalars(3.0, deviation=0.5, skipped=2.0)]
    assert summarize(history, 2.0) == {"loss": 2.0, "ratio_max_deviation": 0.25, "skipped_steps": 0.0}


def test_summary_leaves_skipped_updates_out():
    history = [scalars(1.0), scalars(float("nan"), in_a_row=1.0, skipped=1.0), scalars(2.0, skipped=1.0)]
    report = summarize(history, 0.0)
    assert report["loss"] == 1.5 and report["skipped_steps"] == 1.0


def test_summary_of_a_round_without_updates():
    assert summarize([], 5.0) == {"skipped_steps": 0.0}
