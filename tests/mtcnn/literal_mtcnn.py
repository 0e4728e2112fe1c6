"""A literal implementation of MTCNN: one image, one level and one crop at a time; boxes are lists, edges count from 0.

It shares only the weights file with mtcnn/.
"""
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

WEIGHTS = Path(__file__).resolve().parents[2] / "mtcnn" / "weights" / "mtcnn.safetensors"


def literal(image):
    """Find the faces in uint8 (H, W, 3); return boxes (n, 4), scores (n,) and landmarks (n, 5, 2)."""
    weights, (height, width) = load_file(WEIGHTS), image.shape[:2]
    levels, scale = [image], 12 / 20
    proposals = []
    while min(height, width) * scale >= 12:
        rows, columns = (2 * int(np.ceil(side * scale / 2)) for side in (height, width))
        levels.append(cv2.resize(levels[-1], (columns, rows), interpolation=cv2.INTER_LINEAR))
        score, offsets = pnet(weights, levels[-1])
        scale_x, scale_y = width / columns, height / rows
        passed = [{"score": score[i, j], "cell": [2 * j, 2 * i, 2 * j + 12, 2 * i + 12], "offsets": offsets[:, i, j],
                   "box": [2 * j * scale_x, 2 * i * scale_y, (2 * j + 12) * scale_x, (2 * i + 12) * scale_y]}
                  for i, j in np.argwhere(score >= 0.6)]
        proposals += suppress(passed, 0.5, box="cell")
        scale *= 0.709
    refined = []
    for face in suppress(proposals, 0.7):
        box = square(regress(face["box"], face["offsets"]))
        if in_image(box, height, width):
            score, offsets = rnet(weights, crop(levels, box, 24))
            if score > 0.7:
                refined.append({"score": score, "box": box, "offsets": offsets})
    faces = []
    for face in suppress(refined, 0.3):
        box = square(regress(face["box"], face["offsets"]))
        if in_image(box, height, width):
            score, offsets, points = onet(weights, crop(levels, box, 48))
            if score > 0.7:
                faces.append({"score": score, "box": regress(box, offsets),
                              "points": [(box[0] + x * (box[2] - box[0]) - 0.5, box[1] + y * (box[3] - box[1]) - 0.5)
                                         for x, y in zip(points[:5], points[5:])]})
    faces = suppress(faces, 0.7, smaller=True)
    return [np.array([face[key] for face in faces]) for key in ("box", "score", "points")]


def layer(weights, name, number, x):
    x = F.conv2d(x, weights[f"{name}.body.conv{number}.weight"], weights[f"{name}.body.conv{number}.bias"])
    return F.prelu(x, weights[f"{name}.body.prelu{number}.weight"])


def dense(weights, name, x):
    return F.linear(x, weights[f"{name}.weight"].flatten(1), weights[f"{name}.bias"])


def network_input(pixels):
    return torch.tensor((pixels.transpose(2, 0, 1)[None] - 127.5) / 128).float()


def pnet(weights, pixels):
    x = F.max_pool2d(layer(weights, "pnet", 1, network_input(pixels)), 2, ceil_mode=True)
    x = layer(weights, "pnet", 3, layer(weights, "pnet", 2, x))[0].permute(1, 2, 0)
    return (dense(weights, "pnet.face", x).softmax(2)[..., 1].numpy(),
            dense(weights, "pnet.box", x).permute(2, 0, 1).numpy())


def heads(weights, name, x, outputs):
    x = F.linear(x.permute(0, 3, 2, 1).flatten(1), weights[f"{name}.dense.0.weight"], weights[f"{name}.dense.0.bias"])
    x = F.prelu(x, weights[f"{name}.dense.1.weight"])
    probability = dense(weights, f"{name}.face", x).softmax(1)[0, 1].item()
    return probability, *(dense(weights, f"{name}.{output}", x)[0].numpy() for output in outputs)


def rnet(weights, pixels):
    x = F.max_pool2d(layer(weights, "rnet", 1, network_input(pixels)), 3, 2, ceil_mode=True)
    x = F.max_pool2d(layer(weights, "rnet", 2, x), 3, 2, ceil_mode=True)
    return heads(weights, "rnet", layer(weights, "rnet", 3, x), ["box"])


def onet(weights, pixels):
    """Return the probability of a face, offsets (4,) and landmarks (10,), five x then five y, for 48 x 48 pixels."""
    x = F.max_pool2d(layer(weights, "onet", 1, network_input(pixels)), 3, 2, ceil_mode=True)
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


def regress(box, offsets):
    w, h = box[2] - box[0], box[3] - box[1]
    return [box[0] + offsets[0] * w, box[1] + offsets[1] * h, box[2] + offsets[2] * w, box[3] + offsets[3] * h]


def square(box):
    side, x, y = max(box[2] - box[0], box[3] - box[1]), (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2]


def in_image(box, height, width):
    return box[2] - box[0] >= 1 and box[0] < width and box[1] < height and box[2] > 0 and box[3] > 0


def crop(levels, box, size):
    """Sample a box bilinearly, from the smallest level that has at least one pixel per pixel of the crop."""
    fits = [k for k, level in enumerate(levels)
            if min(level.shape[n] / levels[0].shape[n] for n in (0, 1)) * (box[2] - box[0]) >= size]
    level = levels[max(fits, default=0)]
    scales = [level.shape[n] / levels[0].shape[n] for n in (0, 1)]
    rows, columns = [(box[1 - n] + (np.arange(size) + 0.5) / size * (box[3 - n] - box[1 - n])) * scales[n] - 0.5
                     for n in (0, 1)]
    row_weights, column_weights = bilinear_weights(rows, level.shape[0]), bilinear_weights(columns, level.shape[1])
    return np.rint(row_weights @ level.transpose(2, 0, 1) @ column_weights.T).transpose(1, 2, 0)


def bilinear_weights(positions, length):
    """Return the weight of each of `length` pixels at each position: 1 at its center, 0 at its neighbors' centers."""
    return np.maximum(0, 1 - abs(positions[:, None] - np.arange(length)))
