"""Writes to tensors that a jitted function closes over: running statistics, counters. They take effect after each call."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import neuralforge as nf
from neuralforge.errors import CaptureError, DifferentiationError


def test_batch_norm_keeps_its_statistics():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).double()
    theirs = copy.deepcopy(module)
    params = {name: p.detach() for name, p in module.named_parameters()}
    step = nf.jit(nf.value_and_grad(lambda p, x: functional_call(module, p, (x,)).square().mean()))
    for calls in range(1, 4):
        x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
        loss, gradients = step(params, x)
        theirs.zero_grad()
        expected = theirs(x).square().mean()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for name, p in theirs.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad)
        for name, buffer in theirs.named_buffers():
            torch.testing.assert_close(dict(module.named_buffers())[name], buffer)
        assert module[1].num_batches_tracked == calls
    nf.explain(step, params, x).measure(2)
    assert module[1].num_batches_tracked == calls  # looking changes nothing
    module.eval(), theirs.eval()
    torch.testing.assert_close(step(params, x)[0], theirs(x).square().mean())
    assert module[1].num_batches_tracked == calls
    assert len(step.programs) == 2  # one in training, one not


def test_what_is_written_is_read_by_the_next_call():
    total, rows = torch.zeros(3), torch.zeros(4, 3)

    @nf.jit
    def f(x, i):
        total.add_(x)
        rows[1:].mul_(2).add_(x)
        return total * i, rows.sum()

    for i in range(1, 4):
        before = rows.clone()
        out, summed = f(torch.full((3,), 2.0), torch.tensor(i))
        torch.testing.assert_close(out, torch.full((3,), 2.0 * i * i))
        torch.testing.assert_close(rows, torch.cat([before[:1], before[1:] * 2 + 2]))
        torch.testing.assert_close(summed, rows.sum())
    total.zero_()
    torch.testing.assert_close(f(torch.ones(3), torch.tensor(1))[0], torch.ones(3))


def test_memory_that_others_see_is_refused():
    whole = torch.zeros(4)
    part = whole[:2]
    with pytest.raises(CaptureError, match="closes over another one of the same memory.*clone"):
        nf.jit(lambda x: whole.add_(x).sum() + part.sum())(torch.ones(4))
    f = nf.jit(lambda x: whole.add_(1).sum() + x.sum())
    assert f(torch.ones(2)) == 6
    with pytest.raises(CaptureError, match="writes in place to a tensor that it closes over, of shape .*4.* whose memory another one"):
        f(part)
    with pytest.raises(CaptureError, match="whose memory another one"):
        f(part.detach().requires_grad_())
    torch.testing.assert_close(whole, torch.ones(4))


def test_a_module_in_a_loop_of_torch():
    """nf.jit(module) in place of the module, with its loss, backward() and optimizer."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()
    theirs = copy.deepcopy(module)
    ours = nf.jit(module)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (module, theirs)]
    for _ in range(3):
        x = torch.randn(5, 4, dtype=torch.float64)
        for f, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            f(x).square().mean().backward()
            optimizer.step()
        for a, b in zip(module.state_dict().values(), theirs.state_dict().values()):
            torch.testing.assert_close(a, b)


def test_backward_reads_what_was_there_before():
    scale = torch.full((3,), 2.0)

    def f(x):
        y = scale * x
        scale.add_(1)
        return (y * y * scale).sum()

    x = torch.randn(3, requires_grad=True)
    for n in (2.0, 3.0):
        (gradient,) = torch.autograd.grad(nf.jit(f)(x), x)
        torch.testing.assert_close(gradient, 2 * n * n * (n + 1) * x.detach())
    loss = nf.jit(f)(x)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=False)
    with pytest.raises(DifferentiationError, match="second derivative.*writes in place"):
        torch.autograd.grad(nf.jit(f)(x), x, create_graph=True)


def test_buckets_refuse_them():
    count = torch.zeros(())
    with pytest.raises(CaptureError, match="pads for writes in place.*closes over"):
        nf.jit(lambda x: (count.add_(1) * x).sum(), buckets={"x": {0: (4,)}})(torch.ones(3))
    assert count == 0


@pytest.mark.parametrize("training", [True, False])
def test_statistics_read_before_and_after_they_are_updated(training):
    """Also where a group of elementwise operators could take both readings together."""

    def f(x, mean, var):
        scaled, before = var * 2, mean * 3
        y = nn.functional.batch_norm(x, mean, scaled, training=training)
        return y, before, mean * 3, scaled, scaled * 3

    torch.manual_seed(0)
    jitted = nf.jit(f)
    for _ in range(2):
        args = torch.randn(4, 3), torch.randn(3), torch.rand(3)
        given = tuple(x.clone() for x in args)
        for found, expected in zip((*jitted(*given), *given), (*f(*args), *args), strict=True):
            assert torch.allclose(found, expected, atol=1e-6)


def test_expanded_statistics_are_refused():
    x, one = torch.randn(2, 3, 4, 4), torch.ones(1)
    f = lambda x, mean, var: nn.functional.batch_norm(x, mean, var, training=True)
    with pytest.raises(CaptureError, match=r"test_closed_writes\.py:\d+: .* of shape \(3,\) of which several elements are one place.*clone"):
        nf.jit(f)(x, one.expand(3), one.expand(3))
    mean = one.expand(3)
    with pytest.raises(CaptureError, match="Pass a clone"):
        nf.jit(lambda x: f(x, mean, torch.ones(3)))(x)
