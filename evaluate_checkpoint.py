"""Evaluate a checkpoint by letting it answer, and score answers that already exist.

Generate and score (settings that training chose are read from the checkpoint), or score and compare what is there,
with the standard library alone:

    python evaluate_checkpoint.py --checkpoint_path ./checkpoints/surgical_vqa_50samples \\
        --eval_data_path test_set/out_002-001.jsonl --train_data_path test_set/in_002-001.jsonl \\
        --frames_dir dataset/frames --audio_dir audio/out_002-001 --output_file results/eval_out.jsonl
    python evaluate_checkpoint.py --score_only --output_file X.jsonl --eval_data_path test_set/out_002-001.jsonl
    python evaluate_checkpoint.py --compare results/a.jsonl results/b.jsonl

Does it hear, does it see? Add `--arms mismatched_audio,silent_audio,mismatched_frames,black_frames`.
`X.jsonl` gets one row a sample, `X.summary.json` the figures. docs/EVAL_STRATEGY.md explains every figure.
Exit status: 0 all rows answered, 1 some rows failed (they count as wrong) or --push_results did, 2 nothing was
measured, 143, 130 or 129 stopped by SIGTERM, SIGINT or SIGHUP (the same command continues).
"""

import argparse
import base64
import bisect
import codecs
import concurrent.futures
import contextlib
import copy
import dataclasses
import difflib
import fcntl
import functools
import glob
import hashlib
import html
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import statistics
import string
import subprocess
import sys
import textwrap
import time
import unicodedata
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
METRICS = ("choice", "strict", "token", "contains")  # the headline first
INPUT_MODES = ("audio", "audio_text", "text")  # repeated from train_vqa.py, so that scoring needs no torch
PROMPT_LAYOUTS = ("plain", "chat")
# Input modes of the public SurgViVQA-Audio script -> ours with the same prompt. The last is also one of ARMS.
PUBLIC_MODES = {"audio_only": "audio", "text_only": "text", "mismatched_audio": "audio_text"}
REFUSED_FLAGS = {
    "--allow_missing_audio": "silence in place of missing speech measures no hearing; --allow_errors counts such a row "
    "as wrong, --arms silent_audio measures silence",
}
ASR_ARM = "asr_text"  # the question in the words that a Whisper wrote down from its speech
ARMS = (
    *(*INPUT_MODES, ASR_ARM, "mismatched_audio", "silent_audio"),
    *("mismatched_frames", "black_frames", "shuffled_frames", "first_frame"),
)
ASK_FLAGS = (  # those that --ask heeds
    *("ask", "ask_text", "frames", "checkpoint_path", "model_name_or_path", "input_mode", "prompt_layout"),
    *("max_eval_frames", "max_image_size", "dtype", "attn_implementation", "load_in_4bit", "init", "no_adapter"),
    *("no_merge", "gpu_memory_limit_gib", "max_new_tokens", "seed"),
)
SAMPLE_RATE = 16_000  # Hz, of the speech that the model gets; repeated from train_vqa.py
Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
SIGNIFICANCE = 0.05
ORIGINAL_BASELINE = 0.46  # of the original project: `contains`, audio + image, zero-shot, 50 clips of 002-001
ORIGINAL_CLIPS = "3c2285dcec8228f1afa91262604b97559253c8eb94743c611d789c24fd240480"  # `clips_digest` of these 50
POWER = 0.8
VIDEO_RESAMPLES = 2000
MIN_VIDEOS = 6  # with fewer, no test over videos reaches p < 0.05: 2 / 2**5 is 0.0625
COLLAPSE_SHARE = 0.9  # one answer for more than this share of a type is mode collapse, if the gold answers are balanced
BALANCE_SLACK = 1.3  # balanced: the commonest of k gold answers holds at most 1.3 / k of the type's rows
COLLAPSE_MIN_ROWS = 10  # below this, one answer throughout is no surprise
GATE_ROWS = 4  # on which the gates measure how far speech and frames move the logits
FRAMES_DIFFER = "Asked on {asked} frames a clip, but trained on {trained}: see --max_eval_frames {trained}"
LISTED = 10  # keys shown in a message; the summary lists them all
WIDTH = 80
ASR_BATCH_SIZE = 16  # recordings transcribed at a time, halved where they do not fit
AUTO_BATCH_SIZE = 128  # rows at most: a step of decoding costs the same for one row as for a hundred
CPU_BATCH_SIZE = 8  # of --batch_size auto where no GPU sets a limit
USABLE_MEMORY = 0.92  # of the limit: the allocator splits what it holds

Row = dict[str, Any]
Key = tuple[str, str, str]


class InputError(ValueError):
    """The data or the flags cannot be used, in one line; train_vqa's VQAError, for scoring without torch."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading rows
# ---------------------------------------------------------------------------------------------------------------------

KEY_FIELDS = ("video_id", "id", "question_type")  # `id` alone repeats across videos
GOLD_FIELDS = ("question", "answer", "short_answer")


def row_key(row: Mapping[str, Any]) -> Key:
    """The identity of a sample: video, id and question type."""
    return row["video_id"], row["id"], row["question_type"]


def key_text(key: Key) -> str:
    """A row key as it is printed and stored: `002-004/qa_002496/scope_outside`."""
    return "/".join(key)


# This and the next are repeated from train_vqa.py, so that scoring needs no torch.
def _unique_pairs(pairs: list[tuple[str, Any]]) -> Row:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"the field '{Counter(names).most_common(1)[0][0]}' occurs twice")
    return dict(pairs)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_jsonl(path: str | Path) -> Iterator[tuple[int, Row]]:
    """Yield (line number from 1, object) for each line that is not blank.

    Raises InputError for UTF-16, a JSON array, and a line that is not one JSON object (also NaN, a field twice).
    """
    with open(path, "rb") as file:
        start = file.peek()[:64].removeprefix(codecs.BOM_UTF8)
        if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or start[:2].count(0) == 1:
            raise InputError(f"{path}: is UTF-16 text; save it as UTF-8")
        if start.lstrip()[:1] == b"[":
            raise InputError(f"{path}: is a JSON array; write one object a line, as jq -c '.[]' does")
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"")  # the mark that Windows sets
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode(), object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant)
            except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError; brackets without end
                raise InputError(f"{path}:{number}: not a JSON object ({error}); fix or remove the line") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: a JSON object is expected, found {type(row).__name__}")
            yield number, row


def _require(row: Row, names: Iterable[str], where: str, advice: str = "") -> None:
    """Raise InputError unless each field holds a text that is not empty; `predicted_answer` may be empty or null."""
    for name in names:
        value = row.get(name)
        if name == "predicted_answer":
            wanted, good = "the model's text, or null where it failed", name in row and isinstance(value, str | None)
        else:
            wanted, good = "a text that is not empty", isinstance(value, str) and value.strip()
        if not good:
            found = repr(value) if name in row else "nothing"
            raise InputError(f"{where}: '{name}' must be {wanted}, found {found}{'; ' * bool(advice)}{advice}")


def _keyed_rows(path: str | Path, fields: Sequence[str], advice: str = "", gold: Sequence[str] = ()) -> dict[Key, Row]:
    """`fields` are needed, `gold` may be missing or null."""
    rows, lines = {}, {}
    for number, row in read_jsonl(path):
        known = [name for name in gold if row.get(name) is not None]
        _require(row, (*KEY_FIELDS, *fields, *known), f"{path}:{number}", advice)
        key = row_key(row)
        if first := lines.get(key):
            raise InputError(f"{path}:{number}: the row {key_text(key)} stands already on line {first}; remove one")
        rows[key], lines[key] = row, number
    return rows


def read_annotations(path: str | Path, needs_gold: bool = True) -> list[Row]:
    """Rows in the REAL-Colon-VQA schema, at least one, with unique keys; InputError for others, and for rows without
    gold answers unless not `needs_gold`, where one row with them is enough."""
    question, *gold = GOLD_FIELDS
    rows = _keyed_rows(path, GOLD_FIELDS) if needs_gold else _keyed_rows(path, [question], gold=gold)
    if not rows:
        raise InputError(f"{path}: no rows; give a file with at least one")
    if not any(map(has_gold, rows.values())):
        raise InputError(f"{path}: no row has answer and short_answer, so nothing can be scored; give a file with them")
    return list(rows.values())


def has_gold(annotation: Row) -> bool:
    """Whether a row of a question file can be scored: it has both `answer` and `short_answer`."""
    return bool(annotation.get("answer") and annotation.get("short_answer"))


def read_answer_rows(path: str | Path, advice: str = "") -> dict[Key, Row]:
    """Rows that this script wrote, by row key; InputError for others, with `advice` where a field is missing."""
    return _keyed_rows(path, ("predicted_answer",), advice, gold=("short_answer", "ground_truth"))


def match_predictions(annotations: Sequence[Row], path: str | Path) -> dict[Key, Row]:
    """The rows of a prediction file by the full keys of `annotations`.

    A row needs `id` (or `question_id`) and `predicted_answer`, and where several annotations share the id `video_id` or
    `question_type`. Raises InputError for a row that fits not exactly one annotation, for two predictions of one, and
    for another question or short answer than the annotation's.
    """
    by_id: dict[str, list[Row]] = defaultdict(list)
    for annotation in annotations:
        by_id[annotation["id"]].append(annotation)

    matched, lines = {}, {}
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        row["id"] = row.get("id", row.get("question_id"))
        given = {name: row[name] for name in KEY_FIELDS if name == "id" or row.get(name) is not None}
        _require(row, ("predicted_answer", *given), where)
        fitting = [found for found in by_id[row["id"]] if all(found[name] == given[name] for name in given)]
        if not fitting:
            asked = ", ".join(f"{name} {value!r}" for name, value in given.items())
            advice = "remove the prediction or give the file it was made from"
            raise InputError(f"{where}: no row of --eval_data_path has {asked}; {advice}")
        if len(fitting) > 1:
            some = " and ".join(key_text(row_key(found)) for found in fitting[:2])
            lacking = " and ".join(name for name in KEY_FIELDS if name not in given)
            what = f"id {row['id']!r} stands for {len(fitting)} rows, e.g. {some}"
            raise InputError(f"{where}: {what}; add {lacking} to the prediction rows")
        key = row_key(fitting[0])
        name = key_text(key)
        if first := lines.get(key):
            raise InputError(f"{where}: a second prediction for {name}, first on line {first}; remove one")
        for part in ("question", "short_answer"):
            theirs, ours = row.get(part), fitting[0].get(part)
            if isinstance(theirs, str) and ours is not None and normalise(theirs) != normalise(ours):
                what = f"the {part} of {name} is {theirs!r} here but {ours!r} in --eval_data_path"
                raise InputError(f"{where}: {what}; give the file that the predictions were made from")
        matched[key], lines[key] = row, number
    return matched


def clips_digest(keys: Iterable[Key]) -> str:
    """SHA-256 that names a set of rows, whatever their order and wording."""
    return hashlib.sha256("\n".join(sorted(map(key_text, keys))).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation and the closed answers of the 20 question types
# ---------------------------------------------------------------------------------------------------------------------


def simplify(text: str) -> str:
    """Lower-case `text` and unify its spelling, keeping the punctuation that ends clauses.

    "upper-left" becomes "upper left", "5-10mm" "5 to 10 mm", "< 5" "<5", "isn't" "is not", "yes/no" "yes or no".
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"[‐‑‒−]|(?<=\d)[–—](?=\d)", "-", text)
    text = re.sub(r"[–—―]|\s-+\s|--+", ", ", text)
    text = re.sub(r"\bcan(?:['’]?t|not)\b", "can not", text)
    text = re.sub(r"n['’]t\b|(?<=\b(?:is|do))nt\b|(?<=\b(?:are|was|did|has))nt\b|(?<=\bdoes)nt\b", " not", text)
    text = re.sub(r"(?<=\d)\s*-\s*(?=\d)", " to ", text)
    text = re.sub(r"(?<=[<>])\s+(?=\d)", "", text)
    text = re.sub(r"(?<=\d)(?=[a-z])", " ", text)
    text = re.sub(r"\s*/\s*", " or ", text)
    text = re.sub(r"[\n\r]+", ". ", text)
    text = re.sub(r"[^\w\s<>=≤≥.,;:!?()]|_", " ", text)
    return re.sub(r"\s+", " ", text).strip()


def normalise(text: str) -> str:
    """`simplify` without any punctuation but a decimal point: what `strict` compares."""
    return re.sub(r"\s+", " ", re.sub(r"[,;:!?()]|\.(?!\d)", " ", simplify(text))).strip()


# What a type asks about; a type that stands nowhere is of the family "other".
FAMILIES = {
    "static scene": (
        *("nbi_status", "mucosa_visibility", "occlusion_check", "fluid_occlusion_level", "scope_outside"),
        "flush_action",
    ),
    "position": ("lesion_screen_position",),
    "motion": (
        *("scope_motion", "scope_motion_type", "scope_forward_motion", "scope_backward_motion"),
        "lesion_motion_direction",
    ),
    "anatomy": ("lesion_site", "lesion_histology_extended", "tool_identification", "lesion_size_range"),
}
OTHER = "(another answer)"  # of the kind asked for, but no option: a quadrant where a direction is asked
# fmt: off
_NOTHING = r"(?!)"  # matches nowhere
_GONE = "(?:absent|missing|off)"
_NOT = (r"(?:no|not(?! (?:only|just|merely|simply|solely)\b)|never|none|nothing|non|neither|nor|without|rather than"
        r"|instead of|free of|free from|absence|lack\w*)")
_VISIBLE = "visible|seen|present|observed|observable|apparent|in view"
_SEEN = f"{_VISIBLE}|detect(?:ed|able)|noticeable|evident|(?:turned )?on|used|active|applied|performed|happening"
_SCOPE = "(?:endoscope|scope)(?: body)?"
_THINGS = rf"(?:lesions?|polyps?|ulcers?|tools?|forceps|snares?|catheters?|{_SCOPE})\b"
# What may stand between a negation and what it denies. Any other noun is itself denied: "no visible lesions".
# No word fits in two ways: a loop of it would take for ever.
_BE = r"(?: (?:to|is|are|was|were|be|been|being|can|could|do|does|longer|very|well|\w+ly))"
_LINK = (rf"(?:{_BE}| (?:an?|any|the|such|of|see|observe|detect|find|show|have|has|contain|appear|seem|look|like"
         r"|located|positioned|signs?|evidence|indications?|traces?|part|blue|clean|clear|close|up|mucosal|water|objects?"
         rf"|evident|seen|present|observed|apparent|{_SCOPE}|\w+(?:able|ible|ous|icant|ive)))*?")
# fmt: on


@functools.cache  # and only then: compiling all types would take most of the time that a small file needs
def _words(form: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w<>])(?:{form})(?!\w)")


class ClosedAnswers:
    """How the options of one question type are worded: regular expressions over simplified text, matched at words.

    Args:
        asserted: option (or part, see `compose`) -> words that name it in a clause without a negation, longer ones
            before shorter ones.
        denied: option -> words that name it when a negation reaches them: "no fluid" is `absent`, "no polyp" is not.
        polar: a bare "yes" or "no" is an answer.
        compose: option -> the parts that must all be named, where an answer has two: upper + left.
        covered: further words that a denial may hold; any other option in its clause leaves the matter open.
        alone: words that need no subject to be denied: "not visible". Empty: none.
        about: those of `_THINGS` that are asked about; denying something of another one says nothing.
    """

    def __init__(self, asserted, denied=None, polar=False, compose=None, covered=_NOTHING, alone="", about=_SCOPE):
        other = rf"(?!(?:{about})\b){_THINGS}"
        bare = rf"{_NOT}{_BE}*? (?:{alone})|(?:\w+ly )?(?:absent|none|nothing)" if alone else _NOTHING
        self.asserted, self.covers = asserted, "|".join([covered, *(denied or {}).values()])
        self.denied = {  # "no fluid", "fluid is not seen", "fluid is absent", "not seen"
            name: rf"{_NOT}{_LINK} (?:{words})(?! (?:of (?:the |an? |any )?)?{other})"
            rf"|(?:{words})(?: (?!that\b|shows?\b)\w+){{0,5}}? (?:not{_LINK} (?:{_SEEN}|{alone or _NOTHING})"
            rf"|(?:is|are|was|stays?|turned|switched)(?: \w+ly)? {_GONE})"
            rf"|^(?:it|they|this|that|there)?{_BE}* ?(?:{bare})(?: \w+ly| here| at all| (?:in|on) .+)?$"
            for name, words in (denied or {}).items()
        }
        self.elsewhere = rf"^(?:\w+ ){{0,3}}?{other}.* (?:{_NOT}|{_GONE})\b|{_NOT} {other}"
        self.polar, self.compose = polar, compose or {}
        self.options = list(compose or (name for name in asserted if name != OTHER))


def _yes_no(yes: str, no: str = _NOTHING, denied: str | None = None, **how: str) -> ClosedAnswers:
    """A yes/no type. `yes`: words that say yes; `no`: words that say no; `denied`: no when denied. None: `yes`.

    Denying a `no` word says nothing: a scope that is "not withdrawing" may stand still.
    """
    return ClosedAnswers({"yes": yes, "no": no}, {"no": denied or yes}, polar=True, covered=yes, **how)


_ADVANCE = r"advanc\w*|forwards?|push\w*|insert\w*"
_WITHDRAW = r"withdr(?:aw|ew)\w*|retract\w*|backwards?|pull\w*|mov\w+ back"
_MOVE = r"mov(?:e|es|ed|ing|ements?)|(?:in )?motion"
_REST = r"stationary|static|motionless|immobile|at rest|in place|(?:is|stays?|remains?) still(?! \w+ing| in motion)"
_BLOCK = r"obstruct\w*|occlu\w*|block\w*|obscur\w*|cover(?:s|ed|ing)?"
_WHOLLY = r"(?:(?:complete|entire|total)(?:ly)?|fully?|whole|wholly)"
_NBI = r"nbi|narrow ?band(?: imaging)?"
_WHITE = r"wli?|white ?light"
_MM = r"(?: ?(?:mm|milli\w+))?(?! ?(?:cm|centi\w+)|\.?\d)"

# Options come from the REAL-Colon-VQA annotations, except those marked (+): plausible answers of the same kind that no
# row of the published files has. They are here so that naming one beside the right option counts as naming two.
# fmt: off
CLOSED_ANSWERS: dict[str, ClosedAnswers] = {
    "blue_dye_presence": _yes_no(
        r"dye[sd]?|stain(?:s|ed|ing)?|contrast|indigo carmine|methylene blue|chromoendoscopy", alone=_VISIBLE),
    "endoscope_visibility": _yes_no(
        rf"{_SCOPE}(?: \w+){{0,4}}? (?:{_VISIBLE})|see\w*(?: \w+){{0,2}} {_SCOPE}|^(?:{_VISIBLE})$",
        no=r"hidden|invisible|out of (?:view|sight)", denied=_SCOPE, alone=_VISIBLE),
    "fluid_occlusion_level": ClosedAnswers({
        "absent": rf"(?:{_WHOLLY} )?(?:clear|free|un(?:obstruct|obscur)ed)"
                  rf"|(?:{_WHOLLY}|mucosa(?: \w+){{0,2}}?) visible",
        "partial": rf"partial(?:ly)?|partly|(?:nearly|almost) {_WHOLLY}",  # (+)
        "complete": _WHOLLY,
        OTHER: r"(?:full|complete) (?:view|visibility)",  # of what is seen, or of what is blocked?
    }, {"absent": rf"fluid|liquid|water|occlusion|{_BLOCK}"},
        covered=rf"(?:{_WHOLLY} )?(?:absent|absence|none|nothing)|free", alone="present|observed"),
    "flush_action": _yes_no(r"flush\w*|irrigat\w*|rins\w*|wash\w*|spray\w*"),
    "lesion_histology_extended": ClosedAnswers({
        "adenoma": r"adenomas?|adenomatous", "hyperplastic": r"hyperplastic|hyperplasia",
        "serrated": r"serrated(?: (?:adenomas?|lesion|polyp))?",  # (+)
        "carcinoma": r"adenocarcinoma|carcinoma|cancer(?:ous)?",  # (+)
    }),
    "lesion_motion_direction": ClosedAnswers({
        "left": r"(?:from )?(?:the )?right to (?:the )?left|left(?:wards?)?",
        "right": r"(?:from )?(?:the )?left to (?:the )?right|right(?:wards?)?",
        "up": r"(?:from )?(?:the )?bottom to (?:the )?top|towards? the top|(?<!close )up(?:wards?)?",
        "down": r"(?:from )?(?:the )?top to (?:the )?bottom|towards? the bottom|down(?:wards?)?",
        "stable": rf"stable|unchanged|fixed|^still$|same (?:place|position|location)|{_REST}",
        OTHER: r"(?:upper|lower|top|bottom) (?:left|right)|(?:left|right) (?:upper|lower|top|bottom)",
    }, {"stable": rf"(?:(?:lesion|polyp) )?(?:{_MOVE}|drift\w*|shift\w*|displac\w*)"}, about="lesions?|polyps?"),
    "lesion_screen_position": ClosedAnswers(
        {"upper": "upper|top", "lower": "lower|bottom", "left": "left", "right": "right",
         OTHER: "cent(?:er|re|ral)|middle"},
        compose={f"{v}-{h}": frozenset({v, h}) for v in ("upper", "lower") for h in ("left", "right")}),
    "lesion_site": ClosedAnswers({
        "rectum": "rectum|rectal", "sigma": "sigma|sigmoid", "descending": "descending", "ascending": "ascending",
        "transverse": "transverse", "cecum": "ca?ecum|ca?ecal",  # (+)
        OTHER: r"recto ?sigmoid\w*|flexure",
    }),
    "lesion_size_range": ClosedAnswers({
        "<5": rf"(?:<|(?:less|smaller|fewer) than |(?:under|below) )(?:5|five){_MM}",
        "5-10": rf"(?:5|five) (?:to|and) (?:10|9|9\.9|ten|nine){_MM}",  # (+)
        ">10": rf"(?:>|(?:more|larger|greater|bigger) than |(?:over|above) )(?:10|ten){_MM}",  # (+)
        OTHER: r"[<>=≤≥]*\d+(?:\.\d+)?",
    }),
    "lighting_mode": ClosedAnswers({"NBI": _NBI, "WL": _WHITE}),  # WL (+)
    "mucosa_visibility": _yes_no(
        rf"mucosa(?: \w+){{0,4}}? (?:{_VISIBLE}|clear|clean)|(?:see|observe)(?: \w+){{0,3}} mucosa"
        rf"|^(?:clearly )?(?:{_VISIBLE}|clear|clean)$",
        no=rf"hidden|invisible|dirty|{_BLOCK}", denied="mucosa(?:l surface)?", alone=rf"{_VISIBLE}|clear|clean"),
    "nbi_status": _yes_no(_NBI, no=_WHITE, denied=rf"(?:(?:\w+ )?(?:in|use|using|with|under|by) )?(?:{_NBI})"),
    "occlusion_check": _yes_no(
        _BLOCK, r"un(?:obstructed|occluded|blocked|obscured)|clear (?:view|field)"
           r"|(?:mucosa|view|field)(?: \w+){0,4}? (?:visible|clear|open)"),
    "scope_backward_motion": _yes_no(_WITHDRAW, no=rf"{_ADVANCE}|{_REST}", denied=rf"{_WITHDRAW}|{_MOVE}"),
    "scope_forward_motion": _yes_no(_ADVANCE, no=rf"{_WITHDRAW}|{_REST}", denied=rf"{_ADVANCE}|{_MOVE}"),
    # "not advancing" leaves withdrawing, so only a denied movement means no
    "scope_motion": ClosedAnswers({"yes": rf"{_MOVE}|{_ADVANCE}|{_WITHDRAW}", "no": _REST}, {"no": _MOVE}, polar=True),
    "scope_motion_type": ClosedAnswers({"advancing": _ADVANCE, "withdrawing": _WITHDRAW}),
    "scope_outside": _yes_no(
        r"outside|out of (?:the )?(?:patient|body)|external\w*",
        no=r"inside|within|internal\w*|in (?:the |a )?(?:patient|body|colon|lumen)"),
    "tool_catheter_check": _yes_no("catheters?", "forceps?|snares?", "catheters?|tool|instrument", about=_THINGS),
    "tool_identification": ClosedAnswers({"catheter": "catheters?", "forceps": "forceps?", "snare": "snares?"}),
}

_SENTENCE_END = re.compile(r"(?<=[!?;])|\.(?!\d)")
_ECHO = re.compile(  # a question, with or without its mark: zero-shot models often repeat what they heard
    r".*\?$|(?:is|are|was|were|do|does|did|can|could|has|have)\b(?! not)"
    r"|(?:(?:what|where|which|how|(?:in|at|into) (?:what|which))|(?:if|when)\b[^,]*, (?:is|are|do|does))\b")
_CLAUSE_START = re.compile(
    r"[,:;()!]|\b(?=(?:and|but|yet|however|while|whereas|although|though|because|since|so|as|which|then"
    r"|(?<!e[dn] )with|without|rather than|instead of|nor)\b)")
_POLAR = {
    "yes": re.compile(r"\b(?:yes|yeah|yep)\b(?! is\b)|^(?:it|they|this|that) (?:is|are|does|do)$"),
    "no": re.compile(r"\b(?:nope|no(?= (?:the|it|its|this|that|these|those|there|they|we|i|an?)\b| ?$))\b"
                     r"|^(?:(?:it|they|this|that) (?:is|are|does|do)|\w+ly) not$"),
}
_NEGATION = re.compile(rf"\b(?:{_NOT}|{_GONE})\b")
_ASSENT = re.compile(  # as much as "yes"
    r"\b(?:there (?:is|can be) |i have )?(?:no|little|(?:without|beyond)(?: an?y?)?) (?:doubt|question)\b"
    r"(?: about (?:it|this|that)\b)?(?: that\b)?")
_RAISED = re.compile(  # "I do not think it moves": it is the moving that is denied
    r"\bnot (?:think|believe|true|the case|correct)(?: that)?( (?:(?:the|an?|any|this|that|these|those) )?\w+)\b")
_PART_DENIED = re.compile(rf"\b(?:not|no|never)(?: \w+){{0,2}}? {_WHOLLY}\b")
_UNDECIDED = re.compile(
    r"\b(?:whether|doubt(?:s|ful)?|questionable|un(?:sure|certain|clear|known|able)|not (?:sure|certain|know)"
    r"|not clear (?:if|from)|(?:tell|say|know|see|determine|judge|sure|clear) if)\b"
    r"|\b(?:can not|could not|impossible to|not possible to|hard to|difficult to)(?: be)?"
    r" (?:determin|tell|say|know|confirm|assess|judg|identif|answer|conclu)")
# fmt: on


def _mentions(clause: str, forms: Mapping[str, str]) -> list[tuple[str, int, int]]:
    """(name, start, end) of the forms in a clause; of overlapping ones the longest: "upper left" hides "left"."""
    found = [(name, *match.span()) for name, form in forms.items() for match in _words(form).finditer(clause)]
    kept: list[tuple[str, int, int]] = []
    for name, start, end in sorted(found, key=lambda m: (m[1] - m[2], m[1])):
        if all(end <= other_start or other_end <= start for _, other_start, other_end in kept):
            kept.append((name, start, end))
    return kept


def _named_in_clause(clause: str, closed: ClosedAnswers) -> set[str]:
    mentions, negations = _mentions(clause, closed.asserted), len(_NEGATION.findall(clause))
    if negations == 0:
        return {name for name, _, _ in mentions}
    # "not absent", "no ... not": nobody should be credited for a guess at what was meant
    if negations > 1 or _PART_DENIED.search(clause) or _words(closed.elsewhere).search(clause):
        return set()
    # "does not move left" denies one direction, not all motion: an option in the clause that the denial does not cover
    # leaves the clause without an answer
    forms = (*closed.denied.values(), closed.covers)
    spans = [match.span() for form in forms for match in _words(form).finditer(clause)]
    covered = all(any(s < end and start < e for s, e in spans) for _, start, end in mentions)
    return {option for option, form in closed.denied.items() if covered and _words(form).search(clause)}


@functools.cache  # the same text is asked for when it is written, scored and counted
def named_options(prediction: str, closed: ClosedAnswers) -> frozenset[str]:
    """The options that a prediction names; OTHER: an answer of the kind that is none.

    Echoed questions, clauses that leave the matter open, and clauses with two negations name nothing.
    """
    named: set[str] = set()
    text = simplify(prediction)
    text = "yes" if _ASSENT.fullmatch(text.strip(" .!")) else _RAISED.sub(r"\1 not", _ASSENT.sub("", text))
    for sentence in map(str.strip, _SENTENCE_END.split(text)):
        if _ECHO.match(sentence):
            continue
        for clause in map(str.strip, _CLAUSE_START.split(sentence)):
            if _UNDECIDED.search(clause):
                continue
            for name, form in _POLAR.items() if closed.polar else ():
                named |= {name for match in form.finditer(clause) if not _NEGATION.search(clause, 0, match.start())}
                clause = form.sub("", clause).strip()
            named |= _named_in_clause(clause, closed)
    if closed.compose:
        named = {option for option, parts in closed.compose.items() if parts <= named} | ({OTHER} & named)
    return frozenset(named)


# ---------------------------------------------------------------------------------------------------------------------
# The four metrics
# ---------------------------------------------------------------------------------------------------------------------

WORD_FORMS = {"complete": "complete(?:ly)?", "down": "down(?:ward)?", "up": "up(?:ward)?"}  # of `token`


def without_thought(prediction: str) -> str:
    """What a prediction says after `<think>...</think>`: nothing, where the thought does not end."""
    spoken = re.split("</think>", prediction, flags=re.IGNORECASE)[-1]  # a chat template may hold the opening mark
    return re.split("<think>", spoken, flags=re.IGNORECASE)[0]


def gold_option(question_type: str, short_answer: str) -> str | None:
    """The option that a gold short answer is; None if the table does not know the type or the answer."""
    options = CLOSED_ANSWERS[question_type].options if question_type in CLOSED_ANSWERS else ()
    return next((option for option in options if normalise(option) == normalise(short_answer)), None)


def judge(prediction: str | None, question_type: str, short_answer: str, answer: str) -> dict[str, bool]:
    """Right or wrong per metric. A missing prediction (None) is wrong by every metric.

    choice: the prediction names exactly one option of its question type, and it is the gold one; `strict` where the
    table does not know the type or the gold answer.
    strict: the normalised prediction is the short or the full gold answer and nothing else.
    token: the rule of the data's authors: the short answer, or its `WORD_FORMS`, is a whole word in it, case aside.
    contains: the rule of the original project: the short answer occurs in it, case aside. "normal" is right where "no"
    is asked. Each looks at what follows `<think>...</think>` only.
    """
    if prediction is None:
        return dict.fromkeys(METRICS, False)
    prediction = without_thought(prediction)
    option = gold_option(question_type, short_answer)
    strict = normalise(prediction) in map(normalise, (short_answer, answer))
    choice = strict if option is None else named_options(prediction, CLOSED_ANSWERS[question_type]) == {option}
    gold, text = short_answer.lower(), prediction.lower()
    token = re.search(rf"(?<!\w){WORD_FORMS.get(gold, re.escape(gold))}(?!\w)", text) is not None
    return {"choice": choice, "strict": strict, "token": token, "contains": gold in text}


def predicted_label(prediction: str, question_type: str) -> str:
    """What a prediction amounts to, for counting answers: the one option it names, else its normalised text."""
    closed = CLOSED_ANSWERS.get(question_type)
    prediction = without_thought(prediction)
    named = named_options(prediction, closed) if closed else ()
    return normalise(*named if len(named) == 1 and OTHER not in named else [prediction])


def loops(prediction: str) -> bool:
    """Is the text a repetition loop: two or more characters, with a letter or digit, four times in a row, or one
    character ten times in a row ("ForCanBeConvertedForCanBe...", "no no no no", "!!!!!!!!!!")?
    """
    text = " ".join(prediction.split()) + " "
    repeated = (match[1] for match in re.finditer(r"(?=(.{2,80}?)\1{3})", text))
    return any(re.search(r"\w", unit) for unit in repeated) or bool(re.search(r"(\S)\1{9}", text))


@dataclass(frozen=True)
class Scored:
    """One evaluated row: what was asked for, the model's text (None: failed or missing), right or wrong per metric."""

    key: Key
    question_type: str
    gold: str  # normalised short answer; "" where there is none
    prediction: str | None
    correct: dict[str, bool]  # {} without gold: no figure can take such a row in
    finish_reason: str  # eos, length, error, missing, or unknown where the prediction file does not say


def score_rows(annotations: Sequence[Row], predictions: Mapping[Key, Row]) -> list[Scored]:
    """Score every annotation row by its predicted text alone, in file order. None or no prediction is wrong."""
    scored = []
    for row in annotations:
        key = row_key(row)
        kind = row["question_type"]
        short, answer = (row["short_answer"], row["answer"]) if has_gold(row) else ("", "")
        found = predictions.get(key)
        text = found and found["predicted_answer"]
        finish = "error" if found else "missing"
        if text is not None:
            finish = found.get("finish_reason") or "unknown"
        correct = judge(text, kind, short, answer) if short else {}
        scored.append(Scored(key, kind, normalise(short), text, correct, finish))
    return scored


def with_gold(rows: Sequence[Scored]) -> list[Scored]:
    """Those that are right or wrong."""
    return [row for row in rows if row.correct]


def answer_row(annotation: Row, predicted_answer: str | None, **how: Any) -> Row:
    """One row of the output file; `correct` is by `contains`, and null without gold, as are the gold answers. `how`:
    more fields, those of `ArmInputs.origin` too."""
    judged, gold = dict.fromkeys(METRICS), {"answer": None, "short_answer": None}
    if has_gold(annotation):
        gold = annotation
        judged = judge(predicted_answer, annotation["question_type"], gold["short_answer"], gold["answer"])
    return {
        **{name: annotation[name] for name in ("id", "video_id", "question_type", "question")},
        "ground_truth": gold["answer"],
        "short_answer": gold["short_answer"],
        "predicted_answer": predicted_answer,
        "question_id": annotation["id"],  # this and the next: as the public SurgViVQA-Audio scripts name them
        "exact_match": judged["contains"] if judged["contains"] is None else int(judged["contains"]),
        "correct": judged["contains"],
        "strict_correct": judged["strict"],
        "choice_correct": judged["choice"],
        "token_correct": judged["token"],
        **how,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Intervals and tests
# ---------------------------------------------------------------------------------------------------------------------


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion, both ends within [0, 1] (Wilson, JASA 22, 1927). `n` is at least 1."""
    p, z2 = right / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # the ends are exactly 0 and 1, not up to rounding
    return 0.0 if right == 0 else centre - half, 1.0 if right == n else centre + half


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value that A and B are equally often right, from the rows that only one of them has right.

    Twice the smaller binomial tail, at most 1, in integers: thousands of rows neither overflow nor underflow.
    """
    n = only_a + only_b
    tail = term = 1  # C(n, 0), and the sum of C(n, k) up to the smaller count
    for k in range(1, min(only_a, only_b) + 1):
        term = term * (n - k + 1) // k
        tail += term
    return min(1.0, 2 * tail / 2**n)


def sign_flip_test(differences: Iterable[int]) -> float:
    """Two-sided exact p-value that differences, one a video, are as likely to have either sign.

    Fisher's permutation test for pairs (The Design of Experiments, 1935, section 21): the share of all 2^k choices of
    signs whose sum is at least as far from 0. Rows of one video need not be independent.
    """
    sums, observed, n = Counter({0: 1}), 0, 0
    for difference in differences:
        flipped = Counter()
        for total, ways in sums.items():
            flipped[total + difference] += ways
            flipped[total - difference] += ways
        sums, observed, n = flipped, observed + difference, n + 1
    return sum(ways for total, ways in sums.items() if abs(total) >= abs(observed)) / 2**n


def binomial(k: int, n: int, p: float) -> float:
    """Probability of k successes in n."""
    if p in (0, 1):
        return float(k == n * p)
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))


@functools.cache
def most_for_worse(m: int) -> int:
    """Of m rows that one side alone has right, how many the worse may have at p < 0.05 (McNemar). -1: not even 0."""
    return bisect.bisect_left(range(m // 2 + 1), True, key=lambda k: mcnemar_exact(k, m - k) >= SIGNIFICANCE) - 1


def mcnemar_power(n: int, discordant: float, difference: float) -> float:
    """Probability that `mcnemar_exact` on n rows gives p < 0.05 in favour of the better side.

    `discordant` is the share of rows that just one side has right, `difference` that of the two accuracies (above 0, at
    most `discordant`). Exact and unconditional, as in Duffy, Biometrics 40, 1984, 1005-1015: the number of discordant
    rows is binomial, and so is, given it, the number of those that the worse side has right.
    """

    def likely(n: int, p: float) -> range:  # all but less than a millionth
        spread = 5 * math.sqrt(n * p * (1 - p)) + 2
        return range(max(0, int(n * p - spread)), min(n, int(n * p + spread)) + 1)

    worse = (1 - difference / discordant) / 2
    power = 0.0
    for m in likely(n, discordant):
        lost = (k for k in likely(m, worse) if k <= most_for_worse(m))
        power += binomial(m, n, discordant) * math.fsum(binomial(k, m, worse) for k in lost)
    return power


def detectable_difference(n: int, discordant: int) -> float | None:
    """Smallest difference of two accuracies that `mcnemar_exact` on n rows finds with 80 % power, to 0.001; None: none.

    The two sides disagree on as many rows as `discordant` of these n, or on as many as the difference needs.
    """

    def found(thousandth: int) -> bool:
        difference = thousandth / 1000
        return mcnemar_power(n, max(discordant / n, difference), difference) >= POWER

    step = bisect.bisect_left(range(1, 1001), True, key=found)
    return (step + 1) / 1000 if step < 1000 else None


def paired_difference_interval(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, float]:
    """95 % interval of accuracy(B) - accuracy(A) on the same rows, given the four counts (their sum at least 1).

    Method 10 of Newcombe, Statistics in Medicine 17, 1998, 2635-2650 (score intervals, continuity-corrected phi).
    """
    right_a, right_b, n = both + only_a, both + only_b, both + only_a + only_b + neither
    p_a, p_b, difference = right_a / n, right_b / n, right_b / n - right_a / n
    (low_a, high_a), (low_b, high_b) = wilson_interval(right_a, n), wilson_interval(right_b, n)
    determinant = both * neither - only_a * only_b
    if determinant > 0:
        determinant = max(determinant - n / 2, 0)
    product = right_a * (n - right_a) * right_b * (n - right_b)
    phi = determinant / math.sqrt(product) if product else 0.0

    def distance(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    low, high = difference - distance(p_b - low_b, high_a - p_a), difference + distance(high_b - p_b, p_a - low_a)
    return max(low, -1.0), min(high, 1.0)


def paired_comparison(a: Sequence[Scored], b: Sequence[Scored], metric: str) -> Row:
    """B against A on one metric: accuracies, difference B - A, its 95 % interval, McNemar's p.

    `p_videos` is the p-value over videos, None with fewer than MIN_VIDEOS. ValueError unless both hold the same rows.
    """
    right_a, right_b = ({row.key: row.correct[metric] for row in rows} for rows in (a, b))
    if right_a.keys() != right_b.keys():
        raise ValueError("the two sides do not hold the same rows")
    n = len(right_a)
    by_video = Counter()  # rows that only B has right, less those that only A has
    for key, right in right_b.items():
        by_video[key[0]] += right - right_a[key]
    counts = Counter((right_a[key], right_b[key]) for key in right_a)
    both, only_a, only_b, neither = (counts[pair] for pair in itertools.product((True, False), repeat=2))
    return {
        "n": n,
        "accuracy_a": (both + only_a) / n,
        "accuracy_b": (both + only_b) / n,
        "difference": (only_b - only_a) / n,
        "ci95": list(paired_difference_interval(both, only_a, only_b, neither)),
        "p": mcnemar_exact(only_a, only_b),
        "only_a": only_a,
        "only_b": only_b,
        "n_videos": len(by_video),
        "p_videos": sign_flip_test(by_video.values()) if len(by_video) >= MIN_VIDEOS else None,
    }


def video_interval(rows: Sequence[Scored], metric: str) -> list[float] | None:
    """95 % percentile interval of the accuracy when videos are drawn again (seeded).

    Rows of a video resemble each other, so this interval speaks about other videos, which Wilson's does not. None with
    fewer than MIN_VIDEOS, and where it would have no width.
    """
    by_video: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        by_video[row.key[0]].append(row.correct[metric])
    if len(by_video) < MIN_VIDEOS:
        return None
    counts = [(sum(right), len(right)) for _, right in sorted(by_video.items())]
    draw = random.Random(0)
    accuracies = []
    for _ in range(VIDEO_RESAMPLES):
        sample = draw.choices(counts, k=len(counts))
        accuracies.append(sum(right for right, _ in sample) / sum(n for _, n in sample))
    cuts = statistics.quantiles(accuracies, n=40, method="inclusive")  # 39 cut points, 2.5 % apart
    return [cuts[0], cuts[-1]] if cuts[0] < cuts[-1] else None


# ---------------------------------------------------------------------------------------------------------------------
# Reference lines: what a model without speech or frames would score
# ---------------------------------------------------------------------------------------------------------------------

REFERENCES = ("chance", "train_majority", "test_majority")


def group_by_type(rows: Iterable[Scored]) -> dict[str, list[Scored]]:
    """Rows per question type, types in alphabetical order."""
    groups: dict[str, list[Scored]] = defaultdict(list)
    for row in rows:
        groups[row.question_type].append(row)
    return dict(sorted(groups.items()))


def group_by_family(rows: Iterable[Scored]) -> dict[str, list[Scored]]:
    """Rows per family of question types, in the order of FAMILIES, then "other"; only families that have rows."""
    family_of = {kind: family for family, kinds in FAMILIES.items() for kind in kinds}
    groups: dict[str, list[Scored]] = {family: [] for family in (*FAMILIES, "other")}
    for row in rows:
        groups[family_of.get(row.question_type, "other")].append(row)
    return {family: group for family, group in groups.items() if group}


def majority_answers(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """(type, normalised short answer) pairs -> the commonest answer of each type, the first of equal ones."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for kind, gold in pairs:
        counts[kind][gold] += 1
    return {kind: min(golds, key=lambda gold: (-golds[gold], gold)) for kind, golds in counts.items()}


def reference_lines(rows: Sequence[Scored], train_majority: Mapping[str, str] | None) -> Row:
    """Accuracy of three guessers on `rows`; None for each with no rows.

    chance guesses uniformly among the gold answers that its type has in `rows`; train_majority gives the commonest
    answer of the type in training (None without; a type that is not there is wrong), test_majority that in `rows`.
    """
    if not rows:
        return dict.fromkeys(REFERENCES)
    n_golds = {kind: len({row.gold for row in group}) for kind, group in group_by_type(rows).items()}

    def share(majority: Mapping[str, str]) -> float:
        return sum(majority.get(row.question_type) == row.gold for row in rows) / len(rows)

    return {
        "chance": math.fsum(1 / n_golds[row.question_type] for row in rows) / len(rows),
        "train_majority": None if train_majority is None else share(train_majority),
        "test_majority": share(majority_answers((row.question_type, row.gold) for row in rows)),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Warnings
# ---------------------------------------------------------------------------------------------------------------------


def finish_counts(rows: Sequence[Scored]) -> Row:
    """How the answers ended. `loops` counts repetition loops, whichever way they ended."""
    counts = Counter(row.finish_reason for row in rows)
    looping = sum(loops(row.prediction) for row in rows if row.prediction is not None)
    return {reason: counts[reason] for reason in ("eos", "length", "error", "missing", "unknown")} | {"loops": looping}


def answers_of(group: Sequence[Scored]) -> tuple[Counter, Counter]:
    """How often each gold answer and each given answer (`predicted_label`) occurs among rows of one type."""
    given = (predicted_label(row.prediction, row.question_type) for row in group if row.prediction is not None)
    return Counter(row.gold for row in group), Counter(given)


def collapse_warnings(rows: Sequence[Scored]) -> list[str]:
    """At most one line, which lists the types that the model answers alike although their gold answers are balanced.

    Alike: one answer for over 90 % of at least COLLAPSE_MIN_ROWS rows, or fewer than half of the gold answers given.
    """
    groups = group_by_type(rows)
    alike = []
    for kind, group in groups.items():
        n = len(group)
        gold, given = answers_of(group)
        balanced = len(gold) > 1 and max(gold.values()) / n <= BALANCE_SLACK / len(gold)
        if n < COLLAPSE_MIN_ROWS or not balanced or not given:
            continue
        (top, count), both = given.most_common(1)[0], len(gold.keys() & given.keys())
        if count / n > COLLAPSE_SHARE:
            alike.append(f"{kind} '{top[:40]}' in {count} of {n} rows")
        elif 2 * both < len(gold):
            alike.append(f"{kind} {both} of {len(gold)} gold answers ever given")
    return [f"mode collapse in {len(alike)} of {len(groups)} question types: {'; '.join(alike)}"] if alike else []


# What training may have had of a row, by `VQARow.contents`, in words.
SEEN = {"clip": "the clip", "frame": "a frame", "speech": "the speech", "wording": "the wording"}


def seen_warnings(contents: Mapping[Key, Mapping[str, Iterable[bytes]]], seen: set[bytes]) -> list[str]:
    """Lines for rows that training had. `contents`: digests by row and SEEN; `seen`: digests of training."""
    found = {key: [k for k, digests in row.items() if not seen.isdisjoint(digests)] for key, row in contents.items()}
    counts = Counter(itertools.chain(*found.values()))
    n = len(found)
    lines = []
    if parts := [f"{text} of {counts[kind]}" for kind, text in SEEN.items() if counts[kind]]:
        lines.append(f"seen in training, by content: of {n} rows {', '.join(parts)}")
    if other := [key for key, kinds in found.items() if "speech" in kinds and "wording" not in kinds]:
        what = f"{len(other)} of {n} rows play a recording that training had, and ask in words that it had not"
        lines.append(f"speech of training: {what}, e.g. {key_text(other[0])}; see --audio_dir and --audio_pattern")
    return lines


def shared_speech_warnings(contents: Mapping[Key, Mapping[str, Sequence[bytes]]]) -> list[str]:
    """A line for rows whose recording, told by its bytes, also serves another wording; `contents` as in the above."""
    words = defaultdict(set)
    for row in contents.values():
        for speech in row["speech"]:
            words[speech].update(row["wording"])
    if not (found := [key for key, row in contents.items() if any(len(words[speech]) > 1 for speech in row["speech"])]):
        return []
    what = f"{len(found)} of {len(contents)} rows play a recording whose bytes also serve a question in other words"
    return [f"one recording for several questions: {what}, e.g. {key_text(found[0])}; see --audio_dir"]


def overlap_warnings(annotations: Sequence[Row], train_rows: Sequence[Row]) -> list[str]:
    """Lines for evaluated rows whose frames, or ids within their video, also stand in the training file."""

    def parts(row: Row) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
        video = row["video_id"]
        return {(video, str(frame)) for frame in row.get("frames") or ()}, {(video, row["id"])}

    lines = []
    for i, text in enumerate(("use a frame that training also used", "have a video and id that training also had")):
        in_training = set().union(*(parts(row)[i] for row in train_rows))
        if count := sum(not parts(row)[i].isdisjoint(in_training) for row in annotations):
            lines.append(f"not held out: {count} of {len(annotations)} rows {text}")
    return lines


def compare_with_training(annotations: Sequence[Row], train_rows: Sequence[Row]) -> Row:
    """{"majority": `majority_answers` of the training rows, "warnings": `overlap_warnings`}."""
    majority = majority_answers((row["question_type"], normalise(row["short_answer"])) for row in train_rows)
    return {"majority": majority, "warnings": overlap_warnings(annotations, train_rows)}


def answer_warnings(rows: Sequence[Scored]) -> list[str]:
    """Lines for answers cut at the length limit, repetition loops, failed or missing rows, and few videos."""
    counts = finish_counts(rows)
    texts = {
        "length": "answers were cut at the length limit (--max_new_tokens)",
        "loops": "answers are repetition loops",
        "error": "rows failed; they count as wrong",
        "missing": "rows have no prediction; they count as wrong",
    }
    lines = [f"{counts[name]} of {len(rows)} {text}" for name, text in texts.items() if counts[name]]
    if thoughts := sum(without_thought(row.prediction or "") != (row.prediction or "") for row in rows):
        lines.append(f"{thoughts} of {len(rows)} answers hold <think>...</think>, which is cut off before scoring")
    return lines + few_videos(row.key for row in rows)


def few_videos(keys: Iterable[Key]) -> list[str]:
    """A line that says how few patients the rows come from, or none from MIN_VIDEOS videos on."""
    videos = sorted({key[0] for key in keys})
    if len(videos) >= MIN_VIDEOS:
        return []
    whose = f"{len(videos)} patient{'s' * (len(videos) > 1)} (one video each: {', '.join(videos)})"
    return [f"the rows are of {whose}, too few to say how others would fare: no interval or test over videos"]


def below_majority_warnings(figures: Mapping[str, Row]) -> list[str]:
    """Lines for the sets of rows, by their names, whose `choice` is below their training majority."""
    lines = []
    for name, part in figures.items():
        choice, constant = part["metrics"]["choice"]["accuracy"], part["baselines"]["train_majority"]
        if constant is not None and choice < constant:
            scores = f"one constant answer per question type scores {_show(constant)} %, this model {_show(choice)} %"
            lines.append(f"below the training majority on {name}: {scores}")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Summary
# ---------------------------------------------------------------------------------------------------------------------


def accuracy(rows: Sequence[Scored], metric: str) -> Row:
    """{"accuracy", "ci95", "n", "correct"} of one metric; accuracy and interval are None with no rows."""
    n, right = len(rows), sum(row.correct[metric] for row in rows)
    share, interval = (right / n, list(wilson_interval(right, n))) if n else (None, None)
    return {"accuracy": share, "ci95": interval, "n": n, "correct": right}


def accuracies(rows: Sequence[Scored]) -> Row:
    """Every metric over `rows`, with its macro average over question types and its interval over videos."""
    groups = group_by_type(rows).values()
    return {
        metric: {
            **accuracy(rows, metric),
            "macro": statistics.fmean(accuracy(group, metric)["accuracy"] for group in groups) if rows else None,
            "ci95_videos": video_interval(rows, metric),
        }
        for metric in METRICS
    }


def type_figures(group: Sequence[Scored], majority: Mapping[str, str] | None) -> Row:
    """Metrics, reference lines and the number of distinct answers, gold and given, of the rows of one type."""
    gold, given = answers_of(group)
    known = majority and group[0].question_type in majority
    return {
        "n": len(group),
        **{metric: accuracy(group, metric) for metric in METRICS},
        **reference_lines(group, majority if known else None),
        "n_gold_answers": len(gold),
        "n_given_answers": len(given),
    }


def family_figures(group: Sequence[Scored], majority: Mapping[str, str] | None) -> Row:
    """The question types of a family, and metrics and reference lines over all their rows."""
    parts = {metric: accuracy(group, metric) for metric in METRICS} | reference_lines(group, majority)
    return {"types": sorted({row.question_type for row in group}), "n": len(group), **parts}


def summarise(
    annotations: Sequence[Row],
    rows: Sequence[Scored],
    *,
    arms: Row | None = None,
    manifest: Row | None = None,
    provenance: Sequence[str] = (),
) -> Row:
    """The content of X.summary.json. `rows` are the scored `annotations`; `arms` comes from `summarise_arms`.

    `training` (from `compare_with_training`) and `data_warnings` of the manifest tell what needs the data;
    `provenance` (from `provenance_warnings`) what is not known of the answers. No figure takes in rows without gold.
    """
    manifest = manifest or {}
    training = manifest.get("training") or {"majority": None, "warnings": []}
    majority = training["majority"]
    headline = [*provenance, *training["warnings"], *manifest.get("data_warnings", ())]

    def figures(part: Sequence[Scored]) -> Row:
        return {"metrics": accuracies(part), "baselines": reference_lines(part, majority)}

    answered, rows = rows, with_gold(rows)
    groups = group_by_type(rows)
    finish = finish_counts(answered)
    everything = figures(rows)
    golds = {(row["question_type"], row["short_answer"]) for row in annotations if has_gold(row)}
    varied = [kind for kind, group in groups.items() if len({row.gold for row in group}) > 1]
    subset = [row for row in rows if row.question_type in varied]
    discriminative = {
        "n": len(subset),
        "types": varied,
        "types_excluded": [kind for kind in groups if kind not in varied],
        **figures(subset),
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "n_total": len(answered),
        "n_without_gold": len(answered) - len(rows),
        "n_scored": sum(row.prediction is not None for row in rows),
        "n_errors": finish["error"],
        "n_missing": finish["missing"],
        "metrics": everything["metrics"],
        "by_type": {kind: type_figures(group, majority) for kind, group in groups.items()},
        "by_family": {name: family_figures(group, majority) for name, group in group_by_family(rows).items()},
        "baselines": everything["baselines"],
        "original_baseline": ORIGINAL_BASELINE if clips_digest(row.key for row in rows) == ORIGINAL_CLIPS else None,
        "discriminative": discriminative,
        "finish": finish,
        "headline": headline,
        "warnings": [
            *headline,
            *below_majority_warnings({"all rows": everything, "the discriminative rows": discriminative}),
            *collapse_warnings(rows),
            *answer_warnings(answered),
            *gate_warnings(manifest.get("gates")),
        ],
        "types_without_options": sorted({kind for kind, short in golds if not gold_option(kind, short)}),
        "missing": [key_text(row.key) for row in answered if row.finish_reason == "missing"],
        "failed": [key_text(row.key) for row in answered if row.finish_reason == "error"],
        "arms": arms or {},
        "manifest": manifest,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Arms: the same rows with the speech or the frames taken away
# ---------------------------------------------------------------------------------------------------------------------

# Arms that test an ability, and their words in the verdict, which takes both: what is another row's may be told by more
# than its content, and silence and black frames are new to a model, or have an answer of their own. `text` is in
# neither table: it removes the speech but gives the question in words.
HEARING_ARMS = {"mismatched_audio": "another question's speech", "silent_audio": "silence in place of speech"}
NEXT_TO_NOTHING = 0.01  # of what other frames change: speech that changes less hardly reaches the answers
SEEING_ARMS = {"mismatched_frames": "the frames of another answer", "black_frames": "black frames"}


def draw_nearest(key: Key, apart: Mapping[Key, int], seed: int) -> Key:
    """The row that is least apart from the row `key`; a hash of seed and key picks among equal ones."""
    least = min(apart.values())
    nearest = sorted(other for other, by in apart.items() if by == least)
    digest = hashlib.sha256(f"{seed}/{key_text(key)}".encode()).digest()
    return nearest[int.from_bytes(digest[:8], "big") % len(nearest)]


def pair_mismatched_audio(
    annotations: Sequence[Row], samples: Mapping[Key, int | None], contents: Mapping[Key, Any], seed: int = 0
) -> dict[Key, Key]:
    """For each row, the row of another question type, question and recording whose speech it gets instead of its own.

    It is one whose speech differs least from its own in `samples`, so that little is cut off or padded; recordings are
    told apart by their `contents`, whatever they are called. Rows whose speech cannot be read (None) get and lend none.
    Raises InputError if a row has no such partner.
    """
    asked = {row_key(row): normalise(row["question"]) for row in annotations if samples[row_key(row)]}

    @functools.cache
    def partners(kind: str, question: str) -> list[Key]:
        return [key for key in asked if key[2] != kind and asked[key] != question]

    pairs = {}
    for key, question in asked.items():
        others = (other for other in partners(key[2], question) if contents[other] != contents[key])
        apart = {other: abs(samples[other] - samples[key]) for other in others}
        if not apart:
            what = f"{key_text(key)} has no row of another question type to borrow another recording from"
            raise InputError(f"--arms mismatched_audio: {what}; evaluate more question types or drop the arm")
        pairs[key] = draw_nearest(key, apart, seed)
    return pairs


def pair_mismatched_frames(
    annotations: Sequence[Row], clips: Mapping[Key, tuple[Any, int, tuple[int, int]]], seed: int = 0
) -> dict[Key, Key]:
    """For each row that has one, the row of its question type with another gold answer whose clip it gets.

    `clips`: of each row whose frames can be read their content, number, and (width, height). A borrowed clip has other
    content and as many frames, of the nearest size, so that the prompt keeps its tokens where it can.
    """
    known = (row for row in annotations if row_key(row) in clips and has_gold(row))
    gold = {row_key(row): normalise(row["short_answer"]) for row in known}
    alike = defaultdict(list)  # by question type and number of frames
    for key in gold:
        alike[key[2], clips[key][1]].append(key)
    pairs = {}
    for key, answer in gold.items():
        content, n, size = clips[key]
        others = (other for other in alike[key[2], n] if gold[other] != answer and clips[other][0] != content)
        apart = {other: sum(abs(a - b) for a, b in zip(size, clips[other][2], strict=True)) for other in others}
        if apart:
            pairs[key] = draw_nearest(key, apart, seed)
    return pairs


def summarise_borrowing(rows: Iterable[Row]) -> Row:
    """How many rows of `mismatched_audio` borrowed speech, how many had it cut or padded, and by how many seconds:
    [least, median, most], None where there are none."""
    changes = [row["audio_padded_samples"] / SAMPLE_RATE for row in rows if "audio_padded_samples" in row]
    parts = {"cut": sorted(-by for by in changes if by < 0), "padded": sorted(by for by in changes if by > 0)}
    return {"n": len(changes)} | {
        name: {"n": len(by), "seconds": [by[0], statistics.median(by), by[-1]] if by else None}
        for name, by in parts.items()
    }


def borrowing_sentence(arms: Row) -> str | None:
    """What was done to borrowed speech so that each row keeps its length, from the summary's `arms`."""
    borrowed = arms.get("mismatched_audio", {}).get("borrowed")
    if not borrowed:
        return None
    said = []
    for name in ("cut", "padded"):
        n, seconds = borrowed[name]["n"], borrowed[name]["seconds"]
        how = " by {0:.2f} to {2:.2f} s (median {1:.2f})".format(*seconds) if seconds else ""
        said.append(f"{n} {'was' if n == 1 else 'were'} {name}{how}")
    return f"Of {borrowed['n']} borrowed recordings {', '.join(said)}, so that each row keeps its number of tokens."


def plain_words(text: str) -> str:
    """What word error rates compare: lower case, and spaces for all that is neither letter nor digit."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def transcript_figures(rows: Iterable[Row]) -> Row | None:
    """Word error rate of the transcripts in rows of ASR_ARM, by `plain_words` over all their words: words left out, put
    in or replaced for each word of the question. `exact`: transcripts without an error. None: there are none."""
    import jiwer

    pairs = [(plain_words(row["question"]), plain_words(row["transcript"])) for row in rows if "transcript" in row]
    pairs = [pair for pair in pairs if pair[0]]
    if not pairs:
        return None
    said, heard = map(list, zip(*pairs, strict=True))
    exact = sum(itertools.starmap(str.__eq__, pairs))
    words = sum(len(text.split()) for text in said)
    return {"n": len(pairs), "words": words, "exact": exact, "word_error_rate": jiwer.wer(said, heard)}


def transcript_sentence(arms: Row) -> str | None:
    """How well the questions were transcribed, from the summary's `arms`."""
    if not (found := arms.get(ASR_ARM, {}).get("transcripts")):
        return None
    return (
        f"In {ASR_ARM} the word error rate is {_show(found['word_error_rate'])} % of {found['words']} words (lower "
        f"case, no punctuation); {found['exact']} of {found['n']} transcripts have no error."
    )


def left_out_sentence(arms: Row) -> str | None:
    """How many rows had no frames to borrow, from the summary's `arms`."""
    part = arms.get("mismatched_frames", {})
    if not (n := len(part.get("left_out", ()))):
        return None
    rows = n + part["metrics"]["choice"]["n"]
    why = "no clip of their question type has another gold answer and as many frames"
    return f"In mismatched_frames {n} of {rows} rows are left out: {why}."


def leaked_words(prompt: str, question: str, constant_prompt: str) -> list[str]:
    """Words of the question, sorted, that its prompt holds more often than the prompt without any question does."""

    def words(text: str) -> Counter:
        return Counter(re.findall(r"\w+", re.sub(r"<\|[^|>]*\|>", " ", text).casefold()))

    surplus = words(prompt) - words(constant_prompt)
    return sorted(words(question).keys() & surplus.keys())


def summarise_arms(main_arm: str, rows_of: Mapping[str, Sequence[Scored]], files: Mapping[str, str]) -> Row:
    """Per arm: file, metrics, finish, `left_out` (rows of the main arm that it lacks), and by metric `versus`, the
    comparison with the main arm over the arm's rows (None of itself)."""
    main = {row.key: row for row in rows_of[main_arm]}
    return {
        arm: {
            "file": files[arm],
            "left_out": sorted(map(key_text, main.keys() - {row.key for row in answered})),
            "n_errors": finish_counts(answered)["error"],
            "metrics": accuracies(rows := with_gold(answered)),
            "finish": finish_counts(answered),
            "versus": None
            if arm == main_arm or not rows
            else {metric: paired_comparison([main[row.key] for row in rows], rows, metric) for metric in METRICS},
        }
        for arm, answered in rows_of.items()
    }


def main_arm_of(arms: Row) -> str | None:
    """The arm of a summary that the others are compared with; None where there are no arms."""
    return next((arm for arm, part in arms.items() if not part["versus"]), None)


def arm_sentences(arms: Row) -> list[str]:
    """Does it hear? Does it see? One sentence each with the figures it rests on, from `summarise_arms`.

    "Yes" takes a loss in both arms of an ability.
    """
    main_arm = main_arm_of(arms)
    sentences = []
    for verb, candidates in (("hear", HEARING_ARMS), ("see", SEEING_ARMS)):
        pairs = {arm: arms[arm]["versus"]["choice"] for arm in candidates if arms.get(arm, {}).get("versus")}
        if not pairs:
            deaf = verb == "hear" and main_arm == "text"
            why = "in text mode the model gets no speech" if deaf else f"add {' and '.join(candidates)} to --arms"
            sentences.append(f"Does it {verb}? Not tested: {why}.")
            continue
        lacking = [arm for arm in candidates if arm not in pairs]
        if any(pair["difference"] >= 0 for pair in pairs.values()):
            verdict = "There is no sign of it"
        elif any(pair["p"] >= SIGNIFICANCE for pair in pairs.values()):
            verdict = "It may, but these rows are too few to tell"
        else:
            verdict = f"It may, and {lacking[0]} would tell: add it to --arms" if lacking else "Yes"
        figures = "; ".join(
            f"with {candidates[arm]}, choice goes from {_show(pair['accuracy_a'])} % to {_show(pair['accuracy_b'])} % "
            f"(difference {_points(pair['difference'])} points, 95 % {_points(*pair['ci95'])}; "
            f"p {_p_text(pair['p'])}; n {pair['n']})"
            for arm, pair in pairs.items()
        )
        sentences.append(f"Does it {verb}? {verdict}: {figures}.")
    return sentences


def gate_warnings(gates: Mapping[str, float | None] | None) -> list[str]:
    """Says where speech hardly moves the logits beside frames, from what `check_liveness` measured."""
    speech, frames = (gates or {}).get("speech"), (gates or {}).get("frames")
    if speech is None or speech >= NEXT_TO_NOTHING * frames:
        return []
    return [
        f"the speech hardly reaches the answers: other speech of the same length moves the log-probabilities of the "
        f"first token by {speech:.2g} on average, other frames by {frames:.2g}; the number of tokens may be what tells "
        f"the questions apart"
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Tables for the terminal, at most WIDTH columns
# ---------------------------------------------------------------------------------------------------------------------

Table = tuple[Sequence[str], list[Sequence[Any]]]  # header and rows; cells: text, counts, shares, intervals, None


def _show(cell: Any, between: str = " to ", digits: int = 1) -> str:
    """A share in %, an interval of shares as "25.5 to 36.6", None as a dash, all else as it is."""
    if isinstance(cell, list | tuple):
        return between.join(_show(end, digits=digits) for end in cell)
    return "-" if cell is None else f"{100 * cell:.{digits}f}" if isinstance(cell, float) else str(cell)


def _points(*values: float) -> str:
    """Differences of shares in points; -0.04 points are +0.0, not -0.0."""
    return " to ".join(f"{round(100 * value, 1) + 0.0:+.1f}" for value in values)


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def render_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns as wide as their content, two spaces apart; the first to the left, figures to the right."""
    columns = [list(map(_show, column)) for column in zip(header, *rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *map(str.rjust, figures, widths[1:])]).rstrip()
        for first, *figures in zip(*columns, strict=True)
    )


def metrics_table(metrics: Row) -> Table:
    """Every metric over all rows, from the summary's `metrics`."""
    names = ("correct", "n", "accuracy", "ci95", "macro", "ci95_videos")
    rows = [(metric, *(part[name] for name in names)) for metric, part in metrics.items()]
    return ("metric", "right", "n", "accuracy", "95 % interval", "macro", "over videos"), rows


def reference_table(summary: Row) -> Table:
    """`choice` beside the reference lines, over all rows and over the discriminative ones."""
    subset = summary["discriminative"]
    rows = [
        (name, n, part["metrics"]["choice"]["accuracy"], *(part["baselines"][line] for line in REFERENCES))
        for name, n, part in (
            ("all rows", summary["metrics"]["choice"]["n"], summary),
            ("discriminative rows", subset["n"], subset),
        )
    ]
    return ("", "n", "choice", "chance", "train majority", "test majority"), rows


def types_table(by_type: Row, by_family: Row) -> Table:
    """`choice`, distinct answers (given/gold) and the reference lines of each type, then, in brackets, of each family
    of types; from the summary's `by_type` and `by_family`."""
    rows = []
    for name, part in (*by_type.items(), *((f"[{family}]", part) for family, part in by_family.items())):
        share, interval = part["choice"]["accuracy"], _show(part["choice"]["ci95"], "-", 0)
        distinct = f"{part['n_given_answers']}/{part['n_gold_answers']}" if "n_gold_answers" in part else ""
        rows.append((name[:25], part["n"], share, interval, distinct, *(part[line] for line in REFERENCES)))
    return ("question type, [family]", "n", "choice", "95 %", "distinct", "chance", "train", "test"), rows


def arms_table(arms: Row) -> Table:
    """`choice` of each arm, its paired difference to the main arm and McNemar's p, from `summarise_arms`."""
    rows = []
    for arm, part in arms.items():
        choice = part["metrics"]["choice"]
        versus = ("", "", "")
        if part["versus"]:
            pair = part["versus"]["choice"]
            versus = _points(pair["difference"]), _points(*pair["ci95"]), _p_text(pair["p"])
        right = f"{choice['correct']}/{choice['n']}"
        if found := part.get("transcripts"):
            arm = f"{arm}, WER {_show(found['word_error_rate'])}"
        rows.append((arm, right, choice["accuracy"], _show(choice["ci95"], "-", 0), *versus))
    return ("arm", "choice", "%", "95 %", "diff", "95 % interval", "p"), rows


def comparison_table(pairs: Row) -> Table:
    """Metric -> `paired_comparison`, a line a metric, with the `detectable_difference` beside."""
    rows = []
    for metric, pair in pairs.items():
        counts = pair["only_a"], pair["only_b"]
        shown = pair["accuracy_a"], pair["accuracy_b"], _points(pair["difference"]), _points(*pair["ci95"])
        least = detectable_difference(pair["n"], sum(counts))
        rows.append((metric, *shown, least, *counts, _p_text(pair["p"])))
    return ("metric", "A", "B", "B - A", "95 % interval", "least", "only A", "only B", "p"), rows


def arms_notes(arms: Row) -> list[str]:
    """All sentences on the table of the arms."""
    said = transcript_sentence(arms), borrowing_sentence(arms), left_out_sentence(arms)
    return [*filter(None, said), *arm_sentences(arms)]


def render_arms(arms: Row) -> str:
    """The table of the arms, and the sentences on it."""
    return "\n".join([render_table(*arms_table(arms)), *map(_wrap, arms_notes(arms))])


def denominator_lines(summary: Row) -> list[str]:
    """Of which rows the accuracies are, and how many have no gold answer."""
    n, without = summary["n_total"], summary["n_without_gold"]
    if not without:
        return [f"Accuracy in %, of all {n} rows ({summary['n_errors']} failed, {summary['n_missing']} missing: wrong)"]
    lines = [f"{without} of {n} rows have no gold answer: answered, not scored"]
    if without == n:
        return [*lines, "No accuracy: --score_only scores these answers, given a file with the gold ones"]
    wrong = n - without - summary["n_scored"]
    return [*lines, f"Accuracy in %, of the {n - without} other rows ({wrong} failed or missing: wrong)"]


def render_accuracies(summary: Row) -> list[str]:
    """Metrics, reference lines, question types and the original rule, of rows with gold answers."""
    contains = summary["metrics"]["contains"]
    parts = [
        render_table(*metrics_table(summary["metrics"])),
        "",
        "choice beside what needs neither speech nor frames",
        render_table(*reference_table(summary)),
    ]
    if excluded := summary["discriminative"]["types_excluded"]:
        parts.append(_wrap(f"not discriminative (one gold answer): {', '.join(excluded)}"))
    beside = ""
    if baseline := summary["original_baseline"]:
        beside = f", beside the {100 * baseline:.0f} % baseline (audio + image, zero-shot, the 50 clips of 002-001)"
    original = (
        f"By the original rule (contains): {contains['correct']}/{contains['n']} correct = "
        f"{_show(contains['accuracy'])} %, 95 % {_show(contains['ci95'])}{beside}."
    )
    return [*parts, "", render_table(*types_table(summary["by_type"], summary["by_family"])), "", _wrap(original)]


def render_summary(summary: Row) -> str:
    """The report that the terminal shows: metrics, reference lines, question types, endings, baseline, warnings."""
    n = summary["n_total"]
    finish = summary["finish"]
    frames = summary["manifest"].get("frames")
    parts = [
        *denominator_lines(summary),
        *([_wrap(FRAMES_DIFFER.format(**frames))] if frames else []),
        *(_wrap(f"Warning: {line}") for line in summary["headline"]),
    ]
    scored = summary["n_without_gold"] < n
    if scored:
        parts += render_accuracies(summary)
    known = n - finish["unknown"]
    ended = ""
    if finish["eos"] or finish["length"] or known == n:
        ended = f"{finish['eos']}/{known} stopped by themselves = {_show(finish['eos'] / known)} %"
    if unknown := finish["unknown"]:
        silent = f"for {unknown} of {n} answers the file does not say how they ended"
        ended = f"{ended}; {silent}" if ended else silent.capitalize()
    parts.append(_wrap(f"{ended}."))
    if names := ", ".join(summary["types_without_options"]):
        parts.append(_wrap(f"No table of options covers every answer of {names}: choice is strict there."))
    for name in ("missing", "failed"):
        if keys := summary[name]:
            more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
            parts.append(_wrap(f"{name.capitalize()}: {', '.join(keys[:LISTED])}{more}"))
    if summary["arms"] and scored:
        parts += ["", render_arms(summary["arms"])]
    if others := summary["warnings"][len(summary["headline"]) :]:
        parts += ["", *(_wrap(f"Warning: {line}") for line in others)]
    return "\n".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Output files
# ---------------------------------------------------------------------------------------------------------------------


def summary_path(rows_path: str | Path) -> Path:
    """X.summary.json beside X.jsonl. Raises InputError unless the name ends in .jsonl."""
    path = Path(rows_path)
    if path.suffix != ".jsonl":
        raise InputError(f"--output_file {rows_path}: the name must end in .jsonl")
    return path.with_suffix(".summary.json")


def arm_path(rows_path: str | Path, arm: str, main_arm: str) -> Path:
    """X.jsonl for the main arm, X.{arm}.jsonl for another."""
    path = Path(rows_path)
    return path if arm == main_arm else path.with_suffix(f".{arm}.jsonl")


@contextlib.contextmanager
def _writing(path: Path, content: bytes, advice: str) -> Iterator[None]:
    """Turn an OSError, of a full disk above all, into one line that names what was needed and what is free."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        what = f"{len(content):,} bytes could not be written ({error.strerror}), {free:,} are free there"
        raise InputError(f"{path}: {what}; {advice}") from error


def write_json(path: str | Path, content: Row) -> None:
    """`replace_file` with an object as JSON."""
    data = json.dumps(content, indent=2, allow_nan=False).encode() + b"\n"
    replace_file(Path(path), data, "make room and run the same command again; no row is lost")


def replace_file(path: Path, content: bytes, advice: str) -> None:
    """Replace a file: a reader, or a crash, finds the old or the new one complete. InputError if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with _writing(path, content, advice):
            with open(draft, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read_beside(path: Path, fields: Mapping[str, type], advice: str) -> Row | None:
    """The JSON object with fields of these types in a file; None: no file. InputError with `advice` for others."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); {advice}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(name), kind) for name, kind in fields.items()):
        raise InputError(f"{path}: not written by this script; {advice}")
    return content


def check_output(args: argparse.Namespace) -> None:
    """Raise InputError where --output_file cannot become X.jsonl: its name, its folder, a question file, a writer."""
    path = Path(args.output_file)
    summary_path(path)
    for name in ("eval_data_path", "train_data_path"):
        data = getattr(args, name)
        if data and path.exists() and Path(data).exists() and path.samefile(data):
            raise InputError(f"--output_file {path}: is the file of --{name}; choose another name")
    check_writable(path, "--output_file")
    if path.exists():
        with open(path, "ab") as file:
            lock_rows(path, file)


def check_writable(path: Path, flag: str) -> None:
    """Raise InputError unless a file can be written at `path`, its folder made if need be."""
    there = next(part for part in (path, *path.absolute().parents) if part.exists())
    if (there.is_dir() if there == path else not there.is_dir()) or not os.access(there, os.W_OK):
        raise InputError(f"{flag} {path}: {there} cannot be written; choose another name")


def check_rows_of(path: str | Path, checkpoint: str) -> None:
    """Raise InputError where `path` holds other rows than those of an evaluation of the folder `checkpoint`."""
    if not Path(path).is_file() or not Path(path).stat().st_size:
        return
    if not Path(f"{path}.run.json").is_file():
        raise InputError(f"--output_file {path}: holds what no evaluation wrote; choose another name")
    try:
        made_of = json.loads(summary_path(path).read_bytes())["manifest"]["flags"]["checkpoint_path"]
    except (OSError, ValueError, LookupError, TypeError):  # an evaluation that did not end has none
        return
    if os.path.realpath(made_of or "") != os.path.realpath(checkpoint):
        raise InputError(f"--output_file {path}: holds the answers of {made_of}; choose another name or move them away")


def lock_rows(path: Path, file: Any) -> None:
    """Lock a rows file, as long as `file` is open; InputError where another process has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{path}: another run is writing it; wait for it or choose another name") from error


def check_same_run(path: Path, settings: Row, complete: bool = True) -> None:
    """Raise InputError unless X.jsonl.run.json holds `settings`; `complete`: and nothing else."""
    companion = Path(f"{path}.run.json")
    settings = json.loads(json.dumps(settings, allow_nan=False))  # as the stored ones are read back
    again = "choose another --output_file, or start again with --overwrite"
    stored = read_beside(companion, {}, again)
    if stored is None:
        raise InputError(f"{path}: rows without {companion.name}, so nothing tells which run made them; {again}")
    differing = [
        f"{name} ({stored.get(name)!r} then, {settings.get(name)!r} now)"
        for name in sorted(settings.keys() | (stored.keys() if complete else ()))
        if stored.get(name) != settings.get(name)
    ]
    if differing:
        raise InputError(f"{path}: its rows come from another run; {'; '.join(differing)}. {again.capitalize()}")


def complete_lines(content: bytes) -> bytes:
    """The lines of a rows file. A row is written with its newline in one go: what lacks one is incomplete."""
    return content[: content.rfind(b"\n") + 1]


class RowFile(contextlib.AbstractContextManager):
    """A rows file that a killed run can be resumed from: for one writer, each row flushed as it comes.

    `done` maps key -> row, of earlier runs too; `repaired`: bytes of a truncated last line that were cut. `settings`
    (from `run_settings`) are kept in X.jsonl.run.json. Where several ranks answer, this is the file of rank 0, which
    takes in those of the others (`PartFile`). Raises InputError for rows made with other settings or without them, and
    for a second writer.
    """

    def __init__(self, path: str | Path, settings: Row, *, overwrite: bool = False):
        self.path = Path(path)
        self.companion = Path(f"{path}.run.json")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as closing:  # of the file, if it cannot be continued
            self._file = closing.enter_context(open(self.path, "ab"))
            lock_rows(self.path, self._file)
            if overwrite:  # before the companion changes: a run killed in between leaves no rows under a new one
                self._file.truncate(0)
                for part in self.parts():
                    part.unlink()
            content = self.path.read_bytes()
            if content or self.parts():
                check_same_run(self.path, settings)
            else:
                write_json(self.companion, settings)
            complete = len(complete_lines(content))
            self._file.truncate(complete)
            self.repaired = len(content) - complete
            self.done = read_answer_rows(self.path)
            self.take_in()
            self._closing = closing.pop_all()

    def parts(self) -> list[Path]:
        """The files of other ranks that are not taken in yet."""
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.rank-*"))

    def take_in(self) -> None:
        """Move the rows of other ranks here. A kill meanwhile leaves some in both files: they are taken once."""
        for part in self.parts():
            with open(part, "rb+") as file:
                file.truncate(len(complete_lines(file.read())))
            for key, row in read_answer_rows(part).items():
                if key not in self.done:
                    self.append(row)
            part.unlink()

    def put_in_order(self, keys: Iterable[Key]) -> None:
        """Have the rows stand in the order of `keys`, others behind them: as one uninterrupted process writes them.
        InputError where the disk has no room for the file twice."""
        place = {key: number for number, key in enumerate(keys)}
        ordered = sorted(self.done, key=lambda key: place.get(key, len(place)))
        if ordered == list(self.done):
            return
        self.done = {key: self.done[key] for key in ordered}
        content = b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in self.done.values())
        replace_file(self.path, content, "make room and run the same command again; no row is lost")

    def append(self, row: Row) -> None:
        """Add a row at the end, completely or not at all; it survives a kill. InputError where the disk is full."""
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        advice = f"the {len(self.done)} rows before it are kept; make room, then the same command continues"
        with _writing(self.path, line, advice):
            try:
                written = 0
                while written < len(line):  # a disk that has just become full says so when asked for the rest
                    written += os.write(self._file.fileno(), line[written:])
            except OSError:
                self._file.truncate(size)
                raise
        self.done[row_key(row)] = row

    def __exit__(self, *exc: object) -> None:
        self._closing.close()


class PartFile(RowFile):
    """The rows of rank `rank`, not 0, in X.jsonl.rank-1 beside X.jsonl; `done` has those of X.jsonl too."""

    def __init__(self, path: Path, rank: int):
        self.done = {row_key(row): row for row in map(json.loads, complete_lines(path.read_bytes()).splitlines())}
        self.path = path.with_name(f"{path.name}.rank-{rank}")
        with contextlib.ExitStack() as closing:
            self._file = closing.enter_context(open(self.path, "ab"))
            self._closing = closing.pop_all()


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_state(folder: str | Path) -> Row:
    """{"commit", "dirty"} of the git tree around `folder`; both None where there is no git or no repository."""

    def git(*command: str) -> str:
        call = ["git", "-C", str(folder), *command]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (FileNotFoundError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def base_record(args: argparse.Namespace) -> Row:
    """What can be said of any run without a model: flags, data and script hashes, Python, git state."""
    files = {name: getattr(args, name) for name in ("eval_data_path", "train_data_path")}
    files["evaluate_checkpoint.py"] = __file__
    return {
        "flags": vars(args),
        "sha256": {name: sha256_file(path) for name, path in files.items() if path},
        "python": platform.python_version(),
        "git": git_state(Path(__file__).resolve().parent),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Without a model: --score_only and --compare
# ---------------------------------------------------------------------------------------------------------------------

SUMMARY_FIELDS = dict.fromkeys(("metrics", "arms", "manifest"), dict)


def media_flags(args: argparse.Namespace, manifest: Row) -> Row:
    """Where the media of a report lie: as `args` say, else as the flags of the run did."""
    names = ("frames_dir", "audio_dir", "frame_pattern", "audio_pattern", "eval_data_path")
    run = manifest.get("flags", {})
    return {name: value for name in names if (value := getattr(args, name) or run.get(name))}


def score_only(args: argparse.Namespace) -> int:
    """Score the predictions in --output_file, and the arms of the run that made them; print and write the summary.

    It keeps what the run told. Returns the exit status: 1 if a prediction is null (a sample that failed), else 0.
    """
    target = summary_path(args.output_file)
    old = read_beside(target, SUMMARY_FIELDS, "rescoring would replace it: move it away") or {"manifest": {}}
    generated = "model" in old["manifest"]
    limit = args.limit
    if generated and not limit and (limit := old["manifest"]["flags"].get("limit") or 0):
        print(f"   --limit {limit}, as in the run")
    every = read_annotations(args.eval_data_path, needs_gold=False)
    predictions = match_predictions(every, args.output_file)
    annotations = every[: limit or None]
    rows = score_rows(annotations, predictions)
    arms, notes = rescore_arms(old["arms"], len(rows), every, args.output_file) if generated else ({}, [])
    record = base_record(args)
    record["sha256"]["output_file"] = sha256_file(args.output_file)
    if generated:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record = old["manifest"] | {"rescored": {"at": now, **record}}
    if args.train_data_path:
        record["training"] = compare_with_training(annotations, read_annotations(args.train_data_path))
    elif generated and "training" not in record and record["flags"].get("train_data_path"):
        notes.append("no training majority: an older version wrote the summary; give --train_data_path")
    provenance = provenance_warnings(args.output_file, arms)
    summary = summarise(annotations, rows, arms=arms, manifest=record, provenance=provenance)
    summary["warnings"] += notes
    write_json(target, (old if generated else {}) | summary)
    print(render_summary(summary), f"\nSummary: {target}", sep="\n")
    if args.report or args.plot:
        main_arm = main_arm_of(arms)
        answers = {main_arm or Path(args.output_file).stem: predictions}
        files = {arm: arm_path(args.output_file, arm, main_arm) for arm in arms if arm != main_arm}
        answers |= {arm: match_predictions(every, path) for arm, path in files.items() if path.is_file()}
        write_report(args, annotations, answers, {next(iter(answers)): summary}, media_flags(args, record))
    return 1 if summary["n_errors"] or any(part["n_errors"] for part in arms.values()) else 0


def provenance_warnings(rows_path: str, arms: Row) -> list[str]:
    """Lines for rows that no run is known to have made, or that are not those that the run of `arms` wrote."""
    main_arm, run_file = main_arm_of(arms), Path(f"{rows_path}.run.json")
    if not run_file.is_file():
        return [f"nothing tells how these answers were made: there is no {run_file}"]
    files = {arm_path(rows_path, arm, main_arm): part["sha256"] for arm, part in arms.items() if part.get("sha256")}
    if not files:
        why = f"{summary_path(rows_path).name} has no sha256 of them"
        return [f"nothing tells whether these answers are those that the run wrote: {why}"]
    edited = ", ".join(path.name for path, known in files.items() if path.is_file() and sha256_file(path) != known)
    return [f"edited since the run wrote them, so the figures are not the run's: {edited}"] if edited else []


def rescore_arms(old: Row, n: int, annotations: Sequence[Row], rows_path: str) -> tuple[Row, list[str]]:
    """A summary's arms, their first `n` rows scored again, and a line for those that keep theirs, having no file."""
    main_arm = main_arm_of(old)
    files = {arm: arm_path(rows_path, arm, main_arm) for arm in old}
    there = {arm: path for arm, path in files.items() if path.is_file()}
    rows_of = {}
    for arm, path in there.items():
        asked = (row for row in annotations[:n] if key_text(row_key(row)) not in old[arm].get("left_out", ()))
        rows_of[arm] = score_rows(list(asked), match_predictions(annotations, path))
    new = summarise_arms(main_arm, rows_of, {arm: path.name for arm, path in files.items()})
    kept = ", ".join(f"{arm} ({files[arm].name})" for arm in old if arm not in new)
    notes = [f"not rescored, for want of the file; figures as the run gave them: {kept}"] if kept else []
    return {arm: part | new.get(arm, {}) for arm, part in old.items()}, notes


def read_pair(paths: Sequence[str], eval_data_path: str | None) -> tuple[list[Row], list[dict[Key, Row]]]:
    """Annotations with gold answers and the two sides' rows for --compare; InputError unless they hold the same rows
    and gold answers."""
    same = "compare runs over the same data"
    if eval_data_path:
        annotations = read_annotations(eval_data_path, needs_gold=False)
        sides = [match_predictions(annotations, path) for path in paths]
    else:
        sides = [read_answer_rows(path, "fix the row, or give --eval_data_path") for path in paths]
    for (here, rows), (there, others) in itertools.permutations(zip(paths, sides, strict=True)):
        if lacking := sorted(rows.keys() - others.keys()):
            some = ", ".join(map(key_text, lacking[:3]))
            raise InputError(f"--compare: {len(lacking)} rows of {here} are not in {there}, e.g. {some}; {same}")
    if not sides[0]:
        raise InputError(f"--compare: {paths[0]} and {paths[1]} hold no rows")
    if eval_data_path:
        return [row for row in annotations if row_key(row) in sides[0] and has_gold(row)], sides
    for key, name in itertools.product(sides[0], ("short_answer", "ground_truth")):
        gold_a, gold_b = (rows[key].get(name) for rows in sides)
        if gold_a != gold_b:
            differ = f"{gold_a!r} in {paths[0]} but {gold_b!r} in {paths[1]}"
            raise InputError(f"--compare: {key_text(key)} has the {name} {differ}; {same}")
    annotations = [{**row, "answer": row.get("ground_truth")} for row in sides[0].values()]
    return list(filter(has_gold, annotations)), sides


# Of `run_settings`, those that say which model answers: two models are what one compares.
MODEL_SETTINGS = (
    *("base_fingerprint", "adapter_sha256", "adapter_config_sha256", "manifest_sha256", "adapter_merged"),
    "load_in_4bit",
)


BESIDE = "move it away to compare without it"


def read_run(path: str) -> Row | None:
    """How rows were asked for, but for the model: X.jsonl.run.json (None: no such file) and the batch size."""
    run = read_beside(Path(f"{path}.run.json"), {"arm": str}, BESIDE)
    if run is None:
        return None
    sizes = manifest_of(path, run["arm"]).get("runtime", {}).get("batch_size", {})
    asked = {name: value for name, value in run.items() if name not in MODEL_SETTINGS}
    return asked | {"batch_size": sizes.get(run["arm"], "unknown")}


def manifest_of(path: str, arm: str = "") -> Row:
    """The manifest in the summary of the run that wrote the rows of `arm` in `path`; {} where there is none."""
    rows_path = Path(re.sub(rf"\.{re.escape(arm)}\.jsonl$", ".jsonl", path))
    return (read_beside(rows_path.with_suffix(".summary.json"), SUMMARY_FIELDS, BESIDE) or {"manifest": {}})["manifest"]


def unlike_warnings(paths: Sequence[str], sides: Sequence[Mapping[Key, Row]]) -> list[str]:
    """Lines for what else than the model differs between two files: wording, media, settings of the runs."""
    lines = []
    for name, read, what in (("question", normalise, "questions"), ("media_sha256", str, "frames or speech")):
        a, b = ({key: read(row[name]) for key, row in side.items() if row.get(name)} for side in sides)
        if other := [key for key in a.keys() & b.keys() if a[key] != b[key]]:
            lines.append(f"{len(other)} of {len(sides[0])} rows have other {what} in B, e.g. {key_text(min(other))}")
    runs = [read_run(path) for path in paths]
    if absent := [f"{path}.run.json" for path, run in zip(paths, runs, strict=True) if run is None]:
        return [*lines, f"without {' and '.join(absent)} nothing tells whether A and B were asked alike"]
    run_a, run_b = runs
    for name in sorted(run_a.keys() | run_b.keys()):
        a, b = run_a.get(name), run_b.get(name)
        if a != b:
            values = "differs" if name.endswith("_sha256") else f"is {a} in A, {b} in B"
            lines.append(f"A and B were not asked alike: {name.removesuffix('_sha256')} {values}")
    return lines


def compare(args: argparse.Namespace) -> int:
    """Print the paired differences B - A of two files over the same data, and what else differs. Returns status 0."""
    paths = args.compare
    if absent := [path for path in paths if not Path(path).is_file()]:
        raise InputError(f"--compare {absent[0]}: no such file; rows are compared (X.jsonl), and none are on the hub")
    annotations, sides = read_pair(paths, args.eval_data_path)
    if not annotations:
        raise InputError(f"--compare: no row of {paths[0]} has a gold answer; give them with --eval_data_path")
    scored_a, scored_b = (score_rows(annotations, rows) for rows in sides)
    pairs = {metric: paired_comparison(scored_a, scored_b, metric) for metric in METRICS}
    warnings = unlike_warnings(paths, sides) + few_videos(row.key for row in scored_a)
    if without := len(sides[0]) - len(annotations):
        warnings.insert(0, f"{without} of {len(sides[0])} rows have no gold answer and are left out")
    print("A  {}\nB  {}".format(*paths))
    print(f"Accuracy in % over the same {len(annotations)} rows; difference is B - A\n")
    print(render_table(*comparison_table(pairs)))
    legend = (
        "only A, only B: rows that just one has right. p: exact McNemar test, two-sided. least: the smallest "
        f"difference that so many rows show with {100 * POWER:.0f} % power, where A and B disagree as often as here; "
        "-: none."
    )
    notes = [legend]
    if (n := pairs["choice"]["n_videos"]) >= MIN_VIDEOS:
        by_metric = ", ".join(f"{metric} {_p_text(pair['p_videos'])}" for metric, pair in pairs.items())
        notes.append(f"p over {n} videos (exact test that flips the sign of each video's difference): {by_metric}.")
    print("", *map(_wrap, notes), *(_wrap(f"Warning: {line}") for line in warnings), sep="\n")
    if args.report or args.plot:
        report_pair(args, annotations, sides, changes_html(pairs, (scored_a, scored_b), notes, warnings))
    return 0


def report_pair(args: argparse.Namespace, annotations: Sequence[Row], sides: Sequence[Row], changes: str) -> None:
    """The page of --compare: the figures of both sides, with what the runs that made them recorded."""
    answers, summaries, flags = {}, {}, {}
    for name, path, rows in zip("AB", args.compare, sides, strict=True):
        run = read_beside(Path(f"{path}.run.json"), {"arm": str}, BESIDE) or {"arm": ""}
        record = base_record(args)
        record["sha256"]["rows"] = sha256_file(path)
        record |= manifest_of(path, run["arm"])
        answers[name] = rows
        summaries[name] = summarise(annotations, score_rows(annotations, rows), manifest=record)
        flags = media_flags(args, record) | flags
    write_report(args, annotations, answers, summaries, flags, changes)


# ---------------------------------------------------------------------------------------------------------------------
# With a model: what answers
# ---------------------------------------------------------------------------------------------------------------------


def load_libraries() -> None:
    """Import what answering needs, torch and train_vqa. Scoring and comparing start at once without them."""
    global torch, vqa
    import torch

    import train_vqa as vqa


@dataclass(frozen=True)
class ModelChoice:
    """The model that --checkpoint_path or --model_name_or_path names, and how it is loaded."""

    path: Path | str  # for `load_trained`: folder of an adapter or a model, or a hub id
    adapter: bool
    model: Any  # train_vqa's ModelSettings and InputSettings, the flags applied
    inputs: Any
    changes: Row  # fields of these two that the flags set
    trained_frames: int | None  # frames a clip in training; 0: all; None: not known, or nothing was trained
    mapped: list[str]  # what flags of the public script were taken for
    patterns: Row  # --audio_pattern and --frame_pattern, from the flags or else from training
    dtype: str  # of inference
    merged: bool  # the adapter is merged into the weights


def find_model(args: argparse.Namespace) -> tuple[str, bool]:
    """The folder or hub id that the flags name, and whether an adapter lies there; InputError where nothing does."""
    path = args.checkpoint_path or args.model_name_or_path or vqa.DEFAULT_MODEL
    adapter = (Path(path) / "adapter_config.json").is_file()
    if args.checkpoint_path and not adapter:
        if not (Path(path) / "config.json").is_file():
            inside = ", ".join(sorted(folder.name for folder in Path(path).glob("checkpoint-*")))
            advice = f"it holds {inside}: name one of them" if inside else "name a folder that training wrote"
            what = "no adapter (adapter_config.json) and no model (config.json) there"
            raise InputError(f"--checkpoint_path {path}: {what}; {advice}")
        if args.model_name_or_path:
            raise InputError(f"--checkpoint_path {path} is a full model; leave --model_name_or_path out")
    if args.checkpoint_path and args.no_adapter and not adapter:
        raise InputError(f"--no_adapter: {path} is a full model, which has no adapter; leave the flag out")
    if args.no_merge and (args.no_adapter or not adapter):
        raise InputError("--no_merge: there is no adapter to keep unmerged; leave it out")
    return path, adapter


def choose_model(args: argparse.Namespace, device: Any) -> ModelChoice:
    """Find the model, before weights load; InputError or VQAError for flags that contradict it or are not supported."""
    path, adapter = find_model(args)
    changes = {
        "model_name_or_path": args.model_name_or_path if adapter else None,
        "attn_implementation": args.attn_implementation,
        "load_in_4bit": args.load_in_4bit,
        "input_mode": PUBLIC_MODES.get(args.input_mode, args.input_mode),
        "max_image_size": args.max_image_size,
        "prompt_layout": args.prompt_layout,
        **({} if adapter else {"init": args.init, "init_seed": args.seed}),
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if args.max_eval_frames is not None:
        changes["max_eval_frames"] = args.max_eval_frames or None
    if args.checkpoint_path and not (Path(path) / vqa.SETTINGS_FILE).is_file():
        vqa.refuse_unsaid_layout(path, changes)
    settings, model, inputs = vqa.trained_settings(path, device.type, changes)
    trained_on = settings.get("model", {}) if adapter else {}  # a full model has weights of its own
    if args.init not in (None, trained_on.get("init", "pretrained")) and args.checkpoint_path:
        raise InputError(f"--init {args.init}: {path} was not trained so; leave the flag out")
    patterns = {}
    for name in ("audio_pattern", "frame_pattern"):
        patterns[name] = getattr(args, name)
        if patterns[name] is None and (trained_with := settings.get("data", {}).get(name)) is not None:
            print(f"   --{name} {trained_with!r}, as in training")
            patterns[name] = trained_with
    vqa.check_patterns(**patterns)
    if not (settings or args.checkpoint_path):
        how = f"asked zero-shot in the prompt layout {inputs.prompt_layout}"
        print(f"   {path}: a base, {how}; name a trained model with --checkpoint_path")
    dtype = model.dtype if args.dtype == "auto" else args.dtype
    vqa.check_attention(model.attn_implementation, getattr(torch, dtype))
    if model.load_in_4bit:
        vqa.check_bitsandbytes("--load_in_4bit")
    if adapter and model.load_in_4bit and not (args.no_merge or args.no_adapter):
        print(f"   {path}: the base is kept in 4 bits, into which no adapter is merged; it stays unmerged")
    if trained_on.get("load_in_4bit") and not model.load_in_4bit:
        print(f"   {path}: trained on the base in 4 bits, asked on it in 16: other answers than in training")
    frames = (inputs.max_train_frames or 0) if "max_train_frames" in settings.get("input", {}) else None
    merged = adapter and not model.load_in_4bit and not args.no_merge
    chosen = ModelChoice(path, adapter, model, inputs, changes, frames, [], patterns, dtype, merged)
    return as_asked_publicly(args, chosen)


def as_asked_publicly(args: argparse.Namespace, chosen: ModelChoice) -> ModelChoice:
    """The choice with --no_adapter applied; prints and records what flags of the public script are taken for."""
    if ours := PUBLIC_MODES.get(args.input_mode):
        arm = f"the arm {args.input_mode} in " * (args.input_mode in ARMS)
        chosen.mapped.append(f"--input_mode {args.input_mode} is {arm}{ours} here")
    if chosen.adapter and args.no_adapter:
        base = chosen.model.model_name_or_path
        chosen.mapped.append(f"--no_adapter: {base} is asked, as {chosen.path} would be, whose base it is")
        every = dataclasses.asdict(chosen.model) | dataclasses.asdict(chosen.inputs)
        changes = {name: value for name, value in every.items() if name not in ("dtype", "allow_pickle")}
        how = {"changes": changes, "trained_frames": None, "merged": False}
        chosen = dataclasses.replace(chosen, path=base, adapter=False, **how)
    for line in chosen.mapped:
        print(f"   {line}")
    return chosen


def check_weights(chosen: ModelChoice, device: Any) -> None:
    """Raise VQAError where headers and names already tell that the weights cannot be loaded."""
    vqa.drawing_device(chosen.path, chosen.model, device.type)
    if chosen.adapter:
        vqa.refuse_damage(chosen.path)
        vqa.read_adapter(Path(chosen.path))
    base, audio_encoder = chosen.model.model_name_or_path, chosen.model.audio_encoder
    vqa.load_config(base)
    if audio_encoder:
        vqa.whisper_geometry(audio_encoder)
    if chosen.model.init != "random" and Path(base).is_dir():
        vqa.check_speech_encoder(Path(base), vqa.stored_keys(Path(base)), audio_encoder)


def frames_that_differ(trained: int | None, asked: int | None, lengths: Iterable[int]) -> Row | None:
    """{"trained", "asked"}: frames of the longest clip asked on another number than in training. None: none is.

    `lengths`: frames of each clip; `trained` as in ModelChoice; `asked` None: all.
    """
    if trained is None:
        return None
    pairs = [(min(n, trained or n), min(n, asked or n)) for n in lengths]
    return next(({"trained": a, "asked": b} for a, b in sorted(pairs, reverse=True) if a != b), None)


def load_chosen_model(chosen: ModelChoice, device: Any) -> Any:
    """train_vqa's Trained: the model with its adapter, its processor, the fingerprint of its base."""
    kernel = vqa.ATTENTION_KERNELS[chosen.model.attn_implementation]
    precision = {"bfloat16": "BF16", "float32": "FP32"}[chosen.dtype]
    print(f"⏳ Loading merged {precision} model with {kernel} attention...", flush=True)
    dtype = getattr(torch, chosen.dtype)
    trained = vqa.load_trained(chosen.path, device=device, dtype=dtype, merge=chosen.merged, **chosen.changes)
    print(f"✓ Model loaded in full {precision}", flush=True)
    return trained


# ---------------------------------------------------------------------------------------------------------------------
# With a model: one question
# ---------------------------------------------------------------------------------------------------------------------


def ask(args: argparse.Namespace) -> int:
    """Answer the question in --ask (a recording), --ask_text (words) or both about --frames, and print it with how it
    ended and the milliseconds from the files on. Returns status 0; InputError or VQAError for what cannot be asked."""
    vqa.limit_gpu_memory(args.gpu_memory_limit_gib or None)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    chosen = choose_model(args, device)
    mode, limit = chosen.inputs.input_mode, chosen.inputs.max_eval_frames
    given = "audio_text" if args.ask and args.ask_text else "audio" if args.ask else "text"
    if given != mode or args.input_mode not in (None, *INPUT_MODES):
        flags = {"audio": "--ask alone", "text": "--ask_text alone", "audio_text": "--ask and --ask_text"}
        raise InputError(f"the input mode {mode} takes {flags[mode]}; for {flags[given]} add --input_mode {given}")
    if limit and len(args.frames) > limit:
        what = f"{len(args.frames)} frames, and the model is shown {limit} at most"
        raise InputError(f"--frames: {what}; give fewer, or raise --max_eval_frames")
    check_weights(chosen, device)
    for path in map(Path, args.frames):
        vqa.decode_frame(path, checking=True)
    if args.ask:
        vqa.load_speech(Path(args.ask))
    model = load_chosen_model(chosen, device).model
    answer = model.answer(args.frames, args.ask, args.ask_text, args.max_new_tokens)
    ended = "stopped by itself" if answer.stopped else "cut off at --max_new_tokens"
    print(answer.text)
    total, reading = answer.ms["total"], answer.ms["media"]
    print(f"   {answer.n_tokens} tokens, {ended}; {total:.0f} ms, of these {reading:.0f} for the files")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# With a model: inputs of an arm
# ---------------------------------------------------------------------------------------------------------------------


def shuffled_frames(frames: list[Any], seed: str) -> list[Any]:
    """The frames in another order than that in time, drawn from `seed`."""
    order = list(range(len(frames)))
    generator = random.Random(seed)
    while order == sorted(order) and len(order) > 1:
        generator.shuffle(order)
    return [frames[index] for index in order]


def of_length(speech: Any, samples: int) -> Any:
    """Speech float32 [n], cut off at the end or padded there with silence to [samples]."""
    import numpy as np

    return np.pad(speech[:samples], (0, max(0, samples - len(speech))))


# Arms that change what the files hold: the medium, and a function of it, `frames` (PIL images) or `speech` (float32
# [n]). All keep the size, so that the prompt stays the same token for token; `ArmInputs.read` gives borrowed speech its
# length. Features of that medium are neither cached nor read from the cache. The input modes change nothing.
CONTENT_ARMS = {
    "black_frames": ("frames", lambda frames: [frame.point(lambda _: 0) for frame in frames]),
    "silent_audio": ("speech", lambda speech: speech * 0),
    "mismatched_audio": ("speech", lambda speech: speech),
}
# Arms that choose or order frames. Their functions also work on lists of paths, so that cached features can be used.
ORDER_ARMS = {"first_frame": lambda frames, seed: frames[:1], "shuffled_frames": shuffled_frames}
# What an arm's rows take over from another row, and the arms whose rows are not mixed with those of another --seed.
BORROWED = {"mismatched_audio": ("audio_path",), "mismatched_frames": ("frames", "frame_paths")}
SEEDED_ARMS = (*BORROWED, "shuffled_frames")


class ArmInputs:
    """The rows of one arm as model inputs.

    Args:
        arm: one of ARMS.
        dataset: SurgicalVQADataset for generation; its processor has the arm's input mode, and its rows the speech
            that the arm plays and the frames that it shows.
        seed: of shuffled frames.
        sources: for rows that show another row's frames, or play its speech at the length of their own, that row; for
            rows that ask a transcript, the row as it was.
    """

    def __init__(self, arm: str, dataset: Any, seed: int = 0, sources: Mapping[Key, Any] | None = None):
        self.arm, self.dataset, self.seed, self.sources = arm, dataset, seed, sources or {}
        self.rows, self.processor = dataset.rows, dataset.processor
        self.keys = [row_key(annotation_of(row)) for row in self.rows]
        self.feature_store: Any = None  # train_vqa's FeatureStore, once it is filled
        self.batch_size: int | None = None  # rows answered at a time; `answer_arm` sets it

    @functools.cached_property
    def lengths(self) -> list[float]:
        """`length` of every row."""
        return list(map(self.length, range(len(self.rows))))

    @functools.cached_property
    def order(self) -> list[int]:
        """The rows in the order in which they are answered: the longest prompts first, equal ones as in the data."""
        return sorted(range(len(self.rows)), key=lambda index: -self.lengths[index])

    def clip(self, index: int) -> tuple[Path, ...]:
        """The files of the frames that a row shows, in the arm's order."""
        frames, _ = self.dataset.media_of(index)
        ordered = ORDER_ARMS.get(self.arm)
        return tuple(ordered(list(frames), f"{self.seed}/{self.rows[index].key}")) if ordered else frames

    def cacheable_media(self, index: int) -> tuple[tuple[Path, ...] | None, Path | None]:
        """The clip and the speech that the encoders get as they are in the files; None for what the arm changes."""
        changed, _ = CONTENT_ARMS.get(self.arm, (None, None))
        complete = len(self.rows[index].frame_paths) == len(self.rows[index].frames)
        clip = self.clip(index) if complete and changed != "frames" else None
        return clip, None if changed == "speech" else self.dataset.media_of(index)[1]

    def read(self, index: int, with_frames: bool = True, with_speech: bool = True) -> tuple[list[Any], Any]:
        """(frames as PIL images in the arm's order, speech float32 [n] or None); VQAError where they cannot be used."""
        row = self.rows[index]
        speech = self.dataset.media_of(index)[1]
        if len(row.frame_paths) < len(row.frames):
            raise vqa.VQAError(f"{row.where}: a frame is missing")
        if speech is None and self.processor.input_mode != "text":
            raise vqa.VQAError(f"{row.where}: the speech is missing")
        if self.arm == ASR_ARM and self.keys[index] not in self.sources:
            raise vqa.VQAError(f"{row.where}: the speech is missing or cannot be read")
        clip = self.clip(index) if with_frames else ()
        frames = [vqa.load_frame(path, self.processor.max_image_size) for path in clip]
        speech = vqa.load_speech(speech) if speech and with_speech else None
        fit = self.arm == "mismatched_audio" and self.keys[index] in self.sources
        return frames, of_length(speech, row.speech_samples) if fit else speech

    def sample(self, index: int) -> Row | str:
        """Model inputs of a row without a batch dimension, or what is wrong with its media; threads may call it."""
        clip, recording = self.cacheable_media(index)
        vision = self.feature_store and self.feature_store.read(clip)
        speech_features = self.feature_store and self.feature_store.read(recording)
        changed, change = CONTENT_ARMS.get(self.arm, (None, None))
        try:
            frames, speech = self.read(index, with_frames=not vision, with_speech=not speech_features)
            if changed == "frames":
                frames = change(frames)
            elif changed == "speech":
                speech = change(speech)
            return self.make_sample(index, frames, speech, vision, speech_features and speech_features[0])
        except vqa.VQAError as error:
            return str(error)

    def make_sample(self, index: int, frames: list[Any], speech: Any, *features: Any) -> Row:
        """Model inputs of a row with these frames and this speech, or with cached features of either."""
        return self.processor.make_sample(self.rows[index], frames, speech, False, *features)

    def length(self, index: int) -> float:
        """Tokens of a row's prompt, from the headers of its media; infinite where these cannot be read."""
        try:
            return self.processor.count_tokens(self.rows[index], self.clip(index), with_answer=False)
        except vqa.DECODE_ERRORS:
            return math.inf

    def recording(self, index: int) -> Path | None:
        """The file of the speech that a row's answer rests on, heard or transcribed; None in text mode."""
        return self.rows[index].audio_path if self.arm == ASR_ARM else self.dataset.media_of(index)[1]

    def media_sha256(self, index: int) -> str:
        """Digest of the files behind a row's answer: a resumed run must not mix old files with new ones."""
        frames, _ = self.dataset.media_of(index)
        digests = (sha256_once(path) for path in (*frames, self.recording(index)) if path)
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def origin(self, index: int) -> Row:
        """What a row of the output file says of the inputs of its answer.

        Of borrowed frames and speech: whose, and by how many samples and tokens speech was padded; negative: cut. Of a
        transcript: that, and the question as it was.
        """
        speech = self.recording(index)
        how = {"input_mode": self.processor.input_mode, "audio_file": speech and str(speech)}
        how["frames"] = [str(path) for path in self.clip(index)]
        source = self.sources.get(self.keys[index])
        if source and self.arm == ASR_ARM:
            how |= {"question": source.question, "transcript": self.rows[index].question}
        elif source and self.arm == "mismatched_frames":
            how["frames_of"] = key_text(row_key(annotation_of(source)))
        elif source:
            own, theirs, tokens = self.rows[index].speech_samples, source.speech_samples, self.processor.speech_tokens
            how["audio_of"] = key_text(row_key(annotation_of(source)))
            how["audio_padded_samples"] = own - theirs
            how["audio_padded_tokens"] = tokens(own) - tokens(theirs)
        return how | {"media_sha256": self.media_sha256(index)}

    def prompt(self, question: str, n_frames: int = 1) -> str:
        """The rendered prompt as it can be read: one placeholder a frame, none for speech."""
        ids = self.processor.build(question, [1] * n_frames, 0, None)["input_ids"].tolist()
        return self.processor.tokenizer.decode(ids)


@functools.cache
def sha256_once(path: Path) -> str:
    """`sha256_file`, read once a run: many questions share their clips."""
    return sha256_file(path)


# ---------------------------------------------------------------------------------------------------------------------
# With a model: transcripts
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def find_asr_model(name: str) -> Path:
    """The folder of the Whisper that --asr_model names, checked as far as can be without its weights. VQAError for
    another model, for one without safetensors, and where jiwer is missing."""
    vqa.check_package(f"--arms {ASR_ARM}", "jiwer", "jiwer>=3", "leave the arm out")
    bins = vqa.whisper_geometry(name, "--asr_model").get("num_mel_bins", 80)
    folder = vqa.resolve_model_dir(name, weights=True, flag_name="--asr_model")
    if not any(folder.glob("model*.safetensors")):
        raise vqa.VQAError(f"--asr_model {folder}: no model.safetensors there, and no other weights are read")
    vqa.stored_keys(folder)
    if (found := asr_reader(folder)[0].feature_size) != bins:
        what = f"preprocessor_config.json makes {found} mel bins, config.json wants {bins}"
        raise vqa.VQAError(f"--asr_model {folder}: {what}; take both from one model")
    return folder


def asr_reader(folder: Path) -> tuple[Any, Any]:
    """Feature extractor and tokenizer of a Whisper; VQAError where one of them is missing."""
    from transformers import AutoTokenizer, WhisperFeatureExtractor

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return WhisperFeatureExtractor.from_pretrained(folder), tokenizer
    except (OSError, ValueError) as error:
        what = f"its preprocessor_config.json or its tokenizer cannot be read ({vqa.first_line(error)})"
        raise vqa.VQAError(f"--asr_model {folder}: {what}; copy all files of the model") from error


def asr_digest(folder: Path) -> str:
    """SHA-256 that names the weights of a Whisper."""
    return hashlib.sha256("".join(map(sha256_once, sorted(folder.glob("model*.safetensors")))).encode()).hexdigest()


def transcribe(folder: Path, recordings: Sequence[Path], device: Any, dtype: Any) -> list[str]:
    """What a Whisper writes down of each recording of at most 30 s: greedily, in the language that it takes it for.

    Its weights are on the `device` only meanwhile. VQAError for a recording or weights that cannot be read.
    """
    import transformers
    from tqdm.auto import tqdm

    extractor, tokenizer = asr_reader(folder)
    keys = vqa.stored_keys(folder)
    whisper = transformers.WhisperForConditionalGeneration
    model, report = vqa.load_with_report(whisper, folder, use_safetensors=True, dtype=dtype)
    vqa.refuse_misfits(folder, keys, *(report[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")))
    model = model.to(device).eval()

    def write_down(speech: Iterable[Any]) -> list[str]:
        if not (speech := list(speech)):
            return []
        how = {"sampling_rate": SAMPLE_RATE, "return_tensors": "pt", "return_attention_mask": True}
        heard = {name: values.to(device) for name, values in extractor(speech, **how).items()}
        heard["input_features"] = heard["input_features"].to(dtype)
        texts = tokenizer.batch_decode(model.generate(**heard, do_sample=False, num_beams=1), skip_special_tokens=True)
        bar.update(len(texts))
        return [text.strip() for text in texts]

    speech = vqa.ahead(vqa.load_speech, recordings, 2 * ASR_BATCH_SIZE)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # Whisper's generate warns of what it does itself
    try:
        with contextlib.closing(speech), tqdm(total=len(recordings), desc="Transcribing", unit="file") as bar:
            texts, _ = vqa.answer_with_halving(speech, ASR_BATCH_SIZE, True, write_down)
    finally:
        transformers.logging.set_verbosity(verbosity)
    return texts


def transcribe_rows(
    args: argparse.Namespace, rows: Sequence[Any], path: Path, device: Any, dtype: Any
) -> tuple[list[Any], dict[Key, Any], Row]:
    """VQARows that ask what the Whisper wrote down of their speech; as they were, those whose speech can be read; and
    the manifest's `asr`.

    Each recording is transcribed once, by one of the ranks; what the rows file at `path` holds is kept. Batches are
    fixed slices of the recordings and are done complete, so that a resumed run gives the same transcripts.
    """
    folder = find_asr_model(args.asr_model)
    readable = {row_key(annotation_of(row)): row for row in rows if row.speech_samples}
    known = {}
    if path.is_file() and not args.overwrite:
        with contextlib.suppress(InputError):  # a line cut off by a kill: `RowFile` repairs or refuses the file
            done = {key: row for key, row in read_answer_rows(path).items() if key in readable and "transcript" in row}
            known = {readable[key].audio_path: row["transcript"] for key, row in done.items()}
    recordings = sorted({row.audio_path for row in readable.values()})
    slices = [recordings[i : i + ASR_BATCH_SIZE] for i in range(0, len(recordings), ASR_BATCH_SIZE)]
    slices = [part for part in slices if not known.keys() >= set(part)]
    own = list(itertools.chain(*slices[vqa.rank() :: vqa.world_size()]))
    start = time.monotonic()
    texts = dict(zip(own, transcribe(folder, own, device, dtype) if own else (), strict=True))
    if vqa.world_size() > 1:  # each rank needs all, to order the prompts alike
        vqa.ranks_store().set(f"transcripts/{vqa.rank()}", json.dumps(list(texts.values())))
        vqa.meet()
        for rank in range(vqa.world_size()):
            theirs = json.loads(vqa.ranks_store().get(f"transcripts/{rank}"))
            texts |= zip(itertools.chain(*slices[rank :: vqa.world_size()]), theirs, strict=True)
    texts |= known
    seconds, peak = time.monotonic() - start, None
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()
    rows = [dataclasses.replace(row, question=texts.get(row.audio_path, row.question)) for row in rows]
    record = {"model": args.asr_model, "folder": str(folder), "sha256": asr_digest(folder), "dtype": str(dtype)}
    record |= {"recordings": len(recordings), "transcribed": sum(map(len, slices))}
    return rows, readable, record | {"seconds": seconds, "peak_gpu_memory_gib": peak}


# ---------------------------------------------------------------------------------------------------------------------
# With a model: the gates, before any answer
# ---------------------------------------------------------------------------------------------------------------------


def check_leaks(arms: Iterable[ArmInputs]) -> None:
    """Raise InputError if the prompt of any row in an audio arm holds words of its question."""
    inputs = next((inputs for inputs in arms if inputs.processor.input_mode == "audio"), None)
    if inputs is None:
        return
    for index, row in enumerate(inputs.rows):  # the other audio arms differ in media, not in words
        n_frames = len(inputs.clip(index))
        words = leaked_words(inputs.prompt(row.question, n_frames), row.question, inputs.prompt("", n_frames))
        if words:
            what = f"in the arm {inputs.arm} the prompt of {row.key} holds words of its question ({', '.join(words)})"
            raise InputError(f"leak gate: {what}, so its answer would not show that it was heard; no figure is given")


def check_liveness(model: Any, inputs: ArmInputs) -> Row:
    """Do speech and frames reach the logits? {"speech", "frames"}: by how much other ones change the log-probability of
    a first token of the answer, the mean over the vocabulary and GATE_ROWS rows; `speech` is None in text mode.

    The other speech is another row's at the same length, else its own backwards; the other frames are negatives: the
    prompt stays as it is. Raises InputError if one changes nothing, or the same inputs give different logits.
    """
    collate = vqa.VQACollator(inputs.processor.tokenizer.pad_token_id, "left")

    def log_probs(index: int, frames: list[Any], speech: Any) -> Any:
        batch = collate([inputs.make_sample(index, frames, speech)])
        with torch.inference_mode():
            return model(**vqa.on_device(batch, model.device), logits_to_keep=1).logits.float().log_softmax(-1)

    @functools.cache
    def readable(index: int) -> tuple[list[Any], Any] | None:
        with contextlib.suppress(vqa.VQAError):
            media = inputs.read(index)
            inputs.make_sample(index, *media)  # frames that cannot be paired are found here
            return media

    def borrowed(index: int, speech: Any) -> Any:
        others = (i for i, row in enumerate(inputs.rows) if row.question != inputs.rows[index].question and readable(i))
        other = next(others, None)
        return speech[::-1] if other is None else of_length(readable(other)[1], len(speech))

    everywhere = vqa.select_frames(range(len(inputs.rows)), GATE_ROWS)  # evenly spaced, where these can be read
    chosen = list(itertools.islice(filter(readable, dict.fromkeys((*everywhere, *range(len(inputs.rows))))), GATE_ROWS))
    if not chosen:
        raise InputError("no row has frames and speech that can be read, so nothing can be measured")
    moved = {"speech": [], "frames": []}
    for index in chosen:
        frames, speech = readable(index)
        plain = log_probs(index, frames, speech)
        if index == chosen[0] and not torch.equal(plain, log_probs(index, frames, speech)):
            raise InputError("liveness gate: the same speech and frames give different logits; no answer would repeat")
        changed = {"frames": ([frame.point(lambda value: 255 - value) for frame in frames], speech)}
        if speech is not None:
            changed["speech"] = frames, borrowed(index, speech)
        for medium, media in changed.items():
            moved[medium].append(float((plain - log_probs(index, *media)).abs().mean()))
    moved = {medium: statistics.fmean(by) if by else None for medium, by in moved.items()}
    dead = " and ".join(medium for medium, by in moved.items() if by == 0)
    if dead:
        what = f"with other {dead} every logit stays as it is, so {dead} cannot reach an answer"
        raise InputError(f"liveness gate: {what}; check the checkpoint, and that the files differ")
    return moved


def pass_gates(model: Any, arms: Mapping[str, ArmInputs]) -> Row:
    """Both gates, the second on the first arm with speech, else the main one; returns what `check_liveness` does."""
    check_leaks(arms.values())
    modes = [inputs.processor.input_mode for inputs in arms.values()]
    spoken = next((inputs for inputs, mode in zip(arms.values(), modes, strict=True) if mode != "text"), None)
    moved = check_liveness(model, spoken or next(iter(arms.values())))
    figures = ", ".join(f"other {medium} by {by:.3g}" for medium, by in moved.items() if by is not None)
    leaks = "no prompt gives its question away; " if "audio" in modes else ""
    print(_wrap(f"Gates passed: {leaks}the log-probabilities of the first token move with {figures}"))
    return moved


# ---------------------------------------------------------------------------------------------------------------------
# With a model: answers
# ---------------------------------------------------------------------------------------------------------------------


def choose_batch_size(model: Any, longest: int, max_new_tokens: int, limit_gib: float) -> int:
    """Rows that fit into the GPU memory at a time, 1 to AUTO_BATCH_SIZE; CPU_BATCH_SIZE without a CUDA GPU.

    An estimate from shapes alone, so that the same card, flags and data give the same batches. `longest`: tokens of the
    longest prompt; `limit_gib`: hard cap, 0: all that the card has.
    """
    if model.device.type != "cuda":
        return CPU_BATCH_SIZE
    total = limit_gib * 2**30 or torch.cuda.get_device_properties(model.device).total_memory
    weights = sum(weight.nbytes for weight in model.parameters())
    text = model.config.text_config
    item = model.dtype.itemsize
    head = text.hidden_size // text.num_attention_heads
    # In prefill: four activations of the MLP's width (gate, its SiLU, up, their product), and about sixteen of the
    # hidden size, of which some are float32.
    prefilling = max(vqa.PREFILL_TOKENS, longest) * item * (4 * text.intermediate_size + 16 * text.hidden_size)
    # A token keeps a key and a value a layer; one layer is copied to grow, and, under a mask, repeated for every head.
    kept = 2 * head * text.num_key_value_heads * (text.num_hidden_layers + 2)
    row = (longest + max_new_tokens) * item * (kept + 2 * head * text.num_attention_heads)
    return int(min(AUTO_BATCH_SIZE, max(1, (USABLE_MEMORY * total - weights - prefilling) // row)))


def answer_arm(model: Any, inputs: ArmInputs, file: RowFile, args: argparse.Namespace, stop: Any = None) -> None:
    """Answer those rows of this rank that `file` lacks, batch by batch, and append them.

    Ends after the batch during which a signal came to `stop` (train_vqa's StopSignal; None: there is none). The rows
    are dealt out in turn, the longest prompts first, so that every rank has as much to do. Batches are fixed slices of
    a rank's rows, answered complete even where a killed run left only part of one to do: so a resumed run of as many
    ranks computes exactly what an uninterrupted one does.
    """
    from tqdm.auto import tqdm

    keys, ranks = inputs.keys, vqa.world_size()
    own = inputs.order[vqa.rank() :: ranks]
    size = args.batch_size
    auto = args.batch_size == "auto"
    if auto:
        known = [length for length in inputs.lengths if length < math.inf]
        size = choose_batch_size(model, max(known, default=1), args.max_new_tokens, args.gpu_memory_limit_gib)
    slices = [own[i : i + size] for i in range(0, len(own), size)]
    slices = [part for part in slices if any(keys[index] not in file.done for index in part)]
    tokenizer = copy.deepcopy(inputs.processor.tokenizer)  # the other one is busy in the threads below
    decoding = tokenizer.pad_token_id, vqa.stop_token_ids(tokenizer), args.max_new_tokens
    decoded = vqa.ahead(inputs.sample, itertools.chain(*slices), 2 * size)
    already = sum(keys[index] in file.done for index in own)
    title = inputs.arm + f", rank 0 of {ranks}" * (ranks > 1)
    with contextlib.closing(decoded), tqdm(total=len(own), initial=already, desc=title, unit="row") as bar:
        for part in slices:
            # Two iterators over one slice: prefill begins while the rest of it is still being decoded.
            start = time.monotonic()
            samples, again = itertools.tee(itertools.islice(decoded, len(part)))
            usable = (sample for sample in samples if not isinstance(sample, str))
            answers, size = vqa.answer_with_halving(
                usable, size, auto, lambda batch: vqa.answer_batch(model, batch, *decoding)
            )
            each = round(1000 * (time.monotonic() - start) / len(part), 1)
            waiting = iter(answers)
            for index, sample in zip(part, again, strict=True):
                error = sample if isinstance(sample, str) else None
                ids, finish = ([], "error") if error else next(waiting)
                if keys[index] in file.done:
                    continue
                text = None if error else tokenizer.decode(ids, skip_special_tokens=True).strip()
                how = {"finish_reason": finish, "n_tokens": len(ids), "inference_time_ms": each, **inputs.origin(index)}
                if error:
                    how["error"] = error
                file.append(answer_row(annotation_of(inputs.rows[index]), text, **how))
                bar.update()
            inputs.batch_size = size
            if stop and stop.signum:
                break


# ---------------------------------------------------------------------------------------------------------------------
# With a model: the complete run
# ---------------------------------------------------------------------------------------------------------------------


def annotation_of(row: Any) -> Row:
    """A VQARow as the dict that scoring takes. With a model, train_vqa reads the question files; without one,
    `read_annotations`."""
    return {name: getattr(row, name) for name in (*KEY_FIELDS, *GOLD_FIELDS, "frames")}


def generate(args: argparse.Namespace) -> int:
    """Answer every row of --eval_data_path in every arm, summarise, print; or `ask`. Returns the exit status.

    A signal ends it after the batch under way, with 128 + its number. Raises InputError for what the user can fix.
    """
    if args.output_file and not int(os.environ.get("RANK", 0)):  # which has the file locked before the others begin
        check_output(args)
    load_libraries()
    stop = vqa.StopSignal("finishing the batch", "no row was answered; run the same command again")
    try:
        with stop:
            return answer_and_score(args, stop) if args.output_file else ask(args)
    except vqa.Interrupted as stopped:
        if not vqa.rank() and vqa.is_first_to_fail():
            print(f"\n{stopped}", file=sys.stderr)
        return 128 + stopped.signum
    except vqa.VQAError as error:
        raise InputError(str(error)) from error
    except torch.OutOfMemoryError as error:
        smaller = "a smaller one (at 1 or auto: a smaller --max_image_size or --max_eval_frames)"
        what = f"--batch_size {args.batch_size} does not fit into the GPU memory; run the same command with {smaller}"
        raise InputError(f"{what}; the rows answered so far are kept") from error


def answer_and_score(args: argparse.Namespace, stop: Any) -> int:
    """The steps of `generate`: settings, data, model, gates, answers, figures."""
    # 1. The model, and the arms
    sha256_once.cache_clear()
    find_asr_model.cache_clear()
    target = summary_path(args.output_file)
    if vqa.rank():
        vqa.meet()  # rank 0 has checked everything up to the weights
    device = vqa.own_device()
    vqa.limit_gpu_memory(args.gpu_memory_limit_gib or None)
    if args.checkpoint_path:
        folder = vqa.resolve_model_dir(args.checkpoint_path, weights=True, flag_name="--checkpoint_path")
        args.checkpoint_path = str(folder)
    chosen = choose_model(args, device)
    modes = choose_arms(args, chosen.inputs.input_mode)
    main_arm, *_ = modes
    files = {arm: arm_path(args.output_file, arm, main_arm) for arm in modes}
    for arm, path in files.items():
        if not args.overwrite and path.is_file() and path.stat().st_size:
            check_same_run(path, known_settings(args, chosen, arm, modes[arm]), complete=False)
    check_weights(chosen, device)

    # 2. Data: everything is found and decoded once before the weights load
    rows_of, sources, of_data = read_data(args, modes, chosen)
    if not vqa.rank():
        vqa.meet()
    asked = {arm: [annotation_of(row) for row in rows] for arm, rows in rows_of.items()}
    annotations = asked[main_arm]
    if ASR_ARM in modes:
        how = rows_of[ASR_ARM], files[ASR_ARM], device, getattr(torch, chosen.dtype)
        rows_of[ASR_ARM], sources[ASR_ARM], of_data["asr"] = transcribe_rows(args, *how)

    # 3. Model
    trained = load_chosen_model(chosen, device)
    limit = chosen.inputs.max_eval_frames
    arms = {}
    for arm, rows in rows_of.items():
        processor = trained.processor.with_mode(modes[arm])
        data = vqa.SurgicalVQADataset(rows, processor, max_eval_frames=limit, is_eval=True, with_answer=False)
        arms[arm] = ArmInputs(arm, data, args.seed, sources.get(arm))

    # 4. Gates
    moved = pass_gates(trained.model, arms)

    # 5. Answers
    settings = {arm: run_settings(args, chosen, inputs, trained.base_fingerprint) for arm, inputs in arms.items()}
    done, answered, seconds = answer_arms(args, trained, arms, settings, stop)
    if vqa.rank():
        return 0
    scored = {arm: score_rows(asked[arm], done[arm]) for arm in arms}
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None

    # 6. Figures
    record = run_record(args, chosen, arms[main_arm], settings[main_arm], device) | of_data | {"gates": moved}
    record["frames"] = frames_that_differ(chosen.trained_frames, limit, (len(row["frames"]) for row in annotations))
    sizes = {arm: inputs.batch_size for arm, inputs in arms.items()}
    record["runtime"] = {"seconds": seconds, "rows_answered": answered, "peak_gpu_memory_gib": peak}
    record["runtime"] |= {"world_size": vqa.world_size(), "batch_size": sizes}
    in_arms = summarise_arms(main_arm, scored, {arm: path.name for arm, path in files.items()})
    add_to_arms(in_arms, files, done)
    summary = summarise(annotations, scored[main_arm], arms=in_arms, manifest=record)
    write_json(target, summary)
    print(render_summary(summary))
    memory = "" if peak is None else f", peak GPU memory {peak:.1f} GiB"
    print(f"\nAnswered {answered} rows in {seconds:.1f} s ({answered / seconds:.2f} samples/s{memory})")
    print(*(f"Rows: {files[arm]}" for arm in arms), f"Summary: {target}", sep="\n")
    write_report(args, annotations, done, {main_arm: summary}, vars(args) | chosen.patterns)
    if stop.signum:
        raise vqa.Interrupted(stop.signum, f"all rows are answered, and {target} is complete")
    return 1 if any(row.prediction is None for part in scored.values() for row in part) else 0


def add_to_arms(arms: Row, files: Mapping[str, Path], done: Mapping[str, Mapping[Key, Row]]) -> None:
    """Add the digests of the rows files, and what was borrowed or transcribed, to what `summarise_arms` gives."""
    for arm, part in arms.items():
        part["sha256"] = sha256_file(files[arm])
    if "mismatched_audio" in arms:
        arms["mismatched_audio"]["borrowed"] = summarise_borrowing(done["mismatched_audio"].values())
    if ASR_ARM in arms:
        arms[ASR_ARM]["transcripts"] = transcript_figures(done[ASR_ARM].values())


def choose_arms(args: argparse.Namespace, mode: str) -> dict[str, str]:
    """Each arm's input mode, the main arm first. Raises InputError for arms that need speech which is not there, and
    VQAError for an --asr_model that cannot transcribe."""
    main_arm = args.input_mode if args.input_mode in ARMS else mode  # of PUBLIC_MODES, one is an arm
    if main_arm not in INPUT_MODES and args.arms:
        instead = f"write --input_mode {mode} --arms {main_arm}"
        raise InputError(f"--arms beside --input_mode {main_arm}: arms are compared with an input mode; {instead}")
    spoken = args.audio_dir or mode != "text"
    fitting = [arm for arm in ARMS if (mode != "text" or arm not in HEARING_ARMS) and (spoken or "audio" not in arm)]
    if not (args.asr_model and args.audio_dir):
        fitting.remove(ASR_ARM)
    asked = fitting if args.arms == ["all"] else args.arms or ()
    modes = {arm: arm if arm in INPUT_MODES else mode for arm in (main_arm, *asked)}
    if ASR_ARM in modes:
        modes[ASR_ARM] = "text"
    if (ASR_ARM in modes) != bool(args.asr_model):
        raise InputError(f"--asr_model and --arms {ASR_ARM} need each other: give both (and --audio_dir), or none")
    without_speech = [arm for arm, mode in modes.items() if arm in HEARING_ARMS and mode == "text"]
    if without_speech:
        raise InputError(f"--arms {','.join(without_speech)}: in text mode the model gets no speech; drop the arm")
    if needs_speech(modes) and not args.audio_dir:
        raise InputError("--audio_dir must be given: the questions are spoken (or use --input_mode text)")
    if args.asr_model:
        find_asr_model(args.asr_model)
    return modes


def needs_speech(modes: Mapping[str, str]) -> bool:
    """Whether an arm hears or transcribes the recordings; `modes` as from `choose_arms`."""
    return ASR_ARM in modes or set(modes.values()) != {"text"}


def read_data(
    args: argparse.Namespace, modes: Mapping[str, str], chosen: ModelChoice
) -> tuple[dict[str, list[Any]], dict[str, dict[Key, Any]], Row]:
    """Read the question files, and find and decode the media of every arm.

    Returns each arm's VQARows, for arms that borrow the row whose speech or frames a row gets, and `training` and
    `data_warnings` of the manifest. Raises VQAError for missing or broken media unless --allow_errors, for too many
    frames that show nothing unless --allow_empty_frames, and where one speech file would serve different questions.
    """
    print(f"📁 Loading Eval Data: {args.eval_data_path}")
    every = {row_key(annotation_of(row)): row for row in vqa.read_rows(args.eval_data_path, needs_gold=False)}
    rows = dict(itertools.islice(every.items(), args.limit or None))
    if without := sum(not row.short_answer for row in rows.values()):
        print(f"   {without} of {len(rows)} rows have no gold answer (answer, short_answer): answered, not scored")
    training = read_training(args, [annotation_of(row) for row in rows.values()])
    # Rows borrow from the complete file: a larger --limit later leaves the pairs as they are.
    others = [row for key, row in every.items() if key not in rows] if modes.keys() & BORROWED.keys() else []
    if "mismatched_frames" not in modes:
        others = [dataclasses.replace(row, frames=()) for row in others]
    needed = [*rows.values(), *others]
    audio_dir = args.audio_dir if needs_speech(modes) else None
    problems = vqa.find_media(needed, args.frames_dir, audio_dir, args.allow_symlinks, **chosen.patterns)
    vqa.raise_problems(vqa.find_shared_media(needed))
    problems += vqa.check_media(needed)
    max_eval_frames = chosen.inputs.max_eval_frames
    if chosen.inputs.frame_mode == "video":
        bad = {line for problem in problems for line in problem.lines}
        good = [row for row in needed if row.frames and row.line not in bad]
        problems += vqa.find_mixed_sizes(good, chosen.inputs.max_image_size, max_eval_frames)
    bad = {line for problem in problems for line in problem.lines}
    evaluated = {row.line for row in rows.values()}
    problems = [problem for problem in problems if evaluated.intersection(problem.lines)]
    if not args.allow_errors:
        vqa.raise_problems(problems)
    for problem in problems:
        print(f"{problem} (--allow_errors: counted as wrong)", file=sys.stderr)
    data_warnings = check_contents(args, chosen, list(rows.values()))
    sources = {}
    if "mismatched_audio" in modes:
        sources["mismatched_audio"] = speech_lenders(needed, args.seed)
    if "mismatched_frames" in modes:
        sound = [row for row in needed if row.line not in bad]
        sources["mismatched_frames"] = frame_lenders(sound, chosen.inputs.max_image_size, args.seed)
    rows_of = {arm: arm_rows(arm, rows, sources.get(arm, {})) for arm in modes}
    if "mismatched_frames" in modes and not rows_of["mismatched_frames"]:
        what = "--arms mismatched_frames: no row has a clip of its question type with another gold answer to borrow"
        if args.arms != ["all"]:
            raise InputError(f"{what}; evaluate rows of more answers or drop the arm")
        print(_wrap(f"{what}; left out of all"))
        del rows_of["mismatched_frames"]
    if max_eval_frames and any(len(row.frames) > max_eval_frames for row in rows.values()):
        print(f"   Using {max_eval_frames} frames (evenly sampled) to reduce eval memory")
    return rows_of, sources, {"training": training, "data_warnings": data_warnings}


def speech_lenders(rows: Sequence[Any], seed: int) -> dict[Key, Any]:
    """For VQARows whose speech can be read, those whose speech they get in `mismatched_audio`."""
    by_key = {row_key(annotation_of(row)): row for row in rows}
    samples = {key: row.speech_samples for key, row in by_key.items()}
    recordings = {key: sha256_once(row.audio_path) for key, row in by_key.items() if row.speech_samples}
    pairs = pair_mismatched_audio(list(map(annotation_of, rows)), samples, recordings, seed)
    return {key: by_key[other] for key, other in pairs.items()}


def frame_lenders(rows: Sequence[Any], max_image_size: int, seed: int) -> dict[Key, Any]:
    """For VQARows whose media passed, those whose frames they get in `mismatched_frames`, where there are any."""
    by_key = {row_key(annotation_of(row)): row for row in rows}
    size_of = functools.cache(lambda path: vqa.fit_size(vqa.upright_size(path), max_image_size))
    clips = {key: (row.contents["clip"], len(row.frames), size_of(row.frame_paths[0])) for key, row in by_key.items()}
    pairs = pair_mismatched_frames(list(map(annotation_of, rows)), clips, seed)
    return {key: by_key[other] for key, other in pairs.items()}


def arm_rows(arm: str, rows: Mapping[Key, Any], sources: Mapping[Key, Any]) -> list[Any]:
    """The VQARows of an arm, with what they borrow; those without a source are left out of `mismatched_frames`."""
    lent = {
        key: {name: getattr(sources[key], name) for name in BORROWED[arm]} if key in sources else {} for key in rows
    }
    return [
        dataclasses.replace(row, **lent[key]) for key, row in rows.items() if lent[key] or arm != "mismatched_frames"
    ]


def read_training(args: argparse.Namespace, annotations: list[Row]) -> Row | None:
    """What `compare_with_training` tells, with a warning in its place where the training file cannot be used.

    Without --train_data_path it is set to what the checkpoint was trained on, if that is still the same file. None:
    there is neither.
    """
    if args.train_data_path:
        return compare_with_training(annotations, [annotation_of(row) for row in vqa.read_rows(args.train_data_path)])
    if not args.checkpoint_path:
        return None
    folder = Path(args.checkpoint_path)
    data = vqa.load_settings(folder).get("data", {}) if (folder / vqa.SETTINGS_FILE).is_file() else {}
    path, digest = data.get("train_data_path"), data.get("train_data_sha256")
    if not (isinstance(path, str) and digest):
        reason = f"{folder} does not say which file it was trained on"
    elif not Path(path).is_file():
        reason = f"the training file {path} is not here"
    elif sha256_once(Path(path)) != digest:
        reason = f"{path} has changed since training"
    else:
        print(f"   --train_data_path {path!r}, as in training")
        args.train_data_path = path
        rows, _ = vqa.scan_rows(path, data.get("max_train_samples"))  # training may have left out malformed lines
        return compare_with_training(annotations, [annotation_of(row) for row in rows])
    missing = f"no train majority, no check of ids: {reason}; name it with --train_data_path"
    return {"majority": None, "warnings": [missing]}


def check_contents(args: argparse.Namespace, chosen: ModelChoice, rows: list[Any]) -> list[str]:
    """Warnings for the headline, of VQARows whose media passed: frames that show nothing, and what training had.

    Raises InputError for too many such frames, unless --allow_empty_frames.
    """
    text, too_many = vqa.find_empty_frames(rows)
    if too_many and not args.allow_empty_frames:
        raise InputError(f"{text}; replace them, or let them pass with --allow_empty_frames")
    seen = vqa.read_digests(vqa.resolve_model_dir(chosen.path))
    contents = {row_key(annotation_of(row)): row.contents for row in rows}
    lines = [*([text] if text else []), *shared_speech_warnings(contents)]
    if seen is not None:
        lines += seen_warnings(contents, seen)
    elif args.checkpoint_path and not args.no_adapter:  # of a base nobody asks
        what = "so clips, frames, speech and wording are not compared with those of training"
        lines.append(f"not known what training had: {chosen.path} has no {vqa.DIGESTS_FILE}, {what}")
    return lines


def answer_arms(
    args: argparse.Namespace, trained: Any, arms: Mapping[str, ArmInputs], settings: Mapping[str, Row], stop: Any
) -> tuple[dict[str, dict[Key, Row]], int, float]:
    """Each arm's rows as its file has them, how many were answered now, and in how many seconds; Interrupted where a
    signal left some. Of several ranks, rank 0 gets the rows of all."""
    main_arm, *_ = arms
    target = summary_path(args.output_file)
    rank = vqa.rank()
    with contextlib.ExitStack() as stack:  # all of them first, so that none is refused after hours of answering another
        files = {}
        for arm, inputs in arms.items() if not rank else ():
            path = arm_path(args.output_file, arm, main_arm)
            files[arm] = stack.enter_context(RowFile(path, settings[arm], overwrite=args.overwrite))
            check_same_media(inputs, files[arm])
        if not rank:
            target.unlink(missing_ok=True)  # the figures of fewer rows, or of other ones
        vqa.meet()
        for arm in arms if rank else ():
            files[arm] = stack.enter_context(PartFile(arm_path(args.output_file, arm, main_arm), rank))
        start, before = time.monotonic(), sum(len(file.done) for file in files.values())
        if args.cache_features:  # after the gates, whose changed frames and speech are encoded as they come
            store = vqa.FeatureStore(args.cache_features, trained.model, trained.processor)
            store.fill(list(arms.values()), args.allow_errors)
            for inputs in arms.values():
                inputs.feature_store = store
        stop.deferred = True
        for arm, inputs in arms.items():
            if not stop.signum:
                answer_arm(trained.model, inputs, files[arm], args, stop)
        if vqa.meet(stop) and not rank:
            for arm, inputs in arms.items():
                files[arm].take_in()
                files[arm].put_in_order(inputs.keys[index] for index in inputs.order)
        there = [key in files[arm].done for arm, inputs in arms.items() for key in inputs.keys]
        if stop.signum and not all(there):
            parts = [part for file in files.values() for part in file.parts()]
            n = sum(there) + sum(part.read_bytes().count(b"\n") for part in parts)
            again = "the same command" + " without --overwrite" * args.overwrite
            text = f"{'at least ' * bool(parts)}{n} of {len(there)} rows are answered; {again} continues"
            raise vqa.Interrupted(stop.signum, text)
        answered = sum(len(file.done) for file in files.values()) - before
    return {arm: file.done for arm, file in files.items()}, answered, time.monotonic() - start


def check_same_media(inputs: ArmInputs, file: RowFile) -> None:
    """Raise InputError where a row of `file` was made from other frames or speech than are there now."""
    for index, key in enumerate(inputs.keys):
        if key in file.done and file.done[key].get("media_sha256") != inputs.media_sha256(index):
            what = f"the frames or speech of {key_text(key)} are not the ones that its row was made from"
            raise InputError(f"{file.path}: {what}; choose another --output_file, or start again with --overwrite")


def known_settings(args: argparse.Namespace, chosen: ModelChoice, arm: str, input_mode: str) -> Row:
    """What of `run_settings` is known before media are read and weights load."""
    folder = Path(chosen.path)

    def digest(name: str, wanted: bool = True) -> str | None:
        return sha256_once(folder / name) if wanted and (folder / name).is_file() else None

    return {
        "arm": arm,
        "input_mode": input_mode,
        "adapter_sha256": digest("adapter_model.safetensors", chosen.adapter),
        "adapter_config_sha256": digest("adapter_config.json", chosen.adapter),
        # base_fingerprint samples the weights: too few to tell neighbouring checkpoints of a full model apart.
        "manifest_sha256": digest(vqa.MANIFEST_FILE, not chosen.adapter),
        "adapter_merged": chosen.merged,
        "dtype": chosen.dtype,
        "attn_implementation": chosen.model.attn_implementation,
        "load_in_4bit": chosen.model.load_in_4bit or None,  # which older rows do not name
        "eval_data_sha256": sha256_once(Path(args.eval_data_path)),
        "audio_tokens": chosen.inputs.audio_tokens,
        "frame_mode": chosen.inputs.frame_mode,
        "max_eval_frames": chosen.inputs.max_eval_frames,
        "max_image_size": chosen.inputs.max_image_size,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed if arm in SEEDED_ARMS else None,
        "borrowed_speech": "of the nearest length, fitted" if arm == "mismatched_audio" else None,
        "asr_sha256": asr_digest(find_asr_model(args.asr_model)) if arm == ASR_ARM else None,
    }


def run_settings(args: argparse.Namespace, chosen: ModelChoice, inputs: ArmInputs, base_fingerprint: str) -> Row:
    """What the answers of an arm depend on, as flat JSON: rows made with other values are never mixed with them."""
    return known_settings(args, chosen, inputs.arm, inputs.processor.input_mode) | {
        "base_fingerprint": base_fingerprint,
        "prompt_sha256": hashlib.sha256(inputs.prompt("{question}").encode()).hexdigest(),
        "encoder_tokens": inputs.processor.encoder_tokens,
    }


def run_record(args: argparse.Namespace, chosen: ModelChoice, inputs: ArmInputs, settings: Row, device: Any) -> Row:
    """What a reader needs to repeat the run: `base_record`, and how the main arm was answered."""
    record = base_record(args)
    tokenizer = inputs.processor.tokenizer
    model = chosen.model
    record["sha256"] |= {
        "adapter": settings["adapter_sha256"],
        "prompt": settings["prompt_sha256"],
        "media": hashlib.sha256("".join(map(inputs.media_sha256, range(len(inputs.rows)))).encode()).hexdigest(),
        "train_vqa.py": sha256_file(vqa.__file__),
    }
    packages = ["torch", "transformers", "peft", "pillow", "torchaudio", "av"]
    packages += ["bitsandbytes"] * model.load_in_4bit + ["jiwer"] * bool(args.asr_model)
    input_fields = ("input_mode", "audio_tokens", "encoder_tokens", "frame_mode", "max_eval_frames", "max_image_size")
    return record | {
        "arm": inputs.arm,
        "mapped_flags": chosen.mapped,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "model": {
            "base": model.model_name_or_path,
            "base_fingerprint": settings["base_fingerprint"],
            "init": model.init,
            "adapter": str(chosen.path) if chosen.adapter else None,
            "adapter_merged": chosen.merged,
            "adapter_left_out": args.checkpoint_path if args.no_adapter else None,
            "dtype": chosen.dtype,
            "attn_implementation": model.attn_implementation,
            "load_in_4bit": model.load_in_4bit,
        },
        "input": {name: settings[name] for name in input_fields} | {"prompt": inputs.prompt("{question}")},
        "seeds": {"arms": args.seed, "init": model.init_seed if model.init == "random" else None},
        "decoding": {
            "method": "greedy",
            "max_new_tokens": args.max_new_tokens,
            "stop_ids": vqa.stop_token_ids(tokenizer),
            "pad_id": tokenizer.pad_token_id,
            "batch_size": args.batch_size,
        },
    }


# ---------------------------------------------------------------------------------------------------------------------
# Curves of training
# ---------------------------------------------------------------------------------------------------------------------

# What a curve shows, by its name in the log that training leaves in its output folder.
CURVES = {
    "loss": "training loss",
    "eval_loss": "evaluation loss",
    "eval_choice": "choice, of --eval_answers",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "samples_per_second": "samples per second",
    "gpu_memory_gib": "GPU memory, GiB",
}
COLOURS = ("#0b5cad", "#b3261e", "#1b6e3c", "#7a4fb5", "#8a5a00", "#444444")  # 4.5 : 1 on white, or more
Curves = dict[str, list[tuple[float, float]]]  # name in CURVES -> (step, value), in the order of the log


def read_curves(folder: str | Path) -> Curves:
    """The curves in the log of a training's output folder or checkpoint; values that are not finite are left out.

    The log of a run that goes on, or was cut off, is that of its newest checkpoint. InputError where there is none.
    """
    files = [Path(folder) / "trainer_state.json", *Path(folder).glob("checkpoint-*/trainer_state.json")]
    wanted = {"log_history": list, "global_step": int}
    states = [state for file in files if (state := read_beside(file, wanted, "name a folder that training wrote"))]
    if not states:
        raise InputError(f"{folder}: no trainer_state.json in it or its checkpoints; name a folder that training wrote")
    log = max(states, key=lambda state: state["global_step"])["log_history"]
    curves = {
        name: [(entry["step"], entry[name]) for entry in log if math.isfinite(entry.get(name, math.nan))]
        for name in CURVES
    }
    return {name: points for name, points in curves.items() if points}


def plot_curves(runs: Mapping[str, Curves], path: str) -> None:
    """Draw the curves of `runs`, by their names, as a PNG with a panel a curve."""
    from matplotlib.figure import Figure

    names = [name for name in CURVES if any(name in curves for curves in runs.values())]
    figure = Figure(figsize=(10, 2.6 * -(-len(names) // 2) + 0.3 * len(runs)), layout="constrained")
    panels = figure.subplots(-(-len(names) // 2), 2, squeeze=False).flat
    for panel, name in itertools.zip_longest(panels, names):
        if name is None:
            panel.set_axis_off()
            continue
        for colour, (run, curves) in zip(itertools.cycle(COLOURS), runs.items()):
            panel.plot(*zip(*curves.get(name, [(math.nan, math.nan)]), strict=True), ".-", color=colour, label=run)
        panel.set(title=CURVES[name], xlabel="step")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=1)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=90)
    replace_file(Path(path), content.getvalue(), "make room, then draw again with --plot and --runs")
    print(f"Curves: {path}")


def draw_curves(args: argparse.Namespace, folders: Iterable[str | None]) -> dict[str, Curves]:
    """The curves of --runs, else of those of `folders` that hold a log, by folder; with --plot also as a picture."""
    runs = {}
    for folder in dict.fromkeys(args.runs or filter(None, folders)):
        with contextlib.nullcontext() if args.runs else contextlib.suppress(InputError):
            runs[str(folder)] = read_curves(folder)
    if args.plot:
        if not any(runs.values()):
            raise InputError("--plot: there is no log of training to draw; name its output folder with --runs")
        plot_curves(runs, args.plot)
    return runs


def curves_svg(runs: Mapping[str, Curves]) -> str:
    """The curves as pictures of a page, one a panel, each with its ends in words."""
    panels = []
    for name in CURVES:
        lines = {run: curves[name] for run, curves in runs.items() if name in curves}
        if not lines:
            continue
        steps, values = zip(*itertools.chain(*lines.values()), strict=True)
        (left, right), (low, high) = (min(steps), max(steps)), (min(values), max(values))
        wide, tall = (right - left) or 1, (high - low) or 1
        drawn, said = [], []
        for colour, dash, run in zip(itertools.cycle(COLOURS), itertools.cycle(("", "6 3", "2 2")), runs):
            if points := lines.get(run):
                places = [f"{60 + 230 * (x - left) / wide:.1f},{130 - 110 * (y - low) / tall:.1f}" for x, y in points]
                drawn.append(f'<polyline points="{" ".join(places)}" stroke="{colour}" stroke-dasharray="{dash}"/>')
                drawn.append('<circle cx="{}" cy="{}" r="3" fill="{}"/>'.format(*places[-1].split(","), colour))
                (first, start), (last, end) = points[0], points[-1]
                said.append(f"{run}: {start:.4g} at step {first:g}, {end:.4g} at step {last:g}")
        said = html.escape(f"{CURVES[name]}. {'; '.join(said)}")
        panels.append(
            f'<svg viewBox="0 0 300 160" role="img" aria-label="{said}"><title>{said}</title>'
            f'<text x="60" y="12">{CURVES[name]}</text><path d="M60 20V130H290"/>{"".join(drawn)}'
            f'<text x="56" y="26" class="end">{high:.3g}</text><text x="56" y="130" class="end">{low:.3g}</text>'
            f'<text x="60" y="148">{left:g}</text><text x="290" y="148" class="end">step {right:g}</text></svg>'
        )
    names = zip(itertools.cycle(COLOURS), map(html.escape, runs))
    legend = " ".join(f'<span style="color:{colour}">■ {run}</span>' for colour, run in names)
    return f'<p>{legend}</p><div class="panels">{"".join(panels)}</div>'


# ---------------------------------------------------------------------------------------------------------------------
# The report: media
# ---------------------------------------------------------------------------------------------------------------------

FRAME_NAMES = ("{video}/{frame}", "{video}/{frame_number}")  # this and the next two: repeated from train_vqa.py
AUDIO_NAMES = ("{video_id}_{id}_{question_type}", "{video_id}_{id}", "{id}")
FRAME_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
# With FFmpeg's reader for each: left to itself, it would take a playlist for speech, and open what that names.
AUDIO_READERS = {
    **{".mp3": "mp3", ".wav": "wav", ".flac": "flac", ".ogg": "ogg", ".m4a": "mp4", ".webm": "matroska"},
    **{".opus": "ogg", ".aac": "aac"},
}
EMBEDDED_BYTES = 40_000_000  # of all media; base64 makes 53 MB of it, and the page is to stay below 60
# Longer side and quality of all frames of a page: the first with which SAMPLED_FRAMES of them say that all fit.
SMALL_JPEGS = ((384, 75), (320, 70), (256, 60), (224, 50), (192, 40), (160, 35), (128, 25))
SAMPLED_FRAMES = 20
OPUS_BITS = 24_000  # a second


def small_jpeg(path: Path, side: int, quality: int) -> tuple[str, bytes]:
    """(MIME type, a frame as a JPEG of at most `side` pixels)."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        image.draft("RGB", (side, side))
        image = ImageOps.exif_transpose(image).convert("RGB")
    image.thumbnail((side, side))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return "image/jpeg", content.getvalue()


def has_opus() -> bool:
    """Whether the installed PyAV can write Opus."""
    import av

    return "libopus" in av.codecs_available


def small_speech(path: Path) -> tuple[str, bytes]:
    """(MIME type, a recording as Ogg Opus, or without its encoder as WAV; both mono, 16 kHz)."""
    import av

    content, (form, codec) = io.BytesIO(), ("ogg", "libopus") if has_opus() else ("wav", "pcm_s16le")
    reader = AUDIO_READERS[path.suffix.lower()]
    with av.open(str(path), format=reader) as source, av.open(content, "w", format=form) as target:
        stream = target.add_stream(codec, rate=SAMPLE_RATE, layout="mono")
        stream.bit_rate = OPUS_BITS
        resampler = av.AudioResampler("s16", "mono", SAMPLE_RATE)
        for block in itertools.chain(source.decode(audio=0), (None,)):
            for part in resampler.resample(block):
                part.pts = None
                target.mux(stream.encode(part))
        target.mux(stream.encode(None))
    return f"audio/{form}", content.getvalue()


class PageMedia:
    """The frames and recordings that a page shows, each once.

    `entries` are [name, link]; a link is relative to the page, None where the file is missing, or 1 where it is in
    `islands`. `flags`: --frames_dir, --audio_dir, their patterns and --eval_data_path, for rows that name no files.
    """

    def __init__(self, page: str | Path, flags: Mapping[str, Any]):
        self.folder, self.flags = Path(page).absolute().parent, flags
        self.entries: list[list[Any]] = []
        self.files: list[Path | None] = []
        self.index: dict[str, int] = {}
        self.islands: dict[int, str] = {}
        self.find = functools.cache(self._find)

    def _find(self, flag: str, patterns: Sequence[str], endings: Sequence[str], **fields: str) -> Path | None:
        folder, pattern = self.flags.get(f"{flag}_dir"), self.flags.get(f"{flag.removesuffix('s')}_pattern")
        # A name must stay inside the folder that the flag names.
        if not folder or any(re.search(r"[/\\\0]|^\.{0,2}$", value) for value in fields.values()):
            return None
        stems = [os.path.join(folder, text.format(**fields)) for text in ((pattern,) if pattern else patterns)]
        files = (Path(stem + end) for stem in stems for ending in endings for end in (ending, ending.upper()))
        return next((file for file in files if file.is_file()), None)

    def add(self, name: str, file: Path | None) -> int:
        """The number of an entry: a file's one, or one for a `name` without a file."""
        if (known := self.index.get(place := str(file or name))) is not None:
            return known
        self.index[place] = len(self.entries)
        link = file and urllib.parse.quote(os.path.relpath(file, self.folder).replace(os.sep, "/"), errors="replace")
        self.entries.append([name, link])
        self.files.append(file)
        return self.index[place]

    def of_row(self, annotation: Row, answer: Row) -> tuple[list[int], int | None]:
        """(entries of a row's frames, entry of its speech): files that the answer names, else what the flags find."""
        fields = {name: annotation[name] for name in KEY_FIELDS}
        fields["file"] = Path(self.flags.get("eval_data_path") or "file").stem
        frames, named = [], answer.get("frames") or ()
        for place in named or annotation.get("frames") or ():
            file, name = Path(place), os.path.splitext(os.path.basename(place))[0] if named else str(place)
            if not file.is_file():
                video, _, number = name.rpartition("_")
                of_frame = {"frame": name, "video": video or fields["video_id"], "frame_number": number or name}
                file = self.find("frames", FRAME_NAMES, FRAME_EXTENSIONS, **fields, **of_frame)
            frames.append(self.add(name if file else str(place), file))
        speech, name = answer.get("audio_file"), f"speech of {annotation['id']}"
        file = Path(speech) if speech and Path(speech).is_file() else None
        file = file or self.find("audio", AUDIO_NAMES, tuple(AUDIO_READERS), **fields)
        asked = speech or self.flags.get("audio_dir")
        return frames, self.add(name if file else speech or name, file) if asked else None

    def embed(self) -> None:
        """Put every file into the page, small; what cannot be read becomes missing, with the reason in its name."""

        def encode(index: int, small: Callable[..., tuple[str, bytes]], *how: int) -> int:
            """The bytes that the file takes; 0 if it cannot be read."""
            if self.entries[index][1] is None:  # as was found before
                return 0
            try:
                kind, content = small(self.files[index], *how)
            except Exception as error:  # of any decoder
                self.entries[index] = [f"{self.entries[index][0]} ({type(error).__name__})", None]
                return 0
            self.entries[index][1] = 1
            data = f"{kind};base64,{base64.b64encode(content).decode()}"
            self.islands[index] = f'<script type="text/plain" id="m{index}">{data}</script>'
            return len(content)

        there = [index for index, file in enumerate(self.files) if file]
        sound = [index for index in there if self.files[index].suffix.lower() in AUDIO_READERS]
        seen = sorted(set(there) - set(sound))
        print(f"Embedding {len(seen)} frames and {len(sound)} recordings", flush=True)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            room = EMBEDDED_BYTES - sum(pool.map(lambda index: encode(index, small_speech), sound))
            sample = seen[:: -(-len(seen) // SAMPLED_FRAMES) or 1]
            for how in SMALL_JPEGS:
                if sum(encode(index, small_jpeg, *how) for index in sample) * len(seen) <= room * len(sample):
                    break
            list(pool.map(lambda index: encode(index, small_jpeg, *how), seen))


# ---------------------------------------------------------------------------------------------------------------------
# The report: its figures
# ---------------------------------------------------------------------------------------------------------------------


class Markup(str):
    """Text that is HTML already."""


def cell_html(cell: Any) -> str:
    """A cell of a table as HTML; text of the data shows as text."""
    return cell if isinstance(cell, Markup) else f"<bdi>{html.escape(_show(cell))}</bdi>"


def table_html(table: Table, caption: str) -> str:
    """A table with its caption; the first cell of a row names it."""
    header, rows = table
    head = "".join(f'<th scope="col">{cell_html(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{cell_html(first)}</th>{"".join(f"<td>{cell_html(cell)}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    caption = html.escape(caption)
    return f'<div class="wide"><table><caption>{caption}</caption><thead><tr>{head}</tr></thead>{body}</table></div>'


def list_html(lines: Iterable[str], of: str = "li") -> str:
    """Lines of text, each in an element."""
    return "".join(f"<{of}>{html.escape(line)}</{of}>" for line in lines)


def bar_html(figures: Row, references: Mapping[str, float | None]) -> Markup:
    """A share as a bar with its interval, beside marks for the reference lines."""
    if figures["accuracy"] is None:
        return Markup("-")
    x = {name: 200 * value for name, value in references.items() if value is not None}
    low, high = (200 * end for end in figures["ci95"])
    beside = "; ".join(f"{name.replace('_', ' ')} {_show(value)} %" for name, value in references.items() if name in x)
    said = f"choice {_show(figures['accuracy'])} %, 95 % {_show(figures['ci95'])}; {beside}"
    shapes = {"chance": "M{0} 0v22", "train_majority": "M{0} 14l-4 8h8z", "test_majority": "M{0} 8l-4-8h8z"}
    marks = "".join(f'<path class="{name}" d="{shapes[name].format(f"{at:.1f}")}"/>' for name, at in x.items())
    return Markup(
        f'<svg class="bar" viewBox="-5 0 210 22" role="img" aria-label="{said}"><title>{said}</title>'
        f'<path class="axis" d="M0 0v22M200 0v22"/><rect y="5" height="12" width="{200 * figures["accuracy"]:.1f}"/>'
        f'<path class="ci" d="M{low:.1f} 11H{high:.1f}M{low:.1f} 7v8M{high:.1f} 7v8"/>{marks}</svg>'
    )


def confusion_table(group: Sequence[Scored]) -> Table:
    """Gold answers of one type by what was answered: an option, several or none of them, or nothing at all."""
    other, nothing = "several or none", "no answer"
    closed = CLOSED_ANSWERS.get(group[0].question_type)
    options = {row.gold for row in group} | set(map(normalise, closed.options if closed else ()))
    counts = Counter()
    for row in group:
        label = nothing if row.prediction is None else predicted_label(row.prediction, row.question_type)
        counts[row.gold, label if label in options or label == nothing else other] += 1
    golds = sorted({row.gold for row in group})
    labels = [*golds, *sorted({label for _, label in counts} - {*golds, other, nothing}), other, nothing]
    labels = [label for label in labels if label in golds or any(counts[gold, label] for gold in golds)]
    return ("gold / answered", *labels), [(gold, *(counts[gold, label] or "" for label in labels)) for gold in golds]


def types_html(summary: Row, rows: Sequence[Scored]) -> str:
    """A bar a question type and family, then a confusion matrix a type with the commonest answers."""
    header, lines = types_table(summary["by_type"], summary["by_family"])
    groups = group_by_type(rows)
    parts = [*zip(summary["by_type"].values(), groups.values(), strict=True)]
    parts += zip(summary["by_family"].values(), group_by_family(rows).values(), strict=True)
    drawn = []
    for line, (part, group) in zip(lines, parts, strict=True):
        ended = finish_counts(group)
        known = len(group) - ended["unknown"]
        bar = bar_html(part["choice"], {name: part[name] for name in REFERENCES})
        drawn.append((line[0], bar, *line[1:], f"{ended['length']}/{known}" if known else "-"))
    header = (header[0], "choice beside the floors", *header[1:], "did not stop")
    text = table_html((header, drawn), "Accuracy in % by question type, and by family of types")
    key = "│ chance, ▲ train majority, ▼ test majority; the line across the end of a bar is its 95 % interval."
    text += f"<p>{key} distinct: different answers given / gold. did not stop: cut at the length limit.</p>"
    for kind, group in groups.items():
        _, given = answers_of(group)
        some = "; ".join(f"{answer[:60]!r} {n}" for answer, n in given.most_common(LISTED))
        matrix = table_html(confusion_table(group), f"{kind}: rows by gold answer and by what was answered")
        kind, some = html.escape(kind), html.escape(some)
        text += f"<details><summary>{kind}: confusion matrix</summary>{matrix}<p>Given: {some}</p></details>"
    return text


def summary_html(name: str, summary: Row, rows: Sequence[Scored]) -> str:
    """All figures of one run, from its summary and its scored rows with gold."""
    choice, floors, arms = summary["metrics"]["choice"], summary["baselines"], summary["arms"]
    beside = ", ".join(f"{line.replace('_', ' ')} {_show(floors[line])}" for line in REFERENCES)
    frames, finish = summary["manifest"].get("frames"), summary["finish"]
    warnings = [*([FRAMES_DIFFER.format(**frames)] if frames else []), *summary["warnings"]]
    right = f"{choice['correct']} of {choice['n']} right"
    parts = [
        f'<h2>{html.escape(name)}</h2><p class="head">choice {_show(choice["accuracy"])} %</p>',
        f"<p>95 % interval {_show(choice['ci95'])}; {right}; floors: {beside}</p>" if choice["n"] else "",
        list_html([*denominator_lines(summary), *(arms_notes(arms) if choice["n"] else ())], "p"),
        f"<ul class=warn>{list_html(warnings)}</ul>",
    ]
    if arms:
        header, lines = arms_table(arms)
        bars = [bar_html(part["metrics"]["choice"], floors) for part in arms.values()]
        lines = [(line[0], bar, *line[1:]) for line, bar in zip(lines, bars, strict=True)]
        parts.append(table_html((("arm", "beside the floors", *header[1:]), lines), "Arms, paired with the first"))
    parts += [
        types_html(summary, rows),
        table_html(reference_table(summary), "choice beside what needs neither speech nor frames, in %"),
        table_html(metrics_table(summary["metrics"]), "All metrics, in %"),
        table_html((tuple(finish), [tuple(finish.values())]), "How the answers ended"),
    ]
    manifest = json.dumps(summary["manifest"], indent=1, ensure_ascii=False)
    for title, text in (("The same as text", render_summary(summary)), ("Manifest: hashes, versions, flags", manifest)):
        parts.append(f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>")
    return f"<section>{''.join(parts)}</section>"


def changes_html(pairs: Row, sides: Sequence[Sequence[Scored]], notes: Sequence[str], warnings: Sequence[str]) -> str:
    """The paired test of two runs with `notes` on it, and the rows that only one of them has right, as links."""
    text = f"<section><h2>B against A</h2><ul class=warn>{list_html(warnings)}</ul>"
    text += table_html(comparison_table(pairs), "Paired over the same rows, in %") + list_html(notes, "p")
    for title, wanted in (("Right in A alone", (True, False)), ("Right in B alone", (False, True))):
        graded = ((a, b) for a, b in zip(*sides, strict=True) if a.correct)
        changed = [key_text(a.key) for a, b in graded if (a.correct["choice"], b.correct["choice"]) == wanted]
        places = (urllib.parse.quote(key, safe="!*'()", errors="replace") for key in changed)  # as JavaScript does
        links = "".join(
            f'<li><a href="#row={place}">{html.escape(key)}</a></li>'
            for place, key in zip(places, changed, strict=True)
        )
        text += f"<details><summary>{title}, by choice: {len(changed)} rows</summary><ul>{links}</ul></details>"
    return f"{text}</section>"


# ---------------------------------------------------------------------------------------------------------------------
# The report: the page
# ---------------------------------------------------------------------------------------------------------------------


def check_pictures(args: argparse.Namespace) -> None:
    """Raise InputError where --report or --plot cannot be written, a package is missing, or a pattern is wrong."""
    for flag, ending in (("report", ".html"), ("plot", ".png")):
        if path := getattr(args, flag):
            if Path(path).suffix.lower() != ending:
                raise InputError(f"--{flag} {path}: the name must end in {ending}")
            check_writable(Path(path), f"--{flag}")
    needed = {"--embed_media": {"PIL": "pillow", "av": "av"} if args.embed_media else {}}
    needed["--plot"] = {"matplotlib": "matplotlib"} if args.plot else {}
    for flag, packages in needed.items():
        if lacking := [name for module, name in packages.items() if not importlib.util.find_spec(module)]:
            raise InputError(f"{flag}: needs a package that is not installed: pip install {' '.join(lacking)}")
    fields = dict.fromkeys((*KEY_FIELDS, "file", "frame", "frame_number", "video"), "")
    for flag in ("audio_pattern", "frame_pattern"):
        try:
            (getattr(args, flag) or "").format(**fields)
        except (LookupError, ValueError, AttributeError) as error:
            known = ", ".join(f"{{{name}}}" for name in fields)
            raise InputError(f"--{flag}: {error} is not a field or not closed; there are {known}") from error
    for folder in args.runs or [args.checkpoint_path] * bool(args.plot and args.checkpoint_path):
        read_curves(folder)
    if args.plot and not (args.runs or args.checkpoint_path or args.score_only or args.compare):
        raise InputError("--plot: there is no log of training to draw; name its output folder with --runs")


def page_row(annotation: Row, answers: Sequence[Row | None], scored: Sequence[Scored | None], media: tuple) -> list:
    """A row of the page: key, type, question, short and full gold answer (None: no gold), `media` (entries of frames
    and speech), and for each column None or [text, bits of the metrics that are right (None: no gold), how it ended,
    whose speech, whose frames, transcript]."""
    cells: list[list[Any] | None] = []
    for answer, verdict in zip(answers, scored, strict=True):
        if verdict is None:
            cells.append(None)
            continue
        answer = answer or {}
        bits = sum(verdict.correct[metric] << i for i, metric in enumerate(METRICS)) if verdict.correct else None
        ended = f"{verdict.finish_reason}{': ' * ('error' in answer)}{answer.get('error', '')}"
        borrowed = map(answer.get, ("audio_of", "frames_of", "transcript"))
        cells.append([verdict.prediction, bits, ended, *borrowed])
    gold = [annotation["short_answer"], annotation["answer"]] if has_gold(annotation) else [None, None]
    named = [key_text(row_key(annotation)), annotation["question_type"], annotation["question"]]
    return [*named, *gold, *media, cells]


def write_report(
    args: argparse.Namespace,
    annotations: Sequence[Row],
    answers: Mapping[str, Mapping[Key, Row]],
    summaries: Mapping[str, Row],
    flags: Mapping[str, Any],
    changes: str = "",
) -> None:
    """Write the page of --report, and the picture of --plot.

    Args:
        answers: by column (arm, or side of a comparison) the rows with their answers; the first columns are those of
            `summaries`.
        flags: where media lie, as in PageMedia.
        changes: from `changes_html`.
    """
    trained = (summary["manifest"].get("flags", {}).get("checkpoint_path") for summary in summaries.values())
    runs = draw_curves(args, trained)
    if not args.report:
        return
    media = PageMedia(args.report, flags)
    left_out = {arm: set(part["left_out"]) for summary in summaries.values() for arm, part in summary["arms"].items()}
    scored = {}
    for name, rows in answers.items():
        asked = [row for row in annotations if key_text(row_key(row)) not in left_out.get(name, ())]
        scored[name] = {row.key: row for row in score_rows(asked, rows)}
    rows = []
    for annotation in annotations:
        key = row_key(annotation)
        columns = [part.get(key) for part in answers.values()], [part.get(key) for part in scored.values()]
        own = {name: value for row in reversed(columns[0][: len(summaries)]) for name, value in (row or {}).items()}
        rows.append(page_row(annotation, *columns, media.of_row(annotation, own)))
    notes = shared_recordings([row for row in rows if row[6] is not None and media.files[row[6]]])
    if args.embed_media:
        media.embed()
        if not has_opus():
            notes.append("speech is embedded as WAV: this PyAV has no Opus encoder")
    if missing := sum(link is None for _, link in media.entries):
        notes.append(f"{missing} frames or recordings are missing; see --frames_dir and --audio_dir")
    data = {"columns": list(answers), "metrics": METRICS, "families": FAMILIES, "media": media.entries, "rows": rows}
    figures = changes
    for (name, summary), path in zip(summaries.items(), args.compare or [args.output_file], strict=True):
        graded = [row for row in scored[name].values() if row.correct]
        figures += summary_html(f"{name}: {path}", summary, graded)
    figures += f"<section><h2>Training</h2>{curves_svg(runs)}</section>" if runs else ""
    page = string.Template(PAGE).substitute(
        title=html.escape(" and ".join(Path(name).name for name in args.compare or [args.output_file])),
        notes=list_html(notes),
        figures=figures,
        islands="".join(media.islands[index] for index in sorted(media.islands)),
        data=json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    )
    replace_file(
        Path(args.report), page.encode("utf-8", "replace"), "make room, then --score_only --report writes the page"
    )
    print(f"Report: {args.report}")


def shared_recordings(rows: Sequence[list]) -> list[str]:
    """A line where one recording is played for questions in different words; `rows` of the page, with speech."""
    words = defaultdict(set)
    for row in rows:
        words[row[6]].add(normalise(row[2]))
    shared = [row for row in rows if len(words[row[6]]) > 1]
    what = f"{len(shared)} rows play a recording that also serves a question in other words"
    return [f"{what}, e.g. {shared[0][0]}; see --audio_pattern"] if shared else []


# All text of the data reaches the page as escaped HTML or as JSON that the script sets as text, never as markup; the
# policy keeps the page from any other place than its own folder's media.
PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline';
 style-src 'unsafe-inline'; img-src 'self' file: data:; media-src 'self' file: data:">
<title>$title</title><style>
body{font:16px/1.45 system-ui,sans-serif;color:#1a1a1a;background:#fff;margin:0 auto;max-width:76rem;padding:0 1rem}
h1{font-size:1.3rem}h2{font-size:1.15rem;border-top:2px solid #777;padding-top:.6rem}.head{font-size:2rem;margin:0}
table{border-collapse:collapse;margin:.8rem 0;font-size:.87rem}caption{text-align:left;font-weight:600}
.wide{overflow-x:auto}th,td{border-bottom:1px solid #ccc;padding:.15rem .5rem;text-align:right;white-space:nowrap}
th:first-child{text-align:left}pre{overflow:auto;max-height:30rem;font-size:.8rem}
.warn li,.bad{color:#a1160c}.ok{color:#155f32}.warn:empty{display:none}
.bar{width:210px;height:22px}.bar rect{fill:#8fb8e0}.ci{stroke:#000;stroke-width:1.5;fill:none}.axis{stroke:#777}
.chance{stroke:#7a0f87;stroke-width:2}.train_majority,.test_majority{fill:#8a3a00}.test_majority{fill:#0b5c3a}
.panels{display:flex;flex-wrap:wrap;gap:.5rem}.panels svg{width:300px;height:160px;font-size:11px}.end{text-anchor:end}
.panels path{stroke:#777;fill:none}.panels polyline{fill:none;stroke-width:2}a,summary{color:#0b4a8f}
#rows{display:grid;grid-template-columns:minmax(16rem,24rem) 1fr;gap:1rem}#rows>*{min-width:0}
@media(max-width:50rem){#rows{grid-template-columns:1fr}}
#list{width:100%;font-size:.85rem}label{display:block;font-size:.85rem;margin:.25rem 0}select,input,button{font:inherit}
#filters select,#search{width:100%;box-sizing:border-box}#frame{max-width:100%;background:#eee}
#answers td,#answers th{text-align:left;vertical-align:top}#answers td:nth-child(2){width:100%}
#answers td:nth-child(2),#answers td:last-child{white-space:normal;overflow-wrap:anywhere}
h4,#row p{margin:.6rem 0 .2rem}
.text{white-space:pre-wrap;overflow-wrap:anywhere;max-height:14rem;overflow:auto;min-width:12rem;unicode-bidi:isolate}
:focus-visible{outline:3px solid #b35900;outline-offset:1px}
</style></head><body><a href="#rows">To the rows</a><main><h1>$title</h1><ul class="warn" id="notes">$notes</ul>$figures
<section><h2>Every row</h2><p>← and → go to the row before and after. The address of this page then names the row.</p>
<div id="rows"><div id="filters"><label>Type or family <select id="type"></select></label>
<label>Answers of <select id="column"></select></label><label>Metric <select id="metric"></select></label>
<label>Verdict <select id="verdict"></select></label><label>Search <input id="search" type="search"></label>
<p id="count" role="status"></p><select id="list" size="16" aria-label="Rows"></select></div>
<article id="row"><h3 id="key" aria-live="polite"></h3>
<div id="clip"><img id="frame" alt=""><p id="caption"></p>
<button id="back">‹ frame</button> <button id="play">Play frames</button> <button id="next">frame ›</button></div>
<p id="speech"></p><h4>Question</h4><div class="text" id="question" dir="auto"></div><h4>Gold answer</h4>
<div class="text" id="gold" dir="auto"></div><div class="wide"><table id="answers"></table></div>
</article></div></section></main>
$islands
<script type="application/json" id="data">$data</script>
<script>
"use strict";
const at = id => document.getElementById(id), data = JSON.parse(at("data").textContent);
const {rows, columns, metrics} = data;
const VERDICTS = {all: "all rows", right: "right", wrong: "wrong", gained: "right, and wrong in " + columns[0],
  lost: "wrong, and right in " + columns[0], cut: "did not stop by itself", none: "no answer", ungraded: "no gold"};
const make = (tag, text, more) => Object.assign(document.createElement(tag), {textContent: text}, more);
const MARKS = {true: ["✓", "right", "ok"], false: ["✗", "wrong", "bad"], null: ["·", "no gold", ""]};
function right(row, column, metric) {
  const bits = row[7][column] ? row[7][column][1] : null;
  return bits === null ? null : !!(bits >> metric & 1);
}
let shown = [], current = null, frame = 0, timer = null;

function choices(id, pairs) { at(id).replaceChildren(...pairs.map(([value, text]) => make("option", text, {value}))); }
function passes(row) {
  const column = +at("column").value, metric = +at("metric").value, cell = row[7][column];
  const good = right(row, column, metric), before = right(row, 0, metric);
  const verdict = at("verdict").value, type = at("type").value, words = at("search").value.toLowerCase();
  if (type && row[1] !== type && family(row[1]) !== type.slice(1)) return false;
  if (words && !row.text.includes(words)) return false;
  if (verdict === "all") return true;
  if (!cell) return false;
  return {right: good === true, wrong: good === false, gained: good === true && before === false,
    lost: good === false && before === true, cut: cell[2] === "length", none: cell[0] === null,
    ungraded: good === null}[verdict];
}
const family = type => Object.keys(data.families).find(name => data.families[name].includes(type)) || "other";
function filter() {
  shown = rows.filter(passes);
  const column = +at("column").value, metric = +at("metric").value;
  const line = row => MARKS[right(row, column, metric)][0] + " " + row[1] + ": " + row[2].slice(0, 100);
  at("list").replaceChildren(...shown.map(row => make("option", line(row))));
  at("count").textContent = shown.length + " of " + rows.length + " rows";
  at("list").selectedIndex = shown.indexOf(current);
}
function link(media) { return media[1] === 1 ? "data:" + at("m" + data.media.indexOf(media)).textContent : media[1]; }
function missing(name) { return "missing: " + name; }
function flip(by) {
  const clip = current[5];
  at("clip").hidden = false;
  for (const id of ["back", "play", "next"]) at(id).disabled = clip.length < 2;
  at("frame").removeAttribute("src");
  at("frame").hidden = !clip.length;
  if (!clip.length) { at("caption").textContent = "no frames are named"; return; }
  frame = (frame + by + clip.length) % clip.length;
  const media = data.media[clip[frame]], where = "frame " + (frame + 1) + " of " + clip.length + ", " + media[0];
  at("frame").alt = media[1] ? where : missing(media[0]);
  at("caption").textContent = media[1] ? where : missing(media[0]) + " (" + where + ")";
  at("frame").onerror = () => { at("caption").textContent = missing(where); };
  if (media[1]) at("frame").src = link(media);
}
function stop() { clearInterval(timer); timer = null; at("play").textContent = "Play frames"; }
function toRow(label, key) {
  const known = rows.some(row => row[0] === key), text = label + " " + key;
  return known ? make("a", text, {href: "#row=" + encodeURIComponent(key)}) : make("span", text);
}
function answers() {
  const head = make("tr", ""), table = at("answers");
  for (const name of ["from", "answer", ...metrics, "ended"]) head.append(make("th", name, {scope: "col"}));
  table.replaceChildren(make("caption", "Answers and verdicts"), head);
  columns.forEach((name, column) => {
    const line = make("tr", ""), cell = current[7][column], said = make("td", "");
    line.append(make("th", name, {scope: "row"}), said);
    table.append(line);
    if (!cell) { said.textContent = "not asked"; return; }
    said.append(make("div", cell[0] ?? "no answer", {className: cell[0] === null ? "bad" : "text", dir: "auto"}));
    metrics.forEach((_, metric) => {
      const [mark, text, className] = MARKS[right(current, column, metric)];
      line.append(make("td", mark + " " + text, {className}));
    });
    if (cell[3]) said.append(toRow("speech of", cell[3]));
    if (cell[4]) said.append(toRow("frames of", cell[4]));
    if (cell[5] != null) said.append(make("div", "asked in the words: " + cell[5], {className: "text", dir: "auto"}));
    line.append(make("td", cell[2]));
  });
}
function show(row) {
  current = row; frame = 0; stop();
  at("key").textContent = row[0];
  at("question").textContent = row[2];
  at("gold").textContent = row[3] === null ? "no gold" : row[3] + "\n" + row[4];
  flip(0);
  const media = row[6] === null ? null : data.media[row[6]];
  at("speech").replaceChildren(!media ? "no speech is named" : !media[1] ? missing(media[0]) :
    make("audio", "", {controls: true, preload: "none", src: link(media), title: media[0],
      onerror: () => at("speech").replaceChildren(missing(media[0]))}));
  answers();
  at("list").selectedIndex = shown.indexOf(row);
}
function go(row) { if (row && row !== current) location.hash = "row=" + encodeURIComponent(row[0]); }
function step(by) {
  const here = shown.indexOf(current);
  go(shown[here < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, here + by))]);
}
function follow() {
  const row = rows.find(row => location.hash === "#row=" + encodeURIComponent(row[0]));
  if (row) { show(row); at("rows").scrollIntoView(); } else if (!current && rows.length) show(rows[0]);
}
for (const row of rows) row.text = row.slice(0, 5).concat(row[7].map(cell => cell && cell[0])).join("\n").toLowerCase();
const types = [...new Set(rows.map(row => row[1]))].sort(), families = [...new Set(types.map(family))];
choices("type", [["", "all"], ...families.map(name => ["=" + name, "family: " + name]), ...types.map(x => [x, x])]);
choices("column", columns.map((name, i) => [i, name]));
choices("metric", metrics.map((name, i) => [i, name]));
choices("verdict", Object.entries(VERDICTS));
for (const id of ["type", "column", "metric", "verdict"]) at(id).onchange = filter;
at("search").oninput = filter;
at("list").onchange = () => go(shown[at("list").selectedIndex]);
at("back").onclick = () => { stop(); flip(-1); };
at("next").onclick = () => { stop(); flip(1); };
at("play").onclick = () => {
  if (timer) return stop();
  timer = setInterval(flip, 300, 1);
  at("play").textContent = "Stop";
};
document.onkeydown = event => {
  const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  const busy = event.altKey || event.ctrlKey || event.metaKey || event.target.matches("input, audio, label select");
  if (!by || busy) return;
  event.preventDefault();
  step(by);
};
window.onhashchange = follow;
filter();
follow();
</script></body></html>
"""


# ---------------------------------------------------------------------------------------------------------------------
# Sharing figures
# ---------------------------------------------------------------------------------------------------------------------


def figures_for_hub(summary: Row, data: Path, digest: str) -> list[Any]:
    """The metrics of a summary as huggingface_hub's EvalResults, each with its interval; floors beside the headline."""
    from huggingface_hub import EvalResult

    of_data = {"task_type": "visual-question-answering", "dataset_type": data.stem, "dataset_name": data.name}
    of_data["dataset_args"] = {"sha256": digest, "rows": summary["n_total"]}
    results = []
    for metric, part in summary["metrics"].items():
        told = {"ci95": part["ci95"], "n": part["n"]} | (summary["baselines"] if metric == METRICS[0] else {})
        kind = {"metric_type": "accuracy", "metric_name": metric, "metric_args": told}
        results.append(EvalResult(**of_data, **kind, metric_value=part["accuracy"]))
    return results


def push_results(args: argparse.Namespace, summary: Row | None = None) -> None:
    """Put the figures of `summary` into the card of --push_results, in place of those of the same file, and the page of
    --report beside it, in one commit. None: only find out whether that can be done. InputError where it cannot, or
    where the repo holds another adapter than the one that answered."""
    if args.embed_media:
        raise InputError("--push_results: --embed_media puts frames and speech into the page; leave one of them out")
    if not any(map(has_gold, read_annotations(args.eval_data_path, needs_gold=False)[: args.limit or None])):
        raise InputError(f"--push_results: no row of {args.eval_data_path} has a gold answer; there are no figures")
    load_libraries()
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

    repo, _, revision = args.push_results.partition("@")
    at, api, data = {"revision": revision or None}, HfApi(), Path(args.eval_data_path)
    what, advice = "its card and manifest cannot be had", "upload the model first, or check name, network and token"
    if summary:
        what, advice = "nothing was uploaded", "--score_only --push_results tries again"
    page, weights = f"results/{data.stem}.html", "adapter_model.safetensors"
    try:
        with vqa.naming_hub_errors(f"--push_results {repo}: {what}", advice):
            files = [Path(api.hf_hub_download(repo, name, **at)) for name in (vqa.CARD_FILE, vqa.MANIFEST_FILE)]
            card, manifest = ModelCard(files[0].read_text(encoding="utf-8")), json.loads(files[1].read_bytes())
            answered = summary and summary["manifest"]["sha256"].get("adapter")
            if args.checkpoint_path and not (summary or args.no_adapter):
                folder = vqa.resolve_model_dir(args.checkpoint_path, weights=True, flag_name="--checkpoint_path")
                answered = sha256_file(folder / weights) if (folder / weights).is_file() else None
            if (summary or not args.score_only) and answered != manifest["files"].get(weights, {}).get("sha256"):
                raise vqa.VQAError(f"--push_results {repo}: holds another adapter than the one that is evaluated")
            if not summary:
                vqa.open_repo(repo, **at)
                return
            kept = [old for old in card.data.eval_results or () if old.dataset_name != data.name]
            card.data.eval_results = kept + figures_for_hub(summary, data, sha256_file(data))
            card.data.model_name = card.data.model_name or repo
            intro, _, sections = card.text.partition(vqa.CARD_RESULTS)
            others = [part.strip() for part in sections.split("\n### ")[1:] if part.partition("\n")[0] != data.name]
            link = f"\n\n[Every row]({urllib.parse.quote(page)})" * bool(args.report)
            others.append(f"{data.name}\n\n{textwrap.indent(render_summary(summary), '    ')}{link}")
            card.text = "\n\n### ".join([intro + vqa.CARD_RESULTS, *others]) + "\n"
            sent = {vqa.CARD_FILE: str(card).encode()} | ({page: args.report} if args.report else {})
            operations = [CommitOperationAdd(name, content) for name, content in sent.items()]
            commit = api.create_commit(repo, operations, commit_message=f"Results of {data.name}", **at)
    except vqa.VQAError as error:
        raise InputError(str(error)) from error
    print(f"Uploaded {' and '.join(sent)}: {commit.commit_url}")


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def _at_least(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be {minimum} or more, found {value}")
        return value

    number.__name__ = "integer"  # argparse names the type in its message
    return number


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else _at_least(1)(text)


_batch_size.__name__ = "integer, or auto"


def _true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


_true_or_false.__name__ = "True or False"


def _arm_list(text: str) -> list[str]:
    arms = [arm.strip() for arm in text.split(",")]
    unknown = [repr(arm) for arm in arms if arm not in ARMS and arms != ["all"]]
    if unknown or len(set(arms)) < len(arms):
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown) or text}: give each arm once, of {', '.join(ARMS)}, or all"
        )
    return arms


def build_parser() -> argparse.ArgumentParser:
    """The command line. A flag that is unknown or abbreviated is an error."""
    parser = argparse.ArgumentParser(
        description="Generate answers with a checkpoint and score them, or score and compare existing answers.",
        usage="%(prog)s [--flag value ...]  (all flags: --help)",
        allow_abbrev=False,
    )
    titles = ("data", "model", "answers", "pictures")
    data, model, answers, page = (parser.add_argument_group(title).add_argument for title in titles)
    switch = {"action": "store_true"}
    # fmt: off
    data("--eval_data_path", help="JSONL in the REAL-Colon-VQA schema; its rows are the denominator")
    data("--frames_dir", help="folder with the frames of all videos")
    data("--audio_dir", help="folder with the spoken questions")
    data("--audio_pattern", help="path of a row's speech below --audio_dir, without extension, such as '{file}/{id}'; "
         "fields as in train_vqa.py --help. None: as in training, else '{video_id}_{id}_{question_type}', "
         "'{video_id}_{id}' or '{id}'")
    data("--frame_pattern", help="path of a frame below --frames_dir, likewise. None: as in training, else "
         "'{video}/{frame}' or '{video}/{frame_number}'")
    data("--train_data_path", help="the training JSONL, for its majority answers and for rows not held out. None: the "
         "one that the checkpoint was trained on, if it is still there and unchanged; with --score_only what the run "
         "kept of it")
    data("--output_file", help="X.jsonl, one row a sample; the figures go to X.summary.json. With --score_only: the "
         "existing predictions; X.summary.json keeps what it says of the run that made them, and a warning tells if "
         "none is known or if they were edited since")
    data("--limit", "--max_eval_samples", type=_at_least(0), default=0, help="evaluate the first N rows. 0: all; with "
         "--score_only as many as the run")
    data("--overwrite", **switch, help="start again where --output_file holds rows; without it, rows of the same run "
         "are kept and the rest is done")
    data("--allow_errors", **switch, help="a row whose files cannot be read counts as wrong; without it, such a row "
         "stops the run before the model loads")
    data("--allow_empty_frames", type=_true_or_false, nargs="?", const=True, default=False, help="evaluate where more "
         "than one in 100 rows (at least 2) has frames of one colour, or frames whose names differ and whose bytes "
         "are equal. False: an error")
    data("--allow_symlinks", **switch, help="links may lead out of --frames_dir and --audio_dir")

    model("--checkpoint_path", help="adapter or full model: final folder, checkpoint-N or merged model, or its hub id "
          "(user/repo, user/repo@revision). None: the base model, zero-shot")
    model("--model_name_or_path", help="base model. None: the base of the adapter, or without --checkpoint_path the "
          "published model")
    model("--input_mode", choices=(*INPUT_MODES, *PUBLIC_MODES), help="how the question reaches the model. None: as in "
         "training. The public script's audio_only is audio, text_only is text, and mismatched_audio the arm of that "
         "name in audio_text")
    model("--prompt_layout", choices=PROMPT_LAYOUTS, help="words around speech and frames. plain: of the published "
          "stage-2 model; chat: of the public SurgViVQA-Audio scripts. None: as in training; a base: plain. A trained "
          "model without vqa_settings.json needs it, and --max_eval_frames")
    model("--max_eval_frames", type=_at_least(0), help="frames a clip, evenly spaced. 0: all; None: as in training")
    model("--max_image_size", type=_at_least(1), help="longer side of a frame in pixels. None: as in training")
    model("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="weights and activations. auto: as "
          "in training; for a base model bfloat16 on a GPU, float32 without")
    model("--attn_implementation", help="attention: sdpa, eager or flash_attention_2. None: as in training")
    model("--load_in_4bit", type=_true_or_false, nargs="?", const=True, help="True: the decoder's linear layers in "
          "bitsandbytes' 4 bits, 16-bit weights quantised as they load (NF4); an adapter then stays unmerged. None: as "
          "in training")
    model("--init", choices=("pretrained", "random"), help="random: the base with weights drawn from --seed, to "
          "rehearse. None: as in training, else pretrained")
    model("--no_adapter", **switch, help="ask the base of the adapter in --checkpoint_path without the adapter, its "
          "prompt and frames being the adapter's")
    model("--no_merge", **switch, help="keep the adapter unmerged: slower; without it, it is merged once the "
          "weights are loaded")
    model("--gpu_memory_limit_gib", type=float, default=0.0, help="hard cap on this process's GPU memory, to rehearse "
          "a smaller card. 0: none")
    model("--cache_features", help="folder in which the outputs of the two encoders are kept, for other arms, "
          "evaluations and training of the same base: up to 11.2 MB a clip of 8 frames and 3.8 MB a recording "
          "in bfloat16. Each clip is then encoded alone: in float32 at --batch_size 1 that changes nothing, else a "
          "near tie may tip. Black frames and silence are never cached. None: encode for every answer")

    answers("--batch_size", type=_batch_size, default="auto", help="samples answered at a time; in bfloat16 another "
            "number may tip a near tie to another answer. auto: as many as the GPU or --gpu_memory_limit_gib has room "
            f"for, up to {AUTO_BATCH_SIZE}, halved where they do not fit; without a GPU {CPU_BATCH_SIZE}")
    answers("--max_new_tokens", type=_at_least(1), default=32, help="tokens after which an answer is cut")
    answers("--arms", type=_arm_list, help=f"comma-separated, of {', '.join(ARMS)}; all: those that fit the input "
            "mode and the data. None: the input mode alone")
    answers("--asr_model", help=f"Whisper of the arm {ASR_ARM}, folder or hub id (openai/whisper-large-v3-turbo): each "
            "recording is transcribed once, before the model is loaded, and the question then asked in these words. "
            "Word error rates need jiwer. None: no such arm")
    answers("--seed", type=int, default=0, help="for borrowed speech and frames, shuffled frames and --init random")

    parser.add_argument("--ask", metavar="SPEECH", help="answer the one question in this recording about --frames, and "
                        "print it; no rows are written")
    parser.add_argument("--ask_text", metavar="WORDS", help="the question in words: in place of --ask in text mode, "
                        "beside it in audio_text")
    parser.add_argument("--frames", nargs="+", metavar="IMAGE", help="the clip of --ask, in order in time")
    parser.add_argument("--push_results", metavar="USER/REPO", help="add the figures to the model card of this repo on "
                        "the Hugging Face hub (user/repo, user/repo@branch), and upload the page of --report, which "
                        "holds questions and answers; never frames or speech. The token is that of HF_TOKEN or of "
                        "`hf auth login`")
    parser.add_argument("--score_only", **switch, help="score the predictions in --output_file; no model")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two files of rows or predictions; print "
                        "their paired differences. Predictions without video_id or gold answers need --eval_data_path")
    page("--report", metavar="X.html", help="write a page with all figures, and every row with its frames, speech and "
         "answers. It links the files of the rows, or those found below --frames_dir and --audio_dir. Also with "
         "--score_only and --compare")
    page("--embed_media", **switch, help="put frames, as small JPEGs, and speech, as Opus, into the page of --report, "
         "which then shows them anywhere; needs pillow and av")
    page("--plot", metavar="X.png", help="draw the curves of training as a picture; needs matplotlib. Without "
         "--output_file and --compare that is all that is done, and --runs must be given")
    page("--runs", nargs="+", metavar="DIR", help="output folders of training, or checkpoints, whose curves go into "
         "--report and --plot. None: that of --checkpoint_path")
    # fmt: on
    return parser


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse `argv`, with dashes or underscores in flags; for an unknown one the nearest is named, status 2."""
    spelled = [re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), part) for part in argv]
    for name in {part.partition("=")[0] for part in spelled} & REFUSED_FLAGS.keys():
        parser.error(f"{name}: {REFUSED_FLAGS[name]}")
    args, unknown = parser.parse_known_args(spelled)
    if unknown:
        known = [f"--{name}" for name in (*vars(args), "max_eval_samples", "help")]
        wrong = [part.partition("=")[0] for part in unknown if part[:2] == "--"]
        near = ([name for name in known if name.startswith(part)] or known for part in wrong)
        meant = ", ".join(itertools.chain(*map(difflib.get_close_matches, wrong, near, itertools.repeat(1))))
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant and f'; did you mean {meant}?'}")
    return args


# Of what a page shows beside the figures; without a model these flags do something only where there is a --report.
REPORT_FLAGS = ("embed_media", "frames_dir", "audio_dir", "frame_pattern", "audio_pattern")


def parse_checked(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; those that are missing, or have no effect in the mode asked for, end the process with status 2."""
    parser = build_parser()
    args = parse_arguments(parser, sys.argv[1:] if argv is None else argv)
    asking = bool(args.ask or args.ask_text)
    needed = ["eval_data_path", "output_file"] + ["frames_dir"] * (not args.score_only)
    needed = ["frames"] if asking else needed
    lacking = [f"--{name}" for name in needed if not getattr(args, name)]
    only_plot = args.plot and args.runs and not (args.compare or args.output_file)
    if lacking and not (args.compare or only_plot):
        parser.error(f"{', '.join(lacking)} must be given (without a model: --score_only or --compare)")
    modes = {"compare": args.compare, "score_only": args.score_only, "ask": asking, "plot": only_plot}
    mode = next((mode for mode, chosen in modes.items() if chosen), "eval_data_path")
    used = {
        "compare": ["compare", "eval_data_path", "report", "plot"],
        "score_only": ["score_only", *needed, "train_data_path", "limit", "report", "plot", "push_results"],
        "ask": ASK_FLAGS,
        "plot": ["plot"],
        "eval_data_path": vars(args).keys() - {"frames", "runs", "embed_media"},
    }
    pictures = ["runs"] * bool(args.report or args.plot) + [*REPORT_FLAGS] * bool(args.report)
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    if idle := [f"--{name}" for name in given if name not in (*used[mode], *pictures)]:
        lacks = "without --report" if set(idle) <= {"--runs", "--embed_media"} else f"with --{mode}"
        parser.error(f"{', '.join(idle)}: no effect {lacks}; leave it out")
    return args


def follow(argv: Sequence[str] | None) -> int:
    """What another rank than 0 does: its share of the answers, in silence; it prints only what fails in that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while torch is imported
    load_libraries()
    with vqa.silent():
        try:
            args = parse_checked(argv)
        except SystemExit as end:
            if end.code:
                time.sleep(60)  # until the launcher ends it: rank 0 ends likewise, and says why
            raise
        if not args.output_file or args.score_only:  # a question, --compare: rank 0 does it
            return 0
        try:
            return generate(args)
        except (InputError, OSError) as error:
            message = message_of(error, args)
    if vqa.is_first_to_fail():
        print(message, file=sys.stderr)
    return 2


def message_of(error: Exception, args: argparse.Namespace) -> str:
    """An error of input as it is printed."""
    message = str(error)
    if isinstance(error, OSError) and error.filename:
        flags = [f" (--{name})" for name, value in vars(args).items() if value == error.filename]
        message = f"{error.filename}{''.join(flags)}: {error.strerror}"
    return "\n".join(f"{Path(__file__).name}: error: {line}" for line in message.splitlines())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status. Errors of input are one line on stderr and status 2."""
    if int(os.environ.get("RANK", 0)):
        return follow(argv)
    args = parse_checked(argv)
    measured = False
    try:
        check_pictures(args)
        if args.plot and not (args.compare or args.output_file):
            draw_curves(args, ())
            return 0
        if args.compare:
            return compare(args)
        if args.push_results:
            push_results(args)
        status = score_only(args) if args.score_only else generate(args)
        measured = status < 2
        if args.push_results and measured:
            push_results(args, json.loads(summary_path(args.output_file).read_bytes()))
        return status
    except KeyboardInterrupt:  # while torch is imported, or without a model
        print("\nStopped by SIGINT: run the same command again", file=sys.stderr)
        return 128 + signal.SIGINT
    except (InputError, OSError) as error:
        if "vqa" not in globals() or vqa.is_first_to_fail():
            print(message_of(error, args), file=sys.stderr)
        return 1 if measured else 2


if __name__ == "__main__":
    sys.exit(main())
