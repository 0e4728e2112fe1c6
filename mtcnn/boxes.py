"""Boxes (n, 4), x1, y1, x2, y2, of many images at once: `owner`, int (n,), says which image each belongs to."""
import numpy as np
import torch
from torchvision import ops


def squares(boxes, owner, sizes):
    """Make boxes squares: same centre, side the longer of the two.

    Boxes without a pixel of their image are dropped: nothing is there to be judged.

    Args:
        sizes: (height, width) of each image.

    Returns:
        (boxes, owner) of the rest.
    """
    side = (boxes[:, 2:] - boxes[:, :2]).max(1, initial=0)[:, None]
    corner = (boxes[:, :2] + boxes[:, 2:] - side) / 2
    limit = np.array(sizes, np.float32).reshape(-1, 2)[owner, ::-1]
    keep = ((side >= 1) & (corner < limit) & (corner + side > 0)).all(1)
    return np.concatenate((corner, corner + side), 1)[keep], owner[keep]


def regress(boxes, offsets):
    """Move the sides of boxes by `offsets` (n, 4), parts of the width or height."""
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes + offsets * np.concatenate((size, size), 1)


def nms(boxes, scores, owner, threshold):
    """Non-maximum suppression within each image; overlap is intersection over union.

    Returns:
        Rows to keep, int: by image, those of one image by falling score.
    """
    def kept(rows):
        return rows[ops.nms(torch.from_numpy(boxes[rows]), torch.from_numpy(worth[rows]), threshold).numpy()]
    worth = scores.astype(boxes.dtype, copy=False)
    return _each(owner, kept)


def nms_of_smaller(boxes, scores, owner, threshold):
    """The same with intersection over the smaller of the two areas, so that a box inside another goes too."""
    def kept(rows):
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        low, high = boxes[rows, :2], boxes[rows, 2:]
        inner = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)        # (n, n, 2)
        area = (high - low).prod(1)
        hides = inner.clip(0).prod(2) > threshold * np.minimum(area[:, None], area)    # (n, n)
        keep = []
        for i in range(len(rows)):
            if not hides[i, keep].any():
                keep.append(i)
        return rows[keep]
    return _each(owner, kept)


def _each(owner, kept):
    """Join what kept(rows) returns for the rows of each image."""
    order = np.argsort(owner, kind="stable")
    borders = np.flatnonzero(np.diff(owner[order])) + 1
    return np.concatenate([kept(rows) for rows in np.split(order, borders)]) if len(owner) else np.empty(0, int)
