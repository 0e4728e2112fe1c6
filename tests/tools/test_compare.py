"""compare.py: the similarity of two photos, the verdict, and its error rates."""
import json

import cv2
import numpy as np
import pytest
import torch
from helpers import call, write_model, write_photos

from cosFace.net import NETS
from faces.align import similarity_transform
from faces.files import InputError
from faces.images import read_image
from faces.verification.metrics import best_threshold
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
    read = compare.read_scores(path)
    best = best_threshold(read.similarity, read.same)
    for threshold in (0.31, 0.3, -1, 1, best):  # some pairs have a similarity of exactly 0.3
        accepted = sum(x > threshold for x, s in zip(similarity, same) if not s)
        rejected = sum(x <= threshold for x, s in zip(similarity, same) if s)
        assert read.error_counts(threshold) == (accepted, 200, rejected, 300)
    errors = [sum(read.error_counts(t)[0::2]) for t in (best, *np.unique(similarity))]
    assert errors[0] == min(errors)


def test_the_command_prints_verdict_and_error_rates_and_draws_the_picture(model, photos, scores, tmp_path, capsys):
    path, similarity, same = scores
    pair = photos / "face.png", photos / "two.png"
    assert call(compare, *pair, "--model", model, "--scores", path, "--output", tmp_path / "out",
                "--device", "cpu") == 0
    out = capsys.readouterr().out
    threshold = best_threshold(similarity, same)
    accepted = int((similarity[~same] > threshold).sum())
    assert "same person: " in out and f"> threshold {threshold:.4f}" in out
    assert f"from {path} (a/checkpoint.pt):" in out
    assert f"{accepted / 200:8.3%}  {accepted} of 200 impostor pairs" in out
    assert "two.png: 2 faces" in out and "face.png: 2 faces" not in out
    assert read_image(tmp_path / "out" / "comparison.png").std() > 20


def test_the_command_runs_with_and_without_a_threshold(model, photos, capsys):
    pair = photos / "face.png", photos / "face.png", "--model", model, "--device", "cpu"
    assert call(compare, *pair, "--threshold", "1") == 0
    out = capsys.readouterr().out
    assert "different people: 1.0000 <= threshold 1.0000\nthe error rates at this threshold are unknown" in out
    assert call(compare, *pair) == 0
    assert "run lfw_eval.py with this model" in capsys.readouterr().out
    assert call(compare, *pair, "--threshold", "60") == 2


def test_a_photo_without_a_face_is_refused(model, photos, capsys):
    pair = photos / "face.png", photos / "coffee.png"
    assert call(compare, *pair, "--model", model, "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert "no face was found" in error and "coffee.png" in error and "face.png" not in error


@pytest.mark.parametrize("text, settings, message", [
    ("left\tright\na.jpg\tb.jpg\n", {}, "is not a scores.tsv"),
    ("same\tsimilarity\n1\tx\n0\t0.1\n", {}, "is not a scores.tsv"),
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
