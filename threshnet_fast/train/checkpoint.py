"""Checkpoints: all that a run needs to go on as if it had never stopped.

A checkpoint is a folder, ``checkpoints/epoch-EEEE-batch-BBBBBB``, of ``state.safetensors``
(weights, moving average, the optimiser's tensors) and ``state.json`` (the rest, and the SHA-256 of
the former). It is written under another name and renamed when both files are on the disk. A process
that is killed leaves the checkpoint before, whole.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import sha256, sync_folder, write_json, write_tensors

__all__ = ["Checkpoint", "load_latest", "optimizer_tensors", "restore_optimizer", "save"]

VERSION = 1
_FOLDER = "checkpoints"
_TENSORS, _STATE = "state.safetensors", "state.json"
_NAME = re.compile(r"epoch-(\d+)-batch-(\d+)")
# The one before is kept, in case the disk damages the last.
_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two steps.

    Attributes:
        tensors: By name, with a prefix for what they belong to.
        state: What JSON can hold.
    """

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of one prefix, without it."""
        start = prefix + "."
        return {
            name.removeprefix(start): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(start)
        }


def save(output: Path, checkpoint: Checkpoint, epoch: int, batch: int) -> Path:
    """Writes a checkpoint, and removes those that it makes superfluous.

    Args:
        output: The run's folder.
        checkpoint: The state.
        epoch: Epoch of the next step.
        batch: Batches of that epoch that are done.

    Returns:
        The checkpoint's folder.
    """
    parent = output / _FOLDER
    parent.mkdir(exist_ok=True)
    folder = parent / f"epoch-{epoch:04d}-batch-{batch:06d}"
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    digest = write_tensors(temporary / _TENSORS, checkpoint.tensors)
    write_json(
        temporary / _STATE, {"version": VERSION, **checkpoint.state, "tensors_sha256": digest}
    )
    if folder.exists():
        # A run that was resumed from an older checkpoint comes here again.
        shutil.rmtree(folder)
    temporary.rename(folder)
    sync_folder(parent)
    kept = [path for _, path in zip(range(_KEPT), _folders(output), strict=False)]
    for path in parent.iterdir():
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    return folder


def _folders(output: Path) -> Iterator[Path]:
    """Yields the folders of checkpoints, the furthest first."""
    parent = output / _FOLDER
    if parent.is_dir():
        found = [(_NAME.fullmatch(path.name), path) for path in parent.iterdir()]
        numbered = [(tuple(map(int, match.groups())), path) for match, path in found if match]
        for _, path in sorted(numbered, reverse=True):
            yield path


def load_latest(output: Path) -> tuple[Checkpoint, Path, list[str]] | None:
    """Reads the furthest checkpoint of a run that is whole.

    Args:
        output: The run's folder.

    Returns:
        The checkpoint, its folder, and what was wrong with those that were passed over; None where
        there is no checkpoint at all.

    Raises:
        ValueError: There are checkpoints, and none is whole.
    """
    problems: list[str] = []
    for folder in _folders(output):
        try:
            return _load(folder), folder, problems
        except (OSError, ValueError) as error:
            problems.append(f"{folder}: {error}")
    if problems:
        raise ValueError(f"no checkpoint is whole: {'; '.join(problems)}")
    return None


def _load(folder: Path) -> Checkpoint:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    if state.get("version") != VERSION:
        raise ValueError(f"it is of version {state.get('version')!r}: expected {VERSION}")
    if sha256(folder / _TENSORS) != state.get("tensors_sha256"):
        raise ValueError(f"{_TENSORS} is damaged: its checksum is not that of {_STATE}")
    try:
        return Checkpoint(load_file(folder / _TENSORS), state)
    except SafetensorError as error:
        raise ValueError(f"{_TENSORS}: {error}") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimiser's state, named ``NUMBER.NAME`` by the parameter's number."""
    tensors = {}
    for number, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Gives an optimiser the state that :func:`optimizer_tensors` returned.

    Args:
        optimizer: An optimiser of the same parameters.
        tensors: The state; each becomes like its parameter in device and memory format.

    Raises:
        ValueError: The state belongs to other parameters.
    """
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        if int(number) >= len(parameters):
            raise ValueError("the optimiser's state has more parameters than the network")
        parameter = parameters[int(number)]
        if name != "step":
            if tensor.shape != parameter.shape:
                raise ValueError(f"the optimiser's {key} does not have its parameter's shape")
            # Fused optimisers want the memory format of the parameter.
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def load_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads a ``state_dict``.

    Raises:
        ValueError: It belongs to another network.
    """
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit the network: {error}") from error
