// The four selective scans of a map, forward, for NVIDIA's GPUs: bfloat16, one state.
//
// A block has 16 channels of a picture, which it keeps in shared memory, the sums of the
// outputs beside them: each map is read from memory and written to it once.  The block
// walks the four directions one after another.  Of a direction, a warp takes a chunk of
// 4 runs of pixels and a thread one run of two channels: with lane = 4 g + q, run q of
// channels 2 g and 2 g + 1, which is how mma.m16n8k16 leaves the step sizes that it makes
// of r numbers a pixel.  The threads scan their runs from zero; what a run does to any
// state before it is one decay and one end state, and these are composed over the 4
// lanes by shuffles and over the warps in shared memory.  Then they scan once more, from
// the right state.
//
// Arithmetic is in float32, but the sum of the directions is rounded to bfloat16 after
// each: shared memory has no room for more.
//
// To be defined when it is compiled: HEIGHT, WIDTH of the map, DIM channels, NUMBERS of a
// pixel and direction (r, zeros, B and C, a multiple of 8 in all), RUN pixels, WARPS,
// STEPS (pixels between the states that are written, 0 for none).

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int TOKENS = HEIGHT * WIDTH, CHANNELS = 16, OCTETS = NUMBERS / 8;
constexpr int CHUNK = 4 * RUN, ROUND = CHUNK * WARPS;
constexpr int ROUNDS = (TOKENS + ROUND - 1) / ROUND;
constexpr int EVERY = STEPS ? STEPS : 1, KEPT = TOKENS / EVERY;
// No run ends beyond the map; none begins there.
constexpr bool WHOLE = TOKENS % RUN == 0, EXACT = TOKENS % ROUND == 0;
// On a multiprocessor at once, as registers allow for.
constexpr int BLOCKS = WARPS == 1 ? 12 : 16 / WARPS;
// Whether they do for the numbers of the next chunk.
constexpr bool EARLY = OCTETS <= 3;
// Shared memory has a gap after each run, lest the 4 runs of a warp meet in a bank.
constexpr bool GAPS = WIDTH % RUN == 0 && HEIGHT % RUN == 0;
constexpr int PITCH = GAPS ? WIDTH + WIDTH / RUN : WIDTH;
constexpr int SLAB = GAPS ? HEIGHT * PITCH + HEIGHT / RUN : TOKENS;

// log2(1 + e) / e in powers of e, 0 <= e <= 1: minimax, relative error 6e-5, which is a
// fiftieth of bfloat16's.
__device__ inline float log2_1p(float e) {
  float s = 0.0596515483f;
  s = fmaf(s, e, -0.2271194512f);
  s = fmaf(s, e, 0.441898832f);
  s = fmaf(s, e, -0.7169874152f);
  return fmaf(s, e, 1.4426132082f) * e;
}

__device__ inline float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ inline float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

#ifdef __CUDACC_RTC__
// 2 to the power of minus |x|, or of x.
__device__ inline float exp2_minus_abs(float x) {
  float y;
  asm("{.reg .f32 t; abs.f32 t, %1; neg.f32 t, t; ex2.approx.ftz.f32 %0, t;}"
      : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline u32 pack(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// c += a b of a 16 x 16 matrix a and a 16 x 8 matrix b.
__device__ inline void multiply(float (&c)[4], const u32 (&a)[2], const u32 (&a_next)[2],
                                u32 b, u32 b_next) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a_next[0]), "r"(a_next[1]), "r"(b), "r"(b_next));
}

// Of the thread `by` before this one in the same four.
__device__ inline float shuffle_up(float value, int by) {
  return __shfl_up_sync(0xffffffffu, value, by, 4);
}

__device__ inline u32 shuffle(u32 value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// 16 bytes from global to shared memory, asynchronously.
__device__ inline void copy(void *to, const void *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;"
               :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}

// Until this warp's copies have arrived.
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
}

#define SHARED_MEMORY(type, name) extern __shared__ type name[]
#endif

// The pixels of one direction in the order in which it walks over them.
template <int DIRECTION>
struct Walk {
  static constexpr bool COLUMNS = DIRECTION % 2, BACK = DIRECTION >= 2;
  // Pixels of a run lie at the same distances in every run.
  static constexpr bool EVEN = !COLUMNS || HEIGHT % RUN == 0 || RUN % HEIGHT == 0;

  // A pixel's place in the map; the first one's for what lies beyond the last.
  __device__ static int pixel(u32 step) {
    step = step < TOKENS ? step : 0;
    step = BACK ? TOKENS - 1 - step : step;
    return COLUMNS ? step % HEIGHT * WIDTH + step / HEIGHT : step;
  }

  // In shared memory.
  __device__ static int slot(u32 pixel) {
    u32 row = pixel / WIDTH, column = pixel % WIDTH;
    return GAPS ? row * PITCH + row / RUN + column + column / RUN : pixel;
  }

  // From the first of a run, if EVEN.
  __device__ static constexpr int distance(int step, int pitch = WIDTH) {
    int ahead = COLUMNS ? step % HEIGHT * pitch + step / HEIGHT : step;
    return BACK ? -ahead : ahead;
  }
};

// A run: where it starts, which place that is, and the places of its other pixels.
template <int DIRECTION>
struct Run {
  typedef Walk<DIRECTION> W;
  int start, first, first_slot;

  __device__ explicit Run(int start)
      : start(start), first(W::pixel(start)), first_slot(W::slot(first)) {}

  // To the same place in the next chunk of this warp.
  __device__ void advance() {
    start += ROUND;
    if (EXACT && ROUND % WIDTH == 0 && ROUND % HEIGHT == 0 && (GAPS || PITCH == WIDTH)) {
      constexpr int ROWS = W::COLUMNS ? 0 : ROUND / WIDTH;
      constexpr int COLUMNS = W::COLUMNS ? ROUND / HEIGHT : 0;
      constexpr int SIGN = W::BACK ? -1 : 1;
      if (ROWS % RUN == 0 && COLUMNS % RUN == 0) {
        first += SIGN * (ROWS * WIDTH + COLUMNS);
        first_slot += SIGN * (ROWS * PITCH + COLUMNS +
                              (GAPS ? ROWS / RUN + COLUMNS / RUN : 0));
        return;
      }
    }
    *this = Run(start);
  }
  __device__ int pixel(int step) const {
    return W::EVEN ? first + W::distance(step) : W::pixel(start + step);
  }
  __device__ int slot(int step) const {
    return W::EVEN ? first_slot + W::distance(step, PITCH) : W::slot(pixel(step));
  }
  __device__ bool has(int step) const {
    return EXACT || start + (WHOLE ? 0 : step) < TOKENS;
  }
  // A run beyond the map reads the first pixel instead.
  __device__ bool reads(int step) const { return WHOLE || has(step); }
};

struct Operands {
  const u32 *x, *p;  // of the picture, x of the block's channels
  const u16 *w;
  const float *bias, *a, *skip;  // skip of the thread's channels
  u32 *y;
  float2 *states;
};

struct Shared {
  float4 runs[2][WARPS][8];  // decay and end state of a warp's chunk, by two channels
  float2 carry[2][8];        // the state after the last chunk
};

// The numbers of some pixels, as columns of a matrix: of run g / 2, in each product the
// even or odd pixel of two.
struct Columns {
  u32 of[RUN / 2][OCTETS];

  // `run` is the one of which this thread has columns.
  template <int DIRECTION>
  __device__ void load(const Operands &o, const Run<DIRECTION> &run) {
#pragma unroll
    for (int pair = 0; pair < RUN / 2; ++pair) load(o, run, pair);
  }

  template <int DIRECTION>
  __device__ void load(const Operands &o, const Run<DIRECTION> &run, int pair) {
    typedef Walk<DIRECTION> W;
    const int quarter = threadIdx.x % 4, odd = threadIdx.x / 4 % 2;
    constexpr int ROW = 4 * NUMBERS / 2, NEXT = W::distance(1);
    const u32 *from = o.p + DIRECTION * (NUMBERS / 2);
    const int step = 2 * pair;
    if (W::EVEN && W::distance(step + 1) - W::distance(step) == NEXT)
      from += (run.first + odd * NEXT) * ROW + W::distance(step) * ROW;
    else
      from += run.pixel(step + odd) * ROW;
    if (!run.reads(step + odd)) return;
    // A thread's numbers lie side by side; four_scans' weights are in the same order.
    int i = 0;
#pragma unroll
    for (; i + 4 <= OCTETS; i += 4) {
      uint4 four = *(const uint4 *)(from + 4 * i + 4 * quarter);
      of[pair][i] = four.x, of[pair][i + 1] = four.y;
      of[pair][i + 2] = four.z, of[pair][i + 3] = four.w;
    }
    if (OCTETS % 4 >= 2) {
      uint2 two = *(const uint2 *)(from + 4 * i + 2 * quarter);
      of[pair][i] = two.x, of[pair][i + 1] = two.y;
      i += 2;
    }
    if (OCTETS % 2) of[pair][i] = from[4 * i + quarter];
  }
};

// A warp copies the chunks that it is the first to read.
__device__ inline void copy_chunk(const Operands &o, u32 *maps, int chunk) {
#pragma unroll
  for (int i = threadIdx.x % 32; i < 2 * CHUNK; i += 32) {
    int pixel = chunk * CHUNK + i / 2, half = i % 2 * (CHANNELS / 4);
    if (EXACT || pixel < TOKENS)
      copy(maps + Walk<0>::slot(pixel) * (CHANNELS / 2) + half,
           o.x + pixel * (DIM / 2) + half);
  }
}

// Walks one direction; `columns` are those of its first chunk, and then of the next
// direction's.
template <int DIRECTION>
__device__ inline void walk(const Operands &o, Shared &shared, u32 *maps, u32 *sums,
                            Columns &columns, int &turn, int channel) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, quarter = lane % 4;

  // Rows of the matrix are channels: row g is 2 g of this block and row 8 + g is
  // 2 g + 1.  A weight is the sum of two bfloat16 numbers.
  u32 weights[2][OCTETS][2];
#pragma unroll
  for (int i = 0; i < 4 * OCTETS; ++i) {
    int half = i / 2 % 2, row = (DIRECTION * 2 + half) * DIM + channel + i % 2;
    weights[half][i / 4][i % 2] =
        ((const u32 *)(o.w + row * NUMBERS + i / 4 * 8))[quarter];
  }
  const float *at = o.bias + DIRECTION * DIM + channel;
  const float bias[2] = {at[0], at[1]};
  at = o.a + DIRECTION * DIM + channel;
  const float a[2] = {at[0], at[1]};
  float2 *states = o.states + (u64)DIRECTION * gridDim.y * (KEPT * (DIM / 2));

  Run<DIRECTION> run(warp * CHUNK + quarter * RUN);
  Run<DIRECTION> theirs(warp * CHUNK + group / 2 * RUN);  // of this thread's columns
  for (int round = 0; round < ROUNDS; ++round, run.advance()) {
    if (!EARLY && (DIRECTION || round)) columns.load(o, theirs);
    if (DIRECTION == 0) {
      wait_for_copies();
      if (round < ROUNDS - 1) copy_chunk(o, maps, (round + 1) * WARPS + warp);
    }
    float decay[RUN][2], drive[RUN][2], all[2] = {1, 1}, h[2] = {0, 0};
    u32 bc[RUN];
#pragma unroll
    for (int j = 0; j < RUN; j += 2) {
      float z[4] = {bias[0], bias[0], bias[1], bias[1]};
      const u32(&numbers)[OCTETS] = columns.of[j / 2];
#pragma unroll
      for (int i = 0; i + 1 < OCTETS; i += 2)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          multiply(z, weights[half][i], weights[half][i + 1], numbers[i],
                   numbers[i + 1]);
      constexpr int LAST = OCTETS - 1;
      if (OCTETS % 2)
        multiply(z, weights[0][LAST], weights[1][LAST], numbers[LAST], numbers[LAST]);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        // Of the thread that has the end of this pixel's numbers.
        bc[j + k] = shuffle(numbers[LAST], 4 * (2 * quarter + k) + 3);
        u32 x = run.reads(j + k) ? maps[run.slot(j + k) * (CHANNELS / 2) + group] : 0;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float logit = z[2 * c + k], e = exp2_minus_abs(logit);
          float delta = log2_1p(e) + fmaxf(logit, 0.f);  // times log2(e)
          float u = (c ? high : low)(x);
          decay[j + k][c] = exp2_fast(delta * a[c]);
          drive[j + k][c] = delta * (u * low(bc[j + k]));
          all[c] *= decay[j + k][c];
          h[c] = fmaf(decay[j + k][c], h[c], drive[j + k][c]);
        }
      }
    }

    // What comes next is read early, if there are registers for it.
    theirs.advance();
    if (EARLY && round < ROUNDS - 1)
      columns.load(o, theirs);
    else if (EARLY && DIRECTION < 3)
      columns.load(o, Run<(DIRECTION + 1) % 4>(warp * CHUNK + group / 2 * RUN));

    // Over the 4 lanes: up to and with this run, then up to it.
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int by = 1; by < 4; by *= 2) {
        float before_all = shuffle_up(all[c], by), before_h = shuffle_up(h[c], by);
        if (quarter >= by) {
          h[c] = fmaf(all[c], before_h, h[c]);
          all[c] *= before_all;
        }
      }
    float4 *runs = shared.runs[turn][warp];
    if (ROUNDS * WARPS > 1 && quarter == 3)
      runs[group] = make_float4(all[0], h[0], all[1], h[1]);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      all[c] = shuffle_up(all[c], 1);
      h[c] = shuffle_up(h[c], 1);
      if (quarter == 0) all[c] = 1, h[c] = 0;
    }
    // Over the warps.  The direction before has been summed after this, too.
    __syncthreads();
    if (ROUNDS * WARPS > 1) {
      float2 state = round ? shared.carry[turn][group] : make_float2(0, 0);
#pragma unroll
      for (int w = 0; w < WARPS - 1; ++w) {
        float4 run = shared.runs[turn][w][group];
        if (w < warp)
          state =
              make_float2(fmaf(run.x, state.x, run.y), fmaf(run.z, state.y, run.w));
      }
      if (round < ROUNDS - 1 && warp == WARPS - 1 && quarter == 3) {
        float4 run = runs[group];
        shared.carry[turn ^ 1][group] =
            make_float2(fmaf(run.x, state.x, run.y), fmaf(run.z, state.y, run.w));
      }
      turn ^= 1;
      h[0] = fmaf(all[0], state.x, h[0]);
      h[1] = fmaf(all[1], state.y, h[1]);
    }

    constexpr float LN_2 = 0.6931471805599453f;
#pragma unroll
    for (int j = 0; j < RUN; ++j) {
      const bool inside = run.has(j);
      if (STEPS && j % EVERY == 0 && inside)
        states[(run.start + j) / EVERY * (DIM / 2)] =
            make_float2(LN_2 * h[0], LN_2 * h[1]);
      u32 *sum = sums + run.slot(j) * (CHANNELS / 2);
      // The first sum is of the channels themselves.
      const u32 *read = DIRECTION ? sum : maps + run.slot(j) * (CHANNELS / 2) + group;
      u32 before = inside ? *read : 0;
      float c_n = high(bc[j]), y[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        y[c] = (c ? high : low)(before);
        if (DIRECTION == 0) y[c] *= o.skip[c];
        h[c] = fmaf(decay[j][c], h[c], drive[j][c]);
        y[c] = fmaf(c_n, h[c], y[c]);
        if (DIRECTION == 3) y[c] *= LN_2;
      }
      if (inside)
        *(DIRECTION == 3 ? o.y + run.pixel(j) * (DIM / 2) : sum) = pack(y[0], y[1]);
    }
  }
}

// x, y: pictures, TOKENS, DIM; p: pictures, TOKENS, 4, NUMBERS; w: 4, 2, DIM, NUMBERS in
// the order of `Columns`, times log2(e); bias: 4, DIM, likewise; a: 4, DIM; skip: DIM,
// over ln(2); states: 4, pictures, TOKENS / STEPS, DIM.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    four_scans(const u32 *x, const u32 *p, const u16 *w, const float *bias,
               const float *a, const float *skip, u32 *y
#if STEPS
               , float2 *states
#endif
    ) {
  SHARED_MEMORY(u32, maps);
  __shared__ Shared shared;
  const int warp = threadIdx.x / 32, pair = threadIdx.x % 32 / 4;
  const int channel = blockIdx.x * CHANNELS + 2 * pair;
  const u64 picture = blockIdx.y, map = picture * (TOKENS * (DIM / 2)) + channel / 2;
  const Operands o = {
      x + map - pair, p + picture * (TOKENS * (4 * NUMBERS / 2)), w, bias, a,
      skip + channel, y + map,
#if STEPS
      states + picture * (KEPT * (DIM / 2)) + channel / 2
#endif
  };
  copy_chunk(o, maps, warp);
  u32 *sums = maps + SLAB * (CHANNELS / 2) + pair;
  int turn = 0;
  Columns columns = {};
  columns.load(o, Run<0>(warp * CHUNK + pair / 2 * RUN));
  walk<0>(o, shared, maps, sums, columns, turn, channel);
  walk<1>(o, shared, maps, sums, columns, turn, channel);
  walk<2>(o, shared, maps, sums, columns, turn, channel);
  walk<3>(o, shared, maps, sums, columns, turn, channel);
}
