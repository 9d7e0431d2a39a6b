"""The report page: whole, escaped, offline, and loud where something is wrong."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cada_deploy import plots
from cada_deploy.classes import CITYSCAPES_19, anonymous
from cada_deploy.report import write_report
from cada_deploy.report_page.contents import (
    Agreement,
    ClassRow,
    Evaluation,
    Frame,
    Link,
    Rejected,
    ReportData,
    Stage,
)
from cada_deploy.statistics import HISTOGRAM_BINS

HOSTILE = "\"><script>alert('x')</script>&<b>\udce9\u202e\x00"


def rows(count: int = 19, predicted: int = 1000, selected: int = 600) -> tuple[ClassRow, ...]:
    classes = CITYSCAPES_19 if count == 19 else anonymous(count)
    return tuple(
        ClassRow(k, classes.names[k], classes.palette[k], predicted, selected, 0.3, 0.2)
        for k in range(count)
    )


def data(**changed: Any) -> ReportData:
    plain = ReportData(
        title="dusk",
        model="m.onnx",
        policy="category-adaptive",
        measure="entropy",
        comparator="<",
        images_labelled=40,
        wall_s=8.0,
        classes=rows(),
        options=(("delta", "0.1"), ("centroid", "confidence"), ("scope", "dataset")),
    )
    return dataclasses.replace(plain, **changed)


def with_row(place: int, **changed: Any) -> tuple[ClassRow, ...]:
    changed_rows = list(rows())
    changed_rows[place] = dataclasses.replace(changed_rows[place], **changed)
    return tuple(changed_rows)


def frame(name: str = "a/b.png", high: int = 96, wide: int = 1280) -> Frame:
    rng = np.random.default_rng(7)
    predicted = rng.integers(0, 19, (high, wide)).astype(np.uint8)
    entropy = rng.random((high, wide)).astype(np.float32)
    entropy[:8] = np.nan
    predicted[:8] = 255
    return Frame(
        name,
        rng.integers(0, 256, (high, wide, 3)).astype(np.uint8),
        predicted,
        np.where(entropy < 0.25, predicted, 255).astype(np.uint8),
        entropy,
    )


class Page(HTMLParser):
    """Tags balanced, links, sources, ids and visible text of a page."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> repeats an attribute"
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(report: ReportData) -> Page:
    """A page that holds what every page must."""
    html = write_report(report)
    html.encode("utf-8")  # no lone surrogate is left
    found = Page(html)
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "iframe", "object", "embed", "form", "base"}
    for _, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
            url = attributes.get(name)
            assert url is None or url.startswith(("data:", "#")) or "://" not in url
    assert "http://" not in html and "https://" not in html and "@import" not in html
    assert re.findall(r"url\(([^)]*)\)", html) in ([], ["#viridis"])
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for link in found.all("a"):
        href = link["href"] or ""
        assert not href.startswith("#") or href[1:] in ids, href
    for _, attributes in found.tags:
        assert attributes.get("aria-labelledby") in {None, *ids}
    for image in found.all("img"):
        assert image["alt"]
    for table_head in found.all("th"):
        assert table_head["scope"] in ("col", "row")
    policy = next(m for m in found.all("meta") if "http-equiv" in m)
    assert (policy["content"] or "").startswith("default-src 'none'; img-src data:; style-src")
    return found


def full() -> ReportData:
    agreement = Agreement(0.5, 0.8, 0.6, (0.5,) * 18 + (None,), (0.7,) * 18 + (None,))
    return data(
        histograms=np.full((19, HISTOGRAM_BINS), 5, np.int64),
        frames=tuple(frame(f"f{k}.png") for k in range(8)),
        evaluation=Evaluation("gtFine", agreement, agreement),
        rejected=(Rejected("x.png", "truncated", "ended after 12 of 90 bytes"),),
        notices=(("16-bit", 12), ("exif-orientation", 3)),
        stages=(Stage("read", 1.0), Stage("infer", 12.0), Stage("write png", 3.0)),
        cores=8,
        command_line="cada-deploy pseudo-label --delta 0.1",
        provenance=(("Run id", "3f9a"), ("Kernel", "native avx512")),
        invalid_pixels=1234,
        masked_pixels=77,
        look_first=("the sky of frame 3",),
    )


def test_the_whole_page_holds_everything() -> None:
    found = page(full())
    for text in [
        *CITYSCAPES_19.names,
        *("dusk", "m.onnx", "category-adaptive", "delta", "entropy < T", "40 images labelled"),
        *("60.0% of the pixels kept", "5 images/s", "8.0 s in all", "the sky of frame 3"),
        *("truncated", "ended after 12 of 90 bytes", "12 × 16-bit", "3 × exif-orientation"),
        *("Most time goes to infer (75.0%)", "300.00", "on 8 cores", "2.0 stages busy"),
        *("gtFine", "mIoU", "3f9a", "native avx512", "cada-deploy pseudo-label --delta 0.1"),
        *("1,234 invalid pixels", "77 pixels under the ignore mask", "labels/", "run.json"),
    ]:
        assert text in found.words, text
    assert len(found.all("img")) == 32
    assert len([s for s in found.all("svg") if s.get("class") == "histogram"]) == 19
    assert len([s for s in found.all("svg") if s.get("class") == "bar"]) == 19


def test_every_class_has_its_row() -> None:
    html = write_report(data())
    table = html[html.index("<table>") : html.index("</table>")]
    for row in data().classes:
        line = next(x for x in table.split("<tr>") if f"<bdi>{row.name}</bdi>" in x)
        assert f">{row.id}<" in line and "1,000" in line and "600" in line and "60.0%" in line
        assert "0.3000" in line and "0.2000" in line and plots.hex_colour(row.colour) in line


def test_a_good_run_has_no_warning() -> None:
    found = page(data())
    assert "Warnings" not in found.words and "What to do" not in found.words
    assert "every class is represented" in found.words


@pytest.mark.parametrize(
    "changed, headline, remedy",
    [
        ({"selected": 0, "threshold": -0.05}, "threshold of zero or less", "--delta 10%"),
        ({"selected": 0, "threshold": 0.0}, "threshold of zero or less", "--delta"),
        ({"selected": 0}, "1 class has no selected pixel", "--delta"),
        (
            {"predicted": 0, "selected": 0, "threshold": None, "centroid_entropy": None},
            "1 class was never predicted",
            "preset",
        ),
    ],
)
def test_a_class_that_fails_stands_out(changed: Any, headline: str, remedy: str) -> None:
    found = page(data(classes=with_row(11, **changed)))
    panel = found.words[found.words.index("▲ Warnings") : found.words.index("Coverage by class")]
    assert headline in panel and remedy in panel and "person" in panel
    assert "car" not in panel.replace("classes", "").split()
    assert panel.count("What to do.") == 1
    assert "1 warning, with what to do about it" in found.words


def test_negative_thresholds_are_fine_where_they_are_not_entropies() -> None:
    found = page(data(measure="margin", comparator=">", classes=with_row(2, threshold=-0.5)))
    assert "Warnings" not in found.words and "\N{MINUS SIGN}0.5000" in found.words


def test_a_policy_without_delta_is_not_told_to_lower_it() -> None:
    found = page(
        data(policy="fixed", options=(("threshold", "0.9"),), classes=with_row(2, selected=0))
    )
    assert "Loosen --threshold" in found.words and "--delta" not in found.words


def test_thresholds_of_each_image_are_no_warning() -> None:
    """--scope image: a class has no single threshold, yet pixels are kept."""
    assert "Warnings" not in page(data(classes=with_row(2, threshold=None))).words


def test_nothing_kept_at_all() -> None:
    found = page(data(classes=rows(selected=0)))
    assert "Not a single pixel was kept" in found.words and "0.0% of the pixels" in found.words


def test_all_inputs_rejected_and_capped() -> None:
    refused = tuple(Rejected(f"i{k:04d}.png", "truncated", "") for k in range(1250))
    found = page(
        data(
            images_labelled=0,
            wall_s=0.0,
            classes=rows(predicted=0, selected=0),
            rejected=refused,
            stages=(Stage("read", 0.0),),
        )
    )
    assert "No image was labelled" in found.words and "never predicted, " not in found.words
    assert "i0199.png" in found.words and "i0200.png" not in found.words
    assert "and 1,050 more, all in rejected.jsonl" in found.words
    assert "1,250 images left out: 1,250 truncated" in found.words


def test_thin_classes_are_named() -> None:
    found = page(data(classes=with_row(12, selected=4)))
    assert "Thin classes, under 5% kept: rider (0.4%)" in found.words


def test_hostile_text_is_shown_and_harmless() -> None:
    agreement = Agreement(0.5, 0.5, 0.5, (0.5,) * 19, (0.5,) * 19)
    found = page(
        data(
            title=HOSTILE,
            model=HOSTILE,
            policy=HOSTILE,
            options=((HOSTILE, HOSTILE),),
            classes=with_row(0, name=HOSTILE, selected=0, flags=(HOSTILE,)),
            histograms=np.ones((19, HISTOGRAM_BINS), np.int64),
            frames=(frame(HOSTILE),),
            evaluation=Evaluation(HOSTILE, agreement, agreement),
            rejected=(Rejected(HOSTILE, HOSTILE, HOSTILE),),
            notices=((HOSTILE, 1),),
            stages=(Stage(HOSTILE, 1.0),),
            command_line=HOSTILE,
            provenance=((HOSTILE, HOSTILE),),
            links=(
                Link(HOSTILE, HOSTILE),
                Link("javascript:alert(1)", ""),
                Link("//evil.org/", ""),
            ),
            look_first=(HOSTILE,),
        )
    )
    shown = "\"><script>alert('x')</script>&<b>\\xe9\\u202e\\x00"
    assert found.words.count(shown) >= 15
    hrefs = [a["href"] or "" for a in found.all("a")]
    assert "javascript%3Aalert%281%29" in hrefs and "evil.org/" in hrefs


def test_a_threshold_cuts_the_histogram() -> None:
    counts = [1] * HISTOGRAM_BINS
    html = plots.entropy_histogram(counts, (1, 2, 3), 0.25, True, "x")
    # 0.25 nats = 2^-2: 11 of 16 octaves from the left.
    assert 'x="0.0" width="198.0"' in html and "T 0.25" in html and "#010203" in html
    above = plots.entropy_histogram(counts, (1, 2, 3), 0.25, False, "x")
    assert 'x="198.0" width="90.0"' in above
    below_zero = plots.entropy_histogram(counts, (1, 2, 3), -0.1, True, "x")
    assert "T ≤ 0" in below_zero and "#010203" not in below_zero
    beyond = plots.entropy_histogram(counts, (1, 2, 3), float("inf"), True, "x")
    assert 'width="288.0"' in beyond


def test_bin_edges_are_those_of_the_statistics() -> None:
    assert plots.bin_edge(0) == 2.0**-13
    assert plots.bin_edge(8 * 13 + 4) == 1.5
    assert plots.bin_edge(HISTOGRAM_BINS) == 8.0


def test_a_rule_on_confidence_draws_no_threshold() -> None:
    histograms = np.ones((19, HISTOGRAM_BINS), np.int64)
    html = write_report(data(measure="confidence", comparator=">", histograms=histograms))
    Page(html)
    assert 'class="threshold"' not in html and "cuts on confidence" in html


def test_counts_beyond_float_are_drawn() -> None:
    histograms = np.full((19, HISTOGRAM_BINS), 10**400, dtype=object)
    histograms[1] = 0
    found = page(data(histograms=histograms, classes=with_row(0, predicted=10**30, selected=7)))
    assert "Nothing to draw for sidewalk." in found.words
    assert "&lt;" not in found.words and "< 0.1%" in found.words.replace("\u00a0", " ")


def test_pictures_are_small_and_say_what_they_show() -> None:
    html = write_report(data(frames=(frame(high=700, wide=1400),)))
    sources = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', html)
    sizes = [Image.open(io.BytesIO(base64.b64decode(s))).size for s in sources]
    assert sizes == [(640, 320)] * 4
    assert 'alt="Selected pseudo labels of a/b.png"' in html and "24" in html


def test_overlays_show_labels_greys_and_stripes() -> None:
    image = np.full((4, 8, 3), (200, 100, 50), np.uint8)
    predicted = np.zeros((4, 8), np.uint8)
    selected = predicted.copy()
    selected[:, 4:] = 255
    entropy = np.zeros((4, 8), np.float32)
    entropy[0] = np.nan
    entropy[3] = np.inf
    palette = np.zeros((256, 3), np.uint8)
    palette[0] = (0, 255, 0)
    shown = plots.overlays(image, selected, predicted, entropy, palette, 1.0, 640)
    red, green, blue = shown.selected[0, 0].tolist()
    assert green > red > blue
    assert len(set(shown.selected[0, 6].tolist())) == 1, "not selected is grey"
    assert np.array_equal(shown.predicted[0, 6], shown.selected[0, 0])
    assert shown.entropy[1, 0].tolist() == [0x44, 0x01, 0x54]
    magenta = (shown.entropy == [255, 0, 255]).all(axis=-1)
    assert magenta[0].any() and magenta[3].any() and not magenta[1:3].any()


def test_maps_may_have_another_size_than_the_image() -> None:
    image = np.zeros((30, 70, 3), np.uint8)
    maps = np.full((15, 35), 255, np.uint8)
    nothing = Frame("x", image, maps, maps, np.full((15, 35), np.nan, np.float32))
    assert nothing.share_selected is None
    assert len(page(data(frames=(nothing,))).all("img")) == 4


def test_viridis_is_viridis() -> None:
    cv2 = pytest.importorskip("cv2")
    grey = np.arange(256, dtype=np.uint8)[:, None]
    theirs = cv2.applyColorMap(grey, cv2.COLORMAP_VIRIDIS)[:, 0, ::-1].astype(int)
    ours = plots.viridis(np.linspace(0, 1, 256)).astype(int)
    assert np.abs(ours - theirs).max() <= 7


def test_white_text_reads_on_every_stage_colour() -> None:
    for colour in plots.STAGE_COLOURS:
        channels = np.array(list(bytes.fromhex(colour[1:]))) / 255
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        assert 1.05 / (float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05) >= 4.5, colour


@pytest.mark.parametrize("count", [1, 255])
def test_few_and_many_classes(count: int) -> None:
    found = page(
        data(
            classes=rows(count),
            frames=(frame(),),
            histograms=np.random.default_rng(1).integers(0, 9999, (count, HISTOGRAM_BINS)),
        )
    )
    assert f"class-{count - 1}" in found.words


def test_sizes_stay_reasonable() -> None:
    assert len(write_report(data())) < 60_000
    many = data(
        classes=rows(255),
        histograms=np.random.default_rng(1).integers(0, 9999, (255, HISTOGRAM_BINS)),
    )
    assert len(write_report(many)) < 2_000_000
    # Noise is the worst that JPEG can meet: eight frames of four pictures.
    assert len(write_report(full())) < 4_000_000


def test_same_data_same_page() -> None:
    assert write_report(full()) == write_report(full())


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="11 of 10 pixels"):
        ClassRow(0, "road", (1, 2, 3), 10, 11)
    with pytest.raises(ValueError, match="at least one class"):
        data(classes=())
    with pytest.raises(ValueError, match="9 frames"):
        data(frames=(frame(),) * 9)
    with pytest.raises(ValueError, match="histograms are"):
        data(histograms=np.zeros((18, HISTOGRAM_BINS)))
    with pytest.raises(ValueError, match="frame image is"):
        dataclasses.replace(frame(), image=np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="frame maps have shapes"):
        dataclasses.replace(frame(), selected=np.zeros((4, 4), np.uint8))
    short = Agreement(None, None, None, (), ())
    with pytest.raises(ValueError, match="evaluation has 0 classes"):
        data(evaluation=Evaluation("t", short, short))
