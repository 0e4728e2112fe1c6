"""Devices: which one to use, which number format is fastest there, and how aligned faces become network input on it."""
import contextlib
import ctypes
from pathlib import Path

import torch
from joblib import cpu_count

from faces.files import InputError

PRECISION = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """Return the torch.device called `name`, with the index of a GPU, which torch.cuda.set_device() needs; "auto" picks
    CUDA if available, then Apple MPS, then the CPU. Raises InputError if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.ones(1, device=name).device    # runs a kernel, which this PyTorch may lack for an old GPU
    except Exception as error:  # each backend reports its absence by an exception of its own
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} is not available here ({reason}); pass --device cpu or another one, such "
                         "as cuda:1 or mps.") from None


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return the type that suits a network on this device: bfloat16, or else float16, or else float32. float16, which
    needs loss scaling, is for NVIDIA GPUs with tensor cores but without bfloat16: T4, RTX 20, and V100, for which
    PyTorch has to be built for CUDA 12.6. GTX 16 GPUs have the capability of RTX 20, but no tensor cores, and their
    float16 convolutions can give NaN (pytorch issue 77955)."""
    if device.type == "cpu":
        # bf16 is slower than float32 on Intel CPUs without AMX: a training step took 1.5 times as long on a Xeon.
        is_fast = torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and _is_amd())
        return torch.bfloat16 if is_fast else torch.float32
    if device.type != "cuda":
        return torch.float32
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability >= (8, 0):    # from Ampere on
        return torch.bfloat16
    has_tensor_cores = capability >= (7, 0) and "GTX 16" not in torch.cuda.get_device_name(device)
    return torch.float16 if has_tensor_cores else torch.float32


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the type called "bf16", "fp16" or "float32"; "auto" is the fastest one. Raises InputError if the device
    can't compute in it."""
    dtype = fast_dtype(device) if precision == "auto" else PRECISION[precision]
    if dtype == torch.float16 and device.type not in ("cuda", "cpu"):
        raise InputError(f"--precision fp16 needs loss scaling, which {device.type} can't do; use float32.")
    return dtype


def autocast(device, dtype):
    """Return the context in which a network computes in `dtype`; with float32, it changes nothing."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


@contextlib.contextmanager
def exact_float32(device):
    """Context in which convolutions compute in float32; by default, PyTorch lets those on NVIDIA GPUs round to TF32."""
    cudnn = torch.backends.cudnn
    if torch.device(device).type != "cuda":
        yield
    elif hasattr(cudnn, "conv"):    # since PyTorch 2.9; cudnn.flags() raises an error where this setting is used
        before, cudnn.conv.fp32_precision = cudnn.conv.fp32_precision, "ieee"
        try:
            yield
        finally:
            cudnn.conv.fp32_precision = before
    else:
        with cudnn.flags(enabled=cudnn.enabled, deterministic=cudnn.deterministic, allow_tf32=False):
            yield


def memory_format(device: torch.device | str) -> torch.memory_format:
    """Return the memory format in which convolutions are fast and correct on a device. On Apple's MPS, channels_last
    convolutions are slower, and the gradient of batch normalization is wrong or an error, depending on the release
    (pytorch issues 175189, 188371, 193349). On NVIDIA GPUs, channels_last is for tensor cores, from Volta on."""
    device = torch.device(device)
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0)
    return torch.contiguous_format if old or device.type == "mps" else torch.channels_last


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to a device without waiting for the device, as far as it supports that."""
    if device.type == "cuda":
        tensor = tensor.contiguous().pin_memory()    # a strided one would be copied from pageable memory
    # On MPS, an asynchronous copy reads the memory later, when it may have been reused.
    return tensor.to(device, non_blocking=device.type != "mps")


def _is_amd():
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def tune_cpu(device: torch.device):
    """Use no more threads than a container's quota allows; on a CPU, let glibc reuse large blocks of memory, which
    saves 6 % of a training step. This changes the whole process, so only scripts call it."""
    torch.set_num_threads(min(torch.get_num_threads(), cpu_count()))
    if device.type != "cpu":
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries have no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)            # M_MMAP_MAX: take blocks of any size from the heap
        mallopt(-1, 2**31 - 1)    # M_TRIM_THRESHOLD: never return the end of the heap to the system


def to_input(faces: torch.Tensor, flip: torch.Tensor | None = None) -> torch.Tensor:
    """Turn aligned faces, uint8 (N, 112, 96, 3), RGB, into network input, float32 (N, 3, 112, 96) in the memory format
    of the device, (x - 127.5) / 128; `flip`, bool (N,), says which faces to flip left to right, None flips none."""
    x = faces.permute(0, 3, 1, 2)                                      # in channels_last memory format
    if flip is not None:
        x = torch.where(flip[:, None, None, None], x.flip(3), x)       # of uint8, a quarter of the memory traffic
    return x.float().sub_(127.5).div_(128).contiguous(memory_format=memory_format(faces.device))
