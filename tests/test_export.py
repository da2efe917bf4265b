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
    "conv same, more behind": (nn.Conv2d(6, 8, (4, 2), padding="same"), ["Conv"]),
    "padded": (
        nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(6, 8, 3, 2)),
        ["Pad", "Conv"],
    ),
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
    "transposed": (
        of(lambda self, x: self.up(x), up=nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, 2, dilation=2)),
        ["ConvTranspose"],
    ),
    "transposed function": (
        of(
            lambda self, x: F.conv_transpose2d(x, self.w, None, (2, 1), output_padding=(1, 0)),
            w=nn.Parameter(torch.randn(6, 3, 2, 3)),
        ),
        ["ConvTranspose"],
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
    if (name, route) == ("interpolate again", "aten"):
        pytest.skip("torch.export computes its size, as for any code of the module's own")
    module, expected = OPERATIONS[name]
    graph = check(module.eval(), (3 * torch.randn(2, 6, 11, 9),), monkeypatch, route)
    assert sorted(kinds(graph)) == sorted(expected)


class NoWrites(fx.Interpreter):
    """Runs a graph and sees that no operation writes to what it reads, but to clones for others."""

    def run_node(self, n):
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        clones = n.op == "call_module" and any(
            each.target is torch.clone for each in n.all_input_nodes
        )
        before = [tensor._version for tensor in given]
        result = super().run_node(n)
        assert clones or [tensor._version for tensor in given] == before, n
        return result


def same(module, *args, **kwargs):
    """Sees that a graph computes exactly what the module does and writes to nothing."""
    with torch.no_grad():
        expected = copy.deepcopy(module)(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        traced = trace(module, args, kwargs)
        placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
        named = [kwargs.get(node.target) for node in placeholders[len(args) :]]
        NoWrites(traced).run(*args, *named)
        actual = traced(*args, **kwargs)
    assert type(actual) is type(expected)
    wanted, spec = pytree.tree_flatten(expected)
    found, found_spec = pytree.tree_flatten(actual)
    assert spec == found_spec
    assert len(wanted) == len(found)
    for left, right in zip(found, wanted, strict=True):
        assert left.equal(right) if isinstance(left, Tensor) else left == right
    return traced


def by_fx(traced):
    """Whether torch.export had no part in a graph."""
    return all(not isinstance(node.target, torch._ops.OpOverload) for node in traced.graph.nodes)


def _written_after_identity(self, x):
    y = x * 2
    alias = self.id(y)
    y.relu_()
    return alias + y


def _written_through_detach(self, x):
    y = x * 2
    y.detach().mul_(3)
    return y


def _old_values_are_not_read(self, x):
    y = x - 1
    z = y + 1
    y += z
    y *= 2
    return y, z


def _functions(self, x):
    y = torch.relu_(x - 1)
    F.leaky_relu_(y, 0.2)
    F.relu(y, inplace=True)
    F.hardtanh(y, 0.0, 6.0, True)
    return y


def _out(self, x):
    y = x * 2
    torch.add(x, 1, out=y)
    return y


def _copied(self, x):
    y = x * 2
    y.copy_(x)
    return y


IN_PLACE = {
    "module": lambda self, x: self.act(self.norm(x)) + 1,
    "module, read before and after": lambda self, x: [y := self.norm(x), self.act(y), y + 1],
    "module, after Dropout": lambda self, x: [y := self.norm(x), self.act(self.drop(y)), y + 1],
    "module twice": lambda self, x: self.act(self.act(x - 1) - 1),
    "alias": _written_after_identity,
    "detached": _written_through_detach,
    "operators": _old_values_are_not_read,
    "functions": _functions,
    "method of a view that is read alone": lambda self, x: (x + 1)[:, :2].relu_(),
    "methods": lambda self, x: (x + 1).clamp_(0, 6).add_(x, alpha=2).sigmoid_(),
    "out": _out,
    "copy": _copied,
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_operations(name):
    parts = {"id": nn.Identity(), "drop": nn.Dropout(), "act": nn.ReLU(inplace=True)}
    module = Apply(IN_PLACE[name], norm=norm(4), **parts).eval()
    traced = same(module, torch.randn(2, 4, 5, 6))
    assert by_fx(traced) or name == "copy"


def _view_then_base(self, x):
    y = x * 2
    y[:, :2].relu_()
    return y


def _base_then_view(self, x):
    y = x * 2
    view = y[:, 1:3]
    y.relu_()
    return view


def _part(self, x):
    y = x * 2
    y[:, 1] = 0
    return y


def _perhaps_contiguous(self, x):
    y = x * 2
    y.contiguous().relu_()
    return y


def _other_shape(self, x):
    y = x * 2
    y.squeeze_(1)
    return y


def _double(self, x):
    y = x * 2
    y += x.double()
    return y


EXPORTED = {
    "view": _view_then_base,
    "base": _base_then_view,
    "part": _part,
    "perhaps a view": _perhaps_contiguous,
    "shape": _other_shape,
    "dtypes": _double,
    "branch": lambda self, x: x + 1 if x.shape[2] > 3 else -x,
}


@pytest.mark.parametrize("name", EXPORTED)
def test_what_torch_fx_would_get_wrong_is_exported(name):
    module = Apply(EXPORTED[name]).eval()
    assert not by_fx(same(module, torch.randn(2, 4, 5, 6)))


def test_a_module_that_writes_to_its_input_goes_on_to():
    module = of(lambda x: x.relu_() + 1)
    x = torch.randn(2, 3, 4, 4)
    before = x.clone()
    traced = trace(module, (x,))
    assert x.equal(before)
    assert traced(x).equal(before.relu() + 1)
    assert x.equal(before.relu())


def test_other_sizes_than_an_exported_trace_holds_for_are_refused():
    traced = trace(Apply(EXPORTED["branch"]).eval(), (torch.randn(2, 4, 5, 6),))
    wide = torch.randn(3, 4, 5, 9)
    assert traced(wide).equal(wide + 1)
    with pytest.raises(export.OutsideOfTrace, match="size"):
        traced(torch.randn(2, 4, 3, 6))


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = norm(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)))


def state(module):
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return (
        [(name, id(tensor), tensor._version) for name, tensor in tensors],
        [
            (name, id(part), part.training, sorted(part.__dict__))
            for name, part in module.named_modules()
        ],
        [getattr(part, "inplace", None) for part in module.modules()],
        list(module.__dict__),
    )


@pytest.mark.parametrize("route", ["fx", "aten"])
def test_the_module_is_not_modified(route, monkeypatch):
    module = Apply(
        lambda self, x: (self.stem(x) * torch.tensor(2.0) + self.table).relu_(),
        stem=Stem(),
        table=nn.Parameter(torch.randn(8, 1, 1)),
    ).eval()
    module.stem.relu.train()
    before, values = state(module), copy.deepcopy(module.state_dict())
    x = torch.randn(2, 3, 8, 8)
    given = x.clone()
    traced = traced_by(route, module, (x,), monkeypatch)
    for node in traced.graph.nodes:
        objection(traced, node)
    assert state(module) == before
    assert all(values[name].equal(tensor) for name, tensor in module.state_dict().items())
    assert x.equal(given)
    parameters = {id(parameter) for parameter in module.parameters()}
    assert {id(parameter) for parameter in traced.parameters()} <= parameters


@pytest.mark.parametrize("route", ["fx", "aten"])
def test_graphs_hold_the_very_parameters(route, monkeypatch):
    module = nn.Sequential(Stem(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    graph = check(module, (torch.randn(2, 3, 9, 9),), monkeypatch, route)
    conv, bn, *_, linear = (node.module for node in graph.nodes if hasattr(node, "module"))
    assert conv.weight is module[0].conv.weight
    assert conv.bias is module[0].conv.bias
    assert bn.weight is module[0].norm.weight
    assert bn.running_var is module[0].norm.running_var
    assert linear.weight is module[3].weight
    names = [node.name for node in graph.nodes]
    assert names[:3] == ["0.conv", "0.norm", "0.relu"]
    assert names[-1] == "3"
    if route == "fx":
        assert conv is module[0].conv
        assert bn is module[0].norm


def test_hooks_are_called_by_the_graph():
    module = nn.Sequential(Stem(), Stem()).eval()
    module[1].conv = nn.Conv2d(8, 8, 1)
    calls = []
    module[0].relu.register_forward_hook(lambda *_: calls.append("relu"))
    module[1].register_forward_pre_hook(lambda part, args: (args[0] * 2,))
    module[1].norm.register_forward_hook(lambda part, args, result: result.mul_(3))
    x = torch.randn(1, 3, 6, 6)
    traced = same(module, x)
    calls.clear()
    traced(x)
    assert calls == ["relu"]
    annotate(traced, (x,), {})
    assert [reason for reason in reasons(traced) if "clone" not in reason] == [
        "0.relu has hooks, which a plan would not call",
        "1 is a Stem, which no plan can express",
    ]


def test_a_forward_of_an_instance_is_called_as_it_is():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), Stem()).eval()
    module[1].conv = nn.Conv2d(4, 8, 1)
    module[0].forward = lambda x: nn.Conv2d.forward(module[0], x) * 2
    module[1].forward = lambda x: Stem.forward(module[1], x) - 1
    x = torch.randn(1, 3, 6, 6)
    traced = same(module, x)
    assert reasons(traced) == [
        "0 is not exactly a Conv2d: it has a forward of its own",
        "1 is a Stem, which no plan can express",
    ]


def test_a_forward_of_the_root_instance():
    module = Stem().eval()
    module.forward = lambda x: Stem.forward(module, x) - 1
    same(module, torch.randn(1, 3, 6, 6))


def test_scripted_modules_are_called_as_they_are():
    script = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    traced = same(nn.Sequential(script, nn.ReLU()).eval(), torch.randn(1, 3, 6, 6))
    assert len(reasons(traced)) == 1


def test_containers_in_and_out():
    def run(self, maps, other, *more, factor=1, **named):
        a, b = maps
        out = OrderedDict(sum=a + b * factor, more=[more[0].relu(), other["x"]])
        return {"out": out, "pair": (named["key"], None, 3)}

    class Many(nn.Module):
        forward = run

    a, b = torch.randn(2, 1, 3, 4, 5)
    same(Many(), [a, b], {"x": a}, b, factor=2, key=b)


def test_another_value_of_an_argument_is_refused():
    class Flag(nn.Module):
        def forward(self, x, flag=False, mask=None):
            return -x if flag else x + 0

    x = torch.randn(1, 2, 3, 3)
    traced = trace(Flag(), (x,), {"flag": True})
    assert traced(x, True).equal(-x)
    with pytest.raises(AssertionError, match="flag has another value than on the example"):
        traced(x, False)
    with pytest.raises(AssertionError, match="mask has another value"):
        traced(x, True, x)


def test_other_sizes_than_the_example():
    module = Apply(
        lambda self, x: F.interpolate(
            self.stem(F.max_pool2d(x, 2)), size=(x.size(2), x.size(3)), mode="bilinear"
        ).chunk(2, dim=1)[1],
        stem=Stem(),
    ).eval()
    traced = trace(module, (torch.randn(1, 3, 16, 16),))
    x = torch.randn(3, 3, 14, 22)
    assert traced(x).equal(module(x))


def test_modules_that_are_made_in_forward():
    def run(self, x):
        return nn.Upsample(scale_factor=2)(self.hidden[0](x))

    module = Apply(run).eval()
    module.hidden = [nn.Conv2d(3, 4, 1).eval()]
    traced = same(module, torch.randn(1, 3, 4, 4))
    assert by_fx(traced)
    assert reasons(traced) == []


def test_names_that_a_graph_module_has_itself():
    module = nn.Sequential(OrderedDict(graph=nn.Conv2d(3, 4, 1), meta=nn.ReLU(), code=Stem()))
    module.code.conv = nn.Conv2d(4, 8, 1)
    same(module.eval(), torch.randn(1, 3, 4, 4))


def test_parameters_of_a_module_that_is_called_as_well():
    module = Apply(
        lambda self, x: self.conv(x) + F.conv2d(x, self.conv.weight) * self.conv.bias.sum(),
        conv=nn.Conv2d(3, 4, 1),
    ).eval()
    before = list(module.conv._parameters)
    same(module, torch.randn(1, 3, 4, 4))
    assert list(module.conv._parameters) == before


OBJECTIONS = {
    "function": (of(lambda x: x.tanh()), "is a tanh, which no plan can express"),
    "GELU": (nn.GELU(), "is a GELU, which no plan can express"),
    "PReLU": (nn.PReLU(), "is a PReLU, which no plan can express"),
    "GroupNorm": (nn.GroupNorm(2, 4), "is a GroupNorm, which no plan can express"),
    "reflection": (
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        "has padding_mode 'reflect', which no plan can express",
    ),
    "statistics": (
        nn.BatchNorm2d(4, track_running_stats=False),
        "keeps no running statistics, so it cannot be folded",
    ),
    "batch": (
        of(lambda x: F.batch_norm(x, None, None, training=True)),
        "normalises by the statistics of the batch",
    ),
    "weight": (
        of(lambda self, x: F.conv2d(x, self.w * 2), w=nn.Parameter(torch.randn(4, 4, 1, 1))),
        "has a weight that is computed",
    ),
    "scalar": (of(lambda x: x + 1), "adds a number to a map"),
    "broadcast": (
        of(lambda x: x + x.mean((2, 3), keepdim=True)),
        "adds shapes [2, 4, 6, 6] and [2, 4, 1, 1]: expected equal ones",
    ),
    "times": (of(lambda x: torch.add(x, x, alpha=2)), "adds 2 times a map"),
    "rows": (of(lambda x: torch.cat([x, x], 2)), "concatenates along dimension 2, expected 1"),
    "crop": (of(lambda x: x[:, :, 1:]), "takes a part that is no slice of channels"),
    "step": (of(lambda x: x[:, ::2]), "takes every 2-th channel"),
    "indices": (
        of(lambda x: F.max_pool2d(x, 2, return_indices=True)),
        "is a max_pool2d_with_indices",
    ),
    "indices of a module": (nn.MaxPool2d(2, return_indices=True), "returns indices, which"),
    "dilation": (nn.MaxPool2d(2, dilation=2), "has dilation 2, which no plan can express"),
    "pool": (nn.AdaptiveAvgPool2d(2), "pools to 2: expected 1x1"),
    "clamp": (of(lambda x: x.clamp(-1, 1)), "clamps to -1 and 1, which no plan can express"),
    "hardtanh": (nn.Hardtanh(), "clamps to -1.0 and 1.0, which no plan can express"),
    "bicubic": (nn.Upsample(scale_factor=2, mode="bicubic"), "has mode 'bicubic', which"),
    "antialias": (
        of(lambda x: F.interpolate(x, (3, 3), mode="bilinear", antialias=True)),
        "has antialias, which no plan can express",
    ),
    "linear": (nn.Linear(6, 3), "reads shape [2, 4, 6, 6]: expected [N, C]"),
    "dtype": (of(lambda x: x.double()), "changes "),
    "chance": (of(lambda x: F.dropout(x, 0.5, True)), "drops elements by chance"),
    "flatten": (of(lambda x: x.flatten(1)), "changes the shape from [2, 4, 6, 6] to [2, 144]"),
}


@pytest.mark.parametrize("name", OBJECTIONS)
def test_objections(name):
    module, expected = OBJECTIONS[name]
    module = nn.Sequential(OrderedDict(first=nn.ReLU(), part=module)).eval()
    x = torch.randn(2, 4, 6, 6)
    traced = trace(module, (x,))
    (reason, *_) = [each for each in reasons(traced) if "getitem" not in each][-1:]
    assert reason.startswith(f"part {expected}")
    with pytest.raises(ir.UnsupportedModule, match="part "):
        convert(traced)


def test_three_dimensions_are_no_maps():
    traced = trace(nn.Sequential(nn.Conv3d(2, 2, 1), nn.ReLU()), (torch.randn(1, 2, 3, 4, 5),))
    assert reasons(traced) == [
        "0 is a Conv3d, which no plan can express",
        "1 reads torch.float32 of shape [1, 2, 3, 4, 5]: expected a map [N, C, H, W] of floating "
        "point",
    ]


def test_what_nothing_can_trace():
    def run(self, x):
        return x if float(x.sum()) > 0 else -x

    with pytest.raises(ir.UnsupportedModule) as raised:
        trace(Apply(run).eval(), (torch.randn(1, 2, 3, 3),))
    message = str(raised.value)
    assert message.startswith("Apply cannot be traced: TypeError: float() ")
    assert "torch.export: " in message
    assert "\n" not in message


def test_an_error_of_the_module_itself():
    with pytest.raises(ir.UnsupportedModule, match="expected input"):
        trace(nn.Conv2d(3, 4, 1), (torch.randn(1, 2, 3, 3),))


def test_graphs_of_several_inputs_and_outputs():
    module = of(lambda x, y: (x, torch.cat([y, x], 1), y.relu()))
    args = torch.randn(1, 2, 4, 4), torch.randn(1, 3, 4, 4)
    traced = trace(module, args)
    graph = convert(traced)
    assert graph.inputs == [0, 1]
    assert graph.channels[:2] == [2, 3]
    assert graph.outputs[0] == 0
    for actual, wanted in zip(run_graph(graph, args), module(*args), strict=True):
        assert actual.equal(wanted.double())


def test_shapes_that_a_compiler_noted_are_taken():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(F.relu, (x,)))
    traced = fx.GraphModule(nn.Module(), graph)
    for node in list(graph.nodes)[:2]:
        node.meta["example_value"] = torch.empty(1, 3, 4, 4, device="meta")
    annotate(traced, (), {})
    assert reasons(traced) == []


PROBE = """
import sys, json
import torch
from torch import nn
from threshnet_fast.graph import export
module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(True)).eval()
traced = export.trace(module, (torch.randn(1, 3, 8, 8),))
export.convert(traced)
print(json.dumps([name for name in sys.modules if name.split(".")[0] in ("torch", "sympy")]))
"""


def test_torch_fx_alone_imports_no_compiler():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    loaded = set(json.loads(run.stdout))
    assert not loaded & {"torch._dynamo", "torch._inductor", "sympy"}
