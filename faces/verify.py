"""Score pairs of faces: cosine similarity, k-fold accuracy, and the figures of the ROC curve, all exact, in numpy.

A pair is accepted when its similarity is greater than the threshold, so equal similarities are accepted or rejected
together. Wherever thresholds are searched, one per distinct outcome is tried, and there is no grid.
"""
from typing import NamedTuple

import numpy as np


class Verification(NamedTuple):
    """What a verification protocol yields; P judged pairs in K folds.

    similarities: float64 (P,); with the mean subtracted, each pair under the mean of its own fold's protocol.
    correct: bool (P,), which pairs were judged rightly, each by the threshold of its own fold.
    accuracies, thresholds: float64 (K,), one per fold, the threshold chosen on the other folds.
    accuracy, std, threshold: their means, and the accuracies' standard deviation (ddof=0).
    far, tar: float64 (V + 1,), points of the ROC curve over all pairs, far rising from 0 to 1.
    auc, eer: area under that curve, and the equal error rate.
    """
    similarities: np.ndarray
    correct: np.ndarray
    accuracies: np.ndarray
    thresholds: np.ndarray
    accuracy: float
    std: float
    threshold: float
    far: np.ndarray
    tar: np.ndarray
    auc: float
    eer: float


def verify(embeddings, pairs, same, folds, subtract_mean=False):
    """Run the k-fold protocol of LFW: each fold is judged with the threshold that is best on all the others.

    Args:
        embeddings: float (N, D), one row per distinct image; not normalised.
        pairs: int (P, 2), rows of `embeddings`.
        same: bool (P,), true for a genuine pair.
        folds: int (P,), the fold of each pair, 0 .. K-1; -1 for pairs that only choose thresholds and are not judged,
            as in LFW's view 1. A single fold needs such pairs.
        subtract_mean: take from every embedding the mean over the distinct images of the training folds' pairs; it is
            another mean for every fold, and the fold under test has no part in it.

    Raises:
        ValueError: fewer than two folds, no genuine or no impostor pair, or an embedding that is not finite or, after
            the mean is subtracted, zero.
    """
    same, folds = np.asarray(same, bool), np.asarray(folds)
    count = folds.max(initial=-1) + 1
    judged = np.flatnonzero(folds >= 0)
    if count + (len(judged) < len(folds)) < 2 or len(np.unique(folds[judged])) != count:
        raise ValueError("the protocol needs at least two folds, none of them empty")
    means = training_means(embeddings, pairs, folds) if subtract_mean else np.zeros((1, np.shape(embeddings)[1]))
    tables = np.broadcast_to(similarities(embeddings, pairs, means), (count, len(folds)))
    scores = tables[folds[judged], judged]
    far, tar = roc(scores, same[judged])  # checks that both kinds of pair are there
    thresholds = np.array([best_threshold(tables[k][folds != k], same[folds != k]) for k in range(count)])
    correct = (scores > thresholds[folds[judged]]) == same[judged]
    accuracies = np.bincount(folds[judged], correct) / np.bincount(folds[judged])
    return Verification(scores, correct, accuracies, thresholds, float(accuracies.mean()), float(accuracies.std()),
                        float(thresholds.mean()), far, tar, auc(far, tar), equal_error_rate(far, tar))


def similarities(embeddings, pairs, means):
    """Return the cosine similarity of each pair, for each of several means that are subtracted first.

    Expands (a - m).(b - m), so that the K means cost one matrix product instead of K passes over the embeddings.

    Args:
        embeddings: float (N, D).
        pairs: int (P, 2).
        means: float (K, D); one row of zeros for plain cosines.

    Returns:
        float64 (K, P), in [-1, 1].

    Raises:
        ValueError: an embedding of a pair that is not finite, or is zero once the mean is subtracted.
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
    dot = np.einsum("pd,pd->p", e[left], e[right]) - projected[:, left] - projected[:, right] + mean_square
    return np.clip(dot / np.sqrt(norm_square[:, left] * norm_square[:, right]), -1, 1)


def training_means(embeddings, pairs, folds):
    """Return the mean embedding of each fold's training images: float64 (K, D).

    Row k is over the distinct images that occur in a pair of any fold but k.
    """
    count, e = folds.max() + 1, np.asarray(embeddings, np.float64)
    member = np.zeros((count, len(e)), bool)
    for k in range(count):
        member[k, np.ravel(pairs[folds != k])] = True
    return member @ e / member.sum(1, keepdims=True)


def best_threshold(similarity, same):
    """Return the threshold at which most pairs are judged rightly.

    Candidates are the midpoints between neighbouring distinct similarities, one just below the lowest (all accepted)
    and the highest itself (none accepted). Of equally good ones the middle one in order is taken, the lower of two.

    Args:
        similarity: float (P,).
        same: bool (P,).
    """
    values, genuine, impostor = _tally(similarity, same)
    lower, upper = values[:-1], values[1:]
    middle = lower + (upper - lower) / 2
    middle = np.where(middle < upper, middle, lower)  # between two adjacent floats there is no room
    candidates = np.concatenate(([np.nextafter(values[0], -np.inf)], middle, values[-1:]))
    gained = np.concatenate(([0], np.cumsum(impostor - genuine)))  # right answers won by rejecting the lowest i values
    best = np.flatnonzero(gained == gained.max())
    return float(candidates[best[(len(best) - 1) // 2]])


def roc(similarity, same):
    """Return the points of the ROC curve, one per distinct outcome.

    Args:
        similarity: float (P,).
        same: bool (P,).

    Returns:
        far, tar: float64 (V + 1,) for V distinct similarities, from (0, 0), nothing accepted, to (1, 1).

    Raises:
        ValueError: no genuine or no impostor pair, or a similarity that is not a number.
    """
    _, genuine, impostor = _tally(similarity, same)
    if not genuine.any() or not impostor.any():
        raise ValueError("a ROC curve needs genuine and impostor pairs")
    accepted_genuine = np.concatenate(([0], np.cumsum(genuine[::-1])))
    accepted_impostor = np.concatenate(([0], np.cumsum(impostor[::-1])))
    return accepted_impostor / impostor.sum(), accepted_genuine / genuine.sum()


def auc(far, tar):
    """Return the area under the ROC curve: how often a genuine pair beats an impostor pair, a tie counting half."""
    return float(np.trapezoid(tar, far))


def equal_error_rate(far, tar):
    """Return the rate at which false acceptance equals false rejection, on straight lines between ROC points."""
    gap = far + tar - 1                         # far - frr; rises strictly from -1 to 1
    i = int(np.searchsorted(gap, 0))            # the first point at or beyond the crossing
    share = -gap[i - 1] / (gap[i] - gap[i - 1])
    return float(far[i - 1] + share * (far[i] - far[i - 1]))


def tar_at_far(far, tar, target):
    """Return the highest true acceptance rate of any threshold whose false acceptance rate is at most `target`."""
    return float(tar[far <= target].max())


def _tally(similarity, same):
    similarity, same = np.asarray(similarity, np.float64), np.asarray(same, bool)
    if not len(similarity) or np.isnan(similarity).any():
        raise ValueError("similarities are missing or not numbers")
    values, index = np.unique(similarity, return_inverse=True)
    genuine = np.bincount(index, same).astype(np.int64)
    return values, genuine, np.bincount(index) - genuine
