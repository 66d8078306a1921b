"""--train_decoder, --train_vision_tower, --train_audio_encoder: what moves, how, and what is kept of it."""

import itertools
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_stage2_to_bf16 as merge
import train_vqa as vqa
from tests.conftest import (
    EVAL_DATA,
    FULL_SIZE,
    PAD,
    SMALL,
    TRAIN_DATA,
    edit_json,
    last_logits,
    refusal,
    same_tensors,
    stir,
    weights_of,
)

COMBINATIONS = list(itertools.product(vqa.DECODER_TRAINING, (False, True), (False, True)))
ENCODERS = ("--train_vision_tower", "--train_audio_encoder", "True")
COMPLETE = ("--train_decoder", "full", *ENCODERS)
SINUSOIDS = "audio_encoder.embed_positions.weight"


@pytest.fixture(scope="module")
def batches(tokenizer, base, rows):
    """Two samples of different length, right-padded, of whose speech only what sounds takes tokens; and each alone."""
    processor = vqa.VQAProcessor(tokenizer, base.config, 56, audio_tokens="speech")
    dataset = vqa.SurgicalVQADataset(rows, processor, max_train_frames=2)
    samples = [dataset[0], dataset[3]]
    assert samples[0]["input_ids"].shape != samples[1]["input_ids"].shape
    return [vqa.VQACollator(PAD)(part) for part in (samples, samples[:1], samples[1:])]


@pytest.fixture()
def build(fresh):
    """Builds a tiny model of which the named parts are trained, as `train` does, with LoRA that does something."""

    def build(decoder, vision_tower, audio_encoder, dtype=torch.float32, stirred=True):
        model = fresh(dtype=torch.float32 if decoder == "full" else dtype)
        encoders = {"vision_tower": vision_tower, "audio_encoder": audio_encoder}
        if decoder == "full":
            return vqa.train_fully(model, dtype, **encoders)
        model = vqa.add_lora(model, r=4, dropout=0.0, **encoders)
        return stir(model) if stirred else model

    return build


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def grafted(model):
    """The model inside of PEFT's."""
    return getattr(model, "base_model", model).model if hasattr(model, "peft_config") else model


def plain(name):
    """A parameter's name without what PEFT adds."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


def trained_names(base, decoder, vision_tower, audio_encoder):
    """The names that must be trained, spelt out from the base's."""
    prefixes = ["audio_projector."] + ["model.visual."] * vision_tower + ["audio_encoder."] * audio_encoder
    names = {name for name, _ in base.named_parameters()}
    full = {name for name in names if name.startswith(tuple(prefixes))} - {SINUSOIDS}
    if decoder == "full":
        return full | {name for name in names if name.startswith(("model.language_model.", "lm_head."))}
    linear = [n for n in names if ".language_model.layers." in n and n.endswith("proj.weight")]
    return full | {n.replace(".weight", f".lora_{side}.default.weight") for n in linear for side in "AB"}


# -------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("decoder", "vision", "audio"), COMBINATIONS)
def test_gradients_reach_what_is_trained_and_nothing_else(build, base, batches, decoder, vision, audio):
    model = build(decoder, vision, audio, torch.bfloat16).train()
    inside = grafted(model)
    assert (inside.training, inside.model.visual.training, inside.audio_encoder.training) == (True, vision, audio)
    with torch.autocast("cpu", torch.bfloat16):
        model(**batches[0]).loss.backward()
    moved = gradients_of(model)
    assert {plain(name) for name in moved} == trained_names(base, decoder, vision, audio)
    assert all(gradient.any() for gradient in moved.values())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    frozen = {plain(name): p.dtype for name, p in model.named_parameters() if not p.requires_grad}
    frozen = {name: dtype for name, dtype in frozen.items() if name != SINUSOIDS or not audio}
    assert set(frozen.values()) <= {torch.bfloat16}
    frequencies = dict(inside.named_buffers())
    assert all(torch.equal(frequencies[name], b) for name, b in base.named_buffers() if name in frequencies)
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(("decoder", "vision", "audio"), COMBINATIONS[1:])
def test_before_the_first_step_the_loss_is_that_of_the_base(build, base, batches, decoder, vision, audio):
    model = build(decoder, vision, audio, stirred=False)
    with torch.no_grad():
        wanted = base(**batches[0]).loss
        assert torch.equal(model(**batches[0]).loss, wanted)
        assert torch.equal(model.train()(**batches[0]).loss, wanted)


@pytest.mark.parametrize("decoder", vqa.DECODER_TRAINING)
def test_padding_and_company_leave_the_gradients_of_a_sample_alone(build, batches, decoder):
    model = build(decoder, True, True).train()
    count = (batches[0]["labels"] != -100).sum()
    gradients = []
    for parts in (batches[:1], batches[1:]):
        model.zero_grad()
        for part in parts:
            model(**part, num_items_in_batch=count).loss.backward()
        gradients.append(gradients_of(model))
    for name, together in gradients[0].items():
        assert torch.allclose(together, gradients[1][name], rtol=1e-3, atol=1e-4 * together.abs().max().item()), name


@pytest.mark.parametrize("decoder", vqa.DECODER_TRAINING)
def test_checkpointing_reaches_the_encoders_and_changes_no_gradient(build, batches, decoder):
    gradients, passes = [], []
    for every_n in (0, 1):
        model, count = build(decoder, True, True).train(), []
        inside = grafted(model)
        vqa.set_recomputation(inside, every_n)
        for layers in (inside.model.language_model.layers, inside.model.visual.blocks, inside.audio_encoder.layers):
            for layer in layers:
                part = next(layer.children())  # checkpointed is what lies inside of the layer's own hooks
                part.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        model(**batches[0]).loss.backward()
        gradients.append(gradients_of(model))
        passes.append(len(count))
    assert passes == [6, 12]  # two layers each of decoder, vision encoder and speech encoder
    assert all(torch.allclose(gradients[0][name], g, atol=1e-5 * g.abs().max()) for name, g in gradients[1].items())


# ----------------------------------------------------------------------------------------------------------- counts

VISION, SPEECH, SPEECH_SINUSOIDS, LINK = 675_759_104, 636_968_960, 1500 * 1280, 3584 * 1280
QWEN, LORA = 8_291_375_616, 161_480_704


@pytest.mark.parametrize(("decoder", "vision", "audio"), COMBINATIONS)
def test_parameters_at_full_size_are_counted_right(capsys, decoder, vision, audio):
    model = vqa.load_model(FULL_SIZE, vqa.load_tokenizer(FULL_SIZE), init="random", device="meta")
    assert sum(p.numel() for p in model.model.visual.parameters()) == VISION
    encoders = {"vision_tower": vision, "audio_encoder": audio}
    capsys.readouterr()
    if decoder == "lora":
        with torch.device("meta"):
            vqa.print_trainable_parameters(vqa.add_lora(model, **encoders))
    else:
        vqa.print_trainable_parameters(vqa.train_fully(model, torch.bfloat16, **encoders))
    copies = LINK + vision * VISION + audio * SPEECH  # PEFT trains copies beside the originals
    trained = copies - audio * SPEECH_SINUSOIDS + (LORA if decoder == "lora" else QWEN - VISION)
    total = QWEN + SPEECH + LINK + (LORA + copies if decoder == "lora" else 0)
    share = f"{100 * trained / total:.4f}"
    line = f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share}\n"
    assert capsys.readouterr().out == line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--train_decoder full --lora_r 8 --lora-alpha 8", "--lora_alpha, --lora_r: --train_decoder full"),
        ("--train_decoder full --load_in_4bit True", "--load_in_4bit: .*--train_decoder full"),
        ("--train_audio_encoder --input_mode text", "--train_audio_encoder: .*--input_mode text"),
        ("--train_decoder full --model_name_or_path ./out", "--output_dir out: "),  # it would overwrite its base
    ],
)
def test_contradictory_flags_are_refused_in_one_line(flags, named):
    message = refusal(vqa.parse_arguments, [*TRAIN_DATA, "--output_dir", "out", *flags.split()])
    assert re.match(named, message) and "\n" not in message


def test_another_way_of_training_the_decoder_is_no_choice(capsys):
    with pytest.raises(SystemExit) as stop:
        vqa.parse_arguments([*TRAIN_DATA, "--output_dir", "out", "--train_decoder", "half"])
    assert stop.value.code == 2 and "invalid choice: 'half'" in capsys.readouterr().err


# --------------------------------------------------------------------------------- adapters that hold trained encoders


@pytest.fixture()
def adapter(build, tmp_path):
    """A saved adapter with both encoders, every trained value moved, and the model it came from."""
    model = build("lora", True, True).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter", model


def test_an_adapter_brings_its_encoders_along_apart_folded_and_merged(adapter, fresh, base, tiny, batches, tmp_path):
    folder, model = adapter
    stored = load_file(folder / "adapter_model.safetensors")
    encoders = [name for name, _ in base.named_parameters() if name.startswith(("model.visual.", "audio_encoder."))]
    assert set(stored) >= {f"base_model.model.{name}" for name in encoders}
    assert len(stored) == 2 * 14 + 1 + len(encoders)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(config["modules_to_save"]) == ["audio_encoder", "audio_projector", "visual"]
    loaded, live = vqa.load_adapter(fresh(), folder), last_logits(model, batches[0])
    assert torch.equal(last_logits(loaded, batches[0]), live)
    assert not torch.equal(live, last_logits(base, batches[0]))
    assert vqa.fingerprint(loaded) == vqa.fingerprint(base)  # the base is still the base
    halved = vqa.load_adapter(fresh(dtype=torch.bfloat16), folder).named_parameters()
    dtypes = [p.dtype for name, p in halved if "modules_to_save" in name]
    assert dtypes == [torch.float32] * (len(encoders) + 1)

    merged = vqa.merge_adapter(loaded)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in base.named_parameters()]
    assert (last_logits(merged, batches[0]) - live).abs().max() <= 1e-5 * live.abs().max()

    shutil.copytree(tiny, tmp_path / "base")
    save_file({name: p.detach() for name, p in base.named_parameters()}, tmp_path / "base/model.safetensors")
    paths = ["--stage1_model_path", str(tmp_path / "base"), "--stage2_adapter_path", str(folder)]
    paths += ["--prompt_layout", "plain", "--max_eval_frames", "0"]
    assert merge.main([*paths, "--output_path", str(tmp_path / "out"), "--device", "cpu"]) == 0
    merged = load_file(tmp_path / "out/model.safetensors")
    assert len(encoders) == 31 + 37
    for name in (*encoders, "audio_projector.weight"):  # rounded once
        assert torch.equal(merged[name], stored[f"base_model.model.{name}"].to(torch.bfloat16)), name


PREFIX = "base_model.model."


@pytest.mark.parametrize(
    ("change", "modules", "message"),
    [
        (lambda t: t.pop(PREFIX + "model.visual.patch_embed.proj.weight"), None, "patch_embed.proj.weight is missing"),
        (lambda t: t.pop(PREFIX + "audio_encoder.conv1.bias"), None, "audio_encoder.conv1.bias is missing"),
        (
            lambda t: t.update({PREFIX + "audio_encoder.conv3.bias": torch.ones(1)}),
            None,
            "unexpected tensor base_model.model.audio_encoder.conv3.bias",
        ),
        (
            lambda t: t.update({PREFIX + "audio_encoder.conv1.bias": torch.full((64,), torch.nan)}),
            None,
            "audio_encoder.conv1.bias holds values that are not finite",
        ),
        (
            len,
            ["audio_projector", "visual"],
            "unexpected tensor base_model.model.audio_encoder.conv1.weight",
        ),
        (len, ["audio_projector", "lm_head"], "modules_to_save is .*lm_head"),
    ],
)
def test_an_adapter_whose_encoders_do_not_fit_is_refused_by_name(adapter, fresh, change, modules, message):
    file = adapter[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    if modules:
        edit_json(adapter[0] / "adapter_config.json", modules_to_save=modules)
    assert re.search(message, refusal(vqa.load_adapter, fresh(), adapter[0]))


# ----------------------------------------------------------------------------------------------- full models, from runs


@pytest.fixture(scope="module")
def flags_of():
    """Makes the flags of a run of four steps from `base`, with a checkpoint at each second."""

    def flags(base, folder, *more):
        words = [*TRAIN_DATA, *SMALL[:4], "--model_name_or_path", base, "--output_dir", folder, "--seed", "1"]
        words += ["--per_device_train_batch_size", "2", "--learning_rate", "1e-3", "--max_steps", "4", "--save_steps"]
        words += ["2", "--save_strategy", "steps", "--max_eval_frames", "2", "--logging_steps", "1", *more]
        return [*map(str, words)]

    return flags


@pytest.fixture(scope="module")
def run(tiny, flags_of, tmp_path_factory):
    """Four steps that train everything from random weights, into a folder with an older adapter."""
    folder = tmp_path_factory.mktemp("run") / "out"
    folder.mkdir()
    save_file({"stale": torch.ones(1)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    assert vqa.main(flags_of(tiny, folder, "--init", "random", *COMPLETE)) == 0
    return folder


def test_a_save_is_a_full_model(run, base):
    for folder in (run, run / "checkpoint-4"):
        names = {path.name for path in folder.iterdir() if path.is_file()}
        described = {"config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json"}
        assert names >= described | {"model.safetensors", vqa.SETTINGS_FILE, vqa.MANIFEST_FILE}
        assert not names & {"adapter_config.json", "adapter_model.safetensors", "training_args.bin"}
        assert vqa.find_damage(folder) is None
        loaded = vqa.load_model(folder, vqa.load_tokenizer(folder), dtype=torch.float32)
        assert same_tensors(weights_of(folder), weights_of(run)) and len(weights_of(run)) == 96
        assert same_tensors(dict(loaded.named_parameters()), weights_of(run))
        parts = {"decoder": "full", "vision_tower": True, "audio_encoder": True}
        parts |= {"compile_layers": False, "use_liger_kernel": False, "speech_token_jitter": 0}
        settings = vqa.load_settings(folder)
        assert (settings["trained"], settings["lora"]) == (parts, {})
    still = {name for name, p in base.named_parameters() if torch.equal(p, weights_of(run)[name])}
    assert still == {SINUSOIDS} and weights_of(run)["model.visual.merger.mlp.0.weight"].dtype == torch.float32


def test_evaluation_answers_as_the_model_answers(run, rows, evaluate):
    done = vqa.load_trained(run)
    answers = [row["predicted_answer"] for row in evaluate("--max_new_tokens", 6, checkpoint=run).rows]
    frames = [[vqa.load_frame(path, 56) for path in vqa.select_frames(row.frame_paths, 2)] for row in rows]
    asked = zip(frames, (vqa.load_speech(row.audio_path) for row in rows), strict=True)
    assert answers == [done.model.answer(*question, max_new_tokens=6).text for question in asked] and any(answers)


def test_a_full_model_answers_in_the_dtype_and_with_the_attention_of_its_training(run, evaluate, tmp_path):
    folder = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*", vqa.MANIFEST_FILE))
    edit_json(folder / vqa.SETTINGS_FILE, model={"dtype": "bfloat16", "attn_implementation": "eager"})
    done = vqa.load_trained(folder)
    assert (done.model.dtype, done.model.config._attn_implementation) == (torch.bfloat16, "eager")
    assert "eager" in (printed := evaluate("--limit", 1, checkpoint=folder).out) and "BF16" in printed


def test_a_full_checkpoint_that_changed_is_not_evaluated_nor_rows_mixed(run, evaluate, tmp_path):
    assert evaluate("--limit", 1, checkpoint=run / "checkpoint-2").status == 0
    mixed = evaluate("--limit", 1, checkpoint=run / "checkpoint-4")
    assert mixed.status == 2 and "manifest_sha256" in mixed.err
    folder = shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    (folder / "model.safetensors").write_bytes(b"")
    damaged = evaluate(checkpoint=folder, name="damaged")
    assert damaged.status == 2 and f"{folder / 'model.safetensors'}" in damaged.err


def test_going_on_is_the_same_bit_for_bit(run, tiny, flags_of, tmp_path):
    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    more = ("--init", "random", "--resume_from_checkpoint", "True")
    for flags, named in (
        (ENCODERS, "decoder 'full', this run has 'lora'"),
        (("--train_decoder", "full", "--train_vision_tower"), "audio_encoder True, this run has False"),
        (("--train_decoder", "full", "--train_audio_encoder"), "vision_tower True, this run has False"),
    ):
        message = refusal(vqa.main, flags_of(tiny, tmp_path, *more, *flags))
        assert str(tmp_path / "checkpoint-2") in message and named in message
    assert vqa.main(flags_of(tiny, tmp_path, *more, *COMPLETE)) == 0
    assert same_tensors(weights_of(run), weights_of(tmp_path))
    assert not same_tensors(weights_of(run), weights_of(run / "checkpoint-2"))


def tied_base(tiny, folder, tied):
    """A base of 497 rows: `<|pad|>`, 497, gets a row of its own."""
    shutil.copytree(tiny, folder)
    edit_json(folder / "config.json", vocab_size=497, tie_word_embeddings=tied)
    return folder


@pytest.mark.parametrize("case", ["encoders beside lora", "new rows", "new rows and a tied head"])
def test_other_parts_go_on_bit_for_bit(case, tiny, flags_of, tmp_path):
    flags, base = ("--lora_r", "4", *ENCODERS), tiny
    if case.startswith("new"):
        flags, base = ("--train_decoder", "full"), tied_base(tiny, tmp_path / "base", "tied" in case)
    flags = ("--init", "random", "--max_steps", "2", "--save_steps", "1", *flags)
    assert vqa.main(flags_of(base, tmp_path / "one", *flags)) == 0
    shutil.copytree(tmp_path / "one/checkpoint-1", tmp_path / "other/checkpoint-1")
    assert vqa.main(flags_of(base, tmp_path / "other", *flags, "--resume_from_checkpoint", "True")) == 0
    one, other, earlier = (weights_of(tmp_path / place) for place in ("one", "other", "one/checkpoint-1"))
    assert same_tensors(one, other) and ("lm_head.weight" not in one) == (case != "new rows")
    if base is tiny:
        still = {key for key in one if torch.equal(one[key], earlier[key])}
        assert still == {f"base_model.model.{SINUSOIDS}"}
        return
    again = vqa.load_trained(tmp_path / "one").model
    assert again.get_input_embeddings().num_embeddings == again.lm_head.out_features == 498
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == ("tied" in case)
    assert same_tensors({name: p for name, p in again.named_parameters() if name in one}, one)


def test_a_checkpoint_from_before_these_flags_was_trained_by_lora_alone(checkpoint):
    settings = vqa.load_settings(checkpoint)
    now = {name: dict(value) if isinstance(value, dict) else value for name, value in settings.items()}
    del settings["trained"]
    (checkpoint / vqa.SETTINGS_FILE).write_text(json.dumps(settings))
    vqa.refuse_other_settings(checkpoint, now)
    for name in ("vision_tower", "compile_layers", "use_liger_kernel"):
        other = {**now, "trained": {**now["trained"], name: True}}
        assert f"{name} False, this run has True" in refusal(vqa.refuse_other_settings, checkpoint, other)


def test_a_full_model_is_a_base_to_start_from_unless_it_does_not_fit(run, flags_of, tmp_path):
    assert vqa.main(flags_of(run / "checkpoint-4", tmp_path / "out", "--max_steps", "1", "--lora_r", "4")) == 0
    settings, done = vqa.load_settings(tmp_path / "out"), vqa.load_trained(run)
    assert settings["model"]["init"] == "pretrained"
    assert settings["model"]["base_fingerprint"] == vqa.fingerprint(done.model)
    assert vqa.load_adapter(done.model, tmp_path / "out")
    folder = shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    for name, tensor, message in (
        ("model.language_model.norm.weight", None, "model.language_model.norm.weight is missing"),
        ("audio_encoder.conv1.weight", None, "audio_encoder.conv1.weight is missing"),
        ("extra", torch.ones(1), "unexpected tensor extra"),
        ("lm_head.weight", torch.ones(3, 64), "lm_head.weight has shape (3, 64)"),
    ):
        tensors = {**weights_of(run), name: tensor}
        save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")
        assert message in refusal(vqa.load_model, folder, vqa.load_tokenizer(folder), dtype=torch.float32)


def test_a_tied_head_that_is_stored_as_well_must_be_the_embeddings(tiny, base, tokenizer, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "tied")
    edit_json(folder / "config.json", tie_word_embeddings=True)
    tensors = {name: p.detach().clone() for name, p in base.named_parameters()}
    tensors["lm_head.weight"] = base.get_input_embeddings().weight.detach().clone()
    save_file(tensors, folder / "model.safetensors")
    loaded = vqa.load_model(folder, tokenizer, dtype=torch.float32)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.lm_head.weight, tensors["lm_head.weight"])
    tensors["lm_head.weight"][7, 7] += 1
    save_file(tensors, folder / "model.safetensors")
    assert "lm_head.weight is not" in refusal(vqa.load_model, folder, tokenizer, dtype=torch.float32)


@pytest.mark.parametrize("decoder", vqa.DECODER_TRAINING)
def test_the_best_checkpoint_is_what_remains_or_is_named_where_it_is_torn(
    tiny, flags_of, tmp_path, monkeypatch, decoder
):
    """The second step is a disaster, so that the first one is the best."""
    name = "adapter_model.safetensors" if decoder == "lora" else "model.safetensors"
    flags = ["--init", "random", "--train_decoder", decoder, "--max_steps", "2", *EVAL_DATA[:2], "--eval_steps", "1"]
    flags += ["--eval_strategy", "steps", "--save_steps", "1", "--load_best_model_at_end", "True", "--learning_rate"]
    flags += ["0.5", "--max_eval_samples", "1", "--lr_scheduler_type", "constant"]
    assert vqa.main(flags_of(tiny, tmp_path / "out", *flags)) == 0
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    folders = (tmp_path / "out/checkpoint-1", tmp_path / "out/checkpoint-2")
    best, other = sorted(folders, key=lambda path: str(path) != state["best_model_checkpoint"])
    assert same_tensors(weights_of(tmp_path / "out"), weights_of(best))
    assert not same_tensors(weights_of(tmp_path / "out"), weights_of(other))

    forward, first = vqa.SurgicalVQAModel.forward, tmp_path / "torn/checkpoint-1"

    def tear(self, *args, **kwargs):
        if (first / vqa.MANIFEST_FILE).exists():
            os.truncate(first / name, (first / name).stat().st_size // 2)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(vqa.SurgicalVQAModel, "forward", tear)
    message = refusal(vqa.main, flags_of(tiny, tmp_path / "torn", *flags, "--greater_is_better", "False"))
    assert str(first) in message and "cannot be read" in message and "\n" not in message
