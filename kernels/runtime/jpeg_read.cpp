/* JPEG: every marker up to EOI, then libjpeg with its defaults (slow integer DCT, smooth chroma), as
 * OpenCV uses it. Another build of libjpeg may give other low bits than Python's; same libjpeg-turbo
 * line, same bits. An EXIF rotation is ignored: labels fit the stored pixels. CMYK is refused. */
#include <csetjmp>
#include <cstdio>
#include <cstring>

#include <jpeglib.h>

#include "decode.h"
#include "failure.h"

namespace cada::seg {
namespace {

constexpr int MOST_SCANS = 100; /* a scan of ten bytes can cost a pass over all pixels */

bool is_frame(int marker) {
  return marker >= 0xC0 && marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC;
}

bool is_readable_frame(int marker) {
  return marker == 0xC0 || marker == 0xC1 || marker == 0xC2 || marker == 0xC9 || marker == 0xCA;
}

/* Walks the segments; a scan ends at FF followed by neither 00 nor a restart marker. */
class Segments {
public:
  Segments(const uint8_t *data, size_t bytes) : data_(data), bytes_(bytes) {}

  Size check() {
    Size size;
    int scans = 0;
    while (next()) {
      if (is_frame(marker_) && !size.given()) size = frame_size();
      if (marker_ == 0xDA && !size.given()) break;
      if (marker_ == 0xDA && ++scans > MOST_SCANS) {
        reject("unsupported-format", "a JPEG of more than ", MOST_SCANS, " scans");
      }
    }
    if (!size.given()) reject("corrupt", "a JPEG without a frame header");
    if (scans == 0) reject("corrupt", "a JPEG without a scan");
    return size;
  }

private:
  [[noreturn]] void no_end() const { reject("truncated", "no EOI marker in ", bytes_, " bytes"); }

  /* False at EOI. */
  bool next() {
    if (at_ >= bytes_) no_end();
    if (data_[at_] != 0xFF) reject("corrupt", "at byte ", at_, " there is no JPEG marker");
    while (at_ < bytes_ && data_[at_] == 0xFF) ++at_;
    if (at_ >= bytes_) no_end();
    marker_ = data_[at_];
    if (marker_ == 0xD9) return false;
    if (at_ + 3 > bytes_) reject("truncated", "a segment at byte ", at_, " is cut");
    const size_t end = at_ + 1 + (size_t{data_[at_ + 1]} << 8 | data_[at_ + 2]);
    if (marker_ < 0xC0 || (marker_ >= 0xD0 && marker_ <= 0xD8) || end < at_ + 3) {
      reject("corrupt", "a segment at byte ", at_, " has no place there");
    }
    if (end > bytes_) reject("truncated", "a segment ends at ", end, " of ", bytes_);
    content_ = at_ + 3;
    end_ = at_ = end;
    if (marker_ == 0xDA) skip_scan();
    return true;
  }

  void skip_scan() {
    for (; at_ + 1 < bytes_; ++at_) {
      const uint8_t after = data_[at_ + 1];
      if (data_[at_] == 0xFF && after != 0 && !(after >= 0xD0 && after <= 0xD7)) return;
    }
    at_ = bytes_;
  }

  Size frame_size() const {
    if (!is_readable_frame(marker_)) {
      reject("unsupported-format", "a JPEG of an unusual process (frame marker ", marker_, ")");
    }
    if (end_ - content_ < 6) reject("truncated", "the file ends inside its header");
    const uint8_t *frame = data_ + content_;
    const int bits = frame[0], parts = frame[5];
    if (bits != 8 || (parts != 1 && parts != 3)) {
      reject("unsupported-format", "a JPEG of ", parts, " components of ", bits,
             " bits; cada_seg reads grey and colour of 8 bits");
    }
    return checked_size(frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]);
  }

  const uint8_t *data_;
  size_t bytes_, at_ = 2, content_ = 0, end_ = 0;
  int marker_ = 0;
};

/* libjpeg leaves by longjmp: see png_read.cpp. */
class Reader {
public:
  Reader(const uint8_t *data, size_t bytes) : data_(data), bytes_(bytes) {
    info_.err = jpeg_std_error(&errors_.base);
    errors_.base.error_exit = on_error;
    errors_.base.output_message = on_message;
  }
  ~Reader() { jpeg_destroy_decompress(&info_); }
  Reader(const Reader &) = delete;
  Reader &operator=(const Reader &) = delete;

  void read(Decoded *out) {
    if (!decoded(out)) reject("corrupt", "libjpeg: ", errors_.why);
  }

private:
  struct Errors {
    jpeg_error_mgr base; /* first: libjpeg hands its address back */
    std::jmp_buf leave;
    char why[JMSG_LENGTH_MAX];
  };

  bool decoded(Decoded *out) {
    if (setjmp(errors_.leave)) return false;
    jpeg_create_decompress(&info_);
    jpeg_mem_src(&info_, const_cast<unsigned char *>(data_), static_cast<unsigned long>(bytes_));
    jpeg_read_header(&info_, TRUE);
    info_.out_color_space = JCS_RGB;
    jpeg_start_decompress(&info_);
    if (info_.output_width != static_cast<JDIMENSION>(out->size.width) ||
        info_.output_height != static_cast<JDIMENSION>(out->size.height) ||
        info_.output_components != 3) {
      std::strcpy(errors_.why, "the decoder gives another size than the header");
      return false;
    }
    const size_t row = size_t{3} * info_.output_width;
    while (info_.output_scanline < info_.output_height) {
      JSAMPROW at = out->pixels.data() + row * info_.output_scanline;
      jpeg_read_scanlines(&info_, &at, 1);
    }
    jpeg_finish_decompress(&info_);
    return true;
  }

  static void on_error(j_common_ptr info) {
    auto *errors = reinterpret_cast<Errors *>(info->err);
    info->err->format_message(info, errors->why);
    std::longjmp(errors->leave, 1);
  }
  static void on_message(j_common_ptr) {}

  const uint8_t *data_;
  size_t bytes_;
  jpeg_decompress_struct info_{};
  Errors errors_{};
};

} // namespace

Decoded decode_jpeg(const uint8_t *data, size_t bytes) {
  Decoded out;
  out.size = Segments(data, bytes).check();
  out.pixels.resize(size_t{3} * static_cast<size_t>(out.size.height) *
                    static_cast<size_t>(out.size.width));
  Reader(data, bytes).read(&out);
  return out;
}

} // namespace cada::seg
