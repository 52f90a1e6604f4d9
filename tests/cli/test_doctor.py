"""The doctor: every finding is a row, whatever the probes do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hpcml.cli import doctor
from hpcml.cli.doctor import cells, gpu, host, mpi, report
from hpcml.cli.doctor.report import Row
from hpcml.comm import child, direct
from hpcml.comm.child import Outcome, find_mpiexec

NAMES = {
    "python", "numpy", "numba", "blas", "cores", "shared memory", "mpi library", "mpiexec", "srun",
    "cupy", "gpus", "devices of ranks", "gpu messages",
}  # fmt: skip
JOB = {
    "mpi4py", "mpi job", "thread level", "ranks per node", "core masks", "blas threads",
    "communication", "communication thread", "shared windows", "16-bit sums of mpi",
}  # fmt: skip
RANKS: list[dict[str, Any]] = [
    {"host": "a", "local_rank": 0, "cores": [0, 1], "blas_threads": 2, "device": None},
    {"host": "a", "local_rank": 1, "cores": [0, 1], "blas_threads": 2, "device": None},
]


def outside(command: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), **os.environ, **environ}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=100, check=False
    )


def test_the_report_is_whole_and_its_process_has_no_mpi() -> None:
    code = (
        "import sys; from hpcml.cli import main; code = main(['doctor', '--json']); "
        "assert not {'mpi4py', 'numba', 'cupy'} & set(sys.modules); sys.exit(code)"
    )
    done = outside([sys.executable, "-c", code])
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    checks = {row["name"]: row for row in found["checks"]}
    assert found["ok"] is True
    assert set(checks) >= NAMES
    assert all(set(row) == {"name", "status", "value", "remedy"} for row in checks.values())
    if checks["mpi library"]["status"] != "absent" and checks["mpiexec"]["status"] != "absent":
        assert set(checks) == NAMES | JOB
        assert checks["mpi job"]["status"] == "ok"
        assert checks["ranks per node"]["value"].startswith("2 on ")
        assert checks["communication"]["status"] == "ok"
        tried = [tuple(call[key] for key in cells.Cell._fields) for call in found["calls"]]
        assert tried == cells.plan(device=False)
        assert {call["status"] for call in found["calls"]} == {"ok"}


@pytest.mark.skipif(not find_mpiexec(), reason="no mpiexec")
def test_a_job_of_doctors_gives_one_report() -> None:
    """Under a launcher the probes run as jobs of their own, and one rank speaks."""
    done = outside([find_mpiexec(), "-n", "2", sys.executable, "-m", "hpcml", "doctor", "--json"])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {row["name"]: row["status"] for row in found["checks"]}.get("mpi job") != "fail"


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("import os; os.abort()", "killed by SIGABRT"),
        ("import sys; sys.exit(7)", "exit code 7"),
        ("import sys; sys.exit(139)", "killed by SIGSEGV"),
        (
            "import sys; print('... EXIT STRING: Bus error (signal 7)'); sys.exit(7)",
            "killed by SIGBUS",
        ),
        ("raise RuntimeError('no luck')", "exit code 1: RuntimeError: no luck"),
        ("print('hello')", "no result"),
        ("print('{broken')", "no result"),
        ("print('{}' if 0 else '[1]')", "no result"),
    ],
)
def test_a_failing_probe_says_why(code: str, failure: str) -> None:
    assert child.run([sys.executable, "-c", code]) == Outcome(failure=failure)


def test_a_probe_that_hangs_ends_with_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; "
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    start = time.monotonic()
    assert child.run([sys.executable, "-c", code], limit=2.0).failure == "no answer within 2 s"
    assert time.monotonic() - start < 15
    pid = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 5
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether a process runs; an ended one may wait for its parent as a zombie."""
    try:
        return "\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_probe_gets_neither_the_launchers_variables_nor_a_missing_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    code = "import json, os; print(json.dumps({k: 1 for k in os.environ}))"
    found = child.run([sys.executable, "-c", code], env={"EXTRA": "1"}).found
    assert "EXTRA" in found and not {"PMI_RANK", "OMPI_COMM_WORLD_RANK"} & set(found)
    assert "cannot start /nowhere/mpiexec" in child.run(["/nowhere/mpiexec"]).failure


def test_only_the_first_rank_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: ([Row("a", "fail", "b", "c")], {}))
    assert doctor.run([]) == 1
    assert capsys.readouterr().out == "fail    a  b\n           -> c\n"
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("PMI_RANK", "1")
    assert doctor.run([]) == 0
    assert capsys.readouterr().out == ""


def test_only_a_failure_is_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "examine", lambda: ([Row("a", "warn", "b"), Row("c", "absent", "[d]")], {})
    )
    assert doctor.run(["--json"]) == doctor.run([]) == 0


def test_the_table_of_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    report.show([Row("blas", "warn", "[Haswell]", "unset it")])
    shown = capsys.readouterr().out
    assert "[Haswell]" in shown and "→ unset it" in shown


@pytest.mark.parametrize(
    ("kernel", "flags", "missed"),
    [
        ("SkylakeX", "avx2 fma avx512f avx512dq avx512bw avx512vl", ""),
        ("Haswell", "avx2 fma avx512f avx512dq avx512bw avx512vl", "AVX-512"),
        ("Haswell", "avx2 fma", ""),
        ("Zen", "avx2 fma", ""),
        ("Nehalem", "avx2 fma", "AVX2"),
        ("neoversen1", "", ""),
    ],
)
def test_a_slow_blas_kernel_is_found(kernel: str, flags: str, missed: str) -> None:
    assert host.faster_kernel(kernel, set(flags.split())) == missed


def test_a_preset_blas_kernel_is_named() -> None:
    library = {"internal_api": "openblas", "version": "1", "architecture": "Nehalem"}
    outcome = Outcome({"works": True, "libraries": [library | {"num_threads": 2}]})
    row = host.blas(outcome, {"avx2", "fma"}, {"OPENBLAS_CORETYPE": "Nehalem"})
    assert row.status == "warn" and row.remedy == "OPENBLAS_CORETYPE=Nehalem presets it: unset it"
    assert host.blas(outcome, {"avx2", "fma"}, {}).remedy == "update NumPy"
    assert host.blas(outcome, set(), {}).status == "ok"
    assert host.blas(Outcome({"works": True, "libraries": []}), set()).status == "warn"
    assert host.blas(Outcome(failure="killed by SIGILL"), set()).value == "killed by SIGILL"
    assert host.blas(Outcome({"works": False}), set()).status == "fail"


def test_numba_and_its_cache() -> None:
    found = {"version": "1", "works": True, "cache": "/c", "kept": True, "gemm": "libblas.so"}
    assert host.numba(Outcome(found)).status == "ok"
    assert host.numba(Outcome(found | {"kept": False})).status == "warn"
    assert host.numba(Outcome(found | {"works": False})).status == "fail"
    assert host.numba(Outcome(failure="exit code 1")).value == "exit code 1"


def test_room_in_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.shared_memory(str(tmp_path / "none")).status == "absent"
    monkeypatch.setattr(host, "_cgroup_room", lambda: None)
    assert str(tmp_path) in host.shared_memory(str(tmp_path)).value
    monkeypatch.setattr(host, "_cgroup_room", lambda: 1 << 20)
    row = host.shared_memory(str(tmp_path))
    assert row.status == "warn" and "control group may take 1 MiB" in row.value and row.remedy


def test_sizes_and_spans() -> None:
    assert [host.size(x) for x in (5, 1 << 10, 3 << 20, 5 << 30)] == [
        "5 B", "1 KiB", "3 MiB", "5.0 GiB"
    ]  # fmt: skip
    assert [host.spans(x) for x in ([], [3], [0, 1, 2, 5, 7, 8])] == ["", "3", "0-2,5,7-8"]


def test_a_wheel_that_hides_the_sites_mpi(tmp_path: Path) -> None:
    wheel = str(Path(sys.prefix, "lib", "libmpi.so.12"))
    found = {"mpi4py": "4", "library": "MPICH 5", "standard": [5, 0], "path": wheel}
    quiet = {"LOADEDMODULES": "gcc/13:python/3.11", "LD_LIBRARY_PATH": str(tmp_path)}
    assert mpi.library(Outcome(found), quiet)[1].status == "ok"
    (tmp_path / "libmpi.so.40").touch()
    for environ, place in (
        (quiet, f"{tmp_path} in LD_LIBRARY_PATH"),
        ({"LOADEDMODULES": "gcc/13:openmpi/5.0"}, "module openmpi/5.0"),
        ({"LOADEDMODULES": "cray-mpich/8"}, "module cray-mpich/8"),
    ):
        row = mpi.library(Outcome(found), environ)[1]
        assert row.status == "warn" and place in row.value and "MPI4PY_LIBMPI" in row.remedy
        assert mpi.library(Outcome(found | {"path": "/opt/libmpi.so"}), environ)[1].status == "ok"
    (absent,) = mpi.library(Outcome(failure="No module named 'mpi4py'"), {})
    assert absent.status == "absent" and "hpcml[mpich]" in absent.remedy


def test_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert [row.status for row in mpi.launchers("/usr/bin/mpiexec")] == ["ok", "ok"]
    assert [row.status for row in mpi.launchers("/venv/bin/mpiexec")] == ["warn", "ok"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert [row.status for row in mpi.launchers("")] == ["absent", "absent"]


def test_jobs_that_go_wrong() -> None:
    def status(**found: Any) -> str:
        good = {"size": 2, "sums": True, "thread_level": "MULTIPLE", "ranks": RANKS}
        return mpi.job(Outcome(good | found))[0].status

    assert status() == "ok"
    assert status(size=1) == status(sums=False) == "fail"
    (row,) = mpi.job(Outcome(failure="no answer within 60 s"))
    assert row.status == "fail" and "no answer" in row.value
    (row,) = mpi.job(Outcome(failure="killed by SIGBUS"))
    assert "--shm-size" in row.remedy
    assert mpi.thread_level("SINGLE").status == "warn"


def test_cores_and_threads_of_ranks() -> None:
    assert mpi.core_masks(RANKS) == Row("core masks", "ok", "rank 0: 0-1; rank 1: 0-1")
    pinned = [rank | {"cores": [0]} for rank in RANKS]
    assert mpi.core_masks(pinned).status == "warn"
    apart = [rank | {"cores": [0], "host": str(n)} for n, rank in enumerate(RANKS)]
    assert mpi.core_masks(apart).status == "ok"
    assert mpi.blas_threads(RANKS, {}).value.endswith("hpcml uses 1, 1")
    wide = [rank | {"cores": list(range(4 * n, 4 * n + 4))} for n, rank in enumerate(RANKS)]
    assert mpi.blas_threads(wide, {}).value.endswith("hpcml uses 4, 4")
    assert "OMP_NUM_THREADS=3 is obeyed" in mpi.blas_threads(RANKS, {"OMP_NUM_THREADS": "3"}).value


def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = {"name": "H", "bytes": 80 << 30, "capability": "9.0", "works": True}
    found = {"version": "14", "devices": [device, device | {"works": False}]}
    assert gpu.cupy(Outcome(found | {"devices": [device]}))[1] == Row(
        "gpus", "ok", "0: H (80.0 GiB, 9.0)"
    )
    assert gpu.cupy(Outcome(found))[1].value.endswith("wrong sums on 1")
    assert gpu.cupy(Outcome(found | {"devices": []}))[1].status == "absent"
    assert gpu.cupy(Outcome(failure="driver too old"))[0].status == "warn"
    monkeypatch.setattr(gpu, "driver_devices", lambda: "2 NVIDIA GPUs")
    assert gpu.cupy(None)[1].status == "warn"
    monkeypatch.undo()
    (tmp_path / "0").mkdir()
    assert gpu.driver_devices(str(tmp_path)) == "1 NVIDIA GPU"
    assert gpu.driver_devices(str(tmp_path / "none")) == ""
    assert gpu.chosen(RANKS).status == "absent"
    assert gpu.chosen([rank | {"device": 1} for rank in RANKS]).value == "rank 0: 1, rank 1: 1"


def test_gpu_messages_go_as_a_trial_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(direct.VARIABLE, raising=False)
    right, died = Outcome({"devices": [0, 0]}), Outcome(failure="killed by SIGSEGV")
    assert gpu.messages(None) == Row("gpu messages", "absent", "no GPU")
    row = gpu.messages(right)
    assert (row.status, gpu.way(right)) == ("ok", "device") and "as they are" in row.value
    row = gpu.messages(died)
    assert (row.status, gpu.way(died), gpu.way(None)) == ("warn", "staged", "staged")
    assert "pinned host memory (MPI on GPU memory: killed by SIGSEGV)" in row.value
    assert "hpcml[cuda13]" in row.remedy
    command = "LD_LIBRARY_PATH=/site/libucx/lib"
    assert gpu.messages(died, right, command).remedy.startswith(f"start with {command} mpiexec")
    assert gpu.messages(died, died, command).remedy.startswith("no help")
    monkeypatch.setenv(direct.VARIABLE, "staged")
    assert gpu.way(right) == "staged" and "HPCML_GPU_MPI=staged" in gpu.messages(right).value
    monkeypatch.setenv(direct.VARIABLE, "device")
    assert gpu.messages(died).status == "fail"


def test_the_ucx_of_a_wheel_is_tried_and_its_command_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "libucx" / "lib"
    folder.mkdir(parents=True)
    (tmp_path / "libucx" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/before")
    tried: list[Any] = []
    monkeypatch.setattr(direct, "probe", lambda env: tried.append(env) or Outcome({"devices": []}))
    failed = Outcome(failure="exit code 1")
    helped, command = doctor._with_a_wheels_ucx(failed, Outcome({"library": "MPICH 5"}))
    assert command == f"LD_LIBRARY_PATH={folder}:/before MPIR_CVAR_NOLOCAL=1" and helped.found
    assert tried == [direct.recipe()]
    other = doctor._with_a_wheels_ucx(failed, Outcome({"x": "Open MPI 5"}))[1]
    assert "OMPI_MCA_pml=ucx" in other and "MPIR_" not in other
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{folder}")
    assert direct.recipe()["LD_LIBRARY_PATH"] == f"{folder}"  # MPICH goes past UCX even so
    monkeypatch.setenv("MPIR_CVAR_NOLOCAL", "1")
    assert doctor._with_a_wheels_ucx(failed, Outcome()) == (None, "")


def test_the_way_of_each_operator_on_a_gpu() -> None:
    found = {"version": "cuDNN 9.9.0", "left": {"convolution": "no engine"}}
    rows = {row.name: row.value for row in gpu.operators(Outcome(found))}
    assert rows["gpu: products"].startswith("cuBLAS") and "gpu: collectives" in rows
    assert rows["gpu: attention"].startswith("cuDNN 9.9.0: 16 bits without dropout")
    assert rows["gpu: convolution"].startswith("gathered columns")
    assert rows["gpu: convolution"].endswith("cuDNN not: no engine")
    rows = {row.name: row.value for row in gpu.operators(Outcome(failure="exit code 1"))}
    assert rows["gpu: attention"].endswith("cuDNN not: exit code 1")
