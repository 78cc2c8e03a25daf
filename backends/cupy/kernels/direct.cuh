// Tokens read straight into the lanes that need them: no shared memory, no barrier. Every group of lanes does the same
// work on q, k and the gates, so this is for few tokens: a decode step waits for the state's arrival anyway.
#pragma once

struct Token {  // as it is stored: q and k of the lane's key channels, v of the group's rows
  Raw<Io, Shape::VECTOR> k[Shape::CHUNKS], q[Shape::CHUNKS];
  Raw<Io, Shape::ROWS> v;
  Raw<A_TYPE, 1> a;
  Raw<B_TYPE, 1> b;

  __device__ __forceinline__ Scalars scalars(const Keys& k, const Keys& q, const HeadGates& gates,
                                             const Arguments& p) const {
    float factor[2] = {1.0f, 1.0f};
    if constexpr (Shape::NORM) {
      factor[0] = chunk_squares(k.x), factor[1] = chunk_squares(q.x);
      sum_to_all(factor);
      factor[0] = inverse_norm(factor[0]), factor[1] = inverse_norm(factor[1]);
    }
    return scalars_of(decay_of(gates.A_log(), a.get(0) + gates.bias(), p), b.get(0), factor[0], factor[1], p);
  }
};

template <bool WIDE> class Reader {  // of a sequence's tokens, one after another
 public:
  static constexpr bool KEYS_FIT = Shape::UNIT && Shape::K % Shape::VECTOR == 0;
  static constexpr bool ROWS_FIT = Shape::UNIT && Shape::V % Shape::ROWS == 0;

  static __device__ __forceinline__ unsigned misaligned(const Arguments& p) {
    unsigned bits = 0;
    if constexpr (KEYS_FIT) bits |= Chunk::misaligned(p.data.q, p.q.batch | p.q.time | p.q.head);
    if constexpr (KEYS_FIT) bits |= Chunk::misaligned(p.data.k, p.k.batch | p.k.time | p.k.head);
    if constexpr (ROWS_FIT) bits |= Rows::misaligned(p.data.v, p.v.batch | p.v.time | p.v.head);
    return bits;
  }

  __device__ __forceinline__ Reader(const Arguments& p, const Sequence& it, const Place& at) : p_(p), at_(at) {
    const int64 key = key_of(at.lane, 0, 0);
    q_ = it.begin<const Io>(p.data.q, p.q, it.head) + key * element(p.q);
    k_ = it.begin<const Io>(p.data.k, p.k, it.head) + key * element(p.k);
    v_ = it.begin<const Io>(p.data.v, p.v, it.hv) + at.row * element(p.v);
    a_ = it.begin<const A_TYPE>(p.data.a, p.a, it.hv);
    b_ = it.begin<const B_TYPE>(p.data.b, p.b, it.hv);
  }

  __device__ __forceinline__ void next(Token& token) {
#pragma unroll
    for (int i = 0; i < Shape::CHUNKS; i++) {
      const int count = Shape::K == Shape::KEYS ? Shape::VECTOR : Shape::K - key_of(at_.lane, i, 0);
      const int from = key_of(0, i, 0);
      token.k[i].template load<WIDE && KEYS_FIT, INPUT>(k_ + from * element(p_.k), element(p_.k), count);
      token.q[i].template load<WIDE && KEYS_FIT, INPUT>(q_ + from * element(p_.q), element(p_.q), count);
    }
    token.a.template load<false, INPUT>(a_, 1, 1);
    token.b.template load<false, INPUT>(b_, 1, 1);
    const int count = Shape::WHOLE_TILES ? Shape::ROWS : Shape::V - at_.row;
    token.v.template load<WIDE && ROWS_FIT, INPUT>(v_, element(p_.v), count);
    q_ += p_.q.time, k_ += p_.k.time, v_ += p_.v.time, a_ += p_.a.time, b_ += p_.b.time;
  }

 private:
  using Chunk = Raw<Io, Shape::VECTOR>;
  using Rows = Raw<Io, Shape::ROWS>;
  static __device__ __forceinline__ int64 element(const Tokens& x) { return Shape::UNIT ? 1 : x.element; }

  const Arguments& p_;
  const Place at_;
  const Io *q_, *k_, *v_;
  const A_TYPE* a_;
  const B_TYPE* b_;
};

__device__ __forceinline__ void understand(Keys& x, const Raw<Io, Shape::VECTOR> (&raw)[Shape::CHUNKS]) {
#pragma unroll
  for (int i = 0; i < Shape::CHUNKS; i++)
#pragma unroll
    for (int e = 0; e < Shape::VECTOR; e++) x.x[i][e] = raw[i].get(e);
}
