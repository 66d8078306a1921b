"""What makes training faster must not change it: compiled layers, the choice of recomputation, the estimate of memory,
and the benchmark that measures them."""

import json
import math
import multiprocessing
import re
import shutil
import sys
import sysconfig
import types
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import train_vqa as vqa
from benchmarks import train_speed
from benchmarks.training_changes import CHANGES
from tests.conftest import FIXTURES
from tests.test_main import FIXTURE_DATA, RANDOM_TINY, SMALL


@pytest.fixture()
def batches(tokenizer, base, rows):
    """Two batches of two samples, of different length."""
    processor = vqa.VQAProcessor(tokenizer, base.config, max_image_size=56, audio_tokens="speech")
    long, short = (vqa.SurgicalVQADataset(rows, processor, max_train_frames=frames) for frames in (2, 1))
    return [vqa.VQACollator(497)([dataset[0], dataset[3]]) for dataset in (long, short)]


def losses_and_gradients(model, batches):
    """The loss of each batch, and the gradients of their sum by name."""
    model.train()
    losses = [model(**{k: v for k, v in batch.items() if k != "rows"}).loss for batch in batches]
    sum(losses).backward()
    return torch.stack(losses).detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------- a step that does not wait


class Waits(TorchDispatchMode):
    """Names the operators under it whose outcome has a size that the CPU has to know: on a GPU it waits for them.

    What it does not see on a CPU: copies to it (`tolist`, `cpu`).
    """

    WAITING = ("nonzero", "masked_select", "_local_scalar_dense", "masked_scatter_backward", "_unique2", "unique_dim")
    WAITING += ("repeat_interleave", "bincount")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.WAITING or (name.startswith("index") and any_of_dtype(args, torch.bool)):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def any_of_dtype(values, dtype):
    """Whether a tensor of `dtype` is among nested arguments."""
    return any(v.dtype == dtype for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("frame_mode", ["images", "video"])
def test_no_forward_or_backward_pass_of_training_waits_for_the_gpu(tmp_path, monkeypatch, frame_mode):
    """With features kept; where frames are encoded anew their sizes are read once a batch."""
    step, seen = vqa.VQATrainer.training_step, []

    def watched(self, model, inputs, *args):
        assert {"vision_at", "speech_at", "answer_at"} <= inputs.keys()
        with Waits() as waits:
            loss = step(self, model, inputs, *args)
        seen.append(waits.seen)
        return loss

    monkeypatch.setattr(vqa.VQATrainer, "training_step", watched)
    argv = [*FIXTURE_DATA, *RANDOM_TINY, *SMALL, "--max_steps", "2", "--save_strategy", "no", "--report_to", "none"]
    argv += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--frame_mode", frame_mode]
    assert vqa.main([*argv, "--cache_features", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "out")]) == 0
    assert seen == [[]] * 3  # five rows: two batches, then one


def test_places_found_before_are_those_found_in_the_forward_pass(fresh, batches):
    models = fresh(), fresh()
    for model in models:
        torch.manual_seed(0)
        vqa.add_lora(model, 4, 16, 0.0)
    unplaced = [{name: value for name, value in batch.items() if not name.endswith("_at")} for batch in batches]
    (loss, gradients), (other_loss, other) = map(losses_and_gradients, models, (batches, unplaced))
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other.keys()
    assert all(torch.equal(gradient, other[name]) for name, gradient in gradients.items())


def test_modules_are_told_to_train_once_and_again_after_an_evaluation(fresh):
    model, told = fresh(), []
    layer = model.model.language_model.layers[0]
    layer.train = lambda mode=True: told.append(mode) or type(layer).train(layer, mode)
    for mode in (True, True, False, False, True, True):
        model.train(mode)
        assert (model.training, layer.training, layer.mlp.training) == (mode,) * 3
        assert not model.model.visual.training
        assert not model.audio_encoder.training
    assert told == [True, False, False, True]


@pytest.mark.parametrize("towers", [False, True])
def test_what_lora_adds_to_a_model_in_training_is_told_too(fresh, towers):
    model = fresh().train()
    adapted = vqa.add_lora(model, 4, 16, 0.05, vision_tower=towers, audio_encoder=towers).train()
    for name, module in adapted.named_modules():
        tower = "visual" in name or "audio_encoder" in name
        assert module.training == (towers or not tower), name
    assert not any(module.training for module in adapted.eval().modules())


# ------------------------------------------------------------------------------------------------------ compiled layers


@pytest.mark.parametrize("every_n", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_compiled_layers_give_the_plain_loss_and_gradients_from_one_graph(fresh, batches, monkeypatch, every_n):
    assert batches[0]["input_ids"].shape != batches[1]["input_ids"].shape
    plain, compiled = fresh(), fresh()
    vqa.set_checkpointing(plain, 0)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    vqa.set_checkpointing(compiled, every_n)
    vqa.compile_decoder(compiled)
    models = []
    for model in (plain, compiled):
        torch.manual_seed(0)  # for the same adapter
        models.append(vqa.add_lora(model, 4, 16, 0.0))
    (loss, gradients), (other_loss, other) = (losses_and_gradients(model, batches) for model in models)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch._dynamo.utils.counters["aot_autograd"]["total"] == 1  # no second trace, which no cache would keep
    assert torch.allclose(loss, other_loss, atol=1e-5, rtol=1e-5)
    # 2 layers x 7 adapted matrices x A and B, and the projector's weight
    assert gradients.keys() == other.keys() and len(gradients) == 2 * 7 * 2 + 1
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, other[name], atol=1e-5, rtol=1e-5), name


@pytest.mark.parametrize("audio_tokens", ["full", "speech"])
def test_padding_to_a_multiple_leaves_loss_and_gradients(fresh, tokenizer, rows, audio_tokens):
    """In float64, where rounding (2e-5 of a gradient in float32, for sums in another order) hides nothing."""
    models = fresh(), fresh()
    for model in models:
        torch.manual_seed(0)
        vqa.add_lora(model, 4, 16, 0.0)
        model.double()
    processor = vqa.VQAProcessor(tokenizer, models[0].config, max_image_size=56, audio_tokens=audio_tokens)
    dataset = vqa.SurgicalVQADataset(rows, processor, max_train_frames=2)
    samples = [dataset[0], dataset[3]]
    for sample in samples:
        sample.update({name: values.double() for name, values in sample.items() if values.is_floating_point()})
    batch, padded = (vqa.VQACollator(497, multiple=multiple)(samples) for multiple in (1, 16))
    length, fill = batch["input_ids"].shape[1], {"input_ids": 497, "labels": -100}
    assert length % 16 and padded["input_ids"].shape == (2, math.ceil(length / 16) * 16)
    assert padded.keys() == batch.keys() and "attention_mask" not in padded
    for name in ("vision_at", "speech_at", "answer_at"):  # the same tokens, each row of which begins elsewhere
        row, column = batch[name] // length, batch.pop(name) % length
        assert torch.equal(padded[name], row * padded["input_ids"].shape[1] + column)
        batch[name] = row * length + column
    for name, values in batch.items():
        if name.endswith("_at"):
            continue
        assert torch.equal(padded[name][..., :length] if values.shape[-1] == length else padded[name], values), name
        if values.shape[-1] == length:
            assert (padded[name][..., length:] == fill.get(name, 0)).all(), name
    (loss, gradients), (other_loss, other) = map(losses_and_gradients, models, ([batch], [padded]))
    assert torch.allclose(loss, other_loss, rtol=1e-12)
    assert gradients.keys() == other.keys() and len(gradients) == 2 * 7 * 2 + 1
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, other[name], atol=1e-12, rtol=1e-10), name


@pytest.mark.parametrize("compiled", [False, True])
def test_batches_of_training_and_evaluation_are_padded_where_layers_are_compiled(compiled, monkeypatch, tmp_path):
    lengths, forward = {True: [], False: []}, vqa.SurgicalVQAModel.forward

    def recorded(self, *args, **kwargs):
        lengths[self.training].append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(vqa.SurgicalVQAModel, "forward", recorded)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(vqa, "check_compiler", lambda device: None)
    flags = ["--eval_data_path", FIXTURE_DATA[1], "--max_steps", "2", "--output_dir", str(tmp_path / "out")]
    flags += ["--audio_tokens", "speech", "--compile_layers", str(compiled), "--report_to", "none"]
    assert vqa.main([*FIXTURE_DATA, *RANDOM_TINY, *SMALL, *flags]) == 0
    for phase in lengths.values():
        assert phase and any(length % 16 for length in phase) == (not compiled)


def test_the_estimate_counts_the_padding_of_compiled_layers(monkeypatch):
    counted, estimate = [], vqa.estimate_memory
    monkeypatch.setattr(
        vqa, "estimate_memory", lambda model, tokens, *args: counted.append(tokens) or estimate(model, tokens, *args)
    )
    for compiled in ("False", "True"):
        flags = "--dry_run", "--per_device_train_batch_size", "3", "--compile_layers", compiled
        assert vqa.main([*FIXTURE_DATA, *RANDOM_TINY, *SMALL, *flags]) == 0
    plain, padded = counted
    assert plain % 3 == 0 and plain // 3 % 16 and padded == 3 * math.ceil(plain / 3 / 16) * 16


# ------------------------------------------------------------------------------------------------------ Liger's kernels


@pytest.fixture()
def liger(monkeypatch):
    """A stand-in for the package liger-kernel, which computes in torch; the calls of its functions, by name."""
    calls = []

    def norm(x, weight, *settings):
        assert settings == (1e-6, 0.0, "llama", True, None)
        calls.append("norm")
        return torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6)

    def swiglu(gate, up, *factors):
        assert factors == (1.0, 1.0)
        calls.append("swiglu")
        return torch.nn.functional.silu(gate) * up

    package, ops = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.ops")
    ops.LigerRMSNormFunction = types.SimpleNamespace(apply=norm)
    ops.LigerSiLUMulFunction = types.SimpleNamespace(apply=swiglu)
    package.ops = ops
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    return calls


@pytest.mark.parametrize("every_n", [0, 1])
@pytest.mark.parametrize("train_decoder", vqa.DECODER_TRAINING)
def test_liger_computes_the_norms_and_mlps_of_one_model_alone(fresh, batches, liger, every_n, train_decoder):
    models = []
    for _ in range(2):
        torch.manual_seed(0)  # for the same adapter
        models.append(build(fresh, train_decoder, torch.float32)[0])
        vqa.set_checkpointing(models[-1], every_n)
    plain, changed = models
    names = list(changed.state_dict())
    vqa.use_liger(changed)
    loss, gradients = losses_and_gradients(plain, batches[:1])
    assert liger == []
    other_loss, other = losses_and_gradients(changed, batches[:1])
    # 2 norms in each of 2 layers, once more where they are recomputed, and the last norm; an MLP a layer
    assert (liger.count("norm"), liger.count("swiglu")) == ((5, 2) if every_n == 0 else (9, 4))
    assert torch.allclose(loss, other_loss, atol=1e-5) and gradients.keys() == other.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    assert all(torch.allclose(gradient, other[name], atol=1e-5) for name, gradient in gradients.items())
    assert list(changed.state_dict()) == names == list(plain.state_dict())


def test_a_decoder_without_swiglu_is_refused_before_weights_load(monkeypatch, tmp_path):
    """Its config is all that it takes, so a dry run, which loads none, says so too."""
    message = "--use_liger_kernel needs hidden_act 'silu', config.json has 'gelu'; leave it out"
    folder = shutil.copytree(FIXTURES / "tiny_model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    monkeypatch.setattr(vqa, "check_liger", lambda device_type: None)
    monkeypatch.setattr(vqa, "load_model", None)
    flags = ["--model_name_or_path", str(folder), "--init", "random", "--use_liger_kernel", "True"]
    for mode in (["--dry_run"], ["--use_cpu", "True", "--output_dir", str(tmp_path / "out")]):
        with pytest.raises(vqa.VQAError) as error:
            vqa.main([*FIXTURE_DATA, *SMALL, *flags, *mode])
        assert str(error.value) == message


def test_liger_runs_in_training_and_the_trainer_knows_nothing_of_it(liger, monkeypatch, tmp_path):
    seen, training = [], vqa.VQATrainer.train_safely

    def record(self, checkpoint):
        seen.append((self.args.use_liger_kernel, self.args.liger_kernel_config, list(liger)))
        training(self, checkpoint)

    monkeypatch.setattr(vqa.VQATrainer, "train_safely", record)
    monkeypatch.setattr(vqa, "check_liger", seen.append)
    flags = ["--use_liger_kernel", "True", "--max_steps", "1", "--output_dir", str(tmp_path), "--report_to", "none"]
    flags += ["--gradient_accumulation_steps", "1", "--per_device_train_batch_size", "1", "--checkpoint_every_n", "2"]
    assert vqa.main([*FIXTURE_DATA, *RANDOM_TINY, *SMALL, "--use_cpu", "True", *flags]) == 0
    assert seen == ["cpu", (False, None, [])]
    assert (liger.count("norm"), liger.count("swiglu")) == (7, 3)  # layer 0 is recomputed
    assert vqa.load_settings(tmp_path)["trained"]["use_liger_kernel"] is True
    # 2 layers x 7 adapted matrices x A and B, and the projector's weight
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * 7 * 2 + 1


def test_a_dry_run_plans_for_liger_without_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert vqa.main([*FIXTURE_DATA, *RANDOM_TINY, *SMALL, "--dry_run", "--use_liger_kernel", "True"]) == 0
    assert "memory: about" in capsys.readouterr().out


def test_a_liger_that_is_missing_or_too_old_is_refused_in_one_line(liger, monkeypatch):
    monkeypatch.setattr(vqa.importlib.metadata, "version", lambda name: "0.7.0")
    end = "; pip install 'liger-kernel>=0.8', or leave the flag out"
    with pytest.raises(vqa.VQAError) as error:
        vqa.check_liger("cuda")
    assert re.fullmatch(r"--use_liger_kernel: .* but found liger-kernel==0\.7\.0" + re.escape(end), str(error.value))
    monkeypatch.setattr(vqa.importlib.metadata, "version", lambda name: "0.8.0")
    vqa.check_liger("cuda")
    monkeypatch.delitem(sys.modules, "liger_kernel")
    monkeypatch.delitem(sys.modules, "liger_kernel.ops")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(vqa.VQAError) as error:
        vqa.check_liger("cuda")
    assert str(error.value) == "--use_liger_kernel: No module named 'liger_kernel'" + end


# ------------------------------------------------------------------------------------------------------ recomputation


def layers_times_100_mib(every_n):
    """A faked estimate of 1 GiB and 100 MiB for each of 28 layers that is not recomputed."""
    recomputed = -(-28 // every_n) if every_n else 0
    return {"weights": 2**30, "activations": (28 - recomputed) * 100 * 2**20}


@pytest.mark.parametrize(
    ("limit", "every_n"),
    [
        (4.1, 0),  # 93 % are 3.81 GiB; all 28 layers take 1 + 2.73
        (4.0, 32),  # 3.72: one layer less, 3.64; from every 28th on it is one, and the largest is looked at first
        (3.0, 3),  # 2.79: at most 18 layers, 2.76; every 3rd leaves 18, every 4th 21
        (0.5, 1),  # nothing fits: as little memory as can be
    ],
)
def test_auto_recomputes_as_few_layers_as_fit(limit, every_n, capsys):
    args = vqa.ModelArguments(checkpoint_every_n="auto", gpu_memory_limit_gib=limit)
    chosen = vqa.choose_checkpointing(args, layers_times_100_mib)
    assert capsys.readouterr().out == f"Activation checkpointing: --checkpoint_every_n auto takes {chosen}\n"
    assert chosen == every_n


def test_a_number_is_taken_as_it_is_and_auto_needs_something_to_fit_into(monkeypatch):
    assert vqa.choose_checkpointing(vqa.ModelArguments(checkpoint_every_n="3"), None) == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(vqa.VQAError) as error:
        vqa.choose_checkpointing(vqa.ModelArguments(checkpoint_every_n="auto"), layers_times_100_mib)
    assert str(error.value) == "--checkpoint_every_n auto needs a CUDA GPU, or --gpu_memory_limit_gib to fit into"


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "automatic"])
def test_other_values_are_refused(value):
    with pytest.raises(vqa.VQAError) as error:
        vqa.main([*FIXTURE_DATA, "--dry_run", "--checkpoint_every_n", value])
    assert str(error.value) == "--checkpoint_every_n must be 0 (none), 1 (every layer), N (every N-th layer) or auto"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint_every_n", "auto"], "--checkpoint_every_n auto needs .*--gpu_memory_limit_gib"),
        (["--compile_layers", "True"], "--compile_layers: .*compiler.*g[+][+].* in CXX"),
        (
            ["--use_liger_kernel", "True", "--use_cpu", "True"],
            "--use_liger_kernel needs a CUDA GPU",
        ),
        (
            ["--dry_run", "--use_liger_kernel", "True", "--compile_layers", "True"],
            "--use_liger_kernel: --compile_layers True",
        ),
        (
            ["--dry_run", '--liger-kernel-config={"rope": true}'],
            "--liger_kernel_config: .*--use_liger_kernel",
        ),
        (["--dry_run", "--gpu_memory_limit_gib", "-5"], "--gpu_memory_limit_gib -5"),
    ],
)
def test_what_cannot_work_here_is_refused_before_weights_load(flags, message, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(vqa, "load_model", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(vqa.VQAError) as error:
        vqa.main([*FIXTURE_DATA, *RANDOM_TINY, *SMALL, "--output_dir", str(tmp_path / "out"), *flags])
    assert re.match(message, str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("program", "fault"),
    [
        ("#!/bin/sh\necho cc1plus: cannot execute >&2\necho more >&2\nexit 1\n", "cc1plus: cannot execute"),
        ("#!/bin/sh\nexit 3\n", "exit status 3"),
        ("#!/no/such/shell\n", "[Errno 2] No such file or directory: "),
        ("#!/bin/sh\nprintf 'Python.h fehlt f\\374r cc\\n' >&2\nexit 1\n", "Python.h fehlt f\ufffdr cc"),
    ],
)
@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_a_broken_compiler_is_refused_in_one_line(program, fault, device, variable, monkeypatch, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text(program)
    compiler.chmod(0o755)
    monkeypatch.setenv(variable, str(compiler))
    with pytest.raises(vqa.VQAError) as error:
        vqa.check_compiler(device)
    start, end = (
        f"--compile_layers: the compiler {compiler} does not work ({fault}",
        (f"); mend it (Python.h is in the package python3-dev), name another in {variable}, or leave the flag out"),
    )
    assert str(error.value).startswith(start) and str(error.value).endswith(end)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("device", "language", "variable"), [("cpu", "c++", "CXX"), ("cuda", "c", "CC")])
def test_a_compiler_that_works_passes(device, language, variable, monkeypatch, tmp_path):
    """It is asked for a program in the language that torch.compile will give it, with Python's headers, as what
    torch.compile writes includes them; here by one that only notes its words and the program."""
    compiler = tmp_path / "works"
    compiler.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\ncat > {tmp_path}/program\n')
    compiler.chmod(0o755)
    monkeypatch.setenv(variable, str(compiler))
    vqa.check_compiler(device)
    headers = sysconfig.get_path("include", "posix_prefix")
    assert (tmp_path / "words").read_text().startswith(f"-x {language} - -I {headers} -o ")
    assert (tmp_path / "program").read_text().startswith("#include <Python.h>\n")


# ------------------------------------------------------------------------------------------------------ the estimate


def build(fresh, train_decoder, dtype, dropout=0.0):
    """A tiny model as `train` builds it, and its arguments."""
    args = vqa.ModelArguments(train_decoder=train_decoder, lora_r=4, lora_dropout=dropout)
    whole = train_decoder == "full"
    model = fresh(dtype=torch.float32 if whole else dtype)
    vqa.train_fully(model, dtype) if whole else vqa.skip_input_casts(vqa.add_lora(model, 4, 16, dropout))
    return model, args


def test_estimate_of_a_case_done_by_hand(fresh):
    """Tiny: 2 layers, h = 64, f = 128, 2 of 4 heads for keys: k = 32; r = 4; bf16.

    A layer with dropout keeps per token 4 (2 h) = 512 bytes in float32, 2 (2 h + 2 k + 3 f + 7 r) = 1208 in bf16, and
    (2 + 1) (6 h + f) = 1536 of copies and masks: 3256. Without: 512 + 1208 + 2 (2 h + f) = 2232. Compiled:
    2 x 2 h + 2 (2 h + 2 k + 2 f + 7 r) = 1208. The backward pass of an MLP works with 6 f x 2 = 1536.
    """
    model, args = build(fresh, "lora", torch.bfloat16, dropout=0.05)
    estimate = partial(vqa.estimate_memory, model, 10, args, torch.bfloat16)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    towers = sum(p.numel() * 2 for m in (model.model.visual, model.audio_encoder) for p in m.parameters())
    # A: 4 x in, B: out x 4, of q, k, v, o (64 and 32 wide), gate, up and down, in 2 layers; and the projector
    adapters = 2 * 4 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 128))
    trained = adapters + sum(p.numel() for p in model.audio_projector.parameters() if p.requires_grad)
    assert estimate(False, 0) == {
        "weights": weights,
        "gradients and optimizer": 12 * trained + 2 * trained,
        "activations": 10 * (2 * 3256 + 1536),
    }
    assert estimate(True, 0)["weights"] == weights - towers
    # every layer: its input, and the one that is recomputed; every 2nd: one of each, and the one that is recomputed
    assert estimate(False, 1)["activations"] == 10 * (2 * 128 + 3256 + 1536)
    assert estimate(False, 2)["activations"] == 10 * (3256 + 128 + 3256 + 1536)
    args.compile_layers = True
    assert estimate(False, 0)["activations"] == 10 * (2 * 1208 + 1536)
    args.compile_layers, args.lora_dropout = False, 0.0
    assert estimate(False, 0)["activations"] == 10 * (2 * 2232 + 1536)


@pytest.mark.parametrize("train_decoder", vqa.DECODER_TRAINING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimate_counts_what_autograd_keeps_of_a_layer(fresh, train_decoder, dtype):
    """But for rotary tables, statistics of rows, and autocast's copies of weights."""
    model, args = build(fresh, train_decoder, dtype)
    vqa.set_checkpointing(model, 0)
    model.train()
    decoder, tokens = model.model.language_model, 1000
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.shape[-1] >= 16 and tokens in tensor.shape and tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    inputs = torch.randn(1, tokens, 64, dtype=decoder.norm.weight.dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        rotary = decoder.rotary_emb(inputs, torch.arange(tokens).expand(3, 1, tokens))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            decoder.layers[1](inputs, position_embeddings=rotary)
    tables = {table.untyped_storage().data_ptr() for table in rotary}
    measured = sum(t.untyped_storage().nbytes() for where, t in kept.items() if where not in tables) / tokens
    estimate = vqa.estimate_memory(model, 1, args, dtype, False, 0)["activations"]
    assert 0.9 < (estimate - 6 * 128 * dtype.itemsize) / 2 / measured <= 1.05


def test_dry_run_prints_the_estimate(capsys):
    flags = "--dry_run", "--checkpoint_every_n", "0", "--per_device_train_batch_size", "64"
    assert vqa.main([*FIXTURE_DATA, *RANDOM_TINY, *SMALL, *flags]) == 0
    out = capsys.readouterr().out
    longest = int(re.search(r"^train: 5 samples, tokens per sample: .* max (\d+)$", out, re.M)[1])
    # in float32 with dropout, per token: 2 layers of 512 + 4 (2 h + 2 k + 3 f + 7 r) + 5 (6 h + f), and 6 f x 4
    gib = 64 * longest * (2 * (512 + 4 * 604 + 5 * 512) + 3072) / 2**30
    assert gib > 1
    parts = f"weights 0.0, gradients and optimizer 0.0, activations {gib:.1f}"
    assert f"memory: about {gib:.1f} GiB of the GPU at the peak of training ({parts})\n" in out


# ------------------------------------------------------------------------------------------------------ the benchmark


@pytest.mark.parametrize(
    ("every_n", "factor"), [(0, 4), (1, 6), (3, 4 + 2 * 10 / 28), (5, 4 + 2 * 6 / 28), (28, 4 + 2 / 28)]
)
def test_the_rule_counts_the_layers_that_are_recomputed(every_n, factor):
    assert train_speed.flops_factor(28, every_n) == pytest.approx(factor)


@pytest.mark.parametrize("change", ["all_logits", "ones_mask", "kv_cache"])
def test_a_change_to_an_exact_lever_leaves_loss_and_gradients(fresh, rows, tokenizer, change):
    models = fresh(), fresh()
    for model in models:
        torch.manual_seed(0)
        vqa.add_lora(model, 4, 16, 0.0)
    processor = vqa.VQAProcessor(tokenizer, models[0].config, max_image_size=56, audio_tokens="speech")
    sample = vqa.SurgicalVQADataset(rows, processor)[0]
    batch = vqa.VQACollator(497)([sample])
    loss, gradients = losses_and_gradients(models[0], [batch])
    with CHANGES[change]():
        changed = vqa.VQACollator(497)([sample])
        other_loss, other = losses_and_gradients(models[1], [changed])
    assert torch.allclose(loss, other_loss, atol=1e-5) and gradients.keys() == other.keys()
    assert all(torch.allclose(gradient, other[name], atol=1e-5) for name, gradient in gradients.items())
    assert ("attention_mask" in changed) == (change == "ones_mask")
    assert "attention_mask" not in vqa.VQACollator(497)([sample])  # gone again


def test_casts_attention_and_graphs_are_changed_and_changed_back(fresh, monkeypatch):
    required = *FIXTURE_DATA, *RANDOM_TINY, "--output_dir", "out", "--bf16", "True", "--use_cpu", "True"
    args, _, training_args = vqa.parse_arguments(required)

    def casts():
        model = vqa.build_model(args, training_args, "cpu")[0]
        return model.model.language_model.layers[0].mlp.up_proj.cast_input_dtype_enabled

    with CHANGES["input_casts"]():
        assert casts()
    assert not casts()
    with CHANGES["cudnn_attention"]():
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    monkeypatch.setattr(torch, "compile", lambda function, **options: options)
    with CHANGES["one_length"](), CHANGES["cuda_graphs"]():
        assert vqa.PADDING_MULTIPLE == 64
        assert torch.compile(None, dynamic=True, fullgraph=True) == {
            "dynamic": False,
            "fullgraph": True,
            "mode": "reduce-overhead",
        }
        weights = [p for p in vqa.add_lora(fresh(), 4, 16, 0.0).parameters() if p.requires_grad]
        assert weights and all(weight.grad.abs().max() == 0 for weight in weights)
    assert torch.compile(None, dynamic=True) == {"dynamic": True} and vqa.PADDING_MULTIPLE == 16


def test_gaps_are_put_down_to_what_launched_the_next_kernel():
    """Kernels at 100-200, 205-300, 500-600, 650-700 (of two streams, overlapping) and 900-950 us."""

    def event(cat, name, start, end, tid=1, correlation=None):
        args = {} if correlation is None else {"correlation": correlation}
        return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": tid, "args": args}

    trace = [
        event("kernel", "a", 100, 200, 7, 1),
        event("kernel", "b", 205, 300, 7, 2),
        event("kernel", "c", 500, 600, 7, 3),
        event("gpu_memcpy", "d", 560, 700, 8, 4),
        event("kernel", "e", 900, 950, 7, 5),
        event("cuda_runtime", "cudaLaunchKernel", 490, 495, 1, 3),
        event("cuda_driver", "cuLaunchKernelEx", 600, 605, 2, 5),  # before the gap began
        event("cpu_op", "backward", 400, 800, 1),
        event("cpu_op", "aten::mm", 480, 497, 1),
        event("user_annotation", "Optimizer.step", 590, 960, 2),
        event("user_annotation", "ProfilerStep#1", 0, 1000, 1),
        event("cuda_runtime", "cudaStreamSynchronize", 700, 790, 1, 6),
        {"ph": "i", "cat": "kernel", "name": "not a span", "ts": 0},
    ]
    table = train_speed.gap_table(trace)
    lines = table.splitlines()
    assert lines[0] == "GPU: 0.85 ms from its first kernel to its last, 5 kernels"
    assert [" ".join(line.split()) for line in lines[1:4]] == [
        "0.01 ms 1 gaps of 0 to 10 us",
        "0.00 ms 0 gaps of 10 to 50 us",
        "0.40 ms 2 gaps of 50 to inf us",
    ]
    assert "     0.20 ms      1 x backward > aten::mm" in lines
    assert "     0.20 ms      1 x queued: Optimizer.step" in lines
    assert lines[-1] == "     0.09 ms      1 x cudaStreamSynchronize in backward"
    assert train_speed.gap_table([]) == "gaps: no kernels in the trace\n"


def test_a_change_that_is_not_there_is_refused(capsys):
    required = ["--model_name_or_path", "m", "--data_path", "d", "--frames_dir", "f", "--audio_dir", "a"]
    with pytest.raises(SystemExit) as error:
        train_speed.main([*required, "--design", "x=@tiger --lora_dropout 0"])
    assert error.value.code == 2
    assert "--design: @tiger: not among @all_logits, @input_casts" in capsys.readouterr().err


@pytest.mark.slow
def test_designs_share_a_process_and_one_that_fails_does_not_end_the_others(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train_speed, "subprocess", None)
    trainer, output = vqa.VQATrainer, tmp_path / "speed.json"
    with pytest.raises(SystemExit, match="not measured, see above: liger"):
        train_speed.main(
            [
                *("--model_name_or_path", str(tiny), "--data_path", str(FIXTURES / "smoke.jsonl")),
                *("--frames_dir", str(FIXTURES / "frames"), "--audio_dir", str(FIXTURES / "audio"), "--designs="),
                *("--design", "liger=--use_liger_kernel True --use_cpu True"),
                *("--design", "three=@ones_mask --max_train_samples 3", "--design"),
                "all=--dataloader_num_workers 1 --dataloader_persistent_workers True",
                *("--one_process", "--profile", "--output", str(output)),
                *("--rows", "8", "--steps", "5", "--warmup", "1"),
                *("--flags", "--max_image_size 56 --dataloader_num_workers 0 --per_device_train_batch_size 1"),
            ]
        )
    failed, three, whole = json.loads(output.read_text())["results"]
    assert failed["failed"].startswith("VQAError: --use_liger_kernel needs a CUDA GPU, since its kernels")
    for result in (three, whole):
        assert len(result["step_seconds"]) == result["steps"] == 2  # of 5; one warms up, two belong to the profile
        assert sum(result["step_seconds"]) == pytest.approx(result["seconds"])
    assert "gaps: no kernels in the trace" in output.with_suffix(".all.profile.txt").read_text()
    assert vqa.VQATrainer is trainer
    assert multiprocessing.active_children() == []  # they would keep this process from ending


@pytest.mark.parametrize("others", [[], [vqa.PeakMemory]])  # plain Trainer; ours, which counts anew at each step
def test_the_peak_is_that_of_the_counted_steps(others, monkeypatch):
    class Plain:
        def __init__(self):
            self.callback_handler = types.SimpleNamespace(callbacks=[other() for other in others])

    peak = {"reserved": 0, "allocated": 0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: peak["reserved"] * vqa.GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak["allocated"] * vqa.GIB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.update(reserved=16, allocated=15))
    monkeypatch.setattr(train_speed, "synchronize", lambda: None)
    clock = train_speed.Clock(1, None)
    trainer = train_speed.counting(Plain, clock)()
    callbacks = trainer.callback_handler.callbacks
    for number, reserved in enumerate((40, 30, 38, 34), 1):
        for callback in callbacks:
            callback.on_step_begin(None, None, None)
        peak.update(reserved=max(reserved, peak["reserved"]), allocated=max(reserved - 2, peak["allocated"]))
        trainer.counted = {"tokens": 20, "samples": 2, "waited": 0.0}
        for callback in callbacks:
            callback.on_step_end(None, types.SimpleNamespace(global_step=number, max_steps=4), None)
    figures = clock.figures()
    assert (figures["peak_gib"], figures["peak_allocated_gib"]) == (38, 36)  # the first step, of 40, warms up
    assert [callback.gib for callback in callbacks[1:]] == [{"training": 40}] * len(others)


@pytest.mark.slow
def test_the_benchmark_trains_both_designs_on_a_cpu(tiny, tmp_path):
    output = tmp_path / "speed.json"
    train_speed.main(
        [
            *("--model_name_or_path", str(tiny), "--data_path", str(FIXTURES / "smoke.jsonl")),
            *("--frames_dir", str(FIXTURES / "frames"), "--audio_dir", str(FIXTURES / "audio")),
            *("--designs", "seed", "--design", "every2=--gradient_accumulation_steps 2 --checkpoint_every_n 2"),
            *(f"--design={name}=--cache_features {tmp_path / 'features'}" for name in ("kept", "again")),
            *("--rows", "8", "--steps", "3", "--warmup", "1", "--output", str(output)),
            *("--flags", "--max_image_size 56 --dataloader_num_workers 0 --per_device_train_batch_size 2"),
        ]
    )
    report = json.loads(output.read_text())
    seed, ours, kept, again = report["results"]
    assert kept["first_epoch_samples_per_second"] < kept["samples_per_second"]
    assert again["seconds_filling"] > 0 and "first_epoch_samples_per_second" not in again  # nothing was encoded
    assert any((tmp_path / "features").iterdir()) and "seconds_filling" not in ours
    assert report["ceiling_tflops"] > 0 and report["machine"]["versions"]["torch"] == torch.__version__
    assert [seed["design"], ours["design"]] == ["seed", "every2"]
    assert [seed["rule"], ours["rule"]] == ["6 N T", "5 N T"]  # one of two layers is recomputed
    assert [seed["every_n"], ours["every_n"]] == [1, 2]
    for result in (seed, ours):
        assert result["steps"] == 2  # of 3, the first is not counted
        assert result["tokens_per_second"] == pytest.approx(result["samples_per_second"] * result["tokens_per_sample"])
        assert 0 <= result["waiting_for_data"] < 1 and len(result["ram_mib"]) == 2
