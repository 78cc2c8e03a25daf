// The recurrence itself, on one thread's share of a state that stays in registers from the first token to the last.
#pragma once

class Outputs {  // of the rows whose sums this lane ends up with
 public:
  __device__ __forceinline__ Outputs(const Arguments& p, const Sequence& it, const Place& at)
      : time_(p.out.time), element_(Shape::UNIT ? 1 : p.out.element) {
    const int row = Scattered::row(at.lane);
    next_ = it.begin<Io>(p.data.out, p.out, it.hv) + (at.row + row) * element_;
#pragma unroll
    for (int i = 0; i < Scattered::COUNT; i++) mine_[i] = Scattered::writes(at.lane) && at.has(row + i);
  }

  // The next token's outputs, from every lane's part of the sums of its rows. Only sums while there is no token.
  __device__ __forceinline__ void write(float (&o)[Shape::ROWS], float scale, const Place& at, bool token = true) {
    Scattered sums;
    halve<Shape::ROWS, Shape::LANES / 2>(o, at.lane, sums);
#pragma unroll
    for (int i = 0; i < Scattered::COUNT; i++)
      if (token && mine_[i]) Format<Io>::template store<STATE>(next_ + i * element_, sums.x[i] * scale);
    if (token) next_ += time_;
  }

 private:
  Io* next_;
  int64 time_, element_;
  bool mine_[Scattered::COUNT];
};

template <bool WIDE> class Recurrence {
 public:
  Registers S;
  Outputs outputs;

  __device__ __forceinline__ Recurrence(const Arguments& p, const Sequence& it, const Place& at)
      : outputs(p, it, at), p_(p), it_(it), at_(at) {
    start_ = it.state<const State>(p.data.pool, p.pool, it.source);
    steps_ = it.state<Step>(p.data.steps, p.steps, it.buffer);
  }

  // Ask for the state; it is there after arrive().
  __device__ __forceinline__ void start(Landing<State>* landing) {
    if constexpr (LANDS) landing->start(start_, p_.pool, at_, reads());
    else load<POOL>();
  }
  __device__ __forceinline__ void arrive(const Landing<State>* landing) {
    if constexpr (LANDS) landing->take(S, p_.pool, at_);
  }

  // Step t of a tree starts from the state its parent left in the buffer: this thread stored its share there.
  __device__ __forceinline__ void enter(int64 t) {
    if constexpr (Shape::VERIFY == Shape::TREE) {
      if (it_.buffer < 0 || t == 0) return;
      const int64 parent = index_at<PARENT_INDEX, INPUT>(p_.data.parents, it_.n * p_.parent_stride + t);
      if (parent >= 0) load_state<WIDE, STATE>(S, (const Step*)steps_ + parent * p_.steps.step, p_.steps, at_, true);
      else load<STATE>();
    }
  }

  // u = gain * (v - keep * S^T k), S = decay * S + k u^T. What is done `meanwhile` fills the shuffles' latency.
  template <class Meanwhile>
  __device__ __forceinline__ void advance(const Keys& k, const float (&v)[Shape::ROWS], const Scalars& x,
                                          Meanwhile meanwhile) {
    float d[Shape::ROWS];
    dots(d, S, k);
    sum_to_all(d);
    meanwhile();
#pragma unroll
    for (int r = 0; r < Shape::ROWS; r++) {
      const float u = x.gain * fmaf(-x.keep, d[r], v[r]);
#pragma unroll
      for (int i = 0; i < Shape::CHUNKS; i++)
#pragma unroll
        for (int e = 0; e < Shape::VECTOR; e++) {
          float& s = S.x[r][i][e];
          s = fmaf(k.x[i][e], u, Shape::KDA ? s : x.decay * s);
        }
    }
  }

  __device__ __forceinline__ void scale(const Keys& g) {  // decay by key channel
#pragma unroll
    for (int r = 0; r < Shape::ROWS; r++)
#pragma unroll
      for (int i = 0; i < Shape::CHUNKS; i++)
#pragma unroll
        for (int e = 0; e < Shape::VECTOR; e++) S.x[r][i][e] *= g.x[i][e];
  }

  // Keep the state after step t for verification.
  __device__ __forceinline__ void leave(int64 t) const {
    if constexpr (Shape::VERIFY != Shape::NONE)
      if (it_.buffer >= 0) store_state<WIDE, STATE>(S, steps_ + t * p_.steps.step, p_.steps, at_);
  }

  __device__ __forceinline__ void save() const {
    if constexpr (Shape::WRITE)
      if (it_.target >= 0)
        store_state<WIDE, POOL>(S, it_.state<State>(p_.data.pool, p_.pool, it_.target), p_.pool, at_);
  }

 private:
  static constexpr Access POOL = Shape::STREAM ? STREAMED : STATE;

  static constexpr bool LANDS = WIDE && Shape::LANDING && Landing<State>::POSSIBLE;

  __device__ __forceinline__ bool reads() const { return Shape::READ && it_.source >= 0 && it_.length > 0; }
  template <Access A> __device__ __forceinline__ void load() { load_state<WIDE, A>(S, start_, p_.pool, at_, reads()); }

  const Arguments& p_;
  const Sequence& it_;
  const Place at_;
  const State* start_;
  Step* steps_;
};
