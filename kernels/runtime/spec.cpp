#include "spec.h"

#include <cmath>
#include <initializer_list>

#include "failure.h"

namespace cada::seg {
namespace {

/* One JSON object of the spec, whose keys are read by name and kind. */
class Table {
public:
  Table(const Json &json, std::string name) : name_(std::move(name)) {
    fields_ = json.as<JsonObject>();
    if (!fields_) fail(CADA_SEG_USAGE, name_, " is not a table");
  }

  void only(std::initializer_list<const char *> known) const {
    for (const auto &field : *fields_) {
      bool found = false;
      std::string all;
      for (const char *key : known) {
        found |= field.first == key;
        all += (all.empty() ? "" : ", ") + std::string(key);
      }
      if (!found) fail(CADA_SEG_USAGE, name_, " has an unknown key '", field.first, "'; known: ", all);
    }
  }

  const Json *find(const char *key) const {
    const auto at = fields_->find(key);
    return at == fields_->end() ? nullptr : &at->second;
  }
  const Json &at(const char *key) const {
    const Json *found = find(key);
    if (!found) fail(CADA_SEG_USAGE, name_, " lacks '", key, "'");
    return *found;
  }

  std::string string(const char *key) const { return as<std::string>(key, "a string"); }
  std::string string(const char *key, const char *otherwise) const {
    return find(key) ? string(key) : otherwise;
  }
  double number(const char *key) const { return as<double>(key, "a number"); }
  bool flag(const char *key) const { return as<bool>(key, "true or false"); }
  bool flag(const char *key, bool otherwise) const { return find(key) ? flag(key) : otherwise; }

  int64_t whole(const char *key, int64_t low, int64_t high, int64_t otherwise) const {
    if (!find(key)) return otherwise;
    const double found = number(key);
    if (!(found >= double(low) && found <= double(high)) || found != std::floor(found)) {
      fail(CADA_SEG_USAGE, name_, ".", key, " is ", found, "; expected ", low, " to ", high);
    }
    return static_cast<int64_t>(found);
  }

  /* True for the second word. */
  bool second_of(const char *key, const char *first, const char *second,
                 const char *otherwise = nullptr) const {
    const std::string found = otherwise ? string(key, otherwise) : string(key);
    if (found == second) return true;
    if (found == first) return false;
    fail(CADA_SEG_USAGE, name_, ".", key, " is '", found, "'; known: ", first, ", ", second);
  }

  std::array<double, 3> three(const char *key) const {
    const JsonArray &list = array(key);
    std::array<double, 3> found{};
    bool fine = list.size() == 3;
    for (size_t i = 0; fine && i < 3; ++i) {
      const double *number = list[i].as<double>();
      fine = number != nullptr;
      if (fine) found[i] = *number;
    }
    if (!fine) fail(CADA_SEG_USAGE, name_, ".", key, " is not three numbers");
    return found;
  }

  const JsonArray &array(const char *key) const {
    const JsonArray *found = at(key).as<JsonArray>();
    if (!found) fail(CADA_SEG_USAGE, name_, ".", key, " is not a list");
    return *found;
  }

  Size size(const char *key) const {
    if (!find(key) || at(key).is_null()) return {};
    const JsonArray &list = array(key);
    Size found;
    bool fine = list.size() == 2;
    for (size_t i = 0; fine && i < 2; ++i) {
      const double *side = list[i].as<double>();
      fine = side && *side >= 1 && *side <= 65535 && *side == std::floor(*side);
      if (fine) (i ? found.width : found.height) = static_cast<int32_t>(*side);
    }
    if (!fine) {
      fail(CADA_SEG_USAGE, name_, ".", key,
           " is not (height, width), each 1 to 65535 pixels");
    }
    return found;
  }

private:
  template <class Kind> Kind as(const char *key, const char *kind) const {
    const Kind *found = at(key).as<Kind>();
    if (!found) fail(CADA_SEG_USAGE, name_, ".", key, " is not ", kind);
    return *found;
  }

  const JsonObject *fields_;
  std::string name_;
};

InputSpec input_from(const Table &table) {
  table.only({"colour", "scale", "mean", "std", "resize", "name", "layout", "dtype", "size"});
  InputSpec found;
  found.name = table.string("name", "");
  found.bgr = table.second_of("colour", "RGB", "BGR");
  found.nhwc = table.second_of("layout", "NCHW", "NHWC", "NCHW");
  found.element =
      table.second_of("dtype", "float32", "float16", "float32") ? Element::float16 : Element::float32;
  found.resize = table.second_of("resize", "bilinear", "bicubic") ? Resize::bicubic : Resize::bilinear;
  found.scale = table.number("scale");
  found.mean = table.three("mean");
  found.std = table.three("std");
  found.size = table.size("size");
  bool positive = found.scale > 0;
  for (const double part : found.std) positive = positive && part > 0;
  if (!positive) fail(CADA_SEG_USAGE, "input.scale and input.std must be positive");
  return found;
}

OutputSpec output_from(const Table &table) {
  table.only({"align_corners", "order", "meaning", "name", "stride"});
  OutputSpec found;
  found.name = table.string("name", "");
  found.align_corners = table.flag("align_corners");
  found.probs_first = table.second_of("order", "logits", "probs", "logits");
  found.probabilities = table.second_of("meaning", "logits", "probabilities", "logits");
  table.whole("stride", 1, 256, 1); /* stated for people; the scores say their own size */
  if (found.probabilities && !found.probs_first) {
    fail(CADA_SEG_USAGE,
         "an output of probabilities is upsampled as such: output.order is 'probs'");
  }
  return found;
}

void refuse_several_passes(const Table &table, const std::string &what) {
  table.only({"mode", "window", "stride", "scales", "flip"});
  const bool slide = table.second_of("mode", "whole", "slide", "whole");
  bool one_scale = true;
  if (table.find("scales")) {
    const JsonArray &scales = table.array("scales");
    const double *scale = scales.size() == 1 ? scales[0].as<double>() : nullptr;
    one_scale = scale && *scale == 1.0;
  }
  if (slide || !one_scale || table.flag("flip", false)) {
    fail(CADA_SEG_MISMATCH, what,
         " asks for sliding windows, several scales or mirror images; cada_seg puts each frame "
         "through the network once. Use cada-deploy predict, or a model whose inference is 'whole'");
  }
}

int32_t classes_from(const Table &table) {
  table.only({"name", "names", "label_ids", "palette", "ignore_id"});
  const size_t count = table.array("names").size();
  if (count < 1 || count > 255) {
    fail(CADA_SEG_USAGE, "the class set has ", count, " classes; expected 1 to 255");
  }
  if (table.array("label_ids").size() != count || table.array("palette").size() != count) {
    fail(CADA_SEG_USAGE, "the class set needs one label id and one colour for each of its ", count,
         " names");
  }
  return static_cast<int32_t>(count);
}

} // namespace

ModelSpec spec_from_json(const Json &json, const std::string &what) {
  const Table whole(json, what);
  const Json *schema = whole.find("schema");
  const double *version = schema ? schema->as<double>() : nullptr;
  if (!version || *version != 1) {
    fail(CADA_SEG_MISMATCH, what, " has ", version ? text("schema ", *version) : "no schema",
         "; this cada_seg reads schema 1. Export the model again, or use the version that wrote it");
  }
  whole.only({"schema", "classes", "input", "inference", "output", "preset", "weights_sha256",
              "provenance"});
  ModelSpec spec;
  const Table classes(whole.at("classes"), "classes");
  spec.classes = classes_from(classes);
  spec.class_set = classes.string("name");
  spec.input = input_from(Table(whole.at("input"), "input"));
  spec.output = output_from(Table(whole.at("output"), "output"));
  if (const Json *inference = whole.find("inference")) {
    refuse_several_passes(Table(*inference, "inference"), what);
  }
  spec.any_class_count = !whole.string("preset", "").empty() &&
                         whole.string("weights_sha256", "").empty();
  return spec;
}

} // namespace cada::seg
