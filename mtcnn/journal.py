"""The landmarks found so far, on disk, so that an interrupted or killed run continues."""
import json
import os

import numpy as np

from faces.files import InputError, open_regular
from faces.text import printable
from mtcnn.search import ATTEMPTS, Find

MAX_LINE = 10**6    # bytes of a line; about 200 are usual
LARGEST = 10**7     # of a coordinate in pixels


class Journal:
    """The results so far: a line with the settings, then a line of JSON for each image.

    A journal of other settings or other photos is discarded, and damaged lines are ignored, each with a message.

    Args:
        output: the list that is being made; the journal is beside it, `.NAME.partial`.
        settings: everything that results depend on, as JSON.
        count: number of images.

    Raises:
        InputError: the journal can't be written, or its name belongs to a link or something else that is not a file.
    """

    def __init__(self, output, settings, count):
        self.path = output.with_name(f".{output.name}.partial")
        self.offsets = np.full(count, -1, np.int64)  # of each image's line; -1 if it has none
        settings = json.loads(json.dumps(settings, sort_keys=True))
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self.file = open_regular(self.path, "a+b")
            self.file.seek(0)
            header = self.file.readline(MAX_LINE)
            if header and (problem := difference(header, settings)):
                print(f"starting over, because {problem}: {self.path}")
                header = b""
            if not header:
                self.file.truncate(0)
                self.file.write(json.dumps(settings).encode() + b"\n")
                self.file.flush()
            self._read()
        except OSError as error:
            raise InputError(f"can't write {self.path}: {error.strerror}; choose another --output.") from None

    def add(self, finds):
        """Append finds, so that they survive even if this process is killed."""
        lines = [json.dumps(find).encode() + b"\n" for find in finds]
        try:
            self.file.write(b"".join(lines))
            self.file.flush()
        except OSError as error:
            raise InputError(f"can't write {self.path}: {error.strerror}; free some space and run the command "
                             "again.") from None
        for find, line in zip(finds, lines):
            self.offsets[find.index] = self.end
            self.end += len(line)

    def finds(self):
        """Yield the Finds in the order of the images; only one number per image is kept in memory.

        Raises:
            InputError: another program has changed the journal.
        """
        for index in np.flatnonzero(self.offsets >= 0).tolist():
            self.file.seek(self.offsets[index])
            find = parse(self.file.readline(MAX_LINE), len(self.offsets))
            if find is None or find.index != index:
                raise InputError(f"another program has changed {self.path}; run the command again.")
            yield find

    def missing(self):
        """Return the indices of the images that are not in the journal, in increasing order."""
        return np.flatnonzero(self.offsets < 0).tolist()

    def remove(self):
        """Close the journal and delete it."""
        self.file.close()
        self.path.unlink(missing_ok=True)

    def _read(self):
        """Find each image's line, and remove an incomplete line at the end."""
        self.file.seek(0)
        self.end, damaged = len(self.file.readline(MAX_LINE)), 0
        while line := self.file.readline(MAX_LINE):
            if not line.endswith(b"\n"):
                self.file.truncate(self.end)
                break
            find = parse(line, len(self.offsets))
            if find:
                self.offsets[find.index] = self.end
            damaged += find is None
            self.end += len(line)
        self.file.seek(0, os.SEEK_END)
        if damaged:
            print(f"ignoring {damaged} damaged line(s) of {self.path}; their images are searched again")


def difference(header, settings):
    """Return why a journal with this first line can't be continued with `settings`, or None if it can."""
    try:
        found = json.loads(header)
        if not isinstance(found, dict):
            raise TypeError
    except (ValueError, TypeError, RecursionError):
        return "the journal is damaged"
    changed = sorted(key for key in found | settings if found.get(key) != settings.get(key))
    if changed and {"images", "photos"}.issuperset(changed):
        return "the photos have changed since the journal was written"
    return f"the journal has other settings ({printable(', '.join(changed))})" if changed else None


def parse(line, count):
    """Return the Find in a line of the journal of `count` images, or None if the line is damaged."""
    try:
        index, (width, height), attempt, points = json.loads(line)
        whole = all(type(number) is int for number in (index, width, height, attempt))
        in_range = 0 <= index < count and min(width, height) > 0 and -1 <= attempt < len(ATTEMPTS)
        # Landmarks may be outside the image, but not far.
        near = points is None or (len(points) == 10 and all(type(value) in (int, float) and abs(value) < LARGEST
                                                            for value in points))
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    if not (whole and in_range and near) or (points is None) != (attempt < 0):
        return None
    return Find(index, (width, height), attempt, points)
