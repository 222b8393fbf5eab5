"""A command with subcommands, and the order in which all commands are listed."""

from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperGroup


class CommandGroup(TyperGroup):
    """A command that has subcommands: it is meant where the first word is none of their names.

    What is named like a subcommand is given as a path (./compare), or after --.
    """

    allow_extra_args = False
    allow_interspersed_args = True

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        if args and args[0] in self.commands:
            words = f"{info_name} {args[0]}"
            return self.commands[args[0]].make_context(words, args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        first = args[0] if args else ""
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as error:
            near = get_close_matches(first, self.commands)
            if near and "unexpected extra argument" in error.message:
                error.message = f"{error.message}. Did you mean '{ctx.info_name} {near[0]}'?"
            raise


class Verbs(TyperGroup):
    """All commands, in the order of the loop: groups too, which would come last."""

    order: tuple[str, ...] = ()

    def list_commands(self, ctx: Any) -> list[str]:
        def place(name: str) -> int:
            return self.order.index(name) if name in self.order else len(self.order)

        return sorted(super().list_commands(ctx), key=place)
