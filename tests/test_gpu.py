"""Tests on an NVIDIA GPU: it computes what the CPU computes, and training, resuming and detection run on it."""
import numpy as np
import pytest
import torch
from conftest import checkpoint, epochs, free_port, options, perturb, write_image
from skimage import data as skimage_data
from torch import distributed

from cosFace import casia_train
from cosFace.net import NETS, faceNet
from faces.training.distributed import Processes
from faces.verification.embed import embed
from faces.verification.weights import load_net
from mtcnn.detector import Detector
from mtcnn.search import search

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")


@gpu
@pytest.mark.parametrize("method", ["cosFace", "sphereFace"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "float32"])
def test_training_runs_and_resumes(main, casia, tmp_path, method, precision):
    args = [*options(casia, tmp_path), "--device", "cuda", "--precision", precision]
    status, out, _ = main(method, *args)
    assert status == 0 and f"{precision}) on {torch.cuda.get_device_name()}" in out
    status, out, _ = main(method, *args, "--resume", "--epochs", "3")
    assert status == 0 and "training is complete after 18 steps" in out
    net, _ = load_net(tmp_path / "run/checkpoint.pt", NETS)
    assert all(weights.isfinite().all() for weights in net.state_dict().values())


class One(int):
    """The number 1, but more than 1: a group of one process is joined, and communicates."""

    def __gt__(self, other):
        return other <= 1


class OneOfOne(Processes):
    world_size = property(lambda self: One(1), lambda self, value: None)


@pytest.mark.parametrize("device, precision", [("cpu", "float32"), *(pytest.param("cuda", p, marks=gpu)
                                                                     for p in ("float32", "bf16", "fp16"))])
def test_a_group_of_one_process_trains_as_a_process_without_a_group(tiny, main, casia, tmp_path, monkeypatch, device,
                                                                    precision):
    """On a GPU, the group is NCCL's: DistributedDataParallel, the loss scale and the sharded head communicate."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    args = ["--device", device, "--precision", precision, "--shard-head"]
    assert main("cosFace", *options(casia, tmp_path, "alone"), *args)[0] == 0
    monkeypatch.setattr(casia_train, "Processes", OneOfOne)
    try:
        status, out, err = main("cosFace", *options(casia, tmp_path, "group"), *args)
        assert status == 0 and "on 1 x " in out, err
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    alone, group = ([epoch["loss"] for epoch in epochs(tmp_path / name)] for name in ("alone", "group"))
    assert alone == pytest.approx(group, rel=1e-5 if device == "cpu" else 0.02)


@gpu
def test_three_float32_steps_equal_those_of_the_cpu(main, casia, tmp_path):
    """Biases start at zero, so what they are after three steps is the sum of the updates."""
    def biases(device):
        status, *_ = main("cosFace", *options(casia, tmp_path, device), "--device", device, "--net", "sphere20a",
                         "--epochs", "0.5")
        assert status == 0
        weights = checkpoint(tmp_path / device)["weights"]
        return {name: tensor for name, tensor in weights.items() if name.endswith(".bias")}
    cpu, cuda = biases("cpu"), biases("cuda")
    assert len(cpu) == len(cuda) == 5
    for name, update in cpu.items():
        assert (update - cuda[name]).norm() < 0.05 * update.norm(), name    # convolutions use TF32


@gpu
def test_embeddings_equal_those_of_the_cpu():
    faces = np.random.default_rng(0).integers(0, 256, (40, 112, 96, 3), np.uint8)
    net = faceNet()
    perturb(net)
    cpu, cuda = (torch.from_numpy(embed(net, faces, torch.device(name), progress=False)) for name in ("cpu", "cuda"))
    assert torch.cosine_similarity(cpu, cuda).min() > 1 - 1e-6
    assert (cpu - cuda).abs().max() < 1e-4 * cpu.abs().max()


@gpu
def test_mtcnn_finds_what_it_finds_on_the_cpu(tmp_path):
    photo = skimage_data.astronaut()
    write_image(tmp_path / "photo.png", photo)
    images = [photo, photo[::-1], photo[:, ::-1]]
    for one, two in zip(Detector(device="cpu").detect(images), Detector(device="cuda").detect(images)):
        assert len(one.boxes) == len(two.boxes)
        assert np.abs(one.landmarks - two.landmarks).max(initial=0) < 0.05    # pixels
    listed = search(tmp_path, [(i, "photo.png") for i in range(40)], Detector(device="cuda"), workers=2)
    assert all((rows["attempt"] == 0).all() for rows, _ in listed)
