"""kernels.c, compiled by this machine's C compiler when it is first called, in a second, and kept in the cache.

Where there is no compiler, or one that can't, `available()` is False and callers go on without.
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
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("kernels.c")
FOLDER = Path(__file__).resolve().parents[2] / "cache" / "kernels"
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
PARTS = 64      # of the rows that PReLU's gradient is summed over
LANES = 16      # what numbers of channels must be a multiple of


def enabled():
    """Return whether this package may be used: on x86, unless the environment variable FACES_CPU_KERNELS is 0."""
    return is_x86() and os.environ.get("FACES_CPU_KERNELS") != "0"


def is_x86():
    """Whether the processor is of the kind that Winograd's convolutions were measured on."""
    return platform.machine() in ("x86_64", "AMD64")


def available():
    """Return whether kernels.c is compiled and may be used."""
    return enabled() and _library() is not None


def supports_channels(channels):
    """Whether the kernels take so many channels."""
    return channels % LANES == 0 and channels <= 4096


def pixels_to_products(x):
    """B'dB of each tile d of an image: 4x4 pixels and the ring around them, 0 beyond the border.

    Args:
        x: float32 (N, C, H, W), in any memory order; C such as supports_channels().

    Returns:
        float32 (36, T, C), of the T = N ceil(H/4) ceil(W/4) tiles.
    """
    return _to_products(_library().pixels_to_products, x)


def gradients_to_products(x):
    """A e A' of each tile e of a gradient by the outputs, 4x4 pixels; arguments and result as of pixels_to_products."""
    return _to_products(_library().gradients_to_products, x)


def _to_products(function, x):
    x = x.contiguous(memory_format=torch.channels_last)
    count, channels, height, width = x.shape
    products = x.new_empty(36, count * -(-height // 4) * -(-width // 4), channels)
    function(*map(_at, (x, products)), count, height, width, channels, torch.get_num_threads())
    return products


def to_outputs(products, bias, slope, images):
    """PReLU of A'vA + bias of each tile's 6x6 products v, written into images.

    Args:
        products: float32 (36, T, K).
        bias, slope: float32 (K,); slope 1 leaves PReLU out.
        images: float32 (N, H, W, K), which the tiles make up; overwritten.
    """
    _library().to_outputs(*map(_at, (products, bias, slope, images)), *images.shape, torch.get_num_threads())


def prelu_gradients(gradient, x, slope):
    """Gradients of PReLU by its input, float32 (N, C, H, W), and by its slopes, float32 (C,), from that by its output.

    Args:
        gradient, x: float32 (N, C, H, W), in any memory order; C such as supports_channels().
        slope: float32 (C,).
    """
    gradient, x = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (gradient, x))
    of_x, of_slope = torch.empty_like(x), x.new_empty(PARTS, len(slope))
    _library().prelu_gradients(*map(_at, (gradient, x, slope, of_x, of_slope)), x.numel() // len(slope), len(slope),
                               PARTS, torch.get_num_threads())
    return of_x, of_slope.sum(0)


def _at(tensor):
    if not (tensor.dtype == torch.float32 and (tensor.is_contiguous() or
                                               tensor.is_contiguous(memory_format=torch.channels_last))):
        raise TypeError("the kernels take dense float32 tensors")
    return tensor.data_ptr()


@functools.cache
def _library():
    """The compiled file, or None."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        return None
    parts = (SOURCE.read_bytes(), *map(str.encode, (*compiler, *FLAGS)), _processor())
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16] + ".so"
    for folder in (lambda: contextlib.nullcontext(FOLDER), tempfile.TemporaryDirectory):    # the clone may be read-only
        with contextlib.suppress(OSError, subprocess.SubprocessError), folder() as place:
            return _typed(ctypes.CDLL(str(_compile(compiler, Path(place) / name))))
    return None


def _compile(compiler, path):
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:             # then moved: whole or absent
            made = Path(folder) / path.name
            subprocess.run([*compiler, *FLAGS, SOURCE, "-o", made], check=True, capture_output=True, timeout=60)
            os.replace(made, path)
    return path


def _typed(library):
    pointer, number, short = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    for name, arguments in {"pixels_to_products": [*2 * [pointer], *4 * [number], short],
                            "gradients_to_products": [*2 * [pointer], *4 * [number], short],
                            "to_outputs": [*4 * [pointer], *4 * [number], short],
                            "prelu_gradients": [*5 * [pointer], *2 * [number], short, short]}.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def _processor():
    """What -march=native looks at: a clone on a shared disk serves machines of several kinds."""
    try:
        return next(line for line in Path("/proc/cpuinfo").read_bytes().splitlines() if line.startswith(b"flags"))
    except (OSError, StopIteration):
        return platform.processor().encode()
