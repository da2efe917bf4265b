"""Checkpoints of other packages: their names, what is wrapped around them, and hostile files."""

from __future__ import annotations

import copy
import gc
import gzip
import io
import os
import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trained import save_random

import threshnet_fast as tf

OLD = re.compile(r"(denselayer\d+\.(?:layers\.)?(?:norm|conv))([12])\.")


@pytest.fixture(autouse=True)
def quiet(one_thread) -> None:
    """One thread."""


def densenet(small: bool = False, in_chans: int = 3, num_classes: int = foreign.CLASSES):
    return tf.DenseNet(
        first_channels=foreign.FIRST,
        blocks=foreign.BLOCKS,
        growth_rate=foreign.GROWTH,
        small_stem=small,
        in_chans=in_chans,
        num_classes=num_classes,
    )


def dotted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of torchvision's first releases, whose files have no counters."""
    return {
        OLD.sub(r"\1.\2.", name): value
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }


# Network of the layout, this package's, and what the latter's logits are turned into.
LAYOUTS = {
    "torchvision": (foreign.Torchvision, densenet, None),
    "torchxrayvision": (foreign.Xray, lambda: densenet(in_chans=1), None),
    "CheXNet": (foreign.CheXNet, densenet, torch.sigmoid),
    "MONAI": (foreign.Monai, densenet, None),
    "efficient_densenet_pytorch": (
        lambda: foreign.Torchvision(last="norm_final", small=True),
        lambda: densenet(small=True),
        None,
    ),
    "densenet.pytorch": (
        foreign.Cifar,
        lambda: densenet(small=True),
        lambda x: torch.log_softmax(x, 1),
    ),
    "densenet-pytorch": (lambda: foreign.Cifar(nested=True), lambda: densenet(small=True), None),
    "HarDNet": (
        foreign.HarDNet,
        lambda: tf.HarDNet(**foreign.STAGES, num_classes=foreign.CLASSES),
        None,
    ),
    "HarDNet DS": (
        lambda: foreign.HarDNet(ds=True),
        lambda: tf.HarDNet(**foreign.STAGES, depthwise=True, num_classes=foreign.CLASSES),
        None,
    ),
    "ThreshNet": (
        foreign.ThreshNet,
        lambda: tf.ThreshNet(**foreign.STAGES, threshold=1, num_classes=foreign.CLASSES),
        None,
    ),
}

WRAPPINGS = {
    "plain": lambda state: state,
    "old": dotted,
    "module.": lambda state: {f"module.{name}": value for name, value in state.items()},
    "_orig_mod.module.": lambda state: {f"_orig_mod.module.{n}": v for n, v in state.items()},
    "backbone.": lambda state: {f"backbone.{name}": value for name, value in state.items()},
    "state_dict": lambda state: {
        "epoch": 3,
        "optimizer": {"state": {0: {"step": torch.ones(())}}},
        "state_dict": {f"model.{name}": value for name, value in state.items()},
    },
    "net": lambda state: {"net": state, "acc": 0.5},
    "params": lambda state: {"params": state},
    "model.model_state": lambda state: {"model": {"model_state": state}},
}


def same_outputs(theirs: nn.Module, ours: nn.Module, turn=None) -> bool:
    """Whether two networks agree in float64, where the order of additions hardly matters."""
    channels = next(ours.parameters()).shape[1]
    x = torch.randn(2, channels, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected, actual = theirs.double().eval()(x), ours.double().eval()(x)
    actual = actual if turn is None else turn(actual)
    return torch.allclose(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.fixture(params=LAYOUTS)
def pair(request, randomised):
    theirs, ours, turn = LAYOUTS[request.param]
    return randomised(theirs()), ours(), turn


class TestLayouts:
    @pytest.mark.parametrize("wrapping", WRAPPINGS)
    def test_same_outputs(self, pair, wrapping):
        theirs, ours, turn = pair
        state = theirs.state_dict()
        report = tf.load_checkpoint(WRAPPINGS[wrapping](state), ours)
        assert same_outputs(theirs, ours, turn)
        assert not report.initialised
        own = [name for name in ours.state_dict() if "num_batches" not in name]
        assert set(own) <= set(report.mapped.values())
        # All that was left out: what is around the weights, and torchxrayvision's thresholds.
        left_out = {name.rpartition(".")[2] for name in report.ignored}
        assert left_out <= {"epoch", "optimizer", "acc", "op_threshs"}
        assert ("op_threshs" in left_out) == isinstance(theirs, foreign.Xray)

    def test_without_classifier(self, pair):
        theirs, ours, _ = pair
        state = theirs.state_dict()
        linear = [name for name, m in theirs.named_modules() if isinstance(m, nn.Linear)][-1]
        for part in (".weight", ".bias"):
            del state[linear + part]
        classifier = copy.deepcopy(ours.get_classifier())
        before = copy.deepcopy(ours.state_dict())
        with pytest.raises(ValueError, match="there is no classifier"):
            tf.load_checkpoint(state, ours)
        for name, value in ours.state_dict().items():
            assert torch.equal(value, before[name]), name
        report = tf.load_checkpoint(state, ours, new_classifier=True)
        assert len(report.initialised) == 2
        assert torch.equal(ours.get_classifier().weight, classifier.weight)
        assert torch.equal(ours.get_classifier().bias, classifier.bias)
        # With the classifier of the other network, it is the other network.
        theirs_linear = theirs.get_submodule(linear)
        with torch.no_grad():
            ours.get_classifier().weight.copy_(theirs_linear.weight)
            ours.get_classifier().bias.copy_(theirs_linear.bias)
        assert same_outputs(theirs, ours, pair[2])

    def test_a_file(self, pair, tmp_path):
        theirs, ours, turn = pair
        torch.save({"state_dict": theirs.state_dict(), "epoch": 1}, tmp_path / "a.pth.tar")
        report = tf.load_checkpoint(tmp_path / "a.pth.tar", ours)
        assert str(tmp_path / "a.pth.tar") in str(report)
        assert same_outputs(theirs, ours, turn)

    def test_layout_is_named(self):
        for name, (theirs, ours, _) in LAYOUTS.items():
            report = tf.load_checkpoint(theirs().state_dict(), ours())
            if name in ("MONAI", "efficient_densenet_pytorch", "densenet.pytorch"):
                assert report.layout == name
            assert ("log_softmax" in str(report)) == (name == "densenet.pytorch")

    def test_module_around_the_features_is_left_out(self, randomised):
        theirs, ours = randomised(foreign.Torchvision()), densenet()
        state = {f"backbone.{n}": v for n, v in theirs.features.state_dict().items()}
        state |= {
            "head.fc.weight": theirs.classifier.weight,
            "head.fc.bias": theirs.classifier.bias,
        }
        report = tf.load_checkpoint(state, ours)
        assert same_outputs(theirs, ours)
        assert report.mapped["head.fc.weight"] == "classifier.weight"

    def test_data_parallel_inside(self, randomised):
        theirs, ours = randomised(foreign.Torchvision()), densenet()
        state = {
            n.replace("features.", "features.module."): v for n, v in theirs.state_dict().items()
        }
        tf.load_checkpoint(state, ours)
        assert same_outputs(theirs, ours)

    @pytest.mark.parametrize("head", ["fc", "head", "classifier.1", "last_linear", "head.fc"])
    def test_classifier_of_another_name(self, randomised, head):
        theirs, ours = randomised(foreign.Torchvision()), densenet()
        state = {n.replace("classifier", head): v for n, v in theirs.state_dict().items()}
        tf.load_checkpoint(state, ours)
        assert same_outputs(theirs, ours)

    def test_own_wrappers(self, randomised):
        theirs, ours = randomised(foreign.Torchvision()), densenet()
        wrapped = nn.DataParallel(ours)
        tf.load_checkpoint(theirs.state_dict(), wrapped)
        assert same_outputs(theirs, ours)
        assert not list(tf.load_checkpoint(wrapped.state_dict(), densenet()).initialised)

    def test_any_module(self, randomised):
        theirs, ours = randomised(foreign.Torchvision()), foreign.Torchvision()
        tf.load_checkpoint({f"module.{n}": v for n, v in theirs.state_dict().items()}, ours)
        assert same_outputs(theirs, ours)

    def test_no_classifier_wanted(self, randomised):
        theirs, ours = randomised(foreign.Torchvision()), densenet(num_classes=0)
        report = tf.load_checkpoint(theirs.state_dict(), ours)
        assert set(report.ignored.values()) == {"the model has no classifier"}
        theirs.classifier = nn.Identity()
        assert same_outputs(theirs, ours)


class TestChoice:
    def test_averaged_weights_are_preferred(self, randomised):
        theirs, other, ours = randomised(foreign.Torchvision()), foreign.Torchvision(), densenet()
        content = {"state_dict": other.state_dict(), "state_dict_ema": theirs.state_dict()}
        report = tf.load_checkpoint(content, ours)
        assert report.container == "state_dict_ema"
        assert report.ignored["state_dict"] == "'state_dict_ema' of the file was taken"
        assert same_outputs(theirs, ours)

    def test_of_another_network_are_passed_over(self, randomised):
        theirs, ours = randomised(foreign.Torchvision()), densenet()
        content = {"ema": nn.Conv2d(3, 3, 3).state_dict(), "model": theirs.state_dict()}
        assert tf.load_checkpoint(content, ours).container == "model"
        assert same_outputs(theirs, ours)

    def test_two_networks(self):
        state = foreign.Torchvision().state_dict()
        both = {f"{p}.{n}": v for p in ("student", "teacher") for n, v in state.items()}
        with pytest.raises(ValueError, match=r"more than once.*'student\.' and 'teacher\.'"):
            tf.load_checkpoint(both, densenet())

    def test_name_twice(self):
        state = foreign.Torchvision().state_dict()
        state["module.features.conv0.weight"] = state["features.conv0.weight"]
        with pytest.raises(ValueError, match="holds both"):
            tf.load_checkpoint(state, densenet())


class TestNewClassifier:
    def test_of_another_size(self, randomised):
        theirs, ours = randomised(foreign.Torchvision()), densenet(num_classes=3)
        with pytest.raises(
            ValueError, match=r"'classifier.weight' is \(5, 18\), expected \(3, 18\)"
        ):
            tf.load_checkpoint(theirs.state_dict(), ours)
        weight = ours.classifier.weight.clone()
        report = tf.load_checkpoint(theirs.state_dict(), ours, new_classifier=True)
        assert report.initialised == ("classifier.weight", "classifier.bias")
        assert "5 outputs, where the model's has 3" in report.ignored["classifier.weight"]
        assert torch.equal(ours.classifier.weight, weight)
        assert torch.equal(ours.features.conv0.weight, theirs.features.conv0.weight)

    def test_of_the_same_size_is_taken(self, randomised):
        theirs, ours = randomised(foreign.Torchvision()), densenet()
        assert not tf.load_checkpoint(theirs.state_dict(), ours, new_classifier=True).initialised
        assert same_outputs(theirs, ours)

    def test_head_of_two_layers(self, randomised):
        theirs = randomised(foreign.Torchvision())
        theirs.classifier = nn.Sequential(nn.Linear(18, 18), nn.ReLU(), nn.Linear(18, 5))
        ours = densenet()
        with pytest.raises(ValueError, match="none that is one linear layer"):
            tf.load_checkpoint(theirs.state_dict(), ours)
        report = tf.load_checkpoint(theirs.state_dict(), ours, new_classifier=True)
        assert report.ignored["classifier.0.weight"] == "not of the network"
        assert len(report.initialised) == 2

    def test_tensors_inside_the_network_are_never_ignored(self):
        state = foreign.Torchvision().state_dict()
        state["features.attention.weight"] = torch.ones(3, 3)
        for new_classifier in (False, True):
            with pytest.raises(ValueError, match=r"none of the model \('features\.attention"):
                tf.load_checkpoint(state, densenet(), new_classifier=new_classifier)

    def test_a_normalisation_beside_the_network_is_not_ignored(self):
        state = foreign.Torchvision().state_dict()
        state["normalize.mean"] = torch.ones(3)
        with pytest.raises(ValueError, match=r"'normalize\.mean'"):
            tf.load_checkpoint(state, densenet())


class TestRefusals:
    """Nothing is loaded, and the message is short."""

    @pytest.fixture
    def refused(self, tmp_path):
        ours = densenet()
        before = copy.deepcopy(ours.state_dict())

        def check(source, message, **options):
            with pytest.raises((ValueError, OSError), match=message) as error:
                tf.load_checkpoint(source, ours, **options)
            assert len(str(error.value)) < 900
            assert "\n" not in str(error.value)
            assert all(torch.equal(v, before[n]) for n, v in ours.state_dict().items())

        return check

    def test_another_network(self, refused):
        refused(tf.create_model("hardnet39ds").state_dict(), "no layout that is known")
        refused(nn.Linear(3, 3).state_dict(), "no layout that is known")
        # The same names, but fewer layers.
        small = tf.DenseNet(first_channels=8, blocks=(2, 3, 1), growth_rate=4, num_classes=5)
        refused(small.state_dict(), r"10 of its \d+ tensors are missing")
        refused(tf.create_model("densenet121").state_dict(), "shapes differ|none of the model")

    def test_sizes(self, refused):
        wide = tf.DenseNet(first_channels=16, blocks=foreign.BLOCKS, growth_rate=4, num_classes=5)
        refused(wide.state_dict(), r"shapes differ: 'features.conv0.weight' is \(16, 3, 7, 7\)")

    def test_one_is_missing(self, refused):
        for name in foreign.Torchvision().state_dict():
            state = foreign.Torchvision().state_dict()
            del state[name]
            if "num_batches" not in name:
                refused(state, "missing" if "classifier" not in name else "no classifier")

    def test_names_of_the_same_shapes_in_order_are_not_enough(self, refused):
        state = foreign.Torchvision().state_dict()
        refused({f"layer{i}": v for i, v in enumerate(state.values())}, "no layout")

    def test_layers_that_put_new_channels_first(self, refused):
        # The names of another CIFAR DenseNet, whose layers concatenate the other way round.
        state = {
            re.sub(r"(trans\d)\.(bn|conv)1", r"\1.\2", n).replace("fc.", "linear."): v
            for n, v in foreign.Cifar().state_dict().items()
        }
        small = densenet(small=True)
        with pytest.raises(ValueError, match="missing"):
            tf.load_checkpoint(state, small)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda v: v.to(torch.complex64), "complex64"),
            (lambda v: v.to(torch.int8), "int8"),
            (lambda v: v.to_sparse(), "is sparse"),
            (lambda v: v.to("meta"), "meta device"),
            (lambda v: v.reshape(1, -1), "shapes differ"),
            (lambda v: torch.zeros(1).expand(1 << 40), "shapes differ"),
            (lambda v: torch.zeros(1).expand(len(v)), "has fewer values than that"),
            (lambda v: v.tolist(), "missing"),
            (lambda v: None, "missing"),
        ],
    )
    def test_values(self, refused, change, message):
        state = foreign.Torchvision().state_dict()
        state["features.norm5.weight"] = change(state["features.norm5.weight"])
        refused(state, message)

    @pytest.mark.filterwarnings("ignore")
    def test_quantized(self, refused):
        state = foreign.Torchvision().state_dict()
        weight = state["features.norm5.weight"]
        state["features.norm5.weight"] = torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)
        refused(state, "is quantized")

    def test_values_too_large(self):
        state = {n: v.double() for n, v in foreign.Torchvision().state_dict().items()}
        state["features.norm5.weight"][0] = 1e300
        with pytest.raises(ValueError, match=r"'features.norm5.weight' does not fit torch.float32"):
            tf.load_checkpoint(state, densenet())

    def test_names_of_any_length(self, refused):
        refused({f"{'x' * 10**6}\n{i}": torch.ones(2) for i in range(50)}, "no layout")

    def test_many_names_and_one_dict_in_many_places(self, refused):
        one = torch.ones(1)
        refused({f"{i}.features.conv0.weight": one for i in range(20_000)}, "missing")
        content: dict = {f"{i}": one for i in range(1000)}
        for _ in range(5):
            content = dict.fromkeys(("state_dict", "model", "net", "ema", "params"), content)
        refused(content, "no tensors|no layout")

    def test_nothing_in_it(self, refused):
        refused({}, "no tensors")
        refused({"state_dict": {}}, "no tensors")
        refused({"epoch": 3, 7: torch.ones(3)}, "no tensors")
        nested: dict = {}
        nested["model"] = nested
        refused(nested, "no tensors")

    def test_types(self):
        with pytest.raises(TypeError, match=r"model is a str: expected a torch\.nn\.Module"):
            tf.load_checkpoint({}, "densenet121")
        with pytest.raises(TypeError, match=r"source is a Linear: pass its state_dict\(\)"):
            tf.load_checkpoint(nn.Linear(2, 2), densenet())
        with pytest.raises(TypeError, match="source is a int"):
            tf.load_checkpoint(3, densenet())

    def test_model_without_values(self):
        with torch.device("meta"):
            ours = densenet()
        with pytest.raises(ValueError, match="call to_empty first"):
            tf.load_checkpoint(foreign.Torchvision().state_dict(), ours)


class TestValues:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_dtypes(self, dtype):
        state = foreign.Torchvision().to(dtype).state_dict()
        ours = densenet()
        report = tf.load_checkpoint(state, ours)
        assert f"from {dtype} to torch.float32" in str(report)
        for name, value in ours.state_dict().items():
            assert torch.equal(value, state[name].to(value.dtype)), name

    def test_counters_of_a_file_that_was_halved_as_a_whole(self):
        state = {name: value.half() for name, value in foreign.Torchvision().state_dict().items()}
        report = tf.load_checkpoint(state, densenet())
        assert set(report.ignored.values()) == {"a counter that is no integer"}
        assert all(name.endswith("num_batches_tracked") for name in report.ignored)

    def test_not_finite_is_said(self):
        state = foreign.Torchvision().state_dict()
        state["features.norm5.weight"][0] = float("nan")
        report = tf.load_checkpoint(state, densenet())
        assert "hold NaN or infinity: 'features.norm5.weight'" in str(report)

    def test_shared_storage(self):
        theirs = foreign.Torchvision()
        everything = torch.cat([p.detach().flatten() for p in theirs.parameters()])
        state, offset = theirs.state_dict(), 0
        for name, value in theirs.named_parameters():
            state[name] = everything[offset : offset + value.numel()].view(value.shape)
            offset += value.numel()
        ours = densenet()
        tf.load_checkpoint(state, ours)
        assert same_outputs(theirs, ours)

    def test_the_callers_dict_stays(self):
        state = dotted(foreign.Torchvision().state_dict())
        before = dict(state)
        tf.load_checkpoint(state, densenet())
        assert state.keys() == before.keys()
        assert all(value is before[name] for name, value in state.items())


class TestHook:
    """``load_state_dict`` itself, with ``strict=True``."""

    @pytest.mark.parametrize(
        "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."]
    )
    @pytest.mark.parametrize("change", [dict, dotted])
    def test_loads(self, randomised, prefix, change):
        theirs, ours = randomised(foreign.Torchvision()), densenet()
        state = {prefix + name: value for name, value in change(theirs.state_dict()).items()}
        before = dict(state)
        result = ours.load_state_dict(state, strict=True)
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert same_outputs(theirs, ours)
        assert state.keys() == before.keys()

    def test_without_counters_but_with_versions(self, randomised):
        theirs, ours = randomised(foreign.Torchvision()), densenet()
        state = theirs.state_dict()
        for name in list(state):
            if name.endswith("num_batches_tracked"):
                del state[name]
        assert state._metadata
        ours.load_state_dict(state, strict=True)
        assert same_outputs(theirs, ours)

    def test_within_another_module(self, randomised):
        theirs = randomised(foreign.Torchvision())
        around = nn.ModuleDict({"net": densenet()})
        state = {f"net.module.{n}": v for n, v in dotted(theirs.state_dict()).items()}
        around.load_state_dict(state, strict=True)
        assert same_outputs(theirs, around["net"])

    def test_real_wrappers(self, randomised):
        ours = randomised(densenet())
        for wrapped in (nn.DataParallel(ours), torch.compile(ours)):
            again = densenet()
            again.load_state_dict(wrapped.state_dict(), strict=True)
            assert same_outputs(ours, again)
            ours.float()
        part = randomised(densenet())
        part.features = torch.compile(part.features)
        part.load_state_dict(densenet().state_dict(), strict=True)
        part.load_state_dict(part.state_dict(), strict=True)

    @pytest.mark.parametrize(
        "again",
        [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
        ids=["copy", "deepcopy", "pickle"],
    )
    def test_copies(self, randomised, again):
        theirs = randomised(foreign.Torchvision())
        copied = again(densenet())
        gc.collect()
        copied.load_state_dict(dotted(theirs.state_dict()), strict=True)
        assert same_outputs(theirs, copied)

    def test_assign_to_a_network_without_values(self, randomised):
        theirs = randomised(foreign.Torchvision())
        with torch.device("meta"):
            ours = densenet()
        ours.load_state_dict(dotted(theirs.state_dict()), strict=True, assign=True)
        assert same_outputs(theirs, ours)

    def test_still_strict(self):
        state = foreign.Torchvision().state_dict()
        for name in ("features.norm5.weight", "classifier.bias"):
            with pytest.raises(RuntimeError, match="Missing key"):
                densenet().load_state_dict({n: v for n, v in state.items() if n != name})
        with pytest.raises(RuntimeError, match="Unexpected key"):
            densenet().load_state_dict({**state, "more": torch.ones(1)})
        both = {**state, "module.features.norm5.weight": torch.ones(18)}
        with pytest.raises(RuntimeError, match="Unexpected key"):
            densenet().load_state_dict(both)
        result = densenet().load_state_dict({}, strict=False)
        assert "features.norm5.weight" in result.missing_keys


class Code:
    """What runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def saved(content: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def zipped(**content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
    return buffer.getvalue()


STATE = foreign.Torchvision().state_dict()
NEW, LEGACY = saved(STATE), saved(STATE, _use_new_zipfile_serialization=False)

FILES = {
    "empty": (b"", "is empty"),
    "page": (b"\n<!DOCTYPE html><html>not found</html>", "HTML"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"),
    "gzip": (gzip.compress(NEW), "gzip"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "text": (b"hello\n", "no file of weights, or damaged"),
    "noise": (bytes(range(256)) * 20, "no file of weights, or damaged"),
    "zip": (zipped(a=b"hello"), "no file of weights, or damaged"),
    "bomb": (zipped(a=bytes(1 << 26)), "unpacks from"),
    "tar": (tarred(), "tar file of PyTorch before"),
    "half": (NEW[: len(NEW) // 2], "no file of weights, or damaged"),
    "half of the old format": (LEGACY[: len(LEGACY) // 2], "no file of weights, or damaged"),
    "end is missing": (LEGACY[:-4], "no file of weights, or damaged"),
    "only a beginning": (NEW[:30], "no file of weights, or damaged"),
    "module": (saved(nn.Linear(2, 2)), r"asks for torch\.nn\.modules\.linear\.Linear, which is"),
    "old module": (
        saved(nn.Linear(2, 2), _use_new_zipfile_serialization=False),
        r"asks for torch\.nn\.modules\.linear\.Linear",
    ),
    "class": (saved({"a": defaultdict(list)}), r"asks for collections\.defaultdict|defaultdict"),
    "list": (saved([torch.ones(3)]), "holds a list"),
    "tensor": (saved(torch.ones(3)), "holds a Tensor"),
    "safetensors": ((10**6).to_bytes(8, "little") + b"{}", "no safetensors file"),
}


class TestFiles:
    @pytest.mark.parametrize("name", FILES)
    def test_refused_in_one_line(self, tmp_path, name):
        content, message = FILES[name]
        path = tmp_path / "a.pth"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            tf.load_checkpoint(path, densenet())
        assert str(error.value).startswith(str(path))
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 600

    def test_code_is_not_run(self, tmp_path):
        trace = tmp_path / "trace"
        for number, content in enumerate(
            (
                saved({"state_dict": STATE, "a": Code(trace)}),
                saved({"a": Code(trace)}, _use_new_zipfile_serialization=False),
            )
        ):
            path = tmp_path / f"{number}.pth"
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"asks for posix\.system.*save model\.state_dict"):
                tf.load_checkpoint(path, densenet())
        path.write_bytes(pickle.dumps(Code(trace)))
        with pytest.raises(ValueError, match="no file of weights"):
            tf.load_checkpoint(path, densenet())
        assert not trace.exists()

    def test_numbers_of_numpy_stand_beside_the_weights(self, tmp_path):
        beside = {"best": np.float64(0.5), "epoch": np.int64(3), "losses": np.arange(3.0)}
        path = tmp_path / "a.pth"
        path.write_bytes(saved({"state_dict": STATE, **beside}))
        report = tf.load_checkpoint(path, densenet())
        assert report.container == "state_dict"
        assert set(beside) <= set(report.ignored)
        path.write_bytes(saved({name: np.ones(3) for name in STATE}))
        with pytest.raises(ValueError, match="holds no tensors"):
            tf.load_checkpoint(path, densenet())

    @pytest.mark.filterwarnings("ignore")
    def test_torchscript(self, tmp_path):
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"TorchScript archive: torch\.jit\.load"):
            tf.load_checkpoint(tmp_path / "a.pt", densenet())

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            tf.load_checkpoint(tmp_path / "a.pth", densenet())
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
            tf.load_checkpoint(tmp_path, densenet())
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(ValueError, match="is no file"):
            tf.load_checkpoint(tmp_path / "fifo", densenet())

    @pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.pth.tar", "a.tar", "a.ckpt", "a.bin"])
    @pytest.mark.parametrize("content", [NEW, LEGACY], ids=["zip", "legacy"])
    def test_names(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        ours = densenet()
        tf.load_checkpoint(str(tmp_path / name), ours)
        assert torch.equal(ours.classifier.weight, STATE["classifier.weight"])

    def test_safetensors(self, tmp_path):
        from safetensors.torch import save_file

        save_file(OrderedDict(STATE), tmp_path / "a.safetensors")
        ours = densenet()
        tf.load_checkpoint(tmp_path / "a.safetensors", ours)
        assert torch.equal(ours.classifier.weight, STATE["classifier.weight"])

    def test_safetensors_whose_length_reads_as_html(self, tmp_path):
        from safetensors.torch import save

        content = save(OrderedDict(nn.Linear(2, 2).state_dict()))
        header = content[8 : 8 + int.from_bytes(content[:8], "little")].rstrip().ljust(0x13C)
        data = content[8 + int.from_bytes(content[:8], "little") :]
        path = tmp_path / "a.bin"
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)
        assert path.read_bytes().startswith(b"<")
        assert len(tf.load_checkpoint(path, nn.Linear(2, 2)).mapped) == 2

    def test_what_training_writes(self, tmp_path):
        trained = save_random(tmp_path / "model.safetensors")
        for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "model.json"):
            ours = tf.create_model("threshnet79", num_classes=10)
            tf.load_checkpoint(path, ours)
            for name, value in ours.state_dict().items():
                assert torch.equal(value, trained.state_dict()[name]), name

    def test_every_byte_counts(self, tmp_path):
        # A damaged file is refused or read, and nothing else.
        generator = torch.Generator().manual_seed(0)
        content = saved(nn.Linear(2, 2).state_dict())
        path, messages = tmp_path / "a.pth", []
        for position in torch.randint(len(content), (300,), generator=generator).tolist():
            damaged = bytearray(content)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            try:
                tf.load_checkpoint(path, nn.Linear(2, 2))
            except ValueError as error:
                messages.append(str(error))
        assert messages
        assert not any("\n" in message for message in messages)


class TestRealPackages:
    """The packages themselves, where they are installed."""

    def test_torchvision(self, randomised):
        models = pytest.importorskip("torchvision.models")
        theirs = randomised(models.densenet121(num_classes=7))
        ours = tf.DenseNet121(num_classes=7)
        tf.load_checkpoint(dotted(theirs.state_dict()), ours)
        assert same_outputs(theirs, ours)

    def test_timm(self, randomised):
        timm = pytest.importorskip("timm")
        theirs = randomised(timm.create_model("densenet169", num_classes=7))
        ours = tf.DenseNet169(num_classes=7)
        tf.load_checkpoint({"state_dict": theirs.state_dict()}, ours)
        assert same_outputs(theirs, ours)

    def test_monai(self, randomised):
        nets = pytest.importorskip("monai.networks.nets")
        theirs = randomised(nets.DenseNet121(spatial_dims=2, in_channels=1, out_channels=7))
        ours = tf.DenseNet121(num_classes=7, in_chans=1)
        assert tf.load_checkpoint(theirs.state_dict(), ours).layout == "MONAI"
        assert same_outputs(theirs, ours)

    def test_monai_in_three_dimensions(self):
        nets = pytest.importorskip("monai.networks.nets")
        theirs = nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=7)
        with pytest.raises(ValueError, match="shapes differ"):
            tf.load_checkpoint(theirs.state_dict(), tf.DenseNet121(num_classes=7, in_chans=1))

    def test_torchxrayvision(self, randomised):
        xrv = pytest.importorskip("torchxrayvision")
        theirs = randomised(xrv.models.DenseNet(num_classes=7, op_threshs=torch.rand(7)))
        ours = tf.DenseNet121(num_classes=7, in_chans=1)
        report = tf.load_checkpoint(theirs.state_dict(), ours)
        assert "thresholds" in report.ignored["op_threshs"]
        theirs.op_threshs = None
        assert same_outputs(theirs, ours)
