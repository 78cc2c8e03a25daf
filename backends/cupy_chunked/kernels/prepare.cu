// All of a chunk that does not need the state: products of its keys and queries, gates, and the triangular solve.
// One block of four warps per (slot, query/key head); warp w has rows 16 w to 16 w + 15 of the 64 x 64 matrices.
#include "numbers.cuh"
#include "tensor_core.cuh"
#include "chunks.cuh"
#include "gates.cuh"
#include "inverse.cuh"

constexpr int PREPARE_THREADS = 128;
// A decay of exp(-110) is zero in float32; sums of log decays stay where their differences are accurate.
constexpr float LEAST_LOG_DECAY = -110.0f;

struct Small {  // in shared memory, beside the tiles
  float key_norm[CHUNK], query_norm[CHUNK], beta[CHUNK], log_high[CHUNK], log_low[CHUNK], carry[2];
};

// high + low += other, the rounding of the first kept in the second.
__device__ __forceinline__ void add(float& high, float& low, float other_high, float other_low) {
  const float sum = high + other_high, back = sum - high;
  low += other_low + ((high - (sum - back)) + (other_high - back));
  high = sum;
}

// Of register i of a factor: the squares of its two values.
template <int PIECES> __device__ __forceinline__ float squares(const Factor<PIECES>& f, int i) {
  float x = 0.0f, y = 0.0f;
#pragma unroll
  for (int p = PIECES - 1; p >= 0; p--) x += low_half(f.piece[p][i]), y += high_half(f.piece[p][i]);
  return fmaf(x, x, y * y);
}

template <class T> __device__ __forceinline__ float value_at(const T* p) {
  return Format<T>::get(Format<T>::template load<INPUT>(p), 0);
}

// Tokens' gates of one value head: beta, and the sums of log decays from the chunk's start in two floats.
__device__ __forceinline__ void sum_gates(const Arguments& p, const Sequence& sequence, int64 token, int live, int hv,
                                          Small& small) {
  const int t = threadIdx.x, lane = t % 32;
  float high = 0.0f, low = 0.0f;
  if (t < CHUNK) {
    float beta = 0.0f;
    if (t < live) {
      const float a = value_at(sequence.begin<A_TYPE>(p.data.a, p.a, hv, token + t));
      const float b = value_at(sequence.begin<B_TYPE>(p.data.b, p.b, hv, token + t));
      const float A_log = value_at((const A_LOG_TYPE*)p.data.A_log + hv * p.A_log);
      const float bias = value_at((const BIAS_TYPE*)p.data.dt_bias + hv * p.dt_bias);
      high = fmaxf(log_decay_of(A_log, a + bias, p), LEAST_LOG_DECAY);
      beta = p.beta_factor * sigmoid(b);
    }
    small.beta[t] = beta;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float other_high = __shfl_up_sync(0xffffffffu, high, step);
      const float other_low = __shfl_up_sync(0xffffffffu, low, step);
      if (lane >= step) add(high, low, other_high, other_low);
    }
    if (t == 31) small.carry[0] = high, small.carry[1] = low;
  }
  __syncthreads();
  if (t < CHUNK) {
    if (t >= 32) add(high, low, small.carry[0], small.carry[1]);
    small.log_high[t] = high, small.log_low[t] = low;
  }
  __syncthreads();
}

__device__ __forceinline__ void keep(Triangle& to, int block, const Factor<Shape::PIECES>& x, int lane) {
#pragma unroll
  for (int p = 0; p < Shape::PIECES; p++)
    to.block[p][block][lane] = {x.piece[p][0], x.piece[p][1], x.piece[p][2], x.piece[p][3]};
}

extern "C" __global__ void __launch_bounds__(PREPARE_THREADS) prepare(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(16) unsigned char memory[];
  constexpr int P = Shape::PITCH;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int64 slot = (int64)blockIdx.z * gridDim.y + blockIdx.y;
  const int64 n = sequence_of(p, slot);
  if (n >= p.n) return;
  const Sequence sequence(p, n);
  const int64 token = (slot - sequence.slot) * CHUNK;
  const int live = (int)min((int64)CHUNK, sequence.length - token);
  if (live <= 0) return;
  const int head = blockIdx.x;

  Small& small = *(Small*)memory;
  struct Tiles { Tile<P> keys, queries; };
  Tiles& tiles = *(Tiles*)(memory + (sizeof(Small) + 15) / 16 * 16);
  const Io* const k = sequence.begin<const Io>(p.data.k, p.k, head, token);
  const Io* const q_ = sequence.begin<const Io>(p.data.q, p.q, head, token);
  stage<Shape::KEYS, P, PREPARE_THREADS>(tiles.keys, k, p.k, live, Shape::K);
  stage<Shape::KEYS, P, PREPARE_THREADS>(tiles.queries, q_, p.q, live, Shape::K);
  wait_for_copies();
  __syncthreads();

  // k_t . k_s and q_t . k_s, and the squares of this warp's rows on the way.
  float kk[2 * BLOCKS][4] = {}, qk[2 * BLOCKS][4] = {};
  float key_squares[2] = {}, query_squares[2] = {};
  const Shared key_columns = at_right<P>(tiles.keys[0], lane);
  const Shared key_rows = at_left<P>(tiles.keys[0] + 16 * warp * P, lane);
  const Shared query_rows = at_left<P>(tiles.queries[0] + 16 * warp * P, lane);
#pragma unroll
  for (int i = 0; i < Shape::KEYS; i += 16) {
    Factor<IO_PIECES> k_rows, q_rows;
    unsigned columns[IO_PIECES][4];
#pragma unroll
    for (int r = 0; r < IO_PIECES; r++) {
      load_matrices(k_rows.piece[r], key_rows + beyond<P>(r * CHUNK, i));
      load_matrices(q_rows.piece[r], query_rows + beyond<P>(r * CHUNK, i));
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      key_squares[r] += squares(k_rows, r) + squares(k_rows, r + 2);
      query_squares[r] += squares(q_rows, r) + squares(q_rows, r + 2);
    }
#pragma unroll
    for (int j = 0; j < BLOCKS; j++) {
      if (j > warp) continue;
#pragma unroll
      for (int r = 0; r < IO_PIECES; r++)
        load_matrices(columns[r], key_columns + beyond<P>(r * CHUNK + 16 * j, i));
      multiply(kk[2 * j], kk[2 * j + 1], k_rows, columns);
      multiply(qk[2 * j], qk[2 * j + 1], q_rows, columns);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float& ks = key_squares[r];
    float& qs = query_squares[r];
    ks += __shfl_xor_sync(0xffffffffu, ks, 1), qs += __shfl_xor_sync(0xffffffffu, qs, 1);
    ks += __shfl_xor_sync(0xffffffffu, ks, 2), qs += __shfl_xor_sync(0xffffffffu, qs, 2);
    if (q == 0) {
      const int t = 16 * warp + g + 8 * r;
      small.key_norm[t] = Shape::NORM ? rsqrtf(ks + 1e-6f) : 1.0f;
      small.query_norm[t] = p.scale * (Shape::NORM ? rsqrtf(qs + 1e-6f) : 1.0f);
    }
  }

  float* const matrix = (float*)&tiles;  // which have been read
  float* const between = matrix + CHUNK * INVERSE_PITCH;
  for (int i = 0; i < Shape::SHARING; i++) {
    const int hv = head * Shape::SHARING + i;
    sum_gates(p, sequence, token, live, hv, small);  // its barriers stand between the tiles and the matrix, too
    Record& record = p.data.records[slot * p.heads + hv];
#pragma unroll
    for (int j = 0; j < BLOCKS; j++) {
      if (j > warp) {  // zeros, for the products of the inverse
#pragma unroll
        for (int c = 0; c < 8; c++)
          matrix[(16 * warp + g + c / 4 * 8) * INVERSE_PITCH + 16 * j + 2 * q + c / 2 % 2 * 8 + c % 2] = 0.0f;
        continue;
      }
      Factor<Shape::PIECES> pairs;  // in the order of a right factor
#pragma unroll
      for (int half = 0; half < 2; half++) {  // rows g and g + 8
        const int t = 16 * warp + g + 8 * half;
        const float beta = small.beta[t] * small.key_norm[t], query = small.query_norm[t];
        const float high = small.log_high[t], low = small.log_low[t];
#pragma unroll
        for (int side = 0; side < 2; side++) {  // columns 0 to 7 and 8 to 15
          float attend[2];
#pragma unroll
          for (int c = 0; c < 2; c++) {
            const int s = 16 * j + 8 * side + 2 * q + c;
            const float sum = (high - small.log_high[s]) + (low - small.log_low[s]);
            const float decay = s <= t ? expf(sum) * small.key_norm[s] : 0.0f;
            matrix[t * INVERSE_PITCH + s] = s < t ? beta * decay * kk[2 * j + side][2 * half + c] : 0.0f;
            attend[c] = s <= t ? query * decay * qk[2 * j + side][2 * half + c] : 0.0f;
          }
          pairs.set(2 * half + side, attend[0], attend[1]);
        }
      }
      keep(record.attend, block_of(warp, j), pairs, lane);
    }
    __syncthreads();
    invert(matrix, between);
#pragma unroll
    for (int j = 0; j < BLOCKS; j++) {
      if (j > warp) continue;
      Factor<Shape::PIECES> pairs;
#pragma unroll
      for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int side = 0; side < 2; side++) {
          const int t = 16 * warp + g + 8 * half, s = 16 * j + 8 * side + 2 * q;
          const float2 x = *(const float2*)(matrix + t * INVERSE_PITCH + s);
          pairs.set(2 * half + side, x.x * small.beta[s], x.y * small.beta[s + 1]);
        }
      }
      keep(record.solve, block_of(warp, j), pairs, lane);
    }
    if (threadIdx.x < CHUNK) {
      const int t = threadIdx.x;
      const float high = small.log_high[t], low = small.log_low[t];
      const float since = expf(high + low);
      const float left = expf((small.log_high[CHUNK - 1] - high) + (small.log_low[CHUNK - 1] - low));
      record.key_scale[t] = since * small.key_norm[t];
      record.query_scale[t] = since * small.query_norm[t];
      record.keep_scale[t] = left * small.key_norm[t];
      if (t == CHUNK - 1) *(float4*)&record.total = {since, 0.0f, 0.0f, 0.0f};
    }
    __syncthreads();  // before the next head's gates and matrix
  }
}
