"""Facts that more than one place must state: they agree."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from threshnet_fast.kernels.architectures import ARCHITECTURES

from threshnet_fast.bench.gpus import DEVICES
from threshnet_fast.cli import doctor
from threshnet_fast.data.cifar import CIFAR10
from threshnet_fast.models import create_model, imagenet

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_rates_of_a_product_are_those_of_its_architecture_at_some_clock(device):
    family = ARCHITECTURES[device.architecture]
    assert device.multiprocessors == family.multiprocessors
    clock = device.float16_flops / (family.half * family.multiprocessors)
    assert 1.4e9 < clock < 2.2e9
    if device.name != "mi300x":
        assert device.tf32_flops == pytest.approx(
            family.tf32 * family.multiprocessors * clock, rel=0.05
        )
    else:
        assert device.tf32_flops == pytest.approx(device.float16_flops / 2, rel=0.01)
    bandwidth = family.memory_bytes * family.multiprocessors * clock
    assert 0.7 < bandwidth / device.memory_bandwidth < 1.5


def test_oldest_versions(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    toolchain = importlib.import_module("toolchain")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (torch,) = re.findall(r'"torch>=(\d+)\.(\d+)"', project)
    (python,) = re.findall(r'^requires-python = ">=(\d+)\.(\d+)"', project, re.M)
    assert doctor._OLDEST_TORCH == toolchain.OLDEST_TORCH == tuple(map(int, torch))
    assert tuple(map(int, python)) == doctor._OLDEST_PYTHON


def test_pictures_are_prepared_as_for_imagenet():
    assert imagenet.MEAN == (0.485, 0.456, 0.406)
    assert imagenet.STD == (0.229, 0.224, 0.225)
    assert imagenet.average(imagenet.MEAN) == (0.449,)
    assert imagenet.average(imagenet.STD) == (0.226,)
    settings = create_model("hardnet39ds").default_cfg
    assert settings["mean"] == imagenet.MEAN
    assert settings["std"] == imagenet.STD
    assert settings["crop_pct"] == imagenet.CROP_FRACTION


def test_shipped_weights_are_described_as_the_data_set_is():
    from threshnet_fast.models.pretrained import find_pretrained

    info = find_pretrained("threshnet79", "cifar10").info
    assert (info.mean, info.std) == (CIFAR10.mean, CIFAR10.std)
