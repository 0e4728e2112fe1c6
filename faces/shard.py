"""Class centres spread over the processes of a run, so that a million identities fit, and a sample of them each step.

Process r of K holds a contiguous slice of the C centres with its momentum. It gathers the embeddings and labels of the
whole batch, computes the logits of its slice, and maxima and sums over the processes make the softmax exact: loss and
gradients are those of one process, and what travels is (N, 512) embeddings and a few (N,) vectors, never logits.

With a sample (Partial FC, An et al., CVPR 2022, arXiv:2203.15565) the softmax of a step sees the identities of the
batch and some of the others, drawn anew every step. A centre that is not drawn stands still: neither gradient, weight
decay nor momentum moves it, and its momentum waits as it is until it is drawn again.
"""
import math

import numpy as np
import torch
from torch import distributed, nn
from torch.func import functional_call

from faces.errors import InputError
from faces.margin import AllCentres


class ShardedHead(nn.Module):
    """A method's head on this process's slice of the class centres, called like the head with this process's faces.

    The loss is the mean over the whole batch and the same in every process; the predicted labels are those of this
    process's faces. The gradient of the embedding is K times that of the loss, since DistributedDataParallel divides
    the network's by K; that of the centres is exact as it is.

    Args:
        run: faces.run.Run; rank, world, seed and step are used.
        method: class of the head, called with the number of centres of this process and `settings`.
        classes: number of identities C, at least the number of processes.
        sample: fraction of its centres that a process draws each step, 0 to 1, and at least as many as the batch has
            faces; None takes all of them.

    Raises:
        InputError: fewer identities than processes.
    """

    def __init__(self, run, method, classes, *settings, sample=None):
        super().__init__()
        if classes < run.world:
            raise InputError(f"{classes} identities can't be spread over {run.world} processes; leave out "
                             "--shard-head.")
        self.run, self.classes, self.sample = run, classes, sample
        self.first, self.end = bounds(classes, run.rank, run.world)
        _skip(self.first)  # so that the initial centres are those of one process, whatever the number of processes
        self.module = method(self.end - self.first, *settings)

    def forward(self, embedding, label, *settings):
        """Loss of a batch of which every process has an equal share.

        Args:
            embedding: float (N / K, 512), not normalised.
            label: int64 (N / K,), 0 <= label < C.
            settings: what the method's forward takes besides.

        Returns:
            (mean loss over the N faces, scalar float32; predicted label by the largest cosine, int64 (N / K,)).
        """
        count = len(label)
        embedding, label = self.whole_batch(embedding, label)
        weight, rows = self.module.weight, None
        if self.sample is not None:
            rows = self._draw(label)
            weight = self.module.weight.detach()[rows].requires_grad_()
            self.module.weight.sampled = rows, weight              # for SGD
        loss, predicted = functional_call(self.module, {"weight": weight}, (embedding, label, *settings),
                                          {"centres": self.centres(rows)})
        return loss, predicted[self.run.rank * count:(self.run.rank + 1) * count]

    def centres(self, rows=None):
        """Which centres the columns of this process's logits belong to: its slice's, or only `rows` of it."""
        return SomeCentres(self.first, self.end, self.run.world, rows)

    def whole_batch(self, embedding, label):
        """Gather all processes' (N / K, 512) and (N / K,) into float32 (N, 512), differentiable, and int64 (N,)."""
        if self.run.world == 1:
            return embedding.float(), label
        return _Gather.apply(embedding.float(), self.run.rank, self.run.world), _all_gather(label, self.run.world)

    def whole_state(self, optimizer):
        """The state dicts of head and optimizer that one process with all centres would have; every process calls it.

        Returns:
            (dict, dict) on the CPU as far as the centres go, complete in the first process only.
        """
        state, index = optimizer.state_dict(), self._index(optimizer)
        weight = self._whole(self.module.weight.detach())
        momentum = self._whole(state["state"][index]["momentum_buffer"])
        return {"weight": weight}, {**state, "state": {**state["state"], index: {"momentum_buffer": momentum}}}

    def own_state(self, head, state, optimizer):
        """This process's part of what whole_state() gave to any number of processes, copied."""
        index, own = self._index(optimizer), slice(self.first, self.end)
        copied = {i: {name: (value[own] if i == index else value).clone() for name, value in values.items()}
                  for i, values in state["state"].items()}
        return {"weight": head["weight"][own].clone()}, {**state, "state": copied}

    def _draw(self, label):
        """Sorted rows of the slice that take part in this step: all of the batch's identities, and others at random."""
        size = self.end - self.first
        coins = np.random.default_rng((self.run.seed, self.run.step, self.run.rank, 2)).random(size, np.float32)
        priority = torch.from_numpy(coins).to(label.device)        # 0 <= priority < 1
        priority[label[(label >= self.first) & (label < self.end)] - self.first] = 1
        number = min(size, max(math.ceil(self.sample * size), len(label)))
        return priority.topk(number, sorted=False).indices.sort().values

    def _index(self, optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return next(i for i, p in enumerate(parameters) if p is self.module.weight)

    def _whole(self, tensor):
        """Bring the slices of all processes to the first, one at a time: its device holds one beside its own."""
        run = self.run
        if run.world == 1:
            return tensor
        if run.rank > 0:
            distributed.send(tensor.contiguous(), 0)
            return None
        whole = torch.empty(self.classes, *tensor.shape[1:])
        whole[:self.end] = tensor
        for rank in range(1, run.world):
            first, end = bounds(self.classes, rank, run.world)
            slice_ = torch.empty(end - first, *tensor.shape[1:], device=tensor.device)
            distributed.recv(slice_, rank)
            whole[first:end] = slice_
        return whole


class SomeCentres(AllCentres):
    """The columns of the logits where the process holds the centres of labels first to end - 1, or `rows` of them."""

    def __init__(self, first, end, world, rows=None):
        self.first, self.end, self.world, self.rows = first, end, world, rows

    def targets(self, label):
        here = ((label >= self.first) & (label < self.end)).nonzero().squeeze(1)
        place = label[here] - self.first
        return here, place if self.rows is None else torch.searchsorted(self.rows, place)

    def labels(self, columns):
        return self.first + (columns if self.rows is None else self.rows[columns])

    def max(self, tensor):
        return self._reduce(tensor, distributed.ReduceOp.MAX)

    def min(self, tensor):
        return self._reduce(tensor, distributed.ReduceOp.MIN)

    def sum(self, tensor):
        return self._reduce(tensor, distributed.ReduceOp.SUM)

    def _reduce(self, tensor, operation):
        if self.world > 1:
            distributed.all_reduce(tensor, operation)
        return tensor


class SGD(torch.optim.SGD):
    """torch.optim.SGD that of a sampled matrix of centres moves the drawn rows only, and touches no other memory."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                rows, sampled = getattr(weight, "sampled", (None, None))
                if sampled is not None and sampled.grad is not None:
                    self._step_rows(weight, rows, sampled, group)
                    sampled.grad = None  # used up
        return super().step(closure)  # which leaves out what has no gradient of its own, as such a matrix

    def _step_rows(self, weight, rows, sampled, group):
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        grad = sampled.grad.add(sampled, alpha=group["weight_decay"])
        momentum = state["momentum_buffer"][rows].mul_(group["momentum"]).add_(grad)
        state["momentum_buffer"].index_copy_(0, rows, momentum)
        weight.index_copy_(0, rows, sampled.sub(momentum, alpha=group["lr"]))


def bounds(classes, rank, world):
    """First label of a process's slice and the one behind its last; the slices differ by at most one in size."""
    return rank * classes // world, (rank + 1) * classes // world


def _skip(rows):
    """Draw and forget so many centres' random numbers, a few megabytes at a time."""
    for start in range(0, rows, 4096):
        torch.randn(min(4096, rows - start), 512)


def _all_gather(tensor, world):
    parts = [torch.empty_like(tensor) for _ in range(world)]
    distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, rank, world):
        ctx.own, ctx.world = slice(rank * len(tensor), (rank + 1) * len(tensor)), world
        return _all_gather(tensor, world)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        distributed.all_reduce(grad)                 # each process knows the part that comes through its own centres
        return ctx.world * grad[ctx.own], None, None  # DistributedDataParallel is going to divide by the processes
