"""The processes of a training run: device, precision, data parallelism, gradient accumulation, and stopping cleanly."""
import contextlib
import copy
import os
import signal

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from faces.align import HEIGHT, WIDTH
from faces.cpu.training import for_training
from faces.device import has_bf16, keep_large_blocks, pick_device


class Run:
    """This process of a training run. `torchrun` starts one per device; without it there is just this one.

    Args:
        device: a name as faces.device.pick_device takes it; under torchrun, "cuda" is the GPU of this process.
        precision: "bf16", "float32", or "auto" for whichever is faster on the device.
        seed: of the initial weights. Order, mirroring and sampling have random generators of their own.

    Attributes:
        device: torch.device of this process.
        bf16: whether the network computes in bfloat16.
        rank, world_size: index of this process, and number of processes.

    Raises:
        InputError: this machine has no such device.
    """

    def __init__(self, device="auto", precision="auto", seed=0):
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world_size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.device = pick_device(device)
        self.bf16 = has_bf16(self.device) if precision == "auto" else precision == "bf16"
        self.stop_signal = None
        if self.world_size > 1:
            distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        keep_large_blocks(self.device)
        torch.manual_seed(seed)
        torch.backends.cudnn.benchmark = True

    @property
    def is_main_process(self):
        """Whether this process is the one that prints and writes files."""
        return self.rank == 0

    def print(self, *values):
        """Print in the main process."""
        if self.is_main_process:
            print(*values, flush=True)

    def autocast(self):
        """Return the context for the forward pass of the network."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def prepare(self, net, compile=False):
        """Move a network to the device and make it fast there; with several processes, average its gradients.

        Args:
            net: module; its parameters and their names stay.
            compile: use torch.compile, if it works here.
        """
        net = net.to(self.device, memory_format=torch.channels_last)
        x = torch.zeros(2, 3, HEIGHT, WIDTH, device=self.device)
        if not compile:
            net = for_training(net, self.device, torch.bfloat16 if self.bf16 else torch.float32)
        elif self._can_compile(net, x):
            net.compile()
        return data_parallel(net, x) if self.world_size > 1 else net

    def _can_compile(self, net, x):
        try:
            trial = copy.deepcopy(net)
            trial.compile()
            with self.autocast():
                trial(x).sum().backward()
        except Exception as error:  # no compiler, no Triton, an unsupported system: each has an exception of its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.print(f"--compile does not work here ({reason}); training continues without it.")
            return False
        return True

    @contextlib.contextmanager
    def stop_on_signals(self):
        """Context in which Ctrl-C and SIGTERM only set a flag for should_stop(), so that no step is cut in two."""
        def note(number, _):
            self.stop_signal = number
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def should_stop(self):
        """Return whether any process was asked to stop; all processes get the same answer."""
        if self.world_size > 1:
            asked = torch.tensor([self.stop_signal or 0], device=self.device)
            distributed.all_reduce(asked, distributed.ReduceOp.MAX)
            self.stop_signal = int(asked) or None
        return self.stop_signal is not None

    def finish(self, step, steps, path):
        """Say how the run ended; return the script's exit status, 130 after Ctrl-C and 0 otherwise.

        Args:
            step, steps: steps that were done, and of the whole run.
            path: the checkpoint.
        """
        if step == steps:
            self.print(f"training is complete after {step:,} step(s); the model is {path}")
        else:
            self.print(f"stopped after {step:,} of {steps:,} steps; continue with --resume")
        if self.world_size > 1:
            distributed.destroy_process_group()
        return 130 if self.stop_signal == signal.SIGINT else 0


def micro_batches(images, labels, count, *modules):
    """Split a batch for gradient accumulation; gradients are averaged over the processes in the last micro-batch only.

    Args:
        images, labels: (B, ...) tensors of this process; B is a multiple of `count`.
        modules: network and head, which may hold DistributedDataParallel.

    Yields:
        (images, labels) of B / count faces.
    """
    pairs = list(zip(images.chunk(count), labels.chunk(count)))
    with contextlib.ExitStack() as stack:
        for module in (m for parent in modules for m in parent.modules() if isinstance(m, DistributedDataParallel)):
            stack.enter_context(module.no_sync())
        yield from pairs[:-1]
    yield pairs[-1]


def data_parallel(net, x):
    """Return DistributedDataParallel around a network that has processed `x` once and is otherwise unchanged.

    After its first backward pass, DistributedDataParallel rearranges the buckets in which it sums gradients, which
    changes how three and more summands are rounded. With that pass done here, a resumed run equals an uninterrupted one
    bit for bit.
    """
    before = copy.deepcopy(net.state_dict())
    parallel = DistributedDataParallel(net)
    parallel(x).sum().backward()
    net.load_state_dict(before)
    net.zero_grad()
    return parallel


def unwrap(module):
    """Return the module inside DistributedDataParallel, or the module itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module
