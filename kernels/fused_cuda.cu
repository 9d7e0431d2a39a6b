/* The fused kernels on a GPU: encode, soften, accumulate, count, select, for a batch of frames.
 *
 * The bits are those of fused_scalar.cpp: float32 in the normative order, every fused multiply-add
 * through pixel.h (compile with -fmad=false, precise division, no flushing), sums that are integers.
 * Compiles with nvcc, with NVRTC (no C library) and, for tests, with g++ through tests/cuda_executor.
 * CADA_CLASSES is the number of classes, 1 to 64: everything of a pixel stays in registers; or 0:
 * the number is given at run time, up to 255, and values are computed again where they are needed.
 *
 * One thread takes one output column through a *row group*: consecutive output rows between the same
 * two low-resolution rows, so that the horizontal interpolation is done once for all of them. A
 * group has at most 15 rows: the 23-bit units of 32 lanes x 15 rows then fit 32 bits. */
#include "pixel.h"

#ifndef CADA_CLASSES
#error "CADA_CLASSES: the number of classes, or 0 for any number"
#endif

namespace cada {

constexpr int FIXED = CADA_CLASSES;
static_assert(FIXED >= 0 && FIXED <= 64, "more than 64 classes take CADA_CLASSES=0");
/* Above 32 classes the running sums of a thread lie in its own column of shared memory (64 classes
 * x 64 threads x 4 bytes = 16 KiB), or they would spill. */
constexpr bool SUMS_IN_REGISTERS = FIXED <= 32;
constexpr bool SUMS_OF_BLOCK = FIXED >= 1 && FIXED <= 32; /* else straight to global memory */
constexpr int THREADS = FIXED <= 32 ? 128 : 64;
constexpr int BINS = 128;
constexpr unsigned ALL = 0xFFFFFFFFu;
enum { ENTROPY = 0, CONFIDENCE = 1, MARGIN = 2, RATIO = 3 }; /* as cada_fused.h */
enum { LT = 0, LE = 1, GT = 2, GE = 3 };
constexpr int UNSELECTED = 255;

typedef unsigned long long Count;

#define EACH_CLASS(c) _Pragma("unroll") for (int c = 0; c < (FIXED ? FIXED : classes); ++c)

/* ---- what the processor has instructions for ---- */

__device__ __forceinline__ float widened(uint16_t half) {
#ifdef __CUDA_ARCH__
  float x; /* exact for every finite half; the others are never used as numbers */
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
  return x;
#else
  return float_of_half(half);
#endif
}

__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  return __frcp_rn(x); /* correctly rounded, as 1 / x is */
#else
  return 1.0f / x;
#endif
}

__device__ __forceinline__ float larger(float a, float b) {
#ifdef __CUDA_ARCH__
  return fmaxf(a, b);
#else
  return a > b ? a : b;
#endif
}

__device__ __forceinline__ bool finite(float x) {
  return (bits_of(x) & 0x7F800000u) != 0x7F800000u;
}

__device__ __forceinline__ uint32_t warp_sum(uint32_t x) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  return __reduce_add_sync(ALL, x);
#else
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(ALL, x, step);
  return x;
#endif
}

/* ---- where a thread stands ---- */

struct Shape {
  int classes, low_height, low_width, height, width;
};

struct Axes { /* taps of every output row and column; group g holds rows group_rows[g] .. [g + 1] */
  const int32_t *y_lower, *x_lower, *group_rows;
  const float *y_weight, *x_weight;
  int groups;
};

struct Place {
  int64_t frame;
  int x, first_row, end_row;
  bool inside; /* threads past the last column repeat it, so that whole warps vote */

  __device__ __forceinline__ Place(const Shape &shape, const Axes &axes) {
    const int columns = (shape.width + THREADS - 1) / THREADS;
    const unsigned block = blockIdx.x / columns;
    const int column = static_cast<int>(blockIdx.x % columns) * THREADS + threadIdx.x;
    inside = column < shape.width;
    x = inside ? column : shape.width - 1;
    frame = block / axes.groups;
    first_row = axes.group_rows[block % axes.groups];
    end_row = axes.group_rows[block % axes.groups + 1];
  }
};

/* ---- one column of a cell: what lies between four taps ---- */

__device__ __forceinline__ float value_at(const uint16_t *from, int64_t at) {
  return widened(from[at]);
}
__device__ __forceinline__ float value_at(const float *from, int64_t at) { return from[at]; }

template <class Value> struct Taps {
  const Value *upper, *lower; /* of the frame's class 0 */
  int64_t plane;
  int left, right;
  float weight;

  __device__ __forceinline__ Taps(const Value *scores, const Shape &shape, const Axes &axes,
                                  const Place &at) {
    plane = static_cast<int64_t>(shape.low_height) * shape.low_width;
    const int row = axes.y_lower[at.first_row];
    const int next = row + 1 < shape.low_height ? row + 1 : row;
    const Value *const frame = scores + at.frame * shape.classes * plane;
    upper = frame + static_cast<int64_t>(row) * shape.low_width;
    lower = frame + static_cast<int64_t>(next) * shape.low_width;
    left = axes.x_lower[at.x];
    right = left + 1 < shape.low_width ? left + 1 : left;
    weight = axes.x_weight[at.x];
  }
  __device__ __forceinline__ void read(int c, float *four) const {
    four[0] = value_at(upper, c * plane + left);
    four[1] = value_at(upper, c * plane + right);
    four[2] = value_at(lower, c * plane + left);
    four[3] = value_at(lower, c * plane + right);
  }
};

/* Horizontal first: u = fma(fy, low - high, high). Settled: one class is 0 at all four taps and every
 * other one below 0 at each; then the maximum is exactly 0 everywhere between them. */
template <class Value, int C> struct Cell {
  float upper[C], rise[C];
  bool valid, settled;
  int winner;

  __device__ __forceinline__ Cell(const Taps<Value> &taps, int) {
    float spoilt = 0.0f; /* 0 times what is not finite is NaN, and stays it */
    int not_below = 0;
    winner = 0;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      float four[4];
      taps.read(c, four);
#pragma unroll
      for (int k = 0; k < 4; ++k) spoilt = fused(four[k], 0.0f, spoilt);
      const bool below =
          larger(larger(four[0], four[1]), larger(four[2], four[3])) < 0.0f;
      not_below += !below;
      winner = below ? winner : c;
      upper[c] = between(four[0], four[1], taps.weight);
      rise[c] = between(four[2], four[3], taps.weight) - upper[c];
    }
    float four[4]; /* the winner's again: cheaper than to look for zeros at every class */
    taps.read(winner, four);
    valid = spoilt == 0.0f;
    settled = not_below == 1 && four[0] == 0.0f && four[1] == 0.0f && four[2] == 0.0f &&
              four[3] == 0.0f;
  }
  __device__ __forceinline__ float at(int c, float fy) const {
    return fused(fy, rise[c], upper[c]);
  }
};

template <class Value> struct Cell<Value, 0> {
  const Taps<Value> &taps;
  bool valid, settled;
  int winner;

  __device__ __forceinline__ Cell(const Taps<Value> &given, int classes)
      : taps(given), valid(true), settled(false), winner(0) {
    for (int c = 0; c < classes; ++c) {
      float four[4];
      taps.read(c, four);
      for (int k = 0; k < 4; ++k) valid &= finite(four[k]);
    }
  }
  __device__ __forceinline__ float at(int c, float fy) const {
    float four[4];
    taps.read(c, four);
    const float high = between(four[0], four[1], taps.weight);
    return fused(fy, between(four[2], four[3], taps.weight) - high, high);
  }
};

/* ---- one pixel ---- */

/* What stands for e_c (logits) or p_c (probs): kept where the class count is fixed. */
template <int C> struct Kept {
  float value[C];
  __device__ __forceinline__ void keep(int c, float x) { value[c] = x; }
};
template <> struct Kept<0> {
  __device__ __forceinline__ void keep(int, float) {}
};

template <class Value> struct Pixel {
  static constexpr bool PROBS = sizeof(Value) == sizeof(float);
  const Cell<Value, FIXED> &cell;
  Kept<FIXED> kept;
  float fy, top, entropy, confidence, scale;
  int label;

  /* all_settled is the same for the whole warp, so that it does not part here. */
  __device__ __forceinline__ Pixel(const Cell<Value, FIXED> &in, float weight, int classes,
                                   bool all_settled)
      : cell(in), fy(weight) {
    label = in.winner;
    top = 0.0f;
    if (!all_settled) {
      label = 0;
      top = cell.at(0, fy);
      EACH_CLASS(c) {
        const float u = cell.at(c, fy);
        const bool larger = u > top;
        top = larger ? u : top;
        label = larger ? c : label;
      }
    }
    if (PROBS) {
      float sum = 0.0f;
      EACH_CLASS(c) {
        const float p = cell.at(c, fy);
        kept.keep(c, p);
        if (p >= PROBABILITY_CUT) sum = fused(p, ln_n(p), sum);
      }
      entropy = 0.0f - sum;
      confidence = top;
      scale = 1.0f;
      return;
    }
    float s0 = 0.0f, s1 = 0.0f;
    EACH_CLASS(c) {
      const float d = cell.at(c, fy) - top;
      const float e = exp_n(d);
      kept.keep(c, e);
      s0 += e;
      s1 = fused(d, e, s1);
    }
    const float inverse = reciprocal(s0);
    entropy = fused(-s1, inverse, ln_n(s0));
    confidence = inverse;
    scale = inverse;
  }

  __device__ __forceinline__ float probability(int c) const { /* times scale */
#if CADA_CLASSES > 0
    return kept.value[c];
#else
    const float u = cell.at(c, fy);
    return PROBS ? u : exp_n(u - top);
#endif
  }
};

/* ---- class sums ---- */

/* Adds to 64 bits that lie in two words of shared memory: exact, and the second word is rarely
 * touched. */
__device__ __forceinline__ void add_wide(uint32_t *low, uint32_t *high, uint32_t x) {
  const uint32_t before = atomicAdd(low, x);
  if (before + x < before) atomicAdd(high, 1u);
}

/* The running sums of a thread while its label stays the same, and where they go. Units carry their
 * 2^23 along (UNIT_BITS a pixel), which is taken off when they leave. */
struct RunningSums {
  uint32_t own[SUMS_IN_REGISTERS && FIXED ? FIXED : 1];
  uint32_t *column; /* of shared memory, THREADS apart; where registers do not suffice */
  uint32_t *low, *high;
  Count *sums; /* (C, C) of the frame */
  int label = 0, pixels = 0;

  __device__ __forceinline__ uint32_t &at(int c) {
    return SUMS_IN_REGISTERS ? own[c] : column[c * THREADS];
  }
  __device__ __forceinline__ void clear(int classes) {
    pixels = 0;
    if (FIXED) {
      EACH_CLASS(c) at(c) = 0;
    }
  }
  /* Called by whole warps. The lanes that `leave` give what they hold, label by label. */
  template <class Units>
  __device__ __forceinline__ void give(bool leave, int classes, const Units &units) {
    const int lane = threadIdx.x & 31;
    unsigned left = __ballot_sync(ALL, leave);
    while (left) {
      const int of = __shfl_sync(ALL, label, __ffs(left) - 1);
      const bool mine = leave && label == of;
      left &= ~__ballot_sync(ALL, mine);
      uint32_t total = 0;
      EACH_CLASS(c) {
        const uint32_t sum = warp_sum(mine ? units(c) : 0u);
        if (lane == (c & 31)) total = sum;
        if ((c & 31) == 31 || c == (FIXED ? FIXED : classes) - 1) {
          const int own_class = (c & ~31) + lane;
          if (own_class <= c && total) add(of, own_class, classes, total);
          total = 0;
        }
      }
    }
    if (leave) clear(classes);
  }
  __device__ __forceinline__ void add(int of, int c, int classes, uint32_t total) {
    const int at_sum = of * classes + c;
    if (SUMS_OF_BLOCK) {
      add_wide(low + at_sum, high + at_sum, total);
    } else {
      atomicAdd(sums + at_sum, static_cast<Count>(total));
    }
  }
};

/* Runs of one (label, bin): a column often stays in it for several rows. */
struct RunningBin {
  uint32_t *of_block; /* (C, BINS), or */
  Count *of_frame;
  int bin = 0;
  uint32_t count = 0;

  __device__ __forceinline__ void leave() {
    if (!count) return;
    if (SUMS_OF_BLOCK) {
      atomicAdd(of_block + bin, count);
    } else {
      atomicAdd(of_frame + bin, static_cast<Count>(count));
    }
    count = 0;
  }
  __device__ __forceinline__ void add(int next) {
    if (next != bin) leave();
    bin = next;
    ++count;
  }
};

/* ---- accumulate ---- */

template <class Value>
__device__ __forceinline__ void accumulate(const Value *scores, const uint8_t *mask,
                                           const Shape &shape, const Axes &axes,
                                           bool weigh_by_confidence, Count *sums, Count *histogram,
                                           Count *left_out, uint8_t *labels, float *entropy) {
  constexpr int SIZE = SUMS_OF_BLOCK ? FIXED : 1;
  __shared__ uint32_t low[SIZE * SIZE], high[SIZE * SIZE], bins[SIZE * BINS];
  __shared__ uint32_t columns[SUMS_IN_REGISTERS ? 1 : FIXED * THREADS];
  const int classes = shape.classes;
  if (SUMS_OF_BLOCK) {
    for (int i = threadIdx.x; i < SIZE * SIZE; i += THREADS) low[i] = high[i] = 0;
    for (int i = threadIdx.x; i < SIZE * BINS; i += THREADS) bins[i] = 0;
    __syncthreads();
  }
  const Place at(shape, axes);
  const Taps<Value> taps(scores, shape, axes, at);
  const Cell<Value, FIXED> cell(taps, classes);
  const bool all_settled =
      !Pixel<Value>::PROBS && __all_sync(ALL, FIXED && cell.valid && cell.settled);
  Count *const frame_sums = sums + at.frame * classes * classes;
  Count *const frame_bins = histogram + at.frame * classes * BINS;

  RunningSums running;
  running.column = columns + (SUMS_IN_REGISTERS ? 0 : threadIdx.x);
  running.low = low;
  running.high = high;
  running.sums = frame_sums;
  running.clear(classes);
  RunningBin in_bin{bins, frame_bins};
  uint32_t invalid = 0, masked = 0;
  const auto held = [&](int c) {
    return running.at(c) - static_cast<uint32_t>(running.pixels) * UNIT_BITS;
  };
  for (int y = at.first_row; y < at.end_row; ++y) {
    const Pixel<Value> pixel(cell, axes.y_weight[y], classes, all_settled);
    const int64_t in_frame = static_cast<int64_t>(y) * shape.width + at.x;
    const int64_t out = at.frame * shape.height * shape.width + in_frame;
    const bool out_masked = at.inside && mask && mask[in_frame];
    const bool live = at.inside && cell.valid && !out_masked;
    masked += out_masked;
    invalid += at.inside && !out_masked && !cell.valid;
    if (at.inside && labels) labels[out] = static_cast<uint8_t>(live ? pixel.label : UNSELECTED);
    if (at.inside && entropy) {
      entropy[out] = cell.valid ? pixel.entropy : float_of(0x7FC00000u);
    }
    const float k = (weigh_by_confidence ? pixel.confidence : 1.0f) * pixel.scale * UNIT;
    if (FIXED == 0) {
      running.label = pixel.label;
      running.give(live, classes,
                   [&](int c) { return units_of(pixel.probability(c), k); });
    } else {
      const bool leave = live && running.pixels && running.label != pixel.label;
      if (__any_sync(ALL, leave)) running.give(leave, classes, held);
      if (live) {
        running.label = pixel.label;
        ++running.pixels;
        EACH_CLASS(c) running.at(c) += bits_of(fused(pixel.probability(c), k, UNIT));
      }
    }
    if (live) in_bin.add(pixel.label * BINS + histogram_bin(pixel.entropy));
  }
  if (FIXED) running.give(running.pixels > 0, classes, held);
  in_bin.leave();
  invalid = warp_sum(invalid);
  masked = warp_sum(masked);
  if ((threadIdx.x & 31) == 0) {
    if (invalid) atomicAdd(left_out + 2 * at.frame, static_cast<Count>(invalid));
    if (masked) atomicAdd(left_out + 2 * at.frame + 1, static_cast<Count>(masked));
  }
  if (!SUMS_OF_BLOCK) return;
  __syncthreads();
  for (int i = threadIdx.x; i < SIZE * SIZE; i += THREADS) {
    const Count sum = static_cast<Count>(high[i]) << 32 | low[i];
    if (sum) atomicAdd(frame_sums + i, sum);
  }
  for (int i = threadIdx.x; i < SIZE * BINS; i += THREADS) {
    if (bins[i]) atomicAdd(frame_bins + i, static_cast<Count>(bins[i]));
  }
}

/* ---- count and select ---- */

struct RuleGiven {
  const float *thresholds, *class_weights;
  int measure, comparator;
};

struct Judged {
  int label;
  float measure, confidence;
};

template <class Value>
__device__ __forceinline__ Judged judge(const Pixel<Value> &pixel, int classes,
                                        const RuleGiven &rule) {
  Judged judged{pixel.label, pixel.confidence, pixel.confidence};
  if (rule.measure == ENTROPY) judged.measure = pixel.entropy;
  if (rule.measure == MARGIN) {
    float second = 0.0f; /* one class alone has a runner-up of 0 */
    EACH_CLASS(c) {
      const float p = pixel.probability(c);
      if (c != pixel.label && p > second) second = p;
    }
    judged.measure = pixel.confidence - second * pixel.scale;
  }
  if (rule.measure == RATIO) {
    EACH_CLASS(c) {
      const float p = pixel.probability(c) * pixel.scale;
      const float ratio = p / rule.class_weights[c];
      if (c == 0 || ratio > judged.measure) judged = Judged{c, ratio, p};
    }
  }
  return judged;
}

__device__ __forceinline__ bool passes(const RuleGiven &rule, const Judged &judged) {
  const float threshold = rule.thresholds[judged.label];
  switch (rule.comparator) {
  case LT: return judged.measure < threshold;
  case LE: return judged.measure <= threshold;
  case GT: return judged.measure > threshold;
  default: return judged.measure >= threshold;
  }
}

/* One more at counts[where] for every lane that says so; called by whole warps. */
__device__ __forceinline__ void tally(Count *counts, bool counted, int where) {
  const unsigned same = __match_any_sync(ALL, counted ? where : -1);
  if (counted && static_cast<int>(threadIdx.x & 31) == __ffs(same) - 1) {
    atomicAdd(counts + where, static_cast<Count>(__popc(same)));
  }
}

template <class Value>
__device__ __forceinline__ void count(const Value *scores, const uint8_t *mask, const Shape &shape,
                                      const Axes &axes, const float *thresholds,
                                      const float *class_weights, const int32_t *kinds, int rules,
                                      Count *selected) {
  const int classes = shape.classes;
  const Place at(shape, axes);
  const Taps<Value> taps(scores, shape, axes, at);
  const Cell<Value, FIXED> cell(taps, classes);
  for (int y = at.first_row; y < at.end_row; ++y) {
    const Pixel<Value> pixel(cell, axes.y_weight[y], classes, false);
    const int64_t in_frame = static_cast<int64_t>(y) * shape.width + at.x;
    const bool live = at.inside && cell.valid && !(mask && mask[in_frame]);
    for (int r = 0; r < rules; ++r) {
      const RuleGiven rule{thresholds + r * classes, class_weights + r * classes, kinds[2 * r],
                           kinds[2 * r + 1]};
      const Judged judged = judge(pixel, classes, rule);
      tally(selected + (at.frame * rules + r) * classes, live && passes(rule, judged),
            judged.label);
    }
  }
}

template <class Value>
__device__ __forceinline__ void select(const Value *scores, const uint8_t *mask, const Shape &shape,
                                       const Axes &axes, const RuleGiven &rule, uint8_t *labels,
                                       Count *predicted, Count *selected, Count *left_out,
                                       float *entropy, float *confidence) {
  const int classes = shape.classes;
  const Place at(shape, axes);
  const Taps<Value> taps(scores, shape, axes, at);
  const Cell<Value, FIXED> cell(taps, classes);
  const float nan = float_of(0x7FC00000u);
  uint32_t invalid = 0, masked = 0;
  for (int y = at.first_row; y < at.end_row; ++y) {
    const Pixel<Value> pixel(cell, axes.y_weight[y], classes, false);
    const Judged judged = judge(pixel, classes, rule);
    const int64_t in_frame = static_cast<int64_t>(y) * shape.width + at.x;
    const int64_t out = at.frame * shape.height * shape.width + in_frame;
    const bool out_masked = at.inside && mask && mask[in_frame];
    const bool live = at.inside && cell.valid && !out_masked;
    const bool keep = live && passes(rule, judged);
    masked += out_masked;
    invalid += at.inside && !out_masked && !cell.valid;
    tally(predicted + at.frame * classes, live, judged.label);
    tally(selected + at.frame * classes, keep, judged.label);
    if (!at.inside) continue;
    labels[out] = static_cast<uint8_t>(keep ? judged.label : UNSELECTED);
    if (entropy) entropy[out] = cell.valid ? pixel.entropy : nan;
    if (confidence) confidence[out] = cell.valid ? judged.confidence : nan;
  }
  invalid = warp_sum(invalid);
  masked = warp_sum(masked);
  if ((threadIdx.x & 31) == 0) {
    if (invalid) atomicAdd(left_out + 2 * at.frame, static_cast<Count>(invalid));
    if (masked) atomicAdd(left_out + 2 * at.frame + 1, static_cast<Count>(masked));
  }
}

__device__ __forceinline__ float raw_at(const void *raw, bool halves, int64_t at) {
  return halves ? float_of_half(static_cast<const uint16_t *>(raw)[at])
                : static_cast<const float *>(raw)[at];
}

} // namespace cada

using namespace cada;

#define SHAPE_ARGUMENTS                                                                            \
  int classes, int low_height, int low_width, int height, int width, const int32_t *y_lower,       \
      const float *y_weight, const int32_t *x_lower, const float *x_weight,                        \
      const int32_t *group_rows, int groups
#define SHAPE Shape{classes, low_height, low_width, height, width}
#define AXES Axes{y_lower, x_lower, group_rows, y_weight, x_weight, groups}
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)

/* raw (frames, C, pixels) float32, or float16 where `halves`; one thread a low-resolution pixel. */
extern "C" __global__ void cada_encode(const void *raw, int halves, int probabilities,
                                       long long frames, int classes, long long pixels,
                                       uint16_t *encoded) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= frames * pixels) return;
  const int64_t first = i / pixels * classes * pixels + i % pixels;
  const float infinity = float_of(0x7F800000u);
  const auto score = [&](int c) {
    const float z = raw_at(raw, halves != 0, first + c * pixels);
    return probabilities ? ln_n(z > LEAST_PROBABILITY ? z : LEAST_PROBABILITY) : z;
  };
  float m = -infinity;
  bool valid = true;
  for (int c = 0; c < classes; ++c) {
    valid &= raw_at(raw, halves != 0, first + c * pixels) < infinity; /* false for NaN, too */
    const float z = score(c);
    m = z > m ? z : m;
  }
  valid &= m > -infinity;
  for (int c = 0; c < classes; ++c) {
    const float s = score(c) - m;
    encoded[first + c * pixels] = valid ? half_of_float(s > HALF_LEAST ? s : HALF_LEAST) : HALF_NAN;
  }
}

/* Order `probs`: the softmax at low resolution, in float32; NaN where a class is not finite. */
extern "C" __global__ void cada_soften(const uint16_t *scores, long long frames, int classes,
                                       long long pixels, float *probabilities) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= frames * pixels) return;
  const int64_t first = i / pixels * classes * pixels + i % pixels;
  const auto score = [&](int c) { return widened(scores[first + c * pixels]); };
  float m = score(0), s0 = 0.0f;
  bool valid = true;
  for (int c = 0; c < classes; ++c) {
    valid &= (scores[first + c * pixels] & 0x7C00u) != 0x7C00u;
    m = score(c) > m ? score(c) : m;
  }
  for (int c = 0; c < classes; ++c) s0 += exp_n(score(c) - m);
  const float inverse = reciprocal(s0);
  for (int c = 0; c < classes; ++c) {
    const float p = exp_n(score(c) - m) * inverse;
    probabilities[first + c * pixels] = valid ? p : float_of(0x7FC00000u);
  }
}

/* One launch for a batch. sums (N, C, C), histogram (N, C, 128) and left_out (N, 2: invalid, masked)
 * are added to; labels and entropy (N, H, W) and mask (H, W) may be null. A class's pixels are the
 * sum of its histogram. probabilities is null for order `logits`, else what cada_soften made. */
KERNEL cada_accumulate(const uint16_t *scores, const float *probabilities, const uint8_t *mask,
                       SHAPE_ARGUMENTS, int weigh_by_confidence, Count *sums, Count *histogram,
                       Count *left_out, uint8_t *labels, float *entropy) {
  if (probabilities) {
    accumulate(probabilities, mask, SHAPE, AXES, weigh_by_confidence != 0, sums, histogram,
               left_out, labels, entropy);
  } else {
    accumulate(scores, mask, SHAPE, AXES, weigh_by_confidence != 0, sums, histogram, left_out,
               labels, entropy);
  }
}

/* thresholds and class_weights (R, C), kinds (R, 2: measure, comparator), selected (N, R, C). */
KERNEL cada_count(const uint16_t *scores, const float *probabilities, const uint8_t *mask,
                  SHAPE_ARGUMENTS, const float *thresholds, const float *class_weights,
                  const int32_t *kinds, int rules, Count *selected) {
  if (probabilities) {
    count(probabilities, mask, SHAPE, AXES, thresholds, class_weights, kinds, rules, selected);
  } else {
    count(scores, mask, SHAPE, AXES, thresholds, class_weights, kinds, rules, selected);
  }
}

/* labels (N, H, W); predicted and selected (N, C), left_out (N, 2) are added to; entropy and
 * confidence (N, H, W) may be null. */
KERNEL cada_select(const uint16_t *scores, const float *probabilities, const uint8_t *mask,
                   SHAPE_ARGUMENTS, const float *thresholds, const float *class_weights,
                   int measure, int comparator, uint8_t *labels, Count *predicted, Count *selected,
                   Count *left_out, float *entropy, float *confidence) {
  const RuleGiven rule{thresholds, class_weights, measure, comparator};
  if (probabilities) {
    select(probabilities, mask, SHAPE, AXES, rule, labels, predicted, selected, left_out, entropy,
           confidence);
  } else {
    select(scores, mask, SHAPE, AXES, rule, labels, predicted, selected, left_out, entropy,
           confidence);
  }
}
