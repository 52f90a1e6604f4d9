"""`hpcml bench halo --layers` and `--memory-limit` on sizes of nothing."""

from __future__ import annotations

import pytest

from hpcml.bench import halo, halo_layers, halo_memory
from hpcml.bench.halo_layers import Shape
from hpcml.comm import Mesh, run
from hpcml.errors import UserError


def test_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = Shape("padded", 2, 3, 4, 3, 1, 8), Shape("pointwise", 1, 3, 4, 1, 1, 8)
    monkeypatch.setattr(halo_layers, "SHAPES", shapes)
    rows = run(lambda: halo_layers.measure(Mesh(sp_h=2), 1e-3, 1e-6, 1), ranks=2)[0]
    padded, pointwise = rows
    assert padded["halo_bytes"] == 2 * (2 * 3 * 8 * 4), "a row of the other, and its gradient back"
    assert padded["halo_predicted"] == pytest.approx(2e-3 + 384e-6)
    assert pointwise["halo_bytes"] == pointwise["halo_predicted"] == 0
    for row in rows:
        assert row["predicted"] > row["halo_predicted"] and row["measured"] > 0
    report = {
        "dtype": "float32", "ranks": 2, "nodes": 1, "cpu": "one", "alpha": 1e-3, "beta": 1e-6,
        "channels": 4, "rows": [], "layers": rows,
    }  # fmt: skip
    lines = halo.table(report).splitlines()
    assert "sp_h x sp_w = 2 x 1" in lines[2]
    assert [line.split()[0] for line in lines[4:]] == ["padded", "pointwise"]


@pytest.mark.parametrize(("limit", "said"), [(0, "at least 1"), (1024, "no image of 32 x 32")])
def test_limits_in_which_nothing_trains(limit: int, said: str) -> None:
    with pytest.raises(UserError, match=f"--memory-limit {limit}: .*{said}"):
        halo_memory.run(limit)


def test_an_image_too_large_for_one_rank_trains_on_four(monkeypatch: pytest.MonkeyPatch) -> None:
    one, four = (1, 1), (2, 2)
    limit = halo_memory.peak(96, four) * 5 // 2  # with parameters, gradients and buffers
    assert halo_memory.fits(96, four, limit)
    assert not halo_memory.fits(96, one, limit)
    assert halo_memory.peak(96, four) < 0.32 * halo_memory.peak(96, one)
    monkeypatch.setattr(halo_memory, "_PATIENCE", 20)  # a rank that is refused keeps no other
    assert not halo_memory.fits(352, four, 2 << 20)
    row = {"grid": [1, 1], "size": 64, "activations": 1000}
    report = {
        "limit": limit, "common": 64, "refusal": "128 x 128 on one rank: refused",
        "rows": [row, {"grid": [2, 2], "size": 128, "activations": 260}],
    }  # fmt: skip
    lines = halo_memory.table(report).splitlines()
    assert lines[3].split()[-1] == "0.260" and "4.00 x" in lines[3]
    assert lines[-1] == report["refusal"]
