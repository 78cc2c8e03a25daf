"""Subject: one backend under examination; the only place where the suite calls a backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from ..backend import Backend, Chunked, Config, Runner, works_in_chunks
from ..decision import Accepted, RejectCode, Rejected, Verdict
from .check import BackendRaised, Check, Declined, Needs, PredicateFault, Violation
from .exceptions import NO_EXCEPTIONS, Exceptions

__all__ = ["CanonicalCall", "Engine", "Subject", "chunk_of"]


class CanonicalCall(Protocol):
    """What the suite needs of an op's canonical call."""

    out: torch.Tensor | None

    def problem(self) -> Any:
        """The frozen, hashable description that predicates and configs see."""


class Engine(Protocol):
    """Executes a GPU language on a CPU, watching what the kernel does; serves the checks with ``needs="engine"``."""

    name: str

    def watch_addresses(self, tensors: Mapping[str, torch.Tensor]) -> AbstractContextManager[None]:
        """While active, an access outside ``tensors`` raises Violation."""

    def schedules(self) -> Iterator[tuple[str, Callable[[], AbstractContextManager[None]]]]:
        """Thread schedules by name; results must not depend on them."""


def chunk_of(backend: Backend, config: Config) -> int | Chunked | None:
    """What the op's reference is given as ``chunk`` for results of a backend and config.

    Raises:
        PredicateFault: it should have a chunk, or a cut, and the config names none.
    """
    if not works_in_chunks(backend):
        return None
    tokens = _named(backend, config, "chunk")
    rounded, cut = backend.accuracy == "rounded", _named(backend, config, "cut") if _cuts(backend) else 0
    return Chunked(tokens, rounded, cut) if rounded or cut else tokens


def _cuts(backend: Backend) -> bool:
    return getattr(backend, "cuts", False)


def _named(backend: Backend, config: Config, what: str) -> int:
    try:
        return int(config[what])
    except KeyError:
        kind = "a backend that cuts sequences" if what == "cut" else f"accuracy {backend.accuracy!r}"
        raise PredicateFault(f"{kind} needs a {what}, config [{config.label}] has none") from None


class Subject:
    """A backend, one of its configs (or its default for each problem), and what it was granted.

    Attributes:
        backend, config: ``config=None`` takes ``backend.configs(problem)[0]`` for each problem.
        device: where the cases' tensors live.
        exceptions: relations the backend's exceptions file relaxes.
        peers: other backends of the op, for checks that hand state from one to another.
        engine: set when the backend runs inside one.
        launches: how many times the backend's runner was called.
    """

    def __init__(
        self,
        backend: Backend,
        config: Config | None = None,
        *,
        device: torch.device | str = "cpu",
        exceptions: Exceptions = NO_EXCEPTIONS,
        peers: Sequence[Backend] = (),
        engine: Engine | None = None,
    ) -> None:
        self.backend = backend
        self.config = config
        self.device = torch.device(device)
        self.exceptions = exceptions
        self.peers = tuple(peer for peer in peers if peer.name != backend.name)
        self.engine = engine
        self.launches = 0
        self._runners: dict[tuple[Any, Config], Runner] = {}
        self._relaxed: set[str] = set()

    def has(self, needs: Needs) -> bool:
        """Whether a check with these needs can run on this subject."""
        match needs:
            case Needs.CPU:
                return self.device.type == "cpu" and self.engine is None
            case Needs.HOST:
                return self.device.type == "cpu"
            case Needs.GPU:
                return self.device.type == "cuda"
            case Needs.ENGINE:
                return self.engine is not None
            case _:
                return True

    def with_config(self, config: Config | None) -> Subject:
        """The same backend under another config."""
        return Subject(
            self.backend,
            config,
            device=self.device,
            exceptions=self.exceptions,
            peers=self.peers,
            engine=self.engine,
        )

    def relax(self, check: str) -> float | None:
        """The ratio to hold unequal results of ``check`` to; None where bits must be equal (the rule).

        Noted, so that an exception that no result needs is reported.
        """
        limit = self.exceptions.limit(check)
        if limit is not None:
            self._relaxed.add(check)
        return limit

    def was_relaxed(self, check: str) -> bool:
        """Whether some result needed the exception for ``check``."""
        return check in self._relaxed

    def verdict(self, problem: Any) -> Verdict:
        """The predicate's answer, asked twice.

        Raises:
            PredicateFault: it raised, returned something else, or changed its mind.
        """
        first, second = self._ask(problem), self._ask(problem)
        if first != second:
            raise PredicateFault(f"check() answers the same problem in two ways: {first}, then {second}")
        return first

    def _ask(self, problem: Any) -> Verdict:
        try:
            verdict = self.backend.check(problem)
        except Exception as error:
            raise PredicateFault(f"check() raised {type(error).__name__}: {error}") from error
        if not isinstance(verdict, (Accepted, Rejected)):
            raise PredicateFault(f"check() returned {verdict!r}, which is no verdict")
        return verdict

    def config_for(self, problem: Any) -> Config:
        """The config that runs ``problem``.

        Raises:
            Declined: by the predicate, or because the subject's config is not among the problem's.
        """
        verdict = self.verdict(problem)
        if isinstance(verdict, Rejected):
            raise Declined(verdict)
        try:
            offered = tuple(self.backend.configs(problem))
        except Exception as error:
            raise PredicateFault(f"configs() raised {type(error).__name__}: {error}") from error
        if not offered:
            raise PredicateFault("configs() is empty for a problem that check() accepts")
        if self.config is None:
            return offered[0]
        if self.config not in offered:
            raise Declined(Rejected(RejectCode.POLICY, f"config [{self.config.label}] is not offered for this problem"))
        return self.config

    def chunk(self, call: CanonicalCall) -> int | Chunked | None:
        """Chunk length of the error bound: the config's for backends that work in chunks, else None."""
        if not works_in_chunks(self.backend):
            return None
        return chunk_of(self.backend, self.config_for(call.problem()))

    def run(self, call: CanonicalCall, poison: float = math.nan) -> torch.Tensor:
        """Fill ``call.out`` with ``poison``, run the backend on ``call``, wait for it, return the output.

        Raises:
            Declined: the backend does not do this problem.
            BackendRaised: binding or running raised.
            Violation: what came back is not ``call.out`` (or no tensor of its own where that is None).
        """
        problem = call.problem()
        runner = self.runner(problem)
        expected = call.out
        if expected is not None:
            with torch.no_grad():
                expected.fill_(poison)
        self.launches += 1
        try:
            out = runner(call)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except Exception as error:
            raise BackendRaised("run", error) from error
        if type(out) is not torch.Tensor:
            raise Violation(f"the runner returned {type(out).__name__}, not a torch.Tensor")
        if expected is not None and (call.out is not expected or out.data_ptr() != expected.data_ptr()):
            raise Violation("the runner returned another tensor than the out= it was given")
        if expected is not None and (out.shape, out.dtype, out.stride()) != (
            expected.shape,
            expected.dtype,
            expected.stride(),
        ):
            raise Violation(
                f"the output is {out.dtype} {list(out.shape)}, out= was {expected.dtype} {list(expected.shape)}"
            )
        return out

    def runner(self, problem: Any) -> Runner:
        """The bound kernel; binds once per (problem, config). Raises as :meth:`run`."""
        config = self.config_for(problem)
        key = (problem, config)
        bound = self._runners.get(key)
        if bound is None:
            try:
                bound = self.backend.bind(problem, config)
            except Exception as error:
                raise BackendRaised("bind", error) from error
            self._runners[key] = bound
        return bound

    def may_relax(self, check: Check) -> bool:
        """False where the backend's own tag promises the relation bit for bit."""
        return check.promise is None or check.promise not in self.backend.tags
