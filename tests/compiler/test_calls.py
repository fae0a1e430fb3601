"""Calls after the first one go by what the last one looked like: whatever differs must be seen."""

import pytest
import torch

import neuralforge as nf


def draw(*shape, **kwargs):
    return torch.randn(*shape, **kwargs)


def same(f, *calls):
    """Each call of the jitted function, in the given order and once more, gives what the plain one does."""
    jitted = nf.jit(f)
    for args in calls * 2:
        torch.testing.assert_close(jitted(*args), f(*args))


CALLS = {
    "shape": [(draw(3, 4),), (draw(3, 5),), (draw(4, 3),)],
    "strides": [(draw(4, 4),), (draw(4, 4).T,), (draw(8, 4)[::2],)],
    "dtype": [(draw(4),), (draw(4, dtype=torch.float64),), (torch.arange(4),)],
    "structure": [({"a": draw(2), "b": draw(2)},), ({"b": draw(2), "a": draw(2)},), ([draw(2), draw(2)],), ((draw(2), draw(2)),)],
    "static": [(draw(2), 1), (draw(2), 2), (draw(2), True), (draw(2), 1.0), (draw(2), torch.tensor(3.0))],
    "the same tensor twice": [(draw(2), draw(2)), (x := draw(2), x)],
}


@pytest.mark.parametrize("what", CALLS)
def test_what_differs_is_seen(what):
    def f(*args):
        leaves = torch.utils._pytree.tree_leaves(args)
        return [(n + 1) * (x * 2 if isinstance(x, torch.Tensor) else torch.full((), x)) for n, x in enumerate(leaves)]

    same(f, *CALLS[what])


def test_a_tensor_changed_in_place_is_seen():
    f, x = nf.jit(lambda x: x * 2), draw(3, 4)
    for change in (lambda: None, lambda: x.t_(), lambda: x.resize_(2, 2), lambda: setattr(x, "data", draw(5))):
        change()
        torch.testing.assert_close(f(x), x * 2)
    torch.testing.assert_close(torch.autograd.grad(f(x.requires_grad_()).sum(), x)[0], torch.full((5,), 2.0))
    with torch.no_grad():
        assert not f(x).requires_grad and not f(x).requires_grad
    assert f(x).requires_grad


@pytest.mark.usefixtures("threads_restored")
def test_the_number_of_threads_is_seen():
    f, x = nf.jit(lambda x: x + 1), draw(3)
    f(x)
    torch.set_num_threads(torch.get_num_threads() + 1)
    f(x)
    assert len(f.programs) == 2


def test_a_constant_that_comes_to_require_grad_is_seen():
    w, x = draw(3), draw(3)
    f = nf.jit(lambda x: x * w)
    assert not f(x).requires_grad and not f(x).requires_grad
    w.requires_grad_()
    assert f(x).requires_grad


def test_donated_tensors_that_come_to_overlap_are_seen():
    f = nf.jit(lambda a, b: (a + 1, b + a), donate=0)
    a, b = torch.zeros(4), torch.ones(4)
    for _ in range(3):
        a, _ = f(a, b)
    assert a.tolist() == [3.0] * 4
    whole = torch.arange(5.0)
    one, two = f(whole[:4], whole[1:])
    assert one.tolist() == [1, 2, 3, 4] and two.tolist() == [1, 3, 5, 7] and whole.tolist() == [0, 1, 2, 3, 4]


def test_results_follow_tensors_that_move():
    """The arrays of pointers are kept for as long as the addresses are the same."""
    f, kept = nf.jit(lambda xs: [x.exp() * 2 for x in xs]), []
    for n in range(6):
        kept.append([torch.full((5,), float(n + i)) for i in range(3)])
        for x, y in zip(kept[-1], f(kept[-1])):
            torch.testing.assert_close(y, x.exp() * 2)


def test_calls_in_inference_mode_leave_nothing_of_it():
    f = nf.jit(lambda x: (x.cumsum(0).tanh() @ x, x.sin()))
    f(torch.randn(2, 2))
    for n in (4, 30, 2, 4):  # the memory grows within
        x = torch.randn(n, n)
        with torch.inference_mode():
            inside = f(x)
        outside = f(x)
        assert inside[0].is_inference() and not outside[0].is_inference()
        torch.testing.assert_close(inside, outside)
        torch.testing.assert_close(outside[0].add_(1), x.cumsum(0).tanh() @ x + 1)


def test_the_default_device_is_seen():
    f = nf.jit(lambda x: torch.zeros(3))
    x = torch.ones(1)
    assert f(x).device.type == "cpu"
    with torch.device("meta"):
        assert f(x).device.type == "meta"
    assert f(x).device.type == "cpu"
