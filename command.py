"""What all commands share: arguments, errors and output.

    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=number(int, 0, 512), default=8)
    ...
    run_command(main)

An error of the user, such as a wrong flag or a missing file, is one line that names it. This file
needs the standard library, and no other file of the project.
"""

import argparse
import io
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

# ---- arguments ----

class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but an error is one line, without the usage. Subparsers inherit this.

    An argument without a `type` must not be empty: in `--init "$RUN"`, the variable may be unset.
    With fromfile_prefix_chars="@", @FILE stands for the lines of a text file, each an argument;
    empty lines and those that begin with # are ignored.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register("type", None, not_empty)

    def add_subparsers(self, **options):
        action = super().add_subparsers(**options)
        action.type = str  # its values are all that follows, which the subparser checks
        return action

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        try:
            return super().parse_known_args(args, namespace)
        except UnicodeError:
            lists = [arg for arg in args if arg.startswith("@")]
            self.error(f"{' '.join(lists)}: not a text file in UTF-8")

    def convert_arg_line_to_args(self, line):
        """The arguments in a line of @FILE: one or none."""
        line.encode()  # raises UnicodeError where Python 3.12 escaped bytes that are not UTF-8
        line = line.strip()
        return [line] if line and not line.startswith("#") else []

    def error(self, message):
        wait_for_rank_zero()
        message = message.partition("[Errno ")[2].partition("] ")[2] or message  # of @FILE
        self.exit(2, f"{self.prog}: {one_line(message)}; see --help\n")


def not_empty(text):
    """An argparse type: a str that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def number(kind, low=None, high=None, above=None):
    """An argparse type: an int or a float from `low` to `high`, or greater than `above`.

        parser.add_argument("--workers", type=number(int, 0, 512))

    It accepts what `kind` accepts, except nan, inf and "1_000".
    """
    noun = "a whole number" if kind is int else "a number"
    limits = {"at least": low, "greater than": above, "at most": high}
    limits = [f"{words} {limit}" for words, limit in limits.items() if limit is not None]
    if low is not None and high is not None:
        limits = [f"from {low} to {high}"]
    limits = " and ".join(limits)

    def parse(text):
        try:
            value = kind(text)
            if "_" in text or abs(value) == math.inf or value != value:
                raise ValueError
        except ValueError:
            expected = f"{noun}, {limits}" if limits else noun
            raise argparse.ArgumentTypeError(f"must be {expected}, not {text!r}") from None
        if (low is not None and value < low or high is not None and value > high
                or above is not None and value <= above):
            raise argparse.ArgumentTypeError(f"must be {limits}, not {text!r}")
        return value

    return parse


# ---- the run of a command ----

def run_command(main, on_interrupt=None, on_out_of_memory="", output="report"):
    """Run `main()` as a command that prints one line, not a traceback, for errors of the user.

    OSError, ValueError and ImportError print `script.py: error`, and the exit status is 1.

    Args:
        on_interrupt: text to append to `script.py: interrupted`, which Ctrl-C prints, such as how
            to resume. SIGTERM is then handled like Ctrl-C.
        on_out_of_memory: text to append to `script.py: not enough memory`, such as what to lower.
        output: what is printed. "report": for people; characters that the terminal cannot show are
            escaped. "data": the result, written exactly, in UTF-8. "log": a report that the command
            does without; it continues when its reader ends or the disk is full.
    """
    path = Path(sys.argv[0])
    script = f"extras.{path.stem}" if path.parent.name == "extras" else path.name
    if sys.platform == "win32":
        sys.exit(f"{script}: runs on Linux and macOS; on Windows, use WSL")
    if on_interrupt:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    open_output(output)
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(f"{script}: interrupted" + (f"; {on_interrupt}" if on_interrupt else ""))
    except BrokenPipeError:  # the reader, such as `| head`, has closed the pipe
        sys.exit(1)
    except (OSError, ValueError, ImportError) as error:
        wait_for_rank_zero()
        sys.exit(f"{script}: {one_line(describe_error(error))}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        wait_for_rank_zero()
        size = re.search(r"allocate ([\d.]+) (bytes|\wiB)", str(error))
        size = f" for {float(size[1]):,.0f} {size[2]} more" if size else ""
        sys.exit(f"{script}: not enough memory{size}{on_out_of_memory}")


def one_line(text):
    """Escape control characters, such as line breaks and terminal commands, as Python does."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def describe_error(error):
    """The text of an error. Python's "[Errno 13] Permission denied: 'x'" becomes "x: reason"."""
    if not isinstance(error, OSError) or error.filename is None or not error.strerror:
        return str(error)
    is_missing = isinstance(error, FileNotFoundError)
    return f"{error.filename}: {'no such file or folder' if is_missing else error.strerror}"


def is_out_of_memory(error):
    """Whether an error of Python, numpy or torch says that there is not enough memory."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED"))


def wait_for_rank_zero():
    """Under torchrun, let rank zero print the error that all ranks have.

    torchrun ends the other processes when one ends with an error.
    """
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)


# ---- output ----

class OutputFile(io.FileIO):
    """Standard output or error as a binary file, whose first error names it.

    What is printed after that error is dropped. is_optional: this error is dropped, too.
    """

    def __init__(self, descriptor, name, is_optional):
        super().__init__(descriptor, "w", closefd=False)
        self.label, self.is_optional = name, is_optional

    def write(self, data):
        try:
            return super().write(data) or len(data)
        except OSError as error:
            if self.is_optional:
                return len(data)
            self.is_optional = True
            raise OSError(error.errno, error.strerror, self.label) from None


def open_output(output):
    """Prepare sys.stdout and sys.stderr for a command. output: that of run_command."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the command began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif stream is getattr(sys, f"__{name}__"):  # not what a test replaced it with
            stream.flush()
            file = OutputFile(stream.fileno(), name, name == "stderr" or output == "log")
            setattr(sys, name, io.TextIOWrapper(
                io.BufferedWriter(file),
                encoding="utf-8" if output == "data" else stream.encoding,
                errors=stream.errors if output == "data" else "backslashreplace",
                line_buffering=stream.line_buffering or stream.write_through))
