"""What a member of a record is, by its extension and, where that does not settle it, by its first bytes.

A field is what follows the first dot of a member's name. Its last part says what it is: ``jpg``, ``0.jpg`` and
``left.jpg`` are pictures. A picture under any other name would be left out without a word, and a model trained and
judged on text alone; so bytes that are a picture's, wherever they stand, are read or are an error.
"""

from __future__ import annotations

_BY_NAME = frozenset({"jpg", "jpeg", "jpe", "jfif", "jif", "png", "webp"})
_BY_CONTENT = frozenset(
    {"img", "image", "picture", "photo", "pic", "gif", "bmp", "dib", "tif", "tiff", "ppm", "pgm", "pbm", "pnm"}
    | {"heic", "heif", "hif", "avif", "jp2", "j2k", "jxl", "svg", "psd", "ico", "tga", "exr", "hdr", "pcx"}
    | {"dng", "cr2", "nef", "arw"}
)
"""Names of pictures that need not be JPEG, PNG or WebP: their first bytes are looked at when a shard is scanned."""

READ = ("JPEG", "PNG", "WebP")
"""The formats that are decoded. Others of PIL's dozens of decoders never see the bytes of a shard."""

MOST_IMAGES = 1000
"""In one record: numbers of images have at most three digits."""

SNIFFED = 64
"""Bytes that :func:`picture_format` looks at."""


def is_image(name: str) -> bool:
    """Whether a field is read as a picture."""
    extension = name.rpartition(".")[2]
    return extension in _BY_NAME or extension in _BY_CONTENT


def needs_look(name: str) -> bool:
    """Whether only the first bytes of a field tell if it is a picture that can be read."""
    return name not in ("json", "cls") and name.rpartition(".")[2] not in _BY_NAME


def is_read(name: str) -> bool:
    """Whether anything reads a field; what is not read is carried along, never unpickled or run."""
    return name in ("json", "cls") or is_image(name)


def image_number(name: str) -> int | None:
    """The number of a numbered image field such as ``0.jpg``; None for every other field."""
    number, _, extension = name.partition(".")
    return int(number) if number.isdecimal() and len(number) < 4 and "." not in extension and is_image(name) else None


def field_order(name: str) -> tuple[int, int, str]:
    """json first, then images by number, then the rest by name."""
    number = image_number(name)
    return (0 if name == "json" else 1 if number is not None else 2, number or 0, name)


def picture_format(head: bytes, size: int) -> str | None:
    """The format of a picture by its first bytes (JPEG, PNG, WebP, GIF, …); None for what is no picture.

    Args:
        head: the first :data:`SNIFFED` bytes, or fewer.
        size: bytes of the whole.
    """
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if head[:2] == b"BM" and int.from_bytes(head[2:6], "little") == size:
        return "BMP"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"):
        return "HEIF"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "AVIF"
    if head.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")):
        return "JPEG 2000"
    if head.startswith((b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a")):
        return "JPEG XL"
    if head[:2] in (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6") and head[2:3].isspace() and head[2:].split()[0].isdigit():
        return "PNM"
    if head.startswith(b"8BPS"):
        return "PSD"
    if head.lstrip().startswith(b"<svg"):
        return "SVG"
    return None


def compression(head: bytes) -> str | None:
    """What a file is that should be a plain tar and is not, by its first bytes; None where they do not tell."""
    for magic, name in (
        (b"\x1f\x8b", "gzip"),
        (b"BZh", "bzip2"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"\x1f\x9d", "compress"),
    ):
        if head.startswith(magic):
            return name
    return None


def other_file(head: bytes) -> str | None:
    """What else a file is that is called ``.tar``; None where its first bytes do not tell."""
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive: unpack it and make a tar of its files"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: `git lfs pull` fetches it"
    if head.lstrip()[:1] == b"<":
        return "a web page, not a tar file: the download was refused or redirected"
    if head.startswith((b"Rar!", b"7z\xbc\xaf\x27\x1c")):
        return "an archive of another kind: unpack it and make a tar of its files"
    if head.lstrip()[:1] in (b"{", b"["):
        return "a JSON file, not a tar file"
    return None
