/* Stands in for tensorrt.cpp in a build without TensorRT. */
#include "backend.h"
#include "failure.h"

namespace cada::seg {

std::unique_ptr<Backend> open_tensorrt(const BackendOptions &) {
  fail(CADA_SEG_LACKS, "this cada_seg was built without TensorRT; build it on a machine that has it "
       "(JetPack: sudo apt install libnvinfer-dev) with cmake -DCADA_SEG_TENSORRT=ON, or take "
       "--backend ort with the ONNX");
}

} // namespace cada::seg
