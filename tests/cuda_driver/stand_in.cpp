/* A stand-in for libcuda.so.1: the driver's calls that our CUDA layers make, on this processor.
 *
 * Memory is malloc behind a register of addresses, so a copy that leaves its buffers is an error.
 * Streams are queues. With the knob `lazy` nothing runs before somebody waits for it, and then only
 * what was waited for: a missing wait reads what is not there yet. Modules name a shared library
 * (kernels.cu); captured work is a list. Knobs plant errors; counters say what was done. Both are
 * reached through stand_in_set and stand_in_count, and knobs start from CADA_STAND_IN_<KNOB>.
 * It is not a GPU and measures nothing. */
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) int

namespace {

enum {
  SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100,
  INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_HANDLE = 400,
  NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700, NOT_SUPPORTED = 801,
  CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_MERGE = 902,
  CAPTURE_UNMATCHED = 903, CAPTURE_UNJOINED = 904, CAPTURE_ISOLATION = 905, CAPTURE_IMPLICIT = 906,
  CAPTURED_EVENT = 907, CAPTURE_WRONG_THREAD = 908,
};
enum { CAPTURE_GLOBAL = 0, CAPTURE_THREAD_LOCAL = 1, CAPTURE_RELAXED = 2 };

using Clock = std::chrono::steady_clock;
using Work = std::function<void()>;
using Address = unsigned long long;

std::recursive_mutex mutex;
using Guard = std::lock_guard<std::recursive_mutex>;
bool initialised = false;
int sticky = SUCCESS;
std::map<std::string, long> counters;
std::map<std::string, long> knobs_set;

long knob(const std::string &name, long otherwise) {
  auto set = knobs_set.find(name);
  if (set != knobs_set.end()) return set->second;
  std::string variable = "CADA_STAND_IN_" + name;
  for (char &letter : variable) letter = char(std::toupper(letter));
  const char *text = std::getenv(variable.c_str());
  return text ? std::atol(text) : otherwise;
}

/* Counts down to a planted error: 1 is the next call. */
bool planted(const std::string &name) {
  long left = knob(name, 0);
  if (left > 0) knobs_set[name] = left - 1;
  return left == 1;
}

/* ---- contexts: one per device, current per thread ---- */

thread_local std::vector<int> current; /* device + 1; 0 is no context */

int device_now() { return current.empty() ? -1 : current.back() - 1; }
void *context_of(int device) { return reinterpret_cast<void *>(intptr_t(0xC0 + device)); }
int device_of(void *context) { return int(reinterpret_cast<intptr_t>(context)) - 0xC0; }

#define ENTER_LOST /* calls that a fault does not stop */ \
  Guard guard(mutex);                                     \
  if (!initialised) return NOT_INITIALIZED
#define ENTER \
  ENTER_LOST; \
  if (sticky) return sticky
#define ENTER_CONTEXT \
  ENTER;              \
  if (device_now() < 0) return INVALID_CONTEXT

/* ---- memory ---- */

struct Region {
  size_t bytes;
  int device;
  bool pinned;
};
std::map<Address, Region> regions;

bool inside(Address address, size_t bytes) {
  auto after = regions.upper_bound(address);
  if (after == regions.begin()) return false;
  auto found = std::prev(after);
  return address + bytes <= found->first + found->second.bytes;
}

/* ---- streams, events, graphs ---- */

struct Stream;
struct Point { /* of an event's record */
  std::shared_ptr<Stream> stream;
  uint64_t position;
  bool passed = false;
  Clock::time_point when;
};

struct Capture {
  struct Member {
    size_t added = 0, joined = 0;
  };
  Stream *origin;
  int mode;
  std::thread::id thread;
  bool invalid = false;
  std::vector<Work> work;
  std::map<Stream *, Member> members;
};
std::set<std::shared_ptr<Capture>> captures;

struct Stream : std::enable_shared_from_this<Stream> {
  std::deque<Work> queue;
  uint64_t enqueued = 0, done = 0;
  std::shared_ptr<Capture> capture;

  void run(uint64_t until) {
    while (done < until && !queue.empty()) {
      Work work = std::move(queue.front());
      queue.pop_front();
      if (!sticky) work();
      ++done;
    }
  }
  int add(Work work) {
    if (capture) {
      if (capture->invalid) return CAPTURE_INVALIDATED;
      capture->work.push_back(std::move(work));
      ++capture->members[this].added;
      return SUCCESS;
    }
    queue.push_back(std::move(work));
    ++enqueued;
    if (!knob("lazy", 0)) run(enqueued);
    return SUCCESS;
  }
};

struct Event {
  bool timing;
  std::shared_ptr<Point> point;
  std::weak_ptr<Capture> capture;
  Stream *captured_stream = nullptr;
  size_t captured_count = 0;
};

struct Graph {
  std::vector<Work> work;
};

std::map<void *, std::shared_ptr<Stream>> streams;
std::set<Event *> events;
std::set<Graph *> graphs;

/* 0 and 1 are the default stream of all, 2 the default stream of this thread. */
std::shared_ptr<Stream> stream_at(void *handle) {
  static std::shared_ptr<Stream> legacy = std::make_shared<Stream>();
  thread_local std::shared_ptr<Stream> own = std::make_shared<Stream>();
  if (handle == nullptr || handle == reinterpret_cast<void *>(1)) return legacy;
  if (handle == reinterpret_cast<void *>(2)) return own;
  auto found = streams.find(handle);
  return found == streams.end() ? nullptr : found->second;
}

/* What CUDA calls a potentially unsafe call: forbidden while this thread captures. */
int unsafe_in_capture() {
  for (auto &capture : captures) {
    bool here = capture->thread == std::this_thread::get_id();
    if (capture->mode == CAPTURE_GLOBAL || (capture->mode == CAPTURE_THREAD_LOCAL && here)) {
      capture->invalid = true;
      return CAPTURE_UNSUPPORTED;
    }
  }
  return SUCCESS;
}

void wait_a_while() { /* the mutex is not held: other threads may go on */
  long milliseconds = knob("sleep_ms", 0);
  if (milliseconds) std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
}

void fault(int code) {
  if (!sticky) sticky = code;
}

/* ---- modules ---- */

constexpr char MAGIC[] = "stand-in module\n";

struct Module {
  void *library;
};
struct Function {
  std::string name;
  std::vector<size_t> sizes;
  void (*run)(const char *, const unsigned *, const unsigned *, void **);
};
std::set<Module *> modules;
std::map<void *, std::unique_ptr<Function>> functions;

}  // namespace

/* ---- hooks for tests ---- */

extern "C" __attribute__((visibility("default"))) void stand_in_set(const char *name, long value) {
  Guard guard(mutex);
  knobs_set[name] = value;
}

extern "C" __attribute__((visibility("default"))) long stand_in_count(const char *name) {
  Guard guard(mutex);
  return counters[name];
}

/* ---- driver and devices ---- */

API cuInit(unsigned) {
  Guard guard(mutex);
  if (int code = int(knob("init", 0))) return code;
  if (knob("devices", 1) == 0) return NO_DEVICE;
  initialised = true;
  return SUCCESS;
}

API cuDriverGetVersion(int *version) {
  Guard guard(mutex);
  *version = int(knob("driver_version", 13000));
  return SUCCESS;
}

API cuDeviceGetCount(int *count) {
  ENTER_LOST;
  *count = int(knob("devices", 1));
  return SUCCESS;
}

API cuDeviceGet(int *device, int ordinal) {
  ENTER;
  if (ordinal < 0 || ordinal >= knob("devices", 1)) return INVALID_DEVICE;
  *device = ordinal;
  return SUCCESS;
}

API cuDeviceGetName(char *name, int bytes, int device) {
  ENTER;
  std::string text = "Stand-in GPU " + std::to_string(device);
  std::strncpy(name, text.c_str(), size_t(bytes));
  return SUCCESS;
}

API cuDeviceGetAttribute(int *value, int attribute, int) {
  ENTER;
  switch (attribute) {
    case 16: *value = int(knob("multiprocessors", 4)); break;
    case 18: *value = int(knob("integrated", 0)); break;
    case 41: *value = 1; break; /* unified addressing */
    case 75: *value = 9; break;
    case 76: *value = 0; break;
    default: *value = 1024; /* what PyCUDA's own arrays ask about blocks */
  }
  return SUCCESS;
}

API cuDeviceComputeCapability(int *major, int *minor, int) {
  *major = 9;
  *minor = 0;
  return SUCCESS;
}

API cuDeviceTotalMem_v2(size_t *bytes, int) {
  ENTER;
  *bytes = size_t(knob("memory", 1L << 30));
  return SUCCESS;
}

API cuDevicePrimaryCtxRetain(void **context, int device) {
  ENTER;
  if (int code = int(knob("retain", 0))) return code;
  *context = context_of(device);
  return SUCCESS;
}

API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }

API cuCtxSetCurrent(void *context) {
  ENTER_LOST;
  if (!current.empty()) current.pop_back();
  if (context) current.push_back(device_of(context) + 1);
  return SUCCESS;
}

API cuCtxGetCurrent(void **context) {
  ENTER_LOST;
  *context = current.empty() ? nullptr : context_of(device_now());
  return SUCCESS;
}

API cuCtxPushCurrent_v2(void *context) {
  ENTER_LOST;
  current.push_back(device_of(context) + 1);
  return SUCCESS;
}

API cuCtxPopCurrent_v2(void **context) {
  ENTER_LOST;
  if (device_now() < 0) return INVALID_CONTEXT;
  *context = context_of(device_now());
  current.pop_back();
  return SUCCESS;
}

API cuCtxGetDevice(int *device) {
  ENTER_CONTEXT;
  *device = device_now();
  return SUCCESS;
}

API cuCtxSynchronize() {
  {
    ENTER_CONTEXT;
    ++counters["synchronisations"];
    if (int code = unsafe_in_capture()) return code;
    for (auto &[handle, stream] : streams) stream->run(stream->enqueued);
    stream_at(nullptr)->run(stream_at(nullptr)->enqueued);
  }
  wait_a_while();
  return sticky;
}

/* ---- memory ---- */

static int allocate(Address *address, size_t bytes, bool pinned) {
  ENTER_CONTEXT;
  if (int code = unsafe_in_capture()) return code;
  if (bytes == 0) return INVALID_VALUE;
  long left = knob("memory", 1L << 30) - counters["device_bytes"];
  if (knob("out_of_memory", 0) || (!pinned && long(bytes) > left)) return OUT_OF_MEMORY;
  void *memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  std::memset(memory, 0xCD, bytes); /* garbage that no test expects by chance */
  *address = Address(memory);
  regions[*address] = {bytes, device_now(), pinned};
  ++counters[pinned ? "pinned_allocations" : "allocations"];
  counters[pinned ? "pinned_bytes" : "device_bytes"] += long(bytes);
  return SUCCESS;
}

static int release(Address address, bool pinned) {
  ENTER_CONTEXT;
  if (int code = unsafe_in_capture()) return code;
  auto found = regions.find(address);
  if (found == regions.end() || found->second.pinned != pinned) return INVALID_VALUE;
  counters[pinned ? "pinned_bytes" : "device_bytes"] -= long(found->second.bytes);
  std::memset(reinterpret_cast<void *>(address), 0xDD, found->second.bytes);
  std::free(reinterpret_cast<void *>(address));
  regions.erase(found);
  return SUCCESS;
}

API cuMemAlloc_v2(Address *address, size_t bytes) { return allocate(address, bytes, false); }
API cuMemFree_v2(Address address) { return release(address, false); }
API cuMemHostAlloc(void **memory, size_t bytes, unsigned) {
  return allocate(reinterpret_cast<Address *>(memory), bytes, true);
}
API cuMemFreeHost(void *memory) { return release(Address(memory), true); }

API cuMemHostGetDevicePointer_v2(Address *address, void *memory, unsigned) {
  ENTER_CONTEXT;
  *address = Address(memory);
  return SUCCESS;
}

API cuMemGetInfo_v2(size_t *left, size_t *total) {
  ENTER_CONTEXT;
  *total = size_t(knob("memory", 1L << 30));
  *left = *total - size_t(counters["device_bytes"]);
  return SUCCESS;
}

API cuPointerGetAttribute(void *value, int attribute, Address address) {
  ENTER_CONTEXT;
  if (!inside(address, 1)) return INVALID_VALUE;
  const Region &region = std::prev(regions.upper_bound(address))->second;
  if (attribute == 2) *static_cast<unsigned *>(value) = region.pinned ? 1 : 2;
  else if (attribute == 9) *static_cast<int *>(value) = region.device;
  else return INVALID_VALUE;
  return SUCCESS;
}

API cuMemcpyAsync(Address target, Address source, size_t bytes, void *handle) {
  ENTER_CONTEXT;
  auto stream = stream_at(handle);
  if (!stream) return INVALID_HANDLE;
  if (!inside(target, bytes) || !inside(source, bytes)) return INVALID_VALUE;
  ++counters["copies"];
  return stream->add([=] {
    if (!inside(target, bytes) || !inside(source, bytes)) return fault(ILLEGAL_ADDRESS);
    std::memmove(reinterpret_cast<void *>(target), reinterpret_cast<void *>(source), bytes);
  });
}

API cuMemsetD8Async(Address target, unsigned char byte, size_t bytes, void *handle) {
  ENTER_CONTEXT;
  auto stream = stream_at(handle);
  if (!stream) return INVALID_HANDLE;
  if (!inside(target, bytes)) return INVALID_VALUE;
  ++counters["fills"];
  return stream->add([=] {
    if (!inside(target, bytes)) return fault(ILLEGAL_ADDRESS);
    std::memset(reinterpret_cast<void *>(target), byte, bytes);
  });
}

/* ---- streams and events ---- */

API cuStreamCreate(void **handle, unsigned) {
  ENTER_CONTEXT;
  auto stream = std::make_shared<Stream>();
  *handle = stream.get();
  streams[*handle] = stream;
  ++counters["streams"];
  return SUCCESS;
}

API cuStreamDestroy_v2(void *handle) {
  ENTER_CONTEXT;
  auto stream = stream_at(handle);
  if (!stream || !streams.erase(handle)) return INVALID_HANDLE;
  stream->run(stream->enqueued);
  --counters["streams"];
  return SUCCESS;
}

API cuStreamSynchronize(void *handle) {
  {
    ENTER_CONTEXT;
    auto stream = stream_at(handle);
    if (!stream) return INVALID_HANDLE;
    ++counters["synchronisations"];
    if (stream->capture) {
      stream->capture->invalid = true;
      return CAPTURE_UNSUPPORTED;
    }
    stream->run(stream->enqueued);
  }
  wait_a_while();
  return sticky;
}

API cuStreamQuery(void *handle) {
  ENTER_CONTEXT;
  auto stream = stream_at(handle);
  if (!stream) return INVALID_HANDLE;
  if (stream->done == stream->enqueued) return SUCCESS;
  stream->run(stream->done + 1);
  return NOT_READY;
}

API cuStreamWaitEvent(void *handle, Event *event, unsigned) {
  ENTER_CONTEXT;
  auto stream = stream_at(handle);
  if (!stream || !events.count(event)) return INVALID_HANDLE;
  if (auto capture = event->capture.lock()) {
    if (stream->capture && stream->capture != capture) return CAPTURE_MERGE;
    if (!stream->capture) {
      stream->capture = capture;
      capture->members[stream.get()] = {};
    }
    Capture::Member &member = capture->members[event->captured_stream];
    member.joined = std::max(member.joined, event->captured_count);
    return SUCCESS;
  }
  if (stream->capture) {
    stream->capture->invalid = true;
    return CAPTURE_ISOLATION;
  }
  std::shared_ptr<Point> point = event->point;
  if (!point) return SUCCESS; /* never recorded: nothing to wait for */
  return stream->add([point] { point->stream->run(point->position); });
}

API cuEventCreate(Event **event, unsigned flags) {
  ENTER_CONTEXT;
  *event = new Event{(flags & 2) == 0, nullptr, {}};
  events.insert(*event);
  ++counters["events"];
  return SUCCESS;
}

API cuEventDestroy_v2(Event *event) {
  ENTER_CONTEXT;
  if (!events.erase(event)) return INVALID_HANDLE;
  delete event;
  --counters["events"];
  return SUCCESS;
}

API cuEventRecord(Event *event, void *handle) {
  ENTER_CONTEXT;
  auto stream = stream_at(handle);
  if (!stream || !events.count(event)) return INVALID_HANDLE;
  event->capture = stream->capture;
  if (stream->capture) {
    event->captured_stream = stream.get();
    event->captured_count = stream->capture->members[stream.get()].added;
    return SUCCESS;
  }
  auto point = std::make_shared<Point>();
  point->stream = stream;
  point->position = stream->enqueued + 1;
  event->point = point;
  return stream->add([point] {
    point->passed = true;
    point->when = Clock::now();
  });
}

API cuEventQuery(Event *event) {
  ENTER_CONTEXT;
  if (!events.count(event)) return INVALID_HANDLE;
  if (event->capture.lock()) return CAPTURED_EVENT;
  if (!event->point || event->point->passed) return SUCCESS;
  event->point->stream->run(event->point->stream->done + 1); /* time goes on */
  return NOT_READY;
}

API cuEventSynchronize(Event *event) {
  {
    ENTER_CONTEXT;
    if (!events.count(event)) return INVALID_HANDLE;
    ++counters["synchronisations"];
    if (auto capture = event->capture.lock()) {
      capture->invalid = true;
      return CAPTURED_EVENT;
    }
    if (event->point) event->point->stream->run(event->point->position);
  }
  wait_a_while();
  return sticky;
}

API cuEventElapsedTime_v2(float *milliseconds, Event *first, Event *last) {
  ENTER_CONTEXT;
  if (!events.count(first) || !events.count(last)) return INVALID_HANDLE;
  if (!first->timing || !last->timing || !first->point || !last->point) return INVALID_HANDLE;
  if (!first->point->passed || !last->point->passed) return NOT_READY;
  std::chrono::duration<float, std::milli> between = last->point->when - first->point->when;
  *milliseconds = between.count();
  return SUCCESS;
}
API cuEventElapsedTime(float *milliseconds, Event *first, Event *last) {
  return cuEventElapsedTime_v2(milliseconds, first, last);
}

/* ---- modules and launches ---- */

API cuModuleLoadData(Module **module, const void *image) {
  ENTER_CONTEXT;
  if (int code = unsafe_in_capture()) return code;
  const char *text = static_cast<const char *>(image);
  if (std::strncmp(text, MAGIC, sizeof(MAGIC) - 1) != 0) return INVALID_IMAGE;
  void *library = dlopen(text + sizeof(MAGIC) - 1, RTLD_NOW | RTLD_LOCAL);
  if (!library) return INVALID_IMAGE;
  *module = new Module{library};
  modules.insert(*module);
  ++counters["modules"];
  return SUCCESS;
}

API cuModuleUnload(Module *module) {
  ENTER_CONTEXT;
  if (int code = unsafe_in_capture()) return code;
  if (!modules.erase(module)) return INVALID_HANDLE;
  delete module;
  --counters["modules"];
  return SUCCESS;
}

API cuModuleGetFunction(void **function, Module *module, const char *name) {
  ENTER_CONTEXT;
  if (!modules.count(module)) return INVALID_HANDLE;
  using Sizes = int (*)(const char *, size_t *);
  auto made = std::make_unique<Function>();
  size_t sizes[32];
  int count = reinterpret_cast<Sizes>(dlsym(module->library, "stand_in_sizes"))(name, sizes);
  if (count < 0) return NOT_FOUND;
  made->name = name;
  made->sizes.assign(sizes, sizes + count);
  made->run = reinterpret_cast<decltype(made->run)>(dlsym(module->library, "stand_in_run"));
  *function = made.get();
  functions[*function] = std::move(made);
  return SUCCESS;
}

API cuFuncSetAttribute(void *function, int attribute, int value) {
  ENTER_CONTEXT;
  if (!functions.count(function)) return INVALID_HANDLE;
  if (attribute == 8) counters["dynamic_shared_bytes"] = value;
  return SUCCESS;
}

API cuLaunchKernel(void *handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared_bytes, void *stream_handle, void **parameters,
                   void **extra) {
  ENTER_CONTEXT;
  auto stream = stream_at(stream_handle);
  auto found = functions.find(handle);
  if (!stream || found == functions.end()) return INVALID_HANDLE;
  if (extra || !gx || !gy || !gz || !bx || !by || !bz || bx * by * bz > 1024) return INVALID_VALUE;
  if (shared_bytes > 48 * 1024 && counters["dynamic_shared_bytes"] < long(shared_bytes))
    return INVALID_VALUE;
  Function *function = found->second.get();
  std::vector<std::vector<char>> values; /* as they are now */
  for (size_t k = 0; k < function->sizes.size(); ++k) {
    const char *value = static_cast<const char *>(parameters[k]);
    values.emplace_back(value, value + function->sizes[k]);
  }
  ++counters["launches"];
  return stream->add([=]() mutable {
    if (planted("fault_at")) return fault(int(knob("fault_code", ILLEGAL_ADDRESS)));
    std::vector<void *> pointers;
    for (auto &value : values) pointers.push_back(value.data());
    unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    function->run(function->name.c_str(), grid, block, pointers.data());
  });
}

/* ---- graphs ---- */

API cuStreamBeginCapture_v2(void *handle, int mode) {
  ENTER_CONTEXT;
  if (handle == nullptr || handle == reinterpret_cast<void *>(1)) return CAPTURE_UNSUPPORTED;
  auto stream = stream_at(handle);
  if (!stream) return INVALID_HANDLE;
  if (stream->capture) return INVALID_VALUE;
  auto capture = std::make_shared<Capture>();
  capture->origin = stream.get();
  capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  capture->members[stream.get()] = {};
  stream->capture = capture;
  captures.insert(capture);
  return SUCCESS;
}

API cuStreamEndCapture(void *handle, Graph **graph) {
  ENTER_CONTEXT;
  *graph = nullptr;
  auto stream = stream_at(handle);
  if (!stream) return INVALID_HANDLE;
  auto capture = stream->capture;
  if (!capture || capture->origin != stream.get()) return CAPTURE_UNMATCHED;
  if (capture->mode != CAPTURE_RELAXED && capture->thread != std::this_thread::get_id())
    return CAPTURE_WRONG_THREAD;
  bool unjoined = false;
  for (auto &[member, state] : capture->members) {
    unjoined |= member != capture->origin && state.joined < state.added;
    member->capture = nullptr;
  }
  captures.erase(capture);
  if (capture->invalid) return CAPTURE_INVALIDATED;
  if (unjoined) return CAPTURE_UNJOINED;
  *graph = new Graph{capture->work};
  graphs.insert(*graph);
  ++counters["graphs"];
  return SUCCESS;
}

API cuStreamIsCapturing(void *handle, int *status) {
  ENTER_CONTEXT;
  auto stream = stream_at(handle);
  if (!stream) return INVALID_HANDLE;
  *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
  return SUCCESS;
}

API cuGraphInstantiateWithFlags(Graph **executable, Graph *graph, unsigned long long) {
  ENTER_CONTEXT;
  if (!graphs.count(graph)) return INVALID_HANDLE;
  *executable = new Graph(*graph);
  graphs.insert(*executable);
  ++counters["graphs"];
  return SUCCESS;
}

static int destroy_graph(Graph *graph) {
  ENTER_CONTEXT;
  if (!graphs.erase(graph)) return INVALID_HANDLE;
  delete graph;
  --counters["graphs"];
  return SUCCESS;
}
API cuGraphDestroy(Graph *graph) { return destroy_graph(graph); }
API cuGraphExecDestroy(Graph *graph) { return destroy_graph(graph); }

API cuGraphLaunch(Graph *graph, void *handle) {
  ENTER_CONTEXT;
  auto stream = stream_at(handle);
  if (!stream || !graphs.count(graph)) return INVALID_HANDLE;
  ++counters["graph_launches"];
  for (const Work &work : graph->work)
    if (int code = stream->add(work)) return code;
  return SUCCESS;
}

/* ---- names of errors, and how libraries find us ---- */

static const std::map<int, std::pair<const char *, const char *>> &names() {
  static const std::map<int, std::pair<const char *, const char *>> table = {
      {0, {"CUDA_SUCCESS", "no error"}},
      {1, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
      {2, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
      {46, {"CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"}},
      {100, {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}},
      {101, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
      {200, {"CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"}},
      {201, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
      {214, {"CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"}},
      {400, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
      {500, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
      {700, {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"}},
      {702, {"CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"}},
      {710, {"CUDA_ERROR_ASSERT", "device-side assert triggered"}},
      {719, {"CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"}},
      {803, {"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
             "system has unsupported display driver / cuda driver combination"}},
      {900, {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
             "operation not permitted when stream is capturing"}},
      {901, {"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
             "operation failed due to a previous error during capture"}},
  };
  return table;
}

API cuGetErrorName(int code, const char **text) {
  auto found = names().find(code);
  *text = found == names().end() ? nullptr : found->second.first;
  return *text ? SUCCESS : INVALID_VALUE;
}

API cuGetErrorString(int code, const char **text) {
  auto found = names().find(code);
  *text = found == names().end() ? "an error of the stand-in" : found->second.second;
  return SUCCESS;
}

API cuGetProcAddress_v2(const char *name, void **function, int, unsigned long, int *status) {
  Dl_info self;
  dladdr(reinterpret_cast<void *>(cuInit), &self);
  static void *library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  *function = nullptr;
  for (const char *ending : {"_v4", "_v3", "_v2", ""}) {
    if (*function == nullptr) *function = dlsym(library, (std::string(name) + ending).c_str());
  }
  if (status) *status = *function ? 0 : 1;
  return *function ? SUCCESS : NOT_FOUND;
}

/* PyCUDA's extension is linked against all of these and our layer uses none of them. */
#define NOT_HERE(name) API name() { return NOT_SUPPORTED; }
#include "not_here.inc"
