"""Does a whole run cost more than the sum of its parts, and does memory grow with the set?

2-megapixel PNGs through `pseudo-label`: every stage is first measured alone, on one core; the wall
time of the run is then held against (their sum / cores). Peak memory is taken from child processes
that label 300 and 3,000 images. Without arguments: prints the ratios, writes no row, exits 5 below
the targets. --record appends rows; --quick takes fewer images (for a look, never recorded).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from harness import BELOW_TARGET, record

from cada_deploy import durable, labelling
from cada_deploy.demo import DEMO_MODEL
from cada_deploy.fused import best_kernel
from cada_deploy.image_files import find_images
from cada_deploy.labelling import ModelChoice, RunOptions, Work
from cada_deploy.outputs import LabelFiles
from cada_deploy.pipeline import Pipeline
from cada_deploy.scenes import TARGET, scene
from cada_deploy.score_cache import ScoreFile, digest, read_scores
from cada_deploy.scores import EncodedScores
from cada_deploy.selection import Selecting
from cada_deploy.stages import StageClock
from cada_deploy.statistics import merged

SIZE = (1024, 2048)
DISTINCT = 8
WALL_TARGET = 1.15  # wall time / (sum of stages measured alone / cores)
MEMORY_TARGET_MB = 50.0  # peak of 3,000 images less peak of 300


def write_frames(folder: Path, count: int) -> None:
    """`count` names over a few distinct 2-megapixel scenes; hard links, so the disk stays small."""
    folder.mkdir(parents=True)
    originals = folder.parent / "originals"
    originals.mkdir(exist_ok=True)
    for k in range(DISTINCT):
        path = originals / f"{k}.png"
        if not path.exists():
            image = scene(50_000 + k, TARGET, SIZE).image
            ok, data = cv2.imencode(".png", np.ascontiguousarray(image[..., ::-1]))
            assert ok
            path.write_bytes(data.tobytes())
    for k in range(count):
        os.link(originals / f"{k % DISTINCT}.png", folder / f"frame_{k:06d}.png")


def alone(model: Path, preset: str | None, images: Path, frames: int, scratch: Path) -> float:
    """Seconds a frame of all stages, run one after the other on one core: each stage goes over all
    frames before the next begins. Returns the sum of the stages' medians."""
    choice = ModelChoice(model, preset=preset)
    opened, engine = choice.load()
    pipeline = Pipeline(engine, best_kernel(1), opened.spec)
    refs = find_images(images)[:frames]
    rule = Selecting().rule
    taken: dict[str, list[float]] = {}

    def timed(stage: str, work):
        start = time.perf_counter()
        result = work()
        taken.setdefault(stage, []).append(time.perf_counter() - start)
        return result

    classes = opened.spec.classes
    for ref in refs[:2]:  # warm-up
        pipeline.scores(pipeline.open_frame(ref, StageClock()).image, StageClock())
    opened_frames = [timed("open", lambda r=r: pipeline.open_frame(r, StageClock())) for r in refs]
    scores = [
        timed("network", lambda f=f: pipeline.scores(f.image, StageClock())) for f in opened_frames
    ]
    shape, network = opened_frames[0].size, pipeline.input_size(opened_frames[0].size)
    evidence = [
        timed(
            "statistics",
            lambda s=s: pipeline.evidence(s, shape, network, "confidence", StageClock()),
        )
        for s in scores
    ]
    for s in scores:
        timed("digest", lambda s=s: digest(s.array))
    path = scratch / "scores.safetensors"
    with ScoreFile(path, len(scores)) as file:
        for k, s in enumerate(scores):
            timed("cache write", lambda k=k, s=s: file.append(k, s.array))
        start = time.perf_counter()
        file.commit()
        taken["cache commit"] = [(time.perf_counter() - start) / len(scores)]
    learnt = rule(merged([e.statistics for e in evidence], len(classes), "confidence"), classes)
    cached = [timed("cache read", lambda k=k: read_scores(path, k)) for k in range(len(scores))]
    for array in cached:
        timed("cache digest", lambda a=array: digest(a))
    encoded = [EncodedScores(a, pipeline.upsampling) for a in cached]
    selections = [
        timed(
            "select",
            lambda s=s: pipeline.select(s, shape, network, learnt, StageClock()),
        )
        for s in encoded
    ]
    files = LabelFiles()
    pngs = [
        timed("encode png", lambda c=c: list(files.encode(b"x.png", None, c, classes)))
        for c in selections
    ]
    for k, ((_, data),) in enumerate(pngs):
        timed("write png", lambda k=k, d=data: durable.write_file(scratch / f"{k}.png", d))
    medians = {stage: statistics.median(values) for stage, values in taken.items()}
    for stage, seconds in medians.items():
        print(f"    {stage:<13} {seconds * 1e3:8.2f} ms")
    return sum(medians.values())


def whole(model: Path, preset: str | None, images: Path, out: Path) -> float:
    """Wall seconds of a run, from the list of images to the last label (no report)."""
    options = RunOptions(
        ModelChoice(model, preset=preset), images, out, work=Work(cache="on", quiet=True)
    )
    start = time.perf_counter()
    outcome = labelling.pseudo_label(options, lambda _: None)
    wall = time.perf_counter() - start
    assert len(outcome.sources) == len(list(images.iterdir()))
    shutil.rmtree(out)
    return wall


def peak_mb(model: Path, preset: str | None, images: Path, out: Path) -> float:
    """Peak resident memory of a child that runs the command on these images."""
    code = (
        # Not ru_maxrss: that survives exec, so it would show this very process's peak.
        "import re, sys\nfrom pathlib import Path\nfrom cada_deploy.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    status = Path('/proc/self/status').read_text()\n"
        "    print(int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) / 1024)\n"
    )
    arguments = ["pseudo-label", "--model", str(model), "--images", str(images), "--out", str(out),
                 "--quiet", "--cache", "on"]  # fmt: skip
    if preset:
        arguments += ["--preset", preset]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    shutil.rmtree(out)
    return float(done.stdout.split()[-1])


def colour_model(folder: Path) -> Path:
    """A network that costs almost nothing: what remains is this project's own work."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from foreign_models import fitted_colours, save_colour_model

    images = [scene(50_000 + k, TARGET, (256, 512)).image for k in range(4)]
    return save_colour_model(folder / "colour.onnx", fitted_colours(images, 19))


def end_to_end(label: str, model: Path, preset: str | None, frames: int, pairs: int, scratch: Path):
    """One row: wall time of whole runs against the stages measured alone, in pairs."""
    cores = labelling.cores()
    ideal, wall = [], []
    for _ in range(pairs):
        print(f"  {label} model, stages alone:")
        ideal.append(alone(model, preset, scratch / "frames", 8, scratch) * frames / cores)
        wall.append(whole(model, preset, scratch / "frames", scratch / "out"))
    ratio = statistics.median(w / i for w, i in zip(wall, ideal))
    print(
        f"{label} model: {frames / statistics.median(wall):.2f} images/s, wall / (sum of stages / "
        f"{cores} cores) = {ratio:.3f}"
    )
    return {
        "case": f"end to end, {label} model",
        "frame": f"{SIZE[0]}x{SIZE[1]} PNG",
        "frames": frames,
        "cores": cores,
        "pairs": pairs,
        "images_per_s": round(frames / statistics.median(wall), 3),
        "wall_s": [round(w, 3) for w in wall],
        "ideal_s": [round(i, 3) for i in ideal],
        "wall_of_ideal": round(ratio, 4),
        "target": WALL_TARGET,
    }


def memory(model: Path, preset: str | None, sets: tuple[int, int], scratch: Path):
    """One row: peak memory of a small and of a ten times larger set."""
    peaks = []
    for count in sets:
        write_frames(scratch / f"set-{count}", count)
        peaks.append(peak_mb(model, preset, scratch / f"set-{count}", scratch / "out"))
    growth = peaks[1] - peaks[0]
    print(
        f"peak memory: {sets[0]} images {peaks[0]:.0f} MB, {sets[1]} images {peaks[1]:.0f} MB, "
        f"difference {growth:.1f} MB (target < {MEMORY_TARGET_MB})"
    )
    return {
        "case": "peak memory",
        "frame": f"{SIZE[0]}x{SIZE[1]} PNG",
        "images": list(sets),
        "peak_mb": [round(p, 1) for p in peaks],
        "growth_mb": round(growth, 1),
        "target": MEMORY_TARGET_MB,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append rows to the results")
    parser.add_argument("--quick", action="store_true", help="fewer images; cannot be recorded")
    parser.add_argument("--only", choices=["runs", "memory"], help="measure that alone")
    arguments = parser.parse_args()
    if arguments.quick and arguments.record:
        parser.error("--quick figures are not recorded")
    frames, pairs, sets = (16, 2, (30, 60)) if arguments.quick else (48, 3, (300, 3000))
    with tempfile.TemporaryDirectory(prefix="cada-throughput-") as name:
        scratch = Path(name)
        write_frames(scratch / "frames", frames)
        models = {"demo": (DEMO_MODEL, None), "colour": (colour_model(scratch), "imagenet-rgb")}
        rows = []
        if arguments.only != "memory":
            rows += [end_to_end(label, *m, frames, pairs, scratch) for label, m in models.items()]
        if arguments.only != "runs":
            rows.append(memory(*models["colour"], sets, scratch))
    if arguments.record:
        record("throughput", rows)
    return 0 if all(met(row) for row in rows) else BELOW_TARGET


def met(row: dict[str, Any]) -> bool:
    """Against the row's own target. The colour model, a network that costs almost nothing, is the
    harder case: what does not scale is not hidden behind the network there."""
    if row["case"] == "peak memory":
        return bool(row["growth_mb"] < MEMORY_TARGET_MB)
    return bool(row["wall_of_ideal"] <= row["target"])


if __name__ == "__main__":
    sys.exit(main())
