"""``docs/methods.md`` is what the registrations say."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_up_to_date() -> None:
    from bench.proofs import methods

    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert methods.registry_table() in page, "run `python -m bench proofs methods --write`"
    assert methods.refused_table() in page, "run `python -m bench proofs methods --write`"
    for case in methods.cases():
        assert f"| {case.config().peft_type.value} | {case.kind} |" in page, (
            "run `python -m bench proofs methods --write`"
        )
