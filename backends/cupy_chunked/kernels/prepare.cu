// All of a chunk that does not need the state: products of its keys and queries, gates, and the triangular solve.
// One block of four warps per slot and PREPARED value heads, one or all that share a query/key head; warp w has rows 16 w to
// 16 w + 15 of the 64 x 64 matrices.
#include "numbers.cuh"
#include "overlap.cuh"
#include "tensor_core.cuh"
#include "chunks.cuh"
#include "gates.cuh"
#include "solve.cuh"

constexpr int PREPARE_THREADS = 128;
constexpr int HEADS = 2;  // value heads whose gates are there at a time, two warps to each
// A decay of exp(-110) is zero in float32; sums of log decays stay where their differences are accurate.
constexpr float LEAST_LOG_DECAY = -110.0f;

// Of one value head. G is the sum of log decays from the chunk's start, in two floats. With e the last token before a
// token's row of blocks, for s <= e < t: exp(G_t - G_s) is exp(G_t - G_e) exp(G_e - G_s), both at most 1: a factor of the
// row and one of the column.
struct Gates {
  float beta[CHUNK], log_high[CHUNK], log_low[CHUNK];
  float since[CHUNK], left[CHUNK];         // exp(G_t), exp(G_end - G_t)
  float row[CHUNK];                        // exp(G_t - G_e)
  float column[BLOCKS - 1][CHUNK];         // of row of blocks i + 1: exp(G_e - G_s)
};
struct Small {  // in shared memory, beside the tiles
  Gates gates[HEADS];
  float key_norm[CHUNK], query_norm[CHUNK];  // what k and q are multiplied by
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
  for (int p = PIECES - 1; p >= 0; p--) {
    const float low = low_half(f.piece[p][i]), high = high_half(f.piece[p][i]);
    x = p == PIECES - 1 ? low : x + low, y = p == PIECES - 1 ? high : y + high;
  }
  return fmaf(x, x, y * y);
}

template <class T> __device__ __forceinline__ float value_at(const T* p) {
  return Format<T>::get(Format<T>::template load<AT_ONCE>(p), 0);
}

// Gate inputs of one value head: a lane's two neighbours.
struct Asked {
  float A_log, bias, a[2], b[2];

  __device__ __forceinline__ Asked(const Arguments& p, const Sequence& sequence, int64 token, int live, int hv, int lane)
      : a{}, b{} {
    A_log = value_at((const A_LOG_TYPE*)p.data.A_log + hv * p.A_log);
    bias = value_at((const BIAS_TYPE*)p.data.dt_bias + hv * p.dt_bias);
    const A_TYPE* const from_a = sequence.begin<const A_TYPE>(p.data.a, p.a, hv, token + 2 * lane);
    const B_TYPE* const from_b = sequence.begin<const B_TYPE>(p.data.b, p.b, hv, token + 2 * lane);
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (2 * lane + i < live) a[i] = value_at(from_a + i * p.a.time), b[i] = value_at(from_b + i * p.b.time);
  }
};

// What follows from them. Two warps sum the same, and form the factors of every other token each.
__device__ __forceinline__ void set_gates(Gates& gates, const Arguments& p, const Asked& asked, int live, int lane,
                                          int odd) {
  float log_decay[2] = {}, high = 0.0f, low = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; i++)
    if (2 * lane + i < live)
      log_decay[i] = fmaxf(log_decay_of(asked.A_log, asked.a[i] + asked.bias, p), LEAST_LOG_DECAY);
  add(high, low, log_decay[0], 0.0f);
  add(high, low, log_decay[1], 0.0f);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float other_high = __shfl_up_sync(0xffffffffu, high, step);
    const float other_low = __shfl_up_sync(0xffffffffu, low, step);
    if (lane >= step) add(high, low, other_high, other_low);
  }
  float end_high[BLOCKS], end_low[BLOCKS];  // of the rows of blocks
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    end_high[i] = __shfl_sync(0xffffffffu, high, 8 * i + 7);
    end_low[i] = __shfl_sync(0xffffffffu, low, 8 * i + 7);
  }
  if (!odd) {  // the lane's first token: the sum before both, and it
    high = __shfl_up_sync(0xffffffffu, high, 1), low = __shfl_up_sync(0xffffffffu, low, 1);
    if (lane == 0) high = low = 0.0f;
    add(high, low, log_decay[0], 0.0f);
  }
  const int t = 2 * lane + odd, row = t / 16;
  gates.beta[t] = t < live ? p.beta_factor * sigmoid(odd ? asked.b[1] : asked.b[0]) : 0.0f;
  gates.log_high[t] = high, gates.log_low[t] = low;
  gates.since[t] = expf(high + low);
  gates.left[t] = expf((end_high[BLOCKS - 1] - high) + (end_low[BLOCKS - 1] - low));
  float within = 0.0f;
#pragma unroll
  for (int i = 0; i < BLOCKS - 1; i++) {
    const float until = (end_high[i] - high) + (end_low[i] - low);
    if (row == i + 1) within = -until;
    if (row <= i) gates.column[i][t] = expf(until);
  }
  gates.row[t] = expf(within);
}

// What the scan needs of rows, with their norms.
__device__ __forceinline__ void keep_scales(Record& record, const Gates& gates, const Small& small) {
  const int t = threadIdx.x % CHUNK;
  const float since = gates.since[t], key_norm = small.key_norm[t];
  if (threadIdx.x < CHUNK) {
    record.key_scale[t] = since * key_norm;
    record.query_scale[t] = since * small.query_norm[t];
  } else {
    record.keep_scale[t] = gates.left[t] * key_norm;
    if (t == CHUNK - 1) *(float4*)&record.total = {since, 0.0f, 0.0f, 0.0f};
  }
}

// c += x b. Tensor cores cut sums off: those of 16 products are formed by themselves where that is too much for c.
template <int LEFT, int RIGHT>
__device__ __forceinline__ void add_product(Block& c, const Factor<LEFT>& x, const unsigned (&b)[RIGHT][4]) {
  if constexpr (Shape::PIECES == 1) {
    multiply<3>(c[0], c[1], x, b);
  } else {
    Block sum = {};
    multiply<3>(sum[0], sum[1], x, b);
#pragma unroll
    for (int i = 0; i < 8; i++) c[i / 4][i % 4] += sum[i / 4][i % 4];
  }
}

extern "C" __global__ void __launch_bounds__(PREPARE_THREADS, Shape::PIECES == 1 ? 4 : 3)
    prepare(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  let_next_start();
  const int64 slot = (int64)blockIdx.z * gridDim.y + blockIdx.y;
  const int64 n = sequence_of<CHUNK>(p, slot);
  if (n >= p.n) return;
  const Sequence sequence(p, n);
  const int64 token = (slot - sequence.slot) * CHUNK;
  const int live = (int)min((int64)CHUNK, sequence.length - token);
  if (live <= 0) return;
  const int head = blockIdx.x / (Shape::SHARING / Shape::PREPARED), first = blockIdx.x * Shape::PREPARED;  // value head

  using Keys = Tile<Shape::KEYS>;
  struct Tiles { Keys keys, queries; };
  Tiles& tiles = *(Tiles*)memory;
  Solve& solve = *(Solve*)memory;  // when those have been read
  Small& small = *(Small*)(memory + (sizeof(Tiles) > sizeof(Solve) ? sizeof(Tiles) : sizeof(Solve)));
  const auto ask = [&](int i) { return Asked(p, sequence, token, live, first + min(i, Shape::PREPARED - 1), lane); };
  const Asked asked = ask(warp / 2);  // of one head alone, two times the same
  stage<Shape::KEYS, PREPARE_THREADS>(tiles.keys, sequence.begin<const Io>(p.data.k, p.k, head, token), p.k, live,
                                      Shape::K, threadIdx.x);
  stage<Shape::KEYS, PREPARE_THREADS>(tiles.queries, sequence.begin<const Io>(p.data.q, p.q, head, token), p.q, live,
                                      Shape::K, threadIdx.x);
  if (warp / 2 < Shape::PREPARED) set_gates(small.gates[warp / 2], p, asked, live, lane, warp % 2);
  wait_for_copies();
  __syncthreads();

  // k_t . k_s and q_t . k_s for this warp's rows of blocks: the diagonal one, then those before it; and squares.
  Block kk[BLOCKS] = {}, qk[BLOCKS] = {};
  float key_squares[2] = {}, query_squares[2] = {};
  const Corner<Keys> key_columns = columns_of(tiles.keys, lane);
  const Corner<Keys> key_rows = rows_of(tiles.keys, lane), query_rows = rows_of(tiles.queries, lane);
#pragma unroll
  for (int i = 0; i < Shape::KEYS / 16; i++) {
    Factor<IO_PIECES> k_rows, q_rows;
    unsigned columns[IO_PIECES][4];
#pragma unroll
    for (int r = 0; r < IO_PIECES; r++) {
      load_matrices(k_rows.piece[r], key_rows.at(16 * warp, 16 * i, r));
      load_matrices(q_rows.piece[r], query_rows.at(16 * warp, 16 * i, r));
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      key_squares[r] += squares(k_rows, r) + squares(k_rows, r + 2);
      query_squares[r] += squares(q_rows, r) + squares(q_rows, r + 2);
    }
#pragma unroll
    for (int j = 0; j < BLOCKS; j++) {
      if (j > warp) continue;
      const int row = j == 0 ? 16 * warp : 16 * (j - 1);
#pragma unroll
      for (int r = 0; r < IO_PIECES; r++) load_matrices(columns[r], key_columns.at(row, 16 * i, r));
      add_product(kk[j], k_rows, columns);
      add_product(qk[j], q_rows, columns);
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

  __syncthreads();  // norms are there, and the tiles have been read
#pragma unroll
  for (int j = 0; j < BLOCKS; j++) {
    if (j > warp) continue;
#pragma unroll
    for (int side = 0; side < 2; side++) {
      const int s = 16 * (j == 0 ? warp : j - 1) + 8 * side + 2 * q;
      const float2 column = *(const float2*)&small.key_norm[s];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int t = 16 * warp + g + 8 * half;
        const float key = small.key_norm[t], query = small.query_norm[t];
        float *const k = &kk[j][side][2 * half], *const x = &qk[j][side][2 * half];
        k[0] *= key * column.x, k[1] *= key * column.y, x[0] *= query * column.x, x[1] *= query * column.y;
      }
    }
  }

  for (int i = 0; i < Shape::PREPARED; i++) {
    if (i > 0 && i % HEADS == 0) {  // gates of the next two
      __syncthreads();
      if (i + warp / 2 < Shape::PREPARED)
        set_gates(small.gates[warp / 2], p, ask(i + warp / 2), live, lane, warp % 2);
      __syncthreads();
    }
    const Gates& gates = small.gates[i % HEADS];
    Record& record = p.data.records[slot * p.heads + first + i];
    keep_scales(record, gates, small);

    Part couplings[BLOCKS - 1];
#pragma unroll
    for (int j = 0; j < BLOCKS - 1; j++) {
      if (j >= warp) continue;
      Factor<Shape::PIECES> attend;
#pragma unroll
      for (int part = 0; part < 4; part++) {  // rows g and g + 8; columns 0 to 7 and 8 to 15
        const int half = part % 2, side = part / 2, t = 16 * warp + g + 8 * half;
        const float2 column = *(const float2*)&gates.column[warp - 1][16 * j + 8 * side + 2 * q];
        const float *const k = &kk[j + 1][side][2 * half], *const x = &qk[j + 1][side][2 * half];
        const float query = gates.row[t], key = gates.beta[t] * query;
        couplings[j].set(part, key * column.x * k[0], key * column.y * k[1]);
        attend.set(part, query * column.x * x[0], query * column.y * x[1]);
      }
      keep(record.attend.word[0][block_of(warp, j)], TRIANGLE * 128, attend, lane);
    }
    {  // the diagonal block, entry by entry
      Factor<Shape::PIECES> attend;
      float* const diagonal = solve.diagonal[warp];
#pragma unroll
      for (int part = 0; part < 4; part++) {
        const int half = part % 2, side = part / 2, row = g + 8 * half, column = 8 * side + 2 * q;
        float key[2] = {}, query[2] = {};
        if (side <= half) {
          const int t = 16 * warp + row;
          const float high = gates.log_high[t], low = gates.log_low[t], beta = gates.beta[t];
          const float2 other_high = *(const float2*)&gates.log_high[16 * warp + column];
          const float2 other_low = *(const float2*)&gates.log_low[16 * warp + column];
          const float sum[2] = {(high - other_high.x) + (low - other_low.x), (high - other_high.y) + (low - other_low.y)};
#pragma unroll
          for (int c = 0; c < 2; c++) {
            const float decay = column + c <= row ? expf(sum[c]) : 0.0f;
            key[c] = column + c < row ? beta * decay * kk[0][side][2 * half + c] : 0.0f;
            query[c] = column + c <= row ? decay * qk[0][side][2 * half + c] : 0.0f;
          }
        }
        *(float2*)(diagonal + row * DIAGONAL_PITCH + column) = {key[0], key[1]};
        attend.set(part, query[0], query[1]);
      }
      keep(record.attend.word[0][block_of(warp, warp)], TRIANGLE * 128, attend, lane);
    }
    __syncwarp();
    solve_row(solve, i % 2, couplings, warp, lane, [&](int j, const Block& row) {
      Factor<Shape::PIECES> scaled;
#pragma unroll
      for (int part = 0; part < 4; part++) {
        const float2 beta = *(const float2*)&gates.beta[16 * j + part / 2 * 8 + 2 * q];
        const float* const x = &row[part / 2][part % 2 * 2];
        scaled.set(part, beta.x * x[0], beta.y * x[1]);
      }
      keep(record.solve.word[0][block_of(warp, j)], TRIANGLE * 128, scaled, lane);
    });
  }
}
