"""Configuration: what is accepted, one clear line for what is not, and that nothing gets lost."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcml.errors import UserError
from hpcml.train import help as help_page
from hpcml.train import kinds
from hpcml.train.config import Config, dump, from_tables, load
from hpcml.train.sections import SECTIONS

OWN = '''
from __future__ import annotations
from typing import TYPE_CHECKING, Literal, Optional
if TYPE_CHECKING:
    from nowhere import Thing

class Net:
    """A model of a user's."""
    def __init__(self, vocab_size: int, width: int = 8, rate: float = 0.5, *,
                 act: Literal["relu", "gelu"] = "relu", sizes: list[int] = [1, 2],
                 name: Optional[str] = None, deep: bool = False):
        if width % 2:
            raise ValueError(f"width={width}\\nmust be even")
        self.given = (vocab_size, width, rate, act, sizes, name, deep)

class Opt:
    def __init__(self, params, lr=0.1, betas: tuple[float, float] = (0.9, 0.99)):
        self.params, self.lr, self.betas = params, lr, betas

def data(n: int, seed, thing: Thing = None, **others):
    return (n, seed, others)

def needs_root(root: str):
    return [root]

def loss(output, target, power=2):
    return abs(output - target) ** power

class NoRate:
    def __init__(self, params):
        pass

class Fails:
    def __init__(self):
        raise TypeError("unsupported")

number = 3
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with modules of a user's, as the current one."""
    (tmp_path / "own_kinds.py").write_text(OWN)
    (tmp_path / "broken_kinds.py").write_text("import own_kinds\nraise RuntimeError('no\\nluck')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    return tmp_path


def tables(**sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Small tables of the user's own kinds, with these sections changed."""
    made: dict[str, dict[str, Any]] = {
        "model": {"kind": "own_kinds:Net"},
        "optim": {"kind": "own_kinds:Opt"},
    }
    for name, table in sections.items():
        made[name] = made.get(name, {}) | table
    return made


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_and_overrides(own: Path) -> None:
    file = own / "job.toml"
    file.write_text("[run]\nsteps = 5\n[model]\nkind = 'own_kinds:Net'\nwidth = 2\n")
    config = load(
        file,
        ["run.steps=7", "optim.kind=own_kinds:Opt", "optim.betas=[0.5, 1]", "data.path=a/b c.txt",
         "run.dir=2026-11-21", "model.name=17", "model.deep=true", "model.rate=1"],
    )  # fmt: skip
    assert config.run.steps == 7
    assert config.run.dir == "2026-11-21"  # a date to TOML, a name to us
    assert config.data.options["path"] == "a/b c.txt"
    assert config.optim.options == {"lr": 0.1, "betas": (0.5, 1.0)}
    assert config.model.options == {
        "width": 2, "rate": 1.0, "act": "relu", "sizes": [1, 2], "name": "17", "deep": True
    }  # fmt: skip
    assert type(config.model.options["rate"]) is float
    assert load(file, ["optim.kind=own_kinds:Opt"]).run.dir == "runs/job"
    assert config.train.global_batch == Config().train.global_batch == 16


def test_what_is_written_is_read_again(own: Path) -> None:
    config = from_tables(
        tables(run={"dir": 'a "b"\n\x7f\\c', "steps": 3}, model={"act": "gelu", "name": "ü"},
               optim={"lr": 1e-5, "grad_clip": 1}, data={"path": "x"}),
    )  # fmt: skip
    text = dump(config)
    assert from_tables(tomllib.loads(text)) == config
    assert set(tomllib.loads(text)) == set(SECTIONS)
    assert tomllib.loads(text)["model"]["width"] == 8  # defaults of the callable are there, too


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("modle.width=4", ["[modle]", "did you mean model?"]),
        ("model.widht=4", ["model.widht=4", "did you mean model.width?"]),
        ("model.steps=4", ["model.steps=4", "known: kind"]),
        ("run.stpes=4", ["run.stpes=4", "did you mean run.steps?"]),
        ("train.steps=4", ["train.steps=4", "did you mean run.steps?"]),
        ("steps=4", ['"steps=4"', "run.steps=4"]),
        ("run.steps", ['"run.steps"', "section.key=value"]),
        ("run.steps=abc", ['run.steps="abc"', "a whole number"]),
        ("run.steps=1.5", ["run.steps=1.5", "a whole number"]),
        ("run.steps=true", ["run.steps=true", "a whole number"]),
        ("run.steps=0", ["run.steps=0", "at least 1"]),
        ("run.steps=-3", ["run.steps=-3", "at least 1"]),
        ("run.overwrite=1", ["run.overwrite=1", "true or false"]),
        ("run.seed=-1", ["run.seed=-1", "at least 0"]),
        ("train.global_batch=0", ["train.global_batch=0", "at least 1"]),
        ("train.microbatch=-1", ["train.microbatch=-1", "at least 0"]),
        ("train.microbatch=17", ["microbatch=17", "global_batch=16"]),
        ("train.precision=fp23", ['precision="fp23"', "fp32", "did you mean fp32?"]),
        ("optim.schedule=cosin", ['schedule="cosin"', "did you mean cosine?"]),
        ("optim.grad_clip=nan", ["optim.grad_clip=nan", "a number"]),
        ("optim.lr=inf", ["optim.lr=inf", "a number"]),
        ("optim.allocate=1", ["unknown key optim.allocate=1", "known: "]),
        ("optim.betas=0.9", ["optim.betas=0.9", "a list of 2"]),
        ("optim.betas=[0.9]", ["optim.betas=[0.9]", "a list of 2"]),
        ("model.act=rule", ['model.act="rule"', '"relu", "gelu"']),
        ("model.sizes=[1, 2.5]", ["model.sizes=[1, 2.5]", "a list of a whole number"]),
        ("zero.bucket_mb=0", ["zero.bucket_mb=0", "above 0"]),
        ("loss.power=3", ["loss.power=3", "set loss.kind"]),
        ("data.kind=txt", ['data.kind="txt"', "did you mean text?"]),
        ("model.kind=nowhere:Net", ["nowhere:Net", "No module named 'nowhere'"]),
        ("model.kind=own_kinds:Nett", ['"Nett"', "did you mean Net?"]),
        ("model.kind=own_kinds:number", ["own_kinds:number", "int"]),
        ("model.kind=broken_kinds:Net", ["RuntimeError: no luck (broken_kinds.py, line 2)"]),
        ("callback.kind=log", ['callback.kind="log"', "package.module:name"]),
        ("data.kind=own_kinds:data", ["own_kinds:data", "needs n,", "set data.n"]),
        ("optim.kind=own_kinds:NoRate", ["own_kinds:NoRate", "takes no lr"]),
        ("data.kind=own_kinds:needs_root", ["needs root", "set data.root"]),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_value_and_remedy(
    own: Path, override: str, parts: list[str]
) -> None:
    file = own / "job.toml"
    file.write_text(dump_of(tables()))
    message = refusal(lambda: load(file, [override]))
    for part in parts:
        assert part in message


def test_winograd_takes_whole_images(own: Path) -> None:
    given = tables(train={"winograd": True}, mesh={"sp_w": 2})
    assert "train.winograd=true with mesh.sp_w=2" in refusal(lambda: from_tables(given))


def dump_of(made: dict[str, dict[str, Any]]) -> str:
    return "\n".join(
        f"[{name}]\n" + "\n".join(f"{k} = {v!r}" for k, v in table.items())
        for name, table in made.items()
    )


def test_what_comes_later_is_said_plainly(own: Path) -> None:
    override = "run.resume=true"
    (own / "job.toml").write_text(dump_of(tables()))
    message = refusal(lambda: load(own / "job.toml", [override]))
    key, _, value = override.partition("=")
    assert message.startswith(f"{key}=") and value in message
    assert f"is not available in this version yet: set {key}=" in message


def test_cuda_without_cupy(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refusal(lambda: from_tables(tables(device={"kind": "cuda"})))
    assert 'device.kind="cuda" needs CuPy' in message and 'set device.kind="cpu"' in message


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    assert "No such file" in refusal(lambda: load(file))
    assert "directory" in refusal(lambda: load(tmp_path))
    file.write_text("[run]\nsteps = = 3\n")
    assert "line 2" in refusal(lambda: load(file))
    file.write_bytes(b"\xff\xfe")
    assert "not TOML" in refusal(lambda: load(file))
    file.write_text("steps = 3\n")
    assert "did you mean run.steps=3?" in refusal(lambda: load(file))
    file.write_text("run = 3\n")
    assert "write [run]" in refusal(lambda: load(file, ["run.steps=2"]))


def test_min_lr_above_lr_is_refused_only_where_it_counts(own: Path) -> None:
    keys = {"lr": 0.01, "min_lr": 0.1}
    assert from_tables(tables(optim=keys)).optim.min_lr == 0.1
    message = refusal(lambda: from_tables(tables(optim=keys | {"schedule": "cosine"})))
    assert "optim.min_lr=0.1 is above optim.lr=0.01" in message


def test_build_fills_in_offers_and_keeps_what_was_given(own: Path) -> None:
    config = from_tables(
        tables(model={"width": 4}, data={"kind": "own_kinds:data", "n": 3, "extra": 1})
    )
    offers = {"vocab_size": 65, "unused": 0}
    assert kinds.build(config.model, offers).given == (65, 4, 0.5, "relu", [1, 2], None, False)
    assert kinds.build(config.data, {"seed": 9}) == (3, 9, {"extra": 1})
    optimizer = kinds.build(config.optim, {}, ["p"], lr=5.0)
    assert (optimizer.params, optimizer.lr) == (["p"], 5.0)
    own_size = from_tables(tables(model={"vocab_size": 100}))
    assert kinds.build(own_size.model, offers).given[0] == 100
    message = refusal(lambda: kinds.build(config.model, {"in_features": 3}))
    assert "needs vocab_size" in message and "offered: in_features" in message


def test_errors_of_a_callable_become_one_line(own: Path) -> None:
    config = from_tables(tables(model={"width": 3}))
    message = refusal(lambda: kinds.build(config.model, {"vocab_size": 65}))
    assert message.startswith('model.kind="own_kinds:Net", width=3')
    assert "ValueError: width=3 must be even (own_kinds.py, line 13)" in message
    failing = from_tables(tables(model={"kind": "own_kinds:Fails"}))
    assert "TypeError: unsupported" in refusal(lambda: kinds.build(failing.model))


def test_errors_of_built_in_kinds_need_no_place_in_the_source() -> None:
    config = from_tables({"model": {"heads": 3}})
    message = refusal(lambda: kinds.build(config.model, {"vocab_size": 5, "sequence_length": 4}))
    assert message.startswith('model.kind="gpt", heads=3, vocab_size=5, sequence_length=4: heads=3')
    assert "128" in message and ".py" not in message


def test_a_function_is_the_loss_itself(own: Path) -> None:
    config = from_tables(tables(loss={"kind": "own_kinds:loss", "power": 3}))
    assert kinds.build(config.loss)(5, 3) == 8
    stray = tables(loss={"kind": "own_kinds:loss", "target": 3})
    assert "unknown key loss.target=3" in refusal(lambda: from_tables(stray))


def test_the_kind_the_data_ask_for_can_be_chosen_later(own: Path) -> None:
    config = from_tables(tables())
    assert config.loss.kind == "" and config.loss.options == {}
    chosen = kinds.choose(config.loss, "own_kinds:loss")
    assert chosen.options == {"power": 2} and chosen.kind == "own_kinds:loss"


def test_own_modules_are_found_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("def data(n: int = 2): return list(range(n))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    config = kinds.choose(SECTIONS["data"](), "only_here:data")
    assert kinds.build(config) == [0, 1]


def test_built_in_kinds_by_default() -> None:
    config = from_tables({})
    assert (config.data.kind, config.model.kind, config.optim.kind) == ("text", "gpt", "adamw")
    assert {"layers", "heads", "width", "dropout", "bias", "tie_embeddings"} <= set(
        config.model.options
    )
    assert {"vocab_size", "sequence_length"}.isdisjoint(config.model.options)
    assert {"lr", "betas", "eps", "weight_decay"} <= set(config.optim.options)
    assert config.data.options["sequence_length"] == 64


def test_the_help_page_shows_every_key_and_its_meaning() -> None:
    page = help_page.help_text()
    assert max(map(len, page.splitlines())) <= help_page.WIDTH
    for name, section in SECTIONS.items():
        assert f"[{name}] {inspect.getdoc(section).splitlines()[0]}" in page  # type: ignore[union-attr]
    known = {
        f"{section}.{key}"
        for section, slot in kinds.SLOTS.items()
        for kind in slot.builtin
        for key in kinds.parameters(section, kinds.find(section, kind))[0]
    }
    assert known == set(help_page.MEANING)
    assert "  steps = 1000 " in page
    assert "    heads = " in page


def test_every_job_of_the_repository_is_accepted() -> None:
    jobs = sorted((Path(__file__).parents[2] / "jobs").glob("*.toml"))
    assert {"demo", "regression", "shakespeare-char"} <= {job.stem for job in jobs}
    for job in jobs:
        assert load(job).run.dir == f"runs/{job.stem}"
