"""Random numbers from keys: against the plain definition, and the same however a program is run."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import neuralforge as nf
from neuralforge.errors import KernelError
from neuralforge.kernels import random as kernel
from neuralforge.kernels import toolchain
from neuralforge.kernels.attention.dropout import keep

R = nf.random
both = pytest.mark.parametrize("run", [lambda f: f, nf.jit], ids=["eager", "jit"])


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize(
    ("shape", "start", "whole"),
    [
        ((7,), (3,), (20,)), ((1000,), (0,), (1000,)), ((3, 5), (1, 2), (9, 11)), ((40, 1), (2, 0), (50, 1)),
        ((2, 3, 4, 70), (2, 0, 5, 65), (8, 3, 10, 300)), ((), (), ()), ((2, 0), (0, 0), (2, 0)),
    ],
)  # fmt: skip
def test_words_against_the_plain_definition(isa, shape, start, whole, monkeypatch):
    monkeypatch.setenv("NEURALFORGE_ISA", isa)
    try:
        toolchain.isa()
    except KernelError:
        pytest.skip(f"this CPU has no {isa}")
    for seed in (0, -3, 2**62 + 5):
        key = torch.tensor([seed, 7])
        found = kernel.random_bits(key, shape, start, whole, 2)
        assert torch.equal(found, kernel.philox.random_bits(key, shape, start, whole, 2))
        everything = kernel.random_bits(key, whole, [0] * len(whole), whole, 2)
        assert torch.equal(found, everything[tuple(slice(s, s + n) for s, n in zip(start, shape))])


def test_attention_draws_the_same():
    key = R.key(5)
    dropped = R.dropout(key, torch.ones(2, 3, 8, 10), 0.3)
    assert torch.equal(dropped, keep(torch.ones(2, 3, 8, 10), 0.3, key))


def test_philox_against_the_authors_vectors():
    # https://github.com/DEShawResearch/random123/blob/main/tests/kat_vectors
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert kernel.philox.philox([0] * 4, [0] * 2, 7) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert kernel.philox.philox([0] * 4, [0] * 2, 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert kernel.philox.philox(*pi, 10) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.999])
def test_dropout_keeps_its_share(dropout_p):
    kept = keep(torch.ones(4, 8, 128, 128), dropout_p, torch.tensor([7, 0]))
    n = kept.numel()
    assert abs((kept > 0).double().mean() - (1 - dropout_p)) < 5 * math.sqrt(dropout_p * (1 - dropout_p) / n)
    for dim in range(4):  # neighbours are independent
        a, b = (kept > 0).double().narrow(dim, 0, kept.shape[dim] - 1), (kept > 0).double().narrow(dim, 1, kept.shape[dim] - 1)
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 5 / math.sqrt(a.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_distributions(dtype):
    n = 1 << 18
    u, z = R.uniform(R.key(1), (n,), dtype).double(), R.normal(R.key(2), (n,), dtype).double()
    assert u.min() >= 0 and u.max() < 1 and z.isfinite().all()
    for x, moments in ((u, (1 / 2, 1 / 3, 1 / 4, 1 / 5)), (z, (0, 1, 0, 3))):
        for power, expected in enumerate(moments, 1):
            y = x**power
            coarse = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11 if dtype == torch.float16 else 0  # of multiples
            assert abs(y.mean() - expected) < 5 * y.std() / n**0.5 + coarse
    if dtype == torch.float64:
        z = R.normal(R.key(3), (n,), torch.complex128)
        assert abs(z.abs().square().mean() - 1) < 5 / n**0.5 and abs((z * z).mean()) < 5 / n**0.5
    p = torch.full((n,), 0.3)
    for drawn in (R.bernoulli(R.key(4), 0.3, (n,)), R.bernoulli(R.key(4), p, (n,))):
        assert abs(drawn.double().mean() - 0.3) < 5 * (0.21 / n) ** 0.5
    assert not R.bernoulli(R.key(4), 0.0, (n,)).any() and R.bernoulli(R.key(4), 1.0, (n,)).all()


def test_keys_are_independent():
    key = R.key(0)
    keys = [key, *R.split(key, 3), R.fold_in(key, 0), R.fold_in(key, torch.tensor(1)), R.key(1)]
    draws = torch.stack([R.normal(k, (1 << 16,)) for k in keys] + [R.normal(key, (1 << 16,), offset=1)])
    apart = torch.corrcoef(draws) - torch.eye(len(draws))
    assert apart.abs().max() < 5 / 2**8
    assert torch.equal(R.fold_in(key, 1), R.fold_in(key, torch.tensor(1)))
    assert torch.equal(R.key(-5), R.key(torch.tensor(-5)))
    assert torch.equal(nf.vmap(lambda k: R.uniform(k, (3,)))(R.split(key, 4))[2], R.uniform(R.split(key, 4)[2], (3,)))


def everything_random(x):
    return {
        "dropout": F.dropout(x, 0.5), "rand": torch.rand(3), "randn": torch.randn(3, dtype=torch.complex64),
        "rand_like": torch.rand_like(x), "uniform_": torch.empty(3).uniform_(-1, 1), "normal_": x.clone().normal_(2, 3),
        "rrelu": F.rrelu(x, training=True), "gumbel": F.gumbel_softmax(x), "randint": torch.randint(0, 10, (5,)),
        "randperm": torch.randperm(6), "normal": torch.normal(x, 1.0), "alpha": F.alpha_dropout(x, 0.3, True),
        "multinomial": torch.multinomial(x.softmax(-1), 2), "again": torch.multinomial(x.softmax(-1), 9, True),
        "channels": F.dropout1d(x.expand(2, 3, 4), 0.5), "bernoulli": torch.bernoulli(x.sigmoid()),
        "exponential": x.clone().exponential_(), "cauchy": x.clone().cauchy_(), "log_normal": x.clone().log_normal_(),
        "attention": F.scaled_dot_product_attention(*[x.expand(1, 2, 3, 4)] * 3, dropout_p=0.5),
        "random_": torch.empty(3, dtype=torch.int64).random_(5), "init": torch.nn.Linear(3, 4).weight.detach(),
        "randint_like": torch.randint_like(x, 3, 9),
    }  # fmt: skip


def within(f, shard=None):
    def g(key, *args):
        with R.stream(key, shard):
            return f(*args)

    return g


def test_stream_serves_pytorchs_random_operators():
    x, state = torch.randn(3, 4), torch.get_rng_state()
    f = within(everything_random)
    first, again, jitted = f(R.key(1), x), f(R.key(1), x), nf.jit(f)(R.key(1), x)
    other, taped = f(R.key(2), x), nf.vjp(lambda x: f(R.key(1), x), x)[0]
    mapped = nf.vmap(f, in_axes=(None, 0))(R.key(1), x.expand(2, 3, 4))
    assert torch.equal(torch.get_rng_state(), state), "torch's generator takes no part"
    for name, y in first.items():
        assert torch.equal(y, again[name]), name
        assert torch.allclose(y, jitted[name]) and torch.allclose(y, taped[name]), name
        assert torch.allclose(y, mapped[name][1]), name
        assert not torch.equal(y, other[name]), name
    assert set(first["randperm"].tolist()) == set(range(6)) and len(set(first["multinomial"][0].tolist())) == 2
    with pytest.raises(KernelError, match=r"test_random\.py:\d+: aten.poisson.default can't draw"):
        within(torch.poisson)(R.key(0), torch.ones(3))


def test_draws_of_a_stream_differ_and_follow_their_distribution():
    with R.stream(R.key(3)):
        a, b = torch.rand(1 << 16), torch.rand(1 << 16)
        picks = torch.multinomial(torch.tensor([0.1, 0.0, 0.9]), 1 << 14, True)
        firsts = torch.stack([torch.multinomial(torch.tensor([0.1, 0.0, 0.9]), 1) for _ in range(2000)])
        integers = torch.randint(-2, 3, (1 << 16,))
        waits = torch.empty(1 << 16).exponential_(4.0)
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / 2**8
    assert (picks == 1).sum() == 0 and abs((picks == 0).double().mean() - 0.1) < 0.012
    assert (firsts == 1).sum() == 0 and abs((firsts == 0).double().mean() - 0.1) < 0.034
    assert integers.unique().tolist() == [-2, -1, 0, 1, 2] and abs(integers.double().mean()) < 0.03
    assert abs(waits.mean() - 0.25) < 0.005


def block(x):
    h = F.dropout(x.tanh(), 0.3) + torch.empty_like(x).normal_() * x
    h = F.rrelu(h, training=True)[None]
    return (F.scaled_dot_product_attention(h, h, h, dropout_p=0.2).sin() * F.dropout2d(h, 0.4))[0]


@both
@pytest.mark.parametrize("seeded", ["generator", "stream inside", "stream outside"])
def test_the_same_numbers_under_checkpointing_and_jit(run, seeded):
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for wrap in (lambda f: f, nf.checkpoint, lambda f: nf.checkpoint(nf.checkpoint(f)), lambda f: nf.checkpoint(f, nf.save_products)):
        torch.manual_seed(1)
        if seeded == "generator":
            loss = lambda key, x: wrap(lambda x: block(block(x)))(x).sum()
        elif seeded == "stream inside":
            loss = lambda key, x: wrap(within(lambda x: block(block(x))))(key, x).sum()
        else:
            loss = within(lambda x: wrap(lambda x: block(block(x)))(x).sum())
        found.append(run(nf.value_and_grad(loss, argnums=1))(R.key(2), x))
    torch.manual_seed(1)
    eager = nf.value_and_grad(loss, argnums=1)(R.key(2), x)
    for value, grad in found:
        assert torch.allclose(value, eager[0]) and torch.allclose(grad, eager[1])


def test_second_order_with_dropout():
    x, v = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    f = lambda wrap: lambda x: within(lambda x: wrap(block)(x).sum())(R.key(0), x)
    plain = nf.hvp(f(lambda f: f), (x,), (v,))[0]
    assert torch.allclose(nf.hvp(f(nf.checkpoint), (x,), (v,))[0], plain)
    assert torch.allclose(nf.jit(lambda x, v: nf.hvp(f(nf.checkpoint), (x,), (v,))[0])(x, v), plain)


def test_gradients_against_torch_autograd():
    """A stream serves torch.autograd too."""
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    with R.stream(R.key(0)):
        block(leaf).sum().backward()
    assert torch.allclose(nf.grad(lambda x: within(block)(R.key(0), x).sum())(x), leaf.grad)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_parts_of_a_draw_are_parts(run, dtype):
    def draw(shape, shard):
        return run(lambda key: (R.normal(key, shape, dtype, shard), within(torch.rand, shard)(key, *shape)))(R.key(1))

    for a, b in zip(draw((8, 6), None), zip(*[draw((2, 6), {0: (i, 4)}) for i in range(4)])):
        assert torch.equal(a, torch.cat(b))
    for a, b in zip(draw((8, 6), None), zip(*[draw((4, 3), {0: (i // 2, 2), -1: (i % 2, 2)}) for i in range(4)])):
        assert torch.equal(a, torch.cat([torch.cat(b[:2], 1), torch.cat(b[2:], 1)]))
    assert R.uniform(R.key(0), (), shard={0: (1, 2)}) == R.uniform(R.key(0), ()), "no such dimension: the same on all"


def test_errors():
    for key in (torch.zeros(2), torch.zeros(3, dtype=torch.int64), torch.Generator()):
        with pytest.raises((KernelError, RuntimeError), match="key"):
            R.uniform(key, (2,))
    with pytest.raises(KernelError, match=r"test_random\.py:\d+: shard \{0: \(4, 4\)\}; expected part 0 to 3 of 4"):
        R.uniform(R.key(0), (2,), shard={0: (4, 4)})
    with pytest.raises(KernelError, match="dropout with p=1.5"):
        R.dropout(R.key(0), torch.ones(2), 1.5)
    with pytest.raises(KernelError, match="a range of 1 to 2"):
        within(torch.randint)(R.key(0), 0, 2**40, (3,))


# ---- ranks: real processes


def global_result(rank, ranks):
    """What data-parallel ranks find together for one batch: dropped activations, loss and gradient."""
    data = torch.Generator().manual_seed(0)
    x, w = (torch.randn(8, 4, 6, generator=data, dtype=torch.float64) for _ in range(2))
    w, mine = w[0], x.chunk(ranks)[rank]

    def loss(w, key, x):
        with R.stream(key, shard={0: (rank, ranks)}):
            h = nf.checkpoint(lambda x, w: F.dropout(F.gelu(x @ w.T), 0.4))(x, w)
            h = F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None], dropout_p=0.3)
            return (h * torch.randn_like(h)).square().sum(), F.dropout(x, 0.5)

    (value, dropped), grad = nf.jit(nf.value_and_grad(loss, has_aux=True))(w, R.fold_in(R.key(0), 7), mine)
    if ranks > 1:
        parts = [torch.empty_like(dropped) for _ in range(ranks)]
        dist.all_gather(parts, dropped)
        dropped = torch.cat(parts)
        dist.all_reduce(value)
        dist.all_reduce(grad)
    return dropped, value, grad


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_draws_the_same(ranks, tmp_path):
    command = [sys.executable, __file__, str(tmp_path), str(ranks)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(ranks)]
    assert [process.wait(120) for process in running] == [0] * ranks
    expected = global_result(0, 1)
    for rank in range(ranks):
        dropped, value, grad = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(dropped, expected[0])
        assert torch.allclose(value, expected[1], rtol=1e-12) and torch.allclose(grad, expected[2], rtol=1e-12)


if __name__ == "__main__":
    folder, ranks, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    torch.save(global_result(rank, ranks), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of Gloo that still waits for the interpreter's lock would end the process with SIGABRT
