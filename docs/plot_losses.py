"""Draw the losses of runs into one picture (needs matplotlib: the extra `plot`).

python docs/plot_losses.py OUT.png RUN_DIR [RUN_DIR ...]
"""

import json
import sys
from pathlib import Path

from matplotlib import pyplot as plt

out, *folders = sys.argv[1:]
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for number, folder in enumerate(map(Path, folders)):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    ranks = len(json.loads((folder / "env.json").read_text())["ranks"])
    summary = json.loads((folder / "summary.json").read_text())
    label = f"{ranks} rank{'s' * (ranks > 1)}: validation loss {summary['val_loss']:.3f}"
    style = {"linewidth": 3 - 2 * number, "color": ("#9ec9e2", "#d62728")[number % 2]}
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], label=label, **style)
axes.set(xlabel="step", ylabel="training loss", ylim=(1.5, 4.3))
axes.grid(alpha=0.3)
axes.legend(frameon=False)
figure.savefig(out, dpi=110)
