"""train_vqa.py from its command line: flags, progress lines, refusals, and what a run leaves behind."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_vqa as vqa
from tests.conftest import FIXTURES, FULL_SIZE, TINY

ROOT = Path(vqa.__file__).resolve().parent
FIXTURE_DATA = (
    *("--train_data_path", str(FIXTURES / "smoke.jsonl"), "--frames_dir", str(FIXTURES / "frames")),
    *("--audio_dir", str(FIXTURES / "audio")),
)
RANDOM_TINY = ("--init", "random", "--model_name_or_path", str(TINY), "--seed", "1")
SMALL = ("--max_image_size", "56", "--max_train_frames", "2", "--lora_r", "4")
PARAMETERS = "trainable params: 166,068,224 || all params: 9,099,000,320 || trainable%: 1.8251"


# --------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("flag", ["--learning_rat", "--no_such_flag"])
def test_unknown_and_abbreviated_flags_are_errors(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        vqa.main([*FIXTURE_DATA, "--output_dir", "out", flag, "1"])
    assert stop.value.code == 2
    assert f"unrecognized arguments: {flag} 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "missing flag: --train_data_path, --frames_dir, --audio_dir (or --input_mode text), --output_dir"),
        (["--dry_run", "--input_mode", "text"], "missing flag: --train_data_path, --frames_dir"),
        (
            [*FIXTURE_DATA, "--dry_run", "--eval_strategy", "epoch"],
            "--eval_strategy needs --eval_data_path: name the questions to evaluate on",
        ),
        (
            [*FIXTURE_DATA, "--dry_run", "--max_train_frames", "0"],
            "--max_train_frames 0: must be at least 1; leave it out for all",
        ),
        (
            [*FIXTURE_DATA, "--dry_run", "--max_eval_frames", "-1"],
            "--max_eval_frames -1: must be 0 (all frames) or more",
        ),
        (
            [*FIXTURE_DATA, "--dry_run", "--checkpoint_every_n", "-1"],
            "--checkpoint_every_n must be 0 (none), 1 (every layer), N (every N-th layer) or auto",
        ),
    ],
)
def test_flags_that_are_missing_or_wrong(argv, message):
    with pytest.raises(vqa.VQAError) as error:
        vqa.main(argv)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *(
            (f"--{flag} {value}", f"--{flag} {value}: must be at least 1")
            for flag in ("max_image_size", "lora_r", "lora_alpha", "per_device_train_batch_size")
            for value in (0, -5)
        ),
        ("--per_device_eval_batch_size 0", "--per_device_eval_batch_size 0: must be at least 1"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0: must be at least 1"),
        ("--learning_rate -1", "--learning_rate -1.0: must be above 0"),
        ("--learning_rate nan", "--learning_rate nan: must be above 0"),
        ("--num_train_epochs 0", "--num_train_epochs 0.0: must be above 0"),
        ("--lora_dropout 1", "--lora_dropout 1.0: must be 0 or more, and below 1"),
        ("--lora_dropout -0.1", "--lora_dropout -0.1: must be 0 or more, and below 1"),
        (
            "--report_to comet_ml",
            "--report_to comet_ml: no such package is installed; install it, or leave the flag out",
        ),
        ("--save_strategy best", "--save_strategy best: say by what, such as --metric_for_best_model eval_loss"),
        ("--frames_dir nowhere", "nowhere: no such folder; --frames_dir names it"),
        ("--audio_dir nowhere", "nowhere: no such folder; --audio_dir or --eval_audio_dir names it"),
        ("--output_dir file", "--output_dir file: cannot be written to (File exists); name another folder"),
        ("--output_dir file/in", "--output_dir file/in: cannot be written to (Not a directory); name another folder"),
    ],
)
def test_what_cannot_be_trained_with_is_refused_before_weights_load(flags, message, no_weights):
    Path("file").touch()
    with pytest.raises(vqa.VQAError) as error:
        vqa.main([*FIXTURE_DATA, *RANDOM_TINY, *SMALL, "--output_dir", "out", *flags.split()])
    assert str(error.value) == message


def test_steps_need_no_epochs():
    _, _, args = vqa.parse_arguments([*FIXTURE_DATA, "--dry_run", "--num_train_epochs", "0", "--max_steps", "3"])
    assert args.max_steps == 3


@pytest.mark.parametrize("many", ["n_gpu", "world_size"])
def test_more_than_one_gpu_is_refused(many, monkeypatch, no_weights):
    """The Trainer would cut the batch for them, positions by their axes; or each process would write the same files."""
    monkeypatch.setattr(vqa.VQATrainingArguments, many, 8)
    with pytest.raises(vqa.VQAError, match=r"^8 GPUs are to be used, and .* one: .* with CUDA_VISIBLE_DEVICES=0$"):
        vqa.main([*FIXTURE_DATA, *RANDOM_TINY, *SMALL, "--output_dir", "out"])
    vqa.parse_arguments([*FIXTURE_DATA, "--dry_run"])


@pytest.mark.parametrize("error", [vqa.VQAError("wrong"), vqa.Interrupted(15, "wrong")])
def test_an_error_begins_a_line_after_a_progress_bar(error, capsys):
    def entry():
        bar = vqa.tqdm(total=2)
        bar.update()
        raise error

    with pytest.raises(SystemExit):
        vqa.run(entry)
    assert capsys.readouterr().err.splitlines()[-1] == ("error: wrong" if error.args == ("wrong",) else str(error))


def test_an_unknown_flag_is_two_lines(capsys):
    with pytest.raises(SystemExit) as stop:
        vqa.parse_arguments([*FIXTURE_DATA, "--nosuch", "1"])
    assert stop.value.code == 2
    usage, message = capsys.readouterr().err.splitlines()
    assert usage.endswith("[--FLAG VALUE ...]  (--help lists all flags)")
    assert message.endswith("error: unrecognized arguments: --nosuch 1")


def test_every_flag_has_a_help_text(capsys):
    for arguments in (vqa.ModelArguments, vqa.DataArguments, vqa.VQATrainingArguments):
        for name, flag in arguments.__dataclass_fields__.items():
            assert not flag.init or flag.metadata.get("help"), name


@pytest.mark.skipif(torch.accelerator.is_available(), reason="about machines without an accelerator")
def test_the_processor_is_used_where_there_is_nothing_else(capsys):
    _, _, args = vqa.parse_arguments([*FIXTURE_DATA, "--output_dir", "out", "--bf16", "True"])
    assert (args.use_cpu, args.bf16) == (True, True)
    assert capsys.readouterr().out == "No accelerator found: training on the CPU (use_cpu).\n"
    with pytest.raises(vqa.VQAError, match="--gpu_memory_limit_gib needs a CUDA GPU; leave it out here"):
        vqa.limit_gpu_memory(38.5)


def test_zero_eval_frames_means_all():
    _, data_args, _ = vqa.parse_arguments([*FIXTURE_DATA, "--dry_run", "--max_eval_frames", "0"])
    assert data_args.max_eval_frames is None


# ------------------------------------------------------------------------------------------------------------- dry run


def test_dry_run_at_full_size_within_2_gb():
    command = [sys.executable, str(ROOT / "train_vqa.py"), "--dry_run", "--init", "random", *FIXTURE_DATA]
    command += ["--model_name_or_path", str(FULL_SIZE)]
    command += ["--num_train_epochs", "20", "--gradient_accumulation_steps", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert PARAMETERS in lines
    # 1500 of speech, 8 frames of 8 x 7 + 2, and 45 to 49 of text and answer
    assert "train: 5 samples, tokens per sample: min 2005, median 2006, max 2009" in lines
    assert "steps: 20 (1 an epoch of 5 samples)" in lines
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 * 2**20  # KiB


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two epochs on three rows with evaluation on two; returns (folder, printed text)."""
    folder = tmp_path_factory.mktemp("run") / "out"
    printed = []
    argv = [
        *FIXTURE_DATA, *RANDOM_TINY, *SMALL, "--output_dir", str(folder),
        "--eval_data_path", str(FIXTURES / "smoke.jsonl"), "--eval_strategy", "epoch",
        "--max_train_samples", "3", "--max_eval_samples", "2", "--max_eval_frames", "6",
        "--num_train_epochs", "2", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4",
        "--per_device_eval_batch_size", "1", "--eval_accumulation_steps", "4",
        "--learning_rate", "2e-4", "--save_strategy", "epoch", "--bf16", "True", "--logging_steps", "1",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert vqa.main(argv) == 0
    return folder, printed


def test_progress_lines_are_the_seeds(trained):
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
    assert [line for line in trained[1] if line in wanted] == wanted


@pytest.mark.parametrize("place", ["checkpoint-1", "checkpoint-2", "."])
def test_every_save_holds_adapter_projector_tokenizer_and_settings(trained, place):
    folder = trained[0] / place
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", vqa.SETTINGS_FILE} <= names
    assert "training_args.bin" not in names
    assert "base_model.model.audio_projector.weight" in load_file(folder / "adapter_model.safetensors")
    assert vqa.load_tokenizer(folder).pad_token_id == 497


def test_settings_say_what_evaluation_must_repeat(trained, base):
    settings = vqa.load_settings(trained[0])
    assert settings["input"] == {
        "input_mode": "audio",
        "max_train_frames": 2,
        "max_eval_frames": 6,
        "max_image_size": 56,
        "audio_tokens": "full",
        "encoder_tokens": 1500,
        "frame_mode": "images",
        "instruction": "Answer the question concisely based on the visual and audio evidence.",
    }
    model = settings["model"]
    assert (model["init"], model["init_seed"], model["dtype"]) == ("random", 1, "bfloat16")
    tokenizer = vqa.load_tokenizer(trained[0])
    again = vqa.load_model(TINY, tokenizer, init="random", seed=1, dtype=torch.bfloat16)
    assert vqa.fingerprint(again) == model["base_fingerprint"]
    assert settings["tokens"] == {"pad": 497, "audio": 494, "turn_ends": [480, 482]}


def test_losses_and_learning_rate_are_logged(trained):
    history = json.loads((trained[0] / "trainer_state.json").read_text())["log_history"]
    assert [sorted({"loss", "learning_rate"} & set(entry)) for entry in history if "loss" in entry] == [
        ["learning_rate", "loss"]
    ] * 2
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)


def test_projector_and_lora_have_moved_from_where_they_started(trained, base):
    stored = load_file(trained[0] / "adapter_model.safetensors")
    start = base.audio_projector.weight.to(torch.bfloat16).float()
    assert not torch.equal(stored["base_model.model.audio_projector.weight"], start)
    assert all(tensor.any() for name, tensor in stored.items() if "lora_B" in name)


def test_evaluation_in_training_gathers_no_logits(fresh, tokenizer, processor, rows, tmp_path):
    model = vqa.add_lora(fresh(), r=4)
    dataset = vqa.SurgicalVQADataset(rows[:2], processor, max_eval_frames=2, is_eval=True)
    args = vqa.VQATrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_eval_batch_size=1)
    trainer = vqa.VQATrainer(
        model=model,
        args=args,
        eval_dataset=dataset,
        data_collator=vqa.VQACollator(497),
        tokenizer=tokenizer,
        settings={},
    )
    output = trainer.predict(dataset)
    assert output.predictions is None
    assert output.metrics["test_loss"] > 0


def test_training_without_speech_needs_no_audio_folder(tmp_path):
    argv = [*FIXTURE_DATA[:4], *RANDOM_TINY, *SMALL, "--input_mode", "text", "--output_dir", str(tmp_path / "out")]
    assert vqa.main([*argv, "--max_steps", "1", "--save_strategy", "no", "--report_to", "none"]) == 0
    assert vqa.load_settings(tmp_path / "out")["input"]["input_mode"] == "text"


def test_a_run_that_misses_its_target_loss_fails(tmp_path, capsys):
    argv = [*FIXTURE_DATA, *RANDOM_TINY, *SMALL, "--output_dir", str(tmp_path / "out"), "--target_train_loss", "1e-3"]
    assert vqa.main([*argv, "--max_steps", "1", "--logging_steps", "1", "--save_strategy", "no"]) == 1
    assert "error: the loss did not fall below --target_train_loss 0.001" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.fixture()
def no_weights(monkeypatch, tmp_path):
    """Fails the test where weights would be loaded."""
    monkeypatch.chdir(tmp_path)

    def load_model(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(vqa, "load_model", load_model)


def test_bad_data_is_named_before_weights_load(data, no_weights):
    (data.audio / "qa_000205.ogg").unlink()
    with pytest.raises(vqa.VQAError, match=f"{data.jsonl}:5: no speech in"):
        vqa.main([*data.flags, *RANDOM_TINY, "--output_dir", "out"])


def test_eval_questions_that_would_play_the_train_speech_are_refused(data, no_weights, tmp_path):
    """The rephrased questions have the ids of the template ones, and so would be heard in the template wording."""
    rephrased = tmp_path / "rephrased.jsonl"
    rephrased.write_text(data.jsonl.read_text().replace("Has the narrow", "Was the narrow"))
    with pytest.raises(vqa.VQAError) as error:
        vqa.main([*data.flags, "--eval_data_path", str(rephrased), *RANDOM_TINY, "--output_dir", "out"])
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{rephrased}:1: asks another question than {data.jsonl}:1, but both would play ")
    assert lines[1].startswith(f"{rephrased}:3: asks another question than {data.jsonl}:3, but both would play ")


def test_pickles_are_refused_in_training_naming_what_converts_them(no_weights):
    with pytest.raises(vqa.VQAError) as error:
        vqa.main([*FIXTURE_DATA, *RANDOM_TINY, *SMALL, "--output_dir", "out", "--allow_pickle", "True"])
    text = str(error.value)
    assert "--allow_pickle" in text and "merge_stage2_to_bf16.py" in text and "\n" not in text


def test_an_error_is_one_line_and_a_status_without_traceback(capsys):
    def fail():
        raise vqa.VQAError("a.jsonl:3: wrong\na.jsonl:4: wrong too")

    with pytest.raises(SystemExit) as stop:
        vqa.run(fail)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: a.jsonl:3: wrong\nerror: a.jsonl:4: wrong too\n"


# ------------------------------------------------------------------------------------------------------- shell scripts


def test_verify_tokenizer_prints_both_states(tmp_path):
    command = ["bash", str(ROOT / "verify_tokenizer.sh"), str(TINY)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    assert "❌ ISSUE: PAD and EOS tokens are THE SAME\n   Both have ID: 480\n" in done.stdout
    assert "✅ FIX: Updated train_vqa.py adds dedicated <|pad|> token\n" in done.stdout
    assert "Generation stops at: '<|endoftext|>' (ID: 480), '<|im_end|>' (ID: 482)" in done.stdout


def test_verify_tokenizer_fails_where_the_model_is_nowhere(tmp_path):
    command = ["bash", str(ROOT / "verify_tokenizer.sh"), "no/such/model/folder"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(HF_HUB_OFFLINE="1"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: --model_name_or_path no/such/model/folder: no such folder")


def environment(**extra) -> dict[str, str]:
    """The environment of a user on whose PATH this interpreter is python3."""
    return {**os.environ, "PYTHON": sys.executable, **extra}


def test_without_packages_and_requirements_one_line_says_what_to_install(tmp_path):
    shutil.copy(ROOT / "train_with_eval_FINAL.sh", tmp_path)
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    command = ["bash", str(tmp_path / "train_with_eval_FINAL.sh"), "--python"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(PYTHON=str(bare / "bin/python")))
    assert done.returncode == 1
    assert done.stderr == (
        "error: packages are missing; run: python3 -m pip install "
        "torch transformers peft accelerate pillow torchaudio soundfile tqdm\n"
    )
