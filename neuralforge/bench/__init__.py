"""Measuring: what the machine can do, and what a program does."""

from .peak import Peak, bandwidth, peak_flops

__all__ = ["Peak", "bandwidth", "peak_flops"]
