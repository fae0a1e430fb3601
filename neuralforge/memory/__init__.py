"""Memory: planning buffers into one arena, and keeping the allocator from giving pages back."""

from .arena import ALIGNMENT, Buffer, assign_offsets
from .malloc import keep_pages

__all__ = ["ALIGNMENT", "Buffer", "assign_offsets", "keep_pages"]
