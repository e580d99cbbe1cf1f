"""Rewards by a vision-language model: what it sees in a picture, what it answers, what it judges.

Each make_*(settings, ...) -> (fn, prepare), as `on_host` reads them. `ask` is `chat.ask` of one server.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ddpo_jax.errors import UserError
from ddpo_jax.rewards import chat, jpeg
from ddpo_jax.rewards.chat import Asker, Message, Reply
from ddpo_jax.rewards.kinds import Scores, texts
from ddpo_jax.types import Prompts
from ddpo_jax.words import found_in, split

CAPTION = "Answer concisely: what is going on in this image?"
QUESTION = 'How well does this image show "{prompt}"? Consider everything that the text says.'
REFERENCE = "The image contains {prompt}"
JPEG_QUALITY = 80  # as published
LONGEST_SCORE = 100  # characters of a line with one

NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
SCORE = re.compile(rf"(?:score\s*[:=]\s*)?(?P<score>{NUMBER})(?:\s*/\s*(?P<most>{NUMBER}))?\.?", re.IGNORECASE)


class Asked(NamedTuple):
    """What is asked about the picture of a prompt, and the answers that are accepted to each question."""

    questions: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]


def make_captioned(settings: chat.Settings, load: Callable, *, reference: str) -> tuple[Callable, Callable]:
    """The score of what the model says of a picture, against the prompt. See `captioned`.

    With BERTScore's recall and REFERENCE it is the alignment reward of Black et al. 2023, Sec. 5.

    load: () -> score_texts, once the settings are known to be usable: it may read a large model.

    Raises: UserError if no request can be made with these settings, and what `load` raises.
    """
    chat.check(settings)
    return captioned(partial(chat.ask, settings), load(), reference=reference), texts


def make_questions(settings: chat.Settings) -> tuple[Callable, Callable]:
    """The fraction of a prompt's own questions that the model answers as it should. See `questioned`.

    Raises: UserError if no request can be made with these settings.
    """
    chat.check(settings)
    return questioned(partial(chat.ask, settings)), _asked


def make_judge(settings: chat.Settings, *, question: str, low: float, high: float) -> tuple[Callable, Callable]:
    """The number that the model judges a picture by. See `judged`.

    Raises: UserError if no request can be made with these settings, or if question or range make no sense.
    """
    chat.check(settings)
    if not question.strip():
        raise UserError("reward.vlm_question='': expected what the model is to judge; {prompt} stands for the prompt")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(
            f"reward.vlm_lowest={low}, vlm_highest={high}: expected two numbers, the second above the first, such as 0"
            " and 10"
        )
    return judged(partial(chat.ask, settings), question=question, low=low, high=high), texts


def captioned(ask: Asker, score_texts: Callable, *, reference: str = REFERENCE) -> Callable:
    """fn(images, prompts) -> Scores: score_texts(captions, references) -> (n,) of the pictures that have a caption.

    The model is asked "Answer concisely: what is going on in this image?", and its answer, the candidate, is compared
    with the reference (Black et al. 2023, Sec. 5).
    """

    def fn(images: Float[np.ndarray, "b H W 3"], prompts: Sequence[str]) -> Scores:
        replies = ask([Message(CAPTION, encode(picture)) for picture in images])
        present = [i for i, reply in enumerate(replies) if reply.text is not None]
        values = np.full(len(images), np.nan)
        if present:
            references = [reference.replace("{prompt}", prompts[i]) for i in present]
            values[present] = score_texts([replies[i].text for i in present], references)
        return Scores(values, _last_why(replies))

    return fn


def questioned(ask: Asker) -> Callable:
    """fn(images, asked) -> Scores: the fraction of the questions whose reply has an accepted answer in it.

    One request a question (Black et al. 2023, its counting task). A picture without a reply to each is missing.
    """

    def fn(images: Float[np.ndarray, "b H W 3"], asked: Sequence[Asked]) -> Scores:
        messages = []
        for picture, own in zip(images, asked, strict=True):
            data = encode(picture)
            messages += [Message(question, data) for question in own.questions]
        replies = iter(ask(messages))
        own_replies = [[next(replies) for _ in own.questions] for own in asked]
        values = [_fraction(own.answers, found) for own, found in zip(asked, own_replies, strict=True)]
        return Scores(np.array(values), _last_why([reply for found in own_replies for reply in found]))

    return fn


def judged(ask: Asker, *, question: str, low: float, high: float) -> Callable:
    """fn(images, prompts) -> Scores: the number that the last line of the reply is, from low to high.

    question: {prompt} stands for the prompt. How to answer is added to it.
    """
    how = f"Answer with a number from {low:g} to {high:g}. End with that number alone on the last line."

    def fn(images: Float[np.ndarray, "b H W 3"], prompts: Sequence[str]) -> Scores:
        asked = [f"{question.replace('{prompt}', prompt)}\n{how}" for prompt in prompts]
        replies = ask([Message(text, encode(picture)) for text, picture in zip(asked, images, strict=True)])
        found = [_judgement(reply, low, high) for reply in replies]
        return Scores(np.array([score for score, _ in found]), next((why for _, why in reversed(found) if why), ""))

    return fn


def encode(picture: Float[np.ndarray, "H W 3"]) -> bytes:
    return jpeg.encode(picture, quality=JPEG_QUALITY)


def parse_score(line: str, high: float) -> float | None:
    """The number that a line is: 7, **7**, Score: 7, 7/10 (of the highest) or {"score": 7}; None for anything else."""
    line = re.sub(r"[*`]", "", line).strip()
    if len(line) > LONGEST_SCORE:
        return None
    match = SCORE.fullmatch(line)
    if match:
        return float(match["score"]) if match["most"] is None or float(match["most"]) == high else None
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    score = found.get("score") if isinstance(found, dict) else None
    return float(score) if type(score) in (int, float) and abs(score) < 1e300 else None


def _judgement(reply: Reply, low: float, high: float) -> tuple[float, str]:
    """The score, or NaN and why there is none."""
    if reply.text is None:
        return math.nan, reply.why
    lines = [line for line in reply.text.splitlines() if line.strip()]
    score = parse_score(lines[-1], high)
    if score is None:
        return math.nan, f"no number alone on the last line of the reply {_end(reply.text)}"
    if not low <= score <= high:
        return math.nan, f"{score:g} is not from {low:g} to {high:g}, in the reply {_end(reply.text)}"
    return score, ""


def _end(text: str) -> str:
    return repr(text if len(text) <= chat.SHOWN else "..." + text[3 - chat.SHOWN :])


def _fraction(answers: Sequence[Sequence[str]], replies: Sequence[Reply]) -> float:
    """NaN if there is not a reply to each question."""
    if any(reply.text is None for reply in replies):
        return float("nan")
    right = [
        any(found_in(answer, reply.text) for answer in accepted)
        for accepted, reply in zip(answers, replies, strict=True)
    ]
    return sum(right) / len(right)


def _last_why(replies: Sequence[Reply]) -> str:
    return next((reply.why for reply in reversed(replies) if reply.text is None), "")


def _asked(prompts: Prompts) -> tuple[Asked, ...]:
    return tuple(_read(text, metadata) for text, metadata in zip(prompts.texts, prompts.metadata, strict=True))


def _read(text: str, metadata: Mapping[str, Any]) -> Asked:
    questions, answers = metadata.get("questions"), metadata.get("answers")
    listed = all(isinstance(entry, list | tuple) for entry in (questions, answers))
    accepted = [(answer,) if isinstance(answer, str) else answer for answer in answers] if listed else []
    if (
        not accepted
        or len(questions) != len(accepted)
        or not all(isinstance(question, str) and question.strip() for question in questions)
        or not all(_is_accepted(answer) for answer in accepted)
    ):
        raise UserError(
            f"reward vlm_questions: the prompt {text!r} has questions {questions!r} and answers {answers!r}. Expected"
            " as many of each, at least one, an answer being a word or several that are accepted: take"
            ' prompts.name=counting, or a .jsonl file with lines such as {"prompt": "two mice", "questions": ["How many'
            ' mice are there?"], "answers": ["two"]}'
        )
    return Asked(tuple(questions), tuple(map(tuple, accepted)))


def _is_accepted(answer: Any) -> bool:
    listed = isinstance(answer, list | tuple) and len(answer) > 0
    return listed and all(isinstance(word, str) and bool(split(word)) for word in answer)
