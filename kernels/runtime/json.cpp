#include "json.h"

#include <clocale>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <locale.h>
#include <memory>

#include "failure.h"

namespace cada::seg {
namespace {

constexpr int DEEPEST = 64;

/* The decimal point is a point, whatever locale the program has set. */
double number_from(const char *digits) {
  static const locale_t plain = newlocale(LC_ALL_MASK, "C", nullptr);
  return strtod_l(digits, nullptr, plain);
}

class Reader {
public:
  Reader(const std::string &text, const std::string &what) : text_(text), what_(what) {}

  Json whole() {
    Json found = value(0);
    skip_space();
    if (at_ != text_.size()) wrong("text after the end");
    return found;
  }

private:
  [[noreturn]] void wrong(const char *why) const {
    fail(CADA_SEG_MISMATCH, what_, " is not JSON: ", why, " at byte ", at_);
  }

  void skip_space() {
    while (at_ < text_.size() && std::strchr(" \t\r\n", text_[at_]) && text_[at_]) ++at_;
  }
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  bool take(char expected) {
    skip_space();
    if (at_ >= text_.size() || text_[at_] != expected) return false;
    ++at_;
    return true;
  }
  bool take_word(const char *word) {
    if (text_.compare(at_, std::strlen(word), word) != 0) return false;
    at_ += std::strlen(word);
    return true;
  }

  Json value(int depth) {
    if (depth > DEEPEST) wrong("nested too deep");
    skip_space();
    switch (peek()) {
    case '{': return Json{object(depth)};
    case '[': return Json{array(depth)};
    case '"': return Json{string()};
    case 't': if (take_word("true")) return Json{true}; break;
    case 'f': if (take_word("false")) return Json{false}; break;
    case 'n': if (take_word("null")) return Json{nullptr}; break;
    default: return Json{number()};
    }
    wrong("an unknown word");
  }

  JsonObject object(int depth) {
    JsonObject found;
    ++at_;
    if (take('}')) return found;
    do {
      skip_space();
      if (peek() != '"') wrong("no name");
      std::string name = string();
      if (!take(':')) wrong("no colon");
      if (!found.emplace(std::move(name), value(depth + 1)).second) wrong("a name twice");
    } while (take(','));
    if (!take('}')) wrong("no closing brace");
    return found;
  }

  JsonArray array(int depth) {
    JsonArray found;
    ++at_;
    if (take(']')) return found;
    do found.push_back(value(depth + 1));
    while (take(','));
    if (!take(']')) wrong("no closing bracket");
    return found;
  }

  double number() {
    const size_t start = at_;
    const auto digits = [this] {
      const size_t first = at_;
      while (peek() >= '0' && peek() <= '9') ++at_;
      return at_ - first;
    };
    if (peek() == '-') ++at_;
    const size_t leading = at_;
    const size_t whole = digits();
    if (whole == 0 || (whole > 1 && text_[leading] == '0')) wrong("no value");
    if (peek() == '.') {
      ++at_;
      if (digits() == 0) wrong("no digit after the point");
    }
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      if (digits() == 0) wrong("no exponent");
    }
    const double found = number_from(text_.substr(start, at_ - start).c_str());
    if (!std::isfinite(found)) wrong("a number too large");
    return found;
  }

  unsigned hex4() {
    unsigned found = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = peek();
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) wrong("a bad \\u escape");
      found = found * 16 + static_cast<unsigned>(digit);
    }
    return found;
  }

  void append_escape(std::string *found) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    const char c = peek();
    if (c != 'u') {
      const char *known = c ? std::strchr(from, c) : nullptr;
      if (!known) wrong("a bad escape");
      ++at_;
      *found += to[known - from];
      return;
    }
    ++at_;
    unsigned code = hex4();
    if (code >= 0xD800 && code < 0xDC00) {
      if (!take_word("\\u")) wrong("half a surrogate pair");
      const unsigned low = hex4();
      if (low < 0xDC00 || low > 0xDFFF) wrong("half a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else if (code >= 0xDC00 && code < 0xE000) {
      wrong("half a surrogate pair");
    }
    append_utf8(found, code);
  }

  static void append_utf8(std::string *found, unsigned code) {
    const auto put = [found](unsigned byte) { *found += static_cast<char>(byte); };
    if (code < 0x80) return put(code);
    if (code < 0x800) {
      put(0xC0 | code >> 6);
    } else {
      if (code < 0x10000) {
        put(0xE0 | code >> 12);
      } else {
        put(0xF0 | code >> 18);
        put(0x80 | (code >> 12 & 63));
      }
      put(0x80 | (code >> 6 & 63));
    }
    put(0x80 | (code & 63));
  }

  std::string string() {
    std::string found;
    for (++at_; peek() != '"';) {
      if (at_ >= text_.size()) wrong("no closing quote");
      const char c = text_[at_++];
      if (static_cast<unsigned char>(c) < 0x20) wrong("a control character in a string");
      if (c == '\\') append_escape(&found);
      else found += c;
    }
    ++at_;
    return found;
  }

  const std::string &text_;
  const std::string &what_;
  size_t at_ = 0;
};

} // namespace

Json parse_json(const std::string &text, const std::string &what) {
  return Reader(text, what).whole();
}

} // namespace cada::seg
