"""Tables as text, and where they come from: names, files, functions."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcml.errors import UserError
from hpcml.parallel.pipeline import (
    SCHEDULES,
    Action,
    Kind,
    Weights,
    check,
    find,
    lower,
    parse,
    table,
    write,
)
from tests.parallel.pipeline.tables import all_sizes

NUMBER = st.integers(0, 999_999)
ACTION = st.builds(Action, st.integers(0, 30), st.sampled_from(list(Kind)), NUMBER)


def test_every_schedule_survives_writing() -> None:
    for _, schedule in all_sizes():
        assert parse(write(schedule)) == schedule
    lowered = lower(SCHEDULES["zero-bubble"](3, 4), zero3=True)
    assert parse(write(lowered)) == lowered


@given(
    orders=st.lists(st.lists(ACTION, min_size=1, max_size=9), min_size=1, max_size=5),
    weights=st.sampled_from([w for w in Weights if w is not Weights.SYNCHRONOUS]),
    name=st.from_regex(r"[\w:.-]+( [\w-]+)?", fullmatch=True),
)
def test_any_table_survives_writing(
    orders: list[list[Action]], weights: Weights, name: str
) -> None:
    """Right or wrong: what is written is what is read."""
    schedule = table(name, orders, weights)
    text = write(schedule)
    assert parse(text) == schedule
    assert write(parse(text)) == text


def test_comments_blank_lines_and_keys() -> None:
    text = """
    # two ranks
    name : mine   # and its name

    0F0   0B0 # stage, kind, microbatch
    \t1F0 1B0
    """
    assert parse(text) == table("mine", [parse("0F0 0B0").orders[0], parse("1F0 1B0").orders[0]])
    assert parse("0F0 0B0", "file").name == "file"
    assert parse("0F0 0B0 0U0").weights is Weights.STASHED
    assert parse("weights: vertical\n0F0 0B0 0U0").weights is Weights.VERTICAL


def test_a_stage_is_where_most_of_its_actions_are() -> None:
    found = parse("0F0 0F1 1F0 0B0 0B1\n1F1 1B0 1B1\n3F0 3B0")
    assert found.rank_of == (0, 1, -1, 2)
    assert (found.ranks, found.stages, found.microbatches) == (3, 4, 2)


WRONG = {
    "0F0 0X0": 't, line 1, cell 2: "0X0" is no action: write stage, kind and microbatch, such as '
    "0F3 (F forward, B backward, I and W its halves, U update)",
    "# one\n\n0F0 F0": 't, line 3, cell 2: "F0" is no action',
    "0F-1": '"0F-1" is no action',
    "0F0,0B0": '"0F0,0B0" is no action',
    "1000000F0": '"1000000F0" is no action',
    "٣F0": '"٣F0" is no action',
    "colour: red\n0F0 0B0": 't, line 1: unknown key "colour": use name or weights',
    "weights: stale\n0F0": 't: weights: "stale" is unknown: use synchronous, stashed, vertical, '
    "double",
    "": "t: no actions: write a line for each rank, such as 0F0 0B0",
    "# nothing\nname: empty": "t: no actions",
}


@pytest.mark.parametrize("text", WRONG)
def test_errors_name_line_cell_and_remedy(text: str) -> None:
    with pytest.raises(UserError, match=r"\A[^\n]*\Z") as raised:
        parse(text, "t")
    assert WRONG[text] in str(raised.value)


def test_names_give_the_built_in_schedules() -> None:
    for name, make in SCHEDULES.items():
        assert find(name) == make(4, 8)
        assert find(name, 3, 6, update_every=None) == make(3, 6)
    assert find("interleaved", 2, 4, 3) == SCHEDULES["interleaved"](2, 4, 3)
    assert find("gpipe", 2, 4, chunks=1) == SCHEDULES["gpipe"](2, 4)
    assert find("pipedream", vertical_sync=True).weights is Weights.VERTICAL
    assert find("pipedream-2bw", 2, 9, update_every=3).updates() == [2, 5, 8]


def test_a_file_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "eager.txt"
    path.write_text("\ufeff0F0 0F1 0B0 0B1\r\n1F0 1B0 1F1 1B1\r\n", encoding="utf-8")
    found = find(str(path))
    assert (found.name, found.ranks, found.microbatches) == (str(path), 2, 2)
    check(found)
    assert find(str(path), ranks=2, microbatches=2) == found


MODULE = """
from hpcml.parallel.pipeline import Schedule, table
from hpcml.parallel.pipeline.schedules import gpipe

def text(ranks, microbatches, chunks):
    back = [f"0B{m}" for m in range(microbatches)]
    return " ".join([f"0F{m}" for m in range(microbatches)] + back)

def made(ranks, microbatches, chunks):
    return gpipe(ranks, microbatches)

def other_sizes(ranks, microbatches, chunks):
    return gpipe(ranks + 1, microbatches)

def number(ranks, microbatches, chunks):
    return chunks

def fails(ranks, microbatches, chunks):
    raise KeyError("a\\nb")

def takes_none():
    return ""

def tuples(ranks, microbatches, chunks):
    return table("t", [[(0, "F", 0)]])
"""


def test_a_function_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_schedules.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert find("own_schedules:made", 3, 5) == SCHEDULES["gpipe"](3, 5)
    found = find("own_schedules:text", 1, 3)
    assert found.name == "own_schedules:text"
    check(found)

    def complaint(source: str, **sizes: int) -> str:
        with pytest.raises(UserError, match=r"\A[^\n]*\Z") as raised:
            find(source, **sizes)
        return str(raised.value)

    assert complaint("own_schedules:number", chunks=2) == (
        'schedule "own_schedules:number" returned a int: return a Schedule or its text'
    )
    assert complaint("own_schedules:fails", ranks=2) == (
        'schedule "own_schedules:fails" (2 ranks, 8 microbatches, 1 chunks) failed: '
        "KeyError: 'a\\nb' (own_schedules.py, line 19)"
    )
    assert "TypeError: takes_none()" in complaint("own_schedules:takes_none")
    assert "AttributeError" in complaint("own_schedules:tuples")
    assert "has no attribute 'none'" in complaint("own_schedules:none")
    assert "No module named 'no_such'" in complaint("no_such:made")
    assert complaint("own_schedules:other_sizes", ranks=2) == (
        'ranks=2 with schedule "own_schedules:other_sizes", a table for 3: use as many, or another '
        "table"
    )


def test_what_cannot_be_found_is_one_line(tmp_path: Path) -> None:
    def complaint(source: object, *sizes: int, **options: int) -> str:
        with pytest.raises(UserError, match=r"\A[^\n]*\Z") as raised:
            find(str(source), *sizes, **options)
        return str(raised.value)

    assert complaint("1f1v") == (
        'schedule "1f1v" is unknown, and no file: did you mean 1f1b? (or package.module:function)'
    )
    assert "use one of naive, gpipe, 1f1b," in complaint("no/such/file.txt")
    assert "cannot be read" in complaint(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in complaint(tmp_path / "binary")
    (tmp_path / "one").write_text("0F0 0B0")
    assert complaint(tmp_path / "one", 2) == (
        f'ranks=2 with schedule "{tmp_path}/one", a table for 1: use as many, or another table'
    )
    assert "microbatches=3 with schedule" in complaint(tmp_path / "one", 1, 3)
    assert "chunks with schedule" in complaint(tmp_path / "one", chunks=2)
    assert complaint("gpipe", 2, 2, chunks=2) == (
        "chunks=2 with schedule=gpipe: only interleaved uses it"
    )
    assert "only pipedream-2bw uses it" in complaint("pipedream", update_every=2)
    assert "ranks=0" in complaint("gpipe", 0)
