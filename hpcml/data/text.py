"""Text: windows of tokens and the tokens that follow them (`data.kind = "text"`)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from hpcml.data import files
from hpcml.data.core import Data
from hpcml.data.tokenizers import ByteTokenizer, CharTokenizer, code_points
from hpcml.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]


class Windows:
    """Windows of `length` tokens, one every `stride` tokens, and the tokens that follow each token.

    Sample i is the pair (tokens[i * stride : i * stride + length], the same one token later).
    Samples are int64, PyTorch's type for tokens and targets; the tokens stay in their small type.
    """

    def __init__(self, tokens: Array, length: int, stride: int = 1) -> None:
        """All whole windows of `tokens` (one dimension, any integers, possibly memory-mapped)."""
        self.tokens, self.length, self.stride = tokens, length, stride

    def __len__(self) -> int:
        """Number of windows; each needs one token after its last."""
        return max(0, (len(self.tokens) - 1 - self.length) // self.stride + 1)

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        """Return window `index` and its targets, each (length,)."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        inputs, targets = self.fetch(np.array([index]))
        return inputs[0], targets[0]

    def fetch(self, indices: Array) -> tuple[Array, Array]:
        """Return the windows `indices` and their targets, each (len(indices), length)."""
        places = (indices * self.stride)[:, None] + np.arange(self.length + 1)
        tokens = self.tokens[places]
        return tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)


def text(
    path: str = "",
    tokenizer: Literal["byte", "char"] = "byte",
    sequence_length: int = 64,
    val_fraction: float = 0.1,
) -> Data:
    """Text of files as windows of `sequence_length` tokens, the last part kept for validation.

    Training windows start at every token, validation windows do not overlap. Offers models
    `vocab_size` and `sequence_length`. Raises `UserError` for files that are missing, empty, not
    readable or no text, and for a text that is shorter than a window.
    """
    if sequence_length < 1:
        raise UserError(f"data.sequence_length={sequence_length} must be at least 1")
    if not 0 <= val_fraction < 1:
        raise UserError(f"data.val_fraction={val_fraction} must be at least 0 and below 1")
    tokens, made = _tokenise(path, tokenizer)
    split = int(len(tokens) * (1 - val_fraction))
    train = Windows(tokens[:split], sequence_length)
    val = Windows(tokens[split:], sequence_length, sequence_length) if val_fraction else None
    for part, windows in (("training", train), ("validation", val)):
        if windows is not None and not len(windows):
            raise UserError(
                f"data.sequence_length={sequence_length} needs {sequence_length + 1} tokens, but "
                f"the {part} part has {len(windows.tokens)} (of {len(tokens)}, "
                f"data.val_fraction={val_fraction}): take a longer text or a shorter sequence"
            )
    info = {"vocab_size": made.vocab_size, "sequence_length": sequence_length}
    return Data(train, val, info, "next_token", made)


def _tokenise(path: str, tokenizer: str) -> tuple[Array, ByteTokenizer | CharTokenizer]:
    """Return the tokens of all files one after another, and their tokenizer."""
    contents = files.read(files.find(path), path)
    if tokenizer == "byte":
        for file, content in contents:
            files.check_head(file, content)
        parts = [content for _, content in contents]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)), ByteTokenizer()
    if tokenizer != "char":
        raise UserError(f'data.tokenizer="{tokenizer}" is unknown: use "byte" or "char"')
    whole = "".join(files.decode(file, content) for file, content in contents)
    chars = CharTokenizer(whole)
    return chars.encode_all(code_points(whole)), chars
