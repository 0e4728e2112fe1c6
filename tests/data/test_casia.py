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


def test_every_row_is_the_aligned_face_of_its_line_in_a_folder_and_a_zip(casia, tmp_path, monkeypatch):
    faces = load_casia(casia, cache=tmp_path)
    listed = read_landmarks(casia / "casia_landmark.txt", labeled=True)
    assert len(faces) == 48 and faces.classes == 6
    images, labels = faces.batch(np.array([0, 17, 47]))
    for image, label, i in zip(images, labels, (0, 17, 47)):
        assert np.array_equal(image, align(read_image(casia / listed.paths[i]), listed.points[i]))
        assert label == listed.labels[i]
    shutil.make_archive(tmp_path / "casia", "zip", casia.parent, casia.name)    # with the folder around everything
    zipped = load_casia(tmp_path / "casia.zip", casia / "casia_landmark.txt", cache=tmp_path)
    assert np.array_equal(faces.images, zipped.images) and faces.fingerprint == zipped.fingerprint
    memmap = np.memmap
    for refused in ("r", "rc"):    # by a network disk that can't map files shared, or at all

        def refuse(file, dtype, mode, refused=refused, **kwargs):
            if mode in refused:
                raise OSError(19, "No such device")
            return memmap(file, dtype, mode, **kwargs)

        monkeypatch.setattr(np, "memmap", refuse)
        assert np.array_equal(load_casia(casia, cache=tmp_path).images, faces.images)


def test_killed_and_simultaneous_builds(casia, tmp_path):
    program = f"""
import os, time
from faces.data import cache
cache.CHUNK, align_all = 10, cache.align.align_all
cache.align.align_all = lambda source, names, points: ({{}}) or align_all(source, names, points)
print(cache.load_casia({str(casia)!r}, cache={str(tmp_path / "cache")!r}))"""

    def start(before):
        return subprocess.Popen([sys.executable, "-c", program.format(before)], cwd=ROOT, stdout=subprocess.PIPE,
                                text=True)

    assert start("os._exit(9) if names[0] == '0000048/007.jpg' else None").wait(timeout=600) == 9
    assert list((tmp_path / "cache").glob("*/.faces.u8.*")) and not list((tmp_path / "cache").glob("*/faces.u8"))
    processes = [start("time.sleep(0.2)") for _ in range(2)]             # slowly enough for the builds to overlap
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert all("48 faces of 6 people\n" in output for output in outputs)
    assert sum("aligning 48 faces" in output for output in outputs) == 1  # the other one has waited
    expected = load_casia(casia, cache=tmp_path / "another").images
    assert np.array_equal(load_casia(casia, cache=tmp_path / "cache").images, expected)
    assert not list((tmp_path / "cache").glob("*/.faces.u8.*"))           # what the killed build left is deleted


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
    failed.with_name("faces.u8").write_bytes(b"")
    with pytest.raises(InputError, match="faces.u8 is damaged .*delete .* and start again"):
        load_casia(copy, cache=tmp_path / "cache")


def test_people_in_lfw_can_be_dropped(copy, tmp_path):
    person = sorted(LFW_OVERLAP)[0]
    (copy / "0000047").rename(copy / person)
    edit_list(copy, lambda lines: [line.replace("0000047/", f"{person}/") for line in lines])
    faces = load_casia(copy, cache=tmp_path / "c", drop_lfw_overlap=True)
    assert faces.classes == 5 and len(faces) == 40 and faces.labels.max() == 4


def test_aligned_faces_with_a_list(tmp_path):
    root, file = tmp_path / "aligned", tmp_path / "list.txt"
    for i, name in enumerate(("a.png", "b 1.png", "deep/c.png", "unlisted.png")):
        write_image(root / name, np.pad(align(*draw_face(i, i)), ((0, 0), (8 * (i == 2),) * 2, (0, 0))))
    for text, message in (("a.png 0\nno.png 1\n", "more than 1%"), ("a.png 0\nb 1.png 0\n", "lists only one person"),
                          ("a.png\t0\n\nb 1.png 0\ndeep/c.png   1 \n", None)):
        file.write_text(text)
        if message:
            with pytest.raises(InputError, match=message):
                load_casia(root, cache=tmp_path / "cache", label_list=file)
    faces = load_casia(root, cache=tmp_path / "cache", label_list=file)
    assert faces.labels.tolist() == [0, 0, 1] and faces.classes == 2
    assert all(np.array_equal(faces.images[i], align(*draw_face(i, i))) for i in range(3))
    with pytest.raises(InputError, match="pass only one of them"):
        load_casia(root, file, tmp_path / "cache", label_list=file)
