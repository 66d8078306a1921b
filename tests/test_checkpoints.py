"""Checkpoints as people hold them: four layouts loaded completely or refused by name, adapters under several names, and
the merge. The tensors written are those of the tiny model, so that every one can be compared after loading."""

import importlib.util
import json
import math
import re
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import merge_stage2_to_bf16 as merge
import train_vqa as vqa
from benchmarks import checkpoint_roundtrip
from benchmarks.checkpoint_roundtrip import old_name as old_key
from tests.conftest import FULL_SIZE, TINY, edit_json, last_logits, refusal, same_tensors, small_disk, weights_of
from tests.faults import interrupted

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes, an optional package, is not installed"
)
UP = "model.layers.{}.mlp.up_proj.weight"  # [128, 64]: 8192 values, 128 blocks of 64


def write_model(source, folder, tensors, shards=1):
    """A model folder: config.json and tokenizer of `source`, `tensors` in one file or more."""
    shutil.copytree(source, folder)
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {key: f"model-{i % shards}.safetensors" for i, key in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({key: tensors[key] for key, where in weight_map.items() if where == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def pack(tensors, key, quantise=None):
    """Replace a weight by bitsandbytes' seven tensors for it: real ones from `quantise`, else of the right shapes."""
    weight = tensors.pop(key)
    if quantise is not None:
        packed, state = quantise(weight.detach().to(torch.bfloat16), quant_type="nf4", compress_statistics=True)
        tensors[key] = packed
        tensors.update({f"{key}.{name}": tensor for name, tensor in state.as_dict(packed=True).items()})
        return packed, state
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0}
    blocks = math.ceil(weight.numel() / 64)
    tensors[key] = torch.zeros(math.ceil(weight.numel() / 2), 1, dtype=torch.uint8)
    tensors[f"{key}.absmax"] = torch.zeros(blocks, dtype=torch.uint8)
    tensors[f"{key}.quant_map"] = torch.zeros(16)
    tensors[f"{key}.nested_absmax"] = torch.zeros(math.ceil(blocks / 256))
    tensors[f"{key}.nested_quant_map"] = torch.zeros(256)
    blob = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"{key}.quant_state.bitsandbytes__nf4"] = blob


class Checkpoint:
    """One layout on disk: a, as transformers 4.47 wrote it; b, our own save; c, a plain Qwen2-VL and a Whisper; d, in
    4 bits. `write(change)` spoils the tensors, `load()` loads them."""

    def __init__(self, layout, source, folder, base, tokenizer):
        self.layout, self.source, self.folder, self.tokenizer = layout, source, folder / "model", tokenizer
        named = dict(base.named_parameters())
        self.tensors = {(name if layout == "b" else old_key(name)): tensor for name, tensor in named.items()}
        self.options = {}
        if layout == "c":
            hears = [key for key in self.tensors if key.startswith("audio_encoder.")]
            self.whisper = {key.replace("audio_encoder.", "model.encoder."): self.tensors.pop(key) for key in hears}
            self.whisper["model.decoder.layer_norm.weight"] = self.whisper["proj_out.weight"] = torch.zeros(3)
            del self.tensors["audio_projector.weight"]
            self.options = {"audio_encoder": folder / "whisper"}
        if layout == "d":
            for layer in range(2):
                pack(self.tensors, UP.format(layer))

    def write(self, change=lambda tensors: None, of_whisper=False):
        """Write the folder (and the Whisper's) with `change` applied to the tensors of one of them."""
        change(self.whisper if of_whisper else self.tensors)
        write_model(self.source, self.folder, self.tensors, {"a": 2, "c": 2}.get(self.layout, 1))
        if self.layout == "c":
            config = json.loads((self.folder / "config.json").read_text())
            audio = config.pop("audio_config")  # which a plain Qwen2-VL does not have
            (self.folder / "config.json").write_text(json.dumps(config))
            audio |= {"decoder_layers": 1, "decoder_ffn_dim": 4, "decoder_attention_heads": 1, "vocab_size": 3}
            audio |= {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "decoder_start")}
            self.options["audio_encoder"].mkdir()
            (self.options["audio_encoder"] / "config.json").write_text(json.dumps(audio))
            whisper = {key: tensor.detach().clone() for key, tensor in self.whisper.items()}
            save_file(whisper, self.options["audio_encoder"] / "model.safetensors")
        return self

    def load(self, **options):
        """Load it in float32 unless told otherwise."""
        return vqa.load_model(self.folder, self.tokenizer, **{"dtype": torch.float32, **self.options, **options})


@pytest.fixture()
def stored(tiny, base, tokenizer, tmp_path):
    """Makes a `Checkpoint` of the given layout from the base's tensors."""
    return lambda layout: Checkpoint(layout, tiny, tmp_path, base, tokenizer)


# Products of equal weights may round otherwise where the weights lie at other addresses: a CPU without AVX-512 does so.
assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def assert_same(model, base, but=()):
    """Weights and, where there are such, buffers are the same bit for bit."""
    for found, wanted in (
        (model.named_parameters(), base.named_parameters()),
        (model.named_buffers(), base.named_buffers()),
    ):
        found, wanted = dict(found), dict(wanted)
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if name not in but and not torch.equal(found[name], wanted[name])] == []


# ------------------------------------------------------------------------------------------------- loading each layout


@pytest.mark.parametrize("layout", ["a", "b"])
def test_old_and_own_layout_are_loaded_bit_for_bit(stored, base, batch, capsys, layout):
    held = stored(layout).write()
    if layout == "a":
        assert {"model.norm.weight", "visual.merger.mlp.0.bias"} <= set(held.tensors)  # transformers 4's names
    model = held.load()
    assert_same(model, base)
    assert_close(last_logits(model, batch), last_logits(base, batch))
    assert f"96 tensors from {held.folder}" in capsys.readouterr().out
    assert vqa.fingerprint(model) == vqa.fingerprint(held.load(dtype=torch.bfloat16)) == vqa.fingerprint(base)
    model.config.text_config.num_attention_heads = 2  # another config, or another value, is another base
    assert vqa.fingerprint(model) != vqa.fingerprint(base)
    model.config.text_config.num_attention_heads = 4
    model.model.language_model.norm.weight.data[0] += 0.1
    assert vqa.fingerprint(model) != vqa.fingerprint(base)


def test_a_copy_that_does_not_describe_its_whisper_has_whisper_large_v3_turbo(tmp_path):
    shutil.copytree(FULL_SIZE, tmp_path / "model")
    config = json.loads((FULL_SIZE / "config.json").read_text())
    del config["audio_config"]
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    tokenizer = vqa.load_tokenizer(FULL_SIZE)
    found, wanted = (
        vqa.load_model(folder, tokenizer, init="random", device="meta").audio_encoder
        for folder in (tmp_path / "model", FULL_SIZE)
    )
    assert (found.config.d_model, found.config.encoder_layers, found.config.num_mel_bins) == (1280, 32, 128)
    shapes = [{name: p.shape for name, p in encoder.named_parameters()} for encoder in (found, wanted)]
    assert shapes[0] == shapes[1]
    for name in ("encoder_attention_heads", "max_source_positions", "activation_function", "scale_embedding"):
        assert getattr(found.config, name) == getattr(wanted.config, name), name


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_c_a_whisper_is_grafted_and_the_projector_said_to_be_untrained(stored, base, capsys, prefix):
    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace("model.", prefix, 1)] = tensors.pop(key)

    held = stored("c").write(rename, of_whisper=True)
    model = held.load(seed=7)
    assert_same(model, base, but=["audio_projector.weight"])
    out = capsys.readouterr().out
    assert f"58 tensors from {held.folder}" in out and str(held.options["audio_encoder"]) in out
    assert "audio_projector is UNTRAINED: drawn from seed 7" in out
    drawn = model.audio_projector.weight
    assert abs(drawn.std().item() - 0.4) < 0.02  # the config's initializer_range
    assert torch.equal(held.load(seed=7).audio_projector.weight, drawn)
    assert not torch.equal(held.load(seed=8).audio_projector.weight, drawn)


def test_c_what_lacks_or_is_no_whisper_is_refused(stored, tiny, base, tokenizer, tmp_path):
    held = stored("c").write()
    message = refusal(held.load, audio_encoder=None)
    assert "audio_encoder" in message and "--audio_encoder openai/whisper" in message
    assert "--audio_encoder" in (message := refusal(held.load, audio_encoder=TINY)) and "'qwen2_vl'" in message
    hears = write_model(tiny, tmp_path / "hears", dict(base.named_parameters()))
    message = refusal(vqa.load_model, hears, tokenizer, audio_encoder=held.options["audio_encoder"])
    assert str(hears) in message and "--audio_encoder" in message  # one that hears takes no second Whisper


def test_a_folder_without_weights_is_refused(tokenizer):
    assert "tiny_model/model.safetensors" in refusal(vqa.load_model, TINY, tokenizer, dtype=torch.float32)


def test_how_a_folder_says_that_text_is_generated_is_left_aside(stored):
    """Answers are greedy, whatever penalty of repetition a generation_config.json asks for."""
    held = stored("a").write()
    (held.folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5}))
    assert held.load().generation_config.repetition_penalty in (None, 1.0)


def test_full_vocabulary_with_the_real_ids_is_kept_and_merged(tiny, base, tmp_path):
    """A config of 152,064 rows, and a tokenizer of 151,660 entries without holes."""
    checkpoint_roundtrip.fill_vocabulary(FULL_SIZE, tmp_path / "source")
    config = json.loads((tiny / "config.json").read_text())
    config = {key: value + 151163 if key.endswith("token_id") else value for key, value in config.items()}
    (tmp_path / "source/config.json").write_text(json.dumps({**config, "vocab_size": 152064}))
    rows = torch.randn(152064, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tensors = {old_key(name): tensor.to(torch.bfloat16) for name, tensor in base.named_parameters()}
    tensors |= {"model.embed_tokens.weight": rows, "lm_head.weight": -rows}
    held = write_model(tmp_path / "source", tmp_path / "stored", tensors, 3)
    assert merge.main(["--stage1_model_path", str(held), "--output_path", str(tmp_path / "out")]) == 0
    for folder in (held, tmp_path / "out"):
        tokenizer = vqa.load_tokenizer(folder)
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|audio_pad|>", "<|pad|>"]
        assert tokenizer.convert_tokens_to_ids(names) == [151643, 151644, 151645, 151655, 151657, 151660]
        model = vqa.load_model(folder, tokenizer)
        found = {old_key(name): p for name, p in model.named_parameters()}
        assert same_tensors(found, tensors) and {p.dtype for p in found.values()} == {torch.bfloat16}
        assert model.generation_config.eos_token_id == [151643, 151645]


# ------------------------------------------------------------------------------------------------------ 4-bit weights


@pytest.fixture()
def four_bit(stored, base):
    """Layout d with every decoder layer and the projector in real 4 bits, and the values they stand for."""
    bnb = pytest.importorskip("bitsandbytes")
    held, wanted = stored("a"), {}
    held.layout, names = "d", {old_key(name): name for name, _ in base.named_parameters()}
    for key in list(held.tensors):
        if re.fullmatch(r"model\.layers\..*_proj\.weight|audio_projector\.weight", key):
            wanted[names[key]] = bnb.functional.dequantize_4bit(*pack(held.tensors, key, bnb.functional.quantize_4bit))
    return held.write(), wanted


@needs_bitsandbytes
def test_d_is_dequantised(four_bit, base, capsys):
    held, wanted = four_bit
    model = held.load(dtype=torch.bfloat16)
    assert len(wanted) == 15 and "15 weights in 4 bits" in capsys.readouterr().out
    assert not any(module.__class__.__name__ == "Linear4bit" for module in model.modules())
    for name, p in model.named_parameters():
        assert torch.equal(p, wanted.get(name, dict(base.named_parameters())[name].to(torch.bfloat16))), name


@needs_bitsandbytes
def test_d_is_kept_in_4_bits_and_trained(four_bit, batch, capsys):
    held, _ = four_bit
    kept, dequantised = held.load(load_in_4bit=True), held.load()
    assert "15 weights in 4 bits" in capsys.readouterr().out
    assert type(kept.audio_projector) is torch.nn.Linear  # only the decoder is kept so
    layer = kept.model.language_model.layers[1].mlp.up_proj
    assert (type(layer).__name__, layer.weight.dtype) == ("Linear4bit", torch.uint8)
    assert vqa.fingerprint(kept) == vqa.fingerprint(dequantised)
    as_kept, as_dequantised = last_logits(kept, batch), last_logits(dequantised, batch)
    assert (as_kept - as_dequantised).norm() < 0.05 * as_dequantised.norm()  # bitsandbytes computes in bf16 here
    peft_model = vqa.add_lora(kept, r=4).train()
    peft_model(**batch).loss.backward()
    moved = [name for name, p in peft_model.named_parameters() if p.grad is not None and p.grad.any()]
    assert len(moved) == 14 + 1  # lora_B of every layer, and the projector


def test_d_without_bitsandbytes_says_what_to_install(stored, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert re.search("pip install .*bitsandbytes", refusal(stored("d").write().load))


# ----------------------------------------------------------------------------------------------- refused by their name


def drop(key):
    return lambda tensors: tensors.pop(key)


def add(key, *shape):
    return lambda tensors: tensors.update({key: torch.zeros(shape or 2)})


def reshape(key, *shape):
    return lambda tensors: tensors.update({key: torch.zeros(shape, dtype=tensors[key].dtype)})


PACKED, STATE = UP.format(0), UP.format(0) + ".quant_state.bitsandbytes__nf4"
SPOILED = {
    "a": [
        (drop(UP.format(1)), r"model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        (drop("visual.merger.mlp.0.bias"), r"visual\.merger\.mlp\.0\.bias is missing"),
        (drop("audio_encoder.conv1.weight"), r"audio_encoder\.conv1\.weight is missing"),
        (drop("audio_projector.weight"), r"audio_projector\.weight is missing"),
        (add(UP.format(2)), r"unexpected tensor model\.layers\.2\.mlp\.up_proj\.weight"),
        (add("base_model.model.x.lora_A.weight"), "unexpected .*lora_A.*\n.*adapter among"),
        (add(PACKED + ".SCB"), r"unexpected .*\.SCB\n.*16-bit copy"),
        (reshape("audio_encoder.conv1.weight", 65, 128, 3), r"audio_encoder\.conv1\.weight has shape \(65, 128, 3\)"),
        (reshape("audio_encoder.layers.0.fc1.weight", 120, 64), r"layers\.0\.fc1\.weight has shape \(120, 64\)"),
        (reshape("model.norm.weight", 65), r"model\.norm\.weight has shape \(65,\).*\(64,\)"),
    ],
    "b": [
        (drop("model.language_model.norm.weight"), r"model\.language_model\.norm\.weight is missing"),
        (add("audio_projector.bias"), r"unexpected tensor audio_projector\.bias"),
        (reshape("audio_encoder.conv1.weight", 64, 80, 3), r"conv1\.weight has shape \(64, 80, 3\)"),
    ],
    "c": [
        (drop("model.embed_tokens.weight"), r"model\.embed_tokens\.weight is missing"),
        (add("visual.extra"), r"unexpected tensor visual\.extra"),
        (reshape("lm_head.weight", 500, 64), r"lm_head\.weight has shape \(500, 64\).*\(512, 64\)"),
    ],
    "whisper": [
        (drop("model.encoder.layer_norm.weight"), r"whisper: .*encoder\.layer_norm\.weight is missing"),
        (add("model.encoder.extra"), r"unexpected tensor .*encoder\.extra"),
        (reshape("model.encoder.conv1.bias", 65), r"encoder\.conv1\.bias has shape \(65,\)"),
    ],
    "d": [
        *((drop(key), "up_proj") for key in (PACKED, PACKED + ".absmax", PACKED + ".nested_absmax", STATE)),
        (add(PACKED.replace("up", "gate") + ".absmax"), r"layers\.0\.mlp\.gate_proj\.weight"),
        (add("extra"), "unexpected tensor extra"),
        *((reshape(*case), "up_proj") for case in ((PACKED, 4095, 1), (PACKED + ".absmax", 127), (STATE, 9))),
    ],
}


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        pytest.param(layout, change, r"layers\.0\.mlp\.up_proj\.weight" if message == "up_proj" else message,
                     marks=[needs_bitsandbytes] if layout == "d" else [])
        for layout, cases in SPOILED.items()
        for change, message in cases
    ],
)  # fmt: skip
def test_a_spoiled_checkpoint_is_refused_by_the_name_of_its_tensor(stored, layout, change, message):
    held = stored(layout[0] if layout != "whisper" else "c").write(change, of_whisper=layout == "whisper")
    assert re.search(message, refusal(held.load))
    if layout in "abc":
        assert re.search(message, refusal(held.load, device="meta"))  # --dry_run finds it too


def test_misfits_are_counted_and_explained(stored):
    def change(tensors):
        for key in [key for key in tensors if key.startswith("model.layers.1.")]:
            del tensors[key]

    *_, count, kinds = refusal(stored("a").write(change).load).splitlines()
    assert count.startswith("12 problems") and kinds.startswith("12 missing, 0 unexpected, 0 mis-shaped of ")


@pytest.mark.parametrize("where", ["another name", "another file"])
def test_a_tensor_that_is_there_twice_is_refused(stored, where):
    held = stored("a").write()
    files = [held.folder / f"model-{i}.safetensors" for i in range(2)]
    key = "model.language_model.norm.weight" if where == "another name" else "model.norm.weight"
    for file in files if where == "another file" else files[:1]:
        save_file({**load_file(file), key: torch.ones(64)}, file)
    assert "norm.weight" in refusal(held.load)


@pytest.mark.parametrize("kept", [0, 4, 1000])
def test_a_torn_file_is_refused(stored, checkpoint, fresh, kept):
    held = stored("a").write()
    files = [held.folder / "model-1.safetensors", checkpoint / "adapter_model.safetensors"]
    for file, load in zip(files, (held.load, lambda: vqa.load_adapter(fresh(), checkpoint)), strict=True):
        file.write_bytes(file.read_bytes()[:kept])
        assert str(file) in refusal(load)
    (held.folder / "model.safetensors.index.json").unlink()
    assert re.search(r"model\.safetensors.* index", refusal(held.load))  # shards without their index
    for file in held.folder.glob("model*"):
        file.unlink()
    (held.folder / "model.safetensors").write_bytes(b"torn"[:kept])
    assert re.search(r"model\.safetensors.*copy it again", refusal(held.load))


# -------------------------------------------------------------------------------------------- pickles, code and kernels


def test_pickles_are_refused_unless_allowed_and_never_run_code(stored, base, tmp_path):
    class Code:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    held = stored("a").write()
    for file in held.folder.glob("model*"):
        file.unlink()
    pickle = held.folder / "pytorch_model.bin"
    torch.save({key: tensor.detach() for key, tensor in held.tensors.items()}, pickle)
    assert "pytorch_model.bin" in (message := refusal(held.load)) and "--allow_pickle" in message
    assert_same(held.load(allow_pickle=True), base)
    torch.save({"model.norm.weight": Code()}, pickle)
    message = refusal(held.load, allow_pickle=True)
    assert str(held.folder) in message and "weights_only" not in message  # torch's advice would let it run
    assert not (tmp_path / "ran").exists()


def test_pickles_that_nobody_reads_are_ignored(stored, base):
    held = stored("b").write()
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        (held.folder / name).write_bytes(b"no pickle")
    assert_same(held.load(), base)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_asks_for_remote_code_is_refused(stored, file):
    held = stored("b").write()
    edit_json(held.folder / file, auto_map={"AutoModel": "evil.Model"})
    message = refusal(lambda: (vqa.load_tokenizer(held.folder), held.load()))
    assert str(held.folder / file) in message and "auto_map" in message


def test_another_quantisation_is_refused(stored):
    held = stored("b").write()
    edit_json(held.folder / "config.json", quantization_config={"quant_method": "gptq"})
    assert "quantization_config" in (message := refusal(held.load)) and "'gptq'" in message


@pytest.mark.parametrize("name", ["flash_attention_2", "someone/kernel"])
def test_attention_that_cannot_run_is_refused_before_anything_is_read(tokenizer, tmp_path, name):
    message = refusal(vqa.load_model, tmp_path / "nothing here", tokenizer, attn_implementation=name)
    named = ("pip install flash-attn",) if name.startswith("flash") else (name, "sdpa, eager, flash_attention_2")
    assert all(word in message for word in named)


def test_flash_attention_wants_16_bits(monkeypatch):
    monkeypatch.setattr(vqa, "is_flash_attn_2_available", lambda: True)
    vqa.check_attention("flash_attention_2", torch.bfloat16)
    assert "--bf16" in refusal(vqa.check_attention, "flash_attention_2", torch.float32)


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.fixture()
def changed(checkpoint):
    """Changes the tensors, config or settings of a copy of a trained adapter."""

    def make(tensors=lambda stored: None, config=None, settings=None):
        held = load_file(checkpoint / "adapter_model.safetensors")
        tensors(held)
        save_file(held, checkpoint / "adapter_model.safetensors")
        edit_json(checkpoint / "adapter_config.json", **(config or {}))
        edit_json(checkpoint / vqa.SETTINGS_FILE, model=settings or {})
        return checkpoint

    return make


PROJECTOR = "base_model.model.audio_projector.weight"
Q_PROJ = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


def test_an_adapter_holds_lora_and_projector_and_is_loaded_bit_for_bit(trained, fresh, base, batch):
    held = weights_of(trained)
    assert len(held) == 2 * 14 + 1 and {PROJECTOR, Q_PROJ} <= held.keys()
    loaded = vqa.load_adapter(fresh(), trained)
    found = {name.replace(".modules_to_save.default", "").replace(".default", ""): p
             for name, p in loaded.named_parameters() if ".original_module" not in name}  # fmt: skip
    assert same_tensors({name: found[name] for name in held}, held)
    assert vqa.fingerprint(loaded) == vqa.fingerprint(base)
    assert not torch.allclose(last_logits(loaded, batch), last_logits(base, batch), atol=0.1)


@pytest.mark.parametrize(
    "pattern",
    [
        (r"model\.language_model\.", "model."),
        (r"audio_projector\.weight", "audio_projector.modules_to_save.default.weight"),
        (r"(lora_[AB])\.weight", r"\1.default.weight"),
    ],
)
def test_an_adapter_under_other_names_is_the_same(trained, changed, pattern, fresh, batch):
    def rename(tensors):
        for key in list(tensors):
            tensors[re.sub(*pattern, key)] = tensors.pop(key)

    other = changed(rename)
    assert weights_of(other).keys() != weights_of(trained).keys()
    one, two = (last_logits(vqa.load_adapter(fresh(), folder), batch) for folder in (trained, other))
    assert torch.equal(one, two)


def zero_lora_b(tensors):
    """As before the first step."""
    tensors.update({key: torch.zeros_like(tensor) for key, tensor in tensors.items() if "lora_B" in key})


def adapt_whisper(tensors):
    """As target_modules=["q_proj", ...] makes PEFT do."""
    for side, shape in (("A", (4, 64)), ("B", (64, 4))):
        add(f"base_model.model.audio_encoder.layers.0.self_attn.q_proj.lora_{side}.weight", *shape)(tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": zero_lora_b}, "lora_B is zero"),
        ({"tensors": drop(Q_PROJ)}, r"layers\.0\.self_attn\.q_proj\.lora_A\.weight is missing"),
        ({"tensors": add(Q_PROJ.replace("q_proj", "x"))}, r"unexpected tensor .*self_attn\.x\.lora_A\.weight"),
        ({"tensors": drop(PROJECTOR)}, r"audio_projector\.weight is missing"),
        ({"tensors": reshape(PROJECTOR, 64, 32)}, r"audio_projector\.weight has shape \(64, 32\).*\(64, 64\)"),
        ({"tensors": adapt_whisper}, r"unexpected .*audio_encoder(.|\n)*2 unexpected(.|\n)*encoder"),
        ({"tensors": add(Q_PROJ.replace("language_model.", ""), 4, 64)}, r"q_proj\.lora_A\.weight"),  # there twice
        ({"tensors": lambda t: t[Q_PROJ].fill_(math.nan)}, r"q_proj\.lora_A\.weight.* not finite"),
        ({"config": {"r": 8}}, r"q_proj\.lora_A\.weight has shape \(4, 64\).*\(8, 64\)"),
        ({"config": {"use_rslora": True}}, "use_rslora"),
        ({"config": {"alpha_pattern": {"q_proj": 8}}}, "alpha_pattern.*q_proj"),
        ({"config": {"init_lora_weights": "pissa"}}, "init_lora_weights.*pissa"),
        ({"config": {"peft_type": "IA3"}}, "peft_type.*IA3"),
        ({"settings": {"base_fingerprint": "0" * 64}}, "another base .*fingerprint 0000000"),
    ],
)
def test_an_adapter_that_does_not_belong_is_refused_with_the_reason(changed, fresh, changes, message):
    assert re.search(message, refusal(vqa.load_adapter, fresh(), changed(**changes)))


def test_an_adapter_on_another_base_or_device_or_without_settings(changed, fresh, trained, tmp_path, capsys):
    assert "drawn from seed 1 in float32 on cpu" in refusal(vqa.load_adapter, fresh(seed=2), trained)
    folder = changed(settings={"init_device": "cuda"})
    assert "drawn on cuda" in refusal(vqa.load_trained, folder)
    (folder / vqa.SETTINGS_FILE).unlink()  # from elsewhere: it is said that no base was compared
    capsys.readouterr()
    vqa.load_adapter(fresh(), folder)
    out = capsys.readouterr().out
    assert str(folder) in out and vqa.SETTINGS_FILE in out
    assert str(tmp_path) in refusal(vqa.load_adapter, fresh(), tmp_path)  # no adapter there


def test_a_pickled_adapter_is_refused_unless_allowed(trained, checkpoint, fresh, batch):
    torch.save(weights_of(checkpoint), checkpoint / "adapter_model.bin")
    (checkpoint / "adapter_model.safetensors").unlink()
    assert "adapter_model.bin" in refusal(vqa.load_adapter, fresh(), checkpoint)
    loaded = vqa.load_adapter(fresh(), checkpoint, allow_pickle=True)
    assert torch.equal(last_logits(loaded, batch), last_logits(vqa.load_adapter(fresh(), trained), batch))


def test_rows_for_new_tokens_are_those_of_training_at_every_load(stored, changed, batch):
    """A base of 497 rows: `<|pad|>`, 497, gets a row of its own, which no file holds; those of old adapters do."""

    def shorten(tensors):
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[key] = tensors[key][:497]

    held = stored("a").write(shorten)
    edit_json(held.folder / "config.json", vocab_size=497)
    model = held.load()
    identity = vqa.fingerprint(model)
    assert model.get_input_embeddings().num_embeddings == 498
    model.get_input_embeddings().weight.data[497] = 1.0
    assert vqa.fingerprint(model) == identity  # the base is what was there before
    folder = changed(settings={"base_fingerprint": identity})
    zeros = {"embed_tokens": torch.zeros(1, 64), "lm_head": torch.zeros(1, 64)}
    save_file(zeros, folder / "new_token_rows.safetensors")
    one, two = (vqa.load_adapter(held.load(), folder) for _ in range(2))
    rows = one.get_input_embeddings().weight
    assert torch.equal(rows[497], rows[:497].mean(dim=0))
    assert torch.equal(rows, two.get_input_embeddings().weight)
    assert torch.equal(last_logits(one, batch), last_logits(two, batch))


# ---------------------------------------------------------------------------------------------- load_trained, and merge


def run_merge(adapter, output, *flags):
    """Merge on the CPU; the base is drawn again as the settings say."""
    base = vqa.load_settings(adapter)["model"]["model_name_or_path"]
    paths = ["--stage1_model_path", base, "--stage2_adapter_path", str(adapter), "--output_path", str(output)]
    return merge.main([*paths, "--device", "cpu", *flags])


@pytest.fixture(scope="module")
def merged(trained, tmp_path_factory):
    """The trained adapter merged in float32: (folder, what was printed)."""
    folder, printed = tmp_path_factory.mktemp("merged") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert run_merge(trained, folder, "--dtype", "float32") == 0
    return folder, "\n".join(printed)


def test_an_adapter_unmerged_or_merged_and_its_merge_on_disk_answer_alike(trained, merged):
    noise = np.random.default_rng(1).integers(0, 256, (2, 60, 90, 3), dtype=np.uint8)
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    asked = [Image.fromarray(pixels) for pixels in noise], tone.astype(np.float32)
    how = {"max_new_tokens": 6, "candidates": ["Yes.", "No."]}
    apart = vqa.load_trained(trained, merge=False)
    assert (apart.merged, apart.settings) == (False, vqa.load_settings(trained))
    assert apart.base_fingerprint == apart.settings["model"]["base_fingerprint"]
    assert apart.model.processor is apart.processor and not apart.model.training
    wanted = apart.model.answer(*asked, **how)
    inside = vqa.load_trained(trained)
    assert inside.merged and not any("lora_" in name for name, _ in inside.model.named_parameters())
    for other in (inside, vqa.load_trained(merged[0])):
        answer = other.model.answer(*asked, **how)
        assert (answer.text, answer.n_tokens, answer.stopped) == (wanted.text, wanted.n_tokens, wanted.stopped)
        assert answer.log_probs == pytest.approx(wanted.log_probs, rel=1e-4)


def test_settings_travel_with_what_was_trained_and_can_be_changed(checkpoint, tiny):
    stored = {"input_mode": "audio_text", "max_image_size": 84, "audio_tokens": "speech", "new_key": 1}
    edit_json(checkpoint / vqa.SETTINGS_FILE, input=stored)
    processor = vqa.load_trained(checkpoint).processor
    assert (processor.input_mode, processor.max_image_size, processor.audio_tokens) == ("audio_text", 84, "speech")
    processor = vqa.load_trained(checkpoint, max_image_size=56, input_mode="text").processor
    assert (processor.input_mode, processor.max_image_size, processor.audio_tokens) == ("text", 56, "speech")
    with pytest.raises(TypeError, match="frames_mode"):
        vqa.load_trained(tiny, frames_mode="video")


def test_a_base_alone_is_loaded_by_the_same_function(stored, base, batch):
    held = stored("b").write()
    alone = vqa.load_trained(held.folder)
    assert (alone.settings, alone.merged, alone.base_fingerprint) == ({}, False, vqa.fingerprint(base))
    assert alone.model.dtype == torch.float32  # on a CPU
    assert_same(alone.model, base)
    assert_close(last_logits(alone.model, batch), last_logits(base, batch))
    half = vqa.load_trained(held.folder, dtype=torch.bfloat16).model
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


def test_merged_float32_answers_as_the_live_adapter(trained, merged, fresh, base, batch):
    folder, printed = merged
    live = last_logits(vqa.load_adapter(fresh(), trained), batch)
    model = vqa.load_model(folder, vqa.load_tokenizer(folder), dtype=torch.float32)  # no other flag
    assert (last_logits(model, batch) - live).abs().max() <= 1e-5 * live.abs().max()
    names = "config.json generation_config.json model.safetensors preprocessor_config.json tokenizer.json "
    assert sorted(file.name for file in folder.iterdir()) == [
        *names.split(), "tokenizer_config.json", "training_digests.dat", "vqa_settings.json"
    ]  # fmt: skip
    assert weights_of(folder).keys() == {name for name, _ in base.named_parameters()}
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [480, 482]
    assert vqa.load_settings(folder)["model"]["base_fingerprint"] == vqa.fingerprint(model)
    assert "16 of 16 most likely tokens are the same" in printed


def test_merged_bf16_is_rounded_once_and_the_difference_explained(
    tiny, changed, tokenizer, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(vqa, "SHARD_BYTES", 100_000)
    base = vqa.load_model(tiny, tokenizer, init="random", seed=1)
    folder = changed(settings={"dtype": "bfloat16", "base_fingerprint": vqa.fingerprint(base)})
    assert run_merge(folder, tmp_path / "out") == 0
    assert re.search(r"Largest logit difference, .*: \S+, .* rounded to bf16", capsys.readouterr().out)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(files) > 5 and set(index["weight_map"].values()) == {file.name for file in files}
    merged = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    lora = load_file(folder / "adapter_model.safetensors")
    for name, p in base.named_parameters():
        key = "base_model.model." + name.removesuffix(".weight")
        if f"{key}.lora_A.weight" in lora:
            p = p.float() + 16 / 4 * lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"]
        elif f"base_model.model.{name}" == PROJECTOR:
            p = lora[PROJECTOR]
        assert torch.equal(merged[name], p.to(torch.bfloat16)), name


def test_without_an_adapter_the_layout_is_converted_bit_for_bit(stored, base, tokenizer, tmp_path):
    held = stored("a").write()
    flags = ["--stage1_model_path", str(held.folder), "--output_path", str(tmp_path / "new/out")]
    assert merge.main([*flags, "--dtype", "float32"]) == 0
    assert_same(vqa.load_model(tmp_path / "new/out", tokenizer, dtype=torch.float32), base)


def test_an_interrupted_merge_leaves_nothing_that_looks_finished(trained, tmp_path):
    """Stopped as each of its files begins; a killed process would leave a folder called `.incomplete`."""
    place, changes = tmp_path / "place", 1
    while not (place / "out").exists():
        place.mkdir(exist_ok=True)
        try:
            with interrupted(place, changes) as seen:
                run_merge(trained, place / "out", "--dtype", "float32")
        except KeyboardInterrupt:
            assert list(place.iterdir()) == []
            assert len(seen) > 1 or seen[0][0] == "os.mkdir"
        assert all(".incomplete" in path or path == str(place) for event, path in seen if event == "open")
        changes += max(1, len(seen) // 3)
    assert changes > 5 and vqa.load_trained(place / "out").model


def test_a_merge_that_reads_back_as_another_model_is_refused(trained, tmp_path, monkeypatch):
    """As a disk that turns bits would make it."""

    def save_spoiled(model, folder):
        tensors = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        tensors["model.language_model.norm.weight"][3] += 1
        save_file(tensors, folder / "model.safetensors")

    monkeypatch.setattr(vqa, "write_weights", save_spoiled)
    assert "another model" in refusal(run_merge, trained, tmp_path / "out", "--dtype", "float32")
    assert list(tmp_path.iterdir()) == []


def test_a_merge_is_refused_before_anything_is_written(trained, tmp_path):
    (tmp_path / "there").mkdir()
    assert str(tmp_path / "there") in refusal(run_merge, trained, tmp_path / "there")
    for device in ("foo", "cuda:99"):
        flags = ["--stage1_model_path", str(TINY), "--output_path", str(tmp_path / "out"), "--device", device]
        message = refusal(merge.main, flags)
        assert message.startswith(f"--device {device}: ") and "\n" not in message
    with small_disk(tmp_path / "disk", 64):
        (tmp_path / "disk/.out.1.incomplete").mkdir()
        message = refusal(run_merge, trained, tmp_path / "disk/out", "--dtype", "float32")
        assert "0.00 GB free" in message and "0.07 GB" in message and ".out.1.incomplete" in message
        assert [path.name for path in (tmp_path / "disk").iterdir()] == [".out.1.incomplete"]


@pytest.mark.slow
def test_the_benchmark_of_the_complete_way_runs(tmp_path, capsys):
    output = tmp_path / "measured.json"
    assert checkpoint_roundtrip.main(["--work_dir", str(tmp_path / "work"), "--tiny", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert len(result["phases"]) == 6 and len(result["generated_ids"]) >= 1
    assert "| phase | seconds | GB on disk |" in capsys.readouterr().out and not (tmp_path / "work").exists()
