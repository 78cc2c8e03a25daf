// What a chunk is: 64 tokens of one sequence, where it begins, and what `prepare` leaves of it for `scan`.
#pragma once

constexpr int CHUNK = 64, BLOCKS = CHUNK / 16;  // tokens; 16 x 16 blocks along a side of a chunk's matrices

struct Shape {
  static constexpr int K = KEY_DIM, V = VALUE_DIM, SHARING = HEAD_GROUP;  // value heads per query/key head
  static constexpr int KEYS = (K + 15) / 16 * 16;   // K, padded with zeros
  static constexpr int PITCH = KEYS + 8;            // of a row of q or k in shared memory: no two rows meet in a bank
  static constexpr int WARPS = CONFIG_WARPS, STAGES = CONFIG_STAGES;
  static constexpr int PIECES = OPERAND_PIECES;     // bfloat16 that stand for one float in products
  static constexpr int TILE = 16 * WARPS, TILES = (V + TILE - 1) / TILE;  // columns of V per block of `scan`
  static constexpr int VALUE_PITCH = TILE + 8;
  static constexpr bool BOUNDED = false, NORM = L2_NORM, VARLEN = IS_VARLEN, WIDE = WIDE_ROWS;
  static constexpr bool VK = STATE_VK, WIDE_STATE = WIDE_STATES, READ = READS_STATE, WRITE = WRITES_STATE;
};

using Io = IO_TYPE;
using State = STATE_TYPE;

// bfloat16 that a value of q, k or v is the sum of, and tiles of them in shared memory.
template <class T> struct PiecesOf;
template <> struct PiecesOf<bfloat16> { static constexpr int COUNT = 1; };
template <> struct PiecesOf<float16> { static constexpr int COUNT = 2; };
template <> struct PiecesOf<float> { static constexpr int COUNT = 3; };
constexpr int IO_PIECES = PiecesOf<Io>::COUNT;
template <int PITCH> using Tile = bfloat16[IO_PIECES][CHUNK * PITCH];

// The lower triangle of a 64 x 64 matrix as right factors: block (i, j), j <= i, is number i (i + 1) / 2 + j, and each
// lane's four registers lie together: (0 to 7, 8 to 15) of the inner dimension for rows 0 to 7, then for rows 8 to 15.
// In pieces, each a triangle.
struct Triangle {
  uint4 block[Shape::PIECES][BLOCKS * (BLOCKS + 1) / 2][32];
};
__device__ __forceinline__ constexpr int block_of(int i, int j) { return i * (i + 1) / 2 + j; }

// Of one chunk and value head. With G the sum of the log decays from the chunk's start, D(t, s) = G(t) - G(s):
struct Record {
  Triangle solve;            // (I + A)^-1 diag(beta), A(t, s) = beta_t exp(D) k_t.k_s for s < t
  Triangle attend;           // exp(D) q_t.k_s for s <= t, q scaled
  float key_scale[CHUNK];    // exp(G_t) / |k_t|: of a product of k_t with the state that the chunk starts from
  float query_scale[CHUNK];  // the same of q_t
  float keep_scale[CHUNK];   // exp(G_end - G_t) / |k_t|: what is left of token t when the chunk ends
  float total, unused[3];    // exp(G_end)
};

struct Addresses {
  const void *q, *k, *v, *a, *b;
  void* out;
  const void *A_log, *dt_bias;
  void* pool;
  const void *cu_seqlens, *read, *write;
  Record* records;  // [slots, HV]
};
struct Tokens {  // strides of [B, T, heads, dim], or of [B, T, heads] with element = 0
  int64 batch, time, head, element;
};
struct States {  // strides of pool [slots, HV, K, V], whatever the order of the last two
  int64 slot, head, key, value;
};
struct Arguments {
  Addresses data;
  Tokens q, k, v, a, b, out;
  int64 A_log, dt_bias;  // strides
  States pool;
  int64 n, length, heads;  // sequences; tokens per batch row; value heads
  float scale, softplus_beta, softplus_threshold, lower_bound, beta_factor, softplus_unit;  // unit: 1 / softplus_beta
};

template <class I> __device__ __forceinline__ int64 index_at(const void* indices, int64 i) {
  return ((const I*)indices)[i];
}

// Sequence n: batch row, first token, tokens; and its first slot. Chunks are numbered by slots that leave gaps: of
// packed sequences the first is first / 64 + n, told without the lengths of those before. The next one's is higher by
// floor((first + length) / 64) - floor(first / 64) + 1, which is no less than the chunks of `length` tokens.
struct Sequence {
  int64 batch, first, length, slot;
  __device__ __forceinline__ Sequence(const Arguments& p, int64 n) : batch(n), first(0), length(p.length) {
    slot = n * ((p.length + CHUNK - 1) / CHUNK);
    if constexpr (Shape::VARLEN) {
      batch = 0;
      first = index_at<CU_INDEX>(p.data.cu_seqlens, n);
      length = index_at<CU_INDEX>(p.data.cu_seqlens, n + 1) - first;
      slot = first / CHUNK + n;
    }
  }
  template <class T>
  __device__ __forceinline__ T* begin(const void* data, const Tokens& x, int64 head, int64 token) const {
    return (T*)data + batch * x.batch + (first + token) * x.time + head * x.head;
  }
};

// The sequence that a slot belongs to: the last one whose first slot is not beyond it. A warp looks at 32 at a time.
__device__ __forceinline__ int64 sequence_of(const Arguments& p, int64 slot) {
  if constexpr (!Shape::VARLEN) return slot / ((p.length + CHUNK - 1) / CHUNK);
  const int lane = threadIdx.x % 32;
  int64 low = 0, high = p.n;
  while (high - low > 1) {
    const int64 step = (high - low + 31) / 32, n = low + lane * step;
    const bool before = n < high && index_at<CU_INDEX>(p.data.cu_seqlens, n) / CHUNK + n <= slot;
    low += (__popc(__ballot_sync(0xffffffffu, before)) - 1) * step;
    high = min(high, low + step);
  }
  return low;
}

// Rows of a tile of `PITCH` elements each, of which PADDED are written: zeros beyond `live` rows and `wanted` columns.
// WIDE: rows are aligned to 16 bytes, and `wanted` is a multiple of 8. A thread has eight columns, and of every so many
// rows one: its addresses differ by a constant.
template <int PADDED, int PITCH, int THREADS>
__device__ __forceinline__ void stage(Tile<PITCH>& tile, const Io* from, const Tokens& x, int live, int wanted) {
  constexpr int PARTS = PADDED / 8, ROWS = THREADS / PARTS;
  static_assert(ROWS >= 1, "a thread for every eight columns");
  const int first = threadIdx.x / PARTS, column = threadIdx.x % PARTS * 8;
  if (THREADS % PARTS != 0 && first >= ROWS) return;
  const int to = first * PITCH + column;
  const int64 step = ROWS * x.time;
  const Io* at = from + first * x.time + column * x.element;
#pragma unroll
  for (int i = 0; i < (CHUNK + ROWS - 1) / ROWS; i++, at += step) {
    const int row = first + i * ROWS;
    if (CHUNK % ROWS != 0 && row >= CHUNK) break;
    const bool there = row < live && column < wanted;
    if constexpr (Shape::WIDE && IO_PIECES == 1) {
      copy_async<16>(&tile[0][to + i * ROWS * PITCH], at, there);  // reads nothing unless `there`
    } else {
      Raw<Io, 8> values;
      values.template load<Shape::WIDE, INPUT>(at, x.element, there ? wanted - column : 0);
      unsigned words[4][IO_PIECES];
#pragma unroll
      for (int j = 0; j < 4; j++) split(words[j], values.get(2 * j), values.get(2 * j + 1));
#pragma unroll
      for (int p = 0; p < IO_PIECES; p++)
        *(uint4*)&tile[p][to + i * ROWS * PITCH] = {words[0][p], words[1][p], words[2][p], words[3][p]};
    }
  }
}
