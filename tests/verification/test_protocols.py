"""View 1 of LFW, TAR at given FARs, identification, the bootstrap over identities, contact sheets, several models."""
import itertools
import json
import pickle
import re

import cv2
import numpy as np
import pytest
import torch
from conftest import draw_face, run_lfw_eval, write_image

import cosFace.net
from faces.files import CHECKPOINT, InputError
from faces.images import read_image
from faces.verification.bootstrap import bootstrap, draw, interval, pair_weights
from faces.verification.metrics import (
    best_threshold,
    choose_gallery,
    identify,
    operating_point,
    roc,
    similarities,
    verify,
)
from faces.verification.pairs import Pairs, read_pairs
from faces.verification.report import error_sheet, hardest

PEOPLE, PHOTOS = 6, 3
GENUINE = [f"P{p}\t{i}\t{j}" for p in range(PEOPLE) for i, j in ((1, 2), (1, 3))]
IMPOSTOR = [f"P{p}\t1\tP{(p + d) % PEOPLE}\t{d}" for p in range(PEOPLE) for d in (1, 2)]


@pytest.fixture(scope="module")
def lfw(tmp_path_factory):
    """Return a folder of aligned faces, three each of six people, with the pairs files of both views."""
    root = tmp_path_factory.mktemp("lfw")
    for person, photo in itertools.product(range(PEOPLE), range(1, PHOTOS + 1)):
        write_image(root / f"P{person}" / f"P{person}_{photo:04d}.png", draw_face(person, photo, 112)[0])
    lines = [line for k in range(3) for line in GENUINE[4 * k:4 * k + 4] + IMPOSTOR[4 * k:4 * k + 4]]
    (root / "pairs.txt").write_text("\n".join(["3\t4", *lines]))
    (root / "pairsDevTrain.txt").write_text("\n".join(["8", *GENUINE[:8], *IMPOSTOR[:8]]))
    (root / "pairsDevTest.txt").write_text("\n".join(["4", *GENUINE[8:], *IMPOSTOR[8:]]))
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the checkpoints of two untrained networks."""
    paths = [tmp_path_factory.mktemp("models") / name for name in ("a.pt", "b.pt")]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        net = cosFace.net.faceNet().train()
        with torch.no_grad():
            net(torch.randn(4, 3, 112, 96))
        torch.save({"format": CHECKPOINT, "method": "CosFace", "net": "faceNet", "weights": net.state_dict()}, path)
    return paths


def random_pairs(seed=0, images=60, people=12, pairs=200):
    """Return random embeddings, float (images, 16), and Pairs of them in five folds; at least half are genuine."""
    rng = np.random.default_rng(seed)
    identities = np.arange(images) % people
    indices = np.array([rng.choice(images, 2, replace=False) for _ in range(pairs)])
    indices[::2, 1] = (indices[::2, 0] + people) % images  # every other pair is genuine
    embeddings = rng.normal(size=(people, 16))[identities] + rng.normal(size=(images, 16))
    same = identities[indices[:, 0]] == identities[indices[:, 1]]
    return embeddings, Pairs([f"P{i % people}/{i}.jpg" for i in range(images)], indices, same,
                             np.arange(pairs) // (pairs // 5), identities)


def test_view_1_is_selected_with_the_option_or_by_file_name(lfw):
    assert read_pairs(lfw).folds.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    for pairs in (read_pairs(lfw, view=1), read_pairs(lfw, lfw / "pairsDevTest.txt"),
                  read_pairs(lfw, lfw / "pairsDevTrain.txt")):
        assert pairs.folds.tolist() == [-1] * 16 + [0] * 8
        assert pairs.same.tolist() == [True] * 8 + [False] * 8 + [True] * 4 + [False] * 4
        assert [pairs.paths[i] for i in pairs.judged().pairs[0]] == ["P4/P4_0001.png", "P4/P4_0002.png"]
        assert [len(field) for field in pairs.judged()[1:4]] == [8, 8, 8]
        assert [path[:2] for path in pairs.paths[:18]] == [f"P{person}" for person in pairs.identities]


def test_view_1_is_the_default_without_pairs_txt_and_its_errors_are_one_sentence(lfw, tmp_path):
    for path in (*lfw.rglob("*.png"), *lfw.glob("pairsDev*.txt")):
        (tmp_path / path.relative_to(lfw)).parent.mkdir(exist_ok=True)
        (tmp_path / path.relative_to(lfw)).symlink_to(path)
    assert read_pairs(tmp_path).folds[0] == -1
    with pytest.raises(InputError, match="no pairs.txt"):
        read_pairs(tmp_path, view=2)
    with pytest.raises(InputError, match="does not belong to view 1"):
        read_pairs(lfw, lfw / "pairs.txt", view=1)
    (tmp_path / "pairsDevTest.txt").unlink()
    with pytest.raises(InputError, match="no pairsDevTest.txt"):
        read_pairs(tmp_path)
    for text, message in (("", "it is empty"), ("4\nP0\t1\t2", "declares 1 x 8 = 8 pairs but contains 1"),
                          ("1\nP0\t1\tP1\t1\nP1\t1\tP2\t1", "0 genuine pairs and 2 impostor pairs")):
        (tmp_path / "pairsDevTest.txt").write_text(text)
        with pytest.raises(InputError, match=message):
            read_pairs(tmp_path)


@pytest.mark.parametrize("subtract_mean", (False, True))
def test_view_1_chooses_the_threshold_on_its_training_pairs(subtract_mean):
    embeddings, pairs = random_pairs()
    pairs = pairs._replace(folds=np.where(pairs.folds < 3, -1, 0))
    train, test = pairs.folds < 0, pairs.folds == 0
    mean = embeddings[np.unique(pairs.pairs[train])].mean(0) if subtract_mean else 0
    unit = (embeddings - mean) / np.linalg.norm(embeddings - mean, axis=1, keepdims=True)
    cosines = (unit[pairs.pairs[:, 0]] * unit[pairs.pairs[:, 1]]).sum(1)
    result = verify(embeddings, *pairs[1:4], subtract_mean)
    threshold = best_threshold(cosines[train], pairs.same[train])
    np.testing.assert_allclose(result.similarities, cosines[test])
    assert result.threshold == pytest.approx(threshold) and result.std == 0
    assert result.accuracy == np.mean((cosines[test] > threshold) == pairs.same[test]) == result.correct.mean()
    np.testing.assert_array_equal(result.tar, roc(cosines[test], pairs.same[test])[1])


@pytest.mark.parametrize("decimals", (None, 1))
def test_operating_point_has_the_highest_tar_within_its_far(decimals):
    rng = np.random.default_rng(3)
    same = np.arange(600) < 300
    similarity = rng.normal(0.4 * same, 0.2)
    similarity = similarity if decimals is None else similarity.round(decimals)
    for far in (1e-3, 0.01, 0.0999, 0.5, 0.9999):
        point = operating_point(similarity, same, far)
        rates, tars = roc(similarity, same)
        assert point.tar == tars[rates <= far].max() == np.mean(similarity[same] > point.threshold)
        assert point.accepted == (similarity[~same] > point.threshold).sum() <= far * 300
        assert point.resolved == (far >= 1 / 300)
    # A rate of 1e-3 allows exactly three of 3,000 impostor pairs.
    assert operating_point(np.arange(6000) / 6000, np.arange(6000) < 3000, 1e-3).accepted == 3
    assert operating_point(similarity, same, 1 / 300).resolved


def test_identification_agrees_with_ranks_computed_by_sorting():
    embeddings, pairs = random_pairs()
    identities = np.concatenate((pairs.identities[:40], [12, 13, 14]))   # three people with one image each
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
    assert result.cmc[0] > 1.5 / 12
    # If all similarities are equal, every probe gets the last rank, because ties count against it.
    assert identify(np.ones((43, 4)), identities).cmc.tolist() == [0] * 11 + [1]
    with pytest.raises(ValueError, match="two people"):
        identify(embeddings[:3], np.array([0, 0, 1]))


def test_bootstrap_weights_count_the_copies_of_each_pair():
    _, pairs = random_pairs(images=12, people=5, pairs=60)
    pair_identities = pairs.identities[pairs.pairs]
    counts = draw(np.random.default_rng(1), 20, 5)
    assert (counts.sum(1) == 5).all()
    for draw_counts, weights in zip(counts, pair_weights(counts, *pair_identities.T)):
        people = [(person, copy) for person in range(5) for copy in range(int(draw_counts[person]))]
        for (a, b), weight in zip(pair_identities, weights):
            copies = [(x, y) for x in people for y in people if (x[0], y[0]) == (a, b) and (a != b or x == y)]
            assert weight == len(copies)
    correct = np.random.default_rng(2).random((2, 60)) < 0.8
    expected = [[np.repeat(row, weights.astype(int)).mean() for weights in pair_weights(
        draw(np.random.default_rng(7), 30, 5), *pair_identities.T)] for row in correct]
    np.testing.assert_allclose(bootstrap(correct, pair_identities, 30, 7), expected, atol=1e-6)


def test_interval_accounts_for_pairs_that_share_a_person():
    people = np.repeat(np.arange(200), 10)
    identities = np.stack((people, people), 1)
    rng = np.random.default_rng(0)
    independent = rng.random(2000) < 0.8               # each pair is correct or not, regardless of the person
    shared = np.repeat(rng.random(200) < 0.8, 10)      # all ten pairs of a person are correct, or all are wrong
    binomial_std = np.sqrt(0.8 * 0.2 / 2000)
    draws = bootstrap(np.stack((independent, shared, shared)), identities, 2000, 1)
    assert draws[0].std() == pytest.approx(binomial_std, rel=0.15)
    assert draws[1].std() == pytest.approx(binomial_std * 10 ** 0.5, rel=0.15)
    low, high = interval(draws[1])
    assert low < shared.mean() < high and high - low == pytest.approx(3.92 * draws[1].std(), rel=0.1)
    assert interval(draws[1] - draws[2]) == (0, 0)
    assert (bootstrap(independent[None], identities, 50, 1) == draws[0, :50]).all()  # draws depend on the seed only
    assert (bootstrap(independent[None], identities, 50, 2) != draws[0, :50]).any()


def test_the_hardest_pairs_and_their_contact_sheet(tmp_path):
    rng = np.random.default_rng(0)
    faces = rng.integers(0, 256, (60, 112, 96, 3), dtype=np.uint8)
    embeddings, pairs = random_pairs()
    pairs = pairs._replace(paths=[f"P/{'a very long name with $x^ ' * 3}{i}.jpg" for i in range(60)])
    scores = similarities(embeddings, pairs.pairs, np.zeros((1, 16)))[0]
    indices = hardest(scores, pairs.same, True, 7)
    assert len(indices) == 7 and pairs.same[indices].all() and (np.diff(scores[indices]) >= 0).all()
    assert scores[indices[-1]] <= np.delete(scores, indices)[np.delete(pairs.same, indices)].min()
    indices = hardest(scores, pairs.same, False, 7)
    assert not pairs.same[indices].any() and scores[indices[0]] == scores[~pairs.same].max()
    error_sheet(tmp_path / "errors.png", faces, pairs, scores, scores > 0.3)
    two = pairs._replace(pairs=pairs.pairs[:2], same=np.array([True, False]), folds=pairs.folds[:2])
    error_sheet(tmp_path / "two.png", faces, two, scores[:2], np.array([True, False]))
    large, small = read_image(tmp_path / "errors.png"), read_image(tmp_path / "two.png")
    assert large.shape[1] == small.shape[1] and large.shape[0] > small.shape[0] and large.std() > 20


def test_two_models_with_every_protocol(lfw, models, tmp_path, capsys):
    status, out, err = run_lfw_eval(capsys, "--model", models[0], "--model", models[1], "--lfw", lfw,
                                    "--aligned", "--flip", "none", "--protocol", "folds", "tar", "identification",
                                    "--far", 1e-3, 0.25, "--resamples", 200, "--output", tmp_path)
    assert status == 0, err
    results = json.loads((tmp_path / "results.json").read_text())
    accuracies = [float(a) for a in re.findall(r"^LFWACC=(\S+) std=", out, re.M)]
    assert accuracies == [round(result["accuracy"], 4) for result in results["models"]]
    for i, result in enumerate(results["models"]):
        folder = tmp_path / "ab"[i]    # a.pt and b.pt
        assert json.loads((folder / "results.json").read_text()) == result
        assert result["settings"]["model"] == str(models[i])
        low, high = result["interval_95"]
        assert low <= result["accuracy"] <= high and f"95 % interval       {low:.4f} to {high:.4f} (200" in out
        assert [(point["far"], point["resolved"]) for point in result["tar"]] == [(1e-3, False), (0.25, True)]
        identification = result["identification"]
        assert identification["gallery"] == PEOPLE
        assert identification["rank_1"] == pytest.approx(identification["cmc"][0], abs=1e-6)
        for picture in ("roc.png", "cmc.png", "histogram.png", "errors.png"):
            assert read_image(folder / picture).std() > 5
    assert out.count("too few to resolve this rate, which needs 1,000") == 2
    assert len(re.findall(r"^(TAR@FAR=1e-3|TAR@FAR=2.5e-1|rank 1 |rank 5 |gallery) ", out, re.M)) == 10
    comparison, = results["comparison"]
    first, second = (result["accuracy"] for result in results["models"])
    assert comparison["difference"] == pytest.approx(second - first)
    assert f"{models[1]} minus {models[0]}: accuracy {comparison['difference']:+.4f}, 95 % interval " in out
    low, high = comparison["interval_95"]
    assert low <= comparison["difference"] <= high
    assert (tmp_path / "roc.png").exists() and (tmp_path / "cmc.png").exists()


def test_titles_name_the_folders_of_several_models(lfw, models, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.pt").symlink_to(models[0])
    command = ("--lfw", lfw, "--aligned", "--flip", "none", "--resamples", 1, "--output", tmp_path / "out",
               "--model", tmp_path / "one/checkpoint.pt", "--model", tmp_path / "two")
    for options, expected in (((), {"one", "two"}), (("--title", "../a b", "--title", "../a b"), {"a-b", "a-b-2"})):
        assert run_lfw_eval(capsys, *command, *options)[0] == 0
        assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} >= expected
    status, _, err = run_lfw_eval(capsys, *command, "--title", "a")
    assert status == 2 and "--title was given 1 time for 2 models" in err


def test_identification_takes_all_images_of_people_with_two_or_more(lfw, models, tmp_path, capsys):
    for name in ("P1/P1_0009.png", "New/a.png", "New/b.png", "Once/a.png", "a.png"):    # in no pair
        write_image(tmp_path / "lfw" / name, draw_face(9, 9, 112)[0])
    for path in lfw.rglob("*.*"):
        (tmp_path / "lfw" / path.relative_to(lfw)).parent.mkdir(exist_ok=True)
        (tmp_path / "lfw" / path.relative_to(lfw)).symlink_to(path)
    for protocol, images, rows in (("identification", PEOPLE * PHOTOS + 3, "rank 1 .*rank 5 .*gallery +7 people, one "
                                    "image each; 14 probes"), ("folds", PEOPLE * PHOTOS, "TAR@FAR=1e-3 .* too few")):
        status, out, _ = run_lfw_eval(capsys, "--model", models[0], "--lfw", tmp_path / "lfw", "--aligned",
                                      "--protocol", protocol)
        assert status == 0 and re.search(rows, out, re.S) and f"images              {images}," in out


def test_a_single_protocol_and_a_bin_set(lfw, models, tmp_path, capsys):
    status, out, _ = run_lfw_eval(capsys, "--model", models[0], "--lfw", lfw, "--aligned", "--view", 1,
                                  "--protocol", "tar")
    assert status == 0 and "LFWACC" not in out and "TAR@FAR=1e-2" in out and "8 (4 genuine, 4 impostor)" in out
    pairs = read_pairs(lfw)
    images = [cv2.imencode(".png", read_image(lfw / path)[..., ::-1])[1].tobytes() for path in pairs.paths]
    (tmp_path / "own.bin").write_bytes(pickle.dumps(([images[i] for i in pairs.pairs.ravel()], pairs.same.tolist()), 2))
    options = ("--model", models[0], "--flip", "none", "--output")
    status, out, _ = run_lfw_eval(capsys, *options, tmp_path / "bin", "--lfw", tmp_path / "own.bin")
    assert status == 0 and "over 10 folds" in out and "the faces in own.bin are aligned" in out
    run_lfw_eval(capsys, *options, tmp_path / "folder", "--lfw", lfw, "--aligned")
    scores = {source: [float(line.split("\t")[4])
                       for line in (tmp_path / source / "scores.tsv").read_text().splitlines()[1:]]
              for source in ("bin", "folder")}
    np.testing.assert_allclose(scores["bin"], scores["folder"], atol=2e-6)


@pytest.mark.parametrize("options, message", [
    (("--net", "faceNet", "--net", "sphere20a"), "--net was given 2 times for 1 model"),
    (("--far", "0.1"), "pass --protocol folds tar"), (("--far", "0", "--protocol", "tar"), "above 0"),
    (("--resamples", "0"), "at least 1"),
    (("--protocol", "roc"), "invalid choice"), (("--view", "1", "--pairs", "pairs.txt"), "does not belong to view 1")])
def test_invalid_options_are_one_sentence_errors(lfw, models, capsys, options, message):
    status, _, err = run_lfw_eval(capsys, "--model", models[0], "--lfw", lfw, "--aligned", *options)
    assert status == 2 and message in err and "Traceback" not in err
