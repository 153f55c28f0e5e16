"""What was computed before, by what it was computed from; in the host's memory, and not more than fits."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np


class Kept:
    """Arrays by digest; those that were not asked for longest are forgotten beyond `capacity` bytes.

    Several threads may use it.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.hits = 0
        self._arrays: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def get(self, digest: bytes) -> np.ndarray | None:
        """What was put, if it is there still."""
        with self._lock:
            found = self._arrays.get(digest)
            if found is not None:
                self._arrays.move_to_end(digest)
                self.hits += 1
            return found

    def put(self, digest: bytes, array: np.ndarray) -> None:
        """Keep an array; the last one put stays even where it is larger than all that may be kept."""
        with self._lock:
            if digest not in self._arrays:
                self._arrays[digest] = array
                self._size += array.nbytes
            while self._size > self.capacity and len(self._arrays) > 1:
                self._size -= self._arrays.popitem(last=False)[1].nbytes
