"""Run a command as a user types it."""

from typer.testing import CliRunner, Result

from cli.app import app


def run(*arguments: str, code: int = 0) -> Result:
    """Run a command, check its exit code, and return what it printed."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (arguments, result.output, result.exception)
    return result
