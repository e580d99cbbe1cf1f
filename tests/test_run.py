"""Whole runs: killed, asked to stop, continued, refused; and what is left of those that never began."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import scorers
from small_run import SMALL

from ddpo_jax import metrics
from ddpo_jax.errors import Preempted
from ddpo_jax.main import main, preemptible
from ddpo_jax.workdir import claim

ROOT = Path(__file__).parents[1]
NUM_EPOCHS = 24  # so many that a signal after nine of them comes before the end
EVAL_EVERY = 5
# Rewards whose running statistics are in the checkpoints; what evaluations are measured by is in evaluations.jsonl.
EXPERTS = {
    "reward.name": "scorers:brightness,device:scorers:redness",
    "reward.standardise": True,
    "reward.combine": "minimum",
    "reward.gates": "('scorers:brightness>=0.1',)",
}


def flags(folder, workdir, **changes):
    """The arguments of a run on the small folder."""
    settings = {
        "pretrained.model": folder,
        "num_epochs": NUM_EPOCHS,
        "checkpoint_every": 2,
        "eval_every": EVAL_EVERY,
        "compilation_cache": "",
        **SMALL,
        **changes,
    }
    return [
        f"--config={ROOT / 'configs' / 'base.py'}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]


def start(cache, *arguments):
    """The same in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "tests"),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "ddpo_jax.main", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_rounds(process, workdir, count):
    """Waits until metrics.jsonl tells of that many rounds, and a moment longer."""
    deadline = time.monotonic() + 120
    while len(metrics.read(workdir / "metrics.jsonl")) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.1))


def rows_without_times(workdir):
    rows = metrics.read(workdir / "metrics.jsonl")
    return [{name: x for name, x in row.items() if "second" not in name} for row in rows]


def last_checkpoint(workdir):
    with ocp.CheckpointManager((workdir / "checkpoints").absolute()) as manager:
        step = manager.latest_step()
        return step, manager.restore(step, args=ocp.args.StandardRestore())


def evaluated(workdir):
    return [(row["epoch"], row["prompts"]) for row in metrics.read(workdir / "evaluations.jsonl")]


def evaluations_of(num_epochs):
    return [(epoch, "train") for epoch in (*range(0, num_epochs, EVAL_EVERY), num_epochs)]


@pytest.fixture(scope="module")
def finished(small_folder, tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("run") / "finished"
    assert main(flags(small_folder, workdir, **EXPERTS)) == 0
    return workdir


def test_a_run_leaves_metrics_pictures_checkpoints_and_an_export(finished):
    rows = metrics.read(finished / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == list(range(NUM_EPOCHS))
    assert rows[-1]["step"] == 2 * NUM_EPOCHS
    wanted = "reward/mean reward/std reward/missing approx_kl clip_fraction ratio_max_deviation loss grad_norm"
    assert {*wanted.split(), "skipped_steps", "images_per_second", "seconds/rollout"} <= rows[0].keys()
    assert rows[0]["ratio_max_deviation"] <= 5e-6
    assert evaluated(finished) == evaluations_of(NUM_EPOCHS)
    assert len(list((finished / "images").glob("train_*.png"))) == len(evaluations_of(NUM_EPOCHS))
    assert last_checkpoint(finished)[0] == NUM_EPOCHS
    assert (finished / "export" / "model_index.json").is_file() and (finished / "export" / "README.md").is_file()
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert f"{NUM_EPOCHS} of {NUM_EPOCHS}" in page and f"after {NUM_EPOCHS} rounds" in page and "refresh" not in page
    reward = "min(z(scorers:brightness), z(device:scorers:redness)), gated by scorers:brightness&gt;=0.1"
    assert reward in page.replace("<wbr>", "")
    (start,) = metrics.read(finished / "starts.jsonl")
    assert start["epoch"] == 0 and f"--config.num_epochs={NUM_EPOCHS}" in start["command"]


def test_killed_stopped_and_continued_is_as_if_nothing_had_been(finished, small_folder, test_cache, tmp_path):
    workdir = tmp_path / "run"
    arguments = flags(small_folder, workdir, **EXPERTS)
    process = start(test_cache, *arguments)
    wait_for_rounds(process, workdir, random.randint(1, 8))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    process = start(test_cache, *arguments)
    wait_for_rounds(process, workdir, 9)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert errors.count("\n") == 1 and "continues from the last whole round" in errors
    # The last whole round was saved, whatever checkpoint_every is; it may be told of before it counts as whole.
    saved, told = last_checkpoint(workdir)[0], len(metrics.read(workdir / "metrics.jsonl"))
    assert saved in (told, told - 1) and saved >= 8

    assert main(arguments) == 0
    assert rows_without_times(workdir) == rows_without_times(finished)
    name = "evaluations.jsonl"
    assert metrics.read(workdir / name) == metrics.read(finished / name)
    assert len(metrics.read(workdir / "starts.jsonl")) == 3
    weights = Path("export") / "unet" / "diffusion_pytorch_model.safetensors"
    assert (workdir / weights).read_bytes() == (finished / weights).read_bytes()
    (step, state), (expected_step, expected) = last_checkpoint(workdir), last_checkpoint(finished)
    assert step == expected_step
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("num_epochs", [NUM_EPOCHS, 3])
def test_a_finished_run_does_nothing_more(finished, small_folder, num_epochs):
    before = [(finished / name).read_text() for name in ("metrics.jsonl", "evaluations.jsonl")]
    assert main(flags(small_folder, finished, num_epochs=num_epochs, **EXPERTS)) == 0
    assert [(finished / name).read_text() for name in ("metrics.jsonl", "evaluations.jsonl")] == before


def test_a_finished_run_goes_on_when_it_may_last_longer(finished, small_folder, capsys):
    before = metrics.read(finished / "metrics.jsonl")
    assert main(flags(small_folder, finished, num_epochs=NUM_EPOCHS + 1, **EXPERTS)) == 0
    rows = metrics.read(finished / "metrics.jsonl")
    assert rows[:-1] == before and rows[-1]["epoch"] == NUM_EPOCHS
    assert evaluated(finished) == evaluations_of(NUM_EPOCHS + 1)
    assert last_checkpoint(finished)[0] == NUM_EPOCHS + 1
    *_, last_line = capsys.readouterr().out.splitlines()
    assert all(part in last_line for part in (" s in all: ", "update ", "evaluations ", "compiling was "))


def test_another_config_is_refused(finished, small_folder, capsys):
    assert main(flags(small_folder, finished, **EXPERTS, **{"train.learning_rate": 0.5, "seed": 3})) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "seed: 0 there, 3 now; train.learning_rate: 0.001 there, 0.5 now" in errors


def test_a_second_run_in_the_same_workdir_is_refused(small_folder, tmp_path, capsys):
    with claim(tmp_path / "run", {}):
        assert main(flags(small_folder, tmp_path / "run")) == 2
    assert "another run is in it" in capsys.readouterr().err


def test_a_kl_budget_ends_the_run_for_good(small_folder, tmp_path, capsys):
    changes = {"train.lora_rank": 2, "train.kl_weight": 1.0, "train.kl_budget": 1e-12}
    for _ in range(2):
        assert main(flags(small_folder, tmp_path / "run", **changes)) == 0
        assert "the run ends here: the KL to the reference" in capsys.readouterr().out
        assert [row["epoch"] for row in metrics.read(tmp_path / "run" / "metrics.jsonl")] == [0]
        assert evaluated(tmp_path / "run") == [(0, "train"), (1, "train")]
    assert last_checkpoint(tmp_path / "run")[0] == 1


def test_a_scorer_that_fails_later_leaves_the_last_whole_round(small_folder, tmp_path, capsys):
    scorers.CALLS_LEFT[0] = 5  # the probe, the first evaluation, three rounds
    changes = {"reward.name": "scorers:raising_later", "checkpoint_every": 10}
    assert main(flags(small_folder, tmp_path / "run", **changes)) == 3
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "raised OSError: the scorer's disk is full" in errors
    assert last_checkpoint(tmp_path / "run")[0] == 3
    assert len(metrics.read(tmp_path / "run" / "metrics.jsonl")) == 3
    assert not (tmp_path / "run" / "export").exists()
    assert f"3 of {NUM_EPOCHS}" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def empty_prompts(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n \n")
    return {"prompts.name": tmp_path / "prompts.txt"}


def latin_prompts(folder, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("a fox\nun écureuil\n".encode("latin-1"))
    return {"prompts.name": tmp_path / "prompts.txt"}


def truncated_model(folder, tmp_path):
    broken = tmp_path / "model"
    for path in folder.rglob("*"):
        if path.is_file():
            copy = broken / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes()
            copy.write_bytes(data[: len(data) // 2] if path.parent.name == "vae" and path.suffix != ".json" else data)
    return {"pretrained.model": broken}


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"reward.name": "scorers:wrong_shape"}, 2, "must return shape (2,), one number a picture, not shape (2, 3)"),
        ({"reward.name": "scorers:raising"}, 3, "scorers:raising raised OSError: the scorer's disk is full"),
        ({"reward.name": "scorers:hanging", "reward.deadline": 0.5}, 3, "gave no scores within 0.5 s"),
        ({"train.learnin_rate": 1}, 2, "did you mean --config.train.learning_rate?"),
        ({"sample.num_steps": "many"}, 2, "many"),
        ({"sample.eta": 0.0}, 2, "sample.eta=0"),
        ({"train.clip_range": float("nan")}, 2, "train.clip_range=nan: expected a finite number"),
        ({"train.adam_weight_decay": -5.0}, 2, "train.adam_weight_decay=-5.0: expected 0 or more"),
        ({"train.min_timestep": 900}, 2, "train.min_timestep=900: expected at most"),
        ({"sample.window": 5}, 2, "sample.window=5: expected 0 (off) to 4"),
        ({"sample.window": 1, "algorithm": "rwr"}, 2, "sample.window=1: only the ddpo algorithms know it"),
        ({"train.min_timestep": -1}, 2, "train.min_timestep=-1: expected 0 or more"),
        (empty_prompts, 2, "no prompt in it"),
        (latin_prompts, 2, "line 2 is not UTF-8"),
        (truncated_model, 2, "not a whole safetensors file"),
        ({"pretrained.model": "/nowhere/model"}, 2, "no such folder"),
        (
            {"reward.name": "clip_score", "reward.clip_model": "/nowhere/clip"},
            2,
            "reward.clip_model='/nowhere/clip': no",
        ),
        ({"reward.name": "clip_score"}, 2, "reward.clip_model='': expected a CLIP"),
        ({"reward.weights": (0.0,)}, 2, "expected 1 numbers, not all 0"),
        ({"reward.weights": ("much",)}, 2, "reward.weights=('much',): expected 1 numbers"),
        ({"train.lora_rank": 2, "train.lora_targets": "nothing"}, 2, "matches no kernel"),
        ({"algorithm": "sft", "data.source": "scorers:nothing"}, 2, "scorers:nothing"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_errors_are_one_line_and_leave_nothing(changes, code, message, small_folder, tmp_path, capsys):
    changes = changes if isinstance(changes, dict) else changes(small_folder, tmp_path)
    begin = time.monotonic()
    assert main(flags(small_folder, tmp_path / "runs" / "run", **changes)) == code
    assert time.monotonic() - begin < 30
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and message in errors
    assert not (tmp_path / "runs").exists()


def test_a_workdir_that_cannot_be_written_is_an_error(small_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")  # root may write anywhere, but not below a file
    assert main(flags(small_folder, tmp_path / "file" / "run")) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_missing_config_file_is_an_error(tmp_path, capsys):
    assert main([f"--config={tmp_path / 'none.py'}", f"--workdir={tmp_path / 'run'}"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "none.py: no such file" in errors
    assert list(tmp_path.iterdir()) == []


def test_errors_reach_the_shell(test_cache, tmp_path):
    process = start(test_cache, f"--config={tmp_path / 'none.py'}")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and errors.startswith("error: ") and errors.count("\n") == 1


def test_a_signal_inside_a_destructor_is_not_lost():
    """Python drops what a handler raises there; the next call of the watch raises it again."""
    seen = []

    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    sys.unraisablehook, hook = seen.append, sys.unraisablehook
    try:
        with preemptible() as watch:
            watch()
            del_me = Dying()
            del del_me
            with pytest.raises(Preempted):
                watch()
    finally:
        sys.unraisablehook = hook
    assert len(seen) == 1 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
