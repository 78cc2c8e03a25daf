// The state from chunk to chunk, and the outputs. S is the state at a chunk's start, R the values less its predictions:
//
//   R = V - key_scale K S;   U = solve R;   O = query_scale Q S + attend U;   S <- total S + K^T (keep_scale U)
//
// A warp has 16 columns of V for a whole sequence, and holds all of it transposed: S^T is its accumulator [16, K], and
// rounded in place it is the left factor of S^T K^T and S^T Q^T; what those give is [16, tokens], and in turn the left
// factor of the products over tokens. So the chain from one state to the next never leaves the warp's registers. What
// it needs of a chunk comes through shared memory, STAGES chunks at a time, for all warps of a block.
#include "numbers.cuh"
#include "tensor_core.cuh"
#include "chunks.cuh"

constexpr int SCAN_THREADS = 32 * Shape::WARPS;

struct Stage {
  Record record;
  Tile<Shape::PITCH> keys, queries;
  Tile<Shape::VALUE_PITCH> values;
};
static_assert(sizeof(Record) % 16 == 0 && sizeof(Stage) % 16 == 0, "copied 16 bytes at a time");

// A warp's part of the state: element (2 q + c % 2 + 8 i, row + g + c / 2 * 8) is state[i][c].
using Columns = float[Shape::KEYS / 8][4];

__device__ __forceinline__ void load_state(Columns& state, const State* from, const States& x, int row, int lane) {
  const int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int i = 0; i < Shape::KEYS / 8; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int k = 8 * i + 2 * q, v = row + g + 8 * half;
      Raw<State, 2> pair;
      pair.template load<Shape::WIDE_STATE, STATE>(from + k * x.key + v * x.value, x.key,
                                                   v < Shape::V ? Shape::K - k : 0);
      state[i][2 * half] = pair.get(0), state[i][2 * half + 1] = pair.get(1);
    }
}

__device__ __forceinline__ void store_state(const Columns& state, State* to, const States& x, int row, int lane) {
  const int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int i = 0; i < Shape::KEYS / 8; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int k = 8 * i + 2 * q, v = row + g + 8 * half;
      const float pair[2] = {state[i][2 * half], state[i][2 * half + 1]};
      Raw<State, 2>::template store<Shape::WIDE_STATE, STATE>(to + k * x.key + v * x.value, x.key,
                                                              v < Shape::V ? Shape::K - k : 0, pair);
    }
}

// Start bringing chunk `token / 64` of a sequence. Values beyond V are zeros.
__device__ __forceinline__ void bring(Stage& to, const Arguments& p, const Sequence& sequence, int64 token,
                                      int hv, int column) {
  const int live = (int)min((int64)CHUNK, sequence.length - token), head = hv / Shape::SHARING;
  const Record* const record = p.data.records + (sequence.slot + token / CHUNK) * p.heads + hv;
  for (int i = threadIdx.x; i < (int)(sizeof(Record) / 16); i += SCAN_THREADS)
    copy_async<16>((uint4*)&to.record + i, (const uint4*)record + i, true);
  const Io* const k = sequence.begin<const Io>(p.data.k, p.k, head, token);
  const Io* const q = sequence.begin<const Io>(p.data.q, p.q, head, token);
  const Io* const v = sequence.begin<const Io>(p.data.v, p.v, hv, token) + column * p.v.element;
  stage<Shape::KEYS, Shape::PITCH, SCAN_THREADS>(to.keys, k, p.k, live, Shape::K);
  stage<Shape::KEYS, Shape::PITCH, SCAN_THREADS>(to.queries, q, p.q, live, Shape::K);
  stage<Shape::TILE, Shape::VALUE_PITCH, SCAN_THREADS>(to.values, v, p.v, live, Shape::V - column);
}

// Tokens 2 q + 8 i of a chunk's scale: the pairs that an accumulator's columns are.
__device__ __forceinline__ float2 pair_of(const float* scale, int i, int q) {
  return *(const float2*)(scale + 8 * i + 2 * q);
}

template <class T>
__device__ __forceinline__ void store_outputs(const float (&o)[2 * BLOCKS][4], T* out, const Tokens& x, int live,
                                              int row, int lane) {
  const int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int i = 0; i < 2 * BLOCKS; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float first = o[i][2 * half], second = o[i][2 * half + 1];  // tokens 2 q.., column g
      if constexpr (sizeof(T) == 4) {
        const int token = 8 * i + 2 * q, v = row + 8 * half + g;
        T* const at = out + token * x.time + v * x.element;
        if (token < live && v < Shape::V) Format<T>::template store<STATE>(at, first);
        if (token + 1 < live && v < Shape::V) Format<T>::template store<STATE>(at + x.time, second);
      } else {
        const float rounded[2] = {first, second};
        const unsigned pair = transposed(Format<T>::put(rounded));  // token g, columns 2 q..
        const int token = 8 * i + g, v = row + 8 * half + 2 * q;
        if (token >= live) continue;
        T* const at = out + token * x.time + v * x.element;
        if constexpr (Shape::WIDE) {
          if (v < Shape::V) *(unsigned*)at = pair;
        } else {
          if (v < Shape::V) at->bits = (unsigned short)pair;
          if (v + 1 < Shape::V) at[x.element].bits = (unsigned short)(pair >> 16);
        }
      }
    }
  }
}

// A block of a triangle, as a right factor.
__device__ __forceinline__ void load_block(unsigned (&b)[Shape::PIECES][4], const Triangle& triangle, int block,
                                           int lane) {
#pragma unroll
  for (int p = 0; p < Shape::PIECES; p++) {
    const uint4 x = triangle.block[p][block][lane];
    b[p][0] = x.x, b[p][1] = x.y, b[p][2] = x.z, b[p][3] = x.w;
  }
}

__device__ __forceinline__ void step(Columns& state, const Stage& s, Io* out, const Tokens& x, int live, int row,
                                     int lane) {
  constexpr int P = Shape::PITCH, PV = Shape::VALUE_PITCH;
  const int q = lane % 4, warp = threadIdx.x / 32;
  float u[2 * BLOCKS][4] = {}, o[2 * BLOCKS][4] = {};
  const Shared keys = at_right<P>(s.keys[0], lane), queries = at_right<P>(s.queries[0], lane);
  const Shared values = at_right<PV>(s.values[0] + 16 * warp, lane), key_rows = at_left<P>(s.keys[0], lane);
  unsigned matrix[IO_PIECES][4], block[Shape::PIECES][4];
  Factor<Shape::PIECES> factor, residual[BLOCKS];

#pragma unroll
  for (int i = 0; i < Shape::KEYS / 16; i++) {
    factor.set(state[2 * i], state[2 * i + 1]);
#pragma unroll
    for (int j = 0; j < BLOCKS; j++) {
      if (16 * j >= live) continue;
#pragma unroll
      for (int r = 0; r < IO_PIECES; r++)
        load_matrices(matrix[r], keys + beyond<P>(r * CHUNK + 16 * j, 16 * i));
      multiply(u[2 * j], u[2 * j + 1], factor, matrix);
#pragma unroll
      for (int r = 0; r < IO_PIECES; r++)
        load_matrices(matrix[r], queries + beyond<P>(r * CHUNK + 16 * j, 16 * i));
      multiply(o[2 * j], o[2 * j + 1], factor, matrix);
    }
  }
#pragma unroll
  for (int j = 0; j < BLOCKS; j++) {
#pragma unroll
    for (int r = 0; r < IO_PIECES; r++)
      load_transposed(matrix[r], values + beyond<PV>(r * CHUNK + 16 * j, 0));
#pragma unroll
    for (int side = 0; side < 2; side++) {
      const float2 scale = pair_of(s.record.key_scale, 2 * j + side, q);
      const float2 scales = pair_of(s.record.query_scale, 2 * j + side, q);
      float(&y)[4] = u[2 * j + side];
      float(&z)[4] = o[2 * j + side];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float first = 0.0f, second = 0.0f;
#pragma unroll
        for (int r = IO_PIECES - 1; r >= 0; r--)
          first += low_half(matrix[r][2 * side + half]), second += high_half(matrix[r][2 * side + half]);
        residual[j].set(2 * side + half, fmaf(-scale.x, y[2 * half], first),
                        fmaf(-scale.y, y[2 * half + 1], second));
        y[2 * half] = y[2 * half + 1] = 0.0f;
        z[2 * half] *= scales.x, z[2 * half + 1] *= scales.y;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    if (16 * i >= live) continue;
#pragma unroll
    for (int j = 0; j <= i; j++) {
      load_block(block, s.record.solve, block_of(i, j), lane);
      multiply(u[2 * i], u[2 * i + 1], residual[j], block);
    }
  }
#pragma unroll
  for (int j = 0; j < BLOCKS; j++) residual[j].set(u[2 * j], u[2 * j + 1]);
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    if (16 * i >= live) continue;
#pragma unroll
    for (int j = 0; j <= i; j++) {
      load_block(block, s.record.attend, block_of(i, j), lane);
      multiply(o[2 * i], o[2 * i + 1], residual[j], block);
    }
  }
  const float total = s.record.total;
#pragma unroll
  for (int i = 0; i < Shape::KEYS / 8; i++)
#pragma unroll
    for (int c = 0; c < 4; c++) state[i][c] *= total;
#pragma unroll
  for (int j = 0; j < BLOCKS; j++) {
    if (16 * j >= live) continue;
#pragma unroll
    for (int side = 0; side < 2; side++) {
      const float2 keep = pair_of(s.record.keep_scale, 2 * j + side, q);
      float(&y)[4] = u[2 * j + side];
      y[0] *= keep.x, y[1] *= keep.y, y[2] *= keep.x, y[3] *= keep.y;
    }
    factor.set(u[2 * j], u[2 * j + 1]);
#pragma unroll
    for (int i = 0; i < Shape::KEYS / 16; i++) {
#pragma unroll
      for (int r = 0; r < IO_PIECES; r++)
        load_transposed(matrix[r], key_rows + beyond<P>(r * CHUNK + 16 * j, 16 * i));
      multiply(state[2 * i], state[2 * i + 1], factor, matrix);
    }
  }
  store_outputs(o, out, x, live, row, lane);
}

extern "C" __global__ void __launch_bounds__(SCAN_THREADS) scan(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(16) unsigned char memory[];
  Stage* const stages = (Stage*)memory;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64 n = (int64)blockIdx.z * gridDim.y + blockIdx.y;
  if (n >= p.n) return;
  const int hv = blockIdx.x / Shape::TILES, column = blockIdx.x % Shape::TILES * Shape::TILE;
  const int row = column + 16 * warp;
  const Sequence sequence(p, n);
  if (sequence.length <= 0) return;
  const int64 source = Shape::READ ? index_at<SLOT_INDEX>(p.data.read, n) : -1;
  const int64 target = Shape::WRITE ? index_at<SLOT_INDEX>(p.data.write, n) : -1;

  int64 brought = 0;  // tokens
  const auto bring_next = [&](int to) {
    if (brought < sequence.length) bring(stages[to], p, sequence, brought, hv, column);
    group_copies();
    brought += CHUNK;
  };
#pragma unroll
  for (int i = 0; i < Shape::STAGES - 1; i++) bring_next(i);
  Columns state = {};
  State* const pool = (State*)p.data.pool + hv * p.pool.head;
  if (source >= 0) load_state(state, pool + source * p.pool.slot, p.pool, row, lane);
  int current = 0;
  for (int64 token = 0; token < sequence.length; token += CHUNK) {
    if constexpr (Shape::STAGES == 1) {
      __syncthreads();  // the chunk before this one has been used, by all
      bring_next(0);
      wait_for_group<0>();
      __syncthreads();
    } else {
      wait_for_group<Shape::STAGES - 2>();
      __syncthreads();  // this chunk is here, for all; the one before it has been used, by all
      bring_next((current + Shape::STAGES - 1) % Shape::STAGES);
    }
    step(state, stages[current], sequence.begin<Io>(p.data.out, p.out, hv, token), p.out,
         (int)min((int64)CHUNK, sequence.length - token), row, lane);
    current = (current + 1) % Shape::STAGES;
  }
  if (target >= 0) store_state(state, pool + target * p.pool.slot, p.pool, row, lane);
}
