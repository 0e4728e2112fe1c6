"""Turn aligned faces into embeddings: large batches, each face and its mirror image through the network once."""
import contextlib

import numpy as np
import torch
from tqdm import tqdm

from faces.run import to_input

MIRROR = ("concatenate", "sum", "none")


def embed(net, faces, device, batch_size=256, mirror="concatenate", dtype=torch.float32, progress=True):
    """Embed aligned faces; the network is in eval mode meanwhile and in its former mode afterwards.

    Args:
        net: module, (B, 3, 112, 96) to (B, D), on `device`.
        faces: uint8 (N, 112, 96, 3), RGB, N >= 1; a memory map will do.
        device: torch.device.
        batch_size: faces per batch; no figure depends on it beyond rounding.
        mirror: what becomes of the embedding of the mirror image: "concatenate" puts it behind the face's own,
            "sum" adds the two, "none" does without.
        dtype: torch.float32, or what autocast is to compute in.
        progress: show a bar.

    Returns:
        float32 (N, D), or (N, 2 D) if concatenated; not normalised.
    """
    if mirror not in MIRROR:
        raise ValueError(f"mirror is one of {', '.join(MIRROR)}, not {mirror!r}")
    parts = []
    with _eval_mode(net), torch.inference_mode(), _autocast(device, dtype), \
            tqdm(total=len(faces), desc="embedding", unit="face", disable=not progress, leave=False) as bar:
        for start in range(0, len(faces), batch_size):
            pixels = torch.from_numpy(np.array(faces[start:start + batch_size]))
            batch = to_input(pixels.to(device))  # one byte per value travels to the device
            output = net(batch).float()
            if mirror != "none":
                flipped = net(batch.flip(3)).float()
                output = output + flipped if mirror == "sum" else torch.cat((output, flipped), 1)
            parts.append(output.cpu().numpy())
            bar.update(len(output))
    return np.concatenate(parts)


@contextlib.contextmanager
def _eval_mode(net):
    was_training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(was_training)


def _autocast(device, dtype):
    device = torch.device(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
