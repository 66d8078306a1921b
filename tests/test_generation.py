"""Generation in evaluate_checkpoint.py: batches, stops, settings, gates, arms, failures, resume."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import GenerationConfig

import evaluate_checkpoint as ev
import train_vqa as vqa
from tests import make_tiny_models
from tests.conftest import FIXTURES, FULL_SIZE

ROOT = Path(ev.__file__).resolve().parent
DATA = (
    *("--eval_data_path", str(FIXTURES / "smoke.jsonl"), "--frames_dir", str(FIXTURES / "frames")),
    *("--audio_dir", str(FIXTURES / "audio")),
)
QUICK = ("--max_new_tokens", "4")
IM_END, END_OF_TEXT = 482, 480


@pytest.fixture()
def fresh(tiny, tokenizer):
    """Builds a model of the test's own: same weights as `base`."""
    return lambda: vqa.load_model(tiny, tokenizer, init="random", seed=1, dtype=torch.float32)


@pytest.fixture(scope="session")
def base(tiny, tokenizer):
    """`tiny` with random weights, float32; tests must not change it."""
    return vqa.load_model(tiny, tokenizer, init="random", seed=1, dtype=torch.float32)


@pytest.fixture(scope="session")
def processor(tokenizer, base):
    """Frames of at most 56 px: 4 tokens each."""
    return vqa.VQAProcessor(tokenizer, base.config, max_image_size=56)


def write_checkpoint(folder, model, tiny, tokenizer):
    """What train_vqa.py leaves: `model`'s adapter, the tokenizer, and settings (2 frames of 56 px, seed 1, float32)."""
    flags = ["--train_data_path", "t.jsonl", "--frames_dir", "f", "--audio_dir", "a", "--output_dir", str(folder)]
    flags += ["--model_name_or_path", str(tiny), "--init", "random", "--seed", "1"]
    flags += ["--max_image_size", "56", "--max_eval_frames", "2", "--use_cpu", "True"]
    model_args, data_args, training_args = vqa.parse_arguments(flags)
    processor = vqa.VQAProcessor(tokenizer, model.config, 56)
    settings = vqa.resolved_settings(model_args, data_args, training_args, processor, vqa.fingerprint(model))
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    (folder / vqa.SETTINGS_FILE).write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def trained(tiny, tokenizer, tmp_path_factory):
    """A checkpoint whose LoRA is random: it answers nonsense, but its own."""
    model = vqa.load_model(tiny, tokenizer, init="random", seed=1, dtype=torch.float32)
    model = vqa.add_lora(model, r=4)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:  # both sides: PEFT draws A from the global generator, and then runs differ
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return write_checkpoint(tmp_path_factory.mktemp("trained"), model, tiny, tokenizer)


@pytest.fixture()
def checkpoint(trained, tmp_path):
    """A copy of `trained` to spoil: (folder, function that changes its settings)."""
    folder = shutil.copytree(trained, tmp_path / "checkpoint")

    def change(section, **values):
        settings = json.loads((folder / vqa.SETTINGS_FILE).read_text())
        settings[section].update(values)
        (folder / vqa.SETTINGS_FILE).write_text(json.dumps(settings))

    return folder, change


@pytest.fixture()
def evaluate(tmp_path, trained, capsys):
    """Run the script in this process; returns (status, rows, summary, printed, errors); None for files not written."""

    def run(*flags, checkpoint=trained, name="x", data=DATA):
        path = tmp_path / f"{name}.jsonl"
        flags = [*map(str, (*data, *QUICK, "--output_file", path, *flags))]
        status = ev.main(["--checkpoint_path", str(checkpoint), *flags] if checkpoint else flags)
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else None
        summary = json.loads(path.with_suffix(".summary.json").read_text()) if status != 2 else None
        return status, rows, summary, *capsys.readouterr()

    return run


@pytest.fixture()
def inputs(processor, rows):
    """The fixture rows as the audio arm presents them, with two frames."""
    dataset = vqa.SurgicalVQADataset(rows, processor, max_eval_frames=2, is_eval=True, with_answer=False)
    return ev.ArmInputs("audio", dataset, rows, 0)


def refusal(result):
    """The one line of a refused run that wrote neither rows nor figures."""
    status, rows, summary, _, errors = result
    assert (status, rows, summary) == (2, None, None)
    lines = [line for line in errors.splitlines() if "error: " in line]
    assert len(lines) == 1
    return lines[0].partition("error: ")[2]


@pytest.fixture()
def no_weights(monkeypatch):
    """Fails the test where weights would be loaded."""

    def load_model(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(vqa, "load_model", load_model)


# -------------------------------------------------------------------------------------------------- batches and stops


PAD, STOPS = 497, [IM_END, END_OF_TEXT]


@pytest.mark.parametrize(("audio_tokens", "frame_mode"), [("full", "images"), ("speech", "video")])
def test_a_batch_answers_exactly_as_its_samples_alone(base, tokenizer, rows, audio_tokens, frame_mode):
    """Prompts of different length: one to eight frames, questions and (trimmed to it) speech."""
    processor = vqa.VQAProcessor(tokenizer, base.config, 56, "audio_text", audio_tokens, frame_mode)
    samples = []
    for row, frames in zip(rows, (1, 8, 2, 5, 3), strict=True):
        dataset = vqa.SurgicalVQADataset([row], processor, max_eval_frames=frames, is_eval=True, with_answer=False)
        samples.append(dataset[0])
    assert len({len(sample["input_ids"]) for sample in samples}) >= 4
    together = ev.answer_batch(base, samples, PAD, STOPS, 12)
    alone = [ev.answer_batch(base, [sample], PAD, STOPS, 12)[0] for sample in samples]
    assert together == alone
    assert len({tuple(ids) for ids, _ in alone}) > 1


@pytest.mark.parametrize(("audio_tokens", "frame_mode"), [("full", "images"), ("speech", "video")])
@pytest.mark.parametrize("prefill", [1, 500, 10**6])
def test_answers_are_those_of_generate(base, tokenizer, rows, monkeypatch, audio_tokens, frame_mode, prefill):
    """Prompts of different length, read one by one, a few at a time, and all together."""
    processor = vqa.VQAProcessor(tokenizer, base.config, 56, "audio_text", audio_tokens, frame_mode)
    samples = []
    for row, frames in zip(rows, (1, 8, 2, 5, 3), strict=True):
        dataset = vqa.SurgicalVQADataset([row], processor, max_eval_frames=frames, is_eval=True, with_answer=False)
        samples.append(dataset[0])
    batch = vqa.VQACollator(PAD, "left")(samples)
    del batch["labels"]
    decoding = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=STOPS, pad_token_id=PAD)
    with torch.inference_mode():
        expected = base.generate(**batch, generation_config=decoding)[:, batch["input_ids"].shape[1] :].tolist()
    monkeypatch.setattr(ev, "PREFILL_TOKENS", prefill)
    answers = ev.answer_batch(base, iter(samples), PAD, STOPS, 12)
    assert [ids + [PAD] * (len(expected[0]) - len(ids)) for ids, _ in answers] == expected


def test_prompts_are_read_in_groups_of_bounded_size(monkeypatch):
    monkeypatch.setattr(ev, "PREFILL_TOKENS", 100)
    samples = [{"input_ids": torch.zeros(length)} for length in (40, 50, 51, 49, 101, 1, 30, 30)]
    sizes = [[len(sample["input_ids"]) for sample in group] for group in ev.grouped(samples)]
    assert sizes == [[40, 50], [51], [49], [101], [1, 30, 30]]
    assert list(ev.grouped([])) == []


def test_rows_of_a_batch_are_read_before_the_last_is_decoded():
    taken = []
    kept = ev.Kept(iter(taken.append(item) or item for item in "abc"))
    first, again = iter(kept), iter(kept)
    assert (next(first), next(first), taken) == ("a", "b", ["a", "b"])
    assert [*again] == [*kept] == ["a", "b", "c"]
    assert (next(first), taken) == ("c", ["a", "b", "c"])  # each item is taken once


@pytest.fixture()
def forced():
    """Makes a model emit given ids, one list a row, whatever it computes."""
    hooks = []

    def force(model, *answers):
        step = iter(range(100))

        def emit(module, inputs, output):
            column, logits = next(step), torch.zeros_like(output)
            for row, answer in enumerate(answers):
                logits[row, :, answer[column]] = 1.0
            return logits

        hooks.append(model.lm_head.register_forward_hook(emit))

    yield force
    for hook in hooks:
        hook.remove()


def test_each_row_stops_at_its_own_turn_end(base, processor, rows, forced):
    dataset = vqa.SurgicalVQADataset(rows, processor, max_eval_frames=1, is_eval=True, with_answer=False)
    forced(base, [40, 41, IM_END, 9, 9], [END_OF_TEXT, 9, 9, 9, 9], [40, 41, 42, 43, 44], [1, 2, 3, 4, IM_END])
    answers = ev.answer_batch(base, [dataset[i] for i in range(4)], PAD, [END_OF_TEXT, IM_END], 5)
    assert answers == [
        ([40, 41, IM_END], "eos"),
        ([END_OF_TEXT], "eos"),
        ([40, 41, 42, 43, 44], "length"),
        ([1, 2, 3, 4, IM_END], "eos"),  # the turn ends with the last token allowed
    ]


def test_generation_at_the_real_ids_and_152064_rows(tmp_path, rows, forced, capsys):
    """A vocabulary without holes, as Qwen2's: dummy entries fill the ids below the special tokens."""
    first = make_tiny_models.REAL_FIRST_SPECIAL_ID
    bpe = json.loads(make_tiny_models.train_bpe(make_tiny_models.fixture_wording()).to_str())
    bpe["model"]["vocab"] |= {f"\u0100{i}": i for i in range(make_tiny_models.N_BPE, first)}
    full = make_tiny_models.with_special_tokens(make_tiny_models.Tokenizer.from_str(json.dumps(bpe)), first)
    real, config = make_tiny_models.FULL_SIZE, dict(make_tiny_models.TINY)
    config |= {name: real[name] for name in real if name.endswith("_token_id") or name == "vocab_size"}
    config["audio_config"] = {**config["audio_config"], "max_source_positions": 200}
    make_tiny_models.write_model_dir(tmp_path / "model", config, full, first)

    tokenizer = vqa.load_tokenizer(tmp_path / "model")
    assert capsys.readouterr().out == (
        "🔧 Setting dedicated pad token (was same as EOS)\n"
        "   PAD token: '<|pad|>' (ID: 151660)\n"
        "   EOS token: '<|endoftext|>' (ID: 151643)\n"
    )
    model = vqa.load_model(tmp_path / "model", tokenizer, init="random", seed=1, dtype=torch.float32)
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == 152064
    tokenizer.save_pretrained(tmp_path / "saved")
    assert vqa.load_tokenizer(tmp_path / "saved").pad_token_id == 151660

    processor = vqa.VQAProcessor(tokenizer, model.config, 56)
    dataset = vqa.SurgicalVQADataset(rows, processor, max_eval_frames=1, is_eval=True, with_answer=False)
    forced(model, [300, 151645, 300], [151643, 300, 300])
    samples = [dataset[0], dataset[1]]
    answers = ev.answer_batch(model, samples, tokenizer.pad_token_id, vqa.turn_end_ids(tokenizer), 3)
    assert answers == [([300, 151645], "eos"), ([151643], "eos")]


def test_decoding_ahead_keeps_the_order_and_its_distance():
    begun = []
    results = vqa.ahead(lambda item: begun.append(item) or item, range(100), 3)
    assert next(results) == 0
    assert max(begun) <= 3
    assert list(results) == list(range(1, 100))


def test_words_are_tokenised_one_call_at_a_time(inputs, monkeypatch):
    """A fast tokenizer keeps a call's settings in itself: a second thread would split the first one's tokens."""
    inside, encode = [], inputs.processor.tokenizer.encode

    def watched(*args, **kwargs):
        inside.append(len(inside))
        time.sleep(0.001)
        ids = encode(*args, **kwargs)
        assert inside.pop() == 0
        return ids

    monkeypatch.setattr(inputs.processor.tokenizer, "encode", watched)
    assert all(isinstance(sample, dict) for sample in vqa.ahead(inputs.sample, [0, 1, 2, 3, 4] * 2, 10))


# ---------------------------------------------------------------------------------------------------- rows and summary


def test_rows_and_summary_of_a_run(evaluate, trained):
    status, rows, summary, printed, _ = evaluate("--limit", 2)
    assert status == 0
    assert list(rows[0]) == [
        *("id", "video_id", "question_type", "question", "ground_truth", "short_answer", "predicted_answer"),
        *("correct", "strict_correct", "choice_correct", "finish_reason", "n_tokens", "input_mode", "audio_file"),
        "media_sha256",
    ]
    assert rows[0] | {"predicted_answer": "", "media_sha256": ""} == {
        "id": "qa_000101",
        "video_id": "fx-001",
        "question_type": "nbi_status",
        "question": "Has the narrow band light been switched on?",
        "ground_truth": "Yes, NBI light is on in these frames.",
        "short_answer": "yes",
        "predicted_answer": "",
        "correct": False,
        "strict_correct": False,
        "choice_correct": False,
        "finish_reason": "length",
        "n_tokens": 4,
        "input_mode": "audio",
        "audio_file": str(FIXTURES / "audio" / "fx-001_qa_000101_nbi_status.wav"),
        "media_sha256": "",
    }
    assert (summary["n_total"], summary["finish"]["length"]) == (2, 2)
    manifest = summary["manifest"]
    assert manifest["input"] == {
        "input_mode": "audio",
        "audio_tokens": "full",
        "encoder_tokens": 200,
        "frame_mode": "images",
        "max_eval_frames": 2,
        "max_image_size": 56,
        "prompt": "<|im_start|>user\n<|audio_bos|><|audio_eos|>\n<|vision_start|><|image_pad|><|vision_end|>"
        "Answer the question concisely based on the visual and audio evidence.<|im_end|>\n<|im_start|>assistant\n",
    }
    assert manifest["model"]["base_fingerprint"] == vqa.load_settings(trained)["model"]["base_fingerprint"]
    assert manifest["sha256"]["adapter"] == ev.sha256_file(trained / "adapter_model.safetensors")
    assert manifest["decoding"]["stop_ids"] == [END_OF_TEXT, IM_END]
    assert manifest["gates"]["speech"] > 0 < manifest["gates"]["frames"]
    assert manifest["runtime"]["rows_answered"] == 2
    for line in (
        f"📁 Loading Eval Data: {FIXTURES / 'smoke.jsonl'}",
        "   Using 2 frames (evenly sampled) to reduce eval memory",
        "⏳ Loading merged FP32 model with SDPA attention...",
        "✓ Model loaded in full FP32",
    ):
        assert f"{line}\n" in printed


def test_flags_win_over_the_settings_of_the_checkpoint(evaluate):
    flags = ("--max_eval_frames", 0, "--max_image_size", 28, "--input_mode", "text", "--dtype", "bfloat16")
    status, rows, summary, printed, _ = evaluate(*flags, "--limit", 1, data=DATA[:4])  # no --audio_dir
    assert status == 0
    assert (rows[0]["input_mode"], rows[0]["audio_file"]) == ("text", None)
    inputs = summary["manifest"]["input"]
    assert (inputs["max_eval_frames"], inputs["max_image_size"]) == (None, 28)
    assert "✓ Model loaded in full BF16\n" in printed
    assert summary["manifest"]["gates"]["speech"] is None


def test_the_base_alone_and_the_same_weights_as_a_merged_model(evaluate, base, tiny, tokenizer, tmp_path):
    flags = ("--max_image_size", 56, "--max_eval_frames", 2, "--limit", 2)
    zero_shot = ("--model_name_or_path", tiny, "--init", "random", "--seed", 1)
    status, rows, summary, *_ = evaluate(*flags, *zero_shot, checkpoint=None)
    assert status == 0
    assert summary["manifest"]["model"]["adapter"] is None
    assert summary["manifest"]["model"]["base_fingerprint"] == vqa.fingerprint(base)
    assert summary["manifest"]["seeds"]["init"] == 1

    shutil.copytree(tiny, tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    save_file(dict(base.named_parameters()), tmp_path / "merged" / "model.safetensors")
    status, merged_rows, *_ = evaluate(*flags, checkpoint=tmp_path / "merged", name="merged")
    assert (status, merged_rows) == (0, rows)
    complaint = refusal(evaluate(*zero_shot[:2], checkpoint=tmp_path / "merged", name="both"))
    assert complaint == f"--checkpoint_path {tmp_path / 'merged'} is a whole model; leave --model_name_or_path out"


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_folder_without_a_checkpoint_names_the_ones_inside(evaluate, tmp_path, trained, no_weights):
    (tmp_path / "run").mkdir()
    start = f"--checkpoint_path {tmp_path / 'run'}: no adapter (adapter_config.json) and no model (config.json) there; "
    complaint = refusal(evaluate(checkpoint=tmp_path / "run"))
    assert complaint == start + "name a folder that training wrote"
    shutil.copytree(trained, tmp_path / "run" / "checkpoint-3")
    complaint = refusal(evaluate(checkpoint=tmp_path / "run"))
    assert complaint == start + "it holds checkpoint-3: name one of them"


def test_settings_that_this_script_would_not_repeat_are_refused(evaluate, checkpoint):
    folder, change = checkpoint
    change("input", instruction="Say something.")
    assert "trained with the instruction 'Say something.'" in refusal(evaluate(checkpoint=folder))
    change("input", instruction=vqa.INSTRUCTION, encoder_tokens=750)
    assert "trained with 750 audio tokens a question, this base makes 200" in refusal(evaluate(checkpoint=folder))
    (folder / vqa.SETTINGS_FILE).write_text("{}")
    assert refusal(evaluate(checkpoint=folder)).startswith(f"{folder / vqa.SETTINGS_FILE}: no readable settings")


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"init_seed": 2}, "another seed, kind of device or torch version draws other weights"),
        ({"init_device": "xpu"}, "its random base was drawn on xpu, and cpu draws other numbers"),
    ],
)
def test_a_base_that_comes_out_differently_is_refused(evaluate, checkpoint, changed, complaint):
    folder, change = checkpoint
    change("model", **changed)
    assert complaint in refusal(evaluate(checkpoint=folder))


def test_an_init_that_contradicts_the_checkpoint_is_refused(evaluate, trained, no_weights):
    assert refusal(evaluate("--init", "pretrained")) == (
        f"--init pretrained: {trained} was not trained so; leave the flag out"
    )


def test_speech_is_needed_where_it_is_heard(evaluate, no_weights):
    assert refusal(evaluate(data=DATA[:4])).startswith("--audio_dir must be given")
    flags = ("--input_mode", "text", "--arms", "silent_audio")
    assert refusal(evaluate(*flags)) == "--arms silent_audio: in text mode the model hears nothing; drop the arm"


def test_media_that_cannot_be_read_are_refused_before_weights_load(evaluate, data, no_weights):
    (data.audio / "qa_000205.ogg").write_bytes(b"OggS")
    flags = ("--eval_data_path", data.jsonl, "--frames_dir", data.frames, "--audio_dir", data.audio)
    complaint = refusal(evaluate(data=flags))
    assert complaint.startswith(f"{data.jsonl}:5: speech {data.audio / 'qa_000205.ogg'} cannot be decoded")


def test_links_out_of_the_folders_need_a_flag(evaluate, data, tmp_path):
    speech = data.audio / "fx-001_qa_000101_nbi_status.wav"
    speech.rename(tmp_path / "elsewhere.wav")
    speech.symlink_to(tmp_path / "elsewhere.wav")
    flags = ("--eval_data_path", data.jsonl, "--frames_dir", data.frames, "--audio_dir", data.audio, "--limit", 1)
    assert f"speech {speech} is a link out of {data.audio}; see --allow_symlinks" in refusal(evaluate(data=flags))
    assert evaluate("--allow_symlinks", data=flags)[0] == 0


# ------------------------------------------------------------------------------------------------------------ failures


def test_allowed_errors_stay_in_the_denominator(evaluate, data):
    (data.audio / "qa_000205.ogg").write_bytes(b"OggS")
    (data.audio / "fx-002_qa_000203.flac").unlink()
    (data.frames / "fx-001" / "fx-001_1204.jpg").write_bytes(b"\xff\xd8")
    flags = ("--eval_data_path", data.jsonl, "--frames_dir", data.frames, "--audio_dir", data.audio)
    status, rows, summary, _, errors = evaluate("--allow_errors", "--batch_size", 2, data=flags)
    assert status == 1
    assert (summary["n_total"], summary["n_errors"], summary["metrics"]["choice"]["n"]) == (5, 4, 5)
    assert summary["failed"] == [
        "fx-001/qa_000101/nbi_status",
        "fx-001/qa_000102/scope_motion_type",
        "fx-002/qa_000203/nbi_status",
        "fx-002/qa_000205/tool_identification",
    ]
    assert rows != sorted(rows, key=ev.row_key)  # in the file, what cannot be read comes first
    rows = sorted(rows, key=ev.row_key)
    assert [row["finish_reason"] for row in rows] == ["error", "error", "length", "error", "error"]
    assert (rows[0]["predicted_answer"], rows[0]["n_tokens"], rows[0]["correct"]) == (None, 0, False)
    assert "cannot be decoded" in rows[0]["error"]
    assert rows[3]["error"] == f"{data.jsonl}:3: the speech is missing"
    assert errors.count("(--allow_errors: counted as wrong)") == 3  # three files; two rows share the frame
    status, again, *_ = evaluate("--allow_errors", data=flags)
    assert (status, sorted(again, key=ev.row_key)) == (1, rows)  # resumed: still an error


def test_one_speech_file_for_two_questions_is_refused_whatever_is_allowed(evaluate, data, no_weights):
    data.rewrite(lambda rows: [rows[4], {**rows[4], "question_type": "other", "question": "Another one?"}])
    flags = ("--eval_data_path", data.jsonl, "--frames_dir", data.frames, "--audio_dir", data.audio)
    assert f"{data.jsonl}:2: asks another question than" in refusal(evaluate("--allow_errors", data=flags))


def test_memory_that_does_not_suffice_is_one_line_and_keeps_the_rows(evaluate, monkeypatch, tmp_path):
    answer, calls = ev.answer_batch, []

    def fail_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer(*args)

    monkeypatch.setattr(ev, "answer_batch", fail_at_the_second)
    (tmp_path / "x.summary.json").write_text("{}")
    status, rows, _, _, errors = evaluate("--batch_size", 2)
    assert not (tmp_path / "x.summary.json").exists()  # an earlier run's figures beside rows of this one
    assert (status, len(rows)) == (2, 2)
    assert "error: --batch_size 2 does not fit into the GPU memory; run the same command with a smaller one" in errors
    status, more, *_ = evaluate("--batch_size", 1)
    assert (status, len(more)) == (0, 5)
    assert more[:2] == rows


def test_a_batch_that_does_not_fit_is_halved_where_the_size_is_left_to_us(evaluate, monkeypatch, capsys):
    _, rows, *_ = evaluate("--batch_size", 1, name="alone")
    answer, sizes = ev.answer_batch, []

    def answer_two(model, samples, *args):
        samples = list(samples)
        sizes.append(len(samples))
        if len(samples) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer(model, samples, *args)

    monkeypatch.setattr(ev, "answer_batch", answer_two)
    status, halved, summary, printed, _ = evaluate("--batch_size", "auto")
    assert (status, halved, sizes) == (0, rows, [5, 4, 2, 2, 1])
    assert "   The GPU memory is full: going on with batches of 2\n" in printed
    assert summary["manifest"]["decoding"]["batch_size"] == "auto"
    assert summary["manifest"]["runtime"]["batch_size"] == {"audio": 2}

    def answer_none(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ev, "answer_batch", answer_none)
    status, _, _, _, errors = evaluate(name="none")
    assert status == 2
    assert "error: --batch_size auto does not fit into the GPU memory" in errors


def test_batches_that_fit(base):
    """Qwen2-VL-7B's shapes by hand: 28 layers, 4 of 28 heads of 128 hold keys and values, MLP of 18944, bfloat16."""
    text = vqa.load_config(FULL_SIZE).text_config
    reading = 16384 * 2 * (4 * 18944 + 16 * 3584)
    row = (2904 + 12) * 2 * (2 * 128 * 4 * 30 + 2 * 128 * 28)
    assert ev.batch_that_fits(reading + 3 * row, text, torch.bfloat16, 2904, 12) == 3
    assert ev.batch_that_fits(reading + 3 * row - 1, text, torch.bfloat16, 2904, 12) == 2
    assert ev.batch_that_fits(0, text, torch.bfloat16, 2904, 12) == 1
    assert ev.batch_that_fits(reading + 500 * row, text, torch.bfloat16, 2904, 12) == ev.AUTO_BATCH_SIZE
    assert ev.batch_that_fits(reading + 3 * row, text, torch.float32, 2904, 12) == 1
    assert ev.choose_batch_size(base, 2904, 12, 0) == ev.CPU_BATCH_SIZE  # no GPU


@pytest.mark.parametrize("size", ["0", "-1", "many", "2.5"])
def test_a_batch_size_is_a_number_or_auto(evaluate, size, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate("--batch_size", size)
    assert stop.value.code == 2
    assert "argument --batch_size: " in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- merge


ALL_ARMS = ("--arms", "audio_text,text,mismatched_audio,silent_audio,black_frames,shuffled_frames,first_frame")


def test_merged_apart_and_in_any_batch_the_answers_are_the_same(evaluate, tmp_path):
    """Every arm, in float32. The adapter does change the answers: without it they are others."""

    def answers(name):
        texts = {}
        for path in tmp_path.glob(f"{name}*.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            texts[path.name.removeprefix(name)] = {ev.row_key(row): row["predicted_answer"] for row in rows}
        return texts

    _, _, summary, *_ = evaluate(*ALL_ARMS, "--limit", 3, name="merged")
    assert summary["manifest"]["model"]["adapter_merged"] is True
    _, _, summary, *_ = evaluate(*ALL_ARMS, "--limit", 3, "--no_merge", "--batch_size", 1, name="apart")
    assert summary["manifest"]["model"]["adapter_merged"] is False
    evaluate(*ALL_ARMS, "--limit", 3, "--batch_size", 2, name="pairs")
    merged = answers("merged")
    assert {len(rows) for rows in merged.values()} == {3}
    assert len(merged) == 8
    assert answers("apart") == answers("pairs") == merged


def test_rows_answered_apart_are_not_mixed_with_merged_ones(evaluate):
    evaluate("--no_merge", "--limit", 1)
    status, _, _, _, errors = evaluate("--limit", 2)
    assert status == 2
    assert "its rows come from another run; adapter_merged (False then, True now)" in errors


def test_no_merge_without_an_adapter_is_refused(evaluate, tiny, no_weights):
    complaint = refusal(evaluate("--no_merge", "--model_name_or_path", tiny, "--init", "random", checkpoint=None))
    assert complaint == "--no_merge: there is no adapter to keep apart; leave it out"


def test_an_unknown_attention_is_refused_before_the_data_is_read(evaluate):
    complaint = refusal(evaluate("--attn_implementation", "foo", "--eval_data_path", "nowhere.jsonl"))
    assert complaint == "--attn_implementation must be one of sdpa, eager, flash_attention_2, not 'foo'"


def test_a_base_in_4_bits_keeps_the_adapter_apart_and_says_so(checkpoint, capsys):
    folder, change = checkpoint
    change("model", load_in_4bit=True)
    args = ev.build_parser().parse_args(["--checkpoint_path", str(folder)])
    args.checkpoint_path = folder
    assert ev.read_subject(args, "cpu").merged is False
    assert "the base is kept in 4 bits, which cannot take the adapter in; it stays apart" in capsys.readouterr().out
    args.no_merge = True
    assert ev.read_subject(args, "cpu").merged is False
    assert "4 bits" not in capsys.readouterr().out


def test_merging_rounds_once_and_keeps_the_projector_as_trained(trained, tiny, tokenizer):
    def loaded():
        model = vqa.load_model(tiny, tokenizer, init="random", seed=1, dtype=torch.float32)
        for weight in model.parameters():
            weight.data = weight.data.bfloat16().float()
        return vqa.load_adapter(model, trained)

    exact, rounded = vqa.fold_adapter(loaded()), loaded()
    base = rounded.get_base_model()
    for name, weight in base.named_parameters():
        if "lora_" not in name and "modules_to_save" not in name:
            weight.data = weight.data.bfloat16()
    rounded = vqa.fold_adapter(rounded)
    assert rounded.audio_projector.weight.dtype == torch.float32
    names = [name for name, _ in exact.named_parameters()]
    assert names == [name for name, _ in rounded.named_parameters()]
    assert not any("lora" in name or "modules_to_save" in name for name in names)
    merged = dict(rounded.named_parameters())
    for name, weight in exact.named_parameters():
        if "_proj." in name and ".language_model." in name:
            assert torch.equal(merged[name], weight.bfloat16())


# --------------------------------------------------------------------------------------------------- batches by length


def test_the_longest_prompts_come_first_and_a_resumed_run_answers_the_same(evaluate, data, tmp_path, monkeypatch):
    """Clips of 1 to 8 frames; torn inside a batch, the rest of that batch is answered with the rows it stood with."""
    data.rewrite(
        lambda rows: [{**row, "frames": row["frames"][:n]} for row, n in zip(rows, (2, 8, 1, 5, 3), strict=True)]
    )
    flags = ("--eval_data_path", data.jsonl, "--frames_dir", data.frames, "--audio_dir", data.audio)
    flags = (*flags, "--max_eval_frames", 0, "--batch_size", 2)
    _, rows, *_ = evaluate(data=flags, name="whole")
    stored = [json.loads(line) for line in data.jsonl.read_text().splitlines()]
    assert [row["id"] for row in rows] == [stored[i]["id"] for i in (1, 3, 4, 0, 2)]
    evaluate(data=flags)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    batches, answer = [], ev.answer_batch

    def watched(model, samples, *args):
        samples = list(samples)
        batches.append([len(sample["input_ids"]) for sample in samples])
        return answer(model, samples, *args)

    monkeypatch.setattr(ev, "answer_batch", watched)
    _, resumed, *_ = evaluate(data=flags)
    assert resumed == rows
    assert [len(batch) for batch in batches] == [2, 1]
    assert batches[0][0] > batches[0][1] > batches[1][0]


@pytest.mark.parametrize("arm", ["audio", "mismatched_audio", "first_frame", "text"])
@pytest.mark.parametrize(("audio_tokens", "frame_mode"), [("full", "images"), ("speech", "video")])
def test_lengths_are_known_without_decoding(base, tokenizer, rows, arm, audio_tokens, frame_mode):
    mode = "text" if arm == "text" else "audio_text"
    processor = vqa.VQAProcessor(tokenizer, base.config, 56, mode, audio_tokens, frame_mode)
    dataset = vqa.SurgicalVQADataset(rows, processor, max_eval_frames=3, is_eval=True, with_answer=False)
    heard = [*rows[1:], rows[0]] if arm == "mismatched_audio" else rows
    inputs = ev.ArmInputs(arm, dataset, heard, 0)
    expected = [len(inputs.sample(index)["input_ids"]) for index in range(len(rows))]
    assert [inputs.length(index) for index in range(len(rows))] == expected


# --------------------------------------------------------------------------------------------------------------- gates


def test_a_living_model_passes_the_gates(base, inputs):
    ev.check_leaks([inputs])
    assert all(distance > 0 for distance in ev.check_liveness(base, inputs).values())


def test_a_model_whose_speech_is_cut_off_fails(fresh, inputs):
    model = fresh()
    model.audio_projector.weight.data.zero_()
    with pytest.raises(
        ev.InputError, match="liveness gate: the path of speech is dead: with other speech every logit stays"
    ):
        ev.check_liveness(model, inputs)


def test_a_model_whose_frames_are_cut_off_fails(fresh, inputs):
    model = fresh()
    model.model.visual.merger.mlp[2].weight.data.zero_()
    with pytest.raises(ev.InputError, match="liveness gate: the path of frames is dead"):
        ev.check_liveness(model, inputs)


def test_a_model_that_does_not_repeat_itself_fails(fresh, inputs):
    model = fresh()
    model.lm_head.register_forward_hook(lambda module, given, output: output + torch.rand(1))
    with pytest.raises(ev.InputError, match="liveness gate: the same speech and frames give different logits"):
        ev.check_liveness(model, inputs)


def test_a_failed_gate_leaves_no_rows_and_no_figures(evaluate, fresh, tiny, tokenizer, tmp_path):
    model = vqa.add_lora(fresh(), r=4)
    model.audio_projector.modules_to_save["default"].weight.data.zero_()
    next(weight for name, weight in model.named_parameters() if "lora_B" in name).data.fill_(0.1)
    deaf = write_checkpoint(tmp_path / "deaf", model, tiny, tokenizer)
    result = evaluate(checkpoint=deaf)
    assert refusal(result).startswith("liveness gate: the path of speech is dead")
    assert "Accuracy" not in result[3]
    assert not list(tmp_path.glob("x*"))


def test_a_prompt_that_gives_the_question_away_is_caught(inputs, base, tokenizer, monkeypatch):
    with_text = vqa.VQAProcessor(tokenizer, base.config, 56, "audio_text")
    ev.check_leaks([ev.ArmInputs("audio_text", vqa.SurgicalVQADataset(inputs.rows, with_text), inputs.rows, 0)])
    monkeypatch.setattr(inputs.processor, "build", with_text.build)
    with pytest.raises(ev.InputError) as caught:
        ev.check_leaks([inputs])
    assert str(caught.value).startswith(
        "leak gate: in the arm audio the prompt of fx-001/qa_000101/nbi_status holds words of its question "
        "(band, been, has, light, narrow, on, switched, the)"
    )


# ---------------------------------------------------------------------------------------------------------------- arms


def test_what_the_arms_change():
    frames = [Image.new("RGB", (3, 2), (value, 0, 9)) for value in range(6)]
    speech = np.array([0.5, -0.25], dtype=np.float32)

    def colours(arm, draw="0/a"):
        changed, heard = ev.change_inputs(arm, frames, speech, draw)
        assert all(frame.size == (3, 2) for frame in changed)
        assert heard.tolist() == ([0, 0] if arm == "silent_audio" else [0.5, -0.25])
        assert heard.dtype == np.float32
        return [frame.getpixel((0, 0)) for frame in changed]

    plain = [(value, 0, 9) for value in range(6)]
    for arm in ("audio", "text", "audio_text", "mismatched_audio", "silent_audio"):
        assert colours(arm) == plain
    assert colours("black_frames") == [(0, 0, 0)] * 6
    assert colours("first_frame") == plain[:1]
    assert sorted(colours("shuffled_frames")) == plain
    assert colours("shuffled_frames") == colours("shuffled_frames") != colours("shuffled_frames", "1/a")


def test_a_shuffle_always_changes_the_order():
    pair = [Image.new("L", (1, 1), value) for value in (0, 1)]
    for draw in range(20):  # half of all shuffles of two would leave them
        assert ev.change_inputs("shuffled_frames", pair, None, str(draw))[0] == pair[::-1]
    assert ev.change_inputs("shuffled_frames", pair[:1], None, "0")[0] == pair[:1]


def test_arms_in_one_load(evaluate, tmp_path, monkeypatch):
    loads, load = [], vqa.load_model
    monkeypatch.setattr(vqa, "load_model", lambda *args, **kwargs: loads.append(args) or load(*args, **kwargs))
    status, rows, summary, printed, _ = evaluate("--arms", "mismatched_audio,text,black_frames", "--limit", 3)
    assert (status, len(loads)) == (0, 1)
    assert list(summary["arms"]) == [
        "audio",
        "mismatched_audio",
        "text",
        "black_frames",
    ]  # the main arm is always there
    stored = {
        arm: [json.loads(line) for line in (tmp_path / f"x.{arm}.jsonl").read_text().splitlines()]
        for arm in list(summary["arms"])[1:]
    }
    questions = {row["question_type"]: row for row in rows}
    assert len(questions) == 2
    for row in stored["mismatched_audio"]:
        assert row["audio_of"].split("/")[2] != row["question_type"]
        assert row["audio_of"].split("/")[1] in row["audio_file"]
        assert row["input_mode"] == "audio"
    assert {row["input_mode"] for row in stored["text"]} == {"text"}
    assert {row["audio_file"] for row in stored["text"]} == {None}
    assert [row["audio_file"] for row in stored["black_frames"]] == [row["audio_file"] for row in rows]
    assert "audio_of" not in stored["black_frames"][0]
    assert "arm               choice" in printed
    answers = {arm: [row["predicted_answer"] for row in part] for arm, part in stored.items()}
    assert all(given != [row["predicted_answer"] for row in rows] for given in answers.values())


# -------------------------------------------------------------------------------------------------------------- resume


def without_times(summary):
    manifest = {name: value for name, value in summary["manifest"].items() if name not in ("runtime", "flags")}
    return {**summary, "manifest": manifest}


def test_a_torn_run_goes_on_to_the_same_rows_and_summary(evaluate, tmp_path):
    _, rows, summary, *_ = evaluate("--batch_size", 2, name="whole")
    evaluate("--batch_size", 2)
    path = tmp_path / "x.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:50])  # torn inside the second batch
    _, resumed, resumed_summary, *_ = evaluate("--batch_size", 2)
    assert resumed == rows
    assert resumed_summary["manifest"]["runtime"]["rows_answered"] == 2
    resumed_summary["arms"]["audio"]["file"] = "whole.jsonl"
    assert without_times(resumed_summary) == without_times(summary)


def test_a_larger_limit_goes_on_and_other_decoding_does_not(evaluate, tmp_path):
    arms = ("--arms", "mismatched_audio")
    _, rows, *_ = evaluate(*arms, name="whole")
    _, first, *_ = evaluate(*arms, "--limit", 2)
    status, both, summary, *_ = evaluate(*arms)
    assert (status, both, both[:2]) == (0, rows, first)
    assert summary["manifest"]["runtime"]["rows_answered"] == 6
    status, _, _, _, errors = evaluate(*arms, "--max_new_tokens", 5)
    assert status == 2
    assert "its rows come from another run; max_new_tokens (4 then, 5 now)" in errors
    assert (tmp_path / "x.summary.json").exists()
    assert evaluate(*arms, "--max_new_tokens", 5, "--overwrite")[0] == 0


def test_speech_exchanged_between_two_runs_is_noticed(evaluate, data, tmp_path):
    flags = ("--eval_data_path", data.jsonl, "--frames_dir", data.frames, "--audio_dir", data.audio)
    evaluate("--limit", 2, data=flags)
    shutil.copy(FIXTURES / "audio" / "qa_000205.ogg", data.audio / "fx-001_qa_000101_nbi_status.ogg")
    (data.audio / "fx-001_qa_000101_nbi_status.wav").unlink()
    status, _, _, _, errors = evaluate(data=flags)
    assert status == 2
    assert "the frames or speech of fx-001/qa_000101/nbi_status are not the ones that its row was made from" in errors
    assert (tmp_path / "x.summary.json").exists()


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(tmp_path, trained, data):
    """24 rows, one at a time; the kill falls while libraries load, at the gates or among the rows."""
    for n in range(24):
        shutil.copy(data.audio / "qa_000205.ogg", data.audio / f"many_{n}.ogg")
    data.rewrite(lambda rows: [{**rows[4], "id": f"many_{n}", "frames": rows[n % 4]["frames"]} for n in range(24)])
    flags = ["--eval_data_path", data.jsonl, "--frames_dir", data.frames, "--audio_dir", data.audio]
    flags += ["--checkpoint_path", trained, "--batch_size", "2", *QUICK]

    def run(name, kill=None):
        """Kill after `kill` seconds, counted from the start, or from the first row where it is negative."""
        path = tmp_path / f"{name}.jsonl"
        command = [sys.executable, ROOT / "evaluate_checkpoint.py", *flags, "--output_file", path]
        with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            if kill is None:
                process.communicate()
                return process.returncode, path
            if kill < 0:
                size = path.stat().st_size if path.exists() else 0
                while process.poll() is None and not (path.exists() and path.stat().st_size > size):
                    time.sleep(0.01)
            time.sleep(abs(kill))
            process.send_signal(signal.SIGKILL)
            return None, path

    status, whole = run("whole")
    assert status == 0
    draw = random.Random(int(os.environ.get("VQA_KILL_SEED", "0")))
    for n in range(10):
        run("killed", draw.uniform(0, 10) if n < 3 else -draw.uniform(0, 0.5))
    status, killed = run("killed")
    assert status == 0
    assert sorted(killed.read_text().splitlines()) == sorted(whole.read_text().splitlines())
    summaries = [json.loads(path.with_suffix(".summary.json").read_text()) for path in (killed, whole)]
    summaries[0]["arms"]["audio"]["file"] = "whole.jsonl"
    assert without_times(summaries[0]) == without_times(summaries[1])


# --------------------------------------------------------------------------------------------------------------- speed


def test_the_benchmark_of_speed_runs_every_design(tiny, tmp_path, capsys, monkeypatch):
    """On the tiny model: all rows are answered with as many tokens as asked for, and counted; batches alike."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import generate_speed

    flags = ["--model_name_or_path", tiny, "--data_path", DATA[1], "--frames_dir", DATA[3], "--audio_dir", DATA[5]]
    flags += ["--rows", 7, "--seed_rows", 2, "--max_image_size", 56, "--frames", 2, "--max_new_tokens", 3]
    answers, append = {}, ev.RowFile.append

    def kept(self, row):
        answers.setdefault(design[-1], []).append(row["predicted_answer"])
        append(self, row)

    design, answer = [], generate_speed.measure
    monkeypatch.setattr(generate_speed.ev.RowFile, "append", kept)
    monkeypatch.setattr(generate_speed, "measure", lambda name, *args: design.append(name) or answer(name, *args))
    designs = ["--designs", ",".join(generate_speed.DESIGNS)]
    generate_speed.main([*map(str, flags), *designs, "--output", str(tmp_path / "speed.json"), "--profile", "1"])
    assert answers["ours"] == answers["grouped"] == answers["graphs"]
    assert len(set(answers["ours"])) > 1
    report = json.loads((tmp_path / "speed.json").read_text())
    assert report["distinct_rows"] == 5
    figures = {result["design"]: result for result in report["designs"]}
    assert {name: (result["rows"], result["new_tokens"]) for name, result in figures.items()} == {
        "seed": (2, 6),
        "merged": (2, 6),
        **dict.fromkeys(("apart", "ours", "fast", "grouped", "graphs"), (7, 21)),
    }
    for result in report["designs"]:
        batched = result["design"] not in ("seed", "merged")
        assert (result["seconds_reading"] > 0) == (result["seconds_decoding"] > 0) == batched
    assert figures["seed"]["prompt_tokens"] == figures["ours"]["prompt_tokens"] > figures["fast"]["prompt_tokens"]
    printed = capsys.readouterr().out
    assert "## read prompts" in printed
    assert "of ceiling" in printed

    def full(*args):
        raise torch.OutOfMemoryError("full\nof rows")

    monkeypatch.setattr(generate_speed.ev, "read_prompts", full)
    flags += ["--batch_size", 1]  # which is not halved
    with pytest.raises(SystemExit, match="not measured, see above: ours"):
        generate_speed.main([*map(str, flags), "--designs", "seed,ours", "--output", str(tmp_path / "speed.json")])
    report = json.loads((tmp_path / "speed.json").read_text())
    assert [result["design"] for result in report["designs"]] == ["seed"]
    assert report["failed"] == {"ours": "OutOfMemoryError: full"}
    with pytest.raises(SystemExit):
        generate_speed.main([*map(str, flags), "--designs", "plain"])
    assert "--designs: 'plain' is none of seed, apart, merged, ours, fast" in capsys.readouterr().err
