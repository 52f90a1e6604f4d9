"""The reports of `hpcml bench step` as tables for people."""

from __future__ import annotations

from itertools import groupby

from hpcml.bench.step import Row
from hpcml.bench.zero_show import columns


def table(report: Row) -> str:
    """What was measured where, and a row for each size or layout."""
    if report["part"] == "memory":
        lines = _memory(report)
    elif report["part"] == "tensor":
        lines = _tensor(report)
    elif report["ranks"] == 1:
        lines = _one_rank(report)
    else:
        lines = _ranks(report)
    return "\n".join([_title(report), lines, *_notes(report)])


def _title(report: Row) -> str:
    what = "memory of a training step" if report["part"] == "memory" else "one training step"
    ranks, threads, peer = report["ranks"], report["threads"], report["peer"]
    where = (f"{ranks} ranks of " if ranks > 1 else "") + f"{threads} thread{'s'[: threads > 1]}"
    numpys = report["blas"][0] if report["blas"] else {}
    beside = f"; beside {peer} {report['packages'][peer]}" if peer else ""
    return (
        f"{what}, {report['precision']}, {where}, {report['cpu']}{beside}\n"
        f"GEMM by {report['gemm']}; NumPy's BLAS: "
        f"{numpys.get('internal_api')} {numpys.get('version')} ({numpys.get('architecture')})"
    )


def _one_rank(report: Row) -> str:
    peer, compiled = report["peer"], any(map(_asked_to_compile, report["rows"]))
    rows = [["(layers, width, block, batch)", "hpcml ms", "GEMM"]]
    if peer:
        rows[0] += [f"{peer} ms", "GEMM", "ratio", "GEMM ratio"]
    if compiled:
        rows[0] += ["compiled ms", "ratio"]
    for row in report["rows"]:
        cells = [row["size"], _ms(row["ours"]), f"{row['gemm_ours'] / row['ours']:.0%}"]
        if peer:
            cells += [_ms(row["peer"]), f"{row['gemm_peer'] / row['peer']:.0%}",
                      f"{row['ratio']:.2f}", f"{row['gemm_ratio']:.2f}"]  # fmt: skip
        if "compiled" in row:
            cells += [_ms(row["compiled"]), f"{row['compiled_ratio']:.2f}"]
        elif compiled:
            cells += ["not built", "-"]
        rows.append(cells)
    return columns(rows)


def _asked_to_compile(row: Row) -> bool:
    return "compiled" in row or "not_built" in row


def _ranks(report: Row) -> str:
    """A block for each size: stages beside the peer's, then what has no counterpart."""
    peer, blocks = report["peer"], []
    for size, found in groupby(report["rows"], lambda row: row["size"]):
        rows = list(found)
        stages = [["", "hpcml ms", *([f"{peer} ms", "ratio", "difference of losses"] * bool(peer))]]
        others = [["", "hpcml ms for as many samples", "times stage 0"]]
        for row in rows:
            cells = [row["layout"], _ms(row["ours"])]
            if "per_sample" in row:
                others.append([*cells, f"{row['per_sample']:.3f}"])
            elif "peer" in row:
                stages.append([*cells, _ms(row["peer"]), f"{row['ratio']:.2f}",
                               f"{row['loss_difference']:.1e}"])  # fmt: skip
            else:
                stages.append([*cells, *(["cannot run", "-", "-"] * bool(peer))])
        names = ["", *(row["beside"] for row in rows if "beside" in row)]
        lines = columns(stages).splitlines()
        if peer:  # left-aligned, beside what is to be compared
            lines = [f"{line}  {name}".rstrip() for line, name in zip(lines, names, strict=True)]
        blocks += [f"\n{size}: layers, width, block, batch of a rank", *lines, ""]
        blocks.append(columns(others))
    return "\n".join(blocks)


def _tensor(report: Row) -> str:
    """A block for each size, a row for each way to divide it."""
    blocks = []
    for size, found in groupby(report["rows"], lambda row: row["size"]):
        rows = [["", "ms", "times as fast as dp", "calls", "MiB sent", "MiB activations", "states"]]
        for row in found:
            cells = ["cannot run", *["-"] * 5]
            if "ours" in row:
                sizes = [_mib(row[name]) for name in ("sent", "activations", "held")]
                cells = [_ms(row["ours"]), f"{row['ratio']:.2f}", str(row["calls"]), *sizes]
            rows.append([row["layout"], *cells])
        blocks += [f"\n{size}: layers, width, block, batch of all ranks", columns(rows)]
    return "\n".join(blocks)


def _memory(report: Row) -> str:
    peer = report["peer"]
    rows = [["(layers, width, block, batch)", "hpcml MiB"]]
    if peer:
        rows[0] += [f"{peer} MiB", "ratio"]
    for row in report["rows"]:
        cells = [row["size"], _mib(row["ours"])]
        if peer:
            cells += [_mib(row["peer"]), f"{row['ratio']:.2f}"]
        rows.append(cells)
    return columns(rows)


def _notes(report: Row) -> list[str]:
    """Why something is missing."""
    notes = []
    for row in report["rows"]:
        if "not_built" in row:
            notes.append(f"{row['size']}: torch.compile: not built: {row['not_built']}")
        if "cannot_run" in row:
            what = row.get("beside", row["layout"])
            notes.append(f"{row['size']}: {what}: cannot run: {row['cannot_run']}")
    return notes


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _mib(nbytes: float) -> str:
    return f"{nbytes / (1 << 20):.1f}"
