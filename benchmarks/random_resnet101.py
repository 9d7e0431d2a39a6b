"""DeepLabV2 on ResNet-101 as an ONNX file with random weights: the cost of the real network
without its training. The layers are those of training/models/deeplab.py with batch norms folded,
as the exporter leaves them; no PyTorch is needed. Weights are He-normal, so that values stay in
range through 101 layers; what it predicts means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from cada_deploy.classes import CITYSCAPES_19
from cada_deploy.model_files import metadata
from cada_deploy.model_spec import ModelSpec, Size
from cada_deploy.presets import preset

BLOCKS = (3, 4, 23, 3)
PLANES = (64, 128, 256, 512)
STRIDES = (1, 2, 1, 1)
DILATIONS = (1, 1, 2, 4)
BRANCHES = (6, 12, 18, 24)  # dilations of the ASPP


@dataclass
class _Graph:
    """Nodes and weights as they are added; every call returns the name of what it made."""

    random: np.random.Generator
    nodes: list[NodeProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)

    def add(self, kind: str, inputs: list[str], **attributes: object) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def weight(self, values: npt.NDArray[np.float32]) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def convolution(
        self, x: str, inputs: int, outputs: int, size: int, stride: int = 1, dilation: int = 1,
        gain: float = 2.0,
    ) -> str:  # fmt: skip
        pad = dilation * (size // 2)
        deviation = np.float32((gain / (inputs * size * size)) ** 0.5)
        shape = (outputs, inputs, size, size)
        weight = self.random.standard_normal(shape, dtype=np.float32) * deviation
        return self.add(
            "Conv", [x, self.weight(weight), self.weight(np.zeros(outputs, np.float32))],
            kernel_shape=[size, size], strides=[stride, stride], dilations=[dilation, dilation],
            pads=[pad, pad, pad, pad],
        )  # fmt: skip

    def bottleneck(self, x: str, inputs: int, planes: int, stride: int, dilation: int) -> str:
        """The first of a stage (the one whose channels or size change) has a projection."""
        y = self.add("Relu", [self.convolution(x, inputs, planes, 1, stride)])
        y = self.add("Relu", [self.convolution(y, planes, planes, 3, dilation=dilation)])
        y = self.convolution(y, planes, 4 * planes, 1, gain=0.2)  # a small branch: sums stay small
        if inputs != 4 * planes or stride != 1:
            x = self.convolution(x, inputs, 4 * planes, 1, stride, gain=1.0)
        return self.add("Relu", [self.add("Add", [x, y])])


def write(path: Path, size: Size | None = None, batch: int | None = None, seed: int = 0) -> Path:
    """size and batch None: dynamic. About 178 MB."""
    graph = _Graph(np.random.default_rng(seed))
    # 0.0006: of values around 60 it makes values around 1.
    x = graph.add("Relu", [graph.convolution("image", 3, 64, 7, 2, gain=0.0006)])
    x = graph.add(
        "MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1
    )
    channels = 64
    for blocks, planes, stride, dilation in zip(BLOCKS, PLANES, STRIDES, DILATIONS, strict=True):
        for k in range(blocks):
            x = graph.bottleneck(x, channels, planes, stride if k == 0 else 1, dilation)
            channels = 4 * planes
    parts = [graph.convolution(x, channels, 19, 3, dilation=d, gain=0.25) for d in BRANCHES]
    total = parts[0]
    for part in parts[1:]:
        total = graph.add("Add", [total, part])
    graph.nodes[-1].output[0] = "scores"
    spec = ModelSpec(CITYSCAPES_19, *preset("caffe-bgr"), preset="caffe-bgr")
    _save(path, graph, spec, size, batch)
    return path


def _save(path: Path, graph: _Graph, spec: ModelSpec, size: Size | None, batch: int | None) -> None:
    n = batch or "N"
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [n, 3, *(size or ("H", "W"))])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [n, 19, "h", "w"])
    made = helper.make_graph(graph.nodes, "random_resnet101", [image], [scores], graph.weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, metadata(spec))
    onnx.save(model, path)
