"""Were all four ASPP branches of a DeepLabV2 head trained, or only the first two? Asks the tensors.

Many projects return inside the loop that sums the branches, so branches 2 and 3 never meet data and
stay as they began: independent draws from N(0, 0.01). Summing them anyway costs one to two points
of mIoU and nothing fails. This file measures and decides; it loads nothing.

A branch W (C, channels, 3, 3) that data never touched has no structure: its classes are
uncorrelated, its nine taps are uncorrelated, and every class, tap and input channel carries the
same energy. One that was trained has all of these: a softmax loss pulls classes apart (its gradient
sums to zero over them), neighbouring taps see nearly the same features, and active channels move
more. PyTorch's SGD leaves a parameter without a gradient alone, weight decay included, so an unused
branch keeps its std of 0.01; but the tests do not depend on the scale, and a branch that a project
did decay without training it is still told apart. Each statistic is turned into a z value, which is
standard normal for a branch of independent normal draws.

How weak an update it sees, as the share of the branch's energy: from 3 % on if the update has a
common direction or likeness between taps, from 30 % on in the hardest case (512 independent
directions, nothing shared). Between 3 % and that it may be undecidable, which is an error and not a
wrong answer; below 2 % it may look untouched. Stochastic gradient descent at these projects' rates
on features of a random trunk, harder than any trained one, passed through "undecidable" from step 3
and was seen in all four branches at step 300; published files have 80 000 steps and more.

What it cannot see: a file whose two unused branches were taken from another, trained head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from cada_deploy.errors import ArtefactMismatch

from .models.deeplab import DILATIONS, HEAD_STD

Verdict = Literal["untrained", "trained", "undecidable"]

# Untouched: every |z| below 6. The largest of 30 000 z values of fresh branches was 4.3; some tails
# (chi-square, Tracy-Widom) are heavier than normal, which 6 leaves room for.
UNTOUCHED_Z = 6.0
# Trained: structure beyond 12. What lies between is not decided.
STRUCTURE_Z = 12.0
# A decayed branch may have shrunk; a structureless one that grew is nothing that we know.
GREW_Z = 6.0


@dataclass(frozen=True)
class AsppEvidence:
    """What was measured on one branch. The z values are standard normal for an untouched branch."""

    head: str  # layer5 or layer6
    branch: int
    weights: int  # how many
    mean: float
    std: float
    kurtosis: float
    z_mean: float
    z_std: float  # against 0.01
    z_kurtosis: float  # against 3
    z_classes: float  # correlation between classes
    z_taps: float  # correlation between the nine taps
    z_pairs: float  # correlation between the C x 9 pairs of class and tap
    z_spectrum: float  # their strongest common direction over input channels
    z_class_energy: float
    z_tap_energy: float
    z_channel_energy: float
    bias_reach: float  # largest |bias| over 1/sqrt(fan in); an untouched bias stays within 1
    verdict: Verdict

    @property
    def structure(self) -> float:
        """The strongest sign of training that does not depend on the scale."""
        return max(
            self.z_classes,
            self.z_taps,
            self.z_pairs,
            self.z_spectrum,
            self.z_class_energy,
            self.z_tap_energy,
            self.z_channel_energy,
        )

    def describe(self) -> str:
        scale = "" if abs(self.z_std) < UNTOUCHED_Z else f" (z {self.z_std:+.1f})"
        return (
            f"{self.head} branch {self.branch} (dilation {DILATIONS[self.branch]:2d}): "
            f"{self.verdict}; structure z {self.structure:.1f}, std {self.std:.6f}{scale}, mean "
            f"{self.mean:+.1e} (z {self.z_mean:+.1f}), kurtosis {self.kurtosis:.3f} "
            f"(z {self.z_kurtosis:+.1f}), bias reaches {self.bias_reach:.2f} of its initial bound"
        )


@dataclass(frozen=True)
class AsppDecision:
    """How many branches are summed, why, and what it rests on."""

    branches: int | None  # None: undecidable
    reason: str
    evidence: tuple[AsppEvidence, ...]

    def describe(self) -> str:
        found = "undecidable" if self.branches is None else f"{self.branches} of 4"
        lines = [f"ASPP branches that the tensors were trained with: {found}; {self.reason}"]
        return "\n  ".join([*lines, *(e.describe() for e in self.evidence)])


def branch_evidence(
    weight: torch.Tensor, bias: torch.Tensor, *, head: str = "layer5", branch: int = 0
) -> AsppEvidence:
    """Measures one branch. weight (C, channels, 3, 3), bias (C,)."""
    w = weight.detach().double()
    n = w.numel()
    flat = w.flatten()
    mean = flat.mean()
    centred = w - mean
    squares = centred * centred
    variance = squares.mean()
    if not float(variance) > 0:
        return _constant(head, branch, float(mean), bias, n // len(w))
    unit, energy = centred / variance.sqrt(), squares / variance
    kurtosis = float(energy.flatten().dot(energy.flatten()) / n)
    classes, channels, rows, columns = w.shape
    taps = rows * columns
    std = float(variance.sqrt())
    by_class, by_tap = unit.reshape(classes, -1), unit.reshape(-1, taps).T
    by_pair = unit.permute(0, 2, 3, 1).reshape(classes * taps, channels)
    pair_gram = by_pair @ by_pair.T
    z = {
        "z_mean": float(mean) / std * n**0.5,
        "z_std": (std / HEAD_STD - 1) * (2 * n) ** 0.5,
        "z_kurtosis": (kurtosis - 3) / (24 / n) ** 0.5,
        "z_classes": _correlation_z(by_class @ by_class.T, n // classes),
        "z_taps": _correlation_z(by_tap @ by_tap.T, n // taps),
        "z_pairs": _correlation_z(pair_gram, channels),
        "z_spectrum": _spectrum_z(pair_gram, channels),
        "z_class_energy": _evenness_z(energy.sum((1, 2, 3)), n // classes),
        "z_tap_energy": _evenness_z(energy.sum((0, 1)).flatten(), n // taps),
        "z_channel_energy": _evenness_z(energy.sum((0, 2, 3)), n // channels),
    }
    reach = float(bias.detach().double().abs().max()) * (n // classes) ** 0.5
    return AsppEvidence(
        head,
        branch,
        n,
        float(mean),
        std,
        kurtosis,
        **z,
        bias_reach=reach,
        verdict=_verdict(z, reach),
    )


def _constant(head: str, branch: int, mean: float, bias: torch.Tensor, fan_in: int) -> AsppEvidence:
    """All weights equal (zeroed, say): neither an initial branch nor a trained one."""
    reach = float(bias.detach().double().abs().max()) * fan_in**0.5
    nothing = dict.fromkeys(
        (
            "z_mean", "z_kurtosis", "z_classes", "z_taps", "z_pairs", "z_spectrum",
            "z_class_energy", "z_tap_energy", "z_channel_energy",
        ),
        0.0,
    )  # fmt: skip
    return AsppEvidence(
        head, branch, fan_in * len(bias), mean, 0.0, 0.0, z_std=-((2 * fan_in) ** 0.5), **nothing,
        bias_reach=reach, verdict="undecidable",
    )  # fmt: skip


def _correlation_z(gram: torch.Tensor, m: int) -> float:
    """gram (k, k) of k rows of m unit entries: m times the squared correlations is chi-square."""
    k = len(gram)
    if k < 2:
        return 0.0
    pairs = torch.triu(gram, diagonal=1) / m
    return _chi_square_z(float((pairs * pairs).sum()) * m, k * (k - 1) // 2)


def _spectrum_z(gram: torch.Tensor, m: int) -> float:
    """gram (k, k) of k rows of m unit entries: its largest eigenvalue, by Tracy and Widom's law.

    The most sensitive to a common direction: one with 0.3 % of the energy stands out.
    """
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    a, b = (len(gram) - 1) ** 0.5, m**0.5
    scaled = (largest - (a + b) ** 2) / ((a + b) * (1 / a + 1 / b) ** (1 / 3))
    return float((scaled + 1.2065) / 1.2680)  # the law's own mean and standard deviation


def _evenness_z(sums: torch.Tensor, m: int) -> float:
    """sums (k,) of m squared entries each, m expected: the spread of k chi-square variables."""
    k = len(sums)
    if k < 2:
        return 0.0
    spread = float(((sums - m) ** 2).sum()) / (2 * m)
    if k < 100:
        return _chi_square_z(spread, k - 1)
    # Few entries a channel (C x 9): a chi-square's own kurtosis widens the spread by 12/m.
    return float((spread - (k - 1)) / (k * (2 + 12 / m)) ** 0.5)


def _chi_square_z(value: float, k: int) -> float:
    """Wilson and Hilferty: the cube root of chi-square over k is nearly normal."""
    width = 2 / (9 * k)
    return float(((value / k) ** (1 / 3) - (1 - width)) / width**0.5)


def _verdict(z: Mapping[str, float], bias_reach: float) -> Verdict:
    structure = max(z[k] for k in z if k not in ("z_mean", "z_std", "z_kurtosis"))
    if structure > STRUCTURE_Z:
        return "trained"
    # A bias of another project's making may be larger; beyond its bound it is no sign of freshness.
    untouched = (
        structure < UNTOUCHED_Z
        and abs(z["z_mean"]) < UNTOUCHED_Z
        and abs(z["z_kurtosis"]) < UNTOUCHED_Z
        and z["z_std"] < GREW_Z
        and bias_reach < 1.001  # fp16 and bf16 files round up a little
    )
    return "untrained" if untouched else "undecidable"


def head_evidence(tensors: Mapping[str, torch.Tensor], head: str) -> tuple[AsppEvidence, ...]:
    """The four branches of `head` ("layer5", "layer6") in a state dict."""
    names = [f"{head}.conv2d_list.{k}" for k in range(len(DILATIONS))]
    return tuple(
        branch_evidence(tensors[f"{n}.weight"], tensors[f"{n}.bias"], head=head, branch=k)
        for k, n in enumerate(names)
    )


_PATTERNS: Mapping[tuple[Verdict, ...], int] = {
    ("trained", "trained", "untrained", "untrained"): 2,
    ("trained", "trained", "trained", "trained"): 4,
}


def decide(heads: Mapping[str, Sequence[AsppEvidence]], main: Sequence[str]) -> AsppDecision:
    """2 or 4 from the heads that make the scores (`main`); an auxiliary head must not contradict.

    An auxiliary head that was never trained says nothing; every head in `main` must speak.
    """
    evidence = tuple(e for branches in heads.values() for e in branches)
    votes = {name: _PATTERNS.get(tuple(e.verdict for e in heads[name])) for name in heads}
    for name in main:
        if votes[name] is None:
            return AsppDecision(None, f"{name} is {_pattern(heads[name])}", evidence)
    spoken = {name: vote for name, vote in votes.items() if vote is not None}
    if len(set(spoken.values())) > 1:
        said = " and ".join(f"{name} says {vote}" for name, vote in spoken.items())
        return AsppDecision(None, said, evidence)
    branches = spoken[main[0]]
    if branches == 2 and not all(_decayed_alike(heads[name]) for name in main):
        said = "branches 2 and 3 have no structure but unequal scales, which decay does not explain"
        return AsppDecision(None, said, evidence)
    reason = (
        "branches 2 and 3 are still independent draws from a normal distribution"
        if branches == 2
        else "all four carry structure that only training gives"
    )
    silent = [f"{n} (auxiliary) is {_pattern(heads[n])}" for n in votes if votes[n] is None]
    return AsppDecision(branches, "; ".join([reason, *silent]), evidence)


def _decayed_alike(branches: Sequence[AsppEvidence]) -> bool:
    """Idle branches began alike and shrank, if at all, by one schedule: their stds are equal.

    The logarithm of the ratio of two such stds has a standard error of 1/sqrt(weights).
    """
    first, second = branches[2], branches[3]
    return abs(math.log(first.std / second.std)) * math.sqrt(first.weights) < UNTOUCHED_Z


def _pattern(branches: Sequence[AsppEvidence]) -> str:
    verdicts = [e.verdict for e in branches]
    if set(verdicts) == {"untrained"}:
        return "untrained in all four branches (a network before its first step?)"
    return ", ".join(verdicts)


def undecidable(decision: AsppDecision, path: object) -> ArtefactMismatch:
    """The error that names the option, with everything that was measured."""
    return ArtefactMismatch(
        f"{path}: its tensors do not say whether 2 or 4 ASPP branches are summed: "
        f"{decision.reason}. Expected branches 0 and 1 trained, and 2 and 3 either both trained "
        "or both as they began. Give --aspp-branches 2 (AdaptSegNet, DACS, MaxSquare, BDL before "
        "July 2020) or 4 (BDL since, ADVENT, IntraDA, CLAN, CRST, FDA)\n  "
        + "\n  ".join(e.describe() for e in decision.evidence)
    )
