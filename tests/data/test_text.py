"""Text data: files, tokenizers, windows, and one clear line for each mistake."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from hpcml.data import files
from hpcml.data.text import Windows, text
from hpcml.data.tokenizers import ByteTokenizer, CharTokenizer, from_dict
from hpcml.errors import UserError


def refused(match: str, *args: object, **keys: object) -> None:
    with pytest.raises(UserError, match=match) as caught:
        text(*args, **keys)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def tokens_of(path: Path | str, tokenizer: str = "byte") -> bytes:
    data = text(str(path), tokenizer, sequence_length=1, val_fraction=0.0)  # type: ignore[arg-type]
    return bytes(data.train.tokens)  # type: ignore[attr-defined]


def test_one_file_of_bytes_stays_on_disk(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("naïve text " * 20)
    data = text(str(file), sequence_length=8)
    assert isinstance(data.train.tokens.base, np.memmap)  # type: ignore[attr-defined]
    assert tokens_of(file) == file.read_bytes()


def test_a_folder_and_a_glob_are_sorted_and_joined(tmp_path: Path) -> None:
    for name, content in {"b.txt": "bb", "a.txt": "aa", "sub/c.txt": "cc", ".h": "xx"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "empty.txt").touch()
    assert tokens_of(tmp_path) == b"aabbcc"
    assert tokens_of(tmp_path / "*.txt") == b"aabb"
    assert tokens_of(tmp_path / "**" / "*.txt") == b"aabbcc"


def test_a_name_with_glob_characters_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("one")
    (tmp_path / "a1.txt").write_text("two")
    assert tokens_of(tmp_path / "a[1].txt") == b"one"


def test_the_default_is_the_library_of_python_and_bounded() -> None:
    data = text()
    size = len(data.train.tokens) + len(data.val.tokens)  # type: ignore[attr-defined, union-attr]
    assert files.LIBRARY_BYTES / 4 < size <= files.LIBRARY_BYTES
    found = files.find("")
    assert found == sorted(found) and all(file.suffix == ".py" for file in found)


def test_windows_for_training_start_everywhere_and_targets_follow() -> None:
    tokens = np.arange(10, dtype=np.uint8)
    windows = Windows(tokens, 4)
    assert len(windows) == 6
    for index in range(6):
        inputs, targets = windows[index]
        np.testing.assert_array_equal(inputs, tokens[index : index + 4])
        np.testing.assert_array_equal(targets, tokens[index + 1 : index + 5])
    inputs, targets = windows.fetch(np.array([5, 0]))
    assert inputs.dtype == targets.dtype == np.int64
    np.testing.assert_array_equal(inputs, [[5, 6, 7, 8], [0, 1, 2, 3]])
    np.testing.assert_array_equal(targets, [[6, 7, 8, 9], [1, 2, 3, 4]])
    with pytest.raises(IndexError):
        windows[6]


@pytest.mark.parametrize(("size", "count"), [(4, 0), (5, 1), (8, 1), (9, 2), (13, 3)])
def test_windows_for_validation_do_not_overlap(size: int, count: int) -> None:
    windows = Windows(np.arange(size, dtype=np.uint8), 4, stride=4)
    assert len(windows) == count
    seen = [int(target) for i in range(count) for target in windows[i][1]]
    assert seen == list(range(1, 4 * count + 1))


def test_the_last_part_is_validation_and_vocabulary_is_offered(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("abcde" * 20)
    data = text(str(file), "char", sequence_length=4, val_fraction=0.1)
    assert data.info == {"vocab_size": 5, "sequence_length": 4}
    assert len(data.train) == 86 and len(data.val) == 2  # type: ignore[arg-type]
    assert data.loss == "next_token"
    assert text(str(file), val_fraction=0.0).val is None


def test_byte_tokenizer_writes_every_text() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("naïve 文")) == "naïve 文"
    assert tokenizer.decode([0xFF, 0x41]) == "\ufffdA"
    assert tokenizer.decode(tokenizer.encode(os.fsdecode(b"\xc3\xbc"))) == "ü"
    assert from_dict(tokenizer.to_dict()).vocab_size == 256


def test_char_tokenizer_numbers_the_distinct_characters_in_order() -> None:
    tokenizer = CharTokenizer("hello 文\r\n")
    assert tokenizer.characters == "\n\r ehlo文"
    assert tokenizer.decode(tokenizer.encode("hole")) == "hole"
    again = from_dict(tokenizer.to_dict())
    np.testing.assert_array_equal(again.encode("文hell"), tokenizer.encode("文hell"))
    assert again.encode("").size == 0
    with pytest.raises(UserError, match=r"'!' \(number 3"):
        tokenizer.encode("he!")
    with pytest.raises(UserError, match="unknown"):
        from_dict({"kind": "bpe"})


def test_a_large_vocabulary_gets_a_wider_type(tmp_path: Path) -> None:
    file = tmp_path / "wide.txt"
    file.write_text("".join(chr(0x4E00 + i) for i in range(300)), encoding="utf-8")
    data = text(str(file), "char", sequence_length=2)
    assert data.train.tokens.dtype == np.uint16  # type: ignore[attr-defined]
    np.testing.assert_array_equal(data.train[7][1], [8, 9])


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(rf'data.path="{re.escape(str(tmp_path))}/none" does not exist', f"{tmp_path}/none")
    refused("names no files", f"{tmp_path}/*.csv")
    refused("names no files", str(folder))
    refused("is empty", str(empty))
    refused("is empty", f"{tmp_path}/*.txt")
    refused("regular file", "/dev/null")


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_binary_files_are_refused_with_the_offset(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "zero").write_bytes(b"text" * 10 + b"\0" + b"text" * 10)
    (tmp_path / "latin").write_bytes(b"text " * 10 + "é".encode("latin-1") + b" text")
    refused('"[^"]*zero" is binary .zero byte at offset 40', str(tmp_path / "zero"), tokenizer)
    refused("latin.*byte 0xe9 at offset 50", str(tmp_path / "latin"), tokenizer)


def test_a_large_file_is_checked_at_its_head_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head may end within a character; what lies behind is not read at the start."""
    monkeypatch.setattr(files, "CHECKED_BYTES", 11)
    file = tmp_path / "large"
    file.write_bytes(b"a" * 10 + "é".encode() * 100 + b"\0")
    assert text(str(file), sequence_length=4).info["vocab_size"] == 256
    refused("zero byte at offset 210", str(file), "char")


def test_unreadable_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not stop root, under whom tests may run: the refusal is played."""
    file = tmp_path / "secret.txt"
    file.write_text("text" * 100)

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(np, "memmap", forbidden)
    refused("secret.txt. cannot be read .Permission denied", str(file))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_forbidden_folders_are_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0)
    try:
        refused("Permission denied", str(tmp_path))
    finally:
        tmp_path.chmod(0o700)


def test_text_shorter_than_a_sequence_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("x" * 100)
    refused("sequence_length=100 needs 101 tokens, but the training part has 90", str(file),
            sequence_length=100)  # fmt: skip
    refused("needs 11 tokens, but the validation part has 10", str(file), sequence_length=10)
    assert len(text(str(file), sequence_length=9).val) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"val_fraction": -0.1}, "val_fraction=-0.1"),
        ({"tokenizer": "bpe"}, 'tokenizer="bpe"'),
    ],
)
def test_bad_values_are_refused(keys: dict[str, object], match: str) -> None:
    refused(match, **keys)
