"""The grafted model: names, positions, losses, gradients, LoRA, answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration

import train_vqa as vqa
from tests.conftest import AUDIO, END_OF_TEXT, IM_END, IMAGE, PAD, TINY, refusal, stir


def without(batch, *names):
    return {name: value for name, value in batch.items() if name not in names}


# --------------------------------------------------------------------------------------------------- names and forward


def test_grafted_weights_stand_at_the_top_level(base):
    tops = {name.split(".")[0] for name, _ in base.named_parameters()}
    assert tops == {"model", "lm_head", "audio_encoder", "audio_projector"}
    assert base.audio_projector.weight.shape == (64, 64)
    stock = dict(Qwen2VLForConditionalGeneration(vqa.load_config(TINY)).named_parameters())
    grafted = [name for name, _ in base.named_parameters() if name not in stock]
    assert all(name.startswith(("audio_encoder.", "audio_projector.weight")) for name in grafted)


def test_random_weights_are_a_function_of_the_seed_and_leave_the_callers_generator_alone(base, fresh):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert vqa.fingerprint(fresh()) == vqa.fingerprint(base) != vqa.fingerprint(fresh(seed=2))
    assert torch.equal(torch.rand(3), expected)


def test_loss_is_the_mean_cross_entropy_of_the_answer_tokens(base, batch):
    """The same loss from the logits of every position, as plain transformers builds them; with a mask or without."""
    count = int((batch["labels"] != -100).sum())
    mask = (batch["input_ids"] != PAD).long()
    assert mask.min() == 0
    with torch.no_grad():
        loss, masked = base(**batch).loss, base(**batch, attention_mask=mask).loss
        of_two = base(**batch, num_items_in_batch=torch.tensor(2 * count)).loss  # an accumulated batch
        logits = base(**without(batch, "labels")).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert torch.allclose(loss, expected, atol=1e-5) and torch.allclose(masked, loss, atol=1e-5)
    assert torch.allclose(loss, 2 * of_two)


def test_training_builds_logits_at_answer_positions_only(base, batch):
    seen = []
    hook = base.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    with torch.no_grad():
        output = base(**batch)
    hook.remove()
    assert seen == [(int((batch["labels"] != -100).sum()), 512)]
    assert output.logits is None and output.past_key_values is None


def test_padding_does_not_change_a_sample(base, batch, processor, rows):
    dataset = vqa.SurgicalVQADataset(rows, processor, max_train_frames=2)
    shorter = min(0, 1, key=lambda i: int((batch["input_ids"][i] != PAD).sum()))
    alone = vqa.VQACollator(PAD)([dataset[(0, 3)[shorter]]])
    assert alone["input_ids"].shape[1] < batch["input_ids"].shape[1]
    labels = batch["labels"].clone()
    labels[1 - shorter] = -100
    with torch.no_grad():
        padded = base(**{**without(batch, "answer_at"), "labels": labels}).loss
        assert torch.allclose(base(**alone).loss, padded, atol=1e-5)


def test_what_the_loader_computes_is_what_the_model_finds_itself(base, batch):
    """Places of frames, speech and answers, and positions."""
    places = [name for name in batch if name.endswith("_at")]
    assert len(places) == 3 and batch["position_ids"].shape == (3, *batch["input_ids"].shape)
    with torch.no_grad():
        loss = base(**batch).loss
        assert torch.equal(base(**without(batch, *places)).loss, loss)
        assert torch.equal(base(**without(batch, "position_ids")).loss, loss)


def test_skipping_input_casts_changes_nothing_under_autocast(fresh, batch):
    model = stir(vqa.add_lora(fresh(dtype=torch.bfloat16), r=4, dropout=0.0), "lora_B")
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
    inputs = without(batch, "labels")
    with torch.no_grad():
        logits = base(**inputs).logits
        deaf = base(**{**inputs, "input_features": inputs["input_features"].flip(0)}).logits
        blind = base(**{**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}).logits
    assert not torch.allclose(logits, deaf, atol=1e-3) and not torch.allclose(logits, blind, atol=1e-3)


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize(
    ("token", "places", "message"),
    [(AUDIO, "speech_at", "399 speech placeholders but 400"), (IMAGE, "vision_at", "15 vision placeholders but 16")],
)
def test_placeholders_and_features_must_match(base, batch, token, places, message, placed):
    ids = batch["input_ids"].clone()
    ids[0, (ids[0] == token).nonzero()[0]] = 13
    with pytest.raises(ValueError, match=message):
        base(**{**batch, "input_ids": ids, places: batch[places][1:] if placed else None})


def test_outputs_beyond_the_speech_are_left_out(base, batch):
    """The kept outputs stand where they stood: cutting nothing changes nothing, cutting some needs fewer places."""
    inputs = without(batch, "labels", "audio_lengths")
    with torch.no_grad():
        full = base(**inputs).logits
        assert torch.equal(base(**inputs, audio_lengths=torch.tensor([200, 200])).logits, full)
    with pytest.raises(ValueError, match="400 speech placeholders but 300"):
        base(**inputs, audio_lengths=torch.tensor([100, 200]))


# ----------------------------------------------------------------------------------------------------------------- LoRA


def test_frozen_encoders_keep_no_graph(fresh, batch):
    model = vqa.add_lora(fresh(), r=4).train()
    grads, grafted = [], model.get_base_model()
    for encoder in (grafted.model.visual.merger, grafted.audio_encoder.layer_norm):
        encoder.register_forward_hook(lambda module, inputs, output: grads.append(output.requires_grad))
    model(**batch)
    assert grads == [False, False]


@pytest.mark.parametrize(("every_n", "expected"), [(0, [False, False]), (1, [True, True]), (2, [True, False])])
def test_checkpointed_layers(fresh, every_n, expected):
    model = fresh()
    vqa.set_recomputation(model, every_n)
    assert [layer.gradient_checkpointing for layer in model.model.language_model.layers] == expected


# ------------------------------------------------------------------------------------- shortcuts that change nothing


def test_a_video_batch_runs_and_sees_the_order_of_its_frames(tokenizer, base, rows):
    processor = vqa.VQAProcessor(tokenizer, base.config, max_image_size=56, frame_mode="video", audio_tokens="speech")
    dataset = vqa.SurgicalVQADataset(rows, processor)
    batch = vqa.VQACollator(PAD)([dataset[0], dataset[3]])
    assert batch["video_grid_thw"].tolist() == [[4, 4, 4], [4, 4, 4]]
    pixels = batch["pixel_values"].view(2, 4, 16, -1).flip(1).flatten(0, 2)
    with torch.no_grad():
        assert base(**batch).loss != base(**{**batch, "pixel_values": pixels}).loss


@pytest.mark.parametrize(
    ("frame_mode", "sizes"),
    [("images", [(84, 84)] * 3), ("video", [(84, 84)] * 3), ("images", [(56, 84), (28, 112), (84, 84)])],
)
def test_positions_are_those_of_qwen2_vl(tokenizer, base, rows, frame_mode, sizes):
    """The loader's positions against `get_rope_index`."""
    processor = vqa.VQAProcessor(tokenizer, base.config, 112, "audio", "speech", frame_mode)
    frames = [Image.new("RGB", size) for size in sizes]
    for index in (0, 3):
        sample = processor.make_sample(rows[index], frames, vqa.load_speech(rows[index].audio_path), True)
        grids = {name: sample[name] for name in ("image_grid_thw", "video_grid_thw") if name in sample}
        expected, _ = base.model.get_rope_index(
            sample["input_ids"][None], mm_token_type_ids=sample["mm_token_type_ids"][None], **grids
        )
        assert sample["position_ids"].dtype == torch.int64
        assert torch.equal(sample["position_ids"].T, expected[:, 0])


@pytest.mark.parametrize("grid", [[[1, 4, 6]] * 3, [[1, 4, 6], [1, 4, 4], [1, 8, 2]], [[3, 4, 6]]])
def test_attention_within_frames_is_that_of_transformers(base, grid):
    """Frames of one size, of several sizes, and a video, bit for bit as the stock encoder sees them."""
    grid = torch.tensor(grid)
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    stock = Qwen2VLForConditionalGeneration(vqa.load_config(TINY))
    stock.model.visual.load_state_dict(base.model.visual.state_dict())
    with torch.no_grad():
        expected = stock.model.visual(pixels, grid_thw=grid).pooler_output
        assert torch.equal(base.encode_vision(pixels, grid), expected)


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def answerer(tiny, tokenizer):
    """A model with random weights that answers about frames of at most 56 px; tests must not change it."""
    model = vqa.load_model(tiny, tokenizer, init="random", seed=1, dtype=torch.float32)
    model.processor = vqa.VQAProcessor(tokenizer, model.config, max_image_size=56)
    return model


@pytest.fixture(params=["audio", "text", "audio_text"])
def asked(request, rows, answerer):
    """Two frames, speech and a question in words, as far as the mode has them; and what training would make of them."""
    frames = [vqa.load_frame(path, 384) for path in rows[0].frame_paths[:2]]
    speech = vqa.load_speech(rows[0].audio_path) if "audio" in request.param else None
    question = "NBI?" if "text" in request.param else None

    def prompt(answer=None):
        row = replace(rows[0], question=question or "", answer=answer or "")
        small = [vqa.shrink(frame, 56) for frame in frames]
        sample = answerer.processor.with_mode(request.param).make_sample(row, small, speech, answer is not None)
        return vqa.VQACollator(PAD)([sample])

    return (frames, speech, question), prompt


def test_an_answer_is_what_the_model_finds_most_likely_word_by_word(answerer, asked, tokenizer):
    question, prompt = asked
    answer = answerer.answer(*question, max_new_tokens=5)
    batch = without(prompt(), "labels")
    with torch.no_grad():
        for _ in range(answer.n_tokens):
            ids = answerer(**batch, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
            for name, value in (("input_ids", ids), ("mm_token_type_ids", torch.zeros_like(ids))):
                batch[name] = torch.cat([batch[name], value], dim=1)
    ids = batch["input_ids"][0, -answer.n_tokens :].tolist()
    assert answer.text == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert (answer.n_tokens, answer.stopped) == (5, False) or (ids[-1] in (IM_END, END_OF_TEXT) and answer.stopped)


def test_log_probabilities_are_those_of_a_separate_forward_pass(answerer, asked):
    candidates, (question, prompt) = ["Yes, NBI light is on.", "No."], asked
    found = answerer.answer(*question, max_new_tokens=1, candidates=candidates).log_probs
    assert list(found) == candidates
    for candidate in candidates:
        batch = prompt(candidate)
        labels = batch.pop("labels")[0]
        with torch.no_grad():
            log_probs = answerer(**batch).logits[0].log_softmax(-1)
        learned = (labels != -100).nonzero()[:, 0]
        assert labels[learned[-1]] == IM_END  # the stop token counts
        assert found[candidate] == pytest.approx(log_probs[learned - 1, labels[learned]].sum().item(), rel=1e-4)


def test_an_answer_says_whether_it_stopped_by_itself(fresh, processor, tokenizer, rows):
    model, emitted = fresh(), []
    model.processor = processor

    def emit(module, inputs, output):
        logits = torch.zeros_like(output)
        logits[:, -1, [315, 11, IM_END, 315][len(emitted)]] = 1.0
        emitted.append(1)
        return logits

    model.lm_head.register_forward_hook(emit)
    frames = [vqa.load_frame(rows[0].frame_paths[0], 56)]
    for limit, expected in ((10, (3, True)), (2, (2, False))):
        emitted.clear()
        answer = model.answer(frames, vqa.load_speech(rows[0].audio_path), max_new_tokens=limit)
        assert (answer.text, answer.n_tokens, answer.stopped) == (tokenizer.decode([315, 11]), *expected)


def test_what_can_be_asked(answerer):
    """Frames of any size and number, by ear or in words; hearing has an end."""
    big = Image.effect_noise((400, 300), 60).convert("RGB")
    assert "needs speech, a question in words" in refusal(answerer.answer, [big])
    message = refusal(answerer.answer, [big], np.zeros(5 * 16000, dtype=np.float32))
    assert "5.0 s" in message and "4.0" in message
    one, two = (answerer.answer([frame] * 3, question="?", candidates=["Yes."]) for frame in (big, vqa.shrink(big, 56)))
    assert one == two
    assert answerer.answer([big, big.resize((30, 60))], question="?", max_new_tokens=2).n_tokens >= 1
