"""Collectives of torch.distributed in jitted functions, by real processes."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.distributed.nn.functional as distributed_nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import neuralforge as nf
from neuralforge.errors import CaptureError, DifferentiationError

RANKS = 2


def in_place(rank):
    """What writes in its own time, or happens at the capture alone, is refused."""

    def gathered(x):
        out = [torch.empty_like(x) for _ in range(RANKS)]
        dist.all_gather(out, x)
        return torch.stack(out)

    def reduced(x):
        y = x * 2
        dist.all_reduce(y)
        return y

    def sent(x):
        dist.send(x, 1 - rank)
        return x

    def barrier(x):
        dist.barrier()
        return x

    for f in (gathered, reduced, sent, barrier):
        with pytest.raises(CaptureError, match=r"test_collectives\.py:\d+: c10d\.\w+ of torch.distributed.*_functional_collectives"):
            nf.jit(f)(torch.ones(3))


def unused(rank):
    def f(x):
        total = fc.all_reduce(x.sum(), "sum", dist.group.WORLD)
        return (x * 2, total) if rank == 0 else x * 2

    for n in range(3):
        found = nf.jit(f)(torch.full((2,), float(n + rank)))
        assert rank or found[1] == 4 * n + 2


def equal_on_one_rank(rank):
    @nf.jit
    def f(x):
        first = fc.all_reduce(x, "sum", dist.group.WORLD)
        return first, fc.all_reduce(x + 1 if rank else x, "sum", dist.group.WORLD)

    for n in range(3):
        first, second = f(torch.full((2,), float(n)))
        assert (first == 2 * n).all() and (second == 2 * n + 1).all()


def of_a_constant(rank):
    @nf.jit
    def f(x):
        return x / fc.all_reduce(torch.ones(()), "sum", dist.group.WORLD)

    for n in (3, 3 + rank, 3):  # the second is another form to compile on one rank
        assert f(torch.ones(n)).eq(1 / RANKS).all()


def waited_for_late(rank):
    """Meanwhile the collective reads what it was given: that memory isn't used for other things."""
    c10d, name = torch.ops._c10d_functional, dist.group.WORLD.group_name

    def f(x):
        parts = [x.shape[0] // RANKS] * RANKS
        started = c10d.all_to_all_single(x * 2, parts, parts, name)
        for _ in range(4):
            x = x.sin() * 3
            x = x - x.mean(0)
        return c10d.wait_tensor(started) * 1.5, x

    jitted = nf.jit(f)
    for n in range(10):
        x = torch.randn(1024, 512, generator=torch.Generator().manual_seed(2 * n + rank))
        for found, expected in zip(jitted(x), f(x)):
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def parts(rank, world):
    """A function of each of the collectives; of that which torch.autograd doesn't differentiate, another one for it too."""
    split = [1, 3] if rank == 0 else [2, 2]
    received = [1, 2] if rank == 0 else [3, 2]

    def coalesced(x):
        a, b = fc.all_reduce_coalesced([x, x.sin()], "sum", world)
        (c,) = fc.all_gather_into_tensor_coalesced([a * x], world)
        (d,) = fc.reduce_scatter_tensor_coalesced([c * c], "sum", [0], world)
        return d + fc.all_gather_into_tensor_coalesced([x, b.cos()], world)[0][: len(x)]

    return {
        "all_reduce": lambda x: fc.all_reduce(x * x, "sum", world),
        "all_gather": lambda x: fc.all_gather_tensor(x.sin(), 0, world),
        "all_gather along columns": lambda x: fc.all_gather_tensor(x.sin(), 1, world),
        "reduce_scatter": lambda x: fc.reduce_scatter_tensor(x * x, "sum", 0, world),
        "reduce_scatter along columns": lambda x: fc.reduce_scatter_tensor(x * x, "sum", 1, world),
        "all_to_all": lambda x: fc.all_to_all_single(x * x, received, split, world),
        "coalesced": coalesced,
        "twice": lambda x: fc.all_gather_tensor(x * fc.all_reduce(x.mean(1, keepdim=True), "sum", world), 0, world),
        "broadcast": (lambda x: fc.broadcast(x * x, 1, world), lambda x: distributed_nn.broadcast((x * x).contiguous(), 1)),
    }


def derivatives(rank):
    for name, f in parts(rank, dist.group.WORLD).items():
        f, truth = f if isinstance(f, tuple) else (f, f)
        x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        loss = lambda x, f=f: (f(x).sin() * (rank + 1)).sum()
        expected = loss(x, truth)
        expected.backward()
        for value_and_grad in (nf.value_and_grad(loss), jitted := nf.jit(nf.value_and_grad(loss))):
            for _ in range(2):
                torch.testing.assert_close(value_and_grad(x.detach()), (expected.detach(), x.grad), msg=name)
        assert "c10d_functional" in str(jitted.programs[0].graph)
        again = x.detach().clone().requires_grad_()
        nf.jit(loss)(again).backward()  # by torch.autograd
        torch.testing.assert_close(again.grad, x.grad, msg=name)
        v = torch.ones_like(again)
        pushed = nf.jit(lambda x, loss=loss: nf.jvp(lambda x: fc.all_reduce(loss(x), "sum", dist.group.WORLD), (x,), (v,))[1])
        slope = fc.all_reduce((x.grad * v).sum(), "sum", dist.group.WORLD)
        torch.testing.assert_close(pushed(x.detach()), slope.wait(), msg=name)
        seconds = lambda x, loss=loss: nf.hvp(loss, (x,), (torch.ones_like(x),))
        torch.testing.assert_close(nf.jit(seconds)(x.detach()), seconds(x.detach()), msg=name)
    with pytest.raises(DifferentiationError, match=r"test_collectives\.py:\d+: a collective that reduces by 'max'.*all_gather_tensor"):
        nf.jit(nf.grad(lambda x: fc.all_reduce(x, "max", dist.group.WORLD).sum()))(torch.ones(2))


def spread_parameters(rank):
    """What PyTorch's wrappers do in hooks is refused, before they do it."""
    mesh, x = init_device_mesh("cpu", (RANKS,)), torch.randn(2, 4)
    weight = distribute_tensor(torch.randn(4, 4), mesh, [Shard(0)])
    for f, given in ((lambda x: x * 2, weight), (lambda x: x @ weight, x)):
        with pytest.raises(CaptureError, match=r"test_collectives\.py:\d+: a DTensor.*to_local\(\)"):
            nf.jit(f)(given)
    net = lambda: torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    for model in (fully_shard(net(), mesh=mesh), torch.nn.parallel.DistributedDataParallel(net())):
        expected = model(x).detach()
        for f in (model, lambda x, model=model: model(x)):
            with pytest.raises(CaptureError, match="sends between ranks.*plain module"):
                nf.jit(f)(x)
        assert torch.equal(model(x), expected)


CASES = [in_place, unused, equal_on_one_rank, of_a_constant, waited_for_late, derivatives, spread_parameters]


def test_ranks(tmp_path):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([sys.executable, __file__, str(tmp_path), str(rank)], env=environment) for rank in range(RANKS)]
    assert [process.wait(120) for process in running] == [0] * RANKS


if __name__ == "__main__":
    folder, rank = sys.argv[1], int(sys.argv[2])
    patience = datetime.timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=patience)
    for case in CASES:
        case(rank)
    dist.barrier()
    os._exit(0)  # as in tests/test_random.py
