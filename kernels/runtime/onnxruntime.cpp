/* Engine "ort": ONNX Runtime on the CPU through its C API, found with dlopen, so that neither its
 * headers nor its library are needed to build.
 *
 * The API is a table of functions whose order never changes once released (API version 5 is enough
 * here; ONNX Runtime 1.5 and later give it). What is used of the table is declared below by its
 * place in it; tests/runtime/ort_table.cpp holds the places to the real header where it is found.
 * Settings are those of cada_deploy/engines/onnxrt.py, so the scores have the same bits. */
#include <algorithm>
#include <cstdlib>
#include <dlfcn.h>

#include "backend.h"
#include "failure.h"
#include "ort_table.h"

namespace cada::seg {
namespace {

class Library {
public:
  explicit Library(const std::string &wanted) {
    const char *variable = std::getenv("CADA_ORT_LIBRARY");
    std::string tried;
    if (!wanted.empty()) {
      load(wanted.c_str(), &tried);
    } else if (variable && *variable) {
      load(variable, &tried);
    } else {
      for (const char *name : {"libonnxruntime.so.1", "libonnxruntime.so"}) {
        if (!handle_) load(name, &tried);
      }
    }
    if (!handle_) {
      fail(CADA_SEG_LACKS, "ONNX Runtime cannot be loaded: ", tried,
           ". Install it (the release archive's libonnxruntime.so, or the one inside Python's "
           "onnxruntime package under onnxruntime/capi/) and name it with --ort-library or "
           "CADA_ORT_LIBRARY");
    }
  }

  const OrtApiBase *base() const {
    const auto get = reinterpret_cast<const OrtApiBase *(*)()>(dlsym(handle_, "OrtGetApiBase"));
    return get ? get() : nullptr;
  }

private:
  /* Never closed: its threads and its static objects outlive any moment at which that were safe. */
  void load(const char *name, std::string *tried) {
    handle_ = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (handle_) return;
    const char *why = dlerror();
    *tried += (tried->empty() ? "" : "; ") + std::string(why ? why : name);
  }

  void *handle_ = nullptr;
};

/* The functions that are used, and owners for what they make. */
class Api {
public:
  explicit Api(const Library &library) {
    const OrtApiBase *base = library.base();
    table_ = base ? static_cast<void *const *>(base->GetApi(ORT_TABLE_VERSION)) : nullptr;
    if (!table_) {
      fail(CADA_SEG_LACKS, "this ONNX Runtime ", base ? base->GetVersionString() : "library",
           " does not offer API version ", ORT_TABLE_VERSION, "; use 1.5 or later");
    }
    version_ = base->GetVersionString();
  }

  const std::string &version() const { return version_; }

  template <class Slot> typename Slot::Function get() const {
    return reinterpret_cast<typename Slot::Function>(table_[Slot::place]);
  }

  /* Calls a function that gives a status; its sentence on failure, "" when it went well. */
  template <class Slot, class... Arguments> std::string tried(Arguments... arguments) const {
    OrtStatus *status = get<Slot>()(arguments...);
    if (!status) return "";
    const std::string why = get<ort::GetErrorMessage>()(status);
    get<ort::ReleaseStatus>()(status);
    return why.empty() ? "unknown error" : why;
  }

  template <class Slot, class... Arguments> void call(Arguments... arguments) const {
    const std::string why = tried<Slot>(arguments...);
    if (!why.empty()) fail(CADA_SEG_FAILED, "ONNX Runtime: ", why);
  }

private:
  void *const *table_;
  std::string version_;
};

template <class Object, class Release> class Owned {
public:
  explicit Owned(const Api &api) : api_(&api) {}
  ~Owned() { reset(); }
  Owned(const Owned &) = delete;
  Owned &operator=(const Owned &) = delete;

  Object *get() const { return object_; }
  Object **fill() {
    reset();
    return &object_;
  }

private:
  void reset() {
    if (object_) api_->get<Release>()(object_);
    object_ = nullptr;
  }

  const Api *api_;
  Object *object_ = nullptr;
};

using Env = Owned<OrtEnv, ort::ReleaseEnv>;
using Options = Owned<OrtSessionOptions, ort::ReleaseSessionOptions>;
using Session = Owned<OrtSession, ort::ReleaseSession>;
using Memory = Owned<OrtMemoryInfo, ort::ReleaseMemoryInfo>;
using Value = Owned<OrtValue, ort::ReleaseValue>;
using TypeInfo = Owned<OrtTypeInfo, ort::ReleaseTypeInfo>;
using ShapeInfo = Owned<OrtTensorTypeAndShapeInfo, ort::ReleaseTensorTypeAndShapeInfo>;

class OnnxRuntime final : public Backend {
public:
  explicit OnnxRuntime(const BackendOptions &options)
      : path_(options.path), library_(options.ort_library), api_(library_), env_(api_),
        session_(api_), memory_(api_), scores_(api_), scores_info_(api_) {
    open(options);
    input_ = named(tensors(true), options.input_name, "input", path_);
    output_ = named(tensors(false), options.output_name, "output", path_);
    batch_ = input_.shape.empty() || input_.shape[0] < 1 ? 1 : input_.shape[0];
  }

  std::string name() const override { return "onnxruntime " + api_.version(); }
  const Tensor &input() const override { return input_; }
  const Tensor &output() const override { return output_; }

  void *row(size_t bytes) override {
    row_bytes_ = bytes;
    feed_.resize(bytes * static_cast<size_t>(batch_));
    return feed_.data();
  }

  RawScores run(const Shape &shape) override {
    Shape whole = shape;
    whole[0] = batch_; /* a model of a fixed batch gets the same frame in every row */
    for (size_t row = 1; row < static_cast<size_t>(batch_); ++row) {
      std::copy_n(feed_.data(), row_bytes_, feed_.data() + row * row_bytes_);
    }
    Value input(api_);
    api_.call<ort::CreateTensorWithDataAsOrtValue>(
        memory_.get(), static_cast<void *>(feed_.data()), feed_.size(), whole.data(), whole.size(),
        element_code(input_.element), input.fill());
    const char *input_name = input_.name.c_str(), *output_name = output_.name.c_str();
    const OrtValue *feed = input.get();
    const std::string why = api_.tried<ort::Run>(
        session_.get(), static_cast<const OrtRunOptions *>(nullptr), &input_name, &feed, size_t{1},
        &output_name, size_t{1}, scores_.fill());
    if (!why.empty()) {
      fail(CADA_SEG_MISMATCH, path_, " failed on an input of shape ", shape_text(whole), ": ", why,
           ". If the model needs other sizes, give --size HxW");
    }
    api_.call<ort::GetTensorTypeAndShape>(static_cast<const OrtValue *>(scores_.get()),
                                          scores_info_.fill());
    void *values = nullptr;
    api_.call<ort::GetTensorMutableData>(scores_.get(), &values);
    return scores_of(values, output_.element, shape_of(scores_info_.get()), path_);
  }

private:
  void open(const BackendOptions &given) {
    api_.call<ort::CreateEnv>(ORT_FATAL, "cada_seg", env_.fill());
    Options options(api_);
    api_.call<ort::CreateSessionOptions>(options.fill());
    api_.call<ort::SetIntraOpNumThreads>(options.get(), int{given.threads});
    api_.call<ort::SetInterOpNumThreads>(options.get(), 1);
    for (const char *key : {"session.intra_op.allow_spinning", "session.inter_op.allow_spinning"}) {
      api_.call<ort::AddSessionConfigEntry>(options.get(), key, "0");
    }
    api_.call<ort::SetSessionLogSeverityLevel>(options.get(), ORT_FATAL);
    const std::string why = api_.tried<ort::CreateSessionFromArray>(
        static_cast<const OrtEnv *>(env_.get()), static_cast<const void *>(given.content.data()),
        given.content.size(), static_cast<const OrtSessionOptions *>(options.get()),
        session_.fill());
    if (!why.empty()) fail(CADA_SEG_MISMATCH, "ONNX Runtime refuses ", path_, ": ", why);
    api_.call<ort::CreateCpuMemoryInfo>(ORT_ARENA, ORT_MEMORY_DEFAULT, memory_.fill());
  }

  std::vector<Tensor> tensors(bool inputs) {
    const OrtSession *session = session_.get();
    size_t count = 0;
    if (inputs) api_.call<ort::SessionGetInputCount>(session, &count);
    else api_.call<ort::SessionGetOutputCount>(session, &count);
    std::vector<Tensor> found;
    for (size_t i = 0; i < count; ++i) found.push_back(tensor(inputs, i));
    return found;
  }

  Tensor tensor(bool input, size_t index) {
    const OrtSession *session = session_.get();
    OrtAllocator *allocator = nullptr; /* the library's own; not released */
    api_.call<ort::GetAllocatorWithDefaultOptions>(&allocator);
    char *name = nullptr;
    TypeInfo type(api_);
    if (input) {
      api_.call<ort::SessionGetInputName>(session, index, allocator, &name);
      api_.call<ort::SessionGetInputTypeInfo>(session, index, type.fill());
    } else {
      api_.call<ort::SessionGetOutputName>(session, index, allocator, &name);
      api_.call<ort::SessionGetOutputTypeInfo>(session, index, type.fill());
    }
    Tensor found;
    found.name = name;
    api_.call<ort::AllocatorFree>(allocator, static_cast<void *>(name));
    const OrtTensorTypeAndShapeInfo *info = nullptr; /* borrowed from `type` */
    api_.call<ort::CastTypeInfoToTensorInfo>(static_cast<const OrtTypeInfo *>(type.get()), &info);
    int code = 0;
    if (info) api_.call<ort::GetTensorElementType>(info, &code);
    if (code != ORT_FLOAT && code != ORT_FLOAT16) {
      fail(CADA_SEG_MISMATCH, path_, ": ", input ? "input" : "output", " '", found.name,
           "' is not float32 or float16 (element type ", code, ")",
           input ? "" : ". A label map has no scores: export the model without its argmax");
    }
    found.element = code == ORT_FLOAT ? Element::float32 : Element::float16;
    found.shape = shape_of(info);
    return found;
  }

  Shape shape_of(const OrtTensorTypeAndShapeInfo *info) const {
    size_t rank = 0;
    api_.call<ort::GetDimensionsCount>(info, &rank);
    Shape shape(rank);
    api_.call<ort::GetDimensions>(info, shape.data(), rank);
    return shape;
  }

  static int element_code(Element element) {
    return element == Element::float32 ? ORT_FLOAT : ORT_FLOAT16;
  }

  std::string path_;
  Library library_;
  Api api_;
  Env env_;
  Session session_;
  Memory memory_;
  Tensor input_, output_;
  int64_t batch_ = 1;
  size_t row_bytes_ = 0;
  Bytes feed_;
  Value scores_;
  ShapeInfo scores_info_;
};

} // namespace

std::unique_ptr<Backend> open_onnxruntime(const BackendOptions &options) {
  return std::make_unique<OnnxRuntime>(options);
}

} // namespace cada::seg
