"""Manifests: they survive JSON whatever they hold, and one that was changed is no manifest."""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cada_deploy import durable
from cada_deploy.image_files import ImageRef
from cada_deploy.manifests import (
    OutputFile,
    Rejected,
    RunFolder,
    ScoredImage,
    ScoredShard,
    SelectedImage,
    SelectedShard,
    digest_of,
    sealed,
)
from cada_deploy.shards import Shard, plan
from cada_deploy.statistics import HISTOGRAM_BINS, ClassStatistics

NAMES = st.binary(min_size=1, max_size=30)
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
SIZES = st.tuples(st.integers(1, 65535), st.integers(1, 65535))
REASONS = st.builds(Rejected, st.sampled_from(["corrupt", "empty"]), st.text())
BIG = st.integers(0, 1 << 90)
SECONDS = st.dictionaries(
    st.text(string.ascii_lowercase), st.integers(0, 10**9).map(lambda n: n / 1e6), max_size=3
)
RUN = "a" * 64


@st.composite
def evidence(draw: st.DrawFn) -> ClassStatistics:
    histogram = np.zeros((2, HISTOGRAM_BINS), object)
    rows = st.lists(BIG, min_size=2, max_size=2)
    return ClassStatistics(
        "mean", draw(rows), [draw(rows), draw(rows)], histogram, draw(BIG), draw(BIG)
    )


SCORED_IMAGES = st.one_of(
    st.builds(
        ScoredImage, NAMES, BIG, DIGESTS, SIZES, SIZES, DIGESTS,
        st.lists(st.text(), max_size=2).map(tuple),
    ),
    st.builds(ScoredImage, NAMES, BIG, DIGESTS, rejected=REASONS),
)  # fmt: skip
SCORED = st.builds(
    ScoredShard, st.just(RUN), st.integers(0, 999_999),
    st.lists(SCORED_IMAGES, max_size=3).map(tuple), evidence(),
    st.one_of(st.none(), st.tuples(st.just("000000.safetensors"), BIG)), SECONDS,
)  # fmt: skip
FILES = st.lists(st.builds(OutputFile, NAMES, BIG, DIGESTS), max_size=3).map(tuple)
THRESHOLDS = st.one_of(
    st.none(),
    st.lists(
        st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)), max_size=3
    ).map(tuple),
)
SELECTED_IMAGES = st.builds(
    SelectedImage, NAMES, FILES, BIG, THRESHOLDS, st.one_of(st.none(), REASONS)
)
COUNTS = st.lists(BIG, max_size=3).map(tuple)
SELECTED = st.builds(
    SelectedShard, st.just(RUN), st.just("b" * 64), st.integers(0, 999_999),
    st.lists(SELECTED_IMAGES, max_size=3).map(tuple), COUNTS, COUNTS, BIG, BIG,
    st.dictionaries(st.text(), st.integers(0, 1 << 53), max_size=2), SECONDS,
)  # fmt: skip


@given(SCORED)
def test_a_scored_shard_survives_json(shard: ScoredShard) -> None:
    data = json.loads(durable.json_bytes(shard.to_json()))
    assert ScoredShard.from_json(data) == shard


@given(SELECTED)
def test_a_selected_shard_survives_json(shard: SelectedShard) -> None:
    data = json.loads(durable.json_bytes(shard.to_json()))
    assert SelectedShard.from_json(data) == shard


def folder_with(root: Path, shard: SelectedShard) -> RunFolder:
    folder = RunFolder(root)
    durable.make_folder(folder.shards)
    durable.write_json(folder.selected_manifest(shard.index), sealed(shard.to_json()))
    return folder


def label(root: Path, name: bytes = b"labels/a\xff.png", data: bytes = b"12345") -> OutputFile:
    path = RunFolder(root).file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return OutputFile(name, len(data), "c" * 64)


def shard_of(*files: OutputFile) -> SelectedShard:
    return SelectedShard(RUN, "rule", 3, (SelectedImage(b"a", files, 7),), (7,), (7,), 0, 0)


def test_a_selection_is_done_when_run_rule_and_files_are_there(tmp_path: Path) -> None:
    shard = shard_of(label(tmp_path))
    folder = folder_with(tmp_path, shard)
    assert folder.selected(3, RUN, "rule") == shard
    assert folder.selected(3, RUN, "another rule") is None
    assert folder.selected(3, "another run", "rule") is None
    assert folder.selected(4, RUN, "rule") is None
    (tmp_path / "labels" / "a\udcff.png").write_bytes(b"1234")
    assert folder.selected(3, RUN, "rule") is None
    (tmp_path / "labels" / "a\udcff.png").unlink()
    assert folder.selected(3, RUN, "rule") is None


def test_no_changed_byte_passes_for_the_manifest(tmp_path: Path) -> None:
    shard = shard_of(label(tmp_path))
    folder = folder_with(tmp_path, shard)
    path = folder.selected_manifest(3)
    whole = path.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 7)
        path.write_bytes(bytes(damaged))
        assert folder.selected(3, RUN, "rule") in (None, shard), at
    for cut in range(0, len(whole) - 1, 11):
        path.write_bytes(whole[:cut])
        assert folder.selected(3, RUN, "rule") is None


def test_a_scored_shard_is_done_when_its_score_file_has_its_size(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    durable.make_folder(folder.shards)
    durable.make_folder(folder.scores)
    zero = ClassStatistics.zero(2, "mean")
    shard = ScoredShard(RUN, 0, (), zero, ("000000.safetensors", 4))
    durable.write_json(folder.scored_manifest(0), sealed(shard.to_json()))
    assert folder.scored(0, RUN) is None
    folder.score_file(0).write_bytes(b"1234")
    assert folder.scored(0, RUN) == shard
    assert folder.scored(0, "b" * 64) is None
    without = ScoredShard(RUN, 1, (), zero, None)
    durable.write_json(folder.scored_manifest(1), sealed(without.to_json()))
    assert folder.scored(1, RUN) == without


def test_a_manifest_covers_its_own_shard_only() -> None:
    images = [ImageRef(Path(n), n.encode(), 1) for n in "abcde"]
    shards = plan(images, 2)
    assert [len(s.images) for s in shards] == [2, 2, 1]
    assert [s.name for s in shards] == ["000000", "000001", "000002"]
    manifest = ScoredShard(
        RUN, 1, (ScoredImage(b"c", 1), ScoredImage(b"d", 1)), ClassStatistics.zero(2, "mean"), None
    )
    assert [manifest.covers(s) for s in shards] == [False, True, False]
    assert not manifest.covers(Shard(1, (images[3], images[2])))
    assert not manifest.covers(Shard(2, (images[2], images[3])))


def test_digests_do_not_depend_on_the_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": [1.5, None]}) == digest_of({"b": [1.5, None], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": "1"})
    with pytest.raises(TypeError):
        digest_of({"a": b"bytes"})
