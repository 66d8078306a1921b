"""evaluate_checkpoint.py's files: what it reads, continues, refuses and writes without a model."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate_checkpoint as ev
from tests.conftest import ROOT, read_jsonl, refusal, write_jsonl

FINGERPRINT = {"model": "tiny", "data_sha256": "0" * 64, "max_new_tokens": 32}


def annotation(number, short="yes", video="v1", kind="scope_motion"):
    texts = {"question": f"About {kind}?", "answer": f"{short.capitalize()}, so it is.", "short_answer": short}
    return {"id": f"q{number}", "video_id": video, "frames": [f"{video}_{number}"], "question_type": kind, **texts}


def output_row(row, text="yes"):
    return ev.answer_row(row, text, finish_reason="eos", n_tokens=2, input_mode="audio", audio_file="a.wav")


@pytest.fixture(autouse=True)
def in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path):
    """Four rows; q1 stands for three of them, told apart by video and type."""
    rows = [annotation(1), annotation(1, "no", video="v2"), annotation(1, "no", kind="flush_action"), annotation(2)]
    return str(write_jsonl(tmp_path / "data.jsonl", rows))


@pytest.fixture
def run(capsys):
    """Run the command line; returns (status, stdout, stderr)."""
    return lambda *argv: (ev.main([*map(str, argv)]), *capsys.readouterr())


def error_line(result):
    """The error of a refused run: status 2, one line."""
    status, out, err = result
    assert (status, out, err.count("\n")) == (2, "", 1) and "error: " in err
    return err.partition("error: ")[2].rstrip()


def without_torch(folder, *argv):
    """The script as a process in which torch and everything that needs it raise when imported."""
    traps = folder / "traps"
    traps.mkdir(exist_ok=True)
    for name in ("torch", "torchaudio", "transformers", "peft", "numpy", "PIL", "av", "train_vqa"):
        (traps / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    environment = {**os.environ, "PYTHONPATH": str(traps), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(ROOT / "evaluate_checkpoint.py"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"id": "q1"', "JSON"),
        (b"[1]", "found list"),
        (b'{"id": NaN}', "NaN"),
        (b'{"id": "a", "id": "b"}', "'id' occurs twice"),
        (b'{"id": "\xff"}', "JSON"),
        (b"[" * 10**5, "JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(annotation(0)).encode() + b"\n\n" + line + b"\n")
    message = refusal(ev.read_annotations, path)
    assert message.startswith(f"{path}:3: ") and complaint in message


@pytest.mark.parametrize("name", ["id", "video_id", "question_type", "question", "answer", "short_answer"])
def test_annotations_need_their_texts(tmp_path, name):
    for value in (None, "", 3):
        path = write_jsonl(tmp_path / "a.jsonl", [annotation(1), {**annotation(2), name: value}])
        assert f"a.jsonl:2: '{name}' " in refusal(ev.read_annotations, path)


def test_annotations_refuse_a_repeated_key_but_not_a_repeated_id(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [annotation(1), annotation(1, video="v2"), annotation(1, kind="x")])
    assert len(ev.read_annotations(path)) == 3
    write_jsonl(path, [annotation(1), annotation(2), annotation(1)])
    message = refusal(ev.read_annotations, path)
    assert "a.jsonl:3: " in message and "v1/q1/scope_motion" in message and "line 1" in message
    assert "a.jsonl" in refusal(ev.read_annotations, write_jsonl(path, []))  # no rows


# --- score_only ------------------------------------------------------------------------------------------------------


def test_score_only_counts_missing_rows_as_wrong_and_lists_them(tmp_path, data):
    """Without torch."""
    predictions = [
        {"question_id": "q2", "predicted_answer": "Yes."},
        {"id": "q1", "video_id": "v2", "predicted_answer": "normal"},
        {"id": "q1", "video_id": "v1", "question_type": "scope_motion", "predicted_answer": "The scope moves."},
    ]
    write_jsonl(tmp_path / "p.jsonl", predictions)
    flags = ("--score_only", "--output_file", "p.jsonl", "--eval_data_path", data, "--train_data_path", data)
    done = without_torch(tmp_path, *flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Missing: v1/q1/flush_action\n" in done.stdout
    assert "no p.jsonl.run.json" in " ".join(done.stdout.partition("metric")[0].split())
    assert "For 3 of 4 answers" in done.stdout and "stopped by" not in done.stdout  # the fourth row is missing
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    summary = json.loads((tmp_path / "p.summary.json").read_text())
    assert summary["headline"][0] == "nothing tells how these answers were made: there is no p.jsonl.run.json"
    counts = [summary[name] for name in ("n_total", "n_scored", "n_errors", "n_missing", "missing")]
    assert counts == [4, 3, 0, 1, ["v1/q1/flush_action"]]
    right = {name: part["correct"] for name, part in summary["metrics"].items()}
    assert right == {"choice": 2, "strict": 1, "token": 1, "contains": 2}
    assert summary["manifest"]["sha256"]["eval_data_path"] == ev.sha256_file(data)
    assert summary["manifest"]["sha256"]["output_file"] == ev.sha256_file("p.jsonl")


def test_score_only_with_a_failed_sample_exits_1_and_limit_is_the_denominator(run, tmp_path, data):
    flags = ("--score_only", "--output_file", "p.jsonl", "--eval_data_path", data)
    for row, limit, status, counts in (
        ({"predicted_answer": None, "error": "half a JPEG"}, 0, 1, (4, 1, 3, ["v1/q2/scope_motion"])),
        ({"predicted_answer": "yes"}, 3, 0, (3, 0, 3, [])),
    ):
        write_jsonl(tmp_path / "p.jsonl", [{"id": "q2", **row}])
        assert run(*flags, *(("--limit", limit) if limit else ()))[0] == status
        summary = json.loads((tmp_path / "p.summary.json").read_text())
        assert tuple(summary[name] for name in ("n_total", "n_errors", "n_missing", "failed")) == counts


YES = {"predicted_answer": "yes"}


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([{"id": "q1", **YES}], "1: id 'q1' .*3 rows.*video_id and question_type"),
        ([{"id": "q1", "video_id": "v1", **YES}], "1: id 'q1' .*2 rows.*v1/q1/scope_motion and v1/q1/flush_action"),
        ([{"id": "q2", **YES}, {"id": "q2", "video_id": "v1", **YES}], "2: .*v1/q2/scope_motion.*line 1"),
        ([{"id": "q7", **YES}], "1: .*--eval_data_path has id 'q7'"),
        ([{"id": "q2", "video_id": "v2", **YES}], "1: .*--eval_data_path has video_id 'v2', id 'q2'"),
        ([{"id": "q2", "question": "Is it resting?", **YES}], "1: .*'Is it resting?' .*'About scope_motion?' "),
        ([{"id": "q2"}], "1: 'predicted_answer' "),
        ([{"id": "q2", "predicted_answer": 5}], "1: 'predicted_answer' .*5"),
        ([{"id": 2, **YES}], "1: 'id' .*2"),
        ([{"id": "q2", "video_id": [], **YES}], r"1: 'video_id' .*\[\]"),
    ],
)
def test_score_only_refuses_predictions_it_cannot_place(run, tmp_path, data, rows, named):
    write_jsonl(tmp_path / "p.jsonl", rows)
    message = error_line(run("--score_only", "--output_file", "p.jsonl", "--eval_data_path", data))
    assert re.match("p.jsonl:" + named.replace("?'", "[?]'"), message)
    assert not (tmp_path / "p.summary.json").exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--score_only"], "--eval_data_path, --output_file"),
        (["--output_file", "x.jsonl"], "--eval_data_path, --frames_dir"),
        (["--compare", "a", "b", "--score_only"], "--score_only: no effect with --compare"),
        (["--score_only", "--eval_data_path", "a", "--output_file", "b", "--arms", "text"], "--arms: no effect with"),
        (["--score"], "unrecognized arguments: --score; did you mean --score_only?"),
        (["--eval-data-pth=x"], "did you mean --eval_data_path?"),
        (["--max_eval_sample", "5"], "did you mean --max_eval_samples?"),
        (["--zzz", "5"], "unrecognized arguments: --zzz 5\n"),
        (["--allow-missing-audio"], "--allow_missing_audio: silence in place of missing speech"),
        (["--limit", "-1"], "0 or more, found -1"),
        (["--batch_size", "0"], "1 or more, found 0"),
        (["--arms", "audio,deaf"], "'deaf'"),
        (["--arms", "audio, audio"], "audio, audio"),
        (["--arms", "audio,all"], "'all'"),
        (["--input_mode", "speech"], "invalid choice: 'speech'"),
    ],
)
def test_flags_that_make_no_sense_are_refused(capsys, flags, complaint):
    with pytest.raises(SystemExit) as caught:
        ev.main(flags)
    assert caught.value.code == 2 and complaint in capsys.readouterr().err


def test_dashes_blanks_and_the_name_of_training_mean_the_same():
    """Values keep their dashes."""
    parser = ev.build_parser()
    flags = ["--output-file=a-b.jsonl", "--max-eval-samples", "3", "--arms", "audio, text ", "--audio-dir", "a-b"]
    args = ev.parse_arguments(parser, flags)
    assert (args.output_file, args.limit, args.arms, args.audio_dir) == ("a-b.jsonl", 3, ["audio", "text"], "a-b")


def test_an_output_name_that_cannot_be_used_is_refused_without_torch(run, data, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    names = {"x.json": ".jsonl", "folder.jsonl": "folder.jsonl", data: "--eval_data_path", f"{data}/x.jsonl": data}
    before = Path(data).read_bytes()
    flags = ("--eval_data_path", data, "--frames_dir", "nowhere")
    for name, named in names.items():
        done = without_torch(tmp_path, *flags, "--output_file", name, "--overwrite")
        message = error_line((done.returncode, done.stdout, done.stderr))
        assert message.startswith(f"--output_file {name}: ") and named in message
    assert Path(data).read_bytes() == before


def test_a_missing_file_or_a_wrong_name_is_named_with_its_flag(run, data):
    for name in ("p.jsonl", "p.json"):
        message = error_line(run("--score_only", "--output_file", name, "--eval_data_path", data))
        assert name in message and "--output_file" in message


# --- score_only beside the summary of a run ---


ARMS = ("audio", "black_frames", "silent_audio")
MANIFEST = {"model": {"base": "tiny"}, "versions": {"torch": "2"}, "decoding": {"batch_size": 2}, "sha256": {}}


@pytest.fixture
def generated(tmp_path, data):
    """x.jsonl and its arms, with a summary as a run leaves it, but figures of another table of options."""
    rows = read_jsonl(data)
    for arm, text in zip(ARMS, ("yes", "no", "Perhaps."), strict=True):
        write_jsonl(ev.arm_path("x.jsonl", arm, "audio"), [output_row(row, text) for row in rows])
    files = {arm: ev.arm_path("x.jsonl", arm, "audio").name for arm in ARMS}
    found = {arm: ev.score_rows(rows, {}) for arm in ARMS}
    manifest = {**MANIFEST, "flags": {"train_data_path": None}}
    arms = ev.summarise_arms("audio", found, files)
    for arm, name in files.items():
        arms[arm]["sha256"] = ev.sha256_file(name)
    ev.write_json("x.jsonl.run.json", {"arm": "audio"})
    summary = ev.summarise(rows, found["audio"], arms=arms, manifest=manifest)
    ev.write_json("x.summary.json", {**summary, "of_the_run": 5})
    return lambda **changes: (
        ev.write_json("x.summary.json", {**summary, "manifest": manifest | changes}) if changes else manifest
    )


def rescore(run, data, *flags):
    status, out, err = run("--score_only", "--output_file", "x.jsonl", "--eval_data_path", data, *flags)
    assert err == ""
    return status, out, json.loads(Path("x.summary.json").read_text())


def test_rescoring_keeps_what_the_run_said_and_scores_its_arms(run, data, generated):
    before = generated()
    status, out, summary = rescore(run, data)
    manifest = summary["manifest"]
    rescored = manifest.pop("rescored")
    assert (status, manifest, summary["of_the_run"]) == (0, before, 5)
    assert rescored["sha256"]["output_file"] == ev.sha256_file("x.jsonl") and rescored["python"] and rescored["git"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", rescored["at"])
    right = {arm: part["metrics"]["choice"]["correct"] for arm, part in summary["arms"].items()}
    assert right == {"audio": 2, "black_frames": 2, "silent_audio": 0}
    pair = summary["arms"]["silent_audio"]["versus"]["choice"]
    assert (pair["n"], pair["only_a"], pair["only_b"]) == (4, 2, 0) and "Does it hear?" in out
    assert rescore(run, data)[2]["arms"] == summary["arms"]  # again


def test_rescoring_keeps_the_figures_of_an_arm_whose_file_is_gone_and_says_so(run, data, generated):
    Path("x.black_frames.jsonl").unlink()
    summary = rescore(run, data)[2]
    assert summary["arms"]["black_frames"]["metrics"]["choice"]["correct"] == 0
    assert [line for line in summary["warnings"] if "x.black_frames.jsonl" in line and "silent" not in line]


def test_rescoring_keeps_the_training_majority_and_the_warnings_of_the_run(run, tmp_path, data, generated):
    """All that training and gates told, without the training file; a file that is named wins."""
    told = {"majority": {"scope_motion": "no"}, "warnings": ["not held out: 1 of 4 rows use a frame"]}
    generated(training=told, data_warnings=["seen in training"], gates={"speech": 1e-9, "frames": 1.0})
    for _ in range(2):
        status, _, summary = rescore(run, data)
        assert (status, summary["headline"]) == (0, [*told["warnings"], "seen in training"])
        assert summary["manifest"]["training"] == told and summary["baselines"]["train_majority"] is not None
        assert any("the speech hardly reaches the answers" in line for line in summary["warnings"])
    train = write_jsonl(tmp_path / "train.jsonl", [annotation(7, "no", video="t")])
    summary = rescore(run, data, "--train_data_path", train)[2]
    assert summary["headline"] == ["seen in training"] and summary["baselines"]["train_majority"] == 1 / 4


def test_an_older_summary_is_rescored_and_says_what_it_lacks(run, data, generated):
    generated(flags={"train_data_path": "train.jsonl"}, gates={"speech": None, "frames": 0.5})
    status, _, summary = rescore(run, data)
    assert (status, summary["baselines"]["train_majority"]) == (0, None)
    assert any("--train_data_path" in line for line in summary["warnings"])


def test_rescoring_counts_the_rows_that_the_run_counted(run, data, generated):
    generated(flags={"train_data_path": None, "limit": 2})
    out, summary = rescore(run, data)[1:]
    assert (summary["n_total"], summary["arms"]["black_frames"]["metrics"]["choice"]["n"]) == (2, 2)
    assert "--limit 2, as in the run" in out
    assert rescore(run, data, "--limit", "3")[2]["n_total"] == 3


def test_rows_that_are_not_as_the_run_wrote_them_are_told_of(run, data, generated):
    assert rescore(run, data)[2]["headline"] == []
    rows = read_jsonl("x.jsonl")
    write_jsonl(Path("x.jsonl"), [{**row, "predicted_answer": row["ground_truth"]} for row in rows])
    for _ in range(2):
        _, out, summary = rescore(run, data)
        (line,) = summary["headline"]
        assert line == "edited since the run wrote them, so the figures are not the run's: x.jsonl"
        assert line in " ".join(out.partition("metric")[0].split())
    write_jsonl(Path("x.silent_audio.jsonl"), rows)
    assert rescore(run, data)[2]["headline"] == [f"{line}, x.silent_audio.jsonl"]
    Path("x.summary.json").unlink()
    (line,) = rescore(run, data)[2]["headline"]
    assert line.startswith("nothing tells whether these answers are those that the run wrote: x.summary.json has no")
    Path("x.jsonl.run.json").unlink()
    (line,) = rescore(run, data)[2]["headline"]
    assert line.startswith("nothing tells how these answers were made")


@pytest.mark.parametrize(
    "content", ['{"metrics": {}, "n_to', "[]", '{"accuracy": 0.5}', '{"metrics": {}, "arms": {}, "manifest": 5}', ""]
)
def test_a_summary_that_is_torn_or_foreign_is_refused_and_kept(run, data, generated, content):
    Path("x.summary.json").write_text(content)
    message = error_line(run("--score_only", "--output_file", "x.jsonl", "--eval_data_path", data))
    assert message.startswith("x.summary.json: ")
    assert Path("x.summary.json").read_text() == content


# --- compare ---------------------------------------------------------------------------------------------------------


def test_compare_prints_paired_differences(tmp_path):
    """Without torch."""
    a = [output_row(annotation(n), text) for n, text in enumerate(["yes", "no", "no", "yes"])]
    b = [output_row(annotation(n), text) for n, text in enumerate(["yes", "It is.", "yes", None])]
    write_jsonl(tmp_path / "a.jsonl", a)
    write_jsonl(tmp_path / "b.jsonl", b[::-1])  # joined by key, not by line
    done = without_torch(tmp_path, "--compare", "a.jsonl", "b.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert "over the same 4 rows; difference is B - A" in done.stdout
    # choice: A has rows 0 and 3 right, B rows 0, 1 and 2; the others do not take "It is." for yes.
    # Wilson A 15.0 to 85.0, B 30.1 to 95.4; phi = (1*0 - 1*2) / sqrt(2*2*3*1) = -0.577
    # Four rows show nothing: even 4 of 4 has p = 0.125.
    assert lines[5] == ["choice", "50.0", "75.0", "+25.0", "-46.1", "to", "+74.7", "-", "1", "2", "=", "1.000"]
    assert [line[:4] for line in lines[6:9]] == [[name, "50.0", "50.0", "+0.0"] for name in ev.METRICS[1:]]
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_compare_refuses_different_rows_answers_and_torn_lines(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [output_row(annotation(n)) for n in range(5)])
    write_jsonl(tmp_path / "b.jsonl", [output_row(annotation(n)) for n in range(1)])
    message = error_line(run("--compare", "a.jsonl", "b.jsonl"))
    assert message == error_line(run("--compare", "b.jsonl", "a.jsonl"))
    assert message.startswith("--compare: 4 rows of a.jsonl are not in b.jsonl") and "v1/q3/scope_motion" in message
    write_jsonl(tmp_path / "a.jsonl", [output_row(annotation(1, "yes"))])
    write_jsonl(tmp_path / "b.jsonl", [output_row(annotation(1, "no"))])
    message = error_line(run("--compare", "a.jsonl", "b.jsonl"))
    assert "v1/q1/scope_motion" in message and "'yes' in a.jsonl but 'no' in b.jsonl" in message
    (tmp_path / "b.jsonl").write_text('{"id": "q1", "vid')
    assert error_line(run("--compare", "a.jsonl", "b.jsonl")).startswith("b.jsonl:1: ")


def test_compare_takes_predictions_that_score_only_takes(run, tmp_path):
    gold = [annotation(n, "yes" if n % 2 else "no") for n in range(4)]
    write_jsonl(tmp_path / "gold.jsonl", gold)
    for name, text in (("a", "yes"), ("b", "no")):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"question_id": row["id"], "predicted_answer": text} for row in gold])
    message = error_line(run("--compare", "a.jsonl", "b.jsonl"))
    assert message.startswith("a.jsonl:1: 'video_id'") and "--eval_data_path" in message
    status, out, err = run("--compare", "a.jsonl", "b.jsonl", "--eval_data_path", "gold.jsonl")
    assert (status, err) == (0, "") and out.splitlines()[5].split()[:4] == ["choice", "50.0", "50.0", "+0.0"]
    assert "a.jsonl.run.json" in out and "b.jsonl.run.json" in out  # nothing tells how they were asked
    write_jsonl(tmp_path / "b.jsonl", [{"question_id": "q1", "predicted_answer": "no"}])
    message = error_line(run("--compare", "a.jsonl", "b.jsonl", "--eval_data_path", "gold.jsonl"))
    assert message.startswith("--compare: 3 rows of a.jsonl are not in b.jsonl")


def run_beside(name, sizes, rows=2, **settings):
    """Rows as a run leaves them: with its settings, and its batch sizes in the summary."""
    arm = settings.setdefault("arm", "audio")
    path = ev.arm_path(f"{name}.jsonl", arm, "audio")
    write_jsonl(path, [output_row(annotation(n)) for n in range(rows)])
    ev.write_json(f"{path}.run.json", settings)
    manifest = {"runtime": {"batch_size": sizes}}
    ev.write_json(f"{name}.summary.json", {"schema_version": 1, "metrics": {}, "arms": {}, "manifest": manifest})
    return path


def warnings_of(result):
    status, out, err = result
    assert (status, err) == (0, "")
    lines = " ".join(out.split()).split(" Warning: ")[1:]
    return [line.removeprefix("A and B were not asked alike: ") for line in lines]


def test_compare_says_what_else_than_the_model_differs(run, tmp_path):
    settings = {"prompt_sha256": "1" * 64, "max_eval_frames": 8, "adapter_sha256": "3" * 64, "base_fingerprint": "x"}
    a = run_beside("a", {"audio": 128}, **settings)
    b = run_beside("b", {"audio": 128}, **settings | {"adapter_sha256": "4" * 64, "base_fingerprint": "y"})
    assert [line.split(" (")[0] for line in warnings_of(run("--compare", a, b))] == ["the rows are of 1 patient"]
    b = run_beside(
        "v.2", {"audio": 128, "text": 64}, **settings | {"max_eval_frames": 4, "prompt_sha256": "2"}, arm="text"
    )
    assert warnings_of(run("--compare", a, b))[:-1] == [
        "arm is audio in A, text in B",
        "batch_size is 128 in A, 64 in B",
        "max_eval_frames is 8 in A, 4 in B",
        "prompt differs",
    ]
    rows = [output_row(annotation(n)) for n in range(2)]
    write_jsonl(b, [rows[0], {**rows[1], "question": "Moving?"}])
    assert warnings_of(run("--compare", a, b))[0] == "1 of 2 rows have other questions in B, e.g. v1/q1/scope_motion"
    write_jsonl(a, [{**row, "media_sha256": "1" * 64} for row in rows])
    write_jsonl(b, [{**rows[0], "media_sha256": "1" * 64}, {**rows[1], "media_sha256": "2" * 64}])
    assert warnings_of(run("--compare", a, b))[0].startswith(
        "1 of 2 rows have other frames or speech in B, e.g. v1/q1/"
    )
    Path(f"{b}.run.json").write_text("{")
    assert error_line(run("--compare", a, b)).startswith(f"{b}.run.json: ")


def test_compare_tests_over_videos_from_six_on(run, tmp_path):
    for videos in (5, 6):
        gold = [annotation(n, video=f"v{n % videos}") for n in range(60)]
        for name, text in (("a", "no"), ("b", "yes")):
            write_jsonl(tmp_path / f"{name}.jsonl", [output_row(row, text) for row in gold])
        out = run("--compare", "a.jsonl", "b.jsonl")[1]
        assert (f"p over {videos} videos" in out, "of 5 patients" in out) == (videos == 6, videos == 5)
    assert "choice = 0.031" in out


# --- the rows file ---------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    """A rows file with one row."""
    path = tmp_path / "new" / "x.jsonl"
    with ev.RowFile(path, FINGERPRINT) as rows:
        assert rows.done == {}
        rows.append(output_row(annotation(1)))
        assert len(path.read_text().splitlines()) == 1  # flushed, not kept until the end
    return path


def test_rows_are_appended_and_found_again(path):
    with ev.RowFile(path, dict(reversed(FINGERPRINT.items()))) as rows:
        assert list(rows.done) == [("v1", "q1", "scope_motion")]
        rows.append(output_row(annotation(2)))
        assert len(rows.done) == 2 and "another run" in refusal(ev.RowFile, path, FINGERPRINT)  # a second writer
    assert len(read_jsonl(path)) == 2
    assert json.loads(path.with_name("x.jsonl.run.json").read_text()) == FINGERPRINT
    with ev.RowFile(path, {"model": "other"}, overwrite=True) as rows:
        assert rows.done == {}
    assert path.read_bytes() == b""
    assert json.loads(path.with_name("x.jsonl.run.json").read_text()) == {"model": "other"}


@pytest.mark.parametrize("torn", [b'{"id": "q2", "vid', b"\0\0\0\0", json.dumps(output_row(annotation(2))).encode()])
def test_a_torn_last_line_is_cut_and_done_again(path, torn):
    complete = path.read_bytes()
    path.write_bytes(complete + torn)
    with ev.RowFile(path, FINGERPRINT) as rows:
        assert list(rows.done) == [("v1", "q1", "scope_motion")]
    assert path.read_bytes() == complete


def test_what_is_not_this_runs_is_refused_and_kept(path):
    complete = path.read_bytes()
    path.write_bytes(b'{"torn\n' + complete)  # a bad line before the last
    assert f"{path}:1: " in refusal(ev.RowFile, path, FINGERPRINT)
    assert path.read_bytes() == b'{"torn\n' + complete
    path.write_bytes(complete)
    other = {"model": "tiny", "data_sha256": "0" * 64, "max_new_tokens": 64, "arm": "audio"}
    message = refusal(ev.RowFile, path, other)
    assert message.startswith(f"{path}: ") and "--output_file" in message and "--overwrite" in message
    assert "arm (None then, 'audio' now); max_new_tokens (32 then, 64 now)" in message
    assert path.read_bytes() == complete
    path.with_name("x.jsonl.run.json").unlink()
    assert "x.jsonl.run.json" in refusal(ev.RowFile, path, FINGERPRINT)


def test_a_writer_killed_again_and_again_ends_with_the_rows_of_one_that_was_not(tmp_path):
    def write(path, kill_after=None):
        pid = os.fork()
        if pid:
            return os.waitpid(pid, 0)
        try:
            with ev.RowFile(path, FINGERPRINT) as rows:
                todo = [n for n in range(60) if ("v1", f"q{n}", "scope_motion") not in rows.done]
                for count, number in enumerate(todo):
                    if count == kill_after:
                        os.write(os.open(path, os.O_WRONLY | os.O_APPEND), b'{"id": "q')  # it was about to
                        os.kill(os.getpid(), signal.SIGKILL)
                    rows.append(output_row(annotation(number), "yes" * 300))
        finally:
            os._exit(0)

    write(tmp_path / "undisturbed.jsonl")
    for kill_after in (1, 15, 30, None):
        write(tmp_path / "killed.jsonl", kill_after)
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()
    assert len(read_jsonl(tmp_path / "killed.jsonl")) == 60


# --- the summary file ------------------------------------------------------------------------------------------------


def test_names_of_the_files_beside_the_rows():
    assert ev.summary_path("results/eval.out.jsonl") == Path("results/eval.out.summary.json")
    assert ev.arm_path("r/x.jsonl", "audio", "audio") == Path("r/x.jsonl")
    assert ev.arm_path("r/x.jsonl", "black_frames", "audio") == Path("r/x.black_frames.jsonl")


def test_a_failing_write_leaves_the_old_summary_complete(tmp_path):
    path = tmp_path / "x.summary.json"
    ev.write_json(path, {"n": 1})
    with pytest.raises(ValueError, match="Out of range"):
        ev.write_json(path, {"n": float("nan")})
    assert json.loads(path.read_text()) == {"n": 1} and list(tmp_path.iterdir()) == [path]
    assert ev.git_state(tmp_path) == {"commit": None, "dirty": None}  # outside a repository
