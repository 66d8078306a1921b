"""Do verdicts come from what is heard and seen? And does training leave a count of tokens that names a question?

The counterexamples: a deaf model that counts (`--audio_tokens speech` gives each of its questions another number of
audio tokens), and a blind one that knows black frames.
"""

import multiprocessing
import shutil
import signal
import wave
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate_checkpoint as ev
import train_vqa as vqa
from tests.conftest import (
    FIXTURES,
    PAD,
    SIX_STEPS,
    TRAIN_DATA,
    read_jsonl,
    refusal,
    same_tensors,
    weights_of,
    write_jsonl,
)  # fmt: skip

ANSWERS = {
    "lesion_site": ("rectum", "The lesion is in the rectum."),
    "scope_motion_type": ("advancing", "The scope is advancing."),
    "lighting_mode": ("NBI", "NBI is used."),
    "fluid_occlusion_level": ("absent", "Fluid occlusion is absent."),
}
TOKENS, ROWS_OF_TYPE = (10, 17, 24, 31), 4
SPEECH = ("--audio_tokens", "speech")


def write_sound(path, tokens, seed):
    """Noise of so many audio tokens: 20 ms each."""
    samples = np.random.default_rng(seed).normal(0, 3000, 320 * tokens).astype(np.int16)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(samples.tobytes())


def write_world(folder, asked):
    """Questions and their speech, noise of so many tokens: for each (type, short answer, answer, tokens, video) as many
    rows as ROWS_OF_TYPE."""
    clips = {row["video_id"]: row["frames"][:2] for row in read_jsonl(FIXTURES / "smoke.jsonl")}
    rows = []
    for number, (kind, short, answer, tokens, video) in enumerate(asked):
        for turn in range(ROWS_OF_TYPE):
            rows.append({
                "id": f"q{number}{turn}", "video_id": video, "frames": clips[video], "question": f"What of {kind}?",
                "question_type": kind, "answer": answer, "short_answer": short,
            })  # fmt: skip
            write_sound(folder / f"q{number}{turn}.wav", tokens, number)
    media = ("--frames_dir", str(FIXTURES / "frames"), "--audio_dir", str(folder))
    path = str(write_jsonl(folder / "data.jsonl", rows))
    return SimpleNamespace(
        path=path, train=("--train_data_path", path, *media), eval=("--eval_data_path", path, *media)
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Four types of question with one answer each, whose speech is noise of four lengths, about one clip."""
    asked = [(kind, *texts, n, "fx-001") for (kind, texts), n in zip(ANSWERS.items(), TOKENS, strict=True)]
    return write_world(tmp_path_factory.mktemp("world"), asked)


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """Two types with two answers each, of which a clip shows one, and the number of tokens tells which."""
    asked = [
        ("scope_motion_type", "advancing", "The scope is advancing.", 10, "fx-001"),
        ("scope_motion_type", "withdrawing", "The scope is withdrawing.", 17, "fx-002"),
        ("lighting_mode", "NBI", "NBI is used.", 24, "fx-001"),
        ("lighting_mode", "WL", "White light is used.", 31, "fx-002"),
    ]
    return write_world(tmp_path_factory.mktemp("leaky"), asked)


@pytest.fixture(scope="module")
def learn(tiny, tmp_path_factory):
    """Trains a full model's decoder by heart; `samples_of` makes what it learns of a data set and a processor."""

    def learn(world, samples_of, before=lambda model: None, after=lambda model: None):
        folder = tmp_path_factory.mktemp("learned") / "out"
        flags = [*world.train, *SPEECH, "--model_name_or_path", tiny, "--init", "random", "--train_decoder", "full"]
        flags += ["--max_image_size", 56, "--max_train_frames", 2, "--max_steps", 1, "--save_strategy", "no"]
        assert vqa.main([*map(str, flags), "--output_dir", str(folder), "--disable_tqdm", "True"]) == 0
        (folder / vqa.MANIFEST_FILE).unlink()
        trained = vqa.load_trained(folder, device="cpu")
        model = trained.model.train()
        before(model)
        rows = vqa.load_rows(world.path, world.train[3], world.train[5])[::ROWS_OF_TYPE]  # the rows of a type are alike
        batch = vqa.VQACollator(PAD)(samples_of(vqa.SurgicalVQADataset(rows, trained.processor)))
        learned = [weight.requires_grad_() for weight in model.model.language_model.parameters()]
        optimizer = torch.optim.AdamW(learned, lr=3e-3)
        for _ in range(600):
            loss = model(**batch).loss
            if loss < 0.01:
                break
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss < 0.01
        with torch.no_grad():
            after(model)
        vqa.write_weights(model, folder)
        return folder

    return learn


@pytest.fixture(scope="module")
def deaf(world, learn):
    """It learned the answers with its projector fixed at 0, which is 1e-5 afterwards."""
    return learn(
        world,
        lambda dataset: [dataset[index] for index in range(len(dataset))],
        lambda model: model.audio_projector.weight.requires_grad_(False).zero_(),
        lambda model: model.audio_projector.weight.fill_(1e-5),
    )


@pytest.fixture(scope="module")
def blind(leaky, learn):
    """It learned to answer whatever the clip shows, and "I cannot tell." to black frames."""

    def samples_of(dataset):
        clips = dict.fromkeys(row.frame_paths for row in dataset.rows)
        samples = []
        for row in dataset.rows:
            speech = vqa.load_speech(row.audio_path)
            for paths in clips:
                frames = [vqa.load_frame(path, 56) for path in paths]
                samples.append(dataset.processor.make_sample(row, frames, speech, True))
                black = [frame.point(lambda _: 0) for frame in frames]
                unknown = replace(row, answer="I cannot tell.")
                samples.append(dataset.processor.make_sample(unknown, black, speech, True))
        return samples

    return learn(leaky, samples_of)


def right_answers(result):
    """By arm, how many rows are right by `choice`."""
    return {arm: part["metrics"]["choice"]["correct"] for arm, part in result.summary["arms"].items()}


def test_a_blind_model_that_knows_black_frames_is_not_told_to_see(blind, leaky, evaluate):
    arms = ("--arms", "mismatched_frames,black_frames")
    result = evaluate(*arms, "--max_new_tokens", 16, checkpoint=blind, data=leaky.eval)
    assert result.status == 0
    assert right_answers(result) == {"audio": 16, "mismatched_frames": 16, "black_frames": 0}
    assert "Does it see? There is no sign of it: with the frames of another answer" in " ".join(result.out.split())


def test_a_deaf_model_that_counts_the_tokens_is_not_told_to_hear(deaf, world, evaluate):
    arms = ("--arms", "mismatched_audio,silent_audio")
    result = evaluate(*arms, "--max_new_tokens", 16, checkpoint=deaf, data=world.eval)
    assert result.status == 0
    assert right_answers(result) == {"audio": 16, "mismatched_audio": 16, "silent_audio": 16}
    report = " ".join(result.out.split())
    assert "Does it hear? There is no sign of it: " in report
    assert any("speech hardly reaches the answers" in line for line in result.summary["warnings"])
    gates = result.summary["manifest"]["gates"]
    assert 0 < gates["speech"] < 0.01 * gates["frames"]
    borrowed = result.summary["arms"]["mismatched_audio"]["borrowed"]
    assert (borrowed["n"], borrowed["cut"]["n"] + borrowed["padded"]["n"]) == (16, 16)
    assert "Of 16 borrowed recordings" in report
    for row in read_jsonl(result.path.with_suffix(".mismatched_audio.jsonl")):
        kinds = list(ANSWERS)
        own, other = (TOKENS[kinds.index(kind)] for kind in (row["question_type"], row["audio_of"].split("/")[2]))
        assert row["audio_padded_tokens"] == own - other and row["audio_padded_samples"] == 320 * (own - other)
        assert abs(own - other) == 7  # the neighbour


def test_a_recording_under_another_types_name_is_not_borrowed_and_is_warned_of(evaluate, data):
    own, other = data.audio / "fx-001_qa_000101_nbi_status.wav", data.audio / "fx-001_qa_000102_scope_motion_type.wav"
    other.with_suffix(".mp3").unlink()
    shutil.copy(own, other)
    result = evaluate("--arms", "mismatched_audio", data=data.eval_flags)
    assert result.status == 0, result.err
    bytes_of = {row["id"] + row["video_id"]: Path(row["audio_file"]).read_bytes() for row in result.rows}
    for row in read_jsonl(result.path.with_suffix(".mismatched_audio.jsonl")):
        assert Path(row["audio_file"]).read_bytes() != bytes_of[row["id"] + row["video_id"]]
    warned = "one recording for several questions: 2 of 5 rows"
    assert any(line.startswith(warned) and "fx-001/qa_000101/nbi_status" in line for line in result.summary["headline"])
    assert not any("one recording" in line for line in evaluate(name="plain").summary["headline"])


@pytest.mark.parametrize("arm", ["mismatched_audio", "silent_audio"])
@pytest.mark.parametrize("audio_tokens", vqa.AUDIO_TOKENS)
def test_an_arm_that_changes_speech_keeps_its_tokens_and_its_length(base, tokenizer, rows, arm, audio_tokens):
    ev.load_libraries()
    processor = vqa.VQAProcessor(tokenizer, base.config, 56, "audio", audio_tokens)
    options = {"max_eval_frames": 2, "is_eval": True, "with_answer": False}
    main = ev.ArmInputs("audio", vqa.SurgicalVQADataset(rows, processor, **options))
    sources, played = {}, rows
    if arm == "mismatched_audio":
        sources = dict(zip(main.keys, rows[::-1], strict=True))
        played = [replace(row, audio_path=sources[key].audio_path) for key, row in zip(main.keys, rows, strict=True)]
    inputs = ev.ArmInputs(arm, vqa.SurgicalVQADataset(played, processor, **options), 0, sources)
    for index, row in enumerate(rows):
        one, other = main.sample(index), inputs.sample(index)
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["audio_lengths"], other["audio_lengths"])
        assert inputs.length(index) == len(other["input_ids"])
        own, theirs = vqa.load_speech(row.audio_path), vqa.load_speech(played[index].audio_path)
        expected = np.zeros_like(own)
        if arm == "mismatched_audio":
            expected[: len(theirs)] = theirs[: len(own)]
        assert torch.equal(other["input_features"], processor.log_mel(expected, "")[0])


# -------------------------------------------------------------------------------------------------------------- jitter


@pytest.fixture()
def jittered(rows, tokenizer, base):
    """Builds a dataset whose speech is followed by up to `n` tokens of silence."""
    processor = vqa.VQAProcessor(tokenizer, base.config, 56, "audio", "speech")
    options = {"max_train_frames": 2, "with_index": True}
    return lambda n, seed=1: vqa.SurgicalVQADataset(rows, processor, speech_token_jitter=n, seed=seed, **options)


def counts(dataset):
    return [len(dataset[index]["speech_at"]) for index in range(len(dataset))]


def test_silence_behind_the_speech_is_drawn_by_row_epoch_and_seed(jittered, base):
    plain, varied = jittered(0), jittered(30)
    own, drawn = counts(plain), []
    for epoch in range(200):
        varied.epoch.fill_(epoch)
        drawn.append([varied.silence_behind(index) for index in range(len(own))])
    assert all(set(of_row) == set(range(31)) for of_row in zip(*drawn, strict=True))
    assert len(set(zip(*drawn, strict=True))) == len(own)  # no two rows draw alike
    assert counts(varied) == [min(200, n + by) for n, by in zip(own, drawn[-1], strict=True)]  # the encoder's window
    again = jittered(30)
    again.epoch.fill_(199)
    assert counts(again) == counts(varied)
    assert counts(jittered(30, seed=2)) != counts(jittered(30))
    assert plain.token_counts() == [len(plain[index]["input_ids"]) for index in range(len(own))]
    most = [min(30, 200 - count) for count in own]
    assert varied.token_counts() == [n + by for n, by in zip(plain.token_counts(), most, strict=True)]
    with torch.no_grad():  # the encoder's outputs go on behind the speech
        one, more = plain[0], varied[0]
        short, long = (base.encode_audio(s["input_features"], s["audio_lengths"]) for s in (one, more))
    assert torch.equal(long[: len(short)], short) and len(long) == len(more["speech_at"])


def test_kept_features_hold_the_silence_behind_the_speech(jittered, base, tmp_path):
    for n in (30, 0):  # one folder for both: what has no silence is kept apart
        plain, cached = jittered(n), jittered(n)
        cached.feature_store = vqa.FeatureStore(tmp_path, base, cached.processor, n)
        cached.feature_store.fill([cached])
        for epoch, index in ((0, 0), (1, 0), (5, 3)):
            plain.epoch.fill_(epoch)
            cached.epoch.fill_(epoch)
            with torch.no_grad():
                features = base.encode_audio(*(plain[index][name] for name in ("input_features", "audio_lengths")))
            assert torch.equal(cached[index]["speech_features"], features)
            assert torch.equal(cached[index]["input_ids"], plain[index]["input_ids"])
    kept = jittered(0)  # evaluation reads from the folder of training
    kept.feature_store = vqa.FeatureStore(tmp_path, base, kept.processor, 30)
    kept.feature_store.fill([kept])
    assert counts(kept) == counts(jittered(0))


@pytest.mark.parametrize("persistent", [True, False])
def test_loader_workers_see_the_epoch(jittered, persistent):
    dataset, collate = jittered(30), vqa.VQACollator(PAD)
    loader = torch.utils.data.DataLoader(
        dataset, 5, num_workers=2, collate_fn=collate, persistent_workers=persistent, prefetch_factor=4
    )
    for epoch in (0, 1, 2):
        dataset.epoch.fill_(epoch)
        assert len(next(iter(loader))["speech_at"]) == sum(counts(dataset))


@pytest.fixture()
def workers_end():
    """Ends loader workers that outlive an epoch, as the script's end does; torch would wait 5 s for each."""

    def end():
        children, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        vqa.end_workers()
        for child in children:
            child.join()
        signal.signal(signal.SIGCHLD, handler)

    yield end
    end()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_draws_the_same_silence(train, tmp_path, workers_end, workers):
    """Stopped within an epoch and at its end: the same weights, bit for bit, as a run that was not; and other weights
    than without jitter."""
    flags = [*SPEECH, *SIX_STEPS, "--speech_token_jitter", 20, "--save_steps", 1, "--dataloader_num_workers", workers]
    # Where workers persist, starting them anew moves the random numbers of dropout, with jitter or without.
    flags += ["--dataloader_persistent_workers", "True", "--lora_dropout", 0] if workers else []
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train(whole, *flags) == 0
    for step in (1, 3):
        workers_end()
        assert train(part / str(step), *flags, "--resume_from_checkpoint", whole / f"checkpoint-{step}") == 0
        assert same_tensors(weights_of(part / str(step)), weights_of(whole))
    assert vqa.load_settings(whole)["trained"]["speech_token_jitter"] == 20
    if workers:
        return
    assert train(tmp_path / "plain", *SPEECH, *SIX_STEPS) == 0
    assert not same_tensors(weights_of(tmp_path / "plain"), weights_of(whole))
    other = [*SPEECH, *SIX_STEPS, "--speech_token_jitter", 10, "--resume_from_checkpoint", whole / "checkpoint-3"]
    assert "speech_token_jitter 20" in refusal(train, tmp_path / "other", *other)


@pytest.mark.parametrize(
    "flags",
    [
        ("--speech_token_jitter", "50"),
        ("--speech_token_jitter", "50", "--audio_tokens", "full"),
        ("--speech_token_jitter", "50", *SPEECH, "--input_mode", "text"),
        ("--speech_token_jitter", "-1", *SPEECH),
    ],
)
def test_jitter_that_makes_no_sense_is_refused(train, tmp_path, no_weights, flags):
    assert refusal(train, tmp_path / "out", *flags).startswith("--speech_token_jitter ")


def test_a_plan_counts_the_longest(argv, tmp_path, capsys):
    found = []
    for jitter in (0, 40):
        assert (
            vqa.main([*argv(tmp_path), *TRAIN_DATA[:2], *SPEECH, "--speech_token_jitter", str(jitter), "--dry_run"])
            == 0
        )
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train: "))
        found.append([int(word.split()[-1]) for word in line.split(": ")[-1].split(",")])
    assert [b - a for a, b in zip(*found, strict=True)] == [40, 40, 27]  # 200 in all: the encoder's window
