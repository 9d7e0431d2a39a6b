/* The command line of cada_seg as one value. */
#ifndef CADA_SEG_CLI_ARGUMENTS_H
#define CADA_SEG_CLI_ARGUMENTS_H
#include <cstdint>
#include <string>

namespace cada::seg::cli {

struct Arguments {
  std::string model, spec, images, out;
  std::string backend = "ort", ort_library;
  int32_t threads = 1, device = 0;
  int32_t input_height = 0, input_width = 0;
  bool entropy = false, quiet = false, help = false, version = false;
};

/* Throws Failure(USAGE). */
Arguments parse(int count, const char *const *words);
const char *help_text();

} // namespace cada::seg::cli
#endif
