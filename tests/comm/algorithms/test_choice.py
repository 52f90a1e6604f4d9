"""Which algorithm serves a call: table, costs, names; fitting; files and their faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from hpcml.comm import Axis, Mesh, choice
from hpcml.comm.algorithms import (
    OPERATIONS,
    Machine,
    Situation,
    algorithm,
    algorithms,
    find,
    registry,
)
from hpcml.comm.algorithms.choosing import SHORT, Chooser, choose
from hpcml.comm.choice import Measurement
from hpcml.comm.link import Link
from hpcml.comm.threads import run
from hpcml.comm.world import world
from hpcml.errors import UserError
from tests.comm.algorithms.conformance import REDUCTIONS
from tests.comm.algorithms.test_properties import SENT

FOUR = Situation((0, 0, 0, 0))
TABLE = {"node": {4: {"allreduce": [(100.0, "ring"), (1000.0, "vendor")]}}}


def chosen(operation: str, nbytes: int, situation: Situation, table: Any = TABLE) -> str:
    return choose(operation, nbytes, situation, table).name


def test_the_table_comes_first() -> None:
    with_vendor = Situation((0,) * 4, vendor=True)
    assert chosen("allreduce", 0, with_vendor) == "ring"
    assert chosen("allreduce", 100, with_vendor) == "ring"
    assert chosen("allreduce", 101, with_vendor) == "vendor"


def test_the_least_cost_where_the_table_says_nothing() -> None:
    assert chosen("allreduce", 8, FOUR, {}) == "recursive_doubling"
    assert chosen("allreduce", 1 << 18, FOUR, {}) == "rabenseifner"
    assert chosen("allreduce", 1 << 24, FOUR, {}) == "ring"
    assert chosen("allreduce", 1 << 24, Situation((0,) * 5), {}) == "ring"
    assert chosen("allreduce", 200, FOUR) == "recursive_doubling"  # no vendor among threads
    assert chosen("allreduce", 8, Situation((0,) * 3, vendor=True)) == "vendor"
    assert chosen("broadcast", 8, FOUR, {}) == "binomial"
    assert chosen("broadcast", 1 << 24, Situation((0,) * 8), {}) == "scatter_allgather"
    assert chosen("alltoall", 8, Situation((0,) * 8), {}) == "bruck"
    assert chosen("alltoall", 8, Situation((0,) * 8, even=False), {}) == "pairwise"


def test_long_buffers_go_where_scratch_memory_does_not_grow_with_them() -> None:
    apart = Situation((0, 1, 2, 3))
    assert chosen("reduce_scatter", SHORT, apart) == "recursive_halving"
    assert chosen("reduce_scatter", SHORT + 1, apart) == "pairwise"
    assert chosen("reduce", SHORT + 1, apart) == "rabenseifner"  # there is none without


def test_a_long_sum_is_added_where_it_comes() -> None:
    """Other algorithms need a result of their own, which is added afterwards."""
    table = {"node": {4: {"reduce_scatter": [(float("inf"), "vendor")]}}}
    whole, added = (Situation((0,) * 4, vendor=True, onto=onto) for onto in (False, True))
    assert chosen("reduce_scatter", SHORT + 1, whole, table) == "vendor"
    assert chosen("reduce_scatter", SHORT, added, table) == "vendor"
    assert chosen("reduce_scatter", SHORT + 1, added, table) == "pairwise"


def test_between_nodes_the_hierarchy_pays() -> None:
    two_by_two = Situation((0, 0, 1, 1), vendor=True)
    for nbytes in (1 << 16, 1 << 26):
        assert chosen("allreduce", nbytes, two_by_two, {}) == "hierarchical"
        assert chosen("allreduce", nbytes, two_by_two, choice.default()) == "hierarchical"
    assert chosen("allreduce", 1 << 26, Situation((0, 1, 2, 3)), {}) == "ring"


def test_order_is_kept_where_it_must_be() -> None:
    for operation in REDUCTIONS:
        for nbytes in (8, 1 << 26):
            strict = Situation((0,) * 4, native=False, ordered=True, vendor=True)
            assert choose(operation, nbytes, strict, choice.default()).ordered


def test_the_default_table_names_what_there_is() -> None:
    for place, by_ranks in choice.default().items():
        assert place in choice.PLACES
        for by_operation in by_ranks.values():
            for operation, rows in by_operation.items():
                assert {name for _, name in rows} <= set(algorithms(operation))
    two = Situation((0, 0), vendor=True)
    assert {chosen(operation, 1024, two, choice.default()) for operation in OPERATIONS} == {
        "vendor"
    }


@pytest.mark.parametrize("key", SENT, ids="-".join)
def test_the_cost_of_a_byte_is_that_of_the_bytes_sent(key: tuple[str, str]) -> None:
    per_byte = Machine(alpha=0, beta=1, gamma=0)
    for size in (2, 4, 8):
        assert find(*key).cost(64 * size, size, per_byte) == SENT[key](64 * size, size)


def measured(nbytes: int, **seconds: float) -> list[Measurement]:
    return [
        Measurement("node", 2, "allreduce", name, nbytes, time) for name, time in seconds.items()
    ]


def test_fit_takes_the_fastest_and_no_noise(tmp_path: Path) -> None:
    table = choice.fit(
        [
            *measured(16384, ring=9.0, vendor=5.1, recursive_doubling=5.0),
            *measured(1024, ring=9.0, vendor=1.0, recursive_doubling=2.0),
            *measured(65536, ring=2.0, vendor=5.0, recursive_doubling=7.0),
            *measured(65536, ring=2.0, vendor=1.0),
            *measured(65536, ring=2.0, vendor=5.0),
        ]
    )
    expected = {"node": {2: {"allreduce": [(32768.0, "vendor"), (float("inf"), "ring")]}}}
    assert table == expected
    file = tmp_path / "table.toml"
    choice.save(table, file)
    assert choice.load(file) == expected


BAD = [
    ("node = 3", r"key node is 3: give a section"),
    ("[nodes.2]", r"key nodes is not one of node, network: rename it"),
    ("[node.two]", r"key node.two: give a number of ranks"),
    ("[node.1]", r"key node.1: give a number of ranks from 2 on"),
    ("[node.2]\nallreduces = []", r"key node.2.allreduces: name one of allreduce, "),
    ('[node.2]\nallreduce = "ring"', r"key node.2.allreduce has 'ring': give \[up to bytes"),
    ('[node.2]\nallreduce = [["ring", 3]]', r"key node.2.allreduce has \['ring', 3\]: give"),
    ('[node.2]\nallreduce = [[9, "ring"], [9, "ring"]]', r"has \[9, 'ring'\]: .* ascending"),
    ('[node.2]\nallreduce = [[inf, "best"]]', r"'best' is not one of .*: correct it, or register"),
    ("[node.2", r"is no table|no table of collectives"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_bad_table_is_one_clear_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        choice.load(file)
    line = str(caught.value)
    assert line.startswith(f"HPCML_COLLECTIVES={file}") and "\n" not in line


def make_mesh() -> Any:
    return Mesh()["dp"].table


def test_one_rank_reads_the_table_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(make_mesh, ranks=3) == [choice.default()] * 3
    file = tmp_path / "table.toml"
    choice.save(TABLE, file)
    monkeypatch.setenv("HPCML_COLLECTIVES", str(file))
    assert run(make_mesh, ranks=3) == [TABLE] * 3
    assert run(make_mesh, ranks=1) == [TABLE]


def refused() -> str:
    with pytest.raises(UserError) as caught:
        Mesh()
    return str(caught.value)


@pytest.mark.parametrize("ranks", [1, 3])
def test_all_ranks_refuse_a_file_that_is_not_there(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCML_COLLECTIVES", "nowhere.toml")
    first, *others = run(refused, ranks=ranks)
    assert first.startswith("HPCML_COLLECTIVES=nowhere.toml")
    assert first.endswith("make one with hpcml bench collectives --fit FILE")
    assert set(others) <= {first}


def misnamed() -> None:
    mesh, strict = Mesh(), Mesh(deterministic=True)
    x = np.ones(8, np.float32)
    before = mesh.ledger.snapshot()
    halves = x.astype(ml_dtypes.bfloat16)
    uneven = [2, 3, 3]
    blocks = {"sends": uneven, "receives": [uneven[mesh.rank]] * 3}
    calls: list[tuple[Axis, Any, str]] = [
        (mesh.world, lambda a: a.allreduce(x, algorithm="best"), "'best': allreduce has "),
        (mesh.world, lambda a: a.allreduce(x, algorithm="vendor"), "no collectives of the carrier"),
        (
            mesh.world,
            lambda a: a.allreduce(halves, algorithm="ring"),
            "a 16-bit float, in ",
        ),
        (mesh.world, lambda a: a.allreduce(x, algorithm="hierarchical"), "3 ranks on 1 nodes"),
        (mesh.world, lambda a: a.alltoall(x, algorithm="bruck", **blocks), "uneven counts"),
        (strict.world, lambda a: a.reduce(x, algorithm="binomial"), "name one of ordered, or none"),
    ]
    for axis, call, message in calls:
        with pytest.raises(ValueError, match=message):
            call(axis)
    assert not mesh.ledger.snapshot() - before


def test_a_name_that_cannot_serve_is_refused_before_anything_is_sent() -> None:
    run(misnamed, ranks=3)


class Vendor:
    """Collectives that count with 31 bits."""

    limit = 2**31 - 1


def test_a_vendor_that_counts_with_31_bits_is_not_asked_for_more() -> None:
    def program() -> list[str]:
        always = [(float("inf"), "vendor")]
        link = Link(world(), {"node": {2: {"allreduce": always, "alltoall": always}}})
        link.vendor = Vendor()  # type: ignore[assignment]
        chooser = Chooser(link, deterministic=False)
        floats, nbytes = np.empty(0, np.float32), 4 * (2**31 - 1)
        picked = [chooser.pick("allreduce", nbytes + more, floats, True, None) for more in (0, 4)]
        picked.append(chooser.pick("alltoall", 8, floats, False, None))
        return [known.name for known in picked]

    vendor, *others = run(program, ranks=2)[0]
    assert vendor == "vendor" and "vendor" not in others


def test_ranks_agree_on_an_uneven_all_to_all() -> None:
    """Payloads of 0 and 30 MB, which the table would give to different algorithms."""
    table = {"node": {2: {"alltoall": [(1000.0, "quick"), (float("inf"), "pairwise")]}}}

    def program() -> str:
        link = Link(world(), table)
        chooser = Chooser(link, deterministic=False)
        nbytes = 0 if link.rank else 30_000_000
        return chooser.pick("alltoall", nbytes, np.empty(0, np.uint8), False, None).name

    algorithm("alltoall", "quick", cost=lambda n, p, m: 0)(find("alltoall", "pairwise").run)
    try:
        assert set(run(program, ranks=2)) == {"pairwise"}
    finally:
        registry._algorithms["alltoall"].pop("quick")
