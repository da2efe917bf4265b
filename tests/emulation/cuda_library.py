"""The CUDA C++ of ``csrc/cuda`` compiled by g++ and run on the CPU's memory.

    library = cuda_library.load()
    library.pool(Pool(dtype=torch.float16, window=..., input=Segment(data=x, ...), output=y, ...))

Every kernel's thread is a fiber: see ``cuda/host_cuda.h`` for what that checks. The structs below
are those of ``csrc/cuda/operands.h``; a pointer is a tensor on the CPU, which the struct keeps
alive. What a launcher throws is raised: ``std::invalid_argument`` as :class:`ValueError`, what a
kernel must not do as :class:`EmulationError`, anything else as :class:`RuntimeError`.

``load("address")``, ``"undefined"`` and ``"thread"`` are the same library under a sanitizer. Each
call then runs in a process of its own, on copies of the tensors, and a report is raised as
:class:`SanitizerError`. ``load(mutations=mutation(path, old, new))`` is the library with a planted
bug.

Objects and libraries are kept in ``build/emulation``, under a hash of what they are made from.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "VARIANTS",
    "Configuration",
    "Convolution",
    "Device",
    "EmulationError",
    "Gather",
    "Head",
    "Launch",
    "Library",
    "Operands",
    "Packing",
    "Pool",
    "SanitizedLibrary",
    "SanitizerError",
    "Segment",
    "StemConvolution",
    "Tile",
    "VectorPacking",
    "Window",
    "build",
    "cuda_include",
    "fingerprint",
    "load",
    "mutation",
    "skip_reason",
    "sources_of_library",
]

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
EMULATION = Path(__file__).resolve().parent / "cuda"
BUILD = ROOT / "build" / "emulation"
# Where `#include "..."` looks, behind the folder of the file that has it.
_FOLDERS = (EMULATION, CSRC)

# Of operands.h.
MAX_SEGMENTS = 16
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_FLAGS = ("-std=c++17", "-fPIC", "-fno-gnu-unique", "-DTHRESHNET_FAST_EMULATION")
_DEBUGGABLE = ("-g1", "-fno-omit-frame-pointer")
# What the compiler gets for each variant.
VARIANTS: dict[str, tuple[str, ...]] = {
    # The emulation has its own handler of what -fsanitize=alignment finds.
    "plain": ("-O2", "-fsanitize=alignment"),
    "address": ("-O1", *_DEBUGGABLE, "-fsanitize=address", "-DEMULATION_ADDRESS_SANITIZER"),
    "undefined": (
        "-O1",
        *_DEBUGGABLE,
        "-fsanitize=undefined",
        "-fno-sanitize-recover=all",
        "-DEMULATION_UNDEFINED_SANITIZER",
    ),
    "thread": ("-O1", *_DEBUGGABLE, "-fsanitize=thread", "-DEMULATION_THREAD_SANITIZER"),
}
_SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:exitcode=66",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:atexit_sleep_ms=0",
}
_KEPT_SECONDS = 7 * 24 * 3600
_TEXT_BYTES = 4096

ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}


class EmulationError(RuntimeError):
    """A kernel did what it must not do; the text says what, and where."""


class SanitizerError(EmulationError):
    """A sanitizer's report."""


# The structs of csrc/cuda/operands.h.


class Operands(ctypes.Structure):
    """A struct of a launcher's operands.

    Fields are given by name. A pointer is a tensor on the CPU or None; a dtype is a
    :class:`torch.dtype`; an array is a sequence, filled up with zeros.
    """

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        for name, value in fields.items():
            setattr(self, name, value)

    @property
    def tensors(self) -> dict[int, Tensor]:
        """The tensor of each pointer, by the pointer's offset in the struct."""
        return self.__dict__.setdefault("_tensors", {})

    def __setattr__(self, name: str, value: Any) -> None:
        kind = dict(self._fields_).get(name)
        if kind is None:
            raise AttributeError(f"{type(self).__name__} has no field {name}")
        offset = getattr(type(self), name).offset
        if kind is ctypes.c_void_p:
            if self._b_base_ is not None:
                raise TypeError(f"set {name} before this {type(self).__name__} becomes a part")
            self.tensors.pop(offset, None)
            if value is not None:
                value = self._address(name, value, offset)
        elif isinstance(value, torch.dtype):
            value = DTYPES[value]
        elif isinstance(value, Operands):
            self._adopt(value, offset)
        elif issubclass(kind, ctypes.Array):
            value = tuple(value)
            for index, item in enumerate(value):
                if isinstance(item, Operands):
                    self._adopt(item, offset + index * ctypes.sizeof(item))
        super().__setattr__(name, value)

    def _address(self, name: str, tensor: Any, offset: int) -> int:
        if not isinstance(tensor, Tensor) or tensor.device.type != "cpu":
            raise TypeError(f"{name} is {tensor!r}: expected a tensor on the CPU, or None")
        self.tensors[offset] = tensor
        return tensor.data_ptr()

    def _adopt(self, part: Operands, offset: int) -> None:
        end = offset + ctypes.sizeof(part)
        for other in [other for other in self.tensors if offset <= other < end]:
            del self.tensors[other]
        for inner, tensor in part.tensors.items():
            self.tensors[offset + inner] = tensor


_Int = ctypes.c_int32
_Long = ctypes.c_int64
_Pointer = ctypes.c_void_p


class Segment(Operands):
    _fields_ = (("data", _Pointer), ("pitch", _Int), ("channels", _Int))


class Window(Operands):
    _fields_ = tuple(
        (name, _Int)
        for name in (
            "batch",
            "in_height",
            "in_width",
            "out_height",
            "out_width",
            "kernel_height",
            "kernel_width",
            "stride",
            "padding",
        )
    )


class Convolution(Operands):
    _fields_ = (
        ("dtype", _Int),
        ("segment_count", _Int),
        ("segments", Segment * MAX_SEGMENTS),
        ("window", Window),
        ("weight", _Pointer),
        ("weight_columns", _Int),
        ("out_channels", _Int),
        ("scale", _Pointer),
        ("shift", _Pointer),
        ("output_scale", _Pointer),
        ("bias", _Pointer),
        ("output", _Pointer),
        ("output_pitch", _Long),
        ("partials", _Pointer),
        ("relu", _Int),
    )


class StemConvolution(Operands):
    _fields_ = (
        ("dtype", _Int),
        ("window", Window),
        ("input", _Pointer),
        ("batch_stride", _Long),
        ("channel_stride", _Long),
        ("height_stride", _Long),
        ("width_stride", _Long),
        ("in_channels", _Int),
        ("weight", _Pointer),
        ("weight_columns", _Int),
        ("out_channels", _Int),
        ("bias", _Pointer),
        ("output", _Pointer),
        ("output_pitch", _Long),
        ("relu", _Int),
    )


class Pool(Operands):
    _fields_ = (
        ("dtype", _Int),
        ("window", Window),
        ("input", Segment),
        ("output", _Pointer),
        ("output_pitch", _Long),
        ("out_channels", _Int),
        ("average", _Int),
    )


class Head(Operands):
    _fields_ = (
        ("dtype", _Int),
        ("batch", _Int),
        ("pixels", _Int),
        ("input", Segment),
        ("weight", _Pointer),
        ("classes", _Int),
        ("bias", _Pointer),
        ("output", _Pointer),
    )


class Gather(Operands):
    _fields_ = (
        ("dtype", _Int),
        ("batch", _Int),
        ("channels", _Int),
        ("height", _Int),
        ("width", _Int),
        ("input", _Pointer),
        ("batch_stride", _Long),
        ("channel_stride", _Long),
        ("height_stride", _Long),
        ("width_stride", _Long),
        ("output", _Pointer),
        ("output_pitch", _Int),
        ("output_channels", _Int),
    )


class Packing(Operands):
    _fields_ = (
        ("source_dtype", _Int),
        ("dtype", _Int),
        ("segment_count", _Int),
        ("channels", _Int * MAX_SEGMENTS),
        ("padded_in", _Int),
        ("taps", _Int),
        ("out_channels", _Int),
        ("columns", _Int),
        ("rows_are_outputs", _Int),
        ("source", _Pointer),
        ("output", _Pointer),
    )


class VectorPacking(Operands):
    _fields_ = (
        ("source_dtype", _Int),
        ("segment_count", _Int),
        ("channels", _Int * MAX_SEGMENTS),
        ("length", _Int),
        ("source", _Pointer),
        ("output", _Pointer),
    )


class Configuration(Operands):
    _fields_ = (("tile", _Int), ("parts", _Int))


class Tile(Operands):
    _fields_ = tuple(
        (name, _Int) for name in ("pixels", "columns", "depth", "threads", "stages", "shared_bytes")
    )


class Device(Operands):
    _fields_ = (("architecture", _Int), ("multiprocessors", _Int), ("shared_bytes", _Int))


_STRUCTS: tuple[type[Operands], ...] = (
    Segment,
    Window,
    Convolution,
    StemConvolution,
    Pool,
    Head,
    Gather,
    Packing,
    VectorPacking,
    Configuration,
    Tile,
    Device,
)


# Building.


def compiler() -> str | None:
    """Returns g++, or None."""
    return shutil.which("g++")


@functools.cache
def cuda_include() -> Path | None:
    """Returns the folder of CUDA's headers, or None."""
    candidates = [
        Path(os.environ[name]) / "include"
        for name in ("CUDA_HOME", "CUDA_PATH")
        if name in os.environ
    ]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        # nvcc may be a script that calls the real one: itself knows where its headers are.
        steps = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
        )
        candidates += map(Path, re.findall(r'"-I([^"]+)"', steps.stderr))
    candidates.append(Path("/usr/local/cuda/include"))
    for candidate in candidates:
        if all((candidate / name).is_file() for name in ("cuda_bf16.h", "cuda_runtime.h")):
            return candidate.resolve()
    return None


def skip_reason() -> str | None:
    """Returns why nothing can be built, or None."""
    if compiler() is None:
        return "there is no g++"
    if cuda_include() is None:
        return "there are no headers of CUDA"
    return None


def sources_of_library() -> list[Path]:
    """Returns all sources of the CUDA half that know nothing of torch."""
    sources = {*CSRC.glob("*.cpp"), *CSRC.glob("cuda/*.cpp"), *CSRC.glob("cuda/*.cu")}
    return sorted(sources - {CSRC / "schemas.cpp", CSRC / "cuda" / "bindings.cpp"})


def mutation(path: str, old: str, new: str, count: int = 1) -> dict[str, str]:
    """Returns a planted bug: a source with one text instead of another.

    Args:
        path: The source, from the repository's root.
        old: What it has ``count`` times.
        new: What to write instead.

    Raises:
        ValueError: If ``old`` is not there as often: the test has to follow the source.
    """
    text = (ROOT / path).read_text(encoding="utf-8")
    if text.count(old) != count:
        raise ValueError(f"{path} has {text.count(old)} times {old!r}: expected {count}")
    return {path: text.replace(old, new)}


def build(
    variant: str = "plain",
    sources: Sequence[Path] | None = None,
    *,
    mutations: Mapping[str, str] | None = None,
) -> Path:
    """Builds the emulated library: a shared one, or a program where a sanitizer is in it.

    Args:
        variant: A key of :data:`VARIANTS`.
        sources: Of the library; by default :func:`sources_of_library`. The emulation's own are
            added.
        mutations: Texts to take instead of those of files, by their paths from the repository's
            root. Only what includes them is compiled again.

    Returns:
        Its path.

    Raises:
        RuntimeError: If it does not compile or link.
    """
    sources = sources_of_library() if sources is None else sources
    own = [path for path in EMULATION.glob("*.cpp") if variant != "plain" or path.stem != "runner"]
    tree = _Tree(dict(mutations or {}))
    tree.add(_layout_source(), _layout_checks())
    BUILD.mkdir(parents=True, exist_ok=True)
    objects = _compile(variant, [*sources, *sorted(own), _layout_source()], tree)
    return _link(variant, objects)


def load(
    variant: str = "plain",
    sources: Sequence[Path] | None = None,
    *,
    mutations: Mapping[str, str] | None = None,
) -> Library | SanitizedLibrary:
    """Builds the emulated library and returns its launchers; the arguments are :func:`build`'s."""
    path = build(variant, sources, mutations=mutations)
    return _loaded(path) if variant == "plain" else SanitizedLibrary(path)


@functools.cache
def _loaded(path: Path) -> Library:
    return Library(path)


class _Tree:
    """The sources, some of them with another text, and what each of them includes."""

    def __init__(self, texts: dict[str, str]) -> None:
        self._texts = {ROOT / path: text for path, text in texts.items()}
        for path in self._texts:
            if not path.is_file():
                raise ValueError(f"there is no {path.relative_to(ROOT)} to mutate")
        self._mutated = set(self._texts)

    def add(self, path: Path, text: str) -> None:
        self._texts[path] = text

    def text(self, path: Path) -> str:
        if path not in self._texts:
            self._texts[path] = path.read_text(encoding="utf-8")
        return self._texts[path]

    def closure(self, source: Path) -> list[Path]:
        """Returns a source and all files of the repository that it includes."""
        found: list[Path] = []
        waiting = [source]
        while waiting:
            path = waiting.pop()
            if path in found:
                continue
            found.append(path)
            for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', self.text(path), re.MULTILINE):
                for folder in (path.parent, *_FOLDERS):
                    included = Path(os.path.normpath(folder / name))
                    if included in self._texts or included.is_file():
                        waiting.append(included)
                        break
        return sorted(found)

    def on_disk(self, closure: Sequence[Path]) -> bool:
        """Returns whether all files are as they are in the repository."""
        return all(path not in self._mutated and path.is_file() for path in closure)


def _layout_source() -> Path:
    return EMULATION / "generated_layout.cpp"


def _layout_checks() -> str:
    """Returns C++ that compiles if the structs here are those of ``operands.h``."""
    lines = [
        '#include "cuda/operands.h"',
        "#include <cstddef>",
        "using namespace threshnet_fast::cuda;",
    ]
    for kind in _STRUCTS:
        name = kind.__name__
        lines.append(f'static_assert(sizeof({name}) == {ctypes.sizeof(kind)}, "{name}");')
        for member, _ in kind._fields_:
            place = getattr(kind, member)
            lines.append(
                f"static_assert(offsetof({name}, {member}) == {place.offset} && "
                f'sizeof({name}::{member}) == {place.size}, "{name}::{member}");'
            )
    return "\n".join(lines) + "\n"


def _make(target: Path, make: Callable[[Path], None]) -> Path:
    """Returns a file of the build, made under another name first unless it is there.

    Of several processes that want it, one makes it, and the others wait.
    """
    with (BUILD / f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_file():
            os.utime(target)
            return target
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made = Path(folder) / target.name
            make(made)
            made.replace(target)
    return target


@functools.cache
def _instruction_sets() -> tuple[str, ...]:
    """Returns flags for what makes products fast on this machine."""
    with contextlib.suppress(OSError):
        flags = re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if flags is not None and {"avx2", "fma"} <= set(flags[1].split()):
            return ("-mavx2", "-mfma")
    return ()


@functools.cache
def _compiler_version() -> str:
    command = [str(compiler()), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _flags(variant: str, source: Path) -> list[str]:
    flags = [*_FLAGS, *VARIANTS[variant], *_instruction_sets()]
    if source.parent == EMULATION and source.suffix == ".cpp":
        flags = [flag for flag in flags if flag not in ("-O1", "-O2")] + ["-O3"]
        if variant == "plain":
            flags = [flag for flag in flags if flag != "-fsanitize=alignment"]
        if variant == "thread":
            # Its accesses are none of the kernels': see sanitizers.h.
            flags.remove("-fsanitize=thread")
            flags.append("-fno-tree-loop-distribute-patterns")
    return flags


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


def fingerprint(source: Path, *others: str) -> str:
    """Returns a hash of a source, all files of the repository that it includes, and other texts."""
    tree = _Tree({})
    files = [part for path in tree.closure(source) for part in (str(path), tree.text(path))]
    return _hash(str(source), *files, *others)


def _compile(variant: str, sources: Sequence[Path], tree: _Tree) -> list[Path]:
    def compile_one(source: Path) -> Path:
        closure = tree.closure(source)
        flags = _flags(variant, source)
        files = [part for path in closure for part in (str(path), tree.text(path))]
        key = _hash(_compiler_version(), str(cuda_include()), *flags, str(source), *files)

        def make(target: Path) -> None:
            root = ROOT
            if not tree.on_disk(closure):
                root = target.parent / "tree"
                for path in closure:
                    copy = root / path.relative_to(ROOT)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_text(tree.text(path), encoding="utf-8")
            _run(
                [
                    *flags,
                    f"-ffile-prefix-map={root}/=",
                    *(f"-I{root / folder.relative_to(ROOT)}" for folder in _FOLDERS),
                    *("-isystem", str(cuda_include())),
                    *("-x", "c++", "-c", str(root / source.relative_to(ROOT))),
                    *("-o", str(target)),
                ]
            )

        return _make(BUILD / f"{source.stem}-{key}.o", make)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def _link(variant: str, objects: Sequence[Path]) -> Path:
    if variant == "plain":
        # Of several such libraries in a process, each uses its own functions.
        suffix, flags = ".so", ["-shared", "-Wl,-Bsymbolic"]
    else:
        # So that kernels have names at run time.
        suffix, flags = "", ["-rdynamic", *VARIANTS[variant]]
    paths = [str(path) for path in objects]

    def make(target: Path) -> None:
        _run([*flags, *paths, "-ldl", "-o", str(target)])
        for path in BUILD.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                    path.unlink()

    return _make(BUILD / f"{variant}-{_hash(*flags, *paths)}{suffix}", make)


def _run(arguments: Sequence[str]) -> None:
    done = subprocess.run(
        [str(compiler()), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"g++ {' '.join(arguments)}\n{done.stderr}")


# Calling.


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded.

    Attributes:
        kernel: Its mangled name.
        grid: Blocks along x and y.
        threads: Of a block.
        shared_bytes: Of a block.
        parameters: The bytes of the struct that the kernel takes.
    """

    kernel: str
    grid: tuple[int, int]
    threads: int
    shared_bytes: int
    parameters: bytes


@dataclass
class _Settings:
    order: str = "forward"
    seed: int = 0
    device: Device = field(
        default_factory=lambda: Device(
            architecture=90, multiprocessors=132, shared_bytes=227 * 1024
        )
    )


class _Launchers:
    """The launchers of ``operands.h``, and how they are run."""

    def __init__(self) -> None:
        self._settings = _Settings()

    def call(self, name: str, *arguments: Any, result: Any = None) -> Any:
        """Calls a launcher, on stream null where it takes one.

        Args:
            name: Its name.
            arguments: :class:`Operands` or numbers of :mod:`ctypes`, as it takes them.
            result: The type that it returns, or None.

        Returns:
            What it returns; None for nothing.

        Raises:
            ValueError: What it throws as ``std::invalid_argument``.
            EmulationError: If a kernel does what it must not do.
            RuntimeError: What else it throws.
            LookupError: If the library has no such launcher.
        """
        raise NotImplementedError

    @contextlib.contextmanager
    def schedule(self, order: str, seed: int = 0) -> Iterator[None]:
        """Runs threads and blocks in an order: ``forward``, ``reverse`` or ``shuffled``."""
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}: expected one of {', '.join(ORDERS)}")
        before = self._settings.order, self._settings.seed
        self._settings.order, self._settings.seed = order, seed
        self._apply()
        try:
            yield
        finally:
            self._settings.order, self._settings.seed = before
            self._apply()

    @contextlib.contextmanager
    def device(self, device: Device) -> Iterator[None]:
        """Checks launches against a device; by default sm_90 with 227 KiB of shared memory."""
        before = self._settings.device
        self._settings.device = device
        self._apply()
        try:
            yield
        finally:
            self._settings.device = before
            self._apply()

    def _apply(self) -> None:
        pass

    def tile_count(self, dtype: torch.dtype) -> int:
        return self.call("tile_count", _Int(DTYPES[dtype]), result=ctypes.c_int).value

    def tile_of(self, dtype: torch.dtype, tile: int) -> Tile:
        return self.call("tile_of", _Int(DTYPES[dtype]), _Int(tile), result=Tile)

    def choose(self, convolution: Convolution, device: Device) -> Configuration:
        return self.call("choose", convolution, device, result=Configuration)

    def objection(self, dtype: torch.dtype, architecture: int) -> str | None:
        arguments = _Int(DTYPES[dtype]), _Int(architecture)
        text = self.call("objection", *arguments, result=ctypes.c_char * 256).value
        return text.decode() or None

    def partial_floats(self, convolution: Convolution, configuration: Configuration) -> int:
        return self.call("partial_floats", convolution, configuration, result=_Long).value

    def convolve(self, convolution: Convolution, configuration: Configuration) -> None:
        self.call("convolve", convolution, configuration, _Pointer())

    def convolve_stem(self, convolution: StemConvolution) -> None:
        self.call("convolve_stem", convolution, _Pointer())

    def pool(self, pool: Pool) -> None:
        self.call("pool", pool, _Pointer())

    def head(self, head: Head) -> None:
        self.call("head", head, _Pointer())

    def gather(self, gather: Gather) -> None:
        self.call("gather", gather, _Pointer())

    def pack_weight(self, packing: Packing) -> None:
        self.call("pack_weight", packing, _Pointer())

    def pack_vector(self, packing: VectorPacking) -> None:
        self.call("pack_vector", packing, _Pointer())


def _raise(outcome: int, text: str) -> None:
    kinds = {1: ValueError, 2: EmulationError, 3: RuntimeError, 4: LookupError}
    if outcome != 0:
        raise kinds[outcome](text)


_RECORDER = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
)


class Library(_Launchers):
    """The library in this process, without sanitizers.

    Args:
        path: What :func:`build` returned.

    Attributes:
        path: Of the shared library.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.emulation_set_schedule.argtypes = (ctypes.c_int, ctypes.c_uint64)
        self._library.emulation_set_recorder.argtypes = (ctypes.c_void_p,)

    def call(self, name: str, *arguments: Any, result: Any = None) -> Any:
        count = len(arguments)
        addresses = (ctypes.c_void_p * count)(*map(ctypes.addressof, arguments))
        sizes = (ctypes.c_size_t * count)(*map(ctypes.sizeof, arguments))
        returned = None if result is None else result()
        text = ctypes.create_string_buffer(_TEXT_BYTES)
        outcome = self._library.emulation_call(
            name.encode(),
            addresses,
            sizes,
            ctypes.c_size_t(count),
            None if returned is None else ctypes.byref(returned),
            ctypes.c_size_t(0 if returned is None else ctypes.sizeof(returned)),
            text,
            ctypes.c_size_t(_TEXT_BYTES),
        )
        _raise(outcome, text.value.decode(errors="replace"))
        return returned

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[Launch]]:
        """Writes launches down instead of running them: for the PTX emulator to run."""
        launches: list[Launch] = []

        def record(
            kernel: bytes, blocks: int, parts: int, threads: int, shared: int, data: int, size: int
        ) -> None:
            parameters = ctypes.string_at(data, size)
            launches.append(Launch(kernel.decode(), (blocks, parts), threads, shared, parameters))

        callback = _RECORDER(record)
        self._library.emulation_set_recorder(ctypes.cast(callback, ctypes.c_void_p))
        try:
            yield launches
        finally:
            self._library.emulation_set_recorder(None)

    def _apply(self) -> None:
        settings = self._settings
        self._library.emulation_set_schedule(ORDERS[settings.order], settings.seed)
        device = settings.device
        self._library.emulation_set_device(
            device.architecture, device.multiprocessors, device.shared_bytes
        )


class SanitizedLibrary(_Launchers):
    """The library in a program under a sanitizer, which runs once for each call.

    Args:
        path: What :func:`build` returned.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def call(self, name: str, *arguments: Any, result: Any = None) -> Any:
        buffers: dict[int, Tensor] = {}
        pointers: list[int] = []
        for index, argument in enumerate(arguments):
            for offset, tensor in getattr(argument, "tensors", {}).items():
                storage = tensor.untyped_storage()
                start = storage.data_ptr()
                if start not in buffers:
                    buffers[start] = torch.empty(0, dtype=torch.uint8).set_(storage)
                position = list(buffers).index(start)
                pointers += [index, offset, position, tensor.data_ptr() - start]
        device = self._settings.device
        message = [
            _numbers(
                ORDERS[self._settings.order],
                self._settings.seed,
                device.architecture,
                device.multiprocessors,
                device.shared_bytes,
                len(buffers),
            )
        ]
        for buffer in buffers.values():
            message += [_numbers(buffer.numel()), buffer.numpy().tobytes()]
        message += [_numbers(len(name)), name.encode(), _numbers(len(arguments))]
        for argument in arguments:
            message += [_numbers(ctypes.sizeof(argument)), bytes(argument)]
        result_bytes = 0 if result is None else ctypes.sizeof(result)
        message += [_numbers(len(pointers) // 4, *pointers, result_bytes)]

        answer = self._run(b"".join(message))
        outcome, length = struct.unpack_from("=2Q", answer)
        position = 16 + length
        _raise(outcome, answer[16:position].decode(errors="replace"))
        returned = None
        if result is not None:
            returned = result.from_buffer_copy(answer, position)
        position += result_bytes
        for buffer in buffers.values():
            after = bytearray(answer[position : position + buffer.numel()])
            if after:
                buffer.copy_(torch.frombuffer(after, dtype=torch.uint8))
            position += buffer.numel()
        return returned

    def _run(self, message: bytes) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            given, got = Path(folder) / "input", Path(folder) / "output"
            given.write_bytes(message)
            command = [str(self.path), str(given), str(got)]
            done = self._finish(command)
            if "unexpected memory mapping" in done.stderr and shutil.which("setarch"):
                # ThreadSanitizer cannot stand addresses as random as some kernels make them.
                done = self._finish(["setarch", "--addr-no-randomize", *command])
            if done.returncode != 0:
                raise SanitizerError(done.stderr)
            return got.read_bytes()

    @staticmethod
    def _finish(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=os.environ | _SANITIZER_OPTIONS,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )


def _numbers(*values: int) -> bytes:
    return struct.pack(f"={len(values)}Q", *values)
