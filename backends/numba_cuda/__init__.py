"""``numba_cuda``: the recurrent form as a Numba CUDA kernel, specialised per problem and launched from its cubin."""
