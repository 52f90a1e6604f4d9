"""The configuration of a run, read from TOML and the command line, checked, and written again.

A mistake is a `UserError` of one line with the key, the value and what to do. The keys are in
`hpcml.train.sections`; where those of a `kind` come from is told in `hpcml.train.kinds`.
"""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from hpcml.errors import UserError
from hpcml.train import kinds, values
from hpcml.train.kinds import Chosen
from hpcml.train.sections import SECTIONS, Config

__all__ = ["Config", "dump", "from_tables", "load"]


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file, apply `section.key=value` overrides in order, and check everything.

    Values of overrides are TOML; bare words are text. Raises `UserError`.
    """
    try:
        tables = tomllib.loads(Path(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise UserError(
            f'configuration "{path}" cannot be read ({error.strerror}): name a TOML file'
        ) from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise UserError(f'configuration "{path}" is not TOML: {error}') from None
    for override in overrides:
        _apply(tables, override)
    return from_tables(tables, f"runs/{Path(path).stem}")


def from_tables(tables: Mapping[str, Any], run_dir: str = "runs/run") -> Config:
    """Return the configuration of tables {section: {key: value}}; `run_dir` is run.dir's default.

    Raises `UserError` for what is unknown, of another type, out of range or not available.
    """
    for name, table in tables.items():
        if name not in SECTIONS:
            raise UserError(f"unknown section [{name}]: {_where(name, table)}")
        if not isinstance(table, Mapping):
            raise UserError(
                f"{name}={values.show(table)} must be a section: write [{name}] and keys below it"
            )
    sections = {name: _section(name, dict(tables.get(name, {}))) for name in SECTIONS}
    config = Config(**sections)
    if not config.run.dir:
        config = replace(config, run=replace(config.run, dir=run_dir))
    _check_together(config)
    return config


def dump(config: Config) -> str:
    """Return the whole configuration as TOML, from which `load` makes the same configuration."""
    tables = {}
    for name in SECTIONS:
        table = asdict(getattr(config, name))
        options = table.pop("options", {})
        tables[name] = {k: v for k, v in (table | options).items() if values.writable(v)}
    return values.write(tables)


def _apply(tables: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    section, dot, key_name = name.strip().partition(".")
    if not (equals and dot and section and key_name):
        near = _owners(section) if equals and not dot else []
        example = f"{near[0]}.{override}" if near else "run.steps=100"
        raise UserError(f'"{override}" must be section.key=value, such as {example}')
    table = tables.setdefault(section, {})
    if isinstance(table, dict):  # else from_tables tells
        table[key_name] = values.Text(value.strip())


def _section(name: str, given: dict[str, Any]) -> Any:
    cls = SECTIONS[name]
    hints = get_type_hints(cls)
    own = {}
    for item in fields(cls):
        if item.name in given and item.name != "options":
            value = values.convert(f"{name}.{item.name}", given.pop(item.name), hints[item.name])
            _check_value(f"{name}.{item.name}", value, item.metadata, item.default)
            own[item.name] = value
    section = cls(**own)
    if isinstance(section, Chosen):
        return kinds.check(section, given)
    for stray, value in given.items():
        known = [item.name for item in fields(cls)]
        elsewhere = _owners(stray)
        near = (
            f"did you mean {elsewhere[0]}.{stray}?"
            if elsewhere
            else values.suggest(stray, known, f"{name}.")
        )
        raise UserError(f"unknown key {name}.{stray}={values.show(value)}: {near}")
    return section


def _check_value(name: str, value: Any, rules: Mapping[str, Any], default: Any) -> None:
    shown = f"{name}={values.show(value)}"
    if rules["choices"] and value not in rules["choices"]:
        known = ", ".join(values.show(choice) for choice in rules["choices"])
        near = values.suggest(value, rules["choices"])
        hint = f" ({near})" if near.startswith("did") else ""
        raise UserError(f"{shown} is unknown: use one of {known}{hint}")
    low, high, above, now = (rules[name] for name in ("low", "high", "above", "now"))
    if low is not None and value < low:
        raise UserError(f"{shown} must be at least {low} (default {values.show(default)})")
    if high is not None and value > high:
        raise UserError(f"{shown} must be at most {high} (default {values.show(default)})")
    if above is not None and value <= above:
        raise UserError(f"{shown} must be above {above} (default {values.show(default)})")
    if now is not None and value not in now:
        remedy = " or ".join(f"{name}={values.show(choice)}" for choice in now)
        raise UserError(f"{shown} is not available in this version yet: set {remedy}")


def _check_together(config: Config) -> None:
    """Refuse values that are fine alone and not together, and a device that is not there."""
    train, optim = config.train, config.optim
    if train.microbatch > train.global_batch:
        raise UserError(
            f"train.microbatch={train.microbatch} is larger than "
            f"train.global_batch={train.global_batch}: make it smaller, or 0 for a rank's share"
        )
    if config.run.trace >= config.run.steps:
        raise UserError(
            f"run.trace={config.run.trace} with run.steps={config.run.steps}: the first step is "
            "not kept: lower run.trace, or train longer"
        )
    divided = next((n for n in ("sp_d", "sp_h", "sp_w") if getattr(config.mesh, n) > 1), None)
    if train.winograd and divided:
        raise UserError(
            f"train.winograd=true with mesh.{divided}={getattr(config.mesh, divided)}: it takes "
            "whole images, as its tiles must begin at the same places: set train.winograd=false"
        )
    lr = optim.options.get("lr")
    if optim.schedule == "cosine" and isinstance(lr, float | int) and optim.min_lr > lr > 0:
        raise UserError(f"optim.min_lr={optim.min_lr} is above optim.lr={lr}: swap or lower it")
    kinds.require(config.data, {"seed": config.run.seed})
    kinds.require(config.optim, {})
    if lr is None:
        raise UserError(
            f'optim.kind="{optim.kind}" takes no lr, which schedule and warmup set: '
            "give it a parameter lr with a default, or accept optim.lr"
        )
    if config.device.kind == "cuda" and importlib.util.find_spec("cupy") is None:
        raise UserError(
            'device.kind="cuda" needs CuPy, which is not installed: '
            'install hpcml[cuda13] or hpcml[cuda12], or set device.kind="cpu"'
        )


def _owners(key_name: str) -> list[str]:
    """Return the sections that have a key of their own of this name."""
    return [
        name
        for name, cls in SECTIONS.items()
        if key_name != "options" and any(item.name == key_name for item in fields(cls))
    ]


def _where(name: str, table: Any) -> str:
    if not isinstance(table, Mapping) and _owners(name):
        return f"did you mean {_owners(name)[0]}.{name}={values.show(table)}?"
    return values.suggest(name, SECTIONS)
