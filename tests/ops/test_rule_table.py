from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from adapters import adapter, adapters

from adapterkit.errors import AdapterError, UsageError
from adapterkit.ops.lowrank import Factors
from adapterkit.ops.rows import Dense, materialize
from adapterkit.ops.rules import RULES, CombinationRule, Parameter, combine, find

EVERY = sorted(RULES)
SETTINGS = [(m, p) for m in RULES.values() for p in m.parameters]
NAMES = [f"{m.name}.{p.name}" for m, p in SETTINGS]

IDENTITY = {
    "linear": {},
    "cat": {},
    "svd": {},
    "ties": {"density": 1.0},
    "ties-peft": {"density": 1.0},
    "dare": {"density": 1.0},
    "dare-ties": {"density": 1.0},
    "magnitude-prune": {"density": 1.0},
    "della": {"density": 1.0},
    "breadcrumbs": {"density": 1.0, "gamma": 0.0},
    "breadcrumbs-ties": {"density": 1.0, "gamma": 0.0},
    "multislerp": {},
    "karcher": {},
    "sce": {"density": 0.1},
    "knots": {"density": 1.0},
    "core": {"density": 1.0},
    "ctm": {"density": 1.0},
    "tsv": {},
    "lego": {},
    "model-stock": {},
}
"""Settings under which the definition of a method gives one adapter back; Iso-C and Iso-CTS flatten even one."""

PAIRS = {"slerp", "nuslerp"}
"""Methods that go between two adapters."""

BASED = {
    *("slerp-weights", "arcee-fusion", "nearswap", "ram", "ramplus-tl"),
    *("nuslerp-weights", "multislerp-weights", "karcher-weights"),
}
"""Methods between the base and models, of which one is not given back whole; see `test_based`."""

ONE = {"slerp-weights", "arcee-fusion", "nearswap", "nuslerp-weights"}
"""Methods that take one adapter or model."""

BASE = Dense(torch.randn(24, 19, generator=torch.Generator().manual_seed(9)))


def taken(name: str) -> slice:
    """As many adapters as a method takes, of three."""
    return slice(1 if name in ONE else 2 if name in PAIRS else 3)


def told(name: str) -> dict[str, Dense]:
    return {"base": BASE} if RULES[name].based else {}


TOLD = {"ties", "ties-peft", "multislerp", "karcher"}
"""Methods whose default depends on the weights themselves."""

SPHERICAL = ["nuslerp", "multislerp", "karcher", "nuslerp-weights", "multislerp-weights", "karcher-weights"]


@pytest.mark.parametrize("name", SPHERICAL)
def test_weights_that_no_adapter_changes_stay(name: str) -> None:
    """Zeros have no direction: they are nobody's opposite."""
    zeros = [Dense(torch.zeros(24, 19))] * 3
    assert not materialize(combine(zeros[taken(name)], name, **told(name))).any()


SYMMETRIC = [
    "linear", "ties-peft", "breadcrumbs-ties",
    "cat", "svd", "ties", "magnitude-prune", "breadcrumbs", "sce", "knots", "core", "ctm", "tsv", "iso-c",
    "iso-cts", "model-stock",
]  # fmt: skip
"""Methods whose definition does not number the adapters; the random ones draw a mask for each number."""


def test_the_methods_of_the_issue_are_there() -> None:
    assert set(IDENTITY) | {"iso-c", "iso-cts"} | PAIRS | BASED == set(RULES)


@pytest.mark.parametrize("name", IDENTITY)
def test_one_adapter_with_weight_one_is_itself(name: str) -> None:
    for part in (adapter(24, 19, 5, 1), adapter(6, 8, 11, 2)):
        found = materialize(combine([part], name, weights=[1.0], **IDENTITY[name]))
        expected = materialize(part)
        assert float((found - expected).norm()) <= 2e-6 * float(expected.norm())


@pytest.mark.parametrize("name", SYMMETRIC)
def test_the_order_of_the_adapters_does_not_matter(name: str) -> None:
    parts = adapters(24, 19, 5, 3, 4)
    weights = [1.0, 0.5, -0.8]
    there = materialize(combine(parts, name, weights=weights))
    back = materialize(combine(parts[::-1], name, weights=weights[::-1]))
    assert float((there - back).norm()) <= 1e-5 * float(there.norm())


@pytest.mark.parametrize("name", EVERY)
def test_every_method_runs_as_it_comes(name: str) -> None:
    parts = adapters(24, 19, 5, 3, 4)[taken(name)]
    found = combine(parts, name, key="w", **told(name))
    assert found.shape == (24, 19)
    assert torch.isfinite(materialize(found)).all()
    assert isinstance(found, Factors) == (RULES[name].space != "dense")
    assert torch.equal(materialize(found), materialize(combine(parts, name, key="w", **told(name))))


@pytest.mark.parametrize("name", [m.name for m in RULES.values() if m.space != "dense"])
def test_no_bit_of_a_factor_depends_on_the_threads(name: str) -> None:
    parts = adapters(700, 900, 24, 24, 24)[taken(name)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            result = combine(parts, name, key="w")
            assert isinstance(result, Factors)
            assert torch.get_num_threads() == threads
            found.append(result)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].b, found[1].b)
    assert torch.equal(found[0].a, found[1].a)


@pytest.mark.parametrize("name", EVERY)
def test_every_method_gives_the_rank_asked_for(name: str) -> None:
    found = combine(adapters(24, 19, 5, 3, 4)[taken(name)], name, rank=3, **told(name))
    assert isinstance(found, Factors)
    assert found.rank <= 3


@pytest.mark.parametrize("name", [name for name in EVERY if name not in PAIRS | ONE and not RULES[name].weighted])
def test_weights_come_before_the_rule_and_scale_after(name: str) -> None:
    """Those left out are told the weights, and do more with them."""
    parts = adapters(24, 19, 5, 3)
    rule = {"rule": "sce"} if RULES[name].nested else {}
    expected = materialize(combine([parts[0].scaled(2.0), parts[1].scaled(-0.5)], name, **rule))
    found = materialize(combine(parts, name, weights=[2.0, -0.5], scale=0.25, **rule))
    assert torch.allclose(found, 0.25 * expected, atol=1e-5)
    dropped = materialize(combine([*parts, adapter(24, 19, 2, 99)], name, weights=[2.0, -0.5, 0.0], **rule))
    assert torch.allclose(dropped, expected, atol=1e-5)


@pytest.mark.parametrize(("method", "parameter"), SETTINGS, ids=NAMES)
def test_values_out_of_range_are_refused(method: CombinationRule, parameter: Parameter) -> None:
    bad: list[object] = ["sideways", [], 1j]
    if parameter.type is float:
        bad += [float("nan"), True]
    if parameter.type is int:
        bad += [0.5, True]
    if not parameter.optional:
        bad.append(None)
    if (limits := parameter.range) is not None:
        if limits.low is not None:
            bad += [limits.low - 1] + [limits.low] * limits.open_low
        if limits.high is not None:
            bad.append(limits.high + 1)
    for value in bad:
        with pytest.raises(UsageError, match=rf"^{parameter.name} of method {method.name} must be ") as caught:
            combine(adapters(8, 7, 2, 2), method.name, **{parameter.name: value})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("method", "parameter"), SETTINGS, ids=NAMES)
def test_the_ends_of_each_range_are_in_it(method: CombinationRule, parameter: Parameter) -> None:
    assert parameter.check(parameter.default, method.name) == parameter.default
    if (limits := parameter.range) is not None:
        if limits.low is not None and not limits.open_low:
            assert parameter.check(parameter.type(limits.low), method.name) == limits.low
        if limits.high is not None:
            assert parameter.check(parameter.type(limits.high), method.name) == limits.high
    for choice in parameter.choices:
        assert parameter.check(choice, method.name) == choice


@pytest.mark.parametrize("name", EVERY)
def test_the_row_of_a_method(name: str) -> None:
    row = RULES[name]
    assert 20 < len(row.summary) <= 110
    assert row.summary.endswith(".")
    assert row.space in ("factors", "core", "dense")
    assert row.url == (f"https://arxiv.org/abs/{row.paper}" if row.paper else "")
    for parameter in row.parameters:
        assert parameter.help
        assert parameter.option == "--" + parameter.name.replace("_", "-")
        assert parameter.type in (float, int, bool, str)


def test_what_is_not_in_the_table() -> None:
    with pytest.raises(UsageError, match="there is no combination method 'average'"):
        combine(adapters(8, 7, 2), "average")
    with pytest.raises(UsageError, match="method ties has no parameter seed; it takes density, majority"):
        combine(adapters(8, 7, 2), "ties", seed=1)
    with pytest.raises(UsageError, match="method cat has no parameter density; it takes no parameters"):
        combine(adapters(8, 7, 2), "cat", density=0.5)
    assert find("dare_ties") is RULES["dare-ties"]


def test_weights_that_make_no_sense() -> None:
    parts = adapters(8, 7, 2, 2)
    with pytest.raises(UsageError, match="1 weight was given for 2 adapters"):
        combine(parts, weights=[1.0])
    with pytest.raises(UsageError, match="every weight is 0"):
        combine(parts, weights=[0.0, 0.0])
    with pytest.raises(UsageError, match="weight must be a finite number, got nan"):
        combine(parts, weights=[1.0, float("nan")])
    with pytest.raises(UsageError, match="scale must be a finite number, got inf"):
        combine(parts, scale=float("inf"))


def test_deltas_that_cannot_be_combined() -> None:
    with pytest.raises(AdapterError, match=r"different shapes \(\[8, 7\], \[9, 7\]\)"):
        combine([adapter(8, 7, 2, 0), adapter(9, 7, 2, 0)])
    with pytest.raises(AdapterError, match="no delta"):
        combine([])
    with pytest.raises(UsageError, match="method tsv combines low-rank factors only"):
        combine([Dense(torch.ones(3, 3))], "tsv")


def test_the_table_is_read_without_torch() -> None:
    program = (
        "import sys; from adapterkit.ops.rules import RULES; "
        "assert RULES['ties'].parameters[0].default == 0.2; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
