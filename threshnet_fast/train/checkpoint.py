"""Checkpoints: all that a run needs to go on as if it had never stopped.

A checkpoint is a folder, ``checkpoints/epoch-EEEE-batch-BBBBBB``, of ``state.safetensors``
(weights, moving average, the optimiser's tensors) and ``state.json`` (the rest, and the SHA-256 of
the former and of itself). It is written under another name and renamed when both files are on the
disk. A process that is killed leaves the checkpoint before, whole. Whatever else lies in
``checkpoints``, copies of a checkpoint among it, is the user's and stays.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import sha256, sync_folder, write_json, write_tensors

__all__ = ["Checkpoint", "exists", "load_latest", "optimizer_tensors", "restore_optimizer", "save"]

FORMAT = "threshnet_fast checkpoint"
# The first version has neither the format nor a checksum of state.json: it is still read.
VERSION, _FIRST_VERSION = 2, 1
_FOLDER = "checkpoints"
_TENSORS, _STATE = "state.safetensors", "state.json"
_TEMPORARY = ".tmp"
_NAME = re.compile(r"epoch-(\d+)-batch-(\d+)")
_FILES = {name + suffix for name in (_TENSORS, _STATE) for suffix in ("", _TEMPORARY)}
# The one before is kept, in case the disk damages the last.
_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two steps.

    Attributes:
        tensors: By name, with a prefix for what they belong to.
        state: What JSON can hold: how far the run is, ``progress``, among it.
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
    temporary = folder.with_name(folder.name + _TEMPORARY)
    _make_way(temporary)
    temporary.mkdir()
    digest = write_tensors(temporary / _TENSORS, checkpoint.tensors)
    state = {
        "format": FORMAT,
        "version": VERSION,
        "name": folder.name,
        **checkpoint.state,
        "tensors_sha256": digest,
    }
    write_json(temporary / _STATE, {**state, "sha256": _state_sha256(state)})
    # A run that was resumed from an older checkpoint comes here again.
    _make_way(folder)
    temporary.rename(folder)
    sync_folder(parent)
    ours = [path for path in _folders(output) if _is_ours(path)]
    # Those that are further were passed over when the run was resumed, and are void now.
    newest = ours.index(folder)
    left = [path for path in parent.iterdir() if path.suffix == _TEMPORARY and _is_ours(path)]
    for path in ours[:newest] + ours[newest + _KEPT :] + left:
        shutil.rmtree(path, ignore_errors=True)
    return folder


def _state_sha256(state: Mapping[str, Any]) -> str:
    """The checksum of what a ``state.json`` says, but for the checksum itself."""
    content = {name: value for name, value in state.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_ours(folder: Path) -> bool:
    """Whether a folder is a checkpoint of this run as it was written, which may be removed."""
    name = folder.name.removesuffix(_TEMPORARY)
    if not _NAME.fullmatch(name) or folder.is_symlink() or not folder.is_dir():
        return False
    if not {path.name for path in folder.iterdir()} <= _FILES:
        return False
    if name != folder.name:
        # Of a process that was killed while it wrote.
        return True
    try:
        return _name(_read_state(folder)) == name
    except (OSError, ValueError):
        return False


def _make_way(folder: Path) -> None:
    """Frees a checkpoint's name: removes what was written under it, moves what was not."""
    if _is_ours(folder):
        shutil.rmtree(folder)
    elif folder.exists() or folder.is_symlink():
        names = (folder.with_name(f"{folder.name}.kept-{n}") for n in itertools.count(1))
        folder.rename(next(name for name in names if not name.exists()))


def _folders(output: Path) -> Iterator[Path]:
    """Yields the folders of checkpoints, the furthest first."""
    parent = output / _FOLDER
    if parent.is_dir():
        found = [(_NAME.fullmatch(path.name), path) for path in parent.iterdir()]
        numbered = [(tuple(map(int, match.groups())), path) for match, path in found if match]
        for _, path in sorted(numbered, reverse=True):
            yield path


def exists(output: Path) -> bool:
    """Whether a run has a checkpoint, whole or not."""
    return next(_folders(output), None) is not None


def load_latest(
    output: Path, restore: Callable[[Checkpoint], None]
) -> tuple[Path, list[str]] | None:
    """Goes back to the furthest checkpoint of a run that is whole.

    Args:
        output: The run's folder.
        restore: Takes a checkpoint over, or raises ValueError where it cannot be one of the run;
            then the one before is tried.

    Returns:
        The checkpoint's folder, and what was wrong with those that were passed over; None where
        there is no checkpoint at all.

    Raises:
        ValueError: There are checkpoints, and none is whole.
    """
    problems: list[str] = []
    for folder in _folders(output):
        try:
            restore(_load(folder))
        except (OSError, ValueError) as error:
            problems.append(f"{folder}: {error}")
        else:
            return folder, problems
    if problems:
        raise ValueError(f"no checkpoint is whole: {'; '.join(problems)}")
    return None


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_STATE} is no JSON: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{_STATE} is damaged: it holds a {type(state).__name__}, not an object")
    version = state.get("version")
    if version not in (VERSION, _FIRST_VERSION) or isinstance(version, bool):
        raise ValueError(f"it is of version {version!r}: expected {_FIRST_VERSION} or {VERSION}")
    if version == VERSION and state.get("sha256") != _state_sha256(state):
        raise ValueError(f"{_STATE} is damaged or was changed: its checksum is another")
    return state


def _name(state: Mapping[str, Any]) -> str | None:
    """What a checkpoint of this state is called, or None where it does not say."""
    if state["version"] == VERSION:
        return state["name"] if state.get("format") == FORMAT else None
    progress = state.get("progress")
    if not isinstance(progress, dict):
        return None
    epoch, batch = progress.get("epoch"), progress.get("batch")
    if not (isinstance(epoch, int) and isinstance(batch, int)):
        return None
    return f"epoch-{epoch:04d}-batch-{batch:06d}"


def _load(folder: Path) -> Checkpoint:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = _read_state(folder)
    if _name(state) != folder.name:
        raise ValueError(f"{_STATE} is that of {_name(state)}")
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
        if not number.isdecimal() or int(number) >= len(parameters):
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
    own = module.state_dict()
    wrong = [
        name for name in own.keys() | tensors.keys() if _shape(own, name) != _shape(tensors, name)
    ]
    if wrong:
        name = min(wrong)
        raise ValueError(
            f"the checkpoint does not fit the network: {len(wrong)} tensors differ, {name} is "
            f"{_shape(tensors, name) or 'missing'}, expected {_shape(own, name) or 'none'}"
        )
    module.load_state_dict(tensors, strict=True)


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else ""
