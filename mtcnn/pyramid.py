"""Image pyramid: the levels that P-Net searches, and from which crops for R-Net and O-Net are sampled."""
import math
from bisect import bisect_right

import cv2
import numpy as np

CELL = 12  # receptive field of P-Net, in pixels


class Pyramid:
    """Levels of an image, uint8 (H, W, 3), which is the first. Each other one is a bilinear resize of the one before by
    at most a factor of two, which avoids aliasing. P-Net searches the smaller ones, `searched`."""

    def __init__(self, image: np.ndarray, min_face_size: float, factor: float):
        self.size = image.shape[:2]
        sizes, first = level_sizes(*self.size, min_face_size, factor)
        self.levels = [image]
        for rows, columns in sizes[1:]:
            self.levels.append(cv2.resize(self.levels[-1], (columns, rows), interpolation=cv2.INTER_LINEAR))
        self.searched = self.levels[first:]
        self.scales = [min(rows / self.size[0], columns / self.size[1]) for rows, columns in sizes]

    def crop(self, box: list, target: np.ndarray):
        """Resample a square box, four floats in pixels of the image, into `target`, uint8 (size, size, 3), bilinearly
        from the smallest level that has at least one pixel per pixel of the target; black outside the image."""
        size = target.shape[0]
        step = (box[2] - box[0]) / size                               # pixels of the image per pixel of the target
        level = max(0, bisect_right(self.scales, -1 / step, key=lambda scale: -scale) - 1)
        pixels = self.levels[level]
        scale_y, scale_x = pixels.shape[0] / self.size[0], pixels.shape[1] / self.size[1]
        left, top = box[0] * scale_x, box[1] * scale_y
        # OpenCV warps images of up to 32,767 pixels per side, so it gets only the neighborhood of the box.
        x0, y0 = max(0, int(left) - 2), max(0, int(top) - 2)
        near = pixels[y0:max(0, int(box[3] * scale_y)) + 3, x0:max(0, int(box[2] * scale_x)) + 3]
        step_x, step_y = step * scale_x, step * scale_y               # pixels of the level per pixel of the target
        to_level = np.array(((step_x, 0, left - x0 + step_x / 2 - 0.5), (0, step_y, top - y0 + step_y / 2 - 0.5)))
        cv2.warpAffine(near, to_level, (size, size), dst=target, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def level_sizes(height: int, width: int, min_face_size: float, factor: float) -> tuple[list, int]:
    """Return the sizes (rows, columns) of all levels, starting with the image, and the index of the first to search, at
    which a face of min_face_size has 12 pixels. The levels before only lead to it in steps of a half. Searched sizes
    are even, as P-Net needs, and at least 12. There may be none."""
    sizes, scale, half = [(height, width)], CELL / min_face_size, 0.5
    while half > scale and min(height, width) * scale >= CELL:
        sizes.append((round(height * half), round(width * half)))
        half /= 2
    first = len(sizes)
    while min(height, width) * scale >= CELL:
        sizes.append((2 * math.ceil(height * scale / 2), 2 * math.ceil(width * scale / 2)))
        scale *= factor
    return sizes, first
