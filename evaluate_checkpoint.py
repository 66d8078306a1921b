"""Evaluate a checkpoint by letting it answer, and score answers that already exist.

Generate and score (settings that training chose are read from the checkpoint):

    python evaluate_checkpoint.py \\
        --checkpoint_path ./checkpoints/surgical_vqa_50samples \\
        --eval_data_path test_set/out_002-001.jsonl \\
        --frames_dir dataset/frames --audio_dir audio/out_002-001 \\
        --train_data_path test_set/in_002-001.jsonl \\
        --output_file results/eval_out.jsonl

Does it hear, does it see? The same with `--arms audio,mismatched_audio,black_frames`.

Without a model, with the standard library alone:

    python evaluate_checkpoint.py --score_only \\
        --output_file predictions.jsonl --eval_data_path test_set/out_002-001.jsonl
    python evaluate_checkpoint.py --compare results/a.jsonl results/b.jsonl

`X.jsonl` gets one row a sample, `X.summary.json` the figures. docs/EVAL_STRATEGY.md explains every figure.
Exit status: 0 all rows answered, 1 some rows failed (they count as wrong), 2 nothing was measured, 143, 130 or 129
stopped by SIGTERM, SIGINT or SIGHUP (the same command goes on).
"""

import argparse
import codecs
import contextlib
import copy
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
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
import subprocess
import sys
import textwrap
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
METRICS = ("choice", "strict", "contains")  # the headline first
INPUT_MODES = ("audio", "audio_text", "text")
ARMS = (*INPUT_MODES, "mismatched_audio", "silent_audio", "black_frames", "shuffled_frames", "first_frame")
Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
SIGNIFICANCE = 0.05
SEED_BASELINE = 0.46  # `contains`, audio + image, zero-shot, 50 clips of video 002-001: the author's figure
VIDEO_RESAMPLES = 2000
COLLAPSE_SHARE = 0.9  # one answer for more than this share of a type is mode collapse, if the gold answers are balanced
BALANCE_SLACK = 1.3  # balanced: the commonest of k gold answers holds at most 1.3 / k of the type's rows
COLLAPSE_MIN_ROWS = 10  # below this, one answer throughout is no surprise
LISTED = 10  # keys shown in a message; the summary lists them all
WIDTH = 80
AUTO_BATCH_SIZE = 128  # rows at most: a step of decoding costs the same for one row as for a hundred
CPU_BATCH_SIZE = 8  # of --batch_size auto where no GPU sets a limit
PREFILL_TOKENS = 16384  # prompts read at a time: enough to fill a GPU, and what MLP activations take stays bounded
USABLE_MEMORY = 0.92  # of the limit: the allocator splits what it holds

Row = dict[str, Any]
Key = tuple[str, str, str]


class InputError(ValueError):
    """The data or the flags cannot be used. The text is one line: what is wrong, where, and what to do."""


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


def _unique_pairs(pairs: list[tuple[str, Any]]) -> Row:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"the field '{Counter(names).most_common(1)[0][0]}' occurs twice")
    return dict(pairs)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_jsonl(path: str | Path) -> Iterator[tuple[int, Row]]:
    """Yield (line number from 1, object) for each line that is not blank.

    Raises InputError, named `file:line`, for a line that is not one JSON object (NaN and repeated fields included).
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"")  # the mark that Windows sets
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode(), object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant)
            except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError; brackets without end
                raise InputError(f"{path}:{number}: not a JSON object ({error}); mend or remove the line") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: a JSON object is expected, found {type(row).__name__}")
            yield number, row


def _require_text(row: Row, names: Iterable[str], where: str) -> None:
    for name in names:
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{where}: '{name}' must be a text that is not empty, found {value!r}")


def read_annotations(path: str | Path) -> list[Row]:
    """Read a file in the REAL-Colon-VQA schema; every row has the key and gold fields, and every key is unique.

    Raises InputError naming file and line otherwise, or if the file holds no rows.
    """
    rows, seen = [], {}
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        _require_text(row, KEY_FIELDS + GOLD_FIELDS, where)
        first = seen.setdefault(row_key(row), number)
        if first != number:
            raise InputError(f"{where}: the row {key_text(row_key(row))} stands already on line {first}; remove one")
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: no rows; give a file with at least one")
    return rows


def _check_prediction(row: Row, where: str) -> None:
    if "predicted_answer" not in row:
        raise InputError(f"{where}: 'predicted_answer' is missing; give the model's text, or null where it failed")
    if not isinstance(row["predicted_answer"], str | None):
        raise InputError(f"{where}: 'predicted_answer' must be a text or null, found {row['predicted_answer']!r}")


def match_predictions(annotations: Sequence[Row], path: str | Path) -> dict[Key, Row]:
    """Read a prediction file and assign its rows to `annotations`, keyed by the full row key.

    A prediction row carries `id` (or `question_id`) and `predicted_answer`; `video_id` and `question_type` are used
    where present and needed where the id alone does not tell two annotation rows apart.
    Raises InputError for a row that fits no annotation or several, for two predictions of one row, and for a row whose
    own question or short answer, where it has one, is not the annotation's.
    """
    index: dict[tuple, list[Key]] = defaultdict(list)
    for key in map(row_key, annotations):
        parts = list(zip(KEY_FIELDS, key, strict=True))
        for size in range(1, len(parts) + 1):
            for subset in itertools.combinations(parts, size):
                index[subset].append(key)

    annotation_of = {row_key(row): row for row in annotations}
    matched, lines = {}, {}
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        _check_prediction(row, where)
        row = {**row, "id": row.get("id", row.get("question_id"))}
        names = [name for name in KEY_FIELDS if name == "id" or row.get(name) is not None]
        _require_text(row, names, where)
        given = tuple((name, row[name]) for name in names)
        keys = index.get(given, [])
        if not keys:
            raise InputError(
                f"{where}: no row of --eval_data_path has {', '.join(f'{k} {v!r}' for k, v in given)}; "
                f"remove the prediction or give the file it was made from"
            )
        if len(keys) > 1:
            lacking = " and ".join(name for name in KEY_FIELDS if name not in names)
            raise InputError(
                f"{where}: id {row['id']!r} stands for {len(keys)} rows, e.g. {key_text(keys[0])} and "
                f"{key_text(keys[1])}; add {lacking} to the prediction rows"
            )
        first = lines.setdefault(keys[0], number)
        if first != number:
            raise InputError(f"{where}: a second prediction for {key_text(keys[0])}, first on line {first}; remove one")
        for name in ("question", "short_answer"):
            theirs, ours = row.get(name), annotation_of[keys[0]][name]
            if isinstance(theirs, str) and normalise(theirs) != normalise(ours):
                raise InputError(
                    f"{where}: the {name} of {key_text(keys[0])} is {theirs!r} here but {ours!r} in --eval_data_path; "
                    f"give the file that the predictions were made from"
                )
        matched[keys[0]] = row
    return matched


def read_answer_rows(path: str | Path) -> dict[Key, Row]:
    """Read a rows file that this script wrote (key, gold and prediction in every row), keyed by the row key.

    Raises InputError naming file and line for a row without these fields or a repeated key.
    """
    rows: dict[Key, Row] = {}
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        _require_text(row, (*KEY_FIELDS, "short_answer", "ground_truth"), where)
        _check_prediction(row, where)
        if row_key(row) in rows:
            raise InputError(f"{where}: a second row for {key_text(row_key(row))}; remove one, or use --overwrite")
        rows[row_key(row)] = row
    return rows


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


OTHER = "(another answer)"  # of the kind asked for, but no option: a quadrant where a direction is asked


def _forms(*alternatives: str) -> re.Pattern[str]:
    """Whole-word pattern over simplified text; write the longer alternative first."""
    return re.compile(rf"(?<![\w<>])(?:{'|'.join(alternatives)})(?!\w)")


@dataclass(frozen=True)
class ClosedAnswers:
    """How the options of one question type are worded.

    asserted: option (or part, see `compose`) -> words that name it in a clause without a negation.
    denied: option -> words that name it when the clause denies them: "no fluid" names `absent`.
    polar: a bare "yes" or "no" is an answer.
    compose: option -> the parts that must all be named, where an answer has two: upper + left.
    """

    asserted: dict[str, re.Pattern[str]]
    denied: dict[str, re.Pattern[str]] = field(default_factory=dict)
    polar: bool = False
    compose: dict[str, frozenset[str]] = field(default_factory=dict)

    def option_of(self, short_answer: str) -> str | None:
        """The option that a gold short answer is, or None if the table does not know it."""
        names = self.compose or [name for name in self.asserted if name != OTHER]
        return next((name for name in names if normalise(name) == normalise(short_answer)), None)


def _yes_no(yes: str, no: str = "", denied: str = "") -> ClosedAnswers:
    """A yes/no type. `yes`: words that say yes, and no when denied; `no`: words that say no; `denied`: no when denied.

    Denying a `no` word says nothing: a scope that is "not withdrawing" may stand still.
    """
    nothing = r"(?!)"  # matches nowhere
    return ClosedAnswers(
        asserted={"yes": _forms(yes), "no": _forms(no or nothing)},
        denied={"no": _forms(yes, denied or nothing)},
        polar=True,
    )


_ADVANCE = r"advanc\w*|forwards?|push\w*|insert\w*"
_WITHDRAW = r"withdr(?:aw|ew)\w*|retract\w*|backwards?|pull\w*|mov\w+ back"
_MOVE = r"mov(?:e|es|ed|ing|ements?)|motion"
_REST = r"stationary|static|motionless|immobile|at rest|in place|(?:is|stays?|remains?) still(?! \w+ing| in motion)"
_BLOCK = r"obstruct\w*|occlu\w*|block\w*|obscur\w*|cover(?:s|ed|ing)?"
_WHOLLY = r"(?:(?:complete|entire|total)(?:ly)?|fully?|whole|wholly)"
_SEEN = r"visible|seen|present|observed|observable|apparent|in view"
_SCOPE = r"(?:endoscope|scope)(?: body)?"
_NBI = r"nbi|narrow ?band(?: imaging)?"
_WHITE = r"wli?|white ?light"
_MM = r"(?: ?(?:mm|milli\w+))?(?! ?(?:cm|centi\w+)|\.?\d)"

# Options come from the REAL-Colon-VQA annotations, except those marked (+): plausible answers of the same kind that no
# row of the published files has. They are here so that naming one beside the right option counts as naming two.
CLOSED_ANSWERS: dict[str, ClosedAnswers] = {
    "blue_dye_presence": _yes_no(
        r"dye[sd]?|stain(?:s|ed|ing)?|contrast|indigo carmine|methylene blue|chromoendoscopy", denied=_SEEN
    ),
    "endoscope_visibility": _yes_no(
        rf"{_SCOPE}(?: \w+){{0,4}}? (?:{_SEEN})|see\w*(?: \w+){{0,2}} {_SCOPE}|^(?:{_SEEN})$",
        no=r"hidden|invisible|out of (?:view|sight)",
        denied=rf"{_SEEN}|{_SCOPE}",
    ),
    "fluid_occlusion_level": ClosedAnswers(
        asserted={
            "absent": _forms(
                rf"(?:{_WHOLLY} )?(?:clear|free|unobstructed|unobscured)|{_WHOLLY} visible",
                r"mucosa(?: \w+){0,2}? visible",
            ),
            "partial": _forms(rf"partial(?:ly)?|partly|(?:nearly|almost) {_WHOLLY}"),  # (+)
            "complete": _forms(_WHOLLY),
            OTHER: _forms(r"(?:full|complete) (?:view|visibility)"),  # of what is seen, or of what is blocked?
        },
        denied={
            "absent": _forms(
                rf"(?:{_WHOLLY} )?(?:absent|absence|none|nothing)",
                r"(?:no|any|without|lack of|free of|free from)(?: \w+){0,3}? (?:fluid|liquid|water|occlusion)",
                _BLOCK,
            )
        },
    ),
    "flush_action": _yes_no(r"flush\w*|irrigat\w*|rins\w*|wash\w*|spray\w*"),
    "lesion_histology_extended": ClosedAnswers(
        {
            "adenoma": _forms(r"adenomas?|adenomatous"),
            "hyperplastic": _forms(r"hyperplastic|hyperplasia"),
            "serrated": _forms(r"serrated(?: (?:adenomas?|lesion|polyp))?"),  # (+)
            "carcinoma": _forms(r"adenocarcinoma|carcinoma|cancer(?:ous)?"),  # (+)
        }
    ),
    "lesion_motion_direction": ClosedAnswers(
        asserted={
            "left": _forms(r"(?:from )?(?:the )?right to (?:the )?left|left(?:wards?)?"),
            "right": _forms(r"(?:from )?(?:the )?left to (?:the )?right|right(?:wards?)?"),
            "up": _forms(r"(?:from )?(?:the )?bottom to (?:the )?top|towards? the top|(?<!close )up(?:wards?)?"),
            "down": _forms(r"(?:from )?(?:the )?top to (?:the )?bottom|towards? the bottom|down(?:wards?)?"),
            "stable": _forms(rf"stable|unchanged|fixed|^still$|same (?:place|position|location)|{_REST}"),
            OTHER: _forms(r"(?:upper|lower|top|bottom) (?:left|right)|(?:left|right) (?:upper|lower|top|bottom)"),
        },
        denied={"stable": _forms(rf"{_MOVE}|drift\w*|shift\w*|displac\w*")},
    ),
    "lesion_screen_position": ClosedAnswers(
        asserted={
            "upper": _forms("upper|top"),
            "lower": _forms("lower|bottom"),
            "left": _forms("left"),
            "right": _forms("right"),
            OTHER: _forms(r"cent(?:er|re|ral)|middle"),
        },
        compose={
            f"{vertical}-{side}": frozenset({vertical, side})
            for vertical in ("upper", "lower")
            for side in ("left", "right")
        },
    ),
    "lesion_site": ClosedAnswers(
        {
            "rectum": _forms("rectum|rectal"),
            "sigma": _forms("sigma|sigmoid"),
            "descending": _forms("descending"),
            "transverse": _forms("transverse"),  # (+)
            "ascending": _forms("ascending"),
            "cecum": _forms("ca?ecum|ca?ecal"),  # (+)
            OTHER: _forms(r"recto ?sigmoid\w*|flexure"),
        }
    ),
    "lesion_size_range": ClosedAnswers(
        {
            "<5": _forms(rf"(?:<|(?:less|smaller|fewer) than |(?:under|below) )(?:5|five){_MM}"),
            "5-10": _forms(rf"(?:5|five) (?:to|and) (?:10|9|9\.9|ten|nine){_MM}"),  # (+)
            ">10": _forms(rf"(?:>|(?:more|larger|greater|bigger) than |(?:over|above) )(?:10|ten){_MM}"),  # (+)
            OTHER: _forms(r"[<>=≤≥]*\d+(?:\.\d+)?"),
        }
    ),
    "lighting_mode": ClosedAnswers({"NBI": _forms(_NBI), "WL": _forms(_WHITE)}),  # WL (+)
    "mucosa_visibility": _yes_no(
        rf"mucosa(?: \w+){{0,4}}? (?:{_SEEN}|clear|clean)|(?:see|observe)(?: \w+){{0,3}} mucosa"
        rf"|^(?:clearly )?(?:{_SEEN}|clear|clean)$",
        no=rf"hidden|invisible|dirty|{_BLOCK}",
        denied=rf"mucosa|{_SEEN}|clear|clean|see|observe",
    ),
    "nbi_status": _yes_no(_NBI, no=_WHITE),
    "occlusion_check": _yes_no(
        _BLOCK,
        no=r"un(?:obstructed|occluded|blocked|obscured)|clear (?:view|field)"
        r"|(?:mucosa|view|field)(?: \w+){0,4}? (?:visible|clear|open)",
    ),
    "scope_backward_motion": _yes_no(_WITHDRAW, no=rf"{_ADVANCE}|{_REST}", denied=_MOVE),
    "scope_forward_motion": _yes_no(_ADVANCE, no=rf"{_WITHDRAW}|{_REST}", denied=_MOVE),
    # "not advancing" leaves withdrawing, so only a denied movement means no
    "scope_motion": ClosedAnswers(
        {"yes": _forms(_MOVE, _ADVANCE, _WITHDRAW), "no": _forms(_REST)}, {"no": _forms(_MOVE)}, polar=True
    ),
    "scope_motion_type": ClosedAnswers({"advancing": _forms(_ADVANCE), "withdrawing": _forms(_WITHDRAW)}),
    "scope_outside": _yes_no(
        r"outside|out of (?:the )?(?:patient|body)|external\w*",
        no=r"inside|within|internal\w*|in (?:the |a )?(?:patient|body|colon|lumen)",
    ),
    "tool_catheter_check": _yes_no("catheters?", no="forceps?|snares?", denied="tool|instrument"),
    "tool_identification": ClosedAnswers(
        {"catheter": _forms("catheters?"), "forceps": _forms("forceps?"), "snare": _forms("snares?")}
    ),
}

_SENTENCE_END = re.compile(r"(?<=[!?;])|\.(?!\d)")
_ECHO = re.compile(  # a question, with or without its mark: zero-shot models often repeat what they heard
    r".*\?$|(?:is|are|was|were|do|does|did|can|could|has|have)\b(?! not)"
    r"|(?:what|where|which|how|(?:in|at|into) (?:what|which))\b"
    r"|(?:if|when)\b[^,]*, (?:is|are|do|does)\b"
)
_CLAUSE_START = re.compile(
    r"[,:;()!]|\b(?=(?:and|but|yet|however|while|whereas|although|though|because|since|so|as|which|then"
    r"|with|without|rather than|instead of|nor)\b)"
)
_YES = re.compile(r"\b(?:yes|yeah|yep)\b|^(?:it|they|this|that) (?:is|are|does|do)$")
_NO = re.compile(
    r"\b(?:nope|no(?= (?:the|it|its|this|that|these|those|there|they|we|i|an?)\b| ?$))\b"
    r"|^(?:it|they|this|that) (?:is|are|does|do) not$"
)
_NEGATION = re.compile(
    r"\b(?:no|not(?! only)|never|none|nothing|non|neither|nor|without|rather than|instead of|free of|free from"
    r"|absent|absence|lack\w*|missing|off)\b"
)
_PART_DENIED = re.compile(rf"\b(?:not|no|never)(?: \w+){{0,2}}? {_WHOLLY}\b")
_UNDECIDED = re.compile(
    r"\bwhether\b|\bun(?:sure|certain|clear|known|able)\b|\bnot (?:sure|certain|know)\b|\bnot clear (?:if|from)\b"
    r"|\b(?:can not|could not|impossible to|not possible to|hard to|difficult to)(?: be)?"
    r" (?:determin|tell|say|know|confirm|assess|judg|identif|answer|conclu)"
    r"|\b(?:tell|say|know|see|determine|judge|sure|clear) if\b"
)


def _mentions(clause: str, forms: Mapping[str, re.Pattern[str]]) -> list[tuple[str, int, int]]:
    """(name, start, end) of the forms in a clause; of overlapping ones the longest: "upper left" hides "left"."""
    found = [(name, *match.span()) for name, form in forms.items() for match in form.finditer(clause)]
    kept: list[tuple[str, int, int]] = []
    for name, start, end in sorted(found, key=lambda m: (m[1] - m[2], m[1])):
        if all(end <= other_start or other_end <= start for _, other_start, other_end in kept):
            kept.append((name, start, end))
    return kept


def _named_in_clause(clause: str, closed: ClosedAnswers) -> set[str]:
    if _UNDECIDED.search(clause) or _PART_DENIED.search(clause):
        return set()
    mentions = _mentions(clause, closed.asserted)
    negations = len(_NEGATION.findall(clause))
    if negations == 0:
        return {name for name, _, _ in mentions}
    if negations > 1:  # "not absent", "no ... not": nobody should be credited for a guess at what was meant
        return set()
    named = set()
    for option, form in closed.denied.items():
        spans = [match.span() for match in form.finditer(clause)]
        # "does not move left" denies one direction, not all motion: an option in the clause that the denial does not
        # cover leaves the clause without an answer
        if spans and all(any(s < end and start < e for s, e in spans) for _, start, end in mentions):
            named.add(option)
    return named


def named_options(prediction: str, closed: ClosedAnswers) -> set[str]:
    """The options of a question type that a prediction names; OTHER stands for an answer of the kind that is none.

    Questions echoed back, clauses that leave the matter open and clauses with two negations name nothing.
    """
    named: set[str] = set()
    for sentence in map(str.strip, _SENTENCE_END.split(simplify(prediction))):
        if _ECHO.match(sentence):
            continue
        for clause in map(str.strip, _CLAUSE_START.split(sentence)):
            if closed.polar:
                named |= {"yes"} if _YES.search(clause) else set()
                named |= {"no"} if _NO.search(clause) else set()
                clause = _NO.sub("", _YES.sub("", clause)).strip()
            named |= _named_in_clause(clause, closed)
    if closed.compose:
        whole = {option for option, parts in closed.compose.items() if parts <= named}
        return whole | ({OTHER} & named)
    return named


# ---------------------------------------------------------------------------------------------------------------------
# The three metrics
# ---------------------------------------------------------------------------------------------------------------------


def contains_correct(prediction: str, short_answer: str) -> bool:
    """The seed's rule: the short answer occurs in the prediction, case aside. "normal" is right where "no" is asked."""
    return short_answer.lower() in prediction.lower()


def strict_correct(prediction: str, short_answer: str, answer: str) -> bool:
    """The normalised prediction is the short or the full gold answer and nothing else."""
    return normalise(prediction) in {normalise(short_answer), normalise(answer)}


def has_options(question_type: str, short_answer: str) -> bool:
    """Does the table know the type and this gold answer? If not, `choice` falls back to `strict`."""
    return question_type in CLOSED_ANSWERS and CLOSED_ANSWERS[question_type].option_of(short_answer) is not None


def choice_correct(prediction: str, question_type: str, short_answer: str, answer: str) -> bool:
    """The prediction names exactly one option of its question type, and it is the gold one."""
    if not has_options(question_type, short_answer):
        return strict_correct(prediction, short_answer, answer)
    closed = CLOSED_ANSWERS[question_type]
    return named_options(prediction, closed) == {closed.option_of(short_answer)}


def predicted_label(prediction: str, question_type: str) -> str:
    """What a prediction amounts to, for counting answers: the one option it names, else its normalised text."""
    if question_type in CLOSED_ANSWERS:
        named = named_options(prediction, CLOSED_ANSWERS[question_type])
        if len(named) == 1 and OTHER not in named:
            return normalise(named.pop())
    return normalise(prediction)


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
    gold: str  # normalised short answer
    has_options: bool
    prediction: str | None
    correct: dict[str, bool]
    finish_reason: str  # eos, length, error, missing, or unknown where the prediction file does not say
    label: str | None  # predicted_label; None without a prediction


def judge(prediction: str | None, question_type: str, short_answer: str, answer: str) -> dict[str, bool]:
    """Right or wrong per metric. No prediction is wrong by all of them."""
    if prediction is None:
        return dict.fromkeys(METRICS, False)
    return {
        "choice": choice_correct(prediction, question_type, short_answer, answer),
        "strict": strict_correct(prediction, short_answer, answer),
        "contains": contains_correct(prediction, short_answer),
    }


def score_rows(annotations: Sequence[Row], predictions: Mapping[Key, Row]) -> list[Scored]:
    """Score every annotation row, in file order. A row without a prediction, or with null as one, is wrong."""
    scored = []
    for row in annotations:
        found = predictions.get(row_key(row))
        text = found["predicted_answer"] if found else None
        finish = (found or {}).get("finish_reason") or "unknown"
        if text is None:
            finish = "error" if found else "missing"
        kind, short = row["question_type"], row["short_answer"]
        scored.append(
            Scored(
                key=row_key(row),
                question_type=kind,
                gold=normalise(short),
                has_options=has_options(kind, short),
                prediction=text,
                correct=judge(text, kind, short, row["answer"]),
                finish_reason=finish,
                label=None if text is None else predicted_label(text, kind),
            )
        )
    return scored


def answer_row(
    annotation: Row,
    predicted_answer: str | None,
    *,
    finish_reason: str,
    n_tokens: int,
    input_mode: str,
    audio_file: str | None,
    **more: Any,
) -> Row:
    """One row of the output file. `correct` is the seed's rule; `more` takes `error` and `audio_of`, for instance."""
    judged = judge(predicted_answer, annotation["question_type"], annotation["short_answer"], annotation["answer"])
    return {
        "id": annotation["id"],
        "video_id": annotation["video_id"],
        "question_type": annotation["question_type"],
        "question": annotation["question"],
        "ground_truth": annotation["answer"],
        "short_answer": annotation["short_answer"],
        "predicted_answer": predicted_answer,
        "correct": judged["contains"],
        "strict_correct": judged["strict"],
        "choice_correct": judged["choice"],
        "finish_reason": finish_reason,
        "n_tokens": n_tokens,
        "input_mode": input_mode,
        "audio_file": audio_file,
        **more,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Intervals and tests
# ---------------------------------------------------------------------------------------------------------------------


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion, both ends within [0, 1] (Wilson, JASA 22, 1927). `n` is at least 1."""
    p, z2 = right / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low = 0.0 if right == 0 else centre - half  # exactly, not up to rounding
    high = 1.0 if right == n else centre + half
    return low, high


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value that A and B are equally often right, from the rows that only one of them has right.

    Under the null each such row falls to either side like a coin: twice the smaller binomial tail, at most 1.
    Integer arithmetic throughout, so thousands of rows neither overflow nor underflow before the one division.
    """
    n = only_a + only_b
    tail = term = 1  # C(n, 0), and the sum of C(n, k) up to the smaller count
    for k in range(1, min(only_a, only_b) + 1):
        term = term * (n - k + 1) // k
        tail += term
    return min(1.0, 2 * tail / 2**n)


def paired_difference_interval(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, float]:
    """95 % interval of accuracy(B) - accuracy(A) on the same rows, given the four counts (their sum at least 1).

    Newcombe's score method for paired proportions with continuity-corrected phi (method 10 of Newcombe, Statistics in
    Medicine 17, 1998, 2635-2650): unlike Wald's it does not shrink to a point when the two agree everywhere.
    """
    n = both + only_a + only_b + neither
    p_a, p_b = (both + only_a) / n, (both + only_b) / n
    (low_a, high_a), (low_b, high_b) = wilson_interval(both + only_a, n), wilson_interval(both + only_b, n)
    product = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    determinant = both * neither - only_a * only_b
    if determinant > 0:
        determinant = max(determinant - n / 2, 0)
    phi = determinant / math.sqrt(product) if product else 0.0

    def distance(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    difference = p_b - p_a
    return (
        max(difference - distance(p_b - low_b, high_a - p_a), -1.0),
        min(difference + distance(high_b - p_b, p_a - low_a), 1.0),
    )


def paired_comparison(a: Sequence[Scored], b: Sequence[Scored], metric: str) -> Row:
    """B against A on one metric, over the same rows: accuracies, difference B - A, its 95 % interval, McNemar's p.

    Raises ValueError unless both hold the same row keys.
    """
    right_a, right_b = ({row.key: row.correct[metric] for row in rows} for rows in (a, b))
    if right_a.keys() != right_b.keys():
        raise ValueError("the two sides do not hold the same rows")
    counts = Counter((right_a[key], right_b[key]) for key in right_a)
    both, only_a = counts[True, True], counts[True, False]
    only_b, neither = counts[False, True], counts[False, False]
    n = len(right_a)
    return {
        "n": n,
        "accuracy_a": (both + only_a) / n,
        "accuracy_b": (both + only_b) / n,
        "difference": (only_b - only_a) / n,
        "ci95": list(paired_difference_interval(both, only_a, only_b, neither)),
        "p": mcnemar_exact(only_a, only_b),
        "only_a": only_a,
        "only_b": only_b,
    }


def video_interval(rows: Sequence[Scored], metric: str) -> list[float] | None:
    """95 % percentile interval of the accuracy when whole videos are drawn again (seeded); None with one video.

    Rows of a video resemble each other, so this is the interval that speaks about other videos; Wilson's does not.
    """
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        counts[row.key[0]][0] += row.correct[metric]
        counts[row.key[0]][1] += 1
    if len(counts) < 2:
        return None
    videos, draw, accuracies = [counts[video] for video in sorted(counts)], random.Random(0), []
    for _ in range(VIDEO_RESAMPLES):
        sample = draw.choices(videos, k=len(videos))
        accuracies.append(sum(right for right, _ in sample) / sum(n for _, n in sample))
    cuts = statistics.quantiles(accuracies, n=40, method="inclusive")  # 39 cut points, 2.5 % apart
    return [cuts[0], cuts[-1]]


# ---------------------------------------------------------------------------------------------------------------------
# Reference lines: what a model without ears and eyes would score
# ---------------------------------------------------------------------------------------------------------------------


def majority_answers(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """(question type, normalised short answer) pairs -> the commonest answer of each type.

    Ties go to the answer that comes first in the alphabet.
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    for kind, gold in pairs:
        counts[kind][gold] += 1
    return {kind: min(golds, key=lambda gold: (-golds[gold], gold)) for kind, golds in counts.items()}


def reference_lines(rows: Sequence[Scored], train_majority: Mapping[str, str] | None) -> Row:
    """Accuracy of three guessers on `rows`; None for each with no rows.

    chance: guesses uniformly among the gold answers that its type has in `rows`.
    train_majority: answers the commonest answer of the type in the training file (a type that the training file
    lacks is answered wrong); None without that file.
    test_majority: knows the commonest answer in `rows` themselves, an oracle.
    """
    if not rows:
        return {"chance": None, "train_majority": None, "test_majority": None}
    golds: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        golds[row.question_type].add(row.gold)

    def share(majority: Mapping[str, str]) -> float:
        return sum(majority.get(row.question_type) == row.gold for row in rows) / len(rows)

    return {
        "chance": math.fsum(1 / len(golds[row.question_type]) for row in rows) / len(rows),
        "train_majority": None if train_majority is None else share(train_majority),
        "test_majority": share(majority_answers((row.question_type, row.gold) for row in rows)),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Warnings
# ---------------------------------------------------------------------------------------------------------------------


def group_by_type(rows: Iterable[Scored]) -> dict[str, list[Scored]]:
    """Rows per question type, types in alphabetical order."""
    groups: dict[str, list[Scored]] = defaultdict(list)
    for row in rows:
        groups[row.question_type].append(row)
    return dict(sorted(groups.items()))


def finish_counts(rows: Sequence[Scored]) -> Row:
    """How the answers ended. `loops` counts repetition loops, whichever way they ended."""
    counts = Counter(row.finish_reason for row in rows)
    looping = sum(loops(row.prediction) for row in rows if row.prediction is not None)
    reasons = ("eos", "length", "error", "missing", "unknown")
    return {reason: counts[reason] for reason in reasons} | {"loops": looping}


def collapse_warnings(rows: Sequence[Scored]) -> list[str]:
    """One line for each type (of at least COLLAPSE_MIN_ROWS rows and two gold answers) that the model answers alike:
    one answer for over 90 % of a balanced type, or fewer than half of its gold answers ever given.
    """
    lines = []
    for kind, group in group_by_type(rows).items():
        gold = Counter(row.gold for row in group)
        given = Counter(row.label for row in group if row.label is not None)
        if len(group) < COLLAPSE_MIN_ROWS or len(gold) < 2 or not given:
            continue
        top, count = given.most_common(1)[0]
        balanced = max(gold.values()) / len(group) <= BALANCE_SLACK / len(gold)
        if balanced and count / len(group) > COLLAPSE_SHARE:
            lines.append(f"mode collapse: {kind} is answered '{top[:40]}' in {count} of {len(group)} rows")
        elif 2 * len(gold.keys() & given.keys()) < len(gold):
            lines.append(
                f"mode collapse: {kind} has {len(gold)} gold answers, "
                f"of which {len(gold.keys() & given.keys())} are ever given"
            )
    return lines


def overlap_warnings(annotations: Sequence[Row], train_rows: Sequence[Row]) -> list[str]:
    """Lines for evaluated rows whose frames, or ids within their video, also stand in the training file."""

    def frames(row: Row) -> set[tuple[str, str]]:
        return {(row["video_id"], str(frame)) for frame in row.get("frames") or ()}

    train_frames = set().union(*map(frames, train_rows))
    train_ids = {(row["video_id"], row["id"]) for row in train_rows}
    n = len(annotations)
    shared = {
        "use a frame that training also used": sum(not frames(row).isdisjoint(train_frames) for row in annotations),
        "have a video and id that training also had": sum(
            (row["video_id"], row["id"]) in train_ids for row in annotations
        ),
    }
    return [f"not held out: {count} of {n} rows {what}" for what, count in shared.items() if count]


def answer_warnings(rows: Sequence[Scored]) -> list[str]:
    """Lines for answers cut at the length limit, repetition loops, failed or missing rows, and a single video."""
    n, finish, lines = len(rows), finish_counts(rows), []
    if finish["length"]:
        lines.append(f"{finish['length']} of {n} answers were cut at the length limit (--max_new_tokens)")
    if finish["loops"]:
        lines.append(f"{finish['loops']} of {n} answers are repetition loops")
    if finish["error"]:
        lines.append(f"{finish['error']} of {n} rows failed; they count as wrong")
    if finish["missing"]:
        lines.append(f"{finish['missing']} of {n} rows have no prediction; they count as wrong")
    if len({row.key[0] for row in rows}) == 1:
        lines.append("one video only: nothing here says how other videos would fare, so no interval over videos")
    return lines


def below_majority_warnings(choice: float, baselines: Row, discriminative: Row) -> list[str]:
    """Lines that say that `choice` is below the training majority, on all rows or on the discriminative ones."""
    cases = [("all rows", choice, baselines["train_majority"])]
    if discriminative["n"]:
        subset_choice = discriminative["metrics"]["choice"]["accuracy"]
        cases.append(("the discriminative rows", subset_choice, discriminative["baselines"]["train_majority"]))
    return [
        f"below the training majority on {name}: one constant answer per question type scores "
        f"{100 * line:.1f} %, this model {100 * model:.1f} %"
        for name, model, line in cases
        if line is not None and model < line
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Summary
# ---------------------------------------------------------------------------------------------------------------------


def accuracy(rows: Sequence[Scored], metric: str) -> Row:
    """{"accuracy", "ci95", "n", "correct"} of one metric; accuracy and interval are None with no rows."""
    n, right = len(rows), sum(row.correct[metric] for row in rows)
    if n == 0:
        return {"accuracy": None, "ci95": None, "n": 0, "correct": 0}
    return {"accuracy": right / n, "ci95": list(wilson_interval(right, n)), "n": n, "correct": right}


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


def summarise(
    annotations: Sequence[Row],
    rows: Sequence[Scored],
    *,
    train_rows: Sequence[Row] | None = None,
    arms: Row | None = None,
    manifest: Row | None = None,
) -> Row:
    """The content of X.summary.json. `rows` are the scored `annotations`; `arms` comes from `summarise_arms`."""
    train_majority = None
    if train_rows is not None:
        pairs = ((row["question_type"], normalise(row["short_answer"])) for row in train_rows)
        train_majority = majority_answers(pairs)
    groups = group_by_type(rows)
    varied = [kind for kind, group in groups.items() if len({row.gold for row in group}) > 1]
    subset = [row for row in rows if row.question_type in varied]
    finish = finish_counts(rows)
    metrics, baselines = accuracies(rows), reference_lines(rows, train_majority)
    discriminative = {
        "n": len(subset),
        "types": varied,
        "types_excluded": [kind for kind in groups if kind not in varied],
        "metrics": accuracies(subset),
        "baselines": reference_lines(subset, train_majority),
    }
    warnings = (
        below_majority_warnings(metrics["choice"]["accuracy"], baselines, discriminative)
        + collapse_warnings(rows)
        + answer_warnings(rows)
        + (overlap_warnings(annotations, train_rows) if train_rows is not None else [])
    )
    return {
        "schema_version": SCHEMA_VERSION,
        "n_total": len(rows),
        "n_scored": len(rows) - finish["error"] - finish["missing"],
        "n_errors": finish["error"],
        "n_missing": finish["missing"],
        "metrics": metrics,
        "by_type": {
            kind: {
                "n": len(group),
                **{metric: accuracy(group, metric) for metric in METRICS},
                **reference_lines(group, train_majority if train_majority and kind in train_majority else None),
            }
            for kind, group in groups.items()
        },
        "baselines": baselines,
        "discriminative": discriminative,
        "finish": finish,
        "warnings": warnings,
        "types_without_options": sorted({row.question_type for row in rows if not row.has_options}),
        "missing": [key_text(row.key) for row in rows if row.finish_reason == "missing"],
        "failed": [key_text(row.key) for row in rows if row.finish_reason == "error"],
        "arms": arms or {},
        "manifest": manifest or {},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Arms: the same rows with the speech or the frames taken away
# ---------------------------------------------------------------------------------------------------------------------

# Which arm answers which question, the plainest first. `text` gives the question without speech, so it tells neither.
HEARING_ARMS = {"mismatched_audio": "another question's speech", "silent_audio": "silence in place of speech"}
SEEING_ARMS = {
    "black_frames": "black frames",
    "shuffled_frames": "the frames in another order",
    "first_frame": "the first frame alone",
}


def pair_mismatched_audio(annotations: Sequence[Row], seed: int = 0) -> dict[Key, Key]:
    """For each row, the row of another question type whose speech it gets to hear instead of its own.

    The choice depends on the seed, the row and the set of rows, not on their order: a hash of seed and key picks among
    the rows of other types with another question, sorted by key. Raises InputError if a row has no such partner.
    """
    ordered = sorted(annotations, key=row_key)
    by_question: dict[tuple[str, str], list[Key]] = {}
    pairs = {}
    for row in annotations:
        kind, question = row["question_type"], normalise(row["question"])
        if (kind, question) not in by_question:
            by_question[kind, question] = [
                row_key(other)
                for other in ordered
                if other["question_type"] != kind and normalise(other["question"]) != question
            ]
        others = by_question[kind, question]
        if not others:
            raise InputError(
                f"--arms mismatched_audio: {key_text(row_key(row))} has no row of another question type to borrow "
                f"speech from; evaluate more question types or drop the arm"
            )
        digest = hashlib.sha256(f"{seed}/{key_text(row_key(row))}".encode()).digest()
        pairs[row_key(row)] = others[int.from_bytes(digest[:8], "big") % len(others)]
    return pairs


def leaked_words(prompt: str, question: str, constant_prompt: str) -> list[str]:
    """Words of the question that the rendered prompt holds more often than the prompt rendered without any question.

    Sorted; empty means that the question can reach the model by ear alone. Special tokens <|...|> are left out.
    """

    def words(text: str) -> Counter:
        return Counter(re.findall(r"\w+", re.sub(r"<\|[^|>]*\|>", " ", text).casefold()))

    surplus = words(prompt) - words(constant_prompt)
    return sorted(words(question).keys() & surplus.keys())


def summarise_arms(main: str, rows_of: Mapping[str, Sequence[Scored]], files: Mapping[str, str]) -> Row:
    """Per arm: file, metrics, finish, and `versus`, each metric's paired comparison with the main arm (arm - main).

    The main arm's `versus` is None. All arms hold the same rows.
    """
    return {
        arm: {
            "file": files[arm],
            "n_errors": finish_counts(rows)["error"],
            "metrics": accuracies(rows),
            "finish": finish_counts(rows),
            "versus": None if arm == main else {m: paired_comparison(rows_of[main], rows, m) for m in METRICS},
        }
        for arm, rows in rows_of.items()
    }


def _arm_sentence(arms: Row, candidates: Mapping[str, str], verb: str) -> str:
    arm = next((name for name in candidates if name in arms and arms[name]["versus"]), None)
    if arm is None:
        return f"Does it {verb}? Not tested: add one of {', '.join(candidates)} to --arms."
    pair = arms[arm]["versus"]["choice"]
    low, high = pair["ci95"]
    figures = (
        f"with {candidates[arm]}, choice goes from {100 * pair['accuracy_a']:.1f} % to "
        f"{100 * pair['accuracy_b']:.1f} % (difference {_points(pair['difference'])} points, "
        f"95 % {_points(low)} to {_points(high)}; p {_p_text(pair['p'])}; n {pair['n']})."
    )
    if pair["difference"] < 0 and pair["p"] < SIGNIFICANCE:
        return f"Does it {verb}? Yes: {figures}"
    if pair["difference"] < 0:
        return f"Does it {verb}? It may, but these rows are too few to tell: {figures}"
    return f"Does it {verb}? There is no sign of it: {figures}"


def arm_sentences(arms: Row) -> list[str]:
    """Does it hear? Does it see? One sentence each with the figures it rests on, from `summarise_arms`."""
    return [_arm_sentence(arms, HEARING_ARMS, "hear"), _arm_sentence(arms, SEEING_ARMS, "see")]


# ---------------------------------------------------------------------------------------------------------------------
# Tables for the terminal, at most WIDTH columns
# ---------------------------------------------------------------------------------------------------------------------


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _range(ci95: Sequence[float] | None) -> str:
    return "-" if ci95 is None else f"{100 * ci95[0]:.1f} to {100 * ci95[1]:.1f}"


def _rounded(ci95: Sequence[float]) -> str:
    return f"{100 * ci95[0]:.0f}-{100 * ci95[1]:.0f}"


def _points(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}"  # + 0.0: a difference of -0.04 points is +0.0, not -0.0


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their content, two spaces apart; the first to the left, figures to the right."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *lines)
    )


REFERENCES = ("chance", "train_majority", "test_majority")


def _metrics_table(metrics: Row) -> str:
    lines = [
        (
            name,
            str(part["correct"]),
            str(part["n"]),
            _percent(part["accuracy"]),
            _range(part["ci95"]),
            _percent(part["macro"]),
            _range(part["ci95_videos"]),
        )
        for name, part in metrics.items()
    ]
    return _table(("metric", "right", "n", "accuracy", "95 % interval", "macro", "over videos"), lines)


def _reference_table(summary: Row) -> str:
    lines = [
        (
            name,
            str(n),
            _percent(part["metrics"]["choice"]["accuracy"]),
            *(_percent(part["baselines"][line]) for line in REFERENCES),
        )
        for name, n, part in (
            ("all rows", summary["n_total"], summary),
            ("discriminative rows", summary["discriminative"]["n"], summary["discriminative"]),
        )
    ]
    return _table(("", "n", "choice", "chance", "train majority", "test majority"), lines)


def _types_table(by_type: Row) -> str:
    lines = [
        (
            kind[:25],
            str(part["n"]),
            _percent(part["choice"]["accuracy"]),
            _rounded(part["choice"]["ci95"]),
            _percent(part["contains"]["accuracy"]),
            *(_percent(part[line]) for line in REFERENCES),
        )
        for kind, part in by_type.items()
    ]
    return _table(("question type", "n", "choice", "95 %", "contains", "chance", "train", "test"), lines)


def render_summary(summary: Row) -> str:
    """The report that the terminal shows: metrics, reference lines, question types, endings, baseline, warnings."""
    n, finish, seeds = summary["n_total"], summary["finish"], summary["metrics"]["contains"]
    parts = [
        f"Accuracy in %, of all {n} rows ({summary['n_errors']} failed, {summary['n_missing']} missing: wrong)",
        _metrics_table(summary["metrics"]),
        "",
        "choice beside what needs neither ears nor eyes",
        _reference_table(summary),
    ]
    if summary["discriminative"]["types_excluded"]:
        excluded = ", ".join(summary["discriminative"]["types_excluded"])
        parts.append(_wrap(f"not discriminative (one gold answer): {excluded}"))
    unknown = f"; for {finish['unknown']} the file does not say" if finish["unknown"] else ""
    parts += [
        "",
        _types_table(summary["by_type"]),
        "",
        _wrap(
            f"By the seed's rule (contains): {seeds['correct']}/{n} correct = {_percent(seeds['accuracy'])} %, "
            f"95 % {_range(seeds['ci95'])}, beside the {100 * SEED_BASELINE:.0f} % baseline "
            f"(audio + image, zero-shot, the 50 clips of 002-001)."
        ),
        _wrap(f"{finish['eos']}/{n} stopped by themselves = {_percent(finish['eos'] / n)} %{unknown}."),
    ]
    if summary["types_without_options"]:
        names = ", ".join(summary["types_without_options"])
        parts.append(_wrap(f"No table of options covers every answer of {names}: choice is strict there."))
    for name in ("missing", "failed"):
        keys = summary[name]
        if keys:
            more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
            parts.append(_wrap(f"{name.capitalize()}: {', '.join(keys[:LISTED])}{more}"))
    if summary["arms"]:
        parts += ["", render_arms(summary["arms"])]
    if summary["warnings"]:
        parts += ["", *(_wrap(f"Warning: {line}") for line in summary["warnings"])]
    return "\n".join(parts)


def render_arms(arms: Row) -> str:
    """The arms side by side on `choice`, with paired difference to the main arm and McNemar's p, and two sentences."""
    lines = []
    for arm, part in arms.items():
        choice, pair = part["metrics"]["choice"], part["versus"] and part["versus"]["choice"]
        lines.append(
            (
                arm,
                f"{choice['correct']}/{choice['n']}",
                _percent(choice["accuracy"]),
                _rounded(choice["ci95"]),
                *(
                    (_points(pair["difference"]), " to ".join(map(_points, pair["ci95"])), _p_text(pair["p"]))
                    if pair
                    else ("", "", "")
                ),
            )
        )
    table = _table(("arm", "choice", "%", "95 %", "diff", "95 % interval", "p"), lines)
    return "\n".join([table, *map(_wrap, arm_sentences(arms))])


# ---------------------------------------------------------------------------------------------------------------------
# Output files
# ---------------------------------------------------------------------------------------------------------------------


def summary_path(rows_path: str | Path) -> Path:
    """X.summary.json beside X.jsonl. Raises InputError unless the name ends in .jsonl."""
    path = Path(rows_path)
    if path.suffix != ".jsonl":
        raise InputError(f"--output_file {rows_path}: the name must end in .jsonl")
    return path.with_suffix(".summary.json")


def arm_path(rows_path: str | Path, arm: str, main: str) -> Path:
    """X.jsonl for the main arm, X.{arm}.jsonl for another."""
    path = Path(rows_path)
    return path if arm == main else path.with_suffix(f".{arm}.jsonl")


def write_json(path: str | Path, content: Row) -> None:
    """Write a JSON file so that a reader, or a crash, finds the old one or the new one whole.

    Raises InputError where the disk does not take it.
    """
    path, text = Path(path), json.dumps(content, indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        advice = "make room and run the same command again; no row is lost"
        raise InputError(disk_trouble(path, len(text.encode()), error, advice)) from error
    finally:
        draft.unlink(missing_ok=True)


def disk_trouble(path: Path, needed: int, error: OSError, advice: str) -> str:
    """One line for a write of `needed` bytes to `path` that failed."""
    free = shutil.disk_usage(path.parent).free
    return f"{path}: {needed:,} bytes could not be written ({error.strerror}), {free:,} are free there; {advice}"


def repair_torn_line(path: str | Path) -> int:
    """Cut what a killed run left after the last newline of a rows file; return the number of bytes cut.

    A row is written with its newline in one go, so whatever lacks one is incomplete and its sample is done again.
    """
    with open(path, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        file.truncate(whole)
    return len(content) - whole


class RowFile:
    """A rows file that a killed run can be resumed from: opened for one writer, each row flushed as it comes.

    with RowFile(path, fingerprint, overwrite=False) as rows:
        rows.done      # key -> row: what an earlier run of the same fingerprint has written, and what is appended
        rows.repaired  # bytes of a torn last line that were cut
        rows.append(row)

    The fingerprint (flat, JSON values: model, data, prompt, decoding) is kept in the companion X.jsonl.run.json.
    Rows of another fingerprint, or without a companion, raise InputError; so does a second writer.
    """

    def __init__(self, path: str | Path, fingerprint: Row, *, overwrite: bool = False):
        self.path, self.companion = Path(path), Path(f"{path}.run.json")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab")  # noqa: SIM115  closed in close()
        try:
            self._lock()
            if overwrite:
                self._file.truncate(0)
            self._check(fingerprint)
            self.repaired = repair_torn_line(self.path)
            self.done = read_answer_rows(self.path)
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{self.path}: another run is writing it; wait for it or choose another name") from error

    def _check(self, fingerprint: Row) -> None:
        fingerprint = json.loads(json.dumps(fingerprint, allow_nan=False))  # compared as it will be read back
        if self.path.stat().st_size == 0:
            write_json(self.companion, fingerprint)
            return
        if not self.companion.exists():
            raise InputError(
                f"{self.path}: rows without {self.companion.name}, so nothing tells which run made them; "
                f"choose another --output_file, or start again with --overwrite"
            )
        try:
            stored = json.loads(self.companion.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{self.companion}: not JSON ({error}); start again with --overwrite") from error
        differing = [
            f"{name} ({stored.get(name)!r} then, {fingerprint.get(name)!r} now)"
            for name in sorted(stored.keys() | fingerprint.keys())
            if stored.get(name) != fingerprint.get(name)
        ]
        if differing:
            raise InputError(
                f"{self.path}: its rows come from another run; {'; '.join(differing)}. "
                f"Choose another --output_file, or start again with --overwrite"
            )

    def append(self, row: Row) -> None:
        """Add one row at the end of the file, whole or not at all; it survives this process being killed.

        Raises InputError where the disk does not take it, naming what was needed and what is free.
        """
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        size, handle = self.path.stat().st_size, self._file.fileno()
        try:
            written = os.write(handle, line)
            while written < len(line):  # a disk that has just become full says so when asked for the rest
                written += os.write(handle, line[written:])
        except OSError as error:
            self._file.truncate(size)
            advice = f"the {len(self.done)} rows before it are kept; make room, then the same command goes on"
            raise InputError(disk_trouble(self.path, len(line), error, advice)) from error
        self.done[row_key(row)] = row

    def close(self) -> None:
        """Release the file. Needed before another writer may open it."""
        self._file.close()

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


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


def base_manifest(args: argparse.Namespace) -> Row:
    """What can be said of any run without a model: flags, data and script hashes, Python, git state."""
    files = {name: getattr(args, name) for name in ("eval_data_path", "train_data_path")}
    return {
        "flags": vars(args),
        "sha256": {name: sha256_file(path) for name, path in files.items() if path}
        | {"evaluate_checkpoint.py": sha256_file(__file__)},
        "python": platform.python_version(),
        "git": git_state(Path(__file__).resolve().parent),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Without a model: --score_only and --compare
# ---------------------------------------------------------------------------------------------------------------------


def score_only(args: argparse.Namespace) -> int:
    """Score the predictions in --output_file against --eval_data_path, write the summary, print it.

    Returns the exit status: 1 if a prediction is null (a sample that failed), else 0.
    """
    annotations = read_annotations(args.eval_data_path)
    train_rows = read_annotations(args.train_data_path) if args.train_data_path else None
    target = summary_path(args.output_file)
    predictions = match_predictions(annotations, args.output_file)
    annotations = annotations[: args.limit or None]
    manifest = base_manifest(args)
    manifest["sha256"]["output_file"] = sha256_file(args.output_file)
    summary = summarise(annotations, score_rows(annotations, predictions), train_rows=train_rows, manifest=manifest)
    write_json(target, summary)
    print(render_summary(summary))
    print(f"\nSummary: {target}")
    return 1 if summary["n_errors"] else 0


def compare(path_a: str, path_b: str) -> int:
    """Print the paired differences B - A of two rows files over the same data. Returns the exit status, 0.

    Raises InputError, with examples, if the two do not hold the same rows with the same gold answers.
    """
    rows_a, rows_b = read_answer_rows(path_a), read_answer_rows(path_b)
    for here, there, rows, others in ((path_a, path_b, rows_a, rows_b), (path_b, path_a, rows_b, rows_a)):
        lacking = sorted(rows.keys() - others.keys())
        if lacking:
            raise InputError(
                f"--compare: {len(lacking)} rows of {here} are not in {there}, e.g. "
                f"{', '.join(map(key_text, lacking[:3]))}; compare runs over the same data"
            )
    if not rows_a:
        raise InputError(f"--compare: {path_a} and {path_b} hold no rows")
    for key, row in rows_a.items():
        for name in ("short_answer", "ground_truth"):
            if row[name] != rows_b[key][name]:
                raise InputError(
                    f"--compare: {key_text(key)} has the {name} {row[name]!r} in {path_a} but "
                    f"{rows_b[key][name]!r} in {path_b}; compare runs over the same data"
                )

    gold = [{**row, "answer": row["ground_truth"]} for row in rows_a.values()]
    scored_a, scored_b = score_rows(gold, rows_a), score_rows(gold, rows_b)
    lines = []
    for metric in METRICS:
        pair = paired_comparison(scored_a, scored_b, metric)
        lines.append(
            (
                metric,
                _percent(pair["accuracy_a"]),
                _percent(pair["accuracy_b"]),
                _points(pair["difference"]),
                " to ".join(map(_points, pair["ci95"])),
                str(pair["only_a"]),
                str(pair["only_b"]),
                _p_text(pair["p"]),
            )
        )
    print(f"A  {path_a}\nB  {path_b}\nAccuracy in % over the same {len(gold)} rows; difference is B - A\n")
    print(_table(("metric", "A", "B", "B - A", "95 % interval", "only A", "only B", "p"), lines))
    print("\nonly A, only B: rows that just one has right. p: exact McNemar test, two-sided.")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# With a model: what answers
# ---------------------------------------------------------------------------------------------------------------------


def load_libraries() -> None:
    """Import what answering needs, torch and train_vqa. Scoring and comparing start at once without them."""
    global torch, vqa
    import torch

    import train_vqa as vqa


@dataclass(frozen=True)
class Checkpoint:
    """What --checkpoint_path or --model_name_or_path names, and how it is to answer."""

    path: Path | str  # for `load_trained`: folder of an adapter or of a model, or a hub id
    adapter: bool
    stored: Row  # what training saved in the folder, {} for a base model
    model: Any  # train_vqa's ModelSettings and InputSettings, the flags applied
    inputs: Any
    changes: Row  # fields of these two that the flags set
    dtype: str  # to answer in
    merged: bool  # the adapter is folded into the weights


def read_checkpoint(args: argparse.Namespace, device: Any) -> Checkpoint:
    """Find out what is to answer, before any weights load.

    Raises InputError for a folder without adapter or model and for flags that contradict it; VQAError for unreadable
    settings, or an attention kernel that is not supported.
    """
    path = args.checkpoint_path or args.model_name_or_path or vqa.DEFAULT_MODEL
    adapter = (Path(path) / "adapter_config.json").is_file()
    if args.checkpoint_path and not adapter:
        if not (Path(path) / "config.json").is_file():
            inside = ", ".join(sorted(folder.name for folder in Path(path).glob("checkpoint-*")))
            raise InputError(
                f"--checkpoint_path {path}: no adapter (adapter_config.json) and no model (config.json) there; "
                f"{f'it holds {inside}: name one of them' if inside else 'name a folder that training wrote'}"
            )
        if args.model_name_or_path:
            raise InputError(f"--checkpoint_path {path} is a complete model; leave --model_name_or_path out")
    stored = vqa.load_settings(path) if adapter else {}
    if args.init not in (None, stored.get("model", {}).get("init", "pretrained")) and args.checkpoint_path:
        raise InputError(f"--init {args.init}: {path} was not trained so; leave the flag out")
    if args.no_merge and not adapter:
        raise InputError("--no_merge: there is no adapter to keep apart; leave it out")
    changes = {
        "model_name_or_path": args.model_name_or_path if adapter else None,
        "attn_implementation": args.attn_implementation,
        "input_mode": args.input_mode,
        "max_image_size": args.max_image_size,
        **({} if adapter else {"init": args.init, "init_seed": args.seed}),
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if args.max_eval_frames is not None:
        changes["max_eval_frames"] = args.max_eval_frames or None
    stored, model, inputs = vqa.trained_settings(path, device.type, changes)
    dtype = model.dtype if args.dtype == "auto" else args.dtype
    vqa.check_attention(model.attn_implementation, getattr(torch, dtype))
    if adapter and model.load_in_4bit and not args.no_merge:
        print(f"   {path}: the base is kept in 4 bits, which cannot take the adapter in; it stays unmerged")
    merged = adapter and not model.load_in_4bit and not args.no_merge
    return Checkpoint(path, adapter, stored, model, inputs, changes, dtype, merged)


def load_checkpoint(checkpoint: Checkpoint, device: Any) -> Any:
    """train_vqa's Trained: the model with its adapter in place, its processor, the fingerprint of its base."""
    kernel = vqa.ATTENTION_KERNELS[checkpoint.model.attn_implementation]
    precision = {"bfloat16": "BF16", "float32": "FP32"}[checkpoint.dtype]
    print(f"⏳ Loading merged {precision} model with {kernel} attention...", flush=True)
    trained = vqa.load_trained(
        checkpoint.path,
        device=device,
        dtype=getattr(torch, checkpoint.dtype),
        merge=checkpoint.merged,
        **checkpoint.changes,
    )
    print(f"✓ Model loaded in full {precision}", flush=True)
    return trained


# ---------------------------------------------------------------------------------------------------------------------
# With a model: inputs of an arm
# ---------------------------------------------------------------------------------------------------------------------


def black_frames(frames: list[Any], speech: Any, draw: str) -> tuple[list[Any], Any]:
    """Black frames of the same size, so that the prompt stays the same token for token."""
    return [frame.point(lambda _: 0) for frame in frames], speech


def silent_audio(frames: list[Any], speech: Any, draw: str) -> tuple[list[Any], Any]:
    """Silence of the same length, so that the prompt stays the same token for token."""
    return frames, speech * 0


def first_frame(frames: list[Any], speech: Any, draw: str) -> tuple[list[Any], Any]:
    """The first frame once: the prompt is shorter by the tokens of the others."""
    return frames[:1], speech


def shuffled_frames(frames: list[Any], speech: Any, draw: str) -> tuple[list[Any], Any]:
    """The frames in another order than that in time, drawn from `draw`."""
    order, generator = list(range(len(frames))), random.Random(draw)
    while order == sorted(order) and len(order) > 1:
        generator.shuffle(order)
    return [frames[place] for place in order], speech


# An arm is a function of frames (PIL images) and speech (float32 [n] or None) that gives them back changed. The last
# two take the frames' paths as well, so that kept features serve them. Arms that are not listed change nothing here:
# the input modes, and `mismatched_audio`, whose rows name another row's speech.
CONTENT_ARMS = {"black_frames": black_frames, "silent_audio": silent_audio}
ORDER_ARMS = {"first_frame": first_frame, "shuffled_frames": shuffled_frames}


class ArmInputs:
    """The rows of one arm as model inputs.

    Args:
        arm: one of ARMS.
        dataset: SurgicalVQADataset for generation; its processor has the arm's input mode, and its rows the speech
            that the arm plays.
        seed: of shuffled frames.
        lenders: for rows that play another row's speech, that row.
    """

    def __init__(self, arm: str, dataset: Any, seed: int = 0, lenders: Mapping[Key, Key] | None = None):
        self.arm, self.dataset, self.seed, self.lenders = arm, dataset, seed, lenders or {}
        self.rows, self.processor = dataset.rows, dataset.processor
        self.keys = [row_key(annotation_of(row)) for row in self.rows]
        self.features: Any = None  # train_vqa's FeatureStore, once it is filled
        self.batch_size: int | None = None  # rows answered at a time; `answer_arm` sets it

    def change(self, change: Any, index: int, frames: list[Any], speech: Any) -> tuple[list[Any], Any]:
        """Frames and speech of a row after `change`, a function of the tables above, or None."""
        return change(frames, speech, f"{self.seed}/{self.rows[index].key}") if change else (frames, speech)

    def clip(self, index: int) -> tuple[Path, ...]:
        """The files of the frames that a row shows, in the arm's order."""
        frames, _ = self.dataset.media_of(index)
        return tuple(self.change(ORDER_ARMS.get(self.arm), index, list(frames), None)[0])

    def media_of(self, index: int) -> tuple[tuple[Path, ...] | None, Path | None]:
        """The clip and the speech that the encoders get as they are in the files; None for what the arm changes."""
        complete = len(self.rows[index].frame_paths) == len(self.rows[index].frames)
        clip = self.clip(index) if complete and self.arm != "black_frames" else None
        return clip, None if self.arm == "silent_audio" else self.dataset.media_of(index)[1]

    def read(self, index: int, with_frames: bool = True, with_speech: bool = True) -> tuple[list[Any], Any]:
        """(frames as PIL images in the arm's order, speech float32 [n] or None); VQAError where they cannot be used."""
        row, speech = self.rows[index], self.dataset.media_of(index)[1]
        if len(row.frame_paths) < len(row.frames):
            raise vqa.VQAError(f"{row.where}: a frame is missing")
        if speech is None and self.processor.input_mode != "text":
            raise vqa.VQAError(f"{row.where}: the speech is missing")
        clip = self.clip(index) if with_frames else ()
        frames = [vqa.load_frame(path, self.processor.max_image_size) for path in clip]
        return frames, vqa.load_speech(speech) if speech and with_speech else None

    def sample(self, index: int) -> Row | str:
        """Model inputs of a row without a batch dimension, or what is wrong with its media; threads may call it."""
        vision, speech_features = ((self.features and self.features.read(medium)) for medium in self.media_of(index))
        try:
            media = self.read(index, with_frames=not vision, with_speech=not speech_features)
            media = self.change(CONTENT_ARMS.get(self.arm), index, *media)
            return self.encode(index, *media, vision, speech_features and speech_features[0])
        except vqa.VQAError as error:
            return str(error)

    def encode(self, index: int, frames: list[Any], speech: Any, *features: Any) -> Row:
        """Model inputs of a row with these frames and this speech, or with kept features of either."""
        return self.processor.encode(self.rows[index], frames, speech, False, *features)

    def length(self, index: int) -> float:
        """Tokens of a row's prompt, from the headers of its media; infinite where these cannot be read."""
        asked = dataclasses.replace(self.rows[index], answer="")
        try:
            return self.processor.count_tokens(asked, self.clip(index)) - 1  # the answer's stop token
        except (OSError, RuntimeError, IndexError, TypeError, vqa.VQAError):
            return math.inf

    def media_sha256(self, index: int) -> str:
        """Digest of the files behind a row's answer: a resumed run must not mix old files with new ones."""
        frames, speech = self.dataset.media_of(index)
        digests = (sha256_once(path) for path in (*frames, speech) if path)
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def prompt(self, question: str, n_frames: int = 1) -> str:
        """The rendered prompt as it can be read: one placeholder a frame, none for speech."""
        ids = self.processor.build(question, [1] * n_frames, 0, None)["input_ids"].tolist()
        return self.processor.tokenizer.decode(ids)


@functools.cache
def sha256_once(path: Path) -> str:
    """`sha256_file`, read once a run: many questions share their clips."""
    return sha256_file(path)


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
            raise InputError(
                f"leak gate: in the arm {inputs.arm} the prompt of {row.key} holds words of its question "
                f"({', '.join(words)}), so its answer would not show that it was heard; no figure is given"
            )


def check_liveness(model: Any, inputs: ArmInputs) -> Row:
    """Do speech and frames reach the logits? {"speech", "frames"}: how far other ones move a logit at most.

    Speech is replaced by another row's at the same length (where there is none, by its own played backwards), frames by
    their negatives: so the prompt stays as it is. `speech` is None in text mode. Raises InputError if one of them
    changes nothing, or if the same inputs give different logits.
    """
    import numpy as np

    collate = vqa.VQACollator(inputs.processor.tokenizer.pad_token_id, "left")

    def logits(frames: list[Any], speech: Any) -> Any:
        batch = collate([inputs.encode(index, frames, speech)])
        with torch.inference_mode():
            return model(**on_device(batch, model.device), logits_to_keep=1).logits.float()

    def readable() -> Iterator[tuple[int, tuple[list[Any], Any]]]:
        for index in range(len(inputs.rows)):
            with contextlib.suppress(vqa.VQAError):
                yield index, inputs.read(index)

    index, (frames, speech) = next(readable(), (None, (None, None)))
    if index is None:
        raise InputError("no row has frames and speech that can be read, so nothing can be measured")
    plain = logits(frames, speech)
    if not torch.equal(plain, logits(frames, speech)):
        raise InputError("liveness gate: the same speech and frames give different logits; no answer would repeat")

    def distance(*changed: Any) -> float:
        return float((plain - logits(*changed)).abs().max())

    moved = {"speech": None, "frames": distance([frame.point(lambda value: 255 - value) for frame in frames], speech)}
    if speech is not None:
        question = inputs.rows[index].question
        borrowed = (media[1] for other, media in readable() if inputs.rows[other].question != question)
        moved["speech"] = distance(frames, np.resize(next(borrowed, speech[::-1]), speech.shape))
    dead = " and ".join(path for path, by in moved.items() if by == 0)
    if dead:
        raise InputError(
            f"liveness gate: with other {dead} every logit stays as it is, so {dead} cannot reach an answer; check the "
            f"checkpoint, and that the files differ"
        )
    return moved


# ---------------------------------------------------------------------------------------------------------------------
# With a model: answers
# ---------------------------------------------------------------------------------------------------------------------


def answer_batch(
    model: Any, samples: Iterable[Row], pad_token_id: int, stop_ids: Sequence[int], max_new_tokens: int
) -> list[tuple[list[int], str]]:
    """Greedy answers of any number of samples: per row the new ids, stop token included, and `eos` or `length`.

    Prefill goes by groups (`prefill`), then all rows decode together, one token a step. Written out because `generate`
    prefills all rows at once, under a mask that keeps sdpa from its fast kernels.
    """
    from transformers import DynamicCache

    with torch.inference_mode():
        lengths, ids, positions, layers = prefill(model, samples, pad_token_id)
        if not lengths:
            return []
        cache = DynamicCache()
        for index in range(len(layers)):
            cache.update(*layers[index], index)
            layers[index] = None  # freed, so that one layer at a time is there twice
        width, mask = max(lengths), None
        if min(lengths) < width:
            starts = width - torch.tensor(lengths, device=ids.device)
            mask = (torch.arange(width, device=ids.device) >= starts[:, None]).long()
        stops = torch.tensor(list(stop_ids), dtype=ids.dtype, device=ids.device)
        ended, produced = torch.isin(ids, stops), [ids]
        while len(produced) < max_new_tokens and not ended.all():
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            output = model(
                input_ids=ids[:, None],
                attention_mask=mask,
                position_ids=positions.expand(3, -1)[..., None],
                past_key_values=cache,
                use_cache=True,
            )
            ids, positions = output.logits[:, -1].argmax(-1), positions + 1
            ended |= torch.isin(ids, stops)
            produced.append(ids)
    answers = []
    for ids in torch.stack(produced, dim=1).tolist():
        end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
        answers.append((ids, "length") if end is None else (ids[: end + 1], "eos"))
    return answers


def prefill(model: Any, samples: Iterable[Row], pad_token_id: int) -> tuple[list[int], Any, Any, list[tuple[Any, Any]]]:
    """Compute the keys and values of prompts, in groups of at most PREFILL_TOKENS with their padding.

    Padding is on the right, where causal attention never meets it, so that no mask is needed. The keys and values of
    each row are then moved to end where those of the longest row end.

    Returns:
        Tokens of each prompt; the first token of each answer, int64 [B], and its position, int64 [B]; per decoder layer
        keys and values [B, heads, longest prompt, head size], 0 in front of shorter prompts.
    """
    from torch.nn.functional import pad
    from transformers import DynamicCache

    collate = vqa.VQACollator(pad_token_id)
    lengths, first, positions, caches = [], [], [], []
    for group in grouped(samples):
        batch = collate(group)
        last = torch.tensor([[len(sample["input_ids"]) - 1] for sample in group])
        grids = {name: batch[name] for name in ("image_grid_thw", "video_grid_thw") if name in batch}
        # On the CPU, where reading the ids does not wait for the group before.
        places, _ = model.model.get_rope_index(
            batch["input_ids"], mm_token_type_ids=batch["mm_token_type_ids"], **grids
        )
        inputs = on_device({**batch, "position_ids": places, "logits_to_keep": last}, model.device)
        output = model(**inputs, past_key_values=DynamicCache(), use_cache=True)
        lengths += (last[:, 0] + 1).tolist()
        first.append(output.logits[:, 0].argmax(-1))
        positions.append(places[0].gather(1, last)[:, 0] + 1)  # a prompt ends in words: its three positions are one
        caches.append([(layer.keys, layer.values) for layer in output.past_key_values.layers])
        del output
    if not lengths:
        return [], None, None, []

    def aligned(layer: int, side: int) -> Any:
        parts, width = [cache[layer][side] for cache in caches], max(lengths)
        if min(lengths) == width:
            return torch.cat(parts)
        rows = zip(lengths, (row for part in parts for row in part), strict=True)
        return torch.stack([pad(row[:, :length], (0, 0, width - length, 0)) for length, row in rows])

    layers = []
    for layer in range(len(caches[0])):
        layers.append((aligned(layer, 0), aligned(layer, 1)))
        for cache in caches:
            cache[layer] = None  # freed, so that one layer at a time is there twice
    return lengths, torch.cat(first), torch.cat(positions).to(model.device), layers


def grouped(samples: Iterable[Row]) -> Iterator[list[Row]]:
    """Samples in lists, in order, each of at most PREFILL_TOKENS when padded to its longest, or of one sample."""
    group: list[Row] = []
    for sample in samples:
        longest = max(len(other["input_ids"]) for other in (*group, sample))
        if group and longest * (len(group) + 1) > PREFILL_TOKENS:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def on_device(batch: Row, device: Any) -> Row:
    """The tensors of a collated batch that the model takes, on `device`."""
    tensors = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if device.type == "cuda":  # from pinned memory the copy runs beside the computation
        return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def answer_in_memory(
    samples: Iterator[Row], size: int, may_halve: bool, answer: Callable[[Iterable[Row]], list[Any]]
) -> tuple[list[Any], int]:
    """Answers of `samples`, `size` at a time; with `may_halve` in halves where torch is out of memory.

    Returns the answers, and the size that fitted. Raises torch.OutOfMemoryError where halving is over or not wanted.
    """
    (waiting,), answers = itertools.tee(samples, 1), []
    while True:
        try:
            batch = answer(itertools.islice(copy.copy(waiting), size))  # a copy: what fails is gone through again
        except torch.OutOfMemoryError:
            if not may_halve or size == 1:
                raise
            batch = None
        if batch is None:  # out of the handler, which holds on to the tensors of the failed batch
            size = math.ceil(size / 2)
            torch.cuda.empty_cache()
            print(f"   The GPU memory is full: going on with batches of {size}", flush=True)
        elif batch:
            answers += batch
            next(itertools.islice(waiting, len(batch) - 1, None))
        else:
            return answers, size


def choose_batch_size(model: Any, longest: int, max_new_tokens: int, limit_gib: float) -> int:
    """Rows that fit into the GPU memory at a time, 1 to AUTO_BATCH_SIZE; CPU_BATCH_SIZE without a CUDA GPU.

    An estimate from shapes alone, so that the same card, flags and data give the same batches.

    Args:
        longest: tokens of the longest prompt.
        limit_gib: hard cap in GiB. 0: all that the card has.
    """
    if model.device.type != "cuda":
        return CPU_BATCH_SIZE
    total = limit_gib * 2**30 or torch.cuda.get_device_properties(model.device).total_memory
    weights = sum(weight.nbytes for weight in model.parameters())
    text, item = model.config.text_config, model.dtype.itemsize
    head = text.hidden_size // text.num_attention_heads
    # In prefill: four activations of the MLP's width (gate, its SiLU, up, their product), and about sixteen of the
    # hidden size, of which some are float32.
    prefilling = max(PREFILL_TOKENS, longest) * item * (4 * text.intermediate_size + 16 * text.hidden_size)
    # A token keeps a key and a value a layer; one layer is copied to grow, and, under a mask, repeated for every head.
    kept = 2 * head * text.num_key_value_heads * (text.num_hidden_layers + 2)
    row = (longest + max_new_tokens) * item * (kept + 2 * head * text.num_attention_heads)
    return int(min(AUTO_BATCH_SIZE, max(1, (USABLE_MEMORY * total - weights - prefilling) // row)))


def answer_arm(model: Any, inputs: ArmInputs, file: RowFile, args: argparse.Namespace, stop: Any = None) -> int:
    """Answer the rows that `file` lacks, batch by batch, and append them; returns how many.

    Ends after the batch during which a signal came to `stop` (train_vqa's StopSignal; None: there is none).

    Batches are fixed slices of the data, the longest prompts first, answered complete even where a killed run left only
    part of one to do: so a resumed run computes exactly what an uninterrupted one does.
    """
    from tqdm.auto import tqdm

    keys = inputs.keys
    lengths = [inputs.length(index) for index in range(len(keys))]
    order = sorted(range(len(keys)), key=lambda index: -lengths[index])  # of equal ones, in the order of the data
    size, auto = args.batch_size, args.batch_size == "auto"
    if auto:
        known = [length for length in lengths if length < math.inf]
        size = choose_batch_size(model, max(known, default=1), args.max_new_tokens, args.gpu_memory_limit_gib)
    slices = [order[i : i + size] for i in range(0, len(order), size)]
    slices = [part for part in slices if any(keys[index] not in file.done for index in part)]
    tokenizer = copy.deepcopy(inputs.processor.tokenizer)  # the other one is busy in the threads below
    decoding = tokenizer.pad_token_id, vqa.turn_end_ids(tokenizer), args.max_new_tokens
    decoded = vqa.ahead(inputs.sample, itertools.chain(*slices), 2 * size)
    answered, already = 0, sum(key in file.done for key in keys)
    with contextlib.closing(decoded), tqdm(total=len(keys), initial=already, desc=inputs.arm, unit="row") as bar:
        for part in slices:
            # Two iterators over one slice: prefill begins while the rest of it is still being decoded.
            samples, again = itertools.tee(itertools.islice(decoded, len(part)))
            usable = (sample for sample in samples if not isinstance(sample, str))
            answers, size = answer_in_memory(usable, size, auto, lambda batch: answer_batch(model, batch, *decoding))
            waiting = iter(answers)
            for index, sample in zip(part, again, strict=True):
                error = sample if isinstance(sample, str) else None
                ids, finish = ([], "error") if error else next(waiting)
                if keys[index] in file.done:
                    continue
                text = None if error else tokenizer.decode(ids, skip_special_tokens=True).strip()
                file.append(written_row(inputs, index, text, finish, len(ids), error))
                answered += 1
                bar.update()
            inputs.batch_size = size
            if stop and stop.signum:
                break
    return answered


def written_row(
    inputs: ArmInputs, index: int, text: str | None, finish_reason: str, n_tokens: int, error: str | None
) -> Row:
    """One row of the output file of an arm."""
    speech, lender = inputs.dataset.media_of(index)[1], inputs.lenders.get(inputs.keys[index])
    return answer_row(
        annotation_of(inputs.rows[index]),
        text,
        finish_reason=finish_reason,
        n_tokens=n_tokens,
        input_mode=inputs.processor.input_mode,
        audio_file=None if speech is None else str(speech),
        **({"audio_of": key_text(lender)} if lender else {}),
        media_sha256=inputs.media_sha256(index),
        **({"error": error} if error else {}),
    )


# ---------------------------------------------------------------------------------------------------------------------
# With a model: the complete run
# ---------------------------------------------------------------------------------------------------------------------


def annotation_of(row: Any) -> Row:
    """A VQARow of train_vqa, whose reader reads question files wherever a model runs, as scoring takes it."""
    return {name: getattr(row, name) for name in (*KEY_FIELDS, *GOLD_FIELDS, "frames")}


def generate(args: argparse.Namespace) -> int:
    """Answer every row of --eval_data_path in every arm, summarise, print. Returns the exit status.

    A signal ends it after the batch under way, with one line that says how many rows there are, and 128 + its number.

    Raises InputError for whatever the user can mend.
    """
    load_libraries()
    stop = vqa.StopSignal("finishing the batch", "no row was answered; run the same command again")
    try:
        with stop:
            return answer_and_score(args, stop)
    except vqa.Interrupted as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        return 128 + stopped.signum
    except vqa.VQAError as error:
        raise InputError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"--batch_size {args.batch_size} does not fit into the GPU memory; run the same command with a smaller one "
            f"(at 1 or auto: a smaller --max_image_size or --max_eval_frames); the rows answered so far are kept"
        ) from error


def answer_and_score(args: argparse.Namespace, stop: Any) -> int:
    """The steps of `generate`: settings, data, model, gates, answers, figures."""
    # 1. What answers, in which arms
    sha256_once.cache_clear()
    target = summary_path(args.output_file)
    vqa.limit_gpu_memory(args.gpu_memory_limit_gib or None)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    checkpoint = read_checkpoint(args, device)
    main_arm = checkpoint.inputs.input_mode
    modes = choose_arms(args, main_arm)

    # 2. Data: everything is found and decoded once before the weights load
    rows_of, lenders, train_rows = read_data(args, modes, checkpoint.inputs.max_eval_frames)
    annotations = [annotation_of(row) for row in rows_of[main_arm]]

    # 3. Model
    trained = load_checkpoint(checkpoint, device)
    arms = {}
    for arm, mode in modes.items():
        processor = trained.processor.with_mode(mode)
        limit = checkpoint.inputs.max_eval_frames
        dataset = vqa.SurgicalVQADataset(
            rows_of[arm], processor, max_eval_frames=limit, is_eval=True, with_answer=False
        )
        arms[arm] = ArmInputs(arm, dataset, args.seed, lenders if arm == "mismatched_audio" else {})

    # 4. Gates
    check_leaks(arms.values())
    moved = check_liveness(
        trained.model, next((part for arm, part in arms.items() if modes[arm] != "text"), arms[main_arm])
    )
    figures = ", ".join(f"other {path} by {by:.3g}" for path, by in moved.items() if by is not None)
    leaks = "no prompt gives its question away; " if "audio" in modes.values() else ""
    print(_wrap(f"Gates passed: {leaks}logits move with {figures}"))

    # 5. Answers
    fingerprints = {
        arm: run_fingerprint(args, checkpoint, inputs, trained.base_fingerprint) for arm, inputs in arms.items()
    }
    start = time.monotonic()
    done, answered = answer_arms(args, trained, arms, fingerprints, stop)
    seconds = time.monotonic() - start
    scored = {arm: score_rows(annotations, done[arm]) for arm in arms}
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None

    # 6. Figures
    manifest = run_manifest(args, checkpoint, arms[main_arm], fingerprints[main_arm], device)
    manifest["gates"] = moved
    manifest["runtime"] = {"seconds": seconds, "rows_answered": answered, "peak_gpu_memory_gib": peak}
    manifest["runtime"]["batch_size"] = {arm: inputs.batch_size for arm, inputs in arms.items()}
    files = {arm: arm_path(args.output_file, arm, main_arm) for arm in arms}
    in_arms = summarise_arms(main_arm, scored, {arm: path.name for arm, path in files.items()})
    summary = summarise(annotations, scored[main_arm], train_rows=train_rows, arms=in_arms, manifest=manifest)
    write_json(target, summary)
    print(render_summary(summary))
    memory = "" if peak is None else f", peak GPU memory {peak:.1f} GiB"
    print(f"\nAnswered {answered} rows in {seconds:.1f} s ({answered / seconds:.2f} samples/s{memory})")
    print(*(f"Rows: {path}" for path in files.values()), f"Summary: {target}", sep="\n")
    if stop.signum:
        raise vqa.Interrupted(stop.signum, f"all rows are answered, and {target} is complete")
    return 1 if any(row.prediction is None for part in scored.values() for row in part) else 0


def choose_arms(args: argparse.Namespace, main_arm: str) -> dict[str, str]:
    """Each arm's input mode, the main arm first. Raises InputError for arms that need speech which is not there."""
    modes = {arm: arm if arm in INPUT_MODES else main_arm for arm in (main_arm, *(args.arms or ()))}
    without_speech = [arm for arm, mode in modes.items() if arm in HEARING_ARMS and mode == "text"]
    if without_speech:
        raise InputError(f"--arms {','.join(without_speech)}: in text mode the model hears nothing; drop the arm")
    if set(modes.values()) != {"text"} and not args.audio_dir:
        raise InputError("--audio_dir must be given: the questions are spoken (or use --input_mode text)")
    return modes


def read_data(
    args: argparse.Namespace, modes: Mapping[str, str], max_eval_frames: int | None
) -> tuple[dict[str, list[Any]], dict[Key, Key], list[Row] | None]:
    """Read the question files, and find and decode the media of every arm.

    Returns:
        Each arm's VQARows; for `mismatched_audio` whose speech a row plays; the training annotations, if any.

    Raises VQAError for what is missing or broken, which --allow_errors only says, and always where one speech file
    would have to serve different questions.
    """
    print(f"📁 Loading Eval Data: {args.eval_data_path}")
    every = {row_key(annotation_of(row)): row for row in vqa.read_rows(args.eval_data_path)}
    rows = dict(itertools.islice(every.items(), args.limit or None))
    train_rows = None
    if args.train_data_path:
        train_rows = [annotation_of(row) for row in vqa.read_rows(args.train_data_path)]
    lenders = {}
    if "mismatched_audio" in modes:  # paired over the whole file: a larger --limit later leaves the pairs as they are
        pairs = pair_mismatched_audio([annotation_of(row) for row in every.values()], args.seed)
        lenders = {key: pairs[key] for key in rows}
    needed = [every[key] for key in dict.fromkeys((*rows, *lenders.values()))]
    by_ear = set(modes.values()) != {"text"}
    problems = vqa.find_media(needed, args.frames_dir, args.audio_dir if by_ear else None, args.allow_symlinks)
    vqa.raise_problems(vqa.find_shared_speech(needed))
    problems += vqa.check_media(needed)
    if not args.allow_errors:
        vqa.raise_problems(problems)
    for problem in problems:
        print(f"{problem} (--allow_errors: counted as wrong)", file=sys.stderr)
    rows_of = {arm: list(rows.values()) for arm in modes}
    if lenders:
        rows_of["mismatched_audio"] = [
            dataclasses.replace(row, audio_path=every[lenders[key]].audio_path) for key, row in rows.items()
        ]
    if max_eval_frames and any(len(row.frames) > max_eval_frames for row in rows.values()):
        print(f"   Using {max_eval_frames} frames (evenly sampled) to reduce eval memory")
    return rows_of, lenders, train_rows


def answer_arms(
    args: argparse.Namespace, trained: Any, arms: Mapping[str, ArmInputs], fingerprints: Mapping[str, Row], stop: Any
) -> tuple[dict[str, dict[Key, Row]], int]:
    """Each arm's rows as they stand in its file, and how many of them were answered now.

    Raises InputError for files of another run or media that changed, and Interrupted where a signal left rows undone.
    """
    main_arm, *_ = arms
    target, answered = summary_path(args.output_file), 0
    with contextlib.ExitStack() as stack:  # all of them first, so that none is refused after hours of answering another
        files = {}
        for arm, inputs in arms.items():
            path = arm_path(args.output_file, arm, main_arm)
            files[arm] = stack.enter_context(RowFile(path, fingerprints[arm], overwrite=args.overwrite))
            check_same_media(inputs, files[arm])
        target.unlink(missing_ok=True)  # the figures of fewer rows, or of other ones
        if args.cache_features:  # after the gates, whose changed frames and speech are encoded as they come
            store = vqa.FeatureStore(args.cache_features, trained.model, trained.processor)
            store.fill(list(arms.values()), args.allow_errors)
            for inputs in arms.values():
                inputs.features = store
        stop.saves = True
        for arm, inputs in arms.items():
            answered += answer_arm(trained.model, inputs, files[arm], args, stop)
            if stop.signum:
                there = sum(key in file.done for file in files.values() for key in inputs.keys)
                if there < len(inputs.keys) * len(arms):
                    again = "the same command" + " without --overwrite" * args.overwrite
                    text = f"{there} of {len(inputs.keys) * len(arms)} rows are answered; {again} goes on"
                    raise vqa.Interrupted(stop.signum, text)
    return {arm: file.done for arm, file in files.items()}, answered


def check_same_media(inputs: ArmInputs, file: RowFile) -> None:
    """Raise InputError where a row of `file` was made from other frames or speech than are there now."""
    for index, key in enumerate(inputs.keys):
        if key in file.done and file.done[key].get("media_sha256") != inputs.media_sha256(index):
            raise InputError(
                f"{file.path}: the frames or speech of {key_text(key)} are not the ones that its row was made from; "
                f"choose another --output_file, or start again with --overwrite"
            )


def run_fingerprint(args: argparse.Namespace, checkpoint: Checkpoint, inputs: ArmInputs, base_fingerprint: str) -> Row:
    """What the answers of an arm depend on, as flat JSON: rows made with other values are never mixed with them."""
    folder, processor = Path(checkpoint.path), inputs.processor

    def digest(name: str, wanted: bool = True) -> str | None:
        return sha256_once(folder / name) if wanted and (folder / name).is_file() else None

    return {
        "arm": inputs.arm,
        "input_mode": processor.input_mode,
        "base_fingerprint": base_fingerprint,
        "adapter_sha256": digest("adapter_model.safetensors", checkpoint.adapter),
        "adapter_config_sha256": digest("adapter_config.json", checkpoint.adapter),
        # The fingerprint samples the weights: too few to tell neighbouring checkpoints of a full model apart.
        "manifest_sha256": digest(vqa.MANIFEST_FILE, not checkpoint.adapter),
        "adapter_merged": checkpoint.merged,
        "dtype": checkpoint.dtype,
        "attn_implementation": checkpoint.model.attn_implementation,
        "eval_data_sha256": sha256_once(Path(args.eval_data_path)),
        "prompt_sha256": hashlib.sha256(inputs.prompt("{question}").encode()).hexdigest(),
        "audio_tokens": processor.audio_tokens,
        "encoder_tokens": processor.encoder_tokens,
        "frame_mode": processor.frame_mode,
        "max_eval_frames": checkpoint.inputs.max_eval_frames,
        "max_image_size": checkpoint.inputs.max_image_size,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed if inputs.arm in ("mismatched_audio", "shuffled_frames") else None,
    }


def run_manifest(
    args: argparse.Namespace, checkpoint: Checkpoint, inputs: ArmInputs, fingerprint: Row, device: Any
) -> Row:
    """What a reader needs to repeat the run: `base_manifest`, and how the main arm was answered."""
    manifest, tokenizer, model = base_manifest(args), inputs.processor.tokenizer, checkpoint.model
    manifest["sha256"] |= {
        "adapter": fingerprint["adapter_sha256"],
        "prompt": fingerprint["prompt_sha256"],
        "media": hashlib.sha256("".join(map(inputs.media_sha256, range(len(inputs.rows)))).encode()).hexdigest(),
        "train_vqa.py": sha256_file(vqa.__file__),
    }
    packages = ("torch", "transformers", "peft", "pillow", "torchaudio", "soundfile")
    shown = ("input_mode", "audio_tokens", "encoder_tokens", "frame_mode", "max_eval_frames", "max_image_size")
    return manifest | {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "model": {
            "base": model.model_name_or_path,
            "base_fingerprint": fingerprint["base_fingerprint"],
            "init": model.init,
            "adapter": str(checkpoint.path) if checkpoint.adapter else None,
            "adapter_merged": checkpoint.merged,
            "dtype": checkpoint.dtype,
            "attn_implementation": model.attn_implementation,
        },
        "input": {name: fingerprint[name] for name in shown} | {"prompt": inputs.prompt("{question}")},
        "seeds": {"arms": args.seed, "init": model.init_seed if model.init == "random" else None},
        "decoding": {
            "method": "greedy",
            "max_new_tokens": args.max_new_tokens,
            "stop_ids": vqa.turn_end_ids(tokenizer),
            "pad_id": tokenizer.pad_token_id,
            "batch_size": args.batch_size,
        },
    }


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def _at_least(minimum: int):
    def number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be {minimum} or more, found {value}")
        return value

    number.__name__ = "whole number"  # argparse names the type in its message
    return number


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else _at_least(1)(text)


_batch_size.__name__ = "whole number, or auto"


def _arm_list(text: str) -> list[str]:
    arms = text.split(",")
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown or len(set(arms)) < len(arms):
        raise argparse.ArgumentTypeError(
            f"{', '.join(map(repr, unknown)) or text}: give each arm once, of {', '.join(ARMS)}"
        )
    return arms


def build_parser() -> argparse.ArgumentParser:
    """The command line. A flag that is unknown or abbreviated is an error."""
    parser = argparse.ArgumentParser(
        description="Generate answers with a checkpoint and score them, or score and compare existing answers.",
        usage="%(prog)s [--flag value ...]  (all flags: --help)",
        allow_abbrev=False,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--eval_data_path", help="JSONL in the REAL-Colon-VQA schema; its rows are the denominator")
    data.add_argument("--frames_dir", help="folder with {video_id}/{frame}.jpg or .png")
    data.add_argument("--audio_dir", help="folder with the spoken questions")
    data.add_argument(
        "--train_data_path",
        help="the training JSONL, for its majority answers and for rows not held "
        "out. None: no train majority, no check",
    )
    data.add_argument(
        "--output_file",
        help="X.jsonl, one row a sample; the figures go to X.summary.json. With --score_only: the existing predictions",
    )
    data.add_argument("--limit", type=_at_least(0), default=0, help="evaluate the first N rows. 0: all of them")
    data.add_argument(
        "--overwrite",
        action="store_true",
        help="start again where --output_file holds rows; "
        "without it, rows of the same run are kept and the rest is done",
    )
    data.add_argument(
        "--allow_errors",
        action="store_true",
        help="a row whose files cannot be read counts as wrong; "
        "without it, such a row stops the run before the model loads",
    )

    data.add_argument(
        "--allow_symlinks", action="store_true", help="links may lead out of --frames_dir and --audio_dir"
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--checkpoint_path", help="final folder, checkpoint-N or merged model. None: the base model, zero-shot"
    )
    model.add_argument("--model_name_or_path", help="base model. None: the one the adapter was trained on")
    model.add_argument(
        "--input_mode", choices=INPUT_MODES, help="how the question reaches the model. None: as in training"
    )
    model.add_argument(
        "--max_eval_frames", type=_at_least(0), help="frames a clip, evenly spaced. 0: all; None: as in training"
    )
    model.add_argument(
        "--max_image_size", type=_at_least(1), help="longer side of a frame in pixels. None: as in training"
    )
    model.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="weights and activations. auto: as in training; for a base model bfloat16 on a GPU, float32 without",
    )
    model.add_argument(
        "--attn_implementation", help="attention: sdpa, eager or flash_attention_2. None: as in training"
    )
    model.add_argument(
        "--init",
        choices=("pretrained", "random"),
        help="random: the base with weights drawn from --seed, to rehearse. None: as in training, else pretrained",
    )
    model.add_argument(
        "--no_merge",
        action="store_true",
        help="keep the adapter apart from the weights: slower; without it, it is folded in once the weights are loaded",
    )
    model.add_argument(
        "--gpu_memory_limit_gib",
        type=float,
        default=0.0,
        help="hard cap on this process's GPU memory, to rehearse a smaller card. 0: none",
    )

    model.add_argument(
        "--cache_features",
        help="folder in which the outputs of the two encoders are kept, for other arms, evaluations and training of "
        "the same base: up to 11.2 MB a clip of 8 frames and 3.8 MB a speech in bfloat16. Each clip is then encoded "
        "alone: in float32 at --batch_size 1 that changes nothing, else a near tie may tip. Black frames and silence "
        "are never kept. None: encode for every answer",
    )

    answers = parser.add_argument_group("answers")
    answers.add_argument(
        "--batch_size",
        type=_batch_size,
        default="auto",
        help="samples answered at a time; in bfloat16 another number may tip a near tie to another answer. auto: as "
        f"many as the GPU or --gpu_memory_limit_gib has room for, up to {AUTO_BATCH_SIZE}, halved where they do not "
        f"fit; without a GPU {CPU_BATCH_SIZE}",
    )
    answers.add_argument("--max_new_tokens", type=_at_least(1), default=32, help="tokens after which an answer is cut")
    answers.add_argument(
        "--arms", type=_arm_list, help=f"comma-separated, of {', '.join(ARMS)}. None: the input mode alone"
    )
    answers.add_argument("--seed", type=int, default=0, help="for borrowed speech, shuffled frames and --init random")

    parser.add_argument("--score_only", action="store_true", help="score the predictions in --output_file; no model")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two rows files; print their paired differences")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status. Errors of input are one line on stderr and status 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    needed = ["eval_data_path", "output_file"] + ([] if args.score_only else ["frames_dir"])
    lacking = [f"--{name}" for name in needed if not getattr(args, name)]
    if lacking and not args.compare:
        parser.error(f"{', '.join(lacking)} must be given (without a model: --score_only or --compare)")
    if args.compare or args.score_only:
        mode, used = ("compare", []) if args.compare else ("score_only", [*needed, "train_data_path", "limit"])
        given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
        idle = [f"--{name}" for name in given if name not in (mode, *used)]
        if idle:
            parser.error(f"{', '.join(idle)}: no effect with --{mode}; leave it out")
    try:
        if args.compare:
            return compare(*args.compare)
        return score_only(args) if args.score_only else generate(args)
    except KeyboardInterrupt:  # while torch is imported, or without a model
        print("\nStopped by SIGINT: run the same command again", file=sys.stderr)
        return 128 + signal.SIGINT
    except InputError as error:
        message = str(error)
    except OSError as error:
        message = str(error)
        if error.filename:
            flags = [f" (--{name})" for name, value in vars(args).items() if value == error.filename]
            message = f"{error.filename}{''.join(flags)}: {error.strerror}"
    print("\n".join(f"{parser.prog}: error: {line}" for line in message.splitlines()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
