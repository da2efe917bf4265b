"""Choice of the backend, and what show_config says of it."""

import asyncio
import importlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from test_plan import small

import threshnet_fast as tf
from threshnet_fast import extension, ops, show_config, use_backend
from threshnet_fast import installation as config
from threshnet_fast.engines import cpu, cuda, registry, select, triton
from threshnet_fast.engines.base import Purpose
from threshnet_fast.engines.select import Choice, choose, requested_backend

# Small networks again and again: several threads would mostly wait for each other.
pytestmark = pytest.mark.usefixtures("one_thread")

needs_cpu_backend = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> str:
    reason = "the library is not there"
    monkeypatch.setattr(extension, "unavailable_reason", lambda: reason)
    return reason


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators' reference implementations that ran, by name."""
    calls: list[str] = []
    for name in ops.__all__:
        module = importlib.import_module(f"threshnet_fast.ops.{name}")

        def spy(*args, _name=name, _reference=module.reference):
            calls.append(_name)
            return _reference(*args)

        monkeypatch.setattr(module, "reference", spy)
    return calls


def run_both(dtype: torch.dtype = torch.float32, **options) -> None:
    x, one = torch.randn(1, 2, 4, 4, dtype=dtype), torch.ones(2, dtype=dtype)
    weight = torch.randn(2, 2, 1, 1, dtype=dtype)
    ops.cat_bn_relu_conv([x], one, one, weight, **options)
    ops.cat_conv_bn_relu([x], weight, one, one, padding=0, **options)


def test_default_is_auto() -> None:
    assert requested_backend() == "auto"


def test_blocks_nest_and_restore() -> None:
    with use_backend("reference"):
        assert requested_backend() == "reference"
        with use_backend("cpu"):
            assert requested_backend() == "cpu"
            with use_backend("auto"):
                assert requested_backend() == "auto"
            assert requested_backend() == "cpu"
        assert requested_backend() == "reference"
    assert requested_backend() == "auto"


def test_restores_after_an_error() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert requested_backend() == "auto"


def test_works_as_a_decorator_more_than_once() -> None:
    @use_backend("reference")
    def function() -> str:
        return requested_backend()

    assert [function(), requested_backend(), function()] == ["reference", "auto", "reference"]


def test_other_threads_keep_their_own() -> None:
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(requested_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_other_tasks_keep_their_own() -> None:
    async def task(name: str, mine: asyncio.Event, other: asyncio.Event) -> str:
        with use_backend(name):
            mine.set()
            await other.wait()
            return requested_backend()

    async def both() -> list[str]:
        a, b = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(task("reference", a, b), task("cpu", b, a))

    assert asyncio.run(both()) == ["reference", "cpu"]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("refrence", "reference"), ("CPU", "cpu"), ("Triton", "triton"), ("gpu", "cpu")],
)
def test_unknown_name_suggests_the_nearest(name: str, nearest: str) -> None:
    for call in (use_backend, lambda name: choose([torch.ones(1)], name)):
        with pytest.raises(ValueError, match=f"is '{name}': expected one of .*did you mean") as e:
            call(name)
        assert str(e.value).endswith(f"did you mean {nearest!r}?")


def test_name_like_no_other_lists_them_all() -> None:
    with pytest.raises(ValueError, match="name is 'xyzzy': expected one of") as caught:
        use_backend("xyzzy")
    assert all(repr(name) in str(caught.value) for name in select.names())
    assert "did you mean" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_refuses() -> None:
    with use_backend("cuda"):
        assert requested_backend() == "cuda"
        with pytest.raises(RuntimeError, match="backend 'cuda' is unavailable: "):
            run_both()
    with pytest.raises(RuntimeError, match="backend 'cuda' is unavailable: "):
        choose([torch.ones(1)], "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_triton_without_a_device_refuses() -> None:
    with pytest.raises(RuntimeError, match="backend 'triton' is unavailable: triton "):
        choose([torch.ones(1)], "triton")


@dataclass(frozen=True)
class OnGPU:
    """What a choice looks at of a tensor on a GPU that need not be there."""

    dtype: torch.dtype = torch.float16
    device: torch.device = field(default_factory=lambda: torch.device("cuda", 0))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Function that makes backends available on a GPU, the others not, each with a reason."""

    def make(*available: str, architecture: int = 90, failure: str | None = None) -> None:
        for module in (triton, cuda):
            name = module.__name__.rpartition(".")[2]
            reason = None if name in available else f"{name} is switched off"
            monkeypatch.setattr(module, "unavailable_reason", lambda reason=reason: reason)
        monkeypatch.setattr(triton, "_device_type", lambda: "cuda")
        monkeypatch.setattr(triton, "architecture", lambda: f"sm_{architecture}")
        properties = cuda.Properties(architecture, 132, 227 * 1024)
        monkeypatch.setattr(cuda, "_properties", lambda device: properties)
        monkeypatch.setattr(cuda, "_launch_failure", lambda device: failure)

    return make


def test_auto_takes_triton_first_on_a_gpu(gpu) -> None:
    gpu("triton", "cuda")
    reason = "first of 'auto'; torch.float16 on cuda:0, sm_90 kernels"
    assert choose([OnGPU()]) == Choice("triton", reason)
    assert select.network_backends(OnGPU()) == ("triton", "cuda")


def test_auto_takes_cuda_where_triton_objects(gpu) -> None:
    gpu("cuda")
    choice = choose([OnGPU()])
    assert choice.backend == "cuda"
    assert choice.reason == (
        "backend 'triton' is unavailable: triton is switched off; next of 'auto'; "
        "torch.float16 on cuda:0, CUDA C++ kernels for sm_90"
    )


def test_auto_falls_back_on_a_gpu_for_every_reason(gpu) -> None:
    gpu()
    reason = (
        "backend 'triton' is unavailable: triton is switched off; "
        "backend 'cuda' is unavailable: cuda is switched off"
    )
    assert choose([OnGPU()]) == Choice("reference", reason)
    gpu("triton", "cuda")
    choice = choose([OnGPU(torch.float64)])
    assert choice.backend == "reference"
    for name in ("triton", "cuda"):
        assert f"backend '{name}' needs one of torch.float16, torch.bfloat16" in choice.reason


def test_cuda_on_demand(gpu) -> None:
    gpu("triton", "cuda")
    what = "torch.float32 on cuda:0, CUDA C++ kernels for sm_90"
    choice = choose([OnGPU(torch.float32)], "cuda")
    assert choice == Choice("cuda", f"asked for by the argument backend; {what}")
    with use_backend("cuda"):
        assert choose([OnGPU(torch.float32)]).reason == f"asked for by use_backend; {what}"
        with pytest.raises(TypeError, match=r"backend 'cuda' needs one of .*torch\.float64"):
            choose([OnGPU(torch.float64)])
        with pytest.raises(ValueError, match=r"backend 'cuda' needs tensors on cuda, .* on cpu"):
            choose([torch.ones(1)])


@pytest.mark.parametrize("architecture", [70, 75, 80])
def test_cuda_on_older_devices(gpu, architecture: int) -> None:
    gpu("cuda", architecture=architecture)
    for dtype in cuda.DTYPES:
        backend = choose([OnGPU(dtype)]).backend
        runs = architecture >= (80 if dtype is torch.bfloat16 else 75)
        assert backend == ("cuda" if runs else "reference")


def test_cuda_that_was_built_for_other_devices(gpu) -> None:
    gpu("cuda", failure="its kernels do not start on cuda:0: no kernel image")
    choice = choose([OnGPU()])
    assert choice.backend == "reference"
    assert "backend 'cuda' is unavailable: its kernels do not start on cuda:0" in choice.reason
    with pytest.raises(RuntimeError, match="its kernels do not start"):
        choose([OnGPU()], "cuda")


def test_cuda_is_not_for_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in cuda.unavailable_reason()


def test_cuda_library_is_loaded_only_where_there_is_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    for name, reason in (("cuda_left_out_reason", None), ("cuda_unavailable_reason", "too old")):
        spy = lambda name=name, reason=reason: (asked.append(name), reason)[1]  # noqa: E731
        monkeypatch.setattr(extension, name, spy)
    monkeypatch.setattr(torch.version, "hip", None)
    for available, reason in ((False, "torch finds no CUDA device"), (True, "too old")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert cuda.unavailable_reason() == reason
    assert asked == ["cuda_left_out_reason", "cuda_unavailable_reason"]
    monkeypatch.setattr(extension, "cuda_left_out_reason", lambda: "it was not built")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.unavailable_reason() == "it was not built"


@pytest.mark.parametrize("name", [None, 1, ["cpu"]])
def test_name_of_another_type(name: object) -> None:
    with pytest.raises(TypeError, match=r"name is a .*: expected one of 'auto'"):
        use_backend(name)


@needs_cpu_backend
def test_auto_takes_the_cpu_for_float32(ran: list[str]) -> None:
    choice = choose([torch.ones(1)])
    assert choice.backend == "cpu"
    assert cpu.isa() in choice.reason
    run_both()
    assert ran == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_auto_falls_back_for_other_dtypes(dtype: torch.dtype, ran: list[str]) -> None:
    choice = choose([torch.ones(1, dtype=dtype)])
    reason = f"backend 'cpu' needs torch.float32 tensors, these are {dtype}"
    assert choice == Choice("reference", reason)
    run_both(dtype)
    assert ran == ["cat_bn_relu_conv", "cat_conv_bn_relu"]


def test_auto_falls_back_on_another_device() -> None:
    choice = choose([torch.ones(1, device="meta")])
    assert choice == Choice(
        "reference", "backend 'cpu' needs tensors on the CPU, these are on meta"
    )


@pytest.mark.usefixtures("without_extension")
def test_auto_falls_back_without_the_extension(ran: list[str]) -> None:
    choice = choose([torch.ones(1)])
    assert choice.backend == "reference"
    assert choice.reason == "backend 'cpu' is unavailable: the library is not there"
    run_both()
    assert ran == ["cat_bn_relu_conv", "cat_conv_bn_relu"]


@pytest.mark.usefixtures("without_extension")
def test_asking_for_the_cpu_without_the_extension() -> None:
    with pytest.raises(RuntimeError, match="backend 'cpu' is unavailable: the library is not"):
        run_both(backend="cpu")
    with use_backend("cpu"), pytest.raises(RuntimeError, match="backend 'cpu' is unavailable"):
        run_both()


@pytest.mark.parametrize("where", ["argument", "block"])
def test_reference_on_demand(where: str, ran: list[str]) -> None:
    if where == "argument":
        run_both(backend="reference")
    else:
        with use_backend("reference"):
            run_both()
    assert ran == ["cat_bn_relu_conv", "cat_conv_bn_relu"]


@needs_cpu_backend
def test_argument_wins_over_block(ran: list[str]) -> None:
    with use_backend("reference"):
        run_both(backend="cpu")
        run_both(backend="auto")
    assert ran == []


def test_reason_says_who_asked() -> None:
    assert "argument backend" in choose([torch.ones(1)], "reference").reason
    with use_backend("reference"):
        assert "use_backend" in choose([torch.ones(1)]).reason
        assert str(choose([torch.ones(1)])).startswith("reference (")


@needs_cpu_backend
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "neon"])
def test_reason_names_the_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THRESHNET_FAST_CPU_ISA", isa)
    try:
        cpu.isa()
    except ValueError as error:
        pytest.skip(str(error))
    assert choose([torch.ones(1)], "cpu").reason.endswith(f"{isa} kernels")
    assert show_config()["CPU instructions"] == f"{isa} (THRESHNET_FAST_CPU_ISA={isa})"


@needs_cpu_backend
def test_unknown_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error must not silently run something else."""
    monkeypatch.setenv("THRESHNET_FAST_CPU_ISA", "avx1024")
    with pytest.raises(ValueError, match="THRESHNET_FAST_CPU_ISA is 'avx1024'"):
        run_both()
    assert "unknown (ValueError: THRESHNET_FAST_CPU_ISA" in show_config()["CPU instructions"]


def test_show_config_prints_what_it_returns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THRESHNET_FAST_SOMETHING", "17")
    result = show_config()
    assert capsys.readouterr().out == f"{result}\n"
    assert result["torch"] == torch.__version__
    assert "THRESHNET_FAST_SOMETHING=17" in result["environment"].split()
    assert result["threads"].startswith(str(torch.get_num_threads()))
    for name, finding in result.entries:
        assert f"{name} " in str(result)
        assert "\n" not in finding
        assert not finding.startswith("unknown")


def test_show_config_follows_use_backend() -> None:
    with use_backend("reference"):
        assert show_config()["backend"] == "reference (asked for by use_backend)"


def test_show_config_without_the_extension(without_extension: str) -> None:
    result = show_config()
    assert result["C++ extension"] == f"off: {without_extension}"
    assert result["CPU instructions"] == f"none: {without_extension}"
    assert result["backend"] == f"auto: reference ({without_extension})"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_show_config_says_why_triton_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = show_config()["Triton"]
    assert str(triton.unavailable_reason()) in finding
    assert "off: " in finding
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    assert show_config()["Triton"] == "off: triton is not installed"


def test_show_config_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "unavailable_reason", lambda: None)
    monkeypatch.setattr(triton, "interpreting", lambda: False)
    monkeypatch.setattr(triton, "architecture", lambda: "sm_90")
    result = show_config()
    assert result["Triton"] == f"{triton.version()}, sm_90 kernels"
    assert result["backend"].startswith("auto: triton on CUDA devices, ")
    assert result["backend"].endswith(", else reference")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_show_config_says_why_the_cuda_kernels_are_off() -> None:
    assert show_config()["CUDA kernels"] == f"off: {cuda.unavailable_reason()}"


def test_show_config_with_cuda_kernels(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    result = show_config()
    assert result["CUDA kernels"] == "loaded, for sm_90"
    assert result["backend"].startswith("auto: cuda on CUDA devices, ")


def test_show_config_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise RuntimeError("one\ntwo")

    questions = dict.fromkeys(config._QUESTIONS, broken)
    monkeypatch.setattr(config, "_QUESTIONS", questions)
    result = show_config()
    assert len(result.entries) == len(questions)
    assert {finding for _, finding in result.entries} == {"unknown (RuntimeError: one two)"}


def test_show_config_survives_a_closed_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Closed())
    assert show_config()["threshnet_fast"]


class Mine(cpu.CpuEngine):
    """Another engine for the CPU, as a package of one's own may have one."""

    name = "mine"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def prepare(self, source, shape, *, head, setting):
        self.calls.append("prepare")
        plan = super().prepare(source, shape, head=head, setting=setting)
        plan.backend = self.name
        return plan

    def operator(self, name, xs, *arguments):
        self.calls.append(name)
        return super().operator(name, xs, *arguments)


@pytest.fixture
def mine() -> Iterator[Mine]:
    yield registry.register(Mine(), rank=-1, auto_on="cpu")
    registry.unregister(Mine.name)


@needs_cpu_backend
def test_an_engine_is_taken_everywhere_once_it_is_registered(mine: Mine, ran: list[str]) -> None:
    assert "mine" in select.names()
    model, x = small().eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        y = model(x)
        assert tf.explain(model, x).backend == "mine"
        frozen = tf.optimize(model, x)
    assert frozen.backend == "mine"
    assert frozen(x).equal(y)
    assert mine.calls == ["prepare", "prepare"]
    assert tf.explain(model, x).backend == "mine"
    model(x).sum().backward()
    run_both()
    with use_backend("mine"):
        run_both()
    run_both(backend="mine")
    assert mine.calls[2:] == ["cat_bn_relu_conv", "cat_conv_bn_relu"] * 3
    assert ran == []
    with pytest.raises(ValueError, match="engine 'mine' is registered"):
        registry.register(Mine())
    with use_backend("cpu"), torch.no_grad():
        assert tf.explain(model, x).backend == "cpu"
        assert model(x).equal(y)


@needs_cpu_backend
def test_an_engine_without_islands_runs_parts_with_one_input(mine: Mine) -> None:
    class Whole(Mine):
        name = "whole"
        islands = False

    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(), torch.nn.Tanh(), torch.nn.Conv2d(8, 4, 1)
    ).eval()
    x = torch.randn(2, 3, 9, 9)
    registry.register(Whole(), rank=-2, auto_on="cpu")
    try:
        with pytest.warns(UserWarning, match="2 is a Tanh"):
            frozen = tf.optimize(module, x)
        assert frozen.backend == "whole"
        assert [island.nodes for island in frozen.islands] == [2, 1]
        with torch.no_grad():
            for value in (x, x[:1], x.flip(3), torch.randn(1, 3, 12, 5)):
                torch.testing.assert_close(frozen(value), module(value), rtol=1e-4, atol=1e-5)
            both = torch.nn.Sequential(torch.nn.MaxPool2d(2), module[3]).eval()
            other = tf.optimize(both, torch.randn(1, 8, 4, 4))
            assert other.backend == "mine"
            assert "'whole' runs parts that read one image and make one map" in other.reason
    finally:
        registry.unregister(Whole.name)


def test_an_engine_that_is_gone_cannot_be_asked_for() -> None:
    registry.register(Mine(), auto_on="cpu")
    registry.unregister(Mine.name)
    assert choose([torch.ones(1)]).backend != "mine"
    with pytest.raises(ValueError, match="name is 'mine'"):
        use_backend("mine")


def reasons(model: torch.nn.Module, x: torch.Tensor) -> dict[str, str]:
    """Why the CPU's engine does not run, as everybody who asks it is told."""
    found = {"operators": choose([x]).reason}
    with use_backend("cpu"):
        for name, run in (("model(x)", model), ("explain", lambda x: tf.explain(model, x))):
            with pytest.raises(RuntimeError) as caught, torch.no_grad():
                run(x)
            found[name] = str(caught.value).removeprefix("backend 'cpu' cannot run this call: ")
    with torch.no_grad():
        found["explain, auto"] = tf.explain(model, x).reason
    found["optimize"] = tf.optimize(model, x).reason
    _, found["training"] = select.training_engine(x)
    return found


@needs_cpu_backend
def test_tensors_elsewhere_get_one_objection() -> None:
    x = torch.ones(1, 3, 32, 32, device="meta")
    found = reasons(small().eval().to("meta"), x)
    assert set(found.values()) == {"backend 'cpu' needs tensors on the CPU, these are on meta"}


@pytest.mark.usefixtures("without_extension")
def test_an_extension_that_is_missing_gets_one_objection() -> None:
    found = reasons(small().eval(), torch.ones(1, 3, 32, 32))
    assert set(found.values()) == {"backend 'cpu' is unavailable: the library is not there"}


@needs_cpu_backend
def test_a_dtype_gets_one_objection_for_each_purpose() -> None:
    x = torch.ones(1, 3, 32, 32, dtype=torch.float16)
    found = reasons(small().eval().half(), x)
    one = "backend 'cpu' needs torch.float32 tensors, these are torch.float16"
    assert {found.pop("operators"), found.pop("training")} == {one}
    several = "one of torch.float32, torch.bfloat16: these tensors are torch.float16"
    assert set(found.values()) == {f"backend 'cpu' needs {several}"}


@needs_cpu_backend
def test_autocast_is_an_objection_to_networks_and_training() -> None:
    x = torch.ones(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        dtype = select.autocast_dtype(x)
        assert dtype is torch.bfloat16
        texts = {
            str(cpu.ENGINE.objection(x, dtype, purpose))
            for purpose in (Purpose.NETWORK, Purpose.TRAINING)
        }
        assert texts == {tf.explain(small().eval().requires_grad_(False), x).reason}
    assert "autocast is enabled" in texts.pop()
    assert select.autocast_dtype(x) is None


@needs_cpu_backend
def test_an_engine_for_one_purpose_objects_to_the_others(mine: Mine) -> None:
    mine.dtypes = {Purpose.OPERATOR: (torch.float32,)}
    model, x = small().eval(), torch.ones(1, 3, 32, 32)
    with torch.no_grad(), use_backend("mine"):
        with pytest.raises(RuntimeError, match=r"call: backend 'mine' computes no networks$"):
            model(x)
        assert tf.optimize(model, x).reason == "backend 'mine' computes no networks"
    assert choose([x]).backend == "mine"


def test_engines_that_train_single_operations_only(gpu) -> None:
    gpu("triton", "cuda")
    engine, reason = select.training_engine(OnGPU(torch.float32))
    assert engine is None
    assert reason == (
        "backend 'triton' trains single operations only; "
        "backend 'cuda' trains single operations only"
    )


@pytest.mark.parametrize(
    ("device_type", "order"), [("cuda", ("triton", "cuda")), ("cpu", ("cpu",))]
)
def test_order_of_auto_is_that_of_the_ranks(device_type: str, order: tuple[str, ...]) -> None:
    assert registry.automatic(device_type) == order
    assert registry.automatic("meta") == ("cpu",)
