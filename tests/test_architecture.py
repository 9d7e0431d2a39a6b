"""The shape of the code, held by a test: imports fall, libraries stay in their files, no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cada_deploy"

# Each row may import the rows below it and nothing else. `policies/*` means every file there.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["commands.*"],
    ["demo"],
    ["command_options", "predictor", "reporting", "comparison_page", "bench.session"],
    ["labelling", "doctor", "comparison", "bench.cuda"],
    ["selection", "run_record", "evaluation", "bench.*"],
    ["streaming", "disk_plan", "run_identity"],
    ["pipeline"],
    ["inference", "device_frames"],
    ["engines.*", "fused.*", "preprocess_cuda"],
    ["engine_builds", "engine_runs"],
    ["engine_gates", "engine_cache"],
    ["engines", "outputs", "report", "bench.frames"],
    ["device_arrays", "cubins"],
    ["device.*"],
    ["device.driver"],
    ["device.driver_start"],
    ["device"],
    ["report_page.sections", "engine_plans"],
    ["fused", "model_files", "ignored", "manifests", "preprocess", "report_page.findings"],
    ["policies.*", "presets", "plots", "labels", "metrics", "shards", "score_cache", "scenes"],
    ["bench.words"],
    ["bench.measuring"],
    ["report_page.contents", "model_spec"],
    ["policies", "statistics", "classes", "images", "durable"],
    ["image_files", "image_formats"],
    ["rejections", "scores", "stages", "progress", "commands", "schemas", "report_page"],
    ["dlpack"],
    ["errors", "report_page.words", "bench", "bench.power"],
]

# Third-party libraries, each in the files that carry its name or its work.
LIBRARIES = {
    "cuda": {"cubins", "device.cudacore"},
    "click": {"cli", "command_options", "commands.*"},
    "cv2": {"images", "labels", "preprocess", "scenes"},
    "google": {"model_files"},
    "numpy": None,  # everywhere
    "onnx": {"model_files"},
    "onnxruntime": {"engines.onnxrt", "doctor"},
    "PIL": {"images", "labels", "preprocess", "plots"},
    "pycuda": {"device.pycuda"},
    "pynvml": {"bench.power"},
    "rich": {"progress"},
    "safetensors": {"score_cache"},
    "tensorrt": {"engines.tensorrt"},
    "tomli": {"presets"},
    "torch": {"engines.torch"},
}

# The two doors from the runtime to PyTorch code: each opens only when it is asked for.
DOORS = {"commands.export", "engines.torch"}


def _modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix("__init__").removesuffix(".")] = path
    return found


MODULES = _modules()


def _matches(module: str, pattern: str) -> bool:
    if pattern.endswith(".*"):
        return module.startswith(pattern[:-1])
    return module == pattern


def _layer(module: str) -> int:
    rows = [k for k, row in enumerate(LAYERS) if any(_matches(module, p) for p in row)]
    exact = [k for k, row in enumerate(LAYERS) if module in row]
    assert rows, f"{module} stands in no row of LAYERS: decide where it belongs"
    return (exact or rows)[0]


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def _own(path: Path) -> set[str]:
    names = {n.removeprefix("cada_deploy.") for n in _imports(path) if n.startswith("cada_deploy.")}
    return names & MODULES.keys()


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m))
def test_imports_fall(module: str) -> None:
    # commands.export may import cada_deploy.training: the one door that the design leaves open.
    for imported in _own(MODULES[module]) - {module}:
        assert _layer(imported) > _layer(module), f"{module} imports {imported}, which is not below"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m))
def test_libraries_stay_in_their_files(module: str) -> None:
    for name in {n.partition(".")[0] for n in _imports(MODULES[module])}:
        if name in sys.stdlib_module_names or name in ("cada_deploy", ""):
            continue
        assert name in LIBRARIES, f"{module} imports {name}, which the runtime does not depend on"
        allowed = LIBRARIES[name]
        assert allowed is None or any(_matches(module, p) for p in allowed), (
            f"{module} imports {name}; only {sorted(allowed or ())} may"
        )


def test_training_is_reached_through_two_doors_inside_functions() -> None:
    for module, path in MODULES.items():
        top = ast.parse(path.read_text(encoding="utf-8")).body
        early = {
            node.module or ""
            for node in top
            if isinstance(node, ast.ImportFrom) and node.level == 0
        }
        late = {n for n in _imports(path) if n.startswith("cada_deploy.training")}
        assert not late or module in DOORS, f"{module} imports {sorted(late)}"
        assert not {n for n in early if n.startswith("cada_deploy.training")}, module


def test_the_table_names_no_ghosts() -> None:
    for pattern in (p for row in LAYERS for p in row):
        assert any(_matches(m, pattern) for m in MODULES), f"{pattern} is no module any more"


def test_labels_an_image_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    script = f"""
import sys
sys.modules["torch"] = None  # importing torch now raises ImportError
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from foreign_models import save_colour_model, spread_colours, write_images
tmp = Path({str(tmp_path)!r})
save_colour_model(tmp / "m.onnx", spread_colours(19))
write_images(tmp / "in", 1)
from cada_deploy.cli import main
main(["pseudo-label", "--model", str(tmp / "m.onnx"), "--preset", "imagenet-rgb",
      "--images", str(tmp / "in"), "--out", str(tmp / "out"), "--quiet"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "labels" / "frame_000.png").exists()


def test_no_pickle_in_the_runtime() -> None:
    for module, path in MODULES.items():
        imported = {n.partition(".")[0] for n in _imports(path)}
        assert not imported & {"pickle", "dill", "cloudpickle", "shelve", "marshal"}, module
        assert "allow_pickle=True" not in path.read_text(encoding="utf-8"), module
