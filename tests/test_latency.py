"""One question at a time: `model.answer` says what a batch says, in the same tokens; and the benchmark of latency."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import EVAL_DATA, PAD, refusal, stir
from PIL import Image

import train_vqa as vqa

SETTINGS = [("full", "images"), ("speech", "images"), ("speech", "video")]
FRAMES = (2, 8, 3)  # of the first three rows


@pytest.fixture(scope="module", params=["base", "adapter", "4 bits"])
def model(request, tiny, tokenizer):
    """A tiny model with random weights, or with an adapter that is kept apart, also on a base in 4 bits; its buffers
    live on from test to test."""
    four_bits = request.param == "4 bits"
    if four_bits:
        pytest.importorskip("bitsandbytes")
    model = vqa.load_model(tiny, tokenizer, init="random", seed=1, dtype=torch.float32, load_in_4bit=four_bits)
    return model if request.param == "base" else stir(vqa.add_lora(model, 4, 16)).eval().get_base_model()


def ask(model, row, mode, frames, **how):
    """`model.answer` about files."""
    speech = row.audio_path if mode != "text" else None
    question = row.question if mode != "audio" else None
    return model.answer(row.frame_paths[:frames], speech, question, **how)


@pytest.mark.parametrize("mode", ["audio", "text", "audio_text"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_tokens_are_those_of_a_batch(model, tokenizer, rows, mode, settings, monkeypatch):
    """Of any length, in any order, with and without a stop token: the second token of the first answer."""
    model.processor = vqa.VQAProcessor(tokenizer, model.config, 56, mode, *settings)
    samples = []
    for row, n in zip(rows, FRAMES, strict=False):
        frames = [vqa.load_frame(path, 56) for path in row.frame_paths[:n]]
        speech = vqa.load_speech(row.audio_path) if mode != "text" else None
        samples.append(model.processor.make_sample(row, frames, speech, with_answer=False))
    stop = vqa.answer_batch(model, samples[:1], PAD, [], 2)[0][0][1]
    for stops, limit in (([], 1), ([], 8), ([stop], 8)):
        monkeypatch.setattr(vqa, "stop_token_ids", lambda tokenizer, stops=stops: stops)
        expected = vqa.answer_batch(model, samples, PAD, stops, limit)
        answers = [ask(model, row, mode, n, max_new_tokens=limit) for row, n in zip(rows, FRAMES, strict=False)]
        assert [(a.ids, "eos" if a.stopped else "length") for a in answers] == expected
        assert [(a.n_tokens, a.text) for a in answers] == [
            (len(ids), tokenizer.decode(ids, skip_special_tokens=True).strip()) for ids, _ in expected
        ]
    assert answers[0].stopped and answers[0].n_tokens == 2


def test_files_and_what_was_decoded_of_them_are_answered_alike(model, tokenizer, rows):
    model.processor = vqa.VQAProcessor(tokenizer, model.config, 56)
    row = rows[0]
    how = {"max_new_tokens": 3, "candidates": ["Yes.", "No."]}
    from_files = model.answer(list(map(str, row.frame_paths)), str(row.audio_path), **how)
    frames = [vqa.decode_frame(path) for path in row.frame_paths]
    cut = [model.processor.cut_patches(vqa.shrink(frame, 56)) for frame in frames]
    for shown in (frames, cut):
        assert model.answer(shown, vqa.load_speech(row.audio_path), **how) == from_files
    assert list(from_files.ms) == ["media", "first_token", "decode", "candidates", "total"]
    *parts, total = from_files.ms.values()
    assert min(parts) > 0 and sum(parts) == pytest.approx(total)
    assert ask(model, row, "audio", 2, max_new_tokens=1).shares == {}


@pytest.mark.parametrize("settings", SETTINGS[1:])
def test_shares_of_candidates_are_those_of_their_own_forward_passes(model, tokenizer, rows, settings):
    """Whatever the answer was, and in any company."""
    model.processor = processor = vqa.VQAProcessor(tokenizer, model.config, 56, "audio", *settings)
    candidates, totals = ["Yes, NBI light is on.", "No.", ""], []
    frames = [vqa.load_frame(path, 56) for path in rows[0].frame_paths[:3]]
    for text in candidates:
        sample = processor.make_sample(replace(rows[0], answer=text), frames, vqa.load_speech(rows[0].audio_path), True)
        batch = vqa.VQACollator(PAD)([sample])
        with torch.no_grad():
            totals.append(-model(**batch).loss.item() * len(batch["answer_at"]))
    for limit in (1, 6):
        answer = ask(model, rows[0], "audio", 3, max_new_tokens=limit, candidates=candidates)
        assert list(answer.log_probs) == list(answer.shares) == candidates
        assert list(answer.log_probs.values()) == pytest.approx(totals, rel=1e-4)
        assert list(answer.shares.values()) == pytest.approx(np.exp(totals) / np.exp(totals).sum(), rel=1e-3)
        assert sum(answer.shares.values()) == pytest.approx(1)
    alone = ask(model, rows[0], "audio", 3, max_new_tokens=1, candidates=candidates[1:2])
    assert alone.log_probs["No."] == pytest.approx(totals[1], rel=1e-4) and alone.shares == {"No.": 1.0}


def test_a_replay_may_write_over_what_any_other_gave(model, tokenizer, rows, monkeypatch):
    """CUDA graphs share their memory: which results a graph spoils depends on the order in which all were captured."""
    model.processor = vqa.VQAProcessor(tokenizer, model.config, 56, "audio")
    expected = ask(model, rows[0], "audio", 3, max_new_tokens=6, candidates=["Yes.", "No."])
    plain, given = vqa.OneQuestion.replay, []

    def replay(self, function, *args):
        result = plain(self, function, *args)
        for old in given:
            old.fill_(9)
        given[:] = result if isinstance(result, tuple) else [result]
        return result

    monkeypatch.setattr(vqa.OneQuestion, "replay", replay)
    assert ask(model, rows[0], "audio", 3, max_new_tokens=6, candidates=["Yes.", "No."]) == expected


def test_media_that_are_damaged_get_the_words_of_the_command_line(model, tokenizer, data):
    """Also a JPEG at whose damage Pillow guesses."""
    model.processor = vqa.VQAProcessor(tokenizer, model.config, 56)
    row = vqa.load_rows(*data.args)[0]
    frame, speech = row.frame_paths[1], row.audio_path
    for path in (frame, speech):
        whole = path.read_bytes()
        half = len(whole) // 2
        guessed = [whole[:half] + b"\xff\0" * 8 + whole[half + 16 :]] if path == frame else []
        for content in (b"", whole[:-100], *guessed):
            path.write_bytes(content)
            message = refusal(ask, model, row, "audio", 3)
            assert str(path) in message and message in refusal(vqa.load_rows, *data.args) and "\n" not in message
        path.write_bytes(whole)
    assert "at least one frame" in refusal(model.answer, [], speech)
    assert refusal(model.answer, [frame.with_name("none.jpg")], speech).startswith(
        f"frame {frame.with_name('none.jpg')}"
    )


@pytest.mark.parametrize("frame_mode", ["images", "video"])
def test_frames_that_a_gpu_scales_are_those_of_pillow(model, tokenizer, frame_mode):
    """Bit for bit: of sizes that are scaled down, reduced first (also where pixels are left over), scaled to whole
    patches alone, and left as they are."""
    model.processor = processor = vqa.VQAProcessor(tokenizer, model.config, 84, "audio", "speech", frame_mode)
    drawn, single = np.random.default_rng(0), vqa.OneQuestion(model)
    for width, height in ((124, 108), (997, 171), (1920, 1080), (340, 338), (80, 61), (56, 84), (130, 800)):
        frame = Image.fromarray(drawn.integers(0, 256, (height, width, 3), np.uint8))
        expected, grid = processor.cut_patches(vqa.shrink(frame, 84))
        reduced = frame.reduce(vqa.reduction(frame.size, vqa.fit_size(frame.size, 84)))
        found = single.cut(vqa.copy_pixels(reduced), frame.size)
        assert torch.equal(found[0], expected) and found[1] == grid


@pytest.mark.parametrize("model", ["adapter", "4 bits"], indirect=True)
def test_compiled_layers_answer_alike_in_three_forms(model, tokenizer, rows, monkeypatch):
    """One for frames, one for prompts of all lengths, one for a token; candidates are read by plain layers."""
    model.processor = vqa.VQAProcessor(tokenizer, model.config, 56, "audio", "speech")
    how = {"max_new_tokens": 4, "candidates": ["Yes.", "No."]}
    questions = [(rows[0], "text", 3), (rows[1], "audio", 8), (rows[0], "audio_text", 4)]
    expected = [ask(model, *question, **how) for question in questions]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(model, "one_question", vqa.OneQuestion(model))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.one_question.compile()
    for question, answer in zip(questions, expected, strict=True):
        compiled = ask(model, *question, **how)
        assert compiled.ids == answer.ids
        assert list(compiled.log_probs.values()) == pytest.approx(list(answer.log_probs.values()), rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


def test_a_batch_is_answered_as_before(model, tokenizer, rows):
    """An answer leaves nothing behind in the decoder: not its attention, nor its cache."""
    model.processor = vqa.VQAProcessor(tokenizer, model.config, 56)
    dataset = vqa.SurgicalVQADataset(rows, model.processor, max_eval_frames=2, is_eval=True, with_answer=False)
    before = vqa.answer_batch(model, [dataset[0], dataset[3]], PAD, [], 4)
    kernel = model.model.language_model.config._attn_implementation
    ask(model, rows[0], "audio", 2, max_new_tokens=2)
    assert model.model.language_model.config._attn_implementation == kernel == "sdpa"
    assert vqa.answer_batch(model, [dataset[0], dataset[3]], PAD, [], 4) == before


def test_a_gpu_is_waited_for_in_no_part_that_becomes_a_cuda_graph(tokenizer, tiny):
    """On the meta device, where nothing can be read back, everything runs, of frames of one size."""
    model = vqa.load_model(tiny, tokenizer, init="random", dtype=torch.bfloat16, device="meta")
    model.processor = vqa.VQAProcessor(tokenizer, model.config, 56)
    single = vqa.OneQuestion(model)
    single.width = 512
    single.reserve()

    def of(*shape, dtype=torch.long):
        return torch.empty(shape, dtype=dtype, device="meta")

    with torch.inference_mode():
        patches = of(3 * 16, 588, dtype=torch.uint8), of(3 * 16, 2), of(4, dtype=torch.int32)
        assert single.encode(*patches, 16).shape == (3 * 4, 64)
        mel = of(1, vqa.audio_config_of(model.config).num_mel_bins, 400, dtype=torch.float32)
        assert model.encode_audio(mel, None).shape == (200, 64)
        state, logits = single.prefill(of(1, 128, 64, dtype=torch.bfloat16), of(3, 1, 128), of(3))
        assert single.step(state, 512).shape == (3,) and logits.shape == (512,)


def test_any_attention_kernel_gives_the_same_answer(fresh, processor, rows):
    answers = []
    for kernel in ("sdpa", "eager"):
        model = fresh(attn_implementation=kernel)
        model.processor = processor
        answers.append(ask(model, rows[0], "audio", 2, max_new_tokens=5))
    assert answers[0] == answers[1]


def test_the_transcriber_of_the_benchmark_writes_what_its_whisper_finds_most_likely(base, processor, rows):
    from benchmarks.latency import Transcriber

    transcriber = Transcriber(base, 6)
    mel, _ = processor.log_mel(vqa.load_speech(rows[0].audio_path), "")
    ids = transcriber(mel)
    fed = torch.tensor([[*transcriber.START, *ids]])
    with torch.no_grad():
        logits = transcriber.whisper(input_features=mel, decoder_input_ids=fed).logits[0]
    assert logits[len(transcriber.START) - 1 : -1].argmax(-1).tolist() == ids and len(ids) == 6
    assert transcriber.whisper.model.encoder is base.audio_encoder


@pytest.mark.slow
def test_the_benchmark_of_latency_measures_every_design(tiny, tmp_path, capsys):
    from benchmarks import latency

    flags = [
        "--model_name_or_path",
        tiny,
        "--data_path",
        EVAL_DATA[1],
        *EVAL_DATA[2:],
        "--repeats",
        1,
        "--seconds",
        "1",
    ]
    flags += ["--length_repeats", 1, "--frames", 2, "--max_image_size", 56, "--max_new_tokens", 3, "--profile"]
    flags = [*map(str, flags), "--precisions", "bf16", "--output", str(tmp_path / "latency.json")]
    latency.main(flags)
    report = json.loads((tmp_path / "latency.json").read_text())
    assert [r["design"] for r in report["designs"]] == list(latency.DESIGNS)
    for r in (*report["designs"], *report["lengths"]):
        ms = {part: values[0] for part, values in r["ms"].items()}
        assert ms["total"] > ms["media"] + ms["first_token"] + 2 * ms["each_token"] - 1 and min(ms.values()) > 0
        assert r["median"] == r["p95"] == pytest.approx(ms)
    assert [r["design"] for r in report["lengths"]] == ["speech", "video", "cascade", "cascade_video"]
    assert report["equal"]["bf16"]["video"]["answer_tokens"] == 1.0  # in float32 here
    assert "| bf16 | cascade_video | 1 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        latency.main([*flags, "--designs", "plain"])
    assert "--designs: 'plain'" in capsys.readouterr().err
