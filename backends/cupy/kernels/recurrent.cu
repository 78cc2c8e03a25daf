// fused_sigmoid_gating, recurrent form: one block per (tile of V, value head, sequence), one pass over the sequence.
//
//   u = beta * (v - decay * S^T k),  S = decay * S + k u^T,  o = S^T q
//
// grid (TILES * HV, min(N, 65535), ceil(N / 65535)), block THREADS. shape.cuh says how a block divides its work.
#include "numbers.cuh"
#include "arguments.cuh"
#include "shape.cuh"
#include "gates.cuh"
#include "states.cuh"
#include "norms.cuh"
#include "sequence.cuh"
#include "recurrence.cuh"
#include "direct.cuh"
#include "staging.cuh"

// A decode step: memory latency is what there is to save. The state, q, k, v and gates are asked for together; gates
// and norms are ready when the state arrives.
template <bool WIDE>
__device__ __forceinline__ void direct(const Arguments& p, const Sequence& it, const HeadGates& gates, const Place& at,
                                       Landing<State>* landing) {
  Recurrence<WIDE> recurrence(p, it, at);
  recurrence.start(landing);
  if (it.length <= 0) return;  // an empty sequence reads and writes nothing; here, the test ends what comes first
  Reader<WIDE> reader(p, it, at);
  Token token, next;
  reader.next(token);
#pragma unroll 1
  for (int64 t = 0;; t++) {
    const bool last = t + 1 == it.length;
    if (Shape::AHEAD && !last) reader.next(next);

    Keys k, q;
    understand(k, token.k);
    understand(q, token.q);
    float v[Shape::ROWS], o[Shape::ROWS];
#pragma unroll
    for (int r = 0; r < Shape::ROWS; r++) v[r] = token.v.get(r);
    const Scalars scalars = token.scalars(k, q, gates, p);

    if (t == 0) recurrence.arrive(landing);
    recurrence.enter(t);
    recurrence.advance(k, v, scalars, [] {});
    recurrence.leave(t);
    if (last) recurrence.save();  // on its way while the output is summed
    dots(o, recurrence.S, q);
    recurrence.outputs.write(o, scalars.scale, at);
    if (last) return;
    if (Shape::AHEAD) token = next;
    else reader.next(token);
  }
}

// Many tokens in sequence: the chain from one token's state to the next one's is what there is to shorten. Everything
// that does not depend on the state is done by others or a window earlier, and a token's output one token late: o and
// the next token's d = S^T k both need the state between them, so one round of shuffle latency serves both.
struct Operands {  // what a token needs before its output can be asked for
  Keys k;
  float v[Shape::ROWS];
  Scalars scalars;
  __device__ __forceinline__ void read(const Stage& stage, int slot, const Place& at) {
    read_staged(k, stage.k[slot], at.lane);
#pragma unroll
    for (int r = 0; r < Shape::ROWS; r++) v[r] = stage.v[slot][at.local + r];
    const float4 x = *(const float4*)&stage.scalars[slot];
    scalars = {x.x, x.y, x.z, x.w};
  }
};

template <bool WIDE> class Walk {  // through a sequence, window by window
 public:
  __device__ __forceinline__ Walk(const Arguments& p, const Sequence& it, const Place& at)
      : recurrence_(p, it, at), at_(at) {}

  __device__ __forceinline__ void start() {
    recurrence_.start(nullptr);
    recurrence_.arrive(nullptr);
  }

  __device__ __forceinline__ void window(const Stage& stage, int count) {
    Operands next;
    next.read(stage, 0, at_);
#pragma unroll 2
    for (int t = 0; t < count; t++) {
      const Operands now = next;
      next.read(stage, t + 1 < count ? t + 1 : t, at_);
      float o[Shape::ROWS];
      recurrence_.enter(done_);
      if constexpr (Shape::LATE) dots(o, recurrence_.S, q_);
      if constexpr (Shape::KDA) {
        Keys g;
        read_staged(g, stage.g[t], at_.lane);
        recurrence_.scale(g);
      }
      recurrence_.advance(now.k, now.v, now.scalars, [&] {
        read_staged(q_, stage.q[t], at_.lane);
        if constexpr (Shape::LATE) recurrence_.outputs.write(o, scale_, at_, done_ > 0);
      });
      scale_ = now.scalars.scale;
      recurrence_.leave(done_);
      if constexpr (!Shape::LATE) output();
      done_++;
    }
  }

  __device__ __forceinline__ void end() {
    recurrence_.save();
    if constexpr (Shape::LATE) output();
  }

 private:
  __device__ __forceinline__ void output() {
    float o[Shape::ROWS];
    dots(o, recurrence_.S, q_);
    recurrence_.outputs.write(o, scale_, at_);
  }

  Recurrence<WIDE> recurrence_;
  const Place at_;
  Keys q_ = {};  // of the token before
  float scale_ = 0.0f;
  int64 done_ = 0;
};

// Everyone who shares the stages. Helpers and the others come here in different branches, where __syncthreads may not
// be met: it belongs to a place in the program. A barrier with a name and a count does not.
__device__ __forceinline__ void meet() {
  if constexpr (Shape::THREADS == 32) __syncwarp();
  else if constexpr (Shape::HELPERS != 0) meet_by_name<1, Shape::THREADS>();
  else __syncthreads();
}

// Two stages: one is read while the other is filled. A window is fetched while the one before it is laid out and the
// one before that is computed, and everybody meets once per window.
template <bool WIDE, bool STAGES, bool COMPUTES>
__device__ __forceinline__ void windows(Fetcher<WIDE> fetcher, Walk<WIDE> walk, int64 length, Stage (&stages)[2]) {
  const auto upto = [](int64 left) { return left < Shape::WINDOW ? (int)left : Shape::WINDOW; };
  int count = upto(length), ahead = upto(length - count);
  if (STAGES) fetcher.fetch(0, count);
  if (COMPUTES) walk.start();
  if (STAGES) fetcher.finish(stages[0], count);
  if (STAGES && ahead > 0) fetcher.fetch(count, ahead);
  meet();
  int64 done = 0;
  for (int side = 0;; side ^= 1) {
    if (COMPUTES) walk.window(stages[side], count);
    if (ahead <= 0) break;
    if (STAGES) fetcher.finish(stages[side ^ 1], ahead);  // last read one window ago, before the last meeting
    done += count, count = ahead, ahead = upto(length - done - count);
    if (STAGES && ahead > 0) fetcher.fetch(done + count, ahead);
    meet();
  }
  if (COMPUTES) walk.end();
}

template <bool WIDE>
__device__ __forceinline__ void run(const Arguments& p, const Sequence& it, const HeadGates& gates, const Place& at,
                                    void* room, int warp, int lane) {
  if constexpr (!Shape::STAGED) {
    direct<WIDE>(p, it, gates, at, (Landing<State>*)room);
  } else {
    if (it.length <= 0) return;
    Stage(&both)[2] = *(Stage(*)[2])room;
    const Fetcher<WIDE> fetcher(p, it, gates, Shape::HELPERS ? warp - Shape::WARPS : warp, lane);
    const Walk<WIDE> walk(p, it, at);
    if constexpr (!Shape::HELPERS) windows<WIDE, true, true>(fetcher, walk, it.length, both);
    else if (warp < Shape::WARPS) windows<WIDE, false, true>(fetcher, walk, it.length, both);
    else windows<WIDE, true, false>(fetcher, walk, it.length, both);
  }
}

// Zero where every address allows WIDE accesses. Else all are narrow, with the same bits.
template <bool STAGED> __device__ __forceinline__ unsigned misaligned(const Arguments& p) {
  unsigned bits = 0;
  if constexpr (STAGED) bits |= Fetcher<STAGED>::misaligned(p);
  else bits |= Reader<!STAGED>::misaligned(p);
  if constexpr (Shape::READ) bits |= Share<State>::misaligned(p.data.pool, p.pool);
  if constexpr (Shape::VERIFY != Shape::NONE) bits |= Share<Step>::misaligned(p.data.steps, p.steps);
  return bits;
}

extern "C" __global__ void __launch_bounds__(Shape::THREADS, Shape::RESIDENT)
    recurrent(const __grid_constant__ Arguments p) {
  void* room = nullptr;
  if constexpr (Shape::STAGED) {
    __shared__ Stage stages[2];
    room = stages;
  } else if constexpr (Shape::LANDING) {
    __shared__ Landing<State> landing;
    room = &landing;
  }
  const int64 n = (int64)blockIdx.z * gridDim.y + blockIdx.y;
  if (n >= p.n) return;
  // Taken from one lane, the warp's number is known to be the same in all: roles are branches nobody diverges at.
  const int lane = threadIdx.x % 32, number = threadIdx.x / 32;
  const int warp = Shape::HELPERS ? __shfl_sync(0xffffffffu, number, 0) : number;
  const Sequence it(p, n);
  const int local = (warp * Shape::GROUPS + lane / Shape::LANES) * Shape::ROWS;
  const Place at = {lane % Shape::LANES, it.tile * Shape::TILE + local, local};
  const HeadGates gates(p, it.hv, lane);
  const bool wide = misaligned<Shape::STAGED>(p) == 0;
  if (!wide) run<false>(p, it, gates, at, room, warp, lane);
  else run<true>(p, it, gates, at, room, warp, lane);
}
