/* One pixel's mathematics, once for every processor: exp, ln, fused multiply-add, fp16, taps.
 *
 * Every function is float32 in a fixed order, with a fused multiply-add exactly where `fused` stands
 * and nowhere else (compile with -ffp-contract=off, nvcc -fmad=false; never fast-math). So the same
 * scores give the same bits on AVX-512, AVX2, plain x86-64 and CUDA. Vector code in fused_cpu.cpp
 * repeats these steps lane by lane; tests/kernels/ proves both equal. docs/mathematics.md is the norm. */
#ifndef CADA_PIXEL_H
#define CADA_PIXEL_H

#ifdef __CUDACC_RTC__ /* NVRTC has no C library, hence no <cstdint> */
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#include <cstring>
#endif

#ifdef __CUDACC__
#define CADA_PIXEL static __host__ __device__ __forceinline__
#else
#define CADA_PIXEL static inline
#endif

namespace cada {

CADA_PIXEL uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

CADA_PIXEL float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

#ifndef __CUDA_ARCH__
/* a * b + c rounded once, without the instruction. The product of two floats is exact in double;
 * TwoSum gives what the double sum lost; the sum is then rounded to odd (its last bit says "not
 * exact"), after which narrowing to float cannot round twice (53 >= 24 + 2 bits). */
CADA_PIXEL float fused_emulated(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double addend = c;
  double sum = product + addend;
  const double seen = sum - product;
  const double lost = (product - (sum - seen)) + (addend - seen);
  uint64_t bits;
  memcpy(&bits, &sum, sizeof bits);
  /* Written with < and > so that a NaN (an infinite sum) changes nothing. */
  if ((lost > 0.0 || lost < 0.0) && (bits & 1u) == 0) {
    bits += (lost > 0.0) == (sum > 0.0) ? 1 : ~static_cast<uint64_t>(0);
  }
  memcpy(&sum, &bits, sizeof sum);
  return static_cast<float>(sum);
}
#endif

/* a * b + c, rounded once. */
CADA_PIXEL float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return fused_emulated(a, b, c);
#endif
}

/* ---- exp ---------------------------------------------------------------------------------------
 * d <= 0 -> e^d = 2^n e^r, n = round(d / ln 2), |r| <= ln 2 / 2. Degree 5, constant term exactly 1
 * so that the winner's e is exactly 1; the coefficients are a minimax fit of relative error on
 * that range after rounding to float. Over the floats tried the relative error is at most 1.96e-7, near -17,
 * where n ln 2 in one float is the larger part of it (tests/kernels/test_pixel_maths.py). */
constexpr float EXP_1 = 9.999997070e-01f;
constexpr float EXP_2 = 4.999914919e-01f;
constexpr float EXP_3 = 1.666763658e-01f;
constexpr float EXP_4 = 4.189797544e-02f;
constexpr float EXP_5 = 8.290306010e-03f;
constexpr float LOG2_E = 1.44269504f;
constexpr float LN_2 = 0.693147182f;
/* 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits. */
constexpr float ROUNDER = 12582912.0f;
/* -25 ln 2: below it a probability is under 2^-25, half a unit of the sums, and counts as nothing. */
constexpr float EXP_CUT = -17.3286796f;

CADA_PIXEL float exp_n(float d) {
  const float k = fused(d, LOG2_E, ROUNDER);
  const float n = k - ROUNDER;
  const float r = fused(n, -LN_2, d);
  float p = EXP_5;
  p = fused(p, r, EXP_4);
  p = fused(p, r, EXP_3);
  p = fused(p, r, EXP_2);
  p = fused(p, r, EXP_1);
  p = fused(p, r, 1.0f);
  const float e = float_of(bits_of(p) + (bits_of(k) << 23)); /* exact: times 2^n, n >= -25 */
  return d > EXP_CUT ? e : 0.0f;                              /* NaN gives 0 */
}

/* ---- ln ----------------------------------------------------------------------------------------
 * Any normal positive x = 2^k m, m in [sqrt 1/2, sqrt 2): Cephes logf (Moshier), coefficients and
 * the split of ln 2 (0.693359375 - 2.12194440e-4) as there. Below 1 the exponent k is negative and
 * nothing else changes. Relative error at most 8.0e-8 from 2^-126 to FLT_MAX; exactly 0 at 1.
 * LN_Tn is the coefficient of t^n. */
constexpr uint32_t SQRT_HALF_BITS = 0x3F3504F3u;
constexpr float LN_T11 = 7.0376836292e-2f;
constexpr float LN_T10 = -1.1514610310e-1f;
constexpr float LN_T9 = 1.1676998740e-1f;
constexpr float LN_T8 = -1.2420140846e-1f;
constexpr float LN_T7 = 1.4249322787e-1f;
constexpr float LN_T6 = -1.6668057665e-1f;
constexpr float LN_T5 = 2.0000714765e-1f;
constexpr float LN_T4 = -2.4999993993e-1f;
constexpr float LN_T3 = 3.3333331174e-1f;
constexpr float LN_2_HIGH = 0.693359375f;
constexpr float LN_2_LOW = -2.12194440e-4f;

CADA_PIXEL float ln_n(float x) {
  const uint32_t u = bits_of(x) - SQRT_HALF_BITS;
  const float k = static_cast<float>(static_cast<int32_t>(u) >> 23);
  const float t = float_of((u & 0x7FFFFFu) + SQRT_HALF_BITS) - 1.0f;
  const float t2 = t * t;
  float y = LN_T11;
  y = fused(y, t, LN_T10);
  y = fused(y, t, LN_T9);
  y = fused(y, t, LN_T8);
  y = fused(y, t, LN_T7);
  y = fused(y, t, LN_T6);
  y = fused(y, t, LN_T5);
  y = fused(y, t, LN_T4);
  y = fused(y, t, LN_T3);
  y = y * t;
  y = y * t2;
  y = fused(k, LN_2_LOW, y);
  y = fused(-0.5f, t2, y);
  y = t + y;
  return fused(k, LN_2_HIGH, y);
}

/* ---- fp16 --------------------------------------------------------------------------------------
 * In software, because plain x86-64 has no conversion; equal to the instructions on every input. */
constexpr uint16_t HALF_NAN = 0x7E00;
constexpr float HALF_LEAST = -65504.0f;
constexpr float LEAST_PROBABILITY = 1e-30f; /* of a `probabilities` output, before its ln */

CADA_PIXEL float float_of_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t rest = half & 0x7FFFu;
  if (rest < 0x0400u) { /* subnormal: a whole number of 2^-24, exact */
    return float_of(bits_of(static_cast<float>(rest) * 5.9604644775390625e-8f) | sign);
  }
  const uint32_t rebias = rest >= 0x7C00u ? 0x70000000u : 0x38000000u; /* infinity and NaN: to 255 */
  return float_of(sign | ((rest << 13) + rebias));
}

/* Nearest even; subnormal results are exact multiples of 2^-24, never flushed. |x| <= 65504. */
CADA_PIXEL uint16_t half_of_float(float x) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  const uint32_t size = bits_of(x) & 0x7FFFFFFFu;
  if (size < 0x38800000u) { /* under 2^-14: 0.5 + |x| rounds to the unit of 2^-24 */
    return static_cast<uint16_t>(sign | (bits_of(float_of(size) + 0.5f) - 0x3F000000u));
  }
  const uint32_t rounded = size + 0xFFFu + ((size >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

/* ---- taps --------------------------------------------------------------------------------------
 * Output index o lies at lower + weight on the input axis. The position is an exact fraction of
 * integers and is divided once; an axis of one, and everything at or past the last sample, has
 * weight 0. The upper tap is min(lower + 1, low_size - 1). Sizes stay below 2^22 (MAX_SIDE), so
 * remainder and denominator are exact floats and 1 - weight >= 2^-23: interpolating negative
 * scores then stays strictly negative, which the settled cells of fused_cpu.cpp rely on. */
constexpr int32_t MAX_SIDE = (1 << 22) - 1;

struct Tap {
  int32_t lower;
  float weight;
};

CADA_PIXEL Tap tap_of(int32_t o, int32_t size, int32_t low_size, bool align_corners) {
  int64_t numerator, denominator;
  if (align_corners) {
    numerator = size > 1 ? static_cast<int64_t>(o) * (low_size - 1) : 0;
    denominator = size > 1 ? size - 1 : 1;
  } else { /* (o + 1/2) low_size / size - 1/2 */
    numerator = (2 * static_cast<int64_t>(o) + 1) * low_size - size;
    denominator = 2 * static_cast<int64_t>(size);
    if (numerator < 0) numerator = 0;
  }
  const int64_t lower = numerator / denominator;
  if (lower >= low_size - 1) return Tap{low_size - 1, 0.0f};
  const int64_t remainder = numerator - lower * denominator;
  return Tap{static_cast<int32_t>(lower),
             static_cast<float>(remainder) / static_cast<float>(denominator)};
}

CADA_PIXEL float between(float low, float high, float weight) {
  return fused(weight, high - low, low);
}

/* ---- what a pixel counts for -------------------------------------------------------------------
 * A weighted probability as an integer of 2^-23: adding 2^23 leaves it in the low bits of the sum. */
constexpr float UNIT = 8388608.0f; /* 2^23 */
constexpr uint32_t UNIT_BITS = 0x4B000000u;
constexpr float PROBABILITY_CUT = 2.98023223876953125e-8f; /* 2^-25: p ln p counts as nothing below */

CADA_PIXEL uint32_t units_of(float value, float scale) {
  return bits_of(fused(value, scale, UNIT)) - UNIT_BITS;
}

/* 8 bins an octave from 2^-13 nats: exponent and the first three bits after the point. */
CADA_PIXEL int32_t histogram_bin(float entropy) {
  const int32_t bin = (static_cast<int32_t>(bits_of(entropy)) >> 20) - ((127 - 13) << 3);
  return bin < 0 ? 0 : bin > 127 ? 127 : bin;
}

} // namespace cada
#endif
