"""What a warm-up reports while it runs; a base class that says nothing."""

from __future__ import annotations

__all__ = ["Progress"]


class Progress:
    """Override what is of interest. Called from the tuning thread, between measurements, never during one."""

    def begin(self, problem: str, index: int, total: int) -> None:
        """Problem number ``index`` (from 0) of ``total`` starts; one known from the store is not begun."""

    def stage(self, name: str, steps: int) -> None:
        """Within a problem: ``compile``, ``first calls``, ``gate``, ``screen`` or ``race`` starts.

        It has at most so many steps.
        """

    def advance(self, detail: str) -> None:
        """One step of the stage is done; ``detail`` is a short line about it."""

    def end(self, problem: str, outcome: str, seconds: float) -> None:
        """The problem is done; ``outcome`` names the winner, or why there is none."""

    def note(self, text: str) -> None:
        """Something worth a line of its own: a respawned worker, a resumed run, a disturbed machine."""
