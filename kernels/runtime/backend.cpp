#include "backend.h"

#include "failure.h"

namespace cada::seg {

std::string shape_text(const Shape &shape) {
  std::string found = "(";
  for (const int64_t side : shape) {
    found += (found.size() > 1 ? ", " : "") + (side < 0 ? "?" : std::to_string(side));
  }
  return found + ")";
}

const Tensor &named(const std::vector<Tensor> &tensors, const std::string &name, const char *what,
                    const std::string &path) {
  std::string all;
  for (const Tensor &tensor : tensors) {
    if (!name.empty() && tensor.name == name) return tensor;
    all += (all.empty() ? "" : ", ") + tensor.name;
  }
  if (!name.empty()) {
    fail(CADA_SEG_MISMATCH, path, " has no ", what, " '", name, "'; it has ", all);
  }
  if (tensors.size() != 1) {
    fail(CADA_SEG_USAGE, path, " has ", tensors.size(), " ", what, "s (", all,
         "); say which one in the spec (", what, ".name)");
  }
  return tensors[0];
}

RawScores scores_of(const void *values, Element element, const Shape &shape,
                    const std::string &path) {
  bool fine = shape.size() == 4;
  for (const int64_t side : shape) fine = fine && side >= 1 && side <= 65535;
  if (!fine || shape[1] > 255) {
    fail(CADA_SEG_MISMATCH, path, " gave scores of shape ", shape_text(shape),
         "; expected (n, classes, h, w) with 1 to 255 classes. A label map has no scores: export the "
         "model without its argmax");
  }
  return {values, element, static_cast<int32_t>(shape[1]),
          {static_cast<int32_t>(shape[2]), static_cast<int32_t>(shape[3])}};
}

} // namespace cada::seg
