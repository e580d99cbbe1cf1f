"""Whole runs of every family on small folders: trained, exported, sampled; what the commands refuse."""

import json
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from safetensors.numpy import load_file
from small import FAMILIES, write_folder
from small_run import SMALL, equal

from ddpo_jax import export, metrics, sample
from ddpo_jax.diffusers_folder import LORA_WEIGHTS
from ddpo_jax.main import main
from ddpo_jax.models.folder import write_json

ROOT = Path(__file__).parents[1]
NUM_EPOCHS, SAVED = 24, 12  # and the checkpoint before the last
# Attention alone moves little in so small a network of random weights.
LORA_TARGETS = r"(attn[12]/to_\w+|ff/net_\w+(/proj)?|resnets_\d/conv\d)/kernel$"
TUNINGS = {
    "full": {"train.ema_decay": 0.5},
    "lora": {"train.lora_rank": 4, "train.learning_rate": 3e-3, "train.lora_targets": LORA_TARGETS},
}
# Every tuning, 1.x and XL; the other pairs are slow.
PAIRS = pytest.mark.parametrize(
    ("family", "tuning"),
    [
        *(("1", "full"), ("xl", "lora")),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("1", "lora"), ("2", "full"), ("2", "lora"), ("xl", "full"))
        ),
    ],
)
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: write_folder(tmp_path_factory.mktemp("model") / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    """The workdir of a finished run, by family and tuning; each is run once."""
    done = {}

    def run(family, tuning):
        if (family, tuning) not in done:
            done[family, tuning] = tmp_path_factory.mktemp("runs") / f"{family}-{tuning}"
            assert main(flags(folders[family], done[family, tuning], tuning)) == 0
        return done[family, tuning]

    return run


def flags(folder, workdir, tuning, **changes):
    settings = {
        "pretrained.model": folder,
        "num_epochs": NUM_EPOCHS,
        "checkpoint_every": SAVED,
        "eval_every": 0,
        "compilation_cache": "",
        **SMALL,
        "reward.name": "device:scorers:redness",
        "eval_prompts": 8,
        "sample.num_prompts": 32,
        "sample.guidance_scale": 3.0,
        "sample.decode_chunk_size": 5,
        **TUNINGS[tuning],
        **changes,
    }
    arguments = [f"--config.{name}={value}" for name, value in settings.items()]
    return [f"--config={ROOT / 'configs' / 'base.py'}", f"--workdir={workdir}", *arguments]


@PAIRS
def test_the_reward_rises(runs, family, tuning):
    workdir = runs(family, tuning)
    rows = metrics.read(workdir / "metrics.jsonl")
    assert max(row["ratio_max_deviation"] for row in rows) < 1e-4 and not any(row["skipped_steps"] for row in rows)
    before, after = metrics.read(workdir / "evaluations.jsonl")  # at fixed noise
    gains = np.subtract(after["rewards"], before["rewards"]) / before["reward/std"]
    assert gains.mean() > max(0.15, 2 * gains.std() / np.sqrt(len(gains)))


def run_sample(capsys, output, *arguments, **flags):
    """The exit status, what was said, and the pictures."""
    given = [f"--{name}={value}" for name, value in {"output": output, "compilation_cache": "", **flags}.items()]
    status = sample.main([*arguments, *given])
    said = capsys.readouterr()
    pictures = sorted(path for path in Path(output).glob("*.png") if path.stem.isdigit())
    return status, said, [np.asarray(Image.open(path)) for path in pictures]


@PAIRS
def test_a_checkpoint_and_its_export_draw_the_same(runs, folders, family, tuning, tmp_path, capsys):
    """The newest checkpoint, as itself and as the folder that the run exported, at the same noise."""
    workdir = runs(family, tuning)
    settings = {"prompt": "a fox", "num_images": 3, "seed": 5, "num_steps": 4, "guidance_scale": 3.0, "eta": 1.0}
    drawn = {}
    for name, model in {"run": workdir, "export": workdir / "export", "source": folders[family]}.items():
        status, _, drawn[name] = run_sample(capsys, tmp_path / name, model=model, **settings)
        assert status == 0 and len(drawn[name]) == 3
    np.testing.assert_allclose(np.stack(drawn["run"]), np.stack(drawn["export"]), atol=1)
    assert np.abs(np.stack(drawn["run"]).astype(int) - np.stack(drawn["source"])).max() > 3


@PAIRS
def test_export_of_a_saved_step(runs, family, tuning, tmp_path, capsys):
    """The last step is what the run itself exported, to the bit; the one before is another."""
    workdir = runs(family, tuning)
    exported = load_file(workdir / "export" / UNET_WEIGHTS)
    for step, same in ((NUM_EPOCHS, True), (SAVED, False)):
        to = tmp_path / str(step)
        assert export.main([f"--checkpoint={workdir / 'checkpoints' / str(step)}", f"--to={to}"]) == 0
        assert f"round {step} of {workdir}, float32" in capsys.readouterr().out
        found = load_file(to / UNET_WEIGHTS)
        assert all(np.array_equal(found[name], exported[name]) for name in exported) == same
        card = (to / "README.md").read_text()
        assert (to / LORA_WEIGHTS).is_file() == (LORA_WEIGHTS in card) == (tuning == "lora")
        assert f"| epochs | {step} |" in card and FAMILIES[family].pipeline in card
    assert (to / "model_index.json").read_text() == (workdir / "export" / "model_index.json").read_text()


def test_export_in_half_precision(runs, tmp_path):
    workdir = runs("xl", "lora")
    assert export.main([f"--checkpoint={workdir}", f"--to={tmp_path / 'half'}", "--dtype=float16"]) == 0
    exact = load_file(workdir / "export" / UNET_WEIGHTS)
    for name, tensor in load_file(tmp_path / "half" / UNET_WEIGHTS).items():
        np.testing.assert_array_equal(tensor, exact[name].astype(np.float16))
    adapters = load_file(tmp_path / "half" / LORA_WEIGHTS).values()
    assert {str(x.dtype) for x in adapters} == {"float16"}


def test_sample_writes_pictures_and_what_they_were_made_of(folders, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("an owl\na fox\n")
    settings = {"model": folders["1"], "num_steps": 3, "num_images": 2, "seed": 3}
    status, said, pictures = run_sample(
        capsys, tmp_path / "out", "--prompt=a dog", "--prompt=", prompts=prompts, chunk_size=3, **settings
    )
    assert status == 0 and "8 pictures of 16 pixels" in said.out
    assert [picture.shape for picture in pictures] == [(16, 16, 3)] * 8
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["a dog"] * 2 + [""] * 2 + ["an owl"] * 2 + ["a fox"] * 2
    assert [row["file_name"] for row in rows] == [f"{i:05d}.png" for i in range(8)]
    assert {(row["seed"], row["num_steps"], row["eta"], row["guidance_scale"]) for row in rows} == {(3, 3, 0.0, 5.0)}
    assert (tmp_path / "out" / "grid.png").is_file()
    assert not list((tmp_path / "out").glob("*.new"))

    # Alone, in a program of another size, a picture is the same; by another seed it is not.
    _, _, alone = run_sample(capsys, tmp_path / "alone", "--prompt=a dog", **settings | {"num_images": 1})
    np.testing.assert_allclose(alone[0], pictures[0], atol=1)
    _, _, other = run_sample(capsys, tmp_path / "other", "--prompt=a dog", **settings | {"seed": 4})
    assert np.abs(other[0].astype(int) - pictures[0]).max() > 10


def test_eta_makes_the_sampler_stochastic(folders, tmp_path, capsys):
    """The same start leads elsewhere; to the same place, where nothing is drawn anew."""
    drawn = [
        run_sample(capsys, tmp_path / str(i), "--prompt=a dog", model=folders["2"], num_steps=4, eta=eta)[2][0]
        for i, eta in enumerate((0.0, 0.0, 1.0))
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0].astype(int) - drawn[2]).max() > 10


def test_a_run_s_own_settings_are_the_defaults(runs, tmp_path, capsys):
    run_sample(capsys, tmp_path, "--prompt=a dog", model=runs("1", "full"))
    row = json.loads((tmp_path / "metadata.jsonl").read_text())
    assert (row["num_steps"], row["guidance_scale"], row["eta"]) == (SMALL["sample.num_steps"], 3.0, 0.0)


def test_another_resolution_and_precision(folders, tmp_path, capsys):
    settings = {"model": folders["xl"], "num_steps": 2, "resolution": 24}
    for dtype in ("float32", "bfloat16"):
        status, _, (picture,) = run_sample(capsys, tmp_path / dtype, "--prompt=a", compute_dtype=dtype, **settings)
        assert status == 0 and picture.shape == (24, 24, 3)


REFUSED = {
    "no prompt": ([], {}, "no prompt: give --prompt=TEXT"),
    "no such model": (["--prompt=a"], {"model": "/nowhere"}, "--model='/nowhere': no such folder"),
    "no images": (["--prompt=a"], {"num_images": 0}, "--num_images=0: expected 1 or more"),
    "no chunk": (["--prompt=a"], {"chunk_size": 0}, "--chunk_size=0: expected 1 or more"),
    "a negative seed": (["--prompt=a"], {"seed": -1}, "--seed=-1: expected 0"),
    "too noisy": (["--prompt=a"], {"eta": 2}, "--eta=2.0: expected 0"),
    "weak guidance": (["--prompt=a"], {"guidance_scale": 0.5}, "--guidance_scale=0.5: expected 1"),
    "zero guidance": (["--prompt=a"], {"guidance_scale": 0}, "--guidance_scale=0.0: expected 1"),
    "no steps": (["--prompt=a"], {"num_steps": 0}, "--num_steps=0: expected 1"),
    "no such file": ([], {"prompts": "/nowhere.txt"}, "--prompts='/nowhere.txt': not a built-in set"),
    "an odd size": (["--prompt=a"], {"resolution": 17}, "--resolution=17: expected a positive multiple of 8"),
    "an odd variant": (["--prompt=a"], {"variant": "fp16"}, "set another, or ''"),
    "a base for a folder": (["--prompt=a"], {"base": "tiny"}, "--base=tiny is for a run's folder"),
}


@pytest.mark.parametrize(("arguments", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_sample_refuses_before_it_writes(folders, tmp_path, capsys, arguments, changes, message):
    begin = time.monotonic()
    status, said, _ = run_sample(capsys, tmp_path / "out", *arguments, **{"model": folders["1"], **changes})
    assert status == 2 and time.monotonic() - begin < 20
    assert said.err.count("\n") == 1 and message in said.err, said.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(folders, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    status, said, _ = run_sample(capsys, tmp_path / "file", "--prompt=a", model=folders["1"])
    assert status == 2 and "cannot be written" in said.err
    assert (tmp_path / "file").read_text() == "mine"


def test_export_refuses(runs, folders, tmp_path, capsys):
    workdir = runs("1", "full")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    for checkpoint, to, message in (
        (tmp_path / "none", "out", "expected a run's folder"),
        (folders["1"], "out", "expected a run's folder"),
        (workdir / "checkpoints" / "3", "out", f"no checkpoint 3; there are: {SAVED}, {NUM_EPOCHS}"),
        (workdir, "mine", "holds other files"),
        (workdir, "mine/thesis.tex", "thesis.tex is no folder that can be written to"),
        (workdir, "mine/thesis.tex/x", "thesis.tex is no folder"),
    ):
        assert export.main([f"--checkpoint={checkpoint}", f"--to={tmp_path / to}"]) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and message in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "all of it"


def test_a_checkpoint_that_is_not_whole(runs, tmp_path, capsys):
    """One that lost a file is told of; nothing is exported."""
    step = tmp_path / "run" / "checkpoints" / str(SAVED)
    workdir = runs("xl", "lora")
    for path in (workdir / "checkpoints" / str(SAVED)).rglob("*"):
        if path.is_file() and path.name not in ("manifest.ocdbt",):
            copy = step / path.relative_to(workdir / "checkpoints" / str(SAVED))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (tmp_path / "run" / "config.json").write_text((workdir / "config.json").read_text())
    assert export.main([f"--checkpoint={step}", f"--to={tmp_path / 'out'}"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and f"{step}: not a whole checkpoint" in errors
    assert not (tmp_path / "out").exists()


def test_a_config_of_fewer_fields(runs, tmp_path):
    """Runs of former versions can be exported too."""
    workdir = copy_run(runs("xl", "lora"), tmp_path / "run", runs("xl", "lora"))
    config = json.loads((runs("xl", "lora") / "config.json").read_text())
    for later in ("pretrained.variant", "convolution"):
        del config[later]
    write_json(workdir / "config.json", config)
    assert export.main([f"--checkpoint={workdir}", f"--to={tmp_path / 'out'}"]) == 0


def copy_run(run, workdir, base):
    """The run's folder, as if it had begun with the model in `base`."""
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(run / "checkpoints")
    config = json.loads((run / "config.json").read_text())
    write_json(workdir / "config.json", config | {"pretrained.model": str(base)})
    return workdir


@pytest.mark.parametrize(("family", "tuning"), [("1", "full"), ("xl", "lora")])
def test_a_base_model_that_has_moved(runs, folders, tmp_path, capsys, family, tuning):
    """Both commands name the flag that gives its new place, and do with it what they did before."""
    run, gone = runs(family, tuning), tmp_path / "gone"
    workdir = copy_run(run, tmp_path / "run", gone)
    commands = (
        lambda *more: export.main([f"--checkpoint={workdir}", f"--to={tmp_path / 'out'}", *more]),
        lambda *more: run_sample(capsys, tmp_path / "drawn", "--prompt=a", *more, model=workdir, num_steps=2)[0],
    )
    for command in commands:
        assert command(f"--base={folders[family]}") == 0
    exported = (tmp_path / "out" / UNET_WEIGHTS).read_bytes()
    assert exported == (run / "export" / UNET_WEIGHTS).read_bytes()
    assert export.main([f"--checkpoint={workdir}", f"--to={tmp_path / 'other'}"]) == 2
    assert f"--base='{gone}': no such folder" in capsys.readouterr().err
    for base in FAMILIES.keys() - {family}:
        assert export.main([f"--checkpoint={workdir}", f"--to={tmp_path / 'other'}", f"--base={folders[base]}"]) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and "of another model" in errors and str(folders[base]) in errors
        status, said, _ = run_sample(capsys, tmp_path / "no", "--prompt=a", model=workdir, base=folders[base])
        assert status == 2 and "of another model" in said.err
    assert not (tmp_path / "other").exists()


def test_a_folder_that_is_no_run_s(runs, tmp_path, capsys):
    workdir = copy_run(runs("xl", "lora"), tmp_path / "run", "tiny")
    write_json(workdir / "config.json", {"hidden_size": 3})
    assert export.main([f"--checkpoint={workdir}", f"--to={tmp_path / 'out'}"]) == 2
    assert f"{workdir}/config.json: expected a run's" in capsys.readouterr().err


def test_fewer_pictures_than_before(folders, tmp_path, capsys):
    """What metadata.jsonl no longer tells of is not left behind; other files are."""
    settings = {"model": folders["1"], "num_steps": 2}
    run_sample(capsys, tmp_path, "--prompt=a", num_images=4, **settings)
    (tmp_path / "99999.png").write_bytes((tmp_path / "00000.png").read_bytes())
    _, _, pictures = run_sample(capsys, tmp_path, "--prompt=a", num_images=2, **settings)
    assert len(pictures) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"train.adam_moment_dtype": "bfloat16"}, id="half"),
        pytest.param({"train.optimizer": "adafactor"}, id="factored"),
    ],
)
def test_smaller_moments(folders, tmp_path, settings):
    """adamw with bfloat16 first moments, and adafactor, train and continue as if nothing had been."""
    states = []
    for name, rounds in (("straight", (2,)), ("continued", (1, 2))):
        workdir = tmp_path / name
        for num_epochs in rounds:
            assert main(flags(folders["1"], workdir, "full", num_epochs=num_epochs, **SMALL, **settings)) == 0
        rows = metrics.read(workdir / "metrics.jsonl")
        assert [row["epoch"] for row in rows] == [0, 1] and all(np.isfinite(row["loss"]) for row in rows)
        with ocp.CheckpointManager((workdir / "checkpoints").absolute()) as manager:
            states.append(manager.restore(2, args=ocp.args.StandardRestore()))
    assert equal(*states)
    state = states[0]
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(state["opt_state"])}
    assert ("bfloat16" in dtypes) == ("train.adam_moment_dtype" in settings)


def test_a_run_in_half_precision(folders, tmp_path):
    """bfloat16 networks and a frozen denoiser in bfloat16; what is trained, and what it is added to, in float32."""
    workdir = tmp_path / "run"
    settings = {"compute_dtype": "bfloat16", "train.remat": "full", "train.lora_rank": 2, "train.kl_weight": 0.1}
    assert main(flags(folders["1"], workdir, "lora", num_epochs=1, **SMALL, **settings)) == 0
    (row,) = metrics.read(workdir / "metrics.jsonl")
    assert row["ratio_max_deviation"] == 0 and row["skipped_steps"] == 0
