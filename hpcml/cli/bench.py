"""`hpcml bench NAME [--peer torch] [--json]`."""

from __future__ import annotations

import argparse
import json


def run(args: list[str]) -> int:
    """Run a benchmark and print its table, or with --json its report; the exit code."""
    parser = argparse.ArgumentParser(prog="hpcml bench", description="Measure, beside a peer.")
    parser.add_argument("name", choices=["step"], help="step: a GPT training step")
    parser.add_argument("--peer", default="", help="also measure this library: torch")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    options = parser.parse_args(args)
    from hpcml.bench import step

    report = step.run(options.peer)
    print(json.dumps(report, indent=1) if options.json else step.table(report))
    return 0
