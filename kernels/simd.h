/* The few vector operations the fused kernel needs, for whichever instruction set this file is
 * compiled with. Arithmetic uses the compiler's own vector types, so + - * / << >> & are lane by
 * lane; what they cannot say (fused multiply-add, masks, table look-up, fp16) stands here, once for
 * each of AVX-512, AVX2 and plain x86-64. Everything is internal to the file that includes it:
 * code compiled for AVX-512 must never be shared by the linker with another processor's. */
#ifndef CADA_SIMD_H
#define CADA_SIMD_H

#include <immintrin.h>

#include "pixel.h"

namespace cada {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4))); /* where sums may wrap */

inline Floats splat(float x) { return x - Floats{}; }
inline Ints splat(int32_t x) { return x - Ints{}; }
inline Words splat(uint32_t x) { return x - Words{}; }

inline Floats load(const float *from) { return *reinterpret_cast<const Floats *>(from); }
inline Ints load(const int32_t *from) { return *reinterpret_cast<const Ints *>(from); }
inline Words load(const uint32_t *from) { return *reinterpret_cast<const Words *>(from); }
inline void store(uint32_t *to, Words x) { *reinterpret_cast<Words *>(to) = x; }
inline void store(float *to, Floats x) { *reinterpret_cast<Floats *>(to) = x; }
inline void store(int32_t *to, Ints x) { *reinterpret_cast<Ints *>(to) = x; }
inline Floats load_anywhere(const float *from) {
  Floats x;
  memcpy(&x, from, sizeof x);
  return x;
}
inline Ints load_anywhere(const int32_t *from) {
  Ints x;
  memcpy(&x, from, sizeof x);
  return x;
}
inline void store_anywhere(float *to, Floats x) { memcpy(to, &x, sizeof x); }

#if defined(__AVX512F__)

typedef __mmask16 Mask;

inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
/* a > b ? a : b, so b where either is NaN. */
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Mask greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask same(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask same(Ints a, Ints b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
inline Floats pick(Mask where, Floats yes, Floats no) {
  return _mm512_mask_mov_ps(no, where, yes);
}
inline Ints pick(Mask where, Ints yes, Ints no) {
  return (Ints)_mm512_mask_mov_epi32((__m512i)no, where, (__m512i)yes);
}
inline Floats keep(Mask where, Floats x) { return _mm512_maskz_mov_ps(where, x); }
/* Not one masked addition: GCC 12 folds it into a masked store, from which the next load of the same
 * sum cannot be forwarded. */
inline Words add_where(Mask where, Words total, Words x) {
  return total + (Words)_mm512_maskz_mov_epi32(where, (__m512i)x);
}
inline uint32_t lanes_of(Mask mask) { return mask; }
inline Mask mask_of(uint32_t lanes) { return static_cast<Mask>(lanes); }

/* row[index], index 0 .. LANES - 1. */
inline Floats choose(const float *row, Ints index) {
  return _mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(row));
}
inline Floats gather(const float *table, Ints index) {
  return _mm512_i32gather_ps((__m512i)index, table, 4);
}
inline Floats load_halves(const uint16_t *from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}
inline void store_halves(uint16_t *to, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(to),
                      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_bytes(uint8_t *to, Ints x) {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm512_cvtepi32_epi8((__m512i)x));
}

#else /* AVX2 and plain x86-64: a mask is a vector of all ones or all zeros */

typedef Ints Mask;

inline Mask greater(Floats a, Floats b) { return (Mask)(a > b); }
inline Mask at_least(Floats a, Floats b) { return (Mask)(a >= b); }
inline Mask same(Floats a, Floats b) { return (Mask)(a == b); }
inline Mask same(Ints a, Ints b) { return (Mask)(a == b); }
inline Words add_where(Mask where, Words total, Words x) { return total + (x & (Words)where); }
inline Floats keep(Mask where, Floats x) { return (Floats)((Ints)x & where); }
inline void store_bytes(uint8_t *to, Ints x) {
  for (int i = 0; i < LANES; ++i) to[i] = static_cast<uint8_t>(x[i]);
}

#if defined(__AVX2__)

inline Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats pick(Mask where, Floats yes, Floats no) {
  return _mm256_blendv_ps(no, yes, (__m256)where);
}
inline Ints pick(Mask where, Ints yes, Ints no) {
  return (Ints)_mm256_blendv_epi8((__m256i)no, (__m256i)yes, (__m256i)where);
}
inline uint32_t lanes_of(Mask mask) {
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
}
inline Mask mask_of(uint32_t lanes) {
  const Ints bit = {1, 2, 4, 8, 16, 32, 64, 128};
  return (Mask)((splat(static_cast<int32_t>(lanes)) & bit) == bit);
}
inline Floats choose(const float *row, Ints index) {
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(row), (__m256i)index);
}
inline Floats gather(const float *table, Ints index) {
  return _mm256_i32gather_ps(table, (__m256i)index, 4);
}
inline Floats load_halves(const uint16_t *from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
}
inline void store_halves(uint16_t *to, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(to),
                   _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

/* Two lanes of cada::fused_emulated: round the double sum to odd, then narrow. */
inline __m128d fused_odd(__m128d a, __m128d b, __m128d c) {
  const __m128d product = a * b;
  const __m128d sum = product + c;
  const __m128d seen = sum - product;
  const __m128d lost = (product - (sum - seen)) + (c - seen);
  const __m128d zero = _mm_setzero_pd();
  const __m128i inexact =
      _mm_castpd_si128(_mm_or_pd(_mm_cmplt_pd(lost, zero), _mm_cmpgt_pd(lost, zero)));
  const __m128i bits = _mm_castpd_si128(sum);
  const __m128i one = _mm_set1_epi64x(1);
  const __m128i even = _mm_sub_epi64(_mm_and_si128(bits, one), one); /* all ones where even */
  /* +1 where the lost part has the sign of the sum, else -1: (sign ? -1 : 0) | 1 */
  const __m128i differ = _mm_xor_si128(bits, _mm_castpd_si128(lost));
  const __m128i sign = _mm_shuffle_epi32(_mm_srai_epi32(differ, 31), _MM_SHUFFLE(3, 3, 1, 1));
  const __m128i step = _mm_and_si128(_mm_or_si128(sign, one), _mm_and_si128(inexact, even));
  return _mm_castsi128_pd(_mm_add_epi64(bits, step));
}
inline Floats fused(Floats a, Floats b, Floats c) {
  const __m128 low = _mm_cvtpd_ps(fused_odd(_mm_cvtps_pd(a), _mm_cvtps_pd(b), _mm_cvtps_pd(c)));
  const __m128 high = _mm_cvtpd_ps(
      fused_odd(_mm_cvtps_pd(_mm_movehl_ps(a, a)), _mm_cvtps_pd(_mm_movehl_ps(b, b)),
                _mm_cvtps_pd(_mm_movehl_ps(c, c))));
  return _mm_movelh_ps(low, high);
}
inline Floats larger(Floats a, Floats b) { return _mm_max_ps(a, b); }
inline Ints pick(Mask where, Ints yes, Ints no) { return (yes & where) | (no & ~where); }
inline Floats pick(Mask where, Floats yes, Floats no) {
  return (Floats)pick(where, (Ints)yes, (Ints)no);
}
inline uint32_t lanes_of(Mask mask) { return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask)); }
inline Mask mask_of(uint32_t lanes) {
  const Ints bit = {1, 2, 4, 8};
  return (Mask)((splat(static_cast<int32_t>(lanes)) & bit) == bit);
}
inline Floats gather(const float *table, Ints index) {
  return Floats{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}
inline Floats choose(const float *row, Ints index) { return gather(row, index); }
inline Floats load_halves(const uint16_t *from) {
  return Floats{float_of_half(from[0]), float_of_half(from[1]),
                float_of_half(from[2]), float_of_half(from[3])};
}
inline void store_halves(uint16_t *to, Floats x) {
  for (int i = 0; i < LANES; ++i) to[i] = half_of_float(x[i]);
}

#endif
#endif

/* cada::exp_n and cada::ln_n, lane by lane. */
inline Floats exp_n(Floats d) {
  const Floats k = fused(d, splat(LOG2_E), splat(ROUNDER));
  const Floats n = k - ROUNDER;
  const Floats r = fused(n, splat(-LN_2), d);
  Floats p = splat(EXP_5);
  p = fused(p, r, splat(EXP_4));
  p = fused(p, r, splat(EXP_3));
  p = fused(p, r, splat(EXP_2));
  p = fused(p, r, splat(EXP_1));
  p = fused(p, r, splat(1.0f));
  return keep(greater(d, splat(EXP_CUT)), (Floats)((Words)p + ((Words)k << 23)));
}

inline Floats ln_n(Floats x) {
  const Words u = (Words)x - SQRT_HALF_BITS;
  const Floats k = __builtin_convertvector((Ints)u >> 23, Floats);
  const Floats t = (Floats)((u & 0x7FFFFFu) + SQRT_HALF_BITS) - 1.0f;
  const Floats t2 = t * t;
  Floats y = splat(LN_T11);
  y = fused(y, t, splat(LN_T10));
  y = fused(y, t, splat(LN_T9));
  y = fused(y, t, splat(LN_T8));
  y = fused(y, t, splat(LN_T7));
  y = fused(y, t, splat(LN_T6));
  y = fused(y, t, splat(LN_T5));
  y = fused(y, t, splat(LN_T4));
  y = fused(y, t, splat(LN_T3));
  y = y * t;
  y = y * t2;
  y = fused(k, splat(LN_2_LOW), y);
  y = fused(splat(-0.5f), t2, y);
  y = t + y;
  return fused(k, splat(LN_2_HIGH), y);
}

} // namespace
} // namespace cada
#endif
