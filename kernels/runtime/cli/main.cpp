/* cada_seg: images in, label PNGs out. Everything of substance is in libcada_seg; this is a host. */
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>

#include "arguments.h"
#include "cada_seg.h"
#include "failure.h"
#include "files.h"
#include "image_list.h"
#include "latency.h"
#include "png_write.h"

namespace cada::seg::cli {
namespace {

volatile std::sig_atomic_t interrupted = 0;
void on_signal(int) { interrupted = 1; }

constexpr int INTERRUPTED = 130;

struct Close {
  void operator()(::cada_seg *model) const { cada_seg_close(model); }
};
using Model = std::unique_ptr<::cada_seg, Close>;

class Picture { /* owns what cada_seg_decode gives */
public:
  Picture() = default;
  ~Picture() { cada_seg_free_picture(&got); }
  Picture(const Picture &) = delete;
  Picture &operator=(const Picture &) = delete;
  cada_seg_picture got{};
};

void check(int code) {
  if (code != CADA_SEG_DONE) throw Failure(code, cada_seg_error());
}

Model open_model(const Arguments &given) {
  cada_seg_options options{};
  options.size = sizeof options;
  options.model = given.model.c_str();
  options.spec = given.spec.empty() ? nullptr : given.spec.c_str();
  options.backend = given.backend.c_str();
  options.ort_library = given.ort_library.empty() ? nullptr : given.ort_library.c_str();
  options.threads = given.threads;
  options.device = given.device;
  options.input_height = given.input_height;
  options.input_width = given.input_width;
  ::cada_seg *model = nullptr;
  check(cada_seg_open(&options, &model));
  return Model(model);
}

/* What the file system refuses to give is that image's fault, in the words of rejected.jsonl. */
Bytes read_image(const std::string &path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) reject("missing", path);
  if (!std::filesystem::is_regular_file(status)) reject("not-a-file", path);
  const auto bytes = std::filesystem::file_size(path, error);
  if (!error && bytes > (uintmax_t{1} << 30)) reject("too-large", bytes, " bytes");
  try {
    return read_file(path, "image");
  } catch (const Failure &failure) {
    reject("unreadable", failure.what());
  }
}

class Labeller {
public:
  explicit Labeller(const Arguments &given) : given_(given), model_(open_model(given)) {}

  const char *backend() const { return cada_seg_backend(model_.get()); }
  const Latency &latency() const { return latency_; }

  void label(const ImageRef &image) {
    auto timer = [last = Clock::now()]() mutable { /* ms since the last call */
      const auto now = Clock::now();
      const double ms = std::chrono::duration<double, std::milli>(now - last).count();
      last = now;
      return ms;
    };
    const Bytes data = read_image(image.path);
    const double read = timer();
    Picture picture;
    check(cada_seg_decode(data.data(), data.size(), &picture.got));
    const double decode = timer();
    const cada_seg_result result = labelled(picture.got);
    timer();
    write(image, picture.got);
    latency_.add({read, decode, result.preprocess_ms, result.network_ms, result.encode_ms,
                  result.fuse_ms, timer()});
  }

private:
  using Clock = std::chrono::steady_clock;

  cada_seg_result labelled(const cada_seg_picture &picture) {
    const size_t pixels = static_cast<size_t>(picture.height) * static_cast<size_t>(picture.width);
    labels_.resize(pixels);
    entropy_.resize(given_.entropy ? pixels : 0);
    const cada_seg_image frame{picture.pixels, picture.height, picture.width, 0};
    cada_seg_result result{};
    result.size = sizeof result;
    result.labels = labels_.data();
    result.entropy = given_.entropy ? entropy_.data() : nullptr;
    check(cada_seg_label(model_.get(), &frame, &result));
    return result;
  }

  void write(const ImageRef &image, const cada_seg_picture &picture) const {
    const std::string name = "/" + output_stem(image.relative) + ".png";
    write_file(given_.out + "/labels" + name, label_png(labels_, picture.height, picture.width));
    if (!given_.entropy) return;
    write_file(given_.out + "/entropy" + name,
               entropy_png(entropy_, picture.height, picture.width,
                           cada_seg_classes(model_.get())));
  }

  const Arguments &given_;
  Model model_;
  std::vector<uint8_t> labels_;
  std::vector<float> entropy_;
  Latency latency_;
};

/* A finished run of cada-deploy has manifests that speak of its labels: not ours to change. */
void check_out(const std::string &out) {
  std::error_code error;
  if (std::filesystem::exists(out + "/run.json", error)) {
    fail(CADA_SEG_MISMATCH, out, " holds a run of cada-deploy (run.json); give another folder");
  }
}

int label_all(const Arguments &given) {
  const std::vector<ImageRef> images = find_images(given.images);
  check_output_names(images);
  check_out_not_inside(given.images, given.out);
  check_out(given.out);
  Labeller labeller(given);
  size_t rejected = 0, done = 0;
  for (const ImageRef &image : images) {
    if (interrupted) break;
    try {
      labeller.label(image);
      ++done;
    } catch (const Failure &failure) {
      if (failure.code() != CADA_SEG_REJECTED) {
        throw Failure(failure.code(), image.relative + ": " + failure.what());
      }
      std::fprintf(stderr, "rejected %s: %s\n", image.relative.c_str(), failure.what());
      ++rejected;
    }
  }
  if (!given.quiet) {
    std::fprintf(stderr, "%zu of %zu images labelled, %zu rejected; %s, %s kernel, %d thread%s\n",
                 done, images.size(), rejected, labeller.backend(), cada_seg_isa(), given.threads,
                 given.threads == 1 ? "" : "s");
    std::fprintf(stderr, "%s\n", labeller.latency().line().c_str());
  }
  if (interrupted) return INTERRUPTED;
  return rejected ? CADA_SEG_REJECTED : CADA_SEG_DONE;
}

int run(int count, const char *const *words) {
  const Arguments given = parse(count, words);
  if (given.help) return std::fputs(help_text(), stdout) < 0;
  if (given.version) return std::printf("cada_seg, ABI %d\n", cada_seg_abi()) < 0;
  struct sigaction action {};
  action.sa_handler = on_signal;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  return label_all(given);
}

} // namespace
} // namespace cada::seg::cli

int main(int count, char **words) {
  try {
    return cada::seg::cli::run(count, words);
  } catch (const cada::seg::Failure &failure) {
    std::fprintf(stderr, "error: %s\n", failure.what());
    return failure.code();
  } catch (const std::exception &error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return CADA_SEG_FAILED;
  }
}
