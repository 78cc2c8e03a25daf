"""A fixed kernel timed with every block tells whether the machine changed under the race."""

from __future__ import annotations

import statistics

from .policy import RacePolicy

__all__ = ["Sentinel"]


class Sentinel:
    """Judges a block by its sentinel's time against the last kept blocks.

    Attributes: ``rebased``, how often the sentinel settled on a new level (above 0: throttled or shared).
    """

    def __init__(self, policy: RacePolicy) -> None:
        self._policy = policy
        self._window: list[float] = []
        self._in_a_row = 0
        self.rebased = 0

    def steady(self, seconds: float) -> bool:
        """Does the block with this sentinel time count? False: the clock moved within or just before it."""
        if self._window:
            moved = abs(seconds / statistics.median(self._window) - 1.0)
            if moved > self._policy.sentinel_drift:
                if self._in_a_row < self._policy.max_disturbed_in_row:
                    self._in_a_row += 1
                    return False
                self._window.clear()  # it stays there: the new steady state
                self.rebased += 1
        self._in_a_row = 0
        self._window = [*self._window, seconds][-self._policy.sentinel_window :]
        return True
