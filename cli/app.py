"""The ``mmrec`` command: its parts, and how every error ends."""

import io
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from cli import (
    backbones,
    compare,
    datasets,
    demo,
    doctor,
    evaluate,
    extract,
    grid,
    models,
    prepare,
    pretrain,
    recommend,
    report,
    sql,
    train,
)
from cli.console import notify
from features.errors import UserError

_UsageError: Any = typer.BadParameter.__base__  # of the click that typer brings


class Group(TyperGroup):
    """Turns the user's mistakes into one line and exit code 2, whichever command they are in."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Find a command; the help of a flag names no type, for it takes no value."""
        command = super().get_command(ctx, cmd_name)
        for option in getattr(command, "params", ()):
            if getattr(option, "is_flag", False) and option.metavar is None:
                option.metavar = ""
        return command

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Read what stands before the command, where no option but --help belongs."""
        if not args:
            return super().parse_args(ctx, args)  # which is help
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            said = " ".join(error.format_message().split())
            notify(
                f"error: {said}; options stand after the command. See: {ctx.command_path} --help"
            )
            raise typer.Exit(2) from None

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            notify(f"error: {error}")
            raise typer.Exit(2) from None
        except _UsageError as error:
            said = " ".join(error.format_message().split())
            notify(f"error: {said} See: {error.ctx.command_path if error.ctx else 'mmrec'} --help")
            raise typer.Exit(2) from None
        except BrokenPipeError:
            raise  # whoever read the output has seen enough
        except OSError as error:  # a full disk, a folder that may not be written
            place = f"{error.filename}: " if error.filename else ""
            notify(
                f"error: {place}{error.strerror or error}; nothing that was whole before is lost"
            )
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            notify("interrupted")
            raise typer.Exit(130) from None
        except RuntimeError as error:
            if str(error) != "Query interrupted":  # what DuckDB makes of Ctrl-C
                raise
            notify("interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="mmrec",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Multimodal sequential recommendation: extract features once, train lightly, rank all.",
)
app.command("datasets")(datasets.datasets)
app.command("prepare")(prepare.prepare)
app.command("backbones")(backbones.backbones)
app.command("extract")(extract.extract)
app.command("models")(models.models)
app.command("train")(train.train)
app.command("pretrain")(pretrain.pretrain)
app.command("eval")(evaluate.evaluate)
app.command("recommend")(recommend.recommend)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("grid")(grid.grid)
app.command("sql")(sql.sql)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Entry point of the console script."""
    # On cores that are shared, threads that spin while they wait cost more than all the work; it
    # must be said before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without UTF-8 shows escapes
            stream.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":  # torchrun --nproc-per-node 2 -m cli.app train ...
    main()
