#include "plan_file.h"

#include <cstring>
#include <sys/stat.h>

#include "failure.h"

namespace cada::seg {
namespace {

constexpr char TAG[] = "ftrt";
constexpr size_t HEADER_BYTES = 28, VERSION_AT = 24;
constexpr char AGAIN[] = "build it again: cada-deploy export MODEL.onnx -o ";

std::string header_version(const Bytes &content, const std::string &path) {
  if (content.size() < 4 || std::memcmp(content.data(), TAG, 4) != 0) {
    fail(CADA_SEG_MISMATCH, path, " is not a TensorRT plan (it does not begin with '", TAG, "'); ",
         AGAIN, path);
  }
  if (content.size() < HEADER_BYTES) {
    fail(CADA_SEG_MISMATCH, path, " is cut short: ", content.size(),
         " bytes, and a plan's header alone has ", HEADER_BYTES, "; ", AGAIN, path);
  }
  for (size_t i = 4; i < 8; ++i) {
    if (content[i] != 0) {
      fail(CADA_SEG_MISMATCH, path, " is a plan of an unknown serialisation version; ", AGAIN, path);
    }
  }
  std::string version;
  for (size_t i = VERSION_AT; i < HEADER_BYTES; ++i) {
    version += (version.empty() ? "" : ".") + std::to_string(content[i]);
  }
  return version;
}

bool exists(const std::string &path) {
  struct stat found {};
  return stat(path.c_str(), &found) == 0;
}

const Json *member(const Json &json, const char *key) {
  const JsonObject *object = json.as<JsonObject>();
  if (!object) return nullptr;
  const auto at = object->find(key);
  return at == object->end() ? nullptr : &at->second;
}

Json read_json(const std::string &path) {
  const Bytes content = read_file(path, "file");
  return parse_json(std::string(content.begin(), content.end()), path);
}

void check_content(const Bytes &content, const std::string &path, const Json &manifest) {
  const Json *size = member(manifest, "plan_bytes"), *digest = member(manifest, "plan_sha256");
  const double *bytes = size ? size->as<double>() : nullptr;
  const std::string *sha256 = digest ? digest->as<std::string>() : nullptr;
  if (!bytes || !sha256 || !member(manifest, "spec")) {
    fail(CADA_SEG_MISMATCH, manifest_path(path), " is not the manifest of an engine; ", AGAIN, path);
  }
  if (static_cast<double>(content.size()) < *bytes) {
    fail(CADA_SEG_MISMATCH, path, " is cut short: ", content.size(), " of ", *bytes,
         " bytes; copy it again, or ", AGAIN, path);
  }
  if (sha256_hex(content) != *sha256) {
    fail(CADA_SEG_MISMATCH, path, " is not the plan of its manifest: its sha256 is another. It was "
         "changed, or the two files are of different builds; an engine is code, so it is not "
         "loaded; ", AGAIN, path);
  }
}

bool has_flag(const Json &manifest, const char *name) {
  const Json *flags = member(manifest, "flags");
  const JsonArray *list = flags ? flags->as<JsonArray>() : nullptr;
  bool found = false;
  if (list) {
    for (const Json &flag : *list) {
      const std::string *text = flag.as<std::string>();
      found |= text && *text == name;
    }
  }
  return found;
}

} // namespace

std::string manifest_path(const std::string &plan) { return plan + ".json"; }

PlanFile examine_plan(const Bytes &content, const std::string &path) {
  PlanFile found;
  found.version = header_version(content, path);
  if (!exists(manifest_path(path))) return found;
  const Json manifest = read_json(manifest_path(path));
  check_content(content, path, manifest);
  found.spec = *member(manifest, "spec");
  found.version_compatible = has_flag(manifest, "VERSION_COMPATIBLE");
  const Json *verified = member(manifest, "verified");
  found.verified = verified && verified->as<bool>() && *verified->as<bool>();
  return found;
}

Json spec_in(const std::string &path) {
  const std::string toml = ".toml";
  if (path.size() > toml.size() && path.compare(path.size() - toml.size(), toml.size(), toml) == 0) {
    fail(CADA_SEG_USAGE, path, " is TOML; cada_seg reads the spec as JSON (docs/cada_seg.md has the "
         "line that converts it), from an engine's manifest, or from the model itself");
  }
  const Json whole = read_json(path);
  const Json *inner = member(whole, "plan_sha256") ? member(whole, "spec") : nullptr;
  return inner ? *inner : whole;
}

} // namespace cada::seg
