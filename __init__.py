"""isokern: interchangeable kernels of one op, proven equal, and the right choice among them.

    from isokern import registry
    op = registry.get("fused_sigmoid_gating")

Importing this package imports neither triton, cupy nor numba and initialises no CUDA.
"""

__version__ = "0.1.0"
