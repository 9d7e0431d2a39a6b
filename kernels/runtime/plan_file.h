/* A TensorRT plan and the manifest beside it, judged before TensorRT or a GPU is touched: a plan is
 * executable code, so one that was altered is not loaded. Python: cada_deploy/engine_plans.py. */
#ifndef CADA_SEG_PLAN_FILE_H
#define CADA_SEG_PLAN_FILE_H
#include <optional>
#include <string>

#include "files.h"
#include "json.h"

namespace cada::seg {

struct PlanFile {
  std::string version;       /* of the TensorRT that built it: "10.3.0.30" */
  std::optional<Json> spec;  /* the manifest's; none without a manifest */
  bool version_compatible = false;
  bool verified = false;     /* it passed the gates after its build */
};

std::string manifest_path(const std::string &plan);

/* Throws Failure(MISMATCH) for another tool's file, a cut one, or one that is not the manifest's. */
PlanFile examine_plan(const Bytes &content, const std::string &path);

/* "spec" of an engine's manifest, or the whole of a ModelSpec file. */
Json spec_in(const std::string &path);

} // namespace cada::seg
#endif
