"""Small ONNX models as other people export them, for tests: no spec inside, real predictions.

A `colour model` averages blocks of pixels and gives each class the score of its distance to a
colour, so its predictions are confident, varied and can be stated in a line of NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SHARPNESS = 8.0


def spread_colours(classes: int, seed: int = 0) -> np.ndarray:
    """(C, 3) colours in normalised units, spread over what street images hold."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.normal(0.0, 1.0, (classes, 3)).astype(np.float32)


def fitted_colours(images: Sequence[np.ndarray], classes: int, seed: int = 0) -> np.ndarray:
    """(C, 3) colours that occur in these RGB images, by a few rounds of k-means."""
    mean = np.array([0.485, 0.456, 0.406])
    std = np.array([0.229, 0.224, 0.225])
    pixels = np.concatenate([i[4::8, 4::8].reshape(-1, 3) for i in images]) / 255.0
    pixels = (pixels - mean) / std
    generator = np.random.Generator(np.random.PCG64(seed))
    centres = pixels[generator.choice(len(pixels), classes, replace=False)]
    for _ in range(8):
        owner = ((pixels[:, None] - centres[None]) ** 2).sum(-1).argmin(1)
        for k in range(classes):
            if (owner == k).any():
                centres[k] = pixels[owner == k].mean(0)
    return centres.astype(np.float32)


def linear_scores(
    colours: np.ndarray, sharpness: float = SHARPNESS
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (C, 3) and bias (C,) of  -sharpness * |x - colour|^2  without the common |x|^2."""
    weight = 2.0 * sharpness * colours
    bias = -sharpness * (colours**2).sum(1)
    return weight.astype(np.float32), bias.astype(np.float32)


def save_colour_model(
    path: Path,
    colours: np.ndarray,
    *,
    stride: int = 8,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    dtype: str = "float32",
    meaning: str = "logits",
    sharpness: float = SHARPNESS,
    output_rank: int = 4,
    poison: float | None = None,
) -> Path:
    """stride: block size and output stride (1 to 8). poison: a value (NaN) put into class 1
    wherever the red channel is above 2 (normalised)."""
    kind = TensorProto.FLOAT if dtype == "float32" else TensorProto.FLOAT16
    weight, bias = linear_scores(colours, sharpness)
    classes = len(colours)
    names = {
        "weight": weight.reshape(classes, 3, 1, 1).astype(dtype),
        "bias": bias.astype(dtype),
    }
    nodes = []
    current = "image"
    if stride > 1:
        nodes.append(
            helper.make_node(
                "AveragePool", [current], ["pooled"], kernel_shape=[stride, stride],
                strides=[stride, stride], ceil_mode=1,
            )
        )  # fmt: skip
        current = "pooled"
    nodes.append(helper.make_node("Conv", [current, "weight", "bias"], ["logits"]))
    last = "logits"
    if poison is not None:
        nodes += _poison_nodes(current, poison, classes, names, dtype)
        last = "poisoned"
    if meaning == "probabilities":
        nodes.append(helper.make_node("Softmax", [last], ["soft"], axis=1))
        last = "soft"
    if output_rank == 3:
        nodes.append(helper.make_node("ArgMax", [last], ["map"], axis=1, keepdims=0))
        last, kind_out = "map", TensorProto.INT64
    else:
        kind_out = kind
    height, width = size or ("H", "W")
    low = tuple(-(-v // stride) for v in size) if size else ("h", "w")
    n = batch or "N"
    shape = [n, classes, *low] if output_rank == 4 else [n, *low]
    graph = helper.make_graph(
        nodes,
        "colour-model",
        [helper.make_tensor_value_info("image", kind, [n, 3, height, width])],
        [helper.make_tensor_value_info(last, kind_out, shape)],
        [numpy_helper.from_array(v, k) for k, v in names.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def _poison_nodes(
    current: str, poison: float, classes: int, names: dict[str, np.ndarray], dtype: str
) -> list[onnx.NodeProto]:
    where = np.zeros((1, classes, 1, 1), bool)
    where[0, min(1, classes - 1)] = True
    names |= {
        "red": np.array([0], np.int64),
        "limit": np.array(2.0, dtype),
        "where": where,
        "poison": np.array(poison, dtype),
    }
    return [
        helper.make_node("Gather", [current, "red"], ["reds"], axis=1),
        helper.make_node("Greater", ["reds", "limit"], ["bright"]),
        helper.make_node("And", ["bright", "where"], ["struck"]),
        helper.make_node("Where", ["struck", "poison", "logits"], ["poisoned"]),
    ]


def street_like(height: int, width: int, seed: int) -> np.ndarray:
    """A smooth random RGB image (H, W, 3) uint8 with blobs of many colours."""
    import cv2

    generator = np.random.Generator(np.random.PCG64(seed))
    coarse = generator.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    noise = generator.integers(-8, 9, smooth.shape, np.int16)
    return np.clip(smooth.astype(np.int16) + noise, 0, 255).astype(np.uint8)


def write_images(folder: Path, count: int, size: tuple[int, int] = (48, 64)) -> list[Path]:
    """frame_00.png ... in `folder`."""
    import cv2

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(count):
        path = folder / f"frame_{k:03d}.png"
        ok, data = cv2.imencode(".png", street_like(*size, seed=k)[..., ::-1])
        assert ok
        path.write_bytes(data.tobytes())
        paths.append(path)
    return paths
