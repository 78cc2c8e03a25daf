"""Faults planted in the source of the Triton, Numba CUDA and chunked CUDA C++ kernels, and what has to find each.

Read by ``test_faults`` and by ``fault_cases``, which runs them. A fault is a text of one of the backend's files, what
is written in its place, what finds it, and the case that shows it:

    values      a result beyond the error bound, or something else written to
    watch       an address that belongs to no tensor, a race, or an unsynchronised read, told before it is done
    schedules   another order of programs or threads gives other bits
    error       the engine itself: threads that wait for each other, an operation no GPU has
    far         an offset beyond 2**31 elements that is not reached
"""

from __future__ import annotations

TRITON: dict[str, tuple[str, str, str, str, str]] = {
    "outputs truncated": (
        "kernel.py",
        "tl.store(at, o.to(at.dtype.element_ty), mask=mask)",
        "tl.store(at, (o.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)"
        ".to(at.dtype.element_ty), mask=mask)",
        "values",
        "base",
    ),
    "bfloat16 states truncated": (
        "tiles.py",
        "x = tile[first // SPAN].to(base.dtype.element_ty)",
        "x = (tile[first // SPAN].to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)"
        ".to(base.dtype.element_ty)",
        "values",
        "bfloat16 pool",
    ),
    "slot offsets in 32 bits": (
        "kernel.py",
        "tl.maximum(read, 0) * pool_s",
        "tl.maximum(read, 0).to(tl.int32) * pool_s.to(tl.int32)",
        "far",
        "far",
    ),
    "negative slots written": ("kernel.py", "if write >= 0:", "if write >= -1:", "watch", "base"),
    "negative slots read": ("kernel.py", "rows, read >= 0, K", "rows, read >= -1, K", "values", "base"),
    "an empty sequence computed": ("kernel.py", "(length <= 0) |", "(length < 0) |", "values", "separate slots"),
    "one token too many": ("kernel.py", "for t in range(length):", "for t in range(length + 1):", "values", "base"),
    "one token too few": ("kernel.py", "for t in range(length):", "for t in range(length - 1):", "values", "base"),
    "scalars of the last token for the next": (
        "kernel.py",
        "token = _of_token(scalars, t % WINDOW)",
        "token = _of_token(scalars, tl.maximum(t % WINDOW - 1, 0))",
        "values",
        "base",
    ),
    "read past the last token": (
        "kernel.py",
        "tokens = tl.minimum(t + tl.arange(0, WINDOW), last).to(tl.int64)",
        "tokens = (t + tl.arange(0, WINDOW)).to(tl.int64)",
        "watch",
        "base",
    ),
    "rows beyond V": (
        "kernel.py",
        "if V % BV != 0:\n        mask = mask & (rows < V)",
        "if V % BV > BV:\n        mask = mask & (rows < V)",
        "watch",
        "base",
    ),
    "keys beyond K read": (
        "tiles.py",
        "return tl.load(base + i * stride, mask=i < K, other=0.0)",
        "return tl.load(base + i * stride)",
        "watch",
        "base",
    ),
    "states beyond V stored": (
        "tiles.py",
        "mask = tl.full([BV, SPAN], True, tl.int1)\n        if V % BV != 0:",
        "mask = tl.full([BV, SPAN], True, tl.int1)\n        if V % BV > BV:",
        "watch",
        "base",
    ),
    "two programs on one head": (
        "kernel.py",
        "head = (program // TILES)",
        "head = (program // TILES // 2)",
        "watch",
        "base",
    ),
    "no barrier before a parent is read": ("kernel.py", "tl.debug_barrier()", "pass", "watch", "tree"),
    "a parent's state from memory that nobody wrote": (
        "kernel.py",
        "step_base + parent * step_t",
        "step_base + (parent + 1) * step_t",
        "values",
        "tree",
    ),
    "strides taken for dense ones": ("kernel.py", "(q_at, q_d, K", "(q_at, 1, K", "watch", "strided"),
    "a head's gates for its neighbour": (
        "kernel.py",
        "b + batch * b_b + first * b_t + head * b_h",
        "b + batch * b_b + first * b_t",
        "values",
        "base",
    ),
}

NUMBA_CUDA: dict[str, tuple[str, str, str, str, str]] = {
    "no barrier between windows": ("kernel.py", "cuda.syncthreads()", "cuda.syncwarp()", "schedules", "base"),
    "one window instead of two": ("kernel.py", "buffer = 1 - buffer", "buffer = 0", "schedules", "base"),
    "a barrier only some warps reach": (
        "kernel.py",
        "cuda.syncthreads()",
        "cuda.syncthreads() if warp else None",
        "error",
        "base",
    ),
    "one shuffle short": (
        "reduce.py",
        "stages = lanes.bit_length() - 1",
        "stages = lanes.bit_length() - 2",
        "values",
        "decode",
    ),
    "slot offsets in 32 bits": (
        "kernel.py",
        "read_slot * strides[POOL_SLOT]",
        "((read_slot * strides[POOL_SLOT] + 2**31) % 2**32 - 2**31)",
        "far",
        "far",
    ),
    "negative slots written": ("kernel.py", "if writes and write_slot >= 0:", "if writes:", "watch", "base"),
    "negative slots read": ("kernel.py", "if reads and read_slot >= 0:", "if reads:", "watch", "base"),
    "an empty sequence computed": ("kernel.py", "if length <= 0:", "if length < 0:", "values", "separate slots"),
    "one token too many": (
        "kernel.py",
        "min(window, length - base)",
        "min(window, length - base + 1)",
        "watch",
        "base",
    ),
    "an output one token late": ("kernel.py", "holds and t > 0, outputs", "holds, outputs", "watch", "base"),
    "rows beyond V": ("tokens.py", "if full or column + i < value_dim:", "if True:", "watch", "base"),
    "states beyond V": ("states.py", "if all_v or column + r * wide_columns < value_dim:", "if True:", "watch", "base"),
    "keys beyond K": ("states.py", "if all_k or chunk * j + at < key_dim:", "if True:", "watch", "kv"),
    "two blocks on one head": (
        "kernel.py",
        "head = block // tiles",
        "head = block // tiles // 2",
        "watch",
        "base",
    ),
    "a parent's state from memory that nobody wrote": (
        "kernel.py",
        "steps_at + parent * strides[STEPS_STEP]",
        "steps_at + (parent + 1) * strides[STEPS_STEP]",
        "values",
        "tree",
    ),
    "strides taken for dense ones": (
        "kernel.py",
        "q_inner = q_item if packed else strides[Q_INNER]",
        "q_inner = 2",
        "watch",
        "strided",
    ),
    "a head's gates for its neighbour": ("kernel.py", " + head * strides[B_HEAD]", "", "values", "base"),
}

CUPY_CHUNKED: dict[str, tuple[str, str, str, str, str]] = {
    "a chunk used before it is there for all": (
        "kernels/scan.cu",
        "__syncthreads();  // this chunk is here, for all; the one before it has been used, by all",
        "",
        "watch",
        "chunks",
    ),
    "no barrier before the inverse's blocks meet": (
        "kernels/inverse.cuh",
        "invert_diagonal(matrix + warp * 16 * (P + 1), lane);\n  __syncthreads();",
        "invert_diagonal(matrix + warp * 16 * (P + 1), lane);",
        "watch",
        "chunks",
    ),
    "lanes that overwrite what others still read": (
        "kernels/inverse.cuh",
        "  __syncwarp();\n  if (lane < 16)",
        "  if (lane < 16)",
        "watch",
        "chunks",
    ),
    "the next head's gates too early": (
        "kernels/prepare.cu",
        "    __syncthreads();  // before the next head's gates and matrix\n",
        "",
        "watch",
        "chunks",
    ),
    "half of a chunk's gates not carried over": (
        "kernels/prepare.cu",
        "if (t >= 32) add(high, low, small.carry[0], small.carry[1]);",
        "",
        "values",
        "chunks",
    ),
    "a chunk's decays in one float": (
        "kernels/prepare.cu",
        "low += other_low + ((high - (sum - back)) + (other_high - back));",
        "low += other_low + ((high - (sum - back)) + (other_high - back)) * 0.0f + high * 1e-6f;",
        "values",
        "chunks",
    ),
    "the solve with the wrong sign": (
        "kernels/inverse.cuh",
        "fmaf(-block[i * INVERSE_PITCH + m]",
        "fmaf(block[i * INVERSE_PITCH + m]",
        "values",
        "base",
    ),
    "a token that does not see itself": (
        "kernels/prepare.cu",
        "attend[c] = s <= t ?",
        "attend[c] = s < t ?",
        "values",
        "base",
    ),
    "tokens kept with keys not normalised": (
        "kernels/prepare.cu",
        "record.keep_scale[t] = left * small.key_norm[t];",
        "record.keep_scale[t] = left;",
        "values",
        "base",
    ),
    "beta of another token": ("kernels/prepare.cu", "x.y * small.beta[s + 1]", "x.y * small.beta[s]", "values", "base"),
    "one channel for another": (
        "kernels/chunks.cuh",
        "split(words[j], values.get(2 * j),",
        "split(words[j], values.get(2 * j + 1),",
        "values",
        "base",
    ),
    "products of small pieces left out": (
        "kernels/tensor_core.cuh",
        "if (p + r < 3)",
        "if (p + r < 1)",
        "values",
        "chunks",
    ),
    "operands rounded to bfloat16": (
        "backend.py",
        "pieces: ClassVar[int] = 3",
        "pieces: ClassVar[int] = 1",
        "values",
        "base",
    ),
    "a state that does not decay": ("kernels/scan.cu", "state[i][c] *= total;", ";", "values", "chunks"),
    "outputs of the state not decayed": (
        "kernels/scan.cu",
        "z[2 * half] *= scales.x,",
        "z[2 * half] *= 1.0f,",
        "values",
        "chunks",
    ),
    "slots that meet": ("kernels/chunks.cuh", "slot = first / CHUNK + n;", "slot = first / CHUNK;", "values", "base"),
    "the last chunk left out": (
        "kernels/scan.cu",
        "token < sequence.length; token += CHUNK",
        "token + CHUNK < sequence.length; token += CHUNK",
        "values",
        "chunks",
    ),
    "negative slots written": ("kernels/scan.cu", "if (target >= 0)", "if (target >= -1)", "watch", "base"),
    "negative slots read": ("kernels/scan.cu", "if (source >= 0)", "if (source >= -1)", "watch", "base"),
    "an empty sequence computed": (
        "kernels/scan.cu",
        "if (sequence.length <= 0) return;",
        "if (sequence.length < 0) return;",
        "values",
        "separate slots",
    ),
    "columns beyond V": ("kernels/scan.cu", "v < Shape::V ? Shape::K - k : 0);", "Shape::K - k);", "watch", "base"),
    "key channels beyond K": (
        "kernels/chunks.cuh",
        "there ? wanted - column : 0);",
        "there ? 8 : 0);",
        "watch",
        "base",
    ),
    "tokens beyond the end": (
        "kernels/chunks.cuh",
        "const bool there = row < live &&",
        "const bool there = row <= live &&",
        "watch",
        "base",
    ),
    "outputs beyond the end": (
        "kernels/scan.cu",
        "if (token >= live) continue;",
        "if (token > live) continue;",
        "watch",
        "base",
    ),
    "slot offsets in 32 bits": (
        "kernels/scan.cu",
        "source * p.pool.slot",
        "(int)source * 1000000 * (int)p.pool.slot",
        "error",
        "base",
    ),
    "two blocks on one head": (
        "kernels/scan.cu",
        "const int hv = blockIdx.x / Shape::TILES,",
        "const int hv = 0,",
        "watch",
        "base",
    ),
}

FAULTS = {"triton": TRITON, "numba_cuda": NUMBA_CUDA, "cupy_chunked": CUPY_CHUNKED}
