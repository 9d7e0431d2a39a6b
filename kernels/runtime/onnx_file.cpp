#include "onnx_file.h"

#include <cstring>

#include "failure.h"

namespace cada::seg {
namespace {

struct Malformed {};

constexpr int DEEPEST = 32; /* subgraphs within subgraphs */

/* One message: fields in turn, by number. */
class Message {
public:
  Message(const uint8_t *begin, const uint8_t *end) : at_(begin), end_(end) {}

  bool next() {
    if (at_ == end_) return false;
    const uint64_t key = varint();
    number_ = key >> 3;
    kind_ = static_cast<int>(key & 7);
    if (number_ == 0) throw Malformed{};
    switch (kind_) {
    case 0: value_ = varint(); break;
    case 1: skip(8); break;
    case 2: value_ = varint(); begin_ = at_; skip(value_); break;
    case 5: skip(4); break;
    default: throw Malformed{};
    }
    return true;
  }
  uint64_t number() const { return number_; }
  bool is(uint64_t number, int kind) const { return number_ == number && kind_ == kind; }
  uint64_t value() const { return value_; }
  Message inside() const { return {begin_, begin_ + value_}; }
  std::string string() const { return {reinterpret_cast<const char *>(begin_), value_}; }

private:
  uint64_t varint() {
    uint64_t found = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (at_ == end_) throw Malformed{};
      const uint8_t byte = *at_++;
      found |= static_cast<uint64_t>(byte & 127) << shift;
      if (byte < 128) return found;
    }
    throw Malformed{};
  }
  void skip(uint64_t bytes) {
    if (bytes > static_cast<uint64_t>(end_ - at_)) throw Malformed{};
    at_ += bytes;
  }

  const uint8_t *at_, *end_, *begin_ = nullptr;
  uint64_t number_ = 0, value_ = 0;
  int kind_ = 0;
};

/* Field numbers of onnx.proto (ONNX is append-only, like protobuf itself). */
enum class Kind { model, graph, node, attribute, tensor, sparse, function, none };

Kind inside_of(Kind message, uint64_t field) {
  switch (message) {
  case Kind::model: return field == 7 ? Kind::graph : field == 25 ? Kind::function : Kind::none;
  case Kind::graph:
    return field == 1 ? Kind::node : field == 5 ? Kind::tensor : field == 15 ? Kind::sparse : Kind::none;
  case Kind::function: return field == 7 ? Kind::node : Kind::none;
  case Kind::node: return field == 5 ? Kind::attribute : Kind::none;
  case Kind::attribute:
    return field == 5 || field == 10   ? Kind::tensor
           : field == 6 || field == 11 ? Kind::graph
           : field == 22 || field == 23 ? Kind::sparse
                                        : Kind::none;
  case Kind::sparse: return field == 1 || field == 2 ? Kind::tensor : Kind::none;
  default: return Kind::none;
  }
}

constexpr uint64_t DATA_LOCATION = 14, EXTERNAL = 1;

bool has_external(Message message, Kind kind, int depth) {
  if (depth > DEEPEST) throw Malformed{};
  bool found = false;
  while (message.next()) {
    const Kind inner = inside_of(kind, message.number());
    if (inner != Kind::none && message.is(message.number(), 2)) {
      found |= has_external(message.inside(), inner, depth + 1);
    }
    found |= kind == Kind::tensor && message.is(DATA_LOCATION, 0) && message.value() == EXTERNAL;
  }
  return found;
}

std::optional<std::string> entry(Message property, const char *wanted) {
  std::string key, value;
  while (property.next()) {
    if (property.is(1, 2)) key = property.string();
    if (property.is(2, 2)) value = property.string();
  }
  if (key != wanted) return std::nullopt;
  return value;
}

} // namespace

OnnxFile examine_onnx(const Bytes &content, const std::string &name) {
  const Message whole(content.data(), content.data() + content.size());
  OnnxFile found;
  bool has_graph = false;
  try {
    for (Message model = whole; model.next();) {
      has_graph |= model.is(7, 2);
      if (!model.is(14, 2) || found.spec) continue;
      found.spec = entry(model.inside(), "cada_deploy.model_spec");
    }
    found.external_weights = has_external(whole, Kind::model, 0);
  } catch (const Malformed &) {
    fail(CADA_SEG_MISMATCH, name, " is not an ONNX file, or is cut short");
  }
  if (!has_graph) fail(CADA_SEG_MISMATCH, name, " is not an ONNX model: it holds no graph");
  return found;
}

} // namespace cada::seg
