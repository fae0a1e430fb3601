"""Sophia against the paper in float64 and against the published implementations; its estimates against exact diagonals."""

import jax
import numpy as np
import optax
import pytest
import pytorch_optimizer
import sophia_opt
import torch

import neuralforge as nf
from neuralforge import optim
from neuralforge.errors import ConfigError
from neuralforge.optim.base import apply_updates
from neuralforge.optim.sophia import RULES, sample_labels

SHAPES = {"w": (7, 5), "b": (5,), "s": (), "t": (2, 3, 4)}
EVERY = 10


def start(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}


def signals(dtype=torch.float64, steps=50, positive=False):
    """A gradient and a curvature for each step, of very different sizes."""
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        drawn = [{n: torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()} for _ in range(2)]
        yield drawn[0], {n: (x.abs() if positive else x) * 10.0 ** (i - 2) for i, (n, x) in enumerate(drawn[1].items())}


def run(optimizer, feed, first, dtype=torch.float64):
    """Parameters after each step; curvature is given to steps first, first + EVERY, ..."""
    params = start(dtype)
    state, update = optimizer.init(params), nf.jit(optimizer.update)
    for n, (grads, curvature) in enumerate(feed):
        given = {"curvature": curvature} if n % EVERY == first else {}
        updates, state = update(grads, state, params, **given)
        params = apply_updates(params, updates)
        yield params, state


def close(ours, theirs, tolerance=1e-12):
    for name, p in ours.items():
        assert torch.allclose(p, torch.tensor(np.asarray(theirs[name])).to(p.dtype), rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_equals_the_paper(dtype, tolerance):
    """Algorithm 3, line by line."""
    lr, beta1, beta2, gamma, eps, decay = 0.02, 0.9, 0.95, 0.3, 1e-12, 0.1
    p = {name: x.numpy() for name, x in start().items()}
    m, h = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
    ours = run(optim.sophia(lr, (beta1, beta2), gamma, eps, weight_decay=decay), signals(dtype), 0, dtype)
    for t, ((grads, curvature), (params, state)) in enumerate(zip(signals(), ours), start=1):
        inside = 0
        for name in SHAPES:
            m[name] = beta1 * m[name] + (1 - beta1) * grads[name].numpy()
            if t % EVERY == 1:
                h[name] = beta2 * h[name] + (1 - beta2) * curvature[name].numpy()
            p[name] = p[name] - lr * decay * p[name]
            ratio = m[name] / np.maximum(gamma * h[name], eps)
            inside += (np.abs(ratio) < 1).sum()
            p[name] = p[name] - lr * np.clip(ratio, -1, 1)
        close(params, p, tolerance)
        if t % EVERY == 1:
            assert state["unclipped"] == np.float32(inside / 65)
    assert t == state["step"] == 50 and 0.05 < state["unclipped"] < 0.95


def test_equals_the_official_code():
    bs, params = 64, {name: p.clone().requires_grad_() for name, p in start().items()}
    theirs = sophia_opt.SophiaG(params.values(), lr=0.02, betas=(0.9, 0.95), rho=0.3, weight_decay=0.1)
    sampled = [(grads, {n: bs * c.square() for n, c in curvature.items()}) for grads, curvature in signals()]
    ours = run(optim.sophia(0.02, (0.9, 0.95), gamma=0.3, weight_decay=0.1, like="official"), sampled, EVERY - 1)
    for n, ((grads, curvature), (found, _)) in enumerate(zip(signals(), ours)):
        for name, p in params.items():
            p.grad = grads[name].clone()
        theirs.step(bs=bs)
        if n % EVERY == EVERY - 1:  # as train_sophiag.py does
            for name, p in params.items():
                p.grad = curvature[name].clone()
            theirs.update_hessian()
        close(found, {name: p.detach() for name, p in params.items()})


def test_equals_optax():
    given = optax.GradientTransformationExtraArgs(lambda p: (), lambda u, s, params=None, *, curvature, **_: (curvature, s))
    with jax.enable_x64(True):
        theirs = optax.contrib.sophia(
            0.02, b1=0.9, b2=0.95, gamma=0.3, weight_decay=0.1, update_interval=EVERY, hessian_diagonal_fn=given
        )
        to_jax = lambda tree: {name: jax.numpy.asarray(x.numpy()) for name, x in tree.items()}
        params = to_jax(start())
        state, update = theirs.init(params), jax.jit(theirs.update)
        ours = run(optim.sophia(0.02, (0.9, 0.95), gamma=0.3, weight_decay=0.1, like="optax"), signals(), 0)
        for (grads, curvature), (found, _) in zip(signals(), ours):
            updates, state = update(to_jax(grads), state, params, curvature=to_jax(curvature))
            params = optax.apply_updates(params, updates)
            close(found, params)


def test_equals_pytorch_optimizer():
    params = {name: p.clone().requires_grad_() for name, p in start().items()}
    theirs = pytorch_optimizer.SophiaH(params.values(), lr=0.5, weight_decay=0.1, update_period=EVERY)
    ours = run(optim.sophia(0.5, weight_decay=0.1, like="pytorch_optimizer"), signals(), 0)
    for n, ((grads, curvature), (found, _)) in enumerate(zip(signals(), ours)):
        for name, p in params.items():
            p.grad = grads[name].clone()
        theirs.step(hessian=[curvature[name] for name in params] if n % EVERY == 0 else None)
        close(found, {name: p.detach() for name, p in params.items()})


def test_the_published_versions_disagree():
    ends = [torch.cat([p.flatten() for p in list(run(optim.sophia(0.02, like=like), signals(positive=True), 0))[-1][0].values()]) for like in RULES]
    for i, a in enumerate(ends):
        for b in ends[:i]:
            assert (a - b).abs().max() > 1e-3


def test_only_what_should_decay_decays_and_the_rate_follows_its_schedule():
    zero = {name: torch.zeros_like(p) for name, p in start().items()}
    schedule = optim.schedules.linear(0.5, 4)
    optimizer = optim.sophia(schedule, weight_decay=0.1, decay=lambda p: p.dim() >= 2)
    share = 1.0
    for n, (params, _) in enumerate(run(optimizer, [(zero, zero)] * 4, 0)):
        share *= 1 - 0.1 * 0.5 * (1 - n / 4)
        close(params, {name: p * (share if p.dim() >= 2 else 1) for name, p in start().items()})


# ---- estimates of the curvature


def network():
    """Weights of a small classifier, and its logits for fixed inputs."""
    g = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    params = {"u": draw(3, 4), "b": draw(4), "v": draw(4, 3)}
    x, y = draw(6, 3), torch.tensor([0, 1, 2, 0, 1, 1])
    logits = lambda p: torch.tanh(x @ p["u"] + p["b"]) @ p["v"]
    return params, logits, lambda p: torch.nn.functional.cross_entropy(logits(p), y)


def flat(tree):
    return torch.cat([tree[name].reshape(-1) for name in sorted(tree)])


def draws(estimate, params, count):
    estimate = nf.jit(estimate)
    return torch.stack([flat(estimate(params, nf.random.key(seed))) for seed in range(count)])


def agree(samples, exact):
    """The mean of the samples is within 5 standard errors of the exact value everywhere, and rarely beyond 3."""
    off = (samples.mean(0) - exact).abs() / (samples.std(0) / len(samples) ** 0.5 + 1e-15)
    assert off.max() < 5 and (off > 3).double().mean() < 0.1
    assert (samples.std(0) / len(samples) ** 0.5).max() < 0.1 * exact.abs().max(), "the test would see an error"


@pytest.mark.parametrize("probe", ["rademacher", "normal"])
def test_hutchinson_is_the_diagonal_in_expectation(probe):
    params, _, loss = network()
    hessian = nf.hessian(loss)(params)
    exact = flat({n: torch.stack([hessian[n][n].reshape(p.numel(), -1)[i, i] for i in range(p.numel())]) for n, p in params.items()})
    agree(draws(lambda p, key: optim.hutchinson(loss, p, key, probe), params, 2000), exact)


def test_signs_are_exact_on_a_diagonal_hessian_and_vary_less():
    scales = {"a": torch.arange(1.0, 7).reshape(2, 3), "b": torch.tensor(-3.0)}
    loss = lambda p: sum((scales[n] * p[n] ** 2).sum() / 2 for n in scales)
    params = {n: torch.ones_like(s) for n, s in scales.items()}
    assert torch.equal(flat(optim.hutchinson(loss, params, nf.random.key(5))), flat(scales))
    params, _, loss = network()
    spread = [draws(lambda p, key: optim.hutchinson(loss, p, key, probe), params, 200).std(0).mean() for probe in ("rademacher", "normal")]
    assert spread[0] < spread[1]


def test_gauss_newton_bartlett_is_the_gauss_newton_diagonal_in_expectation():
    params, logits, _ = network()
    p = logits(params).softmax(-1)
    middle = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)  # the Hessian of a row's loss in its logits
    jacobian = {n: j.flatten(2) for n, j in nf.jacrev(logits)(params).items()}
    exact = flat({n: torch.einsum("bip,bij,bjp->p", j, middle, j) / len(p) for n, j in jacobian.items()})
    agree(draws(lambda p, key: optim.gauss_newton_bartlett(logits, p, key), params, 4000), exact)


def test_labels_have_the_probabilities_of_the_logits():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf], [3.0, 0.0, 0.0, 0.0]])
    drawn = sample_labels(logits.repeat_interleave(20_000, 0), nf.random.key(0)).view(2, -1)
    for row, expected in zip(drawn, logits.softmax(-1)):
        share = torch.bincount(row, minlength=4) / len(row)
        assert (share - expected).abs().max() < 4 * 0.5 / len(row) ** 0.5 and share[3] <= (expected[3] > 0)


def test_estimates_depend_on_the_key_alone():
    params, logits, loss = network()
    for estimate in (lambda k: optim.hutchinson(loss, params, k), lambda k: optim.gauss_newton_bartlett(logits, params, k)):
        before = torch.get_rng_state()
        one, again, other = (flat(estimate(nf.random.key(seed))) for seed in (1, 1, 2))
        torch.manual_seed(7)
        assert torch.equal(one, again) and not torch.equal(one, other)
        assert torch.allclose(flat(nf.jit(estimate)(nf.random.key(1))), one, rtol=1e-12)
        torch.set_rng_state(before)


@pytest.mark.parametrize(
    "bad, message",
    [({"lr": -1.0}, "lr=-1.0"), ({"betas": (0.9, 1.0)}, "betas"), ({"gamma": 0.0}, "gamma=0.0; expected above 0"), ({"eps": 0.0}, "eps=0.0"),
     ({"clip": -1.0}, "clip=-1.0"), ({"weight_decay": -1.0}, "weight_decay"), ({"like": "optex"}, "like='optex'; expected one of paper, official")],
)  # fmt: skip
def test_values_out_of_range(bad, message):
    with pytest.raises(ConfigError, match=message):
        optim.sophia(**{"lr": 1e-3, **bad})
