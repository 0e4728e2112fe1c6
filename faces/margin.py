"""What both heads share: projections onto the class centres, and their softmax cross entropy, of which a margin changes
the target's logit alone and touches its column alone.

Gradients are written by hand, so that the (N, C) logits of the forward pass are the only tensor of their size that is
kept, and no copy of the (C, 512) centres is. A second backward pass through them raises an error, as does create_graph.
"""
import torch
from torch.autograd.function import once_differentiable


PARTS = 16   # of the centres, where a copy of all of them would be the largest tensor of a step


def float32(tensor):
    """Context in which matrix products keep float32 whatever the autocast type around them."""
    return torch.autocast(tensor.device.type, enabled=False)


class AllCentres:
    """Whose class centres the columns of the logits are: here everybody's, column j is label j.

    faces.shard.SomeCentres is that of one process among several, whose maxima and sums then go over all of them.
    """

    def targets(self, label):
        """Rows of the logits, int64 (T,), whose target is among the columns, and these columns, int64 (T,)."""
        return torch.arange(len(label), device=label.device), label

    def labels(self, columns):
        """Labels of columns, both int64 (N,)."""
        return columns

    def max(self, tensor):
        """Elementwise maximum over the processes; the tensor may be overwritten."""
        return tensor

    min = sum = max  # of one process


ALL = AllCentres()


def projections(x, weight):
    """Lengths of vectors along the centres' directions, x_i w_j / |w_j| = |x_i| cos t_ij.

    Args:
        x: float32 (N, D).
        weight: float32 (C, D), of any length; a zero row gives zeros.

    Returns:
        float32 (N, C).
    """
    return _Projections.apply(x, weight)


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        length = weight.norm(dim=1).clamp_min_(1e-12)                                          # (C,)
        ctx.save_for_backward(x, weight, length)
        return (x @ weight.T).div_(length)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, length = ctx.saved_tensors
        grad_x = grad.div(length) @ weight if ctx.needs_input_grad[0] else None
        grad_weight = grad.T @ x
        # A centre's length changes nothing, so what points along it is taken off. By parts, for the products' memory.
        for part, w, norm in zip(grad_weight.chunk(PARTS), weight.chunk(PARTS), length.chunk(PARTS)):
            along = (part * w).sum(1) / norm.square()
            part.addcmul_(w, along[:, None], value=-1).div_(norm[:, None])
        return grad_x, grad_weight


def margin_softmax(logits, label, margin, *inputs, centres=ALL):
    """Cross entropy of logits whose target column is replaced by margin(target logit, *inputs).

    The softmax overwrites `logits` and its gradient overwrites the softmax, so that a margin costs O(N) beside the
    O(N C) of the softmax, in time and in memory. Where the centres are spread over processes, each calls this with its
    own columns and the whole batch, and has the exact loss of all columns and the gradient of its own ones.

    Args:
        logits: float32 (N, C), before the margin; overwritten. Its producer must not need it in its backward pass
            (a matrix product does not).
        label: int64 (N,).
        margin: differentiable function of (N,) tensors, called with the targets' logits and `inputs`.
        inputs: float32 (N,) tensors that the margin depends on as well, as SphereFace's does on |x|.
        centres: which class centres the columns belong to.

    Returns:
        (mean loss, scalar; label of the largest logit before the margin, int64 (N,)).
    """
    return _MarginSoftmax.apply(logits, label, margin, centres, *inputs)


class _MarginSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, label, margin, centres, *inputs):
        predicted = _label_of_largest(logits, centres)
        rows, columns = centres.targets(label)
        leaves = [tensor.detach().requires_grad_() for tensor in (logits[rows, columns], *(t[rows] for t in inputs))]
        with torch.enable_grad():  # the margin's own graph, kept for the backward pass: N numbers a node
            target = margin(*leaves)
        logits[rows, columns] = target.detach()
        largest = centres.max(logits.amax(1))                                                  # (N,)
        total = centres.sum(logits.sub_(largest[:, None]).exp_().sum(1))                       # (N,)
        targets = centres.sum(_scatter(target.detach(), rows, len(label)))                     # (N,)
        ctx.save_for_backward(logits, total, rows, columns)
        ctx.leaves, ctx.target = leaves, target
        ctx.mark_non_differentiable(predicted)
        return (largest + total.log() - targets).mean(), predicted

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        powers, total, rows, columns = ctx.saved_tensors  # autograd notes that they change here, and takes them once
        count = len(powers)
        grad = powers.mul_((grad_loss / count / total)[:, None])       # (N, C): d loss / d logit_j = p_j - [j = y]
        grad_target = grad[rows, columns] - grad_loss / count          # with respect to the replaced logits
        grad_logit, *grad_inputs = torch.autograd.grad(ctx.target, ctx.leaves, grad_target)
        grad[rows, columns] = grad_logit
        return grad, None, None, None, *(_scatter(values, rows, count) for values in grad_inputs)


def _label_of_largest(logits, centres):
    value, column = logits.max(1)
    nobody = torch.iinfo(torch.int64).max
    return centres.min(torch.where(value == centres.max(value.clone()), centres.labels(column), nobody))


def _scatter(values, rows, count):
    """Put values (T,) into rows of a zero vector (count,)."""
    return values.new_zeros(count).index_put((rows,), values)
