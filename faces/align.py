"""Align faces: the similarity transform that maps five landmarks onto the template, and the warp."""
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from joblib import cpu_count

from faces.files import InputError, progress_bar
from faces.images import one_opencv_thread, read_image

HEIGHT, WIDTH = 112, 96
# Eyes, nose and corners of the mouth in pixels of the aligned face, image-left first, from the authors' release
# (wy1iu/sphereface, preprocess/code/face_align_demo.m). The 112x112 template of later work adds 8 to x.
TEMPLATE = np.array([[30.2946, 51.6963], [65.5318, 51.5014], [48.0252, 71.7366],
                     [33.5493, 92.3655], [62.7299, 92.2041]])
TEMPLATE.flags.writeable = False
SQUARE_SHIFT = 8
BLOCK = 32              # faces per task of a thread; a task per face takes half as long again
MAX_SIDE = 2**15 - 1    # pixels; cv2.warpAffine takes no larger image
# Bounds on the fit to the template. Of 18,000 real photos, the lowest correlation is 0.81.
MIN_CORRELATION, MIN_SCALE = 0.6, 0.05     # a face with 2 pixels between the eyes has the scale 0.057
MIN_TYPICAL = 0.8                          # correlation of upright faces, median of a list; real lists have 0.99


def similarity_transform(source: np.ndarray, target: np.ndarray = TEMPLATE) -> np.ndarray:
    """Return the least-squares similarity transform, float64 (2, 3), from points `source` to `target`, float (K, 2);
    never a reflection. Raises ValueError if the points nearly coincide, are not finite, or are not arranged like those
    of `target`, or if a mirrored face would fit better."""
    (matrix,), (reason,) = similarity_transforms(np.asarray(source)[None], target)
    if reason:
        raise ValueError(reason)
    return matrix


def similarity_transforms(source: np.ndarray, target: np.ndarray = TEMPLATE) -> tuple[np.ndarray, list[str | None]]:
    """Return the similarity_transform() of N faces, float (N, K, 2), as float64 (N, 2, 3); and for each, why it is
    invalid, or None. This is the closed form of Umeyama (PAMI 1991) in two dimensions: in complex numbers, target =
    a * source + b."""
    (s, source_mean), (t, target_mean) = _centered(source), _centered(target)
    with np.errstate(all="ignore"):                    # the points may coincide or not be finite
        spread, target_spread = (s * s.conj()).real.sum(1), (t * t.conj()).real.sum()
        direct, mirrored = s.conj() @ t, s @ t         # their absolute values say which orientation fits better
        a = direct / spread
        b = target_mean - a * source_mean
        correlation, scale = abs(direct) / np.sqrt(spread * target_spread), np.sqrt(spread / target_spread)
    reasons = ["landmarks coincide or are not finite" if not finite or spread < 1e-6 else
               "landmarks are mirrored; the image-left eye and mouth corner must come first" if flipped else
               "landmarks are not arranged like those of a face" if correlation < MIN_CORRELATION else
               "landmarks are less than two pixels apart; coordinates must be in pixels" if scale < MIN_SCALE else None
               for finite, spread, flipped, correlation, scale
               in zip(np.isfinite(spread), spread, abs(mirrored) > abs(direct), correlation, scale)]
    return np.stack([a.real, -a.imag, b.real, a.imag, a.real, b.imag], axis=1).reshape(-1, 2, 3), reasons


def arrangement_problem(points: np.ndarray) -> str | None:
    """Return what is wrong with the order of the numbers in a landmark list, float (N, 5, 2), or None. A face can have
    any pose, but most faces in a list are upright."""
    if len(points) < 5:
        return None
    if abs(points).max() <= 1.5:
        return "the coordinates are fractions of the image's size instead of pixels"
    (s, _), (t, _) = _centered(points[::-(-len(points) // 1000)]), _centered(TEMPLATE)
    norms = np.sqrt((abs(s) ** 2).sum(1) * (abs(t) ** 2).sum())
    correlation = np.median((s.conj() @ t).real / np.maximum(norms, 1e-9))    # 1 for perfect upright faces
    return None if correlation > MIN_TYPICAL else "most of its points are not arranged like those of an upright face"


def check_positions(centers: np.ndarray, source):
    """Raise InputError if the landmarks of the images in a faces.data source belong to copies of another size: in most
    photos of a set, the face is near the center. `centers`, float (N, 2), are the means of each image's landmarks as
    fractions of its width and height, or NaN."""
    centers = centers[np.isfinite(centers).all(1)]
    x, y = np.median(centers, axis=0) if len(centers) >= 10 else (0.5, 0.5)
    if x < 0.4 and y < 0.5 or x > 0.6 and y > 0.65:
        part, copies = ("upper left", "smaller") if x < 0.4 else ("lower right", "larger")
        raise InputError(f"the landmarks of {source} are in the {part} part of the images, as if they were found in "
                         f"{copies} copies; use the images that the landmark list was made for, or create a list for "
                         "these with mtcnn/lfw_landmark.py or mtcnn/casia_landmark.py.")


def check_inside(landmarks: np.ndarray, shape: tuple):
    """Raise ValueError if most landmarks, float (5, 2), are outside an image of the shape (height, width, ...)."""
    height, width = shape[:2]
    outside = sum(not (0 <= x <= width and 0 <= y <= height) for x, y in np.asarray(landmarks).tolist())
    if outside > 2:    # a face may extend past the border
        raise ValueError(f"{outside} of 5 landmarks are outside the image ({width} x {height} pixels)")


def _centered(points):
    """Return points, float (..., 2), minus their mean, and the mean, as complex numbers."""
    points = np.ascontiguousarray(points, np.float64).view(np.complex128)[..., 0]
    mean = points.mean(-1, keepdims=True)
    return points - mean, mean[..., 0]


def align(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """Return the aligned face, uint8 (HEIGHT, WIDTH, 3), of an image, uint8 (H, W, 3); black outside the image.
    `landmarks` are float (5, 2), x then y, in pixels of the whole image. Raises ValueError if they are invalid."""
    check_inside(landmarks, image.shape)
    return warp(image, similarity_transform(landmarks))


def warp(image: np.ndarray, transform: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return the aligned face of an image, in the contiguous array `out` if one is given; see align()."""
    if max(image.shape) >= MAX_SIDE:
        image, transform = _part(image, transform)
    return cv2.warpAffine(image, transform, (WIDTH, HEIGHT), dst=out, flags=cv2.INTER_LINEAR)


def _part(image, transform):
    """Return the part of a large image that a face needs, and the transform of that part; OpenCV counts in 16 bits."""
    corners = np.array([[0, 0, 1], [WIDTH, 0, 1], [0, HEIGHT, 1], [WIDTH, HEIGHT, 1]]).T
    corners = cv2.invertAffineTransform(transform) @ corners
    low, high = corners.min(1).astype(int) - 2, corners.max(1).astype(int) + 3
    (left, top), (right, bottom) = np.clip((low, high), 0, image.shape[1::-1])
    step = int(max(right - left, bottom - top)) // MAX_SIDE + 1    # of a face this large, few pixels are used
    scale = np.array([[step, 0, left], [0, step, top], [0, 0, 1]])
    return np.ascontiguousarray(image[top:bottom:step, left:right:step]), transform @ scale


def crop_aligned(image: np.ndarray) -> np.ndarray:
    """Return a face that is already aligned, uint8 112x96 or 112x112, cropped to 112x96; ValueError for other sizes."""
    rows, columns = image.shape[:2]
    if (rows, columns) == (HEIGHT, WIDTH):
        return image
    if (rows, columns) == (HEIGHT, WIDTH + 2 * SQUARE_SHIFT):
        return image[:, SQUARE_SHIFT:-SQUARE_SHIFT]
    raise ValueError(f"an image of {rows} rows and {columns} columns is not an aligned face, which has {HEIGHT} rows "
                     f"and {WIDTH} or {HEIGHT} columns, so landmarks are needed")


def align_all(source, names: list[str], points: np.ndarray | None = None, any_pose: bool = False,
              progress: bool = False) -> tuple[np.ndarray, np.ndarray, list[tuple[int, str]]]:
    """Read N images of a faces.data source and align them, in threads, by their landmarks, float (N, 5, 2), of which
    none are refused with `any_pose`. Without landmarks, they must be aligned, see crop_aligned(). Returns the faces,
    uint8 (N, HEIGHT, WIDTH, 3), the centers for check_positions(), and (row, reason) of each unusable image."""
    faces, centers = np.zeros((len(names), HEIGHT, WIDTH, 3), np.uint8), np.full((len(names), 2), np.nan)
    # For all at once, because this holds the interpreter lock
    transforms, reasons = [[None] * len(names)] * 2 if points is None else similarity_transforms(points)

    def load(row):
        try:
            image = read_image(source.open(names[row]))
            if points is None:
                faces[row] = crop_aligned(image)
                return
            if not any_pose:
                check_inside(points[row], image.shape)
            warp(image, transforms[row], out=faces[row])
            centers[row] = points[row].mean(0) / image.shape[1::-1]
        except ValueError as error:    # UnreadableImage is one as well
            return str(error)

    def load_block(rows):
        return [(row, reason) for row in rows if (reason := not any_pose and reasons[row] or load(row))]

    every = range(len(names))
    blocks = [every[start:start + BLOCK] for start in every[::BLOCK]]
    # The pool has a thread per CPU, with which OpenCV's own would compete.
    with one_opencv_thread(), ThreadPoolExecutor(cpu_count()) as pool:
        results = progress_bar(pool.map(load_block, blocks), "aligning", len(blocks), unit=f" x {BLOCK} faces",
                               leave=False, disable=not progress)
        return faces, centers, [failure for failures in results for failure in failures]
