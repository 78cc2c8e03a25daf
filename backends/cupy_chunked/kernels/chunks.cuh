// What a chunk is: 64 tokens of one sequence, where it begins, and what `prepare` leaves of it for `scan`.
#pragma once

constexpr int CHUNK = 64, BLOCKS = CHUNK / 16;  // tokens; 16 x 16 blocks along a side of a chunk's matrices

struct Shape {
  static constexpr int K = KEY_DIM, V = VALUE_DIM, SHARING = HEAD_GROUP;  // value heads per query/key head
  static constexpr int PREPARED = PREPARED_HEADS;   // of these, how many a block of `prepare` has
  static constexpr int KEYS = (K + 15) / 16 * 16;   // K, padded with zeros
  static constexpr int WARPS = CONFIG_WARPS, STAGES = CONFIG_STAGES;
  static constexpr int PIECES = OPERAND_PIECES;     // bfloat16 that stand for one float in products
  static constexpr int TILE = 16 * WARPS, TILES = (V + TILE - 1) / TILE;  // columns of V per block of `scan`
  static constexpr bool GROUP = GROUP_PRODUCTS;     // four warps multiply together (wgmma)
  static constexpr int SPAN = CHUNK * SEGMENT_CHUNKS;  // tokens of a segment; 0: sequences are not cut
  static constexpr bool LOCAL = LOCAL_PASS;         // what a segment does to any state, instead of what it makes of one
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

// Rows of COLUMNS values, in pieces: panels of 64 columns, a row of which is 128 bytes. In row r of a panel unit u of 16
// bytes is at place u ^ r % 8: eight lanes that bring a row's units write one line, and eight that read a unit of eight
// rows meet all banks once. It is a layout that products of four warps read.
template <int COLUMNS> struct Tile {
  static constexpr int PANEL = CHUNK * 128, PANELS = (COLUMNS + 63) / 64, PIECE = PANELS * PANEL;  // bytes
  uint4 unit[IO_PIECES][PIECE / 16];
  static __device__ __forceinline__ int place(int row, int unit) {
    return unit / 8 * (PANEL / 16) + row * 8 + (unit % 8 ^ row % 8);
  }
};

// A lane's place in a tile for loads of 16 x 16: its row and, of two, its unit. `at` moves both, by multiples of 8 rows
// and of 16 columns.
template <class T> struct Corner {
  Shared row;
  int swizzled;
  __device__ __forceinline__ Corner(const T& tile, int row, int unit, int lane)
      : row(shared_of((const char*)&tile + row * 128)), swizzled((unit ^ (lane & 7)) * 16) {}
  __device__ __forceinline__ Shared at(int rows, int columns, int piece) const {
    return row + (piece * T::PIECE + rows * 128 + columns / 64 * T::PANEL) + (swizzled ^ (columns % 64 * 2));
  }
};
// Matrices in the order of a left factor, whose rows are the tile's; of a right factor whose rows are; whose columns are.
template <class T> __device__ __forceinline__ Corner<T> rows_of(const T& tile, int lane) {
  return {tile, (lane & 7) + (lane & 8), (lane & 16) / 16, lane};
}
template <class T> __device__ __forceinline__ Corner<T> columns_of(const T& tile, int lane) {
  return {tile, (lane & 7) + (lane & 16) / 2, (lane & 8) / 8, lane};
}

// The lower triangle of a 64 x 64 matrix in pieces, as blocks of 16 x 16, each of four core matrices (upper left, upper
// right, lower left, lower right). Blocks of one column stand together: a right factor whose columns are the triangle's
// rows, used 32 at a time. What such a half has above the diagonal, blocks (0, 1) and (2, 3), are zeros that `scan` has in
// shared memory; in global memory nobody writes or reads them.
constexpr int TRIANGLE = 12;
struct Triangle {
  static constexpr int CORE = 128, ROWS = 256, BLOCK = 512, PIECE = TRIANGLE * BLOCK;  // bytes: along a row, down
  unsigned word[Shape::PIECES][TRIANGLE][4][32];
};
// Block (i, j) for i >= j / 2 * 2.
__device__ __forceinline__ constexpr int block_of(int i, int j) { return j < 2 ? 4 * j + i : 2 * j + 2 + i; }
__device__ __forceinline__ constexpr bool is_zeros(int block) { return block == 4 || block == 10; }

// Of one chunk and value head. With G the sum of the log decays from the chunk's start, D(t, s) = G(t) - G(s), what
// moves a state on:
struct Passing {
  Triangle solve;            // (I + A)^-1 diag(beta), A(t, s) = beta_t exp(D) k_t.k_s for s < t
  float key_scale[CHUNK];    // exp(G_t) / |k_t|: of a product of k_t with the state that the chunk starts from
  float keep_scale[CHUNK];   // exp(G_end - G_t) / |k_t|: what is left of token t when the chunk ends
  float total, unused[3];    // exp(G_end)
};
// And what outputs need.
struct Record : Passing {
  float query_scale[CHUNK];  // exp(G_t) / |q_t|, scaled
  Triangle attend;           // exp(D) q_t.k_s for s <= t, q scaled
};

// Of a segment and value head, by columns: the state that it starts from, and, of all but a sequence's last segment, what
// becomes of the unit vectors of a state without values: S -> passage^T S + what it makes of no state.
struct Crossing {
  float start[Shape::V][Shape::KEYS];
  float passage[Shape::K][Shape::KEYS];
};

struct Addresses {
  const void *q, *k, *v, *a, *b;
  void* out;
  const void *A_log, *dt_bias;
  void* pool;
  const void *cu_seqlens, *read, *write;
  Record* records;  // [slots, HV]; behind them crossings, [slots of segments, HV]
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
  int64 n, length, heads, chunks;  // sequences; tokens per batch row; value heads; slots of chunks
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
// Segments of SPAN tokens have slots like chunks.
template <int SPAN> __device__ __forceinline__ int64 sequence_of(const Arguments& p, int64 slot) {
  if constexpr (!Shape::VARLEN) return slot / ((p.length + SPAN - 1) / SPAN);
  const int lane = threadIdx.x % 32;
  int64 low = 0, high = p.n;
  while (high - low > 1) {
    const int64 step = (high - low + 31) / 32, n = low + lane * step;
    const bool before = n < high && index_at<CU_INDEX>(p.data.cu_seqlens, n) / SPAN + n <= slot;
    low += (__popc(__ballot_sync(0xffffffffu, before)) - 1) * step;
    high = min(high, low + step);
  }
  return low;
}

__device__ __forceinline__ Crossing& crossing(const Arguments& p, int64 slot, int hv) {
  return ((Crossing*)(p.data.records + p.chunks * p.heads))[slot * p.heads + hv];
}
// The first slot of a sequence's segments; and of its crossings, if there are several segments: ceil(length / SPAN) of
// them are then no more than floor(2 length / SPAN), so that slots need not count the sequences.
__device__ __forceinline__ int64 first_segment(const Arguments& p, int64 n, const Sequence& sequence) {
  constexpr int SPAN = Shape::SPAN == 0 ? 1 : Shape::SPAN;
  return Shape::VARLEN ? sequence.first / SPAN + n : n * ((p.length + SPAN - 1) / SPAN);
}
__device__ __forceinline__ int64 first_crossing(const Arguments& p, int64 n, const Sequence& sequence) {
  constexpr int SPAN = Shape::SPAN == 0 ? 1 : Shape::SPAN;
  return Shape::VARLEN ? 2 * sequence.first / SPAN : n * ((p.length + SPAN - 1) / SPAN);
}

// A tile's rows of PADDED elements: zeros beyond `live` rows and `wanted` columns. WIDE: rows are aligned to 16 bytes,
// and `wanted` is a multiple of 8. Lanes go along a row; where a row's parts divide the threads, a thread keeps its
// columns, and its addresses differ by constants.
template <int PADDED, int THREADS>
__device__ __forceinline__ void stage(Tile<PADDED>& tile, const Io* from, const Tokens& x, int live, int wanted,
                                      int thread) {
  constexpr int PARTS = PADDED / 8, ROWS = THREADS / PARTS;
  constexpr bool DOWN = THREADS % PARTS == 0;
  const Io* source = from;
  if (DOWN) source += thread / PARTS * x.time + thread % PARTS * 8 * x.element;
#pragma unroll
  for (int i = 0; i < (CHUNK * PARTS + THREADS - 1) / THREADS; i++) {
    const int part = DOWN ? thread % PARTS : (thread + i * THREADS) % PARTS;
    const int row = DOWN ? thread / PARTS + i * ROWS : (thread + i * THREADS) / PARTS;
    if (CHUNK * PARTS % THREADS != 0 && row >= CHUNK) break;
    if constexpr (!DOWN) source = from + row * x.time + 8 * part * x.element;
    else if (i > 0) source += ROWS * x.time;
    const int at = Tile<PADDED>::place(row, part);
    const bool there = row < live && 8 * part < wanted;
    if constexpr (Shape::WIDE && IO_PIECES == 1) {
      copy_async<16>(&tile.unit[0][at], source, there);  // reads nothing unless `there`
    } else {
      Raw<Io, 8> values;
      values.template load<Shape::WIDE, INPUT>(source, x.element, there ? wanted - 8 * part : 0);
      unsigned words[4][IO_PIECES];
#pragma unroll
      for (int j = 0; j < 4; j++) split(words[j], values.get(2 * j), values.get(2 * j + 1));
#pragma unroll
      for (int p = 0; p < IO_PIECES; p++) tile.unit[p][at] = {words[0][p], words[1][p], words[2][p], words[3][p]};
    }
  }
}
