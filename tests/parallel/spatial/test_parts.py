"""Each rank reads its part of a sample, and no more of a file that is mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from hpcml.data import Batches
from hpcml.data.images import images
from hpcml.data.images.source import InArray
from hpcml.nn import CrossEntropyLoss
from hpcml.parallel.spatial import divide
from tests.parallel.spatial.models import Classifier, Pixels


@pytest.mark.parametrize(("by_pixel", "end"), [(False, ""), (True, ""), (True, "down")])
def test_only_parts_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_pixel: bool, end: str
) -> None:
    """Labels of pixels are read whole where the loss is of whole images; those alone."""
    random = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", random.normal(size=(6, 1, 13, 18)).astype(np.float32))
    labels = random.integers(0, 3, (6, 13, 18) if by_pixel else 6)
    np.save(tmp_path / "labels.npy", labels)
    data = images(0, str(tmp_path / "images.npy"), shift=1, val_fraction=0, mean=(0.0,), std=(1.0,))
    batch = next(iter(Batches(data.train, 4, 1)))
    whole = batch[1:3]
    asked: list[Any] = []
    part = InArray.part
    monkeypatch.setattr(
        InArray, "part", lambda self, *what: asked.append(what[1]) or part(self, *what)
    )
    monkeypatch.setattr(InArray, "take", None)  # whole images

    def program() -> None:
        model = (Pixels if by_pixel else Classifier)().name_parts()
        division = divide(model, CrossEntropyLoss(), Mesh(sp_h=2, sp_w=2), end=end)
        found = division.fields(batch, slice(1, 3))
        block = division.grid.block((13, 18))
        np.testing.assert_array_equal(found[0], whole[0][(slice(None), slice(None), *block)])
        target = whole[1][(slice(None), *block)] if by_pixel and not end else whole[1]
        np.testing.assert_array_equal(found[1], target)

    on_threads(program, ranks=4)
    assert len(asked) == 2 * 4, "for each sample on each rank"
    assert all(h.stop - h.start <= 7 and w.stop - w.start <= 9 for h, w in asked)
