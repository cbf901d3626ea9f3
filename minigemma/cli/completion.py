"""`minigemma completion`: a shell script that completes commands, flags and their values."""

import argparse

from .progress import Progress

BASH = """_minigemma() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} words
  case "$COMP_CWORD:${{COMP_WORDS[1]}}:${{COMP_WORDS[COMP_CWORD-1]}}" in
    1:*) words="{commands}" ;;
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _minigemma minigemma"""

ZSH = """autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
"""


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Print the script for bash, zsh (which runs that of bash) or fish."""
    from .arguments import build_parser

    [commands] = [action.choices for action in build_parser()._actions if isinstance(action.choices, dict)]
    print(fish(commands) if args.shell == "fish" else ZSH * (args.shell == "zsh") + bash(commands))


def bash(commands: dict[str, argparse.ArgumentParser]) -> str:
    """For bash: a case for each flag with a choice of values, then one for the flags of each command."""
    cases = []
    for name, parser in commands.items():
        for action in parser._actions:
            if action.choices and action.option_strings:
                values, before = " ".join(map(str, action.choices)), f"*:{name}:"
                cases.append(f'    {"|".join(before + flag for flag in action.option_strings)}) words="{values}" ;;')
        flags = " ".join(flag for action in parser._actions for flag in action.option_strings)
        cases.append(f'    *:{name}:*) words="{flags}" ;;')
    return BASH.format(commands=" ".join(commands), cases="\n".join(cases))


def fish(commands: dict[str, argparse.ArgumentParser]) -> str:
    """For fish: a line for each command and each flag, with its help."""
    lines = []
    for name, parser in commands.items():
        lines.append(f"complete -c minigemma -n __fish_use_subcommand -f -a {name} -d {_quoted(parser.description)}")
        for action in parser._actions:
            flags = [f"-l {f[2:]}" if f[:2] == "--" else f"-s {f[1:]}" for f in action.option_strings]
            if not flags:
                continue
            values = f" -x -a {_quoted(' '.join(map(str, action.choices)))}" if action.choices else ""
            takes = "" if values or action.nargs == 0 else " -r"
            where = f"-n '__fish_seen_subcommand_from {name}'"
            told = _quoted((action.help or "").replace("%(default)s", str(action.default)))
            lines.append(f"complete -c minigemma {where} {' '.join(flags)}{values}{takes} -d {told}")
    return "\n".join(lines)


def _quoted(text: str | None) -> str:
    return "'" + (text or "").replace("\\", "\\\\").replace("'", "\\'") + "'"
