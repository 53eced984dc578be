"""Recipes that are wrong: each error names its line and what to do, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import plain_adapter, plain_base

from adapterkit.cli import main
from adapterkit.errors import AdapterkitError, NotFound, RecipeError, UnsafeError, UsageError
from adapterkit.recipe.parse import read_recipe
from adapterkit.recipe.run import plan_build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipes")
    base = plain_base(root / "base")
    plain_adapter(root / "style", base)
    (root / "prompts.txt").write_text("hello\n")
    return root


GOOD = """\
base = "base"

[adapters]
style = "style"

[outputs]
merged = "build/merged"
"""

# what is wrong: the recipe, its line, words of the error, words of the hint
WRONG: dict[str, tuple[str, int, str, str]] = {
    "key": (GOOD + "bases = 1\n", 8, "outputs.bases is a whole number", "give a table"),
    "top_key": ('bas = "base"\n' + GOOD, 1, "there is no key 'bas'", "did you mean 'base'?"),
    "nested_key": (
        GOOD.replace('"build/merged"', '{path = "x", quantt = "nf4"}'),
        7,
        "there is no key 'quantt' in outputs.merged",
        "did you mean 'quant'?",
    ),
    "underscore": (
        GOOD.replace('"build/merged"', '{path = "x", max_shard_size = "1GB"}'),
        7,
        "no key 'max_shard_size'",
        "did you mean 'max-shard-size'?",
    ),
    "far_key": (GOOD.replace('"style"\n', '"style"\n[zebra]\n'), 5, "there is no key 'zebra'", "known: adapters, base"),
    "type": (
        GOOD.replace('"build/merged"', "{path = 3}"),
        7,
        "outputs.merged.path is a whole number (3)",
        "give a string",
    ),
    "bool": (
        GOOD.replace('"build/merged"', '{path = "x", pure = "yes"}'),
        7,
        "outputs.merged.pure is a string ('yes')",
        "give true or false",
    ),
    "weight": (GOOD.replace('"style"', '{ref = "style", weight = "1"}'), 4, "adapters.style.weight", "give a number"),
    "nan": (GOOD.replace('"style"', '{ref = "style", weight = nan}'), 4, "weight is a number (nan)", "finite"),
    "list": (
        GOOD.replace('"build/merged"', '{path = "x", adapters = "style"}'),
        7,
        "outputs.merged.adapters is a string",
        "give a list",
    ),
    "item": (
        GOOD.replace('"build/merged"', '{path = "x", adapters = ["style",\n 3]}'),
        8,
        "outputs.merged.adapters[1] is a whole number",
        "give a string",
    ),
    "choice": (
        GOOD.replace('"build/merged"', '{path = "x", dtype = "bf17"}'),
        7,
        "outputs.merged.dtype is 'bf17'",
        "use auto, bf16, f16, f32",
    ),
    "no_path": (GOOD.replace('"build/merged"', '{quant = "nf4"}'), 7, "outputs.merged has no 'path'", "add path"),
    "no_outputs": ('base = "base"\n', 1, "the recipe has no 'outputs'", "add outputs"),
    "empty_outputs": ('base = "base"\n[outputs]\n', 2, "the recipe makes nothing", "add an output"),
    "no_base": (
        GOOD.replace('base = "base"', ""),
        7,
        "outputs.merged is a merge, and the recipe names no base",
        "base",
    ),
    "no_adapters": (GOOD.replace('style = "style"', ""), 7, "outputs.merged has no adapters", "[adapters]"),
    "unknown_adapter": (
        GOOD.replace('"build/merged"', '{path = "x", adapters = ["stile"]}'),
        7,
        "there is no adapter 'stile'",
        "did you mean 'style'?",
    ),
    "unknown_output": (
        GOOD + 'gguf = {path = "y.gguf", from = "merge"}\n',
        8,
        "there is no output 'merge'",
        "did you mean 'merged'?",
    ),
    "a_path_for_an_output": (
        GOOD + 'gguf = {path = "y.gguf", from = "./base"}\n',
        8,
        "there is no output './base'",
        "what is there already is named with base or adapters",
    ),
    "neither": (GOOD.replace('"style"', "{weight = 2.0}"), 4, "neither ref nor from", "give one"),
    "both": (GOOD.replace('"style"', '{ref = "style", from = "merged"}'), 4, "both a ref and", "give one"),
    "not_an_adapter": (GOOD.replace('"style"', '{from = "merged"}'), 4, "makes a folder, not an adapter", "adapter"),
    "circle": (
        GOOD.replace('"style"', '"style"\nx = {from = "one"}\ny = {from = "two"}')
        + 'one = {path = "1", to = "adapter", adapters = ["y"]}\n'
        + 'two = {path = "2", to = "adapter", adapters = ["x"]}\n',
        5,
        "in a circle: one -> two -> one",
        "something else",
    ),
    "itself": (
        GOOD + 'a = {path = "a.gguf", from = "a"}\n',
        8,
        "in a circle: a -> a",
        "something else",
    ),
    "one_path": (
        GOOD + 'again = "build/../build/merged"\n',
        8,
        "build/../build/merged is where outputs.merged goes (line 7)",
        "path of its own",
    ),
    "one_in_another": (GOOD + 'again = "build/merged/x"\n', 8, "lies in or around where outputs.merged goes", "own"),
    "page_on_an_output": (
        GOOD + 'b = {path = "b", verify = {html = "build/merged"}}\n',
        8,
        "build/merged is where outputs.merged goes",
        "own",
    ),
    "one_page_for_two": (
        GOOD + 'b = "b"\n[verify]\nhtml = "page.html"\n',
        10,
        "page.html is where verify goes (line 10)",
        "own",
    ),
    "over_the_recipe": (GOOD + 'b = "."\n', 8, "'.' is no path for an output", "name a folder"),
    "over_an_input": (GOOD + 'b = "base"\n', 1, "base is what outputs.b makes", "a base that outputs.b does not make"),
    "into_an_input": (GOOD + 'b = "base/b"\n', 8, "would be written in or over the input base", "elsewhere"),
    "missing_base": (GOOD.replace('"base"', '"./bass"'), 1, "./bass does not exist", "a path beside the recipe"),
    "unknown_name": (GOOD.replace('"base"', '"bass"'), 1, "bass does not exist", "a registry name or a Hub id"),
    "missing_adapter": (GOOD.replace('"style"', '"./stile"'), 4, "./stile does not exist", "a path beside the recipe"),
    "empty_ref": (GOOD.replace('"style"', '""'), 4, "adapters.style.ref is empty", "name a folder"),
    "made_by_an_output": (
        GOOD + 'b = {path = "b", adapters = ["mine"]}\n[adapters.mine]\nref = "build/merged"\n',
        10,
        "build/merged is what outputs.merged makes",
        'say from = "merged"',
    ),
    "missing_imatrix": (
        GOOD + 'q = {path = "q.gguf", quant = "IQ2_XS", imatrix = "i.dat"}\n',
        8,
        "i.dat does not exist",
        "a file beside the recipe",
    ),
    "missing_prompts": (
        GOOD + '[verify]\nlevel = "model"\nprompts = "promts.txt"\n',
        10,
        "promts.txt does not exist",
        "a file beside the recipe",
    ),
    "folder_format": (GOOD + 'q = {path = "q", quant = "Q4_K_M"}\n', 8, "'Q4_K_M' is no format of a folder", ".gguf"),
    "gguf_format": (GOOD + 'q = {path = "q.gguf", quant = "nf4"}\n', 8, "'nf4' is no type of a GGUF file", "Q4_K_M"),
    "served_folder": (GOOD + 'q = {path = "q", for = "ollama"}\n', 8, "ollama serves a GGUF file", "leave it out"),
    "form": (GOOD + 'q = {path = "q", to = "ggfu"}\n', 8, "'ggfu' is nothing to write", "did you mean 'gguf'?"),
    "tower_of_a_folder": (
        GOOD + 'q = {path = "q", mmproj = "prompts.txt"}\n',
        8,
        "belongs beside a GGUF file, and outputs.q is none",
        "leave it out",
    ),
    "no_tower": (GOOD + 'q = {path = "q.gguf", mmproj = "m.gguf"}\n', 8, "m.gguf does not exist", "beside the recipe"),
    "two_towers_on_one_path": (
        GOOD + 'q = {path = "q/q.gguf", mmproj = "prompts.txt"}\nr = {path = "q/r.gguf", mmproj = "prompts.txt"}\n',
        9,
        "q/prompts.txt is where outputs.q goes (line 8)",
        "path of its own",
    ),
    "kept_below_what": (GOOD + 'q = {path = "q.gguf", keep-below = 0.5}\n', 8, "which tensors", "add keep-touched"),
    "kept_below_2": (GOOD + 'q = {path = "q.gguf", keep-below = 2}\n', 8, "keep-below is 2", "between 0 and 1"),
    "order_of_experts": (
        GOOD + '[merge]\nexpert-order = "slow"\n',
        9,
        "merge.expert-order is 'slow'",
        "use fastest, slowest",
    ),
    "calibrated_merge": (GOOD + 'q = {path = "q", calibration = "prompts.txt"}\n', 8, "calibration means", "leave"),
    "not_for_a_merge": (
        GOOD + 'q = {path = "q", rank = 4}\n',
        8,
        "'rank' means nothing for outputs.q, a merge",
        "leave",
    ),
    "rank": (GOOD + 'q = {path = "q", to = "adapter", rank = 0}\n', 8, "rank is 0, which can never hold", "at least 1"),
    "retention_over_1": (
        GOOD + "[verify]\nmin-retention = 1.5\n",
        9,
        "verify.min-retention is 1.5, which can never hold",
        "it lies between 0 and 1",
    ),
    "kl_below_0": (GOOD + "[verify]\nmax-kl = -0.1\n", 9, "max-kl is -0.1, which can never hold", "at least 0"),
    "kl_of_tensors": (
        GOOD + "[verify]\nmax-kl = 0.1\n",
        9,
        "verify.max-kl needs the model's answers, and level tensors does not ask for them",
        'use level = "model"',
    ),
    "nothing_verified": (
        GOOD + '[verify]\nlevel = "none"\nmin-retention = 0.9\n',
        10,
        "nothing is verified",
        "raise the level",
    ),
    "no_cosine_of_nothing": (
        GOOD + '[verify]\nlevel = "none"\nmin-cosine = 0.9\n',
        10,
        "nothing is verified, so min-cosine cannot be met",
        "raise the level",
    ),
    "conversions_need_one": (
        GOOD.replace('"style"', '"style"\nother = "style"') + 'q = {path = "q", to = "mlx"}\n',
        9,
        "a conversion of one adapter, and there are 2",
        "name it",
    ),
    "repository": (GOOD.replace('"build/merged"', '{path = "x", push = "me"}'), 7, "'me' is not a repository", "org/"),
    "file_to_push": (
        GOOD + 'q = {path = "q.gguf", push = "org/name"}\n',
        8,
        "a file is pushed from the registry",
        'register = "NAME"',
    ),
    "tag": (GOOD + 'q = {path = "q", push = {repo = "a/b", tag = "v 1"}}\n', 8, "'v 1' cannot be a tag", "letters"),
    "alias": (
        GOOD + 'q = {path = "q", register = {name = "a", alias = "3"}}\n',
        8,
        "'3' cannot be an alias",
        "numbers",
    ),
    "syntax": (GOOD + "a = = 1\n", 8, "this is not TOML", "correct it"),
    "twice": (GOOD + '[adapters]\nb = "c"\n', 8, "this is not TOML: cannot declare", "correct it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_its_line(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, line, message, hint = WRONG[name]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ADAPTERKIT_HOME", str(folder / "home"))
    before = {path for path in folder.rglob("*") if "home" not in path.parts}
    recipe = folder / "adapterkit.toml"
    recipe.write_text(text)
    with pytest.raises(AdapterkitError) as caught:
        plan_build("adapterkit.toml")
    assert caught.value.message.startswith(f"adapterkit.toml:{line}: ")
    assert caught.value.place == ("adapterkit.toml", line)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert {path for path in folder.rglob("*") if "home" not in path.parts} - before <= {recipe}


def test_exit_codes() -> None:
    assert (RecipeError("x").exit_code, NotFound("x").exit_code) == (2, 7)
    assert issubclass(RecipeError, UsageError)


def test_unsafe_names_stay_unsafe(folder: Path) -> None:
    recipe = folder / "unsafe.toml"
    recipe.write_text(GOOD + 'q = {path = "q", register = "../etc"}\n')
    with pytest.raises(UnsafeError) as caught:
        plan_build(recipe)
    assert caught.value.place == (str(recipe), 8)


def test_a_secret_in_the_metadata_is_refused(folder: Path) -> None:
    recipe = folder / "secret.toml"
    token = "hf_" + "a" * 30
    recipe.write_text(GOOD + f'q = {{path = "q", register = {{name = "a", meta = {{key = "{token}"}}}}}}\n')
    with pytest.raises(UnsafeError, match="looks like a token") as caught:
        plan_build(recipe)
    assert token not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xfe", "is not text in UTF-8"),
        (b"a = " + b"[" * 5000, "is nested too deeply|is not TOML"),
        (b"", "has no 'outputs'"),
        (b"\xef\xbb\xbfbase = 1", "this is not TOML"),
    ],
)
def test_what_is_no_recipe(data: bytes, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_bytes(data)
    with pytest.raises(RecipeError, match=message):
        read_recipe(recipe)


def test_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound, match=r"no adapterkit\.toml here"):
        read_recipe()
    with pytest.raises(NotFound, match=r"nothing\.toml does not exist"):
        read_recipe("nothing.toml")
    (tmp_path / "pyproject.toml").write_text("[tool.other]\n")
    with pytest.raises(RecipeError, match=r"has no table \[tool.adapterkit\]"):
        read_recipe()
    (tmp_path / "pyproject.toml").write_text("tool = 3\n")
    with pytest.raises(RecipeError, match=r"has no table \[tool.adapterkit\]"):
        read_recipe()


def test_errors_of_a_pyproject_name_their_line_too(folder: Path) -> None:
    recipe = folder / "pyproject.toml"
    lines = [
        "[project]",
        'name = "x"',
        "[tool.adapterkit]",
        'base = "base"',
        "[tool.adapterkit.outputs.merged]",
        "pth = 1",
    ]
    recipe.write_text("\n".join(lines))
    with pytest.raises(RecipeError) as caught:
        read_recipe(recipe)
    assert caught.value.place == (str(recipe), 6)
    assert caught.value.hint == "did you mean 'path'?"
    recipe.unlink()


def test_the_command_line_says_it_without_a_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "wrong.toml").write_text(GOOD.replace("[outputs]", "[outputz]"))
    with pytest.raises(SystemExit) as stopped:
        main(["build", "wrong.toml"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: wrong.toml:6: there is no key 'outputz'; did you mean 'outputs'?\n"
    with pytest.raises(SystemExit):
        main(["build", "wrong.toml", "--json"])
    assert json.loads(capsys.readouterr().out)["error"]["hint"] == "did you mean 'outputs'?"
