"""Pillow's modes of pictures that become RGB."""

from __future__ import annotations

from PIL import Image

from blip2edge.runtime.images.grey16 import Grey16

WITHOUT_PREMULTIPLIED_ALPHA = {"La": "LA", "RGBa": "RGBA"}
"""Modes whose colours are multiplied by their alpha, and the same without."""


def blend_on_white(image: Image.Image) -> Image.Image:
    """RGB as transformers' image processors make it of a picture that was not loaded by `load_image`."""
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    grey16 = Grey16.of(image, "the picture passed in")
    if grey16 is not None:
        return grey16.in_8_bits(image).convert("RGB")
    if image.mode in WITHOUT_PREMULTIPLIED_ALPHA:
        image = image.convert(WITHOUT_PREMULTIPLIED_ALPHA[image.mode])
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")
