// Tokens on their way to the recurrence: fetched from memory as raw bits while the tokens before them are computed,
// then understood, normalised and laid out in shared memory, once per block and token.
#pragma once

struct __align__(16) Stage {  // a window of tokens, ready to use
  float k[Shape::WINDOW][Shape::KEYS], q[Shape::WINDOW][Shape::KEYS];
  float g[Shape::KDA ? Shape::WINDOW : 1][Shape::KDA ? Shape::KEYS : 4];  // KDA: decay per key channel
  float v[Shape::WINDOW][Shape::TILE];
  float decay[Shape::WINDOW], beta[Shape::WINDOW];  // decay: GDN only
};

// Four consecutive key channels per lane and 128 per round, so that one warp holds a whole row of K.
constexpr int ROUNDS = (Shape::KEYS + 127) / 128;
constexpr int TILE_ROUNDS = (Shape::TILE + 31) / 32;

template <class T> struct RawKeys {
  static constexpr int WORDS = 4 / Format<T>::PER_WORD;
  unsigned word[ROUNDS][WORDS] = {};

  // row: first channel of the token's head. whole: four channels may be read at once.
  __device__ __forceinline__ void fetch(const T* row, int64 element, bool whole, int lane) {
#pragma unroll
    for (int s = 0; s < ROUNDS; s++) {
      const int k = 4 * lane + 128 * s;
#pragma unroll
      for (int w = 0; w < WORDS; w++) word[s][w] = 0;
      if (Shape::UNIT && Shape::K % 4 == 0 && sizeof(T) < 8 && whole) {
        if (k < Shape::K) {
          if constexpr (WORDS == 4) {
            const uint4 w = __ldg((const uint4*)(row + k));
            word[s][0] = w.x, word[s][1] = w.y, word[s][WORDS - 2] = w.z, word[s][WORDS - 1] = w.w;
          } else {
            const uint2 w = __ldg((const uint2*)(row + k));
            word[s][0] = w.x, word[s][1] = w.y;
          }
        }
      } else {
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (k + e < Shape::K) {
            const unsigned bits = Format<T>::read(row + (Shape::UNIT ? k + e : (k + e) * element));
            word[s][e / Format<T>::PER_WORD] |= Format<T>::PER_WORD == 2 ? bits << 16 * (e & 1) : bits;
          }
      }
    }
  }
  __device__ __forceinline__ float get(int s, int e) const {
    return Format<T>::get(word[s][e / Format<T>::PER_WORD], e % Format<T>::PER_WORD);
  }
};

// What a head's gates have in common: bits, loaded before anything is known of the sequence.
class HeadGates {
 public:
  __device__ __forceinline__ HeadGates(const Arguments& p, int hv, int lane) {
    A_log_ = fetch_bits(p.A_log.data, hv * p.A_log.head, p.A_log.format);
#pragma unroll
    for (int s = 0; s < (Shape::KDA ? ROUNDS : 1); s++)
#pragma unroll
      for (int e = 0; e < (Shape::KDA ? 4 : 1); e++) {
        const int k = Shape::KDA ? 4 * lane + 128 * s + e : 0;
        const int64 at = hv * p.dt_bias.head + (k < Shape::K ? k : 0) * p.dt_bias.element;
        bias_[s][e] = fetch_bits(p.dt_bias.data, at, p.dt_bias.format);
      }
  }
  __device__ __forceinline__ float A_log(const Arguments& p) const { return understand(A_log_, p.A_log.format); }
  // KDA: of the lane's key channel (s, e); GDN: (0, 0).
  __device__ __forceinline__ float bias(const Arguments& p, int s, int e) const {
    return understand(bias_[s][e], p.dt_bias.format);
  }

 private:
  unsigned A_log_, bias_[ROUNDS][4];
};

// One warp's part of a window: tokens warp, warp + WARPS, ... The scalar gates of the next warp's tokens are computed
// by one lane each, so that in a decode step they do not wait for the norms.
class Fetcher {
 public:
  __device__ __forceinline__ Fetcher(const Arguments& p, const HeadGates& gates, int64 batch, int64 first, int hv,
                                     int tile, int warp, int lane)
      : p_(p), gates_(gates), warp_(warp), lane_(lane) {
    const int64 h = hv / (int)p.group;
    q_ = (const Io*)p.q.data + batch * p.q.batch + first * p.q.time + h * p.q.head;
    k_ = (const Io*)p.k.data + batch * p.k.batch + first * p.k.time + h * p.k.head;
    v_ = (const Io*)p.v.data + batch * p.v.batch + first * p.v.time + hv * p.v.head;
    a_ = batch * p.a.batch + first * p.a.time + hv * p.a.head;
    b_ = batch * p.b.batch + first * p.b.time + hv * p.b.head;
    v_row_ = tile * Shape::TILE + lane;
    const int bytes = 4 * (int)sizeof(Io), gate_bytes = 4 * (int)sizeof(Gate);
    whole_q_ = aligned(p.q.data, (p.q.batch | p.q.time | p.q.head) * (int64)sizeof(Io), bytes);
    whole_k_ = aligned(p.k.data, (p.k.batch | p.k.time | p.k.head) * (int64)sizeof(Io), bytes);
    whole_a_ = aligned(p.a.data, (p.a.batch | p.a.time | p.a.head) * (int64)sizeof(Gate), gate_bytes);
  }

  // Start loading tokens [at, at + count) of the sequence; count <= WINDOW.
  __device__ __forceinline__ void fetch(int64 at, int count) {
#pragma unroll
    for (int s = 0; s < Shape::TOKENS; s++) {
      const int slot = warp_ + Shape::WARPS * s;
      if (slot < count) {
        const int64 t = at + slot;
        k_raw_[s].fetch(k_ + t * p_.k.time, p_.k.element, whole_k_, lane_);
        q_raw_[s].fetch(q_ + t * p_.q.time, p_.q.element, whole_q_, lane_);
        if constexpr (Shape::KDA)
          a_raw_[s].fetch((const Gate*)p_.a.data + a_ + t * p_.a.time, p_.a.element, whole_a_, lane_);
#pragma unroll
        for (int x = 0; x < TILE_ROUNDS; x++) {
          const int v = v_row_ + 32 * x;
          if (lane_ + 32 * x < Shape::TILE && v < Shape::V)
            v_raw_[s][x] = Format<Io>::read(v_ + t * p_.v.time + (Shape::UNIT ? v : v * p_.v.element));
        }
      }
    }
    gate_slot_ = lane_ < Shape::TOKENS ? (warp_ + 1) % Shape::WARPS + Shape::WARPS * lane_ : Shape::WINDOW;
    if (gate_slot_ < count) {
      const int64 t = at + gate_slot_;
      if constexpr (!Shape::KDA) a_bits_ = fetch_bits(p_.a.data, a_ + t * p_.a.time, p_.a_format);
      b_bits_ = fetch_bits(p_.b.data, b_ + t * p_.b.time, p_.b_format);
    }
  }

  // Lay the fetched tokens out. Slots beyond count hold what was fetched for an earlier window, or zeros.
  __device__ __forceinline__ void finish(Stage& stage, int count) {
    float q_factor[Shape::TOKENS], k_factor[Shape::TOKENS];
    norms(q_factor, k_factor);
#pragma unroll
    for (int s = 0; s < Shape::TOKENS; s++) {
      const int slot = warp_ + Shape::WARPS * s;
      if (slot >= count) continue;
      rows(stage, slot, s, q_factor[s], k_factor[s]);
#pragma unroll
      for (int x = 0; x < TILE_ROUNDS; x++) {
        const int v = lane_ + 32 * x;
        if (v < Shape::TILE) stage.v[slot][v] = v_row_ + 32 * x < Shape::V ? Format<Io>::get(v_raw_[s][x], 0) : 0.0f;
      }
    }
    if (gate_slot_ < count) {
      if constexpr (!Shape::KDA) {
        const float A_log = gates_.A_log(p_), x = understand(a_bits_, p_.a_format) + gates_.bias(p_, 0, 0);
        stage.decay[gate_slot_] = decay_of(A_log, rate_of(A_log), x, p_);
      }
      stage.beta[gate_slot_] = p_.beta_factor * sigmoid(understand(b_bits_, p_.b_format));
    }
  }

 private:
  // All of the warp's tokens together: their shuffles wait for one another's latency, not one after another.
  __device__ __forceinline__ void norms(float (&q_factor)[Shape::TOKENS], float (&k_factor)[Shape::TOKENS]) const {
#pragma unroll
    for (int s = 0; s < Shape::TOKENS; s++) q_factor[s] = p_.scale, k_factor[s] = 1.0f;
    if (!p_.l2norm) return;
    float sum[2 * Shape::TOKENS] = {};
#pragma unroll
    for (int s = 0; s < Shape::TOKENS; s++)
#pragma unroll
      for (int i = 0; i < ROUNDS; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float q = q_raw_[s].get(i, e), k = k_raw_[s].get(i, e);
          sum[2 * s] = fmaf(q, q, sum[2 * s]), sum[2 * s + 1] = fmaf(k, k, sum[2 * s + 1]);
        }
#pragma unroll
    for (int mask = 16; mask; mask /= 2)
#pragma unroll
      for (int s = 0; s < 2 * Shape::TOKENS; s++) sum[s] += __shfl_xor_sync(0xffffffffu, sum[s], mask);
#pragma unroll
    for (int s = 0; s < Shape::TOKENS; s++) {
      q_factor[s] = p_.scale * rsqrtf(sum[2 * s] + 1e-6f);
      k_factor[s] = rsqrtf(sum[2 * s + 1] + 1e-6f);
    }
  }

  __device__ __forceinline__ void rows(Stage& stage, int slot, int s, float q_factor, float k_factor) {
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
      const int k = 4 * lane_ + 128 * i;
      if (k >= Shape::KEYS) continue;
      *(float4*)&stage.k[slot][staged(k)] = {k_raw_[s].get(i, 0) * k_factor, k_raw_[s].get(i, 1) * k_factor,
                                             k_raw_[s].get(i, 2) * k_factor, k_raw_[s].get(i, 3) * k_factor};
      *(float4*)&stage.q[slot][staged(k)] = {q_raw_[s].get(i, 0) * q_factor, q_raw_[s].get(i, 1) * q_factor,
                                             q_raw_[s].get(i, 2) * q_factor, q_raw_[s].get(i, 3) * q_factor};
      if constexpr (Shape::KDA) {
        const float A_log = gates_.A_log(p_), rate = rate_of(A_log);
        float g[4];
#pragma unroll
        for (int e = 0; e < 4; e++) g[e] = decay_of(A_log, rate, a_raw_[s].get(i, e) + gates_.bias(p_, i, e), p_);
        *(float4*)&stage.g[slot][staged(k)] = {g[0], g[1], g[2], g[3]};
      }
    }
  }

  const Arguments& p_;
  const HeadGates& gates_;
  const Io *q_, *k_, *v_;
  int64 a_, b_;
  int warp_, lane_, v_row_, gate_slot_;
  bool whole_q_, whole_k_, whole_a_;
  RawKeys<Io> k_raw_[Shape::TOKENS], q_raw_[Shape::TOKENS];
  RawKeys<Gate> a_raw_[Shape::TOKENS];  // KDA only
  unsigned v_raw_[Shape::TOKENS][TILE_ROUNDS], a_bits_ = 0, b_bits_ = 0;
};
