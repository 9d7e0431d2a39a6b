# ruff: noqa: E402 - torch may be missing, which is found out first
"""Self-training through the product, the tables, and the command line, on scenes of seconds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from cada_deploy.training import ablation, cli, self_training
from cada_deploy.training.ablation import Arms, Row
from cada_deploy.training.stages import Data, evaluate

from cada_deploy.errors import UsageError

from .tiny import TABLE, recipe, work


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all: what is trained once is found again."""
    return tmp_path_factory.mktemp("runs")


def arms(place: Path) -> Arms:
    return Arms(recipe(), Data.of(recipe()), work(place))


def test_pseudo_labels_are_the_products_own(place: Path) -> None:
    given, data = recipe(), Data.of(recipe())
    trained = arms(place).adapted()
    found = self_training.label(given, trained, data.target, work(place), given.self_training)
    run = json.loads((found.run / "run.json").read_text())
    assert run["status"] == "done" and run["results"]["labelled"] == len(data.target)
    assert run["settings"]["policy"] == "category-adaptive"
    sample = found[1]
    assert sample.labels is not None and sample.labels.shape == sample.image.shape[:2]
    assert np.array_equal(sample.image, data.target[1].image)
    matrix = self_training.quality(found, data.evaluation)
    total = sum(int((found[k].labels != 255).sum()) for k in range(len(found)))
    assert matrix.counts[:, :-1].sum() == total, "every pixel of a scene has a truth"
    assert found.fingerprint() == self_training.PseudoLabelled(data.target, found.run).fingerprint()
    again = self_training.label(given, trained, data.target, work(place), given.self_training)
    assert again.run == found.run


def test_soft_weights_are_the_confidences(place: Path) -> None:
    given = recipe()
    chosen = replace(given.self_training, soft_weights=True)
    trained, data = arms(place).adapted(), Data.of(given)
    found = self_training.label(given, trained, data.target, work(place), chosen)
    weights = found[0].weights
    assert weights is not None and weights.dtype == np.float32
    assert weights.min() >= 0.05 and weights.max() <= 1


def test_the_fixed_threshold_has_the_same_coverage(place: Path) -> None:
    given, data, trained = recipe(), Data.of(recipe()), arms(place).adapted()
    own = self_training.label(given, trained, data.target, work(place), given.self_training)
    chosen = replace(given.self_training, policy="fixed")
    fixed = self_training.label(given, trained, data.target, work(place), chosen)
    assert fixed.run != own.run
    kept = [self_training._selected(f.run) for f in (own, fixed)]
    pixels = len(data.target) * 64 * 96
    assert abs(kept[0] - kept[1]) <= 0.02 * pixels


def test_every_arm_gives_a_row_and_a_second_run_none_anew(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ablation.run(recipe(), [1], ["2", "3"], work(place))
    names = [row.arm for row in rows]
    assert names[:2] == ["source only", "source only, target statistics"]
    assert {"original + adv + SSL twice", "fixed threshold, SSL once", "style: Gram matrix",
            "target labels"} <= set(names)  # fmt: skip
    assert len(names) == len(set(names))
    twice = next(row for row in rows if row.arm == "original + adv + SSL twice")
    assert set(twice.more) >= {"coverage", "precision"}
    monkeypatch.setattr(Arms, "_stage", None)
    assert ablation.run(recipe(), [1], ["2", "3"], work(place)) == rows
    with pytest.raises(UsageError, match="expected 2, 3"):
        ablation.run(recipe(), [1], ["4"], work(place))


def test_rows_are_what_evaluate_says(place: Path) -> None:
    given = recipe()
    (row,) = [r for r in ablation.read_rows(place) if r.arm == "source only"]
    matrix = evaluate(given, place / row.model, Data.of(given).evaluation)
    known = matrix.labelled > 0
    assert row.mean_iou == pytest.approx(np.mean(matrix.iou[known]))


def test_two_folds_judge_each_other() -> None:
    given = recipe(upper_bound={**TABLE["evaluation"]})
    assert len(Data.of(given).upper_bounds) == 1
    with pytest.raises(UsageError, match="folds is 3"):
        Data.of(recipe(upper_bound={**TABLE["evaluation"], "folds": 3}))
    with pytest.raises(UsageError, match="'fold'"):
        Data.of(recipe(upper_bound={**TABLE["evaluation"], "folds": 2}))


def test_tables_and_intervals() -> None:
    def row(arm: str, seed: int, value: float) -> Row:
        return Row(arm, seed, value, {"road": value, "sky": 1.0}, "m", {})

    rows = [row("source only", s, v) for s, v in ((1, 0.2), (2, 0.3), (3, 0.25))]
    rows += [row("original + adv", s, v) for s, v in ((1, 0.35), (2, 0.35), (3, 0.35))]
    rows += [row("target labels", 1, 0.45)]
    lines = {line.arm: line for line in ablation.summary(rows)}
    assert lines["source only"].mean == pytest.approx(25)
    assert lines["source only"].half == pytest.approx(4.303 * 5 / math.sqrt(3))
    assert lines["original + adv"].gap == pytest.approx(0.5)
    assert lines["original + adv"].half == 0 and lines["original + adv"].paper == 45.5
    text = ablation.markdown(list(lines.values()))
    assert "| original + adv | 35.0 ± 0.0 (3) | 50 % | 45.5 |" in text
    assert "one seed" in text
    assert ablation.comma_separated(rows).splitlines()[:2] == [
        "arm,seed,mIoU,road,sky", "source only,1,20.00,20.00,100.00",
    ]  # fmt: skip
    picture = ablation.plot(list(lines.values()))
    assert picture.count("<rect") == 1 + 3 and picture.count("<circle") == 1
    from xml.etree import ElementTree

    ElementTree.fromstring(picture)


# --- the command line


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The tiny recipe as TOML."""

    def toml(value: object) -> str:
        if isinstance(value, dict):
            return "{ " + ", ".join(f'"{k}" = {toml(v)}' for k, v in value.items()) + " }"
        return json.dumps(value)

    path = tmp_path / "tiny.toml"
    path.write_text("".join(f"{key} = {toml(value)}\n" for key, value in TABLE.items()))
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main([str(a) for a in arguments])
        raise SystemExit(0)
    return int(left.value.code or 0)


def test_commands_go_from_source_to_tables(
    file: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ("--recipe", file, "--out", place, "--threads", 1, "--quiet")
    for command in ("source", "adapt", "self-train"):
        assert run(command, *shared) == 0
        model = Path(capsys.readouterr().out.strip())
        assert model.exists()
    assert run("evaluate", model, *shared) == 0
    assert "mean" in capsys.readouterr().out
    assert run("ablation", *shared, "--seeds", "1", "--tables", "2",
               "--export", tmp_path / "models") == 0  # fmt: skip
    assert "| source only |" in capsys.readouterr().out
    for name in ("table.md", "table.csv", "table.svg"):
        assert (place / name).stat().st_size > 100
    for name in ("best.onnx", "source-only.onnx"):
        assert (tmp_path / "models" / name).stat().st_size < 20e6


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("source", "--recipe", "nothing", "--out", "x"), 2, "no recipe is called"),
        (("ablation", "--recipe", "scenes", "--out", "x", "--seeds", "one"), 2, "is no number"),
        (("source", "--out", "x"), 2, "--recipe"),
        (("frobnicate",), 2, "No such command"),
    ],
    ids=str,
)
def test_mistakes_are_told(
    arguments: tuple[str, ...],
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == code
    assert words in capsys.readouterr().err
