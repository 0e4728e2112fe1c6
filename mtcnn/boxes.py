"""Operations on boxes (n, 4), x1, y1, x2, y2, from several images; `owner`, int (n,), is the index of each box's image.

Pixel k covers k to k + 1, and a box's width is x2 - x1. Nothing is rounded. The authors' release truncates and adds or
subtracts 1 in places, which shifts its boxes by up to a twelfth of the face at the far border.
"""
import numpy as np
import torch


def squares(boxes: np.ndarray, owner: np.ndarray, sizes) -> tuple[np.ndarray, np.ndarray]:
    """Extend boxes to the longer side; return those, and their owners, that overlap their image, (height, width)."""
    side = (boxes[:, 2:] - boxes[:, :2]).max(1, initial=0)[:, None]
    corner = (boxes[:, :2] + boxes[:, 2:] - side) / 2
    limit = np.array(sizes, np.float32).reshape(-1, 2)[owner, ::-1]
    keep = ((side >= 1) & (corner < limit) & (corner + side > 0)).all(1)
    return np.concatenate((corner, corner + side), 1)[keep], owner[keep]


def regress(boxes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Move the sides of boxes by `offsets` (n, 4), which are fractions of the width or height."""
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes + offsets * np.concatenate((size, size), 1)


def nms(boxes: np.ndarray, scores: np.ndarray, owner: np.ndarray, threshold: float) -> np.ndarray:
    """Return the rows that non-maximum suppression (IoU) keeps in each image, by image and decreasing score."""
    from torchvision import ops  # imported here because it takes seconds, and most commands don't detect faces

    def keep(rows):
        return rows[ops.nms(torch.from_numpy(boxes[rows]), torch.from_numpy(scores[rows]), threshold).numpy()]

    scores = scores.astype(boxes.dtype, copy=False)
    return _for_each_image(owner, keep)


def nms_of_smaller(boxes: np.ndarray, scores: np.ndarray, owner: np.ndarray, threshold: float) -> np.ndarray:
    """Apply nms() with the intersection over the smaller area, "Min" in the authors' release."""
    low, high = boxes[:, :2], boxes[:, 2:]
    area = (high - low).prod(1)

    def keep(rows):
        rows, kept = rows[np.argsort(-scores[rows], kind="stable")], []
        while len(rows):
            best, rows = rows[0], rows[1:]
            overlap = np.minimum(high[best], high[rows]) - np.maximum(low[best], low[rows])    # (n, 2)
            rows = rows[~(overlap.clip(0).prod(1) > threshold * np.minimum(area[best], area[rows]))]
            kept.append(best)
        return np.array(kept)

    return _for_each_image(owner, keep)


def _for_each_image(owner, keep):
    """Return the concatenation of keep(rows) over the rows of each image."""
    order = np.argsort(owner, kind="stable")
    borders = np.flatnonzero(np.diff(owner[order])) + 1
    return np.concatenate([keep(rows) for rows in np.split(order, borders)]) if len(owner) else np.empty(0, int)
