"""The engine `torch`: checkpoints and exported programs end to end, and what it refuses."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from cada_deploy.training.models.small import SmallDeepLab  # noqa: E402
from command_line import cada, child_environment, deliverables  # noqa: E402
from foreign_models import fitted_colours, save_colour_model, street_like, write_images  # noqa: E402
from foreign_torch import save_colour_program  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from stand_in_device import LazyStream, StandInDevice, memory_at  # noqa: E402

from cada_deploy import device_arrays, engines  # noqa: E402
from cada_deploy.device import DeviceLost, OutOfDeviceMemory  # noqa: E402
from cada_deploy.device_arrays import DeviceArray  # noqa: E402
from cada_deploy.engines import torch as engine_torch  # noqa: E402
from cada_deploy.errors import ArtefactMismatch, EnvironmentLacks, UsageError  # noqa: E402
from cada_deploy.labels import read_label_png  # noqa: E402

SIZE = (48, 64)
COLOURS = fitted_colours([street_like(*SIZE, seed=k) for k in range(4)], 6)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 4, SIZE)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network as training/source.py saves it, with varied predictions."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        network = SmallDeepLab(19).train()
        for norm in (m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.momentum = 1.0
        pixels = np.stack([street_like(*SIZE, seed=k) for k in range(4)]).transpose(0, 3, 1, 2)
        network(torch.from_numpy((pixels / 255 - 0.45) / 0.225).float())
        for branch in network.classifier:
            branch.weight.mul_(12)
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.safetensors"
    save_file({f"model.{k}": v.contiguous() for k, v in network.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_colour_program(tmp_path_factory.mktemp("program") / "c.pt2", COLOURS, stride=1)


def pseudo_label(engine: str, model: Path, images: Path, out: Path, *more: str) -> dict[str, bytes]:
    ran = cada("pseudo-label", "--engine", engine, "--model", model, "--images", images,
               "--out", out, "--quiet", *more)  # fmt: skip
    assert ran.code == 0, ran.err
    return deliverables(out)


def labels(files: dict[str, bytes]) -> np.ndarray:
    return np.stack([read_label_png(v) for k, v in sorted(files.items()) if k.endswith(".png")])


def test_a_checkpoint_labels_as_its_export_does(
    checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript", reason="the extra `train` is not installed")
    made = cada("export", checkpoint, "-o", tmp_path / "m.onnx", "--images", images)
    assert made.code == 0, made.err
    ours = labels(pseudo_label("torch", checkpoint, images, tmp_path / "torch"))
    theirs = labels(pseudo_label("ort", tmp_path / "m.onnx", images, tmp_path / "ort"))
    assert len(np.unique(ours)) >= 5
    assert (ours != theirs).mean() <= 1e-3  # ties, and pixels that lie on a threshold


def test_labels_do_not_depend_on_workers_and_a_run_without_cache_runs_again(
    checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    one = pseudo_label("torch", checkpoint, images, tmp_path / "one", "--workers", "1")
    many = pseudo_label(
        "torch", checkpoint, images, tmp_path / "many", "--workers", "4", "--cache", "off"
    )
    assert one == many
    again = cada("select", tmp_path / "many", "--out", tmp_path / "again", "--quiet")
    assert again.code == 0, again.err
    assert labels(deliverables(tmp_path / "again")).tobytes() == labels(one).tobytes()


def test_a_program_labels_as_the_same_onnx_does(
    program: Path, images: Path, tmp_path: Path
) -> None:
    model = save_colour_model(tmp_path / "m.onnx", COLOURS, stride=1)
    preset = ("--preset", "imagenet-rgb")
    ours = labels(pseudo_label("torch", program, images, tmp_path / "torch", *preset))
    theirs = labels(pseudo_label("ort", model, images, tmp_path / "ort", *preset))
    assert (ours != theirs).mean() <= 1e-3 and len(np.unique(ours)) >= 5


def test_a_program_of_fixed_size_says_so(tmp_path: Path) -> None:
    path = save_colour_program(tmp_path / "f.pt2", COLOURS, size=(32, 40), batch=2)
    model = engines.load_model("torch", path, preset="imagenet-rgb")
    assert model.spec.input.size == (32, 40) and model.batch == 2
    engine = engines.open_engine("torch", model, "cpu")
    row = np.zeros((1, 3, 32, 40), np.float32)
    assert engine.infer(row).array.shape == (1, 6, 4, 5)
    with pytest.raises(ArtefactMismatch, match="failed on an input of shape"):
        engine.infer(np.zeros((1, 3, 40, 40), np.float32))


def test_what_says_nothing_of_its_preprocessing_is_refused(program: Path) -> None:
    with pytest.raises(UsageError, match="never guesses"):
        engines.load_model("torch", program)
    with pytest.raises(UsageError, match="give one of them"):
        engines.load_model("torch", program, preset="bdl", spec_file=Path("x.toml"))


def test_a_program_that_trains_is_refused(tmp_path: Path) -> None:
    path = save_colour_program(tmp_path / "t.pt2", COLOURS, training=True)
    with pytest.raises(ArtefactMismatch, match="exported in training mode"):
        engines.load_model("torch", path, preset="imagenet-rgb")


def _rewritten(program: Path, out: Path, change: str) -> Path:
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if change == "pickle" and name.endswith("_weights_config.json"):
                config = json.loads(content)
                for entry in config["config"].values():
                    entry["use_pickle"] = True
                content = json.dumps(config).encode()
            new.writestr(name, content)
        if change == "object":
            new.writestr("archive/data/constants/opaque_obj_0", b"cos\nsystem\n")
    return out


@pytest.mark.parametrize("change", ["pickle", "object"])
def test_a_program_with_python_objects_in_it_is_refused_unread(
    change: str, program: Path, tmp_path: Path
) -> None:
    path = _rewritten(program, tmp_path / "hostile.pt2", change)
    with pytest.raises(ArtefactMismatch, match=r"holds Python objects.*refused"):
        engines.load_model("torch", path, preset="imagenet-rgb")


@pytest.mark.parametrize("keep", [0, 10, 400, -1])
def test_a_program_cut_short_is_refused(keep: int, program: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt2"
    path.write_bytes(program.read_bytes()[:keep])
    with pytest.raises(ArtefactMismatch, match=r"not an exported program|can load"):
        engines.load_model("torch", path, preset="imagenet-rgb")


def test_onnx_belongs_to_ort_and_checkpoints_to_torch(
    program: Path, tmp_path: Path, checkpoint: Path
) -> None:
    model = save_colour_model(tmp_path / "m.onnx", COLOURS)
    with pytest.raises(UsageError, match="--engine ort"):
        engines.load_model("torch", model, preset="imagenet-rgb")
    with pytest.raises(UsageError, match="--engine ort"):
        foreign = engines.load_model("ort", model, preset="imagenet-rgb")
        engines.open_engine("torch", foreign, "cpu")
    with pytest.raises(ArtefactMismatch):
        engines.load_model("ort", checkpoint, preset="imagenet-rgb")


@pytest.mark.parametrize(
    ("device", "kind", "said"),
    [("cuda:77", EnvironmentLacks, "finds"), ("gpu", UsageError, "cpu or cuda:N")],
)
def test_a_device_that_is_not_there(
    device: str, kind: type[Exception], said: str, program: Path
) -> None:
    model = engines.load_model("torch", program, preset="imagenet-rgb")
    with pytest.raises(kind, match=said):
        engines.open_engine("torch", model, device)


def test_a_missing_gpu_is_exit_3(program: Path, images: Path, tmp_path: Path) -> None:
    ran = cada("pseudo-label", "--engine", "torch", "--model", program, "--preset", "imagenet-rgb",
               "--images", images, "--out", tmp_path / "o", "--device", "cuda:77")  # fmt: skip
    assert ran.code == 3 and ran.said("--device cuda:77", "use --device cpu")


def test_without_torch_it_says_what_to_install(images: Path, tmp_path: Path) -> None:
    arguments = ["pseudo-label", "--engine", "torch", "--model", "x.pth", "--images", str(images),
                 "--out", str(tmp_path / "o")]  # fmt: skip
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"from cada_deploy.cli import main\nmain({arguments!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=child_environment(),
        check=False,
    )  # fmt: skip
    assert done.returncode == 3 and "pip install 'cada-deploy[train]'" in done.stderr


def test_a_row_is_the_networks_own_arithmetic(checkpoint: Path) -> None:
    """The engine adds nothing: the same bits as the network called by hand."""
    model = engines.load_model("torch", checkpoint)
    assert isinstance(model, engine_torch.TorchModel)
    engine = engines.open_engine("torch", model, "cpu")
    rows = np.random.Generator(np.random.PCG64(0)).normal(0, 1, (2, 3, 33, 41)).astype(np.float32)
    with torch.inference_mode():
        expected = [model.network(torch.from_numpy(rows[k : k + 1])).numpy() for k in range(2)]
    assert engine.infer(rows).array.tobytes() == np.concatenate(expected).tobytes()


# --- on a GPU: order and ownership, on a stand-in (PyTorch's own CUDA never runs here)


class OnProcessor:
    """What PyTorch does with a stream of ours, on the stand-in: at once, on the host's memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.handles: list[int] = []
        monkeypatch.setattr(torch.cuda, "ExternalStream", self.external)
        monkeypatch.setattr(torch.cuda, "stream", nullcontext)
        monkeypatch.setattr(torch, "as_tensor", self.tensor)

    def external(self, handle: int, device: str) -> int:
        self.handles.append(handle)
        borrowed = StandInDevice().borrowed_stream(handle)
        borrowed.synchronize()  # what is before it on the stream is done
        return handle

    def tensor(self, array: DeviceArray, device: str) -> torch.Tensor:
        values = memory_at(array.address, array.nbytes).view(array.dtype)
        return torch.from_numpy(values.reshape(array.shape))


def on_gpu(program: Path) -> tuple[StandInDevice, engine_torch.PyTorchOnCuda, np.ndarray]:
    model = engines.load_model("torch", program, preset="imagenet-rgb")
    assert isinstance(model, engine_torch.TorchModel) and model.declared_classes
    gpu = StandInDevice()
    engine = engine_torch.PyTorchOnCuda(
        model.network, model, model.declared_classes, "cpu", gpu=gpu
    )
    rows = np.random.default_rng(0).normal(size=(3, 3, *SIZE)).astype(np.float32)
    return gpu, engine, rows


def uploaded(gpu: StandInDevice, rows: np.ndarray, stream: LazyStream) -> tuple[DeviceArray, Any]:
    staged = gpu.pinned(rows.nbytes)
    assert staged.host is not None
    staged.host[:] = rows.reshape(-1).view(np.uint8)
    image = device_arrays.empty(gpu, rows.shape, rows.dtype)  # type: ignore[arg-type]
    gpu.copy(image.address, staged.address, rows.nbytes, stream)
    return image, staged


def test_scores_on_a_gpu_are_ordered_by_our_stream_and_own_their_memory(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, engine, rows = on_gpu(program)
    assert isinstance(engine, engines.DeviceEngine)
    expected = engine.infer(rows).array
    pytorch, stream = OnProcessor(monkeypatch), gpu.stream()
    image, staged = uploaded(gpu, rows, stream)
    scores = engine.infer_on(image, stream)
    assert pytorch.handles == [stream.handle] and staged is not None
    assert scores.array.shape == expected.shape and not scores.ready.done
    found = np.ctypeslib.as_array(
        ctypes.cast(scores.array.address, ctypes.POINTER(ctypes.c_float)), (expected.size,)
    )
    assert np.array_equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), OutOfDeviceMemory, "lower --size"),
        (RuntimeError("CUDA error: an illegal memory access"), DeviceLost, "any more"),
        (RuntimeError("The size of tensor a (3) must"), ArtefactMismatch, "give --size HxW"),
    ],
    ids=["memory", "lost", "sizes"],
)
def test_what_goes_wrong_on_a_gpu_has_its_kind(
    program: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[Exception],
    words: str,
) -> None:
    gpu, engine, rows = on_gpu(program)
    OnProcessor(monkeypatch)

    def fails(_: object) -> None:
        raise error

    stream = gpu.stream()
    image, staged = uploaded(gpu, rows, stream)
    with pytest.raises(kind, match=words):
        replace(engine, network=fails).infer_on(image, stream)
    assert staged is not None
