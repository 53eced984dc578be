"""The line of every key and value of a TOML document.

`tomllib` gives values without positions, and tomlkit keeps the text but not where it stood. Values are tomllib's; this
only walks over a document that it has accepted, and counts lines.
"""

from __future__ import annotations

from collections.abc import Mapping

Path = tuple[str | int, ...]

_BARE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
_ESCAPES = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", "e": "\x1b", '"': '"', "\\": "\\"}


def positions(text: str) -> dict[Path, int]:
    """The line (from 1) of every table, key and array item, by its path from the root.

    Args:
        text: a document that tomllib accepts; what is said of another one means nothing.
    """
    walk = _Walk(text.replace("\r\n", "\n"))
    walk.document()
    return walk.found


def line_of(found: Mapping[Path, int], path: Path) -> int:
    """The line of ``path``, or of the nearest thing around it that has one."""
    for length in range(len(path), 0, -1):
        if path[:length] in found:
            return found[path[:length]]
    return 1


class _Walk:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.found: dict[Path, int] = {}
        self._arrays: dict[Path, int] = {}  # items so far of each array of tables
        self._counted, self._line = 0, 1

    def document(self) -> None:
        table: Path = ()
        while self._skip("\n"):
            if self.text.startswith("[[", self.at):
                table = self._header(2)
            elif self.text[self.at] == "[":
                table = self._header(1)
            else:
                self._pair(table)

    def _line_here(self) -> int:
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def _note(self, path: Path) -> None:
        self.found.setdefault(path, self._line_here())

    def _skip(self, also: str = "") -> bool:
        """Go to what is next after blanks and comments; whether there is anything."""
        text, size = self.text, len(self.text)
        while self.at < size:
            char = text[self.at]
            if char == "#":
                end = text.find("\n", self.at)
                self.at = size if end < 0 else end
            elif char in " \t" or char in also:
                self.at += 1
            else:
                return True
        return False

    def _header(self, brackets: int) -> Path:
        self.at += brackets
        parts = self._key()
        path: Path = ()
        for part in parts[:-1]:
            path = self._inside((*path, part))
            self._note(path)
        path = (*path, parts[-1])
        self._note(path)
        if brackets == 2:
            self._arrays[path] = self._arrays.get(path, -1) + 1
            path = (*path, self._arrays[path])
            self._note(path)
        else:
            path = self._inside(path)
        self.at += brackets
        return path

    def _inside(self, path: Path) -> Path:
        """The last item, where ``path`` is an array of tables."""
        return (*path, self._arrays[path]) if path in self._arrays else path

    def _pair(self, table: Path) -> None:
        path = table
        for part in self._key():
            path = (*path, part)
            self._note(path)
        self.at += 1  # the equals sign
        self._skip()
        self._value(path)

    def _key(self) -> list[str]:
        parts = []
        while True:
            self._skip()
            char = self.text[self.at]
            if char in "\"'":
                parts.append(self._string())
            else:
                start = self.at
                while self.at < len(self.text) and self.text[self.at] in _BARE:
                    self.at += 1
                parts.append(self.text[start : self.at])
            self._skip()
            if self.text[self.at] != ".":
                return parts
            self.at += 1

    def _value(self, path: Path) -> None:
        char = self.text[self.at]
        if char in "\"'":
            self._string()
        elif char == "[":
            self._array(path)
        elif char == "{":
            self._inline(path)
        else:
            while self.at < len(self.text) and self.text[self.at] not in ",]}#\n":
                self.at += 1

    def _array(self, path: Path) -> None:
        self.at += 1
        index = 0
        while self._skip("\n,") and self.text[self.at] != "]":
            self._note((*path, index))
            self._value((*path, index))
            index += 1
        self.at += 1

    def _inline(self, path: Path) -> None:
        self.at += 1
        while self._skip("\n,") and self.text[self.at] != "}":
            self._pair(path)
        self.at += 1

    def _string(self) -> str:
        """A string of any kind; its value is only exact for those of one line, as keys are."""
        quote = self.text[self.at]
        long = self.text.startswith(quote * 3, self.at)
        end = quote * (3 if long else 1)
        self.at += len(end)
        parts = []
        while not self.text.startswith(end, self.at):
            char = self.text[self.at]
            if char == "\\" and quote == '"':
                self.at += 1
                char = self._escape()
            else:
                self.at += 1
            parts.append(char)
        self.at += len(end)
        while (
            long and self.at < len(self.text) and self.text[self.at] == quote
        ):  # up to two quotes may stand before the end
            self.at += 1
        return "".join(parts)

    def _escape(self) -> str:
        char = self.text[self.at]
        self.at += 1
        digits = {"u": 4, "U": 8, "x": 2}.get(char, 0)
        if not digits:
            return _ESCAPES.get(char, char)
        code = self.text[self.at : self.at + digits]
        self.at += digits
        return chr(int(code, 16))
