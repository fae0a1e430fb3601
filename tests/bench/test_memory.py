import mmap

import torch

from neuralforge.bench import peak_resident_bytes, peak_tensor_bytes, reset_peak, resident_bytes

SIZE = 64 << 20


def test_the_peak_outlives_what_made_it_until_it_is_reset():
    ones = b"\1" * SIZE
    reset_peak()
    before = resident_bytes()
    with mmap.mmap(-1, SIZE) as block:  # not malloc, which may keep what is freed
        block.write(ones)
        assert resident_bytes() - before > 0.9 * SIZE
    assert peak_resident_bytes() - before > 0.9 * SIZE
    reset_peak()
    assert peak_resident_bytes() - before < 0.1 * SIZE


def test_the_peak_of_tensors_counts_those_alive_at_once():
    def f():
        a = torch.empty(1 << 20, dtype=torch.uint8)
        b = a + a
        del a
        return b.to(torch.int16)

    assert 3 << 20 <= peak_tensor_bytes(f) < 3.01 * (1 << 20)
