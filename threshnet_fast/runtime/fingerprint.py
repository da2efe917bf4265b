"""Whether a model is still what something was made of: a plan, packed weights, or chains.

There are two answers. :meth:`Fingerprint.same` compares all that was read, by value, in Python, and
takes as long as a small network. :meth:`Fingerprint.unchanged` asks in C++ whether the very same
objects are where they were, and takes microseconds; where they are not, nothing need have changed
that counts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import extension
from ..engines import samples, triton
from ..graph.settings import MODELESS, ModuleSettings
from ..models.validate import check_memory, has_memory

__all__ = ["Fingerprint"]

# What is compared at each place of a sample.
_SAMPLE_BYTES = 4

_version = operator.attrgetter("_version")
_data_ptr = Tensor.data_ptr


class Fingerprint:
    """What modules are when this is made; what their tensors are, when :meth:`take` is called.

    Args:
        modules: Names and modules.
        hooks: Attributes with the hooks that would have to run, as ``"_forward_hooks"``.
        contents: Whether what was made holds the tensors' values: then they must be the same with
            the same values. Otherwise they are read anew in each call, and others of the same
            shape, dtype, device and class do as well.
        outer: A module whose own hooks run around whatever is made.
        holders: More modules, of which nothing counts but which children they have.

    Attributes:
        names: Of the tensors.
        tensors: All parameters and buffers, but for counters of batches.
        without_memory: The name of one that had no memory when memory was looked at last, or None.
    """

    def __init__(
        self,
        modules: Iterable[tuple[str, nn.Module]],
        hooks: Sequence[str],
        *,
        contents: bool,
        outer: nn.Module | None = None,
        holders: Sequence[nn.Module] = (),
    ) -> None:
        named = list(modules)
        self._modules = [module for _, module in named]
        self._contents = contents
        self._children = [
            module._modules for module in (*holders, *self._modules) if module._modules
        ]
        self._child_modules = [tuple(children.values()) for children in self._children]
        self._settings = ModuleSettings(self._modules, hooks)
        self._hooks: list[dict[int, Any]] = [
            getattr(torch_module, f"_global{name}") for name in hooks
        ]
        for module in self._modules:
            if module is not outer:
                self._hooks += [getattr(module, name) for name in hooks]
        self._with_modes = [module for module in self._modules if type(module) not in MODELESS]
        slots = [
            (f"{prefix}.{name}".lstrip("."), tensors, name)
            for prefix, module in named
            for tensors in (module._parameters, module._buffers)
            for name in tensors
            if name != "num_batches_tracked"
        ]
        self._slots = [(tensors, name) for _, tensors, name in slots]
        self._found = self._find()
        self.names = [
            name
            for (name, _, _), tensor in zip(slots, self._found, strict=True)
            if tensor is not None
        ]
        self.tensors = [tensor for tensor in self._found if tensor is not None]
        self._kinds = _kinds(self._found)
        self._versions: list[int] = []
        self._addresses: list[int] = []
        self._sample: _Sample | None = None
        self.without_memory: str | None = None
        self._facts: Any = None

    def take(self) -> None:
        """Looks at the memory of the tensors, which are dense and know their versions.

        Raises:
            RuntimeError: A tensor spans memory that was freed.
        """
        self._addresses = list(map(_data_ptr, self.tensors))
        self._check_memory()
        if self._contents:
            self._versions = list(map(_version, self.tensors))
            if self.without_memory is None:
                self._sample = _Sample(self.tensors)
        self._facts = self._record()

    def hooked(self) -> bool:
        """Whether there are hooks that would have to run."""
        return any(self._hooks)

    def training(self) -> bool:
        """Whether a module that may compute something else in training mode is in it."""
        # A list, as a generator takes twice the time.
        return any([module.training for module in self._with_modes])  # noqa: C419

    def unchanged(self) -> bool:
        """Whether nothing has been touched since this was made, or :meth:`same` was asked.

        Then it is the :meth:`same`, and it is not :meth:`hooked`; with contents, none of it is in
        training mode.
        """
        facts = self._facts
        return facts is not None and facts.hold() and self._same_on_gpu()

    def same(self) -> bool:
        """Whether all is as it was, by value.

        Raises:
            RuntimeError: A tensor spans memory that was freed.
        """
        # Before it is compared, so that nothing can change in between.
        facts = self._record()
        found = self._find()
        same = (
            self._same_tensors(found)
            and [tuple(children.values()) for children in self._children] == self._child_modules
            and self._settings.same()
        )
        if same and facts is not None:
            self._facts = facts
        return same

    def _find(self) -> list[Tensor | None]:
        return [tensors.get(name) for tensors, name in self._slots]

    def _same_tensors(self, found: list[Tensor | None]) -> bool:
        if self._contents:
            return (
                not any(map(operator.is_not, found, self._found))
                and _kinds(found) == self._kinds
                and list(map(_version, self.tensors)) == self._versions
                and list(map(_data_ptr, self.tensors)) == self._addresses
                and (self._sample is None or self._sample.same())
            )
        if _kinds(found) != self._kinds:
            return False
        self.tensors = [tensor for tensor in found if tensor is not None]
        addresses = list(map(_data_ptr, self.tensors)) if self._addresses else []
        if addresses != self._addresses:
            self._addresses = addresses
            self._check_memory()
        return True

    def _check_memory(self) -> None:
        self.without_memory = None
        for name, tensor in zip(self.names, self.tensors, strict=True):
            if not has_memory(tensor):
                # Whoever took it may give it back in a hook of the module.
                self.without_memory = name
                return
            check_memory(name, tensor)

    def _record(self) -> Any:
        """Returns the facts of which :meth:`unchanged` asks whether they hold.

        None where some that it needs do not hold now, or cannot be recorded.
        """
        recorder = _recorder()
        if recorder is None or not self._addresses or self.hooked():
            return None
        # Of memory that moved, the sample may not be read.
        if self._contents and (
            self.training() or list(map(_data_ptr, self.tensors)) != self._addresses
        ):
            return None
        facts = recorder()
        self._settings.record(facts)
        for dictionary in (*self._hooks, *self._children):
            facts.values(dictionary)
        for tensors, name in self._slots:
            facts.entry(tensors, name)
        if self._contents:
            for module in self._with_modes:
                facts.entry(module.__dict__, "training")
        try:
            for tensor in self._find():
                if tensor is not None:
                    facts.tensor(tensor, self._contents)
        except RuntimeError:
            return None
        if self._sample is not None:
            self._sample.record(facts)
        return facts

    def _same_on_gpu(self) -> bool:
        return self._sample is None or not self._sample.on_gpu or self._sample.same()


def _kinds(found: list[Tensor | None]) -> list[tuple[Any, ...] | None]:
    return [
        None
        if tensor is None
        else (
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.device,
            type(tensor),
            tensor.is_inference(),
        )
        for tensor in found
    ]


def _recorder() -> Callable[[], Any] | None:
    """Returns what records facts in C++, or None where that was not built."""
    if extension.unavailable_reason() is not None:
        return None
    try:
        # A library, which is loaded when it is first needed.
        from .. import _fingerprint  # type: ignore[attr-defined]
    except ImportError:
        return None
    return cast("Callable[[], Any]", _fingerprint.Facts)


class _Sample:
    """A sample of the tensors' contents, for the edits that PyTorch's version counters miss.

    ``parameter.data`` has a counter of its own: what is written through it changes neither the
    parameter's counter nor its address. A few elements of every tensor are compared, so that an
    edit of a whole tensor shows; one of a few elements may not. On a GPU, reading them waits for
    the device; a call that is being captured in a graph does not look.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        # Aliases keep the memory alive that is read.
        self._aliases = [tensor.detach() for tensor in tensors if _dense(tensor)]
        self._device = tensors[0].device
        self.on_gpu = self._device.type == "cuda"
        self._facts: Any = None
        if self.on_gpu:
            self._read = _reader_on_a_gpu(self._aliases, self._device)
            self._found = self._read()
            return
        recorder = _recorder()
        if recorder is not None:
            self._facts = recorder()
            self.record(self._facts)

    def record(self, facts: Any) -> None:
        """Records the sample, as it is now, of tensors on the CPU.

        Args:
            facts: What records them.
        """
        if self.on_gpu:
            return
        for alias in self._aliases:
            size, last = alias.element_size(), alias.nbytes - _SAMPLE_BYTES
            if last >= 0:
                middle = min(alias.numel() // 2 * size, last)
                facts.sample(alias, 0, middle, last)

    def same(self) -> bool:
        if not self.on_gpu:
            return self._facts is None or bool(self._facts.hold())
        with torch.cuda.device(self._device):
            if torch.cuda.is_current_stream_capturing():
                return True
        found = self._read()
        if isinstance(found, Tensor):
            return found.equal(cast(Tensor, self._found))
        return found == self._found


def _reader_on_a_gpu(tensors: list[Tensor], device: torch.device) -> Callable[[], int | Tensor]:
    if triton.unavailable_reason() is not None:
        views = samples.sample(tensors)
        return lambda: samples.read(views)
    # Imports triton.
    from ..kernels import checksum

    addresses = checksum.sample_addresses(tensors)

    def read() -> int:
        with torch.cuda.device(device):
            return checksum.checksum(addresses)

    return read


def _dense(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and (
        tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    )
