// What each segment of a sequence starts from: S <- passage^T S + what it makes of no state, from one to the next. A block
// has 8 columns of V of one value head of one sequence. A thread has one key, and a quarter of the keys to sum over.
#include "numbers.cuh"
#include "overlap.cuh"
#include "tensor_core.cuh"
#include "chunks.cuh"

constexpr int WIDTH = 8, PARTS = 4, JOIN_THREADS = Shape::KEYS * PARTS;
constexpr int SHARE = Shape::KEYS / PARTS, MINE = WIDTH / PARTS;  // keys that a thread sums over; columns it then has
constexpr int RUN = SHARE <= 32 ? SHARE : SHARE % 16 == 0 ? 16 : SHARE % 12 == 0 ? 12 : 4;  // asked for at a time

struct Joint {
  float state[Shape::KEYS][WIDTH];
  float part[PARTS][WIDTH][Shape::KEYS];
};

extern "C" __global__ void __launch_bounds__(JOIN_THREADS) join(const __grid_constant__ Arguments p) {
  __shared__ __align__(16) Joint x;
  constexpr int TILES = (Shape::V + WIDTH - 1) / WIDTH;
  let_next_start();
  const int64 n = (int64)blockIdx.z * gridDim.y + blockIdx.y;
  if (n >= p.n) return wait_for_previous();
  const Sequence sequence(p, n);
  const int64 segments = (sequence.length + Shape::SPAN - 1) / Shape::SPAN, first = first_crossing(p, n, sequence);
  if (segments <= 1) return wait_for_previous();
  const int hv = (int)blockIdx.x / TILES, column = (int)blockIdx.x % TILES * WIDTH;
  const int k = threadIdx.x % Shape::KEYS, part = threadIdx.x / Shape::KEYS;

  const int64 slot = Shape::READ ? index_at<SLOT_INDEX>(p.data.read, n) : -1;
  const State* const pool = (const State*)p.data.pool + slot * p.pool.slot + hv * p.pool.head;
  float run[RUN], made[MINE];  // of the passage, and of what the segment makes of no state: asked for a segment ahead
  const auto ask_made = [&](int64 segment) {
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      const int v = column + part * MINE + i;
      made[i] = v < Shape::V ? crossing(p, first + segment + 1, hv).start[v][k] : 0.0f;
    }
  };
  const auto ask = [&](int64 segment, int from) {
    const auto& passage = crossing(p, first + segment, hv).passage;
#pragma unroll
    for (int i = 0; i < RUN; i++) {
      const int j = part * SHARE + from + i;
      run[i] = j < Shape::K ? passage[j][k] : 0.0f;
    }
  };
  float mine[MINE];  // of the state, which is there before the call
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    const int v = column + part * MINE + i;
    const bool there = slot >= 0 && k < Shape::K && v < Shape::V;
    mine[i] = there ? Format<State>::get(Format<State>::template load<STATE>(pool + k * p.pool.key + v * p.pool.value), 0)
                    : 0.0f;
  }
  wait_for_previous();
  ask(0, 0);
  ask_made(0);
  for (int64 segment = 0; segment < segments; segment++) {
    auto& start = crossing(p, first + segment, hv).start;
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      const int v = column + part * MINE + i;
      if (v < Shape::V) start[v][k] = mine[i];
      x.state[k][part * MINE + i] = mine[i];
    }
    if (segment + 1 == segments) break;
    __syncthreads();
    float sum[WIDTH] = {};
#pragma unroll
    for (int from = 0; from < SHARE; from += RUN) {
#pragma unroll
      for (int i = 0; i < RUN; i++) {
        const float4* const row = (const float4*)x.state[part * SHARE + from + i];
        const float4 low = row[0], high = row[1];
        const float m = run[i];
        sum[0] = fmaf(m, low.x, sum[0]), sum[1] = fmaf(m, low.y, sum[1]);
        sum[2] = fmaf(m, low.z, sum[2]), sum[3] = fmaf(m, low.w, sum[3]);
        sum[4] = fmaf(m, high.x, sum[4]), sum[5] = fmaf(m, high.y, sum[5]);
        sum[6] = fmaf(m, high.z, sum[6]), sum[7] = fmaf(m, high.w, sum[7]);
      }
      if (from + RUN < SHARE) ask(segment, from + RUN);
      else if (segment + 2 < segments) ask(segment + 1, 0);
    }
#pragma unroll
    for (int i = 0; i < WIDTH; i++) x.part[part][i][k] = sum[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      const int at = part * MINE + i;
      mine[i] = made[i] + ((x.part[0][at][k] + x.part[1][at][k]) + (x.part[2][at][k] + x.part[3][at][k]));
    }
    if (segment + 2 < segments) ask_made(segment + 1);
  }
}
