"""The aligned cache: it is built from training sets in all formats, and mistakes in them are one-sentence errors."""
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import ROOT, draw_face, file_size_limit, write_image

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


def test_a_zip_with_a_wrapper_folder_gives_the_same_faces(casia, tmp_path):
    with zipfile.ZipFile(tmp_path / "casia.zip", "w") as archive:
        for path in casia.rglob("*.jpg"):
            archive.write(path, f"CASIA-WebFace/{path.relative_to(casia)}")
    folder = load_casia(casia, cache=tmp_path)
    zipped = load_casia(tmp_path / "casia.zip", casia / "casia_landmark.txt", cache=tmp_path)
    assert np.array_equal(folder.images, zipped.images) and np.array_equal(folder.labels, zipped.labels)
    assert folder.fingerprint == zipped.fingerprint                        # the location of the data doesn't matter


def test_a_build_that_was_killed_is_repeated(casia, tmp_path, monkeypatch):
    original = cache_module._fill
    monkeypatch.setattr(cache_module, "_fill", lambda *args: os._exit(9) if args[2] == 30 else original(*args))
    monkeypatch.setattr(cache_module, "BLOCK", 10)
    if os.fork() == 0:
        load_casia(casia, cache=tmp_path / "cache")
    os.wait()
    assert list((tmp_path / "cache").glob("*/.faces.u8.*")) and not list((tmp_path / "cache").glob("*/faces.u8"))
    monkeypatch.undo()
    faces = load_casia(casia, cache=tmp_path / "cache")
    assert np.array_equal(faces.images, load_casia(casia, cache=tmp_path / "another").images)
    assert not list((tmp_path / "cache").glob("*/.faces.u8.*"))            # what the killed build left is deleted


def test_processes_started_together_build_one_cache(casia, tmp_path):
    program = f"""
from faces.data import cache
fill = cache._fill
cache._fill = lambda *args: __import__("time").sleep(0.02) or fill(*args)    # so that the builds would overlap
print(cache.load_casia({str(casia)!r}, cache={str(tmp_path)!r}))"""
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=600) for process in processes]
    assert all("48 faces of 6 people\n" in out for out, _ in outputs), outputs
    assert sum("aligning 48 faces" in out for out, _ in outputs) == 1


def test_a_full_disk_is_a_one_sentence_error(casia, tmp_path):
    """Limit the size of files, so that writing fails in the middle of the build, as it does on a full disk."""
    with file_size_limit(25 * 112 * 96 * 3), pytest.raises(InputError, match="can't write .*: File too large"):
        load_casia(casia, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/*faces.u8*"))


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
    monkeypatch.setattr(cache_module, "MAX_FAILED", 0.1)
    (copy / "0000045/001.jpg").write_bytes(b"")                            # empty
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


def test_more_than_one_percent_unusable_images_stop_the_build(copy, tmp_path):
    (copy / "0000045/001.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"more than 1% of the 48 images .*0000045/001.jpg: not an image"):
        load_casia(copy, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/faces.u8"))               # no cache is marked as complete


def test_people_in_lfw_can_be_dropped(copy, tmp_path):
    assert len(LFW_OVERLAP) == 19
    person = sorted(LFW_OVERLAP)[0]
    (copy / "0000047").rename(copy / person)
    edit_list(copy, lambda lines: [line.replace("0000047/", f"{person}/") for line in lines])
    faces = load_casia(copy, cache=tmp_path / "c", drop_lfw_overlap=True)
    assert faces.classes == 5 and len(faces) == 40 and faces.labels.max() == 4
    assert load_casia(copy, cache=tmp_path / "c").classes == 6


@pytest.fixture
def aligned(tmp_path):
    """Six aligned faces of three people, without person folders; one name contains a space, one face is square."""
    names = ["a.png", "b 1.png", "deep/c.png", "d.png", "e.png", "f.png"]
    for i, name in enumerate(names):
        face = align(*draw_face(i // 2, i))
        write_image(tmp_path / "aligned" / name, np.pad(face, ((0, 0), (8, 8), (0, 0))) if i == 4 else face)
    return tmp_path / "aligned", names


def test_aligned_faces_with_a_list(aligned, tmp_path):
    root, names = aligned
    (tmp_path / "list.txt").write_text("a.png\t0\nb 1.png 0\n\ndeep/c.png   1 \ne.png\t2\t\nd.png 1\n")  # not f.png
    faces = load_casia(root, cache=tmp_path / "cache", label_list=tmp_path / "list.txt")
    assert faces.labels.tolist() == [0, 0, 1, 2, 1] and faces.classes == 3
    for row, i in enumerate((0, 1, 2, 4, 3)):
        assert np.array_equal(faces.images[row], align(*draw_face(i // 2, i)))
    with zipfile.ZipFile(tmp_path / "aligned.zip", "w") as archive:
        for name in names:
            archive.write(root / name, name)
    zipped = load_casia(tmp_path / "aligned.zip", cache=tmp_path / "cache", label_list=tmp_path / "list.txt")
    assert np.array_equal(faces.images, zipped.images) and faces.fingerprint == zipped.fingerprint


def test_lists_that_do_not_fit_together_are_refused(casia, aligned, tmp_path):
    with pytest.raises(InputError, match="pass only one of --landmarks and --list"):
        load_casia(casia, casia / "casia_landmark.txt", tmp_path / "cache", label_list=tmp_path / "list.txt")
    for text, message in (("a.png 0\nd.png 0\n", "lists only one person"), ("a.png 0\nno.png 1\n", "more than 1%")):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(InputError, match=message):
            load_casia(aligned[0], cache=tmp_path / "cache", label_list=tmp_path / "list.txt")


def test_a_damaged_cache_is_detected(casia, tmp_path):
    load_casia(casia, cache=tmp_path)
    data, = tmp_path.glob("*/faces.u8")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputError, match="faces.u8 is damaged .*delete .* and start again"):
        load_casia(casia, cache=tmp_path)
