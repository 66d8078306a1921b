"""Training, then evaluation, by the commands a user types."""

import json
import shutil

import pytest

import evaluate_checkpoint as ev
from tests.conftest import EVAL_DATA, FIXTURES, ROOT, read_jsonl, run_script

SCP_FILES = ("train_vqa.py", "evaluate_checkpoint.py", "verify_tokenizer.sh", "train_with_eval_FINAL.sh")


@pytest.fixture()
def choice(smoke, tmp_path):
    """Evaluate the smoke checkpoint with more flags; returns {arm: right answers of five, by `choice`}."""

    def run(*flags, audio=FIXTURES / "audio"):
        output = tmp_path / "x.jsonl"
        flags = [*flags, "--checkpoint_path", smoke[0] / "checkpoints" / "smoke", "--output_file", output]
        assert ev.main([str(flag) for flag in (*flags, *EVAL_DATA, "--audio_dir", audio)]) == 0
        arms = json.loads(output.with_suffix(".summary.json").read_text())["arms"]
        return {arm: part["metrics"]["choice"]["correct"] for arm, part in arms.items()}

    return run


@pytest.mark.slow
def test_smoke_ends_with_five_of_five(smoke):
    folder, printed = smoke
    lines = printed.splitlines()
    assert lines[-1] == "smoke: 5/5 correct, 5/5 stopped by themselves"
    assert any(line.startswith("By the original rule (contains): 5/5 correct = 100.0 %") for line in lines)
    assert "5/5 stopped by themselves = 100.0 %." in lines
    rows = read_jsonl(folder / "results" / "smoke.jsonl")
    assert [row["predicted_answer"] for row in rows] == [row["ground_truth"] for row in rows]
    assert {(row["input_mode"], row["finish_reason"]) for row in rows} == {("audio", "eos")}
    summary = json.loads((folder / "results" / "smoke.summary.json").read_text())
    assert (summary["n_total"], summary["finish"]["eos"]) == (5, 5)
    assert (folder / "checkpoints" / "smoke" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_with_the_speech_of_the_rows_exchanged_the_answers_go(choice, rows, tmp_path):
    """Row i hears the question of row i + 1; a model that does not listen would still score 5."""
    (tmp_path / "audio").mkdir()
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        assert row.question != other.question
        shutil.copy(other.audio_path, tmp_path / "audio" / (row.audio_path.stem + other.audio_path.suffix))
    assert choice(audio=tmp_path / "audio")["audio"] <= 2


@pytest.mark.slow
def test_the_arms_show_that_it_hears_and_sees(choice):
    right = choice("--arms", "audio,mismatched_audio,black_frames")
    assert right["audio"] == 5
    assert right["mismatched_audio"] < 5
    assert right["black_frames"] < 5


def test_the_smoke_command_takes_the_decoder_in_full(warm, tmp_path):
    """Its own settings name no adapters then, which would be refused."""
    flags = ("--smoke", "--train-decoder=full", "--dry_run")
    printed = run_script(ROOT / "train_with_eval_FINAL.sh", *flags, folder=tmp_path, PYTHON=warm)
    assert "without LoRA" in printed


def test_the_four_files_alone_train_and_evaluate(tiny, tmp_path):
    folder = tmp_path / "box"
    folder.mkdir()
    for name in SCP_FILES:
        shutil.copy(ROOT / name, folder)
    flags = ["--init", "random", "--use_cpu", "True", "--bf16", "False"]
    flags += ["--max_steps", "2", "--max_image_size", "56", "--eval_strategy", "no"]
    data, audio = str(FIXTURES / "smoke.jsonl"), str(FIXTURES / "audio")
    printed = run_script(
        "train_with_eval_FINAL.sh",
        *flags,
        folder=folder,
        MODEL=str(tiny),
        TRAIN_DATA=data,
        EVAL_DATA=data,
        FRAMES_DIR=str(FIXTURES / "frames"),
        AUDIO_DIR=audio,
        EVAL_AUDIO_DIR=audio,
    )
    assert printed.rstrip().endswith("Summary: results/eval_out.summary.json")
    assert len((folder / "results" / "eval_out.jsonl").read_text().splitlines()) == 5
    manifest = json.loads((folder / "results" / "eval_out.summary.json").read_text())["manifest"]
    assert manifest["input"]["max_eval_frames"] == 6
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {*SCP_FILES, "checkpoints", "results"}
