#include "decode.h"

#include <cstring>

#include "failure.h"

namespace cada::seg {
namespace {

bool begins(const uint8_t *data, size_t bytes, const char *magic, size_t length) {
  return bytes >= length && std::memcmp(data, magic, length) == 0;
}

/* Formats that are images but are not read here: named, so that the refusal is clear. */
struct Known {
  const char *magic;
  size_t length;
  const char *name;
};
constexpr Known OTHERS[] = {
    {"BM", 2, "BMP"}, {"II*\0", 4, "TIFF"}, {"MM\0*", 4, "TIFF"}, {"RIFF", 4, "WebP"},
    {"GIF8", 4, "GIF"}, {"P5", 2, "PNM"}, {"P6", 2, "PNM"}, {"8BPS", 4, "PSD"},
};

} // namespace

Size checked_size(int64_t height, int64_t width) {
  if (height < 1 || width < 1) reject("corrupt", "the header says ", height, "x", width, " pixels");
  if (height > LARGEST_SIDE || width > LARGEST_SIDE || height * width > MOST_PIXELS) {
    reject("too-large", height, "x", width, " (HxW) pixels; at most ", MOST_PIXELS, " and ",
           LARGEST_SIDE, " a side are decoded");
  }
  return {static_cast<int32_t>(height), static_cast<int32_t>(width)};
}

Decoded decode(const uint8_t *data, size_t bytes) {
  if (bytes == 0) reject("empty", "0 bytes");
  if (bytes > static_cast<size_t>(MOST_BYTES)) {
    reject("too-large", bytes, " bytes; at most ", MOST_BYTES, " are read");
  }
  if (begins(data, bytes, "\x89PNG\r\n\x1a\n", 8)) return decode_png(data, bytes);
  if (begins(data, bytes, "\xff\xd8\xff", 3)) return decode_jpeg(data, bytes);
  for (const Known &other : OTHERS) {
    if (begins(data, bytes, other.magic, other.length)) {
      reject("unsupported-format", other.name, "; cada_seg reads PNG and JPEG");
    }
  }
  reject("not-an-image", "the first bytes are of no image format known here; expected PNG or JPEG");
}

} // namespace cada::seg
