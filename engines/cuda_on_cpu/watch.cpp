// The watch: what every load and store of the kernel touches, and whether something orders it after the last one.
//
// The kernel's module is compiled with -fsanitize=thread, which puts a call in front of every access; the functions
// called are the ones below, not the sanitizer's library. Addresses are checked per byte against the tensors given
// (gaps between strided elements are not part of them), races against an exact happens-before: within a block
// __syncthreads, named barriers and __syncwarp order accesses, between blocks nothing does. A launch that may run beside
// the one before it is ordered after that one for threads that have waited for it.
#include <algorithm>
#include <string>  // the system's headers first: they know attributes by names that are CUDA's here
#include <vector>

#include "cuda_on_cpu.h"
#include "scheduler.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t GRAIN = 2;  // bytes per cell: no tensor and no staged value is narrower

struct Access {
  int64_t block = -1;
  int thread = -1;
  uint32_t block_epoch = 0, warp_epoch = 0;
  uint32_t published = 0;  // a write: how often its thread had published before it
  bool happened() const { return thread >= 0; }
};

struct Cell {
  Access write, read;  // the last of each
  bool written_before = false, read_before = false;  // by launches that this one may run beside
  bool readers_in_warp = false;  // several threads have read in read.block_epoch: of one warp ...
  bool readers_beyond = false;   // ... or of several
  bool blocks = false;           // several blocks have read
  bool in_flight = false;        // a copy to it has been started, and its thread has not waited for it
};

struct Region {
  std::string name;
  char* begin;
  size_t size;
  const uint8_t* allowed;  // per byte: 1 readable, 2 writable as well
  std::vector<Cell> cells;
};

bool active;
bool overlaps;      // this launch may run beside those before it, back to the last one that may not
bool waited[1024];  // of each thread of this block: for the launch before
std::vector<Region> regions;
size_t last_region;
std::vector<Cell> shared_cells[2];
std::vector<Access> publications[1024];  // of each thread, in this block

bool ordered(const Access& before, const Standing& me) {
  if (before.block != me.block) return false;
  if (before.thread == me.thread || before.block_epoch < me.block_epoch) return true;
  return before.thread / 32 == me.thread / 32 && before.warp_epoch < me.warp_epoch;
}

[[noreturn]] void object(const char* what, const char* name, size_t at, const Access* other) {
  const Standing me = standing();
  if (other)
    describe("%s: %s, byte %zu: thread %d of block %lld, with thread %d of block %lld", what, name, at, me.thread,
             (long long)me.block, other->thread, (long long)other->block);
  else
    describe("%s: %s, byte %zu: thread %d of block %lld", what, name, at, me.thread, (long long)me.block);
  stop(FORBIDDEN);
}

bool too_early(const Standing& me) { return overlaps && !waited[me.thread]; }

void read_cell(Cell& cell, const Standing& me, const char* name, size_t at) {
  if (cell.written_before && too_early(me))
    object("read of what an earlier kernel writes, without wait_for_previous", name, at, nullptr);
  if (cell.in_flight) object("read of what a copy has yet to bring", name, at, &cell.write);
  if (cell.write.happened() && !ordered(cell.write, me)) object("race, read after write", name, at, &cell.write);
  Access& last = cell.read;
  if (last.happened() && last.block != me.block) cell.blocks = true;
  const bool same_stretch = last.happened() && last.block == me.block && last.block_epoch == me.block_epoch;
  if (!same_stretch) cell.readers_in_warp = cell.readers_beyond = false;
  else if (last.thread / 32 != me.thread / 32) cell.readers_beyond = true;
  else if (last.thread != me.thread) cell.readers_in_warp = true;
  last = {me.block, me.thread, me.block_epoch, me.warp_epoch, 0};
}

void write_cell(Cell& cell, const Standing& me, const char* name, size_t at) {
  if ((cell.written_before || cell.read_before) && too_early(me))
    object("write of what an earlier kernel uses, without wait_for_previous", name, at, nullptr);
  if (cell.in_flight) object("write of what a copy has yet to bring", name, at, &cell.write);
  if (cell.write.happened() && !ordered(cell.write, me)) object("race, write after write", name, at, &cell.write);
  const Access& last = cell.read;
  if (last.happened()) {
    bool fine = !cell.blocks && ordered(last, me);
    if (last.block_epoch == me.block_epoch) {  // the last reader stands for all of them
      fine &= !cell.readers_beyond;
      fine &= !cell.readers_in_warp || (last.thread / 32 == me.thread / 32 && last.warp_epoch < me.warp_epoch);
    }
    if (!fine) object("race, write after read", name, at, &last);
  }
  cell.write = {me.block, me.thread, me.block_epoch, me.warp_epoch, (uint32_t)publications[me.thread].size()};
}

Region* region_of(const char* p) {
  if (last_region < regions.size()) {
    Region& region = regions[last_region];
    if (p >= region.begin && p < region.begin + region.size) return &region;
  }
  for (size_t i = 0; i < regions.size(); i++)
    if (p >= regions[i].begin && p < regions[i].begin + regions[i].size) return last_region = i, &regions[i];
  return nullptr;
}

void look(const void* address, size_t bytes, bool writes) {
  if (!active) return;
  const char* p = (const char*)address;
  if (running_stack().holds(p, bytes)) return;
  if ((const void*)p >= &now && (const void*)(p + bytes) <= &now + 1) return;
  const Standing me = standing();
  for (int which = 0; which < 2; which++) {
    const Range shared = shared_memory(which);
    if (!shared.begin || p < shared.begin || p >= shared.end) continue;
    const size_t first = (size_t)(p - shared.begin);
    if (!shared.holds(p, bytes)) object("beyond its end", "shared memory", first, nullptr);
    for (size_t at = first; at < first + bytes; at += GRAIN) {
      Cell& cell = shared_cells[which][at / GRAIN];
      if (!writes && !cell.write.happened()) object("read before anything was written", "shared memory", at, nullptr);
      if (writes) write_cell(cell, me, "shared memory", at);
      else read_cell(cell, me, "shared memory", at);
    }
    return;
  }
  Region* region = region_of(p);
  if (!region) {
    describe("%s outside every tensor: address %p, %zu bytes, thread %d of block %lld", writes ? "write" : "read",
             address, bytes, me.thread, (long long)me.block);
    stop(FORBIDDEN);
  }
  const size_t first = (size_t)(p - region->begin);
  for (size_t at = first; at < first + bytes; at++) {
    const int allowed = at < region->size ? region->allowed[at] : 0;
    if (allowed < 1 + writes)
      object(writes ? (allowed ? "write to an input" : "write between or beyond elements")
                    : "read between or beyond elements", region->name.c_str(), at, nullptr);
  }
  if (region->cells.empty()) return;  // an input: nobody writes it
  for (size_t at = first; at < first + bytes; at += GRAIN) {
    Cell& cell = region->cells[at / GRAIN];
    if (writes) write_cell(cell, me, region->name.c_str(), at);
    else read_cell(cell, me, region->name.c_str(), at);
  }
}

template <class F> void each_shared_cell(const void* address, size_t bytes, F act) {
  const char* p = (const char*)address;
  for (int which = 0; which < 2; which++) {
    const Range shared = shared_memory(which);
    if (!shared.holds(p, bytes)) continue;
    const size_t first = (size_t)(p - shared.begin);
    for (size_t at = first; at < first + bytes; at += GRAIN) act(shared_cells[which][at / GRAIN]);
  }
}

}  // namespace

bool watching() { return active; }

void watch_block_start() {
  for (int which = 0; which < 2; which++) {
    const Range shared = shared_memory(which);
    shared_cells[which].assign((size_t)(shared.end - shared.begin) / GRAIN + 1, Cell{});
  }
  for (auto& of_thread : publications) of_thread.clear();
  std::fill(std::begin(waited), std::end(waited), false);
}

// A kernel that ends before the one that it runs beside lets the next one start too early.
void watch_block_end() {
  if (!overlaps || std::any_of(std::begin(waited), std::end(waited), [](bool x) { return x; })) return;
  describe("block %lld has ended without wait_for_previous", (long long)standing().block);
  stop(FORBIDDEN);
}

void wait_for_previous() {
  if (active) waited[standing().thread] = true;
}

void watch_publish() {
  const Standing me = standing();
  publications[me.thread].push_back({me.block, me.thread, me.block_epoch, me.warp_epoch, 0});
}

// Group products read past what threads see: each byte must have been published by its writer, between writing it and
// the barrier that orders the two.
void watch_group_read(const void* address, size_t bytes) {
  look(address, bytes, false);
  const Standing me = standing();
  const char* p = (const char*)address;
  for (int which = 0; which < 2; which++) {
    const Range shared = shared_memory(which);
    if (!shared.holds(p, bytes)) continue;
    const size_t first = (size_t)(p - shared.begin);
    for (size_t at = first; at < first + bytes; at += GRAIN) {
      const Access& write = shared_cells[which][at / GRAIN].write;
      const auto& published = publications[write.thread];
      if (write.published >= published.size() || !ordered(published[write.published], me))
        object("read by a group product without publish_shared", "shared memory", at, &write);
    }
  }
}

// A copy may read and write at any time between its start and its thread's wait for it: it has to be in order with what
// others do at both ends, and nobody may touch its place in between.
void watch_copy(const void* to, const void* from, size_t bytes) {
  if (from) look(from, bytes, false);
  look(to, bytes, true);
  each_shared_cell(to, bytes, [](Cell& cell) { cell.in_flight = true; });
}

void watch_landing(const void* to, const void* from, size_t bytes) {
  const Region* const region = from ? region_of((const char*)from) : nullptr;
  if (region && !region->cells.empty()) look(from, bytes, false);
  const Standing me = standing();
  const Access landed = {me.block, me.thread, me.block_epoch, me.warp_epoch, (uint32_t)publications[me.thread].size()};
  each_shared_cell(to, bytes, [&](Cell& cell) { cell.in_flight = false, cell.write = landed; });
}

extern "C" {

#define EXPORT __attribute__((visibility("default")))

EXPORT void cuda_on_cpu_watch_clear(int on) {
  regions.clear();
  active = on;
}
EXPORT void cuda_on_cpu_watch_region(const char* name, void* begin, size_t size, const uint8_t* allowed, int writable) {
  regions.push_back({name, (char*)begin, size, allowed, {}});
  if (writable) regions.back().cells.resize(size / GRAIN + 1);
}
EXPORT void cuda_on_cpu_watch_forget(const char* name) {
  const auto named = [&](const Region& region) { return region.name == name; };
  regions.erase(std::remove_if(regions.begin(), regions.end(), named), regions.end());
}
// Launches follow one another: the earlier one's accesses are ordered, but for one that may run beside it.
EXPORT void cuda_on_cpu_watch_launch(int next_overlaps) {
  overlaps = next_overlaps;
  for (Region& region : regions)
    for (Cell& cell : region.cells) {
      Cell fresh;
      if (overlaps) {
        fresh.written_before = cell.written_before || cell.write.happened();
        fresh.read_before = cell.read_before || cell.read.happened();
      }
      cell = fresh;
    }
}

EXPORT void __tsan_init() {}
EXPORT void __tsan_func_entry(void*) {}
EXPORT void __tsan_func_exit() {}
EXPORT void __tsan_vptr_update(void**, void*) {}
EXPORT void __tsan_read_range(void* p, size_t bytes) { look(p, bytes, false); }
EXPORT void __tsan_write_range(void* p, size_t bytes) { look(p, bytes, true); }
#define WATCH(BYTES)                                                          \
  EXPORT void __tsan_read##BYTES(void* p) { look(p, BYTES, false); }           \
  EXPORT void __tsan_write##BYTES(void* p) { look(p, BYTES, true); }           \
  EXPORT void __tsan_unaligned_read##BYTES(void* p) { look(p, BYTES, false); } \
  EXPORT void __tsan_unaligned_write##BYTES(void* p) { look(p, BYTES, true); }
WATCH(1)
WATCH(2)
WATCH(4)
WATCH(8)
WATCH(16)
}

}  // namespace cuda_on_cpu
