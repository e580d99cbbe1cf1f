"""The suite for a GPU: its programs run on shrunk networks, traces are read right, and figures follow from seconds."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import flops, gpu_cell, gpu_results, gpu_suite, operations, programs
from benchmarks.gpu_cells import CELLS, SIZES, Cell
from benchmarks.operations import Event
from ddpo_jax import process
from ddpo_jax.errors import UserError
from ddpo_jax.sharding import make_layout

SD15 = Cell("sd15", "ddpo", "full", "cudnn", "products", 16, 32)
DPO = Cell("sd15", "dpo", "full", "cudnn", "products", 0, 32)


def tiny_run(cell):
    size = SIZES["tiny"][cell.model]
    configs, schedule = gpu_cell.model_of(size)
    layout = make_layout(devices=jax.devices()[:1])
    config = gpu_cell.config_of(cell, size)
    run = programs.abstract_run(config, configs, schedule, layout=layout, chunk_size=2, micro_batch_size=2)
    timesteps = np.asarray(process.ddim(schedule).timesteps(size.num_steps))
    return run, gpu_cell.fill(run, timesteps)


# Adapters: their optimizer is the quickest to compile.
ADAPTERS = [Cell("sdxl", "ddpo", "lora", "xla", "none", 2, 2), Cell("sd15", "dpo", "lora", "xla", "none", 0, 2)]


@pytest.mark.parametrize("cell", ADAPTERS, ids=lambda cell: f"{cell.model}-{cell.method}")
def test_random_arrays_go_through_the_programs_and_stay_finite(cell):
    run, arrays = tiny_run(cell)
    before = jax.tree.map(np.asarray, arrays.state.params)
    learned = gpu_cell.calls(cell, arrays, num_slices=SIZES["tiny"][cell.model].num_steps if cell.chunk_size else 1)
    assert list(learned) == (["sample"] if cell.chunk_size else []) + ["accumulate", "apply"]
    for name in ("accumulate", "apply"):
        call = learned[name][1]
        found = call(lambda *given, name=name: getattr(run, name).fn(*given))
    assert found["skipped_steps"] == 0 and np.isfinite(found["loss"]) and found["grad_norm"] > 0
    after = jax.tree.map(np.asarray, learned["apply"][0]()[0].params)
    changed = [not np.array_equal(*both) for both in zip(*map(jax.tree.leaves, (before, after)), strict=True)]
    assert np.mean(changed) > 0.9


def test_a_program_is_compiled_cold_and_again_from_its_cache():
    folder, told = jax.config.jax_compilation_cache_dir, []
    program = programs.Program(jax.jit(lambda x: jnp.sin(x) @ x), ())
    x = jnp.ones((8, 8))

    def listen(event, **settings):
        told.append(event.rpartition("/")[2])

    jax.monitoring.register_event_listener(listen)
    try:
        compiled, seconds = gpu_cell.compile_twice(program, [x])
    finally:
        jax.monitoring.unregister_event_listener(listen)
        gpu_cell.use_cache(folder)
    assert [event for event in told if event in ("cache_misses", "cache_hits")] == ["cache_misses", "cache_hits"]
    assert 0 < seconds["traced"] < seconds["cold"] and seconds["cached"] > 0
    figures = gpu_cell.measure_program(lambda: compiled(jnp.ones((8, 8))), compiled)
    assert figures["seconds"] > 0 and 0 <= figures["idle"] <= 1
    assert sum(figures["operations"].values()) > 0 == figures["operations"]["attention"]


def test_a_cell_is_measured_on_its_own_device_alone():
    cpu = jax.devices()[0]
    gpu_cell.check_device(cpu, "tiny", None)
    gpu_cell.check_device(cpu, "tiny", cpu.device_kind)
    with pytest.raises(UserError, match="no GPU here"):
        gpu_cell.check_device(cpu, "full", None)
    with pytest.raises(UserError, match="the folder's figures are of NVIDIA H200"):
        gpu_cell.check_device(cpu, "tiny", "NVIDIA H200")


@pytest.mark.slow
def test_a_cell_is_measured_to_its_end():
    kept = []
    cell = Cell("sd15", "ddpo", "lora", "xla", "none", 2, 2)
    folder = jax.config.jax_compilation_cache_dir
    try:
        found = gpu_cell.measure(cell, SIZES["tiny"]["sd15"], lambda found: kept.append(json.dumps(found)))
    finally:
        gpu_cell.use_cache(folder)
    assert found["status"] == "measured" and list(found["programs"]) == ["sample", "accumulate", "apply"]
    assert all(figures["seconds"] > 0 and figures["temporary"] > 0 for figures in found["programs"].values())
    assert len(kept) == 6 and gpu_results.timed(found) == 3


def test_a_cell_that_there_is_no_memory_for_says_so(monkeypatch):
    def filled(*inputs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr(gpu_cell.programs, "abstract_run", lambda *given, **settings: None)
    monkeypatch.setattr(gpu_cell, "fill", filled)
    found = gpu_cell.measure(CELLS["tiny"][0], SIZES["tiny"]["sd15"], lambda found: None)
    assert (found["status"], found["why"], found["programs"]) == ("out of memory", "the run's arrays", {})


@pytest.mark.slow
def test_a_pairs_flops_are_those_of_four_forwards_and_their_gradients():
    size = SIZES["tiny"]["sd15"]
    model = gpu_cell.model_of(size)

    def row(cell):
        config = gpu_cell.config_of(cell._replace(attention="xla"), size)
        config.sample.guidance_scale = 1.0
        return flops.work(config, model).row

    # a row of DDPO: a forward with its gradients, 3 in all; a pair: two of them, and two forwards of the reference
    assert row(DPO) == pytest.approx(8 / 3 * row(SD15), rel=0.05)


# Traces


def test_kinds_of_operations():
    text = """
%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %dot.1 = f32[2]{0} dot(%p, %p), lhs_contracting_dims={}
}
%moved (q: f32[2]) -> f32[2] {
  %q = f32[2]{0} parameter(0)
  ROOT %t = f32[2]{0} transpose(%q), dimensions={0}
}
ENTRY %main (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  %fusion.1 = f32[2]{0} fusion(%a), kind=kLoop, calls=%fused
  %fusion.2 = f32[2]{0} fusion(%a), kind=kLoop, calls=%moved
  %add.1 = f32[2]{0} add(%a, %a)
  %dot.2 = f32[2]{0} dot(%a, %a), metadata={op_name="jit(f)/unet/attn1/vmap(BTNH,BSNH->BNTS)/dot_general"}
  %dot.3 = f32[2]{0} dot(%a, %a), metadata={op_name="jit(f)/unet/attn1/to_q/dot_general"}
  %conv.1 = f32[2]{0} custom-call(%a), custom_call_target="__cudnn$convForward"
  %gemm.1 = f32[2]{0} custom-call(%a), custom_call_target="__cublas$lt$matmul"
  ROOT %fmha.1 = f32[2]{0} custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax"
}
"""
    kinds = operations.kinds_of(text)
    expected = {
        "fusion.1": "matmul",
        "fusion.2": "copies",
        "add.1": "elementwise",
        "dot.2": "attention",
        "dot.3": "matmul",
        "conv.1": "convolution",
        "gemm.1": "matmul",
        "fmha.1": "attention",
    }
    assert expected.items() <= kinds.items()


def test_the_device_is_busy_where_an_operation_is():
    events = [
        Event("while.3", 0, 9e9),  # only holds the others
        Event("a", 1e9, 2e9),
        Event("b_2", 2e9, 2e9),
        Event("sm90_xmma_fprop_implicit_gemm", 6e9, 1e9),
    ]
    found = operations.summarize(events, [{"a": "matmul", "b.2": "copies"}])
    assert found.busy == pytest.approx(4)
    assert found.seconds == {"convolution": 1, "matmul": 2, "attention": 0, "elementwise": 0, "copies": 2}
    assert operations.summarize([], []).busy is None


def test_of_a_gpu_its_streams_are_read():
    def line(name, *events):
        return SimpleNamespace(name=name, events=events)

    def event(name, **stats):
        return SimpleNamespace(name=name, stats=stats.items(), start_ns=0, duration_ns=1)

    host = SimpleNamespace(name="/host:CPU", lines=[line("python", event("x", hlo_op="x"))])
    device = SimpleNamespace(
        name="/device:GPU:0",
        lines=[line("Stream #1(Compute)", event("kernel", hlo_op="fusion"), event("Memcpy")), line("XLA", event("y"))],
    )
    assert [found.name for found in operations.read(SimpleNamespace(planes=[host, device]))] == ["fusion", "Memcpy"]
    assert [found.name for found in operations.read(SimpleNamespace(planes=[host]))] == ["x"]


# Figures


def program(seconds, cold=20.0):
    return {
        "compile": {"traced": 1.0, "cold": cold, "cached": 2.0},
        "temporary": 10**9,
        "seconds": seconds,
        "idle": 0.1,
        "operations": dict.fromkeys(operations.KINDS, 1.0),
    }


def measured(cell, **seconds):
    programs = {name: program(spent) for name, spent in seconds.items()}
    found = {"status": "measured", "device": "NVIDIA H200", "peak": 40 * 10**9, "programs": programs}
    return cell._asdict() | found


@pytest.fixture
def results():
    lora = SD15._replace(trains="lora", remat="blocks")
    return {
        "sizes": "full",
        "flops": {"sd15-ddpo-full": {"rollout": 80 * 10**12, "row": 5 * 10**12}},
        "cells": {
            SD15.name: measured(SD15, sample=4.0, accumulate=0.32, apply=0.064),
            DPO.name: measured(DPO, accumulate=0.5, apply=0.2048),
            lora.name: lora._asdict() | {"status": "out of memory", "why": "accumulate", "programs": {}},
        },
    }


def test_rates_by_hand(results):
    name = SD15.name
    assert gpu_results.rollout(name, results) == 16 / 4
    # 50 rows a sample, 32 at a time; 64 samples share an optimizer step
    assert gpu_results.update(name, results) == pytest.approx(1 / (50 * 0.32 / 32 + 0.064 / 64))
    assert gpu_results.end_to_end(name, results) == pytest.approx(1 / (0.25 + 0.501))
    assert gpu_results.recomputed(name, results) == pytest.approx(1 / (0.25 + 2 * 0.5 + 0.001))
    assert gpu_results.pairs(DPO.name, results) == pytest.approx(1 / (0.5 / 32 + 0.2048 / 2048))
    assert gpu_results.mfu(name, results, "rollout") == pytest.approx(16 * 80 / 4 / 989)
    assert gpu_results.mfu(name, results, "row") == pytest.approx(32 * 5 / 0.32 / 989)
    assert gpu_results.mfu(DPO.name, results, "row") is None  # not counted
    assert gpu_results.cold(name, results) == 60 and gpu_results.cold(DPO.name, results) is None


def test_the_tables(results, tmp_path):
    gpu_results.write(tmp_path, results)
    assert gpu_results.read(tmp_path, "full") == results
    with pytest.raises(SystemExit, match="its figures are of --sizes=full; give another folder"):
        gpu_results.read(tmp_path, "tiny")
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert f"| rollout, images/s | 0.678 | 4 | 5.9 | {SD15.name} |" in lines
    assert f"| cold compile, s | 1.5 | 60 | 90 | {SD15.name} |" in lines
    assert "| update with LoRA, samples/s | – | – | 2.65 | – |" in lines
    assert any(line.endswith("| out of memory | accumulate |") for line in lines)
    assert any(line.startswith(f"| {SD15.name} | 4 | 32% | 10% | 2 |") for line in lines)


def test_what_a_cell_has_measured_is_kept_when_it_is_cut_off_or_dies(results, tmp_path, monkeypatch, capsys):
    def run(command, *, timeout, **settings):
        job = json.loads(command[-1])
        cell = Cell(*job["cell"])
        if cell == CELLS["tiny"][0]:
            (gpu_suite.Path(job["path"])).write_text(
                json.dumps({"device": "cpu", "programs": {"sample": program(1.0)}})
            )
            raise gpu_suite.subprocess.TimeoutExpired(command, timeout)
        if cell == CELLS["tiny"][1]:
            raise gpu_suite.subprocess.CalledProcessError(-11, command)
        (gpu_suite.Path(job["path"])).write_text(json.dumps({"status": "skipped", "why": "no such kernel"}))

    monkeypatch.setattr(gpu_suite.subprocess, "run", run)
    monkeypatch.setattr(gpu_suite, "count_flops", lambda cells, sizes, known: [])
    output = [f"--output={tmp_path}", "--sizes=tiny"]
    gpu_suite.main([*output, "--budget_seconds=0"])
    assert {cell["status"] for cell in gpu_results.read(tmp_path, "tiny")["cells"].values()} == {"skipped"}
    gpu_suite.main(output)
    first, second, third, _ = gpu_results.read(tmp_path, "tiny")["cells"].values()
    assert first["status"] == "cut off" and first["programs"]["sample"]["seconds"] == 1.0
    assert (second["status"], second["why"]) == ("failed", "exit status -11; its message is above")
    assert (third["status"], third["why"]) == ("skipped", "no such kernel")
    gpu_suite.main([*output, "--budget_seconds=0"])
    assert gpu_results.read(tmp_path, "tiny")["cells"][CELLS["tiny"][0].name] == first
    with pytest.raises(SystemExit, match="--cells=sd9: expected one of sd15-ddpo-full"):
        gpu_suite.main([*output, "--cells=sd9"])
