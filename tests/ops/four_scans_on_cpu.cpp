// four_scans.cu with what it takes of a GPU written out, as a library for a CPU.
#include "cuda_on_cpu.h"

inline float exp2_fast(float x) { return exp2f(x); }
inline float exp2_minus_abs(float x) { return exp2f(-fabsf(x)); }

inline unsigned bfloat16(float x) {  // round to nearest, ties to even
  unsigned bits;
  memcpy(&bits, &x, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned pack(float low, float high) { return bfloat16(high) << 16 | bfloat16(low); }

inline float shuffle_up(float value, int by) {
  int lane = threadIdx.x % 32;
  return of_lane(value, lane % 4 >= by ? lane - by : lane);
}

inline unsigned shuffle(unsigned value, int lane) { return of_lane(value, lane); }

// As PTX describes the fragments of mma.m16n8k16.
inline void multiply(float (&c)[4], const unsigned (&a)[2], const unsigned (&a_next)[2],
                     unsigned b, unsigned b_next) {
  struct { unsigned a[4], b[2]; } mine = {{a[0], a[1], a_next[0], a_next[1]},
                                          {b, b_next}};
  int lane = threadIdx.x % 32, group = lane / 4, quarter = lane % 4;
  auto half = [](unsigned pair, int i) {
    return __uint_as_float(i ? pair & 0xffff0000u : pair << 16);
  };
  memcpy(exchanged[threadIdx.x], &mine, sizeof mine);
  meet();
  auto *warp = &exchanged[threadIdx.x / 32 * 32];
  for (int i = 0; i < 4; ++i) {
    int row = group + i / 2 * 8, column = 2 * quarter + i % 2;
    for (int k = 0; k < 16; ++k) {
      decltype(mine) of_a, of_b;
      memcpy(&of_a, warp[row % 8 * 4 + k % 8 / 2], sizeof of_a);
      memcpy(&of_b, warp[column * 4 + k % 8 / 2], sizeof of_b);
      c[i] += half(of_a.a[row / 8 + k / 8 * 2], k % 2) * half(of_b.b[k / 8], k % 2);
    }
  }
  meet();
}

#define SHARED_MEMORY(type, name) type *name = (type *)shared_memory
#include "four_scans.cu"

// Once with the threads in ascending order and memory that ends where the arrays end,
// once in descending order and with memory that begins where they begin.
extern "C" void run(const u32 *x, const u32 *p, const u16 *w, const float *bias,
                    const float *a, const float *skip, u32 *y, float2 *states,
                    int pictures, int shared_bytes, int descending) {
  gridDim = {DIM / CHANNELS, (unsigned)pictures};
  const size_t map = (size_t)pictures * TOKENS, kept = 16ul * pictures * KEPT * DIM;
  const bool at_end = !descending;
  shared_memory = guarded(shared_bytes, at_end);
  x = guarded_copy(x, 2 * map * DIM, at_end);
  p = guarded_copy(p, 2 * map * 4 * NUMBERS, at_end);
  w = guarded_copy(w, 16 * DIM * NUMBERS, at_end);
  bias = guarded_copy(bias, 16 * DIM, at_end);
  a = guarded_copy(a, 16 * DIM, at_end);
  skip = guarded_copy(skip, 4 * DIM, at_end);
  u32 *y_out = (u32 *)guarded(2 * map * DIM, at_end);
  float2 *states_out = (float2 *)guarded(STEPS ? kept : 0, at_end);
  body = [=] {
    four_scans(x, p, w, bias, a, skip, y_out
#if STEPS
               , states_out
#endif
    );
  };
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
      memset(shared_memory, 0xff, shared_bytes);
      run_block(32 * WARPS, descending);
    }
  memcpy(y, y_out, 2 * map * DIM);
  if (STEPS) memcpy(states, states_out, kept);
}
