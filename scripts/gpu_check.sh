#!/usr/bin/env bash
# Proves and measures the GPU path of this package in less than ten minutes on one NVIDIA GPU.
#
#     scripts/gpu_check.sh [--wheels FOLDER] [--out FOLDER] [PART ...]
#
# It needs no network: Python with NumPy, CuPy, mpi4py and PyTorch must be there, and what else is
# missing is taken from the wheels in FOLDER, which a machine with a network and the same Python
# fills by `pip download -d FOLDER '.[mpich,test]'` (cudnn13 too, for cuDNN). Every
# part has a time limit, and one that fails does not stop the others; gpu.json and gpu.md in the
# folder of results (build/gpu) say what failed. Without a GPU it says so and exits with 2.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

wheels='' out=build/gpu parts=()
while (($#)); do
    case $1 in
    --wheels) wheels=${2:?--wheels needs a folder} && shift 2 ;;
    --out) out=${2:?--out needs a folder} && shift 2 ;;
    -*) echo "${0##*/}: unknown option '$1': use --wheels FOLDER, --out FOLDER or names of parts" >&2 && exit 1 ;;
    *) parts+=("$1") && shift ;;
    esac
done

python=${HPCML_PYTHON:-python3}
if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L >/dev/null 2>&1; then
    echo "${0##*/}: no NVIDIA GPU here (nvidia-smi finds none): nothing to check" >&2
    exit 2
fi
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
if [[ -n $wheels ]]; then
    if ! compgen -G "$wheels/*.whl" >/dev/null; then
        echo "${0##*/}: no wheels (*.whl) in --wheels '$wheels'" >&2
        exit 1
    fi
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    # With a prefix programs and libraries of wheels, such as an MPI runtime, have their places too.
    timeout 120 "$python" -m pip install -q --no-index --no-deps --no-compile --ignore-installed \
        --no-warn-script-location --prefix "$site" "$wheels"/*.whl || exit 1
    for packages in "$site"/lib*/python*/*-packages "$site"/local/lib/python*/*-packages; do
        [[ -d $packages ]] && PYTHONPATH=$PYTHONPATH:$packages
    done
    export PATH=$site/bin:$site/local/bin:$PATH
    export LD_LIBRARY_PATH=$site/lib:$site/local/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi
"$python" scripts/gpu_check.py --out "$out" --spent "$SECONDS" "${parts[@]}"
