"""What the pages say: what is deployed, two versions side by side, figures, cards, the way to what is deployed."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import plain_adapter, plain_base

import adapterkit
from adapterkit.errors import RegistryError
from adapterkit.provenance.register import register
from adapterkit.registry import index, served, verbs
from adapterkit.registry.evaluation import Score
from adapterkit.registry.evidence import attach_evaluation, attach_evidence, attach_verification
from adapterkit.registry.home import Home
from adapterkit.registry.lineage import lineage
from adapterkit.registry.store import add_record
from adapterkit.registry.verification import Verification, evidence_of, lines
from adapterkit.ui import board
from adapterkit.ui.card import blocks
from adapterkit.ui.graph import deployed_path
from adapterkit.ui.markup import render
from adapterkit.ui.overview import Query, overview
from adapterkit.ui.words import sentences

Serve = Callable[[], str]


def text_of(url: str) -> str:
    with urllib.request.urlopen(url, timeout=900) as answer:
        page = answer.read().decode()
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


@pytest.fixture
def tone(home: Path, tmp_path: Path) -> Path:
    """Two versions of an adapter; the first is prod, by ada."""
    base = plain_base(tmp_path / "base")
    register(base, "house", kind="base")
    for seed, rank in ((1, 4), (2, 8)):
        register(plain_adapter(tmp_path / f"adapter-{seed}", base, seed=seed, rank=rank), "tone", base=base, scan=True)
    verbs.tag("tone@1", "prod", by="ada", why="first release")
    return home


def test_what_is_deployed_comes_first(tone: Path, serve: Serve) -> None:
    attach_evaluation("tone@1", [Score("tickets", "acc", 0.71, 0.02, 500, when="2026-05-02T10:00:00Z"),
                                 Score("tickets", "acc", 0.69, 0.02, 500, subject="base")])  # fmt: skip
    attach_verification(
        "tone@1", [Verification("model", True, {"kl": 0.0008, "top1": 0.9975, "tokens": 4096}, {"max_kl": 0.005})]
    )
    said = text_of(serve() + "/")
    assert said.index("Deployed now") < said.index("Adapters")
    assert "tone@prod is version 1" in said
    assert ", by ada" in said
    assert ": first release" in said
    assert "on house" in said
    assert "tickets/acc 0.71 ± 0.02 over 500 samples (base 0.69); 2026-05-02" in said
    assert "same likeliest token for 99.75% of 4,096 tokens, KL 0.0008 (limit 0.005)" in said
    assert "No server is known to serve it." in said
    served.record_serving("gpu-3", verbs.show("tone@1").record, served_as="t", alias="prod", share=0.1, by="eve")
    said = text_of(serve() + "/")
    assert "gpu-3 serves it, 10% of requests, since" in said
    verbs.tag("tone@2", "prod")
    said = text_of(serve() + "/deployed")
    assert "gpu-3 serves version 1, 10% of requests, since" in said
    assert "the alias has moved on" in said
    assert "Nothing was measured of it." in said


def test_what_is_asked_for_hides_the_board(tone: Path, serve: Serve) -> None:
    assert "Deployed now" not in text_of(serve() + "/?q=tone")
    assert "No alias points anywhere" not in text_of(serve() + "/deployed")
    verbs.untag("tone", "prod")
    assert "No alias points anywhere" in text_of(serve() + "/deployed")


def test_a_server_without_an_alias_is_told(tone: Path, serve: Serve) -> None:
    served.record_serving("gpu-3", verbs.show("tone@2").record, served_as="t")
    assert "No alias says so." in text_of(serve() + "/")


def test_two_versions(tone: Path, serve: Serve) -> None:
    attach_evaluation("tone@2", [Score("tickets", "acc", 0.75, 0.02, 500)])
    said = text_of(serve() + "/compare?a=tone@1&b=tone@2")
    assert re.search(r"r differs 4 8 ", said)
    assert re.search(r"tickets/acc differs – 0\.75 ± 0\.02 \(n 500\)", said)
    assert "model.layers.0.self_attn.q_proj" in said
    assert "rank 4" in said
    assert "rank 8" in said
    with pytest.raises(urllib.error.HTTPError, match="404"):
        text_of(serve() + "/compare?a=tone@1&b=tone@9")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        text_of(serve() + "/compare?a=tone@1")


def test_the_change_by_layer_without_a_scan(tone: Path, serve: Serve) -> None:
    for path in (tone / "scans").iterdir():
        path.unlink()
    assert "Nobody looked into one of them" in text_of(serve() + "/compare?a=tone@1&b=tone@2")
    from adapterkit.registry.checkout import checkout

    for version in (1, 2):
        checkout(f"tone@{version}")
    assert "rank 8" in text_of(serve() + "/compare?a=tone@1&b=tone@2")
    assert list((tone / "scans").iterdir()) == []  # a page writes nothing


def test_figures_filter_and_sort(tone: Path, tmp_path: Path, serve: Serve) -> None:
    for name, value in (("low", 0.2), ("high", 0.9), ("middle", 0.5)):
        register(plain_adapter(tmp_path / name, tmp_path / "base", seed=int(value * 10)), name)
        attach_evaluation(name, [Score("tickets", "acc", value)])

    def names(**asked: str) -> list[str]:
        found = overview(Query(figure="tickets/acc", **asked))
        return [entry.row.name for group in found.groups for entry in group.entries]

    assert names(sort="high") == ["high", "middle", "low"]
    assert names(sort="low", least="0.3") == ["middle", "high"]
    assert names(most="0.5", sort="low") == ["low", "middle"]
    assert names(least="nan") == ["high", "low", "middle"]
    assert set(overview(Query()).figures) == {"tickets/acc"}
    said = text_of(serve() + "/?figure=tickets/acc&sort=high&least=x")
    assert "0.9" in said
    assert "Nothing fits" in text_of(serve() + "/?figure=nothing")


def test_the_way_to_what_is_deployed(tone: Path, tmp_path: Path, serve: Serve) -> None:
    adapterkit.merge(tmp_path / "base", ["tone@2"], tmp_path / "out")
    register(tmp_path / "out", "desk")
    family = lineage("tone@2")
    assert deployed_path(family) == set()
    verbs.tag("desk", "prod")
    family = lineage("tone@2")
    contents = {verbs.show(name).record.content for name in ("house", "tone@2", "desk")}
    assert deployed_path(family) == contents
    with urllib.request.urlopen(serve() + "/v/tone/2", timeout=900) as answer:
        page = answer.read().decode()
    assert page.count("node lit") + page.count("node root lit") == 3
    assert "Thick lines lead to what an alias points to." in page


def test_a_card(tone: Path, tmp_path: Path, serve: Serve) -> None:
    assert "push would write this one" in text_of(serve() + "/v/tone/1")
    folder = plain_adapter(tmp_path / "carded", tmp_path / "base", seed=9)
    (folder / "README.md").write_text(
        "---\nlicense: mit\n---\n# Tone\n\n<script>x</script> **bold** [here](http://x)\n"
    )
    register(folder, "carded")
    with urllib.request.urlopen(serve() + "/v/carded/1", timeout=900) as answer:
        page = answer.read().decode()
    assert "&lt;script&gt;x&lt;/script&gt; bold here (http://x)" in page
    assert "<script>x" not in page
    assert "It comes with the version." in page
    text = "# A\n\n- one\n- two\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```sh\nls\n```\nend"
    assert render(list(blocks(text))).startswith("<h3>A</h3><ul><li>one</li><li>two</li></ul>")


def test_evidence_of_another_shape_does_not_hide_the_rest(tone: Path, tmp_path: Path, serve: Serve) -> None:
    """A record from elsewhere states what no record of ours does: the pages say so, and show everything else."""
    with pytest.raises(RegistryError, match="does not hold exactly"):
        attach_evidence("tone@1", "evaluation", {"acc": {"value": 1}})
    found = verbs.show("tone@1").record
    odd = Verification("model", True, {"top1": 0.5, "tokens": "many", "kl": "little"})
    evidence = {"evaluation": {"<b>": {"value": 1}}, "verification": evidence_of([odd])}
    add_record(Home(tone), replace(found, name="", version=0, evidence=evidence), "other")
    verbs.tag("other@1", "prod")
    url = serve()
    for page in ("/", "/deployed", "/v/other/1", "/compare?a=tone@1&b=other@1"):
        said = text_of(url + page)
        assert "other@1" in said or "other@prod" in said
        assert "does not hold exactly" in said
    assert ("evaluation", True) in [(kind, "exactly" in text) for kind, text in lines(evidence)]


def test_words_have_denominators() -> None:
    level = Verification(
        "tensors", True, {"equal": 21, "off": 3, "touched": 12, "retention": 0.5}, {}, "2026-01-31T23:59:59Z"
    )
    (said,) = sentences({"verification": {"tensors": level.to_json()}})
    assert said.text == "every tensor recomputed: 21 of 24 byte for byte, 50.00% of the change is there; 2026-01-31"


def test_a_page_of_aliases_asks_the_index_a_fixed_number_of_times(tone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> int:
        count, ask = [0], index.ask

        def counted(*given: Any) -> Any:
            count[0] += 1
            return ask(*given)

        with monkeypatch.context() as patch:
            patch.setattr(index, "ask", counted)
            assert board.board(size=100).rows
        return count[0]

    before = asked()
    for number in range(5):
        verbs.tag("tone@1", f"alias-{number}")
    assert asked() == before
