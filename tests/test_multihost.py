"""Several processes of one run: how they find each other, that they end as one does, and that none waits for ever."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from small_run import SMALL, distance, equal

from ddpo_jax import metrics, multihost
from ddpo_jax.errors import UserError
from ddpo_jax.main import main

ROOT = Path(__file__).parents[1]
PATIENCE = 60  # seconds in which all processes are to end once one cannot go on


def flags(folder, workdir, **changes):
    settings = {
        "pretrained.model": folder,
        "num_epochs": 1,
        "checkpoint_every": 1,
        "eval_every": 0,
        "compilation_cache": "",
        **SMALL,
        "mesh.data": -1,
        "train.learning_rate": 2e-4,
        "reward.name": "device:scorers:redness",
        **changes,
    }
    return [
        f"--config={ROOT / 'configs' / 'base.py'}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Processes:
    """One run in several processes, with their devices simulated."""

    def __init__(self, cache, arguments, *, count=2, devices=2, program=("-m", "ddpo_jax.main")):
        port, kept = free_port(), re.sub(r"--xla_force_host\S+", "", os.environ["XLA_FLAGS"])
        self.all = []
        for i in range(count):
            several = {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(i),
            }
            environ = {
                **os.environ,
                "XLA_FLAGS": f"{kept} --xla_force_host_platform_device_count={devices}",
                "PYTHONPATH": str(ROOT / "tests"),
                "JAX_COMPILATION_CACHE_DIR": str(cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                **(several if count > 1 else {}),
            }
            command = [sys.executable, *program, *arguments]
            self.all.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )

    def wait(self, timeout):
        """The exit status and the output of each."""
        begin = time.monotonic()
        try:
            outputs = [p.communicate(timeout=max(1, begin + timeout - time.monotonic()))[0] for p in self.all]
        finally:
            for process in self.all:
                process.kill()
        return [process.returncode for process in self.all], outputs


def wait_for_rounds(processes, workdir, count):
    deadline = time.monotonic() + 240
    while len(metrics.read(workdir / "metrics.jsonl")) < count:
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes.all):
            for process in processes.all:
                process.kill()
            pytest.fail("\n".join(processes.wait(10)[1]))
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))


def last_checkpoint(workdir):
    """The newest checkpoint's step, and its arrays as numpy, whatever devices it was saved from."""
    folder = (workdir / "checkpoints").absolute()
    with ocp.CheckpointManager(folder, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        step = manager.latest_step()
        tree = manager.item_metadata(step).tree
        restore_args = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return step, manager.restore(step, args=ocp.args.PyTreeRestore(item=tree, restore_args=restore_args))


def trained(cache, folder, workdir, *, num_epochs, count=2, devices=2, **changes):
    """The training state that a run of several processes ends with."""
    arguments = flags(folder, workdir, num_epochs=num_epochs, **changes)
    statuses, outputs = Processes(cache, arguments, count=count, devices=devices).wait(400)
    assert set(statuses) == {0}, "\n".join(outputs)
    step, state = last_checkpoint(workdir)
    assert step == num_epochs
    return state


def one_process(folder, workdir, *, num_epochs, **changes):
    assert main(flags(folder, workdir, num_epochs=num_epochs, **{"mesh.data": 1, **changes})) == 0
    step, state = last_checkpoint(workdir)
    assert step == num_epochs
    return state


def test_one_signal_stops_all_and_another_mesh_goes_on(small_folder, test_cache, tmp_path):
    """Here one process does, on two devices. Pictures are scored where they are; all else is of the whole round."""
    lora = {"train.lora_rank": 2, "reward.name": "scorers:brightness"}
    workdir, straight = tmp_path / "run", tmp_path / "straight"
    processes = Processes(test_cache, flags(small_folder, workdir, num_epochs=1000, **lora))
    wait_for_rounds(processes, workdir, 2)
    processes.all[1].send_signal(signal.SIGTERM)
    statuses, outputs = processes.wait(PATIENCE)
    assert statuses == [75, 75], "\n".join(outputs)
    assert all("continues from the last whole round" in output for output in outputs)
    step, _ = last_checkpoint(workdir)
    assert step >= 1  # a round is told of just before it is kept

    lora["num_epochs"] = step + 2
    expected = one_process(small_folder, straight, **lora)
    continued = one_process(small_folder, workdir, **{"mesh.fsdp": 2, **lora})
    assert distance(continued["params"], expected["params"]) <= 1e-5
    rows = [metrics.read(folder / "metrics.jsonl") for folder in (straight, workdir)]
    assert {len(told) for told in rows} == {step + 2}  # of two processes one told
    for one, other in zip(*rows, strict=True):
        np.testing.assert_allclose(other["reward/mean"], one["reward/mean"], rtol=1e-5)


@pytest.mark.slow
def test_killed_at_any_moment(small_folder, test_cache, tmp_path):
    """One process is; the other sees that it is gone."""
    two, cut = {"count": 2, "devices": 1}, {"mesh.fsdp": 2}
    processes = Processes(test_cache, flags(small_folder, tmp_path / "killed", num_epochs=1000, **cut), **two)
    wait_for_rounds(processes, tmp_path / "killed", 3)
    random.choice(processes.all).kill()
    statuses, outputs = processes.wait(PATIENCE)
    assert 0 not in statuses, "\n".join(outputs)
    step, _ = last_checkpoint(tmp_path / "killed")
    found, expected = (
        trained(test_cache, small_folder, tmp_path / name, num_epochs=step + 2, **two, **cut)
        for name in ("killed", "straight")
    )
    assert equal(found, expected)
    alone = one_process(small_folder, tmp_path / "alone", num_epochs=step + 2)
    assert distance(alone["params"], expected["params"]) <= 1e-5


@pytest.mark.parametrize(
    ("reward", "cause"),
    [
        ("raising", "process 1: reward scorers:raising_on_one raised OSError: the scorer's disk is full"),
        pytest.param(
            "hanging",
            "process 1: reward scorers:hanging_on_one gave no scores within 5 s",
            marks=pytest.mark.slow,
        ),
        pytest.param("nothing", "4 of 8 rewards are missing", marks=pytest.mark.slow),
    ],
)
def test_a_reward_that_fails_on_one_process_stops_all(small_folder, test_cache, tmp_path, reward, cause):
    settings = {"train.lora_rank": 2, "reward.name": f"scorers:{reward}_on_one", "reward.deadline": 5}
    statuses, outputs = Processes(test_cache, flags(small_folder, tmp_path / "run", **settings)).wait(2 * PATIENCE)
    assert statuses == [3, 3]
    assert all(cause in output for output in outputs)


ROUNDS = """
import sys
import jax
from small_run import silent, small_config
from ddpo_jax import multihost
from ddpo_jax.build import build
multihost.initialize({})
folder, source, cache = sys.argv[1:]
data = {"data.source": source, "data.cache": cache, "data.batch_size": 8}
changes = {"algorithm": "sft", "mesh.data": -1, "reward.name": "device:scorers:redness", **data}
run = build(small_config(folder, **changes), silent)
for epoch in (0, 1, 2, 0):
    inputs = run.draw(epoch)
    batch, _, _ = run.algorithm.collect(None, run.frozen, inputs, (), jax.random.key(epoch))
    x_0 = multihost.to_host(batch.x_0)[:8].astype(float)
    print("round", epoch, len(inputs[0].missing), abs(x_0).sum(), (x_0**3).sum(), flush=True)
multihost.leave(0, seconds=60)
"""


STOPPED = """
import os, sys, time
import jax
from jax.sharding import PartitionSpec
from ddpo_jax import multihost, train
from ddpo_jax.errors import Preempted
from ddpo_jax.main import main

def stopped(*arguments, **keywords):
    mesh = jax.make_mesh((8,), ("data",))

    def sums(x, y):
        def step(carry, _):
            return jax.tree.map(lambda leaf: leaf / 8, jax.lax.psum(carry, "data")), None
        return jax.lax.scan(step, (x, y), None, length=3_000)[0]

    whole = PartitionSpec()
    many = jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False))
    under_way = many(jax.numpy.ones(128), jax.numpy.ones(()))  # is held, as the update holds its gradients
    print("under way:", not under_way[0].is_ready(), flush=True)
    raise Preempted("stopped")

train.optimize, multihost.SETTLING = stopped, 100  # on a busy machine
leave_now = os._exit

def leave_later(status):
    time.sleep(2 * (jax.process_index() == 0))
    leave_now(status)

os._exit = leave_later
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_none_leaves_while_a_program_of_all_is_under_way(small_folder, test_cache, tmp_path):
    """What the first waits for from the second would never come."""
    arguments = flags(small_folder, tmp_path / "run")
    program = Processes(test_cache, arguments, devices=4, program=("-c", STOPPED))
    statuses, outputs = program.wait(2 * PATIENCE)
    assert statuses == [75, 75], "\n".join(outputs)
    assert all("under way: True" in output for output in outputs)


@pytest.mark.slow
def test_two_processes_fill_one_cache_of_latents(small_folder, test_cache, tmp_path):
    """Each keeps what its own devices encoded; then all is there for both, and for one process alone."""
    for i in range(9):
        pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) for i in range(9)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    arguments = [str(path) for path in (small_folder, tmp_path, tmp_path / "cache")]
    told = []
    for count in (2, 1):
        statuses, outputs = Processes(test_cache, arguments, count=count, devices=1, program=("-c", ROUNDS)).wait(200)
        assert set(statuses) == {0}, "\n".join(outputs)
        told += [[line.split()[1:] for line in output.splitlines() if line[:5] == "round"] for output in outputs]
    first, second, alone = told
    assert first == second
    missing = [[int(count) for _, count, *_ in rounds] for rounds in (first, alone)]
    assert missing[0][0] == 8 and missing[0][2:] == [0, 0] and missing[1] == [0, 0, 0, 0]
    assert [numbers for _, _, *numbers in alone] == [numbers for _, _, *numbers in first]


def test_a_fault_of_one_process_alone_ends_all(small_folder, test_cache, tmp_path):
    """The others wait for it somewhere else, and it for none of them."""
    settings = {"algorithm": "sft", "data.source": "scorers:unreadable_on_one", "data.batch_size": 8, "eval_prompts": 4}
    arguments = flags(small_folder, tmp_path / "run", **settings)
    statuses, outputs = Processes(test_cache, arguments).wait(2 * PATIENCE)
    assert statuses[1] in (2, 3) and statuses[0] != 0
    assert "picture 7 cannot be read" in outputs[1]


@pytest.mark.slow
def test_a_signal_to_a_process_that_is_alone_in_its_cluster(small_folder, test_cache, tmp_path):
    """JAX takes over its SIGTERM all the same."""
    workdir = tmp_path / "run"
    alone = "import jax, sys; from ddpo_jax.main import main; jax.distributed.initialize('127.0.0.1:{}', 1, 0); {}"
    code = alone.format(free_port(), "sys.exit(main(sys.argv[1:]))")
    arguments = flags(small_folder, workdir, num_epochs=1000, **{"mesh.data": 1})
    processes = Processes(test_cache, arguments, count=1, devices=1, program=["-c", code])
    wait_for_rounds(processes, workdir, 2)
    processes.all[0].send_signal(signal.SIGTERM)
    statuses, outputs = processes.wait(PATIENCE)
    assert statuses == [75], outputs
    assert last_checkpoint(workdir)[0] >= 1  # a round is told of just before it is kept


# Finding each other


def test_one_process_waits_for_nobody():
    multihost.initialize({}, {})
    multihost.initialize({}, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"})  # a shell in an allocation
    multihost.initialize({"coordinator_address": "nowhere:1", "num_processes": "1", "process_id": "0"}, {})
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2"}, "Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, "TPU"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod, of no indexed job
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, None),  # nothing to ask for the others
    ],
)
def test_clusters_are_known_by_their_variables(environment, expected):
    assert multihost.find_cluster(environment) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator_address": "a:1"}, "--num_processes is missing; give all of"),
        ({"coordinator_address": "a:1", "num_processes": "two", "process_id": "0"}, "--num_processes=two .*whole numb"),
        ({"coordinator_address": "a:1", "num_processes": "2", "process_id": "2"}, "--process_id=2: expected 1 process"),
        ({"coordinator_address": "a", "num_processes": "2", "process_id": "1"}, "=a: expected HOST:PORT"),
    ],
)
def test_wrong_flags(given, message):
    with pytest.raises(UserError, match=message):
        multihost.initialize(given, {})
    with pytest.raises(UserError, match=message):
        multihost.initialize({}, {multihost.VARIABLES[name]: value for name, value in given.items()})


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}, list(range(8))),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "2"}, [0, 1]),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_GPUS_ON_NODE": "8"}, None),  # a task a GPU
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),
        ({}, None),
    ],
)
def test_one_task_a_node_takes_all_its_gpus(environment, expected):
    assert multihost.devices_of_a_task(environment) == expected
