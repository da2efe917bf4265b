"""Text for people: lists of words, and what is from elsewhere made fit for a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

__all__ = ["enumerated", "printable"]

# Controls, lone surrogates (of bytes that are no UTF-8), ends of lines and of paragraphs.
_CATEGORIES = {"Cc", "Cs", "Zl", "Zp"}
# What reverses the order of the letters that follow.
_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def printable(text: object) -> str:
    r"""A name for people: what a terminal would obey, or cannot show, is written as ``\x1b``."""
    return "".join(
        letter.encode("unicode_escape").decode("ascii")
        if unicodedata.category(letter) in _CATEGORIES
        or unicodedata.bidirectional(letter) in _DIRECTIONS
        else letter
        for letter in str(text)
    )


def enumerated(words: Sequence[str], conjunction: str) -> str:
    """Lists one word or more, for example as ``"a, b or c"``."""
    return f" {conjunction} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
