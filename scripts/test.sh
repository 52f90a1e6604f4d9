#!/usr/bin/env bash
# All checks: style, types, the serial tests (in several processes), then the tests under mpiexec
# with 2, 3 and 4 ranks.
# With --peer also the comparisons with PyTorch, which it installs. Every step runs even if one
# before it has failed; the last line says which did. See _setup.sh for what can be set.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

extras=mpich,test,images
case ${1:-} in
"") ;;
--peer) extras+=,peer ;;
*) fail "unknown option '$1': use '${0##*/}' or '${0##*/} --peer'" ;;
esac
setup "$extras"
# The tests start hundreds of processes: none should have to compile the package again.
unset PYTHONDONTWRITEBYTECODE

failed=()
step() {
    local name=$1 start=$SECONDS
    shift
    echo "== $name"
    "$@" </dev/null || failed+=("$name")
    echo "== $name: $((SECONDS - start)) s"
}

step style ruff check
step format ruff format --check
step types mypy
step "serial tests" python -m tests.harness -j 0 --limit 1200 -m "not mpi"
for ranks in 2 3 4; do
    step "tests with $ranks ranks" python -m tests.harness -n "$ranks" -m mpi
done

if ((${#failed[@]})); then
    printf -v list ', %s' "${failed[@]}"
    fail "failed: ${list#, }"
fi
echo "${0##*/}: all passed in $SECONDS s"
