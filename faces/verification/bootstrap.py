"""How sure an accuracy is: its bootstrap over identities, for one model or for several on the same pairs.

Pairs that share a person are not independent, so people are what is drawn, not pairs (Bolle, Ratha and Pankanti, "Error
analysis of pattern recognition systems: the subsets bootstrap", CVIU 2004). An impostor pair belongs to two people and
counts with the product of how often they were drawn (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics
2007); a genuine pair belongs to one and counts as often as that one was drawn. This errs on the wide side: where no two
pairs share a person, the errors of impostor pairs seem to spread by the root of three more than they do.

Thresholds are held fixed: they were chosen on nine tenths of all pairs and hardly move, and the question is how the
judgements would fare with other people. One draw serves all models, so that differences are paired.
"""
import numpy as np

CHUNK = 64   # draws at a time, about 10 MB of weights on LFW


def bootstrap(correct, identities, resamples=1000, seed=0):
    """Draw identities with replacement, again and again, and return each draw's accuracies.

    Args:
        correct: bool (M, P), which pairs each of M models judged rightly.
        identities: int (P, 2), who is on each pair's images.
        resamples: R, how many draws.
        seed: of the draws.

    Returns:
        float64 (M, R), the weighted share of pairs judged rightly, NaN in a draw in which no pair counts; that takes a
        set of very few people.
    """
    people, index = np.unique(identities, return_inverse=True)
    left, right = index.reshape(-1, 2).T
    correct = np.asarray(correct, np.float32).T                                     # (P, M)
    random = np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, CHUNK):
        weights = pair_weights(draw(random, min(CHUNK, resamples - start), len(people)), left, right)
        with np.errstate(invalid="ignore"):   # no pair counts: NaN, which interval() leaves out
            parts.append((weights @ correct) / weights.sum(1, keepdims=True))
    return np.concatenate(parts).T.astype(np.float64)


def draw(random, resamples, count):
    """Return float32 (resamples, count): how often each of `count` was drawn in `count` draws with replacement."""
    drawn = random.integers(count, size=(resamples, count)) + count * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * count).reshape(resamples, count).astype(np.float32)


def pair_weights(drawn, left, right):
    """Return how much each pair counts in each draw, float32 (R, P).

    Args:
        drawn: float32 (R, I), how often each identity was drawn.
        left, right: int (P,), the identities of each pair, equal in a genuine one.
    """
    return drawn[:, left] * np.where(left == right, np.float32(1), drawn[:, right])


def interval(values, level=0.95):
    """Return the percentile interval of bootstrap values (R,), without the NaN among them: two floats."""
    low, high = np.nanquantile(values, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)
