"""--train_decoder, --train_vision_tower, --train_audio_encoder: what moves, how, and what is kept of it."""

import itertools
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate_checkpoint as ev
import merge_stage2_to_bf16 as merge
import train_vqa as vqa
from tests.conftest import FULL_SIZE
from tests.test_data import refusal
from tests.test_main import FIXTURE_DATA, SMALL

COMBINATIONS = list(itertools.product(vqa.DECODER_TRAINING, (False, True), (False, True)))
TOWERS = ("--train_vision_tower", "--train_audio_encoder", "True")
SINUSOIDS = "audio_encoder.embed_positions.weight"


@pytest.fixture(scope="module")
def batch(tiny, tokenizer, rows):
    """Two samples of different length, right-padded, of whose speech only what sounds takes tokens."""
    processor = vqa.VQAProcessor(tokenizer, vqa.load_config(tiny), 56, audio_tokens="speech")
    dataset = vqa.SurgicalVQADataset(rows, processor, max_train_frames=2)
    samples = [dataset[0], dataset[3]]
    assert samples[0]["input_ids"].shape != samples[1]["input_ids"].shape
    return [vqa.VQACollator(497)(part) for part in (samples, samples[:1], samples[1:])]


@pytest.fixture()
def whole_base(tiny, tokenizer):
    """Builds the base of `build`."""
    return lambda dtype=torch.float32: vqa.load_model(tiny, tokenizer, init="random", seed=1, dtype=dtype)


@pytest.fixture()
def build(whole_base):
    """Builds a tiny model of which the named parts are trained, as `train` does, with LoRA that does something."""

    def build(decoder, vision_tower, audio_encoder, dtype=torch.float32, stir=True):
        stored = torch.float32 if decoder == "full" else dtype
        model = whole_base(stored)
        towers = {"vision_tower": vision_tower, "audio_encoder": audio_encoder}
        if decoder == "full":
            return vqa.train_fully(model, dtype, **towers)
        model = vqa.add_lora(model, r=4, dropout=0.0, **towers)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if stir and "lora_" in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
        return model

    return build


def plain(name):
    """A parameter's name without what PEFT adds."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


def trained_names(base, decoder, vision_tower, audio_encoder):
    """The names that must be trained, spelt out from the base's."""
    prefixes = ["audio_projector."] + ["model.visual."] * vision_tower + ["audio_encoder."] * audio_encoder
    names = {name for name, _ in base.named_parameters()}
    whole = {name for name in names if name.startswith(tuple(prefixes))} - {SINUSOIDS}
    if decoder == "full":
        return whole | {name for name in names if name.startswith(("model.language_model.", "lm_head."))}
    linear = [n for n in names if ".language_model.layers." in n and n.endswith("proj.weight")]
    return whole | {n.replace(".weight", f".lora_{side}.default.weight") for n in linear for side in "AB"}


# -------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("decoder", "vision", "audio"), COMBINATIONS)
def test_gradients_reach_what_is_trained_and_nothing_else(build, base, batch, decoder, vision, audio):
    model = build(decoder, vision, audio, torch.bfloat16).train()
    whole = model.get_base_model() if decoder == "lora" else model
    assert (whole.training, whole.model.visual.training, whole.audio_encoder.training) == (True, vision, audio)
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch[0]).loss.backward()
    moved = {plain(name) for name, p in model.named_parameters() if p.grad is not None}
    assert moved == trained_names(base, decoder, vision, audio)
    assert [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()] == []
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    frozen = {name: p.dtype for name, p in model.named_parameters() if not p.requires_grad}
    frozen = {name: dtype for name, dtype in frozen.items() if plain(name) != SINUSOIDS or not audio}
    assert set(frozen.values()) <= {torch.bfloat16}
    frequencies = dict(whole.named_buffers())
    assert all(torch.equal(frequencies[name], b) for name, b in base.named_buffers() if name in frequencies)
    model.eval()
    assert not whole.model.visual.training and not whole.audio_encoder.training


@pytest.mark.parametrize(("decoder", "vision", "audio"), COMBINATIONS[1:])
def test_before_the_first_step_the_loss_is_that_of_the_base(build, whole_base, batch, decoder, vision, audio):
    base = whole_base()
    model = build(decoder, vision, audio, stir=False)
    with torch.no_grad():
        wanted = base(**batch[0]).loss
        assert torch.equal(model(**batch[0]).loss, wanted)
        assert torch.equal(model.train()(**batch[0]).loss, wanted)


@pytest.mark.parametrize("decoder", vqa.DECODER_TRAINING)
def test_padding_and_company_leave_the_gradients_of_a_sample_alone(build, batch, decoder):
    model = build(decoder, True, True).train()
    count = (batch[0]["labels"] != -100).sum()
    gradients = []
    for parts in (batch[:1], batch[1:]):
        model.zero_grad()
        for part in parts:
            model(**part, num_items_in_batch=count).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, together in gradients[0].items():
        assert torch.allclose(together, gradients[1][name], rtol=1e-3, atol=1e-4 * together.abs().max().item()), name


@pytest.mark.parametrize("decoder", vqa.DECODER_TRAINING)
def test_checkpointing_reaches_the_towers_and_changes_no_gradient(build, batch, decoder):
    gradients, passes = [], []
    for every_n in (0, 1):
        model, count = build(decoder, True, True).train(), []
        whole = model.get_base_model() if decoder == "lora" else model
        vqa.set_checkpointing(whole, every_n)
        for layers in (whole.model.language_model.layers, whole.model.visual.blocks, whole.audio_encoder.layers):
            for layer in layers:
                part = next(layer.children())  # checkpointed is what lies inside of the layer's own hooks
                part.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        model(**batch[0]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        passes.append(len(count))
    assert passes == [6, 12]  # two layers each of decoder, vision tower and speech encoder
    assert all(torch.allclose(gradients[0][name], g, atol=1e-5 * g.abs().max()) for name, g in gradients[1].items())


# ----------------------------------------------------------------------------------------------------------- counts

VISION, SPEECH, SPEECH_SINUSOIDS, LINK = 675_759_104, 636_968_960, 1500 * 1280, 3584 * 1280
QWEN, LORA = 8_291_375_616, 161_480_704


@pytest.mark.parametrize(("decoder", "vision", "audio"), COMBINATIONS)
def test_parameters_at_full_size_are_counted_right(tokenizer, capsys, decoder, vision, audio):
    tokenizer = vqa.load_tokenizer(FULL_SIZE)
    model = vqa.load_model(FULL_SIZE, tokenizer, init="random", device="meta")
    assert sum(p.numel() for p in model.model.visual.parameters()) == VISION
    towers = {"vision_tower": vision, "audio_encoder": audio}
    capsys.readouterr()
    if decoder == "lora":
        with torch.device("meta"):
            vqa.print_trainable_parameters(vqa.add_lora(model, **towers))
    else:
        vqa.print_trainable_parameters(vqa.train_fully(model, torch.bfloat16, **towers))
    copies = LINK + vision * VISION + audio * SPEECH  # PEFT trains copies beside the originals
    trained = copies - audio * SPEECH_SINUSOIDS + (LORA if decoder == "lora" else QWEN - VISION)
    total = QWEN + SPEECH + LINK + (LORA + copies if decoder == "lora" else 0)
    share = f"{100 * trained / total:.4f}"
    line = f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share}\n"
    assert capsys.readouterr().out == line


# --------------------------------------------------------------------------------------------------- flags that clash


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--train_decoder", "full", "--lora_r", "8", "--lora-alpha", "8"],
            "--lora_alpha, --lora_r: --train_decoder full has no adapters; leave it out",
        ),
        (
            ["--train_decoder", "full", "--load_in_4bit", "True"],
            "--load_in_4bit: 4-bit weights cannot be trained; leave it out, or --train_decoder full",
        ),
        (
            ["--train_audio_encoder", "--input_mode", "text"],
            "--train_audio_encoder: with --input_mode text no speech is heard; leave one of them out",
        ),
        (
            ["--train_decoder", "full", "--model_name_or_path", "./out"],
            "--output_dir out: holds the base model, which the trained one would overwrite; name another folder",
        ),
    ],
)
def test_contradictory_flags_are_refused_in_one_line(flags, message):
    assert refusal(vqa.parse_arguments, [*FIXTURE_DATA, "--output_dir", "out", *flags]) == message


def test_another_way_of_training_the_decoder_is_no_choice(capsys):
    with pytest.raises(SystemExit) as stop:
        vqa.parse_arguments([*FIXTURE_DATA, "--output_dir", "out", "--train_decoder", "half"])
    assert stop.value.code == 2
    assert "invalid choice: 'half'" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- adapters that hold trained towers


@pytest.fixture()
def adapter(build, tmp_path):
    """A saved adapter with both towers, every trained value moved, and the model it came from."""
    model = build("lora", True, True).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter", model


def logits(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        return model(**inputs, logits_to_keep=4).logits


def test_an_adapter_brings_its_towers_along_bit_for_bit(adapter, whole_base, base, batch):
    folder, model = adapter
    stored = load_file(folder / "adapter_model.safetensors")
    towers = [name for name, _ in base.named_parameters() if name.startswith(("model.visual.", "audio_encoder."))]
    assert set(stored) >= {f"base_model.model.{name}" for name in towers}
    assert len(stored) == 2 * 14 + 1 + len(towers)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(config["modules_to_save"]) == ["audio_encoder", "audio_projector", "visual"]
    loaded = vqa.load_adapter(whole_base(), folder)
    assert torch.equal(logits(loaded, batch[0]), logits(model, batch[0]))
    assert not torch.equal(logits(loaded, batch[0]), logits(whole_base(), batch[0]))
    assert vqa.fingerprint(loaded) == vqa.fingerprint(whole_base())  # the base is still the base
    trained = [p.dtype for n, p in vqa.load_adapter(whole_base(torch.bfloat16), folder).named_parameters()
               if "modules_to_save" in n]  # fmt: skip
    assert trained == [torch.float32] * (len(towers) + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("base_model.model.model.visual.patch_embed.proj.weight"),
            r"model\.visual\.patch_embed\.proj\.weight is missing",
        ),
        (
            lambda t: t.pop("base_model.model.audio_encoder.conv1.bias"),
            r"audio_encoder\.conv1\.bias is missing",
        ),
        (
            lambda t: t.update({"base_model.model.audio_encoder.conv3.bias": torch.ones(1)}),
            r"unexpected tensor base_model\.model\.audio_encoder\.conv3\.bias",
        ),
        (
            lambda t: t.update({"base_model.model.audio_encoder.conv1.bias": torch.full((64,), torch.nan)}),
            r"audio_encoder\.conv1\.bias holds values that are not finite",
        ),
    ],
)
def test_an_adapter_whose_towers_do_not_fit_is_refused_by_name(adapter, whole_base, change, message):
    file = adapter[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(vqa.VQAError, match=message):
        vqa.load_adapter(whole_base(), adapter[0])


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["audio_projector", "visual"], r"unexpected tensor base_model\.model\.audio_encoder\.conv1\.weight"),
        (["audio_projector", "lm_head"], "modules_to_save is .*lm_head"),
    ],
)
def test_a_config_that_names_other_modules_than_the_weights_is_refused(adapter, whole_base, modules, message):
    file = adapter[0] / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "modules_to_save": modules}))
    with pytest.raises(vqa.VQAError, match=message):
        vqa.load_adapter(whole_base(), adapter[0])


def test_towers_are_folded_into_the_base_with_the_rest(adapter, whole_base, base, batch):
    folder, model = adapter
    merged = vqa.fold_adapter(vqa.load_adapter(whole_base(), folder))
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in base.named_parameters()]
    live = logits(model, batch[0])
    assert (logits(merged, batch[0]) - live).abs().max() <= 1e-5 * live.abs().max()


def test_a_merged_model_on_disk_has_the_towers_rounded_once(adapter, whole_base, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "base")
    vqa.write_weights(whole_base(), folder)
    paths = ["--stage1_model_path", str(folder), "--stage2_adapter_path", str(adapter[0])]
    assert merge.main([*paths, "--output_path", str(tmp_path / "out"), "--device", "cpu"]) == 0
    trained = load_file(adapter[0] / "adapter_model.safetensors")
    merged = load_file(tmp_path / "out/model.safetensors")
    towers = [name for name in merged if name.startswith(("model.visual.", "audio_"))]
    assert len(towers) == 31 + 37 + 1
    for name in towers:
        assert torch.equal(merged[name], trained[f"base_model.model.{name}"].to(torch.bfloat16)), name


# --------------------------------------------------------------------------------------------- whole models, from runs


def flags_of(tiny, folder, *flags):
    return [
        *FIXTURE_DATA, *SMALL[:-2], "--model_name_or_path", str(tiny), "--output_dir", str(folder), "--seed", "1",
        "--per_device_train_batch_size", "2", "--learning_rate", "1e-3", "--disable_tqdm", "True", "--max_steps", "4",
        "--logging_steps", "1", "--save_strategy", "steps", "--save_steps", "2", "--max_eval_frames", "2", *flags,
    ]  # fmt: skip


WHOLE = ("--train_decoder", "full", *TOWERS)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Four steps that train everything from random weights: (folder, model in memory)."""
    folder, kept, make = tmp_path_factory.mktemp("run") / "out", [], vqa.make_trainer
    folder.mkdir()
    save_file({"stale": torch.ones(1)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqa, "make_trainer", lambda *args: kept.append(make(*args)) or kept[0])
        assert vqa.main(flags_of(tiny, folder, "--init", "random", *WHOLE)) == 0
    return folder, kept[0].model.eval()


@pytest.mark.parametrize("place", [".", "checkpoint-4"])
def test_a_save_is_a_whole_model_and_the_one_in_memory(run, batch, place):
    folder, model = run[0] / place, run[1]
    names = {path.name for path in folder.iterdir() if path.is_file()}
    described = {"config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json"}
    assert names >= described | {"model.safetensors", vqa.SETTINGS_FILE, vqa.MANIFEST_FILE}
    assert not names & {"adapter_config.json", "adapter_model.safetensors", "training_args.bin"}
    assert vqa.find_damage(folder) is None
    loaded = vqa.load_model(folder, vqa.load_tokenizer(folder), dtype=torch.float32)
    found = dict(loaded.named_parameters())
    assert all(torch.equal(found[name], p) for name, p in model.named_parameters())
    assert torch.equal(logits(loaded, batch[0]), logits(model, batch[0]))
    parts = {"decoder": "full", "vision_tower": True, "audio_encoder": True}
    parts |= {"compile_layers": False, "use_liger_kernel": False}
    assert vqa.load_settings(folder)["trained"] == parts
    assert vqa.load_settings(folder)["lora"] == {}


def test_everything_has_moved_but_the_sinusoids(run, base):
    stored = load_file(run[0] / "model.safetensors")
    start = dict(base.named_parameters())
    tiny_start = {name: p for name, p in start.items() if name in stored and p.shape == stored[name].shape}
    assert set(stored) - set(tiny_start) == {SINUSOIDS}  # 200 places here, 1500 in `base`
    assert stored["model.visual.merger.mlp.0.weight"].dtype == torch.float32


def test_evaluation_answers_as_the_model_in_memory(run, tokenizer, rows, tmp_path, capsys):
    folder, model = run
    argv = ["--checkpoint_path", str(folder), "--eval_data_path", FIXTURE_DATA[1], *FIXTURE_DATA[2:]]
    assert ev.main([*argv, "--output_file", str(tmp_path / "x.jsonl"), "--max_new_tokens", "6"]) == 0
    answers = [json.loads(line)["predicted_answer"] for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    processor = vqa.VQAProcessor(tokenizer, model.config, 56)
    dataset = vqa.SurgicalVQADataset(rows, processor, max_eval_frames=2, is_eval=True, with_answer=False)
    wanted = ev.answer_batch(model, [dataset[i] for i in range(5)], 497, vqa.turn_end_ids(tokenizer), 6)
    assert answers == [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids, _ in wanted]
    assert any(answers)


@pytest.mark.parametrize(("dtype", "device"), [("float32", "cuda"), ("bfloat16", "cpu")])
def test_a_whole_model_answers_in_the_dtype_and_with_the_attention_of_its_training(run, tmp_path, dtype, device):
    for path in run[0].iterdir():
        if path.is_file() and path.name != vqa.MANIFEST_FILE:
            shutil.copy(path, tmp_path)
    settings = vqa.load_settings(run[0])
    settings["model"] |= {"dtype": dtype, "attn_implementation": "eager"}
    (tmp_path / vqa.SETTINGS_FILE).write_text(json.dumps(settings))
    argv = ["--checkpoint_path", str(tmp_path), "--eval_data_path", "e", *FIXTURE_DATA[2:], "--output_file", "x.jsonl"]
    subject = ev.read_subject(ev.build_parser().parse_args(argv), device)
    assert (subject.dtype, subject.attn_implementation) == (dtype, "eager")


def test_rows_of_another_checkpoint_of_the_run_are_not_mixed_in(run, tmp_path, capsys):
    argv = ["--eval_data_path", FIXTURE_DATA[1], *FIXTURE_DATA[2:], "--output_file", str(tmp_path / "x.jsonl")]
    argv += ["--limit", "1", "--max_new_tokens", "2"]
    assert ev.main(["--checkpoint_path", str(run[0] / "checkpoint-2"), *argv]) == 0
    assert ev.main(["--checkpoint_path", str(run[0] / "checkpoint-4"), *argv]) == 2
    assert "manifest_sha256" in capsys.readouterr().err


def test_going_on_is_the_same_bit_for_bit(run, tiny, tmp_path):
    shutil.copytree(run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    flags = flags_of(tiny, tmp_path, "--init", "random", *WHOLE, "--resume_from_checkpoint", "True")
    assert vqa.main(flags) == 0
    name = "model.safetensors"
    one, other = load_file(run[0] / name), load_file(tmp_path / name)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert any(not torch.equal(one[key], load_file(run[0] / "checkpoint-2" / name)[key]) for key in one)


def test_towers_beside_lora_go_on_bit_for_bit(tiny, tmp_path):
    flags = ("--init", "random", "--lora_r", "4", "--max_steps", "2", "--save_steps", "1", *TOWERS)
    assert vqa.main(flags_of(tiny, tmp_path / "one", *flags)) == 0
    shutil.copytree(tmp_path / "one/checkpoint-1", tmp_path / "other/checkpoint-1")
    assert vqa.main(flags_of(tiny, tmp_path / "other", *flags, "--resume_from_checkpoint", "True")) == 0
    one, other, earlier = (
        load_file(tmp_path / place / "adapter_model.safetensors") for place in ("one", "other", "one/checkpoint-1")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
    still = {key for key in one if torch.equal(one[key], earlier[key])}
    assert still == {f"base_model.model.{SINUSOIDS}"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (TOWERS, "decoder 'full', this run has 'lora'"),
        (("--train_decoder", "full", "--train_vision_tower"), "audio_encoder True, this run has False"),
        (("--train_decoder", "full", "--train_audio_encoder"), "vision_tower True, this run has False"),
    ],
)
def test_going_on_with_other_parts_trained_is_refused(run, tiny, tmp_path, flags, message):
    shutil.copytree(run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    flags = flags_of(tiny, tmp_path, "--init", "random", *flags, "--resume_from_checkpoint", "True")
    assert f"checkpoint-2: was trained with {message}" in refusal(vqa.main, flags)


def test_a_checkpoint_from_before_these_flags_was_trained_by_lora_alone(run, tmp_path):
    settings = vqa.load_settings(run[0])
    now = {**settings, "trained": {**settings["trained"], **dict.fromkeys(vqa.ENCODERS, False), "decoder": "lora"}}
    del settings["trained"]
    (tmp_path / vqa.SETTINGS_FILE).write_text(json.dumps(settings))
    vqa.refuse_other_settings(tmp_path, now)
    for name in ("vision_tower", "compile_layers", "use_liger_kernel"):
        other = {**now, "trained": {**now["trained"], name: True}}
        message = f"{tmp_path}: was trained with {name} False, this run has True; go on with"
        assert refusal(vqa.refuse_other_settings, tmp_path, other).startswith(message)


def test_a_whole_model_is_a_base_to_start_from(run, tmp_path, capsys):
    assert vqa.main(flags_of(run[0] / "checkpoint-4", tmp_path / "out", "--max_steps", "1", "--lora_r", "4")) == 0
    settings = vqa.load_settings(tmp_path / "out")
    assert settings["model"]["init"] == "pretrained"
    assert settings["model"]["base_fingerprint"] == vqa.fingerprint(run[1])
    assert vqa.load_adapter(run_model(run), tmp_path / "out")


def run_model(run):
    return vqa.load_model(run[0], vqa.load_tokenizer(run[0]), dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.language_model.norm.weight"), r"tensor model\.language_model\.norm\.weight is missing"),
        (lambda t: t.pop("audio_encoder.conv1.weight"), r"tensor audio_encoder\.conv1\.weight is missing"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected tensor extra"),
        (lambda t: t.update({"lm_head.weight": torch.ones(3, 64)}), r"lm_head\.weight has shape \(3, 64\), "),
    ],
)
def test_a_whole_checkpoint_that_does_not_fit_is_refused_by_name(run, tmp_path, change, message):
    folder = shutil.copytree(run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(vqa.VQAError, match=message):
        vqa.load_model(folder, vqa.load_tokenizer(folder), dtype=torch.float32)


def test_a_whole_checkpoint_that_changed_on_disk_is_not_evaluated(run, tmp_path, capsys):
    folder = shutil.copytree(run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    (folder / "model.safetensors").write_bytes(b"")
    argv = ["--checkpoint_path", str(folder), "--eval_data_path", FIXTURE_DATA[1], *FIXTURE_DATA[2:]]
    assert ev.main([*argv, "--output_file", str(tmp_path / "x.jsonl")]) == 2
    assert f"{folder}: model.safetensors has 0 bytes, not" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [False, True])
def test_rows_for_new_tokens_and_a_tied_head_are_saved_and_read_back(tiny, tmp_path, tied):
    """A base of 497 rows: `<|pad|>`, 497, gets a row of its own."""
    shutil.copytree(tiny, tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    config |= {"vocab_size": 497, "tie_word_embeddings": tied}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    tokenizer = vqa.load_tokenizer(tmp_path / "base")
    model = vqa.load_model(tmp_path / "base", tokenizer, init="random", dtype=torch.float32)
    model = vqa.train_fully(model, torch.bfloat16)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.lm_head.weight.requires_grad
    (tmp_path / "out").mkdir()
    vqa.write_weights(model, tmp_path / "out")
    vqa.write_description(model, tokenizer, tmp_path / "base", tmp_path / "out")
    again = vqa.load_model(tmp_path / "out", vqa.load_tokenizer(tmp_path / "out"), dtype=torch.float32)
    assert again.get_input_embeddings().num_embeddings == again.lm_head.out_features == 498
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    wanted = dict(model.named_parameters())
    assert {name for name, _ in again.named_parameters()} == wanted.keys()
    assert all(torch.equal(p, wanted[name].float()) for name, p in again.named_parameters())


def test_rows_for_new_tokens_and_a_tied_head_go_on_bit_for_bit(tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base")
    config = {**json.loads((tiny / "config.json").read_text()), "vocab_size": 497, "tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    flags = ("--init", "random", "--train_decoder", "full", "--max_steps", "2", "--save_steps", "1")
    assert vqa.main(flags_of(base, tmp_path / "one", *flags)) == 0
    shutil.copytree(tmp_path / "one/checkpoint-1", tmp_path / "other/checkpoint-1")
    assert vqa.main(flags_of(base, tmp_path / "other", *flags, "--resume_from_checkpoint", "True")) == 0
    one, other = (load_file(tmp_path / place / "model.safetensors") for place in ("one", "other"))
    assert one.keys() == other.keys() and "lm_head.weight" not in one
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_tied_head_that_is_stored_as_well_must_be_the_embeddings(tiny, whole_base, tokenizer, tmp_path):
    folder, model = shutil.copytree(tiny, tmp_path / "tied"), whole_base()
    config = {**json.loads((tiny / "config.json").read_text()), "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    tensors["lm_head.weight"] = model.get_input_embeddings().weight.detach().clone()
    save_file(tensors, folder / "model.safetensors")
    loaded = vqa.load_model(folder, tokenizer, dtype=torch.float32)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.lm_head.weight, tensors["lm_head.weight"])
    tensors["lm_head.weight"][7, 7] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(vqa.VQAError, match=r"lm_head\.weight is not .*embed_tokens\.weight"):
        vqa.load_model(folder, tokenizer, dtype=torch.float32)


@pytest.mark.parametrize("decoder", vqa.DECODER_TRAINING)
def test_the_best_checkpoint_is_what_remains(tiny, tmp_path, decoder):
    """The second step is a disaster, so that the first one is the best."""
    flags = flags_of(tiny, tmp_path, "--init", "random", "--train_decoder", decoder, "--max_steps", "2")
    flags += ["--eval_data_path", FIXTURE_DATA[1], "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"]
    flags += ["--load_best_model_at_end", "True", "--max_eval_samples", "1", "--lr_scheduler_type", "constant"]
    flags[flags.index("--learning_rate") + 1] = "0.5"
    assert vqa.main(flags) == 0
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    best, other = sorted((tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"),
                         key=lambda path: str(path) != state["best_model_checkpoint"])  # fmt: skip
    name = "adapter_model.safetensors" if decoder == "lora" else "model.safetensors"
    final, best, other = (load_file(folder / name) for folder in (tmp_path, best, other))
    assert all(torch.equal(final[key], best[key]) for key in final)
    assert any(not torch.equal(final[key], other[key]) for key in final)


def test_a_torn_best_checkpoint_is_named(tiny, tmp_path, monkeypatch):
    """The first of two is the best, as the higher loss is said to be, and torn when the second is written."""
    make, file = vqa.make_trainer, tmp_path / "checkpoint-1/adapter_model.safetensors"

    class Tear(vqa.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            os.truncate(file, file.stat().st_size // 2)

    def make_trainer(*args):
        trainer = make(*args)
        trainer.add_callback(Tear())
        return trainer

    monkeypatch.setattr(vqa, "make_trainer", make_trainer)
    flags = flags_of(tiny, tmp_path, "--init", "random", "--lora_r", "4", "--max_steps", "2", "--save_steps", "1")
    flags += ["--eval_data_path", FIXTURE_DATA[1], "--eval_strategy", "steps", "--eval_steps", "1"]
    flags += ["--load_best_model_at_end", "True", "--max_eval_samples", "1", "--greater_is_better", "True"]
    message = refusal(vqa.main, flags)
    assert str(tmp_path / "checkpoint-1") in message and "cannot be read" in message and "\n" not in message


# -------------------------------------------------------------------------------------------------------------- steps


def test_parameters_are_counted_once_with_the_trainers_result(build, tokenizer, batch, tmp_path):
    args = vqa.VQATrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    trainer = vqa.VQATrainer(model=build("lora", True, False), args=args, tokenizer=tokenizer, settings={})
    wanted = vqa.Trainer.floating_point_ops(trainer, batch[0])
    assert wanted > 0
    assert trainer.floating_point_ops(batch[0]) == wanted
    trainer.model = None  # not asked again
    assert trainer.floating_point_ops(batch[0]) == wanted
