/* What the stand-in headers declare. A plan is 28 bytes of header ('ftrt', 0, ..., version) and then,
 * in 32-bit little endian: "lin1", batch (0 = any), classes, smallest and largest side, half scores
 * (0, 1), fail in enqueue (0, 1), and (classes, 4) float32: score = ((w0 x0 + w1 x1) + w2 x2) + b.
 * Work is queued on the stream and done when it is synchronised, as on a GPU: reading too early
 * reads nothing. A second output that nobody asks for must get its memory, too. */
#include "NvInferRuntime.h"

#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

using namespace nvinfer1;

struct CUstream_st {
  std::vector<std::function<void()>> queued;
};

extern "C" {
int32_t getInferLibVersion() noexcept { return 100300; }

cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  for (const auto &work : stream->queued) work();
  stream->queued.clear();
  return cudaSuccess;
}
cudaError_t cudaMalloc(void **memory, std::size_t bytes) {
  *memory = std::malloc(bytes);
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void *memory) {
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **memory, std::size_t bytes, unsigned) {
  return cudaMalloc(memory, bytes);
}
cudaError_t cudaFreeHost(void *memory) { return cudaFree(memory); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  stream->queued.push_back([=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}
const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "stand-in error";
}
}

namespace {

#ifdef __aarch64__
using Half = __fp16; /* g++ 12 knows no _Float16 in C++ there */
#else
using Half = _Float16;
#endif

struct Plan {
  int32_t batch, classes, smallest, largest, half, fails;
  std::vector<float> weights;
};

class Context final : public IExecutionContext {
public:
  explicit Context(const Plan &plan) : plan_(plan) {}

  bool setInputShape(char const *name, Dims const &dims) noexcept override {
    const bool fits = std::string(name) == "image" && dims.nbDims == 4 && dims.d[1] == 3 &&
                      (plan_.batch == 0 || dims.d[0] == plan_.batch) &&
                      dims.d[2] >= plan_.smallest && dims.d[2] <= plan_.largest &&
                      dims.d[3] >= plan_.smallest && dims.d[3] <= plan_.largest;
    if (fits) input_ = dims;
    return fits;
  }
  Dims getTensorShape(char const *name) const noexcept override {
    Dims dims = input_;
    if (std::string(name) != "image") dims.d[1] = std::string(name) == "logits" ? plan_.classes : 1;
    return dims;
  }
  bool setTensorAddress(char const *name, void *data) noexcept override {
    void **place = std::string(name) == "image" ? &image_
                   : std::string(name) == "logits" ? &logits_
                                                   : &other_;
    *place = data;
    return data != nullptr;
  }
  bool enqueueV3(cudaStream_t stream) noexcept override {
    if (plan_.fails || !image_ || !logits_ || !other_) return false;
    stream->queued.push_back([this] { run(); });
    return true;
  }

private:
  void run() const {
    const auto plane = static_cast<size_t>(input_.d[2] * input_.d[3]);
    for (int64_t n = 0; n < input_.d[0]; ++n) {
      const float *x = static_cast<const float *>(image_) + 3 * plane * static_cast<size_t>(n);
      for (size_t c = 0; c < static_cast<size_t>(plan_.classes); ++c) {
        const float *w = plan_.weights.data() + 4 * c;
        const size_t start = (static_cast<size_t>(n) * static_cast<size_t>(plan_.classes) + c) * plane;
        for (size_t i = 0; i < plane; ++i) {
          const float score = ((w[0] * x[i] + w[1] * x[plane + i]) + w[2] * x[2 * plane + i]) + w[3];
          if (plan_.half) static_cast<Half *>(logits_)[start + i] = static_cast<Half>(score);
          else static_cast<float *>(logits_)[start + i] = score;
        }
      }
    }
    std::memset(other_, 0, plane * static_cast<size_t>(input_.d[0]) * 4);
  }

  const Plan &plan_;
  Dims input_{};
  void *image_ = nullptr, *logits_ = nullptr, *other_ = nullptr;
};

class Engine final : public ICudaEngine {
public:
  explicit Engine(Plan plan) : plan_(std::move(plan)) {}

  IExecutionContext *createExecutionContext() noexcept override { return new Context(plan_); }
  int32_t getNbIOTensors() const noexcept override { return 3; }
  char const *getIOTensorName(int32_t index) const noexcept override {
    static const char *const names[] = {"image", "labels", "logits"};
    return names[index];
  }
  TensorIOMode getTensorIOMode(char const *name) const noexcept override {
    return std::string(name) == "image" ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
  }
  DataType getTensorDataType(char const *name) const noexcept override {
    if (std::string(name) == "labels") return DataType::kINT32;
    return std::string(name) == "logits" && plan_.half ? DataType::kHALF : DataType::kFLOAT;
  }
  TensorFormat getTensorFormat(char const *) const noexcept override {
    return TensorFormat::kLINEAR;
  }
  Dims getTensorShape(char const *name) const noexcept override {
    const int64_t channels = std::string(name) == "image"    ? 3
                             : std::string(name) == "logits" ? plan_.classes
                                                             : 1;
    return Dims{4, {plan_.batch ? plan_.batch : -1, channels, -1, -1}};
  }
  Dims getProfileShape(char const *, int32_t, OptProfileSelector select) const noexcept override {
    const int64_t side =
        select == OptProfileSelector::kMIN ? plan_.smallest : plan_.largest;
    return Dims{4, {plan_.batch ? plan_.batch : 1, 3, side, side}};
  }

private:
  Plan plan_;
};

class Runtime final : public IRuntime {
public:
  explicit Runtime(ILogger &logger) : logger_(logger) {}

  ICudaEngine *deserializeCudaEngine(void const *blob, std::size_t size) noexcept override {
    const char *bytes = static_cast<const char *>(blob);
    Plan plan{};
    if (size < 56 || std::memcmp(bytes + 28, "lin1", 4) != 0) return refused();
    int32_t numbers[6];
    std::memcpy(numbers, bytes + 32, sizeof numbers);
    plan = {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], {}};
    plan.weights.resize(4 * static_cast<size_t>(plan.classes));
    if (size != 56 + 16 * static_cast<size_t>(plan.classes)) return refused();
    std::memcpy(plan.weights.data(), bytes + 56, size - 56);
    return new Engine(plan);
  }
  void setEngineHostCodeAllowed(bool) noexcept override {}

private:
  ICudaEngine *refused() noexcept {
    logger_.log(ILogger::Severity::kWARNING, "a remark");
    logger_.log(ILogger::Severity::kERROR, "the stand-in knows no such plan");
    return nullptr;
  }
  ILogger &logger_;
};

} // namespace

extern "C" void *createInferRuntime_INTERNAL(void *logger, int32_t) noexcept {
  return std::getenv("STAND_IN_NO_RUNTIME") ? nullptr
                                            : new Runtime(*static_cast<ILogger *>(logger));
}
