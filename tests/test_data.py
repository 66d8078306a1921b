"""Rows, frames and speech, sound, damaged, hostile and unusual: read right, or refused by name before weights load."""

import contextlib
import gc
import io
import json
import os
import re
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import soundfile
from PIL import Image

import evaluate_checkpoint as ev
import train_vqa as vqa
from tests.conftest import FIXTURES, TINY, edit_json, refusal, small_disk

TONE = 0.3 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
SPOKEN = ["fx-001_qa_000101_nbi_status.wav", "fx-001_qa_000102_scope_motion_type.mp3", "fx-002_qa_000203.flac",
          "fx-002_qa_000101_scope_motion_type.mp3", "qa_000205.ogg"]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- rows


def test_rows_of_the_fixtures(rows):
    """The same frames carry different questions, and types both answers."""
    assert [(row.key, row.short_answer) for row in rows] == [
        ("fx-001/qa_000101/nbi_status", "yes"),
        ("fx-001/qa_000102/scope_motion_type", "advancing"),
        ("fx-002/qa_000203/nbi_status", "no"),
        ("fx-002/qa_000101/scope_motion_type", "withdrawing"),
        ("fx-002/qa_000205/tool_identification", "forceps"),
    ]
    assert (rows[3].line, rows[3].where) == (4, f"{FIXTURES / 'smoke.jsonl'}:4")
    assert rows[0].frame_paths[0] == FIXTURES / "frames/fx-001/fx-001_1204.jpg"  # by name
    assert rows[2].frame_paths[0] == FIXTURES / "frames/fx-002/20318.png"  # by number
    assert [row.audio_path.name for row in rows] == SPOKEN


def test_blank_lines_bom_and_crlf_are_read_and_rows_limited(data):
    text = data.jsonl.read_text()
    data.jsonl.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n\r\n").encode())
    assert [row.line for row in vqa.read_rows(data.jsonl)] == [1, 3, 5, 7, 9]
    assert len(vqa.read_rows(data.jsonl, 2)) == 2


ESCAPES = ["../x_1", "/etc/passwd", ".._1", "._1", "a\0_1", "x" * 130 + "_1", "a\\b_1"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ('{"id": "qa_1"', "JSON .*column 14"),
        ('{"id": "a", "video_id": "v"', "JSON .*column 28"),
        ("[1, 2]", "object"),
        ({"support_ratio": float("nan")}, "NaN"),
        ('{"id": "a", "id": "b"}', "'id' occurs twice"),
        ({"answer": None}, "'answer'"),
        ({"answer": " "}, "'answer' .*' '"),
        ({"short_answer": 5}, "'short_answer' .*5"),
        ({"frames": []}, "'frames'"),
        ({"frames": [3]}, "'frames'"),
        *(({"frames": [frame]}, f"'frames' .*{re.escape(repr(frame)[:100])}") for frame in ESCAPES),
        *(({field: name}, f"{field!r} .*{re.escape(repr(name))}")
          for field in ("id", "video_id", "question_type") for name in ("..", "../other", "/abs", "a\0b")),
        (b"\xff\xfe{", r"UTF-8 .*\(byte 1 of the line\)"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"id": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b'{"id": "a\\ud800"}', r"'id' .*'a\\ud800'"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_named_with_its_line(data, change, named):
    lines = data.jsonl.read_bytes().splitlines()
    if isinstance(change, dict):
        row = {**json.loads(lines[1]), **change}
        change = json.dumps({name: value for name, value in row.items() if value is not None})
    lines[1] = change if isinstance(change, bytes) else change.encode()
    data.jsonl.write_bytes(b"\n".join(lines))
    message = refusal(vqa.read_rows, data.jsonl)
    assert message.startswith(f"{data.jsonl}:2: ") and re.search(named, message) and "\n" not in message


def test_all_malformed_lines_are_reported_together(data, tmp_path):
    data.rewrite(lambda stored: ["{"] * 25)
    *lines, last = refusal(vqa.read_rows, data.jsonl).splitlines()
    assert len(lines) == 20 and lines[19].startswith(f"{data.jsonl}:20: ")
    assert last.startswith("25 problems in all")
    data.jsonl.write_text("\n")
    for path in (tmp_path / "no.jsonl", data.jsonl):  # missing, or without rows
        assert refusal(vqa.read_rows, path).startswith(f"{path}: ")


def test_repeated_row_is_refused_but_a_repeated_id_of_another_video_is_not(data):
    assert [row.id for row in vqa.read_rows(data.jsonl)].count("qa_000101") == 2
    data.rewrite(lambda stored: [*stored, stored[1]])
    message = refusal(vqa.read_rows, data.jsonl)
    assert message.startswith(f"{data.jsonl}:6: ") and "line 2" in message


# --------------------------------------------------------------------------------------------------------------- media


def test_the_longest_name_wins(data):
    (data.audio / "fx-002_qa_000205.ogg").write_bytes((data.audio / "qa_000205.ogg").read_bytes())
    assert vqa.load_rows(*data.args)[4].audio_path.name == "fx-002_qa_000205.ogg"


def test_missing_undecodable_and_malformed_come_in_one_report_with_their_lines(data):
    jpg, png, ogg = data.frames / "fx-001/fx-001_1212.jpg", data.frames / "fx-002/20318.png", data.audio / SPOKEN[4]
    jpg.unlink()
    *lines, last = refusal(vqa.load_rows, *data.args).splitlines()
    expected = [f"{data.jsonl}:{n}: frame {jpg.with_suffix('')}{{{','.join(vqa.FRAME_EXTENSIONS)}}} " for n in (1, 2)]
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected
    ogg.unlink()
    line = refusal(vqa.load_rows, *data.args).splitlines()[2]
    assert line.startswith(f"{data.jsonl}:5: ") and str(data.audio) in line and ", ".join(vqa.AUDIO_EXTENSIONS) in line
    assert all(name in line for name in ("fx-002_qa_000205_tool_identification", "fx-002_qa_000205", "qa_000205"))
    ogg.write_bytes(b"")
    png.unlink()
    data.rewrite(lambda stored: ["{", *stored[1:]])
    *lines, last = refusal(vqa.load_rows, *data.args).splitlines()
    starts = ["1: ", "2: frame", "3: frame", "4: frame", "5: frame", "5: speech"]
    assert [line.removeprefix(f"{data.jsonl}:")[: len(s)] for line, s in zip(lines, starts, strict=True)] == starts
    assert last.startswith("6 problems in all")


def test_half_a_jpeg_and_speech_that_is_no_sound_file_are_refused(data):
    jpg, ogg = data.frames / "fx-001/fx-001_1212.jpg", data.audio / SPOKEN[4]
    jpg.write_bytes(jpg.read_bytes()[: jpg.stat().st_size // 2])
    ogg.write_bytes(b"not a sound")
    one, other, *_ = refusal(vqa.load_rows, *data.args).splitlines()
    assert one.startswith(f"{data.jsonl}:1: frame {jpg} cannot be decoded (") and "1 more lines" in one
    assert other.startswith(f"{data.jsonl}:5: speech {ogg} is in no format that is known")


def test_one_speech_file_for_two_questions_names_both_lines(data):
    for path in data.audio.glob("*qa_000101*"):
        path.unlink()
    shared = data.audio / "qa_000101.wav"
    soundfile.write(shared, np.full(1600, 0.1), 16000)
    message = refusal(vqa.load_rows, *data.args)
    assert message.startswith(f"{data.jsonl}:4: ") and "\n" not in message
    assert all(str(part) in message for part in (f"{data.jsonl}:1", shared, "{video_id}_{id}_{question_type}"))


def test_links_out_of_the_folders_are_refused_unless_allowed(data, tmp_path):
    outside = tmp_path / "disk"
    outside.mkdir()
    frame, speech = data.frames / "fx-001/fx-001_1204.jpg", data.audio / SPOKEN[4]
    for path in (frame, speech):
        path.rename(outside / path.name)
        path.symlink_to(outside / path.name)
    *lines, last = refusal(vqa.load_rows, *data.args).splitlines()
    for line, (n, path, root) in zip(
        lines, ((1, frame, data.frames), (2, frame, data.frames), (5, speech, data.audio)), strict=True
    ):
        assert line.startswith(f"{data.jsonl}:{n}: ") and f"{path} is a link out of {root}" in line
        assert "--allow_symlinks" in line
    assert last.startswith("3 problems")
    assert len(vqa.load_rows(*data.args, allow_symlinks=True)) == 5
    for path in (frame, speech):
        path.unlink()
        (outside / path.name).rename(path)

    (data.frames / "fx-001").rename(tmp_path / "moved")  # a linked video folder too; not links inside, or linked roots
    (data.frames / "fx-001").symlink_to(tmp_path / "moved")
    assert "is a link out of" in refusal(vqa.load_rows, *data.args)
    (data.frames / "fx-001").unlink()
    (tmp_path / "moved").rename(data.frames / "kept")
    (data.frames / "fx-001").symlink_to("kept")
    (tmp_path / "link").symlink_to(data.frames)
    assert len(vqa.load_rows(data.jsonl, tmp_path / "link", data.audio)) == 5


def test_a_clip_of_one_frame_and_a_sample_longer_than_the_context(data, tmp_path):
    data.rewrite(lambda stored: [{**stored[0], "frames": stored[0]["frames"][:1]}, *stored[1:]])
    assert len(vqa.load_rows(*data.args)[0].frame_paths) == 1
    (tmp_path / "model").mkdir()
    for file in TINY.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    edit_json(tmp_path / "model/config.json", max_position_embeddings=200)
    flags = [*data.train_flags, "--init", "random", "--model_name_or_path", str(tmp_path / "model"), "--dry_run"]
    first = refusal(vqa.main, flags).splitlines()[0]
    assert first.startswith(f"{data.jsonl}:1: fx-001/qa_000101/nbi_status takes ") and " 200" in first
    assert "--max_image_size" in first and "--max_train_frames" in first


# ------------------------------------------------------------------------------------------------------------- folders


def lay_out(data, pattern, suffix=None):
    """Rename the speech of all rows, or their frames where the pattern has any, to what the pattern says."""
    of_frames, moves = "{frame" in pattern, {}
    for row in vqa.load_rows(*data.args):
        frames = zip(row.frames, row.frame_paths, strict=True) if of_frames else [("", row.audio_path)]
        for frame, path in frames:
            stem = (data.frames if of_frames else data.audio) / vqa.fill_pattern(pattern, row, frame)
            moves[path] = stem.parent / (stem.name + (suffix or path.suffix))
    for old, new in moves.items():
        new.parent.mkdir(parents=True, exist_ok=True)
        old.rename(new)
    return [*moves.values()]


@pytest.mark.parametrize(
    ("flag", "pattern"),
    [
        ("--audio_pattern", "out_{video_id}/{id}"),
        ("--audio_pattern", "{video_id}/{video_id}_{id}_{question_type}"),
        ("--audio_pattern", "{file}/{video_id}_{id}"),
        ("--frame_pattern", "{frame}"),
        ("--frame_pattern", "{file}/{video}/{frame_number}"),
    ],
)
def test_other_folders_are_read_by_a_flag_that_the_refusal_names(data, capsys, flag, pattern):
    files = lay_out(data, pattern)
    argv = [*data.train_flags, "--check_data"]
    message = refusal(vqa.main, argv)
    assert message.startswith(f"{data.jsonl}:1: ") and f"{flag} {pattern!r} would find 5 of 5" in message
    assert "\n" not in message
    assert vqa.main([*argv, flag, pattern]) == 0
    rows = vqa.load_rows(*data.args, **{flag.removeprefix("--"): pattern})
    assert {path for row in rows for path in row.media} >= {*files}


def test_names_with_upper_case_extensions_and_pictures_by_number_need_no_flag(data):
    files = lay_out(data, "{video_id}_{id}", ".MP3") + lay_out(data, "{video}/{frame_number}", ".Jpg")
    rows = vqa.load_rows(*data.args)  # what the content is, the decoders find out
    assert {path for row in rows for path in row.media} == {*files}
    (lower := files[0].with_suffix(".mp3")).write_bytes(files[0].read_bytes())
    files[0].with_suffix(".wav").mkdir()  # a folder is no file
    assert vqa.load_rows(*data.args)[0].audio_path == lower


def test_where_in_and_out_fit_alike_the_name_of_the_question_file_decides(data):
    files = lay_out(data, "out_{video_id}/{id}")
    for file in files:
        (other := data.audio / file.parent.name.replace("out", "in")).mkdir(exist_ok=True)
        (other / file.name).write_bytes(file.read_bytes())
    assert "--audio_pattern 'out_{video_id}/{id}' or 'in_{video_id}/{id}' would find 5 of 5" in refusal(
        vqa.load_rows, *data.args
    )
    data.rewrite(lambda stored: [row for row in stored if row["video_id"] == "fx-001"])
    data.jsonl.rename(path := data.jsonl.with_name("in_fx-001.jsonl"))
    message = refusal(vqa.load_rows, path, data.frames, data.audio)
    assert "--audio_pattern '{file}/{id}' would find 2 of 2" in message


def test_names_that_no_known_pattern_has_are_shown(data):
    files = sorted(lay_out(data, "{question_type}/x{video_id}-{id}"))
    message = refusal(vqa.load_rows, *data.args)
    assert message.startswith(f"{data.jsonl}:1: no speech in {data.audio} as ") and "--audio_pattern" in message
    assert sum(str(path) in message for path in files) == 2
    for path in files:
        path.unlink()
    assert f"{data.audio} holds no files" in refusal(vqa.load_rows, *data.args)


def test_a_file_of_the_right_name_that_is_not_read_is_named(data):
    speech, frame = data.audio / SPOKEN[4], data.frames / "fx-001/fx-001_1212.jpg"
    one, other = speech.rename(speech.with_suffix(".wma")), frame.rename(frame.with_suffix(".gif"))
    message = refusal(vqa.load_rows, *data.args)
    assert f"{one} lies there" in message and f"{other} lies there" in message
    other.rename(frame)
    first, *_ = [path.rename(path.with_suffix(".wma")) for path in sorted(data.audio.iterdir())]
    message = refusal(vqa.load_rows, *data.args)
    assert f"{first} lies there" in message and "\n" not in message


REFUSED_PATTERNS = [
    ("--audio_pattern", "{name}/{id}", "{name}"),
    ("--audio_pattern", "{frame}", "{frame}"),
    ("--audio_pattern", "{id!r}", "{id}"),
    ("--audio_pattern", "{id:>9}", "{id}"),
    ("--audio_pattern", "{id.__class__}", "{id.__class__}"),
    ("--audio_pattern", "{id", "'}'"),
    ("--audio_pattern", "../{id}", "'..'"),
    ("--audio_pattern", "/{id}", "below the folder"),
    ("--audio_pattern", "a\\{id}", "backslashes"),
    ("--audio_pattern", "{id}.MP3", "extension"),
    ("--audio_pattern", "speech", "{id}"),
    ("--audio_pattern", "", "below the folder"),
    ("--frame_pattern", "{video}/{id}", "{frame} or {frame_number}"),
    ("--frame_pattern", "{frame}.jpg", "extension"),
]


@pytest.mark.parametrize(("flag", "pattern", "named"), REFUSED_PATTERNS)
def test_a_pattern_that_is_refused_before_data_are_read(flag, pattern, named):
    message = refusal(
        vqa.main, ["--train_data_path", "x", "--frames_dir", "x", "--audio_dir", "x", "--check_data", flag, pattern]
    )
    start = f"{flag} {pattern!r}: "
    assert message.startswith(start) and named in message.removeprefix(start) and "\n" not in message


def test_a_pattern_does_not_lead_out_of_its_folder(data):
    """Not even by a number that is `..`, or none."""
    (data.frames.parent / "fx-001.jpg").write_bytes((data.frames / "fx-001/fx-001_1204.jpg").read_bytes())
    for name, pattern in (("fx-001_..", "{frame_number}/{video}"), ("fx-001_", "{frame_number}/{video}")):
        data.rewrite(lambda stored, name=name: [{**stored[0], "frames": [name]}])
        message = refusal(vqa.load_rows, *data.args, allow_symlinks=True, frame_pattern=pattern)
        assert message.startswith(f"{data.jsonl}:1: frame ") and "is missing" in message


def test_one_file_for_frames_of_two_videos_is_refused(data):
    def renumber(stored):
        return [{**row, "frames": [f"{row['video_id']}_{n}" for n in (1204, 1208)]} for row in stored[:3]]

    data.rewrite(renumber)
    for path in (data.frames / "fx-001").iterdir():
        path.rename(data.frames / path.name.removeprefix("fx-001_"))
    message = refusal(vqa.load_rows, *data.args, frame_pattern="{frame_number}")
    assert message.startswith(f"{data.jsonl}:3: ") and "\n" not in message
    assert all(part in message for part in ("fx-001_1204", "fx-002_1204", "1204.jpg", f"{data.jsonl}:1", "{video}"))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda text: text.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (lambda text: text.encode("utf-16-be"), "is UTF-16 text; save it as UTF-8"),
        (
            lambda text: ("\ufeff [\n" + ",\n".join(text.splitlines()) + "]").encode(),
            "is a JSON array; write one object",
        ),
    ],
)
def test_a_question_file_of_another_kind_is_called_by_its_name(data, content, named):
    data.jsonl.write_bytes(content(data.jsonl.read_text()))
    for read in (vqa.read_rows, ev.read_annotations):
        message = refusal(read, data.jsonl)
        assert message.startswith(f"{data.jsonl}: {named}") and "\n" not in message


def test_frames_of_two_sizes_are_found_before_training(data, train, tmp_path, no_weights):
    small, big = data.frames / "fx-001/fx-001_1204.jpg", data.frames / "fx-001/fx-001_1220.jpg"
    Image.linear_gradient("L").resize((56, 112)).save(big)
    with Image.open(small) as image:
        width, height = image.size
    run = (tmp_path / "out", *data.train_flags, "--max_train_frames", "8", "--frame_mode", "video")
    both = f"frames {small} ({width} x {height}) and {big} (56 x 112) differ in size"
    for how in ((), ("--check_data",), ("--dry_run",)):
        first, other, _ = refusal(train, *run, *how).splitlines()
        assert first.startswith(f"{data.jsonl}:1: {both}") and other.startswith(f"{data.jsonl}:2: {both}")
        assert "--frame_mode" in first
    assert train(tmp_path / "out", *data.train_flags, "--frame_mode", "images", "--check_data") == 0
    Image.linear_gradient("L").resize((width + 1, height)).save(big)  # scaled for the model they are of one size
    assert train(*run, "--check_data") == 0


def test_frames_of_two_sizes_that_are_left_out_or_not_shown(data, train, capsys, tmp_path):
    Image.linear_gradient("L").resize((56, 112)).save(data.frames / "fx-001/fx-001_1208.jpg")  # the second of eight
    run = (tmp_path / "out", *data.train_flags, "--frame_mode", "video", "--max_steps", "1", "--save_strategy", "no")
    assert train(*run, "--check_data", "--max_train_frames", "2") == 0
    assert train(*run, "--max_train_frames", "8", "--skip_bad_samples", "--eval_data_path", data.jsonl) == 0
    skipped = vqa.load_settings(tmp_path / "out")["skipped"]
    assert len(skipped) == 4 and all("fx-001_1208.jpg (56 x 112) differ in size" in text for text in skipped)


# -------------------------------------------------------------------------------------------------------------- frames


def saved(tmp_path, image, name="frame.png", **kwargs):
    image.save(tmp_path / name, **kwargs)
    return vqa.decode_frame(tmp_path / name)


def test_frames_are_scaled_down_and_never_up_and_turned_as_exif_says(tmp_path, processor):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, image, size, how in (
        ("big.png", Image.new("RGB", (1240, 1080)), (384, 334), {}),
        ("small.png", Image.new("L", (50, 20)), (50, 20), {}),
        ("turned.jpg", Image.new("RGB", (60, 20)), (20, 60), {"exif": exif}),
    ):
        image.save(tmp_path / name, **how)
        frame = vqa.load_frame(tmp_path / name, 384)
        assert (frame.size, frame.mode) == (size, "RGB")
    frame = saved(tmp_path, Image.new("RGB", (1, 1), (1, 2, 3)))  # one pixel is a frame
    assert (frame.size, frame.getpixel((0, 0))) == ((1, 1), (1, 2, 3))
    assert processor.image_processor(images=[frame])["image_grid_thw"].tolist() == [[1, 4, 4]]


@pytest.mark.parametrize("name", ["frame.png", "frame.jpg"])
def test_a_frame_of_the_wanted_size_does_without_its_file(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        stored = np.asarray(image)
    frame = vqa.load_frame(tmp_path / name, 50)
    (tmp_path / name).unlink()
    assert np.array_equal(np.asarray(frame), stored) and frame.resize((10, 4)).size == (10, 4)


def test_every_kind_of_pixel_keeps_its_colours(tmp_path):
    """16-bit grey is scaled and not cut off."""
    grey = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    assert np.asarray(saved(tmp_path, Image.fromarray(grey)))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    cmyk = saved(tmp_path, Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK"), "cmyk.jpg", quality=100)
    assert np.abs(np.asarray(cmyk)[8, 8].astype(int) - (255, 0, 0)).max() < 8
    palette = Image.new("P", (4, 4))
    palette.putpalette([10, 20, 30] * 256)
    assert saved(tmp_path, palette, transparency=bytes(256)).getpixel((0, 0)) == (10, 20, 30)
    assert saved(tmp_path, Image.new("RGBA", (4, 4), (9, 8, 7, 0))).getpixel((0, 0)) == (9, 8, 7)
    assert saved(tmp_path, Image.new("1", (4, 4), 1)).getpixel((0, 0)) == (255, 255, 255)


def png(width: int, height: int, body: bytes) -> bytes:
    """A PNG whose header says `width` x `height`, whatever `body` decodes to."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((content, "is in no format that is known") for content in (b"hello", "BMP", "TIFF")),
        ("GIF", "is a GIF image"),
        *((b"", "is empty"), (b"\n<!DOCTYPE html>", "is an HTML page"), (b"RIFF\0\0\0\0WAVEfmt ", "is a WAV")),
        *(("WEBP", "is a WebP image called .jpg"), (b"\xff\xd8\xff", "cannot be decoded (cannot identify image file")),
        (png(10_000, 10_000, zlib.compress(b"")), "has 10000 x 10000 pixels"),
        (png(60_000, 60_000, zlib.compress(b"")), "cannot be decoded (Image size (3600000000 pixels)"),
        (png(2, 1000, zlib.compress(b"")), "has 2 x 1000 pixels"),
        (png(20, 20, zlib.compress(b"\0" * 100)), "cannot be decoded (image file is truncated"),
        (png(20, 20, zlib.compress(b"\0" * 1220))[:-12], "cannot be decoded (it is cut off"),
    ],
)
def test_images_that_are_refused(tmp_path, content, message):
    """Among them other formats behind the extension."""
    path = tmp_path / "frame.jpg"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        Image.new("RGB", (8, 8)).save(path, format=content)
    assert refusal(vqa.decode_frame, path).startswith(f"frame {path} {message}")


# -------------------------------------------------------------------------------------------------------------- speech


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (np.zeros(0), 8000, "cannot be decoded (it holds no sound)"),
        (np.zeros(16000), 16000, "is silent throughout"),
        (np.stack([TONE, -TONE], axis=1), 16000, "is silent once its channels are averaged, as they cancel"),
        (TONE[:1599], 16000, "lasts 0.100 s"),
        (np.tile(TONE, 31), 16000, "lasts more than the 30 s"),
        (np.full(30 * 8000 + 1, 0.1), 8000, "lasts more than the 30 s"),
        (TONE, 4000, "has 4000 samples a second"),
        (TONE, 44101, "has 44101 samples a second"),
        (np.full(1600, np.inf), 16000, "holds samples that are not finite"),
        (np.full(8000, np.nan), 8000, "holds samples that are not finite"),
    ],
)
def test_speech_that_is_refused(tmp_path, samples, rate, message):
    path = tmp_path / "speech.wav"
    soundfile.write(path, samples, rate, subtype="FLOAT")
    assert refusal(vqa.decode_audio, path).startswith(f"speech {path} {message}")


@pytest.mark.parametrize("cut", [0.5, 700, 10, 1])
def test_speech_that_is_cut_off(tmp_path, cut):
    for name in {name.rpartition(".")[2]: name for name in SPOKEN}.values():
        whole = (FIXTURES / "audio" / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: int(len(whole) * cut) if cut < 1 else len(whole) - cut])
        message = refusal(vqa.decode_audio, tmp_path / name)
        assert message.startswith(f"speech {tmp_path / name} ")
        assert "is cut off" in message or (name.endswith("flac") and "cannot be decoded (" in message)


def test_an_mp3_without_a_length_header(tmp_path):
    """Its end is that of its last block: 76,011 samples, and the delay and padding of encoder and decoder."""
    whole, path = (FIXTURES / "audio" / SPOKEN[1]).read_bytes(), tmp_path / "speech.mp3"
    assert len(vqa.decode_audio(FIXTURES / "audio" / SPOKEN[1])[0]) == 76011
    blocks = whole[208:]  # without the block that holds the header; the bit rate varies
    for content in (blocks, b"ID3\x04\0\0\0\0\0\x05hello" + blocks, blocks + b"TAG" + b"\0" * 125):
        path.write_bytes(content)
        assert len(vqa.decode_audio(path)[0]) == 77184
    path.write_bytes(blocks[:-1])
    assert "is cut off" in refusal(vqa.decode_audio, path)


@pytest.mark.parametrize(
    ("extension", "rate", "channels"),
    [
        *(("wav", rate, 1) for rate in (8000, 11025, 12000, 22050, 24000, 32000, 44100, 48000, 88200, 96000, 192000)),
        *[("wav", 16000, 8), ("wav", 192000, 8), ("mp3", 44100, 2), ("flac", 48000, 1), ("ogg", 22050, 2)],
    ],
)
def test_speech_of_any_rate_and_channel_count_becomes_16_khz_mono(tmp_path, extension, rate, channels):
    path = tmp_path / f"tone.{extension}"
    tone = np.clip(3 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate), -1, 1)  # a second; clipped, which is no fault
    soundfile.write(path, np.stack([tone] * channels, axis=1), rate)
    speech = vqa.load_speech(path)
    assert speech.dtype == np.float32
    assert abs(len(speech) - 16000) <= (2500 if extension == "mp3" else 1)  # an mp3 is padded to whole blocks
    spectrum = np.abs(np.fft.rfft(speech))
    assert round(spectrum.argmax() * 16000 / len(speech)) in range(438, 443)


def test_channels_are_averaged(tmp_path):
    soundfile.write(tmp_path / "two.wav", np.tile([0.5, -0.25], (16000, 1)), 16000, subtype="FLOAT")
    assert np.allclose(vqa.load_speech(tmp_path / "two.wav"), 0.125)


# ------------------------------------------------------------------------------------------ the check and its memory


@pytest.fixture()
def decoded(monkeypatch, tmp_path):
    """The files decoded since the last look, with a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen = []
    for name in ("decode_frame", "decode_audio"):
        plain = getattr(vqa, name)
        monkeypatch.setattr(vqa, name, lambda path, plain=plain, **how: (seen.append(path), plain(path, **how))[1])

    def look():
        files = list(seen)
        seen.clear()
        return files

    return look


def memory(tmp_path):
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_media_that_passed_are_not_decoded_again_until_they_change(data, decoded, tmp_path):
    for expected in (21, 0):
        vqa.load_rows(*data.args)
        assert len(decoded()) == expected
    (file,) = memory(tmp_path)
    for damage in (lambda b: b[:-1], lambda b: b[:40] + bytes([b[40] ^ 255]) + b[41:], lambda b: b""):
        file.write_bytes(damage(file.read_bytes()))  # a damaged memory is ignored, and written anew
        for expected in (21, 0):
            vqa.load_rows(*data.args)
            assert len(decoded()) == expected
    path = data.frames / "fx-001/fx-001_1204.jpg"
    path.write_bytes(path.read_bytes()[:-500])
    for _ in range(2):  # a failure is never remembered
        assert str(path) in refusal(vqa.load_rows, *data.args)
        assert decoded() == [path]


def test_a_check_that_is_cut_short_goes_on_where_it_stopped(data, decoded, monkeypatch):
    def stop(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vqa, "decode_audio", stop)  # after the frames of the first row
        with pytest.raises(KeyboardInterrupt):
            vqa.load_rows(*data.args)
    decoded()
    rows = vqa.load_rows(*data.args)
    again = decoded()
    assert len(rows[0].frame_paths) == 8 and len(again) == 21 - 8
    assert not set(again) & set(rows[0].frame_paths)


def test_what_is_remembered_has_an_end(data, decoded, monkeypatch):
    """The files at hand stay; others go."""
    monkeypatch.setattr(vqa, "MAX_REMEMBERED", 25)
    vqa.load_rows(FIXTURES / "smoke.jsonl", FIXTURES / "frames", FIXTURES / "audio")
    vqa.load_rows(*data.args)
    (data.audio / SPOKEN[4]).touch()
    decoded()
    vqa.load_rows(*data.args)
    assert decoded() == [data.audio / SPOKEN[4]]
    vqa.load_rows(FIXTURES / "smoke.jsonl", FIXTURES / "frames", FIXTURES / "audio")
    assert len(decoded()) >= 17  # 4 of 25 at most were not those at hand


def test_a_cache_folder_that_is_full_or_cannot_be_written_does_no_harm(data, decoded, tmp_path):
    (tmp_path / "cache").write_text("a file")
    for _ in range(2):
        assert len(vqa.load_rows(*data.args)) == 5
    (tmp_path / "cache").unlink()
    with small_disk(tmp_path / "cache", 16):
        with contextlib.suppress(OSError):
            (tmp_path / "cache/filler").write_bytes(bytes(64 * 1024))
        assert len(vqa.load_rows(*data.args)) == 5
        assert [path.name for path in memory(tmp_path)] == ["filler"]


def coloured(*colours: tuple[int, int, int]) -> bytes:
    """A PNG of 64 x 64, in equal stripes."""
    image, buffer = Image.new("RGB", (64, 64)), io.BytesIO()
    for number, colour in enumerate(colours):
        image.paste(colour, (0, number * 64 // len(colours), 64, 64))
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("drawn", ["black", "almost one colour", "one picture"])
def test_frames_that_show_nothing_are_counted_named_and_refused(
    data, train, capsys, decoded, tmp_path, no_weights, drawn
):
    content = {
        "black": coloured((0, 0, 0)),
        "almost one colour": coloured((100, 50, 9), (108, 42, 1)),
        "one picture": coloured((100, 50, 9), (109, 50, 9)),
    }[drawn]
    for place in ("fx-001/fx-001_1204.jpg", "fx-002/20318.png"):
        (data.frames / place).write_bytes(content)
    run = (tmp_path / "out", *data.train_flags)
    for how in ((), ("--check_data",), ("--skip_bad_samples", "True", "--dry_run")):
        line = refusal(train, *run, *how)
        assert line.startswith(f"{data.jsonl}: 5 of 5 rows ") and "\n" not in line
        assert ("2 of one colour (" in line) == (drawn != "one picture") and "2 with the bytes" in line
        assert str(data.frames / "fx-001/fx-001_1204.jpg") in line and "--allow_empty_frames True" in line
    decoded()
    assert train(*run, "--check_data", "--allow_empty_frames", "True") == 0
    assert "5 of 5 rows " in capsys.readouterr().out and not decoded()  # levels and bytes are remembered


def test_what_is_no_empty_frame(data, train, capsys, tmp_path):
    """Rows that name the same frames, frames that differ in one channel or in fine noise, and one bad row of many."""
    check = lambda: train(tmp_path / "out", *data.train_flags, "--check_data")  # noqa: E731
    noise = np.random.default_rng(0).integers(118, 138, (64, 64, 3), dtype=np.uint8)
    for place, image in (("fx-001/fx-001_1204.jpg", noise), ("fx-001/fx-001_1208.jpg", noise[::-1])):
        Image.fromarray(image).save(data.frames / place, quality=95, subsampling=0)
    (data.frames / "fx-002/20318.png").write_bytes(coloured((100, 50, 9), (100, 50, 18)))
    assert check() == 0 and "show nothing" not in capsys.readouterr().out
    (data.frames / "fx-002/20318.png").write_bytes(coloured((100, 50, 9)))
    data.rewrite(lambda stored: [*stored[:2], stored[2]])  # the only row of that clip
    assert check() == 0
    assert f"{data.jsonl}: 1 of 3 rows " in capsys.readouterr().out


def test_memory_of_many_rows(tmp_path, monkeypatch):
    """No more than 6 kB a row, the rows themselves included, with eight frames of its own for each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    count, frame, speech = 80, tmp_path / "f.png", tmp_path / "s.wav"
    Image.new("RGB", (4, 4)).save(frame)
    soundfile.write(speech, TONE, 16000)
    (tmp_path / "frames/vid-01").mkdir(parents=True)
    (tmp_path / "audio").mkdir()
    row = json.loads((FIXTURES / "smoke.jsonl").read_text().splitlines()[1])
    with (tmp_path / "rows.jsonl").open("w") as out:
        for i in range(count):
            frames = [f"vid-01_{8 * i + j}" for j in range(8)]
            for name in frames:
                os.link(frame, tmp_path / f"frames/vid-01/{name}.png")
            os.link(speech, tmp_path / f"audio/vid-01_qa_{i:06}.wav")
            out.write(json.dumps({**row, "id": f"qa_{i:06}", "video_id": "vid-01", "frames": frames}) + "\n")

    def kept(limit):
        """Bytes that reading `limit` rows leaves behind: the least of three, as a decoder may keep a buffer once."""
        sizes = []
        for _ in range(3):
            tracemalloc.start()
            rows = vqa.load_rows(tmp_path / "rows.jsonl", tmp_path / "frames", tmp_path / "audio", limit)
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
            tracemalloc.stop()
            assert len(rows) == limit
        return min(sizes)

    assert (kept(count) - kept(count // 2)) / (count / 2) < 6000


# ----------------------------------------------------------------------------------------------- frame choice and flags


@pytest.mark.parametrize(
    ("count", "limit", "expected"),
    [(8, 6, [0, 1, 2, 4, 5, 6]), (8, 4, [0, 2, 4, 6]), (8, 1, [0]), (1, 6, [0])]
    + [(8, limit, [*range(8)]) for limit in (8, None)]
    + [(5, 6, [*range(5)])],
)
def test_select_frames_in_evaluation(processor, count, limit, expected):
    dataset = vqa.SurgicalVQADataset([], processor, max_eval_frames=limit, is_eval=True)
    assert dataset._select_frames([*range(count)]) == expected


def test_select_frames_in_training_ignores_the_eval_limit(processor):
    assert vqa.SurgicalVQADataset([], processor, max_eval_frames=6)._select_frames([*range(8)]) == [*range(8)]
    dataset = vqa.SurgicalVQADataset([], processor, max_train_frames=2, max_eval_frames=6)
    assert dataset._select_frames([*range(8)]) == [0, 4]


def test_dataset_reads_a_path(processor, data):
    dataset = vqa.SurgicalVQADataset(data.jsonl, processor, data.frames, data.audio, max_eval_frames=6, is_eval=True)
    assert len(dataset) == 5 and dataset[0]["image_grid_thw"].tolist() == [[1, 4, 4]] * 6


def test_check_data_reports_and_needs_neither_model_nor_output_folder(data, capsys):
    argv = [*data.train_flags, "--check_data", "--eval_data_path", str(data.jsonl), "--model_name_or_path", "nowhere"]
    assert vqa.main(argv) == 0
    summary = f"{data.jsonl}: 5 good rows (2 clips, 3 types, 21 files), 0 bad"
    assert capsys.readouterr().out.splitlines()[-2:] == [summary, summary]
    (data.audio / SPOKEN[4]).unlink()
    assert "2 problems in all" in refusal(vqa.main, argv)
    assert f"{data.jsonl}: 4 good rows (2 clips, 2 types, 20 files), 1 bad" in capsys.readouterr().out


def test_skip_bad_samples_says_which_and_records_them(data, train, capsys, tmp_path):
    (data.frames / "fx-001/fx-001_1204.jpg").write_bytes(b"")
    run = (tmp_path / "out", *data.train_flags, "--max_steps", "1", "--save_strategy", "no")
    assert "is empty" in refusal(train, *run)
    assert train(*run, "--skip_bad_samples") == 0
    assert "--skip_bad_samples" in capsys.readouterr().out
    (text,) = vqa.load_settings(tmp_path / "out")["skipped"]
    assert text.startswith(f"{data.jsonl}:1: frame {data.frames / 'fx-001/fx-001_1204.jpg'} is empty")
    data.rewrite(lambda stored: stored[:2])
    message = refusal(train, *run, "--skip_bad_samples")
    assert message.startswith(f"{data.jsonl}: ") and "--check_data" in message
