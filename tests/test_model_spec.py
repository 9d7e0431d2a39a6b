"""ModelSpec: JSON and back without loss, and nonsense refused when it is made."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cada_deploy.classes import BUILT_IN, anonymous
from cada_deploy.errors import UsageError
from cada_deploy.model_spec import InferenceSpec, InputSpec, ModelSpec, OutputSpec

SIZE = st.tuples(st.integers(1, 65535), st.integers(1, 65535))
POSITIVE = st.floats(1e-9, 1e9)
TRIPLE = st.tuples(POSITIVE, POSITIVE, POSITIVE)
INPUT = st.builds(
    InputSpec,
    colour=st.sampled_from(["RGB", "BGR"]),
    scale=POSITIVE,
    mean=TRIPLE,
    std=TRIPLE,
    resize=st.sampled_from(["bilinear", "bicubic"]),
    name=st.text(),
    layout=st.sampled_from(["NCHW", "NHWC"]),
    dtype=st.sampled_from(["float32", "float16"]),
    size=st.one_of(st.none(), SIZE),
)
SCALES = st.lists(st.floats(0.05, 8), min_size=1, max_size=3).map(tuple)
INFERENCE = st.one_of(
    st.builds(InferenceSpec, scales=SCALES, flip=st.booleans()),
    SIZE.map(lambda s: InferenceSpec("slide", window=s, stride=(1, s[1]))),
)
OUTPUT = st.one_of(
    st.builds(
        OutputSpec,
        align_corners=st.booleans(),
        order=st.sampled_from(["logits", "probs"]),
        name=st.text(),
        stride=st.integers(1, 256),
    ),
    st.builds(OutputSpec, st.booleans(), st.just("probs"), st.just("probabilities")),
)
SPECS = st.builds(
    ModelSpec,
    classes=st.sampled_from([*BUILT_IN.values(), anonymous(1), anonymous(255)]),
    input=INPUT,
    output=OUTPUT,
    inference=INFERENCE,
    preset=st.text(),
    weights_sha256=st.text(),
    provenance=st.dictionaries(st.text(), st.text(), max_size=2),
)


@given(SPECS)
def test_a_spec_survives_json(spec: ModelSpec) -> None:
    assert ModelSpec.loads(spec.dumps()) == spec
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@given(SPECS)
def test_equal_specs_have_one_text(spec: ModelSpec) -> None:
    assert ModelSpec.loads(spec.dumps()).dumps() == spec.dumps()


def test_a_spec_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        InferenceSpec().flip = True  # type: ignore[misc]


def test_plain_means_one_pass() -> None:
    assert InferenceSpec().plain
    assert not InferenceSpec(flip=True).plain
    assert not InferenceSpec(scales=(1.0, 2.0)).plain
    assert not InferenceSpec("slide", (8, 8), (4, 4)).plain


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"mode": "slide"}, "both"),
        ({"mode": "slide", "window": (8, 8)}, "both"),
        ({"mode": "slide", "stride": (8, 8)}, "both"),
        ({"window": (8, 8)}, "slide"),
        ({"stride": (8, 8)}, "slide"),
        ({"window": (8, 8), "stride": (8, 8)}, "slide"),
        ({"mode": "slide", "window": (8, 8), "stride": (8, 9)}, "gaps"),
        ({"mode": "slide", "window": (0, 8), "stride": (8, 8)}, "window"),
        ({"scales": ()}, "scales"),
        ({"scales": (0.01,)}, "scales"),
        ({"scales": (float("nan"),)}, "scales"),
        ({"flip": 1}, "flip"),
    ],
    ids=str,
)
def test_inference_that_cannot_be_is_refused(bad: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        InferenceSpec(**bad)  # type: ignore[arg-type]


def test_another_class_set_keeps_the_rest() -> None:
    spec = ModelSpec(
        anonymous(3),
        InputSpec("RGB", 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear"),
        OutputSpec(False),
    )
    assert spec.with_classes(anonymous(4)).input == spec.input
    assert len(spec.with_classes(anonymous(4)).classes) == 4
