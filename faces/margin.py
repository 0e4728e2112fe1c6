"""The softmax cross entropy both heads share: only the target's logit is changed, and only its column is touched."""
import torch


def float32(tensor):
    """Context in which matrix products keep float32 whatever the autocast type around them."""
    return torch.autocast(tensor.device.type, enabled=False)


def margin_softmax(logits, label, margin, *inputs):
    """Cross entropy of logits whose target column is replaced by margin(target logit, *inputs).

    The softmax overwrites `logits`, and its gradient is written by hand, so that a margin costs O(N) beside the
    O(N C) of the softmax, in time and in memory.

    Args:
        logits: float32 (N, C), before the margin; overwritten. Its producer must not need it in its backward pass
            (a matrix product does not).
        label: int64 (N,).
        margin: differentiable function of (N,) tensors, called with the targets' logits and `inputs`.
        inputs: float32 (N,) tensors that the margin depends on as well, as SphereFace's does on |x|.

    Returns:
        (mean loss, scalar; index of the largest logit before the margin, int64 (N,)).
    """
    return _MarginSoftmax.apply(logits, label, margin, *inputs)


class _MarginSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, label, margin, *inputs):
        predicted = logits.argmax(1)
        rows = torch.arange(len(label), device=label.device)
        leaves = [tensor.detach().requires_grad_() for tensor in (logits[rows, label], *inputs)]  # each (N,)
        with torch.enable_grad():  # the margin's own graph, kept for the backward pass: N numbers a node
            target = margin(*leaves)
        logits[rows, label] = target.detach()
        largest = logits.amax(1, keepdim=True)
        total = logits.sub_(largest).exp_().sum(1, keepdim=True)
        log_total = (largest + total.log()).squeeze(1)
        ctx.save_for_backward(logits.div_(total), rows, label)
        ctx.leaves, ctx.target = leaves, target
        ctx.mark_non_differentiable(predicted)
        return (log_total - target.detach()).mean(), predicted

    @staticmethod
    def backward(ctx, grad_loss, _):
        probability, rows, label = ctx.saved_tensors
        grad = probability * (grad_loss / len(label))                  # (N, C): d loss / d logit_j = p_j - [j = y]
        grad_target = grad[rows, label] - grad_loss / len(label)       # (N,): with respect to the replaced logit
        grad_leaves = torch.autograd.grad(ctx.target, ctx.leaves, grad_target, retain_graph=True)
        grad[rows, label] = grad_leaves[0]
        return grad, None, None, *grad_leaves[1:]
