/* The C ABI: exceptions end here, as codes and as the thread's last sentence. */
#include "cada_seg.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "cada_fused.h"
#include "decode.h"
#include "failure.h"
#include "session.h"

#define CADA_SEG_API extern "C" __attribute__((visibility("default")))

using namespace cada::seg;

struct cada_seg {
  Session session;
};

namespace {

thread_local std::string last_error;

int noted(int code, const char *sentence) noexcept {
  try {
    last_error = sentence;
  } catch (...) {
    last_error.clear();
  }
  return code;
}

template <class Body> int guarded(const Body &body) noexcept {
  try {
    body();
    return CADA_SEG_DONE;
  } catch (const Failure &failure) {
    return noted(failure.code(), failure.what());
  } catch (const std::bad_alloc &) {
    return noted(CADA_SEG_FAILED, "not enough memory");
  } catch (const std::exception &error) {
    return noted(CADA_SEG_FAILED, error.what());
  }
}

template <class Given> void require_size(const Given *given, const char *name) {
  if (!given || given->size < sizeof(Given)) {
    fail(CADA_SEG_USAGE, name, " is NULL or its size is not set to sizeof(", name, ")");
  }
}

} // namespace

CADA_SEG_API int cada_seg_open(const cada_seg_options *options, cada_seg **model) {
  return guarded([&] {
    if (!model) fail(CADA_SEG_USAGE, "model is NULL");
    *model = nullptr;
    require_size(options, "cada_seg_options");
    *model = new cada_seg{Session(*options)};
  });
}

CADA_SEG_API void cada_seg_close(cada_seg *model) { delete model; }

CADA_SEG_API int cada_seg_label(cada_seg *model, const cada_seg_image *frame,
                                cada_seg_result *result) {
  return guarded([&] {
    if (!model) fail(CADA_SEG_USAGE, "model is NULL");
    require_size(result, "cada_seg_result");
    model->session.label(picture_of(frame), result);
  });
}

CADA_SEG_API const char *cada_seg_backend(const cada_seg *model) {
  return model ? model->session.backend().c_str() : "";
}

CADA_SEG_API const char *cada_seg_isa(void) { return cada_isa(); }

CADA_SEG_API int32_t cada_seg_classes(const cada_seg *model) {
  return model ? model->session.classes() : 0;
}

CADA_SEG_API int cada_seg_preprocess(const char *spec_json, const cada_seg_image *frame,
                                     int32_t height, int32_t width, void *row, size_t row_bytes) {
  return guarded([&] {
    if (!spec_json || !row) fail(CADA_SEG_USAGE, "spec_json or row is NULL");
    const Picture picture = picture_of(frame);
    const ModelSpec spec = spec_from_json(parse_json(spec_json, "the spec"), "the spec");
    Size size{height, width};
    if (height == 0 && width == 0) size = picture.size;
    if (size.height < 1 || size.width < 1 || size.height > 65535 || size.width > 65535) {
      fail(CADA_SEG_USAGE, "the input size is ", size_text(height, width),
           "; each side must be 1 to 65535 pixels");
    }
    Preprocessor preprocessor(spec.input);
    if (row_bytes < preprocessor.row_bytes(size)) {
      fail(CADA_SEG_USAGE, "row has ", row_bytes, " bytes; expected ", preprocessor.row_bytes(size));
    }
    preprocessor.fill(picture, size, row);
  });
}

CADA_SEG_API int cada_seg_decode(const uint8_t *data, size_t bytes, cada_seg_picture *picture) {
  return guarded([&] {
    if (!picture || (!data && bytes != 0)) fail(CADA_SEG_USAGE, "data or picture is NULL");
    *picture = {};
    const Decoded decoded = decode(data, bytes);
    picture->pixels = static_cast<uint8_t *>(std::malloc(decoded.pixels.size()));
    if (!picture->pixels) throw std::bad_alloc();
    std::memcpy(picture->pixels, decoded.pixels.data(), decoded.pixels.size());
    picture->height = decoded.size.height;
    picture->width = decoded.size.width;
  });
}

CADA_SEG_API void cada_seg_free_picture(cada_seg_picture *picture) {
  if (!picture) return;
  std::free(picture->pixels);
  *picture = {};
}

CADA_SEG_API const char *cada_seg_error(void) { return last_error.c_str(); }
CADA_SEG_API int cada_seg_abi(void) { return 1; }
