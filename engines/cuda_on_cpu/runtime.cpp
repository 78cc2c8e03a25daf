// The scheduler: blocks in a loop, threads as fibers, one schedule out of several.
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <vector>
#include <sys/mman.h>
#include <ucontext.h>

#include "cuda_on_cpu.h"  // after the system's headers: they know attributes by names that are CUDA's here
#include "scheduler.h"

namespace cuda_on_cpu {

Now now;

namespace {

constexpr unsigned WARP = 32, MOST_THREADS = 1024;
constexpr size_t STACK = 256 << 10, PAGE = 4096;

enum class State { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, DONE };

// What a thread waits for: __syncthreads (name 0) is the same for all only at one place, a named barrier at any.
struct Barrier {
  unsigned name, count;
  const void* place;
};

struct Fiber {
  State state = State::DONE;
  Barrier barrier;        // of the block, that it waits at
  unsigned mask = 0;      // of the warp barrier it waits at
  bool orders = false;    // that barrier orders memory: __syncwarp does, a shuffle does not
  bool started = false;   // its stack holds a frame to return to
  dim3 index;
  unsigned parity = 0;    // which of two exchange slots comes next
  char* stack = nullptr;
  ucontext_t first;
  jmp_buf at;
};

enum class Order { IN_TURN, REVERSED, FIRST_AHEAD, LAST_AHEAD, RANDOM };

std::mutex one_launch;
std::vector<Fiber> fibers;
unsigned threads, running;
jmp_buf scheduler;
sigjmp_buf launch_frame;
uint64_t slots[2][MOST_THREADS];
unsigned boards[2][MOST_THREADS][BOARD];
uint32_t block_epoch, warp_epochs[MOST_THREADS / WARP];
int64_t block_number;
const Kernel* kernel;
void** kernel_arguments;
std::vector<char> dynamic_memory;
char* dynamic_begin;
size_t dynamic_size;
Order order = Order::IN_TURN;
uint64_t seed, random_state;
std::vector<unsigned> active;  // warps that can go on
char message[512];

uint64_t random_number() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

void wait_as(State state, unsigned mask = 0) {
  Fiber& me = fibers[running];
  me.state = state, me.mask = mask;
  if (!_setjmp(me.at)) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {  // one turn per block
    kernel->call(kernel->function, kernel_arguments);
    tensor_thread_end();
    copies_thread_end();
    wait_as(State::DONE);
  }
}

void resume(unsigned i) {
  Fiber& fiber = fibers[i];
  running = i;
  now.thread = fiber.index, now.lane = i % WARP;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  getcontext(&fiber.first);
  fiber.first.uc_stack.ss_sp = fiber.stack;
  fiber.first.uc_stack.ss_size = STACK;
  fiber.first.uc_link = nullptr;
  makecontext(&fiber.first, fiber_main, 0);
  setcontext(&fiber.first);
}

// Lets lanes go whose warp barrier is complete. Returns whether any lane is ready.
bool release_lanes(unsigned first, unsigned last) {
  for (unsigned i = first; i < last; i++) {
    if (fibers[i].state != State::AT_WARP_BARRIER) continue;
    const unsigned mask = fibers[i].mask;
    bool complete = true;
    for (unsigned lane = 0; lane < WARP; lane++)
      if (mask >> lane & 1) {
        if (first + lane >= last || fibers[first + lane].state == State::DONE) {
          describe("warp operation of thread %u names lane %u, which has no running thread", i, lane);
          stop(BAD_LANE);
        }
        const Fiber& other = fibers[first + lane];
        complete &= other.state == State::AT_WARP_BARRIER && other.mask == mask;
      }
    if (!complete) continue;
    warp_epochs[first / WARP] += fibers[i].orders;
    for (unsigned lane = 0; lane < WARP; lane++)
      if (mask >> lane & 1) fibers[first + lane].state = State::READY;
  }
  for (unsigned i = first; i < last; i++)
    if (fibers[i].state == State::READY) return true;
  return false;
}

// Runs every ready lane of a warp up to its next barrier. Returns whether the warp can go on.
bool step_warp(unsigned warp) {
  const unsigned first = warp * WARP, last = std::min(first + WARP, threads), size = last - first;
  const bool backwards = order == Order::REVERSED || order == Order::LAST_AHEAD;
  const unsigned turn = order == Order::RANDOM ? random_number() % size : 0;
  for (unsigned j = 0; j < size; j++) {
    const unsigned i = first + (backwards ? size - 1 - j : (j + turn) % size);
    if (fibers[i].state == State::READY) resume(i);
  }
  return release_lanes(first, last);
}

void run_warps() {
  active.resize((threads + WARP - 1) / WARP);
  std::iota(active.begin(), active.end(), 0u);
  if (order == Order::REVERSED || order == Order::LAST_AHEAD) std::reverse(active.begin(), active.end());
  size_t at = 0;
  while (!active.empty()) {  // until all wait at a block barrier, or are done
    if (order == Order::RANDOM) at = random_number() % active.size();
    if (at >= active.size()) at = 0;
    if (!step_warp(active[at])) active.erase(active.begin() + (long)at);
    else if (order == Order::IN_TURN || order == Order::REVERSED) at++;
  }
}

// Every thread waits at a barrier of the block. Unless it is one barrier, each waits for something else.
void check_barriers() {
  const Barrier& first = fibers[0].barrier;
  if (first.count != threads) {
    describe("barrier %u is for %u threads, the block has %u", first.name, first.count, threads);
    stop(DIVERGED);
  }
  for (unsigned i = 1; i < threads; i++) {
    const Barrier& other = fibers[i].barrier;
    if (other.name == first.name && other.count == first.count && other.place == first.place) continue;
    if (other.name || first.name)
      describe("thread 0 waits at barrier %u of %u threads, thread %u at barrier %u of %u", first.name, first.count, i,
               other.name, other.count);
    else
      describe("threads 0 and %u wait at __syncthreads in different branches", i);
    stop(DIVERGED);
  }
}

void run_block() {
  for (unsigned i = 0; i < threads; i++) {
    fibers[i].state = State::READY;
    fibers[i].parity = 0;
    fibers[i].index = dim3(i % now.block_size.x, i / now.block_size.x % now.block_size.y,
                           i / (now.block_size.x * now.block_size.y));
  }
  if (kernel->shared) memset(kernel->shared, 0xff, (size_t)(kernel->shared_end - kernel->shared));
  memset(dynamic_begin, 0xff, dynamic_size);
  block_epoch = 0;
  std::fill(std::begin(warp_epochs), std::end(warp_epochs), 0u);
  if (watching()) watch_block_start();
  tensor_block_start(threads);
  copies_block_start(threads);
  for (;;) {
    run_warps();
    unsigned waiting = 0, done = 0, stuck = 0;
    for (unsigned i = 0; i < threads; i++) {
      waiting += fibers[i].state == State::AT_BLOCK_BARRIER;
      done += fibers[i].state == State::DONE;
      stuck += fibers[i].state == State::AT_WARP_BARRIER;
    }
    if (done == threads) {
      if (watching()) watch_block_end();
      return tensor_block_end();
    }
    if (stuck || done) {
      describe("%u threads wait at __syncthreads or by name, %u at a warp operation, %u have returned", waiting, stuck,
               done);
      stop(DIVERGED);
    }
    check_barriers();
    block_epoch++;
    for (unsigned i = 0; i < threads; i++) fibers[i].state = State::READY;
  }
}

void make_fibers(unsigned count) {
  while (fibers.size() < count) {
    Fiber fiber;
    char* memory = (char*)mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) abort();
    mprotect(memory, PAGE, PROT_NONE);  // a stack that overflows faults
    fiber.stack = memory + PAGE;
    fibers.push_back(fiber);
  }
}

void run_blocks() {
  const uint64_t x = now.grid_size.x, y = now.grid_size.y, total = x * y * now.grid_size.z;
  const bool backwards = order == Order::REVERSED || order == Order::LAST_AHEAD;
  const uint64_t turn = order == Order::RANDOM ? random_number() % total : 0;
  for (uint64_t j = 0; j < total; j++) {
    const uint64_t i = backwards ? total - 1 - j : (j + turn) % total;
    block_number = (int64_t)i;
    now.block = dim3((unsigned)(i % x), (unsigned)(i / x % y), (unsigned)(i / (x * y)));
    run_block();
  }
}

void on_signal(int number, siginfo_t* info, void*) {
  describe("thread %u of block (%u, %u, %u), address %p", running, now.block.x, now.block.y, now.block.z,
           info->si_addr);
  siglongjmp(launch_frame, number == SIGSEGV || number == SIGBUS ? FAULT : UNDEFINED);
}

// Catches faults of the kernel for the duration of a launch.
class Signals {
 public:
  Signals() {
    static char stack[64 << 10];
    stack_t own = {};
    own.ss_sp = stack, own.ss_size = sizeof stack;
    sigaltstack(&own, &stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 4; i++) sigaction(NUMBERS[i], &action, &before_[i]);
  }
  ~Signals() {
    for (int i = 0; i < 4; i++) sigaction(NUMBERS[i], &before_[i], nullptr);
    sigaltstack(&stack_, nullptr);
  }

 private:
  static constexpr int NUMBERS[4] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
  struct sigaction before_[4];
  stack_t stack_;
};

}  // namespace

static void meet_block(const Barrier& barrier) {
  fibers[running].barrier = barrier;
  wait_as(State::AT_BLOCK_BARRIER);
}

void block_barrier() { meet_block({0, threads, __builtin_return_address(0)}); }

void named_barrier(unsigned name, unsigned count) { meet_block({name, count, nullptr}); }

void meet_lanes(unsigned mask, bool orders) {
  if (!(mask >> now.lane & 1)) {
    describe("lane %u takes part in a warp operation whose mask 0x%x leaves it out", now.lane, mask);
    stop(BAD_LANE);
  }
  fibers[running].orders = orders;
  wait_as(State::AT_WARP_BARRIER, mask);
}

void warp_barrier(unsigned mask) { meet_lanes(mask, true); }

uint64_t exchange(unsigned mask, uint64_t mine, unsigned from) {
  if (from >= WARP || !(mask >> from & 1)) {
    describe("a shuffle reads lane %u, which its mask 0x%x leaves out", from, mask);
    stop(BAD_LANE);
  }
  const unsigned me = running, parity = fibers[me].parity++ & 1;  // two slots, so one barrier per exchange is enough
  slots[parity][me] = mine;
  meet_lanes(mask, false);
  return slots[parity][me / WARP * WARP + from];
}

const unsigned* lay_down(const unsigned* words, unsigned count) {
  const unsigned me = running, parity = fibers[me].parity++ & 1;
  std::copy(words, words + count, boards[parity][me]);
  meet_lanes(~0u, false);
  return boards[parity][me / WARP * WARP];
}

void* dynamic_shared() { return dynamic_begin; }

Standing standing() { return {block_number, (int)running, block_epoch, warp_epochs[running / WARP]}; }
unsigned running_thread() { return running; }
Range running_stack() { return {fibers[running].stack, fibers[running].stack + STACK}; }
Range shared_memory(int which) {
  return which ? Range{dynamic_begin, dynamic_begin + dynamic_size} : Range{kernel->shared, kernel->shared_end};
}

void stop(Outcome outcome) { siglongjmp(launch_frame, outcome); }

void describe(const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(message, sizeof message, format, values);
  va_end(values);
}

int run(const Kernel& which, const unsigned* grid, const unsigned* block, size_t dynamic_bytes, void** arguments) {
  std::lock_guard<std::mutex> lock(one_launch);
  message[0] = 0;
  random_state = seed;
  now.grid_size = dim3(grid[0], grid[1], grid[2]);
  now.block_size = dim3(block[0], block[1], block[2]);
  const uint64_t size = (uint64_t)block[0] * block[1] * block[2];
  if (size < 1 || size > MOST_THREADS) {
    describe("%llu threads in a block", (unsigned long long)size);
    return TOO_LARGE;
  }
  threads = (unsigned)size;
  make_fibers(threads);
  kernel = &which, kernel_arguments = arguments;
  dynamic_memory.assign(dynamic_bytes + 2048, 0);
  dynamic_begin = (char*)(((uintptr_t)dynamic_memory.data() + 1023) / 1024 * 1024), dynamic_size = dynamic_bytes;
  Signals signals;
  const int outcome = sigsetjmp(launch_frame, 1);
  if (outcome == 0) run_blocks();
  for (Fiber& fiber : fibers) fiber.started = false;  // what their stacks hold belongs to this kernel
  return outcome;
}

extern "C" {
__attribute__((visibility("default"))) void cuda_on_cpu_schedule(int kind, uint64_t number) {
  std::lock_guard<std::mutex> lock(one_launch);
  order = (Order)kind, seed = number;
}
__attribute__((visibility("default"))) const char* cuda_on_cpu_message() { return message; }
}

}  // namespace cuda_on_cpu
