/* What must be known of an ONNX file before an engine sees it: its spec, and that its weights are
 * inside. Reads protobuf's wire format and no more of it than that. */
#ifndef CADA_SEG_ONNX_FILE_H
#define CADA_SEG_ONNX_FILE_H
#include <optional>
#include <string>

#include "files.h"

namespace cada::seg {

struct OnnxFile {
  std::optional<std::string> spec; /* metadata_props["cada_deploy.model_spec"] */
  bool external_weights = false;
};

/* Throws Failure(MISMATCH) for bytes that are no ONNX model or are cut short. */
OnnxFile examine_onnx(const Bytes &content, const std::string &name);

} // namespace cada::seg
#endif
