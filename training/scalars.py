"""Loss curves and previews: JSON lines and PNG, and TensorBoard's files where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from cada_deploy import durable
from cada_deploy.labels import encode_rgb_png

FILE = "losses.jsonl"


class Scalars:
    """Writes below a folder; with None nothing is written (a process that is not the first)."""

    def __init__(self, folder: Path | None, step: int = 0) -> None:
        """step: where a training begins or goes on; points beyond it are of a run that was
        stopped, and come again."""
        self._folder = folder
        if folder is not None and (folder / FILE).exists():
            lines = (folder / FILE).read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            durable.write_file(folder / FILE, b"".join(kept))
        self._writer = _tensorboard(folder)

    def __enter__(self) -> Scalars:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, step: int, values: dict[str, float]) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / FILE).open("ab") as file:
            file.write(durable.json_line({"step": step, **values}))
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"loss/{name}", value, step)

    def picture(self, step: int, picture: Any) -> None:
        """(H, W, 3) uint8 RGB, as previews/<step>.png, and in TensorBoard where that is."""
        if self._folder is None:
            return
        folder = self._folder / "previews"
        folder.mkdir(parents=True, exist_ok=True)
        durable.write_file(folder / f"{step:06d}.png", encode_rgb_png(picture))
        if self._writer is not None:
            self._writer.add_image("target", picture, step, dataformats="HWC")


def _tensorboard(folder: Path | None) -> Any:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))
