/* Pillow's BICUBIC on 8-bit images: Keys' kernel with a = -0.5, stretched by the shrinking factor,
 * weights of 22 bits, in two passes, rounded to 8 bits in between. Which pass comes first decides
 * the last bit: Pillow 13 begins with the columns when the height loses more than twice as many pixels
 * as the width; earlier versions always begin with the rows. Here it is as in 13
 * (tests/runtime/test_preprocess.py). */
#include <algorithm>
#include <cmath>

#include "preprocess.h"

namespace cada::seg {
namespace {

constexpr int BITS = 32 - 8 - 2; /* weights; the rest is headroom for values below 0 and above 255 */

double cubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

struct Window {
  int32_t first;
  std::vector<int32_t> weights;
};

Window window_of(int32_t output, int32_t from, double scale) {
  const double stretch = std::max(scale, 1.0), support = 2.0 * stretch, inverse = 1.0 / stretch;
  const double centre = (output + 0.5) * scale;
  const auto first = std::max(static_cast<int32_t>(centre - support + 0.5), 0);
  const auto end = std::min(static_cast<int32_t>(centre + support + 0.5), from);
  std::vector<double> shares;
  double sum = 0.0;
  for (int32_t x = 0; x < end - first; ++x) {
    shares.push_back(cubic((x + first - centre + 0.5) * inverse));
    sum += shares.back();
  }
  Window found{first, {}};
  for (double share : shares) {
    if (sum != 0.0) share /= sum;
    found.weights.push_back(static_cast<int32_t>(share * (1 << BITS) + (share < 0 ? -0.5 : 0.5)));
  }
  return found;
}

std::vector<Window> windows(int32_t from, int32_t to) {
  const double scale = static_cast<double>(from) / to;
  std::vector<Window> found;
  for (int32_t i = 0; i < to; ++i) found.push_back(window_of(i, from, scale));
  return found;
}

size_t bytes_of(Size size) {
  return size_t{3} * static_cast<size_t>(size.height) * static_cast<size_t>(size.width);
}

uint8_t clipped(int32_t sum) {
  return static_cast<uint8_t>(std::min(std::max(sum >> BITS, 0), 255));
}

void along_rows(const Picture &from, int32_t width, uint8_t *out) {
  const std::vector<Window> columns = windows(from.size.width, width);
  for (int32_t y = 0; y < from.size.height; ++y) {
    for (const Window &window : columns) {
      const uint8_t *pixel = from.row(y) + 3 * int64_t{window.first};
      int32_t sum[3] = {1 << (BITS - 1), 1 << (BITS - 1), 1 << (BITS - 1)};
      for (const int32_t weight : window.weights) {
        for (int c = 0; c < 3; ++c) sum[c] += pixel[c] * weight;
        pixel += 3;
      }
      for (const int32_t s : sum) *out++ = clipped(s);
    }
  }
}

void along_columns(const Picture &from, int32_t height, uint8_t *out) {
  const auto row = static_cast<size_t>(3 * from.size.width);
  std::vector<int32_t> sums(row);
  for (const Window &window : windows(from.size.height, height)) {
    std::fill(sums.begin(), sums.end(), 1 << (BITS - 1));
    int32_t y = window.first;
    for (const int32_t weight : window.weights) {
      const uint8_t *pixels = from.row(y++);
      for (size_t i = 0; i < row; ++i) sums[i] += pixels[i] * weight;
    }
    for (const int32_t sum : sums) *out++ = clipped(sum);
  }
}

} // namespace

void resize_bicubic(const Picture &from, Size to, Pixels *out) {
  Picture picture = from;
  Pixels other;
  const auto row_pass = [&] {
    if (picture.size.width == to.width) return;
    other.resize(bytes_of({picture.size.height, to.width}));
    along_rows(picture, to.width, other.data());
    out->swap(other);
    picture = {out->data(), {picture.size.height, to.width}, int64_t{3} * to.width};
  };
  const auto column_pass = [&] {
    if (picture.size.height == to.height) return;
    other.resize(bytes_of({to.height, picture.size.width}));
    along_columns(picture, to.height, other.data());
    out->swap(other);
    picture = {out->data(), {to.height, picture.size.width}, int64_t{3} * picture.size.width};
  };
  const int32_t lost_rows = from.size.height - to.height;
  const int32_t lost_columns = from.size.width - to.width;
  const bool columns_first = lost_rows > 0 && lost_rows > 2 * lost_columns;
  if (columns_first) column_pass();
  row_pass();
  column_pass(); /* nothing is left to do after columns_first */
}

} // namespace cada::seg
