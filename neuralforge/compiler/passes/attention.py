"""Attention written out in products, masks and a softmax: flash attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ...graph.ir import Equation, Value
from ...kernels import attention as kernel
from .dataflow import Dataflow
from .patterns import Match
from .views import Dims, Run, arrange, compose, inverse, natural, regroup, size, viewed

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.baddbmm.default}
HIDDEN = -1e4
"""A score replaced by this or less has a weight of 0, unless all of its row are."""


def attention(flow: Dataflow) -> Iterator[Match]:
    """softmax(scale q k^T + mask) v, in any of the ways it is written: by `@`, `einsum`, `bmm` or `baddbmm`; scaled by
    multiplication or division; masked by `masked_fill`, `where` or addition, before scaling or after; the softmax in a
    wider dtype; heads of keys repeated for groups of queries."""
    for eq in flow.graph.equations:
        if eq.op is aten._softmax.default and eq.args[1] in (-1, eq.outputs.fake.dim() - 1):
            for product, dims in _weighted(flow, eq.outputs, natural(eq.outputs.shape)):
                for operands_scaled in (True, False):  # the second if others read what the first leaves out
                    found = _match(flow, eq, product, dims, operands_scaled)
                    if found is not None:
                        yield found
                    if found is None or not operands_scaled or not found.key[-1]:
                        break


@dataclass
class Scores:
    """From the softmax up to the product: `dims` tells where its places are in the product's result."""

    product: Equation
    dims: Dims
    scale: float = 1.0
    masks: list[tuple[Any, Any, float, tuple[int, ...]]] = field(default_factory=list)
    """(condition, fill, factor, shape) where scores of that shape are replaced by `fill`, or (addend, None, factor, shape); both
    times the factor."""


def _scores(flow: Dataflow, v: Any, dims: Dims | None, scale: float = 1.0) -> Scores | None:
    """The scores `v`, of which `dims` is a view and which are multiplied by `scale` further down."""
    eq = flow.producers.get(v) if isinstance(v, Value) else None
    if eq is None or dims is None:
        return None
    up = lambda x, factor=1.0: _scores(flow, x, dims, scale * factor)
    through = viewed(eq)
    if through is not None:
        return _scores(flow, eq.args[0], compose(dims, through, v.shape), scale)
    if eq.op in PRODUCTS:
        found = Scores(eq, dims, scale)
        if eq.op is aten.baddbmm.default:
            found.masks.append((eq.args[0], None, scale * eq.kwargs.get("beta", 1), tuple(v.shape)))
            found.scale *= eq.kwargs.get("alpha", 1)
        return found if _whole(dims, v) or not found.masks else None
    if eq.op is aten._to_copy.default:
        return up(eq.args[0]) if v.dtype.is_floating_point and eq.args[0].dtype.is_floating_point else None
    scaled = _scaled(flow, eq)
    if scaled is not None:
        return up(*scaled)
    if eq.op in (aten.mul.Tensor, aten.div.Tensor):
        return None
    for x, mask, fill in _masks(eq):
        found = up(x) if isinstance(x, Value) and x.shape == v.shape and _whole(dims, v) else None
        if found is not None:
            found.masks.append((mask, fill, scale, tuple(v.shape)))
            return found
    return None


def _scaled(flow: Dataflow, eq: Equation) -> tuple[Value, float] | None:
    """What is multiplied by a number, and by which."""
    for x, factor in (eq.args, eq.args[::-1]) if eq.op in (aten.mul.Tensor, aten.div.Tensor) else ():
        number = factor
        if isinstance(factor, Value):
            number = flow.literal(factor) if factor.fake.numel() == 1 else None
        if number is not None and isinstance(x, Value) and (eq.op is aten.mul.Tensor or factor is eq.args[1]):
            number = float(number)
            return x, number if eq.op is aten.mul.Tensor else 1 / number if number else math.nan
    return None


def _masks(eq: Equation) -> list[tuple[Any, Any, Any]]:
    """Scores, mask (or (mask, True): its negation), and what replaces them where it is true (None: it is added)."""
    if eq.op in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return [eq.args]
    if eq.op is aten.where.self:
        condition, x, y = eq.args
        return [(x, (condition, True), y), (y, condition, x)]
    if eq.op is aten.add.Tensor and not eq.kwargs:
        x, y = eq.args
        return [(x, y, None), (y, x, None)] if isinstance(y, Value) else []
    return []


def _whole(dims: Dims, v: Value) -> bool:
    """Do `dims` show `v`, of shape [..., T, S], with other leading dimensions at most?"""
    last = tuple(v.shape)[-2:]
    return len(dims) >= 2 and regroup(dims, (-(-v.fake.numel() // math.prod(last)), *last)) == regroup(
        natural(v.shape), (-(-v.fake.numel() // math.prod(last)), *last)
    )


def _weighted(flow: Dataflow, v: Value, dims: Dims | None) -> Iterator[tuple[Equation, Dims]]:
    """The products whose left operand is a view `dims` of the weights, reached through `v`."""
    for eq in flow.users.get(v, ()):
        through = viewed(eq)
        if through is not None:
            yield from _weighted(flow, eq.outputs, compose(through, dims, v.shape))
        elif eq.op is aten._to_copy.default and eq.outputs.dtype.is_floating_point:
            yield from _weighted(flow, eq.outputs, dims)
        elif eq.op in (aten.mm.default, aten.bmm.default) and eq.args[0] is v and dims is not None:
            yield eq, dims


def _batched(dims: Dims) -> Dims:
    """An operand of mm as one of bmm."""
    return dims if len(dims) == 3 else ((), *dims)


def _match(flow: Dataflow, softmax: Equation, weighted: Equation, p_dims: Dims, unscale: bool) -> Match | None:
    """`unscale`: queries and keys are taken before they were multiplied by a number, which is part of the scale then."""
    p = softmax.outputs
    last = len(p.shape) - 1
    scores = _scores(flow, softmax.args[0], natural(p.shape))
    if scores is None or last < 1:
        return None
    # The weights [..., T, S] in terms of the products [N, M, S] and [N, M, K].
    left, right = scores.product.args[-2:]
    shape = (1, *scores.product.outputs.shape)[-3:]
    where = tuple(tuple(run._replace(axis=run.axis + 3 - left.fake.dim()) for run in dim) for dim in scores.dims)
    back = inverse(_batched(p_dims), p.shape)
    S, T = p.shape[last], p.shape[last - 1]
    if back is None or where[last] != natural(shape)[2] or back[last] != natural((1, 1, S))[2]:
        return None
    if any(run.axis != 1 for run in where[last - 1]) or any(run.axis != 1 for run in back[last - 1]):
        return None

    def of(v: Value, reader: Equation, places: Dims, inner: int) -> tuple[Value, Dims | None]:
        """An operand by the weights' batch dimensions, `places` in it, then T or S and K."""
        root, dims = flow.root(v, reader)
        shape = (1, *v.shape)[-3:]
        axes = (*(d for d in places), natural(shape)[inner])
        return root, compose(axes, _batched(dims), shape)

    def before(v: Value, dims: Dims | None) -> tuple[Value, Dims | None, float]:
        """What an operand was before it was multiplied by a number, and by which."""
        maker = flow.producers.get(v)
        scaled = _scaled(flow, maker) if unscale and maker is not None and v not in flow.results else None
        if scaled is None or scaled[0].shape != v.shape or scaled[0].dtype != v.dtype:
            return v, dims, 1.0
        root, inner = flow.root(scaled[0], maker)
        return root, compose(dims, inner, v.shape), scaled[1]

    repeated = tuple(tuple(run if run.axis == 0 else Run(None, run.size, 0) for run in dim) for dim in where[: last - 1])
    back_repeated = tuple(tuple(run if run.axis == 0 else Run(None, run.size, 0) for run in dim) for dim in back[: last - 1])
    keys, values = (1, *right.shape)[-3:], (1, *weighted.args[1].shape)[-3:]
    q, q_dims = of(left, scores.product, where[:last], 2)
    k, k_dims = of(right, scores.product, (*repeated, natural(keys)[2]), 1)
    v, v_dims = of(weighted.args[1], weighted, (*back_repeated, natural(values)[1]), 2)
    if None in (q_dims, k_dims, v_dims) or size(k_dims[-1]) != size(v_dims[-1]):
        return None
    q, q_dims, q_scale = before(q, q_dims)
    k, k_dims, k_scale = before(k, k_dims)
    scale = scores.scale * q_scale * k_scale
    if q_dims is None or k_dims is None or not scale > 0 or not math.isfinite(scale):
        return None
    heads = _heads(p.shape[: last - 1], q_dims, k_dims, v_dims)
    if heads is None:
        return None
    B, H, r = heads
    K = size(q_dims[-1])
    q4 = regroup(q_dims, (B, H, T, K))
    k4, v4 = (_grouped(d, B, H, r, S, K) for d in (k_dims, v_dims))
    # The result: its view in terms of the weights' dimensions and K, those in terms of [B, H, T, K].
    out, out_dims = flow.last_view(weighted.outputs)
    flat = regroup(natural((B, H, T, K)), (*p.shape[:last], K))
    flat_p = (*flat[:last], (), flat[last])
    product_shape = (1, *weighted.outputs.shape)[-3:]
    w = _batched(p_dims)
    rows = compose((w[0], w[1]), flat_p[: last + 1], p.shape)
    if rows is None or q4 is None or k4 is None or v4 is None:
        return None
    y_dims = compose(
        tuple(tuple(run._replace(axis=run.axis + 3 - weighted.outputs.fake.dim()) for run in dim) for dim in out_dims),
        (*rows, flat[last]),
        product_shape,
    )
    if y_dims is None:
        return None
    masks = _Masks.of(flow, scores.masks, p.shape, B, H)
    with q.fake.fake_mode:
        fakes = [v.fake.new_empty((B, h, t, K)) for v, h, t in ((q, H, T), (k, H // r, S), (v, H // r, S))]
    if masks is None or not kernel.native(*fakes):
        return None

    def replacement(env: dict[Value, torch.Tensor]) -> list[torch.Tensor]:
        query = arrange(env[q], q4)
        query, options = masks.apply(query, env)
        results = kernel.flash_attention(query, arrange(env[k], k4), arrange(env[v], v4), scale=scale, **options)
        return [arrange(results[0], y_dims)]

    equations = flow.between([out], {q, k, v, *masks.read})
    reason = f"{B} x {H} heads{f' in groups of {r}' if r > 1 else ''}, {T} x {S} weights of width {K}, {masks.reason}"
    return Match(equations, [out], replacement, reason, (B, H, r, scale, masks.key, (q_scale, k_scale) != (1.0, 1.0)))


def _heads(batch: tuple[int, ...], q: Dims, k: Dims, v: Dims) -> tuple[int, int, int] | None:
    """Batch, heads of queries, and how many of them share a head of keys, which come last among the leading
    dimensions. Other repetitions are expanded."""
    count = math.prod(batch)

    def group(dims: Dims) -> int:
        r = 1
        for run in reversed([run for dim in dims[:-2] for run in dim]):
            if run.axis is not None:
                break
            r *= run.size
        return r

    r = math.gcd(group(k), group(v))
    runs = [run.size for dim in q[:-2] for run in dim]
    B = batch[0] if len(batch) > 1 else count // r
    if len(batch) == 1 and len(runs) > 1 and count // runs[0] % r == 0:
        B = runs[0]  # one dimension made of two
    H = count // B
    if H % r:
        r = math.gcd(H, r)
    return B, H, r


def _grouped(dims: Dims, B: int, H: int, r: int, S: int, K: int) -> Dims | None:
    """Keys or values as [B, H / r, S, K]."""
    split = regroup(dims, (B, H // r, r, S, K))
    return None if split is None else (split[0], split[1], *split[3:])


class _Masks:
    """What a softmax's masks come to for flash attention."""

    def __init__(self, masks: list, shape: tuple[int, ...], B: int, H: int):
        self.masks, self.shape, self.B, self.H = masks, shape, B, H
        self.read = {value for (value, _), *_ in masks}
        self.fixed: dict[str, Any] | None = None if masks else {}
        self.reason = "no mask" if not masks else "a mask"

    @staticmethod
    def of(flow: Dataflow, masks: list, shape: tuple[int, ...], B: int, H: int) -> _Masks | None:
        """None where flash attention has nothing like them."""
        read = []
        for mask, fill, scale, scores in masks:
            value, negated = mask if isinstance(mask, tuple) else (mask, False)
            if not isinstance(value, Value):
                return None
            if fill is not None:
                number = flow.literal(fill)
                if number is None or number.numel() != 1 or not float(number) * scale <= HIDDEN:
                    return None
                fill = float(number) * scale
            elif not value.dtype.is_floating_point and value.dtype != torch.bool:
                return None
            while (eq := flow.producer(value, aten.expand)) is not None:
                value = eq.args[0]
            read.append(((value, negated), fill, scale, scores))
        found = _Masks(read, shape, B, H)
        literal = [flow.literal(v) for v in found.read]
        if masks and all(x is not None for x in literal):
            found._recognise(dict(zip(found.read, literal)))
        return found

    @property
    def key(self) -> Any:
        return repr((self.fixed, [(fill, scale, negated, scores) for (_, negated), fill, scale, scores in self.masks]))

    def _recognise(self, env: dict[Value, torch.Tensor]) -> None:
        """Causal masks and windows that are known beforehand."""
        bias, _ = self._bias(env)
        if not bool((bias == bias[:1, :1]).all()):
            return
        bias = bias[0, 0].expand(self.shape[-2:])
        visible = bias > HIDDEN
        if not bool((bias[visible] == 0).all()) or not bool(visible.any(-1).all()):
            return
        T, S = visible.shape
        ahead = torch.arange(S) - torch.arange(T).unsqueeze(1)
        window = int(visible[-1].sum()) if T <= S else 0
        if torch.equal(visible, ahead <= 0):
            self.fixed, self.reason = {"is_causal": True}, "causal"
        elif window and torch.equal(visible, (ahead <= 0) & (ahead > -window)):
            self.fixed, self.reason = {"is_causal": True, "window": window}, f"causal in a window of {window}"
        elif bool(visible.all()):
            self.fixed, self.reason = {}, "no mask"

    def _bias(self, env: dict[Value, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All masks, one after the other, as one that is added to the scores, broadcast to [B, H, T, S]; and where it stands in
        the place of scores."""
        total: Any = None
        filled: Any = None
        for (value, negated), fill, scale, scores in self.masks:
            m = env[value]
            m = m.view((1,) * (len(scores) - m.dim()) + tuple(m.shape))
            if math.prod(m.shape[:-2]) == 1:
                m = m.view(1, 1, *m.shape[-2:])
            elif scores[:-2] != (self.B, self.H):
                m = m.expand(*scores[:-2], *m.shape[-2:]).reshape(self.B, self.H, *m.shape[-2:])
            if fill is None:
                m = m.float() * scale if scale != 1 else m.float()
                total = m if total is None else total + m
                continue
            hidden = ~m.bool() if negated else m.bool()
            filled = hidden if filled is None else filled | hidden
            total = torch.zeros(m.shape, device=m.device).masked_fill(hidden, fill) if total is None else torch.where(hidden, fill, total)
        return total, filled

    def apply(self, q: torch.Tensor, env: dict[Value, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
        """The queries and flash attention's options. Where a query sees nothing, a softmax over -inf gives NaN, and
        one over large negative numbers put in the scores' place the mean, without a gradient for the query: NaN and
        zero in the query's place do the same."""
        if self.fixed is not None:
            return q, self.fixed
        bias, filled = self._bias(env)
        top = bias.amax(-1, keepdim=True)
        never, nothing = top == -math.inf, top <= HIDDEN
        q = q.masked_fill(never, math.nan)
        if any(fill is not None and fill > -math.inf for _, fill, *_ in self.masks):
            mean = nothing & ~never
            if any(fill is None for _, fill, *_ in self.masks):  # else what isn't filled is 0
                mean = mean & (filled & (bias == top)).any(-1, keepdim=True)
            q = q.masked_fill(mean, 0.0)
        return q, {"mask": bias - top.masked_fill(never | ~nothing, 0.0)}  # beside large numbers scores would be lost
