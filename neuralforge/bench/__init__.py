"""Measuring: what the machine can do, and what a program does."""

from .memory import peak_resident_bytes, peak_tensor_bytes, reset_peak, resident_bytes
from .peak import Peak, arithmetic_peak, bandwidth, peak_flops, product_peak
from .stats import Timing, alternate, ratio_interval, timing_table

__all__ = [
    "Peak", "Timing", "alternate", "arithmetic_peak", "bandwidth", "peak_flops", "peak_resident_bytes", "peak_tensor_bytes",
    "product_peak", "ratio_interval", "reset_peak", "resident_bytes", "timing_table",
]  # fmt: skip
