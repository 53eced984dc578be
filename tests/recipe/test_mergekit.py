"""Recipes of mergekit: what each becomes, with expected weights from mergekit's own formulas; and what is refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import adapterkit
from adapterkit.errors import RecipeError
from adapterkit.recipe.parse import read_recipe

LAYERS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 24}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
    base.save_pretrained(folder / "base")
    for name in ("one", "two"):
        model = LlamaForCausalLM.from_pretrained(folder / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        model.save_pretrained(folder / name)
    return folder


def written(folder: Path, data: Any) -> Path:
    file = folder / "recipe.yml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    return file


def built(models: Path, folder: Path, data: dict[str, Any]) -> dict[str, torch.Tensor]:
    for name in ("base", "one", "two"):
        (folder / name).symlink_to(models / name)
    adapterkit.build(written(folder, data))
    return load_file(folder / "merged" / "model.safetensors")


def read(models: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(models / name / "model.safetensors") for name in ("base", "one", "two")]


def depth(name: str) -> float:
    """mergekit: idx / (layers - 1) inside of layers, 0 outside."""
    return int(name.split(".")[2]) / (LAYERS - 1) if ".layers." in name else 0.0


def test_linear_without_a_base_is_the_mean_of_whole_weights(models: Path, tmp_path: Path) -> None:
    data = {
        "merge_method": "linear",
        "models": [{"model": n, "parameters": {"weight": w}} for n, w in (("base", 1), ("one", 2), ("two", 0.5))],
        "dtype": "float32",
    }
    out = built(models, tmp_path, data)
    base, one, two = read(models)
    for name in base:
        expected = (base[name].double() + 2 * one[name].double() + 0.5 * two[name].double()) / 3.5
        torch.testing.assert_close(out[name].double(), expected, rtol=0, atol=2e-7)


def test_slerp_by_filter_and_layer(models: Path, tmp_path: Path) -> None:
    """The recipe that most published merges are."""
    rows = [
        {"filter": "self_attn", "value": [0, 0.5, 1]},
        {"filter": "mlp", "value": [1, 0.2]},
        {"value": 0.5},
    ]
    sources = [{"model": name, "layer_range": [0, LAYERS]} for name in ("base", "one")]
    data = {
        "slices": [{"sources": sources}],
        "merge_method": "slerp",
        "base_model": "base",
        "parameters": {"t": rows},
        "dtype": "float32",
    }
    out = built(models, tmp_path, data)
    base, one, _ = read(models)
    for name in base:
        w, v = base[name].double(), one[name].double()
        t = depth(name) if "self_attn" in name else 1 - 0.8 * depth(name) if "mlp" in name else 0.5
        cosine = float((w * v).sum() / w.norm() / v.norm())
        if abs(cosine) > 0.9995:
            expected = (1 - t) * w + t * v
        else:
            angle = math.acos(cosine)
            expected = (math.sin((1 - t) * angle) * w + math.sin(t * angle) * v) / math.sin(angle)
        torch.testing.assert_close(out[name].double(), expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("name", ["nuslerp", "multislerp", "karcher"])
def test_whole_weights_on_the_sphere(name: str, models: Path, tmp_path: Path) -> None:
    """Without base_model mergekit turns between whole weights, the first model's among them."""
    who = ("base", "one") if name == "nuslerp" else ("base", "one", "two")
    given = {"base": 0.7, "one": 0.5, "two": 0.0} if name != "karcher" else dict.fromkeys(who, 1.0)
    parameters = {"tol": 1e-10, "max_iter": 50} if name == "karcher" else {"weight": 0.5}
    listed = [{"model": n, "parameters": {"weight": given[n]} if name != "karcher" else {}} for n in who]
    data = {"merge_method": name, "models": listed, "parameters": parameters, "dtype": "float32"}
    out = built(models, tmp_path, data)
    found = dict(zip(("base", "one", "two"), read(models), strict=True))
    for key in found["base"]:
        vectors = [found[n][key].double().flatten() for n in who if given[n]]
        shares = torch.tensor([given[n] for n in who if given[n]], dtype=torch.float64)
        shares = shares / shares.sum()
        lengths = torch.stack([v.norm() for v in vectors])
        units = [v / v.norm() for v in vectors]
        if name == "karcher":
            mean = sum(s * u for s, u in zip(shares, units, strict=True))
            mean = mean / mean.norm()
            for _ in range(50):
                logs = []
                for unit in units:
                    angle = torch.atan2((unit - (unit @ mean) * mean).norm(), unit @ mean)
                    along = unit - (unit @ mean) * mean
                    logs.append(angle * along / along.norm() if along.norm() > 0 else along)
                step = sum(s * log for s, log in zip(shares, logs, strict=True))
                if step.norm() < 1e-13:
                    break
                mean = mean * step.norm().cos() + step / step.norm() * step.norm().sin()
            expected = (shares @ lengths) * mean
        else:  # the mean of two: at the share of the angle; of lengths in nuslerp each keeps its own
            angle = torch.atan2((units[1] - (units[1] @ units[0]) * units[0]).norm(), units[1] @ units[0])
            parts = units if name == "multislerp" else vectors
            if angle < 1e-7:
                expected = shares[0] * vectors[0] + shares[1] * vectors[1]
            elif name == "nuslerp":
                expected = ((shares[0] * angle).sin() * parts[0] + (shares[1] * angle).sin() * parts[1]) / angle.sin()
            else:
                mean = shares[0] * units[0] + shares[1] * units[1]
                mean = mean / mean.norm()
                flat = sum(s * (u - (u @ mean) * mean) for s, u in zip(shares, units, strict=True))
                turn = flat.norm()
                expected = (shares @ lengths) * (mean * turn.cos() + (flat / turn * turn.sin() if turn > 1e-13 else 0))
        torch.testing.assert_close(out[key].double().flatten(), expected, rtol=0, atol=5e-7)


def test_weights_by_layer(models: Path, tmp_path: Path) -> None:
    data = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [
            {"model": "one", "parameters": {"weight": [0, 1]}},
            {"model": "two", "parameters": {"weight": [{"filter": "mlp", "value": 0.3}, {"value": 0.0}]}},
        ],
        "parameters": {"lambda": 0.5},
    }
    out = built(models, tmp_path, data)
    base, one, two = read(models)
    for name in base:
        w = base[name].double()
        expected = w + 0.5 * depth(name) * (one[name].double() - w)
        if "mlp" in name:
            expected += 0.5 * 0.3 * (two[name].double() - w)
        torch.testing.assert_close(out[name].double(), expected, rtol=0, atol=2e-7)
    assert adapterkit.verify(tmp_path / "merged", base=models / "base", adapters=[models / "one", models / "two"]).ok


def test_what_ties_becomes(tmp_path: Path) -> None:
    """mergekit's defaults are density 1 and normalize true; a density of one model, and of all of them."""
    models = [
        {"model": "a/one", "parameters": {"weight": 0.5, "density": 0.3}},
        {"model": "a/two", "parameters": {"weight": 0.2}},
    ]
    data = {
        "merge_method": "ties",
        "base_model": "a/base",
        "models": [{"model": "a/base"}, *models],
        "dtype": "bfloat16",
    }
    recipe = read_recipe(written(tmp_path, data)).recipe
    assert recipe.base is not None
    assert recipe.base.ref == "a/base"
    assert [(one.ref, one.weight) for one in recipe.adapters.values()] == [("a/one", 0.5), ("a/two", 0.2)]
    assert recipe.merge.method == "ties"
    assert recipe.merge.parameters == {"density": [0.3, 1.0], "normalize": "weights"}
    assert recipe.outputs["merged"].options["dtype"] == "bf16"
    data["parameters"] = {"density": 0.6, "normalize": False, "int8_mask": True}
    del models[0]["parameters"]["density"]
    assert read_recipe(written(tmp_path, data)).recipe.merge.parameters == {"density": 0.6, "normalize": "none"}


def test_an_adapter_on_the_base_is_the_adapter_alone(tmp_path: Path) -> None:
    data = {
        "merge_method": "dare_linear",
        "base_model": "a/base",
        "models": [{"model": "a/base+a/lora", "parameters": {"weight": 1, "density": 0.5}}],
        "parameters": {"rescale": True},
    }
    recipe = read_recipe(written(tmp_path, data)).recipe
    assert [one.ref for one in recipe.adapters.values()] == ["a/lora"]
    assert (recipe.merge.method, recipe.merge.parameters) == ("dare", {"density": 0.5})


MODELS = [{"model": "one", "parameters": {"weight": 1}}, {"model": "two", "parameters": {"weight": 1}}]

BARE: list[dict[str, Any]] = [{"model": "one"}, {"model": "two"}]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"merge_method": "passthrough"}, "passthrough is none that adapterkit computes"),
        (
            {"merge_method": "karcher", "parameters": {"max_iter": 2.5}, "models": BARE},
            "max_iter 2.5 is no whole number",
        ),
        ({"merge_method": "karcher", "parameters": {"max_iter": [1, 2]}, "models": BARE}, "max_iter is not one number"),
        (
            {"merge_method": "multislerp", "parameters": {"weight": -1}, "models": BARE},
            "with a weight below 0",
        ),
        ({"merge_method": "magic"}, "the methods that are: linear, task_arithmetic"),
        ({"merge_method": "ties"}, "ties without base_model is of whole weights"),
        ({"merge_method": "ties", "base_model": "b", "tokenizer_source": "union"}, "takes another vocabulary"),
        ({"merge_method": "ties", "base_model": "b", "tokenizer": {}}, "says tokenizer, which is not read here"),
        ({"merge_method": "ties", "base_model": "b", "chat_template": "auto"}, "says chat_template"),
        ({"merge_method": "ties", "base_model": "b", "parameters": {"gamma": 1}}, "ties has no parameter gamma"),
        ({"merge_method": "ties", "base_model": "b", "dtype": "float8"}, "'float8' is none that is written"),
        ({"merge_method": "ties", "base_model": "b", "parameters": {"density": "some"}}, "'some' is no number"),
        ({"merge_method": "slerp", "base_model": "b", "parameters": {"t": 0.5}}, "takes 1 beside the base"),
        ({"merge_method": "dare_ties", "base_model": "b", "parameters": {"rescale": False}}, "rescale"),
        ({"merge_method": "ties", "base_model": "b", "parameters": {"rescale": True}}, "rescale: True of ties"),
        ({"merge_method": "linear", "base_model": "b"}, "b has no weight"),
        ({"merge_method": "nuslerp", "base_model": "b", "parameters": {"nuslerp_flatten": False}}, "nuslerp_flatten"),
        ({"merge_method": "ties", "base_model": "b+lora"}, "is no plain name of a model"),
        (
            {"merge_method": "linear", "parameters": {"normalize": False}},
            "weights that add up to 2 without normalize scale the base",
        ),
        ({"merge_method": "linear", "slices": []}, "either models or slices"),
    ],
)
def test_refusals(data: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="recipe.yml: .*" + words.replace("+", r"\+")) as caught:
        read_recipe(written(tmp_path, {"models": MODELS, **data}))
    assert caught.value.hint


BOMB = "a: &a [x, x]\n" + "".join(f"{y}: &{y} [*{x}, *{x}]\n" for x, y in zip("abcdefg", "bcdefgh", strict=True))
NESTED = "[" + "[" * 40 + "1" + "]" * 40 + "]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "recipe.yml:1: this is not YAML"),
        ("- a", "has no merge_method"),
        ("merge_method: !!python/object:os.system x", "this is not YAML"),
        ("a: &a [*a]\n", "this is not YAML|has no merge_method"),
        (f"{BOMB}merge_method: *h\n", "has no merge_method"),
        (f"{BOMB}merge_method: ties\nbase_model: *h\nmodels: [{{model: a}}]\n", "says a, which is not read here"),
        (
            f"merge_method: ties\nbase_model: b\ndtype: {NESTED}\nmodels: [{{model: a, parameters: {{weight: 1}}}}]\n",
            "dtype",
        ),
        (
            f"merge_method: ties\nbase_model: b\nmodels: [{{model: a, parameters: {{weight: {NESTED}}}}}]\n",
            "is no number",
        ),
        ("merge_method: [ties]\n", "has no merge_method"),
        ("merge_method: ties\nbase_model: b\nmodels: 5\n", "it names no models"),
        ("merge_method: ties\nbase_model: b\nmodels: [5]\n", "a model is no table"),
        ("merge_method: ties\nbase_model: b\nmodels: [{}]\n", "a model has no name"),
        ("merge_method: ties\nbase_model: b\nmodels: [{model: a}]\n", "a has no weight"),
        ("merge_method: ties\nbase_model: b\nmodels: [{model: b}]\n", "no model beside the base"),
    ],
)
def test_what_is_no_merge(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=words):
        read_recipe(tmp_path / "recipe.yml")


def test_layers_that_are_not_all_of_them(models: Path, tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to(models / "one")
    sources = [{"model": "one", "layer_range": [0, 2]}]
    with pytest.raises(RecipeError, match=r"layer_range \[0, 2\] of one is not all of its 3 layers"):
        read_recipe(written(tmp_path, {"merge_method": "linear", "slices": [{"sources": sources}]}))
    stacked = {"merge_method": "linear", "slices": [{"sources": sources}, {"sources": sources}]}
    with pytest.raises(RecipeError, match="stacks several slices of layers"):
        read_recipe(written(tmp_path, stacked))
