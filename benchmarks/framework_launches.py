"""The same kernels launched by their frameworks' own means, for comparison with the prepared launcher.

Each takes a canonical call with its output and returns callables by name, compiled and ready.
"""

from __future__ import annotations

from collections.abc import Callable

from isokern.registry.backend import Config
from isokern.registry.ops.fused_sigmoid_gating.call import Call
from isokern.registry.ops.fused_sigmoid_gating.problem import Problem

__all__ = ["OWN_LAUNCHES"]

Launches = dict[str, Callable[[], object]]


def triton(problem: Problem, config: Config, call: Call) -> Launches:
    """``kernel[grid](...)``, and the compiled kernel's own launch."""
    from isokern.backends.triton.arguments import constants, grid, integers, options, pointers, reals, tiles
    from isokern.backends.triton.kernel import recurrent

    assert call.out is not None
    programs = grid(tiles(problem, config), call.n, call.hv)
    arguments = (*pointers(call, call.out), *reals(call), *integers(call, call.out))
    fixed, told = constants(problem, config), options(config)
    compiled = recurrent[programs](*arguments, **fixed, **told)
    everything = (*arguments, *fixed.values())
    return {
        "triton kernel[grid]": lambda: recurrent[programs](*arguments, **fixed, **told),
        "triton CompiledKernel": lambda: compiled[programs](*everything),
    }


def cupy(problem: Problem, config: Config, call: Call) -> Launches:
    """A ``RawModule``'s function, its argument packed beforehand."""
    import cupy as framework

    from isokern.backends.cupy.arguments import pack
    from isokern.backends.cupy.compiling import NAME, NVRTC_OPTIONS, grid, source
    from isokern.backends.cupy.specialization import Specialization

    assert call.out is not None
    shape = Specialization.of(problem, config)
    module = framework.RawModule(code=source(), options=(*NVRTC_OPTIONS, *shape.options()))
    function = module.get_function(NAME)
    blocks, threads, argument = grid(shape, call.n, call.hv), (shape.threads, 1, 1), (pack(call, call.out),)
    return {"cupy RawModule": lambda: function(blocks, threads, argument)}


def numba_cuda(problem: Problem, config: Config, call: Call) -> Launches:
    """A ``cuda.jit`` dispatcher, given addresses as integers: with tensors it takes longer still."""
    from numba import cuda

    from isokern.backends.numba_cuda.kernel import recurrence
    from isokern.backends.numba_cuda.parameters import INTEGERS, NUMBER_AT, STRIDE_AT, floats, is_aligned, packer
    from isokern.backends.numba_cuda.places import grid
    from isokern.backends.numba_cuda.target import gpu
    from isokern.backends.numba_cuda.variant import Variant

    words = [0] * INTEGERS
    packer(Variant.of(problem, config, wide=True)).fill(call, words)
    variant = Variant.of(problem, config, wide=is_aligned(words))
    kernel = cuda.jit(recurrence(variant, gpu()))[grid(variant, call.n, call.hv), variant.threads]
    strides = tuple(words[STRIDE_AT:NUMBER_AT])
    arguments = (*words[:STRIDE_AT], strides, *map(int, words[NUMBER_AT:]), *floats(call))
    return {"numba dispatcher": lambda: kernel(*arguments)}


#: By backend.
OWN_LAUNCHES = {"triton": triton, "cupy": cupy, "numba_cuda": numba_cuda}
