"""Bytes of an image → RGB. Three formats, no others: shards are not trusted.

PIL opens dozens of formats, some through external programs; here it may try JPEG, PNG and WebP. Nothing in a shard is
ever unpickled or run: the decoders are these, JSON, and decimal class numbers.

A picture is its pixels. Metadata that is damaged (EXIF, XMP, colour profiles, comments) costs the picture nothing but
what it would have said.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from scale_digrap.data.errors import SampleError
from scale_digrap.data.fields import READ, SNIFFED, picture_format

FORMATS = ("JPEG", "PNG", "WEBP")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageDecoder:
    """How images are decoded.

    Attributes:
        target_size: pixels. A JPEG whose sides are at least twice as long is decoded at a half, a quarter or an eighth
            of its size, not below this, which saves most of the time. None decodes everything at full size. The result
            is not resized to it: that is the image processor's part.
        max_pixels: a larger image is refused before its pixels are decoded; the default is PIL's own limit.
        max_record_pixels: of all images of a record together; the default takes 0.8 GB.
    """

    target_size: int | None = None
    max_pixels: int = 89_478_485
    max_record_pixels: int = 1 << 28

    def __call__(self, data: bytes) -> Image.Image:
        """An RGB image, upright by its EXIF orientation.

        Raises:
            SampleError: another format, damaged, or too large.
        """
        try:
            return self._decode(data)
        except SampleError:
            raise
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, … on damaged files
            if not isinstance(error, Image.DecompressionBombError):
                bare = without_metadata(data)
                if bare is not None:
                    try:
                        return self._decode(bare)
                    except Exception:
                        pass
            raise SampleError(f"its image cannot be decoded: {_reason(data, error)}") from None

    def check(self, images: Sequence[bytes]) -> None:
        """Refuse the images of a record that are too large together, by what they say of themselves.

        Raises:
            SampleError: over `max_record_pixels`.
        """
        if len(images) < 2:
            return
        total = 0
        for data in images:
            try:
                width, height = Image.open(io.BytesIO(data), formats=FORMATS).size
            except Exception:  # decoding it says what is wrong with it
                continue
            total += width * height
        if total > self.max_record_pixels:
            raise SampleError(
                f"its {len(images)} images have {total:,} pixels together, more than max_record_pixels="
                f"{self.max_record_pixels:,}: perhaps a decompression bomb"
            )

    def _decode(self, data: bytes) -> Image.Image:
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
        return to_rgb(upright(image))


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none that can be read."""
    if "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as many kinds of errors as there are ways to write it wrong
        return 1
    return value if type(value) is int and 1 <= value <= 8 else 1


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says, without what said so.

    `PIL.ImageOps.exif_transpose` does this and writes all other EXIF tags anew, which fails on one that is wrong.
    """
    turn = _TURNS.get(orientation(image))
    turned = image if turn is None else image.transpose(turn)
    for name in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
        turned.info.pop(name, None)
    return turned


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel: PIL's own conversion would cut everything above 255 to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def without_metadata(data: bytes) -> bytes | None:
    """A JPEG or PNG that holds its pixels alone; None for other bytes, or if nothing could be taken out.

    Only what says how to read the pixels stays: of a JPEG everything but application segments and comments (Adobe's
    segment, which tells the colour space, stays where it is whole), of a PNG its header, palette and pixels.
    """
    bare = None
    if data.startswith(b"\xff\xd8\xff"):
        bare = _bare_jpeg(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        bare = _bare_png(data)
    return bare if bare is not None and len(bare) < len(data) else None


def _bare_jpeg(data: bytes) -> bytes | None:
    parts, position = [data[:2]], 2
    while data[position : position + 1] == b"\xff" and position + 4 <= len(data):
        marker, size = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == 0xDA:  # the pixels begin
            return b"".join([*parts, data[position:]])
        adobe = marker == 0xEE and size >= 14
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE) or adobe:
            parts.append(data[position : position + 2 + size])
        position += 2 + size
    return None


def _bare_png(data: bytes) -> bytes:
    parts, position = [data[:8]], 8
    while position + 8 <= len(data):
        size, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            parts.append(data[position : position + 12 + size])
        position += 12 + size
    return b"".join(parts)


def _reason(data: bytes, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own text holds a memory address
        kind = picture_format(data[:SNIFFED], len(data))
        if kind is not None and kind not in READ:
            return f"it is a {kind} picture, and only JPEG, PNG and WebP are read"
        return "its header is damaged" if kind else "it is neither JPEG, PNG nor WebP"
    return " ".join(str(error).split())[:200] or type(error).__name__
