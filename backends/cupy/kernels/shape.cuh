// What one specialisation of the kernel is: the -D macros as one type, and what follows from them.
//
// A block works on TILE rows of V of one (sequence, value head). LANES lanes share a group of ROWS rows; each
// holds K / LANES key channels of its rows in registers. A warp has 32 / LANES groups, a block WARPS warps.
//
// Key channels are dealt to lanes in chunks of VECTOR (16 bytes of stored state): chunk m belongs to lane m % LANES.
// Sums over K are formed in one order, whatever LANES, ROWS, WARPS and TOKENS are: 32 partial sums, one for each
// pair (m % 16, k % 2), every one in ascending order of k, then halved in the order k % 2, bits 3, 2, 1, 0 of m.
// A lane holds whole partial sums and does the first halvings, shuffles do the rest; so every config gives the
// same bits, and so do both state layouts.
#pragma once

template <class T> struct StoredVector {
  static constexpr int SIZE = sizeof(T) == 2 ? 8 : 4;
};

struct Shape {
  static constexpr int K = KEY_DIM, V = VALUE_DIM, LANES = CONFIG_LANES, ROWS = CONFIG_ROWS, WARPS = CONFIG_WARPS;
  static constexpr bool VK = STATE_VK, UNIT = UNIT_STRIDES, KDA = IS_KDA, STREAM = CONFIG_STREAM;
  enum Verify { NONE = 0, CHAIN = 1, TREE = 2 };
  static constexpr int VERIFY = VERIFY_MODE;

  static constexpr int THREADS = 32 * WARPS;
  static constexpr int GROUPS = 32 / LANES;           // groups of rows per warp
  static constexpr int TILE = WARPS * GROUPS * ROWS;  // rows of V per block
  static constexpr int TILES = (V + TILE - 1) / TILE;
  static constexpr bool WHOLE_TILES = V % TILE == 0;

  static constexpr int VECTOR = StoredVector<STATE_TYPE>::SIZE;
  static constexpr int KEYS = (K + VECTOR * LANES - 1) / (VECTOR * LANES) * (VECTOR * LANES);  // K, padded
  static constexpr int CHUNKS = KEYS / (VECTOR * LANES);                                      // per lane
  static constexpr int PARTIALS = 16 / LANES;  // pairs of partial sums per lane

  static constexpr int TOKENS = CONFIG_TOKENS;  // tokens each warp stages at a time
  static constexpr int WINDOW = WARPS * TOKENS;

  static_assert(LANES == 4 || LANES == 8 || LANES == 16, "lanes per group of rows");
  static_assert((ROWS & (ROWS - 1)) == 0 && ROWS <= 8, "rows per group");
};

using Io = IO_TYPE;
using State = STATE_TYPE;
using Step = STEP_TYPE;
using Gate = GATE_TYPE;

// Where key channel k lies in a staged row. Lanes read 16 bytes at a time; with VECTOR = 8 the two halves of a chunk
// lie apart, so that neighbouring lanes read neighbouring words and no bank is asked twice.
__device__ __forceinline__ int staged(int k) {
  if constexpr (Shape::VECTOR == 4) return k;
  else return (k & 4) * (Shape::KEYS / 8) + (k >> 3) * 4 + (k & 3);
}
