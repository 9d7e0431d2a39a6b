"""The gates find planted faults in any engine, and what they cannot tell counts as failed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_models import street_like, write_images
from planted_faults import BY_GATE, broken

from cada_deploy import engine_gates, presets
from cada_deploy.classes import anonymous
from cada_deploy.engine_gates import built_precisions, examine, known_faults
from cada_deploy.engine_plans import Machine, Profile
from cada_deploy.errors import CheckFailed, RunFailed, UsageError
from cada_deploy.model_spec import ModelSpec
from cada_deploy.scores import Scores

COLOURS = np.random.Generator(np.random.PCG64(1)).normal(0, 8, (4, 3)).astype(np.float32)
FLOAT = json.dumps({"Layers": [{"Outputs": [{"Format/Datatype": "Float"}]}]})
MACHINE = Machine("10.16.1.11", "13.0", "", "A GPU", (8, 7))


def right(rows: np.ndarray) -> np.ndarray:
    """(N, 3, H, W) -> (N, 4, H, W), row by row."""
    return np.stack([np.einsum("kc,chw->khw", COLOURS, row) for row in rows])


@dataclass
class Planted:
    """An engine in NumPy with a fault."""

    fault: str = ""
    name: str = "planted"
    version: str = "1.0"
    device: str = "cpu"
    classes: int = 4
    change: Callable[[np.ndarray], np.ndarray] = lambda scores: scores
    runs: int = 0

    def infer(self, batch: np.ndarray) -> Scores:
        self.runs += 1
        return Scores(self.change(broken(right(batch), batch, self.fault, self.runs)))


def spec() -> ModelSpec:
    image, scores = presets.preset("imagenet-rgb")
    return ModelSpec(classes=anonymous(4), input=image, output=scores, preset="imagenet-rgb")


def frames() -> list[np.ndarray]:
    profile = Profile((16, 24), (24, 32), (32, 40), 2)
    seen = engine_gates.Frames(tuple(street_like(40, 48, k) for k in range(3)), "three")
    return engine_gates.batches(seen, spec(), profile)


def failed(engine: Any, precision: str = "float32", inspected: str = FLOAT) -> dict[str, str]:
    gates = examine(engine, Planted(), frames(), precision, inspected)
    return {gate.name: gate.found for gate in gates if not gate.passed}


def test_a_right_engine_passes_every_gate() -> None:
    gates = examine(Planted(), Planted(), frames(), "float32", FLOAT)
    assert [g.name for g in gates] == [
        "precision", "parity", "neighbours", "order", "repeat", "nan",
    ]  # fmt: skip
    assert all(g.passed for g in gates), gates
    engine_gates.require(gates, "the engine")


@pytest.mark.parametrize("fault", sorted(set(BY_GATE) - {"wide"}))
def test_every_planted_fault_is_found_by_its_gate(fault: str) -> None:
    assert BY_GATE[fault] in failed(Planted(fault))


def test_tensorrt_4853_is_told_with_its_figures() -> None:
    """Rows after the first of a batch are of another function; the first is right."""
    engine = Planted("batch")
    gates = examine(engine, Planted(), frames(), "float32", FLOAT)
    with pytest.raises(CheckFailed) as caught:
        engine_gates.require(gates, "the engine of m.onnx", known_faults(MACHINE))
    text = str(caught.value)
    assert "parity" in text and "of the labels are ONNX Runtime's" in text
    assert "NVIDIA/TensorRT/issues/4853" in text and "--engine ort" in text


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_fail_parity(value: float) -> None:
    def change(scores: np.ndarray) -> np.ndarray:
        scores[0, 0, 0, 0] = value
        return scores

    assert "not finite" in failed(Planted(change=change))["parity"]


def test_another_shape_fails_parity() -> None:
    assert "shape" in failed(Planted(change=lambda s: s[:, :3]))["parity"]


def test_a_small_error_everywhere_fails_float32_and_passes_float16() -> None:
    def half(scores: np.ndarray) -> np.ndarray:
        return scores.astype(np.float16).astype(np.float32)

    inspected = FLOAT.replace("Float", "Half")
    assert not failed(Planted(change=half), "float16", inspected)
    assert "parity" in failed(Planted(change=lambda s: s * np.float32(1.01)))


def test_nan_in_the_figures_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = np.full((1, 1, 1, 1), np.nan)
    monkeypatch.setattr(engine_gates, "_probabilities", lambda s, m: nowhere)
    assert "parity" in failed(Planted())


def test_an_engine_that_cannot_run_has_not_passed() -> None:
    def change(scores: np.ndarray) -> np.ndarray:
        raise RunFailed("lost")

    found = failed(Planted(change=change))
    assert set(found) == {"parity", "neighbours", "order", "repeat", "nan"}
    assert found["order"] == "not run: lost"


def test_swallowed_nan_is_told_and_passes() -> None:
    engine = Planted(change=lambda s: np.nan_to_num(s))
    gates = {g.name: g for g in examine(engine, Planted(), frames(), "float32", FLOAT)}
    assert gates["nan"].passed and "0% are NaN (ONNX Runtime: 100%)" in gates["nan"].found


def test_frames_are_all_different_and_more_than_a_batch() -> None:
    found = frames()
    assert [rows.shape for rows in found] == [(3, 3, 24, 32), (3, 3, 16, 24), (3, 3, 32, 40)]
    one = engine_gates.Frames((street_like(40, 48, 0),), "one")
    profile = Profile((24, 32), (24, 32), (24, 32), 5)
    (rows,) = engine_gates.batches(one, spec(), profile)
    assert len({row.tobytes() for row in rows}) >= 4  # a picture has four orientations
    assert len(rows) == 6


def test_frames_come_from_a_folder_or_are_drawn_and_say_so(tmp_path: Path) -> None:
    write_images(tmp_path / "in", 9)
    some = engine_gates.chosen_frames(tmp_path / "in", (48, 64))
    assert len(some.images) == 4 and some.text.startswith("4 of 9 images of")
    drawn = engine_gates.chosen_frames(None, (48, 64))
    assert "drawn street scenes (no --images were given)" in drawn.text
    assert {image.shape for image in drawn.images} == {(48, 64, 3)}
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"\x89PNG")
    with pytest.raises(UsageError, match="none of 1 images can be read"):
        engine_gates.chosen_frames(tmp_path / "bad", (48, 64))


# --- what was built ----------------------------------------------------------------------------


def layers(*tensors: dict[str, str], **more: Any) -> str:
    each = [{"Name": f"l{k}", "Inputs": [], "Outputs": [t]} for k, t in enumerate(tensors)]
    return json.dumps({"Layers": each, **more})


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ({"Format/Datatype": "Half"}, "float16"),
        ({"Format/Datatype": "Row major linear FP16 format"}, "float16"),
        ({"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}, "float16"),
        ({"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}, "int8"),
        ({"Format/Datatype": "Float"}, "float32"),
        ({"Format/Datatype": "Row major linear FP32"}, "float32"),
        ({"Format/Datatype": "BFloat16"}, "bfloat16"),
        ({"Format/Datatype": "FP8"}, "float8"),
        ({"Format": "Row major linear", "Datatype": "Half"}, "float16"),  # 11
        ({"Format": "Row major linear FP32 format (kLINEAR)", "DataType": "Float"}, "float32"),
    ],
)
def test_the_inspector_is_read_in_both_spellings(tensor: dict[str, str], kind: str) -> None:
    for more in ({"Bindings": ["a", "b"]}, {"I/O Tensors": [{"Name": "a", "DataType": "Half"}]}):
        found = built_precisions(layers(tensor, **more))
        assert {k for k, count in found.items() if count} == {kind}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"Layers": ["conv1"]}', '{"Layers": 3}', '"x"', "null",
             '{"Layers": [{"Outputs": [{"Format/Datatype": "N/A"}]}]}'],
)  # fmt: skip
def test_an_inspector_that_does_not_say_fails(text: str) -> None:
    assert "does not say" in failed(Planted(), "float16", text)["precision"]


def test_a_graph_that_was_built_wider_or_narrower_fails() -> None:
    half, whole = {"Format/Datatype": "Half"}, {"Format/Datatype": "Float"}
    assert "built wider" in failed(Planted(), "float16", layers(whole))["precision"]
    assert "built wider" in failed(Planted(), "int8", layers(whole, half))["precision"]
    assert "the graph is float32" in failed(Planted(), "float32", layers(whole, half))["precision"]
    assert "precision" not in failed(Planted(), "float16", layers(whole, half))


@pytest.mark.parametrize(
    ("version", "capability", "sources"),
    [
        ("10.3.0", (8, 7), ()),
        ("10.11.0.33", (8, 9), ("4853",)),
        ("10.13.3.9", (11, 0), ("4853", "151")),
        ("10.13.3.9", (9, 0), ("4853",)),
        ("11.1.0.106", (9, 0), ("4853", "4813", "4846")),
        ("11.4.0.106", (9, 0), ()),
    ],
)
def test_known_faults_are_told_for_their_versions(
    version: str, capability: tuple[int, int], sources: tuple[str, ...]
) -> None:
    found = known_faults(Machine(version, "13.0", "", "A GPU", capability))
    assert len(found) == len(sources)
    assert all(any(s in text for text in found) for s in sources)
