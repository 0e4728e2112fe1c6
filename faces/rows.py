"""Rows of arrays on disk, from which a run continues after it was killed."""
import glob
import hashlib
from pathlib import Path

import numpy as np


class Rows:
    """Rows of a numpy dtype in a file beside `output`, which gets each as soon as it is appended. The file's name holds
    a digest of all that the rows depend on, as plain data, so that other settings start another file."""

    def __init__(self, output: Path, depends, kind: np.dtype):
        digest = hashlib.sha256(repr(depends).encode()).hexdigest()[:16]
        self.path, self.kind = output.with_name(f".{output.name}.{digest}.rows"), kind
        self.files = f".{glob.escape(output.name)}.{'?' * len(digest)}.rows"    # the pattern of all settings'
        self.end = open(self.path, "ab")
        if not self.end.tell() and len(list(output.parent.glob(self.files))) > 1:
            print("starting over, because the photos, the options or the model have changed")
        self.truncate(self.end.tell() // kind.itemsize)    # a killed run may have written a part of a row

    def read(self) -> np.ndarray:
        """Return the rows so far, mapped into memory."""
        count = self.path.stat().st_size // self.kind.itemsize
        return np.memmap(self.path, self.kind, "r", shape=count) if count else np.empty(0, self.kind)

    def truncate(self, count: int):
        """Keep the first `count` rows."""
        self.end.truncate(count * self.kind.itemsize)

    def append(self, rows: np.ndarray):
        """Write further rows."""
        self.end.write(rows.tobytes())
        self.end.flush()

    def delete(self):
        """Delete the file, and those of other settings."""
        self.end.close()
        for file in self.path.parent.glob(self.files):
            file.unlink()
