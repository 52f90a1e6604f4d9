"""`hpcml check`: healthy runs agree, and faults are found where they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcml import nn
from hpcml.cli import main
from hpcml.cli.check import text
from hpcml.collectives import all_reduce, copy
from hpcml.comm import Mesh, run
from hpcml.nn import functional as F
from hpcml.parallel import gradients, zero
from hpcml.parallel.tensor import RowParallelLinear
from hpcml.parallel.tensor.positions import Positions
from hpcml.train import config as configuration
from hpcml.train.build import begin
from hpcml.train.check import check
from hpcml.train.verdict import Report
from tests.train.jobs import hpcml, write_text

cases = pytest.mark.parametrize
TEXT = """
[data]
path = "{text}"
tokenizer = "char"
sequence_length = 7
[train]
global_batch = 5
[optim]
grad_clip = 0.5
[model]
"""
MODELS = {
    "gpt": "layers = 2\nheads = 12\nwidth = 24\ndropout = 0.2\n",
    "own": 'kind = "tests.train.own:Own"\n',
}
MLP = """
[data]
kind = "regression"
samples = 40
in_features = 6
out_features = 5
[train]
global_batch = 5
[model]
kind = "mlp"
hidden = [11, 9, 7]
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configurations by name of the model."""
    folder = tmp_path_factory.mktemp("check")
    written = TEXT.format(text=write_text(folder / "text.txt", 100))
    texts = {name: written + model for name, model in MODELS.items()} | {"mlp": MLP}
    for name, content in texts.items():
        (folder / f"{name}.toml").write_text(content)
    return {name: folder / f"{name}.toml" for name in texts}


def report_of(job: Path, *overrides: str, precision: str = "fp64") -> Report:
    """Of a check on as many threads as the mesh needs; every rank must say the same."""
    given = [f"train.precision={precision}", *overrides]
    config = configuration.load(job, given)
    sizes = config.mesh

    def program() -> Report:
        return check(config, begin(config)[0])

    reports = run(program, ranks=max(sizes.dp, 1) * ranks_within(sizes), timeout=60)
    assert all(report == reports[0] for report in reports)
    return reports[0]


def ranks_within(sizes: Any) -> int:
    """Ranks of a mesh without those along dp."""
    return prod(n for name, n in asdict(sizes).items() if name != "dp")


SP = "tensor.sequence_parallel=true"
HEALTHY = [
    ("gpt", ""),
    ("gpt", "mesh.tp=2"),
    ("gpt", f"mesh.tp=2 {SP} data_parallel.overlap=always"),
    ("gpt", "mesh.tp=2 tensor.split=naive"),
    ("gpt", f"mesh.tp=3 {SP} train.microbatch=2"),
    ("gpt", f"mesh.tp=4 {SP} tensor.partition_activations=yes"),
    ("gpt", "mesh.dp=2 mesh.tp=2 zero.stage=1"),
    ("gpt", f"mesh.dp=2 mesh.tp=2 zero.stage=3 {SP} train.microbatch=1"),
    ("gpt", f"mesh.cp=2 mesh.tp=2 {SP}"),
    ("gpt", "mesh.cp=3 zero.stage=2"),
    ("gpt", "mesh.dp=4 zero.stage=2 train.microbatch=2"),  # one rank has no samples
    ("gpt", "mesh.dp=4 train.microbatch=2 run.deterministic=true"),
    ("mlp", "mesh.tp=3"),
    ("mlp", "mesh.dp=2 mesh.tp=2 zero.stage=2"),
    ("own", f"mesh.tp=2 {SP}"),
    ("own", "mesh.tp=3 zero.stage=1"),
    ("own", f"mesh.dp=2 mesh.tp=2 zero.stage=3 {SP}"),
    ("gpt", "mesh.pp=2 train.microbatch=1"),
    ("gpt", "mesh.dp=2 mesh.pp=2 pipeline.schedule=zero-bubble zero.stage=2 train.microbatch=1"),
    ("gpt", f"mesh.pp=2 mesh.tp=2 pipeline.schedule=gpipe {SP}"),
    ("mlp", "mesh.pp=3 pipeline.schedule=zero-bubble train.microbatch=2"),
]


@cases(("kind", "overrides"), HEALTHY)
def test_healthy_runs_agree(jobs: dict[str, Path], kind: str, overrides: str) -> None:
    report = report_of(jobs[kind], *overrides.split())
    assert report.first is None and report.agrees and report.steps == 2
    names = {layer.name for layer in report.layers}
    last = {"gpt": "lm_head", "mlp": "layers.6", "own": "head"}[kind]
    assert {last, "the loss"} <= names
    assert ("the model" in names) == ("mesh.pp" not in overrides)  # its links are called, not it
    for layer in report.layers:
        assert layer.forward is not None and layer.backward is not None, layer.name
        assert max(layer.forward, layer.backward, layer.gradient or 0) < 1e-12, layer
        assert layer.agrees
    assert all(stage.agrees and stage.off < 1e-8 for stage in report.others.values())
    assert list(report.others) == ["first values", "loss", "norm", "update"]


@cases("precision", ["fp32", "bf16", "fp16"])
def test_fewer_digits_are_no_fault(jobs: dict[str, Path], precision: str) -> None:
    for kind in ("gpt", "own"):
        report = report_of(jobs[kind], "mesh.dp=2", "mesh.tp=2", SP, precision=precision)
        assert report.agrees and report.steps == 1, text(report)
        assert max(layer.forward or 0 for layer in report.layers) > 1e-9  # it is computed in them


# --- faults -------------------------------------------------------------------------------------


def row(at: str, leave: Callable[[RowParallelLinear, Any], Any]) -> Callable[..., Any]:
    """A forward of row-parallel layers, with another end of the region in one of them."""

    def forward(self: RowParallelLinear, input: Any) -> Any:
        product = F.linear(input, self.weight)
        right = self.name.endswith(at) is False
        total = self.positions.leave(product) if right else leave(self, product)
        return total if self.bias is None else total + self.bias

    return forward


def not_reduced(self: RowParallelLinear, product: Any) -> Any:
    self.positions.features = None
    return product


def reduced_twice(self: RowParallelLinear, product: Any) -> Any:
    return all_reduce(self.positions.leave(product), self.axis, to="I")


def times_two(self: RowParallelLinear, product: Any) -> Any:
    return self.positions.leave(product) * 2.0


def one_nan(self: RowParallelLinear, product: Any) -> Any:
    return self.positions.leave(product) * (np.nan if self.axis.rank else 1.0)


def biased_row(self: RowParallelLinear, input: Any) -> Any:
    return self.positions.leave(F.linear(input, self.weight, self.bias))


def fill_of_parts(fill: Callable[..., None]) -> Callable[..., None]:
    """First values that depend on which part of a parameter is made."""

    def filled(self: nn.Parameter, out: Any, start: int, seed: int) -> None:
        odd = self.part is not None and self.part.ranges[0][0] > 0 and "c_fc.w" in self.name
        fill(self, out, start, seed + odd)

    return filled


MISSING, DOUBLED = "a reduction over tp is missing", "= tp: a reduction over tp is doubled"
C_PROJ = "transformer.h.1.mlp.c_proj"
REDUCED = (RowParallelLinear, "forward", row(".h.1.mlp.c_proj", not_reduced))
TWICE = (RowParallelLinear, "forward", row(".h.1.mlp.c_proj", reduced_twice))
FAULTS: dict[str, tuple[Any, str, str, tuple[str, str, str], str]] = {
    "missing forward": (REDUCED, "gpt", "mesh.tp=3", ("forward", C_PROJ, "tp"), MISSING),
    "missing, beside dp": (
        REDUCED, "gpt", "mesh.dp=2 mesh.tp=2 zero.stage=3", ("forward", C_PROJ, "tp"), MISSING,
    ),
    "missing, in a stage": (
        REDUCED, "gpt", "mesh.pp=2 mesh.tp=2 train.microbatch=1", ("forward", C_PROJ, "tp"),
        MISSING,
    ),
    "missing, with a bias": (
        (RowParallelLinear, "forward", row("layers.2", not_reduced)),
        "mlp", "mesh.tp=2", ("forward", "layers.2", "tp"), MISSING,
    ),
    "missing backward": (
        (Positions, "enter", lambda self, x: x),
        "gpt", "mesh.tp=2", ("backward", "lm_head", "tp"), MISSING,
    ),
    "doubled forward": (TWICE, "gpt", "mesh.tp=3", ("forward", C_PROJ, "tp"), f"3.00 {DOUBLED}"),
    "doubled, of sequence parts": (
        (RowParallelLinear, "forward", row(".h.1.mlp.c_proj", times_two)),
        "gpt", f"mesh.tp=2 {SP}", ("forward", C_PROJ, "tp"), f"2.00 {DOUBLED}",
    ),
    "doubled, with a bias, beside dp": (
        (RowParallelLinear, "forward", row("down", reduced_twice)),
        "own", "mesh.dp=2 mesh.tp=2", ("forward", "down", "tp"), f"2.00 {DOUBLED}",
    ),
    "doubled backward": (
        (Positions, "enter", lambda self, x: copy(copy(x, self.tp), self.tp)),
        "gpt", "mesh.dp=2 mesh.tp=2", ("backward", "lm_head", "tp"), f"2.00 {DOUBLED}",
    ),
    "a bias that every rank adds": (
        (RowParallelLinear, "forward", biased_row),
        "gpt", "mesh.tp=2", ("forward", "transformer.h.0.attn.c_proj", "tp"),
        "the bias is added once by each rank of tp",
    ),
    "first values by rank": (
        None, "own", "model.kind=tests.train.own:ByRank mesh.dp=2 mesh.tp=2",
        ("first values", "down", "dp tp"), "make them from the seed and the name",
    ),
    "first values by part": (
        (nn.Parameter, "fill", fill_of_parts(nn.Parameter.fill)),
        "gpt", "mesh.tp=2", ("first values", "transformer.h.0.mlp.c_fc", "tp"), "over tp",
    ),
    "a norm of heads that is not declared": (
        None, "own", "model.kind=tests.train.own:Forgetful mesh.tp=3",
        ("gradient", "inner.norm", "tp"), MISSING,
    ),
    "gradients of dp ranks": (
        (gradients.Gradients, "_reduce_at_end", lambda self: None),
        "gpt", "mesh.dp=2 mesh.tp=2", ("gradient", "transformer.wte", "dp"),
        "a reduction over dp is missing",
    ),
    "updates of dp ranks": (
        (zero, "gather", lambda *given: None),
        "mlp", "mesh.dp=2 zero.stage=2", ("update", "layers.0", "dp"), "a gather over dp is",
    ),
    "a number that is none, on one rank": (
        (RowParallelLinear, "forward", row(".h.1.mlp.c_proj", one_nan)),
        "gpt", "mesh.tp=2", ("forward", C_PROJ, "tp"), "tp hold different values",
    ),
}  # fmt: skip


@cases("fault", FAULTS)
def test_a_fault_is_named_by_layer_axis_and_cause(
    jobs: dict[str, Path], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch, kind, overrides, (stage, module, axes), cause = FAULTS[fault]
    if patch is not None:
        monkeypatch.setattr(*patch)
    report = report_of(jobs[kind], *overrides.split())
    first = report.first
    assert first is not None and not report.agrees
    assert (first.stage, first.module, first.axes) == (stage, module, axes.split()), text(report)
    assert cause in first.cause
    assert first.layer == module and f" of {module}" in first.what
    assert text(report).splitlines()[-1].startswith(f"DIFFERS first in step {first.step}, {stage}")
    assert first.step == (2 if "bias that" in fault else 1)
    blamed = next(layer for layer in report.layers if layer.name == module)
    if stage == "forward":  # what came before it is as it should be
        before = report.layers[: report.layers.index(blamed)]
        assert not blamed.agrees and all((layer.forward or 0) < 1e-12 for layer in before)


def test_a_fault_of_a_models_own_code_is_named_by_the_module_it_is_in(
    jobs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two layers: a sum over features of which the ranks have parts."""
    from tests.train.own import Own

    def forward(self: Own, tokens: Any) -> Any:
        x = self.embed(tokens)
        wide = self.up(x)
        return self.head(x + self.drop(self.down(self.inner(wide * wide.sum(-1, keepdim=True)))))

    monkeypatch.setattr(Own, "forward", forward)
    first = report_of(jobs["own"], "mesh.tp=2").first
    assert first is not None
    assert (first.module, first.layer, first.kind) == ("inner", "the model", "Own")
    assert first.what == "input of inner" and first.cause.startswith("not explained by a ratio")


# --- the command --------------------------------------------------------------------------------


def test_exit_codes_and_output(
    jobs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    own, gpt = str(jobs["own"]), str(jobs["gpt"])
    assert main(["check", gpt, "train.precision=fp32"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("serial beside one rank, fp32, 1 step")
    assert shown[-1] == "agrees: in 1 step serial and parallel are the same but for rounding"
    assert "(--all shows them)" in "".join(shown) and len(shown) < 30
    assert main(["check", gpt, "--all"]) == 0
    every = capsys.readouterr().out
    assert "... " not in every and "transformer.h.1.mlp.gelu" in every
    assert main(["check", own, "model.kind=tests.train.own:Unstable", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["agrees"] is False and found["precision"] == "fp64"
    assert found["first"]["what"] == "first values of down.bias"
    assert list(tmp_path.iterdir()) == []  # nothing is written


@cases(
    ("arguments", "said"),
    [
        ([], "name a configuration: hpcml check CONFIG.toml"),
        (["mesh.tp=2"], "name a configuration"),
        (["{own}", "--every"], 'unknown option "--every"'),
        (["{own}", "mesh.tp=2"], "tp(2) = 2 ranks, but 1 was started"),
        (["{own}", "model.width=3"], "unknown key model.width=3"),
        (["{own}", "data_parallel.mode=local"], "check data_parallel.mode=sync"),
        (["{own}", "pipeline.schedule=pipedream"], "check pipeline.schedule=1f1b"),
    ],
)
def test_bad_input_is_one_line(
    jobs: dict[str, Path], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *(argument.format(**jobs) for argument in arguments)]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_a_serial_run_that_is_no_good_itself(
    jobs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(jobs["mlp"]), "optim.lr=1e300"]) == 3
    assert "there is nothing to compare with" in capsys.readouterr().err


def test_under_mpiexec(jobs: dict[str, Path], tmp_path: Path) -> None:
    done = hpcml("check", jobs["own"], "mesh.tp=2", "model.kind=tests.train.own:Forgetful",
                 ranks=2, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("DIFFERS first in step 1, gradient: gradient of inner.norm.weight")
    assert MISSING in last and done.stdout.count("DIFFERS first") == 1


@pytest.mark.mpi
@cases("kind", ["gpt", "own"])
def test_with_mpi(jobs: dict[str, Path], kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Likewise on the processes of mpiexec: healthy, and with a fault that only rank 0 prints."""
    mesh = Mesh()
    divided = f"mesh.tp={mesh.size}"
    assert main(["check", str(jobs[kind]), divided, SP]) == 0
    assert ("agrees" in capsys.readouterr().out) == (mesh.rank == 0)
    if mesh.size > 1:
        faulty = "model.kind=tests.train.own:ByRank"
        assert main(["check", str(jobs["own"]), divided, faulty, "--json"]) == 1
        shown = capsys.readouterr().out
        assert mesh.rank > 0 or json.loads(shown)["first"]["axes"] == ["tp"]
