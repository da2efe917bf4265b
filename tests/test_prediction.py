"""The analytic model of GPUs: formulas by hand, sums, bounds that must hold, and what docs/ says.

Nothing here measures: the model is arithmetic, so equality with a hand calculation is the test.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import threshnet_fast as tf
from threshnet_fast.bench.gpus import DEVICES, PRECISIONS, Device, find_device, find_precision
from threshnet_fast.bench.prediction import Execution, Kernel, predict
from threshnet_fast.plan import Buffer, FusedConv, Head, Plan, Pool, Prologue, Segment, lower

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "prediction.md"
NAMES = [device.name for device in DEVICES]
NEVER = 1e30
"""A rate that never limits."""


def toy(**rates: float) -> Device:
    """A device on which only what a test names takes time."""
    defaults = {
        "memory_bandwidth": NEVER,
        "cache_bytes": 10**12,
        "cache_bandwidth": NEVER,
        "multiprocessors": 1,
        "float32_flops": NEVER,
        "tf32_flops": NEVER,
        "float16_flops": NEVER,
        "bfloat16_flops": NEVER,
        "kernel_seconds": 0.0,
        "dispatch_seconds": 0.0,
        "graph_seconds": 0.0,
    }
    return Device("toy", "Toy", "sm_0", **{**defaults, **rates})


def convolution_plan(
    channels: tuple[int, ...] = (16,),
    out_channels: int = 32,
    size: int = 8,
    kernel: int = 1,
    prologue: bool = False,
    bias: bool = False,
    relu: bool = False,
) -> Plan:
    """One convolution, stride 1, same padding, of the concatenation of these channels."""
    total = sum(channels)
    starts = [sum(channels[:index]) for index in range(len(channels))]
    vector = torch.ones(total)
    step = FusedConv(
        name="conv",
        inputs=tuple(Segment(0, start, c) for start, c in zip(starts, channels, strict=True)),
        output=Segment(1, 0, out_channels),
        weight=torch.empty(out_channels, total, kernel, kernel, device="meta"),
        bias=torch.ones(out_channels) if bias else None,
        prologue=Prologue(vector, vector) if prologue else None,
        stride=(1, 1),
        padding=(kernel // 2, kernel // 2),
        activation="relu" if relu else None,
        input_pixels=size * size,
        output_pixels=size * size,
        valid_taps=size * size * kernel**2,
        batch=1,
    )
    buffers = (Buffer(size, size, total, "x"), Buffer(size, size, out_channels, "y"))
    return Plan((1, total, size, size), buffers, (step,), False)


def small(**arguments) -> tf.ThreshNet:
    defaults = {
        "first_channels": (8, 12),
        "blocks": (2, 3, 5, 4),
        "transitions": (24, 20, 40, 48),
        "downsample": (True, False, True, False),
        "threshold": 2,
        "growth_rates": (8, 8, 10, 14),
        "num_classes": 7,
    }
    return tf.ThreshNet(**{**defaults, **arguments}).eval()


@functools.cache
def network_plan(name: str, size: int, batch: int) -> Plan:
    with torch.device("meta"):
        model = tf.create_model(name, num_classes=10).eval()
    return lower(model, (batch, 3, size, size), fold=False)


def operations(execution: Execution) -> list[str]:
    return [kernel.operation for kernel in execution.kernels]


class TestConvolution:
    """64 pixels, 16 to 32 channels, 1x1, float32, unless a test changes it."""

    @pytest.mark.parametrize(
        ("multiprocessors", "tiles_in_turn", "tile"),
        [
            # One at a time: any tiles, as none is padded; the first is 16x16.
            (1, 8, 16 * 16),
            # Four tiles of 16x32, or eight of 16x16, fill four processors.
            (4, 2, 16 * 16),
            # On three, eight small tiles take three turns; four larger ones would take two.
            (3, 3, 16 * 16),
            # Eight tiles on nine: one turn, one processor idle.
            (9, 1, 16 * 16),
        ],
    )
    def test_compute_is_quantised_in_waves(self, multiprocessors, tiles_in_turn, tile):
        device = toy(multiprocessors=multiprocessors, float32_flops=1e6)
        step = predict(convolution_plan(), device).steps[0]
        (kernel,) = step.fused.kernels
        expected = tiles_in_turn * 2 * tile * 16 * multiprocessors / 1e6
        assert kernel.compute_seconds == pytest.approx(expected)
        assert step.fused_graph_seconds == pytest.approx(expected)
        assert step.fused.bound == "compute"
        assert step.flops == 2 * 64 * 32 * 16

    def test_cache_traffic_of_the_largest_tile(self):
        kernel = predict(convolution_plan(), toy(cache_bandwidth=1e6)).steps[0].fused.kernels[0]
        # One tile of 64x32 loads 64 + 32 rows of 16 channels and writes 64 x 32 results.
        assert kernel.tile == "64x32"
        assert kernel.cache_seconds == pytest.approx(4 * (96 * 16 + 64 * 32) / 1e6)

    def test_half_precision_halves_traffic(self):
        device = toy(cache_bandwidth=1e6, memory_bandwidth=1e5, cache_bytes=0)
        plan = convolution_plan()
        single, half = (predict(plan, device, dtype) for dtype in ("float32", "float16"))
        assert half.fused_bytes * 2 == single.fused_bytes == plan.steps[0].bytes_fused
        assert half.unfused_bytes * 2 == single.unfused_bytes == plan.steps[0].bytes_unfused
        assert half.fused_graph_seconds * 2 == pytest.approx(single.fused_graph_seconds)

    def test_features_stay_in_the_cache_if_all_fits(self):
        plan = convolution_plan(bias=True)
        features, weights = 4 * 64 * (16 + 32), 4 * (16 * 32 + 32)
        fits = toy(memory_bandwidth=1e6, cache_bytes=features + weights)
        step = predict(plan, fits).steps[0]
        assert step.fused.seconds == pytest.approx(weights / 1e6)
        # The copy that BatchNorm writes is too much for the same cache: every pass goes to memory.
        normalised = 4 * 64 * 32
        assert step.unfused.seconds == pytest.approx((features + weights + 2 * normalised) / 1e6)
        assert step.unfused.bound == "memory"
        more = replace(fits, cache_bytes=features + weights + normalised)
        assert predict(plan, more).steps[0].unfused.seconds == pytest.approx(weights / 1e6)
        less = replace(fits, cache_bytes=features + weights - 1)
        fused = predict(plan, less).steps[0].fused
        assert fused.seconds == pytest.approx((features + weights) / 1e6)

    @pytest.mark.parametrize(
        ("arguments", "reads", "writes"),
        [
            ({}, 1, 1),
            ({"channels": (16, 16)}, 2, 1),
            ({"prologue": True}, 2, 1),
            ({"relu": True}, 1, 1),
            ({"channels": (16, 16), "prologue": True, "bias": True, "relu": True}, 3, 2),
        ],
    )
    def test_maps_that_unfused_kernels_keep_in_the_cache(self, arguments, reads, writes):
        plan = convolution_plan(**arguments)
        step = plan.steps[0]
        weights = 4 * step.parameters
        maps = 4 * 64 * (reads * step.input_channels + writes * 32)
        fits = toy(memory_bandwidth=1e6, cache_bytes=maps + weights)
        unfused = predict(plan, fits).steps[0].unfused
        assert unfused.seconds == pytest.approx(weights / 1e6)
        unfused = predict(plan, replace(fits, cache_bytes=maps + weights - 1)).steps[0].unfused
        assert unfused.seconds == pytest.approx(step.bytes_unfused / 1e6)

    def test_padding_to_whole_groups_and_tiles(self):
        plan = convolution_plan(channels=(10, 18), out_channels=20, size=7)
        step = predict(plan, toy(float32_flops=1e6)).steps[0]
        # 49 pixels in 4 x 16 rows, 20 channels in 2 x 16 columns; 10 + 18 channels are 16 + 32 in
        # two segments and 32 in a concatenation.
        assert step.fused.flops == 2 * 64 * 32 * (16 + 32)
        assert step.unfused.flops == 2 * 64 * 32 * 32
        assert step.flops == 2 * 49 * 20 * 28

    def test_padding_is_not_loaded(self):
        device = toy(cache_bandwidth=1e6)
        ragged = predict(convolution_plan(channels=(10,)), device).steps[0].fused
        assert ragged.seconds == pytest.approx(4 * (96 * 10 + 64 * 32) / 1e6)

    def test_taps_that_meet_no_pixel_are_skipped_when_fused(self):
        plan = convolution_plan(size=1, kernel=3)
        step = predict(plan, toy(memory_bandwidth=1e6, cache_bytes=0)).steps[0]
        assert step.fused.bytes == 4 * (16 + 32 + 16 * 32)
        assert step.unfused.bytes == 4 * (16 + 32 + 9 * 16 * 32)
        assert 9 * step.fused.flops == step.unfused.flops
        two = predict(convolution_plan(size=2, kernel=3), toy()).steps[0]
        assert two.fused.bytes == two.unfused.bytes

    def test_reduction_is_split_where_tiles_do_not_fill_the_device(self):
        plan = convolution_plan(channels=(1024,), out_channels=16, size=4)
        device = toy(multiprocessors=8, float32_flops=1e6)
        step = predict(plan, device).steps[0]
        # 16 pixels x 16 channels are one tile; 8 parts of 128 channels fill 8 processors.
        assert operations(step.fused) == ["conv1x1", "sum of parts"]
        assert step.fused.tile == "16x16x8"
        assert step.fused.launches == 2
        assert step.fused.seconds == pytest.approx(2 * 16 * 16 * 1024 / 1e6)
        assert step.fused.bytes == plan.steps[0].bytes_fused, "parts are neither feature nor weight"
        # A launch that costs more than splitting gains prevents it.
        slow = predict(plan, replace(device, kernel_seconds=10.0)).steps[0]
        assert slow.fused.tile == "16x16"
        assert slow.fused.launches == 1

    def test_traffic_of_the_parts(self):
        plan = convolution_plan(channels=(1024,), out_channels=16, size=4)
        device = toy(multiprocessors=8, float16_flops=1e6, cache_bandwidth=1e6)
        product, addition = predict(plan, device, "float16").steps[0].fused.kernels
        assert product.tile == "16x16x8"
        # Each part loads 128 channels of 16 pixels and 16 columns, and writes float32 sums.
        one = 2 * (16 + 16) * 128 + 4 * 16 * 16
        assert product.cache_seconds == pytest.approx(one * 8 / 1e6)
        assert addition.cache_seconds == pytest.approx((8 * 4 + 2) * 16 * 16 / 1e6)
        assert addition.bytes == addition.flops == 0

    @pytest.mark.parametrize("dtype", PRECISIONS)
    def test_each_precision_has_its_peak(self, dtype):
        device = toy(float32_flops=1e6, tf32_flops=2e6, float16_flops=4e6, bfloat16_flops=8e6)
        peak = {"float32": 1e6, "tf32": 2e6, "float16": 4e6, "bfloat16": 8e6}[dtype]
        assert device.peak_flops(dtype) == peak
        total = predict(convolution_plan(), device, dtype).fused_graph_seconds
        assert total == pytest.approx(2 * 64 * 32 * 16 / peak)


class TestLaunches:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ({}, ["conv1x1"]),
            ({"channels": (16, 8)}, ["cat", "conv1x1"]),
            ({"prologue": True}, ["batchnorm", "relu", "conv1x1"]),
            ({"kernel": 3, "bias": True, "relu": True}, ["conv3x3", "batchnorm", "relu"]),
            (
                {"channels": (8, 8, 4), "prologue": True, "bias": True, "relu": True},
                ["cat", "batchnorm", "relu", "conv1x1", "batchnorm", "relu"],
            ),
        ],
    )
    def test_kernels_of_a_convolution(self, arguments, expected):
        plan = convolution_plan(**arguments)
        prediction = predict(plan, toy())
        step = prediction.steps[0]
        assert operations(step.unfused) == expected
        assert prediction.unfused_launches == len(expected)
        assert operations(step.fused) == [plan.steps[0].describe()]
        assert step.unfused.bytes == plan.steps[0].bytes_unfused
        assert step.fused.bytes == plan.steps[0].bytes_fused

    def test_kernels_of_a_network(self):
        plan = lower(small(), (1, 3, 64, 64), fold=False)
        steps = {step.step.name: step for step in predict(plan, toy()).steps}
        assert operations(steps["base.0"].unfused) == ["conv3x3", "batchnorm", "relu"]
        assert operations(steps["base.2"].unfused) == ["maxpool3x3/2"]
        assert operations(steps["base.3.conv1"].unfused) == [
            "batchnorm",
            "relu",
            "conv1x1",
            "batchnorm",
            "relu",
        ]
        # A dense layer concatenates its output with what was there; a harmonic one does not.
        assert operations(steps["base.3.conv2"].unfused) == ["conv3x3", "cat"]
        layer = steps["base.11.layers.3"]
        assert operations(layer.unfused) == ["cat", "conv3x3", "batchnorm", "relu"]
        assert operations(steps["base.12"].unfused)[0] == "cat"
        head = predict(plan, toy()).steps[-1]
        assert operations(head.unfused) == ["global avgpool", "linear"]
        assert operations(head.fused) == ["global avgpool linear"]
        assert all(step.fused.launches == 1 for step in steps.values())

    def test_growth_of_a_dense_block_is_counted(self):
        plan = lower(small(), (2, 3, 64, 64), fold=False)
        steps = {step.step.name: step for step in predict(plan, toy()).steps}
        step = steps["base.4.conv2"]
        # 12 channels came in, layer 3 added 8 and layer 4 adds 8, on 2 maps of 16x16.
        assert step.step.output == Segment(step.step.output.buffer, 20, 8)
        assert step.unfused.kernels[-1].bytes == 2 * 4 * 2 * 16 * 16 * 28
        assert step.unfused.bytes - step.unfused.kernels[-1].bytes == step.step.bytes_unfused
        # What the convolution reads and writes, the 20 channels before it, and all 28 anew.
        maps = 4 * 2 * 16 * 16 * (32 + 8 + 20 + 28)
        weights = 4 * step.step.parameters
        fits = toy(memory_bandwidth=1e6, cache_bytes=maps + weights)
        for device, moved in (
            (fits, weights),
            (replace(fits, cache_bytes=maps + weights - 1), step.unfused.bytes),
        ):
            again = {step.step.name: step for step in predict(plan, device).steps}
            assert again["base.4.conv2"].unfused.seconds == pytest.approx(moved / 1e6)

    def test_head_and_pool_by_hand(self):
        head = Head("head", Segment(0, 0, 16), Segment(1, 0, 10), torch.empty(10, 16), None, 49, 2)
        buffers = (Buffer(7, 7, 16, "x"), Buffer(1, 1, 10, "y"))
        plan = Plan((2, 16, 7, 7), buffers, (head,), True)
        step = predict(plan, toy(memory_bandwidth=1e6, cache_bytes=0)).steps[0]
        reads, weights, writes, pooled = 2 * 49 * 16, 160, 20, 32
        assert step.fused.seconds == pytest.approx(4 * (reads + weights + writes) / 1e6)
        assert step.unfused.bytes == 4 * (reads + 2 * pooled + weights + writes)
        assert step.unfused.bytes == head.bytes_unfused
        assert step.flops == 2 * 2 * 160
        fits = 4 * (reads + pooled + weights + writes)
        for size, moved in ((fits, 4 * weights), (fits - 1, step.unfused.bytes)):
            device = toy(memory_bandwidth=1e6, cache_bytes=size)
            assert predict(plan, device).steps[0].unfused.seconds == pytest.approx(moved / 1e6)
        cached = predict(plan, toy(cache_bandwidth=1e6)).steps[0].fused
        # The map once, and one tile of 16 images by 16 classes of the product behind it.
        assert cached.seconds == pytest.approx(4 * (reads + 32 * 16 + 16 * 16) / 1e6)

        pool = Pool(
            "p", Segment(0, 0, 16), Segment(1, 0, 16), (2, 2), (2, 2), (0, 0), False, 64, 16, 3
        )
        buffers = (Buffer(8, 8, 16, "x"), Buffer(4, 4, 16, "y"))
        plan = Plan((3, 16, 8, 8), buffers, (pool,), False)
        step = predict(plan, toy(cache_bandwidth=1e6)).steps[0]
        assert step.fused == step.unfused
        assert step.fused.seconds == pytest.approx(pool.bytes_fused / 1e6)
        assert step.output_shape == (16, 4, 4)

    def test_head_without_classifier(self):
        plan = lower(small(num_classes=0), (1, 3, 32, 32), fold=False)
        step = predict(plan, "a100").steps[-1]
        assert operations(step.fused) == operations(step.unfused) == ["global avgpool"]

    def test_bound(self):
        def execution(kernel_seconds: float, *times: tuple[float, float, float]) -> Execution:
            kernels = tuple(Kernel("k", 0, 0, *seconds) for seconds in times)
            return Execution(kernels, kernel_seconds)

        assert execution(1.0, (2.0, 1.0, 1.5)).bound == "compute"
        assert execution(1.0, (2.0, 2.5, 1.5)).bound == "cache"
        assert execution(1.0, (2.0, 2.5, 3.0)).bound == "memory"
        assert execution(4.0, (2.0, 2.5, 3.0)).bound == "launch"
        # Two kernels of 2 limited by the cache outweigh one of 3 limited by arithmetic.
        several = execution(1.1, (3.0, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 2.0, 0.0))
        assert several.bound == "cache"
        assert several.seconds == pytest.approx(7.0 + 3 * 1.1)


class TestTimeline:
    """Two kernels unfused: a convolution of 1 second, then a concatenation of nothing else."""

    plan = convolution_plan(bias=True)

    def times(self, **rates: float):
        # Only the convolution reads weights, and all features stay in the cache.
        weights = 4 * (16 * 32 + 32)
        device = toy(memory_bandwidth=weights, kernel_seconds=0.25, **rates)
        return predict(self.plan, device)

    def test_graph(self):
        prediction = self.times(graph_seconds=8.0, dispatch_seconds=100.0)
        assert prediction.fused_graph_seconds == pytest.approx(8 + 1.25)
        assert prediction.unfused_graph_seconds == pytest.approx(8 + 1.25 + 0.25)

    def test_long_kernels_hide_the_host(self):
        prediction = self.times(dispatch_seconds=1.0)
        assert prediction.fused_eager_seconds == pytest.approx(1 + 1.25)
        # The second operation was enqueued at 2, while the first ran until 2.25.
        assert prediction.unfused_eager_seconds == pytest.approx(1 + 1.25 + 0.25)

    def test_short_kernels_wait_for_the_host(self):
        prediction = self.times(dispatch_seconds=10.0)
        assert prediction.fused_eager_seconds == pytest.approx(10 + 1.25)
        assert prediction.unfused_eager_seconds == pytest.approx(20 + 0.25)

    def test_parts_are_enqueued_with_their_convolution(self):
        plan = convolution_plan(channels=(1024,), out_channels=16, size=4)
        device = toy(multiprocessors=8, float32_flops=1e6, dispatch_seconds=3.0)
        prediction = predict(plan, device)
        assert prediction.fused_launches == 2
        assert prediction.fused_eager_seconds == pytest.approx(
            3.0 + prediction.steps[0].fused.seconds
        )

    def test_steps_follow_each_other(self):
        device = find_device("h100")
        prediction = predict(network_plan("threshnet79", 64, 1), device, "float16")
        first, *others = prediction.steps
        assert first.fused_graph_seconds == pytest.approx(
            device.graph_seconds + first.fused.seconds
        )
        for step in others:
            assert step.fused_graph_seconds == pytest.approx(step.fused.seconds)
            assert step.unfused_graph_seconds == pytest.approx(step.unfused.seconds)


@pytest.mark.parametrize("name", ["threshnet79", "threshnet95"])
@pytest.mark.parametrize(("size", "batch"), [(32, 1), (32, 64), (224, 1), (224, 64)])
class TestNetworks:
    @pytest.mark.parametrize("dtype", PRECISIONS)
    def test_bytes_times_and_totals(self, name, size, batch, dtype):
        plan = network_plan(name, size, batch)
        for device in DEVICES:
            prediction = predict(plan, device, dtype)
            assert len(prediction.steps) == len(plan.steps)
            for step in prediction.steps:
                for execution in (step.fused, step.unfused):
                    assert 0 < execution.seconds < 1
                    assert execution.seconds >= device.kernel_seconds * execution.launches
                    ideal = execution.flops / device.peak_flops(dtype)
                    assert execution.seconds >= ideal
                assert step.fused.bytes <= step.unfused.bytes
                assert step.fused.launches <= 2
                # Nothing useful is left out of what unfused kernels execute.
                assert step.unfused.flops >= step.flops
            for field in ("fused", "unfused"):
                executions = [getattr(step, field) for step in prediction.steps]
                assert getattr(prediction, f"{field}_bytes") == sum(e.bytes for e in executions)
                launches = sum(e.launches for e in executions)
                assert getattr(prediction, f"{field}_launches") == launches
                for mode in ("graph", "eager"):
                    times = [getattr(s, f"{field}_{mode}_seconds") for s in prediction.steps]
                    assert min(times) > 0
                    total = getattr(prediction, f"{field}_{mode}_seconds")
                    assert total == pytest.approx(sum(times))
                    busy = sum(execution.seconds for execution in executions)
                    start = device.graph_seconds if mode == "graph" else device.dispatch_seconds
                    assert total >= (busy + start) * (1 - 1e-9)
            assert prediction.flops == 2 * plan.macs
            assert prediction.fused_graph_seconds < prediction.unfused_graph_seconds
            assert prediction.fused_eager_seconds < prediction.unfused_eager_seconds

    def test_bytes_are_those_of_the_plan(self, name, size, batch):
        plan = network_plan(name, size, batch)
        prediction = predict(plan, "h100", "bfloat16")
        for step in prediction.steps:
            concatenated = [k for k in step.unfused.kernels if k.operation == "cat"]
            grown = concatenated and operations(step.unfused)[-1] == "cat"
            more = concatenated[-1].bytes if grown else 0
            assert 2 * (step.unfused.bytes - more) == step.step.bytes_unfused
            if size == 224:
                assert 2 * step.fused.bytes == step.step.bytes_fused
        assert (
            sum(operations(step.unfused)[-1] == "cat" for step in prediction.steps)
            == {
                "threshnet79": 26,
                "threshnet95": 34,
            }[name]
        )

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    @pytest.mark.parametrize(
        "faster",
        [
            {"memory_bandwidth": 2.0},
            {"cache_bandwidth": 2.0},
            {"cache_bytes": 4},
            {"float32_flops": 2.0, "float16_flops": 2.0},
            {"kernel_seconds": 0.5},
            {"dispatch_seconds": 0.5, "graph_seconds": 0.5},
        ],
        ids=lambda faster: next(iter(faster)),
    )
    def test_a_faster_device_is_not_slower(self, name, size, batch, dtype, faster):
        plan = network_plan(name, size, batch)
        device = find_device("a100")
        better = replace(device, **{key: getattr(device, key) * by for key, by in faster.items()})
        before, after = (predict(plan, each, dtype) for each in (device, better))
        for old, new in zip(before.steps, after.steps, strict=True):
            for field in ("fused", "unfused"):
                slower, quicker = getattr(old, field), getattr(new, field)
                assert quicker.seconds <= slower.seconds * (1 + 1e-12)
        for field in ("fused", "unfused"):
            for mode in ("graph", "eager"):
                total = f"{field}_{mode}_seconds"
                assert getattr(after, total) <= getattr(before, total) * (1 + 1e-12)

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_newer_devices_are_not_slower(self, name, size, batch, dtype):
        plan = network_plan(name, size, batch)
        totals = [
            predict(plan, each, dtype).fused_graph_seconds
            for each in ("rtx3050", "a100", "h100", "b200")
        ]
        assert totals == sorted(totals, reverse=True)


def test_a_larger_batch_takes_longer_and_an_image_of_it_less():
    totals = {
        batch: predict(network_plan("threshnet95", 224, batch), "h100", "float16")
        for batch in (1, 4, 16, 64)
    }
    times = [totals[batch].fused_graph_seconds for batch in totals]
    assert times == sorted(times)
    shares = [totals[batch].fused_graph_seconds / batch for batch in totals]
    assert shares == sorted(shares, reverse=True)


class TestDevices:
    def test_names(self):
        assert NAMES == ["rtx3050", "a100", "h100", "b200", "mi300x"]
        architectures = ["sm_86", "sm_80", "sm_90", "sm_100", "gfx942"]
        assert [device.architecture for device in DEVICES] == architectures
        for device in DEVICES:
            assert find_device(device.name.upper()) is device

    def test_figures_are_plausible(self):
        for device in DEVICES:
            assert device.memory_bandwidth < device.cache_bandwidth
            assert device.float32_flops <= device.tf32_flops <= device.float16_flops
            assert device.float16_flops == device.bfloat16_flops
            assert 0 < device.kernel_seconds < device.dispatch_seconds < 1e-4

    def test_unknown_device(self):
        with pytest.raises(
            ValueError,
            match=r"^device is 'H10': expected one of rtx3050, a100, h100, b200, mi300x; "
            r"did you mean 'h100'\?$",
        ):
            find_device("H10")
        with pytest.raises(ValueError, match=r"device is 'tpu': expected one of .*mi300x$"):
            predict(convolution_plan(), "tpu")

    def test_precisions(self):
        assert find_precision(torch.float16) == find_precision("FP16") == "float16"
        assert find_precision(torch.bfloat16) == find_precision("bf16") == "bfloat16"
        assert find_precision(torch.float32) == find_precision("fp32") == "float32"
        with pytest.raises(ValueError, match=r"dtype is 'float46': expected .*'float16'|'float"):
            find_precision("float46")
        with pytest.raises(ValueError, match="dtype is 'float64': expected one of float32, tf32"):
            predict(convolution_plan(), "a100", torch.float64)

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ((None, "a100"), "plan is a NoneType: expected a Plan"),
            ((convolution_plan(), 3), "device is a int: expected a Device or its name"),
            ((convolution_plan(), "a100", 16), "dtype is a int: expected a name or a torch.dtype"),
        ],
    )
    def test_wrong_types(self, arguments, text):
        with pytest.raises(TypeError, match=text):
            predict(*arguments)


def documented_row(device: Device, batch: int, dtype: str) -> str:
    """A row of the table in docs/prediction.md."""
    prediction = predict(network_plan("threshnet95", 224, batch), device, dtype)
    unfused = prediction.unfused_eager_seconds, prediction.unfused_graph_seconds
    fused = prediction.fused_graph_seconds
    cells = [
        device.title,
        dtype,
        str(batch),
        f"{prediction.unfused_launches} > {prediction.fused_launches}",
        f"{prediction.unfused_bytes / 1e6:,.0f} > {prediction.fused_bytes / 1e6:,.0f}",
        *(f"{1e6 * seconds:,.0f}" for seconds in (*unfused, fused)),
        f"{unfused[1] / fused:.2f}x",
    ]
    return "| " + " | ".join(cells) + " |"


def test_documented_totals_are_those_of_the_model():
    text = DOCUMENT.read_text(encoding="utf-8")
    expected = [
        documented_row(device, batch, dtype)
        for batch in (1, 32)
        for device in DEVICES
        for dtype in ("float32", "float16")
    ]
    missing = [row for row in expected if row not in text]
    assert not missing, "docs/prediction.md needs these rows:\n" + "\n".join(missing)


def test_documented_devices_are_those_of_the_model():
    text = DOCUMENT.read_text(encoding="utf-8")
    for device in DEVICES:
        cells = [
            f"`{device.name}`",
            device.title,
            device.architecture,
            f"{device.multiprocessors}",
            f"{device.memory_bandwidth / 1e12:.3g}",
            f"{device.cache_bytes // 2**20}",
            f"{device.cache_bandwidth / 1e12:.3g}",
            *(f"{device.peak_flops(name) / 1e12:g}" for name in ("float32", "tf32", "float16")),
        ]
        assert "| " + " | ".join(cells) + " |" in text, cells
