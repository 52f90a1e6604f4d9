"""scripts/gpu_check.sh without a GPU, and the parts that it runs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml.autograd import Tensor
from hpcml.autograd.primitives import primitive
from hpcml.autograd.record import Context
from hpcml.cli.doctor import report
from hpcml.cli.doctor.report import Row
from hpcml.comm.child import Outcome, find_mpiexec
from tests.device import emulator, standin

SCRIPTS = Path(__file__).parents[2] / "scripts"
ON_STAND_IN = """
import sys
from tests.device import emulator, standin
emulator.Kernel.orders = (0,)
with standin.installed():
    import {module}
    {module}.rank(sys.argv[1:])
"""
needs_mpi = pytest.mark.skipif(not find_mpiexec(), reason="no mpiexec")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import scripts by name, here and in what is started."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    before = [str(SCRIPTS), str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(before))
    return importlib.import_module


def told(text: str, kind: str = "row") -> list[Any]:
    """What lines of JSON say under a name."""
    found = [json.loads(line) for line in text.splitlines() if line.startswith('{"')]
    return [line[kind] for line in found if kind in line]


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU here")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    script = str(SCRIPTS / "gpu_check.sh")
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1 and "no NVIDIA GPU" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is here")
def test_where_a_gpu_is_to_be_tested_a_missing_cupy_is_no_skip() -> None:
    """Skipped tests pass: on a machine whose CuPy is broken all would."""
    test = "tests/device/test_messages.py::test_16_bits_are_added_in_float32"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        cwd=SCRIPTS.parent, env=os.environ | {"HPCML_GPU": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "No module named 'cupy'" in done.stdout


@pytest.fixture
def pretended(tmp_path: Path) -> Path:
    """A folder with a nvidia-smi that shows a GPU, and a Python that installs and checks nothing.

    It does not install the wheel named "bad".
    """
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200'\n")
    (tmp_path / "python").write_text(
        '#!/bin/sh\ncase "$*" in *pip*bad-1*) exit 1 ;; *pip*) ;; *) echo "$*" ;; esac\n'
    )
    for name in ("nvidia-smi", "python"):
        (tmp_path / name).chmod(0o755)
    return tmp_path


def test_folders_are_the_callers_and_a_wheel_that_does_not_fit_stops_nothing(
    pretended: Path,
) -> None:
    (pretended / "wheels").mkdir()
    for name in ("bad-1.whl", "good-1.whl"):
        (pretended / "wheels" / name).touch()
    done = subprocess.run(
        [str(SCRIPTS / "gpu_check.sh"), "--wheels", "wheels", "--out", "found", "gpt2"],
        cwd=pretended, capture_output=True, text=True, check=False,
        env=os.environ | {"PATH": f"{pretended}:{os.environ['PATH']}",
                          "HPCML_PYTHON": str(pretended / "python")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "gpu_check.sh: left out: bad-1.whl\n"
    assert f"--out {pretended / 'found'} --spent" in done.stdout and "gpt2" in done.stdout


PROGRAMS = {
    "good": 'print(\'{"row": {"a": 1}}\\n{"b": 2}\')',
    "bad": "raise ValueError('why')",
    "wrong": 'print(\'{"row": {"agrees": true}}\\n{"row": {"agrees": false}}\')',
    "broken": 'print(\'{"row": {"error": "no"}}\')',
    "slow": 'print(\'{"asked": {"what": "speed", "at least": 1, "reached": 0.5, '
            '"verdict": "missed"}}\\n{"b": 1}\')',
    "silent": "print('2 skipped')",
    "unseen": 'print(\'{"row": {"what": "a", "agrees": "not shown", "because": "b"}}\')',
    "long": "import time; print('{\"row\": {}}\\nso far', flush=True); time.sleep(600)",
}  # fmt: skip


def test_a_part_that_fails_or_shows_nothing_is_told_and_stops_no_other(
    scripts: Any, tmp_path: Path
) -> None:
    check = scripts("gpu_check")
    report: dict[str, Any] = {"date": "today", "parts": {}}
    log = tmp_path / "log"
    for name, program in PROGRAMS.items():
        part = check.Part([sys.executable, "-c", program], 1, "something")
        report["parts"][name] = check.run(name, part, log, 2 if name == "long" else 60)
    failures = {name: part["failure"] for name, part in report["parts"].items()}
    assert failures.pop("long").startswith("not done after 2 s: ")
    assert failures == {
        "good": "", "bad": "exit code 1: ValueError: why; showed nothing",
        "wrong": "1 of 2 rows failed", "broken": "1 of 1 rows failed",
        "slow": "missed: speed: 0.5, asked 1", "silent": "showed nothing", "unseen": "",
    }  # fmt: skip
    parts = report["parts"]
    assert parts["good"]["ok"] and parts["good"]["rows"] == [{"a": 1}]
    assert parts["good"]["not shown"] == "" and parts["unseen"]["not shown"] == "a (b)"
    assert parts["good"]["found"] == {"b": 2} and not parts["slow"]["ok"]
    assert parts["long"]["rows"] == [{}] and "so far" in log.read_text()
    page = check.table(json.loads(json.dumps(report)))
    assert "| slow | speed | 1 | 0.5 | missed |" in page and "## good\n\n- b: 2\n" in page
    assert "| bad | something | exit code 1: ValueError: why" in page
    assert "| unseen | something | ok; not shown: a (b) |" in page


def test_shares_of_all_parts_leave_ten_minutes_and_pass_on_what_is_not_needed(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = scripts("gpu_check")
    assert sum(part.share for part in check.PARTS.values()) == check._ALL < 600
    limits, pages = [], []

    def run(name: str, part: Any, log: Path, limit: float) -> Any:
        limits.append(round(limit))
        pages.append((tmp_path / "gpu.md").read_text())
        return check._missing(part) | {"failure": ""}

    monkeypatch.setattr(check, "run", run)
    check.measure(["gpt2", "ways"], tmp_path, {"date": "", "parts": {}}, time.monotonic() + 250)
    first, second = (check.PARTS[name].share for name in ("gpt2", "ways"))
    assert limits == [round(250 * first / (first + second)), 250]
    assert f"| ways | {check.PARTS['ways'].shows} | not reached | 0.0 |" in pages[1]


def test_compilers_stand_still_while_something_is_timed(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = scripts("gpu_check")
    with subprocess.Popen(["sleep", "60"]) as compiler:
        program = (
            f"stat = open('/proc/{compiler.pid}/stat').read()\n"
            "print('{\"state\": \"%s\"}' % stat.rsplit(')')[-1].split()[0])"
        )
        part = check.Part([sys.executable, "-c", program], 1, "")
        parts = {"beside": part, "timed": part._replace(timed=True), "after": part}
        monkeypatch.setattr(check, "PARTS", parts)
        report: dict[str, Any] = {"date": "", "parts": {}}
        check.measure(list(parts), tmp_path, report, time.monotonic() + 60, [compiler])
        compiler.kill()
    states = [part["found"]["state"] for part in report["parts"].values()]
    assert states == ["S", "T", "S"]


def test_the_report_goes_through_a_pipe_and_nothing_outlives_its_part(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Copying it to /dev/stdout did not; children with a session of their own stayed on the GPU."""
    check = scripts("gpu_check")
    child = "import time; open('pid', 'w').write(str(__import__('os').getpid())); time.sleep(600)"
    program = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}], "
        f"start_new_session=True, cwd={str(tmp_path)!r}); time.sleep(600)"
    )
    part = check.Part([sys.executable, "-c", program], 60, "nothing")
    monkeypatch.setattr(check, "PARTS", {"long": part})
    monkeypatch.setattr(check, "COMPILE", [])
    monkeypatch.setattr(check, "PREPARE", [])
    monkeypatch.setattr(check, "_ALL", 8)  # seconds are left for all parts
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), "--spent", "4"])
    monkeypatch.setattr(check.signal, "signal", lambda *_: None)
    assert check.main() == 1
    printed = capfd.readouterr().out
    assert "not done after 4 s" in printed and printed.endswith("failed: long\n")
    ended(int((tmp_path / "pid").read_text()))


def ended(pid: int) -> None:
    """Fail unless a process ends soon."""
    process = Path("/proc", str(pid), "stat")
    for _ in range(100):  # it may be there until somebody has looked at how it ended
        if not process.exists() or process.read_text().rsplit(")")[-1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("a child of the part is still there")


def test_what_is_there_and_cannot_be_imported_is_told(scripts: Any) -> None:
    machine = scripts("gpu_machine")
    assert machine.broken("json") == ""
    assert machine.broken("no_such_module").endswith("No module named 'no_such_module'")


def test_a_job_without_its_launcher_is_a_failure_in_words(scripts: Any) -> None:
    failure = scripts("gpu_rows").follow(["no-such-mpiexec", "-n", "2"], 5, os.environ)
    assert failure.startswith("cannot be started: ") and "no-such-mpiexec" in failure


def test_what_is_compiled_beforehand_is_what_attention_asks_for(
    scripts: Any, standing_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [tuple(command[2:]) for command in scripts("gpu_check").COMPILE]
    compiled = []

    def compile(module: Any) -> None:
        compiled.append(module)

    monkeypatch.setattr(standing_in.RawModule, "compile", compile, raising=False)
    prepare, launch = scripts("gpu_prepare"), importlib.import_module("hpcml.kernels.cuda.launch")
    prepare.main("float32", "32")
    q = standing_in.zeros((1, 1, 2, 32), np.float32)
    kernels = importlib.import_module("hpcml.kernels.cuda")
    out, lse = standing_in.zeros_like(q), standing_in.zeros(q.shape[:3], np.float32)
    kernels.attention(q, q, q, 1.0, True, 0, 0, 0, 0, 0, 0, out, lse)
    assert compiled == [launch.module(standing_in, "attention.cu", "float32", 32)]
    types, depths = (set(each) for each in zip(*jobs, strict=True))
    assert types == set(launch.ELEMENTS) and depths == {"32", "64", "128"}
    for dtype, depth in jobs:  # on a GPU some types have no tiles of some depths
        prepare.main(dtype, depth)
    assert len(compiled) > len(types) * 2


def test_a_check_that_is_terminated_ends_its_part(scripts: Any, tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, gpu_check as g\n"
        "code = \"import os, time; print('{}'); open('pid', 'w').write(str(os.getpid()));"
        ' time.sleep(600)"\n'
        "g.COMPILE = g.PREPARE = []\n"
        f"g.ROOT = pathlib.Path({str(tmp_path)!r})\n"
        "g.PARTS = {'long': g.Part([sys.executable, '-c', code], 1, '')}\n"
        f"sys.argv = ['gpu_check.py', '--out', {str(tmp_path)!r}]\n"
        "sys.exit(g.main())"
    )
    check = subprocess.Popen([sys.executable, "-c", program])
    place = tmp_path / "pid"
    while not place.exists() or not place.read_text():
        assert check.poll() is None
        time.sleep(0.05)
    check.terminate()
    assert check.wait(20) == 143
    ended(int(place.read_text()))


def test_tests_after_one_that_ends_its_process_are_run(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A lost context of the GPU fails what comes after it too, unless it has another process.

    Tests of one type are run by one process after the other, beside those of others.
    """
    tests = scripts("gpu_tests")
    (tmp_path / "tests" / "device").mkdir(parents=True)
    (tmp_path / "tests" / "device" / "test_few.py").write_text(
        "import os, sys, types, pytest\n"
        "@pytest.mark.parametrize('dtype', ['float32', 'float16'])\n"
        "def test_by_type(dtype): assert os.environ['HPCML_GPU_SHARE'] == {'float32': '0',"
        " 'float16': '3'}[dtype]\n"
        "def test_some(): assert os.environ['HPCML_GPU_SHARE'] == '2'\n"
        "one = pytest.mark.parametrize('dtype', ['float32'])\n"
        "@one\n"
        "def test_wrong(dtype): assert 1 == 2, 'not so'\n"
        "@one\n"
        "def test_dies(dtype): os._exit(3)\n"
        "def lost(): raise RuntimeError('illegal address')\n"
        "@one\n"
        "def test_loses(dtype):\n"
        "    runtime = types.SimpleNamespace(deviceSynchronize=lost)\n"
        "    cuda = types.SimpleNamespace(runtime=runtime)\n"
        "    sys.modules['cupy'] = types.SimpleNamespace(cuda=cuda)\n"
        "@one\n"
        "def test_after(dtype): pass\n"
    )
    monkeypatch.setattr(scripts("gpu_rows"), "ROOT", tmp_path)
    ours = ("-m", "not mpi", "-o", "test_limit=75")  # of this repository's tests
    options = tests.PYTEST[3:]
    plain = [part for part in options if part not in ours]
    monkeypatch.setattr(tests, "PYTEST", [*tests.PYTEST[:3], *plain])
    assert tests.main(["few"]) == 0
    printed = capfd.readouterr().out
    (row,) = told(printed)
    assert (row["passed"], row["failed"], row["not run"], row["agrees"]) == (4, 3, 0, False)
    assert row["failures"] == (
        "test_wrong[float32]: AssertionError: not so; test_dies[float32]: ended its process; "
        "test_loses[float32]: the GPU's context was lost: illegal address"
    )
    assert (
        "FAILED tests/device/test_few.py::test_wrong[float32]" in printed
    )  # at once, with all of it


def test_a_file_of_which_nothing_was_run_shows_nothing(scripts: Any) -> None:
    tests = scripts("gpu_tests")
    summary = tests.summary
    shares = [{"count": 3, "tests": {name: ("passed", "")}, "ended": True} for name in "abc"]
    assert summary("kernels", tests.joined(shares), "")["agrees"] is True
    shares[1] = {"tests": {}}  # this one did not begin
    row = summary("kernels", tests.joined(shares), "not done after 9 s")
    assert (row["agrees"], row["not run"], row["failures"]) == (False, 1, "not done after 9 s")
    skipped = {"count": 1, "ended": True, "tests": {"a::b": ("skipped", "no CuPy")}}
    assert summary("kernels", skipped, "")["agrees"] is False
    assert summary("cudnn", skipped, "")["agrees"] == "not shown"
    assert summary("kernels", {"tests": {}}, "exit code 4: usage")["failures"] == (
        "exit code 4: usage"
    )


@pytest.mark.parametrize(
    ("works", "answer"),
    [(["as it is"], {"HPCML_GPU_MPI": "device"}), ([], {"HPCML_GPU_MPI": "staged"}),
     (["wheel"], {"HPCML_GPU_MPI": "device", "LD_LIBRARY_PATH": "wheel"})],
)  # fmt: skip
@needs_mpi
def test_the_way_of_messages_is_found_out_once_for_all_parts(
    works: list[str], answer: dict[str, str], scripts: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    messages, check = scripts("gpu_messages"), scripts("gpu_check")
    tried = []

    def probe(env: dict[str, str], limit: float) -> Outcome:
        tried.append(env.get("LD_LIBRARY_PATH", "as it is"))
        return Outcome({"devices": [0, 0]}) if tried[-1] in works else Outcome(failure="died")

    monkeypatch.setattr(messages.direct, "probe", probe)
    monkeypatch.setattr(messages.direct, "recipe", lambda: {"LD_LIBRARY_PATH": "wheel"})
    monkeypatch.setenv("HPCML_GPU_MPI", "auto")
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    messages.ways()
    printed = capfd.readouterr().out
    assert told(printed, "environment") == [answer]
    assert told(printed)[0]["what"] == "two ranks start"
    gaps = [row["because"] for row in told(printed) if row.get("agrees") == "not shown"]
    assert gaps == ([] if works else ["as it is: died; with the UCX of a wheel: died"])
    assert len(tried) == (1 if works == ["as it is"] else 2)
    # The check hands it on, and later parts ask nobody.
    program = f"print('''{printed}''')"
    asks = (
        "import gpu_messages as g; g.direct.probe = None; print('{\"jobs\":', len(g.jobs()), '}')"
    )
    parts = {
        "mpi": check.Part([sys.executable, "-c", program], 1, ""),
        "collectives": check.Part([sys.executable, "-c", asks], 1, ""),
    }
    monkeypatch.setattr(check, "PARTS", parts)
    report: dict[str, Any] = {"date": "", "parts": {}}
    check.measure(["collectives"], tmp_path, report, time.monotonic() + 60)
    assert report["parts"]["collectives"]["found"] == {"jobs": 4 if works else 2}
    for part in report["parts"].values():
        assert part["ok"] and part["not shown"].startswith("" if works else "messages given to MPI")
        assert bool(part["not shown"]) != bool(works)


@needs_mpi
def test_rows_of_ranks_are_told_at_once_and_a_job_that_dies_loses_one(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = scripts("gpu_rows")
    program = (
        "import os, sys, time; from gpu_rows import tell\n"
        "assert os.environ['OMPI_ALLOW_RUN_AS_ROOT'] == '1'\n"
        "for name in sys.argv[1:]:\n"
        "    if name == 'dies': raise ValueError('it died')\n"
        "    if name == 'hangs': time.sleep(600)\n"
        "    tell({'name': name, 'a': 1}); tell({'name': name, 'done': True})\n"
    )
    names = ["first", "dies", "third", "hangs", "last"]
    rows.in_turn(1, ["-c", program], names, {"ranks": 1}, 6, {})
    found = told(capfd.readouterr().out)
    assert [(row["name"], row.get("a")) for row in found] == [
        ("first", 1), ("dies", None), ("third", 1), ("hangs", None), ("last", None),
    ]  # fmt: skip
    assert found[1]["error"].endswith("ValueError: it died")
    assert "not done after" in found[3]["error"]
    assert found[4]["error"] == "not reached in the 6 s that all of these ranks had"


@needs_mpi
def test_losses_of_processes_are_held_beside_those_of_one_rank(
    scripts: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Here the losses are made up: NaN agrees with nothing."""
    losses = "g.losses = lambda layout, count: [float('nan') if layout == 'cp' else 1.0]"
    program = f"import gpu_processes as g; {losses}\n{ON_STAND_IN.format(module='gpu_processes')}"
    scripts("gpu_rows").in_turn(2, ["-c", program], ["dp", "cp"], {}, 60, os.environ)
    rows = told(capfd.readouterr().out)
    assert [(row["name"], row["agrees"]) for row in rows] == [("dp", True), ("cp", False)]


@pytest.mark.parametrize("count", [2, 4])
def test_every_layout_that_was_asked_for_gives_the_losses_of_one_rank(
    count: int, scripts: Any
) -> None:
    """On the CPU: the same code but for the device."""
    processes = scripts("gpu_processes")
    assert {"dp", "ZeRO 1", "ZeRO 2", "ZeRO 3", "tp", "pp", "spatial"} <= set(processes.LAYOUTS)
    for layout in processes.LAYOUTS:
        one = hpcml.run(processes.losses, layout, 1, "cpu", ranks=1)[0]
        found = hpcml.run(processes.losses, layout, count, "cpu", ranks=count)[0]
        assert len(set(one)) == processes.STEPS
        assert processes.compared(found, one, processes.TOLERANCE)["agrees"], layout


@needs_mpi
def test_collectives_of_processes_are_measured(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if reason := emulator.missing():
        pytest.skip(reason)
    small = "import gpu_messages as g; g.SIZES = (1024,); g.CHECKED = (96,); g.ROUNDS = 1"
    program = ["-c", f"{small}\n{ON_STAND_IN.format(module='gpu_messages')}"]
    env = os.environ | {"HPCML_GPU_MPI": "staged"}
    scripts("gpu_rows").in_turn(2, program, ["values of allreduce", "allreduce"], {}, 100, env)
    values, speed = told(capfd.readouterr().out)
    done = [name.removeprefix("values of ") for name in scripts("gpu_messages").TODO]
    assert done == 2 * list(scripts("gpu_messages").OPERATIONS)
    assert values["agrees"] and speed["bytes"] == 1024 and speed["us"] > 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
     ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 835e12), ("NVIDIA GH200 480GB", 989e12),
     ("NVIDIA GH200 144G HBM3e", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12),
     ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA B200", 2250e12), ("NVIDIA GB200", 2500e12),
     ("NVIDIA H100", 0), ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 0), ("NVIDIA H20", 0),
     ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 0), ("NVIDIA GeForce RTX 4090", 0)],
)  # fmt: skip
def test_a_utilisation_is_of_the_gpu_that_the_name_says(
    name: str, peak: float, scripts: Any
) -> None:
    steps = scripts("gpu_steps")
    assert steps.peak_of(name)[0] == peak
    row = steps.measured(steps.Work((0, 0), 1e12, 1, "tokens"), 0.01, 0, 1.0, name)
    assert row["MFU %"] == (round(1e16 / peak, 1) if peak else "")
    assert ("data sheet" if peak else repr(name)) in steps.peak_of(name)[1]


def test_our_steps_are_measured(
    standing_in: Any, scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = scripts("gpu_steps")
    monkeypatch.setattr(steps, "STEPS", 1)
    monkeypatch.setattr(steps, "WARM", 1)
    monkeypatch.setattr(emulator.Kernel, "orders", (0,))
    standing_in.cuda.runtime.getDeviceProperties = lambda _: {"name": b"NVIDIA H200"}
    row = steps.of_hpcml(steps.Gpt(1, 4, 11, 1, 1, 8))
    assert row["agrees"] and row["ms"] > 0 and row["tokens/s"] > 0 and row["MFU %"] != ""


def test_our_step_is_profiled(
    standing_in: Any, scripts: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found, steps = scripts("gpu_profile"), scripts("gpu_steps")
    task = steps.Gpt(1, 4, 11, 1, 1, 8)
    for module, name, value in (
        (steps, "STEPS", 1), (steps, "WARM", 1), (emulator.Kernel, "orders", (0,)),
        (found, "STEPS", 2), (found, "SPARE", 1 << 16), (found, "AHEAD", 1e-3),
        (found, "TASKS", {"gpt2": task}),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    standing_in.cuda.runtime.getDeviceProperties = lambda _: {"name": b"NVIDIA H200"}
    made = []
    profile = found.profile
    monkeypatch.setattr(found, "profile", lambda *args: made.append(profile(*args)) or made[0])
    found.main()
    rows = told(capsys.readouterr().out)
    assert [row["operator"] for row in rows[-2:]] == ["the GPU waits", "step"]
    assert sum(row["ms"] for row in rows[:-1]) == pytest.approx(rows[-1]["ms"], abs=0.1)
    calls = {(row["operator"], row["part"]): row["calls"] for row in rows}
    for sizes in ("8 to 24", "8 to 8", "8 to 32", "32 to 8", "8 to 11"):
        for part in ("forward", "adjoint 0", "adjoint 1"):
            assert calls.pop((f"linear {sizes}", part)) == 1
    assert not [name for name, _ in calls if name.startswith("linear")]
    assert (calls["gelu", "again"], calls["layer_norm", "again"]) == (1, 3)
    assert calls["embedding", "forward"] == calls["embedding", "adjoint 0"] == 2
    assert calls["packed_attention", "forward"] == calls["packed_attention", "adjoint 0"] == 1
    assert calls["block_squares", "update"] == calls["adam_update", "update"] > 0
    ((spans, count),) = [(timeline.spans, found.STEPS) for timeline in made]
    linear = sum(span.operations for (name, _), span in spans.items() if "linear" in name)
    attention = sum(span.operations for (name, _), span in spans.items() if "attention" in name)
    # Of attention a model's operations are 12 products that are not causal; here 7, by half.
    assert linear + attention * 12 / 7 == pytest.approx(count * task.work().flops)
    update = {name: span.bytes for (name, part), span in spans.items() if part == "update"}
    elements = update["narrow"] / 6  # of float32 to 16 bits
    assert elements >= count * (12 * 8 * 8 + 11 * 8 + 4 * 8 + 3 * 8)
    assert update["adam_update"] == 26 * elements and update["block_squares"] == 2 * elements
    assert spans["gelu", "adjoint 0"].bytes == count * 3 * 4 * 32 * 2
    step, waits = found.our_step(task, task.work()), [standin.syncs()]
    step()
    waits.append(standin.syncs())
    with made[0].step():
        step()
        waits.append(standin.syncs())
    assert waits[2] - waits[1] == waits[1] - waits[0]  # clocks are read after the step


def test_all_time_of_a_step_counts_once(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands still but for what operators take, each another decimal place."""
    found, now = scripts("gpu_profile"), [0]

    class Event:
        def __init__(self) -> None:
            self.at = now[0]

        done = property(lambda self: self.at < now[0])

        def synchronize(self) -> None:
            pass

    def takes(milliseconds: int, value: Any = None) -> Any:
        now[0] += milliseconds
        return value

    @primitive
    def doubled(ctx: Context, x: Any) -> Any:
        ctx.save(x)
        return takes(1, 2 * x)

    doubled.remade(lambda ctx: takes(10, 2 * ctx.saved[0]))
    doubled.adjoint(lambda ctx, g: takes(100, 2 * g))

    @primitive
    def squared(ctx: Context, x: Any) -> Any:
        ctx.save(x)
        return takes(1000, x * x)

    @squared.adjoint
    def squared_x(ctx: Context, g: Any) -> Any:
        (x,) = ctx.saved  # made again
        return takes(10_000, 2 * g * x)

    monkeypatch.setattr(found.optimizer, "narrow", lambda x, out: takes(100_000))
    before = doubled.forward, doubled.remake, squared.adjoints, Tensor.backward
    timeline = found.Timeline(Event, lambda start, end: end.at - start.at)
    for _ in range(2):
        with timeline.step():
            x = Tensor(np.ones(1), requires_grad=True)
            x.register_post_accumulate_grad_hook(lambda _: takes(100_000_000))
            y = squared(doubled(x))
            takes(1_000_000)
            y.backward()
            takes(10_000_000)
            found.optimizer.narrow(np.ones(3, np.float32), np.ones(3, np.float16))
        takes(500)  # between steps
        assert x.gradient == 8
    assert {
        key: (span.calls, span.ms, span.late) for key, span in timeline.spans.items() if span.ms
    } == {
        ("doubled", "forward"): (2, 2, 2), ("doubled", "again"): (2, 20, 2),
        ("doubled", "adjoint 0"): (2, 200, 2), ("squared", "forward"): (2, 2000, 2),
        ("squared", "adjoint 0"): (2, 20_000, 2), ("narrow", "update"): (2, 200_000, 2),
        (found.BETWEEN, "forward"): (0, 2_000_000, 2),
        (found.BETWEEN, "backward"): (0, 200_000_000, 2),
        (found.BETWEEN, "update"): (0, 20_000_000, 2),
    }  # fmt: skip
    assert before == (doubled.forward, doubled.remake, squared.adjoints, Tensor.backward)
    *_, waits, step = found.table(timeline.spans, 2, 2e8, 0.0)
    assert (waits["ms"], step["ms"]) == (200_000_000 - 101_111_111, 200_000_000)


@pytest.mark.parametrize("task", ["gpt2", "resnet50"])
def test_pytorchs_steps_are_measured(
    task: str, scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU: the same code but for the device."""
    pytest.importorskip("torch")
    steps = scripts("gpu_steps")
    monkeypatch.setattr(steps, "STEPS", 1)
    monkeypatch.setattr(steps, "WARM", 1)
    tasks = {"gpt2": steps.Gpt(1, 4, 11, 1, 1, 8), "resnet50": steps.Resnet(2, 32, 18)}
    row = steps.of_torch(tasks[task], False, "cpu")
    assert row["agrees"] and row["ms"] > 0


def test_pytorchs_model_counts_positions_on_the_device_of_its_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of the CPU are refused on a GPU: there every step of PyTorch had failed."""
    torch = pytest.importorskip("torch")
    from hpcml.bench.step import Size
    from hpcml.bench.torch_peer import TorchGPT

    model, tokens = TorchGPT(Size(1, 1, 8, 4, 1), 11), torch.zeros((1, 4), dtype=torch.int64)
    places, arange = [], torch.arange
    monkeypatch.setattr(
        torch, "arange", lambda n, device=None: places.append(device) or arange(n, device=device)
    )
    model(tokens, tokens)
    assert places == [tokens.device]


@pytest.mark.parametrize(
    ("eager", "verdict"),
    [({"ms": 9.0}, "missed"), ({"ms": 10.0}, "held"), (None, "not shown")],
)
def test_contenders_have_processes_of_their_own_and_what_was_asked_stands_beside(
    eager: Any, verdict: str, scripts: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    steps = scripts("gpu_steps")
    rows = {"hpcml": {"ms": 10.0}, "PyTorch eager": eager, "torch.compile": {"ms": 5.0}}
    started = []

    def follow(command: list[str], limit: float, env: Any, each: Any) -> str:
        started.append(command[2:])
        if rows[command[-1]] is None:
            return "exit code 1: CUDA out of memory"
        each({"contender": command[-1], **rows[command[-1]]})
        return ""

    monkeypatch.setattr(steps, "follow", follow)
    steps.compare("gpt2")
    printed = capsys.readouterr().out
    assert started == [["gpt2", contender] for contender in rows]
    found = told(printed)
    assert [row["contender"] for row in found] == list(rows) and found[2][
        "ours is faster by"
    ] == 0.5
    assert [asked["verdict"] for asked in told(printed, "asked")] == [verdict]
    if eager is None:
        assert found[1]["error"] == "exit code 1: CUDA out of memory"


def test_both_ways_of_an_operator_are_compared(
    standing_in: Any, scripts: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ways = scripts("gpu_ways")
    monkeypatch.setattr(ways, "STEPS", 1)
    monkeypatch.setattr(ways, "ATTENTION", (1, 1, 64, 16))
    monkeypatch.setattr(ways, "LAYERS", ((2, 5, 3, 8, 3, 2),))
    monkeypatch.setenv("HPCML_CUDNN", "auto")  # to be put back
    with standin.with_cudnn():
        ways.main()
    rows = told(capsys.readouterr().out)
    assert [row["type"] for row in rows] == ["bf16"] * 5 + ["fp32"] * 3
    assert all(row["way"].startswith("cuDNN") and row["agrees"] for row in rows)
    assert any(row["difference"] > 0 for row in rows)


def test_where_cudnn_takes_nothing_no_row_agrees(
    standing_in: Any, scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = scripts("gpu_ways")
    monkeypatch.setattr(ways, "STEPS", 1)
    monkeypatch.setenv("HPCML_CUDNN", "auto")
    (_, compute), *_ = ways.of_layer(ways.np.float32, 2, 5, 3, 8, 3, 2).items()
    row = ways.compared("fp32", compute)
    assert row["agrees"] == "not shown" and "cudnn" in row["because"].lower()


def test_the_doctors_findings_are_rows_and_without_a_report_its_part_fails(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor = scripts("gpu_doctor")
    rows = [Row("mpi job", "fail", "no luck", "try"), Row("gpus", "ok", "0: H200")]
    calls = [{"operation": "send", "status": "ok"}, {"operation": "allreduce", "status": "died"}]
    program = f"print({report.as_json(rows, calls)!r}); raise SystemExit(1)"
    monkeypatch.setattr(doctor, "COMMAND", [sys.executable, "-c", program])
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    found = told(printed)
    assert [(row["name"], row["agrees"]) for row in found] == [("mpi job", False), ("gpus", True)]
    assert told(printed, "calls of the communication") == ["1 of 2 work"]
    assert '"status": "died"' in printed  # all of it is in the log
    monkeypatch.setattr(doctor, "COMMAND", [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(doctor, "left", lambda: 1.0)
    assert doctor.main() == 1
    assert capsys.readouterr().out.endswith("error: no report: no answer within 1 s\n")
