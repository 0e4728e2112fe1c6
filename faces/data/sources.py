"""Where the photos of a set are: a folder, zip, RecordIO or LMDB. All list their photos and open them by name."""
import contextlib
import os
import stat
import zipfile
from collections import Counter
from functools import cached_property
from pathlib import Path

import numpy as np

from faces.data.lmdb import DATA, Lmdb
from faces.data.recordio import RECORDS, Records
from faces.files import InputError, existing_folder, path, progress_bar, reading
from faces.images import EXTENSIONS, MAX_BYTES, Scan, UnreadableImage, is_system_name, scan_images, sort_in
from faces.landmarks import normal_form

PARTS = (".z01", ".001")


def open_source(root):
    """Return the Folder, Zip, Records or Lmdb of a training set at a path; for errors, see open_photos()."""
    root = path(root)
    if (root / DATA).is_file() or root.is_file() and root.suffix.lower() in (".lmdb", ".mdb"):
        return Lmdb(root)
    return Records(root) if any((root / name).is_file() for name in RECORDS) else open_photos(root)


def open_photos(root, content: str = "one folder of photos per person"):
    """Return the Folder or Zip at a path; `content` is what a folder should hold, for the error message. Raises
    InputError if there is nothing at the path, or it can't be read."""
    root = path(root)
    is_zip = root.is_file() and root.suffix.lower() in (".zip", *PARTS)
    return Zip(root) if is_zip else Folder(existing_folder(root, content))


def person_root(folder) -> Path:
    """Return the folder that holds the person folders: `folder`, or one inside, if it is all that `folder` holds, as in
    lfw-deepfunneled/lfw-deepfunneled/Name/Name_0001.jpg."""
    folder = Path(folder)
    while len(inner := _content(folder)) == 1 and (people := _content(inner[0])) and all(map(Path.is_dir, people)):
        folder = inner[0]
    return folder


def _content(folder):
    """Return the folders and photos that are directly in a folder; none if it is no folder."""
    try:
        entries = [Path(entry) for entry in os.scandir(folder) if not is_system_name(entry.name)]
        return [entry for entry in entries if entry.suffix.lower() in EXTENSIONS or entry.is_dir()]
    except OSError:
        return []


class Folder:
    """The photos in a folder and its subfolders. `root` is the folder that holds the person folders, see person_root();
    `wrapper` is how to get there from the folder that was passed, such as "lfw-deepfunneled/", with which names in
    lists may begin, or ""."""

    def __init__(self, folder):
        self.root = person_root(path(folder))
        inner = self.root.relative_to(path(folder)).as_posix()
        self.wrapper = "" if inner == "." else f"{inner}/"

    def __str__(self) -> str:
        return str(self.root)

    @cached_property
    def scan(self) -> Scan:
        """The faces.images.Scan of the folder, from when it was first needed."""
        return scan_images(self.root)

    def names(self) -> list[str]:
        """Return the relative paths of all photos, sorted."""
        return self.scan.paths

    def open(self, name: str) -> str:
        """Return the path of a photo, to pass to read_image(); its name was checked when the list was read."""
        file = os.path.join(self.root, name)
        if not name.isascii() and not os.path.lexists(file):
            file = os.path.join(self.root, self._normalized.get(normal_form(name), name))
        return file

    def versions(self, names: list[str]) -> np.ndarray:
        """Return int64 (N, 2), which changes when one of these photos changes: its size and modification time."""
        versions = np.full((len(names), 2), -1, np.int64)
        for i, name in enumerate(progress_bar(names, "looking for changes", unit=" images", unit_scale=True, delay=2,
                                              leave=False)):
            with contextlib.suppress(OSError, ValueError):
                status = os.stat(self.open(name))
                versions[i] = status.st_size, status.st_mtime_ns
        return versions

    @cached_property
    def _normalized(self):
        return {normal_form(name): name for name in self.names() if not name.isascii()}


class Zip:
    """The photos in a zip, `root`, which is read without unpacking it. Names omit the folders around everything,
    `wrapper`, such as "CASIA-WebFace/". `members` are all files: {normal form of the name: zipfile.ZipInfo}."""

    def __init__(self, file):
        self.root = path(file)
        suffix, join = self.root.suffix.lower(), f"zip -s 0 {self.root.stem}.zip --out whole.zip"
        part = InputError(f"{self.root} is a part of a split zip; join the parts into one zip first, as with "
                          f"`{f'cat {self.root.stem}.* > whole.zip' if suffix == '.001' else join}`.")
        if suffix in PARTS:
            raise part
        with reading(self.root, "zip", "download it again"):
            self.archive = zipfile.ZipFile(self.root)
            if any(0 < info.volume < 0xffff for info in self.archive.infolist()):
                raise part
        members = [(_name(info), info) for info in self.archive.infolist() if not info.filename.endswith(("/", "\\"))]
        if any(info.flag_bits & 1 for _, info in members):
            raise InputError(f"{self.root} is encrypted; unpack it with its password, and pass the folder.")
        photos = [name for name, _ in members if not _is_system(name) and name.lower().endswith(tuple(EXTENSIONS))]
        common = os.path.commonprefix([name.rsplit("/", 2)[0] + "/" if name.count("/") > 1 else "" for name in photos])
        self.wrapper = common[:common.rfind("/") + 1]
        self.scan, self.members = Scan([], Counter(), Counter()), {}
        for name, info in members:
            name = name.removeprefix(self.wrapper)
            if _is_system(name):
                self.scan.ignored["hidden or system file~"] += 1
            elif stat.S_ISLNK(info.external_attr >> 16):
                self.scan.lost["link~ in the zip"] += 1
            elif normal_form(name) in self.members:
                self.scan.lost["file~ of the same name as another one"] += 1
            else:
                self.members[normal_form(name)] = info
                sort_in(name, self.scan)
        self.scan.paths.sort()

    def __str__(self) -> str:
        return str(self.root)

    def names(self) -> list[str]:
        """Return the relative paths of all photos, sorted."""
        return self.scan.paths

    def open(self, name: str) -> bytes:
        """Return the bytes of a member; raise UnreadableImage if it is missing, damaged, or over MAX_BYTES."""
        info = self.members.get(normal_form(name))
        if info is None:
            raise UnreadableImage("not in the zip")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # Python unpacks other methods without a bound on memory.
            raise UnreadableImage("compressed in a way that is not read; create the zip with the usual deflate method")
        if info.file_size > MAX_BYTES:
            raise UnreadableImage(f"over {MAX_BYTES // 10**6} MB")
        try:
            with self.archive.open(info) as file:
                return file.read(info.file_size)    # unpacks no more, whatever the member contains
        except Exception as error:    # decompressors raise many kinds of exceptions on damaged members
            raise UnreadableImage(f"damaged in the zip ({str(error).partition(' for file')[0]})") from error

    def versions(self, names: list[str]) -> np.ndarray:
        """Return int64 (N, 2), which changes when one of these photos changes: its size and checksum."""
        infos = [self.members.get(normal_form(name)) for name in names]
        return np.array([(-1, -1) if info is None else (info.file_size, info.CRC) for info in infos], np.int64)


def _name(info):
    """Return a member's name; zips from Windows have backslashes, those from macOS don't say that names are UTF-8."""
    name = info.filename
    if not info.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def _is_system(name):
    return any(map(is_system_name, name.split("/")))
