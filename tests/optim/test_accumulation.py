"""Micro-batches equal the large batch, whatever counts in each; their statistics equal sums over pairs, without bias."""

import pytest
import torch
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.optim import accumulation


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def problem(dtype):
    params = {"w": draw(6, 5, seed=1, dtype=dtype), "b": [draw(5, seed=2, dtype=dtype)]}
    loss = lambda p, x, y: F.cross_entropy(x @ p["w"] + p["b"][0], y)  # -100 is ignored
    return params, loss, draw(24, 6, seed=3, dtype=dtype), torch.arange(24) % 5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("ignored", [[], [0, 1, 2, 6, 7, 8, 9, 10], [*range(6), 13, 14, 23], range(23)])
def test_accumulated_equals_the_large_batch(ignored, dtype, tolerance):
    params, loss_fn, x, y = problem(dtype)
    y[list(ignored)] = -100

    @nf.jit(donate=0)
    def add(sums, params, x, y):
        return accumulation.add(sums, *nf.value_and_grad(loss_fn)(params, x, y), weight=(y != -100).sum())

    sums = accumulation.empty(params)
    for micro in range(4):
        sums = add(sums, params, x[6 * micro : 6 * micro + 6].clone(), y[6 * micro : 6 * micro + 6].clone())
    assert len(add.programs) == 1, "one program for any number of micro-batches"
    loss, grads = accumulation.mean(sums)
    expected_loss, expected = nf.value_and_grad(loss_fn)(params, x, y)
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(grads, expected, rtol=10 * tolerance, atol=tolerance)


def test_gradients_of_few_bits_are_summed_in_float32():
    params = {"w": torch.zeros(3, dtype=torch.bfloat16)}
    sums = accumulation.empty(params)
    for n in range(256):
        sums = accumulation.add(sums, torch.tensor(1.0), {"w": torch.full((3,), 1.0 if n == 0 else 2.0**-9, dtype=torch.bfloat16)})
    assert (accumulation.mean(sums)[1]["w"] == (1 + 255 * 2.0**-9) / 256).all()


def accumulated(grads, weights):
    sums = accumulation.empty(grads[0])
    for g, w in zip(grads, weights):
        sums = accumulation.add(sums, torch.zeros(()), g, w)
    return sums


def test_statistics_are_those_of_all_pairs():
    K, grads = 5, [{"a": draw(7, 3, seed=k) + 0.5, "b": draw(4, seed=10 + k)} for k in range(5)]
    found = accumulation.statistics(accumulated(grads, [32.0] * K))
    flat = torch.stack([torch.cat([g["a"].flatten(), g["b"]]) for g in grads]).double()
    products = flat @ flat.T
    between = (products.sum() - products.trace()) / (K * (K - 1))
    torch.testing.assert_close(found.signal.double(), between, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.noise.double(), 32 * flat.var(0).sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.snr.double(), between / (flat.var(0).sum() / K), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.cosine.double(), between / (products.trace() / K), rtol=1e-5, atol=0)
    mean = flat.mean(0)
    torch.testing.assert_close(found.norms.double(), torch.stack([mean[:21].norm(), mean[21:].norm()]), rtol=1e-5, atol=0)
    for leaf, part in enumerate((flat[:, :21], flat[:, 21:])):
        p = part @ part.T
        cosine = (p.sum() - p.trace()) / (K - 1) / p.trace()
        torch.testing.assert_close(found.cosines[leaf].double(), cosine, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cosine", [-1.0, 0.0, 0.6, 1.0])
def test_cosine_of_two(cosine):
    a, b = torch.tensor([2.0, 0.0]), 2 * torch.tensor([cosine, (1 - cosine**2) ** 0.5])
    assert accumulation.statistics(accumulated([{"w": a}, {"w": b}], [1, 1])).cosine == pytest.approx(cosine, abs=1e-6)


@pytest.mark.parametrize("weights", [[8, 8], [1, 3, 20], [5, 0, 2, 9]])
def test_signal_and_noise_are_unbiased(weights):
    """Gradients drawn around a known one, with the covariance that means over so many draws have."""
    true, spread = torch.linspace(-1, 1, 10, dtype=torch.float64), torch.linspace(0.5, 3, 10, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def trial(_):
        noise = lambda w: torch.randn(10, generator=generator, dtype=torch.float64) * spread * max(w, 1) ** -0.5
        s = accumulation.statistics(accumulated([true + noise(w) for w in weights], weights))
        return torch.stack([s.signal, s.noise])

    trials = torch.stack([*map(trial, range(3000))])
    error = trials.mean(0) - torch.stack([true.square().sum(), spread.square().sum()])
    assert (error.abs() < 4 * trials.std(0) / 3000**0.5).all(), error


def test_one_micro_batch_tells_norms_only():
    found = accumulation.statistics(accumulated([{"w": torch.tensor([3.0, 4.0])}], [2]))
    assert found.norms == 5 and not found.signal.isfinite() and not found.noise.isfinite()


def test_statistics_of_complex_gradients_are_those_of_real_ones():
    grads = [{"a": torch.complex(draw(6, 3, seed=k), draw(6, 3, seed=9 + k))} for k in range(3)]
    real = [{"a": torch.view_as_real(g["a"])} for g in grads]
    found, expected = (accumulation.statistics(accumulated(x, [1.0, 2.0, 3.0])) for x in (grads, real))
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)


def test_gradients_belong_to_parameters_by_name():
    grads = [{"a": draw(7, seed=k), "b": draw(4, seed=10 + k) + 1} for k in range(3)]
    turned = [grads[0], *({"b": g["b"], "a": g["a"]} for g in grads[1:])]
    found, expected = (accumulation.statistics(accumulated(x, [1.0] * 3)) for x in (turned, grads))
    assert all(torch.equal(one, other) for one, other in zip(found, expected))
