"""The feature cache: what is kept, that it is the same bit for bit, and what happens to files that are not whole.

And what a process keeps of the speech it heard, where there is no cache.
"""

import json
import os
import shutil

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import evaluate_checkpoint as ev
import train_vqa as vqa
from tests.conftest import FIXTURES, TINY
from tests.test_main import FIXTURE_DATA, RANDOM_TINY, SMALL


@pytest.fixture()
def dataset(rows, processor):
    """Builds a dataset of its own over the fixture rows, two frames a clip."""
    return lambda part=rows, by=processor: vqa.SurgicalVQADataset(part, by, max_train_frames=2, numbered=True)


def fill(model, folder, *sources, **kwargs):
    """Fill `folder`, let the sources read from it, and return them."""
    store = vqa.FeatureStore(folder, model, sources[0].processor)
    store.fill(sources, **kwargs)
    for source in sources:
        source.features = store
    return sources


def files_of(source, index):
    """The files of a row's clip and speech; None: not kept."""
    return [source.features.files.get(medium) for medium in source.media_of(index)]


def names(folder):
    """The files of the cache, sorted."""
    return sorted(path.name for path in folder.iterdir())


def same(one, two):
    """Whether two batches hold the same tensors, bit for bit."""
    return one.keys() == two.keys() and all(
        torch.equal(one[name], two[name]) if name != "rows" else one[name] == two[name] for name in one
    )


@pytest.fixture()
def calls(base, monkeypatch):
    """How often each encoder of `base` ran, and each decoder of media."""
    counts = dict.fromkeys(("see", "hear", "load_frame", "load_speech"), 0)

    def counting(owner, name):
        plain = getattr(owner, name)

        def call(*args):
            counts[name] += 1
            return plain(*args)

        monkeypatch.setattr(owner, name, call)

    for name in ("see", "hear"):
        counting(base, name)
    for name in ("load_frame", "load_speech"):
        counting(vqa, name)
    return counts


# ---------------------------------------------------------------------------------------------------------- bit for bit


@pytest.mark.parametrize("frame_mode", vqa.FRAME_MODES)
@pytest.mark.parametrize("audio_tokens", vqa.AUDIO_TOKENS)
def test_cached_samples_give_the_uncached_loss_bit_for_bit(
    base, tokenizer, rows, dataset, tmp_path, audio_tokens, frame_mode
):
    processor = vqa.VQAProcessor(tokenizer, base.config, 56, "audio", audio_tokens, frame_mode)
    (cached,) = fill(base, tmp_path, dataset(by=processor))
    plain, collate = dataset(by=processor), vqa.VQACollator(497)
    for index in range(len(rows)):
        one, two = collate([plain[index]]), collate([cached[index]])
        assert two.keys() - one.keys() == {"vision_features", "speech_features"}
        assert one.keys() - two.keys() == {"pixel_values", "input_features", "audio_lengths"}
        assert all(torch.equal(one[name], two[name]) for name in one.keys() & two.keys() - {"rows"})
        one.pop("rows"), two.pop("rows")
        with torch.no_grad():
            assert torch.equal(base(**one).loss, base(**two).loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cold_and_a_warm_batch_are_the_same(fresh, dataset, tmp_path, dtype):
    model, collate = fresh(dtype=dtype), vqa.VQACollator(497)
    (cold,) = fill(model, tmp_path / "one", dataset())
    cold_batch = collate([cold[i] for i in (0, 3, 4)])
    (warm,) = fill(model, tmp_path / "one", dataset())
    assert same(cold_batch, collate([warm[i] for i in (0, 3, 4)]))
    (again,) = fill(model, tmp_path / "two", dataset())
    assert same(cold_batch, collate([again[i] for i in (0, 3, 4)]))
    assert names(tmp_path / "one") == names(tmp_path / "two")
    assert cold_batch["vision_features"].dtype == cold_batch["speech_features"].dtype == dtype


def test_each_clip_and_speech_is_decoded_and_encoded_once(base, rows, dataset, tmp_path, calls, capsys):
    train, other = fill(base, tmp_path, dataset(), dataset(rows[:2]))
    clips = {row.frames for row in rows}
    contents = {row.audio_path.read_bytes() for row in rows}
    assert calls == {
        "see": len(clips), "hear": len(contents), "load_frame": 2 * len(clips), "load_speech": len(contents)
    }  # fmt: skip
    assert (
        f"{len(clips)} clips and {len(contents)} speech files, {len(clips)} and {len(contents)} of them encoded now"
        in (capsys.readouterr().out)
    )
    before = dict(calls)
    for index in range(5):
        train[index]
    other[1]
    fill(base, tmp_path, dataset())
    assert calls == before
    assert (
        f"{len(clips)} clips and {len(contents)} speech files, 0 and 0 of them encoded now" in capsys.readouterr().out
    )


def test_speech_keeps_only_the_rows_that_cover_sound(base, tokenizer, rows, dataset, tmp_path):
    processor = vqa.VQAProcessor(tokenizer, base.config, 56, "audio", "speech")
    (cached,) = fill(base, tmp_path, dataset(by=processor))
    samples = len(vqa.load_speech(rows[0].audio_path))
    stored = load_file(files_of(cached, 0)[1])["features"]
    assert tuple(stored.shape) == (-(-samples // 320), 64)


def test_text_mode_keeps_clips_alone(base, tokenizer, dataset, tmp_path):
    processor = vqa.VQAProcessor(tokenizer, base.config, 56, "text")
    (cached,) = fill(base, tmp_path, dataset(by=processor))
    assert all(name.startswith("vision-") for name in names(tmp_path))
    assert "speech_features" not in cached[0]
    assert "vision_features" in cached[0]


# ------------------------------------------------------------------------------------------------------------- the key


def test_what_the_features_depend_on_is_in_their_names(base, fresh, tokenizer, rows, dataset, tmp_path):
    fill(base, tmp_path, dataset())
    size = len(names(tmp_path))

    def grows(model=base, part=rows, frames=2, **settings):
        nonlocal size
        by = vqa.VQAProcessor(tokenizer, base.config, **{"max_image_size": 56, **settings})
        fill(model, tmp_path, vqa.SurgicalVQADataset(part, by, max_train_frames=frames))
        before, size = size, len(names(tmp_path))
        return size - before

    clips, speech = len({row.frames for row in rows}), len({row.audio_path.read_bytes() for row in rows})
    assert grows() == 0
    assert grows(max_image_size=84) == clips
    assert grows(frame_mode="video") == clips
    assert grows(frames=1) == clips
    assert grows(audio_tokens="speech") == speech
    assert grows(fresh(seed=2)) == clips + speech
    assert grows(fresh(dtype=torch.bfloat16)) == clips + speech
    assert grows(fresh(attn_implementation="eager")) == clips + speech
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


def test_a_file_that_changed_is_encoded_again(base, processor, data, tmp_path):
    def read():
        (cached,) = fill(
            base, tmp_path / "c", vqa.SurgicalVQADataset(vqa.load_rows(*data.args), processor, max_train_frames=2)
        )
        return cached

    before = read()
    path = before.rows[0].audio_path
    shutil.copy(next(row.audio_path for row in before.rows if row.audio_path.read_bytes() != path.read_bytes()), path)
    after = read()
    (clip, speech), (same_clip, other_speech) = files_of(before, 0), files_of(after, 0)
    assert clip == same_clip
    assert speech != other_speech


# -------------------------------------------------------------------------------------------------- what is not whole


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign"])
def test_a_damaged_file_is_named_and_once_removed_computed_again(base, dataset, tmp_path, capsys, damage):
    (cached,) = fill(base, tmp_path, dataset())
    file, before = files_of(cached, 0)[0], names(tmp_path)
    sample = cached[0]
    sample["vision_features"] = sample["vision_features"].clone()  # off the file that is damaged next
    if damage == "foreign":
        save_file({"other": torch.zeros(3)}, file)
    else:
        file.write_bytes({"cut": file.read_bytes()[:-100], "empty": b""}[damage])
    with pytest.raises(vqa.VQAError, match=f"{file.name}: damaged or gone"):
        cached[0]
    file.unlink()
    capsys.readouterr()
    fill(base, tmp_path, dataset())
    assert "1 and 0 of them encoded now" in capsys.readouterr().out
    assert same(sample, cached[0])
    assert names(tmp_path) == before


def test_a_file_that_is_gone_is_named(base, dataset, tmp_path):
    (cached,) = fill(base, tmp_path, dataset())
    files_of(cached, 0)[1].unlink()
    with pytest.raises(vqa.VQAError, match=r"speech-.*damaged or gone"):
        cached[0]


def test_what_a_killed_run_left_is_not_taken_for_features(base, dataset, tmp_path):
    (cached,) = fill(base, tmp_path / "whole", dataset())
    (tmp_path / "torn").mkdir()
    for name in names(tmp_path / "whole"):
        (tmp_path / "torn" / f"tmp-{name[:16]}").write_bytes(b"torn")
    (other,) = fill(base, tmp_path / "torn", dataset())
    assert all(same(cached[index], other[index]) for index in range(5))


def test_a_failed_write_leaves_nothing(base, dataset, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vqa, "save_file", full)
    with pytest.raises(vqa.VQAError, match=r"could not be written .*No space left on device.*start again"):
        fill(base, tmp_path, dataset())
    assert names(tmp_path) == []


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_folder_that_cannot_be_written_is_refused(base, dataset, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(vqa.VQAError, match=f"--cache_features {file / 'x'}: cannot be written .*name another"):
        fill(base, file / "x", dataset())


def test_media_that_do_not_decode_stop_the_filling_unless_errors_are_allowed(base, processor, data, tmp_path):
    rows = vqa.load_rows(*data.args)
    frame = rows[0].frame_paths[0]
    frame.write_bytes(b"no image")
    with pytest.raises(vqa.VQAError, match=f"frame {frame} cannot be decoded"):
        fill(base, tmp_path / "c", vqa.SurgicalVQADataset(rows, processor, max_train_frames=2))
    (cached,) = fill(
        base, tmp_path / "c", vqa.SurgicalVQADataset(rows, processor, max_train_frames=2), allow_errors=True
    )
    clip, speech = files_of(cached, 0)
    assert clip is None
    assert speech.is_file()


# ---------------------------------------------------------------------------------------------------------- a whole run


def test_training_with_the_cache_is_training_without_it(tmp_path, capsys):
    argv = [
        *FIXTURE_DATA,
        *RANDOM_TINY,
        *SMALL,
        "--max_train_samples",
        "3",
        "--max_steps",
        "3",
        "--save_strategy",
        "no",
    ]
    argv += ["--per_device_train_batch_size", "1", "--eval_data_path", str(FIXTURES / "smoke.jsonl")]
    argv += ["--max_eval_samples", "2", "--per_device_eval_batch_size", "1"]
    cache, weights, losses = ["--cache_features", str(tmp_path / "cache")], [], []
    for name, more in (("plain", []), ("cold", cache), ("warm", cache)):
        assert vqa.main([*argv, "--output_dir", str(tmp_path / name), *more]) == 0
        weights.append(load_file(tmp_path / name / "adapter_model.safetensors"))
        losses.append(json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"][-1]["train_loss"])
    assert losses[0] == losses[1] == losses[2]
    assert all(torch.equal(weights[0][k], part[k]) for part in weights[1:] for k in weights[0])
    settings = vqa.load_settings(tmp_path / "warm")
    assert settings["data"]["cache_features"] == cache[1]
    assert vqa.load_settings(tmp_path / "plain")["data"]["cache_features"] is None


def test_workers_read_the_cache(base, dataset, tmp_path):
    (cached,) = fill(base, tmp_path, dataset())
    loader = torch.utils.data.DataLoader(cached, 2, num_workers=1, collate_fn=vqa.VQACollator(497))
    assert same(next(iter(loader)), vqa.VQACollator(497)([cached[0], cached[1]]))


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture()
def arms(processor, rows):
    """The inputs of every arm by ear, over the fixture rows with two frames."""
    dataset = vqa.SurgicalVQADataset(rows, processor, max_eval_frames=2, is_eval=True, with_answer=False)
    borrowed = [*rows[1:], rows[0]]
    by_ear = ("audio", "mismatched_audio", "silent_audio", "black_frames", "shuffled_frames", "first_frame")
    return {arm: ev.ArmInputs(arm, dataset, borrowed if arm == "mismatched_audio" else rows, 0) for arm in by_ear}


def test_every_arm_is_answered_from_the_cache_as_without_it(base, arms, rows, tmp_path, calls):
    plain = {arm: [inputs.sample(index) for index in range(5)] for arm, inputs in arms.items()}
    fill(base, tmp_path, *arms.values())
    clips, speech = len({row.frames for row in rows}), len({row.audio_path.read_bytes() for row in rows})
    shuffled = len({inputs.media_of(i)[0] for inputs in [arms["shuffled_frames"]] for i in range(5)})
    assert (calls["see"], calls["hear"]) == (2 * clips + shuffled, speech)  # whole, first frame alone, shuffled
    collate = vqa.VQACollator(497, "left")
    for arm, inputs in arms.items():
        for index in range(5):
            sample = inputs.sample(index)
            assert ("vision_features" in sample) == (arm != "black_frames"), arm
            assert ("speech_features" in sample) == (arm != "silent_audio"), arm
            with torch.no_grad():
                logits = [
                    base(**{k: v for k, v in collate([s]).items() if k != "labels"}).logits
                    for s in (sample, plain[arm][index])
                ]
            assert torch.equal(*logits), arm


def test_evaluation_reads_what_training_wrote(tmp_path, capsys):
    train = [*FIXTURE_DATA, *RANDOM_TINY, *SMALL, "--max_steps", "1", "--save_strategy", "no"]
    cache = ["--cache_features", str(tmp_path / "cache")]
    assert vqa.main([*train, "--output_dir", str(tmp_path / "out"), *cache]) == 0
    flags = ["--checkpoint_path", str(tmp_path / "out"), "--eval_data_path", str(FIXTURES / "smoke.jsonl")]
    flags += [
        "--frames_dir",
        str(FIXTURES / "frames"),
        "--audio_dir",
        str(FIXTURES / "audio"),
        "--max_eval_frames",
        "2",
    ]
    flags += ["--max_new_tokens", "4", "--batch_size", "1"]
    answers = []
    capsys.readouterr()
    for name, more in (("cached", cache), ("plain", [])):
        path = tmp_path / f"{name}.jsonl"
        assert ev.main([*flags, "--output_file", str(path), *more]) == 0
        printed = capsys.readouterr().out
        assert ("0 and 0 of them encoded now" in printed) == (name == "cached")
        answers.append([json.loads(line)["predicted_answer"] for line in path.read_text().splitlines()])
    assert len(answers[0]) == 5
    assert answers[0] == answers[1]
    summary = json.loads((tmp_path / "cached.summary.json").read_text())
    assert summary["manifest"]["flags"]["cache_features"] == cache[1]


def test_two_runs_may_fill_one_folder_at_once(fresh, dataset, tmp_path):
    models = [fresh(), fresh()]
    with vqa.ThreadPoolExecutor(2) as pool:
        (one,), (two,) = pool.map(lambda model: fill(model, tmp_path, dataset()), models)
    assert all(same(one[index], two[index]) for index in range(5))
    assert sorted({file.name for source in (one, two) for file in source.features.files.values()}) == names(tmp_path)


def test_a_trained_tower_is_refused():
    flags = ["--train_data_path", "t", "--frames_dir", "f", "--audio_dir", "a", "--output_dir", "o"]
    flags += ["--cache_features", "c"]
    vqa.parse_arguments(flags)
    for flag in ("--train_vision_tower", "--train_audio_encoder"):
        with pytest.raises(vqa.VQAError, match=f"--cache_features keeps what frozen .*, and {flag} trains one"):
            vqa.parse_arguments([*flags, flag, "True"])


def test_encoders_off_the_gpu_are_not_needed_for_features(fresh, dataset, tmp_path):
    model = fresh()
    (cached,) = fill(model, tmp_path, dataset())
    batch = vqa.VQACollator(497)([cached[0], cached[3]])
    batch.pop("rows")
    with torch.no_grad():
        before = model(**batch).loss
        model.offload_encoders()
        for tower in (model.model.visual, model.audio_encoder):
            tower.forward = None  # a call would raise
        assert torch.equal(before, model(**batch).loss)


# ----------------------------------------------------------------------------------- speech heard before, without cache


@pytest.mark.parametrize("audio_tokens", vqa.AUDIO_TOKENS)
def test_speech_that_rows_and_epochs_share_is_decoded_once(base, tokenizer, rows, dataset, calls, audio_tokens):
    processor = vqa.VQAProcessor(tokenizer, base.config, 56, "audio", audio_tokens)
    shared = [rows[0], rows[1], rows[0]]
    first = [processor.encode_speech(vqa.load_speech(row.audio_path), row.audio_path)[0] for row in shared]
    calls["load_speech"] = 0
    source = dataset(shared, processor)
    for _ in range(2):
        assert all(torch.equal(source[index]["input_features"], first[index]) for index in range(3))
    assert calls["load_speech"] == 2


def test_a_batch_may_change_what_it_got_of_the_speech(dataset):
    source, collate = dataset(), vqa.VQACollator(497)
    kept = source[0]["input_features"].clone()
    collate([source[0]])["input_features"].zero_()
    assert torch.equal(source[0]["input_features"], kept)


@pytest.mark.parametrize(
    "keeps", [("size",), ("size", "time"), ("inode", "size"), ("inode", "time"), ("inode", "size", "time")]
)
def test_speech_that_was_replaced_is_heard_anew(data, processor, keeps):
    """Whatever of its file stayed the same."""
    rows = vqa.load_rows(*data.args)[:1]
    source, path = vqa.SurgicalVQADataset(rows, processor, max_train_frames=1), rows[0].audio_path
    before, stat = source[0]["input_features"], os.stat(path)
    samples, rate = soundfile.read(path, dtype="int16")
    changed = samples[::-1] if "size" in keeps else samples[160:]
    target = path if "inode" in keeps else path.with_name("new.wav")
    soundfile.write(target, changed, rate)
    assert (target.stat().st_size == stat.st_size) == ("size" in keeps)
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns + ("time" not in keeps)))
    os.replace(target, path)
    after = source[0]["input_features"]
    assert not torch.equal(after, before)
    assert torch.equal(after, processor.encode_speech(vqa.load_speech(path), path)[0])


def test_speech_that_is_gone_is_named(data, processor):
    rows = vqa.load_rows(*data.args)[:1]
    source = vqa.SurgicalVQADataset(rows, processor, max_train_frames=1)
    source[0]
    rows[0].audio_path.unlink()
    with pytest.raises(vqa.VQAError, match=r"speech .*_nbi_status.wav cannot be decoded"):
        source[0]


def test_pieces_of_prompts_are_tokenised_once(processor, tokenizer, rows, monkeypatch):
    calls = []
    fresh = vqa.VQAProcessor(tokenizer, vqa.load_config(TINY), 56, "audio_text")
    plain = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, **options: calls.append(text) or plain(text, **options))
    first, again = (fresh.build(rows[0].question, [4], 3, rows[0].answer) for _ in range(2))
    assert same(first, again)
    assert len(calls) == len(set(calls)) == 6  # both ends of the speech, question, instruction, answer, turn end
    monkeypatch.setattr(vqa, "MAX_KNOWN_TEXTS", 6)  # which are known by now
    texts = [fresh.build("Another?", [4], 3, rows[0].answer)["input_ids"] for _ in range(2)]
    assert torch.equal(*texts) and len(fresh.known_texts) == 6 and calls[6:] == ["Question: Another?\n"] * 2
