// The arithmetic of the fused kernel's fast path and nothing else: per pixel and class one
// interpolation, one exp_n, S0, S1 and the integer sum; per pixel one division, one ln_n, entropy.
// No load, no store but one word a thread at the end, no branch but the loop, no label to look for
// (a settled cell has it). What no kernel of these bits can beat on a GPU; for benchmarks only.
#include "../kernels/pixel.h" // NVRTC knows the folder of this file only

constexpr int CLASSES = 19;

// `rows` pixels a thread. The seeds differ by thread, so that nothing is the same for a warp.
extern "C" __global__ void __launch_bounds__(128) cada_bare_loop(float *out, int rows, float seed) {
  const float here = seed * static_cast<float>(threadIdx.x + blockIdx.x * blockDim.x);
  float top[CLASSES], step[CLASSES];
  uint32_t sums[CLASSES];
#pragma unroll
  for (int c = 0; c < CLASSES; ++c) {
    top[c] = c == 0 ? 0.0f : cada::fused(here, static_cast<float>(c), -0.5f * c);
    step[c] = c == 0 ? 0.0f : cada::fused(here, static_cast<float>(-c), -0.1f * c);
    sums[c] = 0;
  }
  float entropies = 0.0f;
  const float weight_step = 1.0f / static_cast<float>(rows);
  float weight = 0.0f;
#pragma unroll 1
  for (int row = 0; row < rows; ++row) {
    float e[CLASSES], s0 = 0.0f, s1 = 0.0f;
#pragma unroll
    for (int c = 0; c < CLASSES; ++c) {
      const float d = cada::fused(weight, step[c], top[c]); // a settled cell: the maximum is 0
      e[c] = cada::exp_n(d);
      s0 += e[c];
      s1 = cada::fused(d, e[c], s1);
    }
    const float inverse = 1.0f / s0;
    entropies += cada::fused(-s1, inverse, cada::ln_n(s0));
    const float scale = inverse * inverse * cada::UNIT;
#pragma unroll
    for (int c = 0; c < CLASSES; ++c) sums[c] += cada::units_of(e[c], scale);
    weight += weight_step;
  }
  uint32_t all = __float_as_uint(entropies);
#pragma unroll
  for (int c = 0; c < CLASSES; ++c) all ^= sums[c];
  out[threadIdx.x + blockIdx.x * blockDim.x] = __uint_as_float(all);
}
