"""report.html: what it tells of hand-made workdirs, and how a browser shows it."""

import base64
import html
import io
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from benchmarks.picture import STYLES, write_picture
from configs import base
from ddpo_jax import metrics, report
from ddpo_jax.errors import Preempted
from ddpo_jax.report import __main__ as command_line
from ddpo_jax.report import pictures, sections
from ddpo_jax.report.told import digits
from ddpo_jax.starts import command, keep_start
from ddpo_jax.train import draw_report
from ddpo_jax.workdir import flatten

SECTIONS = ["reward", "pictures", "progress", "prompts", "diagnostics", "config", "environment", "commands"]
TEXTS = {"train": ("a cat", "a dog", "a cat"), "held_out": ("a fox", "an ant", "a fox")}


def random_pictures(epoch, count=3, size=16):
    return np.random.default_rng(epoch).random((count, size, size, 3)).astype(np.float32)


def write_round(writer, epoch, **changes):
    values = {
        "step": 2 * epoch + 2,
        "reward/mean": 1.0 + epoch,
        "reward/std": 0.5,
        "reward/missing": 0,
        "reward/jpeg_compressibility": 1.0 + epoch,
        "ratio_max_deviation": 3e-7,
        "clip_fraction": 0.1,
        "approx_kl": 2e-5,
        "grad_norm": 0.4,
        "loss": -0.01,
        "skipped_steps": 0.0,
        "seconds/rollout": 20.0,
        "seconds/update": 40.0,
        **changes,
    }
    writer.scalars(epoch, {name: value for name, value in values.items() if value is not None})


def write_evaluation(writer, epoch, rewards, sets=TEXTS, size=16):
    """rewards: of each set's pictures; NaN is missing."""
    for name, texts in sets.items():
        found = np.array(rewards, np.float32)
        report = {
            "reward/mean": float(np.nanmean(found)) if np.isfinite(found).any() else math.nan,
            "reward/std": float(np.nanstd(found)) if np.isfinite(found).any() else math.nan,
        }
        writer.images(epoch, name, random_pictures(epoch, len(texts), size), texts)
        writer.evaluation(epoch, name, report, texts, found)


def start(workdir, argv=("--config=configs/base.py",), epoch=0, **changes):
    """Begins a run by hand; returns its writer."""
    workdir.mkdir(exist_ok=True)
    config = flatten(base.get_config().to_dict()) | {"num_epochs": 4, "prompts.held_out": 0.2} | changes
    (workdir / "config.json").write_text(json.dumps(config))
    keep_start(workdir, list(argv), epoch=epoch)
    return metrics.make_writer(
        workdir, first_epoch=epoch, num_epochs=4, note=lambda text: None, tensorboard=False, wandb_project=""
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: 4 rounds, evaluations before, between and after. Do not write to it."""
    workdir = tmp_path_factory.mktemp("report") / "run"
    writer = start(workdir)
    write_evaluation(writer, 0, [1.0, 2.0, 3.0])
    for epoch in range(4):
        if epoch == 2:
            write_evaluation(writer, 2, [2.0, 3.0, 4.0])
        write_round(writer, epoch)
    write_evaluation(writer, 4, [4.0, 1.5, 5.0])
    return workdir


@pytest.fixture(scope="module")
def page(finished):
    return drawn(finished)


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


def drawn(workdir, **settings):
    report.write(workdir, **settings)
    return (workdir / "report.html").read_text(encoding="utf-8")


def part(page, name):
    """The HTML of one section."""
    return re.search(rf'<section id="{name}">.*?</section>', page, re.DOTALL)[0]


def text_of(fragment):
    """What a reader sees of it, in one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", fragment.replace("<wbr>", ""))).split())


def images_of(fragment):
    """The decoded pictures inside, in order."""
    found = re.findall(r'<img src="data:image/(?:png|webp);base64,([^"]*)"', fragment)
    assert len(found) == fragment.count("<img")
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


# what it holds


def test_all_parts_are_there_in_order(page):
    assert re.findall(r'<section id="(\w+)">', page) == SECTIONS
    assert all("nothing to show" not in part(page, name) for name in SECTIONS)
    header = text_of(page[page.index("<header>") : page.index("</header>")])
    for fact in ("run", "ddpo_is", "jpeg_compressibility", "tiny, the whole UNet", "4 of 4", "4.0 min"):
        assert fact in header


def test_the_result_is_the_gain_in_deviations_of_the_base_models_pictures(page):
    # mean of 1, 2, 3 is 2, deviation sqrt(2/3); mean of 4, 1.5, 5 is 3.5: 1.5 / 0.8165 = 1.84
    assert "from 2.000 to 3.500 for held-out prompts (+1.84 σ) and from 2.000 to 3.500 for train" in page


def test_nothing_is_loaded_from_anywhere(page):
    assert "http:" not in page and "https:" not in page and "//" not in re.sub(r"base64,[^\"]*", "", page)
    assert all(link.startswith(("data:", "#")) for link in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", page))


def test_the_page_is_a_function_of_the_files_and_whole(workdir, page):
    assert drawn(workdir) == page and page.endswith("</html>\n")
    assert not list(workdir.glob("*.new"))


def test_only_a_running_run_reloads_its_page(workdir, page):
    assert 'http-equiv="refresh"' in drawn(workdir, running=True)
    assert 'http-equiv="refresh"' not in page


def test_pictures_are_those_that_were_drawn_before_and_after_of_each_prompt(page):
    found = images_of(part(page, "pictures"))
    # two sets, two prompts each, the first picture of each, before and after
    expected = [random_pictures(epoch)[i] for _ in TEXTS for i in (0, 1) for epoch in (0, 4)]
    for picture, wanted in zip(found, expected, strict=True):
        assert picture.format == "PNG"
        np.testing.assert_array_equal(np.asarray(picture), np.rint(wanted * 255).astype(np.uint8))
    text = text_of(part(page, "pictures"))
    assert "a fox before training: 1.000 after 4 rounds: 4.000" in text
    assert text.index("Held-out prompts") < text.index("a fox") < text.index("Train prompts") < text.index("a cat")


def test_frames_are_all_evaluations_and_the_last_shows_by_itself(page):
    fragment = part(page, "progress")
    assert len(images_of(fragment)) == 2 * 2 * 3
    shown = re.findall(r"<(?:img|span)[^>]*data-frame=\"(\d)\"(?! hidden)", fragment)
    assert set(shown) == {"2"} and len(shown) == 2 * 4 + 1  # a picture and a reward each; the moment
    assert 'max="2"' in fragment and "after 2 rounds" in fragment


def test_prompts_are_sorted_by_gain(page):
    table = re.findall(r"<td>(.*?)</td>" + 3 * r'<td class="figure">(.*?)</td>', part(page, "prompts"))
    assert table[:2] == [("a fox", "2.000", "4.500", "+2.500"), ("an ant", "2.000", "1.500", "−0.5000")]
    assert [row[0] for row in table[2:]] == ["a cat", "a dog"]


def test_only_trouble_that_there_was_is_told(workdir, page):
    assert "Missing rewards" not in page and "Skipped updates" not in page
    writer = start(workdir, epoch=4)
    write_round(writer, 4, **{"reward/missing": 2, "skipped_steps": 1.0})
    page = drawn(workdir)
    assert "Missing rewards" in page and "Skipped updates" in page


def test_the_config_begins_with_what_differs_from_the_base(page):
    fragment = part(page, "config")
    assert fragment.count("<tr>") == 1 + 2  # num_epochs and prompts.held_out
    assert "num_epochs 4 100" in text_of(fragment[: fragment.index("<details>")])
    assert "&quot;train.learning_rate&quot;: 1e-05" in fragment


def test_every_start_is_told(workdir):
    start(workdir, ["--config=configs/base.py", "--config.num_epochs=9"], epoch=4)
    page = drawn(workdir)
    text = text_of(part(page, "commands"))
    assert text.count("python -m ddpo_jax.main --config=configs/base.py") == 2
    assert "on from round 4" in text and text.endswith("--config.num_epochs=9")
    environment = text_of(part(page, "environment"))
    assert all(
        name in environment for name in ("python", "platform", "jax", "flax", "optax", "orbax", "devices 8 x cpu")
    )


# other runs


def test_text_is_escaped(tmp_path):
    evil = '<script>alert("a")</script> & $x$ $y_ 猫'
    writer = start(
        tmp_path / "a<i>&",
        [evil],
        **{"reward.name": evil, "pretrained.model": evil, "prompts.name": evil, "algorithm": evil},
    )
    sets = {"train": (evil, "a dog", "it's")}
    write_evaluation(writer, 0, [1.0, 2.0, 3.0], sets)
    write_round(writer, 0, **{f"reward/{evil}": 1.0, f"seconds/{evil}": 1.0})
    write_evaluation(writer, 1, [2.0, 2.0, 3.0], sets)
    page = drawn(tmp_path / "a<i>&")
    assert page.count("<script>") == 1 and "alert(&quot;a&quot;)" in page
    assert "<i>" not in page and "a&lt;i&gt;&amp;" in page


def test_missing_rewards_leave_gaps(tmp_path):
    writer = start(tmp_path / "run")
    write_evaluation(writer, 0, [1.0, math.nan, 3.0])
    write_round(writer, 0, **{"reward/mean": math.nan, "grad_norm": math.nan})
    write_evaluation(writer, 1, [math.nan, math.nan, 4.0])
    page = drawn(tmp_path / "run")
    assert "a fox before training: 1.000 after 1 round: reward missing" in text_of(part(page, "pictures"))
    assert "an ant missing missing missing" in text_of(part(page, "prompts"))
    assert "from 2.000 to 4.000" in page and "nan" not in re.sub(r"base64,[^\"]*", "", page)
    write_evaluation(writer, 2, [math.nan] * 3)
    assert "No evaluation has rewards yet" in drawn(tmp_path / "run")


def test_supervised_fine_tuning_shows_its_loss(tmp_path):
    writer = start(tmp_path / "run", algorithm="sft")
    write_evaluation(writer, 0, [math.nan] * 3)
    for epoch in range(2):
        writer.scalars(epoch, {"step": epoch, "captions/cut": 0, "loss": 0.5 - 0.1 * epoch, "seconds/encode": 1.0})
    write_evaluation(writer, 2, [math.nan] * 3)
    page = drawn(tmp_path / "run")
    assert "The mean loss of a round went from 0.5000 to 0.4000" in page
    assert part(page, "reward").count("<svg") == 2  # the loss, for two widths
    assert len(images_of(part(page, "pictures"))) == 8 and "Clip fraction" not in page


def test_each_of_several_rewards_has_a_curve(tmp_path):
    writer = start(tmp_path / "run", **{"reward.name": "jpeg_compressibility,scorers:brightness"})
    write_evaluation(writer, 0, [1.0, 2.0, 3.0])
    write_round(writer, 0, **{"reward/scorers:brightness": 0.5})
    fragment = part(drawn(tmp_path / "run"), "reward")
    assert "<b>jpeg_compressibility</b>" in fragment and "<b>brightness</b>" in fragment
    assert fragment.count("<svg") == 4 and "Watched" not in fragment


def test_a_watched_reward_is_called_so(tmp_path):
    rewards = {"reward.name": "jpeg_compressibility,scorers:brightness", "reward.weights": [2.0, 0.0]}
    writer = start(tmp_path / "run", **rewards)
    write_evaluation(writer, 0, [1.0, 2.0, 3.0])
    write_round(writer, 0, **{"reward/scorers:brightness": 0.5})
    page = drawn(tmp_path / "run")
    assert "<dt>Reward</dt><dd>2 × jpeg_compressibility</dd>" in page.replace("<wbr>", "")
    assert "<dt>Watched</dt><dd>scorers:brightness</dd>" in page.replace("<wbr>", "")
    assert part(page, "reward").count("Watched: it counts nothing.") == 1


def test_one_evaluation_has_nothing_to_compare_with(tmp_path):
    write_evaluation(start(tmp_path / "run"), 0, [1.0, 2.0, 3.0])
    page = drawn(tmp_path / "run", running=True)
    assert re.findall(r'<section id="(\w+)">', page) == SECTIONS
    assert "Before training the mean reward is 2.000" in page and "0 of 4" in page
    assert len(images_of(part(page, "pictures"))) == 4 and "<input" not in page


def test_a_run_that_has_shown_nothing_has_a_page(tmp_path):
    start(tmp_path / "run")
    page = drawn(tmp_path / "run")
    assert re.findall(r'<section id="(\w+)">', page) == SECTIONS and "<img" not in page


def test_a_killed_run_shows_what_is_whole(workdir):
    writer = start(workdir, epoch=3)  # drops round 3 and the evaluation after round 4, whose pictures stay behind
    assert (workdir / "images" / "train_00004.png").exists()
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "lo')
    page = drawn(workdir)
    assert "3 of 4" in page and "after 2 rounds" in page and "after 4 rounds" not in page
    assert len(images_of(part(page, "progress"))) == 2 * 2 * 2
    (workdir / "images" / "train_00002.png").unlink()
    assert len(images_of(part(drawn(workdir), "pictures"))) == 4 + 2
    writer.close()


def test_many_large_pictures_are_made_few_and_small(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PROMPTS", 2)
    monkeypatch.setattr(pictures, "MAX_FRAMES", 3)
    writer = start(tmp_path / "run")
    texts = tuple(f"prompt {i}" for i in range(4))
    slope = np.broadcast_to(np.linspace(0, 1, 320)[:, None, None], (4, 320, 300, 3)).astype(np.float32)
    for epoch in range(5):
        writer.images(epoch, "train", slope, texts)
        writer.evaluation(epoch, "train", {"reward/mean": 1.0, "reward/std": 1.0}, texts, np.ones(4, np.float32))
    fragment = part(drawn(tmp_path / "run"), "progress")
    found = images_of(fragment)
    assert len(found) == 2 * 3 and "prompt 0" in fragment and "prompt 3" in fragment
    assert {picture.size for picture in found} == {(240, 256)} and found[0].format == "WEBP"
    assert [moment in fragment for moment in ("before training", "after 2 rounds", "after 4 rounds")] == [True] * 3


@pytest.mark.parametrize("count", [1, 2, 5, 12, 13, 64])
def test_a_spread_keeps_first_and_last(count):
    kept = pictures.spread(list(range(count)), 12)
    assert len(kept) == min(count, 12) == len(set(kept))
    assert kept[0] == 0 and kept[-1] == count - 1 and kept == sorted(kept)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.92, "1.920"), (-0.5, "−0.5000"), (0.0, "0.000"), (12345.6, "12346"), (2e-5, "2.00e−05"), (None, "missing")],
)
def test_digits_line_up(value, text):
    assert digits(value) == text


# starts


@pytest.mark.parametrize(
    "argv",
    [
        ["--config=configs/base.py", "--config.num_epochs=3"],
        ["--config.prompts.list=('a fox', \"it's $HOME\")", ""],
        ["--workdir={home}/a b/runs", "--config.pretrained.model={home}"],
    ],
)
def test_the_command_gives_a_shell_the_same_arguments_and_names_no_home(argv, tmp_path, monkeypatch):
    home = str(tmp_path / "someone")
    monkeypatch.setenv("HOME", home)
    argv = [argument.format(home=home) for argument in argv]
    line = command(argv)
    assert home not in line and line.startswith("python -m ddpo_jax.main ")
    script = "python() { printf '%s\\n' \"${@:3}\"; }; " + line
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert found.split("\n")[:-1] == argv


# trouble


def test_a_page_that_cannot_be_drawn_is_told_and_costs_nothing(workdir):
    (workdir / "images" / "train_00002.png").write_bytes(b"not a picture")
    notes = []
    draw_report(workdir, notes.append, running=True)
    (note,) = notes
    assert "report.html could not be drawn" in note


def test_a_stop_while_the_page_is_drawn_is_a_stop(workdir, monkeypatch):
    def stop(told):
        raise Preempted("SIGTERM")

    monkeypatch.setattr(sections, "rewards", stop)
    with pytest.raises(Preempted):
        draw_report(workdir, print, running=True)


def test_the_command_line_draws_a_finished_run(workdir, tmp_path, capsys):
    assert command_line.main([str(workdir)]) == 0
    assert (workdir / "report.html").exists()
    (tmp_path / "empty").mkdir()
    assert command_line.main([str(tmp_path / "empty")]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "no report can be made of it" in errors


# a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)

PROBE = """
const shown = (element) => element.getClientRects().length > 0;
const boxes = (elements) => [...elements].filter(shown).map((element) => {
  const box = element.getBoundingClientRect();
  return [box.width, box.height];
});
const look = (frame) => {
  const page = frame.contentDocument;
  const slider = page.querySelector(".slider input");
  const frames = () => [...page.querySelectorAll("#progress img")].filter(shown).map((image) => image.dataset.frame);
  const last = frames();
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  const curves = [...page.querySelectorAll("#reward svg path[style*='--train']")].filter(shown);
  return {
    width: frame.clientWidth,
    scroll: page.documentElement.scrollWidth,
    images: [...page.images].map((image) => image.naturalWidth),
    plots: boxes(page.querySelectorAll("svg")),
    letters: [...page.querySelectorAll("svg text")].filter(shown).map((text) => text.getBoundingClientRect().height),
    curves: boxes(curves),
    colors: [...new Set(curves.map((curve) => getComputedStyle(curve).stroke))],
    last: last,
    first: frames(),
  };
};
addEventListener("load", () => {
  document.getElementById("found").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(look));
});
"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH (Debian: apt-get install chromium)")
def test_a_browser_draws_pictures_and_curves_on_phones_and_desktops(page, tmp_path):
    """In frames as wide as a phone and as a desktop: a window cannot be as narrow as a phone."""
    page = html.escape(page)
    frames = "".join(f'<iframe width="{width}" height="800" srcdoc="{page}"></iframe>' for width in (360, 1280))
    probe = tmp_path / "probe.html"
    probe.write_text(f'<pre id="found"></pre><style>iframe {{ border: 0 }}</style>{frames}<script>{PROBE}</script>')
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            f"--user-data-dir={tmp_path / 'browser'}",
            *("--virtual-time-budget=10000", "--dump-dom", probe.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    phone, desktop = json.loads(html.unescape(found[1]))
    assert (phone["width"], desktop["width"]) == (360, 1280)
    for seen in (phone, desktop):
        assert seen["scroll"] <= seen["width"]
        assert len(seen["images"]) == 8 + 12 and min(seen["images"]) == 16
        # the reward, two sets of prompts, six diagnostics and the seconds
        assert len(seen["plots"]) == 1 + 2 + 6
        assert all(width > 250 and height > 60 for width, height in seen["plots"])
        assert min(seen["letters"]) >= 9
        assert max(width for width, _ in seen["curves"]) > 200 and max(height for _, height in seen["curves"]) > 20
        assert seen["colors"] == ["rgb(0, 114, 178)"]
        assert seen["last"] == ["2"] * 4 and seen["first"] == ["0"] * 4


# The picture that a recipe's benchmark draws


def test_the_picture_of_several_runs(finished, tmp_path):
    path = tmp_path / "new" / "run.png"
    write_picture(path, {"true": [finished, finished], "shuffled": [finished]})
    with Image.open(path) as picture:
        shown = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    drawn_colors = {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.unique(shown, axis=0)}
    assert {style["color"] for style in STYLES.values()} <= drawn_colors
