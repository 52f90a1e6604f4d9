"""`hpcml trace RUN_DIR`: what the ranks of a run did when, for a browser and as a picture."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from hpcml.errors import UserError


def run(args: list[str]) -> int:
    """Bring the timelines of a run together; print, write and draw them; the exit code."""
    options = _parser().parse_args(args)
    from hpcml.cli.bench_jobs import check_writable
    from hpcml.pictures import check_picture
    from hpcml.trace.events import events
    from hpcml.trace.record import load
    from hpcml.trace.summary import summary

    folder = Path(options.run_dir)
    trace = load(folder)
    if options.step is not None:
        if options.step not in trace.steps:
            there = ", ".join(map(str, trace.steps))
            raise UserError(f'--step {options.step}: "{folder}" holds timelines of {there}')
        trace = replace(trace, steps={options.step: trace.steps[options.step]})
    number, ranks = max(trace.steps.items())
    path = options.json or str(folder / "trace.json")
    check_writable(path)
    if options.plot:
        check_writable(options.plot)
        check_picture(options.plot)
    Path(path).write_text(json.dumps(events(trace)))
    print(f"step {number}:\n{summary(ranks)}")
    print(f"{path}: steps {', '.join(map(str, trace.steps))}, for ui.perfetto.dev")
    if options.plot:
        from hpcml.trace.picture import draw, of_step

        draw(of_step(number, ranks), options.plot)
        print(f"{options.plot}: step {number}")
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "What the ranks of a run with run.trace above 0 did when."
    parser = argparse.ArgumentParser(prog="hpcml trace", description=about)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run.dir of the run")
    text = "of all ranks and steps, in Chrome's format (RUN_DIR/trace.json)"
    parser.add_argument("--json", metavar="FILE", help=text)
    parser.add_argument("--plot", metavar="FILE", help="draw a step, as .svg or .png")
    parser.add_argument("--step", type=int, metavar="N", help="only this one (the last)")
    return parser
