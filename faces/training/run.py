"""The processes of a training run: device, precision, data parallelism, gradient accumulation, and stopping cleanly."""
import contextlib
import copy
import datetime
import os
import re
import time

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from faces.align import HEIGHT, WIDTH
from faces.cpu.training import for_training
from faces.device import autocast, can_autocast, fast_dtype, keep_large_blocks, memory_format, pick_device
from faces.files import InputError, TemporaryError
from faces.signals import handled_by, leave_lost_terminal
from faces.text import count_of

PRECISION = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DAY = datetime.timedelta(days=1)    # the longest that one process may keep the others waiting outside of a step


class Run:
    """This process of a training run. `torchrun` starts one per device; without it there is just this one.

    Args:
        device: a name as faces.device.pick_device takes it; under torchrun, "auto" and "cuda" are the GPU of this
            process.
        precision: "bf16", "fp16", "float32", or "auto" for the one that suits the device.
        seed: of the initial weights. Order, mirroring and sampling have random generators of their own.

    Attributes:
        device: torch.device of this process.
        dtype: type in which the network computes; `precision` is its name.
        rank, world_size: index of this process, and number of processes.
        scaler: scales the loss so that gradients do not underflow in fp16; does nothing in other types.
        clock: seconds from the start to the last call of should_stop(), the same in all processes.

    Raises:
        InputError: this machine has no such device, or it can't be used like this.
    """

    def __init__(self, device="auto", precision="auto", seed=0):
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device, self.cpu_group = pick_device(self._device_name(device)), None
        if self.world_size > 1:
            self._join_processes()
        self.dtype = self._pick_dtype(precision)
        self.scaler = self._make_scaler()
        self.started, self.clock, self.stop_signal = time.monotonic(), 0.0, None
        self._own_signal, self._exchange = 0, None
        keep_large_blocks(self.device)
        torch.manual_seed(seed)

    def _device_name(self, name):
        """Return the device of this process: the one that was asked for, or under torchrun the process's own GPU."""
        if self.world_size == 1:
            return name
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if re.fullmatch(r"cuda:\d+", name):
            raise InputError(f"--device {name} would put all processes of torchrun on one GPU; leave it out, and "
                             "choose GPUs with the environment variable CUDA_VISIBLE_DEVICES.")
        if name == "mps" or (name == "auto" and not gpus and torch.backends.mps.is_available()):
            raise InputError("torchrun can't be used with Apple's MPS, which has a single GPU; run the script with "
                             "python, or pass --device cpu.")
        if name == "cpu" or not gpus:
            return "cpu" if name == "auto" else name
        if local >= gpus:
            raise InputError(f"torchrun started process {local + 1} on this machine, which has "
                             f"{count_of(gpus, 'GPU~')}; lower --nproc-per-node.")
        return f"cuda:{local}"

    def _join_processes(self):
        # A restart of torchrun would find the addresses of processes that have died (pytorch issue 135712), unless it
        # has a namespace of its own. Machines count restarts differently, so this is for one machine.
        store, _, _ = next(distributed.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(self.world_size):
            store = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        group = {"store": store, "rank": self.rank, "world_size": self.world_size}
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)    # otherwise, each process would open a context on GPU 0 as well
            distributed.init_process_group("cpu:gloo,cuda:nccl", device_id=self.device, **group)
        else:
            distributed.init_process_group("gloo", **group)
        # Where one process works alone for minutes, the others wait on this group, because NCCL gives up after 30.
        self.cpu_group = distributed.new_group(backend="gloo", timeout=DAY)

    def _pick_dtype(self, precision):
        dtype = fast_dtype(self.device) if precision == "auto" else PRECISION[precision]
        if dtype == torch.float16 and self.device.type not in ("cuda", "cpu"):
            raise InputError(f"--precision fp16 needs loss scaling, which {self.device.type} can't do; use float32.")
        if dtype != torch.float32 and not can_autocast(self.device, dtype):
            self.print(f"{str(dtype)[6:]} is not available on {self.device.type} here; training uses float32.")
            return torch.float32
        return dtype

    def _make_scaler(self):
        kind, enabled = self.device.type, self.dtype == torch.float16
        if enabled and self.world_size > 1:  # all processes must skip the same steps
            from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
            return ShardedGradScaler(device=kind)
        return torch.amp.GradScaler(kind, enabled=enabled)

    @property
    def is_main_process(self):
        """Whether this process is the one that prints and writes files."""
        return self.rank == 0

    @property
    def precision(self):
        """Name of the type in which the network computes: "bf16", "fp16" or "float32"."""
        return next(name for name, dtype in PRECISION.items() if dtype == self.dtype)

    @property
    def devices(self):
        """The devices of the run in words, such as "2 x NVIDIA H100"."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        return f"{self.world_size} x {name}" if self.world_size > 1 else name

    def print(self, *values):
        """Print in the main process."""
        if self.is_main_process:
            print(*values, flush=True)

    def barrier(self):
        """Wait until all processes are here, for up to a day, without an operation pending on the GPUs."""
        if self.world_size > 1:
            distributed.all_reduce(torch.zeros(1), group=self.cpu_group)

    def on_main(self, function, *args):
        """Call a function in the main process; return its result, or raise its InputError, in all processes.

        The others wait for up to a day. The result must be picklable, with tensors on the CPU.
        """
        if self.world_size == 1:
            return function(*args)
        outcome = [None, None]
        if self.is_main_process:
            try:
                outcome[0] = function(*args)
            except InputError as error:
                outcome[1] = error
        distributed.broadcast_object_list(outcome, 0, group=self.cpu_group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def autocast(self):
        """Return the context for the forward pass of the network."""
        return autocast(self.device, self.dtype)

    def prepare(self, net, batch, compile=False, sync_bn=False):
        """Move a network to the device and make it fast there; with several processes, average its gradients.

        Args:
            net: module; its parameters keep their names.
            batch: faces per micro-batch, over all processes.
            compile: use torch.compile, if it works here.
            sync_bn: whether the processes share the statistics of batch normalization.

        Raises:
            InputError: sync_bn on a device that does not support it, or with compile.
        """
        torch.backends.cudnn.benchmark = True    # from here on, batches have one size
        if sync_bn and self.world_size > 1:
            if self.device.type == "cpu":
                raise InputError("--sync-bn is not available on the CPU; leave it out.")
            if compile:
                raise InputError("--sync-bn can't be compiled, because the CPU waits for the GPU in each layer; leave "
                                 "out --sync-bn or --compile.")
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        net = net.to(self.device, memory_format=memory_format(self.device))
        x = torch.zeros(batch // self.world_size if compile else 2, 3, HEIGHT, WIDTH, device=self.device)
        x = x.contiguous(memory_format=memory_format(self.device))
        if compile:
            self._compile(net, x)
        else:
            net = for_training(net, self.device, self.dtype)
        self.barrier()  # the data may take hours longer on one machine than on another
        return data_parallel(net, x, self.autocast()) if self.world_size > 1 else net

    def _compile(self, net, x):
        """Compile a network for the shape of `x` alone: a compilation for all shapes would be slower."""
        before = copy.deepcopy(net.state_dict())
        try:
            net.compile(dynamic=False)
            _forward_and_backward(net, x, self.autocast())
        except Exception as error:  # no compiler, no Triton, an unsupported system: each has an exception of its own
            net._compiled_call_impl = None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.print(f"--compile does not work here ({reason}); training continues without it.")
        net.load_state_dict(before)
        net.zero_grad()

    def step(self, optimizer):
        """Do a step of faces.training.optimizer.SGD, unless gradients overflowed in fp16.

        All processes skip the same steps, and the scale of the loss is halved after one.
        """
        with optimizer.sampled_centers():      # whose gradients the scaler has to see
            self.scaler.unscale_(optimizer)    # step() would not exchange overflows between processes
            self.scaler.step(optimizer)
        self.scaler.update()

    @contextlib.contextmanager
    def guard(self):
        """Context of the training loop: Ctrl-C, SIGTERM and SIGHUP only set a flag for should_stop().

        So no step is cut in two.
        """
        def note(number, _):
            self._own_signal = number
            leave_lost_terminal()
        with handled_by(note):
            yield

    @contextlib.contextmanager
    def explained(self, memory_advice):
        """Context of a run in which the error is one sentence if memory runs out or another process ends.

        Args:
            memory_advice: what to do if the memory of the device is too small.

        Raises:
            InputError: out of memory.
            TemporaryError: another process has ended.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise InputError(f"{self.device} is out of memory; {memory_advice}.") from None
            if self.world_size > 1 and is_lost_connection(error):
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise TemporaryError(f"process {self.rank} lost the connection to another process, whose own message "
                                     f"says why it ended ({reason}); continue with --resume.") from None
            raise

    def should_stop(self):
        """Return whether any process was asked to stop; all processes get the same answer at the same step.

        With several processes, it is the answer of one step ago, so that nobody waits for the network or the GPU.
        """
        now = torch.tensor([self._own_signal, time.monotonic() - self.started], dtype=torch.float64)
        if self.world_size > 1:
            work = distributed.all_reduce(now, distributed.ReduceOp.MAX, group=self.cpu_group, async_op=True)
            last, self._exchange = self._exchange, (work, now)
            if last is None:
                return False
            last[0].wait()
            now = last[1]
        number, self.clock = now.tolist()
        self.stop_signal = int(number) or None
        return self.stop_signal is not None

    def finish(self, step, steps, path):
        """Say how the run ended; return the script's exit status: 0 if it is complete, else 128 plus the signal.

        Args:
            step, steps: steps that were done, and of the whole run.
            path: the checkpoint.
        """
        if self.world_size > 1:
            if self._exchange is not None:
                self._exchange[0].wait()
            self.barrier()  # a process that ended earlier would break the connections of the others
            distributed.destroy_process_group()
        if step >= steps:
            self.print(f"training is complete after {count_of(step, 'step~')}; the model is {path}")
            return 0
        self.print(f"stopped after {step:,} of {count_of(steps, 'step~')}; continue with --resume")
        return 128 + self.stop_signal


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


def data_parallel(net, x, context=None):
    """Return DistributedDataParallel around a network that has processed `x` once and is otherwise unchanged.

    After its first backward pass, DistributedDataParallel rearranges the buckets in which it sums gradients, which
    changes how three and more summands are rounded. With that pass done here, a resumed run equals an uninterrupted one
    bit for bit. The running statistics of batch normalization are those of the main process, which are the ones that
    are saved; sending them to the others in each step would cost 63 copies and two broadcasts for nothing.

    Args:
        net: module on the device of this process.
        x: input for the network.
        context: of the forward pass, such as autocast.
    """
    before = copy.deepcopy(net.state_dict())
    parallel = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)
    _forward_and_backward(parallel, x, context or contextlib.nullcontext())
    net.load_state_dict(before)
    net.zero_grad()
    return parallel


def _forward_and_backward(net, x, context):
    with context:
        embedding = net(x)
    embedding.float().sum().backward()


def unwrap(module):
    """Return the module inside DistributedDataParallel, or the module itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def is_out_of_memory(error):
    """Return whether an exception of any backend, or of Python, says that memory ran out.

    If no algorithm of cuDNN finds enough memory, PyTorch says that it was unable to find an engine (issue 108645).
    """
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(
        re.search(r"out of memory|allocate memory|not enough memory|ALLOC_FAILED|unable to find an engine", str(error)))


def is_lost_connection(error):
    """Return whether an exception says that another process of the run can't be reached."""
    return isinstance(error, distributed.DistError) or bool(
        re.search(r"gloo.*(closed|reset|timed? ?out)|closed by peer|Connection reset|NCCL", str(error), re.S | re.I))
