"""evaluate_checkpoint.py's files: what it reads, resumes, refuses and writes without a model."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate_checkpoint as ev

SCRIPT = Path(ev.__file__).resolve()
FINGERPRINT = {"model": "tiny", "data_sha256": "0" * 64, "max_new_tokens": 32}


def annotation(number, short="yes", video="v1", kind="scope_motion"):
    return {
        "id": f"q{number}",
        "video_id": video,
        "frames": [f"{video}_{number}"],
        "question": f"About {kind}?",
        "question_type": kind,
        "answer": f"{short.capitalize()}, so it is.",
        "short_answer": short,
    }


def output_row(row, text="yes"):
    return ev.answer_row(row, text, finish_reason="eos", n_tokens=2, input_mode="audio", audio_file="a.wav")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(tmp_path):
    """Run the script with the standard library alone: torch and everything that needs it raise when imported."""
    traps = tmp_path / "traps"
    traps.mkdir()
    for name in ("torch", "torchaudio", "transformers", "peft", "numpy", "PIL", "soundfile", "train_vqa"):
        (traps / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")

    def call(*flags):
        return subprocess.run(
            [sys.executable, str(SCRIPT), *map(str, flags)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(traps), "PYTHONSAFEPATH": "1"},
        )

    return call


def error_line(result):
    """The error of a refused run: status 2, one line, no traceback."""
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert result.stderr.startswith("evaluate_checkpoint.py: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("evaluate_checkpoint.py: error: ").rstrip()


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"id": "q1"', "not a JSON object"),
        (b"[1]", "a JSON object is expected, found list"),
        (b'{"id": NaN}', "NaN is not JSON"),
        (b'{"id": "a", "id": "b"}', "the field 'id' occurs twice"),
        (b'{"id": "\xff"}', "not a JSON object"),
        (b"[" * 10**5, "not a JSON object"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": "q0"}\n\n' + line + b"\n")
    with pytest.raises(ev.InputError, match=complaint) as caught:
        list(ev.read_jsonl(path))
    assert str(caught.value).startswith(f"{path}:3: ")


@pytest.mark.parametrize("name", ["id", "video_id", "question_type", "question", "answer", "short_answer"])
@pytest.mark.parametrize("value", [None, "", 3])
def test_annotations_need_their_texts(tmp_path, name, value):
    path = write_jsonl(tmp_path / "a.jsonl", [annotation(1), {**annotation(2), name: value}])
    with pytest.raises(ev.InputError, match=f"a.jsonl:2: '{name}' must be a text that is not empty"):
        ev.read_annotations(path)


def test_annotations_refuse_a_repeated_key_but_not_a_repeated_id(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [annotation(1), annotation(1, video="v2"), annotation(1, kind="x")])
    assert len(ev.read_annotations(path)) == 3
    write_jsonl(path, [annotation(1), annotation(2), annotation(1)])
    with pytest.raises(ev.InputError, match=r"a.jsonl:3: the row v1/q1/scope_motion stands already on line 1"):
        ev.read_annotations(path)


def test_an_empty_annotation_file_is_refused(tmp_path):
    with pytest.raises(ev.InputError, match="no rows"):
        ev.read_annotations(write_jsonl(tmp_path / "a.jsonl", []))


# --- score_only ------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """Four rows; q1 stands for three of them, told apart by video and type."""
    rows = [annotation(1), annotation(1, "no", video="v2"), annotation(1, "no", kind="flush_action"), annotation(2)]
    return write_jsonl(tmp_path / "data.jsonl", rows)


def test_score_only_counts_missing_rows_as_wrong_and_lists_them(run, tmp_path, data):
    rows = ev.read_annotations(data)
    predictions = write_jsonl(
        tmp_path / "p.jsonl",
        [
            {"question_id": "q2", "predicted_answer": "Yes."},
            {"id": "q1", "video_id": "v2", "predicted_answer": "normal"},
            {"id": "q1", "video_id": "v1", "question_type": "scope_motion", "predicted_answer": "The scope moves."},
        ],
    )
    result = run("--score_only", "--output_file", predictions, "--eval_data_path", data, "--train_data_path", data)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Missing: v1/q1/flush_action\n" in result.stdout
    assert "0/4 stopped by themselves = 0.0 %; for 3 the file does not say." in result.stdout
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80

    summary = json.loads((tmp_path / "p.summary.json").read_text())
    assert summary["n_total"] == len(rows) == 4
    assert (summary["n_scored"], summary["n_errors"], summary["n_missing"]) == (3, 0, 1)
    assert summary["missing"] == ["v1/q1/flush_action"]
    assert {name: part["correct"] for name, part in summary["metrics"].items()} == {
        "choice": 2,
        "strict": 1,
        "contains": 2,
    }
    assert summary["manifest"]["sha256"]["eval_data_path"] == ev.sha256_file(data)
    assert summary["manifest"]["sha256"]["output_file"] == ev.sha256_file(predictions)


def test_score_only_with_a_failed_sample_exits_1(run, tmp_path, data):
    predictions = write_jsonl(tmp_path / "p.jsonl", [{"id": "q2", "predicted_answer": None, "error": "half a JPEG"}])
    result = run("--score_only", "--output_file", predictions, "--eval_data_path", data)
    assert result.returncode == 1
    summary = json.loads((tmp_path / "p.summary.json").read_text())
    assert (summary["n_total"], summary["n_errors"], summary["n_missing"]) == (4, 1, 3)
    assert summary["failed"] == ["v1/q2/scope_motion"]


def test_score_only_limit_is_the_denominator(run, tmp_path, data):
    predictions = write_jsonl(tmp_path / "p.jsonl", [{"id": "q2", "predicted_answer": "yes"}])
    assert run("--score_only", "--output_file", predictions, "--eval_data_path", data, "--limit", 3).returncode == 0
    summary = json.loads((tmp_path / "p.summary.json").read_text())
    assert (summary["n_total"], summary["n_missing"]) == (3, 3)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (
            [{"id": "q1", "predicted_answer": "yes"}],
            "p.jsonl:1: id 'q1' stands for 3 rows, e.g. v1/q1/scope_motion and v2/q1/scope_motion; "
            "add video_id and question_type to the prediction rows",
        ),
        (
            [{"id": "q1", "video_id": "v1", "predicted_answer": "yes"}],
            "p.jsonl:1: id 'q1' stands for 2 rows, e.g. v1/q1/scope_motion and v1/q1/flush_action; "
            "add question_type to the prediction rows",
        ),
        (
            [{"id": "q2", "predicted_answer": "yes"}, {"id": "q2", "video_id": "v1", "predicted_answer": "no"}],
            "p.jsonl:2: a second prediction for v1/q2/scope_motion, first on line 1; remove one",
        ),
        (
            [{"id": "q7", "predicted_answer": "yes"}],
            "p.jsonl:1: no row of --eval_data_path has id 'q7'; "
            "remove the prediction or give the file it was made from",
        ),
        (
            [{"id": "q2", "video_id": "v2", "predicted_answer": "yes"}],
            "p.jsonl:1: no row of --eval_data_path has video_id 'v2', id 'q2'; "
            "remove the prediction or give the file it was made from",
        ),
        (
            [{"id": "q2", "question": "Is it resting?", "predicted_answer": "yes"}],
            "p.jsonl:1: the question of v1/q2/scope_motion is 'Is it resting?' here but 'About scope_motion?' in "
            "--eval_data_path; give the file that the predictions were made from",
        ),
        ([{"id": "q2"}], "p.jsonl:1: 'predicted_answer' is missing; give the model's text, or null where it failed"),
        ([{"id": "q2", "predicted_answer": 5}], "p.jsonl:1: 'predicted_answer' must be a text or null, found 5"),
        ([{"id": 2, "predicted_answer": "yes"}], "p.jsonl:1: 'id' must be a text that is not empty, found 2"),
        ([{"id": "q2", "video_id": [], "predicted_answer": "yes"}], "p.jsonl:1: 'video_id' must be a text that is not "
         "empty, found []"),
    ],
)  # fmt: skip
def test_score_only_refuses_predictions_it_cannot_place(run, tmp_path, data, rows, complaint):
    write_jsonl(tmp_path / "p.jsonl", rows)
    assert error_line(run("--score_only", "--output_file", "p.jsonl", "--eval_data_path", data)) == complaint
    assert not (tmp_path / "p.summary.json").exists()


def test_a_missing_file_is_named_with_its_flag(run, data):
    result = run("--score_only", "--output_file", "p.jsonl", "--eval_data_path", data)
    assert error_line(result) == "p.jsonl (--output_file): No such file or directory"


def test_the_output_file_must_be_called_jsonl(run, data):
    result = run("--score_only", "--output_file", "p.json", "--eval_data_path", data)
    assert error_line(result) == "--output_file p.json: the name must end in .jsonl"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--score_only"], "--eval_data_path, --output_file must be given"),
        (["--output_file", "x.jsonl"], "--eval_data_path, --frames_dir must be given"),
        (["--compare", "a", "b", "--score_only"], "--score_only: no effect with --compare; leave it out"),
        (["--score_only", "--eval_data_path", "a", "--output_file", "b", "--arms", "text"], "--arms: no effect with"),
        (["--score"], "unrecognized arguments: --score"),
        (["--limit", "-1"], "must be 0 or more, found -1"),
        (["--batch_size", "0"], "must be 1 or more, found 0"),
        (["--arms", "audio,deaf"], "'deaf': give each arm once, of audio, audio_text, text, mismatched_audio"),
        (["--arms", "audio,audio"], "audio,audio: give each arm once"),
        (["--input_mode", "speech"], "invalid choice: 'speech'"),
    ],
)
def test_flags_that_make_no_sense_are_refused(capsys, flags, complaint):
    with pytest.raises(SystemExit) as caught:
        ev.main(flags)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


# --- compare ---------------------------------------------------------------------------------------------------------


def test_compare_prints_paired_differences(run, tmp_path):
    a = [output_row(annotation(n), text) for n, text in enumerate(["yes", "no", "no", "yes"])]
    b = [output_row(annotation(n), text) for n, text in enumerate(["yes", "It is.", "yes", None])]
    write_jsonl(tmp_path / "a.jsonl", a)
    write_jsonl(tmp_path / "b.jsonl", b[::-1])  # joined by key, not by line
    result = run("--compare", "a.jsonl", "b.jsonl")
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert "over the same 4 rows; difference is B - A" in result.stdout
    # choice: A has rows 0 and 3 right, B rows 0, 1 and 2; strict and contains do not take "It is." for yes.
    # Wilson A 15.0 to 85.0, B 30.1 to 95.4; phi = (1*0 - 1*2) / sqrt(2*2*3*1) = -0.577
    assert lines[5] == ["choice", "50.0", "75.0", "+25.0", "-46.1", "to", "+74.7", "1", "2", "=", "1.000"]
    assert lines[6][:4] == ["strict", "50.0", "50.0", "+0.0"]
    assert lines[7][:4] == ["contains", "50.0", "50.0", "+0.0"]
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_compare_refuses_different_rows(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [output_row(annotation(n)) for n in range(5)])
    write_jsonl(tmp_path / "b.jsonl", [output_row(annotation(n)) for n in range(1)])
    expected = (
        "--compare: 4 rows of a.jsonl are not in b.jsonl, e.g. v1/q1/scope_motion, v1/q2/scope_motion, "
        "v1/q3/scope_motion; compare runs over the same data"
    )
    assert error_line(run("--compare", "a.jsonl", "b.jsonl")) == expected
    assert error_line(run("--compare", "b.jsonl", "a.jsonl")) == expected


def test_compare_refuses_different_gold_answers(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [output_row(annotation(1, "yes"))])
    write_jsonl(tmp_path / "b.jsonl", [output_row(annotation(1, "no"))])
    assert error_line(run("--compare", "a.jsonl", "b.jsonl")) == (
        "--compare: v1/q1/scope_motion has the short_answer 'yes' in a.jsonl but 'no' in b.jsonl; "
        "compare runs over the same data"
    )


def test_compare_names_a_torn_line(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [output_row(annotation(1))])
    (tmp_path / "b.jsonl").write_text('{"id": "q1", "vid')
    assert error_line(run("--compare", "a.jsonl", "b.jsonl")).startswith("b.jsonl:1: not a JSON object")


# --- the rows file ---------------------------------------------------------------------------------------------------


def test_rows_are_appended_and_found_again(tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    with ev.RowFile(path, FINGERPRINT) as rows:
        assert rows.done == {}
        rows.append(output_row(annotation(1)))
        assert len(path.read_text().splitlines()) == 1  # flushed, not kept until the end
    with ev.RowFile(path, dict(reversed(FINGERPRINT.items()))) as rows:
        assert list(rows.done) == [("v1", "q1", "scope_motion")]
        assert rows.repaired == 0
        rows.append(output_row(annotation(2)))
        assert len(rows.done) == 2
    assert len(path.read_text().splitlines()) == 2
    assert json.loads((tmp_path / "new" / "x.jsonl.run.json").read_text()) == FINGERPRINT


@pytest.mark.parametrize("torn", [b'{"id": "q2", "vid', b"\0\0\0\0", json.dumps(output_row(annotation(2))).encode()])
def test_a_torn_last_line_is_cut_and_done_again(tmp_path, torn):
    path = tmp_path / "x.jsonl"
    with ev.RowFile(path, FINGERPRINT) as rows:
        rows.append(output_row(annotation(1)))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with ev.RowFile(path, FINGERPRINT) as rows:
        assert list(rows.done) == [("v1", "q1", "scope_motion")]
        assert rows.repaired == len(torn)
    assert path.read_bytes() == whole


def test_a_bad_line_before_the_last_is_refused_and_kept(tmp_path):
    path = tmp_path / "x.jsonl"
    with ev.RowFile(path, FINGERPRINT) as rows:
        rows.append(output_row(annotation(1)))
    content = b'{"torn\n' + path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(ev.InputError, match=r"x.jsonl:1: not a JSON object"):
        ev.RowFile(path, FINGERPRINT)
    assert path.read_bytes() == content


def test_another_fingerprint_is_refused_naming_the_fields(tmp_path):
    path = tmp_path / "x.jsonl"
    with ev.RowFile(path, FINGERPRINT) as rows:
        rows.append(output_row(annotation(1)))
    before = path.read_bytes()
    with pytest.raises(ev.InputError) as caught:
        ev.RowFile(path, {"model": "tiny", "data_sha256": "0" * 64, "max_new_tokens": 64, "arm": "audio"})
    assert str(caught.value) == (
        f"{path}: its rows come from another run; arm (None then, 'audio' now); max_new_tokens (32 then, 64 now). "
        f"Choose another --output_file, or start again with --overwrite"
    )
    assert path.read_bytes() == before


def test_overwrite_starts_again(tmp_path):
    path = tmp_path / "x.jsonl"
    with ev.RowFile(path, FINGERPRINT) as rows:
        rows.append(output_row(annotation(1)))
    with ev.RowFile(path, {"model": "other"}, overwrite=True) as rows:
        assert rows.done == {}
    assert path.read_bytes() == b""
    assert json.loads((tmp_path / "x.jsonl.run.json").read_text()) == {"model": "other"}


def test_rows_without_a_companion_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [output_row(annotation(1))])
    with pytest.raises(ev.InputError, match=r"rows without x\.jsonl\.run\.json"):
        ev.RowFile(path, FINGERPRINT)


def test_a_second_writer_is_refused(tmp_path):
    with (
        ev.RowFile(tmp_path / "x.jsonl", FINGERPRINT),
        pytest.raises(ev.InputError, match="another run is writing it"),
    ):
        ev.RowFile(tmp_path / "x.jsonl", FINGERPRINT)


WRITER = """
import sys
sys.path[:0] = sys.argv[1:3]
import evaluate_checkpoint as ev
from test_evaluate_files import FINGERPRINT, annotation, output_row
with ev.RowFile(sys.argv[3], FINGERPRINT) as rows:
    for number in range(60):
        if ("v1", f"q{number}", "scope_motion") not in rows.done:
            rows.append(output_row(annotation(number), "yes" * 300))
            print(number, flush=True)
"""


def test_a_writer_killed_again_and_again_ends_with_the_rows_of_one_that_was_not(tmp_path):
    def write(path, kill_after=None):
        command = [sys.executable, "-c", WRITER, str(SCRIPT.parent), str(Path(__file__).parent), str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for count, _ in enumerate(process.stdout, start=1):
                if count == kill_after:
                    process.send_signal(signal.SIGKILL)

    write(tmp_path / "whole.jsonl")
    for kill_after in (1, 15, 30):
        write(tmp_path / "killed.jsonl", kill_after)
    write(tmp_path / "killed.jsonl")
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len((tmp_path / "whole.jsonl").read_bytes().splitlines()) == 60


# --- the summary file ------------------------------------------------------------------------------------------------


def test_names_of_the_files_beside_the_rows():
    assert ev.summary_path("results/eval.out.jsonl") == Path("results/eval.out.summary.json")
    assert ev.arm_path("r/x.jsonl", "audio", "audio") == Path("r/x.jsonl")
    assert ev.arm_path("r/x.jsonl", "black_frames", "audio") == Path("r/x.black_frames.jsonl")


def test_a_failing_write_leaves_the_old_summary_whole(tmp_path):
    path = tmp_path / "x.summary.json"
    ev.write_json(path, {"n": 1})
    with pytest.raises(ValueError, match="Out of range"):
        ev.write_json(path, {"n": float("nan")})
    assert json.loads(path.read_text()) == {"n": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_git_state_outside_a_repository(tmp_path):
    assert ev.git_state(tmp_path) == {"commit": None, "dirty": None}
