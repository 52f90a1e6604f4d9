"""The same GPT in stages by `torch.distributed.pipelining`: the peer of our pipelines."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from hpcml.bench.torch_peer import ADAMW, TorchGPT, model_of

if TYPE_CHECKING:
    from hpcml.bench.step import Size

with warnings.catch_warnings():  # it compiles code by means that PyTorch has deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.pipelining import (
        PipelineStage,
        Schedule1F1B,
        ScheduleGPipe,
        ScheduleInterleaved1F1B,
    )

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
}
"""What our schedules are called there."""


class Links(nn.Module):
    """Some of what a GPT calls one after the other, by its names in our `GPT.chain`."""

    def __init__(self, model: TorchGPT, names: Sequence[str]) -> None:
        super().__init__()
        whole = model.transformer
        self.embeddings = nn.ModuleList(
            [whole["wte"], whole["wpe"]] if "transformer.embed" in names else []
        )
        blocks = [name.rpartition(".")[2] for name in names if name.startswith("transformer.h.")]
        self.rest = nn.ModuleList(whole["h"][int(number)] for number in blocks)
        if "transformer.ln_f" in names:
            self.rest.append(whole["ln_f"])
        if "lm_head" in names:
            self.rest.append(model.lm_head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T) or what comes from the stage before (B, T, width) -> the same of these."""
        if self.embeddings:
            tokens, positions = self.embeddings
            x = tokens(x) + positions(torch.arange(x.shape[1]))
        for part in self.rest:
            x = part(x)
        return x


def step(
    schedule: str, size: Size, weights: Mapping[str, Any], batch: tuple[Any, Any], vocab: int,
    stages: Sequence[Sequence[str]], microbatches: int,
) -> Callable[[], float]:  # fmt: skip
    """Return a training step of all ranks, with clipping and AdamW. Collective.

    stages: of every stage of the model the links; stage s is on rank s modulo the ranks, the last
    on the last. `torch.distributed` has begun (`GlooPeer`).
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    last = ranks - 1
    model = model_of(size, weights, vocab)
    mine = range(rank, len(stages), ranks)
    parts = [Links(model, stages[number]) for number in mine]
    made = [
        PipelineStage(part, number, len(stages), torch.device("cpu"))
        for part, number in zip(parts, mine, strict=True)
    ]
    runner = SCHEDULES[schedule](
        made if schedule == "interleaved" else made[0], microbatches, loss_fn=_loss
    )
    parameters = [parameter for part in parts for parameter in part.parameters()]
    tied = model.lm_head.weight  # the same as that of the embedding of tokens
    optimizer = torch.optim.AdamW(parameters, **ADAMW)
    tokens, target = (torch.from_numpy(field) for field in batch)

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        losses: list[torch.Tensor] = []
        given = (tokens,) if rank == 0 else ()
        asked = {"target": target, "losses": losses} if rank == last else {}
        runner.step(*given, return_outputs=False, **asked)
        if tied.grad is None:  # of a rank between the first and the last
            tied.grad = torch.zeros_like(tied)
        dist.all_reduce(tied.grad)
        _clip(parameters, [p for p in parameters if p is not tied or rank == 0])
        optimizer.step()
        loss = torch.stack(losses).mean() if losses else torch.zeros(())
        dist.broadcast(loss, last)
        return loss.item()  # type: ignore[no-any-return]

    return call


def _loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), target.view(-1))


def _clip(parameters: Sequence[torch.Tensor], counted: Sequence[torch.Tensor]) -> None:
    """Clip the gradient to norm 1 over all ranks, one of which counts each parameter."""
    square = torch.nn.utils.get_total_norm([p.grad for p in counted]) ** 2
    dist.all_reduce(square)
    torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, square.sqrt())
