"""A part of the check of the GPU: what `hpcml doctor` says of this machine, a row for each finding.

Its whole report is in the log; messages take the way that the part `mpi` has found.
"""

from __future__ import annotations

import json
import sys

from gpu_rows import left, reason, say, tell

from hpcml.comm import child

COMMAND = [sys.executable, "-m", "hpcml", "doctor", "--json"]


def main() -> int:
    """Tell the findings; 1 if there is no report."""
    done = child.start(COMMAND, left())
    print(done.output, done.errors, sep="\n", flush=True)
    try:
        report = json.loads(done.output)
    except json.JSONDecodeError:
        print(f"error: no report: {done.failure or reason(done.errors.splitlines())}")
        return 1
    calls = report["calls"]
    bad = [call for call in calls if call["status"] != "ok"]
    say(**{"calls of the communication": f"{len(calls) - len(bad)} of {len(calls)} work"})
    for row in report["checks"]:
        tell(row | {"agrees": row["status"] != "fail"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
