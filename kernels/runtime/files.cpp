#include "files.h"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "failure.h"

namespace cada::seg {
namespace {

class Handle {
public:
  explicit Handle(int number) : number_(number) {}
  ~Handle() {
    if (number_ >= 0) close(number_);
  }
  Handle(const Handle &) = delete;
  Handle &operator=(const Handle &) = delete;
  int number() const { return number_; }

private:
  int number_;
};

uint32_t turned(uint32_t x, int by) { return x >> by | x << (32 - by); }

/* FIPS 180-4: the first 32 bits of the fractional parts of the cube roots of the first 64 primes. */
constexpr uint32_t ROUND[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

void absorb(uint32_t state[8], const uint8_t block[64]) {
  uint32_t w[64];
  for (int i = 0; i < 16; ++i) {
    w[i] = uint32_t{block[4 * i]} << 24 | uint32_t{block[4 * i + 1]} << 16 |
           uint32_t{block[4 * i + 2]} << 8 | block[4 * i + 3];
  }
  for (int i = 16; i < 64; ++i) {
    const uint32_t a = w[i - 15], b = w[i - 2];
    w[i] = w[i - 16] + (turned(a, 7) ^ turned(a, 18) ^ a >> 3) + w[i - 7] +
           (turned(b, 17) ^ turned(b, 19) ^ b >> 10);
  }
  uint32_t s[8];
  std::memcpy(s, state, sizeof s);
  for (int i = 0; i < 64; ++i) {
    const uint32_t t1 = s[7] + (turned(s[4], 6) ^ turned(s[4], 11) ^ turned(s[4], 25)) +
                        ((s[4] & s[5]) ^ (~s[4] & s[6])) + ROUND[i] + w[i];
    const uint32_t t2 = (turned(s[0], 2) ^ turned(s[0], 13) ^ turned(s[0], 22)) +
                        ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
    std::memmove(s + 1, s, 7 * sizeof s[0]);
    s[4] += t1;
    s[0] = t1 + t2;
  }
  for (int i = 0; i < 8; ++i) state[i] += s[i];
}

} // namespace

Bytes read_file(const std::string &path, const char *what) {
  struct stat found {};
  if (stat(path.c_str(), &found) != 0) {
    fail(CADA_SEG_USAGE, what, " ", path, " cannot be read: ", std::strerror(errno));
  }
  if (!S_ISREG(found.st_mode)) fail(CADA_SEG_USAGE, what, " ", path, " is not a regular file");
  const Handle handle(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (handle.number() < 0 || fstat(handle.number(), &found) != 0 || !S_ISREG(found.st_mode)) {
    fail(CADA_SEG_USAGE, what, " ", path, " cannot be read: ", std::strerror(errno));
  }
  Bytes data(static_cast<size_t>(found.st_size));
  size_t got = 0;
  while (got < data.size()) {
    const ssize_t part = read(handle.number(), data.data() + got, data.size() - got);
    if (part < 0 && errno == EINTR) continue;
    if (part < 0) fail(CADA_SEG_USAGE, what, " ", path, " cannot be read: ", std::strerror(errno));
    if (part == 0) break;
    got += static_cast<size_t>(part);
  }
  data.resize(got);
  return data;
}

std::string sha256_hex(const Bytes &data) {
  /* The fractional parts of the square roots of the first eight primes. */
  uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                       0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  const size_t whole = data.size() / 64 * 64;
  for (size_t at = 0; at < whole; at += 64) absorb(state, data.data() + at);
  uint8_t tail[128] = {};
  const size_t left = data.size() - whole;
  if (left) std::memcpy(tail, data.data() + whole, left);
  tail[left] = 0x80;
  const size_t end = left < 56 ? 64 : 128;
  const uint64_t bits = uint64_t{data.size()} * 8;
  for (size_t i = 0; i < 8; ++i) tail[end - 1 - i] = static_cast<uint8_t>(bits >> (8 * i));
  for (size_t at = 0; at < end; at += 64) absorb(state, tail + at);
  std::string hex;
  for (const uint32_t word : state) {
    for (int shift = 28; shift >= 0; shift -= 4) hex += "0123456789abcdef"[word >> shift & 15];
  }
  return hex;
}

} // namespace cada::seg
