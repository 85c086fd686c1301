"""The command `newllm`.

Results go to standard output, progress and messages to standard error. Exit status: 0 done, 1 failed or interrupted,
2 wrong usage. NEWLLM_DEBUG=1 shows the traceback behind a message; a bug of the library shows its traceback always.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from typing import Any

import click

from newllm_lib.cli import compare, inference, legacy, sharing, studies, training, tuning
from newllm_lib.cli.output import echo
from newllm_lib.errors import NewLLMError
from newllm_lib.escaping import terminal_text
from newllm_lib.system.console import occupy_standard_streams


class Messages(click.Group):
    """Our own exceptions and exhausted memory become one message; anything else is a bug and shows its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        occupy_standard_streams()
        if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may hold what is no character
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            echo("interrupted", err=True)
            ctx.exit(1)
        except click.ClickException as error:
            error.message = terminal_text(error.message)
            raise
        except (NewLLMError, MemoryError) as error:
            if os.environ.get("NEWLLM_DEBUG"):
                raise
            raise click.ClickException(terminal_text(error) or "memory ran out") from error
        except RuntimeError as error:  # as torch says that memory ran out
            from newllm_lib.system.memory import is_out_of_memory

            if os.environ.get("NEWLLM_DEBUG") or not is_out_of_memory(error):
                raise
            said = str(error).strip().partition("\n")[0]
            raise click.ClickException(terminal_text(f"memory ran out: {said}")) from error
        except OSError as error:
            if error.errno == errno.EPIPE or not _is_of_the_output(error):  # click knows what to do of a closed pipe
                raise
            raise click.ClickException(f"cannot write to standard output: {error.strerror}") from error


def _is_of_the_output(error: OSError) -> bool:
    """Whether what was printed could not be written: a disk behind `newllm ... > file` may be full."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_code is click.echo.__code__


@click.group(cls=Messages, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 118})
@click.version_option(package_name="newllm_lib", prog_name="newllm")
def main() -> None:
    """Train, study and share New-LLM, a language model with a fixed-size context instead of attention."""


for _command in (
    training.train,
    training.continue_,
    training.list_presets,
    training.write_config,
    inference.evaluate,
    inference.generate,
    compare.compare,
    legacy.import_,
    sharing.export,
    sharing.bundle,
    sharing.open_,
    tuning.probe,
    tuning.lr_find,
    studies.precisions,
    studies.lr_scaling,
    studies.bench,
):
    main.add_command(_command)
