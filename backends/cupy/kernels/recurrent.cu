// fused_sigmoid_gating, recurrent form: one block per (tile of V, value head, sequence), one pass over the sequence.
//
// grid (TILES * HV, min(N, 65535), ceil(N / 65535)), block THREADS. The state stays in registers from the first token
// to the last. Per token: d = S^T k and, one token late, o = S^T q are summed together, so one round of shuffles
// serves both; then u = beta * (v - decay * d) and S = decay * S + k u^T.
#include "numbers.cuh"
#include "arguments.cuh"
#include "gates.cuh"
#include "shape.cuh"
#include "states.cuh"
#include "staging.cuh"

__device__ __forceinline__ void meet() {  // everyone who shares a stage
  if constexpr (Shape::WARPS == 1) __syncwarp();
  else __syncthreads();
}

struct Operands {  // what a token needs before its output can be asked for
  Keys k;
  float v[Shape::ROWS], decay, beta;
  __device__ __forceinline__ void read(const Stage& stage, int slot, const Place& at, int row) {
    k.read(stage.k[slot], at.lane);
#pragma unroll
    for (int r = 0; r < Shape::ROWS; r++) v[r] = stage.v[slot][row + r];
    decay = Shape::KDA ? 1.0f : stage.decay[slot];
    beta = stage.beta[slot];
  }
};

class Outputs {  // of the rows whose sums this lane ends up with
 public:
  __device__ __forceinline__ Outputs(const Arguments& p, int64 batch, int64 first, int hv, const Place& at)
      : time_(p.out.time), element_(Shape::UNIT ? 1 : p.out.element) {
    const int row = Scattered::row(at.lane);
    next_ = (Io*)p.out.data + batch * p.out.batch + first * time_ + hv * p.out.head + (at.row + row) * element_;
#pragma unroll
    for (int i = 0; i < Scattered::COUNT; i++) mine_[i] = Scattered::writes(at.lane) && at.has(row + i);
  }

  // The next token's outputs, from every lane's part of the sums of its rows. Only sums while there is none.
  __device__ __forceinline__ void write(float (&o)[Shape::ROWS], const Place& at, bool token) {
    Scattered sums;
    halve<Shape::ROWS, Shape::LANES / 2>(o, at.lane, sums);
#pragma unroll
    for (int i = 0; i < Scattered::COUNT; i++)
      if (token && mine_[i]) Format<Io>::store(next_ + i * element_, sums.x[i]);
    if (token) next_ += time_;
  }

 private:
  Io* next_;
  int64 time_, element_;
  bool mine_[Scattered::COUNT];
};

extern "C" __global__ void __launch_bounds__(Shape::THREADS) recurrent(const __grid_constant__ Arguments p) {
  __shared__ __align__(16) Stage stages[2];

  const int64 n = (int64)blockIdx.z * gridDim.y + blockIdx.y;
  if (n >= p.n) return;
  const int hv = blockIdx.x / Shape::TILES, tile = blockIdx.x % Shape::TILES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int local = (warp * Shape::GROUPS + lane / Shape::LANES) * Shape::ROWS;  // first row within the tile
  const Place at = {lane % Shape::LANES, tile * Shape::TILE + local};

  // Everything that depends on n and hv alone is asked for at once, before the first answer is looked at.
  Index begin, end, read, write, row;
  read.fetch(p.read, n);
  write.fetch(p.write, n);
  if constexpr (Shape::VERIFY != Shape::NONE) row.fetch(p.rows, n);
  const HeadGates gates(p, hv, lane);
  int64 batch = n, first = 0, length = p.length;
  if (p.cu_seqlens.data) {
    begin.load(p.cu_seqlens, n);
    end.load(p.cu_seqlens, n + 1);
    batch = 0;
    first = begin.value(p.cu_seqlens);
    length = end.value(p.cu_seqlens) - first;
  }
  if (length <= 0) return;  // an empty sequence reads and writes nothing
  const int64 source = read.value(p.read), target = write.value(p.write);
  const int64 buffer = row.value(p.rows);  // row of the intermediate states

  Fetcher fetcher(p, gates, batch, first, hv, tile, warp, lane);
  int count = length < Shape::WINDOW ? (int)length : Shape::WINDOW;
  fetcher.fetch(0, count);

  Registers S;
  clear(S);
  const bool pool_vectors = Vectors<State>::usable(p.pool);
  const State* start = (const State*)p.pool.data + source * p.pool.slot + hv * p.pool.head;
  if (source >= 0) load_state<Shape::STREAM>(S, start, p.pool, at, pool_vectors);
  const bool step_vectors = Shape::VERIFY != Shape::NONE && Vectors<Step>::usable(p.steps);
  Step* steps = (Step*)p.steps.data + buffer * p.steps.slot + hv * p.steps.head;

  Outputs outputs(p, batch, first, hv, at);
  fetcher.finish(stages[0], count);
  meet();

  Keys q = {};        // of the token before,
  bool begun = false;  // if there was one
  int64 done = 0;
  for (int side = 0;; side ^= 1) {
    const Stage& stage = stages[side];
    const int64 left = length - done - count;
    const int ahead = left < Shape::WINDOW ? (int)left : Shape::WINDOW;
    if (ahead > 0) fetcher.fetch(done + count, ahead);

    Operands next;
    next.read(stage, 0, at, local);
#pragma unroll 2
    for (int t = 0; t < count; t++) {
      const Operands now = next;
      next.read(stage, t + 1 < count ? t + 1 : t, at, local);

      if constexpr (Shape::VERIFY == Shape::TREE) {
        // Steps of a tree start from the state their parent left in the buffer: this thread stored its share there.
        if (buffer >= 0 && begun) {
          const int64 parent = index_at(p.parents, n * p.parent_stride + done + t);
          if (parent >= 0) {
            load_state<false>(S, steps + parent * p.steps.step, p.steps, at, step_vectors);
          } else {
            clear(S);
            if (source >= 0) load_state<false>(S, start, p.pool, at, pool_vectors);
          }
        }
      }

      float o[Shape::ROWS], d[Shape::ROWS];
      if constexpr (Shape::VERIFY != Shape::TREE)
#pragma unroll
        for (int r = 0; r < Shape::ROWS; r++) o[r] = dot(S, r, q);
      if constexpr (Shape::KDA) {
        Keys g;
        g.read(stage.g[t], at.lane);
#pragma unroll
        for (int r = 0; r < Shape::ROWS; r++)
#pragma unroll
          for (int i = 0; i < Shape::CHUNKS; i++)
#pragma unroll
            for (int e = 0; e < Shape::VECTOR; e++) S.x[r][i][e] *= g.x[i][e];
      }
#pragma unroll
      for (int r = 0; r < Shape::ROWS; r++) d[r] = dot(S, r, now.k);
      q.read(stage.q[t], at.lane);
      sum_to_all(d);
      if constexpr (Shape::VERIFY != Shape::TREE) outputs.write(o, at, begun);
      begun = true;

#pragma unroll
      for (int r = 0; r < Shape::ROWS; r++) {
        const float u = now.beta * fmaf(-now.decay, d[r], now.v[r]);
#pragma unroll
        for (int i = 0; i < Shape::CHUNKS; i++)
#pragma unroll
          for (int e = 0; e < Shape::VECTOR; e++) {
            float& s = S.x[r][i][e];
            s = fmaf(now.k.x[i][e], u, Shape::KDA ? s : now.decay * s);
          }
      }

      if constexpr (Shape::VERIFY != Shape::NONE)
        if (buffer >= 0) store_state<false>(S, steps + (done + t) * p.steps.step, p.steps, at, step_vectors);
      if constexpr (Shape::VERIFY == Shape::TREE) {
#pragma unroll
        for (int r = 0; r < Shape::ROWS; r++) o[r] = dot(S, r, q);
        outputs.write(o, at, true);
      }
    }
    done += count;
    if (ahead <= 0) break;
    fetcher.finish(stages[side ^ 1], ahead);  // last read one window ago, before the last meeting
    meet();
    count = ahead;
  }

  if constexpr (Shape::VERIFY != Shape::TREE) {
    float o[Shape::ROWS];
#pragma unroll
    for (int r = 0; r < Shape::ROWS; r++) o[r] = dot(S, r, q);
    outputs.write(o, at, true);
  }
  if (target >= 0) {
    State* end = (State*)p.pool.data + target * p.pool.slot + hv * p.pool.head;
    store_state<Shape::STREAM>(S, end, p.pool, at, pool_vectors);
  }
}
