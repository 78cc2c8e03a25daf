"""What a backend is: a predicate, a list of configs, and a way to bind one of them to a problem."""

from __future__ import annotations

import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from .decision import Verdict

__all__ = [
    "Backend",
    "Chunked",
    "Config",
    "Pinnable",
    "PinnableByLayout",
    "Pinned",
    "PinnedByLayout",
    "Runner",
    "Scalar",
    "fingerprint_files",
    "pin",
    "pin_by_layout",
    "works_in_chunks",
]

Scalar = int | float | bool | str

#: A bound kernel: takes the op's canonical arguments record and returns the output tensor. It writes into
#: ``args.out`` when that is set (it always is, unless inputs require grad) and returns it.
Runner = Callable[[Any], Any]

#: A runner pinned to one call's shapes: takes that call's tensors in the op's declared order (None where absent, the
#: output among them) and runs. Returns nothing; the output is written.
Pinned = Callable[[tuple[Any, ...]], None]

#: The same for calls that need their lengths: it takes the batch's SequenceLayout as well.
PinnedByLayout = Callable[[tuple[Any, ...], Any], None]


@dataclass(frozen=True, slots=True)
class Chunked:
    """An evaluation in chunks that differs from float32 sums over chunks of a sequence, one after another.

    Attributes:
        tokens: of a chunk.
        rounded: products take bfloat16 operands; see ``Backend.accuracy``.
        cut: tokens of the segments that sequences are cut into, a multiple of ``tokens``, whose effects on the state
            are found apart and joined; 0 where sequences are whole. Some of them may be whole all the same.
    """

    tokens: int
    rounded: bool = False
    cut: int = 0


@runtime_checkable
class Pinnable(Protocol):
    """What a :data:`Runner` may also offer, so that a repeated call costs no more than its pointers."""

    def pin(self, call: Any) -> Pinned | None:
        """The runner for calls like ``call``: every tensor's shape, strides, dtype and device, every scalar and the
        launch mode are the same; only addresses and contents differ, the values of lengths and slots among them.

        Runs and writes nothing. None if such calls need more than their tensors (host lengths, say).
        """


@runtime_checkable
class PinnableByLayout(Protocol):
    """What a :data:`Runner` may also offer whose calls need their lengths."""

    def pin_by_layout(self, call: Any) -> PinnedByLayout | None:
        """The runner for calls like ``call``, which has a SequenceLayout: as for ``Pinnable.pin``, and theirs have as
        many sequences and a profile of lengths that the runner was bound for.

        Runs and writes nothing, and keeps no tensor alive. None where a call is needed as a whole.
        """


def pin(runner: object, call: Any) -> Pinned | None:
    """The runner pinned to calls like ``call``, which has its output; None where it cannot be (:class:`Pinnable`)."""
    # To ask whether something has a Protocol's method takes 15 us.
    offered: Callable[[Any], Pinned | None] | None = getattr(runner, "pin", None)
    return None if call.out is None or offered is None else offered(call)


def pin_by_layout(runner: object, call: Any) -> PinnedByLayout | None:
    """The same for calls that have a SequenceLayout, of a runner that needs it (see :class:`PinnableByLayout`)."""
    if call.out is None or getattr(call, "layout", None) is None:
        return None
    offered: Callable[[Any], PinnedByLayout | None] | None = getattr(runner, "pin_by_layout", None)
    return None if offered is None else offered(call)


@dataclass(frozen=True, slots=True)
class Config:
    """One setting of a backend: named scalars, hashable, ordered by name."""

    items: tuple[tuple[str, Scalar], ...] = ()

    @classmethod
    def of(cls, **values: Scalar) -> Config:
        return cls(tuple(sorted(values.items())))

    @classmethod
    def from_dict(cls, values: Mapping[str, Scalar]) -> Config:
        return cls(tuple(sorted(values.items())))

    def to_dict(self) -> dict[str, Scalar]:
        return dict(self.items)

    def __getitem__(self, name: str) -> Scalar:
        for key, value in self.items:
            if key == name:
                return value
        raise KeyError(name)

    @property
    def label(self) -> str:
        """``"chunk=64,v_tile=32"``; ``"default"`` when there is nothing to set."""
        return ",".join(f"{k}={v}" for k, v in self.items) or "default"


def fingerprint_files(files: Iterable[Path], extra: Mapping[str, str] | None = None) -> str:
    """SHA-256 (16 hex digits) over the named files' contents, in order, and ``extra`` (library versions)."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    digest.update(json.dumps(dict(extra or {}), sort_keys=True).encode())
    return digest.hexdigest()[:16]


class Backend(ABC):
    """One implementation of one op.

    Subclasses live in modules that import no optional framework at import time; ``bind`` does that.

    Attributes:
        op: name of the op implemented.
        name: unique among the op's backends.
        provenance: what it is written in (``torch``, ``triton``, ``cupy``, ``numba``, ``external``), not where it runs.
        requires: importable modules it needs; a missing one is a ``NOT_INSTALLED`` rejection, no import tried.
        tags: promises tested by the conformance suite: ``repeatable``, ``differentiable``,
            ``batch_invariant`` (packing changes no bit), ``capture_safe``.
        priority: place in the heuristic order; higher first. The reference is 0.
        accuracy: which error bound the op's reference gives it: float32 token by token (``recurrent``) or in chunks of
            the config's ``chunk`` tokens (``chunked``), or such chunks whose products take bfloat16 operands
            (``rounded``).
        cuts: configs have a ``cut``: tokens of the segments that sequences are cut into, which the bound is made for;
            0 in one that leaves them whole.
        exceptions_file: path of the TOML file declaring reasoned exceptions from conformance checks, if any.
    """

    op: ClassVar[str]
    name: ClassVar[str]
    provenance: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    tags: ClassVar[frozenset[str]] = frozenset()
    priority: ClassVar[int] = 10
    accuracy: ClassVar[str] = "recurrent"
    cuts: ClassVar[bool] = False
    exceptions_file: ClassVar[str | None] = None

    def rank(self, problem: Any) -> int:
        """Place in the heuristic order for ``problem``: higher first. Used only where nothing is tuned."""
        return self.priority

    @abstractmethod
    def check(self, problem: Any) -> Verdict:
        """Whether this backend honours every argument of ``problem``. Pure; no imports, no device access."""

    def configs(self, problem: Any) -> Sequence[Config]:
        """The settings worth trying on ``problem``; the first is the heuristic default. Never empty."""
        return (Config(),)

    def hopeless(self, problem: Any) -> str | None:
        """Why it need not be tried on ``problem``, though it can do it: it is known to lose there, and by far.

        Spares the tuner compiling and timing it; dispatch does not ask. None where it may win.
        """
        return None

    @abstractmethod
    def bind(self, problem: Any, config: Config) -> Runner:
        """Compile, or look up, the kernel for ``problem`` and ``config``. Not called on the hot path."""

    def compile(self, problem: Any, config: Config) -> None:
        """Compile what :meth:`bind` would, and leave it where that finds it. Needs no device, and touches none.

        Called in processes that do nothing else, before anything is measured. A backend whose kernels cannot be kept
        has nothing to do here. May raise what :meth:`bind` may.
        """
        return

    def sources(self) -> Sequence[Path]:
        """Files whose contents decide what the kernel does (helpers included); feeds the fingerprint."""
        return (Path(inspect.getfile(type(self))),)

    def shared_sources(self) -> Sequence[Path]:
        """Those of :meth:`sources` that belong to no kernel: how all of them are launched, say.

        They decide whether a call is right, and cost all backends alike that share them: what was measured with others
        still says which is faster.
        """
        return ()

    def toolchain(self) -> Mapping[str, str]:
        """Versions of what compiles the kernel, by name, without importing it.

        May raise ``importlib.metadata.PackageNotFoundError``: then nothing here compiles it.
        """
        return {}

    def parts(self) -> Mapping[str, Backend]:
        """The other backends of the op that it may run, by name; its fingerprint changes with theirs."""
        return {}

    def source_fingerprint(self) -> str:
        """Changes with the kernel's own source alone, whatever compiles and launches it.

        Shipped tables are read by it: they were measured with other versions of the toolchain than are installed, and
        a change that all backends share does not make them stale, as it does what a machine has measured itself.
        """
        shared = set(self.shared_sources())
        own = [file for file in self.sources() if file not in shared]
        return fingerprint_files(own, {n: b.source_fingerprint() for n, b in self.parts().items()})

    def fingerprint(self) -> str:
        """Changes whenever the kernel could have: stored beside its samples, checked before they are reused."""
        from importlib.metadata import PackageNotFoundError  # 25 ms to import: not paid by a bare import of isokern

        try:
            versions = self.toolchain()
        except PackageNotFoundError as error:
            versions = {str(error.name): "not installed"}  # it is registered all the same, and declines
        return fingerprint_files(self.sources(), versions)


def works_in_chunks(backend: Backend) -> bool:
    """Whether its error bound is one of chunked forms: its configs then say how long a ``chunk`` is."""
    return getattr(backend, "accuracy", "recurrent") in ("chunked", "rounded")
