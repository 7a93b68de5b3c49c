"""Resizes a picture in floating point, after rescaling (DINOv3's preprocessing); other models resize 8-bit values.

transformers resizes with torchvision, whose antialiased filters equal those of Pillow. Pillow resizes one float channel
at a time (mode ``F``). A test compares Pillow's result with torchvision's.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def resized_floats(
    image: Image.Image, size: tuple[int, int], resample: int, factor: float, crop: Mapping[str, int] | None = None
) -> NDArray[np.float32]:
    """Multiplies the values of an RGB picture by a factor, resizes them, and cuts out the centre.

    Args:
        image: The picture.
        size: Width and height after resizing, in pixels.
        resample: Pillow's code of the filter.
        factor: Factor on the 8-bit values.
        crop: Height and width of the centre crop, padded with zeros if it is larger than the picture; None for no crop.

    Returns:
        float32 ``[3, H, W]``.
    """
    values = np.asarray(image, np.float32) * np.float32(factor)  # [H, W, 3]
    resized = []
    for channel in range(3):
        one = Image.fromarray(np.ascontiguousarray(values[:, :, channel])).resize(size, resample=resample)
        if crop is not None:
            left, top = (one.width - crop["width"]) // 2, (one.height - crop["height"]) // 2
            one = one.crop((left, top, left + crop["width"], top + crop["height"]))
        resized.append(np.asarray(one, np.float32))
    return np.stack(resized)
