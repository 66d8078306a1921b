"""An evaluation by several ranks: the rows and figures of one process, also after kills, and each line printed once."""

import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch

import evaluate_checkpoint as ev
from tests.conftest import FIXTURES, ROOT, read_jsonl, without_time, write_jsonl
from tests.faults import Script
from tests.test_generation import without_times

ROWS = 16
ARMS = ("--arms", "first_frame")


LAUNCHES = itertools.count()


@functools.cache
def store():
    """One for all launches: a fork that frees the store of an earlier one would wait for a thread that it lacks."""
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


class Launch:
    """What torchrun does, in forks that have torch already: a store for all, and as one rank fails, SIGTERM to the
    others. `limits`: rank -> the `file_limit` of its Script."""

    def __init__(self, flags, count, limits=()):
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store().port), "WORLD_SIZE": str(count)}
        env["TORCHELASTIC_RESTART_COUNT"] = str(next(LAUNCHES))  # each launch has its own keys
        self.ranks = [
            Script(
                "evaluate_checkpoint.py",
                flags,
                dict(limits).get(rank),
                env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(count)
        ]

    def wait_for(self, condition):
        """Until the condition holds; fails where a rank ends before."""
        deadline = time.time() + 120
        while not condition():
            assert [rank.poll() for rank in self.ranks] == [None] * len(self.ranks), self.said()
            assert time.time() < deadline, self.said()
            time.sleep(0.003)

    def end(self):
        """Wait for all; returns their exit statuses."""
        deadline, ended = time.time() + 120, False
        while None in (statuses := [rank.poll() for rank in self.ranks]):
            assert time.time() < deadline, self.said()
            if any(statuses) and not ended:
                ended = True
                for rank in self.ranks:
                    if rank.poll() is None:
                        rank.send(signal.SIGTERM)
            time.sleep(0.01)
        return statuses

    def said(self):
        return [rank.said() for rank in self.ranks]


@pytest.fixture(scope="module")
def command(trained, tmp_path_factory):
    """The flags for rows with speech of their own, and clips of one to four frames."""
    folder = tmp_path_factory.mktemp("ragged")
    rows = read_jsonl(FIXTURES / "smoke.jsonl")
    (folder / "audio").mkdir()
    ragged = []
    for n in range(ROWS):
        row = rows[n % 5]
        recording = FIXTURES / "audio" / ("fx-002_qa_000203.flac", "qa_000205.ogg")[n % 2]
        shutil.copy(recording, folder / f"audio/many_{n}{recording.suffix}")
        frames = {name: row[name][: 1 + n % 4] for name in ("frames", "frame_numbers") if name in row}
        ragged.append({**row, "id": f"many_{n}", **frames})
    write_jsonl(folder / "data.jsonl", ragged)
    words = ["--checkpoint_path", trained, "--eval_data_path", folder / "data.jsonl", "--batch_size", 2]
    words += ["--frames_dir", FIXTURES / "frames", "--audio_dir", folder / "audio", "--max_new_tokens", 4]
    return [*map(str, words), "--max_eval_frames", "0"]


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """The rows file of one process that nothing disturbed."""
    path = tmp_path_factory.mktemp("undisturbed") / "x.jsonl"
    assert ev.main([*command, *ARMS, "--output_file", str(path)]) == 0
    return path


@pytest.fixture()
def launch(command, tmp_path):
    """Starts ranks whose rows go to x.jsonl; what still runs is killed in the end."""
    started = []

    def launch(count, *more, **how):
        started.append(Launch([*command, "--output_file", tmp_path / "x.jsonl", *ARMS, *more], count, **how))
        return started[-1]

    yield launch
    for launched in started:
        for rank in launched.ranks:
            rank.end_now()


def assert_same_files(folder, undisturbed):
    """The same rows but for their times, in files of the same names; and the same figures."""
    names = sorted(file.name for file in undisturbed.parent.iterdir())
    assert sorted(file.name for file in folder.glob("x.*")) == names
    for name in names:
        one, other = folder / name, undisturbed.parent / name
        if name.endswith(".summary.json"):
            one, other = (without_times(json.loads(file.read_text())) for file in (one, other))
            assert one == other
        elif name.endswith(".jsonl"):
            one, other = ([without_time(row) for row in read_jsonl(file)] for file in (one, other))
            assert one == other
        else:
            assert one.read_bytes() == other.read_bytes()


def rows_in(folder):
    return sum(file.read_bytes().count(b"\n") for file in folder.glob("x*.jsonl*") if file.suffix != ".json")


@pytest.mark.slow
def test_torchrun_writes_what_one_process_writes(warm, command, undisturbed, tmp_path):
    flags = [ROOT / "evaluate_checkpoint.py", *command, *ARMS, "--output_file", tmp_path / "x.jsonl"]
    done = subprocess.run(
        [warm, "-m", "torch.distributed.run", "--nproc_per_node", "2", *map(str, flags)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Loading Eval Data") == done.stdout.count(f"Answered {2 * ROWS} rows") == 1
    assert_same_files(tmp_path, undisturbed)
    summary = json.loads((tmp_path / "x.summary.json").read_text())
    assert summary["manifest"]["runtime"]["world_size"] == 2


def test_three_ranks_answer_every_arm_and_share_the_cache(command, launch, tmp_path):
    """Seven rows among three ranks: three, two and two."""
    alone = tmp_path / "alone" / "x.jsonl"
    flags = ["--arms", "all", "--limit", "7", "--batch_size", "1"]
    cache = [tmp_path / name for name in ("cache", "other_cache")]
    assert ev.main([*command, "--output_file", str(alone), *flags, "--cache_features", str(cache[0])]) == 0
    launched = launch(3, *flags, "--cache_features", cache[1])
    assert launched.end() == [0, 0, 0], launched.said()
    assert_same_files(tmp_path, alone)
    assert len(list(tmp_path.glob("x*.run.json"))) == 9
    names = [sorted(file.name for file in folder.iterdir()) for folder in cache]
    assert names[0] == names[1] and names[0]
    assert launched.said()[1:] == ["", ""]


@pytest.mark.parametrize(("victims", "number", "then"), [
    ([0], signal.SIGKILL, 3), ([1], signal.SIGKILL, 1), ([1], signal.SIGTERM, 2), ([0, 1], signal.SIGTERM, 1),
])  # fmt: skip
def test_a_stopped_run_is_gone_on_with_by_any_number_of_ranks(launch, undisturbed, tmp_path, victims, number, then):
    launched = launch(2)
    part = tmp_path / "x.jsonl.rank-1"
    launched.wait_for(lambda: part.exists() and part.stat().st_size and (tmp_path / "x.jsonl").stat().st_size)
    before = rows_in(tmp_path)
    for victim in victims:
        launched.ranks[victim].send(number)
    statuses = launched.end()
    assert set(statuses) <= {-signal.SIGKILL, 143}, launched.said()
    kept = rows_in(tmp_path)
    assert before <= kept < 2 * ROWS
    if number == signal.SIGTERM:
        last = launched.said()[0].splitlines()[-1]
        least, answered = re.match(r"Stopped by SIGTERM: (at least )?(\d+) of 32 rows are answered", last).groups()
        assert before <= int(answered) <= kept and (least or int(answered) == kept)
    assert launched.said()[1] == "" and "Traceback" not in launched.said()[0]

    gone_on = launch(then)
    assert gone_on.end() == [0] * then, gone_on.said()
    assert f"Answered {2 * ROWS - kept} rows" in gone_on.said()[0]
    assert_same_files(tmp_path, undisturbed)


def test_what_rank_0_finds_wrong_is_said_once(launch, tmp_path):
    for flags, wrong in ((["--max_eval_frames", "x"], "invalid integer"), (["--train_data_path", "gone"], "gone")):
        launched = launch(2, *flags)
        statuses = launched.end()
        assert statuses[0] == 2 and statuses[1] != 0
        said, other = launched.said()
        assert said.count("error:") == 1 and wrong in said and other == ""
        assert not (tmp_path / "x.jsonl").exists()


def test_a_rank_that_fails_says_why_and_the_others_nothing(launch, undisturbed, tmp_path):
    launched = launch(2, limits={1: 1500})
    statuses = launched.end()
    assert statuses == [143, 2]
    said, other = launched.said()
    assert "error: " in other and "x.jsonl.rank-1: " in other and len(other.splitlines()) == 1
    assert "Stopped by" not in said and "error" not in said
    assert launch(2).end() == [0, 0]
    assert_same_files(tmp_path, undisturbed)


def test_rows_of_other_settings_are_refused_in_part_files_too(launch, command, tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    assert ev.main([*command, "--output_file", str(path)]) == 0
    path.rename(tmp_path / "x.jsonl.rank-1")
    path.touch()
    capsys.readouterr()
    assert ev.main([*command, "--output_file", str(path), "--max_new_tokens", "3"]) == 2
    assert "max_new_tokens (4 then, 3 now)" in capsys.readouterr().err
    assert ev.main([*command, "--output_file", str(path), "--max_new_tokens", "3", "--overwrite"]) == 0
    assert "Answered 16 rows" in capsys.readouterr().out and not (tmp_path / "x.jsonl.rank-1").exists()


def test_scoring_needs_no_rank(undisturbed, tmp_path, command, capsys, monkeypatch):
    """As --eval_answers starts it, in the environment of a rank, without a store that it could reach."""
    shutil.copy(undisturbed, tmp_path / "x.jsonl")
    data = command[command.index("--eval_data_path") + 1]
    flags = ["--score_only", "--output_file", tmp_path / "x.jsonl", "--eval_data_path", data]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    ranks = [Script("evaluate_checkpoint.py", flags, env={**env, "RANK": str(rank)}) for rank in range(2)]
    assert [rank.end() for rank in ranks] == [0, 0]
    assert "Accuracy in %, of all 16 rows" in ranks[0].said() and ranks[1].said() == ""
