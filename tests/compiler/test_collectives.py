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

import neuralforge as nf
from neuralforge.errors import CaptureError

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


CASES = [in_place, unused, equal_on_one_rank, of_a_constant, waited_for_late]


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
