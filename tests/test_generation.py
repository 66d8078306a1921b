"""Evaluation with a model, by its command line: batches, stops, settings, gates, arms, failures, resuming."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import GenerationConfig

import evaluate_checkpoint as ev
import train_vqa as vqa
from tests.conftest import EVAL_DATA, FIXTURES, FULL_SIZE, PAD, edit_json, read_jsonl, without_time, write_jsonl

IM_END, END_OF_TEXT = 482, 480
INSTRUCTION = "Answer the question concisely based on the visual and audio evidence."


def refused(result) -> str:
    """The one line of a refused run that wrote neither rows nor figures."""
    assert (result.status, result.rows, result.summary) == (2, None, None)
    (line,) = [line for line in result.err.splitlines() if "error: " in line]
    return line.partition("error: ")[2]


def without_times(summary):
    """What must come out the same."""
    manifest = {name: value for name, value in summary["manifest"].items() if name not in ("runtime", "flags")}
    arms = {arm: {**part, "sha256": None} for arm, part in summary["arms"].items()}  # rows say how long they took
    return {**summary, "manifest": manifest, "arms": arms}


def merged_copy(trained, tiny, folder, change=lambda tensors: None):
    """A full model in `folder` that answers as `trained`, but for what `change` does to its tensors."""
    done = vqa.load_trained(trained)
    shutil.copytree(tiny, folder)
    for file in (vqa.SETTINGS_FILE, "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trained / file, folder)
    tensors = {name: p.detach().clone() for name, p in done.model.named_parameters()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


# -------------------------------------------------------------------------------------------------- batches and stops


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """The fixture rows with clips of 1 to 8 frames: the arguments of `load_rows`."""
    path = tmp_path_factory.mktemp("uneven") / "data.jsonl"
    rows = zip(read_jsonl(FIXTURES / "smoke.jsonl"), (2, 8, 1, 5, 3), strict=True)
    write_jsonl(path, [{**row, "frames": row["frames"][:n]} for row, n in rows])
    return path, FIXTURES / "frames", FIXTURES / "audio"


@pytest.fixture(scope="module")
def stopping(trained, tiny, uneven, tmp_path_factory):
    """A model whose answers end early, and at different places: where `trained` would say one of a few words."""

    def bend(tensors):
        head = tensors["lm_head.weight"]
        head[IM_END], head[END_OF_TEXT] = 1.3 * head[spoken[0][3]], 1.3 * head[spoken[3][1]]

    model = vqa.load_trained(trained).model
    spoken = answers_of_generate(model, samples_of(model, uneven), 12)
    return merged_copy(trained, tiny, tmp_path_factory.mktemp("stopping") / "model", bend)


def samples_of(model, data, *settings):
    """The rows as questions, in order."""
    processor = vqa.VQAProcessor(model.processor.tokenizer, model.config, 56, "audio", *settings)
    dataset = vqa.SurgicalVQADataset(vqa.load_rows(*data), processor, is_eval=True, with_answer=False)
    return [dataset[i] for i in range(len(dataset))]


def answers_of_generate(model, samples, max_new_tokens):
    """The ids that transformers' own greedy generation gives, one list a sample, stop token included."""
    decoding = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=[IM_END, END_OF_TEXT], pad_token_id=PAD
    )
    answers = []
    for sample in samples:
        batch = vqa.VQACollator(PAD, "left")([sample])
        del batch["labels"]
        with torch.inference_mode():
            answers.append(
                model.generate(**batch, generation_config=decoding)[0, batch["input_ids"].shape[1] :].tolist()
            )
    return answers


@pytest.mark.parametrize(("audio_tokens", "frame_mode"), [("full", "images"), ("speech", "video")])
def test_in_any_batch_the_answers_are_those_of_generate_longest_prompts_first(
    evaluate, stopping, uneven, tmp_path, monkeypatch, audio_tokens, frame_mode
):
    """Each row stops at its own stop token, of two kinds; stopped inside a batch, a run continues to the same rows."""
    folder = shutil.copytree(stopping, tmp_path / "model")
    edit_json(folder / vqa.SETTINGS_FILE, input={"audio_tokens": audio_tokens, "frame_mode": frame_mode})

    def answers(name, *flags):
        flags = ("--max_eval_frames", 0, "--max_new_tokens", 12, "--eval_data_path", uneven[0], *flags)
        return evaluate(*flags, checkpoint=folder, name=name)

    pairs, alone = answers("x", "--batch_size", 2), answers("alone", "--batch_size", 1)
    with monkeypatch.context() as patch:  # prompts of a batch are read a few at a time where they are long
        patch.setattr(vqa, "PREFILL_TOKENS", 500)
        assert pairs.rows == alone.rows == answers("together", "--batch_size", 5).rows

    model, stored = vqa.load_trained(folder).model, read_jsonl(uneven[0])
    samples = samples_of(model, uneven, audio_tokens, frame_mode)
    order = sorted(range(5), key=lambda i: -len(samples[i]["input_ids"]))
    assert [ev.row_key(row) for row in pairs.rows] == [ev.row_key(stored[i]) for i in order]
    expected = answers_of_generate(model, [samples[i] for i in order], 12)
    for row, ids in zip(pairs.rows, expected, strict=True):
        said = model.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        reason = "eos" if ids[-1] in (IM_END, END_OF_TEXT) else "length"
        assert (row["predicted_answer"], row["n_tokens"], row["finish_reason"]) == (said, len(ids), reason)
    assert len({row["n_tokens"] for row in pairs.rows}) > 1

    lines = pairs.path.read_bytes().splitlines(keepends=True)
    pairs.path.write_bytes(b"".join(lines[:3]) + lines[3][:50])  # torn inside the second batch
    gone_on = answers("x", "--batch_size", 2)
    assert gone_on.rows == pairs.rows and gone_on.summary["manifest"]["runtime"]["rows_answered"] == 2
    assert without_times(gone_on.summary) == without_times(pairs.summary)
    if audio_tokens == "full":  # a turn that ends with the last token allowed has ended
        ended = next(row for row in pairs.rows if row["finish_reason"] == "eos" and row["n_tokens"] > 1)
        for limit, reason in ((ended["n_tokens"], "eos"), (ended["n_tokens"] - 1, "length")):
            rows = answers("again", "--overwrite", "--max_new_tokens", limit).rows
            (found,) = [row for row in rows if ev.row_key(row) == ev.row_key(ended)]
            assert (found["finish_reason"], found["n_tokens"]) == (reason, limit)
        assert {ids[-1] for ids in expected} >= {IM_END, END_OF_TEXT}


# ---------------------------------------------------------------------------------------------------- rows and summary


def test_rows_and_summary_of_a_run(evaluate, trained):
    result = evaluate("--limit", 2)
    assert result.status == 0
    assert result.rows[0] | {"predicted_answer": "", "media_sha256": ""} == {
        "id": "qa_000101",
        "video_id": "fx-001",
        "question_type": "nbi_status",
        "question": "Has the narrow band light been switched on?",
        "ground_truth": "Yes, NBI light is on in these frames.",
        "short_answer": "yes",
        "predicted_answer": "",
        "question_id": "qa_000101",
        "exact_match": 0,
        "correct": False,
        "strict_correct": False,
        "choice_correct": False,
        "token_correct": False,
        "finish_reason": "length",
        "n_tokens": 4,
        "input_mode": "audio",
        "audio_file": str(FIXTURES / "audio" / "fx-001_qa_000101_nbi_status.wav"),
        "frames": [str(FIXTURES / "frames" / "fx-001" / f"fx-001_{number}.jpg") for number in (1204, 1220)],
        "media_sha256": "",
    }
    assert (result.summary["n_total"], result.summary["finish"]["length"]) == (2, 2)
    manifest = result.summary["manifest"]
    assert manifest["input"] == {
        "input_mode": "audio",
        "audio_tokens": "full",
        "encoder_tokens": 200,
        "frame_mode": "images",
        "max_eval_frames": 2,
        "max_image_size": 56,
        "prompt": "<|im_start|>user\n<|audio_bos|><|audio_eos|>\n<|vision_start|><|image_pad|><|vision_end|>"
        f"{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n",
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
        assert f"{line}\n" in result.out


def test_rescoring_a_run_changes_no_figure_and_loses_nothing(evaluate, capsys):
    done = evaluate("--arms", "text,black_frames", "--batch_size", "2")
    assert ev.main(["--score_only", "--output_file", str(done.path), *EVAL_DATA[:2]]) == 0
    summary = json.loads(done.path.with_suffix(".summary.json").read_text())
    assert "rescored" in summary["manifest"]
    del summary["manifest"]["rescored"]
    assert summary == done.summary


def test_flags_win_over_the_settings_of_the_checkpoint(evaluate):
    flags = ("--max_eval_frames", 0, "--max_image_size", 28, "--input_mode", "text", "--dtype", "bfloat16")
    result = evaluate(*flags, "--limit", 1, data=EVAL_DATA[:4])  # no --audio_dir
    assert (result.status, result.rows[0]["input_mode"], result.rows[0]["audio_file"]) == (0, "text", None)
    manifest = result.summary["manifest"]
    assert (manifest["input"]["max_eval_frames"], manifest["input"]["max_image_size"]) == (None, 28)
    assert "✓ Model loaded in full BF16\n" in result.out and manifest["gates"]["speech"] is None


def test_the_base_alone_and_the_same_weights_as_a_full_model(evaluate, base, tiny, tokenizer, tmp_path):
    flags = ("--max_image_size", 56, "--max_eval_frames", 2, "--limit", 2)
    zero_shot = ("--model_name_or_path", tiny, "--init", "random", "--seed", 1)
    result = evaluate(*flags, *zero_shot, checkpoint=None)
    manifest = result.summary["manifest"]
    assert (result.status, manifest["model"]["adapter"], manifest["seeds"]["init"]) == (0, None, 1)
    assert manifest["model"]["base_fingerprint"] == vqa.fingerprint(base)
    folder = shutil.copytree(tiny, tmp_path / "full")
    tokenizer.save_pretrained(folder)
    save_file(dict(base.named_parameters()), folder / "model.safetensors")
    assert "zero-shot in the prompt layout plain" in result.out
    flags = (*flags, "--prompt_layout", "plain")  # of such a model nothing tells whether it was trained
    assert evaluate(*flags, checkpoint=folder, name="full").rows == result.rows
    complaint = refused(evaluate(*zero_shot[:2], checkpoint=folder, name="both"))
    assert complaint.startswith(f"--checkpoint_path {folder} ") and "--model_name_or_path" in complaint
    complaint = refused(evaluate("--no_merge", *zero_shot[:-2], checkpoint=None, name="none"))
    assert complaint.startswith("--no_merge: ")


# ------------------------------------------------------------------------------------- the line of the public scripts


@pytest.mark.parametrize(
    ("mode", "arm", "ours", "speech"),
    [
        ("audio_text", "audio_text", "audio_text", "own"),
        ("text_only", "text", "text", None),
        ("audio_only", "audio", "audio", "own"),
        ("mismatched_audio", "mismatched_audio", "audio_text", "other"),
    ],
)
def test_the_public_line_runs_unchanged(evaluate, mode, arm, ours, speech):
    """The rows of --output_file are those that its user asks for, and the run says what it took the mode for."""
    result = evaluate("--batch_size", 1, "--max_image_size", 384, "--input_mode", mode)
    assert (result.status, len(result.rows), {row["input_mode"] for row in result.rows}) == (0, 5, {ours})
    manifest = result.summary["manifest"]
    assert (manifest["arm"], manifest["input"]["input_mode"], manifest["flags"]["input_mode"]) == (arm, ours, mode)
    (said,) = manifest["mapped_flags"] or [""]
    assert said in result.out and (mode == ours or f"--input_mode {mode} is " in said)
    assert {bool(row["audio_file"]) for row in result.rows} == {speech is not None}
    assert {"audio_of" in row for row in result.rows} == {speech == "other"}


def test_the_mismatched_mode_gives_the_rows_of_that_arm_beside_text(evaluate, tmp_path):
    arm = evaluate("--input_mode", "audio_text", "--arms", "mismatched_audio", name="two")
    rows = list(map(without_time, read_jsonl(tmp_path / "two.mismatched_audio.jsonl")))
    assert arm.status == 0 and evaluate("--input_mode", "mismatched_audio").rows == rows
    complaint = refused(evaluate("--input_mode", "mismatched_audio", "--arms", "text", name="y"))
    assert "--input_mode audio_text --arms mismatched_audio" in complaint


def test_no_adapter_asks_the_base_as_the_adapter_is_asked(evaluate, trained, tiny):
    """A projector that the adapter trained is the base's again."""
    bare = evaluate("--no_adapter")
    manifest, expected = bare.summary["manifest"], vqa.load_settings(trained)
    assert (bare.status, manifest["model"]["adapter"], manifest["sha256"]["adapter"]) == (0, None, None)
    assert manifest["model"]["adapter_left_out"] == str(trained)
    assert manifest["model"]["base_fingerprint"] == expected["model"]["base_fingerprint"]
    assert (manifest["input"]["max_eval_frames"], manifest["input"]["max_image_size"]) == (2, 56)
    assert f"--no_adapter: {tiny} " in bare.out and manifest["mapped_flags"][0] in bare.out
    flags = ("--max_image_size", 56, "--max_eval_frames", 2, "--init", "random", "--seed", 1)
    alone = evaluate("--no_adapter", "--model_name_or_path", tiny, *flags, checkpoint=None, name="alone")
    assert alone.rows == bare.rows != evaluate(name="tuned").rows
    mixed = evaluate()  # into the rows of the base
    assert mixed.status == 2 and "adapter_sha256 (None then, " in mixed.err


def test_no_adapter_of_a_full_model_is_refused(evaluate, trained, tiny, tmp_path, no_weights):
    shutil.copytree(tiny, tmp_path / "full")
    complaint = refused(evaluate("--no_adapter", checkpoint=tmp_path / "full"))
    assert complaint.startswith(f"--no_adapter: {tmp_path / 'full'} is a full model")
    assert refused(evaluate("--no_adapter", "--no_merge", name="y")).startswith("--no_merge: ")


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_is_cheap_to_check_is_checked_before_data(evaluate, checkpoint, trained, tiny, tmp_path, monkeypatch):
    """Rows of another run, the base's name and weights, and the adapter: no question file is read."""
    assert evaluate("--limit", 1, "--arms", "black_frames").status == 0
    monkeypatch.setattr(vqa, "read_rows", lambda *args, **kwargs: pytest.fail("data were read"))
    (tmp_path / "x.jsonl").write_bytes(b"")  # of two files the second is of another run
    for flags in (("--max_new_tokens", 5), ("--dtype", "bfloat16")):
        other = evaluate("--limit", 1, "--arms", "black_frames", *flags)
        assert other.status == 2 and "x.black_frames.jsonl: its rows come from another run" in other.err
    adapter = checkpoint / "adapter_model.safetensors"
    edit_json(checkpoint / vqa.SETTINGS_FILE, model={"init": "pretrained"})
    assert f"{tiny / 'model.safetensors'}: no such file" in refused(evaluate(checkpoint=checkpoint, name="y"))
    edit_json(checkpoint / vqa.SETTINGS_FILE, model={"audio_encoder": "no/such/whisper"})
    assert refused(evaluate(checkpoint=checkpoint, name="y")).startswith("--audio_encoder no/such/whisper: ")
    edit_json(checkpoint / vqa.SETTINGS_FILE, model={"model_name_or_path": "no/such/base/here"})
    assert "no/such/base/here: no such folder" in refused(evaluate(checkpoint=checkpoint, name="y"))
    adapter.write_bytes(adapter.read_bytes()[:-9])
    assert str(adapter) in refused(evaluate(checkpoint=checkpoint, name="y"))


def test_a_folder_without_a_checkpoint_names_the_ones_inside(evaluate, tmp_path, trained, no_weights):
    (tmp_path / "run").mkdir()
    complaint = refused(evaluate(checkpoint=tmp_path / "run"))
    assert complaint.startswith(f"--checkpoint_path {tmp_path / 'run'}: ") and "adapter_config.json" in complaint
    shutil.copytree(trained / "checkpoint-2", tmp_path / "run" / "checkpoint-3")
    assert "checkpoint-3" in refused(evaluate(checkpoint=tmp_path / "run"))


@pytest.mark.parametrize(
    ("section", "changed", "named"),
    [
        ("input", {"instruction": "Say something."}, "instruction 'Say something.'"),
        ("input", {"encoder_tokens": 750}, "750 audio tokens a question, this base makes 200"),
        ("model", {"init_seed": 2}, "seed"),
        ("model", {"init_device": "xpu"}, "drawn on xpu"),
    ],
)
def test_settings_that_this_script_would_not_repeat_are_refused(evaluate, checkpoint, section, changed, named):
    edit_json(checkpoint / vqa.SETTINGS_FILE, **{section: changed})
    assert named in refused(evaluate(checkpoint=checkpoint))
    (checkpoint / vqa.SETTINGS_FILE).write_text("{}")
    assert refused(evaluate(checkpoint=checkpoint)).startswith(f"{checkpoint / vqa.SETTINGS_FILE}: ")


def test_flags_that_contradict_the_checkpoint_or_each_other_are_refused(evaluate, trained, no_weights):
    complaint = refused(evaluate("--init", "pretrained"))
    assert complaint.startswith("--init pretrained: ") and str(trained) in complaint
    assert refused(evaluate(data=EVAL_DATA[:4])).startswith("--audio_dir ")
    assert refused(evaluate("--input_mode", "text", "--arms", "silent_audio")).startswith("--arms silent_audio: ")
    complaint = refused(evaluate("--attn_implementation", "foo", "--eval_data_path", "nowhere.jsonl"))
    assert "--attn_implementation" in complaint and "'foo'" in complaint  # before the data are read


def test_media_that_cannot_be_read_or_serve_two_questions_are_refused_before_weights_load(evaluate, data, no_weights):
    ogg = data.audio / "qa_000205.ogg"
    whole = ogg.read_bytes()
    ogg.write_bytes(b"OggS")
    assert refused(evaluate(data=data.eval_flags)).startswith(f"{data.jsonl}:5: speech {ogg} is cut off")
    ogg.write_bytes(whole)
    data.rewrite(lambda rows: [rows[4], {**rows[4], "question_type": "other", "question": "Another one?"}])
    assert f"{data.jsonl}:2: asks another question" in refused(evaluate("--allow_errors", data=data.eval_flags))


def test_links_out_of_the_folders_need_a_flag(evaluate, data, tmp_path):
    speech = data.audio / "fx-001_qa_000101_nbi_status.wav"
    speech.rename(tmp_path / "elsewhere.wav")
    speech.symlink_to(tmp_path / "elsewhere.wav")
    how = (*data.eval_flags, "--limit", 1)
    complaint = refused(evaluate(data=how))
    assert str(speech) in complaint and str(data.audio) in complaint and "--allow_symlinks" in complaint
    assert evaluate("--allow_symlinks", data=how).status == 0


def test_patterns_of_training_are_those_of_evaluation_unless_it_has_its_own(evaluate, train, data, tmp_path, capsys):
    def move(old, new):
        (data.audio / new).parent.mkdir(exist_ok=True)
        (data.audio / old).rename(data.audio / new)

    data.rewrite(lambda rows: rows[:1])
    speech = "fx-001_qa_000101_nbi_status.wav"
    move(speech, "out_fx-001/qa_000101.wav")
    pattern = ("--audio_pattern", "out_{video_id}/{id}")
    assert train(tmp_path / "out", *data.train_flags, *pattern, "--max_steps", "1", "--save_strategy", "no") == 0
    how = {"checkpoint": tmp_path / "out", "data": data.eval_flags}
    capsys.readouterr()
    result = evaluate(**how)
    assert result.status == 0 and f"{pattern[0]} {pattern[1]!r}" in result.out
    move("out_fx-001/qa_000101.wav", speech)
    complaint = refused(evaluate(name="other", **how))
    own = "{video_id}_{id}_{question_type}"
    assert complaint.startswith(f"{data.jsonl}:1: no speech ")
    assert f"--audio_pattern {own!r} would find 1 of 1" in complaint
    again = evaluate("--audio_pattern", own, name="other", **how)
    assert [row["predicted_answer"] for row in again.rows] == [row["predicted_answer"] for row in result.rows]


def test_patterns_and_frames_of_two_sizes_are_refused_before_weights_load(evaluate, checkpoint, data, no_weights):
    how = ("--eval_data_path", "nowhere.jsonl", *data.eval_flags[2:])
    assert refused(evaluate("--frame_pattern", "../{frame}", data=how)).startswith("--frame_pattern '../{frame}': ")
    edit_json(checkpoint / vqa.SETTINGS_FILE, data={"audio_pattern": 5})
    assert refused(evaluate(checkpoint=checkpoint, data=how)).startswith("--audio_pattern 5: ")
    edit_json(checkpoint / vqa.SETTINGS_FILE, data={"audio_pattern": None}, input={"frame_mode": "video"})
    path = data.frames / "fx-001/fx-001_1220.jpg"
    Image.linear_gradient("L").resize((56, 112)).save(path)
    complaint = refused(evaluate("--max_eval_frames", 0, "--limit", 1, checkpoint=checkpoint, data=data.eval_flags))
    assert complaint.startswith(f"{data.jsonl}:1: frames {path.with_stem('fx-001_1204')} (")
    assert f"{path} (56 x 112) differ in size" in complaint


def test_a_row_with_frames_of_two_sizes_may_count_as_wrong(evaluate, checkpoint, data):
    edit_json(checkpoint / vqa.SETTINGS_FILE, input={"frame_mode": "video"})
    Image.linear_gradient("L").resize((56, 112)).save(data.frames / "fx-001/fx-001_1220.jpg")
    result = evaluate("--max_eval_frames", 0, "--allow_errors", checkpoint=checkpoint, data=data.eval_flags)
    assert (result.status, result.summary["n_total"], result.summary["n_errors"]) == (1, 5, 2)


@pytest.mark.parametrize("size", ["0", "-1", "many", "2.5"])
def test_a_batch_size_is_a_number_or_auto(evaluate, size, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate("--batch_size", size)
    assert stop.value.code == 2 and "argument --batch_size: " in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ failures


def test_allowed_errors_stay_in_the_denominator(evaluate, data):
    (data.audio / "qa_000205.ogg").write_bytes(b"OggS")
    (data.audio / "fx-002_qa_000203.flac").unlink()
    (data.frames / "fx-001" / "fx-001_1204.jpg").write_bytes(b"\xff\xd8")
    first = evaluate("--allow_errors", "--batch_size", 2, data=data.eval_flags)
    summary = first.summary
    assert (first.status, summary["n_total"], summary["n_errors"], summary["metrics"]["choice"]["n"]) == (1, 5, 4, 5)
    keys = ["fx-001/qa_000101/nbi_status", "fx-001/qa_000102/scope_motion_type"]
    assert summary["failed"] == [*keys, "fx-002/qa_000203/nbi_status", "fx-002/qa_000205/tool_identification"]
    assert first.rows != (rows := sorted(first.rows, key=ev.row_key))  # in the file, what cannot be read comes first
    assert [row["finish_reason"] for row in rows] == ["error", "error", "length", "error", "error"]
    assert (rows[0]["predicted_answer"], rows[0]["n_tokens"], rows[0]["correct"]) == (None, 0, False)
    assert "is in no format" in rows[0]["error"]
    assert rows[3]["error"].startswith(f"{data.jsonl}:3: ") and "speech" in rows[3]["error"]
    assert first.err.count("(--allow_errors: counted as wrong)") == 3  # three files; two rows share the frame
    again = evaluate("--allow_errors", data=data.eval_flags)
    assert (again.status, sorted(again.rows, key=ev.row_key)) == (1, rows)  # gone on with: still an error


@pytest.fixture()
def full_memory(monkeypatch):
    """`full_memory(rows, calls)`: after so many passes over more than so many rows, the GPU's memory is full."""
    forward, count = vqa.SurgicalVQAModel.forward, []

    def arrange(rows, calls=0):
        count.clear()

        def full(self, *args, **kwargs):
            count.extend([1] * (len(kwargs["input_ids"]) > rows))
            if len(kwargs["input_ids"]) > rows and len(count) > calls:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(vqa.SurgicalVQAModel, "forward", full)

    return arrange


def test_memory_that_does_not_suffice_is_one_line_and_keeps_the_rows(evaluate, full_memory, monkeypatch, tmp_path):
    (tmp_path / "x.summary.json").write_text("{}")
    full_memory(1, calls=5)  # at most one batch of four tokens
    stopped = evaluate("--batch_size", 2)
    assert (stopped.status, len(stopped.rows)) == (2, 2)
    assert not (tmp_path / "x.summary.json").exists()  # an earlier run's figures beside rows of this one
    assert "--batch_size 2" in stopped.err and "Traceback" not in stopped.err
    more = evaluate("--batch_size", 1)
    assert (more.status, len(more.rows), more.rows[:2]) == (0, 5, stopped.rows)


def test_a_batch_that_does_not_fit_is_halved_where_the_size_is_left_to_us(evaluate, full_memory):
    alone = evaluate("--batch_size", 1, name="alone")
    full_memory(2)
    halved = evaluate("--batch_size", "auto")
    assert (halved.status, halved.rows) == (0, alone.rows)
    assert "continuing with batches of 2\n" in halved.out
    manifest = halved.summary["manifest"]
    assert (manifest["decoding"]["batch_size"], manifest["runtime"]["batch_size"]) == ("auto", {"audio": 2})
    full_memory(0, calls=4)  # behind the gates
    none = evaluate(name="none")
    assert none.status == 2 and "--batch_size auto" in none.err


def test_batches_that_fit(base):
    """Qwen2-VL-7B's shapes by hand: 28 layers, 4 of 28 heads of 128 hold keys and values, MLP of 18944, bfloat16; 92 %
    of the limit can be used."""
    text = vqa.load_config(FULL_SIZE).text_config
    reading = 16384 * 2 * (4 * 18944 + 16 * 3584)
    row = (2904 + 12) * 2 * (2 * 128 * 4 * 30 + 2 * 128 * 28)
    model = SimpleNamespace(device=torch.device("cuda"), config=SimpleNamespace(text_config=text), parameters=list)

    def fitting(rows, dtype=torch.bfloat16):
        model.dtype = dtype
        return ev.choose_batch_size(model, 2904, 12, (reading + rows * row) / 0.92 / 2**30)

    assert [fitting(rows) for rows in (3.001, 2.999, -1, 500)] == [3, 2, 1, 128]
    assert fitting(3, torch.float32) == 1
    assert ev.choose_batch_size(base, 2904, 12, 0) == 8  # no GPU


# --------------------------------------------------------------------------------------------------------------- merge


def test_merged_unmerged_and_in_any_batch_every_arm_answers_the_same(evaluate, tmp_path):
    arms = "audio_text,text,mismatched_audio,silent_audio,black_frames,shuffled_frames,first_frame"

    def answers(name, *flags):
        result = evaluate("--arms", arms, "--limit", 3, *flags, name=name)
        files = {arm: tmp_path / part["file"] for arm, part in result.summary["arms"].items()}
        rows = {arm: sorted(read_jsonl(file), key=ev.row_key) for arm, file in files.items()}
        texts = {arm: [row["predicted_answer"] for row in part] for arm, part in rows.items()}
        return texts, rows, result

    merged, rows, result = answers("merged")
    apart, _, without = answers("apart", "--no_merge", "--batch_size", 1)
    assert [r.summary["manifest"]["model"]["adapter_merged"] for r in (result, without)] == [True, False]
    assert answers("pairs", "--batch_size", 2)[0] == apart == merged
    assert result.out.count("⏳ Loading") == 1 and "arm               choice" in result.out
    assert list(merged) == ["audio", *arms.split(",")]  # the main arm is always there
    assert all(texts != merged["audio"] for arm, texts in merged.items() if arm != "audio")
    assert len({row["question_type"] for row in rows["audio"]}) == 2
    own_speech = {ev.row_key(row): row["audio_file"] for row in rows["audio"]}
    for row in rows["mismatched_audio"]:
        assert row["audio_of"].split("/")[2] != row["question_type"]
        assert row["audio_of"].split("/")[1] in row["audio_file"]
        own, played = (vqa.speech_length(Path(file)) for file in (own_speech[ev.row_key(row)], row["audio_file"]))
        assert row["audio_padded_samples"] == own - played != 0 == row["audio_padded_tokens"]  # of 200 in any case
        assert row["input_mode"] == "audio"
    assert {(row["input_mode"], row["audio_file"]) for row in rows["text"]} == {("text", None)}
    assert [row["audio_file"] for row in rows["black_frames"]] == [row["audio_file"] for row in rows["audio"]]
    assert "audio_of" not in rows["black_frames"][0]
    borrowed = result.summary["arms"]["mismatched_audio"]["borrowed"]
    assert borrowed["n"] == 3 == borrowed["cut"]["n"] + borrowed["padded"]["n"]
    assert "Of 3 borrowed recordings" in result.out
    mixed = evaluate("--no_merge", "--limit", 4, "--arms", arms, name="merged")  # into rows of a merged model
    assert mixed.status == 2 and "adapter_merged (True then, False now)" in mixed.err


def test_a_base_in_4_bits_keeps_the_adapter_apart_and_says_so(evaluate, checkpoint):
    pytest.importorskip("bitsandbytes")
    edit_json(checkpoint / vqa.SETTINGS_FILE, model={"load_in_4bit": True})
    for flags, said in (((), True), (("--no_merge", "--overwrite"), False)):
        result = evaluate("--limit", 1, *flags, checkpoint=checkpoint)
        assert (result.status, "kept in 4 bits" in result.out) == (0, said)
        assert not result.summary["manifest"]["model"]["adapter_merged"]


# --------------------------------------------------------------------------------------------------------------- gates


@pytest.mark.parametrize(
    ("name", "path"), [("audio_projector.weight", "speech"), ("model.visual.merger.mlp.2.weight", "frames")]
)
def test_a_model_whose_speech_or_frames_are_cut_off_gets_no_rows_and_no_figures(
    evaluate, trained, tiny, tmp_path, name, path
):
    folder = merged_copy(trained, tiny, tmp_path / "cut", lambda tensors: tensors[name].zero_())
    result = evaluate(checkpoint=folder)
    assert re.match(f"liveness gate: .*{path}", refused(result))
    assert "Accuracy" not in result.out and not list(tmp_path.glob("x*"))


def test_a_model_that_does_not_repeat_itself_fails(evaluate, monkeypatch):
    forward = vqa.SurgicalVQAModel.forward

    def noisy(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits + torch.rand(1)
        return output

    monkeypatch.setattr(vqa.SurgicalVQAModel, "forward", noisy)
    assert refused(evaluate()).startswith("liveness gate: the same speech and frames give different logits")


def test_a_prompt_that_gives_the_question_away_is_caught(evaluate, monkeypatch):
    build = vqa.VQAProcessor.build
    assert evaluate("--input_mode", "audio_text", "--limit", 1, name="told").status == 0  # where it may
    monkeypatch.setattr(
        vqa.VQAProcessor, "build", lambda self, *args, **kwargs: build(self.with_mode("audio_text"), *args, **kwargs)
    )
    complaint = refused(evaluate())
    assert complaint.startswith("leak gate: ") and "fx-001/qa_000101/nbi_status" in complaint
    assert "(band, been, has, light, narrow, on, switched, the)" in complaint


# ---------------------------------------------------------------------------------------------------------------- arms


def test_what_the_arms_change():
    frames = [Image.new("RGB", (3, 2), (value, 0, 9)) for value in range(6)]
    speech = np.array([0.5, -0.25], dtype=np.float32)

    def colours(arm, draw="0/a", frames=frames):
        changed = ev.ORDER_ARMS[arm](frames, draw) if arm in ev.ORDER_ARMS else ev.CONTENT_ARMS[arm][1](frames)
        assert all(frame.size == (3, 2) for frame in changed)
        return [frame.getpixel((0, 0)) for frame in changed]

    plain = [(value, 0, 9) for value in range(6)]
    silence = ev.CONTENT_ARMS["silent_audio"][1](speech)
    assert silence.tolist() == [0, 0] and silence.dtype == np.float32
    assert colours("black_frames") == [(0, 0, 0)] * 6
    assert colours("first_frame") == plain[:1]
    assert sorted(colours("shuffled_frames")) == plain
    assert colours("shuffled_frames") == colours("shuffled_frames") != colours("shuffled_frames", "1/a")
    for draw in range(20):  # the order always changes: half of all shuffles of two would leave it
        assert colours("shuffled_frames", str(draw), frames[:2]) == plain[1::-1]
    assert colours("shuffled_frames", "0", frames[:1]) == plain[:1]


def test_all_arms_are_those_that_fit_the_input_mode(evaluate):
    found = evaluate("--arms", "all", "--limit", 1).summary["arms"]
    assert list(found) == [arm for arm in ev.ARMS if arm != ev.ASR_ARM]  # which takes a Whisper
    seeing = ["mismatched_frames", "black_frames", "shuffled_frames", "first_frame"]
    text = evaluate("--arms", "all", "--limit", 1, "--input_mode", "text", name="y")
    assert list(text.summary["arms"]) == ["text", "audio", "audio_text", *seeing]
    assert "Does it hear? Not tested: in text mode" in text.out  # no arm is named that text mode refuses
    mute = evaluate("--arms", "all", "--limit", 1, "--input_mode", "text", data=EVAL_DATA[:4], name="z").summary["arms"]
    assert list(mute) == ["text", *seeing]


@pytest.mark.parametrize("mode", ["audio", "text"])
def test_mismatched_frames_shows_a_clip_of_another_answer(evaluate, tmp_path, mode):
    flags = ("--arms", "mismatched_frames", "--input_mode", mode)
    complete = evaluate(*flags, name="complete")
    assert (complete.status, len(complete.rows)) == (0, 5)
    rows = read_jsonl(tmp_path / "complete.mismatched_frames.jsonl")
    gold = {ev.key_text(ev.row_key(row)): row["short_answer"] for row in complete.rows}
    own = {ev.row_key(row): row for row in complete.rows}
    assert len(rows) == 4  # tool_identification has one gold answer
    for row in rows:
        assert row["frames_of"].split("/")[2] == row["question_type"]
        assert gold[row["frames_of"]] != row["short_answer"]
        assert row["media_sha256"] != own[ev.row_key(row)]["media_sha256"]
        assert row["audio_file"] == own[ev.row_key(row)]["audio_file"] and "audio_of" not in row
    part = complete.summary["arms"]["mismatched_frames"]
    assert part["left_out"] == ["fx-002/qa_000205/tool_identification"]
    assert part["versus"]["choice"]["n"] == 4 == part["metrics"]["choice"]["n"]
    assert "In mismatched_frames 1 of 5 rows are left out" in " ".join(complete.out.split())
    assert ev.main(["--score_only", "--output_file", str(complete.path), *EVAL_DATA[:2]]) == 0
    again = json.loads(complete.path.with_suffix(".summary.json").read_text())["arms"]["mismatched_frames"]
    assert again == part
    assert evaluate(*flags, "--limit", 2).status == 0  # borrowed from the complete file: more rows go on
    assert evaluate(*flags).summary["manifest"]["runtime"]["rows_answered"] == 5
    other = evaluate(*flags, "--seed", 1)
    assert other.status == 2 and "seed (0 then, 1 now)" in other.err


def test_rows_of_one_answer_a_type_have_no_frames_to_borrow(evaluate, data, no_weights, monkeypatch):
    data.rewrite(lambda rows: [row for row in rows if row["video_id"] == "fx-001"])
    result = evaluate("--arms", "mismatched_frames", data=data.eval_flags)
    assert result.status == 2 and "--arms mismatched_frames: no row has a clip" in result.err
    monkeypatch.undo()
    result = evaluate("--arms", "all", "--limit", 1, data=data.eval_flags)
    assert list(result.summary["arms"]) == [arm for arm in ev.ARMS if arm not in ("mismatched_frames", ev.ASR_ARM)]
    assert "--arms mismatched_frames: no row has a clip" in result.out


def test_other_frames_than_in_training_are_in_the_headline(evaluate, checkpoint):
    """Trained on two of eight."""
    assert evaluate("--limit", 1).summary["manifest"]["frames"] is None
    other = evaluate("--limit", 1, "--max_eval_frames", 0, name="y")
    assert other.summary["manifest"]["frames"] == {"trained": 2, "asked": 8}
    head = other.out[other.out.index("Accuracy in %") :].splitlines()
    assert head[1] == "Asked on 8 frames a clip, but trained on 2: see --max_eval_frames 2"
    edit_json(checkpoint / vqa.SETTINGS_FILE, input={"max_train_frames": None})
    every = evaluate("--limit", 1, "--max_eval_frames", 6, checkpoint=checkpoint, name="z")
    assert every.summary["manifest"]["frames"] == {"trained": 8, "asked": 6}
    assert (
        evaluate("--no_adapter", "--max_eval_frames", 6, "--limit", 1, name="base").summary["manifest"]["frames"]
        is None
    )


# ------------------------------------------------------------------------------------------------------------ resuming


def test_a_larger_limit_goes_on_and_other_decoding_does_not(evaluate):
    arms = ("--arms", "mismatched_audio")
    complete = evaluate(*arms, name="complete")
    first = evaluate(*arms, "--limit", 2)
    assert "Checking media" not in first.err  # they were all checked above, and a bar of none is not shown
    both = evaluate(*arms)
    assert (both.status, both.rows, both.rows[:2]) == (0, complete.rows, first.rows)
    assert both.summary["manifest"]["runtime"]["rows_answered"] == 6
    other = evaluate(*arms, "--max_new_tokens", 5)
    assert other.status == 2 and "max_new_tokens (4 then, 5 now)" in other.err
    assert other.path.with_suffix(".summary.json").exists()
    assert evaluate(*arms, "--max_new_tokens", 5, "--overwrite").status == 0


def test_speech_exchanged_between_two_runs_is_noticed(evaluate, data):
    evaluate("--limit", 2, data=data.eval_flags)
    shutil.copy(FIXTURES / "audio" / "qa_000205.ogg", data.audio / "fx-001_qa_000101_nbi_status.ogg")
    (data.audio / "fx-001_qa_000101_nbi_status.wav").unlink()
    result = evaluate(data=data.eval_flags)
    assert result.status == 2 and "fx-001/qa_000101/nbi_status" in result.err
    assert result.path.with_suffix(".summary.json").exists()


def test_rows_of_another_checkpoint_of_the_run_are_not_mixed_in(evaluate, trained):
    assert evaluate("--limit", 1, checkpoint=trained / "checkpoint-2").status == 0
    mixed = evaluate("--limit", 1, checkpoint=trained / "checkpoint-4")
    assert mixed.status == 2 and "sha256" in mixed.err


# --------------------------------------------------------------------------------------------------------------- speed


@pytest.mark.slow
def test_the_benchmark_of_speed_runs_every_design(tiny, tmp_path, capsys):
    """On the tiny model: all rows are answered with as many tokens as asked for, and counted."""
    from benchmarks import generate_speed

    flags = [
        *("--data_path", EVAL_DATA[1], *EVAL_DATA[2:], "--model_name_or_path", tiny, "--rows", 7, "--seed_rows", 2)
    ]
    flags += ["--max_image_size", 56, "--frames", 2, "--max_new_tokens", 3, "--output", tmp_path / "speed.json"]
    generate_speed.main([*map(str, flags), "--designs", ",".join(generate_speed.DESIGNS), "--profile", "1"])
    report = json.loads((tmp_path / "speed.json").read_text())
    figures = {result["design"]: result for result in report["designs"]}
    assert set(figures) == set(generate_speed.DESIGNS) and report["distinct_rows"] == 5
    for name, result in figures.items():
        n = 2 if name in ("seed", "merged") else 7
        assert (result["rows"], result["new_tokens"]) == (n, 3 * n)
    assert figures["seed"]["prompt_tokens"] == figures["ours"]["prompt_tokens"] > figures["fast"]["prompt_tokens"]
    assert "of ceiling" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        generate_speed.main([*map(str, flags), "--designs", "plain"])
    assert "--designs: 'plain'" in capsys.readouterr().err
