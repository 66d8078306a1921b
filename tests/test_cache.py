"""The feature cache: what is kept, that it is the same bit for bit, and what happens to files that are damaged.

And what a process keeps of the speech it has decoded, where there is no cache.
"""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import evaluate_checkpoint as ev
import train_vqa as vqa
from tests.conftest import EVAL_DATA, PAD, TRAIN_DATA, read_jsonl, refusal, same_tensors, weights_of, without_time


@pytest.fixture()
def dataset(rows, processor):
    """Builds a dataset of its own over the fixture rows, two frames a clip."""
    return lambda part=rows, by=processor, frames=2: vqa.SurgicalVQADataset(part, by, max_train_frames=frames)


def fill(model, folder, source, **kwargs):
    """Fill `folder`, let the source read from it, and return it."""
    store = vqa.FeatureStore(folder, model, source.processor)
    store.fill([source], **kwargs)
    source.feature_store = store
    return source


def names(folder, kind=""):
    """The files of the cache, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(kind))


def same(one, two):
    """Whether two samples or batches hold the same tensors, bit for bit."""
    return same_tensors(
        {k: v for k, v in one.items() if k != "row_indices"}, {k: v for k, v in two.items() if k != "row_indices"}
    )


@pytest.fixture(scope="module")
def counts(rows):
    """How many clips and how many different speech files the fixtures hold."""
    return len({row.frames for row in rows}), len({row.audio_path.read_bytes() for row in rows})


# ---------------------------------------------------------------------------------------------------------- bit for bit


@pytest.mark.parametrize("frame_mode", vqa.FRAME_MODES)
@pytest.mark.parametrize("audio_tokens", vqa.AUDIO_TOKENS)
def test_cached_samples_give_the_uncached_loss_bit_for_bit(
    fresh, tokenizer, rows, dataset, tmp_path, audio_tokens, frame_mode
):
    model = fresh()
    processor = vqa.VQAProcessor(tokenizer, model.config, 56, "audio", audio_tokens, frame_mode)
    cached, plain = fill(model, tmp_path, dataset(by=processor)), dataset(by=processor)
    pairs, losses = [], []
    for index in range(len(rows)):
        one, two = (vqa.VQACollator(PAD)([source[index]]) for source in (plain, cached))
        assert two.keys() - one.keys() == {"vision_features", "speech_features"}
        assert one.keys() - two.keys() == {"pixel_values", "input_features", "audio_lengths"}
        assert all(torch.equal(one[name], two[name]) for name in one.keys() & two.keys() - {"row_indices"})
        pairs.append([{name: value for name, value in batch.items() if name != "row_indices"} for batch in (one, two)])
        with torch.no_grad():
            losses.append([model(**batch).loss for batch in pairs[-1]])
    model.offload_encoders()
    for encoder in (model.model.visual, model.audio_encoder):
        encoder.forward = None  # features need no encoders: a call would raise
    with torch.no_grad():
        assert all(one == two == model(**pair[1]).loss for (one, two), pair in zip(losses, pairs, strict=True))
    if audio_tokens == "speech":  # of which only the rows that cover sound are kept
        lengths = {-(-len(vqa.load_speech(row.audio_path)) // 320) for row in rows}
        stored = [load_file(tmp_path / name)["features"].shape for name in names(tmp_path, "speech-")]
        assert {shape[0] for shape in stored} == lengths and {shape[1] for shape in stored} == {64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cold_or_warm_in_workers_or_in_two_runs_at_once_the_samples_are_the_same(fresh, dataset, tmp_path, dtype):
    model, collate = fresh(dtype=dtype), vqa.VQACollator(PAD)
    cold = fill(model, tmp_path / "one", dataset())
    batch = collate([cold[i] for i in (0, 1)])
    assert batch["vision_features"].dtype == batch["speech_features"].dtype == dtype
    assert same(batch, collate([fill(model, tmp_path / "one", dataset())[i] for i in (0, 1)]))
    loader = torch.utils.data.DataLoader(cold, 2, num_workers=1, collate_fn=collate)
    assert same(next(iter(loader)), batch)
    (tmp_path / "two").mkdir()
    for name in names(tmp_path / "one"):  # of a run that was killed
        (tmp_path / "two" / f"tmp-{name[:16]}").write_bytes(b"torn")
    models = [fresh(dtype=dtype), fresh(dtype=dtype)]
    with ThreadPoolExecutor(2) as pool:
        for other in pool.map(lambda model: fill(model, tmp_path / "two", dataset()), models):
            assert all(same(cold[index], other[index]) for index in range(5))
    assert [name for name in names(tmp_path / "two") if not name.startswith("tmp-")] == names(tmp_path / "one")


def test_each_clip_and_speech_is_encoded_once_and_text_mode_keeps_clips_alone(
    base, tokenizer, dataset, tmp_path, counts, capsys
):
    clips, speech = counts
    for encoded in (counts, (0, 0)):
        fill(base, tmp_path, dataset())
        said = f"{clips} clips and {speech} speech files, {encoded[0]} and {encoded[1]} of them encoded now"
        assert said in capsys.readouterr().out
    in_words = vqa.VQAProcessor(tokenizer, base.config, 56, "text")
    cached = fill(base, tmp_path / "text", dataset(by=in_words))
    assert len(names(tmp_path / "text", "vision-")) == len(names(tmp_path / "text")) == clips
    assert "speech_features" not in cached[0] and "vision_features" in cached[0]


# ------------------------------------------------------------------------------------------------------------- the key


def test_what_the_features_depend_on_is_in_their_names(base, fresh, tokenizer, dataset, tmp_path, counts):
    clips, speech = counts
    fill(base, tmp_path, dataset())

    def grows(model=base, frames=2, **settings):
        by, before = (
            vqa.VQAProcessor(tokenizer, base.config, **{"max_image_size": 56, **settings}),
            len(names(tmp_path)),
        )
        fill(model, tmp_path, dataset(by=by, frames=frames))
        return len(names(tmp_path)) - before

    assert grows() == 0
    assert grows(max_image_size=84) == grows(frame_mode="video") == grows(frames=1) == clips
    assert grows(audio_tokens="speech") == speech
    for other in ({"seed": 2}, {"dtype": torch.bfloat16}, {"attn_implementation": "eager"}):
        assert grows(fresh(**other)) == clips + speech
    other = fresh()
    with torch.no_grad():
        other.audio_encoder.layers[0].fc1.weight[3, 5] += 1
    assert grows(other) == speech
    before_tf32 = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # as --tf32 does
        assert grows() == clips + speech
    finally:
        torch.backends.cuda.matmul.fp32_precision = before_tf32
    assert grows() == 0


def test_a_file_that_changed_is_encoded_again(base, dataset, data, tmp_path):
    rows = vqa.load_rows(*data.args)
    fill(base, tmp_path / "c", dataset(rows))
    before = names(tmp_path / "c")
    samples, rate = soundfile.read(rows[0].audio_path)
    soundfile.write(rows[0].audio_path, samples[160:], rate)
    fill(base, tmp_path / "c", dataset(vqa.load_rows(*data.args)))
    (new,) = set(names(tmp_path / "c")) - set(before)
    assert new.startswith("speech-")


# ------------------------------------------------------------------------------------------------- damage and refusals


@pytest.mark.parametrize("kind", ["vision-", "speech-"])
@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "gone"])
def test_a_damaged_file_is_named_and_once_removed_computed_again(base, dataset, tmp_path, capsys, damage, kind):
    cached = fill(base, tmp_path, dataset())
    before, file = names(tmp_path), tmp_path / names(tmp_path, kind)[0]
    samples = [{name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in cached[i].items()}
               for i in range(5)]  # fmt: skip
    if damage == "foreign":
        save_file({"other": torch.zeros(3)}, file)
    else:
        file.write_bytes(file.read_bytes()[:-100] if damage == "cut" else b"")
    if damage == "gone":
        file.unlink()
    with pytest.raises(vqa.VQAError, match=f"{file.name}: damaged or gone"):
        [cached[index] for index in range(5)]
    file.unlink(missing_ok=True)
    capsys.readouterr()
    fill(base, tmp_path, dataset())
    now = "1 and 0" if kind == "vision-" else "0 and 1"
    assert f"{now} of them encoded now" in capsys.readouterr().out
    assert all(same(samples[index], cached[index]) for index in range(5)) and names(tmp_path) == before


def test_a_failed_write_leaves_nothing(base, dataset, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vqa, "save_file", full)
    assert "No space left on device" in refusal(fill, base, tmp_path, dataset())
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    message = refusal(fill, base, tmp_path / "file/x", dataset())
    assert message.startswith(f"--cache_features {tmp_path / 'file/x'}: ")


def test_media_that_do_not_decode_stop_the_filling_unless_errors_are_allowed(base, dataset, data, tmp_path, counts):
    rows = vqa.load_rows(*data.args)
    frame = rows[0].frame_paths[0]
    frame.write_bytes(b"no image")
    assert f"frame {frame} is in no format that is known" in refusal(fill, base, tmp_path / "c", dataset(rows))
    fill(base, tmp_path / "c", dataset(rows), allow_errors=True)
    assert (len(names(tmp_path / "c", "vision-")), len(names(tmp_path / "c", "speech-"))) == (counts[0] - 1, counts[1])


def test_a_trained_encoder_is_refused():
    flags = [*TRAIN_DATA, "--output_dir", "o", "--cache_features", "c"]
    vqa.parse_arguments(flags)
    for flag in ("--train_vision_tower", "--train_audio_encoder"):
        message = refusal(vqa.parse_arguments, [*flags, flag, "True"])
        assert message.startswith("--cache_features ") and flag in message


# ------------------------------------------------------------------------------------------------- whole runs, and arms


def test_training_and_every_arm_of_evaluation_with_the_cache_are_those_without_it(train, evaluate, tmp_path):
    cache, places = ("--cache_features", tmp_path / "cache"), ("plain", "cold", "warm")
    flags = [
        "--max_train_samples",
        "3",
        "--max_steps",
        "3",
        "--save_strategy",
        "no",
        "--per_device_train_batch_size",
        "1",
    ]
    flags += [*EVAL_DATA[:2], "--max_eval_samples", "2", "--per_device_eval_batch_size", "1", "--max_eval_frames", "2"]
    for name in places:
        assert train(tmp_path / name, *flags, *(cache if name != "plain" else ())) == 0
        losses = [json.loads((tmp_path / place / "trainer_state.json").read_text())["log_history"][-1]["train_loss"]
                  for place in ("plain", name)]  # fmt: skip
        assert losses[0] == losses[1]
        assert same_tensors(weights_of(tmp_path / "plain"), weights_of(tmp_path / name))
    kept = [vqa.load_settings(tmp_path / name)["data"]["cache_features"] for name in ("plain", "warm")]
    assert kept == [None, str(cache[1])]

    one = evaluate("--limit", 3, "--batch_size", 1, *cache, checkpoint=tmp_path / "warm", name="first")
    assert one.status == 0 and "0 and 0 of them encoded now" in one.out  # training wrote what it reads
    assert one.summary["manifest"]["flags"]["cache_features"] == str(cache[1])
    arms = ("--arms", "mismatched_audio,silent_audio,black_frames,shuffled_frames,first_frame")
    answers = {}
    for name, more in (("cached", cache), ("without", ())):
        result = evaluate(*arms, "--batch_size", 1, *more, checkpoint=tmp_path / "warm", name=name)
        assert result.status == 0, result.err
        files = {arm: read_jsonl(tmp_path / part["file"]) for arm, part in result.summary["arms"].items()}
        answers[name] = {arm: [without_time(row) for row in rows] for arm, rows in files.items()}
    assert answers["cached"] == answers["without"] and len(answers["cached"]) == 6


@pytest.mark.parametrize("medium", ["frames", "speech"])
def test_an_arm_gets_no_cached_features_of_the_medium_that_it_changes(
    base, processor, rows, monkeypatch, tmp_path, medium
):
    ev.load_libraries()
    monkeypatch.setitem(ev.CONTENT_ARMS, "new_arm", (medium, lambda given: given[::-1]))
    dataset = vqa.SurgicalVQADataset(rows[:2], processor, max_eval_frames=2, is_eval=True, with_answer=False)
    main, new = ev.ArmInputs("audio", dataset), ev.ArmInputs("new_arm", dataset)
    changed, unchanged = main.read(1)
    if medium == "frames":
        expected, name = processor.patches_of(changed[::-1])[0], "pixel_values"
    else:
        expected, name = processor.log_mel(unchanged[::-1], "")[0], "input_features"
    main.feature_store = new.feature_store = vqa.FeatureStore(tmp_path, base, processor)
    main.feature_store.fill([main, new])
    cached, sample = main.sample(1), new.sample(1)
    assert {"vision_features", "speech_features"} <= cached.keys()
    assert torch.equal(sample[name], expected)
    assert {"frames": "speech_features", "speech": "vision_features"}[medium] in sample


# -------------------------------------------------------------------------------- speech decoded before, without cache


@pytest.mark.parametrize("audio_tokens", vqa.AUDIO_TOKENS)
def test_speech_that_rows_and_epochs_share_is_decoded_once_and_may_be_changed(
    base, tokenizer, rows, dataset, monkeypatch, audio_tokens
):
    processor = vqa.VQAProcessor(tokenizer, base.config, 56, "audio", audio_tokens)
    shared, decoded, decode = [rows[0], rows[1], rows[0]], [], vqa.load_speech
    first = [processor.log_mel(decode(row.audio_path), row.audio_path)[0] for row in shared]
    monkeypatch.setattr(vqa, "load_speech", lambda path: decoded.append(path) or decode(path))
    source = dataset(shared, processor)
    for _ in range(2):
        for index in range(3):
            batch = vqa.VQACollator(PAD)([source[index]])
            assert torch.equal(batch["input_features"], first[index])
            batch["input_features"].zero_()
    assert len(decoded) <= 2


@pytest.mark.parametrize(
    "keeps", [("size",), ("size", "time"), ("inode", "size"), ("inode", "time"), ("inode", "size", "time")]
)
def test_speech_that_was_replaced_is_decoded_anew_and_what_is_gone_is_named(data, processor, dataset, keeps):
    """Whatever of its file stayed the same."""
    rows = vqa.load_rows(*data.args)[:1]
    source, path = dataset(rows), rows[0].audio_path
    before, stat = source[0]["input_features"], os.stat(path)
    samples, rate = soundfile.read(path, dtype="int16")
    changed = samples[::-1] if "size" in keeps else samples[160:]
    target = path if "inode" in keeps else path.with_name("new.wav")
    soundfile.write(target, changed, rate)
    assert (target.stat().st_size == stat.st_size) == ("size" in keeps)
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns + ("time" not in keeps)))
    shutil.move(target, path)
    after = source[0]["input_features"]
    assert not torch.equal(after, before)
    assert torch.equal(after, processor.log_mel(vqa.load_speech(path), path)[0])
    path.unlink()
    assert f"speech {path} cannot be decoded" in refusal(lambda: source[0])
