"""Training that ends early or is attacked: what is saved, what is refused, and that resuming changes nothing."""

import fcntl
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train_vqa as vqa
from benchmarks import fuzz
from tests.conftest import EVALUATION, ROOT, SIX_STEPS, refusal, same_tensors, small_disk, weights_of
from tests.faults import SIGNALS, Script, watching
from tests.warm import default_signals

RESUME = ("--resume_from_checkpoint", "True")
RUN = (*SIX_STEPS, *EVALUATION, "--save_steps", "2")  # as `trained`
TERM, INT, HUP = (number for number, _ in SIGNALS)


def log_of(folder):
    """The log that must come out the same: all but what is counted since the last start."""
    state = json.loads((Path(folder) / "trainer_state.json").read_text())
    timed = ("runtime", "per_second", "total_flos", "train_loss")
    return [{k: v for k, v in entry.items() if not any(word in k for word in timed)} for entry in state["log_history"]]


def assert_same(one, other):
    assert log_of(one) == log_of(other)
    assert same_tensors(weights_of(one), weights_of(other))


def is_complete(checkpoint):
    return vqa.find_damage(checkpoint, vqa.RESUME_FILES) is None


@pytest.fixture()
def copied(trained, tmp_path):
    """Copies checkpoints of the undisturbed run into a folder of the test's own."""

    def copy(*steps):
        for step in steps:
            shutil.copytree(trained / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
        return tmp_path

    return copy


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.fixture()
def signal_at(monkeypatch):
    """Sends this process signals at the n-th `training` or `evaluation` pass, `optimizer` step, or change of a file
    while `saving`."""
    stack = ExitStack()

    def arrange(moment, count, *signals):
        calls = []

        def note():
            calls.append(moment)
            if len(calls) == count:
                for number in signals:
                    os.kill(os.getpid(), number)

        if moment == "optimizer":
            stack.callback(register_optimizer_step_pre_hook(lambda *_: note()).remove)
        elif moment == "saving":
            stack.enter_context(watching(lambda event, path: note() if "adapter" in path else None))
        else:
            forward = vqa.SurgicalVQAModel.forward

            def watched(self, *args, **kwargs):
                if self.training == (moment == "training"):
                    note()
                return forward(self, *args, **kwargs)

            monkeypatch.setattr(vqa.SurgicalVQAModel, "forward", watched)

    before = {number: signal.getsignal(number) for number, _ in SIGNALS}
    default_signals()  # also where these tests run under nohup, whose SIGHUP the run would rightly leave alone
    for number, _ in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    yield arrange
    stack.close()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("moment", "count", "signals", "step"),
    [
        ("training", 3, [TERM], 2),  # the first micro-batch of the second step
        pytest.param("training", 5, [INT], 3, marks=pytest.mark.slow),  # of an epoch the last, with all that is due
        ("evaluation", 2, [HUP], 3),  # in the middle of the evaluation after the third step
        pytest.param(
            "optimizer", 3, [HUP], 3, marks=pytest.mark.slow
        ),  # between the last gradient of the third step and its optimizer step
        pytest.param(
            "saving", 1, [TERM, TERM], 2, marks=pytest.mark.slow
        ),  # while checkpoint-2 is being written, twice
        pytest.param("training", 10, [TERM], 6, marks=pytest.mark.slow),  # the last step of all
    ],
)
def test_stopped_by_a_signal_and_gone_on_is_the_same_bit_for_bit(
    train, trained, tmp_path, signal_at, moment, count, signals, step
):
    signal_at(moment, count, *signals)
    with pytest.raises(vqa.Interrupted) as stop:
        train(tmp_path, *RUN)
    assert stop.value.signum == signals[0] and f"checkpoint-{step} is complete" in str(stop.value)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert is_complete(tmp_path / f"checkpoint-{step}")
    assert train(tmp_path, *RUN, *RESUME) == 0
    assert_same(tmp_path, trained)
    assert list(tmp_path.glob("tmp-*")) == []


@pytest.mark.slow
def test_two_signals_in_evaluations_and_gone_on_twice_is_the_same_bit_for_bit(train, trained, tmp_path, signal_at):
    """The second falls in the evaluation that is made up for: what was saved before stays as it is."""
    for count in (2, 1):
        signal_at("evaluation", count, TERM)
        with pytest.raises(vqa.Interrupted, match="checkpoint-3 is complete"):
            train(tmp_path, *RUN, *RESUME)
        assert is_complete(tmp_path / "checkpoint-3")
    assert train(tmp_path, *RUN, *RESUME) == 0
    assert_same(tmp_path, trained)


@pytest.mark.slow
def test_a_signal_in_the_last_step_before_an_evaluation_at_the_epochs_end(train, tmp_path, signal_at):
    """The evaluation is cut short at its first batch, and made up for: also where the epoch is the last."""
    flags = (*SIX_STEPS, *EVALUATION[:4], "--eval_strategy", "epoch", *EVALUATION[8:], "--logging_steps", "1")
    assert train(tmp_path / "undisturbed", *flags) == 0
    for micro_batch, step in ((5, 3), (10, 6)):
        folder = tmp_path / str(step)
        signal_at("training", micro_batch, TERM)
        with pytest.raises(vqa.Interrupted, match=f"checkpoint-{step} is complete"):
            train(folder, *flags)
        evaluations = [entry["step"] for entry in log_of(folder / f"checkpoint-{step}") if "eval_loss" in entry]
        assert step not in evaluations
        assert train(folder, *flags, *RESUME) == 0
        assert_same(folder, tmp_path / "undisturbed")


@pytest.mark.slow
def test_the_best_model_is_loaded_after_a_signal_in_the_last_evaluation(train, tmp_path, signal_at):
    """The loss falls, so that the last checkpoint is the best: the final weights are its own."""
    best = (*RUN, "--load_best_model_at_end", "True", "--save_steps", "3")
    assert train(tmp_path / "undisturbed", *best) == 0
    signal_at("evaluation", 3, TERM)
    with pytest.raises(vqa.Interrupted):
        train(tmp_path / "stopped", *best)
    assert train(tmp_path / "stopped", *best, *RESUME) == 0
    assert_same(tmp_path / "stopped", tmp_path / "undisturbed")
    state = json.loads((tmp_path / "stopped" / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{state['best_global_step']}" == "checkpoint-6"


@pytest.mark.slow
def test_killed_or_stopped_with_loader_workers(argv, train, tmp_path):
    """SIGKILL to the main process, then resuming: the same as a run nothing disturbed. And each signal to the group."""
    workers = (*SIX_STEPS, "--save_steps", "2", "--dataloader_num_workers", "2")
    script = Script("train_vqa.py", argv(tmp_path / "out", *workers))
    script.wait_for(lambda: (tmp_path / "out/checkpoint-2").exists() and is_complete(tmp_path / "out/checkpoint-2"))
    script.send(signal.SIGKILL)
    assert script.end() == -signal.SIGKILL
    assert not (tmp_path / "out/adapter_model.safetensors").exists()
    assert train(tmp_path / "out", *workers, *RESUME) == 0
    assert train(tmp_path / "undisturbed", *workers) == 0
    assert_same(tmp_path / "out", tmp_path / "undisturbed")

    long = (*workers, "--max_steps", "500", "--logging_steps", "1")
    scripts = {n: Script("train_vqa.py", argv(tmp_path / n.name, *long)) for n, _ in SIGNALS}
    # Python itself would wait without end for workers that live as it exits: in a process of its own
    command = [sys.executable, ROOT / "train_vqa.py", *argv(tmp_path / "real", *long)]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(
        [*map(str, command), "--dataloader_persistent_workers", "True"],
        stdout=log, stderr=log, start_new_session=True, preexec_fn=default_signals
    ) as real:  # fmt: skip
        for number, status in SIGNALS:
            script = scripts[number]
            script.wait_for(lambda script=script: "'loss'" in script.said())
            script.send(number, group=True)
            assert script.end() == status, script.said()
            check_stopped(tmp_path / number.name, script.said())
        while "'loss'" not in (tmp_path / "log").read_text():
            assert real.poll() is None
            time.sleep(0.1)
        os.killpg(real.pid, TERM)
        assert real.wait(120) == 143
        check_stopped(tmp_path / "real", (tmp_path / "log").read_text())


def check_stopped(folder, said):
    newest = next(iter(vqa.checkpoints_of(folder).values()))
    assert is_complete(newest) and f"{newest.name} is complete" in said
    assert not (folder / "adapter_model.safetensors").exists()


# ----------------------------------------------------------------------------------- what is damaged, and what is kept


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "never saved": lambda path: path.unlink(),  # and the manifest says nothing of it
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_by_name(copied, argv, capsys, damage):
    """Each file of it, in turn."""
    folder = copied(2, 4)
    names = [*vqa.RESUME_FILES, "rng_state.pth", "adapter_config.json", "adapter_model.safetensors", vqa.MANIFEST_FILE]
    for name in names[: len(vqa.RESUME_FILES)] if damage == "never saved" else names:
        arguments = vqa.parse_arguments(argv(folder, *RUN, *RESUME))[2]
        for number in (4, 2):
            DAMAGES[damage](folder / f"checkpoint-{number}" / name)
            if damage == "never saved":
                (folder / f"checkpoint-{number}" / vqa.MANIFEST_FILE).unlink()
                vqa.write_manifest(folder / f"checkpoint-{number}")
            if number == 4:
                capsys.readouterr()
                assert vqa.find_checkpoint(arguments) == folder / "checkpoint-2"
                assert f"{folder / 'checkpoint-4'}: {name} " in capsys.readouterr().out
                arguments.resume_from_checkpoint = str(folder / "checkpoint-4")
                message = refusal(vqa.find_checkpoint, arguments)
                assert message.startswith("--resume_from_checkpoint ") and f"checkpoint-4: {name} " in message
                arguments.resume_from_checkpoint = "True"
        assert "no checkpoint is complete" in refusal(vqa.find_checkpoint, arguments).splitlines()[2]
        shutil.rmtree(folder / "checkpoint-2")
        shutil.rmtree(folder / "checkpoint-4")
        copied(2, 4)


def test_saves_carry_a_manifest_and_starting_over_among_them_is_refused(train, trained):
    assert list(vqa.checkpoints_of(trained)) == [6, 4, 2]
    assert [vqa.find_damage(folder) for folder in (trained, *vqa.checkpoints_of(trained).values())] == [None] * 4
    for flags in ((), ("--resume_from_checkpoint", trained / "checkpoint-2")):
        message = refusal(train, trained, *SIX_STEPS, *flags)
        assert message.startswith(f"{trained / 'checkpoint-6'} ") and "--resume_from_checkpoint True" in message


def test_going_on_with_other_flags_is_refused(train, copied):
    folder = copied(4)
    message = refusal(train, folder, *SIX_STEPS, *RESUME, "--max_train_frames", "3", "--lora_r", "8")
    assert str(folder / "checkpoint-4") in message and "max_train_frames 2, this run has 3" in message
    assert "lora" not in message and "r 4, this run has 8" in message


def test_a_run_that_goes_on_from_its_last_step_adds_none(train, trained, copied):
    folder = copied(6)
    for _ in range(2):
        assert train(folder, *RUN, *RESUME) == 0
        assert_same(folder, trained)
    assert list(vqa.checkpoints_of(folder)) == [6]


@pytest.mark.parametrize("relative", [False, True])
def test_rotation_keeps_the_best_checkpoint_beside_the_newest(train, tmp_path, monkeypatch, relative):
    """The loss falls, and here the highest one is called the best: the first. Also once a run went on."""
    monkeypatch.chdir(tmp_path)
    folder = Path("./out") if relative else tmp_path / "out"
    flags = (*SIX_STEPS, *EVALUATION, "--eval_steps", "1", "--save_steps", "1", "--save_total_limit", "2")
    flags += ("--load_best_model_at_end", "True", "--lr_scheduler_type", "constant", "--greater_is_better", "True")
    flags += ("--metric_for_best_model", "eval_loss", *RESUME)  # the first start may already ask to resume
    assert train(folder, *flags, "--max_steps", "3") == 0
    assert set(vqa.checkpoints_of(folder)) == {3, 2, 1}
    shutil.rmtree(folder / "checkpoint-3")
    assert train(folder, *flags, "--max_steps", "4") == 0
    assert set(vqa.checkpoints_of(folder)) == {4, 3, 1}
    best = json.loads((folder / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert Path(best) == folder / "checkpoint-1"
    assert same_tensors(weights_of(folder), weights_of(best))


def test_rotation_keeps_what_was_just_saved_where_later_checkpoints_are_damaged(train, copied, signal_at):
    folder = copied(2, 4, 6)
    for step in (6, 4):
        DAMAGES["truncated"](folder / f"checkpoint-{step}" / "optimizer.pt")
    signal_at("training", 1, TERM)
    with pytest.raises(vqa.Interrupted, match="checkpoint-3 is complete"):
        train(folder, *RUN, "--save_steps", "100", "--save_total_limit", "1", *RESUME)
    assert is_complete(folder / "checkpoint-3")


def test_a_final_full_model_replaces_an_older_one_in_shards(argv, tmp_path):
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"old")
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {}}')
    assert vqa.main(without_lora(argv(tmp_path, *SIX_STEPS, "--max_steps", "1", "--train_decoder", "full"))) == 0
    assert vqa.load_trained(tmp_path).base_fingerprint
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.safetensors"]


def without_lora(words):
    """Flags without those of adapters, which full training refuses."""
    return [word for pair in zip(words[::2], words[1::2], strict=True) if "--lora" not in pair[0] for word in pair]


# --------------------------------------------------------------------------------------------- numbers, memory, disk


def disturbed_forward(monkeypatch, change):
    """Let `change(model, output, calls)` see each forward pass of training, the calls counted from 1."""
    forward, calls = vqa.SurgicalVQAModel.forward, itertools.count(1)

    def disturbed(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training:
            change(output, next(calls))
        return output

    monkeypatch.setattr(vqa.SurgicalVQAModel, "forward", disturbed)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer(train, tmp_path, monkeypatch, value):
    def spoil(output, call):
        output.loss = output.loss * float(value) if call == 5 else output.loss

    disturbed_forward(monkeypatch, spoil)
    message = refusal(train, tmp_path, *SIX_STEPS, "--save_steps", "1")
    assert message.startswith(f"step 3: the loss is {value} with fx-00") and message.count("smoke.jsonl:") == 1
    assert f"{tmp_path}/checkpoint-2" in message
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "checkpoint-2").values())


def test_a_gradient_that_is_not_finite_names_all_samples_of_the_step(train, tmp_path, monkeypatch):
    disturbed_forward(
        monkeypatch, lambda output, call: output.loss.register_hook(lambda gradient: gradient * float("inf"))
    )
    message = refusal(train, tmp_path, *SIX_STEPS)
    assert message.startswith("step 1: the gradient is not finite with fx-00")
    assert message.count("smoke.jsonl:") == 2


def test_out_of_memory_is_one_line_and_the_finished_steps_are_saved(train, trained, tmp_path, monkeypatch):
    def full(output, call):
        if call == 9:  # the fifth step, of whose batches the first is done
            text = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB."
            raise torch.OutOfMemoryError(text)

    with monkeypatch.context() as patch:
        disturbed_forward(patch, full)
        message = refusal(train, tmp_path, *SIX_STEPS, *EVALUATION)
    assert message.startswith("out of memory (Tried to allocate 2.50 GiB) at step 5 with 1 samples of ")
    assert "\n" not in message and "the longest fx-00" in message
    for flag in ("per_device_train_batch_size", "max_train_frames", "max_image_size", "checkpoint_every_n 1"):
        assert f"--{flag}" in message
    assert f"{tmp_path}/checkpoint-4 is complete" in message and is_complete(tmp_path / "checkpoint-4")
    assert same_tensors(weights_of(tmp_path / "checkpoint-4"), weights_of(trained / "checkpoint-4"))
    assert train(tmp_path, *SIX_STEPS, *EVALUATION, *RESUME) == 0
    assert [entry["step"] for entry in log_of(tmp_path)] == [entry["step"] for entry in log_of(trained)]


def test_memory_that_runs_out_in_the_optimizer_saves_no_half_changed_weights(train, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    message = refusal(train, tmp_path, *SIX_STEPS)
    assert message.startswith("out of memory") and vqa.checkpoints_of(tmp_path) == {}


def assert_the_last_checkpoint_is_left(folder, message):
    assert f"{folder}: " in message and "4 could not be saved (" in message and "checkpoint-2" in message
    assert is_complete(folder / "checkpoint-2") and not is_complete(folder / "checkpoint-4")
    assert {path.name for path in folder.iterdir()} <= {".lock", "checkpoint-2", "checkpoint-4", "filler"}


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_full_disk_leaves_the_last_checkpoint(train, trained, tmp_path, share):
    """A tmpfs with room for one checkpoint and a share of another."""
    one = sum(path.stat().st_size for path in (trained / "checkpoint-2").iterdir())
    disk = tmp_path / "disk"
    with small_disk(disk, 10 * one // 1024):
        filler = disk / "filler"
        filler.write_bytes(bytes(10 * one // 4096 * 4096 - 2**16 - int((1 + share) * one)))
        message = refusal(train, disk, *RUN)
        assert_the_last_checkpoint_is_left(disk, message)
        assert "bytes are free there" in message
        filler.unlink()
        assert train(disk, *RUN, *RESUME) == 0
        assert_same(disk, trained)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", vqa.DECODER_TRAINING)
def test_a_file_size_limit_leaves_the_last_checkpoint_and_ends_in_one_line(argv, tmp_path, decoder):
    """No file may grow beyond the limit: from the start, or once there is a checkpoint."""

    def of_decoder(folder, *more):
        words = argv(folder, *RUN, "--train_decoder", decoder, *more)
        return without_lora(words) if decoder == "full" else words

    assert vqa.main(of_decoder(tmp_path / "whole", "--max_steps", "2")) == 0
    for limit, begun in ((100, True), (2_000, False), (20_000, True), (60_000, False), (120_000, True)):
        folder = tmp_path / str(limit)
        if begun:
            shutil.copytree(tmp_path / "whole/checkpoint-2", folder / "checkpoint-2")
        script = Script("train_vqa.py", of_decoder(folder, *RESUME), file_limit=limit)
        assert script.end() == 1, script.said()
        message = script.said().splitlines()[-1]
        assert message.startswith(f"error: {folder}: ") and "Traceback" not in script.said()
        if begun:
            assert_the_last_checkpoint_is_left(folder, message)
        else:
            assert "2 could not be saved (" in message and "no checkpoint yet" in message
            assert not (folder / vqa.MANIFEST_FILE).exists()


@pytest.mark.slow
@pytest.mark.parametrize("decoder", vqa.DECODER_TRAINING)
@pytest.mark.parametrize("earlier", [False, True])
def test_what_a_kill_or_a_power_cut_leaves_at_any_file_boundary(argv, tmp_path, monkeypatch, decoder, earlier):
    """The folder as each change of a file finds it, over two saves, a rotation and the final save: always a complete
    checkpoint from the first on, and no final model that is taken for one and is none; also over an earlier run's."""
    folder, found, notes = tmp_path / "out", [], []
    words = argv(folder, *SIX_STEPS, "--save_steps", "2", "--save_total_limit", "1", "--train_decoder", decoder)
    words = without_lora(words) if decoder == "full" else words
    if earlier:
        assert vqa.main([*words, "--max_steps", "2"]) == 0
        shutil.copytree(folder / "checkpoint-2", folder / "tmp-final")  # of a save that was killed
    start, ended = (vqa.SETTINGS_FILE, "tokenizer.json"), {"model": "config.json", "adapter": "adapter_config.json"}
    before = weights_of(folder) if earlier else None

    def look(event, path):
        notes.append(f"{event} {path}")
        if str(folder) not in path or not folder.exists():
            return
        kept = {step: place for step, place in vqa.checkpoints_of(folder).items() if is_complete(place)}
        damages = {vqa.find_damage(place) for place in vqa.checkpoints_of(folder).values()} - {None}
        assert all(vqa.MANIFEST_FILE in damage for damage in damages)  # none is half written and looks complete
        names = {file.name for file in folder.iterdir()}
        for kind, described in ended.items():  # which makes it a model, or an adapter, to others
            assert described not in names or names >= {f"{kind}{'_model' * (kind == 'adapter')}.safetensors", *start}
        final = vqa.find_damage(folder)
        assert final is None or " is missing" in final
        found.append(
            (max(kept, default=0), final is None and (not earlier or not same_tensors(weights_of(folder), before)))
        )

    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (notes.append(os.readlink(f"/proc/self/fd/{handle}")), sync(handle))
    )
    with watching(look):
        assert vqa.main([*words, "--max_steps", "4", *RESUME]) == 0
    assert found == sorted(found) and {step for step, _ in found} == ({2, 4} if earlier else {0, 2, 4})
    assert list(vqa.checkpoints_of(folder)) == [4] and not list(folder.glob("tmp-*"))
    # What was synced survives a power cut: each file, the manifest, the folders with the names; then the old one goes.
    new, old = folder / "checkpoint-4", folder / "checkpoint-2"
    complete = notes.index(str(new / vqa.MANIFEST_FILE))
    assert {str(path) for path in new.iterdir()} - {str(new / vqa.MANIFEST_FILE)} <= set(notes[:complete])
    then = notes[complete:]
    gone = then.index(f"os.remove {old / vqa.MANIFEST_FILE}")
    assert {str(new), str(folder)} <= set(then[:gone])
    assert not any(str(old) in note and note.startswith(("os.remove", "shutil")) for note in then[:gone])


# -------------------------------------------------------------------------------------------------- hostile checkpoints


class Hostile:
    """Unpickling it makes the folder `ran`."""

    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["HOSTILE"]) / "ran"),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("plain", [True, False])
def test_a_pickle_that_would_run_code_does_not(train, copied, tmp_path, monkeypatch, name, plain):
    monkeypatch.setenv("HOSTILE", str(tmp_path))
    folder = copied(4) / "checkpoint-4"
    if plain:
        (folder / name).write_bytes(pickle.dumps(Hostile()))
    else:
        torch.save({"state": Hostile()}, folder / name)
    (folder / vqa.MANIFEST_FILE).unlink()
    vqa.write_manifest(folder)
    message = refusal(train, tmp_path, *RUN, *RESUME)
    assert message.startswith(f"{folder}: ") and name in message and "\n" not in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "training_args.bin", "model.safetensors"])
def test_foreign_weights_in_a_checkpoint_are_left_alone_or_refused_by_name(
    train, trained, copied, tmp_path, monkeypatch, name
):
    """The Trainer would prefer some of them to the adapter, and only warn that they do not fit."""
    monkeypatch.setenv("HOSTILE", str(tmp_path))
    place = copied(6) / "checkpoint-6"
    if name.endswith(".bin"):
        torch.save(Hostile(), place / name)
    else:
        save_file({"foreign": torch.ones(1)}, place / name)
    try:
        assert train(tmp_path, *RUN, *RESUME) == 0
    except vqa.VQAError as error:
        assert f"{place}: " in str(error) and name in str(error)
    else:
        assert_same(tmp_path, trained)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------ two runs, shell, fuzz


def test_a_second_run_into_the_same_folder_is_refused(train, tmp_path):
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
        assert "another run is writing there" in refusal(train, tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with vqa.lock_folder(tmp_path):  # a killed run holds nothing
        pass


STUB = """#!{python}
import os, signal, sys, time
from pathlib import Path
folder, script = Path(os.environ['STUB']), os.path.basename(sys.argv[1])
if script == '-': os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with (folder / 'ran').open('a') as ran: ran.write(script + ' ')
if script != {step!r}: sys.exit()
seen = []
for n in (1, 2, 15):
    if signal.getsignal(n) != signal.SIG_IGN: signal.signal(n, lambda n, _: seen.append(n))
(folder / 'pid').write_text(str(os.getpid()))
(folder / 'pid').rename(folder / 'ready')
while not seen: time.sleep(0.01)
time.sleep(0.5)
(folder / 'seen').write_text(str(seen))
"""


def shell_script(folder, step):
    """Starts train_with_eval_FINAL.sh; `python` is a program that notes each signal once it is at `step`, takes its
    time to end, and then says that all went well."""
    folder.mkdir()
    (folder / "python").write_text(STUB.format(python=sys.executable, step=step))
    (folder / "python").chmod(0o755)
    for name in ("train_with_eval_FINAL.sh", "evaluate_checkpoint.py"):
        shutil.copy(ROOT / name, folder)
    environment = {**os.environ, "PYTHON": str(folder / "python"), "STUB": str(folder)}
    with (folder / "log").open("w") as log:
        return subprocess.Popen(["bash", "train_with_eval_FINAL.sh"], cwd=folder, env=environment, stdout=log,
                                stderr=log, start_new_session=True, preexec_fn=default_signals)  # fmt: skip


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None
        time.sleep(0.01)


def test_the_shell_script_passes_a_signal_on_once_and_does_not_go_on(tmp_path):
    """To its process alone or to its group, while it trains or evaluates: started side by side."""
    cases = list(itertools.product(SIGNALS, (False, True), ("train_vqa.py", "evaluate_checkpoint.py")))
    started = [(shell_script(tmp_path / str(n), case[2]), tmp_path / str(n), case) for n, case in enumerate(cases)]
    for process, folder, ((number, _), group, _) in started:
        wait_until((folder / "ready").exists, process)
        os.killpg(process.pid, number) if group else process.send_signal(number)
    for process, folder, ((number, status), _, step) in started:
        assert process.wait(60) == status, (folder / "log").read_text()
        assert (folder / "seen").read_text() == str([int(number)])  # and bash ended after it
        assert (folder / "ran").read_text().split()[-1] == step


@pytest.mark.slow
def test_ctrl_z_stops_what_the_shell_script_runs_and_fg_lets_it_go_on(tmp_path):
    process = shell_script(tmp_path / "out", "train_vqa.py")
    ready = tmp_path / "out/ready"
    wait_until(ready.exists, process)

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
    assert process.wait(60) == 143, (tmp_path / "out/log").read_text()
    assert (tmp_path / "out/seen").read_text() == str([int(signal.SIGTERM)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", fuzz.READERS)
def test_fuzz(tmp_path, reader):
    """The inputs are the same each time; benchmarks/fuzz.py draws others, for as long as it is told."""
    drawn, check = fuzz.READERS[reader](tmp_path)
    settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))(
        given(drawn)(lambda content: check(content))  # hypothesis wants a function with a name
    )()
