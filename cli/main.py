"""The command line. Each command lies beside what it prints; it parses, calls one function, prints. Heavy imports wait
inside its body.

Exit codes: 0 done, 1 a check failed, 2 bad usage or input, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any

import click

from ditc.cli.compiling import build_command, compile_command, demo_command
from ditc.cli.diagnosing import bisect_command, doctor_command, export_polygraphy_command
from ditc.cli.inspecting import inspect_command
from ditc.cli.judging import evaluate_command, tune_command
from ditc.cli.progress import advice_on_stderr
from ditc.cli.reporting import report_command
from ditc.cli.running import run_command, verify_command
from ditc.cli.timing import bench_command, estimate_command
from ditc.errors import CheckError, DitcError, one_line

__all__ = ["cli", "main"]

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
# how click says that it printed the help; 8.1 prints it, and says nothing
NO_ARGUMENTS: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())


def main() -> None:
    """Run the command line; every error that is ours becomes one line on stderr."""
    for stream in (sys.stdout, sys.stderr):  # a path may hold what the locale can't write
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command line, and return its exit code."""
    try:
        with advice_on_stderr():
            return int(cli.main(args=list(arguments), prog_name="ditc", standalone_mode=False) or 0)
    except NO_ARGUMENTS as e:
        e.show()
        return BAD_INPUT
    except click.ClickException as e:
        command = e.ctx.command_path if isinstance(e, click.UsageError) and e.ctx is not None else "ditc"
        message = one_line(e.format_message().rstrip("."))
        click.echo(f"ditc: {message}; `{command} --help` lists what it takes", err=True)
        return e.exit_code
    except CheckError as e:
        click.echo(f"ditc: check failed: {e}", err=True)
        return FAILED
    except DitcError as e:
        click.echo(f"ditc: {e}", err=True)
        return BAD_INPUT
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] == "ditc":
            raise
        click.echo(f"ditc: this command needs {e.name}; install it with: pip install 'ditc[export]'", err=True)
        return BAD_INPUT
    except OSError as e:
        click.echo(one_line(f"ditc: {e.filename or 'a file'}: {e.strerror or e}"), err=True)
        return BAD_INPUT
    except (KeyboardInterrupt, click.Abort):
        click.echo("ditc: interrupted; nothing half-written is left, the same command goes on from here", err=True)
        return INTERRUPTED


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="ditc")
def cli() -> None:
    """Compile the whole denoising trajectory of a diffusion transformer: INT8, feature cache, variance compensation."""


COMMANDS = (
    compile_command,
    run_command,
    build_command,
    inspect_command,
    export_polygraphy_command,
    doctor_command,
    demo_command,
    tune_command,
    verify_command,
    evaluate_command,
    report_command,
    bench_command,
    estimate_command,
    bisect_command,
)
for _command in COMMANDS:
    cli.add_command(_command)
