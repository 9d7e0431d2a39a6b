"""Loss curves: one line of JSON a point, and TensorBoard's own files where it is installed."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from cada_deploy import durable

FILE = "losses.jsonl"


class Scalars:
    """Writes below a folder; with None nothing is written (a process that is not the first)."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
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


def _tensorboard(folder: Path | None) -> Any:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))
