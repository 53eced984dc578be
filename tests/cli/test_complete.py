"""What a shell completes, by the protocol of Click and in a real bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from models import plain_adapter, plain_base

from adapterkit.provenance.register import register

EXECUTABLE = Path(sys.executable).with_name("adapterkit")


def completed(*words: str, home: Path) -> list[str]:
    """The values that the executable offers for the last of the words."""
    around = {"COMP_WORDS": " ".join(("adapterkit", *words)), "COMP_CWORD": str(len(words))}
    around |= {"_ADAPTERKIT_COMPLETE": "bash_complete", "ADAPTERKIT_HOME": str(home)}
    done = subprocess.run([EXECUTABLE], capture_output=True, text=True, timeout=900, env={**os.environ, **around})
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line.startswith("plain,")]


@pytest.mark.parametrize(
    ("words", "there"),
    [
        (("comb",), ["combine"]),
        (("convert", "x", "--to", "gguf"), ["gguf", "gguf-lora"]),
        (("merge", "x", "y", "--quant", "Q4_K"), ["Q4_K_S", "Q4_K_M"]),
        (("merge", "x", "y", "--quant", "nf"), ["nf4"]),
        (("merge", "x", "y", "--as-trained", ""), ["nf4", "fp4", "int8"]),
        (("check", "x", "y", "--for", "vl"), ["vllm"]),
        (("verify", "x", "--level", "l"), ["layers"]),
    ],
)
def test_values(words: tuple[str, ...], there: list[str], tmp_path: Path) -> None:
    found = completed(*words, home=tmp_path / "home")
    assert [one for one in found if one in there] == there
    assert all(one.startswith(words[-1]) for one in found)


def test_names_of_the_registry(tmp_path: Path) -> None:
    adapter = plain_adapter(tmp_path / "a", plain_base(tmp_path / "base"))
    register(adapter, "tickets", home=tmp_path / "home")
    assert completed("merge", "base", "tick", home=tmp_path / "home") == ["tickets"]
    assert completed("inspect", "tick", home=tmp_path / "none") == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash on this machine")
def test_in_a_real_bash(tmp_path: Path) -> None:
    """The script that `_ADAPTERKIT_COMPLETE=bash_source adapterkit` prints, sourced, and its function called as bash does."""
    script = (
        'eval "$(_ADAPTERKIT_COMPLETE=bash_source adapterkit)"\n'
        "COMP_WORDS=(adapterkit convert x --to pe); COMP_CWORD=4\n"
        "_adapterkit_completion adapterkit pe --to\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    path = f"{EXECUTABLE.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=900, env={**os.environ, "PATH": path}
    )
    assert done.stdout.split() == ["peft"], done.stderr


def test_a_word_that_is_no_verb_gets_the_nearest() -> None:
    done = subprocess.run([EXECUTABLE, "mrege"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 2
    assert "Did you mean 'merge'?" in done.stderr


def in_shell(shell: str, script: str, tmp_path: Path) -> str:
    """Standard output of a script, with the executable on the path and a home of its own."""
    path = f"{EXECUTABLE.parent}{os.pathsep}{os.environ['PATH']}"
    around = {**os.environ, "PATH": path, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "TERM": "dumb"}
    command = [shell, "--no-config", "-c", script] if shell == "fish" else [shell, "-f", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=around, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish on this machine")
def test_in_a_real_fish(tmp_path: Path) -> None:
    """The line of the page, and fish's own `complete -C`, which prints what the key would offer."""
    script = "_ADAPTERKIT_COMPLETE=fish_source adapterkit | source; complete -C 'adapterkit convert x --to pe'; "
    script += "complete -C 'adapterkit com'"
    assert [line.split("\t")[0] for line in in_shell("fish", script, tmp_path).splitlines()] == ["peft", "combine"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh on this machine")
def test_in_a_real_zsh(tmp_path: Path) -> None:
    """The line of the page, after `compinit`; what the function hands to zsh's own `compadd` and `_describe` is printed."""
    script = (
        "autoload -U compinit; compinit -u\n"
        'eval "$(_ADAPTERKIT_COMPLETE=zsh_source adapterkit)"\n'
        "compadd() { print -r -- compadd ${(P)@[-1]} }\n"
        "_describe() { print -r -- describe ${(P)3} }\n"
        "words=(adapterkit convert x --to pe); CURRENT=5\n"
        "_adapterkit_completion\n"
        "words=(adapterkit com); CURRENT=2\n"
        "_adapterkit_completion\n"
        "print -r -- registered $_comps[adapterkit]\n"
    )
    told = in_shell("zsh", script, tmp_path)
    assert "peft" in told
    assert "combine:Make one adapter of several." in told
    assert "registered _adapterkit_completion" in told
