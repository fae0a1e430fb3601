"""The memory plan: what is in use, and what is written over what."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.compiler.storage import root_of


def loss(params, x):
    for up, down in params:
        x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (32,)), up)), down).cumsum(0)
    return x.softmax(-1).square().mean()


@pytest.fixture(scope="module")
def told():
    params = [(torch.randn(512, 32) * 0.1, torch.randn(32, 512) * 0.1) for _ in range(3)]
    return nf.explain(nf.grad(loss), params, torch.randn(4, 64, 32))


def memory_of(plan, v):
    """What tells the memory of a value from others'."""
    while v in plan.takes_over or v in plan.roots:
        v = root_of(plan.roots, plan.takes_over.get(v, v))
    return plan.buffers.get(v, v)


def test_memory_that_values_share_is_counted_once(told):
    plan, kernels = told.plan, told._compiled.program.kernels
    shared = 0
    for i, (eq, in_use) in enumerate(zip(told.graph.equations, plan.in_use)):
        live = [v for v, born in plan.birth.items() if v not in plan.roots and born <= i <= plan.death[v]]
        memory = {memory_of(plan, v): v.nbytes for v in live}
        shared += len(memory) < len(live)
        assert in_use == sum(memory.values()) + (kernels[eq].scratch(eq) if eq in kernels else 0)
    assert shared, "nothing is written over an operand"


def test_an_operand_read_through_a_view_is_written_over(told):
    """The gradient before the activation takes the place of one of what it is computed from."""
    plan = told.plan
    backward = [eq for eq in told.graph.equations if "gelu_backward" in eq.name]
    assert len(backward) == 3
    for eq in backward:
        i = told.graph.equations.index(eq)
        dying = {memory_of(plan, v) for v in eq.inputs if plan.death.get(root_of(plan.roots, v)) == i}
        largest = max(eq.results, key=lambda v: v.nbytes)
        assert memory_of(plan, largest) in dying


def test_results_are_counted_from_when_they_are_made():
    f = lambda x: (x.cumsum(0), x.cumsum(1))
    plan = nf.explain(f, torch.randn(64, 64)).plan
    assert len(plan.fresh) == 2
    assert plan.in_use[-1] >= 2 * 64 * 64 * 4 and plan.in_use[0] < plan.in_use[-1]
    assert plan.peak_bytes <= plan.arena_bytes + max(plan.in_use)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.as_strided((3,), (2,), 0),
        lambda x: torch.as_strided_copy(x.T, (3,), (2,), 1),
        lambda x: torch.as_strided_scatter(x, x[0, :2] * 2, (2,), (1,), 0),
    ],
)
def test_what_is_read_by_places_in_memory_lies_at_the_beginning_of_it(read):
    """Not somewhere in the arena, nor in the memory of an argument of which it is a part or that is given away."""

    def f(x, y):
        first = x @ y + 1
        second = y @ x * first
        return read(second), read(y[1:].clone()), (first + second).sum(), read(x * 2)

    torch.manual_seed(0)
    whole, y = torch.randn(5, 4), torch.randn(4, 4)
    expected = f(whole[1:], y)
    for found, wanted in zip(nf.jit(f, donate=0)(whole[1:], y), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
