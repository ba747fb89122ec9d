"""The words a user types. No decisions here, and nothing heavy at import: `--help` answers at once."""

from __future__ import annotations

import errno
import signal
import sys
from typing import NoReturn

import click

from exporter import __version__
from exporter.errors import ExporterError, nearest

GROUPS = {
    "discover": ("variants", "doctor", "recipes", "inspect"),
    "build": ("onnx", "openvino", "trt"),
    "measure": ("calibrate", "verify", "bench"),
    "pipeline": ("run", "compare", "report"),
}


class Verbs(click.Group):
    """The verbs, in their groups; each is imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every verb, in the order of the groups."""
        return [verb for verbs in GROUPS.values() for verb in verbs]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb, from the file of its group."""
        import importlib

        for group, verbs in GROUPS.items():
            if cmd_name in verbs:
                module = importlib.import_module(f"exporter.cli.{group}")
                command: click.Command = getattr(module, f"{cmd_name}_command")
                return command
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb of a command line, or the nearest there is."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(f"no verb {args[0]!r}; {nearest(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The verbs by group."""
        for group, verbs in GROUPS.items():
            rows = [(verb, command.short_help or "") for verb in verbs if (command := self.get_command(ctx, verb))]
            with formatter.section(group.capitalize()):
                formatter.write_dl(rows)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="convnext-export")
def cli() -> None:
    """Take a ConvNeXt from PyTorch to ONNX, OpenVINO and TensorRT, and prove that what runs is still the same model.

    \b
    convnext-export onnx --variant base
    convnext-export openvino --weights my_convnext.pth --fp16
    convnext-export trt --int8 --calib my_images
    convnext-export verify build/base_fp32.onnx --data imagenet/val
    convnext-export bench build/base_fp32.onnx build/base_fp32.xml
    convnext-export run onnxruntime/tiny_int8
    """


def main() -> NoReturn:
    """Run a command line; every error a user can mend is one line and an exit code."""
    for name in ("SIGTERM", "SIGHUP"):  # as CI and a closed terminal send them
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ExporterError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted: nothing is torn; run the same command again", err=True)
        sys.exit(4)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        click.echo(f"error: {str(error.filename or 'output')[:200]}: {error.strerror}", err=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
