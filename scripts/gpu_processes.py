"""A part of the check of the GPU: training by processes that share it, beside one rank.

`python scripts/gpu_processes.py` starts a job for each number of ranks and each way of messages,
which trains small models in every layout one after the other, and `hpcml train` once.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from gpu_messages import jobs
from gpu_rows import Row, attempt, in_turn, ranks, shares, tell

from hpcml.comm import direct

STEPS = 3
TOLERANCE = 1e-9
"""Of losses in float64, whose sums are made in other orders."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {}, "ZeRO 1": {"zero": 1}, "ZeRO 2": {"zero": 2}, "ZeRO 3": {"zero": 3},
    "tp": {"axis": "tp"}, "pp": {"axis": "pp", "schedule": "1f1b"}, "cp": {"axis": "cp"},
    "spatial": {"axis": "sp"},
}  # fmt: skip
TRAIN = """
[run]
steps = 4
log_every = 0
[data]
sequence_length = 32
[model]
layers = 2
heads = 2
width = 64
[train]
global_batch = 8
[device]
kind = "cuda"
"""
COMMANDS = ((1, []), (2, ["zero.stage=2"]), (4, ["mesh.tp=2", "zero.stage=1"]))
"""Ranks and options of `hpcml train`."""
TRAIN_WEIGHT = 5
"""Its share of the time, where that of all layouts by 2 ranks is 3: it starts three jobs."""


def main() -> int:
    """Tell a row for each layout, number of ranks and way of messages."""
    todo = jobs()
    weights = [2 + count // 2 for count, _ in todo]
    for (count, way), limit in shares([*todo, (0, "hpcml train")], [*weights, TRAIN_WEIGHT]):
        if not count:
            train(limit)
            continue
        about, env = {"ranks": count, "way": way}, {direct.VARIABLE: way}
        in_turn(count, [__file__, "rank"], list(LAYOUTS), about, limit, env)
    return 0


def losses(layout: str, count: int, device: str = "cuda") -> list[float]:
    """Losses of some steps in this layout among so many ranks. Collective."""
    import hpcml
    from hpcml.models import GPT, MeshNet, NextTokenLoss

    how = dict(LAYOUTS[layout])
    axis = how.pop("axis", "dp")
    random = np.random.default_rng(3)
    if axis == "sp":
        sizes = {"sp_h": min(count, 2), "sp_w": -(-count // 2)}
        batch = random.standard_normal((4, 3, 16, 16)), random.integers(0, 3, (4, 16, 16))
        model: Any = MeshNet(3, 3, size=(16, 16), widths=(8, 8), convs=1)
        loss: Any = hpcml.nn.CrossEntropyLoss()
    else:
        sizes = {axis: count}
        tokens = random.integers(0, 19, (8, 17))
        batch = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        model = GPT(vocab_size=19, sequence_length=16, layers=4, heads=4, width=16)
        loss = NextTokenLoss()
    step = hpcml.parallelize(
        model.to(np.float64).to(device), loss=loss, optimizer=hpcml.optim.AdamW, lr=1e-2,
        mesh=hpcml.Mesh(**sizes), microbatch=4 if axis == "sp" else 2, grad_clip=1.0, seed=5, **how,
    )  # fmt: skip
    return [step(batch) for _ in range(STEPS)]


def rank(layouts: list[str]) -> None:
    """What each rank of a job does. Collective."""
    import hpcml
    from hpcml import backend

    world = hpcml.Mesh()
    backend.use_device("cuda", world.node.local_rank)
    expected: dict[bool, list[float]] = {}
    for layout in layouts:
        start = time.monotonic()
        spatial = layout == "spatial"
        if spatial not in expected:  # by a thread that is a world of one rank
            expected[spatial] = hpcml.run(losses, "spatial" if spatial else "dp", 1, ranks=1)[0]
        found = losses(layout, world.size)
        if world.rank:
            continue
        row = compared(found, expected[spatial], TOLERANCE)
        tell({"name": layout, **row, "seconds": round(time.monotonic() - start, 1)})
        tell({"name": layout, "done": True})


def compared(found: list[float], expected: list[float], tolerance: float) -> Row:
    """What to tell of losses beside those of one rank: NaN agrees with nothing."""
    difference = float(np.abs(np.subtract(found, expected)).max())
    return {"difference": difference, "agrees": difference < tolerance}


def train(limit: float) -> None:
    """Run `hpcml train` as users do, with 1, 2 and 4 ranks, messages as the environment says."""
    first: list[float] = []
    until = time.monotonic() + limit
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder, "job.toml")
        job.write_text(TRAIN)

        def trained(count: int, options: list[str], limit: float) -> Row:
            into = Path(folder, str(count))
            command = ["-m", "hpcml", "train", str(job), f"run.dir={into}", *options]
            failure = ranks(count, command, limit, os.environ)
            if failure:
                raise RuntimeError(failure)
            lines = (into / "metrics.jsonl").read_text().splitlines()
            found = [json.loads(line)["loss"] for line in lines]
            first[:] = first or found
            return compared(found, first, 1e-4)

        for position, (count, options) in enumerate(COMMANDS):
            about = {"ranks": count, "way": direct.asked(),
                     "name": " ".join(["hpcml train", *options])}  # fmt: skip
            seconds = max((until - time.monotonic()) / (len(COMMANDS) - position), 1.0)
            attempt(about, lambda c=count, o=options, s=seconds: trained(c, o, s))


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank(sys.argv[2:])
    else:
        sys.exit(main())
