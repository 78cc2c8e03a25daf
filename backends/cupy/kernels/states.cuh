// A thread's share of one state, between memory and registers, and the sums over K that run across a group's lanes.
#pragma once

struct Place {  // which part of the state this thread holds
  int lane;     // within the group: key channels Shape::VECTOR * (lane + Shape::LANES * i) + e
  int row;      // first of the thread's Shape::ROWS rows of V
  __device__ __forceinline__ bool has(int r) const { return Shape::WHOLE_TILES || row + r < Shape::V; }
  static __device__ __forceinline__ bool key(int k) { return Shape::K == Shape::KEYS || k < Shape::K; }
};

struct Registers {
  float x[Shape::ROWS][Shape::CHUNKS][Shape::VECTOR];
};

// Bytes a vector of n stored values is aligned to.
template <class T, int N> struct VectorBytes {
  static constexpr int VALUE = N * (int)sizeof(T) < 16 ? N * (int)sizeof(T) : 16;
};

// Whether the layout allows vectors at all (compile time) and the addresses do (run time).
template <class T> struct Vectors {
  static constexpr int LENGTH = Shape::VK ? Shape::VECTOR : Shape::ROWS;  // values per vector, along the packed axis
  static constexpr bool FIT = Shape::UNIT && (Shape::VK ? Shape::K : Shape::V) % LENGTH == 0;
  static __device__ __forceinline__ bool usable(const States& s) {
    const int bytes = VectorBytes<T, LENGTH>::VALUE;
    return FIT && aligned(s.data, (s.slot | s.step | s.head) * (int64)sizeof(T), bytes);
  }
};

// Where a vector of the thread's share begins, for key channel chunk i and row r (vk) or key channel (i, e) (kv): the
// thread's own address, and from there a constant, which the load instruction holds.
template <class T> __device__ __forceinline__ T* vectors_at(T* base, const Place& at) {
  return Shape::VK ? base + (at.row * Shape::K + Shape::VECTOR * at.lane)
                   : base + (Shape::VECTOR * at.lane * Shape::V + at.row);
}
__device__ __forceinline__ constexpr int vector_step(int r, int i, int e) {
  return Shape::VK ? r * Shape::K + Shape::VECTOR * Shape::LANES * i : (Shape::VECTOR * Shape::LANES * i + e) * Shape::V;
}

// Calls visit(r, i, e, offset) for every element the thread holds; offset is within the state.
template <class Visit> __device__ __forceinline__ void each_element(const States& s, const Place& at, Visit visit) {
#pragma unroll
  for (int r = 0; r < Shape::ROWS; r++)
#pragma unroll
    for (int i = 0; i < Shape::CHUNKS; i++)
#pragma unroll
      for (int e = 0; e < Shape::VECTOR; e++) {
        const int k = Shape::VECTOR * (at.lane + Shape::LANES * i) + e, v = at.row + r;
        int64 offset;
        if constexpr (!Shape::UNIT) offset = k * s.key + v * s.value;
        else offset = Shape::VK ? v * Shape::K + k : k * Shape::V + v;
        visit(r, i, e, offset, at.has(r) && Place::key(k));
      }
}

template <bool STREAM, class T>
__device__ __forceinline__ void load_state(Registers& S, const T* base, const States& s, const Place& at, bool vectors) {
  if (Vectors<T>::FIT && vectors) {
    const T* const mine = vectors_at(base, at);
    if constexpr (Shape::VK) {
#pragma unroll
      for (int r = 0; r < Shape::ROWS; r++)
#pragma unroll
        for (int i = 0; i < Shape::CHUNKS; i++) {
          const int k = Shape::VECTOR * (at.lane + Shape::LANES * i);
          if (at.has(r) && Place::key(k)) load_vector<STREAM>(mine + vector_step(r, i, 0), S.x[r][i]);
        }
    } else {
#pragma unroll
      for (int i = 0; i < Shape::CHUNKS; i++)
#pragma unroll
        for (int e = 0; e < Shape::VECTOR; e++) {
          const int k = Shape::VECTOR * (at.lane + Shape::LANES * i) + e;
          float column[Shape::ROWS] = {};
          if (at.has(0) && Place::key(k)) load_vector<STREAM>(mine + vector_step(0, i, e), column);
#pragma unroll
          for (int r = 0; r < Shape::ROWS; r++) S.x[r][i][e] = column[r];
        }
    }
  } else {
    each_element(s, at, [&](int r, int i, int e, int64 offset, bool inside) {
      if (inside) S.x[r][i][e] = Format<T>::load(base + offset);
    });
  }
}

template <bool STREAM, class T>
__device__ __forceinline__ void store_state(const Registers& S, T* base, const States& s, const Place& at, bool vectors) {
  if (Vectors<T>::FIT && vectors) {
    T* const mine = vectors_at(base, at);
    if constexpr (Shape::VK) {
#pragma unroll
      for (int r = 0; r < Shape::ROWS; r++)
#pragma unroll
        for (int i = 0; i < Shape::CHUNKS; i++) {
          const int k = Shape::VECTOR * (at.lane + Shape::LANES * i);
          if (at.has(r) && Place::key(k)) store_vector<STREAM>(mine + vector_step(r, i, 0), S.x[r][i]);
        }
    } else {
#pragma unroll
      for (int i = 0; i < Shape::CHUNKS; i++)
#pragma unroll
        for (int e = 0; e < Shape::VECTOR; e++) {
          const int k = Shape::VECTOR * (at.lane + Shape::LANES * i) + e;
          float column[Shape::ROWS];
#pragma unroll
          for (int r = 0; r < Shape::ROWS; r++) column[r] = S.x[r][i][e];
          if (at.has(0) && Place::key(k)) store_vector<STREAM>(mine + vector_step(0, i, e), column);
        }
    }
  } else {
    each_element(s, at, [&](int r, int i, int e, int64 offset, bool inside) {
      if (inside) Format<T>::store(base + offset, S.x[r][i][e]);
    });
  }
}

__device__ __forceinline__ void clear(Registers& S) {
#pragma unroll
  for (int r = 0; r < Shape::ROWS; r++)
#pragma unroll
    for (int i = 0; i < Shape::CHUNKS; i++)
#pragma unroll
      for (int e = 0; e < Shape::VECTOR; e++) S.x[r][i][e] = 0.0f;
}

struct Keys {  // a staged row of key channels, the part this lane needs
  float x[Shape::CHUNKS][Shape::VECTOR];
  __device__ __forceinline__ void read(const float* row, int lane) {
#pragma unroll
    for (int i = 0; i < Shape::CHUNKS; i++)
#pragma unroll
      for (int h = 0; h < Shape::VECTOR; h += 4) {
        const float4 w = *(const float4*)(row + staged(Shape::VECTOR * (lane + Shape::LANES * i) + h));
        x[i][h] = w.x, x[i][h + 1] = w.y, x[i][h + 2] = w.z, x[i][h + 3] = w.w;
      }
  }
};

// This lane's part of the sum over K of S[k, v] * x[k], for its row r of V. See shape.cuh for the order.
__device__ __forceinline__ float dot(const Registers& S, int r, const Keys& x) {
  float sum[Shape::PARTIALS][2] = {};
#pragma unroll
  for (int i = 0; i < Shape::CHUNKS; i++)
#pragma unroll
    for (int e = 0; e < Shape::VECTOR; e++) {
      float& part = sum[i % Shape::PARTIALS][e & 1];
      part = fmaf(S.x[r][i][e], x.x[i][e], part);
    }
  float half[Shape::PARTIALS];
#pragma unroll
  for (int c = 0; c < Shape::PARTIALS; c++) half[c] = sum[c][0] + sum[c][1];
#pragma unroll
  for (int width = Shape::PARTIALS / 2; width; width /= 2)
#pragma unroll
    for (int c = 0; c < width; c++) half[c] += half[c + width];
  return half[0];
}

// All lanes of the group get the sums of all rows.
__device__ __forceinline__ void sum_to_all(float (&x)[Shape::ROWS]) {
#pragma unroll
  for (int mask = Shape::LANES / 2; mask; mask /= 2)
#pragma unroll
    for (int r = 0; r < Shape::ROWS; r++) x[r] += __shfl_xor_sync(0xffffffffu, x[r], mask);
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
