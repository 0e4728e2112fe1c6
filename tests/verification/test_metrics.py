"""Verification metrics agree with scikit-learn, and with brute force over every possible threshold."""
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from faces.verification import metrics
from faces.verification.embed import embed
from faces.verification.metrics import (
    auc,
    best_threshold,
    equal_error_rate,
    operating_point,
    roc,
    similarities,
    training_means,
    verify,
)


def random_scores(seed, pairs=400, decimals=None):
    """Return random similarities, float (P,), and whether each pair is genuine, bool (P,); half of them are.

    Rounding to few decimals produces ties, both within a kind of pair and between the two kinds.
    """
    rng = np.random.default_rng(seed)
    same = rng.permutation(np.arange(pairs) % 2 == 0)
    similarity = np.clip(rng.normal(0.4 * same, 0.2), -1, 1)
    return (similarity if decimals is None else similarity.round(decimals)), same


def accuracy(similarity, same, threshold):
    """Return the fraction of pairs that a threshold classifies correctly."""
    return np.mean((similarity > threshold) == same)


def random_embeddings(seed=0, images=60, folds=5, size=20):
    """Return random embeddings of 12 people, the pairs, whether each pair is genuine, and the folds; see verify()."""
    rng = np.random.default_rng(seed)
    people = np.arange(images) % 12
    embeddings = (rng.normal(size=(12, 16))[people] + rng.normal(size=(images, 16)) + 0.5).astype(np.float32)
    pairs = np.array([rng.choice(images, 2, replace=False) for _ in range(folds * size)])
    pairs[::2, 1] = (pairs[::2, 0] + 12) % images  # every other pair is genuine
    return embeddings, pairs, people[pairs[:, 0]] == people[pairs[:, 1]], np.arange(folds * size) // size


@pytest.mark.parametrize("decimals", [None, 2, 1])
@pytest.mark.parametrize("seed", range(3))
def test_no_threshold_beats_best_threshold(seed, decimals):
    similarity, same = random_scores(seed, decimals=decimals)
    threshold = best_threshold(similarity, same)
    values = np.unique(similarity)
    candidates = np.concatenate(([-2], values, (values[1:] + values[:-1]) / 2))
    assert accuracy(similarity, same, threshold) == max(accuracy(similarity, same, t) for t in candidates)
    far, tar, _ = roc_curve(same, similarity, drop_intermediate=False)
    assert accuracy(similarity, same, threshold) == pytest.approx(max(tar + 1 - far) / 2)  # half are genuine


@pytest.mark.parametrize("similarity, same, expected", [
    ([0.1, 0.2, 0.6, 0.8], [0, 0, 1, 1], 0.4),
    ([0.5, 0.5, 0.5], [1, 1, 0], np.nextafter(0.5, 0)),  # tied pairs are accepted together ...
    ([0.5, 0.5, 0.5], [1, 0, 0], 0.5),                   # ... or rejected together
    ([0.1, 0.2, 0.3, 0.4], [0, 1, 0, 1], 0.15),          # 0.15 and 0.35 are equally good, so the lower wins
    ([np.nextafter(0.3, 0), 0.3], [0, 1], np.nextafter(0.3, 0)),
])
def test_best_threshold_on_small_examples(similarity, same, expected):
    assert best_threshold(np.array(similarity), np.array(same, bool)) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("decimals", [None, 2, 1])
def test_roc_metrics_agree_with_scikit_learn_and_brute_force(decimals):
    similarity, same = random_scores(5, decimals=decimals)
    far, tar = roc(similarity, same)
    expected_far, expected_tar, _ = roc_curve(same, similarity, drop_intermediate=False)
    np.testing.assert_allclose(far, expected_far)
    np.testing.assert_allclose(tar, expected_tar)
    assert auc(far, tar) == pytest.approx(roc_auc_score(same, similarity), abs=1e-12)
    for target in (0, 0.01, 0.1, 1):
        allowed = [np.mean(similarity[same] > t) for t in (-2, *similarity) if np.mean(similarity[~same] > t) <= target]
        assert operating_point(similarity, same, target).tar == max(allowed)
    grid = np.linspace(0, 1, 2_000_001)
    crossing = np.argmin(abs(grid - (1 - np.interp(grid, far, tar))))
    # np.interp() uses only one end of a vertical step, so search the steps for the crossing separately.
    steps = np.flatnonzero(np.diff(far) == 0)
    on_step = [far[i] for i in steps if 1 - tar[i + 1] <= far[i] <= 1 - tar[i]]
    assert equal_error_rate(far, tar) == pytest.approx(on_step[0] if on_step else grid[crossing], abs=1e-6)


def test_the_threshold_of_each_fold_comes_from_the_other_folds():
    embeddings, pairs, same, folds = random_embeddings()
    result = verify(embeddings, pairs, same, folds)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosines = np.array([unit[a] @ unit[b] for a, b in pairs])
    np.testing.assert_allclose(result.similarities, cosines, atol=1e-6)
    for k in range(5):
        threshold = best_threshold(result.similarities[folds != k], same[folds != k])
        assert result.thresholds[k] == threshold
        assert result.accuracies[k] == accuracy(result.similarities[folds == k], same[folds == k], threshold)
    assert (result.accuracy, result.std) == (np.mean(result.accuracies), np.std(result.accuracies))
    flipped = same.copy()
    flipped[folds == 2] ^= True
    assert verify(embeddings, pairs, flipped, folds).thresholds[2] == result.thresholds[2]


def test_the_subtracted_mean_comes_from_the_training_folds():
    embeddings, pairs, same, folds = random_embeddings(1)
    result = verify(embeddings, pairs, same, folds, subtract_mean=True)
    for k in range(5):
        mean = embeddings[sorted(set(pairs[folds != k].ravel()))].astype(np.float64).mean(0)
        centered = embeddings - mean
        centered /= np.linalg.norm(centered, axis=1, keepdims=True)
        cosines = (centered[pairs[:, 0]] * centered[pairs[:, 1]]).sum(1)
        np.testing.assert_allclose(result.similarities[folds == k], cosines[folds == k], atol=1e-9)
        threshold = best_threshold(cosines[folds != k], same[folds != k])
        assert result.accuracies[k] == accuracy(cosines[folds == k], same[folds == k], threshold)
    assert not np.allclose(result.similarities, verify(embeddings, pairs, same, folds).similarities)
    np.testing.assert_allclose(training_means(embeddings, pairs, folds)[4], mean)


def test_invalid_input_raises_value_error():
    embeddings, pairs, same, folds = random_embeddings()
    for value in (np.nan, np.inf, 0):
        invalid = embeddings.copy()
        invalid[pairs[0, 0]] = value
        with pytest.raises(ValueError, match="not finite|is zero"):
            verify(invalid, pairs, same, folds)
    with pytest.raises(ValueError, match="genuine and impostor"):
        verify(embeddings, pairs, np.ones_like(same), folds)
    with pytest.raises(ValueError, match="two folds"):
        verify(embeddings, pairs, same, np.zeros_like(folds))
    with pytest.raises(ValueError, match="not numbers"):
        best_threshold(np.array([0.1, np.nan]), np.array([True, False]))
    assert similarities(embeddings, np.array([[0, 0]]), np.zeros((1, 16)))[0, 0] == pytest.approx(1)


def test_similarities_do_not_depend_on_how_many_pairs_are_in_memory(monkeypatch):
    embeddings, pairs, _, _ = random_embeddings()
    expected = similarities(embeddings, pairs, embeddings[:3] / 2)
    monkeypatch.setattr(metrics, "CHUNK", 7)
    assert len(pairs) > 7 and np.array_equal(similarities(embeddings, pairs, embeddings[:3] / 2), expected)


class ColumnSums(torch.nn.Module):
    """Embed a face as the sums of the 96 columns of its red channel, so that flipping reverses the embedding."""

    def forward(self, x):
        assert not self.training
        return x[:, 0].sum(1)


def test_the_network_gets_scaled_faces_and_their_flipped_images():
    faces = np.random.default_rng(0).integers(0, 256, (5, 112, 96, 3), dtype=np.uint8)
    net = ColumnSums().train()
    expected = ((faces[..., 0].astype(np.float64) - 127.5) / 128).sum(1)
    plain, concatenated, summed = (embed(net, faces, "cpu", 2, flip, progress=False)
                                   for flip in ("none", "concatenate", "sum"))
    assert plain.dtype == np.float32 and concatenated.shape == (5, 192) and net.training
    np.testing.assert_allclose(plain, expected, atol=1e-3)
    np.testing.assert_allclose(concatenated, np.hstack((expected, expected[:, ::-1])), atol=1e-3)
    np.testing.assert_allclose(summed, expected + expected[:, ::-1], atol=1e-3)
    with pytest.raises(ValueError, match="flip"):
        embed(net, faces, "cpu", flip="add")
