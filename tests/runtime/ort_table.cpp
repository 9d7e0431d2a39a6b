/* Compiled only: every place that kernels/runtime/ort_table.h states against the real header.
 * g++ -fsyntax-only -I kernels/runtime -I DIR_WITH_onnxruntime_c_api.h */
#include <cstddef>
#include <type_traits>

#include <onnxruntime_c_api.h>

namespace ours {
#define OrtApiBase OurOrtApiBase /* the real one is declared above */
#define OrtStatus OurOrtStatus
#define OrtEnv OurOrtEnv
#define OrtSession OurOrtSession
#define OrtSessionOptions OurOrtSessionOptions
#define OrtRunOptions OurOrtRunOptions
#define OrtValue OurOrtValue
#define OrtMemoryInfo OurOrtMemoryInfo
#define OrtAllocator OurOrtAllocator
#define OrtTypeInfo OurOrtTypeInfo
#define OrtTensorTypeAndShapeInfo OurOrtTensorTypeAndShapeInfo
#define ORT_FLOAT OUR_ORT_FLOAT
#include "ort_table.h"
#undef OrtApiBase
} // namespace ours

namespace table = ours::cada::seg::ort;

#define HOLDS(name) \
  static_assert(offsetof(OrtApi, name) / sizeof(void *) == table::name::place, #name)

HOLDS(GetErrorMessage);
HOLDS(CreateEnv);
HOLDS(CreateSessionFromArray);
HOLDS(Run);
HOLDS(CreateSessionOptions);
HOLDS(SetSessionLogSeverityLevel);
HOLDS(SetIntraOpNumThreads);
HOLDS(SetInterOpNumThreads);
HOLDS(SessionGetInputCount);
HOLDS(SessionGetOutputCount);
HOLDS(SessionGetInputTypeInfo);
HOLDS(SessionGetOutputTypeInfo);
HOLDS(SessionGetInputName);
HOLDS(SessionGetOutputName);
HOLDS(CreateTensorWithDataAsOrtValue);
HOLDS(GetTensorMutableData);
HOLDS(CastTypeInfoToTensorInfo);
HOLDS(GetTensorElementType);
HOLDS(GetDimensionsCount);
HOLDS(GetDimensions);
HOLDS(GetTensorTypeAndShape);
HOLDS(CreateCpuMemoryInfo);
HOLDS(AllocatorFree);
HOLDS(GetAllocatorWithDefaultOptions);
HOLDS(ReleaseEnv);
HOLDS(ReleaseStatus);
HOLDS(ReleaseMemoryInfo);
HOLDS(ReleaseSession);
HOLDS(ReleaseValue);
HOLDS(ReleaseTypeInfo);
HOLDS(ReleaseTensorTypeAndShapeInfo);
HOLDS(ReleaseSessionOptions);
HOLDS(AddSessionConfigEntry);

static_assert(ours::ORT_FATAL == ORT_LOGGING_LEVEL_FATAL);
static_assert(ours::OUR_ORT_FLOAT == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
static_assert(ours::ORT_FLOAT16 == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
static_assert(ours::ORT_ARENA == OrtArenaAllocator);
static_assert(ours::ORT_MEMORY_DEFAULT == OrtMemTypeDefault);
static_assert(ours::ORT_TABLE_VERSION <= ORT_API_VERSION);
