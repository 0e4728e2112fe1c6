"""MTCNN read literally: one image, one level and one crop at a time, each box a list, edges count from 0.

It shares nothing with mtcnn/ but the file of weights.
"""
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

WEIGHTS = Path(__file__).resolve().parents[2] / "mtcnn" / "weights" / "mtcnn.safetensors"


def literal(image):
    """Find the faces of uint8 (H, W, 3): arrays of boxes, scores and landmarks."""
    weights, (height, width) = load_file(WEIGHTS), image.shape[:2]
    levels, scale = [image], 12 / 20
    found = []
    while min(height, width) * scale >= 12:
        rows, columns = (2 * int(np.ceil(side * scale / 2)) for side in (height, width))
        levels.append(cv2.resize(levels[-1], (columns, rows), interpolation=cv2.INTER_LINEAR))
        score, offsets = pnet(weights, levels[-1])
        sx, sy = width / columns, height / rows
        here = [{"score": score[i, j], "cell": [2 * j, 2 * i, 2 * j + 12, 2 * i + 12], "offsets": offsets[:, i, j],
                 "box": [2 * j * sx, 2 * i * sy, (2 * j + 12) * sx, (2 * i + 12) * sy]}
                for i, j in np.argwhere(score >= 0.6)]
        found += suppress(here, 0.5, box="cell")
        scale *= 0.709
    second = []
    for face in suppress(found, 0.7):
        box = square(move(face["box"], face["offsets"]))
        if in_image(box, height, width):
            score, offsets = rnet(weights, crop(levels, box, 24))
            if score > 0.7:
                second.append({"score": score, "box": box, "offsets": offsets})
    third = []
    for face in suppress(second, 0.3):
        box = square(move(face["box"], face["offsets"]))
        if in_image(box, height, width):
            score, offsets, points = onet(weights, crop(levels, box, 48))
            if score > 0.7:
                third.append({"score": score, "box": move(box, offsets),
                              "points": [(box[0] + x * (box[2] - box[0]) - 0.5, box[1] + y * (box[3] - box[1]) - 0.5)
                                         for x, y in zip(points[:5], points[5:])]})
    third = suppress(third, 0.7, smaller=True)
    return [np.array([face[key] for face in third]) for key in ("box", "score", "points")]


def layer(weights, name, number, x):
    """A convolution and its PReLU."""
    x = F.conv2d(x, weights[f"{name}.body.conv{number}.weight"], weights[f"{name}.body.conv{number}.bias"])
    return F.prelu(x, weights[f"{name}.body.prelu{number}.weight"])


def dense(weights, name, x):
    return F.linear(x, weights[f"{name}.weight"].flatten(1), weights[f"{name}.bias"])


def as_input(pixels):
    return torch.tensor((pixels.transpose(2, 0, 1)[None] - 127.5) / 128).float()


def pnet(weights, pixels):
    """Probability of a face (h, w) and offsets (4, h, w)."""
    x = F.max_pool2d(layer(weights, "pnet", 1, as_input(pixels)), 2, ceil_mode=True)
    x = layer(weights, "pnet", 3, layer(weights, "pnet", 2, x))[0].permute(1, 2, 0)
    return (dense(weights, "pnet.face", x).softmax(2)[..., 1].numpy(),
            dense(weights, "pnet.box", x).permute(2, 0, 1).numpy())


def heads(weights, name, x, outputs):
    x = F.linear(x.permute(0, 3, 2, 1).flatten(1), weights[f"{name}.dense.0.weight"], weights[f"{name}.dense.0.bias"])
    x = F.prelu(x, weights[f"{name}.dense.1.weight"])
    probability = dense(weights, f"{name}.face", x).softmax(1)[0, 1].item()
    return probability, *(dense(weights, f"{name}.{output}", x)[0].numpy() for output in outputs)


def rnet(weights, pixels):
    x = F.max_pool2d(layer(weights, "rnet", 1, as_input(pixels)), 3, 2, ceil_mode=True)
    x = F.max_pool2d(layer(weights, "rnet", 2, x), 3, 2, ceil_mode=True)
    return heads(weights, "rnet", layer(weights, "rnet", 3, x), ["box"])


def onet(weights, pixels):
    x = F.max_pool2d(layer(weights, "onet", 1, as_input(pixels)), 3, 2, ceil_mode=True)
    x = F.max_pool2d(layer(weights, "onet", 2, x), 3, 2, ceil_mode=True)
    x = F.max_pool2d(layer(weights, "onet", 3, x), 2, 2, ceil_mode=True)
    return heads(weights, "onet", layer(weights, "onet", 4, x), ["box", "points"])


def overlap(a, b, smaller):
    inner = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return inner / (min(areas) if smaller else sum(areas) - inner)


def suppress(faces, threshold, smaller=False, box="box"):
    kept = []
    for face in sorted(faces, key=lambda f: -f["score"]):
        if all(overlap(face[box], other[box], smaller) <= threshold for other in kept):
            kept.append(face)
    return kept


def move(box, offsets):
    w, h = box[2] - box[0], box[3] - box[1]
    return [box[0] + offsets[0] * w, box[1] + offsets[1] * h, box[2] + offsets[2] * w, box[3] + offsets[3] * h]


def square(box):
    side, x, y = max(box[2] - box[0], box[3] - box[1]), (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2]


def in_image(box, height, width):
    return box[2] - box[0] >= 1 and box[0] < width and box[1] < height and box[2] > 0 and box[3] > 0


def crop(levels, box, size):
    """Sample a box, bilinearly, from the smallest level that has at least a pixel for each one wanted."""
    fits = [k for k, level in enumerate(levels)
            if min(level.shape[n] / levels[0].shape[n] for n in (0, 1)) * (box[2] - box[0]) >= size]
    level = levels[max(fits, default=0)]
    scale = [level.shape[n] / levels[0].shape[n] for n in (0, 1)]
    rows, columns = [(box[1 - n] + (np.arange(size) + 0.5) / size * (box[3 - n] - box[1 - n])) * scale[n] - 0.5
                     for n in (0, 1)]
    return np.rint(weights_of(rows, level.shape[0]) @ level.transpose(2, 0, 1) @ weights_of(columns, level.shape[1]).T
                   ).transpose(1, 2, 0)


def weights_of(positions, length):
    """How much each of `length` pixels counts at each position: 1 at its center, 0 from its neighbors' centers on."""
    return np.maximum(0, 1 - abs(positions[:, None] - np.arange(length)))
