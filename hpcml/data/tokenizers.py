"""Tokenizers: text to integers and back. Each can be written as JSON beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from hpcml.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]

_CODE_POINTS = 0x110000  # of Unicode


class Tokenizer(Protocol):
    """What turns text into tokens 0 .. vocab_size - 1 and back."""

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        ...

    def encode(self, text: str) -> Array:
        """Return the tokens of a text (int64, one dimension)."""
        ...

    def decode(self, tokens: Any) -> str:
        """Return the text of tokens (any integers, one dimension)."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` needs, as JSON can hold it."""
        ...


class ByteTokenizer:
    """The bytes of UTF-8: 256 tokens that can write every text."""

    kind = "byte"
    vocab_size = 256

    def encode(self, text: str) -> Array:
        """Return the bytes of a text as tokens (int64)."""
        # a command line hands over undecodable bytes as surrogates: give the bytes back
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.int64)

    def decode(self, tokens: Any) -> str:
        """Return the text of tokens; bytes that are not UTF-8 become U+FFFD."""
        return np.asarray(tokens).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def to_dict(self) -> dict[str, Any]:
        """Return `{"kind": "byte"}`."""
        return {"kind": self.kind}


class CharTokenizer:
    """The distinct characters of a text, numbered in the order of their code points."""

    kind = "char"

    def __init__(self, characters: str) -> None:
        """A tokenizer of the distinct characters of `characters`."""
        present = np.zeros(_CODE_POINTS, bool)
        present[code_points(characters)] = True
        self._codes = np.flatnonzero(present).astype(np.uint32)

    @property
    def vocab_size(self) -> int:
        """Number of distinct characters."""
        return len(self._codes)

    @property
    def characters(self) -> str:
        """The vocabulary: character t is token t."""
        return self._codes.astype("<u4").tobytes().decode("utf-32-le")

    def encode(self, text: str) -> Array:
        """Return the tokens of a text (int64).

        Raises `UserError` that names the first character outside the vocabulary.
        """
        codes = code_points(text)
        tokens = np.searchsorted(self._codes, codes)
        known = self._codes[np.minimum(tokens, self.vocab_size - 1)] == codes
        if not known.all():
            place = int(np.flatnonzero(~known)[0])
            raise UserError(
                f"character {text[place]!r} (number {place + 1} of the text) is not among the "
                f"{self.vocab_size} characters the model knows: leave it out, or train with it "
                'or with data.tokenizer="byte"'
            )
        return tokens.astype(np.int64)

    def encode_all(self, codes: Array) -> Array:
        """Return the tokens of code points that are all known, in the smallest type that fits."""
        table = np.zeros(_CODE_POINTS, smallest_type(self.vocab_size))
        table[self._codes] = np.arange(self.vocab_size)
        return table[codes]

    def decode(self, tokens: Any) -> str:
        """Return the text of tokens below `vocab_size`."""
        return self._codes[np.asarray(tokens, np.int64)].astype("<u4").tobytes().decode("utf-32-le")

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the vocabulary."""
        return {"kind": self.kind, "characters": self.characters}


def from_dict(saved: Mapping[str, Any]) -> ByteTokenizer | CharTokenizer:
    """Make the tokenizer again that `to_dict` described; `UserError` for an unknown kind."""
    if saved.get("kind") == ByteTokenizer.kind:
        return ByteTokenizer()
    if saved.get("kind") == CharTokenizer.kind and isinstance(saved.get("characters"), str):
        return CharTokenizer(saved["characters"])
    raise UserError(f'tokenizer kind {saved.get("kind")!r} is unknown: use "byte" or "char"')


def code_points(text: str) -> Array:
    """Return the code points of a text (uint32)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(
        np.uint32, copy=False
    )


def smallest_type(values: int) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds 0 .. values - 1."""
    return np.min_scalar_type(max(values, 1) - 1)
