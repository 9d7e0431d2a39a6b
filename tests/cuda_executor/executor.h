/* Runs CUDA kernels on this processor, for tests: every CUDA thread is a fiber, one block at a time.
 *
 * Included before a kernel's source, which then compiles with g++ as it stands. A kernel that CUDA
 * would only perhaps punish is an error here, with the lines that did it: a __syncthreads that some
 * threads do not reach or that two of them reach at different lines, a warp collective whose lanes
 * do not agree on the mask or the instruction, a mask that names a lane outside itself, one that has
 * left or one that never was. Shared memory starts as garbage in every block. Threads run in an
 * order that `seed` shuffles, so a missing barrier gives results that depend on it.
 * What is not here (dynamic shared memory, other intrinsics) does not compile. */
#ifndef CADA_CUDA_EXECUTOR_H
#define CADA_CUDA_EXECUTOR_H

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
/* All thread-local memory of this library is shared memory: its place is known, and only one thread
 * of the process runs blocks at a time. */
#define __shared__ static thread_local

namespace cuda_executor {

constexpr unsigned LANES = 32;
constexpr int GARBAGE = 0xCD;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

/* ---- fibers ---- */

#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK_BYTES = 1024 * 1024; /* red zones around everything */
#else
constexpr size_t STACK_BYTES = 128 * 1024;
#endif

struct Context {
#ifdef __x86_64__
  void *stack_pointer = nullptr;
#else
  ucontext_t saved;
#endif
  const void *stack = nullptr; /* for the address sanitizer */
  size_t bytes = 0;
};

#ifdef __x86_64__
/* Saves what a called function must keep, and goes on where `to` was saved. */
extern "C" void cuda_executor_switch(void **from, void *to);
__asm__(R"(
.text
.p2align 4
.type cuda_executor_switch, @function
cuda_executor_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_executor_switch, .-cuda_executor_switch
)");
#endif

inline void switch_to(Context &from, Context &to, bool for_good) {
#ifdef __SANITIZE_ADDRESS__
  void *fake = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, to.stack, to.bytes);
#endif
#ifdef __x86_64__
  cuda_executor_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.saved, &to.saved);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  (void)for_good;
}

/* Stacks that stay for the life of the process, each with a page below it that nobody may touch. */
class Stacks {
public:
  char *of(size_t i) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    while (made_.size() <= i) {
      void *memory = mmap(nullptr, page + STACK_BYTES, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
        std::fprintf(stderr, "cuda_executor: no memory for the stack of thread %zu\n", i);
        std::abort();
      }
      made_.push_back(static_cast<char *>(memory) + page);
    }
    return made_[i];
  }

private:
  std::vector<char *> made_;
};

/* ---- a block ---- */

/* Where a thread waits: which call, and in which line of the kernel's source. */
struct Site {
  const char *call = nullptr;
  int line = 0;
  bool operator==(const Site &other) const {
    return line == other.line && (call == other.call || std::strcmp(call, other.call) == 0);
  }
  std::string text() const { return std::string(call) + " in line " + std::to_string(line); }
};

enum class State : uint8_t { ready, in_block_barrier, in_warp, left };

struct Thread {
  Context context;
  Index index;
  unsigned lane = 0, warp = 0;
  State state = State::ready;
  Site site;
  unsigned mask = 0;
  uint64_t given = 0;         /* to the collective that it waits in */
  uint64_t taken[LANES] = {}; /* what every lane of its mask gave */
};

struct Block {
  std::vector<Thread> threads;
  Context scheduler;
  Thread *current = nullptr;
  Index index, size, grid;
  void (*call)(void **) = nullptr;
  void **arguments = nullptr;
  std::string error;
};

inline Block block;
inline Stacks stacks;
inline std::mutex one_at_a_time;

inline std::string where() {
  const auto triple = [](const Index &i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
  };
  return "block " + triple(block.index) + ", thread " + triple(block.current->index) + ": ";
}

/* The kernel is abandoned where it stands. */
[[noreturn]] inline void fail(const std::string &what) {
  block.error = where() + what;
  block.current->state = State::left;
  switch_to(block.current->context, block.scheduler, true);
  std::abort();
}

inline void wait(State state, Site site) {
  Thread &thread = *block.current;
  thread.state = state;
  thread.site = site;
  switch_to(thread.context, block.scheduler, false);
}

inline void run_thread() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler.stack, &block.scheduler.bytes);
#endif
  block.call(block.arguments);
  block.current->state = State::left;
  switch_to(block.current->context, block.scheduler, true);
  std::abort();
}

inline void make_ready(Thread &thread, size_t i) {
  char *const stack = stacks.of(i);
  thread.state = State::ready;
  thread.context.stack = stack;
  thread.context.bytes = STACK_BYTES;
#ifdef __x86_64__
  void **top = reinterpret_cast<void **>(stack + STACK_BYTES);
  *--top = nullptr; /* run_thread never returns; this keeps its frame aligned */
  *--top = reinterpret_cast<void *>(&run_thread);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  thread.context.stack_pointer = top;
#else
  getcontext(&thread.context.saved);
  thread.context.saved.uc_stack.ss_sp = stack;
  thread.context.saved.uc_stack.ss_size = STACK_BYTES;
  thread.context.saved.uc_link = nullptr;
  makecontext(&thread.context.saved, run_thread, 0);
#endif
}

/* Nobody can go on: either all wait at one __syncthreads, or the kernel is wrong. */
inline void release_barrier() {
  Thread *barred = nullptr, *other = nullptr;
  for (Thread &thread : block.threads) {
    if (thread.state == State::in_block_barrier && barred == nullptr) barred = &thread;
  }
  for (Thread &thread : block.threads) {
    if (barred == nullptr ? thread.state == State::in_warp
                          : thread.state != State::in_block_barrier || !(thread.site == barred->site)) {
      other = &thread;
      break;
    }
  }
  if (other == nullptr) {
    for (Thread &thread : block.threads) thread.state = State::ready;
    return;
  }
  block.current = barred ? barred : other;
  const std::string waits = "waits at " + block.current->site.text();
  const std::string whom = "thread " + std::to_string(other - block.threads.data());
  if (barred == nullptr) {
    block.error = where() + waits + " for lanes that never come";
  } else if (other->state == State::left) {
    block.error = where() + waits + ", but " + whom + " has left the kernel";
  } else {
    block.error = where() + waits + ", but " + whom + " waits at " + other->site.text();
  }
}

/* Thread-local memory of this library, which is what shared memory is made of. */
inline int make_garbage(dl_phdr_info *info, size_t, void *) {
  Dl_info own;
  if (dladdr(reinterpret_cast<void *>(&make_garbage), &own) == 0 ||
      reinterpret_cast<void *>(info->dlpi_addr) != own.dli_fbase || info->dlpi_tls_data == nullptr) {
    return 0;
  }
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type == PT_TLS) {
      std::memset(info->dlpi_tls_data, GARBAGE, info->dlpi_phdr[i].p_memsz);
    }
  }
  return 1;
}

inline void run_block(const std::vector<unsigned> &order) {
  dl_iterate_phdr(make_garbage, nullptr);
  for (size_t i = 0; i < block.threads.size(); ++i) make_ready(block.threads[i], i);
  for (;;) {
    bool moved = false, all_left = true;
    for (const unsigned i : order) {
      Thread &thread = block.threads[i];
      if (thread.state == State::ready) {
        moved = true;
        block.current = &thread;
        switch_to(block.scheduler, thread.context, false);
        if (!block.error.empty()) return;
      }
      all_left &= thread.state == State::left;
    }
    if (all_left) return;
    if (!moved) release_barrier();
    if (!block.error.empty()) return;
  }
}

inline void run_grid(Index grid, Index size, void (*call)(void **), void **arguments, unsigned seed) {
  const size_t threads = size_t{size.x} * size.y * size.z;
  block.threads.assign(threads, Thread());
  block.size = size;
  block.grid = grid;
  block.call = call;
  block.arguments = arguments;
  block.error.clear();
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Thread &thread = block.threads[i];
    thread.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    thread.lane = i % LANES;
    thread.warp = i / LANES;
    order[i] = i;
  }
  std::minstd_rand random(seed);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block.index = {x, y, z};
        if (seed != 0) std::shuffle(order.begin(), order.end(), random);
        run_block(order);
        if (!block.error.empty()) return;
      }
    }
  }
}

/* ---- warp collectives ---- */

[[noreturn]] inline void refuse(Site site, unsigned lane, const std::string &why) {
  fail(site.text() + ": the mask names lane " + std::to_string(lane) + ", " + why);
}

/* Gives `value` and waits for every lane of the mask; returns what each lane gave, by lane. */
inline const uint64_t *collect(Site site, unsigned mask, uint64_t value) {
  Thread &self = *block.current;
  const unsigned own = 1u << self.lane;
  if ((mask & own) == 0) fail(site.text() + ": the lane is not in its own mask");
  Thread *const warp = &block.threads[size_t{self.warp} * LANES];
  const auto lanes = static_cast<unsigned>(
      std::min<size_t>(LANES, block.threads.size() - size_t{self.warp} * LANES));
  self.mask = mask;
  self.given = value;
  bool complete = true;
  for (unsigned rest = mask & ~own; rest != 0; rest &= rest - 1) {
    const auto lane = static_cast<unsigned>(__builtin_ctz(rest));
    if (lane >= lanes) refuse(site, lane, "which does not exist");
    const Thread &other = warp[lane];
    if (other.state == State::left) refuse(site, lane, "which has left the kernel");
    if (other.state == State::ready) {
      complete = false;
    } else if (other.state == State::in_block_barrier || !(other.site == site)) {
      refuse(site, lane, "which waits at " + other.site.text());
    } else if (other.mask != mask) {
      refuse(site, lane, "which names another mask");
    }
  }
  if (!complete) {
    wait(State::in_warp, site);
    return self.taken;
  }
  uint64_t all[LANES] = {};
  for (unsigned lane = 0; lane < lanes; ++lane) all[lane] = warp[lane].given;
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    Thread &lane = warp[__builtin_ctz(rest)];
    std::memcpy(lane.taken, all, sizeof all);
    lane.state = State::ready;
  }
  return self.taken;
}

template <class T> uint64_t bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t out = 0;
  std::memcpy(&out, &value, sizeof value);
  return out;
}

template <class T> T value_of(uint64_t bits) {
  T out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline unsigned ballot(Site site, unsigned mask, bool predicate) {
  const uint64_t *const given = collect(site, mask, predicate);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < LANES; ++lane) {
    if (mask >> lane & 1u) votes |= static_cast<unsigned>(given[lane] != 0) << lane;
  }
  return votes;
}

template <class T> T shuffle(Site site, unsigned mask, T value, unsigned from) {
  const uint64_t *const given = collect(site, mask, bits(value));
  if ((mask >> (from % LANES) & 1u) == 0) {
    fail(site.text() + ": reads lane " + std::to_string(from % LANES) + ", which is not in the mask");
  }
  return value_of<T>(given[from % LANES]);
}

template <class T> unsigned match(Site site, unsigned mask, T value) {
  const uint64_t *const given = collect(site, mask, bits(value));
  unsigned same = 0;
  for (unsigned lane = 0; lane < LANES; ++lane) {
    if (mask >> lane & 1u) same |= static_cast<unsigned>(given[lane] == bits(value)) << lane;
  }
  return same;
}

inline unsigned sum(Site site, unsigned mask, unsigned value) {
  const uint64_t *const given = collect(site, mask, value);
  unsigned total = 0;
  for (unsigned lane = 0; lane < LANES; ++lane) {
    if (mask >> lane & 1u) total += static_cast<unsigned>(given[lane]);
  }
  return total;
}

template <class T> T add(T *at, T value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }

/* ---- kernels by name ---- */

struct Kernel {
  const char *name;
  std::vector<size_t> sizes; /* of its parameters, in bytes */
  void (*call)(void **);
};

inline std::vector<Kernel> &kernels() {
  static std::vector<Kernel> known;
  return known;
}

template <auto function> struct Caller;
template <class... Parameters, void (*function)(Parameters...)> struct Caller<function> {
  template <size_t... I> static void spread(void **arguments, std::index_sequence<I...>) {
    function(*static_cast<std::remove_reference_t<Parameters> *>(arguments[I])...);
  }
  static void call(void **arguments) {
    spread(arguments, std::index_sequence_for<Parameters...>());
  }
  static bool enter(const char *name) {
    kernels().push_back({name, {sizeof(Parameters)...}, call});
    return true;
  }
};

inline std::string launch(const char *name, Index grid, Index size, void **arguments,
                          const size_t *sizes, size_t count, unsigned seed) {
  const std::string kernel = std::string("kernel ") + name;
  const auto known = std::find_if(kernels().begin(), kernels().end(), [&](const Kernel &k) {
    return std::strcmp(k.name, name) == 0;
  });
  if (known == kernels().end()) return kernel + " does not exist";
  if (known->sizes != std::vector<size_t>(sizes, sizes + count)) {
    std::string wants;
    for (const size_t bytes : known->sizes) wants += " " + std::to_string(bytes);
    std::string has;
    for (size_t i = 0; i < count; ++i) has += " " + std::to_string(sizes[i]);
    return kernel + " takes arguments of" + wants + " bytes; given were" + has;
  }
  const size_t threads = size_t{size.x} * size.y * size.z;
  if (threads == 0 || threads > 1024) return kernel + ": a block has 1 to 1024 threads";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return kernel + ": the grid is empty";
  const std::lock_guard<std::mutex> held(one_at_a_time);
  run_grid(grid, size, known->call, arguments, seed);
  return block.error.empty() ? "" : kernel + ", " + block.error;
}

} // namespace cuda_executor

/* After the kernel's source: one line for each kernel. */
#define CUDA_EXECUTOR_KERNEL(kernel)                                                               \
  static const bool kernel##_entered = cuda_executor::Caller<kernel>::enter(#kernel)

/* Null, or what went wrong (valid until the next call from this thread). */
extern "C" __attribute__((visibility("default"))) const char *
cuda_executor_launch(const char *name, const unsigned *grid, const unsigned *size, void **arguments,
                     const size_t *sizes, size_t count, unsigned seed) {
  static std::string error;
  error = cuda_executor::launch(name, {grid[0], grid[1], grid[2]}, {size[0], size[1], size[2]},
                                arguments, sizes, count, seed);
  return error.empty() ? nullptr : error.c_str();
}

extern "C" __attribute__((visibility("default"))) int cuda_executor_has(const char *name) {
  for (const cuda_executor::Kernel &kernel : cuda_executor::kernels()) {
    if (std::strcmp(kernel.name, name) == 0) return 1;
  }
  return 0;
}

#define threadIdx (cuda_executor::block.current->index)
#define blockIdx (cuda_executor::block.index)
#define blockDim (cuda_executor::block.size)
#define gridDim (cuda_executor::block.grid)

#define CUDA_EXECUTOR_SITE(call) (cuda_executor::Site{call, __LINE__})
#define __syncthreads()                                                                            \
  cuda_executor::wait(cuda_executor::State::in_block_barrier, CUDA_EXECUTOR_SITE("__syncthreads"))
#define __syncwarp(mask) ((void)cuda_executor::ballot(CUDA_EXECUTOR_SITE("__syncwarp"), mask, true))
#define __ballot_sync(mask, p) cuda_executor::ballot(CUDA_EXECUTOR_SITE("__ballot_sync"), mask, p)
#define __any_sync(mask, p) (cuda_executor::ballot(CUDA_EXECUTOR_SITE("__any_sync"), mask, p) != 0)
#define __all_sync(mask, p)                                                                        \
  (cuda_executor::ballot(CUDA_EXECUTOR_SITE("__all_sync"), mask, p) == (mask))
#define __shfl_sync(mask, v, from)                                                                 \
  cuda_executor::shuffle(CUDA_EXECUTOR_SITE("__shfl_sync"), mask, v, static_cast<unsigned>(from))
#define __shfl_xor_sync(mask, v, with)                                                             \
  cuda_executor::shuffle(CUDA_EXECUTOR_SITE("__shfl_xor_sync"), mask, v, (threadIdx.x ^ (with)) % 32)
#define __match_any_sync(mask, v)                                                                  \
  cuda_executor::match(CUDA_EXECUTOR_SITE("__match_any_sync"), mask, v)
#define __reduce_add_sync(mask, v)                                                                 \
  cuda_executor::sum(CUDA_EXECUTOR_SITE("__reduce_add_sync"), mask, v)
#define atomicAdd(at, v) cuda_executor::add(at, v)
#define __ffs(x) __builtin_ffs(static_cast<int>(x))
#define __popc(x) __builtin_popcount(x)

#endif
