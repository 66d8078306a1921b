"""What an evaluation says of rows that training had, told by content: on any machine, whatever files are called."""

import hashlib
import json
import shutil

import pytest
from PIL import Image

import evaluate_checkpoint as ev
import merge_stage2_to_bf16 as merge
import train_vqa as vqa
from tests.conftest import EVAL_DATA, FIXTURES, TRAIN_DATA, edit_json, read_jsonl

ALL_SEEN = "seen in training, by content: of 5 rows the clip of 5, a frame of 5, the speech of 5, the wording of 5"


def headline(result) -> list[str]:
    """The warnings of a run that succeeded, which stand above its first figures."""
    assert result.status == 0, result.err
    shown = "".join(result.out.partition("metric")[0].split())
    assert all("".join(line.split()) in shown for line in result.summary["headline"])
    assert result.summary["warnings"][: len(result.summary["headline"])] == result.summary["headline"]
    return result.summary["headline"]


def digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:16]


def as_another_data_set(data, new_words=False, new_frames=False, new_speech=False):
    """Rename video, ids and frames of the private copy; ask in other words, or from other files, where asked."""

    def change(rows):
        renamed = []
        for row in rows:
            video = row["video_id"].replace("fx", "new")
            frames = [name.replace("fx", "new") for name in row["frames"]]
            renamed.append({**row, "id": f"new_{row['id']}", "video_id": video, "frames": frames})
            old = next(path for path in sorted(data.audio.iterdir(), reverse=True) if speaks_for(path.stem, row))
            samples = old.read_bytes()
            if new_speech:
                samples += bytes(3)  # other bytes, the same sound
            (data.audio / f"{video}_new_{row['id']}_{row['question_type']}{old.suffix}").write_bytes(samples)
        return [{**row, "question": f"Tell me: {row['question']}"} for row in renamed] if new_words else renamed

    data.rewrite(change)
    for folder in list(data.frames.iterdir()):
        folder = folder.rename(folder.with_name(folder.name.replace("fx", "new")))
        for path in folder.iterdir():
            path = path.rename(path.with_name(path.name.replace("fx", "new")))
            if new_frames:
                with Image.open(path) as image:
                    image.load()
                image.rotate(180).save(path)


def speaks_for(stem: str, row: dict) -> bool:
    names = f"{row['video_id']}_{row['id']}_{row['question_type']}", f"{row['video_id']}_{row['id']}", row["id"]
    return stem in names


def test_a_checkpoint_on_its_own_training_rows_is_told_so(evaluate, trained):
    result = evaluate()
    assert ALL_SEEN in headline(result)
    assert any(line.startswith("not held out: 5 of 5 rows") for line in headline(result))
    path = str(FIXTURES / "smoke.jsonl")
    manifest = result.summary["manifest"]
    assert manifest["flags"]["train_data_path"] == path and "as in training" in result.out
    assert manifest["sha256"]["train_data_path"] == ev.sha256_file(path)
    assert result.summary["baselines"]["train_majority"] is not None


def test_under_other_names_and_without_the_training_file_too(evaluate, checkpoint, data, tmp_path):
    as_another_data_set(data)
    gone = str(tmp_path / "gone.jsonl")
    edit_json(checkpoint / vqa.SETTINGS_FILE, data={"train_data_path": gone})
    lines = headline(evaluate(checkpoint=checkpoint, data=data.eval_flags))
    assert ALL_SEEN in lines and len(lines) == 2
    assert any(gone in line and "--train_data_path" in line for line in lines)


def test_speech_of_the_training_wording_under_other_questions(evaluate, trained, data):
    as_another_data_set(data, new_words=True, new_frames=True)
    seen, swapped = headline(evaluate(data=data.eval_flags))
    assert seen == "seen in training, by content: of 5 rows the speech of 5"
    assert swapped.startswith("speech of training: 5 of 5 rows ") and "--audio_dir" in swapped
    assert "new-001/new_qa_000101/nbi_status" in swapped


def test_what_is_new_is_not_warned_of(evaluate, trained, data):
    as_another_data_set(data, new_words=True, new_frames=True, new_speech=True)
    assert headline(evaluate(data=data.eval_flags)) == []
    shutil.copy(FIXTURES / "frames/fx-002/20318.png", data.frames / "new-002/20318.png")
    assert headline(evaluate("--overwrite", data=data.eval_flags)) == [
        "seen in training, by content: of 5 rows a frame of 3"
    ]


def test_an_adapter_of_an_older_version_is_told_so(evaluate, checkpoint):
    (checkpoint / vqa.DIGESTS_FILE).unlink()
    edit_json(checkpoint / vqa.SETTINGS_FILE, data={"train_data_sha256": None})
    first, other = headline(evaluate(checkpoint=checkpoint))
    assert str(checkpoint) in first and "--train_data_path" in first
    assert str(checkpoint) in other and vqa.DIGESTS_FILE in other
    lines = headline(evaluate("--overwrite", *TRAIN_DATA[:2], checkpoint=checkpoint))
    assert any(line.startswith("not held out: 5 of 5 rows") for line in lines)


def test_a_training_file_that_has_changed_is_not_taken(evaluate, checkpoint, data):
    edit_json(checkpoint / vqa.SETTINGS_FILE, data={"train_data_path": str(data.jsonl)})
    assert evaluate(checkpoint=checkpoint).summary["manifest"]["flags"]["train_data_path"] == str(data.jsonl)
    data.jsonl.write_text(data.jsonl.read_text() + "\n")
    result = evaluate("--overwrite", checkpoint=checkpoint)
    assert any(f"{data.jsonl} has changed" in line for line in headline(result))
    assert result.summary["manifest"]["flags"]["train_data_path"] is None


@pytest.mark.parametrize("content", [b"", b"x" * 40])
def test_damaged_digests_are_refused_by_name_before_weights_load(evaluate, checkpoint, content, no_weights):
    (checkpoint / vqa.DIGESTS_FILE).write_bytes(content)
    result = evaluate(checkpoint=checkpoint)
    assert result.status == 2 and f"{checkpoint / vqa.DIGESTS_FILE}: " in result.err


def test_digests_travel_with_every_save_and_tell_no_names(trained, tiny, tmp_path):
    stored = (trained / vqa.DIGESTS_FILE).read_bytes()
    frames = sorted((FIXTURES / "frames").rglob("*.*"))
    speech = sorted((FIXTURES / "audio").iterdir())
    digests = vqa.read_digests(trained)
    assert {digest(path.read_bytes()) for path in (*frames, *speech)} < digests
    rows = read_jsonl(FIXTURES / "smoke.jsonl")
    clips, wordings = ({str(row[name]) for row in rows} for name in ("frames", "question"))
    files = {path.read_bytes() for path in (*frames, *speech)}
    assert len(stored) == 16 * len(digests) == 16 * (len(files) + len(clips) + len(wordings))
    for folder in (trained, *trained.glob("checkpoint-*")):
        assert (folder / vqa.DIGESTS_FILE).read_bytes() == stored
        assert vqa.find_damage(folder, [vqa.DIGESTS_FILE]) is None

    out = tmp_path / "merged"
    flags = ["--stage1_model_path", tiny, "--stage2_adapter_path", trained, "--output_path", out, "--dtype", "float32"]
    assert merge.main([*map(str, flags)]) == 0
    assert (out / vqa.DIGESTS_FILE).read_bytes() == stored


def test_a_run_from_an_adapter_and_its_resumption_add_their_own(train, trained, data, tmp_path):
    as_another_data_set(data, new_words=True, new_frames=True, new_speech=True)
    first = tmp_path / "first"
    short = (*data.train_flags, "--save_strategy", "steps", "--save_steps", "1")
    assert train(first, *short, "--adapter_path", trained, "--max_steps", "1") == 0
    before, after = vqa.read_digests(trained), vqa.read_digests(first)
    assert before < after and digest((data.frames / "new-002/20318.png").read_bytes()) in after - before
    assert train(first, *short, "--max_steps", "2", "--resume_from_checkpoint", "True") == 0
    assert vqa.read_digests(first) == after and vqa.read_digests(first / "checkpoint-2") == after


def test_empty_frames_stop_an_evaluation_unless_they_may_pass(evaluate, trained, data, no_weights, monkeypatch):
    for path in sorted(data.frames.rglob("*.*")):
        Image.new("RGB", (56, 56)).save(path)
    result = evaluate(data=data.eval_flags)
    assert result.status == 2 and f"{data.jsonl}: 5 of 5 rows " in result.err and "--allow_empty_frames" in result.err
    assert str(data.frames / "fx-001/fx-001_1204.jpg") in result.err and result.rows is None
    monkeypatch.undo()
    for how in (["--allow_empty_frames", "True"], ["--allow_empty_frames", "--overwrite"]):
        lines = headline(evaluate(*how, data=data.eval_flags))
        assert any(f"{data.jsonl}: 5 of 5 rows " in line and "16 of one colour" in line for line in lines)


def test_rescoring_tells_the_same_of_the_rows_that_training_used(evaluate, checkpoint):
    """Of three rows, as --max_train_samples left them."""
    edit_json(checkpoint / vqa.SETTINGS_FILE, data={"max_train_samples": 3})
    done = evaluate(checkpoint=checkpoint)
    assert "not held out: 3 of 5 rows have a video and id that training also had" in headline(done)
    assert ev.main(["--score_only", "--output_file", str(done.path), *EVAL_DATA[:2]]) == 0
    again = json.loads(done.path.with_suffix(".summary.json").read_text())
    assert (again["headline"], again["baselines"]) == (done.summary["headline"], done.summary["baselines"])


def test_a_base_without_its_adapter_is_not_told_of_missing_digests(evaluate, trained):
    assert not any(vqa.DIGESTS_FILE in line for line in headline(evaluate("--no_adapter")))


def test_names_of_files_do_not_reach_an_answer(evaluate, data):
    """The same bytes under other names of video, frames and speech: the same answers, and the same logits."""
    plain = evaluate(name="plain")
    as_another_data_set(data)
    renamed = evaluate(data=data.eval_flags, name="renamed")
    answers = [
        {(row["video_id"][-3:], row["id"].removeprefix("new_")): row["predicted_answer"] for row in result.rows}
        for result in (plain, renamed)
    ]
    assert len(answers[0]) == 5 and answers[0] == answers[1]
    assert plain.summary["manifest"]["gates"] == renamed.summary["manifest"]["gates"]
