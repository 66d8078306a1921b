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
    kept, folder, make = [], tmp_path_factory.mktemp("trainer") / "out", vqa.make_trainer
    pairs = zip(RUN[::2], RUN[1::2], strict=True)
    flags = [part for pair in pairs if request.param == "lora" or "--lora" not in pair[0] for part in pair]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqa, "make_trainer", lambda *args: kept.append(make(*args)) or kept[0])
        flags += ["--train_decoder", request.param, "--max_steps", "2", "--output_dir", str(folder)]
        assert vqa.main(flags) == 0
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    kept[0].total_limit = 1
    return kept[0], folder


def in_a_child(trainer, folder, save, kill_at=None, limit=None):
    """How `save(trainer)` into `folder` ended, in a fork that is killed as its `kill_at`-th file operation begins, and
    what it said."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        with open(reader) as said:
            text = said.read()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text
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
            os.write(writer, str(error).encode())
            status = 3
    finally:
        os._exit(status)


def save_step_4(trainer):
    trainer.state.global_step = 4
    trainer.save_last_step()


def killed_at_each_boundary(trainer, start, tmp_path, save):
    """Yields the folder after each kill; ends with the first save that was not reached by its kill."""
    for kill_at in range(1, 300):
        folder = tmp_path / str(kill_at)
        shutil.copytree(start, folder)
        status, _ = in_a_child(trainer, folder, save, kill_at)
        yield folder
        if status == 0:
            return
        assert status == -signal.SIGKILL
        shutil.rmtree(folder)
    raise AssertionError("the save never ended")


@pytest.mark.slow
def test_a_kill_at_any_file_boundary_of_a_checkpoint_leaves_a_whole_one(trainer, tmp_path, capsys):
    """A checkpoint half written, or half deleted, has no manifest."""
    found = []
    for folder in killed_at_each_boundary(trainer[0], trainer[1], tmp_path, save_step_4):
        arguments = vqa.parse_arguments([*RUN, "--output_dir", str(folder), *RESUME])[2]
        found.append(vqa.find_checkpoint(arguments).name)
        damages = set(map(vqa.find_damage, vqa.checkpoints_of(folder).values()))
        assert damages <= {None, f"{vqa.MANIFEST_FILE} is missing: the save did not end"}
    assert found == sorted(found) and set(found) == {"checkpoint-2", "checkpoint-4"}
    assert list(vqa.checkpoints_of(folder)) == [4]
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
        shutil.copytree(start / "checkpoint-2", start / "tmp-final")  # of a save that was killed
    for folder in killed_at_each_boundary(trainer[0], start, tmp_path, lambda trainer: trainer.save_final()):
        damage, names = vqa.find_damage(folder), {path.name for path in folder.iterdir()}
        assert damage is None or " is missing" in damage
        assert vqa.find_damage(folder / "checkpoint-2", vqa.RESUME_FILES) is None
        if "config.json" in names:  # which makes it a model to others
            described = {"generation_config.json", "preprocessor_config.json", "tokenizer.json"}
            assert names >= {*described, "model.safetensors", vqa.SETTINGS_FILE}
        if "adapter_config.json" in names:
            assert names >= {"adapter_model.safetensors", "tokenizer.json", vqa.SETTINGS_FILE}
        manifest = folder / vqa.MANIFEST_FILE
        whole.append(damage is None and "optimizer.pt" not in manifest.read_text())  # which the earlier one lists
    assert whole == sorted(whole) and whole[-1]
    assert not list(folder.glob("tmp-*"))


@pytest.mark.slow
def test_everything_is_on_the_disk_before_the_manifest_and_that_before_anything_goes(trainer, tmp_path):
    """A power cut keeps what was synced: each file of a save, its manifest, then the folders that hold the names."""
    folder, notes = tmp_path / "out", tmp_path / "notes"
    shutil.copytree(trainer[1], folder)

    def save(trainer):
        sync, unlink = os.fsync, os.unlink

        def note(line):
            with notes.open("a") as out:
                out.write(f"{line}\n")

        os.fsync = lambda handle: (note(os.readlink(f"/proc/self/fd/{handle}")), sync(handle))
        os.unlink = lambda path, **where: (note(f"unlink {path}"), unlink(path, **where))
        save_step_4(trainer)

    assert in_a_child(trainer[0], folder, save)[0] == 0
    seen, new, old = notes.read_text().splitlines(), folder / "checkpoint-4", folder / "checkpoint-2"
    complete = seen.index(str(new / vqa.MANIFEST_FILE))
    assert {str(path) for path in new.iterdir()} - {str(new / vqa.MANIFEST_FILE)} <= set(seen[:complete])
    gone = seen.index(f"unlink {old / vqa.MANIFEST_FILE}")
    assert {str(new), str(folder)} <= set(seen[complete:gone])
    assert not old.exists() and not any(line.startswith(f"unlink {old}") for line in seen[:gone])


def assert_the_last_checkpoint_is_left(folder, message):
    """After checkpoint-4 could not be saved: the message says so, and checkpoint-2 is there to go on from."""
    assert message.startswith(f"{folder}: ") and "4 could not be saved (" in message
    assert "are free there; the last complete checkpoint is" in message and "checkpoint-2;" in message
    arguments = vqa.parse_arguments([*RUN, "--output_dir", str(folder), *RESUME])[2]
    assert vqa.find_checkpoint(arguments) == folder / "checkpoint-2"


@pytest.mark.slow
@pytest.mark.parametrize("limit", [100, 2_000, 20_000, 40_000, 60_000, 120_000])
def test_a_file_size_limit_leaves_the_last_checkpoint(trainer, tmp_path, limit):
    folder = tmp_path / "out"
    shutil.copytree(trainer[1], folder)
    status, message = in_a_child(trainer[0], folder, save_step_4, limit=limit)
    assert status == 3
    assert_the_last_checkpoint_is_left(folder, message)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2_000, 30_000, 60_000])
def test_a_run_whose_save_fails_ends_in_one_line(tmp_path, limit):
    """The Trainer's own saves; no file may grow beyond the limit."""
    command = [sys.executable, str(ROOT / "train_vqa.py"), *RUN, "--save_steps", "2", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1)))  # fmt: skip
    assert done.returncode == 1, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"error: {tmp_path}: ") and "2 could not be saved (" in said and "no checkpoint yet" in said
    assert "Traceback" not in done.stderr and not (tmp_path / vqa.MANIFEST_FILE).exists()


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_full_disk_leaves_the_last_checkpoint(trainer, tmp_path, share):
    """A tmpfs with room for one checkpoint and a share of another."""
    one = sum(path.stat().st_size for path in (trainer[1] / "checkpoint-2").iterdir())
    disk = tmp_path / "disk"
    with small_disk(disk, 64 + int(one * (1 + share)) // 1024):
        folder = disk / "out"
        shutil.copytree(trainer[1], folder)
        status, message = in_a_child(trainer[0], folder, save_step_4)
        assert status == 3
        assert_the_last_checkpoint_is_left(folder, message)


@pytest.mark.slow
def test_killed_with_loader_workers_and_gone_on_is_the_same_bit_for_bit(tmp_path):
    """SIGKILL to the main process, dropout, accumulation and an epoch's end: the same as a run nothing disturbed."""
    flags = [*RUN, "--save_steps", "2", "--dataloader_num_workers", "2"]
    assert vqa.main([*flags, "--output_dir", str(tmp_path / "whole")]) == 0
    command = [sys.executable, str(ROOT / "train_vqa.py"), *flags, "--output_dir", str(tmp_path / "out")]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # as conftest.py has it here: sums differ with the number of threads
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=alone) as process:
        while vqa.find_damage(tmp_path / "out/checkpoint-2") is not None:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out/adapter_model.safetensors").exists()
    assert vqa.main([*flags, "--output_dir", str(tmp_path / "out"), *RESUME]) == 0
    assert_same(result(tmp_path / "out"), result(tmp_path / "whole"))


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
    assert f"{newest.name} is complete" in (tmp_path / "log").read_text()


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
