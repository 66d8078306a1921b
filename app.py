"""Ask a trained model aloud, on a page in the browser.

    python -m pip install -r requirements-app.txt
    python app.py --checkpoint_path checkpoints/smoke --data_path tests/fixtures/smoke.jsonl \\
        --frames_dir tests/fixtures/frames --audio_dir tests/fixtures/audio

The clip is a row of the question file, up to eight frames of one's own, or a short video; the question comes from the
microphone, a sound file, or the row's own recording. The page listens on GRADIO_SERVER_NAME and GRADIO_SERVER_PORT;
without them on 127.0.0.1, at the first free port from 7860 on.

What a visitor gives lies in a temporary folder, the only one that is served, until the page is closed. Nothing is
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
import signal
import sys
import tempfile
import time
import typing
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import av
import torch
from PIL import Image

import evaluate_checkpoint as ev
import train_vqa as vqa

GRADIO = "gradio>=6.31,<7"  # as in requirements-app.txt
MAX_FRAMES = 8  # of an uploaded clip, as many as the clips of the data have
MAX_VIDEO_SECONDS = 60
MAX_UPLOAD_BYTES = 20_000_000
VIDEO_READERS = ("mov", "matroska")  # FFmpeg's, of MP4 and WebM
VIDEO_EXTENSIONS = (".mp4", ".webm")
FLIP_MILLISECONDS = 300  # that the flip book shows a frame
ROWS_LISTED = 200  # a longer list is slow in the browser; filters and search make it shorter
EVERY = "all"
# Arms of evaluate_checkpoint.py, and what their buttons say.
AGAIN = {"mismatched_audio": "Other speech", "black_frames": "Black frames", "shuffled_frames": "Shuffled frames"}
NOTICE = "**For research only.** No medical device: what a model says about an image is no finding and no advice."
STYLE = """
.answer { font-size: 1.4em; font-weight: 600; margin: 0 }
.right { color: #15803d } .wrong { color: #b91c1c }
.asked { width: 100% } .asked td, .asked th { text-align: left; padding: 2px 8px }
.flip { width: 100%; max-width: 384px }
#frames .grid-wrap { height: auto; min-height: 0; max-height: none }
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
    add("--max_eval_frames", type=ev._at_least(0), help="frames a clip, evenly spaced. 0: all; None: as in training")
    add("--load_in_4bit", action="store_const", const=True, help="the decoder in 4 bits. None: as in training")
    add("--max_new_tokens", type=ev._at_least(1), default=32, help="tokens after which an answer is cut")
    add("--compile_layers", choices=("True", "False"), default="True",
        help="on a GPU: a fifth less time an answer, for half a minute at the start; needs a C compiler (True)")
    # fmt: on
    args = ev.parse_arguments(parser, argv)
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
    """By `VQARow.key`, the row whose speech a row gets as other speech, paired as in the arm mismatched_audio; {} where
    the rows are too alike for that."""
    try:
        lenders = ev.speech_lenders(rows, seed=0)
    except ev.InputError:
        return {}
    return {row.key: lenders[key] for row in rows if (key := ev.row_key(ev.annotation_of(row))) in lenders}


def wordings_of(rows: Iterable[vqa.VQARow]) -> dict[str, dict[str, list[str]]]:
    """By question type, each closed answer and the sentences that say it in the rows; one that no row gives says
    itself."""
    said: dict = defaultdict(lambda: defaultdict(set))
    for row in rows:
        if row.short_answer and row.answer:
            said[row.question_type][ev.gold_option(row.question_type, row.short_answer) or row.short_answer].add(
                row.answer
            )
    for kind in said.keys() & ev.CLOSED_ANSWERS.keys():
        for option in ev.CLOSED_ANSWERS[kind].options:
            said[kind][option] = said[kind][option] or {option}
    return {kind: {option: sorted(texts) for option, texts in options.items()} for kind, options in said.items()}


def shares_of(log_probs: Mapping[str, float], wordings: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Each closed answer's share of the probability of all `wordings`; `log_probs` are natural logarithms."""
    most = max(log_probs.values())
    parts = {option: sum(math.exp(log_probs[text] - most) for text in said) for option, said in wordings.items()}
    return {option: part / sum(parts.values()) for option, part in parts.items()}


# ----------------------------------------------------------------------------------------------------------------------
# A clip: of a row, of uploaded frames, or of a video
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Clip:
    """What a person is asking about."""

    frames: list[Image.Image]  # RGB, in order in time, scaled down
    row: vqa.VQARow | None = None  # None: it was uploaded
    told: list[tuple] = field(default_factory=list)  # how, whose speech, answer, right for the row; the latest first


def uploaded_frames(paths: Sequence[Path], max_image_size: int) -> list[Image.Image]:
    """Up to MAX_FRAMES frames in the order of their names, numbers by value, or those of one video. VQAError, the
    sentence of the command line, where they cannot be used."""
    videos = [path for path in paths if path.suffix.lower() in VIDEO_EXTENSIONS]
    if videos and len(paths) > 1:
        raise vqa.VQAError(f"{videos[0].name} is a video, and there are {len(paths) - 1} more files; give it alone")
    if len(paths) > MAX_FRAMES:
        raise vqa.VQAError(f"{len(paths)} frames, and the model is shown {MAX_FRAMES} at most; give fewer")
    if videos:
        return [vqa.shrink(image, max_image_size) for image in video_frames(videos[0])]
    ordered = sorted(paths, key=lambda path: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", path.name)])
    for path in ordered:
        vqa.decode_frame(path, checking=True)
    return [vqa.load_frame(path, max_image_size) for path in ordered]


def video_frames(path: Path) -> list[Image.Image]:
    """Up to MAX_FRAMES frames of a video, evenly spaced, RGB, upright. VQAError where it is no MP4 or WebM, too long,
    or cannot be decoded to its end."""

    def refuse(what: str, advice: str = "give another") -> typing.NoReturn:
        raise vqa.VQAError(f"video {path} {what}; {advice}")

    data = path.read_bytes()
    kind, reader = vqa.what_is(data)
    if reader not in VIDEO_READERS:
        refuse(f"is {kind}", "give an MP4 or a WebM")
    found = {}
    try:
        # Twice: only its packets tell how long a WebM is that a browser recorded, and in what order they are shown.
        with av.open(io.BytesIO(data), format=reader) as container:
            if not container.streams.video:
                refuse("holds no picture")
            stream = container.streams.video[0]
            times = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
            if not times:
                refuse("holds no picture")
            if (times[-1] - times[0]) * stream.time_base > MAX_VIDEO_SECONDS:
                refuse(f"lasts more than {MAX_VIDEO_SECONDS} s", "shorten it")
            if stream.width * stream.height > vqa.MAX_FRAME_PIXELS:
                refuse(f"has {stream.width} x {stream.height} pixels", "scale it down")
        wanted = set(vqa.select_frames(times, MAX_FRAMES))
        with av.open(io.BytesIO(data), format=reader) as container:
            container.streams.video[0].thread_type = "AUTO"
            for frame in container.decode(video=0):
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
    """A model from `load_trained`, VQARows whose media passed, and how a question is asked: on `max_frames` of a clip
    (None: all), the answer cut off at `max_new_tokens`."""

    def __init__(self, trained: vqa.Trained, rows: list[vqa.VQARow], max_frames: int | None, max_new_tokens: int):
        self.model, self.rows, self.max_frames, self.max_new_tokens = trained.model, rows, max_frames, max_new_tokens
        self.mode, self.max_image_size = trained.processor.input_mode, trained.processor.max_image_size
        self.wordings, self.lenders = wordings_of(rows), lenders_of(rows)

    def matching(self, video: str, kind: str, words: str) -> list[tuple[str, int]]:
        """(label, index) of the rows of a video and a question type (EVERY: any) whose label holds all `words`."""
        labels = [
            (f"{row.key} · {row.question}", index)
            for index, row in enumerate(self.rows)
            if video in (EVERY, row.video_id) and kind in (EVERY, row.question_type)
        ]
        return [item for item in labels if all(word in item[0].casefold() for word in words.casefold().split())]

    def clip_of(self, row: vqa.VQARow) -> Clip:
        """That of a row; VQAError where a frame cannot be read any more."""
        return Clip([vqa.load_frame(path, self.max_image_size) for path in row.frame_paths], row)

    def inputs(self, arm: str, clip: Clip, recording: Path | None) -> tuple[list[Image.Image], typing.Any, str]:
        """Frames, speech (float32 [n] or None) and whose that is, changed as evaluation changes them in an `arm` of
        AGAIN. VQAError where they cannot be used."""
        frames, speech, whose = list(vqa.select_frames(clip.frames, self.max_frames)), None, "in words"
        if recording:
            own = clip.row and clip.row.audio_path
            whose = "the row’s own" if own and filecmp.cmp(recording, own, shallow=False) else "yours"
            speech = vqa.load_speech(recording)
        if arm == "mismatched_audio":
            lender = self.lenders.get(clip.row.key) if clip.row else next(iter(self.lenders.values()), None)
            if lender is None:
                raise vqa.VQAError(f"{self.rows[0].source}: no row has other speech to lend; give --audio_dir")
            speech, whose = ev.of_length(vqa.load_speech(lender.audio_path), len(speech)), f"“{lender.question}”"
        elif arm == "shuffled_frames":
            frames = ev.shuffled_frames(frames, f"0/{clip.row.key if clip.row else ''}")
        elif arm:
            _, change = ev.CONTENT_ARMS[arm]
            frames = change(frames)
        return frames, speech, whose

    def ask(self, arm: str, clip: Clip, recording: Path | None, words: str, kind: str | None) -> Iterator[tuple]:
        """Answer the recording, the `words` or both, as the model was trained, in an `arm` of AGAIN ("": as given).
        Yields the clip with what was told, its HTML and None; then, for a question type `kind`, the same with the share
        of the probability of each of its closed answers. VQAError for what cannot be used."""
        start = time.perf_counter()
        frames, speech, whose = self.inputs(arm, clip, recording)
        question, wordings = words if self.mode != "audio" else None, self.wordings.get(kind, {})
        answer = self.model.answer(frames, speech, question, self.max_new_tokens)
        ended = "stopped by itself" if answer.stopped else "cut off at the limit"
        how = f"{time.perf_counter() - start:.2f} s, {answer.n_tokens} tokens, {ended}; {len(frames)} frames shown"
        right, row = None, clip.row
        if row and row.short_answer:
            right = ev.judge(answer.text, row.question_type, row.short_answer, row.answer)["choice"]
        clip = replace(clip, told=[(AGAIN.get(arm, "as given"), whose, answer.text, right), *clip.told])
        told = render(clip, how)
        yield clip, told, None
        if wordings:  # by a call of its own: the answer waits neither for it nor for the graphs of a longer prompt
            candidates = [text for said in wordings.values() for text in said]
            scored = self.model.answer(frames, speech, question, 1, candidates)
            yield clip, told, shares_of(scored.log_probs, wordings)


def render(clip: Clip, how: str) -> str:
    """HTML of the latest answer, `how` it was given, and all answers about this clip."""
    text, row = html.escape, clip.row
    parts = [f'<p class="answer">{text(clip.told[0][2]) or "(no words)"}</p><p>{how}</p>']
    if row and row.short_answer:
        parts.append(f"<p>To the row’s own question: <b>{text(row.short_answer)}</b> ({text(row.answer)})</p>")
    parts.append('<table class="asked"><tr><th>Asked</th><th>Speech</th><th>Answer</th><th>For the row</th></tr>')
    for *cells, right in clip.told:
        word = {True: "right", False: "wrong", None: ""}[right]
        cells = "".join(f"<td>{text(cell)}</td>" for cell in cells)
        parts.append(f'<tr>{cells}<td><b class="{word}">{word}</b></td></tr>')
    return "".join([*parts, "</table>"])


# ----------------------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------------------


def load_gradio() -> None:
    """Import gradio, which only this script needs; VQAError where that fails."""
    global gr
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nor does it ask for newer versions then
    try:
        vqa.require_version(GRADIO)
        import gradio as gr
    except ImportError as error:
        what = vqa.first_line(error).rstrip(". ")
        raise vqa.VQAError(f"app.py: {what}; run `pip install -r requirements-app.txt`") from error
    except ValueError as error:  # it reads the port as it is imported
        raise vqa.VQAError(f"GRADIO_SERVER_PORT: {error}; give a number") from error


class Page:
    """The Gradio page of an Asker. `folder` is gradio's temporary one."""

    def __init__(self, asker: Asker, folder: str):
        self.asker, self.folder, self.spoken = asker, folder, asker.mode != "text"

    @contextmanager
    def telling(self) -> Iterator[None]:
        """A VQAError becomes a message on the page; of the files that were given it tells only the names."""
        try:
            yield
        except vqa.VQAError as error:
            told = re.sub(rf"{re.escape(self.folder)}/\S*/", "", str(error))
            raise gr.Error(told, duration=None, print_exception=False) from error

    def search(self, video: str, kind: str, words: str):
        """The list of rows, filtered."""
        found = self.asker.matching(video, kind, words)
        label = f"Row ({len(found)} found" + (f", the first {ROWS_LISTED} listed)" if found[ROWS_LISTED:] else ")")
        return gr.update(choices=found[:ROWS_LISTED], value=found[0][1] if found else None, label=label)

    def pick(self, index: int | None):
        """A row was picked."""
        if index is None:
            return [gr.skip()] * 9
        row = self.asker.rows[index]
        with self.telling():
            return self.show(
                self.asker.clip_of(row), f"This row asks: “{row.question}”", row.question, row.question_type
            )

    def upload(self, files: list[str]):
        """Frames or a video were given."""
        with self.telling():
            frames = uploaded_frames([Path(file) for file in files], self.asker.max_image_size)
            return self.show(Clip(frames), "Your own clip", "", None)

    def show(self, clip: Clip, about: str, words: str, kind: str | None):
        """What the page shows of a clip about which nothing was asked yet."""
        numbered = [(frame, str(number)) for number, frame in enumerate(clip.frames, start=1)]
        return clip, numbered, flip_book(clip.frames), about, self.own_speech(clip), words, kind, "", None

    def own_speech(self, clip: Clip | None) -> str | None:
        """A copy of the row's recording, to be played and asked with; None where there is none."""
        path = clip and clip.row and clip.row.audio_path
        return gr.processing_utils.save_file_to_cache(path, self.folder) if path and self.spoken else None

    def ask(self, arm: str, clip: Clip | None, recording: str | None, words: str, kind: str | None):
        """A button was pressed."""
        with self.telling():
            if clip is None:
                raise vqa.VQAError("pick a row, or give frames or a video, first")
            if self.spoken and not recording:
                raise vqa.VQAError("record a question, choose a sound file, or take the row’s own speech, first")
            if self.asker.mode != "audio" and not words.strip():
                raise vqa.VQAError("write the question, first")
            yield from self.asker.ask(arm, clip, recording and Path(recording), words, kind)

    def build(self) -> "gr.Blocks":
        """The page. One question is asked at a time: whoever asks meanwhile waits in the queue."""
        rows, events = self.asker.rows, {"api_visibility": "private"}
        videos, kinds = (sorted({getattr(row, name) for row in rows}) for name in ("video_id", "question_type"))
        with gr.Blocks(title="SurgViVQA-Audio", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            gr.Markdown(f"# Ask about a surgical video, aloud\n{NOTICE}")
            clip = gr.State(None)
            with gr.Row():
                with gr.Column():
                    with gr.Tab("A clip of the question file"):
                        with gr.Row():
                            filters = [
                                gr.Dropdown([EVERY, *videos], value=EVERY, label="Video"),
                                gr.Dropdown([EVERY, *kinds], value=EVERY, label="Question type"),
                                gr.Textbox(label="Search"),
                            ]
                        row = gr.Dropdown([], label="Row")
                    with gr.Tab("Your own frames or video"):
                        label = f"Up to {MAX_FRAMES} frames, or an MP4 or WebM of up to {MAX_VIDEO_SECONDS} s and 20 MB"
                        types = [*vqa.FRAME_EXTENSIONS, *VIDEO_EXTENSIONS]
                        files = gr.File(file_count="multiple", file_types=types, label=label, elem_id="files")
                    frames = gr.Gallery(label="Frames", columns=4, buttons=["fullscreen"], elem_id="frames")
                    flip = gr.HTML(elem_id="flip")
                with gr.Column():
                    about = gr.Markdown()
                    heard = {"sources": ["microphone", "upload"], "type": "filepath", "visible": self.spoken}
                    speech = gr.Audio(label="Question", buttons=[], elem_id="speech", **heard)
                    own = gr.Button("The row’s own speech", size="sm", visible=self.spoken)
                    words = gr.Textbox(label="Question in words", visible=self.asker.mode != "audio")
                    kind = gr.Dropdown(kinds, value=None, label="Compare the closed answers of")
                    buttons = {"": gr.Button("Ask", variant="primary")}
                    with gr.Row():
                        for arm, label in AGAIN.items():
                            if self.spoken or arm != "mismatched_audio":
                                buttons[arm] = gr.Button(f"Again: {label.lower()}", size="sm")
                    answer = gr.HTML(elem_id="answer")
                    shares = gr.Label(label="Share of the probability, by closed answer", elem_id="shares")
            shown = [clip, frames, flip, about, speech, words, kind, answer, shares]
            for control in filters:
                control.change(self.search, filters, row, **events)
            page.load(self.search, filters, row, **events)
            row.change(self.pick, row, shown, **events)
            files.upload(self.upload, files, shown, **events)
            own.click(self.own_speech, clip, speech, **events)
            given, told = [clip, speech, words, kind], [clip, answer, shares]
            for arm, button in buttons.items():
                ask = partial(self.ask, arm)
                button.click(ask, given, told, concurrency_id="model", concurrency_limit=1, **events)
        return page


def serve(asker: Asker) -> None:
    """Show the page until a signal comes, then remove what was given to it. VQAError where it cannot listen."""
    with tempfile.TemporaryDirectory(prefix="surgvivqa_app_", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = Page(asker, folder).build()
        try:
            _, url, _ = page.launch(
                **{"share": False, "mcp_server": False, "ssr_mode": False, "pwa": False, "run_history": False},
                **{"max_file_size": MAX_UPLOAD_BYTES, "enable_monitoring": False, "footer_links": []},
                **{"css": STYLE, "quiet": True, "prevent_thread_lock": True},
            )
        except OSError as error:
            raise vqa.VQAError(f"{vqa.first_line(error)}; see GRADIO_SERVER_NAME and GRADIO_SERVER_PORT") from error
        print(f"✓ Ask at {url}", flush=True)
        signal.pause()


def main(argv: Sequence[str] | None = None) -> int:
    """Load the model and show the page, until a signal comes."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    load_gradio()

    def stop(signum: int, _frame) -> None:
        raise vqa.Interrupted(signum, "the page is closed")

    for number in vqa.STOP_SIGNALS:
        signal.signal(number, stop)
    try:
        ev.load_libraries()
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        compiled = device.type == "cuda" and args.compile_layers == "True"
        if compiled:
            vqa.check_compiler(device.type)
        chosen = ev.choose_model(args, device)
        ev.check_weights(chosen, device)
        rows = read_rows(args, chosen.patterns)
        trained = ev.load_chosen_model(chosen, device)
    except ev.InputError as error:
        raise vqa.VQAError(str(error)) from error
    asker = Asker(trained, rows, chosen.inputs.max_eval_frames, args.max_new_tokens)
    frames = vqa.select_frames(asker.clip_of(rows[0]).frames, asker.max_frames)
    trained.model.warm_up(frames, args.max_new_tokens, compiled)
    serve(asker)
    return 0


if __name__ == "__main__":
    vqa.run(main)
