"""Parameters on disk and their fingerprint."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from hpcml.errors import UserError
from hpcml.nn import Module


def save(model: Module, path: Path) -> None:
    """Write the parameters as safetensors: serial names, logical shapes, a shared one once."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    temporary = path.with_suffix(".tmp")
    arrays = {name: np.ascontiguousarray(p.numpy()) for name, p in model.named_parameters()}
    try:
        save_file(arrays, temporary)
        temporary.chmod(0o644)  # safetensors makes it the owner's alone
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f'"{path}" cannot be written ({error}): make room there, or set another run.dir'
        ) from None


def load(model: Module, path: str | Path, key: str = "model.init_from") -> None:
    """Fill the model from a safetensors file; `key` is named in errors. Raises UserError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        Path(path).open("rb").close()  # safetensors calls any failure "no such file"
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f'{key}="{path}" cannot be read ({error}): name a safetensors file'
        ) from None
    named = list(model.named_parameters(remove_duplicate=False))
    found = {id(parameter): state[name] for name, parameter in named if name in state}
    for name, parameter in named:  # a shared parameter is in the file under one of its names
        if name not in state and id(parameter) in found:
            state[name] = found[id(parameter)]
    try:
        model.load_state_dict(state)
    except UserError as error:
        raise UserError(f'{key}="{path}": {error}') from None


def fingerprint(model: Module) -> str:
    """SHA-256 over all parameters, each once, in order of definition and logical C order."""
    digest = hashlib.sha256()
    for _, parameter in model.named_parameters():
        digest.update(np.ascontiguousarray(parameter.numpy()).tobytes())
    return digest.hexdigest()
