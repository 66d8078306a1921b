"""Kills at every file boundary of a save, a file size limit, real signals to real process groups, locks, fuzzing."""

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

import train_vqa as vqa
from benchmarks import fuzz
from tests.conftest import small_disk
from tests.test_faults import RESUME, RUN, assert_same, result
from tests.test_main import ROOT


@pytest.fixture(scope="module", params=vqa.DECODER_TRAINING)
def trainer(tmp_path_factory, request):
    """A Trainer, of an adapter and of a whole model, after its second step, and the folder with its checkpoint-2."""
    kept, folder = [], tmp_path_factory.mktemp("trainer") / "out"
    pairs = zip(RUN[::2], RUN[1::2], strict=True)
    flags = [part for pair in pairs if request.param == "lora" or "--lora" not in pair[0] for part in pair]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqa.VQATrainer, "save_model", keep_and_save(kept))
        flags += ["--train_decoder", request.param, "--max_steps", "2", "--output_dir", str(folder)]
        assert vqa.main(flags) == 0
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    return kept[0], folder


def keep_and_save(kept):
    inner = vqa.VQATrainer.save_model

    def save_model(self, *args, **kwargs):
        kept[:] = [self]
        return inner(self, *args, **kwargs)

    return save_model


def in_a_child(trainer, folder, save, kill_at=None, limit=None):
    """`save(trainer)` into `folder` in a fork, killed as its `kill_at`-th file operation begins; how the fork ended."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 9
    try:
        trainer.args.output_dir, seen = str(folder), [0]

        def hook(event, arguments):
            written = event == "open" and (arguments[1] is None or set(str(arguments[1])) & set("wxa+"))
            if written or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
                seen[0] += 1
                if seen[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        if kill_at:
            sys.addaudithook(hook)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        try:
            save(trainer)
            status = 0
        except vqa.VQAError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
            (folder / "message").write_text(str(error))
            status = 3
    finally:
        os._exit(status)


def save_step_4(trainer):
    trainer.state.global_step = 4
    trainer.args.save_total_limit = 1
    trainer._save_checkpoint(trainer.model, None)


def killed_at_each_boundary(trainer, start, tmp_path, save):
    """Yields the folder after each kill; ends with the first save that was not reached by its kill."""
    for kill_at in range(1, 300):
        folder = tmp_path / str(kill_at)
        shutil.copytree(start, folder)
        status = in_a_child(trainer, folder, save, kill_at)
        yield folder
        if status == 0:
            return
        assert status == -signal.SIGKILL
        shutil.rmtree(folder)
    raise AssertionError("the save never ended")


@pytest.mark.slow
def test_a_kill_at_any_file_boundary_of_a_checkpoint_leaves_a_whole_one(trainer, tmp_path, capsys):
    found = []
    for folder in killed_at_each_boundary(trainer[0], trainer[1], tmp_path, save_step_4):
        arguments = vqa.parse_arguments([*RUN, "--output_dir", str(folder), *RESUME])[2]
        found.append(vqa.find_checkpoint(arguments).name)
        assert not any(map(vqa.find_damage, vqa.checkpoints_of(folder).values()))  # one half deleted is none
        with vqa.lock_folder(folder):
            assert list(folder.glob("tmp-*")) == []  # the next start clears up
    assert found == sorted(found) and set(found) == {"checkpoint-2", "checkpoint-4"}
    print(f"{len(found)} boundaries")


@pytest.mark.slow
@pytest.mark.parametrize("earlier", [False, True])
def test_a_kill_at_any_file_boundary_of_the_final_save_leaves_no_manifest_or_a_whole_model(trainer, tmp_path, earlier):
    """Also where an earlier run's final model is replaced: never are the files of one taken for the other's."""
    start, whole = tmp_path / "start", []
    shutil.copytree(trainer[1], start)
    if earlier:
        for path in (start / "checkpoint-2").iterdir():
            shutil.copy(path, start)
    for folder in killed_at_each_boundary(trainer[0], start, tmp_path, lambda trainer: trainer.save_model()):
        damage = vqa.find_damage(folder)
        assert damage in (None, "manifest.json is missing: the save did not end")
        assert vqa.find_damage(folder / "checkpoint-2", vqa.RESUME_FILES) is None
        if (folder / "config.json").exists():  # which makes it a model to others
            assert {*trainer[0].small_files, "model-00001-of-00001.safetensors", vqa.SETTINGS_FILE} <= {
                path.name for path in folder.iterdir()
            }
        manifest = folder / vqa.MANIFEST_FILE
        whole.append(damage is None and "optimizer.pt" not in manifest.read_text())  # which the earlier one lists
    assert whole == sorted(whole) and whole[-1]


@pytest.mark.slow
def test_everything_is_on_the_disk_before_it_is_named(trainer, tmp_path):
    """A power cut keeps what was synced: each file of a save, then its name, then the folder that holds the name."""
    folder, notes = tmp_path / "out", tmp_path / "notes"
    shutil.copytree(trainer[1], folder)

    def save(trainer):
        inner = {"fsync": os.fsync, "rename": os.rename}

        def note(line):
            with notes.open("a") as out:
                out.write(f"{line}\n")

        os.fsync = lambda handle: (note(os.readlink(f"/proc/self/fd/{handle}")), inner["fsync"](handle))
        os.rename = lambda source, target: (note(f"{source} -> {target}"), inner["rename"](source, target))
        save_step_4(trainer)

    assert in_a_child(trainer[0], folder, save) == 0
    seen, part = notes.read_text().splitlines(), folder / "tmp-save/checkpoint-4"
    named = seen.index(f"{part} -> {folder / 'checkpoint-4'}")
    assert {str(part / path.name) for path in (folder / "checkpoint-4").iterdir()} <= set(seen[:named])
    assert str(part) in seen[:named]
    assert seen[named + 1] == str(folder)


def assert_the_last_checkpoint_is_left(folder):
    """After checkpoint-4 could not be saved: the message says so, and checkpoint-2 alone is there, whole."""
    message = (folder / "message").read_text()
    assert f"{folder}: checkpoint-4 could not be saved (" in message
    assert "are free there; checkpoint-2 is whole" in message
    assert vqa.find_damage(folder / "checkpoint-2", vqa.RESUME_FILES) is None
    assert {path.name for path in folder.iterdir()} == {"checkpoint-2", "message"}


@pytest.mark.slow
@pytest.mark.parametrize("limit", [100, 2_000, 20_000, 40_000, 60_000, 120_000])
def test_a_file_size_limit_leaves_the_last_checkpoint(trainer, tmp_path, limit):
    folder = tmp_path / "out"
    shutil.copytree(trainer[1], folder)
    assert in_a_child(trainer[0], folder, save_step_4, limit=limit) == 3
    assert_the_last_checkpoint_is_left(folder)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_full_disk_leaves_the_last_checkpoint(trainer, tmp_path, share):
    """A tmpfs with room for one checkpoint and a share of another."""
    one = sum(path.stat().st_size for path in (trainer[1] / "checkpoint-2").iterdir())
    disk = tmp_path / "disk"
    with small_disk(disk, 64 + int(one * (1 + share)) // 1024):
        folder = disk / "out"
        shutil.copytree(trainer[1], folder)
        assert in_a_child(trainer[0], folder, save_step_4) == 3
        assert_the_last_checkpoint_is_left(folder)


@pytest.mark.slow
def test_killed_with_loader_workers_and_gone_on_is_the_same_bit_for_bit(tmp_path):
    """SIGKILL to the main process, dropout, accumulation and an epoch's end: the same as a run nothing disturbed."""
    flags = [*RUN, "--save_steps", "2", "--dataloader_num_workers", "2"]
    assert vqa.main([*flags, "--output_dir", str(tmp_path / "whole")]) == 0
    command = [sys.executable, str(ROOT / "train_vqa.py"), *flags, "--output_dir", str(tmp_path / "out")]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # as conftest.py has it here: sums differ with the number of threads
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=alone) as process:
        while not (tmp_path / "out/checkpoint-2").exists():
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out/adapter_model.safetensors").exists()
    assert vqa.main([*flags, "--output_dir", str(tmp_path / "out"), *RESUME]) == 0
    assert_same(result(tmp_path / "out"), result(tmp_path / "whole"))


@pytest.mark.parametrize(("count", "status"), [(2, 0), (3, -signal.SIGTERM)])
def test_the_third_signal_kills(count, status):
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with vqa.StopSignal() as stop:
            stop.saves = True
            for _ in range(count):
                os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "persistent"),
    [
        (signal.SIGTERM, 143, "False"),
        (signal.SIGTERM, 143, "True"),  # Python waits without end for workers that live as it exits
        (signal.SIGINT, 130, "False"),
        (signal.SIGHUP, 129, "False"),
    ],
)
def test_a_signal_to_the_whole_group_with_loader_workers(tmp_path, number, status, persistent):
    def default_signals():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    command = [sys.executable, str(ROOT / "train_vqa.py"), *RUN, "--output_dir", str(tmp_path / "out")]
    command += ["--max_steps", "500", "--logging_steps", "1", "--dataloader_num_workers", "2"]
    command += ["--dataloader_persistent_workers", persistent]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=default_signals, cwd=tmp_path)
    deadline = time.time() + 200
    while "'loss'" not in (tmp_path / "log").read_text():
        assert process.poll() is None and time.time() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.2)
    os.killpg(process.pid, number)
    assert process.wait(200) == status, (tmp_path / "log").read_text()
    newest = next(iter(vqa.checkpoints_of(tmp_path / "out").values()))
    assert vqa.find_damage(newest, vqa.RESUME_FILES) is None
    assert not (tmp_path / "out/adapter_model.safetensors").exists()
    assert f"{newest.name} is whole" in (tmp_path / "log").read_text()


def test_the_shell_script_does_not_evaluate_after_a_signal(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(
        '#!/bin/sh\ncase "$1" in *train_vqa.py) exit 143;; *evaluate_checkpoint.py) touch "$STUB/evaluated";; esac\n'
    )
    stub.chmod(0o755)
    shutil.copy(ROOT / "train_with_eval_FINAL.sh", tmp_path)
    environment = {**os.environ, "PYTHON": str(stub), "STUB": str(tmp_path)}
    done = subprocess.run(["bash", "train_with_eval_FINAL.sh"], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 143
    assert not (tmp_path / "evaluated").exists()


@pytest.fixture()
def script(tmp_path):
    """Starts train_with_eval_FINAL.sh and waits for its step; `python` is a program that notes each signal, takes its
    time to end, and then says that all went well."""
    started = []

    def start(step):
        stub = tmp_path / "python"
        stub.write_text(
            f"#!{sys.executable}\n"
            "import os, signal, sys, time\n"
            "from pathlib import Path\n"
            "folder, script = Path(os.environ['STUB']), os.path.basename(sys.argv[1])\n"
            f"if script == '-': os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"
            "with (folder / 'ran').open('a') as ran: ran.write(script + ' ')\n"
            f"if script != {step!r}: sys.exit()\n"
            "seen = []\n"
            "for n in (1, 2, 15):\n"
            "    if signal.getsignal(n) != signal.SIG_IGN: signal.signal(n, lambda n, _: seen.append(n))\n"
            "(folder / 'pid').write_text(str(os.getpid()))\n"
            "(folder / 'pid').rename(folder / 'ready')\n"
            "while not seen: time.sleep(0.01)\n"
            "time.sleep(0.5)\n"
            "(folder / 'seen').write_text(str(seen))\n"
        )
        stub.chmod(0o755)
        shutil.copy(ROOT / "train_with_eval_FINAL.sh", tmp_path)

        def default_signals():
            os.setsid()
            for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(each, signal.SIG_DFL)

        environment = {**os.environ, "PYTHON": str(stub), "STUB": str(tmp_path)}
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(["bash", "train_with_eval_FINAL.sh"], cwd=tmp_path, env=environment, stdout=log,
                                       stderr=log, preexec_fn=default_signals)  # fmt: skip
        started.append(process)
        while not (tmp_path / "ready").exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("step", ["train_vqa.py", "evaluate_checkpoint.py"])
@pytest.mark.parametrize("whole_group", [False, True])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_the_shell_script_passes_a_signal_on_once(script, tmp_path, number, status, whole_group, step):
    process = script(step)
    os.killpg(process.pid, number) if whole_group else process.send_signal(number)
    assert process.wait(60) == status, (tmp_path / "log").read_text()
    assert (tmp_path / "seen").read_text() == str([int(number)])  # and bash ended after it
    assert (tmp_path / "ran").read_text().split()[-1] == step


@pytest.mark.slow
def test_ctrl_z_stops_what_the_shell_script_runs_and_fg_lets_it_go_on(script, tmp_path):
    process = script("train_vqa.py")
    ready = tmp_path / "ready"

    def wait_for(*states):
        """Until bash and its child are in one of these states of /proc: T stopped."""
        for pid in (process.pid, int(ready.read_text())):
            while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in states:
                time.sleep(0.01)

    os.killpg(process.pid, signal.SIGTSTP)
    wait_for("T")
    os.killpg(process.pid, signal.SIGCONT)
    wait_for("S", "R")
    process.terminate()
    assert process.wait(60) == 143, (tmp_path / "log").read_text()
    assert (tmp_path / "seen").read_text() == str([int(signal.SIGTERM)])


def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    pid = os.fork()
    if not pid:
        with (tmp_path / ".lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            (tmp_path / "held").touch()
            time.sleep(60)
        os._exit(0)
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        with pytest.raises(vqa.VQAError, match="another run is writing there"):
            vqa.main([*RUN, "--output_dir", str(tmp_path)])
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with vqa.lock_folder(tmp_path):  # a killed run holds nothing
        pass


# ------------------------------------------------------------------------------------------------------------- fuzzing


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", fuzz.READERS)
def test_fuzz(tmp_path, reader):
    """The inputs are the same each time; benchmarks/fuzz.py draws others, for as long as it is told."""
    drawn, check = fuzz.READERS[reader](tmp_path)
    settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))(
        given(drawn)(lambda content: check(content))  # hypothesis wants a function with a name
    )()
