"""English words: plurals, numbers, and whether a text has a word in it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

# Words that make their plural in their own way.
PLURALS = {
    "sheep": "sheep", "deer": "deer", "fish": "fish", "moose": "moose", "bison": "bison", "mouse": "mice",
    "goose": "geese", "ox": "oxen", "wolf": "wolves", "calf": "calves", "leaf": "leaves", "loaf": "loaves",
    "half": "halves", "shelf": "shelves", "elf": "elves", "thief": "thieves", "knife": "knives", "wife": "wives",
    "man": "men", "woman": "women", "child": "children", "person": "people", "foot": "feet", "tooth": "teeth",
    "potato": "potatoes", "tomato": "tomatoes", "hero": "heroes", "buffalo": "buffaloes", "cactus": "cacti",
}  # fmt: skip

UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = {
    "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
NUMBERS = {word: i for i, word in enumerate(UNITS)} | TENS

# Digits with signs inside ("1,000", "2.5") are one word; what stands between letters, such as a hyphen, parts words.
WORD = re.compile(r"\d+(?:[.,]\d+)+|[^\W_]+")


def plural(word: str) -> str:
    """The plural of an English noun."""
    return PLURALS.get(word) or _regular_plural(word)


def same_word(word: str, other: str) -> bool:
    """Whether the words are equal, or one is the other's plural, its own or the regular one: fish, fishes."""
    return (
        word == other
        or other in (plural(word), _regular_plural(word))
        or word in (plural(other), _regular_plural(other))
    )


def found_in(phrase: str, text: str) -> bool:
    """Whether the phrase is in the text: whole words one after another, whatever their case.

    Its last word may be in the singular or the plural, and numbers up to 99 in words or in digits. A phrase without a
    word is nowhere.
    """
    wanted, words = split(phrase), split(text)
    return bool(wanted) and any(
        words[i : i + len(wanted) - 1] == wanted[:-1] and same_word(wanted[-1], words[i + len(wanted) - 1])
        for i in range(len(words) - len(wanted) + 1)
    )


def split(text: str) -> list[str]:
    """The text's words without case and possessive, and its numbers, "3", "three" or "twenty-three", as digits."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    return list(_numerals(WORD.findall(re.sub(r"'s\b", "", text))))


def _numerals(words: Sequence[str]) -> Iterator[str]:
    i = 0
    while i < len(words):
        word, after = words[i], words[i + 1] if i + 1 < len(words) else ""
        unit = NUMBERS.get(after, 0) if word in TENS else 0
        joined = 0 < unit < 10
        if word in NUMBERS:
            yield str(NUMBERS[word] + (unit if joined else 0))
        else:
            yield word.replace(",", "") if re.fullmatch(r"\d{1,3}(,\d{3})+", word) else word
        i += 2 if joined else 1


def _regular_plural(word: str) -> str:
    if word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")
