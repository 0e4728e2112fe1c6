"""Align a face: the similarity transform that puts its five landmarks on the template, and the warp."""
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
    (matrix,), (reason,) = similarity_transforms(np.asarray(source)[None], target)
    if reason:
        raise ValueError(reason)
    return matrix


def similarity_transforms(source, target=TEMPLATE):
    """The same for many faces at once, some of which may be none.

    Args:
        source: float (N, K, 2) points.
        target: float (K, 2) points that all are to reach.

    Returns:
        (float64 (N, 2, 3), list of N: None, or the reason why this row is no transform).
    """
    s, t = (np.ascontiguousarray(points, np.float64).view(np.complex128)[..., 0] for points in (source, target))
    source_mean, target_mean = s.mean(1), t.mean()
    s, t = s - source_mean[:, None], t - target_mean
    with np.errstate(all="ignore"):                    # of points that coincide or are not finite
        spread = (s * s.conj()).real.sum(1)
        turned, mirrored = s.conj() @ t, s @ t         # how well each of the two fits
        a = turned / spread
        b = target_mean - a * source_mean
    reasons = ["landmarks coincide or are not finite" if not finite or spread < 1e-6 else
               "landmarks are mirrored; image-left eye and mouth corner come first" if flipped else None
               for finite, spread, flipped in zip(np.isfinite(spread), spread, abs(mirrored) > abs(turned))]
    return np.stack([a.real, -a.imag, b.real, a.imag, a.real, b.imag], axis=1).reshape(-1, 2, 3), reasons


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
    return warp(image, similarity_transform(landmarks))


def warp(image, transform, out=None):
    """Cut the aligned face out of an image by its transform, float64 (2, 3); see align.

    out: uint8 (HEIGHT, WIDTH, 3), contiguous, to put the face into; None makes a new one.
    """
    return cv2.warpAffine(image, transform, (WIDTH, HEIGHT), dst=out, flags=cv2.INTER_LINEAR)


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
