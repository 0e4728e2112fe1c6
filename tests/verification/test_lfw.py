"""The pairs of LFW and of sets like it, in all their formats, and the alignment of their faces."""
import os
import re
import unicodedata
import zipfile

import cv2
import numpy as np
import pytest
import skimage.data
from conftest import write_image, write_people

from faces import landmarks
from faces.align import TEMPLATE, align, similarity_transform
from faces.data.sources import open_source
from faces.files import InputError
from faces.images import read_image
from faces.landmarks import photos_digest, read_landmarks, write_landmarks
from faces.verification.lfw import load_faces, load_lfw
from faces.verification.pairs import read_pairs
from mtcnn.landmark_lists import find_landmarks

PAIRS = ["2\t2", "Ann\t1\t2", "Bob\t1\t3", "Ann\t1\tBob\t1", "Ann\t2\tEve\t1",
         "Bob\t2\t3", "Eve\t1\t2", "Bob\t2\tEve\t2", "Eve\t1\tAnn\t1", ""]


@pytest.fixture
def lfw(tmp_path):
    """Return a folder of pairs.txt and images, three each of three people; landmarks.txt is beside it."""
    rows = write_people(tmp_path / "lfw", ("Ann", "Bob", "Eve"), 3, "{0}/{0}_{1:04d}.jpg")
    (tmp_path / "lfw" / "pairs.txt").write_text("\n".join(PAIRS))
    write_landmarks(tmp_path / "landmarks.txt", [(name, points) for name, _, points in rows])
    return tmp_path / "lfw"


def test_pairs_keep_the_order_of_the_file(lfw):
    write_image(lfw / "Ann/Ann_0001.png", read_image(lfw / "Ann/Ann_0001.jpg"))    # the .jpg takes precedence
    pairs = read_pairs(lfw)
    assert pairs.paths == [f"{name}_{i:04d}.jpg" for name in ("Ann/Ann", "Bob/Bob", "Eve/Eve") for i in (1, 2, 3)
                           if (name, i) not in {("Ann/Ann", 3), ("Eve/Eve", 3)}]
    assert [[pairs.paths[i] for i in pair] for pair in pairs.pairs[:3]] == [
        ["Ann/Ann_0001.jpg", "Ann/Ann_0002.jpg"], ["Bob/Bob_0001.jpg", "Bob/Bob_0003.jpg"],
        ["Ann/Ann_0001.jpg", "Bob/Bob_0001.jpg"]]
    assert pairs.same.tolist() == [True, True, False, False] * 2
    assert pairs.folds.tolist() == [0] * 4 + [1] * 4


def test_pairs_in_other_formats_give_the_same_pairs(lfw, tmp_path):
    expected = read_pairs(lfw)
    paths = [[expected.paths[i] for i in pair] for pair in expected.pairs]
    same = expected.same.astype(int)
    lists = {
        "short_header.txt": ["2", *PAIRS[1:]],
        "three.txt": [f"{a} {b} {s}" for (a, b), s in zip(paths, same)],
        "first.txt": [f"{s}\t{a}\t{b}" for (a, b), s in zip(paths, same)],
        "columns.csv": ["left,right,same", *(f"{a},{b},{s}" for (a, b), s in zip(paths, same))],
        "absolute.txt": [f"{lfw / a} {lfw / b} {s}" for (a, b), s in zip(paths, same)],
        "from_the_parent.txt": [f"lfw/{a} lfw/{b} {s}" for (a, b), s in zip(paths, same)],
        "per_image.txt": [f"{a.rpartition('/')[2]} {s and i + 1}\n{b.rpartition('/')[2]} {s and i + 1}"
                          for i, ((a, b), s) in enumerate(zip(paths, same))],
        "pairs.csv": ["name,imagenum1,imagenum2,", *(line.replace("\t", ",") + "," * (line.count("\t") == 2)
                                                     for line in PAIRS[1:-1])],
        "no_header.txt": PAIRS[1:]}
    for name, lines in lists.items():
        (tmp_path / name).write_text("\n".join(lines))
        pairs = read_pairs(lfw, tmp_path / name)
        assert [[pairs.paths[i] for i in pair] for pair in pairs.pairs] == paths, name
        assert (pairs.same == expected.same).all() and pairs.names == expected.names, name
        assert pairs.folds.tolist() == ([0] * 4 + [1] * 4 if name == "short_header.txt" else
                                         [0, 1, 0, 1, 2, 3, 2, 3]), name    # both kinds in each fold
    (tmp_path / "shifted.txt").write_text("a.png 1\nb.png 1\nc.png 2\nd.png 0\n")
    with pytest.raises(InputError, match="line 3: expected .* with the same number"):
        read_pairs(lfw, tmp_path / "shifted.txt")


def test_photos_in_one_folder_are_people_as_their_pairs_say(tmp_path):
    for name in "abcd":
        write_image(tmp_path / "photos" / f"{name}.png", np.zeros((112, 96, 3), np.uint8))
    (tmp_path / "list.txt").write_text("photos/a.png photos/b.png 1\nphotos/a.png photos/c.png 0\n"
                                       "photos/c.png photos/d.png 1\nphotos/b.png photos/d.png 0\n")
    pairs = read_pairs(tmp_path, tmp_path / "list.txt")
    assert pairs.names is None and pairs.identities.tolist() == [0, 0, 1, 1] and pairs.folds.tolist() == [0, 0, 1, 1]


def test_files_in_one_folder_name_people_as_in_calfw(tmp_path):
    for name in ("Ann_0001", "Ann_0002", "Bo_0001", "Bo_Li_0001", "Bo_Li_0003"):
        write_image(tmp_path / f"{name}.jpg", np.zeros((112, 96, 3), np.uint8))
    (tmp_path / "pairs.txt").write_text("Ann_0001.jpg 1\nAnn_0002.jpg 1\nBo_0001.jpg 0\nBo_Li_0001.jpg 0\n"
                                        "Bo_0001.jpg 0\nAnn_0001.jpg 0\n")
    pairs = read_pairs(tmp_path, identification=True)
    assert pairs.people("").tolist() == [["Ann", "Ann"], ["Bo", "Bo_Li"], ["Bo", "Ann"]]
    assert pairs.names == ["Ann", "Ann", "Bo", "Bo_Li", "Bo_Li"] and pairs.identifiable()


@pytest.mark.parametrize("pairs_are", ["outermost", "inside"])
def test_lfw_as_kaggle_has_it(lfw, tmp_path, pairs_are):
    inner = tmp_path / "archive" / "lfw-deepfunneled" / "lfw-deepfunneled"
    inner.parent.mkdir(parents=True)
    lfw.rename(inner)
    (inner / "pairs.txt").rename((inner if pairs_are == "inside" else tmp_path / "archive") / "pairs.txt")
    for root in (tmp_path / "archive", inner.parent, inner):
        assert read_pairs(root).paths[0] == "Ann/Ann_0001.jpg"


@pytest.mark.parametrize("line, text, message", [
    (0, "ten\t300", "line 1: expected"),
    (0, "2\t0", "declares 2 x 0 = 0 pairs"),
    (0, "3", "declares 1 x 6 = 6 pairs but contains 8"),
    (0, "1\t4", "1 fold"),
    (2, "Bob\t1", "line 3: expected"),
    (3, "Ann\t1\tBob\t-1", "line 4: expected"),
    (3, "Ann\t1\tAnn\t2", "line 4: expected"),
    (4, "Ann\t2\tZoe\t1", r"lacks 1 of the 8 images named in .* \(Zoe/Zoe_0001\)"),
    (4, "Ann\t2\t../Bob\t1", "lacks 1 of the 8 images"),
])
def test_malformed_pairs_files_are_one_sentence_errors(lfw, line, text, message):
    lines = PAIRS.copy()
    lines[line] = text
    (lfw / "pairs.txt").write_text("\n".join(lines))
    with pytest.raises(InputError, match=message):
        read_pairs(lfw)


def test_each_face_is_aligned_with_its_own_landmarks(lfw):
    loaded = load_lfw(lfw, landmarks=lfw.parent / "landmarks.txt")
    assert loaded.faces.shape == (7, 112, 96, 3)
    rows = read_landmarks(lfw.parent / "landmarks.txt", labeled=False)
    assert rows.paths[4] == loaded.pairs.paths[3] == "Bob/Bob_0002.jpg"
    np.testing.assert_array_equal(loaded.faces[3], align(read_image(lfw / rows.paths[4]), rows.points[4]))


def test_the_list_that_lfw_landmark_wrote_is_used_for_its_photos(lfw, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(landmarks, "CACHE", tmp_path / "cache")
    listed, rows = landmarks.default_list(lfw, "lfw_landmark.txt"), read_landmarks(tmp_path / "landmarks.txt", False)
    write_landmarks(listed, zip(rows.paths, rows.points), made_from=photos_digest(open_source(lfw)))
    assert load_lfw(lfw).landmarks == str(listed)
    os.utime(lfw / "Ann/Ann_0001.jpg", ns=(1, 1))
    with pytest.raises(InputError, match="no landmark list"):
        load_lfw(lfw)
    assert f"the photos in {lfw} have changed" in capsys.readouterr().out
    (tmp_path / "landmarks.txt").rename(lfw / "lfw_landmark.txt")    # one's own list is used without a record
    (lfw / "lfw_landmark.json").write_text('{"images": 3}')    # which this is not
    assert load_lfw(lfw).landmarks == str(lfw / "lfw_landmark.txt")


def test_landmarks_are_detected_if_there_is_no_list(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(landmarks, "CACHE", tmp_path / "cache")
    photo = skimage.data.astronaut()[:250, 100:350]
    pupils = np.array([[104, 101], [147, 103]])  # measured by eye
    for name, shift in (("Ann", 0), ("Bob", 10)):
        for i in (1, 2):
            write_image(tmp_path / "lfw" / name / f"{name}_{i:04d}.jpg", np.roll(photo, shift, 1))
    (tmp_path / "pairs.txt").write_text("2 1\nAnn 1 2\nAnn 1 Bob 1\nBob 1 2\nAnn 2 Bob 2\n")
    loaded = load_lfw(tmp_path / "lfw", find_landmarks=find_landmarks)
    err = capsys.readouterr().err
    assert "detecting landmarks in 4 images now" in err and "no face in 0 of 4 images" in loaded.landmarks
    assert abs(loaded.faces[0].astype(int) - loaded.faces[2]).mean() < 12  # alignment undoes the shift
    expected = cv2.warpAffine(photo, similarity_transform(pupils, TEMPLATE[:2]), (96, 112))
    assert np.corrcoef(expected.ravel(), loaded.faces[0].ravel())[0, 1] > 0.8


def test_aligned_faces_need_no_landmarks(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    for name, face in (("a.png", image), ("b.png", image[:, 8:-8]), ("c.png", image[:50])):
        write_image(tmp_path / name, face)
    np.testing.assert_array_equal(load_faces(open_source(tmp_path), ["a.png", "b.png"]), [image[:, 8:-8]] * 2)
    with pytest.raises(InputError, match="c.png: an image of 50 rows and 112 columns is not an aligned face"):
        load_faces(open_source(tmp_path), ["a.png", "c.png"])


@pytest.mark.parametrize("pairs_are", ["in the folder of the zip", "at the top of the zip", "beside the zip"])
def test_a_zip_is_read_without_unpacking_it(lfw, tmp_path, pairs_are):
    expected = load_lfw(lfw, landmarks=tmp_path / "landmarks.txt")
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive:
        for file in lfw.rglob("*.jpg"):
            archive.write(file, f"lfw/{file.relative_to(lfw).as_posix()}")
        if pairs_are == "beside the zip":
            (lfw / "pairs.txt").rename(tmp_path / "pairs.txt")
        else:
            archive.write(lfw / "pairs.txt", "pairs.txt" if pairs_are == "at the top of the zip" else "lfw/pairs.txt")
    loaded = load_lfw(tmp_path / "zipped.zip", landmarks=tmp_path / "landmarks.txt")
    assert np.array_equal(loaded.faces, expected.faces) and loaded.pairs.paths == expected.pairs.paths
    with pytest.raises(InputError, match="no landmark list for .*zipped.zip; unpack it"):
        load_lfw(tmp_path / "zipped.zip", find_landmarks=find_landmarks)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_names_and_numbers_that_are_written_differently(lfw, tmp_path, encoding):
    """Decomposed letters on disk, composed ones in the lists, a byte-order mark, and images numbered from 0."""
    on_disk, in_lists = unicodedata.normalize("NFD", "José"), unicodedata.normalize("NFC", "José")
    (lfw / "Ann").rename(lfw / on_disk)
    for i in (1, 2, 3):
        (lfw / on_disk / f"Ann_{i:04d}.jpg").rename(lfw / on_disk / f"{on_disk}_{i - 1:04d}.jpg")
    pairs = ["2\t2", "Ann\t0\t1", "Bob\t1\t3", "Ann\t0\tBob\t1", "Ann\t1\tEve\t1", *PAIRS[5:8], "Eve\t1\tAnn\t0"]
    (lfw / "pairs.txt").write_text("\n".join(pairs).replace("Ann", in_lists), encoding=encoding)
    text = re.sub(r"Ann/Ann_000(\d)", lambda m: f"{in_lists}/{in_lists}_{int(m[1]) - 1:04d}",
                  (tmp_path / "landmarks.txt").read_text())
    (tmp_path / "landmarks.txt").write_text(text, encoding=encoding)
    loaded = load_lfw(lfw, landmarks=tmp_path / "landmarks.txt")
    assert len(loaded.faces) == 7 and f"{on_disk}/{on_disk}_0000.jpg" in loaded.pairs.paths


def test_landmarks_of_other_copies_of_the_images_are_refused(tmp_path):
    names = [f"{i}.png" for i in range(15)]
    for name in names:
        write_image(tmp_path / name, np.zeros((160, 150, 3), np.uint8))
    with pytest.raises(InputError, match="the landmarks of .* are in the upper left part of the images"):
        load_faces(open_source(tmp_path), names, np.array([TEMPLATE * 0.4] * 15))


@pytest.mark.parametrize("mistake, message", [
    (lambda lfw, file: (lfw / "pairs.txt").unlink(), "no pairs.txt in"),
    (lambda lfw, file: (lfw / "Ann/Ann_0002.jpg").unlink(), r"lacks 1 of the 7 images named in .* \(Ann/Ann_0002\)"),
    (lambda lfw, file: (lfw / "Ann/Ann_0002.jpg").write_bytes(b"no image"),
     r"1 of 7 images in .* can't be used \(Ann/Ann_0002.jpg: not an image.*\)"),
    (lambda lfw, file: file.unlink(), "landmarks.txt: No such file"),
    (lambda lfw, file: file.write_text("".join(file.read_text().splitlines(True)[1:])),
     r"lacks 1 of the 7 images that are needed \(Ann/Ann_0001.jpg\)"),
    (lambda lfw, file: file.write_text("Ann/Ann_0001.jpg" + "\t1.5" * 9 + "\n"), "line 1: expected a path, ten"),
    (lambda lfw, file: lfw.rename(lfw.with_name("moved")), "lfw does not exist"),
])
def test_mistakes_in_a_set_are_one_sentence_errors(lfw, mistake, message):
    mistake(lfw, lfw.parent / "landmarks.txt")
    with pytest.raises(InputError, match=message) as error:
        load_lfw(lfw, landmarks=lfw.parent / "landmarks.txt")
    assert "\n" not in str(error.value)
