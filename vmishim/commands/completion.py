"""``vmishim completion``: completion scripts for shells, generated from the parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

_PREAMBLE = {
    "bash": '_vmishim_domains() { compgen -W "$(vmishim domains --names 2>/dev/null)" -- "$1"; }',
    "zsh": '_vmishim_domains() { compadd -- ${(f)"$(vmishim domains --names 2>/dev/null)"} }',
}


def completion(options: argparse.Namespace) -> int:
    """Print the script; ``options.parser`` is the parser of the whole command line."""
    if options.shell == "fish":  # shtab does not support it
        print("\n".join(fish(options.parser)))
        return 0
    import shtab

    print(shtab.complete(options.parser, options.shell, preamble=_PREAMBLE[options.shell]))
    return 0


def fish(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The lines of a fish completion script."""
    yield "complete -c vmishim -f"
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    texts = {choice.dest: choice.help for choice in commands._choices_actions}
    for name, command in commands.choices.items():
        yield f"complete -c vmishim -n __fish_use_subcommand -a {name} -d {_quoted(texts[name])}"
        inside = f"complete -c vmishim -n '__fish_seen_subcommand_from {name}'"
        for action in command._actions:
            about = f" -d {_quoted(action.help)}" if action.help else ""
            if action.option_strings:
                options = (
                    f" -l {word[2:]}" if word.startswith("--") else f" -s {word[1:]}" for word in action.option_strings
                )
                takes = "" if action.nargs == 0 else " -r -F"
                if action.choices:
                    takes = f" -x -a {_quoted(' '.join(action.choices))}"
                yield inside + "".join(options) + takes + about
            elif action.choices:
                yield f"{inside} -a {_quoted(' '.join(action.choices))}"
            elif hasattr(action, "complete"):
                yield f"{inside} -a {_quoted(action.complete['fish'])}" if action.complete["fish"] else f"{inside} -F"


def _quoted(text: str | None) -> str:
    plain = (text or "").replace("%(default)s", "").replace(" ()", "")
    return "'" + plain.replace("\\", "\\\\").replace("'", "\\'") + "'"
