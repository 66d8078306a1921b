"""Training that ends early or is attacked: what is saved, what is refused, and that going on changes nothing."""

import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_vqa as vqa
from tests.conftest import FIXTURES
from tests.test_data import refusal
from tests.test_main import FIXTURE_DATA, RANDOM_TINY, SMALL

RUN = (
    *(
        *FIXTURE_DATA,
        *RANDOM_TINY,
        *SMALL,
        "--lora_dropout",
        "0.3",
        "--learning_rate",
        "1e-3",
        "--disable_tqdm",
        "True",
    ),
    *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--max_steps", "6"),
    *("--logging_steps", "2", "--save_strategy", "steps", "--save_steps", "100"),
)
EVALUATION = ("--eval_data_path", str(FIXTURES / "smoke.jsonl"), "--max_eval_samples", "2", "--eval_strategy", "steps",
              "--eval_steps", "3", "--per_device_eval_batch_size", "1", "--max_eval_frames", "2")  # fmt: skip
RESUME = ("--resume_from_checkpoint", "True")


def run(folder, *flags) -> int:
    return vqa.main([*RUN, "--output_dir", str(folder), *flags])


def result(folder):
    """Everything that must come out the same: weights, and the log but for what is counted since the last start."""
    state = json.loads((Path(folder) / "trainer_state.json").read_text())
    timed = ("runtime", "per_second", "total_flos", "train_loss")
    log = [{k: v for k, v in entry.items() if not any(word in k for word in timed)} for entry in state["log_history"]]
    return load_file(Path(folder) / "adapter_model.safetensors"), log


def assert_same(one, other):
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps, over two epochs of three, that nothing disturbed, with a checkpoint at each second step."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert run(folder, *EVALUATION, "--save_steps", "2") == 0
    return folder


@pytest.fixture()
def signalled(monkeypatch):
    """Sends this process a signal as the n-th call of a method of the Trainer, or of its guard, begins."""

    def arrange(method, count, *signals):
        owner = vqa.RunGuard if method.startswith("on_") else vqa.VQATrainer
        calls, inner = [], getattr(owner, method)

        def outer(self, *args, **kwargs):
            calls.append(method)
            if len(calls) == count:
                for number in signals:
                    os.kill(os.getpid(), number)
            return inner(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, outer)

    before = {number: signal.signal(number, signal.default_int_handler) for number in vqa.STOP_SIGNALS}
    yield arrange  # also where these tests run under nohup, whose SIGHUP the run would rightly leave alone
    for number, handler in before.items():
        signal.signal(number, handler)


TERM, INT, HUP = vqa.STOP_SIGNALS


@pytest.mark.parametrize(
    ("method", "count", "signals", "step"),
    [
        ("training_step", 3, [TERM], 2),  # the first micro-batch of the second step
        pytest.param(
            "training_step", 5, [INT], 3, marks=pytest.mark.slow
        ),  # of an epoch the last, with all that is due
        ("prediction_step", 2, [HUP], 3),  # in the middle of the evaluation after the third step
        # between the last gradient of the third step and its optimizer step
        pytest.param("on_pre_optimizer_step", 3, [HUP], 3, marks=pytest.mark.slow),
        pytest.param(
            "save_model", 1, [TERM, TERM], 2, marks=pytest.mark.slow
        ),  # while checkpoint-2 is being written, twice
        pytest.param("training_step", 10, [TERM], 6, marks=pytest.mark.slow),  # the last step of all
    ],
)
def test_stopped_by_a_signal_and_gone_on_is_the_same_bit_for_bit(
    whole, tmp_path, monkeypatch, signalled, method, count, signals, step
):
    signalled(method, count, *signals)
    with pytest.raises(vqa.Interrupted) as stop:
        run(tmp_path, *EVALUATION, "--save_steps", "2")
    assert stop.value.signum == signals[0]
    assert f"checkpoint-{step} is complete" in str(stop.value)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert vqa.find_damage(tmp_path / f"checkpoint-{step}", vqa.RESUME_FILES) is None
    monkeypatch.undo()
    assert run(tmp_path, *EVALUATION, "--save_steps", "2", *RESUME) == 0
    assert_same(result(tmp_path), result(whole))
    assert list(tmp_path.glob("tmp-*")) == []


def test_saves_carry_a_manifest(whole):
    for folder in (whole, *vqa.checkpoints_of(whole).values()):
        assert vqa.find_damage(folder) is None
    assert list(vqa.checkpoints_of(whole)) == [6, 4, 2]


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", [*vqa.RESUME_FILES, "adapter_config.json", "adapter_model.safetensors", vqa.MANIFEST_FILE]
)
def test_a_damaged_checkpoint_is_passed_over_by_name(whole, tmp_path, capsys, name, damage):
    for number in (2, 4):
        shutil.copytree(whole / f"checkpoint-{number}", tmp_path / f"checkpoint-{number}")
    DAMAGES[damage](tmp_path / "checkpoint-4" / name)
    arguments = vqa.parse_arguments([*RUN, "--output_dir", str(tmp_path), *RESUME])[2]
    capsys.readouterr()
    assert vqa.find_checkpoint(arguments) == tmp_path / "checkpoint-2"
    assert capsys.readouterr().out.startswith(f"Passing over {tmp_path / 'checkpoint-4'}: {name} ")
    arguments.resume_from_checkpoint = str(tmp_path / "checkpoint-4")
    message = f"--resume_from_checkpoint {tmp_path / 'checkpoint-4'}: {name} "
    assert refusal(vqa.find_checkpoint, arguments).startswith(message)
    DAMAGES[damage](tmp_path / "checkpoint-2" / name)
    arguments.resume_from_checkpoint = "True"
    lines = refusal(vqa.find_checkpoint, arguments).splitlines()
    assert lines[2] == "no checkpoint is complete; move them away to start from the beginning"


@pytest.mark.parametrize("name", vqa.RESUME_FILES)
def test_a_folder_that_was_saved_without_a_state_is_passed_over(whole, tmp_path, name):
    """Its manifest is right, and going on from it would begin with a fresh optimizer, schedule or random state."""
    for number in (2, 4):
        shutil.copytree(whole / f"checkpoint-{number}", tmp_path / f"checkpoint-{number}")
    for gone in (name, vqa.MANIFEST_FILE):
        (tmp_path / "checkpoint-4" / gone).unlink()
    vqa.write_manifest(tmp_path / "checkpoint-4")
    assert vqa.find_damage(tmp_path / "checkpoint-4", vqa.RESUME_FILES) == f"{name} was not saved"
    arguments = vqa.parse_arguments([*RUN, "--output_dir", str(tmp_path), *RESUME])[2]
    assert vqa.find_checkpoint(arguments) == tmp_path / "checkpoint-2"


def test_starting_over_among_checkpoints_is_refused(whole):
    message = refusal(run, whole)
    assert message.startswith(f"{whole / 'checkpoint-6'} is there from an earlier run; --resume_from_checkpoint True")
    earlier = refusal(run, whole, "--resume_from_checkpoint", str(whole / "checkpoint-2"))
    assert earlier == message


def test_going_on_with_other_flags_is_refused(whole, tmp_path):
    shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    message = refusal(run, tmp_path, *RESUME, "--max_train_frames", "3", "--lora_r", "8")
    assert f"{tmp_path / 'checkpoint-4'}: was trained with max_train_frames 2, this run has 3" in message
    assert "lora" not in message and "was trained with r 4, this run has 8" in message


def test_a_run_that_goes_on_from_its_last_step_adds_none(whole, tmp_path):
    shutil.copytree(whole / "checkpoint-6", tmp_path / "checkpoint-6")
    for _ in range(2):
        assert run(tmp_path, *EVALUATION, *RESUME) == 0
        assert_same(result(tmp_path), result(whole))
    assert list(vqa.checkpoints_of(tmp_path)) == [6]


def test_a_signal_in_the_last_step_before_an_evaluation_at_the_epochs_end(tmp_path, monkeypatch, signalled):
    """The evaluation is cut short at its first batch, and made up for: also where the epoch is the last."""
    flags = (*EVALUATION[:4], "--eval_strategy", "epoch", "--max_eval_frames", "2", "--logging_steps", "1")
    assert run(tmp_path / "whole", *flags) == 0
    for micro_batch, step in ((5, 3), (10, 6)):
        folder = tmp_path / str(step)
        signalled("training_step", micro_batch, TERM)
        with pytest.raises(vqa.Interrupted, match=f"checkpoint-{step} is complete"):
            run(folder, *flags)
        assert not any(
            "eval_loss" in entry for entry in result(folder / f"checkpoint-{step}")[1][3 * (step == 6) + 1 :]
        )
        monkeypatch.undo()
        assert run(folder, *flags, *RESUME) == 0
        assert_same(result(folder), result(tmp_path / "whole"))


def test_the_first_start_may_already_ask_to_go_on_and_rotation_keeps_the_newest(tmp_path, capsys):
    assert run(tmp_path, *RESUME, "--save_steps", "1", "--save_total_limit", "2", "--max_steps", "4") == 0
    assert "No checkpoint to go on from; starting from the beginning." in capsys.readouterr().out
    assert list(vqa.checkpoints_of(tmp_path)) == [4, 3]


@pytest.mark.parametrize("folder", ["{}", "./out"])
def test_rotation_keeps_the_best_checkpoint_beside_the_newest(tmp_path, monkeypatch, folder):
    """The loss falls, and here the highest one is called the best: the first. Also once a run went on."""
    monkeypatch.chdir(tmp_path)
    folder = folder.format(tmp_path)
    flags = [*EVALUATION[:4], "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", "--max_eval_frames"]
    flags += ["2", "--save_total_limit", "2", "--load_best_model_at_end", "True", "--lr_scheduler_type", "constant"]
    flags += ["--metric_for_best_model", "eval_loss", "--greater_is_better", "True"]
    assert run(folder, *flags, "--max_steps", "3") == 0
    assert set(vqa.checkpoints_of(folder)) == {3, 2, 1}
    shutil.rmtree(Path(folder) / "checkpoint-3")
    assert run(folder, *flags, "--max_steps", "4", *RESUME) == 0
    assert set(vqa.checkpoints_of(folder)) == {4, 3, 1}
    best = json.loads((Path(folder) / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert Path(best) == Path(folder) / "checkpoint-1"
    assert_same((result(folder)[0], []), (result(best)[0], []))


# ------------------------------------------------------------------------------------------------ numbers, memory, disk


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer(tmp_path, monkeypatch, value):
    inner, calls = vqa.SurgicalVQAModel.forward, []

    def forward(self, *args, **kwargs):
        calls.append(1)
        output = inner(self, *args, **kwargs)
        output.loss = output.loss * float(value) if len(calls) == 5 else output.loss
        return output

    monkeypatch.setattr(vqa.SurgicalVQAModel, "forward", forward)
    message = refusal(run, tmp_path, "--save_steps", "1")
    assert message.startswith(f"step 3: the loss is {value} with fx-00")
    assert message.count("smoke.jsonl:") == 1
    assert f"{tmp_path}/checkpoint-2" in message
    stored = load_file(tmp_path / "checkpoint-2/adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in stored.values())


def test_a_gradient_that_is_not_finite_names_all_samples_of_the_step(tmp_path, monkeypatch):
    inner = vqa.SurgicalVQAModel.forward

    def forward(self, *args, **kwargs):
        output = inner(self, *args, **kwargs)
        output.loss.register_hook(lambda gradient: gradient * float("inf"))
        return output

    monkeypatch.setattr(vqa.SurgicalVQAModel, "forward", forward)
    message = refusal(run, tmp_path)
    assert message.startswith("step 1: the gradient is not finite with fx-00")
    assert message.count("smoke.jsonl:") == 2


def test_out_of_memory_is_one_line_and_the_finished_steps_are_saved(whole, tmp_path, monkeypatch):
    inner, calls = vqa.SurgicalVQAModel.forward, []

    def forward(self, *args, **kwargs):
        calls.extend([1] * self.training)
        if self.training and len(calls) == 9:  # the fifth step, of whose batches the first is done
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.2 "
                "GiB is free."
            )
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(vqa.SurgicalVQAModel, "forward", forward)
    message = refusal(run, tmp_path, *EVALUATION)
    assert message.startswith("out of memory (Tried to allocate 2.50 GiB) at step 5 with 1 samples of ")
    assert "\n" not in message and "tokens, the longest fx-00" in message
    for flag in ("per_device_train_batch_size", "max_train_frames", "max_image_size", "checkpoint_every_n 1"):
        assert f"--{flag}" in message
    assert message.endswith(f"{tmp_path}/checkpoint-4 is complete; go on with --resume_from_checkpoint True")
    assert vqa.find_damage(tmp_path / "checkpoint-4", vqa.RESUME_FILES) is None
    assert_same((result(tmp_path / "checkpoint-4")[0], []), (result(whole / "checkpoint-4")[0], []))
    monkeypatch.undo()
    assert run(tmp_path, *EVALUATION, *RESUME) == 0
    assert [entry["step"] for entry in result(tmp_path)[1]] == [entry["step"] for entry in result(whole)[1]]


@pytest.mark.parametrize("failing", ["adapter_model.safetensors", "optimizer.pt", "tokenizer.json", "scheduler.pt"])
def test_a_full_disk_leaves_the_last_checkpoint(whole, tmp_path, monkeypatch, failing):
    """The second save fails as its file is synced, as a disk that is full does."""
    inner, seen = vqa.sync, []

    def sync(path):
        seen.append(path.name)
        if seen.count(failing) == 2:
            raise OSError(28, "No space left on device", str(path))
        inner(path)

    monkeypatch.setattr(vqa, "sync", sync)
    message = refusal(run, tmp_path, *EVALUATION, "--save_steps", "2")
    assert message.startswith(f"{tmp_path}: ") and "4 could not be saved ([Errno 28] No space left on dev" in message
    assert "bytes are free there; the last complete checkpoint is" in message
    assert vqa.find_damage(tmp_path / "checkpoint-2", vqa.RESUME_FILES) is None
    assert {path.name for path in tmp_path.iterdir()} <= {".lock", "checkpoint-2", "checkpoint-4"}
    monkeypatch.undo()
    assert run(tmp_path, *EVALUATION, *RESUME) == 0
    assert_same(result(tmp_path), result(whole))


# -------------------------------------------------------------------------------------------------- hostile checkpoints


class Hostile:
    """Unpickling it makes the folder `ran`."""

    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["HOSTILE"]) / "ran"),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("plain", [True, False])
def test_a_pickle_that_would_run_code_does_not(whole, tmp_path, monkeypatch, name, plain):
    monkeypatch.setenv("HOSTILE", str(tmp_path))
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(whole / "checkpoint-4", folder)
    if plain:
        (folder / name).write_bytes(pickle.dumps(Hostile()))
    else:
        torch.save({"state": Hostile()}, folder / name)
    (folder / vqa.MANIFEST_FILE).unlink()
    vqa.write_manifest(folder)
    message = refusal(run, tmp_path, *EVALUATION, *RESUME)
    assert message.startswith(f"{folder}: ") and name in message and "\n" not in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "training_args.bin", "model.safetensors"])
def test_foreign_weights_in_a_checkpoint_are_left_alone_or_refused_by_name(whole, tmp_path, monkeypatch, name):
    """The Trainer would prefer some of them to the adapter, and only warn that they do not fit."""
    monkeypatch.setenv("HOSTILE", str(tmp_path))
    shutil.copytree(whole / "checkpoint-6", tmp_path / "checkpoint-6")
    if name.endswith(".bin"):
        torch.save(Hostile(), tmp_path / "checkpoint-6" / name)
    else:
        save_file({"foreign": torch.ones(1)}, tmp_path / "checkpoint-6" / name)
    try:
        assert run(tmp_path, *EVALUATION, *RESUME) == 0
    except vqa.VQAError as error:
        assert f"{tmp_path / 'checkpoint-6'}: " in str(error) and name in str(error)
    else:
        assert_same(result(tmp_path), result(whole))
    assert not (tmp_path / "ran").exists()


def test_two_signals_in_evaluations_and_gone_on_twice_is_the_same_bit_for_bit(whole, tmp_path, monkeypatch, signalled):
    """The second falls in the evaluation that is made up for: what was saved before stays as it is."""
    for count in (2, 1):
        signalled("prediction_step", count, TERM)
        with pytest.raises(vqa.Interrupted, match="checkpoint-3 is complete"):
            run(tmp_path, *EVALUATION, "--save_steps", "2", *RESUME)
        monkeypatch.undo()
        assert vqa.find_damage(tmp_path / "checkpoint-3", vqa.RESUME_FILES) is None
    assert run(tmp_path, *EVALUATION, "--save_steps", "2", *RESUME) == 0
    assert_same(result(tmp_path), result(whole))


def test_the_best_model_is_loaded_after_a_signal_in_the_last_evaluation(tmp_path, monkeypatch, signalled):
    """The loss falls, so that the last checkpoint is the best: the final weights are its own."""
    best = ("--load_best_model_at_end", "True", "--save_steps", "3")
    assert run(tmp_path / "undisturbed", *EVALUATION, *best) == 0
    signalled("prediction_step", 3, TERM)
    with pytest.raises(vqa.Interrupted):
        run(tmp_path / "stopped", *EVALUATION, *best)
    monkeypatch.undo()
    assert run(tmp_path / "stopped", *EVALUATION, *best, *RESUME) == 0
    assert_same(result(tmp_path / "stopped"), result(tmp_path / "undisturbed"))
    state = json.loads((tmp_path / "stopped" / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{state['best_global_step']}" == "checkpoint-6"


def test_rotation_keeps_what_was_just_saved_where_later_checkpoints_are_damaged(
    whole, tmp_path, monkeypatch, signalled
):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for step in (6, 4):
        DAMAGES["truncated"](tmp_path / f"checkpoint-{step}" / "optimizer.pt")
    signalled("training_step", 1, TERM)
    with pytest.raises(vqa.Interrupted, match="checkpoint-3 is complete"):
        run(tmp_path, *EVALUATION, "--save_steps", "100", "--save_total_limit", "1", *RESUME)
    monkeypatch.undo()
    assert vqa.find_damage(tmp_path / "checkpoint-3", vqa.RESUME_FILES) is None


def test_memory_that_runs_out_in_the_optimizer_saves_no_half_changed_weights(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(vqa.VQAError, match="out of memory") as error:
        run(tmp_path)
    assert "there is no checkpoint" in str(error.value) or "no step was finished" in str(error.value)
    assert vqa.checkpoints_of(tmp_path) == {}


def test_a_final_full_model_replaces_an_older_one_in_shards(tmp_path):
    tmp_path.joinpath("model-00001-of-00001.safetensors").write_bytes(b"old")
    tmp_path.joinpath("model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {}}')
    pairs = zip(RUN[::2], RUN[1::2], strict=True)
    flags = [word for pair in pairs if not pair[0].startswith("--lora") for word in pair]
    assert vqa.main([*flags, "--output_dir", str(tmp_path), "--max_steps", "1", "--train_decoder", "full"]) == 0
    assert vqa.load_trained(tmp_path).base_fingerprint
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.safetensors"]
