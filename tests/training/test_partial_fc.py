"""Class centers spread over 2 and 3 processes: results and checkpoints equal one process's."""
import copy
import math
import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import free_port, options
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from cosFace.net import CosFace
from faces.files import InputError
from faces.training.distributed import Processes
from faces.training.partial_fc import PartialFC, bounds, convert

CLASSES = 7    # two processes hold 3 and 4 centers, three processes hold 2, 2 and 3
LABEL = torch.tensor([0, 6, 3, 3, 2, 5])
ONE = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))


def batch(step=0):
    """Return the batch of a step: embeddings or inputs of the network, float (6, 512), and labels, int64 (6,)."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 512, generator=generator), LABEL.roll(step)


def share(tensor, run):
    """Return this process's rows of a tensor that holds the whole batch."""
    count = len(tensor) // run.world_size
    return tensor[run.rank * count:(run.rank + 1) * count]


class Training:
    """A training run set up as in casia_train.py, with a linear layer as the network; see PartialFC for `sample`."""

    def __init__(self, run, classes, sample=None, shard=True):
        torch.manual_seed(0)
        self.run, self.shard = run, shard
        self.net = net = nn.Linear(512, 512)
        self.model = DistributedDataParallel(net) if run.world_size > 1 else net
        self.model(torch.zeros(2, 512)).sum().backward()    # as data_parallel() does, for equal rounding from now on
        net.zero_grad()
        make = partial(CosFace, s=16.0)
        self.head = PartialFC(make, classes, run, sample) if shard else make(classes)
        rest = [] if shard else [self.head.weight]
        self.optimizer = torch.optim.SGD([{"params": [net.bias], "weight_decay": 0.0}, {"params": [net.weight, *rest]}],
                                         lr=0.1, momentum=0.9, weight_decay=5e-4)

    def train(self, *steps):
        """Train the given steps; return of the last one the loss, the predicted labels of this process's share, and the
        rows of the centers that were sampled, or None."""
        for step in steps:
            x, label = batch(step)
            loss, predicted = self.head(self.model(share(x, self.run)), share(label, self.run))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.shard:
                self.head.update(0.1, torch.amp.GradScaler("cpu", enabled=False))
        return loss.detach(), predicted, self.head.drawn if self.shard else None

    def save(self):
        """Return a checkpoint; in rank 0, it has all centers."""
        return copy.deepcopy({"step": 2, "head": self.head.state_dict(), "optimizer": self.optimizer.state_dict(),
                              "net": self.net.state_dict()})

    def load(self, state):
        if self.run.rank == 0:
            state = convert(state, self.shard)
        self.net.load_state_dict(state["net"])
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])

    def state(self):
        """Return the network's weight, this process's centers and their momentum."""
        if self.shard:
            return [t.detach().clone() for t in (self.net.weight, self.head.loss.weight, self.head.velocity)]
        momentum = self.optimizer.state[self.head.weight]["momentum_buffer"]
        return [t.detach().clone() for t in (self.net.weight, self.head.weight, momentum)]


def run_process(rank, folder, ports):
    """Run one of three processes: the first two write a checkpoint, from which all three continue."""
    torch.set_num_threads(1)
    for world_size, port in zip((2, 3), ports):
        if rank < world_size:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                              MASTER_ADDR="localhost", MASTER_PORT=str(port))
            train_and_save_results(rank, world_size, folder)


def train_and_save_results(rank, world_size, folder):
    """Train as one of `world_size` processes, and save the results for load_results()."""
    run, results = Processes("cpu"), {}
    training = Training(run, CLASSES)
    if world_size == 2:
        training.train(0, 1)
        state = training.save()
        if rank == 0:
            torch.save(state, folder / "exact.pt")
    else:
        state = run.on_main(torch.load, folder / "exact.pt")
        training.load(state if rank == 0 else {**convert(state, True), "head": {"step": 2}})
    results["loss"], results["predicted"], _ = training.train(2)
    results["state"] = training.state()

    training = Training(run, 40, sample=0.3)
    results["sampled"] = [(*training.train(step), training.head.loss.weight.detach().clone()) for step in range(2)]
    state = training.save()
    training.train(2, 3)
    resumed = Training(run, 40, sample=0.3)
    resumed.load(state)
    resumed.train(2, 3)
    results["resumed exactly"] = all(map(torch.equal, training.state(), resumed.state()))
    torch.save(results, folder / f"{world_size}-{rank}.pt")
    run.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run the processes; return the folder of their results and checkpoints."""
    path = tmp_path_factory.mktemp("shard")
    multiprocessing.spawn(run_process, (path, (free_port(), free_port())), 3)
    return path


def load_results(folder, world_size):
    """Return the results of each of `world_size` processes, in a list by rank."""
    return [torch.load(folder / f"{world_size}-{rank}.pt") for rank in range(world_size)]


@pytest.mark.parametrize("shard", [False, True], ids=["whole head", "sharded head"])
def test_a_checkpoint_of_two_processes_resumes_on_one_and_on_three(folder, shard):
    uninterrupted = Training(ONE, CLASSES, shard=False)
    expected_loss, predicted, _ = uninterrupted.train(0, 1, 2)
    net_weight, centers, momentum = uninterrupted.state()
    resumed = Training(ONE, CLASSES, shard=shard)
    resumed.load(torch.load(folder / "exact.pt"))
    loss, *_ = resumed.train(2)
    for actual, expected in zip((loss, *resumed.state()), (expected_loss, net_weight, centers, momentum)):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for world_size in (2, 3):
        parts = load_results(folder, world_size)
        assert torch.cat([results["predicted"] for results in parts]).tolist() == predicted.tolist()
        for rank, results in enumerate(parts):
            own = slice(*bounds(CLASSES, rank, world_size))
            for actual, expected in zip((results["loss"], *results["state"]),
                                        (expected_loss, net_weight, centers[own], momentum[own])):
                torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("world_size", [2, 3])
def test_sampled_softmax_equals_a_head_of_the_sampled_centers(folder, world_size):
    """The reference is a head of the sampled centers alone; all other centers must not change."""
    parts = [results["sampled"] for results in load_results(folder, world_size)]
    slices = [bounds(40, rank, world_size) for rank in range(world_size)]
    reference = Training(ONE, 40, shard=False)
    momentum = torch.zeros(40, 512)
    for step in range(2):
        x, label = batch(step)
        rows = torch.cat([first + part[step][2] for (first, _), part in zip(slices, parts)])
        expected_counts = [max(6, math.ceil(0.3 * (end - first))) for first, end in slices]
        assert [len(part[step][2]) for part in parts] == expected_counts
        assert set(label.tolist()) < set(rows.tolist()) and rows.tolist() == sorted(set(rows.tolist()))
        centers = reference.head.weight.detach().clone()
        reference.head.weight.data = centers[rows]
        column = (rows == label[:, None]).int().argmax(1)
        loss, _ = reference.head(reference.net(x), column)
        reference.optimizer.zero_grad()
        loss.backward()
        momentum[rows] = 0.9 * momentum[rows] + reference.head.weight.grad + 5e-4 * centers[rows]
        centers[rows] -= 0.1 * momentum[rows]
        reference.head.weight.grad = None                        # the optimizer must update the network only
        reference.optimizer.step()
        reference.head.weight.data = centers
        for part in parts:
            torch.testing.assert_close(part[step][0], loss.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.cat([part[step][3] for part in parts]), centers, atol=1e-5, rtol=1e-5)
    assert parts[0][0][2].tolist() != parts[0][1][2].tolist()    # every step draws a new sample
    assert all(results["resumed exactly"] for results in load_results(folder, world_size))


@pytest.mark.parametrize("overflow", [False, True])
def test_centers_stay_where_they_are_if_the_network_overflows_in_float16(overflow):
    training, scaler = Training(ONE, CLASSES), torch.amp.GradScaler("cpu")
    x, label = batch()
    scaler.scale(training.head(training.net(x), label)[0]).backward()
    if overflow:
        training.net.bias.grad[0] = math.inf
    before, scale = training.state(), scaler.get_scale()
    scaler.step(training.optimizer)
    training.head.update(0.1, scaler)
    assert [torch.equal(*pair) for pair in zip(before, training.state())] == [overflow] * 3
    assert (scaler.get_scale() < scale) == overflow
    assert training.head.step == 1 and training.head.loss.weight.grad is None


def test_more_processes_than_identities_is_an_error():
    with pytest.raises(InputError, match="2 identities can't be spread over 3 processes"):
        PartialFC(CosFace, 2, SimpleNamespace(rank=0, world_size=3))


def test_each_training_step_samples_its_own_centers(main, casia, tmp_path, monkeypatch):
    drawn, draw = [], PartialFC._draw
    monkeypatch.setattr(PartialFC, "_draw", lambda head, label: drawn.append(head.step) or draw(head, label))
    args = [*options(casia, tmp_path), "--net", "sphere20a", "--epochs", "0.34", "--sample-centers"]
    assert main("cosFace", *args, "0")[0] == 2
    assert main("cosFace", *args, "0.5")[0] == 0 and drawn == [0, 1]
    assert main("cosFace", *args, "0.6", "--resume")[0] == 2    # a resumed run must keep its fraction
    assert main("cosFace", *args, "0.5", "--resume", "--epochs", "0.5")[0] == 0 and drawn == [0, 1, 2]
