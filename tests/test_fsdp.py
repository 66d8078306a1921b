"""--train_decoder full on two ranks (gloo, CPU), shared out by FSDP2: the same as on one, and saved as full models."""

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
from tests.conftest import EVALUATION, FULL_SIZE, ROOT, refusal, same_tensors, weights_of
from tests.test_faults import without_lora

RUN = (
    *("--train_decoder", "full", "--train_vision_tower", "True", "--train_audio_encoder", "True"),
    *("--frame_mode", "video", "--audio_tokens", "speech", "--learning_rate", "1e-4", "--logging_steps", "1"),
    *("--per_device_train_batch_size", "1", "--max_steps", "5", "--save_strategy", "steps", "--save_steps", "2"),
    *(*EVALUATION, "--eval_steps", "2", "--eval_answers", "2", "--load_best_model_at_end", "True"),
    *("--save_total_limit", "3"),
)
FILE = 2**25  # bytes of a file of weights, where memory is measured


def wide_model(tiny):
    """The tiny model with an MLP of 100 MB."""
    config = vqa.load_config(tiny)
    config.text_config.intermediate_size = 2**16
    return vqa.train_fully(vqa.draw_model(config, 1, torch.device("cpu"), False, dtype=torch.float32), torch.float32)


def status_bytes(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def save_wide_model(tiny: Path, folder: Path) -> None:
    """Save a sharded model in files of FILE bytes; note by how much the memory of the rank that writes grew."""
    args = vqa.VQATrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
    model = wide_model(tiny)
    vqa.shard(model, args)
    vqa.SHARD_BYTES = FILE
    folder.mkdir(exist_ok=True)
    for _ in range(2):  # the first time libraries take memory of their own
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status_bytes("VmRSS")
        vqa.write_weights(model, folder if args.should_save else None)
        grown = status_bytes("VmHWM") - before
    if args.should_save:
        (folder / "grown").write_text(str(grown))


def main(tiny: Path, out: Path, *flags: str) -> None:
    """What each of the two ranks does: a run, the same from its second step on, and a save of a larger model."""
    torch.set_num_threads(1)
    assert vqa.main([*flags, "--output_dir", str(out / "two")]) == 0
    if os.environ["RANK"] == "0":
        shutil.copytree(out / "two" / "checkpoint-2", out / "resumed" / "checkpoint-2")
    torch.distributed.barrier()
    assert vqa.main([*flags, "--output_dir", str(out / "resumed"), "--resume_from_checkpoint", "True"]) == 0
    save_wide_model(tiny, out / "wide")


@pytest.fixture(scope="module")
def ranks(tiny, argv, tmp_path_factory):
    """The folder with what two ranks wrote; not by `warm`, as memory is measured."""
    out = tmp_path_factory.mktemp("ranks")
    flags = without_lora(argv(out, *RUN, "--gradient_accumulation_steps", "1"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.test_fsdp", str(tiny), str(out), *flags]
    # Freed tensors leave the process at once. In a heap they may stay, and it is chance whether they count.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("On disk a checkpoint takes") == 2  # each run says so, once
    return out


@pytest.fixture(scope="module")
def alone(argv, tmp_path_factory):
    """The same run on one rank."""
    out = tmp_path_factory.mktemp("alone")
    assert vqa.main(without_lora(argv(out, *RUN, "--gradient_accumulation_steps", "2"))) == 0
    return out


def log_of(folder, *names):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [[entry[name] for name in names] for entry in history if entry.keys() >= {*names}]


def distance(one, other) -> float:
    """Of two models' weights, root of the sum of squares."""
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in one) ** 0.5


@pytest.mark.slow
def test_two_ranks_train_as_one(ranks, alone, fresh):
    for names in (("step", "loss", "grad_norm"), ("step", "eval_loss", "eval_contains")):
        torch.testing.assert_close(log_of(ranks / "two", *names), log_of(alone, *names), rtol=1e-5, atol=0)
    one, two, start = weights_of(alone), weights_of(ranks / "two"), dict(fresh().named_parameters())
    assert one.keys() == two.keys() == start.keys()
    assert distance(one, two) < 0.01 * distance(one, start)


@pytest.mark.slow
def test_what_two_ranks_save_is_one_model(ranks, evaluate):
    """The best checkpoint is whole, of the final model's weights, and loads on one process."""
    best = Path(json.loads((ranks / "two" / "trainer_state.json").read_text())["best_model_checkpoint"])
    assert vqa.find_damage(best, vqa.RESUME_FILES) is None
    assert same_tensors(weights_of(best), weights_of(ranks / "two"))
    assert vqa.load_trained(best).model.lm_head.weight.shape == (512, 64)
    assert evaluate(checkpoint=ranks / "two").status == 0


@pytest.mark.slow
def test_resuming_changes_nothing(ranks):
    assert log_of(ranks / "two", "loss", "grad_norm") == log_of(ranks / "resumed", "loss", "grad_norm")
    assert log_of(ranks / "two", "eval_loss", "eval_contains") == log_of(
        ranks / "resumed", "eval_loss", "eval_contains"
    )
    assert same_tensors(weights_of(ranks / "two"), weights_of(ranks / "resumed"))


@pytest.mark.slow
def test_saving_takes_the_memory_of_one_file(ranks):
    """And of a largest weight, which gloo gathers in RAM where NCCL gathers it on the GPU."""
    files = [file.stat().st_size for file in (ranks / "wide").glob("*.safetensors")]
    assert len(files) == 5 and sum(files) > 3 * FILE
    assert int((ranks / "wide" / "grown").read_text()) < max(files) + FILE / 2 + 2**20


@pytest.mark.slow
def test_one_rank_goes_on_with_what_two_saved(ranks, alone, argv, tmp_path):
    """And leaves no part of the optimizer that another rank wrote, in a save that did not end."""
    for step in (2, 4):
        shutil.copytree(ranks / "two" / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-4" / vqa.MANIFEST_FILE).unlink()
    more = ("--gradient_accumulation_steps", "2", "--resume_from_checkpoint", "True")
    assert vqa.main(without_lora(argv(tmp_path, *RUN, *more))) == 0
    assert [path.name for path in (tmp_path / "checkpoint-4").glob("optimizer*")] == ["optimizer.pt"]
    torch.testing.assert_close(log_of(tmp_path, "loss"), log_of(alone, "loss"), rtol=1e-4, atol=0)


@pytest.mark.parametrize("optim", ["adafactor", "adamw_bnb_8bit"])
def test_optimizers_that_need_whole_weights_are_refused(optim, argv, tmp_path):
    more = ("--train_decoder", "full", "--dry_run", "True", "--num_gpus", "2", "--optim", optim)
    assert refusal(vqa.main, without_lora(argv(tmp_path, *more))).startswith(
        f"--optim {optim}: cannot work on weights that GPUs share"
    )


def test_the_plan_divides_what_gpus_share(argv, tmp_path, capsys):
    sizes = []
    for gpus in ("1", "4"):
        wide = ("--train_decoder", "full", "--dry_run", "True", "--num_gpus", gpus, "--model_name_or_path", FULL_SIZE)
        assert vqa.main(without_lora(argv(tmp_path, *wide))) == 0
        sizes.append(float(re.search(r"gradients and optimizer ([\d.]+)", capsys.readouterr().out)[1]))
    assert sizes[1] == pytest.approx(sizes[0] / 4, abs=0.1)


def test_a_disk_that_cannot_hold_the_checkpoints_is_named(base, tmp_path):
    args = vqa.VQATrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="steps")
    state = vqa.TrainerState(max_steps=10**9, save_steps=1)
    vqa.check_room(base, args, state, 1)
    message = refusal(vqa.check_room, base, args, state, 10**9)
    assert message.startswith(f"--output_dir {tmp_path}: ") and "make room" in message and "\n" not in message


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]), *sys.argv[3:])
