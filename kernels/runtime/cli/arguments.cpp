#include "arguments.h"

#include <cstdlib>
#include <cstring>

#include "failure.h"

namespace cada::seg::cli {
namespace {

bool all_digits(const std::string &text) {
  return !text.empty() && text.size() <= 6 && text.find_first_not_of("0123456789") == std::string::npos;
}

int32_t whole(const std::string &option, const std::string &text, int32_t least) {
  const int found = all_digits(text) ? std::atoi(text.c_str()) : -1;
  if (found < least) fail(CADA_SEG_USAGE, option, " is '", text, "'; expected a number from ", least);
  return found;
}

void size(const std::string &text, Arguments *found) {
  const size_t cross = text.find_first_of("xX");
  const std::string height = text.substr(0, cross);
  const std::string width = cross == std::string::npos ? "" : text.substr(cross + 1);
  if (!all_digits(height) || !all_digits(width)) {
    fail(CADA_SEG_USAGE, "--size '", text, "': expected HEIGHTxWIDTH, such as 512x1024");
  }
  found->input_height = std::atoi(height.c_str());
  found->input_width = std::atoi(width.c_str());
  if (found->input_height < 1 || found->input_width < 1 || found->input_height > 65535 ||
      found->input_width > 65535) {
    fail(CADA_SEG_USAGE, "--size '", text, "': each side must be 1 to 65535 pixels");
  }
}

bool set_flag(const std::string &word, Arguments *found) {
  if (word == "--entropy") found->entropy = true;
  else if (word == "--quiet") found->quiet = true;
  else if (word == "--help" || word == "-h") found->help = true;
  else if (word == "--version") found->version = true;
  else return false;
  return true;
}

void set_value(const std::string &option, const std::string &value, Arguments *found) {
  if (option == "--model") found->model = value;
  else if (option == "--spec") found->spec = value;
  else if (option == "--images") found->images = value;
  else if (option == "--out") found->out = value;
  else if (option == "--backend") found->backend = value;
  else if (option == "--ort-library") found->ort_library = value;
  else if (option == "--threads") found->threads = whole(option, value, 1);
  else if (option == "--device") found->device = whole(option, value, 0);
  else if (option == "--size") size(value, found);
  else fail(CADA_SEG_USAGE, "unknown option ", option, "; cada_seg --help lists them");
}

bool takes_value(const std::string &option) {
  for (const char *known : {"--model", "--spec", "--images", "--out", "--backend", "--ort-library",
                            "--threads", "--device", "--size"}) {
    if (option == known) return true;
  }
  return false;
}

} // namespace

Arguments parse(int count, const char *const *words) {
  Arguments found;
  for (int i = 1; i < count; ++i) {
    std::string word = words[i];
    if (set_flag(word, &found)) continue;
    const size_t equals = word.find('=');
    if (word.rfind("--", 0) == 0 && equals != std::string::npos) {
      set_value(word.substr(0, equals), word.substr(equals + 1), &found);
      continue;
    }
    if (takes_value(word) && i + 1 >= count) fail(CADA_SEG_USAGE, word, " needs a value");
    set_value(word, takes_value(word) ? words[++i] : "", &found);
  }
  if (found.help || found.version) return found;
  const std::pair<const char *, const std::string &> needed[] = {
      {"--model", found.model}, {"--images", found.images}, {"--out", found.out}};
  for (const auto &[option, value] : needed) {
    if (value.empty()) fail(CADA_SEG_USAGE, "missing option ", option, "; cada_seg --help");
  }
  return found;
}

const char *help_text() {
  return R"(cada_seg: label every pixel of every image, without Python.

  cada_seg --model M.onnx --images DIR --out OUT

Writes OUT/labels/<name>.png, 8-bit grey train ids, 255 only where nothing is valid: the pixels
that `cada-deploy predict` writes.

  --model FILE        M.onnx, or M.engine with its M.engine.json (trt)
  --spec FILE.json    how a model without a spec is fed; a ModelSpec or an engine's manifest
  --images PATH       a folder, one image, or a list (one path a line); PNG and JPEG
  --out DIR           folder for everything that is made
  --backend ort|trt   ONNX Runtime on the CPU (default), or TensorRT
  --ort-library FILE  libonnxruntime.so, if the linker does not find it (or CADA_ORT_LIBRARY)
  --threads N         for one frame (default 1)
  --device N          CUDA device (default 0)
  --size HxW          network input, for a model of any size (default: the image's own)
  --entropy           also write OUT/entropy/<name>.png, 16 bit
  --quiet             no summary
  --version, --help

Exit: 0 done, 1 failed on the way, 2 usage, 3 something is not installed, 4 an artefact does not
fit, 6 some images were rejected, 130 interrupted.
)";
}

} // namespace cada::seg::cli
