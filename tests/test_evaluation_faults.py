"""An evaluation that is stopped or runs out of disk: real signals, limits and disks. No row is lost or twice."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import evaluate_checkpoint as ev
from tests.conftest import FIXTURES, small_disk
from tests.test_generation import QUICK, ROOT, trained, without_times  # noqa: F401  `trained` is a fixture

pytestmark = pytest.mark.slow
SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
ROWS = 24


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Flags for 24 rows with speech of their own, and the folder with their data."""
    folder = tmp_path_factory.mktemp("many")
    rows = [json.loads(line) for line in (FIXTURES / "smoke.jsonl").read_text().splitlines()]
    (folder / "audio").mkdir()
    shutil.copytree(FIXTURES / "frames", folder / "frames")
    with (folder / "data.jsonl").open("w") as out:
        for n in range(ROWS):
            shutil.copy(FIXTURES / "audio/qa_000205.ogg", folder / f"audio/many_{n}.ogg")
            out.write(json.dumps({**rows[4], "id": f"many_{n}", "frames": rows[n % 4]["frames"]}) + "\n")
    flags = ["--eval_data_path", folder / "data.jsonl", "--frames_dir", folder / "frames"]
    return [*map(str, [*flags, "--audio_dir", folder / "audio", "--batch_size", "2"]), *QUICK]


@pytest.fixture(scope="module")
def command(many, trained):  # noqa: F811
    return [sys.executable, str(ROOT / "evaluate_checkpoint.py"), "--checkpoint_path", str(trained), *many]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The rows file of a run that nothing disturbed."""
    path = tmp_path_factory.mktemp("whole") / "x.jsonl"
    done = subprocess.run([*command, "--output_file", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


def default_signals():
    """What a shell in a terminal hands on, whatever started these tests."""
    for number, _ in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


def assert_ends_like(whole: Path, path: Path, command: list) -> None:
    """The same command again ends with the rows and the figures of a run that nothing disturbed."""
    done = subprocess.run([*command, "--output_file", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.read_text().splitlines()) == sorted(whole.read_text().splitlines())
    summaries = [json.loads(file.with_suffix(".summary.json").read_text()) for file in (path, whole)]
    assert without_times(summaries[0]) == without_times(summaries[1])


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    flags = ["--checkpoint_path", "x", "--eval_data_path", str(FIXTURES / "smoke.jsonl"), "--frames_dir", "x"]
    done = subprocess.run([sys.executable, str(ROOT / "evaluate_checkpoint.py"), *flags, "--output_file", "x.jsonl"],
                          capture_output=True, text=True, cwd=tmp_path, preexec_fn=default_signals,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "\nStopped by SIGINT: run the same command again\n")


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_a_signal_ends_it_after_the_batch_and_the_same_command_goes_on(command, whole, tmp_path, number, status):
    path = tmp_path / "x.jsonl"
    path.with_suffix(".summary.json").write_text("{}")  # of an earlier run
    start = [*command, "--output_file", str(path)]
    with subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          preexec_fn=default_signals) as process:  # fmt: skip
        while process.poll() is None and not (path.exists() and path.stat().st_size):
            time.sleep(0.005)
        process.send_signal(signal.SIGSTOP)  # or it would answer on while its rows are counted
        before = path.read_text().count("\n")
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        errors = process.communicate()[1]
    rows = ev.read_answer_rows(path)  # raises where a line is torn
    assert process.returncode == status, errors
    assert 0 < len(rows) <= before + 2  # the batch under way
    said = f"Stopped by {number.name}: {len(rows)} of {ROWS} rows are answered; the same command goes on"
    assert errors.splitlines()[-1] == said and "Traceback" not in errors
    assert not path.with_suffix(".summary.json").exists()
    assert_ends_like(whole, path, command)


def test_a_signal_before_the_first_row_ends_it_at_once(command, tmp_path):
    path = tmp_path / "x.jsonl"
    start = [command[0], "-u", *command[1:], "--output_file", str(path)]
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          preexec_fn=default_signals) as process:  # fmt: skip
        assert any(line.startswith("📁 Loading Eval Data") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate()[1]
    assert process.returncode == 143
    assert errors.splitlines()[-1] == "Stopped by SIGTERM: no row was answered; run the same command again"
    assert not path.exists()


def test_with_overwrite_the_line_says_to_leave_it_out(command, tmp_path):
    path = tmp_path / "x.jsonl"
    start = [*command, "--overwrite", "--output_file", str(path)]
    with subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          preexec_fn=default_signals) as process:  # fmt: skip
        while process.poll() is None and not (path.exists() and path.stat().st_size):
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate()[1]
    assert errors.splitlines()[-1].endswith(" rows are answered; the same command without --overwrite goes on")


def test_a_file_size_limit_is_one_line_and_no_row_is_lost_or_twice(command, whole, tmp_path):
    path = tmp_path / "x.jsonl"
    limit = whole.stat().st_size // 2
    done = subprocess.run([*command, "--output_file", str(path)], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1)))  # fmt: skip
    kept = path.read_text().splitlines()
    assert done.returncode == 2
    assert [json.loads(line) for line in kept] == list(ev.read_answer_rows(path).values()) and 0 < len(kept) < ROWS
    assert f"{path}: " in done.stderr and " bytes could not be written (File too large), " in done.stderr
    assert f" are free there; the {len(kept)} rows before it are kept; make room, then the same" in done.stderr
    assert "Traceback" not in done.stderr and not path.with_suffix(".summary.json").exists()
    assert_ends_like(whole, path, command)


def test_a_full_disk_is_one_line_and_no_row_is_lost_or_twice(command, whole, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, 64):
        path, filler = disk / "x.jsonl", disk / "filler"
        filler.write_bytes(bytes(64 * 1024 - 4096 * (2 + whole.stat().st_size // 2 // 4096)))
        done = subprocess.run([*command, "--output_file", str(path)], capture_output=True, text=True)
        assert done.returncode == 2
        kept = ev.read_answer_rows(path)
        assert 0 < len(kept) < ROWS
        assert (
            f"{path}: " in done.stderr and "could not be written (No space left on device), 0 are free" in done.stderr
        )
        assert "Traceback" not in done.stderr and not path.with_suffix(".summary.json").exists()
        filler.unlink()
        assert_ends_like(whole, path, command)


def test_a_disk_full_at_the_summary_keeps_every_row(command, whole, tmp_path):
    """All rows are there already, so that the summary is all there is to write."""
    path = tmp_path / "x.jsonl"
    for file in whole.parent.iterdir():
        if file.name != "x.summary.json":
            shutil.copy(file, tmp_path)
    done = subprocess.run([*command, "--output_file", str(path)], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, -1)))  # fmt: skip
    assert done.returncode == 2 and path.read_bytes() == whole.read_bytes()
    assert f"{path.with_suffix('.summary.json')}: " in done.stderr and "no row is lost" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("*.tmp"))
    assert not path.with_suffix(".summary.json").exists()
    assert_ends_like(whole, path, command)


def test_one_unreadable_sample_keeps_the_denominator_and_fails(command, whole, tmp_path):
    audio = Path(command[command.index("--audio_dir") + 1])
    spoilt = shutil.copytree(audio, tmp_path / "audio")
    (spoilt / "many_7.ogg").write_bytes(b"OggS")
    command = [str(spoilt) if part == str(audio) else part for part in command]
    path = tmp_path / "x.jsonl"
    refused = subprocess.run([*command, "--output_file", str(path)], capture_output=True, text=True)
    assert refused.returncode == 2 and f"speech {spoilt / 'many_7.ogg'} cannot be decoded" in refused.stderr
    assert not path.exists()
    for _ in range(2):  # the second time everything is there already, and it is still no success
        done = subprocess.run([*command, "--allow_errors", "--output_file", str(path)], capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
        summary = json.loads(path.with_suffix(".summary.json").read_text())
        assert (summary["n_total"], summary["n_errors"]) == (ROWS, 1)
        assert len(path.read_text().splitlines()) == ROWS
    answers, undisturbed = (
        {row["id"]: row["predicted_answer"] for row in ev.read_answer_rows(file).values()} for file in (path, whole)
    )
    assert answers == {**undisturbed, "many_7": None}


def test_two_evaluations_into_one_file_at_once(command, tmp_path):
    path = tmp_path / "x.jsonl"
    with subprocess.Popen([*command, "--output_file", str(path)], stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as first:  # fmt: skip
        while first.poll() is None and not (path.exists() and path.stat().st_size):
            time.sleep(0.005)
        first.send_signal(signal.SIGSTOP)
        try:
            second = subprocess.run([*command, "--output_file", str(path)], capture_output=True, text=True)
        finally:
            first.send_signal(signal.SIGCONT)
        assert first.wait(200) == 0
    assert second.returncode == 2 and f"{path}: another run is writing it" in second.stderr
    assert len(path.read_text().splitlines()) == ROWS
