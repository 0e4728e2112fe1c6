"""The head of a training run: whole in every process, or its class centers spread over the processes and sampled.

ShardedHead lets a million identities fit. Process r of K holds a contiguous slice of the C class centers and their
momentum. It gathers the embeddings and labels of the whole batch and computes the logits of its slice; maxima and sums
over the processes make the softmax exact. Loss and gradients equal those of a single process, and what is communicated
is (N, 512) embeddings and a few (N,) vectors, never logits.

With sampling (Partial FC, An et al., CVPR 2022, arXiv:2203.15565), the softmax of a step sees the identities of the
batch and some of the others, drawn anew every step. A center that is not drawn does not change: neither gradient,
weight decay nor momentum moves it, and its momentum is kept until it is drawn again.

Both heads are used alike: head(embedding, label, step=step, **margin) returns the loss and the predicted labels.
"""
import math

import numpy as np
import torch
from torch import distributed, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from faces.data.batches import SAMPLING
from faces.device import to_device
from faces.files import InputError
from faces.training.margin import ALL, AllCenters
from faces.training.optimizer import copy_to_cpu, load_momentum, map_momentum


def make_head(method, classes, run, shard=False, sample=None, seed=0):
    """Make a method's head on the device of a run.

    Args:
        method: function that makes the head for a number of classes, such as functools.partial(CosFace, s=64, m=0.35).
        classes: number of identities C.
        run: faces.training.run.Run.
        shard: spread the class centers over the processes.
        sample: fraction of the class centers that a step sees, or None for all; implies `shard`.
        seed: of the sampling.

    Raises:
        InputError: fewer identities than processes, with `shard`; or more than fit in the memory of the device.
    """
    try:
        if shard or sample is not None:
            return ShardedHead(method, classes, run.rank, run.world_size, sample, seed).to(run.device)
        return WholeHead(method(classes).to(run.device), run.world_size)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise InputError(f"the centers of {classes:,} identities do not fit in the memory of {run.device}; training "
                         "can spread them over more devices with torchrun and --shard-head.") from None


class WholeHead(nn.Module):
    """A method's head with all class centers in every process; their gradients are averaged over the processes."""

    sampled = None    # see ShardedHead

    def __init__(self, head, world_size=1):
        super().__init__()
        self.module = head
        self.parallel = head
        if world_size > 1:
            self.parallel = DistributedDataParallel(head, broadcast_buffers=False, gradient_as_bucket_view=True)

    def forward(self, embedding, label, *, step, **margin):
        """Return loss and predicted labels of this process's faces; see the method's head. `step` is not used."""
        return self.parallel(embedding, label, **margin)

    def gather(self, embedding, label):
        """Return what faces.training.log.geometry takes: embeddings, labels, class centers and their mapping."""
        return embedding.detach(), label, self.module.weight.detach(), ALL

    def state(self, optimizer):
        """Return copies of the state dicts of head and optimizer for a checkpoint, on the CPU."""
        head = {name: copy_to_cpu(tensor) for name, tensor in self.module.state_dict().items()}
        return head, map_momentum(optimizer.state_dict(), lambda _, tensor: copy_to_cpu(tensor))

    def shared(self, head_state, optimizer_state, optimizer):
        """Return the part of what state() returned that each process needs as a whole."""
        return head_state, optimizer_state

    def load_state(self, head_state, optimizer_state, optimizer):
        """Restore what state() returned, copying every tensor."""
        self.module.load_state_dict(head_state)
        load_momentum(optimizer, optimizer_state)


class ShardedHead(nn.Module):
    """A method's head on this process's slice of the class centers.

    Args:
        method: function that makes the head for a number of classes.
        classes: number of identities C, at least `world_size`.
        rank, world_size: index of this process, and number K of processes.
        sample: fraction of its centers that a process draws each step, 0 to 1, but at least as many as the batch has
            faces; None takes all of them.
        seed: of the sampling.

    Attributes:
        sampled: (rows, centers) that the last forward pass drew, for the optimizer; None without sampling.

    Raises:
        InputError: fewer identities than processes.
    """

    def __init__(self, method, classes, rank=0, world_size=1, sample=None, seed=0):
        super().__init__()
        if classes < world_size:
            raise InputError(f"{classes} identities can't be spread over {world_size} processes; leave out "
                             "--shard-head.")
        self.classes, self.rank, self.world_size, self.sample, self.seed = classes, rank, world_size, sample, seed
        self.first, self.end = bounds(classes, rank, world_size)
        self.sampled = None
        _skip(self.first)  # initial centers do not depend on the number of processes
        self.module = method(self.end - self.first)

    def forward(self, embedding, label, *, step, **margin):
        """Return the loss of a batch of which every process has an equal share.

        The gradient of the embedding is K times that of the loss, because DistributedDataParallel divides the network's
        gradients by K; the gradient of the centers is exact.

        Args:
            embedding: float (N / K, 512), not normalized.
            label: int64 (N / K,), 0 <= label < C.
            step: number of the step, which seeds the sampling together with seed and rank.
            margin: further arguments of the method's head.

        Returns:
            (mean loss over all N faces, scalar float32; predicted labels of this process's faces, int64 (N / K,)).
        """
        count = len(label)
        embedding, label = self._whole_batch(embedding, label)
        weight, rows, self.sampled = self.module.weight, None, None
        if self.sample is not None:
            rows = self._draw(label, step)
            weight = self.module.weight.detach()[rows].requires_grad_()
            self.sampled = rows, weight
        loss, predicted = functional_call(self.module, {"weight": weight}, (embedding, label),
                                          {**margin, "centers": self._centers(rows)})
        return loss, predicted[self.rank * count:(self.rank + 1) * count]

    def gather(self, embedding, label):
        """Return the same as WholeHead.gather(), for the whole batch and this process's centers."""
        return *self._whole_batch(embedding.detach(), label), self.module.weight.detach(), self._centers()

    def state(self, optimizer):
        """Return the state dicts that a single process with all centers would have; every process has to call it.

        Returns:
            (dict, dict); tensors are copies on the CPU; class centers and their momentum are None but in process 0.
        """
        index = self._index(optimizer)
        momentum = optimizer.state[self.module.weight]["momentum_buffer"]
        own = {name: self._collect(tensor.detach().cpu()) for name, tensor in
               (("weight", self.module.weight), ("momentum", momentum))}
        rest = map_momentum(optimizer.state_dict(),
                            lambda i, tensor: own["momentum"] if i == index else copy_to_cpu(tensor))
        return {"weight": own["weight"]}, rest

    def shared(self, head_state, optimizer_state, optimizer):
        """Return what state() returned without class centers and their momentum; see WholeHead.shared()."""
        index = self._index(optimizer)
        return {"weight": None}, map_momentum(optimizer_state, lambda i, tensor: None if i == index else tensor)

    def load_state(self, head_state, optimizer_state, optimizer):
        """Restore what state() returned under any number of processes, copying every tensor.

        Process 0 passes all of it, the others what shared() returned; every process has to call it.
        """
        index = self._index(optimizer)
        self.module.load_state_dict({"weight": self._spread(head_state["weight"])})
        momentum = self._spread(optimizer_state["state"][index]["momentum_buffer"])
        load_momentum(optimizer, map_momentum(optimizer_state, lambda i, tensor: momentum if i == index else tensor))

    def _whole_batch(self, embedding, label):
        """Gather (N / K, 512) and (N / K,) of all processes into float32 (N, 512), differentiable, and int64 (N,)."""
        if self.world_size == 1:
            return embedding.float(), label
        return _Gather.apply(embedding.float(), self.rank, self.world_size), _all_gather(label, self.world_size)

    def _centers(self, rows=None):
        return SomeCenters(self.first, self.end, self.world_size, rows)

    def _draw(self, label, step):
        """Draw the rows of the slice that take part in a step, sorted: those of the batch and random others."""
        size = self.end - self.first
        random = np.random.default_rng((self.seed, step, self.rank, SAMPLING)).random(size + 1, np.float32)
        priority = to_device(torch.from_numpy(random), label.device)    # 0 <= priority < 1; the last one is a dummy
        here = (label >= self.first) & (label < self.end)
        priority.index_fill_(0, torch.where(here, label - self.first, size), 1)
        number = min(size, max(math.ceil(self.sample * size), len(label)))
        return priority[:size].topk(number, sorted=False).indices.sort().values

    def _index(self, optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return next(i for i, p in enumerate(parameters) if p is self.module.weight)

    def _collect(self, own):
        """Bring the slices of all processes, on the CPU, to process 0, one at a time; return None in the others."""
        if self.rank > 0:
            distributed.send(own, 0)
            return None
        whole = torch.empty(self.classes, *own.shape[1:])
        whole[:self.end] = own
        for rank in range(1, self.world_size):
            first, end = bounds(self.classes, rank, self.world_size)
            distributed.recv(whole[first:end], rank)
        return whole

    def _spread(self, whole):
        """Send each process its slice of a tensor that process 0 has, on the CPU; return this process's slice."""
        if self.rank > 0:
            own = torch.empty(self.end - self.first, 512)
            distributed.recv(own, 0)
            return own
        for rank in range(1, self.world_size):
            distributed.send(whole[slice(*bounds(self.classes, rank, self.world_size))].contiguous(), rank)
        return whole[:self.end].clone()


class SomeCenters(AllCenters):
    """Maps labels to columns if a process holds the centers of labels first to end - 1, or only `rows` of those."""

    def __init__(self, first, end, world_size, rows=None):
        self.first, self.end, self.world_size, self.rows = first, end, world_size, rows

    def targets(self, label):
        here = (label >= self.first) & (label < self.end)
        column = (label - self.first).clamp(0, self.end - self.first - 1)
        if self.rows is not None:
            column = torch.searchsorted(self.rows, column).clamp_max(len(self.rows) - 1)
        return column, here

    def labels(self, columns):
        return self.first + (columns if self.rows is None else self.rows[columns])

    def max(self, tensor):
        return self._reduce(tensor, distributed.ReduceOp.MAX)

    def min(self, tensor):
        return self._reduce(tensor, distributed.ReduceOp.MIN)

    def sum(self, tensor):
        return self._reduce(tensor, distributed.ReduceOp.SUM)

    def _reduce(self, tensor, operation):
        if self.world_size > 1:
            distributed.all_reduce(tensor, operation)
        return tensor


def bounds(classes, rank, world_size):
    """Return the first label of a process's slice and the one after its last; slices differ by at most one in size."""
    return rank * classes // world_size, (rank + 1) * classes // world_size


def _skip(rows):
    """Advance the random generator past the initial values of this many centers, a few megabytes at a time."""
    for start in range(0, rows, 4096):
        torch.randn(min(4096, rows - start), 512)


def _all_gather(tensor, world_size):
    parts = [torch.empty_like(tensor) for _ in range(world_size)]
    distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, rank, world_size):
        ctx.own, ctx.world_size = slice(rank * len(tensor), (rank + 1) * len(tensor)), world_size
        return _all_gather(tensor, world_size)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        distributed.all_reduce(grad)    # each process has the part of the gradient that comes from its own centers
        return ctx.world_size * grad[ctx.own], None, None    # DistributedDataParallel will divide by world_size
