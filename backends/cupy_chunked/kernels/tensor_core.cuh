// Tensor cores: a warp's matrices as it holds them, and the four instructions that move and multiply them.
//
// A 16 x 16 matrix of bfloat16 is four registers in each lane, an accumulator of 16 x 8 floats another four. With
// g = lane / 4 and q = lane % 4, and pairs of neighbours in one register, the lower one in its low half:
//
//   left factor       a[0] (g, 2q..)  a[1] (g + 8, 2q..)  a[2] (g, 2q + 8..)  a[3] (g + 8, 2q + 8..)
//   right factor      b[0] (2q.., g)  b[1] (2q + 8.., g)                      of 16 x 8: pairs run down a column
//   accumulator       c[0], c[1] (g, 2q..)   c[2], c[3] (g + 8, 2q..)
//
// So two accumulators side by side, rounded, are a left factor, and nothing has to move: what a chain of products
// is built on here.
#pragma once

#ifndef CUDA_ON_CPU
using Shared = unsigned;  // an address in shared memory, in bytes: one register, and what is added to it an immediate
__device__ __forceinline__ Shared shared_of(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// Four 8 x 8 matrices from shared memory; lane i gives the address of row i % 8 of matrix i / 8. Lane (g, q) gets of
// each the pair (g, 2q..), or, transposed, (2q.., g).
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row));
}
__device__ __forceinline__ void load_transposed(unsigned (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row));
}
// c += a b, products exact, sums in float32.
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The transpose of an 8 x 8 matrix of which lane (g, q) holds the pair (g, 2q..).
__device__ __forceinline__ unsigned transposed(unsigned pair) {
  unsigned r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(pair));
  return r;
}
// Two floats rounded to nearest even, the first in the low half.
__device__ __forceinline__ unsigned bfloat_pair(float first, float second) {
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
  return r;
}
// Copies started since the last call are one group; wait until all groups but the newest LEFT have arrived.
__device__ __forceinline__ void group_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wait_for_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
#endif

__device__ __forceinline__ float low_half(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

// A value in PIECES bfloat16 that add up to it: one is rounded to 8 bits, of three nothing of a float is lost.
template <int PIECES> __device__ __forceinline__ void split(unsigned (&pieces)[PIECES], float first, float second) {
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    pieces[i] = bfloat_pair(first, second);
    first -= low_half(pieces[i]), second -= high_half(pieces[i]);
  }
}

// A left factor in pieces.
template <int PIECES> struct Factor {
  unsigned piece[PIECES][4];

  __device__ __forceinline__ void set(int i, float first, float second) {
    unsigned pieces[PIECES];
    split(pieces, first, second);
#pragma unroll
    for (int p = 0; p < PIECES; p++) piece[p][i] = pieces[p];
  }
  // Two accumulators side by side: columns 0 to 7 and 8 to 15.
  __device__ __forceinline__ void set(const float (&left)[4], const float (&right)[4]) {
    set(0, left[0], left[1]), set(1, left[2], left[3]), set(2, right[0], right[1]), set(3, right[2], right[3]);
  }
};

// c += x b, both in pieces, for two accumulators side by side. Of the products of pieces those count whose places add
// up to less than DEPTH, three being all that a float can hold; the smallest come first.
template <int DEPTH, int LEFT, int RIGHT>
__device__ __forceinline__ void multiply(float (&c)[4], float (&d)[4], const Factor<LEFT>& x,
                                         const unsigned (&b)[RIGHT][4]) {
#pragma unroll
  for (int p = LEFT - 1; p >= 0; p--)
#pragma unroll
    for (int r = RIGHT - 1; r >= 0; r--)
      if (p + r < DEPTH) multiply(c, x.piece[p], b[r][0], b[r][1]), multiply(d, x.piece[p], b[r][2], b[r][3]);
}
