"""Memory: planning buffers into one arena, keeping the allocator from giving pages back, pausing Python's collector."""

from .arena import ALIGNMENT, Arena, Buffer, assign_offsets
from .collector import paused_collector
from .malloc import give_pages_back, keep_pages

__all__ = ["ALIGNMENT", "Arena", "Buffer", "assign_offsets", "give_pages_back", "keep_pages", "paused_collector"]
