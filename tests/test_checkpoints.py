"""Checkpoints as people hold them: four layouts loaded whole or refused by name, adapters under two sets of names, and
the merge. The tensors written are those of the tiny model, so that every one can be compared after loading."""

import importlib.util
import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import merge_stage2_to_bf16 as merge
import train_vqa as vqa
from benchmarks import checkpoint_roundtrip
from benchmarks.checkpoint_roundtrip import old_name as old_key
from tests.conftest import FULL_SIZE, TINY

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes, an optional package, is not installed"
)
PACKED = "model.layers.0.mlp.up_proj.weight"  # [128, 64]: 8192 values, 128 blocks of 64


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On cores that others use too, two threads wait for each other at each of these small products: 40 x slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny model's folder with a Whisper that hears 2 s: 100 audio tokens make a forward pass quick."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    config["audio_config"]["max_source_positions"] = 100
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def base(tiny, tokenizer):
    """Its random weights, float32; tests must not change them."""
    return vqa.load_model(tiny, tokenizer, init="random", seed=1, dtype=torch.float32)


@pytest.fixture()
def fresh(tiny, tokenizer):
    """Builds a model of the test's own: same weights as `base`."""
    return lambda seed=1: vqa.load_model(tiny, tokenizer, init="random", seed=seed, dtype=torch.float32)


@pytest.fixture(scope="module")
def batch(base, tokenizer):
    """One prompt: two frames of noise and a tone."""
    base.processor = vqa.VQAProcessor(tokenizer, base.config)
    return merge.sample_inputs(base)


def write_model(source, folder, tensors, shards=1, config=None):
    """A model folder: config.json of `source` as `config` changes it, the tokenizer, `tensors` in one file or more."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        shutil.copy(file, folder)
    stored = json.loads((folder / "config.json").read_text())
    if config is not None:
        config(stored)
    (folder / "config.json").write_text(json.dumps(stored))
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {key: f"model-{i % shards}.safetensors" for i, key in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({key: tensors[key] for key, where in weight_map.items() if where == file}, folder / file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def deaf(config):
    """Leave out what a plain Qwen2-VL does not have."""
    del config["audio_config"]


def pack(tensors, key, quantise=None):
    """Replace a weight by bitsandbytes' seven tensors for it: real ones from `quantise`, else of the right shapes."""
    weight = tensors.pop(key)
    if quantise is not None:
        packed, state = quantise(weight.to(torch.bfloat16), quant_type="nf4", compress_statistics=True)
        tensors[key] = packed
        tensors.update({f"{key}.{name}": tensor for name, tensor in state.as_dict(packed=True).items()})
        return
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
    """One layout on disk: `load()` and, for the tests that spoil it, the tensors as written by `write(change)`."""

    def __init__(self, layout, source, folder, base, tokenizer):
        self.layout, self.source, self.folder, self.tokenizer = layout, source, folder, tokenizer
        named = dict(base.named_parameters())
        self.tensors = {(name if layout == "b" else old_key(name)): tensor for name, tensor in named.items()}
        self.options = {}
        if layout == "c":
            self.whisper = {
                key.replace("audio_encoder.", "model.encoder."): self.tensors.pop(key)
                for key in list(self.tensors)
                if key.startswith("audio_encoder.")
            }
            del self.tensors["audio_projector.weight"]
            self.whisper["model.decoder.layer_norm.weight"] = self.whisper["proj_out.weight"] = torch.zeros(3)
            self.options = {"audio_encoder": folder / "whisper"}
        if layout == "d":
            pack(self.tensors, PACKED)
            pack(self.tensors, PACKED.replace("layers.0", "layers.1"))

    def write(self, change=lambda tensors: None, of_whisper=False):
        """Write the folder (and the Whisper's) with `change` applied to the tensors of one of them."""
        change(self.whisper if of_whisper else self.tensors)
        shards, config = {"a": (2, None), "b": (1, None), "c": (2, deaf), "d": (1, None)}[self.layout]
        write_model(self.source, self.folder / "model", self.tensors, shards, config)
        if self.layout == "c":
            audio = json.loads((self.source / "config.json").read_text())["audio_config"]
            audio |= {"decoder_layers": 1, "decoder_ffn_dim": 4, "decoder_attention_heads": 1, "vocab_size": 3}
            audio |= {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "decoder_start")}
            (self.folder / "whisper").mkdir()
            (self.folder / "whisper/config.json").write_text(json.dumps(audio))
            save_file(
                {k: t.detach().clone() for k, t in self.whisper.items()}, self.folder / "whisper/model.safetensors"
            )
        return self

    def load(self, **options):
        """Load it in float32 unless told otherwise."""
        options = {"dtype": torch.float32, **self.options, **options}
        return vqa.load_model(self.folder / "model", self.tokenizer, **options)


@pytest.fixture()
def checkpoint(tiny, base, tokenizer, tmp_path):
    """Makes a `Checkpoint` of the given layout from the base's tensors."""
    return lambda layout: Checkpoint(layout, tiny, tmp_path, base, tokenizer)


def logits(model, batch):
    """Of the last position, [512]."""
    with torch.no_grad():
        return model(**batch, logits_to_keep=1).logits[0, -1]


def assert_same_tensors(model, base, but=()):
    found, wanted = dict(model.named_parameters()), dict(base.named_parameters())
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if name not in but and not torch.equal(found[name], wanted[name])] == []


# ------------------------------------------------------------------------------------------------- loading each layout


def test_a_the_old_layout_is_loaded_bit_for_bit(checkpoint, base, batch, capsys):
    stored = checkpoint("a").write()
    assert {"model.norm.weight", "visual.merger.mlp.0.bias"} <= set(stored.tensors)  # transformers 4's names
    model = stored.load()
    assert_same_tensors(model, base)
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in base.named_buffers())
    assert torch.equal(logits(model, batch), logits(base, batch))
    assert f"96 tensors from {stored.folder}/model" in capsys.readouterr().out


def test_a_copy_that_does_not_describe_its_whisper_has_whisper_large_v3_turbo(tmp_path):
    shutil.copytree(FULL_SIZE, tmp_path / "model")
    config = json.loads((FULL_SIZE / "config.json").read_text())
    deaf(config)
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    found, wanted = (vqa.audio_config_of(vqa.load_config(folder)) for folder in (tmp_path / "model", FULL_SIZE))
    for name in vqa.AUDIO_CONFIG_FIELDS:
        assert getattr(found, name) == getattr(wanted, name), name
    assert (found.d_model, found.encoder_layers, found.num_mel_bins) == (1280, 32, 128)


def test_b_our_own_save_is_whole(checkpoint, base, capsys):
    stored = checkpoint("b").write()
    assert_same_tensors(stored.load(), base)
    assert f"96 tensors from {stored.folder}/model" in capsys.readouterr().out


def test_c_a_whisper_is_grafted_and_the_projector_said_to_be_untrained(checkpoint, base, capsys):
    stored = checkpoint("c").write()
    model = stored.load(seed=7)
    assert_same_tensors(model, base, but=["audio_projector.weight"])
    out = capsys.readouterr().out
    assert f"58 tensors from {stored.folder}/model" in out
    assert f"{stored.folder}/whisper" in out
    assert "audio_projector is UNTRAINED: drawn from seed 7" in out
    drawn = model.audio_projector.weight
    assert abs(drawn.std().item() - 0.4) < 0.02  # the config's initializer_range
    assert torch.equal(stored.load(seed=7).audio_projector.weight, drawn)
    assert not torch.equal(stored.load(seed=8).audio_projector.weight, drawn)


def test_c_a_whisper_without_the_prefix_is_the_same(checkpoint, base):
    def strip(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("model.")] = tensors.pop(key)

    assert_same_tensors(checkpoint("c").write(strip, of_whisper=True).load(), base, but=["audio_projector.weight"])


def test_c_plain_qwen2_vl_is_told_what_it_lacks(checkpoint):
    stored = checkpoint("c").write()
    with pytest.raises(
        vqa.VQAError, match=r"model: holds no audio_encoder\.\* tensors.*--audio_encoder openai/whisper"
    ):
        stored.load(audio_encoder=None)


def test_c_a_model_that_hears_takes_no_second_whisper(checkpoint, tiny, base, tokenizer, tmp_path):
    hears = write_model(tiny, tmp_path / "hears", dict(base.named_parameters()))
    with pytest.raises(vqa.VQAError, match=r"hears: brings its own speech encoder .* leave --audio_encoder out"):
        vqa.load_model(hears, tokenizer, audio_encoder=checkpoint("c").write().folder / "whisper")


def test_c_what_is_no_whisper_is_refused(checkpoint):
    with pytest.raises(vqa.VQAError, match=r"--audio_encoder .*tiny_model/config\.json: model_type is 'qwen2_vl'"):
        checkpoint("c").write().load(audio_encoder=TINY)


def test_the_same_weights_are_one_base_in_every_layout_and_dtype(checkpoint, base, tmp_path):
    stored = checkpoint("a").write()
    assert vqa.fingerprint(stored.load()) == vqa.fingerprint(base)
    assert vqa.fingerprint(stored.load(dtype=torch.bfloat16)) == vqa.fingerprint(base)


def test_another_config_or_another_value_is_another_base(checkpoint, base):
    model = checkpoint("b").write().load()
    assert vqa.fingerprint(model) == vqa.fingerprint(base)
    model.config.text_config.num_attention_heads = 2
    assert vqa.fingerprint(model) != vqa.fingerprint(base)
    model.config.text_config.num_attention_heads = 4
    model.model.language_model.norm.weight.data[0] += 0.1
    assert vqa.fingerprint(model) != vqa.fingerprint(base)


@pytest.fixture(scope="module")
def full_vocabulary(tiny, tmp_path_factory):
    """A folder with a config of 152,064 rows and a tokenizer of 151,660 entries without holes, real ids."""
    folder = tmp_path_factory.mktemp("full") / "source"
    checkpoint_roundtrip.fill_vocabulary(FULL_SIZE, folder)
    config = json.loads((tiny / "config.json").read_text())
    config = {key: value + 151163 if key.endswith("token_id") else value for key, value in config.items()}
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 152064}))
    return folder


def test_full_vocabulary_with_the_real_ids_is_kept_and_merged(full_vocabulary, base, tmp_path):
    rows = torch.randn(152064, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tensors = {old_key(name): tensor.to(torch.bfloat16) for name, tensor in base.named_parameters()}
    tensors |= {"model.embed_tokens.weight": rows, "lm_head.weight": -rows}
    stored = write_model(full_vocabulary, tmp_path / "stored", tensors, 3)
    assert merge.main(["--stage1_model_path", str(stored), "--output_path", str(tmp_path / "out")]) == 0
    for folder in (stored, tmp_path / "out"):
        tokenizer = vqa.load_tokenizer(folder)
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|audio_pad|>", "<|pad|>"]
        assert tokenizer.convert_tokens_to_ids(names) == [151643, 151644, 151645, 151655, 151657, 151660]
        model = vqa.load_model(folder, tokenizer)
        assert torch.equal(model.get_input_embeddings().weight, rows)
        assert torch.equal(model.lm_head.weight, -rows)
        assert {old_key(name): p.dtype for name, p in model.named_parameters()} == dict.fromkeys(
            tensors, torch.bfloat16
        )
        assert all(torch.equal(p, tensors[old_key(name)]) for name, p in model.named_parameters())
        assert model.generation_config.eos_token_id == [151643, 151645]


# ------------------------------------------------------------------------------------------------------ 4-bit weights


@pytest.fixture()
def four_bit(checkpoint):
    """Layout d with every decoder layer and the projector in real 4 bits, and the values they stand for."""
    bnb = pytest.importorskip("bitsandbytes")
    stored = checkpoint("a")
    stored.layout = "d"
    wanted = {}
    for key in list(stored.tensors):
        if re.fullmatch(r"model\.layers\..*_proj\.weight|audio_projector\.weight", key):
            packed, state = bnb.functional.quantize_4bit(
                stored.tensors[key].detach().to(torch.bfloat16), quant_type="nf4", compress_statistics=True
            )
            wanted[vqa.current_name(key)] = bnb.functional.dequantize_4bit(packed, state)
            pack(stored.tensors, key, bnb.functional.quantize_4bit)
    return stored.write(), wanted


@needs_bitsandbytes
def test_d_is_dequantised(four_bit, base, capsys):
    stored, wanted = four_bit
    model = stored.load(dtype=torch.bfloat16)
    assert len(wanted) == 15
    assert "15 weights in 4 bits" in capsys.readouterr().out
    assert not any(module.__class__.__name__ == "Linear4bit" for module in model.modules())
    for name, p in model.named_parameters():
        assert torch.equal(p, wanted.get(name, dict(base.named_parameters())[name].to(torch.bfloat16))), name


@needs_bitsandbytes
def test_d_is_kept_in_4_bits_and_trained(four_bit, batch, capsys):
    stored, _ = four_bit
    kept, dequantised = stored.load(load_in_4bit=True), stored.load()
    assert "15 weights in 4 bits" in capsys.readouterr().out
    assert type(kept.audio_projector) is torch.nn.Linear  # only the decoder is kept so
    layer = kept.model.language_model.layers[1].mlp.up_proj
    assert (type(layer).__name__, layer.weight.dtype) == ("Linear4bit", torch.uint8)
    assert vqa.fingerprint(kept) == vqa.fingerprint(dequantised)
    as_kept, as_dequantised = logits(kept, batch), logits(dequantised, batch)
    assert (as_kept - as_dequantised).norm() < 0.05 * as_dequantised.norm()  # bitsandbytes computes in bf16 here
    peft_model = vqa.add_lora(kept, r=4).train()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -3:] = batch["input_ids"][:, -3:]
    peft_model(**batch, labels=labels).loss.backward()
    moved = [name for name, p in peft_model.named_parameters() if p.grad is not None and p.grad.any()]
    assert len(moved) == 14 + 1  # lora_B of every layer, and the projector


def test_d_without_bitsandbytes_says_what_to_install(checkpoint, monkeypatch):
    stored = checkpoint("d").write()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(vqa.VQAError, match=r"pip install .*bitsandbytes"):
        stored.load()


def test_load_in_4bit_needs_weights_in_4_bits(checkpoint):
    with pytest.raises(vqa.VQAError, match="--load_in_4bit keeps weights that are stored in 4 bits, and here none are"):
        checkpoint("a").write().load(load_in_4bit=True)
    with pytest.raises(vqa.VQAError, match="--load_in_4bit keeps weights"):
        vqa.load_model(TINY, vqa.load_tokenizer(TINY), init="random", load_in_4bit=True)


# ----------------------------------------------------------------------------------------------- refused by their name


def drop(key):
    """Remove one tensor."""
    return lambda tensors: tensors.pop(key)


def add(key):
    """Add one tensor."""
    return lambda tensors: tensors.update({key: torch.zeros(2)})


def reshape(key, *shape):
    """Give one tensor another shape."""
    return lambda tensors: tensors.update({key: torch.zeros(shape, dtype=tensors[key].dtype)})


SPOILED = {
    "a": [
        (drop("model.layers.1.mlp.up_proj.weight"), r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        (drop("visual.merger.mlp.0.bias"), r"tensor visual\.merger\.mlp\.0\.bias is missing"),
        (drop("audio_encoder.conv1.weight"), r"tensor audio_encoder\.conv1\.weight is missing"),
        (drop("audio_projector.weight"), r"tensor audio_projector\.weight is missing"),
        (add("model.layers.2.mlp.up_proj.weight"), r"unexpected tensor model\.layers\.2\.mlp\.up_proj\.weight"),
        (add("base_model.model.x.lora_A.weight"), "unexpected .*lora_A.*\n.*adapter among"),
        (add("model.layers.0.mlp.up_proj.weight.SCB"), r"unexpected .*\.SCB\n.*get the 16-bit copy"),
        (reshape("audio_encoder.conv1.weight", 65, 128, 3), r"audio_encoder\.conv1\.weight has shape \(65, 128, 3\)"),
        (reshape("audio_encoder.layers.0.fc1.weight", 120, 64), r"layers\.0\.fc1\.weight has shape \(120, 64\)"),
        (reshape("model.norm.weight", 65), r"model\.norm\.weight has shape \(65,\), the model wants \(64,\)"),
    ],
    "b": [
        (drop("model.language_model.norm.weight"), r"tensor model\.language_model\.norm\.weight is missing"),
        (add("audio_projector.bias"), r"unexpected tensor audio_projector\.bias"),
        (reshape("audio_encoder.conv1.weight", 64, 80, 3), r"conv1\.weight has shape \(64, 80, 3\), the model wants"),
    ],
    "c": [
        (drop("model.embed_tokens.weight"), r"tensor model\.embed_tokens\.weight is missing"),
        (add("visual.extra"), r"unexpected tensor visual\.extra"),
        (reshape("lm_head.weight", 500, 64), r"lm_head\.weight has shape \(500, 64\), the model wants \(512, 64\)"),
    ],
    "d": [
        (drop(PACKED), r"layers\.0\.mlp\.up_proj\.weight"),
        (drop(f"{PACKED}.absmax"), r"layers\.0\.mlp\.up_proj\.weight"),
        (drop(f"{PACKED}.nested_absmax"), r"layers\.0\.mlp\.up_proj\.weight"),
        (drop(f"{PACKED}.quant_state.bitsandbytes__nf4"), r"layers\.0\.mlp\.up_proj\.weight"),
        (add("model.layers.0.mlp.gate_proj.weight.absmax"), r"layers\.0\.mlp\.gate_proj\.weight"),
        (add("extra"), "unexpected tensor extra"),
        (reshape(PACKED, 4095, 1), r"layers\.0\.mlp\.up_proj\.weight"),
        (reshape(f"{PACKED}.absmax", 127), r"layers\.0\.mlp\.up_proj\.weight"),
        (reshape(f"{PACKED}.quant_state.bitsandbytes__nf4", 9), r"layers\.0\.mlp\.up_proj\.weight"),
    ],
}


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        pytest.param(layout, *case, marks=[needs_bitsandbytes] if layout == "d" else [])
        for layout, cases in SPOILED.items()
        for case in cases
    ],
)
def test_a_spoiled_checkpoint_is_refused_by_the_name_of_its_tensor(checkpoint, layout, change, message):
    stored = checkpoint(layout).write(change)
    with pytest.raises(vqa.VQAError, match=message):
        stored.load()
    if layout != "d":
        with pytest.raises(vqa.VQAError, match=message):
            stored.load(device="meta")  # --dry_run finds it too


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model.encoder.layer_norm.weight"), r"whisper: tensor .*encoder\.layer_norm\.weight is missing"),
        (add("model.encoder.extra"), r"unexpected tensor .*encoder\.extra"),
        (reshape("model.encoder.conv1.bias", 65), r"encoder\.conv1\.bias has shape \(65,\), the model wants"),
    ],
)
def test_a_spoiled_whisper_is_refused_by_the_name_of_its_tensor(checkpoint, change, message):
    with pytest.raises(vqa.VQAError, match=message):
        checkpoint("c").write(change, of_whisper=True).load()


def test_misfits_are_counted_and_explained(checkpoint):
    def change(tensors):
        for key in [key for key in tensors if key.startswith("model.layers.1.")]:
            del tensors[key]

    with pytest.raises(vqa.VQAError) as error:
        checkpoint("a").write(change).load()
    assert str(error.value).splitlines()[-2] == "12 problems in all"
    assert str(error.value).splitlines()[-1].startswith("12 missing, 0 unexpected, 0 mis-shaped of ")


@pytest.mark.parametrize("where", ["another name", "another file"])
def test_a_tensor_that_is_there_twice_is_refused(checkpoint, where):
    stored = checkpoint("a").write()
    files = [stored.folder / f"model/model-{i}.safetensors" for i in range(2)]
    key = "model.language_model.norm.weight" if where == "another name" else "model.norm.weight"
    for file in files if where == "another file" else files[:1]:
        save_file({**load_file(file), key: torch.ones(64)}, file)
    with pytest.raises(vqa.VQAError, match=r"norm\.weight"):
        stored.load()


@pytest.mark.parametrize("kept", [0, 4, 1000])
def test_a_torn_file_is_refused(checkpoint, kept):
    stored = checkpoint("b").write()
    file = stored.folder / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(vqa.VQAError, match=r"model\.safetensors: not a readable safetensors file .* copy it again"):
        stored.load()


@pytest.mark.parametrize("kept", [0, 1000])
def test_a_torn_shard_and_a_torn_adapter_are_named(checkpoint, changed, fresh, kept):
    stored = checkpoint("a").write()
    file = stored.folder / "model/model-1.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(vqa.VQAError, match=re.escape(str(file))):
        stored.load()
    file = changed() / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(vqa.VQAError, match=re.escape(str(file))):
        vqa.load_adapter(fresh(), file.parent)


def test_shards_without_their_index_are_refused(checkpoint):
    stored = checkpoint("a").write()
    (stored.folder / "model/model.safetensors.index.json").unlink()
    with pytest.raises(vqa.VQAError, match=r"model\.safetensors.* index"):
        stored.load()


# -------------------------------------------------------------------------------------------- pickles, code and kernels


@pytest.fixture()
def pickled(checkpoint):
    """Layout a as one pytorch_model.bin."""
    stored = checkpoint("a").write()
    folder = stored.folder / "model"
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({key: tensor.detach() for key, tensor in stored.tensors.items()}, folder / "pytorch_model.bin")
    return stored


def test_pickles_are_refused_unless_allowed(pickled, base):
    with pytest.raises(vqa.VQAError, match=r"pytorch_model\.bin: a pickle, .* --allow_pickle"):
        pickled.load()
    assert_same_tensors(pickled.load(allow_pickle=True), base)


def test_a_pickle_that_runs_code_is_refused_even_when_allowed(pickled, tmp_path):
    class Code:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"model.norm.weight": Code()}, pickled.folder / "model/pytorch_model.bin")
    with pytest.raises(vqa.VQAError, match=re.escape(str(pickled.folder / "model"))) as error:
        pickled.load(allow_pickle=True)
    assert "weights_only" not in str(error.value)  # torch's advice would let it run
    assert not (tmp_path / "ran").exists()


def test_pickles_that_nobody_reads_are_ignored(checkpoint, base):
    stored = checkpoint("b").write()
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        (stored.folder / "model" / name).write_bytes(b"no pickle")
    assert_same_tensors(stored.load(), base)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_asks_for_remote_code_is_refused(checkpoint, file):
    stored = checkpoint("b").write()
    path = stored.folder / "model" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(vqa.VQAError, match=rf"{re.escape(str(path))}: its field auto_map asks for Python code"):
        vqa.load_tokenizer(stored.folder / "model")
        stored.load()


def test_another_quantisation_is_refused(checkpoint):
    stored = checkpoint("b").write()
    path = stored.folder / "model/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(vqa.VQAError, match="quantization_config says 'gptq'"):
        stored.load()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash_attention_2", "needs a CUDA GPU and the flash-attn package: run `pip install flash-attn"),
        ("someone/kernel", "--attn_implementation must be one of sdpa, eager, flash_attention_2, not 'someone/kernel'"),
    ],
)
def test_attention_that_cannot_run_is_refused_before_anything_is_read(tokenizer, tmp_path, name, message, monkeypatch):
    monkeypatch.setattr(vqa, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(vqa.VQAError, match=message):
        vqa.load_model(tmp_path / "nothing here", tokenizer, attn_implementation=name)


def test_flash_attention_wants_16_bits(monkeypatch):
    monkeypatch.setattr(vqa, "is_flash_attn_2_available", lambda: True)
    vqa.check_attention("flash_attention_2", torch.bfloat16)
    with pytest.raises(vqa.VQAError, match="computes in 16 bits only: add --bf16 True"):
        vqa.check_attention("flash_attention_2", torch.float32)


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.fixture(scope="module")
def adapter(tiny, tokenizer, base, tmp_path_factory):
    """A folder as train_vqa.py leaves it: random LoRA and projector weights, settings that name the base."""
    folder = tmp_path_factory.mktemp("adapter")
    model = vqa.load_model(tiny, tokenizer, init="random", seed=1, dtype=torch.float32)
    model = vqa.add_lora(model, r=4)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    of_model = {"model_name_or_path": str(tiny), "init": "random", "init_seed": 1, "init_device": "cpu"}
    of_model |= {"dtype": "float32", "base_fingerprint": vqa.fingerprint(base)}
    settings = {"model": of_model, "input": {"input_mode": "audio"}}
    (folder / vqa.SETTINGS_FILE).write_text(json.dumps(settings))
    return folder


@pytest.fixture()
def changed(adapter, tmp_path):
    """Makes a copy of the adapter whose tensors, config or settings are changed."""

    def make(tensors=lambda stored: None, config=None, settings=None):
        folder = tmp_path / "changed"
        shutil.copytree(adapter, folder)
        stored = load_file(folder / "adapter_model.safetensors")
        tensors(stored)
        save_file(stored, folder / "adapter_model.safetensors")
        for name, changes in (("adapter_config.json", config or {}), (vqa.SETTINGS_FILE, {"model": settings or {}})):
            old = json.loads((folder / name).read_text())
            new = {key: {**old[key], **value} if isinstance(value, dict) else value for key, value in changes.items()}
            (folder / name).write_text(json.dumps({**old, **new}))
        return folder

    return make


def rename(*pattern):
    """Rewrite every key by `re.sub`."""

    def change(tensors):
        for key in list(tensors):
            tensors[re.sub(*pattern, key)] = tensors.pop(key)

    return change


@pytest.mark.parametrize(
    "change",
    [
        rename(r"model\.language_model\.", "model."),
        rename(r"audio_projector\.weight", "audio_projector.modules_to_save.default.weight"),
        rename(r"(lora_[AB])\.weight", r"\1.default.weight"),
    ],
)
def test_an_adapter_under_other_names_is_the_same(adapter, changed, change, fresh, base, batch):
    other = changed(change)
    assert set(load_file(other / "adapter_model.safetensors")) != set(load_file(adapter / "adapter_model.safetensors"))
    one, two = (logits(vqa.load_adapter(fresh(), folder), batch) for folder in (adapter, other))
    assert torch.equal(one, two)
    assert not torch.allclose(one, logits(base, batch), atol=0.1)


def zero_lora_b(tensors):
    """As before the first step."""
    for key in tensors:
        if "lora_B" in key:
            tensors[key] = torch.zeros_like(tensors[key])


def adapt_whisper(tensors):
    """As target_modules=["q_proj", ...] makes PEFT do."""
    for side, shape in (("A", (4, 64)), ("B", (64, 4))):
        tensors[f"base_model.model.audio_encoder.layers.0.self_attn.q_proj.lora_{side}.weight"] = torch.ones(shape)


Q_PROJ = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": zero_lora_b}, "every lora_B is zero, so the adapter does nothing"),
        ({"tensors": drop(Q_PROJ)}, r"tensor .*layers\.0\.self_attn\.q_proj\.lora_A\.weight is missing"),
        ({"tensors": add(Q_PROJ.replace("q_proj", "x"))}, r"unexpected tensor .*self_attn\.x\.lora_A\.weight"),
        ({"tensors": drop("base_model.model.audio_projector.weight")}, r"tensor .*audio_projector\.weight is missing"),
        (
            {"tensors": reshape("base_model.model.audio_projector.weight", 64, 32)},
            r"audio_projector\.weight has shape \(64, 32\), the model wants \(64, 64\)",
        ),
        ({"tensors": adapt_whisper}, r"unexpected .*audio_encoder(.|\n)*2 unexpected(.|\n)*adapt an encoder"),
        (
            {"tensors": lambda t: t.update({Q_PROJ.replace("language_model.", ""): torch.ones(4, 64)})},
            r"q_proj\.lora_A\.weight",
        ),
        ({"tensors": lambda t: t[Q_PROJ].fill_(math.nan)}, "q_proj.lora_A.weight holds values that are not finite"),
        ({"config": {"r": 8}}, r"q_proj\.lora_A\.weight has shape \(4, 64\), the model wants \(8, 64\)"),
        ({"config": {"use_rslora": True}}, "use_rslora is True, which this script does not compute"),
        (
            {"config": {"alpha_pattern": {"q_proj": 8}}},
            "alpha_pattern is .*q_proj.*, which this script does not compute",
        ),
        ({"config": {"init_lora_weights": "pissa"}}, "init_lora_weights 'pissa' changed the base as well"),
        ({"config": {"peft_type": "IA3"}}, "peft_type 'IA3', r and lora_alpha .*reads LoRA"),
        (
            {"settings": {"base_fingerprint": "0" * 64}},
            r"another base than the one loaded \(fingerprint 000000000000, not",
        ),
    ],
)
def test_an_adapter_that_does_not_belong_is_refused_with_the_reason(changed, fresh, changes, message):
    with pytest.raises(vqa.VQAError, match=message):
        vqa.load_adapter(fresh(), changed(**changes))


def test_an_adapter_on_another_base_is_refused(tiny, adapter, fresh):
    with pytest.raises(vqa.VQAError) as error:
        vqa.load_adapter(fresh(seed=2), adapter)
    assert "its base was drawn from seed 1 in float32 on cpu" in str(error.value)


def test_an_adapter_from_elsewhere_is_loaded_and_says_that_no_base_was_compared(changed, fresh, capsys):
    folder = changed()
    (folder / vqa.SETTINGS_FILE).unlink()
    vqa.load_adapter(fresh(), folder)
    out = capsys.readouterr().out
    assert str(folder) in out and vqa.SETTINGS_FILE in out


def test_a_pickled_adapter_is_refused_unless_allowed(adapter, changed, fresh, batch):
    folder = changed()
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(vqa.VQAError, match=r"adapter_model\.bin: a pickle"):
        vqa.load_adapter(fresh(), folder)
    loaded = vqa.load_adapter(fresh(), folder, allow_pickle=True)
    assert torch.equal(logits(loaded, batch), logits(vqa.load_adapter(fresh(), adapter), batch))


def test_rows_for_new_tokens_are_those_of_training_at_every_load(checkpoint, changed, batch):
    """A base of 497 rows: `<|pad|>`, 497, gets a row of its own, which no file holds; those of old adapters do."""

    def shorten(tensors):
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[key] = tensors[key][:497]

    stored = checkpoint("a").write(shorten)
    config = stored.folder / "model/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 497}))
    model = stored.load()
    identity = vqa.fingerprint(model)
    assert model.get_input_embeddings().num_embeddings == 498
    model.get_input_embeddings().weight.data[497] = 1.0
    assert vqa.fingerprint(model) == identity  # the base is what was there before
    folder = changed(settings={"base_fingerprint": identity})
    save_file(
        {"embed_tokens": torch.zeros(1, 64), "lm_head": torch.zeros(1, 64)}, folder / "new_token_rows.safetensors"
    )
    one, two = (vqa.load_adapter(stored.load(), folder) for _ in range(2))
    rows = one.get_input_embeddings().weight
    assert torch.equal(rows[497], rows[:497].mean(dim=0))
    assert torch.equal(rows, two.get_input_embeddings().weight)
    assert torch.equal(logits(one, batch), logits(two, batch))


# ------------------------------------------------------------------------------------------------------------ one door


@pytest.fixture(scope="module")
def clip():
    """Two frames of noise, and a second of a tone at 16 kHz."""
    noise = np.random.default_rng(1).integers(0, 256, (2, 60, 90, 3), dtype=np.uint8)
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(vqa.SAMPLE_RATE) / vqa.SAMPLE_RATE)
    return [Image.fromarray(pixels) for pixels in noise], tone.astype(np.float32)


def whole_folder(model, tokenizer, folder, settings):
    """What `--train_decoder full` leaves: weights, config, tokenizer and settings."""
    folder.mkdir()
    vqa.write_weights(model, folder)
    vqa.write_description(model, tokenizer, TINY, folder)
    (folder / vqa.SETTINGS_FILE).write_text(json.dumps(settings))
    return folder


def test_an_adapter_its_merge_and_a_fully_trained_model_answer_alike(adapter, tokenizer, clip, tmp_path):
    assert run_merge(adapter, tmp_path / "merged", "--dtype", "float32") == 0
    live = vqa.load_trained(adapter, merge=False)
    assert (live.merged, live.settings) == (False, vqa.load_settings(adapter))
    assert live.base_fingerprint == live.settings["model"]["base_fingerprint"]
    assert live.model.processor is live.processor and not live.model.training
    frames, speech = clip
    asked = {"max_new_tokens": 6, "candidates": ["Yes.", "No."]}
    wanted = live.model.answer(frames, speech, **asked)
    folded = vqa.load_trained(adapter)
    assert folded.merged and not any("lora_" in name for name, _ in folded.model.named_parameters())
    full = whole_folder(folded.model, tokenizer, tmp_path / "full", live.settings)
    for trained in (folded, *map(vqa.load_trained, (tmp_path / "merged", full))):
        answer = trained.model.answer(frames, speech, **asked)
        assert (answer.text, answer.n_tokens, answer.stopped) == (wanted.text, wanted.n_tokens, wanted.stopped)
        assert answer.log_probs == pytest.approx(wanted.log_probs, rel=1e-4)


def test_settings_travel_with_what_was_trained_and_can_be_changed(adapter, changed):
    folder = changed()
    settings = vqa.load_settings(folder)
    settings["input"] = {"input_mode": "audio_text", "max_image_size": 84, "audio_tokens": "speech"}
    (folder / vqa.SETTINGS_FILE).write_text(json.dumps({**settings, "input": settings["input"] | {"new_key": 1}}))
    processor = vqa.load_trained(folder).processor
    assert (processor.input_mode, processor.max_image_size, processor.audio_tokens) == ("audio_text", 84, "speech")
    processor = vqa.load_trained(folder, max_image_size=56, input_mode="text").processor
    assert (processor.input_mode, processor.max_image_size, processor.audio_tokens) == ("text", 56, "speech")


def test_a_base_alone_is_loaded_by_the_same_door(checkpoint, base, batch):
    stored = checkpoint("b").write()
    trained = vqa.load_trained(stored.folder / "model")
    assert (trained.settings, trained.merged, trained.base_fingerprint) == ({}, False, vqa.fingerprint(base))
    assert trained.model.dtype == torch.float32  # on a CPU
    assert torch.equal(logits(trained.model, batch), logits(base, batch))
    half = vqa.load_trained(stored.folder / "model", dtype=torch.bfloat16).model
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


def test_random_weights_of_another_kind_of_device_are_refused(changed):
    with pytest.raises(vqa.VQAError, match="drawn on cuda"):
        vqa.load_trained(changed(settings={"init_device": "cuda"}))


# --------------------------------------------------------------------------------------------------------------- merge


def run_merge(adapter, output, *flags):
    """Merge on the CPU; the base is drawn again as the settings say."""
    base = json.loads((adapter / vqa.SETTINGS_FILE).read_text())["model"]["model_name_or_path"]
    paths = ["--stage1_model_path", base, "--stage2_adapter_path", str(adapter), "--output_path", str(output)]
    return merge.main([*paths, "--device", "cpu", *flags])


def test_merged_float32_answers_as_the_live_adapter(adapter, fresh, batch, tmp_path, capsys):
    assert run_merge(adapter, tmp_path / "out", "--dtype", "float32") == 0
    live = logits(vqa.load_adapter(fresh(), adapter), batch)
    tokenizer = vqa.load_tokenizer(tmp_path / "out")
    model = vqa.load_model(tmp_path / "out", tokenizer, dtype=torch.float32)  # no other flag
    assert (logits(model, batch) - live).abs().max() <= 1e-5 * live.abs().max()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        *("config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"),
        *("tokenizer_config.json", "vqa_settings.json"),
    ]
    keys = set(load_file(tmp_path / "out/model.safetensors"))
    assert keys == {name for name, _ in fresh().named_parameters()}
    assert {"audio_encoder.conv1.weight", "audio_projector.weight"} <= keys
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [480, 482]
    assert vqa.load_settings(tmp_path / "out")["model"]["base_fingerprint"] == vqa.fingerprint(model)
    assert "16 of 16 most likely tokens are the same" in capsys.readouterr().out


def test_merged_bf16_is_rounded_once_and_the_difference_explained(tiny, adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vqa, "SHARD_BYTES", 100_000)
    stored = vqa.load_settings(adapter)
    base = vqa.load_model(tiny, vqa.load_tokenizer(adapter), init="random", seed=1)
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    stored["model"] |= {"dtype": "bfloat16", "base_fingerprint": vqa.fingerprint(base)}
    (folder / vqa.SETTINGS_FILE).write_text(json.dumps(stored))
    assert run_merge(folder, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert re.search(
        r"Largest logit difference, .*: \S+, where the adapter moves .* rounded to bf16, to 1 part in 256", out
    )
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 5
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    merged = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    lora = load_file(folder / "adapter_model.safetensors")
    for name, p in base.named_parameters():
        key = "base_model.model." + name.removesuffix(".weight")
        if f"{key}.lora_A.weight" in lora:
            p = p.float() + 16 / 4 * lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"]
        elif name == "audio_projector.weight":
            p = lora[f"base_model.model.{name}"]
        assert torch.equal(merged[name], p.to(torch.bfloat16)), name


def test_without_an_adapter_the_layout_is_converted_bit_for_bit(checkpoint, base, tokenizer, tmp_path):
    stored = checkpoint("a").write()
    flags = ["--stage1_model_path", str(stored.folder / "model"), "--output_path", str(tmp_path / "new/out")]
    assert merge.main([*flags, "--dtype", "float32"]) == 0
    assert_same_tensors(vqa.load_model(tmp_path / "new/out", tokenizer, dtype=torch.float32), base)


@pytest.mark.parametrize("step", ["vqa.write_weights", "vqa.write_description", "vqa.sync", "check_written"])
def test_an_interrupted_merge_leaves_nothing_that_looks_finished(adapter, tmp_path, monkeypatch, step):
    seen = []

    def interrupt(*args, **kwargs):
        seen.extend(tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(f"merge_stage2_to_bf16.{step}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_merge(adapter, tmp_path / "out", "--dtype", "float32")
    assert [path.name.endswith(".incomplete") for path in seen] == [True]  # what a killed process would leave
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_reads_back_as_another_model_is_refused(adapter, tmp_path, monkeypatch):
    def save_spoiled(model, folder):
        tensors = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        tensors["model.language_model.norm.weight"][3] += 1
        save_file(tensors, folder / "model.safetensors")

    monkeypatch.setattr(vqa, "write_weights", save_spoiled)
    with pytest.raises(vqa.VQAError, match="reads back as another model"):
        run_merge(adapter, tmp_path / "out", "--dtype", "float32")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_before_anything_is_written(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    (tmp_path / ".out.1.incomplete").mkdir()
    with pytest.raises(
        vqa.VQAError, match=r"has 0\.00 GB free and the merged model takes 0\.07 GB; .* \(an interrupted"
    ):
        run_merge(adapter, tmp_path / "out", "--dtype", "float32")
    assert [path.name for path in tmp_path.iterdir()] == [".out.1.incomplete"]


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_merge_on_a_device_that_is_not_there_is_refused(device, tmp_path):
    paths = ["--stage1_model_path", str(TINY), "--output_path", str(tmp_path / "out")]
    with pytest.raises(vqa.VQAError, match=rf"^--device {device}: not to be had here \(.+\)$"):
        merge.main([*paths, "--device", device])


def test_a_merge_overwrites_nothing(adapter, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(vqa.VQAError, match="out: is there already; name a new folder"):
        run_merge(adapter, tmp_path / "out")


def test_the_whole_way_is_measured(tmp_path, capsys):
    output = tmp_path / "measured.json"
    assert checkpoint_roundtrip.main(["--work_dir", str(tmp_path / "work"), "--tiny", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert [row["phase"] for row in result["phases"]] == [
        *("write the 4.47 layout", "load it", "add and save an adapter", "merge, read back, compare"),
        *("load the merge", "generate 8 tokens"),
    ]
    assert len(result["generated_ids"]) >= 1
    assert "| phase | seconds | GB on disk | peak GPU GiB | RAM before, peak GiB |" in capsys.readouterr().out
    assert not (tmp_path / "work").exists()


def test_settings_that_do_not_exist_are_refused(tiny):
    with pytest.raises(TypeError, match="frames_mode"):
        vqa.load_trained(tiny, frames_mode="video")


def test_how_a_folder_says_that_text_is_generated_is_left_aside(checkpoint):
    """Answers are greedy, whatever penalty of repetition a generation_config.json asks for."""
    stored = checkpoint("a").write()
    (stored.folder / "model" / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5}))
    assert stored.load().generation_config.repetition_penalty in (None, 1.0)
