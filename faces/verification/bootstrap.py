"""Confidence intervals of an accuracy by a bootstrap over identities, for one model or several on the same pairs.

Pairs that share a person are not independent, so people are resampled, not pairs (Bolle, Ratha and Pankanti, "Error
analysis of pattern recognition systems: the subsets bootstrap", CVIU 2004). An impostor pair is weighted by the product
    of
how often its two people were drawn (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007), a genuine
pair by how often its person was drawn. The intervals are conservative: if no two pairs share a person, the spread of
the errors of impostor pairs is overestimated by a factor of sqrt(3).

Thresholds are held fixed, because they are chosen on nine tenths of all pairs and hardly change, and the question is
how the same decisions would do on other people. All models share the same draws, so their differences are paired.
"""
import numpy as np

CHUNK = 64   # draws that are computed at a time; about 10 MB of weights on LFW


def bootstrap(correct, identities, resamples=1000, seed=0):
    """Draw identities with replacement and return the accuracies of each draw.

    Args:
        correct: bool (M, P), which pairs each of M models classified correctly.
        identities: int (P, 2), the identities of both images of each pair.
        resamples: number of draws R.
        seed: of the draws.

    Returns:
        float64 (M, R), the weighted fraction of correct pairs; NaN for a draw in which all weights are zero, which
        happens only with very few people.
    """
    people, index = np.unique(identities, return_inverse=True)
    left, right = index.reshape(-1, 2).T
    correct = np.asarray(correct, np.float32).T                                     # (P, M)
    random = np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, CHUNK):
        weights = pair_weights(draw(random, min(CHUNK, resamples - start), len(people)), left, right)
        with np.errstate(invalid="ignore"):   # all weights zero: NaN, which interval() ignores
            parts.append((weights @ correct) / weights.sum(1, keepdims=True))
    return np.concatenate(parts).T.astype(np.float64)


def draw(random, resamples, count):
    """Return how often each of `count` items occurs in `count` draws with replacement, float32 (resamples, count)."""
    drawn = random.integers(count, size=(resamples, count)) + count * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * count).reshape(resamples, count).astype(np.float32)


def pair_weights(drawn, left, right):
    """Return the weight of each pair in each draw, float32 (R, P).

    Args:
        drawn: float32 (R, I), how often each identity was drawn.
        left, right: int (P,), the identities of each pair, equal for a genuine pair.
    """
    return drawn[:, left] * np.where(left == right, np.float32(1), drawn[:, right])


def interval(values, level=0.95):
    """Return the percentile interval of bootstrap values (R,), ignoring NaN: two floats."""
    low, high = np.nanquantile(values, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)
