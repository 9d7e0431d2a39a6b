# ruff: noqa: E402 - torch may be missing, which is found out first
"""Recipes: read strictly, and every shipped one opens on miniature data."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from cada_deploy.training import ablation, recipes
from cada_deploy.training.losses import Weights
from cada_deploy.training.recipes import Recipe, read_recipe, recipe_from, to_json
from cada_deploy.training.schedules import PAPER, POLY_STEPS, DiscriminatorPlan
from cada_deploy.training.stages import Data, Workplace, evaluate

from cada_deploy.errors import UsageError

from . import miniature

LEAST = {
    "name": "least", "source": {"kind": "scenes"}, "target": {"kind": "scenes"},
    "evaluation": {"kind": "scenes"}, "validation": {"kind": "scenes"},
    "stages": {"source": {"steps": 3}},
}  # fmt: skip


def test_defaults_and_nested_values() -> None:
    recipe = recipe_from({**LEAST, "stages": {"adapt": {"steps": 2, "weights": {"style": 1}}}})
    assert isinstance(recipe, Recipe)
    assert recipe.stage("adapt").weights.style == 1.0
    assert recipe.stage("adapt").styles and recipe.stage("adapt").uses_target
    assert to_json(recipe)["stages"]["adapt"]["weights"]["style"] == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bacth": 2}, "unknown key 'bacth'.*did you mean 'batch'"),
        ({"augmentation": {"contarst": 0.1}}, "augmentation: unknown key 'contarst'.*'contrast'"),
        ({"stages": {"source": {"stepz": 3}}}, "stages.source: unknown key 'stepz'.*'steps'"),
        ({"stages": {"source": {}}}, "'steps' is missing"),
        ({"stages": {"source": {"steps": 0}}}, "at least 1"),
        ({"crop": [4, 4]}, "16 pixels"),
        ({"crop": [64]}, "crop is .*expected 2 values"),
        ({"crop": 64}, "crop is 64"),
        ({"batch": "4"}, "batch is '4'; expected int"),
        ({"batch": True}, "batch is True"),
        ({"batch": 0}, "at least 1"),
        ({"source": 3}, "source is 3; expected a table"),
        ({"precision": "fp16"}, "precision is 'fp16'.*float16"),
        ({"network": {"kind": "smal"}}, "network.kind is 'smal'.*did you mean 'small'"),
        ({"network": {"output_stride": 8}}, "16 or 32"),
        ({"network": {"batch_norm": "frosen"}}, "did you mean 'frozen'"),
        ({"self_training": {"start": "here"}}, "self_training.start"),
        ({"stages": {"adapt": {"steps": 1, "style_kind": "gramm"}}}, "did you mean 'gram'"),
        ({"stages": {"adapt": {"steps": 1, "weights": {"style": -1}}}}, "from 0 up"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(change: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        recipe_from({**LEAST, **change})


def test_a_stage_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match="no stage 'adpt'"):
        recipe_from(LEAST).stage("adpt")


def test_files_and_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no recipe is called 'scene'.*did you mean 'scenes'"):
        read_recipe("scene")
    with pytest.raises(UsageError, match="no recipe at"):
        read_recipe(tmp_path / "nothing.toml")
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(UsageError, match="is not TOML"):
        read_recipe(tmp_path / "bad.toml")


@pytest.mark.parametrize("path", sorted(recipes.SHIPPED.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_whole(path: Path) -> None:
    recipe = read_recipe(path.stem, Path("somewhere"), seed=7)
    assert recipe.name == path.stem and recipe.seed == 7
    assert {"source", "adapt", "self-train"} <= set(recipe.stages)
    assert recipe.stage("self-train").weights.self_supervised > 0
    assert "{data}" not in str(to_json(recipe))


def test_the_papers_recipe_runs_on_miniature_data(tmp_path: Path) -> None:
    """GTA5 to Cityscapes with every number of the paper but sizes, steps and initial weights."""
    miniature.gta5(tmp_path / "gta5", 4)
    miniature.cityscapes(tmp_path / "cityscapes")
    shutil.copytree(tmp_path / "gta5" / "images", tmp_path / "gta5_translated")
    paper = read_recipe("gta5-to-cityscapes", tmp_path)
    assert paper.optimiser == replace(PAPER, poly_steps=paper.optimiser.poly_steps)
    assert paper.stage("adapt").weights == Weights(1.0, 1e-3, 1e-3, 0.0)
    assert {s.poly_steps for s in paper.stages.values()} == {POLY_STEPS}
    assert paper.discriminators == DiscriminatorPlan()
    assert (paper.network.output_stride, paper.network.output_shrink) == (16, 1)
    assert (paper.self_training.rounds, paper.self_training.start) == (2, "initial")
    small = replace(
        paper,
        network=replace(paper.network, weights=""),
        stages={name: replace(stage, steps=1) for name, stage in paper.stages.items()},
        crop=(48, 64), image_size=(48, 64), target_crop=(48, 64), target_image_size=(48, 64),
    )  # fmt: skip
    torch.set_num_threads(2)
    data = Data.of(small)
    assert len(data.target) and not data.target.labelled
    place = Workplace(tmp_path / "out", "cpu", True, print)
    adapted = ablation.Arms(small, data, place).adapted()
    assert adapted.model.stat().st_size > 100e6
    matrix = evaluate(small, adapted.model, data.evaluation)
    assert matrix.counts.sum() > 0
