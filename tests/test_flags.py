"""Flags of training: the public launch lines, names from elsewhere, and each flag of transformers' TrainingArguments."""

import importlib.util
import json
import shlex
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments
from transformers.optimization import SchedulerType
from transformers.utils import logging as transformers_logging

import train_vqa as vqa
from tests.conftest import EVAL_DATA, FIXTURES, read_jsonl, refusal, same_tensors, weights_of, write_jsonl

WANDB = importlib.util.find_spec("wandb") is not None
REPORTER = "wandb" if WANDB else "none"  # the one value that a machine without that package cannot have

# -------------------------------------------------------------------------------------------------------- launch lines

STEPS = "--per_device_train_batch_size 1 --gradient_accumulation_steps 4 --per_device_eval_batch_size 1 "
BEST = "--save_strategy steps --load_best_model_at_end True --metric_for_best_model eval_loss "
DATA = "--train_data_path {rows} --eval_data_path {rows} --frames_dir {frames} --audio_dir {audio} "
PUBLIC = f"--output_dir {{out}} {DATA} --eval_audio_dir {{audio}} {STEPS} --eval_accumulation_steps 4 {BEST} "
PUBLIC += f"--learning_rate 2e-4 --do_eval --eval_strategy steps --bf16 True --report_to {REPORTER} "
# Of the public SurgViVQA-Audio, but for paths; and the steps that are evaluated in 20 and 8 epochs of one step.
LAUNCH_LINES = {
    "src/train_vqa.py": f"{PUBLIC} --run_name surgical-vqa-multivideo-audio-only --num_train_epochs 20 "
    "--warmup_ratio 0.05 --eval_steps 10 --save_steps 50 --save_total_limit 2 --logging_steps 5",
    "train_with_eval_FINAL.sh": f"{PUBLIC} --run_name surgical-vqa-eval-v1 --num_train_epochs 20 "
    "--warmup_ratio 0.0 --eval_steps 10 --save_steps 50 --save_total_limit 2 --logging_steps 5",
    "train_multivideo_overnight.sh": f"{PUBLIC} --run_name surgical-vqa-multivideo-overnight --num_train_epochs 8 "
    "--warmup_ratio 0.05 --eval_steps 100 --save_steps 100 --save_total_limit 3 --greater_is_better False "
    "--logging_steps 20",
}
EVALUATED = {"src/train_vqa.py": [10, 20], "train_with_eval_FINAL.sh": [10, 20], "train_multivideo_overnight.sh": [8]}


@pytest.fixture(scope="module")
def with_weights(tiny, base, tokenizer, tmp_path_factory):
    """The tiny model as a folder with weights."""
    folder = tmp_path_factory.mktemp("with_weights")
    vqa.write_weights(base, folder)
    vqa.write_config_and_tokenizer(base, tokenizer, tiny, folder)
    return folder


@pytest.mark.parametrize("name", LAUNCH_LINES)
def test_the_public_launch_lines_train(name, with_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where W&B writes
    monkeypatch.setenv("WANDB_MODE", "offline")
    row = read_jsonl(FIXTURES / "smoke.jsonl")[0]
    rows = write_jsonl(tmp_path / "rows.jsonl", [row | {"frames": row["frames"][:1]}])
    paths = {"frames": FIXTURES / "frames", "audio": FIXTURES / "audio", "rows": rows, "out": tmp_path / "out"}
    line = shlex.split(LAUNCH_LINES[name].format(**paths))
    assert vqa.main([*line, "--model_name_or_path", str(with_weights)]) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == EVALUATED[name]
    assert vqa.find_damage(tmp_path / "out") is None
    assert not WANDB or list(tmp_path.glob("wandb/offline-run-*"))


# ------------------------------------------------------------------------------------------- names, and what is refused


@pytest.fixture()
def no_data(monkeypatch):
    """Fails the test where data would be read."""
    monkeypatch.setattr(vqa, "prepare_data", lambda *args: pytest.fail("data were read"))


def test_flags_of_the_public_project_and_of_transformers_4_are_answered_with_ours(train, tmp_path, no_data):
    ours = {
        "evaluation_strategy": "--eval_strategy",
        "group_by_length": "--train_sampling_strategy group_by_length",
        "gradient_checkpointing": "--checkpoint_every_n",
        "logging_dir": "TENSORBOARD_LOGGING_DIR",
        "overwrite_output_dir": "--output_dir",
        "no_cuda": "--use_cpu",
        "label_smoothing_factor": "leave it out",
        "cache_dir": "HF_HUB_CACHE",
        "max_seq_length": "--max_image_size",
        "include_question_text": "--input_mode audio_text",
        "allow_missing_audio": "--skip_bad_samples",
    }
    for name, answer in ours.items():
        message = refusal(train, tmp_path, f"--{name.replace('_', '-')}", "x")
        assert message.startswith(f"--{name}: ") and answer in message and "\n" not in message


def test_flags_of_transformers_that_are_not_offered_are_refused_by_name(train, tmp_path, no_data):
    names = [name for group in vqa.NOT_OFFERED for name in group.split()]
    assert len(names) == len(set(names))
    for name in names:
        message = refusal(train, tmp_path, f"--{name}", "hf_token")
        assert message.startswith(f"--{name}: leave it out") and "\n" not in message and "hf_token" not in message
    assert not set(names) & {name.removeprefix("--") for name in vqa.flag_names()}


# Values that nothing can be trained with, or that nothing would read; the message names the flag.
REFUSED = """
--do_eval False | --do_eval | --eval_delay 1 | --eval_steps 5 | --eval_on_start True | --load_best_model_at_end True
--metric_for_best_model loss | --greater_is_better True | --eval_strategy sometimes | --eval_strategy steps
--warmup_ratio 1.0 | --warmup_ratio -0.1 | --warmup_ratio nan | --warmup_ratio 0.1 --warmup_steps 3 | --warmup_steps -1
--seed -1 | --seed 4294967296 | --data_seed -1 | --adam_beta1 1.0 | --adam_beta2 1.5 | --adam_epsilon -1.0
--weight_decay -0.1 | --weight_decay nan | --max_grad_norm -1.0 | --max_steps 0 | --learning_rate inf
--num_train_epochs inf | --neftune_noise_alpha -1.0 | --tf32 True | --logging_steps 0 | --logging_steps -1
--logging_strategy sometimes | --save_steps 0 | --save_steps -5 | --save_total_limit 0 | --save_strategy sometimes
--eval_accumulation_steps 0 | --dataloader_num_workers -1 | --dataloader_persistent_workers True
--dataloader_prefetch_factor 2 | --dataloader_multiprocessing_context spawn | --train_sampling_strategy batch_rebalance
--dataloader_prefetch_factor 0 --dataloader_num_workers 1 | --include_num_input_tokens_seen some | --log_level loud
--optim no_such | --optim lomo | --optim galore_adamw | --optim schedule_free_adamw | --optim adamw_torch_8bit
--optim adamw_bnb_8bit | --lr_scheduler_type no_such | --lr_scheduler_type cosine_with_min_lr
--lr_scheduler_type warmup_stable_decay | --lr_scheduler_type reduce_lr_on_plateau | --lr_scheduler_kwargs file
--lr_scheduler_kwargs {"no_such":1} | --lr_scheduler_kwargs {broken | --report_to no_such | --report_to mlflow
"""
SAID_OTHERWISE = {"--include_num_input_tokens_seen": "", "--logging_strategy": "", "--lr_scheduler_kwargs": ""}


def test_values_that_cannot_be_trained_with_are_refused_before_data_are_read(train, tmp_path, no_data, capsys):
    """By a VQAError of one line, or by argparse with status 2."""
    for flags in REFUSED.replace("\n", " | ").strip(" |").split(" | "):
        capsys.readouterr()
        with pytest.raises((vqa.VQAError, SystemExit)) as error:
            train(tmp_path, *flags.split())
        message = str(error.value)
        if error.type is SystemExit:
            assert error.value.code == 2
            message = capsys.readouterr().err.splitlines()[-1]
        assert flags.split()[0] in message and "\n" not in message, (flags, message)


def test_schedules_are_made_or_refused_before_data_are_read(argv, tmp_path):
    refused = []
    for kind in SchedulerType:
        try:
            flags = argv(tmp_path, *EVAL_DATA[:2], "--eval_strategy", "epoch", "--lr_scheduler_type", kind.value)
            vqa.parse_arguments(flags)
        except vqa.VQAError as error:
            assert "--lr_scheduler_kwargs" in str(error)
            refused.append(kind.value)
    assert refused == ["cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"]


@pytest.mark.parametrize(
    ("flag", "near"), [("--learning_rat", "--learning_rate"), ("--eval-stategy=no", "--eval_strategy")]
)
def test_a_misspelt_flag_is_told_its_nearest_neighbour(flag, near, train, tmp_path, no_data, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, flag, "1")
    assert stop.value.code == 2 and near in capsys.readouterr().err.splitlines()[-1].split(flag)[1]


@pytest.mark.skipif(not WANDB, reason="the package wandb is not installed")
def test_wandb_without_a_login_is_refused_before_data_are_read(train, tmp_path, monkeypatch, no_data):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    message = refusal(train, tmp_path, "--report_to", "wandb")
    assert message.startswith("--report_to wandb: ") and "wandb login" in message and "\n" not in message
