"""Rows, frames and speech: what is read, and what is refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

import train_vqa as vqa
from tests.conftest import FIXTURES


def refusal(function, *args) -> str:
    with pytest.raises(vqa.VQAError) as error:
        function(*args)
    return str(error.value)


def edit(row: dict, **changes) -> dict:
    return {**row, **changes}


# ---------------------------------------------------------------------------------------------------------------- rows


def test_rows_of_the_fixtures(rows):
    assert [row.key for row in rows] == [
        "fx-001/qa_000101/nbi_status",
        "fx-001/qa_000102/scope_motion_type",
        "fx-002/qa_000203/nbi_status",
        "fx-002/qa_000101/scope_motion_type",
        "fx-002/qa_000205/tool_identification",
    ]
    assert [row.short_answer for row in rows] == ["yes", "advancing", "no", "withdrawing", "forceps"]
    assert rows[3].line == 4
    assert rows[3].where == f"{FIXTURES / 'smoke.jsonl'}:4"


def test_the_same_frames_carry_different_questions_and_types_both_answers(rows):
    by_clip, by_type = {}, {}
    for row in rows:
        by_clip.setdefault(row.frames, set()).add(row.answer)
        by_type.setdefault(row.question_type, set()).add(row.short_answer)
    assert [len(answers) for answers in by_clip.values()] == [2, 3]
    assert by_type["nbi_status"] == {"yes", "no"}
    assert by_type["scope_motion_type"] == {"advancing", "withdrawing"}


def test_blank_lines_bom_and_crlf_are_read(data):
    text = data.jsonl.read_text()
    data.jsonl.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n\r\n").encode())
    assert [row.line for row in vqa.read_rows(data.jsonl)] == [1, 3, 5, 7, 9]


def test_max_samples(data):
    assert len(vqa.read_rows(data.jsonl, 2)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: '{"id": "qa_1"', "not valid JSON (Expecting ',' delimiter at column 14)"),
        (lambda r: "[1, 2]", "not a JSON object"),
        (lambda r: json.dumps(edit(r, support_ratio=float("nan"))), "NaN is not a JSON number"),
        (lambda r: '{"id": "a", "id": "b"}', "field 'id' occurs twice"),
        (lambda r: {k: v for k, v in r.items() if k != "answer"}, "field 'answer' is missing"),
        (lambda r: edit(r, answer=" "), "field 'answer' must be text, not ' '"),
        (lambda r: edit(r, short_answer=5), "field 'short_answer' must be text, not 5"),
        (lambda r: edit(r, frames=[]), "field 'frames' must be a list of at least one frame name"),
        (lambda r: edit(r, frames=[3]), "field 'frames' must be a list of at least one frame name"),
        (lambda r: edit(r, frames=["../x_1"]), "field 'frames' must be a plain name, not '../x_1'"),
        (lambda r: edit(r, id="/etc/passwd"), "field 'id' must be a plain name, not '/etc/passwd'"),
    ],
)
def test_malformed_row_is_named_with_its_line(data, change, message):
    data.rewrite(lambda stored: [stored[0], change(stored[1]), *stored[2:]])
    assert refusal(vqa.read_rows, data.jsonl) == f"{data.jsonl}:2: {message}"


def test_all_malformed_lines_are_reported_together(data):
    data.rewrite(lambda stored: ["{"] * 25)
    lines = refusal(vqa.read_rows, data.jsonl).splitlines()
    assert len(lines) == 21
    assert lines[19].startswith(f"{data.jsonl}:20: not valid JSON")
    assert lines[20] == "25 problems in all, the first 20 shown"


def test_repeated_row_is_refused_but_a_repeated_id_of_another_video_is_not(data):
    assert [row.id for row in vqa.read_rows(data.jsonl)].count("qa_000101") == 2
    data.rewrite(lambda stored: [*stored, stored[1]])
    message = f"{data.jsonl}:6: the same video, id and question type as line 2; remove one"
    assert refusal(vqa.read_rows, data.jsonl) == message


def test_missing_and_empty_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    assert refusal(vqa.read_rows, tmp_path / "no.jsonl") == f"{tmp_path / 'no.jsonl'}: no such file"
    assert refusal(vqa.read_rows, tmp_path / "empty.jsonl") == f"{tmp_path / 'empty.jsonl'}: holds no rows"


# --------------------------------------------------------------------------------------------------------------- media


def test_frames_are_found_by_name_and_by_number(rows):
    assert rows[0].frame_paths[0] == FIXTURES / "frames/fx-001/fx-001_1204.jpg"
    assert rows[2].frame_paths[0] == FIXTURES / "frames/fx-002/20318.png"


def test_speech_is_found_under_each_of_its_names(rows):
    assert [row.audio_path.name for row in rows] == [
        "fx-001_qa_000101_nbi_status.wav",
        "fx-001_qa_000102_scope_motion_type.mp3",
        "fx-002_qa_000203.flac",
        "fx-002_qa_000101_scope_motion_type.mp3",
        "qa_000205.ogg",
    ]


def test_the_longest_name_wins(data):
    speech = (data.audio / "qa_000205.ogg").read_bytes()
    (data.audio / "fx-002_qa_000205.ogg").write_bytes(speech)
    assert vqa.load_rows(*data.args)[4].audio_path.name == "fx-002_qa_000205.ogg"


def test_missing_frame_and_missing_speech_are_named_with_the_line(data):
    (data.frames / "fx-001/fx-001_1212.jpg").unlink()
    (data.audio / "qa_000205.ogg").unlink()
    lines = refusal(vqa.load_rows, *data.args).splitlines()
    assert lines == [
        f"{data.jsonl}:1: frame {data.frames / 'fx-001/fx-001_1212'}{{.jpg,.jpeg,.png}} is missing",
        f"{data.jsonl}:2: frame {data.frames / 'fx-001/fx-001_1212'}{{.jpg,.jpeg,.png}} is missing",
        f"{data.jsonl}:5: no speech in {data.audio} as fx-002_qa_000205_tool_identification, fx-002_qa_000205 or "
        "qa_000205 (.mp3, .wav, .flac, .ogg)",
        "3 problems in all",
    ]


def test_half_a_jpeg_is_refused(data):
    path = data.frames / "fx-001/fx-001_1212.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = refusal(vqa.load_rows, *data.args)
    assert message.startswith(f"{data.jsonl}:1: frame {path} cannot be decoded (")
    assert message.endswith("; replace it or remove the row (1 more lines need it)")


def test_speech_that_is_no_sound_file_is_refused(data):
    path = data.audio / "qa_000205.ogg"
    path.write_bytes(b"not a sound")
    message = refusal(vqa.load_rows, *data.args)
    assert message.startswith(f"{data.jsonl}:5: speech {path} cannot be decoded (")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(0), "holds no sound; replace it or remove the row"),
        (np.full(8000, np.nan), "holds samples that are not finite; replace it or remove the row"),
        (np.full(30 * 8000 + 1, 0.1), "lasts 30.0 s, the model hears at most 30; shorten it"),
    ],
)
def test_speech_of_the_wrong_content_is_refused(tmp_path, samples, message):
    path = tmp_path / "speech.wav"
    soundfile.write(path, samples, 8000, subtype="FLOAT")
    assert refusal(vqa.decode_audio, path) == f"speech {path} {message}"


def test_one_speech_file_for_two_questions_names_both_lines(data):
    for path in data.audio.glob("*qa_000101*"):
        path.unlink()
    soundfile.write(data.audio / "qa_000101.wav", np.full(1600, 0.1), 16000)
    shared = data.audio / "qa_000101.wav"
    assert refusal(vqa.load_rows, *data.args) == (
        f"{data.jsonl}:4: asks another question than {data.jsonl}:1, but both would play {shared}; "
        "name the files {video_id}_{id}_{question_type}, or give each question file its own folder"
    )


@pytest.mark.parametrize(
    ("extension", "rate", "channels"), [("wav", 8000, 1), ("mp3", 44100, 2), ("flac", 48000, 1), ("ogg", 22050, 2)]
)
def test_speech_of_any_rate_and_channel_count_becomes_16_khz_mono(tmp_path, extension, rate, channels):
    time = np.arange(rate) / rate  # one second of 440 Hz
    path = tmp_path / f"tone.{extension}"
    soundfile.write(path, np.stack([0.5 * np.sin(2 * np.pi * 440 * time)] * channels, axis=1), rate)
    speech = vqa.load_speech(path)
    assert speech.dtype == np.float32
    assert abs(len(speech) - 16000) <= 2500 * (extension == "mp3")  # an mp3 is padded to whole blocks
    spectrum = np.abs(np.fft.rfft(speech))
    assert round(spectrum.argmax() * 16000 / len(speech)) in range(438, 443)


def test_channels_are_averaged(tmp_path):
    soundfile.write(tmp_path / "two.wav", np.tile([0.5, -0.25], (16000, 1)), 16000, subtype="FLOAT")
    assert np.allclose(vqa.load_speech(tmp_path / "two.wav"), 0.125)


def test_frames_are_scaled_down_and_never_up(tmp_path):
    Image.new("RGB", (1240, 1080)).save(tmp_path / "big.png")
    Image.new("L", (50, 20)).save(tmp_path / "small.png")
    assert vqa.load_frame(tmp_path / "big.png", 384).size == (384, 334)
    small = vqa.load_frame(tmp_path / "small.png", 384)
    assert (small.size, small.mode) == ((50, 20), "RGB")


@pytest.mark.parametrize("name", ["frame.png", "frame.jpg"])
def test_a_frame_of_the_wanted_size_does_without_its_file(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        stored = np.asarray(image)
    frame = vqa.load_frame(tmp_path / name, 50)
    (tmp_path / name).unlink()
    assert np.array_equal(np.asarray(frame), stored)
    assert frame.resize((10, 4)).size == (10, 4)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert vqa.load_frame(tmp_path / "turned.jpg", 384).size == (20, 60)


# ------------------------------------------------------------------------------------------------------- frame choice


@pytest.mark.parametrize(
    ("count", "limit", "expected"),
    [
        (8, 6, [0, 1, 2, 4, 5, 6]),
        (8, 4, [0, 2, 4, 6]),
        (8, 1, [0]),
        (8, 8, list(range(8))),
        (5, 6, list(range(5))),
        (1, 6, [0]),
        (8, None, list(range(8))),
    ],
)
def test_select_frames_in_evaluation(processor, count, limit, expected):
    dataset = vqa.SurgicalVQADataset([], processor, max_eval_frames=limit, is_eval=True)
    assert dataset._select_frames(list(range(count))) == expected


def test_select_frames_in_training_ignores_the_eval_limit(processor):
    assert vqa.SurgicalVQADataset([], processor, max_eval_frames=6)._select_frames(list(range(8))) == list(range(8))
    dataset = vqa.SurgicalVQADataset([], processor, max_train_frames=2, max_eval_frames=6)
    assert dataset._select_frames(list(range(8))) == [0, 4]


def test_dataset_reads_a_path(processor, data):
    dataset = vqa.SurgicalVQADataset(data.jsonl, processor, data.frames, data.audio, max_eval_frames=6, is_eval=True)
    assert len(dataset) == 5
    assert dataset[0]["image_grid_thw"].tolist() == [[1, 4, 4]] * 6


def test_shipped_paths_are_relative_to_the_working_folder(rows):
    assert all(isinstance(path, Path) for row in rows for path in row.frame_paths)
