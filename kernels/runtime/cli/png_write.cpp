#include "png_write.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <unistd.h>
#include <zlib.h>

#include "failure.h"

namespace cada::seg::cli {
namespace {

void put_32(PngBytes *out, uint64_t value) {
  for (int shift = 24; shift >= 0; shift -= 8) out->push_back(static_cast<uint8_t>(value >> shift));
}

void put_chunk(PngBytes *out, const char *name, const PngBytes &content) {
  put_32(out, content.size());
  const size_t start = out->size();
  out->insert(out->end(), name, name + 4);
  out->insert(out->end(), content.begin(), content.end());
  put_32(out, crc32(crc32(0, nullptr, 0), out->data() + start,
                    static_cast<uInt>(out->size() - start)));
}

/* `rows` holds for every row a filter byte (0: none) and its samples, big endian. */
PngBytes grey_png(const PngBytes &rows, int32_t height, int32_t width, uint8_t bits) {
  uLongf size = compressBound(static_cast<uLong>(rows.size()));
  PngBytes packed(size);
  if (compress2(packed.data(), &size, rows.data(), static_cast<uLong>(rows.size()), 1) != Z_OK) {
    fail(CADA_SEG_FAILED, "no memory to write a PNG");
  }
  packed.resize(size);
  PngBytes header;
  put_32(&header, static_cast<uint64_t>(height > 0 ? width : 0));
  put_32(&header, static_cast<uint64_t>(height));
  for (const uint8_t byte : {bits, uint8_t{0}, uint8_t{0}, uint8_t{0}, uint8_t{0}}) {
    header.push_back(byte); /* depth, grey, deflate, adaptive filters, not interlaced */
  }
  PngBytes out{0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};
  put_chunk(&out, "IHDR", header);
  put_chunk(&out, "IDAT", packed);
  put_chunk(&out, "IEND", {});
  return out;
}

} // namespace

PngBytes label_png(const std::vector<uint8_t> &labels, int32_t height, int32_t width) {
  PngBytes rows;
  rows.reserve(labels.size() + static_cast<size_t>(height));
  for (int32_t y = 0; y < height; ++y) {
    const auto row = labels.begin() + ptrdiff_t{y} * width;
    rows.push_back(0);
    rows.insert(rows.end(), row, row + width);
  }
  return grey_png(rows, height, width, 8);
}

PngBytes entropy_png(const std::vector<float> &entropy, int32_t height, int32_t width,
                     int32_t classes) {
  const double steps_per_nat = classes > 1 ? 65535.0 / std::log(static_cast<double>(classes)) : 0.0;
  PngBytes rows;
  rows.reserve(2 * entropy.size() + static_cast<size_t>(height));
  const float *value = entropy.data();
  for (int32_t y = 0; y < height; ++y) {
    rows.push_back(0);
    for (int32_t x = 0; x < width; ++x, ++value) {
      const double steps = std::nearbyint(static_cast<double>(*value) * steps_per_nat);
      const unsigned found = std::isfinite(*value)
                                 ? static_cast<unsigned>(std::min(std::max(steps, 0.0), 65534.0))
                                 : 65535u;
      rows.push_back(static_cast<uint8_t>(found >> 8));
      rows.push_back(static_cast<uint8_t>(found & 255));
    }
  }
  return grey_png(rows, height, width, 16);
}

void write_file(const std::string &path, const PngBytes &data) {
  const std::string temporary = path + ".tmp";
  const auto failed = [&](const char *why) {
    unlink(temporary.c_str());
    fail(CADA_SEG_FAILED, "cannot write ", path, ": ", why);
  };
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(path).parent_path(), error);
  if (error) fail(CADA_SEG_FAILED, "cannot write ", path, ": ", error.message());
  std::FILE *file = std::fopen(temporary.c_str(), "wbe");
  if (!file) fail(CADA_SEG_FAILED, "cannot write ", path, ": ", std::strerror(errno));
  const bool written = std::fwrite(data.data(), 1, data.size(), file) == data.size() &&
                       std::fflush(file) == 0 && fsync(fileno(file)) == 0;
  const int why = errno;
  if (std::fclose(file) != 0 || !written) failed(std::strerror(why));
  if (std::rename(temporary.c_str(), path.c_str()) != 0) failed(std::strerror(errno));
}

} // namespace cada::seg::cli
