"""Compiling the kernel ahead: Triton's own rules say what it is specialised on, its compiler makes the machine code.

Triton specialises on what arguments are: a dtype, an integer of 1 or divisible by 16, an address divisible by 16. All
but the last follow from a call's shapes and strides and make up a :class:`Specialization`; for addresses there are two
kernels, one for tensors that are all aligned and one that assumes nothing.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from triton.runtime.jit import MockTensor, create_function_from_signature

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.call import TENSORS, Call
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from ..launch.compiler import Layout, Variant
from ..launch.cubins import cached, discard, file_of
from ..launch.image import Image
from ..launch.sketch import sketch
from .arguments import INTEGERS, REALS, TENSOR_OF, constants, grid, integers, options, reals, tiles
from .kernel import recurrent

__all__ = ["RECURRENT", "Form", "Specialization", "TritonCompiler", "parameter_bytes"]

#: Kinds of parameters: how they are packed. All are aligned to their size.
_PACKED = {"i32": "=i", "i64": "=q", "fp32": "=f", "pointer": "=q"}
#: Where Triton's kernels expect them: behind all parameters, scratch memory for programs and for a profiler.
_SCRATCH = ("pointer", "pointer")
_DIVISIBLE = [["tt.divisibility", 16]]
#: Tensors that are read element by element: their alignment makes no difference to any kernel.
_SCALARS = frozenset("A_log read_slots write_slots offsets step_rows parents b".split())
#: The same where gates are one per head.
_GATES = frozenset({"a", "dt_bias"})
#: The parameter for memory that the kernels of a chain share; torch allocates it, aligned.
_WORKSPACE = "workspace"


@dataclass(frozen=True, slots=True)
class Form:
    """A kernel and what it is given.

    Attributes:
        function: the Triton function. Its parameters are tensors of a Call, by their names or those of
            ``arguments.TENSOR_OF``, or ``workspace``; numbers; and constants.
        numbers: a call (with its output, if that is not the call's own) to its scalars and strides by name.
        constants, options: of a problem and config: compile-time arguments, and what the compiler is told.
        grid: programs for a call, which has tokens.
    """

    function: Any
    numbers: Callable[[Call, torch.Tensor], Mapping[str, int | float]]
    constants: Callable[[Problem, Config], Mapping[str, int | bool]]
    options: Callable[[Config], Mapping[str, int | bool]]
    grid: Callable[[Problem, Config, Call], tuple[int, int, int]]

    def tensors(self, call: Call, out: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """The tensors among its parameters; the workspace is none."""
        named = {name: TENSOR_OF[name] for name in self.function.arg_names if name in TENSOR_OF}
        return {name: out if name == "out" else getattr(call, tensor) for name, tensor in named.items()}


RECURRENT = Form(
    recurrent,
    lambda call, out: dict(zip((*REALS, *INTEGERS), (*reals(call), *integers(call, out)), strict=True)),
    constants,
    options,
    lambda problem, config, call: grid(tiles(problem, config), call.n, call.hv),
)


@dataclass(frozen=True, slots=True)
class Specialization:
    """What Triton specialises the kernel on, but for addresses.

    Attributes:
        types: of every parameter in the kernel's order, in Triton's words; ``constexpr`` for one that is compiled in.
        ones: indices of the integers that are 1. divisible: of those divisible by 16.
    """

    types: tuple[str, ...]
    ones: tuple[int, ...]
    divisible: tuple[int, ...]

    def kinds(self) -> tuple[str, ...]:
        """Of the parameters that are left, in order: keys of ``_PACKED``."""
        return tuple("pointer" if t.startswith("*") else t for t in self.types if t != "constexpr")


@dataclass(frozen=True, slots=True)
class TritonCompiler:
    """The kernels of one problem and config, for its architecture."""

    problem: Problem
    config: Config
    form: Form = RECURRENT

    def layout(self, call: Call) -> Layout:
        out = call.out
        if out is None:
            out = torch.empty(call.v.shape, dtype=call.q.dtype, device="meta")
        given, numbers = self.form.tensors(call, out), self.form.numbers(call, out)
        special = self._specialization(given, numbers)
        places, block = [], bytearray()
        shared: int | None = None
        for name, kind in zip(self._names, special.types, strict=True):
            if kind == "constexpr":
                continue
            pointer = kind.startswith("*")
            at = _append(block, "pointer" if pointer else kind, 0 if pointer else numbers[name])
            if name == _WORKSPACE:
                shared = at
            elif pointer:
                places.append((TENSORS.index(TENSOR_OF[name]), at))
        scratch = _append(block, _SCRATCH[0], 0)
        _append(block, _SCRATCH[1], 0)
        programs = self.form.grid(self.problem, self.config, call) if call.q.shape[1] else (0, 0, 0)
        vectors = [TENSORS.index(TENSOR_OF[name]) for name in given if given[name] is not None and self._wide(name)]
        where = scratch if shared is None else shared
        return Layout(bytes(block), tuple(places), programs, tuple(vectors), key=special, scratch=where)

    def expected(self) -> Sequence[Variant]:
        """The kernel for packed tensors; other strides are seen when a call is."""
        if self.problem.strides == "any":
            return ()
        return (Variant(self.layout(sketch(self.problem)).key, wide=True),)

    def image(self, variant: Variant, fresh: bool = False) -> Image:
        special = variant.key
        assert isinstance(special, Specialization)
        versions = (metadata.version("triton"), str(_environment()))
        path = file_of(
            "triton", (self.form.function.cache_key, repr(self._constants()), *versions, repr(variant), self._target)
        )
        if fresh:
            discard(path)
        return cached(path, lambda: self._compiled(special, variant.wide))

    def errors(self) -> tuple[type[Exception], ...]:
        own = (CompilationError, PTXASError, OutOfResources)
        return (*own, RuntimeError, ValueError, TypeError, AssertionError, OSError)

    def source(self, special: Specialization, wide: bool) -> Any:
        """What Triton's ``compile`` is given."""
        names = self._names
        fixed: dict[tuple[int, ...], Any] = {}
        compiled_in = self._constants()
        for i, (name, kind) in enumerate(zip(names, special.types, strict=True)):
            if kind == "constexpr":
                fixed[(i,)] = 1 if i in special.ones else compiled_in.get(name)
        aligned = [i for i, name in enumerate(names) if wide and special.types[i][0] == "*" and self._wide(name)]
        attributes = {(i,): _DIVISIBLE for i in sorted((*aligned, *special.divisible))}
        return ASTSource(self.form.function, dict(zip(names, special.types, strict=True)), fixed, attributes)

    @property
    def _target(self) -> str:
        return f"sm_{self.problem.arch}, {self.form.options(self.config)}"

    @property
    def _names(self) -> Sequence[str]:
        names: Sequence[str] = self.form.function.arg_names
        return names

    def _constants(self) -> Mapping[str, int | bool]:
        return self.form.constants(self.problem, self.config)

    def _wide(self, name: str) -> bool:
        return name == _WORKSPACE or (name not in _SCALARS and (self.problem.is_kda or name not in _GATES))

    def _specialization(
        self, given: Mapping[str, torch.Tensor | None], numbers: Mapping[str, int | float]
    ) -> Specialization:
        """Triton's own judgement, of stand-ins for the tensors: no address is looked at."""
        tensors = {name: None if t is None else MockTensor(t.dtype) for name, t in given.items()}
        if _WORKSPACE in self._names:
            tensors[_WORKSPACE] = MockTensor(torch.float32)
        _, judged, _ = _binder(self.form.function, self.problem.arch)(**tensors, **numbers, **self._constants())
        ones, divisible = [], []
        for i, (name, (kind, what)) in enumerate(zip(self._names, judged, strict=True)):
            if name in numbers and kind == "constexpr":
                ones.append(i)
            elif name in numbers and what == "D":
                divisible.append(i)
        return Specialization(tuple(kind for kind, _ in judged), tuple(ones), tuple(divisible))

    def _compiled(self, special: Specialization, wide: bool) -> Image:
        target = GPUTarget("cuda", self.problem.arch, 32)
        made = triton.compile(self.source(special, wide), target=target, options=dict(self.form.options(self.config)))
        about = made.metadata
        wanted = [struct.calcsize(_PACKED[kind]) for kind in (*special.kinds(), *_SCRATCH)]
        if "ptx" in made.asm and parameter_bytes(made.asm["ptx"]) != wanted:
            raise RuntimeError(f"Triton {metadata.version('triton')} lays out the kernel's parameters another way")
        if about.profile_scratch_size:
            raise RuntimeError("kernels instrumented for a profiler are launched by Triton alone")
        if about.global_scratch_size and _WORKSPACE in self._names:
            raise RuntimeError("a kernel of a chain cannot have scratch memory of its own")
        return Image(
            code=bytes(made.asm["cubin"]),
            entry=about.name,
            threads=32 * about.num_warps,
            shared=about.shared,
            cluster=about.num_ctas,
            cooperative=about.launch_cooperative_grid,
            overlaps=about.launch_pdl,
            scratch=about.global_scratch_size or 0,
        )


def parameter_bytes(ptx: str) -> list[int]:
    """Sizes of a kernel's parameters, from its PTX. Raises ValueError if it declares no kernel."""
    entry = re.search(r"\.entry\s+[\w$]+\s*\((.*?)\)", ptx, re.DOTALL)
    if entry is None:
        raise ValueError("the PTX declares no kernel")
    return [int(bits) // 8 for bits in re.findall(r"\.param\s+\.[a-z](\d+)\b", entry[1])]


def _append(block: bytearray, kind: str, value: float) -> int:
    """Pack a parameter behind the others, aligned to its size; returns where."""
    size = struct.calcsize(_PACKED[kind])
    block.extend(bytes(-len(block) % size))
    block.extend(struct.pack(_PACKED[kind], value))
    return len(block) - size


@lru_cache(maxsize=16)
def _binder(function: Any, arch: int) -> Any:
    """Triton's function from arguments to (arguments, what each is specialised on, options)."""
    backend = make_backend(GPUTarget("cuda", arch, 32))
    return create_function_from_signature(function.signature, function.params, backend)


def _environment() -> dict[str, str]:
    """Variables that change what Triton's compiler does."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    return dict(get_cache_invalidating_env_vars())
