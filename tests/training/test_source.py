"""The source trainer: small steps, exact resume, a loud NaN, and an export that equals PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from cada_deploy.training import export_small, source  # noqa: E402
from cada_deploy.training.models.small import SmallDeepLab  # noqa: E402
from click.testing import CliRunner  # noqa: E402

from cada_deploy import scenes  # noqa: E402
from cada_deploy.errors import ArtefactMismatch, CheckFailed, RunFailed, UsageError  # noqa: E402
from cada_deploy.model_spec import METADATA_KEY, ModelSpec  # noqa: E402

DEMO = Path(scenes.__file__).parent / "demo_model" / "scenes19.onnx"
RECIPE = source.Recipe(steps=4, batch=2, crop=(32, 48), warmup=2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def frames() -> source.Frames:
    return source.Frames.of(replace(scenes.SOURCE_TRAIN, count=3, size=(64, 128)))


def _tensors(training: source.Training) -> dict[str, torch.Tensor]:
    named = dict(training.model.state_dict())
    for name, parameter in training.model.named_parameters():
        for key, value in training.optimiser.state[parameter].items():
            named[f"{name}.{key}"] = value
    return named


def test_two_steps_change_the_network(frames: source.Frames) -> None:
    training = source.Training(RECIPE)
    before = {k: v.clone() for k, v in training.model.state_dict().items()}
    losses = [training.take_step(frames) for _ in range(2)]
    assert training.step == 2 and all(0 < loss < 10 for loss in losses)
    assert any((before[k] != v).any() for k, v in training.model.state_dict().items())


def test_a_few_steps_lower_the_loss(frames: source.Frames) -> None:
    training = source.Training(replace(RECIPE, steps=30, warmup=3))
    losses = [training.take_step(frames) for _ in range(30)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_a_resumed_training_ends_in_the_same_bits(frames: source.Frames, tmp_path: Path) -> None:
    whole = source.Training(RECIPE)
    source.train(whole, frames, tmp_path / "whole")
    stopped = source.Training(RECIPE)
    for _ in range(2):
        stopped.take_step(frames)
    stopped.save(tmp_path / "parts")
    resumed = source.Training.load(tmp_path / "parts")
    assert resumed.step == 2 and resumed.recipe == RECIPE
    source.train(resumed, frames, tmp_path / "parts")
    expected, found = _tensors(whole), _tensors(resumed)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    for file in (source.CHECKPOINT, "checkpoint.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


def test_batches_depend_on_seed_and_step_alone(frames: source.Frames) -> None:
    image, truth = source.batch_at(3, frames, RECIPE)
    again, same = source.batch_at(3, frames, RECIPE)
    assert torch.equal(image, again) and torch.equal(truth, same)
    assert not torch.equal(image, source.batch_at(4, frames, RECIPE)[0])
    assert not torch.equal(image, source.batch_at(3, frames, replace(RECIPE, seed=2))[0])


def test_a_loss_that_is_not_a_number_stops_and_names_the_step(
    frames: source.Frames, tmp_path: Path
) -> None:
    training = source.Training(RECIPE)
    training.take_step(frames)
    training.save(tmp_path)
    saved = (tmp_path / source.CHECKPOINT).read_bytes()
    with torch.no_grad():
        training.model.classifier[0].bias[0] = float("nan")
    with pytest.raises(RunFailed, match=r"nan at step 1 of 4"):
        source.train(training, frames, tmp_path)
    assert (tmp_path / source.CHECKPOINT).read_bytes() == saved


def test_nonsense_is_refused(frames: source.Frames, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="steps"):
        replace(RECIPE, steps=0)
    with pytest.raises(UsageError, match="larger than the frames"):
        source.batch_at(0, frames, replace(RECIPE, crop=(65, 48)))
    (tmp_path / source.CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(ArtefactMismatch, match="not a checkpoint of this trainer"):
        source.Training.load(tmp_path)


def test_another_recipe_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    source.Training(RECIPE).save(tmp_path)
    with pytest.raises(ArtefactMismatch, match="holds another training"):
        source._started_or_resumed(tmp_path, replace(RECIPE, seed=9), fixed=True)
    kept = source._started_or_resumed(tmp_path, replace(RECIPE, steps=1), fixed=False)
    assert kept.recipe == RECIPE  # a plan made from minutes stands when it is resumed


def test_the_command_prints_its_budget_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = {"count": 2, "size": (64, 128)}
    for name in ("SOURCE_TRAIN", "SOURCE_VAL", "TARGET_DEMO"):
        monkeypatch.setattr(scenes, name, replace(getattr(scenes, name), **tiny))
    options = ["--out", str(tmp_path), "--steps", "2", "--batch", "1", "--crop", "32"]
    done = CliRunner().invoke(source.main, options)
    assert done.exit_code == 0, done.output
    assert done.output.index("budget: steps 0 to 2") < done.output.index("mIoU")
    refused = CliRunner().invoke(source.main, [*options, "--seed", "5"])
    assert refused.exit_code == 4 and "holds another training" in refused.output
    out = tmp_path / "model.onnx"
    written = CliRunner().invoke(export_small.main, [str(tmp_path), "-o", str(out)])
    assert written.exit_code == 0, written.output
    assert _spec(onnx.load(out)).provenance["steps"] == 2


def _spec(model: onnx.ModelProto) -> ModelSpec:
    return ModelSpec.loads({p.key: p.value for p in model.metadata_props}[METADATA_KEY])


def _network_with_lived_in_norms() -> SmallDeepLab:
    """Fresh batch norms are identities: folding them wrongly would go unseen."""
    torch.manual_seed(3)
    network = SmallDeepLab().train()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
        for _ in range(3):
            network(torch.randn(2, 3, 64, 64))
    return network.eval()


def test_the_export_equals_pytorch_on_sizes_it_was_not_traced_with(tmp_path: Path) -> None:
    network = _network_with_lived_in_norms()
    error = export_small.export(network, tmp_path / "m.onnx", {"trainer": "test"})
    assert error <= export_small.TOLERANCE
    model = onnx.load(tmp_path / "m.onnx")
    assert not {n.op_type for n in model.graph.node} & {"BatchNormalization", "Dropout"}
    again = export_small.parity_error(
        network, model.SerializeToString(), [(3, 9, 17), (1, 128, 40), (2, 72, 72)]
    )
    assert again <= export_small.TOLERANCE


def test_an_export_that_differs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_small, "parity_error", lambda *_: float("nan"))
    with pytest.raises(CheckFailed, match="was not written"):
        export_small.export(SmallDeepLab(), tmp_path / "m.onnx", {})
    assert not list(tmp_path.iterdir())


def test_the_shipped_demo_model_is_what_its_spec_says() -> None:
    assert DEMO.stat().st_size <= 2_000_000
    model = onnx.load(DEMO)
    onnx.checker.check_model(model, full_check=True)
    spec = _spec(model)
    assert spec.weights_sha256 == export_small.weights_sha256(model)
    assert spec.preset == "imagenet-rgb" and spec.output.stride == 8 and spec.input.size is None
    assert spec.provenance["sets"] == {
        s.name: s.sha256 for s in (scenes.SOURCE_TRAIN, scenes.SOURCE_VAL, scenes.TARGET_DEMO)
    }


def test_the_shipped_demo_model_knows_a_street_by_day_better_than_at_dusk() -> None:
    session = onnxruntime.InferenceSession(DEMO, providers=["CPUExecutionProvider"])

    def agreement(style: str) -> float:
        right = []
        for image, truth in replace(scenes.SOURCE_VAL, style=style, count=4):
            scores = session.run(["scores"], {"image": source.network_input(image[None]).numpy()})[
                0
            ]
            right.append((scores[0].argmax(0) == truth[4::8, 4::8]).mean())
        return float(np.mean(right))

    day, dusk = agreement(scenes.SOURCE), agreement(scenes.TARGET)
    assert day > 0.85, day
    assert dusk < day, (day, dusk)
