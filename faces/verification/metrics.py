"""Verification and identification metrics: k-fold accuracy, ROC, TAR at a FAR, closed-set identification, thresholds.

A pair is accepted when its similarity is greater than the threshold, so equal similarities are accepted or rejected
together. Threshold searches are exact: they try one threshold per distinct outcome, not a grid.
"""
from typing import NamedTuple

import numpy as np

CHUNK = 10_000    # pairs whose embeddings are in memory at a time


class Verification(NamedTuple):
    """The result of a k-fold verification protocol, for P judged pairs in K folds."""
    similarities: np.ndarray    # float64 (P,); with subtract_mean, less the mean of the pair's own training folds
    correct: np.ndarray         # bool (P,), which pairs the threshold of their fold classifies correctly
    accuracies: np.ndarray      # float64 (K,)
    thresholds: np.ndarray      # float64 (K,), each chosen on the other folds
    accuracy: float             # mean of the accuracies
    std: float                  # their standard deviation (ddof=0)
    threshold: float            # mean of the thresholds
    far: np.ndarray             # float64 (V + 1,), the ROC curve over all pairs; rises from 0 to 1
    tar: np.ndarray             # float64 (V + 1,)
    auc: float                  # area under that curve
    eer: float                  # equal error rate


class OperatingPoint(NamedTuple):
    """The lowest threshold that does not exceed a false acceptance rate, over all pairs."""
    far: float          # the requested rate
    tar: float          # fraction of genuine pairs that are accepted
    threshold: float
    accepted: int       # number of impostor pairs that are accepted
    impostors: int      # number of all impostor pairs
    resolved: bool      # whether there are enough of them for one to be accepted at this rate


class Identification(NamedTuple):
    """The result of closed-set identification: each person is in the gallery with one image."""
    cmc: np.ndarray     # float64 (G,), fraction of probes whose person is among the 1, 2, ... most similar images
    gallery: int        # number of images in the gallery, G
    probes: int         # number of probes, Q


def verify(embeddings: np.ndarray, pairs: np.ndarray, same: np.ndarray, folds: np.ndarray,
           subtract_mean: bool = False) -> Verification:
    """Run the k-fold protocol of LFW (Huang et al. 2007, view 2): the threshold of a fold is the best on all others.

    `embeddings` are float (N, D), not normalized; `pairs` are rows of them, int (P, 2); `same`, bool (P,), is true for
    a genuine pair, with both kinds; `folds` are int (P,), 0 .. K-1, or -1 for pairs that only choose thresholds, as in
    view 1, which one fold needs. `subtract_mean` subtracts from the embeddings the mean over the distinct images in the
    training folds, for each fold its own. Raises ValueError as similarities() does.
    """
    same, folds = np.asarray(same, bool), np.asarray(folds)
    count = folds.max(initial=-1) + 1
    judged = np.flatnonzero(folds >= 0)
    means = np.zeros((1, np.shape(embeddings)[1]))
    if subtract_mean:
        member = np.array([np.isin(np.arange(len(embeddings)), pairs[folds != k]) for k in range(count)])    # (K, N)
        means = member @ np.asarray(embeddings, np.float64) / member.sum(1, keepdims=True)
    tables = np.broadcast_to(similarities(embeddings, pairs, means), (count, len(folds)))
    scores = tables[folds[judged], judged]
    far, tar = roc(scores, same[judged])
    thresholds = np.array([best_threshold(tables[k][folds != k], same[folds != k]) for k in range(count)])
    correct = (scores > thresholds[folds[judged]]) == same[judged]
    accuracies = np.bincount(folds[judged], correct) / np.bincount(folds[judged])
    return Verification(scores, correct, accuracies, thresholds, float(accuracies.mean()), float(accuracies.std()),
                        float(thresholds.mean()), far, tar, auc(far, tar), equal_error_rate(far, tar))


def similarities(embeddings: np.ndarray, pairs: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Return the cosines of P pairs, int (P, 2), of embeddings, float (N, D), after subtracting each of K means, float
    (K, D): float64 (K, P), in [-1, 1]. A row of zeros as the mean gives plain cosines.

    Expands (a - m).(b - m), so that K means cost one matrix product instead of K passes over the embeddings. Raises
    ValueError if an embedding is not finite, or one in a pair is zero after the mean is subtracted.
    """
    e, means = np.asarray(embeddings, np.float64), np.asarray(means, np.float64)
    left, right = np.transpose(pairs)
    if not np.isfinite(e).all():
        raise ValueError(f"{(~np.isfinite(e).all(1)).sum()} of {len(e)} embeddings are not finite")
    projected = means @ e.T                                                                     # (K, N)
    mean_square = (means ** 2).sum(1, keepdims=True)                                            # (K, 1)
    square = np.einsum("nd,nd->n", e, e)
    norm_square = square - 2 * projected + mean_square                                          # (K, N)
    if (norm_square[:, np.ravel(pairs)] <= 1e-12 * square.max()).any():
        raise ValueError("an embedding is zero, so it has no direction to compare")
    parts = range(0, len(left), CHUNK)    # the embeddings of all pairs at once could take gigabytes
    dot = np.concatenate([np.einsum("pd,pd->p", e[left[i:i + CHUNK]], e[right[i:i + CHUNK]]) for i in parts])
    dot = dot - projected[:, left] - projected[:, right] + mean_square
    return np.clip(dot / np.sqrt(norm_square[:, left] * norm_square[:, right]), -1, 1)


def best_threshold(similarity: np.ndarray, same: np.ndarray) -> float:
    """Return the threshold that classifies most pairs correctly; similarity float (P,), same bool (P,).

    Candidates are the midpoints between neighboring distinct similarities, one just below the lowest (all accepted),
    and the highest itself (none accepted). Of several equally good ones, the middle or lower middle one is returned.
    """
    values, genuine, impostor = _tally(similarity, same)
    lower, upper = values[:-1], values[1:]
    middle = lower + (upper - lower) / 2
    middle = np.where(middle < upper, middle, lower)    # adjacent floats have no midpoint between them
    candidates = np.concatenate(([np.nextafter(values[0], -np.inf)], middle, values[-1:]))
    # Entry i is the number of correct answers gained by rejecting the i lowest values.
    gained = np.concatenate(([0], np.cumsum(impostor - genuine)))
    best = np.flatnonzero(gained == gained.max())
    return float(candidates[best[(len(best) - 1) // 2]])


def roc(similarity: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ROC curve as far and tar, float64 (V + 1,) for V distinct similarities, from (0, 0), nothing accepted,
    to (1, 1); similarity float (P,), same bool (P,), with pairs of both kinds."""
    _, genuine, impostor = _tally(similarity, same)
    accepted_genuine = np.concatenate(([0], np.cumsum(genuine[::-1])))
    accepted_impostor = np.concatenate(([0], np.cumsum(impostor[::-1])))
    return accepted_impostor / impostor.sum(), accepted_genuine / genuine.sum()


def auc(far: np.ndarray, tar: np.ndarray) -> float:
    """Return the area under the ROC curve: the probability that a genuine pair beats an impostor pair (ties: half)."""
    return float(np.trapezoid(tar, far))


def equal_error_rate(far: np.ndarray, tar: np.ndarray) -> float:
    """Return the rate at which false acceptance equals false rejection, interpolating linearly between ROC points."""
    gap = far + tar - 1                         # far - frr; rises strictly from -1 to 1
    i = int(np.searchsorted(gap, 0))            # the first point at or beyond the crossing
    share = -gap[i - 1] / (gap[i] - gap[i - 1])
    return float(far[i - 1] + share * (far[i] - far[i - 1]))


def operating_point(similarity: np.ndarray, same: np.ndarray, far: float) -> OperatingPoint:
    """Return the OperatingPoint with the highest TAR among the thresholds with at most the rate `far`, 0 to 1;
    similarity float (P,), same bool (P,), with pairs of both kinds."""
    impostors = np.sort(similarity[~same])[::-1]
    allowed = int(far * len(impostors) + 1e-9)    # 1e-3 of 3,000 may be computed as slightly less than 3
    threshold = impostors[allowed] if allowed < len(impostors) else np.nextafter(similarity.min(), -np.inf)
    return OperatingPoint(far, float((similarity[same] > threshold).mean()), float(threshold),
                          int((impostors > threshold).sum()), len(impostors), allowed >= 1)


def identify(embeddings: np.ndarray, identities: np.ndarray, seed: int = 0) -> Identification:
    """Find each probe's person in a gallery by cosine similarity; ties count against the probe. `embeddings` are float
    (N, D), not zero; `identities` int (N,), of which two or more have two images. For `seed`, see choose_gallery()."""
    gallery, probes = choose_gallery(identities, seed)
    unit = np.asarray(embeddings, np.float32)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    column = np.searchsorted(identities[gallery], identities[probes])
    ranks = []
    for rows in np.array_split(np.arange(len(probes)), 1 + len(probes) // 1000):
        similarity = unit[probes[rows]] @ unit[gallery].T
        ranks.append((similarity >= np.take_along_axis(similarity, column[rows, None], 1)).sum(1))
    cmc = np.cumsum(np.bincount(np.concatenate(ranks) - 1, minlength=len(gallery))) / len(probes)
    return Identification(cmc, len(gallery), len(probes))


def choose_gallery(identities: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image of each identity with at least two images; return these, in the order of the identities, and the
    others of these identities, the probes: int (G,), int (Q,)."""
    identities = np.asarray(identities)
    shuffled = np.random.default_rng(seed).permutation(len(identities))
    shuffled = shuffled[np.isin(identities[shuffled], np.flatnonzero(np.bincount(identities) >= 2))]
    _, chosen = np.unique(identities[shuffled], return_index=True)   # the first of each in the shuffled order
    return shuffled[chosen], np.sort(np.delete(shuffled, chosen))


def _tally(similarity, same):
    """Return the V distinct similarities, sorted, and the numbers of genuine and impostor pairs with each, (V,)."""
    values, index = np.unique(similarity, return_inverse=True)
    genuine = np.bincount(index, same).astype(np.int64)
    return values, genuine, np.bincount(index) - genuine
