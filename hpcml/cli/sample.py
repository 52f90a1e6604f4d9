"""`hpcml sample RUN_DIR [--prompt TEXT]`: text from a trained language model."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from hpcml.errors import UserError


def run(args: list[str]) -> int:
    """Print a prompt and what the model of a run adds to it; the exit code."""
    options = _parser().parse_args(args)
    from hpcml.data import Data
    from hpcml.data.tokenizers import from_dict
    from hpcml.train import config as configuration
    from hpcml.train import weights
    from hpcml.train.build import build_model
    from hpcml.train.results import sample_text

    folder = Path(options.run_dir)
    try:
        described = json.loads((folder / "data.json").read_text())
        info, tokenizer = described["info"], described["tokenizer"]
        made = tokenizer and from_dict(tokenizer)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'"{folder}" is no folder of a run (data.json: {type(error).__name__} {error}): name '
            "the run.dir of a run"
        ) from None
    if made is None:
        raise UserError(f'"{folder}" holds no language model: only runs on text can be sampled')
    config = configuration.load(folder / "config.toml")
    config = replace(config, model=replace(config.model, init_from=""))  # has its own weights
    model = build_model(config, info).name_parts()
    weights.load(model, folder / "model.safetensors", "model")
    data = Data([], None, info, tokenizer=made)
    if not options.prompt:
        raise UserError('--prompt="" is empty: give at least one character')
    print(
        sample_text(
            model, data, options.prompt, options.tokens, options.temperature, options.top_k,
            options.seed,
        )
    )  # fmt: skip
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hpcml sample", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run.dir of a finished run")
    parser.add_argument("--prompt", default="\n", help="text to go on from")
    parser.add_argument("--tokens", type=_at_least(0, int), default=500, help="tokens to add")
    parser.add_argument("--temperature", type=_at_least(0, float), default=0.8,
                        help="below 1: more likely tokens; 0: the most likely one")  # fmt: skip
    parser.add_argument("--top-k", type=_at_least(0, int), default=0,
                        help="choose among the k most likely tokens (0: all)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="another seed, another text")
    return parser


def _at_least(low: int, kind: type) -> type:
    def convert(text: str) -> float:
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}")
        return value  # type: ignore[no-any-return]

    return convert  # type: ignore[return-value]
