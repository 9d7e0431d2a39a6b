"""Every JSON file that a run writes is what its schema in the package says."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from command_line import cada, read
from foreign_models import save_colour_model, spread_colours
from jsonschema import Draft202012Validator

import cada_deploy.schemas


def schema(name: str) -> Any:
    return json.loads((resources.files(cada_deploy.schemas) / f"{name}.schema.json").read_text())


def errors(name: str, value: Any) -> list[str]:
    return [e.message for e in Draft202012Validator(schema(name)).iter_errors(value)]


NAMES = sorted(
    p.name.removesuffix(".schema.json")
    for p in resources.files(cada_deploy.schemas).iterdir()
    if p.name.endswith(".json")
)


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_is_a_schema(name: str) -> None:
    Draft202012Validator.check_schema(schema(name))


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, colour_model: Path, frames: Path, finished: Path
) -> list[Path]:
    """Runs that together write every kind of entry."""
    folder = tmp_path_factory.mktemp("kinds")
    images = folder / "frames"
    shutil.copytree(frames, images)
    (images / "bad\udcff.png").write_bytes(b"")
    (images / "good\udcfe.png").write_bytes((frames / "frame_000.png").read_bytes())
    poisoned = save_colour_model(folder / "p.onnx", spread_colours(6), poison=float("nan"))
    plain = ("--preset", "imagenet-rgb", "--images", images, "--allow-rejects", 1)
    ways = {
        "rich": ("--model", colour_model, "--overlay", "--entropy", "--confidence",
                 "--cache", "off", "--size", "32x40", "--stats-size", "20x20",
                 "--ignore-rows", "0:3"),
        "image": ("--model", colour_model, "--scope", "image", "--delta", "0.1,5%,0,0,0,0"),
        "fixed": ("--model", poisoned, "--policy", "fixed", "--label-size", "30x30"),
        "literal": ("--model", poisoned, "--centroid", "literal"),
    }  # fmt: skip
    for name, options in ways.items():
        ran = cada("pseudo-label", *plain, "--out", folder / name, *options)
        assert ran.code == 0, ran.err
    ran = cada("predict", *plain, "--model", colour_model, "--out", folder / "predict")
    assert ran.code == 0, ran.err
    assert cada("select", folder / "image", "--out", folder / "again", "--delta", "0.2").code == 0
    return [finished, *(folder / name for name in (*ways, "predict", "again"))]


def test_every_json_file_fits_its_schema(runs: list[Path]) -> None:
    seen = set()
    for out in runs:
        for path in out.rglob("*.json"):
            name = path.name.split(".")[-2]
            assert errors(name, read(path)) == [], path
            seen.add(name)
        for line in (out / "rejected.jsonl").read_text().splitlines():
            assert errors("rejected", json.loads(line)) == []
            seen.add("rejected")
    assert seen >= {"run", "thresholds", "statistics", "scored", "selected", "rejected"}


def test_a_run_that_is_not_finished_fits_too(runs: list[Path]) -> None:
    record = read(runs[0] / "run.json")
    assert record["status"] == "done"
    del record["results"]
    assert errors("run", {**record, "status": "running"}) == []


@pytest.mark.parametrize("name", ["run", "thresholds", "statistics", "scored", "selected"])
def test_a_schema_refuses_what_is_missing_or_unknown(name: str, runs: list[Path]) -> None:
    path = next(p for p in sorted(runs[2].rglob("*.json")) if p.name.split(".")[-2] == name)
    whole = read(path)
    assert errors(name, {**whole, "surprise": 1}) != []
    for key in whole:
        if key != "results":
            assert errors(name, {k: v for k, v in whole.items() if k != key}) != [], key


def test_integers_are_strings_where_they_can_pass_2_to_53(runs: list[Path]) -> None:
    for out in runs:
        for path in [out / "statistics.json", *(out / "shards").glob("*.scored.json")]:
            if path.exists():
                data = read(path)
                data = data.get("statistics", data)
                assert all(isinstance(v, str) for row in data["sums"] for v in row)
                assert all(isinstance(v, str) for v in data["pixels"])


def test_nothing_in_a_json_file_needs_more_than_strict_json(runs: list[Path]) -> None:
    def refuse(text: str) -> None:
        pytest.fail(f"{text} is not JSON")

    for out in runs:
        for path in out.rglob("*.json"):
            text = path.read_text(encoding="utf-8")
            json.loads(text, parse_constant=refuse)
            assert text.endswith("}\n")
