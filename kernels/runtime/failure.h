/* The one exception of this library: an exit code and the sentence for the person who reads it. It
 * never leaves the library; api.cpp turns it into a code and cada_seg_error(). */
#ifndef CADA_SEG_FAILURE_H
#define CADA_SEG_FAILURE_H
#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cada_seg.h"

namespace cada::seg {

class Failure : public std::runtime_error {
public:
  Failure(int code, const std::string &sentence) : std::runtime_error(sentence), code_(code) {}
  int code() const { return code_; }

private:
  int code_;
};

template <class... Parts> std::string text(const Parts &...parts) {
  std::ostringstream out;
  out.imbue(std::locale::classic());
  (out << ... << parts);
  return out.str();
}

template <class... Parts> [[noreturn]] void fail(int code, const Parts &...parts) {
  throw Failure(code, text(parts...));
}

/* reason is one of the words of rejected.jsonl ("truncated", "corrupt" ...). */
template <class... Parts> [[noreturn]] void reject(const char *reason, const Parts &...detail) {
  throw Failure(CADA_SEG_REJECTED, text(reason, ": ", detail...));
}

inline std::string size_text(int64_t height, int64_t width) { return text(height, "x", width); }

} // namespace cada::seg
#endif
