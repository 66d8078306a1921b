"""Faults of files for the tests: what runs as a file is about to be written, renamed or removed."""

import sys
from contextlib import contextmanager

_watcher = []  # an audit hook cannot be taken back: one is added once, and calls whoever watches


def _hook(event, arguments):
    if not _watcher:
        return
    written = event == "open" and (arguments[1] is None or set(str(arguments[1])) & set("wxa+"))
    if written or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        _watcher[-1](event, arguments[0])


@contextmanager
def watching(on_operation):
    """Calls `on_operation(event, path)` before each operation that changes files; what it raises ends the operation."""
    if not hasattr(sys, "_vqa_tests_watch"):
        sys.addaudithook(_hook)
        sys._vqa_tests_watch = True
    _watcher.append(on_operation)
    try:
        yield
    finally:
        _watcher.pop()


@contextmanager
def interrupted(folder, at):
    """Raises KeyboardInterrupt as the `at`-th change below `folder` begins; yields the list of changes so far."""
    seen = []

    def count(event, path):
        if str(folder) in str(path):
            seen.append((event, str(path)))
            if len(seen) == at:
                raise KeyboardInterrupt

    with watching(count):
        yield seen
