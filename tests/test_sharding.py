"""One mesh for everything: where arrays are put, and that no result depends on it."""

import re
from contextlib import contextmanager, nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small_run import compiled, distance, passing, silent, small_config

from ddpo_jax.algorithms.parts import chunks
from ddpo_jax.build import build, init_state
from ddpo_jax.errors import UserError
from ddpo_jax.models import stable_diffusion, winograd
from ddpo_jax.sharding import bytes_held, make_layout, spec
from ddpo_jax.update import MicroBatch, make_update, optimize

NUM_EPOCHS = 2


def mesh(data, fsdp, tensor):
    return {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}


# The table


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("mid_block/attentions_0/transformer_blocks_0/attn1/to_q/kernel", (16, 32), P("fsdp", "tensor")),
        ("mid_block/attentions_0/transformer_blocks_0/attn2/to_out_0/kernel", (32, 16), P("tensor", "fsdp")),
        ("x/ff/net_0/proj/kernel", (16, 128), P("fsdp", "tensor")),
        ("x/ff/net_0/proj/bias", (128,), P("tensor")),
        ("x/ff/net_2/kernel", (64, 16), P("tensor", "fsdp")),
        ("x/attn1/to_q/kernel/A", (16, 4), P("fsdp")),  # an adapter's factors follow their kernel
        ("x/attn1/to_q/kernel/B", (4, 32), P("fsdp", "tensor")),
        ("1/0/mu/x/attn1/to_q/kernel", (16, 32), P("fsdp", "tensor")),  # so do moments
        ("conv_in/kernel", (3, 3, 4, 320), P(None, None, None, "fsdp")),  # the largest dimension
        ("conv_out/bias", (3,), P()),  # nothing is cut unevenly
        ("count", (), P()),
        ("x/attn1/to_q/kernel", (16, 15), P("fsdp")),
    ],
)
def test_what_is_cut(path, shape, expected):
    assert spec(path, shape, {"fsdp": 4, "tensor": 2}) == expected


def test_an_axis_of_one_device_cuts_nothing():
    assert spec("x/attn1/to_q/kernel", (16, 32), {"fsdp": 1, "tensor": 1}) == P()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"mesh\.data=3, .* cannot be filled by 8|uses 3"),
        ({"data": 16}, r"mesh\.data=16, mesh\.fsdp=1, mesh\.tensor=1: cannot be filled by 8 devices"),
        ({"data": -1, "fsdp": 3}, r"cannot be filled by 8 devices"),
        ({"data": -1, "fsdp": -1}, r"-1 at most once"),
        ({"fsdp": 0}, r"mesh\.fsdp=0"),
        ({"tensor": -2}, r"mesh\.tensor=-2"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    if sizes == {"data": 3}:
        assert "3 cpu devices of 8; mesh.data=-1 would use them all" in make_layout(**sizes).told
        return
    with pytest.raises(UserError, match=message):
        make_layout(**sizes)


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(-1, 1, 1), (-1, 2, 2), (2, -1, 1), (1, 1, 8)])
def test_one_size_fills(data, fsdp, tensor):
    layout = make_layout(data=data, fsdp=fsdp, tensor=tensor)
    assert layout.num_devices == 8 and layout.num_shards == 8 // tensor


# Batches


@pytest.mark.parametrize(("count", "size", "num_shards"), [(8, 3, 1), (13, 2, 4), (64, 4, 8), (5, 8, 8)])
def test_chunks_are_each_sample_once_and_in_order_on_the_devices(count, size, num_shards):
    calls = chunks(count, size=size, num_shards=num_shards)
    assert {len(index) for index in calls} == {size * num_shards}
    everything = np.concatenate(calls)
    np.testing.assert_array_equal(np.sort(everything), np.arange(len(everything)))
    layout = make_layout(data=num_shards, devices=jax.devices()[:num_shards])
    cut = jax.jit(layout.rows)
    joined = layout.concatenate(*({"i": cut(jnp.asarray(index))} for index in calls))["i"]
    np.testing.assert_array_equal(joined, np.arange(len(everything)))
    assert (len(joined.sharding.device_set) == num_shards and not joined.is_fully_replicated) or num_shards == 1


# Runs


class Trained:
    """A run of NUM_EPOCHS rounds, and what was seen of it."""

    def __init__(self, folder, **changes):
        changes = {"reward.name": "device:scorers:redness", "train.num_inner_epochs": 2} | changes
        config = small_config(folder, **changes)
        self.run = run = build(config, silent)
        self.state = state = init_state(run, seed=0, ema=config.train.ema_decay > 0)
        self.start = jax.tree.map(np.array, state.params)
        update = make_update(run.algorithm, run.tuning, run.tx, ema_decay=config.train.ema_decay, layout=run.layout)
        self.programs, self.rewards = [], []
        with compiled() as told:
            for epoch in range(NUM_EPOCHS):
                key = jax.random.fold_in(jax.random.key(3), epoch)
                self.batch, carry, report = run.algorithm.collect(
                    state.params, run.frozen, run.draw(epoch), state.carry, key
                )
                state, self.history = optimize(
                    update,
                    run.algorithm,
                    state._replace(carry=carry),
                    run.frozen,
                    self.batch,
                    key,
                    schedule=run.schedule,
                    seed=(0, epoch),
                    phase=silent,
                    check=passing,
                )
                self.rewards.append(report.get("reward/mean", self.history[0].get("reward/mean", 0.0)))
                programs = (update.zero, update.accumulate, update.apply, run.parts.sample)
                self.programs.append([program._cache_size() for program in programs])
        self.update, self.state = update, state
        self.compiled = [one for one in told if one[0] in ("jit(accumulate)", "jit(apply)")]


SETTINGS = {
    "full": {},
    "lora": {"train.lora_rank": 2},
    "diffusion_dpo": {
        "algorithm": "diffusion_dpo",
        "data.source": "scorers:red_or_blue",
        "data.batch_size": 12,
        "dpo.beta": 100.0,
    },
    "online_dpo": {
        "algorithm": "online_dpo",
        "sample.num_prompts": 3,
        "sample.num_samples_per_prompt": 4,
        "dpo.beta": 100.0,
        "dpo.reference_every": 1,
        "train.lora_rank": 2,
    },
    "rwr": {"algorithm": "rwr", "rwr.temperature": 0.05, "sample.guidance_scale": 2.0},
    "reward_backprop": {"algorithm": "reward_backprop", "backprop.min_steps": 0, "backprop.max_steps": 2},
    "recompute": {"train.old_log_prob": "recompute", "train.timestep_fraction": 0.7, "train.num_updates": 3},
}


@contextmanager
def fewer_products():
    """3x3 convolutions by Winograd's filtering, of a small model's few channels too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "CHANNELS", 1)
        stable_diffusion._function.cache_clear()
        yield
    stable_diffusion._function.cache_clear()


@pytest.fixture(scope="module")
def trained(small_folder):
    done = {}

    def train(tuning, sizes):
        if (tuning, sizes) not in done:
            with fewer_products() if tuning == "recompute" else nullcontext():
                done[tuning, sizes] = Trained(small_folder, **SETTINGS[tuning], **mesh(*sizes))
        return done[tuning, sizes]

    return train


on_meshes = pytest.mark.parametrize(
    ("tuning", "sizes"),
    [
        *(("full", (8, 1, 1)), ("lora", (2, 2, 2))),
        *(pytest.param("full", sizes, marks=pytest.mark.slow) for sizes in ((2, 4, 1), (2, 2, 2))),
    ],
)


@on_meshes
def test_every_mesh_trains_the_same(trained, tuning, sizes):
    one, many = trained(tuning, (1, 1, 1)), trained(tuning, sizes)
    assert distance(one.state.params, one.start) > 1e-4  # something was learned
    assert distance(many.state.params, one.state.params) <= 1e-5
    np.testing.assert_allclose(many.rewards, one.rewards, rtol=1e-5)
    assert many.history[0]["ratio_max_deviation"] <= 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["diffusion_dpo", "reward_backprop", "online_dpo", "rwr"])
def test_every_method_is_the_same_on_a_mesh(trained, method):
    one, many = trained(method, (1, 1, 1)), trained(method, (2, 2, 2))
    assert distance(one.state.params, one.start) > 1e-4
    assert distance(many.state.params, one.state.params) <= 1e-5
    np.testing.assert_allclose(many.rewards, one.rewards, rtol=1e-5)
    assert many.programs[0] == many.programs[1]


@on_meshes
def test_nothing_is_compiled_after_the_first_round(trained, tuning, sizes):
    """The optimizer's program once, on a thread, beside the gradient's."""
    run = trained(tuning, sizes)
    first, *later = run.programs
    assert first == [1, 1, 1, 1] and all(programs == first for programs in later)
    assert sorted(run.compiled) == [("jit(accumulate)", True), ("jit(apply)", False)]


def test_log_probs_are_recomputed_on_a_mesh(trained):
    many = trained("recompute", (2, 2, 2))
    assert distance(many.state.params, many.start) > 1e-4
    assert many.programs[0] == [1, 1, 1, 1] and many.programs[1] == many.programs[0]
    assert many.history[0]["ratio_max_deviation"] == 0
    assert distance(many.state.params, trained("recompute", (1, 1, 1)).state.params) <= 1e-5


def test_fsdp_cuts_the_training_state(tmp_path):
    """Of the embedded model, as it is born and as an update leaves it."""
    held = {}
    for sizes in ((1, 1, 1), (1, 8, 1)):
        run = build(small_config("tiny", **{"sample.num_steps": 4, **mesh(*sizes)}), silent)
        state = init_state(run, seed=0, ema=False)
        held[sizes] = bytes_held((state.params, state.opt_state))
    assert held[1, 8, 1] <= held[1, 1, 1] / 7


def test_an_update_leaves_its_state_where_it_was(trained):
    for tuning in ("recompute", "lora"):
        one = trained(tuning, (2, 2, 2))
        born = init_state(one.run, seed=0, ema=False)
        same = jax.tree.map(
            lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim),
            (one.state.params, one.state.opt_state),
            (born.params, born.opt_state),
        )
        assert all(jax.tree.leaves(same))


def collectives(trained, kind):
    """The shapes of the results of collectives of a kind in the compiled gradient program."""
    run = trained.run
    size = run.schedule.micro_batch_size
    micro_batch = MicroBatch(np.zeros((size, 2), np.int32), np.ones(size, np.float32))
    arguments = (trained.state.params, run.frozen, trained.batch, micro_batch, jax.random.key(0))
    total = trained.update.zero(*arguments)
    text = trained.update.accumulate.lower(*arguments, total).compile().as_text()
    found = re.findall(rf"= (.*?) {kind}(?:-start)?\(", text)
    return [tuple(map(int, shape.split(","))) for line in found for shape in re.findall(r"\w+\[([\d,]+)\]", line)]


def test_data_parallelism_gathers_no_parameters(trained):
    """Each device has them whole; only gradients are summed, and rows fetched. Under fsdp they are gathered."""
    whole, cut = trained("full", (8, 1, 1)), trained("recompute", (2, 2, 2))
    shapes = {leaf.shape for leaf in jax.tree.leaves(whole.state.params) if leaf.ndim > 1}
    assert not shapes & set(collectives(whole, "all-gather"))
    assert shapes & set(collectives(cut, "all-gather"))
