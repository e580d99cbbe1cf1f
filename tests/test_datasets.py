"""Prepared data sets: what goes in comes out, what is broken is told and left out, and a cut-off conversion goes on."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from ddpo_jax import image_text, preferences, prepare
from ddpo_jax.datasets.folders import label_of
from ddpo_jax.datasets.formats import BadRow, Preference
from ddpo_jax.datasets.images import prepare_image
from ddpo_jax.datasets.jpeg import is_whole
from ddpo_jax.datasets.reading import open_prepared
from ddpo_jax.errors import UserError
from ddpo_jax.pictures import read_picture

SIZE = 16


def pixels(number, size=SIZE):
    """A smooth picture with some noise, another one for each number."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[0:size, 0:size] / size
    waves = np.stack([np.sin(x * random.normal(0, 9) + y * random.normal(0, 9)) for _ in range(3)], -1)
    return (128 + 90 * waves + random.normal(0, 8, waves.shape)).clip(0, 255).astype(np.uint8)


def encoded(image, kind="JPEG", **settings):
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def jpeg(number, size=SIZE):
    return encoded(pixels(number, size), quality=90)


def row(number, **more):
    """A row of Pick-a-Pic."""
    label = number % 2
    images = {"jpg_0": jpeg(2 * number), "jpg_1": jpeg(2 * number + 1)}
    return {"caption": f"prompt {number}", **images, "label_0": label, "label_1": 1 - label, "has_label": True} | more


def write_parquet(path, rows, row_group_size=5):
    path.parent.mkdir(exist_ok=True)
    types = {"jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float64(), "label_1": pa.float64()}
    columns = {name: pa.array([row[name] for row in rows], types.get(name)) for name in rows[0] if name != "caption"}
    captions = [None if row["caption"] is None else row["caption"] for row in rows]
    texts = pa.array([text.encode() if isinstance(text, str) else text for text in captions], pa.binary())
    # A view, as a writer that checks nothing leaves text that is not UTF-8.
    columns["caption"] = pa.Array.from_buffers(pa.string(), len(texts), texts.buffers(), texts.null_count)
    parquet.write_table(pa.table(columns), path, row_group_size=row_group_size)


def break_group(path, group):
    """Overwrites the beginning of a row group."""
    content = bytearray(path.read_bytes())
    with parquet.ParquetFile(path) as file:
        column = file.metadata.row_group(group).column(0)
    begin = column.dictionary_page_offset or column.data_page_offset
    content[begin : begin + 40] = bytes(range(200, 240))
    path.write_bytes(content)


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines))


def run(form, source, output, *more):
    return prepare.main([f"--from={form}", f"--input={source}", f"--output={output}", "--num_workers=1", *more])


def skipped(output):
    """(row, reason) of each row left out."""
    rows = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
    return [(row["row"], row["reason"]) for row in rows]


def records(output, kind="preference"):
    source = open_prepared(output, kind)
    return [source.get(i) for i in range(source.length)]


def files(folder):
    """The content of the folder's files by name, but for what stands in progress."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# The forms


def test_pick_a_pic_is_filtered_as_published_and_each_bad_row_is_told(tmp_path, capsys):
    good = jpeg(1)
    bad = {
        1: ({"label_0": 0.5, "label_1": 0.5}, "tie"),
        2: ({"has_label": False}, "without a label"),
        4: ({"jpg_0": good[: len(good) // 2]}, "broken picture"),
        5: ({"jpg_1": b""}, "broken picture"),
        6: ({"jpg_1": None}, "broken picture"),
        7: ({"label_0": float("nan")}, "bad label"),
        8: ({"label_0": 2.0}, "bad label"),
        9: ({"label_0": None}, "bad label"),
        10: ({"label_0": 1.0, "label_1": 1.0}, "bad label"),
        11: ({"caption": b"\xff\xfe"}, "text that is not UTF-8"),
        12: ({"caption": None}, "text that is missing"),
        14: ({"jpg_0": jpeg(1, 40)}, "oversized picture"),
        15: ({"jpg_0": b"GIF89a"}, "broken picture"),
    }
    rows = [row(i) | bad.get(i, ({}, ""))[0] for i in range(20)]
    write_parquet(tmp_path / "in" / "train-0.parquet", rows[:12])
    write_parquet(tmp_path / "in" / "train-1.parquet", rows[12:])
    assert run("pick_a_pic", tmp_path / "in", tmp_path / "out", "--shard_size=3", "--max_pixels=1024") == 0
    assert [(place if place < 12 else place - 12, reason) for place, (_, reason) in bad.items()] == skipped(
        tmp_path / "out"
    )
    said = capsys.readouterr().out
    assert "7 records in 7 shards" in said and "left out 13 rows" in said and "4 broken picture" in said
    kept = [rows[i] for i in range(20) if i not in bad]
    found = records(tmp_path / "out")
    assert [record.prompt for record in found] == [row["caption"] for row in kept]
    assert [record.image_0 for record in found] == [row["jpg_0"] for row in kept]
    assert [record.image_1 for record in found] == [row["jpg_1"] for row in kept]
    assert [record.label for record in found] == [row["label_0"] for row in kept]


def test_a_broken_row_group_is_left_out(tmp_path):
    write_parquet(tmp_path / "in.parquet", [row(i) for i in range(15)])
    break_group(tmp_path / "in.parquet", 1)
    assert run("pick_a_pic", tmp_path / "in.parquet", tmp_path / "out", "--shard_size=4") == 0
    assert skipped(tmp_path / "out") == [(i, "row that cannot be read") for i in range(5, 10)]
    assert [record.prompt for record in records(tmp_path / "out")] == [
        f"prompt {i}" for i in (*range(5), *range(10, 15))
    ]


def test_large_pages_are_copied_out_to_the_same_end(tmp_path, monkeypatch):
    images = {"jpg_1": None, "jpg_0": jpeg(4)[:100]}
    write_parquet(tmp_path / "in.parquet", [row(i) | ({} if i % 5 else images) for i in range(18)], row_group_size=6)
    break_group(tmp_path / "in.parquet", 1)
    for name, size in (("streamed", 2**25), ("copied", 0)):
        monkeypatch.setattr("ddpo_jax.datasets.parquet.LARGE_PAGE", size)
        assert run("pick_a_pic", tmp_path / "in.parquet", tmp_path / name, "--shard_size=4") == 0
    assert files(tmp_path / "streamed") == files(tmp_path / "copied")
    assert [place for place, _ in skipped(tmp_path / "copied")] == [0, 5, *range(6, 12), 15]


def test_pictures_may_be_structs_as_datasets_writes_them(tmp_path):
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = {name: pa.array([{"bytes": jpeg(i), "path": None}], struct) for i, name in enumerate(("jpg_0", "jpg_1"))}
    table = pa.table({"caption": pa.array(["a fox"]).dictionary_encode(), **images, "label_0": [1]})
    parquet.write_table(table, tmp_path / "in.parquet")
    assert run("pick_a_pic", tmp_path / "in.parquet", tmp_path / "out") == 0
    assert records(tmp_path / "out") == [Preference("a fox", jpeg(0), jpeg(1), 1.0)]


def test_pairs_of_a_run_read_as_they_do_from_the_folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.jpg").write_bytes(jpeg(i, 40))
    lines = [
        {"prompt": f"né {i}", "image_0": f"{i}.jpg", "image_1": f"{5 - i}.jpg", "label": i / 5, "more": 1}
        for i in range(6)
    ]
    write_lines(folder / "pairs-00000.jsonl", lines[:4])
    write_lines(folder / "pairs-00001.jsonl", [b"\xef\xbb\xbf" + json.dumps(lines[4]).encode(), b"", lines[5]])
    assert run("pairs", folder, tmp_path / "out", "--shard_size=2") == 0
    assert skipped(tmp_path / "out") == []
    sources = [preferences.open_source(str(path), resolution=SIZE) for path in (folder, tmp_path / "out")]
    assert [source.length for source in sources] == [6, 6]
    plain, prepared = ([source.told(i) for i in range(6)] for source in sources)
    assert [prompt for prompt, _ in plain] == [prompt for prompt, _ in prepared]
    np.testing.assert_allclose([label for _, label in plain], [label for _, label in prepared], rtol=1e-6)
    assert sources[1].identity() == preferences.open_source(str(tmp_path / "out"), resolution=SIZE).identity()
    settings = {"batch_size": 4, "seed": 1, "resolution": SIZE, "horizontal_flip": True}
    for epoch in range(3):
        plain, prepared = (preferences.make_batch(source, epoch=epoch, **settings) for source in sources)
        assert plain.prompts == prepared.prompts
        for name in ("images", "labels"):
            np.testing.assert_array_equal(getattr(plain, name), getattr(prepared, name))
    sides = {preferences.shorter_side(str(path)) for path in (folder, tmp_path / "out")}
    assert len(sides) == 1


def test_lines_that_cannot_be_used(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg(1))
    (folder / "b.jpg").write_bytes(jpeg(2)[:-200])
    (folder / "c.bmp").write_bytes(bytes(3 * 2**20))
    good = {"prompt": "a fox", "image_0": "a.jpg", "image_1": "a.jpg", "label": 1}
    bad = [
        (b'{"prompt": "\xe9", "image_0": "a.jpg", "image_1": "a.jpg", "label": 1}', "text that is not UTF-8"),
        (good | {"prompt": "\ud800"}, "text that is not UTF-8"),
        (good | {"prompt": 3}, "text that is missing"),
        (b"{", "line that is not of the format"),
        (b"[" * 100_000, "line that is not of the format"),
        (b'"' + b"x" * 3 * 2**20 + b'"', "line that is not of the format"),
        (b"[]", "line that is not of the format"),
        (good | {"image_0": 3}, "line that is not of the format"),
        (good | {"image_1": "gone.jpg"}, "missing picture"),
        (good | {"image_1": "nul\0.jpg"}, "missing picture"),
        (good | {"image_1": "."}, "missing picture"),
        (good | {"image_1": "b.jpg"}, "broken picture"),
        (good | {"image_1": "c.bmp"}, "oversized picture"),
        *((good | {"label": label}, "bad label") for label in (float("nan"), 2.0, -1, None, "1", True)),
        ({name: good[name] for name in ("prompt", "image_0", "image_1")}, "bad label"),
    ]
    write_lines(folder / "pairs.jsonl", [good, *(line for line, _ in bad), good])
    assert run("pairs", folder, tmp_path / "out", "--shard_size=3", "--max_pixels=100000") == 0
    assert skipped(tmp_path / "out") == [(i, reason) for i, (_, reason) in enumerate(bad, 1)]
    assert len(records(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("choice", "label"),
    [(0, 1.0), (1, 0.0), (1.0, 0.0), ("0", 1.0), ("image_1", 0.0), ("Left", 1.0), ("B ", 0.0), ("cat.png", 1.0)],
)
def test_choices(choice, label):
    assert label_of(choice, ("cat.png", "dog.png")) == label


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        *((choice, "tie") for choice in (None, "tie", "Both", "")),
        *((choice, "bad label") for choice in (2, 0.5, float("nan"), True, "mouse.png", [0])),
    ],
)
def test_choices_that_are_none(choice, reason):
    with pytest.raises(BadRow) as caught:
        label_of(choice, ("cat.png", "dog.png"))
    assert caught.value.reason == reason


def test_choices_that_count_from_1_are_refused(tmp_path, capsys):
    rows = [{"prompt": "x", "image_0": "a.jpg", "image_1": "b.jpg", "choice": choice} for choice in (1, 2)]
    write_lines(tmp_path / "choices.jsonl", rows)
    assert run("choices", tmp_path / "choices.jsonl", tmp_path / "out") == 2
    assert "line 2 chooses picture 2; expected 0 for the first" in capsys.readouterr().err


def test_choices_of_people(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.png").write_bytes(encoded(pixels(i), "PNG"))
    names = {"prompt": "a fox", "image_0": "0.png", "image_1": "1.png"}
    rows = [
        names | {"choice": "image_1"},
        names | {"choice": "tie"},
        names,
        {"prompt": "an ox", "images": ["1.png", "0.png"], "choice": 0},
        {"prompt": "an ox", "images": ["1.png"], "choice": 0},
    ]
    write_lines(folder / "choices.jsonl", rows)
    assert run("choices", folder / "choices.jsonl", tmp_path / "out") == 0
    assert skipped(tmp_path / "out") == [(1, "tie"), (2, "bad label"), (4, "line that is not of the format")]
    first, second = records(tmp_path / "out")
    assert (first.prompt, first.label, second.prompt, second.label) == ("a fox", 0.0, "an ox", 1.0)
    assert first.image_0 == second.image_1 == (folder / "0.png").read_bytes()


def test_captioned_pictures(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.jpg").write_bytes(jpeg(i, 40))
    rows = [{"file_name": f"{i}.jpg", "text": f"text {i}"} for i in range(5)]
    write_lines(folder / "metadata.jsonl", [*rows, {"file_name": "0.jpg"}])
    assert run("captioned", folder, tmp_path / "out") == 0
    assert skipped(tmp_path / "out") == [(5, "text that is missing")]
    write_lines(folder / "metadata.jsonl", rows)
    sources = [image_text.open_source(str(path), resolution=SIZE) for path in (folder, tmp_path / "out")]
    plain, prepared = (
        image_text.make_batch(source, batch_size=7, seed=0, epoch=1, resolution=SIZE) for source in sources
    )
    assert plain[1] == prepared[1]
    assert [[source.caption(i) for i in range(5)] for source in sources] == [[row["text"] for row in rows]] * 2
    assert sources[0].identity() != sources[1].identity()
    np.testing.assert_array_equal(plain[0], prepared[0])


# Pictures


@pytest.mark.parametrize("kind", ["grey", "alpha", "palette", "turned", "webp", "cmyk", "deep", "exif"])
def test_other_pictures_become_png_and_look_the_same(kind):
    image, exif = Image.fromarray(pixels(3)), Image.Exif()
    exif[0x0112] = 6
    clear = Image.merge("RGBA", [*image.split(), Image.fromarray(pixels(4)[..., 0])])
    content = {
        "grey": lambda: encoded(image.convert("L")),
        "alpha": lambda: encoded(clear, "PNG"),
        "palette": lambda: encoded(image.convert("P"), "PNG", transparency=0),
        "turned": lambda: encoded(image, exif=exif),
        "webp": lambda: encoded(image, "WEBP", lossless=True),
        "cmyk": lambda: encoded(image.convert("CMYK")),
        "exif": lambda: encoded(
            image, exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01\x03"
        ),  # broken, so that Pillow warns
        "deep": lambda: encoded(Image.fromarray(pixels(4)[..., 0].astype(np.uint16) * 256), "PNG"),
    }[kind]()
    kept = prepare_image(content, max_pixels=SIZE**2, resolution=None)
    with Image.open(io.BytesIO(kept)) as found:
        assert found.format == "PNG" and found.mode == "RGB" and not found.getexif()
    with warnings.catch_warnings(action="ignore"):
        expected = read_picture(content)
    np.testing.assert_array_equal(read_picture(kept), expected)


def test_pictures_are_resized_where_asked(tmp_path):
    write_parquet(tmp_path / "in.parquet", [row(0, jpg_0=jpeg(0, 64))])
    assert run("pick_a_pic", tmp_path / "in.parquet", tmp_path / "out", "--resolution=32") == 0
    (record,) = records(tmp_path / "out")
    assert read_picture(record.image_0).shape == read_picture(record.image_1).shape == (32, 32, 3)


def test_an_oversized_picture_is_not_decoded():
    header = encoded(Image.new("1", (8, 8)), "PNG")
    content = header[:16] + (60_000).to_bytes(4, "big") * 2 + header[24:]
    content = content[:29] + zlib.crc32(content[12:29]).to_bytes(4, "big") + content[33:]
    for max_pixels in (2**24, 10):
        with pytest.raises(BadRow) as caught:
            prepare_image(content, max_pixels=max_pixels, resolution=None)
        assert caught.value.reason == "oversized picture"


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lost_bytes_is_found(progressive):
    whole = encoded(pixels(5, 128), quality=90, progressive=progressive)
    assert is_whole(whole) and is_whole(whole + b"more") and is_whole(whole[:-2] + bytes(9) + whole[-2:])
    assert not is_whole(whole[:-2]) and not is_whole(whole[: len(whole) // 2])
    middle = len(whole) // 2
    assert not is_whole(whole[:middle] + b"\xff\x01" + whole[middle:])
    if not progressive:
        found = [not is_whole(whole[:i] + whole[i + 300 :]) for i in range(middle, len(whole) - 350, 40)]
        assert np.mean(found) > 0.8


@pytest.mark.parametrize("size", [1, 7, 16, 33])
@pytest.mark.parametrize("settings", [{}, {"optimize": True, "quality": 30}, {"subsampling": 0}, {"progressive": True}])
def test_a_jpeg_that_is_whole_is_kept(size, settings):
    for image in (pixels(6, size), np.full((size, size, 3), 90, np.uint8)):
        content = encoded(image, **settings)
        assert prepare_image(content, max_pixels=size**2, resolution=None) == content


# Cut off, and again


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """An input that takes a while, and what becomes of it in one go."""
    folder = tmp_path_factory.mktemp("many")
    rows = [row(i) | ({"jpg_0": b"no"} if i % 7 == 0 else {}) for i in range(30)]
    for i in range(4):
        large = [old | {"jpg_1": jpeg(i, 512)} for old in rows]
        write_parquet(folder / "in" / f"train-{i}.parquet", large, row_group_size=11)
    assert run("pick_a_pic", folder / "in", folder / "whole", "--shard_size=4") == 0
    return folder


def test_a_killed_conversion_goes_on_to_the_same_bytes(many, tmp_path):
    command = [sys.executable, "-m", "ddpo_jax.prepare", "--from=pick_a_pic", f"--input={many / 'in'}"]
    command += [f"--output={tmp_path / 'out'}", "--shard_size=4", "--num_workers=2"]
    root = Path(prepare.__file__).parents[1]
    with subprocess.Popen(command, cwd=root) as process:
        while not list((tmp_path / "out").glob("progress/0*.json")):
            assert process.poll() is None
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    told = len(list((tmp_path / "out").glob("progress/0*.json")))  # before a worker finishes yet another
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("preference-*")}
    assert 0 < len(done) < 30 and not (tmp_path / "out" / "dataset_info.json").exists()
    with pytest.raises(UserError, match="not finished"):
        preferences.open_source(str(tmp_path / "out"), resolution=SIZE)
    assert subprocess.run(command, cwd=root, capture_output=True).returncode == 0
    assert files(tmp_path / "out") == files(many / "whole")
    assert not list((tmp_path / "out").glob("progress/*.new"))
    assert sum(path.stat().st_mtime_ns == done.get(path) for path in (tmp_path / "out").glob("preference-*")) >= told


def test_a_shard_that_is_gone_is_made_again(many):
    before = files(many / "whole")
    victim = sorted((many / "whole").glob("preference-*"))[3]
    victim.unlink()
    assert run("pick_a_pic", many / "in", many / "whole", "--shard_size=4") == 0
    assert files(many / "whole") == before


def test_other_input_and_settings_are_refused(tmp_path, capsys):
    source, output = tmp_path / "in.parquet", tmp_path / "out"
    write_parquet(source, [row(0), row(1)])
    assert run("pick_a_pic", source, output) == 0
    before = files(output)
    for flag, name in [
        ("--shard_size=7", "shard_size"),
        ("--max_pixels=9999", "max_pixels"),
        ("--resolution=8", "resol"),
    ]:
        assert run("pick_a_pic", source, output, flag) == 2
        assert f"begun with other {name}" in capsys.readouterr().err
    write_parquet(source, [row(0), row(3)])
    assert run("pick_a_pic", source, output) == 2
    assert "begun with other input" in capsys.readouterr().err
    assert files(output) == before


def test_what_cannot_be_converted_is_one_line(tmp_path, capsys):
    write_parquet(tmp_path / "ties.parquet", [row(0, label_0=0.5, label_1=0.5)])
    parquet.write_table(pa.table({"caption": ["a fox"]}), tmp_path / "columns.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "splits").mkdir()
    (tmp_path / "empty.jsonl").touch()
    for name in ("train-0", "test-0"):
        write_parquet(tmp_path / "splits" / f"{name}.parquet", [row(0)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for form, source, output, message in [
        ("pick_a_pic", "ties.parquet", "a", "no row to keep: 1 tie"),
        ("pick_a_pic", "columns.parquet", "b", "no column jpg_0, jpg_1, label_0"),
        ("pick_a_pic", "broken.parquet", "c", "not a parquet file"),
        ("pick_a_pic", "splits", "d", "splits test, train; give one"),
        ("pick_a_pic", "gone", "e", "no parquet file"),
        ("pairs", "splits", "f", "a folder without it"),
        ("captioned", "gone", "g", "no such file or folder"),
        ("choices", "gone", "h", "no such file or folder"),
        ("choices", "empty.jsonl", "i", "no row in it"),
        ("pick_a_pic", "splits/train-0.parquet", "full", "holds something else"),
    ]:
        assert run(form, tmp_path / source, tmp_path / output) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
        assert not (tmp_path / output / "dataset_info.json").exists()


# Reading


def test_tensorflow_datasets_opens_it_without_tensorflow(many):
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        "source = tfds.builder_from_directory(sys.argv[1]).as_data_source(split='train')\n"
        "row = source[5]\n"
        "print(len(source), row['image_1'].shape, row['prompt'].decode(), float(row['label']))\n"
        "from ddpo_jax import preferences\n"
        "preferences.open_source(sys.argv[1], resolution=8).get(5)\n"
        "print('tensorflow' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(many / "whole")]
    root = Path(prepare.__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["100", "(512,", "512,", "3)", "prompt", "6", "0.0", "False"]


def test_a_broken_data_set_is_refused(tmp_path):
    write_parquet(tmp_path / "in.parquet", [row(i) for i in range(50)])
    output = tmp_path / "out"
    assert run("pick_a_pic", tmp_path / "in.parquet", output) == 0
    (path,) = output.glob("preference-*")
    content = path.read_bytes()
    path.write_bytes(content[:70_000] + bytes(2000) + content[72_000:])
    with pytest.raises(UserError, match=r"index \d+: a broken shard"):
        records(output)
    path.unlink()
    with pytest.raises(UserError, match="1 shards are not there"):
        records(output)
    (output / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="not a data set that can be opened"):
        records(output)


def test_the_other_kind_is_refused(many, tmp_path):
    with pytest.raises(UserError, match="a data set of kind 'preference'; expected 'captioned'"):
        image_text.open_source(str(many / "whole"), resolution=SIZE)


def test_a_missing_extra_says_what_to_install(many, monkeypatch):
    for name in ("tensorflow_datasets", "grain"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(UserError, match=r"pip install 'ddpo_jax\[data\]'"):
                preferences.open_source(str(many / "whole"), resolution=SIZE)


def test_rounds_after_a_resume_hold_each_remaining_pair_once(many):
    source = preferences.open_source(str(many / "whole"), resolution=SIZE)
    settings = {"batch_size": 10, "seed": 3, "resolution": SIZE, "horizontal_flip": False}
    names = [(record.prompt, record.image_1) for record in records(many / "whole")]
    assert len(names) == source.length == 100
    before = [preferences.make_batch(source, epoch=epoch, **settings) for epoch in range(4)]
    again = preferences.open_source(str(many / "whole"), resolution=SIZE)
    after = [preferences.make_batch(again, epoch=epoch, **settings) for epoch in range(4, 10)]
    seen = [
        (prompt, image.tobytes())
        for batch in (*before, *after)
        for prompt, image in zip(batch.prompts, batch.images[:, 1], strict=True)
    ]
    assert len(seen) == len(set(seen)) == 100
