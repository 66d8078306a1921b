"""The arm that transcribes each question and asks it in words, on a tiny Whisper with random weights."""

import json
import shutil

import pytest
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

import evaluate_checkpoint as ev
import train_vqa as vqa
from tests.conftest import EVAL_DATA, FIXTURES, edit_json, read_jsonl, without_time
from tests.make_tiny_models import N_BPE, fixture_wording, train_bpe
from tests.test_evaluation_ranks import Launch
from tests.test_report import Page

# In the order of a multilingual Whisper.
SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>",
           "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>")  # fmt: skip
IDS = {token: N_BPE + place for place, token in enumerate(SPECIAL)}
ENDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), IDS["<|endoftext|>"])
ENDS |= {"decoder_start_token_id": IDS["<|startoftranscript|>"]}
RECORDINGS = sorted((FIXTURES / "audio").iterdir())


def write_whisper(folder):
    """A multilingual Whisper of one layer that hears 4 s and writes up to 16 tokens."""
    bpe = json.loads(train_bpe(fixture_wording()).to_str())["model"]
    merges = [tuple(pair) for pair in bpe["merges"]]
    named = {"unk_token": SPECIAL[0], "additional_special_tokens": list(SPECIAL[1:])}
    WhisperTokenizer(vocab=bpe["vocab"] | IDS, merges=merges, **named).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80, chunk_length=4).save_pretrained(folder)
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder")
             for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    lengths = {"max_source_positions": 200, "max_target_positions": 24}
    torch.manual_seed(1)
    model = WhisperForConditionalGeneration(
        WhisperConfig(vocab_size=N_BPE + len(SPECIAL), d_model=32, init_std=0.5, **sizes, **lengths, **ENDS)
    )
    model.generation_config = GenerationConfig(
        **ENDS,
        max_length=16,
        is_multilingual=True,
        lang_to_id={token: IDS[token] for token in ("<|en|>", "<|de|>")},
        task_to_id={task: IDS[f"<|{task}|>"] for task in ("transcribe", "translate")},
        no_timestamps_token_id=IDS["<|notimestamps|>"],
        suppress_tokens=[*IDS.values()][1:],
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """The folder of the tiny Whisper; tests must not change it."""
    pytest.importorskip("jiwer")
    return write_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture()
def cascade(evaluate, whisper):
    """Runs the arm beside the checkpoint's own."""
    return lambda *more, **how: evaluate("--arms", "asr_text", "--asr_model", whisper, *more, **how)


def rows_of(result, arm="asr_text"):
    return read_jsonl(result.path.with_name(f"{result.path.stem}.{arm}.jsonl"))


def test_each_recording_is_transcribed_once_and_asked_in_words(cascade, whisper, tmp_path, monkeypatch):
    result = cascade("--report", tmp_path / "page.html")
    rows, summary = rows_of(result), result.summary
    assert result.status == 0 and "Passing `generation_config`" not in result.err
    stored = {ev.row_key(row): row for row in read_jsonl(FIXTURES / "smoke.jsonl")}
    said = dict(zip(RECORDINGS, ev.transcribe(whisper, RECORDINGS, torch.device("cpu"), torch.float32), strict=True))
    assert len(set(said.values())) > 2  # it hears, if not English
    for row in rows:
        assert row["question"] == stored[ev.row_key(row)]["question"] and row["input_mode"] == "text"
        assert row["transcript"] == said[vqa.Path(row["audio_file"])]
    found = summary["arms"]["asr_text"]["transcripts"]
    assert (found["n"], found["exact"]) == (5, 0) and found["word_error_rate"] > 0.5
    assert found["words"] == sum(len(ev.plain_words(row["question"]).split()) for row in rows)
    assert f"asr_text, WER {100 * found['word_error_rate']:.1f}" in result.out
    sentence = ev.transcript_sentence(summary["arms"])
    assert "(lower case, no punctuation)" in sentence and sentence in " ".join(result.out.split())
    page = Page(tmp_path / "page.html")
    assert sentence in page.text and page.data["columns"] == ["audio", "asr_text"]
    heard = {row[0]: [cell[5] for cell in row[7]] for row in page.data["rows"]}
    assert heard == {ev.key_text(ev.row_key(row)): [None, row["transcript"]] for row in rows}
    known = summary["manifest"]["asr"]
    assert (known["model"], known["recordings"], known["transcribed"]) == (str(whisper), 5, 5)
    assert known["sha256"] == json.loads((tmp_path / "x.asr_text.jsonl.run.json").read_text())["asr_sha256"]
    assert json.loads((tmp_path / "x.jsonl.run.json").read_text())["asr_sha256"] is None


def test_a_run_that_was_stopped_goes_on_without_transcribing_again(cascade, monkeypatch):
    complete = cascade(name="complete")
    first = cascade("--limit", 2)
    monkeypatch.setattr(ev, "ASR_BATCH_SIZE", 1)
    assert cascade().summary["manifest"]["asr"]["transcribed"] == 3
    assert list(map(without_time, rows_of(complete))) != rows_of(first)
    in_order = [sorted(map(without_time, rows_of(run)), key=ev.row_key) for run in (complete, first)]
    assert in_order[0] == in_order[1]
    monkeypatch.setattr(ev, "transcribe", lambda *_: pytest.fail("transcribed again"))
    again = cascade()
    assert again.status == 0 and again.summary["manifest"]["asr"]["transcribed"] == 0
    assert again.summary["arms"]["asr_text"]["transcripts"] == complete.summary["arms"]["asr_text"]["transcripts"]


def test_ranks_share_the_recordings(cascade, whisper, trained, tmp_path):
    """All are one slice, which rank 0 transcribes; both ask in its words."""
    alone = cascade(name="alone")
    flags = ["--checkpoint_path", trained, *EVAL_DATA, "--max_new_tokens", 4, "--output_file", tmp_path / "x.jsonl"]
    launched = Launch([*flags, "--arms", "asr_text", "--asr_model", whisper], 2)
    assert launched.end() == [0, 0] and launched.said()[1] == "", launched.said()
    both = read_jsonl(tmp_path / "x.asr_text.jsonl")
    assert list(map(without_time, both)) == list(map(without_time, rows_of(alone)))
    assert json.loads((tmp_path / "x.summary.json").read_text())["manifest"]["asr"]["transcribed"] == 5


def test_where_the_transcript_is_the_question_the_answer_is_that_of_the_text_arm(cascade, rows, monkeypatch):
    """An oracle that gets two of five wrong."""
    said = {row.audio_path: row.question for row in rows}
    wrong = {row.question for row in rows[3:]}
    said |= {row.audio_path: "no" for row in rows[3:]}
    monkeypatch.setattr(ev, "transcribe", lambda folder, recordings, *_: [said[path] for path in recordings])
    result = cascade("--arms", "asr_text,text", "--max_new_tokens", 12)
    heard, read = ({row["question"]: row for row in rows_of(result, arm)} for arm in ("asr_text", "text"))
    same = {question for question, row in heard.items()
            if row["predicted_answer"] == read[question]["predicted_answer"]}  # fmt: skip
    assert same == {row.question for row in rows} - wrong
    found = result.summary["arms"]["asr_text"]["transcripts"]
    assert found["exact"] == 3 and f"{found['exact']} of 5 transcripts have no error" in " ".join(result.out.split())


def test_word_error_rate_counts_over_all_words():
    pytest.importorskip("jiwer")
    pairs = (("Is the lesion upper-left?", "is the lesion upper left"), ("Is it moving", "is moving in"),
             ("What tool is used?", ""), ("?!", "noise"))  # fmt: skip
    found = ev.transcript_figures({"question": said, "transcript": heard} for said, heard in pairs)
    # 5 + 3 + 4 words; one left out, one put in, four left out
    assert found == {"n": 3, "words": 12, "exact": 1, "word_error_rate": 6 / 12}
    assert ev.transcript_figures([{"question": "Is it?"}]) is None


def test_speech_that_cannot_be_read_fails_its_row_alone(cascade, data):
    (data.audio / "qa_000205.ogg").write_bytes(b"OggS")
    result = cascade("--allow_errors", data=data.eval_flags)
    rows = {row["id"]: row for row in rows_of(result)}
    assert result.status == 1 and [row["id"] for row in rows.values() if "error" in row] == ["qa_000205"]
    assert "the speech is missing or cannot be read" in rows["qa_000205"]["error"]
    assert "transcript" not in rows["qa_000205"] and rows["qa_000205"]["question"]
    assert result.summary["arms"]["asr_text"]["transcripts"]["n"] == 4


def test_other_speech_behind_a_transcript_is_refused(cascade, data):
    assert cascade(data=data.eval_flags).status == 0
    shutil.copy(data.audio / "fx-002_qa_000203.flac", data.audio / "fx-001_qa_000101_nbi_status.flac")
    (data.audio / "fx-001_qa_000101_nbi_status.wav").unlink()
    assert "are not the ones that its row was made from" in cascade(data=data.eval_flags).err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such folder, and not to be had from the hub"),
        (lambda f: edit_json(f / "config.json", model_type="wav2vec2"), "model_type is 'wav2vec2', not 'whisper'"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "no model.safetensors there"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "not a readable safetensors file"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "its preprocessor_config.json or its tokenizer cannot"),
        (
            lambda f: edit_json(f / "preprocessor_config.json", feature_size=128),
            "makes 128 mel bins, config.json wants 80",
        ),
        (lambda f: (f / "tokenizer.json").write_text("{"), "its preprocessor_config.json or its tokenizer cannot"),
    ],
)
def test_what_cannot_transcribe_is_one_line_before_weights_load(
    evaluate, whisper, tmp_path, no_weights, spoil, message, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = shutil.copytree(whisper, tmp_path / "spoilt")
    spoil(folder)
    result = evaluate("--arms", "asr_text", "--asr_model", folder)
    (line,) = (line for line in result.err.splitlines() if "error: " in line)
    assert result.status == 2 and message in line and str(folder) in line


def test_the_arm_and_its_model_need_each_other(evaluate, no_weights):
    for flags in (("--arms", "asr_text"), ("--asr_model", "x"), ("--arms", "text", "--asr_model", "x")):
        assert "--asr_model and --arms asr_text need each other" in evaluate(*flags).err


def test_all_arms_take_it_in_where_the_whisper_is_named(cascade):
    assert list(cascade("--arms", "all", "--limit", 1).summary["arms"]) == list(ev.ARMS)


def test_without_jiwer_the_package_is_named(evaluate, no_weights, monkeypatch):
    monkeypatch.setitem(ev.sys.modules, "jiwer", None)
    message = evaluate("--arms", "asr_text", "--asr_model", "x").err
    assert "--arms asr_text: " in message and "run `pip install 'jiwer>=3'`" in message
