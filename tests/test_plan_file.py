"""Saved plans: what is in the file, and what is refused."""

import struct

import numpy as np
import pytest
import torch

import threshnet_fast as tf
from threshnet_fast.plan import lower, plan_memory, serialize

SHAPE = (2, 3, 32, 40)


def small():
    return tf.ThreshNet(
        blocks=(2, 2),
        transitions=(32, 48),
        downsample=(True, False),
        growth_rates=(16, 16),
        threshold=1,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_layout(tmp_path, randomised, dtype):
    model = randomised(small()).eval().to(dtype)
    path = tmp_path / "network.plan"
    tf.save_plan(model, SHAPE, path)
    data = path.read_bytes()
    assert data[:8] == b"TNFPLAN1"
    entries, count = struct.unpack_from("<qq", data, 8)
    plan = lower(model, SHAPE)
    description = np.frombuffer(data, "<i8", entries, 24)
    assert description.tolist() == serialize(plan, plan_memory(plan)).tolist()
    sizes = np.frombuffer(data, "<i8", count, 24 + 8 * entries)
    place = 24 + 8 * (entries + count)
    assert len(data) == place + 4 * sizes.sum()
    for weight, size in zip(plan.weights(), sizes, strict=True):
        elements = torch.from_numpy(np.frombuffer(data, "<f4", size, place).copy())
        assert torch.equal(elements, weight.flatten().float())
        place += 4 * int(size)


def test_replaces_a_file(tmp_path):
    path = tmp_path / "network.plan"
    path.write_bytes(bytes(100))
    tf.save_plan(small().eval(), SHAPE, str(path))
    assert path.read_bytes()[:8] == b"TNFPLAN1"


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "network.plan"
    tf.save_plan(small().eval(), SHAPE, path)
    before = path.read_bytes()

    def fails(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("threshnet_fast.plan.file.np.asarray", fails)
    with pytest.raises(OSError, match="no space left"):
        tf.save_plan(small().eval(), SHAPE, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_refuses(tmp_path):
    model = small().eval()
    path = tmp_path / "network.plan"
    with pytest.raises(tf.plan.UnsupportedModule, match="module"):
        tf.save_plan(torch.nn.Linear(3, 3), SHAPE, path)
    for shape in ((3, 32, 32), (1, 4, 32, 32), (0, 3, 32, 32), (1, 3, 32, 1)):
        with pytest.raises(ValueError, match="input_shape is"):
            tf.save_plan(model, shape, path)
    with pytest.raises(RuntimeError, match="module is in training mode"):
        tf.save_plan(small(), SHAPE, path)
    assert not path.exists()
    with pytest.raises(OSError, match="No such file"):
        tf.save_plan(model, SHAPE, tmp_path / "nowhere" / "network.plan")
