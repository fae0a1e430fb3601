import mmap

from neuralforge.bench import peak_resident_bytes, reset_peak, resident_bytes

SIZE = 64 << 20


def test_the_peak_outlives_what_made_it_until_it_is_reset():
    reset_peak()
    before = resident_bytes()
    with mmap.mmap(-1, SIZE) as block:  # not malloc, which may keep what is freed
        block.write(b"\1" * SIZE)
        assert resident_bytes() - before > 0.9 * SIZE
    assert peak_resident_bytes() - before > 0.9 * SIZE
    reset_peak()
    assert peak_resident_bytes() - before < 0.1 * SIZE
