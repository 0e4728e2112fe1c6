"""The programs in benchmarks/ with the smallest settings; each compares ours with its peer and fails if they differ."""
import re

import numpy as np
import pytest
from conftest import ROOT
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity

from benchmarks import loader, recipes, throughput, training_step


@pytest.mark.parametrize("method", ["cosFace", "sphereFace"])
def test_training_step_agrees_with_plain_pytorch(method, capsys):
    assert not training_step.main(["--method", method, "--batch-size", "4", "--turns", "1", "--identities", "20",
                                   "--device", "cpu", "--precision", "float32"])
    assert "plain loop" in capsys.readouterr().out


def test_another_loss_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr(training_step, "MARGIN", 0.3)
    monkeypatch.setitem(training_step.HEADS, "cosFace", (training_step.cosFace.net.CosFace, 1.0))
    with pytest.raises(SystemExit):
        training_step.main(["--batch-size", "4", "--identities", "20", "--device", "cpu", "--precision", "float32"])
    assert "the loss of ours and the peer differ" in capsys.readouterr().err


def test_loader_delivers_the_batches_of_a_data_loader():
    assert not loader.main(["--faces", "40", "--batch-size", "16", "--steps", "5", "--turns", "1"])


def test_throughput_runs(monkeypatch, capsys):
    monkeypatch.setattr(throughput, "FACES", 20)
    assert not throughput.main(["--batch-size", "2", "4", "--steps", "1", "--warm-up", "0", "--net", "sphere20a",
                                "--identities", "20", "--device", "cpu"])
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_make_benchmarks_runs_every_program():
    programs = {path.name for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__.py", "turns.py"}
    listed = re.findall(r"^\s+bench (\S+\.py)", (ROOT / "Makefile").read_text(), re.M)
    assert set(listed) == programs - {"recipes.py"}    # it takes hours


def test_the_auc_of_recipes_counts_a_pair_as_often_as_its_people(tmp_path):
    x, people, count = np.random.default_rng(0).normal(size=(12, 3)), np.repeat(np.arange(4), 3), np.array((1, 0, 3, 2))
    np.save(tmp_path / "embeddings.npy", x)
    left, right = np.triu_indices(12, 1)
    same, similarity = people[left] == people[right], cosine_similarity(x)[left, right]
    weight = count[people[left]] * np.where(same, 1, count[people[right]])
    expected = roc_auc_score(same, similarity), roc_auc_score(same, similarity, sample_weight=weight)
    assert recipes.draws_of_auc(tmp_path, people, np.stack((np.ones(4), count))) == pytest.approx(expected)
