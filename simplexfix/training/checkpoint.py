"""Checkpoints of one training: its newest states, by step."""

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
    """A damaged checkpoint was skipped, results of a resumed training will differ, or its folder cannot be locked."""


class Checkpoints:
    """The newest checkpoints of one training in a folder, by step.

    Args:
        folder: folder of the checkpoints; it is created if it is missing.
        keep: number of checkpoints to keep, at least 1.  If the newest is damaged, `newest` returns an older one.

    Raises:
        ValueError: `keep` is below 1.
        ModuleNotFoundError: safetensors is missing.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from simplexfix.training import Checkpoints
        >>> checkpoints = Checkpoints(tempfile.mkdtemp(), keep=2)
        >>> path = checkpoints.save(5, {"weight": torch.ones(2)})
        >>> checkpoints.newest()
        (5, {'weight': tensor([1., 1.])})
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        safetensors()  # raises here if the package is missing, not at the first save
        self.folder = Path(folder)
        self.keep = keep
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Writes a checkpoint by `write_state` and deletes all but the newest `keep`.

        Args:
            step: number of the step, at least 0.
            state: tensors and plain values, nested.

        Returns:
            The path of the file.
        """
        path = self.folder / f"step-{step:09d}.safetensors"
        write_state(path, state)
        for _, old in self._steps()[self.keep :]:
            old.unlink()
        return path

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """Returns step and state of the newest undamaged checkpoint, or None if there is none.

        Warns:
            CheckpointWarning: a newer checkpoint is damaged; the message names file and reason.
        """
        for step, path in self._steps():
            try:
                return step, read_state(path)
            except (CheckpointError, OSError) as error:
                warnings.warn(f"checkpoint passed over: {error}", CheckpointWarning, stacklevel=2)
        return None

    def read(self, step: int) -> dict[str, Any]:
        """Returns the state of one step; raises the errors of `read_state`."""
        return read_state(self.folder / f"step-{step:09d}.safetensors")

    def clear(self) -> None:
        """Deletes all checkpoints, and temporary files of killed processes."""
        for path in [path for _, path in self._steps()] + list(self.folder.glob("*.safetensors.*.tmp")):
            path.unlink(missing_ok=True)  # another process may do the same

    def _steps(self) -> list[tuple[int, Path]]:
        """Returns step and path of each checkpoint, newest first."""
        found = [(re.fullmatch(r"step-(\d+)\.safetensors", path.name), path) for path in self.folder.iterdir()]
        return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)
