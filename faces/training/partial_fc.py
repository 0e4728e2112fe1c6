"""Class centers for hundreds of thousands of identities: spread over the processes, and sampled in each step.

Process r of K holds a contiguous slice of the C class centers and their momentum. It gathers the embeddings and labels
of the whole batch and computes the logits of its slice; maxima and sums over the processes make the softmax exact. What
is communicated is (N, 512) embeddings and a few (N,) vectors, never logits.

With sampling (Partial FC, An et al., CVPR 2022, arXiv:2203.15565), the softmax of a step sees the identities of the
batch and some of the others, drawn anew every step. A center that is not drawn does not change: neither gradient,
weight decay nor momentum moves it.
"""
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed import ReduceOp

from faces.device import to_device
from faces.files import InputError
from faces.training.distributed import Processes

SAMPLING = 2    # the purpose of a random generator whose seed is (seed, step, rank, purpose); see faces.data.batches


class PartialFC(nn.Module):
    """A method's loss over C class centers, of which this process holds a slice, and their optimizer, SGD.

    `make_loss` makes the method's loss for a number of classes, such as partial(CosFace, s=64). In each step, a process
    draws the fraction `sample` of its centers, but at least as many as the batch has faces; None takes all of them.

    `step` is the number of updates so far, which seeds the sampling; `drawn` and `sampled` are the rows of the slice
    that the last forward pass used, int64, and their centers, None for all.
    """

    def __init__(self, make_loss: Callable[[int], nn.Module], classes: int, run: Processes,
                 sample: float | None = None, seed: int = 0, weight_decay: float = 5e-4, momentum: float = 0.9):
        super().__init__()
        if classes < run.world_size:
            raise InputError(f"{classes} identities can't be spread over {run.world_size} processes; leave out "
                             "--shard-head.")
        self.classes, self.rank, self.world_size = classes, run.rank, run.world_size
        self.sample, self.seed = sample, seed
        self.first, self.end = bounds(classes, run.rank, run.world_size)
        for start in range(0, self.first, 4096):    # initial centers do not depend on the number of processes
            torch.randn(min(4096, self.first - start), 512)
        self.loss = make_loss(self.end - self.first).to(run.device)
        self.velocity, self.decay, self.factor = torch.zeros_like(self.loss.weight), weight_decay, momentum
        self.step, self.drawn, self.sampled = 0, None, None

    def forward(self, embedding: torch.Tensor, label: torch.Tensor, *margin) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean loss of a batch of N faces, scalar, and the predicted labels of this process's faces.

        The arguments are this process's share, float (N / K, 512), not normalized, and int64 (N / K,), and what else
        the method's loss takes, such as CosFace's ramp. The gradient of the embedding is K times the loss's, because
        DistributedDataParallel divides the network's gradients by K; the gradient of the centers is exact.
        """
        count, x = len(label), embedding.float()
        if self.world_size > 1:
            x, label = _Gather.apply(x, self.rank, self.world_size), _all_gather(label, self.world_size)
        weight = self.loss.weight
        if self.sample is not None:
            self.drawn = self._draw(label)
            self.sampled = weight = weight.detach()[self.drawn].requires_grad_()
        column, here = self._columns(label)
        with torch.autocast(x.device.type, enabled=False):
            norm = (x.square().sum(1, keepdim=True) + 1e-12).sqrt()                            # (N, 1)
            cosine = F.linear(x / norm, F.normalize(weight))                                   # (N, own centers)
            predicted = self._predict(cosine.detach())
            plain = cosine.gather(1, column)                                                   # (N, 1)
            target = torch.where(here, self.loss.target(plain, *margin), plain)
            scale = norm if self.loss.s is None else self.loss.s
            loss = _Softmax.apply(scale * cosine.scatter(1, column, target), column, here, self._reduce)
        return loss, predicted[self.rank * count:(self.rank + 1) * count]

    @torch.no_grad()
    def update(self, learning_rate: float, scaler: torch.amp.GradScaler):
        """Update the scale of float16, and unless the network's step overflowed, which lowers it, do a step of SGD on
        the centers that the last forward pass used."""
        scale = scaler.get_scale()
        scaler.update()
        weight, rows = (self.loss.weight, slice(None)) if self.drawn is None else (self.sampled, self.drawn)
        if scaler.get_scale() >= scale:
            velocity = self.velocity[rows].mul_(self.factor).add_(weight.grad, alpha=1 / scale)
            weight.add_(velocity.add_(weight, alpha=self.decay), alpha=-learning_rate)
            if self.drawn is not None:
                self.velocity[rows], self.loss.weight[rows] = velocity, weight
        weight.grad = None
        self.step += 1

    def state_dict(self) -> dict:
        """Return the state of all C centers, on the CPU, in rank 0; every process has to call it."""
        weight, momentum = self._collect(self.loss.weight.detach().cpu()), self._collect(self.velocity.cpu())
        return {"weight": weight, "momentum": momentum, "step": self.step}

    def load_state_dict(self, state: dict):
        """Restore what state_dict() returned with any number of processes; other ranks than 0 need only the step."""
        for name, own in (("weight", self.loss.weight.data), ("momentum", self.velocity)):
            own.copy_(self._spread(state[name] if self.rank == 0 else None))
        self.step = state["step"]

    def _draw(self, label):
        """Return the rows of the slice that take part in a step, sorted: those of the batch and random others."""
        size = self.end - self.first
        random = np.random.default_rng((self.seed, self.step, self.rank, SAMPLING)).random(size + 1, np.float32)
        priority = to_device(torch.from_numpy(random), label.device)    # 0 <= priority < 1; the last one is a dummy
        here = (label >= self.first) & (label < self.end)
        priority.index_fill_(0, torch.where(here, label - self.first, size), 1)
        number = min(size, max(math.ceil(self.sample * size), len(label)))
        return priority[:size].topk(number, sorted=False).indices.sort().values

    def _columns(self, label):
        """Return the column of each target, int64 (N, 1), any if it is elsewhere, and whether it is here, bool (N, 1).

        Shapes never depend on values, since the host would have to wait for the device to know them.
        """
        here = (label >= self.first) & (label < self.end)
        column = (label - self.first).clamp(0, self.end - self.first - 1)
        if self.drawn is not None:
            column = torch.searchsorted(self.drawn, column).clamp_max(len(self.drawn) - 1)
        return column[:, None], here[:, None]

    def _predict(self, cosine):
        """Return the label of the largest cosine over all processes, int64 (N,)."""
        value, column = cosine.max(1)
        label = self.first + (column if self.drawn is None else self.drawn[column])
        best = self._reduce(value.clone(), ReduceOp.MAX)
        return self._reduce(torch.where(value == best, label, self.classes), ReduceOp.MIN)

    def _reduce(self, tensor, operation):
        if self.world_size > 1:
            distributed.all_reduce(tensor, operation)
        return tensor

    def _collect(self, own):
        """Bring the slices of all processes, on the CPU, to rank 0, one at a time; return None in the others."""
        if self.rank > 0:
            return distributed.send(own, 0)
        whole = torch.empty(self.classes, 512)
        whole[:self.end] = own
        for rank in range(1, self.world_size):
            first, end = bounds(self.classes, rank, self.world_size)
            distributed.recv(whole[first:end], rank)
        return whole

    def _spread(self, whole):
        """Send each process its slice of a tensor that rank 0 has, on the CPU; return this process's slice."""
        if self.rank > 0:
            own = torch.empty(self.end - self.first, 512)
            distributed.recv(own, 0)
            return own
        for rank in range(1, self.world_size):
            distributed.send(whole[slice(*bounds(self.classes, rank, self.world_size))].contiguous(), rank)
        return whole[:self.end]


class _Softmax(torch.autograd.Function):
    """Cross entropy of logits whose columns are spread over processes; overwrites the logits, to need no copy."""

    @staticmethod
    def forward(ctx, logits, column, here, reduce):
        largest = reduce(logits.amax(1, keepdim=True), ReduceOp.MAX)                           # (N, 1)
        target = reduce(torch.where(here, logits.gather(1, column), 0), ReduceOp.SUM)
        total = reduce(logits.sub_(largest).exp_().sum(1, keepdim=True), ReduceOp.SUM)
        ctx.save_for_backward(logits, total, column, here)
        return (largest + total.log() - target).mean()

    @staticmethod
    def backward(ctx, grad):
        power, total, column, here = ctx.saved_tensors
        grad = grad / len(power)
        return (power * (grad / total)).scatter_add_(1, column, torch.where(here, -grad, 0)), None, None, None


class _Gather(torch.autograd.Function):
    """Concatenate the rows of all processes; each has the part of the gradient that comes from its own centers."""

    @staticmethod
    def forward(ctx, tensor, rank, world_size):
        ctx.own, ctx.world_size = slice(rank * len(tensor), (rank + 1) * len(tensor)), world_size
        return _all_gather(tensor, world_size)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        distributed.all_reduce(grad)
        return ctx.world_size * grad[ctx.own], None, None    # DistributedDataParallel will divide by world_size


def _all_gather(tensor, world_size):
    parts = [torch.empty_like(tensor) for _ in range(world_size)]
    distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def bounds(classes: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the first label of a process's slice and the one after its last; slices differ by at most one in size."""
    return rank * classes // world_size, (rank + 1) * classes // world_size


def convert(state: dict, sharded: bool) -> dict:
    """Return a checkpoint of whole class centers as one of PartialFC, or the reverse.

    Their momentum is beside the centers in PartialFC's, otherwise the last one of the optimizer.
    """
    head, optimizer = state["head"], state["optimizer"]
    momentum, (*groups, last) = dict(optimizer["state"]), optimizer["param_groups"]
    if sharded and "momentum" not in head:
        *params, index = last["params"]
        own = momentum.pop(index, {"momentum_buffer": torch.zeros_like(head["weight"])})
        head = {"weight": head["weight"], "momentum": own["momentum_buffer"], "step": state["step"]}
    elif not sharded and "momentum" in head:
        params = [*last["params"], last["params"][-1] + 1]
        momentum[params[-1]] = {"momentum_buffer": head["momentum"]}
        head = {"weight": head["weight"]}
    else:
        return state
    optimizer = {"state": momentum, "param_groups": [*groups, {**last, "params": params}]}
    return {**state, "head": head, "optimizer": optimizer}
