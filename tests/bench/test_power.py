"""Readers of rails, counters and clocks, on sysfs trees laid out as the kernel documents them
(Documentation/hwmon/ina3221.rst, Documentation/power/powercap) and on a stand-in for pynvml. No
Jetson and no GPU was behind any of this."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cada_deploy.bench import power
from cada_deploy.bench.power import Counter, Gauge, Meters, Reading, meters, sampled, settings


def write(root: Path, **files: str | int) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n", encoding="ascii")


def values(found: Meters) -> dict[str, float]:
    return {meter.name: meter.read() for meter in found.readable}


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    """A Jetson Orin NX: one INA3221 under its driver and again under class/hwmon, one channel not
    connected."""
    chip = tmp_path / "sys/devices/platform/c240000.i2c/i2c-1/1-0040/hwmon/hwmon1"
    write(
        chip, name="ina3221", in1_label="VDD_IN", in1_input=5000, curr1_input=1400, in1_enable=1,
        in2_label="VDD_CPU_GPU_CV", in2_input=5016, curr2_input=336, in2_enable=1,
        in3_label="NC", in3_input=0, curr3_input=0, in4_input=3, curr4_input=0,
    )  # fmt: skip
    driver = tmp_path / "sys/bus/i2c/drivers/ina3221"
    driver.mkdir(parents=True)
    (driver / "1-0040").symlink_to(chip.parents[1])
    hwmon = tmp_path / "sys/class/hwmon"
    hwmon.mkdir(parents=True)
    (hwmon / "hwmon1").symlink_to(chip)
    other = tmp_path / "sys/class/hwmon/hwmon0"
    write(other, name="nvme", in1_input=3300, curr1_input=100)
    return tmp_path


def test_the_rails_of_a_jetson(orin: Path) -> None:
    found = values(meters("cpu", orin))
    assert found == pytest.approx({"rail VDD_IN": 7.0, "rail VDD_CPU_GPU_CV": 1.685376})


def test_a_rail_that_is_switched_off_is_not_read(orin: Path) -> None:
    chip = next(orin.glob("sys/devices/**/hwmon1"))
    write(chip, in2_enable=0)
    assert list(values(meters("cpu", orin))) == ["rail VDD_IN"]


def test_the_rails_of_an_older_jetson(tmp_path: Path) -> None:
    write(
        tmp_path / "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0",
        rail_name_0="POM_5V_IN", in_power0_input=2500, rail_name_1="POM_5V_GPU", in_power1_input=40,
    )  # fmt: skip
    found = values(meters("cpu", tmp_path))
    assert found == pytest.approx({"rail POM_5V_IN": 2.5, "rail POM_5V_GPU": 0.04})


@pytest.fixture
def rapl(tmp_path: Path) -> Path:
    caps = tmp_path / "sys/class/powercap"
    write(caps / "intel-rapl:0", name="package-0", energy_uj=1_000_000,
          max_energy_range_uj=262_143_328_850)  # fmt: skip
    write(caps / "intel-rapl:0:0", name="core", energy_uj=5)
    write(caps / "intel-rapl:0:1", name="dram", energy_uj=2_000_000, max_energy_range_uj=65_000_000)
    write(caps / "intel-rapl:1", name="psys", energy_uj=7)
    return tmp_path


def test_rapl_packages_and_dram_and_nothing_that_is_inside_them(rapl: Path) -> None:
    found = meters("cpu", rapl)
    assert values(found) == {"rapl 0 package-0": 1.0, "rapl 0:1 dram": 2.0}
    assert [m.wraps_at for m in found.readable if isinstance(m, Counter)] == pytest.approx(
        [262_143.32885, 65.0]
    )


def test_a_counter_that_may_not_be_read_is_said_with_the_reason(rapl: Path) -> None:
    energy = rapl / "sys/class/powercap/intel-rapl:0/energy_uj"
    energy.unlink()
    energy.symlink_to("/proc/1/mem" if os.geteuid() else "/nowhere")
    found = meters("cpu", rapl)
    assert list(values(found)) == ["rapl 0:1 dram"]
    assert "package-0" in found.missing[0] and "cannot be read" in found.missing[0]


def test_a_counter_that_wraps_counts_on() -> None:
    reading = Reading(Counter("c", lambda: 0.0, wraps_at=100.0))
    reading.values, reading.seconds = [90.0, 99.0, 4.0, 10.0], [0.0, 1.0, 2.0, 4.0]
    row = reading.to_json(frames=5)
    assert row["joules"] == 9 + 5 + 6
    assert row["mean_watts"] == 5 and row["joules_per_frame"] == 4


def test_watts_are_integrated_and_clocks_are_not() -> None:
    watts = Reading(Gauge("rail", "W", lambda: 0.0))
    watts.values, watts.seconds = [10.0, 20.0, 20.0], [0.0, 1.0, 3.0]
    row = watts.to_json(frames=11)
    assert row["joules"] == 15 + 40 and row["joules_per_frame"] == 5
    clock = Reading(Gauge("clock", "MHz", lambda: 0.0))
    clock.values, clock.seconds = [1000.0, 2000.0], [0.0, 1.0]
    row = clock.to_json(frames=1)
    assert row["mean"] == 1500 and "joules" not in row


def test_meters_are_read_before_after_and_in_between() -> None:
    with sampled(Meters((Gauge("one", "W", lambda: 2.0),)), every_s=0.01) as readings:
        time.sleep(0.1)
    (reading,) = readings
    assert len(reading.values) >= 4
    assert reading.joules == pytest.approx(2.0 * (reading.seconds[-1] - reading.seconds[0]))


def test_a_meter_that_fails_on_the_way_says_so_and_ends_nothing() -> None:
    left = iter([1.0, 1.0])

    def read() -> float:
        try:
            return next(left)
        except StopIteration:
            raise OSError(19, "No such device") from None

    with sampled(Meters((Gauge("gone", "W", read),)), every_s=0.01) as readings:
        time.sleep(0.1)
    row = readings[0].to_json(1)
    assert "No such device" in row["lost"] and row["samples"] == 2


def test_an_empty_machine_has_no_meter(tmp_path: Path) -> None:
    assert meters("cpu", tmp_path) == Meters(())
    found = settings("cpu", tmp_path)
    assert found == {
        "cpu_governors": [], "cpu_mhz": None, "cpu_max_mhz": None, "board": None, "nvpmodel": None,
        "gpu": None,
    }  # fmt: skip


def test_governor_clocks_board_and_power_mode(tmp_path: Path) -> None:
    for core, (mhz, governor) in enumerate([(1190400, "schedutil"), (729600, "performance")]):
        write(
            tmp_path / f"sys/devices/system/cpu/cpu{core}/cpufreq", scaling_governor=governor,
            scaling_cur_freq=mhz, scaling_max_freq=1984000,
        )  # fmt: skip
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson Orin NX\0")
    tool = tmp_path / "usr/sbin/nvpmodel"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\necho 'NV Power Mode: MAXN'\necho 0\n")
    tool.chmod(0o755)
    found = settings("cpu", tmp_path)
    assert found["cpu_governors"] == ["performance", "schedutil"]
    assert found["cpu_mhz"] == [729.6, 1190.4] and found["cpu_max_mhz"] == [1984, 1984]
    assert found["board"] == "NVIDIA Jetson Orin NX"
    assert found["nvpmodel"] == "NV Power Mode: MAXN 0"


# --- NVML --------------------------------------------------------------------------------------


class NvmlError(Exception):
    pass


def stand_in(count: int = 1, **overrides: Any) -> Any:
    """The calls of pynvml that are used, with the units that NVML documents (mW, mJ, MHz)."""

    def unsupported(*_: Any) -> Any:
        raise NvmlError("Not Supported")

    calls: dict[str, Any] = {
        "NVMLError": NvmlError,
        "NVML_CLOCK_SM": 1,
        "NVML_CLOCK_MEM": 2,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: count,
        "nvmlDeviceGetHandleByIndex": lambda k: f"index {k}",
        "nvmlDeviceGetHandleByUUID": lambda uuid: f"uuid {uuid}",
        "nvmlDeviceGetTotalEnergyConsumption": lambda h: 5_000,
        "nvmlDeviceGetPowerUsage": lambda h: 250_000,
        "nvmlDeviceGetClockInfo": lambda h, kind: {1: 1980, 2: 3201}[kind],
        "nvmlDeviceGetTemperature": unsupported,
        "nvmlDeviceGetName": lambda h: "a GPU",
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetEnforcedPowerLimit": lambda h: 700_000,
        "nvmlDeviceGetMaxClockInfo": lambda h, kind: 1980,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda h: 0x25,
        "nvmlClocksEventReasonSwPowerCap": 0x4,
        "nvmlClocksEventReasonHwSlowdown": 0x8,
        "nvmlClocksEventReasonSwThermalSlowdown": 0x20,
        "nvmlClocksEventReasonHwThermalSlowdown": 0x40,
        "nvmlClocksEventReasonHwPowerBrakeSlowdown": 0x80,
    }
    return SimpleNamespace(**{**calls, **overrides})


def test_a_gpus_meters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(power, "pynvml", stand_in())
    found = meters("cuda:0", tmp_path)
    assert values(found) == {
        "gpu (NVML)": 5.0, "gpu power (NVML)": 250.0, "gpu SM clock": 1980.0,
        "gpu memory clock": 3201.0,
    }  # fmt: skip
    assert found.missing == ("gpu temperature: NVML: Not Supported",)
    gpu = settings("cuda:0", tmp_path)["gpu"]
    assert gpu == {
        "name": "a GPU", "driver": "580.1", "power_limit_watts": 700.0, "max_sm_mhz": 1980,
        "slowed_by": ["SwPowerCap", "SwThermalSlowdown"],
    }  # fmt: skip


def test_without_the_package_or_the_library_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(power, "pynvml", None)
    assert "nvidia-ml-py" in meters("cuda:0", tmp_path).missing[0]

    def no_library() -> None:
        raise NvmlError("NVML Shared Library Not Found")

    monkeypatch.setattr(power, "pynvml", stand_in(nvmlInit=no_library))
    assert "Library Not Found" in meters("cuda:0", tmp_path).missing[0]
    assert "Library Not Found" in settings("cuda:0", tmp_path)["gpu"]["unknown"]


@pytest.mark.parametrize(
    ("count", "order", "visible", "device", "handle"),
    [
        (1, "", "", "cuda:0", "index 0"),
        (1, "", "3", "cuda:0", "index 0"),
        (4, "PCI_BUS_ID", "", "cuda:2", "index 2"),
        (4, "PCI_BUS_ID", "3, 1", "cuda:1", "index 1"),
        (4, "", "GPU-abc", "cuda:0", "uuid GPU-abc"),
        (4, "", "3,1", "cuda:0", None),
        (4, "", "", "cuda:1", None),
    ],
)
def test_which_gpu_is_meant(
    monkeypatch: pytest.MonkeyPatch,
    count: int, order: str, visible: str, device: str, handle: str | None,
) -> None:  # fmt: skip
    monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if handle is None:
        with pytest.raises(LookupError, match="cannot be told"):
            power.nvml_handle(stand_in(count), device)
    else:
        assert power.nvml_handle(stand_in(count), device) == handle


def test_every_name_that_is_used_is_in_the_real_package() -> None:
    real = pytest.importorskip("pynvml", reason="not run: nvidia-ml-py is not installed")
    for name in vars(stand_in()):
        assert hasattr(real, name), name
