"""Conditions on figures: what they say, when they hold, and that an alias moves only when they do."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from adapterkit.cli import app
from adapterkit.errors import CheckFailed, UsageError
from adapterkit.registry import bundle, fsck, policies, register, verbs
from adapterkit.registry.evaluation import Score
from adapterkit.registry.evidence import attach_evaluation, attach_evidence, attach_verification
from adapterkit.registry.figures import Figure
from adapterkit.registry.identity import Identity
from adapterkit.registry.policy import judge, parse_policy
from adapterkit.registry.verification import Verification

OWN = [
    Figure("tickets/acc", 0.7, "evaluation", n=500, stderr=0.02, when="2026-01-31T00:00:00Z"),
    Figure("tickets[lang=de]/acc", 0.6, "evaluation", slice="lang=de", n=120),
    Figure("tickets[lang=fr]/acc", 0.5, "evaluation", slice="lang=fr", n=30),
    Figure("gsm/exact_match:strict", 0.4, "evaluation"),
    Figure("verification.model", "held", "verification"),
    Figure("verification.model.kl", 0.002, "verification"),
    Figure("verification.tensors", "failed", "verification"),
    Figure("fidelity.retention", 0.996, "fidelity"),
]
OTHERS = {
    "base": [Figure("tickets/acc", 0.69, "evaluation", stderr=0.02)],
    "zeros": [Figure("tickets/acc", 0.69, "evaluation")],
    "shuffled": [Figure("tickets/acc", 0.2, "evaluation", stderr=0.02)],
    "current": [Figure("tickets/acc", 0.71, "evaluation", stderr=0.02)],
}


def held(text: str) -> bool:
    return all(verdict.held for verdict in judge(parse_policy(text), OWN, OTHERS))


@pytest.mark.parametrize("text", ["acc.n>=base", "acc.stderr>=zeros"])
def test_what_is_not_stated_of_the_other_does_not_hold(text: str) -> None:
    (verdict,) = judge(parse_policy(text), OWN[:1], OTHERS)
    assert not verdict.held
    assert "is not stated" in verdict.sentence


def sentences(text: str) -> str:
    return "; ".join(verdict.sentence for verdict in judge(parse_policy(text), OWN, OTHERS))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("acc>=0.7", True),
        ("acc>0.7", False),
        ("acc >= 70%", True),
        ("acc=0.7, kl<=0.02", True),
        ("acc!=0.7", False),
        ("tickets/acc>=0.7", True),
        ("exact_match>=0.3", True),
        ("gsm/exact_match:strict>=0.5", False),
        ("acc>=base+0.01", True),  # 0.69 + 0.01 is a little more than 0.7 in floats
        ("acc>=base - 0.01", True),
        ("acc>base+0.02", False),
        ("acc>base+1se", False),  # 0.01 against 0.0283
        ("acc>shuffled+2se", True),
        ("acc>=current-0.01", True),
        ("acc>=current", False),
        ("acc>zeros", True),
        ("acc[lang=de]>=0.6", True),
        ("tickets[lang=de]/acc>=0.61", False),
        ("acc[*]>=0.5", True),
        ("acc[*]>=0.55", False),
        ("acc.n>=500", True),
        ("acc[*].n>=100", False),
        ("acc.stderr<=0.02", True),
        ("verification.model=held", True),
        ("verification=held", False),  # one level did not hold
        ("verification.tensors!=held", True),
        ("kl<=1e-3", False),
        ("model.kl<=0.0020", True),
        ("retention>=0.9", True),
        ("fidelity.retention>=99.6%", True),
    ],
)
def test_a_condition(text: str, wanted: bool) -> None:
    assert held(text) is wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("f1>=0.5", "'f1' was never measured"),
        ("acc[lang=it]>=0.5", "'acc' for the slice lang=it was never measured"),
        ("kl>=base", "'verification.model.kl' was never measured of its base without it"),
        ("acc[lang=de]>=base", "'tickets[lang=de]/acc' was never measured of its base"),
        ("acc>zeros+1se", "the standard errors of tickets/acc are not both stated"),
        ("exact_match.n>=5", "the number of samples of gsm/exact_match:strict is not stated"),
        ("verification>=0.5", "verification.model is 'held' and no number"),
    ],
)
def test_what_is_not_known_does_not_hold(text: str, said: str) -> None:
    assert not held(text)
    assert said in sentences(text)


def test_figures_of_other_settings_are_not_compared() -> None:
    own = [Figure("gsm/acc", 0.7, "evaluation", settings={"num_fewshot": 0})]
    others = {"base": [Figure("gsm/acc", 0.5, "evaluation", settings={"num_fewshot": 5})]}
    (verdict,) = judge(parse_policy("acc>=base"), own, others)
    assert not verdict.held
    assert "measured with another num_fewshot" in verdict.sentence


def test_the_first_version_has_nothing_to_be_held_against() -> None:
    (verdict,) = judge(parse_policy("acc>=current"), OWN, {**OTHERS, "current": None})
    assert verdict.held


@pytest.mark.parametrize(
    "text", ["", "acc", "acc>=", ">=1", "acc>=high", "acc>=base*2", "acc=>1", "acc>=base-", "a b>=1", "acc>=1se"]
)
def test_what_is_no_policy(text: str) -> None:
    with pytest.raises(UsageError):
        parse_policy(text)


@pytest.fixture
def tickets(home: Path, make) -> Path:  # type: ignore[no-untyped-def]
    base = Identity("org/base", "a" * 40)
    register.register_base(base, "base")
    attach_evaluation("base", [Score("tickets", "acc", 0.6, 0.01, 500)])
    for number in range(2):
        register.register(make(content=b"weights %d" % number), "tickets", base=base)
    return home


def test_an_alias_moves_only_when_all_holds(tickets: Path) -> None:
    with pytest.raises(CheckFailed, match="'acc' was never measured"):
        verbs.tag("tickets@1", "prod", require="acc>=base-0.01")
    attach_evaluation("tickets@1", [Score("tickets", "acc", 0.5, 0.01, 500)])
    with pytest.raises(CheckFailed, match=r"acc is 0\.5 \(n 500\), not >= base 0\.6 \(n 500\) -0\.01"):
        verbs.tag("tickets@1", "prod", require="acc>=base-0.01")
    assert verbs.alias_now("tickets", "prod") is None
    attach_evaluation("tickets@2", [Score("tickets", "acc", 0.65, 0.01, 500)])
    found = verbs.tag(
        "tickets@2", "prod", require="acc>=base-0.01"
    )  # its evidence is on a later version of the same bytes
    assert found.held == ("tickets/acc is 0.65 (n 500), >= base 0.6 (n 500) -0.01",)
    assert verbs.history("tickets", "prod")[-1].held == found.held
    assert fsck.fsck().clean


def test_a_kept_policy_holds_for_everybody(tickets: Path, tmp_path: Path) -> None:
    policies.keep_policy("*", "prod", "verification=held", why="house rules")
    policies.keep_policy("tickets", "prod", "acc>=base")
    assert [one.text for one in policies.kept_policies("tickets", "prod")] == ["verification=held", "acc>=base"]
    attach_evaluation("tickets@2", [Score("tickets", "acc", 0.65)])
    with pytest.raises(CheckFailed, match="'verification' was never measured"):
        verbs.tag("tickets@2", "prod")
    verbs.tag("tickets@2", "staging")  # another alias
    attach_verification("tickets@2", [Verification("tensors", True, {})])
    assert len(verbs.tag("tickets@2", "prod").held) == 2
    bundle.export_bundle(("tickets@2",), tmp_path / "t.tar")
    policies.keep_policy("tickets", "prod", "", why="no base in this house")
    assert len(verbs.tag("tickets@2", "prod").held) == 1
    with pytest.raises(CheckFailed):
        verbs.tag("tickets@1", "prod")
    assert [one.text for one in policies.policy_history("tickets", "prod")] == ["acc>=base", ""]
    assert fsck.fsck().clean


def test_an_import_does_not_slip_past_a_policy(tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verbs.tag("tickets@1", "prod")
    bundle.export_bundle(("tickets@1",), tmp_path / "t.tar")
    other = tmp_path / "other"
    policies.keep_policy("*", "prod", "verification=held", home=other)
    assert bundle.import_bundle(tmp_path / "t.tar", aliases=True, home=other).aliases == ()
    third = tmp_path / "third"
    assert bundle.import_bundle(tmp_path / "t.tar", aliases=True, home=third).aliases == ("tickets@prod",)


def test_evidence_that_two_add_at_once_is_not_lost(tickets: Path) -> None:
    def add(number: int) -> None:
        attach_evidence("tickets@1", f"kind-{number}", {"x": number})

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(verbs.show("tickets").record.evidence) == {f"kind-{number}" for number in range(8)}


def test_the_command_line(tickets: Path, tmp_path: Path) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, arguments)
        if isinstance(result.exception, CheckFailed):
            assert code == result.exception.exit_code == 3
            return result.exception.message
        assert result.exit_code == code, result.output
        return result.output

    file = tmp_path / "results.json"
    file.write_text(json.dumps({"task": "tickets", "metrics": {"acc": 0.65}, "n": 500}))
    assert "tickets@3 carries 1 figures" in run("evidence", "add", "tickets@2", str(file))
    assert "tickets/acc 0.65 (n 500)" in run("evidence", "show", "tickets@2")
    assert "base: tickets/acc 0.6 ± 0.01 (n 500)" in run("evidence", "show", "tickets@2")
    gate = tmp_path / "gate.toml"
    gate.write_text('require = ["acc>=base", "acc.n>=100"]\n')
    assert "acc.n>=100" in run("policy", "tickets", "prod", "--require", str(gate), "--why", "rules of May")
    assert "may become prod; nothing was moved" in run("tag", "tickets@2", "prod", "--dry-run")
    assert "never measured" in run("tag", "tickets@1", "prod", code=3)
    assert "holds: tickets/acc is 0.65" in run("tag", "tickets@2", "prod", "--why", "first")
    run("policy", "tickets", "prod", "--clear")
    run("tag", "tickets@1", "prod")
    assert "is version 2, before at version 1" in run("tag", "tickets", "prod", "--rollback", "--why", "worse")
    history = run("tag", "tickets", "prod", "--history").splitlines()
    assert [line.split("  ")[1].partition(",")[0].partition(":")[0] for line in history] == [
        "version 2",
        "version 1 (from 2)",
        "version 2 (from 1) by rollback",
    ]
    assert ": worse" in history[2]
    assert "tickets/acc" in run("show", "tickets@3")
