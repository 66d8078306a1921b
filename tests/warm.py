"""A `python` for commands under test that has torch and transformers already, whose import takes 6 s a process.

It is a client of a fork of the tests, which forks for each client. Such a fork drops the modules of this project, and
imports them from where its script lies.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import torch
import tqdm.auto

ROOT = str(Path(__file__).resolve().parent.parent)
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"."], [0, 1, 2])
server.sendall(json.dumps([{itself!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode())
server.shutdown(socket.SHUT_WR)
answers = server.makefile()
pid = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, _: os.kill(pid, number))
status = int(answers.readline() or 99)
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def default_signals():
    """What a shell in a terminal hands on, whatever started these tests."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def renew_after_fork(threads):
    """What a fork of the tests cannot share with them, and a process of its own would have anew."""
    default_signals()
    torch.set_num_threads(threads)  # renews torch's pool; two threads at once would break it
    for bars in (tqdm.tqdm, tqdm.auto.tqdm):  # forks share their own lock, and one that is stopped may hold it
        bars.set_lock(threading.RLock())


def interpret(words):
    """What `python words` does, for the words that the scripts and torchrun use."""
    words = [*filter(lambda word: word != "-u", words[:1]), *words[1:]]
    kind, places = words[0], os.environ.get("PYTHONPATH", "").split(os.pathsep)
    first = "" if kind in ("-", "-c", "-m") else str(Path(kind).resolve().parent)
    sys.path[:] = [first, *filter(None, places), *(p for p in sys.path if p.startswith((sys.prefix, sys.base_prefix)))]
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_pytest")]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.startswith(f"{ROOT}/") and not file.startswith(sys.prefix):
            del sys.modules[name]
    sys.argv = words
    if kind == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif kind in ("-", "-c"):
        sys.argv = [kind, *words[1 if kind == "-" else 2 :]]
        exec(compile(sys.stdin.read() if kind == "-" else words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(kind, run_name="__main__")


def run(handles, itself, words, folder, environment):
    """Be the process that was asked for; never returns."""
    status = 1
    try:
        for number, handle in enumerate(handles):
            os.dup2(handle, number)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        renew_after_fork(int(environment.get("OMP_NUM_THREADS", os.cpu_count())))
        sys.executable, tempfile.tempdir = itself, None
        try:
            interpret(words)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
    finally:
        os._exit(status)


def serve(server):
    """Fork for each client one process that forks the one asked for, and waits for it."""
    server.settimeout(5)
    parent = os.getppid()
    while os.getppid() == parent:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        try:
            client, _ = server.accept()
        except TimeoutError:
            continue
        if not os.fork():
            _, handles, _, _ = socket.recv_fds(client, 1, 3)
            with client.makefile() as asked:
                given = json.load(asked)
            if not (pid := os.fork()):
                client.close()
                run(handles, *given)
            client.sendall(f"{pid}\n".encode())
            client.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
            os._exit(0)
        client.close()
    os._exit(0)


@contextlib.contextmanager
def warm_python(path):
    """Makes the program `path`, which is this Python as long as the context lasts."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0vqa-tests-{os.getpid()}-{path}"[:100])
        server.listen()
        text = CLIENT.format(python=sys.executable, address=server.getsockname(), itself=str(path))
        path.write_text(text)
        path.chmod(0o755)
        if not (pid := os.fork()):
            os.setsid()
            serve(server)
    try:
        yield path
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
