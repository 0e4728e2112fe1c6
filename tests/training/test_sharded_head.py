"""Class centers over 2 and 3 processes: loss, gradients, labels and checkpoints equal those of one process."""
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_model, options, torchrun
from torch import distributed, multiprocessing, nn

from cosFace.net import CosFace
from faces.files import InputError
from faces.training.checkpoint import Checkpoints
from faces.training.log import geometry
from faces.training.run import data_parallel, unwrap
from faces.training.sharded_head import SGD, ShardedHead, WholeHead, bounds, make_head
from sphereFace.net import SphereFace, SphereFaceR

CLASSES = 7                             # over 2 processes 3 and 4, over 3 processes 2, 2 and 3
LABEL = torch.tensor([0, 6, 3, 3, 2, 5])
# the method's head for a number of classes, and the margin's arguments of a step
METHODS = {"cosFace": (partial(CosFace, s=64.0, m=0.35), {"ramp": 1.0}),
           "sphereFace": (partial(SphereFace, m=4), {"lam": 2.0}),
           "sphereFaceR": (partial(SphereFaceR, s=30.0, m=1.5), {"lam": 0.0})}


def batch(step=0):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 512, generator=generator), LABEL.roll(step)


def make_run(rank=0, world_size=1):
    return SimpleNamespace(rank=rank, world_size=world_size, is_main_process=rank == 0, device=torch.device("cpu"),
                           print=lambda *_: None)


def share(tensor, run):
    """This process's rows of the batch."""
    count = len(tensor) // run.world_size
    return tensor[run.rank * count:(run.rank + 1) * count]


def one_step(head, run, margin):
    """Loss, labels and gradients of a batch, and its geometry, as this process has them."""
    x, label = batch()
    x = share(7 * x, run).requires_grad_()
    loss, predicted = head(x, share(label, run), step=0, **margin)
    loss.backward()
    return {"loss": loss.detach(), "predicted": predicted, "x": x.grad, "weight": head.module.weight.grad,
            "geometry": geometry(*head.gather(x, share(label, run)))}


class Training:
    """A linear net, its head and their optimizer, as casia_train.py has them."""

    def __init__(self, run, folder, classes, sample=None, shard=True):
        torch.manual_seed(0)
        net = nn.Linear(512, 512)
        self.run, self.net = run, data_parallel(net, torch.zeros(2, 512)) if run.world_size > 1 else net
        self.head = make_head(partial(CosFace, s=16.0), classes, run, shard, sample)
        self.optimizer = SGD([*self.net.parameters(), *self.head.parameters()], self.head, lr=0.1, momentum=0.9,
                             weight_decay=5e-4)
        faces = SimpleNamespace(classes=classes, fingerprint="the same")
        self.checkpoints = Checkpoints(run, folder, self.net, self.head, self.optimizer, faces, {"net": "linear"})

    def steps(self, *steps):
        """Train these steps; return the last loss and the rows that its step drew."""
        for step in steps:
            x, label = batch(step)
            loss, _ = self.head(self.net(share(x, self.run)), share(label, self.run), step=step)
            drawn = None if self.head.sampled is None else self.head.sampled[0]
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return loss.detach(), drawn

    @property
    def weight(self):
        return self.head.module.weight

    def state(self):
        """Copies of the net's weight, the own centers and their momentum."""
        momentum = self.optimizer.state[self.weight]["momentum_buffer"]
        return [tensor.detach().clone() for tensor in (unwrap(self.net).weight, self.weight, momentum)]


def process(rank, folder):
    """Each of three processes; two of them begin, and write the checkpoint that all three go on with."""
    torch.set_num_threads(1)
    for world in (2, 3):
        if rank < world:
            examine(rank, world, folder)


def examine(rank, world, folder):
    """What each of `world` processes does; it leaves its findings in a file."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    run, found = make_run(rank, world), {}
    for name, (method, margin) in METHODS.items():
        torch.manual_seed(0)
        found[name] = one_step(ShardedHead(method, CLASSES, rank, world), run, margin)

    training = Training(run, folder / "exact", CLASSES)
    if world == 2:
        training.steps(0, 1)
        training.checkpoints.save(2)
    else:
        training.checkpoints.restore(resume=True)
    found["loss"], _ = training.steps(2)
    found["trained"] = training.state()

    training = Training(run, folder / f"sampled{world}", 40, sample=0.3)
    found["sampled"] = [(*training.steps(step), training.weight.detach().clone()) for step in range(2)]
    training.checkpoints.save(2)
    training.steps(2, 3)
    again = Training(run, folder / f"sampled{world}", 40, sample=0.3)
    again.checkpoints.restore(resume=True)
    again.steps(2, 3)
    found["resumed exactly"] = all(map(torch.equal, training.state(), again.state()))
    torch.save(found, folder / f"{world}-{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shard")
    for name in ("exact", "sampled2", "sampled3"):
        (path / name).mkdir()
    multiprocessing.spawn(process, (path,), 3)
    return path


def found(folder, world):
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world", [2, 3])
def test_loss_and_gradients_equal_those_of_one_process(folder, method, world):
    head, margin = METHODS[method]
    torch.manual_seed(0)
    expected = one_step(WholeHead(head(CLASSES)), make_run(), margin)
    parts = [part[method] for part in found(folder, world)]
    assert [len(part["weight"]) for part in parts] == ([3, 4] if world == 2 else [2, 2, 3])
    for part in parts:
        torch.testing.assert_close(part["loss"], expected["loss"], atol=1e-5, rtol=1e-5)
        for name, value in expected["geometry"].items():
            torch.testing.assert_close(part["geometry"][name], value, atol=1e-6, rtol=1e-5)
    together = {name: torch.cat([part[name] for part in parts]) for name in ("x", "weight", "predicted")}
    assert together["predicted"].tolist() == expected["predicted"].tolist()
    torch.testing.assert_close(together["weight"], expected["weight"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together["x"] / world, expected["x"], atol=1e-5, rtol=1e-5)   # DDP divides by world


@pytest.mark.parametrize("shard", [False, True], ids=["whole head", "sharded head"])
def test_a_checkpoint_of_two_processes_resumes_on_one_and_on_three(folder, shard):
    never_saved = Training(make_run(), folder / "never", CLASSES, shard=False)
    expected_loss, _ = never_saved.steps(0, 1, 2)
    expected = never_saved.state()
    one = Training(make_run(), folder / "exact", CLASSES, shard=shard)
    assert one.checkpoints.restore(resume=True) == 2
    loss, _ = one.steps(2)
    for got, want in zip((loss, *one.state()), (expected_loss, *expected)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for world in (2, 3):
        parts = found(folder, world)
        for rank, part in enumerate(parts):
            own = slice(*bounds(CLASSES, rank, world))
            for got, want in zip((part["loss"], *part["trained"]),
                                 (expected_loss, expected[0], expected[1][own], expected[2][own])):
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("world", [2, 3])
def test_sampled_softmax_equals_a_head_of_the_sampled_centers(folder, world):
    """Against a head of the drawn centers alone, whose others stand still."""
    parts = [part["sampled"] for part in found(folder, world)]
    reference = Training(make_run(), folder / "never", 40, shard=False)
    momentum = torch.zeros(40, 512)
    for step in range(2):
        x, label = batch(step)
        rows = torch.cat([bounds(40, rank, world)[0] + part[step][1] for rank, part in enumerate(parts)])
        sizes = [bounds(40, rank, world)[1] - bounds(40, rank, world)[0] for rank in range(world)]
        assert [len(part[step][1]) for part in parts] == [max(6, math.ceil(0.3 * size)) for size in sizes]
        assert set(label.tolist()) < set(rows.tolist()) and rows.tolist() == sorted(set(rows.tolist()))
        before = reference.weight.detach().clone()
        reference.weight.data = before[rows]
        column = (rows == label[:, None]).int().argmax(1)
        loss, _ = reference.head(reference.net(x), column, step=step)
        reference.optimizer.zero_grad()
        loss.backward()
        momentum[rows] = 0.9 * momentum[rows] + reference.weight.grad + 5e-4 * before[rows]
        before[rows] -= 0.1 * momentum[rows]
        reference.weight.grad = None
        reference.optimizer.step()                                   # the net's part
        reference.weight.data = before
        for part in parts:
            torch.testing.assert_close(part[step][0], loss.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.cat([part[step][2] for part in parts]), before, atol=1e-5, rtol=1e-5)
    assert parts[0][0][1].tolist() != parts[0][1][1].tolist()        # every step draws anew
    assert all(part["resumed exactly"] for part in found(folder, world))


def test_more_processes_than_identities_is_an_error():
    with pytest.raises(InputError, match="2 identities can't be spread over 3 processes"):
        ShardedHead(CosFace, 2, rank=0, world_size=3)


def test_training_with_a_sharded_head_equals_one_process(main, casia, tmp_path):
    args = [*options(casia, tmp_path), "--net", "sphere20a", "--epochs", "0.34", "--no-mirror"]
    assert main("sphereFace", *args[:5], tmp_path / "one", *args[6:])[0] == 0
    double = torchrun("sphereFace", *args, "--shard-head", "--accumulate", "2")
    assert double.returncode == 0, double.stderr
    one, two = assert_same_model(tmp_path / "one", tmp_path / "run")
    assert one["step"] == two["step"] == 2 and two["head"]["weight"].shape == (6, 512)


def test_each_training_step_samples_its_own_centers(main, casia, tmp_path, monkeypatch):
    steps, draw = [], ShardedHead._draw
    monkeypatch.setattr(ShardedHead, "_draw", lambda head, label, step: steps.append(step) or draw(head, label, step))
    args = [*options(casia, tmp_path), "--net", "sphere20a", "--epochs", "0.34", "--sample-centers"]
    assert main("cosFace", *args, "0")[0] == 2
    assert main("cosFace", *args, "0.5")[0] == 0 and steps == [0, 1]
    assert main("cosFace", *args, "0.6", "--resume")[0] == 2         # another fraction is another training
