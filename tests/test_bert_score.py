"""BERTScore: what holds of it for any encoder, how few programs it compiles, and what it says of broken folders."""

import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_bert import CONFIGS, LENGTH, TEXTS, edit_json, write_encoder

from ddpo_jax.errors import UserError
from ddpo_jax.models.encoder import read_encoder
from ddpo_jax.models.locate import encoder_files
from ddpo_jax.rewards.bert_score import LENGTHS, Texts, batches, choose_layer, load, match, score


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Do not write to them."""
    return {name: write_encoder(tmp_path_factory.mktemp(name), name) for name in CONFIGS}


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: load(str(folder), layer=2) for name, folder in folders.items()}


def texts(states, lengths):
    """Texts of these lengths, the tokens at both ends without weight."""
    place, ends = np.arange(states.shape[1])[None], np.asarray(lengths)[:, None]
    weight = ((place > 0) & (place < ends - 1)).astype(np.float32)
    return Texts(np.zeros(states.shape[:2], np.int32), place < ends, weight)


def test_worked_by_hand():
    """Two words against one and the ends, which are matched with but do not count."""
    x, y, z = np.eye(3, dtype=np.float32)
    candidate = jnp.asarray(np.stack([z, x, 3 * x + 4 * y, z])[None])
    reference = jnp.asarray(np.stack([-z, 2 * y, z])[None])
    found = match(candidate, reference, candidates=texts(candidate, [4]), references=texts(reference, [3]))
    np.testing.assert_allclose(found.precision, [(0 + 0.8) / 2], rtol=1e-6)
    np.testing.assert_allclose(found.recall, [0.8], rtol=1e-6)
    np.testing.assert_allclose(found.f1, [2 * 0.4 * 0.8 / 1.2], rtol=1e-6)


def test_padding_is_matched_with_nothing():
    """Not even where all that is there is unlike."""
    rng = np.random.default_rng(0)
    candidate, reference = (jnp.asarray(rng.normal(size=(2, 5, 4)) + shift, jnp.float32) for shift in (3, -3))
    whole = match(
        candidate[:, :4], reference[:, :3], candidates=texts(candidate[:, :4], [4, 4]),
        references=texts(reference[:, :3], [3, 3]),
    )  # fmt: skip
    padded = match(candidate, reference, candidates=texts(candidate, [4, 4]), references=texts(reference, [3, 3]))
    np.testing.assert_allclose(np.stack(padded), np.stack(whole), rtol=1e-6)
    assert (np.stack(padded) < 0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_text_says_the_same_as_itself_and_others_less(loaded, name):
    np.testing.assert_allclose(np.stack(score(loaded[name], TEXTS, TEXTS)), 1, atol=1e-5)
    others = score(loaded[name], TEXTS, TEXTS[1:] + TEXTS[:1])
    assert (np.stack(others) < 0.97).all()
    assert all(value.dtype == np.float32 and value.shape == (4,) for value in others)


@pytest.mark.parametrize("name", CONFIGS)
def test_precision_and_recall_change_places_with_the_texts(loaded, name):
    there = score(loaded[name], TEXTS, TEXTS[1:] + TEXTS[:1])
    back = score(loaded[name], TEXTS[1:] + TEXTS[:1], TEXTS)
    np.testing.assert_allclose(np.stack(there), np.stack([back.recall, back.precision, back.f1]), atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_neither_order_nor_company_matters(loaded, name):
    candidates, references = TEXTS * 4, TEXTS[1:] * 4 + TEXTS
    references = references[: len(candidates)]
    found = np.stack(score(loaded[name], candidates, references))
    order = np.random.default_rng(0).permutation(len(candidates))
    turned = score(loaded[name], [candidates[i] for i in order], [references[i] for i in order])
    np.testing.assert_allclose(np.stack(turned), found[:, order], atol=1e-5)
    np.testing.assert_allclose(np.stack(score(loaded[name], candidates[:1], references[:1])), found[:, :1], atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_empty_text_scores_nothing(loaded, name):
    found = score(loaded[name], ["", " \n", "an owl", ""], ["an owl", "an owl", "", ""])
    np.testing.assert_array_equal(np.stack(found), 0)
    np.testing.assert_allclose(np.stack(score(loaded[name], ["", "an owl"], ["an owl"] * 2)), [[0, 1]] * 3, atol=1e-5)
    assert all(value.shape == (0,) for value in score(loaded[name], [], []))


def test_white_space_around_a_text_is_not_seen(loaded):
    for bert in loaded.values():
        assert bert.tokenizer.tokenize([" an owl\n"]) == bert.tokenizer.tokenize(["an owl"])


def test_a_long_text_is_cut(loaded):
    for bert in loaded.values():
        assert bert.tokenizer.max_length == LENGTH
        (ids,) = bert.tokenizer.tokenize(["an owl " * LENGTH])
        assert len(ids) == LENGTH and {ids[0], ids[-1]} == bert.tokenizer.ends


@pytest.mark.parametrize(("own", "length"), [(None, LENGTH), (1000, LENGTH), (10, 10)])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_length_is_the_lesser_of_the_tokenizers_and_the_models(folders, tmp_path, name, own, length):
    folder = shutil.copytree(folders[name], tmp_path / "bert")
    edit_json(folder / "tokenizer_config.json", model_max_length=own)
    bert = load(str(folder), layer=1)
    assert bert.tokenizer.max_length == length == len(bert.tokenizer.tokenize(["an owl " * LENGTH])[0])


def test_few_programs_are_compiled(loaded):
    bert = loaded["bert"]
    for count in (1, 3, 8):
        score(bert, (TEXTS * 2)[:count], TEXTS[:1] * count)
    assert bert.compare._cache_size() <= 2  # another test may have compiled the larger


def test_batches_hold_every_row_once_and_have_few_shapes():
    rng = np.random.default_rng(0)
    shapes = set()
    for count in (1, 8, 9, 300, 1000):
        lengths = rng.integers(2, 513, count).tolist()
        found = list(batches(lengths, 512))
        assert sorted(row for rows, _ in found for row in rows) == list(range(count))
        for rows, (pairs, length) in found:
            assert len(rows) <= pairs and max(lengths[row] for row in rows) <= length
        shapes |= {shape for _, shape in found}
    assert len(shapes) <= 2 * (len(LENGTHS) + 1)


def test_candidates_and_references_are_pairs(loaded):
    with pytest.raises(ValueError, match="2 candidates and 1 references"):
        score(loaded["bert"], ["a", "b"], ["a"])


PUBLISHED = {
    "bert-base-uncased": ("bert", 12, 768, 9),
    "bert-large-uncased": ("bert", 24, 1024, 18),
    "roberta-base": ("roberta", 12, 768, 10),
    "roberta-large": ("roberta", 24, 1024, 17),
    "microsoft/deberta-large-mnli": ("deberta", 24, 1024, 18),
    "microsoft/deberta-xlarge-mnli": ("deberta", 48, 1024, 40),
}


@pytest.mark.parametrize(("name", "num_layers", "width", "layer"), PUBLISHED.values(), ids=PUBLISHED)
def test_the_layer_of_a_published_encoder(folders, tmp_path, name, num_layers, width, layer):
    folder = shutil.copytree(folders[name], tmp_path / "bert")
    edit_json(folder / "config.json", num_hidden_layers=num_layers, hidden_size=width, num_attention_heads=16)
    assert choose_layer(read_encoder(folder), 0) == layer
    assert choose_layer(read_encoder(folder), 1) == 1


def test_torch_is_not_loaded(folders):
    code = (
        "import sys\n"
        "from ddpo_jax.rewards.bert_score import load, score\n"
        "for folder in sys.argv[1:]:\n"
        "    score(load(folder, layer=1), ['a fox'], ['an owl'])\n"
        "print(*{'torch', 'bert_score', 'tensorflow'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, *map(str, folders.values())]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_layers_differ(folders, loaded):
    found = [score(load(str(folders["bert"]), layer=layer), TEXTS[:1], TEXTS[1:2]).f1 for layer in (1, 3)]
    assert len({float(f1[0]) for f1 in found}) == 2


def test_later_layers_heads_and_old_names_are_passed_over(folders, loaded, tmp_path):
    """As a folder of BertForPreTraining, converted from TensorFlow, holds them."""
    folder = shutil.copytree(folders["bert"], tmp_path / "bert")
    tensors = load_file(folder / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {f"bert.{re.sub('LayerNorm.*', lambda m: old[m[0]], name)}": x for name, x in tensors.items()}
    heads = ("bert.pooler.dense.weight", "cls.predictions.bias", "cls.seq_relationship.weight", "classifier.bias")
    extra = {name: np.zeros(2, np.float32) for name in heads} | {"bert.embeddings.position_ids": np.arange(3)[None]}
    save_file(renamed | extra, folder / "model.safetensors")
    found, expected = (score(bert, TEXTS[:2], TEXTS[1:3]) for bert in (load(str(folder), layer=2), loaded["bert"]))
    np.testing.assert_array_equal(np.stack(found), np.stack(expected))
    assert "layer_2" not in load(str(folder), layer=2).params["encoder"]


def test_positions_that_deberta_does_not_read_are_passed_over(folders, tmp_path):
    folder = shutil.copytree(folders["deberta"], tmp_path / "bert")
    tensors = load_file(folder / "model.safetensors")
    positions = {"deberta.embeddings.position_embeddings.weight": np.zeros((LENGTH, 16), np.float32)}
    save_file({f"deberta.{name}": x for name, x in tensors.items()} | positions, folder / "model.safetensors")
    load(str(folder), layer=3)


def test_what_is_fetched_from_the_hub():
    wanted = ["config.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.json", "model.safetensors"]
    unwanted = ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "README.md"]
    patterns = encoder_files(wanted + unwanted)
    assert [name for name in wanted + unwanted if any(fnmatch(name, pattern) for pattern in patterns)] == wanted
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        encoder_files(["config.json", "pytorch_model.bin"])


def remove(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def edit(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def edit_tokenizer(**changes):
    return lambda folder: edit_json(folder / "tokenizer_config.json", **changes)


def cut(name, keep):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return change


def edit_tensors(change):
    def edit_file(folder):
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")

    return edit_file


def drop(name):
    return edit_tensors(lambda tensors: {key: x for key, x in tensors.items() if key != name})


def add(name):
    return edit_tensors(lambda tensors: tensors | {name: np.zeros(2, np.float32)})


BROKEN = {  # the encoder, what is done to its folder, what is told
    "no folder": ("bert", shutil.rmtree, r"reward\.bert_model=.*no such folder"),
    "no config": ("bert", remove("config.json"), r"config\.json: no such file"),
    "no weights": ("bert", remove("model.safetensors"), r"model\.safetensors: no such file"),
    "half the weights": ("bert", cut("model.safetensors", 0.5), r"model\.safetensors: not a whole safetensors file"),
    "no vocabulary": ("bert", remove("vocab.txt"), r"expected tokenizer\.json, or vocab\.txt; the"),
    "no merges": ("roberta", remove("merges.txt"), r"expected tokenizer\.json, or vocab\.json and merges\.txt"),
    "half a vocabulary": ("bert", cut("vocab.txt", 0.5), r"the tokenizer knows \d+ tokens, but .*vocab_size=40"),
    "half the merges": ("deberta", cut("merges.txt", 0.4), r"merges\.txt: \d+ merges are too few for the 300"),
    "half of JSON": ("roberta", cut("vocab.json", 0.5), r"vocab\.json: not valid JSON"),
    "another tokenizer": ("bert", edit_tokenizer(tokenizer_class="T5Tokenizer"), "tokenizer_class 'T5Tokenizer' is"),
    "nothing to split words": (
        "bert",
        edit_tokenizer(tokenizer_class="PreTrainedTokenizerFast"),
        "tokenizer.json; the",
    ),
    "fewer tokens": ("roberta", edit(vocab_size=280), "the tokenizer knows 300 tokens, but"),
    "version 2": ("deberta", edit(model_type="deberta-v2"), r"model_type 'deberta-v2' .*only version 1, such as"),
    "another model": ("bert", edit(model_type="t5"), "model_type 't5' is not supported; expected bert, roberta,"),
    "two models": ("bert", edit(model_type=["bert"]), r"model_type \['bert'\] is not supported"),
    "no model": ("bert", edit(model_type=None), "model_type None is not supported"),
    "another activation": ("bert", edit(hidden_act="relu"), r"config\.json: hidden_act='relu' is not supported"),
    "heads": ("bert", edit(num_attention_heads=3), "hidden_size=16 must be divisible by num_attention_heads=3"),
    "positions": ("bert", edit(position_embedding_type="relative_key"), "position_embedding_type='relative_key'"),
    "no room": ("roberta", edit(max_position_embeddings=3), "leaves no room for a text"),
    "other terms": ("deberta", edit(pos_att_type="c2p|p2p"), "pos_att_type='c2p|p2p' is not supported"),
    "talking heads": ("deberta", edit(talking_head=True), "talking_head=True is not supported"),
    "narrow embeddings": ("deberta", edit(embedding_size=8), "embedding_size=8 is not supported; expected 16"),
    "wider": ("bert", edit(intermediate_size=48), "has shape"),
    "a tensor less": (
        "bert",
        drop("encoder.layer.1.output.dense.bias"),
        "'encoder.layer.1.output.dense.bias' is missi",
    ),
    "a tensor more": ("bert", add("encoder.gain"), r"1 tensors have no place .*'encoder\.gain'"),
    "a layer too far": ("bert", add("encoder.layer.3.output.dense.bias"), "1 tensors have no place"),
    "positions that are not its own": ("bert", add("embeddings.position_embeddings_2.weight"), "have no place"),
    "no relative positions": ("deberta", edit(relative_attention=False), "tensors have no place"),
}


@pytest.mark.parametrize(("name", "break_it", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_encoder_is_one_error(folders, tmp_path, name, break_it, message):
    folder = shutil.copytree(folders[name], tmp_path / "bert")
    break_it(folder)
    with pytest.raises(UserError, match=message) as raised:
        load(str(folder), layer=2)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("source", ["", "tiny"])
def test_there_is_no_encoder_of_ones_own(source):
    with pytest.raises(UserError, match=rf"reward\.bert_model='{source}': BERTScore needs an encoder"):
        load(source, layer=0)


@pytest.mark.parametrize(
    ("layer", "message"), [(4, "expected 1 to 3"), (-1, "expected 1 to 3"), (0, "set reward.bert")]
)
def test_a_layer_that_is_not_there(folders, layer, message):
    with pytest.raises(UserError, match=message) as raised:
        load(str(folders["bert"]), layer=layer)
    assert "reward.bert_layer" in str(raised.value)
