"""Compiles kernels.c with this machine's C compiler on first use (about a second), keeps the library in the cache, and
wraps its functions.

If there is no C compiler, or it fails, available() returns False and callers do without the kernels.
"""
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("kernels.c")
LIBRARY_FOLDER = Path(__file__).resolve().parents[2] / "cache" / "kernels"
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
CHANNEL_MULTIPLE = 16   # the widest vectors hold 16 floats, and the kernels have no code for a remainder
MAX_CHANNELS = 4096     # as in kernels.c
# The gradient of a slope is added up in this many partial sums, so that its rounding does not depend on the threads.
SUMS = 64


def available():
    """Return whether the kernels can be used: on x86, the only kind of processor on which they have been measured, with
    a C compiler, and unless the environment variable FACES_CPU_KERNELS is 0. The first call compiles them."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return is_x86 and os.environ.get("FACES_CPU_KERNELS") != "0" and _library() is not None


def supports_channels(channels):
    """Return whether the kernels can process this number of channels."""
    return channels % CHANNEL_MULTIPLE == 0 and channels <= MAX_CHANNELS


def transform_input(x):
    """Return B'd B for each tile d of a convolution's input: 4x4 pixels and the ring around them, 0 beyond the border.

    x is float32 (N, C, H, W), in any memory format, with C as supports_channels() has it; the result float32 (36, T, C)
    for T = N ceil(H/4) ceil(W/4) tiles.
    """
    return _transform(_library().transform_input, x)


def transform_grad_output(grad):
    """Return A e A' for each tile e, of 4x4 pixels, of the gradient with respect to a convolution's output.

    Arguments and result have the same shapes as those of transform_input().
    """
    return _transform(_library().transform_grad_output, grad)


def _transform(function, x):
    x = x.contiguous(memory_format=torch.channels_last)
    count, channels, height, width = x.shape
    transformed = x.new_empty(36, count * -(-height // 4) * -(-width // 4), channels)
    function(*map(_pointer, (x, transformed)), count, height, width, channels, torch.get_num_threads())
    return transformed


def transform_output(transformed, bias, slope, output):
    """Write PReLU(A'v A + bias) for each tile's 6x6 values v, in `transformed`, float32 (36, T, K), to `output`,
    float32 (N, H, W, K), which consists of the T tiles. `bias` and `slope` are float32 (K,); a slope of 1 disables
    PReLU."""
    _library().transform_output(*map(_pointer, (transformed, bias, slope, output)), *output.shape,
                                torch.get_num_threads())


def prelu_gradients(grad, x, slope):
    """Return the gradients of PReLU with respect to its input, float32 (N, C, H, W), and its slopes, float32 (C,).

    `grad`, of the output, and `x`, the input, are like the former, in any memory format, with C as supports_channels()
    has it.
    """
    grad, x = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (grad, x))
    grad_x, grad_slope = torch.empty_like(x), x.new_empty(SUMS, len(slope))
    _library().prelu_gradients(*map(_pointer, (grad, x, slope, grad_x, grad_slope)), x.numel() // len(slope),
                               len(slope), SUMS, torch.get_num_threads())
    return grad_x, grad_slope.sum(0)


def _pointer(tensor):
    dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    if tensor.dtype != torch.float32 or not dense:
        raise TypeError("kernels.c takes dense float32 tensors only; convert the tensor with .float().contiguous().")
    return tensor.data_ptr()


@functools.cache
def _library():
    """Return the compiled library; or None, after saying why, if it can't be compiled or loaded."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    problem = f"there is no C compiler {compiler[0]!r}"
    if shutil.which(compiler[0]) is not None:
        key = (SOURCE.read_bytes(), *map(str.encode, (*compiler, *FLAGS)), _instruction_sets())
        name = hashlib.sha256(b"\0".join(key)).hexdigest()[:16] + ".so"
        # If the clone is read-only, the library goes to a temporary folder, which is not needed once it is loaded.
        for open_folder in (lambda: contextlib.nullcontext(LIBRARY_FOLDER), tempfile.TemporaryDirectory):
            with contextlib.suppress(OSError, subprocess.SubprocessError, AttributeError), open_folder() as folder:
                return _declare(ctypes.CDLL(str(_compile(compiler, Path(folder) / name))))
        problem = f"the C compiler {compiler[0]!r} can't compile {SOURCE.name}"
    print(f"{problem}, so PyTorch's slower convolutions are used on this CPU; install gcc or clang, or set CC.",
          file=sys.stderr)
    return None


def _compile(compiler, path):
    """Compile kernels.c to `path`, unless that exists; return `path`."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # moving the finished file makes this atomic
            compiled = Path(folder) / path.name
            subprocess.run([*compiler, *FLAGS, SOURCE, "-o", compiled], check=True, capture_output=True, timeout=60)
            os.replace(compiled, path)
    return path


def _declare(library):
    """Declare the argument types of the library's functions; return the library."""
    pointer, long, int_ = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    for name, arguments in {"transform_input": [*2 * [pointer], *4 * [long], int_],
                            "transform_grad_output": [*2 * [pointer], *4 * [long], int_],
                            "transform_output": [*4 * [pointer], *4 * [long], int_],
                            "prelu_gradients": [*5 * [pointer], *2 * [long], int_, int_]}.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def _instruction_sets():
    """Return the processor's instruction sets, or as much as is known of it.

    -march=native compiles for them, and a clone on a shared disk may be used by machines with different processors.
    """
    try:
        return next(line for line in Path("/proc/cpuinfo").read_bytes().splitlines() if line.startswith(b"flags"))
    except (OSError, StopIteration):
        return platform.processor().encode()
