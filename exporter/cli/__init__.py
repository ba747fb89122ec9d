"""Command-line interface. Commands parse, call and print; heavy libraries are imported inside functions."""

from __future__ import annotations

import _thread
import difflib
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from exporter import __version__
from exporter.cli.console import with_verbosity
from exporter.errors import ExporterError, file_error, nearest, printable

FILES = {
    "discover": ("variants", "doctor", "recipes", "inspect"),
    "optimize": ("optimize",),
    "package": ("package",),
    "measure": ("calibrate", "verify", "bench", "bisect"),
    "predict": ("predict",),
    "pipeline": ("run", "compare", "report"),
    "shards": ("shard", "merge"),
}
"""Commands by the module of this package that has them; commands that build are derived from the targets."""

REPEATED_AFTER_S = 0.05  # seconds until an interrupt that Python discarded is repeated
BUILD_WORDS = ("export", "build", "convert")


def build_commands() -> dict[str, str]:
    """Names of the build commands, each with the name of its backend."""
    from exporter import backends

    return {backends.target(name).command: name for name in backends.targets()}


def groups() -> dict[str, list[str]]:
    """All commands by group, in the order of `--help`."""
    files = {group: list(names) for group, names in FILES.items()}
    builds = [*build_commands(), *files.pop("optimize"), *files.pop("package")]
    files["measure"][-1:-1] = files.pop("predict")
    return {"discover": files.pop("discover"), "build": builds, **files}


class Commands(click.Group):
    """The commands in their groups; each is imported when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command, in the order of the groups."""
        return [name for names in groups().values() for name in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or of the backend of that name."""
        command = self._command(cmd_name)
        return command and with_verbosity(command)

    def _command(self, cmd_name: str) -> click.Command | None:
        import importlib

        for group, names in FILES.items():
            if cmd_name in names:
                module = importlib.import_module(f"exporter.cli.{group}")
                command: click.Command = getattr(module, f"{cmd_name}_command")
                return command
        backends = build_commands()
        if (backend := backends.get(cmd_name, cmd_name)) in backends.values():
            from exporter.cli import build

            return build.command(backend)
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of a command line; an unknown one is refused with the nearest name."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            builds = [name for name in build_commands() if name != "null"]  # for tests
            known = [*self.list_commands(ctx), *build_commands().values()]
            close = difflib.get_close_matches(args[0], [*known, *BUILD_WORDS], n=1, cutoff=0.5)
            hint = f"these export: {', '.join(builds)}" if set(close) & set(BUILD_WORDS) else nearest(args[0], known)
            ctx.fail(f"no command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands by group."""
        for group, names in groups().items():
            rows = [(name, command.short_help or "") for name in names if (command := self.get_command(ctx, name))]
            with formatter.section(group.capitalize()):
                formatter.write_dl(rows)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="convnext-export")
def cli() -> None:
    """Export ConvNeXt models from PyTorch to ONNX, OpenVINO and TensorRT, and compare the result with PyTorch.

    \b
    convnext-export onnx --variant base
    convnext-export openvino --weights my_convnext.pth --fp16
    convnext-export trt --int8 --calib my_images
    convnext-export optimize --weights my_convnext.pth --data my_images
    convnext-export verify build/base_fp32.onnx --data imagenet/val
    convnext-export bench build/base_fp32.onnx build/base_fp32.xml
    convnext-export run onnxruntime/tiny_int8
    """


with_verbosity(cli)


def _close(option: str, known: Iterable[str]) -> list[str]:
    """The known options whose names are close; the dashes, which all have, do not count."""
    name = option.lstrip("-")
    return [other for other in known if difflib.get_close_matches(name, [other.lstrip("-")])]


def _show(error: click.ClickException) -> None:
    """Print a usage error like any other; the words in it may be names of files, from a pattern of the shell."""
    if (context := getattr(error, "ctx", None)) is not None:
        click.echo(f"{context.get_usage()}\nTry '{context.command_path} --help' for help.\n", err=True)
    click.echo(f"error: {printable(error.format_message())}", err=True)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGTERM and SIGHUP too, as CI and a closed terminal send them, but for those that
    are ignored, as under `nohup`.

    Python discards an exception in a destructor or in the callback of a weak reference, and PyTorch's exporter runs
    many of them. If an interrupt is discarded this way, it is raised again after `REPEATED_AFTER_S`.
    """
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.default_int_handler)
    report, timers = sys.unraisablehook, list[threading.Timer]()

    def interrupt_again(discarded: sys.UnraisableHookArgs) -> None:
        if not issubclass(discarded.exc_type, KeyboardInterrupt):
            report(discarded)
        elif not any(timer.is_alive() for timer in timers):
            timer = threading.Timer(REPEATED_AFTER_S, _thread.interrupt_main, (signal.SIGTERM,))
            timer.daemon = True
            timers.append(timer)
            timer.start()

    sys.unraisablehook = interrupt_again
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        sys.unraisablehook = report


def _code() -> object:
    """The exit code of the command, 0 where nobody reads its output to the end."""
    try:
        with _interruptible():
            return cli.main(standalone_mode=False)
    except (BrokenPipeError, SystemExit):  # click exits by itself over a closed pipe alone
        return 0
    except ImportError as error:  # an extension module that was interrupted while it was loaded
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise error.__cause__ from None
        raise


def main() -> NoReturn:
    """Run a command line. An error that the user can fix is one line and an exit code."""
    try:
        code = _code()
    except click.NoSuchOption as error:
        close = _close(error.option_name, error.possibilities or ())
        _show(click.NoSuchOption(error.option_name, possibilities=close, ctx=error.ctx))
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _show(error)
        sys.exit(error.exit_code)
    except ExporterError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        interrupt = error.__cause__ or error  # click raises Abort from it
        state = str(interrupt) or "no file is incomplete; run the same command again"
        click.echo(f"interrupted: {state}", err=True)
        sys.exit(4)
    except UnicodeEncodeError as error:
        if not any("\ud800" <= sign <= "\udfff" for sign in str(error.object)):
            raise
        click.echo(f"error: {printable(str(error.object)[:200])}: a name that is no UTF-8 text; rename it", err=True)
        sys.exit(2)
    except OSError as error:
        shown = file_error(error)
        if shown is None:
            raise
        click.echo(f"error: {shown}", err=True)
        sys.exit(shown.exit_code)
    sys.exit(code if isinstance(code, int) else 0)
