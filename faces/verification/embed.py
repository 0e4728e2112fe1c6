"""Turn aligned faces into embeddings, in batches; each face and its flipped image pass through the network once."""
import copy

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from faces.cpu.layers import for_inference
from faces.device import autocast, exact_float32, memory_format, to_input
from faces.files import progress_bar

FLIP = ("concatenate", "sum", "none")


def embed(net: nn.Module, faces: np.ndarray, device: torch.device | str, batch_size: int | None = None,
          flip: str = "concatenate", dtype: torch.dtype = torch.float32, progress: bool = True) -> np.ndarray:
    """Embed aligned faces, uint8 (N, 112, 96, 3), RGB, N >= 1, with a copy of a network, (B, 3, 112, 96) to (B, D), in
    eval mode. Returns float32 (N, D), or (N, 2 D) if concatenated; not normalized.

    `batch_size` changes the result by rounding only. `flip` is one of FLIP: "concatenate" appends the embedding of the
    flipped image, "sum" adds it, "none" does not compute it. `dtype` is torch.float32, or the type for autocast.
    """
    batch_size = batch_size or default_batch_size(device)
    net, parts = optimized_copy(net, device, dtype, len(faces)), []
    with torch.inference_mode(), autocast(device, dtype), exact_float32(device), \
            progress_bar(total=len(faces), desc="embedding", unit=" faces", leave=False, disable=not progress) as bar:
        for start in range(0, len(faces), batch_size):
            pixels = torch.from_numpy(np.array(faces[start:start + batch_size]))
            batch = to_input(pixels.to(device))    # the device receives one byte per value
            output = net(batch).float()
            if flip != "none":
                flipped = net(batch.flip(3)).float()
                output = output + flipped if flip == "sum" else torch.cat((output, flipped), 1)
            parts.append(output.cpu().numpy())
            bar.update(len(output))
    return np.concatenate(parts)


def default_batch_size(device: torch.device | str) -> int:
    """Return how many faces to embed at a time: on a CPU as many as fit its caches, else enough to fill the device."""
    return 32 if torch.device(device).type == "cpu" else 256


def optimized_copy(net: nn.Module, device: torch.device | str, dtype: torch.dtype = torch.float32,
                   images: int = 10**6) -> nn.Module:
    """Return a copy of a network on a device, in eval mode, that computes the same embeddings faster, as far as its
    layers are named as in net.py. It is optimized to embed about `images` images in `dtype`."""
    fast = fold_batch_norm(copy.deepcopy(net).eval())
    if torch.device(device).type == "cpu" and dtype == torch.float32:
        for_inference(fast, images)
    return fast.to(device, memory_format=memory_format(device))


def fold_batch_norm(net: nn.Module) -> nn.Module:
    """Fold, in place, each batch normalization NAMEbn or NAME_bn of a network in eval mode into its layer NAME."""
    for name, norm in list(net.named_children()):
        before = name.removesuffix("bn").removesuffix("_")
        layer = getattr(net, before, None)
        if isinstance(norm, nn.BatchNorm2d) and isinstance(layer, nn.Conv2d):
            setattr(net, before, fuse_conv_bn_eval(layer, norm))
        elif isinstance(norm, nn.BatchNorm1d) and isinstance(layer, nn.Linear):
            setattr(net, before, fuse_linear_bn_eval(layer, norm))
        else:
            continue
        setattr(net, name, nn.Identity())
    return net
