"""Turn aligned faces into embeddings: large batches, each face and its mirror image through the network once."""
import numpy as np
import torch
from tqdm import tqdm

from faces.inference import for_inference
from faces.run import to_input

MIRROR = ("concatenate", "sum", "none")


def embed(net, faces, device, batch_size=None, mirror="concatenate", dtype=torch.float32, progress=True):
    """Embed aligned faces in eval mode, by a copy of the network made for it; the network itself stays as it is.

    Args:
        net: module, (B, 3, 112, 96) to (B, D).
        faces: uint8 (N, 112, 96, 3), RGB, N >= 1; a memory map will do.
        device: torch.device.
        batch_size: faces per batch, None for default_batch_size(); no figure depends on it beyond rounding.
        mirror: what becomes of the embedding of the mirror image: "concatenate" puts it behind the face's own,
            "sum" adds the two, "none" does without.
        dtype: torch.float32, or what autocast is to compute in.
        progress: show a bar.

    Returns:
        float32 (N, D), or (N, 2 D) if concatenated; not normalised.
    """
    if mirror not in MIRROR:
        raise ValueError(f"mirror is one of {', '.join(MIRROR)}, not {mirror!r}")
    batch_size = batch_size or default_batch_size(device)
    net, parts = for_inference(net, device, dtype, len(faces)), []
    with torch.inference_mode(), _autocast(device, dtype), \
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


def default_batch_size(device):
    """Return how many faces to embed at a time: on a CPU as many as its caches hold, elsewhere enough to fill it."""
    return 32 if torch.device(device).type == "cpu" else 256


def _autocast(device, dtype):
    device = torch.device(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
