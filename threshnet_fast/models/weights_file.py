"""The two files that a trained model is kept in: safetensors, and JSON that says what they are.

``NAME.safetensors`` holds the model's ``state_dict``, ``NAME.json`` beside it a
:class:`ModelInfo`, with the SHA-256 of the former. docs/training.md describes every key.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import sha256, write_json, write_tensors

__all__ = [
    "ModelInfo",
    "check_finite",
    "is_pair",
    "load_state",
    "read_info",
    "save_model",
    "weights_path",
]

FORMAT = "threshnet_fast model"
VERSION = 1
DEFAULT_NAME = "model.safetensors"
BEST_NAME = "best.safetensors"
INTERPOLATIONS = ("bilinear", "bicubic")
LARGEST_IMAGE = 1 << 26
LARGEST_DESCRIPTION = 64 << 20

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""What weights are stored in, by the name that a description has."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
                f"{source} is of version {_short(content.get('version'))}: this threshnet_fast "
                f"reads version {VERSION}"
            )
        values: dict[str, Any] = {}
        for name, (is_valid, expected) in _EXPECTED.items():
            if name in content:
                value = content[name]
                if not is_valid(value):
                    raise ValueError(
                        f"{source} does not describe a model: {name} is {_short(value)}, expected "
                        f"{expected}"
                    )
                values[name] = tuple(value) if isinstance(value, list) else value
            elif name in _REQUIRED:
                raise ValueError(f"{source} does not describe a model: {name} is missing")
        for name in ("mean", "std"):
            values[name] = tuple(map(float, values[name]))
        values["extra"] = {
            name: value
            for name, value in content.items()
            if name not in values and name not in ("format", "version")
        }
        if not _is_text(values["extra"].get("sha256", "")):
            digest = _short(values["extra"]["sha256"])
            raise ValueError(f"{source} does not describe a model: sha256 is {digest}")
        info = cls(**values)
        info.check(source)
        return info

    def check(self, source: object = "the model's description") -> None:
        """Raises ValueError where the values contradict each other."""
        outputs = self.arguments.get("num_classes", len(self.classes))
        channels = self.arguments.get("in_chans", 3)
        problem = None
        if outputs != len(self.classes):
            problem = f"num_classes is {_short(outputs)}, but {len(self.classes)} classes are named"
        elif not len(self.mean) == len(self.std) == channels:
            problem = f"mean and std have {len(self.mean)} and {len(self.std)} of {channels} values"
        elif not all(map(math.isfinite, self.mean)):
            problem = f"mean is {_short(self.mean)}: expected finite numbers"
        elif not all(0 < value < math.inf for value in self.std):
            problem = f"std is {_short(self.std)}: expected finite numbers above 0"
        elif self.interpolation not in INTERPOLATIONS:
            problem = (
                f"interpolation is {_short(self.interpolation)}: expected one of {INTERPOLATIONS}"
            )
        elif not 0 < self.crop_fraction <= 1:
            problem = f"crop_fraction is {self.crop_fraction}: expected more than 0, at most 1"
        elif not all(
            min(size) > 0 and math.prod(size) <= LARGEST_IMAGE
            for size in (self.image_size, self.source_size or (1, 1))
        ):
            problem = (
                f"image_size is {_short(self.image_size)}, source_size {_short(self.source_size)}: "
                f"expected 1 to {LARGEST_IMAGE} pixels"
            )
        if problem is not None:
            raise ValueError(f"{source}: {problem}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Whether it is one that a float holds, and finite."""
    try:
        return (_is_integer(value) or isinstance(value, float)) and math.isfinite(value)
    except OverflowError:
        return False


def _is_list_of(kind: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, (list, tuple))
        and all(map(kind, value))
        and length in (None, len(value))
        and len(value) > 0
    )


def _is_text(value: Any) -> bool:
    """Whether it is a string, and no half of a character of two that JSON can hold."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_keywords(value: Any) -> bool:
    return isinstance(value, Mapping) and not {"name", "pretrained"} & value.keys()


_is_size = _is_list_of(_is_integer, 2)
_REQUIRED = ("model", "classes", "mean", "std", "image_size")
# Of each key, what its value must be.
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_is_text, "a name"),
    "classes": (_is_list_of(_is_text), "a list of names"),
    "mean": (_is_list_of(_is_number), "a list of finite numbers"),
    "std": (_is_list_of(_is_number), "a list of finite numbers"),
    "image_size": (_is_size, "a list of two integers"),
    "source_size": (lambda value: value is None or _is_size(value), "a list of two integers"),
    "arguments": (_is_keywords, "an object of keywords for the model"),
    "interpolation": (_is_text, f"one of {INTERPOLATIONS}"),
    "crop_fraction": (_is_number, "a finite number"),
    "dataset": (_is_text, "a name"),
    "recipe": (lambda value: isinstance(value, Mapping), "an object"),
    "epochs": (lambda value: _is_integer(value) and value >= 0, "a number of epochs"),
    "accuracy": (lambda value: value is None or _is_number(value), "a number or null"),
    "dtype": (
        lambda value: isinstance(value, str) and value in DTYPES,
        f"one of {', '.join(DTYPES)}",
    ),
}


def _short(value: Any) -> str:
    text = reprlib.repr(value)
    return text if text.isprintable() else ascii(text)


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
    if floating and floating[0] not in _NAMES:
        raise TypeError(f"dtype is {floating[0]}: expected one of {', '.join(DTYPES)}")
    if floating:
        info = dataclasses.replace(info, dtype=_NAMES[floating[0]])
    digest = write_tensors(path, stored)
    write_json(path.with_suffix(".json"), {**info.to_json(), "sha256": digest})
    return path


def weights_path(path: str | Path) -> Path:
    """Finds the file of weights of a pair.

    Args:
        path: As in :func:`read_info`.

    Raises:
        FileNotFoundError: One of the two files is missing.
        ValueError: The path names no such file.
    """
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


def is_pair(path: str | Path) -> bool:
    """Whether a path is, or should be, of a file of weights with its description beside it.

    Args:
        path: Any path; of a folder, of NAME.json and of NAME.safetensors with a NAME.json it is.
    """
    path = Path(path)
    return (
        path.is_dir()
        or path.suffix == ".json"
        or (path.suffix == ".safetensors" and path.with_suffix(".json").is_file())
    )


def read_info(path: str | Path) -> ModelInfo:
    """Reads a model's description.

    Args:
        path: ``NAME.safetensors``, ``NAME.json``, or the folder of ``model.safetensors``.

    Raises:
        FileNotFoundError: One of the two files is missing.
        ValueError: The path names no such file, or its content is not understood.
    """
    file = weights_path(path).with_suffix(".json")
    if file.stat().st_size > LARGEST_DESCRIPTION:
        raise ValueError(f"{file} is larger than {LARGEST_DESCRIPTION} bytes: expected less")
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    return ModelInfo.from_json(content, file)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, unless a key is repeated in it, of which readers take one or the other."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("it repeats a key")
    return content


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
    file = weights_path(path)
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


def check_finite(model: nn.Module) -> None:
    """Raises ValueError where a model's weights would make every answer NaN.

    Args:
        model: The model; its floating-point parameters and buffers are looked at.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity: expected finite weights")
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise ValueError(f"{name} holds a negative variance")
