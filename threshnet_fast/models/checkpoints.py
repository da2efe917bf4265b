"""Weights of other packages and of training runs, loaded into the networks of this one."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint_files import read_checkpoint
from .layouts import COUNTER, Match, canonical, is_dotted, match
from .registry import find_builder, list_models

__all__ = ["CheckpointReport", "create_from_checkpoint", "load_checkpoint"]

# Averaged weights first: they are what the accuracy of a run that keeps them is measured with.
_CONTAINERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "params",
    "weights",
    "module",
)
_MAX_DEPTH = 3
_SHOWN = 3
_SHOWN_LETTERS = 100

# Buffers of other packages' networks that no parameter of these corresponds to.
_IGNORED = {
    "op_threshs": "thresholds by which torchxrayvision rescales probabilities; "
    "this model returns logits"
}


@dataclass(frozen=True)
class CheckpointReport:
    """What :func:`load_checkpoint` did.

    Attributes:
        source: The file, or ``"the dict"``.
        container: The key under which the weights were found; empty where they were not wrapped.
        layout: Of whom the names in the file are.
        prefix: What they begin with, after those of ``DataParallel`` and ``torch.compile``.
        mapped: The model's name of each tensor that was loaded, by the file's.
        ignored: Why each entry of the file that was not loaded was not, by its name.
        initialised: The model's parameters that were left as they were.
        notes: What else there is to know.
    """

    source: str
    container: str
    layout: str
    prefix: str
    mapped: Mapping[str, str]
    ignored: Mapping[str, str]
    initialised: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        where = f" ({_quote(self.container)} of it)" if self.container else ""
        prefix = f", prefix {_quote(self.prefix)}" if self.prefix else ""
        lines = [f"{self.source}{where}: layout {self.layout}{prefix}"]
        renamed = sum(name != own for name, own in self.mapped.items())
        lines.append(f"  loaded: {len(self.mapped)} tensors, {renamed} of them under another name")
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.ignored.items():
            by_reason.setdefault(reason, []).append(name)
        lines += [f"  ignored: {_some(names)}: {reason}" for reason, names in by_reason.items()]
        if self.initialised:
            lines.append(f"  left as initialised: {_some(self.initialised)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class _Checkpoint:
    """The weights in a file, and how their names correspond to those of a model.

    Attributes:
        source: As in :class:`CheckpointReport`.
        container: As there.
        tensors: The weights, by their names in the file.
        others: Why each other entry of the file is none of them.
        found: The correspondence of all but the classifier.
        names: The file's name, by its canonical form.
        classifier: The names in the file of the weight and the bias of its classifier, if it has
            one.
    """

    source: str
    container: str
    tensors: Mapping[str, Tensor]
    others: Mapping[str, str]
    found: Match
    names: Mapping[str, str]
    classifier: tuple[str, str] | None


def load_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any],
    model: nn.Module,
    *,
    new_classifier: bool = False,
) -> CheckpointReport:
    """Loads weights of another package, of another layout, or of a run into a model.

    Every parameter and buffer of the model, but for the counters ``num_batches_tracked``, must be
    in the file, and every tensor of the file is used or reported with the reason why not. Names
    are translated by rules for each layout (docs/checkpoints.md), never by order. Values become of
    the model's dtype. Everything is checked first: where this raises, the model is as it was.

    Args:
        source: A file of ``torch.save`` or safetensors, of which nothing but tensors is read; what
            ``threshnet-fast train`` wrote (its folder, or the file of weights); or a ``state_dict``
            or a dict with one in it.
        model: A network of this package, or any module.
        new_classifier: Leave the model's classifier as it is where the file's has another size or
            there is none in it, and ignore what else the file has beside the network: to train on.

    Returns:
        What was loaded from where.

    Raises:
        TypeError: ``source`` or ``model`` is of the wrong type.
        FileNotFoundError: There is no such file.
        ValueError: The file is no file of weights, is damaged, or would run code; its weights are
            not those of the model, in one line that says what differs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    return _load(_open(*_read(source), model), model, new_classifier)


def create_from_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any], name: str | None = None
) -> tuple[str, nn.Module, CheckpointReport]:
    """Builds the registered model that weights belong to, and loads them.

    The number of classes and of input channels is that of the weights.

    Args:
        source: As in :func:`load_checkpoint`.
        name: One of :func:`list_models`; None for the only one that the weights fit.

    Returns:
        The model's name, the model, in float32 and evaluation mode, and what was loaded.

    Raises:
        TypeError: As :func:`load_checkpoint`.
        FileNotFoundError: As there.
        ValueError: As there; or ``name`` is no model; or None is given and the weights fit none,
            or several.
    """
    label, content = _read(source)
    if name is None:
        fitting = [
            other
            for other in list_models()
            if (model := _without_values(other)) is not None and _fits(label, content, model)
        ]
        if len(fitting) != 1:
            raise ValueError(
                f"{label}: its names and shapes are those of "
                f"{', '.join(fitting) if fitting else 'no registered model'}: say which it is"
                + ("" if fitting else f", of {', '.join(list_models())}")
            )
        name = fitting[0]
    with torch.device("meta"):
        empty = find_builder(name)()
    checkpoint = _open(label, content, empty)
    if checkpoint.classifier is None:
        raise ValueError(
            f"{label} has no classifier, or none that is one linear layer: expected a whole network"
        )
    options: dict[str, Any] = {"num_classes": len(checkpoint.tensors[checkpoint.classifier[1]])}
    own, found = _first_weights(checkpoint, empty)
    if own.shape[1:2] != found.shape[1:2] and found.ndim == own.ndim:
        options["in_chans"] = found.shape[1]
    with torch.device("meta"):
        _check(checkpoint, find_builder(name)(**options), False)
    model = find_builder(name)(**options)
    return name, model.eval(), _load(checkpoint, model, False)


def _without_values(name: str) -> nn.Module | None:
    """A registered model on the meta device, or None where it cannot be built there as it is."""
    try:
        with torch.device("meta"):
            return find_builder(name)()
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return None


def _fits(label: str, content: Mapping[Any, Any], model: nn.Module) -> bool:
    """Whether weights are those of a model, but for its classes and the channels of its input."""
    try:
        checkpoint = _open(label, content, model)
    except ValueError:
        return False
    shapes = {canonical(name): value.shape for name, value in model.state_dict().items()}
    first = _first_weights(checkpoint, model)[1]
    return all(
        (value := checkpoint.tensors[checkpoint.names[name]]).shape == shapes[own]
        or value is first
        or COUNTER in own
        for name, own in checkpoint.found.mapped.items()
    )


def _first_weights(checkpoint: _Checkpoint, model: nn.Module) -> tuple[Tensor, Tensor]:
    """The weight of the first convolution in a model, and what the file has for it."""
    own = {canonical(name): value for name, value in model.state_dict().items()}
    name, target = next(
        (name, target) for name, target in checkpoint.found.mapped.items() if own[target].ndim > 1
    )
    return own[target], checkpoint.tensors[checkpoint.names[name]]


def _open(label: str, content: Mapping[Any, Any], model: nn.Module) -> _Checkpoint:
    """Finds the names of a model's parameters in a file; sizes are not compared."""
    own = {canonical(name): value for name, value in model.state_dict().items()}
    classifier = _own_classifier(model)
    trunk = [name for name in own if classifier is None or not name.startswith(classifier)]
    best: tuple[int, str] | None = None
    for container, tensors, others in _candidates(content):
        names = _canonical_names(label, tensors)
        matches = match(names, trunk)
        if len(matches) > 1:
            prefixes = " and ".join(_quote(m.prefix) for m in matches[:_SHOWN])
            raise ValueError(
                f"{label} holds such a network more than once, with names that begin with "
                f"{prefixes}: pass a dict with one of them"
            )
        if matches and not matches[0].missing:
            found = matches[0]
            rest = {name: names[name] for name in names if name not in found.mapped}
            head = _find_classifier(tensors, rest, found, own, classifier)
            return _Checkpoint(label, container, tensors, others, found, names, head)
        score = len(matches[0].mapped) if matches else 0
        if best is None or score > best[0]:
            best = (score, _difference(names, trunk, matches))
    kind = type(model).__name__
    if best is None:
        raise ValueError(f"{label} holds no tensors: expected the state_dict of a {kind}")
    raise ValueError(f"{label} does not fit {kind}: {best[1]}")


def _read(source: Any) -> tuple[str, Mapping[Any, Any]]:
    if isinstance(source, Mapping):
        return "the dict", source
    if isinstance(source, nn.Module):
        raise TypeError(f"source is a {type(source).__name__}: pass its state_dict()")
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source is a {type(source).__name__}: expected a path or a dict")
    path = Path(source)
    from .weights_file import is_pair, load_state

    if is_pair(path):
        return str(path), load_state(path, None)
    return str(path), read_checkpoint(path)


def _candidates(
    content: Mapping[Any, Any],
) -> Iterator[tuple[str, dict[str, Tensor], dict[str, str]]]:
    """Yields the dicts of tensors in a file, the outermost first.

    Each with the key under which it was found and the reason why each other entry is not taken.
    """
    waiting: list[tuple[tuple[str, ...], Mapping[Any, Any], dict[str, str]]] = [((), content, {})]
    seen: set[int] = set()
    for keys, inner, outside in waiting:
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        names = {key: ".".join([*keys, _text(key)]) for key in inner}
        tensors = {
            key: value
            for key, value in inner.items()
            if isinstance(key, str) and isinstance(value, Tensor)
        }
        if len(tensors) > 1:
            others = {names[key]: "no tensor" for key in inner if key not in tensors}
            yield ".".join(keys), tensors, {**outside, **others}
        if len(keys) < _MAX_DEPTH:
            for key in _CONTAINERS:
                if isinstance(inner.get(key), Mapping):
                    others = {names[k]: _other_reason(k, key) for k in inner if k != key}
                    waiting.append(((*keys, key), inner[key], {**outside, **others}))


def _other_reason(key: Any, chosen: str) -> str:
    if key in _CONTAINERS:
        return f"{_quote(chosen)} of the file was taken"
    return "not among the weights"


def _canonical_names(label: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    names: dict[str, str] = {}
    for name in tensors:
        other = names.setdefault(canonical(name), name)
        if other != name:
            raise ValueError(f"{label} holds both {_quote(other)} and {_quote(name)}")
    return names


def _own_classifier(model: nn.Module) -> str | None:
    """What the names of the classifier's parameters begin with, or None without a classifier."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return canonical(linear[-1] + ".") if linear and linear[-1] else None


def _find_classifier(
    tensors: Mapping[str, Tensor],
    rest: Mapping[str, str],
    found: Match,
    own: Mapping[str, Tensor],
    classifier: str | None,
) -> tuple[str, str] | None:
    """The classifier's weight and bias: of its own name, or else the only linear layer left."""
    pairs = []
    for name, source in rest.items():
        bias = rest.get(name.removesuffix("weight") + "bias")
        if name.endswith("weight") and bias is not None:
            weight, offset = tensors[source], tensors[bias]
            if weight.ndim == 2 and offset.shape == weight.shape[:1]:
                pairs.append((name, (source, bias)))
    if classifier is not None:
        for name, pair in pairs:
            if name == f"{found.prefix}{classifier}weight":
                return pair
        width = own[f"{classifier}weight"].shape[1]
        pairs = [item for item in pairs if tensors[item[1][0]].shape[1] == width]
    return pairs[0][1] if len(pairs) == 1 else None


def _difference(names: Mapping[str, str], trunk: list[str], matches: list[Match]) -> str:
    """Why the names in a file are not those of a model."""
    if not matches:
        return (
            f"no layout that is known has its names; the file has {_some(list(names.values()))}, "
            f"the model {_some(trunk)}"
        )
    best = matches[0]
    extra = [names[name] for name in names if name not in best.mapped]
    return (
        f"{len(best.missing)} of its {len(trunk)} tensors are missing ({_some(best.missing)}), and "
        f"{len(extra)} of the file are none of it" + (f" ({_some(extra)})" if extra else "")
    )


def _load(checkpoint: _Checkpoint, model: nn.Module, new_classifier: bool) -> CheckpointReport:
    mapped, ignored = _check(checkpoint, model, new_classifier)
    own = model.state_dict()
    if any(own[target].is_meta for target in mapped.values()):
        raise ValueError("model is on the meta device and has no values: call to_empty first")
    found = checkpoint.found
    values, notes = _converted(checkpoint, mapped, own)
    if found.note:
        notes.insert(0, found.note)
    counters = sum(name not in values and COUNTER in name for name in own)
    if counters:
        notes.append(f"the file lacks {counters} counters {COUNTER}, which are left as they are")
    model.load_state_dict(values, strict=False)
    old = any(is_dotted(name) for name in mapped)
    return CheckpointReport(
        checkpoint.source,
        checkpoint.container,
        f"{found.layout}, old names" if old else found.layout,
        found.prefix,
        mapped,
        {**ignored, **checkpoint.others},
        tuple(name for name in own if name not in values and COUNTER not in name),
        tuple(notes),
    )


def _check(
    checkpoint: _Checkpoint, model: nn.Module, new_classifier: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """The model's name of each tensor of the file, and why others are left out.

    Raises:
        ValueError: They do not fit.
    """
    own, tensors = model.state_dict(), checkpoint.tensors
    mapped, ignored, problems = _assign(checkpoint, model, own, new_classifier)
    problems += _shape_problems({name: (tensors[name], own[mapped[name]]) for name in mapped})
    problems += [
        problem
        for name, target in mapped.items()
        if (problem := _value_problem(name, tensors[name], own[target])) is not None
    ][:_SHOWN]
    if problems:
        kind = type(model).__name__
        raise ValueError(f"{checkpoint.source} does not fit {kind}: {'; '.join(problems)}")
    return mapped, ignored


def _assign(
    checkpoint: _Checkpoint, model: nn.Module, own: Mapping[str, Tensor], new_classifier: bool
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """The model's name of each tensor of the file, why others are left out, and what is wrong."""
    found, tensors = checkpoint.found, checkpoint.tensors
    by_canonical = {canonical(name): name for name in own}
    mapped = {checkpoint.names[name]: by_canonical[target] for name, target in found.mapped.items()}
    ignored = {
        name: "a counter that is no integer"
        for name, target in mapped.items()
        if target.endswith(COUNTER) and (tensors[name].ndim or tensors[name].is_floating_point())
    }
    mapped = {name: target for name, target in mapped.items() if name not in ignored}
    problems: list[str] = []
    classifier = _own_classifier(model)
    if checkpoint.classifier is None:
        if classifier is not None and not new_classifier:
            problems.append(
                "there is no classifier, or none that is one linear layer of "
                f"{own[by_canonical[classifier + 'weight']].shape[1]} inputs "
                "(new_classifier=True keeps the model's)"
            )
    elif classifier is None:
        ignored |= dict.fromkeys(checkpoint.classifier, "the model has no classifier")
    else:
        targets = [by_canonical[classifier + part] for part in ("weight", "bias")]
        pairs = dict(zip(checkpoint.classifier, targets, strict=True))
        if new_classifier and any(tensors[a].shape != own[b].shape for a, b in pairs.items()):
            outputs = len(tensors[checkpoint.classifier[1]])
            reason = f"a classifier of {outputs} outputs, where the model's has"
            ignored |= dict.fromkeys(pairs, f"{reason} {len(own[targets[1]])}")
        else:
            mapped |= pairs

    roots = {name.removeprefix(found.prefix).partition(".")[0] for name in found.mapped}
    unknown = []
    for name, source in checkpoint.names.items():
        if source in mapped or source in ignored:
            continue
        inside = name.startswith(found.prefix)
        inner = name.removeprefix(found.prefix)
        if inside and inner in _IGNORED:
            ignored[source] = _IGNORED[inner]
        elif new_classifier and not (inside and inner.partition(".")[0] in roots):
            ignored[source] = "not of the network"
        else:
            unknown.append(source)
    if unknown:
        problems.append(f"{len(unknown)} of its tensors are none of the model ({_some(unknown)})")
    return mapped, ignored, problems


def _shape_problems(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> list[str]:
    """What shapes differ, in one text if any do."""
    shapes = [
        f"{_quote(name)} is {tuple(value.shape)}, expected {tuple(parameter.shape)}"
        for name, (value, parameter) in pairs.items()
        if value.shape != parameter.shape
    ]
    if not shapes:
        return []
    more = f"; {len(shapes) - _SHOWN} more" if len(shapes) > _SHOWN else ""
    return [f"{len(shapes)} shapes differ: {'; '.join(shapes[:_SHOWN])}{more}"]


def _converted(
    checkpoint: _Checkpoint, mapped: Mapping[str, str], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The values in the model's dtypes, by the model's names, and what to say about them."""
    tensors, values = checkpoint.tensors, {}
    not_finite, dtypes = [], set()
    for name, target in mapped.items():
        value = tensors[name].detach()
        converted = value.to(own[target].dtype)
        if converted.is_floating_point() and not bool(converted.isfinite().all()):
            if bool((converted.isinf() & value.isfinite()).any()):
                raise ValueError(
                    f"{checkpoint.source}: {_quote(name)} does not fit {converted.dtype}"
                )
            not_finite.append(name)
        if value.dtype != converted.dtype:
            dtypes.add(f"{value.dtype} to {converted.dtype}")
        values[target] = converted
    notes = [f"values were converted from {text}" for text in sorted(dtypes)]
    if not_finite:
        notes.append(f"tensors that hold NaN or infinity: {_some(not_finite)}")
    return values, notes


def _value_problem(name: str, value: Tensor, parameter: Tensor) -> str | None:
    """Why a tensor's values cannot become a parameter's, if they cannot."""
    if value.is_quantized or value.layout is not torch.strided:
        kind = "quantized" if value.is_quantized else "sparse"
        return f"{_quote(name)} is {kind}: expected a dense tensor"
    if value.is_meta:
        return f"{_quote(name)} has no values (it is on the meta device)"
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return f"{_quote(name)} of shape {tuple(value.shape)} has fewer values than that"
    if value.is_floating_point() != parameter.is_floating_point() or value.is_complex():
        return f"{_quote(name)} is of {value.dtype}: expected {parameter.dtype}"
    return None


def _text(key: Any) -> str:
    return key if isinstance(key, str) else reprlib.repr(key)


def _quote(name: str) -> str:
    text = repr(name)
    return text if len(text) <= _SHOWN_LETTERS else f"{text[: _SHOWN_LETTERS - 4]}...'"


def _some(names: Any) -> str:
    """The first few names."""
    shown = ", ".join(_quote(name) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
