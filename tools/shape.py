"""The shape of the code in figures, and why functions that take more than six values do: for docs/architecture.md.

    python tools/shape.py            # print them
    python tools/shape.py --write    # write them into the page

``tests/test_shape.py`` holds the page to this, and fails for a long signature that has no reason here.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "adapterkit"
PAGE = ROOT / "docs/architecture.md"
MOST = 6

# Why they take so many, and which: ``file:function`` below adapterkit/.
REASONS: dict[str, tuple[str, ...]] = {
    "a command of click: one parameter for each option, by name": (
        *("cli/aliases.py:policy", "cli/aliases.py:tag", "cli/build.py:command", "cli/deploy.py:command"),
        *("cli/execute.py:command", "cli/imatrix.py:command", "cli/records.py:list_"),
    ),
    "a function of the Python API: keywords with defaults, which callers give by name": (
        *("adapters/fold.py:fold", "hub/push.py:push", "oci/push.py:push_oci", "ops/rules/combine.py:combine"),
        *("recipe/run.py:build", "registry/listing.py:listing", "registry/verbs.py:tag", "verbs/combine.py:combined"),
        *(
            "verbs/deploy.py:add_server",
            "verbs/deploy.py:deploy",
            "verbs/execute.py:execute",
        ),
        "verbs/imatrix.py:imatrix",
        "integrations/transformers.py:RegisterCallback.__init__",
    ),
    "writes outputs abreast: how, in keywords with defaults, which callers give by name": (
        *("checkpoint/parts.py:finish_parts", "checkpoint/write.py:write_together"),
    ),
    "writes one record or line: each parameter is a field of it, given by name": (
        *("provenance/record.py:recorder", "registry/refs.py:move"),
        *("registry/register.py:register", "registry/register.py:register_base", "registry/served.py:record_serving"),
    ),
    "a kernel that is compiled: it takes arrays and numbers, and no values of ours": (
        *(
            "gguf/kernels/compiled.py:_encode",
            "gguf/kernels/search.py:_grid_error",
            "gguf/kernels/search.py:_grid_sums",
        ),
        *("gguf/kernels/search.py:_symmetric_sums", "gguf/kernels/search.py:grid", "gguf/kernels/search.py:symmetric"),
        *(
            "gguf/kernels/simd.py:_transpose",
            "gguf/kernels/superblocks.py:_six_bit_given",
            "gguf/kernels/wide.py:grid_error",
        ),
        *("gguf/kernels/wide.py:grid_sums", "gguf/kernels/wide.py:symmetric_sums"),
    ),
    "a formula with its parameters, by their names in the paper or the format": (
        *("adapters/merged.py:_add", "adapters/merged.py:_add_transposed"),
        *(
            "codecs/compressed.py:_new",
            "codecs/gptq.py:_weight",
            "codecs/hqq.py:Hqq.__init__",
            "codecs/hqq.py:_decoder",
        ),
        *("codecs/mlx.py:_weight", "gguf/mixes.py:choose_types", "ops/rules/elementwise.py:breadcrumbs_ties"),
        *("ops/rules/elementwise.py:dare_ties", "ops/rules/elementwise.py:della", "verbs/combine.py:_combined"),
    ),
    "the one place where a model is put together: base, adapters, files and settings meet there": (
        *("adapters/merged.py:Merged.__init__", "gguf/arch/mapping.py:Mapper._add", "gguf/arch/model.py:as_gguf"),
        *("gguf/fold.py:fold_gguf", "gguf/from_hf.py:from_hf", "gguf/towers/make.py:from_tower"),
    ),
    "drives a run: what is written, from where, to where, and how": (
        *("checkpoint/parts.py:write_part", "checkpoint/publish.py:check_output", "checkpoint/sink.py:Sink.__init__"),
        *("verbs/deploy.py:_Deploy.__init__", "verbs/engines/driver.py:drive", "web.py:stream"),
    ),
}


def functions(file: Path) -> Iterator[tuple[str, int, int]]:
    """(name, parameters without self, lines) of every function of a file, methods and inner ones too."""

    def walk(node: ast.AST, place: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                given = [one.arg for one in (*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs)]
                count = len(given) - (given[:1] in (["self"], ["cls"]))
                yield ".".join((*place, child.name)), count, (child.end_lineno or 0) - child.lineno + 1
                yield from walk(child, (*place, child.name))
            else:
                yield from walk(child, (*place, child.name) if isinstance(child, ast.ClassDef) else place)

    yield from walk(ast.parse(file.read_text(encoding="utf-8")), ())


def files() -> list[Path]:
    """The files of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def long_signatures() -> dict[str, int]:
    """Functions with more than six parameters, with how many."""
    found = {}
    for file in files():
        for name, count, _ in functions(file):
            if count > MOST:
                found[f"{file.relative_to(PACKAGE).as_posix()}:{name}"] = count
    return found


def loose() -> list[str]:
    """Modules at the package's top level, without its own three files."""
    return sorted(file.stem for file in PACKAGE.glob("*.py") if not file.name.startswith("_"))


def section() -> str:
    """The figures, as the page has them."""
    long = long_signatures()
    places = {file: file.relative_to(PACKAGE).as_posix() for file in files()}
    every = [(lines, f"{place}:{name}") for file, place in places.items() for name, _, lines in functions(file)]
    sizes = [(len(file.read_text(encoding="utf-8").splitlines()), place) for file, place in places.items()]
    function, longest = max(every), max(sizes)
    rows = [f"| {why} | {len(names)} |" for why, names in REASONS.items()]
    return "\n".join(
        [
            f"* Functions with more than {MOST} parameters: {len(long)}.",
            "* Modules that import each other in a circle: none (`tests/test_layers.py`).",
            f"* Loose modules at the top: {len(loose())}.",
            f"* Longest function: {function[0]} lines (`{function[1]}`). Longest file: {longest[0]} lines (`{longest[1]}`).",
            "",
            f"| why a function takes more than {MOST} | how many |",
            "|---|---|",
            *rows,
        ]
    )


_PLACE = re.compile(r"(<!-- shape: python tools/shape.py --write -->\n\n)(.*?)(\n\n<!-- /shape -->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with the figures as they are."""
    return _PLACE.sub(lambda match: match[1] + section() + match[3], text)


def main() -> None:
    """Print the figures, or write them."""
    unknown = long_signatures().keys() - {name for names in REASONS.values() for name in names}
    for name in sorted(unknown):
        print(f"no reason: {name}", file=sys.stderr)
    if "--write" in sys.argv:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(section())
    sys.exit(1 if unknown else 0)


if __name__ == "__main__":
    main()
