# ruff: noqa: E402 - torch may be missing, which is found out first
"""The trainer: every term reaches what it should, stopped equals uninterrupted, and it says why."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from cada_deploy.training import batches, run_files, stages
from cada_deploy.training.ablation import Arms
from cada_deploy.training.datasets import Sample, open_dataset
from cada_deploy.training.losses import Weights
from cada_deploy.training.networks import segmentation_network
from cada_deploy.training.recipes import Augmentation, NetworkChoice, Recipe, Stage
from cada_deploy.training.scalars import Scalars
from cada_deploy.training.stages import Data, Trained, load_model, run_stage
from cada_deploy.training.trainer import Domains, Trainer

from cada_deploy.classes import CITYSCAPES_19
from cada_deploy.errors import ArtefactMismatch, RunFailed, UsageError

from .tiny import data_of, recipe, work

ALL = Weights(1.0, 0.1, 0.1, 1.0)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def domains(given: Recipe) -> Domains:
    source, target = open_dataset(given.source), open_dataset(given.target)
    return Domains(source, target, open_dataset(given.evaluation))


def trainer(given: Recipe, stage: Stage) -> Trainer:
    network = segmentation_network(given.network, CITYSCAPES_19, given.seed)
    return Trainer(given, stage, domains(given), network)


def stepped(made: Trainer, count: int) -> list[dict[str, float]]:
    coming = made.batches()
    return [made.take_step(coming) for _ in range(count)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- what a step does


def test_every_term_is_there_and_every_part_moves() -> None:
    made = trainer(recipe(), Stage(3, ALL))
    before = {k: v.clone() for k, v in made.tensors().items() if not k.startswith("optimiser")}
    (seen,) = stepped(made, 1)
    assert set(seen) == {
        "segmentation",
        "output",
        "style",
        "self_supervised",
        "D output",
        "D style",
    }
    assert all(math.isfinite(v) and v > 0 for v in seen.values())
    after = made.tensors()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    parts = ["model.stem", "model.classifier", "discriminators.output"]
    for part in (*parts, "discriminators.style.0", "discriminators.style.1"):
        assert any(k.startswith(part) for k in moved), part


def test_a_weight_of_nothing_is_a_term_left_out() -> None:
    made = trainer(recipe(), Stage(3))
    (seen,) = stepped(made, 1)
    assert set(seen) == {"segmentation"} and not made.discriminators


@pytest.mark.parametrize("kind", ["gram", "mean-std"])
def test_the_other_style_terms_need_no_discriminator(kind: str) -> None:
    made = trainer(recipe(), Stage(3, Weights(1.0, 0.0, 1.0, 0.0), style_kind=kind))
    (seen,) = stepped(made, 1)
    assert set(seen) == {"segmentation", "style"} and not made.discriminators


def test_the_networks_loss_does_not_move_a_discriminator() -> None:
    """Their gradients are those of their own losses alone."""
    made = trainer(recipe(), Stage(3, ALL))
    given = next(made.batches())
    made.network.train()
    for optimiser in made.optimisers.values():
        optimiser.zero_grad()
    source = made._forward(given.source)
    assert given.target is not None
    target = made._forward(given.target)
    maps = [made._probabilities(s.scores, given.source) for s in (source, target)]
    with made._frozen_discriminators():
        made.discriminators["output"](maps[1]).mean().backward()
    assert all(p.grad is None for p in made.discriminators.parameters())
    assert all(p.requires_grad for p in made.discriminators.parameters())


def test_supervised_training_learns() -> None:
    seen = stepped(trainer(recipe(), Stage(40)), 40)
    first, last = (np.mean([s["segmentation"] for s in part]) for part in (seen[:5], seen[-5:]))
    assert last < 0.8 * first


def test_accumulated_batches_are_one_larger_step() -> None:
    """Without batch norm's own statistics, two batches of two are the gradient of their mean."""
    frozen = NetworkChoice(batch_norm="frozen")
    two = trainer(recipe(network=frozen, accumulate=2), Stage(2))
    stepped(two, 1)
    one = trainer(recipe(network=frozen), Stage(4))
    coming = one.batches()
    one.network.train()
    for _ in range(2):
        one._backward(next(coming))
    for a, b in zip(two.model.parameters(), one.model.parameters()):
        if b.grad is not None:
            assert torch.allclose(a.grad, b.grad / 2, rtol=1e-4, atol=1e-7)


def test_mixed_precision_runs_and_keeps_wide_weights() -> None:
    made = trainer(recipe(precision="bfloat16"), Stage(3, ALL))
    (seen,) = stepped(made, 1)
    assert all(math.isfinite(v) for v in seen.values())
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}


# --- what goes wrong


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    made = trainer(recipe(), Stage(3))
    with torch.no_grad():
        made.model.classifier[0].bias[0] = math.nan
    before = {k: v.clone() for k, v in made.model.named_parameters()}
    with pytest.raises(RunFailed, match=r"segmentation loss became nan at step 0 of 3.*learning"):
        stepped(made, 1)
    assert all(torch.equal(before[k], v) or k == "classifier.0.bias"
               for k, v in made.model.named_parameters())  # fmt: skip


def test_self_training_without_labels_is_refused() -> None:
    given = recipe()
    plain = Domains(open_dataset(given.source), open_dataset(given.target))
    network = segmentation_network(given.network, CITYSCAPES_19, 1)
    with pytest.raises(UsageError, match="label first"):
        Trainer(given, Stage(3, ALL), plain, network)


def test_a_crop_larger_than_the_frame_takes_all_of_it() -> None:
    made = trainer(recipe(crop=(128, 256)), Stage(1))
    batch = next(made.batches()).source
    assert batch.images.shape == (2, 3, 128, 256) and batch.labels.shape == (2, 128, 256)


# --- batches


def test_batches_are_functions_of_the_step() -> None:
    everything = Augmentation(
        scale=(0.7, 1.3), contrast=0.2, brightness=9.0, tint=0.1, gamma=(0.5, 2.0), grey=0.5,
        blur=0.5, noise=8.0,
    )  # fmt: skip
    given = recipe(augmentation=everything)
    one, other = (batches.Crops(open_dataset(given.source), given, 0) for _ in range(2))
    for step in (5, 0, 3):
        a, b = one.batch(step), other.batch(step)
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert not torch.equal(one.batch(1).images, one.batch(2).images)
    assert not torch.equal(one.batch(1, 0, 2).images, one.batch(1, 1, 2).images)


def test_labels_follow_the_image_and_keep_their_ids() -> None:
    """An image whose colour is its label, cropped, scaled and mirrored."""

    class Painted:
        kind, classes, labelled = "painted", CITYSCAPES_19, True

        def __len__(self) -> int:
            return 1

        def __getitem__(self, k: int) -> Sample:
            labels = np.repeat(np.arange(8, dtype=np.uint8), 8)[None].repeat(64, 0)
            image = (labels[..., None] * 30).repeat(3, 2)
            return Sample("a", image, labels, (labels / 8).astype(np.float32))

    given = recipe(crop=(32, 32), augmentation=Augmentation(scale=(1.0, 1.0)))
    for step in range(6):
        batch = batches.Crops(Painted(), given, 0).batch(step)  # type: ignore[arg-type]
        shown = batch.images[:, 0] * batches.STD[0] + batches.MEAN[0]
        assert torch.equal((shown * 255 / 30).round().long(), batch.labels)
        assert torch.allclose(batch.weights, batch.labels / 8)


def test_what_is_made_ahead_comes_in_order() -> None:
    assert list(batches.ahead(lambda k: k * k, 3, 40, workers=4)) == [k * k for k in range(3, 40)]


# --- stages


class Killed(Exception):
    pass


def test_stopped_and_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe()
    whole = run_stage(given, "adapt", data_of(given), work(tmp_path / "whole"))
    steps = Trainer.take_step

    def killed(self: Trainer, coming: Any) -> dict[str, float]:
        if self.step == 3:
            raise Killed
        return steps(self, coming)

    monkeypatch.setattr(Trainer, "take_step", killed)
    with pytest.raises(Killed):
        run_stage(given, "adapt", data_of(given), work(tmp_path / "stopped"))
    monkeypatch.undo()
    said: list[str] = []
    resumed = run_stage(given, "adapt", data_of(given), work(tmp_path / "stopped", said))
    assert "budget 4 steps of 2 crops of 32x64" in said[0]
    assert "resuming at step 2 of 4" in said[1]
    assert same(run_files.read(whole.model)[0], run_files.read(resumed.model)[0])
    assert not list((tmp_path / "stopped").rglob(run_files.STATE))


def test_curves_of_a_stopped_run_are_not_doubled(tmp_path: Path) -> None:
    first = Scalars(tmp_path)
    for step in (10, 20, 30):
        first.add(step, {"segmentation": float(step)})
    again = Scalars(tmp_path, 20)
    again.add(30, {"segmentation": 31.0})
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [(line["step"], line["segmentation"]) for line in lines] == [
        (10, 10.0), (20, 20.0), (30, 31.0),
    ]  # fmt: skip


def test_a_stage_that_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe()
    first = run_stage(given, "source", data_of(given), work(tmp_path))
    monkeypatch.setattr(Trainer, "take_step", None)
    assert run_stage(given, "source", data_of(given), work(tmp_path)).model == first.model
    monkeypatch.undo()
    others = [replace(given, seed=2), replace(given, batch=1)]
    models = {run_stage(o, "source", data_of(o), work(tmp_path)).model for o in others}
    assert len({first.model, *models}) == 3


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    given = recipe()
    trained = run_stage(given, "source", data_of(given), work(tmp_path))
    network = segmentation_network(NetworkChoice("deeplabv2-resnet101"), CITYSCAPES_19, 1)
    with pytest.raises(UsageError, match="another network"):
        load_model(network, trained.model)
    trained.model.write_bytes(trained.model.read_bytes()[:-9])
    with pytest.raises(ArtefactMismatch, match="damaged"):
        run_files.read(trained.model)
    other = run_files.StageFolder(trained.model.parent, "another key")
    with pytest.raises(ArtefactMismatch, match="holds another training"):
        other.facts()


def test_a_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_files.StageFolder(tmp_path / "stage", "key")
    folder.save_state({"a": torch.ones(3)}, 1, {})
    replaced = Path.replace

    def full(self: Path, target: Path) -> Path:
        if Path(target).name == run_files.STATE:
            raise OSError(28, "No space left on device")
        return replaced(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RunFailed, match="disk is full"):
        folder.save_state({"a": torch.zeros(3)}, 2, {})
    monkeypatch.undo()
    tensors, step = folder.state() or ({}, 0)
    assert step == 1 and torch.equal(tensors["a"], torch.ones(3))


# --- several processes

PROGRAM = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from cada_deploy.training import ablation, processes
from cada_deploy.training.stages import run_stage
from tiny import data_of, recipe, work
with processes.joined("cpu"):
    given = recipe()
    trained = run_stage(given, "adapt", data_of(given), work(Path(sys.argv[1])))
    rows = ablation.run(given, [1], ["2"], work(Path(sys.argv[1])))
    print(processes.rank(), trained.model)
"""


def test_two_processes_train_one_network(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root}:{Path(__file__).parent}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               str(tmp_path / "program.py"), str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert len({row["arm"] for row in rows}) == len(rows) >= 7, "each row once"
    (model,) = {Path(word) for word in done.stdout.split() if word.endswith(run_files.MODEL)}
    tensors, facts = run_files.read(model)
    assert facts["decides"]["processes"] == 2
    assert all(torch.isfinite(t.float()).all() for t in tensors.values())
    alone = run_stage(recipe(), "adapt", data_of(recipe()), work(tmp_path / "alone"))
    assert isinstance(alone, Trained)
    assert not same(run_files.read(alone.model)[0], tensors), "twice the crops, another network"


def test_the_best_snapshot_is_kept_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge likes step 2 best; so those weights are the stage's, also when it was stopped."""
    given = replace(recipe(), stages={"source": Stage(6, snapshot="best-source")})
    data = Data.of(given)
    learnt = Domains(data.source, data.target, judge=data.validation)
    seen: list[dict[str, torch.Tensor]] = []

    def judged(recipe: Recipe, network: Any, judge: Any, **_: Any) -> Any:
        assert judge is data.validation
        seen.append({k: v.clone() for k, v in network.module.state_dict().items()})
        return SimpleNamespace(mean_iou=[0.5, 0.2, 0.3][len(seen) - 1])

    monkeypatch.setattr(stages, "judged", judged)
    trained = run_stage(given, "source", learnt, work(tmp_path))
    assert len(seen) == 3
    assert trained.facts["snapshot"] == {"step": 2, "mean_iou": 0.5}
    tensors, _ = run_files.read(trained.model)
    assert all(torch.equal(tensors[f"model.{k}"], v) for k, v in seen[0].items())
    assert sorted(p.name for p in (trained.model.parent / "previews").iterdir()) == [
        "000002.png", "000004.png", "000006.png",
    ]  # fmt: skip


def test_choosing_by_target_labels_is_said_aloud(tmp_path: Path) -> None:
    given = replace(recipe(), stages={"source": Stage(2, snapshot="best-target")})
    said: list[str] = []
    Arms(given, Data.of(given), work(tmp_path, said)).source()
    assert any("WARNING" in text and "labels of the target" in text for text in said)
