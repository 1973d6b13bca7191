"""Random access to samples: formats, images, classes, and shards that change or fail under the reader."""

import io
import json
import os
import pickle
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image

from scale_digrap.data.dataset import ShardDataset
from scale_digrap.data.decode import ImageDecoder
from scale_digrap.data.errors import DataError, ReadError, SampleError, ShardDamage
from scale_digrap.data.faults import FaultPolicy
from scale_digrap.data.index import Manifest, index_shards
from tests.data import made


def record(number, **more):
    return json.dumps(made.meta(number, **more)).encode()


def test_samples_are_what_was_written(tmp_path):
    dataset = ShardDataset(made.write(tmp_path, 25, text_only={3}))
    assert len(dataset) == 25
    sample = dataset[17]
    assert (sample.key, sample.question, sample.answers, sample.question_id) == ("s00017", "number 17", ["17"], "17")
    assert sample.extra == {"image_id": 17}
    assert sample.image.mode == "RGB"
    assert sample.image.getpixel((0, 0)) == (17, 17, 17)
    assert dataset[3].images == []
    assert dataset[-1].key == "s00024"
    assert dataset.keys == [f"s{i:05d}" for i in range(25)]
    with pytest.raises(IndexError):
        dataset[25]


def test_several_images_and_grouped_questions(tmp_path):
    group = {"questions": [made.meta(i, kind=f"k{i}") for i in (5, 6, 7)], "image_id": 4, "kind": "k"}
    members = [("a.0.png", made.png(1)), ("a.1.jpg", made.jpg(200)), ("a.json", record(1))]
    members += [(f"b.{i}.png", made.png(i)) for i in range(11)] + [("b.json", json.dumps(group).encode())]
    members += [("c.json", record(9))]
    dataset = ShardDataset(str(made.tar(tmp_path / "a.tar", members)))
    assert dataset.keys == ["a", "b#0", "b#1", "b#2", "c"]
    assert [image.getpixel((0, 0))[0] for image in dataset[0].images] == [1, 200]
    for question in range(3):
        sample = dataset[1 + question]
        assert (sample.key, sample.question_id) == (f"b#{question}", str(5 + question))
        assert sample.extra == {"image_id": 4, "kind": f"k{5 + question}"}
        assert [image.getpixel((0, 0))[0] for image in sample.images] == list(range(11)), "not in order of their names"
    assert dataset[4].question_id == "9"
    assert [dataset.place(i) for i in range(5)] == [(0, i) for i in range(5)]


def test_classes_become_questions(tmp_path):
    members = [("a.cls", b"1"), ("a.png", made.png(1))]
    members += [("b.cls", b" 0\n"), ("b.json", b'{"width": 3}'), ("b.png", made.png(2))]
    members += [("c.cls", b"0"), ("c.json", record(3)), ("c.png", made.png(3))]
    members += [("d.cls", b"2"), ("d.png", made.png(4))]
    path = made.tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=r"class numbers \(\.cls\) and no questions") as caught:
        ShardDataset(str(path))[0]
    assert not isinstance(caught.value, SampleError), "a missing list of names is not the sample's fault"
    manifest = index_shards([path])
    manifest.classes = ["cat", "dog"]
    manifest.save(tmp_path / "manifest.json")
    dataset = ShardDataset(str(path), class_question="What animal?")
    assert [(s.question, s.answers, s.question_id) for s in (dataset[0], dataset[1], dataset[2])] == [
        ("What animal?", ["dog"], "a"),
        ("What animal?", ["cat"], "b"),
        ("number 3", ["3"], "3"),
    ]
    assert dataset[1].extra == {"class": 0, "width": 3}
    with pytest.raises(SampleError, match=r"'d': its \.cls is 2, there are 2 classes"):
        dataset[3]
    assert ShardDataset(str(path), classes=["x", "y", "z"])[3].answers == ["z"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_come_upright(orientation):
    upright = Image.fromarray(np.arange(8 * 4 * 3, dtype=np.uint8).reshape(8, 4, 3))
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turns[orientation]) if orientation in turns else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        decoded = ImageDecoder()(made.encoded(stored, kind, exif=exif.tobytes(), **options))
        assert np.array_equal(np.asarray(decoded), np.asarray(upright)), kind
    decoded = ImageDecoder()(made.encoded(stored, "JPEG", exif=exif.tobytes(), quality=100, subsampling=0))
    assert np.abs(np.asarray(decoded).astype(int) - np.asarray(upright)).max() < 12


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode):
    grey = 100
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), grey << 8, np.uint16))
    else:
        image = Image.new("RGB", (4, 4), (grey,) * 3).convert(mode)
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    decoded = ImageDecoder()(made.encoded(image, kind))
    assert decoded.mode == "RGB"
    value = decoded.getpixel((1, 1))[0]
    assert value in (0, 255) if mode == "1" else abs(value - grey) <= 3


def test_large_jpegs_are_decoded_at_a_fraction():
    y, x = np.mgrid[0:480, 0:640]
    whole = Image.fromarray(np.stack([x * 255 // 640, y * 255 // 480, (x + y) % 256], -1).astype(np.uint8))
    data = made.encoded(whole, "jpeg", quality=95)
    sizes = {target: ImageDecoder(target_size=target)(data).size for target in (None, 500, 240, 224, 120, 60, 10)}
    assert sizes[None] == sizes[500] == (640, 480)
    assert sizes[240] == sizes[224] == (320, 240)
    assert (sizes[120], sizes[60], sizes[10]) == ((160, 120), (80, 60), (80, 60))
    small = np.asarray(ImageDecoder(target_size=224)(data)).astype(int)[:, :, :2]
    assert np.abs(small - np.asarray(whole.resize((320, 240), Image.Resampling.BOX))[:, :, :2]).mean() < 2
    assert ImageDecoder(target_size=2)(made.png(3)).size == (4, 4), "other formats are as they are"


def bomb(width, height):
    """A small PNG that claims to be large: only its header is true."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def test_bombs_and_other_formats_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for size in ((10_000, 10_000), (30_000, 30_000)):
            with pytest.raises(SampleError, match="bomb"):
                ImageDecoder()(bomb(*size))
    with pytest.raises(SampleError, match="max_pixels=15"):
        ImageDecoder(max_pixels=15)(made.png(1))
    for kind in ("GIF", "BMP", "TIFF", "PPM", "EPS", "PDF"):
        with pytest.raises(SampleError, match="cannot be decoded"):
            ImageDecoder()(made.encoded(made.picture(1), kind))
    for data in (b"", b"not an image", made.jpg(1)[:200], made.png(1)[:45]):
        with pytest.raises(SampleError, match="cannot be decoded"):
            ImageDecoder()(data)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_in_a_shard_do_not_run(tmp_path):
    marker = str(tmp_path / "ran")
    evil = pickle.dumps(Payload(marker))
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    names = ("pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "torch", "ten", "cbor", "mp", "json.gz", "sh")
    members = [("a.png", made.png(7)), *((f"a.{name}", evil) for name in names), ("a.json", record(1))]
    members += [("b.json", record(2)), ("b.npy", buffer.getvalue()), ("../../c.json", record(3))]
    members += [(f"{tmp_path}/d.json", record(4)), ("e.png", evil), ("e.json", record(5))]
    path = made.tar(tmp_path / "a.tar", members)
    pickle.loads(pickle.dumps(Payload(str(tmp_path / "control"))))
    assert os.path.isdir(tmp_path / "control"), "the payload works"
    before = sorted(os.listdir(tmp_path))
    dataset = ShardDataset(str(path))
    for i in range(4):
        assert dataset[i].question_id == str(i + 1)
    with pytest.raises(SampleError, match=r"'e'.*cannot be decoded"):
        dataset[4]
    assert not os.path.exists(marker)
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "a.tar.idx"]), "members are written nowhere"
    assert dataset[0].extra == {}


def test_members_far_apart_are_read_one_by_one(tmp_path):
    members = [("a.png", made.png(7)), ("a.bin", bytes(300_000)), ("a.json", record(1))]
    dataset = ShardDataset(str(made.tar(tmp_path / "a.tar", members)))
    sizes = []
    pread = os.pread
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", lambda fd, size, offset: sizes.append(size) or pread(fd, size, offset))
        sample = dataset[0]
    assert (sample.question_id, sample.image.getpixel((0, 0))[0]) == ("1", 7)
    assert sum(sizes) < 5000


def test_a_record_too_large_to_be_true_is_not_read(tmp_path):
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:  # a sparse file: the member is there, and 2 GiB long
        info = tarfile.TarInfo("a.png")
        info.size = 2 << 30
        file.write(info.tobuf())
        file.seek(info.size, 1)
        other = tarfile.TarInfo("a.json")
        other.size = len(record(1))
        file.write(other.tobuf() + record(1).ljust(512, b"\0") + bytes(10240))
    with pytest.raises(SampleError, match=r"'a': its \.png has 2,147,483,648 bytes, the limit is 268,435,456"):
        ShardDataset(str(path))[0]


def test_a_shard_that_is_replaced_is_noticed_at_the_next_read(tmp_path):
    """The index says where; the member's own header says what."""
    made.write(tmp_path, 10)
    path = tmp_path / "shard-000000.tar"
    dataset = ShardDataset(str(path))
    assert dataset[4].key == "s00004"
    whole = path.read_bytes()
    position = whole.index(b"s00005.json")
    made.overwrite(path, position, b"s00015.json")
    assert dataset[4].key == "s00004"
    with pytest.raises(ShardDamage, match=r"byte \d+: expected member 's00005\.json', found 's00015\.json'"):
        dataset[5]
    made.overwrite(path, position, bytes(512))
    with pytest.raises(ShardDamage, match=r"expected member 's00005\.json', found ''"):
        dataset[5]
    os.truncate(path, position)
    with pytest.raises(ShardDamage, match="has become shorter"):
        dataset[8]


def test_a_manifest_that_does_not_fit_is_an_error(tmp_path):
    made.write(tmp_path, 20)
    paths = sorted(tmp_path.glob("*.tar"))
    index_shards(paths).save(tmp_path / "manifest.json")
    assert len(ShardDataset(str(tmp_path))) == 20
    manifest = Manifest.load(tmp_path / "manifest.json")
    manifest.shards[1].bytes += 512
    manifest.save(tmp_path / "manifest.json")
    with pytest.raises(DataError, match=r"shard-000001\.tar"):
        ShardDataset(str(tmp_path))
    manifest.shards[1].bytes -= 512
    manifest.shards[1].samples, manifest.shards[1].layout = 9, ""
    manifest.save(tmp_path / "manifest.json")
    with pytest.raises(ShardDamage, match="has 10 samples, its manifest says 9"):
        ShardDataset(str(tmp_path))
    manifest.shards[1].layout = "0" * 32
    manifest.save(tmp_path / "manifest.json")
    with pytest.raises(ShardDamage, match="its samples have changed"):
        ShardDataset(str(tmp_path))[15]


def test_the_same_shard_twice_is_an_error(tmp_path):
    made.write(tmp_path, 10)
    data = (tmp_path / "shard-000000.tar").read_bytes()
    (tmp_path / "copy.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"copy\.tar and shard-000000\.tar hold the same samples"):
        ShardDataset(str(tmp_path / "*.tar"))
    # equal keys and sizes with other content are two shards: some writers number each shard from 0
    (tmp_path / "copy.tar").write_bytes(data.replace(b'"number 3"', b'"number 8"'))
    assert len(ShardDataset(str(tmp_path / "*.tar"))) == 20


def test_the_fingerprint_is_of_the_samples_and_their_order(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    one, two = ShardDataset(made.write(tmp_path / "a", 20)), ShardDataset(made.write(tmp_path / "b", 20, prefix="x"))
    assert one.fingerprint() == two.fingerprint(), "moved and renamed"
    index_shards(one.paths).save(tmp_path / "a" / "manifest.json")
    assert ShardDataset(str(tmp_path / "a")).fingerprint() == one.fingerprint(), "with or without a manifest"
    reversed_ = ShardDataset([str(path) for path in reversed(one.paths)])
    fewer = ShardDataset(made.write(tmp_path / "c", 19))
    assert len({one.fingerprint(), reversed_.fingerprint(), fewer.fingerprint()}) == 3


def test_failing_storage_is_retried_then_an_error(tmp_path, monkeypatch):
    dataset = ShardDataset(made.write(tmp_path, 10), faults=FaultPolicy(retries=2, backoff_s=0.01))
    pread, failures = os.pread, [0]

    def flaky(fd, size, offset):
        if failures[0] > 0:
            failures[0] -= 1
            raise OSError(5, "Input/output error")
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", flaky)
    failures[0] = 2
    assert dataset[3].key == "s00003"
    failures[0] = 3
    with pytest.raises(ReadError, match=r"shard-000000\.tar: cannot be read at byte \d+, after 2 retries: Input"):
        dataset[3]
    assert dataset[3].key == "s00003"


def test_more_shards_than_may_be_open(tmp_path, monkeypatch):
    from scale_digrap.data import dataset as module

    monkeypatch.setattr(module.OPEN_SHARDS, "_most", lambda: 3)
    data = ShardDataset(made.write(tmp_path, 20, per_shard=2))
    for _ in range(2):
        assert [data[i].question_id for i in range(20)] == [str(i) for i in range(20)]
    descriptors = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd)}
    assert sum(str(tmp_path) in name and name.endswith(".tar") for name in descriptors) == 3


def _is_link(descriptor):
    return os.path.islink(f"/proc/self/fd/{descriptor}")


def test_a_copy_in_another_process_reads_for_itself(tmp_path):
    dataset = ShardDataset(made.write(tmp_path, 10))
    assert dataset[2].key == "s00002"
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[2] == dataset[2]
    assert copy.fingerprint() == dataset.fingerprint()
