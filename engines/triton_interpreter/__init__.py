"""Runs Triton kernels on a CPU, watching every address: the op's conformance suite without a GPU.

Triton's own interpreter executes a kernel's source with NumPy, one program after another. It must be chosen before
Triton is first imported, so the engine lives in a process of its own: ``isokern verify --backend triton`` starts one
and runs the suite there, and ``activate()`` turns a process into such a one.

On top of the interpreter as it ships:
    bfloat16    casts round to nearest even and arithmetic is that of the values (as shipped: truncated casts, and
                arithmetic on the bit patterns);
    sums        ``tl.fma`` rounds once;
    memory      every active address is compared with the elements of the tensors given; a load or store that another
                program's store meets, or that reads back what was stored with no barrier between, is an error;
    schedules   programs in several orders.
"""

from __future__ import annotations

from .engine import InterpretedBackend, TritonInterpreter, activate

__all__ = ["InterpretedBackend", "TritonInterpreter", "activate"]
