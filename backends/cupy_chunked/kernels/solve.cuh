// T = (I + A)^-1 for a unit lower triangular matrix of order 64, by blocks of 16, a warp to a row of blocks:
//
//   T_ii = (I + A_ii)^-1      T_ij = -T_ii (A_ij T_jj + ... + A_i,i-1 T_i-1,j)   for j < i
//
// Diagonal blocks are solved in float32, column by column. The rest are products on tensor cores, of DEPTH bfloat16 to a
// number: three for a result as exact as float32's, two where it is rounded to one in the end. Entries of T are
// -beta_t k_t^T (I - beta k k^T) ... k_s over the tokens between: at most 2 in size wherever the recurrence is stable, so
// nothing is lost in forming them.
#pragma once

constexpr int DEPTH = Shape::PIECES == 1 ? 2 : 3;
constexpr int DIAGONAL_PITCH = 20;  // floats: rows stay aligned to 16 bytes, and eight of them share no bank

struct Solve {  // in shared memory
  float diagonal[BLOCKS][16 * DIAGONAL_PITCH];
  // Blocks of rows 0 to 2 as right factors: (i, j) is number i (i + 1) / 2 + j. Of two heads in turn: a warp may begin
  // with the next one while another still reads.
  unsigned block[2][BLOCKS * (BLOCKS - 1) / 2][DEPTH][4][32];
};

using Part = Factor<DEPTH>;
using Block = float[2][4];  // two accumulators side by side

// (I + A)^-1 in place of a block A, strictly lower. One warp: a lane's column.
__device__ __forceinline__ void invert_diagonal(float* block, int lane) {
  float x[16];
  const int column = lane & 15;
#pragma unroll
  for (int i = 0; i < 16; i++) {
    float sum = i == column ? 1.0f : 0.0f;
#pragma unroll
    for (int m = 0; m < i; m += 4) {
      const float4 a = *(const float4*)(block + i * DIAGONAL_PITCH + m);
      sum = fmaf(-a.x, x[m], sum);
      if (m + 1 < i) sum = fmaf(-a.y, x[m + 1], sum);
      if (m + 2 < i) sum = fmaf(-a.z, x[m + 2], sum);
      if (m + 3 < i) sum = fmaf(-a.w, x[m + 3], sum);
    }
    x[i] = sum;
  }
  __syncwarp();
  if (lane < 16) {
#pragma unroll
    for (int i = 0; i < 16; i++) block[i * DIAGONAL_PITCH + column] = x[i];
  }
  __syncwarp();
}

// A block's pairs of neighbours in a row, in pieces, as core matrices: register i of `x` is core matrix (i % 2, i / 2).
template <int PIECES>
__device__ __forceinline__ void keep(unsigned (&to)[4][32], int stride, const Factor<PIECES>& x, int lane) {
#pragma unroll
  for (int p = 0; p < PIECES; p++)
#pragma unroll
    for (int i = 0; i < 4; i++) (&to[0][0])[p * stride + (i % 2 * 2 + i / 2) * 32 + lane] = x.piece[p][i];
}

// Row `warp` of T. On entry `couplings[j]` is A_ij, j < i, as a left factor, and the diagonal block is A's, in place. All
// warps of the block come here. `use(j, T_ij)` is called for every block of the row.
template <class Use>
__device__ __forceinline__ void solve_row(Solve& solve, int turn, const Part (&couplings)[BLOCKS - 1], int warp, int lane,
                                          const Use& use) {
  const int g = lane / 4, q = lane % 4;
  float* const diagonal = solve.diagonal[warp];
  invert_diagonal(diagonal, lane);
  Block own;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 x = *(const float2*)(diagonal + (g + i / 2 * 8) * DIAGONAL_PITCH + i % 2 * 8 + 2 * q);
    own[i % 2][i / 2 * 2] = x.x, own[i % 2][i / 2 * 2 + 1] = x.y;
  }
  Part left;
  left.set(own[0], own[1]);
  if (warp < BLOCKS - 1) keep(solve.block[turn][warp * (warp + 3) / 2][0], 128, left, lane);
  use(warp, own);

  Block sums[BLOCKS - 1] = {};
#pragma unroll
  for (int m = 0; m < BLOCKS - 1; m++) {
    __syncthreads();  // row m is there
    if (warp <= m) continue;
#pragma unroll
    for (int j = 0; j <= m; j++) {
      unsigned right[DEPTH][4];
      // Core matrices (0, 0), (1, 0), (0, 1), (1, 1), a lane's row of one: 16 bytes.
      const int at = (lane & 8) * 32 + (lane & 16) * 8 + (lane & 7) * 16;
      const Shared block = shared_of((const char*)solve.block[turn][m * (m + 1) / 2 + j] + at);
#pragma unroll
      for (int p = 0; p < DEPTH; p++) load_transposed(right[p], block + p * 512);
      multiply<DEPTH>(sums[j][0], sums[j][1], couplings[m], right);
    }
    if (warp != m + 1) continue;
#pragma unroll
    for (int j = 0; j <= m; j++) {
      Part sum;
      sum.set(sums[j][0], sums[j][1]);
      unsigned right[DEPTH][4];
#pragma unroll
      for (int p = 0; p < DEPTH; p++)
#pragma unroll
        for (int i = 0; i < 4; i++) right[p][i] = transposed(sum.piece[p][i]);
      Block result = {};
      multiply<DEPTH>(result[0], result[1], left, right);
#pragma unroll
      for (int i = 0; i < 8; i++) result[i / 4][i % 4] = -result[i / 4][i % 4];
      if (m < BLOCKS - 2) {
        sum.set(result[0], result[1]);
        keep(solve.block[turn][(m + 1) * (m + 2) / 2 + j][0], 128, sum, lane);
      }
      use(j, result);
    }
  }
}
