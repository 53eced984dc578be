"""The tables of docs/files.md: every family and style, merged in both directions beside its oracle, as the tests do it.

python tools/files_page.py            # print them
python tools/files_page.py --write    # put them into the page
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "files.md"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "families")]

import test_checkpoint_conversions as checkpoints  # noqa: E402
import test_comfyui_maps as comfyui  # noqa: E402
import test_every_family as families  # noqa: E402
import test_lora_conversions as files  # noqa: E402
import test_whole_layouts as wholes  # noqa: E402


def asked(test: Callable[..., Any], *arguments: Any) -> str:
    """Whether a test holds."""
    try:
        test(*arguments)
    except AssertionError as error:
        return f"no: {str(error).splitlines()[0][:60]}"
    return "yes"


def of_files() -> str:
    from diffusers.loaders import lora_conversion_utils

    lines = ["| family, keys | into a folder of diffusers | into the original file |", "|---|---|---|"]
    for name, (function, _, _) in files.CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            cell = asked(files.test_as_diffusers_converts_it, name, lora_conversion_utils, Path(folder))
        lines.append(f"| {name} | {cell}: `_convert_{function}_to_diffusers` | {cell}: formula |")
    return "\n".join(lines) + "\n"


def of_checkpoints() -> str:
    from diffusers.loaders import single_file_utils

    lines = ["| family | every row, both ways | oracle |", "|---|---|---|"]
    for name, (function, _, _) in checkpoints.CONVERSIONS.items():
        cell = asked(checkpoints.test_every_row_as_diffusers_converts_it, name, single_file_utils)
        lines.append(f"| {name} | {cell} | `{function}` |")
    return "\n".join(lines) + "\n"


def of_families() -> str:
    """What each family's models and adapters can become."""
    from diffusers.loaders import lora_conversion_utils, single_file_utils

    lines = [
        "| family | a LoRA of every module, there and back | merges into both layouts, beside | a whole checkpoint, beside |",
        "|---|---|---|---|",
    ]
    for family in families.FAMILIES:
        if family.name not in families.published():
            continue
        lora = asked(families.test_a_lora_of_every_module_goes_and_comes_back, family.name)
        if family.name in checkpoints.CONVERSIONS:
            by = checkpoints.CONVERSIONS[family.name][0]
            merged = asked(checkpoints.test_every_row_as_diffusers_converts_it, family.name, single_file_utils)
        else:
            by = f"_convert_{files.CASES[family.name][0]}_to_diffusers"
            with tempfile.TemporaryDirectory() as folder:
                merged = asked(files.test_as_diffusers_converts_it, family.name, lora_conversion_utils, Path(folder))
        whole = "no: nobody publishes its whole table"
        if family.whole:
            done = {
                asked(wholes.test_every_name_of_the_class_goes_and_comes_back, family.name, n) for n in family.classes
            }
            way = ", to diffusers" if family.only_original else ", both ways"
            whole = f"{' '.join(sorted(done))}{way}: `{wholes.converter(family.name).__name__}`"
        lines.append(f"| {family.name} | {lora}: formula | {merged}: `{by}` | {whole} |")
    return "\n".join(lines) + "\n"


COMFYUI = {"Flux.1": "flux", "SD3": "mmdit", "AuraFlow": "auraflow", "SD 1.5": "unet", "SDXL": "unet"}


def of_comfyui() -> str:
    lines = ["| family | parameters | where ComfyUI has them, both ways | oracle |", "|---|---|---|---|"]
    for name, rows in comfyui.MAPS.items():
        if name != "source":
            cell = asked(comfyui.test_every_row_is_where_comfyui_has_it, name)
            lines.append(f"| {name} | {len(rows)} | {cell} | `{COMFYUI[name]}_to_diffusers` |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with the tables as they are now."""
    text = PAGE.read_text(encoding="utf-8")
    for mark, table in (
        ("families", of_families),
        ("files", of_files),
        ("checkpoints", of_checkpoints),
        ("comfyui", of_comfyui),
    ):
        start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->\n"
        text = re.sub(f"{start}.*?{end}", lambda _: start + table() + end, text, flags=re.DOTALL)  # noqa: B023
    return text


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(of_families())
        print(of_files())
        print(of_checkpoints())
        print(of_comfyui())
