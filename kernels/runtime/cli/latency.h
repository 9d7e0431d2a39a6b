/* How long every stage took, as percentiles: one number per frame and stage is kept. */
#ifndef CADA_SEG_CLI_LATENCY_H
#define CADA_SEG_CLI_LATENCY_H
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

namespace cada::seg::cli {

class Latency {
public:
  static constexpr std::array<const char *, 8> STAGES = {
      "read", "decode", "preprocess", "network", "encode", "fuse", "write", "whole"};

  void add(const std::array<double, 7> &ms) {
    double whole = 0;
    for (size_t i = 0; i < ms.size(); ++i) {
      stages_[i].push_back(ms[i]);
      whole += ms[i];
    }
    stages_[7].push_back(whole);
  }

  /* "latency ms p50/p90/p99: read 0.1/0.2/0.2, ..." */
  std::string line() const {
    std::string found = "latency ms p50/p90/p99:";
    for (size_t i = 0; i < STAGES.size(); ++i) {
      char numbers[96];
      std::snprintf(numbers, sizeof numbers, "%s %s %.2f/%.2f/%.2f", i ? "," : "", STAGES[i],
                    at(i, 0.50), at(i, 0.90), at(i, 0.99));
      found += numbers;
    }
    return found;
  }

private:
  /* Nearest rank. */
  double at(size_t stage, double share) const {
    std::vector<double> sorted = stages_[stage];
    if (sorted.empty()) return 0;
    std::sort(sorted.begin(), sorted.end());
    const auto rank = static_cast<size_t>(std::ceil(share * static_cast<double>(sorted.size())));
    return sorted[std::max<size_t>(rank, 1) - 1];
  }

  std::array<std::vector<double>, 8> stages_;
};

} // namespace cada::seg::cli
#endif
