"""The benchmark of overlap: complete, and its arithmetic right."""

from __future__ import annotations

import pytest

import hpcml
from hpcml.bench import overlap
from hpcml.comm import Mesh


def test_every_row_is_there_and_hidden_follows_from_its_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(overlap, "SIZES", (1 << 12, 1 << 16))
    reports = hpcml.run(lambda: overlap.run(Mesh(), 2), ranks=2)
    for report in reports:
        assert (report["bench"], report["ranks"], report["nodes"]) == ("overlap", 2, 1)
        asked = [(row["computing"], row["bytes"]) for row in report["rows"]]
        assert asked == [(who, size) for who in ("all ranks", "rank 0") for size in overlap.SIZES]
        for row in report["rows"]:
            gain = row["compute"] + row["communication"] - row["both"]
            assert row["hidden"] == pytest.approx(gain / row["communication"])
    text = overlap.table(reports[0])
    assert text.count("all ranks") == text.count("rank 0") == 2
