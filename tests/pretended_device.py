"""A pretended GPU: tensors that say they are on the device "gpu:0", and compute on the CPU.

Inside `with PretendedDevice() as log:`, an operator that mixes devices as CUDA would refuse raises an error, and the
log records each place where a real device would make the host wait, each float64 tensor on the device, and all
operators.

It uses private functions of PyTorch; `available()` says whether this version has them.
"""
import traceback
from collections import Counter
from types import SimpleNamespace

import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Operators whose result depends on values, or is a number for the host: a GPU has to finish all work before.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "bincount")
COPIES = ("aten._to_copy", "aten.copy_", "aten._copy_from", "aten._pin_memory")


class PretendedDevice(TorchDispatchMode):
    """Context in which torch.device("gpu:0") exists; returns what happens on it: `operators`, a Counter of names, and
    `waits` and `float64`, lists of (operator, place)."""

    log = None

    def __enter__(self):
        register()
        super().__enter__()
        PretendedDevice.log = SimpleNamespace(operators=Counter(), waits=[], float64=[])
        return self.log

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


class DeviceTensor(torch.Tensor):
    """A tensor on the pretended device; `inner` is the tensor on the CPU that holds its values."""

    @staticmethod
    def __new__(cls, inner):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device("gpu:0"), requires_grad=False)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

    def new_tensor(self, data, dtype=None, device=None, requires_grad=False):
        wait("new_tensor")
        return DeviceTensor(self.inner.new_tensor(data, dtype=dtype))

    def tolist(self):
        wait("tolist")
        return self.inner.tolist()

    def __deepcopy__(self, memo):
        copy = DeviceTensor(self.inner.detach().clone()).requires_grad_(self.requires_grad)
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy


def available():
    """Return whether a device can be pretended: this depends on the version of PyTorch, and a real GPU prevents it."""
    if torch.cuda.is_available():
        return False
    try:
        register()
    except Exception:  # the private functions have moved or changed
        return False
    return True


def register():
    """Make torch.device("gpu") known, once."""
    if torch._C._get_privateuse1_backend_name() == "gpu":
        return
    from torch.utils import backend_registration as registration

    class Backend(registration._DummyBackendModule):
        def is_available(self):
            return True

        def get_amp_supported_dtype(self):
            return [torch.bfloat16, torch.float16]
    registration._setup_privateuseone_for_python_backend("gpu", backend_module=Backend())


def wait(operator):
    """Record that the host waits for the device, with the line of this project that asked for it."""
    PretendedDevice.log.waits.append((operator, place()))


def place():
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(str(ROOT)) and "/tests/" not in f.filename
              and "site-packages" not in f.filename]
    return f"{frames[-1].filename[len(str(ROOT)) + 1:]}:{frames[-1].lineno}" if frames else "backward pass or library"


def is_device(device):
    return device is not None and torch.device(device).type == "gpu"


def dispatch(function, args, kwargs):
    """Run an operator on the inner tensors, with the checks of a real device."""
    name, device = str(function), kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    copies = name.startswith(COPIES)
    others = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.ndim > 0]
    if ours and others and not copies:
        raise RuntimeError(f"{name} mixes devices at {place()}")
    by_mask = "index" in name and any(tensor.dtype == torch.bool for tensor in ours[1:])
    if ours and (by_mask or any(word in name for word in WAITS)):
        wait(name)
    on_device = bool(ours) if device is None else is_device(device)
    inner = {**kwargs, **({"device": torch.device("cpu")} if is_device(device) else {})}
    inner.pop("pin_memory", None)
    result = function(*tree_map(unwrap, args), **tree_map(unwrap, inner))
    if copies:
        source, on_device = (args[0], on_device) if "_to_copy" in name else (args[1], isinstance(args[0], DeviceTensor))
        asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True)
        if isinstance(source, torch.Tensor) and isinstance(source, DeviceTensor) != on_device and not asynchronous:
            wait(name)
        if "copy_" in name:
            return args[0]
    if torch.Tag.inplace_view in function.tags:
        with torch.utils._mode_utils.no_dispatch():
            function(*args, **inner)
        return args[0]
    if not on_device:
        return result
    PretendedDevice.log.operators[name] += 1
    PretendedDevice.log.float64 += [(name, place()) for leaf in tree_leaves(result)
                                    if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64]
    return tree_map(lambda leaf: wrap(leaf, ours), result)


def unwrap(leaf):
    return leaf.inner if isinstance(leaf, DeviceTensor) else leaf


def wrap(leaf, ours):
    """Return a result as a tensor on the device: the same object, if the operator worked in place."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    same = [tensor for tensor in ours if tensor.inner is leaf]
    return same[0] if same else DeviceTensor(leaf)
