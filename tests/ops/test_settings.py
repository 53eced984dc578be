"""Numbers that differ by part of a model."""

from __future__ import annotations

import pytest

from adapterkit.adapters.bound_rule import BoundRule
from adapterkit.errors import UsageError
from adapterkit.ops.rules import find
from adapterkit.ops.settings import at, depths, setting

LAYERS = [f"model.layers.{k}.mlp.up_proj.weight" for k in range(5)]


def test_a_list_goes_from_the_first_layer_to_the_last() -> None:
    found = setting([{"value": [0, 0.5, 0.3]}], float, "t")
    depth = depths([*LAYERS, "model.norm.weight"])
    assert [found.at(name, depth(name)) for name in LAYERS] == pytest.approx([0, 0.25, 0.5, 0.4, 0.3])
    assert found.at("model.norm.weight", depth("model.norm.weight")) == 0  # in no layer: the first


def test_a_stack_of_one_layer_is_its_last_and_stacks_are_counted_apart() -> None:
    depth = depths(["encoder.layers.0.x", "encoder.layers.3.x", "decoder.layers.1.x", "decoder.layers.0.x", "h.0.x"])
    assert [depth(f"encoder.layers.{k}.x") for k in (0, 1, 3)] == pytest.approx([0, 1 / 3, 1])
    assert [depth(f"decoder.layers.{k}.x") for k in (0, 1)] == [0, 1]
    assert depth("h.0.x") == 1


def test_the_first_filter_that_is_part_of_the_name_counts() -> None:
    rows = [{"filter": "up_proj", "value": 0.1}, {"filter": "mlp", "value": [0.2, 0.4]}, {"filter": "*", "value": 0.5}]
    found = setting(rows, float, "t")
    assert found.at("layers.1.mlp.up_proj.weight", 1.0) == 0.1
    assert found.at("layers.1.mlp.gate.weight", 0.5) == pytest.approx(0.3)
    assert found.at("embed.weight", 0.0) == 0.5
    assert at((found, 2.0), "embed.weight", 0.0) == (0.5, 2.0)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([{"filter": "mlp", "value": 0.5}], "says nothing for tensors that no filter names"),
        ([{"value": []}], "a row without a value"),
        ([{"values": 0.5}], "a row that is not"),
        ([{"value": 1.5}], r"density of method ties must be in \(0, 1\]"),
        ([{"value": "much"}], "density of method ties must be a number"),
        ([0.5, 2.0], r"density of method ties must be in \(0, 1\]"),
    ],
)
def test_what_is_no_setting(value: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        find("ties").bind({"density": value})
    with pytest.raises(UsageError, match=words):
        BoundRule("ties", parameters={"density": value})


def test_only_some_parameters_have_a_value_for_each_adapter() -> None:
    assert find("ties").bind({"density": [0.2, 0.4]})["density"] == (0.2, 0.4)
    with pytest.raises(UsageError, match="must be a number"):
        find("slerp").bind({"t": [0.2, 0.4]})


def test_the_words_of_a_method_name_its_settings() -> None:
    rule = BoundRule("slerp", parameters={"t": [{"filter": "mlp", "value": [0, 1.0]}, {"value": 0.5}]})
    assert str(rule) == "slerp t=(0/1 (mlp), 0.5)"
