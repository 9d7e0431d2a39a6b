/* The oracle of the bits: one output pixel at a time, in the normative order, nothing clever.
 *
 * It is what a reader checks against docs/mathematics.md and what every fast kernel must equal. */
#include "work.h"

namespace cada {
namespace {

struct Pixel {
  bool valid;
  int label;
  float entropy, confidence;
  const float *probability; /* (C): e_c before the division by their sum (logits), or p_c (probs) */
  float scale;              /* probability[c] * scale = p_c */
};

/* Scores of one low-resolution position, widened. False if any class is not finite. */
bool scores_at(const cada_frame &frame, int row, int column, float *scores) {
  const int64_t plane = static_cast<int64_t>(frame.low_height) * frame.low_width;
  const uint16_t *from = frame.scores + static_cast<int64_t>(row) * frame.low_width + column;
  bool valid = true;
  for (int c = 0; c < frame.classes; ++c) {
    const uint16_t half = from[c * plane];
    valid &= (half & 0x7C00u) != 0x7C00u;
    scores[c] = float_of_half(half);
  }
  return valid;
}

/* scores -> probabilities, in place: m, d, e, S0 in class order, one division, one product each. */
void softmax(float *scores, int classes) {
  float m = scores[0];
  for (int c = 1; c < classes; ++c) m = scores[c] > m ? scores[c] : m;
  float s0 = 0.0f;
  for (int c = 0; c < classes; ++c) {
    scores[c] = exp_n(scores[c] - m);
    s0 += scores[c];
  }
  const float inv = 1.0f / s0;
  for (int c = 0; c < classes; ++c) scores[c] *= inv;
}

int first_largest(const float *u, int classes) {
  int y = 0;
  for (int c = 1; c < classes; ++c) {
    if (u[c] > u[y]) y = c;
  }
  return y;
}

/* work holds 4 classes: the four taps, the first of which becomes the pixel's own. */
Pixel pixel_at(const Frame &frame, int row, int column, float *work) {
  const cada_frame &given = frame.given;
  const int classes = given.classes;
  const int y0 = frame.y.lower[row], x0 = frame.x.lower[column];
  const int y1 = y0 + 1 < given.low_height ? y0 + 1 : y0;
  const int x1 = x0 + 1 < given.low_width ? x0 + 1 : x0;
  float *const u = work;
  float *const taps[4] = {work, work + classes, work + 2 * classes, work + 3 * classes};

  Pixel pixel{};
  pixel.valid = scores_at(given, y0, x0, taps[0]);
  pixel.valid &= scores_at(given, y0, x1, taps[1]);
  pixel.valid &= scores_at(given, y1, x0, taps[2]);
  pixel.valid &= scores_at(given, y1, x1, taps[3]);
  pixel.probability = u;
  pixel.entropy = pixel.confidence = float_of(0x7FC00000u);
  if (!pixel.valid) return pixel;

  const bool probs = given.order == CADA_ORDER_PROBS;
  if (probs) {
    for (float *tap : taps) softmax(tap, classes);
  }
  const float fx = frame.x.weight[column], fy = frame.y.weight[row];
  for (int c = 0; c < classes; ++c) {
    u[c] = between(between(taps[0][c], taps[1][c], fx), between(taps[2][c], taps[3][c], fx), fy);
  }
  pixel.label = first_largest(u, classes);

  if (probs) {
    float sum = 0.0f;
    for (int c = 0; c < classes; ++c) {
      if (u[c] >= PROBABILITY_CUT) sum = fused(u[c], ln_n(u[c]), sum);
    }
    pixel.entropy = 0.0f - sum;
    pixel.confidence = u[pixel.label];
    pixel.scale = 1.0f;
    return pixel;
  }
  const float m = u[pixel.label];
  float s0 = 0.0f, s1 = 0.0f;
  for (int c = 0; c < classes; ++c) {
    const float d = u[c] - m;
    u[c] = exp_n(d);
    s0 += u[c];
    s1 = fused(d, u[c], s1);
  }
  const float inv = 1.0f / s0;
  pixel.entropy = fused(-s1, inv, ln_n(s0));
  pixel.confidence = inv;
  pixel.scale = inv;
  return pixel;
}

bool masked_at(const cada_frame &frame, int64_t at) {
  return frame.mask != nullptr && frame.mask[at] != 0;
}

void accumulate(const Frame &frame, int32_t weighting, const Maps &maps, Evidence &evidence,
                char *scratch) {
  const int classes = frame.given.classes;
  int64_t begin, end;
  while (frame.rows->take(&begin, &end)) {
    for (int64_t at = begin * frame.x.size; at < end * frame.x.size; ++at) {
      const Pixel pixel = pixel_at(frame, static_cast<int>(at / frame.x.size),
                                   static_cast<int>(at % frame.x.size),
                                   reinterpret_cast<float *>(scratch));
      const bool masked = masked_at(frame.given, at);
      const bool live = pixel.valid && !masked;
      if (maps.entropy) maps.entropy[at] = pixel.entropy;
      if (maps.labels) maps.labels[at] = static_cast<uint8_t>(live ? pixel.label : int{CADA_UNSELECTED});
      evidence.masked += masked;
      evidence.invalid += !masked && !pixel.valid;
      if (!live) continue;

      const float weight = weighting == CADA_WEIGHT_CONFIDENCE ? pixel.confidence : 1.0f;
      const float k = weight * pixel.scale * UNIT;
      int64_t *const sums = evidence.sums + static_cast<int64_t>(pixel.label) * classes;
      for (int c = 0; c < classes; ++c) sums[c] += units_of(pixel.probability[c], k);
      evidence.pixels[pixel.label] += 1;
      evidence.histogram[pixel.label * CADA_HISTOGRAM_BINS + histogram_bin(pixel.entropy)] += 1;
    }
  }
}

struct Judged {
  int label;
  float measure, confidence;
};

Judged judge(const Pixel &pixel, int classes, const cada_rule &rule) {
  Judged judged{pixel.label, pixel.confidence, pixel.confidence};
  if (rule.measure == CADA_ENTROPY) judged.measure = pixel.entropy;
  if (rule.measure == CADA_MARGIN) {
    float second = 0.0f; /* one class alone has a runner-up of 0 */
    for (int c = 0; c < classes; ++c) {
      const float p = pixel.probability[c];
      if (c != pixel.label && p > second) second = p;
    }
    judged.measure = pixel.confidence - second * pixel.scale;
  }
  if (rule.measure == CADA_RATIO) {
    for (int c = 0; c < classes; ++c) {
      const float p = pixel.probability[c] * pixel.scale;
      const float ratio = p / rule.class_weights[c];
      if (c == 0 || ratio > judged.measure) judged = Judged{c, ratio, p};
    }
  }
  return judged;
}

bool passes(const cada_rule &rule, float measure, float threshold) {
  switch (rule.comparator) {
  case CADA_LT: return measure < threshold;
  case CADA_LE: return measure <= threshold;
  case CADA_GT: return measure > threshold;
  default: return measure >= threshold;
  }
}

void count(const Frame &frame, const cada_rule *rules, int32_t rule_count, Kept &kept,
           char *scratch) {
  const int classes = frame.given.classes;
  int64_t begin, end;
  while (frame.rows->take(&begin, &end)) {
    for (int64_t at = begin * frame.x.size; at < end * frame.x.size; ++at) {
      const Pixel pixel = pixel_at(frame, static_cast<int>(at / frame.x.size),
                                   static_cast<int>(at % frame.x.size),
                                   reinterpret_cast<float *>(scratch));
      if (!pixel.valid || masked_at(frame.given, at)) continue;
      for (int r = 0; r < rule_count; ++r) {
        const Judged judged = judge(pixel, classes, rules[r]);
        kept.selected[static_cast<int64_t>(r) * classes + judged.label] +=
            passes(rules[r], judged.measure, rules[r].thresholds[judged.label]);
      }
    }
  }
}

void select(const Frame &frame, const cada_rule &rule, const Maps &maps, Kept &kept,
            char *scratch) {
  int64_t begin, end;
  while (frame.rows->take(&begin, &end)) {
    for (int64_t at = begin * frame.x.size; at < end * frame.x.size; ++at) {
      const Pixel pixel = pixel_at(frame, static_cast<int>(at / frame.x.size),
                                   static_cast<int>(at % frame.x.size),
                                   reinterpret_cast<float *>(scratch));
      const bool masked = masked_at(frame.given, at);
      kept.masked += masked;
      kept.invalid += !masked && !pixel.valid;
      maps.labels[at] = CADA_UNSELECTED;
      if (maps.entropy) maps.entropy[at] = pixel.entropy;
      if (maps.confidence) maps.confidence[at] = pixel.confidence;
      if (!pixel.valid) continue;
      const Judged judged = judge(pixel, frame.given.classes, rule);
      if (maps.confidence) maps.confidence[at] = judged.confidence;
      if (masked) continue;
      kept.predicted[judged.label] += 1;
      if (!passes(rule, judged.measure, rule.thresholds[judged.label])) continue;
      kept.selected[judged.label] += 1;
      maps.labels[at] = static_cast<uint8_t>(judged.label);
    }
  }
}

float raw_at(const Raw &raw, int64_t at) {
  return raw.dtype == CADA_FLOAT32 ? static_cast<const float *>(raw.values)[at]
                                   : float_of_half(static_cast<const uint16_t *>(raw.values)[at]);
}

/* One low-resolution pixel: classes lie `stride` values apart from `first`. */
void encode_pixel(const Raw &raw, int64_t first, int64_t stride) {
  const float infinity = float_of(0x7F800000u);
  const bool probabilities = raw.meaning == CADA_PROBABILITIES;
  float m = -infinity;
  bool valid = true;
  const auto score = [&](int c) {
    const float z = raw_at(raw, first + c * stride);
    return probabilities ? ln_n(z > LEAST_PROBABILITY ? z : LEAST_PROBABILITY) : z;
  };
  for (int c = 0; c < raw.classes; ++c) {
    valid &= raw_at(raw, first + c * stride) < infinity; /* false for NaN, too */
    const float z = score(c);
    m = z > m ? z : m;
  }
  valid &= m > -infinity;
  for (int c = 0; c < raw.classes; ++c) {
    const float s = score(c) - m;
    raw.encoded[first + c * stride] =
        valid ? half_of_float(s > HALF_LEAST ? s : HALF_LEAST) : HALF_NAN;
  }
}

void encode(const Raw &raw) {
  const int64_t pieces = (raw.pixels + PIECE - 1) / PIECE;
  int64_t begin, end;
  while (raw.pieces->take(&begin, &end)) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t frame = piece / pieces * raw.classes * raw.pixels;
      const int64_t first = piece % pieces * PIECE;
      for (int64_t i = first; i < raw.pixels && i < first + PIECE; ++i) {
        encode_pixel(raw, frame + i, raw.pixels);
      }
    }
  }
}

size_t scratch_bytes(const Frame &frame) {
  return sizeof(float) * 4 * static_cast<size_t>(frame.given.classes);
}

} // namespace

const InstructionSet SCALAR = {"scalar", scratch_bytes, encode, accumulate, count, select};

} // namespace cada
