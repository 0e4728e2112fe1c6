"""Operations on boxes (n, 4), x1, y1, x2, y2, from several images; `image_index`, int (n,), is the image of each."""
import numpy as np
import torch


def squares(boxes, image_index, sizes):
    """Extend boxes to squares with the same center and the longer side, and drop those outside their image.

    Args:
        sizes: (height, width) of each image.

    Returns:
        (boxes, image_index) of those that remain.
    """
    side = (boxes[:, 2:] - boxes[:, :2]).max(1, initial=0)[:, None]
    corner = (boxes[:, :2] + boxes[:, 2:] - side) / 2
    limit = np.array(sizes, np.float32).reshape(-1, 2)[image_index, ::-1]
    keep = ((side >= 1) & (corner < limit) & (corner + side > 0)).all(1)
    return np.concatenate((corner, corner + side), 1)[keep], image_index[keep]


def regress(boxes, offsets):
    """Move the sides of boxes by `offsets` (n, 4), which are fractions of the width or height."""
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes + offsets * np.concatenate((size, size), 1)


def nms(boxes, scores, image_index, threshold):
    """Apply non-maximum suppression within each image; overlap is intersection over union.

    Returns:
        Rows to keep, int, ordered by image and, within an image, by decreasing score.
    """
    from torchvision import ops  # imported here because it takes seconds, and most commands don't detect faces

    def keep(rows):
        return rows[ops.nms(torch.from_numpy(boxes[rows]), torch.from_numpy(scores[rows]), threshold).numpy()]

    scores = scores.astype(boxes.dtype, copy=False)
    return _for_each_image(image_index, keep)


def nms_of_smaller(boxes, scores, image_index, threshold):
    """Apply nms() with the intersection over the smaller area, which also suppresses a box inside another."""
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

    return _for_each_image(image_index, keep)


def _for_each_image(image_index, keep):
    """Return the concatenation of keep(rows) over the rows of each image."""
    order = np.argsort(image_index, kind="stable")
    borders = np.flatnonzero(np.diff(image_index[order])) + 1
    return np.concatenate([keep(rows) for rows in np.split(order, borders)]) if len(image_index) else np.empty(0, int)
