"""Our TensorRT code against the real bindings of three versions, without a GPU and without
TensorRT: the wheels' pybind classes over empty libraries."""
