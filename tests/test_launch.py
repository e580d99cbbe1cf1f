"""The files of launch/, as far as one machine without a cluster can tell."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kubernetes_validate import validate
from test_multihost import flags, last_checkpoint

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
JOBSETS = sorted(LAUNCH.glob("jobset_*.yaml"))
COMMAND = ["python", "-m", "ddpo_jax.main"]

# Two tasks on one machine, with the variables that Slurm gives them.
SRUN = """#!/bin/bash
[[ $1 == --kill-on-bad-exit=0 ]] && shift
export SLURM_JOB_ID={job} SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1
export SLURM_STEP_TASKS_PER_NODE=2
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit $status
"""


def test_everything_is_checked():
    assert {path.name for path in [*SCRIPTS, *JOBSETS]} | {"skypilot.yaml", "README.md"} == {
        path.name for path in LAUNCH.iterdir()
    }
    assert len(SCRIPTS) == len(JOBSETS) == 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    subprocess.run([Path(sys.executable).with_name("shellcheck"), script], check=True)


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_jobsets_fit_the_schema(path):
    """The jobs inside are plain Kubernetes ones; what is around them is JobSet's."""
    jobset = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"].keys() <= {"network", "failurePolicy", "replicatedJobs"}
    (job,) = jobset["spec"]["replicatedJobs"]
    assert job.keys() == {"name", "replicas", "template"}
    validate({"apiVersion": "batch/v1", "kind": "Job", **job["template"]}, "1.31", strict=True)
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["parallelism"] == spec["completions"] and container["command"] == COMMAND
    config = next(argument.removeprefix("--config=") for argument in container["args"] if "--config=" in argument)
    assert (ROOT / config).is_file()
    environment = {entry["name"]: entry.get("value") for entry in container.get("env", ())}
    if environment:
        name, job_name = jobset["metadata"]["name"], job["name"]
        assert environment["JAX_COORDINATOR_ADDRESS"] == f"{name}-{job_name}-0-0.{name}:12355"
        assert environment["JAX_NUM_PROCESSES"] == str(spec["completions"])
    else:
        rows, columns = map(
            int, spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
        )
        assert rows * columns == spec["completions"] * container["resources"]["limits"]["google.com/tpu"]


def test_the_skypilot_task():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
    assert task.keys() == {"name", "num_nodes", "resources", "envs", "workdir", "volumes", "setup", "run"}
    assert (ROOT / task["envs"]["CONFIG"]).is_file()
    script = task["run"].replace(".venv/bin/python", "echo")
    found = subprocess.run(
        [
            "bash",
            "-euc",
            script.replace("exec echo", "echo $JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID"),
        ],
        env={
            **os.environ,
            **task["envs"],
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": "1",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.startswith("10.0.0.1:12355 2 1 -m ddpo_jax.main --config=configs/sdxl.py --workdir=/runs/sdxl")


def tool(folder, name, text):
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


def slurm(tmp_path, *arguments, srun, cache=""):
    """The batch script with these arguments, `srun` and an scontrol that keeps what it is told."""
    tool(tmp_path, "srun", srun)
    tool(tmp_path, "scontrol", f'#!/bin/bash\necho "$@" >> {tmp_path / "scontrol.log"}\n')
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "VENV": sys.prefix,
        "SLURM_JOB_ID": "1234",
        "PYTHONPATH": str(ROOT / "tests"),
        "XLA_FLAGS": re.sub(r"device_count=8", "device_count=4", os.environ["XLA_FLAGS"]),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = ["bash", LAUNCH / "slurm.sbatch", *arguments]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    log = tmp_path / "scontrol.log"
    return found, log.read_text() if log.exists() else ""


def test_two_tasks_of_a_slurm_job_are_one_run(small_folder, test_cache, tmp_path):
    same_programs = {"train.lora_rank": 2, "reward.name": "scorers:brightness"}  # as in test_multihost.py
    config, *others = flags(small_folder, tmp_path / "run", **same_programs)
    srun = SRUN.format(job=os.getpid() % 4096)
    found, log = slurm(tmp_path, config.removeprefix("--config="), *others, srun=srun, cache=test_cache)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "mesh data 8 x fsdp 1 x tensor 1, 8 cpu devices" in found.stdout and not log
    assert last_checkpoint(tmp_path / "run")[0] == 1


@pytest.mark.parametrize(("status", "expected"), [(75, "requeue 1234\n"), (3, ""), (0, "")])
def test_a_run_that_was_asked_to_stop_is_queued_again(tmp_path, status, expected):
    found, log = slurm(tmp_path, "configs/sdxl.py", srun=f"#!/bin/bash\nexit {status}\n")
    assert (found.returncode, log) == (status, expected)


def test_a_slurm_job_without_a_config_says_how(tmp_path):
    found, _ = slurm(tmp_path, srun="#!/bin/bash\n")
    assert found.returncode != 0 and "usage: sbatch" in found.stderr


def test_a_tpu_pod_gets_the_command_as_it_was_typed(tmp_path):
    tool(tmp_path, "gcloud", "#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    arguments = ["pod", "us-central2-b", "configs/sdxl.py", "--workdir=/mnt/a b", "--config.prompts.list=('a fox',)"]
    command = [LAUNCH / "tpu_pod.sh", *arguments]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert found[:6] == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=us-central2-b"] and "--worker=all" in found
    (remote,) = (line.removeprefix("--command=") for line in found if line.startswith("--command="))
    typed = subprocess.run(
        ["bash", "-c", remote.split("&& exec ")[1].replace(".venv/bin/python", "printf '%s\\n'", 1)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert typed.stdout.splitlines() == ["-m", "ddpo_jax.main", "--config=configs/sdxl.py", *arguments[3:]]
