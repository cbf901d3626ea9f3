"""Completion in shells: what bash offers is what it would complete; every command and flag is in fish's script."""

import shutil
import subprocess

import pytest

from minigemma.cli.arguments import build_parser
from minigemma.cli.main import main


@pytest.mark.parametrize(
    "words, offered",
    [
        (["minigemma", "q"], ["quantize"]),
        (["minigemma", "chat", "--temp"], ["--temperature", "--temp"]),
        (["minigemma", "quantize", "a", "b", "--dtype", "int8"], ["int8", "int8-row"]),
        (["minigemma", "inspect", "--s"], ["--shape"]),
        (["minigemma", "inspect", "wei"], []),
    ],
)
def test_bash_offers_commands_flags_and_values(words, offered, capsys):
    if shutil.which("bash") is None:
        pytest.skip("there is no bash here")
    assert main(["completion", "bash"]) == 0
    array = " ".join(f"'{word}'" for word in words)
    ask = f"COMP_WORDS=({array}); COMP_CWORD={len(words) - 1}; _minigemma; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(
        ["bash", "-c", f"{capsys.readouterr().out}\n{ask}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_every_command_and_flag_is_there(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    [commands] = [action.choices for action in build_parser()._actions if isinstance(action.choices, dict)]
    for name, parser in commands.items():
        assert name in script
        flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        assert all((f"-l {flag[2:]}" if shell == "fish" else flag) in script for flag in flags)
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)
