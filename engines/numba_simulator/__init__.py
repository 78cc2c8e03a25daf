"""Executes Numba CUDA kernels on a CPU for the conformance suite: threads as greenlets, checked addresses, schedules.

``isokern verify --backend numba_cuda`` runs the suite there. No GPU, no driver, no environment variable; needs
``numba``, ``numba-cuda`` and ``greenlet``.
"""
