"""The maps of several stages of a network, for detectors and segmentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .arguments import integers
from .network import Network, records_shapes, smallest_input
from .validate import check_input

__all__ = ["FeatureExtractor", "FeatureInfo"]


class FeatureInfo:
    """What the maps of a :class:`FeatureExtractor` are.

    Args:
        info: A network's ``feature_info``.
        out_indices: Of the entries whose maps are returned.

    Attributes:
        info: All entries, of the stem and each stage.
        out_indices: Indices of those whose maps are returned, in order.
    """

    def __init__(self, info: Sequence[dict[str, Any]], out_indices: Sequence[int]) -> None:
        self.info = list(info)
        self.out_indices = tuple(out_indices)

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """Channels of each map that is returned; of one entry, or of some, with ``idx``."""
        return self._get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Input size over map size, likewise."""
        return self._get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """Name of the module whose output the map is, likewise."""
        return self._get("module", idx)

    def get_dicts(self) -> list[dict[str, Any]]:
        """The entries whose maps are returned."""
        return [dict(self.info[index]) for index in self.out_indices]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.info[index]

    def __len__(self) -> int:
        return len(self.info)

    def _get(self, key: str, idx: int | Sequence[int] | None) -> Any:
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[index][key] for index in (self.out_indices if idx is None else idx)]


class FeatureExtractor(nn.Module):
    """Returns the maps of a network's stem and stages, as plain PyTorch.

    It takes the network's modules over, under their names, up to the last that is needed: a
    checkpoint of the network loads with ``strict=False``.

    Args:
        network: The network.
        out_indices: Which entries of its ``feature_info`` to return, negative ones counted from the
            end; None for all. They are returned in the order of the network.

    Attributes:
        feature_info: A :class:`FeatureInfo`.
        in_chans: As that of the network.
        default_cfg: As that of the network.

    Shape:
        ``(N, in_chans, H, W)`` to a list of ``(N, channels, ceil or floor of H / reduction, ...)``.

    Raises:
        TypeError: ``network`` is no network of this package, or ``out_indices`` not integers.
        ValueError: ``out_indices`` is empty, out of range, or has an index twice.
    """

    def __init__(self, network: Network, out_indices: Iterable[int] | None = None) -> None:
        super().__init__()
        if not isinstance(network, Network):
            raise TypeError(
                f"features_only: the model is a {type(network).__name__}, expected a Network"
            )
        indices = _indices(out_indices, len(network.feature_info))
        self.feature_info = FeatureInfo(network.feature_info, indices)
        self.in_chans = network.in_chans
        self.default_cfg = dict(network.default_cfg)
        names = [name for name, _ in network._stages()]
        wanted = [names.index(name) for name in self.feature_info.module_name()]
        self._wanted = [position in wanted for position in range(max(wanted) + 1)]
        parent = names[0].rpartition(".")[0]
        container = cast(nn.Sequential, network.get_submodule(parent))
        kept = nn.Sequential()
        for name, module in list(container.named_children())[: len(self._wanted)]:
            kept.add_module(name, module)
        self.add_module(parent, kept)
        self.train(network.training)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps, in the order of the network.

        Args:
            x: Images, ``(N, in_chans, H, W)``.

        Raises:
            TypeError: ``x`` is not a dense floating-point tensor of the parameters' dtype.
            ValueError: ``x`` has the wrong rank, number of channels, or size.
            RuntimeError: ``x`` is not on the parameters' device.
        """
        if not torch.jit.is_scripting():
            self._check_input(x)
        maps: list[Tensor] = []
        for container in self.children():
            for index, module in enumerate(container.children()):
                x = module(x)
                if self._wanted[index]:
                    maps.append(x)
        return maps

    @torch.jit.unused
    def _check_input(self, x: Tensor) -> None:
        if not records_shapes(x):
            check_input(x, self.in_chans, smallest_input(self.modules()), next(self.parameters()))


def _indices(out_indices: Iterable[int] | None, count: int) -> list[int]:
    if out_indices is None:
        return list(range(count))
    given = integers("out_indices", out_indices, minimum=-count)
    if not given or max(given) >= count:
        raise ValueError(f"out_indices is {given}: expected one or more of {-count} to {count - 1}")
    indices = sorted(index % count for index in given)
    if len(set(indices)) < len(indices):
        raise ValueError(f"out_indices is {given}: expected each index once")
    return indices
