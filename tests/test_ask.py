"""One question from the command line, and files of questions without gold answers."""

import json
import re

import pytest

import evaluate_checkpoint as ev
import train_vqa as vqa
from tests.conftest import EVAL_DATA, FIXTURES, read_jsonl, refusal, write_jsonl
from tests.test_media import spoken, write
from tests.test_report import Page

FRAMES = sorted((FIXTURES / "frames/fx-001").iterdir())[:2]
SPEECH = FIXTURES / "audio/fx-001_qa_000101_nbi_status.wav"
GOLD = ("answer", "short_answer")


@pytest.fixture()
def ask(trained, capsys):
    """Runs --ask on FRAMES; returns exit status, what it printed, and the error lines."""

    def run(*more, frames=FRAMES):
        capsys.readouterr()
        argv = ["--checkpoint_path", trained, "--max_new_tokens", 4, "--frames", *frames, *more]
        status = ev.main(list(map(str, argv)))
        out, err = capsys.readouterr()
        return status, out, [line.partition("error: ")[2] for line in err.splitlines() if "error: " in line]

    return run


def test_one_question_is_answered_as_the_model_answers_it(ask, trained):
    model = vqa.load_trained(trained).model
    frames = list(map(vqa.decode_frame, FRAMES))
    for flags, given in (
        (("--ask", SPEECH), (vqa.load_speech(SPEECH), None)),
        (("--ask_text", "Is it?", "--input_mode", "text"), (None, "Is it?")),
        (("--ask", SPEECH, "--ask_text", "Is it?", "--input_mode", "audio_text"), (vqa.load_speech(SPEECH), "Is it?")),
    ):
        status, out, _ = ask(*flags)
        expected = model.answer(frames, *given, 4)
        *_, text, last = out.splitlines()
        assert (status, text) == (0, expected.text)
        ended = "stopped by itself" if expected.stopped else r"cut off at --max_new_tokens"
        assert re.fullmatch(rf"   {expected.n_tokens} tokens, {ended}; \d+ ms, of these \d+ for the files", last)


def test_what_cannot_be_asked_is_one_line_before_weights_load(ask, no_weights, tmp_path):
    for name, seconds, gain in (("long.wav", 31, 1), ("silent.wav", 1, 0)):
        write(tmp_path / name, spoken(seconds, 16000) * gain, 16000, "wav", "pcm_s16le")
    (tmp_path / "broken.mp3").write_bytes(b"x" * 999)
    (tmp_path / "broken.jpg").write_bytes(FRAMES[0].read_bytes()[:999])
    for flags, frames, message in (
        (("--ask", tmp_path / "long.wav"), FRAMES, "lasts more than the 30 s that the model hears; shorten it"),
        (("--ask", tmp_path / "silent.wav"), FRAMES, "is silent throughout"),
        (("--ask", tmp_path / "broken.mp3"), FRAMES, "broken.mp3 cannot be decoded"),
        (("--ask", tmp_path / "none.wav"), FRAMES, "No such file"),
        (("--ask", SPEECH), [tmp_path / "broken.jpg"], "broken.jpg cannot be decoded"),
        (("--ask", SPEECH), [tmp_path / "none.jpg"], "No such file"),
        (("--ask", SPEECH), FRAMES + FRAMES, "--frames: 4 frames, and the model is shown 2 at most; give fewer"),
        (("--ask_text", "Is it?"), FRAMES, "takes --ask alone; for --ask_text alone add --input_mode text"),
        (("--ask", SPEECH, "--ask_text", "Is it?"), FRAMES, "for --ask and --ask_text add --input_mode audio_text"),
        (("--ask", SPEECH, "--input_mode", "text"), FRAMES, "the input mode text takes --ask_text alone"),
        (("--ask", SPEECH, "--input_mode", "mismatched_audio"), FRAMES, "the input mode audio_text takes"),
    ):
        status, _, errors = ask(*flags, frames=frames)
        assert status == 2 and len(errors) == 1 and message in errors[0], (flags, errors)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ask", "a.wav"], "--frames must be given"),
        (["--ask", "a.wav", "--frames", "a.jpg", "--output_file", "x.jsonl"], "--output_file: no effect with --ask"),
        (["--frames", "a.jpg", *EVAL_DATA, "--output_file", "x.jsonl"], "--frames: no effect with --eval_data_path"),
        (["--ask", "a.wav", "--frames", "a.jpg", "--score_only"], "--ask"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, capsys):
    with pytest.raises(SystemExit):
        ev.main(flags)
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- without gold


def without_gold(*places):
    """Changes a question file: rows at these places have no gold answers, one of them null, one of them only one."""

    def change(rows):
        for n, place in enumerate(places):
            lost = GOLD if n != 1 else GOLD[1:]
            rows[place] = {name: value for name, value in rows[place].items() if name not in lost}
            rows[place] |= {"answer": None} if n == 0 else {}
        return rows

    return change


def test_rows_without_gold_are_answered_and_counted_but_not_scored(evaluate, data):
    complete = evaluate(name="complete", data=data.eval_flags)
    data.rewrite(without_gold(0, 2))
    result = evaluate("--arms", "black_frames,mismatched_frames", data=data.eval_flags)
    said = "2 of 5 rows have no gold answer (answer, short_answer): answered, not scored"
    assert result.status == 0 and said in result.out and "Accuracy in %, of the 3 other rows (0 failed" in result.out
    answers = {ev.row_key(row): row["predicted_answer"] for row in complete.rows}
    assert {ev.row_key(row): row["predicted_answer"] for row in result.rows} == answers
    lost = [row for row in result.rows if row["short_answer"] is None]
    assert [[row[name] for name in ("ground_truth", "correct", "choice_correct")] for row in lost] == [[None] * 3] * 2
    summary = result.summary
    assert [summary[name] for name in ("n_total", "n_without_gold", "n_scored")] == [5, 2, 3]
    assert {metric["n"] for metric in summary["metrics"].values()} == {3} and summary["finish"]["length"] == 5
    assert summary["arms"]["black_frames"]["versus"]["choice"]["n"] == 3
    shown = read_jsonl(result.path.with_name("x.mismatched_frames.jsonl"))
    assert not {ev.row_key(row) for row in lost} & set(map(ev.row_key, shown))  # another answer than none is unknown


def test_without_any_gold_there_are_answers_and_no_accuracy_until_a_file_with_gold_scores_them(evaluate, data, capsys):
    gold = write_jsonl(data.jsonl.with_name("gold.jsonl"), read_jsonl(data.jsonl))
    complete = evaluate("--arms", "black_frames", name="complete", data=data.eval_flags)
    data.rewrite(without_gold(*range(5)))
    page = data.jsonl.with_name("page.html")
    result = evaluate("--arms", "black_frames", "--report", page, data=data.eval_flags)
    shown = Page(page)
    assert [row[3:5] for row in shown.data["rows"]] == [[None, None]] * 5
    assert [cell[1] for row in shown.data["rows"] for cell in row[7]] == [None] * 10
    assert "5 of 5 rows have no gold answer" in shown.text and "Does it see" not in shown.text
    assert result.status == 0 and result.summary["n_without_gold"] == 5
    assert {metric["accuracy"] for metric in result.summary["metrics"].values()} == {None}
    assert "No accuracy: --score_only scores these answers, given a file with the gold ones" in result.out
    assert "Does it see" not in result.out and "0/5 stopped by themselves" in result.out
    evaluate("--arms", "black_frames", data=data.eval_flags)  # which goes on where nothing is left to do

    assert ev.main(["--compare", str(result.path), str(result.path)]) == 2
    assert "has a gold answer; give them with --eval_data_path" in capsys.readouterr().err
    score = ["--score_only", "--output_file", str(result.path), "--eval_data_path"]
    assert ev.main([*score, str(data.jsonl)]) == 2
    assert "no row has answer and short_answer, so nothing can be scored" in capsys.readouterr().err
    assert ev.main([*score, str(gold)]) == 0
    scored = json.loads(result.path.with_suffix(".summary.json").read_text())
    assert (scored["metrics"], scored["n_without_gold"]) == (complete.summary["metrics"], 0)
    assert scored["arms"]["black_frames"]["versus"] == complete.summary["arms"]["black_frames"]["versus"]
    pair = [str(result.path), str(complete.path)]
    assert ev.main(["--compare", *pair, "--eval_data_path", str(gold)]) == 0
    write_jsonl(gold, without_gold(1)(read_jsonl(gold)))
    capsys.readouterr()
    assert ev.main(["--compare", *pair, "--eval_data_path", str(gold)]) == 0
    assert "1 of 5 rows have no gold answer and are left out" in " ".join(capsys.readouterr().out.split())


def test_training_refuses_rows_without_gold(data, train, tmp_path, no_weights):
    data.rewrite(without_gold(3))
    message = refusal(train, tmp_path / "out", *data.train_flags)
    assert message == f"{data.jsonl}:4: field 'answer' must be text, not None"
    for wrong in ({"answer": ""}, {"short_answer": 3}):  # which is a mistake, not an answer that nobody gave
        assert "must be text" in refusal(vqa.read_rows, rewritten(data, wrong), needs_gold=False)


def rewritten(data, change):
    data.rewrite(lambda _: [row | change for row in read_jsonl(FIXTURES / "smoke.jsonl")])
    return data.jsonl


def test_rows_say_how_long_they_took(evaluate):
    result = evaluate()
    times = [row["inference_time_ms"] for row in read_jsonl(result.path)]
    seconds = result.summary["manifest"]["runtime"]["seconds"]
    assert min(times) > 0 and sum(times) <= 1000 * seconds
