"""Damaged, hostile and unusual data: decoded right, or refused by name before any weight is loaded."""

import errno
import gc
import json
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

import train_vqa as vqa
from tests.conftest import FIXTURES, TINY
from tests.test_data import edit, refusal

TONE = 0.3 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)


def flags(data, *more):
    return [*data.flags, "--init", "random", "--model_name_or_path", str(TINY), "--max_image_size", "56", *more]


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\xff\xfe{", "not UTF-8 text (byte 1 of the line); save the file as UTF-8"),
        (b"[" * 100_000, "not a row (lists or objects nested too deeply)"),
        (b'{"id": ' + b"9" * 5000 + b"}", "not a row (Exceeds the limit (4300 digits)"),
        (b'{"id": "a\\ud800"}', "field 'id' holds half a character (a lone surrogate): 'a\\ud800'"),
        (b'{"id": "a", "video_id": "v"', "not valid JSON (Expecting ',' delimiter at column 28)"),
    ],
)
def test_lines_that_are_no_rows(data, line, message):
    data.jsonl.write_bytes(data.jsonl.read_bytes() + line)
    assert refusal(vqa.read_rows, data.jsonl).startswith(f"{data.jsonl}:6: {message}")


@pytest.mark.parametrize("frame", ["../x_1", "/etc/passwd", ".._1", "._1", "a\0_1", "x" * 130 + "_1", "a\\b_1"])
def test_frame_names_that_leave_their_folder(data, frame):
    data.rewrite(lambda stored: [edit(stored[0], frames=[frame]), *stored[1:]])
    message = f"{data.jsonl}:1: field 'frames' must be a plain name, not {frame!r:.150}"
    assert refusal(vqa.read_rows, data.jsonl) == message


@pytest.mark.parametrize("field", ["id", "video_id", "question_type"])
@pytest.mark.parametrize("name", ["..", "../other", "/abs", "a\0b"])
def test_ids_that_leave_their_folder(data, field, name):
    data.rewrite(lambda stored: [edit(stored[0], **{field: name}), *stored[1:]])
    assert refusal(vqa.read_rows, data.jsonl) == f"{data.jsonl}:1: field {field!r} must be a plain name, not {name!r}"


def test_links_out_of_the_folders(data, tmp_path):
    outside = tmp_path / "disk"
    outside.mkdir()
    frame, speech = data.frames / "fx-001/fx-001_1204.jpg", data.audio / "qa_000205.ogg"
    for path in (frame, speech):
        path.rename(outside / path.name)
        path.symlink_to(outside / path.name)
    assert refusal(vqa.load_rows, *data.args).splitlines() == [
        f"{data.jsonl}:1: qa_000101: frame {frame} is a link out of {data.frames}; see --allow_symlinks",
        f"{data.jsonl}:2: qa_000102: frame {frame} is a link out of {data.frames}; see --allow_symlinks",
        f"{data.jsonl}:5: qa_000205: speech {speech} is a link out of {data.audio}; see --allow_symlinks",
        "3 problems in all",
    ]
    assert len(vqa.load_rows(*data.args, allow_symlinks=True)) == 5


def test_a_linked_video_folder_is_refused_but_links_inside_and_linked_roots_are_fine(data, tmp_path):
    (data.frames / "fx-001").rename(tmp_path / "moved")
    (data.frames / "fx-001").symlink_to(tmp_path / "moved")
    assert "is a link out of" in refusal(vqa.load_rows, *data.args)
    (data.frames / "fx-001").unlink()
    (tmp_path / "moved").rename(data.frames / "kept")
    (data.frames / "fx-001").symlink_to("kept")
    (tmp_path / "link").symlink_to(data.frames)
    assert len(vqa.load_rows(data.jsonl, tmp_path / "link", data.audio)) == 5


def test_a_clip_of_one_frame(data):
    data.rewrite(lambda stored: [edit(stored[0], frames=stored[0]["frames"][:1]), *stored[1:]])
    assert len(vqa.load_rows(*data.args)[0].frame_paths) == 1


def test_rows_missing_and_undecodable_media_come_in_one_report(data):
    (data.audio / "qa_000205.ogg").write_bytes(b"")
    (data.frames / "fx-002/20318.png").unlink()
    data.rewrite(lambda stored: ["{", *stored[1:]])
    lines = refusal(vqa.load_rows, *data.args).splitlines()
    assert [line.removeprefix(f"{data.jsonl}:")[:12] for line in lines] == [
        "1: not valid",
        "3: frame " + str(data.frames)[:3],
        "4: frame " + str(data.frames)[:3],
        "5: frame " + str(data.frames)[:3],
        "5: speech " + str(data.audio)[:2],
        "5 problems i",
    ]


def test_a_sample_longer_than_the_context(data, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in TINY.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = 200
    (model / "config.json").write_text(json.dumps(config))
    message = refusal(vqa.main, [*flags(data, "--dry_run"), "--model_name_or_path", str(model)])
    first = message.splitlines()[0]
    assert first.startswith(f"{data.jsonl}:1: fx-001/qa_000101/nbi_status takes ")
    assert first.endswith(" tokens, more than the model's 200; lower --max_image_size or --max_train_frames")


# -------------------------------------------------------------------------------------------------------------- images


def saved(tmp_path, image, name="frame.png", **kwargs):
    image.save(tmp_path / name, **kwargs)
    return vqa.decode_frame(tmp_path / name)


def test_sixteen_bit_grey_is_scaled_not_cut_off(tmp_path):
    grey = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    assert np.asarray(saved(tmp_path, Image.fromarray(grey)))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_cmyk_palette_and_transparency_keep_their_colours(tmp_path):
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    cmyk = saved(tmp_path, red.convert("CMYK"), "cmyk.jpg", quality=100)
    assert np.abs(np.asarray(cmyk)[8, 8].astype(int) - (255, 0, 0)).max() < 8
    palette = Image.new("P", (4, 4))
    palette.putpalette([10, 20, 30] * 256)
    assert saved(tmp_path, palette, transparency=bytes(256)).getpixel((0, 0)) == (10, 20, 30)
    assert saved(tmp_path, Image.new("RGBA", (4, 4), (9, 8, 7, 0))).getpixel((0, 0)) == (9, 8, 7)
    assert saved(tmp_path, Image.new("1", (4, 4), 1)).getpixel((0, 0)) == (255, 255, 255)


def test_one_pixel_is_a_frame(tmp_path, processor):
    frame = saved(tmp_path, Image.new("RGB", (1, 1), (1, 2, 3)))
    assert (frame.size, frame.getpixel((0, 0))) == ((1, 1), (1, 2, 3))
    assert processor.image_processor(images=[frame])["image_grid_thw"].tolist() == [[1, 4, 4]]


def png(width: int, height: int, body: bytes) -> bytes:
    """A PNG whose header says `width` x `height`, whatever `body` decodes to."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be decoded (cannot identify image file"),
        (b"hello", "cannot be decoded (cannot identify image file"),
        (b"GIF89a", "cannot be decoded (cannot identify image file"),
        (png(10_000, 10_000, zlib.compress(b"")), "has 10000 x 10000 pixels, more than 50000000; scale it down"),
        (png(60_000, 60_000, zlib.compress(b"")), "cannot be decoded (Image size (3600000000 pixels) exceeds limit"),
        (png(2, 1000, zlib.compress(b"")), "has 2 x 1000 pixels, too long and thin; replace it"),
        (png(20, 20, zlib.compress(b"\0" * 100)), "cannot be decoded (image file is truncated"),
    ],
)
def test_images_that_are_refused(tmp_path, content, message):
    path = tmp_path / "frame.png"
    path.write_bytes(content)
    assert refusal(vqa.decode_frame, path).startswith(f"frame {path} {message}")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "BMP", "TIFF"])
def test_another_format_behind_the_extension(tmp_path, kind):
    Image.new("RGB", (8, 8)).save(tmp_path / "frame.jpg", format=kind)
    assert "cannot identify image file" in refusal(vqa.decode_frame, tmp_path / "frame.jpg")


# -------------------------------------------------------------------------------------------------------------- speech


@pytest.mark.parametrize("name", ["fx-001_qa_000101_nbi_status.wav", "fx-001_qa_000102_scope_motion_type.mp3",
                                  "fx-002_qa_000203.flac", "qa_000205.ogg"])  # fmt: skip
@pytest.mark.parametrize("cut", [0.5, 700, 10, 1])
def test_speech_that_is_cut_off(tmp_path, name, cut):
    whole = (FIXTURES / "audio" / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(whole[: int(len(whole) * cut) if cut < 1 else len(whole) - cut])
    message = refusal(vqa.decode_audio, path)
    assert message == f"speech {path} is cut off; copy it again or remove the row" or name.endswith("flac")
    assert message.startswith(f"speech {path} cannot be decoded (") or not name.endswith("flac")


def test_an_mp3_without_a_length_header(tmp_path):
    """libsndfile then stops at the length that it guesses from the first block."""
    whole = (FIXTURES / "audio/fx-001_qa_000102_scope_motion_type.mp3").read_bytes()
    (tmp_path / "speech.mp3").write_bytes(whole[208:])  # without the block that holds it; the bit rate varies
    assert refusal(vqa.decode_audio, tmp_path / "speech.mp3").endswith(" is cut off; copy it again or remove the row")
    assert vqa.walk_mp3(whole) == (77760, True)  # 76,011, and the delay and padding of encoder and decoder
    assert vqa.walk_mp3(b"ID3\x04\0\0\0\0\0\x05hello" + whole) == (77760, True)
    assert vqa.walk_mp3(whole + b"TAG" + b"\0" * 120 + b"\xff\xfb\x90\0\0") == (77760, True)
    assert vqa.walk_mp3(whole[:-1]) == (77184, False)


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (np.zeros(16000), 16000, "is silent throughout; replace it or remove the row"),
        (np.stack([TONE, -TONE], axis=1), 16000, "is silent throughout; replace it or remove the row"),
        (TONE[:1599], 16000, "lasts 0.100 s, less than 0.1; replace it or remove the row"),
        (np.tile(TONE, 31), 16000, "lasts 31.0 s, the model hears at most 30; shorten it"),
        (TONE, 4000, "has 4000 samples a second; resample it to 16000"),
        (TONE, 44101, "has 44101 samples a second; resample it to 16000"),
        (np.full(1600, np.inf), 16000, "holds samples that are not finite; replace it or remove the row"),
    ],
)
def test_speech_that_is_refused(tmp_path, samples, rate, message):
    path = tmp_path / "speech.wav"
    soundfile.write(path, samples, rate, subtype="FLOAT")
    assert refusal(vqa.decode_audio, path) == f"speech {path} {message}"


@pytest.mark.parametrize("rate", [8000, 11025, 12000, 22050, 24000, 32000, 44100, 48000, 88200, 96000, 192000])
@pytest.mark.parametrize("channels", [1, 8])
def test_usual_rates_and_many_channels(tmp_path, rate, channels):
    tone = np.clip(3 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate), -1, 1)  # clipped, which is no fault
    soundfile.write(tmp_path / "speech.wav", np.stack([tone] * channels, axis=1), rate)
    speech = vqa.load_speech(tmp_path / "speech.wav")
    assert abs(len(speech) - 16000) <= 1
    assert np.abs(np.fft.rfft(speech))[:1000].argmax() == 440


# ------------------------------------------------------------------------------------------ the check and its memory


@pytest.fixture()
def decoded(monkeypatch, tmp_path):
    """The files decoded since the last look, with a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen = []
    for name in ("decode_frame", "decode_audio"):
        whole = getattr(vqa, name)
        monkeypatch.setattr(vqa, name, lambda path, whole=whole: (seen.append(path), whole(path))[1])

    def look():
        files = list(seen)
        seen.clear()
        return files

    return look


def test_media_that_passed_are_not_decoded_again_until_they_change(data, decoded):
    vqa.load_rows(*data.args)
    assert len(decoded()) == 21
    vqa.load_rows(*data.args)
    assert decoded() == []
    path = data.frames / "fx-001/fx-001_1204.jpg"
    path.write_bytes(path.read_bytes()[:-500])
    for _ in range(2):  # a failure is never remembered
        assert str(path) in refusal(vqa.load_rows, *data.args)
        assert decoded() == [path]


def test_a_check_that_is_cut_short_goes_on_where_it_stopped(data, decoded, monkeypatch):
    with monkeypatch.context() as patch:

        def stop(path):
            raise KeyboardInterrupt

        patch.setattr(vqa, "decode_audio", stop)  # after the frames of the first row
        with pytest.raises(KeyboardInterrupt):
            vqa.load_rows(*data.args)
    first = vqa.read_rows(data.jsonl)[:1]
    assert vqa.find_media(first, data.frames, data.audio) == [] and len(first[0].frame_paths) == 8
    decoded()
    rows = vqa.load_rows(*data.args)
    again = decoded()
    assert len(again) == 21 - 8
    assert not set(again) & set(rows[0].frame_paths)


def test_more_files_than_are_remembered_make_way(data, decoded, monkeypatch):
    """Those of the file at hand stay; those of others go."""
    monkeypatch.setattr(vqa, "MAX_REMEMBERED", 25)
    vqa.load_rows(*data.args)
    vqa.write_passed(vqa.read_passed() | {f"/elsewhere/{i}": [1, 2, 3] for i in range(30)})
    (data.audio / "qa_000205.ogg").touch()
    decoded()
    vqa.load_rows(*data.args)
    assert decoded() == [data.audio / "qa_000205.ogg"]
    assert len(vqa.read_passed()) == 21


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"[]", lambda b: b""])
def test_a_damaged_memory_is_ignored_and_rewritten(data, decoded, damage):
    vqa.load_rows(*data.args)
    vqa.passed_file().write_bytes(damage(vqa.passed_file().read_bytes()))
    decoded()
    vqa.load_rows(*data.args)
    assert len(decoded()) == 21
    vqa.load_rows(*data.args)
    assert decoded() == []


def test_a_full_disk_keeps_no_part_of_the_memory(data, decoded, monkeypatch):
    written = Path.write_text

    def full(path, content, **options):
        written(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert len(vqa.load_rows(*data.args)) == 5
    assert list(vqa.passed_file().parent.iterdir()) == []


def test_a_cache_folder_that_cannot_be_written_does_no_harm(data, decoded, tmp_path):
    (tmp_path / "cache").write_text("a file")
    vqa.load_rows(*data.args)
    assert len(vqa.load_rows(*data.args)) == 5


def test_memory_of_many_rows(tmp_path, monkeypatch):
    """No more than 6 kB a row, the rows themselves included, with eight frames of its own for each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    count, frame, speech = 200, tmp_path / "f.png", tmp_path / "s.wav"
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

    assert (kept(count) - kept(count // 2)) / (count / 2) < 6144


# --------------------------------------------------------------------------------------------------------------- flags


def test_check_data_reports_and_needs_neither_model_nor_output_folder(data, capsys, monkeypatch):
    monkeypatch.setattr(vqa, "load_tokenizer", None)
    argv = [*data.flags, "--check_data", "--eval_data_path", str(data.jsonl)]
    assert vqa.main(argv) == 0
    summary = f"{data.jsonl}: 5 good rows (2 clips, 3 types, 21 files), 0 bad"
    assert capsys.readouterr().out.splitlines()[-2:] == [summary, summary]
    (data.audio / "qa_000205.ogg").unlink()
    assert "2 problems in all" in refusal(vqa.main, argv)
    assert f"{data.jsonl}: 4 good rows (2 clips, 2 types, 20 files), 1 bad" in capsys.readouterr().out


def test_skip_bad_samples_says_which_and_records_them(data, capsys, tmp_path):
    (data.frames / "fx-001/fx-001_1204.jpg").write_bytes(b"")
    run = [*flags(data), "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--save_strategy", "no"]
    assert "cannot be decoded" in refusal(vqa.main, run)
    assert vqa.main([*run, "--skip_bad_samples", "--lora_r", "4"]) == 0
    assert "Leaving out bad rows (1 problems, --skip_bad_samples):" in capsys.readouterr().out
    settings = vqa.load_settings(tmp_path / "out")
    assert [text.split(" cannot")[0] for text in settings["skipped"]] == [
        f"{data.jsonl}:1: frame {data.frames / 'fx-001/fx-001_1204.jpg'}"
    ]
    data.rewrite(lambda stored: stored[:2])
    assert refusal(vqa.main, [*run, "--skip_bad_samples"]) == (
        f"{data.jsonl}: no good row is left; see what is wrong with --check_data"
    )
