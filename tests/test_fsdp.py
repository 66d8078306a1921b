"""--train_decoder full on two ranks (gloo, on the CPU), sharded by FSDP2: the same as one rank, saved as full models."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_vqa as vqa
from tests.conftest import EVALUATION, ROOT, edit_json, refusal, weights_of

RUN = (
    *("--train_decoder", "full", "--train_vision_tower", "True", "--train_audio_encoder", "True", "--save_steps", "2", "--save_total_limit", "2"),
    *("--frame_mode", "video", "--audio_tokens", "speech", "--learning_rate", "1e-3", "--max_train_samples", "4"),
    *("--per_device_train_batch_size", "1", "--max_steps", "4", "--save_strategy", "steps", "--logging_steps", "1"),
    *EVALUATION, *("--eval_steps", "2", "--eval_answers", "2", "--load_best_model_at_end", "True"),
)  # fmt: skip
SMALL_SHARD = 2**25  # bytes: a file of weights for the test of memory


def log_of(folder):
    """Step, loss and gradient norm of each logged step, and each loss of an evaluation."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [[entry.get(name, 0.0) for name in ("step", "loss", "grad_norm", "eval_loss")] for entry in history[:-1]]


def peak_of(action) -> int:
    """Bytes by which the memory of this process grew at its highest while `action()` ran."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    action()
    return 1024 * (int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) - before)


def save_wide_model(tiny: Path, folder: Path) -> None:
    """Save a sharded model of ten small files, and note by how much the memory of the rank that writes grew."""
    config = vqa.load_config(tiny)
    config.text_config.intermediate_size = 2**16
    tokenizer = vqa.load_tokenizer(tiny)
    model = vqa.draw_model(config, 1, torch.device("cpu"), False, dtype=torch.float32)
    args = vqa.VQATrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
    vqa.shard(vqa.train_fully(model, torch.float32), args)
    vqa.SHARD_BYTES = SMALL_SHARD
    folder.mkdir(exist_ok=True)
    write = lambda: vqa.write_weights(model, folder if args.should_save else None)  # noqa: E731
    write()  # the first call of each library takes memory of its own
    grown = peak_of(write)
    if args.should_save:
        (folder / "grown").write_text(str(grown))


def main(flags: list[str], tiny: Path, out: Path) -> None:
    """What each of the two ranks does."""
    torch.set_num_threads(1)
    vqa.main([*flags, "--output_dir", str(out / "two"), "--gradient_accumulation_steps", "1"])
    if os.environ["RANK"] == "0":
        shutil.copytree(out / "two" / "checkpoint-2", out / "resumed" / "checkpoint-2")
    torch.distributed.barrier()
    flags = [*flags, "--gradient_accumulation_steps", "1", "--resume_from_checkpoint", "True"]
    vqa.main([*flags, "--output_dir", str(out / "resumed")])
    save_wide_model(tiny, out / "wide")


if __name__ == "__main__":
    main(sys.argv[3:], *map(Path, sys.argv[1:3]))
