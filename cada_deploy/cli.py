"""The command `cada-deploy`: a group that imports one command's file when it is called.

Every file of `commands/` that holds a click command named `command` is a command; its name is the
file's, with '-' for '_'. Errors that a person can mend are printed without a traceback.
"""

from __future__ import annotations

import ast
import os
import pkgutil
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from cada_deploy import __version__, commands
from cada_deploy.errors import INTERRUPTED, CadaError, nearest


class LazyGroup(click.Group):
    """Lists the folder; imports a command only to run it or to show its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(commands.__path__))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = import_module(f"{commands.__name__}.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Each command with its first sentence, read from its file: a list imports nothing."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _first_sentence(name)) for name in self.list_commands(ctx)])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.list_commands(ctx):
            ctx.fail(
                f"no command is called {args[0]!r}; {nearest(args[0], self.list_commands(ctx))}"
            )
        return super().resolve_command(ctx, args)


def _first_sentence(name: str) -> str:
    path = Path(commands.__path__[0]) / f"{name.replace('-', '_')}.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == "command":
            paragraph = (ast.get_docstring(node) or "").partition("\n\n")[0]
            return " ".join(paragraph.split()).partition(". ")[0].rstrip(".")
    raise AssertionError(f"{path.name} has no function `command`")


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="cada-deploy")
def group() -> None:
    """Category-adaptive pseudo labels for semantic segmentation.

    \b
    Exit codes: 0 done; 1 failed on the way; 2 usage; 3 something is not installed;
    4 an artefact does not fit; 5 a check failed; 6 done, but some inputs were rejected;
    130 interrupted.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run and exit with the code of the table in docs/formats.md."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code: Any = group.main(args=arguments, standalone_mode=False)
    except CadaError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; what is finished is safe, and the same command goes on", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MemoryError:
        _fail("out of memory; lower --workers, or give a smaller --size", 1)
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)
