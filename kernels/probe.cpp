/* For tests and benchmarks only, never installed: the vector forms of one pixel's mathematics, and the
 * bare exp loop that says how fast this processor could be. Compiled once for each instruction set,
 * as fused_cpu.cpp is; PROBE(name) gives every copy its own symbols. */
#if defined(__x86_64__)
#include "simd.h"
#else
#include "pixel.h"
#endif

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define PROBE(name) JOIN(name, CADA_PROBE_SUFFIX)
#define PROBE_API extern "C" __attribute__((visibility("default")))

namespace cada {
namespace {
#if defined(__x86_64__) && !defined(CADA_PROBE_SCALAR)
constexpr int STEP = LANES;
inline Floats get(const float *from) { return load_anywhere(from); }
inline void put(float *to, Floats x) { store_anywhere(to, x); }
#else
constexpr int STEP = 1;
inline float get(const float *from) { return *from; }
inline void put(float *to, float x) { *to = x; }
#endif
} // namespace
} // namespace cada

using namespace cada;

/* count is a multiple of 16. */
PROBE_API void PROBE(cada_probe_exp_)(const float *x, float *y, int64_t count) {
  for (int64_t i = 0; i < count; i += STEP) put(y + i, exp_n(get(x + i)));
}

PROBE_API void PROBE(cada_probe_ln_)(const float *x, float *y, int64_t count) {
  for (int64_t i = 0; i < count; i += STEP) put(y + i, ln_n(get(x + i)));
}

PROBE_API void PROBE(cada_probe_fused_)(const float *a, const float *b, const float *c, float *y,
                                        int64_t count) {
  for (int64_t i = 0; i < count; i += STEP) put(y + i, fused(get(a + i), get(b + i), get(c + i)));
}

/* a * b + c as two operations: were the compiler to contract it, it would equal `fused`. */
PROBE_API void PROBE(cada_probe_unfused_)(const float *a, const float *b, const float *c, float *y,
                                          int64_t count) {
  for (int64_t i = 0; i < count; i += STEP) put(y + i, get(a + i) * get(b + i) + get(c + i));
}

/* exp of `size` values (a multiple of 64, small enough for the first-level cache), `times` over. */
PROBE_API void PROBE(cada_bench_exp_)(const float *x, float *y, int64_t size, int64_t times) {
  for (int64_t t = 0; t < times; ++t) {
    for (int64_t i = 0; i < size; i += 4 * STEP) {
      const auto a = exp_n(get(x + i)), b = exp_n(get(x + i + STEP));
      const auto c = exp_n(get(x + i + 2 * STEP)), d = exp_n(get(x + i + 3 * STEP));
      put(y + i, a);
      put(y + i + STEP, b);
      put(y + i + 2 * STEP, c);
      put(y + i + 3 * STEP, d);
    }
    asm volatile("" ::"r"(x), "r"(y) : "memory"); /* do it again, do not remember */
  }
}
