// The inverse norms of q and k. The order of the sum of squares: 64 partial sums, one for each pair (j % 32, k % 2) of
// quads j = k / 4 of key channels, in ascending order of k; halved in the order k % 2 (and, where a lane's chunk is
// two quads, bit 0 of j), then bits 4 to 0 of j. It is the same whether a warp or a group of lanes forms it.
#pragma once

// One over the norm, given its square.
__device__ __forceinline__ float inverse_norm(float square) { return rsqrtf(square + 1e-6f); }

// Of a row whose quads j lie with lane j % 32, four channels each: the lane's part, then all lanes together.
template <int QUADS> __device__ __forceinline__ float quad_squares(const float (&x)[QUADS][4]) {
  float sum[2] = {};
#pragma unroll
  for (int i = 0; i < QUADS; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) sum[e & 1] = fmaf(x[i][e], x[i][e], sum[e & 1]);
  return sum[0] + sum[1];
}
template <int N> __device__ __forceinline__ void sum_over_warp(float (&x)[N]) {
#pragma unroll
  for (int step = 0; step < 5; step++) {
    const int mask = Shape::VECTOR == 8 ? (step == 0 ? 1 : 32 >> step) : 16 >> step;
#pragma unroll
    for (int i = 0; i < N; i++) x[i] += __shfl_xor_sync(0xffffffffu, x[i], mask);
  }
}

// Of a row that lies with a group of lanes as the state does.
__device__ __forceinline__ float chunk_squares(const float (&x)[Shape::CHUNKS][Shape::VECTOR]) {
  constexpr int SLOTS = 32 / Shape::LANES, ROUND = 4 * SLOTS / Shape::VECTOR;  // quads kept apart; chunks with them
  float sum[SLOTS][2] = {}, half[SLOTS];
#pragma unroll
  for (int i = 0; i < Shape::CHUNKS; i++)
#pragma unroll
    for (int e = 0; e < Shape::VECTOR; e++) {
      float& part = sum[e / 4 * ROUND + i % ROUND][e & 1];
      part = fmaf(x[i][e], x[i][e], part);
    }
#pragma unroll
  for (int s = 0; s < SLOTS; s++) half[s] = sum[s][0] + sum[s][1];
#pragma unroll
  for (int width = SLOTS / 2; width; width /= 2)
#pragma unroll
    for (int s = 0; s < width; s++) half[s] += half[s + width];
  return half[0];
}
