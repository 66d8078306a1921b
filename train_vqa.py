"""Teach a vision-language model to hear a surgeon's spoken question, watch endoscopic frames, and answer.

    python train_vqa.py \\
        --train_data_path test_set/in_002-001.jsonl --frames_dir dataset/frames --audio_dir audio/in_002-001 \\
        --output_dir ./checkpoints/surgical_vqa_50samples \\
        --per_device_train_batch_size 1 --gradient_accumulation_steps 4 --learning_rate 2e-4 \\
        --num_train_epochs 20 --save_strategy epoch --bf16 True --logging_steps 5

    python train_vqa.py --dry_run ...     # reads the data, counts parameters, tokens and steps; allocates no weights

Qwen2-VL answers, the encoder of Whisper listens, one linear layer joins them:

    speech -> log-mel [mel, 3000] -> Whisper encoder (frozen) -> [1500, d] -> audio_projector (trained) -> audio tokens
    frames -> Qwen2-VL vision tower (frozen)                                                            -> image tokens
    both + prompt -> Qwen2 decoder (LoRA) -> answer

`--train_decoder full`, `--train_vision_tower` and `--train_audio_encoder` train more than that.

This file holds the whole of it in reading order: arguments, data, prompt and labels, dataset, model, loaders,
callbacks, main(). `evaluate_checkpoint.py` imports from here, so that training and evaluation cannot drift apart.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import typing
import warnings
import zlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache, partial
from itertools import islice
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:

    def end_at_once(*_) -> None:
        """Ctrl-C while torch is imported, which takes seconds, and until `StopSignal` takes it."""
        os.write(2, b"\nStopped by SIGINT\n")
        os._exit(128 + signal.SIGINT)

    signal.signal(signal.SIGINT, end_at_once)

import accelerate
import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import torchaudio.functional
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL import __version__ as PIL_VERSION
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    WhisperConfig,
    WhisperFeatureExtractor,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention, apply_rotary_pos_emb_vision
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import is_flash_attn_2_available
from transformers.utils.versions import require_version
from transformers.vision_utils import get_vision_position_ids

# ----------------------------------------------------------------------------------------------------------------------
# Constants
# ----------------------------------------------------------------------------------------------------------------------

DEFAULT_MODEL = "kulsoom-abdullah/Qwen2-Audio-7B-Transcription"  # the published stage-2 checkpoint

SAMPLE_RATE = 16_000  # Hz, what Whisper was trained on
HOP_LENGTH = 160  # samples between two mel frames: 10 ms
MEL_FRAMES_PER_TOKEN = 2  # the encoder's second convolution has stride 2
SAMPLES_PER_TOKEN = HOP_LENGTH * MEL_FRAMES_PER_TOKEN  # one encoder output covers 20 ms
MAX_SPEECH_SECONDS = 30  # Whisper's window: 30 s x 16,000 / 320 = 1500 encoder outputs

MIN_SPEECH_SECONDS = 0.1  # no question is shorter
SILENCE = 1e-4  # -80 dB: the loudest sample of a recording that holds nothing
SPEECH_RATES = (8_000, 192_000)  # Hz
# Taps of the resampler, rate x 16,000 / gcd^2: 44,100 Hz take 70,560, a rate such as 44,101 2.8 GB.
MAX_RATE_RATIO = 4e6

FRAME_EXTENSIONS = (".jpg", ".jpeg", ".png")
FRAME_FORMATS = ("JPEG", "PNG")  # whatever the extension says; Pillow's other readers are not needed
AUDIO_EXTENSIONS = (".mp3", ".wav", ".flac", ".ogg")
MAX_FRAME_PIXELS = 50_000_000  # 150 MB decoded; an endoscope has 2 million, a decompression bomb billions
MAX_ASPECT = 100  # Qwen2-VL refuses sides of more than 200 : 1, and scaling down rounds the short one
# What Pillow raises on damaged files, found by fuzzing.
DECODE_ERRORS = (
    *(UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError, struct.error),
    *(zlib.error, IndexError, KeyError, TypeError, OverflowError, MemoryError, AttributeError, ZeroDivisionError),
)
# Layer III bit rates in kbit/s: of MPEG 2 and 2.5, of MPEG 1.
MP3_KBPS = (
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
)
MEDIA_CHECKS = 1  # raise it when decode_frame or decode_audio refuse more: what passed before is decoded again
DIGEST_BYTES = 8  # of a media file that passed: two of a million share one with a chance of 1 to 37 million
MAX_REMEMBERED = 1_000_000  # digests: 8 MB
# A dataset keeps in each loader worker the mel of the speech heard last: 850 questions of 3 s in 128 bins, a GiB in 8.
SPEECH_MEMO_BYTES = 128 * 2**20
MAX_KNOWN_TEXTS = 10_000  # tokenised pieces of prompts and answers, a few MB
FEATURE_SCHEMA = 1  # raise it when what the towers are fed, or what is stored of them, changes
STALE_SECONDS = 3600  # a file of features takes a second to write; what is older was left by a run that was killed

INPUT_MODES = ("audio", "audio_text", "text")
AUDIO_TOKENS = ("full", "speech")
FRAME_MODES = ("images", "video")
INSTRUCTION = "Answer the question concisely based on the visual and audio evidence."
# The published stage-2 checkpoint was trained with these two as plain text, which the tokenizer splits into pieces.
AUDIO_BOS, AUDIO_EOS = "<|audio_bos|>", "<|audio_eos|>"
AUDIO_PAD, NEW_PAD = "<|audio_pad|>", "<|pad|>"
TURN_ENDS = ("<|im_end|>", "<|endoftext|>")
IGNORE_INDEX = -100  # torch's cross entropy leaves these labels out

# Only the linear layers of the decoder: the same suffixes also occur in the Whisper encoder.
LORA_TARGETS = r"model\.language_model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
LORA_MODULES_PER_LAYER = 7
# The encoder of openai/whisper-large-v3-turbo, which checkpoints in the 4.47 layout carry without saying so.
WHISPER_LARGE_V3_TURBO = {
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
}

# At half of what it would keep by itself, torch.compile keeps the results of products (queries, keys, values, gate, up)
# and computes the rest again: norms, activations, the dropped-out copies of LoRA's inputs and their masks.
ACTIVATION_MEMORY_BUDGET = 0.5
# Compiled layers get batches padded to a multiple of so many tokens. On an H200 sdpa takes cuDNN's attention, which
# plans anew for each length: once 0.15 s, where a step takes 0.76. Of the 14 lengths that 50 questions have, 16 leaves
# 2 (with few tokens 5) for 0.2 % more tokens (0.8 %); 64 would leave 1 (2) for 1.1 % (2.9 %) as long as training lasts.
PADDING_MULTIPLE = 16
LIGER = "liger-kernel>=0.8"  # whose SwiGLU takes a factor for the gate and one for the product
GIB = 2**30
FITTING_SHARE = 0.93  # of the memory that an estimate may take: it may err, and the allocator leaves gaps
CUDA_CONTEXT_GIB = 1.0  # what the driver and cuBLAS hold beside the allocator

MAX_WORKERS = 8  # decoding 8 frames of 1240x1080 and the speech takes one core 0.3 s, a GPU step less than twice that
# What the grafted encoder computes with; the rest of a Whisper config speaks of its decoder.
AUDIO_CONFIG_FIELDS = (*WHISPER_LARGE_V3_TURBO, "activation_function", "scale_embedding", "init_std")
WHISPER_HEAD_SIZE = 64  # channels of one attention head, in every Whisper from tiny to large

ATTENTION_KERNELS = {"sdpa": "SDPA", "eager": "eager", "flash_attention_2": "FlashAttention-2"}  # and how they are said
DECODER_TRAINING = ("lora", "full")
# How PEFT's modules_to_save call the projector, which is always trained, and the towers, which are on request.
PROJECTOR, TOWERS = "audio_projector", {"vision_tower": "visual", "audio_encoder": "audio_encoder"}
# bitsandbytes keeps the statistics of a 4-bit weight as tensors of their own, beside the packed one.
FOUR_BIT_KEY = re.compile(
    r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(?:nf4|fp4))"
)
# Pickles that training leaves beside the weights; nobody reads them here.
NO_WEIGHTS = r"(?:optimizer|scheduler|scaler|training_args|rng_state.*)\.(?:bin|pth?)"

SHARD_BYTES = 5 * 10**9  # what transformers wrote for years, and the hub is at ease with
# Files of the base that other programs ask for and this project does not; none of them holds weights or code.
COPIED_FILES = (
    *("preprocessor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json", "chat_template.jinja"),
)
SETTINGS_FILE = "vqa_settings.json"
# Fields of an adapter_config.json that `load_adapter` reads, or that show in the names of the adapter's tensors.
ADAPTER_FIELDS_READ = (
    *("r", "lora_alpha", "lora_dropout", "init_lora_weights", "target_modules", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "peft_type", "peft_version", "task_type", "inference_mode"),
    *("auto_mapping", "base_model_name_or_path", "revision"),
)
NEW_ROWS_FILE = "new_token_rows.safetensors"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# The files of a checkpoint from which a run goes on, beside the adapter or the whole model: sizes and hashes of all
# others, and what the loss log has so far.
MANIFEST_FILE, PROGRESS_FILE = "manifest.json", "vqa_progress.json"
RESUME_FILES = (
    *(SETTINGS_FILE, PROGRESS_FILE),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
)
UNFINISHED = "tmp-"  # a save is written under this prefix, and named only once it is whole
# What safetensors and torch.load(weights_only=True) raise on a damaged file, or on a pickle that would call something.
UNREADABLE = (
    SafetensorError,
    *(pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, EOFError, OSError, AttributeError),
    *(ArithmeticError, AssertionError, ImportError, MemoryError, NameError, struct.error),
)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MAX_PROBLEMS_SHOWN = 20

# PEFT asks for the model's state of checkpointing under the name that transformers 5 gave up.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


class VQAError(ValueError):
    """Something the user can mend: its text names the file, line, id or flag, and says what to do."""


def raise_problems(problems: Sequence, meaning: str = "") -> None:
    """Raise one VQAError for all `problems` (a line each up to MAX_PROBLEMS_SHOWN, the total, and what they mean)."""
    if problems:
        shown = [str(problem) for problem in problems[:MAX_PROBLEMS_SHOWN]]
        if len(problems) > 1:
            cut = f", the first {MAX_PROBLEMS_SHOWN} shown" if len(problems) > MAX_PROBLEMS_SHOWN else ""
            shown.append(f"{len(problems)} problems in all{cut}")
        raise VQAError("\n".join([*shown, meaning] if meaning else shown))


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class ModelArguments:
    """What is trained, and from where it starts."""

    model_name_or_path: str = field(
        default=DEFAULT_MODEL, metadata={"help": "Folder or hub id of the base model (config, tokenizer, safetensors)."}
    )
    init: str = field(
        default="pretrained",
        metadata={
            "help": "pretrained: load the weights. random: build the model from the folder's config with weights drawn "
            "from --seed; the settings record it, so that evaluation rebuilds the same base.",
            "choices": ["pretrained", "random"],
        },
    )
    audio_encoder: str | None = field(
        default=None,
        metadata={"help": "Folder or hub id of a Whisper whose encoder is grafted onto a plain Qwen2-VL. None: the "
                  "model brings its own."},
    )  # fmt: skip
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Keep decoder weights that are stored in bitsandbytes' 4 bits as they are (QLoRA). False: "
                  "dequantise them."},
    )  # fmt: skip
    allow_pickle: bool = field(
        default=False,
        metadata={"help": "Read .bin and .pt weights where there are no safetensors (weights_only=True)."},
    )
    attn_implementation: str = field(
        default="sdpa",
        metadata={
            "help": "Attention kernel. flash_attention_2 needs the flash-attn package, a CUDA GPU and --bf16 True.",
            "choices": list(ATTENTION_KERNELS),
        },
    )
    train_decoder: str = field(
        default="lora",
        metadata={
            "help": "lora: adapters on the decoder's linear layers. full: all weights of the decoder, its embeddings "
            "and its head, in float32 (16 bytes a parameter with Adam); what is saved is then a whole model.",
            "choices": list(DECODER_TRAINING),
        },
    )
    train_vision_tower: bool = field(
        default=False, metadata={"help": "Train Qwen2-VL's vision tower too, whole and in float32. False: frozen."}
    )
    train_audio_encoder: bool = field(
        default=False,
        metadata={"help": "Train the speech encoder too, whole and in float32, but for its fixed sinusoids. False: "
                  "frozen."},
    )  # fmt: skip
    lora_r: int = field(default=64, metadata={"help": "LoRA rank on the decoder's linear layers."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA scale: the update is multiplied by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the LoRA input during training."})
    checkpoint_every_n: str = field(
        default="1",
        metadata={
            "help": "Activation checkpointing of the decoder and of trained towers: 1 recomputes every layer (least "
            "memory), N every N-th layer, 0 none (fastest), auto the fewest that the estimate of --dry_run fits into "
            "--gpu_memory_limit_gib or the card. The result is the same."
        },
    )
    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "Compile the decoder's layers with torch.compile: faster, and 0.4 times the activations; the first "
            "step takes up to a minute or two, and needs a C compiler. Batches are padded to a multiple of "
            f"{PADDING_MULTIPLE} tokens, which the loss does not see. Results differ by rounding, and dropout is drawn "
            "from other random numbers. False: layers run as they are."
        },
    )
    use_liger_kernel: bool = field(
        default=False,
        metadata={
            "help": "Compute the decoder's RMSNorm and SwiGLU by Liger's kernels: faster, and less memory, for layers "
            "that are not compiled. Needs the package liger-kernel, a CUDA GPU and a decoder with hidden_act silu. "
            "Results differ by rounding. Liger's fused cross entropy, which would bypass the speech, is not used. "
            "False: layers run as they are."
        },
    )
    gpu_memory_limit_gib: float | None = field(
        default=None,
        metadata={"help": "Hard cap in GiB on this process's GPU memory, to rehearse a smaller card. None: no cap."},
    )


@dataclass
class DataArguments:
    """Where the questions, the frames and the speech are, and how much of them the model gets."""

    train_data_path: str | None = field(default=None, metadata={"help": "JSONL of training questions. Required."})
    frames_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with {video_id}/{frame}.jpg or {video_id}/{frame_number}.jpg. Required."},
    )
    audio_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with the spoken questions of --train_data_path. Required unless --input_mode text."},
    )
    eval_data_path: str | None = field(
        default=None,
        metadata={"help": "JSONL of questions for the loss during training (--eval_strategy; without one, once at the "
                  "end). None: no evaluation."},
    )  # fmt: skip
    eval_audio_dir: str | None = field(
        default=None, metadata={"help": "Folder with the speech of --eval_data_path. None: --audio_dir."}
    )
    input_mode: str = field(
        default="audio",
        metadata={
            "help": "How the question reaches the model. audio: by ear only. text: in the prompt only. audio_text: "
            "both (then the model need not listen; for comparison).",
            "choices": list(INPUT_MODES),
        },
    )
    max_train_frames: int | None = field(
        default=None, metadata={"help": "Frames per clip in training, evenly sampled. None: all."}
    )
    max_eval_frames: int | None = field(
        default=6, metadata={"help": "Frames per clip in evaluation, evenly sampled. 0: all."}
    )
    max_image_size: int = field(
        default=384,
        metadata={"help": "Longer side of a frame in pixels, before Qwen2-VL rounds it to multiples of 28."},
    )
    audio_tokens: str = field(
        default="full",
        metadata={
            "help": "full: all 1500 outputs of the encoder. speech: only those that cover sound, one per 20 ms "
            "(shorter samples; changes the result).",
            "choices": list(AUDIO_TOKENS),
        },
    )
    frame_mode: str = field(
        default="images",
        metadata={
            "help": "images: each frame on its own. video: pairs of frames as Qwen2-VL's temporal patches (half the "
            "tokens; changes the result).",
            "choices": list(FRAME_MODES),
        },
    )
    cache_features: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which the outputs of the two frozen encoders are kept, so that later epochs, runs and "
            "evaluations neither decode nor encode again. A clip of 8 frames at 384 px takes up to 11.2 MB and a "
            "speech 3.8 MB in bf16, each kept once. In float32 the result of batches of 1 is the same, bit for bit; "
            "else it is that of frozen encoders outside autocast and one clip at a time: equal but for rounding. "
            "None: encode at every step."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first N training rows. None: all."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first N eval rows. None: all."})
    allow_symlinks: bool = field(
        default=False,
        metadata={"help": "Let links in --frames_dir and --audio_dir lead out of them, as to a data disk."},
    )
    skip_bad_samples: bool = field(
        default=False,
        metadata={"help": "Leave out rows that are malformed, or whose media are missing or do not decode; how many "
                  "and which is printed and kept in the settings. False: such rows are an error."},
    )  # fmt: skip
    check_data: bool = field(
        default=False,
        metadata={"help": "Read and decode the data, report what is wrong, and exit; needs no --output_dir or model."},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Read the data, count parameters, tokens and steps without allocating weights, and exit."},
    )
    target_train_loss: float | None = field(
        default=None,
        metadata={"help": "Stop once the logged training loss is below this; exit status 1 if the run ends above it. "
                  "None: train to the end."},
    )  # fmt: skip


@dataclass
class VQATrainingArguments(TrainingArguments):
    """transformers' TrainingArguments; what this script decides itself is no flag, so that none is silently unused."""

    # True would print the last finite loss in place of NaN; a loss that is not finite ends the run.
    logging_nan_inf_filter: bool = field(default=False, init=False)
    do_train: bool = field(default=True, init=False)
    do_eval: bool = field(default=False, init=False)
    do_predict: bool = field(default=False, init=False)
    remove_unused_columns: bool = field(default=False, init=False)
    # Gathering the logits of an evaluation, [B, T, 152064] a step, does not fit beside the model.
    prediction_loss_only: bool = field(default=True, init=False)
    label_smoothing_factor: float = field(default=0.0, init=False)
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], init=False)
    # --checkpoint_every_n says which layers are checkpointed, under either of transformers' names for it.
    gradient_checkpointing: bool | None = field(default=None, init=False)
    gradient_checkpointing_kwargs: dict | None = field(default=None, init=False)
    activation_checkpointing: bool | None = field(default=None, init=False)
    activation_checkpointing_kwargs: dict | None = field(default=None, init=False)
    # ModelArguments has --use_liger_kernel: the Trainer would also replace the model's forward, and with it the speech.
    use_liger_kernel: bool = field(default=False, init=False)
    liger_kernel_config: dict[str, bool] | None = field(default=None, init=False)


def parse_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, VQATrainingArguments]:
    """Parse `argv`; an unknown or abbreviated flag ends the process with status 2, as argparse does.

    Without an accelerator `use_cpu` is set, since TrainingArguments refuses `--bf16 True` there otherwise; with one,
    data loading gets workers, unless `--dataloader_num_workers` says how many.

    Raises:
        VQAError: a required flag is missing, or two contradict each other.
    """
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, VQATrainingArguments),
        allow_abbrev=False,
        description=__doc__.split("\n\n")[0],
        usage="%(prog)s [--FLAG VALUE ...]  (--help lists all flags)",
    )
    given = {"--" + a[2:].split("=")[0].replace("-", "_") for a in argv if a.startswith("--")}  # either spelling
    if "--liger_kernel_config" in given:
        raise VQAError(
            "--liger_kernel_config: leave it out; --use_liger_kernel takes Liger's RMSNorm and SwiGLU alone, because "
            "the fused cross entropy bypasses the speech"
        )
    parser.parse_args(argv)  # unknown flags: usage and status 2; transformers would raise
    if not torch.accelerator.is_available() and "--use_cpu" not in given:
        print("No accelerator found: training on the CPU (use_cpu).")
        argv = [*argv, "--use_cpu", "True"]
    elif "--dataloader_num_workers" not in given:
        argv = [*argv, "--dataloader_num_workers", str(min(MAX_WORKERS, os.cpu_count()))]
    try:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except (ValueError, ImportError) as error:  # TrainingArguments' own cross-checks, and packages that a flag needs
        raise VQAError(" ".join(str(error).split())) from error
    missing = ["--train_data_path"] * (not data_args.train_data_path) + ["--frames_dir"] * (not data_args.frames_dir)
    if data_args.input_mode != "text" and not data_args.audio_dir:
        missing.append("--audio_dir (or --input_mode text)")
    if "--output_dir" not in given and not (data_args.dry_run or data_args.check_data):
        missing.append("--output_dir")
    if missing:
        raise VQAError("missing flag: " + ", ".join(missing))
    if training_args.eval_strategy != "no" and not data_args.eval_data_path:
        raise VQAError("--eval_strategy needs --eval_data_path: name the questions to evaluate on")
    if not re.fullmatch(r"\d+|auto", model_args.checkpoint_every_n):
        raise VQAError("--checkpoint_every_n must be 0 (none), 1 (every layer), N (every N-th layer) or auto")
    refuse_numbers(model_args, data_args, training_args)
    if model_args.checkpoint_every_n == "auto":
        memory_to_fit(model_args)
    refuse_contradictions(model_args, data_args, training_args, given)
    if model_args.compile_layers and not data_args.dry_run:
        check_compiler(training_args.device.type)
    if model_args.use_liger_kernel and not data_args.dry_run:
        check_liger(training_args.device.type)
    if not (data_args.dry_run or data_args.check_data):
        refuse_surroundings(training_args)
    data_args.max_eval_frames = data_args.max_eval_frames or None
    return model_args, data_args, training_args


def refuse_numbers(model_args: ModelArguments, data_args: DataArguments, training_args: VQATrainingArguments) -> None:
    """VQAError where a number is one that nothing can be trained with."""
    numbers = {**vars(model_args), **vars(data_args), **vars(training_args)}
    limit = model_args.gpu_memory_limit_gib
    if limit is not None and limit <= 0:
        raise VQAError(f"--gpu_memory_limit_gib {limit}: name a size above 0, or leave it out")
    for flag in ("max_train_frames", "max_train_samples", "max_eval_samples"):
        if numbers[flag] is not None and numbers[flag] < 1:
            raise VQAError(f"--{flag} must be at least 1; leave it out for all")
    batches = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    for flag in ("max_image_size", "lora_r", "lora_alpha", *batches):
        if numbers[flag] < 1:
            raise VQAError(f"--{flag} {numbers[flag]}: must be at least 1")
    for flag in ("learning_rate", *(["num_train_epochs"] if training_args.max_steps <= 0 else [])):
        if not numbers[flag] > 0:  # nor NaN
            raise VQAError(f"--{flag} {numbers[flag]}: must be above 0")
    if not 0 <= model_args.lora_dropout < 1:
        raise VQAError(f"--lora_dropout {model_args.lora_dropout}: must be 0 or more, and below 1")
    if data_args.max_eval_frames < 0:
        raise VQAError("--max_eval_frames must be 0 (all frames) or more")


def refuse_surroundings(training_args: VQATrainingArguments) -> None:
    """VQAError where the Trainer would not start here, or not as one process on one GPU."""
    if (count := max(training_args.n_gpu, training_args.world_size)) > 1:
        raise VQAError(
            f"{count} GPUs are to be used, and this script trains on one: start it by itself (not by torchrun or "
            "accelerate), with CUDA_VISIBLE_DEVICES=0"
        )
    if absent := sorted(set(training_args.report_to) - set(get_available_reporting_integrations())):
        raise VQAError(
            f"--report_to {' '.join(absent)}: no such package is installed; install it, or leave the flag out"
        )
    if training_args.save_strategy == "best" and training_args.metric_for_best_model is None:
        raise VQAError("--save_strategy best: say by what, such as --metric_for_best_model eval_loss")


def refuse_contradictions(
    model_args: ModelArguments, data_args: DataArguments, training_args: VQATrainingArguments, given: set[str]
) -> None:
    """VQAError where flags contradict others on what is trained, or how; `given` are those on the command line."""
    if model_args.use_liger_kernel and model_args.compile_layers:
        raise VQAError("--use_liger_kernel: --compile_layers True fuses the same operations; leave one of them out")
    if model_args.train_audio_encoder and data_args.input_mode == "text":
        raise VQAError("--train_audio_encoder: with --input_mode text no speech is heard; leave one of them out")
    for flag in ("train_vision_tower", "train_audio_encoder"):
        if data_args.cache_features and getattr(model_args, flag):
            raise VQAError(f"--cache_features keeps what frozen encoders put out, and --{flag} trains one; drop either")
    if model_args.train_decoder != "full":
        return
    idle = sorted(given & {"--lora_r", "--lora_alpha", "--lora_dropout"})
    if idle:
        raise VQAError(f"{', '.join(idle)}: --train_decoder full has no adapters; leave it out")
    if model_args.load_in_4bit:
        raise VQAError("--load_in_4bit: 4-bit weights cannot be trained; leave it out, or --train_decoder full")
    if Path(model_args.model_name_or_path).resolve() == Path(training_args.output_dir).resolve():
        raise VQAError(
            f"--output_dir {training_args.output_dir}: holds the base model, which the trained one would overwrite; "
            "name another folder"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Reading the data: rows, frames, speech
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class VQARow:
    """One line of a question file in the REAL-Colon-VQA schema, and where its media were found."""

    source: str  # the file
    line: int  # counted from 1
    id: str
    video_id: str
    frames: tuple[str, ...]  # frame names, such as "002-001_18743"
    question: str
    question_type: str
    answer: str  # the full sentence, which is learned
    short_answer: str  # the closed answer, which is looked for in a prediction
    audio_path: Path | None = None
    frames_dir: str = ""
    found: bytes = b""  # which of `frame_candidates` each frame is: eight paths a row would take 1.2 kB

    @property
    def key(self) -> str:
        """`{video_id}/{id}/{question_type}`: `id` alone is not unique in the real data."""
        return f"{self.video_id}/{self.id}/{self.question_type}"

    @property
    def where(self) -> str:
        """`file:line`."""
        return f"{self.source}:{self.line}"

    def frame_candidates(self, frame: str) -> Iterator[str]:
        """The paths under which a frame is looked for, in order."""
        video, _, number = frame.rpartition("_")
        folder = os.path.join(self.frames_dir, video or self.video_id)
        return (os.path.join(folder, stem + extension) for stem in (frame, number) for extension in FRAME_EXTENSIONS)

    @property
    def frame_paths(self) -> tuple[Path, ...]:
        """The files of the frames, in order; empty before `find_media`."""
        which = zip(self.frames, self.found, strict=False)
        return tuple(Path(next(islice(self.frame_candidates(frame), i, None))) for frame, i in which)

    @property
    def media(self) -> tuple[Path, ...]:
        """The files of the frames, then the speech if there is any."""
        return (*self.frame_paths, *([self.audio_path] if self.audio_path else []))


@dataclass(slots=True)
class Problem:
    """What is wrong with a line, or with a media file that several lines need; its text is `file:line: ...`."""

    source: str
    lines: tuple[int, ...]  # all that cannot be used because of it; the first is named
    text: str

    def __str__(self) -> str:
        return f"{self.source}:{self.lines[0]}: {self.text}"


def read_rows(path: str | Path, max_samples: int | None = None) -> list[VQARow]:
    """Read a question file, one JSON object a line; blank lines are passed over.

    Args:
        path: JSONL in the REAL-Colon-VQA schema.
        max_samples: stop after this many rows. None: all.

    Raises:
        VQAError: the file is missing or empty, or lines are malformed (all of them named as `file:line: ...`).
    """
    rows, problems = scan_rows(path, max_samples)
    raise_problems(problems)
    return rows


def scan_rows(path: str | Path, max_samples: int | None = None) -> tuple[list[VQARow], list[Problem]]:
    """As `read_rows`, but returns the malformed lines beside the good ones."""
    path = Path(path)
    if not path.is_file():
        raise VQAError(f"{path}: no such file")
    rows, problems, seen = [], [], {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if max_samples is not None and len(rows) + len(problems) >= max_samples:
                break
            line = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip()  # the mark that Windows sets
            if not line:
                continue
            try:
                row = parse_row(line, str(path), number)
                digest = hash(row.key)
                if digest in seen:
                    raise VQAError(f"the same video, id and question type as line {seen[digest]}; remove one")
            except VQAError as error:
                problems.append(Problem(str(path), (number,), str(error)))
                continue
            seen[digest] = number
            rows.append(row)
    if not rows and not problems:
        raise VQAError(f"{path}: holds no rows")
    return rows, problems


def parse_row(line: bytes, source: str, number: int) -> VQARow:
    """One JSONL line as a VQARow; VQAError says what is wrong with it."""
    try:
        data = json.loads(line.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise VQAError(f"not UTF-8 text (byte {error.start + 1} of the line); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise VQAError(f"not valid JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise VQAError("not a row (lists or objects nested too deeply)") from error
    except VQAError:
        raise
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise VQAError(f"not a row ({error})") from error
    if not isinstance(data, dict):
        raise VQAError("not a JSON object")
    text_fields = ("id", "video_id", "question", "question_type", "answer", "short_answer")
    for name in text_fields:
        if name not in data:
            raise VQAError(f"field {name!r} is missing")
        if not isinstance(data[name], str) or not data[name].strip():
            raise VQAError(f"field {name!r} must be text, not {data[name]!r:.80}")
        if re.search(r"[\ud800-\udfff]", data[name]):
            raise VQAError(f"field {name!r} holds half a character (a lone surrogate): {data[name]!r:.80}")
    frames = data.get("frames")
    if not isinstance(frames, list) or not frames or not all(isinstance(f, str) and f for f in frames):
        raise VQAError("field 'frames' must be a list of at least one frame name")
    for name in ("id", "video_id", "question_type"):
        _refuse_path(name, data[name])
    for frame in frames:
        _refuse_path("frames", frame)
        _refuse_path("frames", frame.rpartition("_")[0] or "_", frame)  # the folder that the name stands for
    for name in ("video_id", "question_type", "short_answer"):
        data[name] = sys.intern(data[name])  # few different ones over thousands of rows
    return VQARow(source, number, frames=tuple(frames), **{name: data[name] for name in text_fields})


def _refuse_constant(name: str) -> None:
    raise VQAError(f"{name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [key for key, _ in pairs]
        raise VQAError(f"field {next(k for k in keys if keys.count(k) > 1)!r} occurs twice")
    return data


def _refuse_path(name: str, part: str, value: str | None = None) -> None:
    """These become file names, and must stay inside the folder that the flag names."""
    if re.search(r"[/\\\0\ud800-\udfff]", part) or part in (".", "..") or len(part.encode(errors="replace")) > 120:
        raise VQAError(f"field {name!r} must be a plain name, not {value or part!r:.150}")


def find_media(
    rows: Iterable[VQARow], frames_dir: str | Path, audio_dir: str | Path | None, allow_symlinks: bool = False
) -> list[Problem]:
    """Fill in where the frames and, with an `audio_dir`, the speech of each row are.

    Frames are looked for as `{frames_dir}/{video}/{frame}` and `{frames_dir}/{video}/{frame_number}`, where `video` is
    the part of the frame name before its last `_`; speech as `{video_id}_{id}_{question_type}`, `{video_id}_{id}`,
    `{id}`. Without `allow_symlinks` a file that a link puts outside its folder is refused; the folders that the flags
    name may be links themselves.

    Returns:
        What was not found, or lies outside.

    Raises:
        VQAError: one of the two is no folder.
    """
    for flags, folder in (("--frames_dir", frames_dir), ("--audio_dir or --eval_audio_dir", audio_dir)):
        if folder is not None and not Path(folder).is_dir():
            raise VQAError(f"{folder}: no such folder; {flags} names it")
    problems, inside = [], _Inside(allow_symlinks)
    root = str(frames_dir)
    for row in rows:
        row.frames_dir, found = root, []
        for frame in row.frames:
            candidates = enumerate(row.frame_candidates(frame))
            index, path = next(((i, path) for i, path in candidates if os.path.isfile(path)), (None, None))
            if index is None:
                stem = next(row.frame_candidates(frame)).removesuffix(FRAME_EXTENSIONS[0])
                text = f"frame {stem}{{{','.join(FRAME_EXTENSIONS)}}} is missing"
            elif not inside(path, root):
                text = f"{row.id}: frame {path} is a link out of {root}; see --allow_symlinks"
            else:
                found.append(index)
                continue
            problems.append(Problem(row.source, (row.line,), text))
            break
        row.found = bytes(found)
        if audio_dir is None:
            continue
        stems = (f"{row.video_id}_{row.id}_{row.question_type}", f"{row.video_id}_{row.id}", row.id)
        paths = (os.path.join(audio_dir, stem + extension) for stem in stems for extension in AUDIO_EXTENSIONS)
        path = next((path for path in paths if os.path.isfile(path)), None)
        row.audio_path = Path(path) if path and inside(path, str(audio_dir)) else None
        if path is None:
            tried = f"{stems[0]}, {stems[1]} or {stems[2]} ({', '.join(AUDIO_EXTENSIONS)})"
            problems.append(Problem(row.source, (row.line,), f"no speech in {audio_dir} as {tried}"))
        elif row.audio_path is None:
            text = f"{row.id}: speech {path} is a link out of {audio_dir}; see --allow_symlinks"
            problems.append(Problem(row.source, (row.line,), text))
    return problems


class _Inside:
    """Says whether a path, every link in it followed, stays below a root; each folder is resolved once."""

    def __init__(self, allow_symlinks: bool):
        self.allow_symlinks, self.real = allow_symlinks, cache(os.path.realpath)

    def __call__(self, path: str, root: str) -> bool:
        if self.allow_symlinks:
            return True
        real = os.path.realpath(path) if os.path.islink(path) else self.real(os.path.dirname(path))
        return os.path.join(real, "").startswith(os.path.join(self.real(root), ""))


def find_shared_speech(rows: Iterable[VQARow]) -> list[Problem]:
    """Rows with different questions that one speech file would have to serve: one of them would hear the wrong one."""
    first, problems = {}, []
    for row in rows:
        if row.audio_path is None:
            continue
        other = first.setdefault(row.audio_path, row)
        if other.question != row.question:
            text = (
                f"asks another question than {other.where}, but both would play {row.audio_path}; "
                f"name the files {{video_id}}_{{id}}_{{question_type}}, or give each question file its own folder"
            )
            lines = (row.line, other.line) if row.source == other.source else (row.line,)
            problems.append(Problem(row.source, lines, text))
    return problems


def check_media(rows: Sequence[VQARow]) -> list[Problem]:
    """Decode every frame and speech file once, on all cores, but those that passed before and have not changed.

    That a file passed is remembered in the user's cache folder, as one digest over its path, size, time of change and
    inode, and the versions of these checks and of the decoders. What fails is decoded again each time.
    """
    places, digests = array("Q"), bytearray()  # 24 bytes a file, and no paths: rows come by the thousand
    state = f"{MEDIA_CHECKS} {PIL_VERSION} {soundfile.__libsndfile_version__}"
    for number, row in enumerate(rows):
        for position, path in enumerate(row.media):
            stat = os.stat(path)
            text = f"{state} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino} {os.path.abspath(path)}"
            digests += hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=DIGEST_BYTES).digest()
            places.append(number << 16 | position)
    if not places:
        return []

    def fault(place: int) -> str | None:
        row, position = rows[place >> 16], place & 0xFFFF
        path = row.media[position]
        try:
            decode_audio(path) if path == row.audio_path else decode_frame(path)
        except VQAError as error:
            return str(error)
        return None

    passed = read_passed()
    digest_of = np.frombuffer(digests, passed.dtype)
    files, first = np.unique(digest_of, return_index=True)
    waiting = np.sort(first[~is_among(files, passed)])
    del first
    problems, failed, checked = [], [], 0
    try:
        # Threads: Pillow and libsndfile let go of the interpreter while they decode. 64 at a time, or the futures pile
        # up.
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            tqdm(total=len(waiting), desc="Checking media", unit="file", leave=False) as bar,
        ):
            for chunk in np.split(waiting, range(64, len(waiting), 64)):
                for index, text in zip(chunk, pool.map(fault, [places[i] for i in chunk]), strict=True):
                    bar.update()
                    checked += 1
                    if text:
                        users = [rows[places[i] >> 16] for i in np.flatnonzero(digest_of == digest_of[index])]
                        lines = tuple(dict.fromkeys(row.line for row in users))
                        more = f" ({len(lines) - 1} more lines need it)" if len(lines) > 1 else ""
                        problems.append(Problem(users[0].source, lines, text + more))
                        failed.append(digest_of[index])
    finally:  # a check that a signal cuts short is not begun again
        seen = digest_of[waiting[:checked]]
        good = seen[~np.isin(seen, failed)] if failed else seen
        if len(good):
            write_passed(np.union1d(passed if len(passed) < MAX_REMEMBERED else np.intersect1d(passed, files), good))
    return problems


def passed_file() -> Path:
    """Where the digests of media that passed are kept: `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "surgvivqa_audio" / "media_passed"


def read_passed() -> np.ndarray:
    """The digests of media that passed, sorted; none where the file is missing or damaged."""
    stored = b""
    with contextlib.suppress(OSError):
        stored = passed_file().read_bytes()
    head, digests = stored[:32], stored[32:]
    if hashlib.sha256(digests).digest() != head or len(digests) % DIGEST_BYTES:
        digests = b""
    return np.frombuffer(digests, f"S{DIGEST_BYTES}")


def is_among(digests: np.ndarray, known: np.ndarray) -> np.ndarray:
    """bool [n]: which of `digests` are in `known`, which is sorted; np.isin would take a copy of both."""
    if not len(known):
        return np.zeros(len(digests), bool)
    return known[np.minimum(np.searchsorted(known, digests), len(known) - 1)] == digests


def write_passed(passed: np.ndarray) -> None:
    """Replace the digests of media that passed; where the folder cannot be written, the next start decodes again."""
    path, stored = passed_file(), passed.tobytes()
    part = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(hashlib.sha256(stored).digest() + stored)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def check_rows(
    data_path: str | Path,
    frames_dir: str | Path,
    audio_dir: str | Path | None,
    max_samples: int | None = None,
    allow_symlinks: bool = False,
) -> tuple[list[VQARow], list[Problem]]:
    """The rows that can be used, their media found and decoded once; and what is wrong with the others.

    Args:
        data_path: JSONL in the REAL-Colon-VQA schema.
        frames_dir: holds the frames.
        audio_dir: holds the speech. None where the question is only read.
        max_samples: stop after this many rows. None: all.
        allow_symlinks: links may lead out of the two folders.
    """
    rows, problems = scan_rows(data_path, max_samples)
    problems += find_media(rows, frames_dir, audio_dir, allow_symlinks)
    problems += find_shared_speech(rows) + check_media(rows)
    problems.sort(key=lambda problem: problem.lines[0])
    bad = {line for problem in problems for line in problem.lines}
    return [row for row in rows if row.line not in bad], problems


def load_rows(*args, **kwargs) -> list[VQARow]:
    """The rows of a file, with the arguments of `check_rows`.

    Raises:
        VQAError: naming every malformed line, and every missing, undecodable or ambiguous file.
    """
    rows, problems = check_rows(*args, **kwargs)
    raise_problems(problems)
    return rows


def fit_size(size: tuple[int, int], max_image_size: int) -> tuple[int, int]:
    """(width, height) in pixels scaled down, never up, so that the longer side is at most `max_image_size`."""
    scale = min(1.0, max_image_size / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def decode_frame(path: Path) -> Image.Image:
    """A whole decoded frame, RGB, upright (EXIF orientation applied).

    Raises:
        VQAError: naming a file that is no JPEG or PNG, does not decode to the end, or that the model cannot see.
    """
    try:
        with Image.open(path, formats=FRAME_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_FRAME_PIXELS:
                raise VQAError(
                    f"frame {path} has {width} x {height} pixels, more than {MAX_FRAME_PIXELS}; scale it down"
                )
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise VQAError(f"frame {path} has {width} x {height} pixels, too long and thin; replace it")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16 bits of grey; Pillow would cut off all above 255
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode in ("P", "PA", "LA", "RGBA"):  # what is transparent keeps the colour it was stored with
                image = image.convert("RGBA")
            return image.convert("RGB") if image.mode != "RGB" else image  # it is loaded, and does without its file
    except VQAError:
        raise
    except DECODE_ERRORS as error:
        raise VQAError(f"frame {path} cannot be decoded ({error}); replace it or remove the row") from error


def load_frame(path: Path, max_image_size: int) -> Image.Image:
    """A decoded RGB frame, at most `max_image_size` pixels on its longer side."""
    image = decode_frame(path)
    size = fit_size(image.size, max_image_size)
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0) if size != image.size else image


def decode_audio(path: Path) -> tuple[np.ndarray, int]:
    """Speech as stored: float32 samples [n, channels] and the rate in Hz.

    Raises:
        VQAError: the file cannot be decoded or is cut off, or holds nothing that the model could hear as it is.
    """

    def refuse(what: str, advice: str = "replace it or remove the row") -> typing.NoReturn:
        raise VQAError(f"speech {path} {what}; {advice}")

    try:
        with soundfile.SoundFile(path) as sound:
            rate, stated = sound.samplerate, sound.frames
            # One second more than allowed is enough to know, and a header may claim days.
            samples = sound.read(min(stated, (MAX_SPEECH_SECONDS + 1) * rate), dtype="float32", always_2d=True)
            cut = is_cut_off(path, sound, len(samples))
    except (soundfile.SoundFileError, OSError, ValueError, MemoryError) as error:
        refuse(f"cannot be decoded ({error})")
    if not len(samples):
        refuse("holds no sound")
    if not np.isfinite(samples).all():
        refuse("holds samples that are not finite")
    if len(samples) > MAX_SPEECH_SECONDS * rate:
        refuse(f"lasts {stated / rate:.1f} s, the model hears at most {MAX_SPEECH_SECONDS}", "shorten it")
    if cut:
        refuse("is cut off", "copy it again or remove the row")
    if len(samples) < MIN_SPEECH_SECONDS * rate:
        refuse(f"lasts {len(samples) / rate:.3f} s, less than {MIN_SPEECH_SECONDS}")
    if (
        not SPEECH_RATES[0] <= rate <= SPEECH_RATES[1]
        or rate * SAMPLE_RATE > MAX_RATE_RATIO * math.gcd(rate, SAMPLE_RATE) ** 2
    ):
        refuse(f"has {rate} samples a second", f"resample it to {SAMPLE_RATE}")
    if np.abs(samples.mean(axis=1)).max() < SILENCE:
        refuse("is silent throughout")
    return samples, rate


def is_cut_off(path: Path, sound: soundfile.SoundFile, decoded: int) -> bool:
    """Whether a speech file ends before its own headers say so; libsndfile itself tells only for FLAC.

    An MP3 without a length header that ends exactly between two of its blocks shows no trace of what was lost.
    """
    if sound.format == "WAV":
        sizes = re.search(r"data : (\d+) \(should be (\d+)\)", sound.extra_info)
        return bool(sizes) and int(sizes[1]) > int(sizes[2])
    if sound.format == "OGG":  # the last page of a stream is marked
        last = path.read_bytes().rpartition(b"OggS")[2]
        return len(last) < 23 or not last[1] & 4 or len(last) + 4 < 27 + last[22] + sum(last[23 : 23 + last[22]])
    if sound.format == "MP3":
        samples, whole = walk_mp3(path.read_bytes())
        window = (MAX_SPEECH_SECONDS + 1) * sound.samplerate
        # Without a length header libsndfile guesses the length from the first block, and stops there.
        return not whole or decoded < min(sound.frames, window) or decoded < 0.9 * min(samples, window)
    return False


def walk_mp3(data: bytes) -> tuple[int, bool]:
    """Samples a channel in the blocks of an MP3, and whether the last block is whole."""
    at, follows, samples = 0, False, 0
    if data[:3] == b"ID3":  # a tag before the sound: ten bytes, then as many as they say, seven bits a byte
        at = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=False))
    while 0 <= at <= len(data) - 4:
        head = int.from_bytes(data[at : at + 4], "big")
        version, layer, bitrate, rate = head >> 19 & 3, head >> 17 & 3, head >> 12 & 15, head >> 10 & 3
        if head >> 21 != 0x7FF or version == 1 or layer != 1 or bitrate in (0, 15) or rate == 3:
            at, follows = data.find(b"\xff", at + 1), False  # not a block of layer III: look for the next
            continue
        full = version == 3  # MPEG 1; MPEG 2 and 2.5 have half and a quarter of the rate, and half the block
        hertz = (44100, 48000, 32000)[rate] >> (0, 1, 2)[(3, 2, 0).index(version)]
        length = (144 if full else 72) * MP3_KBPS[full][bitrate - 1] * 1000 // hertz + (head >> 9 & 1)
        if at + length > len(data):
            return samples, not follows  # bytes that only look like a block do not follow one
        samples += 1152 if full else 576
        at, follows = at + length, True
    return samples, True


def speech_length(path: Path) -> int:
    """Samples that `load_speech` gives, from the file's header alone."""
    info = soundfile.info(path)
    return math.ceil(info.frames * SAMPLE_RATE / info.samplerate)


def load_speech(path: Path) -> np.ndarray:
    """Speech as the encoder wants it: float32 [n] at 16 kHz, channels averaged."""
    samples, rate = decode_audio(path)
    mono = torch.from_numpy(samples.mean(axis=1))
    return torchaudio.functional.resample(mono, rate, SAMPLE_RATE).numpy()


# ----------------------------------------------------------------------------------------------------------------------
# Prompt and labels
# ----------------------------------------------------------------------------------------------------------------------


TOKENIZING = threading.Lock()  # a fast tokenizer keeps the settings of a call in itself


class VQAProcessor:
    """Turns a row's frames, speech and words into model inputs, the same way for training and evaluation.

    Args:
        tokenizer: from `load_tokenizer`, so that it has a pad token of its own and `<|audio_pad|>`.
        config: of the model; its geometry decides how many tokens frames and speech take.
        max_image_size: longer side of a frame in pixels.
        input_mode: one of `INPUT_MODES`.
        audio_tokens: one of `AUDIO_TOKENS`.
        frame_mode: one of `FRAME_MODES`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: Qwen2VLConfig,
        max_image_size: int = 384,
        input_mode: str = "audio",
        audio_tokens: str = "full",
        frame_mode: str = "images",
    ):
        for flag, value, choices in (
            ("input_mode", input_mode, INPUT_MODES),
            ("audio_tokens", audio_tokens, AUDIO_TOKENS),
            ("frame_mode", frame_mode, FRAME_MODES),
        ):
            if value not in choices:
                raise VQAError(f"--{flag} must be one of {', '.join(choices)}, not {value!r}")
        self.tokenizer, self.max_image_size, self.input_mode = tokenizer, max_image_size, input_mode
        self.audio_tokens, self.frame_mode = audio_tokens, frame_mode
        audio = audio_config_of(config)
        self.encoder_tokens = audio.max_source_positions
        self.merge_size = config.vision_config.spatial_merge_size
        self.image_processor = Qwen2VLImageProcessorPil(
            patch_size=config.vision_config.patch_size,
            temporal_patch_size=config.vision_config.temporal_patch_size,
            merge_size=self.merge_size,
        )
        mel_frames = self.encoder_tokens * MEL_FRAMES_PER_TOKEN
        self.max_samples = mel_frames * HOP_LENGTH
        self.feature_extractor = WhisperFeatureExtractor(
            feature_size=audio.num_mel_bins, sampling_rate=SAMPLE_RATE, hop_length=HOP_LENGTH, chunk_length=1
        )
        self.feature_extractor.n_samples, self.feature_extractor.nb_max_frames = self.max_samples, mel_frames
        self.known_texts: dict[tuple[str, bool], list[int]] = {}
        self.audio_id = tokenizer.convert_tokens_to_ids(AUDIO_PAD)
        video = frame_mode == "video"
        self.vision_id, self.vision_type = (config.video_token_id, 2) if video else (config.image_token_id, 1)
        self.vision_ids = (config.vision_start_token_id, config.vision_end_token_id)

    def speech_tokens(self, samples: int) -> int:
        """Tokens that speech of `samples` at 16 kHz takes in the prompt."""
        if self.audio_tokens == "full":
            return self.encoder_tokens
        return min(self.encoder_tokens, max(1, math.ceil(samples / SAMPLES_PER_TOKEN)))

    def tokenize(self, text: str, split_special_tokens: bool = False) -> list[int]:
        """Ids of a piece of a prompt, not to be changed; what many rows share is tokenised once."""
        key = text, split_special_tokens
        if key not in self.known_texts:
            with TOKENIZING:
                ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split_special_tokens)
            if len(self.known_texts) >= MAX_KNOWN_TEXTS:
                return ids
            self.known_texts[key] = ids
        return self.known_texts[key]

    def build(
        self, question: str, vision_tokens: Sequence[int], audio_tokens: int, answer: str | None
    ) -> dict[str, torch.Tensor]:
        """Token ids of one sample, in the layout of the published stage-2 checkpoint.

        Args:
            question: in words; only the text modes use it.
            vision_tokens: tokens of each frame, or of the one video.
            audio_tokens: from `speech_tokens`; text mode does not use it.
            answer: to be learned, or None for the prompt alone.

        Returns:
            `input_ids`, `mm_token_type_ids` (0 text and speech, 1 image, 2 video) and `labels` (the answer and its turn
            end; -100 elsewhere), each int64 [T].
        """

        words = self.tokenize
        ids = list(words("<|im_start|>user\n" + (AUDIO_BOS if self.input_mode != "text" else "")))
        if self.input_mode != "text":
            ids += [self.audio_id] * audio_tokens + words(AUDIO_EOS + "\n")
        spans = []
        for count in vision_tokens:
            spans.append((len(ids) + 1, len(ids) + 1 + count))
            ids += [self.vision_ids[0], *[self.vision_id] * count, self.vision_ids[1]]
        if self.input_mode != "audio":
            ids += words(f"Question: {question}\n", split_special_tokens=True)
        ids += words(f"{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n")
        labels = [IGNORE_INDEX] * len(ids)
        if answer is not None:
            learned = [*words(answer, split_special_tokens=True), *words("<|im_end|>")]
            ids += learned
            labels += learned
        types = torch.zeros(len(ids), dtype=torch.long)
        for start, end in spans:
            types[start:end] = self.vision_type
        return {"input_ids": torch.tensor(ids), "mm_token_type_ids": types, "labels": torch.tensor(labels)}

    def encode(
        self,
        row: VQARow,
        frames: Sequence[Image.Image],
        speech: np.ndarray | tuple[torch.Tensor, torch.Tensor] | None,
        with_answer: bool,
        seen: tuple[torch.Tensor, torch.Tensor] | None = None,
        heard: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """One sample as model inputs, without a batch dimension.

        Args:
            row: question and answer.
            frames: RGB, from `load_frame`.
            speech: float32 [n] at 16 kHz, or what `encode_speech` made of it; None in text mode.
            with_answer: append the answer and label it.
            seen: features and grid of the clip, from `read_features`; then `frames` are not looked at.
            heard: features of the speech; then `speech` is not listened to.

        Returns:
            The tensors of `build`, `pixel_values` uint8 [patches, 3 * patch * patch], in video mode
            [patches, 3 * 2 * patch * patch] (the model scales them, see `scale_pixels`),
            `image_grid_thw` int64 [frames, 3] or `video_grid_thw` int64 [1, 3], and outside text mode `input_features`
            float32 [1, mel bins, frames] and `audio_lengths` int64 [1], the tokens of the speech. With `seen`
            `vision_features` in place of the pixels, with `heard` `speech_features` in place of these two.
            With the answer `position_ids` int64 [T, 3].

        Raises:
            VQAError: speech longer than the encoder's window, frames that cannot be paired, or labels all or none
                masked.
        """
        media, audio_tokens = {}, 0
        if seen is None:
            media["pixel_values"], grid = self.encode_frames(row, frames)
        else:
            media["vision_features"], grid = seen
        if heard is not None:
            media["speech_features"], audio_tokens = heard, len(heard)
        elif self.input_mode != "text":
            mel, lengths = speech if isinstance(speech, tuple) else self.encode_speech(row, speech)
            media |= {"input_features": mel, "audio_lengths": lengths}
            audio_tokens = int(lengths)
        counts = (grid.prod(-1) // self.merge_size**2).tolist()
        sample = self.build(row.question, counts, audio_tokens, row.answer if with_answer else None) | media
        sample["video_grid_thw" if self.frame_mode == "video" else "image_grid_thw"] = grid
        if with_answer:
            check_labels(sample["labels"], row)
            # Here, in the loader's workers, and not by the model, which would do it sample by sample on the GPU.
            sample["position_ids"] = mrope_positions(sample["mm_token_type_ids"], grid, self.merge_size)
        return sample

    def encode_frames(self, row: VQARow, frames: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """`pixel_values` and grid, as `encode` returns them."""
        cut = [self.cut_patches(frame) for frame in frames]
        pixels, grid = torch.from_numpy(np.concatenate([p for p, _ in cut])), torch.tensor([g for _, g in cut])
        if self.frame_mode == "video":
            if (grid != grid[0]).any():
                raise VQAError(f"{row.where}: the frames differ in size; --frame_mode video cannot pair them")
            pixels, grid = pair_frames(pixels, grid)
        return pixels, grid

    def cut_patches(self, frame: Image.Image) -> tuple[np.ndarray, tuple[int, int, int]]:
        """A frame as patches, uint8 [patches, 3 * patch * patch], and its grid, both as the library lays them out."""
        library, merge = self.image_processor, self.merge_size
        patch, limits = library.patch_size, library.size
        height, width = smart_resize(
            *(frame.height, frame.width, patch * merge), limits["shortest_edge"], limits["longest_edge"]
        )
        if frame.size != (width, height):
            frame = frame.resize((width, height), Image.Resampling.BICUBIC)
        rows, columns = height // patch, width // patch
        shape = rows // merge, merge, patch, columns // merge, merge, patch, 3
        values = np.asarray(frame).reshape(shape).transpose(0, 3, 1, 4, 6, 2, 5)  # [rows..., columns..., 3, y, x]
        return values.reshape(rows * columns, -1), (1, rows, columns)

    def encode_speech(self, row: VQARow, speech: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """`input_features` and `audio_lengths`, as `encode` returns them; float32 [n] at 16 kHz comes in."""
        if len(speech) > self.max_samples:
            raise VQAError(
                f"{row.where}: speech {row.audio_path} lasts {len(speech) / SAMPLE_RATE:.1f} s, this model's "
                f"encoder hears {self.max_samples / SAMPLE_RATE:.1f}; shorten it"
            )
        mel = self.feature_extractor(speech, sampling_rate=SAMPLE_RATE, return_tensors="pt", padding="max_length")
        return mel["input_features"], torch.tensor([self.speech_tokens(len(speech))])

    def count_tokens(self, row: VQARow, frame_paths: Sequence[Path]) -> int:
        """Length of the training sample of `row`, from the frames' headers alone."""
        counts = self.vision_tokens(frame_paths)
        audio_tokens = 0 if self.input_mode == "text" else self.speech_tokens(speech_length(row.audio_path))
        return len(self.build(row.question, counts, audio_tokens, row.answer)["input_ids"])

    def vision_tokens(self, frame_paths: Sequence[Path]) -> list[int]:
        """Tokens of each frame, or of the one video, from the frames' headers alone."""
        counts = []
        for path in frame_paths:
            with Image.open(path, formats=FRAME_FORMATS) as image:
                turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
                width, height = fit_size(image.size[::-1] if turned else image.size, self.max_image_size)
            patches = self.image_processor.get_number_of_image_patches(height, width, {})
            counts.append(patches // self.merge_size**2)
        return [counts[0] * math.ceil(len(counts) / 2)] if self.frame_mode == "video" else counts


def pair_frames(pixels: torch.Tensor, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames as Qwen2-VL's video: two neighbours share a temporal patch; a last one without neighbour is doubled.

    Args:
        pixels: [frames * patches, 3 * patch * patch].
        grid: int64 [frames, 3], all frames of one size.

    Returns:
        Pixels [ceil(frames / 2) * patches, 3 * 2 * patch * patch] and grid int64 [1, 3].
    """
    frames, _, height, width = len(grid), *grid[0].tolist()
    if frames % 2:
        pixels, frames = torch.cat([pixels, pixels[-height * width :]]), frames + 1
    pairs = pixels.view(frames // 2, 2, height * width, 3, -1).permute(0, 2, 3, 1, 4)
    return pairs.reshape(-1, 2 * pixels.shape[1]), torch.tensor([[frames // 2, height, width]])


@cache
def pixel_levels(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """What Qwen2-VL's image processor makes of the 256 values of red, green and blue, [768]."""
    library, every = Qwen2VLImageProcessorPil(), np.tile(np.arange(256, dtype=np.uint8), (3, 1))[..., None]
    scaled = library.normalize(library.rescale(every, library.rescale_factor), library.image_mean, library.image_std)
    return torch.from_numpy(scaled.astype(np.float32).flatten()).to(device, dtype)


def scale_pixels(pixels: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Patches as `Qwen2VLImageProcessorPil` gives them, bit for bit, once rounded to `dtype`: [patches, width].

    Here, on the device, since they take 8 times (in pairs 4 times) the room of what they are made of.

    Args:
        pixels: uint8 [patches, 3 * patch * patch], then each stands in both temporal places, or of pairs
            [patches, 3 * 2 * patch * patch].
        width: values of a patch in the vision tower: 3 * temporal patch * patch * patch.
        dtype: of the result.
    """
    channels = pixels.view(len(pixels), 3, 1, -1).int()
    channels += torch.arange(0, 768, 256, dtype=torch.int32, device=pixels.device).view(3, 1, 1)
    # On the CPU index_select takes a third of the time of indexing.
    values = torch.index_select(pixel_levels(pixels.device, dtype), 0, channels.flatten()).view(channels.shape)
    return values.expand(-1, -1, width // pixels.shape[1], -1).reshape(len(pixels), width)


def mrope_positions(types: torch.Tensor, grid: torch.Tensor, merge_size: int) -> torch.Tensor:
    """M-RoPE positions of one sample, int64 [T, 3] (time, row, column), as Qwen2-VL's `get_rope_index` gives them.

    Args:
        types: int64 [T], 0 text and speech, 1 image, 2 video.
        grid: int64 [frames or clips, 3], patches in time, rows and columns.
        merge_size: patches a token covers each way.
    """
    positions, vision = np.empty((len(types), 3), np.int64), np.flatnonzero(types.numpy())
    place = at = seen = 0
    for t, h, w in grid.tolist():
        sides = t, h // merge_size, w // merge_size
        start, seen = int(vision[seen]), seen + math.prod(sides)
        positions[at:start] = np.arange(place, place + start - at)[:, None]
        place += start - at
        at = start + math.prod(sides)
        positions[start:at] = lattice(*sides) + place
        place += max(sides[1:])
    positions[at:] = np.arange(place, place + len(types) - at)[:, None]
    return torch.from_numpy(positions)


@lru_cache(64)  # the frames of a training run have few sizes
def lattice(*sides: int) -> np.ndarray:
    """The points of a grid in row-major order, int64 [points, dimensions]."""
    return np.indices(sides).reshape(len(sides), -1).T


def check_labels(labels: torch.Tensor, row: VQARow) -> None:
    """VQAError where the labels [T] of a training sample are all or none masked: nothing, or the prompt, is learned."""
    learned = int((labels != IGNORE_INDEX).sum())
    if learned in (0, len(labels)):
        masked = "all" if learned == 0 else "none"
        raise VQAError(f"{row.where}: {masked} of the labels are masked; the answer {row.answer!r} cannot be learned")


# ----------------------------------------------------------------------------------------------------------------------
# Dataset and collator
# ----------------------------------------------------------------------------------------------------------------------


class SpeechMemo:
    """The mel of the speech heard last, so that a file that many rows and epochs share is decoded once a process.

    A file that was replaced (another size, time of writing or of change, or inode) is heard anew. Beyond `limit` bytes
    the one that was not heard for longest goes. Silence up to the end of the encoder's window takes no room. Not for
    several threads.
    """

    def __init__(self, processor: VQAProcessor, limit: int = SPEECH_MEMO_BYTES):
        self.processor, self.limit, self.bytes = processor, limit, 0
        self.kept: OrderedDict[tuple, tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]] = OrderedDict()

    def hear(self, row: VQARow) -> tuple[torch.Tensor, torch.Tensor]:
        """What `encode_speech` makes of the speech of a row."""
        try:
            stat = os.stat(row.audio_path)
        except OSError:  # decoding words it
            return self.processor.encode_speech(row, load_speech(row.audio_path))
        key = str(row.audio_path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
        if key in self.kept:
            self.kept.move_to_end(key)
            heard, silence, lengths, frames = self.kept[key]
            mel = silence.repeat(1, heard.shape[1], frames)
            mel[..., : heard.shape[-1]] = heard
            return mel, lengths.clone()
        mel, lengths = self.processor.encode_speech(row, load_speech(row.audio_path))
        silence = mel[0, -1, -1].clone()
        sounding = 1 + max((mel[0] != silence).any(0).nonzero().flatten().tolist(), default=-1)
        self.kept[key] = mel[..., :sounding].clone(), silence, lengths.clone(), mel.shape[-1]
        self.bytes += self.kept[key][0].nbytes
        while self.bytes > self.limit:
            self.bytes -= self.kept.popitem(last=False)[1][0].nbytes
        return mel, lengths


def select_frames(frames: Sequence, limit: int | None) -> Sequence:
    """`limit` evenly spaced frames, the first among them, in their order in time; a shorter clip, and with None any, is
    kept whole."""
    if limit is None or len(frames) <= limit:
        return frames
    stride = len(frames) / limit
    return [frames[int(i * stride)] for i in range(limit)]


class SurgicalVQADataset(torch.utils.data.Dataset):
    """Spoken questions about clips, as model inputs.

    Args:
        rows: from `load_rows`, or the path of a question file (then read and checked here).
        processor: turns a row into tensors.
        frames_dir: needed with a path.
        audio_dir: needed with a path, outside text mode.
        max_train_frames: frames per clip when `is_eval` is False. None: all.
        max_eval_frames: frames per clip when `is_eval` is True. None: all.
        is_eval: which of the two limits holds.
        with_answer: False leaves the answer out, for generation.
        numbered: add `rows`, so that the Trainer can name a sample.
    """

    def __init__(
        self,
        rows: Sequence[VQARow] | str | Path,
        processor: VQAProcessor,
        frames_dir: str | Path | None = None,
        audio_dir: str | Path | None = None,
        max_train_frames: int | None = None,
        max_eval_frames: int | None = None,
        is_eval: bool = False,
        with_answer: bool = True,
        numbered: bool = False,
    ):
        if isinstance(rows, str | Path):
            rows = load_rows(rows, frames_dir, audio_dir if processor.input_mode != "text" else None)
        self.rows, self.processor = rows, processor
        self.max_train_frames, self.max_eval_frames = max_train_frames, max_eval_frames
        self.is_eval, self.with_answer, self.numbered = is_eval, with_answer, numbered
        self.features: list[tuple[Path | None, Path | None]] = []  # of each row; `fill_feature_cache` sets it
        self.speech_memo = SpeechMemo(processor)

    def _select_frames(self, frames: Sequence) -> Sequence:
        """Those of a clip's frames that this dataset gives."""
        return select_frames(frames, self.max_eval_frames if self.is_eval else self.max_train_frames)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row, (clip, speech_path) = self.rows[index], self.media_of(index)
        if self.features:
            clip_file, speech_file = self.features[index]
            heard = read_features(speech_file)[0] if speech_file else None
            sample = self.processor.encode(row, (), None, self.with_answer, read_features(clip_file), heard)
        else:
            frames = [load_frame(path, self.processor.max_image_size) for path in clip]
            speech = self.speech_memo.hear(row) if speech_path else None
            sample = self.processor.encode(row, frames, speech, self.with_answer)
        return {**sample, "rows": [index]} if self.numbered else sample

    def media_of(self, index: int) -> tuple[tuple[Path, ...], Path | None]:
        """The clip of a row, that is, the selected frames in order; and its speech, None in text mode."""
        row, by_ear = self.rows[index], self.processor.input_mode != "text"
        return tuple(self._select_frames(row.frame_paths)), row.audio_path if by_ear else None

    def find_too_long(self, context: int) -> list[Problem]:
        """The rows whose samples take more than `context` tokens, the most that the model can place.

        Only where the largest frames could bring that about are the frames' headers read.
        """
        processor, problems = self.processor, []
        unit = processor.image_processor.patch_size * processor.merge_size
        largest = max(16, math.ceil(processor.max_image_size / unit) ** 2)  # tiny frames are scaled up to 4 x 4 tokens

        @cache  # thousands of rows have a few answers
        def bound(frames: int, question: str, answer: str) -> int:
            tokens = processor.build(question, [largest] * frames, processor.encoder_tokens, answer)
            return len(tokens["input_ids"])

        for row in self.rows:
            question = "" if processor.input_mode == "audio" else row.question
            if bound(len(self._select_frames(row.frames)), question, row.answer) <= context:
                continue
            tokens = processor.count_tokens(row, self._select_frames(row.frame_paths))
            if tokens > context:
                text = f"{row.key} takes {tokens} tokens, more than the model's {context}; lower --max_image_size or "
                flag = "eval" if self.is_eval else "train"
                problems.append(Problem(row.source, (row.line,), f"{text}--max_{flag}_frames"))
        return problems

    def token_counts(self, indices: Iterable[int] | None = None) -> list[int]:
        """Tokens of each sample, or of those at `indices`, without decoding any frame."""
        rows = self.rows if indices is None else [self.rows[index] for index in indices]
        return [self.processor.count_tokens(row, self._select_frames(row.frame_paths)) for row in rows]


class VQACollator:
    """Batches samples: text is padded, frames are concatenated, speech is stacked.

    Args:
        pad_token_id: fills `input_ids`; what is padding is never told by this id.
        padding_side: `left` for generation. `right` for training: there causal attention never reaches the padding,
            and without a mask sdpa takes its flash kernel.
        multiple: batches are padded to a multiple of so many tokens, the rest on the right. 1: to their longest sample.
    """

    FILL = {"labels": IGNORE_INDEX, "mm_token_type_ids": 0, "attention_mask": 0, "position_ids": 0}  # noqa: RUF012

    def __init__(self, pad_token_id: int, padding_side: str = "right", multiple: int = 1):
        self.pad_token_id, self.padding_side, self.multiple = pad_token_id, padding_side, multiple

    def __call__(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels`, `mm_token_type_ids` and, padded on the left, `attention_mask`, int64 [B, T];
        `position_ids` int64 [3, B, T] where the samples have them;
        `pixel_values` and `image_grid_thw` or `video_grid_thw` along all frames or clips of the batch; `input_features`
        float32 [B, mel bins, mel frames] and `audio_lengths` int64 [B]. From the feature cache, in place of pixels and
        mel: `vision_features` [tokens, hidden] and `speech_features` [tokens, d_audio] along the batch."""
        names = ("input_ids", "labels", "mm_token_type_ids", "position_ids")
        padded = {name: [s[name] for s in samples] for name in names if name in samples[0]}
        if self.padding_side == "left":
            padded["attention_mask"] = [torch.ones_like(s["input_ids"]) for s in samples]
        batch = {
            name: nn.utils.rnn.pad_sequence(
                values,
                batch_first=True,
                padding_value=self.FILL.get(name, self.pad_token_id),
                padding_side=self.padding_side,
            )
            for name, values in padded.items()
        }
        if "position_ids" in batch:
            batch["position_ids"] = batch["position_ids"].permute(2, 0, 1)
        if missing := -batch["input_ids"].shape[1] % self.multiple:
            for name, values in batch.items():
                batch[name] = F.pad(values, (0, missing), value=self.FILL.get(name, self.pad_token_id))
        for name in (
            *("pixel_values", "image_grid_thw", "video_grid_thw", "input_features", "audio_lengths"),
            *("vision_features", "speech_features"),
        ):
            if name in samples[0]:
                batch[name] = torch.cat([s[name] for s in samples])
        if "rows" in samples[0]:
            batch["rows"] = [index for s in samples for index in s["rows"]]
        return batch


def read_features(file: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `write_features` stored: features [tokens, width], mapped from the file; and of a clip its grid [n, 3].

    Raises:
        VQAError: the file is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            features, notes = stored.get_tensor("features"), stored.metadata()
        if features_checksum(features, notes["grid"]) != notes["crc32"]:
            raise ValueError("its checksum differs")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise VQAError(f"{file}: damaged or gone ({error}); start again, then it is computed anew") from error
    return features, torch.tensor(json.loads(notes["grid"])) if notes["grid"] else None


def write_features(file: Path, features: torch.Tensor, grid: torch.Tensor | None = None) -> None:
    """Store features [tokens, width] and, of a clip, the grid int64 [n, 3]; the file is named only once it is whole."""
    text = json.dumps(grid.tolist()) if grid is not None else ""
    part = file.with_name(f"{UNFINISHED}{os.urandom(8).hex()}")
    try:
        save_file({"features": features}, part, metadata={"grid": text, "crc32": features_checksum(features, text)})
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def features_checksum(features: torch.Tensor, grid: str) -> str:
    """CRC-32 of all that a file of features says; sha256 would take longer than the reading."""
    crc = zlib.crc32(f"{features.dtype} {tuple(features.shape)} {grid}".encode())
    return f"{zlib.crc32(features.contiguous().view(torch.uint8).numpy(), crc):08x}"


# ----------------------------------------------------------------------------------------------------------------------
# The grafted model
# ----------------------------------------------------------------------------------------------------------------------


def audio_config_of(config: Qwen2VLConfig) -> WhisperConfig:
    """Geometry of the grafted encoder: the config's `audio_config`, else that of Whisper-large-v3-turbo."""
    return WhisperConfig(**(getattr(config, "audio_config", None) or WHISPER_LARGE_V3_TURBO))


class AudioProjector(nn.Linear):
    """[..., d_audio] -> [..., hidden], computed in the dtype of its weight: trained in float32 beside a bf16 model."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Project `states`; under autocast the product runs in the autocast dtype."""
        return super().forward(states.to(self.weight.dtype))


class FrameAttention(VisionAttention):
    """Qwen2-VL's attention within each frame; frames of one size take one sdpa call, not one each."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """[patches, d] -> [patches, d]; `cu_seqlens` [frames + 1] says where the frames begin."""
        if not hasattr(cu_seqlens, "frame_sizes"):  # all layers get this tensor; reading it waits for the GPU
            cu_seqlens.frame_sizes = cu_seqlens.diff().tolist()
        sizes = cu_seqlens.frame_sizes
        if len(set(sizes)) > 1 or self.config._attn_implementation != "sdpa":
            return super().forward(hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)
        total = len(hidden_states)
        query, key, value = self.qkv(hidden_states).reshape(total, 3, self.num_heads, -1).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        query, key, value = (x.view(len(sizes), sizes[0], *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scaling)
        return self.proj(mixed.transpose(1, 2).reshape(total, -1))


def patch_positions(grid: torch.Tensor, merge_size: int) -> torch.Tensor:
    """Row and column of each patch, int64 [patches, 2], in the order of the vision tower; `grid` int64 [frames, 3]."""
    if (grid == grid[0]).all():  # transformers would lay out one frame after the other
        return get_vision_position_ids(grid[:1], merge_size).repeat(len(grid), 1)
    return get_vision_position_ids(grid, merge_size)


class SurgicalVQAModel(Qwen2VLForConditionalGeneration):
    """Qwen2-VL with a Whisper encoder (`audio_encoder.*`) and a linear bridge (`audio_projector.weight`).

    `<|audio_pad|>` ids stand where the speech goes, as `<|image_pad|>` ids do for the frames, so that ids, token types,
    positions and embeddings have one length and M-RoPE positions come out right.
    """

    accepts_loss_kwargs = True  # the Trainer then passes num_items_in_batch, and accumulation weighs tokens alike
    told: tuple[bool, bool, bool] | None = None  # what `train` was asked for last, and which towers were trained then

    def __init__(self, config: Qwen2VLConfig):
        super().__init__(config)
        audio = audio_config_of(config)
        audio._attn_implementation = config._attn_implementation
        audio.use_cache = False  # an encoder has none, and transformers warns of it beside checkpointing
        self.audio_encoder = WhisperEncoder(audio)
        self.audio_projector = AudioProjector(audio.d_model, config.text_config.hidden_size, bias=False)
        for block in self.model.visual.blocks:
            block.attn.__class__ = FrameAttention  # built anew it would draw other random weights
        self.stored_rows = config.text_config.vocab_size  # `grow_embeddings` may add rows, which travel with an adapter
        self.trains_vision, self.trains_audio = False, False  # whether the towers are trained: see `add_lora`
        self.post_init()

    def train(self, mode: bool = True) -> "SurgicalVQAModel":
        """As usual, but frozen towers stay in evaluation mode.

        Nothing is done where training was the last thing asked for, too: the Trainer asks at each batch, and the GPU
        waits while 3,000 modules are told. So what is set on a module itself in between stays.
        """
        told = mode, self.trains_vision, self.trains_audio
        if mode and told == self.told:
            return self
        super().train(mode)
        self.model.visual.train(mode and self.trains_vision)
        self.audio_encoder.train(mode and self.trains_audio)
        self.told = told
        return self

    def set_checkpointing(self, every_n: int, compiled: bool = False) -> None:
        """Recompute every `every_n`-th layer of the decoder and of trained towers in the backward pass; 0: none.

        Layers of frozen towers take the setting without effect: they are in evaluation mode. With `compiled` the
        decoder's layers are compiled; they have one form, so that one compilation serves them all, and all lengths
        (a batch of one sample, and evaluation, take one more each). Whatever could not be compiled is an error.
        """
        checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        for layers in (self.model.language_model.layers, self.model.visual.blocks, self.audio_encoder.layers):
            for index, layer in enumerate(layers):
                layer.gradient_checkpointing = every_n > 0 and index % every_n == 0
                layer._gradient_checkpointing_func = checkpoint
        if not compiled:
            return
        torch._functorch.config.activation_memory_budget = ACTIVATION_MEMORY_BUDGET
        torch._dynamo.config.specialize_float = True  # else a layer is traced twice, and the trace not kept on disk
        for layer in self.model.language_model.layers:
            # The plain forward: some versions of transformers wrap their own checkpointing around it.
            plain = getattr(type(layer).forward, "__wrapped__", type(layer).forward)
            layer.forward = torch.compile(plain.__get__(layer), dynamic=True, fullgraph=True)
            if layer.gradient_checkpointing:
                layer.forward, layer.gradient_checkpointing = partial(checkpoint, layer.forward), False

    def use_liger(self) -> None:
        """Let Liger's kernels compute the decoder's RMSNorm and SwiGLU, of this model alone; no weight changes.

        Raises:
            VQAError: as `check_swiglu`.
        """
        from liger_kernel.ops import LigerRMSNormFunction, LigerSiLUMulFunction

        check_swiglu(self.config)
        decoder = self.model.language_model

        # No offset; rounded where Qwen2-VL's own norm is; only products read its output, so gradients go in place.
        def norm(module, x):
            return LigerRMSNormFunction.apply(x, module.weight, module.variance_epsilon, 0.0, "llama", True, None)

        def mlp(module, x):
            return module.down_proj(LigerSiLUMulFunction.apply(module.gate_proj(x), module.up_proj(x), 1.0, 1.0))

        decoder.norm.forward = norm.__get__(decoder.norm)
        for layer in decoder.layers:
            layer.mlp.forward = mlp.__get__(layer.mlp)
            for module in (layer.input_layernorm, layer.post_attention_layernorm):
                module.forward = norm.__get__(module)

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        image_grid_thw: torch.Tensor | None,
        video_grid_thw: torch.Tensor | None,
        input_features: torch.Tensor | None,
        audio_lengths: torch.Tensor | None,
        vision_features: torch.Tensor | None = None,
        speech_features: torch.Tensor | None = None,
        places: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """Embeddings [B, T, hidden] of `input_ids` [B, T] with frames and speech, or their features, in their places.

        `places` are from `find_places` for these ids, and taken to be right but for their number; None: found here.

        Raises:
            ValueError: placeholders and features differ in number.
        """
        media = {}
        if pixel_values is not None or vision_features is not None:
            kind = "image" if video_grid_thw is None else "video"
            grid = image_grid_thw if video_grid_thw is None else video_grid_thw
            media[kind] = self.see(pixel_values, grid) if vision_features is None else vision_features
        if input_features is not None or speech_features is not None:
            heard = self.hear(input_features, audio_lengths) if speech_features is None else speech_features
            media["audio"] = self.audio_projector(heard)
        embeds = self.get_input_embeddings()(input_ids)
        if media and places is None:
            places = self.find_places(input_ids)
        for kind, features in media.items():
            if (wanted := len(places[kind][0])) != len(features):
                raise ValueError(f"{wanted} {kind} placeholders but {len(features)} {kind} features")
            embeds = embeds.index_put(places[kind], features.to(embeds.dtype))
        return embeds

    def find_places(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What goes where in a batch [B, T], as rows and columns, int64 [n] each: features of `image`, `video` and
        `audio`, and with `labels` the `predicting` positions, whose next token is learned.

        How many there are depends on the ids, so on a GPU this waits until they are counted, after all that was asked
        of it before: call it where little was.
        """
        config = self.config
        kinds = {"image": config.image_token_id, "video": config.video_token_id, "audio": config.audio_token_id}
        masks = {kind: input_ids == token_id for kind, token_id in kinds.items()}
        if labels is not None:
            masks["predicting"] = labels[:, 1:] != IGNORE_INDEX
        return {name: mask.nonzero(as_tuple=True) for name, mask in masks.items()}

    def see(self, pixel_values: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """What the vision tower makes of patches, uint8 or scaled, and their grid int64 [n, 3]: [tokens, hidden]."""
        visual, where = self.model.visual, patch_positions(grid, self.model.visual.spatial_merge_size)
        if pixel_values.dtype == torch.uint8:
            vision = self.config.vision_config
            width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            pixel_values = scale_pixels(pixel_values, width, visual.dtype)
        with torch.set_grad_enabled(self.trains_vision and torch.is_grad_enabled()):
            return visual(pixel_values.to(visual.dtype), grid_thw=grid, position_ids=where).pooler_output

    def hear(self, input_features: torch.Tensor, audio_lengths: torch.Tensor | None) -> torch.Tensor:
        """What the speech encoder makes of speech [B, mel, frames]: the first `audio_lengths` int64 [B] outputs
        of each (None: all), one speech after the other, [tokens, d_audio]."""
        encoder = self.audio_encoder
        with torch.set_grad_enabled(self.trains_audio and torch.is_grad_enabled()):
            heard = encoder(input_features.to(encoder.dtype)).last_hidden_state
        if audio_lengths is not None:
            heard = heard[torch.arange(heard.shape[1], device=heard.device) < audio_lengths[:, None]]
        return heard.flatten(0, -2)

    def rest_towers(self) -> None:
        """Take both encoders off the GPU (2.4 GiB at full size), for when all that comes are features."""
        for tower in (self.model.visual, self.audio_encoder):
            tower.to("cpu")
        torch.cuda.empty_cache()  # which does nothing without a GPU

    def prepare_inputs_for_generation(self, *args, is_first_iteration: bool = False, **kwargs) -> dict:
        """As usual: frames and speech are read with the prompt, and not again with each token of the answer."""
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs = {name: value for name, value in inputs.items() if not name.endswith("_features")}
        return inputs

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        audio_lengths: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        inputs_embeds: None = None,
        vision_features: torch.Tensor | None = None,
        speech_features: torch.Tensor | None = None,
        places: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """With `labels`: the loss alone, its logits built at answer positions only. Without: logits for generation.

        Args:
            input_ids: int64 [B, T] with placeholders for speech and frames.
            attention_mask: [B, T], 0 on padding. None: no padding, or on the right alone.
            position_ids: [3 or 4, B, T] M-RoPE positions; None computes them from `mm_token_type_ids` and the grids.
            past_key_values: the cache, in generation.
            labels: int64 [B, T], -100 where nothing is learned.
            use_cache: keep keys and values; never with labels.
            pixel_values: patches of all frames of the batch, uint8 or scaled, see `scale_pixels`.
            image_grid_thw: int64 [frames, 3], or None.
            video_grid_thw: int64 [clips, 3], or None.
            input_features: float32 [B, mel bins, mel frames].
            audio_lengths: int64 [B], how many of the encoder's outputs stand in the prompt. None: all.
            mm_token_type_ids: int64 [B, T], 0 text and speech, 1 image, 2 video.
            logits_to_keep: number of last positions (0: all), the positions [n], or those of each row [B, n].
            num_items_in_batch: labels in the whole accumulated batch, which the loss is divided by. None: in this one.
            inputs_embeds: always None (PEFT passes it); speech and frames are placed by id.
            vision_features: outputs of `see` along the batch, in place of `pixel_values`; the grid is still needed.
            speech_features: outputs of `hear` along the batch, in place of `input_features` and `audio_lengths`.
            places: from `find_places`; None: found here.
        """
        if labels is not None and places is None:
            places = self.find_places(input_ids, labels)
        media = (pixel_values, image_grid_thw, video_grid_thw, input_features, audio_lengths)
        embeds = self.embed(input_ids, *media, vision_features, speech_features, places)
        if position_ids is None:
            position_ids, _ = self.model.get_rope_index(
                input_ids,
                mm_token_type_ids=mm_token_type_ids,
                image_grid_thw=image_grid_thw,
                video_grid_thw=video_grid_thw,
                attention_mask=attention_mask,
            )
        outputs = self.model.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=False if labels is not None else use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if labels is not None:
            row, column = places["predicting"]
            logits = self.lm_head(hidden[row, column]).float()
            total = F.cross_entropy(logits, labels[row, column + 1], reduction="sum")
            count = len(row) if num_items_in_batch is None else num_items_in_batch
            return CausalLMOutputWithPast(loss=total / count)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        of_each_row = not isinstance(keep, slice) and keep.ndim == 2
        rows = torch.arange(len(hidden), device=hidden.device)[:, None] if of_each_row else slice(None)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden[rows, keep]), past_key_values=outputs.past_key_values)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer, model and LoRA loaders
# ----------------------------------------------------------------------------------------------------------------------


def resolve_model_dir(
    name: str | Path, weights: bool = False, *, pickles: bool = False, flag: str = "--model_name_or_path"
) -> Path:
    """The folder of a model: `name` itself, or the hub id's snapshot (config and tokenizer, and `weights` if asked).

    Args:
        name: folder or hub id.
        weights: fetch the safetensors too.
        pickles: and the `.bin` files.
        flag: which the message names.

    Raises:
        VQAError: neither a folder nor a hub id that can be fetched.
    """
    if Path(name).is_dir():
        return Path(name)
    patterns = ["*.json", "*.txt", *(["model.safetensors", "model-*.safetensors"] if weights else [])]
    patterns += ["pytorch_model*.bin"] if weights and pickles else []
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise VQAError(
            f"{flag} {name}: no such folder, and not to be had from the hub ({reason}); "
            "name a folder with the model, or connect to the hub"
        ) from error


def read_config(path: Path) -> dict:
    """A JSON file of a model folder; VQAError where it cannot be read, or asks for code to be fetched and run."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise VQAError(f"{path}: no readable config ({error}); name a folder with a model") from error
    if not isinstance(stored, dict):
        raise VQAError(f"{path}: holds no JSON object; name a folder with a model")
    if stored.get("auto_map"):
        raise VQAError(
            f"{path}: its field auto_map asks for Python code from the model's author ({stored['auto_map']}), and this "
            "script runs none; remove the field if the model is a plain Qwen2-VL"
        )
    return stored


def load_config(model_name_or_path: str | Path) -> Qwen2VLConfig:
    """The model's config, from its folder or hub id; VQAError where there is none or it is not Qwen2-VL's."""
    path = resolve_model_dir(model_name_or_path) / "config.json"
    stored = read_config(path)
    if stored.get("model_type") != "qwen2_vl":
        raise VQAError(f"{path}: model_type is {stored.get('model_type')!r}, this script trains 'qwen2_vl'")
    quantization = stored.get("quantization_config") or {}
    method = quantization.get("quant_method", "bitsandbytes") if isinstance(quantization, dict) else quantization
    if method != "bitsandbytes":
        raise VQAError(
            f"{path}: quantization_config says {method!r}; this script reads 16-bit and bitsandbytes weights"
        )
    try:
        config = Qwen2VLConfig.from_pretrained(path.parent)
    except Exception as error:  # whatever a value of the wrong kind runs into in there
        reason = " ".join(str(error).split())
        raise VQAError(f"{path}: a field has a value that Qwen2-VL does not take ({reason}); copy it again") from error
    # The keys say which weights are in 4 bits; transformers would act on the field once more when saving.
    config.__dict__.pop("quantization_config", None)
    return config


def load_tokenizer(model_name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token apart from EOS and with `<|audio_pad|>`; says so where it sets a pad token.

    With PAD equal to EOS a mask by id hides the end of the answer, and a model is never taught to stop.
    """
    path = resolve_model_dir(model_name_or_path)
    if (path / "tokenizer_config.json").is_file():
        read_config(path / "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise VQAError(f"{path}: no readable tokenizer ({reason}); its tokenizer.json belongs there") from error
    if AUDIO_PAD not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [AUDIO_PAD]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        print("🔧 Setting dedicated pad token (was same as EOS)" if tokenizer.pad_token_id is not None else
              "🔧 Setting dedicated pad token (there was none)")  # fmt: skip
        tokenizer.add_special_tokens({"pad_token": NEW_PAD})
        print(f"   PAD token: {tokenizer.pad_token!r} (ID: {tokenizer.pad_token_id})")
        print(f"   EOS token: {tokenizer.eos_token!r} (ID: {tokenizer.eos_token_id})")
    return tokenizer


def turn_end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a turn, sorted: `<|im_end|>`, `<|endoftext|>` and the tokenizer's EOS."""
    vocab = tokenizer.get_vocab()
    return sorted({vocab[token] for token in (*TURN_ENDS, tokenizer.eos_token) if token in vocab})


def grow_embeddings(model: SurgicalVQAModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Add embedding and head rows for ids that have none; never shrink. New rows are the mean of the old ones.

    Returns:
        The number of rows added.
    """
    embeddings = model.get_input_embeddings()
    rows, needed = embeddings.num_embeddings, max(tokenizer.get_vocab().values()) + 1
    if needed <= rows:
        return 0
    model.resize_token_embeddings(needed, mean_resizing=False)
    for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        matrix.data[rows:] = matrix.data[:rows].mean(dim=0)
    return needed - rows


def load_model(
    model_name_or_path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    init: str = "pretrained",
    seed: int = 42,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    attn_implementation: str = "sdpa",
    audio_encoder: str | Path | None = None,
    load_in_4bit: bool = False,
    allow_pickle: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> SurgicalVQAModel:
    """The base model on `device`, frozen, in evaluation mode, with a row for every token id.

    Which checkpoint it is, the tensors' names and shapes say: transformers 4's or today's names, 16 bits or
    bitsandbytes' 4, speech encoder included or not. Every tensor has to fit. Prints how many came from where.

    Args:
        model_name_or_path: folder or hub id.
        tokenizer: from `load_tokenizer`.
        init: `pretrained`, or `random` for weights drawn from `seed` on `device` in `dtype`. Other devices and dtypes
            draw other numbers: `fingerprint` tells.
        seed: of the random weights, and of the projector where a Whisper encoder is newly grafted on.
        dtype: of the weights.
        device: `meta` allocates nothing, and checks the weights' names and shapes where they are already on disk.
        attn_implementation: one of `ATTENTION_KERNELS`.
        audio_encoder: folder or hub id of a Whisper, for a Qwen2-VL without speech encoder.
        load_in_4bit: keep the decoder's 4-bit weights.
        allow_pickle: read pickled weights where there are no safetensors.
        compute_dtype: of the products, which autocast decides. None: `dtype`.

    Raises:
        VQAError: no weights, or missing, unexpected or mis-shaped tensors.
    """
    check_attention(attn_implementation, compute_dtype or dtype)
    config = load_config(model_name_or_path)
    stated, actual = getattr(config, "audio_token_id", None), tokenizer.convert_tokens_to_ids(AUDIO_PAD)
    if stated is not None and stated != actual:
        raise VQAError(
            f"{model_name_or_path}: config.json says audio_token_id {stated}, the tokenizer has {AUDIO_PAD} as "
            f"{actual}; tokenizer and config must belong together"
        )
    config.audio_token_id = actual
    device = torch.device(device)
    on_meta = device.type == "meta"
    folder = resolve_model_dir(model_name_or_path, weights=init != "random" and not on_meta, pickles=allow_pickle)
    stored, unused = {}, 0
    if init != "random" and (not on_meta or any(folder.glob("model*.safetensors"))):
        stored, unused = find_weights(folder, audio_encoder, allow_pickle)
    config.audio_config = audio_geometry(config, stored, audio_encoder)
    build = partial(SurgicalVQAModel._from_config, config, dtype=dtype, attn_implementation=attn_implementation)
    if init == "random" and not on_meta:
        with torch.random.fork_rng(), device:
            torch.manual_seed(seed)
            model = build()
    else:
        # Buffers are computed, not loaded: with weights to come they are needed in earnest.
        with device if on_meta else accelerate.init_empty_weights(include_buffers=False):
            model = build()
        model.tie_weights()  # accelerate parts a head from the embeddings that it shares, as in Qwen2-VL-2B
    if load_in_4bit and (stored or init == "random") and not any(tensor.statistics for tensor in stored.values()):
        raise VQAError("--load_in_4bit keeps weights that are stored in 4 bits, and here none are; leave it out")
    if model.lm_head.weight is model.get_input_embeddings().weight:
        drop_tied_head(stored, read=not on_meta)
    if stored:
        check_fit(model, stored, folder, untrained=["audio_projector.weight"] if audio_encoder else [])
    if stored and not on_meta:
        load_weights(model, stored, dtype, device, load_in_4bit)
        print("   Weights: " + describe_sources(stored, unused, load_in_4bit))
        if "audio_projector.weight" not in stored:
            draw_projector(model, seed, dtype, device)
            print(f"   audio_projector is UNTRAINED: drawn from seed {seed}; the model hears nothing before training")
        model.to(device)  # the buffers; the weights are there
    grow_embeddings(model, tokenizer)
    model.generation_config.eos_token_id = turn_end_ids(tokenizer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.requires_grad_(False).eval()


def check_attention(name: str, dtype: torch.dtype) -> None:
    """VQAError where the attention kernel `name` is none of ours, or cannot run here in `dtype`."""
    if name not in ATTENTION_KERNELS:  # transformers would fetch other names from the hub, and run them
        raise VQAError(f"--attn_implementation must be one of {', '.join(ATTENTION_KERNELS)}, not {name!r}")
    if name == "flash_attention_2":
        if not is_flash_attn_2_available():
            raise VQAError(
                "--attn_implementation flash_attention_2 needs a CUDA GPU and the flash-attn package: run `pip install "
                "flash-attn --no-build-isolation`, or leave the flag out (sdpa needs nothing and is as exact)"
            )
        if dtype == torch.float32:
            raise VQAError("--attn_implementation flash_attention_2 computes in 16 bits only: add --bf16 True")


@dataclass(slots=True)
class StoredTensor:
    """A tensor of a checkpoint on disk, its bytes not yet read."""

    file: Path
    key: str
    shape: tuple[int, ...]  # of the weight that comes out, also where it is packed in 4 bits
    statistics: dict[str, "StoredTensor"] = field(default_factory=dict)  # of a 4-bit weight: absmax, quant_map, ...


class PickledWeights(dict):
    """The tensors of a torch pickle under the methods of `safe_open` that are needed here."""

    get_tensor = dict.__getitem__

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.clear()


def open_weights(file: Path, device: torch.device | str = "cpu") -> safe_open | PickledWeights:
    """The tensors of a weight file, each read onto `device` when asked for; VQAError where the file is torn."""
    try:
        if file.suffix == ".safetensors":
            return safe_open(file, framework="pt", device=str(device))
        weights = PickledWeights(torch.load(file, map_location="cpu", mmap=True, weights_only=True))
    except UNREADABLE as error:
        kind = "safetensors" if file.suffix == ".safetensors" else "weights"
        raise VQAError(f"{file}: not a readable {kind} file ({error}); copy it again") from error
    if not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise VQAError(f"{file}: holds more than weights; save the model's state_dict alone, as safetensors")
    return weights


def weight_files(folder: Path, allow_pickle: bool = False) -> list[Path]:
    """The weight files of a model folder, from its index if it has one.

    Safetensors where there are any; then pickles beside them are left alone.

    Raises:
        VQAError: there are none, or pickles only without `allow_pickle`.
    """
    pickles = sorted(
        file
        for file in folder.iterdir()
        if file.suffix in (".bin", ".pt", ".pth") and not re.fullmatch(NO_WEIGHTS, file.name)
    )
    index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if not index.is_file() and not files[0].is_file():
        if shards := sorted(folder.glob("model-*.safetensors")):
            return shards
        if pickles and not allow_pickle:
            raise VQAError(
                f"{pickles[0]}: a pickle, which can run code when it is read; get the model as safetensors, or give "
                "train_vqa.py or merge_stage2_to_bf16.py --allow_pickle, which then reads tensors only"
            )
        index, files = folder / "pytorch_model.bin.index.json", pickles or files
    if index.is_file():
        try:
            files = [folder / name for name in sorted(set(read_config(index)["weight_map"].values()))]
        except (KeyError, AttributeError, TypeError) as error:
            raise VQAError(f"{index}: holds no weight_map; copy it again") from error
    raise_problems([f"{file}: no such file; the model's weights belong there" for file in files if not file.is_file()])
    return files


def list_tensors(folder: Path, allow_pickle: bool = False) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by its key, from the files' headers; 4-bit weights with their statistics.

    Raises:
        VQAError: no weights, a torn file, a key in two files, or a 4-bit weight whose statistics do not fit.
    """
    tensors, problems = {}, []
    for file in weight_files(folder, allow_pickle):
        with open_weights(file) as handle:
            for key in handle.keys():  # noqa: SIM118
                if key in tensors:
                    problems.append(f"{file}: tensor {key} is in {tensors[key].file} too; remove one of the files")
                shape = handle[key].shape if isinstance(handle, dict) else handle.get_slice(key).get_shape()
                tensors[key] = StoredTensor(file, key, tuple(shape))
    raise_problems(problems + fold_4bit(tensors))
    return tensors


def fold_4bit(tensors: dict[str, StoredTensor]) -> list[str]:
    """Move the statistics of bitsandbytes' 4-bit weights from `tensors` into their weights; returns what is amiss."""
    packed, problems = {}, []
    for key in list(tensors):
        if match := FOUR_BIT_KEY.fullmatch(key):
            packed.setdefault(match[1], {})[match[2]] = tensors.pop(key)
    for key, found in packed.items():
        file = next(iter(found.values())).file
        state_name = next((name for name in found if name.startswith("quant_state.")), None)
        if key not in tensors or state_name is None:
            lacking = key if state_name else f"{key}.quant_state.bitsandbytes__nf4 (or __fp4)"
            problems.append(f"{file}: tensor {lacking} of a 4-bit weight is missing; copy the model again")
            continue
        try:
            with open_weights(found[state_name].file) as handle:
                state = json.loads(bytes(handle.get_tensor(found[state_name].key).tolist()))
            shape, size = tuple(state["shape"]), math.prod(state["shape"])
            blocks = math.ceil(size / state["blocksize"])
            wanted = {"absmax": (blocks,), "quant_map": (16,), state_name: found[state_name].shape}
            if "nested_blocksize" in state:  # double quantisation: the absmax are themselves 8-bit codes
                nested = math.ceil(blocks / state["nested_blocksize"])
                wanted |= {"nested_absmax": (nested,), "nested_quant_map": (256,)}
        except (ValueError, KeyError, TypeError):
            problems.append(
                f"{file}: tensor {found[state_name].key} is no state of a 4-bit weight; copy the model again"
            )
            continue
        stored = {name: part.shape for name, part in found.items()} | {"": tensors[key].shape}
        wanted[""] = (math.ceil(size / 2), 1)  # two values a byte
        for name in wanted | stored:
            full, has, needs = f"{key}.{name}".rstrip("."), stored.get(name), wanted.get(name)
            if has != needs:
                what = f"has shape {has}, a 4-bit weight of shape {shape} needs {needs}"
                what = "of a 4-bit weight is missing" if has is None else "is unexpected" if needs is None else what
                problems.append(f"{file}: tensor {full} {what}; copy the model again")
        tensors[key].shape, tensors[key].statistics = shape, found
    return problems


def find_weights(
    folder: Path, audio_encoder: str | Path | None = None, allow_pickle: bool = False
) -> tuple[dict[str, StoredTensor], int]:
    """The tensors of a model folder under this model's names, with those of a Whisper's encoder if one is named.

    Returns:
        Name -> tensor, and the number of the Whisper's tensors that have no use here (its decoder).

    Raises:
        VQAError: as `list_tensors`; two keys for one name; no speech encoder, or two.
    """
    keys = [(current_name(key), tensor) for key, tensor in list_tensors(folder, allow_pickle).items()]
    unused, hears = 0, any(name.startswith("audio_encoder.") for name, _ in keys)
    if hears and audio_encoder:
        raise VQAError(f"{folder}: brings its own speech encoder (audio_encoder.*); leave --audio_encoder out")
    if not hears and not audio_encoder:
        raise VQAError(
            f"{folder}: holds no audio_encoder.* tensors, so it is a plain Qwen2-VL that cannot hear; name a Whisper "
            "whose encoder it gets: --audio_encoder openai/whisper-large-v3-turbo (the projector then starts untrained)"
        )
    if audio_encoder:
        source = resolve_model_dir(audio_encoder, weights=True, pickles=allow_pickle, flag="--audio_encoder")
        whisper = list_tensors(source, allow_pickle)
        used = {key: t for key, t in whisper.items() if not re.match(r"(?:model\.)?decoder\.|proj_out\.", key)}
        keys += [(re.sub(r"^(?:model\.)?encoder\.", "audio_encoder.", key), tensor) for key, tensor in used.items()]
        unused = len(whisper) - len(used)
    stored, problems = {}, []
    for name, tensor in keys:
        if name in stored:
            problems.append(f"{tensor.file}: {tensor.key} and {stored[name].key} are both {name}; remove one")
        stored[name] = tensor
    raise_problems(problems)
    return stored, unused


def audio_geometry(config: Qwen2VLConfig, stored: dict[str, StoredTensor], audio_encoder: str | Path | None) -> dict:
    """What `config.audio_config` has to say: the Whisper's config, else the model's own, else read from the shapes.

    The 4.47 layout says nothing. Of a number that several tensors show, the commonest counts: then the odd one is
    named, not all the others.

    Raises:
        VQAError: the Whisper's config is none, or the tensors that show the geometry are missing.
    """
    if audio_encoder:
        path = resolve_model_dir(audio_encoder, flag="--audio_encoder") / "config.json"
        whisper = read_config(path)
        if whisper.get("model_type") != "whisper":
            raise VQAError(f"--audio_encoder {path}: model_type is {whisper.get('model_type')!r}, not 'whisper'")
        return {"model_type": "whisper", **{k: whisper[k] for k in AUDIO_CONFIG_FIELDS if k in whisper}}
    stated = getattr(config, "audio_config", None)
    if stated or not stored:
        return stated or WHISPER_LARGE_V3_TURBO
    shapes = {name: t.shape for name, t in stored.items() if name.startswith(("audio_encoder.", "audio_projector."))}
    needed = [f"audio_encoder.{name}.weight" for name in ("conv1", "embed_positions", "layer_norm", "layers.0.fc1")]
    folder = next(iter(stored.values())).file.parent
    raise_problems([f"{folder}: tensor {name} is missing; copy it again" for name in needed if name not in shapes])
    layers = [int(match[1]) for name in shapes if (match := re.match(r"audio_encoder\.layers\.(\d+)\.", name))]
    width = statistics.mode(s[0] for name, s in shapes.items() if re.search(r"(?:layer_norm|fc2|_proj)\.", name))
    return {
        "model_type": "whisper",
        "d_model": width,
        "encoder_layers": max(layers) + 1,
        "encoder_attention_heads": width // WHISPER_HEAD_SIZE,
        "encoder_ffn_dim": statistics.mode(s[0] for name, s in shapes.items() if ".fc1." in name),
        "num_mel_bins": (*shapes["audio_encoder.conv1.weight"], 1)[1],  # a tensor with one axis is named later
        "max_source_positions": shapes["audio_encoder.embed_positions.weight"][0],
    }


def current_name(key: str) -> str:
    """The name in this model of a stored tensor: transformers 4 had no `model.language_model.` and a bare `visual.`."""
    key = re.sub(r"^visual\.", "model.visual.", key)
    return re.sub(r"^model\.(?!language_model\.|visual\.)", "model.language_model.", key)


def name_on_disk(name: str, keys: Iterable[str]) -> str:
    """The key that `name`, a name in this model, would have beside `keys`: the name that people find in their files."""
    if name.startswith("audio_encoder."):  # a Whisper's own says `model.encoder.` or `encoder.`
        prefixes = (match[0] for key in keys if (match := re.match(r"(?:model\.|audio_)?encoder\.", key)))
        return next(prefixes, "audio_encoder.") + name.removeprefix("audio_encoder.")
    if any("model.language_model." in key for key in keys):
        return name
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def drop_tied_head(stored: dict[str, StoredTensor], read: bool) -> None:
    """Leave out the copy of the embeddings that some files hold as head of a model that shares them.

    VQAError where it is no copy, which only shows when the two are `read`.
    """
    head, embeddings = stored.pop("lm_head.weight", None), stored.get("model.language_model.embed_tokens.weight")
    if read and head and embeddings and not torch.equal(read_tensor(head, "cpu"), read_tensor(embeddings, "cpu")):
        raise VQAError(
            f"{head.file}: {head.key} is not {embeddings.key}, and config.json says that they are one "
            "(tie_word_embeddings); set that to false"
        )


def check_fit(
    model: SurgicalVQAModel, stored: dict[str, StoredTensor], folder: Path, untrained: Sequence[str] = ()
) -> None:
    """Hold the names and shapes of `stored` against the model's parameters; `untrained` ones may be missing.

    Raises:
        VQAError: naming and counting tensors that are missing, unexpected or of another shape, and what that means.
    """
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}  # a tied head is listed once
    keys = [tensor.key for tensor in stored.values()]
    missing = [name for name in wanted if name not in stored and name not in untrained]
    homes = {name.split(".")[0]: tensor.file.parent for name, tensor in stored.items()}  # a Whisper's lies elsewhere
    unexpected = [tensor for name, tensor in stored.items() if name not in wanted]
    reshaped = [(t, wanted[name]) for name, t in stored.items() if name in wanted and t.shape != wanted[name]]
    raise_problems(
        [f"{homes.get(name.split('.')[0], folder)}: tensor {name_on_disk(name, keys)} is missing" for name in missing]
        + [f"{tensor.file}: unexpected tensor {tensor.key}" for tensor in unexpected]
        + [f"{t.file}: {t.key} has shape {t.shape}, the config says {shape}" for t, shape in reshaped],
        f"{len(missing)} missing, {len(unexpected)} unexpected, {len(reshaped)} mis-shaped of {len(wanted)} tensors: "
        + explain_misfit(missing, [tensor.key for tensor in unexpected], len(reshaped)),
    )


def explain_misfit(missing: Sequence[str], unexpected: Sequence[str], reshaped: int) -> str:
    """What weights that do not fit most likely are, and what to do."""
    if any("lora_" in key or key.startswith("base_model.") for key in unexpected):
        return "an adapter lies among the weights; fold it into its base with merge_stage2_to_bf16.py"
    if any(key.endswith((".SCB", ".qweight", ".qzeros", ".g_idx")) for key in unexpected):
        return "the weights are quantised in another way than bitsandbytes' 4 bits; get the 16-bit copy"
    if reshaped:
        return "config.json belongs to another model than the weights; take both from one place"
    if missing == ["audio_projector.weight"]:
        return "the link between speech encoder and decoder is lost; get the whole model, an adapter alone is not one"
    if missing and unexpected:
        return "the folder holds another architecture, or a copy with renamed tensors; get the original"
    if missing:
        return "the copy is not complete; fetch all of its files again"
    return "config.json describes a smaller model, or files of two models lie in one folder; keep one model's alone"


def load_weights(
    model: SurgicalVQAModel,
    stored: dict[str, StoredTensor],
    dtype: torch.dtype,
    device: torch.device,
    load_in_4bit: bool = False,
) -> None:
    """Fill `model` (on the meta device) from `stored`, file by file: in RAM lies one file at a time, as mapped pages.

    VQAError where weights are in 4 bits and bitsandbytes is missing.
    """
    bnb = import_bitsandbytes() if any(tensor.statistics for tensor in stored.values()) else None
    for file in sorted({tensor.file for tensor in stored.values()}):
        with open_weights(file, device) as handle:
            for name, tensor in stored.items():
                if tensor.file != file:
                    continue
                value = handle.get_tensor(tensor.key)
                if tensor.statistics:
                    state = {
                        part: handle.get_tensor(t.key) if t.file == file else read_tensor(t, device)
                        for part, t in tensor.statistics.items()
                    }
                    if load_in_4bit and re.fullmatch(LORA_TARGETS + r"\.weight", name):
                        keep_4bit(model, name, value, state, dtype, device)
                        continue
                    state = bnb.functional.QuantState.from_dict(state, device)
                    value = bnb.functional.dequantize_4bit(value.to(device), state)
                accelerate.utils.set_module_tensor_to_device(model, name, device, value.to(dtype))
    model.tie_weights()


def read_tensor(tensor: StoredTensor, device: torch.device) -> torch.Tensor:
    """One tensor as stored; the parts of a 4-bit weight may lie in another file than the weight."""
    with open_weights(tensor.file, device) as handle:
        return handle.get_tensor(tensor.key)


def import_bitsandbytes():
    """The bitsandbytes package, which only 4-bit weights need; VQAError where it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise VQAError(
            "these weights are stored in bitsandbytes' 4 bits: run `pip install bitsandbytes`, or name the 16-bit copy"
        ) from error
    return bitsandbytes


def keep_4bit(
    model: SurgicalVQAModel, name: str, packed: torch.Tensor, state: dict, dtype: torch.dtype, device: torch.device
) -> None:
    """Replace the linear layer of the weight `name` by one that computes in `dtype` from `packed`, uint8 [n / 2, 1]."""
    bnb = import_bitsandbytes()
    layer, _, child = name.removesuffix(".weight").rpartition(".")
    linear = model.get_submodule(layer).get_submodule(child)
    with torch.device("meta"):
        kept = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype)
    kept.bias = linear.bias  # on its own key, before or after
    kept.weight = bnb.nn.Params4bit.from_prequantized(packed, state, device=device, module=kept)
    setattr(model.get_submodule(layer), child, kept)
    model.is_loaded_in_4bit = True  # PEFT then adapts this layer in its own way


def draw_projector(model: SurgicalVQAModel, seed: int, dtype: torch.dtype, device: torch.device) -> None:
    """A projector drawn from `seed` with the config's `initializer_range`, on the CPU: the same on every device."""
    weight = torch.empty(model.audio_projector.weight.shape)
    weight.normal_(0.0, model.config.text_config.initializer_range, generator=torch.Generator().manual_seed(seed))
    model.audio_projector.weight = nn.Parameter(weight.to(device, dtype))


def describe_sources(stored: dict[str, StoredTensor], unused: int, load_in_4bit: bool) -> str:
    """How many tensors came from which folder, in how many files, how many were not used, how many in 4 bits."""
    parts = []
    for folder in dict.fromkeys(tensor.file.parent for tensor in stored.values()):
        tensors = [tensor for tensor in stored.values() if tensor.file.parent == folder]
        files = len({tensor.file for tensor in tensors})
        parts.append(f"{len(tensors)} tensors from {folder} ({files} file{'s' if files > 1 else ''})")
    if unused:
        parts.append(f"{unused} tensors of the Whisper decoder there not used")
    if packed := sum(bool(tensor.statistics) for tensor in stored.values()):
        kept = sum(bool(re.fullmatch(LORA_TARGETS + r"\.weight", n)) for n, t in stored.items() if t.statistics)
        parts.append(f"{packed} of them in 4 bits, {packed - kept if load_in_4bit else packed} dequantised")
    return ", ".join(parts)


def fingerprint(model: nn.Module) -> str:
    """Identity of the base, taken in memory: sha256 over what its config computes with, and over the name, shape and
    16 evenly spaced values, rounded to bf16, of every parameter.

    Adapters, LoRA layers and rows added for new tokens are left out. In memory, and not from the files, so that the
    same weights are one base under old and new names, in one file or many, in float32 or bf16, kept in 4 bits or
    dequantised, and drawn at random.
    """
    text, vision, audio = model.config.text_config, model.config.vision_config, audio_config_of(model.config)
    numbers = [text.num_attention_heads, text.num_key_value_heads, text.rms_norm_eps, vision.num_heads]
    numbers += [text.rope_parameters["rope_theta"], *text.rope_parameters["mrope_section"]]
    numbers += [vision.spatial_merge_size, audio.encoder_attention_heads]
    digest = hashlib.sha256(repr([float(number) for number in numbers]).encode())
    for name, tensor in sorted(model.named_parameters()):
        if "lora_" in name or "modules_to_save" in name:
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        if getattr(tensor, "quant_state", None) is not None:
            tensor = import_bitsandbytes().functional.dequantize_4bit(tensor.data, tensor.quant_state)
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensor = tensor[: model.stored_rows]
        flat = tensor.detach().flatten()
        picked = flat[:: max(1, flat.numel() // 16)][:16].to(torch.bfloat16).float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(picked.numpy().tobytes())
    return digest.hexdigest()


def add_lora(
    model: SurgicalVQAModel,
    r: int = 64,
    alpha: int = 16,
    dropout: float = 0.05,
    *,
    vision_tower: bool = False,
    audio_encoder: bool = False,
) -> PeftModel:
    """LoRA on the seven linear layers of every decoder layer; the projector, and the towers asked for, are trained
    whole, in float32 copies beside the frozen originals.

    Raises:
        RuntimeError: the adapters did not land on exactly those layers.
    """
    towers = [TOWERS["vision_tower"]] * vision_tower + [TOWERS["audio_encoder"]] * audio_encoder
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=LORA_TARGETS,
        modules_to_save=[PROJECTOR, *towers],
    )
    peft_model = get_peft_model(model, config)
    adapted = [name for name, _ in peft_model.named_parameters() if name.endswith("lora_A.default.weight")]
    expected = LORA_MODULES_PER_LAYER * model.config.text_config.num_hidden_layers
    if len(adapted) != expected or not all(".language_model.layers." in name for name in adapted):
        raise RuntimeError(f"LoRA on {len(adapted)} layers, expected {expected} in the decoder alone")
    # A step of 2e-4 is lost in bf16's 8 bits; PEFT keeps its own layers in float32, but not the copies it saves.
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.float()
    model.trains_vision, model.trains_audio = vision_tower, audio_encoder
    freeze_sinusoids(model)
    return peft_model


def train_whole(
    model: SurgicalVQAModel, dtype: torch.dtype, *, vision_tower: bool = False, audio_encoder: bool = False
) -> SurgicalVQAModel:
    """`model`, loaded in float32, with decoder, embeddings, head and projector trainable, and the towers asked for;
    frozen towers are rounded to `dtype`."""
    model.requires_grad_(True)
    model.trains_vision, model.trains_audio = vision_tower, audio_encoder
    for tower, trained in ((model.model.visual, vision_tower), (model.audio_encoder, audio_encoder)):
        if not trained:
            for weight in tower.requires_grad_(False).parameters():  # not `tower.to`: rotary frequencies stay exact
                weight.data = weight.data.to(dtype)
    freeze_sinusoids(model)
    return model


def freeze_sinusoids(model: SurgicalVQAModel) -> None:
    """Whisper's positions are fixed sinusoids; neither PEFT nor `requires_grad_` knows."""
    model.audio_encoder.embed_positions.requires_grad_(False)


def print_trainable_parameters(model: SurgicalVQAModel | PeftModel) -> None:
    """Print how many parameters are trained, of how many, in PEFT's words also where there is no adapter."""
    if isinstance(model, PeftModel):
        model.print_trainable_parameters()
        return
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")


def skip_input_casts(model: nn.Module) -> None:
    """Stop PEFT from casting each LoRA input to float32: under autocast, as in training, it is cast back at once."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


def save_new_rows(model: PeftModel, folder: Path) -> None:
    """Write the embedding and head rows that `grow_embeddings` added, if any, beside the adapter in `folder`."""
    matrices = {"embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
    rows = {name: matrix.weight[model.stored_rows :].detach().cpu().clone() for name, matrix in matrices.items()}
    if len(rows["embed_tokens"]):
        save_file(rows, folder / NEW_ROWS_FILE)


def load_new_rows(model: SurgicalVQAModel, folder: Path) -> None:
    """Put the rows of `save_new_rows` into a model that `grow_embeddings` has given room for them.

    Raises:
        VQAError: the adapter's rows and the model's are not equally many.
    """
    file = folder / NEW_ROWS_FILE
    stored = {}
    if file.is_file():
        with open_weights(file) as handle:
            stored = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    matrices = {"embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
    for name, matrix in matrices.items():
        room = matrix.weight.data[model.stored_rows :]
        shape = tuple(stored[name].shape) if name in stored else (0, room.shape[1])
        if shape != tuple(room.shape):
            raise VQAError(
                f"{file}: rows of {name} for new tokens have shape {shape}, the base has room for {tuple(room.shape)}; "
                "load the base with the tokenizer saved beside the adapter"
            )
        if room.numel():
            room.copy_(stored[name])


def write_weights(weights: dict[str, torch.Tensor], folder: Path, verbose: bool = False) -> None:
    """Write safetensors shards and their index; of weights on a GPU, one shard at a time lies in RAM.

    `weights` share no storage.
    """
    split = split_torch_state_dict_into_shards(weights, max_shard_size=SHARD_BYTES)
    groups = list(split.filename_to_tensors.values())
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: weights[name].detach().cpu().contiguous() for name in group}, file, metadata={"format": "pt"})
        file.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that only their owner may read
        weight_map |= dict.fromkeys(group, file.name)
        if verbose:
            print(f"   {file.name}: {len(group)} tensors, {file.stat().st_size / 1e9:.2f} GB")
    index = {"metadata": split.metadata, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_description(model: SurgicalVQAModel, tokenizer: PreTrainedTokenizerBase, base: Path, folder: Path) -> None:
    """Write config, generation config, tokenizer and processor files; those of `base` where it has them."""
    model.config.architectures = ["Qwen2VLForConditionalGeneration"]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    VQAProcessor(tokenizer, model.config).image_processor.save_pretrained(folder)
    for name in COPIED_FILES:
        if (base / name).is_file():
            read_config(base / name) if name.endswith(".json") else None  # refuses one that asks for code
            shutil.copyfile(base / name, folder / name)


def read_whole(model: SurgicalVQAModel, folder: Path) -> None:
    """Fill `model` in place, each parameter in its own dtype, from a folder that `write_weights` wrote.

    Raises:
        VQAError: missing, unexpected or mis-shaped tensors, or a torn file.
    """
    stored, _ = find_weights(folder)
    check_fit(model, stored, folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read_tensor(stored[name], parameter.device))


def read_adapter_config(path: Path) -> dict:
    """An adapter's config; VQAError where it asks for another computation than plain LoRA."""
    config, plain = read_config(path), LoraConfig()
    for name, value in config.items():
        if name not in ADAPTER_FIELDS_READ and value and value != getattr(plain, name, None):
            raise VQAError(f"{path}: {name} is {value!r}, which this script does not compute; it reads plain LoRA")
    kind, numbers = config.get("peft_type"), [config.get("r"), config.get("lora_alpha")]
    if kind != "LORA" or not all(isinstance(number, int | float) for number in numbers):
        raise VQAError(f"{path}: peft_type {kind!r}, r and lora_alpha {numbers}; this script reads LoRA")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise VQAError(
            f"{path}: init_lora_weights {config['init_lora_weights']!r} changed the base as well; merge the adapter "
            "where it was trained, and take the merged model"
        )
    known, saved = (PROJECTOR, *TOWERS.values()), config.get("modules_to_save") or []
    if not isinstance(saved, list):
        raise VQAError(f"{path}: modules_to_save is {saved!r:.80}, no list; copy the adapter again")
    other = [name for name in saved if str(name).rpartition(".")[2] not in known]
    if other:
        raise VQAError(
            f"{path}: modules_to_save names {', '.join(map(str, other))}; this script reads adapters that trained "
            f"{', '.join(known)} whole, and no other part"
        )
    return config


def current_adapter_name(key: str) -> str:
    """As `current_name`, behind PEFT's `base_model.model.`, without the parts that only a live model's names have."""
    name = re.sub(r"\.modules_to_save(?:\.default)?(?=\.)|\.default(?=\.weight$)", "", key)
    return "base_model.model." + current_name(name.removeprefix("base_model.model."))


def read_adapter(path: Path, rank: int, allow_pickle: bool = False) -> dict[str, tuple[str, torch.Tensor]]:
    """Name in the live model -> (key, tensor) of every tensor in an adapter folder.

    Raises:
        VQAError: no adapter there, a pickle without `allow_pickle`, two keys for one name, a rank that is not `rank`,
            values that are not finite, or LoRA that was never trained.
    """
    file, pickled = path / "adapter_model.safetensors", path / "adapter_model.bin"
    if not file.is_file() and pickled.is_file():
        if not allow_pickle:
            raise VQAError(f"{pickled}: a pickle; get the adapter as safetensors, or pass --allow_pickle")
        file = pickled
    if not file.is_file():
        raise VQAError(f"{path}: holds no adapter (adapter_config.json, adapter_model.safetensors)")
    with open_weights(file) as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    stored, problems = {}, []
    for key, tensor in tensors.items():
        name = current_adapter_name(key)
        if name in stored:
            problems.append(f"{file}: {key} and {stored[name][0]} are both {name}; copy the adapter again")
        side = 0 if ".lora_A." in key else 1
        if ".lora_" in key and tensor.ndim == 2 and tensor.shape[side] != rank:
            problems.append(
                f"{file}: {key} has rank {tensor.shape[side]}, adapter_config.json says r = {rank}; the two files come "
                "from different runs"
            )
        if not torch.isfinite(tensor).all():
            problems.append(
                f"{file}: {key} holds values that are not finite; the training diverged, take an earlier one"
            )
        stored[name] = (key, tensor)
    raise_problems(problems)
    if not any(tensor.any() for key, tensor in tensors.items() if ".lora_B." in key):
        raise VQAError(f"{file}: every lora_B is zero, so the adapter does nothing: it was saved before its first step")
    return stored


def check_base(model: SurgicalVQAModel, adapter: Path) -> None:
    """VQAError where the adapter's settings name another base than `model`; says so where it brings no settings."""
    if not (adapter / SETTINGS_FILE).is_file():
        print(f"   {adapter} has no {SETTINGS_FILE}: nothing says which base it was trained on, so none was compared")
        return
    trained_on, found = load_settings(adapter)["model"], fingerprint(model)
    if trained_on.get("base_fingerprint") is None:
        print(f"   {adapter}: its {SETTINGS_FILE} has no base_fingerprint, so no base was compared")
    elif trained_on["base_fingerprint"] != found:
        base = f"its base was {trained_on['model_name_or_path']}, name that one"
        if trained_on.get("init") == "random":
            base = (
                f"its base was drawn from seed {trained_on.get('init_seed')} in {trained_on.get('dtype')} on "
                f"{trained_on.get('init_device')}; another seed, kind of device or torch version draws other weights"
            )
        raise VQAError(
            f"{adapter}: was trained on another base than the one loaded (fingerprint "
            f"{trained_on['base_fingerprint'][:12]}, not {found[:12]}); {base}"
        )


def load_adapter(model: SurgicalVQAModel, path: str | Path, *, allow_pickle: bool = False) -> PeftModel:
    """`model` with the adapter of `path`, under transformers 4's or today's names, every tensor of it accounted for.

    Args:
        model: the base; changed in place.
        path: folder of train_vqa.py or of PEFT.
        allow_pickle: read an adapter_model.bin where there are no safetensors.

    Raises:
        VQAError: no adapter there, one that was never trained or was trained on another base, or tensors that do not
            fit.
    """
    path = Path(path)
    if not (path / "adapter_config.json").is_file():
        raise VQAError(f"{path}: holds no adapter (adapter_config.json, adapter_model.safetensors)")
    config = read_adapter_config(path / "adapter_config.json")
    stored = read_adapter(path, config["r"], allow_pickle)
    check_base(model, path)
    load_new_rows(model, path)
    whole = {str(name).rpartition(".")[2] for name in config.get("modules_to_save") or ()}
    towers = {flag: name in whole for flag, name in TOWERS.items()}
    peft_model = add_lora(model, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), **towers)
    wanted = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    keys = [key for key, _ in stored.values()]
    unexpected = [key for name, (key, _) in stored.items() if name not in wanted]
    astray = [key for key in unexpected if ".audio_encoder." in key or ".visual." in key]
    hint = (
        f"{len(astray)} tensors adapt the speech encoder or the vision tower: target_modules like 'q_proj' match there "
        "too, and here both stay as they are; train the adapter with train_vqa.py, or merge it where it was trained"
        if astray
        else "the adapter belongs to a model of another size or layout, or its copy is not complete"
    )
    raise_problems(
        [f"{path}: tensor {name_on_disk(name, keys)} is missing" for name in wanted if name not in stored]
        + [f"{path}: unexpected tensor {key}" for key in unexpected]
        + [
            f"{path}: {key} has shape {tuple(tensor.shape)}, the model wants {tuple(wanted[name].shape)}"
            for name, (key, tensor) in stored.items()
            if name in wanted and tensor.shape != wanted[name].shape
        ],
        hint,
    )
    set_peft_model_state_dict(peft_model, {name: tensor for name, (_, tensor) in stored.items()})
    landed = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    raise_problems(
        [
            f"{path}: {key} did not reach the model; report this together with the versions of peft and torch"
            for name, (key, tensor) in stored.items()
            if not torch.equal(landed[name], tensor.to(landed[name]))
        ]
    )
    return peft_model.eval()


def fold_adapter(model: PeftModel) -> SurgicalVQAModel:
    """The base with the adapter in its own weights, changed in place, one layer at a time.

    W + alpha / r * B A is summed in float32 and rounded once, to the dtype of W; PEFT's `merge_and_unload` adds the
    update in the dtype of the weight. What was trained whole keeps the dtype that it was trained in, float32.
    """
    base = model.get_base_model()
    with torch.no_grad():
        for name, layer in list(base.named_modules()):
            if isinstance(layer, LoraLayer):
                update = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
                weight = layer.base_layer.weight
                weight.copy_(weight.float() + layer.scaling["default"] * update)
                base.set_submodule(name, layer.base_layer)
            elif isinstance(layer, ModulesToSaveWrapper):
                base.set_submodule(name, layer.modules_to_save["default"])
    return base.requires_grad_(False).eval()


# ----------------------------------------------------------------------------------------------------------------------
# Feature cache
# ----------------------------------------------------------------------------------------------------------------------


def ahead(function: typing.Callable, items: Iterable, depth: int) -> Iterator:
    """`map(function, items)`, with up to `depth` results under way in threads while the caller uses the last one."""
    pending = deque()
    with ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def tower_digest(tower: nn.Module) -> str:
    """sha256 over the name, dtype, shape and every byte of a tower's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*tower.named_parameters(), *tower.named_buffers()]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def feature_recipes(model: SurgicalVQAModel, processor: VQAProcessor, by_ear: bool) -> dict[str, str]:
    """All that the features of a clip (`vision`) and of a speech (`speech`) depend on but their files, as text."""
    kind = model.device.type
    towers = {"vision": model.model.visual, "speech": model.audio_encoder}
    configs = {"vision": model.config.vision_config, "speech": audio_config_of(model.config)}
    shared = {
        "schema": FEATURE_SCHEMA,
        "dtype": str(model.dtype),
        "attention": model.config._attn_implementation,
        "float32_products": [torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision],
        "device": torch.cuda.get_device_name(model.device) if kind == "cuda" else kind,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
    own = {
        "vision": {
            "max_image_size": processor.max_image_size,
            "frame_mode": processor.frame_mode,
            "image_processor": processor.image_processor.to_dict(),
            "pillow": PIL_VERSION,
        },
        "speech": {
            "audio_tokens": processor.audio_tokens,
            "encoder_tokens": processor.encoder_tokens,
            "soundfile": soundfile.__libsndfile_version__,
            "torchaudio": importlib.metadata.version("torchaudio"),
        },
    }
    needed = ("vision", "speech") if by_ear else ("vision",)
    with ThreadPoolExecutor(2) as pool:  # hashlib lets go of the interpreter
        digests = dict(zip(needed, pool.map(lambda name: tower_digest(towers[name]), needed), strict=True))
    return {
        name: json.dumps([shared, own[name], configs[name].to_dict(), digests[name]], sort_keys=True, default=str)
        for name in needed
    }


def fill_feature_cache(
    model: SurgicalVQAModel, sources: Sequence, folder: str | Path, allow_errors: bool = False
) -> None:
    """Encode whatever clips and speech of `sources` `folder` lacks, and set `features` of each source.

    A clip, that is, its selected frames in order, and a speech go through their encoder alone, so that what is read is
    the same, bit for bit, whenever it was written and whatever batch it comes to stand in. Runs may share the folder.

    Args:
        model: its encoders stay as they are from here on; on the device that computes.
        sources: SurgicalVQADataset, or what has its `rows`, `processor`, `media_of` and `features`. Where `media_of`
            says None, or the media cannot be read, there are no features.
        folder: made where it is missing; a file a clip and a speech.
        allow_errors: pass over media that cannot be read.

    Raises:
        VQAError: the folder cannot be written or has no room, or media that cannot be read.
    """
    start, folder = time.monotonic(), Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for rest in folder.glob(UNFINISHED + "*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - rest.stat().st_mtime > STALE_SECONDS:
                    rest.unlink()
    except OSError as error:
        raise VQAError(
            f"--cache_features {folder}: cannot be written ({error.strerror}); name another folder"
        ) from error

    # 1. What is wanted, under which name
    users = {}  # a clip, as a tuple of paths, or the path of a speech -> its processor and a row that needs it
    for source in sources:
        for index, row in enumerate(source.rows):
            for medium in source.media_of(index):
                if medium:
                    users.setdefault(medium, (source.processor, row))
    if not users:
        return
    by_ear = any(isinstance(medium, Path) for medium in users)
    recipes = feature_recipes(model, next(iter(users.values()))[0], by_ear)

    def name(medium: tuple[Path, ...] | Path) -> Path | None:
        kind, paths = ("speech", (medium,)) if isinstance(medium, Path) else ("vision", medium)
        try:
            content = [digest_of(path) for path in paths]
        except OSError as error:
            if allow_errors:
                return None
            raise VQAError(f"{error.filename}: cannot be read ({error.strerror})") from error
        digest = hashlib.sha256(json.dumps([recipes[kind], content]).encode()).hexdigest()
        return folder / f"{kind}-{digest}.safetensors"

    digest_of, depth = cache(sha256_of), 2 * MAX_WORKERS
    files = dict(zip(users, ahead(name, users, depth), strict=True))

    # 2. What is missing or damaged
    def lacks(file: Path | None) -> bool:
        if file is None or not file.exists():
            return file is not None
        try:
            read_features(file)
        except VQAError:
            print(f"{file}: damaged; computing it again")
            return True
        return False

    unique = dict(zip(files.values(), files, strict=True))  # media of one content are one file
    lacking = [unique[file] for file, lacked in zip(unique, ahead(lacks, unique, depth), strict=True) if lacked]

    # 3. Room for it
    widths = {"vision": model.config.text_config.hidden_size, "speech": audio_config_of(model.config).d_model}

    def size(medium: tuple[Path, ...] | Path) -> int:
        processor, _ = users[medium]
        with contextlib.suppress(*DECODE_ERRORS, soundfile.SoundFileError):  # which decoding names
            if isinstance(medium, Path):
                return processor.speech_tokens(speech_length(medium)) * widths["speech"] * model.dtype.itemsize
            return sum(processor.vision_tokens(medium)) * widths["vision"] * model.dtype.itemsize
        return 0

    needed, free = sum(ahead(size, lacking, depth)), shutil.disk_usage(folder).free
    if needed > free:
        raise VQAError(
            f"--cache_features {folder}: features of {len(lacking)} clips and speech files take {needed:,} bytes, and "
            f"{free:,} are free there; make room, name a folder on another disk, or leave the flag out"
        )

    # 4. Decoding, ahead of the encoders; a file is written while the next one is computed
    def decode(medium: tuple[Path, ...] | Path) -> tuple[torch.Tensor, ...] | None:
        processor, row = users[medium]
        try:
            if isinstance(medium, Path):
                return processor.encode_speech(row, load_speech(medium))
            return processor.encode_frames(row, [load_frame(path, processor.max_image_size) for path in medium])
        except VQAError:
            if allow_errors:
                return None
            raise

    written, bar = deque(), tqdm(total=len(lacking), desc="Caching features", unit="file", disable=not lacking)
    decoded = ahead(decode, lacking, depth)
    try:
        with bar, contextlib.closing(decoded), ThreadPoolExecutor(2) as pool:
            for medium, inputs in zip(lacking, decoded, strict=True):
                bar.update()
                if inputs is None:
                    continue
                encode = model.hear if isinstance(medium, Path) else model.see
                with torch.no_grad():  # an adapter may bring a tower that was trained
                    features = encode(*(tensor.to(model.device) for tensor in inputs)).cpu()
                grid = None if isinstance(medium, Path) else inputs[1]
                written.append(pool.submit(write_features, files[medium], features, grid))
                if len(written) > depth:
                    written.popleft().result()
            for write in written:
                write.result()
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(folder).free
        raise VQAError(
            f"--cache_features {folder}: could not be written ({str(error).splitlines()[0]}), {free:,} bytes are free; "
            "make room and start again: what is written is kept"
        ) from error

    # 5. What each row reads
    kept = {medium: file if file and file.exists() else None for medium, file in files.items()}
    for source in sources:
        source.features = [
            tuple(kept.get(medium) for medium in source.media_of(index)) for index in range(len(source.rows))
        ]
    total = sum(file.stat().st_size for file in set(kept.values()) if file)
    found = [medium for file, medium in unique.items() if file]
    clips, speech, new_clips, new_speech = (
        sum(isinstance(medium, Path) == heard for medium in part)
        for part in (found, lacking)
        for heard in (False, True)
    )
    print(
        f"   Features in {folder}: {clips} clips and {speech} speech files, {new_clips} and {new_speech} of them "
        f"encoded now; {total:,} bytes, {time.monotonic() - start:.1f} s"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Settings, Trainer and callbacks
# ----------------------------------------------------------------------------------------------------------------------


def resolved_settings(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: VQATrainingArguments,
    processor: VQAProcessor,
    base_fingerprint: str,
    skipped: Sequence[str] = (),
) -> dict:
    """All that training chose, as JSON: `model` and `input` are what evaluation repeats, the rest is for the record."""
    packages = ("torch", "transformers", "peft", "accelerate", "pillow", "torchaudio", "soundfile")
    return {
        "model": {
            "model_name_or_path": model_args.model_name_or_path,
            "init": model_args.init,
            "init_seed": training_args.seed,
            "init_device": training_args.device.type,
            "dtype": "bfloat16" if training_args.bf16 else "float32",
            "attn_implementation": model_args.attn_implementation,
            "audio_encoder": model_args.audio_encoder,
            "load_in_4bit": model_args.load_in_4bit,
            "allow_pickle": model_args.allow_pickle,
            "base_fingerprint": base_fingerprint,
        },
        "input": {
            "input_mode": data_args.input_mode,
            "max_train_frames": data_args.max_train_frames,
            "max_eval_frames": data_args.max_eval_frames,
            "max_image_size": data_args.max_image_size,
            "audio_tokens": processor.audio_tokens,
            "encoder_tokens": processor.encoder_tokens,
            "frame_mode": processor.frame_mode,
            "instruction": INSTRUCTION,
        },
        "trained": {
            "decoder": model_args.train_decoder,
            "vision_tower": model_args.train_vision_tower,
            "audio_encoder": model_args.train_audio_encoder,
            "compile_layers": model_args.compile_layers,  # dropout is then drawn from other random numbers
            "use_liger_kernel": model_args.use_liger_kernel,  # rounds otherwise
        },
        "lora": {"r": model_args.lora_r, "alpha": model_args.lora_alpha, "dropout": model_args.lora_dropout}
        if model_args.train_decoder == "lora"
        else {},
        "tokens": {
            "pad": processor.tokenizer.pad_token_id,
            "audio": processor.audio_id,
            "turn_ends": turn_end_ids(processor.tokenizer),
        },
        "data": {k: v for k, v in asdict(data_args).items() if k.endswith(("_path", "_dir", "_samples", "_features"))},
        "skipped": list(skipped),
        "training": json.loads(training_args.to_json_string()),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def load_settings(checkpoint: str | Path) -> dict:
    """The settings saved beside an adapter; VQAError where there are none, or of another kind."""
    path = Path(checkpoint) / SETTINGS_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["model"]["model_name_or_path"], settings["input"]["input_mode"]
        settings["model"]["init"], settings["model"]["init_seed"]
        parts = ("model", "input", "trained", "lora", "training", "data")
        if not all(isinstance(settings.get(part, {}), dict) for part in parts):
            raise TypeError("a section is no object")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise VQAError(f"{path}: no readable settings; name a folder that train_vqa.py wrote") from error
    return settings


def base_options(settings: dict) -> dict:
    """Keyword arguments of `load_model` that rebuild the base of `settings`, but for dtype, device and kernel."""
    model = settings["model"]
    return {
        "init": model["init"],
        "seed": model["init_seed"],
        "audio_encoder": model.get("audio_encoder"),
        "load_in_4bit": model.get("load_in_4bit", False),
        "allow_pickle": model.get("allow_pickle", False),
    }


class Interrupted(BaseException):
    """The run was asked to stop by the signal `signum`; its text says what is saved."""

    def __init__(self, signum: int, text: str = ""):
        super().__init__(f"Stopped by {signal.Signals(signum).name}: {text}")
        self.signum = signum


class StopSignal:
    """Takes SIGTERM, SIGINT and SIGHUP while the `with` lasts, but those that the caller ignores (as nohup does).

    Before training one of them ends the process at once. While `saves` is True it only sets `signum`, for the Trainer
    to finish its step and save; a third one kills.

    Args:
        finishing: said on the first signal while `saves`: what is done before the end.
        nothing: said at the end by one that came before that.
    """

    def __init__(self, finishing: str = "finishing the step and saving", nothing: str = "nothing had been trained yet"):
        self.finishing, self.nothing = finishing, nothing
        self.signum, self.count, self.saves, self.before = None, 0, False, {}

    def __enter__(self) -> "StopSignal":
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, _frame) -> None:
        self.count += 1
        self.signum = self.signum or signum
        if not self.saves:
            raise Interrupted(signum, self.nothing)
        if self.count > 2:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        what = self.finishing if self.count == 1 else f"still {self.finishing}; a third signal kills the run"
        os.write(2, f"\n{signal.Signals(signum).name}: {what}\n".encode())  # print is not safe in a handler


def ignore_stop_signals(init: typing.Callable | None, worker: int) -> None:
    """Start of a loader worker: a signal to the whole process group is the main process's to act on."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if init is not None:
        init(worker)


@contextlib.contextmanager
def lock_folder(folder: str | Path):
    """Hold `folder`, made if need be, for this process; VQAError where it cannot be, or where another run holds it.

    What an unfinished save left is removed.

    The lock is one of lockf, which dies with the process: flock's would live on in loader workers of a killed run.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / ".lock").open("w")
    except OSError as error:
        raise VQAError(
            f"--output_dir {folder}: cannot be written to ({error.strerror}); name another folder"
        ) from error
    with opened as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise VQAError(
                f"--output_dir {folder}: another run is writing there; wait for it or name another"
            ) from error
        for rest in folder.glob(UNFINISHED + "*"):
            if re.fullmatch(UNFINISHED + r"(save|checkpoint-\d+)", rest.name):  # and nothing of the user's own
                shutil.rmtree(rest)
        yield


def sync(path: Path) -> None:
    """Have a file or folder reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Write the sizes and hashes of the files of `folder` beside them, once all of them have reached the disk."""
    files = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (folder / MANIFEST_FILE).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    sync(folder / MANIFEST_FILE)
    sync(folder)


def find_damage(folder: str | Path, needed: Sequence[str] = ()) -> str | None:
    """What is wrong with a saved folder: a file of its manifest, or of those `needed`, that is missing or differs."""
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        stated = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except OSError:
        return f"{MANIFEST_FILE} is missing: the save did not end"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{MANIFEST_FILE} is damaged"
    for name in needed:
        if name not in stated:
            return f"{name} was not saved"
    for name, (size, digest) in stated.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if sha256_of(path) != digest:
            return f"{name} has changed since it was saved"
    return None


def checkpoints_of(folder: str | Path) -> dict[int, Path]:
    """The `checkpoint-N` folders of a run by N, newest first, whole or not."""
    found = {int(p.name[11:]): p for p in Path(folder).glob("checkpoint-*") if re.fullmatch(r"\d+", p.name[11:])}
    return dict(sorted(found.items(), reverse=True))


def find_checkpoint(args: VQATrainingArguments) -> Path | None:
    """The checkpoint that --resume_from_checkpoint asks for; None: start at the beginning.

    True takes the newest one that is whole, and names those passed over.

    Raises:
        VQAError: the named one is not whole, none is, or the run would write among later checkpoints of another.
    """
    flag, existing = args.resume_from_checkpoint, checkpoints_of(args.output_dir)
    flag = {"true": True, "false": None}.get(flag.lower(), flag) if isinstance(flag, str) else flag
    if flag is True:
        damaged = []
        for folder in existing.values():
            damage = find_damage(folder, RESUME_FILES)
            if damage is None:
                print("".join(f"Passing over {text}\n" for text in damaged), end="")
                return folder
            damaged.append(f"{folder}: {damage}")
        if damaged:
            raise VQAError("\n".join([*damaged, "no checkpoint is whole; move them away to start from the beginning"]))
        print("No checkpoint to go on from; starting from the beginning.")
        return None
    chosen = Path(flag) if flag else None
    damage = find_damage(chosen, RESUME_FILES) if chosen else None
    if damage:
        raise VQAError(f"--resume_from_checkpoint {chosen}: {damage}; name another, or True for the newest whole one")
    step = int(chosen.name[11:]) if chosen and re.fullmatch(r"checkpoint-\d+", chosen.name) else -1
    later = [folder for number, folder in existing.items() if number > step]
    if later:
        raise VQAError(
            f"{later[0]} is there from an earlier run; --resume_from_checkpoint True goes on from it, or move it away, "
            "or name another --output_dir"
        )
    return chosen


def refuse_other_settings(checkpoint: Path, settings: dict) -> None:
    """VQAError where a run would go on from a checkpoint of another model, input, LoRA shape, schedule or data.

    The optimizer's state brings its learning rate along, so that another --learning_rate would be passed over.
    """
    stored = load_settings(checkpoint)
    once = dict.fromkeys((*TOWERS, "compile_layers", "use_liger_kernel"), False)  # there was nothing else
    once["decoder"] = "lora"
    stored["trained"] = once | stored.get("trained", {})
    fixed = {
        **{part: settings[part].keys() - {"max_eval_frames"} for part in ("model", "input", "trained", "lora")},
        "training": {"learning_rate", "lr_scheduler_type", "optim", "weight_decay", "seed"}
        | {"per_device_train_batch_size", "gradient_accumulation_steps"},
        "data": {"train_data_path", "max_train_samples"},
    }
    raise_problems(
        [
            f"{checkpoint}: was trained with {name} {stored.get(part, {}).get(name)!r}, this run has "
            f"{settings[part][name]!r}; go on with the same flags, or start another run"
            for part, names in fixed.items()
            for name in sorted(names)
            if stored.get(part, {}).get(name) != settings[part][name]
        ]
    )


class VQATrainer(Trainer):
    """Trainer whose checkpoints hold the adapter (or without one the whole model), the tokenizer and the settings.

    A save is written aside, synced, listed in a manifest and only then named. A run that ended early and went on from
    its last checkpoint is the same, bit for bit on the CPU, as one that did not.

    Args:
        tokenizer: saved with every checkpoint. (As `processing_class` it would overwrite the model's turn-end ids.)
        settings: from `resolved_settings`.
        stop_signal: says when to stop. None: never.
    """

    def __init__(
        self, *args, tokenizer: PreTrainedTokenizerBase, settings: dict, stop_signal: StopSignal | None = None, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.settings, self.stop_signal = settings, stop_signal or StopSignal()
        self.whole = not isinstance(self.model, PeftModel)
        with tempfile.TemporaryDirectory() as folder:
            if self.whole:
                base = resolve_model_dir(settings["model"]["model_name_or_path"])
                write_description(self.model, tokenizer, base, Path(folder))
            else:
                tokenizer.save_pretrained(folder)
            self.small_files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        self.add_callback(RunGuard(self))
        self.parameter_count: int | None = None
        self.losses: list[torch.Tensor] = []  # of the accumulation under way
        self.batches: list[tuple[list[int], int]] = []  # its rows, and the tokens of each
        self.progress = {"step": 0, "tr_loss": 0.0, "total_loss": 0.0, "last_logged": 0, "seconds": 0.0}
        self.progress["evaluate"] = False  # an evaluation is due: a signal cut it short
        self.step_end: dict = {}  # what a step that fails half-way must not change in a save
        self.aside: Path | None = None  # where a save is being written
        self.resumed, self.saved_step, self.logged_step, self.save_bytes = False, -1, -1, 0

    def train_safely(self, checkpoint: Path | None) -> None:
        """Train, from `checkpoint` if given.

        Raises:
            Interrupted: a signal stopped it, after a save.
            VQAError: memory or disk ran out, or a loss or gradient was not finite.
        """
        if checkpoint:
            self.progress, self.resumed = read_progress(checkpoint), True
            self.saved_step = self.progress["step"]
        self.stop_signal.saves, trouble = True, None
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except Interrupted:
            pass
        except RuntimeError as error:
            if not accelerate.utils.memory.should_reduce_batch_size(error):
                raise
            trouble = self.describe_memory(str(error))
        if trouble:  # outside of `except`, so that the failed step's tensors are gone
            accelerate.utils.memory.clear_device_cache(garbage_collection=True)
            raise VQAError(f"{trouble}; {self.save_last_step()}")
        if self.stop_signal.signum:
            raise Interrupted(self.stop_signal.signum, self.save_last_step())

    def get_batch_samples(self, *args, **kwargs):
        """As usual, with where things go in each batch: found now, since a forward or backward pass that looks for them
        waits for all that the GPU was given before, and the GPU then for it."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            batch["places"] = self.model.find_places(batch["input_ids"], batch["labels"])
        return batches, items

    # ---- what a step may not do

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        """As usual, keeping which rows and how many tokens the batch has, and its loss."""
        self.batches.append((inputs.pop("rows", []), inputs["input_ids"].shape[1]))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss)
        return loss

    def floating_point_ops(self, inputs: dict) -> int:
        """As usual, but the parameters are counted once: for each batch anew that takes longer than a small step."""
        if self.parameter_count is None:
            self.parameter_count = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self.parameter_count

    def prediction_step(self, model: nn.Module, inputs: dict, *args, **kwargs):
        """As usual, without the numbers of the rows; a signal ends the evaluation."""
        self.batches = [(inputs.pop("rows", []), inputs["input_ids"].shape[1])]
        if self.stop_signal.signum:
            raise Interrupted(self.stop_signal.signum)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As usual, but drawing nothing from the random states that training goes on with: it may be cut short."""
        with torch.random.fork_rng():
            return super()._evaluate(*args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        """As usual; here, before the optimizer steps, loss and gradients must be finite (read from the GPU once)."""
        norm = super()._get_grad_norm(model, grad_norm)
        checked = list(self.losses)
        if getattr(self.accelerator, "scaler", None) is None:  # which looks for overflow itself, and skips the step
            checked.append(torch.as_tensor(norm, device=self.losses[0].device, dtype=torch.float32))
        values = torch.stack([value.detach().float() for value in checked]).tolist()
        if not all(map(math.isfinite, values)):
            bad = [i for i, value in enumerate(values[: len(self.losses)]) if not math.isfinite(value)]
            what = f"the loss is {values[bad[0]]}" if bad else f"the gradient's norm is {values[-1]}"
            rows = [row for i in bad or range(len(self.batches)) for row in self.batches[i][0]]
            keys = ", ".join(f"{self.train_dataset.rows[i].key} ({self.train_dataset.rows[i].where})" for i in rows)
            last = f"{self.args.output_dir}/checkpoint-{self.saved_step}" if self.saved_step >= 0 else "none"
            raise VQAError(
                f"step {self.state.global_step + 1}: {what} with {keys}; stopped before the optimizer step, and the "
                f"last checkpoint ({last}) is from before; look at these samples, or start another run "
                "with a lower --learning_rate"
            )
        self.losses, self.batches = [], []
        return norm

    def describe_memory(self, error: str) -> str:
        """One line for memory that ran out: what was asked, the batch, the longest sample, and what would help."""
        rows, tokens = self.batches[-1] if self.batches else ([], 0)
        dataset = self.train_dataset if self.model.training else self.eval_dataset
        lengths = dataset.token_counts(rows)
        key = dataset.rows[rows[lengths.index(max(lengths))]].key if rows else "none"
        size, frames = ("train", "max_train_frames") if self.model.training else ("eval", "max_eval_frames")
        asked = re.search(r"[Tt]ried to allocate [^.]*(?:\.\d+[^.]*)?\.?", error)
        return (
            f"out of memory ({(asked[0] if asked else error.splitlines()[0]).strip('. ')}) at step "
            f"{self.state.global_step + 1} with {len(rows)} samples of {tokens} tokens, the longest {key}; lower "
            f"--per_device_{size}_batch_size, --{frames} or --max_image_size, or set --checkpoint_every_n 1"
        )

    # ---- stopping and going on

    def begin(self) -> None:
        """Called as training begins: take up the loss log where the checkpoint left it, check the disk."""
        if self.resumed:
            self._tr_loss += self.progress["tr_loss"]
            self._total_loss_scalar = self.progress["total_loss"]
            self._globalstep_last_logged = self.progress["last_logged"]
            self._initial_global_step = 0  # so that the mean loss at the end is that of the whole run
        self.started = time.time() - self.progress["seconds"]
        self.check_disk()
        if getattr(self.train_dataset, "features", None):
            self.model.rest_towers()
        if self.resumed and self.progress["evaluate"]:  # the signal came during this evaluation
            self.progress["evaluate"] = False
            self._determine_best_metric(self._evaluate(None, None), None)
        self.keep_step_end()

    def _finalize_training(self, trial, num_train_samples, start_time):
        return super()._finalize_training(trial, num_train_samples, start_time - self.progress["seconds"])

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:  # went on from the last step; the Trainer would add one
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """As usual, then stop if a signal came; an evaluation that it cut short is made up for when the run goes on."""
        first = self.logged_step != self.state.global_step
        self.logged_step = self.state.global_step
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except Interrupted:
            self.progress["evaluate"] = True
        self.keep_step_end()
        # What is due at the end of an epoch comes in a second call, right after that of its last step.
        if self.stop_signal.signum and not (first and float(self.state.epoch).is_integer()):
            raise Interrupted(self.stop_signal.signum)

    def keep_step_end(self) -> None:
        """Remember the loss so far and the random states: a save after a failed step must hold those before it."""
        states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        self.step_end = {"step": self.state.global_step, "tr_loss": self._tr_loss.clone(), "random": states}

    def save_last_step(self) -> str:
        """Save the state after the last finished step, unless it is saved; returns what there is to go on from."""
        step = self.step_end.get("step", 0)
        if not step:
            return "no step was finished, so nothing is saved"
        if self.saved_step != step or self.progress["evaluate"]:
            states = self.step_end["random"]
            random.setstate(states["python"])
            np.random.set_state(states["numpy"])
            torch.set_rng_state(states["cpu"])
            if "cuda" in states:
                torch.cuda.set_rng_state(states["cuda"])
            self._tr_loss = self.step_end["tr_loss"]
            self._save_checkpoint(self.model, None)
        return f"{self.args.output_dir}/checkpoint-{step} is whole; go on with --resume_from_checkpoint True"

    # ---- saving

    def _get_output_dir(self, trial) -> str:
        return str(self.aside or self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.whole:
            write_weights(dict(self.model.named_parameters()), folder)  # a tied head is listed once
        else:
            self.model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
            save_new_rows(self.model, folder)
        for name, content in self.small_files.items():
            (folder / name).write_bytes(content)
        (folder / SETTINGS_FILE).write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """As usual, but aside, and named once all of it is on the disk; then the oldest make room."""
        root, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        with self.writing_aside(name) as part:
            super()._save_checkpoint(model, trial)
            best = root / f"checkpoint-{self.state.best_global_step}"
            if best.name == name or best.is_dir():  # not where it was written
                self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(part / "trainer_state.json"))
            self.progress |= {
                "step": self.state.global_step,
                "tr_loss": self._tr_loss.item(),
                "total_loss": self._total_loss_scalar,
                "last_logged": self._globalstep_last_logged,
            }
            stored = {**self.progress, "seconds": time.time() - self.started}
            (part / PROGRESS_FILE).write_text(json.dumps(stored) + "\n", encoding="utf-8")
            write_manifest(part)
            if (root / name).exists():
                os.rename(root / name, self.aside / "replaced")
            os.rename(part, root / name)
            sync(root)
            self.saved_step, self.save_bytes = self.state.global_step, folder_bytes(root / name)
        if (self.args.save_total_limit or 0) > 0:
            whole = [p for p in checkpoints_of(root).values() if (p / MANIFEST_FILE).is_file()]
            for folder in whole[self.args.save_total_limit :]:
                if folder.name != name and str(folder) != self.state.best_model_checkpoint:
                    os.rename(folder, root / f"{UNFINISHED}{folder.name}")  # a deletion cut short leaves no torn one
                    shutil.rmtree(root / f"{UNFINISHED}{folder.name}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As usual into a checkpoint; the final model is written aside and moved in file by file, its manifest last."""
        if _internal_call or output_dir is not None:
            return super().save_model(output_dir, _internal_call)
        root = Path(self.args.output_dir)
        with self.writing_aside("final") as part:
            super().save_model(str(part), _internal_call=True)
            self.state.save_to_json(str(part / "trainer_state.json"))
            write_manifest(part)
            last = (*(["config.json"] if self.whole else []), MANIFEST_FILE)  # no config, no model: not one of two runs
            for name in (*reversed(last), *((*ADAPTER_FILES, NEW_ROWS_FILE) if self.whole else ())):
                (root / name).unlink(missing_ok=True)
            sync(root)
            for path in sorted(part.iterdir(), key=lambda path: last.index(path.name) if path.name in last else -1):
                os.replace(path, root / path.name)
            sync(root)

    @contextlib.contextmanager
    def writing_aside(self, name: str):
        """A folder for a save to be written in, removed at the end; VQAError where the disk does not take it."""
        root = Path(self.args.output_dir)
        self.aside = root / f"{UNFINISHED}save"
        try:
            shutil.rmtree(self.aside, ignore_errors=True)
            self.aside.mkdir(parents=True)
            yield self.aside / name
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(root).free
            last = f"checkpoint-{self.saved_step} is whole" if self.saved_step >= 0 else "there is no checkpoint yet"
            raise VQAError(
                f"{root}: {name} could not be saved ({str(error).splitlines()[0]}): a save takes about "
                f"{self.save_bytes:,} bytes, {free:,} are free there; {last}; make room and go on with "
                "--resume_from_checkpoint True"
            ) from error
        finally:
            shutil.rmtree(self.aside, ignore_errors=True)
            self.aside = None

    def check_disk(self) -> None:
        """VQAError where the checkpoints of this run, as many as are kept at a time, will not fit on the disk."""
        root, args, state = Path(self.args.output_dir), self.args, self.state
        trained = [p.numel() for p in self.model.parameters() if p.requires_grad]
        saved = [p.nbytes for p in self.model.parameters() if p.requires_grad or self.whole]
        final = sum(saved) + sum(map(len, self.small_files.values())) + 2**16
        # Adam's two moments in float32, and what torch.save writes about a tensor
        self.save_bytes = final + 8 * sum(trained) + 2**10 * len(trained)
        each = {"steps": state.save_steps or 1, "epoch": state.max_steps / state.num_train_epochs, "no": math.inf}
        kept = math.ceil(state.max_steps / each.get(args.save_strategy.value, state.max_steps)) or 1
        if (args.save_total_limit or 0) > 0:
            kept = min(kept, args.save_total_limit + 1)  # the oldest goes once the newest is whole
        needed = max(1, kept - len(checkpoints_of(root))) * self.save_bytes + final
        free = shutil.disk_usage(root).free
        if needed > free:
            fit = (free - final) // self.save_bytes - 1
            advice = f"--save_total_limit {fit} would fit" if 0 < fit < kept else "make room or name another folder"
            raise VQAError(
                f"--output_dir {root}: {kept} checkpoints of about {self.save_bytes:,} bytes and the final one take "
                f"{needed:,}, and {free:,} are free; {advice}"
            )

    # ---- loading: only what is no pickle, or is read as data

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None, advice: str = "name another checkpoint"
    ) -> None:
        if self.whole:
            return read_whole(self.model, Path(resume_from_checkpoint))
        file = Path(resume_from_checkpoint) / "adapter_model.safetensors"
        wanted = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        with self.reading(file, advice):
            stored = load_file(file)
            shapes = {name: tensor.shape for name, tensor in stored.items()}
            if shapes != {name: tensor.shape for name, tensor in wanted.items()}:
                raise ValueError("its tensors are not those of this model")
            set_peft_model_state_dict(self.model, stored)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        others = [path.name for path in checkpoints_of(self.args.output_dir).values() if path.name != Path(best).name]
        self._load_from_checkpoint(
            best,
            advice="it is the best one, which --load_best_model_at_end asks for; training is done, and "
            + (f"{', '.join(others)} can be evaluated instead" if others else "there is no other checkpoint"),
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self.reading(f"{checkpoint}: optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if getattr(self.accelerator, "scaler", None) is not None:
            with self.reading(f"{checkpoint}: scaler.pt"):
                super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with self.reading(f"{checkpoint}: rng_state.pth"):
            super()._load_rng_state(checkpoint)

    @contextlib.contextmanager
    def reading(self, what: str | Path, advice: str = "name another checkpoint"):
        """VQAError where `what` cannot be read as data, with what to do."""
        try:
            yield
        except UNREADABLE as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise VQAError(f"{what} cannot be read ({reason}); {advice}") from error

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = partial(ignore_stop_signals, inner.worker_init_fn)
        return loader


def folder_bytes(folder: Path) -> int:
    """Bytes of the files of a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def read_progress(checkpoint: Path) -> dict:
    """Where the loss log stood at `checkpoint`; VQAError where that, or the Trainer's state, is not readable."""
    try:
        stored = json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8"))
        kinds = {"step": int, "tr_loss": float, "total_loss": float, "last_logged": int, "seconds": float}
        progress = {name: kind(stored[name]) for name, kind in kinds.items()} | {"evaluate": bool(stored["evaluate"])}
        if TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step != progress["step"]:
            raise ValueError("its files are of different steps")
    except UNREADABLE as error:
        raise VQAError(f"{checkpoint}: {PROGRESS_FILE} or trainer_state.json cannot be read ({error})") from error
    return progress


class RunGuard(TrainerCallback):
    """Tells the Trainer that training begins."""

    def __init__(self, trainer: VQATrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Called by the Trainer before the first step."""
        self.trainer.begin()


class PeakMemory(TrainerCallback):
    """Keeps the peak GPU memory of each phase in GiB, as the allocator reserved it; empty without a CUDA GPU."""

    def __init__(self):
        self.gib: dict[str, float] = {}

    def _note(self, phase: str) -> None:
        if torch.cuda.is_available():
            self.gib[phase] = max(self.gib.get(phase, 0.0), torch.cuda.max_memory_reserved() / GIB)
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args, state, control, **kwargs):
        """Called by the Trainer after each optimizer step."""
        self._note("training")

    def on_prediction_step(self, args, state, control, **kwargs):
        """Called by the Trainer after each evaluation batch."""
        self._note("evaluation")

    def on_save(self, args, state, control, **kwargs):
        """Called by the Trainer after each checkpoint."""
        self._note("saving")


class StopAtLoss(TrainerCallback):
    """Ends training once the logged loss is below `target`; `reached` says whether it was."""

    def __init__(self, target: float):
        self.target, self.reached = target, False

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Called by the Trainer with each log."""
        if logs and "loss" in logs and float(logs["loss"]) < self.target:
            self.reached = control.should_training_stop = True


# ----------------------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------------------


def limit_gpu_memory(gib: float | None) -> None:
    """Cap this process at `gib` GiB of GPU memory; None: no cap. VQAError without a GPU, or beyond its memory."""
    if gib is None:
        return
    if not torch.cuda.is_available():
        raise VQAError("--gpu_memory_limit_gib needs a CUDA GPU; leave it out here")
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    if not 0 < gib <= total:
        raise VQAError(f"--gpu_memory_limit_gib {gib}: this card has {total:.1f} GiB")
    torch.cuda.set_per_process_memory_fraction(gib / total)


def estimate_memory(
    model: SurgicalVQAModel,
    tokens: int,
    model_args: ModelArguments,
    dtype: torch.dtype,
    kept_features: bool,
    every_n: int,
) -> dict[str, int]:
    """Bytes of GPU memory at the peak of training on batches of `tokens`, by what takes them; an estimate.

    Counted are the tensors that a decoder layer keeps for its backward pass. In float32: both norms' inputs (2 h), and
    what comes of them where the norms are trained (2 h). In `dtype`: queries and attention output (2 h), keys and
    values (2 k), gate, up and their activation (3 f), LoRA's narrow outputs (7 r), and the inputs of the linear layers:
    with dropout a copy each and a byte of mask (6 h + f); else the two that they share and the product (2 h + f), or,
    where autocast casts float32 weights' inputs, one for each but the output's (5 h + f). A compiled layer keeps its
    two inputs, queries, output, keys, values, gate and up (see ACTIVATION_MEMORY_BUDGET), a recomputed one its input.
    Between layers values have the decoder's own dtype: float32 where its weights are trained.

    Not counted: activations of trained towers, and of frozen ones while they run; the logits at answer positions;
    what --use_liger_kernel saves.

    Args:
        model: with its adapter, also on the meta device.
        tokens: of a batch, padding included.
        model_args: what is trained, rank, dropout, and whether layers are compiled.
        dtype: what products are computed in: autocast's, or that of all weights.
        kept_features: the frozen encoders are not on the GPU.
        every_n: as in `SurgicalVQAModel.set_checkpointing`.
    """
    text, size, adapted = model.config.text_config, dtype.itemsize, model_args.train_decoder == "lora"
    stored = model.model.language_model.norm.weight.dtype.itemsize
    h, f, r = text.hidden_size, text.intermediate_size, model_args.lora_r * adapted
    k = text.num_key_value_heads * h // text.num_attention_heads
    if model_args.compile_layers:
        layer = 2 * stored * h + size * (2 * h + 2 * k + 2 * f + 7 * r)
    else:
        layer = 4 * (2 if adapted else 4) * h + size * (2 * h + 2 * k + 3 * f + 7 * r)
        if adapted and model_args.lora_dropout:
            layer += (size + 1) * (6 * h + f)
        else:
            layer += size * ((2 if stored == size else 5) * h + f)
    count = text.num_hidden_layers
    recomputed = math.ceil(count / every_n) if every_n else 0
    kept = (count - recomputed) * layer + recomputed * stored * h + bool(recomputed) * layer
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    resting = [*model.model.visual.parameters(), *model.audio_encoder.parameters()] if kept_features else []
    return {
        "weights": sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in resting),
        "gradients and optimizer": 12 * trained + (size * trained if size < 4 else 0),  # and autocast's copy
        "activations": tokens * (kept + 6 * f * size),  # and what the backward pass of one MLP works with
    }


def memory_to_fit(model_args: ModelArguments) -> float:
    """GiB that `--checkpoint_every_n auto` may fill; VQAError with neither a GPU nor --gpu_memory_limit_gib."""
    if model_args.gpu_memory_limit_gib is not None:
        return model_args.gpu_memory_limit_gib
    if not torch.cuda.is_available():
        raise VQAError("--checkpoint_every_n auto needs a CUDA GPU, or --gpu_memory_limit_gib to fit into")
    return torch.cuda.get_device_properties(0).total_memory / GIB - CUDA_CONTEXT_GIB


def check_compiler(device_type: str) -> None:
    """VQAError where torch.compile would find no compiler that works, or not the headers of Python, which what it
    compiles includes: of C on a GPU, for Triton's launchers, else of C++."""
    variable, language, names = ("CC", "c", ("gcc", "clang")) if device_type == "cuda" else ("CXX", "c++", ("g++",))
    names = (os.environ[variable],) if os.environ.get(variable) else names
    compiler = next(filter(shutil.which, names), None)
    if compiler is None:
        raise VQAError(
            f"--compile_layers: no compiler found ({' or '.join(names)}); install one, name it in {variable}, or leave "
            "the flag out"
        )
    with tempfile.TemporaryDirectory() as folder:
        headers = sysconfig.get_path("include", "posix_prefix")
        command = [compiler, "-x", language, "-", "-I", headers, "-o", str(Path(folder) / "trial")]
        program = "#include <Python.h>\nint main(void) { return 0; }\n"
        try:
            done = subprocess.run(command, input=program, capture_output=True, text=True, errors="replace")
            failure = (done.stderr.strip() or f"exit status {done.returncode}") if done.returncode else ""
        except OSError as error:
            failure = str(error)
    if failure:
        raise VQAError(
            f"--compile_layers: the compiler {compiler} does not work ({failure.splitlines()[0]}); mend it (Python.h "
            f"is in the package python3-dev), name another in {variable}, or leave the flag out"
        )


def check_liger(device_type: str) -> None:
    """VQAError where Liger's kernels, which are Triton's, cannot run: they take a GPU and the package."""
    if device_type != "cuda":
        raise VQAError("--use_liger_kernel needs a CUDA GPU, since its kernels are Triton's; leave the flag out")
    try:
        import liger_kernel.ops  # noqa: F401

        require_version(LIGER)
    except Exception as error:  # a Triton that does not fit raises what it likes
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(". ")
        raise VQAError(f"--use_liger_kernel: {reason}; pip install '{LIGER}', or leave the flag out") from error


def check_swiglu(config: Qwen2VLConfig) -> None:
    """VQAError where the decoder's activation is not SiLU, the only one that Liger's SwiGLU computes."""
    activation = config.text_config.hidden_act
    if activation != "silu":
        raise VQAError(f"--use_liger_kernel needs hidden_act 'silu', config.json has {activation!r}; leave it out")


def choose_checkpointing(model_args: ModelArguments, estimate: typing.Callable[[int], dict[str, int]]) -> int:
    """`--checkpoint_every_n` as a number: for `auto` the fewest recomputed layers whose estimate fits.

    Raises:
        VQAError: `auto` with neither a GPU nor --gpu_memory_limit_gib.
    """
    if model_args.checkpoint_every_n != "auto":
        return int(model_args.checkpoint_every_n)
    limit = memory_to_fit(model_args)
    fitting = (n for n in (0, *range(32, 1, -1)) if sum(estimate(n).values()) < FITTING_SHARE * limit * GIB)
    every_n = next(fitting, 1)
    print(f"Activation checkpointing: --checkpoint_every_n auto takes {every_n}")
    return every_n


def report_plan(train: Sequence[int], evaluation: Sequence[int], args: VQATrainingArguments) -> None:
    """Print tokens per sample, given those of each, and the number of optimizer steps that the Trainer will make."""
    for name, counts in (("train", sorted(train)), ("eval", sorted(evaluation))):
        if counts:
            spread = f"min {counts[0]}, median {counts[len(counts) // 2]}, max {counts[-1]}"
            print(f"{name}: {len(counts)} samples, tokens per sample: {spread}")
    batches = math.ceil(len(train) / args.train_batch_size)
    per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    print(f"steps: {steps} ({per_epoch} an epoch of {len(train)} samples)")


def read_data(args: DataArguments) -> tuple[list[VQARow], list[VQARow], list[str]]:
    """The rows of training and evaluation, and the problems of those that --skip_bad_samples left out.

    Raises:
        VQAError: naming all that is wrong with either file, unless those rows may be left out.
    """
    by_ear = args.input_mode != "text"
    sources = [(args.train_data_path, args.audio_dir, args.max_train_samples)]
    if args.eval_data_path:
        sources.append((args.eval_data_path, args.eval_audio_dir or args.audio_dir, args.max_eval_samples))
    loaded, problems = [], []
    for path, audio_dir, limit in sources:
        rows, found = check_rows(path, args.frames_dir, audio_dir if by_ear else None, limit, args.allow_symlinks)
        if args.check_data:
            # Hashes, which take less room than the paths.
            media = np.unique(np.fromiter((hash(file) for row in rows for file in row.media), np.int64))
            clips, types = len({row.frames for row in rows}), len({row.question_type for row in rows})
            bad = len({line for problem in found for line in problem.lines})
            print(f"{path}: {len(rows)} good rows ({clips} clips, {types} types, {len(media)} files), {bad} bad")
        loaded.append(rows)
        problems += found
    shared = find_shared_speech(row for rows in loaded for row in rows)  # never left out: none can say which is wrong
    raise_problems(shared if args.skip_bad_samples else [*problems, *shared])
    skipped = [str(problem) for problem in problems]
    if skipped:
        print("\n".join([f"Leaving out bad rows ({len(skipped)} problems, --skip_bad_samples):", *skipped]))
    for (path, *_), rows in zip(sources, loaded, strict=True):
        if not rows:
            raise VQAError(f"{path}: no good row is left; see what is wrong with --check_data")
    return loaded[0], loaded[1] if len(loaded) > 1 else [], skipped


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say; returns the exit status."""
    # 1. Arguments
    model_args, data_args, training_args = parse_arguments(sys.argv[1:] if argv is None else list(argv))
    if not data_args.dry_run:  # which may plan for another card
        limit_gpu_memory(model_args.gpu_memory_limit_gib)
    with contextlib.ExitStack() as stack:
        stop_signal = stack.enter_context(StopSignal())
        if not (data_args.check_data or data_args.dry_run):
            stack.enter_context(lock_folder(training_args.output_dir))
        return train(model_args, data_args, training_args, stop_signal)


def train(
    model_args: ModelArguments, data_args: DataArguments, training_args: VQATrainingArguments, stop_signal: "StopSignal"
) -> int:
    """The steps of `main` after the arguments; returns the exit status."""
    # 2. Data: everything is read and decoded once before any weight is loaded
    train_rows, eval_rows, skipped = read_data(data_args)
    if data_args.check_data:
        return 0
    checkpoint = None if data_args.dry_run else find_checkpoint(training_args)

    # 3. Tokenizer and model
    if model_args.use_liger_kernel:
        check_swiglu(load_config(model_args.model_name_or_path))
    kernel, precision = ATTENTION_KERNELS[model_args.attn_implementation], "BF16" if training_args.bf16 else "FP32"
    print(f"⏳ Loading merged {precision} model with {kernel} attention...")
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    dtype, whole = torch.bfloat16 if training_args.bf16 else torch.float32, model_args.train_decoder == "full"
    model = load_model(
        model_args.model_name_or_path,
        tokenizer,
        init=model_args.init,
        seed=training_args.seed,
        dtype=torch.float32 if whole else dtype,
        compute_dtype=dtype,
        device="meta" if data_args.dry_run else training_args.device,
        attn_implementation=model_args.attn_implementation,
        audio_encoder=model_args.audio_encoder,
        load_in_4bit=model_args.load_in_4bit,
        allow_pickle=model_args.allow_pickle,
    )
    print(f"✓ Model loaded in full {precision}" if not data_args.dry_run else "✓ Model built without weights")
    base_fingerprint = fingerprint(model) if not data_args.dry_run else ""

    # 4. What is trained
    towers = {flag: getattr(model_args, f"train_{flag}") for flag in TOWERS}
    set_seed(training_args.seed)
    if whole:
        print("🧠 Training the whole decoder, without LoRA...")
        trained_model = train_whole(model, dtype, **towers)
    else:
        print("🧠 Adding LoRA Adapters...")
        shape = model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout
        with torch.device("meta" if data_args.dry_run else training_args.device):
            trained_model = add_lora(model, *shape, **towers)
    if training_args.bf16:
        skip_input_casts(trained_model)
    print_trainable_parameters(trained_model)

    # 5. Datasets
    processor = VQAProcessor(
        tokenizer,
        model.config,
        max_image_size=data_args.max_image_size,
        input_mode=data_args.input_mode,
        audio_tokens=data_args.audio_tokens,
        frame_mode=data_args.frame_mode,
    )
    print(f"📁 Loading Train Data: {data_args.train_data_path}")
    train_dataset = SurgicalVQADataset(
        train_rows, processor, max_train_frames=data_args.max_train_frames, numbered=True
    )
    eval_dataset = None
    if eval_rows:
        print(f"📁 Loading Eval Data: {data_args.eval_data_path}")
        limit = data_args.max_eval_frames
        eval_dataset = SurgicalVQADataset(eval_rows, processor, max_eval_frames=limit, is_eval=True, numbered=True)
        if limit is not None and any(len(row.frames) > limit for row in eval_rows):
            print(f"   Using {limit} frames (evenly sampled) to reduce eval memory")
    context = model.config.text_config.max_position_embeddings
    datasets = [dataset for dataset in (train_dataset, eval_dataset) if dataset]
    raise_problems([problem for dataset in datasets for problem in dataset.find_too_long(context)])
    counted = data_args.dry_run or model_args.checkpoint_every_n == "auto"
    lengths = train_dataset.token_counts() if counted else []
    multiple = PADDING_MULTIPLE if model_args.compile_layers else 1
    tokens = training_args.train_batch_size * math.ceil(max(lengths, default=0) / multiple) * multiple
    estimate = partial(estimate_memory, model, tokens, model_args, dtype, bool(data_args.cache_features))
    every_n = choose_checkpointing(model_args, estimate)
    model.set_checkpointing(every_n, model_args.compile_layers)
    if model_args.use_liger_kernel and not data_args.dry_run:
        model.use_liger()
    if data_args.dry_run:
        report_plan(lengths, eval_dataset.token_counts() if eval_dataset else [], training_args)
        parts = {name: size / GIB for name, size in estimate(every_n).items()}
        shares = ", ".join(f"{name} {gib:.1f}" for name, gib in parts.items())
        print(f"memory: about {sum(parts.values()):.1f} GiB of the GPU at the peak of training ({shares})")
        return 0

    if data_args.cache_features:
        fill_feature_cache(model, datasets, data_args.cache_features)

    # 6. Training; evaluation computes the loss only
    settings = resolved_settings(model_args, data_args, training_args, processor, base_fingerprint, skipped)
    memory = PeakMemory()
    stop = StopAtLoss(data_args.target_train_loss) if data_args.target_train_loss is not None else None
    trainer = VQATrainer(
        model=trained_model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=VQACollator(tokenizer.pad_token_id, multiple=multiple),
        tokenizer=tokenizer,
        callbacks=[memory, *([stop] if stop else [])],
        settings=settings,
        stop_signal=stop_signal,
    )
    if checkpoint:
        refuse_other_settings(checkpoint, settings)
        print(f"Going on from {checkpoint}")
    trainer.train_safely(checkpoint)

    # 7. Results
    trainer.save_model()
    if stop_signal.signum:
        raise Interrupted(stop_signal.signum, f"training had ended, and {training_args.output_dir} is whole")
    if eval_dataset is not None and training_args.eval_strategy == "no":
        print(trainer.evaluate())
    if memory.gib:
        print("Peak GPU memory: " + ", ".join(f"{phase} {gib:.1f} GiB" for phase, gib in memory.gib.items()))
    what = "the whole model" if whole else "adapter, projector"
    print(f"Saved {what}, tokenizer and {SETTINGS_FILE} to {training_args.output_dir}")
    if stop and not stop.reached:
        print(f"error: the loss did not fall below --target_train_loss {stop.target}", file=sys.stderr)
        return 1
    return 0


def run(entry) -> None:
    """Exit with the status of `entry()`; a VQAError becomes its text and status 1, without a traceback."""
    try:
        status = entry()
    except VQAError as error:
        end_bars()
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        status = 1
    except Interrupted as stop:
        end_bars()
        print(stop, file=sys.stderr)
        status = 128 + stop.signum
    finally:
        end_workers()
    sys.exit(status)


def end_bars() -> None:
    """End the lines of progress bars that an error left open: its own line begins one."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def end_workers() -> None:
    """Kill loader workers that outlived their loader (--dataloader_persistent_workers): they hold nothing.

    As it exits, Python would send them a SIGTERM, which they ignore, and wait for them without end.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a killed worker for a failure
    for worker in multiprocessing.active_children():
        worker.kill()


if __name__ == "__main__":
    run(main)
