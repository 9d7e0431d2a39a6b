/* Drives every instruction set over awkward sizes with buffers that end exactly where they should, and
 * compares it with the oracle. test_sanitizers.py builds it with the address and undefined-behaviour
 * sanitizers. Prints each instruction set that ran. */
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../../kernels/cada_fused.h"

namespace {

struct Results {
  std::vector<uint16_t> scores;
  std::vector<int64_t> counts;
  std::vector<uint8_t> labels, selected_labels;
  std::vector<float> maps;

  bool operator==(const Results &other) const {
    return scores == other.scores && counts == other.counts && labels == other.labels &&
           selected_labels == other.selected_labels &&
           std::memcmp(maps.data(), other.maps.data(), maps.size() * sizeof(float)) == 0;
  }
};

struct Problem {
  int classes, low_height, low_width, height, width;
};

bool check(int code, const char *what) {
  if (code != CADA_OK) std::printf("%s: %s\n", what, cada_error_text(code));
  return code == CADA_OK;
}

/* Everything the library can do, with one instruction set. */
bool run(const Problem &p, int align_corners, int order, int threads, Results &results) {
  const size_t low = static_cast<size_t>(p.low_height) * p.low_width, C = p.classes;
  const size_t full = static_cast<size_t>(p.height) * p.width;
  std::vector<float> raw(C * low);
  uint32_t state = 12345u + static_cast<uint32_t>(low * C);
  for (float &z : raw) {
    state = state * 1664525u + 1013904223u;
    z = static_cast<float>(state >> 8) / 1048576.0f - 8.0f;
    if ((state >> 8) % 997 == 0) std::memcpy(&z, "\0\0\xC0\x7F", 4); /* NaN */
  }
  std::vector<uint8_t> mask(full);
  for (size_t i = 0; i < full; ++i) mask[i] = i % 11 == 3;

  results.scores.resize(C * low);
  if (!check(cada_encode(raw.data(), CADA_FLOAT32, CADA_LOGITS, 1, p.classes,
                         static_cast<int64_t>(low), results.scores.data(), threads), "encode")) {
    return false;
  }
  const cada_frame frame = {results.scores.data(), mask.data(), p.classes, p.low_height, p.low_width,
                            p.height, p.width, align_corners, order};
  results.counts.assign(C + C * C + C * CADA_HISTOGRAM_BINS + 2 + 2 * C + 2 + 4 * C, 0);
  results.labels.resize(full);
  results.selected_labels.resize(full);
  results.maps.resize(3 * full);
  int64_t *at = results.counts.data();
  const auto next = [&](size_t n) { at += n; return at - n; };
  int64_t *const pixels = next(C), *const sums = next(C * C);
  int64_t *const histogram = next(C * CADA_HISTOGRAM_BINS), *const left_out = next(2);
  if (!check(cada_accumulate(&frame, CADA_WEIGHT_CONFIDENCE, threads, pixels, sums, histogram,
                             left_out, left_out + 1, results.labels.data(), results.maps.data()),
             "accumulate")) {
    return false;
  }
  const std::vector<float> thresholds(C, 0.4f), weights(C, 0.7f);
  std::vector<cada_rule> rules;
  for (int measure = CADA_ENTROPY; measure <= CADA_RATIO; ++measure) {
    rules.push_back({thresholds.data(), measure == CADA_RATIO ? weights.data() : nullptr, measure,
                     measure == CADA_ENTROPY ? CADA_LT : CADA_GE});
  }
  int64_t *const predicted = next(C), *const selected = next(C), *const lost = next(2);
  return check(cada_select(&frame, &rules[CADA_RATIO], threads, results.selected_labels.data(),
                           predicted, selected, lost, lost + 1, results.maps.data() + full,
                           results.maps.data() + 2 * full), "select") &&
         check(cada_count(&frame, rules.data(), 4, threads, next(4 * C)), "count");
}

} // namespace

int main() {
  const Problem problems[] = {{1, 1, 1, 1, 1},     {2, 1, 1, 3, 67},   {19, 5, 7, 41, 53},
                              {19, 9, 17, 65, 129}, {3, 40, 61, 7, 11}, {255, 2, 3, 9, 33},
                              {65, 3, 5, 17, 1},    {5, 1, 700, 2, 30}, {7, 16, 16, 16, 16}};
  const char *const names[] = {"scalar", "baseline", "avx2", "avx512"};
  for (const char *name : names) {
    if (cada_choose_isa(name) != CADA_OK) continue;
    if (std::string(cada_isa()) != name) return 2;
    for (const Problem &problem : problems) {
      for (int variant = 0; variant < 8; ++variant) {
        const int align_corners = variant & 1, order = variant >> 1 & 1, threads = 1 + (variant >> 2) * 2;
        Results oracle, found;
        if (cada_choose_isa("scalar") != CADA_OK) return 2;
        if (!run(problem, align_corners, order, 1, oracle)) return 1;
        if (cada_choose_isa(name) != CADA_OK) return 2;
        if (!run(problem, align_corners, order, threads, found)) return 1;
        if (!(oracle == found)) {
          std::printf("%s differs from the oracle: C %d, %dx%d -> %dx%d, variant %d\n", name,
                      problem.classes, problem.low_height, problem.low_width, problem.height,
                      problem.width, variant);
          return 1;
        }
      }
    }
    std::printf("ran %s\n", name);
  }
  return 0;
}
