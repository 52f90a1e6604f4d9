"""The schedules of the literature, each a pure function from sizes to a table of compute actions.

All of them take any number of ranks and of microbatches, fewer than ranks too, unless they say
otherwise, and go backward in increasing order of microbatches, so that gradients are added in the
same order whatever the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from hpcml.errors import UserError
from hpcml.parallel.pipeline.actions import Action, Kind, Schedule, Weights, table

Order = list[Action]


def naive(ranks: int, microbatches: int) -> Schedule:
    """One microbatch at a time: a single rank computes while the others wait."""
    _check(ranks, microbatches)
    return table("naive", (_alternate(*_passes(s, microbatches), 0) for s in range(ranks)))


def gpipe(ranks: int, microbatches: int) -> Schedule:
    """Forward of all microbatches, then backward of all (Huang et al. 2018, section 2.3).

    Every rank keeps the activations of all M microbatches. Bubble: (K - 1) / (M + K - 1) of the
    time, as with `1f1b`.
    """
    _check(ranks, microbatches)
    return table("gpipe", (chain(*_passes(s, microbatches)) for s in range(ranks)))


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """After a warm-up, forward and backward in turn (PipeDream-Flush, Narayanan et al. 2021).

    Stage s of K keeps the activations of min(K - s, M) microbatches.
    """
    _check(ranks, microbatches)
    return table("1f1b", _one_f_one_b(ranks, microbatches))


def interleaved(ranks: int, microbatches: int, chunks: int = 2) -> Schedule:
    """1F1B with several stages a rank: stage c * ranks + r is chunk c of rank r.

    A rank goes through its chunks with `ranks` microbatches at a time (Narayanan et al. 2021,
    section 2.2.2), so microbatches must be a multiple of ranks. The bubble is 1 / chunks of that
    of 1F1B, for `chunks` times the messages.
    """
    _check(ranks, microbatches)
    if chunks < 2:
        raise UserError(f"chunks={chunks} with schedule=interleaved: use 2 or more, or 1f1b")
    if microbatches % ranks:
        below, above = microbatches // ranks * ranks, -(-microbatches // ranks) * ranks
        near = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"{microbatches} microbatches with schedule=interleaved on {ranks} ranks: use a "
            f"multiple of {ranks}, such as {near}, or 1f1b"
        )

    def order(rank: int) -> Order:
        turns = [divmod(turn, ranks * chunks) for turn in range(microbatches * chunks)]
        units = [(rest // ranks, turn * ranks + rest % ranks) for turn, rest in turns]
        forwards = [Action(c * ranks + rank, Kind.FORWARD, m) for c, m in units]
        last = chunks - 1
        backwards = [Action((last - c) * ranks + rank, Kind.BACKWARD, m) for c, m in units]
        return _alternate(forwards, backwards, 2 * (ranks - rank - 1) + last * ranks)

    return table("interleaved", map(order, range(ranks)))


def zero_bubble(ranks: int, microbatches: int) -> Schedule:
    """ZB-H1 of Qi et al. 2023, section 2.2: halves of backward, one of which can wait.

    As 1F1B, but the gradient for the input goes on as soon as it can, and that for the weights
    comes `s` microbatches later on stage s, where 1F1B would be idle at the end. No rank keeps more
    than the first one does, min(K, M) microbatches, which is the peak of 1F1B. Where F, I and W
    take as long as each other the bubble is a third of that of 1F1B.
    """
    _check(ranks, microbatches)

    def order(stage: int) -> Order:
        forwards, inputs = _passes(stage, microbatches, Kind.INPUT)
        late = iter(a._replace(kind=Kind.WEIGHT) for a in inputs)
        warmup = min(ranks - stage - 1, microbatches)
        cells = forwards[:warmup]
        for m, now in enumerate(inputs):
            cells += [*forwards[warmup + m : warmup + m + 1], now]
            if m >= stage:
                cells.append(next(late))
        return [*cells, *late]

    return table("zero-bubble", map(order, range(ranks)))


def pipedream(ranks: int, microbatches: int, vertical_sync: bool = False) -> Schedule:
    """Asynchronous 1F1B: an update after every backward (Narayanan et al. 2019, section 3).

    Backward uses the weights that forward of the same microbatch has used, the newest ones then:
    stage s of n holds n - s versions, and w(t+1) = w(t) - lr grad f(w_1(t-n+1), ..., w_n(t)). With
    `vertical_sync` all stages use the version of the first, t - n + 1.
    """
    _check(ranks, microbatches)
    weights = Weights.VERTICAL if vertical_sync else Weights.STASHED
    return table("pipedream", _with_updates(_one_f_one_b(ranks, microbatches), 1), weights)


def pipedream_2bw(ranks: int, microbatches: int, update_every: int | None = None) -> Schedule:
    """Asynchronous 1F1B with two versions of the weights (Narayanan et al. 2021, section 3.1).

    An update follows every `update_every` microbatches (default: as many as ranks), a batch. All
    stages use one version for a batch, and it is one update old: w(t+1) = w(t) - lr grad f(w(t-1)).
    """
    _check(ranks, microbatches)
    every = ranks if update_every is None else update_every
    if every < max(1, ranks - 1):
        raise UserError(
            f"update_every={every} with schedule=pipedream-2bw on {ranks} ranks: a batch would "
            f"begin before the weights it needs: use {max(1, ranks - 1)} or more"
        )
    orders = _with_updates(_one_f_one_b(ranks, microbatches), every)
    return table("pipedream-2bw", orders, Weights.DOUBLE)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "naive": naive,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zero-bubble": zero_bubble,
    "pipedream": pipedream,
    "pipedream-2bw": pipedream_2bw,
}
"""The built-in schedules by name."""

ASYNCHRONOUS = ("pipedream", "pipedream-2bw")
"""Those whose tables can go on for ever, without all microbatches coming to an end in between."""


def _check(ranks: int, microbatches: int) -> None:
    for name, value in (("ranks", ranks), ("microbatches", microbatches)):
        if value < 1:
            raise UserError(f"{name}={value}: a schedule needs 1 or more")


def _passes(stage: int, microbatches: int, back: Kind = Kind.BACKWARD) -> tuple[Order, Order]:
    """Forward and backward of all microbatches in a stage."""
    every = range(microbatches)
    return [Action(stage, Kind.FORWARD, m) for m in every], [Action(stage, back, m) for m in every]


def _alternate(forwards: Sequence[Action], backwards: Sequence[Action], warmup: int) -> Order:
    """Forward `warmup` times, then forward and backward in turn, then what is left of backward."""
    steady = zip(forwards[warmup:], backwards, strict=False)
    done = max(0, len(forwards) - warmup)
    return [*forwards[:warmup], *(a for pair in steady for a in pair), *backwards[done:]]


def _one_f_one_b(ranks: int, microbatches: int) -> list[Order]:
    return [_alternate(*_passes(s, microbatches), ranks - s - 1) for s in range(ranks)]


def _with_updates(orders: Iterable[Order], every: int) -> list[Order]:
    """An update after the last backward of each batch of `every` microbatches and of the rest."""

    def with_updates(order: Order) -> Iterator[Action]:
        for action in order:
            yield action
            full = (action.microbatch + 1) % every == 0 or action == order[-1]
            if action.kind is Kind.BACKWARD and full:
                yield action._replace(kind=Kind.UPDATE)

    return [list(with_updates(order)) for order in orders]
