"""The aligned cache: it is built from training sets in all formats, and mistakes in them are one-sentence errors."""
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, draw_face, write_image

from faces.align import align
from faces.data import cache as cache_module
from faces.data.cache import load_casia
from faces.data.casia import LFW_OVERLAP
from faces.files import InputError
from faces.images import read_image
from faces.landmarks import read_landmarks


@pytest.fixture
def copy(casia, tmp_path):
    return shutil.copytree(casia, tmp_path / "CASIA-WebFace")


def edit_list(root, change):
    path = root / "casia_landmark.txt"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def test_every_row_is_the_aligned_face_of_its_line(casia, tmp_path):
    faces = load_casia(casia, cache=tmp_path)
    listed = read_landmarks(casia / "casia_landmark.txt", labeled=True)
    assert len(faces) == 48 and faces.classes == 6
    images, labels = faces.batch(np.array([0, 17, 47]))
    for image, label, i in zip(images, labels, (0, 17, 47)):
        assert np.array_equal(image, align(read_image(casia / listed.paths[i]), listed.points[i]))
        assert label == listed.labels[i]


def test_a_zip_gives_the_same_faces(casia, tmp_path):
    shutil.make_archive(tmp_path / "casia", "zip", casia.parent, casia.name)    # with the folder around everything
    folder = load_casia(casia, cache=tmp_path)
    zipped = load_casia(tmp_path / "casia.zip", casia / "casia_landmark.txt", cache=tmp_path)
    assert np.array_equal(folder.images, zipped.images) and np.array_equal(folder.labels, zipped.labels)
    assert folder.fingerprint == zipped.fingerprint                        # the location of the data doesn't matter


def test_killed_and_simultaneous_builds(casia, tmp_path):
    program = f"""
import os, time
from faces.data import cache
cache.BLOCK, fill = 10, cache._fill
cache._fill = lambda *args: ({{}}) or fill(*args)
print(cache.load_casia({str(casia)!r}, cache={str(tmp_path / "cache")!r}))"""

    def start(before):
        return subprocess.Popen([sys.executable, "-c", program.format(before)], cwd=ROOT, stdout=subprocess.PIPE,
                                text=True)

    assert start("os._exit(9) if args[2] == 30 else None").wait(timeout=600) == 9
    assert list((tmp_path / "cache").glob("*/.faces.u8.*")) and not list((tmp_path / "cache").glob("*/faces.u8"))
    processes = [start("time.sleep(0.02)") for _ in range(2)]             # slowly enough for the builds to overlap
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert all("48 faces of 6 people\n" in output for output in outputs)
    assert sum("aligning 48 faces" in output for output in outputs) == 1  # the other one has waited
    expected = load_casia(casia, cache=tmp_path / "another").images
    assert np.array_equal(load_casia(casia, cache=tmp_path / "cache").images, expected)
    assert not list((tmp_path / "cache").glob("*/.faces.u8.*"))           # what the killed build left is deleted


def test_a_cache_on_a_disk_that_can_not_map_files_shared(casia, tmp_path, monkeypatch):
    expected, memmap = load_casia(casia, cache=tmp_path), np.memmap
    for refused in ("r", "rc"):

        def refuse(file, dtype, mode, refused=refused, **kwargs):
            if mode in refused:
                raise OSError(19, "No such device")
            return memmap(file, dtype, mode, **kwargs)

        monkeypatch.setattr(np, "memmap", refuse)
        assert np.array_equal(load_casia(casia, cache=tmp_path).images, expected.images)


def test_changed_lists_and_images_get_another_cache(copy, tmp_path, capsys):
    before = load_casia(copy, cache=tmp_path / "cache")
    assert np.array_equal(load_casia(copy, cache=tmp_path / "cache").images, before.images)
    assert capsys.readouterr().out.count("aligning 48 faces") == 1
    write_image(copy / "0000045/001.jpg", draw_face(0, 5)[0])
    os.utime(copy / "0000045/001.jpg", ns=(1, 1))                          # also if the clock has not moved
    changed = load_casia(copy, cache=tmp_path / "cache")
    assert not np.array_equal(changed.images[0], before.images[0]) and "aligned on 20" in str(changed)
    assert "the images have changed since the cache" in capsys.readouterr().out
    edit_list(copy, lambda lines: lines[:-1])
    after = load_casia(copy, cache=tmp_path / "cache")
    assert len(after) == len(before) - 1 and after.fingerprint != before.fingerprint


def test_unusable_images_are_listed_and_do_not_change_labels(copy, tmp_path, monkeypatch):
    (copy / "0000045/001.jpg").write_bytes(b"")                            # empty
    with pytest.raises(InputError, match=r"more than 1% of the 48 images .*0000045/001.jpg: empty file"):
        load_casia(copy, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/faces.u8"))               # no cache is marked as complete
    monkeypatch.setattr(cache_module, "MAX_FAILED", 0.1)
    (copy / "0000046/002.jpg").unlink()                                    # missing
    edit_list(copy, lambda lines: [*lines[:20], lines[20].replace(lines[20].split()[2], "500"), *lines[21:]])
    for _ in range(2):                                                     # built, and found
        faces = load_casia(copy, cache=tmp_path / "cache")
        assert len(faces) == 45 and faces.classes == 6 and np.bincount(faces.labels).tolist() == [7, 7, 7, 8, 8, 8]
        assert "3 unusable images" in str(faces)
    failed, = (tmp_path / "cache").glob("*/failed.txt")
    reasons = dict(line.split("\t") for line in failed.read_text().splitlines())
    assert reasons["0000045/001.jpg"] == "empty file" and "No such file" in reasons["0000046/002.jpg"]
    assert "mirrored" in reasons["0000047/005.jpg"] and len(reasons) == 3


def test_people_in_lfw_can_be_dropped(copy, tmp_path):
    assert len(LFW_OVERLAP) == 19
    person = sorted(LFW_OVERLAP)[0]
    (copy / "0000047").rename(copy / person)
    edit_list(copy, lambda lines: [line.replace("0000047/", f"{person}/") for line in lines])
    faces = load_casia(copy, cache=tmp_path / "c", drop_lfw_overlap=True)
    assert faces.classes == 5 and len(faces) == 40 and faces.labels.max() == 4
    assert load_casia(copy, cache=tmp_path / "c").classes == 6


def test_aligned_faces_with_a_list(tmp_path):
    root, lines = tmp_path / "aligned", ("a.png\t0", "b 1.png 0", "", "deep/c.png   1 ", "e.png\t2\t", "d.png 1")
    for i, name in enumerate(("a.png", "b 1.png", "deep/c.png", "e.png", "d.png", "unlisted.png")):
        face = align(*draw_face(i, i))
        write_image(root / name, np.pad(face, ((0, 0), (8, 8), (0, 0))) if i == 4 else face)
    (tmp_path / "list.txt").write_text("\n".join(lines))
    faces = load_casia(root, cache=tmp_path / "cache", label_list=tmp_path / "list.txt")
    assert faces.labels.tolist() == [0, 0, 1, 2, 1] and faces.classes == 3
    assert all(np.array_equal(faces.images[i], align(*draw_face(i, i))) for i in range(5))
    for text, message in (("a.png 0\ne.png 0\n", "lists only one person"), ("a.png 0\nno.png 1\n", "more than 1%")):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(InputError, match=message):
            load_casia(root, cache=tmp_path / "cache", label_list=tmp_path / "list.txt")
    with pytest.raises(InputError, match="pass only one of --landmarks and --list"):
        load_casia(root, root / "landmarks.txt", tmp_path / "cache", label_list=tmp_path / "list.txt")


def test_a_damaged_cache_is_detected(casia, tmp_path):
    load_casia(casia, cache=tmp_path)
    data, = tmp_path.glob("*/faces.u8")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputError, match="faces.u8 is damaged .*delete .* and start again"):
        load_casia(casia, cache=tmp_path)
