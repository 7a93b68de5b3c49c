"""Converts pictures that are not 8-bit RGB to RGB: 16-bit greyscale, and pictures with transparency."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from blip2edge.errors import ImageError

_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_UNSIGNED = 1  # value of the tag _SAMPLE_FORMAT
_WHITE_IS_ZERO = 0  # value of the tag _PHOTOMETRIC
_16_BIT_FORMATS = ("JPEG2000", "PNG", "PPM", "TIFF")
_SCALED_BY_PILLOW = ("PNG", "PPM")  # formats whose mode "I" is 16-bit greyscale, scaled to 0…65535

WITHOUT_PREMULTIPLIED_ALPHA = {"La": "LA", "RGBa": "RGBA"}
"""Pillow's modes with colours that are multiplied by alpha, each with the same mode without this multiplication."""


@dataclass(frozen=True)
class Grey16:
    """How a 16-bit greyscale picture stores grey: values from 0 to `largest`; `inverted` is true if 0 is white."""

    largest: int = 2**16 - 1
    inverted: bool = False

    @classmethod
    def of(cls, image: Image.Image, name: str) -> Grey16 | None:
        """Returns the value range of a picture, which must not have been changed after opening; None for 8 bits.

        Raises:
            ImageError: The values of black and white are not known: the pixels are 32-bit integers or floating-point
                numbers, or the picture has more than 8 bits and does not come unchanged from a file.
        """
        tags = getattr(image, "tag_v2", {})  # of a TIFF file, whose values Pillow does not scale
        unsigned = set(tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))) == {_UNSIGNED}
        if image.mode[0] not in "IF" and unsigned:
            return None
        if not unsigned or not (
            (image.mode.startswith("I;16") and image.format in _16_BIT_FORMATS)
            or (image.mode == "I" and image.format in _SCALED_BY_PILLOW)
        ):
            sign = " with a sign" if image.mode == "L" else ""
            raise ImageError(
                f"{name}: the pixels have Pillow's mode {image.mode}{sign}, in which the "
                "values of black and white are not known",
                "pass the file itself if it has 16 bits and no sign; otherwise scale the values to 0…255 and save the "
                "picture with 8 bits",
            )
        if not tags:
            return cls()
        return cls(2 ** tags[_BITS_PER_SAMPLE][0] - 1, tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO)

    def in_8_bits(self, image: Image.Image) -> Image.Image:
        """Converts the picture to mode L (8 bits); values are scaled to 0…255 and rounded."""
        table = ((np.arange(self.largest + 1) * 255 + self.largest // 2) // self.largest).astype(np.uint8)
        return Image.fromarray(np.take(255 - table if self.inverted else table, np.asarray(image), mode="clip"))


def blend_on_white(image: Image.Image) -> Image.Image:
    """Converts a Pillow image to RGB; a white background shows through transparent parts.

    transformers' image processors do the same with an image that did not pass `load_image`.
    """
    grey16 = Grey16.of(image, "the picture passed in")
    if grey16 is not None:
        return grey16.in_8_bits(image).convert("RGB")
    if image.mode in WITHOUT_PREMULTIPLIED_ALPHA:
        image = image.convert(WITHOUT_PREMULTIPLIED_ALPHA[image.mode])
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")
