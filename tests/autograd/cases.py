"""For every primitive the functions and inputs at which its adjoints are checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hpcml import rng
from hpcml.autograd import Primitive, Tensor
from hpcml.autograd.ops import (
    attention,
    extremes,
    fused,
    images,
    linear,
    norm,
    pointwise,
    pooling,
    shape,
)
from hpcml.nn import module
from tests.autograd.support import Array, normal

Case = tuple[Callable[..., Tensor], list[Array]]


def positive(*sizes: int, salt: int = 0) -> Array:
    return np.asarray(np.abs(normal(*sizes, salt=salt)) + 0.5)


BROADCAST = [
    ((2, 3), (2, 3)),
    ((2, 3), (3,)),
    ((2, 1), (1, 3)),
    ((), (2, 3)),
    ((), ()),
    ((4, 1, 3), (2, 1)),
    ((0, 3), (3,)),
    ((1,), (1, 1)),
    ((2, 0), (2, 1)),
]
SHAPES: list[tuple[int, ...]] = [(2, 3), (), (1,), (0, 3), (2, 3, 4)]


def both(function: Callable[..., Tensor], make: Callable[..., Array] = normal) -> list[Case]:
    """Two inputs of shapes that broadcast; different numbers in both."""
    return [(function, [make(*a), make(*b, salt=1)]) for a, b in BROADCAST]


def one(function: Callable[..., Tensor], make: Callable[..., Array] = normal) -> list[Case]:
    return [(function, [make(*s)]) for s in SHAPES]


def keyed(function: Primitive, *sizes: tuple[int, ...], **attributes: Any) -> Case:
    return (lambda *x: function(*x, **attributes)), [
        normal(*s, salt=i) for i, s in enumerate(sizes)
    ]


def seeded(function: Primitive, *sizes: tuple[int, ...], **attributes: Any) -> Case:
    """As `keyed`, with the same random mask in every evaluation."""

    def evaluate(*x: Tensor) -> Tensor:
        with rng.samples(3, 0):
            return function(*x, name="mask", **attributes)

    return evaluate, [normal(*s, salt=i) for i, s in enumerate(sizes)]


def plan(dims: int, **given: Any) -> dict[str, Any]:
    """Options of a convolution, the simplest ones where none are given."""
    ones, none = (1,) * dims, ((0, 0),) * dims
    return {"stride": ones, "padding": none, "dilation": ones, "groups": 1} | given


def convolving(image: tuple[int, ...], filters: tuple[int, ...], **given: Any) -> Case:
    how = plan(len(image) - 2, **given)
    return keyed(images.convolution, image, filters, filters[:1], **how)


def transposing(
    image: tuple[int, ...], filters: tuple[int, ...], sizes: tuple[int, ...], **given: Any
) -> Case:
    how = {"dilation": (1,) * len(sizes), "groups": 1} | given
    shapes = image, filters, (filters[1] * how["groups"],)
    return keyed(images.transposed_convolution, *shapes, sizes=sizes, **how)


BAND = pooling.Band.of([(0, [1.0]), (0, [0.5, -2.0]), (1, [1.0, 2.0, 3.0]), (3, [2.0]), (3, [1.0])])
ESTIMATES = normal(3, salt=5), np.abs(normal(3, salt=6)) + 0.5
CHOICE = np.array([[True, False, True], [False, True, True]])
TABLE: dict[Primitive, list[Case]] = {
    pointwise.add: both(pointwise.add),
    pointwise.sub: both(pointwise.sub),
    pointwise.mul: [*both(pointwise.mul), (lambda a: pointwise.mul(a, 2.5), [normal(2, 3)])],
    pointwise.div: [*both(pointwise.div, positive), (lambda a: 2 / a, [positive(3)])],
    pointwise.power: [
        *both(pointwise.power, positive),
        (lambda a: a**3, [normal(2, 3)]),
        (lambda a: 2.0**a, [normal(2, 3)]),
        (lambda a: a**0, [normal(3)]),
    ],
    extremes.maximum: both(extremes.maximum),
    extremes.minimum: both(extremes.minimum),
    pointwise.neg: one(pointwise.neg),
    pointwise.exp: one(pointwise.exp),
    pointwise.log: one(pointwise.log, positive),
    pointwise.sqrt: one(pointwise.sqrt, positive),
    pointwise.absolute: one(pointwise.absolute),
    pointwise.tanh: one(pointwise.tanh),
    pointwise.sigmoid: one(pointwise.sigmoid),
    pointwise.relu: one(pointwise.relu),
    pointwise.cast: [keyed(pointwise.cast, (2, 3), dtype=np.float64)],
    pointwise.where: [
        keyed(pointwise.where, (2, 3), (2, 3), condition=CHOICE),
        keyed(pointwise.where, (3,), (2, 1), condition=CHOICE),
        keyed(pointwise.where, (), (1, 1), condition=CHOICE),
        keyed(pointwise.where, (0,), (0,), condition=CHOICE[0, :0]),
    ],
    fused.gelu: [
        *one(fused.gelu),
        *[keyed(fused.gelu, s, approximate="tanh") for s in SHAPES],
    ],
    fused.softmax: [
        keyed(fused.softmax, s, dim=d)
        for s, d in [((2, 3), -1), ((2, 3), 0), ((1,), 0), ((0, 3), 1), ((3, 0), 1), ((2, 3, 4), 1)]
    ],
    fused.log_softmax: [
        keyed(fused.log_softmax, s, dim=d)
        for s, d in [((2, 3), -1), ((2, 3), 0), ((1,), 0), ((0, 3), 1), ((3, 0), 1), ((2, 3, 4), 1)]
    ],
    norm.layer_norm: [
        keyed(norm.layer_norm, (4, 5), (5,), (5,), size=5, eps=1e-5),
        keyed(norm.layer_norm, (2, 3, 4), (3, 4), (3, 4), size=12, eps=1e-2),
        keyed(norm.layer_norm, (5,), (5,), (5,), size=5, eps=1e-5),
        keyed(norm.layer_norm, (0, 5), (5,), (5,), size=5, eps=1e-5),
        (lambda x: norm.layer_norm(x, None, None, size=6, eps=1e-5), [normal(3, 6)]),
        (lambda x, w: norm.layer_norm(x, w, None, size=6, eps=1e-5), [normal(3, 6), normal(6)]),
        (lambda x, b: norm.layer_norm(x, None, b, size=6, eps=1e-5), [normal(3, 6), normal(6)]),
    ],
    fused.cross_entropy: [
        (
            lambda x, r=r, t=t: fused.cross_entropy(x, np.array(t), ignore_index=2, reduction=r),
            [normal(len(t), 5)],
        )
        for r in ("mean", "sum", "none")
        for t in ([0, 4, 4], [1, 2, 3], [2], [3])
    ],
    fused.embedding: [
        (lambda w, i=i: fused.embedding(w, np.array(i, np.int32)), [normal(5, 3)])
        for i in ([[0, 4], [4, 4]], [2], 3, [[]])
    ],
    fused.dropout: [
        *[seeded(fused.dropout, s, p=0.4) for s in SHAPES],
        seeded(fused.dropout, (2, 3, 4), p=0.4, part=([(1, 3), (7, 1)], 11)),
    ],
    attention.packed_attention: [
        keyed(attention.packed_attention, (2, 5, 12), heads=2, causal=True),
        keyed(attention.packed_attention, (1, 1, 3), heads=1, causal=False),
        keyed(attention.packed_attention, (0, 4, 6), heads=2, causal=True),
        seeded(attention.packed_attention, (2, 70, 6), heads=1, causal=True, p=0.3),
        seeded(attention.packed_attention, (1, 5, 12), heads=2, causal=False, p=0.3, head=3),
    ],
    attention.attention: [
        keyed(attention.attention, (2, 2, 5, 3), (2, 2, 7, 3), (2, 2, 7, 3), causal=False),
        keyed(attention.attention, (1, 2, 5, 3), (1, 2, 3, 3), (1, 2, 3, 3), causal=True),
        keyed(
            attention.attention, (1, 1, 3, 2), (1, 1, 5, 2), (1, 1, 5, 2), causal=True, scale=0.3
        ),
        keyed(attention.attention, (1, 1, 0, 2), (1, 1, 5, 2), (1, 1, 5, 2)),
        seeded(attention.attention, (2, 1, 4, 2), (2, 1, 4, 2), (2, 1, 4, 2), p=0.4),
    ],
    linear.linear: [
        keyed(linear.linear, (4, 3), (5, 3), (5,)),
        keyed(linear.linear, (2, 1, 3), (5, 3), (5,)),
        keyed(linear.linear, (3,), (1, 3), (1,)),
        keyed(linear.linear, (0, 3), (5, 3), (5,)),
        (lambda x, w: linear.linear(x, w, None), [normal(4, 3), normal(2, 3)]),
    ],
    linear.matmul: [
        keyed(linear.matmul, a, b)
        for a, b in [
            ((2, 3), (3, 4)),
            ((3,), (3,)),
            ((3,), (3, 4)),
            ((2, 3), (3,)),
            ((5, 2, 3), (3, 4)),
            ((5, 1, 2, 3), (4, 3, 2)),
            ((3,), (5, 3, 4)),
            ((5, 2, 3), (3,)),
            ((0, 3), (3, 4)),
            ((2, 0), (0, 4)),
            ((1, 1), (1, 1)),
            ((0, 2, 3), (3, 1)),
        ]
    ],
    shape.sum: [
        keyed(shape.sum, s, dim=d, keepdim=k)
        for s, d in [((2, 3, 4), None), ((2, 3, 4), (0, -1)), ((2, 3), 1), ((), None), ((0, 3), 0)]
        for k in (True, False)
    ],
    shape.mean: [
        keyed(shape.mean, s, dim=d, keepdim=k)
        for s, d in [
            ((2, 3, 4), None),
            ((2, 3, 4), (0, -1)),
            ((2, 3), [1]),
            ((), None),
            ((0, 3), 1),
        ]
        for k in (True, False)
    ],
    **{
        extreme: [
            keyed(extreme, s, dim=d, keepdim=k)
            for s, d in [
                ((2, 3, 4), None),
                ((2, 3, 4), (0, -1)),
                ((2, 3), 1),
                ((), None),
                ((0, 3), 1),
            ]
            for k in (True, False)
        ]
        for extreme in (extremes.amax, extremes.amin)
    },
    shape.reshape: [
        keyed(shape.reshape, s, shape=t)
        for s, t in [((2, 3), (6,)), ((2, 3), (-1, 2)), ((), (1, 1)), ((0, 3), (3, 0)), ((1,), ())]
    ],
    shape.permute: [
        keyed(shape.permute, s, dims=d)
        for s, d in [((2, 3, 4), (2, 0, 1)), ((2, 3), (-1, 0)), ((), ()), ((0, 3), (1, 0))]
    ],
    shape.expand: [
        keyed(shape.expand, s, shape=t)
        for s, t in [
            ((3,), (2, 3)),
            ((2, 1), (-1, 4)),
            ((), (2, 2)),
            ((1,), (0,)),
            ((1, 1), (1, 1)),
        ]
    ],
    shape.getitem: [
        keyed(shape.getitem, (4, 3), index=i)
        for i in [
            1,
            (slice(1, 3), 2),
            (..., None),
            slice(None, None, -2),
            np.array([0, 0, 3]),
            slice(0),
            (np.array([1, 1]), np.array([2, 2])),
            np.eye(4, 3) > 0,
            np.array([], int),
            (3, 2),
            np.array(2),
        ]
    ],
    shape.pad: [
        keyed(shape.pad, (2, 3), widths=((1, 0), (0, 2)), value=3.0),
        keyed(shape.pad, (0, 3), widths=((1, 1), (0, 0))),
        *[
            keyed(shape.pad, (2, 4, 3), widths=((0, 0), (3, 1), (1, 2)), mode=mode)
            for mode in ("reflect", "replicate", "circular")
        ],
    ],
    images.convolution: [
        convolving((2, 3, 7), (4, 3, 3), stride=(2,), padding=((1, 1),)),
        convolving((2, 4, 7, 6), (6, 2, 3, 2), padding=((1, 0), (2, 1)), groups=2),
        convolving((1, 3, 9, 8), (2, 3, 3, 3), stride=(2, 3), dilation=(2, 1)),
        convolving((2, 20, 5, 5), (18, 20, 1, 1), stride=(2, 2)),
        convolving((1, 2, 5, 4, 6), (3, 2, 2, 3, 3), stride=(1, 2, 1), padding=((0, 1),) * 3),
        convolving((0, 3, 5, 5), (4, 3, 3, 3)),
        (
            lambda x, w: images.convolution(x, w, None, **plan(2)),
            [normal(2, 3, 5, 5), normal(4, 3, 3, 3)],
        ),
    ],
    images.transposed_convolution: [
        transposing((2, 3, 5), (3, 4, 3), (12,), stride=(2,), before=(0,)),
        transposing((2, 4, 3, 5), (4, 2, 3, 2), (6, 6), stride=(2, 1), before=(1, 0), groups=2),
        transposing((1, 2, 2, 3, 2), (2, 3, 2, 2, 2), (4, 6, 4), stride=(2,) * 3, before=(0,) * 3),
        transposing((0, 2, 3), (2, 3, 2), (4,), stride=(1,), before=(0,)),
    ],
    pooling.max_pool: [
        keyed(
            pooling.max_pool,
            (2, 3, 7),
            sizes=(3,),
            kernel=(3,),
            stride=(2,),
            before=(0,),
            dilation=(1,),
        ),
        keyed(
            pooling.max_pool,
            (2, 2, 6, 7),
            sizes=(3, 4),
            kernel=(3, 3),
            stride=(2, 2),
            before=(1, 1),
            dilation=(1, 1),
        ),
        keyed(
            pooling.max_pool,
            (1, 2, 4, 5, 6),
            sizes=(2, 3, 2),
            kernel=(2, 2, 3),
            stride=(2, 1, 1),
            before=(0, 0, 0),
            dilation=(1, 2, 2),
        ),
        keyed(
            pooling.max_pool,
            (0, 2, 4),
            sizes=(2,),
            kernel=(2,),
            stride=(2,),
            before=(0,),
            dilation=(1,),
        ),
    ],
    pooling.resample: [
        keyed(pooling.resample, (2, 3, 4), bands=(BAND,)),
        keyed(pooling.resample, (2, 2, 4, 3), bands=(BAND, None)),
        keyed(pooling.resample, (1, 2, 4, 2, 4), bands=(BAND, None, BAND)),
        keyed(pooling.resample, (0, 2, 4), bands=(BAND,)),
        keyed(pooling.resample, (1, 2, 4), bands=(None,)),
    ],
    norm.batch_norm: [
        *[
            keyed(
                norm.batch_norm, s, (3,), (3,), running=None, training=True, momentum=0.1, eps=1e-2
            )
            for s in [(5, 3), (2, 3, 4), (2, 3, 2, 3), (1, 3, 2, 2, 2), (0, 3, 2)]
        ],
        keyed(
            norm.batch_norm,
            (2, 3, 4),
            (3,),
            (3,),
            running=ESTIMATES,
            training=False,
            momentum=0.1,
            eps=1e-2,
        ),
        (
            lambda x: norm.batch_norm(
                x, None, None, running=None, training=True, momentum=0.1, eps=1e-2
            ),
            [normal(4, 3)],
        ),
    ],
    module.boundary: [keyed(module.boundary, (2, 3), on_gradient=lambda g: None)],
}
