"""Why an input gets no label, and what is remarked about one that does: two lists of words."""

from __future__ import annotations

from cada_deploy.errors import CadaError

# Every reason an input can be refused with; rejected.jsonl and the report use these words.
REASONS = {
    "missing": "the path names nothing, or a link that leads nowhere",
    "not-a-file": "a folder, FIFO, socket or device",
    "unreadable": "the operating system refused to open or read it",
    "empty": "0 bytes",
    "not-an-image": "the first bytes are of no image format we know of",
    "unsupported-format": "an image, but of a format or a variant that has no defined reading here",
    "multi-frame": "an animation or several pages: which one is meant?",
    "too-large": "more bytes or pixels than the limits allow; judged before decoding",
    "truncated": "the file ends before its own structure does",
    "bad-checksum": "a checksum in the file does not fit its bytes",
    "corrupt": "the structure contradicts itself or the decoder gave up",
    "wrong-size": "another height and width than this run needs",
    "mask-size": "another height and width than the ignore mask",
    "non-finite-scores": "the network gave no finite score for this image",
}

# Every remark about a decoded image whose stored pixels were not plain 8-bit RGB.
NOTICES = {
    "exif-orientation": "a rotation is noted in the file and ignored: labels fit the stored pixels",
    "sixteen-bit": "16 bits a channel; the high byte is used",
    "low-bit-depth": "1, 2 or 4 bits a sample, stretched to 0..255",
    "grey": "one channel, repeated three times",
    "palette": "indices, looked up in the file's palette",
    "alpha-dropped": "transparency ignored; the stored colours are used as they are",
    "cmyk": "four inks, made RGB by the decoder without a colour profile",
    "trailing-bytes": "bytes follow the end of the image and are ignored",
}


class ImageRejected(CadaError):
    """One input that gets no label. reason is a key of REASONS, detail says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
