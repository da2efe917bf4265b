"""The two files that a trained model is kept in: safetensors, and JSON that says what they are.

``NAME.safetensors`` holds the model's ``state_dict``, ``NAME.json`` beside it a
:class:`ModelInfo`, with the SHA-256 of the former. docs/training.md describes every key.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import sha256, write_json, write_tensors

__all__ = ["ModelInfo", "load_model", "load_state", "read_info", "save_model"]

FORMAT = "threshnet_fast model"
VERSION = 1
DEFAULT_NAME = "model.safetensors"
INTERPOLATIONS = ("bilinear", "bicubic")

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class ModelInfo:
    """What a file of weights is, and how a picture becomes the model's input.

    Attributes:
        model: Name for :func:`threshnet_fast.create_model`.
        classes: Names of the classes, in the order of the outputs.
        mean: Mean of each channel that is subtracted from pixels between 0 and 1.
        std: What each channel is divided by after that.
        image_size: Height and width of the network's input.
        arguments: Keywords for :func:`threshnet_fast.create_model`.
        source_size: Height and width of the pictures of the data set where all had one: a larger
            photograph is reduced to that before it is resized to ``image_size``. None otherwise.
        interpolation: Of the resizing to ``image_size``: ``"bilinear"`` or ``"bicubic"``.
        crop_fraction: Share of the shorter side that the square in the middle keeps.
        dataset: What it was trained on.
        recipe: How it was trained.
        epochs: For how long.
        accuracy: Share of right answers on the test images, or None where there were none.
        dtype: What the floating-point tensors are stored as.
        extra: Further keys of the file.
    """

    model: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    source_size: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    crop_fraction: float = 1.0
    dataset: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 0
    accuracy: float | None = None
    dtype: str = "float32"
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of the JSON file, but for the checksum."""
        content = dataclasses.asdict(self)
        extra = content.pop("extra")
        return {"format": FORMAT, "version": VERSION, **content, **extra}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: object = "the JSON") -> ModelInfo:
        """The reverse of :meth:`to_json`.

        Args:
            content: What the file holds.
            source: Its name, for messages.

        Raises:
            ValueError: It is not such a file, of a version that is not known, or a key is missing
                or malformed.
        """
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            raise ValueError(f"{source} does not describe a model: expected format {FORMAT!r}")
        if content.get("version") != VERSION:
            raise ValueError(
                f"{source} is of version {content.get('version')!r}: this threshnet_fast reads "
                f"version {VERSION}"
            )
        known = {field.name for field in dataclasses.fields(cls)} - {"extra"}
        values = {name: content[name] for name in known if name in content}
        extra = {
            name: value
            for name, value in content.items()
            if name not in known and name not in ("format", "version")
        }
        try:
            for name, kind in (("classes", str), ("mean", float), ("std", float)):
                values[name] = tuple(kind(value) for value in values[name])
            for name in ("image_size", "source_size"):
                if values.get(name) is not None:
                    height, width = map(int, values[name])
                    values[name] = (height, width)
            info = cls(**values, extra=extra)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{source} does not describe a model: {type(error).__name__}: {error}"
            ) from error
        info.check(source)
        return info

    def check(self, source: object = "the model's description") -> None:
        """Raises ValueError where the values contradict each other."""
        outputs = self.arguments.get("num_classes", len(self.classes))
        channels = self.arguments.get("in_chans", 3)
        problem = None
        if outputs != len(self.classes):
            problem = f"num_classes is {outputs}, but {len(self.classes)} classes are named"
        elif not len(self.mean) == len(self.std) == channels:
            problem = f"mean and std have {len(self.mean)} and {len(self.std)} of {channels} values"
        elif not all(value > 0 for value in self.std):
            problem = f"std is {self.std}: expected numbers above 0"
        elif self.interpolation not in INTERPOLATIONS:
            problem = f"interpolation is {self.interpolation!r}: expected one of {INTERPOLATIONS}"
        elif not 0 < self.crop_fraction <= 1:
            problem = f"crop_fraction is {self.crop_fraction}: expected more than 0, at most 1"
        elif min(*self.image_size, *(self.source_size or (1, 1))) < 1:
            problem = f"image_size is {self.image_size}, source_size {self.source_size}"
        if problem is not None:
            raise ValueError(f"{source}: {problem}")


def save_model(
    path: str | Path,
    model: nn.Module | Mapping[str, Tensor],
    info: ModelInfo,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes a model's weights and, after them, their description.

    Args:
        path: ``NAME.safetensors``; the description becomes ``NAME.json``.
        model: The model, or its ``state_dict``.
        info: The description; its ``dtype`` is set here.
        dtype: What floating-point tensors are stored as; None: as they are.

    Returns:
        The path of the weights.

    Raises:
        TypeError: ``dtype`` is none of float32, float16 and bfloat16.
        ValueError: ``path`` does not end in ``.safetensors``, the description contradicts itself,
            or a weight is too large for the dtype.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path is {str(path)!r}: expected NAME.safetensors")
    info.check()
    state = model.state_dict() if isinstance(model, nn.Module) else model
    stored = {}
    for name, tensor in state.items():
        if dtype is not None and tensor.is_floating_point():
            stored[name] = tensor.detach().to(dtype)
            if bool((stored[name].isinf() & ~tensor.isinf()).any()):
                raise ValueError(f"{name} does not fit {dtype}: it reaches {tensor.abs().max():g}")
        else:
            stored[name] = tensor.detach()
    floating = [tensor.dtype for tensor in stored.values() if tensor.is_floating_point()]
    if floating and floating[0] not in _DTYPES:
        raise TypeError(f"dtype is {floating[0]}: expected one of {', '.join(_DTYPES.values())}")
    if floating:
        info = dataclasses.replace(info, dtype=_DTYPES[floating[0]])
    digest = write_tensors(path, stored)
    write_json(path.with_suffix(".json"), {**info.to_json(), "sha256": digest})
    return path


def _weights_path(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        path = path / DEFAULT_NAME
    if path.suffix == ".json":
        path = path.with_suffix(".safetensors")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"path is {str(path)!r}: expected NAME.safetensors, NAME.json or the folder of "
            f"{DEFAULT_NAME}"
        )
    for file in (path, path.with_suffix(".json")):
        if not file.is_file():
            raise FileNotFoundError(
                f"there is no {file}: a model is a file of weights and, beside it, its .json"
            )
    return path


def read_info(path: str | Path) -> ModelInfo:
    """Reads a model's description.

    Args:
        path: ``NAME.safetensors``, ``NAME.json``, or the folder of ``model.safetensors``.

    Raises:
        FileNotFoundError: One of the two files is missing.
        ValueError: The path names no such file, or its content is not understood.
    """
    file = _weights_path(path).with_suffix(".json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    return ModelInfo.from_json(content, file)


def load_state(
    path: str | Path, dtype: torch.dtype | None = torch.float32, *, check: bool = True
) -> dict[str, Tensor]:
    """Reads a model's ``state_dict``.

    Args:
        path: As in :func:`read_info`.
        dtype: What floating-point tensors become; None leaves them as they are stored.
        check: Whether to compare the file's SHA-256 with the description's.

    Raises:
        FileNotFoundError: One of the two files is missing.
        ValueError: The files do not belong together, or are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    info = read_info(path)
    file = _weights_path(path)
    expected = info.extra.get("sha256")
    if check and expected is not None and sha256(file) != expected:
        raise ValueError(
            f"{file} is damaged, or {file.with_suffix('.json').name} belongs to other weights: "
            "their checksums differ"
        )
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {error}") from error
    if dtype is not None:
        state = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
        }
    return state


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, *, check: bool = True
) -> tuple[nn.Module, ModelInfo]:
    """Builds the model that a pair of files holds, in evaluation mode.

    Args:
        path: As in :func:`read_info`.
        dtype: Of the model's parameters.
        check: As in :func:`load_state`.

    Returns:
        The model and its description.

    Raises:
        FileNotFoundError: One of the two files is missing.
        ValueError: The files do not belong together, there is no such model, or it has other
            parameters.
    """
    from ..models import create_model

    info = read_info(path)
    state = load_state(path, dtype, check=check)
    model = create_model(info.model, **{"num_classes": len(info.classes), **info.arguments})
    try:
        model.to(dtype).load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{_weights_path(path)} does not fit {info.model}: {error}") from error
    return model.eval(), info
