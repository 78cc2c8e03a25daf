"""Adapter: what backends that call another library have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import BackendFailedError
from ...registry.backend import Backend, Config, Runner
from ...registry.decision import Accepted, RejectCode, Rejected, Verdict
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .library import Library
from .limits import Limit

if TYPE_CHECKING:
    import torch

    from ...registry.ops.fused_sigmoid_gating.call import Call

__all__ = ["Adapter", "Run"]

#: Runs one non-empty call on the library; returns the output, which is ``call.out`` where that is set.
Run = Callable[["Call"], "torch.Tensor"]

_CAPTURE = "compiles, or copies lengths to the device, at a first call, which a CUDA graph capture cannot hold"
_KERNELS = Path(__file__).parents[1] / "triton" / "gates.py"


class Adapter(Backend):
    """A library's function as a backend: provenance ``external``, below every backend of isokern's own.

    Heuristics never choose it; the tuner may, for launches from the host. What it does around the function (gates,
    gathering and scattering states, copying the output) is part of its time.

    It ``requires`` the library, and nothing that a library depends on anyway: every decision asks for each module, and
    what is missing beyond that the import says in its own words.

    Attributes:
        library: what it calls. limits: what it declines, and why, in the order they are asked.
        note: the price of being called through the contract; shown by ``explain``.
    """

    op: ClassVar[str] = "fused_sigmoid_gating"
    provenance: ClassVar[str] = "external"
    tags: ClassVar[frozenset[str]] = frozenset({"repeatable"})
    priority: ClassVar[int] = -10
    library: ClassVar[Library]
    limits: ClassVar[tuple[Limit, ...]]
    note: ClassVar[str] = "compiles at its first call; its output is copied"

    def check(self, problem: Problem) -> Verdict:
        if problem.device != "cuda":
            return Rejected(RejectCode.DEVICE, f"runs on CUDA GPUs, the tensors are on {problem.device}")
        library = self.library
        if library.holds is False:
            text = f"{library.distribution} {library.version} is installed, the adapter is for {self.versions}"
            return Rejected(RejectCode.NOT_INSTALLED, text)
        if problem.mode == "graph":
            return Rejected(RejectCode.MODE, _CAPTURE)
        for limit in self.limits:
            if limit.applies(problem):
                return Rejected(limit.code, limit.reason)
        unstated = f"; {library.distribution} does not state its version" if library.holds is None else ""
        return Accepted(self.note + unstated)

    @property
    def versions(self) -> str:
        """The versions it holds for, as pip writes them."""
        return f">={self.library.since},<{self.library.before}"

    def shortcuts(self, problem: Problem) -> Sequence[Config]:
        """Settings that are right only if every slot is >= 0: what the library offers whoever knows that.

        Not among :meth:`configs`, so neither dispatch nor the tuner ever uses them; benchmarks do.
        """
        return ()

    @abstractmethod
    def runner(self, function: Callable[..., Any], problem: Problem, config: Config) -> Run:
        """The library's ``function`` bound to ``problem`` and ``config``; never given a call without tokens."""

    def bind(self, problem: Problem, config: Config) -> Runner:
        """Import the library. Raises BackendFailedError with what the import raised."""
        try:
            function = self.library.load()
        except Exception as error:  # whatever a library raises, on an unsupported GPU say, is passed on in its words
            raise self._failed(problem, config, "import", error) from error
        return _Bound(self, problem, config, self.runner(function, problem, config))

    def sources(self) -> Sequence[Path]:
        return (*sorted(Path(__file__).parent.glob("*.py")), _KERNELS)

    def toolchain(self) -> Mapping[str, str]:
        return {self.library.distribution: self.library.version or "unstated"}

    def _failed(self, problem: Problem, config: Config, stage: str, error: BaseException) -> BackendFailedError:
        words = f"{type(error).__name__}: {error}"
        return BackendFailedError(self.op, self.name, config.label, problem.label, stage, words)


class _Bound:
    """A bound adapter: calls without tokens do nothing, and what the library raises says whose words they are."""

    __slots__ = ("_adapter", "_config", "_problem", "_run")

    def __init__(self, adapter: Adapter, problem: Problem, config: Config, run: Run) -> None:
        self._adapter = adapter
        self._problem = problem
        self._config = config
        self._run = run

    def __call__(self, call: Call) -> torch.Tensor:
        import torch

        if not call.tokens or not call.n:
            return call.v.new_empty(call.v.shape, dtype=call.q.dtype) if call.out is None else call.out
        try:
            return self._run(call)
        except (torch.OutOfMemoryError, BackendFailedError):
            raise
        except Exception as error:  # compilers have error classes of their own
            raise self._adapter._failed(self._problem, self._config, "run", error) from error
