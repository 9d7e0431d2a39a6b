/* The contract of an engine: one frame's input in, raw scores on the host out. One file per engine;
 * a new one is a new file and a line in open_backend (backend.cpp). */
#ifndef CADA_SEG_BACKEND_H
#define CADA_SEG_BACKEND_H
#include <memory>
#include <string>
#include <vector>

#include "files.h"
#include "spec.h"

namespace cada::seg {

using Shape = std::vector<int64_t>; /* -1 = not fixed; empty = not declared */

struct Tensor {
  std::string name;
  Element element = Element::float32;
  Shape shape;
};

struct RawScores { /* (classes, height, width) of row 0; valid until the next run */
  const void *values;
  Element element;
  int32_t classes;
  Size size;
};

class Backend {
public:
  virtual ~Backend() = default;
  virtual std::string name() const = 0; /* with its version */
  virtual const Tensor &input() const = 0;
  virtual const Tensor &output() const = 0;
  /* The memory that run() reads: one row of the batch, at least `bytes`. Kept between calls. */
  virtual void *row(size_t bytes) = 0;
  /* shape is (1, 3, H, W) or (1, H, W, 3) of what stands in row(). Throws Failure(MISMATCH) when
   * the network cannot take it or gives other than (n, classes, h, w). */
  virtual RawScores run(const Shape &shape) = 0;
};

struct BackendOptions {
  std::string path;
  Bytes content;            /* the model or plan, examined */
  std::string input_name;   /* "" = the only one */
  std::string output_name;
  std::string ort_library;  /* "" = search */
  std::string plan_version; /* trt */
  bool version_compatible = false, verified = false;
  int32_t threads = 1;
  int32_t device = 0;
};

std::unique_ptr<Backend> open_onnxruntime(const BackendOptions &options);
std::unique_ptr<Backend> open_tensorrt(const BackendOptions &options);

/* The tensor called `name`, or the only one. */
const Tensor &named(const std::vector<Tensor> &tensors, const std::string &name, const char *what,
                    const std::string &path);

std::string shape_text(const Shape &shape);

/* Throws Failure(MISMATCH) unless `shape` is that of per-class scores. */
RawScores scores_of(const void *values, Element element, const Shape &shape,
                    const std::string &path);

} // namespace cada::seg
#endif
