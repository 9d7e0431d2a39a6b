/* Image files as RGB, strictly: the structure is judged from the bytes before anything is decoded,
 * as cada_deploy/images.py and image_formats.py do it. PNG and JPEG; every other format is refused. */
#ifndef CADA_SEG_DECODE_H
#define CADA_SEG_DECODE_H
#include <cstddef>
#include <cstdint>
#include <vector>

#include "spec.h"

namespace cada::seg {

struct Decoded {
  std::vector<uint8_t> pixels; /* (height, width, 3) RGB */
  Size size;
};

/* What a file may cost: 8192 x 8192 pixels, 1 GiB. */
constexpr int64_t MOST_PIXELS = int64_t{1} << 26, MOST_BYTES = int64_t{1} << 30;
constexpr int64_t LARGEST_SIDE = 65535;

/* Throws Failure(REJECTED), and Failure(LACKS) where this build has no decoder for the format. */
Decoded decode(const uint8_t *data, size_t bytes);

/* Throws Failure(REJECTED, "too-large") or "corrupt" for a size of zero. */
Size checked_size(int64_t height, int64_t width);

Decoded decode_png(const uint8_t *data, size_t bytes);
Decoded decode_jpeg(const uint8_t *data, size_t bytes);

inline uint32_t big_endian_32(const uint8_t *at) {
  return uint32_t{at[0]} << 24 | uint32_t{at[1]} << 16 | uint32_t{at[2]} << 8 | at[3];
}

} // namespace cada::seg
#endif
