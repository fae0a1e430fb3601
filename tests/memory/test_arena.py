"""The arena planner: no two live buffers overlap, and the arena is no larger than it must be by much."""

from hypothesis import given
from hypothesis import strategies as st

from neuralforge.memory import ALIGNMENT, Buffer, assign_offsets

lifetimes = st.tuples(st.integers(0, 5000), st.integers(0, 30), st.integers(0, 10)).map(
    lambda t: Buffer(t[0], t[1], t[1] + t[2])
)


@given(st.lists(lifetimes, max_size=40))
def test_live_buffers_do_not_overlap(buffers):
    size = assign_offsets(buffers)
    for i, a in enumerate(buffers):
        assert a.offset % ALIGNMENT == 0 and a.offset + a.nbytes <= max(size, a.nbytes and size)
        for b in buffers[:i]:
            if a.first <= b.last and b.first <= a.last and a.nbytes and b.nbytes:
                assert a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset
    padded = lambda b: -(-b.nbytes // ALIGNMENT) * ALIGNMENT
    floor = max((sum(padded(b) for b in buffers if b.first <= t <= b.last) for t in range(41)), default=0)
    assert floor <= size <= sum(map(padded, buffers))


def test_memory_is_reused():
    chain = [Buffer(1000, i, i + 1) for i in range(100)]
    assert assign_offsets(chain) == 2 * 1024


def test_where_the_largest_first_waste_memory_another_order_is_taken():
    buffers = [Buffer(n * ALIGNMENT, first, last) for n, first, last in [(5, 3, 6), (3, 2, 2), (4, 0, 3), (4, 0, 2)]]
    assert assign_offsets(buffers) == 11 * ALIGNMENT, "as much as is in use at equation 2; largest first it would be 12"
