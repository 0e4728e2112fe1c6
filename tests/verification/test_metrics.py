"""Verification metrics agree with scikit-learn, and with brute force over every possible threshold."""
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from faces.verification import metrics
from faces.verification.bootstrap import bootstrap, interval
from faces.verification.embed import embed
from faces.verification.metrics import auc, best_threshold, choose_gallery, identify, operating_point, roc, verify


def random_scores(seed, pairs=400, decimals=None):
    """Return random similarities, float (P,), with ties if rounded, and whether each pair is genuine, bool (P,)."""
    rng = np.random.default_rng(seed)
    same = rng.permutation(np.arange(pairs) % 2 == 0)
    similarity = np.clip(rng.normal(0.4 * same, 0.2), -1, 1)
    return (similarity if decimals is None else similarity.round(decimals)), same


def random_embeddings(seed=0, images=60, folds=5, size=20):
    """Return random embeddings of 12 people, the pairs, whether each pair is genuine, and the folds; see verify()."""
    rng = np.random.default_rng(seed)
    people = np.arange(images) % 12
    embeddings = (rng.normal(size=(12, 16))[people] + rng.normal(size=(images, 16)) + 0.5).astype(np.float32)
    pairs = np.array([rng.choice(images, 2, replace=False) for _ in range(folds * size)])
    pairs[::2, 1] = (pairs[::2, 0] + 12) % images  # every other pair is genuine
    return embeddings, pairs, people[pairs[:, 0]] == people[pairs[:, 1]], np.arange(folds * size) // size


def accuracy(similarity, same, threshold):
    return np.mean((similarity > threshold) == same)


def cosines(embeddings, pairs, mean=0):
    centered = embeddings - np.asarray(mean, np.float64)
    centered /= np.linalg.norm(centered, axis=1, keepdims=True)
    return (centered[pairs[:, 0]] * centered[pairs[:, 1]]).sum(1)


@pytest.mark.parametrize("decimals", [None, 2, 1])
def test_no_threshold_beats_best_threshold(decimals):
    similarity, same = random_scores(0, decimals=decimals)
    values = np.unique(similarity)
    candidates = np.concatenate(([-2], values, (values[1:] + values[:-1]) / 2))
    best = accuracy(similarity, same, best_threshold(similarity, same))
    assert best == max(accuracy(similarity, same, t) for t in candidates)


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
    for target in (1e-3, 0.01, 0.0999, 0.5, 0.9999):
        point = operating_point(similarity, same, target)
        assert point.tar == tar[far <= target].max() == np.mean(similarity[same] > point.threshold)
        assert point.accepted == (similarity[~same] > point.threshold).sum() <= target * 200
        assert point.resolved == (target >= 1 / 200)
    # A rate of 1e-3 allows exactly three of 3,000 impostor pairs.
    assert operating_point(np.arange(6000) / 6000, np.arange(6000) < 3000, 1e-3).accepted == 3
    grid = np.linspace(0, 1, 2_000_001)
    crossing = np.argmin(abs(grid - (1 - np.interp(grid, far, tar))))
    # np.interp() uses only one end of a vertical step, so search the steps for the crossing separately.
    steps = np.flatnonzero(np.diff(far) == 0)
    on_step = [far[i] for i in steps if 1 - tar[i + 1] <= far[i] <= 1 - tar[i]]
    assert metrics.equal_error_rate(far, tar) == pytest.approx(on_step[0] if on_step else grid[crossing], abs=1e-6)


def test_the_threshold_of_each_fold_comes_from_the_other_folds(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 7)    # of 100 pairs
    embeddings, pairs, same, folds = random_embeddings()
    result = verify(embeddings, pairs, same, folds)
    np.testing.assert_allclose(result.similarities, cosines(embeddings, pairs), atol=1e-6)
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
        expected = cosines(embeddings, pairs, mean)
        np.testing.assert_allclose(result.similarities[folds == k], expected[folds == k], atol=1e-9)
        threshold = best_threshold(expected[folds != k], same[folds != k])
        assert result.accuracies[k] == accuracy(expected[folds == k], same[folds == k], threshold)
    assert not np.allclose(result.similarities, verify(embeddings, pairs, same, folds).similarities)


@pytest.mark.parametrize("subtract_mean", (False, True))
def test_view_1_chooses_the_threshold_on_its_training_pairs(subtract_mean):
    embeddings, pairs, same, folds = random_embeddings()
    train = folds < 3
    result = verify(embeddings, pairs, same, np.where(train, -1, 0), subtract_mean)
    expected = cosines(embeddings, pairs, embeddings[np.unique(pairs[train])].mean(0) if subtract_mean else 0)
    threshold = best_threshold(expected[train], same[train])
    np.testing.assert_allclose(result.similarities, expected[~train], atol=1e-6)
    assert result.threshold == pytest.approx(threshold, abs=1e-6) and result.std == 0
    assert result.accuracy == accuracy(expected[~train], same[~train], threshold) == result.correct.mean()


def test_invalid_input_raises_value_error():
    embeddings, pairs, same, folds = random_embeddings()
    for value in (np.nan, np.inf, 0):
        invalid = embeddings.copy()
        invalid[pairs[0, 0]] = value
        with pytest.raises(ValueError, match="not finite|is zero"):
            verify(invalid, pairs, same, folds)


def test_identification_agrees_with_ranks_computed_by_sorting():
    embeddings = random_embeddings()[0]
    identities = np.array([*np.arange(40) % 12, 12, 13, 14])   # three people with one image each
    gallery, probes = choose_gallery(identities, seed=5)
    assert sorted(identities[gallery]) == list(range(12)) and sorted((*gallery, *probes)) == list(range(40))
    assert any((gallery != choose_gallery(identities, seed)[0]).any() for seed in range(3))
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    ranks = []
    for probe in probes:
        order = sorted(gallery, key=lambda image: -unit[image] @ unit[probe])
        ranks.append(1 + [identities[image] for image in order].index(identities[probe]))
    result = identify(embeddings[:43], identities, seed=5)
    assert (result.gallery, result.probes) == (12, 28) and result.cmc[-1] == 1
    np.testing.assert_allclose(result.cmc, [np.mean(np.array(ranks) <= rank) for rank in range(1, 13)])
    # If all similarities are equal, every probe gets the last rank, because ties count against it.
    assert identify(np.ones((43, 4)), identities).cmc.tolist() == [0] * 11 + [1]


@pytest.mark.parametrize("last", [[5], [5, 6]])    # one set, or two with the people 2, 3 and 4 in common
def test_bootstrap_counts_the_copies_of_each_pair(last):
    rng = np.random.default_rng(1)
    sets = [(rng.random((2, 60)) < 0.8, rng.integers(end - 5 + (end > 5), end, (60, 2))) for end in last]
    drawn = np.random.default_rng(7).integers(last[-1], size=(30, last[-1]))
    expected = []
    for people in drawn:    # a pair is repeated for each choice of two drawn people, of a genuine pair for each of one
        copies = [[sum(x == a for x in people) * (a == b or sum(x == b for x in people)) for a, b in both]
                  for _, both in sets]
        expected.append(np.mean([[np.repeat(row, times).mean() for row in correct]
                                 for (correct, _), times in zip(sets, copies)], 0))
    np.testing.assert_allclose(bootstrap(sets, 30, 7), np.transpose(expected), atol=1e-6)


def test_intervals_of_draws():
    rng = np.random.default_rng(0)
    draws = bootstrap([(rng.random((2, 2000)) < 0.8, rng.integers(0, 200, (2000, 2)))], 500, 1)
    low, high = interval(draws[0])
    assert np.mean((low < draws[0]) & (draws[0] < high)) == pytest.approx(0.95, abs=0.01)
    assert interval(draws[1] - draws[1]) == (0, 0)


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
