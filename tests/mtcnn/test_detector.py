"""The detector on its own, against a literal implementation of its pipeline, and against facenet-pytorch."""
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from conftest import PEAK, ROOT, needs_proc
from literal_mtcnn import literal
from PIL import Image
from threadpoolctl import threadpool_limits

from faces.device import pick_device
from faces.images import UnreadableImage, read_image
from mtcnn.boxes import nms, nms_of_smaller
from mtcnn.detector import Detector, groups, output_names, strips
from mtcnn.nets import PooledConvolution, SeparableMaxPool
from mtcnn.pyramid import level_sizes

LFW = ROOT.parent / "shared" / "data" / "lfw"
# Landmarks of the face in skimage.data.astronaut(), read off by eye.
LANDMARKS = np.array([(203.8, 101.6), (246.8, 104.6), (224.5, 130.3), (200.8, 139.0), (244.4, 141.7)])


@pytest.fixture(scope="module")
def photo():
    return skimage.data.astronaut()


@pytest.fixture(scope="module")
def detector():
    return Detector(device="cpu")


def test_astronaut(detector, photo):
    faces = detector.detect(photo[:200])
    assert [a.shape for a in faces] == [(1, 4), (1,), (1, 5, 2)] and {a.dtype for a in faces} == {np.dtype("float32")}
    assert faces.scores[0] > 0.99
    np.testing.assert_allclose(faces.landmarks[0], LANDMARKS, atol=3)
    x1, y1, x2, y2 = faces.boxes[0]
    assert ((faces.landmarks[0] > (x1, y1)) & (faces.landmarks[0] < (x2, y2))).all()


@pytest.mark.parametrize("edge", [{"top": 88}, {"left": 188}, {"right": 258}, {"bottom": 156}],
                         ids=lambda edge: next(iter(edge)))
def test_landmarks_are_stable_when_the_border_cuts_the_face(detector, photo, edge):
    top, left = edge.get("top", 0), edge.get("left", 0)
    cut = photo[top:edge.get("bottom"), left:edge.get("right")]
    faces = detector.detect(cut)
    assert len(faces.scores) >= 1
    np.testing.assert_allclose(faces.landmarks[0] + (left, top), LANDMARKS, atol=4)


def test_mirrored_photos_give_mirrored_landmarks(detector, photo):
    """The networks were trained on mirrored faces too, so a drift to one side would come from our arithmetic."""
    photos = [photo[y:y + 200, x:x + 200] for y in (15, 25, 35) for x in (115, 120, 125, 130)]
    drift = []
    for a, b in zip(detector.detect(photos), detector.detect([np.fliplr(p) for p in photos])):
        mirrored = (199 - b.landmarks[0][[1, 0, 2, 4, 3], 0], b.landmarks[0][[1, 0, 2, 4, 3], 1])
        drift.append(a.landmarks[0] - np.stack(mirrored, 1))
    assert abs(np.mean(drift, (0, 1))[0] / 2) < 0.3


@pytest.mark.parametrize("shape", [(1, 1, 3), (12, 4000, 3), (11, 11), (60, 60, 3), (300, 200)])
def test_without_a_face_all_arrays_are_empty(detector, shape):
    faces = detector.detect(np.full(shape, 90, np.uint8))
    assert [a.shape for a in faces] == [(0, 4), (0,), (0, 5, 2)]


@pytest.mark.parametrize("wrong", [
    np.zeros((40, 40, 4), np.uint8), np.zeros((40, 40, 3), np.float32), np.zeros((2, 40, 40, 3), np.uint8),
    np.zeros(5, np.uint8), torch.zeros(40, 40, 3), torch.zeros(40, 40, 3, dtype=torch.bfloat16),
    torch.zeros(3, 40, 40, dtype=torch.uint8), [None], [7], Image.new("I", (40, 40)), Image.new("F", (40, 40))])
def test_what_is_not_an_image_is_a_value_error_that_says_what_to_pass(detector, wrong):
    with pytest.raises(ValueError, match="image must .*; ") as caught:
        detector.detect(wrong)
    assert f"not {wrong.dtype} {tuple(wrong.shape)};" in str(caught.value) if hasattr(wrong, "dtype") else True


@pytest.mark.parametrize("empty", [np.zeros((0, 0, 3), np.uint8), np.zeros((0, 40), np.uint8),
                                   np.zeros((40, 0, 3), np.uint8), Image.new("RGB", (0, 0))])
def test_an_image_without_pixels_has_no_faces(detector, photo, empty):
    assert detector.detect([]) == []
    none, one = detector.detect([empty, photo[:200]])
    assert [a.shape for a in none] == [(0, 4), (0,), (0, 5, 2)] and len(one.scores) == 1


def test_gray_arrays_tensors_pil_images_and_paths(detector, photo, tmp_path):
    gray, expected = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY), detector.detect(photo).landmarks
    np.testing.assert_allclose(detector.detect(gray).landmarks[0], LANDMARKS, atol=4)
    cv2.imwrite(str(tmp_path / "a.png"), photo[..., ::-1])
    same = [tmp_path / "a.png", str(tmp_path / "a.png"), torch.from_numpy(photo), Image.fromarray(photo),
            Image.fromarray(photo).convert("RGBA"), Image.open(tmp_path / "a.png")]
    for faces in detector.detect(same):
        np.testing.assert_allclose(faces.landmarks, expected, atol=0.02)    # pixels; rounding depends on the batch
    assert all((detector.detect(image).landmarks == expected).all() for image in same)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_file_is_named(detector, photo, tmp_path, workers):
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    with pytest.raises(UnreadableImage, match="bad.jpg: not an image"):
        detector.detect([photo[:200], tmp_path / "bad.jpg"], workers=workers)


def test_auto_is_a_device():
    assert Detector(device="auto").device == Detector().device == Detector(device=None).device == pick_device("auto")


def test_a_batch_gives_the_same_as_single_images(detector, photo):
    right = np.ascontiguousarray(photo[:, 100:])
    images = [photo, np.zeros_like(photo), right, np.fliplr(photo), photo[:150, 150:300], np.zeros((5, 5), np.uint8)]
    for together, image in zip(detector.detect(images), images, strict=True):
        alone = detector.detect(image)
        for a, b in zip(together, alone):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, atol=0.02)


def test_strips_give_the_same_as_the_whole_image(detector, photo):
    strip_by_strip = Detector(device="cpu")
    strip_by_strip.max_pixels = 4000
    assert len(strips(308, 308, 4000)) > 5
    for a, b in zip(strip_by_strip.detect(photo), detector.detect(photo)):
        np.testing.assert_allclose(a, b, atol=0.02)
    for rows in range(12, 60, 2):  # P-Net gives rows / 2 - 5 rows of cells
        cells = [top + 2 * k for top, bottom in strips(rows, 12, 1) for k in range((bottom - top) // 2 - 5)]
        assert cells == list(range(0, rows - 10, 2))


@needs_proc
def test_memory_for_a_photo_of_16_megapixels_is_bounded():
    """Besides the image, memory holds its pyramid (0.8 of its size) and the activations of one strip, not of all."""
    program = PEAK + """
import numpy as np
from mtcnn.detector import Detector
detector = Detector(device="cpu")
detector.detect(np.zeros((200, 200, 3), np.uint8))
photo = np.full((4000, 4000, 3), 90, np.uint8)
before = peak()
detector.detect(photo)
print((peak() - before) / photo.nbytes)"""
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True,
                             timeout=900)
    assert process.returncode == 0, process.stderr
    assert 0 < float(process.stdout) < 1.5


def test_groups_are_read_lazily():
    taken = []
    lists = groups((taken.append(size) or size for size in [5_000_000, 4_000_000, 30_000_000, 1, 1]), lambda size: size)
    assert next(lists) == [5_000_000, 4_000_000] and len(taken) == 2
    assert list(lists) == [[30_000_000], [1, 1]]


def test_worker_processes_give_the_same_as_one(detector, photo, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), photo[:256, 60:400, ::-1])
    alone, *others = detector.detect([tmp_path / "a.png"] * 40, workers=2)
    expected = detector.detect(tmp_path / "a.png")
    assert len(others) == 39 and len(expected.scores) == 1
    for a, b in zip(alone, expected):
        np.testing.assert_allclose(a, b, atol=0.02)


def test_pooled_convolution_equals_convolution_and_pooling():
    torch.manual_seed(0)
    convolution, prelu = torch.nn.Conv2d(3, 10, 3), torch.nn.PReLU(10)
    torch.nn.init.normal_(prelu.weight)  # both signs, as in the release
    x = torch.randn(2, 3, 30, 44)
    expected = torch.nn.functional.max_pool2d(prelu(convolution(x)), 2)
    torch.testing.assert_close(PooledConvolution(convolution, prelu)(x), expected)


@pytest.mark.parametrize("size", [(22, 22), (46, 46), (2, 8)])
def test_separable_max_pooling_equals_max_pooling(size):
    x = torch.randn(3, 5, *size)
    assert torch.equal(SeparableMaxPool()(x), torch.nn.functional.max_pool2d(x, 3, 2, ceil_mode=True))


def test_sizes_of_pyramid_levels():
    sizes, first = level_sizes(250, 251, 20, 0.709)
    assert sizes[:3] == [(250, 251), (150, 152), (108, 108)] and first == 1 and sizes[-1] == (14, 14)
    sizes, first = level_sizes(1000, 600, 100, 0.709)  # halving leads to the first level that is searched
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


@pytest.mark.skipif(not LFW.is_dir(), reason="needs the real LFW in ../shared/data/lfw")
def test_parity_with_a_literal_reading_on_real_photos(detector):
    """All faces of 150 photos are the same, and 99 of 100 landmarks are within half a pixel.

    The literal reading interpolates exactly. Before OpenCV 5, cv2.warpAffine interpolates on a grid of 1/32 of a pixel;
    with it, 2 % of the photos may have another number of faces, and 95 of 100 landmarks are within half a pixel.
    """
    exact = int(cv2.__version__.split(".")[0]) >= 5
    paths = sorted(LFW.rglob("*.jpg"))[::88][:150]
    distances, different, threads = [], [], torch.get_num_threads()
    torch.set_num_threads(1)  # the products are so small that threads would spend their time waiting for each other
    with threadpool_limits(1):
        slow = [literal(read_image(path)) for path in paths]
    torch.set_num_threads(threads)
    for path, (boxes, _, landmarks), faces in zip(paths, slow, detector.detect(paths), strict=True):
        if len(boxes) != len(faces.boxes):
            different.append(path.name)
            continue
        for points in landmarks:
            distances.append(np.linalg.norm(faces.landmarks - points, axis=2).max(1).min())
    assert len(different) <= (0 if exact else 3), different
    assert len(distances) > 150 and np.percentile(distances, 99 if exact else 95) < 0.5


def test_parity_with_facenet_pytorch(photo):
    """facenet-pytorch keeps the release's rounding, so its landmarks are half a pixel further right and down."""
    peer = pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed", exc_type=ImportError)
    image = cv2.copyMakeBorder(photo[:260, 60:400], 0, 0, 0, 30, cv2.BORDER_REPLICATE)
    _, probability, points = peer.MTCNN(min_face_size=20, device="cpu").detect(image, landmarks=True)
    faces = Detector(device="cpu").detect(image)
    assert len(faces.scores) == 1 and probability.max() > 0.9
    np.testing.assert_allclose(faces.landmarks[0] + 0.5, points[np.argmax(probability)].astype(float), atol=3)


def test_suppression_is_per_image_and_handles_negative_coordinates():
    boxes = np.array([[-30, -30, 10, 10], [-29, -30, 10, 10], [-30, -30, 10, 10], [-20, -20, 0, 0]], np.float32)
    scores, image_index = np.array([0.8, 0.9, 0.7, 0.6], np.float32), np.array([0, 0, 1, 1])
    assert nms(boxes, scores, image_index, 0.7).tolist() == [1, 2, 3]
    assert nms_of_smaller(boxes, scores, image_index, 0.7).tolist() == [1, 2]  # the last is inside the third


def test_suppression_of_smaller_boxes_equals_a_naive_one():
    random = np.random.default_rng(0)
    corners, size = random.uniform(0, 50, (200, 2)), random.uniform(5, 30, (200, 2))
    boxes, scores = np.concatenate((corners, corners + size), 1).astype(np.float32), random.random(200)
    kept = []
    for i in sorted(range(200), key=lambda i: -scores[i]):
        overlaps = [np.prod(np.clip(np.minimum(boxes[i, 2:], boxes[k, 2:]) - np.maximum(boxes[i, :2], boxes[k, :2]), 0,
                                    None)) / min(np.prod(boxes[j, 2:] - boxes[j, :2]) for j in (i, k)) for k in kept]
        if not overlaps or max(overlaps) <= 0.7:
            kept.append(i)
    assert nms_of_smaller(boxes, scores, np.zeros(200, int), 0.7).tolist() == kept and 10 < len(kept) < 190


def test_drawings_have_different_names_on_disks_that_ignore_case():
    photos = [Path(name) for name in ("a/IMG.jpg", "b/img.jpg", "b/img.png", "img-2.jpg")]
    assert output_names(photos) == ["IMG.png", "img-2.png", "img-3.png", "img-2-2.png"]
