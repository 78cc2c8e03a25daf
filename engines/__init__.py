"""CPU engines: programs that execute GPU languages on a CPU, watching addresses and schedules.

Each runs one built-in backend: its predicate, its configs, its argument packing and its kernel's source, on CPU
tensors that are presented as an sm_90's. ``isokern verify`` and the tests use them where there is no GPU; dispatch
never does. Importing this package imports no engine and no framework.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..errors import IsokernError
from ..registry.plugins import load_attribute

if TYPE_CHECKING:
    from ..registry.backend import Backend
    from ..registry.conformance.subject import Engine

__all__ = ["ENGINES", "EngineInfo", "MissingEngineError", "engine_for", "load_engine"]


class MissingEngineError(IsokernError, RuntimeError):
    """An engine lacks something it needs; the message says what, and how to install it."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """One engine, before anything of it is imported.

    Attributes:
        name: as reports give it.
        backend: name of the built-in backend it executes; implementation: that backend's ``module:class``.
        loader: ``module:function`` that returns the backend as it looks inside the engine, and the engine.
        modules: importable modules it needs; programs: executables it needs on the path.
    """

    name: str
    backend: str
    implementation: str
    loader: str
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()

    def missing(self) -> tuple[str, ...]:
        """What it needs and is not there; nothing is imported to find out."""
        modules = (m for m in self.modules if importlib.util.find_spec(m) is None)
        return (*modules, *(p for p in self.programs if shutil.which(p) is None))

    def require(self) -> None:
        """Raises MissingEngineError unless everything it needs is there."""
        missing = self.missing()
        if missing:
            programs = [name for name in missing if name in self.programs]
            advice = ["pip install 'isokern[engines]'"] if set(missing) - set(programs) else []
            advice += [f"install {' and '.join(programs)} with the system's package manager"] if programs else []
            raise MissingEngineError(
                f"the CPU engine of backend {self.backend!r} needs {', '.join(missing)}: {'; '.join(advice)}"
            )


#: The engine of each GPU backend that comes with isokern, by the backend's name.
ENGINES: Mapping[str, EngineInfo] = MappingProxyType(
    {
        info.backend: info
        for info in (
            EngineInfo(
                "cuda_on_cpu",
                "cupy",
                "isokern.backends.cupy.backend:Cupy",
                "isokern.engines.cuda_on_cpu.backend:load",
                programs=("g++",),
            ),
            EngineInfo(
                "cuda_on_cpu",
                "cupy_chunked",
                "isokern.backends.cupy_chunked.backend:CupyChunked",
                "isokern.engines.cuda_on_cpu.chunked:load",
                programs=("g++",),
            ),
            EngineInfo(
                "cuda_on_cpu",
                "cupy_chunked_bf16",
                "isokern.backends.cupy_chunked.backend:CupyChunkedBf16",
                "isokern.engines.cuda_on_cpu.chunked:load_bf16",
                programs=("g++",),
            ),
            EngineInfo(
                "cuda_on_cpu",
                "cupy_cut",
                "isokern.backends.cupy_chunked.backend:CupyCut",
                "isokern.engines.cuda_on_cpu.chunked:load_cut",
                programs=("g++",),
            ),
            EngineInfo(
                "cuda_on_cpu",
                "cupy_cut_bf16",
                "isokern.backends.cupy_chunked.backend:CupyCutBf16",
                "isokern.engines.cuda_on_cpu.chunked:load_cut_bf16",
                programs=("g++",),
            ),
            EngineInfo(
                "cuda_on_cpu",
                "composite_bf16",
                "isokern.backends.composite.backend:CompositeBf16",
                "isokern.engines.cuda_on_cpu.composite:load",
                programs=("g++",),
            ),
            EngineInfo(
                "triton_interpreter",
                "triton",
                "isokern.backends.triton.backend:Triton",
                "isokern.engines.triton_interpreter.engine:load",
                modules=("triton",),
            ),
            EngineInfo(
                "triton_interpreter",
                "triton_chunked",
                "isokern.backends.triton_chunked.backend:TritonChunked",
                "isokern.engines.triton_interpreter.chunked:load",
                modules=("triton",),
            ),
            EngineInfo(
                "numba_simulator",
                "numba_cuda",
                "isokern.backends.numba_cuda.backend:NumbaCuda",
                "isokern.engines.numba_simulator.engine:load",
                modules=("numba", "numba_cuda", "greenlet"),
            ),
        )
    }
)


def engine_for(backend: Backend | str) -> EngineInfo | None:
    """The engine that executes a backend on a CPU, None if there is none.

    A registered backend that only bears a built-in one's name has none.
    """
    if isinstance(backend, str):
        return ENGINES.get(backend)
    info = ENGINES.get(backend.name)
    kind = type(backend)
    return info if info is not None and info.implementation == f"{kind.__module__}:{kind.__qualname__}" else None


def load_engine(name: str) -> tuple[Backend, Engine]:
    """The backend ``name`` as it looks inside its engine, and the engine. Once per process: see ``session``.

    Raises:
        MissingEngineError: something it needs is not installed.
        KeyError: there is no engine for this backend.
    """
    info = ENGINES[name]
    info.require()
    loaded: tuple[Backend, Engine] = load_attribute(info.loader)()
    return loaded
