"""train_vqa.py from its command line: flags, progress lines, refusals, and what a run leaves behind; shell scripts."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_vqa as vqa
from tests.conftest import EVAL_DATA, FIXTURES, FULL_SIZE, ROOT, SMALL, TINY, TRAIN_DATA, refusal, weights_of

PARAMETERS = "trainable params: 166,068,224 || all params: 9,099,000,320 || trainable%: 1.8251"


# --------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("flag", ["--learning_rat", "--no_such_flag"])
def test_unknown_and_abbreviated_flags_are_errors(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        vqa.main([*TRAIN_DATA, "--output_dir", "out", flag, "1"])
    usage, message = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "--help" in usage
    assert f"error: unrecognized arguments: {flag} 1" in message


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("", "missing flag: --train_data_path, --frames_dir, --audio_dir .*--input_mode text.*, --output_dir"),
        ("--dry_run --input_mode text", "missing flag: --train_data_path, --frames_dir$"),
    ],
)
def test_flags_that_are_missing(flags, named):
    assert re.match(named, refusal(vqa.main, flags.split()))


@pytest.mark.parametrize(
    "flags",
    [
        *(f"--{flag} {value}" for flag in ("max_image_size", "lora_r", "lora_alpha") for value in (0, -5)),
        *(f"--per_device_train_batch_size {value}" for value in (0, -5)),
        *("--per_device_eval_batch_size 0", "--gradient_accumulation_steps 0", "--max_train_frames 0"),
        *("--max_eval_frames -1", "--checkpoint_every_n -1", "--learning_rate -1.0", "--learning_rate nan"),
        *("--num_train_epochs 0.0", "--lora_dropout 1.0", "--lora_dropout -0.1", "--report_to comet_ml"),
        *("--save_strategy best", "--eval_strategy epoch", "--frames_dir nowhere", "--audio_dir nowhere"),
        *("--output_dir file", "--output_dir file/in", "--allow_pickle True"),
    ],
)
def test_what_cannot_be_trained_with_is_refused_by_its_flag_before_weights_load(
    flags, train, no_weights, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    message = refusal(train, tmp_path / "out", *flags.split())
    flag, value = flags.split()
    assert flag in message and (value in message or flag in ("--eval_strategy", "--allow_pickle", *COUNTS))
    assert "\n" not in message
    assert flag != "--eval_strategy" or "--eval_data_path" in message
    assert flag != "--allow_pickle" or "merge_stage2_to_bf16.py" in message


COUNTS = ("--max_train_frames", "--max_eval_frames", "--checkpoint_every_n")  # of which the message says the bounds


def test_more_than_one_gpu_in_one_process_is_refused(train, argv, tmp_path, monkeypatch, no_weights):
    """The Trainer would cut the batch for them, positions by their axes."""
    monkeypatch.setattr(vqa.VQATrainingArguments, "n_gpu", 8)
    message = refusal(train, tmp_path)
    assert message.startswith("8 GPUs") and "CUDA_VISIBLE_DEVICES=0" in message and "\n" not in message
    assert "`torchrun --nproc_per_node 8 train_vqa.py`" in message
    vqa.parse_arguments(argv(tmp_path, "--dry_run"))


def test_what_flags_mean(argv, tmp_path):
    _, data_args, args = vqa.parse_arguments(
        argv(tmp_path, "--num_train_epochs", "0", "--max_steps", "3", "--max_eval_frames", "0")
    )
    assert (args.max_steps, data_args.max_eval_frames) == (3, None)  # steps need no epochs; no eval frames means all
    for arguments in (vqa.ModelArguments, vqa.DataArguments, vqa.VQATrainingArguments):
        for name, flag in arguments.__dataclass_fields__.items():
            assert not flag.init or flag.metadata.get("help"), name


@pytest.mark.skipif(torch.accelerator.is_available(), reason="about machines without an accelerator")
def test_the_processor_is_used_where_there_is_nothing_else(capsys):
    _, _, args = vqa.parse_arguments([*TRAIN_DATA, "--output_dir", "out", "--bf16", "True"])
    assert (args.use_cpu, args.bf16) == (True, True) and "use_cpu" in capsys.readouterr().out
    assert refusal(vqa.limit_gpu_memory, 38.5).startswith("--gpu_memory_limit_gib ")


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (vqa.VQAError("a:3: wrong\na:4: wrong too"), 1, ["error: a:3: wrong", "error: a:4: wrong too"]),
        (vqa.Interrupted(15, "wrong"), 143, [str(vqa.Interrupted(15, "wrong"))]),
    ],
)
def test_an_error_is_its_lines_and_a_status_without_traceback(error, status, lines, capsys):
    """It begins a line after a progress bar."""

    def entry():
        bar = vqa.tqdm(total=2)
        bar.update()
        raise error

    with pytest.raises(SystemExit) as stop:
        vqa.run(entry)
    assert stop.value.code == status
    err = capsys.readouterr().err
    assert err.splitlines()[-len(lines) :] == lines and "Traceback" not in err


def test_bad_data_is_named_before_weights_load(data, train, tmp_path, no_weights):
    rephrased = tmp_path / "rephrased.jsonl"  # with the ids of the template questions, whose wording would be heard
    rephrased.write_text(data.jsonl.read_text().replace("Has the narrow", "Was the narrow"))
    message = refusal(train, tmp_path / "out", *data.train_flags, "--eval_data_path", rephrased)
    for line, number in zip(message.splitlines(), (1, 3), strict=False):
        assert line.startswith(f"{rephrased}:{number}: ") and f"{data.jsonl}:{number}" in line
    (data.audio / "qa_000205.ogg").unlink()
    assert f"{data.jsonl}:5: " in refusal(train, tmp_path / "out", *data.train_flags)


# ---------------------------------------------------------------------------------------------------------------- runs


def test_dry_run_at_full_size_within_2_gb():
    command = [sys.executable, str(ROOT / "train_vqa.py"), "--dry_run", "--init", "random", *TRAIN_DATA]
    command += [
        "--model_name_or_path",
        str(FULL_SIZE),
        "--num_train_epochs",
        "20",
        "--gradient_accumulation_steps",
        "4",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert PARAMETERS in lines
    # 1500 of speech, 8 frames of 8 x 7 + 2, and 45 to 49 of text and answer
    assert "train: 5 samples, tokens per sample: min 2005, median 2006, max 2009" in lines
    assert "steps: 20 (1 an epoch of 5 samples)" in lines
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 * 2**20  # KiB


def test_progress_lines_are_the_seeds_and_settings_say_what_evaluation_must_repeat(train, tiny, tmp_path, capsys):
    """In bfloat16; settings are beside each save."""
    flags = ["--max_train_samples", "1", "--max_eval_samples", "1", "--max_eval_frames", "6", "--max_steps", "1"]
    flags += [*EVAL_DATA[:2], "--eval_strategy", "epoch", "--save_strategy", "epoch", "--bf16", "True"]
    capsys.readouterr()
    assert train(tmp_path, *flags) == 0
    wanted = [
        "⏳ Loading merged BF16 model with SDPA attention...",
        "🔧 Setting dedicated pad token (was same as EOS)",
        "   PAD token: '<|pad|>' (ID: 497)",
        "   EOS token: '<|endoftext|>' (ID: 480)",
        "✓ Model loaded in full BF16",
        "🧠 Adding LoRA Adapters...",
        f"📁 Loading Train Data: {FIXTURES / 'smoke.jsonl'}",
        f"📁 Loading Eval Data: {FIXTURES / 'smoke.jsonl'}",
        "   Using 6 frames (evenly sampled) to reduce eval memory",
    ]
    assert [line for line in capsys.readouterr().out.splitlines() if line in wanted] == wanted
    settings = vqa.load_settings(tmp_path / "checkpoint-1")
    assert settings["input"] == vqa.load_settings(tmp_path)["input"] == {
        "input_mode": "audio",
        "max_train_frames": 2,
        "max_eval_frames": 6,
        "max_image_size": 56,
        "audio_tokens": "full",
        "encoder_tokens": 200,
        "frame_mode": "images",
        "instruction": "Answer the question concisely based on the visual and audio evidence.",
        "prompt_layout": "plain",
    }  # fmt: skip
    model = settings["model"]
    assert (model["init"], model["init_seed"], model["dtype"]) == ("random", 1, "bfloat16")
    again = vqa.load_model(tiny, vqa.load_tokenizer(tmp_path), init="random", seed=1, dtype=torch.bfloat16)
    assert vqa.fingerprint(again) == model["base_fingerprint"]
    assert settings["tokens"] == {"pad": 497, "audio": 494, "turn_ends": [480, 482]}


def test_every_save_holds_adapter_projector_tokenizer_and_settings_and_all_has_moved(trained, base):
    for folder in (trained / "checkpoint-2", trained / "checkpoint-6", trained):
        names = {path.name for path in folder.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", vqa.SETTINGS_FILE} <= names
        assert "training_args.bin" not in names
        assert "base_model.model.audio_projector.weight" in weights_of(folder)
        assert vqa.load_tokenizer(folder).pad_token_id == 497
    moved = weights_of(trained)
    assert not torch.equal(moved["base_model.model.audio_projector.weight"], base.audio_projector.weight)
    assert all(tensor.any() for name, tensor in moved.items() if "lora_B" in name)


def test_losses_and_learning_rate_are_logged(trained):
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    assert len(logged) == 3 and all("learning_rate" in entry for entry in logged)
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)


def test_evaluation_in_training_gathers_no_logits(fresh, tokenizer, processor, rows, tmp_path):
    dataset = vqa.SurgicalVQADataset(rows[:2], processor, max_eval_frames=2, is_eval=True)
    args = vqa.VQATrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_eval_batch_size=1)
    parts = {"args": args, "data_collator": vqa.VQACollator(497), "tokenizer": tokenizer, "settings": {}}
    output = vqa.VQATrainer(model=vqa.add_lora(fresh(), r=4), eval_dataset=dataset, **parts).predict(dataset)
    assert output.predictions is None and output.metrics["test_loss"] > 0


def test_training_without_speech_needs_no_audio_folder(tiny, tmp_path):
    flags = [*TRAIN_DATA[:4], *SMALL, "--init", "random", "--model_name_or_path", str(tiny), "--input_mode", "text"]
    flags += ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--save_strategy", "no"]
    assert vqa.main(flags) == 0
    assert vqa.load_settings(tmp_path / "out")["input"]["input_mode"] == "text"


def test_a_run_that_misses_its_target_loss_fails(train, tmp_path, capsys):
    flags = ("--target_train_loss", "1e-3", "--max_steps", "1", "--logging_steps", "1", "--save_strategy", "no")
    assert train(tmp_path / "out", *flags) == 1
    assert "--target_train_loss 0.001" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- shell scripts


def test_shell_scripts_see_to_the_tokenizer_and_the_packages(warm, tmp_path):
    """Side by side; three of four import torch."""
    shutil.copy(ROOT / "train_with_eval_FINAL.sh", tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    verify, environment = ["bash", str(ROOT / "verify_tokenizer.sh")], {**os.environ, "HF_HUB_OFFLINE": "1"}
    python = {**environment, "PYTHON": warm}
    commands = [
        ([*verify, str(TINY)], python),
        ([*verify, "no/such/model/folder"], python),
        ([*verify, str(tmp_path)], python),
        (
            ["bash", "train_with_eval_FINAL.sh", "--python"],
            {**environment, "PYTHON": str(tmp_path / "bare/bin/python")},
        ),
    ]
    started = [
        subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for command, env in commands
    ]
    (shown, _), (_, nowhere), (_, unreadable), (_, missing) = (process.communicate() for process in started)
    assert [process.returncode for process in started] == [0, 1, 1, 1]
    assert "❌ ISSUE: PAD and EOS tokens are THE SAME\n   Both have ID: 480\n" in shown
    assert "✅ FIX: Updated train_vqa.py adds dedicated <|pad|> token\n" in shown
    assert "Generation stops at: '<|endoftext|>' (ID: 480), '<|im_end|>' (ID: 482)" in shown
    assert nowhere.startswith("error: MODEL no/such/model/folder: ") and nowhere.count("\n") == 1
    assert unreadable.startswith(f"error: {tmp_path}: no readable tokenizer") and unreadable.count("\n") == 1
    assert missing.startswith("error: ") and missing.count("\n") == 1
    assert "pip install torch transformers peft accelerate pillow torchaudio av tqdm" in missing


@pytest.fixture()
def script(tmp_path):
    """Runs a copy of train_with_eval_FINAL.sh, alone in its folder; `stand_in` makes a Python there that has every
    package as far as the script asks, and only says how it was called."""
    shutil.copy(ROOT / "train_with_eval_FINAL.sh", tmp_path)
    shutil.copy(ROOT / "evaluate_checkpoint.py", tmp_path)

    def run(*flags, **environment):
        command = ["bash", "train_with_eval_FINAL.sh", *flags]
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHON"}
        return subprocess.run(command, cwd=tmp_path, env={**inherited, **environment}, capture_output=True, text=True)

    def stand_in(name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        checks = f'if [ "$1" = - ]; then [ $# -le 2 ] || exec {sys.executable} "$@"; exit; fi'
        path.write_text(f'#!/bin/bash\n{checks}\necho {name} "$@"\n')
        path.chmod(0o755)
        return path

    return SimpleNamespace(run=run, stand_in=stand_in, folder=tmp_path)


def test_help_of_the_script_installs_nothing(script):
    for flags in (["--help"], ["--smoke", "-h"]):
        shown = script.run(*flags, PYTHON="/no/such/python")
        assert (shown.returncode, shown.stderr) == (0, "") and "RESULTS PYTHON\n" in shown.stdout
        assert "python train_vqa.py --help" in shown.stdout and "find_python" not in shown.stdout
    assert not (script.folder / ".venv").exists()


def test_an_explicit_python_comes_before_the_venv(script):
    script.stand_in(".venv/bin/python")
    mine = script.stand_in("mine")
    assert script.run("--python").stdout == f"{script.folder / '.venv/bin/python'}\n"
    assert script.run("--python", PYTHON=str(mine)).stdout == f"{mine}\n"
    mine.write_text("#!/bin/bash\necho torch\n")  # lacks torch
    other = script.run("--python", PYTHON=str(mine))
    assert other.stdout == f"{script.folder / '.venv/bin/python'}\n" and f"PYTHON: {mine} lacks" in other.stderr
    none = script.run("--python", PYTHON="/no/such/python")
    assert none.returncode == 1 and none.stderr.startswith("error: PYTHON: /no/such/python: ")


def test_a_results_name_is_checked_before_training(script):
    """Rows of another checkpoint, what no evaluation wrote, and names that evaluation would refuse."""
    python = str(script.stand_in("mine"))
    questions = script.folder / "questions.jsonl"
    questions.write_text("{}\n")
    (script.folder / "rows.jsonl").write_text("{}\n")
    (script.folder / "rows.jsonl.run.json").write_text("{}")
    (script.folder / "rows.summary.json").write_text('{"manifest": {"flags": {"checkpoint_path": "first"}}}')
    refused = {
        "x.json": ".jsonl",
        "questions.jsonl": "no evaluation wrote",
        "rows.jsonl": "the answers of first",
        "questions.jsonl/x.jsonl": "cannot be written",
    }
    for name, named in refused.items():
        done = script.run(PYTHON=python, RESULTS=name, OUTPUT_DIR="second")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert done.stderr.startswith(f"error: RESULTS {name}: ") and named in done.stderr
    same = script.run(PYTHON=python, RESULTS="questions.jsonl", EVAL_DATA="questions.jsonl")
    assert "RESULTS questions.jsonl: is the file of --eval_data_path" in same.stderr
    for name, folder in (("rows.jsonl", "./first"), ("new/rows.jsonl", "second")):
        done = script.run(PYTHON=python, RESULTS=name, OUTPUT_DIR=folder)
        called = [Path(line.split()[1]).name for line in done.stdout.splitlines()]
        assert (done.returncode, called) == (0, ["train_vqa.py", "evaluate_checkpoint.py"])
    assert questions.read_text() == "{}\n" and not (script.folder / "new").exists()
