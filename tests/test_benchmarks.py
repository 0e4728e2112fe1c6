"""The programs in benchmarks/ with the smallest settings; each compares ours with its peer and fails if they differ."""
import numpy as np
import pytest
import torch
from conftest import ROOT

from benchmarks import loader, mtcnn, run, throughput, training_step, turns
from faces.files import InputError


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
    with pytest.raises(InputError):
        turns.check_same("it", torch.ones(2), torch.tensor((1.0, float("nan"))), 0.1)


def test_loader_delivers_the_batches_of_a_data_loader():
    assert not loader.main(["--faces", "40", "--batch-size", "16", "--steps", "5", "--turns", "1"])


def test_throughput_runs(monkeypatch, capsys):
    monkeypatch.setattr(throughput, "FACES", 20)
    assert not throughput.main(["--batch-size", "2", "4", "--steps", "1", "--warm-up", "0", "--net", "sphere20a",
                                "--identities", "20", "--device", "cpu"])
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_detectors_agree_on_the_face_nearest_the_center():
    box, points = np.array(((10.0, 10, 30, 30), (60, 60, 90, 90))), np.arange(20.0).reshape(2, 5, 2)
    moved = points + np.array((0, 0.5 * 8 ** 0.5))    # by half the distance between the eyes
    same, distance = mtcnn.agreement([(box, points)] * 2, [(box[:1] + 1, moved), (box[1:], points[1:])], [(20, 20)] * 2)
    assert same == 0.5 and distance == pytest.approx(0.5)


def test_make_benchmarks_runs_every_program_and_says_which(monkeypatch, capsys):
    programs = {path.name for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__.py", "run.py", "turns.py"}
    assert {line.split()[0] for line in run.BENCHMARKS} == programs
    monkeypatch.setattr(run, "BENCHMARKS", ("loader.py --faces 0", "mtcnn.py --lfw LFW"))
    assert run.main([]) == 1
    out = capsys.readouterr().out
    assert "loader.py --faces 0: failed with exit status 2" in out and "LFW: skipped, because it needs LFW=DIR" in out
