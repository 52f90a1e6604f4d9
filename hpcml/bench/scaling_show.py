"""The report of `hpcml bench scaling` for people: a table, and a picture for print."""

from __future__ import annotations

from typing import Any

from hpcml import pictures
from hpcml.bench.step import Size

Row = dict[str, Any]

_MARKS = "osD^v*"
_LINES = ("-", "--", ":", "-.")


def table(report: dict[str, Any]) -> str:
    """The report as text; times and shares are medians over rounds, with the least and largest."""
    peaks = ", ".join(
        f"{peak['flops_per_second'] * 1e-9:.0f} GF/s on {peak['cores']}" for peak in report["peak"]
    )
    rows = [["", "ranks", "threads", "batch", "step, ms", "speed-up", "efficiency, %",
             "compute max/mean", "peak MiB", "max/mean", "utilisation, %"]]  # fmt: skip
    rows += [
        [
            row["kind"], str(row["ranks"]), str(row["threads"]), str(row["batch"]),
            _range(row["seconds"], 1e3), f"{row['speedup']['median']:.2f}",
            _range(row["efficiency"], 1e2), f"{row['compute_balance']['median']:.3f}",
            f"{row['memory'] / (1 << 20):.1f}", f"{row['memory_balance']:.3f}",
            _range(row["utilisation"], 1e2),
        ]
        for row in report["rows"]
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    title = (
        f"training step of {Size(**report['size'])}, fp32, AdamW, clipping; {report['rounds']} "
        f"rounds of jobs on {report['cores']} core(s), {report['cpu']}, GEMM by {report['gemm']}"
    )
    about = f"{report['flops_per_token'] * 1e-6:.2f} MFLOP a token; peak of NumPy's products:"
    left_out = [
        f"left out: {ranks} x {threads} threads on {report['cores']} core(s)"
        for ranks, threads in report["left_out"]
    ]
    return "\n".join([title, f"{about} {peaks}", *lines, *left_out])


def _range(spread: dict[str, float], scale: float) -> str:
    least, middle, most = (spread[key] * scale for key in ("min", "median", "max"))
    return f"{middle:.1f} ({least:.1f}..{most:.1f})"


def plot(report: dict[str, Any], path: str) -> None:
    """Draw the efficiency by cores used: strong and weak side by side, a line a thread count."""
    plt = pictures.pyplot()
    kinds = {"strong": "the batch of a step stays", "weak": "the batch of a rank stays"}
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 4), sharey=True, layout="constrained")
    counts = sorted({row["threads"] for row in report["rows"]})
    for place, (kind, meaning) in zip(axes, kinds.items(), strict=True):
        for number, threads in enumerate(counts):
            rows = [r for r in report["rows"] if (r["kind"], r["threads"]) == (kind, threads)]
            aside = 1 + 0.03 * (number - (len(counts) - 1) / 2)  # so that bars do not hide others
            middle, below, above = (_bars(rows, key) for key in ("median", "min", "max"))
            place.errorbar(
                [row["ranks"] * threads * aside for row in rows], middle,
                yerr=[
                    [m - b for m, b in zip(middle, below, strict=True)],
                    [a - m for m, a in zip(middle, above, strict=True)],
                ],
                marker=_MARKS[number % len(_MARKS)], linestyle=_LINES[number % len(_LINES)],
                capsize=4, label=f"{threads} thread{'s' * (threads > 1)} per rank",
            )  # fmt: skip
        used = sorted({row["ranks"] * row["threads"] for row in report["rows"]})
        place.axhline(100, color="gray", linewidth=0.8)
        place.set_xscale("log", base=2)
        place.set_xticks(used, [str(n) for n in used])
        place.minorticks_off()
        place.set_xlim(used[0] / 1.2, used[-1] * 1.2)
        place.set(title=f"{kind}: {meaning}", xlabel="cores used (ranks × threads)")
        place.grid(axis="y", linewidth=0.3)
    axes[0].set(ylabel="parallel efficiency (%)", ylim=(0, None))
    title = f"median and range of {report['rounds']} rounds"
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(counts), title=title)
    figure.savefig(path, dpi=200)


def _bars(rows: list[Row], key: str) -> list[float]:
    return [row["efficiency"][key] * 100 for row in rows]
