/* C ABI of the fused kernels. Plain pointers and integers, no exceptions, no globals that matter.
 *
 * Every function returns 0 (CADA_OK) or an error code whose sentence cada_error_text gives.
 * Mathematics and bits: docs/mathematics.md. Frames are one image each; all buffers are the caller's. */
#ifndef CADA_FUSED_H
#define CADA_FUSED_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { CADA_OK = 0, CADA_BAD_ARGUMENT = 1, CADA_NO_MEMORY = 2, CADA_UNSUPPORTED_ISA = 3 };
enum { CADA_ORDER_LOGITS = 0, CADA_ORDER_PROBS = 1 };
enum { CADA_WEIGHT_CONFIDENCE = 0, CADA_WEIGHT_MEAN = 1 };
enum { CADA_FLOAT32 = 0, CADA_FLOAT16 = 1 };
enum { CADA_LOGITS = 0, CADA_PROBABILITIES = 1 };
enum { CADA_ENTROPY = 0, CADA_CONFIDENCE = 1, CADA_MARGIN = 2, CADA_RATIO = 3 };
enum { CADA_LT = 0, CADA_LE = 1, CADA_GT = 2, CADA_GE = 3 };
enum { CADA_UNSELECTED = 255, CADA_HISTOGRAM_BINS = 128 };

typedef struct cada_frame {
  const uint16_t *scores;      /* (classes, low_height, low_width) fp16 bits, NaN = invalid pixel */
  const uint8_t *mask;         /* (height, width), nonzero = left out; or NULL */
  int32_t classes;             /* 1..255 */
  int32_t low_height, low_width;
  int32_t height, width;       /* label or statistics grid */
  int32_t align_corners;       /* 0 or 1 */
  int32_t order;               /* CADA_ORDER_* */
} cada_frame;

typedef struct cada_rule {
  const float *thresholds;     /* (classes), NaN = nothing of this class */
  const float *class_weights;  /* (classes) for CADA_RATIO, else NULL */
  int32_t measure;             /* CADA_ENTROPY .. CADA_RATIO */
  int32_t comparator;          /* CADA_LT .. CADA_GE: measure OP threshold */
} cada_rule;

/* (frames, classes, pixels) float32 or float16 -> centred fp16 of the same shape. */
int cada_encode(const void *raw, int32_t dtype, int32_t meaning, int64_t frames, int32_t classes,
                int64_t pixels, uint16_t *encoded, int32_t threads);

/* Adds to pixels (C), sums (C, C), histogram (C, 128), invalid, masked. labels (H, W) and entropy
 * (H, W) may be NULL. */
int cada_accumulate(const cada_frame *frame, int32_t weighting, int32_t threads, int64_t *pixels,
                    int64_t *sums, int64_t *histogram, int64_t *invalid, int64_t *masked,
                    uint8_t *labels, float *entropy);

/* selected (rules, C): how many pixels each rule would keep. */
int cada_count(const cada_frame *frame, const cada_rule *rules, int32_t rule_count, int32_t threads,
               int64_t *selected);

/* labels (H, W); predicted (C), selected (C); entropy and confidence (H, W) may be NULL. */
int cada_select(const cada_frame *frame, const cada_rule *rule, int32_t threads, uint8_t *labels,
                int64_t *predicted, int64_t *selected, int64_t *invalid, int64_t *masked,
                float *entropy, float *confidence);

/* "avx512", "avx2", "baseline", "neon" or "scalar" (the oracle of the bits, one pixel at a time). */
const char *cada_isa(void);
/* Choose by name; NULL or "" = the best this processor has. CADA_UNSUPPORTED_ISA if it cannot. */
int cada_choose_isa(const char *name);
const char *cada_error_text(int code);
int cada_abi_version(void);

#ifdef __cplusplus
}
#endif
#endif
