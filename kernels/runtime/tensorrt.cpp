/* Engine "trt": a plan on an NVIDIA GPU through TensorRT's C++ runtime API, 10.3 to 11. It only loads
 * plans (cada-deploy export builds them). Scores are copied to pinned host memory, and the fused
 * kernel takes them there; with 1/8 of the size in fp16 they are about 1 MB a frame.
 *
 * It has never run on TensorRT: it compiles against the open headers of 10.3 and 11.1, and runs
 * against the stand-in of tests/runtime/ (docs/cada_seg.md). */
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <mutex>

#include "backend.h"
#include "failure.h"

namespace cada::seg {
namespace {

void check(cudaError_t code, const char *what) {
  if (code == cudaSuccess) return;
  const bool none = code == cudaErrorNoDevice || code == cudaErrorInsufficientDriver ||
                    code == cudaErrorInvalidDevice;
  fail(none ? CADA_SEG_LACKS : CADA_SEG_FAILED, "CUDA, ", what, ": ", cudaGetErrorString(code));
}

/* TensorRT says why something failed to its logger alone, from any of its threads. */
class Logger final : public nvinfer1::ILogger {
public:
  void log(Severity severity, nvinfer1::AsciiChar const *message) noexcept override {
    if (severity > Severity::kERROR) return;
    try {
      const std::lock_guard<std::mutex> lock(mutex_);
      last_ = message ? message : "";
    } catch (...) { /* no memory for the sentence */
    }
  }
  std::string last() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return last_.empty() ? "no reason given" : last_;
  }

private:
  std::mutex mutex_;
  std::string last_;
};

class Stream {
public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "new stream"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream &) = delete;
  Stream &operator=(const Stream &) = delete;
  cudaStream_t get() const { return stream_; }

private:
  cudaStream_t stream_ = nullptr;
};

/* Memory that grows and is kept: no allocation once the largest frame has come. */
template <cudaError_t (*Take)(void **, size_t), cudaError_t (*Give)(void *)> class Kept {
public:
  Kept() = default;
  ~Kept() { Give(memory_); }
  Kept(const Kept &) = delete;
  Kept &operator=(const Kept &) = delete;

  void *of(size_t bytes) {
    if (bytes > size_) {
      Give(memory_);
      memory_ = nullptr;
      size_ = 0;
      check(Take(&memory_, bytes), "memory");
      size_ = bytes;
    }
    return memory_;
  }
  void *get() const { return memory_; }

private:
  void *memory_ = nullptr;
  size_t size_ = 0;
};

cudaError_t take_device(void **memory, size_t bytes) { return cudaMalloc(memory, bytes); }
cudaError_t take_pinned(void **memory, size_t bytes) {
  return cudaHostAlloc(memory, bytes, cudaHostAllocDefault);
}
cudaError_t give_device(void *memory) { return cudaFree(memory); }
cudaError_t give_pinned(void *memory) { return cudaFreeHost(memory); }
using DeviceMemory = Kept<take_device, give_device>;
using PinnedMemory = Kept<take_pinned, give_pinned>;

Shape shape_from(const nvinfer1::Dims &dims) {
  return Shape(dims.d, dims.d + std::max<int64_t>(dims.nbDims, 0));
}

nvinfer1::Dims dims_from(const Shape &shape) {
  nvinfer1::Dims dims{};
  dims.nbDims = static_cast<int32_t>(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) {
    dims.d[i] = static_cast<std::remove_reference_t<decltype(dims.d[0])>>(shape[i]);
  }
  return dims;
}

size_t elements(const Shape &shape) {
  size_t count = 1;
  for (const int64_t side : shape) count *= static_cast<size_t>(std::max<int64_t>(side, 0));
  return count;
}

size_t bytes_of(nvinfer1::DataType type) {
  switch (type) {
  case nvinfer1::DataType::kFLOAT:
  case nvinfer1::DataType::kINT32: return 4;
  case nvinfer1::DataType::kHALF: return 2;
  default: return 8; /* the widest there is: such an output is only given room */
  }
}

std::string library_version() {
  const int32_t v = getInferLibVersion(); /* 10.3.0 is 100300 */
  return std::to_string(v / 10000) + "." + std::to_string(v / 100 % 100) + "." +
         std::to_string(v % 100);
}

/* "10.3.0" against "10.3.0.30": what both say. A plan for other versions may be of an older one. */
void check_version(const BackendOptions &options) {
  const std::string here = library_version(), &built = options.plan_version;
  const bool same = (built + ".").compare(0, here.size() + 1, here + ".") == 0;
  if (same || options.version_compatible) return;
  fail(CADA_SEG_MISMATCH, options.path, " was built with TensorRT ", built, ", here is ", here,
       ", and it was not built for other versions; build it again on this machine: cada-deploy "
       "export MODEL.onnx -o ", options.path);
}

class TensorRT final : public Backend {
public:
  explicit TensorRT(const BackendOptions &options)
      : path_(options.path), verified_(options.verified) {
    check_version(options);
    check(cudaSetDevice(options.device), "device");
    stream_ = std::make_unique<Stream>();
    runtime_.reset(nvinfer1::createInferRuntime(logger_));
    if (!runtime_) fail(CADA_SEG_LACKS, "TensorRT gave no runtime: ", logger_.last());
    if (options.version_compatible) runtime_->setEngineHostCodeAllowed(true);
    engine_.reset(
        runtime_->deserializeCudaEngine(options.content.data(), options.content.size()));
    if (!engine_) {
      fail(CADA_SEG_MISMATCH, "TensorRT refuses ", path_, ": ", logger_.last(),
           ". A plan is for one model of GPU and one version; build it again on this machine");
    }
    context_.reset(engine_->createExecutionContext());
    if (!context_) fail(CADA_SEG_FAILED, "TensorRT gave no execution context: ", logger_.last());
    settle(options);
  }

  std::string name() const override {
    return "tensorrt " + library_version() + (verified_ ? "" : " (unverified plan)");
  }
  const Tensor &input() const override { return input_; }
  const Tensor &output() const override { return output_; }

  void *row(size_t bytes) override {
    row_bytes_ = bytes;
    return feed_.of(bytes * static_cast<size_t>(batch_));
  }

  RawScores run(const Shape &shape) override {
    const Shape whole = with_batch(shape);
    if (!context_->setInputShape(input_.name.c_str(), dims_from(whole))) {
      fail(CADA_SEG_MISMATCH, path_, " does not take an input of shape ", shape_text(whole),
           "; its profile goes from ", profile(nvinfer1::OptProfileSelector::kMIN), " to ",
           profile(nvinfer1::OptProfileSelector::kMAX), ". Give --size HxW, or build it for more");
    }
    copy_in();
    address_outputs();
    if (!context_->enqueueV3(stream_->get())) {
      fail(CADA_SEG_FAILED, path_, " failed on an input of shape ", shape_text(whole), ": ",
           logger_.last());
    }
    return copy_out();
  }

private:
  void settle(const BackendOptions &options) {
    std::vector<Tensor> inputs, outputs;
    for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
      const char *name = engine_->getIOTensorName(i);
      const bool input = engine_->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
      const nvinfer1::DataType type = engine_->getTensorDataType(name);
      (input ? inputs : outputs)
          .push_back({name,
                      type == nvinfer1::DataType::kHALF ? Element::float16 : Element::float32,
                      shape_from(engine_->getTensorShape(name))});
    }
    input_ = named(inputs, options.input_name, "input", path_);
    output_ = named(outputs, options.output_name, "output", path_);
    for (const Tensor &tensor : outputs) outputs_.push_back(tensor.name);
    output_memory_ = std::vector<DeviceMemory>(outputs_.size());
    require_plain(input_, "input");
    require_plain(output_, "output");
    fix_what_the_profile_fixes();
    batch_ = std::max<int64_t>(input_.shape.empty() ? 1 : input_.shape[0], 1);
  }

  /* A plan of one size resizes every frame to it, as a model of fixed size does. An open batch is
   * run at the smallest that the profile allows. */
  void fix_what_the_profile_fixes() {
    const Shape least = profile_shape(nvinfer1::OptProfileSelector::kMIN);
    const Shape most = profile_shape(nvinfer1::OptProfileSelector::kMAX);
    Shape &shape = input_.shape;
    if (least.size() != shape.size() || most.size() != shape.size()) return;
    for (size_t i = 0; i < shape.size(); ++i) {
      if (shape[i] < 0 && (i == 0 || least[i] == most[i])) shape[i] = least[i];
    }
  }

  Shape profile_shape(nvinfer1::OptProfileSelector which) const {
    return shape_from(engine_->getProfileShape(input_.name.c_str(), 0, which));
  }

  void require_plain(const Tensor &tensor, const char *what) const {
    const char *name = tensor.name.c_str();
    const nvinfer1::DataType type = engine_->getTensorDataType(name);
    const bool floats =
        type == nvinfer1::DataType::kFLOAT || type == nvinfer1::DataType::kHALF;
    if (!floats || engine_->getTensorFormat(name) != nvinfer1::TensorFormat::kLINEAR) {
      fail(CADA_SEG_MISMATCH, path_, ": ", what, " '", tensor.name,
           "' is not float32 or float16 in plain order; build the plan from the ONNX again");
    }
  }

  Shape with_batch(Shape shape) const {
    shape[0] = batch_; /* a plan of a fixed batch gets the same frame in every row */
    return shape;
  }

  std::string profile(nvinfer1::OptProfileSelector which) const {
    return shape_text(profile_shape(which));
  }

  void copy_in() {
    auto *feed = static_cast<uint8_t *>(feed_.get());
    for (size_t row = 1; row < static_cast<size_t>(batch_); ++row) {
      std::copy_n(feed, row_bytes_, feed + row * row_bytes_);
    }
    const size_t bytes = row_bytes_ * static_cast<size_t>(batch_);
    void *device = input_memory_.of(bytes);
    check(cudaMemcpyAsync(device, feed, bytes, cudaMemcpyHostToDevice, stream_->get()), "copy in");
    if (!context_->setTensorAddress(input_.name.c_str(), device)) {
      fail(CADA_SEG_FAILED, "TensorRT takes no address for its input: ", logger_.last());
    }
  }

  /* Every output needs an address, also those that nobody reads. */
  void address_outputs() {
    for (size_t i = 0; i < outputs_.size(); ++i) {
      const char *name = outputs_[i].c_str();
      const Shape shape = shape_from(context_->getTensorShape(name));
      const size_t bytes = elements(shape) * bytes_of(engine_->getTensorDataType(name));
      void *device = output_memory_[i].of(std::max<size_t>(bytes, 1));
      if (!context_->setTensorAddress(name, device)) {
        fail(CADA_SEG_FAILED, "TensorRT takes no address for its output: ", logger_.last());
      }
      if (outputs_[i] == output_.name) scores_shape_ = shape, scores_device_ = device;
    }
  }

  RawScores copy_out() {
    const RawScores found = scores_of(nullptr, output_.element, scores_shape_, path_);
    const size_t bytes = elements(scores_shape_) / static_cast<size_t>(scores_shape_[0]) *
                         cada::seg::bytes_of(output_.element);
    void *host = scores_.of(bytes);
    check(cudaMemcpyAsync(host, scores_device_, bytes, cudaMemcpyDeviceToHost, stream_->get()),
          "copy out");
    check(cudaStreamSynchronize(stream_->get()), "running the network");
    return {host, found.element, found.classes, found.size};
  }

  std::string path_;
  bool verified_;
  Logger logger_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  Tensor input_, output_;
  std::vector<std::string> outputs_;
  int64_t batch_ = 1;
  size_t row_bytes_ = 0;
  PinnedMemory feed_, scores_;
  DeviceMemory input_memory_;
  std::vector<DeviceMemory> output_memory_;
  Shape scores_shape_;
  void *scores_device_ = nullptr;
};

} // namespace

std::unique_ptr<Backend> open_tensorrt(const BackendOptions &options) {
  return std::make_unique<TensorRT>(options);
}

} // namespace cada::seg
