/* What cada_seg uses of ONNX Runtime's C API, declared by us: opaque types, the two functions of its
 * entry point, and the places of 30 functions in its table. The table only ever grows at its end
 * (a promise of that project since its version 1), so the places hold for every release from 1.5. */
#ifndef CADA_SEG_ORT_TABLE_H
#define CADA_SEG_ORT_TABLE_H
#include <cstddef>
#include <cstdint>

extern "C" {
struct OrtApiBase {
  const void *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)();
};
struct OrtStatus;
struct OrtEnv;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtValue;
struct OrtMemoryInfo;
struct OrtAllocator;
struct OrtTypeInfo;
struct OrtTensorTypeAndShapeInfo;
}

constexpr uint32_t ORT_TABLE_VERSION = 5;
/* Members of its enums, which the C ABI passes as int. */
constexpr int ORT_FATAL = 4, ORT_FLOAT = 1, ORT_FLOAT16 = 10, ORT_ARENA = 1, ORT_MEMORY_DEFAULT = 0;

namespace cada::seg::ort {

template <size_t Place, class Pointer> struct Slot {
  static constexpr size_t place = Place;
  using Function = Pointer;
};

using Info = const OrtTensorTypeAndShapeInfo *;

/* clang-format off */
struct GetErrorMessage : Slot<2, const char *(*)(const OrtStatus *)> {};
struct CreateEnv : Slot<3, OrtStatus *(*)(int, const char *, OrtEnv **)> {};
struct CreateSessionFromArray : Slot<8, OrtStatus *(*)(const OrtEnv *, const void *, size_t, const OrtSessionOptions *, OrtSession **)> {};
struct Run : Slot<9, OrtStatus *(*)(OrtSession *, const OrtRunOptions *, const char *const *, const OrtValue *const *, size_t, const char *const *, size_t, OrtValue **)> {};
struct CreateSessionOptions : Slot<10, OrtStatus *(*)(OrtSessionOptions **)> {};
struct SetSessionLogSeverityLevel : Slot<22, OrtStatus *(*)(OrtSessionOptions *, int)> {};
struct SetIntraOpNumThreads : Slot<24, OrtStatus *(*)(OrtSessionOptions *, int)> {};
struct SetInterOpNumThreads : Slot<25, OrtStatus *(*)(OrtSessionOptions *, int)> {};
struct SessionGetInputCount : Slot<30, OrtStatus *(*)(const OrtSession *, size_t *)> {};
struct SessionGetOutputCount : Slot<31, OrtStatus *(*)(const OrtSession *, size_t *)> {};
struct SessionGetInputTypeInfo : Slot<33, OrtStatus *(*)(const OrtSession *, size_t, OrtTypeInfo **)> {};
struct SessionGetOutputTypeInfo : Slot<34, OrtStatus *(*)(const OrtSession *, size_t, OrtTypeInfo **)> {};
struct SessionGetInputName : Slot<36, OrtStatus *(*)(const OrtSession *, size_t, OrtAllocator *, char **)> {};
struct SessionGetOutputName : Slot<37, OrtStatus *(*)(const OrtSession *, size_t, OrtAllocator *, char **)> {};
struct CreateTensorWithDataAsOrtValue : Slot<49, OrtStatus *(*)(const OrtMemoryInfo *, void *, size_t, const int64_t *, size_t, int, OrtValue **)> {};
struct GetTensorMutableData : Slot<51, OrtStatus *(*)(OrtValue *, void **)> {};
struct CastTypeInfoToTensorInfo : Slot<55, OrtStatus *(*)(const OrtTypeInfo *, Info *)> {};
struct GetTensorElementType : Slot<60, OrtStatus *(*)(Info, int *)> {};
struct GetDimensionsCount : Slot<61, OrtStatus *(*)(Info, size_t *)> {};
struct GetDimensions : Slot<62, OrtStatus *(*)(Info, int64_t *, size_t)> {};
struct GetTensorTypeAndShape : Slot<65, OrtStatus *(*)(const OrtValue *, OrtTensorTypeAndShapeInfo **)> {};
struct CreateCpuMemoryInfo : Slot<69, OrtStatus *(*)(int, int, OrtMemoryInfo **)> {};
struct AllocatorFree : Slot<76, OrtStatus *(*)(OrtAllocator *, void *)> {};
struct GetAllocatorWithDefaultOptions : Slot<78, OrtStatus *(*)(OrtAllocator **)> {};
struct ReleaseEnv : Slot<92, void (*)(OrtEnv *)> {};
struct ReleaseStatus : Slot<93, void (*)(OrtStatus *)> {};
struct ReleaseMemoryInfo : Slot<94, void (*)(OrtMemoryInfo *)> {};
struct ReleaseSession : Slot<95, void (*)(OrtSession *)> {};
struct ReleaseValue : Slot<96, void (*)(OrtValue *)> {};
struct ReleaseTypeInfo : Slot<98, void (*)(OrtTypeInfo *)> {};
struct ReleaseTensorTypeAndShapeInfo : Slot<99, void (*)(OrtTensorTypeAndShapeInfo *)> {};
struct ReleaseSessionOptions : Slot<100, void (*)(OrtSessionOptions *)> {};
struct AddSessionConfigEntry : Slot<130, OrtStatus *(*)(OrtSessionOptions *, const char *, const char *)> {};
/* clang-format on */

} // namespace cada::seg::ort
#endif
