"""Are the two model directories of the tests what they claim: real ids, real geometry, and what the script writes?"""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Qwen2VLForConditionalGeneration, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tests import make_tiny_models
from tests.conftest import FIXTURES

pytestmark = pytest.mark.slow
PROMPT = (
    "<|im_start|>user\n<|audio_bos|><|audio_pad|><|audio_eos|>\n"
    "<|vision_start|><|image_pad|><|vision_end|>Ünï 12<|im_end|>"
)
IDS = {
    "tiny_model": {"<|endoftext|>": 480, "<|im_end|>": 482, "<|image_pad|>": 492, "<|audio_pad|>": 494},
    "full_size_model": {
        **{"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652},
        **{"<|vision_end|>": 151653, "<|image_pad|>": 151655, "<|video_pad|>": 151656, "<|audio_pad|>": 151657},
        **{"<|audio_start|>": 151658, "<|audio_end|>": 151659},
    },
}


@pytest.mark.parametrize(
    ("name", "new_id", "rows", "n_model", "n_audio"),
    [
        ("tiny_model", 497, 512, 227_712, 199_936),
        ("full_size_model", 151660, 152064, 8_291_375_616, 636_968_960),
    ],
)
def test_ids_survive_save_and_reload_and_the_geometry_is_as_it_says(name, new_id, rows, n_model, n_audio, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / name)
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in IDS[name]} == IDS[name]
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.decode(tokenizer(PROMPT)["input_ids"]) == PROMPT
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again(PROMPT)["input_ids"] == tokenizer(PROMPT)["input_ids"]
    config = AutoConfig.from_pretrained(FIXTURES / name)
    assert tokenizer.add_special_tokens({"pad_token": "<|pad|>"}) == 1
    assert tokenizer.pad_token_id == new_id < rows == config.text_config.vocab_size
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config)
        encoder = WhisperEncoder(WhisperConfig(**config.audio_config))
    assert [sum(p.numel() for p in part.parameters()) for part in (model, encoder)] == [n_model, n_audio]
    assert (config.audio_hidden_size, config.use_audio_encoder) == (encoder.config.d_model, True)


def test_the_directories_are_what_the_script_writes(tmp_path):
    command = [sys.executable, make_tiny_models.__file__, "--output_dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    for name in IDS:
        written = sorted(p.name for p in (tmp_path / name).iterdir())
        assert written == ["config.json", "tokenizer.json", "tokenizer_config.json"]
        for file in written:
            fresh, committed = (json.loads((root / name / file).read_text("utf-8")) for root in (tmp_path, FIXTURES))
            assert fresh == committed, f"{name}/{file}"
