"""The aligned cache: it is built from training sets in all formats, and mistakes in them are one-sentence errors."""
import json
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
from faces.landmarks import read_landmarks, write_landmarks


@pytest.fixture
def copy(casia, tmp_path):
    return shutil.copytree(casia, tmp_path / "CASIA-WebFace")


def edit_list(root, change):
    path = root / "casia_landmark.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(change(lines)) + "\n")


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


def test_aligned_faces_need_no_list(tmp_path):
    for person in range(3):
        for photo in range(2):
            face = align(*draw_face(person, photo))
            square = np.pad(face, ((0, 0), (8, 8), (0, 0)))
            write_image(tmp_path / f"aligned/p{person}/{photo}.png", face if photo else square)
    faces = load_casia(tmp_path / "aligned", cache=tmp_path / "cache")
    assert faces.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(faces.images[0], align(*draw_face(0, 0)))


def test_a_killed_build_continues_where_it_stopped(casia, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "CHUNK", 10)
    aligned, original = [], cache_module._fill

    def die_in_the_third_chunk(face, listing, row, *transform):
        if row == 25:
            raise KeyboardInterrupt
        aligned.append(row)
        return original(face, listing, row, *transform)

    monkeypatch.setattr(cache_module, "_fill", die_in_the_third_chunk)
    with pytest.raises(KeyboardInterrupt):
        load_casia(casia, cache=tmp_path)
    aligned.clear()
    monkeypatch.setattr(cache_module, "_fill", lambda *args: aligned.append(args[2]) or original(*args))
    faces = load_casia(casia, cache=tmp_path)
    assert sorted(aligned) == list(range(20, 48))                          # the first two chunks were kept
    monkeypatch.undo()
    assert np.array_equal(faces.images, load_casia(casia, cache=tmp_path / "another").images)


def test_processes_started_together_build_one_cache(casia, tmp_path):
    program = f"""
from faces.data import cache
cache.CHUNK = 1                               # one journal line per face slows the builds down, so they would overlap
print(cache.load_casia({str(casia)!r}, cache={str(tmp_path)!r}))"""
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=600) for process in processes]
    assert all("48 faces of 6 people\n" in out for out, _ in outputs), outputs
    assert sum("aligning 48 faces" in out for out, _ in outputs) == 1
    (tmp_path / "another").mkdir()
    images, = (np.fromfile(path, np.uint8) for path in tmp_path.glob("*/faces.u8"))
    assert np.array_equal(images, load_casia(casia, cache=tmp_path / "another").images.ravel())


def test_a_full_disk_is_a_one_sentence_error_and_the_build_continues_later(casia, tmp_path, monkeypatch):
    """Limit the size of files, so that writing fails in the middle of the build, as it does on a full disk."""
    monkeypatch.setattr(cache_module, "CHUNK", 10)
    allocate = cache_module._allocate
    monkeypatch.setattr(cache_module, "_allocate", lambda folder, size: allocate(folder, 0))   # reserves no space
    with file_size_limit(25 * 112 * 96 * 3), pytest.raises(InputError, match="can't write .*: File too large"):
        load_casia(casia, cache=tmp_path / "cache")
    folder, = (tmp_path / "cache").iterdir()
    assert (folder / "journal.jsonl").read_text() == "[0, 10]\n[10, 20]\n" and not (folder / "cache.json").exists()
    monkeypatch.setattr(cache_module, "_allocate", allocate)
    faces = load_casia(casia, cache=tmp_path / "cache")
    assert np.array_equal(faces.images, load_casia(casia, cache=tmp_path / "another").images)


def test_a_changed_list_gets_another_cache(copy, tmp_path):
    before = load_casia(copy, cache=tmp_path / "cache")
    edit_list(copy, lambda lines: lines[:-1])
    after = load_casia(copy, cache=tmp_path / "cache")
    assert len(after) == len(before) - 1 and after.fingerprint != before.fingerprint


def test_unusable_images_are_listed_and_do_not_change_labels(casia, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "MAX_FAILED", 0.1)
    root = shutil.copytree(casia, tmp_path / "set")
    (root / "0000045/001.jpg").write_bytes(b"")                            # empty
    (root / "0000046/002.jpg").unlink()                                    # missing
    edit_list(root, lambda lines: [*lines[:20], mirror_landmarks(lines[20]), *lines[21:]])
    faces = load_casia(root, cache=tmp_path / "cache")
    assert len(faces) == 45 and faces.classes == 6 and np.bincount(faces.labels).tolist() == [7, 7, 7, 8, 8, 8]
    failed, = (tmp_path / "cache").glob("set-*/failed.txt")
    reasons = dict(line.split("\t") for line in failed.read_text().splitlines())
    assert reasons["0000045/001.jpg"] == "empty file" and "No such file" in reasons["0000046/002.jpg"]
    assert "mirrored" in reasons["0000047/005.jpg"] and len(reasons) == 3
    assert "3 unusable images" in str(faces)


def mirror_landmarks(line):
    """Return a line of the list with the landmarks mirrored inside the 150-pixel image."""
    name, label, *values = line.split("\t")
    values = [f"{150 - float(v):.2f}" if i % 2 == 0 else v for i, v in enumerate(values)]
    return "\t".join((name, label, *values))


def test_more_than_one_percent_unusable_images_stop_the_build(copy, tmp_path):
    (copy / "0000045/001.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"more than 1% of the 48 images .*0000045/001.jpg: not an image"):
        load_casia(copy, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/cache.json"))             # no cache is marked as complete


def test_people_in_lfw_can_be_dropped(copy, tmp_path):
    assert len(LFW_OVERLAP) == 19
    person = sorted(LFW_OVERLAP)[0]
    (copy / "0000047").rename(copy / person)
    edit_list(copy, lambda lines: [line.replace("0000047/", f"{person}/") for line in lines])
    assert load_casia(copy, cache=tmp_path / "c").classes == 6
    faces = load_casia(copy, cache=tmp_path / "c", drop_lfw_overlap=True)
    assert faces.classes == 5 and len(faces) == 40 and faces.labels.max() == 4


@pytest.mark.parametrize("change, message", [
    (lambda lines: [lines[0].rsplit("\t", 1)[0], *lines[1:]], "line 1: expected 12 tab-separated fields .* found 11"),
    (lambda lines: [*lines, "../../etc/passwd\t5\t" + "1\t" * 10], "leaves"),
    (lambda lines: [*lines, lines[0]], "0000045/001.jpg twice"),
    (lambda lines: [lines[0].replace("\t0\t", "\tzero\t"), *lines[1:]], "line 1: expected a label that is a whole"),
    (lambda lines: [lines[0].rsplit("\t", 1)[0] + "\tnan", *lines[1:]], "line 1: expected a label that is a whole"),
    (lambda lines: [lines[0].replace("\t0\t", f"\t{2**63}\t"), *lines[1:]], "line 1: expected a label that is a whole"),
    (lambda lines: [""], "is empty"),
])
def test_malformed_landmark_lists(copy, tmp_path, change, message):
    edit_list(copy, change)
    with pytest.raises(InputError, match=message):
        load_casia(copy, cache=tmp_path / "cache")


def test_a_written_list_can_be_read_back(tmp_path):
    points = np.random.default_rng(0).uniform(-5, 300, (3, 5, 2)).astype(np.float32)
    write_landmarks(tmp_path / "list.txt", zip(("a/1.jpg", "a/2.jpg", "b/1.jpg"), (0, 0, 1), points))
    read = read_landmarks(tmp_path / "list.txt", labeled=True)
    assert read.paths == ["a/1.jpg", "a/2.jpg", "b/1.jpg"] and read.labels.tolist() == [0, 0, 1]
    np.testing.assert_allclose(read.points, points, atol=0.006)
    (tmp_path / "tabs.txt").write_text("a b/1.jpg\t" + "\t".join("1234567890") + "\t\n")   # integers, trailing tab
    points = read_landmarks(tmp_path / "tabs.txt", labeled=False).points
    assert points.ravel().tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


@pytest.fixture
def aligned(tmp_path):
    """Six aligned faces of three people, without person folders; one name contains a space."""
    names = ["a.png", "b 1.png", "deep/c.png", "d.png", "e.png", "f.png"]
    for i, name in enumerate(names):
        write_image(tmp_path / "aligned" / name, align(*draw_face(i // 2, i)))
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


@pytest.mark.parametrize("text, message", [
    ("a.png\t0\nd.png\n", "line 2: expected a path and a whole number"),
    ("a.png 0\nd.png one\n", "line 2: expected a path and a whole number"),
    ("a.png 0\nd.png 1.0\n", "line 2: expected a path and a whole number"),
    ("a.png 0\nd.png -1\n", "line 2: expected a path and a whole number"),
    (f"a.png 0\nd.png {10**30}\n", "line 2: expected a path and a whole number"),
    ("a.png 0\nd.png 0\n", "lists only one person"),
    ("a.png 0\na.png 1\n", "lists a.png twice"),
    ("a.png 0\n/etc/passwd 1\n", "leaves"),
    ("\n", "is empty; pass a text file with lines of `path label`"),
    (b"\xff\xfe", "is empty"),
    (b"\x89PNG\0", "can't read the list .*: not a text file"),
    ("a.png 0\nno.png 1\n", r"more than 1% of the 2 images .*no.png: No such file"),
])
def test_malformed_lists_of_aligned_faces(aligned, tmp_path, text, message):
    (tmp_path / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        load_casia(aligned[0], cache=tmp_path / "cache", label_list=tmp_path / "list.txt")


def test_two_lists_are_refused(casia, tmp_path):
    with pytest.raises(InputError, match="pass only one of --landmarks and --list"):
        load_casia(casia, casia / "casia_landmark.txt", tmp_path / "cache", label_list=tmp_path / "list.txt")


def test_a_damaged_cache_is_detected(casia, tmp_path):
    load_casia(casia, cache=tmp_path)
    data, = tmp_path.glob("*/faces.u8")
    data.write_bytes(data.read_bytes()[:-1])
    assert json.loads((data.parent / "cache.json").read_text())["faces"] == 48
    with pytest.raises(InputError, match="damaged"):
        load_casia(casia, cache=tmp_path)
