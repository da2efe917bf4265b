from __future__ import annotations

import pytest

import threshnet_fast as tf
from threshnet_fast.models import register_model
from threshnet_fast.models.registry import _REGISTRY


@pytest.fixture
def scratch_registry():
    before = dict(_REGISTRY)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(before)


@pytest.mark.parametrize(
    ("name", "kind"), [("threshnet79", tf.ThreshNet79), ("threshnet95", tf.ThreshNet95)]
)
def test_create_model_passes_keywords(name, kind):
    model = tf.create_model(name, num_classes=7, in_chans=1, drop_rate=0.25)
    assert type(model) is kind
    assert (model.num_classes, model.in_chans, model.drop_rate) == (7, 1, 0.25)


def test_list_models_sorts_and_filters():
    names = tf.list_models()
    assert names == sorted(names)
    assert {"threshnet79", "threshnet95"} <= set(names)
    assert tf.list_models("threshnet*") == [n for n in names if n.startswith("threshnet")]
    assert tf.list_models("*NET95") == ["threshnet95"]
    assert tf.list_models("threshnet[0-7]*") == ["threshnet79"]
    assert tf.list_models("nothing*") == []


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("threshnet59", "threshnet95"),
        ("ThreshNet79", "threshnet79"),
        ("THRESHNET79", "threshnet79"),
        ("treshnet95", "threshnet95"),
        ("threshnet_95", "threshnet95"),
    ],
)
def test_unknown_model_suggests_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'") as error:
        tf.create_model(name)
    assert repr(name) in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_model_without_a_near_name_lists_all():
    with pytest.raises(ValueError, match=r"expected one of .*'threshnet79'"):
        tf.create_model("qqq")


@pytest.mark.parametrize("name", [None, 95, b"threshnet95", tf.ThreshNet95])
def test_name_must_be_a_string(name):
    with pytest.raises(TypeError, match=r"name is a .*: expected a str"):
        tf.create_model(name)


def test_filter_must_be_a_string():
    with pytest.raises(TypeError, match="filter is a int"):
        tf.list_models(5)


def test_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="classes"):
        tf.create_model("threshnet79", classes=3)


@pytest.mark.usefixtures("scratch_registry")
def test_register_model():
    @register_model("threshnet_tiny")
    def tiny(num_classes: int = 2):
        return tf.ThreshNet(
            blocks=(1,),
            transitions=(8,),
            downsample=(False,),
            growth_rates=(4,),
            threshold=1,
            num_classes=num_classes,
        )

    assert "threshnet_tiny" in tf.list_models("*tiny")
    assert tf.create_model("threshnet_tiny", num_classes=5).get_classifier().out_features == 5
    assert tiny().num_classes == 2

    with pytest.raises(ValueError, match="'threshnet_tiny': a model of that name is registered"):
        register_model("threshnet_tiny")


@pytest.mark.parametrize("name", ["", "ThreshNet"])
def test_register_model_refuses_bad_names(name):
    with pytest.raises(ValueError, match="expected a lower-case name"):
        register_model(name)


def test_register_model_without_parentheses():
    with pytest.raises(TypeError, match=r'expected @register_model\("name"\)'):

        @register_model
        def model():
            raise AssertionError


def test_public_names_resolve():
    assert tf.__version__ == "0.1.0"
    assert set(tf.__all__) <= set(dir(tf))
    for name in tf.__all__:
        assert getattr(tf, name) is not None
    for name in ("create_model", "explain", "list_models", "optimize", "show_config"):
        assert callable(getattr(tf, name)), name


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tf.nothing
