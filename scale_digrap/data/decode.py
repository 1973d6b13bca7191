"""Bytes of an image → RGB. Three formats, no others: shards are not trusted.

PIL opens dozens of formats, some through external programs; here it may try JPEG, PNG and WebP. Nothing in a shard is
ever unpickled or run: the decoders are these, JSON, and decimal class numbers.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from scale_digrap.data.errors import SampleError

FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True)
class ImageDecoder:
    """How images are decoded.

    Attributes:
        target_size: pixels. A JPEG whose sides are at least twice as long is decoded at a half, a quarter or an eighth
            of its size, not below this, which saves most of the time. None decodes everything at full size. The result
            is not resized to it: that is the image processor's part.
        max_pixels: a larger image is refused before its pixels are decoded; the default is PIL's own limit.
    """

    target_size: int | None = None
    max_pixels: int = 89_478_485

    def __call__(self, data: bytes) -> Image.Image:
        """An RGB image, upright by its EXIF orientation.

        Raises:
            SampleError: another format, damaged, or too large.
        """
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > self.max_pixels:
                raise SampleError(
                    f"its image of {width} × {height} pixels is larger than max_pixels={self.max_pixels}: perhaps a "
                    "decompression bomb"
                )
            if self.target_size is not None and image.format == "JPEG":
                image.draft("RGB", (self.target_size, self.target_size))
            image.load()
            upright = ImageOps.exif_transpose(image) if "exif" in image.info else image
            return _rgb(upright)
        except SampleError:
            raise
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, … on damaged files
            reason = " ".join(str(error).split())[:200]
            raise SampleError(f"its image cannot be decoded: {reason or type(error).__name__}") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel: PIL's own conversion would cut everything above 255 to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
