"""Clocks, power and energy during a measurement, from whatever this machine has; changes nothing.

NVML (a GPU's energy counter, power, clocks, temperature; package nvidia-ml-py), the INA3221 rails
of a Jetson (hwmon or the older iio files) and RAPL (a processor's energy counters). Every rail is
stated by its own name and never added to another: VDD_IN already holds what VDD_CPU draws. All of
them count the whole chip or board, whoever uses it. What cannot be read is said, with the reason.
"""

from __future__ import annotations

import math
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import pynvml
except ImportError:
    pynvml = None

EVERY_S = 0.1

READ_ERRORS = (OSError, ValueError)


@dataclass(frozen=True)
class Gauge:
    """Something that has a value now: watts, MHz, degrees."""

    name: str
    unit: str
    read: Callable[[], float]


@dataclass(frozen=True)
class Counter:
    """Joules since some moment; starts again at 0 after `wraps_at`."""

    name: str
    read: Callable[[], float]
    wraps_at: float | None = None


Meter = Gauge | Counter


@dataclass(frozen=True)
class Meters:
    """What can be read here, and what cannot and why."""

    readable: tuple[Meter, ...]
    missing: tuple[str, ...] = ()


@dataclass
class Reading:
    """The values of one meter over a measurement. seconds are of a clock that never goes back."""

    meter: Meter
    seconds: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    lost: str = ""

    def take(self, now_s: float) -> None:
        if self.lost:
            return
        try:
            value = self.meter.read()
        except READ_ERRORS as error:
            self.lost = str(error) or type(error).__name__
            return
        self.seconds.append(now_s)
        self.values.append(value)

    @property
    def joules(self) -> float | None:
        """Counters: what they counted. Gauges in watts: the integral (trapezoids). Else None."""
        if len(self.values) < 2:
            return None
        steps = zip(self.values, self.values[1:])
        if isinstance(self.meter, Counter):
            wrap = self.meter.wraps_at
            return math.fsum(
                b - a if b >= a or wrap is None else b - a + wrap for a, b in steps
            )  # read every EVERY_S, so that it cannot wrap twice between two readings
        if self.meter.unit != "W":
            return None
        times = zip(self.seconds, self.seconds[1:])
        return math.fsum((a + b) / 2 * (t1 - t0) for (a, b), (t0, t1) in zip(steps, times))

    def to_json(self, frames: int) -> dict[str, Any]:
        joules, span = self.joules, self.seconds[-1] - self.seconds[0] if self.seconds else 0.0
        row: dict[str, Any] = {"name": self.meter.name, "samples": len(self.values)}
        if self.lost:
            row["lost"] = self.lost
        if isinstance(self.meter, Gauge) and self.values:
            row["unit"] = self.meter.unit
            row["min"], row["max"] = min(self.values), max(self.values)
            row["mean"] = math.fsum(self.values) / len(self.values)
        if joules is not None and span > 0:
            row["joules"] = joules
            row["mean_watts"] = joules / span
            row["joules_per_frame"] = joules / frames
        return row


@contextmanager
def sampled(meters: Meters, every_s: float = EVERY_S) -> Iterator[list[Reading]]:
    """Read all meters at the start, every `every_s` seconds, and at the end of the block."""
    readings = [Reading(meter) for meter in meters.readable]
    stop = threading.Event()

    def take() -> None:
        for reading in readings:
            reading.take(time.monotonic())

    def loop() -> None:
        while not stop.wait(every_s):
            take()

    take()
    thread = threading.Thread(target=loop, name="cada-power", daemon=True)
    if readings:
        thread.start()
    try:
        yield readings
    finally:
        stop.set()
        if readings:
            thread.join()
        take()


def meters(device: str = "cpu", root: Path = Path("/")) -> Meters:
    """Everything readable on this machine; a GPU's only for a cuda device."""
    found: list[Meter] = []
    missing: list[str] = []
    for part in (_nvml(device), _rails(root), _rapl(root)):
        found += part.readable
        missing += part.missing
    return Meters(tuple(found), tuple(missing))


# --- a Jetson's rails --------------------------------------------------------------------------


def _rails(root: Path) -> Meters:
    """INA3221: three channels a chip, through hwmon (JetPack 5 and later) or iio (before)."""
    sys = root / "sys"
    places = [
        *sys.glob("bus/i2c/drivers/ina3221*/*/hwmon/hwmon*"),
        *(p for p in sys.glob("class/hwmon/hwmon*") if _text(p / "name").startswith("ina3221")),
    ]
    chips = sorted({path.resolve() for path in places})
    gauges = [gauge for chip in chips for gauge in _hwmon_rails(chip)]
    for chip in sorted(sys.glob("bus/i2c/drivers/ina3221*/*/iio:device*")):
        gauges += _iio_rails(chip)
    return Meters(tuple(gauges))


def _hwmon_rails(chip: Path) -> Iterator[Gauge]:
    """in*_input is in mV, curr*_input in mA (kernel: Documentation/hwmon/ina3221.rst)."""
    for channel in (1, 2, 3):
        label = _text(chip / f"in{channel}_label") or f"{chip.name} channel {channel}"
        volts, amperes = chip / f"in{channel}_input", chip / f"curr{channel}_input"
        off = _text(chip / f"in{channel}_enable") == "0"
        if label != "NC" and not off and volts.exists() and amperes.exists():

            def watts(volts: Path = volts, amperes: Path = amperes) -> float:
                return _number(volts) * 1e-3 * _number(amperes) * 1e-3

            yield Gauge(f"rail {label}", "W", watts)


def _iio_rails(chip: Path) -> Iterator[Gauge]:
    for channel in (0, 1, 2):
        label, power = _text(chip / f"rail_name_{channel}"), chip / f"in_power{channel}_input"
        if label and power.exists():
            yield Gauge(f"rail {label}", "W", _scaled(power, 1e-3))


# --- RAPL --------------------------------------------------------------------------------------


def _rapl(root: Path) -> Meters:
    """Packages and their DRAM (intel-rapl also serves AMD); cores and uncore are inside them."""
    found: list[Meter] = []
    missing = []
    for zone in sorted((root / "sys/class/powercap").glob("*-rapl:*")):
        name = _text(zone / "name")
        if not (name.startswith("package") or name == "dram"):
            continue
        energy = zone / "energy_uj"
        try:
            _number(energy)
        except READ_ERRORS as error:
            missing.append(f"rapl {name}: {energy} cannot be read ({error})")
            continue
        wrap = _text(zone / "max_energy_range_uj")
        number = zone.name.partition(":")[2]
        wraps_at = float(wrap) * 1e-6 if wrap.isdecimal() else None
        found.append(Counter(f"rapl {number} {name}", _scaled(energy, 1e-6), wraps_at))
    return Meters(tuple(found), tuple(missing))


# --- NVML --------------------------------------------------------------------------------------


def _nvml(device: str) -> Meters:
    if not device.startswith("cuda"):
        return Meters(())
    if pynvml is None:
        return Meters((), ("nvml: the package nvidia-ml-py is not installed",))
    try:
        handle = nvml_handle(pynvml, device)
    except (pynvml.NVMLError, LookupError) as error:
        return Meters((), (f"nvml: {error}",))
    return _nvml_meters(pynvml, handle)


def nvml_handle(nvml: Any, device: str) -> Any:
    """NVML's handle of `cuda:N`. NVML numbers GPUs by PCI bus and CUDA need not, so with several
    GPUs only a stated order tells which one it is. Raises LookupError when it cannot be told."""
    nvml.nvmlInit()
    ordinal = int(device.partition(":")[2] or 0)
    visible = [p.strip() for p in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if p]
    if ordinal < len(visible) and not visible[ordinal].isdecimal():
        return nvml.nvmlDeviceGetHandleByUUID(visible[ordinal])
    if nvml.nvmlDeviceGetCount() == 1:
        return nvml.nvmlDeviceGetHandleByIndex(0)
    if os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        raise LookupError(
            f"which of several GPUs {device} is cannot be told; set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
    return nvml.nvmlDeviceGetHandleByIndex(int(visible[ordinal]) if visible else ordinal)


def _nvml_meters(nvml: Any, handle: Any) -> Meters:
    """Each meter is tried once: older GPUs lack the energy counter, Jetsons most of them."""
    candidates: list[Meter] = [
        Counter("gpu (NVML)", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) * 1e-3),
        Gauge("gpu power (NVML)", "W", lambda: nvml.nvmlDeviceGetPowerUsage(handle) * 1e-3),
        Gauge(
            "gpu SM clock",
            "MHz",
            lambda: float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        ),
        Gauge(
            "gpu memory clock",
            "MHz",
            lambda: float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        ),
        Gauge(
            "gpu temperature",
            "°C",
            lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        ),
    ]
    found, missing = [], []
    for meter in candidates:
        guarded = _without_nvml_errors(nvml, meter)
        try:
            guarded.read()
            found.append(guarded)
        except READ_ERRORS as error:
            missing.append(f"{meter.name}: {error}")
    return Meters(tuple(found), tuple(missing))


def _without_nvml_errors(nvml: Any, meter: Meter) -> Meter:
    def read() -> float:
        try:
            return meter.read()
        except nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error

    if isinstance(meter, Counter):
        return Counter(meter.name, read, meter.wraps_at)
    return Gauge(meter.name, meter.unit, read)


# --- settings that a reader of the figures must know -------------------------------------------


def settings(device: str = "cpu", root: Path = Path("/")) -> dict[str, Any]:
    """Governor and clocks of the processor, a Jetson's board and power mode, the GPU's limits."""
    cpus = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"))
    found: dict[str, Any] = {
        "cpu_governors": sorted({g for c in cpus if (g := _text(c / "scaling_governor"))}),
        "cpu_mhz": _mhz(cpus, "scaling_cur_freq"),
        "cpu_max_mhz": _mhz(cpus, "scaling_max_freq"),
        "board": _text(root / "proc/device-tree/model").rstrip("\0") or None,
        "nvpmodel": _nvpmodel(root),
        "gpu": _gpu_settings(device),
    }
    return found


def _mhz(cpus: Sequence[Path], name: str) -> list[float] | None:
    """[lowest, highest] over the cores; None where the kernel tells no clock."""
    values = [float(t) / 1e3 for c in cpus if (t := _text(c / name)).isdecimal()]
    return [min(values), max(values)] if values else None


def _nvpmodel(root: Path) -> str | None:
    tool = root / "usr/sbin/nvpmodel"
    if not tool.exists():
        return None
    try:
        asked = subprocess.run(
            [str(tool), "-q"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvpmodel -q failed: {error}"
    return " ".join((asked.stdout or asked.stderr).split())


def _gpu_settings(device: str) -> dict[str, Any] | None:
    if not device.startswith("cuda") or pynvml is None:
        return None
    try:
        handle = nvml_handle(pynvml, device)
    except (pynvml.NVMLError, LookupError) as error:
        return {"unknown": str(error)}
    asked: dict[str, Callable[[], Any]] = {
        "name": lambda: pynvml.nvmlDeviceGetName(handle),
        "driver": lambda: pynvml.nvmlSystemGetDriverVersion(),
        "power_limit_watts": lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) * 1e-3,
        "max_sm_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "slowed_by": lambda: slowdowns(
            pynvml, pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        ),
    }
    found = {}
    for name, ask in asked.items():
        try:
            found[name] = ask()
        except pynvml.NVMLError as error:
            found[name] = f"unknown: {error}"
    return found


def slowdowns(nvml: Any, reasons: int) -> list[str]:
    """The reasons that make a figure smaller than the chip; idle clocks are not one."""
    names = (
        "SwPowerCap",
        "HwSlowdown",
        "SwThermalSlowdown",
        "HwThermalSlowdown",
        "HwPowerBrakeSlowdown",
    )
    return [n for n in names if reasons & int(getattr(nvml, f"nvmlClocksEventReason{n}"))]


def _text(path: Path) -> str:
    """A small file's content without the line end; "" when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _scaled(path: Path, factor: float) -> Callable[[], float]:
    return lambda: _number(path) * factor


def _number(path: Path) -> float:
    return float(path.read_text(encoding="ascii"))
