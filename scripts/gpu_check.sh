#!/usr/bin/env bash
# Proves and measures the GPU path of this package in less than ten minutes on one NVIDIA GPU.
#
#     scripts/gpu_check.sh [--wheels FOLDER] [--out FOLDER] [PART ...]
#
# It needs no network: Python with NumPy, CuPy, mpi4py and PyTorch must be there, and what else is
# missing is taken from the wheels in FOLDER, which a machine with a network and the same Python
# fills by `pip download -d FOLDER --no-deps mpich libucx-cu13 pytest-mpi` and other names that the
# part `machine` misses. Wheels take the place of what the machine has. Every part has its share of
# the time, and one that fails does not stop the others; gpu.json and gpu.md in the folder of results
# (build/gpu) say what failed, gpu.log has all that was printed. Without a GPU it says so and exits
# with 2.
set -uo pipefail

wheels='' out='' parts=()
while (($#)); do
    case $1 in
    --wheels) wheels=$(realpath -m -- "${2:?--wheels needs a folder}") && shift 2 ;;
    --out) out=$(realpath -m -- "${2:?--out needs a folder}") && shift 2 ;;
    -*) echo "${0##*/}: unknown option '$1': use --wheels FOLDER, --out FOLDER or names of parts" >&2 && exit 1 ;;
    *) parts+=("$1") && shift ;;
    esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

python=${HPCML_PYTHON:-python3}
if ! command -v nvidia-smi >/dev/null || ! timeout 60 nvidia-smi -L >/dev/null 2>&1; then
    echo "${0##*/}: no NVIDIA GPU here (nvidia-smi finds none): nothing to check" >&2
    exit 2
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# Compiled kernels need a folder that can be written to.
if [[ ! -w ${HOME:-/nonexistent} ]]; then
    export HOME=$PWD/build/home
    mkdir -p "$HOME"
fi

install() { # into $site, whatever the machine has of them; needs no index
    timeout "$1" "$python" -m pip install -q --no-index --no-deps --no-compile --ignore-installed \
        --no-warn-script-location --disable-pip-version-check --prefix "$site" "${@:2}"
}
if [[ -n $wheels ]]; then
    if ! compgen -G "$wheels/*.whl" >/dev/null; then
        echo "${0##*/}: no wheels (*.whl) in --wheels '$wheels'" >&2
        exit 1
    fi
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    # With a prefix programs and libraries of wheels, such as an MPI runtime, have their places too.
    if ! install 120 "$wheels"/*.whl; then # one that does not fit must not keep out the others
        for wheel in "$wheels"/*.whl; do
            install 30 "$wheel" || echo "${0##*/}: left out: ${wheel##*/}" >&2
        done
    fi
    for packages in "$site"/lib*/python*/*-packages "$site"/local/lib/python*/*-packages; do
        [[ -d $packages ]] && PYTHONPATH=$PYTHONPATH:$packages
    done
    export PATH=$site/bin:$site/local/bin:$PATH
    export LD_LIBRARY_PATH=$site/lib:$site/local/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi
"$python" scripts/gpu_check.py --out "${out:-$PWD/build/gpu}" --spent "$SECONDS" "${parts[@]}"
