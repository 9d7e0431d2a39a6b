"""Does a run on a GPU give what a run on the CPU gives, from image files to label files?

`cada-deploy pseudo-label` labels the demo's scenes on the CPU and on the GPU. Networks differ
between the two, so of the labels only the agreement is reported. What starts at the scores must not
differ: from the GPU run's own cached scores, the CPU kernel and the CUDA kernel must make the very
statistics that the run made on the device, and cut the very labels that it wrote. Engine `ort`
needs onnxruntime-gpu, engine `torch` a PyTorch with CUDA; each runs where it can. Exits 3 when
neither can and says why, 4 when bytes differ.

    python benchmarks/gpu_end_to_end.py [--device cuda:0] [--record]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import REPOSITORY, how_busy, record

from cada_deploy import durable, run_record
from cada_deploy.demo import DEMO_MODEL
from cada_deploy.device import open_device
from cada_deploy.errors import CadaError, EnvironmentLacks, RunFailed
from cada_deploy.fused import FusedKernel, cuda, native
from cada_deploy.labelling import cores
from cada_deploy.labels import read_label_png
from cada_deploy.manifests import RunFolder
from cada_deploy.model_spec import ModelSpec, Size
from cada_deploy.policies import Rule
from cada_deploy.scenes import SOURCE, TARGET_DEMO, scene, write_set
from cada_deploy.score_cache import read_scores
from cada_deploy.scores import EncodedScores, Upsampling
from cada_deploy.statistics import ClassStatistics, merged

NOT_HERE, WRONG = 3, 4  # exit codes
BATCH = 4

Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Subject:
    """A model for an engine, and how the command is told of it."""

    engine: str
    model: Path
    options: tuple[str, ...] = ()


def subjects(folder: Path) -> Iterator[Subject]:
    yield Subject("ort", DEMO_MODEL)
    try:
        yield Subject("torch", colour_program(folder / "colours.pt2"), ("--preset", "imagenet-rgb"))
    except ImportError as error:
        print(f"torch: not run: {error}")


def colour_program(path: Path) -> Path:
    """The tests' network of one layer: it knows colours, and any PyTorch can export it."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from foreign_models import fitted_colours
    from foreign_torch import save_colour_program

    images = [scene(50_000 + k, SOURCE, (128, 256)).image for k in range(4)]
    return save_colour_program(path, fitted_colours(images, 19))


def labelled(subject: Subject, device: str, images: Path, out: Path) -> None:
    """The command itself. Raises EnvironmentLacks, RunFailed."""
    done = subprocess.run(
        [
            sys.executable, "-m", "cada_deploy", "pseudo-label", "--engine", subject.engine,
            "--model", str(subject.model), *subject.options, "--images", str(images), "--out",
            str(out), "--device", device, "--batch-size", str(BATCH), "--cache", "on", "--quiet",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == NOT_HERE:
        raise EnvironmentLacks(done.stderr.strip())
    if done.returncode:
        raise RunFailed(f"{subject.engine} on {device}: exit {done.returncode}: {done.stderr}")


# --- what must be the same bytes ---------------------------------------------------------------


@dataclass(frozen=True)
class Cached:
    """One frame of a finished run: its scores, and the labels that were written."""

    scores: EncodedScores
    size: Size
    labels: Labels


@dataclass(frozen=True)
class Finished:
    """A finished run, read back from its files."""

    frames: tuple[Cached, ...]
    statistics: ClassStatistics
    rule: Rule
    wall_seconds: float

    @classmethod
    def read(cls, out: Path) -> Finished:
        folder, made = RunFolder(out), run_record.read(out)
        spec = ModelSpec.from_json(made["identity"]["spec"])
        upsampling = Upsampling(spec.output.order, spec.output.align_corners)
        thresholds = durable.read_json(out / "thresholds.json")
        frames = []
        for index in range(-(-made["image_count"] // made["shard_size"])):
            shard = folder.scored(index, made["run_id"])
            assert shard is not None and shard.score_file is not None
            for position, image in enumerate(shard.images):
                path = folder.scores / shard.score_file[0]
                name = Path(image.relative.decode()).with_suffix(".png")
                labels = read_label_png((folder.labels / name).read_bytes())
                scores = EncodedScores(read_scores(path, position), upsampling)
                frames.append(Cached(scores, labels.shape, labels))
        return cls(
            tuple(frames),
            ClassStatistics.from_json(durable.read_json(out / "statistics.json")),
            Rule(
                thresholds["measure"],
                thresholds["comparator"],
                tuple(one["threshold"] for one in thresholds["classes"]),
            ),
            made["results"]["wall_seconds"],
        )


def different(run: Finished, kernels: Mapping[str, FusedKernel]) -> list[str]:
    """What each kernel makes otherwise of the run's own scores."""
    found = []
    for name, kernel in kernels.items():
        parts = [
            kernel.accumulate(one.scores, one.size, run.statistics.weighting).statistics
            for one in run.frames
        ]
        classes = len(run.rule.thresholds)
        if merged(parts, classes, run.statistics.weighting) != run.statistics:
            found.append(f"the {name} kernel's statistics")
        other = [
            not np.array_equal(kernel.select(one.scores, one.size, run.rule).labels, one.labels)
            for one in run.frames
        ]
        if any(other):
            found.append(f"the {name} kernel's labels of {sum(other)} of {len(other)} frames")
    return found


def agreement(one: Finished, other: Finished) -> dict[str, float]:
    """Between the labels of two runs: over all pixels, and over those that both kept."""
    a, b = (np.concatenate([f.labels.reshape(-1) for f in run.frames]) for run in (one, other))
    kept = (a != 255) & (b != 255)
    return {
        "equal_pixels": float((a == b).mean()),
        "equal_of_both_kept": float((a == b)[kept].mean()) if kept.any() else 1.0,
        "kept_cpu": float((a != 255).mean()),
        "kept_gpu": float((b != 255).mean()),
    }


# --- all of it ---------------------------------------------------------------------------------


def compared(subject: Subject, device: str, images: Path, scratch: Path) -> dict[str, Any]:
    """One row; prints it. Raises CadaError."""
    outs = {
        where: scratch / f"{subject.engine}-{where.replace(':', '')}" for where in ("cpu", device)
    }
    labelled(subject, device, images, outs[device])
    labelled(subject, "cpu", images, outs["cpu"])
    cpu, gpu = (Finished.read(outs[where]) for where in ("cpu", device))
    kernels: dict[str, FusedKernel] = {"CPU": native.Kernel(cores())}
    kernels["CUDA"] = cuda.Kernel(device=open_device(device))
    wrong, found = different(gpu, kernels), agreement(cpu, gpu)
    print(
        f"{subject.engine}, {len(gpu.frames)} frames: {found['equal_pixels']:.3%} of labels equal, "
        f"{found['equal_of_both_kept']:.4%} of those both kept; kept {found['kept_cpu']:.2%} on "
        f"the CPU, {found['kept_gpu']:.2%} on {device}; {cpu.wall_seconds:.1f} s and "
        f"{gpu.wall_seconds:.1f} s"
    )
    print("  from the GPU's scores: " + (
        f"DIFFERENT: {'; '.join(wrong)}" if wrong
        else "both kernels make the run's statistics and labels, byte for byte"
    ))  # fmt: skip
    return {
        "case": f"pseudo-label, {subject.engine}, {device} against cpu",
        "gpu": open_device(device).name,
        "frames": len(gpu.frames),
        "batch": BATCH,
        **found,
        "differs_from_own_scores": wrong,
        "wall_s": {"cpu": cpu.wall_seconds, device: gpu.wall_seconds},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0", help="the GPU, cuda:N")
    parser.add_argument("--record", action="store_true", help="append rows to the results")
    arguments = parser.parse_args()
    try:
        open_device(arguments.device)
    except CadaError as error:
        print(f"not run: {error}")
        return error.exit_code
    print(how_busy())
    rows: list[dict[str, Any]] = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="cada-end-to-end-") as name:
        scratch = Path(name)
        write_set(scratch / "scenes", TARGET_DEMO)
        images = scratch / "scenes" / "images"
        for subject in subjects(scratch):
            try:
                rows.append(compared(subject, arguments.device, images, scratch))
            except EnvironmentLacks as error:
                print(f"{subject.engine}: not run: {error}")
            except CadaError as error:
                print(f"FAILED: {error}")
                failed = True
    if arguments.record and rows:
        record("gpu_end_to_end", rows)
    if any(row["differs_from_own_scores"] for row in rows):
        return WRONG
    return 1 if failed else 0 if rows else NOT_HERE


if __name__ == "__main__":
    sys.exit(main())
