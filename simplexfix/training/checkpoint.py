"""The last few states of one training, by step."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._states import CheckpointError, fingerprint, read_state, safetensors, write_state

__all__ = ["CheckpointError", "CheckpointWarning", "Checkpoints", "fingerprint", "read_state", "write_state"]


class CheckpointWarning(UserWarning):
    """A checkpoint was passed over."""


class Checkpoints:
    """The last few states of one training in a folder, by step.

    Args:
        folder: made if it is not there.
        keep: how many of the newest stay; older ones are a way back when the newest turns out to be damaged.

    Raises:
        ValueError: `keep` is below 1.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        safetensors()  # rather here than after the first hours
        self.folder = Path(folder)
        self.keep = keep
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Written as `write_state` does, then the oldest go."""
        path = self.folder / f"step-{step:09d}.safetensors"
        write_state(path, state)
        for _, old in self._steps()[self.keep :]:
            old.unlink()
        return path

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """Step and state of the newest that is as it was written, or None.

        Warns:
            CheckpointWarning: for each newer one that is not; names file and reason.
        """
        for step, path in self._steps():
            try:
                return step, read_state(path)
            except (CheckpointError, OSError) as error:
                warnings.warn(f"checkpoint passed over: {error}", CheckpointWarning, stacklevel=2)
        return None

    def read(self, step: int) -> dict[str, Any]:
        """The state of one step; errors as `read_state`."""
        return read_state(self.folder / f"step-{step:09d}.safetensors")

    def clear(self) -> None:
        """Removes them all, and what killed processes left in the middle of writing: the training is done."""
        for path in [path for _, path in self._steps()] + list(self.folder.glob("*.safetensors.*.tmp")):
            path.unlink(missing_ok=True)  # another process may do the same

    def _steps(self) -> list[tuple[int, Path]]:
        """Newest first."""
        found = [(re.fullmatch(r"step-(\d+)\.safetensors", path.name), path) for path in self.folder.iterdir()]
        return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)
