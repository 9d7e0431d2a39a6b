/* ModelSpec: how a model is fed and read, the same JSON that Python keeps in the ONNX file
 * (docs/formats.md). What cada_seg cannot do exactly is refused here, never approximated. */
#ifndef CADA_SEG_SPEC_H
#define CADA_SEG_SPEC_H
#include <array>
#include <cstdint>
#include <string>

#include "json.h"

namespace cada::seg {

struct Size {
  int32_t height = 0, width = 0; /* 0, 0 = not fixed */

  bool given() const { return height != 0; }
  bool operator==(const Size &o) const { return height == o.height && width == o.width; }
  bool operator!=(const Size &o) const { return !(*this == o); }
};

enum class Resize { bilinear, bicubic };
enum class Element { float32, float16 };

inline size_t bytes_of(Element element) { return element == Element::float32 ? 4 : 2; }

struct InputSpec { /* x = (scale * v - mean) / std in the model's colour order */
  std::string name;
  bool bgr = false, nhwc = false;
  double scale = 1;
  std::array<double, 3> mean{}, std{};
  Resize resize = Resize::bilinear;
  Element element = Element::float32;
  Size size;
};

struct OutputSpec {
  std::string name;
  bool probabilities = false; /* meaning */
  bool probs_first = false;   /* order: softmax, then upsampling */
  bool align_corners = false;
};

struct ModelSpec {
  int32_t classes = 0;
  std::string class_set;
  InputSpec input;
  OutputSpec output;
  bool any_class_count = false; /* a preset stands for any class set */
};

/* Throws Failure: MISMATCH for another schema or text that is no JSON, USAGE for unknown keys and
 * bad values, MISMATCH for sliding windows, several scales and mirror images. `what` names the
 * source in messages. */
ModelSpec spec_from_json(const Json &json, const std::string &what);

} // namespace cada::seg
#endif
