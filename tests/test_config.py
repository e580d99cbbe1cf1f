"""The command line: fields by name, and errors that say which one was meant."""

from pathlib import Path

import pytest

from ddpo_jax.config import parse
from ddpo_jax.errors import UserError

ROOT = Path(__file__).parents[1]
BASE = f"--config={ROOT / 'configs' / 'base.py'}"


def test_fields_are_overridden_and_keep_their_types():
    config, workdir, _ = parse(
        [BASE, "--config.train.learning_rate=1", "--config.sample.num_steps=7", "--config.tensorboard"]
    )
    assert config.train.learning_rate == 1.0 and isinstance(config.train.learning_rate, float)
    assert config.sample.num_steps == 7
    assert config.tensorboard is True
    assert config.train.clip_range == 1e-4
    assert workdir == Path("runs/base")


def test_values_may_follow_their_field():
    config, workdir, _ = parse([BASE, "--config.sample.num_steps", "7", "--workdir", "~/somewhere"])
    assert config.sample.num_steps == 7
    assert workdir == Path.home() / "somewhere"


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "configs").glob("[a-z]*.py")))
def test_recipes_parse(recipe):
    config, workdir, _ = parse([f"--config={ROOT / 'configs' / recipe}.py"])
    assert workdir.name == recipe
    assert config.num_epochs > 0


VARIED = """
from configs import base
from ddpo_jax.config import choose_variant

VARIANTS = {"lora": {"train.lora_rank": 4}, "kl": {"train.kl_weight": 1}, "broken": {"train.lora_rnk": 4}}


def get_config(variant=""):
    return choose_variant(base.get_config(), VARIANTS, variant)
"""


@pytest.fixture
def varied(tmp_path):
    (tmp_path / "varied.py").write_text(VARIED)
    return f"--config={tmp_path / 'varied.py'}"


@pytest.mark.parametrize(
    ("variant", "name", "rank", "weight"),
    [("", "varied", 0, 0.0), (":", "varied", 0, 0.0), (":lora", "varied-lora", 4, 0.0), (":kl", "varied-kl", 0, 1.0)],
)
def test_a_variant_changes_its_fields_and_has_its_own_workdir(varied, variant, name, rank, weight):
    config, workdir, _ = parse([varied + variant])
    assert (config.train.lora_rank, config.train.kl_weight) == (rank, weight)
    assert workdir == Path("runs") / name
    assert parse([varied + variant, "--config.train.lora_rank=2"])[0].train.lora_rank == 2


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (":lroa", "no variant 'lroa'. Did you mean lora? It has lora, kl, broken"),
        (":something", "no variant 'something'. It has lora, kl, broken"),
        (":broken", "lora_rnk"),
    ],
)
def test_an_unknown_variant_is_one_error(varied, variant, message):
    with pytest.raises(UserError) as raised:
        parse([varied + variant])
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], r"--config is missing"),
        (["--config=configs/none.py"], r"configs/none\.py: no such file"),
        ([f"{BASE}:lora"], r"^this recipe has no variants"),
        ([BASE, "--config.train.learnin_rate=1"], r"did you mean --config\.train\.learning_rate\?"),
        ([BASE, "--config.zzzzzzzz=1"], r"configs/base\.py lists every field"),
        ([BASE, "--config.sample.num_steps=many"], r"many"),
        ([BASE, "--config.sample.num_steps=2.5"], r"2\.5"),
        ([BASE, "--wrokdir=x"], r"wrokdir"),
        ([BASE, "extra"], r"unexpected argument 'extra'"),
    ],
)
def test_errors_name_the_argument(argv, message):
    with pytest.raises(UserError, match=message):
        parse(argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        (
            "from configs import base\n\ndef get_config():\n    config = base.get_config()\n"
            "    config.train.learnin_rate = 1.0\n    return config\n",
            "learnin_rate",
        ),
    ],
)
def test_a_broken_recipe_is_one_error(tmp_path, text, message):
    (tmp_path / "recipe.py").write_text(text)
    with pytest.raises(UserError, match=message):
        parse([f"--config={tmp_path / 'recipe.py'}"])
