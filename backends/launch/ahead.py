"""Compiling ahead: what a launcher would compile when a problem is bound, done where there is no device."""

from __future__ import annotations

from ...errors import BackendFailedError
from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .compiler import Compiler

__all__ = ["compile_expected"]


def compile_expected(backend: str, problem: Problem, config: Config, compiler: Compiler) -> None:
    """Have the machine code that calls of ``problem`` will most likely need on the disk.

    Raises BackendFailedError, in the compiler's words.
    """
    for variant in compiler.expected():
        try:
            compiler.image(variant)
        except compiler.errors() as error:
            words = f"{type(error).__name__}: {error}"
            op = "fused_sigmoid_gating"
            raise BackendFailedError(op, backend, config.label, problem.label, "compile", words) from error
