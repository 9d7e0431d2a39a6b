/* OpenCV's INTER_LINEAR on 8-bit images: weights of 11 bits, two passes in integers. Half the size
 * in both directions is the mean of four pixels there, and so it is here. Checked against
 * OpenCV 5.0 on x86-64 (tests/runtime/test_preprocess.py); its ARM builds may use other code. */
#include <algorithm>
#include <cmath>

#include "preprocess.h"

namespace cada::seg {
namespace {

struct Tap {
  int32_t lower;
  int32_t weight[2]; /* of `lower` and of the pixel after it, in 1/2048 */
};

int32_t weight_of(float share) { return static_cast<int32_t>(std::nearbyint(share * 2048.0f)); }

std::vector<Tap> taps(int32_t from, int32_t to, bool clamp) {
  const double scale = 1.0 / (static_cast<double>(to) / from);
  std::vector<Tap> found;
  found.reserve(static_cast<size_t>(to));
  for (int32_t i = 0; i < to; ++i) {
    const auto position = static_cast<float>((i + 0.5) * scale - 0.5);
    auto lower = static_cast<int32_t>(std::floor(position));
    float share = position - static_cast<float>(lower);
    /* Columns outside the image get no weight; rows keep theirs and are repeated. */
    if (clamp && lower < 0) lower = 0, share = 0;
    if (clamp && lower >= from - 1) lower = from - 1, share = 0;
    found.push_back({lower, {weight_of(1.0f - share), weight_of(share)}});
  }
  return found;
}

void halve(const Picture &from, Size to, uint8_t *out) {
  for (int32_t y = 0; y < to.height; ++y) {
    const uint8_t *upper = from.row(2 * y), *lower = from.row(2 * y + 1);
    for (int32_t x = 0; x < to.width; ++x, upper += 6, lower += 6) {
      for (int c = 0; c < 3; ++c) {
        *out++ = static_cast<uint8_t>((upper[c] + upper[c + 3] + lower[c] + lower[c + 3] + 2) >> 2);
      }
    }
  }
}

/* One row widened, times 2048. */
void widen(const uint8_t *from, int32_t last, const std::vector<Tap> &columns, int32_t *out) {
  for (const Tap &tap : columns) {
    const uint8_t *a = from + 3 * tap.lower, *b = from + 3 * std::min(tap.lower + 1, last);
    for (int c = 0; c < 3; ++c) *out++ = a[c] * tap.weight[0] + b[c] * tap.weight[1];
  }
}

/* The last two widened rows, by number: most output rows need one of them again. */
class WidenedRows {
public:
  WidenedRows(const Picture &from, const std::vector<Tap> &columns)
      : from_(from), columns_(columns), rows_{std::vector<int32_t>(3 * columns.size()),
                                              std::vector<int32_t>(3 * columns.size())} {}

  const int32_t *get(int32_t y) {
    y = std::min(std::max(y, 0), from_.size.height - 1);
    const auto slot = static_cast<size_t>(y & 1);
    if (number_[slot] != y) {
      widen(from_.row(y), from_.size.width - 1, columns_, rows_[slot].data());
      number_[slot] = y;
    }
    return rows_[slot].data();
  }

private:
  const Picture &from_;
  const std::vector<Tap> &columns_;
  std::vector<int32_t> rows_[2];
  int32_t number_[2] = {-1, -1};
};

} // namespace

void resize_bilinear(const Picture &from, Size to, Pixels *out) {
  const size_t row = size_t{3} * static_cast<size_t>(to.width);
  out->resize(row * static_cast<size_t>(to.height));
  if (from.size.height == 2 * to.height && from.size.width == 2 * to.width) {
    return halve(from, to, out->data());
  }
  const std::vector<Tap> columns = taps(from.size.width, to.width, true);
  const std::vector<Tap> lines = taps(from.size.height, to.height, false);
  WidenedRows widened(from, columns);
  uint8_t *pixel = out->data();
  for (const Tap &line : lines) {
    const int32_t *upper = widened.get(line.lower), *lower = widened.get(line.lower + 1);
    for (size_t i = 0; i < row; ++i) {
      const int32_t sum = ((line.weight[0] * (upper[i] >> 4)) >> 16) +
                          ((line.weight[1] * (lower[i] >> 4)) >> 16);
      *pixel++ = static_cast<uint8_t>(std::min(std::max((sum + 2) >> 2, 0), 255));
    }
  }
}

} // namespace cada::seg
