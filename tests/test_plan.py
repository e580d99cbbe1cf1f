"""Planning: what is counted in a program, what is predicted from it, and what the command refuses."""

from collections import Counter
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from small_run import small_config

from benchmarks import hlo, liveness, plan, predict, programs
from benchmarks.hlo import Array, Collective, Work
from benchmarks.predict import CHIPS, Chip, Compiled, Mesh, Round
from configs import base
from ddpo_jax.errors import UserError
from ddpo_jax.sharding import make_layout


def counted(fn, *inputs):
    return hlo.work(jax.jit(fn).lower(*inputs).compiler_ir("hlo").as_hlo_text()).flops


# FLOPs


def test_flops_of_products_by_hand():
    a, b = jnp.zeros((3, 5, 7)), jnp.zeros((3, 7, 2))
    assert counted(jnp.matmul, a, b) == 2 * 3 * 5 * 7 * 2
    x, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))

    def conv(x, kernel, stride=1):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=dimensions)

    assert counted(conv, x, kernel) == 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)
    strided = partial(conv, stride=2)
    forward = 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)
    assert counted(strided, x, kernel) == forward
    for argument in (0, 1):  # each gradient is as much work as the convolution
        assert counted(jax.grad(lambda *both: jnp.sum(strided(*both)), argument), x, kernel) in (forward, 2 * forward)


def test_loops_are_counted_as_often_as_they_are_run():
    def steps(x, w):
        def inner(x, _):
            return x @ w, None

        def outer(x, _):
            return jax.lax.scan(inner, x @ w, length=3)

        return jax.lax.scan(outer, x, length=5)[0]

    assert counted(steps, jnp.zeros((2, 4)), jnp.zeros((4, 4))) == 5 * (1 + 3) * 2 * 2 * 4 * 4


@pytest.mark.parametrize(
    ("family", "side", "tera"), [("sd15", 64, 0.8033), pytest.param("sdxl", 128, 6.7612, marks=pytest.mark.slow)]
)
def test_flops_of_published_networks(family, side, tera):
    """One evaluation at full size, as torch's counter has it, but for the convolutions of doubled maps."""
    config = base.get_config()
    config.sample.guidance_scale = 1.0
    config.sample.num_steps = 3
    configs, schedule = programs.read_model(config, family)
    layout = make_layout(devices=jax.devices()[:1])
    run = programs.abstract_run(config, configs, schedule, layout=layout, chunk_size=1, micro_batch_size=1)
    assert configs.unet.latent_size == side
    text = run.sample.fn.lower(*run.sample.inputs).compiler_ir("hlo").as_hlo_text()
    others = {"sd15": 2.5145 + 0.0133, "sdxl": 10.470 + 0.0133 + 0.0979}[family]  # the VAE's decoder, CLIP
    doubled = {  # side and channels after each; of their products 5 of 9 are spared
        "sd15": ((16, 1280), (32, 1280), (64, 640)),
        "sdxl": ((64, 1280), (128, 640)),
        "vae": ((2 * side, 512), (4 * side, 512), (8 * side, 256)),
    }
    spared = {
        name: sum(5 / 9 * 2 * 9 * channels**2 * side**2 for side, channels in sizes) / 1e12
        for name, sizes in doubled.items()
    }
    expected = 3 * (tera - spared[family]) + others - spared["vae"]
    assert hlo.work(text).flops / 1e12 == pytest.approx(expected, rel=2e-4)


# Collectives

GROUPS = {
    "replica_groups={{1,3},{0,2}}, use_global_device_ids=true": (0, 2),
    "replica_groups=[2,4]<=[8], dimensions={0}": (0, 1, 2, 3),
    "replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}": (0, 4),
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, to_apply=%add": (0, 4),
    "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}, dimensions={0}": (0, 1, 2, 3),
    "replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}, to_apply=%add": (0, 4),
}


@pytest.mark.parametrize("text", GROUPS)
def test_groups_in_all_ways_of_writing_them(text):
    assert hlo.group(hlo.Step("x", "all-reduce", (), f"%y), channel_id=1, {text}")) == GROUPS[text]


def test_collectives_in_a_loop_and_in_tuples():
    text = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %sum = (f32[8]{0}, /*index=1*/bf16[2,3]{1,0}) all-reduce(%x, %y), replica_groups={{0,1}}, to_apply=%add
  %moved = (f32[4]{0}, f32[4]{0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(7)
  ROOT %more = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %all = (f32[4]{0}, f32[8]{0}) all-gather-start(%a), replica_groups=[1,2]<=[2], dimensions={0}
  ROOT %loop = (s32[], f32[8]{0}) while(%init), condition=%condition, body=%body
}
"""
    found = {one.kind: one for one in hlo.work(text).collectives}
    assert found["all-reduce"] == Collective("all-reduce", (Array("f32", (8,)), Array("bf16", (2, 3))), (0, 1), 7)
    assert found["collective-permute"] == Collective("collective-permute", (Array("f32", (4,)),), (0, 1), 7)
    assert found["all-gather"] == Collective("all-gather", (Array("f32", (8,)),), (0, 1), 1)


@pytest.fixture
def no_cache():
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def test_data_parallelism_sums_each_gradient_once(small_folder, no_cache):
    """One all-reduce of the parameters' size a gradient program, and none in the optimizer's."""
    config = small_config(small_folder, **{"sample.num_steps": 2, "train.micro_batch_size": 2})
    compiled = plan.compile_all(config, programs.read_model(config), Mesh(8, 1, 1))
    configs = programs.read_model(config)[0]
    leaves = jax.tree_util.tree_leaves_with_path(programs.stored(configs, jnp.float32)["unet"])
    parameters = Counter(leaf.size for _, leaf in leaves)
    parts = parameters.copy()
    for path, leaf in leaves:
        if "upsamplers_0" in jax.tree_util.keystr(path) and leaf.ndim == 4:
            parts[leaf.size] -= 1
            parts[leaf.size * 4 // 9] += 4  # the gradients of four 2x2 kernels, which are summed after
    summed = Counter(
        int(np.prod(array.shape))  # of a kernel, in whatever order of its axes
        for one in compiled.work["accumulate"].collectives
        for array in one.result
        if one.kind == "all-reduce" and one.group == tuple(range(8))
    )
    assert not parts - summed
    fetched = sum((summed - parts).elements())  # rows, and scalars
    assert fetched < 0.2 * sum(parameters.elements())
    assert not [one for one in compiled.work["apply"].collectives if one.kind == "all-reduce"]
    assert compiled.held["parameters"] == 4 * sum(parameters.elements())
    assert compiled.held["optimizer"] == pytest.approx(2 * compiled.held["parameters"], abs=100)
    predictions = [predict.predict(compiled, config, Mesh(n, 1, 1), CHIPS["v5e"], utilisation=0.4) for n in (8, 256)]
    lines = plan.report(compiled, {"v5e": predictions}, 0.4)
    assert sum(line.startswith(f"| {n} | 0.0 | yes |") for line in lines for n in (8, 256)) == 2


# Memory


def test_bytes_that_live_at_once():
    x = jax.ShapeDtypeStruct((100, 100), jnp.float32)

    def peak(fn, *inputs, **settings):
        return liveness.peak_bytes(jax.make_jaxpr(fn)(*inputs).jaxpr, **settings) / (4 * 100 * 100)

    assert peak(lambda x: x @ x @ x @ x, x) == 2  # the product before, and the next
    assert peak(lambda x: jnp.exp(x @ x) + 1, x) == 1  # in place
    assert peak(lambda x, y: x @ x + y, x, x) == 1
    assert peak(lambda x, y: x + y @ y, x, x, donated=[True, False]) == 1
    assert peak(lambda x: jax.lax.scan(lambda c, _: (c @ x, c), x, length=10), x) == 10 + 1 + 1
    kept = peak(jax.grad(lambda x: jnp.sum(jnp.sin(jnp.sin(x @ x) @ x) @ x)), x)
    again = peak(jax.grad(jax.checkpoint(lambda x: jnp.sum(jnp.sin(jnp.sin(x @ x) @ x) @ x))), x)
    assert again <= kept + 1


@pytest.mark.parametrize(
    ("rank", "remat", "gigabytes"), [(4, "full", 3.38), pytest.param(0, "products", 7.18, marks=pytest.mark.slow)]
)
def test_activations_are_near_what_xla_takes_on_an_h100(rank, remat, gigabytes):
    """SD 1.5 in bfloat16, one row: the README's gradient program."""
    config = base.get_config()
    changes = {"compute_dtype": "bfloat16", "train.lora_rank": rank, "train.remat": remat}
    config.update_from_flattened_dict(changes)
    found = plan.activations(config, programs.read_model(config, "sd15"), "accumulate", 1)
    assert found / 1e9 == pytest.approx(gigabytes, rel=0.15)


# Predictions


def test_chips():
    assert set(CHIPS) == {"h100", "h200", "v4", "v5e", "v5p", "v6e"}
    for chip in CHIPS.values():
        assert chip.flops > 1e14 and chip.memory > 1e10 and chip.memory_bandwidth > chip.link > chip.network


def test_rings_by_hand():
    chip = Chip(1, 1, 1, link=100, node=4, network=10)
    seconds = partial(predict.ring_seconds, chip=chip)
    assert seconds("all-reduce", 800, (0,)) == 0
    assert seconds("all-reduce", 800, (0, 1, 2, 3)) == 2 * 3 / 4 * 800 / 100
    assert seconds("all-gather", 800, (0, 2)) == 1 / 2 * 800 / 100
    assert seconds("reduce-scatter", 400, (0, 2)) == 1 / 2 * 800 / 100
    # four devices a machine, two machines: each device takes a quarter across
    assert seconds("all-reduce", 800, range(8)) == pytest.approx(2 * (3 / 4 * 800 / 100 + 1 / 2 * 200 / 10))
    assert seconds("all-reduce", 800, range(0, 32, 4)) == pytest.approx(2 * 7 / 8 * 800 / 10)
    assert seconds("collective-permute", 800, (0, 1)) == 8 and seconds("collective-permute", 800, (0, 5)) == 80


def synthetic(config, mesh, *, gradient=1000, row=8):
    """A run of work in proportion to its rows, with one all-reduce of the gradient and one of the rows."""
    one = predict.cut(config, mesh, recomputes=False)
    rows, everyone = one.rows["accumulate"] * mesh.num_shards, tuple(range(0, mesh.size))
    collectives = (
        Collective("all-reduce", (Array("f32", (gradient,)),), everyone, 1),
        Collective("all-reduce", (Array("f32", (rows, row)),), everyone, 1),
    )
    work = {
        "sample": Work(10**6 * one.rows["sample"], ()),
        "accumulate": Work(10**6 * one.rows["accumulate"], collectives),
        "apply": Work(0, ()),
    }
    held = {"parameters": 400, "gradients": 400}
    return Compiled(mesh, one, work, dict.fromkeys(work, 0), held, 10, lambda name, rows: 100 * rows, False)


@pytest.fixture
def config():
    config = base.get_config()
    config.sample.num_prompts, config.sample.num_steps, config.sample.chunk_size = 64, 2, 4
    config.train.num_updates, config.train.micro_batch_size = 2, 4
    return config


CHIP = Chip(flops=1e6, memory=1e4, memory_bandwidth=1e9, link=1e5, node=8, network=1e4)


def test_a_round_is_cut_as_settings_cut_it(config):
    one = predict.cut(config, Mesh(8, 1, 1), recomputes=True)
    assert one == Round(
        {"sample": 4, "accumulate": 4, "apply": 1}, {"sample": 2, "accumulate": 2, "apply": 1}, 2, 4, 64
    )
    assert predict.cut(config, Mesh(64, 1, 1), recomputes=False).calls["accumulate"] == 1


def test_predictions_are_sensible(config):
    compiled = synthetic(config, Mesh(8, 1, 1))
    on = partial(predict.predict, compiled, config, chip=CHIP, utilisation=0.5)
    found = [on(Mesh(2**i, 1, 1)) for i in range(9)]
    assert found[0].collectives == 0
    # 64 pictures and 128 rows, 1e6 FLOPs each, at half of 1e6 a second
    assert found[0].round == pytest.approx((64 + 128) * 2)
    efficiency = [one.samples_per_second / one.devices for one in found]
    assert all(after <= before for before, after in pairwise(efficiency))
    assert efficiency[7] < 0.6 * efficiency[6]  # 64 samples on 128 devices: half of them only fill up
    assert all(after.num_bytes <= before.num_bytes for before, after in pairwise(found))
    assert all(one.fits for one in found)
    assert not predict.predict(compiled, config, Mesh(8, 1, 1), CHIP._replace(memory=500), utilisation=0.5).fits
    faster = predict.predict(compiled, config, Mesh(8, 1, 1), CHIP, utilisation=1.0)
    assert faster.sampling == found[3].sampling / 2 and faster.round < found[3].round


@pytest.mark.parametrize("data", [2, 4, 16])
def test_what_is_compiled_on_one_mesh_predicts_another(config, data):
    """Bytes and seconds of a synthetic run, scaled to a mesh and made on it."""
    scaled = predict.predict(synthetic(config, Mesh(8, 2, 1)), config, Mesh(data, 2, 1), CHIP, utilisation=0.4)
    made = predict.predict(synthetic(config, Mesh(data, 2, 1)), config, Mesh(data, 2, 1), CHIP, utilisation=0.4)
    assert scaled == pytest.approx(made)


# The command


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh=8x1"], "--mesh=8x1: expected data x fsdp x tensor, as in 8x1x1"),
        (["--mesh=8x0x1"], "--mesh=8x0x1: expected"),
        (["--mesh=1x8x1"], "expected 2 or more along data"),
        (["--mesh=8x1x1", "--chip=v9"], "--chip 'v9' is unknown: expected one of 'h100'"),
        (["--mesh=8x1x1", "--model=sd9"], "--model 'sd9' is unknown: expected one of 'sd15'"),
        (["--mesh=8x1x1", "--utilisation=2"], "--utilisation=2.0: expected more than 0, at most 1"),
        (
            ["--mesh=8x1x1", "--config.pretrained.model=a/hub-id"],
            "no such folder; --model=sd15, sd21, sdxl plans for that",
        ),
        (["--mesh=8x1x1", "--config.algorithm=sft"], "expected 'ddpo_is' or 'ddpo_sf'"),
        (["--mesh=2x1x3"], "--mesh: no parameter can be cut into tensor=3 equal parts"),
        (["--mesh=8x1x1", "--config.train.lora_ranks=4"], "did you mean --config.train.lora_rank"),
    ],
)
def test_errors_are_one_line(flags, message, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(plan.jax.config, "update", lambda *setting: None)
    assert plan.main(["--config=configs/quickstart.py", *flags]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and message in errors


def test_unknown_loops_are_refused():
    with pytest.raises(ValueError, match="whose length is not known"):
        hlo.trip_count(hlo.Step("loop", "while", (), "%x), condition=%c, body=%b"), [])
    with pytest.raises(UserError, match="expected 2 or more"):
        plan.read_mesh("1x1x1")
