"""What the commands share, which a reader of the paper may skip: files that are whole
or absent, progress, one line for a mistake.
"""

import argparse
import contextlib
import difflib
import io
import os
import sys
import time
import zipfile
from concurrent.futures import BrokenExecutor
from pathlib import Path

import torch

from data import UserError


def write_atomically(path, content):
    """Bytes into a temporary file, then renamed: path is the old file or the new."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path, value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomically(path, buffer.getvalue())


@contextlib.contextmanager
def reading(path):
    """Whatever is wrong with a file is told in one line; a damaged one fails in many
    ways, also after it was read.
    """
    try:
        yield
    except (UserError, MemoryError, torch.cuda.OutOfMemoryError):
        raise  # no fault of the file's
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} does not exist: train it first") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:
        reason = f"{type(error).__name__} {error}"[:120]
        raise UserError(f"{path} is damaged or not ours ({reason})") from None


def load_tensors(path, device="cpu"):
    """What torch.save wrote, tensors and plain values; UserError for anything else."""
    with reading(path):
        file = io.BytesIO(path.read_bytes())
        if zipfile.ZipFile(file).testzip():  # torch.load doesn't look at checksums
            raise ValueError("other bytes than were written")
        file.seek(0)
        return torch.load(file, map_location=device, weights_only=True)


def put(text, stream):
    """To standard output or error; a full disk, or a reader who left, ends nothing."""
    try:
        if stream is not None:
            stream.write(text)
            stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def on_terminal():
    return sys.stderr is not None and sys.stderr.isatty()


def say(line):
    """Prints a line, on a terminal in place of what shows the progress."""
    put("\r\033[K" * on_terminal(), sys.stderr)
    put(f"{line}\n", sys.stdout)


class progress:
    """How much of a total is done, on standard error: a line that a terminal shows in
    place; elsewhere one after four seconds, then ever more rarely, and at the end.
    """

    def __init__(self, what, unit, total, done=0):
        self.what, self.unit, self.total, self.note = what, unit, total, ""
        self.n = self.n_before = done
        self.start = self.shown = time.monotonic()
        self.wait, self.longest_wait = (0.5, 0.5) if on_terminal() else (4, 60)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if time.monotonic() > self.start + self.wait or self.shown > self.start:
            self.show(end="\n")

    def update(self, more=1):
        self.n += more
        if self.n < self.total and time.monotonic() > self.shown + self.wait:
            self.show(end="" if on_terminal() else "\n")
            self.wait = min(2 * self.wait, self.longest_wait)

    def show(self, end):
        self.shown = time.monotonic()
        minutes = (self.shown - self.start) / 60
        line = f"{self.what}: {self.n:,} of {self.total:,}{self.unit}"
        if self.n > self.n_before:
            left = minutes / (self.n - self.n_before) * (self.total - self.n)
            line += f", {minutes:.1f} minutes, {left:.1f} left"
        line += f", {self.note}" if self.note else ""
        put(f"\r{line}\033[K{end}" if on_terminal() else line + end, sys.stderr)


class Parser(argparse.ArgumentParser):
    """Every mistake is a UserError, which names the command and the nearest flag."""

    def __init__(self, **how):
        super().__init__(**{"allow_abbrev": False} | how)

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, *arguments):
        given, unknown = super().parse_known_args(*arguments)
        if unknown:  # told here, for a subcommand: it knows the flags
            flags, flag = self._option_string_actions, unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, flags, 1)
            hint = f", did you mean {near[0]}?" if near else ""
            self.error(f"unknown: {' '.join(unknown)}{hint}")
        return given, unknown


def whole(text):
    """A whole number, 1e5 too."""
    if not float(text).is_integer():
        raise ValueError
    return int(float(text))


def positive(text):
    if whole(text) < 1:
        raise ValueError
    return whole(text)


def folder(text):
    return Path(text).expanduser()  # a shell does not, within quotes or after =


def program(name, command):
    """command(); 0, 2 after a line for what its user can mend, 130 after Ctrl-C."""
    threads = torch.get_num_threads()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a β costs no training
            stream.reconfigure(errors="replace")
    try:
        command()
        return 0
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError, BrokenExecutor) as error:
        reason = error
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
        if not full and "DefaultCPUAllocator" not in str(error):
            raise
        reason = "memory is full; smaller settings, or fewer --seeds at a time"
    finally:
        torch.set_num_threads(threads)
    put(f"{name}: {' '.join(str(reason).split())}\n", sys.stderr)
    return 2
