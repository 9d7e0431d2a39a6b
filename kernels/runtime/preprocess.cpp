#include "preprocess.h"

#include <cmath>
#include <cstring>

#include "failure.h"

namespace cada::seg {
namespace {

/* Rounded to nearest even, as NumPy does; subnormals kept. Infinite when too large. */
uint16_t half_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (!(magnitude < 65520.0f)) return static_cast<uint16_t>(sign | 0x7C00);
  if (magnitude < 6.103515625e-05f) { /* below 2^-14 the step is 2^-24 */
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(magnitude * 16777216.0f)));
  }
  bits &= 0x7FFFFFFF;
  bits += 0xFFF + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((bits >> 13) - (112u << 10)));
}

} // namespace

Preprocessor::Preprocessor(const InputSpec &spec) : spec_(spec), singles_{}, halves_{} {
  const auto scale = static_cast<float>(spec.scale);
  bool finite = true;
  for (size_t c = 0; c < 3; ++c) {
    const auto mean = static_cast<float>(spec.mean[c]), std = static_cast<float>(spec.std[c]);
    for (int v = 0; v < 256; ++v) {
      const float value = (scale * static_cast<float>(v) - mean) / std;
      const auto i = static_cast<size_t>(v);
      singles_[c][i] = value;
      halves_[c][i] = half_bits(value);
      finite = finite && std::isfinite(value) &&
               (spec.element == Element::float32 || (halves_[c][i] & 0x7C00) != 0x7C00);
    }
  }
  if (!finite) {
    fail(CADA_SEG_USAGE, "input scale, mean and std leave the range of ",
         spec.element == Element::float32 ? "float32" : "float16",
         "; check them in the model's spec");
  }
}

size_t Preprocessor::row_bytes(Size size) const {
  return size_t{3} * static_cast<size_t>(size.height) * static_cast<size_t>(size.width) *
         bytes_of(spec_.element);
}

void Preprocessor::fill(const Picture &frame, Size size, void *row) {
  Picture picture = frame;
  if (frame.size != size) {
    if (spec_.resize == Resize::bilinear) resize_bilinear(frame, size, &resized_);
    else resize_bicubic(frame, size, &resized_);
    picture = {resized_.data(), size, int64_t{3} * size.width};
  }
  if (spec_.element == Element::float32) look_up(picture, singles_, static_cast<float *>(row));
  else look_up(picture, halves_, static_cast<uint16_t *>(row));
}

template <class Value>
void Preprocessor::look_up(const Picture &picture,
                           const std::array<std::array<Value, 256>, 3> &tables, Value *row) const {
  const auto width = static_cast<size_t>(picture.size.width);
  const size_t plane = width * static_cast<size_t>(picture.size.height);
  for (int32_t y = 0; y < picture.size.height; ++y) {
    const uint8_t *from = picture.row(y);
    for (size_t position = 0; position < 3; ++position) {
      const size_t channel = spec_.bgr ? 2 - position : position;
      const auto &table = tables[position];
      Value *to = row + static_cast<size_t>(y) * width * (spec_.nhwc ? 3 : 1) +
                  position * (spec_.nhwc ? 1 : plane);
      const size_t step = spec_.nhwc ? 3 : 1;
      for (size_t x = 0; x < width; ++x) to[x * step] = table[from[3 * x + channel]];
    }
  }
}

} // namespace cada::seg
