"""Write the two model directories of the tests: config.json and tokenizer, no weights.

    python tests/make_tiny_models.py                       # writes tests/fixtures/{tiny_model,full_size_model}
    python tests/make_tiny_models.py --output_dir /tmp/m   # writes them elsewhere, to compare

tiny_model       hidden 64, 2 layers: learns the five fixture rows from random weights in seconds on a CPU.
full_size_model  the geometry of Qwen2-VL-7B with the Whisper large v3 turbo encoder, for `--dry_run` and key names.

Both share one byte-level BPE of a few hundred entries. Its special tokens carry small consecutive ids in tiny_model and
the real Qwen2 ids in full_size_model, whose vocabulary therefore has a hole: there `len(tokenizer)` is a count, not
1 + the largest id, and a token added to it gets 151660 but comes back from save and reload as 497, the count.
In both, PAD and EOS are `<|endoftext|>`: that is the state which `load_tokenizer` has to repair.
"""

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

FIXTURES = Path(__file__).resolve().parent / "fixtures"
INSTRUCTION = "Answer the question concisely based on the visual and audio evidence."
# Words around the instruction in the prompt, and answers that the five fixture rows do not hold.
WORDING = (
    "user\n",
    "assistant\n",
    "<|audio_bos|>",
    "<|audio_eos|>\n",
    "No, the scope is not moving in these frames.",
    "Yes, the visible tool is a catheter.",
    "The lesion appears in the lower-right quadrant of the screen.",
    "Fluid occlusion is absent and clean mucosa stays visible.",
)
N_BPE = 480  # 256 bytes + 224 merges; tiny_model's 17 special tokens then end at 496, which leaves 15 spare rows of 512

# In the order of their real ids, 151643 to 151659; the last three are those of the published stage-2 checkpoint.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|audio_pad|>",
    "<|audio_start|>",
    "<|audio_end|>",
)
REAL_FIRST_SPECIAL_ID = 151643

# How Qwen2 splits text before BPE (transformers, models/qwen2/tokenization_qwen2.py).
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def fixture_wording() -> list[str]:
    """The texts the BPE is trained on: instruction, prompt words, and every question and answer of smoke.jsonl."""
    rows = [json.loads(line) for line in (FIXTURES / "smoke.jsonl").read_text(encoding="utf-8").splitlines()]
    return [INSTRUCTION, *WORDING, *(row[key] for row in rows for key in ("question", "answer", "short_answer"))]


def train_bpe(texts: list[str]) -> Tokenizer:
    """Byte-level BPE as Qwen2 builds it (NFC, Qwen2's split, bytes), ids 0 to N_BPE - 1, no special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_BPE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != N_BPE:
        raise SystemExit(f"the BPE came out with {tokenizer.get_vocab_size()} entries, not {N_BPE}: add to WORDING")
    return tokenizer


def with_special_tokens(bpe: Tokenizer, first_id: int) -> Tokenizer:
    """A copy of `bpe` whose SPECIAL_TOKENS carry the ids `first_id`, `first_id` + 1, ...

    `add_special_tokens` alone would number them from the end of the vocabulary; a token that the BPE model already
    knows keeps the id it has there, and that id may lie beyond a hole.
    """
    spec = json.loads(bpe.to_str())
    spec["model"]["vocab"].update({token: first_id + i for i, token in enumerate(SPECIAL_TOKENS)})
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def tokenizer_config(first_id: int) -> dict:
    """tokenizer_config.json in the layout of the published checkpoint, PAD and EOS both `<|endoftext|>`."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(first_id + i): {"content": token, **flags} for i, token in enumerate(SPECIAL_TOKENS)
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def model_config(first_id: int, text: dict, vision: dict, audio: dict) -> dict:
    """config.json, flat as transformers 4.47 wrote it, with the Whisper encoder's geometry under `audio_config`.

    `text`, `vision` and `audio` hold what differs between the two sizes; `first_id` is the id of `<|endoftext|>`.
    """
    ids = {token: first_id + i for i, token in enumerate(SPECIAL_TOKENS)}
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        **text,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "vision_config": {
            "model_type": "qwen2_vl",
            "hidden_act": "quick_gelu",
            "hidden_size": text["hidden_size"],
            "in_channels": 3,
            "mlp_ratio": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
        "use_audio_encoder": True,
        "audio_token_id": ids["<|audio_pad|>"],
        "audio_hidden_size": audio["d_model"],
        "audio_config": {
            "model_type": "whisper",
            "activation_function": "gelu",
            "activation_dropout": 0.0,
            "attention_dropout": 0.0,
            "dropout": 0.0,
            "encoder_layerdrop": 0.0,
            "max_source_positions": 1500,
            "num_mel_bins": 128,
            "scale_embedding": False,
            **audio,
        },
    }


# Far above the usual 0.02. The frozen head caps the logits: hidden states have norm 8 (64 dimensions), so a head drawn
# at 0.4 (row norm 3.2) reaches 25, enough against 511 rivals for a loss below 1e-3; at 0.2 training ends near 0.02.
# Whisper drawn at 0.02 gives outputs for different questions that differ by 0.5 % of their norm, at 0.2 by 25 %.
TINY = model_config(
    N_BPE,
    text={
        "hidden_size": 64,
        "initializer_range": 0.4,
        "intermediate_size": 128,
        "max_window_layers": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},  # adds up to half of the head's 16
        "torch_dtype": "float32",
        "vocab_size": 512,
    },
    vision={"depth": 2, "embed_dim": 32, "initializer_range": 0.2, "num_heads": 2},
    audio={
        "d_model": 64,
        "encoder_attention_heads": 1,
        "encoder_ffn_dim": 128,
        "encoder_layers": 2,
        "init_std": 0.2,
    },
)

FULL_SIZE = model_config(
    REAL_FIRST_SPECIAL_ID,
    text={
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "torch_dtype": "bfloat16",
        "vocab_size": 152064,
    },
    vision={"depth": 32, "embed_dim": 1280, "initializer_range": 0.02, "num_heads": 16},
    audio={
        "d_model": 1280,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "encoder_layers": 32,
        "init_std": 0.02,
    },
)


def write_model_dir(folder: Path, config: dict, tokenizer: Tokenizer, first_id: int) -> None:
    """Write config.json, tokenizer.json and tokenizer_config.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config(first_id))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line entry: see the module docstring."""
    parser = argparse.ArgumentParser(description="write the tests' model directories: config and tokenizer")
    parser.add_argument("--output_dir", type=Path, default=FIXTURES, help="where the two folders go (tests/fixtures)")
    output_dir = parser.parse_args().output_dir
    bpe = train_bpe(fixture_wording())
    for name, config, first_id in (("tiny_model", TINY, N_BPE), ("full_size_model", FULL_SIZE, REAL_FIRST_SPECIAL_ID)):
        write_model_dir(output_dir / name, config, with_special_tokens(bpe, first_id), first_id)
        print(f"{output_dir / name}: <|endoftext|> is {first_id}, {config['vocab_size']} embedding rows")


if __name__ == "__main__":
    main()
