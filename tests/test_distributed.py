"""Training on several ranks, by gloo on the CPU: the results are those of one rank, and faults end all of them."""

import json
import os
import subprocess
import sys

import pytest
import torch

import train_vqa as vqa
from tests.conftest import EVAL_DATA, ROOT, weights_of

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")

# What is trained, with how many rows a batch: five rows fill the last batches of an epoch in part, or not at all.
BOTH = ("--train_vision_tower", "True", "--train_audio_encoder", "True")
EQUAL = {
    "all tokens of frames": (1, ()),
    "all tokens, frames in pairs": (2, ("--frame_mode", "video")),
    "speech alone, by length": (2, ("--audio_tokens", "speech", "--train_sampling_strategy", "group_by_length")),
    "speech alone, frames in pairs, encoders": (1, ("--audio_tokens", "speech", "--frame_mode", "video", *BOTH)),
    "nothing for the second rank": (5, ("--train_sampling_strategy", "sequential")),
    "the whole decoder": (1, ("--train_decoder", "full", *BOTH)),
    "no speech": (1, ("--input_mode", "text")),
}


def launch(*command):
    """Starts a command that trains, each rank in one thread; returns the process, whose output is text."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def logged(folder, *names):
    """What each log entry holds of the named figures."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history for name in names if name in entry]


def test_two_ranks_train_as_one_with_twice_the_accumulation(argv, tmp_path):
    def flags(ranks, place, size, more):
        folder = tmp_path / f"{place}-{ranks}"
        lora = () if "full" in more else ("--lora_dropout", "0")
        trained = [flag for flag in argv(folder) if "full" not in more or flag not in ("--lora_r", "4")]
        evaluation = (*EVAL_DATA[:2], "--eval_strategy", "epoch", "--per_device_eval_batch_size", "2")
        return [
            *trained, *evaluation, *lora, *more, "--per_device_train_batch_size", str(size), "--learning_rate", "1e-3",
            "--gradient_accumulation_steps", str(2 // ranks), "--num_train_epochs", "2", "--logging_steps", "1",
            "--save_strategy", "epoch", "--save_only_model", "True",
        ]  # fmt: skip

    settings = list(enumerate(EQUAL.values()))
    (tmp_path / "runs.json").write_text(json.dumps([flags(2, i, *setting) for i, setting in settings]))
    started = launch(*TORCHRUN, ROOT / "tests" / "ranks.py", tmp_path / "runs.json")
    for place, setting in settings:
        assert vqa.main(flags(1, place, *setting)) == 0
    said = started.communicate(timeout=300)[0]
    assert started.returncode == 0, said
    assert said.count("Model loaded in full") == len(EQUAL)  # and not twice
    for place, name in enumerate(EQUAL):
        one, two = (tmp_path / f"{place}-{ranks}" for ranks in (1, 2))
        for figures in (("loss", "grad_norm"), ("eval_loss",)):
            assert logged(two, *figures) == pytest.approx(logged(one, *figures), rel=1e-5), name
        ends = (one, two, min(one.glob("checkpoint-*"), key=lambda path: int(path.name[11:])))
        end, other, middle = (torch.cat([w.flatten() for w in weights_of(f).values()]) for f in ends)
        assert (end - other).norm() < 0.01 * (end - middle).norm(), name
