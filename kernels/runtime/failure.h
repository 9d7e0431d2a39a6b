/* The one exception of this library: an exit code and the sentence for the person who reads it. It
 * never leaves the library; api.cpp turns it into a code and cada_seg_error(). */
#ifndef CADA_SEG_FAILURE_H
#define CADA_SEG_FAILURE_H
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cada_seg.h"

namespace cada::seg {

class Failure : public std::runtime_error {
public:
  Failure(int code, const std::string &sentence) : std::runtime_error(sentence), code_(code) {}
  int code() const { return code_; }

private:
  int code_;
};

/* A word or a number of a sentence. Not a stream: those cost seconds of compiling per file. */
class Piece {
public:
  Piece(const char *text) : text_(text) {}
  Piece(const std::string &text) : text_(text) {}
  Piece(double number);
  template <class Whole, class = std::enable_if_t<std::is_integral_v<Whole>>>
  Piece(Whole number) : text_(std::to_string(number)) {}
  const std::string &text() const { return text_; }

private:
  std::string text_;
};

std::string joined(std::initializer_list<Piece> pieces);
[[noreturn]] void fail_with(int code, std::initializer_list<Piece> pieces);
/* reason is one of the words of rejected.jsonl ("truncated", "corrupt" ...). */
[[noreturn]] void reject_with(const char *reason, std::initializer_list<Piece> pieces);

template <class... Parts> std::string text(const Parts &...parts) { return joined({parts...}); }

template <class... Parts> [[noreturn]] void fail(int code, const Parts &...parts) {
  fail_with(code, {parts...});
}

template <class... Parts> [[noreturn]] void reject(const char *reason, const Parts &...detail) {
  reject_with(reason, {detail...});
}

inline std::string size_text(int64_t height, int64_t width) { return text(height, "x", width); }

} // namespace cada::seg
#endif
