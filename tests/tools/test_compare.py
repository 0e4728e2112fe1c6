"""compare.py: the similarity of two photos, the verdict, and its error rates."""
import json
import shutil

import numpy as np
import pytest
from conftest import run_lfw_eval, write_lfw, write_model

from faces.files import InputError
from faces.images import read_image
from faces.verification.metrics import best_threshold
from tools import compare
from tools.embedder import Embedder


def test_similarity_is_the_cosine_of_the_embeddings_of_both_crops(model, photos):
    embedder = Embedder(model, "cpu")
    result = compare.compare(embedder, photos / "face.png", photos / "brighter.png")
    a, b = embedder(photos / "face.png"), embedder(photos / "brighter.png")
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert result.face_counts == (1, 1) and abs(result.similarity - expected) < 1e-4


def test_the_command_prints_verdict_and_error_rates_and_draws_the_picture(model, photos, tmp_path, call):
    same, path = np.arange(500) < 300, tmp_path / "scores.tsv"
    similarity = np.random.default_rng(3).normal(np.where(same, 0.5, 0.2), 0.15).clip(-1, 1).round(2)    # many ties
    path.write_text("same\tsimilarity\n" + "".join(f"{int(s)}\t{x:.6f}\n" for x, s in zip(similarity, same)))
    status, out, _ = call(compare, photos / "face.png", photos / "two.png", "--model", model, "--scores", path,
                          "--output", tmp_path / "out", "--device", "cpu")
    threshold = best_threshold(similarity, same)
    accepted = int((similarity[~same] > threshold).sum())
    assert status == 0 and "same person: " in out and f"> threshold {threshold:.4f}" in out
    assert f"false accept  {accepted / 200:8.3%}  {accepted} of 200 impostor pairs" in out
    assert "two.png: 2 faces" in out and "face.png: 2 faces" not in out
    assert read_image(tmp_path / "out" / "comparison.png").std() > 20


def test_the_command_runs_with_and_without_a_threshold(model, photos, call, refusal):
    pair = photos / "face.png", photos / "two.png", "--model", model, "--device", "cpu"
    out = call(compare, *pair, "--threshold", "1")[1]
    assert "<= threshold 1.0000\nthe error rates at this threshold are unknown" in out
    assert "--save-threshold` once" in call(compare, *pair)[1]
    assert "--threshold" in refusal(compare, *pair, "--threshold", "60")
    assert "coffee.png: no face was found" in refusal(compare, photos / "coffee.png", *pair[1:])


def test_thresholds_of_an_evaluation_are_used_but_not_for_other_weights(photos, tmp_path, capsys, call, refusal):
    write_lfw(tmp_path / "lfw", size=112)
    model, other = write_model(tmp_path / "a/checkpoint.pt"), write_model(tmp_path / "b/checkpoint.pt", seed=1)
    assert run_lfw_eval(capsys, "--model", model.parent, "--lfw", tmp_path / "lfw", "--aligned", "--save-threshold",
                        "--output", tmp_path / "result")[0] == 0
    command = photos / "face.png", photos / "two.png", "--device", "cpu", "--model"
    saved = call(compare, *command, model)[1]
    assert "expected errors at this threshold, from 4 pairs of" in saved and "of 2 genuine pairs" in saved
    from_scores = call(compare, *command, model.parent, "--scores", tmp_path / "result")[1]
    assert saved.splitlines()[:3] == from_scores.splitlines()[:3]
    assert "has the scores of another model" in refusal(compare, *command, other, "--scores", tmp_path / "result")
    shutil.copy(tmp_path / "a/checkpoint.pt.threshold.json", tmp_path / "b")
    assert "belongs to other weights" in refusal(compare, *command, other)
    (tmp_path / "b/checkpoint.pt.threshold.json").write_text('{"value": -1}')    # by hand
    assert "threshold -1.0000\nthe error rates at this threshold are unknown" in call(compare, *command, other)[1]
    (tmp_path / "b/checkpoint.pt.threshold.json").write_text("[1]")
    assert "damaged or not a JSON file" in refusal(compare, *command, other)


def test_unsuitable_scores_are_refused(tmp_path):
    for text, flip, message in (("1\tx\n0\t0\n", "concatenate", "not a scores.tsv"),
                                ("1\t0\n", "concatenate", "genuine and impostor"), ("1\t0\n0\t0\n", "none", "--flip")):
        (tmp_path / "scores.tsv").write_text(f"same\tsimilarity\n{text}")
        (tmp_path / "results.json").write_text(json.dumps({"settings": {"flip": flip}}))
        with pytest.raises(InputError, match=message):
            compare.read_scores(tmp_path)
