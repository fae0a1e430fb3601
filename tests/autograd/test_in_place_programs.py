"""Random programs that write in place, through views of views, now and then under no_grad: values and gradients as torch.autograd's."""

import random

import pytest
import torch

import neuralforge as nf

pytestmark = pytest.mark.usefixtures("unoptimised")

VIEWS = [
    lambda t: t[-1] if t.dim() > 1 else t, lambda t: t[1:3], lambda t: t.t() if t.dim() == 2 else t, lambda t: t.flatten(),
    lambda t: t.unsqueeze(0).squeeze(0), lambda t: t[..., ::2], lambda t: t.chunk(2, -1)[1], lambda t: t.transpose(0, -1),
    lambda t: t.movedim(0, -1), lambda t: t.diagonal() if t.dim() == 2 else t, lambda t: t.view(-1) if t.is_contiguous() else t,
]  # fmt: skip
WRITES = [
    lambda t, v: t.add_(v), lambda t, v: t.mul_(v), lambda t, v: t.copy_(v), lambda t, v: t.fill_(0.7), lambda t, v: t.zero_(),
    lambda t, v: t.masked_fill_(v > 0, 0.1), lambda t, v: t.clamp_(-0.5, 0.5), lambda t, v: t.__setitem__(0, v[0]),
    lambda t, v: t.__setitem__((..., -1), v[..., 0]), lambda t, v: t.__setitem__(v > 0.2, 0.4), lambda t, v: t.__isub__(v),
]  # fmt: skip


def shaped(like: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Numbers of `u`, repeated, as many as `like` has."""
    flat, n = u.reshape(-1), like.numel()
    return flat.repeat(-(-n // flat.numel()))[:n].reshape(like.shape).sin()


def program(seed: int):
    choices = random.Random(seed)
    steps = [[choices.random() for _ in range(4)] for _ in range(choices.randint(4, 14))]

    def f(x, w):
        tensors = [x * 1, w * 2, torch.zeros_like(x), torch.ones(4, 6, dtype=x.dtype), torch.empty_like(x).fill_(0.5)]
        pick = lambda items, u: items[int(u * len(items))]
        for kind, at, other, which in steps:
            t, u = pick(tensors, at), pick(tensors, other)
            if kind < 0.35:
                tensors.append(pick(VIEWS, which)(t))
            elif kind < 0.8 and t.numel() and u.numel():
                with torch.set_grad_enabled(kind < 0.74):
                    pick(WRITES, which)(t, shaped(t, u))
            else:
                tensors.append((t * u.sum().cos()).exp().tanh())
        weighted = (t.reshape(-1) * torch.linspace(0.1, n, t.numel(), dtype=t.dtype) for n, t in enumerate(tensors, 1))
        return sum(y.sum() for y in weighted)

    return f


@pytest.mark.parametrize("first", range(0, 120, 12))
def test_values_and_gradients(first):
    ran = 0
    for seed in range(first, first + 12):
        f = program(seed)
        x, w = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind()
        try:
            theirs = x.clone().requires_grad_(), w.clone().requires_grad_()
            loss = f(*theirs)
            truth = torch.autograd.grad(loss, theirs, materialize_grads=True)
        except RuntimeError:  # a write that torch.autograd doesn't allow
            continue
        ran += 1
        step = nf.value_and_grad(f, (0, 1))
        for found in (step(x, w), nf.jit(step)(x, w), nf.jit(step, max_rewrites=0)(x, w)):
            torch.testing.assert_close(found, (loss.detach(), truth), rtol=1e-9, atol=1e-9, msg=lambda m, s=seed: f"seed {s}: {m}")
    assert ran > 4
