"""The processes of a training run: joining them, and what they have to do together or only once."""
import contextlib
import copy
import datetime
import os
import re
import time
from inspect import signature
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from faces.align import HEIGHT, WIDTH
from faces.device import autocast, pick_device, to_input, tune_cpu
from faces.files import InputError, TemporaryError, count_of, on_signals

# Buffers are not broadcast in each step, which would cost 63 copies for nothing; torch 2.14 renamed the option.
BUFFERS = {"forward_sync_buffers" if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
           else "broadcast_buffers": False}
DAY = datetime.timedelta(days=1)    # the longest that rank 0 may keep the others waiting outside of a step
STEP = datetime.timedelta(minutes=10)    # the longest that a process waits for the others within a step, on GPUs


class Processes:
    """This process of a training run. `torchrun` starts one per device; without it there is just this one.

    `device` is a name for pick_device(); under torchrun, "auto" and "cuda" are the GPU of this process. `signal` is the
    number of the signal that ended the run, or 0; `clock`, equal in all processes, are the seconds from the start to
    the last call of should_stop().
    """

    def __init__(self, device: str = "auto"):
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.group, self._exchange, self._received = None, None, 0
        # What the last operation exchanges outlives the group: at its end, PyTorch 2.6 could wait forever for a thread.
        self._nothing = torch.zeros(1, device="cpu")
        self.signal, self.clock, self.started = 0, 0.0, time.monotonic()
        self.device = self._join(device) if self.world_size > 1 else pick_device(device)
        tune_cpu(self.device)
        torch.backends.cudnn.benchmark = True    # batches have one size

    def _join(self, name):
        """Join the other processes; return the device of this one."""
        # A restart of torchrun would find the addresses of processes that have died (pytorch issue 135712), unless it
        # has a namespace of its own. Machines count restarts differently, so this is for one machine.
        store, _, _ = next(distributed.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(self.world_size):
            store = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        device = self._agree_on_device(name, store)
        group = {"store": store, "rank": self.rank, "world_size": self.world_size}
        if device.type == "cuda":
            torch.cuda.set_device(device)    # otherwise, each process would open a context on GPU 0 as well
            backend = "nccl" if distributed.is_nccl_available() else "gloo"    # Windows has no NCCL
            distributed.init_process_group(f"cpu:gloo,cuda:{backend}", timeout=STEP, device_id=device, **group)
        else:
            distributed.init_process_group("gloo", **group)
        # Where rank 0 works alone for minutes, the others wait on this group, because NCCL gives up after ten.
        self.group = distributed.new_group(backend="gloo", timeout=DAY)
        return device

    def _agree_on_device(self, name, store):
        """Return this process's device. Raise InputError in all if one process has none, or one of another type: a
        process that ended on its own would leave those of other machines waiting for it."""
        try:
            device = pick_device(torchrun_device(name))
            outcome = f"{device.type}\n"
        except InputError as error:
            outcome = f"\n{error}"
        store.set(f"device {self.rank}", outcome)
        outcomes = [store.get(f"device {rank}").decode().split("\n", 1) for rank in range(self.world_size)]
        problems = [f"process {rank} can't start: {problem}" for rank, (_, problem) in enumerate(outcomes) if problem]
        if not problems and len(types := {kind for kind, _ in outcomes}) > 1:
            problems = [f"some processes would train on {' and others on '.join(sorted(types))}; see why PyTorch finds "
                        "no GPU on one of the machines, or pass --device cpu."]
        if problems:
            with contextlib.suppress(RuntimeError):    # the store ends with its machine, once all have read it
                store.add("read", 1)
                while store.add("read", 0) < self.world_size:
                    time.sleep(0.1)
            raise InputError(problems[0])
        return device

    def __str__(self):
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        return f"{self.world_size} x {name}" if self.world_size > 1 else name

    def print(self, *values):
        """Print in rank 0."""
        if self.rank == 0:
            print(*values, flush=True)

    def barrier(self):
        """Wait until all processes are here, for up to a day, without an operation pending on the GPUs."""
        if self.world_size > 1:
            distributed.all_reduce(self._nothing, group=self.group)

    def on_main(self, function, *args, share: bool = True, **kwargs):
        """Call a function in rank 0; return its picklable result (share=False: None in the others) or raise its
        InputError in all processes."""
        if self.world_size == 1:
            return function(*args, **kwargs)
        result, outcome = None, [None, None]
        if self.rank == 0:
            try:
                result = function(*args, **kwargs)
                outcome[0] = result if share else None
            except InputError as error:
                outcome[1] = error
        distributed.broadcast_object_list(outcome, 0, group=self.group)
        if outcome[1] is not None:
            raise outcome[1]
        return result if self.rank == 0 else outcome[0]

    def check_same(self, **values):
        """Raise InputError if a value is different in rank 0: the processes would wait for each other forever."""
        first = self.on_main(lambda: values)
        for name, value in values.items():
            if value != first[name]:
                raise InputError(f"process {self.rank} has {name.replace('_', '-')} {value}, unlike rank 0 with "
                                 f"{first[name]}; start all processes with the same options and data (without a shared "
                                 "disk, --resume takes no options from the checkpoint).")

    @contextlib.contextmanager
    def signals(self):
        """Context of the training loop: Ctrl-C, SIGTERM and SIGHUP only make should_stop() true at the next step."""
        def note(number, _):
            self._received = number
        with on_signals(note):
            yield

    def should_stop(self) -> bool:
        """Return whether any process received a signal; all processes get the same answer at the same step. It is the
        answer of one step ago if there are several, so that nobody waits for the network."""
        now = torch.tensor([self._received, time.monotonic() - self.started], dtype=torch.float64, device="cpu")
        if self.world_size > 1:
            work = distributed.all_reduce(now, distributed.ReduceOp.MAX, group=self.group, async_op=True)
            last, self._exchange = self._exchange, (work, now)
            if last is None:
                return False
            last[0].wait()
            now = last[1]
        self.signal, self.clock = int(now[0]), float(now[1])
        return bool(self.signal)

    def leave(self, step: int, steps: int, checkpoint: Path) -> int:
        """Say how the run ended; return the exit status: 0 if it is complete, else 128 plus the signal."""
        if self.world_size > 1:
            if self._exchange is not None:
                self._exchange[0].wait()
            self.barrier()    # a process that ended earlier would break the connections of the others
            distributed.destroy_process_group()
        if step < steps:
            self.print(f"stopped after {step:,} of {count_of(steps, 'step~')}; continue with --resume")
            return 128 + self.signal
        self.print(f"training is complete after {count_of(step, 'step~')}; the model is {checkpoint}")
        return 0

    @contextlib.contextmanager
    def explained(self, advice: str):
        """Context in which too little memory (with advice what to do), or a lost process, is one sentence."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search(OUT_OF_MEMORY, str(error)):
                raise InputError(f"{self.device} is out of memory; {advice}.") from None
            if self.world_size > 1 and re.search(LOST_CONNECTION, str(error), re.I | re.S):
                raise TemporaryError(f"process {self.rank} lost the connection to another process, whose own message "
                                     f"says why it ended ({reason}); continue with --resume.") from None
            raise


def torchrun_device(name: str) -> str:
    """Return the device of this process of torchrun, for pick_device(); raise InputError if `name` can't be used."""
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if re.fullmatch(r"cuda:\d+", name):
        raise InputError(f"--device {name} would put all processes of torchrun on one GPU; leave it out, and choose "
                         "GPUs with the environment variable CUDA_VISIBLE_DEVICES.")
    if name == "mps" or (name == "auto" and not gpus and torch.backends.mps.is_available()):
        raise InputError("torchrun can't be used with Apple's MPS, which has a single GPU; run the script with python, "
                         "or pass --device cpu.")
    if name not in ("auto", "cuda") or not gpus:
        return "cpu" if name == "auto" else name
    if local >= gpus:
        raise InputError(f"torchrun started process {local + 1} on this machine, which has {count_of(gpus, 'GPU~')}; "
                         "lower --nproc-per-node.")
    return f"cuda:{local}"


# cuDNN reports too little memory as "unable to find an engine" (pytorch issue 108645).
OUT_OF_MEMORY = "out of memory|allocate memory|not enough memory|ALLOC_FAILED|unable to find an engine"
# NCCL's other errors, such as two processes on one GPU or a missing network interface, would only come again.
LOST_CONNECTION = (r"gloo.*(closed|reset|timed? ?out)|closed by (remote )?peer|connection reset|broken pipe|"
                   r"remote process exited|communicator was aborted|collective operation timeout")
# The backward pass recomputes batch normalization from five tensors. What is computed from more than inductor's default
# of four, it writes to memory, and reads it again in every kernel that needs it.
FUSE_MORE = {"realize_reads_threshold": 12, "realize_opcount_threshold": 100, "realize_acc_reads_threshold": 16}
WORTH_COMPILING = 2_000_000    # images on a GPU, about two minutes of training; compiling takes half a minute


def should_compile(device: torch.device, images: int) -> bool:
    """Return whether torch.compile is worth it for a process that trains on so many images."""
    return device.type == "cuda" and images >= WORTH_COMPILING


def compile_options() -> dict[str, int]:
    """Return the options with which torch.compile makes a sphere CNN fastest, as far as this PyTorch knows them."""
    return {name: value for name, value in FUSE_MORE.items() if name in torch._inductor.list_options()}


def compile_net(net: nn.Module, faces: int, device: torch.device, dtype: torch.dtype, say=print):
    """Compile a network in place for batches of so many faces; if that does not work here, say so and go on."""
    before = copy.deepcopy(net.state_dict())
    say("compiling the network; --no-compile trains without")
    try:
        net.compile(dynamic=False, options=compile_options())
        _one_pass(net, faces, device, dtype)
    except Exception as error:    # no compiler, no Triton, an unsupported system: each has an exception of its own
        net._compiled_call_impl = None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        say(f"torch.compile does not work here ({reason}); training continues without it.")
    net.load_state_dict(before)


def data_parallel(net: nn.Module, faces: int, device: torch.device, dtype: torch.dtype) -> DistributedDataParallel:
    """Return DistributedDataParallel around a network, after a forward and backward pass that leaves no other trace.

    After its first backward pass, DistributedDataParallel rearranges the buckets in which it sums gradients, which
    changes how three and more summands are rounded. With that pass done here, a resumed run equals an uninterrupted one
    bit for bit. The statistics of batch normalization that are saved are rank 0's.
    """
    before = copy.deepcopy(net.state_dict())
    parallel = DistributedDataParallel(net, gradient_as_bucket_view=True, **BUFFERS)
    _one_pass(parallel, faces, device, dtype)
    net.load_state_dict(before)
    return parallel


def _one_pass(net, faces, device, dtype):
    x = to_input(torch.zeros(faces, HEIGHT, WIDTH, 3, dtype=torch.uint8, device=device))
    with autocast(device, dtype):
        embedding = net(x)
    embedding.float().sum().backward()
    net.zero_grad()


@contextlib.contextmanager
def accumulating(active: bool, *modules: nn.Module):
    """Context in which, if it is active, gradients are only added up and not averaged over the processes."""
    with contextlib.ExitStack() as stack:
        for module in modules if active else ():
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield
