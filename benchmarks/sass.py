"""Machine code of a cubin, read: basic blocks, loops, and how many instructions a turn issues.

`nvdisasm -c` prints one instruction a line with labels; blocks end at labels and branches. Ways
without a call are preferred: the call is the division's slow path, which ordinary numbers do not
take. Nothing runs here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

# Cycles a warp instruction occupies its unit, per quarter of a multiprocessor of compute capability
# 9.0: 32 lanes over the results per cycle in the CUDA C++ programming guide's table of arithmetic
# throughput (128, 64 and 16 a multiprocessor), a quarter each.
_FP32 = ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2")
_SLOW = ("MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV", "REDUX", "VOTE", "MATCH")
_UNIFORM = ("U", "R2UR", "S2UR")
_MEMORY = ("LD", "ST", "ATOM", "RED", "CCTL", "MEMBAR")
_CONTROL = ("BRA", "EXIT", "RET", "CALL", "BSSY", "BSYNC", "NOP", "WARPSYNC", "BRX", "YIELD")
_MULTIPLY = ("IMAD", "IMUL", "XMAD")
CYCLES = {"fp32": 1, "integer": 2, "multiply": 2, "slow": 8}

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.?[\w$]+):")
_TARGET = re.compile(r"`\((\.?[\w$]+)\)")
_FUNCTION = re.compile(r"^\s*\.section\s+\.text\.([\w$]+),")


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str | None
    opcode: str  # with its modifiers, FFMA.FTZ
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def unit(self) -> str:
        """fp32, integer, multiply, slow, memory, control or uniform."""
        name = self.name
        if name.startswith(_CONTROL):
            return "control"
        if name.startswith(_MEMORY):
            return "memory"
        if name.startswith(_UNIFORM):
            return "uniform"
        if name.startswith(_MULTIPLY):
            return "multiply"
        if name in _SLOW:
            return "slow"
        return "fp32" if name.startswith(_FP32) else "integer"


@dataclass
class Block:
    """Instructions that are all issued when the first one is."""

    instructions: list[Instruction] = field(default_factory=list)
    next: set[int] = field(default_factory=set)  # indices of blocks

    def count(self, name: str) -> int:
        return sum(i.name == name for i in self.instructions)

    @property
    def cost(self) -> int:
        return len(self.instructions) + 1000 * self.count("CALL")


@dataclass(frozen=True)
class Loop:
    header: int
    blocks: frozenset[int]
    latches: frozenset[int]


@dataclass(frozen=True)
class Function:
    name: str
    blocks: tuple[Block, ...]

    def loops(self) -> list[Loop]:
        """Natural loops: a branch back to a block of lower index, and all that leads to it."""
        latches: dict[int, set[int]] = {}
        for k, block in enumerate(self.blocks):
            for target in block.next:
                if target <= k:
                    latches.setdefault(target, set()).add(k)
        return [
            Loop(header, frozenset(self._body(header, ends)), frozenset(ends))
            for header, ends in latches.items()
            if ends != {header} or len(self.blocks[header].instructions) > 1  # the trap at the end
        ]

    def _body(self, header: int, latches: Iterable[int]) -> set[int]:
        before: dict[int, list[int]] = {}
        for k, block in enumerate(self.blocks):
            for target in block.next:
                before.setdefault(target, []).append(k)
        body, left = {header}, list(latches)
        while left:
            k = left.pop()
            if k not in body:
                body.add(k)
                left += before.get(k, [])
        return body

    def busiest_loop(self) -> Loop:
        """The one whose own blocks, those in no smaller loop, hold most FFMA."""
        loops = sorted(self.loops(), key=lambda loop: len(loop.blocks))
        fused: Counter[int] = Counter()
        for k, block in enumerate(self.blocks):
            innermost = next((n for n, loop in enumerate(loops) if k in loop.blocks), None)
            if innermost is not None:
                fused[innermost] += block.count("FFMA")
        if not fused or not max(fused.values()):
            raise LookupError(f"{self.name} has no loop with arithmetic in it")
        return loops[max(fused, key=lambda n: fused[n])]

    def cheapest_turn(self, loop: Loop, through: Iterable[int] = ()) -> list[Instruction]:
        """The instructions of the shortest way from the loop's header back to it that passes all
        blocks of `through`, in their order in the code."""
        stops = [loop.header, *sorted(set(through) - {loop.header})]
        way: list[int] = [loop.header]
        for stop in stops[1:]:
            way += self._shortest(way[-1], {stop}, loop.blocks, {loop.header})[1:]
        way += self._shortest(way[-1], set(loop.latches), loop.blocks, {loop.header})[1:]
        return [i for k in way for i in self.blocks[k].instructions]

    def cheapest_way(self, stops: Sequence[int]) -> list[Instruction]:
        """The instructions from the first of these blocks up to the last, which is not counted."""
        way = [stops[0]]
        for stop in stops[1:]:
            way += self._shortest(way[-1], {stop}, set(range(len(self.blocks))), set())[1:]
        return [i for k in way[:-1] for i in self.blocks[k].instructions]

    def _shortest(
        self, start: int, ends: set[int], within: Set[int], avoided: set[int]
    ) -> list[int]:
        """Dijkstra over blocks by cost."""
        best: dict[int, tuple[int, list[int]]] = {start: (0, [start])}
        done: set[int] = set()
        while left := [k for k in best if k not in done]:
            k = min(left, key=lambda n: best[n][0])
            if k in ends:
                return best[k][1]
            done.add(k)
            for target in (self.blocks[k].next & within) - avoided:
                cost = best[k][0] + self.blocks[target].cost
                if target not in best or cost < best[target][0]:
                    best[target] = (cost, [*best[k][1], target])
        raise LookupError(f"{self.name}: no way from block {start} to {sorted(ends)}")


def by_unit(instructions: Iterable[Instruction]) -> dict[str, int]:
    return dict(sorted(Counter(i.unit for i in instructions).items()))


def busiest_unit_cycles(instructions: Iterable[Instruction]) -> int:
    """Cycles of the unit that is busy longest. IMAD shares the FP32 unit's heavy half with FFMA
    and is counted as a unit of its own, which flatters."""
    counts = Counter(i.unit for i in instructions)
    return max(counts[unit] * cycles for unit, cycles in CYCLES.items())


def functions(listing: str) -> dict[str, Function]:
    """The functions of a listing of `nvdisasm -c`, by name."""
    parts: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in listing.splitlines():
        if found := _FUNCTION.match(line):
            current = parts.setdefault(found[1], [])
        elif line.lstrip().startswith(".section"):
            current = None
        elif current is not None:
            current.append(line)
    return {name: _function(name, lines) for name, lines in parts.items()}


def _function(name: str, lines: list[str]) -> Function:
    blocks, labels = [Block()], {}
    barriers: dict[str, str] = {}  # BSSY's label, where its BSYNC goes on
    for line in lines:
        if found := _LABEL.match(line):
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[found[1]] = len(blocks) - 1
            continue
        found = _LINE.search(line)
        if not found:
            continue
        made = Instruction(int(found[1], 16), found[2], found[3], found[4])
        blocks[-1].instructions.append(made)
        if made.name in ("BRA", "EXIT", "RET", "BRX", "BSYNC"):
            blocks.append(Block())
    if not blocks[-1].instructions:
        blocks.pop()
    for k, block in enumerate(blocks):
        for made in block.instructions:
            if made.name == "BSSY":
                register = made.operands.partition(",")[0].strip()
                barriers[register] = _TARGET.search(made.operands)[1]  # type: ignore[index]
        block.next = _after(k, block.instructions[-1], labels, barriers, len(blocks))
    return Function(name, tuple(blocks))


def _after(
    k: int, last: Instruction, labels: dict[str, int], barriers: dict[str, str], count: int
) -> set[int]:
    found = set()
    always = last.guard is None and "UP" not in last.operands and last.opcode != "BRA.DIV"
    target = _TARGET.search(last.operands)
    if last.name == "BRA" and target and target[1] in labels:
        found.add(labels[target[1]])
    if last.name == "BSYNC":
        label = barriers.get(last.operands.strip())
        if label in labels:
            found.add(labels[label])
    ends = last.name in ("EXIT", "RET", "BRX") or (last.name in ("BRA", "BSYNC") and found)
    if not (ends and always) and k + 1 < count:
        found.add(k + 1)
    return found


def disassembler() -> Path | None:
    """nvdisasm on the PATH, or the one that the package nvidia-cuda-nvdisasm installs."""
    on_path = shutil.which("nvdisasm")
    if on_path:
        return Path(on_path)
    packaged = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    return next(iter(sorted(packaged.glob("*/bin/nvdisasm"), reverse=True)), None)


def disassembled(cubin: Path) -> str:
    tool = disassembler()
    if tool is None:
        raise FileNotFoundError("nvdisasm is missing; pip install nvidia-cuda-nvdisasm")
    return subprocess.run(
        [str(tool), "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
