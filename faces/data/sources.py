"""Where images are stored: a folder or a zip. Both list their images and open them by name."""
import os
import stat
import zipfile
from collections import Counter
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from faces.files import InputError
from faces.images import EXTENSIONS, MAX_BYTES, Scan, UnreadableImage, is_system_name, scan_images, sort_in
from faces.landmarks import normal_form

PIECE = 1 << 20


class Folder:
    """The images in a folder and its subfolders."""

    def __init__(self, root):
        self.root = Path(root)

    def __str__(self):
        return str(self.root)

    @cached_property
    def scan(self):
        """The faces.images.Scan of the folder, from when it was first needed."""
        return scan_images(self.root)

    def names(self):
        """Return the relative paths of all images, sorted."""
        return self.scan.paths

    def open(self, name):
        """Return the path of the image `name`, to pass to read_image(); the name was checked when the list was read."""
        path = os.path.join(self.root, name)
        if not name.isascii() and not os.path.lexists(path):
            path = os.path.join(self.root, self._normalized.get(normal_form(name), name))
        return path

    def versions(self, names):
        """Return int64 (N, 2), which changes when one of the images `names` changes: its size and modification time."""
        versions = np.full((len(names), 2), -1, np.int64)
        for i, name in enumerate(tqdm(names, "looking for changes", unit=" images", unit_scale=True, dynamic_ncols=True,
                                      delay=2, leave=False)):
            try:
                status = os.stat(self.open(name))
            except (OSError, ValueError):
                continue
            versions[i] = status.st_size, status.st_mtime_ns
        return versions

    @cached_property
    def _normalized(self):
        return {normal_form(name): name for name in self.names() if not name.isascii()}


class Zip:
    """The images in a zip, read without unpacking it. Names omit a single top folder around everything.

    Attributes:
        scan: faces.images.Scan of the members.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.archive = zipfile.ZipFile(self.path)
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"can't read {path}: {error.strerror or error}; check its permissions.") from None
        except Exception as error:  # zipfile raises many kinds of exceptions on damaged files
            raise InputError(f"{path} is not a readable zip file ({error}); download it again.") from None
        members = [(_name(info), info) for info in self.archive.infolist() if not info.filename.endswith(("/", "\\"))]
        images = [name for name, _ in members if not _is_system_path(name) and _is_image(name)]
        top_folders = {name.split("/")[0] for name in images}
        nested = all(name.count("/") >= 2 for name in images)
        prefix = top_folders.pop() + "/" if len(top_folders) == 1 and nested else ""
        self.scan, self.members = Scan([], Counter(), Counter()), {}
        for name, info in members:
            self._add(name.removeprefix(prefix), info)
        self.scan.paths.sort()

    def __str__(self):
        return str(self.path)

    def names(self):
        """Return the relative paths of all images, sorted."""
        return self.scan.paths

    def open(self, name):
        """Return the bytes of the image `name`.

        Raises:
            UnreadableImage: the member is missing, damaged, or over MAX_BYTES.
        """
        info = self.members.get(normal_form(name))
        if info is None:
            raise UnreadableImage("not in the zip")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # Python unpacks other methods without a bound on memory.
            raise UnreadableImage("compressed in a way that is not read; create the zip with the usual deflate method")
        try:
            data = bytearray()
            with self.archive.open(info) as file:
                while piece := file.read(PIECE):        # the size in the header may be wrong
                    data += piece
                    if len(data) > MAX_BYTES:
                        raise UnreadableImage(f"over {MAX_BYTES // 10**6} MB")
            return bytes(data)
        except UnreadableImage:
            raise
        except Exception as error:  # decompressors raise many kinds of exceptions on damaged members
            raise UnreadableImage(f"damaged in the zip ({str(error).partition(' for file')[0]})") from error

    def versions(self, names):
        """Return int64 (N, 2), which changes when one of the images `names` changes: its size and checksum."""
        infos = [self.members.get(normal_form(name)) for name in names]
        return np.array([(-1, -1) if info is None else (info.file_size, info.CRC) for info in infos], np.int64)

    def _add(self, name, info):
        if _is_system_path(name):
            self.scan.ignored["hidden or system file~"] += 1
        elif stat.S_ISLNK(info.external_attr >> 16):
            self.scan.lost["link~ in the zip"] += 1
        elif normal_form(name) in self.members:
            self.scan.lost["file~ of the same name as another one"] += 1
        else:
            self.members[normal_form(name)] = info
            sort_in(name, self.scan)


def open_source(root):
    """Return the Zip or Folder at a path that exists."""
    root = Path(root).expanduser()
    return Zip(root) if is_zip(root) else Folder(root)


def is_zip(path):
    """Return whether a path is a file whose name ends in .zip."""
    return path.suffix.lower() == ".zip" and path.is_file()


def _name(info):
    """Return the name of a member as it should be: archives from Windows have backslashes, those from macOS no flag
    that says that names are UTF-8."""
    name = info.filename
    if not info.flag_bits & 0x800:
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:
            pass
    return name.replace("\\", "/")


def _is_image(name):
    return PurePosixPath(name).suffix.lower() in EXTENSIONS


def _is_system_path(name):
    return any(map(is_system_name, name.split("/")))
