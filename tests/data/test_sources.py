"""Training sets as people have them: stray files, links, foreign names, archives from other systems."""
import os
import re
import shutil
import unicodedata
import zipfile

import numpy as np
import pytest
from conftest import draw_face, write_image

from faces.align import align
from faces.data.cache import load_casia
from faces.data.casia import list_photos
from faces.data.sources import Folder, Zip, open_source
from faces.files import InputError
from faces.images import UnreadableImage


@pytest.fixture
def aligned(tmp_path):
    """Return a folder of six aligned faces of three people."""
    for person_number in range(3):
        for photo in range(2):
            write_image(tmp_path / f"set/p{person_number}/{photo}.png", align(*draw_face(person_number, photo)))
    return tmp_path / "set"


def load(root, tmp_path, **options):
    return load_casia(root, cache=tmp_path / "cache", **options)


def test_files_that_are_no_photos_of_people_are_left_out_and_counted(aligned, tmp_path):
    for name in ("overview.png", "p2/Thumbs.db", "readme.txt"):
        shutil.copy(aligned / "p0/0.png", aligned / name)
    faces = load(aligned, tmp_path)
    assert len(faces) == 6 and "left out: 1 photo outside the person folders" in str(faces)
    assert "1 hidden or system file" in str(faces) and "1 .txt file" in str(faces)


def test_photos_that_can_not_be_read_stop_the_run(aligned, tmp_path):
    (aligned / "p0/0.png").rename(aligned / "p0/0.heic")
    os.mkfifo(aligned / "p0/2.png")
    with pytest.raises(InputError, match=r"2 of 7 files in .* \(1 .heic file, 1 special file such as a pipe\)"):
        load(aligned, tmp_path)
    for i in range(11):
        write_image(aligned / f"p1/more{i}.png", np.zeros((112, 96, 3), np.uint8))
        write_image(aligned / f"p1/old/{i}.png", np.zeros((112, 96, 3), np.uint8))
    with pytest.raises(InputError, match="but 11 at other levels, such as p1/old/0.png; move all person folders"):
        load(aligned, tmp_path)


def test_the_person_is_the_folder_that_directly_holds_the_photo(aligned, tmp_path):
    for name in ("parts/0/p0", "parts/0/p1", "parts/1/p2"):
        shutil.copytree(aligned / name[-2:], tmp_path / name)
    assert load(tmp_path / "parts", tmp_path).labels.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(InputError, match="has 2 photos of 1 person; pass a folder with one folder per person"):
        list_photos(Folder(tmp_path / "parts/1"))
    with pytest.raises(InputError, match="has 2 photos of 1 person, because they are not in folders"):
        list_photos(Folder(tmp_path / "parts/1/p2"))


def test_a_folder_in_a_folder_is_entered_and_links_are_followed(aligned, tmp_path):
    inner = shutil.copytree(aligned, tmp_path / "archive/CASIA/CASIA")
    (tmp_path / "archive/readme.txt").touch()
    shutil.rmtree(inner / "p2")
    (inner / "p2").symlink_to(aligned / "p2")
    (inner / "p0/loop").symlink_to(inner)
    write_zip(tmp_path / "set.zip", aligned, "CASIA/CASIA/")
    (tmp_path / "list.txt").write_text("CASIA/CASIA/p0/0.png 0\nCASIA/CASIA/p2/1.png 1\n")
    for name in ("archive", "set.zip"):
        source = open_source(tmp_path / name)
        assert source.wrapper == "CASIA/CASIA/" and source.names()[0] == "p0/0.png"
        assert len(load(tmp_path / name, tmp_path, label_list=tmp_path / "list.txt")) == 2
    assert f"the person folders are in {inner}" in str(load(tmp_path / "archive", tmp_path))


def test_lfw_is_not_trained_on(aligned):
    for file in list(aligned.rglob("*.png")):
        file.rename(file.with_name(f"{file.parent.name}_000{file.name}"))
    assert len(list_photos(Folder(aligned))[0]) == 6
    (aligned.parent / "pairs.csv").touch()
    with pytest.raises(InputError, match="is LFW, the test set"):
        list_photos(Folder(aligned))


def test_names_need_not_be_utf8(aligned, tmp_path, monkeypatch):
    try:
        os.rename(os.fsencode(aligned / "p0"), os.fsencode(aligned) + b"/Jos\xe9")
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    open(os.fsencode(aligned) + b"/Jos\xe9/0.png", "wb").close()    # an empty file, which failed.txt names
    monkeypatch.setattr("faces.data.cache.MAX_FAILED", 0.2)
    for _ in range(2):
        assert "1 unusable image" in str(load(aligned, tmp_path))
    (tmp_path / "list.txt").write_bytes(b"Jos\xe9/1.png\t0\np2/0.png\t1\n")
    assert load(aligned, tmp_path, label_list=tmp_path / "list.txt").classes == 2


def test_accents_may_be_composed_in_the_list_and_decomposed_on_disk_and_labels_have_gaps(aligned, tmp_path):
    (aligned / "p0").rename(aligned / unicodedata.normalize("NFD", "José"))
    (tmp_path / "list.txt").write_text("José/0.png 45\np1/0.png 7\nJosé/1.png 45\n", encoding="utf-8")
    faces = load(aligned, tmp_path, label_list=tmp_path / "list.txt")
    assert faces.labels.tolist() == [1, 0, 1] and "3 photos not in the list" in str(faces)
    assert "of 2 people, whose labels 7 to 45 are renumbered from 0" in str(faces)


def write_zip(path, root, prefix="", separator="/"):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*.png")):
            archive.write(file, (prefix + file.relative_to(root).as_posix()).replace("/", separator))


def test_zips_made_by_macos_or_windows_or_without_the_utf8_flag(aligned, tmp_path):
    write_zip(tmp_path / "mac.zip", aligned, "CASIA/")
    with zipfile.ZipFile(tmp_path / "mac.zip", "a") as archive:
        for name in ("__MACOSX/CASIA/p0/._0.png", "CASIA/.DS_Store"):
            archive.writestr(name, b"")
    assert Zip(tmp_path / "mac.zip").names()[0] == "p0/0.png" and load(tmp_path / "mac.zip", tmp_path).classes == 3
    write_zip(tmp_path / "set.zip", aligned, separator="|")
    data = re.sub(rb"(p\d)\|(\d\.png)", rb"\1\\\2", (tmp_path / "set.zip").read_bytes())
    (tmp_path / "set.zip").write_bytes(data.replace(b"p0\\", "é\\".encode()))
    assert Zip(tmp_path / "set.zip").names()[-1] == "é/1.png" and load(tmp_path / "set.zip", tmp_path).classes == 3


def test_zips_that_are_encrypted_or_split_are_said_so(aligned, tmp_path):
    write_zip(tmp_path / "set.zip", aligned)
    data = (tmp_path / "set.zip").read_bytes()
    flags = b"PK\1\2\x14\3\x14\0"
    (tmp_path / "set.zip").write_bytes(data.replace(flags + b"\0", flags + b"\1"))
    with pytest.raises(InputError, match="is encrypted; unpack it"):
        load(tmp_path / "set.zip", tmp_path)
    volume = data.index(b"PK\1\2") + 34
    (tmp_path / "set.zip").write_bytes(data[:volume] + b"\1\0" + data[volume + 2:])    # the last part
    (tmp_path / "set.z01").touch()
    (tmp_path / "set.zip.001").touch()
    for part, join in (("set.zip", "zip -s 0 set"), ("set.z01", "zip -s 0 set"), ("set.zip.001", "cat set.zip")):
        with pytest.raises(InputError, match=f"is a part of a split zip; join .*{join}"):
            load(tmp_path / part, tmp_path)


def test_hostile_zips(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a/0.png", bytes(9_000_000), zipfile.ZIP_DEFLATED)
        archive.writestr("a/1.png", bytes(900_000), zipfile.ZIP_BZIP2)
        archive.writestr("b/0.png", b"first")
        archive.writestr("b/1.png", b"second")
    data = bytearray((tmp_path / "set.zip").read_bytes())
    (tmp_path / "set.zip").write_bytes(data.replace(b"b/1.png", b"b/0.png"))
    source = Zip(tmp_path / "set.zip")
    monkeypatch.setattr("faces.data.sources.MAX_BYTES", 1_000_000)
    for name, reason in (("a/0.png", "over 1 MB"), ("a/1.png", "deflate"), ("c.png", "not in the zip")):
        with pytest.raises(UnreadableImage, match=reason):
            source.open(name)
    assert source.open("b/0.png") == b"first" and source.scan.left_out() == "1 file of the same name as another one"
    source.members["a/0.png"].file_size = 1000                      # a bomb: more is in it than its header says
    with pytest.raises(UnreadableImage, match="damaged in the zip"):
        source.open("a/0.png")
