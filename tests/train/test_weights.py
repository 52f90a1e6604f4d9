"""Weights on disk: the format, the fingerprint, first values from a file, what is refused."""

from __future__ import annotations

import gc
import hashlib
import json
import resource
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hpcml import memory, nn
from hpcml.comm.threads import run
from hpcml.errors import UserError
from hpcml.nn import Constant, Module, Parameter
from hpcml.optim import SGD
from hpcml.parallel import parallelize
from hpcml.train import weights

SHAPES = {"scalar": (), "none": (0, 3), "vector": (5,), "matrix": (4, 6), "kernel": (2, 3, 2, 2)}


class Bag(Module):
    """Parameters of the given shapes, the element i of which is i, and an alias of the last one."""

    def __init__(self, dtype: str = "float32", **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            values = np.arange(np.prod(shape, dtype=int), dtype=np.float64).reshape(shape)
            setattr(self, name, Parameter(values.astype(dtype)))
        self.last = getattr(self, name)


def values(model: Module) -> dict[str, np.ndarray]:
    return {name: parameter.numpy() for name, parameter in model.named_parameters()}


def entries(model: Module) -> Iterator[tuple[str, np.ndarray]]:
    """What `Step.gathered` gives where nothing is spread over ranks."""
    for name, parameter in model.named_parameters():
        yield name, parameter.numpy()


def save(model: Module, path: Path) -> str:
    return weights.save(model, entries(model), path)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ml_dtypes.bfloat16])
def test_the_file_is_safetensors_with_each_parameter_once(tmp_path: Path, dtype: str) -> None:
    """Types of 16 bits are written as float32; the fingerprint is that of the values written."""
    model, path = Bag(dtype, **SHAPES), tmp_path / "model.safetensors"
    digest = save(model, path)
    stored = load_file(path)
    assert set(stored) == set(SHAPES)
    kind = np.float64 if dtype == "float64" else np.float32
    for name, array in values(model).items():
        assert stored[name].dtype == kind
        np.testing.assert_array_equal(stored[name], array.astype(kind))
    written = b"".join(stored[name].tobytes() for name in SHAPES)
    assert digest == hashlib.sha256(written).hexdigest()
    assert digest == weights.fingerprint(entries(model))
    assert path.read_bytes()[-len(written) :] == written
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert length % 8 == 0 and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_logical_order_counts_not_that_in_memory(tmp_path: Path) -> None:
    model, turned = Bag(matrix=(4, 6)), Bag(matrix=(4, 6))
    turned.matrix.data = np.asfortranarray(turned.matrix.data)
    assert save(model, tmp_path / "a") == save(turned, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_more_than_one_parameter_is_held(tmp_path: Path) -> None:
    """What was written is gone when the next entry is asked for, so that it can be gathered."""
    model = Bag(a=(100,), b=(200,), c=(300,))

    def gathered() -> Iterator[tuple[str, np.ndarray]]:
        alive: list[weakref.ref[np.ndarray]] = []
        for name, parameter in model.named_parameters():
            assert not any(reference() is not None for reference in alive)
            array = parameter.numpy().copy()
            alive.append(weakref.ref(array))
            yield name, array
            del array
        assert not any(reference() is not None for reference in alive)
        done.append(len(alive))

    done: list[int] = []
    assert weights.save(model, gathered(), tmp_path / "m") == weights.fingerprint(gathered())
    assert done == [3, 3]


@pytest.mark.parametrize("room", [0, 50, 1000])
def test_a_file_that_cannot_be_written_is_one_line_after_all_entries(
    tmp_path: Path, room: int
) -> None:
    """Full at once, within the header, within the values: the other ranks gather all the same."""
    model, seen = Bag(a=(100,), b=(200,), c=(300,)), []

    def noted() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in entries(model):
            seen.append(name)
            yield name, array

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(UserError) as caught:
            weights.save(model, noted(), tmp_path / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = str(caught.value)
    assert "model.safetensors" in message and "run.dir" in message and "\n" not in message
    assert seen == ["a", "b", "c"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stored", ["float32", "float64", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("own", ["float32", "float64", "float16", ml_dtypes.bfloat16])
def test_any_type_of_floating_point_is_read_as_any_other(
    tmp_path: Path, stored: str, own: str
) -> None:
    source, target = Bag(stored, **SHAPES), Bag(own, **SHAPES)
    save_file(values(source), tmp_path / "m")
    for parameter in target.parameters():
        parameter.assign(np.full(parameter.shape, 77))
    weights.load(target, tmp_path / "m")
    for name, array in values(target).items():
        assert array.dtype == own
        np.testing.assert_array_equal(array, getattr(source, name).numpy().astype(own))


def test_slices_are_read_without_the_whole(tmp_path: Path) -> None:
    """No parameter has values until it is asked for them; a slice makes no values at all."""
    save(Bag(large=(1000, 7)), tmp_path / "m")
    model = Bag(large=(1000, 7))
    gc.collect()
    weights.load(model, tmp_path / "m")
    live = memory.account().live["params"]
    assert not model.large.has_values
    part = np.empty(100, np.float64)
    model.large.fill(part, 3333, seed=5)
    np.testing.assert_array_equal(part, np.arange(3333, 3433))
    assert not model.large.has_values and memory.account().live["params"] == live
    model.double()  # as a configuration may ask after loading
    assert model.large.numpy()[-1, -1] == 6999 and model.large.dtype == np.float64


def test_the_file_may_be_gone_when_its_values_are_needed(tmp_path: Path) -> None:
    """`run.overwrite` removes it, if it is the run's own."""
    model = Bag(a=(10,))
    save(model, tmp_path / "m")
    model.a.assign(np.zeros(10))
    weights.load(model, tmp_path / "m")
    (tmp_path / "m").unlink()
    np.testing.assert_array_equal(model.a.numpy(), np.arange(10))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sharded_parameters_are_read_and_written_without_the_whole_model(
    tmp_path: Path, stage: int
) -> None:
    """Each rank reads the blocks that it owns; what the ranks gather is the file to the bit."""
    shapes = {f"p{i}": (300 + i, 10) for i in range(8)}
    whole = save(Bag(**shapes), tmp_path / "m")
    size = sum(4 * n * m for n, m in shapes.values())

    def rank() -> tuple[str, int]:
        model = Bag(**shapes)
        weights.load(model, tmp_path / "m")
        step = parallelize(model, optimizer=SGD, zero=stage, bucket_mb=0.01)
        if step.mesh.rank == 0:
            digest = weights.save(model, step.gathered(), tmp_path / "again")
        else:
            digest = weights.fingerprint(step.gathered())
        peak = memory.account().peak
        return digest, peak["params"] + peak["buffers"]

    for digest, held in run(rank, ranks=2, timeout=60):
        assert digest == whole
        assert held < (0.5 * size + 2 * 16_000 if stage == 3 else 1.1 * size + 2 * 16_000)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "m").read_bytes()


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_shared_parameter_may_be_stored_under_any_of_its_names(tmp_path: Path, name: str) -> None:
    class Tied(Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Parameter(shape=(3,), init=Constant(1.0))
            self.second = self.first

    save_file({name: np.full(3, 5, np.float32)}, tmp_path / "m")
    model = Tied()
    weights.load(model, tmp_path / "m")
    assert model.first is model.second and (model.first.numpy() == 5).all()


def test_all_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.int64),
               "d": np.zeros(1, np.float32)}, tmp_path / "m")  # fmt: skip
    model = Bag(a=(6,), b=(4,), c=(2,))
    with pytest.raises(UserError) as caught:
        weights.load(model, tmp_path / "m", "some.key")
    assert str(caught.value) == (
        f'some.key="{tmp_path / "m"}": state does not fit Bag: a has shape (2, 3), not (6,); '
        "b has type I64, not one of F64, F32, F16, BF16; c is missing; last is missing; "
        "d is unexpected"
    )
    assert all(parameter.has_values for parameter in model.parameters())


HEADER = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def packed(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        b"not a file of safetensors at all",
        struct.pack("<Q", 1 << 60) + b"{}",
        packed(HEADER, bytes(7)),
        packed(HEADER, bytes(9)),
        packed({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)),
        packed({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, bytes(16)),
        packed({"a": 5}, b""),
        packed([1], b""),
    ],
)
def test_what_is_no_file_of_weights_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read") as caught:
        weights.load(Bag(a=(2,)), path)
    assert "\n" not in str(caught.value) and "model.init_from" in str(caught.value)


def test_a_header_of_any_length_and_order_is_read(tmp_path: Path) -> None:
    """Others' files need not be padded, nor in the order of the model, and may have metadata."""
    header = {"__metadata__": {"made": "by others"},
              "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
              "a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}  # fmt: skip
    data = np.array([7, 8, 9], np.float32).tobytes()
    for extra in range(4):
        header["__metadata__"]["made"] += "." * extra
        (tmp_path / "m").write_bytes(packed(header, data))
        model = Bag(a=(2,), b=(1,))
        weights.load(model, tmp_path / "m")
        assert model.a.numpy().tolist() == [8, 9] and model.b.numpy().tolist() == [7]


@pytest.mark.parametrize("path", ["missing", "."])
def test_a_path_that_is_no_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        weights.load(nn.Linear(2, 2), path)
