"""Checkpoints of a stage: safetensors and the same facts as JSON, whole or not at all, never code.

`state.safetensors` is everything that decides the steps to come; `model.safetensors`, written when
a stage is done, is the network alone, which `cada-deploy export` and engine `torch` take.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from cada_deploy import durable
from cada_deploy.errors import ArtefactMismatch

STATE = "state.safetensors"
MODEL = "model.safetensors"
FACTS = "facts.json"
_METADATA = "cada_deploy"
SCHEMA = 1

Facts = dict[str, Any]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StageFolder:
    """One stage's files. key: the digest of everything that decides its result."""

    root: Path
    key: str

    @property
    def model(self) -> Path:
        return self.root / MODEL

    def is_done(self) -> bool:
        """Raises ArtefactMismatch when the folder is another stage's."""
        facts = self.facts()
        return bool(facts.get("done")) and self.model.exists()

    def facts(self) -> Facts:
        path = self.root / FACTS
        if not path.exists():
            return {}
        found: Facts = durable.read_json(path)
        if found.get("key") != self.key:
            raise ArtefactMismatch(
                f"{self.root} holds another training (recipe, data or start differ); choose "
                "another --out, or remove that folder"
            )
        return found

    def save_state(self, tensors: Tensors, step: int, facts: Facts) -> None:
        """The previous checkpoint survives whatever goes wrong."""
        told = {**facts, "schema": SCHEMA, "key": self.key, "step": step}
        write(self.root / STATE, tensors, told)
        durable.write_json(self.root / FACTS, told)

    def state(self) -> tuple[Tensors, int] | None:
        """(tensors, steps taken), or None at the beginning."""
        path = self.root / STATE
        if not path.exists():
            return None
        tensors, facts = read(path)
        if facts.get("key") != self.key:
            raise ArtefactMismatch(f"{path} is of another training; remove it or its folder")
        return tensors, int(facts["step"])

    def finish(self, model: Tensors, facts: Facts) -> None:
        """The network alone; the state, which is three times as large, goes."""
        told = {**facts, "schema": SCHEMA, "key": self.key, "done": True}
        write(self.model, model, told)
        durable.write_json(self.root / FACTS, told)
        durable.remove(self.root / STATE)


def read(path: Path) -> tuple[Tensors, Facts]:
    """Raises ArtefactMismatch for a file that is not one of these."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[_METADATA])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except Exception as error:  # safetensors, JSON and OS errors alike: say which file it is
        raise ArtefactMismatch(
            f"{path} is not a checkpoint of cada-train, or is damaged ({error}); remove it to "
            "train this stage again"
        ) from error


def key_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write(path: Path, tensors: Tensors, facts: Facts) -> None:
    durable.make_folder(path.parent)
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    data = save(whole, {_METADATA: json.dumps(facts, sort_keys=True)})
    durable.write_file(path, data)
    durable.sync_folder(path.parent)
