"""Fixtures shared by all tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

# Helper modules beside the tests are importable under every pytest import mode.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sweep", action="store_true", help="run the tests marked sweep too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--sweep"):
        sweep = [item for item in items if item.get_closest_marker("sweep")]
        config.hook.pytest_deselected(items=sweep)
        items[:] = [item for item in items if not item.get_closest_marker("sweep")]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds PyTorch before every test; the value, for generators of a test's own."""
    torch.manual_seed(0)
    return 0


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Runs the test on one PyTorch thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list:
    """The chains that have run, in order."""
    # Tests of the installation begin before there is a package to import.
    from threshnet_fast.autograd import Chain

    seen = []
    original = Chain.__call__

    def spy(chain, *args, **kwargs):
        seen.append(chain)
        return original(chain, *args, **kwargs)

    monkeypatch.setattr(Chain, "__call__", spy)
    return seen


@pytest.fixture(scope="session")
def randomised() -> Callable[[nn.Module], nn.Module]:
    """Function that makes every BatchNorm of a model non-trivial, in place, and returns the model.

    Means and offsets are away from 0, variances and scales away from 1, one scale in eight is
    negative, none is 0; activations keep their order of magnitude.
    """

    def randomise(model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(1)

        def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
            values = torch.rand(like.shape, generator=generator, dtype=torch.float64)
            return (low + (high - low) * values).to(like)

        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.running_mean.copy_(uniform(module.running_mean, -0.4, 0.4))
                    module.running_var.copy_(uniform(module.running_var, 0.5, 1.8))
                    module.weight.copy_(uniform(module.weight, 0.6, 1.4))
                    module.weight[::8] *= -1
                    module.bias.copy_(uniform(module.bias, -0.3, 0.5))
        return model

    return randomise
