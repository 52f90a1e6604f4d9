"""How kernels are compiled: vectorised, without the GIL, once for all processes, safely on disk."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcml.kernels import cpu, of
from hpcml.kernels.cpu import jit

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 4
KERNELS = {kernel for kernel, _ in jit._registry}

# All kernels are compiled, by one of several processes that start at once: a minute and a half
# where others work too.
pytestmark = pytest.mark.limit(300)

# Each process loads the kernels, uses one, and reports what it compiled (numba keeps no assembly of
# what it reads from disk, so the process that compiled also lists the packed instructions).
REPORT = """
import json, re, sys
import numpy as np
from hpcml.kernels import of
from hpcml.kernels.cpu import jit
kernels = of(np.empty(0, np.float32))
out = np.empty(3, np.float32)
kernels.gelu_tanh(np.array([-1, 0, 2], np.float32), out)
report = {"folder": str(jit.cache_folder()), "gelu": out.tolist(), "made": {}}
def name(kernel):
    module, name = kernel.py_func.__module__.rpartition(".")[2], kernel.py_func.__name__
    return name if module != "brain" else "brain." + name
several = dict.fromkeys(kernel for kernel, _ in jit._registry)
report["signatures"] = sum(len(kernel.signatures) for kernel in several)
for kernel in several:
    if sum(kernel.stats.cache_misses.values()):
        assembly = "".join(kernel.inspect_asm().values())
        packed = re.findall(r"\\b(v\\w+p[sd]|vp(?:mul|add|xor)\\w*)\\s.*%[yz]mm", assembly)
        report["made"][name(kernel)] = sorted(set(packed))
print(json.dumps(report))
"""


def start(folder: Path | str, **more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HPCML_CACHE_DIR": str(folder)} | more
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", REPORT],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def reports(processes: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    answers = [process.communicate(timeout=250) for process in processes]
    for process, (_, errors) in zip(processes, answers, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output) for output, _ in answers]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What several processes report that started at once with an empty cache."""
    folder = tmp_path_factory.mktemp("cache")
    found = reports([start(folder) for _ in range(PROCESSES)])
    leave_to_others(Path(found[0]["folder"]))
    return found


def leave_to_others(made: Path) -> None:
    """Spare other tests compiling the same again, if they have nothing yet and are not at it."""
    folder = jit.cache_folder()
    with open(folder / "lock", "a") as lock, contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not any(folder.rglob("*.nbi")):
            shutil.copytree(made, folder, dirs_exist_ok=True)


def files(report: dict[str, Any], pattern: str) -> list[Path]:
    return sorted(Path(report["folder"]).rglob(pattern))


def test_one_process_compiles_and_the_others_read(together: list[dict[str, Any]]) -> None:
    makers = [report for report in together if report["made"]]
    assert len(makers) == 1
    assert len(makers[0]["made"]) == len(KERNELS)
    assert len({tuple(report["gelu"]) for report in together}) == 1
    assert len({report["folder"] for report in together}) == 1


def test_each_kernel_lies_on_disk_once(together: list[dict[str, Any]]) -> None:
    assert len(files(together[0], "*.nbi")) == len(KERNELS)
    assert len(files(together[0], "*.nbc")) == together[0]["signatures"]
    assert not files(together[0], "*.tmp*")


def test_who_finds_all_there_waits_for_nobody(together: list[dict[str, Any]]) -> None:
    """Not for a process that compiles for another dtype."""
    folder = Path(together[0]["folder"])
    with open(folder / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (report,) = reports([start(folder.parent)])
    assert report["made"] == {}


def test_a_later_process_compiles_nothing(together: list[dict[str, Any]]) -> None:
    (later,) = reports([start(Path(together[0]["folder"]).parent)])
    assert later["made"] == {}
    assert later["gelu"] == together[0]["gelu"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 assembly")
@pytest.mark.parametrize(
    "name",
    [
        "gelu", "gelu_backward", "gelu_tanh", "gelu_tanh_backward", "column_sums",
        "adam_update", "sgd_update", "block_squares", "layer_norm", "layer_norm_backward",
        "layer_norm_weight_gradient", "cross_entropy", "cross_entropy_backward", "attention",
        "attention_backward", "embedding_backward", "dropout", "random_words", "random_uniform",
    ],
)  # fmt: skip
def test_vectorised(name: str, together: list[dict[str, Any]]) -> None:
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no 256-bit registers")
    (made,) = (report["made"] for report in together if report["made"])
    arithmetic = {"vmulps", "vaddps", "vfmadd213ps", "vfmadd231ps", "vpmuludq", "vfmadd231pd"}
    assert arithmetic & set(made[name])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 assembly")
@pytest.mark.parametrize("name", ["cross_entropy", "attention"])
def test_the_maximum_of_a_row_is_vectorised(name: str, together: list[dict[str, Any]]) -> None:
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no 256-bit registers")
    (made,) = (report["made"] for report in together if report["made"])
    assert {"vmaxps", "vrangeps"} & set(made[name])


def test_a_damaged_cache_is_made_again(together: list[dict[str, Any]], tmp_path: Path) -> None:
    """A cut index, data that are none, and data that are missing."""
    shutil.copytree(Path(together[0]["folder"]).parent, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / Path(together[0]["folder"]).name
    next(folder.rglob("*gelu_tanh-*.nbi")).write_bytes(b"")
    data = next(folder.rglob("*sgd_update-*.nbc"))
    data.write_bytes(b"garbage" + data.read_bytes()[7:])
    next(folder.rglob("*adam_update-*.nbc")).unlink()
    mended = reports([start(tmp_path), start(tmp_path)])
    assert {tuple(report["gelu"]) for report in mended} == {tuple(together[0]["gelu"])}
    made = [set(report["made"]) for report in mended]
    assert made[0] | made[1] == {"gelu_tanh", "sgd_update", "adam_update"}
    (after,) = reports([start(tmp_path)])
    assert after["made"] == {}


def find_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chosen: str) -> Path:
    monkeypatch.setenv("HPCML_CACHE_DIR", chosen)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return jit.cache_folder.__wrapped__()


def test_a_folder_that_cannot_be_written_is_replaced_by_one_of_the_node(
    together: list[dict[str, Any]], tmp_path: Path
) -> None:
    made = Path(together[0]["folder"])
    node = tmp_path / f"hpcml-{os.getuid()}"
    node.mkdir(mode=0o700)
    shutil.copytree(made, node / made.name)
    (report,) = reports([start("/dev/null/cache", TMPDIR=str(tmp_path))])
    assert Path(report["folder"]) == node / made.name
    assert report["made"] == {}


def test_the_folder_of_the_node_is_closed_to_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = find_folder(monkeypatch, tmp_path, "/dev/null/cache")
    assert folder.parent == tmp_path / f"hpcml-{os.getuid()}"
    assert folder.parent.stat().st_mode & 0o077 == 0


def test_the_folder_of_the_node_is_not_made_without_need(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = find_folder(monkeypatch, tmp_path, str(tmp_path / "chosen"))
    assert folder.parent == tmp_path / "chosen"
    assert [path.name for path in tmp_path.iterdir()] == ["chosen"]


@pytest.mark.parametrize("trap", ["open to others", "a link"])
def test_a_folder_that_others_may_write_is_not_trusted(
    trap: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    planted = tmp_path / f"hpcml-{os.getuid()}"
    if trap == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        planted.symlink_to(tmp_path / "elsewhere")
    else:
        planted.mkdir()
        planted.chmod(0o777)
    folder = find_folder(monkeypatch, tmp_path, "/dev/null/cache")
    assert folder.parent == tmp_path
    assert folder.name.startswith("hpcml-")
    assert folder != planted
    assert folder.stat().st_mode & 0o077 == 0


def test_a_full_disk_costs_the_cache_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """A kernel that is compiled, then cannot be saved."""

        overloads: dict[Any, str] = {}  # noqa: RUF012

        def disable_compile(self, value: bool = True) -> None:
            pass

        def compile(self, signature: Any) -> None:
            self.overloads[signature.args] = "compiled"
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(jit, "_registry", [(Full(), "void(T[::1])")])
    assert jit._compile("float32") is False


def test_an_interrupt_leaves_no_kernel_that_may_be_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who called it would be sent to wait for its loading, again and again."""

    class Interrupted:
        may_compile = False

        def disable_compile(self, value: bool = True) -> None:
            self.may_compile = not value

        def compile(self, signature: Any) -> None:
            assert self.may_compile
            raise KeyboardInterrupt

    kernel = Interrupted()
    monkeypatch.setattr(jit, "_registry", [(kernel, "void(T[::1])")])
    with pytest.raises(KeyboardInterrupt):
        jit._compile("float32")
    assert not kernel.may_compile


def test_kernels_release_the_gil() -> None:
    of(np.empty(0, np.float32))
    assert all(kernel.targetoptions["nogil"] for kernel in KERNELS)


def test_two_threads_may_ask_for_kernels_at_once() -> None:
    of(np.empty(0))  # finds the BLAS that kernels call: loading them without it ends the process
    results: list[float] = []

    def work() -> None:
        x = np.ones(1000)
        for _ in range(50):
            jit.load("float64")
            out = np.empty(1)
            cpu.block_squares(x, 1000, out)
            results.append(float(out[0]))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [1000.0] * 100


def test_a_kernel_that_is_being_loaded_is_waited_for() -> None:
    """Threads load kernels when they come to them, with those of another type in use elsewhere."""
    of(np.empty(0))
    kernel, out = cpu.layer_norm.compiled, [np.empty(shape) for shape in ((1, 3), 1, 1)]
    versions = list(kernel.overloads)
    arguments = (np.array([[1.0, 3.0, 2.0]]), np.ones(3), np.ones(3), 0.0, *out)
    thread = threading.Thread(target=cpu.layer_norm, args=arguments)
    with jit._loading:
        kernel.disable_compile(False)
        thread.start()
        thread.join(0.2)
        waited = thread.is_alive()
        kernel.disable_compile()
    thread.join()
    assert waited and list(kernel.overloads) == versions
    assert np.allclose(out[0], 1 + np.array([-1, 1, 0]) * 1.5**0.5)
