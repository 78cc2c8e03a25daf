// What a block works on, and what its head's gates have in common.
#pragma once

// Everything that depends on the block alone is asked for at once, before the first answer is looked at.
struct Sequence {
  int64 n, batch, first, length;  // number; batch row and token the sequence begins at; tokens
  int64 source, target, buffer;   // slot read, slot written, row of the intermediate states; negative for none
  int head, hv, tile;             // query/key head, value head, tile of V

  __device__ __forceinline__ Sequence(const Arguments& p, int64 n)
      : n(n), batch(n), first(0), length(p.length), source(-1), target(-1), buffer(-1) {
    hv = blockIdx.x / Shape::TILES, tile = blockIdx.x % Shape::TILES, head = hv / Shape::SHARING;
    if constexpr (Shape::READ) source = index_at<SLOT_INDEX>(p.data.read, n);
    if constexpr (Shape::VARLEN) {
      batch = 0;
      first = index_at<CU_INDEX>(p.data.cu_seqlens, n);
      length = index_at<CU_INDEX>(p.data.cu_seqlens, n + 1) - first;
    }
    if constexpr (Shape::WRITE) target = Shape::IN_PLACE ? source : index_at<SLOT_INDEX>(p.data.write, n);
    if constexpr (Shape::VERIFY != Shape::NONE) buffer = index_at<ROW_INDEX>(p.data.rows, n);
  }

  // Where one of the tensors has the first token of a head.
  template <class T> __device__ __forceinline__ T* begin(const void* data, const Tokens& x, int h) const {
    return (T*)data + batch * x.batch + first * x.time + h * x.head;
  }
  template <class T> __device__ __forceinline__ T* state(void* data, const States& s, int64 slot) const {
    return (T*)data + slot * s.slot + hv * s.head;
  }
};

// Four consecutive key channels per lane and 128 per round: how one warp holds a whole row of K.
constexpr int ROUNDS = (Shape::KEYS + 127) / 128;

// A_log, and dt_bias: one for the head, or one for each of a lane's key channels where decay is by channel.
class HeadGates {
 public:
  __device__ __forceinline__ HeadGates(const Arguments& p, int hv, int lane) {
    A_log_.template load<false, AT_ONCE>((const A_LOG_TYPE*)p.data.A_log + hv * p.A_log.head, 1, 1);
    const BIAS_TYPE* const bias = (const BIAS_TYPE*)p.data.dt_bias + hv * p.dt_bias.head;
#pragma unroll
    for (int s = 0; s < COUNT; s++) {
      const int k = Shape::KDA ? 4 * lane + 128 * s : 0;
      const int64 element = Shape::KDA && Shape::UNIT ? 1 : p.dt_bias.element;
      bias_[s].template load<false, AT_ONCE>(bias + k * element, element, Shape::KDA ? Shape::K - k : 1);
    }
  }
  __device__ __forceinline__ float A_log() const { return A_log_.get(0); }
  __device__ __forceinline__ float bias(int s = 0, int e = 0) const { return bias_[s].get(e); }

 private:
  static constexpr int COUNT = Shape::KDA ? ROUNDS : 1;
  Raw<A_LOG_TYPE, 1> A_log_;
  Raw<BIAS_TYPE, Shape::KDA ? 4 : 1> bias_[COUNT];
};
