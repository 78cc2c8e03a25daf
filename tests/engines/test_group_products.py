"""The engine's tensor cores: products of four warps (wgmma) as they are queued, and sums as the chip rounds them."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from isokern.engines.cuda_on_cpu.engine import SCHEDULES, CudaOnCpu
from isokern.engines.cuda_on_cpu.raw_kernel import CpuRawKernel, DivergenceError, KernelError
from isokern.registry.conformance.check import Violation

ENGINE = CudaOnCpu()
COLUMNS = (16, 48, 64, 128)
STEPS = 3  # of 16, along the inner dimension
INNER = 16 * STEPS

#: What a kernel does, by number: the steps of a correct one, and what it leaves out or does besides.
ACTIONS = (
    "plain",
    "two groups",
    "read before the wait",
    "part of the accumulators",
    "overwritten before the wait",
    "overwritten by another warp",
    "refilled without a barrier",
    "left factor overwritten",
    "no begin",
    "no begin after a wait",
    "no commit",
    "no wait",
    "a warp that stays out",
    "a lane that stays out",
    "two lanes that disagree",
    "accumulator written",
    "accumulator scaled",
    "outside shared memory",
    "misaligned",
    "not published",
    "published too late",
    "no barrier",
    "barrier behind the products",
)
NUMBERED = "".join(f"#define DO_{name.upper().replace(' ', '_')} {i}\n" for i, name in enumerate(ACTIONS))

#: A in registers, B through shared memory in an order of its own, with gaps between its core matrices.
SOURCE = """
constexpr int STEPS = 3, INNER = 16 * STEPS;
typedef unsigned short bfloat;

template <bool TRANSPOSED> struct Order {  // bytes from core matrix to core matrix
  static constexpr int K = TRANSPOSED ? 144 : 160, N = TRANSPOSED ? 2 * STEPS * 144 + 32 : 2 * STEPS * 160;
  __device__ static int at(int k, int n) {
    return n / 8 * N + k / 8 * K + (TRANSPOSED ? k % 8 * 16 + n % 8 * 2 : n % 8 * 16 + k % 8 * 2);
  }
};

template <int N, bool TRANSPOSED>
__device__ void product(unsigned char* memory, const bfloat* x, const bfloat* y, float* z, int add, int action) {
  using B = Order<TRANSPOSED>;
  const int t = threadIdx.x, warp = t / 32, lane = t % 32, g = lane / 4, q = lane % 4;
  const auto fill = [&](int first, int step, bfloat times) {
    for (int i = first; i < INNER * N; i += step) *(bfloat*)(memory + B::at(i / N, i % N)) = y[i] * times;
  };
  if (action == DO_PUBLISHED_TOO_LATE) publish_shared();
  fill(t, 128, 1);
  if (action != DO_NOT_PUBLISHED && action != DO_PUBLISHED_TOO_LATE) publish_shared();
  if (action != DO_NO_BARRIER && action != DO_BARRIER_BEHIND_THE_PRODUCTS) __syncthreads();
  if (action == DO_PUBLISHED_TOO_LATE) publish_shared();
  unsigned a[STEPS][4];
  for (int s = 0; s < STEPS; s++)
    for (int i = 0; i < 4; i++) {
      const bfloat* const pair = x + (16 * warp + g + i % 2 * 8) * INNER + 16 * s + i / 2 * 8 + 2 * q;
      a[s][i] = pair[0] | (unsigned)pair[1] << 16;
    }
  float c[N / 8][4], d[2][4] = {};
  const auto each = [&](auto act) {
    for (int i = 0; i < N / 8; i++)
      for (int e = 0; e < 4; e++) act(c[i][e], z[(16 * warp + g + e / 2 * 8) * N + 8 * i + 2 * q + e % 2]);
  };
  each([](float& own, float& out) { own = out; });
  const auto out = [&] { each([](float& own, float& out) { out = own; }); };
  Matrix b = matrix_of(memory, B::K, B::N);
  if (action == DO_OUTSIDE_SHARED_MEMORY) b = moved(b, 16);
  if (action == DO_MISALIGNED) b = moved(b, 8);
  if (action == DO_TWO_LANES_THAT_DISAGREE && lane == 9) b = moved(b, 16);
  if (action == DO_A_WARP_THAT_STAYS_OUT && warp == 2) return;
  if (action == DO_A_LANE_THAT_STAYS_OUT && t == 70) { __syncwarp(); return; }
  if (action != DO_NO_BEGIN) group_begin();
  for (int s = 0; s < STEPS; s++) {
    group_multiply<N, TRANSPOSED>(c[0], a[s], moved(b, 2 * s * B::K), add || s > 0);
    if (action == DO_LEFT_FACTOR_OVERWRITTEN) a[s][0] = a[s][3] = 0;
  }
  if (action == DO_PART_OF_THE_ACCUMULATORS) {
    const Matrix first = moved(b, B::N);  // columns 8 to 23 once more, into the last 16
    group_multiply<16, TRANSPOSED>(c[N / 8 - 2], a[0], first, true);
  }
  if (action == DO_NO_COMMIT) return;
  group_commit();
  if (action == DO_BARRIER_BEHIND_THE_PRODUCTS) __syncthreads();
  if (action == DO_NO_WAIT) return;
  if (action == DO_READ_BEFORE_THE_WAIT) return out(), group_wait<0>();
  if (action == DO_OVERWRITTEN_BEFORE_THE_WAIT) fill(t / 32 * 32, 1, 0);
  if (action == DO_OVERWRITTEN_BY_ANOTHER_WARP && warp == 3) fill(lane, 32, 0);
  if (action == DO_ACCUMULATOR_WRITTEN && t == 37) c[1][2] = 0;
  if (action == DO_ACCUMULATOR_SCALED && t == 37) c[1][2] *= 2.0f;
  if (action == DO_TWO_GROUPS) {  // the older one arrives first: what is left is the newer one, in d
    group_multiply<16, TRANSPOSED>(d[0], a[0], b, false);
    group_commit();
    group_wait<1>();
    out();
    const bool missing = d[0][0] != d[0][0] && d[1][3] != d[1][3];
    group_wait<0>();
    if (!missing || d[0][0] != d[0][0]) z[0] = __int_as_float(0x7fc00000);
    return;
  }
  group_wait<0>();
  if (action == DO_NO_BEGIN_AFTER_A_WAIT) group_multiply<N, TRANSPOSED>(c[0], a[0], b, true);
  if (action == DO_REFILLED_WITHOUT_A_BARRIER) fill(t, 128, 0);
  out();
}

extern "C" __global__ void group(const bfloat* x, const bfloat* y, float* z, int columns, int order, int add,
                                 int action) {
  extern __shared__ __align__(128) unsigned char memory[];
#define CASE(N)                                                              \\
  if (columns == N && order) product<N, true>(memory, x, y, z, add, action); \\
  if (columns == N && !order) product<N, false>(memory, x, y, z, add, action);
  CASE(16) CASE(48) CASE(64) CASE(128)
}
"""
GROUP = CpuRawKernel(NUMBERED + SOURCE, "group")

#: A matrix of 16 x 8 x 16 by one warp.
SMALL = CpuRawKernel(
    """
    extern "C" __global__ void small(const unsigned* a, const unsigned short* b, float* c) {
      const int lane = threadIdx.x, g = lane / 4, q = lane % 4;
      const auto element = [&](int e) { return 8 * (g + e / 2 * 8) + 2 * q + e % 2; };
      const unsigned left[4] = {a[8 * g + q], a[8 * (g + 8) + q], a[8 * g + q + 4], a[8 * (g + 8) + q + 4]};
      const auto right = [&](int k) { return b[8 * k + g] | (unsigned)b[8 * (k + 1) + g] << 16; };
      float sum[4];
      for (int e = 0; e < 4; e++) sum[e] = c[element(e)];
      multiply(sum, left, right(2 * q), right(2 * q + 8));
      for (int e = 0; e < 4; e++) c[element(e)] = sum[e];
    }
    """,
    "small",
)


def shared_bytes(columns: int, transposed: bool) -> int:
    """Exactly what the matrix takes."""
    k, n = (144, 2 * STEPS * 144 + 32) if transposed else (160, 2 * STEPS * 160)
    return (columns // 8 - 1) * n + (2 * STEPS - 1) * k + 128


def whole(*shape: int) -> torch.Tensor:
    """Small whole numbers: any order of summation gives the same."""
    return torch.randint(-8, 9, shape).float()


def run(action: str, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, *, transposed=False, add=True) -> None:
    """z += x y, or z = x y. x, y: bfloat16."""
    flags = (y.shape[1], int(transposed), int(add), ACTIONS.index(action))
    GROUP((1,), (128,), (x, y, z, *map(np.int32, flags)), shared_bytes(y.shape[1], transposed))


def matrices(columns: int = 48) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return whole(64, INNER).bfloat16(), whole(INNER, columns).bfloat16(), whole(64, columns)


def watched(action: str) -> None:
    x, y, z = matrices()
    with ENGINE.watch_addresses({"x": x, "y": y, "out": z}):
        run(action, x, y, z)


class TestGroupProducts:
    @pytest.mark.parametrize("columns", COLUMNS)
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("add", [False, True])
    def test_a_chain_of_products(self, columns, transposed, add):
        x, y, z = matrices(columns)
        want = x.float() @ y.float() + (z if add else 0)
        run("plain", x, y, z, transposed=transposed, add=add)
        assert torch.equal(z, want)

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_every_schedule_gives_the_same_and_no_race(self, schedule):
        x, y, z = matrices()
        want = z + x.float() @ y.float()
        with ENGINE.schedule(schedule), ENGINE.watch_addresses({"x": x, "y": y, "out": z}):
            run("plain", x, y, z)
        assert torch.equal(z, want)

    @pytest.mark.parametrize("transposed", [False, True])
    def test_products_of_a_part_of_the_accumulators_follow_those_of_all(self, transposed):
        x, y, z = matrices(64)
        want = z + x.float() @ y.float()
        want[:, 48:] += x[:, :16].float() @ y[:16, 8:24].float()
        run("part of the accumulators", x, y, z, transposed=transposed)
        assert torch.equal(z, want)

    def test_the_left_factor_is_taken_when_asked_for(self):
        x, y, z = matrices()
        want = z + x.float() @ y.float()
        run("left factor overwritten", x, y, z)
        assert torch.equal(z, want)

    def test_the_newest_groups_can_be_left_running(self):
        x, y, z = matrices()
        want = z + x.float() @ y.float()
        run("two groups", x, y, z)
        assert torch.equal(z, want)

    def test_accumulators_are_nan_until_waited_for(self):
        x, y, z = matrices()
        run("read before the wait", x, y, z)
        assert bool(z.isnan().all())

    def test_a_matrix_overwritten_before_the_wait_gives_other_values(self):
        x, y, z = matrices()
        before = z.clone()
        run("overwritten before the wait", x, y, z)
        assert torch.equal(z, before)  # what was written instead is zeros


class TestWhatIsReported:
    @pytest.mark.parametrize(
        ("action", "kind", "message"),
        [
            ("no begin", KernelError, "thread 0: group_multiply without group_begin"),
            ("no begin after a wait", KernelError, "group_multiply without group_begin"),
            ("no commit", KernelError, "3 group products queued, the last of which it has not committed"),
            ("no wait", KernelError, "3 group products queued, which it has not waited for"),
            ("a warp that stays out", DivergenceError, "warp 0 took part in 4 group products and waits, warp 2 in 0"),
            ("a lane that stays out", DivergenceError, "threads 64 and 70 are not at the same operation"),
            ("two lanes that disagree", DivergenceError, "threads 0 and 9 ask for different group products"),
            ("accumulator written", KernelError, "warp 1: an accumulator was written"),
            ("accumulator scaled", KernelError, "warp 1: an accumulator was written"),
            ("outside shared memory", KernelError, r"rows 8\.\. and columns 40\.\. of its matrix outside shared"),
            ("misaligned", KernelError, "in steps of 16 bytes"),
        ],
    )
    def test_misuse(self, action, kind, message):
        with pytest.raises(kind, match=message):
            run(action, *matrices())
        x, y, z = matrices()  # and the engine goes on
        want = z + x.float() @ y.float()
        run("plain", x, y, z)
        assert torch.equal(z, want)

    @pytest.mark.parametrize(
        ("action", "message"),
        [
            ("no barrier", "race|before anything was written"),
            ("barrier behind the products", "race|before anything was written"),
            ("refilled without a barrier", "race"),
            ("overwritten by another warp", "race"),
            ("not published", "without publish_shared"),
            ("published too late", "without publish_shared"),
        ],
    )
    @pytest.mark.parametrize("schedule", ["in turn", "last warp ahead"])
    def test_what_the_watch_sees(self, action, message, schedule):
        with ENGINE.schedule(schedule), pytest.raises(Violation, match=message):
            watched(action)


def exponent(x: Fraction) -> int:
    """Of its leading bit."""
    return math.frexp(float(x))[1] - 1


def cut(x: Fraction, unit: int) -> Fraction:
    """Towards zero, to a multiple of 2^unit."""
    return math.trunc(x / Fraction(2) ** unit) * Fraction(2) ** unit


def chip_sum(c: float, a: list[float], b: list[float]) -> float:
    """c + a b: every term cut off 25 bits below the largest, and the sum to a float."""
    given = [c, *(x * y for x, y in zip(a, b, strict=True))]  # exact: a double has room for 16 bits
    if not all(map(math.isfinite, given)):
        return sum(given)
    terms = [Fraction(t) for t in given if t]
    if not terms:
        return 0.0
    largest = max(map(exponent, terms))
    total = sum((cut(t, largest - 25) for t in terms), Fraction(0))
    if not total:
        return 0.0
    result = float(cut(total, max(exponent(total), -126) - 23))
    return result if abs(result) < 2.0**128 else math.copysign(math.inf, result)


def scattered(*shape: int, spread: int, centre: int = 0) -> torch.Tensor:
    """Numbers of both signs with exponents all over."""
    return torch.ldexp(torch.randn(shape), centre + torch.randint(-spread, spread + 1, shape))


def tile(*, spread: int, centre: int = 0, centre_c: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    c = scattered(16, 8, spread=spread, centre=centre_c)
    return scattered(16, 16, spread=spread, centre=centre), scattered(16, 8, spread=spread, centre=centre), c


CHANGING = torch.tensor([1.0, -1.0])
#: a, b and c of c + a b.
TILES = {
    "alike": lambda: (torch.randn(16, 16), torch.randn(16, 8), torch.randn(16, 8)),
    "positive": lambda: (torch.rand(16, 16), torch.rand(16, 8), 16 * torch.rand(16, 8)),
    "scattered": lambda: tile(spread=8),
    "large sums": lambda: tile(spread=4, centre_c=22),
    "small sums": lambda: tile(spread=9, centre_c=-30),
    "cancelling": lambda: (
        torch.randn(16, 8).repeat(1, 2) * CHANGING.repeat_interleave(8),
        torch.randn(8, 8).repeat(2, 1),
        scattered(16, 8, spread=10, centre=-15),
    ),
    "subnormal": lambda: tile(spread=9, centre=-68, centre_c=-140),
    "subnormal factors": lambda: (
        scattered(16, 16, spread=6, centre=-130),
        torch.randn(16, 8),
        scattered(16, 8, spread=9, centre=-130),
    ),
    "overflowing": lambda: tile(spread=3, centre=62, centre_c=123),
    "beyond and back": lambda: (2.0**100 * CHANGING.repeat(16, 8), torch.full((16, 8), 2.0**100), torch.randn(16, 8)),
    "zeros": lambda: (torch.zeros(16, 16), -torch.randn(16, 8), torch.zeros(16, 8)),
    "infinities": lambda: (
        torch.randn(16, 16).index_fill_(1, torch.tensor([3]), math.inf),
        torch.arange(-4.0, 4.0).repeat(16, 1),  # of both signs, and times zero
        torch.randn(16, 8).index_fill_(0, torch.tensor([2]), -math.inf),
    ),
    "nan": lambda: (torch.randn(16, 16), torch.randn(16, 8), torch.full((16, 8), math.nan)),
}


@pytest.fixture(scope="module")
def tiles() -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    made = {name: make() for name, make in TILES.items()}
    return {name: (a.bfloat16(), b.bfloat16(), c.float()) for name, (a, b, c) in made.items()}


def exactly(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    rows, columns = a.double().tolist(), b.double().t().tolist()
    sums = c.double().tolist()
    return torch.tensor(
        [[chip_sum(z, x, y) for z, y in zip(line, columns, strict=True)] for line, x in zip(sums, rows, strict=True)]
    )


def bits(x: torch.Tensor) -> list[int]:
    return torch.where(x.isnan(), torch.tensor(0x7FFFFFFF), x.view(torch.int32)).flatten().tolist()


class TestSums:
    @pytest.mark.parametrize("name", TILES)
    def test_are_cut_off_not_rounded(self, tiles, name):
        a, b, c = tiles[name]
        got = c.clone()
        SMALL((1,), (32,), (a, b, got))
        assert bits(got) == bits(exactly(a, b, c))

    def test_a_nan_is_one_of_the_chip(self, tiles):
        a, b, c = tiles["nan"]
        got = c.clone()
        SMALL((1,), (32,), (a, b, got))
        assert set(got.view(torch.int32).flatten().tolist()) == {0x7FFFFFFF}

    def test_a_term_that_is_cut_off_and_one_that_is_kept(self):
        a, b = torch.zeros(16, 16).bfloat16(), torch.ones(16, 8).bfloat16()
        a[:, 0] = 1.0
        a[:, 1:5] = 2.0**-25  # four of them are half of a float's last bit
        a[8:, 1:5] = 2.0**-26  # these are gone before they are added
        c = torch.full((16, 8), 2.0**-24)  # and with this it is a whole one
        SMALL((1,), (32,), (a, b, c))
        ulp = 2.0**-23
        assert bits(c[:8]) == bits(torch.full((8, 8), 1.0 + ulp))
        assert bits(c[8:]) == bits(torch.ones(8, 8))

    def test_are_the_same_in_products_of_four_warps(self, tiles):
        x, y, z = torch.zeros(64, INNER).bfloat16(), torch.zeros(INNER, 16).bfloat16(), torch.zeros(64, 16)
        chosen = ["alike", "scattered", "large sums", "small sums"]
        y[:16, :8] = tiles["alike"][1]
        for i, name in enumerate(chosen):
            x[16 * i : 16 * i + 16, :16], z[16 * i : 16 * i + 16, :8] = tiles[name][0], tiles[name][2]
        want = exactly(x[:, :16], y[:16], z)
        run("plain", x, y, z)
        assert bits(z) == bits(want)
