"""Small data sets, a small network, and processes that train it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

import threshnet_fast as tf
from threshnet_fast.models import registry

NAME = "tiny"
CIFAR10_FILES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")


def build(num_classes: int = 10, drop_rate: float = 0.0, in_chans: int = 3) -> tf.ThreshNet:
    """A network that trains in milliseconds."""
    return tf.ThreshNet(
        first_channels=(8, 16),
        blocks=(2, 3),
        transitions=(24, 32),
        downsample=(True, False),
        threshold=1,
        growth_rates=(8, 12),
        num_classes=num_classes,
        drop_rate=drop_rate,
        in_chans=in_chans,
    )


def pictures(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images that can be told apart, ``(N, 3, 32, 32)`` uint8, with labels."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    patterns = np.random.default_rng(0).integers(40, 216, (classes, 3, 4, 4))
    images = patterns[labels].repeat(8, 2).repeat(8, 3) + random.integers(
        -40, 40, (count, 3, 32, 32)
    )
    return images.clip(0, 255).astype(np.uint8), labels.astype(np.uint8)


def write_cifar10(root: Path, count: int = 20) -> Path:
    """Writes CIFAR-10's files with ``count`` records each; returns their folder."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for number, name in enumerate(CIFAR10_FILES):
        images, labels = pictures(count, 10, number)
        records = np.concatenate([labels[:, None], images.reshape(count, -1)], 1)
        (folder / name).write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("".join(f"class {n}\n" for n in range(10)) + "\n")
    return folder


def write_folder(root: Path, counts: dict[str, int], split: str = "train") -> Path:
    """Writes a folder of pictures with as many of each class; returns the data set's folder."""
    from PIL import Image

    for label, (name, count) in enumerate(counts.items()):
        images, _ = pictures(count * len(counts), len(counts), seed=len(split))
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images[label :: len(counts)]):
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number}.png")
    return root


def command(data: Path, output: Path, *more: str) -> list[str]:
    """Arguments that train the small network for two epochs of six steps."""
    return [
        *("train", NAME, "--data", str(data), "--output", str(output), "--no-verify"),
        *("--batch-size", "16", "--epochs", "2", "--padding", "2", "--learning-rate", "0.02"),
        *("--drop-rate", "0.2", *more),
    ]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def start(*arguments: str, processes: int = 1, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs this file as a program, by torchrun where several processes are wanted."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), __file__, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(**more),
    )


def die_at(place: str, number: int) -> None:
    """Kills this process at the given call of a function, before what the function does."""
    from threshnet_fast import files
    from threshnet_fast.train import checkpoint

    module = {"sync_folder": checkpoint, "sha256": files, "write_json": checkpoint}[place]
    original = getattr(module, place)
    calls = 0

    def replacement(*arguments):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(module, place, replacement)


def main() -> int:
    import torch

    from threshnet_fast.cli import main as run

    torch.set_num_threads(1)
    registry.register_model(NAME)(build)
    if os.environ.get("TEST_DTYPE") == "float64":
        torch.set_default_dtype(torch.float64)
    if "TEST_DIE_AT" in os.environ:
        place, _, number = os.environ["TEST_DIE_AT"].partition(":")
        die_at(place, int(number))
    if os.environ.get("TEST_FAILING_RANK") == os.environ.get("RANK", "0"):
        from threshnet_fast.train import loop

        original = loop.learning_rate

        def fail(recipe, step, steps_per_epoch):
            if step == 2:
                raise RuntimeError("this process fails on purpose")
            return original(recipe, step, steps_per_epoch)

        loop.learning_rate = fail
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
