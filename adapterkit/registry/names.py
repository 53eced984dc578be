"""Which names, digests and paths are allowed to become part of a file name.

Everything is an allow-list: a name that passes holds only ASCII, so no look-alike letter, control character or
bidirectional mark can make two names look the same, and no name can leave its folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from adapterkit.errors import AdapterkitError, RegistryError, UnsafeError, UsageError, option

# Plain text and not compiled here: re caches what is used, and reading verbs use few of them.
_NAME = r"[a-z0-9][a-z0-9._-]{0,95}"
_SHA256 = r"[0-9a-f]{64}"
_COMMIT = r"[0-9a-f]{40}"
_REPO = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?"
_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
_NAME_RULE = "use 1 to 96 of a-z, 0-9, '.', '_' and '-', a letter or digit first, and no '..'"
LATEST = "latest"


def is_name(text: str) -> bool:
    """Whether ``text`` may name a registry entry or an alias."""
    return re.fullmatch(_NAME, text) is not None and ".." not in text


def check_name(text: str, what: str = "name") -> str:
    """``text``, when it may name a registry entry.

    Raises:
        UnsafeError: it holds a path separator, ``..``, a control character or a letter beyond ASCII.
        UsageError: it breaks another rule of names.
    """
    if is_name(text):
        return text
    unsafe = ".." in text or not text.isascii() or any(char in "/\\" or not char.isprintable() for char in text)
    error: type[AdapterkitError] = UnsafeError if unsafe else UsageError
    if "://" in text:
        raise error(
            f"{text!a} is an address, and a {what} of the registry is wanted", "register it, then give its name"
        )
    raise error(f"{text!a} cannot be a {what}", _NAME_RULE)


def name_from(text: str) -> str:
    """A name that the registry takes, made of what another place calls it; empty where there is none.

    Letters lose their marks (NFKD of Unicode, TR15). Where a letter without an ASCII form is left, there is no name.
    """
    import unicodedata

    plain = "".join(one for one in unicodedata.normalize("NFKD", text) if not unicodedata.combining(one)).lower()
    if any(one.isalnum() and not one.isascii() for one in plain):
        return ""
    return re.sub(r"\.{2,}", ".", re.sub(r"[^a-z0-9._-]+", "-", plain)).strip("-._")[:96]


def name_or_from(name: str | None, text: str, whose: object) -> str:
    """``name``, when it is given, else one made of ``text``, which is what ``whose`` is called there.

    Raises:
        UnsafeError, UsageError: see `check_name`; no name can be made.
    """
    found = check_name(name) if name else name_from(text)
    if not found:
        raise UsageError(f"{whose} gives no name for the registry", f"add {option('name', 'NAME')}")
    return found


def check_alias(text: str) -> str:
    """``text``, when it may be an alias: a name that is neither all digits (a version) nor ``latest`` (computed)."""
    check_name(text, "alias")
    if text.isdigit() or text == LATEST:
        raise UsageError(f"'{text}' cannot be an alias", "numbers are versions and 'latest' is always the newest one")
    return text


def check_sha256(text: object, where: str) -> str:
    """``text``, when it is a sha256 in 64 lower-case hex digits; anything else never becomes part of a path."""
    if isinstance(text, str) and re.fullmatch(_SHA256, text):
        return text
    raise RegistryError(f"{where} is not a sha256 of 64 lower-case hex digits: {ascii(text)[:80]}")


def check_commit(text: object, where: str) -> str:
    """``text``, when it is a git commit in 40 lower-case hex digits."""
    if isinstance(text, str) and re.fullmatch(_COMMIT, text):
        return text
    raise RegistryError(f"{where} is not a commit of 40 lower-case hex digits: {ascii(text)[:80]}")


def is_repo(text: str) -> bool:
    """Whether ``text`` has the form of a Hub id (``name`` or ``org/name``); a local path never passes."""
    return re.fullmatch(_REPO, text) is not None and ".." not in text and "--" not in text


def check_repo(text: object, where: str) -> str:
    """``text``, when it has the form of a Hub id."""
    if isinstance(text, str) and is_repo(text):
        return text
    raise RegistryError(f"{where} is not a Hub id such as org/name: {ascii(text)[:120]}")


def check_time(text: object, where: str) -> str:
    """``text``, when it is a UTC time such as ``2026-01-31T23:59:59Z``."""
    if isinstance(text, str) and re.fullmatch(_TIME, text):
        return text
    raise RegistryError(f"{where} is not a UTC time such as 2026-01-31T23:59:59Z: {ascii(text)[:80]}")


def check_path(text: object, where: str) -> str:
    """``text``, when it is a relative POSIX path that stays in its folder and prints as what it is.

    Refused: absolute paths, ``.`` and ``..``, empty or over-long parts, backslashes, colons, and every character that
    is unprintable or in another Unicode normal form than NFC.
    """
    if isinstance(text, str) and 0 < len(text) <= 1024:
        parts = text.split("/")
        plain = all(0 < len(part.encode("utf-8", "replace")) <= 255 and part not in (".", "..") for part in parts)
        if plain and text.isprintable() and "\\" not in text and ":" not in text and (text.isascii() or _is_nfc(text)):
            return text
    raise RegistryError(f"{where} is not a relative path inside its folder: {ascii(text)[:120]}")


def check_paths(paths: Iterable[str], where: str) -> None:
    """Refuse paths of files that cannot lie in one folder, on a disk that knows no case too.

    Args:
        where: what holds them, for the error.

    Raises:
        UnsafeError: one would leave the folder, is there twice, or is a folder of another.
    """
    found: dict[str, str] = {}
    for path in paths:
        try:
            check_path(path, "a file")
        except RegistryError as error:
            raise UnsafeError(f"{where}: {error.message}", "do not use it") from None
        if path.casefold() in found:
            raise UnsafeError(f"{where} holds {path} twice", "do not use it")
        found[path.casefold()] = path
    folders = {key[:at] for key in found for at, letter in enumerate(key) if letter == "/"}
    both = next((path for key, path in found.items() if key in folders), None)
    if both is not None:
        raise UnsafeError(f"{where} holds {both} as a file and as a folder", "do not use it")


def _is_nfc(text: str) -> bool:
    import unicodedata

    return unicodedata.is_normalized("NFC", text)
