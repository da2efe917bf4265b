"""Whether a model is still what something was made of, quickly and exactly."""

import gc
import weakref

import pytest
import torch
from torch import nn

import threshnet_fast as tf
from threshnet_fast import extension
from threshnet_fast.runtime.fingerprint import Fingerprint

pytestmark = pytest.mark.skipif(not extension.load(), reason="the C++ extension was not built")
if extension.load():
    from threshnet_fast._fingerprint import Facts

HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def modules() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()


def fingerprint(model: nn.Module, *, contents: bool = True) -> Fingerprint:
    found = Fingerprint(model.named_modules(), HOOKS, contents=contents, outer=model)
    found.take()
    assert found.unchanged()
    assert found.same()
    return found


class TestFacts:
    def test_entry(self):
        dictionary = {"a": 1, "b": [2]}
        facts = Facts()
        facts.entry(dictionary, "b")
        facts.entry(dictionary, "none")
        assert facts.hold()
        del dictionary["a"]
        dictionary["c"] = 3
        assert facts.hold()
        value = dictionary.pop("b")
        assert not facts.hold()
        # At another place of the dictionary.
        dictionary["b"] = value
        assert facts.hold()
        dictionary["b"] = [2]
        assert not facts.hold()
        dictionary["b"] = value
        dictionary["none"] = None
        assert not facts.hold()

    def test_a_key_that_is_equal_and_another_object(self):
        name = "".join(["a ", "name"])
        dictionary = {name: 1}
        facts = Facts()
        facts.entry(dictionary, "".join(["a", " name"]))
        assert facts.hold()
        dictionary[name] = 2
        assert not facts.hold()

    def test_values(self):
        dictionary = {"a": 1, "b": 2}
        facts = Facts()
        facts.values(dictionary)
        facts.values({})
        assert facts.hold()
        dictionary["a"] = dictionary.pop("a")
        assert not facts.hold()
        dictionary["b"] = dictionary.pop("b")
        assert facts.hold()
        dictionary["c"] = 3
        assert not facts.hold()
        del dictionary["c"], dictionary["b"]
        assert not facts.hold()

    def test_attribute(self):
        module = nn.Module()
        module.links = [1, [2]]
        facts = Facts()
        facts.attribute(module, "links", [1, [2]])
        assert facts.hold()
        module.links[1].append(3)
        assert not facts.hold()
        del module.links
        assert not facts.hold()

    def test_what_does_not_compare_does_not_hold(self):
        module = nn.Module()
        module.size = torch.ones(2)
        facts = Facts()
        facts.attribute(module, "size", torch.ones(2))
        assert not facts.hold()

    def test_kind(self):
        class Other(nn.ReLU):
            pass

        module = nn.ReLU()
        facts = Facts()
        facts.kind(module)
        assert facts.hold()
        module.__class__ = Other
        assert not facts.hold()

    @pytest.mark.parametrize("contents", [False, True])
    def test_tensor(self, contents):
        tensor = nn.Parameter(torch.ones(4, 2, 3, 3))
        facts = Facts()
        facts.tensor(tensor, contents)
        assert facts.hold()
        with torch.no_grad():
            tensor.mul_(2)
        assert facts.hold() != contents

    @pytest.mark.parametrize(
        "change",
        [
            lambda p: setattr(p, "data", torch.ones(4, 2, 3, 3)),
            lambda p: setattr(p, "data", p.data[:2]),
            lambda p: setattr(p, "data", p.data.transpose(2, 3)),
            lambda p: setattr(p, "data", p.data.flatten(2)),
            lambda p: torch.utils.swap_tensors(p, nn.Parameter(torch.ones(4, 2, 3, 3))),
            lambda p: p.untyped_storage().resize_(0),
            lambda p: setattr(p, "data", p.data.double()),
        ],
        ids=["other", "fewer", "transposed", "flat", "swapped", "freed", "double"],
    )
    @pytest.mark.parametrize("contents", [False, True])
    def test_tensor_that_lies_elsewhere(self, change, contents):
        tensor = nn.Parameter(torch.ones(4, 2, 3, 3))
        facts = Facts()
        facts.tensor(tensor, contents)
        change(tensor)
        assert not facts.hold()

    def test_a_view_has_the_version_of_its_base(self):
        base = torch.ones(6)
        facts = Facts()
        facts.tensor(base[2:4], True)
        assert facts.hold()
        base.mul_(2)
        assert not facts.hold()

    def test_sample(self):
        tensor = torch.arange(6.0)
        facts = Facts()
        facts.sample(tensor, 0, 20)
        assert facts.hold()
        tensor.data[3] = 7
        assert facts.hold()
        tensor.data[5] = 7
        assert not facts.hold()

    @pytest.mark.parametrize("byte", [-1, 21, 1 << 62])
    def test_a_sample_beyond_the_tensor_is_an_error(self, byte):
        with pytest.raises(ValueError, match=f"byte is {byte}: expected one of four within 24"):
            Facts().sample(torch.arange(6.0), byte)

    @pytest.mark.parametrize(
        ("method", "arguments"),
        [
            ("entry", ([], "a")),
            ("entry", ({}, 1)),
            ("values", ([],)),
            ("tensor", (3, True)),
            ("tensor", (torch.ones(1, 1, 1, 1, 1), True)),
            ("sample", ()),
            ("sample", (3, 0)),
            ("attribute", (3,)),
        ],
    )
    def test_what_is_no_fact_is_an_error(self, method, arguments):
        facts = Facts()
        with pytest.raises((AttributeError, RuntimeError, TypeError)):
            getattr(facts, method)(*arguments)
        assert facts.hold()

    def test_circles_are_collected(self):
        module = nn.ReLU()
        module.facts = Facts()
        module.facts.kind(module)
        module.facts.entry(module.__dict__, "facts")
        gone = weakref.ref(module)
        del module
        gc.collect()
        assert gone() is None


CHANGES = {
    "setting": lambda m: setattr(m[0], "stride", (2, 2)),
    "list in place": lambda m: m[0].padding.append(1),
    "hook": lambda m: m[2].register_forward_hook(lambda *_: None),
    "hooks replaced": lambda m: setattr(m[2], "_forward_hooks", {0: print}),
    "forward": lambda m: setattr(m[2], "forward", torch.sin),
    "class": lambda m: setattr(m[2], "__class__", nn.Identity),
    "child": lambda m: m.__setitem__(2, nn.ReLU()),
    "child more": lambda m: m.append(nn.ReLU()),
    "children in another order": lambda m: m._modules.update({"0": m._modules.pop("0")}),
    "parameter": lambda m: setattr(m[1], "weight", nn.Parameter(torch.ones(9))),
    "parameter that was none": lambda m: setattr(m[0], "bias", nn.Parameter(torch.ones(8))),
    "parameter taken": lambda m: setattr(m[1], "bias", None),
    "fewer channels": lambda m: setattr(m[0].weight, "data", m[0].weight.data[:4]),
}


@pytest.mark.parametrize("contents", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_show(change, contents):
    model = modules()
    model[0].padding = [1]
    found = fingerprint(model, contents=contents)
    CHANGES[change](model)
    assert not found.unchanged()
    assert found.hooked() or not found.same()


def test_values_show_where_they_count():
    model = modules()
    read_anew, kept = fingerprint(model, contents=False), fingerprint(model)
    with torch.no_grad():
        model[1].running_mean.add_(1)
    assert read_anew.unchanged()
    assert not kept.unchanged()
    assert not kept.same()


def test_a_write_that_torch_does_not_count_shows():
    model = modules()
    found = fingerprint(model)
    model[0].weight.data.mul_(2)
    assert not found.unchanged()
    assert not found.same()


def test_training_is_a_change_where_values_count():
    model = modules()
    found = fingerprint(model)
    model[1].train()
    assert not found.unchanged()
    assert found.same()
    assert found.training()
    model[1].eval()
    assert found.unchanged()


def test_equal_settings_are_the_same_and_then_unchanged():
    model = modules()
    found = fingerprint(model)
    model[0].stride = tuple([1, 1])  # noqa: C409, another object
    model[0].kernel_size = (*model[0].kernel_size,)
    model[1].eps = float("1e-05")
    assert found.same()
    assert found.unchanged()


def test_other_tensors_of_the_same_kind_do_where_values_are_read_anew():
    model = modules()
    found = fingerprint(model, contents=False)
    model[0].weight = nn.Parameter(torch.zeros(8, 3, 3, 3))
    assert not found.unchanged()
    assert found.same()
    assert found.unchanged()
    model[0].weight.untyped_storage().resize_(4)
    assert not found.unchanged()
    with pytest.raises(RuntimeError, match=r"0\.weight spans 864 bytes"):
        found.same()


def test_without_the_module_it_is_only_slower(monkeypatch):
    monkeypatch.setattr("threshnet_fast.runtime.fingerprint._recorder", lambda: None)
    model = modules()
    found = Fingerprint(model.named_modules(), HOOKS, contents=True, outer=model)
    found.take()
    assert not found.unchanged()
    assert found.same()
    model[0].stride = (2, 2)
    assert not found.same()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_tensors_that_threads_share(threads):
    """So many that memory is looked at by another thread than the modules are."""
    model = tf.create_model("threshnet79", num_classes=3).eval()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = fingerprint(model)
        last = model.base[-1][-1]
        with torch.no_grad():
            last.bias.add_(1)
        assert not found.unchanged()
        found = fingerprint(model)
        last.weight.data.mul_(2)
        assert not found.unchanged()
        found = fingerprint(model)
        model.base[0].conv.stride = 2
        assert not found.unchanged()
        found = fingerprint(model)
        model.base[0].activation = "relu6"
        assert not found.unchanged()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["threshnet79", "densenet_bc_100", "hardnet39ds"])
def test_calls_of_a_model_that_nobody_touches_are_unchanged(name, monkeypatch):
    model = tf.create_model(name, num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        monkeypatch.setattr(Fingerprint, "same", None)
        assert model(x).equal(expected)
    monkeypatch.undo()
    model.train()
    x = x.repeat(2, 1, 1, 1)
    model(x).sum().backward()
    monkeypatch.setattr(Fingerprint, "same", None)
    model(x).sum().backward()
