// What one specialisation of the kernel is: the -D macros as one type, and what follows from them.
//
// A block works on TILE rows of V of one (sequence, value head). LANES lanes share a group of ROWS rows; each
// holds K / LANES key channels of its rows in registers. A warp has 32 / LANES groups, a block WARPS such warps.
// Tokens come to them in one of two ways. Staged: warps lay windows of tokens out in shared memory, either HELPERS
// warps that do nothing else or, without any, the WARPS themselves in turn with the recurrence. Direct: every group
// reads q and k straight into its lanes, perhaps a token ahead, and nobody waits for anybody.
//
// Key channels are dealt to lanes in chunks of VECTOR (16 bytes of stored state): chunk m belongs to lane m % LANES.
// Sums over K are formed in one order, whatever the config is: 32 partial sums, one for each pair (m % 16, k % 2),
// every one in ascending order of k, then halved in the order k % 2, bits 3, 2, 1, 0 of m. A lane holds whole partial
// sums and does the first halvings, shuffles do the rest; so every config gives the same bits, and so do both state
// layouts. The norms of q and k have an order of their own (norms.cuh), for the same reason.
#pragma once

template <class T> struct StoredVector {
  static constexpr int SIZE = sizeof(T) == 2 ? 8 : 4;
};

struct Shape {
  static constexpr int K = KEY_DIM, V = VALUE_DIM, SHARING = HEAD_GROUP;  // value heads per query/key head
  static constexpr int LANES = CONFIG_LANES, ROWS = CONFIG_ROWS, WARPS = CONFIG_WARPS, HELPERS = CONFIG_HELPERS;
  static constexpr bool STAGED = CONFIG_STAGED, STREAM = CONFIG_STREAM;
  static constexpr bool LANDING = CONFIG_LANDING;                  // states arrive by way of shared memory
  static constexpr int TOKENS = STAGED ? CONFIG_TOKENS : 1;        // each staging warp has at a time
  static constexpr bool AHEAD = !STAGED && CONFIG_TOKENS;          // direct: read one token ahead
  static constexpr int RESIDENT = CONFIG_RESIDENT;  // blocks an SM must have registers for
  static constexpr bool VK = STATE_VK, UNIT = UNIT_STRIDES, KDA = IS_KDA, NORM = L2_NORM, BOUNDED = HAS_LOWER_BOUND;
  static constexpr bool VARLEN = IS_VARLEN, READ = READS_STATE, WRITE = WRITES_STATE, IN_PLACE = IS_IN_PLACE;
  enum Verify { NONE = 0, CHAIN = 1, TREE = 2 };
  static constexpr int VERIFY = VERIFY_MODE;

  static constexpr int THREADS = 32 * (WARPS + HELPERS);
  static constexpr int GROUPS = 32 / LANES;           // groups of rows per warp
  static constexpr int TILE = WARPS * GROUPS * ROWS;  // rows of V per block
  static constexpr int TILES = (V + TILE - 1) / TILE;
  static constexpr bool WHOLE_TILES = V % TILE == 0;

  static constexpr int VECTOR = StoredVector<STATE_TYPE>::SIZE;
  static constexpr int KEYS = (K + VECTOR * LANES - 1) / (VECTOR * LANES) * (VECTOR * LANES);  // K, padded
  static constexpr int CHUNKS = KEYS / (VECTOR * LANES);                                      // per lane

  static constexpr int STAGERS = HELPERS ? HELPERS : WARPS;       // warps that stage
  static constexpr int WINDOW = STAGERS * TOKENS;                 // tokens staged at a time
  static constexpr bool LATE = STAGED && VERIFY != TREE;          // outputs are summed with the next token's k

  static_assert(LANES == 4 || LANES == 8 || LANES == 16, "lanes per group of rows");
  static_assert((ROWS & (ROWS - 1)) == 0 && ROWS <= 8, "rows per group");
  static_assert(STAGED ? TOKENS >= 1 && TOKENS <= 32 : CONFIG_TOKENS <= 1 && !HELPERS && !KDA, "how tokens come");
};

using Io = IO_TYPE;
using State = STATE_TYPE;
using Step = STEP_TYPE;

// Key channel of a lane's element e of chunk i.
__device__ __forceinline__ constexpr int key_of(int lane, int i, int e) {
  return Shape::VECTOR * (lane + Shape::LANES * i) + e;
}
