"""Bring an image of any mode into RGB."""

from __future__ import annotations

from PIL import ExifTags, Image, ImageOps


def to_rgb(image: Image.Image) -> Image.Image:
    """The image upright (EXIF) and in RGB, whatever its mode; transparency is laid over white.

    Raises ValueError for an image of more than 8 bits: its own values don't say which of them are black and white.
    """
    if image.mode[0] in "IF":
        raise ValueError(
            f"more than 8 bits (Pillow's mode {image.mode}) where only .png, .tif, .tiff, .pgm and .ppm files are "
            "looked at for them; set data.value_range, or rename or convert it"
        )
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # Pillow copies what is upright, too
        image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(canvas, image)
    return image if image.mode == "RGB" else image.convert("RGB")
