/* Regular files, read whole, and their SHA-256. */
#ifndef CADA_SEG_FILES_H
#define CADA_SEG_FILES_H
#include <cstdint>
#include <string>
#include <vector>

namespace cada::seg {

using Bytes = std::vector<uint8_t>;

/* Throws Failure(USAGE), naming `what`, for a file that is not there, is no regular file (a FIFO
 * would wait for its writer) or cannot be read. */
Bytes read_file(const std::string &path, const char *what);

std::string sha256_hex(const Bytes &data);

} // namespace cada::seg
#endif
