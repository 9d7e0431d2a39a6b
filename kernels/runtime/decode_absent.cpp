/* Stands in for the decoders in a build without libpng and libjpeg: such a library labels frames
 * that are in memory already. */
#include "decode.h"
#include "failure.h"

namespace cada::seg {
namespace {

[[noreturn]] void lacks(const char *what) {
  fail(CADA_SEG_LACKS, "this cada_seg was built without ", what, "; install its development files "
       "and build again with cmake -DCADA_SEG_CODECS=ON");
}

} // namespace

Decoded decode_png(const uint8_t *, size_t) { lacks("libpng"); }
Decoded decode_jpeg(const uint8_t *, size_t) { lacks("libjpeg"); }

} // namespace cada::seg
