"""The ``mmrec`` command: its subcommands, and one way to report errors for all of them."""

import atexit
import errno
import io
import os
import sys
from contextlib import suppress
from importlib import metadata
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from cli import (
    backbones,
    compare,
    datasets,
    demo,
    doctor,
    evaluate,
    export,
    export_dataset,
    export_features,
    extract,
    grid,
    import_features,
    maps,
    models,
    prepare,
    pretrain,
    pull_features,
    push_features,
    recommend,
    report,
    runs,
    sql,
    train,
    tune,
)
from cli.console import err, notify
from features.errors import UserError, shorten
from features.memory import memory_errors
from features.process_watch import LostProcessError
from features.signals import exit_code, handle_signals

_UsageError: Any = typer.BadParameter.__base__  # typer does not export its usage error
_MEMORY_REMEDY = (
    "free memory, raise the limit of the process (ulimit -v), or give smaller batches or models"
)
_LONGEST_MESSAGE = 4000
"""Characters of an error; paths have at most 4,096 bytes, and most are far shorter."""
_RENAMED = {"--unmasked": "--keep-seen"}  # options of earlier versions
_REMEDIES = {
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "free disk space, or raise your quota",
    errno.EACCES: "change the permissions, or give another folder",
    errno.EPERM: "change the permissions, or give another folder",
    errno.EROFS: "give a folder that can be written to",
    errno.EFBIG: "raise the limit of the size of files (ulimit -f), or give another disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "remove the circle of links",
    errno.ENOTDIR: "a part of the path is a file; give another path",
    errno.EISDIR: "give a file, not a folder",
}
"""What to do about an error of the operating system."""


class Group(TyperGroup):
    """The commands; a mistake of the user in any of them is one line and exit code 2.

    Too little memory is one line and exit code 1.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse the words before the command, where only ``--help`` and ``--version`` are valid."""
        if not args:
            return super().parse_args(ctx, args)  # prints the help text
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            reason = " ".join(error.format_message().split())
            _fail(f"{reason}; give options after the command. See: {ctx.command_path} --help")

    def make_context(self, *words: Any, **options: Any) -> Any:
        """Parse the command line; a signal meanwhile ends the command as in :meth:`invoke`."""
        try:
            return super().make_context(*words, **options)
        except KeyboardInterrupt:
            _interrupted()

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with memory_errors("mmrec", _MEMORY_REMEDY):
                return super().invoke(ctx)
        except LostProcessError as error:
            err.quiet = False  # processes of torchrun other than the first are quiet
            notify(f"error: {error}")
            os._exit(error.exit_code)  # libraries would first report what a failed collective left
        except UserError as error:
            if error.is_reported:
                raise typer.Exit(error.exit_code) from None
            err.quiet = False
            _fail(str(error), error.exit_code)
        except _UsageError as error:
            _fail(_usage_message(error))
        except BrokenPipeError:
            raise  # the reader of the output has closed it: typer ends quietly
        except OSError as error:  # such as a full disk or a read-only folder
            _fail(_system_message(error))
        except KeyboardInterrupt:
            _interrupted()
        except RuntimeError as error:
            if str(error) != "Query interrupted":  # DuckDB raises this error at Ctrl-C
                raise
            _interrupted()


def _usage_message(error: Any) -> str:
    old_name = getattr(error, "option_name", None)
    if old_name in _RENAMED:
        return f"option {old_name} has a new name; give {_RENAMED[old_name]}"
    reason = " ".join(error.format_message().split())
    return f"{reason} See: {error.ctx.command_path if error.ctx else 'mmrec'} --help"


def _system_message(error: OSError) -> str:
    """Return an error of the operating system as one line: the place, the reason, the remedy."""
    place = f"{error.filename}: " if error.filename else ""
    remedy = _REMEDIES.get(error.errno or 0, "see to the disk and the folder")
    return (
        f"{place}{error.strerror or error}; {remedy}; files that were complete before are unchanged"
    )


def _fail(message: str, exit_code: int = 2) -> NoReturn:
    notify(f"error: {shorten(message, _LONGEST_MESSAGE)}")
    raise typer.Exit(exit_code) from None


def _interrupted() -> NoReturn:
    notify("interrupted")
    raise typer.Exit(exit_code()) from None


app = typer.Typer(
    name="mmrec",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help texts are plain: names in brackets are no markup
    help="Multimodal sequential recommendation: extract features once, train lightly, rank all.",
)


@app.callback(invoke_without_command=True)
def _mmrec(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True)
    ] = False,
) -> None:
    if version:
        typer.echo(f"mmrec {metadata.version('mmrec')}")
        raise typer.Exit


app.command("datasets")(datasets.datasets)
app.command("prepare")(prepare.prepare)
app.command("export-dataset")(export_dataset.export_dataset)
app.command("backbones")(backbones.backbones)
app.command("extract")(extract.extract)
app.command("import-features")(import_features.import_features)
app.command("export-features")(export_features.export_features)
app.command("push-features")(push_features.push_features)
app.command("pull-features")(pull_features.pull_features)
app.command("models")(models.models)
app.command("train")(train.train)
app.command("pretrain")(pretrain.pretrain)
app.command("eval")(evaluate.evaluate)
app.command("recommend")(recommend.recommend)
app.command("export")(export.export)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("runs")(runs.runs)
app.command("map")(maps.draw_map)
app.command("grid")(grid.grid)
app.command("tune")(tune.tune)
app.command("sql")(sql.sql)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run the command line; the entry point of the console script."""
    # Threads of torch that spin while they wait slow down shared cores. The variable takes effect
    # only if it is set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode shows escapes
            stream.reconfigure(errors="backslashreplace")
    code = 0

    def skip_teardown() -> None:
        """End an interrupted process at once: Python would collect torch's objects for a second."""
        if code == exit_code():
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # the reader of the output has closed it
                    stream.flush()
            os._exit(code)

    atexit.register(skip_teardown)  # runs after the functions that are registered later
    with handle_signals():
        try:
            app()
        except KeyboardInterrupt:  # before the command line is parsed, or after the command
            notify("interrupted")
            code = exit_code()
            raise SystemExit(code) from None
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            raise


if __name__ == "__main__":  # torchrun --nproc-per-node 2 -m cli.app train ...
    main()
