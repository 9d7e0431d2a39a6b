/* An open model: spec, engine, preprocessing, fused kernel and their buffers. */
#ifndef CADA_SEG_SESSION_H
#define CADA_SEG_SESSION_H
#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "cada_seg.h"
#include "preprocess.h"

namespace cada::seg {

class Session {
public:
  explicit Session(const cada_seg_options &options);

  void label(const Picture &frame, cada_seg_result *result);
  const std::string &backend() const { return backend_name_; }
  int32_t classes() const { return classes_; }

private:
  void fit();
  void check_classes(int64_t found);
  Size input_size(Size frame) const;
  Size checked_network_size(int64_t height, int64_t width) const;
  void encode(const RawScores &scores);
  void fuse(const RawScores &scores, Size labels, cada_seg_result *result) const;

  std::string path_;
  ModelSpec spec_;
  bool classes_named_ = false; /* by --spec or a manifest: then the count must fit */
  int32_t threads_;
  Size wanted_;
  std::unique_ptr<Backend> backend_;
  std::string backend_name_;
  std::unique_ptr<Preprocessor> preprocessor_;
  int32_t classes_ = 0;
  std::vector<uint16_t> encoded_; /* (classes, h, w) fp16 */
};

/* A caller's frame, checked. Throws Failure(USAGE). */
Picture picture_of(const cada_seg_image *frame);

} // namespace cada::seg
#endif
