"""What ranks did at every moment."""

from __future__ import annotations

from hpcml.comm.timeline import Call
from hpcml.trace.record import Recorded
from hpcml.trace.segments import segments
from hpcml.trace.summary import summary
from tests.trace.support import recorded, wait


def test_work_is_cut_where_calls_are() -> None:
    work = [("0F0", 1, 5), ("0sendF0", 5, 6), ("0B0", 7, 12), ("U", 20, 22)]
    beside = Call("all_reduce", "dp", 4, True, 7, 9)
    calls = [wait(7, 8), wait(8, 10), wait(13, 14, "send"), beside, wait(15, 16, "accumulate")]
    (found,) = segments([recorded(0, {"pp": 0}, work, calls)])
    assert found == [
        ("F", 0, 0, 1, 5),
        ("transfer", 0, 0, 5, 6),
        ("waiting", 0, 0, 7, 8),
        ("waiting", 0, 0, 8, 10),
        ("B", 0, 0, 10, 12),
        ("waiting", -1, -1, 13, 14),
        ("waiting", -1, -1, 15, 16),
        ("U", -1, -1, 20, 22),
    ]


def test_a_collective_waits_for_the_last_of_its_ranks() -> None:
    def rank(number: int, pp: int, dp: int, *starts: float) -> Recorded:
        axes = zip(("dp", "dp", "world", "dp.shard"), starts, strict=True)
        calls = [Call("all_reduce", axis, 4, False, start, start + 10) for axis, start in axes]
        return recorded(number, {"pp": pp, "dp": dp}, calls=calls)

    ranks = [rank(0, 0, 0, 0, 20, 40, 60), rank(1, 0, 1, 3, 20, 41, 61),
             rank(2, 1, 0, 9, 22, 40, 60), rank(3, 1, 1, 8, 45, 49, 70)]  # fmt: skip
    cut = [[(what, start, end) for what, _, _, start, end in did] for did in segments(ranks)]
    assert cut[0] == [("waiting", 0, 3), ("transfer", 3, 10), ("transfer", 20, 30),
                      ("waiting", 40, 49), ("transfer", 49, 50), ("transfer", 60, 70)]  # fmt: skip
    assert cut[1][0] == ("transfer", 3, 13)
    # The second call of ranks 2 and 3: so late that the clocks must be wrong, or all of it.
    assert cut[2][:3] == [("transfer", 9, 19), ("waiting", 22, 32), ("waiting", 40, 49)]
    assert cut[3][-1] == ("transfer", 70, 80)


def test_shares_of_a_step() -> None:
    work = [("0F0", 0, 40), ("0B0", 40, 80), ("U", 85, 90)]
    text = summary([recorded(0, {"dp": 0}, work, [wait(40, 50)], (0, 100))])
    assert text.splitlines()[1].split() == ["0", "100000.0", "75.0%", "0.0%", "10.0%", "15.0%"]
    assert "pipeline" not in text
