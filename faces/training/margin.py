"""What both heads share: cosine logits, and a softmax cross entropy in which a margin changes only the target's logit.

The gradients are written by hand so that the (N, C) logits of the forward pass are the only tensor of that size that is
kept, and no copy of the (C, 512) class centers is made. A second backward pass, or create_graph, raises an error.
"""
import torch
from torch.autograd.function import once_differentiable

# The gradient of all class centers is processed in chunks of rows, because a copy of it would be the largest tensor of
# a step. On a CPU, a chunk fits in the cache; on a GPU, each chunk costs the launches of a few kernels.
ROWS = {"cpu": 1024, "gpu": 65536}


def float32(tensor):
    """Context in which matrix products stay in float32, whatever the autocast type outside."""
    return torch.autocast(tensor.device.type, enabled=False)


class AllCenters:
    """Maps labels to columns of the logits in a head that holds all class centers: column j belongs to label j.

    faces.training.sharded_head.SomeCenters is its counterpart for one process of several; there, the reductions below
    go over all processes.
    """

    def targets(self, label):
        """Return the column of each row's target, int64 (N,), and whether it is here, bool (N,); None if all are.

        If it is elsewhere, the column is any valid one. Shapes never depend on values, since the host would have to
        wait for the device to know them.
        """
        return label, None

    def labels(self, columns):
        """Return the labels of columns; both int64 (N,)."""
        return columns

    def max(self, tensor):
        """Elementwise maximum over the processes; may overwrite the tensor."""
        return tensor

    min = sum = max  # a single process has nothing to reduce


ALL = AllCenters()


def cosine_logits(x, weight):
    """Return x_i w_j / |w_j| = |x_i| cos t_ij, the logits before scale and margin.

    Args:
        x: float32 (N, D).
        weight: float32 (C, D), the class centers, of any length; a zero row gives zeros.

    Returns:
        float32 (N, C).
    """
    return _CosineLogits.apply(x, weight)


class _CosineLogits(torch.autograd.Function):
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
        # The loss does not depend on the length of a center, so the component along the center is removed.
        rows = ROWS["cpu" if x.device.type == "cpu" else "gpu"]
        for chunk, w, norm in zip(grad_weight.split(rows), weight.split(rows), length.split(rows)):
            along = (chunk * w).sum(1) / norm.square()
            chunk.addcmul_(w, along[:, None], value=-1).div_(norm[:, None])
        return grad_x, grad_weight


def margin_softmax(logits, label, margin, *inputs, centers=ALL):
    """Return the cross entropy of logits whose target column is replaced by margin(target logit, *inputs).

    The softmax overwrites `logits` and its gradient overwrites the softmax, so a margin adds O(N) time and memory to
    the O(N C) of the softmax. If the class centers are spread over processes, each process passes its own columns for
    the whole batch, and gets the exact loss over all columns and the gradient of its own.

    Args:
        logits: float32 (N, C), before the margin; overwritten. The operation that made them must not need them in its
            backward pass (a matrix product does not).
        label: int64 (N,).
        margin: differentiable function of (N,) tensors; called with the targets' logits and `inputs`.
        inputs: float32 (N,) tensors on which the margin depends as well, such as |x| in SphereFace.
        centers: which class centers the columns belong to.

    Returns:
        (mean loss, scalar float32; label of the largest logit before the margin, int64 (N,)).
    """
    return _MarginSoftmax.apply(logits, label, margin, centers, *inputs)


class _MarginSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, label, margin, centers, *inputs):
        predicted = _label_of_largest(logits, centers)
        columns, here = centers.targets(label)
        rows = torch.arange(len(label), device=label.device)
        plain = logits[rows, columns]                                                          # (N,)
        leaves = [tensor.detach().requires_grad_() for tensor in (plain, *inputs)]
        with torch.enable_grad():  # the graph of the margin alone, kept for the backward pass: N numbers per node
            target = margin(*leaves)
        logits[rows, columns] = where(here, target.detach(), plain)
        largest = centers.max(logits.amax(1))                                                  # (N,)
        total = centers.sum(logits.sub_(largest[:, None]).exp_().sum(1))                       # (N,)
        targets = centers.sum(where(here, target.detach()))                                    # (N,)
        ctx.save_for_backward(logits, total, rows, columns, here)
        ctx.leaves, ctx.target = leaves, target
        ctx.mark_non_differentiable(predicted)
        return (largest + total.log() - targets).mean(), predicted

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        powers, total, rows, columns, here = ctx.saved_tensors
        count = len(powers)
        # Overwriting a saved tensor is safe: autograd notices and refuses a second backward pass.
        grad = powers.mul_((grad_loss / count / total)[:, None])       # (N, C): d loss / d logit_j = p_j - [j = y]
        plain = grad[rows, columns]
        grad_target = plain - grad_loss / count                        # with respect to the logits with the margin
        grad_logit, *grad_inputs = torch.autograd.grad(ctx.target, ctx.leaves, grad_target)
        grad[rows, columns] = where(here, grad_logit, plain)
        return grad, None, None, None, *(where(here, values) for values in grad_inputs)


def _label_of_largest(logits, centers):
    value, column = logits.max(1)
    none = torch.iinfo(torch.int64).max
    return centers.min(torch.where(value == centers.max(value.clone()), centers.labels(column), none))


def where(condition, values, otherwise=0):
    """Return torch.where(condition, values, otherwise); a condition of None is true everywhere."""
    return values if condition is None else torch.where(condition, values, otherwise)
