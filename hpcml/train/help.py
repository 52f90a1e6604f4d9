"""The page that `hpcml train --help` shows: every key with its default and meaning."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import fields
from typing import Any

from hpcml.train import kinds, values
from hpcml.train.kinds import SLOTS, Chosen
from hpcml.train.sections import SECTIONS

WIDTH = 96

MEANING = {
    "data.path": "file, folder or glob (default: Python's own library, scikit-learn's digits)",
    "data.tokenizer": "byte or char",
    "data.sequence_length": "tokens in a sample",
    "data.val_fraction": "part kept for validation, the last",
    "data.samples": "samples to make",
    "data.in_features": "numbers in a sample",
    "data.out_features": "numbers to predict",
    "data.noise": "standard deviation of the noise",
    "data.seed": "what random numbers are made from",
    "data.labels": "file of the labels (default: beside the images)",
    "data.axes": "what dimensions of arrays are, such as NHWC (default: NHW, NCHW or NCDHW)",
    "data.num_classes": "classes (0: one more than the largest label)",
    "data.mean": "of each channel, subtracted (default: of the training part)",
    "data.std": "of each channel, by which is divided (default: of the training part)",
    "data.flip": "mirror half of the training images left and right",
    "data.shift": "largest shift of training images, in pixels: a crop after padding by as many",
    "data.rotate": "largest turn of training images, in degrees",
    "model.vocab_size": "number of tokens",
    "model.sequence_length": "longest sequence",
    "model.layers": "blocks",
    "model.heads": "attention heads of a block; they divide the width",
    "model.width": "features of a token; channels of the first stage",
    "model.dropout": "probability of dropping an activation",
    "model.bias": "biases in linear layers and layer norms",
    "model.tie_embeddings": "one matrix for the token embedding and the output layer",
    "model.in_features": "numbers in a sample",
    "model.out_features": "numbers to predict",
    "model.hidden": "widths of the hidden layers",
    "model.activation": "relu, gelu, tanh or sigmoid",
    "model.in_channels": "channels of an image",
    "model.num_classes": "classes to tell",
    "model.depth": "layers: 18, 34 or 50",
    "model.small_images": "begin with a 3x3 convolution, without stride and pooling",
    "model.size": "pixels of an image along each dimension",
    "model.widths": "channels of the blocks; all but the last halve the resolution",
    "model.convs": "convolutions of a block",
    "optim.lr": "learning rate",
    "optim.betas": "decay of the averages of gradient and squared gradient",
    "optim.eps": "added to the denominator",
    "optim.weight_decay": "decay of the weights",
    "optim.momentum": "decay of the velocity",
    "optim.dampening": "part of the gradient kept out of the velocity",
    "optim.nesterov": "look ahead along the velocity",
    "loss.ignore_index": "targets that do not count",
    "loss.reduction": "mean, sum or none",
}
"""What the keys of the built-in kinds mean."""


def help_text() -> str:
    """Return all sections and keys, with defaults and meanings, as a page of plain text."""
    blocks = []
    for name, section in SECTIONS.items():
        summary = (inspect.getdoc(section) or "").splitlines()[0]
        lines = [f"[{name}] {summary}"]
        for item in fields(section):
            if item.name != "options":
                lines += _entry(item.name, item.default, str(item.metadata["help"]))
        if issubclass(section, Chosen):
            for kind in SLOTS[name].builtin:
                lines += _keys_of(name, kind)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _keys_of(section: str, kind: str) -> list[str]:
    """Return the lines of the keys that one built-in kind takes."""
    known, _ = kinds.parameters(section, kinds.find(section, kind))
    lines = [f'  with kind = "{kind}":'] if known else []
    for name, parameter in known.items():
        lines += _entry(name, parameter.default, MEANING.get(f"{section}.{name}", ""), 4)
    return lines


def _entry(name: str, default: Any, meaning: str, indent: int = 2) -> list[str]:
    if default is kinds.EMPTY:
        shown = f"{name} (filled in)"
    else:
        shown = f"{name} = {values.show(default)}" if values.writable(default) else name
    head = f"{' ' * indent}{shown}".ljust(34)
    return textwrap.wrap(
        f"{head} {meaning}", WIDTH, subsequent_indent=" " * 35, drop_whitespace=True
    ) or [head]
