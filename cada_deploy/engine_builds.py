"""An engine exists only if it passed: build, gate, publish, under a lock, whole or not at all.

What is built and run is handed in as two functions, so this knows no TensorRT; a test plants
builders that give wrong engines. A plan that passed gets its manifest and then, if asked for, its
place under the final name; one that did not leaves nothing there.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cada_deploy import __version__, durable, engine_cache, engine_gates
from cada_deploy.engine_plans import (
    Build,
    Machine,
    Plan,
    PlanManifest,
    Profile,
    check_gpu,
    check_version,
    header_version,
    manifest_path,
    read_plan,
)
from cada_deploy.engines import Engine
from cada_deploy.errors import ArtefactMismatch
from cada_deploy.model_files import Model, check_classes


@dataclass(frozen=True)
class Built:
    """What a builder gives: the plan, and what it says of itself."""

    content: bytes
    flags: tuple[str, ...]
    hardware_compatibility: str


@dataclass(frozen=True)
class Opened:
    """A plan in memory, ready to be looked at."""

    engine: Engine
    inspected: str  # TensorRT's inspector JSON


@dataclass(frozen=True)
class Workshop:
    """The three things that only the engine's own file can do."""

    build: Callable[[], Built]
    run: Callable[[Plan], Opened]
    reference: Callable[[], Engine]  # ONNX Runtime on the CPU, on the same graph


@dataclass(frozen=True)
class Wanted:
    """Which engine: everything that decides it."""

    model: Model
    profile: Profile
    precision: str
    machine: Machine
    build: Build

    @property
    def place(self) -> Path:
        """Where it belongs: the name that was asked for, or the cache's."""
        if self.build.out is not None:
            return self.build.out
        name = engine_cache.key(
            self.model.sha256, self.machine, self.build.options, self.profile, self.precision
        )
        return engine_cache.folder() / f"{name}.engine"

    @property
    def cached(self) -> bool:
        return self.build.out is None


def made(wanted: Wanted, shop: Workshop) -> Plan:
    """The plan, from the cache or built now. Raises CheckFailed when it does not pass its gates."""
    place = wanted.place
    say = wanted.build.say
    waiting = f"another process builds {place.name}; waiting for it"
    with engine_cache.locked(place, lambda: say(waiting)):
        if wanted.cached and not wanted.build.rebuild and (kept := _kept(wanted, place)):
            return kept
        return _built(wanted, shop, place)


def _kept(wanted: Wanted, place: Path) -> Plan | None:
    """The cache's plan if it is whole and verified; anything else is built anew and said."""
    if not place.exists():
        return None
    try:
        plan = read_plan(place)
        check_version(plan, wanted.machine.tensorrt)
        check_gpu(plan, wanted.machine)
        if plan.manifest is None or not plan.manifest.verified:
            raise ArtefactMismatch(f"{place} was not finished")
    except ArtefactMismatch as error:
        wanted.build.say(f"building anew: {error}")
        return None
    return plan


def _built(wanted: Wanted, shop: Workshop, place: Path) -> Plan:
    say, name = wanted.build.say, wanted.model.path.name
    frames = engine_gates.chosen_frames(wanted.build.images, wanted.profile.optimum)
    say(f"building a TensorRT engine for {name} on {wanted.machine.gpu}: {wanted.profile.text}")
    started = time.monotonic()
    built = shop.build()
    seconds = time.monotonic() - started
    say(f"built in {seconds:.0f} s; checking it on {frames.text}")
    plan = _examined(wanted, shop, _described(wanted, built, place, frames.text, seconds), frames)
    assert plan.manifest is not None
    faults = engine_gates.known_faults(wanted.machine)
    engine_gates.require(plan.manifest.gates, f"the engine of {name}", faults)
    for fault in faults:
        say(
            f"reported of TensorRT {wanted.machine.tensorrt}: {fault}. This engine passed its gates"
        )
    _publish(plan, wanted)
    return plan


def _described(wanted: Wanted, built: Built, place: Path, frames: str, seconds: float) -> Plan:
    """The plan with a manifest without gates: not verified."""
    model, digest = wanted.model, hashlib.sha256(built.content).hexdigest()
    manifest = PlanManifest(
        plan_sha256=digest,
        plan_bytes=len(built.content),
        model=model.path.name,
        model_sha256=model.sha256,
        spec=model.spec,
        input=model.input,
        output=model.output,
        machine=wanted.machine,
        options=wanted.build.options,
        profile=wanted.profile,
        precision=wanted.precision,
        flags=built.flags,
        hardware_compatibility=built.hardware_compatibility,
        gates=(),
        frames=frames,
        build_seconds=round(seconds, 1),
        cada_deploy=__version__,
    )
    version = header_version(place, built.content)
    return Plan(place, built.content, digest, version, manifest)


def _examined(wanted: Wanted, shop: Workshop, plan: Plan, frames: engine_gates.Frames) -> Plan:
    """The plan with what the gates found, and with the class set that its scores have."""
    assert plan.manifest is not None
    opened, model = shop.run(plan), wanted.model
    spec = check_classes(model.path, model.spec, opened.engine.classes, model.classes_named)
    gates = engine_gates.examine(
        opened.engine,
        shop.reference(),
        engine_gates.batches(frames, spec, wanted.profile),
        wanted.precision,
        opened.inspected,
        spec.output.meaning,
    )
    return replace(plan, manifest=replace(plan.manifest, spec=spec, gates=gates))


def _publish(plan: Plan, wanted: Wanted) -> None:
    """Put the two files in place, the manifest last: a plan without one is not used."""
    assert plan.manifest is not None
    mode = engine_cache.PRIVATE_FILE if wanted.cached else None
    place, manifest = plan.path, manifest_path(plan.path)
    durable.make_folder(place.parent)
    durable.remove(manifest)  # the old one does not speak of the new plan
    durable.write_file(place, plan.content, mode)
    durable.write_file(manifest, durable.json_bytes(plan.manifest.to_json()), mode)
    durable.sync_folder(place.parent)
    wanted.build.say(f"kept as {place} ({len(plan.content) / 1e6:.1f} MB)")
