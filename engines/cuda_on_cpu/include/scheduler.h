// Between the scheduler, the watch, the tensor cores and the copies: who is running, and in which stretch between
// barriers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_on_cpu {

enum Outcome {
  OK = 0,
  DIVERGED = 1,   // a barrier that not all of its threads can reach
  BAD_LANE = 2,   // a warp operation names a lane that cannot take part
  TOO_LARGE = 3,  // more than 1024 threads
  FAULT = 4,      // an address that is not mapped
  UNDEFINED = 5,  // undefined behaviour: overflow, shift, misaligned access, array bound
  FORBIDDEN = 6,  // the watch objects
  MISUSED = 7,    // group products that are not begun, committed or waited for, or of what they cannot multiply;
                  // copies that something else is written to or from before they land
};

struct Standing {  // of the running thread
  int64_t block;        // number of the block within the grid
  int thread;           // within the block
  uint32_t block_epoch; // barriers of the block passed
  uint32_t warp_epoch;  // barriers of the warp passed (shuffles order no memory)
};
Standing standing();
unsigned running_thread();  // the same without the rest

struct Range {
  const char *begin, *end;
  bool holds(const void* p, size_t bytes) const { return p >= begin && (const char*)p + bytes <= end; }
};
Range running_stack();
Range shared_memory(int which);  // 0 static, 1 dynamic

[[noreturn]] void stop(Outcome outcome);  // ends the launch from within a thread
void describe(const char* format, ...) __attribute__((format(printf, 1, 2)));

void watch_block_start();  // a new block: its shared memory is unwritten
void watch_block_end();
bool watching();
void watch_group_read(const void* p, size_t bytes);  // the running thread's group product reads what was published
void watch_publish();
void watch_copy(const void* to, const void* from, size_t bytes);  // the running thread starts it; from null: zeros
void watch_landing(const void* to, const void* from, size_t bytes);  // it has waited for it

void meet_lanes(unsigned mask, bool orders);  // a warp operation of the running thread; does it order memory?
void tensor_block_start(unsigned threads);
void tensor_thread_end();
void tensor_block_end();
void copies_block_start(unsigned threads);
void copies_thread_end();

}  // namespace cuda_on_cpu
