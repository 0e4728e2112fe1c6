"""Align faces: the similarity transform that maps five landmarks onto the template, and the warp."""
import cv2
import numpy as np

from faces.images import read_image

HEIGHT, WIDTH = 112, 96
# Eyes, nose and corners of the mouth in pixels of the aligned face, image-left first, from the authors' release
# (wy1iu/sphereface, preprocess/code/face_align_demo.m). The 112x112 template of later work adds 8 to x.
TEMPLATE = np.array([[30.2946, 51.6963], [65.5318, 51.5014], [48.0252, 71.7366],
                     [33.5493, 92.3655], [62.7299, 92.2041]])
TEMPLATE.flags.writeable = False
SQUARE_SHIFT = 8


def similarity_transform(source, target=TEMPLATE):
    """Return the least-squares similarity transform from `source` to `target`: rotation, scale, translation.

    A reflection is never returned. This is the closed form of Umeyama (PAMI 1991) in two dimensions: in complex
    numbers, target = a * source + b.

    Args:
        source: float (K, 2) points, x then y, K >= 2.
        target: float (K, 2) points to map to.

    Returns:
        float64 (2, 3), a matrix for cv2.warpAffine.

    Raises:
        ValueError: the points coincide or are not finite, or a mirrored face would fit better.
    """
    (matrix,), (reason,) = similarity_transforms(np.asarray(source)[None], target)
    if reason:
        raise ValueError(reason)
    return matrix


def similarity_transforms(source, target=TEMPLATE):
    """Return the similarity transforms of many faces at once; see similarity_transform().

    Args:
        source: float (N, K, 2) points.
        target: float (K, 2) points to map to.

    Returns:
        (float64 (N, 2, 3), list of N): the transforms; and per face, None or the reason why its transform is invalid.
    """
    s, t = (np.ascontiguousarray(points, np.float64).view(np.complex128)[..., 0] for points in (source, target))
    source_mean, target_mean = s.mean(1), t.mean()
    s, t = s - source_mean[:, None], t - target_mean
    with np.errstate(all="ignore"):                    # the points may coincide or not be finite
        spread = (s * s.conj()).real.sum(1)
        direct, mirrored = s.conj() @ t, s @ t         # their absolute values say which orientation fits better
        a = direct / spread
        b = target_mean - a * source_mean
    reasons = ["landmarks coincide or are not finite" if not finite or spread < 1e-6 else
               "landmarks are mirrored; the image-left eye and mouth corner must come first" if flipped else None
               for finite, spread, flipped in zip(np.isfinite(spread), spread, abs(mirrored) > abs(direct))]
    return np.stack([a.real, -a.imag, b.real, a.imag, a.real, b.imag], axis=1).reshape(-1, 2, 3), reasons


def align(image, landmarks):
    """Return the aligned face of an image, given its landmarks.

    Args:
        image: uint8 (H, W, 3).
        landmarks: float (5, 2), x then y, pixels of the whole image.

    Returns:
        uint8 (HEIGHT, WIDTH, 3); pixels outside the image are black.

    Raises:
        ValueError: the landmarks are invalid; see similarity_transform().
    """
    return warp(image, similarity_transform(landmarks))


def warp(image, transform, out=None):
    """Return the aligned face of an image, given its transform.

    Args:
        image: uint8 (H, W, 3).
        transform: float64 (2, 3), see similarity_transform().
        out: contiguous uint8 (HEIGHT, WIDTH, 3) to write the face to; None allocates a new array.

    Returns:
        uint8 (HEIGHT, WIDTH, 3), which is `out` if that was given; pixels outside the image are black.
    """
    return cv2.warpAffine(image, transform, (WIDTH, HEIGHT), dst=out, flags=cv2.INTER_LINEAR)


def crop_aligned(image):
    """Return a face that is already aligned, 112x96 or 112x112, cropped to 112x96.

    Args:
        image: uint8 (H, W, 3).

    Returns:
        uint8 (HEIGHT, WIDTH, 3), `image` itself or a view of it.

    Raises:
        ValueError: the image has another size.
    """
    if image.shape[:2] == (HEIGHT, WIDTH):
        return image
    if image.shape[:2] == (HEIGHT, WIDTH + 2 * SQUARE_SHIFT):
        return image[:, SQUARE_SHIFT:-SQUARE_SHIFT]
    height, width = image.shape[:2]
    raise ValueError(f"{width}x{height} pixels is not the size of an aligned face (96x112 or 112x112); landmarks are "
                     "needed")


def load_face(source, landmarks=None):
    """Read an image and return its aligned face; without landmarks, the image must already be aligned.

    Args:
        source: path of a file, or the file's bytes.
        landmarks: float (5, 2), or None.

    Returns:
        uint8 (HEIGHT, WIDTH, 3), RGB.

    Raises:
        faces.images.UnreadableImage: see read_image().
        ValueError: see align() and crop_aligned().
    """
    image = read_image(source)
    return crop_aligned(image) if landmarks is None else align(image, landmarks)
