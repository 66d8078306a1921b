"""Ids, labels, token types, positions and batches, written out."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import train_vqa as vqa
from tests.conftest import AUDIO, IMAGE, PAD, TINY, VIDEO, refusal

START, END, VISION_START, VISION_END = 481, 482, 489, 490
USER = [START, 429, 198]  # <|im_start|> user \n
AUDIO_BOS, AUDIO_EOS = [311, 318, 479, 345], [311, 318, 396, 302, 467]  # pieces: these are no tokens of their own
INSTRUCTION = [477, 281, 259, 472, 452, 463, 448, 403, 267, 259, 460, 349, 455, 436, 465, 13]
ASSISTANT = [END, 198, START, 459, 426, 198]  # <|im_end|> \n <|im_start|> assis tant \n
ANSWER = [315, 11, 434, 291, 270, 267, 276, 356, 377, 13]  # Yes , NBI light is on in these frames .
FRAME = [VISION_START, *[IMAGE] * 4, VISION_END]  # 56 x 56 px: 4 x 4 patches, merged 2 x 2
PROMPT = [*USER, *AUDIO_BOS, *[AUDIO] * 1500, *AUDIO_EOS, *FRAME, *FRAME, *INSTRUCTION, *ASSISTANT]


@pytest.fixture(scope="module")
def config():
    """Of the tiny model as it is on disk: its speech encoder hears 30 s, 1500 tokens."""
    return vqa.load_config(TINY)


@pytest.fixture(scope="module")
def processor(tokenizer, config):
    return vqa.VQAProcessor(tokenizer, config, max_image_size=56)


@pytest.fixture(scope="module")
def sample(processor, rows):
    return vqa.SurgicalVQADataset(rows, processor, max_train_frames=2)[0]


def test_ids_and_labels_of_one_whole_sample(sample):
    # 3 + 4 + 1500 + 5 + 2 x 6 + 16 + 6 = 1546 of the prompt, 10 + 1 of the answer
    assert sample["input_ids"].tolist() == [*PROMPT, *ANSWER, END]
    assert sample["labels"].tolist() == [-100] * 1546 + [*ANSWER, END]


def test_token_types_and_shapes_of_one_whole_sample(sample):
    # image tokens stand at 1513 and at 1519, behind 3 + 4 + 1500 + 5 + 1 others
    assert sample["mm_token_type_ids"].tolist() == [0] * 1513 + [1] * 4 + [0] * 2 + [1] * 4 + [0] * 34
    assert sample["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 4]]
    assert (sample["pixel_values"].shape, sample["pixel_values"].dtype) == ((32, 3 * 14 * 14), torch.uint8)
    assert sample["input_features"].shape == (1, 128, 3000)


def test_positions_of_one_whole_sample(sample, base):
    """Text and speech count on by one in all three axes; a 2 x 2 frame takes one step in time and two in space."""
    positions, delta = base.model.get_rope_index(
        sample["input_ids"][None],
        mm_token_type_ids=sample["mm_token_type_ids"][None],
        image_grid_thw=sample["image_grid_thw"],
    )
    before, after = list(range(1513)), list(range(1519, 1519 + 34 - 1))
    time = [*before, *[1513] * 4, 1515, 1516, *[1517] * 4, *after]
    height = [*before, 1513, 1513, 1514, 1514, 1515, 1516, 1517, 1517, 1518, 1518, *after]
    width = [*before, 1513, 1514, 1513, 1514, 1515, 1516, 1517, 1518, 1517, 1518, *after]
    assert positions[:, 0].tolist() == [[*axis, 1552] for axis in (time, height, width)]
    assert delta.tolist() == [[1553 - 1557]]


def test_the_prompt_alone_is_the_sample_without_its_answer(processor, rows):
    sample = vqa.SurgicalVQADataset(rows, processor, max_train_frames=2, with_answer=False)[0]
    assert sample["input_ids"].tolist() == PROMPT
    assert set(sample["labels"].tolist()) == {-100}


@pytest.mark.parametrize(
    ("mode", "spoken", "written"), [("audio", True, False), ("audio_text", True, True), ("text", False, True)]
)
def test_input_modes(tokenizer, config, mode, spoken, written):
    processor = vqa.VQAProcessor(tokenizer, config, input_mode=mode)
    ids = processor.build("Is NBI on?", [4], 1500, None)["input_ids"].tolist()
    assert ids.count(AUDIO) == (1500 if spoken else 0)
    text = tokenizer.decode(ids)
    assert ("<|audio_bos|>" in text) == spoken
    assert ("<|vision_end|>Question: Is NBI on?\nAnswer the question" in text) == written


def test_special_tokens_in_a_question_or_answer_are_plain_text(tokenizer, config):
    processor = vqa.VQAProcessor(tokenizer, config, input_mode="audio_text")
    sample = processor.build("<|im_end|><|image_pad|>", [4], 1500, "<|im_end|>")
    ids = sample["input_ids"].tolist()
    assert ids.count(IMAGE) == 4
    assert ids.count(END) == 2  # of the user's turn and of the answer's
    assert sample["labels"].tolist().count(END) == 1


def test_unknown_input_mode_is_refused(tokenizer, config):
    message = refusal(vqa.VQAProcessor, tokenizer, config, input_mode="speech")
    assert "--input_mode" in message and "audio, audio_text, text" in message and "'speech'" in message


def test_pieces_of_prompts_are_the_same_from_many_threads_at_once(tokenizer, config, rows):
    """A fast tokenizer keeps a call's settings in itself: a second thread would split the first one's tokens."""
    questions = [f"{row.question} {n} <|im_end|>" for n in range(60) for row in rows]

    def ids(processor, question):
        return processor.build(question, [4], 3, question)["input_ids"].tolist()

    alone, shared = (vqa.VQAProcessor(tokenizer, config, 56, "audio_text") for _ in range(2))
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(lambda question: ids(shared, question), questions)] == [ids(alone, q) for q in questions]
    assert ids(shared, questions[0]) == ids(alone, questions[0])  # from memory


def test_token_count_from_headers_is_the_length_of_the_sample(tokenizer, config, rows):
    for size in (56, 112, 384):
        dataset = vqa.SurgicalVQADataset(rows, vqa.VQAProcessor(tokenizer, config, max_image_size=size))
        assert dataset.token_counts()[2] == len(dataset[2]["input_ids"])


def test_a_real_frame_takes_168_tokens(tokenizer, config):
    processor = vqa.VQAProcessor(tokenizer, config)
    width, height = vqa.fit_size((1240, 1080), 384)
    assert processor.image_processor.get_number_of_image_patches(height, width, {}) == 24 * 28  # 392 x 336 px


@pytest.mark.parametrize(
    "size", [(389, 39), (391, 28), (393, 22), (394, 20), (395, 18), (395, 54), (397, 168), (39, 389)]
)
def test_frames_are_scaled_to_the_size_of_a_thumbnail(size):
    """The first seven round otherwise with one scale for both sides."""
    for limit in (56, 384, 400):
        image = Image.new("L", size)
        image.thumbnail((limit, limit))
        assert vqa.fit_size(size, limit) == image.size


def test_speech_longer_than_the_encoder_window_is_refused(tokenizer, config, rows):
    processor = vqa.VQAProcessor(tokenizer, config)
    processor.max_samples = 16000
    frame, speech = vqa.load_frame(rows[0].frame_paths[0], 56), torch.zeros(24000).numpy()
    message = refusal(processor.make_sample, rows[0], [frame], speech, True)
    assert "smoke.jsonl:1" in message and "1.5 s" in message and "1.0" in message


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_sides(side):
    def sample(length):
        ids = torch.arange(1, length + 1)
        nowhere = torch.tensor([], dtype=torch.long)
        places = {"vision_at": nowhere, "speech_at": nowhere}
        return {"input_ids": ids, "labels": ids * 10, "mm_token_type_ids": torch.ones_like(ids), **places}

    batch = vqa.VQACollator(PAD, side)([sample(2), sample(3)])
    assert [len(batch.pop(name)) for name in ("vision_at", "speech_at")] == [0, 0]
    del batch["answer_at"]
    first = {
        "right": {"input_ids": [1, 2, PAD], "labels": [10, 20, -100], "mm_token_type_ids": [1, 1, 0]},
        "left": {
            "input_ids": [PAD, 1, 2],
            "labels": [-100, 10, 20],
            "mm_token_type_ids": [0, 1, 1],
            "attention_mask": [0, 1, 1],
        },
    }[side]
    assert {name: values[0].tolist() for name, values in batch.items()} == first
    assert batch["input_ids"][1].tolist() == [1, 2, 3]


@pytest.mark.parametrize("frame_mode", vqa.FRAME_MODES)
@pytest.mark.parametrize("mode", vqa.INPUT_MODES)
@pytest.mark.parametrize(("side", "multiple"), [("right", 1), ("right", 16), ("left", 1), ("left", 16)])
def test_places_point_at_frames_speech_and_answers(tokenizer, config, rows, side, multiple, mode, frame_mode):
    """In the flattened batch: of samples that differ in frames, in speech and in their answers' length."""
    processor = vqa.VQAProcessor(tokenizer, config, 56, mode, "speech", frame_mode)
    samples = [vqa.SurgicalVQADataset([rows[i]], processor, max_train_frames=n)[0] for i, n in ((0, 3), (3, 1), (4, 2))]
    assert len({len(sample["input_ids"]) for sample in samples}) == 3
    batch = vqa.VQACollator(PAD, side, multiple)(samples)
    ids, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
    image_or_video = VIDEO if frame_mode == "video" else IMAGE
    assert batch["vision_at"].tolist() == (ids == image_or_video).nonzero()[:, 0].tolist() != []
    assert batch["speech_at"].tolist() == (ids == AUDIO).nonzero()[:, 0].tolist()
    assert (len(batch["speech_at"]) > 0) == (mode != "text")
    assert (batch["answer_at"] + 1).tolist() == (labels != -100).nonzero()[:, 0].tolist() != []
    assert torch.equal(labels[batch["answer_at"] + 1], ids[batch["answer_at"] + 1])


# ------------------------------------------------------------------------------------------- fewer tokens per sample


@pytest.mark.parametrize(("samples", "tokens"), [(1, 1), (320, 1), (321, 2), (48000, 150), (480000, 1500)])
def test_speech_tokens_cover_20_ms_each(tokenizer, config, samples, tokens):
    processor = vqa.VQAProcessor(tokenizer, config, audio_tokens="speech")
    assert processor.speech_tokens(samples) == tokens
    assert vqa.VQAProcessor(tokenizer, config).speech_tokens(samples) == 1500


def test_only_the_outputs_that_cover_speech_stand_in_the_prompt(tokenizer, config, rows):
    processor = vqa.VQAProcessor(tokenizer, config, max_image_size=56, audio_tokens="speech")
    dataset = vqa.SurgicalVQADataset(rows, processor, max_train_frames=2)
    sample = dataset[0]
    tokens = -(-len(vqa.load_speech(rows[0].audio_path)) // 320)
    assert 50 < tokens < 250
    assert sample["input_ids"].tolist().count(AUDIO) == tokens == sample["audio_lengths"].item()
    assert dataset.token_counts() == [len(dataset[i]["input_ids"]) for i in range(5)]


def test_pairs_of_frames_become_temporal_patches(tokenizer, config):
    processor = vqa.VQAProcessor(tokenizer, config)
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    images = processor.image_processor(images=[Image.new("RGB", (56, 56), c) for c in colours], return_tensors="pt")
    frames = images["pixel_values"].view(3, 16, 3, 2, 196)
    pixels, grid = processor.patches_of([Image.new("RGB", (56, 56), c) for c in colours])
    video, grid = vqa.pair_frames(pixels, grid)
    assert (video.shape, video.dtype, grid.tolist()) == ((32, 3 * 2 * 196), torch.uint8, [[2, 4, 4]])
    video = vqa.scale_pixels(video, 3 * 2 * 196, torch.float32).view(2, 16, 3, 2, 196)
    for pair, first, second in ((0, 0, 1), (1, 2, 2)):  # the third has no neighbour
        assert torch.equal(video[pair, :, :, 0], frames[first, :, :, 0])
        assert torch.equal(video[pair, :, :, 1], frames[second, :, :, 1])


def test_ids_types_and_positions_of_a_video(tokenizer, base, config, rows):
    processor = vqa.VQAProcessor(tokenizer, config, max_image_size=56, frame_mode="video", audio_tokens="speech")
    dataset = vqa.SurgicalVQADataset(rows, processor, max_train_frames=3)
    sample = dataset[0]
    tokens = sample["audio_lengths"].item()
    start = 3 + 4 + tokens + 5 + 1
    assert sample["input_ids"][start - 1 : start + 9].tolist() == [VISION_START, *[VIDEO] * 8, VISION_END]
    assert sample["mm_token_type_ids"].tolist() == [0] * start + [2] * 8 + [0] * (len(sample["labels"]) - start - 8)
    assert "image_grid_thw" not in sample
    positions, _ = base.model.get_rope_index(
        sample["input_ids"][None],
        mm_token_type_ids=sample["mm_token_type_ids"][None],
        video_grid_thw=sample["video_grid_thw"],
    )
    steps = positions[:, 0, start : start + 9] - start
    assert steps.tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 1, 2],  # time: two pairs of frames; the text goes on after max(height, width) = 2
        [0, 0, 1, 1, 0, 0, 1, 1, 2],
        [0, 1, 0, 1, 0, 1, 0, 1, 2],
    ]
    assert dataset.token_counts()[0] == len(sample["input_ids"])


def test_frames_of_two_sizes_cannot_be_paired(tokenizer, config, rows):
    processor = vqa.VQAProcessor(tokenizer, config, frame_mode="video")
    frames = [Image.new("RGB", (56, 56)), Image.new("RGB", (112, 56))]
    message = refusal(processor.make_sample, rows[0], frames, vqa.load_speech(rows[0].audio_path), True)
    assert "smoke.jsonl:1" in message and "--frame_mode video" in message


@pytest.mark.parametrize("size", [(384, 334), (112, 96), (30, 400), (56, 57), (1, 1)])
@pytest.mark.parametrize("patch", [8, 14])
def test_patches_are_those_of_the_library_bit_for_bit(tokenizer, size, patch):
    config = vqa.load_config(TINY)
    config.vision_config.patch_size = patch
    processor = vqa.VQAProcessor(tokenizer, config)
    noise = np.random.default_rng(0).integers(0, 256, (3, size[1], size[0], 3), dtype=np.uint8)
    frames = [Image.fromarray(pixels) for pixels in noise]
    library = processor.image_processor(images=frames, return_tensors="pt")
    pixels, grid = processor.patches_of(frames)
    assert pixels.dtype == torch.uint8 and torch.equal(grid, library["image_grid_thw"])
    for dtype in (torch.float32, torch.bfloat16):
        scaled = vqa.scale_pixels(pixels, library["pixel_values"].shape[1], dtype)
        assert scaled.dtype == dtype and torch.equal(scaled, library["pixel_values"].to(dtype))


def test_the_model_sees_bytes_as_it_sees_what_the_library_makes_of_them(base, processor, sample, rows):
    row, dataset = rows[0], vqa.SurgicalVQADataset(rows, processor, max_train_frames=2)
    frames = [vqa.load_frame(path, 56) for path in dataset._select_frames(row.frame_paths)]
    library = processor.image_processor(images=frames, return_tensors="pt")
    with torch.no_grad():
        seen = base.encode_vision(sample["pixel_values"], sample["image_grid_thw"])
        assert torch.equal(seen, base.encode_vision(library["pixel_values"], library["image_grid_thw"]))
