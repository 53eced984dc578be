"""Run a page's commands for real and write what they print below them.

    python tools/transcript.py         # docs/tutorials/first-half-hour.md

Of such a page each ``sh`` fence is followed by a ``text`` fence with its output. The commands run as `tests/site` runs them, in
an empty folder, with a registry of its own. Servers are the tests' stand-ins: an OCI registry in memory on
127.0.0.1:5000, and a vLLM that serves ``demo/base`` as http://gpu1:8000.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, *(ROOT / "tests" / name for name in ("site", "oci", "serving"))):
    sys.path.insert(0, str(folder))

import pytest  # noqa: E402
from memory_registry import answer_in_memory  # noqa: E402
from pages import Block, Shell, blocks, commands  # noqa: E402
from stub_servers import Stub, running  # noqa: E402

PAGE = ROOT / "docs" / "tutorials" / "first-half-hour.md"
BASE = "demo/base"
SHOWN = re.compile(r"(```sh\n(.*?)```\n)(\n```text\n.*?```\n)?", re.DOTALL)


def written(page: str, shell: Shell) -> str:
    """The page with the output of each of its commands.

    Raises:
        AssertionError: a command failed.
    """

    def shown(match: re.Match[str]) -> str:
        block = Block("sh", "", match[2], page.count("\n", 0, match.start()) + 2)
        printed = "".join(shell.output(block, line, command) for line, command in commands(block))
        if re.search("^adapterkit ", printed, re.MULTILINE):  # commands that are told, and not run by the reader
            printed = f"$ {match[2]}{printed}"
        return f"{match[1]}\n```text\n{printed}```\n"

    return SHOWN.sub(shown, page)


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    patch = pytest.MonkeyPatch()
    with tempfile.TemporaryDirectory() as folder, running(Stub("vllm", BASE)) as stub:
        patch.chdir(folder)
        patch.setenv("ADAPTERKIT_HOME", os.path.join(folder, "home"))
        patch.setenv("LOGNAME", "you")
        patch.setenv("http_proxy", stub.url)
        patch.setenv("no_proxy", "127.0.0.1,localhost")
        answer_in_memory("127.0.0.1:5000", patch)
        try:
            new = written(page, Shell(Path(folder), PAGE.name, together=True))
        finally:
            patch.undo()
        if folder in new:
            print(f"{PAGE.name}: a path of this machine is in it", file=sys.stderr)
            return 1
    PAGE.write_text(new, encoding="utf-8")
    print(f"{len(blocks(new))} blocks of {PAGE.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
