"""Images in memory, and the batches that are made from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .augment import Augmentation, Preparation

__all__ = ["ImageBatches", "ImageSet", "Shard", "generator", "to_grey"]

# Domains of random numbers, so that no two uses of one seed see the same ones.
_ORDER, _AUGMENTATION = 1, 2
_MASK = (1 << 63) - 1


# Of red, green and blue in what the eye sees as brightness (ITU-R 601), in 65536ths, as in Pillow.
_LUMINANCE = (19595, 38470, 7471)


def to_grey(images: Tensor) -> Tensor:
    """Brightness of ``(..., 3)`` uint8 as ``(..., 1)``, equal to what Pillow's mode ``L`` is."""
    red, green, blue = images.to(torch.int32).unbind(-1)
    levels = red * _LUMINANCE[0] + green * _LUMINANCE[1] + blue * _LUMINANCE[2] + (1 << 15)
    return (levels >> 16).to(torch.uint8)[..., None]


def generator(seed: int, *position: int) -> torch.Generator:
    """A generator that depends on the seed and a position alone, never on what ran before.

    Args:
        seed: The run's seed.
        *position: What the numbers are for, for example the epoch and the step.
    """
    state = seed & _MASK
    for number in position:
        # splitmix64's finaliser: neighbouring positions must not give similar streams.
        state = (state + 0x9E3779B97F4A7C15 * (number + 1)) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state & _MASK)


def epoch_order(labels: Tensor, seed: int, epoch: int, balanced: bool = False) -> Tensor:
    """The order in which an epoch visits the training images.

    Args:
        labels: ``(N,)``, of the images.
        seed: The run's seed.
        epoch: Number of the epoch.
        balanced: Whether all classes that there are take equal parts, which differ by one image at
            most: an image of a small class comes several times, but never once more than another
            of its class, and a part of a large class is left out, another in each epoch.

    Returns:
        ``(N,)``, int64, the numbers of the images.
    """
    random = generator(seed, _ORDER, epoch)
    if not balanced:
        return torch.randperm(len(labels), generator=random)
    counts = [count for count in torch.bincount(labels).tolist() if count]
    share, rest = divmod(len(labels), len(counts))
    larger = set(torch.randperm(len(counts), generator=random)[:rest].tolist())
    chosen = []
    for number, images in enumerate(labels.sort(stable=True).indices.split(counts)):
        wanted = share + (number in larger)
        rounds = -(-wanted // len(images))
        orders = [torch.randperm(len(images), generator=random) for _ in range(rounds)]
        chosen.append(images[torch.cat(orders)[:wanted]])
    return torch.cat(chosen)[torch.randperm(len(labels), generator=random)]


def visits(order: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yields each image of an order, and how often it has come before."""
    seen: Counter[int] = Counter()
    for index in order:
        yield index, seen[index]
        seen[index] += 1


def augmentation_generator(seed: int, epoch: int, index: int, visit: int = 0) -> torch.Generator:
    """The generator of what happens to one batch, or one image, of an epoch.

    Args:
        seed: The run's seed.
        epoch: Number of the epoch.
        index: Number of the batch or of the image.
        visit: How often the epoch has shown it before.
    """
    return generator(seed, _AUGMENTATION, epoch, index, *([visit] if visit else []))


@dataclass(frozen=True)
class Shard:
    """One process of several that share each batch.

    Attributes:
        rank: Number of the process, from 0.
        count: Number of processes.
    """

    rank: int = 0
    count: int = 1

    def of(self, batch: int, size: int) -> slice:
        """Which images of an epoch are this process's part of a batch.

        Args:
            batch: Number of the batch.
            size: Images of a batch, all processes together.
        """
        start = batch * size
        return slice(
            start + self.rank * size // self.count, start + (self.rank + 1) * size // self.count
        )


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one size.

    Attributes:
        images: ``(N, H, W, C)``, uint8.
        labels: ``(N,)``, int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, count: int) -> ImageSet:
        """The first ``count`` images, which share their memory with these."""
        return ImageSet(self.images[:count], self.labels[:count])


class ImageBatches:
    """Batches of an :class:`ImageSet`.

    All processes of a run draw the same random numbers for the whole batch and take their part of
    it, so what a batch holds does not depend on how many processes share it.

    Args:
        data: The images.
        preparation: Turns pixels into the network's input.
        batch_size: Images of a batch, all processes together.
        shard: Which part of each batch is wanted.
        seed: Of the order and the augmentation.
        augmentation: None leaves the images as they are.
        device: Where the batches are made; the images are copied there once.
        balanced: As :func:`epoch_order` takes it.
    """

    def __init__(
        self,
        data: ImageSet,
        preparation: Preparation,
        batch_size: int,
        shard: Shard = Shard(),
        seed: int = 0,
        augmentation: Augmentation | None = None,
        device: torch.device | str = "cpu",
        balanced: bool = False,
    ) -> None:
        self._all_labels = data.labels
        self._balanced = balanced
        self._images = data.images.to(device)
        self._labels = data.labels.to(device)
        self._preparation = preparation
        self._batch_size = batch_size
        self._shard = shard
        self._seed = seed
        self._augmentation = augmentation
        self._device = device

    def __len__(self) -> int:
        """Full batches of an epoch."""
        return len(self._labels) // self._batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields this process's part of each full batch of an epoch, in random order.

        Args:
            epoch: Number of the epoch.
            start: Number of the first batch that is wanted.
        """
        order = epoch_order(self._all_labels, self._seed, epoch, self._balanced)
        size, shard = self._batch_size, self._shard
        for batch in range(start, len(self)):
            indices = order[shard.of(batch, size)].to(self._device)
            images = self._images[indices]
            if self._augmentation is not None:
                random = augmentation_generator(self._seed, epoch, batch)
                images = self._augmentation(
                    images, self._augmentation.draw(size, random)[shard.of(0, size)]
                )
            yield self._preparation(images), self._labels[indices]

    def all(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields every image of this process's part once, in order, without augmentation."""
        shard = self._shard
        for start in range(0, len(self._labels), self._batch_size):
            part = slice(start + shard.rank, start + self._batch_size, shard.count)
            images = self._images[part]
            if len(images):
                yield self._preparation(images), self._labels[part]
