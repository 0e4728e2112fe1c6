"""Boxes (n, 4), x1, y1, x2, y2, of many images at once: `image_index`, int (n,), says which image each belongs to."""
import numpy as np
import torch


def squares(boxes, image_index, sizes):
    """Make boxes squares: same center, side the longer of the two.

    Boxes without a pixel of their image are dropped: nothing is there to be judged.

    Args:
        sizes: (height, width) of each image.

    Returns:
        (boxes, image_index) of the rest.
    """
    side = (boxes[:, 2:] - boxes[:, :2]).max(1, initial=0)[:, None]
    corner = (boxes[:, :2] + boxes[:, 2:] - side) / 2
    limit = np.array(sizes, np.float32).reshape(-1, 2)[image_index, ::-1]
    keep = ((side >= 1) & (corner < limit) & (corner + side > 0)).all(1)
    return np.concatenate((corner, corner + side), 1)[keep], image_index[keep]


def regress(boxes, offsets):
    """Move the sides of boxes by `offsets` (n, 4), parts of the width or height."""
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes + offsets * np.concatenate((size, size), 1)


def nms(boxes, scores, image_index, threshold):
    """Non-maximum suppression within each image; overlap is intersection over union.

    Returns:
        Rows to keep, int: by image, those of one image by falling score.
    """
    from torchvision import ops  # here, because the import takes seconds and most commands don't detect faces

    def kept(rows):
        return rows[ops.nms(torch.from_numpy(boxes[rows]), torch.from_numpy(worth[rows]), threshold).numpy()]
    worth = scores.astype(boxes.dtype, copy=False)
    return _each(image_index, kept)


def nms_of_smaller(boxes, scores, image_index, threshold):
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
    return _each(image_index, kept)


def _each(image_index, kept):
    """Join what kept(rows) returns for the rows of each image."""
    order = np.argsort(image_index, kind="stable")
    borders = np.flatnonzero(np.diff(image_index[order])) + 1
    return np.concatenate([kept(rows) for rows in np.split(order, borders)]) if len(image_index) else np.empty(0, int)
