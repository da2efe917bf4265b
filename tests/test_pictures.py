"""How pictures are found and read: the same everywhere, with the levels that their files mean."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from threshnet_fast.data import pictures
from threshnet_fast.data.augment import Preparation
from threshnet_fast.data.errors import DataError, PictureError
from threshnet_fast.data.folder import (
    FolderBatches,
    FolderSet,
    _pillow_loader,
    leave_out_unreadable,
    load_folder,
)
from threshnet_fast.data.images import to_grey
from threshnet_fast.data.pictures import (
    check_pictures,
    list_pictures,
    picture_suffixes,
    quiet_decoder,
    read_picture,
    read_pixels,
)
from threshnet_fast.text import printable

pytestmark = pytest.mark.usefixtures("one_thread")

RAMP = [0, 128, 129, 257, 385, 386, 128 * 257, 65535 - 129, 65535 - 128, 65535]
RAMP_LEVELS = [0, 0, 1, 1, 1, 2, 128, 254, 255, 255]
COLOURS = np.array([[[1, 2, 3], [40, 50, 60], [70, 80, 90]], [[7, 8, 9], [200, 0, 0], [0, 0, 255]]])


def png(width: int, depth: int, colour: int, row: bytes, key: bytes = b"") -> bytes:
    """A PNG file of one row, with depths and transparent colours that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)),
            chunk(b"tRNS", key) if key else b"",
            chunk(b"IDAT", zlib.compress(b"\0" + row)),
            chunk(b"IEND", b""),
        ]
    )


def tiff(width: int, bits: int, photometric: int, data: bytes) -> bytes:
    """A TIFF file of one row of unsigned integers."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 277: 1, 278: 1}
    tags |= {273: 8 + 2 + 12 * 9 + 4, 279: len(data)}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 9) + b"".join(entries) + bytes(4) + data


def cmyk_profile(lightness: int) -> bytes:
    """A colour profile in which cyan is a grey of a lightness, of 255, and other inks are black."""
    identity = [0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x10000]
    table = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *identity)
    corners = [255, *[0] * 7, lightness, *[0] * 7]
    lut += table * 4 + b"".join(bytes([corner, 128, 128]) for corner in corners) + table * 3
    header = struct.pack(">I4sI4s4s4s", 0, b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    header = header.ljust(128, b"\0")
    start = 128 + 4 + 12
    profile = header + struct.pack(">I4sII", 1, b"A2B0", start, len(lut)) + lut
    return struct.pack(">I", len(profile)) + profile[4:]


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(values: object, dtype: type) -> Image.Image:
    return Image.fromarray(np.array([values], dtype))


def alpha(mode: str) -> Image.Image:
    """Two transparent, two half and two opaque pixels of black and of white."""
    image = Image.new("LA", (6, 1))
    for x, pixel in enumerate([(0, 0), (255, 0), (0, 128), (100, 51), (0, 255), (100, 255)]):
        image.putpixel((x, 0), pixel)
    return image.convert(mode)


# 255 - 128 = 127, and 100 / 5 + 255 * 4 / 5 = 224.
ALPHA_LEVELS = [255, 255, 127, 224, 0, 100]


def palette(transparency: bytes | int) -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    image.info["transparency"] = transparency
    return image


def frames(kind: str) -> bytes:
    """Three frames: 30, 90 and 150, everywhere."""
    images = [Image.new("L", (2, 1), level) for level in (30, 90, 150)]
    options = {"lossless": True} if kind == "WEBP" else {}
    if kind == "WEBP":
        images = [image.convert("RGB") for image in images]
    return saved(images[0], kind, save_all=True, append_images=images[1:], **options)


u16 = np.array(RAMP, ">u2").tobytes()
CYAN = Image.new("CMYK", (1, 1), (255, 0, 0, 0))
# File name, content, and the levels of its one row: one a pixel where it is grey.
KINDS: dict[str, tuple[Callable[[], bytes], object]] = {
    "sixteen.png": (lambda: saved(grey(RAMP, np.uint16), "PNG"), RAMP_LEVELS),
    "sixteen.tif": (lambda: saved(grey(RAMP, np.uint16), "TIFF"), RAMP_LEVELS),
    "sixteen_big.tiff": (lambda: saved(grey(RAMP, np.dtype(">u2")), "TIFF"), RAMP_LEVELS),
    "sixteen.pgm": (lambda: b"P5\n10 1\n65535\n" + u16, RAMP_LEVELS),
    "ten.pgm": (
        lambda: b"P5\n4 1\n1023\n" + np.array([0, 4, 512, 1023], ">u2").tobytes(),
        [0, 1, 128, 255],
    ),
    "sixteen_dark.png": (lambda: saved(grey([0, 90, 200], np.uint16), "PNG"), [0, 0, 1]),
    "white_is_zero.tif": (
        lambda: saved(grey(RAMP, np.uint16), "TIFF", tiffinfo={262: 0}),
        [255 - level for level in RAMP_LEVELS],
    ),
    # 0, 16, 2048, 4095.
    "twelve.tif": (lambda: tiff(4, 12, 1, bytes.fromhex("000010800fff")), [0, 1, 128, 255]),
    "sixteen_rgb.png": (
        lambda: png(1, 16, 2, np.array([255, 0x80FF, 0xFFFF], ">u2").tobytes()),
        [[0, 128, 255]],
    ),
    "sixteen_key.png": (lambda: png(3, 16, 0, b"\x80\xff\x80\xfe\0\0", b"\x80\xff"), [255, 128, 0]),
    "rgb_key.png": (
        lambda: png(2, 8, 2, bytes([1, 2, 3, 1, 2, 4]), b"\0\1\0\2\0\3"),
        [[255, 255, 255], [1, 2, 4]],
    ),
    "sixteen_rgb_key.png": (
        lambda: png(2, 16, 2, bytes(range(12)), bytes(range(6))),
        [[255, 255, 255], [6, 8, 10]],
    ),
    "one_bit_key.png": (lambda: png(4, 1, 0, b"\x50", b"\0\0"), [255, 255, 255, 255]),
    "two_bits_key.png": (lambda: png(4, 2, 0, b"\x1b", b"\0\1"), [0, 255, 170, 255]),
    "four_bits_key.png": (lambda: png(4, 4, 0, b"\x01\x23", b"\0\2"), [0, 17, 255, 51]),
    "grey_key.png": (lambda: png(3, 8, 0, bytes([5, 6, 7]), b"\0\6"), [5, 255, 7]),
    "integers_small.tif": (lambda: saved(grey([0, 7, 255], np.int32), "TIFF"), [0, 7, 255]),
    "integers_sixteen.tif": (lambda: saved(grey(RAMP, np.int32), "TIFF"), RAMP_LEVELS),
    "integers.tif": (lambda: saved(grey([-1000, 0, 1550], np.int32), "TIFF"), [0, 100, 255]),
    "unit.tif": (lambda: saved(grey([0, 0.5, 0.2, 1], np.float32), "TIFF"), [0, 128, 51, 255]),
    "floats.tif": (lambda: saved(grey([0, 99.6, 254.4], np.float32), "TIFF"), [0, 100, 254]),
    "stretched.tif": (lambda: saved(grey([-10, 0, 41], np.float32), "TIFF"), [0, 50, 255]),
    "not_a_number.tif": (
        lambda: saved(grey([np.nan, 0, 1, np.inf, -np.inf], np.float32), "TIFF"),
        [0, 0, 255, 255, 0],
    ),
    "unit.pfm": (lambda: b"Pf\n3 1\n-1.0\n" + np.array([0, 1, 0.2], "<f4").tobytes(), [0, 255, 51]),
    "rgba.png": (lambda: saved(alpha("RGBA"), "PNG"), ALPHA_LEVELS),
    "la.png": (lambda: saved(alpha("LA"), "PNG"), ALPHA_LEVELS),
    "rgba.tif": (lambda: saved(alpha("RGBA"), "TIFF"), ALPHA_LEVELS),
    "rgba.webp": (lambda: saved(alpha("RGBA"), "WEBP", lossless=True), ALPHA_LEVELS),
    "rgba.tga": (lambda: saved(alpha("RGBA"), "TGA"), ALPHA_LEVELS),
    "palette.png": (
        lambda: saved(palette(b"\0\x80\xff"), "PNG"),
        # 40 * 128 / 255 + 127 = 147.08, and so on.
        [[255, 255, 255], [147, 152, 157], [70, 80, 90]],
    ),
    "palette.gif": (
        lambda: saved(palette(1), "GIF"),
        [[10, 20, 30], [255, 255, 255], [70, 80, 90]],
    ),
    "one_bit.png": (lambda: saved(Image.fromarray(np.eye(1, 3, 1, bool)), "PNG"), [0, 255, 0]),
    "one_bit.tiff": (lambda: saved(Image.fromarray(np.eye(1, 3, 1, bool)), "TIFF"), [0, 255, 0]),
    "one_bit.pbm": (lambda: b"P1\n3 1\n1 0 1\n", [0, 255, 0]),
    "frames.gif": (lambda: frames("GIF"), [30, 30]),
    "frames.webp": (lambda: frames("WEBP"), [30, 30]),
    "frames.apng": (lambda: frames("PNG"), [30, 30]),
    "pages.tif": (lambda: frames("TIFF"), [30, 30]),
    # Plain: (255 - cyan) * (255 - black) / 255.
    "cmyk.tif": (
        lambda: saved(Image.new("CMYK", (1, 1), (255, 51, 0, 51)), "TIFF"),
        [[0, 163, 204]],
    ),
    "cmyk_profile.tif": (
        lambda: saved(CYAN, "TIFF", icc_profile=cmyk_profile(128)),
        # The sRGB level of lightness 50.2 is 119.5.
        [119],
    ),
    "cmyk_damaged_profile.tif": (
        lambda: saved(CYAN, "TIFF", icc_profile=cmyk_profile(128)[:200]),
        [[0, 255, 255]],
    ),
    "lab.tif": (lambda: saved(Image.new("LAB", (1, 1), (255, 128, 128)), "TIFF"), [255]),
    "colours.bmp": (lambda: saved(Image.new("RGB", (1, 1), (9, 8, 7)), "BMP"), [[9, 8, 7]]),
    "colours.qoi": (
        lambda: b"qoif\0\0\0\1\0\0\0\1\3\0\xfe\x09\x08\x07" + bytes(7) + b"\1",
        [[9, 8, 7]],
    ),
    "colours.PNG": (lambda: saved(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"), [[9, 8, 7]]),
    "grey.jpe": (lambda: saved(Image.new("L", (2, 1), 77), "JPEG"), [77, 77]),
    "grey.jfif": (lambda: saved(Image.new("RGB", (1, 1), (77, 77, 77)), "JPEG"), [77]),
    "grey.jp2": (lambda: saved(Image.new("L", (1, 1), 77), "JPEG2000"), [77]),
    "grey.avif": (lambda: saved(Image.new("L", (1, 1), 77), "AVIF", quality=100), [77]),
    # Inverted, as Adobe has them.
    "cmyk.jpg": (
        lambda: saved(Image.new("CMYK", (1, 1), (0, 0, 0, 155)), "JPEG", quality=100),
        [100],
    ),
}
NEEDS = {".avif": "avif", ".jp2": "jpg_2000", ".webp": "webp"}


def write(folder: Path, name: str) -> tuple[Path, np.ndarray]:
    """Writes a kind of file; returns it and what it shows."""
    need = NEEDS.get(Path(name).suffix)
    if need and not features.check(need):
        pytest.skip(f"this Pillow has no {need}")
    make, levels = KINDS[name]
    path = folder / name
    path.write_bytes(make())
    expected = np.array(levels)
    if expected.ndim == 1:
        expected = expected[:, None].repeat(3, 1)
    return path, expected[None]


class TestLevels:
    @pytest.mark.parametrize("name", KINDS)
    def test_same_everywhere(self, tmp_path, name):
        path, expected = write(tmp_path, name)
        pixels = np.asarray(read_picture(path))
        assert pixels.dtype == np.uint8
        # A profile is calculated with, in integers of few bits.
        tolerance = 1 if "profile" in name or name in ("lab.tif", "grey.avif") else 0
        assert np.abs(pixels.astype(int) - expected).max() <= tolerance, pixels.tolist()
        assert pixels.shape == expected.shape
        assert np.array_equal(np.asarray(_pillow_loader(str(path))), pixels)
        assert np.array_equal(read_pixels(path).permute(1, 2, 0), pixels)

    @pytest.mark.parametrize("name", KINDS)
    def test_grey_is_brightness(self, tmp_path, name):
        path, _ = write(tmp_path, name)
        levels = np.asarray(read_picture(path, channels=1))
        pixels = np.asarray(read_picture(path)).astype(int)
        exact = pixels @ [0.299, 0.587, 0.114]
        assert np.abs(levels - exact).max() <= 0.501
        assert np.array_equal(read_pixels(path, channels=1)[0], levels)
        assert np.array_equal(
            to_grey(torch.from_numpy(np.array(read_picture(path))))[..., 0], levels
        )

    @pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
    @pytest.mark.parametrize("orientation", range(10))
    def test_orientation(self, tmp_path, suffix, orientation):
        x = np.arange(6).reshape(2, 3)
        upright = [
            *(x, x, x[:, ::-1], x[::-1, ::-1], x[::-1], x.T),
            *(x[::-1].T, x[::-1, ::-1].T, x[:, ::-1].T, x),
        ][orientation]
        # Blocks of eight pixels, so that JPEG keeps them apart.
        image = Image.fromarray((40 * x).astype(np.uint8).repeat(8, 0).repeat(8, 1))
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if suffix == "webp" else {"quality": 95}
        image.convert("RGB").save(tmp_path / f"a.{suffix}", exif=exif, **options)
        pixels = np.asarray(read_picture(tmp_path / f"a.{suffix}"))
        assert pixels.shape == (8 * upright.shape[0], 8 * upright.shape[1], 3)
        assert np.abs(pixels[4::8, 4::8, 0] - 40.0 * upright).max() <= 2

    def test_orientation_of_sixteen_bits(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        grey([0, 257, 65535], np.uint16).save(tmp_path / "a.png", exif=exif)
        assert np.asarray(read_picture(tmp_path / "a.png", 1)).tolist() == [[0], [1], [255]]

    def test_damaged_orientation_leaves_the_picture_readable(self, tmp_path):
        for number, exif in enumerate([b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nothing"]):
            path = tmp_path / f"{number}.jpg"
            Image.new("RGB", (3, 2), (77, 77, 77)).save(path, exif=exif)
            with quiet_decoder():
                image = read_picture(path)
            assert np.asarray(image).tolist() == [[[77] * 3] * 3] * 2

    def test_ycck(self, tmp_path):
        """The mark of Adobe's says that the first three channels are YCbCr."""
        file = saved(Image.new("CMYK", (8, 8), (0, 0, 0, 155)), "JPEG", quality=100)
        mark = b"Adobe\0\x64\0\0\0\0"
        (tmp_path / "a.jpg").write_bytes(file.replace(mark + b"\0", mark + b"\2"))
        with Image.open(tmp_path / "a.jpg") as image:
            assert image.info["adobe_transform"] == 2
        # The file's samples are 255, 255, 255 and 100: of the colours, green alone is below 255,
        # 255 - (0.344 + 0.714) * 127 = 120.6; and (255 - 120.6) * 100 / 255 = 52.7.
        pixels = np.asarray(read_picture(tmp_path / "a.jpg"))[0, 0].astype(int)
        assert np.abs(pixels - [0, 53, 0]).max() <= 1

    def test_profile_of_rgb_is_not_applied(self, tmp_path):
        from PIL import ImageCms

        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
        Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "a.png", icc_profile=profile)
        assert np.asarray(read_picture(tmp_path / "a.png")).tolist() == [[[9, 8, 7]]]

    def test_suffixes(self):
        common = {
            ".jpg",
            ".jpeg",
            ".jpe",
            ".jfif",
            ".png",
            ".apng",
            ".bmp",
            ".gif",
            ".tif",
            ".tiff",
        }
        assert picture_suffixes() >= common | {".ppm", ".pgm", ".pbm", ".tga"}
        assert not picture_suffixes() & {".eps", ".ps", ".pdf", ".wmf", ".emf", ".psd", ".h5"}

    def test_channels(self, tmp_path):
        path, _ = write(tmp_path, "rgba.png")
        for wrong in (0, 2, 4):
            with pytest.raises(ValueError, match=f"channels is {wrong}"):
                read_picture(path, wrong)


class TestErrors:
    def fails(self, path: Path, reason: str) -> str:
        """Checks that all readers fail with one line, which has the name and the reason."""
        with pytest.raises(PictureError, match=reason) as caught:
            read_picture(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        assert len(message) < len(str(path)) + 250
        assert str(pickle.loads(pickle.dumps(caught.value))) == message
        assert check_pictures([path]) == [(path, caught.value.reason)]
        return message

    def test_no_picture(self, tmp_path):
        path = tmp_path / "a.png"
        self.fails(path, "cannot be read: No such file")
        path.write_bytes(b"")
        self.fails(path, "not a picture, it is empty")
        path.write_bytes(b"%PDF-1.4\n" + bytes(100))
        self.fails(path, "not a picture")
        path.unlink()
        path.mkdir()
        self.fails(path, "cannot be read: Is a directory")

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "AVIF"])
    def test_cut_off(self, tmp_path, kind):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        path = tmp_path / f"a.{kind.lower()}"
        content = saved(Image.fromarray(noise), kind)
        path.write_bytes(content[: len(content) // 2])
        self.fails(path, "cannot be read|is damaged|not a picture")

    def test_flipped_bits_never_raise_anything_else(self, tmp_path):
        random = np.random.default_rng(1)
        noise = Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8))
        path = tmp_path / "a.png"
        refused = 0
        for kind in ("JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP"):
            content = np.frombuffer(saved(noise, kind), np.uint8)
            for _ in range(60):
                damaged = content.copy()
                places = random.integers(0, min(200, len(content)), 4)
                damaged[places] ^= random.integers(1, 256, 4).astype(np.uint8)
                path.write_bytes(damaged.tobytes())
                try:
                    with quiet_decoder():
                        read_picture(path)
                except PictureError:
                    refused += 1
        assert refused > 30

    def test_too_many_pixels(self, tmp_path, monkeypatch):
        path = tmp_path / "bomb.png"
        side = 1 << 15
        header = bytearray(png(side, 1, 0, b""))
        header[16:24] = struct.pack(">II", side, side)
        header[29:33] = struct.pack(">I", zlib.crc32(header[12:29]))
        path.write_bytes(header)
        self.fails(path, "too many pixels|32768x32768 pixels")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        message = self.fails(path, "has 32768x32768 pixels: expected at most 178956970")
        assert "bomb.png" in message

    def test_no_pixels(self, tmp_path):
        (tmp_path / "a.ppm").write_bytes(b"P6\n0 5\n255\n")
        self.fails(tmp_path / "a.ppm", "no pixels|not a picture|is damaged")

    def test_nothing_is_handed_to_other_programs(self, tmp_path, monkeypatch):
        from PIL import EpsImagePlugin

        started = []
        monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: started.append(a))
        for target in ("Popen", "check_call", "check_output", "run"):
            monkeypatch.setattr(subprocess, target, lambda *a, **k: started.append(a))
        eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
        for name in ("a.png", "a.eps", "a"):
            (tmp_path / name).write_bytes(eps)
            self.fails(tmp_path / name, "not a picture")
        assert started == []

    def test_tga_is_told_by_its_name(self, tmp_path):
        content = saved(Image.new("RGB", (2, 2)), "TGA")
        (tmp_path / "a.tga").write_bytes(content)
        (tmp_path / "a.png").write_bytes(content)
        assert read_picture(tmp_path / "a.tga").size == (2, 2)
        self.fails(tmp_path / "a.png", "not a picture")

    def test_names_do_not_reach_the_terminal(self, tmp_path):
        path = tmp_path / "a\x1b[31m\n\udcff.png"
        with pytest.raises(PictureError) as caught:
            read_picture(path)
        assert r"a\x1b[31m\n\udcff.png: cannot be read" in str(caught.value)


def test_printable():
    assert printable("a\x1b[0m\r\n\t\x85") == r"a\x1b[0m\r\n\t\x85"
    assert printable("\udcff\u2028\u202e\u2066") == r"\udcff\u2028\u202e\u2066"
    # Joiners are part of words and of emoji.
    for text in ("plain name.png", "Größe", "日本語", "👩‍👧", "می‌خواهم", "a\\b"):
        assert printable(text) == text


class TestList:
    def names(self, root: Path) -> list[str]:
        return [path.relative_to(root).as_posix() for path in list_pictures(root)[0]]

    def touch(self, root: Path, *names: str) -> None:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()

    def test_dot_files_are_left_alone(self, tmp_path):
        self.touch(tmp_path, "b/a.JPG", "a.png", "._a.png", ".hidden.png", ".cache/a.png")
        self.touch(tmp_path, "__MACOSX/a.png", "b/.ipynb_checkpoints/a.png", ".DS_Store")
        assert self.names(tmp_path) == ["a.png", "b/a.JPG"]
        assert list_pictures(tmp_path)[1] == 0

    def test_other_files_are_counted(self, tmp_path):
        self.touch(tmp_path, "a.png", "notes.txt", "b/labels.csv", "b/x.eps", "png")
        os.mkfifo(tmp_path / "pipe.png")
        assert self.names(tmp_path) == ["a.png"]
        assert list_pictures(tmp_path)[1] == 5

    def test_links(self, tmp_path):
        self.touch(tmp_path, "store/deep/1.png", "store/2.png", "one/3.png", "elsewhere/4.png")
        one = tmp_path / "one"
        (one / "a").symlink_to(tmp_path / "store" / "deep")
        (one / "b").symlink_to(tmp_path / "store")
        (one / "c").symlink_to("../store")
        (one / "file.png").symlink_to(tmp_path / "elsewhere" / "4.png")
        assert self.names(one) == ["3.png", "a/1.png", "b/2.png", "file.png"]

    def test_loops_end(self, tmp_path):
        self.touch(tmp_path, "train/cat/1.png", "train/dog/2.png", "train/cat/deep/3.png")
        cat = tmp_path / "train" / "cat"
        (cat / "self").symlink_to(cat)
        (cat / "up").symlink_to("..")
        (cat / "deep" / "top").symlink_to(tmp_path)
        (cat / "loop").symlink_to("loop")
        assert self.names(cat) == ["1.png", "deep/3.png"]
        # A link to another folder is followed, but not from there to what holds it.
        (cat / "other").symlink_to("../dog")
        (tmp_path / "train" / "dog" / "up").symlink_to("..")
        assert self.names(cat) == ["1.png", "deep/3.png", "other/2.png"]

    def test_link_to_nothing_is_not_left_out_silently(self, tmp_path):
        (tmp_path / "a.png").symlink_to("nothing.png")
        (tmp_path / "b.txt").symlink_to("nothing.txt")
        assert self.names(tmp_path) == ["a.png"]
        assert [reason for _, reason in check_pictures([tmp_path / "a.png"])] == [
            "cannot be read: No such file or directory"
        ]

    def test_unreadable_folder(self, tmp_path, monkeypatch):
        self.touch(tmp_path, "a/b/1.png")
        original = os.scandir

        def scandir(path):
            if Path(path).name == "b":
                raise PermissionError(13, "Permission denied", str(path))
            return original(path)

        monkeypatch.setattr(os, "scandir", scandir)
        with pytest.raises(DataError, match=r"a/b: the folder cannot be read: Permission denied"):
            list_pictures(tmp_path)


class TestFolder:
    @pytest.fixture
    def root(self, tmp_path) -> Path:
        for split in ("train", "val"):
            for name in ("a", "b", "c"):
                (tmp_path / split / name).mkdir(parents=True)
                for number in range(3):
                    image = Image.new("RGB", (40, 30), (10 * number, 50, 90))
                    image.save(tmp_path / split / name / f"{number}.png")
        return tmp_path

    @pytest.mark.parametrize("how", ["no folder", "empty", "notes"])
    def test_validation_may_lack_a_class(self, root, how):
        folder = root / "val" / "b"
        for path in folder.iterdir():
            path.unlink()
        if how == "no folder":
            folder.rmdir()
        elif how == "notes":
            (folder / "notes.txt").touch()
        data = load_folder(root)
        assert data.classes == ("a", "b", "c")
        assert data.test.labels.tolist() == [0, 0, 0, 2, 2, 2]
        assert data.skipped == (how == "notes")

    def test_class_that_is_only_in_validation(self, root):
        (root / "val" / "d").mkdir()
        with pytest.raises(DataError, match=r"val has classes that .*train does not: d$"):
            load_folder(root)

    def test_empty_validation(self, root):
        for path in (root / "val").rglob("*.png"):
            path.unlink()
        with pytest.raises(DataError, match=r"val has no images"):
            load_folder(root)

    def test_empty_class(self, root):
        for path in (root / "train" / "b").iterdir():
            path.unlink()
        with pytest.raises(DataError, match=r"train/b has no images"):
            load_folder(root)

    def test_hidden_folders_are_no_classes(self, root):
        for split in ("train", "val"):
            for name in (".ipynb_checkpoints", "__MACOSX", ".a"):
                (root / split / name).mkdir()
        (root / "train" / "a" / "._0.png").write_bytes(b"AppleDouble")
        data = load_folder(root)
        assert data.classes == ("a", "b", "c")
        assert len(data.train) == 9

    def test_grey(self, root):
        data = load_folder(root, channels=1)
        assert (data.mean, data.std) == ((0.449,), (0.226,))
        preparation = Preparation((0.0,), (1.0,), (8, 8))
        images, _ = next(FolderBatches(data.train, preparation, 3).all())
        assert images.shape == (3, 1, 8, 8)
        # 0.299 * 10 n + 0.587 * 50 + 0.114 * 90 = 39.61 + 2.99 n, rounded.
        assert (images[:, 0, 0, 0] * 255).round().tolist() == [40, 43, 46]
        assert images.std((1, 2, 3)).max() == 0
        with pytest.raises(ValueError, match="channels is 2"):
            load_folder(root, channels=2)

    def test_training_sees_the_pixels_that_predict_sees(self, root):
        for name in ("sixteen.png", "rgba.tif", "palette.gif", "cmyk.tif", "grey.jfif"):
            write(root / "train" / "a", name)
        paths = load_folder(root).train.paths
        assert len(paths) == 14
        for path in paths:
            expected = read_pixels(path)
            preparation = Preparation((0.0,) * 3, (1.0,) * 3, tuple(expected.shape[1:]))
            # The whole picture rather than its middle.
            batches = FolderBatches(
                FolderSet((path,), torch.tensor([0])), preparation, 1, crop_fraction=1.0
            )
            images, _ = next(batches.all())
            assert torch.equal((images[0] * 255).round().to(torch.uint8), expected)


class TestCheck:
    @pytest.fixture
    def root(self, tmp_path) -> Path:
        noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
        for split in ("train", "val"):
            for name in ("a", "b"):
                (tmp_path / split / name).mkdir(parents=True)
                for number in range(40):
                    Image.fromarray(noise).save(tmp_path / split / name / f"{number:02}.jpg")
        return tmp_path

    def cut(self, path: Path) -> Path:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        return path

    def test_finds_unreadable_pictures_in_order(self, root):
        broken = [self.cut(root / "train" / name) for name in ("a/03.jpg", "b/00.jpg", "b/39.jpg")]
        paths = load_folder(root).train.paths
        for workers in (1, 3):
            found = check_pictures(paths, workers)
            assert [path for path, _ in found] == broken
            assert all("truncated" in reason for _, reason in found)
        assert check_pictures([]) == []

    def test_reads_in_threads(self, root, monkeypatch):
        names = set()
        barrier = threading.Barrier(2, timeout=20)

        def read(path, channels):
            if threading.current_thread().name not in names:
                names.add(threading.current_thread().name)
                barrier.wait()

        monkeypatch.setattr(pictures, "read_picture", read)
        check_pictures(load_folder(root).train.paths, 2)
        assert len(names) == 2

    def test_leaves_out(self, root):
        data = load_folder(root)
        assert leave_out_unreadable(data) == (data, [])
        broken = [self.cut(root / name) for name in ("train/b/07.jpg", "val/a/00.jpg")]
        rest, errors = leave_out_unreadable(load_folder(root), 2)
        assert [error.path for error in errors] == broken
        assert str(errors[0]).startswith(f"{broken[0]}: cannot be read: ")
        assert (len(rest.train), len(rest.test)) == (79, 79)
        assert not {*rest.train.paths, *rest.test.paths} & set(broken)
        assert rest.train.labels.tolist() == [0] * 40 + [1] * 39
        assert rest.test.labels.tolist() == [0] * 39 + [1] * 40
        assert rest.classes == data.classes

    def test_nothing_left(self, root):
        for path in (root / "train" / "b").iterdir():
            self.cut(path)
        with pytest.raises(DataError, match=r"no training image of b can be read.*truncated"):
            leave_out_unreadable(load_folder(root))

    @pytest.mark.parametrize("progress", [True, False])
    def test_shows_a_bar_on_a_terminal(self, root, monkeypatch, progress):
        terminal = io.StringIO()
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stderr", terminal)
        check_pictures(load_folder(root).train.paths, 2, progress=progress)
        assert ("check" in terminal.getvalue() and "/80" in terminal.getvalue()) == progress
