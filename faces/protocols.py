"""Two protocols beside the folds: acceptance at stated false acceptance rates, and identification with a gallery."""
from typing import NamedTuple

import numpy as np


class Operating(NamedTuple):
    """The loosest threshold that keeps to a false acceptance rate, over all pairs.

    far: the rate that was asked for.
    tar: share of genuine pairs accepted.
    threshold: a pair is accepted when its similarity is greater.
    accepted, impostors: impostor pairs accepted, and in all.
    """
    far: float
    tar: float
    threshold: float
    accepted: int
    impostors: int

    @property
    def resolved(self):
        """Whether there are impostor pairs enough for one to be accepted at this rate."""
        return _allowed(self.far, self.impostors) >= 1


class Identification(NamedTuple):
    """Closed-set identification: each probe's person is in the gallery, with one image.

    cmc: float64 (G,), share of probes whose own person is among the 1, 2, ... most similar of the gallery.
    gallery, probes: G and Q, their numbers of images.
    """
    cmc: np.ndarray
    gallery: int
    probes: int


def operate(similarity, same, far):
    """Return the Operating point at a false acceptance rate; its tar is that of faces.verify.tar_at_far.

    Args:
        similarity: float (P,).
        same: bool (P,), with both kinds of pair.
        far: 0 to 1.
    """
    impostors = np.sort(similarity[~same])[::-1]
    allowed = _allowed(far, len(impostors))
    threshold = impostors[allowed] if allowed < len(impostors) else np.nextafter(similarity.min(), -np.inf)
    return Operating(far, float((similarity[same] > threshold).mean()), float(threshold),
                     int((impostors > threshold).sum()), len(impostors))


def identify(embeddings, identities, seed=0):
    """Find each probe's person in a gallery by cosine similarity.

    The gallery has one image, drawn by seed, of each identity with at least two; its other images are the probes. Equal
    similarities count against the probe.

    Args:
        embeddings: float (N, D), not zero.
        identities: int (N,).
        seed: of the gallery.

    Returns:
        Identification.

    Raises:
        ValueError: fewer than two identities with two images.
    """
    gallery, probes = choose_gallery(identities, seed)
    if len(gallery) < 2:
        raise ValueError("identification needs two people or more with at least two images each")
    unit = np.asarray(embeddings, np.float32)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    column = np.searchsorted(identities[gallery], identities[probes])
    ranks = np.concatenate([_ranks(unit[probes[rows]] @ unit[gallery].T, column[rows])
                            for rows in np.array_split(np.arange(len(probes)), 1 + len(probes) // 1000)])
    return Identification(np.cumsum(np.bincount(ranks - 1, minlength=len(gallery))) / len(probes), len(gallery),
                          len(probes))


def choose_gallery(identities, seed=0):
    """Return the images of the gallery, in the order of their identities, and the probes: int (G,), int (Q,)."""
    identities = np.asarray(identities)
    shuffled = np.random.default_rng(seed).permutation(len(identities))
    shuffled = shuffled[np.isin(identities[shuffled], np.flatnonzero(np.bincount(identities) >= 2))]
    _, chosen = np.unique(identities[shuffled], return_index=True)   # the first of each in the shuffled order
    return shuffled[chosen], np.sort(np.delete(shuffled, chosen))


def _ranks(similarity, column):
    """Return int (Q,), 1 for the most similar, of each row's own column."""
    own = np.take_along_axis(similarity, column[:, None], 1)
    return (similarity >= own).sum(1)


def _allowed(far, impostors):
    return int(far * impostors + 1e-9)   # 1e-3 of 3,000 may come out as a hair less than 3
