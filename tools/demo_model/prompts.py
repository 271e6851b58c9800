"""The small language of the embedded model: which prompts exist and what each of them asks for."""

import itertools
from typing import NamedTuple

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

PALETTE = {
    "red": (255, 64, 64),
    "orange": (255, 146, 36),
    "yellow": (255, 226, 60),
    "green": (70, 222, 96),
    "cyan": (56, 214, 232),
    "blue": (74, 122, 255),
    "purple": (168, 92, 255),
    "pink": (255, 112, 190),
    "white": (242, 244, 250),
}
COLOURS = tuple(PALETTE)

_WITH_COLOUR = (
    "{c} {d}",
    "a {c} {d}",
    "a {c} neon {d}",
    "a neon {d} in {c}",
    "the digit {d} in {c}",
    "the number {d} in {c}",
    "a picture of a {c} {d}",
)
_WITHOUT_COLOUR = ("{d}", "a {d}", "a neon {d}", "the digit {d}", "the number {d}", "a picture of a {d}")
_WITHOUT_DIGIT = ("a {c} digit", "a {c} number", "a {c} neon digit")


class Request(NamedTuple):
    """Says what a prompt asks for; None leaves the choice to the seed."""

    digit: int | None
    colour: int | None


def _with_article(sentence: str) -> str:
    words = sentence.split()
    following = [*words[1:], ""]
    return " ".join(
        "an" if word == "a" and after in ("orange", "eight") else word for word, after in zip(words, following, strict=True)
    )


def sentences() -> dict[Request, list[str]]:
    """List every training prompt, grouped by what it asks for; the empty prompt asks for nothing."""
    found: dict[Request, list[str]] = {Request(None, None): [""]}
    for colour_index, colour in enumerate(COLOURS):
        found[Request(None, colour_index)] = [_with_article(t.format(c=colour)) for t in _WITHOUT_DIGIT]
    for digit, word in enumerate(DIGIT_WORDS):
        names = (word, str(digit))
        found[Request(digit, None)] = [_with_article(t.format(d=name)) for t, name in itertools.product(_WITHOUT_COLOUR, names)]
        for colour_index, colour in enumerate(COLOURS):
            found[Request(digit, colour_index)] = [
                _with_article(t.format(c=colour, d=name)) for t, name in itertools.product(_WITH_COLOUR, names)
            ]
    return found


def vocabulary() -> list[str]:
    """List the words of all prompts, sorted."""
    return sorted({word for group in sentences().values() for sentence in group for word in sentence.split()})
