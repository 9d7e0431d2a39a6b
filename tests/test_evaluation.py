"""Labels against truth by relative path: what has no counterpart is counted, never dropped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import cada

from cada_deploy.classes import BUILT_IN, CITYSCAPES_19
from cada_deploy.errors import ArtefactMismatch, UsageError
from cada_deploy.evaluation import compare_folders
from cada_deploy.labels import encode_label_png


def put(folder: Path, name: str, ids: np.ndarray) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_label_png(ids.astype(np.uint8)))


def maps(seed: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 19, (6, 8))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name, seed in (("a", 1), ("sub/b", 2)):
        put(tmp_path / "labels", f"{name}.png", maps(seed))
        put(tmp_path / "truth", f"{name}.png", maps(seed))
    return tmp_path / "labels", tmp_path / "truth"


def test_equal_folders_agree_in_every_pixel(folders: tuple[Path, Path]) -> None:
    ran = cada("evaluate", "--labels", folders[0], "--truth", folders[1], "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert (found["pairs"], found["without_truth"], found["without_label"]) == (2, 0, 0)
    assert found["mean"]["iou"] == 1.0
    assert set(found["classes"]) == set(CITYSCAPES_19.names)


def test_what_has_no_counterpart_is_counted(folders: tuple[Path, Path]) -> None:
    put(folders[0], "more.png", maps(3))
    put(folders[1], "other1.png", maps(4))
    put(folders[1], "other2.png", maps(5))
    found = compare_folders(*folders, CITYSCAPES_19, quiet=True)
    assert (found.pairs, found.without_truth, found.without_label) == (2, 1, 2)
    ran = cada("evaluate", "--labels", folders[0], "--truth", folders[1], "--quiet")
    assert "2 pairs; 1 labels without truth, 2 truth maps without labels" in ran.out


def test_label_ids_of_the_truth_are_mapped(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("sub/b", 2)):
        put(tmp_path / "ids", f"{name}.png", CITYSCAPES_19.label_id_table[maps(seed)])
    found = compare_folders(
        folders[0], tmp_path / "ids", CITYSCAPES_19, truth_ids="label", quiet=True
    )
    expected = compare_folders(*folders, CITYSCAPES_19, quiet=True)
    ran = cada(
        "evaluate", "--labels", folders[0], "--truth", tmp_path / "ids", "--truth-ids", "label",
        "--json",
    )  # fmt: skip
    assert json.loads(ran.out)["mean"]["iou"] == 1.0
    assert found.pairs == expected.pairs == 2


def test_a_finished_run_can_be_evaluated(finished: Path) -> None:
    ran = cada(
        "evaluate", "--labels", finished / "labels", "--truth", finished / "labels", "--json"
    )
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["pairs"] == 7
    assert {row["precision"] for row in found["classes"].values()} <= {1.0, None}


def test_folders_without_a_pair_are_exit_2_with_examples(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    put(tmp_path / "strange", "x.png", maps(1))
    ran = cada("evaluate", "--labels", tmp_path / "strange", "--truth", folders[1])
    assert ran.code == 2 and ran.said("such as x)", "relative paths")
    with pytest.raises(UsageError):
        compare_folders(tmp_path / "strange", folders[1], CITYSCAPES_19, quiet=True)
    assert cada("evaluate", "--labels", tmp_path / "none", "--truth", folders[1]).code == 2


def test_maps_that_do_not_fit_are_exit_4_and_named(folders: tuple[Path, Path]) -> None:
    put(folders[0], "a.png", maps(1)[:5])
    ran = cada("evaluate", "--labels", folders[0], "--truth", folders[1])
    assert ran.code == 4 and ran.said("a", "5x8", "6x8")
    put(folders[0], "a.png", np.full((6, 8), 77))
    ran = cada("evaluate", "--labels", folders[0], "--truth", folders[1])
    assert ran.code == 4 and ran.said("77")
    (folders[0] / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(ArtefactMismatch, match=r"label a cannot be read|a cannot be read"):
        compare_folders(*folders, CITYSCAPES_19, quiet=True)


def test_an_unknown_class_set_is_exit_2(folders: tuple[Path, Path]) -> None:
    ran = cada("evaluate", "--labels", folders[0], "--truth", folders[1], "--classes", "camvid")
    assert ran.code == 2 and all(ran.said(name) for name in BUILT_IN)
