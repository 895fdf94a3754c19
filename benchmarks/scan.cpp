// The selective scan of one state per channel for PyTorch on CPU, so that the authors'
// network has there what its CUDA extension is on a GPU; benchmarks/peer.py compiles and
// checks it. Channels first, as they keep it: exponentials are vectorised along a tile of
// time, the recurrences of eight channels are interleaved to hide their latency. Only
// the states between tiles are kept for the gradient.
//
// u, delta, y (batch, groups * width, length); A, D, bias (groups * width);
// B, C (batch, groups, length); states (batch, groups * width, tiles).
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

namespace {

constexpr int kTile = 256, kChannels = 8;

struct Tile {
  float dt[kChannels][kTile], decay[kChannels][kTile], h[kChannels][kTile + 1];

  // Step sizes, decays and states of up to kTile steps; h[j][0] holds the state before.
  void run(const float* u, const float* delta, const float* a, const float* bias,
           const float* b, size_t length, int channels, int steps) {
    for (int j = 0; j < channels; ++j) {
      const float *uj = u + j * length, *dj = delta + j * length;
#pragma omp simd
      for (int t = 0; t < steps; ++t) {
        // log1p in two terms: fast-math has no log1p for vectors.
        const float z = dj[t] + bias[j], e = expf(-fabsf(z)), w = 1.f + e;
        const float s = fmaxf(z, 0.f) + logf(w) - ((w - 1.f) - e) / w;
        dt[j][t] = s;
        decay[j][t] = expf(s * a[j]);
        h[j][t + 1] = s * b[t] * uj[t];
      }
    }
    for (int t = 0; t < steps; ++t)
      for (int j = 0; j < kChannels; ++j)
        h[j][t + 1] = decay[j][t] * h[j][t] + h[j][t + 1];
  }
};

}  // namespace

extern "C" {

int tile_steps() { return kTile; }

void forward(const float* u, const float* delta, const float* A, const float* B,
             const float* C, const float* D, const float* bias, float* y,
             float* states, int batch, int groups, int width, int length) {
  const int tiles = (length + kTile - 1) / kTile, inner = groups * width;
  static Tile tile;
  for (int n = 0; n < batch; ++n)
    for (int k = 0; k < groups; ++k)
      for (int c = 0; c < width; c += kChannels) {
        const int channels = std::min(kChannels, width - c), first = k * width + c;
        const size_t row = (size_t)n * inner + first, map = row * length;
        const size_t group = ((size_t)n * groups + k) * length;
        for (int j = 0; j < kChannels; ++j) tile.h[j][0] = 0.f;
        for (int i = 0; i < tiles; ++i) {
          const int start = i * kTile, steps = std::min(kTile, length - start);
          for (int j = 0; j < channels; ++j)
            states[(row + j) * tiles + i] = tile.h[j][0];
          tile.run(u + map + start, delta + map + start, A + first, bias + first,
                   B + group + start, length, channels, steps);
          for (int j = 0; j < channels; ++j) {
            const size_t at = map + j * (size_t)length + start;
#pragma omp simd
            for (int t = 0; t < steps; ++t)
              y[at + t] = C[group + start + t] * tile.h[j][t + 1] + D[first + j] * u[at + t];
            tile.h[j][0] = tile.h[j][steps];
          }
        }
      }
}

// Adds to dA, dB, dC, dD and dbias, which start at zero.
void backward(const float* u, const float* delta, const float* A, const float* B,
              const float* C, const float* D, const float* bias, const float* dy,
              const float* states, float* du, float* ddelta, float* dA, float* dB,
              float* dC, float* dD, float* dbias, int batch, int groups, int width,
              int length) {
  const int tiles = (length + kTile - 1) / kTile, inner = groups * width;
  static Tile tile;
  static float g[kChannels][kTile + 1];  // of the state after each step
  for (int n = 0; n < batch; ++n)
    for (int k = 0; k < groups; ++k)
      for (int c = 0; c < width; c += kChannels) {
        const int channels = std::min(kChannels, width - c), first = k * width + c;
        const size_t row = (size_t)n * inner + first, map = row * length;
        const size_t group = ((size_t)n * groups + k) * length;
        float later[kChannels] = {};  // what the tile after gives to this one
        for (int i = tiles - 1; i >= 0; --i) {
          const int start = i * kTile, steps = std::min(kTile, length - start);
          for (int j = 0; j < channels; ++j)
            tile.h[j][0] = states[(row + j) * tiles + i];
          tile.run(u + map + start, delta + map + start, A + first, bias + first,
                   B + group + start, length, channels, steps);
          const float *b = B + group + start, *cs = C + group + start;
          for (int j = 0; j < channels; ++j) {
            const float* dyj = dy + map + j * (size_t)length + start;
#pragma omp simd
            for (int t = 0; t < steps; ++t) g[j][t] = cs[t] * dyj[t];
          }
          for (int j = 0; j < kChannels; ++j) g[j][steps - 1] += later[j];
          for (int t = steps - 2; t >= 0; --t)
            for (int j = 0; j < kChannels; ++j)
              g[j][t] += tile.decay[j][t + 1] * g[j][t + 1];
          for (int j = 0; j < kChannels; ++j) later[j] = tile.decay[j][0] * g[j][0];
          for (int j = 0; j < channels; ++j) {
            const size_t at = map + j * (size_t)length + start;
            const float a = A[first + j], d = D[first + j];
            float sum_a = 0.f, sum_d = 0.f, sum_bias = 0.f;
            float *db = dB + group + start, *dc = dC + group + start;
#pragma omp simd reduction(+ : sum_a, sum_d, sum_bias)
            for (int t = 0; t < steps; ++t) {
              const float s = tile.dt[j][t], x = u[at + t], out = dy[at + t];
              const float past = g[j][t] * tile.h[j][t] * tile.decay[j][t];
              const float input = g[j][t] * x;
              // The derivative of softplus, from its value.
              const float dz = (past * a + input * b[t]) * (1.f - expf(-s));
              du[at + t] = g[j][t] * s * b[t] + d * out;
              ddelta[at + t] = dz;
              db[t] += input * s;
              dc[t] += out * tile.h[j][t + 1];
              sum_a += past * s;
              sum_d += out * x;
              sum_bias += dz;
            }
            dA[first + j] += sum_a;
            dD[first + j] += sum_d;
            dbias[first + j] += sum_bias;
          }
        }
      }
}
}
