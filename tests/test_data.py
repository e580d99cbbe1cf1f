"""Prompts and captioned images: pure in (seed, epoch), tokens cut at the right place, and failures that say the fix."""

import json
import re
import string
import sys

import numpy as np
import pytest
from PIL import Image

from ddpo_jax import data, image_text
from ddpo_jax.errors import UserError
from ddpo_jax.models.tokenizer import find_too_long, load_tokenizer, tokenize
from ddpo_jax.plugins import load_object

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 8


@pytest.fixture(scope="module")
def vocab_folder(tmp_path_factory):
    """A CLIP tokenizer of single letters and of one word, "fox", as vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = string.ascii_lowercase
    tokens = [*letters, *(letter + "</w>" for letter in letters), "fo", "fox</w>", START, END]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nf o\nfo x</w>\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer(vocab_folder):
    return load_tokenizer(vocab_folder)


@pytest.fixture(scope="module")
def prompts():
    return data.prompt_source("common_animals")


@pytest.fixture(scope="module")
def tokens(prompts):
    """A table whose rows tell which prompt they are of."""
    return np.arange(len(prompts.texts), dtype=np.int32)[:, None] * 100 + np.arange(LENGTH, dtype=np.int32)


def write_pictures(folder, count, extra=""):
    """A folder of one-colour pictures with their index as red value and as caption."""
    for i in range(count):
        Image.new("RGB", (12, 8), (i, 0, 0)).save(folder / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": str(i)}) for i in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join([*rows, extra]), encoding="utf-8")
    return image_text.open_source(str(folder), resolution=4)


def captions_of(source, *, epoch, seed=0, batch_size=4):
    return image_text.make_batch(source, batch_size=batch_size, seed=seed, epoch=epoch, resolution=4)[1]


# The tokenizer


def test_tokens_are_padded_and_keep_the_end_token_where_cut(tokenizer, vocab_folder):
    ids = json.loads((vocab_folder / "vocab.json").read_text())
    short, long = tokenize(tokenizer, ["A fox", "fox " * 50])
    np.testing.assert_array_equal(short, [ids[START], ids["a</w>"], ids["fox</w>"], *[ids[END]] * (LENGTH - 3)])
    np.testing.assert_array_equal(long, [ids[START], *[ids["fox</w>"]] * (LENGTH - 2), ids[END]])


def test_padding_token_is_the_checkpoints_own(vocab_folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((vocab_folder / name).read_bytes())
    config = json.loads((vocab_folder / "tokenizer_config.json").read_text()) | {"pad_token": "z"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert set(tokenize(load_tokenizer(tmp_path), ["a"])[0, 3:]) == {string.ascii_lowercase.index("z")}


def test_tokenizer_json_alone_gives_the_same_tokens(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    texts = ["a fox", "An ant, playing chess!", "", "f o x"]
    again = load_tokenizer(tmp_path)
    np.testing.assert_array_equal(tokenize(again, texts), tokenize(tokenizer, texts))


def test_too_long_are_exactly_the_prompts_that_lose_words(tokenizer):
    texts = ["fox " * count for count in range(1, 2 * LENGTH)]
    too_long = find_too_long(tokenizer, texts)
    assert too_long == tuple(texts[LENGTH - 2 :])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", None, "expected vocab.json and merges.txt"),
        ("vocab.json", "{", "not a CLIP tokenizer"),
        ("tokenizer_config.json", "{}", "expected model_max_length"),
    ],
)
def test_broken_tokenizer_folder(vocab_folder, tmp_path, name, content, message):
    for path in vocab_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


# Prompt sets


@pytest.mark.parametrize(
    ("name", "count", "examples"),
    [
        ("imagenet_animals", 398, ["tench", "Chihuahua", "puffer"]),
        ("common_animals", 45, ["a fox", "an ant"]),
        ("animal_activities", 135, ["an ant playing chess", "a cat washing the dishes"]),
        ("unseen_animals", 45, ["a capybara", "an octopus"]),
        ("unseen_animal_activities", 135, ["a crab playing chess"]),
        ("unseen_activities", 270, ["a horse typing on a keyboard"]),
        (
            "counting",
            45 * 7,
            ["two mice", "eight wolves", "three butterflies", "five monkeys", "two sheep", "six geese"],
        ),
    ],
)
def test_built_in_sets(name, count, examples):
    found = data.prompt_source(name)
    assert len(found.texts) == len(set(found.texts)) == len(found.metadata) == count
    assert set(examples) <= set(found.texts)
    assert all(text == text.strip() and "," not in text for text in found.texts)


def test_what_is_unseen_is_in_no_set_to_train_on():
    seen = {text for name in ("common_animals", "animal_activities") for text in data.prompt_source(name).texts}
    for name in ("unseen_animals", "unseen_animal_activities", "unseen_activities"):
        assert not seen & set(data.prompt_source(name).texts)


def test_counting_asks_for_what_the_prompt_says():
    found = data.prompt_source("counting")
    metadata = found.metadata[found.texts.index("three foxes")]
    assert metadata["questions"] == ("How many foxes are there in this image?", "What animal is in this image?")
    assert metadata["answers"] == ("three", "fox")


def test_file_and_list_give_the_same_set(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa fox\r\n\r\n  an élan  \na cat\u2028and a dog\na fox\n".encode())
    expected = ("a fox", "an élan", "a cat\u2028and a dog")
    assert data.prompt_source(str(path)).texts == expected
    assert data.prompt_source("", [*expected, "a fox "]).texts == expected


def test_file_that_cannot_be_used(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("a fox\nan élan\n".encode("latin-1"))
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        data.prompt_source(str(path))
    path.write_text("\n \n")
    with pytest.raises(UserError, match="no prompt in it"):
        data.prompt_source(str(path))


@pytest.mark.parametrize("name", ["", "comon_animals", "a fox in the snow, " * 40, "."])
def test_unknown_name_says_the_choices(name):
    with pytest.raises(UserError, match=re.escape(", ".join(data.PROMPT_SETS))):
        data.prompt_source(name)


@pytest.mark.parametrize("entry", [3, None, " "])
def test_list_entry_that_is_no_prompt(entry):
    with pytest.raises(UserError, match=re.escape(f"{entry!r} is not a prompt")):
        data.prompt_source("", ["a fox", entry])


@pytest.mark.parametrize("fraction", [0.03, 0.2, 0.9])
def test_split_is_a_stable_partition(fraction):
    whole = data.prompt_source("counting")
    train, held_out = data.split(whole, fraction=fraction, seed=3)
    assert (train, held_out) == data.split(whole, fraction=fraction, seed=3)
    assert not set(train.texts) & set(held_out.texts)
    assert set(train.texts) | set(held_out.texts) == set(whole.texts)
    assert len(held_out.texts) == pytest.approx(fraction * len(whole.texts), abs=0.5)
    known = dict(zip(whole.texts, whole.metadata, strict=True))
    assert all(known[text] is found for text, found in zip(held_out.texts, held_out.metadata, strict=True))
    assert held_out != data.split(whole, fraction=fraction, seed=4)[1]


def test_split_of_nothing_keeps_everything(prompts):
    assert data.split(prompts, fraction=0.0, seed=1) == (prompts, data.PromptSet((), ()))


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 0.001, 0.999, float("nan")])
def test_split_that_leaves_a_side_without_prompts(prompts, fraction):
    with pytest.raises(UserError, match=r"prompts\.held_out"):
        data.split(prompts, fraction=fraction, seed=0)


# Batches of prompts


def draw(prompts, tokens, *, seed=0, epoch=0, num_prompts=6, num_samples_per_prompt=3):
    return data.draw(
        prompts,
        tokens,
        num_prompts=num_prompts,
        num_samples_per_prompt=num_samples_per_prompt,
        seed=seed,
        epoch=epoch,
    )


def test_draw_is_pure_in_seed_and_epoch(prompts, tokens):
    texts = draw(prompts, tokens, seed=1, epoch=2).texts
    draw(prompts, tokens, seed=1, epoch=3)
    assert draw(prompts, tokens, seed=1, epoch=2).texts == texts
    others = [(1, 3), (2, 2), (2, 1), (0, 0)]
    assert all(draw(prompts, tokens, seed=seed, epoch=epoch).texts != texts for seed, epoch in others)


def test_draw_repeats_each_prompt_in_a_row_and_keeps_its_fields_together(prompts, tokens):
    drawn = draw(prompts, tokens)
    assert len(drawn.texts) == len(drawn.id) == len(drawn.tokens) == len(drawn.metadata) == 18
    groups = drawn.id.reshape(6, 3)
    np.testing.assert_array_equal(groups, groups[:, :1].repeat(3, 1))
    assert drawn.texts == tuple(prompts.texts[i] for i in drawn.id)
    np.testing.assert_array_equal(drawn.tokens[:, 0], drawn.id * 100)


def test_draw_is_uniform(prompts, tokens):
    counts = np.bincount(draw(prompts, tokens, num_prompts=45_000, num_samples_per_prompt=1).id, minlength=45)
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000)


@pytest.mark.parametrize("count", [1, 2, 7, 44, 45])
def test_every_spreads_distinct_prompts_over_the_set(prompts, tokens, count):
    ids = data.every(prompts, tokens, count=count).id
    gaps = np.diff([*ids, ids[0] + 45])
    assert len(ids) == count and (gaps > 0).all() and gaps.max() - gaps.min() <= 1


def test_every_goes_round_a_small_set(prompts, tokens):
    ids = data.every(prompts, tokens, count=100).id
    np.testing.assert_array_equal(ids, [*range(45), *range(45), *range(10)])


# Captioned images


def test_passes_over_a_folder_hold_each_picture_once(tmp_path):
    source = write_pictures(tmp_path, 6)
    assert source.length == 6
    seen = sum((captions_of(source, epoch=epoch) for epoch in range(3)), ())
    first, second = seen[:6], seen[6:]
    assert sorted(first) == sorted(second) == list("012345")
    assert first != second
    assert captions_of(source, epoch=1) == seen[4:8]
    assert captions_of(source, epoch=0, seed=1, batch_size=6) != first


def test_pictures_keep_their_captions(tmp_path):
    source = write_pictures(tmp_path, 6)
    images, captions = image_text.make_batch(source, batch_size=6, seed=0, epoch=0, resolution=4)
    assert images[:, 0, 0, 0].tolist() == [int(caption) for caption in captions]
    white = tmp_path / "white.png"
    Image.new("L", (5, 5), 255).save(white)
    assert (image_text.load_image(white, 4) == 255).all()
    Image.new("RGBA", (5, 5), (9, 9, 9, 0)).save(white)
    assert (image_text.load_image(white, 4) == 255).all()


def test_a_large_jpeg_looks_as_if_decoded_at_full_size(tmp_path):
    y, x = np.mgrid[0:512, 0:512] / 512
    image = Image.fromarray((np.stack([x, y, np.sin(9 * x * y) ** 2], -1) * 255).astype(np.uint8))
    image.save(tmp_path / "large.jpg", quality=95)
    expected = np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(image_text.load_image(tmp_path / "large.jpg", 64) - expected).mean() < 1


def test_picture_is_upright_and_cut_at_its_centre(tmp_path):
    # 12 x 4 as shown: red, green and blue squares from left to right; the centre is green, and white at its top.
    shown = np.zeros((4, 12, 3), np.uint8)
    for i in range(3):
        shown[:, 4 * i : 4 * i + 4, i] = 255
    shown[0, 4:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: stored turned by 90 degrees against the clock
    path = tmp_path / "turned.png"
    Image.fromarray(np.rot90(shown).copy()).save(path, exif=exif)
    np.testing.assert_array_equal(image_text.load_image(path, 4), shown[:, 4:8])


def test_caption_may_hold_any_character(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    row = json.dumps({"file_name": "x.png", "text": "a\u2028b\x85c"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(f"\ufeff{row}\n\n", encoding="utf-8")
    assert captions_of(image_text.open_source(str(tmp_path), resolution=4), epoch=0, batch_size=1) == ("a\u2028b\x85c",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: expected file_name and text"),
        ('{"file_name": "0.png"}', "line 3: expected file_name and text"),
        ('["0.png", "a fox"]', "line 3: expected file_name and text"),
        ('{"file_name": "0.png", "text": null}', "line 3: expected a string for text"),
        ('{"file_name": "gone.png", "text": "a fox"}', "line 3: no such file 'gone.png'"),
    ],
)
def test_metadata_line_that_cannot_be_used(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        write_pictures(tmp_path, 2, extra=line)


def test_folder_that_cannot_be_used(tmp_path):
    for source, message in [(tmp_path, "a folder without it"), (tmp_path / "gone", "no such folder")]:
        with pytest.raises(UserError, match=message):
            image_text.open_source(str(source), resolution=4)
    with pytest.raises(UserError, match="holds no image"):
        write_pictures(tmp_path, 0)
    source = write_pictures(tmp_path, 1)
    for content in [b"", b"not a picture", (tmp_path / "0.png").read_bytes()[:-30]]:
        (tmp_path / "0.png").write_bytes(content)
        with pytest.raises(UserError, match=r"0\.png: not a picture"):
            source.get(0)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Writes a module next to where the user runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(name, code):
        (tmp_path / f"{name}.py").write_text(code)
        return name

    return write


def test_function_of_the_users_own_never_gives_the_same_index_twice(user_module):
    name = user_module("user_pictures", "import numpy as np\ndef get(i): return np.zeros((4, 4, 3), 'uint8'), str(i)\n")
    source = image_text.open_source(f"{name}:get", resolution=4)
    assert source.length is None
    seen = [captions_of(source, seed=seed, epoch=epoch) for seed in (0, 1, 42) for epoch in range(3)]
    assert len(set(sum(seen, ()))) == 9 * 4
    assert captions_of(source, seed=42, epoch=2) == seen[-1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("None", "expected (image, caption), found NoneType"),
        ("np.zeros((4, 4, 3), 'uint8'), 7", "expected a caption, found int"),
        ("np.zeros((4, 4, 3), 'float32'), 'a fox'", "found float32 of shape (4, 4, 3)"),
        ("np.zeros((5, 4, 3), 'uint8'), 'a fox'", "expected a uint8 image of shape (4, 4, 3), found uint8 of shape (5"),
    ],
)
def test_function_of_the_users_own_that_gives_something_else(value, message):
    source = image_text.ImageText(lambda index: eval(value, {"np": np}), None)
    with pytest.raises(UserError, match=re.escape(message)):
        captions_of(source, epoch=0)


def test_load_object_says_what_is_wrong(user_module):
    user_module("user_code", "limit = 3\ndef score(): return 1\n")
    user_module("user_broken", "import module_that_is_not_installed\n")
    assert load_object("user_code:score")() == 1
    for spec, message in [
        ("user_code", "expected module:function"),
        (":score", "expected module:function"),
        ("user_gone:score", "No module named 'user_gone'"),
        ("user_broken:score", "No module named 'module_that_is_not_installed'"),
        ("user_code:gone", "has no 'gone'"),
        ("sys:gone", "has no 'gone'"),
        ("user_code:limit", "expected a function, found int"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            load_object(spec)
