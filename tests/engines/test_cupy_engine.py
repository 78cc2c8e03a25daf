"""The engine that runs CUDA C++ on a CPU: what it computes, and what it refuses to let pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isokern.engines.cuda_on_cpu.build import BuildError
from isokern.engines.cuda_on_cpu.engine import SCHEDULES, CudaOnCpu
from isokern.engines.cuda_on_cpu.raw_kernel import CpuRawKernel, DivergenceError, KernelError, KernelFault
from isokern.registry.conformance.check import Violation

ENGINE = CudaOnCpu()


def kernel(body: str, parameters: str = "const float* x, float* out", before: str = "") -> CpuRawKernel:
    return CpuRawKernel(f'{before}\nextern "C" __global__ void f({parameters}) {{ {body} }}', "f")


REVERSE = """
  __shared__ float s[64];
  const int t = threadIdx.x;
  s[t] = x[blockIdx.x * 64 + t];
  BARRIER
  out[blockIdx.x * 64 + t] = s[63 - t];
"""


def reverse(barrier: str) -> CpuRawKernel:
    return kernel(REVERSE.replace("BARRIER", barrier))


class TestWhatItComputes:
    def test_blocks_threads_and_static_shared_memory(self):
        x, out = torch.arange(192.0), torch.zeros(192)
        reverse("__syncthreads();")((3,), (64,), (x, out))
        assert torch.equal(out.view(3, 64), x.view(3, 64).flip(1))

    def test_three_dimensional_grids_and_blocks(self):
        body = """out[((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * 24
                      + (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x]
                      = threadIdx.z + 10 * blockIdx.z;"""
        out = torch.full((2 * 3 * 2 * 24,), -1.0)
        kernel(body)((2, 3, 2), (4, 3, 2), (out, out))
        want = torch.tensor([[z + 10 * block for z in (0, 1)] for block in (0, 1)])
        assert torch.equal(out.view(2, 6, 2, 12)[:, 0, :, 0], want.float())
        assert not bool((out < 0).any())

    def test_dynamic_shared_memory_has_the_size_of_the_launch(self):
        body = """extern __shared__ float s[];
                  s[threadIdx.x] = x[threadIdx.x]; __syncthreads();
                  out[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];"""
        x, out = torch.arange(40.0), torch.zeros(40)
        kernel(body)((1,), (40,), (x, out), shared_mem=160)
        assert torch.equal(out, x.flip(0))

    @pytest.mark.parametrize(
        ("call", "source"),
        [
            ("__shfl_xor_sync(~0u, v, 5)", lambda lane: lane ^ 5),
            ("__shfl_xor_sync(~0u, v, 3, 8)", lambda lane: lane ^ 3),
            ("__shfl_down_sync(~0u, v, 4)", lambda lane: min(lane + 4, 31) if lane + 4 < 32 else lane),
            ("__shfl_down_sync(~0u, v, 3, 8)", lambda lane: lane + 3 if lane % 8 + 3 < 8 else lane),
            ("__shfl_up_sync(~0u, v, 2, 16)", lambda lane: lane - 2 if lane % 16 >= 2 else lane),
            ("__shfl_sync(~0u, v, 9)", lambda lane: 9),
            ("__shfl_sync(~0u, v, 9, 8)", lambda lane: lane // 8 * 8 + 1),
        ],
    )
    def test_shuffles(self, call, source):
        x, out = torch.arange(64.0), torch.zeros(64)
        kernel(f"float v = x[threadIdx.x]; out[threadIdx.x] = {call};")((1,), (64,), (x, out))
        want = [float(warp * 32 + source(lane)) for warp in range(2) for lane in range(32)]
        assert out.tolist() == want

    def test_votes_and_atomics(self):
        body = "atomicAdd(out, 1.0f); if (__ballot_sync(~0u, threadIdx.x % 2) == 0xaaaaaaaau) atomicAdd(out + 1, 1.0f);"
        out = torch.zeros(2)
        kernel(body)((4,), (32,), (out, out))
        assert out.tolist() == [128.0, 128.0]

    def test_a_structure_passed_by_value_and_typed_scalars(self):
        code = kernel(
            "out[0] = p.scale * p.step + n + y;",
            "P p, float* out, int n, double y",
            "struct P { long long step; float scale; };",
        )
        value = np.zeros((), np.dtype([("step", "i8"), ("scale", "f4"), ("pad", "f4")]))
        value["step"], value["scale"] = 3, 0.5
        out = torch.zeros(1)
        code((1,), (1,), (value, out, np.int32(7), 0.25))
        assert out.item() == 8.75

    def test_low_precision_rounds_to_nearest_even(self):
        x = torch.cat([torch.randn(1000), torch.tensor([1.00390625, 1.01171875, 65520.0, 1e-8, -0.0, float("inf")])])
        for function, dtype in (("float_to_bfloat", torch.bfloat16), ("float_to_half", torch.float16)):
            out = torch.zeros(len(x), dtype=dtype)
            kernel(f"const int i = blockIdx.x; out[i] = {function}(x[i]);", "const float* x, unsigned short* out")(
                (len(x),), (1,), (x, out)
            )
            assert torch.equal(out, x.to(dtype))


#: Two roles, a warp each: one fills a stage for the other and waits until it has been read.
ROLES = """
  __shared__ float s[32];
  const int t = threadIdx.x % 32;
  for (int i = 0; i < 3; i++) {
    if (threadIdx.x < 32) { s[t] = x[32 * i + t]; FIRST }
    else { SECOND out[32 * i + t] = 2 * s[31 - t]; }
    __syncthreads();
  }
"""


def roles(first: str, second: str) -> CpuRawKernel:
    return kernel(ROLES.replace("FIRST", first).replace("SECOND", second))


class TestNamedBarriers:
    BARRIER = "meet_by_name<3, 64>();"

    def test_branches_meet_and_memory_is_ordered_under_every_schedule(self):
        run = roles(self.BARRIER, self.BARRIER)
        x = torch.randn(96)
        for _, active in ENGINE.schedules():
            out = torch.zeros(96)
            with active():
                run((1,), (64,), (x, out))
                watched(run, 64, x=x, out=torch.zeros(96))
            assert torch.equal(out, 2 * x.view(3, 32).flip(1).flatten())

    @pytest.mark.parametrize(
        ("first", "second", "message"),
        [
            ("__syncthreads();", "__syncthreads();", "different branches"),
            (BARRIER, "__syncthreads();", "barrier 3 of 64 threads, thread 32 at barrier 0"),
            (BARRIER, "meet_by_name<4, 64>();", "thread 32 at barrier 4"),
            (BARRIER, "meet_by_name<3, 96>();", "barrier 3 of 96"),
            (BARRIER, f"if (i < 2) {BARRIER} else return;", "32 have returned"),
            ("meet_by_name<3, 32>();", "meet_by_name<3, 32>();", "for 32 threads, the block has 64"),
        ],
        ids=["no name", "one name", "two names", "two counts", "one skipped", "half a block"],
    )
    def test_those_that_differ_never_meet(self, first, second, message):
        with pytest.raises(DivergenceError, match=message):
            roles(first, second)((1,), (64,), (torch.zeros(96), torch.zeros(96)))


class TestWhatItRefuses:
    def test_unwritten_shared_memory_is_nan(self):
        out = torch.zeros(1)
        kernel("__shared__ float s[4]; if (threadIdx.x) s[0] = 1; __syncthreads(); out[0] = s[1];")(
            (1,), (2,), (out, out)
        )
        assert torch.isnan(out).all()

    def test_a_barrier_some_threads_skip(self):
        with pytest.raises(DivergenceError, match="wait at __syncthreads"):
            kernel("if (threadIdx.x < 40) __syncthreads(); out[0] = 1;")((1,), (64,), (torch.zeros(1), torch.zeros(1)))

    def test_a_shuffle_beside_a_barrier(self):
        body = "if (threadIdx.x < 16) __syncthreads(); else __shfl_xor_sync(~0u, 1.0f, 1);"
        with pytest.raises(DivergenceError):
            kernel(body)((1,), (32,), (torch.zeros(1), torch.zeros(1)))

    def test_a_shuffle_that_names_a_thread_that_has_returned(self):
        with pytest.raises(DivergenceError, match="no running thread"):
            kernel("if (threadIdx.x == 3) return; __shfl_xor_sync(~0u, 1.0f, 1);")(
                (1,), (32,), (torch.zeros(1), torch.zeros(1))
            )

    def test_unmapped_memory_is_an_error_not_a_crash(self):
        run = kernel("out[0] = x[5];")
        with pytest.raises(KernelFault, match="illegal address"):
            run((1,), (1,), (None, torch.zeros(1)))
        out = torch.zeros(1)
        run((1,), (1,), (torch.arange(8.0), out))  # and the engine goes on
        assert out.item() == 5

    def test_an_index_that_overflows_32_bits(self):
        run = kernel("const int at = n * 65536; out[0] = at;", "int n, float* out")
        run((1,), (1,), (np.int32(32767), torch.zeros(1)))
        with pytest.raises(KernelFault, match="undefined behaviour"):
            run((1,), (1,), (np.int32(32768), torch.zeros(1)))

    def test_a_misaligned_vector(self):
        run = kernel("*(float4*)(out + n) = *(const float4*)x;", "const float* x, float* out, int n")
        x, out = torch.arange(4.0), torch.zeros(8)
        run((1,), (1,), (x, out, np.int32(4)))
        with pytest.raises(KernelFault):
            run((1,), (1,), (x, out, np.int32(1)))

    def test_too_many_threads(self):
        with pytest.raises(KernelError, match="1025 threads"):
            kernel("")((1,), (1025,), (torch.zeros(1), torch.zeros(1)))

    def test_a_source_that_does_not_compile_says_where(self):
        with pytest.raises(BuildError, match=r"f\.cu:2"):
            kernel("out[0] = nothing;").compile()

    def test_arrays_are_passed_by_value_one_element_at_a_time(self):
        with pytest.raises(TypeError, match="size one"):
            kernel("")((1,), (1,), (np.zeros(3), torch.zeros(1)))

    def test_arguments_of_no_known_kind(self):
        with pytest.raises(TypeError, match="str"):
            kernel("")((1,), (1,), ("x", torch.zeros(1)))


#: A copy's place before the wait and after it: `s`, of 8 words by thread; `in` and `out` are global.
COPIES = """
  __shared__ __align__(16) float s[2][32][8];
  const int t = threadIdx.x;
  float* const own = s[0][t];
  const float* const in = x + 8 * t;
  float* const to = out + 8 * t;
  const auto take = [&] { for (int i = 0; i < 8; i++) to[i] = own[i]; };
"""
#: As backends write it for the CPU: lands at once, nothing to wait for. The engine's own are called nevertheless.
OWN_COPIES = """
template <int BYTES> inline void copy_async(void* shared, const void* global, bool live) {
  for (int w = 0; w < BYTES / 4; w++) ((unsigned*)shared)[w] = live ? ((const unsigned*)global)[w] : 0;
}
inline void wait_for_copies() {}
"""


def copies(body: str, before: str = "", threads: int = 32, watch: bool = False) -> torch.Tensor:
    """What a kernel of one block leaves, of 8 words by thread; x counts from 1."""
    run, x, out = kernel(COPIES + body, "float* x, float* out", before), torch.arange(1.0, 257), torch.zeros(32, 8)
    if watch:
        watched(run, threads, x=x, out=out)
    else:
        run((1,), (threads,), (x, out))
    return out


def missing(out: torch.Tensor) -> list[bool]:
    """Which words are NaN, of 8; the same in all threads."""
    nan = torch.isnan(out)
    assert bool((nan == nan[0]).all())
    there = torch.arange(1.0, 257).view(32, 8)
    assert bool((nan | (out == there)).all())
    return nan[0].tolist()


class TestAsynchronousCopies:
    HALVES = "copy_async<16>(own, in, true); group_copies(); copy_async<16>(own + 4, in + 4, true); group_copies();"

    @pytest.mark.parametrize("own", ["", OWN_COPIES], ids=["the engine's alone", "a backend's own beside them"])
    @pytest.mark.parametrize("bytes_", [4, 8, 16])
    def test_the_place_is_nan_until_the_wait(self, bytes_, own):
        start = f"for (int i = 0; i < 8; i += {bytes_} / 4) copy_async<{bytes_}>(own + i, in + i, true);"
        assert missing(copies(f"{start} take(); wait_for_copies();", own)) == [True] * 8
        assert missing(copies(f"{start} wait_for_copies(); take();", own)) == [False] * 8
        assert missing(copies(f"{start} wait_for_copies(); take();", own, watch=True)) == [False] * 8

    @pytest.mark.parametrize(("left", "newest"), [(0, False), (1, True)])
    def test_the_newest_groups_may_be_left(self, left, newest):
        out = copies(f"{self.HALVES} wait_for_group<{left}>(); take(); wait_for_copies();")
        assert missing(out) == [False] * 4 + [newest] * 4

    def test_as_many_left_as_there_are_is_no_wait(self):
        assert missing(copies(f"{self.HALVES} wait_for_group<2>(); take();")) == [True] * 8

    def test_empty_groups_count(self):
        out = copies(f"{self.HALVES} group_copies(); wait_for_group<1>(); take();")
        assert missing(out) == [False] * 8

    def test_copies_of_no_group_are_waited_for_only_with_all(self):
        start = "copy_async<16>(own, in, true); group_copies(); copy_async<16>(own + 4, in + 4, true);"
        assert missing(copies(f"{start} wait_for_group<0>(); take();")) == [False] * 4 + [True] * 4
        assert missing(copies(f"{start} wait_for_copies(); take();")) == [False] * 8

    def test_a_ring_of_many(self):
        """More than a queue begins with, some always in flight: each arrives when its group has been waited for."""
        out = copies("""
          float sum = 0;
          for (int i = 0; i < 100; i++) {
            for (int w = 0; w < 8 && i < 99; w++) copy_async<4>(&s[i % 2][t][w], in + (w + i) % 8, true);
            group_copies();
            wait_for_group<1>();
            for (int w = 0; w < 8 && i > 0; w++) sum += (w + 1) * s[1 - i % 2][t][w];
          }
          to[0] = sum;
        """)
        x = torch.arange(1.0, 257).view(32, 8)
        want = sum((torch.arange(1.0, 9) * x.roll(-i, 1)).sum(1) for i in range(99))
        assert torch.equal(out[:, 0], want)

    def test_more_than_a_queue_begins_with(self):
        out = copies("""
          __shared__ float many[300];
          for (int i = 0; i < 300 && t == 0; i++) copy_async<4>(many + i, x + i % 256, true);
          wait_for_copies();
          __syncthreads();
          for (int i = 0; i < 8; i++) to[i] = many[(8 * t + i + 256) % 300 % 256];
        """)
        x = torch.arange(1.0, 257)
        assert torch.equal(out.flatten(), x[(torch.arange(256) + 256) % 300 % 256])

    @pytest.mark.parametrize("bytes_", [4, 8, 16])
    def test_zeros_where_nothing_is_alive(self, bytes_):
        fill = f"for (int i = 0; i < 8; i += {bytes_} / 4) copy_async<{bytes_}>(own + i, nullptr, false);"
        assert torch.isnan(copies(f"{fill} take();")).all()
        assert torch.equal(copies(f"{fill} wait_for_copies(); take();"), torch.zeros(32, 8))
        assert torch.equal(copies(f"{fill} wait_for_copies(); take();", watch=True), torch.zeros(32, 8))

    def test_a_wait_is_for_the_own_copies(self):
        """Whoever reads another's copy needs that one's wait, and a barrier behind it."""
        body = "copy_async<16>(s[0][t], in, true); copy_async<16>(s[0][t] + 4, in + 4, true); {}"
        read = "for (int i = 0; i < 8; i++) to[i] = s[0][t ^ 1][i];"
        x = torch.arange(1.0, 257).view(32, 8)
        right = body.format(f"wait_for_copies(); __syncthreads(); {read}")
        swapped = x.view(16, 2, 8).flip(1).reshape(32, 8)
        assert torch.equal(copies(right), swapped)
        assert torch.equal(copies(right, watch=True), swapped)
        other = body.format(
            f"if (t % 2) wait_for_copies(); __syncthreads(); {read} __syncthreads(); wait_for_copies();"
        )
        assert torch.isnan(copies(other)).all(1).tolist() == [False, True] * 16
        with pytest.raises(Violation, match="read of what a copy has yet to bring"):
            copies(other, watch=True)
        with pytest.raises(Violation, match=r"race, read after write|read before anything"):
            copies(body.format(f"wait_for_copies(); {read}"), watch=True)
        with pytest.raises(Violation, match="read of what a copy has yet to bring"):
            copies(body.format(f"__syncthreads(); {read} wait_for_copies();"), watch=True)

    @pytest.mark.parametrize(
        ("body", "what"),
        [
            ("copy_async<4>(own, in, true); own[0] = 1; wait_for_copies();", "place"),
            ("copy_async<4>(own, in, true); copy_async<4>(own, in + 1, true); wait_for_copies();", "place"),
            ("copy_async<8>(own, in, true); x[8 * t + 1] = 7; wait_for_copies();", "source"),
        ],
        ids=["its place by a thread", "its place by another copy", "its source"],
    )
    def test_what_is_written_before_a_copy_has_landed(self, body, what):
        with pytest.raises(KernelError, match=f"the {what} of a copy by thread 0 was written"):
            copies(body)
        with pytest.raises(Violation, match=r"write of what a copy has yet to bring|was written|write to an input"):
            copies(body, watch=True)

    def test_a_source_that_is_written_after_the_wait(self):
        out = copies("copy_async<4>(own, in, true); wait_for_copies(); x[8 * t] = 7; to[0] = own[0];")
        assert torch.equal(out[:, 0], torch.arange(1.0, 257, 8))

    def test_returning_without_a_wait(self):
        copies("copy_async<4>(own, in, true);")  # a GPU would not mind
        with pytest.raises(Violation, match="returns with 1 copies that it has not waited for"):
            copies("copy_async<4>(own, in, true);", watch=True)
        copies("copy_async<4>(own, in, false);", watch=True)  # nothing was asked for

    def test_none_is_left_for_the_next_block_or_launch(self):
        run = kernel(
            COPIES + "if (n) copy_async<4>(own, in, true); else { wait_for_copies(); take(); }",
            "const float* x, float* out, int n",
        )
        x, out = torch.arange(256.0), torch.zeros(32, 8)
        run((2,), (32,), (x, out, np.int32(1)))
        run((1,), (32,), (x, out, np.int32(0)))
        assert torch.isnan(out).all()  # as shared memory is that nobody wrote

    def test_the_watch_sees_both_ends_of_a_copy(self):
        with pytest.raises(Violation, match="x"):
            copies("copy_async<16>(own, in + 256, true); wait_for_copies();", watch=True)
        with pytest.raises(Violation, match="race, write after write: shared memory"):
            copies("copy_async<16>(s[0][t / 2], in, true); wait_for_copies();", watch=True)

    @pytest.mark.parametrize(
        ("start", "error", "message"),
        [
            ("copy_async<8>(own + 1, in, true)", KernelFault, "not aligned"),
            ("copy_async<16>(own, in + 2, true)", KernelFault, "not aligned"),
            ("copy_async<4>(to, in, true)", KernelError, "not from global to shared"),
            ("copy_async<4>(own, s[1][t], true)", KernelError, "not from global to shared"),
            ("copy_async<4>(own, (const float*)nullptr + 1, true)", KernelFault, "illegal address"),
        ],
        ids=["place", "source", "to global memory", "from shared memory", "from nowhere"],
    )
    def test_what_no_gpu_copies(self, start, error, message):
        with pytest.raises(error, match=message):
            copies(f"{start}; wait_for_copies();")


class TestSchedules:
    def test_a_correct_kernel_gives_the_same_in_all(self):
        run = reverse("__syncthreads();")
        x = torch.randn(128)
        results = []
        for name, active in ENGINE.schedules():
            out = torch.zeros(128)
            with active():
                run((2,), (64,), (x, out))
            results.append(out)
            assert name in SCHEDULES
        assert len(results) == len(SCHEDULES)
        assert all(torch.equal(r, results[0]) for r in results)

    def test_a_missing_barrier_shows_when_a_warp_runs_ahead(self):
        run = reverse("")
        x = torch.randn(64)
        wrong = []
        for name, active in ENGINE.schedules():
            out = torch.zeros(64)
            with active():
                run((1,), (64,), (x, out))
            if not torch.equal(out, x.flip(0)):
                wrong.append(name)
        assert {"first warp ahead", "last warp ahead"} & set(wrong)


def watched(run: CpuRawKernel, threads: int, blocks: int = 1, **tensors: torch.Tensor) -> None:
    with ENGINE.watch_addresses(tensors):
        run((blocks,), (threads,), tuple(tensors.values()))


class TestWatch:
    def test_a_correct_kernel_passes(self):
        watched(reverse("__syncthreads();"), 64, 2, x=torch.randn(128), out=torch.zeros(128))

    @pytest.mark.parametrize(("offset", "what"), [(1, "x"), (-1, "outside every tensor|x")])
    def test_one_element_beyond_an_input(self, offset, what):
        storage = torch.zeros(100)
        run = kernel(f"out[threadIdx.x] = x[(int)threadIdx.x + {offset}];")
        with pytest.raises(Violation, match=what):
            watched(run, 32, x=storage[10:42], out=torch.zeros(32))

    def test_a_gap_between_strided_elements(self):
        run = kernel("out[threadIdx.x] = x[threadIdx.x];")
        watched(run, 8, x=torch.zeros(8), out=torch.zeros(8))
        with pytest.raises(Violation, match="between or beyond"):
            watched(run, 8, x=torch.zeros(16)[::2], out=torch.zeros(8))

    def test_a_vector_that_reaches_past_the_end(self):
        run = kernel("*(float4*)(out + 4 * threadIdx.x) = *(const float4*)(x + 4 * threadIdx.x);")
        watched(run, 2, x=torch.zeros(8), out=torch.zeros(8))
        with pytest.raises(Violation):
            watched(run, 2, x=torch.zeros(8)[:7], out=torch.zeros(8))

    def test_a_write_to_an_input(self):
        run = kernel("x[threadIdx.x] = 0; out[threadIdx.x] = 0;", "float* x, float* out")
        with pytest.raises(Violation, match="write to an input: x"):
            watched(run, 4, x=torch.zeros(4), out=torch.zeros(4))

    def test_a_missing_barrier_is_a_race_in_every_schedule(self):
        for _, active in ENGINE.schedules():
            with active(), pytest.raises(Violation, match=r"race|read before anything"):
                watched(reverse(""), 64, x=torch.zeros(64), out=torch.zeros(64))

    def test_a_shuffle_does_not_order_shared_memory(self):
        body = """__shared__ float s[32]; s[threadIdx.x] = x[threadIdx.x]; {};
                  out[threadIdx.x] = s[threadIdx.x ^ 1];"""
        tensors = {"x": torch.randn(32), "out": torch.zeros(32)}
        watched(kernel(body.format("__syncwarp()")), 32, **tensors)
        with pytest.raises(Violation, match="race"):
            watched(kernel(body.format("__shfl_xor_sync(~0u, 1, 1)")), 32, **tensors)

    def test_a_stage_refilled_while_others_still_read_it(self):
        body = """__shared__ float s;
                  for (int i = 0; i < 3; i++) {{
                    if (threadIdx.x == 0) s = x[i];
                    __syncthreads(); out[threadIdx.x] = s; {}
                  }}"""
        tensors = {"x": torch.randn(3), "out": torch.zeros(64)}
        watched(kernel(body.format("__syncthreads();")), 64, **tensors)
        with pytest.raises(Violation, match="race"):
            watched(kernel(body.format("")), 64, **tensors)

    def test_two_blocks_that_write_one_place(self):
        with pytest.raises(Violation, match="race, write after write: out"):
            watched(kernel("out[0] = x[0];"), 1, 2, x=torch.zeros(1), out=torch.zeros(1))

    def test_a_block_that_reads_what_another_wrote(self):
        with pytest.raises(Violation, match="race"):
            watched(
                kernel("out[blockIdx.x] = 1; x + 0; if (blockIdx.x) out[1] += out[0];"),
                1,
                2,
                x=torch.zeros(1),
                out=torch.zeros(2),
            )

    def test_a_launch_beside_the_one_before_waits_for_what_that_one_writes(self):
        made = kernel("out[threadIdx.x] = x[threadIdx.x];")
        tensors = {"x": torch.ones(4), "out": torch.zeros(4)}

        def chained(body: str) -> None:
            with ENGINE.watch_addresses(tensors):
                made((1,), (4,), tuple(tensors.values()))
                kernel(body)((1,), (4,), tuple(tensors.values()), overlaps=True)

        chained("wait_for_previous(); out[threadIdx.x] += 1;")
        assert tensors["out"].tolist() == [2.0] * 4
        with pytest.raises(Violation, match="wait_for_previous"):
            chained("out[threadIdx.x] += 1; wait_for_previous();")
        with pytest.raises(Violation, match="wait_for_previous"):
            chained("if (threadIdx.x == 0) wait_for_previous(); __syncthreads(); out[threadIdx.x] += 1;")

    def test_a_launch_beside_others_may_read_at_once_what_nobody_writes(self):
        run = kernel("const float y = x[threadIdx.x]; wait_for_previous(); out[threadIdx.x] += y;")
        tensors = {"x": torch.ones(4), "out": torch.zeros(4)}
        with ENGINE.watch_addresses(tensors):
            for _ in range(2):
                run((1,), (4,), tuple(tensors.values()), overlaps=True)
        assert tensors["out"].tolist() == [2.0] * 4

    def test_a_launch_beside_another_does_not_write_what_that_one_reads(self):
        tensors = {"out": torch.zeros(4), "x": torch.ones(4)}
        reads = kernel("if (out[threadIdx.x] > 9) __syncwarp();", "float* out, const float* x")
        writes = kernel("out[threadIdx.x] = 1; wait_for_previous();", "float* out, const float* x")

        def chained() -> None:
            with ENGINE.watch_addresses(tensors):
                reads((1,), (4,), tuple(tensors.values()))
                writes((1,), (4,), tuple(tensors.values()), overlaps=True)

        with pytest.raises(Violation, match="write of what an earlier kernel uses"):
            chained()

    def test_every_block_waits_for_the_launch_that_it_runs_beside(self):
        tensors = {"x": torch.ones(4), "out": torch.zeros(4)}
        run = kernel("if (blockIdx.x == 0) wait_for_previous();")
        with pytest.raises(Violation, match="block 1 has ended without"), ENGINE.watch_addresses(tensors):
            run((2,), (4,), tuple(tensors.values()), overlaps=True)

    def test_launches_one_after_another_do_not_race(self):
        run = kernel("out[threadIdx.x] += x[threadIdx.x];")
        tensors = {"x": torch.ones(4), "out": torch.zeros(4)}
        with ENGINE.watch_addresses(tensors):
            for _ in range(2):
                run((1,), (4,), tuple(tensors.values()))
        assert tensors["out"].tolist() == [2.0] * 4
