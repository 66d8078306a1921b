"""--load_in_4bit on a base of 16 bits: what is quantised, and that it trains, answers and merges as the base does."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import merge_stage2_to_bf16 as merge
import train_vqa as vqa
from tests.conftest import ROOT, SIX_STEPS, last_logits, refusal, same_tensors, stir, weights_of
from tests.test_end_to_end import run_script

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes, an optional package, is not installed"
)
LAYERS = 14  # seven a layer, in two layers
FOUR_BITS = ("--load_in_4bit", "True")


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture()
def kept(fresh):
    return fresh(load_in_4bit=True)


@needs_bitsandbytes
def test_the_decoder_alone_is_quantised_to_nf4(kept, base, batch):
    """A value is off by at most the half of NF4's widest gap, 0.152, of the largest in its block of 64, whose scale
    double quantisation changes a little; on average by much less, which fp4, or a block of another size, is not."""
    from bitsandbytes.functional import dequantize_4bit

    wanted, packed = dict(base.named_parameters()), 0
    for name, p in kept.named_parameters():
        if not hasattr(p, "quant_state"):
            assert torch.equal(p, wanted[name]), name
            continue
        packed += 1
        state = p.quant_state
        assert (state.quant_type, state.blocksize, state.nested, p.dtype) == ("nf4", 64, True, torch.uint8)
        blocks = wanted[name].reshape(-1, 64)
        largest = blocks.abs().amax(1, keepdim=True)
        off = (dequantize_4bit(p.data, state).reshape(-1, 64) - blocks).abs() / largest
        assert off.max() < 0.17 and off.mean() < 0.04, name
    assert packed == LAYERS
    assert vqa.fingerprint(kept) == vqa.fingerprint(base)  # in 4 bits it is still the same base
    found, exact = last_logits(kept, batch), last_logits(base, batch)
    # 0.62 of the norm in this model of large random weights; logits of other weights are 1.4 away.
    assert 0.01 * exact.norm() < (found - exact).norm() < 0.8 * exact.norm()


@needs_bitsandbytes
def test_the_gradient_is_that_of_the_dequantised_weights(kept, fresh, batch):
    """Also after an evaluation, in which some versions pack the weights anew."""
    last_logits(kept, batch)
    plain = fresh(load_in_4bit=True)
    vqa.dequantise(plain, torch.float32)
    gradients = []
    for model in (kept, plain):
        trained = stir(vqa.add_lora(model, r=4, dropout=0.0)).train()
        trained(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in trained.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 2 * LAYERS + 1
    for name, exact in gradients[1].items():
        assert (gradients[0][name] - exact).norm() <= 0.02 * exact.norm(), name


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory):
    """Six steps in 4 bits: undisturbed, and from a checkpoint after the second on."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("four")
    small = ("--max_train_frames", "1", "--audio_tokens", "speech", "--save_steps", "2")
    assert train(folder / "straight", *SIX_STEPS, *small, *FOUR_BITS) == 0
    checkpoint = folder / "straight" / "checkpoint-2"
    go_on = ("--resume_from_checkpoint", checkpoint, "--save_strategy", "no")
    assert train(folder / "resumed", *SIX_STEPS, *small, *FOUR_BITS, *go_on) == 0
    assert train(folder / "sixteen", *SIX_STEPS, *small) == 0
    return SimpleNamespace(**{name: folder / name for name in ("straight", "resumed", "sixteen")})


@needs_bitsandbytes
def test_a_run_in_4_bits_goes_on_as_if_undisturbed_and_has_the_losses_of_16_bits(runs):
    assert same_tensors(weights_of(runs.resumed), weights_of(runs.straight))
    model = vqa.load_settings(runs.straight)["model"]
    sixteen = vqa.load_settings(runs.sixteen)["model"]
    assert (model["load_in_4bit"], model["base_fingerprint"]) == (True, sixteen["base_fingerprint"])
    one, other = losses(runs.straight), losses(runs.sixteen)
    assert one != other and sum(one) == pytest.approx(sum(other), rel=0.05)
    assert one[-1] < one[0]


@needs_bitsandbytes
def test_evaluation_repeats_the_4_bits_and_can_change_them(runs, evaluate):
    """An adapter of either kind may be asked in 4 and in 16 bits: the base is known as the same."""
    for checkpoint, flags, bits, merged in (
        (runs.straight, (), True, False),
        (runs.straight, ("--load_in_4bit", "False"), False, True),
        (runs.sixteen, ("--load_in_4bit",), True, False),
    ):
        result = evaluate("--overwrite", "--limit", 2, *flags, checkpoint=checkpoint)
        assert result.status == 0 and ("quantised to 4 bits" in result.out) == bits
        said = result.summary["manifest"]["model"]
        assert (said["load_in_4bit"], said["adapter_merged"]) == (bits, merged)
    mixed = evaluate("--limit", 3, checkpoint=runs.sixteen)  # into rows that were answered in 4 bits
    assert mixed.status == 2 and "load_in_4bit (True then, None now)" in mixed.err


@needs_bitsandbytes
def test_merging_takes_the_dequantised_weights_and_says_so(runs, tiny, tmp_path, batch, capsys):
    output = tmp_path / "merged"
    flags = ["--stage1_model_path", tiny, "--stage2_adapter_path", runs.straight, "--output_path", output]
    assert merge.main([str(flag) for flag in (*flags, "--dtype", "float32")]) == 0
    assert "in 4 bits and goes into those weights, dequantised" in capsys.readouterr().out
    in_memory, merged = vqa.load_trained(runs.straight), vqa.load_trained(output)
    assert not merged.settings["model"]["load_in_4bit"]
    found, wanted = (last_logits(trained.model, batch) for trained in (merged, in_memory))
    assert (found - wanted).norm() < 1e-3 * wanted.norm()


@needs_bitsandbytes
def test_the_estimate_of_memory_counts_4_bits(fresh, tiny, tokenizer):
    """Half a byte a weight and 1/64 for its scale, on the meta device as of the real layers."""
    found = []
    for four, device in ((True, "meta"), (True, "cpu"), (False, "cpu")):
        model = fresh(load_in_4bit=four, device=device, dtype=torch.bfloat16)
        with torch.device(device):
            vqa.add_lora(model, r=4)
        args = SimpleNamespace(num_gpus=1, **vars(vqa.ModelArguments(load_in_4bit=four, lora_r=4)))
        found.append(vqa.estimate_memory(model, 100, args, torch.bfloat16, False, 1)["weights"])
    linear = sum(p.numel() for name, p in model.named_parameters() if ".base_layer.weight" in name)
    assert found[0] == found[1]
    assert found[2] - found[0] == pytest.approx((2 - 0.5 - 1 / 64) * linear, rel=1e-3)


@pytest.mark.slow
@needs_bitsandbytes
def test_in_4_bits_the_five_rows_are_learned_as_in_16(warm, tmp_path):
    """The run of test_end_to_end.py, which in 16 bits ends with the same line; speech alone, which is quicker."""
    flags = ("--smoke", *FOUR_BITS, "--audio_tokens", "speech")
    printed = run_script(ROOT / "train_with_eval_FINAL.sh", *flags, folder=tmp_path, PYTHON=warm)
    assert "14 quantised to 4 bits" in printed
    assert printed.splitlines()[-1] == "smoke: 5/5 correct, 5/5 stopped by themselves"


def test_without_bitsandbytes_or_with_one_not_tested_the_flag_says_what_to_install(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert (
        "--load_in_4bit" in (message := refusal(fresh, load_in_4bit=True)) and "pip install 'bitsandbytes>=" in message
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    monkeypatch.setattr(vqa, "BITSANDBYTES", "bitsandbytes>=99")
    message = refusal(fresh, load_in_4bit=True)
    assert len(message.splitlines()) == 1 and "pip install 'bitsandbytes>=99'" in message


@needs_bitsandbytes
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there it works")
def test_an_optimizer_of_bitsandbytes_is_refused_on_a_cpu(train, tmp_path, no_weights):
    assert "--optim adamw_bnb_8bit" in refusal(train, tmp_path / "out", "--optim", "adamw_bnb_8bit")
