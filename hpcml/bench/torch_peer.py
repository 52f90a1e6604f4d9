"""The same GPT training step in PyTorch with its own defaults: the peer to compare with.

On one rank it runs eagerly, or what `torch.compile` makes of model and loss does. Among ranks it is
laid out by PyTorch's counterparts of the stages of ZeRO, on gloo.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hpcml.errors import UserError

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError:
    raise UserError("--peer torch needs PyTorch: install hpcml[peer]") from None

if TYPE_CHECKING:
    from hpcml.bench.products import Shape
    from hpcml.bench.step import Size

VERSION = torch.__version__
STAGES = (
    "DistributedDataParallel",
    "ZeroRedundancyOptimizer",
    "fully_shard, reshard_after_forward=False",
    "fully_shard, reshard_after_forward=True",
)
"""What counterparts of the stages of ZeRO are called."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}


class Block(nn.Module):
    """A pre-norm Transformer block with PyTorch's fused attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width, bias=False)
        self.attn = nn.ModuleDict(
            {
                "c_attn": nn.Linear(width, 3 * width, bias=False),
                "c_proj": nn.Linear(width, width, bias=False),
            }
        )
        self.ln_2 = nn.LayerNorm(width, bias=False)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(width, 4 * width, bias=False),
                "c_proj": nn.Linear(4 * width, width, bias=False),
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, width) -> (B, T, width)."""
        batch, length, width = x.shape
        parts = self.attn["c_attn"](self.ln_1(x)).split(width, 2)
        q, k, v = (p.view(batch, length, self.heads, -1).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class TorchGPT(nn.Module):
    """GPT with tied embeddings and no biases; the names are those of `hpcml.models.GPT`."""

    def __init__(self, size: Size, vocab: int) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, size.width),
                "wpe": nn.Embedding(size.block, size.width),
                "h": nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers)),
                "ln_f": nn.LayerNorm(size.width, bias=False),
            }
        )
        self.lm_head = nn.Linear(size.width, vocab, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Tokens and targets (B, T) -> mean cross-entropy."""
        t = self.transformer
        x = t["wte"](tokens) + t["wpe"](torch.arange(tokens.shape[1], device=tokens.device))
        for block in t["h"]:
            x = block(x)
        logits = self.lm_head(t["ln_f"](x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), target.view(-1))


def set_threads(count: int) -> None:
    """Threads of each operation."""
    torch.set_num_threads(count)


def step(
    size: Size, weights: Mapping[str, Any] | None, batch: tuple[Any, Any], vocab: int,
    precision: str = "fp32", compiled: bool = False,
) -> Callable[[], float]:  # fmt: skip
    """Return a training step on `batch`, on this rank alone.

    It starts from the given parameters, by name; None for first values that PyTorch chooses.
    """
    model = model_of(size, weights, vocab).to(DTYPES[precision])
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    return _training(torch.compile(model) if compiled else model, optimizer, batch)


def step_among_ranks(
    stage: int, size: Size, weights: Mapping[str, Any], batch: tuple[Any, Any], vocab: int
) -> Callable[[], float]:
    """Return a training step of all ranks, `batch` being this rank's own; see `STAGES`. Collective.

    `torch.distributed` has begun (`GlooPeer`). The loss is that of the rank's own batch.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = model_of(size, weights, vocab)
    if stage < 2:
        model = DistributedDataParallel(model)
    else:
        for part in (*model.transformer["h"], model):
            fully_shard(part, mesh=_cpu_mesh(), reshard_after_forward=stage == 3)
    if stage == 1:
        with warnings.catch_warnings():  # it compiles code by means that PyTorch has deprecated
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch.distributed.optim import ZeroRedundancyOptimizer
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **ADAMW)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    return _training(model, optimizer, batch)


def _cpu_mesh() -> Any:
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (get_world_size(),))


def model_of(size: Size, weights: Mapping[str, Any] | None, vocab: int) -> TorchGPT:
    """The model with these parameters, by name; None for first values that PyTorch chooses."""
    model = TorchGPT(size, vocab)
    if weights is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(weights[name]))
    return model


def _training(
    model: Any, optimizer: torch.optim.Optimizer, batch: tuple[Any, Any]
) -> Callable[[], float]:
    tokens, target = (torch.from_numpy(field) for field in batch)

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(tokens, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()  # type: ignore[no-any-return]

    return call


def products(
    shapes: Sequence[Shape], precision: str = "fp32"
) -> list[tuple[Callable[[], Any], int]]:
    """The step's matrix products in PyTorch: forward, and both of backward."""
    calls: list[tuple[Callable[[], Any], int]] = []
    for rows, n_in, n_out, count in shapes:
        sizes = ((rows, n_in), (n_out, n_in), (rows, n_out))
        x, w, g = (torch.randn(*size).to(DTYPES[precision]) for size in sizes)
        calls.append((partial(torch.mm, x, w.t()), count))
        calls.append((partial(torch.mm, g, w), count))
        calls.append((partial(torch.mm, g.t(), x), count))
    return calls
