"""Jitted functions and transforms on several threads at once."""

import threading

import pytest
import torch
from torch import nn

import neuralforge as nf
from neuralforge.errors import CaptureError


def together(*works):
    """Run on a thread each; raises what any of them does."""
    errors = []

    def run(work):
        try:
            work()
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_settings_of_the_process_are_left_as_they_were():
    entered, leave = threading.Event(), threading.Event()

    def first(x):
        entered.set()
        assert leave.wait(60) and not torch.backends.mha.get_fastpath_enabled()
        return x.sum()

    def second():
        entered.wait(60)
        nf.jit(lambda x: x + 1)(torch.ones(2))

        def inside(x):
            leave.set()
            thread.join(60)
            assert not torch.backends.mha.get_fastpath_enabled() and not torch.distributions.Distribution._validate_args
            return x.sum()

        nf.jit(nf.grad(inside))(torch.ones(2))

    thread = threading.Thread(target=lambda: nf.jit(nf.grad(first))(torch.ones(2)))
    thread.start()
    together(second)
    assert torch.backends.mha.get_fastpath_enabled() and torch.distributions.Distribution._validate_args


def test_one_function_and_many_shapes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))
    jitted = nf.jit(model)

    def work(grad):
        for n in (2, 3, 4, 2, 3, 4):
            x = torch.randn(n, 8, requires_grad=grad)
            torch.testing.assert_close(jitted(x), model(x), rtol=1e-4, atol=1e-5)

    together(*(lambda grad=grad: work(grad) for grad in (True, False, True, False)))


def test_a_function_that_calls_itself_does_not_wait_for_itself():
    again = nf.opaque(lambda x: f(x[:1]) if len(x) > 1 else x * 3, lambda x: x.new_empty(1))
    f = nf.jit(lambda x: again(x * 2) + 1)
    for _ in range(2):  # the call within compiles another form, and then finds it
        with pytest.raises(CaptureError, match="is called while it runs.*Call the plain function"):
            f(torch.ones(3))
        assert f(torch.ones(1)).tolist() == [7]
