// Tensor cores: products of bfloat16 matrices, summed as a Hopper GPU sums them; a warp's own at once, those of four
// warps (wgmma) from a queue.
//
// Lanes meet for every operation, and the first one that goes on does the work of all: the others still stand where
// they called, so their accumulators can be reached.
#include <deque>  // the system's headers first: they know attributes by names that are CUDA's here
#include <vector>

#include "cuda_on_cpu.h"
#include "scheduler.h"

namespace cuda_on_cpu {
namespace {

constexpr unsigned WARP = 32, WARPS = 32, GROUP = 4, ROWS = 16, COLUMNS = 8, INNER = 16, CORE = 128, UNIT = 16;

// Eight columns at a time.
using Doubles = double __attribute__((vector_size(64)));
using Longs = int64_t __attribute__((vector_size(64)));
using Floats = float __attribute__((vector_size(32)));
using Ints = int32_t __attribute__((vector_size(32)));

constexpr int64_t BIAS = 1023, FRACTION = 52, MAGNITUDE = INT64_MAX;
constexpr int64_t KEPT = 25;         // bits below the largest term's leading one: a float's 23, and two more
constexpr int64_t SMALLEST = -400;   // below the exponent of every product of two bfloat16
constexpr int64_t INFINITE = 2 * BIAS + 1;

// sum <- sum + a b, as the chip does it. Products are exact; all terms are aligned to the largest exponent among them and
// cut off there (towards zero) KEPT bits further down; the sum of what is left is exact, and cut off to a float.
inline void add_products(Floats& sum, const double (&a)[INNER], const Doubles (&b)[INNER]) {
  Doubles terms[INNER + 1], plain = __builtin_convertvector(sum, Doubles);
  terms[INNER] = plain;
  Longs largest = (Longs)plain & MAGNITUDE;
#pragma GCC unroll 16
  for (unsigned k = 0; k < INNER; k++) {
    terms[k] = a[k] * b[k];  // exact in a double, and never beyond its range
    plain += terms[k];
    const Longs size = (Longs)terms[k] & MAGNITUDE;
    largest = size > largest ? size : largest;
  }
  const Longs found = largest >> FRACTION, smallest = Longs{} + (BIAS + SMALLEST);
  const Longs exponent = found > smallest ? found : smallest;
  const Doubles scale = (Doubles)((2 * BIAS + KEPT - exponent) << FRACTION);
  Ints total = {};  // 17 terms of 26 bits
#pragma GCC unroll 17
  for (const Doubles& term : terms) total += __builtin_convertvector(term * scale, Ints);
  const Doubles exact = __builtin_convertvector(total, Doubles) * (Doubles)((exponent - KEPT) << FRACTION);
  const Doubles normal = (Doubles)((Longs)exact & ~((1ll << (FRACTION - 23)) - 1));
  const Doubles subnormal = __builtin_convertvector(__builtin_convertvector(exact * 0x1p149, Ints), Doubles) * 0x1p-149;
  const Longs tiny = ((Longs)exact & MAGNITUDE) < ((BIAS - 126) << FRACTION);
  const Doubles cut = tiny ? subnormal : normal;
  sum = __builtin_convertvector(found == INFINITE ? plain : cut, Floats);  // an infinity or NaN among the terms wins
  sum = sum == sum ? sum : (Floats)(Ints{} + 0x7fffffff);  // NaN is always this one
}

using Accumulators = float[ROWS][COLUMNS];
struct Left { double row[ROWS][INNER]; };
struct Right { Doubles row[INNER]; };

// Where in the 16 x 8 matrix a lane's four accumulators are.
unsigned row_of(unsigned lane, unsigned e) { return lane / 4 + e / 2 * 8; }
unsigned column_of(unsigned lane, unsigned e) { return 2 * (lane % 4) + e % 2; }

void set_left(Left& left, unsigned lane, const unsigned* a) {
  for (unsigned i = 0; i < 4; i++)
    for (unsigned half = 0; half < 2; half++)
      left.row[lane / 4 + i % 2 * 8][2 * (lane % 4) + i / 2 * 8 + half] = bfloat_to_float(a[i] >> 16 * half & 0xffffu);
}

void multiply_tile(Accumulators& c, const Left& a, const Right& b) {
  for (unsigned row = 0; row < ROWS; row++) {
    Floats sum;
    memcpy(&sum, c[row], sizeof sum);
    add_products(sum, a.row[row], b.row);
    memcpy(c[row], &sum, sizeof sum);
  }
}

enum class Kind { NONE, MULTIPLY, GROUP_MULTIPLY, GROUP_WAIT };

struct Lane {
  Kind kind;            // of its latest operation ...
  unsigned operations;  // ... which is its how manyeth
  const void* asked;
  unsigned commits;
  bool begun;           // group_begin, since the last wait
};

// An accumulator that products are queued for: the kernel sees a NaN that says which of these it is. A signalling one:
// it may be moved, but arithmetic makes it a quiet one, which shows.
struct Pending {
  float* at;
  float value;
  unsigned products;
};
constexpr unsigned MARK = 0x7fa00000u, MARKED = ~0x1fffffu;  // as many numbers as a warp's stacks have floats

struct Queued {
  GroupProduct product;
  unsigned commits;  // made before it
  Left left;
  std::vector<unsigned> pending;  // of lane after lane
};

struct Warp {
  unsigned acted;  // operations that a lane has done for all
  uint64_t joined, sequence;  // how many group products and waits, and a hash of which
  std::deque<Queued> queue;
  std::vector<Pending> pending;
  std::vector<unsigned> unused;
};

Lane lanes[WARPS * WARP];
Warp warps[WARPS];

// Meets the lanes of the warp. Returns all of them to the one that acts for them, null to the others.
const Lane* together(Kind kind, const void* asked) {
  const unsigned me = (unsigned)standing().thread, first = me / WARP * WARP;
  const unsigned number = ++lanes[me].operations;
  lanes[me].kind = kind, lanes[me].asked = asked;
  meet_lanes(~0u, false);
  Warp& warp = warps[me / WARP];
  if (warp.acted >= number) return nullptr;
  for (unsigned i = first; i < first + WARP; i++)
    if (lanes[i].operations != number || lanes[i].kind != kind) {
      describe("threads %u and %u are not at the same operation of the tensor cores", me, i);
      stop(DIVERGED);
    }
  warp.acted = number;
  return lanes + first;
}

Warp& warp_of(const Lane* first) { return warps[(first - lanes) / WARP]; }
unsigned thread_of(const Lane& lane) { return (unsigned)(&lane - lanes); }
const GroupProduct& asked_by(const Lane& lane) { return *(const GroupProduct*)lane.asked; }

void note(Warp& warp, std::initializer_list<uint64_t> what) {
  warp.joined++;
  for (uint64_t word : what) warp.sequence = (warp.sequence ^ word) * 0x100000001b3u;
}

bool same(const GroupProduct& x, const GroupProduct& y) {
  return x.columns == y.columns && x.transposed == y.transposed && x.add == y.add && x.at == y.at &&
         x.k_step == y.k_step && x.n_step == y.n_step;
}

void check(const Lane* group, const GroupProduct& product) {
  for (const Lane* lane = group; lane < group + WARP; lane++) {
    if (!lane->begun) {
      describe("thread %u: group_multiply without group_begin since the start or the last group_wait", thread_of(*lane));
      stop(MISUSED);
    }
    if (!same(asked_by(*lane), product) || lane->commits != group->commits) {
      describe("threads %u and %u ask for different group products", thread_of(*group), thread_of(*lane));
      stop(DIVERGED);
    }
  }
  constexpr int LIMIT = 1 << 18;  // of a descriptor's strides
  if ((uintptr_t)product.at % 16 || product.k_step % 16 || product.n_step % 16 || product.k_step < 0 ||
      product.n_step < 0 || product.k_step >= LIMIT || product.n_step >= LIMIT) {
    describe("thread %u: a group product's matrix must lie in steps of 16 bytes below %d: address %p, steps %d and %d",
             thread_of(*group), LIMIT, (const void*)product.at, product.k_step, product.n_step);
    stop(MISUSED);
  }
  if (!product.k_step && !product.n_step && (uintptr_t)product.at % (8 * CORE) >= CORE) {
    describe("thread %u: a swizzled matrix must begin in a row that is a multiple of eight (1024 bytes): address %p",
             thread_of(*group), (const void*)product.at);
    stop(MISUSED);
  }
}

// Where 16 bytes of B are: of row (`transposed`) or column `line`, from `along` on. Of rows of 128 bytes the hardware
// swizzles: a row's number, of eight, and the number of 16 bytes in it meet in an exclusive or.
const char* unit_of(const GroupProduct& product, unsigned line, unsigned along) {
  if (product.k_step || product.n_step) {
    const unsigned k = product.transposed ? line : along, n = product.transposed ? along : line;
    return product.at + n / 8 * (int64_t)product.n_step + k / 8 * (int64_t)product.k_step + line % 8 * UNIT;
  }
  const uintptr_t plain = (uintptr_t)product.at + line * CORE + along * 2;
  return (const char*)(plain ^ (plain / CORE % 8 * UNIT));
}

// Lets `visit` see every core matrix of B, 8 x 8, and its first row.
template <class F> void visit_cores(const GroupProduct& product, unsigned column, F visit) {
  for (unsigned k = 0; k < INNER; k += 8) {
    unsigned short core[8][8];
    for (unsigned i = 0; i < 8; i++) {
      const char* const unit =
          product.transposed ? unit_of(product, k + i, column) : unit_of(product, column + i, k);
      if (!shared_memory(0).holds(unit, UNIT) && !shared_memory(1).holds(unit, UNIT)) {
        describe("a group product reads rows %u.. and columns %u.. of its matrix outside shared memory", k, column);
        stop(MISUSED);
      }
      if (watching()) watch_group_read(unit, UNIT);
      memcpy(core[i], unit, UNIT);
    }
    visit(core, k);
  }
}

// Its number among the warp's.
unsigned make_pending(Warp& warp, float* at) {
  const unsigned bits = bits_as<unsigned>(*at), number = bits & ~MARKED;
  if ((bits & MARKED) == MARK && number < warp.pending.size() && warp.pending[number].at == at) {
    warp.pending[number].products++;
    return number;
  }
  if (warp.unused.empty()) {
    warp.unused.push_back((unsigned)warp.pending.size());
    warp.pending.emplace_back();
  }
  const unsigned made = warp.unused.back();
  warp.unused.pop_back();
  warp.pending[made] = {at, *at, 1};
  *at = bits_as<float>(MARK | made);
  return made;
}

void settle(Warp& warp, unsigned number) {
  Pending& x = warp.pending[number];
  if (--x.products) return;
  if (bits_as<unsigned>(*x.at) != (MARK | number)) {
    describe("warp %u: an accumulator was written, or is gone, while a group product was queued for it",
             (unsigned)(&warp - warps));
    stop(MISUSED);
  }
  *x.at = x.value;
  x.at = nullptr;
  warp.unused.push_back(number);
}

void finish(Warp& warp, const Queued& queued) {
  const GroupProduct& product = queued.product;
  const unsigned each = product.columns / 2;  // accumulators of a lane
  for (unsigned column = 0; column < product.columns; column += COLUMNS) {
    Right right;
    visit_cores(product, column, [&](const unsigned short (&x)[8][8], unsigned k) {
      for (unsigned i = 0; i < 8; i++)
        for (unsigned j = 0; j < 8; j++) right.row[k + i][j] = bfloat_to_float(product.transposed ? x[i][j] : x[j][i]);
    });
    Accumulators c = {};
    const auto each_of_tile = [&](auto act) {
      for (unsigned lane = 0; lane < WARP; lane++)
        for (unsigned e = 0; e < 4; e++)
          act(warp.pending[queued.pending[lane * each + column / 2 + e]].value, c[row_of(lane, e)][column_of(lane, e)]);
    };
    if (product.add) each_of_tile([](const float& value, float& x) { x = value; });
    multiply_tile(c, queued.left, right);
    each_of_tile([](float& value, const float& x) { value = x; });
  }
  for (unsigned number : queued.pending) settle(warp, number);
}

}  // namespace

void multiply_warp(const Product& mine) {
  const Lane* const all = together(Kind::MULTIPLY, &mine);
  if (!all) return;
  Left left;
  Right right;
  Accumulators c;
  for (unsigned lane = 0; lane < WARP; lane++) {
    const Product& part = *(const Product*)all[lane].asked;
    set_left(left, lane, part.a);
    for (unsigned i = 0; i < 4; i++)
      right.row[2 * (lane % 4) + i / 2 * 8 + i % 2][lane / 4] = bfloat_to_float(part.b[i / 2] >> i % 2 * 16 & 0xffffu);
    for (unsigned e = 0; e < 4; e++) c[row_of(lane, e)][column_of(lane, e)] = part.c[e];
  }
  multiply_tile(c, left, right);
  for (unsigned lane = 0; lane < WARP; lane++)
    for (unsigned e = 0; e < 4; e++) ((const Product*)all[lane].asked)->c[e] = c[row_of(lane, e)][column_of(lane, e)];
}

void group_begin() { lanes[standing().thread].begun = true; }

void group_commit() { lanes[standing().thread].commits++; }

void group_multiply(const GroupProduct& mine) {
  const Lane* const all = together(Kind::GROUP_MULTIPLY, &mine);
  if (!all) return;
  Warp& warp = warp_of(all);
  check(all, mine);
  note(warp, {mine.columns, mine.transposed, mine.add, (uintptr_t)mine.at, (uint64_t)mine.k_step, (uint64_t)mine.n_step,
              all->commits});
  for (unsigned column = 0; column < mine.columns; column += COLUMNS)
    visit_cores(mine, column, [](const unsigned short (&)[8][8], unsigned) {});  // it may be read from now on
  Queued& queued = warp.queue.emplace_back();
  queued.product = mine, queued.commits = all->commits;
  for (unsigned lane = 0; lane < WARP; lane++) {
    const GroupProduct& part = asked_by(all[lane]);
    set_left(queued.left, lane, part.a);
    for (unsigned e = 0; e < mine.columns / 2; e++) queued.pending.push_back(make_pending(warp, part.c + e));
  }
}

void group_wait(unsigned left) {
  const Lane* const all = together(Kind::GROUP_WAIT, &left);
  lanes[standing().thread].begun = false;
  if (!all) return;
  for (unsigned i = 0; i < WARP; i++)
    if (*(const unsigned*)all[i].asked != left || all[i].commits != all->commits) {
      describe("threads %u and %u wait for different groups", thread_of(*all), thread_of(all[i]));
      stop(DIVERGED);
    }
  Warp& warp = warp_of(all);
  note(warp, {left, all->commits});
  while (!warp.queue.empty() && warp.queue.front().commits + left < all->commits) {
    finish(warp, warp.queue.front());
    warp.queue.pop_front();
  }
}

void publish_shared() {
  if (watching()) watch_publish();
}

void tensor_block_start(unsigned threads) {
  std::fill(lanes, lanes + threads, Lane{});
  for (Warp& warp : warps) {
    warp.acted = 0, warp.joined = warp.sequence = 0;
    warp.queue.clear(), warp.pending.clear(), warp.unused.clear();
  }
}

void tensor_thread_end() {
  const unsigned me = (unsigned)standing().thread;
  const std::deque<Queued>& queue = warps[me / WARP].queue;
  if (queue.empty()) return;
  const bool committed = queue.back().commits < lanes[me].commits;
  describe("thread %u returns with %zu group products queued, %s", me, queue.size(),
           committed ? "which it has not waited for" : "the last of which it has not committed");
  stop(MISUSED);
}

void tensor_block_end() {
  for (unsigned w = 0; w < WARPS; w++) {
    const Warp &warp = warps[w], &first = warps[w / GROUP * GROUP];
    if (warp.joined == first.joined && warp.sequence == first.sequence) continue;
    describe("four warps multiply together: warp %u took part in %llu group products and waits, warp %u in %llu%s",
             w / GROUP * GROUP, (unsigned long long)first.joined, w, (unsigned long long)warp.joined,
             warp.joined == first.joined ? " others" : "");
    stop(DIVERGED);
  }
}

}  // namespace cuda_on_cpu
