"""Executes Numba CUDA kernels on a CPU for the conformance suite: threads as greenlets, checked addresses, schedules.

``python -m isokern.engines.numba_simulator`` runs the suite over ``numba_cuda``. No GPU, no driver, no environment
variable; needs ``numba``, ``numba-cuda`` and ``greenlet``.
"""
