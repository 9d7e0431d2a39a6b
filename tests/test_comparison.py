"""compare: its figures are those of a plain count, its gates hold, its page shows what differs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import Ran, cada
from foreign_models import fitted_colours, save_colour_model, street_like, write_images
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from cada_deploy import comparison
from cada_deploy.comparison import Asked, Gates, changes, compare, margins_at
from cada_deploy.comparison_page import write_page
from cada_deploy.errors import RunFailed, UsageError
from cada_deploy.fused import reference
from cada_deploy.labels import read_label_png
from cada_deploy.policies.fixed import every_class
from cada_deploy.scores import EncodedScores, Upsampling
from cada_deploy.selection import Selecting

COUNT, SIZE = 5, (48, 64)
PICTURES = [street_like(*SIZE, seed=k) for k in range(COUNT)]
COLOURS = fitted_colours(PICTURES, 6)
PRESET = ("--preset", "imagenet-rgb")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, COUNT, SIZE)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """a; the same again; a little sharper; classes 1 and 2 swapped; other counts; NaN in places."""
    folder = tmp_path_factory.mktemp("models")
    swapped = COLOURS.copy()
    swapped[[1, 2]] = swapped[[2, 1]]
    return {
        "a": save_colour_model(folder / "a.onnx", COLOURS),
        "same": save_colour_model(folder / "same.onnx", COLOURS),
        "sharper": save_colour_model(folder / "sharper.onnx", COLOURS, sharpness=10.0),
        "moved": save_colour_model(folder / "moved.onnx", COLOURS + 0.1),
        "swapped": save_colour_model(folder / "swapped.onnx", swapped),
        "five": save_colour_model(folder / "five.onnx", COLOURS[:5]),
        "nan": save_colour_model(folder / "nan.onnx", COLOURS, poison=np.nan),
        "dead": dead(save_colour_model(folder / "dead.onnx", COLOURS)),
    }


def dead(path: Path) -> Path:
    """The model with NaN weights: it gives no finite score for any pixel."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(
            numpy_helper.from_array(
                np.full_like(numpy_helper.to_array(tensor), np.nan), tensor.name
            )
        )
    onnx.save(model, path)
    return path


def run(a: Path, b: Path, images: Path, *more: Any) -> Ran:
    return cada("compare", a, b, "--images", images, *PRESET, "--quiet", *more)


def figures(a: Path, b: Path, images: Path, *more: Any) -> dict[str, Any]:
    ran = run(a, b, images, "--json", *more)
    assert ran.code == 0, ran.err
    found: dict[str, Any] = json.loads(ran.out)
    return found


def test_a_model_equals_itself(models: dict[str, Path], images: Path) -> None:
    found = figures(models["a"], models["same"], images, "--min-agreement", 1, "--max-margin", 0,
                    "--max-entropy-error", 0, "--max-selected-loss", 0)  # fmt: skip
    assert found["agreement"] == 1 and found["mean_iou"] == 1
    assert found["disagreements"] == 0 and found["margins"]["count"] == 0
    assert found["images"] == COUNT and found["pixels"] == COUNT * SIZE[0] * SIZE[1]
    selected = sum(c["own_thresholds"]["selected"] for c in found["classes"].values())
    assert 0 < selected < found["pixels"]


def predicted(model: Path, images: Path, out: Path) -> np.ndarray:
    ran = cada("predict", "--model", model, "--images", images, "--out", out, *PRESET, "--quiet")
    assert ran.code == 0, ran.err
    return np.stack([read_label_png(p.read_bytes()) for p in sorted((out / "labels").iterdir())])


def selected(model: Path, images: Path, out: Path) -> np.ndarray:
    ran = cada("pseudo-label", "--model", model, "--images", images, "--out", out, *PRESET,
               "--quiet")  # fmt: skip
    assert ran.code == 0, ran.err
    return np.stack([read_label_png(p.read_bytes()) for p in sorted((out / "labels").iterdir())])


def test_figures_are_those_of_counting_the_label_files(
    models: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    """Full labels against `predict`, selected ones under own thresholds against `pseudo-label`."""
    a, b = models["a"], models["moved"]
    found = figures(a, b, images)
    of_a, of_b = (predicted(m, images, tmp_path / f"p{m.stem}") for m in (a, b))
    assert found["disagreements"] == int((of_a != of_b).sum()) > 0
    assert found["agreement"] == pytest.approx((of_a == of_b).mean())
    mine, theirs = (selected(m, images, tmp_path / f"s{m.stem}") for m in (a, b))
    for k, row in enumerate(found["classes"].values()):
        assert row["pixels"] == int((of_a == k).sum())
        both, either = (of_a == k) & (of_b == k), (of_a == k) | (of_b == k)
        assert row["iou"] == pytest.approx(both.sum() / either.sum())
        own, here = row["own_thresholds"], mine == k
        assert own["selected"] == int(here.sum())
        assert own["lost"] == int((here & (theirs == 255)).sum())
        assert own["gained"] == int(((mine == 255) & (theirs == k)).sum())
        assert own["relabelled"] == int((here & (theirs != 255) & (theirs != k)).sum())


def test_swapped_classes_are_relabelled(models: dict[str, Path], images: Path) -> None:
    found = figures(models["a"], models["swapped"], images)
    rows = list(found["classes"].values())
    assert [rows[k]["agreement"] for k in (0, 1, 2, 3)] == [1, 0, 0, 1]
    for k in (1, 2):
        own = rows[k]["own_thresholds"]
        assert own["relabelled"] == own["selected"] > 0 and own["loss"] == 1


def test_a_sharper_model_has_other_thresholds_and_the_same_labels(
    models: dict[str, Path], images: Path
) -> None:
    found = figures(models["a"], models["sharper"], images)
    assert found["agreement"] > 0.99 and found["entropy_error_nats"]["max"] > 0.01
    gained = sum(c["same_thresholds"]["gained"] for c in found["classes"].values())
    own = sum(c["own_thresholds"]["gained"] for c in found["classes"].values())
    assert gained > own, "under A's thresholds a sharper model selects more"


@pytest.mark.parametrize("order", ["logits", "probs"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_margins_are_those_of_the_reference_kernel(order: str, align_corners: bool) -> None:
    draw = np.random.Generator(np.random.PCG64(4))
    raw = draw.normal(0, 3, (1, 5, 7, 9)).astype(np.float32)
    kernel = reference.Kernel()
    scores = EncodedScores(kernel.encode(raw, "logits")[0], Upsampling(order, align_corners))
    size = (23, 31)
    rows, columns = (v.ravel() for v in np.indices(size))
    margin = margins_at(scores, size, rows, columns).reshape(size)
    chosen = kernel.select(scores, size, every_class(5, 0.0), confidence=True)
    assert chosen.confidence is not None
    # p1 - p2 lies between p1 - (1 - p1) and p1: exact for two classes, bounded for five.
    assert (margin <= chosen.confidence + 1e-6).all()
    assert (margin >= 2 * chosen.confidence - 1 - 1e-6).all()
    two = EncodedScores(kernel.encode(raw[:, :2], "logits")[0], scores.upsampling)
    chosen = kernel.select(two, size, every_class(2, 0.0), confidence=True)
    assert chosen.confidence is not None
    margin = margins_at(two, size, rows, columns).reshape(size)
    assert np.abs(margin - (2 * chosen.confidence - 1)).max() <= 1e-6


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=60))
def test_changes_add_up(pairs: list[tuple[int, int]]) -> None:
    byte = {3: 255}  # 3 stands for "not selected"
    table = np.zeros((256, 256), np.int64)
    for a, b in pairs:
        table[byte.get(a, a), byte.get(b, b)] += 1
    made = changes(table, 3)
    for k, change in enumerate(made):
        assert change.selected == change.kept + change.lost + change.relabelled
        assert change.selected == sum(a == k for a, _ in pairs)
        assert change.gained == sum(a == 3 and b == k for a, b in pairs)
        assert 0 <= change.loss <= 1


# --- gates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "value", "said"),
    [
        ("--min-agreement", 0.9999, "the labels agree in 0."),
        ("--max-entropy-error", 0.001, "entropies differ by"),
        ("--max-selected-loss", 0.01, "with its own thresholds B loses"),
        ("--max-margin", 0.001, "two best classes are"),
    ],
)
def test_a_gate_that_does_not_hold_is_exit_5_and_named(
    gate: str, value: float, said: str, models: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    ran = run(models["a"], models["moved"], images, gate, value, "--out", page)
    assert ran.code == 5 and ran.said("differ too much", gate, said)
    assert "Gates that do not hold" in page.read_text(encoding="utf-8")
    assert "mean IoU" in ran.out, "the figures are shown all the same"
    loose = 0 if gate == "--min-agreement" else 1
    assert run(models["a"], models["moved"], images, gate, loose if "entropy" not in gate else 9,
               ).code == 0  # fmt: skip


def test_nan_fails_every_gate(models: dict[str, Path], images: Path) -> None:
    found = compare(asked(models["a"], models["same"], images))
    broken = replace(
        found, disagreements=0, pixels=0, entropy_error_max=float("nan"),
        margins=comparison.Margins(1, 0, float("nan"), None),
    )  # fmt: skip
    failures = Gates(0.5, 1.0, None, 1.0).failures(broken)
    assert len(failures) == 3


def asked(a: Path, b: Path, images: Path, **more: Any) -> Asked:
    return Asked(a, b, images, preset="imagenet-rgb", quiet=True, **more)


def test_scores_that_are_finite_on_one_side_only_fail_a_gate_and_are_never_agreement(
    models: dict[str, Path], images: Path
) -> None:
    """In places: those pixels disagree. Everywhere: nothing can be compared."""
    found = figures(models["a"], models["nan"], images)
    assert found["agreement"] < 1
    ran = run(models["a"], models["dead"], images)
    assert ran.code == 1 and ran.said(f"none of {COUNT} images could be compared")


def test_another_class_set_is_exit_4(models: dict[str, Path], images: Path) -> None:
    ran = run(models["a"], models["five"], images)
    assert ran.code == 4 and ran.said("labels 6 classes", "labels 5")


def test_usage(models: dict[str, Path], images: Path, tmp_path: Path) -> None:
    ran = cada("compare", models["a"], models["same"], "--images", images)
    assert ran.code == 2 and ran.said("never guesses")
    ran = run(models["a"], models["same"], images, "--scope", "image")
    assert ran.code == 2 and ran.said("--scope dataset")
    odd = tmp_path / "model.bin"
    odd.write_bytes(b"x")
    ran = run(models["a"], odd, images)
    assert ran.code == 2 and ran.said("which model is it?", ".onnx")
    with pytest.raises(UsageError, match="give one of them"):
        Asked(odd, odd, images, preset="bdl", spec_file=odd)


def test_a_broken_image_is_left_out_and_said(
    models: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    write_images(folder, 2, SIZE)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    ran = run(models["a"], models["same"], folder)
    assert ran.code == 6 and "not compared: broken.png" in ran.out and "2 images" in ran.out
    for path in folder.iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(RunFailed, match="none of 3 images"):
        compare(asked(models["a"], models["same"], folder))


# --- the work -----------------------------------------------------------------------------------


def test_workers_and_limit(models: dict[str, Path], images: Path) -> None:
    a, b = models["a"], models["moved"]
    one = compare(asked(a, b, images, workers=1)).to_json()
    assert compare(asked(a, b, images, workers=3)).to_json() == one
    assert compare(asked(a, b, images, limit=2)).images == 2


def test_no_more_than_a_few_frames_are_held(
    models: dict[str, Path], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "MOST_PICTURES", 2)
    found = compare(asked(models["a"], models["moved"], images))
    assert len(found.pictures) == 2
    weights = [float(np.nansum(p.margin)) for p in found.pictures]
    assert weights == sorted(weights, reverse=True)


def test_policies_are_taken(models: dict[str, Path], images: Path) -> None:
    fixed = Selecting(policy="fixed", threshold=0.0)
    found = compare(asked(models["a"], models["moved"], images, selecting=fixed))
    assert sum(c.selected for c in found.own) == found.pixels, "every pixel is selected"
    assert found.own == found.same


def test_a_model_with_its_own_spec_keeps_it(
    models: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    """--preset is for the foreign one: A says BGR for itself, and would be wrong under B's."""
    from cada_deploy.model_files import load_model, metadata

    spec = load_model(models["a"], preset="imagenet-rgb").spec
    own = onnx.load(models["a"])
    onnx.helper.set_model_props(own, metadata(spec))
    onnx.save(own, tmp_path / "own.onnx")
    ran = cada("compare", tmp_path / "own.onnx", models["a"], "--images", images, "--preset",
               "caffe-bgr", "--json", "--quiet")  # fmt: skip
    found = json.loads(ran.out)
    assert found["a"]["preset"] == "imagenet-rgb" and found["b"]["preset"] == "caffe-bgr"
    assert found["agreement"] < 1


def test_the_page_is_one_file_that_asks_for_nothing(
    models: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    assert run(models["a"], models["moved"], images, "--out", page).code == 0
    text = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "<script" not in text
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert text.count("<figure>") == 4 * min(COUNT, comparison.MOST_PICTURES)
    for word in ("Difference", "Labels of A", "Labels of B", "B with A's thresholds"):
        assert word in text
    same = write_page(compare(asked(models["a"], models["same"], images)), [], False)
    assert "every label is the same" in same and "<figure>" not in same


def test_a_checkpoint_against_its_own_export(images: Path, tmp_path: Path) -> None:
    """Two kinds of file, two engines, one function."""
    pytest.importorskip("torch", reason="the extra `train` is not installed")
    from foreign_torch import save_colour_program

    program = save_colour_program(tmp_path / "c.pt2", COLOURS, stride=1)
    model = save_colour_model(tmp_path / "c.onnx", COLOURS, stride=1)
    found = figures(program, model, images, "--max-margin", 0.001, "--max-entropy-error", 0.02)
    assert found["a"]["engine"].startswith("torch") and found["b"]["engine"].startswith("ort")
    assert found["agreement"] >= 0.9999
