"""Names, aliases and digests: an allow-list, before anything becomes a path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.errors import AdapterkitError, NotFound, UnsafeError, UsageError
from adapterkit.registry import register, resolve, verbs
from adapterkit.registry.home import Home, default_home
from adapterkit.registry.names import check_alias, check_name, check_sha256, is_name, is_repo, name_from, name_or_from

UNSAFE = [
    "../x",
    "a/b",
    "..",
    "a..b",
    "/etc",
    "a\\b",
    "a\nb",
    "a\x1b[2J",
    "a\x00",
    "а-cyrillic",
    "ｆull",
    "a\u200b",
    "a\u202e",
]
WRONG = ["", "A", ".hidden", "-x", "_x", "a b", "a@b", "a" * 97, "a:b", "a*"]


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_names_are_refused_everywhere(name: str, home: Path, make: Any) -> None:
    with pytest.raises(UnsafeError):
        check_name(name)
    folder = make()
    for attempt in (
        lambda: register.register(folder, name),
        lambda: verbs.show(name),
        lambda: verbs.tag("a", name),
        lambda: verbs.untag(name, "prod"),
        lambda: verbs.history("a", name),
        lambda: Home(home).records(name),
        lambda: Home(home).journal(name),
        lambda: Home(home).ref("a", name),
    ):
        with pytest.raises(AdapterkitError):
            attempt()
    assert not home.exists()


@pytest.mark.parametrize("name", WRONG)
def test_other_wrong_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        check_name(name)


@given(st.text(max_size=100))
def test_a_name_that_passes_is_one_plain_path_component(text: str) -> None:
    if is_name(text):
        assert text.isascii()
        assert text.isprintable()
        assert Path("/top", text).resolve() == Path("/top") / text
        assert text == text.lower()


def test_aliases_are_neither_versions_nor_latest() -> None:
    for wrong in ("3", "007", "latest"):
        with pytest.raises(UsageError):
            check_alias(wrong)
    assert check_alias("v3") == "v3"


@pytest.mark.parametrize(
    "digest", ["a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n", "../" + "a" * 61, 5, None, b"a" * 64]
)
def test_only_64_hex_digits_become_a_path(digest: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterkitError):
        check_sha256(digest, "digest")
    with pytest.raises(AdapterkitError):
        Home(tmp_path).blob(digest)
    with pytest.raises(AdapterkitError):
        Home(tmp_path).tree(digest)


def test_hub_ids_are_never_local_paths() -> None:
    assert is_repo("org/name")
    assert is_repo("gpt2")
    for wrong in ("/org/name", "./name", "a/b/c", "~/x", "org/../x", "C:\\x", "org/", "a--b"):
        assert not is_repo(wrong)


def test_references(home: Path, make: Any) -> None:
    at = Home(home)
    first = register.register(make(content=b"1"), "chat").record
    second = register.register(make(content=b"2"), "chat").record
    verbs.tag("chat@1", "prod")
    assert resolve.resolve(at, "chat")[:2] == ("chat", 2)
    assert resolve.resolve(at, "chat@latest")[:2] == ("chat", 2)
    assert resolve.resolve(at, "chat@1")[:2] == ("chat", 1)
    assert resolve.resolve(at, "chat@prod") == ("chat", 1, first.digest)
    for digest in (second.digest, second.content, second.files[1].sha256):
        assert resolve.resolve(at, f"sha256:{digest[:16]}")[:2] == ("chat", 2)
        assert resolve.resolve(at, digest)[:2] == ("chat", 2)
    for missing in ("chat@3", "chat@nope", "chatt", "sha256:" + "0" * 64, "0" * 40):
        with pytest.raises(NotFound):
            resolve.resolve(at, missing)
    for wrong in ("sha256:xyz", "chat@"[:-1] + "@A"):
        with pytest.raises(UsageError):
            resolve.resolve(at, wrong)
    with pytest.raises(UsageError, match="several"):
        # Both versions hold the same configuration file.
        resolve.resolve(at, f"sha256:{first.files[0].sha256}")


def test_the_home_is_absolute_and_in_the_user_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADAPTERKIT_HOME", "relative/home")
    with pytest.raises(UsageError):
        default_home()
    monkeypatch.delenv("ADAPTERKIT_HOME")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_home() == tmp_path / "adapterkit"
    monkeypatch.setenv("XDG_DATA_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_home() == tmp_path / ".local/share/adapterkit"
    monkeypatch.setattr("sys.platform", "darwin")
    assert default_home() == tmp_path / "Library/Application Support/adapterkit"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("\xd6ut put", "out-put"),
        ("na\xefve\u2161", "naiveii"),
        ("\u6a21\u578b-merged", ""),
        ("a..b", "a.b"),
        ("My-LoRA_v1.0", "my-lora_v1.0"),
        ("__", ""),
    ],
)
def test_a_name_that_is_made_of_another(text: str, name: str) -> None:
    """A letter without its marks is near enough; one that is dropped would leave another word."""
    assert name_from(text) == name
    if name:
        assert name_or_from(None, text, "there") == name
        return
    with pytest.raises(UsageError, match="there gives no name for the registry; add name="):
        name_or_from(None, text, "there")
    assert name_or_from("given", text, "there") == "given"


@given(st.text(max_size=120))
def test_a_name_that_is_made_is_one(text: str) -> None:
    found = name_from(text)
    assert not found or is_name(found)
