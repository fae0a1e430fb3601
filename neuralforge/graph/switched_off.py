"""Settings of the whole process that are off for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class SwitchedOff:
    """A setting that is off while any thread is within, and then again what it was before the first one."""

    def __init__(self, get: Callable[[], bool], put: Callable[[bool], Any]):
        self.get, self.put = get, put
        self.within, self.before, self.lock = 0, False, threading.Lock()

    def __enter__(self) -> None:
        with self.lock:
            if not self.within:
                self.before = self.get()
                self.put(False)
            self.within += 1

    def __exit__(self, *error: Any) -> None:
        with self.lock:
            self.within -= 1
            if not self.within:
                self.put(self.before)
