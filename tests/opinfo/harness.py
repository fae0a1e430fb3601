"""Derivatives checked against torch.autograd over PyTorch's own operator database (`op_db`).

It mirrors PyTorch's test/test_ops_gradients.py: every operator variant that torch differentiates, all its sample
inputs, float64 and complex128. The checks:

- reverse: `nf.vjp` gives the operator's result and, with random cotangents, equals `torch.autograd.grad`;
- second: the vjp of that vjp, in the inputs and the cotangents, equals torch's double backward;
- forward: `nf.jvp` equals `torch.autograd.forward_ad`, or the reverse derivative (by an inner product) where torch has
  no forward mode or its two modes disagree;
- mixed: the jvp of the vjp (a Hessian-vector product), and the vjp of the jvp, agree with torch's double backward, by an
  inner product;
- captured: the captured vjp, interpreted, equals the eager one (on the first samples);
- in place: the operator's in-place variant, on a copy of its input, passes the check "reverse".

A wrong number is a failure, and so is any exception but ours. Where torch and ours differ, central differences in
float64 say who is wrong; where torch gives NaN its number isn't known. An operator that raises DifferentiationError or
CaptureError is unsupported.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.autograd.forward_ad as fwAD
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from neuralforge.autograd import jvp, vjp
from neuralforge.errors import CaptureError, DifferentiationError
from neuralforge.graph import capture

CHECKS = ("reverse", "second", "forward", "mixed", "captured", "in place")
CAPTURED_SAMPLES = 3

Tensors = list[torch.Tensor]


@dataclass
class Result:
    """What became of one operator variant: for each check "pass", "fail" (wrong number, or a crash), "unsupported"
    (it raises our error) or "skip" (torch has no such derivative), and why."""

    variant: str
    status: dict[str, str] = field(default_factory=lambda: dict.fromkeys(CHECKS, "skip"))
    reasons: list[str] = field(default_factory=list)
    samples: int = 0

    def note(self, check: str, status: str, reason: str = "") -> None:
        rank = ("skip", "pass", "unsupported", "fail")
        if rank.index(status) > rank.index(self.status[check]):
            self.status[check] = status
            if reason:
                self.reasons.append(f"{check}: {reason}")

    def remark(self, text: str) -> None:
        if text not in self.reasons:
            self.reasons.append(text)


def variants() -> list:
    """The entries of op_db that torch differentiates."""
    from torch.testing._internal.common_methods_invocations import op_db

    return [op for op in op_db if op.supports_autograd and dtypes(op)]


def dtypes(op) -> list[torch.dtype]:
    supported = op.supported_backward_dtypes(torch.device("cpu"))
    wide = [d for d in (torch.float64, torch.complex128) if d in supported]
    return wide or [d for d in (torch.float32,) if d in supported]


def check(op, max_samples: int | None = None) -> Result:
    """Run the four checks on one variant; `max_samples` for each dtype spreads over the database's list."""
    result = Result(op.full_name if isinstance(op.full_name, str) else op.formatted_name)
    for dtype in dtypes(op):
        for number, (f, leaves) in enumerate(_cases(op, dtype, max_samples)):
            _check_sample(op, f, leaves, result, captured=number < CAPTURED_SAMPLES)
            result.samples += 1
        in_place = op.get_inplace()
        if in_place is not None and op.supports_inplace_autograd:
            for f, leaves in _cases(op, dtype, max_samples, partial(_on_a_copy, in_place)):
                _check_in_place(f, leaves, result)
    return result


def _on_a_copy(in_place: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return in_place(x.clone(), *args, **kwargs)


def _cases(
    op, dtype: torch.dtype, max_samples: int | None, in_place: Callable | None = None
) -> Iterator[tuple[Callable, Tensors]]:
    torch.manual_seed(0)
    samples = list(op.sample_inputs("cpu", dtype, requires_grad=True))
    if max_samples is not None and len(samples) > max_samples:
        samples = [samples[i * len(samples) // max_samples] for i in range(max_samples)]
    for sample in samples:
        flat, tree = tree_flatten((sample.input, tuple(sample.args), dict(sample.kwargs)))
        at = [i for i, x in enumerate(flat) if isinstance(x, torch.Tensor) and x.requires_grad]
        if at and not (in_place and sample.broadcasts_input):
            yield _function(op, in_place or op.op, sample, flat, tree, at), [flat[i].detach() for i in at]


def _function(op, variant: Callable, sample, flat: list, tree, at: list[int]) -> Callable[..., Tensors]:
    """The operator as a function of its differentiable leaves; returns its floating-point outputs."""

    def f(*leaves: torch.Tensor) -> Tensors:
        full = [_own(x) for x in flat]
        for i, leaf in zip(at, leaves):
            full[i] = leaf
        first, args, kwargs = tree_unflatten(full, tree)
        torch.manual_seed(0)  # operators that draw random numbers draw the same ones on both sides
        out = sample.output_process_fn_grad(op.gradcheck_wrapper(variant, first, *args, **kwargs))
        return [y for y in tree_leaves(out) if isinstance(y, torch.Tensor) and (y.is_floating_point() or y.is_complex())]

    return f


def _check_sample(op, f: Callable, leaves: Tensors, result: Result, captured: bool) -> None:
    tracked = [x.detach().requires_grad_() for x in leaves]
    try:
        outs = f(*tracked)
    except RuntimeError:
        return  # torch itself refuses this sample
    kept = [i for i, y in enumerate(outs) if y.requires_grad]
    if not kept:
        return
    outs = [outs[i] for i in kept]
    g = lambda *xs: (lambda ys: [ys[i] for i in kept])(f(*xs))
    cotangents = [_random_like(y).requires_grad_() for y in outs]
    plain = [c.detach() for c in cotangents]
    grads, twice_differentiable = _torch_reverse(f, outs, kept, tracked, cotangents, op.supports_gradgrad)
    expected = [_dense(d, x) for d, x in zip(grads, leaves)]

    def gradients(*xs: torch.Tensor) -> Tensors:
        return list(vjp(g, *xs[: len(leaves)])[1](list(xs[len(leaves) :])))

    eager, right = expected, False
    with _judging(result, "reverse"):
        values, pullback = vjp(g, *leaves)
        _compare(values, [y.detach() for y in outs])
        eager = list(pullback(plain))
        _compare_or_measure(eager, expected, g, leaves, plain, result)
        right = True
    if captured:
        with _judging(result, "captured"):
            seeds: list[int] = []  # setting the seed isn't an operator: a graph's caller does it
            with patch("torch.manual_seed", lambda seed: seeds.append(seed)):
                graph = capture(gradients, *leaves, *plain).graph
            torch.manual_seed(seeds[-1])
            _compare(graph(*leaves, *plain), eager)

    directions = [_random_like(x) for x in leaves]
    twice = _torch_second(f, tracked, kept, cotangents, directions, grads) if twice_differentiable else None
    if twice is not None:
        ours: Any = ()
        with _judging(result, "second"):
            ours = vjp(gradients, *leaves, *plain)[1](directions)
            wanted = [_dense(d, x) for d, x in zip(twice, [*leaves, *plain])]
            measurable = gradients if right else None
            _compare_or_measure(list(ours), wanted, measurable, [*leaves, *plain], directions, result)
        with _judging(result, "mixed"):
            if not ours:
                raise DifferentiationError("no second derivative")
            _check_mixed(g, gradients, leaves, plain, directions, list(ours))

    with _judging(result, "forward"):
        tangents = [_random_like(x) for x in leaves]
        values, pushed = jvp(g, tuple(leaves), tuple(tangents))
        _compare(values, [y.detach() for y in outs])
        truth = _torch_forward(g, leaves, tangents) if op.supports_forward_ad else None
        try:
            assert truth is not None
            _compare(list(pushed), truth)
        except AssertionError:
            # Without torch's forward mode (or where it disagrees with torch's reverse mode), by torch's reverse mode.
            product = sum(_inner(c, p) for c, p in zip(plain, pushed))
            eps = max(torch.finfo(y.dtype).eps for y in outs)
            _compare([product], [sum(_inner(d, t) for d, t in zip(expected, tangents))], eps)


def _check_mixed(f: Callable, gradients: Callable, leaves: Tensors, plain: Tensors, v: Tensors, twice: Tensors) -> None:
    """With H the derivative of <c, J v> in the inputs, which is the second-order reverse result: <H, t> by forward mode
    over reverse, and H by reverse over forward mode."""
    n = len(leaves)
    t = [torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(5)) for x in leaves]
    moved = jvp(lambda *xs: gradients(*xs, *plain), tuple(leaves), tuple(t))[1]
    eps = 10 * max(torch.finfo(x.dtype).eps for x in (*leaves, *plain))  # cancelling sums in low precision
    product, expected = (sum(_inner(a, b) for a, b in zip(*pair)) for pair in ((moved, v), (twice[:n], t)))
    whole = sum(_inner(h.abs(), b.abs()) for h, b in zip(twice[:n], t))  # how large the terms are
    _compare([product, whole], [expected, whole], eps)
    if any(x.is_complex() for x in (*leaves, *plain)):
        return  # v is conjugated in one order and not in the other
    back = vjp(lambda *xs: jvp(f, xs, tuple(v))[1], *leaves)[1](plain)
    _compare(list(back), twice[:n], eps)


def _check_in_place(f: Callable, leaves: Tensors, result: Result) -> None:
    tracked = [x.detach().requires_grad_() for x in leaves]
    try:
        outs = f(*tracked)
    except RuntimeError:
        return  # the result doesn't fit into the input
    if not all(y.requires_grad for y in outs):
        return
    plain = [_random_like(y) for y in outs]
    grads = torch.autograd.grad(outs, tracked, plain, allow_unused=True)
    with _judging(result, "in place"):
        values, pullback = vjp(f, *leaves)
        _compare(values, [y.detach() for y in outs])
        _compare_or_measure(
            list(pullback(plain)), [_dense(d, x) for d, x in zip(grads, leaves)], f, leaves, plain, result
        )


def _own(x: object) -> object:
    """A copy of what the operator may write to (running statistics), so that f stays a function."""
    floats = isinstance(x, torch.Tensor) and not x.requires_grad and x.is_floating_point() and x.layout == torch.strided
    return x.clone() if floats else x


def _torch_reverse(
    f: Callable, outs: Tensors, kept: list[int], tracked: Tensors, cotangents: Tensors, twice: bool
) -> tuple[list, bool]:
    """torch's gradients, and whether they can be differentiated again."""
    if twice:
        try:
            return list(torch.autograd.grad(outs, tracked, cotangents, create_graph=True, allow_unused=True)), True
        except RuntimeError:
            outs = (lambda ys: [ys[i] for i in kept])(f(*tracked))
    return list(torch.autograd.grad(outs, tracked, cotangents, allow_unused=True)), False


def _torch_second(
    f: Callable, tracked: Tensors, kept: list[int], cotangents: Tensors, directions: Tensors, grads: list
) -> list | None:
    """torch's derivatives, in inputs and cotangents, of <directions, gradients>; None where torch hasn't got them."""
    for again in (False, True):
        if again:  # fused attention has no second derivative, its plain form has
            with sdpa_kernel(SDPBackend.MATH):
                outs = f(*tracked)
            grads = torch.autograd.grad(
                [outs[i] for i in kept], tracked, cotangents, create_graph=True, allow_unused=True
            )
        followed = [(d, v) for d, v in zip(grads, directions) if d is not None and d.requires_grad]
        if not followed:
            return None
        wrt = [*tracked, *cotangents]
        try:
            return torch.autograd.grad([d for d, _ in followed], wrt, [v for _, v in followed], allow_unused=True)
        except RuntimeError:
            continue
    return None


def _torch_forward(f: Callable, leaves: Tensors, tangents: Tensors) -> Tensors | None:
    """Tangents of the outputs by torch's forward mode; None where torch hasn't got it."""
    try:
        with fwAD.dual_level():
            outs = f(*(fwAD.make_dual(x, t) for x, t in zip(leaves, tangents)))
            return [_dense(fwAD.unpack_dual(y).tangent, y) for y in outs]
    except (NotImplementedError, RuntimeError):
        return None


class _judging:
    """Notes a check as passed, failed or unsupported by the exception that leaves the block."""

    def __init__(self, result: Result, check: str):
        self.result, self.check = result, check

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> bool:
        if error is None:
            self.result.note(self.check, "pass")
        elif isinstance(error, (DifferentiationError, CaptureError)):
            self.result.note(self.check, "unsupported", _first_line(error))
        elif isinstance(error, Exception):
            self.result.note(self.check, "fail", f"{kind.__name__}: {_first_line(error)}")
        return error is None or isinstance(error, Exception)


def _size(x: torch.Tensor) -> float:
    finite = x.detach().abs()[torch.isfinite(x)]
    return finite.max().item() if finite.numel() else 0.0


class WrongNumber(AssertionError):
    pass


def _compare(found: Tensors, expected: Tensors, eps: float = 0.0) -> None:
    assert len(found) == len(expected), f"{len(found)} derivatives for {len(expected)} arguments"
    whole = max(map(_size, expected))  # in low precision, small items come from the cancelling of large ones
    for i, (a, b) in enumerate(zip(found, expected)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise WrongNumber(f"item {i} is {tuple(a.shape)} {a.dtype}, expected {tuple(b.shape)} {b.dtype}")
        precision = max(eps, torch.finfo(a.dtype).eps)
        size = max(_size(b), whole if precision > 1e-10 else 0.0)
        tolerance = max(1e-7, 30 * precision)
        close = torch.isclose(a, b, rtol=tolerance * 10, atol=tolerance * max(size, 1e-3), equal_nan=True)
        if not close.all():
            worst = (a - b).abs()[~close].nan_to_num(float("inf")).max().item()
            raise WrongNumber(f"item {i}: {(~close).sum()} of {a.numel()} wrong by up to {worst:.3g}, size {size:.3g}")


def _compare_or_measure(
    found: Tensors, expected: Tensors, f: Callable | None, at: Tensors, cotangents: Tensors, result: Result
) -> None:
    """Equal to torch's derivatives; or where they differ, right by central differences in random directions when
    torch's are wrong. Where torch's are NaN there is nothing to compare with."""
    known = [torch.where(torch.isnan(b), a.to(b.dtype), b) if a.shape == b.shape else b for a, b in zip(found, expected)]
    if any(torch.isnan(b).any() for b in expected):
        result.remark("torch gives NaN on a sample, where any number of ours passes")
    try:
        _compare(found, known)
    except WrongNumber:
        if f is None:
            raise
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            v = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in at]
            h = 1e-6
            ahead, behind = (f(*(x + s * h * d for x, d in zip(at, v))) for s in (1, -1))
            slope = sum(_inner(c, (a - b) / (2 * h)) for c, a, b in zip(cotangents, ahead, behind))
            ours, theirs = (sum(_inner(d, w) for d, w in zip(ds, v)) for ds in (found, expected))
            tolerance = 1e-6 * max(1.0, slope.abs().item())
            if not (ours - slope).abs() < tolerance or (theirs - slope).abs() < tolerance:
                raise
        result.remark("torch's derivative is wrong on a sample, ours agrees with differences")


def _dense(d: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if d is None else d.detach()


def _random_like(x: torch.Tensor) -> torch.Tensor:
    return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(x.numel()))


def _inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.real(a.conj() * b).sum().to(torch.float64)


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split()).split(" in simpler operators.")[0][:160]


def quiet() -> None:
    """Single-threaded and without the warnings that the database's corner cases give."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
