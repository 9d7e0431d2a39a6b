"""Loads the checkpoints that people already have into the networks of `training/models`, strictly.

    loaded = load_checkpoint(Path("GTA5_150000.pth"))
    print(loaded.describe())

Which network a file is, how many ASPP branches it sums and how many classes it has are told from
its tensors and said aloud; what cannot be told is an error that names the option. How images are
prepared cannot be told: that is the preset's business. Nothing here runs code from a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from cada_deploy.errors import ArtefactMismatch, UsageError

from . import aspp_evidence, checkpoint_reader, families
from .aspp_evidence import AsppDecision, AsppEvidence
from .families import Architecture, Family
from .load_report import LoadReport, Mismatch
from .models.deeplab import HEADS, DeepLab, DeepLabV2

__all__ = [
    "AsppDecision",
    "AsppEvidence",
    "LoadReport",
    "Loaded",
    "load_backbone",
    "load_checkpoint",
]

Tensors = dict[str, torch.Tensor]
Branches = Literal["auto", 2, 4]

COUNTER = "num_batches_tracked"
PREFIXES = ("module.", "_orig_mod.", "Scale.", "model.", "net.", "network.")
INIT_PREFIX = "Scale."
_HEADS = ("layer5.", "layer6.", "fc.")
# Where projects keep the weights, best first; an average of weights (EMA) only when alone.
_WEIGHT_KEYS = ("state_dict", "model_state", "model_state_dict", "model", "net", "network")
_AVERAGE = ("ema", "teacher")
_OPTIMISER = ("optimizer", "optimiser", "scheduler", "param_groups")


@dataclass(frozen=True)
class Loaded:
    """A network in inference mode, and everything that is known about where it came from."""

    model: nn.Module  # (N, 3, H, W) -> scores (N, C, h, w)
    architecture: Architecture
    family: Family
    report: LoadReport
    evidence: AsppDecision | None  # None for a network without ASPP branches to decide on
    sha256: str  # of the file

    @property
    def classes(self) -> int:
        return self.architecture.classes

    @property
    def output_stride(self) -> int:
        return self.architecture.output_stride

    def describe(self) -> str:
        """For the terminal: what it is, what met, and why so many branches are summed."""
        lines = [
            f"{self.architecture.name}, {self.classes} classes: {self.family.projects}",
            *([f"note: {self.family.note}"] if self.family.note else []),
            self.report.text(),
            *([self.evidence.describe()] if self.evidence else []),
        ]
        return "\n".join(lines)


def load_checkpoint(
    path: Path | str,
    *,
    arch: str = "auto",
    aspp_branches: Branches = "auto",
    classes: int | None = None,
    allow_partial: bool = False,
) -> Loaded:
    """The network that a checkpoint file holds, in eval mode and float32.

    arch: "auto" or one of families.ARCHITECTURES. classes: how many are expected, None for as many
    as the head has. allow_partial: load what fits and leave the rest as freshly made (recorded).
    Raises UsageError for a bad option or path, ArtefactMismatch for a file that does not fit.
    """
    path = Path(path)
    if aspp_branches not in ("auto", 2, 4):
        raise UsageError(f"--aspp-branches is {aspp_branches!r}; expected auto, 2 or 4")
    contents = checkpoint_reader.read(path)
    found = _state_dict(contents.tree, path)
    if INIT_PREFIX in found.stripped and arch == "auto":
        raise ArtefactMismatch(
            f"{path} holds initial weights (every name begins with {INIT_PREFIX!r}), not a model "
            "trained for a task; expected a trained checkpoint. Use it to start a training "
            "(load_backbone), or state what it is with --arch"
        )
    architecture = families.detect(_shapes(found.tensors), path, arch)
    if classes is not None and architecture.classes != classes:
        raise ArtefactMismatch(
            f"{path} has a head for {architecture.classes} classes; expected {classes}. Name its "
            "own class set with --classes, or give a checkpoint that was trained for this one"
        )
    report = _compared(found, architecture, path, contents.layout, allow_partial)
    tensors = _usable(found.tensors, report.matched, path)
    decision: AsppDecision | None = None
    if isinstance(architecture, DeepLabV2):
        decision = _aspp(tensors, architecture, report)
        branches = _chosen(decision, aspp_branches, path)
        architecture = replace(architecture, aspp_branches=branches)
        if decision.branches not in (None, branches):
            note = f"{branches} ASPP branches were asked for; its tensors say {decision.branches}"
            report = replace(report, notes=(*report.notes, note))
    model = _filled(architecture, tensors)
    family = families.family_of(architecture)
    return Loaded(model, architecture, family, report, decision, contents.sha256)


def load_backbone(path: Path | str, network: nn.Module) -> LoadReport:
    """Copies a file's trunk into `network` and leaves its head as it is: how trainings begin.

    Takes the `Scale.` files of these projects, torchvision's ResNet-101, and any checkpoint of a
    DeepLabV2. Every tensor of the trunk must be there, or nothing is copied. Raises as
    load_checkpoint does, and UsageError for a network that has no such trunk.
    """
    path = Path(path)
    if not isinstance(network, DeepLab):
        raise UsageError(
            f"{type(network).__name__} has no trunk of ResNet-101 for {path}; expected a DeepLabV2 "
            "network. The small network begins from random weights: leave the weights away"
        )
    contents = checkpoint_reader.read(path)
    found = _state_dict(contents.tree, path)
    shapes = _shapes(found.tensors)
    families.refuse_strangers(shapes, path)
    trunk = {n: t for n, t in found.tensors.items() if not n.startswith(_HEADS)}
    wanted = {n: t for n, t in network.state_dict().items() if not n.startswith(_HEADS)}
    notes = (*found.notes, *_backbone_notes(found.tensors, contents.sha256))
    kept = replace(found, tensors=trunk, notes=notes)
    report = _matched(kept, _shapes(wanted), contents.layout, allow_partial=False)
    _refuse_incomplete(report, path, "the trunk of DeepLabV2-ResNet101")
    with torch.no_grad():
        for name, tensor in _usable(trunk, report.matched, path).items():
            wanted[name].copy_(tensor)
    return report


def _backbone_notes(tensors: Tensors, sha256: str) -> Iterator[str]:
    if "fc.weight" in tensors:
        yield (
            "torchvision's layout: its ResNet-101 was trained with the stride on the 3x3 "
            "convolution and on RGB / 255 with ImageNet's statistics; here the stride is on the "
            "1x1 and the preset decides the input. Feed it as imagenet-rgb, and let batch norm "
            "use batch statistics (train), so that the first steps adapt to the stride"
        )
    dropped = [n for n in tensors if n.startswith(_HEADS)]
    if dropped:
        yield f"the head was dropped: {len(dropped)} tensors of {_roots(dropped)}"
    # The authors of AdaptSegNet call theirs ImageNet and COCO, the paper says ImageNet.
    yield f"SHA-256 {sha256}; no file says whether it has seen ImageNet alone or COCO too"


def _roots(names: list[str]) -> str:
    return ", ".join(sorted({n.partition(".")[0] for n in names}))


@dataclass(frozen=True)
class _Found:
    """The weights in a file, with what was taken off on the way to them."""

    tensors: Tensors
    nesting: tuple[str, ...]
    stripped: tuple[str, ...]
    notes: tuple[str, ...]


def _state_dict(tree: object, path: Path) -> _Found:
    candidates = list(_dicts_of_tensors(tree))
    if not candidates:
        raise ArtefactMismatch(f"{path} {_no_weights(tree)}; expected a model's state dict")
    most = max(len(t) for _, t in candidates)
    # The weights are the larger dictionaries; prototypes or statistics beside them are small.
    rivals = [c for c in candidates if 2 * len(c[1]) >= most]
    rivals.sort(key=lambda c: _preference(c[0]))
    nesting, tensors = rivals[0]
    notes = [
        f"the file also holds {' > '.join(other) or 'its top level'} ({len(t)} tensors), not used"
        for other, t in rivals[1:]
    ]
    beside = [n for n in tensors if n.startswith(("optimiser.", "optimizer."))]
    if beside and len(beside) < len(tensors):
        notes.append(f"{len(beside)} tensors of an optimiser were left out")
        tensors = {n: t for n, t in tensors.items() if n not in set(beside)}
    bare, stripped = _without_prefixes(tensors)
    return _Found(bare, nesting, stripped, tuple(notes))


def _dicts_of_tensors(
    tree: object, nesting: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Tensors]]:
    """Every dictionary with named tensors in it, optimisers' left out."""
    if not isinstance(tree, Mapping) or len(nesting) > 4:
        return
    named = {k: v for k, v in tree.items() if isinstance(k, str)}
    tensors = {k: v for k, v in named.items() if isinstance(v, torch.Tensor)}
    if tensors:
        yield nesting, tensors
    for key, value in named.items():
        if not any(word in key.lower() for word in _OPTIMISER):
            yield from _dicts_of_tensors(value, (*nesting, key))


def _preference(nesting: tuple[str, ...]) -> tuple[bool, int, tuple[str, ...]]:
    last = nesting[-1] if nesting else ""
    average = any(word in part.lower() for part in nesting for word in _AVERAGE)
    rank = _WEIGHT_KEYS.index(last) if last in _WEIGHT_KEYS else len(_WEIGHT_KEYS)
    return average, rank, nesting


def _no_weights(tree: object) -> str:
    if not isinstance(tree, Mapping):
        return f"holds {_article(type(tree).__name__)}, not a dictionary"
    keys = [str(k) for k in tree]
    if any(word in k.lower() for k in keys for word in _OPTIMISER):
        return (
            f"holds the state of an optimiser and no weights ({', '.join(keys[:5])}): it resumes a "
            "training, and the model was saved to another file, which is the one to give"
        )
    return f"holds no named tensors (its keys: {', '.join(keys[:6]) or 'none'})"


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _without_prefixes(tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """Takes off what wrappers put before every name: DataParallel, torch.compile, multi-scale."""
    stripped: list[str] = []
    while common := next((p for p in PREFIXES if all(n.startswith(p) for n in tensors)), None):
        tensors = {n[len(common) :]: t for n, t in tensors.items()}
        stripped.append(common)
    return tensors, tuple(stripped)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _compared(
    found: _Found, architecture: Architecture, path: Path, layout: str, allow_partial: bool
) -> LoadReport:
    with torch.device("meta"):
        wanted = _shapes(architecture.build().state_dict())
    report = _matched(found, wanted, layout, allow_partial)
    if not allow_partial:
        _refuse_incomplete(report, path, architecture.name)
    if not report.matched:
        raise ArtefactMismatch(f"{path}: no tensor fits {architecture.name}; {report.text()}")
    return report


def _matched(
    found: _Found, wanted: Mapping[str, tuple[int, ...]], layout: str, allow_partial: bool
) -> LoadReport:
    shapes = _shapes(found.tensors)
    both = [n for n in wanted if n in shapes]
    lacking = [n for n in wanted if n not in shapes]
    matched = tuple(n for n in both if shapes[n] == wanted[n])
    dtypes = [found.tensors[n].dtype for n in matched if not n.endswith(COUNTER)]
    converted = [str(d).removeprefix("torch.") for d in dtypes if d != torch.float32]
    return LoadReport(
        layout=layout,
        matched=matched,
        missing=tuple(n for n in lacking if not n.endswith(COUNTER)),
        unexpected=tuple(n for n in shapes if n not in wanted),
        mismatched=tuple(Mismatch(n, shapes[n], wanted[n]) for n in both if shapes[n] != wanted[n]),
        filled=sum(n.endswith(COUNTER) for n in lacking),
        nesting=found.nesting,
        stripped=found.stripped,
        converted={d: converted.count(d) for d in sorted(set(converted))},
        notes=found.notes,
        allow_partial=allow_partial,
    )


def _refuse_incomplete(report: LoadReport, path: Path, what: str) -> None:
    if not report.complete:
        raise ArtefactMismatch(
            f"{path} does not fit {what}; expected every tensor to match. {report.text()}\n"
            "Is it another network, or was it cut from a larger model? --allow-partial loads what "
            "fits and leaves the rest untrained"
        )


def _usable(tensors: Tensors, names: tuple[str, ...], path: Path) -> Tensors:
    """Copies in float32 (counters in int64). Raises for a tensor that no network can compute with.

    Copies, because a file's tensors may share their storage with one another.
    """
    return {name: _checked(name, tensors[name].detach(), path) for name in names}


def _checked(name: str, tensor: torch.Tensor, path: Path) -> torch.Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise ArtefactMismatch(
            f"{path}: {name} is a sparse, quantised or empty tensor; expected plain numbers. Save "
            "the network before it was quantised"
        )
    if name.endswith(COUNTER):
        return tensor.to(torch.int64, copy=True)
    if not tensor.is_floating_point():
        raise ArtefactMismatch(
            f"{path}: {name} holds {str(tensor.dtype).removeprefix('torch.')}; expected floating "
            "point. Save the network before it was quantised"
        )
    values = tensor.to(torch.float32, copy=True).contiguous()
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ArtefactMismatch(
            f"{path}: {name} has {bad} of {values.numel()} weights that are NaN or infinite; "
            "expected numbers. The training diverged or the file is damaged: take an earlier one"
        )
    if name.endswith("running_var") and float(values.min()) < 0:
        raise ArtefactMismatch(
            f"{path}: {name} has a negative variance; expected 0 or more. The file is damaged"
        )
    return values


def _aspp(tensors: Tensors, architecture: DeepLabV2, report: LoadReport) -> AsppDecision:
    head = HEADS[architecture.head]
    absent = {n.partition(".")[0] for n in (*report.missing, *(m.name for m in report.mismatched))}
    present = [n for n in head.classifiers if n not in absent]
    heads = {n: aspp_evidence.head_evidence(tensors, n) for n in present}
    if not set(head.main) <= set(present):
        evidence = tuple(e for branches in heads.values() for e in branches)
        return AsppDecision(None, f"parts of {', '.join(head.main)} are missing", evidence)
    return aspp_evidence.decide(heads, head.main)


def _chosen(decision: AsppDecision, asked: Branches, path: Path) -> int:
    if asked != "auto":
        return asked
    if decision.branches is None:
        raise aspp_evidence.undecidable(decision, path)
    return decision.branches


def _filled(architecture: Architecture, tensors: Tensors) -> nn.Module:
    """The network with these tensors; what they lack is freshly made, from a fixed seed."""
    with torch.device("meta"):
        model = architecture.build()
    wanted = model.state_dict()
    lacking = [n for n in wanted if n not in tensors]
    if all(n.endswith(COUNTER) for n in lacking):
        fresh = {n: torch.zeros(wanted[n].shape, dtype=torch.int64) for n in lacking}
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fresh = architecture.build().state_dict()
    # A new plain dictionary: the file's own carries `_metadata`, whose version decides whether
    # PyTorch forgives missing counters.
    model.load_state_dict({**{n: fresh[n] for n in lacking}, **tensors}, strict=True, assign=True)
    return model.eval()
