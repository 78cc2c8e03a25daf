// The state from chunk to chunk, and the outputs. S is the state at a chunk's start, R the values less its predictions:
//
//   R = V - key_scale K S;   U = solve R;   O = query_scale Q S + attend U;   S <- total S + K^T (keep_scale U)
//
// A warp has 16 columns of V for a whole sequence, and holds all of it transposed: S^T is its accumulator [16, K], and
// rounded in place it is the left factor of S^T K^T and S^T Q^T; what those give is [16, tokens], and in turn the left
// factor of the products over tokens. So the chain from one state to the next never leaves the warp's registers. What
// it needs of a chunk comes through shared memory, STAGES chunks at a time, for all warps of a block. With GROUP four
// warps multiply together: their products run while they do what does not depend on them.
//
// A sequence may be cut into segments of SPAN tokens: what one does to a state is affine, S -> M S + B. The LOCAL pass has
// M's columns beside B's, which start from the identity and from nothing; `join` finds what each segment starts from, and
// then each is a sequence of its own.
#include "numbers.cuh"
#include "overlap.cuh"
#include "tensor_core.cuh"
#include "group.cuh"
#include "chunks.cuh"

// With GROUP four more warps bring what the others work on: a copy holds the registers that it was asked for with until
// it has been sent off, and those who multiply would wait for them. Registers are shared out to match.
constexpr int WORKERS = 32 * Shape::WARPS, BRINGERS = Shape::GROUP ? 128 : WORKERS;
constexpr int SCAN_THREADS = Shape::GROUP ? WORKERS + BRINGERS : WORKERS;
constexpr bool SHARES = Shape::GROUP && Shape::WARPS == 8;
constexpr int FEW = 40, MANY = 232;  // registers of a thread that brings, and of one that works

template <bool LOCAL> struct StageOf {
  Tile<Shape::KEYS> keys, queries;
  Tile<Shape::TILE> values;
  alignas(1024) Record record;
};
template <> struct StageOf<true> {
  Tile<Shape::KEYS> keys;
  Tile<Shape::TILE> values;
  alignas(1024) Passing record;
};
using Stage = StageOf<Shape::LOCAL>;
static_assert(sizeof(Passing) % 16 == 0 && sizeof(Record) % 16 == 0 && sizeof(Stage) % 1024 == 0,
              "copied 16 bytes at a time; tiles are swizzled");

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

// What a block works on: columns of V from `column` on, or with `passage` of the unit vectors, of one value head of one
// sequence or segment.
struct Task {
  Sequence sequence;
  int64 n, crossing;  // of all sequences; the segment's slot among crossings
  int hv, column;
  bool passage, first, last;  // the segment's place in its sequence
};

// Of a crossing's columns: those of this warp.
template <int COUNT>
__device__ __forceinline__ void load_columns(Columns& state, const float (&from)[COUNT][Shape::KEYS], int row, int lane) {
#pragma unroll
  for (int i = 0; i < Shape::KEYS / 8; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int k = 8 * i + lane % 4 * 2, column = row + lane / 4 + 8 * half;
      const float2 pair = column < COUNT ? *(const float2*)&from[column][k] : float2{0.0f, 0.0f};
      state[i][2 * half] = pair.x, state[i][2 * half + 1] = pair.y;
    }
}

template <int COUNT>
__device__ __forceinline__ void store_columns(const Columns& state, float (&to)[COUNT][Shape::KEYS], int row, int lane) {
#pragma unroll
  for (int i = 0; i < Shape::KEYS / 8; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int k = 8 * i + lane % 4 * 2, column = row + lane / 4 + 8 * half;
      if (column < COUNT) *(float2*)&to[column][k] = {state[i][2 * half], state[i][2 * half + 1]};
    }
}

__device__ __forceinline__ void set_identity(Columns& state, int row, int lane) {
#pragma unroll
  for (int i = 0; i < Shape::KEYS / 8; i++)
#pragma unroll
    for (int c = 0; c < 4; c++)
      state[i][c] = 8 * i + lane % 4 * 2 + c % 2 == row + lane / 4 + c / 2 * 8 ? 1.0f : 0.0f;
}

// Start bringing what `prepare` left of chunk `token / 64`.
template <class Stage>
__device__ __forceinline__ void bring_record(Stage& to, const Arguments& p, const Task& task, int64 token, int thread) {
  const Record* const record = p.data.records + (task.sequence.slot + token / CHUNK) * p.heads + task.hv;
  constexpr int UNITS = sizeof(to.record) / 16;  // of 16 bytes
  constexpr int SOLVE = sizeof(Triangle) / 16, ATTEND = sizeof(Record) / 16 - SOLVE;  // where one ends and one begins
#pragma unroll
  for (int i = 0; i < (UNITS + BRINGERS - 1) / BRINGERS; i++) {
    const int unit = i * BRINGERS + thread;
    const bool triangle = unit < SOLVE || unit >= ATTEND;
    const bool there = !triangle || !is_zeros((unit < SOLVE ? unit : unit - ATTEND) / 32 % TRIANGLE);
    if ((i + 1) * BRINGERS <= UNITS || unit < UNITS)
      copy_async<16>((uint4*)&to.record + unit, (const uint4*)record + unit, there);
  }
}

// Its keys, queries and values. Values beyond V are zeros.
template <class Stage>
__device__ __forceinline__ void bring_tokens(Stage& to, const Arguments& p, const Task& task, int64 token, int thread) {
  const Sequence& sequence = task.sequence;
  const int hv = task.hv, head = hv / Shape::SHARING, column = task.passage ? 0 : task.column;
  const int live = (int)min((int64)CHUNK, sequence.length - token);
  const Io* const k = sequence.begin<const Io>(p.data.k, p.k, head, token);
  const Io* const v = sequence.begin<const Io>(p.data.v, p.v, hv, token) + column * p.v.element;
  stage<Shape::KEYS, BRINGERS>(to.keys, k, p.k, live, Shape::K, thread);
  if constexpr (!Shape::LOCAL)
    stage<Shape::KEYS, BRINGERS>(to.queries, sequence.begin<const Io>(p.data.q, p.q, head, token), p.q, live, Shape::K,
                                 thread);
  stage<Shape::TILE, BRINGERS>(to.values, v, p.v, live, task.passage ? 0 : Shape::V - column, thread);
}

// Tokens 2 q + 8 i of a chunk's scale: the pairs that accumulators' columns are.
__device__ __forceinline__ void load_pairs(float2 (&pairs)[2 * BLOCKS], const float* scale, int q) {
#pragma unroll
  for (int i = 0; i < 2 * BLOCKS; i++) pairs[i] = *(const float2*)(scale + 8 * i + 2 * q);
}

// Outputs of half a chunk, one accumulator for 8 tokens, rounded: of two-byte types tokens (2 q.., column g) and (2 q..,
// column g + 8).
template <class T, int SIZE = sizeof(T)> struct Outputs {
  unsigned pair[BLOCKS][2];

  __device__ __forceinline__ void set(int i, const float (&o)[4]) {
    const float first[2] = {o[0], o[1]}, second[2] = {o[2], o[3]};
    pair[i][0] = Format<T>::put(first), pair[i][1] = Format<T>::put(second);
  }
  __device__ __forceinline__ void store(T* out, const Tokens& x, int live, int row, int lane) const {
    const int g = lane / 4, q = lane % 4;
    // Token g has columns 2 q.. of both halves then; two lanes exchange one, for four columns of the same.
    const bool odd = q % 2;
    const int v = row + 8 * odd + 2 * (q - odd);
    T* at = out + g * x.time + v * x.element;
#pragma unroll
    for (int i = 0; i < BLOCKS; i++, at += 8 * x.time) {
      const unsigned mine[2] = {transposed(pair[i][0]), transposed(pair[i][1])};
      const unsigned other = __shfl_xor_sync(0xffffffffu, odd ? mine[0] : mine[1], 1);
      const unsigned two[2] = {odd ? other : mine[0], odd ? mine[1] : other};
      const bool there = 8 * i + g < live;
      if constexpr (Shape::WIDE) {
        if (there && (Shape::V % Shape::TILE == 0 || v < Shape::V)) *(uint2*)at = {two[0], two[1]};
      } else {
#pragma unroll
        for (int c = 0; c < 4; c++)
          if (there && v + c < Shape::V) at[c * x.element].bits = (unsigned short)(two[c / 2] >> c % 2 * 16);
      }
    }
  }
};

template <class T> struct Outputs<T, 4> {
  float value[BLOCKS][4];

  __device__ __forceinline__ void set(int i, const float (&o)[4]) {
#pragma unroll
    for (int c = 0; c < 4; c++) value[i][c] = o[c];
  }
  __device__ __forceinline__ void store(T* out, const Tokens& x, int live, int row, int lane) const {
    const int g = lane / 4, q = lane % 4;
#pragma unroll
    for (int i = 0; i < BLOCKS; i++)
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const int token = 8 * i + 2 * q + c % 2, v = row + c / 2 * 8 + g;
        if (token < live && v < Shape::V)
          Format<T>::template store<STATE>(out + token * x.time + v * x.element, value[i][c]);
      }
  }
};

// A product's rows of a warp, for all tokens of a chunk.
using Rows = float[2 * BLOCKS][4];

// Right factors in shared memory, from inner row k and column n on, multiples of 16: whose columns are a tile's rows, whose
// rows are, and a triangle's rows.
#if GROUP_PRODUCTS
template <class T> struct ByRows {
  Matrix first;
  __device__ __forceinline__ ByRows(const T& tile, int) : first(swizzled_matrix_of(&tile)) {}
  __device__ __forceinline__ Matrix at(int k, int n, int piece) const {
    return moved(first, piece * T::PIECE + n * 128 + k / 64 * T::PANEL + k % 64 * 2);
  }
};
template <class T> struct ByColumns {
  Matrix first;
  __device__ __forceinline__ ByColumns(const T& tile, int) : first(swizzled_matrix_of(&tile)) {}
  __device__ __forceinline__ Matrix at(int k, int n, int piece) const {
    return moved(first, piece * T::PIECE + k * 128 + n / 64 * T::PANEL + n % 64 * 2);
  }
};
struct OfTriangle {
  Matrix first;
  __device__ __forceinline__ OfTriangle(const Triangle& x, int) : first(matrix_of(&x, Triangle::CORE, Triangle::ROWS)) {}
  __device__ __forceinline__ Matrix at(int k, int n, int piece) const {
    return moved(first, piece * Triangle::PIECE + block_of(n / 16, k / 16) * Triangle::BLOCK);
  }
};
#else
template <class T> struct ByRows {
  Corner<T> corner;
  __device__ __forceinline__ ByRows(const T& tile, int lane) : corner(columns_of(tile, lane)) {}
  __device__ __forceinline__ Shared at(int k, int n, int piece) const { return corner.at(n, k, piece); }
};
template <class T> struct ByColumns {
  Corner<T> corner;
  __device__ __forceinline__ ByColumns(const T& tile, int lane) : corner(rows_of(tile, lane)) {}
  __device__ __forceinline__ Shared at(int k, int n, int piece) const { return corner.at(k, n, piece); }
};
struct OfTriangle {
  Shared first;
  __device__ __forceinline__ OfTriangle(const Triangle& x, int lane) : first(shared_of((const char*)&x + lane * 16)) {}
  __device__ __forceinline__ Shared at(int k, int n, int piece) const {
    return first + (piece * Triangle::PIECE + block_of(n / 16, k / 16) * Triangle::BLOCK);
  }
};
#endif

// c (+)= a b for N columns from n on and piece `piece` of b, by the warp or by four together; the latter run on until they
// are waited for.
template <int N, bool TRANSPOSED, class B>
__device__ __forceinline__ void product(float (*c)[4], const unsigned (&a)[4], const B& b, int k, int n, int piece,
                                        bool add) {
#if GROUP_PRODUCTS
  constexpr int REST = N % 64 == 0 ? 64 : N % 64;
#pragma unroll
  for (int i = 0; i < N; i += 64) {
    if (i + 64 <= N) group_multiply<64, TRANSPOSED>(c[i / 8], a, b.at(k, n + i, piece), add);
    else group_multiply<REST, TRANSPOSED>(c[i / 8], a, b.at(k, n + i, piece), add);
  }
#else
#pragma unroll
  for (int i = 0; i < N / 16; i++) {
    if (!add)
#pragma unroll
      for (int e = 0; e < 8; e++) c[2 * i + e / 4][e % 4] = 0.0f;
    unsigned right[4];
    if (TRANSPOSED) load_transposed(right, b.at(k, n + 16 * i, piece));
    else load_matrices(right, b.at(k, n + 16 * i, piece));
    multiply(c[2 * i], a, right[0], right[1]), multiply(c[2 * i + 1], a, right[2], right[3]);
  }
#endif
}

// Of products of pieces those count that a float can hold, smallest first and through the whole sum: tensor cores cut off
// what they add, and cut least from a small sum. `each(r, first)` is of piece p and one of RIGHT, `first` of all.
template <int LEFT, int RIGHT, class Each> __device__ __forceinline__ void each_right_piece(int p, const Each& each) {
#pragma unroll
  for (int r = RIGHT - 1; r >= 0; r--)
    if (p + r < 3) each(r, p == LEFT - 1 && r == (RIGHT - 1 < 3 - LEFT ? RIGHT - 1 : 3 - LEFT));
}
template <int LEFT, int RIGHT, class Each> __device__ __forceinline__ void each_of_pieces(const Each& each) {
#pragma unroll
  for (int p = LEFT - 1; p >= 0; p--) each_right_piece<LEFT, RIGHT>(p, [&](int r, bool first) { each(p, r, first); });
}

__device__ __forceinline__ void begin_products() {
  if constexpr (Shape::GROUP) group_begin();
}
__device__ __forceinline__ void commit_products() {
  if constexpr (Shape::GROUP) group_commit();
}
template <int LEFT> __device__ __forceinline__ void wait_for_products() {
  if constexpr (Shape::GROUP) group_wait<LEFT>();
}
template <int COUNT> __device__ __forceinline__ void settled(float (&x)[COUNT][4]) {
  if constexpr (Shape::GROUP) settle(x);
}

// c = x B for a triangle B, x by rows of blocks, for the `live` tokens. The two halves of c are arrays of their own: ptxas
// keeps products apart that accumulate in a part of another's registers.
using Half = float[BLOCKS][4];

__device__ __forceinline__ void triangle_products(Half& early, Half& late, const Factor<Shape::PIECES> (&x)[BLOCKS],
                                                  const Triangle& triangle, int live, int lane) {
  const OfTriangle from(triangle, lane);
  each_of_pieces<Shape::PIECES, Shape::PIECES>([&](int p, int r, bool first) {
#pragma unroll
    for (int j = 0; j < BLOCKS; j++) {
      if (!Shape::GROUP && j > 0 && 16 * j >= live) continue;  // a branch would end a run of products
      const bool add = j > 0 || !first;
      if (j < 2) product<32, false>(early, x[j].piece[p], from, 16 * j, 0, r, add);
      product<32, false>(late, x[j].piece[p], from, 16 * j, 32, r, add);
    }
  });
}

// c (+)= x B for N columns of the keys from n on.
template <int N, class B>
__device__ __forceinline__ void update(float (*c)[4], const Factor<Shape::PIECES> (&x)[BLOCKS], const B& keys, int n,
                                       int live, bool add) {
  each_of_pieces<Shape::PIECES, IO_PIECES>([&](int p, int r, bool first) {
#pragma unroll
    for (int j = 0; j < BLOCKS; j++)
      if (Shape::GROUP || j == 0 || 16 * j < live)
        product<N, true>(c, x[j].piece[p], keys, 16 * j, n, r, add || j > 0 || !first);
  });
}

// state += x B, the sums formed by themselves, 64 columns at a time.
template <class B>
__device__ __forceinline__ void add_updates(Columns& state, const Factor<Shape::PIECES> (&x)[BLOCKS], const B& keys,
                                            int live) {
  constexpr int WHOLE = Shape::KEYS / 64 * 64, REST = Shape::KEYS - WHOLE;
#pragma unroll
  for (int n = 0; n < Shape::KEYS; n += 64) {
    float sum[8][4];
    settled(sum);
    begin_products();
    if (n < WHOLE) update<64>(sum, x, keys, n, live, false);
    else update<REST == 0 ? 64 : REST>(sum, x, keys, n, live, false);
    commit_products();
    wait_for_products<0>();
    settled(sum);
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int c = 0; c < 4; c++)
        if (n / 8 + i < Shape::KEYS / 8) state[n / 8 + i][c] += sum[i][c];
  }
}

// One chunk: `state` moves on, and unless LOCAL `outputs` are set.
template <class Stage>
__device__ __forceinline__ void step(Columns& state, Outputs<Io> (&outputs)[2], const Stage& s, int live, int lane) {
  using Keys = Tile<Shape::KEYS>;
  using Values = Tile<Shape::TILE>;
  constexpr int PIECES = Shape::PIECES, STEPS = Shape::KEYS / 16;
  const int q = lane % 4, warp = threadIdx.x / 32;
  const ByRows<Keys> keys(s.keys, lane);
  Rows u, o;  // what the state predicts for keys and queries
#pragma unroll
  for (int p = PIECES - 1; p >= 0; p--) {  // pieces of the state, the smallest first
    unsigned rounded[STEPS][4];
#pragma unroll
    for (int i = 0; i < STEPS; i++)
#pragma unroll
      for (int half = 0; half < 4; half++) {
        unsigned pieces[PIECES];
        const float(&x)[4] = state[2 * i + half / 2];
        split(pieces, x[half % 2 * 2], x[half % 2 * 2 + 1]);
        rounded[i][half] = pieces[p];
      }
    const auto predict = [&](Rows& c, const ByRows<Keys>& b) {
      each_right_piece<PIECES, IO_PIECES>(p, [&](int r, bool first) {
#pragma unroll
        for (int i = 0; i < STEPS; i++) product<CHUNK, false>(c, rounded[i], b, 16 * i, 0, r, i > 0 || !first);
      });
    };
    settled(u);
    begin_products();
    predict(u, keys);
    commit_products();
    if constexpr (!Shape::LOCAL) {
      settled(o);
      begin_products();
      predict(o, ByRows<Keys>(s.queries, lane));
      commit_products();
    }
    if (p > 0) wait_for_products<0>();
  }
  // What comes after a wait is loaded before it, where there is one, and registers.
  constexpr bool EARLY = Shape::GROUP && !SHARES;
  unsigned matrix[BLOCKS][IO_PIECES][4];
  float2 scales[2 * BLOCKS];
  const Corner<Values> values = columns_of(s.values, lane);
  const auto load_values = [&] {
#pragma unroll
    for (int j = 0; j < BLOCKS; j++)
#pragma unroll
      for (int r = 0; r < IO_PIECES; r++) load_transposed(matrix[j][r], values.at(16 * j, 16 * warp, r));
    load_pairs(scales, s.record.key_scale, q);
  };
  const float total = s.record.total;
  if constexpr (EARLY) load_values();
  wait_for_products<Shape::LOCAL ? 0 : 1>();
  settled(u);
  if constexpr (!EARLY) load_values();

  Factor<PIECES> residual[BLOCKS];
#pragma unroll
  for (int j = 0; j < BLOCKS; j++) {
#pragma unroll
    for (int side = 0; side < 2; side++) {
      const float2 scale = scales[2 * j + side];
      const float(&y)[4] = u[2 * j + side];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const unsigned(&last)[4] = matrix[j][IO_PIECES - 1];
        float first = low_half(last[2 * side + half]), second = high_half(last[2 * side + half]);
#pragma unroll
        for (int r = IO_PIECES - 2; r >= 0; r--)
          first += low_half(matrix[j][r][2 * side + half]), second += high_half(matrix[j][r][2 * side + half]);
        residual[j].set(2 * side + half, fmaf(-scale.x, y[2 * half], first),
                        fmaf(-scale.y, y[2 * half + 1], second));
      }
    }
  }
  Half updates[2];
  settled(updates[0]);
  settled(updates[1]);
  begin_products();
  triangle_products(updates[0], updates[1], residual, s.record.solve, live, lane);
  commit_products();

  if constexpr (!Shape::LOCAL) load_pairs(scales, s.record.query_scale, q);
#pragma unroll
  for (int i = 0; i < Shape::KEYS / 8; i++)
#pragma unroll
    for (int c = 0; c < 4; c++) state[i][c] *= total;
  if constexpr (!Shape::LOCAL) {
    wait_for_products<1>();
    settled(o);
#pragma unroll
    for (int i = 0; i < 2 * BLOCKS; i++) {
      const float2 scale = scales[i];
      o[i][0] *= scale.x, o[i][1] *= scale.y, o[i][2] *= scale.x, o[i][3] *= scale.y;
    }
  }
  if constexpr (EARLY) load_pairs(scales, s.record.keep_scale, q);
  wait_for_products<0>();
  settled(updates[0]);
  settled(updates[1]);
  if constexpr (!EARLY) load_pairs(scales, s.record.keep_scale, q);

  Factor<PIECES> kept[BLOCKS];
#pragma unroll
  for (int i = 0; i < 2 * BLOCKS; i++) {
    const float(&x)[4] = updates[i / BLOCKS][i % BLOCKS];
    const float2 keep = scales[i];
    kept[i / 2].set(i % 2 * 2, keep.x * x[0], keep.y * x[1]);
    kept[i / 2].set(i % 2 * 2 + 1, keep.x * x[2], keep.y * x[3]);
  }
  const ByColumns<Keys> key_rows(s.keys, lane);
  Half early, late;
  settled(early);
  settled(late);
  if constexpr (PIECES == 1) {
    settled(state);
    begin_products();
    update<Shape::KEYS>(state, kept, key_rows, 0, live, true);
    commit_products();
  } else {
    // Tensor cores cut sums off: added to the state itself, 12 products would take up to 12 units of its last place away.
    add_updates(state, kept, key_rows, live);
  }
  if constexpr (Shape::LOCAL) {
    wait_for_products<0>();
    settled(state);
  } else {
#pragma unroll
    for (int j = 0; j < BLOCKS; j++)
      residual[j].set(updates[j / 2][j % 2 * 2], updates[j / 2][j % 2 * 2 + 1]);
    begin_products();
    triangle_products(early, late, residual, s.record.attend, live, lane);
    commit_products();
    wait_for_products<0>();
    settled(state);
    settled(early);
    settled(late);
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
#pragma unroll
      for (int c = 0; c < 4; c++) early[i][c] += o[i][c], late[i][c] += o[BLOCKS + i][c];
      outputs[0].set(i, early[i]), outputs[1].set(i, late[i]);
    }
  }
}

// All threads meet here; those of different tasks from different places.
__device__ __forceinline__ void meet() {
  if constexpr (Shape::GROUP) meet_by_name<1, SCAN_THREADS>();
  else __syncthreads();
}

// Brings chunk after chunk, STAGES of them at a time; `work(stage, tokens)` follows each, when it is there for all. Inputs
// of the first ones are on their way before `prepare` ends.
template <class Work>
__device__ __forceinline__ void bring_all(const Arguments& p, Stage* stages, const Task& task, int thread,
                                          Work&& work) {
  const int64 length = task.sequence.length;
  constexpr int AHEAD = Shape::STAGES - 1;
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    if (i * CHUNK < length) bring_tokens(stages[i], p, task, i * CHUNK, thread);
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    if (i * CHUNK < length) bring_record(stages[i], p, task, i * CHUNK, thread);
    group_copies();
  }
  int64 brought = AHEAD * CHUNK;  // tokens
  const auto bring_next = [&](int to) {
    if (brought < length) {
      bring_record(stages[to], p, task, brought, thread);
      bring_tokens(stages[to], p, task, brought, thread);
    }
    group_copies();
    brought += CHUNK;
  };
  int current = 0;
  for (int64 token = 0; token < length; token += CHUNK) {
    if constexpr (Shape::STAGES == 1) {
      if (token > 0) meet();  // the chunk before this one has been used, by all
      bring_next(0);
      wait_for_group<0>();
    } else {
      wait_for_group<Shape::STAGES - 2>();
    }
    if constexpr (Shape::GROUP) publish_shared();
    meet();  // this chunk is here, for all; the one before it has been used, by all
    if constexpr (Shape::STAGES > 1) bring_next((current + Shape::STAGES - 1) % Shape::STAGES);
    work(stages[current], token);
    current = (current + 1) % Shape::STAGES;
  }
}

// The same for those who find it brought.
template <class Work> __device__ __forceinline__ void use_all(Stage* stages, int64 length, Work& work) {
  int current = 0;
  for (int64 token = 0; token < length; token += CHUNK) {
    if (Shape::STAGES == 1 && token > 0) meet();
    meet();
    work(stages[current], token);
    current = (current + 1) % Shape::STAGES;
  }
}

// A warp's columns of V, from chunk to chunk.
struct Scan {
  const Arguments& p;
  const Task& task;
  int row, lane;  // its first column
  Columns state;

  __device__ __forceinline__ Scan(const Arguments& p, const Task& task, int warp, int lane)
      : p(p), task(task), row(task.column + 16 * warp), lane(lane), state{} {
    const int64 slot = Shape::READ ? index_at<SLOT_INDEX>(p.data.read, task.n) : -1;
    if constexpr (Shape::LOCAL) {
      if (task.passage) set_identity(state, row, lane);
    } else if (Shape::SPAN > 0 && !(task.first && task.last)) {
      wait_for_previous();  // here for `join`
      load_columns(state, crossing(p, task.crossing, task.hv).start, row, lane);
    } else if (slot >= 0) {
      load_state(state, pool(slot), p.pool, row, lane);
    }
  }
  __device__ __forceinline__ void operator()(const Stage& stage, int64 token) {
    const int live = (int)min((int64)CHUNK, task.sequence.length - token);
    Outputs<Io> outputs[2];
    step(state, outputs, stage, live, lane);
    if constexpr (!Shape::LOCAL) {
      Io* const out = task.sequence.begin<Io>(p.data.out, p.out, task.hv, token);
      outputs[0].store(out, p.out, live, row, lane);
      outputs[1].store(out + CHUNK / 2 * p.out.time, p.out, live - CHUNK / 2, row, lane);
    }
  }
  __device__ __forceinline__ void end() {
    if constexpr (Shape::LOCAL) {
      if (task.passage) store_columns(state, crossing(p, task.crossing, task.hv).passage, row, lane);
      else store_columns(state, crossing(p, task.crossing + 1, task.hv).start, row, lane);
    } else if (task.last) {
      const int64 slot = Shape::WRITE ? index_at<SLOT_INDEX>(p.data.write, task.n) : -1;
      if (slot >= 0) store_state(state, pool(slot), p.pool, row, lane);
    }
  }
  __device__ __forceinline__ State* pool(int64 slot) const {
    return (State*)p.data.pool + slot * p.pool.slot + task.hv * p.pool.head;
  }
};

struct Nothing {
  __device__ __forceinline__ void operator()(const Stage&, int64) const {}
};

// A block's work; none if the task's sequence has no tokens. `place`: of a sequence, or a slot of segments.
__device__ __forceinline__ Task task_of(const Arguments& p, int64 place) {
  constexpr int SPAN = Shape::SPAN, PASSAGES = Shape::LOCAL ? (Shape::K + Shape::TILE - 1) / Shape::TILE : 0;
  constexpr int TILES = Shape::TILES + PASSAGES;
  const int tile = (int)blockIdx.x % TILES;
  const bool passage = Shape::LOCAL && tile >= Shape::TILES;
  const int64 n = SPAN == 0 ? place : sequence_of<SPAN == 0 ? 1 : SPAN>(p, place);
  Task task = {Sequence(p, n), n, 0, (int)blockIdx.x / TILES,
               (passage ? tile - Shape::TILES : tile) * Shape::TILE, passage, true, true};
  Sequence& sequence = task.sequence;
  if constexpr (SPAN > 0) {
    const int64 segment = place - first_segment(p, n, sequence), before = segment * SPAN;
    task.crossing = first_crossing(p, n, sequence) + segment;
    task.first = before == 0, task.last = before + SPAN >= sequence.length;
    sequence.first += before, sequence.slot += before / CHUNK;
    const bool none = n >= p.n || (Shape::LOCAL && task.last);
    sequence.length = none ? 0 : min(sequence.length - before, (int64)SPAN);
  }
  return task;
}

extern "C" __global__ void __launch_bounds__(SCAN_THREADS, 1) scan(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Stage* const stages = (Stage*)memory;
  if constexpr (Shape::LOCAL) let_next_start();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64 place = (int64)blockIdx.z * gridDim.y + blockIdx.y;
  if (Shape::SPAN == 0 && place >= p.n) return wait_for_previous();
  const Task task = task_of(p, place);
  if (task.sequence.length <= 0) return wait_for_previous();
  if constexpr (Shape::GROUP) {
    if (warp < Shape::WARPS) {
      if constexpr (SHARES) more_registers<MANY>();
      Scan scan(p, task, warp, lane);
      use_all(stages, task.sequence.length, scan);
      scan.end();
    } else {
      if constexpr (SHARES) fewer_registers<FEW>();
      bring_all(p, stages, task, threadIdx.x - WORKERS, Nothing());
    }
  } else {
    Scan scan(p, task, warp, lane);
    bring_all(p, stages, task, threadIdx.x, scan);
    scan.end();
  }
}
