/* PNG: every chunk's CRC up to IEND, ancillary ones too, then libpng. Conversions as Python's: the
 * high byte of 16 bits, small depths stretched, palettes looked up, grey repeated, alpha dropped. */
#include <cctype>
#include <csetjmp>
#include <cstring>
#include <png.h>
#include <string>
#include <zlib.h>

#include "decode.h"
#include "failure.h"

namespace cada::seg {
namespace {

constexpr int MOST_CHUNKS = 1 << 18;
constexpr size_t SIGNATURE = 8;

Size header_size(const uint8_t *data, size_t bytes) {
  if (bytes < SIGNATURE + 8 + 13) reject("truncated", "the file ends inside its header");
  const uint8_t *chunk = data + SIGNATURE;
  const uint8_t kind = chunk[17];
  if (big_endian_32(chunk) != 13 || std::memcmp(chunk + 4, "IHDR", 4) != 0 || kind > 6 ||
      kind == 1 || kind == 5) {
    reject("corrupt", "a PNG that does not begin with a valid IHDR chunk");
  }
  return checked_size(big_endian_32(chunk + 12), big_endian_32(chunk + 8));
}

std::string chunk_name(const uint8_t *name) {
  return std::string(reinterpret_cast<const char *>(name), 4);
}

void check_chunks(const uint8_t *data, size_t bytes) {
  bool seen_pixels = false;
  size_t at = SIGNATURE;
  for (int count = 0; count < MOST_CHUNKS; ++count) {
    if (bytes - at < 12) reject("truncated", "no IEND chunk in ", bytes, " bytes");
    const uint32_t length = big_endian_32(data + at);
    const uint8_t *name = data + at + 4;
    bool letters = true;
    for (int i = 0; i < 4; ++i) {
      letters = letters && ((name[i] | 32) >= 'a' && (name[i] | 32) <= 'z');
    }
    if (!letters || length >= 1u << 31) reject("corrupt", "at byte ", at, " there is no PNG chunk");
    if (length > bytes - at - 12) {
      reject("truncated", "chunk ", chunk_name(name), " ends at byte ", at + 12 + length, " of ",
             bytes);
    }
    const auto found = crc32(crc32(0, nullptr, 0), name, length + 4);
    if (found != big_endian_32(name + 4 + length)) {
      reject("bad-checksum", "chunk ", chunk_name(name), " at byte ", at);
    }
    if (chunk_name(name) == "acTL") reject("multi-frame", "an animated PNG");
    seen_pixels |= chunk_name(name) == "IDAT";
    at += 12 + size_t{length};
    if (chunk_name(name) != "IEND") continue;
    if (!seen_pixels) reject("corrupt", "a PNG without pixel data (no IDAT chunk)");
    return;
  }
  reject("corrupt", "a PNG of more than ", MOST_CHUNKS, " chunks");
}

/* libpng leaves by longjmp, so nothing with a destructor may live in the function that it leaves:
 * everything that must be freed stands here. */
class Reader {
public:
  Reader(const uint8_t *data, size_t bytes) : at_(data), left_(bytes) {
    png_ = png_create_read_struct(PNG_LIBPNG_VER_STRING, this, on_error, on_warning);
    info_ = png_ ? png_create_info_struct(png_) : nullptr;
    if (!info_) {
      png_destroy_read_struct(&png_, nullptr, nullptr);
      fail(CADA_SEG_FAILED, "no memory to decode a PNG");
    }
  }
  ~Reader() { png_destroy_read_struct(&png_, &info_, nullptr); }
  Reader(const Reader &) = delete;
  Reader &operator=(const Reader &) = delete;

  void read(Decoded *out) {
    rows_.resize(static_cast<size_t>(out->size.height));
    const size_t row = size_t{3} * static_cast<size_t>(out->size.width);
    for (size_t y = 0; y < rows_.size(); ++y) rows_[y] = out->pixels.data() + y * row;
    if (!decoded(row)) reject("corrupt", "libpng: ", why_[0] ? why_ : "cannot decode this PNG");
  }

private:
  bool decoded(size_t row) {
    if (setjmp(png_jmpbuf(png_))) return false;
    png_set_read_fn(png_, this, on_read);
    png_set_crc_action(png_, PNG_CRC_ERROR_QUIT, PNG_CRC_ERROR_QUIT);
    png_read_info(png_, info_);
    png_set_strip_16(png_);
    png_set_expand(png_); /* palettes and small depths to 8 bits; tRNS becomes alpha */
    png_set_strip_alpha(png_);
    png_set_gray_to_rgb(png_);
    png_set_interlace_handling(png_);
    png_read_update_info(png_, info_);
    if (png_get_rowbytes(png_, info_) != row) png_error(png_, "rows of another size");
    png_read_image(png_, rows_.data());
    png_read_end(png_, nullptr);
    return true;
  }

  static Reader *of(png_structp png, png_voidp given) {
    return static_cast<Reader *>(png ? given : nullptr);
  }
  static void on_error(png_structp png, png_const_charp why) {
    Reader *self = of(png, png_get_error_ptr(png));
    std::strncpy(self->why_, why, sizeof self->why_ - 1);
    png_longjmp(png, 1);
  }
  static void on_warning(png_structp, png_const_charp) {}
  static void on_read(png_structp png, png_bytep to, png_size_t count) {
    Reader *self = of(png, png_get_io_ptr(png));
    if (count > self->left_) png_error(png, "the data end too early");
    std::memcpy(to, self->at_, count);
    self->at_ += count;
    self->left_ -= count;
  }

  const uint8_t *at_;
  size_t left_;
  std::vector<png_bytep> rows_;
  png_structp png_ = nullptr;
  png_infop info_ = nullptr;
  char why_[128] = {};
};

} // namespace

Decoded decode_png(const uint8_t *data, size_t bytes) {
  Decoded out;
  out.size = header_size(data, bytes);
  check_chunks(data, bytes);
  out.pixels.resize(size_t{3} * static_cast<size_t>(out.size.height) *
                    static_cast<size_t>(out.size.width));
  Reader(data, bytes).read(&out);
  return out;
}

} // namespace cada::seg
