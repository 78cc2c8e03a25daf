// A thread's share of one state, between memory and registers, and the sums over K that run across a group's lanes.
#pragma once

struct Place {  // which part of the state this thread holds
  int lane;     // within the group: key channels key_of(lane, i, e)
  int row;      // first of the thread's Shape::ROWS rows of V
  int local;    // the same within the block's tile
  __device__ __forceinline__ bool has(int r) const { return Shape::WHOLE_TILES || row + r < Shape::V; }
  static __device__ __forceinline__ bool key(int k) { return Shape::K == Shape::KEYS || k < Shape::K; }
};

struct Registers {
  float x[Shape::ROWS][Shape::CHUNKS][Shape::VECTOR];
};

// A share as vectors along the axis that is packed in memory: in layout vk the thread's chunks of K for each of its
// rows, in layout kv its rows of V for each of its key channels.
template <class T> struct Share {
  static constexpr int LENGTH = Shape::VK ? Shape::VECTOR : Shape::ROWS;  // values per vector
  using Vector = Raw<T, LENGTH>;
  static constexpr bool FIT = Shape::UNIT && (Shape::VK ? Shape::K : Shape::V) % LENGTH == 0;  // for WIDE accesses

  static __device__ __forceinline__ unsigned misaligned(const void* data, const States& s) {
    return FIT ? Vector::misaligned(data, s.slot | s.step | s.head) : 0;
  }

  // Calls visit(r, i, e, offset, step, count) for every vector: its first element is (r, i, e) of the share and lies
  // at `offset` of the state; `count` elements of it, `step` apart, are inside the state. With unit strides the
  // offset is the thread's own plus a constant, which the instruction holds.
  template <class Visit> static __device__ __forceinline__ void each(const States& s, const Place& at, Visit visit) {
#pragma unroll
    for (int r = 0; r < (Shape::VK ? Shape::ROWS : 1); r++)
#pragma unroll
      for (int i = 0; i < Shape::CHUNKS; i++)
#pragma unroll
        for (int e = 0; e < (Shape::VK ? 1 : Shape::VECTOR); e++) {
          const int k = key_of(at.lane, i, e), v = at.row + r, mine = key_of(at.lane, 0, 0);
          int64 offset;
          if constexpr (!Shape::UNIT) offset = k * s.key + v * s.value;
          else if constexpr (Shape::VK) offset = (int64)(at.row * Shape::K + mine) + (r * Shape::K + key_of(0, i, 0));
          else offset = (int64)(mine * Shape::V + at.row) + key_of(0, i, e) * Shape::V;
          const bool first = at.has(r) && Place::key(k);
          const bool whole = Shape::VK ? Shape::K == Shape::KEYS : Shape::WHOLE_TILES;
          const int inside = whole ? LENGTH : Shape::VK ? Shape::K - k : Shape::V - v;
          visit(r, i, e, offset, Shape::UNIT ? 1 : Shape::VK ? s.key : s.value, first ? inside : 0);
        }
  }
};

// Zeros where the share reaches outside the state, and everywhere unless it is `live`.
template <bool WIDE, Access A, class T>
__device__ __forceinline__ void load_state(Registers& S, const T* base, const States& s, const Place& at, bool live) {
  constexpr bool WIDELY = WIDE && Share<T>::FIT;
  if (!WIDELY && !live) {
    S = {};
    return;
  }
  Share<T>::each(s, at, [&](int r, int i, int e, int64 offset, int64 step, int count) {
    typename Share<T>::Vector vector;
    vector.template load<WIDELY, A>(base + offset, step, !WIDELY || live ? count : 0);
#pragma unroll
    for (int x = 0; x < Share<T>::LENGTH; x++) (Shape::VK ? S.x[r][i][x] : S.x[x][i][e]) = vector.get(x);
  });
}

// The same in two halves with shared memory between them, where no register waits for memory: a thread starts to copy
// its share, does what does not need the state, and takes the share in when it has landed. Nobody else reads it.
template <class T> struct Landing {
  using Vector = typename Share<T>::Vector;
  static constexpr bool POSSIBLE = Share<T>::FIT && Vector::BYTES >= 4;
  static constexpr int VECTORS = Shape::ROWS * Shape::CHUNKS * Shape::VECTOR / Share<T>::LENGTH;
  static constexpr int PIECE = POSSIBLE ? Vector::BYTES / 4 : 1, PIECES = Vector::WORDS / PIECE;  // words per copy

  struct __align__(4 * PIECE) Piece { unsigned word[PIECE]; };
  Piece room[VECTORS][PIECES][Shape::THREADS];

  static __device__ __forceinline__ int number(int r, int i, int e) {
    return Shape::VK ? r * Shape::CHUNKS + i : i * Shape::VECTOR + e;
  }
  __device__ __forceinline__ void start(const T* base, const States& s, const Place& at, bool live) {
    Share<T>::each(s, at, [&](int r, int i, int e, int64 offset, int64, int count) {
#pragma unroll
      for (int x = 0; x < PIECES; x++)
        copy_async<4 * PIECE>(&room[number(r, i, e)][x][threadIdx.x], (const unsigned*)(base + offset) + x * PIECE,
                              live && count > 0);
    });
  }
  __device__ __forceinline__ void take(Registers& S, const States& s, const Place& at) const {
    wait_for_copies();
    Share<T>::each(s, at, [&](int r, int i, int e, int64, int64, int) {
      Vector vector;
#pragma unroll
      for (int x = 0; x < PIECES; x++) {
        const Piece piece = room[number(r, i, e)][x][threadIdx.x];
#pragma unroll
        for (int w = 0; w < PIECE; w++) vector.word[x * PIECE + w] = piece.word[w];
      }
#pragma unroll
      for (int x = 0; x < Share<T>::LENGTH; x++) (Shape::VK ? S.x[r][i][x] : S.x[x][i][e]) = vector.get(x);
    });
  }
};

template <bool WIDE, Access A, class T>
__device__ __forceinline__ void store_state(const Registers& S, T* base, const States& s, const Place& at) {
  Share<T>::each(s, at, [&](int r, int i, int e, int64 offset, int64 step, int count) {
    float x[Share<T>::LENGTH];
#pragma unroll
    for (int y = 0; y < Share<T>::LENGTH; y++) x[y] = Shape::VK ? S.x[r][i][y] : S.x[y][i][e];
    Share<T>::Vector::template store<WIDE && Share<T>::FIT, A>(base + offset, step, count, x);
  });
}

struct Keys {  // a row of key channels, the part this lane needs
  float x[Shape::CHUNKS][Shape::VECTOR];
};

// This lane's part of the sum over K of S[k, v] * x[k], for its row r of V. See shape.cuh for the order.
__device__ __forceinline__ float dot(const Registers& S, int r, const Keys& x) {
  constexpr int PARTIALS = 16 / Shape::LANES;  // pairs of partial sums per lane
  float sum[PARTIALS][2] = {}, half[PARTIALS];
#pragma unroll
  for (int i = 0; i < Shape::CHUNKS; i++)
#pragma unroll
    for (int e = 0; e < Shape::VECTOR; e++) {
      float& part = sum[i % PARTIALS][e & 1];
      part = fmaf(S.x[r][i][e], x.x[i][e], part);
    }
#pragma unroll
  for (int c = 0; c < PARTIALS; c++) half[c] = sum[c][0] + sum[c][1];
#pragma unroll
  for (int width = PARTIALS / 2; width; width /= 2)
#pragma unroll
    for (int c = 0; c < width; c++) half[c] += half[c + width];
  return half[0];
}
__device__ __forceinline__ void dots(float (&sum)[Shape::ROWS], const Registers& S, const Keys& x) {
#pragma unroll
  for (int r = 0; r < Shape::ROWS; r++) sum[r] = dot(S, r, x);
}

// All lanes of the group get the sums of all lanes.
template <int N> __device__ __forceinline__ void sum_to_all(float (&x)[N]) {
#pragma unroll
  for (int mask = Shape::LANES / 2; mask; mask /= 2)
#pragma unroll
    for (int r = 0; r < N; r++) x[r] += __shfl_xor_sync(0xffffffffu, x[r], mask);
}

// Each sum goes to one lane only: with every halving of the lanes the rows are halved too, which needs
// ROWS - 1 + log2(LANES / ROWS) shuffles instead of ROWS * log2(LANES). The additions are those of sum_to_all.
struct Scattered {
  static constexpr int COUNT = Shape::ROWS > Shape::LANES ? Shape::ROWS / Shape::LANES : 1;  // sums per lane
  static constexpr int SHARE = Shape::ROWS < Shape::LANES ? Shape::LANES / Shape::ROWS : 1;  // lanes per sum
  static __device__ __forceinline__ int row(int lane) { return lane / SHARE * COUNT; }       // of the first sum
  static __device__ __forceinline__ bool writes(int lane) { return lane % SHARE == 0; }
  float x[COUNT];
};

template <int N, int MASK> __device__ __forceinline__ void halve(float (&x)[N], int lane, Scattered& out) {
  if constexpr (MASK == 0) {
#pragma unroll
    for (int i = 0; i < N; i++) out.x[i] = x[i];
  } else if constexpr (N > 1) {
    const bool upper = lane & MASK;
    float kept[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      const float sent = upper ? x[i] : x[i + N / 2];
      kept[i] = (upper ? x[i + N / 2] : x[i]) + __shfl_xor_sync(0xffffffffu, sent, MASK);
    }
    halve<N / 2, MASK / 2>(kept, lane, out);
  } else {
    x[0] += __shfl_xor_sync(0xffffffffu, x[0], MASK);
    halve<1, MASK / 2>(x, lane, out);
  }
}
