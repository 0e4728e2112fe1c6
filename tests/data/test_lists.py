"""Lists as people have them: separators, encodings, absolute paths, wrong orders; and whether they fit the photos."""
from functools import partial

import numpy as np
import pytest
from conftest import write_image

from faces.align import TEMPLATE
from faces.data.cache import load_casia
from faces.files import InputError
from faces.landmarks import read_labels, read_landmarks, write_landmarks

POINTS = " ".join(f"{v:g}" for v in TEMPLATE.ravel())


def written(folder, text, encoding="utf-8"):
    (folder / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return folder / "list.txt"


@pytest.mark.parametrize("separator, encoding", [("\t", "utf-8-sig"), (" ", "utf-16"), ("  \t", "utf-8")])
def test_lists_are_read_from_the_right(tmp_path, separator, encoding):
    numbers = POINTS.replace(" ", separator)
    file = written(tmp_path, "".join(f"p é\\a\x85b {i}.jpg{separator}7{separator}{numbers}{separator}\r\n\r\n"
                                     for i in range(3)), encoding)
    listed = read_landmarks(file, True)
    assert listed.paths == [f"p é/a\x85b {i}.jpg" for i in range(3)] and listed.labels.tolist() == [7, 7, 7]
    np.testing.assert_allclose(listed.points[1], TEMPLATE, atol=1e-3)


def test_absolute_paths_below_the_folder_by_any_of_its_names(tmp_path):
    root, other = tmp_path / "real/set", tmp_path / "elsewhere/p1"
    for folder in (root / "p0", other):
        folder.mkdir(parents=True)
    (root / "p1").symlink_to(other)
    (tmp_path / "link").symlink_to(root.parent)
    lines = (f"{root}/p0/0.jpg 0", f"{tmp_path}/link/set/p0/1.jpg 0", f"{other}/2.jpg 1", "./p1/3.jpg 1")
    for name in (root, tmp_path / "link/set"):
        paths, labels = read_labels(written(tmp_path, "\n".join(lines)), name)
        assert paths == ["p0/0.jpg", "p0/1.jpg", "p1/2.jpg", "p1/3.jpg"] and labels.tolist() == [0, 0, 1, 1]
    for name in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="line 2: the path '.*' leaves the folder"):
            read_labels(written(tmp_path, f"0.jpg 0\n{name}/0.jpg 1"), root)


@pytest.mark.parametrize("read, text, message", [
    *((read_labels, f"a.png 0\n{line}\n", "line 2: expected a path, a label") for line in (
        "d.png", "d.png 1.0", f"d.png {10**30}")),
    *((partial(read_landmarks, labeled=True), f"b.jpg 0 {POINTS}\n{line}\n", "line 2: expected .*ten finite numbers")
      for line in (f"a.jpg\t0\t{POINTS} 1".replace(" ", "\t"), f"a.jpg {POINTS}", f"a.jpg 0 {POINTS[:-7]}nan")),
    (read_labels, "a.png 0\na.png 1\n", "lists a.png twice"), (read_labels, "a.png 0\n../b.png 1\n", "2: .* leaves"),
    (read_labels, "\n", "is an empty list"), (read_labels, "\0", "not a text file"),
    (read_labels, "x" * 10**6, "not a text file")])
def test_malformed_lists(tmp_path, read, text, message):
    with pytest.raises(InputError, match=f"list.txt.*{message}"):
        read(written(tmp_path, text))


@pytest.mark.parametrize("change, message", [
    *((change, "not arranged like those of an upright face") for change in (
        lambda p: p.transpose(0, 2, 1),                                        # all x come before all y
        lambda p: p[..., ::-1], lambda p: p * (-1, 1) + (150, 0),              # y comes before x; mirrored
        *(lambda p, order=order: p[:, order] for order in (                    # eyes, nose, mouth in another order
            [1, 0, 2, 4, 3], [2, 0, 1, 3, 4], [0, 1, 3, 4, 2], [3, 4, 2, 0, 1], [0, 1, 2, 4, 3])))),
    (lambda p: p / 150, "fractions of the image's size"),
    # Landmarks of other copies of the images
    (lambda p: p + (200, 0), "5 of 5 landmarks are outside the image"),
    (lambda p: p * 0.5, "in the upper left part of the images, as if they were found in smaller copies"),
    (lambda p: p * 1.4, "in the lower right part of the images, as if they were found in larger copies"),
])
def test_landmarks_that_do_not_fit_are_refused(casia, tmp_path, change, message):
    old = read_landmarks(casia / "casia_landmark.txt", labeled=True)
    write_landmarks(tmp_path / "list.txt", zip(old.paths, old.labels, change(old.points)))
    with pytest.raises(InputError, match=message):
        load_casia(casia, tmp_path / "list.txt", tmp_path / "cache")


def test_forgotten_landmarks_are_one_instruction(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        write_image(tmp_path / "photos" / name, np.zeros((150, 150, 3), np.uint8))
    with pytest.raises(InputError, match="run `python mtcnn/casia_landmark.py --casia .*photos` first") as raised:
        load_casia(tmp_path / "photos", cache=tmp_path / "cache")
    assert str(raised.value).count("landmarks are needed") == 1
