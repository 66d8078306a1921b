"""Early stopping and answers in training: on a run whose loss and accuracy disagree, and after kills and signals.

The five questions of the evaluation are those of training, with the same short answers in other words. Learning them
makes the answers right, and the other words less and less likely: the loss calls an early step the best.
"""

import contextlib
import json
import os
import shutil
import signal

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import train_vqa as vqa
from tests.conftest import (
    FIXTURES,
    SIX_STEPS,
    read_jsonl,
    refusal,
    same_tensors,
    weights_of,
    write_jsonl,
)
from tests.faults import Script
from tests.test_faults import assert_same, is_complete, log_of, without_lora

OTHER_WORDS = {
    "yes": "Yes, narrow band imaging was chosen by the surgeon.",
    "no": "No, nobody has chosen narrow band imaging.",
    "advancing": "In all of this clip the camera is advancing quickly.",
    "withdrawing": "In all of this clip the camera is withdrawing quickly.",
    "forceps": "The surgeon holds a pair of forceps.",
}
EVERY = 4  # steps between evaluations, each of which is saved
RESUME = ("--resume_from_checkpoint", "True")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """All rows in each step; their features are kept, and computed once for all runs of this file."""
    folder = tmp_path_factory.mktemp("disagreeing")
    rows = [{**row, "answer": OTHER_WORDS[row["short_answer"]]} for row in read_jsonl(FIXTURES / "smoke.jsonl")]
    return (
        *("--eval_data_path", write_jsonl(folder / "eval.jsonl", rows), "--cache_features", folder / "features"),
        *("--learning_rate", "1e-2", "--lr_scheduler_type", "constant", "--per_device_train_batch_size", "5"),
        *("--eval_strategy", "steps", "--eval_steps", EVERY, "--save_strategy", "steps", "--save_steps", EVERY),
        *("--max_eval_frames", "2", "--logging_steps", "4", "--lora_dropout", "0.1", "--num_train_epochs", "60"),
        *("--load_best_model_at_end", "True", "--eval_answers", "5"),
    )


@pytest.fixture(scope="module")
def by_choice(flags):
    return (*flags, "--metric_for_best_model", "eval_choice", "--early_stopping_patience", "3")


@pytest.fixture(scope="module")
def undisturbed(train, by_choice, tmp_path_factory):
    """The run that is stopped by the accuracy of its answers. Tests must not change it."""
    folder = tmp_path_factory.mktemp("by_choice") / "out"
    assert train(folder, *by_choice) == 0
    return folder


def state_of(folder):
    return json.loads((folder / "trainer_state.json").read_text())


def evaluations(folder):
    """Step -> metrics."""
    return {entry["step"]: entry for entry in state_of(folder)["log_history"] if "eval_loss" in entry}


def where_to_stop(values, patience, better):
    """The first best step, and the one at which `patience` evaluations in a row were no better; both by hand."""
    best, misses = None, 0
    for step, value in values.items():
        if best is None or better(value, values[best]):
            best, misses = step, 0
        else:
            misses += 1
        if misses == patience:
            return best, step
    raise AssertionError(f"never stops: {values}")


@contextlib.contextmanager
def at_each_answer(act):
    """Calls `act(number, rows)` before each forward pass that is not one of training or of the loss, counted from 1."""
    passes = []

    def note(module, inputs):
        if (
            isinstance(module, torch.nn.Embedding)
            and module.weight.shape[0] > 400
            and torch.is_inference_mode_enabled()
        ):
            passes.append(inputs[0].shape)
            act(len(passes), inputs[0].shape[0])

    hook = register_module_forward_pre_hook(note)
    try:
        yield passes
    finally:
        hook.remove()


# ------------------------------------------------------------------------------------ where loss and accuracy disagree


def test_by_accuracy_it_stops_later_than_by_loss_and_each_ends_with_its_own_best(
    train, flags, undisturbed, tmp_path, capsys
):
    assert train(tmp_path / "out", *flags, "--early_stopping_patience", "2") == 0
    said = capsys.readouterr().out
    by_loss, by_choice = evaluations(tmp_path / "out"), evaluations(undisturbed)
    losses, shares = (
        {s: e[name] for s, e in log.items()} for log, name in ((by_loss, "eval_loss"), (by_choice, "eval_choice"))
    )
    low, low_end = where_to_stop(losses, 2, lambda a, b: a < b)
    high, high_end = where_to_stop(shares, 3, lambda a, b: a > b)
    assert low < high and by_loss[low]["eval_choice"] < shares[high] == 1.0
    assert all(
        by_choice[step]["eval_loss"] == entry["eval_loss"] for step, entry in by_loss.items() if step in by_choice
    )
    for folder, best, end, printed in ((tmp_path / "out", low, low_end, said), (undisturbed, high, high_end, None)):
        state = state_of(folder)
        assert (state["global_step"], state["best_global_step"]) == (end, best)
        assert state["best_model_checkpoint"] == str(folder / f"checkpoint-{best}")
        assert same_tensors(weights_of(folder), weights_of(folder / f"checkpoint-{best}"))
        assert not same_tensors(weights_of(folder), weights_of(folder / f"checkpoint-{end}"))
        if printed:
            (line,) = [line for line in printed.splitlines() if line.startswith("Final model")]
            assert f"step {best}, the best by eval_loss = {losses[best]:.4g}" in line and f"step {end}" in line


def test_what_is_logged_are_the_figures_of_evaluation_and_the_answers_can_be_read(undisturbed, evaluate, flags):
    """evaluate_checkpoint.py answers the same of the checkpoint, word for word, with the adapter unmerged."""
    for step, entry in evaluations(undisturbed).items():
        rows = read_jsonl(undisturbed / f"eval_answers/step-{step}.jsonl")
        summary = json.loads((undisturbed / f"eval_answers/step-{step}.summary.json").read_text())
        assert entry["eval_choice"] == summary["metrics"]["choice"]["accuracy"]
        assert entry["eval_contains"] == summary["metrics"]["contains"]["accuracy"]
        assert entry["eval_stopped"] == sum(row["finish_reason"] == "eos" for row in rows) / 5
        found = sum(row["short_answer"] in row["predicted_answer"].lower() for row in rows) / 5
        assert len(rows) == summary["n_total"] == 5 and (step > 4 or entry["eval_contains"] == found)
    step = EVERY * 2
    data = ("--eval_data_path", flags[1], "--frames_dir", FIXTURES / "frames", "--audio_dir", FIXTURES / "audio")
    done = evaluate("--no_merge", "--max_new_tokens", 32, checkpoint=undisturbed / f"checkpoint-{step}", data=data)
    names = ("predicted_answer", "finish_reason", "n_tokens", "ground_truth", "short_answer", "question")
    here = {
        (row["video_id"], row["id"], row["question_type"]): [row[name] for name in names]
        for row in read_jsonl(undisturbed / f"eval_answers/step-{step}.jsonl")
    }
    assert here == {
        (row["video_id"], row["id"], row["question_type"]): [row[name] for name in names] for row in done.rows
    }
    assert done.summary["metrics"]["choice"]["accuracy"] == evaluations(undisturbed)[step]["eval_choice"]


@pytest.mark.slow
def test_killed_and_gone_on_it_stops_at_the_same_step_with_the_same_weights(
    train, argv, by_choice, undisturbed, tmp_path
):
    """Killed among the evaluations that are no better: the counter goes on from where it stood."""
    folder, last = tmp_path / "out", state_of(undisturbed)["global_step"] - EVERY
    script = Script("train_vqa.py", argv(folder, *by_choice))
    saved = folder / f"checkpoint-{last}"
    script.wait_for(lambda: saved.exists() and is_complete(saved))
    script.send(signal.SIGKILL)
    assert script.end() == -signal.SIGKILL
    write_jsonl(folder / "eval_answers/step-1000.jsonl", [{"of": "a step that was rolled back"}])
    assert train(folder, *by_choice, *RESUME) == 0
    assert_same_end(folder, undisturbed)


def assert_same_end(folder, undisturbed):
    assert_same(folder, undisturbed)
    one, other = state_of(folder), state_of(undisturbed)
    for name in ("global_step", "best_global_step", "best_metric"):
        assert one[name] == other[name]
    steps = {f"step-{step}.jsonl" for step in evaluations(undisturbed)}
    assert {path.name for path in (folder / "eval_answers").glob("step-*.jsonl")} <= steps


@pytest.fixture()
def late(undisturbed, tmp_path):
    """A copy of the run as it stood one evaluation before its end, with two evaluations that were no better."""
    step = state_of(undisturbed)["global_step"] - EVERY
    shutil.copytree(undisturbed / f"checkpoint-{step}", tmp_path / f"out/checkpoint-{step}")
    return tmp_path / "out"


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_signal_while_answering_stops_at_once_and_what_follows_is_the_same(
    train, by_choice, undisturbed, late, count
):
    """At the prefill and in decoding, of the evaluation that stops the run: it is made up for, and then stops it."""
    end = state_of(undisturbed)["global_step"]
    (late / "eval_answers").mkdir()
    write_jsonl(late / f"eval_answers/step-{end + EVERY}.jsonl", [{}])
    before = {number: signal.signal(number, signal.default_int_handler) for number in vqa.STOP_SIGNALS}
    with (
        at_each_answer(lambda number, rows: number == count and os.kill(os.getpid(), signal.SIGTERM)),
        pytest.raises(vqa.Interrupted, match=f"checkpoint-{end} is complete"),
    ):
        train(late, *by_choice, *RESUME)
    assert end not in evaluations(late / f"checkpoint-{end}")
    assert list((late / "eval_answers").iterdir()) == []
    with at_each_answer(lambda *_: None) as passes:
        assert train(late, *by_choice, *RESUME) == 0
    assert len([shape for shape in passes if shape[1] > 1]) == 1  # one prefill: of no evaluation after it
    for number, handler in before.items():
        signal.signal(number, handler)
    assert_same_end(late, undisturbed)


def test_a_run_that_had_stopped_does_not_go_on(train, by_choice, undisturbed, tmp_path):
    """Killed after its last checkpoint and before the final model."""
    end = state_of(undisturbed)["global_step"]
    shutil.copytree(undisturbed / f"checkpoint-{end}", tmp_path / f"checkpoint-{end}")
    assert train(tmp_path, *by_choice, *RESUME) == 0
    assert_same(tmp_path, undisturbed)
    assert list(vqa.checkpoints_of(tmp_path)) == [end]


def test_patience_may_change_where_a_run_goes_on(train, flags, by_choice, late, undisturbed, capsys):
    """Two evaluations were no better: with a patience of 2 it ends at once; a stored state without a counter begins
    at 0. Another metric is refused: the best value is one of the old."""
    message = refusal(train, late, *flags, "--metric_for_best_model", "eval_contains", *RESUME)
    assert "metric_for_best_model 'eval_choice', this run has 'eval_contains'" in message
    (step,) = vqa.checkpoints_of(late)
    assert train(late, *by_choice, "--early_stopping_patience", "2", *RESUME) == 0
    assert state_of(late)["global_step"] == step
    assert f"stopped early at step {step}, after 2 evaluations" in capsys.readouterr().out
    shutil.copytree(undisturbed / f"checkpoint-{EVERY}", late.parent / f"other/checkpoint-{EVERY}")
    folder = late.parent / f"other/checkpoint-{EVERY}"
    edit = json.loads((folder / "trainer_state.json").read_text())
    del edit["stateful_callbacks"]["EarlyStoppingCallback"]
    (folder / "trainer_state.json").write_text(json.dumps(edit))
    (folder / vqa.MANIFEST_FILE).unlink()
    vqa.write_manifest(folder)
    assert train(folder.parent, *by_choice, "--max_steps", 2 * EVERY, *RESUME) == 0
    assert evaluations(folder.parent).keys() == {EVERY, 2 * EVERY}


@pytest.mark.slow
def test_the_best_of_a_run_to_the_end_is_named_and_a_better_step_that_was_not_saved(train, flags, tmp_path, capsys):
    """Saved at each second evaluation only: the step that is named is the one that was loaded."""
    for folder, save in ((tmp_path / "each", 4), (tmp_path / "second", 8)):
        flat = (*flags, "--max_steps", "8", "--eval_answers", "0", "--eval_steps", "4", "--save_steps", save)
        worse = ("--metric_for_best_model", "loss", "--greater_is_better", "True")
        assert train(folder, *flat, *worse) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Final model")]
        losses = {step: entry["eval_loss"] for step, entry in evaluations(folder).items()}
        if losses[4] <= losses[8]:
            assert line.startswith(f"Final model: of step 8, the best by eval_loss = {losses[8]:.4g}")
        elif save == 4:
            assert line == f"Final model: of step 4, the best by eval_loss = {losses[4]:.4g}; training ended at step 8"
            assert same_tensors(weights_of(folder), weights_of(folder / "checkpoint-4"))
        else:
            assert line.startswith("Final model: of step 8, the last; no checkpoint was the best by eval_loss")


def test_a_stop_is_told_where_the_best_step_was_not_saved(train, flags, tmp_path, capsys):
    """Nothing is learned, so that the first evaluation stays the best; saved is the second."""
    idle = (*flags, "--eval_answers", "0", "--eval_steps", "1", "--save_steps", "2", "--learning_rate", "1e-30")
    assert train(tmp_path, *idle, "--early_stopping_patience", "1") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Final model")]
    assert "step 2, the last" in line and "stopped early at step 2, after 1 evaluation " in line


def test_an_evaluation_made_up_for_names_the_checkpoint_that_the_run_goes_on_from(train, flags, tmp_path):
    """Also where that lies in another folder than --output_dir."""
    short = (*flags, "--eval_answers", "0", "--max_steps", "4")
    assert train(tmp_path / "one", *short) == 0
    saved = tmp_path / "one/checkpoint-4"
    state = json.loads((saved / "trainer_state.json").read_text())
    state |= {"best_metric": None, "best_global_step": None, "best_model_checkpoint": None}
    (saved / "trainer_state.json").write_text(json.dumps(state))
    (saved / vqa.MANIFEST_FILE).unlink()
    vqa.write_manifest(saved)
    (saved / vqa.EVALUATION_DUE).touch()
    assert train(tmp_path / "two", *short, "--resume_from_checkpoint", saved) == 0
    assert state_of(tmp_path / "two")["best_model_checkpoint"] == str(saved)


# ----------------------------------------------------------------------------------- answers change nothing in training


RUN = (*SIX_STEPS, "--max_steps", "3", "--eval_strategy", "steps", "--eval_steps", "1", "--max_eval_frames", "2")
FULL = ("--train_decoder", "full", "--learning_rate", "1e-3")
VIDEO = ("--audio_tokens", "speech", "--frame_mode", "video")


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(("--checkpoint_every_n", "1"), id="lora"),
        pytest.param((*VIDEO, "--checkpoint_every_n", "0"), id="video", marks=pytest.mark.slow),
        pytest.param((*FULL, "--train_vision_tower", "True"), id="full", marks=pytest.mark.slow),
        pytest.param(("--bf16", "True"), id="bf16", marks=pytest.mark.slow),
        pytest.param((*FULL, "--bf16", "True"), id="full-bf16", marks=pytest.mark.slow),
        pytest.param(("--input_mode", "text"), id="text", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_answers_trains_as_one_that_does_not(argv, tmp_path, more):
    """Dropout, recomputation and the random states are what they were: the same weights and losses, bit for bit."""
    flags = (*RUN, "--eval_data_path", FIXTURES / "smoke.jsonl", *more)
    logs = {}
    for count in (0, 3):
        folder = tmp_path / str(count)
        words = argv(folder, *flags, "--eval_answers", count)
        assert vqa.main(without_lora(words) if "full" in more else words) == 0
        logs[count] = log_of(folder)
    names = [f"eval_{name}" for name in vqa.ANSWER_METRICS]
    asked = [entry for entry in logs[3] if names[0] in entry]
    assert len(asked) == 3 and all(0 <= entry.pop(name) <= 1 for entry in asked for name in names)
    assert logs[3] == logs[0]
    assert same_tensors(weights_of(tmp_path / "3"), weights_of(tmp_path / "0"))
    kinds = [row["question_type"] for row in read_jsonl(tmp_path / "3/eval_answers/step-3.jsonl")]
    assert kinds == ["nbi_status", "scope_motion_type", "tool_identification"]


def test_compiled_layers_answer_uncompiled_and_are_compiled_again_after(fresh, processor, rows):
    """With a cache each layer would take a compilation of its own, and past eight of them torch gives up."""
    dataset = vqa.SurgicalVQADataset(rows, processor, max_eval_frames=2, is_eval=True, with_answer=False)
    samples, decoding = [dataset[0], dataset[1]], (vqa.load_tokenizer(FIXTURES / "tiny_model").pad_token_id, [], 3)
    model = fresh().eval()
    expected = vqa.answer_batch(model, samples, *decoding)
    vqa.set_recomputation(model, 2)
    vqa.compile_decoder(model)
    compiled = [vars(layer)["forward"] for layer in model.model.language_model.layers]
    with vqa.layers_as(model):
        assert vqa.answer_batch(model, samples, *decoding) == expected
    assert [vars(layer)["forward"] for layer in model.model.language_model.layers] == compiled


@pytest.mark.slow
def test_answers_that_do_not_fit_are_computed_fewer_at_a_time_or_named(train, flags, undisturbed, tmp_path, capsys):
    """Batches of five and of three do not fit, of two do; and then not even one, in one line with the row."""

    def full(number, rows, limit):
        if rows > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    short = (*flags, "--max_steps", "8")
    with at_each_answer(lambda number, rows: full(number, rows, 2)):
        assert train(tmp_path / "less", *short) == 0
    said = capsys.readouterr().out
    assert [line.split()[-1] for line in said.splitlines() if "memory is full" in line] == ["3", "2"]
    for step in (4, 8):
        one, other = (
            read_jsonl(folder / f"eval_answers/step-{step}.jsonl") for folder in (tmp_path / "less", undisturbed)
        )
        assert one == other
    with at_each_answer(lambda number, rows: full(number, rows, 0)):
        message = refusal(train, tmp_path / "none", *short)
    assert "\n" not in message and "out of memory (Tried to allocate 9.00 GiB)" in message
    assert "fx-001/qa_000101/nbi_status" in message and "checkpoint-4" in message


def test_rows_are_spread_over_the_types_and_within_them():
    rows = [
        vqa.VQARow("f", n, str(n), "v", ("v_1",), "?", kind, "a", "a")
        for n, kind in enumerate("aaaaaaaabbbbc", start=1)
    ]
    assert vqa.spread_over_types(rows, 3) == [0, 8, 12]
    assert vqa.spread_over_types(rows, 5) == [0, 4, 8, 10, 12]
    assert vqa.spread_over_types(rows, 100) == list(range(13))
    assert len(vqa.spread_over_types(rows, 9)) == 9


# ---------------------------------------------------------------------------------------------------- what is refused

STEPS = "--eval_strategy steps --save_strategy steps"
BEST = f"{STEPS} --load_best_model_at_end True"
NO_STRATEGY = "--eval_strategy no --save_strategy no --load_best_model_at_end True"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (f"{STEPS} --early_stopping_patience 3", "--early_stopping_patience needs --load_best_model_at_end True"),
        (f"{NO_STRATEGY} --early_stopping_patience 3", "--load_best_model_at_end needs --eval_strategy"),
        (NO_STRATEGY, "--load_best_model_at_end needs --eval_strategy"),
        (
            f"{BEST} --early_stopping_threshold 0.1",
            "--early_stopping_threshold needs --early_stopping_patience",
        ),
        (f"{BEST} --early_stopping_patience -1", "--early_stopping_patience -1: must be 0 (off) or more"),
        (f"{BEST} --early_stopping_patience 1 --early_stopping_threshold nan", "--early_stopping_threshold nan: must"),
        (f"{STEPS} --eval_answers -1", "--eval_answers -1: must be 0 (off) or more"),
        (f"{BEST} --metric_for_best_model eval_choice", "eval_choice: evaluations measure eval_loss; --eval_answers N"),
        (
            f"{BEST} --metric_for_best_model accuracy",
            "--metric_for_best_model accuracy: evaluations measure eval_loss;",
        ),
        (
            f"{BEST} --eval_answers 2 --metric_for_best_model eval_bleu",
            "eval_bleu: evaluations measure eval_loss, eval_choice, eval_contains, eval_stopped",
        ),
    ],
)
def test_what_no_evaluation_can_decide_is_refused_before_the_data_are_read(argv, tmp_path, flags, named):
    words = argv(tmp_path / "out", "--eval_data_path", tmp_path / "nowhere.jsonl", *flags.split())
    message = refusal(vqa.main, words)
    assert named in message and "\n" not in message
    assert not (tmp_path / "out").exists()


def test_answers_need_questions_and_the_script_that_scores_them(argv, tmp_path, monkeypatch):
    assert "--eval_answers needs --eval_data_path" in refusal(vqa.main, argv(tmp_path / "out", "--eval_answers", "2"))
    monkeypatch.setattr(vqa, "SCORER", tmp_path / "evaluate_checkpoint.py")
    words = argv(tmp_path / "out", "--eval_answers", "2", "--eval_data_path", tmp_path / "nowhere.jsonl")
    message = refusal(vqa.main, words)
    assert message.startswith("--eval_answers: ") and str(tmp_path / "evaluate_checkpoint.py") in message


def test_the_flags_of_the_public_overnight_script_are_taken(argv, tmp_path):
    public = f"{BEST} --metric_for_best_model eval_loss --greater_is_better False --early_stopping_patience 3"
    args = vqa.parse_arguments(argv(tmp_path, "--eval_data_path", FIXTURES / "smoke.jsonl", *public.split()))[2]
    assert (args.early_stopping_patience, args.greater_is_better, args.eval_answers) == (3, False, 0)


def test_answers_that_cannot_be_scored_end_the_run_in_a_line(train, flags, tmp_path, monkeypatch):
    broken = tmp_path / "evaluate_checkpoint.py"
    broken.write_text("raise SystemExit('no scores today')\n")
    monkeypatch.setattr(vqa, "SCORER", broken)
    message = refusal(train, tmp_path / "out", *flags, "--max_steps", "4")
    assert "step-4.jsonl" in message and "no scores today" in message and "\n" not in message
