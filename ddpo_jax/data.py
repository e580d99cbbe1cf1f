"""Prompts. A round's prompts are a pure function of (seed, epoch), so a resume needs no position."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from ddpo_jax.errors import UserError
from ddpo_jax.types import Prompts
from ddpo_jax.words import plural

PROMPTS = Path(__file__).parent / "assets" / "prompts"

# The range of the published counting runs (jannerm/ddpo, config llava_counting).
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight")


class PromptSet(NamedTuple):
    """Distinct prompts; a prompt's id is its position."""

    texts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...]  # such as questions and answers for a judge


def prompt_source(name: str, texts: Sequence[Any] = ()) -> PromptSet:
    """The prompts of `texts` if there are any, else of a built-in set or a UTF-8 file with one prompt a line.

    A line of a .jsonl file is an object with the text as "prompt"; what else is in it is the prompt's metadata, such as
    the lists "questions" and "answers" for the reward vlm_questions.

    Raises:
        UserError: there is no such set or file, or it holds no prompt, or it is not UTF-8; a line of a .jsonl file is
            something else.
    """
    if texts:
        return _from_texts(texts, "prompts.list")
    if name in PROMPT_SETS:
        return PROMPT_SETS[name]()
    try:
        content = Path(name).expanduser().read_bytes()
    except OSError as error:
        raise UserError(
            f"prompts.name={name!r}: not a built-in set ({', '.join(PROMPT_SETS)}), and no file that can be read"
            f" ({error.strerror})"
        ) from None
    try:
        # Not splitlines, which also cuts at form feeds and at Unicode's own separators.
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"prompts.name={name!r}: line {line} is not UTF-8; convert the file to UTF-8") from None
    if name.endswith(".jsonl"):
        return _from_json(lines, f"prompts.name={name!r}")
    return _from_texts([line for line in lines if line.strip()], f"prompts.name={name!r}")


def split(prompts: PromptSet, *, fraction: float, seed: int) -> tuple[PromptSet, PromptSet]:
    """(train, held out): disjoint, `fraction` of the prompts held out; 0 holds out none.

    Raises:
        UserError: the fraction leaves nothing to train on, or nothing held out.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"prompts.held_out={fraction}: expected a fraction from 0 to below 1")
    count = len(prompts.texts)
    num_held_out = round(fraction * count)
    if fraction and not 0 < num_held_out < count:
        raise UserError(f"prompts.held_out={fraction} of {count} prompts leaves a side without prompts; set 0")
    order = np.random.default_rng(seed).permutation(count)
    return _choose(prompts, np.sort(order[num_held_out:])), _choose(prompts, np.sort(order[:num_held_out]))


def draw(
    prompts: PromptSet,
    tokens: Int32[np.ndarray, "n s"],
    *,
    num_prompts: int,
    num_samples_per_prompt: int,
    seed: int,
    epoch: int,
) -> Prompts:
    """A round's prompts: `num_prompts` drawn uniformly with replacement, each num_samples_per_prompt times in a row."""
    drawn = np.random.default_rng((seed, epoch)).integers(len(prompts.texts), size=num_prompts)
    return at(prompts, tokens, np.repeat(drawn, num_samples_per_prompt))


def every(prompts: PromptSet, tokens: Int32[np.ndarray, "n s"], *, count: int) -> Prompts:
    """`count` prompts spread evenly over the set, and round it again where the set is smaller."""
    size = len(prompts.texts)
    return at(prompts, tokens, np.arange(count) * max(size, count) // count % size)


def at(prompts: PromptSet, tokens: Int32[np.ndarray, "n s"], ids: Int[np.ndarray, " b"]) -> Prompts:
    """The prompts with these ids."""
    chosen = _choose(prompts, ids)
    return Prompts(chosen.texts, tokens[ids], ids.astype(np.int32), chosen.metadata)


def with_article(animal: str) -> str:
    """One of the common or the unseen animals with its article, by its first letter: none of them needs more."""
    return f"{'an' if animal[0] in 'aeiou' else 'a'} {animal}"


def _lines(name: str) -> list[str]:
    return (PROMPTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def _imagenet_animals() -> PromptSet:
    """The 398 animals among ImageNet's classes, the bare first name of each (the compression runs)."""
    return _from_texts(_lines("imagenet_animals"), "imagenet_animals")


def _common_animals() -> PromptSet:
    """The paper's 45 common animals, each with its article (its aesthetic runs)."""
    return _from_texts([with_article(animal) for animal in _lines("common_animals")], "common_animals")


def _animal_activities() -> PromptSet:
    """45 animals x 3 activities, "an ant playing chess" (its alignment runs)."""
    return _each_doing_each("common_animals", "activities")


def _unseen_animals() -> PromptSet:
    """45 animals that are not among the common ones, each with its article: what those runs are to generalise to.

    The paper shows that they do, and has no list of which animals it tried; these and the activities below are ours.
    """
    return _from_texts([with_article(animal) for animal in _lines("unseen_animals")], "unseen_animals")


def _unseen_animal_activities() -> PromptSet:
    """The unseen animals x the 3 activities of the alignment runs, "a capybara washing the dishes"."""
    return _each_doing_each("unseen_animals", "activities")


def _unseen_activities() -> PromptSet:
    """The 45 common animals x 6 activities that the alignment runs do not have, "a horse typing on a keyboard"."""
    return _each_doing_each("common_animals", "unseen_activities")


def _each_doing_each(animals: str, activities: str) -> PromptSet:
    texts = [f"{with_article(animal)} {activity}" for animal in _lines(animals) for activity in _lines(activities)]
    return _from_texts(texts, activities)


def _counting() -> PromptSet:
    """Counts of animals, "two mice", with the questions that a judge is asked and the answers it should give."""
    texts, metadata = [], []
    for animal in _lines("common_animals"):
        for number in NUMBERS:
            texts.append(f"{number} {plural(animal)}")
            questions = (
                f"How many {plural(animal)} are there in this image?",
                "What animal is in this image?",
            )
            metadata.append({"questions": questions, "answers": (number, animal)})
    return PromptSet(tuple(texts), tuple(metadata))


PROMPT_SETS = {
    "imagenet_animals": _imagenet_animals,
    "common_animals": _common_animals,
    "animal_activities": _animal_activities,
    "unseen_animals": _unseen_animals,
    "unseen_animal_activities": _unseen_animal_activities,
    "unseen_activities": _unseen_activities,
    "counting": _counting,
}


def _from_texts(texts: Sequence[Any], origin: str) -> PromptSet:
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{origin}: {text!r} is not a prompt; expected text")
    distinct = tuple(dict.fromkeys(text.strip() for text in texts))
    if not distinct:
        raise UserError(f"{origin}: no prompt in it; expected one a line")
    return PromptSet(distinct, ({},) * len(distinct))


def _from_json(lines: Sequence[str], origin: str) -> PromptSet:
    known: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        here = f"{origin}: line {number}"
        try:
            metadata = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{here} is not JSON ({error}); expected an object with a prompt") from None
        text = metadata.pop("prompt", None) if isinstance(metadata, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'{here}: expected an object with a prompt, such as {{"prompt": "two mice"}}')
        _check_questions(metadata, here)
        if known.setdefault(text.strip(), metadata) != metadata:
            raise UserError(f"{here}: the prompt {text.strip()!r} comes a second time, with something else beside it")
    if not known:
        raise UserError(f"{origin}: no prompt in it; expected one a line")
    return PromptSet(tuple(known), tuple(known.values()))


def _check_questions(metadata: Mapping[str, Any], here: str) -> None:
    """An error now, not in the round that first draws the prompt; what else they must be is for the reward to say."""
    if {"questions", "answers"} & metadata.keys():
        questions, answers = metadata.get("questions"), metadata.get("answers")
        if not isinstance(questions, list) or not isinstance(answers, list) or len(questions) != len(answers):
            raise UserError(f"{here}: expected the lists questions and answers, one answer for each question")


def _choose(prompts: PromptSet, ids: Int[np.ndarray, " b"]) -> PromptSet:
    return PromptSet(tuple(prompts.texts[i] for i in ids), tuple(prompts.metadata[i] for i in ids))
