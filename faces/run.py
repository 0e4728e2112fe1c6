"""What surrounds a training loop: device, precision, processes, seeds, signals, and batches on the device."""
import contextlib
import copy
import ctypes
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from faces.align import HEIGHT, WIDTH
from faces.errors import InputError
from faces.fast_training import for_training
from faces.shard import ShardedHead


def pick_device(name="auto"):
    """Return the torch.device named, or for "auto" the best there is: CUDA, then Apple MPS, then the CPU.

    Raises:
        InputError: no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # each backend has its own way of saying that it is not there
        why = str(error).splitlines()[0]
        raise InputError(f"--device {name} can't be used here ({why}); try auto or cpu.") from None
    return device


def has_bf16(device):
    """Whether bfloat16 products are faster than float32 ones on this device.

    The environment variable FACES_BF16, 0 or 1, overrides the detection, which can't know processors to come.
    """
    if os.environ.get("FACES_BF16") in ("0", "1"):
        return os.environ["FACES_BF16"] == "1"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # AVX512-BF16 by itself pays on AMD's processors. On an Intel Xeon without AMX a training step took half as long
        # again as in float32.
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() and _is_amd()
    return False


def _is_amd():
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def keep_large_blocks(device):
    """On a CPU, let glibc use large blocks again; else each is mapped and cleared anew, which is 6 % of a step."""
    if device.type != "cpu":
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):   # no mallopt in other C libraries
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                  # M_MMAP_MAX: blocks of any size from the heap,
        mallopt(-1, 2**31 - 1)          # M_TRIM_THRESHOLD: whose end stays ours


def shifted(faces, shift):
    """Move faces by whole pixels; what comes into view repeats the border, as a black edge would tell the shift.

    Args:
        faces: uint8 (N, 112, 96, 3), on any device.
        shift: int64 (N, 2), pixels down and to the right.
    """
    face = torch.arange(len(faces), device=faces.device)[:, None, None]
    row = (torch.arange(HEIGHT, device=faces.device) - shift[:, :1]).clamp(0, HEIGHT - 1)      # (N, 112)
    column = (torch.arange(WIDTH, device=faces.device) - shift[:, 1:]).clamp(0, WIDTH - 1)     # (N, 96)
    return faces[face, row[:, :, None], column[:, None]]


def to_input(faces, mirror=None):
    """Turn aligned faces into network input.

    Args:
        faces: uint8 (N, 112, 96, 3), RGB, on any device.
        mirror: optional bool (N,), which faces to flip left to right.

    Returns:
        float32 (N, 3, 112, 96) in channels_last memory order, (x - 127.5) / 128.
    """
    x = faces.permute(0, 3, 1, 2).float().sub_(127.5).div_(128)
    return x if mirror is None else torch.where(mirror[:, None, None, None], x.flip(3), x)


class Run:
    """The machine's side of a training run; `torchrun` starts one process per device.

    Attributes:
        device: torch.device of this process.
        rank, world: number of this process, and of all.
        step: that of the batch that batches() gave last.
        output: folder of the run.
    """

    def __init__(self, args, method):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if self.world > 1 and args.device in ("auto", "cuda") \
            and torch.cuda.is_available() else args.device
        self.device = pick_device(name)
        keep_large_blocks(self.device)
        if self.world > 1:
            distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if args.batch_size % self.world:
            raise InputError(f"--batch-size {args.batch_size} does not divide by {self.world} processes.")
        self.bf16 = has_bf16(self.device) if args.precision == "auto" else args.precision == "bf16"
        self.workers = args.workers if args.workers is not None else 4 if self.device.type == "cuda" else 0
        self.output = args.output or Path(__file__).resolve().parents[1] / "runs" / method
        self.accumulate, self.compile = args.accumulate, args.compile
        if self.accumulate < 1 or args.batch_size % (self.world * self.accumulate):
            raise InputError(f"--batch-size {args.batch_size} does not divide into {self.accumulate} parts for each of "
                             f"{self.world} process(es); change --accumulate.")
        self.seed, self.mirror, self.jitter, self.step = args.seed, args.mirror, args.jitter, 0
        self.sharded, self.sample = args.shard_head or args.sample_centres is not None, args.sample_centres
        self.stop_signal = None
        if not self.first:
            sys.stdout = open(os.devnull, "w")  # one voice is enough
        torch.manual_seed(args.seed)  # initial weights; order and mirroring have generators of their own
        torch.backends.cudnn.benchmark = True

    @property
    def first(self):
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    @contextlib.contextmanager
    def first_goes_first(self):
        """Let the first process do something the others then find done, such as building a cache."""
        if self.world > 1 and not self.first:
            distributed.barrier()
        yield
        if self.world > 1 and self.first:
            distributed.barrier()

    def autocast(self):
        """Context of the network's forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def parallel(self, net):
        """Move a network to the device; with several processes, average its gradients over them."""
        net = net.to(self.device, memory_format=torch.channels_last)
        if not self.compile:
            net = for_training(net, self.device, torch.bfloat16 if self.bf16 else torch.float32)
        x = torch.zeros(2, 3, HEIGHT, WIDTH, device=self.device)
        if self.compile and self._compiles(net, x):
            net.compile()
        return averaging(net, x) if self.world > 1 else net

    def _compiles(self, net, x):
        try:
            probe = copy.deepcopy(net)
            probe.compile()
            with self.autocast():
                probe(x).sum().backward()
        except Exception as error:  # no compiler, no Triton, a system that inductor does not know: each says it its way
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"--compile can't be used here ({why}); training goes on without it.")
            return False
        return True

    def parts(self, images, labels, net, head):
        """Yield a step's batch in --accumulate equal parts, whose gradients add up; processes average after the last.

        Args:
            images, labels: (B, ...) tensors of this process.
            net, head: modules as parallel() and head() gave them.
        """
        pairs = list(zip(images.chunk(self.accumulate), labels.chunk(self.accumulate)))
        with contextlib.ExitStack() as not_yet:
            for module in (net, head):
                if isinstance(module, DistributedDataParallel):
                    not_yet.enter_context(module.no_sync())
            yield from pairs[:-1]
        yield pairs[-1]

    def head(self, method, classes, *settings):
        """Make a method's head on the device, whole in every process or its class centres spread over them."""
        if self.sharded:
            return ShardedHead(self, method, classes, *settings, sample=self.sample).to(self.device)
        head = method(classes, *settings).to(self.device)
        return DistributedDataParallel(head) if self.world > 1 else head

    @contextlib.contextmanager
    def stopping_cleanly(self):
        """Turn Ctrl-C and SIGTERM into `stop_signal`, so that a step is never cut in two."""
        def note(number, _):
            self.stop_signal = number
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def should_stop(self):
        """Whether any process was asked to stop; every process gets the same answer."""
        if self.world == 1:
            return self.stop_signal is not None
        asked = torch.tensor([self.stop_signal or 0], device=self.device)
        distributed.all_reduce(asked, distributed.ReduceOp.MAX)
        self.stop_signal = int(asked) or None
        return self.stop_signal is not None

    def finish(self, step, recipe):
        """Say how the run ended and return the script's exit status: 130 after Ctrl-C, else 0."""
        if step == recipe.steps:
            print(f"trained {step:,} steps; the model is {self.output / 'checkpoint.pt'}")
        else:
            print(f"stopped after {step:,} of {recipe.steps:,} steps; --resume goes on from here")
        if self.world > 1:
            distributed.destroy_process_group()
        return 130 if self.stop_signal == signal.SIGINT else 0

    def batches(self, faces, recipe, start):
        """Yield (float32 (B, 3, 112, 96), int64 (B,)) on the device for the steps from `start` to the recipe's end.

        Which faces a step sees, which of them mirrored and how far moved, depends on the seed and the step alone, so
        a run that is resumed sees what it would have seen.
        """
        order = Order(len(faces), recipe, self.seed, start, self.rank, self.world)
        cuda = self.device.type == "cuda"
        loader = DataLoader(_Batches(faces), sampler=order, batch_size=None, num_workers=self.workers,
                            pin_memory=cuda, prefetch_factor=4 if self.workers else None)
        for step, (images, labels) in enumerate(loader, start):
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            self.step = step
            yield self._augmented(images, step), labels

    def _augmented(self, images, step):
        def random(purpose):
            return np.random.default_rng((self.seed, step, self.rank, purpose))
        if self.jitter:
            shift = random(3).integers(-self.jitter, self.jitter, (len(images), 2), endpoint=True)
            images = shifted(images, torch.from_numpy(shift).to(self.device, non_blocking=True))
        if not self.mirror:
            return to_input(images)
        mirror = random(1).random(len(images)) < 0.5
        return to_input(images, torch.from_numpy(mirror).to(self.device, non_blocking=True))


def averaging(net, x):
    """DistributedDataParallel around a network that has seen input x once and is what it was before.

    After its first backward pass it rearranges the gradients it sums, and so the rounding of three and more summands.
    With that pass behind it, a resumed run sums in the order in which it would have gone on, bit for bit.
    """
    before = copy.deepcopy(net.state_dict())
    parallel = DistributedDataParallel(net)
    parallel(x).sum().backward()
    net.load_state_dict(before)
    net.zero_grad()
    return parallel


def no_decay_on_vectors(net, head, weight_decay):
    """Parameter groups for an optimizer: convolutions and matrices decay; biases, PReLU and batch norms don't."""
    parameters = [*net.parameters(), *head.parameters()]
    return [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]


class Order:
    """Yields, for each step from `start`, this process's share of the batch as positions in the set, int64 (B,).

    Every epoch is a new permutation of the set; what does not fill a batch at its end is dropped.
    """

    def __init__(self, faces, recipe, seed, start=0, rank=0, world=1):
        self.faces, self.recipe, self.seed, self.start, self.rank, self.world = faces, recipe, seed, start, rank, world

    def __len__(self):
        return self.recipe.steps - self.start

    def __iter__(self):
        epoch, order = None, None
        for step in range(self.start, self.recipe.steps):
            if step // self.recipe.epoch != epoch:
                epoch = step // self.recipe.epoch
                order = np.random.default_rng((self.seed, epoch, 0)).permutation(self.faces)
            first = step % self.recipe.epoch * self.recipe.batch
            yield order[first + self.rank:first + self.recipe.batch:self.world]


class _Batches(Dataset):
    def __init__(self, faces):
        self.faces = faces

    def __getitem__(self, index):
        images, labels = self.faces.batch(index)
        return torch.from_numpy(images), torch.from_numpy(labels)
