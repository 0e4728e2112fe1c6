"""SGD with momentum, for heads that may sample some of the class centers in each step."""
import contextlib

import torch


class SGD(torch.optim.SGD):
    """torch.optim.SGD with momentum that updates only the class centers that the head has drawn.

    On a GPU, it is a single kernel, which needs no copy of the gradients. Momentum starts as zeros, which gives the
    same updates as PyTorch's SGD; there, a first step that fp16 skips would leave it without a value.

    Args:
        params, settings: as torch.optim.SGD takes them.
        head: WholeHead or ShardedHead; its `sampled` is read in every step. None for a head without sampling.
    """

    def __init__(self, params, head=None, **settings):
        super().__init__(params, **settings)
        self.head = head
        for group in self.param_groups:
            if all(p.device.type not in ("cpu", "mps") for p in group["params"]):
                group["fused"], group["foreach"] = True, False
                self._step_supports_amp_scaling = True    # the kernel itself skips a step that overflowed
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def step(self, closure=None):
        if getattr(self, "found_inf", None) is not None:       # by GradScaler.step(); added up over the processes
            self.found_inf = self.found_inf.clamp(max=1)       # the kernel skips a step only if this is exactly 1
        with self.sampled_centers():    # does nothing inside Run.step(), which has entered it already
            return super().step(closure)

    @contextlib.contextmanager
    def sampled_centers(self):
        """Context in which the centers that were drawn are the parameter instead of all centers."""
        if self.head is None or self.head.sampled is None:
            yield
            return
        (rows, centers), self.head.sampled = self.head.sampled, None
        weight = self.head.module.weight
        momentum = self.state[weight]["momentum_buffer"]
        parameters = next(group["params"] for group in self.param_groups if any(p is weight for p in group["params"]))
        place = next(i for i, p in enumerate(parameters) if p is weight)
        parameters[place], self.state[centers]["momentum_buffer"] = centers, momentum[rows]
        try:
            yield
        finally:
            parameters[place] = weight
            with torch.no_grad():
                momentum.index_copy_(0, rows, self.state.pop(centers)["momentum_buffer"])
                weight.index_copy_(0, rows, centers)


def parameter_groups(net, head, weight_decay):
    """Return parameter groups for an optimizer: weight decay for matrices and convolutions, none for vectors.

    The vectors are biases, the slopes of PReLU, and scales and shifts of batch normalization.
    """
    parameters = [*net.parameters(), *head.parameters()]
    return [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]


def copy_to_cpu(tensor):
    """Return a copy of a tensor on the CPU."""
    return tensor.detach().to("cpu", copy=True)


def map_momentum(optimizer_state, function):
    """Replace each momentum in an optimizer's state dict by function(index of its parameter, momentum)."""
    state = {i: {"momentum_buffer": function(i, values["momentum_buffer"])} for i, values in
             optimizer_state["state"].items()}
    return {**optimizer_state, "state": state}


def load_momentum(optimizer, state):
    """Load copies of an optimizer's state, but not its settings, such as `fused`, which depend on the device."""
    optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})
    for p, values in optimizer.state.items():    # the kernel needs the memory format of the parameter on this device
        values["momentum_buffer"] = torch.empty_like(p).copy_(values["momentum_buffer"])
