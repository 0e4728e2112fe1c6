"""Align a face: the similarity transform that puts its five landmarks on the template, and the warp."""
import math

import cv2
import numpy as np

from faces.images import read_image

HEIGHT, WIDTH = 112, 96
# Eyes, nose, corners of the mouth in pixels of the aligned face, image-left first: the points of the authors' release
# (wy1iu/sphereface, preprocess/code/face_align_demo.m). The 112x112 template of later work is this one plus 8 in x.
TEMPLATE = np.array([[30.2946, 51.6963], [65.5318, 51.5014], [48.0252, 71.7366],
                     [33.5493, 92.3655], [62.7299, 92.2041]])
TEMPLATE.flags.writeable = False
SQUARE_SHIFT = 8


def similarity_transform(source, target=TEMPLATE):
    """Least-squares similarity (rotation, one scale, translation; never a reflection) from `source` to `target`.

    Closed form of Umeyama (PAMI 1991) in two dimensions: with points as complex numbers, target = a * source + b.

    Args:
        source: float (K, 2) points, x then y, K >= 2.
        target: float (K, 2) points to reach.

    Returns:
        float64 (2, 3), the matrix that cv2.warpAffine takes.

    Raises:
        ValueError: the points coincide or are not finite, or a mirrored face would fit them better.
    """
    # Python's complex numbers: a handful of points is summed before NumPy has begun.
    s, t = ([complex(x, y) for x, y in np.asarray(points, np.float64).tolist()] for points in (source, target))
    source_mean, target_mean = sum(s) / len(s), sum(t) / len(t)
    s, t = [point - source_mean for point in s], [point - target_mean for point in t]
    spread = sum((p * p.conjugate()).real for p in s)
    if not math.isfinite(spread) or spread < 1e-6:
        raise ValueError("landmarks coincide or are not finite")
    turned = sum(p.conjugate() * q for p, q in zip(s, t))   # how well each of the two fits
    mirrored = sum(p * q for p, q in zip(s, t))
    if abs(mirrored) > abs(turned):
        raise ValueError("landmarks are mirrored; image-left eye and mouth corner come first")
    a = turned / spread
    b = target_mean - a * source_mean
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def align(image, landmarks):
    """Cut the aligned face out of an image.

    Args:
        image: uint8 (H, W, 3).
        landmarks: float (5, 2), x then y, pixels of the whole image.

    Returns:
        uint8 (HEIGHT, WIDTH, 3); black where the face reaches beyond the image.

    Raises:
        ValueError: landmarks that are no face (see similarity_transform).
    """
    return cv2.warpAffine(image, similarity_transform(landmarks), (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR)


def crop_aligned(image):
    """Take a face that is aligned already, 112x96 or 112x112, to 112x96.

    Raises:
        ValueError: any other size.
    """
    if image.shape[:2] == (HEIGHT, WIDTH):
        return image
    if image.shape[:2] == (HEIGHT, WIDTH + 2 * SQUARE_SHIFT):
        return image[:, SQUARE_SHIFT:-SQUARE_SHIFT]
    height, width = image.shape[:2]
    raise ValueError(f"{width}x{height} pixels is no aligned face (96x112 or 112x112); landmarks are needed")


def load_face(source, landmarks=None):
    """Read an image and return its face: aligned by its landmarks, or taken as aligned already where there are none.

    Args:
        source: path of a file, or the file's bytes.
        landmarks: float (5, 2), or None.

    Returns:
        uint8 (HEIGHT, WIDTH, 3), RGB.

    Raises:
        faces.images.UnreadableImage: see read_image.
        ValueError: see align and crop_aligned.
    """
    image = read_image(source)
    return crop_aligned(image) if landmarks is None else align(image, landmarks)
