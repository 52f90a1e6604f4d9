"""The kernels as array expressions: what each one computes, for arrays of any module and dtype.

Same names and signatures as `cpu`. They serve arrays the compiled kernels do not take (CuPy), and
the tests hold the compiled ones against them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hpcml.backend import Array, xp

_ROOT_2_OVER_PI = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def _normal(x: Array) -> tuple[Array, Array]:
    m = xp(x)
    erf: Any = np.vectorize(math.erf, otypes=[x.dtype])
    if m is not np:
        from cupyx.scipy import special

        erf = special.erf
    cdf = 0.5 * (1 + erf(x / math.sqrt(2))) if x.size else x
    return cdf, m.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def gelu(x: Array, out: Array) -> None:
    """out = x Phi(x)."""
    out[...] = x * _normal(x)[0]


def gelu_backward(g: Array, x: Array, out: Array) -> None:
    """out = g (Phi(x) + x phi(x))."""
    cdf, pdf = _normal(x)
    out[...] = g * (cdf + x * pdf)


def gelu_tanh(x: Array, out: Array) -> None:
    """out = x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2."""
    out[...] = 0.5 * x * (1 + xp(x).tanh(_ROOT_2_OVER_PI * (x + _CUBIC * x**3)))


def gelu_tanh_backward(g: Array, x: Array, out: Array) -> None:
    """out = g d/dx gelu_tanh(x)."""
    t = xp(x).tanh(_ROOT_2_OVER_PI * (x + _CUBIC * x**3))
    out[...] = g * 0.5 * (1 + t + x * (1 - t * t) * _ROOT_2_OVER_PI * (1 + 3 * _CUBIC * x * x))


def relu_backward(g: Array, y: Array, out: Array) -> None:
    """out = g, but 0 where y = max(x, 0) is 0; at NaN it is g."""
    out[...] = xp(g).where(y <= 0, 0, g)


def column_sums(x: Array, out: Array) -> None:
    """out[j] = sum of x[r, j]."""
    out[...] = x.sum(0)


def block_squares(x: Array, block: int, out: Array) -> None:
    """out[k] = sum of squares of x[k * block] to x[(k + 1) * block - 1], in float64."""
    out[: x.size // block] = xp(x).sum(x.reshape(-1, block).astype(np.float64) ** 2, axis=1)


def adam_update(
    p: Array, g: Array, m: Array, v: Array,
    scale: float, lr: float, beta1: float, beta2: float, eps: float, decay: float,
    correct1: float, correct2: float, decoupled: bool,
) -> None:  # fmt: skip
    """One step of Adam or AdamW; correct1 = 1 - beta1^t, correct2 = sqrt(1 - beta2^t)."""
    gradient = g * scale + (0 if decoupled else decay) * p
    m[...] = beta1 * m + (1 - beta1) * gradient
    v[...] = beta2 * v + (1 - beta2) * gradient**2
    keep = 1 - lr * decay if decoupled else 1
    p[...] = keep * p - lr / correct1 * m / (xp(p).sqrt(v) / correct2 + eps)


def sgd_update(
    p: Array, g: Array, velocity: Array,
    scale: float, lr: float, momentum: float, rest: float, decay: float, nesterov: bool,
) -> None:  # fmt: skip
    """One step of SGD with momentum: velocity = momentum velocity + rest (g scale + decay p)."""
    gradient = g * scale + decay * p
    velocity[...] = momentum * velocity + rest * gradient
    p -= lr * (gradient + momentum * velocity if nesterov else velocity)


def sgd_plain_update(p: Array, g: Array, scale: float, lr: float, decay: float) -> None:
    """One step of SGD without momentum: p -= lr (g scale + decay p)."""
    p -= lr * (g * scale + decay * p)


def linear(x: Array, weight: Array, bias: Array, out: Array) -> None:
    """out = x weight^T + bias; empty bias for none."""
    xp(x).matmul(x, weight.T, out=out)
    if bias.size:
        out += bias


def linear_input_gradient(g: Array, weight: Array, out: Array) -> None:
    """out = g weight."""
    xp(g).matmul(g, weight, out=out)


def linear_weight_gradient(g: Array, x: Array, out: Array) -> None:
    """out = g^T x."""
    xp(g).matmul(g.T, x, out=out)


def matmul(a: Array, b: Array, out: Array) -> None:
    """out = a b, over the last two dimensions."""
    xp(a).matmul(a, b, out=out)


def layer_norm(
    x: Array, weight: Array, bias: Array, eps: float, out: Array, mean: Array, inverse: Array
) -> None:
    """out = (x - mean) * inverse * weight + bias for each row; empty weight or bias for none."""
    mean[...] = x.mean(1)
    inverse[...] = 1 / xp(x).sqrt(x.var(1) + eps)
    out[...] = (x - mean[:, None]) * inverse[:, None]
    if weight.size:
        out *= weight
    if bias.size:
        out += bias


def layer_norm_backward(
    g: Array, x: Array, weight: Array, mean: Array, inverse: Array, pending: Array, out: Array
) -> None:
    """out = pending + inverse * (gw - mean(gw) - n mean(gw n)), n the normalised row."""
    normal = (x - mean[:, None]) * inverse[:, None]
    gw = g * weight if weight.size else g
    a, b = gw.mean(1, keepdims=True), (gw * normal).mean(1, keepdims=True)
    result = inverse[:, None] * (gw - a - normal * b)
    out[...] = result + pending if pending.shape[0] else result


def layer_norm_weight_gradient(g: Array, x: Array, mean: Array, inverse: Array, out: Array) -> None:
    """out[j] = sum over rows of g * (x - mean) * inverse."""
    out[...] = (g * ((x - mean[:, None]) * inverse[:, None])).sum(0)


def cross_entropy(logits: Array, target: Array, ignore: int, loss: Array, lse: Array) -> None:
    """loss[r] = lse[r] - logits[r, target[r]], lse = log sum exp; 0 where target is `ignore`."""
    m = xp(logits)
    most = logits.max(1)
    rest = m.log(m.exp(logits - most[:, None]).sum(1))
    lse[...] = most + rest
    used = target != ignore
    chosen = m.take_along_axis(logits, m.where(used, target, 0)[:, None], 1)[:, 0]
    loss[...] = m.where(used, (most - chosen) + rest, 0)


def cross_entropy_backward(
    logits: Array, target: Array, ignore: int, lse: Array, g: Array, out: Array
) -> None:
    """out[r] = g[r] * (softmax(logits[r]) - onehot(target[r])); 0 where target is `ignore`.

    A target beyond the classes has them on another rank, which subtracts its one there.
    """
    m = xp(logits)
    used = target != ignore
    out[...] = m.exp(logits - lse[:, None])
    rows = m.flatnonzero(used & (target < logits.shape[1]))
    out[rows, target[rows]] -= 1
    out *= m.where(used, g, 0)[:, None]


def embedding_backward(g: Array, index: Array, table: Array) -> None:
    """table[index[r]] += g[r]."""
    if xp(g) is np:
        np.add.at(table, index, g)
    else:
        import cupyx

        cupyx.scatter_add(table, index, g)


def _philox(key: int, c0: Array, c1: Array, c2: Array, c3: Array) -> list[Array]:
    u8, low, half = np.uint64, np.uint64(0xFFFFFFFF), np.uint64(32)
    c = list(xp(c0).broadcast_arrays(c0, c1, c2, c3))
    k0, k1 = int(key) & 0xFFFFFFFF, int(key) >> 32
    for _ in range(10):
        a, b = u8(0xD2511F53) * c[0], u8(0xCD9E8D57) * c[2]
        c = [(b >> half) ^ c[1] ^ u8(k0), b & low, (a >> half) ^ c[3] ^ u8(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def _stream(key: int, start: int, count: int, m: Any) -> Array:
    """Words start .. start + count - 1 of a stream, as uint64."""
    first = start >> 2
    blocks = m.arange(first, ((start + count + 3) >> 2) + 1, dtype=np.uint64)
    zero = m.zeros_like(blocks)
    low, high = blocks & np.uint64(0xFFFFFFFF), blocks >> np.uint64(32)
    return m.stack(_philox(key, low, high, zero, zero), 1).reshape(-1)[start - 4 * first :][:count]


def random_words(key: int, start: int, out: Array) -> None:
    """out[i] = word number start + i of the stream `key`."""
    out[...] = _stream(key, start, out.size, xp(out))


def random_uniform(key: int, start: int, out: Array) -> None:
    """out[i] = number start + i of a uniform stream on [0, 1), from 24 random bits."""
    out[...] = (_stream(key, start, out.size, xp(out)) >> np.uint64(8)) / float(1 << 24)


def random_normal(key: int, start: int, out: Array) -> None:
    """out[i] = number start + i of a standard normal stream (Box and Muller 1958)."""
    m = xp(out)
    even = start & ~1
    pairs = _stream(key, even, (start + out.size + 1 - even) & ~1, m).reshape(-1, 2)
    radius = m.sqrt(-2 * m.log((pairs[:, 0].astype(np.float64) + 1) / 2**32))
    angle = 2 * math.pi / 2**32 * pairs[:, 1]
    both = m.stack([radius * m.cos(angle), radius * m.sin(angle)], 1).reshape(-1)
    out[...] = both[start - even :][: out.size]


def dropout(
    x: Array, key: int, first: int, threshold: int, runs: Array, period: int, out: Array
) -> None:
    """out = x / (1 - p) where kept, 0 elsewhere; row r is of sample first + r; threshold = p 2^32.

    runs: (first, count) of neighbours in the whole sample, again every `period` elements.
    """
    m, u8 = xp(x), np.uint64
    one = m.concatenate([m.arange(0), *(m.arange(i, i + n) for i, n in runs.tolist())])
    times = x.shape[1] // max(one.size, 1)
    place = (m.arange(times)[:, None] * period + one).reshape(-1).astype(u8)
    blocks, block = m.unique(place >> u8(2), return_inverse=True)
    c0, c1 = blocks & u8(1023), blocks >> u8(10)  # in tiles of 4096 elements
    for r in range(x.shape[0]):
        sample = m.full_like(blocks, int(first) + r)
        words = m.stack(_philox(key, c0, c1, sample & u8(0xFFFFFFFF), sample >> u8(32)), 1)
        out[r] = (words[block, place & u8(3)] >= u8(threshold)) * x[r] / (1 - threshold / 2**32)


def _probabilities(
    q: Array, k: Array, scale: float, causal: bool, lse: Array | None
) -> tuple[Array, Array]:
    m = xp(q)
    scores = scale * (q @ k.swapaxes(-1, -2))
    if causal:
        seen = m.tril(m.ones(scores.shape[-2:], bool))
        scores = m.where(seen, scores, -m.inf)
    if lse is None:
        most = scores.max(-1)
        lse = most + m.log(m.exp(scores - most[..., None]).sum(-1))
    return m.exp(scores - lse[..., None]), lse


def _attention_mask(
    q: Array, keys: int, key: int, first: int, threshold: int, head: int, row0: int, key0: int
) -> Array | float:
    if threshold == 0:
        return 1.0
    m, u8 = xp(q), np.uint64
    batch, heads, queries, _ = q.shape
    sample = (m.arange(batch, dtype=u8) + u8(first))[:, None, None, None]
    c2 = m.arange(head, head + heads, dtype=u8)[:, None, None] ^ ((sample >> u8(32)) << u8(16))
    c1 = m.arange(row0, row0 + queries, dtype=u8)[:, None]
    blocks = m.arange(key0 >> 2, (key0 + keys + 3) >> 2, dtype=u8)
    words = m.stack(_philox(key, blocks, c1, c2, sample & u8(0xFFFFFFFF)), -1)
    words = words.reshape(*words.shape[:3], 4 * blocks.size)[..., key0 & 3 :][..., :keys]
    return (words >= u8(threshold)) / (1 - threshold / 2**32)


def attention(
    q: Array, k: Array, v: Array, scale: float, causal: bool, key: int, first: int, threshold: int,
    head: int, row0: int, key0: int, out: Array, lse: Array,
) -> None:  # fmt: skip
    """out = dropout(softmax(scale q k^T)) v over (B, H, T, D); lse (B, H, T) = log sum exp.

    head, row0, key0: in the mask, the numbers of the first head, query and key.
    """
    p, lse[...] = _probabilities(q, k, scale, causal, None)
    mask = _attention_mask(q, k.shape[2], key, first, threshold, head, row0, key0)
    out[...] = (p * mask) @ v


def join_attention(out: Array, lse: Array, other: Array, total: Array) -> None:
    """Make of attention to some keys (out, lse) that to these and others (other, total)."""
    both = xp(lse).logaddexp(lse, total)
    first, second = (xp(lse).exp(part - both)[..., None] for part in (lse, total))
    out[...], lse[...] = out * first + other * second, both


def attention_backward(
    q: Array, k: Array, v: Array, out: Array, lse: Array, g: Array, scale: float, causal: bool,
    key: int, first: int, threshold: int, head: int, row0: int, key0: int, more: bool,
    dq: Array, dk: Array, dv: Array,
) -> None:  # fmt: skip
    """Gradients of `attention` with respect to q, k, v for the output's gradient g (B, H, T, D).

    more: add them to what dq, dk and dv hold.
    """
    p, _ = _probabilities(q, k, scale, causal, lse)
    mask = _attention_mask(q, k.shape[2], key, first, threshold, head, row0, key0)
    delta = (g * out).sum(-1, keepdims=True)
    ds = p * ((g @ v.swapaxes(-1, -2)) * mask - delta) * scale
    gradients = ds @ k, ds.swapaxes(-1, -2) @ q, (p * mask).swapaxes(-1, -2) @ g
    for target, gradient in zip((dq, dk, dv), gradients, strict=True):
        target[...] = target + gradient if more else gradient
