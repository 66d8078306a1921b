"""Sound and frames as people's tools write them: read to their true end, or refused with the fault named."""

import io
import json
import shutil
import struct
import subprocess
import zlib
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

import train_vqa as vqa
from tests.conftest import FIXTURES, refusal

FRAME = FIXTURES / "frames/fx-001/fx-001_1204.jpg"
SPOKEN = FIXTURES / "audio/fx-002_qa_000203.flac"


def spoken(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """int16 [channels, n] of spoken words."""
    samples, stored = vqa.decode_audio(SPOKEN)
    at = np.arange(round(seconds * rate)) * stored / rate % (len(samples) - 1)
    mono = np.interp(at, np.arange(len(samples)), samples[:, 0]) * 20000
    return np.stack([mono / (1 + place) for place in range(channels)]).astype(np.int16)


class Pipe(io.BytesIO):
    """What a writer cannot go back in, to fill in a length."""

    def seekable(self) -> bool:
        return False

    seek = tell = None


def write(path, samples: np.ndarray, rate: int, form: str, codec: str, piped: bool = False, **options: str) -> bytes:
    """A sound file by PyAV, of int16 [channels, n] at `rate` Hz; returns its content."""
    target, layout = Pipe() if piped else str(path), ("mono", "stereo")[len(samples) - 1]
    with av.open(target, "w", format=form, options=options) as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        block = av.AudioFrame.from_ndarray(samples, format="s16p", layout=layout)
        block.rate, block.pts = rate, 0
        resampler = av.AudioResampler(stream.codec_context.format.name, layout, rate)
        for part in (*resampler.resample(block), *resampler.resample(None)):
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))
    if piped:
        path.write_bytes(target.getvalue())
    return path.read_bytes()


# name: seconds, rate, channels, what `write` takes; samples too many, as no length is stored or only one in blocks
GOOD = {
    "a.mp3": (0.7, 24000, 1, {"form": "mp3", "codec": "libmp3lame"}, 0),
    "short.mp3": (1.1, 16000, 1, {"form": "mp3", "codec": "libmp3lame"}, 0),
    "stereo.mp3": (1.5, 44100, 2, {"form": "mp3", "codec": "libmp3lame"}, 0),
    "headless.mp3": (2, 22050, 1, {"form": "mp3", "codec": "libmp3lame", "write_xing": "0"}, 3 * 576),
    "piped.mp3": (2, 44100, 1, {"form": "mp3", "codec": "libmp3lame", "piped": True, "write_xing": "0"}, 3 * 1152),
    "a.wav": (1.3, 16000, 1, {"form": "wav", "codec": "pcm_s16le"}, 0),
    "piped.wav": (1.3, 44100, 2, {"form": "wav", "codec": "pcm_s16le", "piped": True}, 0),
    "a24.wav": (1.3, 22050, 1, {"form": "wav", "codec": "pcm_s24le"}, 0),
    "phone.wav": (1.3, 8000, 1, {"form": "wav", "codec": "pcm_mulaw"}, 0),
    "a.flac": (2.5, 24000, 1, {"form": "flac", "codec": "flac"}, 0),
    "piped.flac": (2.5, 48000, 2, {"form": "flac", "codec": "flac", "piped": True}, 0),
    "a.ogg": (1.5, 48000, 1, {"form": "ogg", "codec": "libopus"}, 0),
    "a.opus": (1.5, 16000, 1, {"form": "ogg", "codec": "libopus"}, 0),
    "a.m4a": (1.5, 44100, 1, {"form": "ipod", "codec": "aac"}, 1024),
    "start.M4A": (1.5, 24000, 1, {"form": "ipod", "codec": "aac", "movflags": "+faststart"}, 1024),
    "a.webm": (1.5, 48000, 1, {"form": "webm", "codec": "libopus"}, 0),
    "live.webm": (1.5, 48000, 1, {"form": "webm", "codec": "libopus", "piped": True, "live": "1"}, 0),
    "a.aac": (2, 24000, 1, {"form": "adts", "codec": "aac"}, 2048),
}  # fmt: skip


def any_file(folder, kind: str) -> bytes:
    """The content of a small good file whose name ends in `kind`."""
    if kind in vqa.AUDIO_EXTENSIONS:
        how = GOOD[f"a{kind}"][3]
        return write(folder / f"any{kind}", spoken(1, 24000), 24000, **how)
    vqa.decode_frame(FRAME).save(folder / f"any{kind}")
    return (folder / f"any{kind}").read_bytes()


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """The folder with `GOOD`."""
    folder = tmp_path_factory.mktemp("good")
    for name, (seconds, rate, channels, how, _) in GOOD.items():
        write(folder / name, spoken(seconds, rate, channels), rate, **how)
    return folder


@pytest.mark.parametrize("name", GOOD)
def test_sound_is_read_to_its_true_end_and_counted_as_heard(good, name):
    seconds, rate, channels, _, more = GOOD[name]
    samples, stored = vqa.decode_audio(good / name)
    extra = len(samples) - seconds * stored
    assert 0 <= round(extra) <= more * stored / rate and samples.shape[1] == channels
    assert stored == (48000 if "opus" in GOOD[name][3]["codec"] else rate)
    assert vqa.speech_length(good / name) == len(vqa.load_speech(good / name))


def test_resampled_length_is_that_of_torchaudio():
    draw = np.random.default_rng(0)
    for rate in (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 96000):
        for length in (1, *draw.integers(rate // 10, 31 * rate, 6)):
            heard = vqa.resampler(rate)(vqa.torch.zeros(int(length)))
            assert vqa.resampled_length(int(length), rate) == len(heard), (rate, length)


@pytest.mark.parametrize("rate", [22050, 24000, 44100, 48000])
def test_resampling_keeps_7_kilohertz_and_folds_nothing_back(tmp_path, rate):
    at = np.arange(rate) / rate
    for hertz, lowest, highest in ((7000, -0.1, 0.1), (8500, -np.inf, -90), (9000, -np.inf, -90)):
        soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * hertz * at), rate, subtype="FLOAT")
        heard = vqa.load_speech(tmp_path / "a.wav")[2000:-2000]
        assert lowest <= 10 * np.log10(8 * np.mean(heard.astype(float) ** 2)) <= highest


def test_the_check_remembers_the_length_for_counting(good, data, processor, monkeypatch, tmp_path):
    """Row by row equal to what the encoder gets, with nothing decoded to count, from the memory too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(processor, "audio_tokens", "speech")
    for name in GOOD:
        for _ in range(2):
            row = vqa.VQARow("f", 1, "q", "v", ("a",), "?", "t", "It is.", "is", good / name, (FRAME,))
            assert vqa.check_media([row]) == []
            with monkeypatch.context() as patch:
                patch.setattr(vqa, "decode_audio", None)
                counted = processor.count_tokens(row, row.frame_paths)
            sample = processor.make_sample(row, [vqa.load_frame(FRAME, 56)], vqa.load_speech(good / name), True)
            assert counted == len(sample["input_ids"]) and row.speech_samples == vqa.speech_length(good / name)
    row.speech_samples = None  # of a row that was not checked
    assert processor.count_tokens(row, row.frame_paths) == counted


def pages(data: bytes) -> list[bytes]:
    """The pages of an Ogg."""
    found = []
    while data:
        size = 27 + data[26] + sum(data[27 : 27 + data[26]])
        found.append(data[:size])
        data = data[size:]
    return found


def flip(data: bytes, place: float = 0.5) -> bytes:
    at = int(place * len(data))
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


def joined(good, one: str, other: str) -> bytes:
    return (good / one).read_bytes() + (good / other).read_bytes()


def last_block(data: bytes) -> int:
    """Where the last block of an MP3 begins."""
    end, at = 0, len(data) - len(vqa.without_tag(data))
    while at < len(data):
        end, at = at, at + vqa.block_bytes(data[at:])
    return end


# file name: what is done to one of `GOOD`, and the sentence
DAMAGED = {
    **{f"half.{name}": (lambda g, name=name: (whole := (g / name).read_bytes())[: len(whole) // 2], "cut off|decoded")
       for name in ("a.wav", "a.flac", "a.ogg", "a.opus", "a.mp3", "a.m4a", "start.M4A", "a.webm")},
    **{f"less.{name}": (lambda g, name=name: (g / name).read_bytes()[:-1], "cut off|decoded")
       for name in ("a.wav", "a.flac", "piped.flac", "a.ogg", "a.mp3", "headless.mp3", "a.aac")},
    **{f"bit.{name}": (lambda g, name=name: flip((g / name).read_bytes()), "is damaged|cannot be decoded")
       for name in ("a.flac", "piped.flac", "a.ogg", "a.opus")},
    "block_fewer.mp3": (lambda g: (whole := (g / "a.mp3").read_bytes())[: last_block(whole)], "is cut off"),
    "page_fewer.ogg": (lambda g: b"".join((p := pages((g / "a.ogg").read_bytes()))[:2] + p[3:]), "is cut off"),
    "two.wav": (lambda g: joined(g, "a.wav", "a.wav"), "is a WAV with another WAV behind it; join them"),
    "two_piped.wav": (lambda g: joined(g, "piped.wav", "piped.wav"), "is a WAV with another WAV behind it"),
    "half_sample.wav": (lambda g: (g / "piped.wav").read_bytes()[:-1], "is damaged or cut off"),
    "header.wav": (lambda g: (g / "a.wav").read_bytes()[:44], "is cut off"),
    "channels.mp3": (lambda g: joined(g, "a.mp3", "stereo.mp3"), "its rate or its channels change on the way"),
    "rates.aac": (lambda g: write(g / "b.aac", spoken(1, 44100, 2), 44100, "adts", "aac") + (g / "a.aac").read_bytes(),
                  "its rate or its channels change on the way"),
    "empty.mp3": (lambda g: b"", "is empty"),
    "page.mp3": (lambda g: b"\n<!doctype HTML>\n<html><body>404</body></html>", "is an HTML page"),
    "error.mp3": (lambda g: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "is an XML page"),
    "quota.wav": (lambda g: b'{"error": "quota exceeded"}', "is JSON text"),
    "lfs.flac": (lambda g: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "Git LFS"),
    "image.m4a": (lambda g: FRAME.read_bytes(), "is a JPEG image"),
    "list.mp3": (lambda g: b"#EXTM3U\n#EXTINF:9,\n/etc/passwd\n", "cannot be decoded"),
    "files.mp3": (lambda g: f"ffconcat version 1.0\nfile {g}/a.mp3\n".encode(), "cannot be decoded"),
    "noise.mp3": (lambda g: np.random.default_rng(0).bytes(50_000), "cannot be decoded|damaged|cut off"),
    "text.ogg": (lambda g: b"hello", "is in no format that is known"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_sound_is_refused_by_name(good, tmp_path, name, capfd, caplog):
    """Without a word of FFmpeg's own on the screen."""
    content, sentence = DAMAGED[name]
    (tmp_path / name).write_bytes(content(good))
    message = refusal(vqa.decode_audio, tmp_path / name)
    assert message.startswith(f"speech {tmp_path / name} ") and "\n" not in message
    assert any(part in message for part in sentence.split("|")), message
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_odd_sound_that_is_complete_is_read(good, tmp_path):
    wav, mp3, ogg = ((good / name).read_bytes() for name in ("a.wav", "headless.mp3", "a.ogg"))
    at, blocks = wav.index(b"data") + 4, vqa.without_tag(mp3)
    for name, content, like in (
        *((f"{size}.wav", wav[:at] + struct.pack("<I", size) + wav[at + 4 :], "a.wav")
          for size in (0, 0x7FFFFFFF, 0xFFFFFFFF, 2_000_000_000)),  # as ElevenLabs, OpenAI and others write it
        ("list.wav", wav[: at - 4] + b"LIST" + struct.pack("<I", 5000) + bytes(5000) + wav[at - 4 :], "a.wav"),
        ("named.wav", mp3, "headless.mp3"),
        ("tag.mp3", b"ID3\x04\0\0\0\0\0\x05hello" + blocks, "headless.mp3"),
        ("behind.mp3", mp3 + b"TAG" + b"x" * 125, "headless.mp3"),
        ("zeros.mp3", mp3 + bytes(3000), "headless.mp3"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        assert np.array_equal(vqa.decode_audio(tmp_path / name)[0], vqa.decode_audio(good / like)[0]), name
    (tmp_path / "chain.ogg").write_bytes(ogg + ogg)
    (tmp_path / "joined.mp3").write_bytes(blocks + blocks)
    for name, like in (("chain.ogg", "a.ogg"), ("joined.mp3", "headless.mp3")):
        twice, once = (len(vqa.decode_audio(path)[0]) for path in (tmp_path / name, good / like))
        assert abs(twice - 2 * once) <= 1000


def test_a_tagged_mp3_that_is_cut_between_two_blocks_is_refused(good, tmp_path):
    data = (good / "stereo.mp3").read_bytes()
    start = len(data) - len(vqa.without_tag(data))
    assert start > 0  # FFmpeg writes a tag
    at, ends = start, []
    while at < len(data) and (size := vqa.block_bytes(data[at : at + 4])):
        at += size
        ends.append(at)
    assert len(ends) > 20
    path = tmp_path / "q.mp3"
    path.write_bytes(data[: ends[len(ends) * 6 // 10]])
    assert "is cut off" in refusal(vqa.decode_audio, path)


def test_a_performer_in_latin_1_is_no_damage(good, tmp_path):
    data = (good / "a.wav").read_bytes()
    at = data.index(b"data")
    name = "Frédérique".encode("latin-1")
    note = b"LIST" + struct.pack("<I", 12 + len(name)) + b"INFOIART" + struct.pack("<I", len(name)) + name
    path = tmp_path / "q.wav"
    path.write_bytes(b"RIFF" + struct.pack("<I", len(data) - 8 + len(note)) + data[8:at] + note + data[at:])
    assert len(vqa.decode_audio(path)[0]) == len(vqa.decode_audio(good / "a.wav")[0])


def test_threads_hear_their_own_damage(good, tmp_path):
    """FFmpeg's log is one for all threads, and leaves out repeated lines by itself."""
    (tmp_path / "bit.ogg").write_bytes(flip((good / "a.ogg").read_bytes()))
    files = [tmp_path / "bit.ogg", good / "a.ogg"] * 20

    def said(path) -> str | None:
        try:
            vqa.decode_audio(path)
        except vqa.VQAError as error:
            return str(error)

    alone = [said(path) for path in files[:2]]
    with ThreadPoolExecutor(4) as pool:
        assert alone[0] and alone[1] is None and list(pool.map(said, files)) == alone * 20


# -------------------------------------------------------------------------------------------------------------- frames


def image(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
@pytest.mark.parametrize("number", range(1, 9))
def test_frames_lie_upright_and_are_counted_so(tmp_path, extension, number):
    path, exif = tmp_path / f"frame.{extension}", Image.Exif()
    exif[0x0112] = number
    image().save(path, exif=exif)
    with Image.open(path) as stored:
        expected = vqa.np.asarray(vqa.Image.Image.convert(stored, "RGB"))
    turned = {1: expected, 2: expected[:, ::-1], 3: expected[::-1, ::-1], 4: expected[::-1],
              5: expected.transpose(1, 0, 2), 6: np.rot90(expected, -1),
              7: expected[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(expected)}[number]  # fmt: skip
    frame = vqa.decode_frame(path)
    assert np.array_equal(np.asarray(frame), turned) and frame.size == vqa.upright_size(path)
    vqa.decode_frame(path, checking=True)


def chunk(name: bytes, content: bytes, right: bool = True) -> bytes:
    return (
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content) ^ (not right))
    )


def test_damaged_metadata_alone_is_accepted(tmp_path):
    path = tmp_path / "frame.png"
    image().save(path)
    whole, pixels = path.read_bytes(), np.asarray(vqa.decode_frame(path))
    for extra in (chunk(b"tEXt", b"a\0b", right=False), chunk(b"eXIf", b"LoremIpsum"), chunk(b"eXIf", b"MM", False)):
        path.write_bytes(whole[:33] + extra + whole[33:])
        assert np.array_equal(np.asarray(vqa.decode_frame(path)), pixels) and vqa.upright_size(path) == (60, 40)
    path = tmp_path / "frame.jpg"
    image().save(path, exif=b"Exif\0\0garbage", comment=b"x" * 300)
    assert vqa.upright_size(path) == vqa.decode_frame(path).size == (60, 40)
    vqa.decode_frame(path, checking=True)  # nor does FFmpeg complain of it


def test_a_wrong_checksum_of_pixels_is_refused(tmp_path):
    path = tmp_path / "frame.png"
    image().save(path)
    whole = path.read_bytes()
    at = whole.index(b"IDAT") - 4
    size = int.from_bytes(whole[at : at + 4], "big")
    for content, what in (
        (whole[: at + 8 + size] + b"\0\0\0\0" + whole[at + 12 + size :], "the checksum of IDAT is wrong"),
        (whole[:29] + b"\0\0\0\0" + whole[33:], "the checksum of IHDR is wrong"),
        (whole[:-20], "it is cut off"),
    ):
        path.write_bytes(content)
        assert refusal(vqa.decode_frame, path).startswith(f"frame {path} cannot be decoded ({what})")


@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_any_kind_pass_the_check(tmp_path, how, mode):
    for size in ((1, 1), (17, 33), (640, 480)):
        image(*size).convert(mode).save(tmp_path / "frame.jpg", **how)
        vqa.decode_frame(tmp_path / "frame.jpg", checking=True)


def test_the_check_finds_a_jpeg_that_pillow_guesses(tmp_path):
    """Sixteen bytes in the middle of the pixels are others."""
    path = tmp_path / "frame.jpg"
    image(640, 480).save(path, quality=95)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"\xff\0" * 8 + whole[len(whole) // 2 + 16 :])
    vqa.decode_frame(path)
    row = vqa.VQARow("f", 3, "q", "v", ("a",), "?", "t", "It is.", "is", None, (path,))
    (problem,) = vqa.check_media([row])
    assert str(problem).startswith(f"f:3: frame {path} is damaged (FFmpeg: ") and "\n" not in str(problem)


def test_a_webp_is_read_by_its_own_name_only(tmp_path):
    image().save(tmp_path / "v.WEBP", lossless=True)
    assert np.array_equal(np.asarray(vqa.decode_frame(tmp_path / "v.WEBP")), np.asarray(image()))
    shutil.copy(tmp_path / "v.WEBP", tmp_path / "v.jpg")
    shutil.copy(FRAME, tmp_path / "v.webp")
    shutil.copy(FRAME, tmp_path / "v.png")
    assert " is a WebP image called .jpg; rename it" in refusal(vqa.decode_frame, tmp_path / "v.jpg")
    assert " is a JPEG image called .webp; rename it" in refusal(vqa.decode_frame, tmp_path / "v.webp")
    assert vqa.decode_frame(tmp_path / "v.png").size == vqa.upright_size(FRAME)  # what a decoder reads by itself


# ---------------------------------------------------------------------------------------------------------------- slow

# name: seconds, rate, command from a WAV ($W) to the file ($O), samples too many as in `GOOD`
OTHERS = {
    "ff_8.mp3": (1.1, 8000, "ffmpeg -i $W $O", 0),
    "ff_22.mp3": (2, 22050, "ffmpeg -i $W $O", 0),
    "ff_24.mp3": (0.7, 24000, "ffmpeg -i $W $O", 0),
    "ff_pipe_24.mp3": (3, 24000, "ffmpeg -i $W -f mp3 - > $O", 3 * 576),
    "ff_pipe_44.mp3": (2, 44100, "ffmpeg -i $W -b:a 128k -f mp3 - > $O", 3 * 1152),
    "ff_id3_48.mp3": (2, 48000, "ffmpeg -i $W -metadata title=question -write_xing 0 $O", 3 * 1152),
    "ff_vbr_16.mp3": (4, 16000, "ffmpeg -i $W -q:a 5 $O", 0),
    "ff_id3v1_16.mp3": (1, 16000, "ffmpeg -i $W -write_id3v1 1 -metadata title=x $O", 0),
    "ff_pipe_16.wav": (2.2, 16000, "ffmpeg -i $W -f wav - > $O", 0),
    "ff_f32_24.wav": (1, 24000, "ffmpeg -i $W -c:a pcm_f32le $O", 0),
    "ff_u8_8.wav": (1, 8000, "ffmpeg -i $W -c:a pcm_u8 $O", 0),
    "ff_alaw_8.wav": (2, 8000, "ffmpeg -i $W -c:a pcm_alaw $O", 0),
    "ff_list_44.wav": (1, 44100, "ffmpeg -i $W -metadata title=x $O", 0),
    "ff_pipe_24.flac": (3, 24000, "ffmpeg -i $W -f flac - > $O", 0),
    "ff_vorbis_44.ogg": (2, 44100, "ffmpeg -i $W -c:a libvorbis $O", 0),
    "ff_16.opus": (2, 16000, "ffmpeg -i $W -c:a libopus $O", 0),
    "ff_24.m4a": (2, 24000, "ffmpeg -i $W $O", 1024),
    "ff_start_48.m4a": (2, 48000, "ffmpeg -i $W -movflags +faststart $O", 1024),
    "ff_live_48.webm": (2, 48000, "ffmpeg -i $W -c:a libopus -f webm - > $O", 0),
    "ff_24.aac": (2, 24000, "ffmpeg -i $W $O", 2048),
    "sox_44.mp3": (2, 44100, "sox $W $O", 3 * 1152),
    "sox_16.mp3": (2, 16000, "sox $W $O", 3 * 576),
    "sox_pipe_24.wav": (2, 24000, "sox $W -t wav - | cat > $O", 0),
    "sox_48.flac": (2, 48000, "sox $W $O", 0),
    "sox_22.ogg": (2, 22050, "sox $W $O", 0),
    "lame_v4_24.mp3": (2.5, 24000, "lame --quiet -V4 $W $O", 0),
    "lame_pipe_44.mp3": (2.5, 44100, "lame --quiet -V4 - - < $W > $O", 3 * 1152),
    "lame_abr_22.mp3": (2.5, 22050, "lame --quiet -t --abr 64 $W $O", 3 * 576),
    "lame_cbr_32.mp3": (1.3, 32000, "lame --quiet -b 64 $W $O", 0),
    "opusenc_24.opus": (2.5, 24000, "opusenc --quiet $W $O", 0),
    "oggenc_22.ogg": (2.5, 22050, "oggenc -Q -o $O $W", 0),
    "flac_16.flac": (2.5, 16000, "flac -s -o $O $W", 0),
    "flac_pipe_44.flac": (2.5, 44100, "cat $W | flac -s - | cat > $O", 0),
}  # fmt: skip
MORE = {  # by PyAV, so that 40 good files are made on any machine
    f"av_{rate}_{codec}_{'pipe' * piped}.{form}": (seconds, rate, {"form": form, "codec": codec, "piped": piped}, more)
    for seconds, rates, form, codec, more in (
        (1.2, (8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000), "mp3", "libmp3lame", 0),
        (1.2, (8000, 22050, 96000), "wav", "pcm_s16le", 0),
        (1.2, (16000, 44100), "wav", "pcm_f32le", 0),
        (2.2, (8000, 16000, 44100, 96000), "flac", "flac", 0),
        (2.2, (8000, 12000, 16000, 24000, 48000), "ogg", "libopus", 0),
        (2.2, (16000, 48000), "webm", "libopus", 0),
        (2.2, (22050, 24000, 44100, 48000), "adts", "aac", 2048),
    )
    for rate in rates
    for piped in ((False, True) if form in ("wav", "flac") else (False,))
}


@pytest.mark.slow
def test_good_sound_of_many_makers(tmp_path):
    """At its true length within 0.1 s; exactly where it is stored."""
    made, skipped = {}, set()
    for name, (seconds, rate, how, more) in MORE.items():
        made[name] = seconds, rate, more
        write(tmp_path / name, spoken(seconds, rate), rate, **how)
    for name, (seconds, rate, command, more) in OTHERS.items():
        program = next(part for part in command.split() if part not in ("cat", "$W", "|"))
        if shutil.which(program) is None:
            skipped.add(program)
            continue
        source, target = tmp_path / "source.wav", tmp_path / name
        write(source, spoken(seconds, rate), rate, "wav", "pcm_s16le")
        command = command.replace("ffmpeg", "ffmpeg -y -loglevel error").replace("$W", str(source))
        subprocess.run(command.replace("$O", str(target)), shell=True, check=True, capture_output=True)
        made[name] = seconds, rate, more
    for name, (seconds, rate, more) in made.items():
        path = (tmp_path / name).rename((tmp_path / name).with_suffix(".aac")) if "adts" in name else tmp_path / name
        samples, stored = vqa.decode_audio(path)
        extra = len(samples) / stored - round(seconds * rate) / rate
        assert -1e-6 < extra <= more / rate + 1e-6 and extra < 0.1, (name, extra)
        assert vqa.speech_length(path) == len(vqa.load_speech(path)), name
    assert len(made) >= len(MORE) >= 35
    if skipped:
        pytest.skip(f"read {len(made)} good files; not installed: {', '.join(sorted(skipped))}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "passes"),
    [
        *(("a.wav", 200), ("a.mp3", 199), ("headless.mp3", 199), ("a.flac", 0), ("piped.flac", 0), ("a.ogg", 0)),
        *(("a.opus", 0), ("a.m4a", 150), ("a.webm", 200), ("a.aac", 160)),
        *(("plain.jpg", 180), ("progressive.jpg", 160), ("plain.png", 0), ("lossy.webp", 80), ("lossless.webp", 195)),
    ],
)
def test_two_hundred_flipped_bits(good, tmp_path, name, passes):
    """How many at most are read as something else: those of docs/RELIABILITY.md, with some room for other versions."""
    path = tmp_path / name
    if name in GOOD:
        whole, read = (good / name).read_bytes(), lambda: vqa.decode_audio(path)[0]
    else:
        how = {"progressive": "progressive" in name} if "jpg" in name else {"lossless": "lossless" in name}
        vqa.decode_frame(FRAME).save(path, **({} if "png" in name else how))
        whole, read = path.read_bytes(), lambda: (vqa.decode_frame(path, True), np.asarray(vqa.decode_frame(path)))[1]
    path.write_bytes(whole)
    right, counts = read(), {"refused": 0, "equal": 0, "other": 0}
    for bit in np.random.default_rng(1).integers(0, 8 * len(whole), 200):
        content = bytearray(whole)
        content[bit >> 3] ^= 1 << (bit & 7)
        path.write_bytes(content)
        try:
            counts["equal" if np.array_equal(read(), right) else "other"] += 1
        except vqa.VQAError as error:
            assert str(path) in str(error)
            counts["refused"] += 1
    print(name, json.dumps(counts))
    assert counts["other"] <= passes
