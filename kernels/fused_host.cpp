/* The C ABI: checks arguments, chooses the instruction set, makes the taps, cuts the rows among threads
 * and adds up what they counted. No pixel is computed here; compiled without processor flags. */
#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "work.h"

#define CADA_API extern "C" __attribute__((visibility("default")))

namespace cada {
namespace {

/* ---- the instruction set ---- */

bool can_run(const InstructionSet &isa) {
#if defined(__x86_64__)
  if (&isa == &AVX512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("fma");
  }
  /* Every processor with AVX2 and FMA also has F16C. */
  if (&isa == &AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  (void)isa;
  return true;
}

/* Best first. NEON will stand here, too. */
const InstructionSet *const KNOWN[] = {
#if defined(__x86_64__)
    &AVX512, &AVX2, &BASELINE,
#endif
    &SCALAR};

std::atomic<const InstructionSet *> chosen{nullptr};

const InstructionSet *find(const char *name) {
  const bool any = name == nullptr || *name == '\0';
  for (const InstructionSet *isa : KNOWN) {
    if ((any || std::strcmp(name, isa->name) == 0) && can_run(*isa)) return isa;
  }
  return nullptr;
}

const InstructionSet &isa() {
  const InstructionSet *current = chosen.load();
  if (current == nullptr) chosen.store(current = find(nullptr));
  return *current;
}

/* ---- threads ---- */

/* Bits need rounding to nearest and no flushing to zero, whatever the caller's thread has set (a
 * library built with -ffast-math sets both as it loads). New threads inherit the setting. */
class PlainFloats {
public:
  PlainFloats() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~PlainFloats() { std::fesetenv(&before_); }
  PlainFloats(const PlainFloats &) = delete;
  PlainFloats &operator=(const PlainFloats &) = delete;

private:
  std::fenv_t before_;
};

/* Runs work(0) .. work(workers - 1), the first one here. Fewer threads than asked for (the system
 * has no more) is no error: the others take their rows. */
template <class Work> void run_workers(int workers, const Work &work) {
  std::vector<std::thread> others;
  try {
    others.reserve(static_cast<size_t>(workers) - 1);
    for (int i = 1; i < workers; ++i) others.emplace_back(work, i);
  } catch (const std::exception &) { /* go on with those that started */
  }
  work(0);
  for (std::thread &other : others) other.join();
}

int workers_for(int32_t threads, const Queue &queue) {
  const int64_t pieces = (queue.size + queue.step - 1) / queue.step;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, pieces)));
}

struct Free {
  void operator()(char *memory) const { std::free(memory); }
};

class Scratch {
public:
  Scratch(int workers, size_t bytes) : bytes_((bytes + 63) / 64 * 64) {
    const size_t total = bytes_ * static_cast<size_t>(workers);
    memory_.reset(static_cast<char *>(std::aligned_alloc(64, total)));
    if (!memory_) throw std::bad_alloc();
    std::memset(memory_.get(), 0, total);
  }
  char *of(int worker) const { return memory_.get() + bytes_ * static_cast<size_t>(worker); }

private:
  size_t bytes_;
  std::unique_ptr<char, Free> memory_;
};

/* ---- frames ---- */

struct Taps {
  std::vector<int32_t> lower;
  std::vector<float> weight;

  Taps(int32_t size, int32_t low_size, bool align_corners) {
    for (int32_t o = 0; o < size + MAX_BLOCK; ++o) {
      const Tap tap = tap_of(std::min(o, size - 1), size, low_size, align_corners);
      lower.push_back(tap.lower);
      weight.push_back(tap.weight);
    }
  }
};

/* Rows a worker takes at once: few enough that their low-resolution rows fit a band, and that every
 * thread gets several turns; many enough that few low-resolution rows are widened twice. */
int64_t rows_at_once(const cada_frame &frame, int32_t threads) {
  const int64_t low = frame.align_corners ? std::max(frame.low_height - 1, 1) : frame.low_height;
  const int64_t high = frame.align_corners ? std::max(frame.height - 1, 1) : frame.height;
  /* n rows touch at most (n - 1) low / high + 3 low-resolution rows. */
  const int64_t in_band = 1 + (MAX_BAND_ROWS - 3) * high / low;
  const int64_t fair = std::max<int64_t>(8, frame.height / (4 * int64_t{threads}));
  return std::min({in_band, fair, int64_t{64}});
}

struct Job {
  Taps y, x;
  Queue rows;
  Frame frame;
  int workers;

  Job(const cada_frame &given, int32_t threads)
      : y(given.height, given.low_height, given.align_corners != 0),
        x(given.width, given.low_width, given.align_corners != 0),
        rows{0, given.height, rows_at_once(given, threads)},
        frame{given,
              {x.lower.data(), x.weight.data(), given.width, given.low_width},
              {y.lower.data(), y.weight.data(), given.height, given.low_height},
              &rows},
        workers(workers_for(threads, rows)) {}
  Job(const Job &) = delete;
  Job &operator=(const Job &) = delete;
};

using Counts = std::vector<int64_t>;

void add(int64_t *total, const Counts &part) {
  for (size_t i = 0; i < part.size(); ++i) total[i] += part[i];
}

/* ---- what callers may pass ---- */

bool side_ok(int32_t n) { return n >= 1 && n <= MAX_SIDE; }

bool frame_ok(const cada_frame *frame, int32_t threads) {
  return frame != nullptr && frame->scores != nullptr && threads >= 1 && frame->classes >= 1 &&
         frame->classes <= 255 && side_ok(frame->low_height) && side_ok(frame->low_width) &&
         side_ok(frame->height) && side_ok(frame->width) &&
         /* a bin counts in 32 bits */
         int64_t{frame->height} * frame->width <= INT32_MAX &&
         (frame->align_corners == 0 || frame->align_corners == 1) &&
         (frame->order == CADA_ORDER_LOGITS || frame->order == CADA_ORDER_PROBS);
}

bool rule_ok(const cada_rule &rule) {
  return rule.thresholds != nullptr && rule.measure >= CADA_ENTROPY &&
         rule.measure <= CADA_RATIO && rule.comparator >= CADA_LT && rule.comparator <= CADA_GE &&
         (rule.measure != CADA_RATIO || rule.class_weights != nullptr);
}

/* No exception leaves the library, and no setting of the caller's enters it. */
template <class Body> int guarded(const Body &body) {
  const PlainFloats plain;
  try {
    return body();
  } catch (const std::bad_alloc &) {
    return CADA_NO_MEMORY;
  } catch (const std::length_error &) {
    return CADA_NO_MEMORY;
  }
}

} // namespace
} // namespace cada

using namespace cada;

CADA_API int cada_encode(const void *raw, int32_t dtype, int32_t meaning, int64_t frames,
                         int32_t classes, int64_t pixels, uint16_t *encoded, int32_t threads) {
  if (raw == nullptr || encoded == nullptr || frames < 0 || pixels < 0 || classes < 1 ||
      classes > 255 || threads < 1 || (dtype != CADA_FLOAT32 && dtype != CADA_FLOAT16) ||
      (meaning != CADA_LOGITS && meaning != CADA_PROBABILITIES)) {
    return CADA_BAD_ARGUMENT;
  }
  return guarded([&] {
    Queue pieces{0, frames * ((pixels + PIECE - 1) / PIECE), 1};
    const Raw work{raw, dtype, meaning, classes, frames, pixels, encoded, &pieces};
    const InstructionSet &set = isa();
    run_workers(workers_for(threads, pieces), [&](int) { set.encode(work); });
    return CADA_OK;
  });
}

CADA_API int cada_accumulate(const cada_frame *frame, int32_t weighting, int32_t threads,
                             int64_t *pixels, int64_t *sums, int64_t *histogram, int64_t *invalid,
                             int64_t *masked, uint8_t *labels, float *entropy) {
  if (!frame_ok(frame, threads) || pixels == nullptr || sums == nullptr || histogram == nullptr ||
      invalid == nullptr || masked == nullptr ||
      (weighting != CADA_WEIGHT_CONFIDENCE && weighting != CADA_WEIGHT_MEAN)) {
    return CADA_BAD_ARGUMENT;
  }
  return guarded([&] {
    const InstructionSet &set = isa();
    const Job job(*frame, threads);
    const auto classes = static_cast<size_t>(frame->classes);
    struct Part {
      Counts pixels, sums, histogram;
      Evidence evidence;
    };
    std::vector<Part> parts(static_cast<size_t>(job.workers));
    for (Part &part : parts) {
      part.pixels.resize(classes);
      part.sums.resize(classes * classes);
      part.histogram.resize(classes * CADA_HISTOGRAM_BINS);
      part.evidence = {part.pixels.data(), part.sums.data(), part.histogram.data(), 0, 0};
    }
    const Scratch scratch(job.workers, set.scratch_bytes(job.frame));
    run_workers(job.workers, [&](int i) {
      set.accumulate(job.frame, weighting, Maps{labels, entropy, nullptr},
                     parts[static_cast<size_t>(i)].evidence, scratch.of(i));
    });
    for (const Part &part : parts) {
      add(pixels, part.pixels);
      add(sums, part.sums);
      add(histogram, part.histogram);
      *invalid += part.evidence.invalid;
      *masked += part.evidence.masked;
    }
    return CADA_OK;
  });
}

CADA_API int cada_count(const cada_frame *frame, const cada_rule *rules, int32_t rule_count,
                        int32_t threads, int64_t *selected) {
  if (!frame_ok(frame, threads) || rule_count < 0 || (rule_count > 0 && rules == nullptr) ||
      selected == nullptr || !std::all_of(rules, rules + rule_count, rule_ok)) {
    return CADA_BAD_ARGUMENT;
  }
  return guarded([&] {
    const InstructionSet &set = isa();
    const Job job(*frame, threads);
    const size_t size = static_cast<size_t>(rule_count) * static_cast<size_t>(frame->classes);
    std::vector<Counts> parts(static_cast<size_t>(job.workers), Counts(size));
    const Scratch scratch(job.workers, set.scratch_bytes(job.frame));
    run_workers(job.workers, [&](int i) {
      Kept kept{nullptr, parts[static_cast<size_t>(i)].data(), 0, 0};
      set.count(job.frame, rules, rule_count, kept, scratch.of(i));
    });
    std::fill_n(selected, size, 0);
    for (const Counts &part : parts) add(selected, part);
    return CADA_OK;
  });
}

CADA_API int cada_select(const cada_frame *frame, const cada_rule *rule, int32_t threads,
                         uint8_t *labels, int64_t *predicted, int64_t *selected, int64_t *invalid,
                         int64_t *masked, float *entropy, float *confidence) {
  if (!frame_ok(frame, threads) || rule == nullptr || !rule_ok(*rule) || labels == nullptr ||
      predicted == nullptr || selected == nullptr || invalid == nullptr || masked == nullptr) {
    return CADA_BAD_ARGUMENT;
  }
  return guarded([&] {
    const InstructionSet &set = isa();
    const Job job(*frame, threads);
    const auto classes = static_cast<size_t>(frame->classes);
    struct Part {
      Counts predicted, selected;
      Kept kept;
    };
    std::vector<Part> parts(static_cast<size_t>(job.workers));
    for (Part &part : parts) {
      part.predicted.resize(classes);
      part.selected.resize(classes);
      part.kept = {part.predicted.data(), part.selected.data(), 0, 0};
    }
    const Scratch scratch(job.workers, set.scratch_bytes(job.frame));
    run_workers(job.workers, [&](int i) {
      set.select(job.frame, *rule, Maps{labels, entropy, confidence},
                 parts[static_cast<size_t>(i)].kept, scratch.of(i));
    });
    std::fill_n(predicted, classes, 0);
    std::fill_n(selected, classes, 0);
    *invalid = *masked = 0;
    for (const Part &part : parts) {
      add(predicted, part.predicted);
      add(selected, part.selected);
      *invalid += part.kept.invalid;
      *masked += part.kept.masked;
    }
    return CADA_OK;
  });
}

CADA_API const char *cada_isa(void) { return isa().name; }

CADA_API int cada_choose_isa(const char *name) {
  const InstructionSet *set = find(name);
  if (set == nullptr) return CADA_UNSUPPORTED_ISA;
  chosen.store(set);
  return CADA_OK;
}

CADA_API const char *cada_error_text(int code) {
  switch (code) {
  case CADA_OK: return "done";
  case CADA_BAD_ARGUMENT: return "an argument is outside its range (see cada_fused.h)";
  case CADA_NO_MEMORY: return "not enough memory for the kernel's working space";
  case CADA_UNSUPPORTED_ISA:
    return "this processor or this build does not have that instruction set";
  default: return "unknown error code";
  }
}

CADA_API int cada_abi_version(void) { return 1; }
