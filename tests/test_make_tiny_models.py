"""Are the two model directories of the tests what they claim: real ids, real geometry, and what the script writes?"""

import json
import subprocess
import sys
from pathlib import Path

import make_tiny_models
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Qwen2VLForConditionalGeneration, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

FIXTURES = Path(__file__).resolve().parent / "fixtures"
PROMPT = (
    "<|im_start|>user\n<|audio_bos|><|audio_pad|><|audio_eos|>\n"
    "<|vision_start|><|image_pad|><|vision_end|>Ünï 12<|im_end|>"
)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("tiny_model", {"<|endoftext|>": 480, "<|im_end|>": 482, "<|image_pad|>": 492, "<|audio_pad|>": 494}),
        (
            "full_size_model",
            {
                "<|endoftext|>": 151643,
                "<|im_start|>": 151644,
                "<|im_end|>": 151645,
                "<|vision_start|>": 151652,
                "<|vision_end|>": 151653,
                "<|image_pad|>": 151655,
                "<|video_pad|>": 151656,
                "<|audio_pad|>": 151657,
                "<|audio_start|>": 151658,
                "<|audio_end|>": 151659,
            },
        ),
    ],
)
def test_special_ids_survive_save_and_reload(name, ids, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / name)
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.decode(tokenizer(PROMPT)["input_ids"]) == PROMPT
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again(PROMPT)["input_ids"] == tokenizer(PROMPT)["input_ids"]


@pytest.mark.parametrize(("name", "new_id", "rows"), [("tiny_model", 497, 512), ("full_size_model", 151660, 152064)])
def test_a_new_token_has_a_spare_row(name, new_id, rows):
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / name)
    assert tokenizer.add_special_tokens({"pad_token": "<|pad|>"}) == 1
    assert tokenizer.pad_token_id == new_id < rows == AutoConfig.from_pretrained(FIXTURES / name).text_config.vocab_size


@pytest.mark.parametrize(
    ("name", "n_model", "n_audio"),
    [("tiny_model", 227_712, 199_936), ("full_size_model", 8_291_375_616, 636_968_960)],
)
def test_geometry(name, n_model, n_audio):
    config = AutoConfig.from_pretrained(FIXTURES / name)
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config)
        encoder = WhisperEncoder(WhisperConfig(**config.audio_config))
    assert sum(p.numel() for p in model.parameters()) == n_model
    assert sum(p.numel() for p in encoder.parameters()) == n_audio
    assert (config.audio_hidden_size, config.use_audio_encoder) == (encoder.config.d_model, True)


def test_the_directories_are_what_the_script_writes(tmp_path):
    command = [sys.executable, make_tiny_models.__file__, "--output_dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("tiny_model", "full_size_model"):
        written = sorted(p.name for p in (tmp_path / name).iterdir())
        assert written == ["config.json", "tokenizer.json", "tokenizer_config.json"]
        for file in written:
            fresh, committed = (json.loads((root / name / file).read_text("utf-8")) for root in (tmp_path, FIXTURES))
            assert fresh == committed, f"{name}/{file}"
