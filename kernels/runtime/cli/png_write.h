/* Grey PNGs of labels and entropy, and files that are never half there. */
#ifndef CADA_SEG_CLI_PNG_WRITE_H
#define CADA_SEG_CLI_PNG_WRITE_H
#include <cstdint>
#include <string>
#include <vector>

namespace cada::seg::cli {

using PngBytes = std::vector<uint8_t>;

PngBytes label_png(const std::vector<uint8_t> &labels, int32_t height, int32_t width);

/* 16 bits: round(E * 65535 / ln C), half to even, at most 65534; 65535 where E is not finite. */
PngBytes entropy_png(const std::vector<float> &entropy, int32_t height, int32_t width,
                     int32_t classes);

/* Folders are made. A temporary file beside it, fsync, rename. Throws Failure(FAILED). */
void write_file(const std::string &path, const PngBytes &data);

} // namespace cada::seg::cli
#endif
