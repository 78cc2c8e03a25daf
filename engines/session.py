"""EngineSession: an engine in a process of its own, asked to run conformance checks.

Triton's interpreter must be chosen before Triton is imported and cannot share a process with its compiler; a kernel
that runs wild must not take the asking process with it. One session serves any number of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..registry.backend import Config
from ..registry.conformance.check import Finding, Tier
from ..registry.conformance.process import CheckProcess
from ..registry.conformance.report import Report
from . import ENGINES

__all__ = ["EngineSession"]


class EngineSession(CheckProcess):
    """Starts its process at the first request, and a new one after it died.

    Args:
        backend: name of a backend with an engine.

    Raises:
        MissingEngineError: at once, if the engine lacks something it needs.
    """

    def __init__(self, backend: str) -> None:
        self.info = ENGINES[backend]
        self.info.require()
        super().__init__(f"the engine {self.info.name}", "isokern.engines.serve", backend)

    def run_checks(
        self,
        only: Sequence[str] | None = None,
        tier: Tier = Tier.FAST,
        config: Config | None = None,
        on_progress: Callable[[Finding], None] | None = None,
    ) -> Report:
        """``registry.conformance.runner.run_checks`` over the backend, inside the engine.

        An engine that dies of a check makes an ``error`` finding, after those made until then.

        Raises:
            IsokernError: the request itself is wrong, or the process cannot be started.
        """
        values = None if config is None else config.to_dict()
        request = {"only": None if only is None else list(only), "tier": tier.value, "config": values}
        label = "default" if config is None else config.label
        blank = Report("fused_sigmoid_gating", self.info.backend, label, (), (), {}, {}, place=self.info.name)
        return self._report(request, blank, on_progress)
