"""Stable Diffusion 1.5, 2.1 and XL at full size, with random weights, beside diffusers and transformers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.families import FAMILIES

pytest.importorskip("torch")
pytest.importorskip("diffusers")

SCRIPT = Path(__file__).with_name("full_size.py")
TOLERANCE = 1e-4
BEYOND = 1e9  # bytes of host memory beside the finished arrays

# The VAEs of all are one network, and the small text encoder of XL is that of 1.5.
PARTS = [
    ("sd15", "text_encoder"),
    ("sd15", "vae"),
    ("sd15", "unet"),
    ("sd21", "text_encoder"),
    ("sd21", "unet"),
    ("sdxl", "text_encoder_2"),
    ("sdxl", "unet"),
]


def run(half, family, part, folder):
    done = subprocess.run(
        [sys.executable, SCRIPT, half, family, part, folder],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parents[2])])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "part"), PARTS)
def test_full_size(family, part, tmp_path, record_property, capsys):
    folder = tmp_path / part
    folder.mkdir()
    try:
        theirs = run("torch", family, part, folder)
        ours = run("ours", family, part, folder)
    finally:
        shutil.rmtree(folder)  # up to 10 GB, which pytest would keep
    with capsys.disabled():
        errors = ", ".join(f"{name} {error:.1e}" for name, error in ours["errors"].items())
        print(
            f"\n{family} {part}: {ours['parameters']:,} parameters, relative errors {errors};"
            f" loaded in {ours['seconds']:.0f} s with {ours['beyond'] / 1e9:.2f} GB of memory beside them"
        )
    assert theirs["parameters"] == ours["parameters"] == FAMILIES[family].num_parameters[part]
    assert max(ours["errors"].values()) <= TOLERANCE
    assert ours["beyond"] <= BEYOND
