"""Confidence intervals for accuracy from a bootstrap over identities, for one or more models on the same sets of pairs.

Pairs that share a person are not independent, so people are resampled (Bolle, Ratha and Pankanti, "Error analysis of
pattern recognition systems: the subsets bootstrap", CVIU 2004). A genuine pair counts as often as its person was drawn,
an impostor pair the product of its two people's counts (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics
2007). The intervals are conservative: if no two pairs share a person, the spread of the impostor pairs' errors is
overestimated by a factor of sqrt(3). Thresholds are held fixed: each is chosen on nine tenths of all pairs and hardly
changes. All models share the same draws, so their differences are paired. So do all sets: people who are in several
sets are drawn for all of them.
"""
import numpy as np

CHUNK = 64   # number of draws computed at a time, which limits the memory to about 10 MB on LFW


def bootstrap(sets: list[tuple], resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Draw people with replacement; return the mean accuracy on the sets of each of M models on each of R draws,
    float64 (M, R).

    A set is bool (M, P), which pairs each model classified correctly, and (P, 2), the people on both images, as numbers
    or names; equal ones are the same person in all sets. The accuracy is NaN for a draw in which all weights are zero,
    which happens only with very few people.
    """
    people, index = np.unique(np.concatenate([both for _, both in sets]), return_inverse=True)
    ends = np.cumsum([len(both) for _, both in sets])
    sets = [(np.asarray(correct, np.float32).T, *rows.T)                            # (P, M), (P,), (P,)
            for (correct, _), rows in zip(sets, np.split(index.reshape(-1, 2), ends))]
    rng = np.random.default_rng(seed)
    accuracies = []
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        # Each draw has its own range of numbers, so that one bincount() counts the people of all draws.
        drawn = rng.integers(len(people), size=(size, len(people))) + len(people) * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float32)
        total = 0
        for correct, left, right in sets:
            weights = counts[:, left] * np.where(left == right, np.float32(1), counts[:, right])    # (draws, P)
            with np.errstate(invalid="ignore"):   # if all weights are zero, this is NaN, which interval() ignores
                total = total + (weights @ correct) / weights.sum(1, keepdims=True)
        accuracies.append(total / len(sets))
    return np.concatenate(accuracies).T.astype(np.float64)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of R bootstrap values, low and high; NaN values are ignored."""
    low, high = np.nanquantile(values, (0.025, 0.975))
    return float(low), float(high)
