"""What the detector takes as an image."""
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from faces.images import UnreadableImage, read_image

IMAGE_TYPES = (np.ndarray, torch.Tensor, Image.Image, str, Path)


def as_rgb(image):
    """Return what Detector.detect() takes as an image as uint8 RGB (H, W, 3).

    Raises:
        UnreadableImage: a file can't be read; the message starts with its path.
        ValueError: it is something else.
    """
    if isinstance(image, (str, Path)):
        try:
            return read_image(image)
        except UnreadableImage as error:
            raise UnreadableImage(f"{image}: {error}") from None
    if isinstance(image, Image.Image):
        if image.mode[0] in "IF":  # Pillow would turn everything above 255 into white
            raise ValueError(f"a PIL image must have 8 bits per channel, not mode {image.mode}; reduce it, or pass the "
                             "path of the file")
        try:
            return np.array(image.convert("RGB"))
        except OSError as error:  # Pillow reads a file only now
            raise UnreadableImage(f"{getattr(image, 'filename', '') or 'PIL image'}: {error}") from None
    kind = f"{image.dtype} {tuple(image.shape)}" if hasattr(image, "dtype") else type(image).__name__
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8:
        image = image.cpu().numpy()
    is_array = isinstance(image, np.ndarray) and image.dtype == np.uint8
    if not is_array or image.ndim < 2 or image.shape[2:] not in ((), (3,)):
        raise ValueError("an image must be uint8 RGB (H, W, 3) or gray (H, W), a PIL image, or the path of a file, not "
                         f"{kind}; scale floats to 0..255, drop alpha with image[..., :3], put channels last, and pass "
                         "a batch as a list")
    if image.ndim == 2:
        return np.repeat(image[..., None], 3, axis=2)
    return image
