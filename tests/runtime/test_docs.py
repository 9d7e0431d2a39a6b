"""What docs/cada_seg.md tells people to type works."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from cada_deploy.model_spec import ModelSpec
from cada_deploy.presets import spec_template

from .built import ROOT, RUNTIME, compiled
from .cada_seg import DONE, run

DOC = (ROOT / "docs" / "cada_seg.md").read_text(encoding="utf-8")


def test_the_line_that_turns_toml_into_json(tmp_path: Path) -> None:
    (line,) = re.findall(r"^python (-c .*) spec\.toml > spec\.json$", DOC, re.MULTILINE)
    (tmp_path / "spec.toml").write_text(spec_template())
    done = subprocess.run(
        [sys.executable, *shlex.split(line), "spec.toml"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ModelSpec.loads(done.stdout).input.colour == "RGB"


def test_every_cmake_option_and_program_option_is_there(program: Path) -> None:
    cmake = (RUNTIME / "CMakeLists.txt").read_text()
    for option in set(re.findall(r"-D(CADA_SEG_\w+)", DOC)):
        assert f"option({option} " in cmake
    told = run(program, "--help").out
    (usage,) = re.findall(r"^cada_seg --model .*$", DOC, re.MULTILINE)
    assert all(option in told for option in re.findall(r"--[a-z]+", usage))


def test_the_c_example_compiles_and_links(folder: Path, tmp_path: Path) -> None:
    (example,) = re.findall(r"```c\n(.*?)```", DOC, re.DOTALL)
    source = tmp_path / "example.c"
    source.write_text(
        '#include <stdio.h>\n#include "cada_seg.h"\nstatic uint8_t rgb[1280 * 720 * 3], '
        "labels[1280 * 720];\nint main(void) {\n" + example + "return code;\n}\n"
    )
    made = tmp_path / "example"
    compiled(
        made, "-x", "c", "-std=c11", source, "-x", "none", "-I", RUNTIME, "-L", folder,
        "-lcada_seg", f"-Wl,-rpath,{folder}", compiler="gcc", standard=None,
    )  # fmt: skip
    ran = run(made)  # there is no model.onnx here
    assert ran.code != DONE and ran.said("model.onnx cannot be read")
