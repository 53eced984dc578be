"""``python -m bench [--save RESULT] KIND NAME [ARGUMENTS]``: one runner for all scripts; without a name it lists them.

With ``--save`` what was measured is stored in ``bench/results/RESULT.json``, from which the pages take their figures, or in a
file ``RESULT`` that ends in .json. ``$NAME`` in an argument is taken from the environment, and stored as it is written.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import runpy
import sys
from pathlib import Path
from typing import TextIO

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
    words = sys.argv[1:]
    name = ""
    if words[:1] == ["--save"] and len(words) > 1:
        name, words = words[1], words[2:]
    kind, *rest = words or [""]
    if kind not in KINDS or not rest or rest[0] not in scripts(kind):
        print("usage: python -m bench [--save RESULT] KIND NAME [ARGUMENTS]")
        for one in (kind,) if kind in KINDS else KINDS:
            print(f"\n{one}:")
            for name, line in scripts(one).items():
                print(f"  {name:<16} {line}")
        sys.exit(0 if kind in ("", "-h", "--help") else 2)
    sys.argv[1:] = map(os.path.expandvars, rest[1:])
    module = f"bench.{kind}.{rest[0]}"
    if not name:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    from bench.common import results

    told = Tee(sys.stdout)
    code: object = 0
    with contextlib.redirect_stdout(told):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    if code:  # what did not hold is no result
        sys.exit(f"not stored: {module} ended with {code}")
    command = " ".join(["python", "-m", "bench", kind, *rest])
    print(f"stored in {results.save(name, f'{kind} {rest[0]}', command, told.getvalue())}")


class Tee(io.StringIO):
    """Keeps what is printed, and prints it."""

    def __init__(self, shown: TextIO) -> None:
        super().__init__()
        self._shown = shown

    def write(self, text: str) -> int:
        self._shown.write(text)
        self._shown.flush()
        return super().write(text)


if __name__ == "__main__":
    main()
