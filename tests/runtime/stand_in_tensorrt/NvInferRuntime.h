/* A stand-in for TensorRT's runtime headers: the names that kernels/runtime/tensorrt.cpp uses and
 * nothing else, so that this file can be run where there is no TensorRT. It proves our side of the
 * calls, nothing about TensorRT. test_tensorrt.py compiles the same file against the real headers
 * where they are found. The "plan" is a linear model per pixel (stand_in.cpp). */
#ifndef STAND_IN_NV_INFER_RUNTIME_H
#define STAND_IN_NV_INFER_RUNTIME_H
#include <cstddef>
#include <cstdint>

#include "cuda_runtime_api.h"

extern "C" {
void *createInferRuntime_INTERNAL(void *logger, int32_t version) noexcept;
int32_t getInferLibVersion() noexcept;
}

namespace nvinfer1 {

using AsciiChar = char;

struct Dims {
  static constexpr int32_t MAX_DIMS = 8;
  int32_t nbDims;
  int64_t d[MAX_DIMS];
};

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3 };
enum class TensorIOMode : int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
enum class TensorFormat : int32_t { kLINEAR = 0, kCHW2 = 1 };
enum class OptProfileSelector : int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };

class ILogger {
public:
  enum class Severity : int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };
  virtual void log(Severity severity, AsciiChar const *message) noexcept = 0;
  virtual ~ILogger() = default;
};

class IExecutionContext {
public:
  virtual ~IExecutionContext() noexcept = default;
  virtual bool setInputShape(char const *name, Dims const &dims) noexcept = 0;
  virtual Dims getTensorShape(char const *name) const noexcept = 0;
  virtual bool setTensorAddress(char const *name, void *data) noexcept = 0;
  virtual bool enqueueV3(cudaStream_t stream) noexcept = 0;
};

class ICudaEngine {
public:
  virtual ~ICudaEngine() noexcept = default;
  virtual IExecutionContext *createExecutionContext() noexcept = 0;
  virtual int32_t getNbIOTensors() const noexcept = 0;
  virtual char const *getIOTensorName(int32_t index) const noexcept = 0;
  virtual TensorIOMode getTensorIOMode(char const *name) const noexcept = 0;
  virtual DataType getTensorDataType(char const *name) const noexcept = 0;
  virtual TensorFormat getTensorFormat(char const *name) const noexcept = 0;
  virtual Dims getTensorShape(char const *name) const noexcept = 0;
  virtual Dims getProfileShape(char const *name, int32_t profile,
                               OptProfileSelector select) const noexcept = 0;
};

class IRuntime {
public:
  virtual ~IRuntime() noexcept = default;
  virtual ICudaEngine *deserializeCudaEngine(void const *blob, std::size_t size) noexcept = 0;
  virtual void setEngineHostCodeAllowed(bool allowed) noexcept = 0;
};

inline IRuntime *createInferRuntime(ILogger &logger) noexcept {
  return static_cast<IRuntime *>(createInferRuntime_INTERNAL(&logger, 100300));
}

} // namespace nvinfer1
#endif
