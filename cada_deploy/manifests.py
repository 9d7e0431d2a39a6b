"""Shard manifests: what is done. A manifest is written last and is the truth about its shard.

`NNNNNN.scored.json` lists what each image was (or why it was refused), the shard's statistics and
its score file. `NNNNNN.selected.json` lists the labels that were cut with one rule. A manifest of
another run or rule, or one whose files are gone or have another size, counts as not done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cada_deploy import durable
from cada_deploy.durable import name_from_json, name_to_json
from cada_deploy.errors import ArtefactMismatch
from cada_deploy.model_spec import Size
from cada_deploy.shards import Shard
from cada_deploy.statistics import ClassStatistics

SCHEMA = 1
_SEAL = "manifest_sha256"

Seconds = Mapping[str, float]  # by stage


@dataclass(frozen=True)
class Rejected:
    """Why an input got no label: a reason from rejections.REASONS, and what exactly was found."""

    reason: str
    detail: str


@dataclass(frozen=True)
class ScoredImage:
    """One input of a shard. For a rejected one, only name, bytes and the reason are sure."""

    relative: bytes
    size_bytes: int
    sha256: str = ""
    image_size: Size | None = None
    input_size: Size | None = None
    scores_sha256: str = ""
    notices: tuple[str, ...] = ()
    rejected: Rejected | None = None

    def to_json(self) -> dict[str, Any]:
        base = {**name_to_json(self.relative), "bytes": self.size_bytes, "sha256": self.sha256}
        if self.rejected:
            return {**base, "rejected": vars(self.rejected)}
        return {
            **base,
            "image_size": list(self.image_size or ()),
            "input_size": list(self.input_size or ()),
            "scores_sha256": self.scores_sha256,
            "notices": list(self.notices),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ScoredImage:
        relative, size, digest = name_from_json(dict(data)), int(data["bytes"]), str(data["sha256"])
        if "rejected" in data:
            why = Rejected(str(data["rejected"]["reason"]), str(data["rejected"]["detail"]))
            return cls(relative, size, digest, rejected=why)
        return cls(
            relative,
            size,
            digest,
            _size(data["image_size"]),
            _size(data["input_size"]),
            str(data["scores_sha256"]),
            tuple(str(n) for n in data["notices"]),
        )


def _size(values: Sequence[int]) -> Size:
    height, width = values
    return int(height), int(width)


@dataclass(frozen=True)
class ScoredShard:
    """score_file is (name, bytes) below OUT/scores, or None when the cache is off."""

    run_id: str
    index: int
    images: tuple[ScoredImage, ...]
    statistics: ClassStatistics
    score_file: tuple[str, int] | None
    seconds: Seconds = field(default_factory=dict)

    def covers(self, shard: Shard) -> bool:
        """Whether these are that shard's images (run.json's shard size can be damaged too)."""
        names = [image.relative for image in self.images]
        return self.index == shard.index and names == [ref.relative for ref in shard.images]

    def to_json(self) -> dict[str, Any]:
        name, size = self.score_file or (None, None)
        return {
            "schema": SCHEMA,
            "run_id": self.run_id,
            "shard": self.index,
            "images": [image.to_json() for image in self.images],
            "statistics": self.statistics.to_json(),
            "scores": None if name is None else {"file": name, "bytes": size},
            "seconds": {k: round(v, 6) for k, v in self.seconds.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ScoredShard:
        scores = data["scores"]
        return cls(
            str(data["run_id"]),
            int(data["shard"]),
            tuple(ScoredImage.from_json(i) for i in data["images"]),
            ClassStatistics.from_json(data["statistics"]),
            None if scores is None else (str(scores["file"]), int(scores["bytes"])),
            {str(k): float(v) for k, v in data["seconds"].items()},
        )


@dataclass(frozen=True)
class OutputFile:
    """A file below OUT: its path relative to OUT, its size and digest."""

    relative: bytes
    size_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {**name_to_json(self.relative), "bytes": self.size_bytes, "sha256": self.sha256}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OutputFile:
        return cls(name_from_json(dict(data)), int(data["bytes"]), str(data["sha256"]))


@dataclass(frozen=True)
class SelectedImage:
    """The files written for one image, and per-class thresholds when they are the image's own."""

    relative: bytes
    files: tuple[OutputFile, ...]
    selected_pixels: int
    thresholds: tuple[float | None, ...] | None = None
    rejected: Rejected | None = None

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            **name_to_json(self.relative),
            "files": [f.to_json() for f in self.files],
            "selected_pixels": self.selected_pixels,
        }
        if self.thresholds is not None:
            data["thresholds"] = list(self.thresholds)
        if self.rejected:
            data["rejected"] = vars(self.rejected)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SelectedImage:
        why = data.get("rejected")
        thresholds = data.get("thresholds")
        return cls(
            name_from_json(dict(data)),
            tuple(OutputFile.from_json(f) for f in data["files"]),
            int(data["selected_pixels"]),
            None if thresholds is None else tuple(thresholds),
            None if why is None else Rejected(str(why["reason"]), str(why["detail"])),
        )


@dataclass(frozen=True)
class SelectedShard:
    """Labels of one shard under one rule. predicted and selected are pixels per class."""

    run_id: str
    rule_digest: str
    index: int
    images: tuple[SelectedImage, ...]
    predicted: tuple[int, ...]
    selected: tuple[int, ...]
    invalid: int
    masked: int
    notices: Mapping[str, int] = field(default_factory=dict)
    seconds: Seconds = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "run_id": self.run_id,
            "rule_digest": self.rule_digest,
            "shard": self.index,
            "images": [image.to_json() for image in self.images],
            "predicted": list(self.predicted),
            "selected": list(self.selected),
            "invalid_pixels": self.invalid,
            "masked_pixels": self.masked,
            "notices": dict(sorted(self.notices.items())),
            "seconds": {k: round(v, 6) for k, v in self.seconds.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SelectedShard:
        return cls(
            str(data["run_id"]),
            str(data["rule_digest"]),
            int(data["shard"]),
            tuple(SelectedImage.from_json(i) for i in data["images"]),
            tuple(int(n) for n in data["predicted"]),
            tuple(int(n) for n in data["selected"]),
            int(data["invalid_pixels"]),
            int(data["masked_pixels"]),
            {str(k): int(v) for k, v in data["notices"].items()},
            {str(k): float(v) for k, v in data["seconds"].items()},
        )


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run lies below OUT."""

    root: Path

    @property
    def labels(self) -> Path:
        return self.root / "labels"

    @property
    def scores(self) -> Path:
        return self.root / "scores"

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    def scored_manifest(self, index: int) -> Path:
        return self.shards / f"{index:06d}.scored.json"

    def selected_manifest(self, index: int) -> Path:
        return self.shards / f"{index:06d}.selected.json"

    def score_file(self, index: int) -> Path:
        return self.scores / f"{index:06d}.safetensors"

    def file(self, relative: bytes) -> Path:
        """A path below OUT from its recorded bytes."""
        return self.root / relative.decode(errors="surrogateescape")

    def scored(self, index: int, run_id: str) -> ScoredShard | None:
        """The shard's manifest if it is done in this run and its score file is whole."""
        found: ScoredShard | None = _read(self.scored_manifest(index), ScoredShard)
        if found is None or found.run_id != run_id:
            return None
        if found.score_file is None:
            return found
        name, size = found.score_file
        return found if _has_size(self.scores / name, size) else None

    def selected(self, index: int, run_id: str, rule_digest: str) -> SelectedShard | None:
        """The shard's manifest if its labels were cut with this rule and are all there."""
        found: SelectedShard | None = _read(self.selected_manifest(index), SelectedShard)
        if found is None or (found.run_id, found.rule_digest) != (run_id, rule_digest):
            return None
        files = [f for image in found.images for f in image.files]
        if not all(_has_size(self.file(f.relative), f.size_bytes) for f in files):
            return None
        return found


def _read(path: Path, kind: Any) -> Any:
    """A manifest, or None when it is missing or damaged (then the shard is simply done again)."""
    try:
        return kind.from_json(_unsealed(durable.read_json(path)))
    except (FileNotFoundError, ArtefactMismatch, KeyError, TypeError, ValueError):
        return None


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """With its own digest: a manifest is the truth about its shard, so one that was changed or
    damaged must not pass for it."""
    return {**manifest, _SEAL: digest_of(dict(manifest))}


def _unsealed(data: Any) -> dict[str, Any]:
    """Raises ArtefactMismatch when the content is not what was sealed."""
    content = {k: v for k, v in data.items() if k != _SEAL} if isinstance(data, dict) else {}
    if not content or data.get(_SEAL) != digest_of(content):
        raise ArtefactMismatch("the manifest was changed or damaged")
    return content


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, keys sorted: how run ids and rule digests are made."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
