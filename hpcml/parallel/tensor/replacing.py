"""Modules of a model replaced by others."""

from __future__ import annotations

from collections.abc import Mapping

from hpcml.nn import Module


def replace(model: Module, new: Mapping[int, Module]) -> None:
    """Put new modules in the place of old ones, wherever these are used."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            made = new.get(id(child))
            if made is None or made is child:
                continue
            made.training = child.training
            made._hooks = child._hooks
            setattr(parent, name, made)
