"""Every kind of data set on a miniature copy: right ids, counted gaps, errors that say enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cada_deploy.training.datasets import DataSet, Sample, kinds, open_dataset
from cada_deploy.training.datasets.synthia import SYNTHIA_IDS, WITHOUT
from cada_deploy.training.label_ids import CITYSCAPES_LABEL_IDS
from PIL import Image

from cada_deploy import scenes
from cada_deploy.classes import CITYSCAPES_19
from cada_deploy.errors import ArtefactMismatch, CadaError, UsageError
from cada_deploy.labels import encode_confidence_png16, encode_label_png

from . import miniature

ROOT = Path(__file__).parents[2]
CAMVID = ROOT.parent / "shared" / "data" / "camvid"


class Case(NamedTuple):
    """A table that opens what `build` wrote; {root} stands for the folder."""

    build: Callable[[Path], None]
    table: dict[str, Any]
    names: Sequence[str]
    train_ids: Sequence[int] | None  # of label_map's columns, in every frame; None: unlabelled


def _translated(root: Path) -> None:
    miniature.gta5(root / "gta5", 6)
    for k in range(1, 6):  # one of six is missing: less than a fifth
        size = (miniature.HEIGHT, miniature.WIDTH) if k < 3 else (10, miniature.WIDTH)
        miniature.write_image(root / f"translated/{k:05d}.jpg", 100 + k, size)


CASES = {
    "gta5": Case(miniature.gta5, {"kind": "gta5", "root": "{root}"},
                 ("00001", "00002", "00003"), miniature.GTA5_TRAIN),
    "gta5-translated": Case(
        _translated,
        {"kind": "gta5-translated", "root": "{root}/gta5", "images": "{root}/translated"},
        ("00001", "00002", "00003", "00004", "00005"), miniature.GTA5_TRAIN),
    "cityscapes": Case(miniature.cityscapes, {"kind": "cityscapes", "root": "{root}"},
                       miniature.CITYSCAPES_STEMS["train"], miniature.CITYSCAPES_TRAIN),
    "cityscapes val in train ids": Case(
        lambda root: miniature.cityscapes(root, train_ids=True),
        {"kind": "cityscapes", "root": "{root}", "split": "val", "ids": "labelTrainIds"},
        miniature.CITYSCAPES_STEMS["val"], miniature.CITYSCAPES_TRAIN),
    "cityscapes target": Case(
        lambda root: miniature.cityscapes(root, labelled=False),
        {"kind": "cityscapes", "root": "{root}", "labelled": False},
        miniature.CITYSCAPES_STEMS["train"], None),
    "acdc night": Case(miniature.acdc, {"kind": "acdc", "root": "{root}", "condition": "night"},
                       ("night/train/GOPR0475/GOPR0475_frame_000041",
                        "night/train/GOPR0475/GOPR0475_frame_000047"), miniature.TRAIN_KNOWN),
    "acdc in label ids": Case(
        miniature.acdc,
        {"kind": "acdc", "root": "{root}", "split": "val", "ids": "labelIds", "limit": 2},
        ("fog/val/GOPR0475/GOPR0475_frame_000041", "fog/val/GOPR0475/GOPR0475_frame_000047"),
        miniature.CITYSCAPES_TRAIN),
    "dark-zurich": Case(miniature.dark_zurich, {"kind": "dark-zurich", "root": "{root}"},
                        ("GOPR0351/GOPR0351_frame_000159", "GOPR0351/GOPR0351_frame_000160"), None),
    "dark-zurich val": Case(
        miniature.dark_zurich,
        {"kind": "dark-zurich", "root": "{root}", "split": "val", "labelled": True},
        ("GOPR0356/GOPR0356_frame_000321", "GOPR0356/GOPR0356_frame_000322"),
        miniature.TRAIN_KNOWN),
    "bdd100k": Case(miniature.bdd100k, {"kind": "bdd100k", "root": "{root}", "split": "val"},
                    ("0004a4c0-d4dff0ad", "7b5d2f1e-00a1b2c3"), miniature.TRAIN_KNOWN),
    "bdd100k, older": Case(lambda root: miniature.bdd100k(root, older=True),
                           {"kind": "bdd100k", "root": "{root}"},
                           ("0004a4c0-d4dff0ad", "7b5d2f1e-00a1b2c3"), miniature.TRAIN_KNOWN),
    "camvid day": Case(miniature.camvid, {"kind": "camvid", "root": "{root}", "split": "day"},
                       miniature.CAMVID_DAY, miniature.TRAIN_KNOWN),
    "camvid dusk": Case(miniature.camvid, {"kind": "camvid", "root": "{root}", "split": "dusk"},
                        miniature.CAMVID_DUSK, None),
    "camvid dusk-dev": Case(miniature.camvid,
                            {"kind": "camvid", "root": "{root}", "split": "dusk-dev"},
                            miniature.CAMVID_DUSK[::2], miniature.TRAIN_KNOWN),
    "camvid, tutorial": Case(miniature.camvid_tutorial,
                             {"kind": "camvid", "root": "{root}", "split": "val"},
                             ("0016E5_00001",), miniature.CAMVID_TRAIN),
    "pairs": Case(miniature.pairs,
                  {"kind": "pairs", "root": "{root}", "images": "images", "labels": "run/labels"},
                  ("a", "deep/b"), miniature.TRAIN_KNOWN),
    "pairs, unlabelled": Case(miniature.pairs, {"kind": "pairs", "images": "{root}/images"},
                              ("a", "deep/b"), None),
}  # fmt: skip
for _classes, _ids in miniature.SYNTHIA_TRAIN.items():
    for _channels in (2, 3):
        CASES[f"{_classes}, {_channels} channels"] = Case(
            lambda root, channels=_channels: miniature.synthia(root, channels),
            {"kind": "synthia", "root": "{root}", "classes": _classes},
            ("0000000", "0000001"),
            _ids,
        )

EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
LABELLED = {
    kind: next(c for c in CASES.values() if c.table["kind"] == kind and c.train_ids is not None)
    for kind in sorted({c.table["kind"] for c in CASES.values()})
}
EVERY_KIND = pytest.mark.parametrize("kind", LABELLED)


def _table(case: Case, root: Path, /, **more: Any) -> dict[str, Any]:
    filled = {k: v.replace("{root}", str(root)) if isinstance(v, str) else v
              for k, v in case.table.items()}  # fmt: skip
    return {**filled, **more}


def _built(case: Case, root: Path, /, **more: Any) -> DataSet:
    case.build(root)
    return open_dataset(_table(case, root, **more))


def _labels(sample: Sample) -> np.ndarray:
    assert sample.labels is not None
    return sample.labels


def _label_files(data: DataSet) -> list[Path]:
    return [f.labels.path for f in data.frames]


def test_every_kind_has_a_case() -> None:
    assert set(kinds()) == set(LABELLED) | {"scenes"}


# --- what they give ---------------------------------------------------------------------------


@EVERY
def test_frames_with_the_right_train_ids(case: Case, tmp_path: Path) -> None:
    data = _built(case, tmp_path)
    assert data.names == tuple(case.names) and len(data) == len(case.names)
    assert data.kind == case.table["kind"] and data.classes == CITYSCAPES_19
    assert data.labelled == (case.train_ids is not None)
    for k, name in enumerate(case.names):
        sample = data[k]
        assert sample.name == name and sample.weights is None
        assert sample.image.dtype == np.uint8 and sample.image.shape[2] == 3
        assert sample.image.flags.c_contiguous
        if case.train_ids is None:
            assert sample.labels is None
            continue
        labels = _labels(sample)
        assert labels.dtype == np.uint8 and labels.shape == sample.image.shape[:2]
        assert (labels == miniature.label_map(case.train_ids, labels.shape)).all()


@EVERY
def test_images_are_rgb_as_stored(case: Case, tmp_path: Path) -> None:
    data = _built(case, tmp_path)
    for k, path in enumerate(data.image_paths):
        stored = np.asarray(Image.open(path).convert("RGB")).astype(int)
        # Two JPEG decoders may round differently; a channel in another place is off by up to 255.
        tolerance = 0 if path.suffix == ".png" else 3
        assert np.abs(data[k].image - stored).max() <= tolerance


@EVERY
def test_facts_count_what_was_found(case: Case, tmp_path: Path) -> None:
    facts = _built(case, tmp_path).facts()
    assert facts["frames"] == len(case.names)
    assert facts["missing_images"] == (1 if case.table["kind"] == "gta5-translated" else 0)
    if case.train_ids is not None:
        assert facts["mismatched"] == 0 and facts["missing_labels"] == 0
        assert sum(facts["sizes"].values()) >= len(case.names)


def test_gta5_frames_of_several_sizes(tmp_path: Path) -> None:
    miniature.gta5(tmp_path)
    data = open_dataset({"kind": "gta5", "root": str(tmp_path)})
    assert data.facts()["sizes"] == {"12x20": 2, "10x20": 1}
    assert data[2].image.shape == (10, 20, 3)


def test_every_cityscapes_id_of_256() -> None:
    found = CITYSCAPES_LABEL_IDS.to_train_ids(np.arange(35, dtype=np.uint8)[None], "here")[0]
    for label_id in range(35):
        expected = 255
        if label_id in CITYSCAPES_19.label_ids:
            expected = CITYSCAPES_19.label_ids.index(label_id)
        assert found[label_id] == expected


def test_synthia_classes_of_the_literature() -> None:
    assert len(SYNTHIA_IDS) == 19 and set(SYNTHIA_IDS.values()) == set(CITYSCAPES_19.names)
    for name, without in WITHOUT.items():
        assert len(set(CITYSCAPES_19.names) - without) == int(name.partition("-")[2])


def test_synthia_in_8_bits(tmp_path: Path) -> None:
    miniature.synthia(tmp_path / "RAND_CITYSCAPES")
    for k in range(2):
        path = tmp_path / f"RAND_CITYSCAPES/parsed_LABELS/{k:07d}.png"
        miniature.write_grey(path, miniature.label_map(miniature.SYNTHIA_KNOWN))
    table = {"kind": "synthia", "root": str(tmp_path), "labels": "parsed_LABELS"}
    labels = _labels(open_dataset(table)[1])
    assert (labels == miniature.label_map(miniature.SYNTHIA_TRAIN["synthia-16"])).all()


def test_weights_of_a_pseudo_label_run(tmp_path: Path) -> None:
    miniature.pairs(tmp_path)
    table = {"kind": "pairs", "root": str(tmp_path), "images": "images", "run": "run"}
    assert open_dataset(table)[0].weights is None
    soft = open_dataset(table | {"weighted": True})
    weights = soft[1].weights
    assert weights is not None and weights.dtype == np.float32
    assert weights.shape == (miniature.HEIGHT, miniature.WIDTH)
    assert (weights[:, 0] == 0).all() and (weights[:, 1:] == 1).all()
    assert soft.fingerprint() != open_dataset(table).fingerprint()


def test_confidence_maps_as_the_product_writes_them(tmp_path: Path) -> None:
    miniature.write_image(tmp_path / "images/a.png", 1)
    confidence = np.random.default_rng(3).random((miniature.HEIGHT, miniature.WIDTH))
    for folder, png in (("labels", encode_label_png(miniature.label_map((0, 18)))),
                        ("confidence", encode_confidence_png16(confidence))):  # fmt: skip
        (tmp_path / "out" / folder).mkdir(parents=True)
        (tmp_path / "out" / folder / "a.png").write_bytes(png)
    table = {"kind": "pairs", "root": str(tmp_path), "images": "images", "run": "out",
             "weighted": True}  # fmt: skip
    weights = open_dataset(table)[0].weights
    assert weights is not None and np.abs(weights - confidence).max() <= 0.51 / 65535


def test_pairs_in_another_class_set(tmp_path: Path) -> None:
    miniature.write_image(tmp_path / "images/a.png", 1)
    miniature.write_grey(tmp_path / "labels/a.png", miniature.label_map((0, 10, 255)))
    table = {"kind": "pairs", "root": str(tmp_path), "images": "images", "labels": "labels",
             "classes": "camvid-11"}  # fmt: skip
    data = open_dataset(table)
    assert data.classes.name == "camvid-11"
    assert (_labels(data[0]) == miniature.label_map((0, 10, 255))).all()
    miniature.write_grey(tmp_path / "labels/a.png", miniature.label_map((0, 11)))
    with pytest.raises(ArtefactMismatch, match="values 11"):
        open_dataset(table)[0]


def test_translated_images_of_another_size(tmp_path: Path) -> None:
    miniature.gta5(tmp_path, 2)
    for k in (1, 2):
        miniature.write_image(tmp_path / f"smaller/{k:05d}.png", k, (6, 10))
    table = {"kind": "gta5-translated", "root": str(tmp_path), "images": "smaller"}
    with pytest.raises(ArtefactMismatch, match=r"00001: image 6x10, 12x20.*fit_labels = true"):
        open_dataset(table)
    sample = open_dataset(table | {"fit_labels": True})[0]
    assert sample.image.shape == (6, 10, 3) and _labels(sample).shape == (6, 10)
    assert set(np.unique(_labels(sample))) <= set(miniature.GTA5_TRAIN)
    for k in (1, 2):
        miniature.write_image(tmp_path / f"smaller/{k:05d}.png", k, (10, 10))
    with pytest.raises(ArtefactMismatch, match="another size"):
        open_dataset(table | {"fit_labels": True})


def test_many_threads_read_the_same(tmp_path: Path) -> None:
    data = _built(CASES["cityscapes"], tmp_path)
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(data.__getitem__, [0, 1, 2] * 10))
    for k, sample in enumerate(read):
        assert (sample.image == data[k % 3].image).all()
        assert (_labels(sample) == _labels(data[k % 3])).all()


# --- which frames -----------------------------------------------------------------------------


@EVERY_KIND
def test_limit(kind: str, tmp_path: Path) -> None:
    case = LABELLED[kind]
    case.build(tmp_path)
    few = open_dataset(_table(case, tmp_path, limit=1))
    assert few.names == tuple(case.names)[:1]
    assert few.fingerprint() != open_dataset(_table(case, tmp_path)).fingerprint()
    with pytest.raises(UsageError, match="limit is -1"):
        open_dataset(_table(case, tmp_path, limit=-1))


@pytest.mark.parametrize(
    ("case", "lines"),
    [
        ("gta5", ["00003.png", "", "00001.png"]),  # BDL and AdaptSegNet
        ("gta5", ["# comment", "images/00001.png\tlabels/00001.png", "images/00003.png"]),  # CRST
        ("gta5", ["./00001", "00003"]),
        ("cityscapes", ["zurich/zurich_000000_000019_leftImg8bit.png",
                        "aachen/aachen_000000_000019_leftImg8bit.png"]),  # BDL
        ("cityscapes", [f"leftImg8bit/train/{stem}_leftImg8bit.png\tgtFine/x.png"
                        for stem in ("aachen/aachen_000000_000019",
                                     "zurich/zurich_000000_000019")]),  # CRST
        ("cityscapes", ["train/aachen/aachen_000000_000019_leftImg8bit.png",
                        "aachen/aachen_000001_000019"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inside", [True, False])
def test_list_files(case: str, lines: list[str], inside: bool, tmp_path: Path) -> None:
    CASES[case].build(tmp_path / "set")
    path = tmp_path / "set/list.txt" if inside else tmp_path / "list.txt"
    path.write_text("\n".join(lines) + "\n")
    table = _table(CASES[case], tmp_path / "set", list="list.txt" if inside else str(path))
    data = open_dataset(table)
    first, last = CASES[case].names[0], CASES[case].names[-1]
    if "aachen_000001" in lines[-1]:
        last = CASES[case].names[1]
    assert data.names == (first, last)  # in the order of names, not of lines


def test_lists_of_frames_that_are_not_there(tmp_path: Path) -> None:
    miniature.gta5(tmp_path)
    (tmp_path / "list.txt").write_text("00001.png\n24966.png\n")
    table = {"kind": "gta5", "root": str(tmp_path), "list": "list.txt"}
    with pytest.raises(ArtefactMismatch, match=r"1 images below .*24966.*; 1 labels below"):
        open_dataset(table)
    assert open_dataset(table | {"max_missing": 0.5}).names == ("00001",)


@pytest.mark.parametrize(
    ("text", "said"),
    [("00001.png\n00001.png\n", "'00001' more than once"), ("\n# nothing\n", "names nothing")],
)
def test_lists_that_are_none(text: str, said: str, tmp_path: Path) -> None:
    miniature.gta5(tmp_path)
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UsageError, match=said):
        open_dataset({"kind": "gta5", "root": str(tmp_path), "list": "list.txt"})
    with pytest.raises(UsageError, match=r"no list other\.txt"):
        open_dataset({"kind": "gta5", "root": str(tmp_path), "list": "other.txt"})


def test_camvid_by_sequence_and_block(tmp_path: Path) -> None:
    miniature.camvid(tmp_path)
    day = {"kind": "camvid", "root": str(tmp_path), "split": "day"}
    assert open_dataset(day | {"sequences": "0006R0"}).names == miniature.CAMVID_DAY[:2]
    assert open_dataset(day | {"sequences": "Seq05VD, 0016E5"}).names == miniature.CAMVID_DAY[2:]
    parts = [open_dataset(day | {"fold": f"{k}/3"}).names for k in (1, 2, 3)]
    assert sum(parts, ()) == miniature.CAMVID_DAY
    with pytest.raises(UsageError, match=r"'0006RO'; known.*did you mean '0006R0'"):
        open_dataset(day | {"sequences": "0006RO"})
    for fold in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(UsageError, match=r"expected .K/N."):
            open_dataset(day | {"fold": fold})
    with pytest.raises(UsageError, match="no frame is left"):
        open_dataset(day | {"fold": "1/9"})


def test_one_frame_has_one_name_with_and_without_labels(tmp_path: Path) -> None:
    for folder, (case, changes) in enumerate((
        ("camvid dusk", {"split": "dusk-dev"}),
        ("cityscapes", {"labelled": False}),
        ("dark-zurich val", {"labelled": False}),
    )):  # fmt: skip
        root = tmp_path / str(folder)
        one = _built(CASES[case], root)
        other = open_dataset(_table(CASES[case], root, **changes))
        assert set(one.names) & set(other.names), case
        assert set(one.names) <= set(other.names) or set(other.names) <= set(one.names)


def test_real_camvid() -> None:
    if not CAMVID.is_dir():
        pytest.skip(f"not run: CamVid (CC BY-NC 4.0, not ours to distribute) is not at {CAMVID}")
    began = time.perf_counter()
    table = {"kind": "camvid", "root": str(CAMVID)}
    day = open_dataset(table | {"split": "day"})
    dusk = open_dataset(table | {"split": "dusk"})
    dev = open_dataset(table | {"split": "dusk-dev"})
    assert (len(day), len(dusk), len(dev)) == (577, 124, 31)
    assert set(dev.names) <= set(dusk.names) and not set(day.names) & set(dusk.names)
    assert day.facts()["sizes"] == {"360x480": 577}
    seen = {int(v) for k in range(0, 577, 64) for v in np.unique(_labels(day[k]))}
    assert seen == {0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 18, 255}
    assert time.perf_counter() - began < 10


# --- procedural scenes ------------------------------------------------------------------------

SCENES = {"kind": "scenes", "domain": "target", "seeds": [7, 9], "size": [32, 64]}


@pytest.mark.parametrize("kept", ["memory", "disk"])
def test_scenes_are_the_generators(kept: str, tmp_path: Path) -> None:
    table = SCENES | ({"cache": str(tmp_path)} if kept == "disk" else {})
    data = open_dataset(table)
    assert data.names == ("target_000007", "target_000008") and len(data) == 2
    for _ in range(2):  # drawn, then kept
        sample, expected = data[1], scenes.scene(8, "target", (32, 64))
        assert (sample.image == expected.image).all()
        assert (_labels(sample) == expected.labels).all()
    files = sorted(p for p in tmp_path.rglob("*.png"))
    assert len(files) == (2 if kept == "disk" else 0)


def test_scenes_without_labels() -> None:
    data = open_dataset(SCENES | {"labelled": False})
    assert not data.labelled and data[0].labels is None
    assert data.fingerprint() != open_dataset(SCENES).fingerprint()
    assert data.facts()["seeds"] == [7, 9]


def test_kept_scenes_are_read_and_not_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = SCENES | {"cache": str(tmp_path)}
    first = open_dataset(table)[0]
    again = open_dataset(table)
    again._generator  # noqa: B018 - draws one scene, for the digest
    monkeypatch.setattr(scenes, "scene", None)
    assert (again[0].image == first.image).all()


def test_frozen_sets_of_scenes() -> None:
    data = open_dataset({"kind": "scenes", "set": scenes.TARGET_DEV.name, "limit": 3})
    assert len(data) == 3 and data.names[0] == "target_030000"
    assert data[0].image.shape == (256, 512, 3)
    with pytest.raises(UsageError, match="did you mean 'scenes19-target-dev-1'"):
        open_dataset({"kind": "scenes", "set": "scenes19-target-dev"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"domain": "sauce"}, "did you mean 'source'"),
        ({"set": scenes.TARGET_DEV.name}, "either set"),
        ({"seeds": [5, 5]}, "first, end"),
        ({"seeds": [5]}, "a list of 2"),
        ({"size": [0, 5]}, r"\[H, W\]"),
        ({"limit": -1}, "limit is -1"),
    ],
)
def test_scenes_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        open_dataset(SCENES | changes)


# --- fingerprints -----------------------------------------------------------------------------


@EVERY_KIND
def test_a_fingerprint_names_the_files(kind: str, tmp_path: Path) -> None:
    case = LABELLED[kind]
    one = _built(case, tmp_path / "one")
    same = _built(case, tmp_path / "elsewhere")
    assert one.fingerprint() == same.fingerprint()  # wherever it lies
    # A frame more: a copy of the last image and its labels under the next name.
    last: Path = one.image_paths[-1]
    truth = _label_files(one)[-1]
    stem = one.names[-1].rpartition("/")[2]
    for path in (last, truth):
        path.with_name(path.name.replace(stem, stem + "9")).write_bytes(path.read_bytes())
    more = open_dataset(_table(case, tmp_path / "one"))
    assert len(more) == len(one) + 1 and more.fingerprint() != one.fingerprint()


@EVERY_KIND
def test_a_fingerprint_names_the_sizes(kind: str, tmp_path: Path) -> None:
    case = LABELLED[kind]
    before = _built(case, tmp_path)
    for path in (before.image_paths[0], _label_files(before)[0]):
        old = open_dataset(_table(case, tmp_path)).fingerprint()
        path.write_bytes(path.read_bytes() + b"trailing")
        assert open_dataset(_table(case, tmp_path)).fingerprint() != old


def test_a_fingerprint_names_the_reading(tmp_path: Path) -> None:
    miniature.synthia(tmp_path)
    tables = [{"kind": "synthia", "root": str(tmp_path), "classes": c} for c in WITHOUT]
    assert len({open_dataset(t).fingerprint() for t in tables}) == 3


# --- what is wrong with a set -----------------------------------------------------------------


@EVERY_KIND
def test_a_missing_label(kind: str, tmp_path: Path) -> None:
    case = LABELLED[kind]
    data = _built(case, tmp_path)
    gone = _label_files(data)[-1]
    gone.unlink()
    with pytest.raises(ArtefactMismatch) as caught:
        open_dataset(_table(case, tmp_path, max_missing=0.0))
    text = str(caught.value)
    assert "1 labels below" in text and gone.stem in text and "max_missing" in text
    assert str(gone.parent)[: len(str(tmp_path))] in text
    rest = open_dataset(_table(case, tmp_path, max_missing=0.7))
    assert rest.names == tuple(case.names)[:-1]
    assert rest.facts()["missing_labels"] == 1
    assert rest.facts()["first_missing"][0] == case.names[-1]


def test_a_missing_image(tmp_path: Path) -> None:
    miniature.gta5(tmp_path)
    (tmp_path / "images/00002.png").unlink()
    table = {"kind": "gta5", "root": str(tmp_path)}
    with pytest.raises(ArtefactMismatch, match=r"1 images below .*00002.*24,941 pairs of 24,966"):
        open_dataset(table)
    rest = open_dataset(table | {"max_missing": 0.4})
    assert rest.names == ("00001", "00003") and rest.facts()["missing_images"] == 1


def test_more_than_a_fifth_of_the_translated_images(tmp_path: Path) -> None:
    _translated(tmp_path)
    table = _table(CASES["gta5-translated"], tmp_path)
    facts = open_dataset(table).facts()
    assert (facts["expected"], facts["missing_images"]) == (6, 1)
    (tmp_path / "translated/00001.jpg").unlink()
    with pytest.raises(ArtefactMismatch, match=r"of 6 frames, 2 are not complete.*At most 0\.2"):
        open_dataset(table)


@EVERY_KIND
def test_labels_of_another_size(kind: str, tmp_path: Path) -> None:
    case = LABELLED[kind]
    data = _built(case, tmp_path)
    path: Path = data.image_paths[0]
    miniature.write_image(path, 5, (miniature.HEIGHT, miniature.WIDTH - 8))
    with pytest.raises(ArtefactMismatch) as caught:
        open_dataset(_table(case, tmp_path))
    text = str(caught.value)
    assert f"{case.names[0]}: image 12x12, 12x20" in text and "max_mismatched" in text
    rest = open_dataset(_table(case, tmp_path, max_mismatched=1))
    assert rest.names == tuple(case.names)[1:]
    assert rest.facts()["mismatched"] == 1
    assert rest.facts()["first_mismatched"] == [f"{case.names[0]}: image 12x12, 12x20"]


def test_gta5_says_which_frames_others_leave_out(tmp_path: Path) -> None:
    miniature.gta5(tmp_path)
    miniature.write_image(tmp_path / "images/00001.png", 5, (5, 5))
    with pytest.raises(ArtefactMismatch, match="15188 and 17705"):
        open_dataset({"kind": "gta5", "root": str(tmp_path)})


@EVERY_KIND
def test_labels_outside_the_class_set(kind: str, tmp_path: Path) -> None:
    case = LABELLED[kind]
    data = _built(case, tmp_path)
    path = _label_files(data)[0]
    strange = miniature.label_map((0, 77, 200))
    miniature.write_grey(path, strange)
    with pytest.raises(ArtefactMismatch) as caught:
        open_dataset(_table(case, tmp_path))[0]
    pixels = int((strange != 0).sum())
    assert f"{path} holds the values 77, 200 ({pixels} pixels)" in str(caught.value)
    assert "expected 0 to " in str(caught.value)


def test_synthia_categories_above_8_bits(tmp_path: Path) -> None:
    miniature.synthia(tmp_path)
    maps = np.full((miniature.HEIGHT, miniature.WIDTH, 2), 976, np.uint16)
    (tmp_path / "GT/LABELS/0000000.png").write_bytes(miniature.png16(maps))
    with pytest.raises(ArtefactMismatch, match="category 976"):
        open_dataset({"kind": "synthia", "root": str(tmp_path)})[0]


def test_labels_that_were_made_colours(tmp_path: Path) -> None:
    miniature.gta5(tmp_path)
    miniature.write_image(tmp_path / "labels/00001.png", 1)
    with pytest.raises(ArtefactMismatch, match="Colours cannot be turned back"):
        open_dataset({"kind": "gta5", "root": str(tmp_path)})[0]


@EVERY_KIND
@pytest.mark.parametrize("which", ["image", "labels"])
def test_damaged_files(kind: str, which: str, tmp_path: Path) -> None:
    case = LABELLED[kind]
    data = _built(case, tmp_path)
    images: Sequence[Path] = data.image_paths
    path = images[0] if which == "image" else _label_files(data)[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ArtefactMismatch, match="truncated") as caught:
        data[0]
    assert str(path) in str(caught.value)
    path.write_bytes(b"")  # seen when the set is opened
    with pytest.raises(ArtefactMismatch, match="empty"):
        open_dataset(_table(case, tmp_path))
    path.unlink()
    with pytest.raises(ArtefactMismatch, match="missing"):
        data[0]


def test_weights_that_are_none(tmp_path: Path) -> None:
    miniature.pairs(tmp_path)
    table = {"kind": "pairs", "root": str(tmp_path), "images": "images", "run": "run",
             "weighted": True}  # fmt: skip
    miniature.write_grey(tmp_path / "run/confidence/a.png", miniature.label_map((0, 1)))
    with pytest.raises(ArtefactMismatch, match=r"a\.png.*16-bit grey PNG"):
        open_dataset(table)[0]
    (tmp_path / "run/confidence/a.png").unlink()
    with pytest.raises(ArtefactMismatch, match="1 weights below"):
        open_dataset(table)


# --- wrong layouts and tables -----------------------------------------------------------------


@EVERY_KIND
def test_another_layout(kind: str, tmp_path: Path) -> None:
    case = LABELLED[kind]
    (tmp_path / "photos/summer").mkdir(parents=True)
    (tmp_path / "photos/summer/cat.png").write_bytes(b"")
    with pytest.raises(UsageError) as caught:
        open_dataset(_table(case, tmp_path))
    text = str(caught.value)
    assert f"no folder {tmp_path}" in text
    assert "expected\nROOT" in text or "expected\nIMAGES" in text
    below = "no such folder" if kind == "gta5-translated" else "summer/\n      cat.png"
    assert "found\n" in text and below in text
    with pytest.raises(UsageError, match="no such folder"):
        open_dataset(_table(case, tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("case", "changes", "said"),
    [
        ("cityscapes target", {"labelled": True}, "opened with labelled = false"),
        ("cityscapes", {"split": "tran"}, "no folder .*leftImg8bit/tran"),
        ("cityscapes", {"ids": "labelTrainIds"}, "ids = 'labelIds'"),
        ("cityscapes", {"ids": "trainIds"}, "did you mean 'labelTrainIds'"),
        ("acdc night", {"condition": "nite"}, "did you mean 'night'"),
        ("acdc night", {"split": "test"}, "labelled = false"),
        ("acdc night", {"ids": "label"}, "known: labelIds"),
        ("dark-zurich", {"labelled": True}, "Only val has labels"),
        ("dark-zurich", {"time": "nigth"}, "did you mean 'night'"),
        ("bdd100k", {"split": "test"}, "labelled = false"),
        ("camvid day", {"split": "dask"}, "did you mean 'dusk'"),
        ("synthia-16, 2 channels", {"classes": "synthia-15"}, "known: cityscapes-19, synthia-13"),
        ("pairs", {"ids": "trian"}, "did you mean 'train'"),
        ("pairs", {"classes": "cityscapes19"}, "did you mean 'cityscapes-19'"),
        ("pairs", {"run": "run"}, "give it or them"),
        ("pairs", {"weighted": True}, "needs run"),
        ("pairs, unlabelled", {"weights": "run/confidence"}, "need labels"),
        ("gta5", {"max_missing": 1.5}, "expected a share"),
        ("gta5", {"max_mismatched": -1}, "0 or more"),
        ("gta5", {"max_mismatched": 1.5}, "expected a whole number"),
        ("gta5", {"limit": True}, "expected a whole number"),
        ("gta5", {"list": 3}, "expected text"),
        ("gta5", {"root": "$CADA_NO_SUCH_VARIABLE/gta5"}, "that variable is not set"),
        ("cityscapes", {"labelled": "no"}, "expected true or false"),
    ],
)
def test_tables_that_ask_for_what_is_not_there(
    case: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    CASES[case].build(tmp_path)
    with pytest.raises(UsageError, match=said):
        open_dataset(_table(CASES[case], tmp_path, **changes))


def test_files_without_the_ending_of_the_set(tmp_path: Path) -> None:
    miniature.cityscapes(tmp_path)
    for path in (tmp_path / "leftImg8bit/train").rglob("*.png"):
        path.rename(path.with_name(path.name.replace("_leftImg8bit", "")))
    with pytest.raises(
        UsageError, match=r"is called <frame>_leftImg8bit.png; found\n(.|\n)*aachen"
    ):
        open_dataset({"kind": "cityscapes", "root": str(tmp_path)})


def test_two_files_of_one_name(tmp_path: Path) -> None:
    miniature.gta5(tmp_path)
    miniature.write_image(tmp_path / "images/00001.jpg", 1)
    with pytest.raises(UsageError, match="both called '00001'"):
        open_dataset({"kind": "gta5", "root": str(tmp_path)})


@pytest.mark.parametrize("kind", [*LABELLED, "scenes"])
def test_unknown_keys_get_the_nearest_name(kind: str) -> None:
    with pytest.raises(UsageError, match=f"data set {kind}: unknown key 'limmit'.*'limit'"):
        open_dataset({"kind": kind, "limmit": 3})


def test_unknown_kinds_get_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"'gta-5'; known: acdc, .*did you mean 'gta5'"):
        open_dataset({"kind": "gta-5"})
    for table in ({}, {"kind": 5}):
        with pytest.raises(UsageError, match="needs kind = NAME; known: acdc"):
            open_dataset(table)
    with pytest.raises(UsageError, match="key 'root' is missing"):
        open_dataset({"kind": "gta5"})


def test_roots_with_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    miniature.gta5(tmp_path / "gta5")
    monkeypatch.setenv("CADA_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for root in ("$CADA_DATA/gta5", "~/gta5"):
        assert len(open_dataset({"kind": "gta5", "root": root})) == 3


def test_every_error_is_for_a_person(tmp_path: Path) -> None:
    """No error of a wrong root is an exception of Python's own."""
    (tmp_path / "file").write_text("no folder")
    for kind in LABELLED:
        with pytest.raises(CadaError):
            open_dataset(_table(LABELLED[kind], tmp_path / "file"))
