"""What cada_seg refuses: the exit code and a sentence that says what to do, and no half files."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import stat
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from command_line import Ran
from foreign_models import save_colour_model, spread_colours
from onnx import helper

from cada_deploy.demo import DEMO_MODEL

from .built import environment
from .cada_seg import (
    DONE,
    FAILED,
    LACKS,
    MISMATCH,
    REJECTED,
    USAGE,
    Image,
    Library,
    Options,
    Refused,
    Result,
    run,
    with_spec,
)
from .test_labels import colour_model, labels_of, spec_of


@pytest.fixture
def frame(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "a.png"
    path.parent.mkdir()
    cv2.imwrite(str(path), np.full((16, 24, 3), 90, np.uint8))
    return path


@pytest.fixture
def demo(frame: Path, ort: Path, tmp_path: Path) -> dict[str, object]:
    """Options of a run that works; tests change one."""
    return {
        "--model": DEMO_MODEL, "--images": frame.parent, "--out": tmp_path / "out",
        "--ort-library": ort,
    }  # fmt: skip


def ran(program: Path, options: dict[str, object], *more: object, **variables: str) -> Ran:
    words = [word for pair in options.items() for word in pair]
    return run(program, *map(str, words), *map(str, more), **variables)


def test_the_unchanged_options_work(program: Path, demo: dict[str, object]) -> None:
    assert ran(program, demo).code == DONE


# --- the command line --------------------------------------------------------------------------

LINES = {
    "nothing": ((), "missing option --model"),
    "no images": (("--model", "m.onnx"), "missing option --images"),
    "no out": (("--model", "m.onnx", "--images", "x"), "missing option --out"),
    "unknown option": (("--modell", "m.onnx"), "unknown option --modell"),
    "a word too much": (("m.onnx",), "unknown option m.onnx"),
    "no value": (("--model",), "--model needs a value"),
    "size": (("--size", "12"), "HEIGHTxWIDTH"),
    "size of zero": (("--size=0x9",), "1 to 65535"),
    "threads": (("--threads", "0"), "a number from 1"),
    "threads as text": (("--threads", "two"), "a number from 1"),
}


@pytest.mark.parametrize("line", LINES)
def test_a_typing_mistake_is_exit_2(program: Path, line: str) -> None:
    words, why = LINES[line]
    found = run(program, *words)
    assert found.code == USAGE and found.said(why) and found.err.startswith("error: ")


def test_help_and_version(program: Path) -> None:
    found = run(program, "--help")
    assert found.code == DONE and "--ort-library" in found.out and "130 interrupted" in found.out
    assert run(program, "--version").out == "cada_seg, ABI 1\n"


# --- models and specs --------------------------------------------------------------------------


def test_wrong_models(program: Path, demo: dict[str, object], tmp_path: Path) -> None:
    def refused(path: Path, code: int, *why: str) -> None:
        found = ran(program, {**demo, "--model": path})
        assert found.code == code and found.said(*why), found.err
        assert not (tmp_path / "out").exists()

    whole = DEMO_MODEL.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.onnx").write_text("this is no model, but a sentence")
    (tmp_path / "empty.onnx").touch()
    os.mkfifo(tmp_path / "fifo.onnx")
    refused(tmp_path / "missing.onnx", USAGE, "No such file")
    refused(tmp_path, USAGE, "not a regular file")
    refused(tmp_path / "fifo.onnx", USAGE, "not a regular file")
    refused(tmp_path / "cut.onnx", MISMATCH, "not an ONNX file, or is cut short")
    refused(tmp_path / "text.onnx", MISMATCH, "not an ONNX")
    refused(tmp_path / "empty.onnx", MISMATCH, "not an ONNX model")
    plain = save_colour_model(tmp_path / "plain.onnx", spread_colours(7))
    refused(plain, USAGE, "never guessed", "--spec FILE.json")
    labels = save_colour_model(tmp_path / "l.onnx", spread_colours(7), output_rank=3)
    refused(
        with_spec(labels, spec_of("imagenet-rgb"), tmp_path / "labels.onnx"), MISMATCH, "argmax"
    )
    five = colour_model(tmp_path / "five.onnx", spec_of("imagenet-rgb", 5))
    other = with_spec(five, spec_of("imagenet-rgb", 6), tmp_path / "other.onnx")
    refused(other, MISMATCH, "gives 5 classes but class set", "has 6")
    named = spec_of("imagenet-rgb", 5, output={"name": "scores"})
    refused(with_spec(five, named, tmp_path / "named.onnx"), MISMATCH, "no output 'scores'")
    fixed = colour_model(tmp_path / "fixed.onnx", spec_of("imagenet-rgb", 5), size=(40, 72))
    sized = spec_of("imagenet-rgb", 5, input={"size": (40, 80)})
    refused(with_spec(fixed, sized, tmp_path / "sized.onnx"), MISMATCH, "takes 40x72", "says 40x80")
    turned = spec_of("imagenet-rgb", 5, input={"layout": "NHWC"})
    refused(with_spec(fixed, turned, tmp_path / "turned.onnx"), MISMATCH, "72 channels")
    assert ran(program, {**demo, "--model": fixed, "--size": "41x72"}).code == USAGE
    broken = onnx.load(five)
    broken.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(broken, tmp_path / "broken.onnx")
    refused(tmp_path / "broken.onnx", MISMATCH, "ONNX Runtime refuses", "NoSuchOperator")


@pytest.mark.parametrize("where", ["initializer", "attribute", "subgraph"])
def test_weights_in_other_files_are_refused_wherever_they_hide(
    where: str, program: Path, demo: dict[str, object], tmp_path: Path
) -> None:
    model = onnx.load(colour_model(tmp_path / "m.onnx", spec_of("imagenet-rgb")))
    outside = onnx.TensorProto(
        name="outside", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL
    )
    outside.external_data.add(key="location", value="../../etc/passwd")
    constant = helper.make_node("Constant", [], ["outside"], value=outside)
    if where == "initializer":
        model.graph.initializer.append(outside)
    elif where == "attribute":
        model.graph.node.insert(0, constant)
    else:
        inner = helper.make_graph([constant], "g", [], [])
        model.graph.node.insert(0, helper.make_node("If", ["c"], ["d"], then_branch=inner))
    (tmp_path / "external.onnx").write_bytes(model.SerializeToString())
    found = ran(program, {**demo, "--model": tmp_path / "external.onnx"})
    assert found.code == MISMATCH and found.said("keeps weights in other files")


def test_specs_from_files(program: Path, demo: dict[str, object], tmp_path: Path) -> None:
    colours = spread_colours(7)
    plain = save_colour_model(tmp_path / "plain.onnx", colours)
    spec = spec_of("caffe-bgr")
    inside = with_spec(plain, spec, tmp_path / "inside.onnx")
    assert ran(program, {**demo, "--model": inside, "--out": tmp_path / "one"}).code == DONE
    (tmp_path / "spec.json").write_text(spec.dumps())
    beside = {**demo, "--model": plain, "--spec": tmp_path / "spec.json"}
    assert ran(program, {**beside, "--out": tmp_path / "two"}).code == DONE
    one, two = labels_of(tmp_path / "one"), labels_of(tmp_path / "two")
    np.testing.assert_array_equal(one["a.png"], two["a.png"])

    (tmp_path / "spec.toml").write_text('preset = "caffe-bgr"')
    found = ran(program, {**beside, "--spec": tmp_path / "spec.toml"})
    assert found.code == USAGE and found.said("is TOML", "docs/cada_seg.md")
    (tmp_path / "spec.json").write_text("not json")
    found = ran(program, beside)
    assert found.code == MISMATCH and found.said("spec.json is not JSON")
    assert ran(program, {**beside, "--spec": tmp_path / "nowhere.json"}).code == USAGE
    slide = {"mode": "slide", "window": [8, 8], "stride": [8, 8]}
    (tmp_path / "spec.json").write_text(json.dumps({**spec.to_json(), "inference": slide}))
    found = ran(program, beside)
    assert found.code == MISMATCH and found.said("sliding windows", "cada-deploy predict")


def test_a_preset_stands_for_any_number_of_classes_only_inside_the_model(
    program: Path, demo: dict[str, object], tmp_path: Path
) -> None:
    plain = save_colour_model(tmp_path / "plain.onnx", spread_colours(7))
    preset = replace(spec_of("imagenet-rgb", 5), preset="imagenet-rgb")
    inside = with_spec(plain, preset, tmp_path / "inside.onnx")
    assert ran(program, {**demo, "--model": inside}).code == DONE
    (tmp_path / "spec.json").write_text(preset.dumps())
    found = ran(program, {**demo, "--model": plain, "--spec": tmp_path / "spec.json"})
    assert found.code == MISMATCH and found.said("gives 7 classes")


# --- the machine -------------------------------------------------------------------------------


def test_without_an_engine_it_is_exit_3(
    program: Path, demo: dict[str, object], tmp_path: Path
) -> None:
    found = ran(program, {**demo, "--ort-library": tmp_path / "libonnxruntime.so"})
    assert found.code == LACKS and found.said("cannot be loaded", "CADA_ORT_LIBRARY")
    del demo["--ort-library"]
    found = ran(program, demo, CADA_ORT_LIBRARY=str(tmp_path / "no.so"))
    assert found.code == LACKS and found.said("no.so")
    found = ran(program, demo, CADA_ORT_LIBRARY="libm.so.6")  # a library, but another one
    assert found.code == LACKS and found.said("does not offer API version")
    found = ran(program, demo, "--backend", "openvino")
    assert found.code == USAGE and found.said("known: ort, trt")


def test_a_build_without_tensorrt_says_so_after_it_has_judged_the_plan(
    program: Path, demo: dict[str, object], tmp_path: Path
) -> None:
    plan = tmp_path / "m.engine"
    options = {**demo, "--backend": "trt", "--model": plan}
    plan.write_bytes(DEMO_MODEL.read_bytes())
    found = ran(program, options)
    assert found.code == MISMATCH and found.said("not a TensorRT plan", "cada-deploy export")
    plan.write_bytes(b"ftrt" + bytes(20) + bytes([10, 3, 0, 30]))
    found = ran(program, options)
    assert found.code == MISMATCH and found.said("m.engine.json beside it")
    (tmp_path / "spec.json").write_text(spec_of("imagenet-rgb").dumps())
    found = ran(program, {**options, "--spec": tmp_path / "spec.json"})
    assert found.code == LACKS and found.said("without TensorRT", "-DCADA_SEG_TENSORRT=ON")


# --- images and OUT ----------------------------------------------------------------------------


def test_bad_images_are_named_and_counted(
    program: Path, demo: dict[str, object], frame: Path, tmp_path: Path
) -> None:
    folder = frame.parent
    (folder / "b.png").write_bytes(frame.read_bytes()[:-9])
    (folder / "c.jpg").touch()
    (folder / "d.PNG").write_text("no image")
    (folder / "e.bmp").write_bytes(cv2.imencode(".bmp", np.zeros((2, 2, 3), np.uint8))[1])
    (folder / "f.png").symlink_to("nowhere")
    os.mkfifo(folder / "g.png")
    found = ran(program, demo)
    assert found.code == REJECTED
    for name, reason in {
        "b.png": "truncated", "c.jpg": "empty", "d.PNG": "not-an-image",
        "e.bmp": "unsupported-format", "f.png": "missing", "g.png": "not-a-file",
    }.items():  # fmt: skip
        assert found.said(f"rejected {name}: {reason}: ")
    assert found.said("1 of 7 images labelled, 6 rejected")
    assert list(labels_of(tmp_path / "out")) == ["a.png"]


def test_there_must_be_images_and_their_outputs_must_differ(
    program: Path, demo: dict[str, object], frame: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert ran(program, {**demo, "--images": empty}).code == USAGE
    assert ran(program, {**demo, "--images": tmp_path / "nowhere"}).code == USAGE
    (tmp_path / "list").write_text("# nothing\n\n")
    found = ran(program, {**demo, "--images": tmp_path / "list"})
    assert found.code == USAGE and found.said("no image in list")
    found = ran(program, {**demo, "--out": frame.parent / "out"})
    assert found.code == USAGE and found.said("lies inside the input folder")
    (frame.parent / "a.jpg").touch()
    found = ran(program, demo)
    assert found.code == USAGE and found.said("would both be written to a.png")
    assert not (tmp_path / "out").exists()


def test_names_and_links_are_those_of_python(
    program: Path, demo: dict[str, object], frame: Path, tmp_path: Path
) -> None:
    from cada_deploy.image_files import find_images, output_stem

    folder = frame.parent
    more = tmp_path / "elsewhere"
    more.mkdir()
    for path in (folder / "x" / "b.c.JPeg.png", more / "linked.png", folder / "é.PNG"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(frame.read_bytes())
    (folder / "loop").symlink_to(folder)
    (folder / "way").symlink_to(more)
    (folder / "way2").symlink_to(more)
    assert ran(program, demo).code == DONE
    expected = [os.fsdecode(output_stem(ref.relative)) + ".png" for ref in find_images(folder)]
    assert sorted(labels_of(tmp_path / "out")) == sorted(expected) and len(expected) == 4


def test_an_unwritable_out_is_exit_1_without_half_files(
    program: Path, demo: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    found = ran(program, {**demo, "--out": tmp_path / "file"})
    assert found.code == FAILED and found.said("cannot write")
    (tmp_path / "out" / "labels" / "a.png").mkdir(parents=True)
    found = ran(program, demo)
    assert found.code == FAILED and found.said("cannot write", "a.png")
    assert not list((tmp_path / "out").rglob("*.tmp"))
    if Path("/dev/full").exists() and stat.S_ISCHR(Path("/dev/full").stat().st_mode):
        other = tmp_path / "full" / "labels"
        other.mkdir(parents=True)
        (other / "a.png.tmp").symlink_to("/dev/full")
        found = ran(program, {**demo, "--out": tmp_path / "full"})
        assert found.code == FAILED and found.said("No space left")
        assert not (other / "a.png").exists()


def test_a_run_of_cada_deploy_is_not_written_into(
    program: Path, demo: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}")
    found = ran(program, demo)
    assert found.code == MISMATCH and found.said("holds a run of cada-deploy")


def test_a_signal_ends_it_between_two_images(
    program: Path, demo: dict[str, object], frame: Path, tmp_path: Path
) -> None:
    for k in range(3000):
        os.link(frame, frame.with_name(f"b{k:04d}.png"))
    words = [str(word) for pair in demo.items() for word in pair]
    process = subprocess.Popen([str(program), *words], stderr=subprocess.PIPE, env=environment())
    first = tmp_path / "out" / "labels" / "a.png"
    while not first.exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130 and "of 3001 images labelled" in told
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert 1 <= len(labels_of(tmp_path / "out")) < 3001  # each of them whole


# --- the C ABI ---------------------------------------------------------------------------------


def test_callers_mistakes_are_codes_and_never_crashes(
    library: Library, ort: Path, tmp_path: Path
) -> None:
    calls = library.calls
    model = library.open(DEMO_MODEL, ort)
    pixels = np.zeros((4, 4, 3), np.uint8)
    labels = np.zeros((4, 4), np.uint8)

    def label(image: Image, result: Result) -> int:
        return int(calls.cada_seg_label(model, ctypes.byref(image), ctypes.byref(result)))

    fine = Result(size=ctypes.sizeof(Result), labels=labels.ctypes.data)
    good = Image(pixels.ctypes.data, 4, 4, 0)
    assert label(good, fine) == DONE and calls.cada_seg_classes(model) == 19
    assert label(Image(None, 4, 4, 0), fine) == USAGE
    assert label(Image(pixels.ctypes.data, 0, 4, 0), fine) == USAGE
    assert label(Image(pixels.ctypes.data, 4, 4, 11), fine) == USAGE
    assert label(good, Result(size=8, labels=labels.ctypes.data)) == USAGE
    assert label(good, Result(size=ctypes.sizeof(Result))) == USAGE
    negative = Result(size=ctypes.sizeof(Result), labels=labels.ctypes.data, height=-1, width=4)
    assert label(good, negative) == USAGE
    assert b"fused kernel" in calls.cada_seg_error()
    library.close(model)
    assert calls.cada_seg_label(None, None, None) == USAGE
    assert calls.cada_seg_decode(None, ctypes.c_size_t(3), None) == USAGE
    opened = ctypes.c_void_p()
    assert calls.cada_seg_open(ctypes.byref(Options(size=1)), ctypes.byref(opened)) == USAGE
    assert not opened and calls.cada_seg_abi() == 1
    with pytest.raises(Refused, match="threads"):
        library.open(DEMO_MODEL, ort, threads=0)


def test_only_the_public_names_leave_the_library(folder: Path) -> None:
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", folder / "libcada_seg.so"], capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not run: needs nm")
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert "cada_seg_open" in names and all(name.startswith("cada_seg_") for name in names)


def test_the_header_is_c(tmp_path: Path) -> None:
    from shutil import which

    from .built import RUNTIME

    compiler = which("cc") or which("gcc")
    if compiler is None:
        pytest.skip("not run: needs a C compiler")
    source = tmp_path / "user.c"
    source.write_text('#include "cada_seg.h"\nint main(void) { return cada_seg_abi() != 1; }\n')
    subprocess.run(
        [compiler, "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only",
         "-I", str(RUNTIME), str(source)],
        check=True,
    )  # fmt: skip
