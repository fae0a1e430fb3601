"""Jitted functions and transforms on several threads at once."""

import threading

import torch
from torch import nn

import neuralforge as nf


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
