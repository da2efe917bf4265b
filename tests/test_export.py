"""Any module as a graph: what operations become, in all their spellings, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from graph_reference import run_graph
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from threshnet_fast.graph import export, ir
from threshnet_fast.graph.export import annotate, convert, objection, trace


class Apply(nn.Module):
    """A function of modules, parameters and inputs."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self.function(self, *args)


def of(function, **parts):
    """A module that computes a function of its inputs, and of itself where it has parts."""
    if parts:
        return Apply(function, **parts).eval()
    return Apply(lambda self, *args: function(*args)).eval()


def traced_by(route, module, args, monkeypatch):
    """A module's graph, by torch.fx or by torch.export."""
    if route == "aten":

        def refuse(*_):
            raise RuntimeError("not by torch.fx")

        monkeypatch.setattr(export, "symbolic", refuse)
        traced = trace(module, args)
        for node in list(traced.graph.nodes):
            if node.target == "_guards_fn":
                traced.graph.erase_node(node)
    else:
        # No other way is taken in silence.
        monkeypatch.setattr(export, "_exported", None)
        traced = trace(module, args)
    annotate(traced, args, {})
    return traced


def reasons(traced):
    found = [
        objection(traced, node)
        for node in traced.graph.nodes
        if node.op not in ("placeholder", "output")
    ]
    return [reason for reason in found if reason is not None]


def check(module, args, monkeypatch, route="fx"):
    """Compares a module with its graph, in float64; returns the graph."""
    traced = traced_by(route, module, args, monkeypatch)
    assert reasons(traced) == []
    graph = convert(traced)
    double = copy.deepcopy(module).double()
    with torch.no_grad():
        expected = pytree.tree_leaves(double(*[arg.double() for arg in args]))
    for actual, wanted in zip(run_graph(graph, args), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
    return graph


def kinds(graph):
    return [type(node).__name__ for node in graph.nodes]


def norm(channels, **settings):
    """A BatchNorm that is not the identity."""
    made = nn.BatchNorm2d(channels, **settings)
    with torch.no_grad():
        made.running_mean.uniform_(-0.5, 0.5)
        made.running_var.uniform_(0.5, 2)
        if made.weight is not None:
            made.weight.uniform_(-1, 1)
            made.bias.uniform_(-1, 1)
    return made.eval()


class Functional(nn.Module):
    """Convolution and BatchNorm by functions of tensors that are parameters and buffers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 2))
        self.bias = nn.Parameter(torch.randn(8))
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.5)
        self.scale = nn.Parameter(torch.randn(8))
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, (1, 2), padding=(2, 1), dilation=2)
        return F.batch_norm(x, self.mean, self.var, self.scale, self.shift, False, 0.1, 1e-3)


OPERATIONS = {
    "conv": (nn.Conv2d(6, 8, (3, 5), (2, 1), (1, 2), (1, 2), groups=2), ["Conv"]),
    "conv same": (nn.Conv2d(6, 8, (3, 5), padding="same", dilation=2), ["Conv"]),
    "conv valid": (nn.Conv2d(6, 8, 3, padding="valid", bias=False), ["Conv"]),
    "conv depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), ["Conv"]),
    "conv same function": (
        of(
            lambda self, x: F.conv2d(x, self.w, padding="same"),
            w=nn.Parameter(torch.randn(4, 6, 3, 3)),
        ),
        ["Conv"],
    ),
    "functions": (of(lambda self, x: self.f(x[:, :3]), f=Functional()), ["Slice", "Conv", "Norm"]),
    "norm": (norm(6), ["Norm"]),
    "norm without affine": (norm(6, affine=False, eps=1e-2), ["Norm"]),
    "relu": (nn.ReLU(), ["Activate"]),
    "relu in place": (of(lambda self, x: self.act(x + x), act=nn.ReLU(True)), ["Add", "Activate"]),
    "relu functions": (
        of(
            lambda x: torch.cat(
                [F.relu(x), torch.relu(x), x.relu(), x.clamp(min=0), x.clamp_min(0)], 1
            )
        ),
        ["Activate"] * 5 + ["Concat"],
    ),
    "relu6": (nn.ReLU6(), ["Activate"]),
    "hardtanh": (nn.Hardtanh(0, 6), ["Activate"]),
    "relu6 functions": (
        of(lambda x: torch.cat([F.relu6(x), F.hardtanh(x, 0.0, 6.0), torch.clamp(x, 0, 6)], dim=1)),
        ["Activate"] * 3 + ["Concat"],
    ),
    "leaky": (nn.LeakyReLU(0.2), ["Activate"]),
    "leaky function": (of(lambda x: F.leaky_relu(x, negative_slope=0.3)), ["Activate"]),
    "silu": (nn.SiLU(), ["Activate"]),
    "silu function": (of(lambda x: F.silu(x)), ["Activate"]),
    "hardswish": (nn.Hardswish(), ["Activate"]),
    "hardswish function": (of(lambda x: F.hardswish(x)), ["Activate"]),
    "sigmoid": (nn.Sigmoid(), ["Activate"]),
    "sigmoid functions": (
        of(lambda x: torch.concat([torch.sigmoid(x), x.sigmoid(), F.sigmoid(x)], -3)),
        ["Activate"] * 3 + ["Concat"],
    ),
    "nested cat": (
        of(lambda x: torch.concatenate((torch.cat([x, x], 1), torch.cat((x,), dim=1), x), 1)),
        ["Concat", "Concat"],
    ),
    "sums": (
        of(lambda x: torch.add(x, x) + sum([x, x.relu()]) + x.add(x)),
        ["Add", "Activate", "Add", "Add", "Add", "Add"],
    ),
    "slices": (
        of(lambda x: torch.cat([x[:, 1:3], x[:, -2:], x[:, :1, ...], x[..., 2:4, :, :]], 1)),
        ["Slice"] * 4 + ["Concat"],
    ),
    "narrow": (
        of(lambda x: torch.cat([x.narrow(1, 2, 3), torch.narrow(x, -3, -2, 1)], 1)),
        ["Slice", "Slice", "Concat"],
    ),
    "chunks": (of(lambda x: torch.cat(x.chunk(4, 1)[::-1], 1)), ["Slice"] * 3 + ["Concat"]),
    "splits": (
        of(lambda x: torch.cat([*x.split([1, 5], dim=1), *torch.split(x, 4, 1)], 1)),
        ["Slice"] * 4 + ["Concat"],
    ),
    "max pool": (nn.MaxPool2d(3, 2, 1), ["Pool"]),
    "max pool ceil": (nn.MaxPool2d((3, 2), ceil_mode=True), ["Pool"]),
    "max pool functions": (
        of(lambda x: F.max_pool2d(torch.max_pool2d(x, 3, 1, 1), (2, 3), stride=(2, 1))),
        ["Pool", "Pool"],
    ),
    "average pool": (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), ["Pool"]),
    "average pool functions": (
        of(lambda x: F.avg_pool2d(F.avg_pool2d(x, 2, 1, 1), 3, 2, 1, divisor_override=7)),
        ["Pool", "Pool"],
    ),
    "means": (
        of(lambda x: torch.cat([x.mean((2, 3), True), x.mean([-1, -2], keepdim=True)], 1)),
        ["Mean", "Mean", "Concat"],
    ),
    "flat mean": (of(lambda x: torch.mean(x, dim=(2, 3))), ["Mean", "Flatten"]),
    "global pool": (nn.AdaptiveAvgPool2d(1), ["Mean"]),
    "global pool function": (
        of(lambda x: F.adaptive_avg_pool2d(x, (1, 1)).flatten(1)),
        ["Mean", "Flatten"],
    ),
    "head": (
        nn.Sequential(
            nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Dropout(), nn.Linear(6, 4)
        ).eval(),
        ["Mean", "Flatten", "Linear"],
    ),
    "view": (
        of(
            lambda self, x: self.fc(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1)),
            fc=nn.Linear(6, 3, False),
        ),
        ["Mean", "Flatten", "Linear"],
    ),
    "reshapes": (
        of(
            lambda x: [
                F.adaptive_avg_pool2d(x, 1).reshape(x.shape[0], 6),
                torch.reshape(F.adaptive_avg_pool2d(x, 1), (-1, 6)),
                F.adaptive_avg_pool2d(x, 1).squeeze((2, 3)),
                torch.flatten(F.adaptive_avg_pool2d(x, 1), start_dim=1),
            ]
        ),
        ["Mean", "Flatten"] * 4,
    ),
    "linear function": (
        of(
            lambda self, x: F.linear(x.mean((2, 3)), self.w, self.b),
            w=nn.Parameter(torch.randn(4, 6)),
            b=nn.Parameter(torch.randn(4)),
        ),
        ["Mean", "Flatten", "Linear"],
    ),
    "nothing": (
        of(
            lambda self, x: self.act(
                F.dropout(
                    self.drop(self.id(x).contiguous().detach().to(x.dtype)), 0.5, self.training
                )
            ),
            id=nn.Identity(),
            drop=nn.Dropout2d(0.3),
            act=nn.ReLU(),
        ),
        ["Activate"],
    ),
    "upsample": (nn.Upsample(scale_factor=2, mode="nearest"), ["Resize"]),
    "upsample bilinear": (nn.UpsamplingBilinear2d(scale_factor=1.5), ["Resize"]),
    "upsample size": (nn.Upsample((9, 14), mode="bilinear"), ["Resize"]),
    "interpolate": (
        of(
            lambda x: F.interpolate(
                x, scale_factor=(1.7, 2.3), mode="bilinear", align_corners=False
            )
        ),
        ["Resize"],
    ),
    "interpolate exact": (of(lambda x: F.interpolate(x, 13, mode="nearest-exact")), ["Resize"]),
    "interpolate again": (
        of(
            lambda x: F.interpolate(
                x, scale_factor=1.7, mode="bilinear", recompute_scale_factor=True
            )
        ),
        ["Resize"],
    ),
    "interpolate like": (
        of(
            lambda x: [
                F.interpolate(F.max_pool2d(x, 2), size=x.shape[2:]),
                F.interpolate(F.max_pool2d(x, 2), x.size()[-2:], mode="bilinear"),
                F.interpolate(F.max_pool2d(x, 2), (x.size(2), x.shape[3]), None, "nearest"),
            ]
        ),
        ["Pool", "Resize"] * 3,
    ),
}


@pytest.mark.parametrize("route", ["fx", "aten"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name, route, monkeypatch):
    module, expected = OPERATIONS[name]
    graph = check(module.eval(), (3 * torch.randn(2, 6, 11, 9),), monkeypatch, route)
    assert sorted(kinds(graph)) == sorted(expected)
