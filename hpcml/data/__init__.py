"""Data: data sets, the order in which a run visits them, and batches that load only what is asked.

A data set is map-style as in PyTorch: `len(dataset)` and `dataset[i]`, one sample as a tuple of
arrays or numbers. One that also has `fetch(indices)`, returning whole stacked arrays, is faster.
"""

from __future__ import annotations

from hpcml.data.batches import Batch, Batches
from hpcml.data.core import Data, Dataset, as_data
from hpcml.data.sampler import Sampler

__all__ = ["Batch", "Batches", "Data", "Dataset", "Sampler", "as_data"]
