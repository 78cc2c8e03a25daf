// Tokens on their way to the recurrence: fetched from memory as raw bits a window ahead, then understood, and laid out
// in shared memory, once per block and token.
#pragma once

struct __align__(16) Stage {  // a window of tokens, ready to use
  float k[Shape::WINDOW][Shape::KEYS], q[Shape::WINDOW][Shape::KEYS];
  float g[Shape::KDA ? Shape::WINDOW : 1][Shape::KDA ? Shape::KEYS : 4];  // KDA: decay per key channel
  Scalars scalars[Shape::WINDOW];
  float v[Shape::WINDOW][Shape::TILE];
};

// Where key channel k lies in a staged row. Lanes read 16 bytes at a time; with VECTOR = 8 the two halves of a chunk
// lie apart, so that neighbouring lanes read neighbouring words and no bank is asked twice.
__device__ __forceinline__ int staged(int k) {
  if constexpr (Shape::VECTOR == 4) return k;
  else return (k & 4) * (Shape::KEYS / 8) + (k >> 3) * 4 + (k & 3);
}
__device__ __forceinline__ void read_staged(Keys& x, const float* row, int lane) {
#pragma unroll
  for (int i = 0; i < Shape::CHUNKS; i++)
#pragma unroll
    for (int e = 0; e < Shape::VECTOR; e += 4) {
      const float4 w = *(const float4*)(row + staged(key_of(lane, i, e)));
      x.x[i][e] = w.x, x.x[i][e + 1] = w.y, x.x[i][e + 2] = w.z, x.x[i][e + 3] = w.w;
    }
}

// One staging warp's part of a window: tokens stager, stager + STAGERS, ... A row of K takes the whole warp, the
// scalar gates of its tokens one lane each.
template <bool WIDE> class Fetcher {
 public:
  static constexpr bool FIT = Shape::UNIT && Shape::K % 4 == 0;
  static constexpr bool A_FIT = FIT && Shape::KDA && sizeof(A_TYPE) < 8;  // doubles are rounded one by one

  static __device__ __forceinline__ unsigned misaligned(const Arguments& p) {
    unsigned bits = 0;
    if constexpr (FIT) bits |= Raw<Io, 4>::misaligned(p.data.q, p.q.batch | p.q.time | p.q.head);
    if constexpr (FIT) bits |= Raw<Io, 4>::misaligned(p.data.k, p.k.batch | p.k.time | p.k.head);
    if constexpr (A_FIT) bits |= Raw<A_TYPE, 4>::misaligned(p.data.a, p.a.batch | p.a.time | p.a.head);
    return bits;
  }

  __device__ __forceinline__ Fetcher(const Arguments& p, const Sequence& it, const HeadGates& gates, int stager,
                                     int lane)
      : p_(p), gates_(gates), stager_(stager), lane_(lane), v_row_(it.tile * Shape::TILE + lane) {
    q_ = it.begin<const Io>(p.data.q, p.q, it.head), k_ = it.begin<const Io>(p.data.k, p.k, it.head);
    v_ = it.begin<const Io>(p.data.v, p.v, it.hv);
    a_ = it.begin<const A_TYPE>(p.data.a, p.a, it.hv), b_ = it.begin<const B_TYPE>(p.data.b, p.b, it.hv);
  }

  // Start loading tokens [at, at + count) of the sequence; count <= WINDOW.
  __device__ __forceinline__ void fetch(int64 at, int count) {
#pragma unroll
    for (int s = 0; s < Shape::TOKENS; s++) {
      const int slot = stager_ + Shape::STAGERS * s;
      if (slot < count) {
        const int64 t = at + slot;
        row(k_raw_[s], k_ + t * p_.k.time, p_.k.element);
        row(q_raw_[s], q_ + t * p_.q.time, p_.q.element);
        if constexpr (Shape::KDA) row(a_raw_[s], a_ + t * p_.a.time, p_.a.element);
#pragma unroll
        for (int x = 0; x < TILE_ROUNDS; x++) {
          const int v = v_row_ + 32 * x;
          const bool mine = lane_ + 32 * x < Shape::TILE && v < Shape::V;
          v_raw_[s][x].template load<false, INPUT>(v_ + t * p_.v.time + (Shape::UNIT ? v : v * p_.v.element), 1, mine);
        }
      }
    }
    gate_slot_ = lane_ < Shape::TOKENS ? stager_ + Shape::STAGERS * lane_ : Shape::WINDOW;
    if (gate_slot_ < count) {
      const int64 t = at + gate_slot_;
      if constexpr (!Shape::KDA) a_bits_.template load<false, INPUT>(a_ + t * p_.a.time, 1, 1);
      b_bits_.template load<false, INPUT>(b_ + t * p_.b.time, 1, 1);
    }
  }

  // Lay the fetched tokens out. Slots beyond count hold what was fetched for an earlier window, or zeros.
  __device__ __forceinline__ void finish(Stage& stage, int count) {
#pragma unroll
    for (int s = 0; s < Shape::TOKENS; s++) {
      const int slot = stager_ + Shape::STAGERS * s;
      if (slot >= count) continue;
      lay_out(stage, slot, s);
#pragma unroll
      for (int x = 0; x < TILE_ROUNDS; x++) {
        const int v = lane_ + 32 * x;
        if (v < Shape::TILE) stage.v[slot][v] = v_raw_[s][x].get(0);
      }
    }
    float k_factor = 1.0f, q_factor = 1.0f;  // of the lane's token
    if constexpr (Shape::NORM) norms(k_factor, q_factor);
    if (gate_slot_ < count) {
      float decay = 1.0f;
      if constexpr (!Shape::KDA) decay = decay_of(gates_.A_log(), a_bits_.get(0) + gates_.bias(), p_);
      stage.scalars[gate_slot_] = scalars_of(decay, b_bits_.get(0), k_factor, q_factor, p_);
    }
  }

 private:
  static constexpr int TILE_ROUNDS = (Shape::TILE + 31) / 32;

  template <class T>
  __device__ __forceinline__ void row(Raw<T, 4> (&raw)[ROUNDS], const T* p, int64 element) const {
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
      const int k = 4 * lane_ + 128 * i;
      raw[i].template load<WIDE && FIT && sizeof(T) < 8, INPUT>(p + (Shape::UNIT ? k : k * element),
                                                                Shape::UNIT ? 1 : element, Shape::K - k);
    }
  }

  // All of the warp's tokens together: their shuffles wait for one another's latency, not one after another.
  __device__ __forceinline__ void norms(float& k_factor, float& q_factor) const {
    float square[2 * Shape::TOKENS];
#pragma unroll
    for (int s = 0; s < Shape::TOKENS; s++) {
      float k[ROUNDS][4], q[ROUNDS][4];
#pragma unroll
      for (int i = 0; i < ROUNDS; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) k[i][e] = k_raw_[s][i].get(e), q[i][e] = q_raw_[s][i].get(e);
      square[2 * s] = quad_squares(k), square[2 * s + 1] = quad_squares(q);
    }
    sum_over_warp(square);
    float k_square = square[0], q_square = square[1];
#pragma unroll
    for (int s = 1; s < Shape::TOKENS; s++)
      if (lane_ == s) k_square = square[2 * s], q_square = square[2 * s + 1];
    k_factor = inverse_norm(k_square), q_factor = inverse_norm(q_square);
  }

  __device__ __forceinline__ void lay_out(Stage& stage, int slot, int s) const {
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
      const int k = 4 * lane_ + 128 * i;
      if (k >= Shape::KEYS) continue;
      const Raw<Io, 4>&x = k_raw_[s][i], &y = q_raw_[s][i];
      *(float4*)&stage.k[slot][staged(k)] = {x.get(0), x.get(1), x.get(2), x.get(3)};
      *(float4*)&stage.q[slot][staged(k)] = {y.get(0), y.get(1), y.get(2), y.get(3)};
      if constexpr (Shape::KDA) {
        float g[4];
#pragma unroll
        for (int e = 0; e < 4; e++) g[e] = decay_of(gates_.A_log(), a_raw_[s][i].get(e) + gates_.bias(i, e), p_);
        *(float4*)&stage.g[slot][staged(k)] = {g[0], g[1], g[2], g[3]};
      }
    }
  }

  const Arguments& p_;
  const HeadGates& gates_;
  const Io *q_, *k_, *v_;
  const A_TYPE* a_;
  const B_TYPE* b_;
  int stager_, lane_, v_row_, gate_slot_ = Shape::WINDOW;
  Raw<Io, 4> k_raw_[Shape::TOKENS][ROUNDS] = {}, q_raw_[Shape::TOKENS][ROUNDS] = {};
  Raw<A_TYPE, 4> a_raw_[Shape::TOKENS][ROUNDS] = {};  // KDA only
  Raw<Io, 1> v_raw_[Shape::TOKENS][TILE_ROUNDS] = {};
  Raw<A_TYPE, 1> a_bits_ = {};
  Raw<B_TYPE, 1> b_bits_ = {};
};
