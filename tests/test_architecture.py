"""The imports follow the order of the design: a file imports only from files to its left."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ddpo_jax"

# As in the design; what it names no place for stands as far to the left as what it reads allows.
ORDER = [
    *("types", "errors", "words", "pictures", "plugins", "statistics", "workdir", "config", "command", "ahead"),
    *(
        "runtime",
        "multihost",
        "process",
        "losses",
        "advantages",
        "experts",
        "pairing",
        "sharding",
        "convert",
        "models",
        "policy",
        "window",
        "finetune",
        "optimizers",
    ),
    *(
        "rewards",
        "algorithms",
        "update",
        "data",
        "latent_cache",
        "datasets",
        "image_text",
        "preferences",
        "picture_folder",
    ),
    *("bradley_terry", "metrics", "clock", "starts", "report", "checkpoint", "diffusers_folder", "fixed_noise"),
    *("methods", "settings", "build", "saved", "sampling", "scoring", "prompt_flags", "drawn", "findings"),
    *("export", "sample", "score", "evaluate", "pairs", "prepare", "fit_reward", "train", "main"),
]
ASIDE = "tiny"  # makes the embedded model: reads anything but train and main, and is read by nothing else

FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES}


def imported(path: Path) -> Iterator[str]:
    """The full name of each module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            # `from ddpo_jax import losses` imports a module, `from ddpo_jax.losses import ppo_clip` a name of one
            yield from (
                name if name in MODULES or not node.module.startswith("ddpo_jax") else node.module for name in names
            )


def room(module: str) -> str:
    """`models` of `ddpo_jax.models.unet`; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def rooms_read(path: Path) -> set[str]:
    inside = {room(name) for name in imported(path) if name.split(".")[0] == "ddpo_jax"}
    return inside - {room(module_name(path)), ""}


parametrize = pytest.mark.parametrize("path", FILES, ids=module_name)


@parametrize
def test_a_file_imports_only_from_files_to_its_left(path):
    own, read = room(module_name(path)), rooms_read(path)
    if own == ASIDE:
        assert not read & {"train", "main"}
    elif own:
        assert own in ORDER, f"{path.name}: give {own!r} its place in ORDER"
        right = [name for name in read if name not in ORDER[: ORDER.index(own)]]
        assert not right, f"{own} may not import {right}"
    else:
        assert not read


@parametrize
def test_only_models_import_flax(path):
    if room(module_name(path)) != "models":
        assert not [name for name in imported(path) if name.split(".")[0] == "flax"]


@parametrize
def test_nothing_imports_pickle_or_torch(path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert not roots & {"pickle", "cPickle", "cloudpickle", "dill", "shelve"}
    assert not roots & {"torch", "diffusers", "accelerate", "peft", "tensorflow"}


def test_a_run_does_not_load_torch(tmp_path):
    """transformers imports torch for some of its classes where it is installed: seconds and gigabytes for nothing."""
    code = (
        "import sys, pathlib, ddpo_jax.train\n"
        "from ddpo_jax.models.tokenizer import load_tokenizer, tokenize\n"
        "from ddpo_jax.tiny.tokenizer import write_tokenizer\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "write_tokenizer(folder)\n"
        "tokenize(load_tokenizer(folder), ['a fox'])\n"
        "print(*{'torch', 'diffusers', 'tensorflow'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


@pytest.mark.skipif(not (PACKAGE / "sharding.py").exists(), reason="one device so far")
@parametrize
def test_only_sharding_names_mesh_axes(path):
    if room(module_name(path)) != "sharding":
        names = {name.rpartition(".")[2] for name in imported(path)}
        assert not names & {"Mesh", "AbstractMesh", "NamedSharding", "PartitionSpec"}
        # the other way to them: jax.make_mesh, jax.P, jax.sharding.PartitionSpec
        attributes = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute)
        }
        assert not attributes & {"make_mesh", "Mesh", "AbstractMesh", "NamedSharding", "PartitionSpec"}


def test_every_room_is_read_into_the_test():
    assert {"types", "models", "rewards", "algorithms", "tiny"} <= {room(name) for name in MODULES}
