/* What the host side (fused_host.cpp) hands to one instruction set's code, and the table of functions
 * each instruction set offers. Plain data only: nothing here may bring inline library code into a
 * file that is compiled for a processor we may not be running on. */
#ifndef CADA_WORK_H
#define CADA_WORK_H

#include <cstddef>

#include "cada_fused.h"
#include "pixel.h"

namespace cada {

constexpr int MAX_BLOCK = 64;    /* no instruction set looks at more pixels at once */
constexpr int MAX_BAND_ROWS = 16; /* low-resolution rows a worker keeps widened */

/* Where every output index lies on an input axis. The arrays go on for MAX_BLOCK entries that repeat
 * the last one, so that a whole block may be read at the edge of the image. */
struct Axis {
  const int32_t *lower;
  const float *weight;
  int32_t size, low_size;
};

/* Rows of one frame, taken by workers a few at a time; which worker took which cannot matter,
 * because everything that is added up is an integer. */
struct Queue {
  int64_t next, size, step;

  bool take(int64_t *begin, int64_t *end) {
    *begin = __atomic_fetch_add(&next, step, __ATOMIC_RELAXED);
    if (*begin >= size) return false;
    *end = size - *begin < step ? size : *begin + step;
    return true;
  }
};

struct Frame {
  cada_frame given;
  Axis x, y;
  Queue *rows;
};

/* One worker's counts. pixels (C), sums (C, C), histogram (C, bins) may be shared in shape with the
 * caller's; the host adds workers together. */
struct Evidence {
  int64_t *pixels, *sums, *histogram;
  int64_t invalid, masked;
};

struct Maps { /* full-size outputs, each may be null */
  uint8_t *labels;
  float *entropy, *confidence;
};

struct Kept { /* select: (C) each; count: selected is (rules, C) and predicted is null */
  int64_t *predicted, *selected;
  int64_t invalid, masked;
};

struct Raw { /* what encode reads: (frames, classes, pixels) */
  const void *values;
  int32_t dtype, meaning, classes;
  int64_t frames, pixels;
  uint16_t *encoded;
  Queue *pieces; /* of frames * pieces_per_frame pieces of PIECE pixels */
};
constexpr int64_t PIECE = 4096;

/* All memory a worker needs is `scratch`, 64-byte aligned and zeroed, of scratch_bytes(frame). */
struct InstructionSet {
  const char *name;
  size_t (*scratch_bytes)(const Frame &frame);
  void (*encode)(const Raw &raw);
  void (*accumulate)(const Frame &frame, int32_t weighting, const Maps &maps, Evidence &evidence,
                     char *scratch);
  void (*count)(const Frame &frame, const cada_rule *rules, int32_t rule_count, Kept &kept,
                char *scratch);
  void (*select)(const Frame &frame, const cada_rule &rule, const Maps &maps, Kept &kept,
                 char *scratch);
};

extern const InstructionSet SCALAR;
#if defined(__x86_64__)
extern const InstructionSet AVX512, AVX2, BASELINE;
#endif

} // namespace cada
#endif
