/* Hands files of every kind to every reader of libcada_seg, and frames of awkward sizes to its
 * preprocessing, for the sanitizers to watch; a plan that opens labels frames. Prints a digest of what came out, so that two
 * architectures can be compared. Usage: driver FILE... */
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "cada_seg.h"

namespace {

uint64_t digest = 1469598103934665603u; /* FNV-1a */

void note(const void *data, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    digest = (digest ^ static_cast<const uint8_t *>(data)[i]) * 1099511628211u;
  }
}

void note_code(int code) {
  note(&code, sizeof code);
  if (code != CADA_SEG_DONE && *cada_seg_error() == '\0') std::abort();
}

/* Frames of a few sizes through an open model, labels at another size now and then. */
void label(cada_seg *model) {
  uint32_t dice = 7;
  for (const int32_t side : {16, 33, 47, 64}) {
    const int32_t width = 80 - side;
    std::vector<uint8_t> pixels(static_cast<size_t>(3 * side * width));
    for (uint8_t &value : pixels) {
      dice = dice * 1664525u + 1013904223u;
      value = static_cast<uint8_t>(dice >> 24);
    }
    const cada_seg_image frame{pixels.data(), side, width, 0};
    cada_seg_result result{};
    result.size = sizeof result;
    result.height = side % 2 ? 2 * side + 1 : side;
    result.width = side % 2 ? 3 * width : width;
    const size_t count = static_cast<size_t>(result.height * result.width);
    std::vector<uint8_t> labels(count);
    std::vector<float> entropy(count), confidence(count);
    result.labels = labels.data();
    result.entropy = entropy.data();
    result.confidence = confidence.data();
    note_code(cada_seg_label(model, &frame, &result));
    note(labels.data(), count);
    note(entropy.data(), count * sizeof(float));
    note(confidence.data(), count * sizeof(float));
  }
}

void read_as_everything(const std::string &path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> data{std::istreambuf_iterator<char>(file), {}};
  cada_seg_picture picture{};
  if (cada_seg_decode(reinterpret_cast<const uint8_t *>(data.data()), data.size(), &picture) ==
      CADA_SEG_DONE) {
    note(picture.pixels, size_t{3} * static_cast<size_t>(picture.height * picture.width));
  }
  cada_seg_free_picture(&picture);
  for (const char *backend : {"ort", "trt"}) {
    for (const char *spec : {static_cast<const char *>(nullptr), path.c_str()}) {
      cada_seg_options options{};
      options.size = sizeof options;
      options.model = path.c_str();
      options.spec = spec;
      options.backend = backend;
      options.ort_library = "/nonexistent/libonnxruntime.so";
      options.threads = 1;
      cada_seg *model = nullptr;
      const int code = cada_seg_open(&options, &model);
      if ((code == CADA_SEG_DONE) != (model != nullptr)) std::abort();
      if (model) label(model);
      cada_seg_close(model);
    }
  }
}

void preprocess(const std::string &resize, const std::string &kind, uint32_t *dice) {
  const auto roll = [dice](uint32_t sides) {
    *dice = *dice * 1664525u + 1013904223u;
    return static_cast<int32_t>(1 + (*dice >> 8) % sides);
  };
  const int32_t height = roll(60), width = roll(60), high = roll(60), wide = roll(60);
  std::vector<uint8_t> pixels(static_cast<size_t>(3 * height * width));
  for (uint8_t &value : pixels) value = static_cast<uint8_t>(roll(256) - 1);
  const std::string spec =
      R"({"schema": 1, "classes": {"name": "x", "names": ["a"], "label_ids": [0],
          "palette": [[0, 0, 0]]}, "output": {"align_corners": false},
          "input": {"colour": "BGR", "scale": 0.00392156862745098, "mean": [0.485, 0.456, 0.406],
          "std": [0.229, 0.224, 0.225], )" + kind + R"("resize": ")" + resize + "\"}}";
  const cada_seg_image frame{pixels.data(), height, width, 0};
  const size_t bytes = size_t{3} * static_cast<size_t>(high * wide) *
                       (kind.find("16") == std::string::npos ? 4 : 2);
  std::vector<uint8_t> row(bytes); /* exactly as large as it must be */
  note_code(cada_seg_preprocess(spec.c_str(), &frame, high, wide, row.data(), bytes));
  note(row.data(), bytes);
  note_code(cada_seg_preprocess(spec.c_str(), &frame, high, wide, row.data(), bytes - 1));
}

} // namespace

int main(int count, char **paths) {
  for (int i = 1; i < count; ++i) read_as_everything(paths[i]);
  uint32_t dice = 1;
  for (int i = 0; i < 60; ++i) {
    for (const char *resize : {"bilinear", "bicubic"}) {
      preprocess(resize, "", &dice);
      preprocess(resize, R"("layout": "NHWC", "dtype": "float16", )", &dice);
    }
  }
  note_code(cada_seg_open(nullptr, nullptr));
  note_code(cada_seg_label(nullptr, nullptr, nullptr));
  cada_seg_close(nullptr);
  cada_seg_free_picture(nullptr);
  std::printf("%016llx\n", static_cast<unsigned long long>(digest));
  return 0;
}
