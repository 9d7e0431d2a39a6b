/* Make the network's input from a frame: resize, colour order, scale, mean, std. The bytes are those
 * of cada_deploy/preprocess.py; tests/runtime/ holds both equal. */
#ifndef CADA_SEG_PREPROCESS_H
#define CADA_SEG_PREPROCESS_H
#include <cstdint>
#include <vector>

#include "spec.h"

namespace cada::seg {

struct Picture { /* RGB, borrowed */
  const uint8_t *pixels;
  Size size;
  int64_t row_bytes;

  const uint8_t *row(int32_t y) const { return pixels + y * row_bytes; }
};

using Pixels = std::vector<uint8_t>; /* (height, width, 3) without gaps */

/* OpenCV's INTER_LINEAR for 8 bits, in its integers. */
void resize_bilinear(const Picture &from, Size to, Pixels *out);
/* Pillow's BICUBIC for 8 bits, in its integers: the kernel widens when the image shrinks. */
void resize_bicubic(const Picture &from, Size to, Pixels *out);

/* Value of every byte, per channel of the model's colour order. float16 values as their bits. */
class Preprocessor {
public:
  explicit Preprocessor(const InputSpec &spec); /* throws USAGE when a value is not finite */

  size_t row_bytes(Size size) const;
  /* row has row_bytes(size) bytes. */
  void fill(const Picture &frame, Size size, void *row);

private:
  template <class Value>
  void look_up(const Picture &picture, const std::array<std::array<Value, 256>, 3> &tables,
               Value *row) const;

  InputSpec spec_;
  std::array<std::array<float, 256>, 3> singles_;
  std::array<std::array<uint16_t, 256>, 3> halves_;
  Pixels resized_;
};

} // namespace cada::seg
#endif
