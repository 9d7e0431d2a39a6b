/* JSON as RFC 8259 has it, strictly and without a library: what a spec and a manifest are made of.
 * Refuses repeated keys, NaN, text after the end and nesting deeper than 64. */
#ifndef CADA_SEG_JSON_H
#define CADA_SEG_JSON_H
#include <map>
#include <string>
#include <variant>
#include <vector>

namespace cada::seg {

struct Json;
using JsonObject = std::map<std::string, Json>;
using JsonArray = std::vector<Json>;

struct Json {
  std::variant<std::nullptr_t, bool, double, std::string, JsonArray, JsonObject> value = nullptr;

  template <class Kind> const Kind *as() const { return std::get_if<Kind>(&value); }
  bool is_null() const { return std::holds_alternative<std::nullptr_t>(value); }
};

/* Throws Failure(CADA_SEG_MISMATCH) with `what` and the byte where the text goes wrong. */
Json parse_json(const std::string &text, const std::string &what);

} // namespace cada::seg
#endif
