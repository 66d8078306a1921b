"""Ways to disturb what the tests run: a script in a fork, signals, limits, and stops as a file is about to change."""

import builtins
import contextlib
import os
import resource
import runpy
import signal
import sys
import time

import torch

import train_vqa as vqa
from tests.conftest import ROOT
from tests.warm import renew_after_fork

SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
_watchers = []  # an audit hook cannot be taken back: one is added once, and calls whoever watches last


def _hook(event, arguments):
    if not _watchers:
        return
    written = event == "open" and (arguments[1] is None or set(str(arguments[1])) & set("wxa+"))
    if written or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        _watchers[-1](event, str(arguments[0]))


@contextlib.contextmanager
def watching(on_change):
    """Calls `on_change(event, path)` before each operation that changes files; what it raises ends the operation."""
    if not hasattr(sys, "_vqa_tests_watch"):
        sys.addaudithook(_hook)
        sys._vqa_tests_watch = True
    _watchers.append(on_change)
    try:
        yield
    finally:
        _watchers.pop()


class Script:
    """A script of this project, run as `python script flags` would, but in a fork, which has torch already.

    No file grows beyond `file_limit` bytes; as a line that starts with `stop_at` is printed it gets a SIGTERM; `env` is
    added to its environment.
    """

    def __init__(self, name, flags, file_limit=None, stop_at=None, env=()):
        self.status, self.printed = None, b""
        self.reader, writer = os.pipe()  # no file, which `file_limit` would keep short
        os.set_blocking(self.reader, False)
        self.pid = os.fork()
        if self.pid:
            os.close(writer)
            return
        status = 99
        try:
            os.setsid()
            os.environ.update(env)
            renew_after_fork(torch.get_num_threads())
            for cached in (vqa.ranks_store, vqa.is_first_to_fail):  # of an earlier test in this process
                cached.cache_clear()
            os.dup2(writer, 1), os.dup2(writer, 2)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
            if file_limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, -1))
            if stop_at:
                plain = builtins.print
                builtins.print = lambda *words, **how: (
                    plain(*words, **how),
                    str(*words[:1]).startswith(stop_at) and os.kill(os.getpid(), signal.SIGTERM),
                )
            sys.argv = [str(ROOT / name), *map(str, flags)]
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException as error:
                print("Traceback", repr(error), file=sys.stderr)
        finally:
            os._exit(status)

    def said(self):
        """What it printed so far, progress bars and all."""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.reader, 2**16):
                self.printed += part
        return self.printed.decode()

    def poll(self):
        """Its exit status, below 0 for a signal; None while it runs."""
        self.said()
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def wait_for(self, condition):
        """Until the condition holds; fails where the script ends before."""
        deadline = time.time() + 120
        while not condition():
            assert self.poll() is None and time.time() < deadline, self.said()
            time.sleep(0.003)

    def send(self, number, group=False):
        (os.killpg if group else os.kill)(self.pid, number)

    def end(self):
        """Wait for its end; returns the exit status."""
        deadline = time.time() + 120
        while self.poll() is None:
            assert time.time() < deadline, self.said()
            time.sleep(0.003)
        return self.status

    def end_now(self):
        """Kill it, and all that it started, where it still runs."""
        if self.poll() is None:
            self.send(signal.SIGKILL, group=True)
            self.end()


@contextlib.contextmanager
def interrupted(folder, at):
    """Raises KeyboardInterrupt as the `at`-th change below `folder` begins; yields the list of changes so far."""
    seen = []

    def count(event, path):
        if str(folder) in path:
            seen.append((event, path))
            if len(seen) == at:
                raise KeyboardInterrupt

    with watching(count):
        yield seen
