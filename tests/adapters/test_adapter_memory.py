"""Tests that fits read mapped files in blocks, and release the memory of rows that were read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROWS, WIDTH = 150_000, 128  # 73 MiB for each encoder
FIT = """
import sys
import numpy as np
from simplexfix.adapters import Procrustes, Ridge, _paired
_paired.BLOCK_BYTES = 2**21
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
small = [np.random.default_rng(0).standard_normal((300, 128)).astype(np.float32)] * 2
Ridge().fit(*small)  # libraries allocate their buffers
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
Ridge().fit(*(np.load(name, mmap_mode="r") for name in sys.argv[1:]))
print((status("VmHWM") - before) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read as on Linux")
def test_a_fit_of_mapped_files_takes_a_few_blocks(tmp_path) -> None:
    files = [tmp_path / "old.npy", tmp_path / "new.npy"]
    for seed, file in enumerate(files):
        np.save(file, np.random.default_rng(seed).standard_normal((ROWS, WIDTH), dtype=np.float32))
    done = subprocess.run([sys.executable, "-c", FIT, *map(str, files)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(f"{float(done.stdout):.0f} MiB beyond what was there, of files of {2 * 4 * ROWS * WIDTH / 2**20:.0f} MiB")
    assert float(done.stdout) < 80
