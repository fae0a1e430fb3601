"""Random programs: the eager tape, the compiled step, torch.autograd and finite differences agree.

A program is a list of instructions on a growing list of tensors. Each picks its operands by number and its operation
by name, among those whose shapes allow it, so that every list of numbers is a program. All is float64.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import neuralforge as nf

# Smooth everywhere, with derivatives near one, so that differences are accurate and nothing overflows.
POINTWISE = {
    "sin": torch.sin, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "gelu": torch.nn.functional.gelu,
    "soft square": lambda x: x * x / (1 + x * x), "root": lambda x: (x * x + 1).sqrt(), "neg": torch.neg,
    "exp": lambda x: (-x * x).exp(), "log": lambda x: (x * x + 1).log(), "atan": torch.atan,
    "twice": lambda x: x * x.tanh() / 2 + x,
}  # fmt: skip
BINARY = {
    "add": lambda a, b: a + b, "sub": lambda a, b: torch.sub(a, b, alpha=0.5), "mul": lambda a, b: a.tanh() * b.tanh(),
    "div": lambda a, b: a / (1.5 + b.cos()), "where": lambda a, b: torch.where(MASK[: a.shape[-1]], a, b),
    "addcmul": lambda a, b: torch.addcmul(a, b.sin(), a.sin(), value=0.3), "lerp": lambda a, b: torch.lerp(a, b, 0.3),
}  # fmt: skip
REDUCTIONS = {
    "sum": lambda x, d: x.sum(d, keepdim=True), "mean": lambda x, d: x.mean(d, keepdim=True),
    "logsumexp": lambda x, d: x.logsumexp(d, keepdim=True), "softmax": lambda x, d: x.softmax(d),
    "log softmax": lambda x, d: x.log_softmax(d), "cumsum": lambda x, d: x.cumsum(d) / 4,
    "variance": lambda x, d: x.var(d, keepdim=True, correction=0), "total": lambda x, d: x.mean().reshape(1, 1),
    "norm": lambda x, d: torch.nn.functional.layer_norm(x, x.shape[-1:], eps=0.5),
}  # fmt: skip
MATRIX = {
    "matmul": lambda a, b: a @ b.t() / 2, "outer": lambda a, b: a.t() @ b / 2,
    "einsum": lambda a, b: torch.einsum("ij,kj->kij", a, b).sum(0),
    "baddbmm": lambda a, b: torch.baddbmm(a[None], a[None], (b.t() @ b)[None], alpha=0.2)[0],
    "linear": lambda a, b: torch.nn.functional.linear(a, b, b.mean(1)) / 2,
}  # fmt: skip
VIEWS = {
    "transpose": lambda x: x.t(), "flatten": lambda x: x.reshape(1, -1), "flip": lambda x: x.flip(0),
    "slice": lambda x: x[:, ::2], "last row": lambda x: x[-1:], "diagonal": lambda x: x.diagonal()[None],
    "chunk": lambda x: torch.cat([*x.chunk(2, -1)][::-1], -1), "expand": lambda x: x[:1].expand(3, -1),
    "index": lambda x: x[torch.tensor([0, -1, 0])], "roll": lambda x: x.roll(1, -1), "permute": lambda x: x[None].permute(2, 1, 0)[..., 0],
    "pad": lambda x: torch.nn.functional.pad(x, (1, 0))[:, :4], "stack": lambda x: torch.stack([x, x.sin()], 1).flatten(0, 1)[:4],
    "take": lambda x: x.take_along_dim(torch.zeros(1, x.shape[1], dtype=torch.int64), 0), "split": lambda x: x.split(2, 1)[0],
}  # fmt: skip
MASK = torch.tensor([True, False, False, True, True, False, True, False, True, True, False, True, False, True, True, False])


def write_row(x, y):
    x[0] = y.mean()


def write_column_view(x, y):
    column = x.t()[-1]
    column.mul_(0.5).add_(y.sum().sin())


def write_slice(x, y):
    x[:, ::2].sub_(y.mean().tanh())


def write_by_index(x, y):
    x.index_put_((torch.tensor([0, 0, -1]),), y.mean(), accumulate=True)


def write_masked(x, y):
    x.masked_fill_(MASK[: x.shape[-1]], 0.25).add_(y.mean())


def write_flat(x, y):
    x.view(-1)[1:].copy_(x.reshape(-1)[:-1] * 0.5 + y.mean())


WRITES = [write_row, write_column_view, write_slice, write_by_index, write_masked, write_flat]

instruction = st.tuples(
    st.sampled_from([
        *(("pointwise", name) for name in POINTWISE), *(("binary", name) for name in BINARY),
        *(("reduction", name) for name in REDUCTIONS), *(("matrix", name) for name in MATRIX),
        *(("view", name) for name in VIEWS), *(("write", f) for f in WRITES),
    ]),
    st.integers(0, 5), st.integers(0, 5),
)  # fmt: skip
programs = st.lists(instruction, min_size=1, max_size=12)
seeds = st.integers(0, 2**16)
few = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def run(program: list, *inputs: torch.Tensor) -> torch.Tensor:
    """The program's result: a weighted sum of every tensor it made."""
    made = list(inputs)
    for (kind, what), i, j in program:
        a, b = made[-1 - i % len(made)], made[-1 - j % len(made)]
        if kind == "pointwise":
            made.append(POINTWISE[what](a))
        elif kind == "reduction":
            made.append(REDUCTIONS[what](a, j % 2))
        elif kind == "view":
            made.append(VIEWS[what](a))
        elif kind == "write":
            target = a.clone(memory_format=torch.contiguous_format) * 1
            seen = target.view(-1)  # a view made before the write shows it
            what(target, b)
            made += [target, (seen.sin() / 2).reshape(target.shape)]
        elif kind == "binary":
            made.append(BINARY[what](*torch.broadcast_tensors(a, b)) if fits(a, b) else a + b.mean())
        elif a.shape == b.shape or (what in ("matmul", "linear", "einsum") and a.shape[1] == b.shape[1]):
            made.append(MATRIX[what](a, b) if what != "einsum" else MATRIX[what](a, b) / 2)
        else:
            made.append(a * b.sum().sigmoid())
    return sum(((n + 1) * x.sin()).mean() for n, x in enumerate(made))


def fits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return all(m == n or m == 1 or n == 1 for m, n in zip(a.shape, b.shape))


def problem(program: list, seed: int) -> tuple[Callable, tuple, tuple, tuple]:
    """The program as a function, its inputs, and two directions like them."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda: tuple(torch.randn(n, 4, dtype=torch.float64, generator=generator) for n in (3, 4, 1))
    return lambda *inputs: run(program, *inputs), make(), make(), make()


def dot(xs, ys):
    return sum((x * y).sum() for x, y in zip(xs, ys))


def close(a, b, rtol=1e-9, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@few
@given(programs, seeds)
def test_gradients_by_every_way_agree(program, seed):
    f, inputs, along, _ = problem(program, seed)
    value, grads = nf.value_and_grad(f, (0, 1, 2))(*inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    theirs = f(*leaves)
    close(value, theirs.detach())
    close(grads, tuple(torch.autograd.grad(theirs, leaves, materialize_grads=True)))
    h = 1e-5
    ahead, back = (f(*(x + s * h * d for x, d in zip(inputs, along))) for s in (1, -1))
    close(dot(grads, along), (ahead - back) / (2 * h), rtol=1e-5, atol=1e-6)


# Groups of one code, one of them alone and others batched, share a function.
SHARED = [("pointwise", "sin"), ("reduction", "norm"), ("pointwise", "sin"), ("view", "flatten"), ("reduction", "sum")]


@settings(few, max_examples=10)
@given(programs, seeds)
@example([(what, i, 0) for what, i in zip(SHARED, (1, 0, 0, 0, 2))], 0)
def test_compiled_gradients_agree(program, seed):
    f, inputs, _, _ = problem(program, seed)
    step = nf.value_and_grad(f, (0, 1, 2))
    close(nf.jit(step)(*inputs), step(*inputs))


@few
@given(programs, seeds)
def test_forward_and_reverse_mode_are_adjoint(program, seed):
    f, inputs, along, _ = problem(program, seed)
    outputs = lambda *xs: (f(*xs), xs[0].sin() * f(*xs))
    out, tangent = nf.jvp(outputs, inputs, along)
    cotangent = (torch.ones_like(out[0]), out[1].cos())
    close(dot(tangent, cotangent), dot(nf.vjp(outputs, *inputs)[1](cotangent), along))


@settings(few, max_examples=60)
@given(programs, seeds)
def test_second_derivatives_are_symmetric_and_torchs(program, seed):
    f, inputs, u, v = problem(program, seed)
    hu, hv = nf.hvp(f, inputs, u), nf.hvp(f, inputs, v)
    close(dot(hu, v), dot(hv, u))
    again = nf.grad(lambda *xs: dot(nf.grad(f, (0, 1, 2))(*xs), u), (0, 1, 2))(*inputs)
    close(again, hu)
    leaves = [x.clone().requires_grad_() for x in inputs]
    first = torch.autograd.grad(f(*leaves), leaves, create_graph=True, materialize_grads=True)
    close(hu, tuple(torch.autograd.grad(dot(first, u), leaves, materialize_grads=True)))


@settings(few, max_examples=12)
@given(programs, seeds)
def test_a_batch_of_programs_agrees_with_one_after_another(program, seed):
    f, inputs, other, _ = problem(program, seed)
    gradient = nf.grad(f, (0, 1, 2))
    one_by_one = tuple(torch.stack(pair) for pair in zip(gradient(*inputs), gradient(*other)))
    batch = tuple(torch.stack(pair) for pair in zip(inputs, other))
    close(nf.grad(lambda *xs: nf.vmap(f)(*xs).sum(), (0, 1, 2))(*batch), one_by_one)
    close(nf.vmap(gradient)(*batch), one_by_one)


@pytest.mark.parametrize("write", WRITES)
def test_each_write_takes_effect(write):
    """The programs above would agree on writes that do nothing."""
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    before = x.clone()
    write(x, torch.ones(1, 4, dtype=torch.float64))
    assert not torch.equal(x, before)
