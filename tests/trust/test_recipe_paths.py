"""A recipe of a cloned repository writes inside its folder, through no link, and over nothing that it did not make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from models import edit_config, read_bytes

from adapterkit.cli import main
from adapterkit.errors import CheckFailed, OutputError, UnsafeError
from adapterkit.recipe.run import build, plan_build

OUTPUTS = '[outputs.merged]\npath = "build/merged"\n'


@pytest.fixture
def recipe(inputs: tuple[Path, Path], tmp_path: Path, home: Path) -> Path:
    folder = tmp_path / "repo"
    shutil.copytree(inputs[0], folder / "base")
    shutil.copytree(inputs[1], folder / "adapter")
    path = folder / "adapterkit.toml"
    path.write_text(f'base = "base"\nadapters.a = "adapter"\nverify.level = "none"\n{OUTPUTS}')
    return path


def verified(recipe: Path, page: str) -> Path:
    text = recipe.read_text().replace('verify.level = "none"', f'verify = {{level = "tensors", html = "{page}"}}')
    recipe.write_text(text)
    return recipe


@pytest.mark.parametrize(
    "link",
    [
        *(".adapterkit", ".adapterkit/.gitignore", ".adapterkit/adapterkit.json", ".adapterkit/.adapterkit.json.part"),
        *("adapterkit.lock", ".adapterkit.lock.part", ".page.html.part", "build/.merged.partial", "build/merged"),
    ],
)
@pytest.mark.parametrize("kind", ["file", "folder", "none"])
def test_planted_links(link: str, kind: str, recipe: Path, tmp_path: Path) -> None:
    """Refused or replaced; what they point to stays as it was."""
    verified(recipe, "page.html")
    kept = tmp_path / "kept"
    if kind == "file":
        kept.write_text("precious")
    elif kind == "folder":
        kept.mkdir()
        (kept / "thesis.txt").write_text("precious")
    (recipe.parent / link).parent.mkdir(exist_ok=True)
    (recipe.parent / link).symlink_to(kept)
    try:
        build(recipe)
    except (UnsafeError, OutputError):
        pass
    if kind == "none":
        assert not kept.exists()
    elif kind == "file":
        assert kept.read_text() == "precious"
    else:
        assert {p.name: p.read_text() for p in kept.iterdir()} == {"thesis.txt": "precious"}


@pytest.mark.parametrize("path", ["../out", "a/../../out", "ABSOLUTE", "link/out"])
def test_outputs_outside_of_the_folder(path: str, recipe: Path, tmp_path: Path) -> None:
    (recipe.parent / "link").symlink_to(tmp_path)
    said = path.replace("ABSOLUTE", str(tmp_path / "out"))
    recipe.write_text(recipe.read_text().replace("build/merged", said))
    for work in (build, plan_build):
        with pytest.raises(UnsafeError, match=r"toml:5: .*outside of the recipe's folder.*outside=True"):
            work(recipe)
    assert not (tmp_path / "out").exists()
    for more, code in (([], 6), (["--outside"], 0)):
        with pytest.raises(SystemExit) as end:
            main(["build", str(recipe), *more])
        assert end.value.code == code
    assert (tmp_path / "out" / "config.json").exists()


def test_a_page_outside_of_the_folder(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("precious")
    with pytest.raises(UnsafeError, match="outside"):
        build(verified(recipe, "../mine.html"))
    with pytest.raises(OutputError, match="did not write it"):
        build(recipe, outside=True)
    assert (tmp_path / "mine.html").read_text() == "precious"
    build(recipe, outside=True, force=True)
    assert (tmp_path / "mine.html").read_text() != "precious"


def test_a_page_that_is_there_is_not_replaced(recipe: Path) -> None:
    page = recipe.parent / "page.html"
    page.write_text("mine")
    with pytest.raises(OutputError, match=r"page\.html exists.*force=True"):
        build(verified(recipe, "page.html"))
    assert page.read_text() == "mine"
    assert not (recipe.parent / "build").exists()
    build(recipe, force=True)
    written = page.read_text()
    build(recipe)
    assert page.read_text() == written
    page.write_text(written + "<!-- edited -->")
    with pytest.raises(OutputError, match="did not write it"):
        build(recipe)


def test_the_page_of_a_build_that_failed_is_replaced_by_the_next(recipe: Path) -> None:
    edit_config(recipe.parent / "adapter", lora_alpha=0.01)  # so little of it survives in bf16
    verified(recipe, "page.html")
    good = recipe.read_text()
    recipe.write_text(good.replace('"tensors", ', '"tensors", min-retention = 0.999, '))
    with pytest.raises(CheckFailed):
        build(recipe)
    before = (recipe.parent / "page.html").read_text()
    recipe.write_text(good)
    build(recipe)
    assert (recipe.parent / "page.html").read_text() != before


def test_what_a_repository_says_it_made_is_not_believed(recipe: Path, tmp_path: Path) -> None:
    """A repository that carries outputs and a state that calls them unchanged."""
    build(recipe)
    theirs = tmp_path / "theirs"
    shutil.copytree(recipe.parent, theirs)
    weights = next((theirs / "build" / "merged").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    state = json.loads((theirs / ".adapterkit" / "adapterkit.json").read_text())
    import hashlib

    state["made"]["merged"]["files"][weights.name] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (theirs / ".adapterkit" / "adapterkit.json").write_text(json.dumps(state))
    (theirs / ".adapterkit").chmod(0o755)  # as a clone makes it
    with pytest.raises(OutputError, match="exists"):
        build(theirs / "adapterkit.toml")
    (theirs / ".adapterkit").rename(theirs / "old")
    build(theirs / "adapterkit.toml", force=True)
    assert read_bytes(theirs / "build" / "merged") == read_bytes(recipe.parent / "build" / "merged")
