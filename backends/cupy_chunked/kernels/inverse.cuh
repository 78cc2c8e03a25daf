// The inverse of a unit lower triangular matrix of order 64, in float32: (I + A)^-1 by halves.
//
// [[X, 0], [M, Y]] has the inverse [[X', 0], [-Y' M X', Y']]. Blocks of order 16 are solved column by column, then
// merged to 32 and to 64. Entries of the inverse are -beta_t k_t^T (I - beta k k^T) ... k_s over the tokens between:
// at most 2 in size wherever the recurrence is stable, so nothing is lost in forming them.
#pragma once

constexpr int INVERSE_PITCH = CHUNK + 4;  // floats: rows stay aligned to 16 bytes, and eight of them share no bank
constexpr int PRODUCT_PITCH = 36;

// A lane's column of the inverse of I + A for a diagonal block of order 16, written in A's place. One warp.
__device__ __forceinline__ void invert_diagonal(float* block, int lane) {
  float x[16];
  const int column = lane & 15;
#pragma unroll
  for (int i = 0; i < 16; i++) {
    float sum = i == column ? 1.0f : 0.0f;
#pragma unroll
    for (int m = 0; m < i; m++) sum = fmaf(-block[i * INVERSE_PITCH + m], x[m], sum);
    x[i] = sum;
  }
  __syncwarp();
  if (lane < 16) {
#pragma unroll
    for (int i = 0; i < 16; i++) block[i * INVERSE_PITCH + column] = x[i];
  }
}

// to = sign a b for square matrices of order N, by 4 N threads: thread i has N / 4 values of row i / 4.
template <int N, int TO, int A, int B>
__device__ __forceinline__ void product(float* to, const float* a, const float* b, int i, float sign) {
  constexpr int WIDTH = N / 4;
  const int row = i / 4, column = i % 4 * WIDTH;
  float sum[WIDTH] = {};
#pragma unroll 8
  for (int m = 0; m < N; m++) {
    const float left = a[row * A + m];
#pragma unroll
    for (int j = 0; j < WIDTH; j += 4) {
      const float4 right = *(const float4*)(b + m * B + column + j);
      sum[j] = fmaf(left, right.x, sum[j]), sum[j + 1] = fmaf(left, right.y, sum[j + 1]);
      sum[j + 2] = fmaf(left, right.z, sum[j + 2]), sum[j + 3] = fmaf(left, right.w, sum[j + 3]);
    }
  }
#pragma unroll
  for (int j = 0; j < WIDTH; j++) to[row * TO + column + j] = sign * sum[j];
}

// In place of A, whose upper triangle is taken for zero; `between` has room for 32 rows. 128 threads, all of them.
__device__ __forceinline__ void invert(float* matrix, float* between) {
  constexpr int P = INVERSE_PITCH, Q = PRODUCT_PITCH;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  invert_diagonal(matrix + warp * 16 * (P + 1), lane);
  __syncthreads();
  float* const half = matrix + warp / 2 * 32 * (P + 1);  // two warps for each half
  float* const mine = between + warp / 2 * 16 * Q;
  product<16, Q, P, P>(mine, half + 16 * P, half, threadIdx.x % 64, 1.0f);
  __syncthreads();
  product<16, P, P, Q>(half + 16 * P, half + 16 * (P + 1), mine, threadIdx.x % 64, -1.0f);
  __syncthreads();
  // Products run over all of a triangular factor: what is above its diagonal must be zero.
  product<32, Q, P, P>(between, matrix + 32 * P, matrix, threadIdx.x, 1.0f);
  __syncthreads();
  product<32, P, P, Q>(matrix + 32 * P, matrix + 32 * (P + 1), between, threadIdx.x, -1.0f);
  __syncthreads();
}
