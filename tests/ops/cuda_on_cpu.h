// Runs blocks of CUDA threads on a CPU, to test kernels where there is no GPU.
//
// The threads of a block are fibers.  A warp runs to the next __syncthreads before the
// next warp may, its threads in turn until they meet in one of the warp's functions: in
// ascending and in descending order, a kernel that lacks a barrier gives two results.
// Asynchronous copies are made when they are waited for.

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct dim3 { unsigned x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

enum State { RUNNING, AT_BARRIER, FINISHED };

static dim3 threadIdx, blockIdx, gridDim;
static ucontext_t scheduler;
static std::vector<ucontext_t> fibers;
static std::vector<State> states_of;
static std::function<void()> body;
static void *shared_memory;  // __shared__ of a size that is known at launch
alignas(16) static char exchanged[1024][32];
static std::vector<std::function<void()>> copies[1024];

// Lets the other threads of the warp come as far.
inline void meet() { swapcontext(&fibers[threadIdx.x], &scheduler); }

inline void __syncthreads() {
  states_of[threadIdx.x] = AT_BARRIER;
  meet();
}

// 16 bytes, aligned, as cp.async takes them.
inline void copy(void *to, const void *from) {
  if (((size_t)to | (size_t)from) % 16) abort();
  copies[threadIdx.x].push_back([=] { memcpy(to, from, 16); });
}

// Of the whole warp.
inline void wait_for_copies() {
  for (auto &copy : copies[threadIdx.x]) copy();
  copies[threadIdx.x].clear();
  meet();
}

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// The value of the same warp's thread `lane`.
template <typename T>
inline T of_lane(T value, int lane) {
  memcpy(exchanged[threadIdx.x], &value, sizeof value);
  meet();
  memcpy(&value, exchanged[threadIdx.x / 32 * 32 + lane], sizeof value);
  meet();
  return value;
}

// Memory between pages that nobody may touch, filled with NaN: at the end of its own
// pages, or at their beginning.  It is never given back.
inline void *guarded(size_t bytes, bool at_end) {
  constexpr size_t PAGE = 4096;
  size_t size = (bytes + PAGE - 1) / PAGE * PAGE;
  char *all = (char *)mmap(nullptr, size + 2 * PAGE, PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(all + PAGE, size, PROT_READ | PROT_WRITE);
  memset(all + PAGE, 0xff, size);
  return all + PAGE + (at_end ? size - bytes : 0);
}

template <typename T>
inline T *guarded_copy(const T *data, size_t bytes, bool at_end) {
  return (T *)memcpy(guarded(bytes, at_end), data, bytes);
}

inline void run_fiber() {
  body();
  states_of[threadIdx.x] = FINISHED;
}

inline void run_block(int threads, bool descending) {
  static std::vector<std::vector<char>> stacks;
  constexpr int STACK = 1 << 16;
  while ((int)stacks.size() < threads) stacks.emplace_back(STACK);
  fibers.assign(threads, {});
  states_of.assign(threads, RUNNING);
  for (int i = 0; i < threads; ++i) {
    copies[i].clear();
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = stacks[i].data();
    fibers[i].uc_stack.ss_size = STACK;
    fibers[i].uc_link = &scheduler;
    makecontext(&fibers[i], run_fiber, 0);
  }
  auto in_order = [=](int turn, int count) { return descending ? count - 1 - turn : turn; };
  for (bool left = true; left;) {
    left = false;
    for (int turn = 0; turn < threads / 32; ++turn) {
      int warp = 32 * in_order(turn, threads / 32);
      for (bool running = true; running;) {
        running = false;
        for (int lane = 0; lane < 32; ++lane) {
          threadIdx.x = warp + in_order(lane, 32);
          if (states_of[threadIdx.x] != RUNNING) continue;
          swapcontext(&scheduler, &fibers[threadIdx.x]);
          running |= states_of[threadIdx.x] == RUNNING;
        }
      }
    }
    for (auto &state : states_of) {
      left |= state == AT_BARRIER;
      if (state == AT_BARRIER) state = RUNNING;
    }
  }
}
