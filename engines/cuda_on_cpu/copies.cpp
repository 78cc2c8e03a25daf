// Asynchronous copies to shared memory (cp.async) of 4, 8 or 16 bytes: here they land when the thread that started them
// waits for them, and not before.
//
// On a GPU a copy may land at any time in between. This is the latest, and until then its place holds NaN: what is used
// without the wait goes wrong in every schedule. The source, too, may be read at any time in between. Here it is at the
// start: no kernel has a reason to write it before the wait, so that when makes no difference, and if one does, the
// landing sees other bytes there and objects. It objects as well if its place has been written meanwhile, by a thread
// or by another copy.
#include <vector>  // the system's headers first: they know attributes by names that are CUDA's here

#include "cuda_on_cpu.h"
#include "scheduler.h"

namespace cuda_on_cpu {
namespace {

constexpr unsigned MOST_THREADS = 1024, MOST_BYTES = 16;

struct Copy {
  char* to;
  const char* from;  // null: zeros
  unsigned bytes;
  unsigned group;  // how many its thread had closed before it
  char source[MOST_BYTES];
};

// A thread's copies, oldest first: a ring that keeps its room from block to block.
struct Flight {
  std::vector<Copy> ring;  // as many as a power of two, or none
  uint64_t started = 0, landed = 0;
  unsigned groups = 0;  // closed

  Copy& at(uint64_t number) { return ring[number & (ring.size() - 1)]; }
  Copy& start() {
    if (started - landed == ring.size()) {
      std::vector<Copy> larger(ring.empty() ? 64 : 2 * ring.size());
      for (uint64_t i = landed; i < started; i++) larger[i & (larger.size() - 1)] = at(i);
      ring.swap(larger);
    }
    return at(started++);
  }
};

Flight flights[MOST_THREADS];
Range shared[2];  // of the block
bool watched;

Flight& mine() { return flights[running_thread()]; }

// What bytes are while a copy to them is in flight: as all of shared memory before a block, and of any width a NaN.
constexpr int FILL = 0xff;
constexpr uint32_t FILLED[MOST_BYTES / 4] = {~0u, ~0u, ~0u, ~0u};

bool in_shared(const void* p, size_t bytes) { return shared[0].holds(p, bytes) || shared[1].holds(p, bytes); }

// While somebody watches, it is the watch that objects.
[[noreturn]] void object() { stop(watched ? FORBIDDEN : MISUSED); }

void check(const Copy& copy) {
  if (((uintptr_t)copy.to | (uintptr_t)copy.from) & (copy.bytes - 1)) {
    describe("a copy of %u bytes by thread %u, from %p to %p: not aligned to as many", copy.bytes, running_thread(),
             (const void*)copy.from, (const void*)copy.to);
    stop(UNDEFINED);
  }
  if (in_shared(copy.to, copy.bytes) && !in_shared(copy.from, copy.bytes)) return;
  describe("an asynchronous copy by thread %u that is not from global to shared memory", running_thread());
  object();
}

bool same(const char* p, const void* q, unsigned bytes) {
  return bytes == 16 ? !memcmp(p, q, 16) : bytes == 8 ? !memcmp(p, q, 8) : !memcmp(p, q, 4);
}

void land(const Copy& copy) {
  if (watched) watch_landing(copy.to, copy.from, copy.bytes);
  const bool kept = same(copy.to, FILLED, copy.bytes);
  if (!kept || (copy.from && !same(copy.from, copy.source, copy.bytes))) {
    describe("the %s of a copy by thread %u was written before the copy had landed", kept ? "source" : "place",
             running_thread());
    object();
  }
  memcpy(copy.to, copy.source, copy.bytes);
}

}  // namespace

void start_copy(void* to, const void* from, unsigned bytes) {
  Flight& flight = mine();
  Copy& copy = flight.start();
  copy.to = (char*)to, copy.from = (const char*)from, copy.bytes = bytes, copy.group = flight.groups;
  check(copy);
  if (watched) watch_copy(to, from, bytes);
  if (from) memcpy(copy.source, from, bytes);
  else memset(copy.source, 0, bytes);
  memset(to, FILL, bytes);
}

void close_copies() { mine().groups++; }

void wait_for_closed_copies(unsigned left) {
  Flight& flight = mine();
  for (; flight.landed < flight.started && flight.at(flight.landed).group + left < flight.groups; flight.landed++)
    land(flight.at(flight.landed));
}

void wait_for_all_copies() {
  Flight& flight = mine();
  for (; flight.landed < flight.started; flight.landed++) land(flight.at(flight.landed));
}

void copies_block_start(unsigned threads) {
  for (unsigned i = 0; i < threads; i++) flights[i].started = flights[i].landed = flights[i].groups = 0;
  shared[0] = shared_memory(0), shared[1] = shared_memory(1), watched = watching();
}

// The watch alone minds: a GPU lets such copies land by themselves, and who needed them has seen NaN. Zeros are not
// worth a wait: a thread that finds out that it has nothing to do has asked memory for nothing.
void copies_thread_end() {
  if (!watched) return;
  Flight& flight = mine();
  unsigned asked = 0;
  for (uint64_t i = flight.landed; i < flight.started; i++) asked += flight.at(i).from != nullptr;
  if (!asked) return;
  describe("thread %u returns with %u copies that it has not waited for", running_thread(), asked);
  object();
}

}  // namespace cuda_on_cpu
