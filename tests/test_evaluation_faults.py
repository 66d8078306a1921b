"""An evaluation that is stopped or runs out of disk: real signals, limits and disks. No row is lost or twice."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

import evaluate_checkpoint as ev
from tests.conftest import FIXTURES, ROOT, read_jsonl, small_disk, without_time, write_jsonl
from tests.faults import SIGNALS, Script
from tests.test_generation import without_times
from tests.warm import default_signals

ROWS = 24


@pytest.fixture(scope="module")
def command(trained, tmp_path_factory):
    """The flags for 24 rows with speech of their own."""
    folder = tmp_path_factory.mktemp("many")
    rows = read_jsonl(FIXTURES / "smoke.jsonl")
    (folder / "audio").mkdir()
    for n in range(ROWS):
        shutil.copy(FIXTURES / "audio/qa_000205.ogg", folder / f"audio/many_{n}.ogg")
    many = [{**rows[4], "id": f"many_{n}", "frames": rows[n % 4]["frames"]} for n in range(ROWS)]
    write_jsonl(folder / "data.jsonl", many)
    words = ["--checkpoint_path", trained, "--eval_data_path", folder / "data.jsonl", "--batch_size", 2]
    words += ["--frames_dir", FIXTURES / "frames", "--audio_dir", folder / "audio", "--max_new_tokens", 4]
    return [*map(str, words)]


@pytest.fixture()
def start(command, tmp_path):
    """Starts the evaluation, whose rows go to x.jsonl; what still runs is killed in the end."""
    started = []

    def start(*more, path=tmp_path / "x.jsonl", **how):
        started.append(Script("evaluate_checkpoint.py", [*command, "--output_file", path, *more], **how))
        return started[-1]

    yield start
    for script in started:
        script.end_now()


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """The rows file of a run that nothing disturbed."""
    path = tmp_path_factory.mktemp("undisturbed") / "x.jsonl"
    assert ev.main([*command, "--output_file", str(path)]) == 0
    return path


def has_rows(path):
    return lambda: path.exists() and path.stat().st_size > 0


def summary_of(path):
    return path.with_suffix(".summary.json")


def assert_ends_like(undisturbed, path, command):
    """The same command again ends with the rows and the figures of a run that nothing disturbed."""
    assert ev.main([*command, "--output_file", str(path)]) == 0
    one, other = (sorted(map(without_time, read_jsonl(file)), key=ev.row_key) for file in (path, undisturbed))
    assert one == other
    one, other = (without_times(json.loads(summary_of(file).read_text())) for file in (path, undisturbed))
    assert one == other


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    flags = ["--checkpoint_path", "x", "--eval_data_path", str(FIXTURES / "smoke.jsonl"), "--frames_dir", "x"]
    done = subprocess.run([sys.executable, str(ROOT / "evaluate_checkpoint.py"), *flags, "--output_file", "x.jsonl"],
                          capture_output=True, text=True, cwd=tmp_path, preexec_fn=default_signals,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert done.returncode == 130
    assert "Stopped by SIGINT" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_a_signal_ends_it_after_the_batch_and_the_same_command_goes_on(
    start, command, undisturbed, tmp_path, number, status
):
    path = tmp_path / "x.jsonl"
    summary_of(path).write_text("{}")  # of an earlier run
    script = start()
    script.wait_for(has_rows(path))
    script.send(signal.SIGSTOP)  # or it would answer on while its rows are counted
    before = path.read_text().count("\n")
    script.send(number)
    script.send(signal.SIGCONT)
    assert script.end() == status, script.said()
    rows = ev.read_answer_rows(path)  # raises where a line is torn
    assert 0 < len(rows) <= before + 2  # the batch under way
    last = script.said().splitlines()[-1]
    assert last.startswith(f"Stopped by {number.name}: {len(rows)} of {ROWS} rows") and "same command continues" in last
    assert "Traceback" not in script.said() and not summary_of(path).exists()
    assert_ends_like(undisturbed, path, command)


def test_a_signal_before_the_first_row_ends_it_at_once(start, tmp_path):
    script = start(stop_at="📁 Loading Eval Data")
    assert script.end() == 143, script.said()
    assert script.said().splitlines()[-1].startswith("Stopped by SIGTERM: no row was answered")
    assert not (tmp_path / "x.jsonl").exists()


def test_with_overwrite_the_line_says_to_leave_it_out(start, tmp_path):
    script = start("--overwrite")
    script.wait_for(has_rows(tmp_path / "x.jsonl"))
    script.send(signal.SIGTERM)
    assert script.end() == 143 and "without --overwrite" in script.said().splitlines()[-1]


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(start, command, undisturbed, tmp_path):
    """While it loads, at the gates or among the rows."""
    path, draw = tmp_path / "x.jsonl", random.Random(int(os.environ.get("VQA_KILL_SEED", "0")))
    for n in range(10):
        size = path.stat().st_size if path.exists() else 0
        script = start()
        if n >= 3:
            while script.poll() is None and not (path.exists() and path.stat().st_size > size):
                time.sleep(0.003)
        time.sleep(draw.uniform(0, 0.8 if n < 3 else 0.2))
        script.end_now()
    assert_ends_like(undisturbed, path, command)


def test_a_file_size_limit_is_one_line_and_no_row_is_lost_or_twice(start, command, undisturbed, tmp_path):
    path = tmp_path / "x.jsonl"
    script = start(file_limit=undisturbed.stat().st_size // 2)
    assert script.end() == 2
    kept, said = read_jsonl(path), script.said()
    assert kept == list(ev.read_answer_rows(path).values()) and 0 < len(kept) < ROWS
    assert f"{path}: " in said and "File too large" in said and f"the {len(kept)} rows before it are kept" in said
    assert "Traceback" not in said and not summary_of(path).exists()
    assert_ends_like(undisturbed, path, command)


def test_a_full_disk_is_one_line_and_no_row_is_lost_or_twice(start, command, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, 64):
        path, filler = disk / "x.jsonl", disk / "filler"
        filler.write_bytes(bytes(64 * 1024 - 4096 * (2 + undisturbed.stat().st_size // 2 // 4096)))
        script = start(path=path)
        assert script.end() == 2
        assert 0 < len(ev.read_answer_rows(path)) < ROWS
        assert f"{path}: " in script.said() and "No space left on device), 0 are free" in script.said()
        assert "Traceback" not in script.said() and not summary_of(path).exists()
        filler.unlink()
        assert_ends_like(undisturbed, path, command)


def test_a_disk_full_at_the_summary_keeps_every_row(start, command, undisturbed, tmp_path):
    """All rows are there already, so that the summary is all there is to write."""
    path = tmp_path / "x.jsonl"
    for file in undisturbed.parent.iterdir():
        if file != summary_of(undisturbed):
            shutil.copy(file, tmp_path)
    script = start(file_limit=summary_of(undisturbed).stat().st_size // 2)
    assert script.end() == 2 and path.read_bytes() == undisturbed.read_bytes()
    assert f"{summary_of(path)}: " in script.said() and "no row is lost" in script.said()
    assert "Traceback" not in script.said() and not list(tmp_path.glob("*.tmp")) and not summary_of(path).exists()
    assert_ends_like(undisturbed, path, command)


def test_one_unreadable_sample_keeps_the_denominator_and_fails(command, undisturbed, tmp_path, capsys):
    audio, path = command[command.index("--audio_dir") + 1], tmp_path / "x.jsonl"
    spoilt = shutil.copytree(audio, tmp_path / "audio")
    (spoilt / "many_7.ogg").write_bytes(b"OggS")
    command = [*command, "--audio_dir", str(spoilt), "--output_file", str(path)]
    assert ev.main(command) == 2 and f"speech {spoilt / 'many_7.ogg'} is cut off" in capsys.readouterr().err
    assert not path.exists()
    for _ in range(2):  # the second time everything is there already, and it is still no success
        assert ev.main([*command, "--allow_errors"]) == 1
        summary = json.loads(summary_of(path).read_text())
        assert (summary["n_total"], summary["n_errors"], len(read_jsonl(path))) == (ROWS, 1, ROWS)
    answers, others = ({row["id"]: row["predicted_answer"] for row in read_jsonl(file)} for file in (path, undisturbed))
    assert answers == {**others, "many_7": None}


def test_two_evaluations_into_one_file_at_once(start, tmp_path):
    path = tmp_path / "x.jsonl"
    first = start()
    first.wait_for(has_rows(path))
    first.send(signal.SIGSTOP)
    second = start()
    assert second.end() == 2 and f"{path}: another run is writing it" in second.said()
    first.send(signal.SIGCONT)
    assert first.end() == 0 and len(read_jsonl(path)) == ROWS
