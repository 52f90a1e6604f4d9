#!/usr/bin/env bash
# Makes two hosts of this machine and runs a command there under mpiexec, for what needs a network
# to be seen: two network namespaces, joined by a link of a given rate. Needs root (in a container
# the capabilities NET_ADMIN and SYS_ADMIN), iproute2 and MPICH's mpiexec: the one in PATH, or that
# of this repository's .venv. It exits with the status of the command, or with 77 and one line where
# such hosts cannot be made. At the end it says on standard error what each host sent.
#
# On either host the link is the interface `link0`, so that a rank finds its counters in
# /proc/net/dev. Nothing stays behind, whatever ends the script, SIGKILL included.
#
# shellcheck disable=SC2016,SC2329 # single quotes hold programs; `remove` is called by the guard
set -euo pipefail

usage="usage: ${0##*/} [--ranks PER_HOST] [--rate RATE] COMMAND...
    --ranks   ranks on each host (1)
    --rate    of the link, each way, in the words of tc (1gbit)"

# Hydra takes this very script for its ssh: [OPTION...] HOST COMMAND...
if [[ -n ${HPCML_TWO_HOSTS:-} ]]; then
    while [[ $1 == -* ]]; do
        shift
    done
    namespace=$HPCML_TWO_HOSTS-${1##*.}
    shift
    unset HPCML_TWO_HOSTS
    exec ip netns exec "$namespace" bash -c "$*"
fi

cannot() {
    echo "${0##*/}: $*" >&2
    exit 77
}

wrong() {
    echo "${0##*/}: $*" >&2
    exit 2
}

# End what still runs on hosts NAME-1 and NAME-2 and remove them.
remove() {
    local name=$1 host signal pids
    for signal in TERM KILL; do
        for _ in {1..20}; do
            pids=$(for host in 1 2; do ip netns pids "$name-$host" 2>/dev/null; done) || true
            [[ -n $pids ]] || break 2
            # shellcheck disable=SC2086 # several numbers
            kill -"$signal" $pids 2>/dev/null || true
            sleep 0.1
        done
    done
    for host in 1 2; do
        ip netns delete "$name-$host" 2>/dev/null || true
    done
}

make_host() {
    local namespace=$1 address=$2 rate=$3
    ip -n "$namespace" link set lo up &&
        ip -n "$namespace" address add "$address/24" dev link0 &&
        ip -n "$namespace" link set link0 mtu 9000 addrgenmode none up &&
        tc -n "$namespace" qdisc add dev link0 root tbf rate "$rate" burst 256kbit latency 50ms
}

# The kernel takes up to a second to call both ends of a new link up, and MPI takes no other.
await_link() {
    for _ in {1..100}; do
        [[ $(ip -n "$1" link show link0) == *" state UP "* ]] && return
        sleep 0.05
    done
    cannot "the link between the hosts does not come up"
}

sent() {
    ip netns exec "$1" awk '$1 == "link0:" { print $10 }' /proc/net/dev
}

ranks=1 rate=1gbit
while [[ ${1:-} == -* ]]; do
    case $1 in
    --ranks) ranks=${2:-} ;;
    --rate) rate=${2:-} ;;
    -h | --help) echo "$usage" && exit ;;
    *) wrong "unknown option '$1': see ${0##*/} --help" ;;
    esac
    shift 2 || wrong "$1 needs a value"
done
[[ $ranks =~ ^[1-9][0-9]*$ ]] || wrong "--ranks '$ranks' is not a number of ranks: give 1 or more"
(($#)) || wrong "no command: see ${0##*/} --help"

((EUID == 0)) || cannot "two hosts need root, for network namespaces: run it as root"
for tool in ip tc; do
    command -v "$tool" >/dev/null || cannot "no '$tool' here: install iproute2"
done
own=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin
command -v mpiexec >/dev/null || PATH=$own:$PATH
[[ $(mpiexec --version 2>&1) == *HYDRA* ]] ||
    cannot "no mpiexec of MPICH in PATH: pip install 'hpcml[mpich]'"

# Hosts get names of this process's own, so that several runs do not meet. A guard in a session of
# its own reads from a pipe that this process alone writes to: its end is the end of this process.
name=hpcml-$$
export -f remove
exec {alive}> >(exec setsid bash -c 'trap "" INT TERM HUP; read -r; remove "$0"' "$name" 2>/dev/null)
guard=$!
trap 'exec {alive}>&-; wait "$guard" || true' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

if ! why=$(ip netns add "$name-1" 2>&1 && ip netns add "$name-2" 2>&1 &&
    ip link add link0 netns "$name-1" type veth peer name link0 netns "$name-2" 2>&1); then
    cannot "network namespaces are not allowed here (${why##*$'\n'}): in a container, add NET_ADMIN and SYS_ADMIN"
fi
for host in 1 2; do
    why=$(make_host "$name-$host" "10.77.0.$host" "$rate" 2>&1) ||
        cannot "cannot make a link of --rate '$rate' (${why##*$'\n'})"
done

await_link "$name-1"
await_link "$name-2"

# UCX sees that the two hosts share a kernel, and would go past the link.
export UCX_TLS=tcp,self UCX_NET_DEVICES=link0 HPCML_TWO_HOSTS=$name
status=0
ip netns exec "$name-1" mpiexec -launcher ssh -launcher-exec "$(realpath "$0")" -iface link0 \
    -hosts 10.77.0.1,10.77.0.2 -ppn "$ranks" -n $((2 * ranks)) \
    env -u HPCML_TWO_HOSTS "$@" <&0 {alive}>&- &
wait "$!" || status=$?
echo "${0##*/}: host 1 sent $(sent "$name-1") bytes, host 2 sent $(sent "$name-2") bytes" >&2
exit "$status"
