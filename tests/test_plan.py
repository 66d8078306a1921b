"""The plan of a run: what --dry_run says of memory, and that what is cheap to check comes before the media."""

import json
import re
import shutil
import sys

import pytest
import torch

import train_vqa as vqa
from tests.conftest import EVAL_DATA, SIX_STEPS, refusal

LARGE = ("--dry_run", "--checkpoint_every_n", "0", "--per_device_train_batch_size", "400")  # 0.5 GiB and more


@pytest.fixture()
def no_media(monkeypatch):
    """Fails the test where rows are read or media decoded."""
    monkeypatch.setattr(vqa, "prepare_data", lambda *_: pytest.fail("data were read"))


@pytest.fixture()
def model(fresh, tiny, tokenizer, tmp_path):
    """The tiny model as a folder with weights."""
    (tmp_path / "model").mkdir()
    vqa.write_weights(fresh(), tmp_path / "model")
    for file in tiny.iterdir():
        if file.name.endswith((".json", ".txt")):
            shutil.copy(file, tmp_path / "model")
    return tmp_path / "model"


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("limit", ["0.6", "0.3"])
def test_what_does_not_fit_is_an_error_with_flags_that_make_it_fit(limit, train, tmp_path, no_weights):
    flags = (*LARGE, "--gpu_memory_limit_gib", limit)
    message = refusal(train, tmp_path, *flags)
    assert message.startswith(f"--gpu_memory_limit_gib {limit}: ") and "\n" not in message
    advised = re.search(r"it would fit with (.*) \(", message)[1].split()
    assert train(tmp_path, *flags, *advised) == 0


def test_a_plan_for_several_gpus(train, tmp_path, capsys, no_weights):
    """Five rows are three steps of two; a card also holds the gradients as they are exchanged."""
    memory = []
    for count in ("1", "2"):
        flags = ("--lora_r", "4000", "--per_device_train_batch_size", "1", "--num_train_epochs", "1")
        assert train(tmp_path, "--dry_run", *flags, "--num_gpus", count) == 0
        said = capsys.readouterr().out
        memory.append(float(re.search(r"gradients and optimizer ([\d.]+)", said)[1]))
    assert "steps: 3 (3 an epoch of 5 samples on 2 GPUs)" in said and "GiB of each GPU" in said
    assert memory[1] == pytest.approx(memory[0] * 16 / 12, abs=0.1)


def test_what_nothing_makes_fit_is_said(train, tmp_path, no_weights):
    assert "no flags" in refusal(train, tmp_path, *LARGE, "--gpu_memory_limit_gib", "1e-4")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the card is a limit")
def test_without_a_limit_there_is_no_verdict(train, tmp_path, capsys, no_weights):
    assert train(tmp_path, *LARGE) == 0
    assert "fit" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("optim", "size"),
    [
        *(("adamw_torch", 8), ("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2 + 8 / 256), ("adamw_8bit", 2 + 8 / 256)),
        *(("sgd", 0), ("adafactor", 0), ("adagrad", 4), ("rmsprop_bnb_32bit", 4)),
        *(("lion_8bit", 1 + 4 / 256), ("ademamix", 12), ("paged_adamw_8bit", 0)),
    ],
)
def test_bytes_of_optimizers(optim, size):
    assert vqa.OptimizerNames(optim) and vqa.optimizer_bytes(optim) == size


def test_the_states_of_the_optimizer_are_counted(train, tmp_path, capsys, no_weights):
    memory = []
    for optim in ("adamw_torch", "sgd"):
        assert train(tmp_path, "--dry_run", "--lora_r", "4000", "--optim", optim) == 0
        memory.append(re.search(r"gradients and optimizer ([\d.]+)", capsys.readouterr().out)[1])
    assert float(memory[0]) > float(memory[1])


def test_every_optimizer_that_is_offered_is_counted():
    for optim in vqa.OPTIMIZERS:
        assert vqa.optimizer_bytes(optim) >= 0


def test_no_more_answers_are_counted_than_there_are_rows(train, tmp_path, no_weights):
    """The prompts of 32 rows, as many as are answered at a time, would take 0.03 GiB; of two they take 0.002."""
    flags = (*EVAL_DATA[:2], "--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1", "--dry_run")
    flags = (*flags, "--eval_answers", "1000", "--gpu_memory_limit_gib", "0.02", "--max_eval_frames", "1")
    assert train(tmp_path, *flags, "--max_eval_samples", "2") == 0


def test_fewer_answers_are_advised_where_they_alone_do_not_fit(train, tmp_path, no_weights):
    flags = (*EVAL_DATA[:2], "--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1", "--dry_run")
    flags = (*flags, "--eval_answers", "5", "--gpu_memory_limit_gib", "0.006")
    message = refusal(train, tmp_path, *flags)
    advised = re.search(r"it would fit with (.*) \(", message)[1].split()
    assert "--eval_answers" in advised and train(tmp_path, *flags, *advised) == 0


def test_evaluation_is_counted_at_its_own_batch_size(train, tmp_path, capsys, no_weights):
    """In float32 a token takes 4 x 4 (f + h) = 3072 bytes; the batch is that of the flag."""
    flags = (*EVAL_DATA[:2], "--per_device_eval_batch_size", "2000", "--max_eval_frames", "1")
    assert train(tmp_path, "--dry_run", *flags) == 0
    out = capsys.readouterr().out
    longest = int(re.search(r"^eval: 5 samples, .* max (\d+)$", out, re.M)[1])
    found = re.search(r"^memory: about (\S+) GiB .* peak of evaluation \(.*, activations (\S+), encoders", out, re.M)
    assert found[2] == f"{2000 * longest * 3072 / 2**30:.1f}"


# ---------------------------------------------------------------------------------------------- what is cheap, at first


@pytest.mark.parametrize("how", [(), ("--dry_run",)])
def test_missing_weights_are_named_before_data_are_read(how, train, model, tmp_path, no_weights, no_media):
    flags = ("--init", "pretrained", "--model_name_or_path", model, *how)
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}))
    assert str(model / "model-00002-of-00002.safetensors") in refusal(train, tmp_path / "out", *flags)
    index.unlink()
    (model / "model.safetensors").unlink()
    assert str(model / "model.safetensors") in refusal(train, tmp_path / "out", *flags)


@pytest.mark.parametrize("how", [(), ("--dry_run",)])
def test_an_adapter_without_weights_is_named_before_data_are_read(
    how, checkpoint, train, tmp_path, no_weights, no_media
):
    (checkpoint / "adapter_model.safetensors").unlink()
    assert str(checkpoint) in refusal(train, tmp_path / "out", "--adapter_path", checkpoint, *how)


def test_what_a_run_would_resume_from_or_write_among_is_checked_before_data_are_read(
    train, trained, tmp_path, no_weights, no_media
):
    assert "nowhere" in refusal(train, tmp_path / "out", "--resume_from_checkpoint", tmp_path / "nowhere")
    (tmp_path / "out" / "checkpoint-7").mkdir(parents=True)
    assert "checkpoint-7" in refusal(train, tmp_path / "out")
    assert "checkpoint-7" in refusal(train, tmp_path / "out", "--dry_run")
    resumed = (*SIX_STEPS, "--resume_from_checkpoint", trained / "checkpoint-2", "--learning_rate", "3e-3")
    assert "learning_rate 0.01, this run has 0.003" in refusal(train, tmp_path / "other", *resumed)


@pytest.mark.parametrize(
    "spoil", [lambda folder: (folder / "tokenizer.json").unlink(), lambda folder: (folder / "config.json").unlink()]
)
def test_base_files_are_checked_before_data_are_read(spoil, model, train, tmp_path, no_weights, no_media):
    spoil(model)
    assert str(model) in refusal(train, tmp_path / "out", "--model_name_or_path", model)


@pytest.mark.parametrize(
    ("flags", "module"),
    [
        ("--load_in_4bit True", "bitsandbytes"),
        ("--optim adamw_bnb_8bit", "bitsandbytes"),
        ("--use_liger_kernel True", "liger_kernel"),
        ("--report_to comet_ml", ""),
        ("--compile_layers True", ""),
    ],
)
def test_a_dry_run_finds_missing_packages(flags, module, train, tmp_path, monkeypatch, no_weights, no_media):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("CXX", str(tmp_path / "no_compiler"))
    monkeypatch.setenv("CC", str(tmp_path / "no_compiler"))
    message = refusal(train, tmp_path / "out", "--dry_run", *flags.split())
    assert message.startswith(flags.split()[0]) and "\n" not in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_dry_run_plans_for_a_gpu_that_is_not_here(train, tmp_path, no_weights):
    pytest.importorskip("bitsandbytes")
    assert train(tmp_path / "out", "--dry_run", "--optim", "adamw_bnb_8bit", "--load_in_4bit", "True") == 0
