"""What makes training faster must not change it: places known before, compiled layers, Liger, the choice of
recomputation, the estimate of memory; and the benchmark that measures them."""

import json
import math
import re
import shutil
import sys
import types
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_vqa as vqa
from tests.conftest import EVAL_DATA, MEDIA, PAD, TINY, TRAIN_DATA, edit_json, refusal, weights_of


@pytest.fixture(scope="module")
def batches(tokenizer, base, rows):
    """Two batches of two samples, of different length."""
    processor = vqa.VQAProcessor(tokenizer, base.config, max_image_size=56, audio_tokens="speech")
    long, short = (vqa.SurgicalVQADataset(rows, processor, max_train_frames=frames) for frames in (2, 1))
    return [vqa.VQACollator(PAD)([dataset[0], dataset[3]]) for dataset in (long, short)]


@pytest.fixture()
def adapted(fresh):
    """Builds a model with the same adapter each time."""

    def build(dtype=torch.float32, prepare=lambda model: None):
        model = fresh(dtype=dtype)
        prepare(model)
        torch.manual_seed(0)
        return vqa.add_lora(model, 4, 16, 0.0)

    return build


def losses_and_gradients(model, batches):
    """The loss of each batch, and the gradients of their sum by name."""
    model.train()
    losses = [model(**{k: v for k, v in batch.items() if k != "row_indices"}).loss for batch in batches]
    sum(losses).backward()
    return torch.stack(losses).detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_alike(one, other, **tolerance):
    """Losses and gradients are the same, up to a tolerance, and there are some."""
    (loss, gradients), (other_loss, others) = one, other
    assert torch.allclose(loss, other_loss, **tolerance) and gradients.keys() == others.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, others[name], **tolerance), name


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
        leaves = torch.utils._pytree.tree_leaves(args)
        by_mask = any(leaf.dtype == torch.bool for leaf in leaves if isinstance(leaf, torch.Tensor))
        if name in self.WAITING or (name.startswith("index") and by_mask):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("frame_mode", ["images", "video"])
def test_no_forward_or_backward_pass_of_training_waits_for_the_gpu(train, tmp_path, monkeypatch, frame_mode):
    """With features kept; where frames are encoded anew their sizes are read once a batch."""
    step, seen = vqa.VQATrainer.training_step, []

    def watched(self, model, inputs, *args):
        with Waits() as waits:
            loss = step(self, model, inputs, *args)
        seen.append(waits.seen)
        return loss

    monkeypatch.setattr(vqa.VQATrainer, "training_step", watched)
    flags = [
        "--max_steps",
        "2",
        "--save_strategy",
        "no",
        "--per_device_train_batch_size",
        "2",
        "--frame_mode",
        frame_mode,
    ]
    flags += ["--gradient_accumulation_steps", "2", "--cache_features", tmp_path / "cache"]
    assert train(tmp_path / "out", *flags) == 0
    assert seen == [[]] * 3  # five rows: two batches, then one


@pytest.mark.parametrize("encoders", [False, True])
def test_what_is_told_to_train_and_to_evaluate(fresh, encoders):
    """Again after an evaluation, and with what LoRA adds; frozen encoders are always in evaluation mode."""
    model = fresh().train()
    adapted = vqa.add_lora(model, 4, 16, 0.05, vision_tower=encoders, audio_encoder=encoders)
    for mode in (True, True, False, False, True, True):
        for name, module in adapted.train(mode).named_modules():
            frozen = ("visual" in name or "audio_encoder" in name) and not encoders
            assert module.training == (mode and not frozen), name


# ------------------------------------------------------------------------------------------------------ compiled layers


@pytest.mark.parametrize("every_n", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_compiled_layers_give_the_plain_loss_and_gradients_from_one_graph(adapted, batches, monkeypatch, every_n):
    def prepare(model, compiled):
        vqa.set_recomputation(model, every_n if compiled else 0)
        if compiled:
            vqa.compile_decoder(model)

    assert batches[0]["input_ids"].shape != batches[1]["input_ids"].shape
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (
        losses_and_gradients(adapted(prepare=partial(prepare, compiled=compiled)), batches)
        for compiled in (False, True)
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch._dynamo.utils.counters["aot_autograd"]["total"] == 1  # no second trace, which no cache would keep
    assert_alike(plain, compiled, atol=1e-5, rtol=1e-5)
    assert len(plain[1]) == 2 * 7 * 2 + 1  # 2 layers x 7 adapted matrices x A and B, and the projector's weight


@pytest.mark.parametrize("audio_tokens", ["full", "speech"])
def test_padding_to_a_multiple_leaves_loss_and_gradients(adapted, tokenizer, rows, audio_tokens):
    """In float64, where rounding (2e-5 of a gradient in float32, for sums in another order) hides nothing."""
    models = adapted().double(), adapted().double()
    processor = vqa.VQAProcessor(tokenizer, models[0].config, max_image_size=56, audio_tokens=audio_tokens)
    dataset = vqa.SurgicalVQADataset(rows, processor, max_train_frames=2)
    samples = [dataset[0], dataset[3]]
    for sample in samples:
        sample.update({name: values.double() for name, values in sample.items() if values.is_floating_point()})
    batch, padded = (vqa.VQACollator(PAD, multiple=multiple)(samples) for multiple in (1, 16))
    length, fill = batch["input_ids"].shape[1], {"input_ids": PAD, "labels": -100}
    assert length % 16 and padded["input_ids"].shape == (2, math.ceil(length / 16) * 16)
    assert padded.keys() == batch.keys() and "attention_mask" not in padded
    for name, values in batch.items():
        if name.endswith("_at"):  # the same tokens, each row of which begins elsewhere
            values = values // length * padded["input_ids"].shape[1] + values % length
        elif values.shape[-1] == length:
            assert (padded[name][..., length:] == fill.get(name, 0)).all(), name
        assert torch.equal(padded[name][..., : values.shape[-1]], values), name
    assert_alike(
        losses_and_gradients(models[0], [batch]), losses_and_gradients(models[1], [padded]), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_batches_of_training_and_evaluation_are_padded_where_layers_are_compiled(
    compiled, train, monkeypatch, tmp_path
):
    lengths, forward = {True: [], False: []}, vqa.SurgicalVQAModel.forward

    def recorded(self, *args, **kwargs):
        lengths[self.training].append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(vqa.SurgicalVQAModel, "forward", recorded)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(vqa, "check_compiler", lambda device: None)
    flags = [*EVAL_DATA[:2], "--max_steps", "2", "--audio_tokens", "speech", "--compile_layers", compiled]
    assert train(tmp_path / "out", *flags) == 0
    for phase in lengths.values():
        assert phase and any(length % 16 for length in phase) == (not compiled)


@pytest.mark.parametrize(("device", "language", "variable"), [("cpu", "c++", "CXX"), ("cuda", "c", "CC")])
def test_a_compiler_is_tried_on_a_program_with_pythons_headers(device, language, variable, monkeypatch, tmp_path):
    """As torch.compile will give it one. One that works passes; one that is broken is refused in one line."""
    compiler = tmp_path / "compiler"
    monkeypatch.setenv(variable, str(compiler))
    for program, fault in (
        (f'#!/bin/sh\necho "$@" > {tmp_path}/words\ncat > {tmp_path}/program\n', None),
        ("#!/bin/sh\necho cc1plus: cannot execute >&2\necho more >&2\nexit 1\n", "cc1plus: cannot execute"),
        ("#!/bin/sh\nexit 3\n", "exit status 3"),
        ("#!/no/such/shell\n", "No such file or directory"),
        ("#!/bin/sh\nprintf 'Python.h fehlt f\\374r cc\\n' >&2\nexit 1\n", "Python.h fehlt f\ufffdr cc"),
    ):
        compiler.write_text(program)
        compiler.chmod(0o755)
        if fault is None:
            vqa.check_compiler(device)
            continue
        message = refusal(vqa.check_compiler, device)
        assert message.startswith("--compile_layers: ") and "\n" not in message
        assert all(part in message for part in (str(compiler), fault, "python3-dev", variable))
    assert (tmp_path / "words").read_text().startswith(f"-x {language} - -I ")
    assert (tmp_path / "program").read_text().startswith("#include <Python.h>\n")


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


def build(fresh, train_decoder, dtype, dropout=0.0):
    """A tiny model as `train` builds it."""
    torch.manual_seed(0)  # for the same adapter
    model = fresh(dtype=torch.float32 if train_decoder == "full" else dtype)
    if train_decoder == "full":
        return vqa.train_fully(model, dtype) or model
    vqa.skip_input_casts(vqa.add_lora(model, 4, 16, dropout))
    return model


@pytest.mark.parametrize("every_n", [0, 1])
@pytest.mark.parametrize("train_decoder", vqa.DECODER_TRAINING)
def test_liger_computes_the_norms_and_mlps_of_one_model_alone(fresh, batches, liger, every_n, train_decoder):
    plain, changed = (build(fresh, train_decoder, torch.float32) for _ in range(2))
    for model in (plain, changed):
        vqa.set_recomputation(model, every_n)
    names = list(changed.state_dict())
    vqa.use_liger(changed)
    wanted = losses_and_gradients(plain, batches[:1])
    assert liger == []
    assert_alike(wanted, losses_and_gradients(changed, batches[:1]), atol=1e-5)
    # 2 norms in each of 2 layers, once more where they are recomputed, and the last norm; an MLP a layer
    assert (liger.count("norm"), liger.count("swiglu")) == ((5, 2) if every_n == 0 else (9, 4))
    assert list(changed.state_dict()) == names == list(plain.state_dict())


def test_a_decoder_without_swiglu_is_refused_before_weights_load(liger, no_weights, monkeypatch, tmp_path):
    """Its config is all that it takes, so a dry run, which loads none, says so too."""
    folder = shutil.copytree(TINY, tmp_path / "model")
    edit_json(folder / "config.json", hidden_act="gelu")
    monkeypatch.setattr(vqa, "check_liger", lambda *args, **kwargs: None)
    flags = [*TRAIN_DATA, "--model_name_or_path", str(folder), "--init", "random", "--use_liger_kernel", "True"]
    for mode in (["--dry_run"], ["--use_cpu", "True", "--output_dir", str(tmp_path / "out")]):
        message = refusal(vqa.main, [*flags, *mode])
        assert message.startswith("--use_liger_kernel ") and "'gelu'" in message


def test_liger_runs_in_training(liger, train, monkeypatch, tmp_path):
    monkeypatch.setattr(vqa, "check_liger", lambda *args, **kwargs: None)
    flags = ["--use_liger_kernel", "True", "--max_steps", "1", "--use_cpu", "True", "--checkpoint_every_n", "2"]
    assert train(tmp_path, *flags, "--gradient_accumulation_steps", "1", "--per_device_train_batch_size", "1") == 0
    assert (liger.count("norm"), liger.count("swiglu")) == (7, 3)  # layer 0 is recomputed
    assert vqa.load_settings(tmp_path)["trained"]["use_liger_kernel"] is True
    assert len(weights_of(tmp_path)) == 2 * 7 * 2 + 1  # nothing of it in the adapter


def test_a_liger_that_is_missing_or_too_old_is_refused_in_one_line(liger, argv, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.7.0")
    message = refusal(vqa.check_liger, "cuda")
    assert message.startswith("--use_liger_kernel: ") and "0.7.0" in message and "liger-kernel>=0.8" in message
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.8.0")
    vqa.check_liger("cuda")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    message = refusal(vqa.check_liger, "cuda")
    assert message.startswith("--use_liger_kernel: ") and "\n" not in message and "liger-kernel>=0.8" in message
    message = refusal(vqa.main, argv(tmp_path, "--dry_run", "--use_liger_kernel", "True"))
    assert message.startswith("--use_liger_kernel: ") and "pip install" in message  # not that there is no GPU


# ------------------------------------------------------------------------------------------------------ recomputation


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
    def layers_times_100_mib(every_n):
        """A faked estimate of 1 GiB and 100 MiB for each of 28 layers that is not recomputed."""
        recomputed = -(-28 // every_n) if every_n else 0
        return {"weights": 2**30, "activations": (28 - recomputed) * 100 * 2**20}

    args = vqa.ModelArguments(checkpoint_every_n="auto", gpu_memory_limit_gib=limit)
    assert vqa.choose_recomputation(args, layers_times_100_mib) == every_n
    assert f"--checkpoint_every_n auto takes {every_n}\n" in capsys.readouterr().out
    assert vqa.choose_recomputation(vqa.ModelArguments(checkpoint_every_n="3"), None) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--checkpoint_every_n auto", "--checkpoint_every_n auto .*--gpu_memory_limit_gib"),
        *((f"--dry_run --checkpoint_every_n {value}", "--checkpoint_every_n ") for value in ("x", "-1", "1.5", "all")),
        ("--compile_layers True", "--compile_layers: .*compiler.*g[+][+].* in CXX"),
        ("--use_liger_kernel True --use_cpu True", "--use_liger_kernel needs a CUDA GPU"),
        ("--dry_run --use_liger_kernel True --compile_layers True", "--use_liger_kernel: --compile_layers True"),
        ('--dry_run --liger-kernel-config={"rope":true}', "--liger_kernel_config: .*--use_liger_kernel"),
        ("--dry_run --gpu_memory_limit_gib -5", "--gpu_memory_limit_gib -5"),
    ],
)
def test_what_cannot_work_here_is_refused_before_weights_load(flags, message, train, no_weights, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    text = refusal(train, tmp_path / "out", *flags.split())
    assert re.match(message, text) and "\n" not in text


# ------------------------------------------------------------------------------------------------------ the estimate


def arguments(**settings):
    return SimpleNamespace(num_gpus=1, **vars(vqa.ModelArguments(lora_r=4, **settings)))


def test_estimate_of_a_case_done_by_hand(fresh):
    """Tiny: 2 layers, h = 64, f = 128, 2 of 4 heads for keys: k = 32; r = 4; bf16.

    A layer with dropout keeps per token 4 (2 h) = 512 bytes in float32, 2 (2 h + 2 k + 3 f + 7 r) = 1208 in bf16, and
    (2 + 1) (6 h + f) = 1536 of copies and masks: 3256. Without: 512 + 1208 + 2 (2 h + f) = 2232. Compiled:
    2 x 2 h + 2 (2 h + 2 k + 2 f + 7 r) = 1208. The backward pass of an MLP works with 6 f x 2 = 1536.
    """
    model = build(fresh, "lora", torch.bfloat16, dropout=0.05)

    def estimate(offload, every_n, **settings):
        args = arguments(**{"lora_dropout": 0.05, **settings})
        return vqa.estimate_memory(model, 10, args, torch.bfloat16, offload, every_n)

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    encoders = sum(p.numel() * 2 for m in (model.model.visual, model.audio_encoder) for p in m.parameters())
    # A: 4 x in, B: out x 4, of q, k, v, o (64 and 32 wide), gate, up and down, in 2 layers; and the projector
    adapters = 2 * 4 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 128))
    trained = adapters + sum(p.numel() for p in model.audio_projector.parameters() if p.requires_grad)
    of_training = {"weights": weights, "gradients and optimizer": 12 * trained + 2 * trained}
    assert estimate(False, 0) == {**of_training, "activations": 10 * (2 * 3256 + 1536)}
    assert estimate(True, 0)["weights"] == weights - encoders
    # every layer: its input, and the one that is recomputed; every 2nd: one of each, and the one that is recomputed
    assert estimate(False, 1)["activations"] == 10 * (2 * 128 + 3256 + 1536)
    assert estimate(False, 2)["activations"] == 10 * (3256 + 128 + 3256 + 1536)
    assert estimate(False, 0, compile_layers=True)["activations"] == 10 * (2 * 1208 + 1536)
    assert estimate(False, 0, lora_dropout=0.0)["activations"] == 10 * (2 * 2232 + 1536)


@pytest.mark.parametrize("train_decoder", vqa.DECODER_TRAINING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimate_counts_what_autograd_keeps_of_a_layer(fresh, train_decoder, dtype):
    """But for rotary tables, statistics of rows, and autocast's copies of weights."""
    model = build(fresh, train_decoder, dtype)
    vqa.set_recomputation(model, 0)
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
    args = arguments(train_decoder=train_decoder, lora_dropout=0.0)
    estimate = vqa.estimate_memory(model, 1, args, dtype, False, 0)["activations"]
    assert 0.9 < (estimate - 6 * 128 * dtype.itemsize) / 2 / measured <= 1.05


@pytest.mark.parametrize("compiled", [False, True])
def test_dry_run_prints_the_estimate_with_the_padding_of_compiled_layers(train, tmp_path, capsys, compiled):
    more = ("--per_device_train_batch_size", "400", "--compile_layers", compiled)
    assert train(tmp_path, "--dry_run", "--checkpoint_every_n", "0", "--max_train_frames", "1", *more) == 0
    out = capsys.readouterr().out
    longest = int(re.search(r"^train: 5 samples, tokens per sample: .* max (\d+)$", out, re.M)[1])
    assert longest % 16
    # in float32 with dropout, per token: 2 layers of 512 + 4 (2 h + 2 k + 3 f + 7 r) + 5 (6 h + f), and 6 f x 4;
    # compiled 2 layers of 4 x 2 h + 4 (2 h + 2 k + 2 f + 7 r)
    layer, longest = (
        (512 + 4 * 604 + 5 * 512, longest) if not compiled else (512 + 4 * 476, math.ceil(longest / 16) * 16)
    )
    gib = 400 * longest * (2 * layer + 3072) / 2**30
    found = re.search(r"^memory: about (\S+) GiB .*weights 0.0, .* activations (\S+)\)$", out, re.M)
    assert gib > 0.5 and found.groups() == (f"{gib:.1f}",) * 2


# ------------------------------------------------------------------------------------------------------ the benchmark


@pytest.mark.slow
def test_the_benchmark_of_training_measures_designs_and_one_that_fails_does_not_end_the_others(tiny, tmp_path, capsys):
    from benchmarks import train_speed

    output = tmp_path / "speed.json"
    flags = ["--model_name_or_path", str(tiny), "--data_path", EVAL_DATA[1], *MEDIA, "--output", str(output)]
    flags += ["--rows", "8", "--steps", "5", "--warmup", "1", "--one_process", "--profile", "--designs", "seed"]
    flags += ["--flags", "--max_image_size 56 --dataloader_num_workers 0 --per_device_train_batch_size 1"]
    for design in (
        "liger=--use_liger_kernel True --use_cpu True",
        "every2=@ones_mask --gradient_accumulation_steps 2 --checkpoint_every_n 2",
        f"kept=--cache_features {tmp_path / 'features'}",
    ):
        flags += ["--design", design]
    with pytest.raises(SystemExit, match="not measured, see above: liger"):
        train_speed.main(flags)
    report = json.loads(output.read_text())
    results = {result["design"]: result for result in report["results"]}
    assert "--use_liger_kernel needs a CUDA GPU" in results["liger"]["failed"]
    assert (results["seed"]["rule"], results["every2"]["rule"]) == ("6 N T", "5 N T")  # one of two is recomputed
    for result in (results["seed"], results["every2"]):
        assert len(result["step_seconds"]) == result["steps"] == 2  # of 5; one warms up, two belong to the profile
        assert result["tokens_per_second"] == pytest.approx(result["samples_per_second"] * result["tokens_per_sample"])
    assert any((tmp_path / "features").iterdir()) and report["ceiling_tflops"] > 0
    for every_n, factor in ((0, 4), (1, 6), (3, 4 + 2 * 10 / 28), (28, 4 + 2 / 28)):
        assert train_speed.flops_factor(28, every_n) == pytest.approx(factor)
    with pytest.raises(SystemExit):
        train_speed.main([*flags, "--design", "x=@tiger --lora_dropout 0"])
    assert "--design: @tiger" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("change", ["all_logits", "ones_mask", "kv_cache"])
def test_a_change_to_an_exact_lever_leaves_loss_and_gradients(adapted, rows, processor, change):
    from benchmarks.training_changes import CHANGES

    sample, models = vqa.SurgicalVQADataset(rows, processor)[0], (adapted(), adapted())
    wanted = losses_and_gradients(models[0], [vqa.VQACollator(PAD)([sample])])
    with CHANGES[change]():
        changed = vqa.VQACollator(PAD)([sample])
        assert_alike(wanted, losses_and_gradients(models[1], [changed]), atol=1e-5)
    assert ("attention_mask" in changed) == (change == "ones_mask")
    assert "attention_mask" not in vqa.VQACollator(PAD)([sample])  # gone again
