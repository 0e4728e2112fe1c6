"""compare.py: the similarity of two photos, the verdict, and its error rates."""
import itertools
import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from conftest import draw_face, run_lfw_eval, write_image
from helpers import call, write_model, write_photos

from cosFace.net import NETS
from faces.align import similarity_transform
from faces.files import InputError
from faces.images import read_image
from faces.training import checkpoint
from faces.verification.metrics import best_threshold
from faces.verification.threshold import choose_threshold
from faces.verification.weights import load_weights
from mtcnn.detector import Detector
from tools import compare
from tools.embedder import Embedder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "checkpoint.pt")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


def write_scores(path, similarity, same, **settings):
    """Write a scores.tsv and the results.json with these settings beside it; return the path of the former."""
    lines = [f"a.jpg\tb.jpg\t{int(s)}\t0\t{x:.6f}" for x, s in zip(similarity, same)]
    path.write_text("\n".join(["left\tright\tsame\tfold\tsimilarity", *lines, ""]))
    path.with_name("results.json").write_text(json.dumps({"settings": settings}))
    return path


@pytest.fixture
def scores(tmp_path):
    """Write scores of 300 genuine and 200 impostor pairs with many ties; return (path, similarities, same)."""
    random = np.random.default_rng(3)
    same = random.permutation(np.arange(500) < 300)
    similarity = np.round(random.normal(np.where(same, 0.5, 0.2), 0.15).clip(-1, 1), 2)
    return write_scores(tmp_path / "scores.tsv", similarity, same, model="a/checkpoint.pt", mirror="concatenate",
                        subtract_mean=False), similarity, same


def test_similarity_is_the_cosine_of_the_embeddings_of_both_crops(model, photos):
    net = NETS["faceNet"]()
    load_weights(net, model)
    detector = Detector(device="cpu")
    embedder = Embedder(model, "cpu")
    result = compare.compare(embedder, photos / "face.png", photos / "brighter.png")
    assert result.face_counts == (1, 1) and result.crops.shape == (2, 112, 96, 3)
    image = read_image(photos / "face.png")
    matrix = similarity_transform(detector.detect(image).landmarks[0])
    assert np.array_equal(result.crops[0], cv2.warpAffine(image, matrix, (96, 112)))
    x = torch.tensor((result.crops.astype(np.float32) - 127.5) / 128).permute(0, 3, 1, 2)
    with torch.no_grad():
        a, b = torch.cat((net.eval()(x), net(x.flip(3))), 1).double()
    assert result.similarity == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-5)
    assert result.similarity < 0.9999
    same = compare.compare(embedder, photos / "face.png", photos / "face.png")
    assert same.similarity == pytest.approx(1, abs=1e-6)


def test_error_counts_equal_a_naive_count(scores):
    path, similarity, same = scores
    read = compare.read_scores(path.parent)
    best = choose_threshold(read.similarity, read.same, "")
    for threshold in (0.31, 0.3, -1, 1, best.value):  # some pairs have a similarity of exactly 0.3
        accepted = sum(x > threshold for x, s in zip(similarity, same) if not s)
        rejected = sum(x <= threshold for x, s in zip(similarity, same) if s)
        chosen = choose_threshold(read.similarity, read.same, "", threshold)
        assert chosen == (threshold, accepted, 200, rejected, 300, "")
        assert best.accepted + best.rejected <= accepted + rejected


def test_the_command_prints_verdict_and_error_rates_and_draws_the_picture(model, photos, scores, tmp_path, capsys):
    path, similarity, same = scores
    pair = photos / "face.png", photos / "two.png"
    assert call(compare, *pair, "--model", model, "--scores", path, "--output", tmp_path / "out",
                "--device", "cpu") == 0
    out = capsys.readouterr().out
    threshold = best_threshold(similarity, same)
    accepted = int((similarity[~same] > threshold).sum())
    assert "same person: " in out and f"> threshold {threshold:.4f}" in out
    assert f"from {path} (a/checkpoint.pt), which does not say whether it is of this model:" in out
    assert f"{accepted / 200:8.3%}  {accepted} of 200 impostor pairs" in out
    assert "two.png: 2 faces" in out and "face.png: 2 faces" not in out
    assert read_image(tmp_path / "out" / "comparison.png").std() > 20


def test_the_command_runs_with_and_without_a_threshold(model, photos, capsys):
    pair = photos / "face.png", photos / "face.png", "--model", model, "--device", "cpu"
    assert call(compare, *pair, "--threshold", "1") == 0
    out = capsys.readouterr().out
    assert "different people: 1.0000 <= threshold 1.0000\nthe error rates at this threshold are unknown" in out
    assert call(compare, *pair) == 0
    assert "--save-threshold` once" in capsys.readouterr().out
    assert call(compare, *pair, "--threshold", "60") == 2


@pytest.fixture(scope="module")
def lfw(tmp_path_factory):
    """Return a folder of aligned faces, two each of four people, with two folds of pairs."""
    root = tmp_path_factory.mktemp("lfw")
    for person, photo in itertools.product(range(4), (1, 2)):
        write_image(root / f"P{person}" / f"P{person}_{photo:04d}.png", draw_face(person, photo, 112)[0])
    (root / "pairs.txt").write_text("2\t2\nP0\t1\t2\nP1\t1\t2\nP0\t1\tP1\t1\nP2\t1\tP3\t1\n"
                                    "P2\t1\t2\nP3\t1\t2\nP0\t2\tP2\t2\nP1\t2\tP3\t2\n")
    return root


def test_scores_and_thresholds_of_other_weights_are_refused(lfw, photos, tmp_path, capsys):
    model, other = write_model(tmp_path / "a/checkpoint.pt"), write_model(tmp_path / "b/checkpoint.pt", seed=1)
    for path in (model, other):
        status, _, err = run_lfw_eval(capsys, "--model", path.parent, "--lfw", lfw, "--aligned", "--save-threshold",
                                      "--output", path.parent / "lfw")
        assert status == 0, err
    command = photos / "face.png", photos / "two.png", "--device", "cpu", "--model"
    results = json.loads((tmp_path / "a/lfw/results.json").read_text())
    assert call(compare, *command, model) == 0
    from_file = capsys.readouterr().out
    assert "expected errors at this threshold, from 8 pairs of" in from_file and "of 4 genuine pairs" in from_file
    assert call(compare, *command, model.parent, "--scores", tmp_path / "a/lfw") == 0
    from_scores = capsys.readouterr().out
    assert from_file.splitlines()[:3] == from_scores.splitlines()[:3]
    assert results["settings"]["weights"]["fingerprint"] in (tmp_path / "a/checkpoint.pt.threshold.json").read_text()
    assert call(compare, *command, other, "--scores", tmp_path / "a/lfw") == 2
    assert "has the scores of another model" in capsys.readouterr().err
    shutil.copy(tmp_path / "a/checkpoint.pt.threshold.json", tmp_path / "b")
    assert call(compare, *command, other) == 2
    assert "belongs to other weights" in capsys.readouterr().err
    (tmp_path / "b/checkpoint.pt.threshold.json").write_text("[1]")
    assert call(compare, *command, other) == 2
    assert "threshold.json is damaged; delete it" in capsys.readouterr().err


def test_the_threshold_of_the_evaluation_during_training_is_used(photos, scores, tmp_path, capsys):
    torch.manual_seed(0)
    stored = {"value": 0.31, "accepted": 3, "impostor": 200, "rejected": 4, "genuine": 300,
              "source": "500 pairs of LFW", "step": 7}
    state = {"method": "CosFace", "net": "faceNet", "weights": NETS["faceNet"]().state_dict(), "step": 9}
    checkpoint.save(tmp_path / "checkpoint.pt", {**state, "threshold": stored})
    command = photos / "face.png", photos / "face.png", "--device", "cpu", "--model", tmp_path / "checkpoint.pt"
    assert call(compare, *command) == 0
    out = capsys.readouterr().out
    assert "same person: 1.0000 > threshold 0.3100\n" in out and "3 of 200 impostor pairs" in out
    assert "from 500 pairs of LFW, evaluated during training at step 7 (the weights are those of step 9):" in out
    assert call(compare, *command, "--scores", scores[0]) == 0 and "during training" not in capsys.readouterr().out
    assert call(compare, *command, "--threshold", "1") == 0 and "during training" not in capsys.readouterr().out
    checkpoint.save(tmp_path / "checkpoint.pt", {**state, "threshold": {**stored, "impostor": 0}})
    assert call(compare, *command) == 2 and "is damaged (its entry 'threshold'" in capsys.readouterr().err


def test_a_threshold_for_another_way_to_compare_is_not_saved(lfw, model, capsys):
    status, _, err = run_lfw_eval(capsys, "--model", model, "--lfw", lfw, "--aligned", "--save-threshold",
                                  "--mirror", "sum")
    assert status == 2 and "leave out --mirror" in err and [p.name for p in model.parent.iterdir()] == [model.name]


def test_a_photo_without_a_face_is_refused(model, photos, capsys):
    pair = photos / "face.png", photos / "coffee.png"
    assert call(compare, *pair, "--model", model, "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert "no face was found" in error and "coffee.png" in error and "face.png" not in error


def test_the_scores_of_300000_pairs_are_read(tmp_path):
    path = tmp_path / "scores.tsv"
    rows = "".join(f"{'left/' * 7}{i}.jpg\t{'right/' * 6}{i}.jpg\t{i % 2}\t{i % 2 / 2}\n" for i in range(300_000))
    path.write_text("first\tsecond\tsame\tsimilarity\n" + rows)
    scores = compare.read_scores(path)
    assert (scores.same == (np.arange(300_000) % 2)).all() and (scores.similarity == scores.same / 2).all()


@pytest.mark.parametrize("text, settings, message", [
    ("left\tright\na.jpg\tb.jpg\n", {}, "is not a scores.tsv"),
    ("same\tsimilarity\n1\tx\n0\t0.1\n", {}, "is not a scores.tsv"),
    ("same\tsimilarity\n" + "1\t" * 10**6, {}, "genuine and impostor pairs"),    # a line of a million values
    ("same\tsimilarity\n1\t0.3\n", {}, "genuine and impostor pairs"),
    ("same\tsimilarity\n1\t0.3\n0\t0.1\n", {"mirror": "none"}, "--mirror"),
    ("same\tsimilarity\n1\t0.3\n0\t0.1\n", {"subtract_mean": True}, "--subtract-mean"),
])
def test_unsuitable_scores_are_refused(tmp_path, text, settings, message):
    path = write_scores(tmp_path / "scores.tsv", [], [], **settings)
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        compare.read_scores(path)
    with pytest.raises(InputError, match="can't read"):
        compare.read_scores(tmp_path / "absent" / "scores.tsv")
