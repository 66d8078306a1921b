"""Ask a trained model aloud, on a page in the browser.

    python -m pip install -r requirements-app.txt
    python app.py --checkpoint_path checkpoints/smoke --data_path tests/fixtures/smoke.jsonl \\
        --frames_dir tests/fixtures/frames --audio_dir tests/fixtures/audio

The clip is a row of the question file, up to eight frames of one's own, or a short video; the question comes from the
microphone, a file, or the row's own recording. GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say where the page listens; it
is 127.0.0.1 and the first free port from 7860 on where they do not. For research only, as the page says.

What is given to the page lies in a temporary folder until it ends; nothing else is served as a file, and nothing is
written beside the data.
"""

import argparse
import base64
import filecmp
import html
import io
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
import torch
from PIL import Image

import evaluate_checkpoint as ev
import train_vqa as vqa

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # also what asks for newer versions; read while gradio is imported
try:
    import gradio as gr
except ImportError:
    gr = None

MAX_FRAMES = 8  # of a clip, as in the data
MAX_VIDEO_SECONDS = 60
MAX_UPLOAD_BYTES = 20_000_000
VIDEO_READERS = ("mov", "matroska")  # FFmpeg's, of MP4 and WebM
VIDEO_EXTENSIONS = (".mp4", ".webm")
FLIP_MILLISECONDS = 300  # a frame of the flip book
MATCHES_SHOWN = 200  # rows of the question file in the list, which a search makes shorter
EVERY = "all"
# What is asked when a button is pressed: the arm of evaluate_checkpoint.py, "" for what was given, and its label.
BUTTONS = {
    "": "Ask",
    "mismatched_audio": "Ask again with other speech",
    "black_frames": "… with black frames",
    "shuffled_frames": "… with shuffled frames",
}
NOTICE = "**For research only.** No medical device: what the model says about an image is no finding and no advice."
STYLE = """
.answer { font-size: 1.4em; font-weight: 600; margin: 0 }
.right { color: #15803d } .wrong { color: #b91c1c }
.asked { width: 100%; border-collapse: collapse } .asked td, .asked th { text-align: left; padding: 2px 8px 2px 0 }
"""


# ----------------------------------------------------------------------------------------------------------------------
# Flags and data
# ----------------------------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, which are some of evaluate_checkpoint.py's, and that script's defaults for the others."""
    parser = argparse.ArgumentParser(description="A page that asks a trained model aloud.", allow_abbrev=False)
    add = parser.add_argument
    # fmt: off
    add("--checkpoint_path", required=True, help="adapter or full model, as for evaluate_checkpoint.py")
    add("--data_path", "--eval_data_path", dest="eval_data_path", required=True, help="the question file to pick from")
    add("--frames_dir", required=True, help="folder with the frames of all videos")
    add("--audio_dir", help="folder with the spoken questions. None: rows have no speech of their own")
    add("--audio_pattern", help="how speech is named below --audio_dir. None: as in training")
    add("--frame_pattern", help="how frames are named below --frames_dir. None: as in training")
    add("--allow_symlinks", action="store_true", help="links may lead out of --frames_dir and --audio_dir")
    add("--model_name_or_path", help="base model. None: the base of the adapter")
    add("--prompt_layout", choices=ev.PROMPT_LAYOUTS, help="words around speech and frames. None: as in training")
    add("--max_eval_frames", type=int, help="frames a clip, evenly spaced. 0: all; None: as in training")
    add("--load_in_4bit", action="store_const", const=True, help="the decoder in 4 bits. None: as in training")
    add("--max_new_tokens", type=int, default=32, help="tokens after which an answer is cut")
    # fmt: on
    args = ev.parse_arguments(parser, argv)
    for name, least in (("max_eval_frames", 0), ("max_new_tokens", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"argument --{name}: must be {least} or more, found {value}")
    return argparse.Namespace(**vars(ev.build_parser().parse_args([])) | vars(args))


def read_rows(args: argparse.Namespace, patterns: Mapping[str, str | None]) -> list[vqa.VQARow]:
    """The rows whose files are all sound; the others are named and left out. VQAError where no row is left."""
    rows, problems = vqa.check_rows(
        *(args.eval_data_path, args.frames_dir, args.audio_dir), allow_symlinks=args.allow_symlinks, **patterns
    )
    if not rows:
        vqa.raise_problems(problems)
    for problem in problems[: vqa.MAX_PROBLEMS_SHOWN]:
        print(f"{problem} (not on the page)", file=sys.stderr)
    if problems:
        print(f"{args.eval_data_path}: {len(rows)} rows are on the page, {len(problems)} problems", file=sys.stderr)
    return rows


def lenders_of(rows: Sequence[vqa.VQARow]) -> dict[str, vqa.VQARow]:
    """The row whose speech each row gets as other speech, by `VQARow.key`: as the arm mismatched_audio pairs them. {}
    where the rows are too alike to lend any."""
    try:
        lenders = ev.speech_lenders(rows, seed=0)
    except ev.InputError:
        return {}
    return {row.key: lenders[key] for row in rows if (key := ev.row_key(ev.annotation_of(row))) in lenders}


def wordings_of(rows: Iterable[vqa.VQARow]) -> dict[str, dict[str, list[str]]]:
    """By question type, each closed answer and the sentences that say it in these rows. One that no row gives stands
    for itself, in one word."""
    wordings: dict = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.short_answer and row.answer:
            said = wordings[row.question_type][ev.gold_option(row.question_type, row.short_answer) or row.short_answer]
            if row.answer not in said:
                said.append(row.answer)
    for kind, of_option in wordings.items():
        for option in ev.CLOSED_ANSWERS[kind].options if kind in ev.CLOSED_ANSWERS else ():
            of_option[option] = of_option[option] or [option]
    return {kind: dict(of_option) for kind, of_option in wordings.items()}


def shares_of(log_probs: Mapping[str, float], wordings: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Each closed answer's share of the probability of all its `wordings`; `log_probs`: natural logarithms."""
    most = max(log_probs.values())
    of_option = {o: sum(math.exp(log_probs[text] - most) for text in texts) for o, texts in wordings.items()}
    return {option: part / sum(of_option.values()) for option, part in of_option.items()}


# ----------------------------------------------------------------------------------------------------------------------
# A clip: of a row, of uploaded frames, or of a video
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Clip:
    """What a person is asking about."""

    name: str
    frames: list[Image.Image]  # RGB, in order in time, scaled down
    row: vqa.VQARow | None = None  # None: uploaded
    kind: str | None = None  # the question type, whose closed answers are compared
    asked: list[dict] = field(default_factory=list)  # what was asked about it, the latest first


def uploaded_frames(paths: Sequence[Path], max_image_size: int) -> list[Image.Image]:
    """Up to MAX_FRAMES frames in the order of their names, numbers by value, or those of one video. VQAError, the
    sentence of the command line, where they cannot be used."""
    videos = [path for path in paths if path.suffix.lower() in VIDEO_EXTENSIONS]
    if videos and len(paths) > 1:
        raise vqa.VQAError(f"{videos[0].name} is a video, and there are {len(paths) - 1} more files; give it alone")
    if len(paths) > MAX_FRAMES:
        raise vqa.VQAError(f"{len(paths)} frames are more than the {MAX_FRAMES} of a clip; give fewer")
    if videos:
        return [vqa.shrink(image, max_image_size) for image in video_frames(videos[0])]
    ordered = sorted(paths, key=lambda path: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", path.name)])
    for path in ordered:
        vqa.decode_frame(path, checking=True)
    return [vqa.load_frame(path, max_image_size) for path in ordered]


def video_frames(path: Path) -> list[Image.Image]:
    """Up to MAX_FRAMES frames of a video, evenly spaced, RGB, upright. VQAError where it is no MP4 or WebM, too long,
    or cannot be decoded to its end."""

    def refuse(what: str, advice: str = "give another") -> None:
        raise vqa.VQAError(f"video {path} {what}; {advice}")

    data = path.read_bytes()
    kind, reader = vqa.what_is(data)
    if reader not in VIDEO_READERS:
        refuse(f"is {kind}", "give an MP4 or a WebM")
    try:
        with av.open(io.BytesIO(data), format=reader) as container:
            if not container.streams.video:
                refuse("holds no picture")
            times = sorted(p.pts for p in container.demux(container.streams.video[0]) if p.pts is not None)
        if not times:
            refuse("holds no picture")
        with av.open(io.BytesIO(data), format=reader) as container:
            stream = container.streams.video[0]
            if stream.width * stream.height > vqa.MAX_FRAME_PIXELS:
                refuse(f"has {stream.width} x {stream.height} pixels", "scale it down")
            if (times[-1] - times[0]) * stream.time_base > MAX_VIDEO_SECONDS:
                refuse(f"lasts more than {MAX_VIDEO_SECONDS} s", "shorten it")
            wanted = set(vqa.select_frames(times, MAX_FRAMES))
            stream.thread_type = "AUTO"
            found = {}
            for frame in container.decode(stream):
                if frame.pts in wanted:
                    found[frame.pts] = frame.to_image().rotate(frame.rotation, expand=True)
    except av.FFmpegError as error:
        refuse(f"cannot be decoded ({error.strerror})")
    if found.keys() != wanted:
        refuse("is damaged or cut off")
    return [found[time] for time in sorted(found)]


def flip_book(frames: Sequence[Image.Image]) -> str:
    """HTML that plays the frames in turn, without end, once it is opened."""
    content = io.BytesIO()
    first, *others = [frame.resize(frames[0].size) for frame in frames]
    first.save(content, "WEBP", save_all=True, append_images=others, duration=FLIP_MILLISECONDS, loop=0)
    source = f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
    return f'<details><summary>Play as a flip book</summary><img class="flip" src="{source}" alt="flip book"></details>'


# ----------------------------------------------------------------------------------------------------------------------
# Asking
# ----------------------------------------------------------------------------------------------------------------------


class Asker:
    """A model, the rows of a question file, and how one question is asked.

    Args:
        trained: from `load_trained`.
        rows: VQARows whose media were found and passed.
        max_frames: frames that the model is shown of a clip; None: all.
        max_new_tokens: tokens after which an answer is cut.
    """

    def __init__(self, trained: vqa.Trained, rows: list[vqa.VQARow], max_frames: int | None, max_new_tokens: int):
        self.trained, self.rows, self.max_frames, self.max_new_tokens = trained, rows, max_frames, max_new_tokens
        self.mode, self.max_image_size = trained.processor.input_mode, trained.processor.max_image_size
        self.wordings, self.lenders = wordings_of(rows), lenders_of(rows)

    def matching(self, video: str, kind: str, words: str) -> list[tuple[str, int]]:
        """(label, index) of the rows of a video and a question type (EVERY: any) that hold all `words`."""
        found = []
        for index, row in enumerate(self.rows):
            label = f"{row.key} · {row.question}"
            if video in (EVERY, row.video_id) and kind in (EVERY, row.question_type):
                if all(word in label.casefold() for word in words.casefold().split()):
                    found.append((label, index))
        return found

    def clip_of(self, index: int) -> Clip:
        """That of a row; VQAError where a frame cannot be read any more."""
        row = self.rows[index]
        frames = [vqa.load_frame(path, self.max_image_size) for path in row.frame_paths]
        return Clip(row.key, frames, row, row.question_type)

    def other_speech(self, clip: Clip) -> vqa.VQARow:
        """The row whose speech is played in place of the question; VQAError where there is none."""
        lender = self.lenders.get(clip.row.key) if clip.row else next(iter(self.lenders.values()), None)
        if lender is None:
            raise vqa.VQAError("no row of another question type has speech to ask with; see --data_path and --audio_dir")
        return lender

    def ask(self, arm: str, clip: Clip, recording: Path | None, words: str) -> Clip:
        """The clip with one more answer in front: to the recording, the `words`, or both, as the model was trained. In
        an arm of BUTTONS, frames or speech are changed as evaluation changes them. VQAError for what cannot be asked."""
        start = time.perf_counter()
        speech, heard = None, "words"
        if self.mode != "text":
            own = clip.row and clip.row.audio_path
            heard = "the row's own" if own and filecmp.cmp(recording, own, shallow=False) else "yours"
            speech = vqa.load_speech(recording)
        frames = vqa.select_frames(clip.frames, self.max_frames)
        if arm == "mismatched_audio":
            lender = self.other_speech(clip)
            speech = ev.of_length(vqa.load_speech(lender.audio_path), len(speech))
            heard = f"“{lender.question}”"
        elif arm == "shuffled_frames":
            frames = ev.shuffled_frames(list(frames), f"0/{clip.name}")
        elif arm:
            _, change = ev.CONTENT_ARMS[arm]
            frames = change(frames)
        wordings = self.wordings.get(clip.kind, {})
        question = words if self.mode != "audio" else None
        told = self.trained.model.answer(frames, speech, question, max_new_tokens=self.max_new_tokens)
        seconds = time.perf_counter() - start
        texts = [text for said in wordings.values() for text in said]
        scored = self.trained.model.answer(frames, speech, question, max_new_tokens=1, candidates=texts)
        right = None
        if clip.row and clip.row.short_answer:
            right = ev.judge(told.text, clip.kind, clip.row.short_answer, clip.row.answer)["choice"]
        answer = {"arm": arm, "heard": heard, "text": told.text, "n_tokens": told.n_tokens, "stopped": told.stopped}
        answer |= {"seconds": seconds, "n_frames": len(frames), "right": right}
        answer["shares"] = shares_of(scored.log_probs, wordings) if texts else {}
        return replace(clip, asked=[answer, *clip.asked])


def verdict(right: bool | None) -> str:
    """HTML of right or wrong; nothing where no gold answer tells."""
    return "" if right is None else f'<b class="{"right" if right else "wrong"}">{"right" if right else "wrong"}</b>'


def render(clip: Clip) -> str:
    """HTML of the latest answer, and of all that were given about this clip."""
    if not clip.asked:
        return ""
    latest, row, text = clip.asked[0], clip.row, html.escape
    ended = "stopped by itself" if latest["stopped"] else "cut off at the limit"
    parts = [
        f'<p class="answer">{text(latest["text"]) or "(no words)"} {verdict(latest["right"])}</p>',
        f'<p class="how">{latest["seconds"]:.2f} s, {latest["n_tokens"]} tokens, {ended}; '
        f"{latest['n_frames']} of {len(clip.frames)} frames shown</p>",
    ]
    if row and row.short_answer:
        gold = f"To the row’s own question the right answer is <b>{text(row.short_answer)}</b>: {text(row.answer)}"
        parts.append(f'<p class="gold">{gold}</p>')
    lines = []
    for asked in clip.asked:
        label = BUTTONS[asked["arm"]].removeprefix("Ask again ").removeprefix("… ") if asked["arm"] else "as given"
        cells = (label, asked["heard"], asked["text"])
        lines.append(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in cells)}<td>{verdict(asked['right'])}</td></tr>")
    head = "".join(f"<th>{name}</th>" for name in ("asked", "speech", "answer", ""))
    return f'{"".join(parts)}<table class="asked"><tr>{head}</tr>{"".join(lines)}</table>'


# ----------------------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------------------


class Page:
    """The Gradio page of an Asker. `folder` is gradio's temporary folder, the only one from which files are served."""

    def __init__(self, asker: Asker, folder: Path):
        self.asker, self.folder = asker, folder
        self.spoken = asker.mode != "text"

    def refuse(self, error: vqa.VQAError) -> None:
        """Show the command line's sentence; of uploaded files only the name, as nobody knows their folder."""
        raise gr.Error(re.sub(rf"{re.escape(str(self.folder))}/\S*/", "", str(error)), duration=None) from None

    def show(self, clip: Clip):
        """What the page shows of a new clip: state, frames, flip book, question, speech, no answer yet."""
        speech = None
        question = "Your own clip." if clip.row is None else f"This row asks: “{clip.row.question}”"
        if self.spoken and clip.row and clip.row.audio_path:
            own = self.folder / f"row_{clip.row.line}{clip.row.audio_path.suffix}"
            speech = str(shutil.copyfile(clip.row.audio_path, own))
        frames = [(frame, str(number)) for number, frame in enumerate(clip.frames, start=1)]
        words = clip.row.question if clip.row else ""
        return clip, frames, flip_book(clip.frames), question, speech, words, "", None

    def pick(self, index: int | None):
        """A row was picked."""
        if index is None:
            return [gr.skip()] * 8
        try:
            return self.show(self.asker.clip_of(index))
        except vqa.VQAError as error:
            self.refuse(error)

    def upload(self, files: list[str] | None, kind: str | None):
        """Frames or a video were uploaded."""
        if not files:
            return [gr.skip()] * 8
        try:
            frames = uploaded_frames([Path(file) for file in files], self.asker.max_image_size)
        except vqa.VQAError as error:
            self.refuse(error)
        return self.show(Clip(", ".join(Path(file).name for file in files), frames, kind=kind))

    def choose_kind(self, clip: Clip | None, kind: str | None):
        """Another type's closed answers are compared from now on, for an uploaded clip."""
        return replace(clip, kind=kind) if clip and clip.row is None else gr.skip()

    def own_speech(self, clip: Clip | None):
        """Back to the recording of the row."""
        if clip is None or clip.row is None or clip.row.audio_path is None:
            raise gr.Error("there is no row with speech of its own; pick one of the question file", duration=None)
        return self.show(clip)[4]

    def search(self, video: str, kind: str, words: str):
        """The list of rows, filtered."""
        found = self.asker.matching(video, kind, words)
        shown = found[:MATCHES_SHOWN]
        more = f"Row ({len(found)} found" + (f", the first {MATCHES_SHOWN} here)" if len(found) > len(shown) else ")")
        return gr.update(choices=shown, value=shown[0][1] if shown else None, label=more)

    def ask(self, arm: str, clip: Clip | None, recording: str | None, words: str):
        """A button of BUTTONS was pressed: state, answer, shares."""
        if clip is None:
            raise gr.Error("pick a row, or upload frames or a video, first", duration=None)
        if self.spoken and not recording:
            raise gr.Error("record a question, choose a sound file, or take the row's own speech, first", duration=None)
        try:
            clip = self.asker.ask(arm, clip, recording and Path(recording), words)
        except vqa.VQAError as error:
            self.refuse(error)
        return clip, render(clip), clip.asked[0]["shares"] or None

    def build(self) -> "gr.Blocks":
        """The page, with its events. One question at a time: whoever asks meanwhile waits in the queue."""
        asker, private = self.asker, {"api_visibility": "private"}
        kinds = sorted({row.question_type for row in asker.rows})
        with gr.Blocks(title="SurgViVQA-Audio", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            clip = gr.State(None)
            gr.Markdown(f"# Ask about a surgical video, aloud\n{NOTICE}", elem_id="notice")
            with gr.Row():
                with gr.Column():
                    with gr.Tab("A clip of the question file"):
                        with gr.Row():
                            videos = sorted({row.video_id for row in asker.rows})
                            video = gr.Dropdown([EVERY, *videos], value=EVERY, label="Video")
                            kind = gr.Dropdown([EVERY, *kinds], value=EVERY, label="Question type")
                            words = gr.Textbox(label="Search", placeholder="words of the question, or an id")
                        row = gr.Dropdown([], label="Row", elem_id="row")
                    with gr.Tab("Your own frames or video"):
                        types = [*vqa.FRAME_EXTENSIONS, *VIDEO_EXTENSIONS]
                        label = f"Up to {MAX_FRAMES} frames, or a video of up to {MAX_VIDEO_SECONDS} s (MP4, WebM)"
                        files = gr.File(file_count="multiple", file_types=types, label=label, elem_id="files")
                        own_kind = gr.Dropdown(kinds, value=None, label="Compare the closed answers of this type")
                    gallery = gr.Gallery(label="Frames", columns=4, height="auto", buttons=[], elem_id="frames")
                    flip = gr.HTML(elem_id="flip")
                with gr.Column():
                    question = gr.Markdown(elem_id="question")
                    speech = gr.Audio(
                        sources=["microphone", "upload"],
                        type="filepath",
                        label="Your question",
                        visible=self.spoken,
                        elem_id="speech",
                    )
                    text = gr.Textbox(label="The question in words", visible=asker.mode != "audio", elem_id="words")
                    own = gr.Button("The row's own speech", size="sm", visible=self.spoken)
                    with gr.Row():
                        buttons = {arm: gr.Button(label, variant="secondary" if arm else "primary")
                                   for arm, label in BUTTONS.items() if self.spoken or "audio" not in arm}  # fmt: skip
                    answer = gr.HTML(elem_id="answer")
                    shares = gr.Label(label="Share of each closed answer, as the rows word it", elem_id="shares")
            shown = [clip, gallery, flip, question, speech, text, answer, shares]
            for control in (video, kind, words):
                control.change(self.search, [video, kind, words], row, **private)
            page.load(self.search, [video, kind, words], row, **private)
            row.change(self.pick, row, shown, **private)
            files.upload(self.upload, [files, own_kind], shown, **private)
            own_kind.change(self.choose_kind, [clip, own_kind], clip, **private)
            own.click(self.own_speech, clip, speech, **private)
            for arm, button in buttons.items():
                asking = {"concurrency_id": "model", "concurrency_limit": 1, **private}
                button.click(
                    lambda *given, arm=arm: self.ask(arm, *given), [clip, speech, text], [clip, answer, shares], **asking
                )
        return page


def serve(asker: Asker) -> None:
    """Show the page until a signal comes; what was given to it is removed then. VQAError where it cannot listen."""
    with tempfile.TemporaryDirectory(prefix="surgvivqa_app_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = Page(asker, Path(folder)).build()
        try:
            _, url, _ = page.launch(
                **{"share": False, "mcp_server": False, "ssr_mode": False, "pwa": False, "run_history": False},
                **{"allowed_paths": [folder], "max_file_size": MAX_UPLOAD_BYTES, "enable_monitoring": False},
                **{"footer_links": [], "css": STYLE, "quiet": True, "prevent_thread_lock": True},
            )
        except OSError as error:
            raise vqa.VQAError(f"{vqa.first_line(error)}; see GRADIO_SERVER_NAME and GRADIO_SERVER_PORT") from error
        print(f"✓ Ask at {url}", flush=True)
        signal.pause()


def main(argv: Sequence[str] | None = None) -> int:
    """Load the model and show the page; returns the exit status."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    if gr is None:
        raise vqa.VQAError("app.py needs gradio; run `pip install -r requirements-app.txt`")

    def stop(signum: int, _frame) -> None:
        raise vqa.Interrupted(signum, "the page is closed")

    for number in vqa.STOP_SIGNALS:
        signal.signal(number, stop)
    try:
        ev.load_libraries()
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        chosen = ev.choose_model(args, device)
        if chosen.inputs.input_mode != "text" and not args.audio_dir:
            print("   no --audio_dir: the rows have no speech of their own")
        ev.check_weights(chosen, device)
        rows = read_rows(args, chosen.patterns)
        trained = ev.load_chosen_model(chosen, device)
    except ev.InputError as error:
        raise vqa.VQAError(str(error)) from error
    serve(Asker(trained, rows, chosen.inputs.max_eval_frames, args.max_new_tokens))
    return 0


if __name__ == "__main__":
    vqa.run(main)
