// Runs blocks of CUDA threads on a CPU, to test kernels where there is no GPU.
//
// The threads of a block are fibers that run in turn until they meet the others: at
// __syncthreads and in the warp's own functions.  Run in ascending and in descending
// order, a kernel that lacks a barrier gives two results.

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

static dim3 threadIdx, blockIdx, gridDim;
static ucontext_t scheduler;
static std::vector<ucontext_t> fibers;
static std::vector<char> finished;
static std::function<void()> body;
static void *shared_memory;  // __shared__ of a size that is known at launch
alignas(16) static char exchanged[1024][32];

// Lets every other thread of the block come as far.
inline void meet() { swapcontext(&fibers[threadIdx.x], &scheduler); }
inline void __syncthreads() { meet(); }

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
  finished[threadIdx.x] = 1;
}

inline void run_block(int threads, bool descending) {
  static std::vector<std::vector<char>> stacks;
  constexpr int STACK = 1 << 16;
  while ((int)stacks.size() < threads) stacks.emplace_back(STACK);
  fibers.assign(threads, {});
  finished.assign(threads, 0);
  for (int i = 0; i < threads; ++i) {
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = stacks[i].data();
    fibers[i].uc_stack.ss_size = STACK;
    fibers[i].uc_link = &scheduler;
    makecontext(&fibers[i], run_fiber, 0);
  }
  for (int left = threads; left > 0;) {
    left = 0;
    for (int turn = 0; turn < threads; ++turn) {
      int i = descending ? threads - 1 - turn : turn;
      if (finished[i]) continue;
      threadIdx.x = i;
      swapcontext(&scheduler, &fibers[i]);
      left += !finished[i];
    }
  }
}
