#include "session.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>

#include "cada_fused.h"
#include "failure.h"
#include "onnx_file.h"
#include "plan_file.h"

namespace cada::seg {
namespace {

using Clock = std::chrono::steady_clock;

/* Milliseconds since the last call. */
class Lap {
public:
  double ms() {
    const Clock::time_point now = Clock::now();
    const double passed = std::chrono::duration<double, std::milli>(now - last_).count();
    last_ = now;
    return passed;
  }

private:
  Clock::time_point last_ = Clock::now();
};

void check_kernel(int code) {
  if (code == CADA_OK) return;
  const int kind = code == CADA_NO_MEMORY ? CADA_SEG_FAILED : CADA_SEG_USAGE;
  fail(kind, "fused kernel: ", cada_error_text(code));
}

/* CADA_FORCE_ISA, as in Python: for tests; results do not depend on it. */
void choose_isa() {
  const char *wanted = std::getenv("CADA_FORCE_ISA");
  if (wanted && *wanted && cada_choose_isa(wanted) != CADA_OK) {
    fail(CADA_SEG_LACKS, "the instruction set '", wanted, "' was forced (CADA_FORCE_ISA), but this "
         "processor or this build does not have it");
  }
}

Json parsed_spec(const std::string &text, const std::string &name) {
  return parse_json(text, "the spec in " + name);
}

/* The model's bytes and its own spec, judged without any engine. */
std::optional<Json> examine(BackendOptions *options, bool trt) {
  if (trt) {
    const PlanFile plan = examine_plan(options->content, options->path);
    options->plan_version = plan.version;
    options->version_compatible = plan.version_compatible;
    options->verified = plan.verified;
    return plan.spec;
  }
  const OnnxFile onnx = examine_onnx(options->content, options->path);
  if (onnx.external_weights) {
    fail(CADA_SEG_MISMATCH, options->path, " keeps weights in other files, which cada_seg does not "
         "read; save the model with its weights inside");
  }
  if (!onnx.spec) return std::nullopt;
  return parsed_spec(*onnx.spec, options->path);
}

} // namespace

Picture picture_of(const cada_seg_image *frame) {
  if (!frame || !frame->pixels || frame->height < 1 || frame->width < 1 ||
      frame->height > 65535 || frame->width > 65535 ||
      int64_t{frame->height} * frame->width > INT32_MAX / 3) {
    fail(CADA_SEG_USAGE, "a frame is RGB of 1 to 65535 pixels a side and at most 2^31 / 3 in all");
  }
  const int64_t plain = int64_t{3} * frame->width;
  if (frame->row_bytes != 0 && frame->row_bytes < plain) {
    fail(CADA_SEG_USAGE, "row_bytes is ", frame->row_bytes, "; a row has ", plain);
  }
  return {frame->pixels, {frame->height, frame->width},
          frame->row_bytes ? frame->row_bytes : plain};
}

Session::Session(const cada_seg_options &given)
    : path_(given.model ? given.model : ""), threads_(given.threads),
      wanted_{given.input_height, given.input_width} {
  const std::string backend = given.backend ? given.backend : "ort";
  if (backend != "ort" && backend != "trt") {
    fail(CADA_SEG_USAGE, "the back end is '", backend, "'; known: ort, trt");
  }
  if (path_.empty()) fail(CADA_SEG_USAGE, "no model is named");
  if (threads_ < 1 || threads_ > 1024) fail(CADA_SEG_USAGE, "threads is ", threads_, "; expected 1 to 1024");
  if ((wanted_.height != 0 || wanted_.width != 0) &&
      (std::min(wanted_.height, wanted_.width) < 1 || std::max(wanted_.height, wanted_.width) > 65535)) {
    fail(CADA_SEG_USAGE, "the input size is ", size_text(wanted_.height, wanted_.width),
         "; each side must be 1 to 65535 pixels");
  }
  choose_isa();
  const bool trt = backend == "trt";
  BackendOptions options;
  options.path = path_;
  options.content = read_file(path_, "model");
  options.ort_library = given.ort_library ? given.ort_library : "";
  options.threads = threads_;
  options.device = given.device;
  std::optional<Json> spec = examine(&options, trt);
  const bool stated = given.spec && *given.spec;
  if (stated) spec = spec_in(given.spec);
  classes_named_ = stated || trt;
  if (!spec && trt) {
    fail(CADA_SEG_MISMATCH, path_, " has no ", manifest_path(path_), " beside it, so nothing says "
         "how it is fed. Copy the manifest too, or give --spec FILE.json");
  }
  if (!spec) {
    fail(CADA_SEG_USAGE, path_, " does not say how it must be fed, and that is never guessed. Give "
         "--spec FILE.json (docs/cada_seg.md shows how to make one), or export the model with "
         "cada-deploy export, which puts the spec inside");
  }
  spec_ = spec_from_json(*spec, stated ? std::string(given.spec) : "the spec in " + path_);
  options.input_name = spec_.input.name;
  options.output_name = spec_.output.name;
  backend_ = trt ? open_tensorrt(options) : open_onnxruntime(options);
  backend_name_ = backend_->name();
  fit();
}

/* The file's own word on element type, size and classes stands above the spec's; where both speak
 * they must agree. */
void Session::fit() {
  const Tensor &image = backend_->input(), &scores = backend_->output();
  InputSpec &input = spec_.input;
  input.element = image.element;
  if (!image.shape.empty()) {
    if (image.shape.size() != 4) {
      fail(CADA_SEG_MISMATCH, path_, ": input '", image.name, "' has shape ",
           shape_text(image.shape), "; expected an image batch of rank 4");
    }
    const int64_t channels = image.shape[input.nhwc ? 3 : 1];
    if (channels != 3 && channels >= 0) {
      fail(CADA_SEG_MISMATCH, path_, ": input '", image.name, "' has ", channels,
           " channels in layout ", input.nhwc ? "NHWC" : "NCHW", "; expected 3");
    }
    const int64_t height = image.shape[input.nhwc ? 1 : 2], width = image.shape[input.nhwc ? 2 : 3];
    if (height > 0 && width > 0) {
      const Size fixed = checked_network_size(height, width);
      if (input.size.given() && input.size != fixed) {
        fail(CADA_SEG_MISMATCH, path_, " takes ", size_text(height, width), " (HxW) but its spec "
             "says ", size_text(input.size.height, input.size.width), "; correct input.size");
      }
      input.size = fixed;
    }
  }
  if (input.size.given() && wanted_.given() && input.size != wanted_) {
    fail(CADA_SEG_USAGE, "the model takes ", size_text(input.size.height, input.size.width),
         " (HxW) and nothing else, but --size is ", size_text(wanted_.height, wanted_.width),
         "; leave --size out, or export the model with that size");
  }
  if (!scores.shape.empty() && scores.shape.size() != 4) {
    fail(CADA_SEG_MISMATCH, path_, ": output '", scores.name, "' has shape ",
         shape_text(scores.shape), "; expected per-class scores (n, classes, h, w). Export the "
         "model without its argmax");
  }
  if (!scores.shape.empty() && scores.shape[1] > 0) check_classes(scores.shape[1]);
  preprocessor_ = std::make_unique<Preprocessor>(input);
}

Size Session::checked_network_size(int64_t height, int64_t width) const {
  if (height > 65535 || width > 65535) {
    fail(CADA_SEG_MISMATCH, path_, " takes ", size_text(height, width), " (HxW) pixels; expected at "
         "most 65535 a side");
  }
  return {static_cast<int32_t>(height), static_cast<int32_t>(width)};
}

void Session::check_classes(int64_t found) {
  const bool any = spec_.any_class_count && !classes_named_;
  if ((found != spec_.classes && !any) || found < 1 || found > 255) {
    fail(CADA_SEG_MISMATCH, path_, " gives ", found, " classes but class set '", spec_.class_set,
         "' has ", spec_.classes, "; name the right set in the spec");
  }
  classes_ = static_cast<int32_t>(found);
}

Size Session::input_size(Size frame) const {
  if (spec_.input.size.given()) return spec_.input.size;
  return wanted_.given() ? wanted_ : frame;
}

void Session::label(const Picture &frame, cada_seg_result *result) {
  if (!result->labels) fail(CADA_SEG_USAGE, "result.labels is NULL");
  Size labels{result->height, result->width};
  if (labels.height == 0 && labels.width == 0) labels = frame.size;
  Lap lap;
  const Size size = input_size(frame.size);
  preprocessor_->fill(frame, size, backend_->row(preprocessor_->row_bytes(size)));
  result->preprocess_ms = lap.ms();
  const Shape shape = spec_.input.nhwc ? Shape{1, size.height, size.width, 3}
                                       : Shape{1, 3, size.height, size.width};
  const RawScores scores = backend_->run(shape);
  check_classes(scores.classes);
  result->network_ms = lap.ms();
  encode(scores);
  result->encode_ms = lap.ms();
  fuse(scores, labels, result);
  result->fuse_ms = lap.ms();
}

void Session::encode(const RawScores &scores) {
  const size_t pixels = static_cast<size_t>(scores.size.height) * static_cast<size_t>(scores.size.width);
  encoded_.resize(pixels * static_cast<size_t>(scores.classes));
  check_kernel(cada_encode(scores.values,
                           scores.element == Element::float32 ? CADA_FLOAT32 : CADA_FLOAT16,
                           spec_.output.probabilities ? CADA_PROBABILITIES : CADA_LOGITS, 1,
                           scores.classes, static_cast<int64_t>(pixels), encoded_.data(), threads_));
  /* An invalid pixel is NaN in every class, so the first class tells. */
  const bool any = std::any_of(encoded_.begin(), encoded_.begin() + static_cast<ptrdiff_t>(pixels),
                               [](uint16_t half) { return (half & 0x7FFF) <= 0x7C00; });
  if (!any) {
    reject("non-finite-scores", "the model gave no finite scores for any pixel of this image");
  }
}

void Session::fuse(const RawScores &scores, Size labels, cada_seg_result *result) const {
  const cada_frame frame{encoded_.data(),
                         nullptr,
                         scores.classes,
                         scores.size.height,
                         scores.size.width,
                         labels.height,
                         labels.width,
                         spec_.output.align_corners ? 1 : 0,
                         spec_.output.probs_first ? CADA_ORDER_PROBS : CADA_ORDER_LOGITS};
  /* Every valid pixel keeps its class: the rule of `cada-deploy predict`. */
  const float thresholds[256] = {};
  const cada_rule rule{thresholds, nullptr, CADA_CONFIDENCE, CADA_GE};
  int64_t predicted[256], selected[256], masked = 0;
  check_kernel(cada_select(&frame, &rule, threads_, result->labels, predicted, selected,
                           &result->invalid, &masked, result->entropy, result->confidence));
}

} // namespace cada::seg
