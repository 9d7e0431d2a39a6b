#include "failure.h"

#include <cstdio>

namespace cada::seg {

Piece::Piece(double number) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%g", number);
  text_ = digits;
}

std::string joined(std::initializer_list<Piece> pieces) {
  std::string found;
  for (const Piece &piece : pieces) found += piece.text();
  return found;
}

void fail_with(int code, std::initializer_list<Piece> pieces) { throw Failure(code, joined(pieces)); }

void reject_with(const char *reason, std::initializer_list<Piece> pieces) {
  throw Failure(CADA_SEG_REJECTED, std::string(reason) + ": " + joined(pieces));
}

} // namespace cada::seg
