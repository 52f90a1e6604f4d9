"""Data: data sets, the order in which a run visits them, and batches that load only what is asked.

A data set is map-style as in PyTorch: `len(dataset)` and `dataset[i]`, one sample as a tuple of
arrays or numbers. One that also has `fetch(indices)`, returning whole stacked arrays, is faster.
One that has `fetch_part(indices, numbers, space)` instead is told the numbers of the samples in the
run, on which augmentation depends, and can read a part of each (`Batch.part`; None: all); with
`fetch_targets(indices, numbers)` it can also read the whole of the last field alone.
"""

from __future__ import annotations

from hpcml.data.batches import Batch, Batches
from hpcml.data.core import Data, Dataset, as_data
from hpcml.data.sampler import Sampler

__all__ = ["Batch", "Batches", "Data", "Dataset", "Sampler", "as_data"]
