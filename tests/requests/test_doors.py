"""Every option of every verb is on every door, or says why it is not there."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from models import plain_adapter, plain_base

import adapterkit
from adapterkit.cli import app
from adapterkit.errors import UsageError
from adapterkit.recipe.parse import key_of
from adapterkit.recipe.schema import (
    AdapterChoice,
    BaseChoice,
    OutputTable,
    Publication,
    Registration,
    VerifyTable,
    known_options,
)
from adapterkit.requests.adapters import CombineRequest, ExtractRequest, ResizeRequest
from adapterkit.requests.check import CheckRequest
from adapterkit.requests.convert import ConvertRequest
from adapterkit.requests.evaluate import EvaluateRequest
from adapterkit.requests.merge import MergeRequest
from adapterkit.requests.option import BYTES, INPUT, VALUES, Option, Request, default_of, flag_of
from adapterkit.requests.publish import PullRequest, PushRequest
from adapterkit.requests.register import RegisterRequest
from adapterkit.requests.verify import VerifyRequest
from adapterkit.requests.workers import RunRequest

REQUESTS: dict[str, type[Request]] = {
    "merge": MergeRequest,
    "convert": ConvertRequest,
    "combine": CombineRequest,
    "extract": ExtractRequest,
    "resize": ResizeRequest,
    "verify": VerifyRequest,
    "register": RegisterRequest,
    "check": CheckRequest,
    "run": RunRequest,
    "evaluate": EvaluateRequest,
    "push": PushRequest,
    "pull": PullRequest,
}
# Verbs that no step of a recipe is: their options have no place there.
NO_STEP = {"extract", "resize", "check", "run", "evaluate", "pull"}
OPTIONS = [(verb, name) for verb, request in REQUESTS.items() for name in request.options()]


def option_of(verb: str, name: str) -> Option:
    return REQUESTS[verb].options()[name]


@pytest.mark.parametrize(("verb", "name"), OPTIONS)
def test_an_option_is_on_the_command_line(verb: str, name: str) -> None:
    option = option_of(verb, name)
    command = app.get_command(click.Context(app), verb)
    assert command is not None
    flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    if "cli" in option.elsewhere:
        assert flag_of(name) not in flags
        return
    assert (option.flag or flag_of(name)) in flags or name in {parameter.name for parameter in command.params}


@pytest.mark.parametrize(("verb", "name"), OPTIONS)
def test_an_option_is_a_keyword_of_the_function(verb: str, name: str) -> None:
    function = getattr(adapterkit, verb)
    parameters = inspect.signature(function).parameters
    assert name in parameters
    assert parameters[name].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert f"    {name}: " in inspect.getdoc(function) or "python" in option_of(verb, name).elsewhere  # type: ignore[operator]


@pytest.mark.parametrize(("verb", "name"), [pair for pair in OPTIONS if pair[0] not in NO_STEP])
def test_an_option_is_a_key_of_a_recipe(verb: str, name: str) -> None:
    option = option_of(verb, name)
    tables = {"base": BaseChoice, "adapters": AdapterChoice, "verify": VerifyTable, "output": OutputTable}
    if verb == "verify" and option.role in (INPUT, VALUES):
        return  # a step is verified with the options of the merge that made it
    if "recipe" in option.elsewhere or (verb in ("register", "push") and option.role == INPUT):
        return
    table, _, key = option.recipe.partition(".")
    assert table, f"{name} of {verb} is no key of a recipe, and gives no reason"
    if table in ("register", "push"):
        of = Registration if table == "register" else Publication
        assert key in {key_of(one) for one in vars(of)["__dataclass_fields__"].values()}
        return
    fields = vars(tables[table])["__dataclass_fields__"].values() if table in tables else ()
    assert key in known_options(table) or key in {key_of(one) for one in fields}


def other_than_default(option: Option, default: Any) -> Any:
    """A value that is not the default."""
    choices = option.values()
    if choices:
        return next(choice for choice in choices if choice != default)
    kind = option.kind
    if kind == "pairs":
        return (("attn_v", "Q8_0"),)
    if kind == "parameters":
        return {"density": 0.5}
    if kind in ("flag", "switch"):
        return not default
    if kind in ("whole", "number"):
        return (0.5,) if option.many else 1 if kind == "whole" else 0.5
    return ("x",) if option.many else Path("x") if kind == "path" else "x"


OF_VALUES = [name for name, one in MergeRequest.options().items() if one.role in (VALUES, BYTES)]


@pytest.mark.parametrize("name", [name for name in OF_VALUES if "record" not in option_of("merge", name).elsewhere])
def test_what_decides_bytes_is_in_the_plan_and_the_record(name: str) -> None:
    """`stated` is what both hold, and what a plan is made again from."""
    option = option_of("merge", name)
    beside: dict[str, Any] = {"keep_touched": "Q8_0"} if name == "keep_below" else {}
    request: Any = MergeRequest("base", ["adapter"], **beside)
    value = other_than_default(option, default_of(MergeRequest._fields()[name]))
    object.__setattr__(request, name, value)
    assert request.stated() != MergeRequest("base", ["adapter"], **beside).stated()


def test_a_plan_is_made_again_from_what_it_states() -> None:
    given: dict[str, Any] = {
        "weights": [0.5, 2],
        "method": "ties",
        "parameters": {"density": 0.5},
        "quant": "Q4_K_M",
        "tensor_types": ["attn_v=Q8_0"],
        "as_trained": "nf4",
        "double_quant": True,
        "keep_touched": "Q8_0",
    }
    request = MergeRequest("base", ["a", "b"], "out.gguf", **given)
    again = MergeRequest.of_stated(request.stated(), base="base", adapters=["a", "b"], out="out.gguf")
    assert again == request


@pytest.mark.parametrize("verb", REQUESTS)
def test_the_reference_has_every_option(verb: str) -> None:
    import runpy

    page = runpy.run_path(str(Path(__file__).parents[2] / "tools/docs_site.py"))["cli_reference"]()
    section = page.partition(f"\n## {verb}\n")[2].partition("\n## ")[0]
    for name, option in REQUESTS[verb].options().items():
        if "cli" not in option.elsewhere and not (option.role == INPUT and not option.flag and not option.short):
            assert f"{option.flag or flag_of(name)}" in section, name


# ------------------------------------------------------------------ what means nothing is refused

NOTHING: dict[str, Callable[[Path], list[str]]] = {
    "merge": lambda at: ["merge", f"{at}/base", f"{at}/adapter", "-o", f"{at}/out", "--quant-dtype", "bf16"],
    "convert": lambda at: ["convert", f"{at}/adapter", "--to", "peft", "-o", f"{at}/out", "--pre", "llama-bpe"],
    "combine": lambda at: ["combine", f"{at}/adapter", "-o", f"{at}/out", "--density", "0.5"],
    "extract": lambda at: ["extract", f"{at}/base", f"{at}/base", "-o", f"{at}/out", "--density", "0.5"],
    "resize": lambda at: ["resize", f"{at}/adapter", "-o", f"{at}/out", "--exact"],
    "verify": lambda at: [
        *("verify", f"{at}/base", "--base", f"{at}/base", "--adapter", f"{at}/adapter"),
        *("--level", "tensors", "--max-kl", "1"),
    ],
    "register": lambda at: ["register", f"{at}/base", "--name", "base", "--kind", "base", "--link"],
    "check": lambda at: ["check", f"{at}/base", f"{at}/adapter", "--double-quant"],
    "evaluate": lambda at: ["evaluate", f"{at}/base", "--tasks", "none", "--null"],
}


@pytest.mark.parametrize("verb", NOTHING)
def test_an_option_that_means_nothing_is_refused(verb: str, tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    plain_adapter(tmp_path / "adapter", base)
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-m", "adapterkit", *NOTHING[verb](tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={"ADAPTERKIT_HOME": str(tmp_path / "home")}
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"quant_double": True}, "means nothing"),
        ({"double_quant": True}, "means nothing"),
        ({"quant_double": True, "quant": "Q4_K_M"}, "no nested scales"),
        ({"quant": "awq"}, "needs a calibration"),
        ({"weights": "0.5"}, "weights is '0.5'; give a number"),
        ({"jobs": 0}, "jobs is 0; give at least 1"),
        ({"jobs": 1.5}, "give a whole number"),
        ({"force": "yes"}, "give True or False"),
        ({"dtype": "fp16"}, "did you mean 'f16'"),
        ({"parameters": 3}, "give a mapping"),
        ({"quantt": "Q8_0"}, "did you mean 'quant'"),
        ({"density": 0.5}, "density"),
    ],
)
def test_python_is_told_what_the_command_line_is_told(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "adapter", base)
    with pytest.raises(UsageError, match=words):
        adapterkit.merge(base, adapter, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [str, Path])
def test_one_adapter_needs_no_list(make: Callable[[Path], Any], tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "adapter", base)
    one = adapterkit.merge(base, make(adapter), tmp_path / "one")
    several = adapterkit.merge(base, [make(adapter)], tmp_path / "several")
    assert one.touched == several.touched == 6
    assert adapterkit.check(base, make(adapter)).ok


@pytest.mark.parametrize("quant", ["Q8_0", "F16"])
def test_one_name_for_the_types_of_both_forms(quant: str) -> None:
    request = MergeRequest("base", ["a"], "out.gguf", quant=quant)
    assert request.gguf_types.mix == quant
    assert MergeRequest("base", ["a"], "out.gguf", quantization=quant) == request
    assert MergeRequest("base", ["a"], "out", quant="nf4").folder_format == "nf4"
    assert MergeRequest("base", ["a"], "out", quantization="nf4").folder_format == "nf4"
