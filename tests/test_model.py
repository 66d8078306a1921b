"""The grafted model: names, positions, losses, gradients, LoRA, weights and adapters on disk."""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

import train_vqa as vqa
from tests.conftest import TINY


@pytest.fixture(scope="module")
def batch(processor, rows):
    """Two training samples of different length, right-padded."""
    dataset = vqa.SurgicalVQADataset(rows, processor, max_train_frames=2)
    return vqa.VQACollator(497)([dataset[0], dataset[3]])


# --------------------------------------------------------------------------------------------------- names and forward


def test_grafted_weights_stand_at_the_top_level(base):
    tops = {name.split(".")[0] for name, _ in base.named_parameters()}
    assert tops == {"model", "lm_head", "audio_encoder", "audio_projector"}
    assert base.audio_projector.weight.shape == (64, 64)
    stock = dict(Qwen2VLForConditionalGeneration(vqa.load_config(TINY)).named_parameters())
    grafted = [name for name, _ in base.named_parameters() if name not in stock]
    assert all(name.startswith(("audio_encoder.", "audio_projector.weight")) for name in grafted)


def test_random_weights_are_a_function_of_the_seed(base, fresh):
    assert vqa.fingerprint(fresh()) == vqa.fingerprint(base)
    assert vqa.fingerprint(fresh(seed=2)) != vqa.fingerprint(base)


def test_random_weights_leave_the_callers_generator_alone(fresh):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fresh()
    assert torch.equal(torch.rand(3), expected)


def test_loss_is_the_mean_cross_entropy_of_the_answer_tokens(base, batch):
    """The same loss from the logits of every position, as plain transformers builds them."""
    with torch.no_grad():
        loss = base(**batch).loss
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        logits = base(**inputs).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert torch.allclose(loss, expected, atol=1e-5)


def test_loss_is_divided_by_the_labels_of_the_accumulated_batch(base, batch):
    count = int((batch["labels"] != -100).sum())
    with torch.no_grad():
        whole, half = base(**batch).loss, base(**batch, num_items_in_batch=torch.tensor(2 * count)).loss
    assert torch.allclose(whole, 2 * half)


def test_training_builds_logits_at_answer_positions_only(base, batch):
    seen = []
    hook = base.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    with torch.no_grad():
        output = base(**batch)
    hook.remove()
    assert seen == [(int((batch["labels"] != -100).sum()), 512)]
    assert output.logits is None
    assert output.past_key_values is None


def test_padding_does_not_change_a_sample(base, batch, processor, rows):
    dataset = vqa.SurgicalVQADataset(rows, processor, max_train_frames=2)
    shorter = min(0, 1, key=lambda i: int((batch["input_ids"][i] != 497).sum()))
    alone = vqa.VQACollator(497)([dataset[(0, 3)[shorter]]])
    assert alone["input_ids"].shape[1] < batch["input_ids"].shape[1]
    labels = batch["labels"].clone()
    labels[1 - shorter] = -100
    padded = {**batch, "labels": labels, "answer_at": vqa.learned_places(labels)}
    with torch.no_grad():
        assert torch.allclose(base(**alone).loss, base(**padded).loss, atol=1e-5)


def test_a_right_padded_batch_needs_no_mask(base, batch):
    mask = (batch["input_ids"] != 497).long()
    assert mask.min() == 0
    with torch.no_grad():
        assert torch.allclose(base(**batch).loss, base(**batch, attention_mask=mask).loss, atol=1e-5)


def test_skipping_input_casts_changes_nothing_under_autocast(fresh, batch):
    model = vqa.add_lora(fresh(dtype=torch.bfloat16), r=4, dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    losses, gradients = [], []
    for skip in (False, True):
        if skip:
            vqa.skip_input_casts(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert losses[0] == losses[1]
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_speech_and_frames_reach_the_logits(base, batch):
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        logits = base(**inputs).logits
        deaf = base(**{**inputs, "input_features": inputs["input_features"].flip(0)}).logits
        blind = base(**{**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}).logits
    assert not torch.allclose(logits, deaf, atol=1e-3)
    assert not torch.allclose(logits, blind, atol=1e-3)


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize(
    ("token", "message"),
    [(494, "2999 speech placeholders but 3000"), (492, "15 vision placeholders but 16")],
)
def test_placeholders_and_features_must_match(base, batch, token, message, placed):
    name = {494: "speech_at", 492: "vision_at"}[token]
    ids = batch["input_ids"].clone()
    ids[0, (ids[0] == token).nonzero()[0]] = 13
    changed = {"input_ids": ids, name: batch[name][1:] if placed else None}
    with pytest.raises(ValueError, match=message):
        base(**{**batch, **changed})


def test_places_from_the_collator_are_those_that_the_model_finds_itself(base, batch):
    without = {name: value for name, value in batch.items() if not name.endswith("_at")}
    with torch.no_grad():
        assert torch.equal(base(**without).loss, base(**batch).loss)


# ----------------------------------------------------------------------------------------------------------------- LoRA


def test_lora_lands_on_the_decoder_alone(fresh):
    model = vqa.add_lora(fresh(), r=4)
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    per_tower = {
        tower: sum(part in name for name in adapted)
        for tower, part in {"decoder": ".language_model.", "vision": ".visual.", "speech": ".audio_encoder."}.items()
    }
    assert per_tower == {"decoder": 14, "vision": 0, "speech": 0}
    kinds = {name.split(".")[-4] for name in adapted}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_what_is_trained_and_in_which_precision(fresh):
    model = vqa.add_lora(fresh(dtype=torch.bfloat16), r=4)
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 14 + 1
    assert set(trained.values()) == {torch.float32}
    assert "base_model.model.audio_projector.modules_to_save.default.weight" in trained
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}


def test_a_step_moves_lora_and_projector_and_nothing_else(fresh, batch):
    model = vqa.add_lora(fresh(), r=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # lora_B starts at zero, so that lora_A moves from the second step on
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


def test_frozen_towers_keep_no_graph_and_stay_in_evaluation_mode(fresh, batch):
    model = vqa.add_lora(fresh(), r=4).train()
    grads = {}
    grafted = model.base_model.model
    for name, tower in (("vision", grafted.model.visual.merger), ("speech", grafted.audio_encoder.layer_norm)):
        tower.register_forward_hook(
            lambda module, inputs, output, name=name: grads.update({name: output.requires_grad})
        )
    model(**batch)
    assert grads == {"vision": False, "speech": False}
    assert grafted.training
    assert not grafted.model.visual.training
    assert not grafted.audio_encoder.training


@pytest.mark.parametrize(("every_n", "expected"), [(0, [False, False]), (1, [True, True]), (2, [True, False])])
def test_checkpointed_layers(fresh, every_n, expected):
    model = fresh()
    vqa.set_checkpointing(model, every_n)
    assert [layer.gradient_checkpointing for layer in model.model.language_model.layers] == expected


def test_checkpointing_does_not_change_the_gradients(fresh, batch):
    gradients = []
    for every_n in (0, 1):
        model = fresh()
        peft_model = vqa.add_lora(model, r=4, dropout=0.0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in peft_model.named_parameters():
                if "lora_" in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
        vqa.set_checkpointing(model, every_n)
        peft_model.train()
        peft_model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in peft_model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-5) for name in gradients[0])


# ------------------------------------------------------------------------------------------------------ weights on disk


@pytest.fixture()
def stored(base, tmp_path):
    """The base model on disk in the layout of transformers 4.47, in two shards; returns a function to change it."""

    def old_name(name):
        return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")

    def write(change=lambda tensors: None):
        folder = tmp_path / "stored"
        shutil.copytree(TINY, folder)
        tensors = {old_name(name): p.detach().clone() for name, p in base.named_parameters()}
        change(tensors)
        names = sorted(tensors)
        files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, part in files.items():
            save_file({name: tensors[name] for name in part}, folder / file)
        index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write


def test_old_layout_is_loaded_bit_for_bit(stored, base, tokenizer):
    model = vqa.load_model(stored(), tokenizer, dtype=torch.float32)
    loaded = dict(model.named_parameters())
    assert loaded.keys() == dict(base.named_parameters()).keys()
    assert all(torch.equal(loaded[name], p) for name, p in base.named_parameters())
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffers[name], b) for name, b in base.named_buffers())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("audio_projector.weight"), r"stored: tensor audio_projector\.weight is missing"),
        (lambda t: t.pop("model.norm.weight"), r"stored: tensor model\.norm\.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), r"unexpected tensor extra"),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(500, 64)}),
            r"lm_head\.weight has shape \(500, 64\), the model wants \(512, 64\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(stored, tokenizer, change, message):
    with pytest.raises(vqa.VQAError, match=message):
        vqa.load_model(stored(change), tokenizer, dtype=torch.float32)


def test_a_folder_without_weights_is_refused(tokenizer):
    with pytest.raises(vqa.VQAError, match=r"tiny_model/model\.safetensors: no such file"):
        vqa.load_model(TINY, tokenizer, dtype=torch.float32)


# ----------------------------------------------------------------------------------------------------- adapters on disk


@pytest.fixture()
def adapter(fresh, tmp_path):
    """A saved adapter with random LoRA and projector weights, and the model it came from."""
    model = vqa.add_lora(fresh(), r=4)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter", model.eval()


def test_adapter_file_holds_lora_and_projector_and_nothing_else(adapter):
    stored = load_file(adapter[0] / "adapter_model.safetensors")
    assert len(stored) == 2 * 14 + 1
    assert "base_model.model.audio_projector.weight" in stored
    assert "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in stored


def test_adapter_is_loaded_bit_for_bit(adapter, fresh, batch):
    path, trained = adapter
    loaded = vqa.load_adapter(fresh(dtype=torch.float32), path)
    wanted = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    found = dict(loaded.named_parameters())
    assert all(torch.equal(found[name], p) for name, p in wanted.items())
    with torch.no_grad():
        assert torch.equal(loaded(**batch).loss, trained(**batch).loss)


def test_fingerprint_is_that_of_the_base_with_or_without_adapter(adapter, base):
    assert vqa.fingerprint(adapter[1]) == vqa.fingerprint(base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("base_model.model.audio_projector.weight"), "audio_projector.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected tensor .*extra"),
        (
            lambda t: t.update({"base_model.model.audio_projector.weight": torch.zeros(64, 32)}),
            r"audio_projector.weight has shape \(64, 32\), the model wants \(64, 64\)",
        ),
    ],
)
def test_adapter_that_does_not_fit_is_refused_by_name(adapter, fresh, change, message):
    file = adapter[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(vqa.VQAError, match=message):
        vqa.load_adapter(fresh(), adapter[0])


def test_a_folder_without_an_adapter_is_refused(fresh, tmp_path):
    with pytest.raises(vqa.VQAError, match="holds no adapter"):
        vqa.load_adapter(fresh(), tmp_path)


# ---------------------------------------------------------------------------------------------- fewer tokens per sample


def test_outputs_beyond_the_speech_are_left_out(base, batch):
    """The kept outputs stand where they stood: cutting nothing changes nothing, cutting some needs fewer places."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "audio_lengths")}
    with torch.no_grad():
        whole = base(**inputs).logits
        assert torch.equal(base(**inputs, audio_lengths=torch.tensor([1500, 1500])).logits, whole)
    with pytest.raises(ValueError, match="3000 speech placeholders but 1600"):
        base(**inputs, audio_lengths=torch.tensor([100, 1500]))


def test_a_video_batch_runs_and_sees_the_order_of_its_frames(tokenizer, base, rows):
    processor = vqa.VQAProcessor(tokenizer, base.config, max_image_size=56, frame_mode="video", audio_tokens="speech")
    dataset = vqa.SurgicalVQADataset(rows, processor)
    batch = vqa.VQACollator(497)([dataset[0], dataset[3]])
    assert batch["video_grid_thw"].tolist() == [[4, 4, 4], [4, 4, 4]]
    pixels = batch["pixel_values"].view(2, 4, 16, -1).flip(1).flatten(0, 2)
    with torch.no_grad():
        assert base(**batch).loss != base(**{**batch, "pixel_values": pixels}).loss


# ------------------------------------------------------------------------------------- shortcuts that change nothing


@pytest.mark.parametrize("frame_mode", ["images", "video"])
def test_positions_are_those_of_qwen2_vl(tokenizer, base, rows, frame_mode):
    """The loader's positions against `get_rope_index`, sample by sample."""
    processor = vqa.VQAProcessor(tokenizer, base.config, 84, "audio", "speech", frame_mode)
    dataset = vqa.SurgicalVQADataset(rows, processor, max_train_frames=3)
    for index in (0, 3):
        sample = dataset[index]
        grids = {name: sample[name] for name in ("image_grid_thw", "video_grid_thw") if name in sample}
        expected, _ = base.model.get_rope_index(
            sample["input_ids"][None], mm_token_type_ids=sample["mm_token_type_ids"][None], **grids
        )
        assert sample["position_ids"].dtype == torch.int64
        assert torch.equal(sample["position_ids"].T, expected[:, 0])


def test_positions_of_frames_that_differ_in_size(base):
    """Two frames of 2 x 3 and 1 x 4 tokens between 3, 1 and 2 words."""
    types = torch.tensor([0] * 3 + [1] * 6 + [0] + [1] * 4 + [0] * 2)
    grid = torch.tensor([[1, 4, 6], [1, 2, 8]])
    expected, _ = base.model.get_rope_index(types[None], mm_token_type_ids=types[None], image_grid_thw=grid)
    assert torch.equal(vqa.mrope_positions(types, grid, 2).T, expected[:, 0])


def test_a_batch_places_its_samples_as_the_model_would(base, batch):
    """Collated positions give the loss that the model's own positions give."""
    with torch.no_grad():
        own = base(**{name: value for name, value in batch.items() if name != "position_ids"}).loss
        assert torch.equal(base(**batch).loss, own)
    assert batch["position_ids"].shape == (3, *batch["input_ids"].shape)


@pytest.mark.parametrize("grid", [[[1, 4, 6]] * 3, [[1, 4, 6], [1, 4, 4], [1, 8, 2]], [[3, 4, 6]]])
def test_attention_within_frames_is_that_of_transformers(base, grid):
    """Frames of one size, of several sizes, and a video, bit for bit as the stock tower sees them."""
    grid = torch.tensor(grid)
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    stock = Qwen2VLForConditionalGeneration(vqa.load_config(TINY))
    assert stock.model.visual.config._attn_implementation != base.model.visual.config._attn_implementation
    stock.model.visual.load_state_dict(base.model.visual.state_dict())
    with torch.no_grad():
        expected = stock.model.visual(pixels, grid_thw=grid).pooler_output
        assert torch.equal(base.see(pixels, grid), expected)


@pytest.mark.parametrize("sizes", [[30, 30, 30], [30, 12, 18]])
def test_each_frame_attends_within_itself(sizes):
    """Heads of 16, against attention frame by frame; a patch of one frame has no part in another."""
    parts = torch.randn(3, 1, 2, sum(sizes), 16, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32)
    mixed, weights = vqa.attend_within_frames(None, *parts, None, 0.25, ends, max(sizes))
    alone = [
        ((query @ key.transpose(-1, -2) * 0.25).softmax(-1) @ value).transpose(1, 2)
        for query, key, value in (parts[..., start:end, :] for start, end in itertools.pairwise(ends))
    ]
    assert weights is None and mixed.shape == (1, sum(sizes), 2, 16)
    assert torch.allclose(mixed, torch.cat(alone, dim=1), atol=1e-6)


def test_the_sizes_of_equal_frames_are_not_read_in_each_layer(base, batch, monkeypatch):
    """On a GPU each reading waits for all that is under way."""
    read, plain = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: read.append(tensor.shape) or plain(tensor))
    with torch.no_grad():
        base.see(batch["pixel_values"], batch["image_grid_thw"])
    assert torch.Size([len(batch["image_grid_thw"])]) not in read


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def answerer(tiny, tokenizer):
    """A model with random weights that answers about frames of at most 56 px; tests must not change it."""
    model = vqa.load_model(tiny, tokenizer, init="random", seed=1, dtype=torch.float32)
    model.processor = vqa.VQAProcessor(tokenizer, model.config, max_image_size=56)
    return model


@pytest.fixture()
def asked(rows):
    """Two frames, speech, and a question in words."""
    return [vqa.load_frame(path, 384) for path in rows[0].frame_paths[:2]], vqa.load_speech(rows[0].audio_path), "NBI?"


HOW = pytest.mark.parametrize(
    ("by_ear", "in_words", "mode"), [(True, False, "audio"), (False, True, "text"), (True, True, "audio_text")]
)


def prompt_of(model, rows, frames, speech, question, mode, answer=None):
    """The batch of one question as training would build it."""
    processor = model.processor.with_mode(mode)
    row = replace(rows[0], question=question or "", answer=answer or "")
    frames = [vqa.shrink(frame, 56) for frame in frames]
    return vqa.VQACollator(497)([processor.encode(row, frames, speech, answer is not None)])


@HOW
def test_an_answer_is_what_the_model_finds_most_likely_word_by_word(
    answerer, rows, asked, tokenizer, by_ear, in_words, mode
):
    frames, speech, question = asked[0], asked[1] if by_ear else None, asked[2] if in_words else None
    answer = answerer.answer(frames, speech, question, max_new_tokens=5)
    batch = prompt_of(answerer, rows, frames, speech, question, mode)
    del batch["labels"]
    with torch.no_grad():
        for _ in range(answer.n_tokens):
            ids = answerer(**batch, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
            for name, value in (("input_ids", ids), ("mm_token_type_ids", torch.zeros_like(ids))):
                batch[name] = torch.cat([batch[name], value], dim=1)
    ids = batch["input_ids"][0, -answer.n_tokens :].tolist()
    assert answer.text == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert (answer.n_tokens, answer.stopped) == (5, False) or (ids[-1] in (480, 482) and answer.stopped)


@HOW
def test_log_probabilities_are_those_of_a_separate_forward_pass(answerer, rows, asked, by_ear, in_words, mode):
    frames, speech, question = asked[0], asked[1] if by_ear else None, asked[2] if in_words else None
    candidates = ["Yes, NBI light is on.", "No."]
    found = answerer.answer(frames, speech, question, max_new_tokens=1, candidates=candidates).log_probs
    assert list(found) == candidates
    for candidate in candidates:
        batch = prompt_of(answerer, rows, frames, speech, question, mode, candidate)
        labels = batch.pop("labels")[0]
        with torch.no_grad():
            log_probs = answerer(**batch).logits[0].log_softmax(-1)
        learned = (labels != -100).nonzero()[:, 0]
        assert labels[learned[-1]] == 482  # the stop token counts
        assert found[candidate] == pytest.approx(log_probs[learned - 1, labels[learned]].sum().item(), rel=1e-4)


def test_an_answer_says_whether_it_stopped_by_itself(tiny, tokenizer, asked):
    model = vqa.load_model(tiny, tokenizer, init="random", seed=1, dtype=torch.float32)
    model.processor = vqa.VQAProcessor(tokenizer, model.config, max_image_size=56)
    emitted = []

    def emit(module, inputs, output):
        logits, ids = torch.zeros_like(output), [315, 11, 482, 315]
        logits[:, -1, ids[len(emitted)]] = 1.0
        emitted.append(1)
        return logits

    model.lm_head.register_forward_hook(emit)
    answer = model.answer(asked[0], asked[1])
    assert (answer.text, answer.n_tokens, answer.stopped) == (tokenizer.decode([315, 11]), 3, True)
    emitted.clear()
    answer = model.answer(asked[0], asked[1], max_new_tokens=2)
    assert (answer.text, answer.n_tokens, answer.stopped) == (tokenizer.decode([315, 11]), 2, False)


def test_a_question_needs_ears_or_words_and_ears_have_an_end(answerer, asked):
    with pytest.raises(vqa.VQAError, match="needs speech, a question in words"):
        answerer.answer(asked[0])
    with pytest.raises(vqa.VQAError, match=r"lasts 5.0 s, .* hears 4.0"):
        answerer.answer(asked[0], np.zeros(5 * 16000, dtype=np.float32))


def test_frames_may_be_of_any_size_and_number(answerer):
    big = Image.effect_noise((400, 300), 60).convert("RGB")
    one, two = (answerer.answer([frame] * 3, question="?", candidates=["Yes."]) for frame in (big, vqa.shrink(big, 56)))
    assert one == two
    mixed = answerer.answer([big, big.resize((30, 60))], question="?", max_new_tokens=2)
    assert mixed.n_tokens >= 1
