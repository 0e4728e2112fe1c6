"""Training sets as people have them: stray files, links, foreign names, archives from other systems, wrong lists."""
import os
import re
import shutil
import struct
import unicodedata
import zipfile

import numpy as np
import pytest
from conftest import draw_face, write_image

from faces.align import align
from faces.data import cache as cache_module
from faces.data.cache import load_casia
from faces.data.casia import list_photos, person, read_casia
from faces.data.sources import Folder, Zip
from faces.files import InputError
from faces.images import UnreadableImage
from faces.landmarks import read_landmarks, write_landmarks


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
    for name in (".ipynb_checkpoints/0.png", "p1/.ipynb_checkpoints/0.png", "p1/@eaDir/0.png", "__MACOSX/p1/._0.png",
                 "overview.png", "p2/Thumbs.db", "readme.txt"):
        (aligned / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(aligned / "p0/0.png", aligned / name)
    faces = load(aligned, tmp_path)
    assert len(faces) == 6 and faces.classes == 3
    assert "left out: 1 photo outside the person folders, 5 hidden or system files, 1 .txt file" in str(faces)


def test_photos_that_can_not_be_read_stop_the_run(aligned, tmp_path):
    (aligned / "p0/0.png").rename(aligned / "p0/0.heic")
    os.mkfifo(aligned / "p0/2.png")
    with pytest.raises(InputError, match=r"2 of 7 files in .* \(1 .heic file, 1 special file such as a pipe\)"):
        load(aligned, tmp_path)


def test_photos_at_several_levels_stop_the_run(aligned, tmp_path):
    for i in range(11):
        write_image(aligned / f"p0/old/{i}.png", align(*draw_face(0, i)))
        write_image(aligned / f"p1/{i + 2}.png", align(*draw_face(1, i)))
    with pytest.raises(InputError, match="17 photos in folders such as p0, but 11 at other levels, such as p0/old/0"):
        load(aligned, tmp_path)


def test_the_person_is_the_folder_that_directly_holds_the_photo(aligned, tmp_path):
    assert person("part/0000045/001.jpg") == "part/0000045"
    (tmp_path / "parts/0").mkdir(parents=True)
    (tmp_path / "parts/1").mkdir()
    for name, part in (("p0", "0"), ("p1", "0"), ("p2", "1")):
        shutil.copytree(aligned / name, tmp_path / "parts" / part / name)
    assert load(tmp_path / "parts", tmp_path).labels.tolist() == [0, 0, 1, 1, 2, 2]
    (tmp_path / "wrapped").mkdir()
    aligned.rename(tmp_path / "wrapped/CASIA")
    faces = load(tmp_path / "wrapped", tmp_path)
    assert faces.classes == 3 and f"the person folders are in {tmp_path}/wrapped/CASIA" in str(faces)
    with pytest.raises(InputError, match="has 2 photos of 1 person; pass a folder with one folder per person"):
        list_photos(Folder(tmp_path / "parts/1"))
    with pytest.raises(InputError, match="has 2 photos of 1 person, because they are not in folders"):
        list_photos(Folder(tmp_path / "parts/1/p2"))


def test_lfw_is_not_trained_on(aligned):
    for i in range(3):
        (aligned / f"p{i}/0.png").rename(aligned / f"p{i}/p{i}_0001.png")
        (aligned / f"p{i}/1.png").rename(aligned / f"p{i}/p{i}_0002.png")
    assert len(list_photos(Folder(aligned))[0]) == 6
    (aligned.parent / "pairs.txt").write_text("10\t300\n")
    with pytest.raises(InputError, match="is LFW, the test set"):
        list_photos(Folder(aligned))


def test_links_to_people_are_followed(aligned, tmp_path):
    (tmp_path / "subset").mkdir()
    for name in ("p0", "p2"):
        (tmp_path / "subset" / name).symlink_to(aligned / name)
    (tmp_path / "subset/p2/loop").symlink_to(tmp_path / "subset")
    assert load(tmp_path / "subset", tmp_path).classes == 2


def test_names_need_not_be_utf8(aligned, tmp_path):
    try:
        os.rename(os.fsencode(aligned / "p0"), os.fsencode(aligned) + b"/Jos\xe9")
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    with open(os.fsencode(aligned) + b"/Jos\xe9/0.png", "wb"):
        pass                                                       # an empty file, which failed.txt names
    for name in range(2, 120):
        shutil.copy(aligned / "p2/0.png", aligned / f"p2/{name}.png")
    faces = load(aligned, tmp_path)
    assert faces.classes == 3 and "1 unusable image" in str(faces)
    failed, = (tmp_path / "cache").glob("*/failed.txt")
    assert failed.read_bytes() == b"Jos\xe9/0.png\tempty file\n"
    (tmp_path / "list.txt").write_bytes(b"Jos\xe9/1.png\t0\np2/0.png\t1\n")
    assert load(aligned, tmp_path, label_list=tmp_path / "list.txt").classes == 2


def test_accents_may_be_composed_in_the_list_and_decomposed_on_disk(aligned, tmp_path):
    (aligned / "p0").rename(aligned / unicodedata.normalize("NFD", "José"))
    (tmp_path / "list.txt").write_text("José/0.png 0\nJosé/1.png 0\np2/0.png 1\n", encoding="utf-8")
    assert len(load(aligned, tmp_path, label_list=tmp_path / "list.txt")) == 3


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_lists_saved_by_windows_editors(aligned, tmp_path, encoding):
    text = "p0\\0.png\t0\r\np1\\0.png\t1\r\n"
    (tmp_path / "list.txt").write_bytes(("\ufeff" * (encoding == "utf-16-be") + text).encode(encoding))
    assert len(load(aligned, tmp_path, label_list=tmp_path / "list.txt")) == 2


def test_labels_with_gaps_are_renumbered(aligned, tmp_path):
    (tmp_path / "list.txt").write_text("p2/0.png 45\np1/0.png 7\np0/0.png 45\n")
    faces = load(aligned, tmp_path, label_list=tmp_path / "list.txt")
    assert faces.labels.tolist() == [1, 0, 1]
    assert "of 2 people, whose labels 7 to 45 are renumbered from 0" in str(faces)
    assert "3 photos not in the list" in str(faces)


def test_changed_images_are_aligned_again(aligned, tmp_path, capsys):
    before = load(aligned, tmp_path)
    assert np.array_equal(load(aligned, tmp_path).images, before.images)
    assert capsys.readouterr().out.count("aligning 6 faces") == 1
    write_image(aligned / "p0/0.png", align(*draw_face(5, 5)))
    os.utime(aligned / "p0/0.png", ns=(1, 1))                      # also if the clock has not moved
    after = load(aligned, tmp_path)
    assert np.array_equal(after.images[0], align(*draw_face(5, 5))) and "aligned on 20" in str(after)
    assert f"changed since the cache {os.path.dirname(before.images.filename)}" in capsys.readouterr().out


# Zip archives

def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            archive.writestr(name, data)


def members(root, prefix="", separator="/"):
    return [(separator.join((prefix + path.relative_to(root).as_posix()).split("/")), path.read_bytes())
            for path in sorted(root.rglob("*.png"))]


def test_a_zip_made_by_macos(aligned, tmp_path):
    files = members(aligned, "CASIA/")
    write_zip(tmp_path / "set.zip", [*files, *(("__MACOSX/" + name.replace("/p", "/._p"), b"") for name, _ in files),
                                     ("CASIA/.DS_Store", b"")])
    assert Zip(tmp_path / "set.zip").names()[0] == "p0/0.png"
    assert load(tmp_path / "set.zip", tmp_path).classes == 3


def test_zips_made_by_windows_or_without_the_utf8_flag(aligned, tmp_path):
    write_zip(tmp_path / "set.zip", members(aligned, separator="|"))
    data = re.sub(rb"(p\d)\|(\d\.png)", rb"\1\\\2", (tmp_path / "set.zip").read_bytes())
    (tmp_path / "set.zip").write_bytes(data.replace(b"p0\\", "é\\".encode()))
    assert Zip(tmp_path / "set.zip").names()[-1] == "é/1.png"
    assert load(tmp_path / "set.zip", tmp_path).classes == 3


def test_hostile_zips(aligned, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a/0.png", bytes(9_000_000), zipfile.ZIP_DEFLATED)
        archive.writestr("a/1.png", bytes(9_000_000), zipfile.ZIP_BZIP2)
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
    data[data.rfind(b"PK\1\2") + 8] |= 8                            # claims that the name is UTF-8
    data[data.rfind(b"b/1.png")] = 0xff
    struct.pack_into("<H", data, data.rfind(b"PK\1\2") + 8, 0x800)
    (tmp_path / "set.zip").write_bytes(data)
    with pytest.raises(InputError, match="is not a readable zip file"):
        Zip(tmp_path / "set.zip")


# Landmarks that can't be those of the images

def listed(casia):
    return read_landmarks(casia / "casia_landmark.txt", labeled=True)


def rewrite(casia, tmp_path, change):
    """Write the list of `casia` with other landmarks; return its path."""
    old = listed(casia)
    write_landmarks(tmp_path / "list.txt", zip(old.paths, old.labels, change(old.points)))
    return tmp_path / "list.txt"


@pytest.mark.parametrize("change, message", [
    (lambda p: p.transpose(0, 2, 1), "all x come before all y;"),
    (lambda p: p[..., ::-1].transpose(0, 2, 1), "all y come before all x;"),
    (lambda p: p[..., ::-1], "y comes before x"),
    (lambda p: p[:, [1, 0, 2, 4, 3]], "the image-right eye comes first"),
    (lambda p: p * (-1, 1) + (150, 0), "as in mirrored images"),
    (lambda p: p[:, [2, 0, 1, 3, 4]], "the nose comes first"),
    (lambda p: p[:, [4, 3, 2, 1, 0]], "not arranged like those of an upright face"),
    (lambda p: p / 150, "fractions of the image's size"),
])
def test_lists_in_another_order_are_refused_before_any_image_is_read(casia, tmp_path, change, message):
    with pytest.raises(InputError, match=f"list.txt is not a usable landmark list: .*{message}"):
        read_casia(casia, rewrite(casia, tmp_path, lambda p: change(p).reshape(-1, 5, 2)))


@pytest.mark.parametrize("change, message", [
    (lambda p: p * 2.5, "landmarks are outside the image"),
    (lambda p: p + (200, 0), "5 of 5 landmarks are outside the image"),
    (lambda p: p * 0.5, "in the upper left part of the images, as if they were found in smaller copies"),
    (lambda p: p * 1.4, "in the lower right part of the images, as if they were found in larger copies"),
])
def test_landmarks_of_other_copies_of_the_images_stop_the_build(casia, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        load(casia, tmp_path, landmarks=rewrite(casia, tmp_path, change))
    assert not list((tmp_path / "cache").glob("*/cache.json"))


def test_a_single_wrong_face_is_left_out(casia, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "MAX_FAILED", 0.1)

    def spoil(points):
        points[3] = points[3][[0, 2, 1, 4, 3]]
        points[5] += 500
        return points

    assert len(load(casia, tmp_path, landmarks=rewrite(casia, tmp_path, spoil))) == 46


def test_forgotten_landmarks_are_one_instruction(casia, tmp_path):
    root = shutil.copytree(casia, tmp_path / "photos", ignore=shutil.ignore_patterns("*.txt"))
    with pytest.raises(InputError, match="run `python mtcnn/casia_landmark.py --casia .*photos` first") as raised:
        load(root, tmp_path)
    assert str(raised.value).count("landmarks are needed") == 1
