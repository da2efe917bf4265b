from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import os
import pickle
import struct
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from training import pictures, write_cifar10

from threshnet_fast.cli import build_parser
from threshnet_fast.data import download, sources, svhn
from threshnet_fast.data.augment import Augmentation, Preparation
from threshnet_fast.data.cifar import CIFAR10, CIFAR100
from threshnet_fast.data.errors import DataError
from threshnet_fast.data.folder import FolderBatches, load_folder, middle, random_box
from threshnet_fast.data.images import ImageBatches, ImageSet, Shard, generator
from threshnet_fast.models import imagenet

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)

pytestmark = pytest.mark.usefixtures("one_thread")


def image_set(count: int = 50) -> ImageSet:
    random = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, 8, 6, 3), dtype=torch.uint8, generator=random)
    return ImageSet(images, torch.arange(count))


def test_command_knows_all_data_sets():
    parser = build_parser()
    for name in sources.NAMES:
        arguments = ["--dataset", name, "--data", "a"]
        assert parser.parse_args(["train", *arguments, "--output", "b"]).dataset == name
        assert parser.parse_args(["evaluate", "threshnet79", *arguments]).dataset == name


def published_as(content: bytes) -> download.Published:
    return download.Published(len(content), hashlib.sha256(content).hexdigest())


class TestCifar:
    def test_reads_records(self, tmp_path):
        write_cifar10(tmp_path)
        for root in (tmp_path, tmp_path / CIFAR10.folder):
            data = CIFAR10.load(root, verify=False)
            assert len(data.train) == 100
            assert len(data.test) == 20
        images, labels = pictures(20, 10, seed=2)
        assert torch.equal(data.train.images[40:60].permute(0, 3, 1, 2), torch.from_numpy(images))
        assert data.train.labels[40:60].tolist() == labels.tolist()
        assert data.classes[3] == "class 3"

    def test_cifar100_takes_the_fine_label(self, tmp_path):
        images, labels = pictures(200, 100, seed=0)
        records = np.concatenate(
            [labels[:, None] // 5, labels[:, None], images.reshape(200, -1)], 1, dtype=np.uint8
        )
        for name in ("train.bin", "test.bin"):
            (tmp_path / name).write_bytes(records.tobytes())
        (tmp_path / "fine_label_names.txt").write_text("".join(f"{n}\n" for n in range(100)))
        data = CIFAR100.load(tmp_path, verify=False)
        assert data.train.labels.tolist() == labels.tolist()
        assert torch.equal(data.test.images.permute(0, 3, 1, 2), torch.from_numpy(images))

    def test_missing(self, tmp_path):
        with pytest.raises(DataError, match=r"no data_batch_1.bin in .*--download fetches"):
            CIFAR10.load(tmp_path)
        (write_cifar10(tmp_path) / "test_batch.bin").unlink()
        with pytest.raises(DataError, match=r"no test_batch.bin"):
            CIFAR10.load(tmp_path, verify=False)

    def test_not_of_the_published_size(self, tmp_path):
        write_cifar10(tmp_path)
        with pytest.raises(DataError, match=r"data_batch_1.bin has 61460 bytes: expected 10000"):
            CIFAR10.load(tmp_path)

    def test_cut_off(self, tmp_path):
        path = write_cifar10(tmp_path) / "data_batch_3.bin"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(DataError, match=r"data_batch_3.bin has 61459 bytes"):
            CIFAR10.load(tmp_path, verify=False)

    def test_label_out_of_range(self, tmp_path):
        path = write_cifar10(tmp_path) / "data_batch_3.bin"
        path.write_bytes(b"\x0a" + path.read_bytes()[1:])
        with pytest.raises(DataError, match=r"data_batch_3.bin is damaged: it has a label 10"):
            CIFAR10.load(tmp_path, verify=False)

    def test_number_of_classes(self, tmp_path):
        (write_cifar10(tmp_path) / "batches.meta.txt").write_text("a\nb\n")
        with pytest.raises(DataError, match=r"names 2 classes: expected 10"):
            CIFAR10.load(tmp_path, verify=False)

    def archive(self, root: Path) -> Path:
        """Packs small files like the published archive."""
        files = write_cifar10(root / "made")
        path = root / CIFAR10.archive
        with tarfile.open(path, "w:gz") as tar:
            tar.add(files, CIFAR10.folder)
        return path

    def test_downloads_when_asked(self, tmp_path, monkeypatch):
        published = self.archive(tmp_path)
        source = replace(CIFAR10, published=published_as(published.read_bytes()))
        monkeypatch.setattr(type(source), "url", published.as_uri())
        root = tmp_path / "new"
        with pytest.raises(DataError, match="--download"):
            source.load(root, verify=False)
        data = source.load(root, verify=False, download=True)
        assert len(data.train) == 100
        assert (root / CIFAR10.archive).read_bytes() == published.read_bytes()
        published.unlink()
        assert len(source.load(root, verify=False, download=True).train) == 100

    def test_wrong_checksum(self, tmp_path, monkeypatch):
        published = self.archive(tmp_path)
        monkeypatch.setattr(type(CIFAR10), "url", published.as_uri())
        root = tmp_path / "new"
        size = published.stat().st_size
        with pytest.raises(DataError, match=f"ended after {size} bytes: expected 170052171"):
            CIFAR10.load(root, download=True)
        assert list(root.iterdir()) == []
        root = tmp_path / "made"
        published.rename(root / CIFAR10.archive)
        with pytest.raises(DataError, match=f"it has {size} bytes, expected 170052171"):
            CIFAR10.load(root)

    def test_unreachable(self, tmp_path, monkeypatch):
        monkeypatch.setattr(type(CIFAR10), "url", (tmp_path / "nothing").as_uri())
        with pytest.raises(DataError, match="cannot be fetched"):
            CIFAR10.load(tmp_path, download=True)
        assert list(tmp_path.iterdir()) == []


def pickled_by_python2(key: bytes, array: np.ndarray, labels: list[int]) -> bytes:
    """A dictionary of an array and labels, as NumPy of 2009 has pickled it."""

    def text(content: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(content)) + content

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    made = b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02"
    made += b"K\0\x85q\x03U\x01b\x87q\x04Rq\x05"
    kind = b"cnumpy\ndtype\nq\x06U\x02u1K\0K\x01\x87Rq\x07"
    kind += b"(K\x03U\x01|NNN" + number(-1) + number(-1) + b"K\0tb"
    shape = number(array.shape[0]) + number(array.shape[1]) + b"\x86"
    state = b"(K\x01" + shape + kind + b"\x89" + text(array.tobytes()) + b"tb"
    listed = b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}q\0(" + text(b"data") + made + state + text(key) + listed + b"u."


class Run:
    """Pickles as a call."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class TestCifarForPython:
    def write(self, root: Path, dump) -> Path:
        folder = root / "cifar-10-batches-py"
        folder.mkdir()
        for seed, name in enumerate(CIFAR10.pickles.train | CIFAR10.pickles.test):
            images, labels = pictures(20, 10, seed)
            content = dump(b"labels", images.reshape(20, -1), labels.tolist())
            (folder / name).write_bytes(content)
        names = {"label_names": [f"class {number}" for number in range(10)]}
        (folder / "batches.meta").write_bytes(pickle.dumps(names))
        return folder

    def dump(self, key: bytes, array: np.ndarray, labels: list[int]) -> bytes:
        return pickle.dumps({"data": array, key.decode(): labels, "filenames": ["a.png"] * 20})

    @pytest.mark.parametrize("protocol", ["python 2", *range(6)])
    def test_reads_what_the_binary_version_is(self, tmp_path, protocol):
        def dump(key, array, labels):
            if protocol == "python 2":
                return pickled_by_python2(key, array, labels)
            named = key if protocol == 3 else key.decode()
            return pickle.dumps({"data": array, named: labels}, protocol)

        folder = self.write(tmp_path, dump)
        write_cifar10(tmp_path / "binary")
        expected = CIFAR10.load(tmp_path / "binary", verify=False)
        for root in (tmp_path, folder):
            data = CIFAR10.load(root, verify=False)
            assert data.classes == expected.classes
            for ours, theirs in ((data.train, expected.train), (data.test, expected.test)):
                assert torch.equal(ours.images, theirs.images)
                assert torch.equal(ours.labels, theirs.labels)

    def test_columns_first(self, tmp_path):
        folder = self.write(tmp_path, self.dump)
        images, labels = pictures(20, 10, 0)
        columns = np.asfortranarray(images.reshape(20, -1))
        (folder / "data_batch_1").write_bytes(self.dump(b"labels", columns, labels.tolist()))
        data = CIFAR10.load(tmp_path, verify=False)
        assert torch.equal(data.train.images[:20].permute(0, 3, 1, 2), torch.from_numpy(images))

    def test_cifar100(self, tmp_path):
        images, labels = pictures(200, 100, seed=0)
        for name in ("train", "test"):
            content = {"data": images.reshape(200, -1), "fine_labels": labels.tolist()}
            content["coarse_labels"] = (labels // 5).tolist()
            (tmp_path / name).write_bytes(pickle.dumps(content, 2))
        names = [f"{number}" for number in range(100)]
        (tmp_path / "meta").write_bytes(pickle.dumps({b"fine_label_names": names}))
        data = CIFAR100.load(tmp_path, verify=False)
        assert data.train.labels.tolist() == labels.tolist()
        assert data.classes == tuple(names)
        with pytest.raises(DataError, match="train has 200 records: expected 50000"):
            CIFAR100.load(tmp_path)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (pickle.dumps(Run(os.system, "touch escaped")), "asks for posix.system"),
            (pickle.dumps({"data": Run(eval, "open('escaped', 'w')")}, 0), "asks for __builtin__"),
            (pickle.dumps(Run(Path, "escaped")), "asks for pathlib"),
            (b"cos\nsystem\n(S'touch escaped'\ntR.", "asks for os.system"),
            (b"(S'touch escaped'\nios\nsystem\n.", "opcode INST"),
            (b"\x80\x02Ppersistent\n.", "opcode PERSID|not the published pickle"),
            (b"\x80\x02cnumpy\nndarray\nK\x05\x85\x81.", "opcode NEWOBJ"),
            (b"\x80\x02cnumpy\nndarray\nK\x05\x85R.", "calls what is none"),
            (b"\x80\x02cnumpy\nfrombuffer\n.", "asks for numpy.frombuffer"),
            # A place of the memo for which C allocates gigabytes.
            (b"\x80\x02Nr\xff\xff\xff\x7f.", "remembers a thing at place"),
            (pickle.dumps({"data": np.array([print], object)}), "asks for"),
            (pickle.dumps({"data": np.array([[1]], object)}), "of 'O8': expected unsigned bytes"),
            (pickle.dumps({"data": np.zeros((2, 2), np.float32)}), "of 'f4': expected unsigned"),
            (pickle.dumps([1, 2]), "holds a list: expected a dictionary"),
            (pickle.dumps({"data": {1, 2}}), "it has a set in it|asks for"),
            (pickle.dumps({"data": 1})[:-3], "not the published pickle"),
            (b"", "not the published pickle"),
            (pickle.dumps({"labels": [1]}), "has no 'data'"),
            (pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}), "has no 2 'labels'"),
            (
                pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, -1]}),
                "has no 2 'labels'",
            ),
            (
                pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 10]}),
                "it has a label 10, expected 0 to 9",
            ),
            (pickle.dumps({"data": np.zeros((0, 3072), np.uint8), "labels": []}), "has 0 records"),
        ],
    )
    def test_refuses(self, tmp_path, monkeypatch, content, reason):
        monkeypatch.chdir(tmp_path)
        folder = self.write(tmp_path, self.dump)
        (folder / "data_batch_2").write_bytes(content)
        with pytest.raises(DataError, match=rf"data_batch_2 .*({reason})") as caught:
            CIFAR10.load(tmp_path, verify=False)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "escaped").exists()

    def test_array_that_lies_about_its_size(self, tmp_path):
        folder = self.write(tmp_path, self.dump)
        content = pickled_by_python2(b"labels", np.zeros((20, 3072), np.uint8), [0] * 20)
        small, large = struct.pack("<i", 20), struct.pack("<i", 1 << 30)
        (folder / "data_batch_1").write_bytes(content.replace(b"J" + small, b"J" + large, 1))
        with pytest.raises(DataError, match=r"array of shape \(1073741824, 3072\) has 61440 bytes"):
            CIFAR10.load(tmp_path, verify=False)

    def test_too_large(self, tmp_path, monkeypatch):
        folder = self.write(tmp_path, self.dump)
        with (folder / "data_batch_1").open("r+b") as file:
            file.truncate(1 << 34)
        with pytest.raises(DataError, match="has 17179869184 bytes: expected at most"):
            CIFAR10.load(tmp_path, verify=False)

    def test_lists_of_one_another_end(self, tmp_path):
        """Each holds the one before a thousand times: only a few things, but endless copies."""
        value: list = [0]
        for _ in range(20):
            value = [value] * 1000
        value.append(value)
        folder = self.write(tmp_path, self.dump)
        (folder / "data_batch_1").write_bytes(pickle.dumps({"labels": value}))
        with pytest.raises(DataError, match="has no 'data'"):
            CIFAR10.load(tmp_path, verify=False)

    def test_binary_version_comes_first(self, tmp_path):
        folder = self.write(tmp_path, self.dump)
        (folder / "data_batch_1").write_bytes(b"damaged")
        write_cifar10(tmp_path)
        assert len(CIFAR10.load(tmp_path, verify=False).train) == 100


class TestFetch:
    CONTENT = bytes(range(256)) * 40

    @pytest.fixture
    def server(self) -> Iterator[str]:
        """Serves the content, more and more of it for other paths; the address."""
        content = self.CONTENT

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                if self.path == "/short":
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                sent = {"/short": content[:-9], "/long": content + b"x"}
                # Whoever has had enough hangs up.
                with contextlib.suppress(OSError):
                    while self.path == "/endless":
                        self.wfile.write(content)
                    self.wfile.write(sent.get(self.path, content))

            def log_message(self, *arguments):
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()
            thread.join()

    def test_file_is_as_the_umask_says(self, server, tmp_path):
        path = tmp_path / "new" / "file"
        before = os.umask(0o027)
        try:
            download.fetch(f"{server}/whole", path, published_as(self.CONTENT))
        finally:
            os.umask(before)
        assert path.read_bytes() == self.CONTENT
        assert path.stat().st_mode & 0o777 == 0o640
        assert list(path.parent.iterdir()) == [path]

    @pytest.mark.parametrize(
        ("path", "reason"),
        [
            ("endless", "has more than the 10240 bytes that were expected"),
            ("long", "has more than the 10240 bytes that were expected"),
            ("short", "ended after 10231 bytes|cannot be fetched: .*IncompleteRead"),
        ],
    )
    def test_size(self, server, tmp_path, path, reason):
        with pytest.raises(DataError, match=reason):
            download.fetch(f"{server}/{path}", tmp_path / "file", published_as(self.CONTENT))
        assert list(tmp_path.iterdir()) == []

    def test_rejected_part_does_not_stay(self, server, tmp_path):
        other = download.Published(len(self.CONTENT), "0" * 64)
        with pytest.raises(DataError, match=f"SHA-256 is .*, expected {'0' * 64}"):
            download.fetch(f"{server}/whole", tmp_path / "file", other)
        assert list(tmp_path.iterdir()) == []

    def test_interruption_leaves_nothing(self, server, tmp_path, monkeypatch):
        def interrupt(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(download.Published, "check", interrupt)
        with pytest.raises(KeyboardInterrupt):
            download.fetch(f"{server}/whole", tmp_path / "file", published_as(self.CONTENT))
        assert list(tmp_path.iterdir()) == []

    def test_other_file_in_its_place(self, tmp_path):
        (tmp_path / "file").write_bytes(self.CONTENT[:-1] + b"x")
        with pytest.raises(DataError, match="SHA-256"):
            download.fetch("http://127.0.0.1:9/", tmp_path / "file", published_as(self.CONTENT))
        assert (tmp_path / "file").exists()

    def test_everything_comes_encrypted(self):
        assert CIFAR10.url.startswith("https://")
        assert CIFAR100.url.startswith("https://")
        assert svhn._URL.startswith("https://")


def test_unpack_leaves_no_part_of_an_archive_that_is_cut_off(tmp_path):
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as tar:
        member = tarfile.TarInfo("large.bin")
        member.size = 100000
        tar.addfile(member, io.BytesIO(bytes(100000)))
    archive.write_bytes(archive.read_bytes()[:50000])
    with pytest.raises(DataError, match=r"cannot be unpacked|ended after"):
        download.unpack(archive, tmp_path / "in", ["large.bin"])
    assert list((tmp_path / "in").iterdir()) == []


def test_unpack_ignores_folders_of_the_archive(tmp_path):
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as tar:
        member = tarfile.TarInfo("../../escaped.bin")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    download.unpack(archive, tmp_path / "in", ["escaped.bin"])
    assert (tmp_path / "in" / "escaped.bin").read_bytes() == b"abc"
    with pytest.raises(DataError, match=r"does not hold other.bin"):
        download.unpack(archive, tmp_path / "in", ["other.bin"])
    archive.write_bytes(b"no archive")
    with pytest.raises(DataError, match="cannot be unpacked"):
        download.unpack(archive, tmp_path / "in", ["escaped.bin"])


class TestSvhn:
    def write(self, root: Path, name: str, **changed) -> None:
        io = pytest.importorskip("scipy.io", reason="SVHN's files need SciPy")
        images, labels = pictures(30, 10, seed=1)
        content = {"X": images.transpose(2, 3, 1, 0), "y": (labels + 1)[:, None]}
        io.savemat(root / name, {**content, **changed})

    def test_reads(self, tmp_path):
        for name in ("train_32x32.mat", "test_32x32.mat", "extra_32x32.mat"):
            self.write(tmp_path, name)
        data = svhn.SVHN.load(tmp_path, verify=False)
        images, labels = pictures(30, 10, seed=1)
        assert torch.equal(data.train.images.permute(0, 3, 1, 2), torch.from_numpy(images))
        # What is stored as 10 is the digit 0.
        assert data.train.labels.tolist() == [(label + 1) % 10 for label in labels.tolist()]
        assert data.classes == tuple("0123456789")
        assert len(svhn.SVHN_EXTRA.load(tmp_path, verify=False).train) == 60

    def test_errors(self, tmp_path):
        with pytest.raises(DataError, match=r"no train_32x32.mat in"):
            svhn.SVHN.load(tmp_path)
        for name in ("train_32x32.mat", "test_32x32.mat"):
            self.write(tmp_path, name)
        with pytest.raises(DataError, match=r"train_32x32.mat .*expected 182040794"):
            svhn.SVHN.load(tmp_path)
        self.write(tmp_path, "test_32x32.mat", y=np.full((30, 1), 11))
        with pytest.raises(DataError, match=r"test_32x32.mat is damaged: its labels are 11 to 11"):
            svhn.SVHN.load(tmp_path, verify=False)
        self.write(tmp_path, "test_32x32.mat", X=np.zeros((32, 32, 3, 7), np.uint8))
        with pytest.raises(DataError, match="and 30 labels"):
            svhn.SVHN.load(tmp_path, verify=False)
        (tmp_path / "test_32x32.mat").write_bytes(b"MATLAB")
        with pytest.raises(DataError, match=r"test_32x32.mat is damaged"):
            svhn.SVHN.load(tmp_path, verify=False)


class TestFolder:
    @pytest.fixture
    def root(self, tmp_path) -> Path:
        from PIL import Image

        random = np.random.default_rng(0)
        for split, count in (("train", 6), ("val", 3)):
            for name in ("cat", "dog"):
                (tmp_path / split / name / "deeper").mkdir(parents=True)
                for number in range(count):
                    pixels = random.integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)
                    place = "deeper" if number == 0 else "."
                    path = tmp_path / split / name / place / f"{number}.png"
                    Image.fromarray(pixels).save(path)
        (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
        return tmp_path

    def batches(self, root: Path, workers: int = 0, shard: Shard = Shard(), augment: bool = True):  # noqa: B008
        data = load_folder(root)
        augmentation = Augmentation(True, 0, 0.3) if augment else None
        preparation = Preparation(data.mean, data.std, (32, 24))
        return FolderBatches(data.train, preparation, 4, shard, 5, augmentation, workers=workers)

    def test_finds_images(self, root):
        data = load_folder(root)
        assert data.classes == ("cat", "dog")
        assert len(data.train) == 12
        assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert data.source_size is None

    def test_workers_change_nothing(self, root):
        here = list(self.batches(root).epoch(3))
        there = list(self.batches(root, workers=2).epoch(3))
        assert len(here) == len(there) == 3
        for (images, labels), (others, other_labels) in zip(here, there, strict=True):
            assert images.shape == (4, 3, 32, 24)
            assert torch.equal(images, others)
            assert torch.equal(labels, other_labels)

    def test_epochs_differ_and_resume(self, root):
        batches = self.batches(root)
        first, second = list(batches.epoch(0)), list(batches.epoch(1))
        assert not torch.equal(first[0][0], second[0][0])
        later = list(batches.epoch(1, start=2))
        assert torch.equal(later[0][0], second[2][0])

    def test_shards_make_the_batch(self, root):
        whole = list(self.batches(root).epoch(2))
        parts = [list(self.batches(root, shard=Shard(rank, 2)).epoch(2)) for rank in (0, 1)]
        for batch, first, second in zip(whole, *parts, strict=True):
            assert torch.equal(batch[0], torch.cat([first[0], second[0]]))

    def test_evaluation_sees_every_image_once(self, root):
        parts = [self.batches(root, shard=Shard(rank, 5), augment=False) for rank in range(5)]
        labels = torch.cat([labels for part in parts for _, labels in part.all()])
        assert sorted(labels.tolist()) == [0] * 6 + [1] * 6

    def test_evaluation_takes_the_middle(self, root):
        from PIL import Image

        batches = self.batches(root, augment=False)
        images, _ = next(batches.all())
        with Image.open(load_folder(root).train.paths[0]) as picture:
            box = middle(*picture.size, (32, 24), imagenet.CROP_FRACTION)
            expected = np.array(picture.resize((24, 32), Image.Resampling.BILINEAR, box))
        mean, std = (torch.tensor(v) for v in (load_folder(root).mean, load_folder(root).std))
        wanted = ((torch.from_numpy(expected) / 255 - mean) / std).permute(2, 0, 1)
        torch.testing.assert_close(images[0], wanted)

    def test_boxes(self):
        assert middle(60, 40, (10, 10), 0.5) == (20.0, 10.0, 40.0, 30.0)
        assert middle(60, 40, (20, 10), 1.0) == (20.0, 0.0, 40.0, 40.0)
        shares = []
        for number in range(200):
            left, top, right, bottom = random_box(60, 40, (8, 8), 0.25, generator(0, number))
            assert 0 <= left < right <= 60
            assert 0 <= top < bottom <= 40
            shares.append((right - left) * (bottom - top) / 2400)
            assert 0.74 < (right - left) / (bottom - top) < 1.34
        assert 0.24 < min(shares) < 0.35
        assert max(shares) > 0.7

    def test_errors(self, root):
        with pytest.raises(DataError, match="has no folder train"):
            load_folder(root / "train")
        (root / "val" / "cow").mkdir()
        with pytest.raises(DataError, match=r"val has classes that .*train does not: cow"):
            load_folder(root)
        (root / "train" / "cow").mkdir()
        with pytest.raises(DataError, match="cow has no images"):
            load_folder(root)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_damaged_image(self, root, workers):
        (root / "train" / "dog" / "2.png").write_bytes(b"no image")
        with pytest.raises(DataError, match=r"dog.2.png: not a picture"):
            list(self.batches(root, workers).epoch(0))


class TestAugmentation:
    def reference(self, image: torch.Tensor, drawn: list[int], padding: int) -> torch.Tensor:
        """One image, in the most obvious way."""
        mirrored, down, right = drawn
        height, width = image.shape[:2]
        image = F.pad(image, (0, 0, padding, padding, padding, padding))
        image = image[down : down + height, right : right + width]
        return image.flip(1) if mirrored else image

    @pytest.mark.parametrize("padding", [0, 3])
    def test_against_one_at_a_time(self, padding):
        images = image_set().images
        augmentation = Augmentation(True, padding)
        drawn = augmentation.draw(50, generator(1))
        result = augmentation(images, drawn)
        for number in range(50):
            expected = self.reference(images[number], drawn[number].tolist(), padding)
            assert torch.equal(result[number], expected)
        assert set(drawn[:, 0].tolist()) == {0, 1}
        assert set(drawn[:, 1:].flatten().tolist()) == set(range(2 * padding + 1))

    def test_without_flip(self):
        assert Augmentation(False, 0).draw(50, generator(1)).sum() == 0


class TestPreparation:
    def test_normalises(self):
        images = image_set().images
        x = Preparation(MEAN, STD, (8, 6))(images)
        mean, std = torch.tensor(MEAN), torch.tensor(STD)
        torch.testing.assert_close(x, ((images / 255 - mean) / std).permute(0, 3, 1, 2))
        assert x.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
    def test_resizes(self, interpolation):
        images = image_set().images
        plain = Preparation(MEAN, STD, (8, 6))(images)
        x = Preparation(MEAN, STD, (12, 16), interpolation)(images)
        wanted = F.interpolate(plain, (12, 16), mode=interpolation, align_corners=False)
        torch.testing.assert_close(x, wanted)
        assert x.is_contiguous(memory_format=torch.channels_last)


class TestImageBatches:
    def batches(self, shard: Shard = Shard(), **arguments) -> ImageBatches:  # noqa: B008
        preparation = Preparation(MEAN, STD, (8, 6))
        augmentation = Augmentation(True, 2)
        return ImageBatches(image_set(), preparation, 8, shard, 7, augmentation, **arguments)

    def test_every_image_once_an_epoch(self):
        batches = self.batches()
        assert len(batches) == 6
        labels = torch.cat([labels for _, labels in batches.epoch(0)])
        assert len(set(labels.tolist())) == 48

    def test_depends_on_seed_and_position_alone(self):
        torch.manual_seed(1)
        first = list(self.batches().epoch(4))
        torch.manual_seed(2)
        second = list(self.batches().epoch(4, start=3))
        assert len(second) == 3
        for (images, labels), (others, other_labels) in zip(first[3:], second, strict=True):
            assert torch.equal(images, others)
            assert torch.equal(labels, other_labels)
        assert not torch.equal(next(self.batches().epoch(5))[1], first[0][1])

    @pytest.mark.parametrize("count", [2, 3])
    def test_shards_make_the_batch(self, count):
        whole = list(self.batches().epoch(1))
        parts = [list(self.batches(Shard(rank, count)).epoch(1)) for rank in range(count)]
        for number, (images, labels) in enumerate(whole):
            assert torch.equal(images, torch.cat([part[number][0] for part in parts]))
            assert torch.equal(labels, torch.cat([part[number][1] for part in parts]))

    @pytest.mark.parametrize("count", [1, 2, 3, 60])
    def test_evaluation_sees_every_image_once(self, count):
        parts = [self.batches(Shard(rank, count)) for rank in range(count)]
        labels = torch.cat([labels for part in parts for _, labels in part.all()])
        assert sorted(labels.tolist()) == list(range(50))


def test_generators_of_neighbouring_positions_differ():
    firsts = {
        torch.randint(0, 1 << 60, (), generator=generator(seed, *position)).item()
        for seed in (0, 1)
        for position in [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    }
    assert len(firsts) == 12
