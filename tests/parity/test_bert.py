"""Encoders beside transformers', BERTScore beside the bert-score package, and both beside a plain greedy matching."""

import warnings

import numpy as np
import pytest
from small_bert import CONFIGS, LENGTH, TEXTS, edit_json, write_tokenizer

from ddpo_jax.models.encoder import load_text_tokenizer, read_encoder, read_parameters
from ddpo_jax.rewards.bert_score import load, score
from ddpo_jax.sharding import first_device

with warnings.catch_warnings():  # what these warn about on import is not ours to fix
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from random_torch import randomise, relative_error
    from transformers import (
        AutoConfig,
        AutoTokenizer,
        BertForPreTraining,
        BertModel,
        DebertaForSequenceClassification,
        DebertaModel,
        RobertaForMaskedLM,
        RobertaForSequenceClassification,
        RobertaModel,
        XLMRobertaModel,
    )

DEBERTA = CONFIGS["deberta"]
# What is written to a folder, and the fields that differ from the small ones.
MODELS = {
    "bert": (BertModel, "bert", {}),
    "bert with heads": (BertForPreTraining, "bert", {}),
    "roberta": (RobertaModel, "roberta", {}),
    "roberta for masked tokens": (RobertaForMaskedLM, "roberta", {}),
    "roberta for classes": (RobertaForSequenceClassification, "roberta", {}),
    "xlm-roberta": (XLMRobertaModel, "roberta", {"model_type": "xlm-roberta"}),
    "deberta": (DebertaModel, "deberta", {}),
    "deberta for classes": (DebertaForSequenceClassification, "deberta", {}),
    "deberta that sees near": (DebertaModel, "deberta", {"max_relative_positions": 5}),
    "deberta c2p": (DebertaModel, "deberta", {"pos_att_type": "c2p"}),
    "deberta p2c": (DebertaModel, "deberta", {"pos_att_type": ["p2c"]}),
    "deberta with positions and segments": (
        DebertaModel,
        "deberta",
        {"relative_attention": False, "pos_att_type": None, "position_biased_input": True, "type_vocab_size": 2},
    ),
}
SCORED = ("bert with heads", "roberta", "deberta for classes")
# Of unlike lengths, a longer one than the encoder takes, an empty one, white space, a candidate that is its reference.
CANDIDATES = (*TEXTS, "an owl " * LENGTH, "  A fox on the shore\n", "", "two whales", TEXTS[0])
REFERENCES = (*TEXTS[1:], TEXTS[0], TEXTS[3], "the  fox", "an owl", "", TEXTS[0])


def write(folder, kind):
    """A folder as save_pretrained writes it, with vocabulary files alone beside it."""
    make, name, fields = MODELS[kind]
    config = AutoConfig.for_model(**CONFIGS[name] | fields)
    model = randomise(make(config))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "embeddings" in key and parameter.ndim > 1:
                parameter.mul_(parameter.shape[1] ** 0.5)
            elif key.endswith("LayerNorm.weight"):
                parameter.mul_(2)  # so that states point every way, and scores are far from 1
            elif key.endswith("bias"):
                parameter.sub_(0.5)
    model.save_pretrained(folder)
    write_tokenizer(folder, name)
    return folder, model


def their_states(model, num_layers, tokens, mask):
    with torch.no_grad():
        base = model.base_model
        states = base(torch.tensor(tokens), torch.tensor(mask).long(), output_hidden_states=True).hidden_states
    return states[num_layers].numpy()


@pytest.mark.parametrize("kind", MODELS)
def test_the_states_are_theirs_after_any_layer(tmp_path, kind):
    folder, model = write(tmp_path, kind)
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(5, 40, (3, LENGTH)).astype(np.int32), np.array([[LENGTH], [9], [2]])
    mask = np.arange(LENGTH)[None] < lengths
    tokens[~mask] = model.config.pad_token_id
    encoder = read_encoder(folder)
    for num_layers in (1, 3) if kind in CONFIGS else (2,):
        apply, params = read_parameters(encoder, num_layers, place=first_device)
        ours, theirs = apply(params, tokens, mask), their_states(model, num_layers, tokens, mask)
        assert relative_error(np.asarray(ours)[mask], theirs[mask]) < 1e-5  # measured: at most 4e-7


def test_pad_tokens_inside_a_text_have_no_position(tmp_path):
    """RoBERTa counts those that are not padding, and the text may hold the token itself."""
    folder, model = write(tmp_path, "roberta")
    tokens = np.array([[0, 7, 1, 1, 8, 2]], np.int32)
    apply, params = read_parameters(read_encoder(folder), 2, place=first_device)
    assert relative_error(apply(params, tokens, tokens >= 0), their_states(model, 2, tokens, tokens >= 0)) < 1e-5


def greedy(model, num_layers, candidate, reference, ends):
    """Precision, recall and F1 of two texts' ids alone, without batch or padding."""
    x, y = (their_states(model, num_layers, [ids], np.ones((1, len(ids))))[0] for ids in (candidate, reference))
    x, y = (states / np.linalg.norm(states, axis=1, keepdims=True) for states in (x, y))
    if min(len(candidate), len(reference)) == 2:
        return 0.0, 0.0, 0.0
    precision = np.mean([max(u @ v for v in y) for u, id in zip(x, candidate, strict=True) if id not in ends])
    recall = np.mean([max(u @ v for u in x) for v, id in zip(y, reference, strict=True) if id not in ends])
    return precision, recall, 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("kind", SCORED)
def test_the_score_is_a_greedy_matching(tmp_path, kind):
    folder, model = write(tmp_path, kind)
    bert = load(str(folder), layer=2)
    ids = [bert.tokenizer.tokenize(texts) for texts in (CANDIDATES, REFERENCES)]
    theirs = [greedy(model, 2, *pair, bert.tokenizer.ends) for pair in zip(*ids, strict=True)]
    ours = score(bert, CANDIDATES, REFERENCES)
    np.testing.assert_allclose(np.stack(ours, axis=1), theirs, atol=1e-5)  # measured: at most 3e-7
    assert 0.3 < np.median(ours.f1) < 0.97


def use_tokenizer_json(folder):
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    for name in ("vocab.txt", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    assert (folder / "tokenizer.json").is_file()


@pytest.mark.parametrize("as_json", [False, True], ids=["vocabulary", "tokenizer.json"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_tokens_are_theirs(tmp_path, name, as_json):
    """Of each text alone and of all together; RoBERTa's with the space that bert-score asks for before a text."""
    write_tokenizer(tmp_path, name)
    AutoConfig.for_model(**CONFIGS[name]).save_pretrained(tmp_path)
    if as_json:
        use_tokenizer_json(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, add_prefix_space=name == "roberta")
    ours = load_text_tokenizer(read_encoder(tmp_path))
    texts = [*CANDIDATES, "Owl's fox — naïve 狐 ", "the [SEP] </s> fox"]
    expected = [theirs(text.strip(), truncation=True, max_length=LENGTH)["input_ids"] for text in texts]
    assert ours.tokenize(texts) == expected
    assert [ours.tokenize([text])[0] for text in texts] == expected
    assert ours.ends == {theirs.cls_token_id, theirs.sep_token_id}


@pytest.mark.parametrize("kind", SCORED)
def test_the_score_is_bert_scores(tmp_path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("bert_score")
    folder, _ = write(tmp_path, kind)
    edit_json(folder / "tokenizer_config.json", add_prefix_space=kind == "roberta")
    # Beside transformers 5 it cannot read an empty text, and does not add RoBERTa's space unless the folder says so.
    candidates, references = zip(*((x, y) for x, y in zip(CANDIDATES, REFERENCES, strict=True) if x and y), strict=True)
    theirs = package.score(list(candidates), list(references), model_type=str(folder), num_layers=2)
    ours = score(load(str(folder), layer=2), candidates, references)
    np.testing.assert_allclose(np.stack(ours), np.stack(theirs), atol=1e-4)  # measured: at most 3e-7
