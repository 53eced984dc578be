"""``python -m bench KIND NAME [ARGUMENTS]``: one runner for all scripts; without a name it lists them."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

KINDS = ("speed", "proofs", "studies")
HERE = Path(__file__).parent


def scripts(kind: str) -> dict[str, str]:
    """The scripts of a kind that can be run, with the first line of what they say of themselves."""
    found = {}
    for path in sorted((HERE / kind).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "__main__" in text and not path.name.startswith("_"):
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
    return found


def main() -> None:
    kind, *rest = sys.argv[1:] or [""]
    if kind not in KINDS or not rest or rest[0] not in scripts(kind):
        print("usage: python -m bench KIND NAME [ARGUMENTS]")
        for one in (kind,) if kind in KINDS else KINDS:
            print(f"\n{one}:")
            for name, line in scripts(one).items():
                print(f"  {name:<16} {line}")
        sys.exit(0 if kind in ("", "-h", "--help") else 2)
    sys.argv[1:] = rest[1:]
    runpy.run_module(f"bench.{kind}.{rest[0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
