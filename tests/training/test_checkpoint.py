"""Full disks, compiling, and float16. A tiny network makes the steps fast."""
import pytest
import torch
from conftest import checkpoint, file_size_limit, options, saved_step, tensors
from torch import nn

from cosFace import casia_train
from faces.training import distributed
from faces.training.checkpoint import Checkpoints
from faces.training.distributed import should_compile


def test_a_full_disk_keeps_the_last_checkpoint_and_training_continues(tiny, main, casia, tmp_path, monkeypatch):
    """Writes fail from step 5 to step 8, as on a full disk on which someone then frees space."""
    write, saved_steps = Checkpoints._write, {}

    def write_with_limit(checkpoints, state, last):
        with file_size_limit(50_000 if 5 <= state["step"] <= 8 else 10**9):
            write(checkpoints, state, last)
        saved_steps[state["step"]] = saved_step(tmp_path / "run")
    monkeypatch.setattr(Checkpoints, "_write", write_with_limit)
    status, _, err = main("cosFace", *options(casia, tmp_path))
    assert status == 0 and saved_steps == {i: 4 if 5 <= i <= 8 else i for i in range(1, 13)}
    assert "step 6: can't write" in err and "Training continues; the checkpoint of step 4 is kept." in err
    assert not list((tmp_path / "run").glob(".*.partial"))


def test_a_run_fails_if_the_disk_stays_full(tiny, main, refusal, casia, tmp_path):
    short = "--epochs", "0.4"
    assert main("cosFace", *options(casia, tmp_path), *short)[0] == 0    # builds the cache, which is too large as well
    with file_size_limit(50_000):
        error = refusal(casia_train, *options(casia, tmp_path, "full"), *short)
    assert "The last steps are lost; no earlier checkpoint exists." in error


def test_compile_without_a_compiler_prints_one_sentence_and_continues(tiny, main, casia, tmp_path, monkeypatch):
    def fail(net, **_):
        raise RuntimeError("no C++ compiler\nand a long story")
    monkeypatch.setattr(nn.Module, "compile", fail)
    status, out, _ = main("cosFace", *options(casia, tmp_path), "--compile")
    assert status == 0 and "torch.compile does not work here (no C++ compiler); training continues" in out


@pytest.mark.parametrize("first, second, expected", [([], ["--compile"], [True, True]),
                                                     (["--no-compile"], [], [False, False])])
def test_long_runs_on_cuda_are_compiled(tiny, main, casia, tmp_path, monkeypatch, first, second, expected):
    """The first run has 96 images, which count as many here, and the second adds 48."""
    compiled = []
    monkeypatch.setattr(distributed, "WORTH_COMPILING", 96)
    monkeypatch.setattr(casia_train, "should_compile", lambda _, images: should_compile(torch.device("cuda"), images))
    monkeypatch.setattr(casia_train, "compile_net", lambda *_: compiled.append(True))
    monkeypatch.setattr(casia_train, "for_training", lambda *_: compiled.append(False))
    assert main("cosFace", *options(casia, tmp_path), *first)[0] == 0
    assert main("cosFace", *options(casia, tmp_path), "--epochs", "3", "--resume", *second)[0] == 0
    assert compiled == expected and not should_compile(torch.device("cpu"), 10**9)


def test_fp16_scales_the_loss_and_skips_steps_that_overflow(tiny, main, casia, tmp_path, monkeypatch):
    """The first scale, 65536, overflows in this network; after it was halved often enough, it learns."""
    args = [*options(casia, tmp_path), "--precision", "fp16", "--scale", "30", "--epochs", "4", "--lr", "0.1"]
    scales, update = [], torch.amp.GradScaler.update

    def update_and_note(scaler):
        update(scaler)
        scales.append(scaler.get_scale())
    monkeypatch.setattr(torch.amp.GradScaler, "update", update_and_note)
    assert main("cosFace", *args)[0] == 0
    state = checkpoint(tmp_path / "run")
    assert state["scaler"]["scale"] == scales[-1] and state["settings"]["precision"] == "fp16"
    assert scales[0] == 32768 and scales[-1] == scales[-2]
    assert all(torch.isfinite(tensor).all() for tensor in tensors(state).values())
