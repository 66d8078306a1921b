"""Flags of training: the public launch lines, names from elsewhere, and each flag of TrainingArguments."""

import importlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments
from transformers.optimization import SchedulerType
from transformers.utils import logging as transformers_logging

import train_vqa as vqa
from tests.conftest import EVAL_DATA, FIXTURES, ROOT, read_jsonl, refusal, same_tensors, weights_of, write_jsonl

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
    "--early_stopping_patience 3 --logging_steps 20",
}
EVALUATED = {"src/train_vqa.py": [10, 20], "train_with_eval_FINAL.sh": [10, 20], "train_multivideo_overnight.sh": [8]}


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """The folder that W&B writes into: it takes its settings once a process."""
    folder = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        yield folder


@pytest.fixture(scope="module")
def with_weights(tiny, base, tokenizer, tmp_path_factory):
    """The tiny model as a folder with weights."""
    folder = tmp_path_factory.mktemp("with_weights")
    vqa.write_weights(base, folder)
    vqa.write_config_and_tokenizer(base, tokenizer, tiny, folder)
    return folder


@pytest.fixture()
def no_data(monkeypatch):
    """Fails the test where data would be read."""
    monkeypatch.setattr(vqa, "prepare_data", lambda *args: pytest.fail("data were read"))


@pytest.mark.skipif(not WANDB, reason="the package wandb is not installed")
def test_wandb_without_a_login_is_refused_before_data_are_read(argv, tmp_path):
    """In a process of its own: W&B remembers how it was asked. The data do not exist."""
    kept = {name: value for name, value in os.environ.items() if name not in ("WANDB_API_KEY", "WANDB_MODE")}
    line = [*argv(tmp_path, "--report_to", "wandb"), "--train_data_path", str(tmp_path / "none.jsonl")]
    command = [sys.executable, str(ROOT / "train_vqa.py"), *map(str, line)]
    done = subprocess.run(command, env={**kept, "HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1 and "--report_to wandb: " in done.stderr and "wandb login" in done.stderr
    assert "Traceback" not in done.stderr and "none.jsonl" not in done.stderr


@pytest.mark.parametrize("name", LAUNCH_LINES)
def test_the_public_launch_lines_train(name, with_weights, tmp_path, offline):
    row = read_jsonl(FIXTURES / "smoke.jsonl")[0]
    rows = write_jsonl(tmp_path / "rows.jsonl", [row | {"frames": row["frames"][:1]}])
    paths = {"frames": FIXTURES / "frames", "audio": FIXTURES / "audio", "rows": rows, "out": tmp_path / "out"}
    line = shlex.split(LAUNCH_LINES[name].format(**paths))
    earlier = len(list(offline.glob("wandb/offline-run-*")))
    assert vqa.main([*line, "--model_name_or_path", str(with_weights)]) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == EVALUATED[name]
    assert vqa.find_damage(tmp_path / "out") is None
    if WANDB:
        importlib.import_module("wandb").finish()
        assert len(list(offline.glob("wandb/offline-run-*"))) == earlier + 1


# ------------------------------------------------------------------------------------------- names, and what is refused


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
--num_gpus 2 | --num_gpus 0 --dry_run True
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


def test_values_that_cannot_be_trained_with_are_refused_before_data_are_read(train, tmp_path, no_data, capsys):
    """By a VQAError of one line, or by argparse with status 2."""
    taken = []
    for flags in REFUSED.replace("\n", " | ").strip(" |").split(" | "):
        capsys.readouterr()
        with pytest.raises((vqa.VQAError, SystemExit, pytest.fail.Exception)) as error:
            train(tmp_path, *flags.split())
        message = capsys.readouterr().err.splitlines()[-1] if error.value.args == (2,) else str(error.value)
        if flags.split()[0].removeprefix("--") not in message or "\n" in message:
            taken.append((flags, message))
    assert not taken


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
    assert stop.value.code == 2 and near in capsys.readouterr().err.splitlines()[-1].split("; ")[1]


# ---------------------------------------------------------------------------------------------- each flag that is taken

EVALUATED_TWICE = "--eval_strategy steps --eval_steps 2 --eval_accumulation_steps 1 --max_steps 4"
BY_LOSS = "--eval_strategy steps --eval_steps 1 --save_strategy steps --save_steps 1 --metric_for_best_model loss"
LOADED = "--dataloader_num_workers 1 --dataloader_persistent_workers True --dataloader_prefetch_factor 4 "
LOADED += "--dataloader_multiprocessing_context spawn"
SHOWN = f"--run_name mine --report_to {REPORTER} --log_level info --disable_tqdm False --resume_from_checkpoint True "
SHOWN += "--include_num_input_tokens_seen True --bf16 True --use_cpu True --gradient_accumulation_steps 3"
# Flag -> what is added to SHORT, and what is then seen of it, where `plain` is the run with SHORT alone.
SHORT = "--max_train_samples 3 --max_eval_samples 1 --per_device_train_batch_size 1 --logging_steps 1 --max_steps 3 "
SHORT += "--save_strategy no --lora_dropout 0 --learning_rate 1e-2 --input_mode text"
TAKEN = {
    "output_dir": ("", lambda run, plain: (run.folder / "adapter_model.safetensors").is_file()),
    "per_device_train_batch_size": ("--per_device_train_batch_size 3", lambda run, plain: run.epoch == 3),
    "num_train_epochs": ("--max_steps -1 --num_train_epochs 2", lambda run, plain: len(run.losses) == 6),
    "max_steps": (EVALUATED_TWICE, lambda run, plain: len(run.losses) == 4),
    "learning_rate": ("--learning_rate 1e-3", lambda run, plain: run.rates[0] == 1e-3),
    "lr_scheduler_type": ("--lr_scheduler_type constant", lambda run, plain: run.rates == [1e-2] * 3),
    "lr_scheduler_kwargs": (
        '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":5e-3}',
        lambda run, plain: run.rates[-1] > 5e-3,
    ),
    "warmup_steps": ("--warmup_steps 2", lambda run, plain: run.rates == [0, 5e-3, 1e-2]),
    "warmup_ratio": ("--warmup_ratio 0.5", lambda run, plain: run.rates == [0, 5e-3, 1e-2]),
    "optim": ("--optim sgd", lambda run, plain: run.differs and run.training["optim"] == "sgd"),
    "weight_decay": ("--weight_decay 0.5", lambda run, plain: run.differs),
    "adam_beta1": ("--adam_beta1 0.5", lambda run, plain: run.differs),
    "adam_beta2": ("--adam_beta2 0.5", lambda run, plain: run.differs),
    "adam_epsilon": ("--adam_epsilon 0.1", lambda run, plain: run.differs),
    "gradient_accumulation_steps": (SHOWN, lambda run, plain: run.epoch == 3),
    "max_grad_norm": ("--max_grad_norm 1e-3", lambda run, plain: run.differs),
    "bf16": (SHOWN, lambda run, plain: run.settings["model"]["dtype"] == "bfloat16"),
    "neftune_noise_alpha": ("--neftune_noise_alpha 5", lambda run, plain: run.losses[0] != plain.losses[0]),
    "logging_strategy": ("--logging_strategy epoch", lambda run, plain: len(run.losses) == 1),
    "logging_steps": ("--logging_steps 2", lambda run, plain: len(run.losses) == 1),
    "logging_first_step": ("--logging_steps 3 --logging_first_step True", lambda run, plain: len(run.losses) == 2),
    "include_num_input_tokens_seen": (
        SHOWN,
        lambda run, plain: run.log[-1]["num_input_tokens_seen"] > 100,
    ),
    "log_level": (SHOWN, lambda run, plain: run.verbosity == 20 != plain.verbosity),
    "disable_tqdm": (SHOWN, lambda run, plain: "3/3" in run.err and "3/3" not in plain.err),
    "report_to": (SHOWN, lambda run, plain: not WANDB or "wandb" in run.training["report_to"]),
    "run_name": (SHOWN, lambda run, plain: run.training["run_name"] == "mine"),
    "do_eval": ("--do_eval", lambda run, plain: "eval_loss" in run.out),
    "eval_strategy": ("--eval_strategy epoch", lambda run, plain: run.evaluated == [3]),
    "eval_steps": (EVALUATED_TWICE, lambda run, plain: run.evaluated == [2, 4]),
    "eval_delay": (f"{EVALUATED_TWICE} --eval_delay 3", lambda run, plain: run.evaluated == [4]),
    "eval_on_start": ("--eval_on_start True", lambda run, plain: run.evaluated == [0]),
    "eval_accumulation_steps": (
        EVALUATED_TWICE,
        lambda run, plain: run.evaluated == [2, 4],
    ),
    "per_device_eval_batch_size": (
        "--eval_strategy epoch --max_eval_samples 4 --per_device_eval_batch_size 2",
        lambda run, plain: run.eval_loader.batch_sampler.batch_size == 2,
    ),
    "save_strategy": ("--save_strategy epoch", lambda run, plain: run.saved == [3]),
    "save_steps": ("--save_strategy steps --save_steps 2", lambda run, plain: run.saved == [2, 3]),
    "save_total_limit": (
        "--save_strategy steps --save_steps 1 --save_total_limit 1",
        lambda run, plain: run.saved == [3],
    ),
    "save_only_model": (
        "--save_strategy epoch --save_only_model True",
        lambda run, plain: not (run.folder / "checkpoint-3/optimizer.pt").exists(),
    ),
    "load_best_model_at_end": (
        f"{BY_LOSS} --load_best_model_at_end True",
        lambda run, plain: same_tensors(run.weights, weights_of(run.folder / f"checkpoint-{run.lowest}")),
    ),
    "metric_for_best_model": (BY_LOSS, lambda run, plain: run.state["best_global_step"] == run.lowest),
    "greater_is_better": (
        f"{BY_LOSS} --greater_is_better True",
        lambda run, plain: run.state["best_global_step"] != run.lowest,
    ),
    "full_determinism": ("--full_determinism True", lambda run, plain: run.deterministic and not plain.deterministic),
    "seed": ("--seed 2", lambda run, plain: run.losses[0] != plain.losses[0]),
    "data_seed": ("--data_seed 5", lambda run, plain: run.order != plain.order),
    "use_cpu": (SHOWN, lambda run, plain: run.settings["model"]["init_device"] == "cpu"),
    "dataloader_num_workers": (LOADED, lambda run, plain: run.loader.num_workers == 1 and not run.differs),
    "dataloader_persistent_workers": (
        LOADED,
        lambda run, plain: run.loader.persistent_workers and not run.differs,
    ),
    "dataloader_prefetch_factor": (
        LOADED,
        lambda run, plain: run.loader.prefetch_factor == 4 and not run.differs,
    ),
    "dataloader_multiprocessing_context": (
        LOADED,
        lambda run, plain: run.loader.multiprocessing_context.get_start_method() == "spawn" and not run.differs,
    ),
    "train_sampling_strategy": (
        "--train_sampling_strategy sequential",
        lambda run, plain: run.order == [0, 1, 2] != plain.order,
    ),
    "resume_from_checkpoint": (
        SHOWN,
        lambda run, plain: "No checkpoint to resume from" in run.out,
    ),
}
# What only a GPU shows: TF32 is refused without one, and memory is pinned for it alone.
ON_A_GPU = {"tf32", "dataloader_pin_memory"}


def test_every_flag_of_transformers_has_been_looked_at():
    """A new one belongs into TAKEN, with what is seen of it, or into NOT_OFFERED."""
    here = {f.name for f in fields(vqa.VQATrainingArguments) if f.init}
    theirs = {f.name for f in fields(TrainingArguments)} - {"use_liger_kernel"}
    ours = {"early_stopping_patience", "early_stopping_threshold", "eval_answers"}  # in test_early_stopping.py
    ours |= {f"hub_{what}" for what in ("model_id", "private_repo", "revision", "strategy", "token")}  # in test_hub.py
    ours.add("push_to_hub")
    assert here - ours == (TAKEN.keys() & here) | ON_A_GPU
    assert theirs - ours <= TAKEN.keys() | ON_A_GPU | {name for group in vqa.NOT_OFFERED for name in group.split()}


@pytest.fixture()
def short_run(train, tmp_path, capsys, monkeypatch):
    """Runs SHORT and more flags, with what was left behind, printed, and seen by the loaders."""
    loaders, order = [], []
    keep, item = vqa.let_workers_ignore_signals, vqa.SurgicalVQADataset.__getitem__
    monkeypatch.setattr(vqa, "let_workers_ignore_signals", lambda loader: loaders.append(loader) or keep(loader))
    monkeypatch.setattr(vqa.SurgicalVQADataset, "__getitem__", lambda self, i: order.append(i) or item(self, i))

    def run(name, more, plain=None):
        folder = tmp_path / name
        loaders.clear(), order.clear(), capsys.readouterr()
        evaluated = [*EVAL_DATA[:2]] if "eval" in more or "greater" in more else []
        try:
            assert train(folder, *SHORT.split(), *evaluated, *more.split()) == 0
            deterministic = torch.are_deterministic_algorithms_enabled()
            verbosity = transformers_logging.get_verbosity()
        finally:
            torch.use_deterministic_algorithms(False)
            transformers_logging.set_verbosity_warning()
        state = json.loads((folder / "trainer_state.json").read_text())
        log, settings = state["log_history"], vqa.load_settings(folder)
        evaluations = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
        return SimpleNamespace(
            **dict(zip(("out", "err"), capsys.readouterr(), strict=True)),
            folder=folder,
            state=state,
            log=log,
            losses=[entry["loss"] for entry in log if "loss" in entry],
            rates=[entry["learning_rate"] for entry in log if "loss" in entry],
            epoch=log[-1]["epoch"],
            evaluated=[*evaluations],
            lowest=min(evaluations, key=evaluations.get, default=None),
            saved=sorted(vqa.checkpoints_of(folder)),
            settings=settings,
            training=settings["training"],
            weights=weights_of(folder),
            differs=plain is not None and not same_tensors(weights_of(folder), plain.weights),
            order=[*order],
            loader=loaders[0],
            eval_loader=loaders[-1],
            deterministic=deterministic,
            verbosity=verbosity,
        )

    yield run
    vqa.end_workers()  # persistent ones, for which Python would wait without end


@pytest.mark.slow
def test_every_flag_that_is_taken_is_seen_in_a_file_or_a_figure(short_run, offline):
    plain = short_run("plain", "")
    runs = {"": plain}  # flags that do not disturb each other share one
    without_effect = []
    for name, (more, seen) in TAKEN.items():
        if more not in runs:
            runs[more] = short_run(name, more, plain)
        if not seen(runs[more], plain):
            without_effect.append(name)
    assert not without_effect


@pytest.mark.slow
def test_no_file_holds_a_token(short_run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run = short_run("out", "--save_strategy epoch")
    assert not [path for path in run.folder.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]


@pytest.mark.slow
def test_rows_of_like_length_come_together_and_none_is_read_before_its_turn(short_run, tmp_path):
    """Also after a resume: the order of an epoch follows from the seed."""
    grouped = "--train_sampling_strategy group_by_length --max_train_samples 5 --per_device_train_batch_size 2 "
    grouped += "--save_strategy steps --save_steps 4 --max_steps 6"  # of three an epoch
    run = short_run("whole", grouped)
    assert sorted(run.order[:5]) == sorted(run.order[5:]) == [0, 1, 2, 3, 4] and run.order[:5] != run.order[5:]
    assert run.loader.batch_sampler.sampler.lengths == run.loader.dataset.token_counts()
    (tmp_path / "part").mkdir()
    (run.folder / "checkpoint-4").rename(tmp_path / "part" / "checkpoint-4")
    resumed = short_run("part", f"{grouped} --resume_from_checkpoint True", run)
    assert not resumed.differs


def test_groups_of_like_length_pad_less_and_change_with_the_epoch():
    lengths = [(37 * row) % 101 for row in range(100)]
    sampler = vqa.GroupedByLength(4, lengths, seed=1)
    sampler.set_epoch(0)
    orders = [[*sampler]]
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        orders.append([*sampler])
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == [*range(100)]

    def padded(order):
        return sum(4 * max(lengths[row] for row in order[i : i + 4]) for i in range(0, 100, 4))

    assert all(padded(order) < 0.8 * padded(range(100)) for order in orders)
