"""MTCNN against a literal reading of its pipeline and against facenet-pytorch; the two scripts that write lists."""
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from literal_mtcnn import literal

from faces.images import read_image
from faces.landmarks import read_landmarks
from mtcnn.boxes import nms, nms_of_smaller
from mtcnn.detector import Detector, Faces, groups, strips
from mtcnn.landmark_lists import Journal, median_points
from mtcnn.nets import PooledConvolution
from mtcnn.pyramid import level_sizes
from mtcnn.search import Find, choose, frame

MTCNN = Path(__file__).resolve().parents[2] / "mtcnn"
LFW = MTCNN.parents[1] / "shared" / "data" / "lfw"
LANDMARKS = np.array([(203.8, 101.6), (246.8, 104.6), (224.5, 130.3), (200.8, 139.0), (244.4, 141.7)])  # as looked at


@pytest.fixture(scope="module")
def photo():
    return skimage.data.astronaut()


@pytest.fixture(scope="module")
def detector():
    return Detector(device="cpu")


# ---- the detector


def test_astronaut(detector, photo):
    faces = detector.detect(photo[:200])
    assert [a.shape for a in faces] == [(1, 4), (1,), (1, 5, 2)] and {a.dtype for a in faces} == {np.dtype("float32")}
    assert faces.scores[0] > 0.99
    np.testing.assert_allclose(faces.landmarks[0], LANDMARKS, atol=3)
    x1, y1, x2, y2 = faces.boxes[0]
    assert ((faces.landmarks[0] > (x1, y1)) & (faces.landmarks[0] < (x2, y2))).all()


@pytest.mark.parametrize("edge", [{"top": 88}, {"left": 188}, {"right": 258}, {"bottom": 156}],
                         ids=lambda edge: next(iter(edge)))
def test_landmarks_stay_where_they_are_when_the_border_cuts_the_face(detector, photo, edge):
    top, left = edge.get("top", 0), edge.get("left", 0)
    cut = photo[top:edge.get("bottom"), left:edge.get("right")]
    faces = detector.detect(cut)
    assert len(faces.scores) >= 1
    np.testing.assert_allclose(faces.landmarks[0] + (left, top), LANDMARKS, atol=4)


def test_a_mirrored_photo_gives_mirrored_landmarks_without_a_drift(detector, photo):
    """The networks learned from mirrored faces too, so a drift to one side would be the arithmetic's."""
    photos = [photo[y:y + 200, x:x + 200] for y in (15, 25, 35) for x in (115, 120, 125, 130)]
    drift = []
    for a, b in zip(detector.detect(photos), detector.detect([np.fliplr(p) for p in photos])):
        mirrored = (199 - b.landmarks[0][[1, 0, 2, 4, 3], 0], b.landmarks[0][[1, 0, 2, 4, 3], 1])
        drift.append(a.landmarks[0] - np.stack(mirrored, 1))
    assert abs(np.mean(drift, (0, 1))[0] / 2) < 0.3


@pytest.mark.parametrize("shape", [(1, 1, 3), (12, 4000, 3), (11, 11), (60, 60, 3), (300, 200)])
def test_nothing_found_is_empty(detector, shape):
    faces = detector.detect(np.full(shape, 90, np.uint8))
    assert [a.shape for a in faces] == [(0, 4), (0,), (0, 5, 2)]


def test_no_images_and_no_image(detector):
    assert detector.detect([]) == []
    for wrong in (np.zeros((40, 40, 4), np.uint8), np.zeros((40, 40, 3), np.float32)):
        with pytest.raises(ValueError, match="image"):
            detector.detect(wrong)


def test_gray_arrays_and_paths(detector, photo, tmp_path):
    gray = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)
    np.testing.assert_allclose(detector.detect(gray).landmarks[0], LANDMARKS, atol=4)
    cv2.imwrite(str(tmp_path / "a.png"), photo[..., ::-1])
    assert (detector.detect(tmp_path / "a.png").landmarks == detector.detect(photo).landmarks).all()


def test_a_batch_gives_what_single_images_give(detector, photo):
    right = np.ascontiguousarray(photo[:, 100:])
    images = [photo, np.zeros_like(photo), right, np.fliplr(photo), photo[:150, 150:300], np.zeros((5, 5), np.uint8)]
    for together, image in zip(detector.detect(images), images, strict=True):
        alone = detector.detect(image)
        for a, b in zip(together, alone):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, atol=0.02)


def test_strips_give_what_the_whole_image_gives(detector, photo):
    strip_by_strip = Detector(device="cpu")
    strip_by_strip.max_pixels = 4000
    assert len(strips(308, 308, 4000)) > 5
    for a, b in zip(strip_by_strip.detect(photo), detector.detect(photo)):
        np.testing.assert_allclose(a, b, atol=0.02)
    for rows in range(12, 60, 2):  # P-Net gives rows / 2 - 5 rows of cells
        cells = [top + 2 * k for top, bottom in strips(rows, 12, 1) for k in range((bottom - top) // 2 - 5)]
        assert cells == list(range(0, rows - 10, 2))


def test_a_photo_of_36_megapixels_takes_little_more_memory_than_itself():
    """Beside the image: its pyramid, 0.8 of it, and what the networks hold at once, whatever the number of strips."""
    program = """
import resource, numpy as np
from mtcnn.detector import Detector
detector, peak = Detector(device="cpu"), lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
detector.detect(np.zeros((200, 200, 3), np.uint8))
photo = np.full((6000, 6000, 3), 90, np.uint8)
before = peak()
detector.detect(photo)
print((peak() - before) / photo.nbytes)"""
    process = subprocess.run([sys.executable, "-c", program], cwd=MTCNN.parent, text=True, capture_output=True,
                             timeout=300)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) < 1.5


def test_groups_take_no_more_than_they_need():
    taken = []
    lists = groups((taken.append(size) or size for size in [5_000_000, 4_000_000, 30_000_000, 1, 1]), lambda size: size)
    assert next(lists) == [5_000_000, 4_000_000] and len(taken) == 2
    assert list(lists) == [[30_000_000], [1, 1]]


def test_processes_give_what_one_gives(detector, photo, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), photo[:256, 60:400, ::-1])
    alone, *others = detector.detect([tmp_path / "a.png"] * 40, workers=2)
    expected = detector.detect(tmp_path / "a.png")
    assert len(others) == 39 and len(expected.scores) == 1
    for a, b in zip(alone, expected):
        np.testing.assert_allclose(a, b, atol=0.02)


def test_one_convolution_for_the_four_that_are_pooled():
    torch.manual_seed(0)
    convolution, prelu = torch.nn.Conv2d(3, 10, 3), torch.nn.PReLU(10)
    torch.nn.init.normal_(prelu.weight)  # both signs, as in the release
    x = torch.randn(2, 3, 30, 44)
    expected = torch.nn.functional.max_pool2d(prelu(convolution(x)), 2)
    torch.testing.assert_close(PooledConvolution(convolution, prelu)(x), expected)


def test_levels():
    sizes, first = level_sizes(250, 251, 20, 0.709)
    assert sizes[:3] == [(250, 251), (150, 152), (108, 108)] and first == 1 and sizes[-1] == (14, 14)
    sizes, first = level_sizes(1000, 600, 100, 0.709)  # halves lead to the first one that is searched
    assert sizes[:5] == [(1000, 600), (500, 300), (250, 150), (125, 75), (120, 72)] and first == 4
    assert level_sizes(19, 300, 20, 0.709) == ([(19, 300)], 1)


def test_parity_with_a_literal_reading(detector, photo):
    """Two faces of different size, one of them cut by the border."""
    small = cv2.resize(photo[20:220, 120:320], None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
    image = photo[:220, :255].copy()
    image[60:180, 10:130] = small
    faces = detector.detect(image)
    boxes, scores, landmarks = literal(image)
    order, expected = np.argsort(faces.boxes[:, 0]), np.argsort(boxes[:, 0])
    assert len(order) == len(expected) == 2
    np.testing.assert_allclose(faces.landmarks[order], landmarks[expected], atol=0.5)
    np.testing.assert_allclose(faces.boxes[order], boxes[expected], atol=0.5)
    np.testing.assert_allclose(faces.scores[order], scores[expected], atol=0.01)


@pytest.mark.skipif(not LFW.is_dir(), reason="the faces for development are not here")
def test_parity_with_a_literal_reading_on_real_photos(detector):
    """All faces of 300 photos are the same, and 99 of 100 landmarks lie within half a pixel."""
    paths = sorted(LFW.rglob("*.jpg"))[::44][:300]
    distances, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # its convolutions are so small that threads spend their time waiting for each other
    slow = [literal(read_image(path)) for path in paths]
    torch.set_num_threads(threads)
    for path, (boxes, _, landmarks), faces in zip(paths, slow, detector.detect(paths), strict=True):
        assert len(boxes) == len(faces.boxes), path.name
        for points in landmarks:
            distances.append(np.linalg.norm(faces.landmarks - points, axis=2).max(1).min())
    assert len(distances) > 300 and np.percentile(distances, 99) < 0.5


def test_parity_with_facenet_pytorch(photo):
    """It keeps the release's rounding, so that its landmarks are half a pixel further to the right and down."""
    peer = pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed", exc_type=ImportError)
    image = cv2.copyMakeBorder(photo[:260, 60:400], 0, 0, 0, 30, cv2.BORDER_REPLICATE)
    _, probability, points = peer.MTCNN(min_face_size=20, device="cpu").detect(image, landmarks=True)
    faces = Detector(device="cpu").detect(image)
    assert len(faces.scores) == 1 and probability.max() > 0.9
    np.testing.assert_allclose(faces.landmarks[0] + 0.5, points[np.argmax(probability)].astype(float), atol=3)


def test_suppression_stays_within_an_image_and_knows_negative_boxes():
    boxes = np.array([[-30, -30, 10, 10], [-29, -30, 10, 10], [-30, -30, 10, 10], [-20, -20, 0, 0]], np.float32)
    scores, image_index = np.array([0.8, 0.9, 0.7, 0.6], np.float32), np.array([0, 0, 1, 1])
    assert nms(boxes, scores, image_index, 0.7).tolist() == [1, 2, 3]
    assert nms_of_smaller(boxes, scores, image_index, 0.7).tolist() == [1, 2]  # the last is inside the third


# ---- which face, and from where


def test_select_rules():
    boxes = np.array([[0, 0, 50, 50], [80, 80, 110, 110], [10, 100, 40, 140]], np.float32)
    faces = Faces(boxes, np.array([0.8, 0.9, 0.99], np.float32), np.tile(LANDMARKS.astype(np.float32), (3, 1, 1)))
    assert [choose(faces, (200, 200), rule) for rule in ("center", "largest", "score")] == [1, 0, 2]
    faces.landmarks[1] = faces.landmarks[1][[1, 0, 2, 4, 3]]  # a mirrored face is none
    assert choose(faces, (200, 200), "center") == 2
    assert choose(Faces(boxes[:0], faces.scores[:0], faces.landmarks[:0]), (200, 200), "center") is None


def test_frame_and_median():
    framed, corner = frame(np.ones((40, 100, 3), np.uint8), 0.25)
    assert framed.shape == (60, 150, 3) and framed.sum() == 40 * 100 * 3 and corner.tolist() == [25, 10]
    finds = [Find(0, (100, 200), 0, [50, 50] * 5), Find(1, (10, 10), 1, [3, 4] * 5), Find(2, (50, 50), 0, [5, 40] * 5),
             Find(3, (5, 5), -1, None)]
    np.testing.assert_allclose(median_points(finds), [(0.3, 0.4)] * 5)


def test_journal_survives_a_torn_line_and_forgets_other_settings(tmp_path):
    journal = Journal(tmp_path / "list.txt", {"a": 1}, 5)
    finds = [Find(3, (9, 9), 0, [1.5] * 10), Find(0, (9, 9), -1, None)]
    journal.add(finds)
    with open(journal.path, "ab") as file:
        file.write(b'[2, [9, 9], 0, [1.0, ')
    journal = Journal(tmp_path / "list.txt", {"a": 1}, 5)
    assert journal.missing() == [1, 2, 4]
    journal.add([Find(2, (9, 9), 1, [2.0] * 10)])
    assert [find.index for find in journal.finds()] == [0, 2, 3]
    assert Journal(tmp_path / "list.txt", {"a": 2}, 5).missing() == [0, 1, 2, 3, 4]


# ---- the scripts


@pytest.fixture(scope="module")
def people(tmp_path_factory, photo):
    """Three people, seven images; no face in two of them, one of which is all there is of Bob."""
    root = tmp_path_factory.mktemp("people")
    blank = np.full((100, 200, 3), 128, np.uint8)
    images = {"Ann/Ann_0001.png": photo[:250, 100:350], "Ann/Ann_0002.png": photo[10:250, 110:350],
              "Ann/Ann_0003.png": blank, "Bob/Bob_0001.png": blank, "Zoe/Zoe_0001.png": photo[30:230, 110:330],
              "Zoe/Zoe_0002.png": np.fliplr(photo), "Zoe/Zoe_0003.png": photo[72:180, 183:263]}
    for name, image in images.items():
        (root / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(root / name), image[..., ::-1])
    return root


def command(script, *args, **kwargs):
    return subprocess.run([sys.executable, script, *map(str, args)], cwd=MTCNN, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)


def in_process(script, *args):
    """Run a script's main() here, which saves the seconds that importing takes; returns its exit status."""
    try:
        importlib.import_module(f"mtcnn.{script.removesuffix('.py')}").main(list(map(str, args)))
    except SystemExit as stop:
        return stop.code
    return 0


def test_lfw_landmark(people, tmp_path):
    run = command("lfw_landmark.py", "--lfw", people, "--output", tmp_path / "list.txt", "--device", "cpu")
    assert run.returncode == 0, run.stderr
    listed = read_landmarks(tmp_path / "list.txt", labelled=False)
    points = dict(zip(listed.paths, listed.points))
    assert listed.paths == sorted(listed.paths) and len(listed.paths) == 7
    np.testing.assert_allclose(points["Ann/Ann_0001.png"] + (100, 0), LANDMARKS, atol=3)
    np.testing.assert_allclose(points["Zoe/Zoe_0003.png"] + (183, 72), LANDMARKS, atol=4)
    sizes = {"Ann/Ann_0001.png": (250, 250), "Ann/Ann_0002.png": (240, 240), "Zoe/Zoe_0001.png": (220, 200),
             "Zoe/Zoe_0002.png": (512, 512), "Zoe/Zoe_0003.png": (80, 108)}
    median = np.median([points[name] / size for name, size in sizes.items()], axis=0) * (200, 100)
    np.testing.assert_allclose(points["Bob/Bob_0001.png"], median, atol=0.02)
    assert "7 images: a face in 5" in run.stdout and "no face found, median landmarks: 2" in run.stdout
    failed = (tmp_path / "list.failed.txt").read_text().splitlines()
    assert [line.split("\t")[1] for line in failed if line.startswith("no face")] == ["Ann/Ann_0003.png",
                                                                                     "Bob/Bob_0001.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["list.failed.txt", "list.txt"]


def test_casia_landmark_leaves_out_what_has_no_face(people, tmp_path):
    run = command("casia_landmark.py", "--casia", people, "--output", tmp_path / "list.txt", "--device", "cpu")
    assert run.returncode == 0, run.stderr
    listed = read_landmarks(tmp_path / "list.txt", labelled=True)
    assert listed.paths == ["Ann/Ann_0001.png", "Ann/Ann_0002.png", "Zoe/Zoe_0001.png", "Zoe/Zoe_0002.png",
                            "Zoe/Zoe_0003.png"]
    assert listed.labels.tolist() == [0, 0, 1, 1, 1]
    assert "no face found, left out: 2" in run.stdout and "2 people; without an image that is left: 1 Bob" in run.stdout


def test_killed_and_run_again_gives_the_same_list(photo, tmp_path):
    for i in range(60):  # a second or two of work, so that the kill comes in the middle of it
        (tmp_path / "set" / f"Ann_{i:02d}").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "set" / f"Ann_{i:02d}" / "1.png"), photo[:300 - i, i:, ::-1])
    args = ["--lfw", tmp_path / "set", "--batch-size", "1", "--workers", "2", "--device", "cpu",
            "--output"]
    whole, again = tmp_path / "whole.txt", tmp_path / "again.txt"
    assert in_process("lfw_landmark.py", *args, whole) == 0
    journal = tmp_path / ".again.txt.partial"
    process = subprocess.Popen([sys.executable, "lfw_landmark.py", *map(str, [*args, again])], cwd=MTCNN,
                               stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not again.exists() and journal.exists()
    done = journal.read_bytes().count(b"\n") - 1
    run = command("lfw_landmark.py", *args, again)
    assert run.returncode == 0 and f"continuing: {done} of 60" in run.stdout
    assert done < 60 and again.read_text() == whole.read_text() and not journal.exists()


def test_detector_draws_photos(photo, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "a.png"), photo[..., ::-1])
    assert in_process("detector.py", tmp_path / "a.png", "--output", tmp_path / "out", "--device", "cpu") == 0
    assert "faces in 1 photo" in capsys.readouterr().out
    entry, = json.loads((tmp_path / "out" / "faces.json").read_text())
    np.testing.assert_allclose(entry["faces"][0]["landmarks"], LANDMARKS, atol=3)
    assert cv2.imread(str(tmp_path / "out" / entry["drawing"])).shape == photo.shape


def test_missing_folder_by_subprocess(tmp_path):
    run = command("lfw_landmark.py", "--lfw", tmp_path / "none", "--output", tmp_path / "list.txt")
    assert run.returncode == 2 and "does not exist" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize("content, script, sentence", [
    ({}, "lfw_landmark.py", "holds no images"),
    ({"Ann/Ann_0001.jpg": b"no image"}, "lfw_landmark.py", "1 of 1 images"),
    ({"Ann/Ann_0001.png": "blank"}, "lfw_landmark.py", "no face was found"),
    ({"0001.png": "blank"}, "casia_landmark.py", "no person's folder"),
    ({}, "casia_landmark.py", "holds no images"),
], ids=["empty", "unreadable", "faceless", "no person", "empty casia"])
def test_bad_input_is_one_sentence_and_status_2(content, script, sentence, tmp_path, capsys):
    root = tmp_path / "set"
    root.mkdir()
    blank = cv2.imencode(".png", np.zeros((50, 50), np.uint8))[1].tobytes()
    for name, data in content.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(blank if data == "blank" else data)
    status = in_process(script, f"--{script.split('_')[0]}", root, "--output", tmp_path / "list.txt")
    assert status == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "list.txt").exists()
