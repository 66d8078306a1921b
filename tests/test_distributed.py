"""Training on several ranks, by gloo on the CPU: the results are those of one rank, and faults end all of them."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest
import torch
import torch.distributed as dist

import train_vqa as vqa
from tests.conftest import (
    EVAL_DATA,
    EVALUATION,
    FIXTURES,
    ROOT,
    SIX_STEPS,
    read_jsonl,
    refusal,
    weights_of,
    write_jsonl,
)
from tests.faults import Script
from tests.test_faults import RESUME, assert_same
from tests.test_flags import LAUNCH_LINES
from tests.warm import default_signals

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# Six steps of two rows over two epochs, with dropout, as SIX_STEPS, but one row on each rank.
SHARED = (*SIX_STEPS, *EVALUATION, "--save_steps", "2", "--gradient_accumulation_steps", "1")
STORES = []  # never freed: a fork that frees one waits for its thread, which the fork does not have

# What is trained, with how many rows a batch: five rows fill the last batches of an epoch in part, or not at all. The
# whole decoder is in test_fsdp.py.
BOTH = ("--train_vision_tower", "True", "--train_audio_encoder", "True")
EQUAL = {
    "all tokens of frames": (1, ()),
    "all tokens, frames in pairs": (2, ("--frame_mode", "video")),
    "speech alone, by length": (2, ("--audio_tokens", "speech", "--train_sampling_strategy", "group_by_length")),
    "speech alone, frames in pairs, encoders": (1, ("--audio_tokens", "speech", "--frame_mode", "video", *BOTH)),
    "nothing for the second rank": (5, ("--train_sampling_strategy", "sequential")),
    "no speech": (1, ("--input_mode", "text")),
    "answers, and cached features": (1, ("--eval_answers", "5", "--cache_features", "{}-features")),
}


SPOKEN = ("No accelerator", "   ", "⏳", "🔧", "✓", "🧠", "trainable", "📁", "{'")  # what each run says


def logged(folder, *names):
    """What each log entry holds of the named figures."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history for name in names if name in entry]


class Ranks:
    """Two ranks that run tests/ranks.py, in forks, which have torch already; this process does as torchrun does."""

    def __init__(self, folder, *runs, fault=None):
        work = folder / "work.json"
        work.write_text(json.dumps({"runs": runs} | ({"fault": fault} if fault else {})))
        STORES.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": STORES[-1].port, "TORCHELASTIC_USE_AGENT_STORE": True}
        shared |= {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT}
        self.scripts = []
        for rank in range(2):
            with pytest.MonkeyPatch.context() as patch:
                for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items():
                    patch.setenv(name, str(value))
                self.scripts.append(Script("tests/ranks.py", [work]))

    def end(self):
        """Wait for both; where one fails, the other gets a SIGTERM, and a minute. Returns the statuses, and what they
        said but for progress bars."""
        deadline = time.time() + 240
        while not (ends := [script.poll() for script in self.scripts]) or None in ends:
            if any(ends):
                for script in self.scripts:
                    if script.poll() is None:
                        script.send(signal.SIGTERM)
                deadline = min(deadline, time.time() + 60)
            assert time.time() < deadline, self.end_now()
            time.sleep(0.05)
        return ends, [re.sub(r".*\r", "", script.said()) for script in self.scripts]

    def end_now(self):
        for script in self.scripts:
            script.end_now()
        return [script.said() for script in self.scripts]


@pytest.fixture()
def ranks(argv, tmp_path):
    """Runs flags on two ranks, with a fault in them; returns the statuses and what they said."""
    started = []

    def run(*flags, fault=None, folder=tmp_path / "out"):
        started.append(Ranks(tmp_path, argv(folder, *flags), fault=fault))
        return started[-1].end()

    yield run
    for each in started:
        each.end_now()


@pytest.fixture(scope="module")
def undisturbed(argv, tmp_path_factory):
    """The folder of a run of SHARED on two ranks that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    started = Ranks(folder, argv(folder / "out", *SHARED))
    statuses, (said, other) = started.end()
    assert statuses == [0, 0], (said, other)
    assert other == "" and said.count("Model loaded in full") == 1
    return folder / "out"


# Where a signal arrives, at which rank (-1: each), the status, and the step at which all stop.
SIGNALLED = {
    "at a step": ([1, "training", 5, "TERM"], 143, 5),
    "in an evaluation": ([0, "evaluation", 1, "INT"], 130, 3),
    "in a save, to both": ([-1, "saving", 1, "HUP"], 129, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALLED)
def test_a_signal_stops_all_ranks_at_one_step_and_going_on_is_the_same_bit_for_bit(name, ranks, undisturbed, tmp_path):
    fault, status, step = SIGNALLED[name]
    statuses, (said, other) = ranks(*SHARED, fault=fault)
    assert statuses == [status, status] and other == "", (said, other)
    assert said.count("finishing the step and saving") == 1 and f"checkpoint-{step} is complete" in said
    assert ranks(*SHARED, *RESUME)[0] == [0, 0]
    assert_same(tmp_path / "out", undisturbed)


# What goes wrong, and the one line that is said of it; a rank that is killed says nothing.
FAILURES = {
    "rank 0 is killed": ([0, "training", 4, "KILL"], None),
    "rank 1 is killed": ([1, "training", 4, "KILL"], None),
    "not a number": ([1, "training", 4, "nan"], "error: step 4: the loss is nan with "),
    "a damaged frame": ([1, "reading", 5, "damage"], "error: frame "),
    "out of memory": ([1, "training", 4, "memory"], "error: out of memory "),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILURES)
def test_a_rank_that_fails_ends_the_other_and_only_its_line_is_said(name, ranks, data, tmp_path):
    fault, line = FAILURES[name]
    statuses, (said, other) = ranks(*SHARED, *data.train_flags, fault=fault)
    lines = [text for text in (said + other).splitlines() if text and not text.startswith(SPOKEN)]
    if line is None:
        assert lines == [] and sorted(statuses) == [-9, 143]
    else:
        assert len(lines) == 1 and lines[0].startswith(line) and sorted(statuses) == [1, 143]
    out = tmp_path / "out"
    saved = 3 if name == "out of memory" else 2  # memory alone leaves whole weights, which are then saved
    assert vqa.find_damage(out / f"checkpoint-{saved}", vqa.RESUME_FILES) is None
    assert [path.name for path in out.glob("checkpoint-*") if path.name > f"checkpoint-{saved}"] == []


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_where_a_step_has_as_many_rows(train, undisturbed, tmp_path):
    for step in (2, 4):
        shutil.copytree(undisturbed / f"checkpoint-{step}", tmp_path / f"out/checkpoint-{step}")
    message = refusal(train, tmp_path / "out", *SHARED, *RESUME)
    assert "2 rows a step (1 x 1 x 2: batch, accumulation, GPUs), and this run would have 1 on 1 GPU; " in message
    assert (
        message.endswith("set --per_device_train_batch_size 1 --gradient_accumulation_steps 2") and "\n" not in message
    )
    assert train(tmp_path / "out", *SHARED, *RESUME, "--gradient_accumulation_steps", "2") == 0
    assert vqa.load_settings(tmp_path / "out")["training"]["ranks"] == 1
    assert logged(tmp_path / "out", "eval_loss")[0] == logged(undisturbed, "eval_loss")[0]


@pytest.mark.parametrize(
    ("stored", "flags", "advice"),
    [
        ((1, 8, 1), (1, 8, 4), "--per_device_train_batch_size 1 --gradient_accumulation_steps 2"),
        ((6, 1, 2), (6, 1, 4), "--per_device_train_batch_size 3 --gradient_accumulation_steps 1"),
        ((1, 4, 1), (1, 4, 3), "take a number of GPUs by which 4 can be divided"),
        ((2, 4, 1), (2, 1, 4), None),
    ],
)
def test_the_flags_that_make_a_step_as_large_as_before(stored, flags, advice, tmp_path):
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "ranks")
    stored, now = (dict(zip(names, numbers, strict=True)) for numbers in (stored, flags))
    if advice:
        assert refusal(vqa.refuse_other_batch, tmp_path, stored, now).endswith(advice)
    else:
        vqa.refuse_other_batch(tmp_path, stored, now)


@pytest.mark.slow
def test_the_shell_script_trains_on_two_ranks_and_ends_with_the_signals_status(warm, tmp_path):
    env = {**os.environ, "NUM_GPUS": "2", "OMP_NUM_THREADS": "1", "PYTHON": warm}
    flags = ("--max_steps", "500", "--save_strategy", "steps", "--save_steps", "1", "--target_train_loss", "0")
    with (tmp_path / "said").open("w") as said:
        command = ["bash", ROOT / "train_with_eval_FINAL.sh", "--smoke", *flags]
        process = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=said, stderr=said, preexec_fn=default_signals)
        try:
            deadline = time.time() + 240
            while not list(tmp_path.glob("checkpoints/smoke/checkpoint-*/manifest.json")):
                assert process.poll() is None and time.time() < deadline, (tmp_path / "said").read_text()
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 143
        finally:
            process.terminate()
    text = (tmp_path / "said").read_text()
    assert text.count("Model loaded in full") == 1 and "Traceback" not in text and not (tmp_path / "results").exists()
    assert re.match(r"Stopped by SIGTERM: .*checkpoint-\d+ is complete", text.strip().splitlines()[-1])


@pytest.mark.slow
def test_the_public_line_trains_on_two_ranks(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    rows = [row | {"frames": row["frames"][:1]} for row in read_jsonl(FIXTURES / "smoke.jsonl")[:2]]
    paths = {"frames": FIXTURES / "frames", "audio": FIXTURES / "audio"}
    paths["rows"] = write_jsonl(tmp_path / "rows.jsonl", rows)
    line = shlex.split(LAUNCH_LINES["train_multivideo_overnight.sh"].format(**paths, out=tmp_path / "out"))
    started = Ranks(tmp_path, [*line, "--model_name_or_path", str(tiny), "--init", "random", "--lora_r", "4"])
    assert started.end()[0] == [0, 0]
    assert vqa.find_damage(tmp_path / "out") is None and len(logged(tmp_path / "out", "eval_loss")) == 1


@pytest.mark.slow
def test_two_ranks_train_as_one_with_twice_the_accumulation(warm, argv, tmp_path):
    """By torchrun itself, all in one start; and the other rank says nothing."""

    def flags(ranks, place, size, more):
        folder = tmp_path / f"{place}-{ranks}"
        return [
            *argv(folder), *EVAL_DATA[:2], "--eval_strategy", "epoch", "--per_device_eval_batch_size", "2",
            "--lora_dropout", "0", *(flag.format(folder) for flag in more),
            "--max_eval_frames", "2", "--per_device_train_batch_size", str(size), "--learning_rate", "1e-3",
            "--gradient_accumulation_steps", str(2 // ranks), "--num_train_epochs", "2", "--logging_steps", "1",
            "--save_strategy", "epoch", "--save_only_model", "True",
        ]  # fmt: skip

    settings = list(enumerate(EQUAL.values()))
    (tmp_path / "runs.json").write_text(json.dumps({"runs": [flags(2, i, *setting) for i, setting in settings]}))
    command = [warm, *TORCHRUN, ROOT / "tests" / "ranks.py", tmp_path / "runs.json"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as torchrun:
        for place, setting in settings:
            assert vqa.main(flags(1, place, *setting)) == 0
        said = torchrun.communicate(timeout=300)[0]
    assert torchrun.returncode == 0, said
    assert said.count("Model loaded in full") == len(EQUAL) and said.count("{'train_runtime'") == len(EQUAL)
    for place, name in enumerate(EQUAL):
        one, two = (tmp_path / f"{place}-{ranks}" for ranks in (1, 2))
        for figures in (("loss", "grad_norm"), ("eval_loss",), ("eval_choice", "eval_contains")):
            assert logged(two, *figures) == pytest.approx(logged(one, *figures), rel=1e-5), name
        ends = (one, two, min(one.glob("checkpoint-*"), key=lambda path: int(path.name[11:])))
        end, other, middle = (torch.cat([w.flatten() for w in weights_of(f).values()]) for f in ends)
        assert (end - other).norm() < 0.01 * (end - middle).norm(), name
    for file in (tmp_path / f"{len(EQUAL) - 1}-1" / vqa.ANSWERS_DIR).glob("step-*.jsonl"):
        assert read_jsonl(file) == read_jsonl(tmp_path / f"{len(EQUAL) - 1}-2" / vqa.ANSWERS_DIR / file.name)
