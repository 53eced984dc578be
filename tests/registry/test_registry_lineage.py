"""Lineage by digests: over versions, names, homes, and parents that are not here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from adapterkit.errors import NotFound
from adapterkit.registry import register, verbs
from adapterkit.registry.identity import Identity
from adapterkit.registry.lineage import Lineage, lineage, mermaid, tree_text
from adapterkit.registry.record import Operation, Parent, Record

BASE = Identity("org/base", "b" * 40, skeleton="2" * 64, merkle="3" * 64)


@pytest.fixture
def chain(home: Path, make: Any) -> dict[str, Record]:
    """A base, two adapters on it, their combination, a merged model, and that quantized."""
    found = {"base": register.register_base(BASE, "base").record}
    for name in ("math", "code"):
        found[name] = register.register(make(name, name.encode()), name, base=BASE).record

    def made(
        name: str, kind: str, operation: Operation, *parents: tuple[str, str, dict[str, Any]], **fields: Any
    ) -> None:
        named = [Parent(role, found[key].content, record=found[key].digest, label=found[key].ref, parameters=more)
                 for role, key, more in parents]  # fmt: skip
        found[name] = register.register(
            make(name, name.encode()), name, kind=kind, operation=operation, parents=named, **fields
        ).record

    made(
        "both", "combined", Operation("combine", {"method": "ties", "density": 0.5}),
        ("adapter", "math", {"weight": 0.7}), ("adapter", "code", {"weight": 0.3}), base=BASE,
    )  # fmt: skip
    made(
        "chat",
        "merged",
        Operation("merge", {"dtype": "bf16"}),
        ("base", "base", {}),
        ("adapter", "both", {"weight": 1.0}),
    )
    made("chat-q4", "quantized", Operation("convert", {"quant": "Q4_K_M"}), ("source", "chat", {}))
    return found


def edges(found: Lineage) -> set[tuple[str, str, str]]:
    label = {node.key: node.label for node in found.nodes}
    return {(label[edge.parent], label[edge.child], edge.operation) for edge in found.edges}


UP = {
    ("chat@1", "chat-q4@1", "convert"),
    ("base@1", "chat@1", "merge"),
    ("both@1", "chat@1", "merge"),
    ("math@1", "both@1", "combine"),
    ("code@1", "both@1", "combine"),
    ("base@1", "math@1", ""),
    ("base@1", "code@1", ""),
}


def test_everything_a_version_was_made_from(chain: dict[str, Record]) -> None:
    assert edges(lineage("chat-q4")) == UP
    assert edges(lineage("chat-q4", up=False)) == set()


def test_everything_that_was_made_of_a_version(chain: dict[str, Record]) -> None:
    down = lineage("math", up=False)
    assert edges(down) == {
        ("math@1", "both@1", "combine"),
        ("both@1", "chat@1", "merge"),
        ("chat@1", "chat-q4@1", "convert"),
    }
    assert edges(lineage("base")) == UP


def test_an_edge_carries_the_operation_and_all_its_parameters(chain: dict[str, Record]) -> None:
    found = lineage("both")
    (edge,) = [edge for edge in found.edges if edge.parent == chain["math"].content]
    assert dict(edge.parameters) == {"method": "ties", "density": 0.5, "weight": 0.7}
    (edge,) = [edge for edge in found.edges if edge.child == chain["chat"].content]
    assert dict(edge.parameters) == {"dtype": "bf16", "weight": 1.0}


def test_json_is_plain_and_names_every_node(chain: dict[str, Record]) -> None:
    found = json.loads(json.dumps(lineage("chat").to_json()))
    keys = {node["key"] for node in found["nodes"]}
    assert found["root"] == chain["chat"].content
    assert all(edge["parent"] in keys and edge["child"] in keys for edge in found["edges"])


def test_the_tree_on_a_terminal(chain: dict[str, Record]) -> None:
    verbs.tag("chat@1", "prod")
    text = re.sub(r"sha256:[0-9a-f]{12}", "#", tree_text(lineage("chat")))
    assert text == (
        "chat@1  merged  lora  #  [prod]\n"
        "\n"
        "made from\n"
        "├─ base: base@1  base  #\n"
        "└─ adapter: both@1  combined  lora  #\n"
        "   ├─ adapter: math@1  adapter  lora  #\n"
        "   │  └─ base: base@1  base  #\n"
        "   └─ adapter: code@1  adapter  lora  #\n"
        "      └─ base: base@1  base  #\n"
        "\n"
        "made of it\n"
        "└─ convert: chat-q4@1  quantized  lora  #\n"
    )
    assert tree_text(lineage("chat"), ascii_only=True).isascii()


def test_mermaid_draws_every_node_and_edge(chain: dict[str, Record]) -> None:
    found = lineage("chat")
    text = mermaid(found)
    assert text.startswith("flowchart TD\n")
    assert len(re.findall(r"^  n\d+\[", text, re.MULTILINE)) == len(found.nodes)
    assert len(re.findall(r"^  n\d+ -->", text, re.MULTILINE)) == len(found.edges)


def test_a_parent_that_is_not_registered_here_keeps_its_label(home: Path, make: Any) -> None:
    parents = [
        Parent("adapter", "9" * 64, label="elsewhere@4"),
        Parent("base", identity=Identity("org/unknown", "d" * 40)),
    ]
    register.register(make(), "chat", kind="merged", operation=Operation("merge"), parents=parents)
    text = tree_text(lineage("chat"))
    assert "adapter: elsewhere@4  not registered here" in text
    assert "base: org/unknown@ddddddd  base  not registered here" in text
    assert "org/unknown" in mermaid(lineage("chat"))


def test_a_parent_is_found_under_another_name_and_version(chain: dict[str, Record], make: Any, tmp_path: Path) -> None:
    """Content names a parent, so a version with a new card and evidence is still the parent of what was made before."""
    folder = make("math", b"math")
    (folder / "README.md").write_text("a card")
    register.register(folder, "math-renamed", base=BASE, evidence={"fidelity": {"kl": 0.0}})
    down = edges(lineage("math-renamed", up=False))
    assert ("math-renamed@1", "both@1", "combine") in down


def test_a_base_is_recognized_by_its_weights_under_another_id(chain: dict[str, Record], make: Any) -> None:
    mirror = Identity("mirror/base", "e" * 40, merkle="3" * 64)
    register.register(make("late", b"late"), "late", base=mirror)
    assert edges(lineage("late")) == {("base@1", "late@1", "")}
    assert ("base@1", "late@1", "") in edges(lineage("base"))
    stranger = Identity("org/base-instruct", "e" * 40, skeleton="2" * 64, merkle="4" * 64)
    register.register(make("other", b"other"), "other", base=stranger)
    assert edges(lineage("other")) == {("org/base-instruct@eeeeeee", "other@1", "")}


def test_loops_end(home: Path, make: Any) -> None:
    """A merge that changed nothing has the content of its parent; a conversion there and back makes a ring."""
    one = register.register(make("a", b"a"), "a").record
    register.register(
        make("a", b"a"), "same", kind="merged", operation=Operation("merge"), parents=[Parent("x", one.content)]
    )
    two = register.register(
        make("b", b"b"), "b", operation=Operation("convert"), parents=[Parent("source", one.content)]
    ).record
    register.register(make("a", b"a"), "back", operation=Operation("convert"), parents=[Parent("source", two.content)])
    for ref in ("a", "same", "b", "back"):
        assert tree_text(lineage(ref)).count("\n") < 20


def test_deep_chains_do_not_overflow(home: Path, make: Any) -> None:
    parent = register.register(make(content=b"0"), "v").record
    for number in range(1, 120):
        parents = [Parent("source", parent.content)]
        parent = register.register(
            make(content=b"%d" % number), "v", operation=Operation("resize"), parents=parents
        ).record
    assert len(lineage("v").nodes) == 121  # And the base that all of them name.
    assert tree_text(lineage("v@1")).count("\n") > 120


def test_removed_and_damaged_versions_take_part_as_far_as_they_can(chain: dict[str, Record], home: Path) -> None:
    verbs.remove("both@1")
    assert "both@1  combined  lora" in tree_text(lineage("chat"))
    assert "removed" in tree_text(lineage("chat"))
    (home / "records/math/1.json").write_bytes(b"rotten")
    assert ("base@1", "chat@1", "merge") in edges(lineage("chat"))
    with pytest.raises(NotFound):
        lineage("nothing")


def test_control_characters_do_not_reach_a_terminal_or_a_graph(home: Path, make: Any) -> None:
    parents = [Parent("base", "9" * 64, label='x"]; click n0 "javascript:alert(1)"')]
    register.register(make(), "a", kind="merged", parents=parents)
    assert '"]; click' not in mermaid(lineage("a"))
    assert "\x1b" not in tree_text(lineage("a"))
