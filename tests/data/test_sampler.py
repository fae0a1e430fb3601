from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuralforge.data import Sampler, TokenFile, validation_batches
from neuralforge.data.sampler import permute
from neuralforge.errors import ConfigError, DataError


@pytest.fixture
def tokens(tmp_path):
    """Makes a token file whose ids count up, so that a row says where it is from."""

    def make(count: int) -> TokenFile:
        np.arange(count, dtype="<u2").tofile(tmp_path / f"{count}.bin")
        return TokenFile(tmp_path / f"{count}.bin", "uint16", count, 4 * count, 1, count)

    return make


@settings(deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_it_is_a_permutation(n, key):
    out = permute(np.arange(n, dtype=np.uint64), n, np.full(n, key, np.uint64))
    assert np.array_equal(np.sort(out), np.arange(n))


def test_the_permutation_is_random_enough():
    n = 5000
    out = permute(np.arange(n, dtype=np.uint64), n, np.full(n, 7, np.uint64)).astype(float)
    other = permute(np.arange(n, dtype=np.uint64), n, np.full(n, 8, np.uint64)).astype(float)
    for a, b in ((np.arange(n), out), (out[:-1], out[1:]), (out, other)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.06  # four standard deviations
    counts = np.zeros((4, 4))  # each of four things comes to each place about equally often
    for key in range(4000):
        row = permute(np.arange(4, dtype=np.uint64), 4, np.full(4, key, np.uint64)).astype(int)
        counts[np.arange(4), row] += 1
    assert abs(counts - 1000).max() < 150


def test_a_huge_range_needs_no_table():
    n = 10**12
    out = permute(np.arange(1000, dtype=np.uint64), n, np.full(1000, 3, np.uint64))
    assert len(set(out.tolist())) == 1000 and out.max() < n


def test_shape_and_contents(tokens):
    batch = Sampler(tokens(1000), 8, 16).at(0)["tokens"]
    assert batch.dtype == torch.int64 and batch.shape == (8, 17)
    assert torch.equal(batch, batch[:, :1] + torch.arange(17))
    assert (batch[:, 0] % 16 == 0).all()


@pytest.mark.parametrize("count, batch, context", [(1000, 8, 16), (1001, 3, 10), (65, 4, 16), (17, 1, 16)])
def test_every_window_once_an_epoch_in_a_new_order(tokens, count, batch, context):
    sampler = Sampler(tokens(count), batch, context, seed=5)
    windows = (count - 1) // context
    rows = torch.cat([next(sampler)["tokens"] for _ in range(3 * windows)])
    starts = rows[:3 * windows, 0].view(3, windows)
    every = torch.arange(windows) * context
    assert all(torch.equal(epoch.sort().values, every) for epoch in starts)
    if windows > 10:
        assert not torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], every)


def test_the_seed_decides(tokens):
    file = tokens(1000)
    first, again, other = (Sampler(file, 8, 16, seed).at(3)["tokens"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert Sampler(file, 8, 16, seed=-1).at(0)["tokens"].shape == (8, 17)


def test_the_order_never_changes(tokens):
    """Pinned: a run must resume on another machine and with another version of numpy."""
    starts = Sampler(tokens(1000), 6, 16, seed=1).at(20)["tokens"][:, 0]
    assert starts.tolist() == [432, 800, 448, 864, 304, 896]


def test_resuming(tokens):
    file = tokens(1000)
    sampler = Sampler(file, 8, 16, seed=1)
    for _ in range(11):
        next(sampler)
    state = sampler.state_dict()
    ahead = [next(sampler)["tokens"] for _ in range(5)]
    resumed = Sampler(file, 8, 16, seed=1)
    resumed.load_state_dict(state)
    assert resumed.epoch == pytest.approx(88 / 62)
    assert all(torch.equal(a, next(resumed)["tokens"]) for a in ahead)


@pytest.mark.parametrize("change, says", [
    ({"seed": 2}, "seed was 1, now it is 2"),
    ({"batch": 4}, "batch was 8"),
    ({"context": 8}, "context was 16"),
    ({"count": 999}, "tokens was 1000"),
])
def test_resuming_something_else_is_refused(tokens, change, says):
    state = Sampler(tokens(1000), 8, 16, seed=1).state_dict()
    settings = {"count": 1000, "batch": 8, "context": 16, "seed": 1} | change
    with pytest.raises(DataError, match=says):
        Sampler(tokens(settings.pop("count")), **settings).load_state_dict(state)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_same_batches(tokens, world_size):
    file = tokens(1000)
    whole = Sampler(file, 8, 16, seed=1)
    ranks = [Sampler(file, 8, 16, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 7, 8):  # step 7 crosses into the second epoch
        parts = torch.cat([rank.at(step)["tokens"] for rank in ranks])
        assert torch.equal(parts, whole.at(step)["tokens"])


def test_wrong_sizes(tokens):
    with pytest.raises(DataError, match="8 x 16 tokens need 129, .*100.bin has 100. .* a batch of at most 6"):
        Sampler(tokens(100), 8, 16)
    with pytest.raises(DataError, match="2 x 512 tokens need 1025, .* has 100. .* a context of at most 49"):
        Sampler(tokens(100), 2, 512)
    Sampler(tokens(100), 6, 16), Sampler(tokens(100), 2, 49)  # what the errors advise is right
    with pytest.raises(ConfigError, match="a batch of 6: .* multiple of the number of ranks, such as 8"):
        Sampler(tokens(1000), 6, 16, rank=0, world_size=4)
    with pytest.raises(ConfigError, match="both must be at least 1"):
        Sampler(tokens(1000), 0, 16)
    with pytest.raises(ConfigError, match="world_size=0; expected at least 1"):
        Sampler(tokens(1000), 8, 16, world_size=0)


def test_validation_goes_through_the_text_in_order(tokens):
    rows = torch.cat([batch["tokens"] for batch in validation_batches(tokens(1000), 8, 16)])
    assert rows.shape == (56, 17) and torch.equal(rows, rows[:, :1] + torch.arange(17))
    assert (rows[1:, 0] > rows[:-1, 0]).all() and rows[0, 0] == 0 and rows[-1, 0] > 900


def test_validation_with_a_limit_is_spread_over_the_text(tokens):
    rows = torch.cat([batch["tokens"] for batch in validation_batches(tokens(1000), 4, 16, limit=2)])[:, 0]
    assert len(rows) == 8 and rows[0] == 0 and rows[-1] > 800 and (rows[1:] - rows[:-1] > 90).all()


def test_a_short_validation_text_gives_one_smaller_batch(tokens):
    (batch,) = validation_batches(tokens(100), 8, 16)
    assert batch["tokens"].shape == (6, 17)
    with pytest.raises(DataError, match="shorter than one window: .* 16 tokens, a context of 16 needs 17"):
        validation_batches(tokens(16), 8, 16)


def test_it_reads_only_what_it_needs(tmp_path):
    """A file of 200 GB that is nearly all hole: no array of its size may be made."""
    count = 10**11
    path = Path(tmp_path / "sparse.bin")
    with open(path, "wb") as file:
        file.truncate(2 * count)
    batch = Sampler(TokenFile(path, "uint16", count, count, 1, 0), 4, 1024).at(10**6)["tokens"]
    assert batch.shape == (4, 1025) and batch.sum() == 0
