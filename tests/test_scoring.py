"""The scoring rules, stated by literal cases: how models really phrase answers to the 20 question types."""

import itertools
import re
from fractions import Fraction
from math import comb

import pytest

import evaluate_checkpoint as ev

# Question type, option asked for, + right or - wrong by `choice`: predictions. "\\n" is where a generation ran past the
# end of its turn.
CHOICE = """\
blue_dye_presence no + No, contrast is not visible on the mucosal surface. | No blue dye. |
    There is no blue dye visible. | Not visible.
blue_dye_presence no - The word "mucosal" is mentioned in the first image. | normal mucosa | Blue dye is present |
    The mucosa is stained blue
blue_dye_presence yes + The mucosa is stained blue
endoscope_visibility no + The endoscope is not visible | no endoscope is seen | No endoscope |
    I don't see the endoscope. | Cannot see any endoscope
endoscope_visibility yes + The endoscope body is clearly visible in the frame
endoscope_visibility no - Normal mucosa is visible
endoscope_visibility yes - Normal mucosa is visible
fluid_occlusion_level complete - not completely blocking | incomplete | The view is completely clear. |
    almost completely blocked | completely absent | Severe. | Partially blocked, not completely. |
    The mucosa is completely visible. | There is a full view.
fluid_occlusion_level absent - not completely blocking | The fluid is not completely blocking the view. |
    not absent | absent or complete
fluid_occlusion_level complete + Fluid completely covers the lens. | Complete. |
    The view is fully obscured by fluid. | Fluid completely obscures the clean mucosa. | Fluid covers the whole view.
fluid_occlusion_level absent + No fluid. | none | There is no fluid occlusion. | The view is completely clear. |
    completely absent | Fluid does not obscure the view | The view is free of fluid. | The view is clear of fluid. |
    Clean mucosa stays visible without any fluid.
flush_action no + There is no flushing observed. | There is no flushing | No flushing | The endoscopist isn’t flushing
flush_action yes - Is the endoscope flushing the scene in these frames
flush_action yes + The Endoscope is flushing the scene in these frames. |
    Yes, the endoscopist appears to be flushing the scene in these frames.
lesion_histology_extended adenoma + adenomatous | Tubular adenoma
lesion_histology_extended adenoma - adenocarcinoma | non-adenomatous | Sessile serrated adenoma
lesion_histology_extended hyperplastic + Hyperplastic polyp | Not adenoma, hyperplastic.
lesion_histology_extended hyperplastic - hyperplastic or adenoma | not hyperplastic |
    Histology corresponds to adenoma.
lesion_motion_direction left - The lesion moves toward the upper-left. | upper-left | from left to right |
    The lesion does not move left. | The lesion moves left or right
lesion_motion_direction left + The lesion drifts to the left over the frames. | Leftward |
    The lesion is still drifting left.
lesion_motion_direction down + Downward. | downwards
lesion_motion_direction up - up and to the left | It shows a close-up of the lesion
lesion_motion_direction right + from left to right
lesion_motion_direction stable + The lesion does not move. | No drift | Still.
lesion_motion_direction stable - The lesion does not move left. | not stable
lesion_motion_direction up + The lesion shifts upwards
lesion_motion_direction right - bright
lesion_screen_position upper-left + upper left | top-left corner
lesion_screen_position upper-right + Right upper quadrant
lesion_screen_position upper-left - left
lesion_screen_position lower-left - The lesion appears in the right screen quadrant. | lower left or lower right |
    lower-left/right | center
lesion_screen_position lower-left + The lesion appears in the lower left quadrant. | bottom‑left
lesion_screen_position lower-right + Not the upper-left but the lower-right quadrant.
lesion_site sigma + sigmoid colon
lesion_site sigma - rectosigmoid | Recto-sigmoid junction
lesion_site ascending - The descending colon
lesion_site descending + descending colon
lesion_site rectum + rectal
lesion_site rectum - Cecum | the sigma and the rectum
lesion_site ascending + ascending colon
lesion_size_range <5 + <5 mm | < 5mm | less than 5 mm | smaller than 5 millimetres | less than five millimeters |
    ＜5 mm
lesion_size_range <5 - 5-10 mm | The lesion size falls into the 5 to 9.9 millimeter bracket. | 10-20 mm. | <50 mm |
    <5 cm | <5.5 mm | >5 mm | <5 or 5-10 | not less than 5 mm | 3 mm | ≤5 mm | 5 mm | 5–10 mm |
    less than or equal to 5 mm | Into which millimeter bracket does the lesion size fall
lighting_mode NBI +
    The sequence is illuminated by Narrow Band Imaging (NBI), as indicated by the 'NBI' label in the corner. |
    not WL but NBI
lighting_mode NBI - White light. | NBI or white light | NBI/WL | NBI light is off
mucosa_visibility no + The mucosa is obscured. | Clean mucosa is not visible | The mucosa cannot be seen clearly |
    No — clean mucosa is not visible
mucosa_visibility yes + Clean mucosa is visible | Yes, you can clearly observe clean mucosa in these frames. |
    You can clearly see clean mucosa. | Yes, nothing blocks the view of the mucosa.
mucosa_visibility no - Clean mucosa is not obscured | normal mucosa | No, clean mucosa is visible |
    Is clean mucosa visible in this sequence?
nbi_status no + white light | NBI is off. | No, these frames are not captured using NBI mode. |
    No, white light instead of NBI. | WL rather than NBI | No NBI light.
nbi_status yes + The frames were captured using NBI mode. | Narrow-band imaging
nbi_status yes - The frames were captured using MBI mode. | No, NBI light is on.
nbi_status no - Yes, WL light is on.
occlusion_check no + No, it does not. | No, there is no obstruction blocking the field of view. |
    The view is clear. | The view is not blocked | The view is unobstructed | Nothing blocks the view.
occlusion_check yes + Yes, a close up obstruction blocks the field of view. | The view is obstructed
occlusion_check no - The view is not completely blocked
occlusion_check yes - The view is unobstructed
scope_backward_motion yes + Yes, the scope is withdrawing. | The scope is pulled back.
scope_backward_motion no + The scope is moving forward.
scope_backward_motion yes - The scope is advancing and withdrawing.
scope_forward_motion yes + The scope is advancing.
scope_forward_motion no + The scope is not moving. | No the scope is withdrawing |
    The scope moves neither forward nor backward.
scope_forward_motion no - The scope is not withdrawing. | No, the scope is advancing.
scope_forward_motion yes - The scope is not withdrawing.
scope_motion yes + The scope is actively moving throughout this clip. | The scope is still moving. | It is. |
    Is the scope moving? Yes. | The answer is yes | Yes yes
scope_motion no - Yes, the scope is not moving | The scope is not advancing. | Yes or no | Yes/No |
    No\\nassistant\\nYes | I can't tell if the scope is moving.
scope_motion yes - Yes, the scope is not moving | Yes or no | Yes. No. |
    It is difficult to see if the scope is moving.
scope_motion no + The scope is stationary | There is no motion. | no | NO. | The scope isn't moving. |
    The scope is still. | No, it is not. | It is not. | The answer is: no. | The scope isnt moving |
    The scope doesn't move.
scope_motion_type advancing - The scope is primarily advancing or withdrawing in this sequence. |
    not only advancing but also withdrawing
scope_motion_type withdrawing + Not advancing but withdrawing. | Withdrawing | The scope is being withdrawn.
scope_motion_type withdrawing - not advancing
scope_motion_type advancing + moving forward
scope_outside no - Yes | normal | Nothing unusual is going on | I cannot tell whether the scope is outside. | Unknown
scope_outside yes + The scope is positioned outside the patient here. | Yes, no longer inside the patient. |
    The scope is out of the body.
scope_outside yes - IS THE SCOPE POSITIONED OUTSIDE THE PATIENT
scope_outside no + No, the scope is positioned inside the patient. | The scope is not outside the patient. |
    The scope remains in the patient | **No** | It is inside, not outside.
tool_catheter_check no + The tool is a forceps | Not a catheter | not a catheter but a snare |
    There is no tool visible
tool_catheter_check yes + It is a catheter | Yes, the catheter is visible; no forceps.
tool_catheter_check yes - Yes, the tool is a snare
tool_catheter_check no - The tool cannot be identified.
tool_identification forceps + Endoscopic biopsy forceps | Forcep
tool_identification forceps - An endoscope is present in this clip.
tool_identification snare - Snare or forceps | Not a snare.
tool_identification snare + no forceps, a snare
tool_identification catheter + Catheters are visible
"""

# What a denial denies, and what agrees: in the same form. Each line has readings that rules by words alone get wrong.
DENIALS = """\
blue_dye_presence no - No polyp is visible. | No visible bleeding. | The lesion is not visible. |
    The endoscope is not visible. | No water is visible. | There is no doubt that blue dye is visible.
blue_dye_presence yes + Yes, blue dye is visible, and no polyp is present. | There is no doubt that blue dye is visible.
blue_dye_presence no + The mucosa is not stained with blue dye. | There is no doubt that no dye is visible. | None.
endoscope_visibility no - No polyp is visible. | The lesion is not seen. | The endoscope does not touch the wall. |
    No forceps are seen.
endoscope_visibility yes + Yes, the endoscope is visible and no lesion is present.
fluid_occlusion_level absent - No polyp obscures the view. | The lesion is absent.
fluid_occlusion_level absent + Fluid is not present.
fluid_occlusion_level complete + There is no doubt that fluid completely covers the lens.
flush_action no - Flushing does not obscure the view.
lesion_motion_direction stable - The scope does not move. | No tool moves. | No scope movement.
mucosa_visibility yes + Yes, in the initial frames (1-4), the mucosa appears clean, with no visible lesions. |
    Yes, the mucosa appears clean and healthy, with no visible lesions, ulcers, or abnormal growths. |
    Yes, clean mucosa is visible in all frames. There are no visible ulcers. |
    Clean mucosa is visible, no polyp is seen.
mucosa_visibility no - No lesions are visible. | The mucosa shows no lesions. | You cannot see lesions on the mucosa. |
    There are no visible ulcers on the mucosa. | No water is visible.
occlusion_check no - The polyp is not covered. | No polyp is obscured.
occlusion_check no + There is no doubt that the view is not blocked.
scope_backward_motion no - No polyp is pulled.
scope_motion yes - The answer is not yes. | I would not say yes. | Yes is not the right answer. |
    It is unclear whether the answer is yes.
scope_motion no - The answer is not no. | The lesion is not moving. | No lesion moves. | No movement of the lesion. |
    The polyp does not move. | The scope is not just moving.
scope_motion yes + No doubt. | There is no question about it. | The scope is not just moving but advancing.
scope_motion no + Not yes but no. | Absolutely not.
scope_outside no - No lesion is seen outside the colon. | The tool is not outside.
tool_catheter_check no - There is no doubt that a catheter is visible. | The tool is not touching the mucosa. |
    No lesion is seen near the catheter. | The catheter is not in the scope.
tool_catheter_check yes + There is no doubt that a catheter is visible. | Without any doubt the tool is a catheter. |
    There is no question that this is a catheter.
tool_catheter_check yes - I doubt that a catheter is visible.
tool_catheter_check no + There is no doubt that no catheter is visible.
"""

# Readings beside those, which any rule must keep.
KEPT = """\
blue_dye_presence no + No evidence of blue dye. | Dye on the mucosa is not visible. |
    It is not visible in these frames. | The frames do not show any dye. | Blue dye is absent. |
    No indication of dye. | Dye has not been applied.
endoscope_visibility no + No part of the endoscope is visible. | Not in view. | I see no endoscope.
fluid_occlusion_level absent + Fluid is absent. | There is no evidence of fluid. | No fluid blocks the view.
flush_action no + Flushing is not observed. | No water is being sprayed. | No active flushing is taking place.
lesion_motion_direction stable + No movement of the lesion is visible. | No significant motion.
mucosa_visibility no + I cannot see clean mucosa. | The mucosa does not appear clean. | Not clearly visible. |
    The mucosal surface is not visible.
mucosa_visibility no - Yes, the mucosa appears clean, with no visible lesions.
nbi_status no + NBI is not used. | They are not in NBI mode. | NBI light is not on. | The frames don't use NBI.
occlusion_check no + There is no close-up obstruction. | The field of view is not blocked.
scope_forward_motion no + The scope is not moving forward. | The scope is not being advanced.
scope_forward_motion no - The scope is not moving backward.
scope_motion yes - Neither yes nor no. | No doubt, the scope is not moving.
scope_motion no - No polyp is visible. | No doubt. | Neither yes nor no.
scope_motion no + I do not think the scope is moving. | No. No doubt about it. | The scope is no longer moving. |
    The scope does not appear to be moving. | I do not see any movement. | No, it rests and no polyp is visible. |
    I do not think it moves.
scope_outside no + The scope is not positioned outside the patient.
scope_outside no - Not visible.
tool_catheter_check no + I do not think a catheter is visible. | It is not true that a catheter is visible. |
    No catheter can be seen. | The tool does not look like a catheter.
tool_catheter_check no - No polyp is visible. | There is some doubt that a catheter is visible.
"""

# Every wording of a gold answer in REAL-Colon-VQA: question type, then short answer = full answer.
GOLD = """\
blue_dye_presence: no = No, no dye is visible on the mucosa.
endoscope_visibility: no = No, the endoscope body is not visible. |
    yes = Yes, the endoscope body is visible in the frames.
fluid_occlusion_level: absent = Fluid occlusion is absent and clean mucosa stays visible. |
    complete = Fluid occlusion completely obscures the view.
flush_action: no = No, there is no flushing observed. | yes = Yes, the endoscopist is flushing the scene.
lesion_histology_extended: adenoma = Histology corresponds to adenoma. |
    hyperplastic = Histology corresponds to hyperplastic.
lesion_motion_direction: down = The lesion shifts downward across the frames. |
    left = The lesion drifts toward the left side of the screen. |
    right = The lesion drifts toward the right side of the screen. |
    stable = The lesion stays stable without noticeable movement. | up = The lesion shifts upward across the frames.
lesion_screen_position: lower-left = The lesion appears in the lower-left quadrant of the screen. |
    lower-right = The lesion appears in the lower-right quadrant of the screen. |
    upper-left = The lesion appears in the upper-left quadrant of the screen. |
    upper-right = The lesion appears in the upper-right quadrant of the screen.
lesion_site: ascending = The lesion is located in the ascending. |
    descending = The lesion is located in the descending. | rectum = The lesion is located in the rectum. |
    sigma = The lesion is located in the sigma.
lesion_size_range: <5 = The lesion is <5 mm.
lighting_mode: NBI = NBI light is on in this sequence.
mucosa_visibility: no = No, clean mucosa is not consistently visible. |
    yes = Yes, clean mucosa is visible across frames.
nbi_status: no = No, WL light is on instead. | yes = Yes, NBI light is on in these frames.
occlusion_check: no = No, clean mucosa stays visible without obstruction. |
    yes = Yes, a close-up obstruction blocks the view.
scope_backward_motion: no = No, the scope is advancing. | yes = Yes, the scope is withdrawing.
scope_forward_motion: no = No, the scope is withdrawing. | yes = Yes, the scope is advancing.
scope_motion: no = No, the scope is not moving in these frames. | yes = Yes, the scope is moving across the frames.
scope_motion_type: advancing = The scope is primarily advancing. | withdrawing = The scope is primarily withdrawing.
scope_outside: no = No, the scope stays within the patient. | yes = Yes, the scope is outside the patient.
tool_catheter_check: no = No, the visible tool is not a catheter. | yes = Yes, the visible tool is a catheter.
tool_identification: catheter = Catheter is visible on screen. | forceps = Forceps are visible on screen. |
    snare = Snare is visible on screen.
"""


def parsed(table):
    """(head, parts) of each entry; lines that are indented go on."""
    return [
        (entry.split(" ", 1)[0].rstrip(":"), entry.split(" ", 1)[1])
        for entry in re.sub(r"\n +", " ", table).splitlines()
    ]


CHOICE_CASES = [
    (kind, gold, sign == "+", [text.strip().replace("\\n", "\n") for text in texts.split("|")])
    for kind, entry in parsed(CHOICE + DENIALS + KEPT)
    for gold, sign, texts in [entry.split(" ", 2)]
]
GOLD_ANSWERS = [
    (kind, *(word.strip() for word in part.split(" = "))) for kind, entry in parsed(GOLD) for part in entry.split("|")
]


def make_row(number, kind="scope_motion", short="yes", answer=None, video="v1", question=None, **more):
    """An annotation row with the id q{number}."""
    texts = {"question": question or f"About {kind}?", "answer": answer or short, "short_answer": short}
    return {
        "id": f"q{number}",
        "video_id": video,
        "question_type": kind,
        **texts,
        "frames": [f"{video}_{number}"],
        **more,
    }


def scored(rows, texts, **fields):
    """Score `rows` with one text each."""
    pairs = zip(rows, texts, strict=True)
    return ev.score_rows(rows, {ev.row_key(row): {"predicted_answer": text, **fields} for row, text in pairs})


# --- choice, contains and strict -------------------------------------------------------------------------------------


def test_the_table_has_the_20_types():
    assert sorted(ev.CLOSED_ANSWERS) == sorted({kind for kind, _, _ in GOLD_ANSWERS})
    assert (len(ev.CLOSED_ANSWERS), sum(len(case[3]) for case in CHOICE_CASES), len(GOLD_ANSWERS)) == (20, 350, 45)


@pytest.mark.parametrize("kind", sorted({kind for kind, *_ in CHOICE_CASES}))
def test_choice_on_literal_predictions(kind):
    cases = [(text, gold, right) for of, gold, right, texts in CHOICE_CASES if of == kind for text in texts]
    assert [(text, gold, ev.judge(text, kind, gold, "-")["choice"]) for text, gold, _ in cases] == cases


def test_gold_answers_are_right_on_every_metric_and_wrong_for_every_other_answer_of_their_type():
    everything = dict.fromkeys(ev.METRICS, True)
    for kind, short, answer in GOLD_ANSWERS:
        for text in (answer, short, answer.upper(), f" {answer}\n", short.rstrip(".") + "."):
            assert ev.judge(text, kind, short, answer) == everything, text
        for other in {gold for of, gold, _ in GOLD_ANSWERS if of == kind} - {short}:
            assert not ev.judge(answer, kind, other, "-")["choice"], (answer, other)


def test_choice_is_strict_where_the_table_does_not_know_the_type_or_the_answer():
    assert ev.judge("Two.", "polyp_count", "two", "There are two.")["choice"]
    assert not ev.judge("I see two", "polyp_count", "two", "There are two.")["choice"]
    assert ev.judge("ileum", "lesion_site", "ileum", "-")["choice"]
    rows = [make_row(1, "polyp_count", "two"), make_row(2, "lesion_site", "ileum"), make_row(3)]
    summary = ev.summarise(rows, scored(rows, ["two", "ileum", "yes"]))
    assert summary["types_without_options"] == ["lesion_site", "polyp_count"]


@pytest.mark.parametrize(
    ("text", "short", "right"),
    [
        ("The mucosa is normal.", "no", True),  # the seed's rule and its false credits, kept to be comparable
        ("not completely blocking", "complete", True),
        ("toward the upper-left", "left", True),
        ("Advancing or withdrawing", "advancing", True),
        ("Upper left.", "upper-left", False),
        ("nbi", "NBI", True),
        ("", "no", False),
    ],
)
def test_contains_is_the_seeds_rule(text, short, right):
    assert ev.judge(text, "scope_motion", short, "-")["contains"] is right


@pytest.mark.parametrize(
    ("text", "short", "right"),
    [
        ("The mucosa is normal.", "no", False),
        ("No, nothing.", "no", True),
        ("YES", "yes", True),
        ("It covers the view completely.", "complete", True),
        ("Complete", "complete", True),
        ("incompletely", "complete", False),
        ("It shifts downward.", "down", True),
        ("upwards", "up", False),
        ("Upward.", "up", True),
        ("leftward", "left", False),
        ("The lesion is <5 mm.", "<5", True),
        ("<50 mm", "<5", False),
        ("the upper-left quadrant", "upper-left", True),
        ("nbi", "NBI", True),
        ("", "no", False),
    ],
)
def test_token_is_the_authors_rule(text, short, right):
    assert ev.judge(text, "scope_motion", short, "-")["token"] is right


def test_token_and_contains_over_rows_as_they_are_published():
    shorts = ["no", "no", "yes", "complete"]
    texts = ["No", "Yes, clean mucosa is visible, showing the normal lining.", "Yes.", "Mild"]
    metrics = ev.summarise(rows := [make_row(n, short=short) for n, short in enumerate(shorts)], scored(rows, texts))
    right = {metric: metrics["metrics"][metric]["correct"] for metric in ("token", "contains")}
    assert right == {"token": 2, "contains": 3}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<think>No, it rests. Or not?</think>Yes.", True),
        ("It is no\n</think>\n\nyes", True),  # the template held the opening mark
        ("<THINK>no</THINK> yes", True),
        ("<think>yes</think> No.", False),
        ("<think>yes, it moves, so the answer is", False),  # cut at the length limit
    ],
)
def test_thoughts_are_cut_off_before_scoring_and_said(text, right):
    kept = ev.judge(text, "scope_motion", "yes", "Yes, it moves.")
    assert kept == dict.fromkeys(ev.METRICS, right)
    warnings = ev.answer_warnings(scored([make_row(1), make_row(2)], [text, "yes"], finish_reason="eos"))
    assert warnings[0].startswith("1 of 2 answers hold <think>")
    assert ev.predicted_label("<think>no</think> It moves", "scope_motion") == "yes"


def test_strict_allows_case_punctuation_and_hyphens_only():
    right = ["upper-left", "Upper left.", "the lesion appears in the upper-left quadrant"]
    for text in (*right, "It is upper-left", "upper-left upper-left", "left"):
        found = ev.judge(text, "lesion_screen_position", "upper-left", "The lesion appears in the upper-left quadrant.")
        assert found["strict"] is (text in right), text


def test_normalise():
    cases = {
        "Upper-Left.": "upper left",
        "It isn’t; it can't.": "it is not it can not",
        "5–10mm / < 5 MM": "5 to 10 mm or <5 mm",
        "9.9 mm.": "9.9 mm",
        "  two\nlines ": "two lines",
        "No — never": "no never",
    }
    assert {text: ev.normalise(text) for text in cases} == cases


def test_loops():
    looping = ["ForCanBeConverted" * 4, "no no no no", "Yes, the scope is moving. " * 4, "!" * 10]
    not_yet = ["ForCanBeConverted" * 3, "no no no", "!" * 9, "No, the endoscope body is not visible.", ""]
    assert [ev.loops(text) for text in (*looping, *not_yet)] == [True] * 4 + [False] * 5
    for text in ("not " + "visibly visible observable " * 300, "no signs of " * 300):  # is read in no time
        assert not ev.judge(text, "mucosa_visibility", "no", "-")["choice"]


# --- intervals and tests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # the score intervals of Newcombe, Statistics in Medicine 17, 1998, 857-872, table I
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_interval(right, n, low, high):
    assert ev.wilson_interval(right, n) == pytest.approx((low, high), abs=5e-5)
    assert ev.wilson_interval(0, n)[0] == 0.0 and ev.wilson_interval(n, n)[1] == 1.0


def test_mcnemar():
    cases = {(0, 0): 1.0, (0, 3): 2 * 1 / 8, (5, 5): 1.0, (2, 12): 2 * (1 + 14 + 91) / 2**14}
    cases |= {
        (12, 2): cases[2, 12],
        (2400, 2600): float(Fraction(2 * sum(comb(5000, k) for k in range(2401)), 2**5000)),
    }
    assert {counts: ev.mcnemar_exact(*counts) for counts in cases} == cases
    assert 0 <= ev.mcnemar_exact(0, 5000) < 1e-300


@pytest.mark.parametrize(
    ("counts", "low", "high"),  # both, only A, only B, neither
    [
        ((36, 2, 12, 0), 0.0569, 0.3404),  # Newcombe, Statistics in Medicine 17, 1998, 2635-2650, method 10
        ((36, 12, 2, 0), -0.3404, -0.0569),
        ((50, 0, 0, 0), -0.0713, 0.0713),  # agreement everywhere leaves the doubt of n = 50: Wilson's 1 - 0.9287
    ],
)
def test_paired_difference_interval(counts, low, high):
    assert ev.paired_difference_interval(*counts) == pytest.approx((low, high), abs=5e-5)


def test_paired_comparison_counts_the_rows_that_one_side_has_right():
    rows = [make_row(n) for n in range(4)]
    a, b = scored(rows, ["yes", "yes", "no", "no"]), scored(rows, ["yes", "no", "no", None])
    pair = ev.paired_comparison(a, b, "choice")
    assert (pair["n"], pair["only_a"], pair["only_b"], pair["p"]) == (4, 1, 0, 1.0)
    assert (pair["accuracy_a"], pair["accuracy_b"], pair["difference"]) == (0.5, 0.25, -0.25)
    with pytest.raises(ValueError, match="same rows"):
        ev.paired_comparison(a, b[1:], "choice")


def test_nothing_is_said_over_videos_below_six_nor_with_a_width_of_zero():
    rows = [make_row(n, video=f"v{n % 6}") for n in range(60)]
    texts = ["no" if row["video_id"] == "v0" else "yes" for row in rows]
    low, high = ev.video_interval(scored(rows, texts), "choice")
    assert 0.4 < low < 5 / 6 < high == 1.0
    assert ev.video_interval(scored(rows, ["yes"] * 60), "choice") is None
    five = [row for row in rows if row["video_id"] != "v1"]
    found = scored(five, ["no" if row["video_id"] == "v0" else "yes" for row in five])
    assert ev.video_interval(found, "choice") is None
    assert ev.paired_comparison(found, found, "choice")["p_videos"] is None


def test_a_difference_that_every_video_shows_and_one_that_one_video_shows():
    """25 rows of 48 that only B has right, either way; rows of a video go together."""
    rows = [make_row(n, video=f"v{n % 6}") for n in range(48)]
    a = scored(rows, ["no"] * 48)
    everywhere = scored(rows, ["yes" if n < 24 else "no" for n in range(48)])
    one_video = scored(rows, ["yes" if row["video_id"] == "v0" else "no" for row in rows])
    pairs = [ev.paired_comparison(a, b, "choice") for b in (everywhere, one_video)]
    assert [(pair["n_videos"], pair["p_videos"]) for pair in pairs] == [(6, 2 / 2**6), (6, 1.0)]
    assert all(pair["p"] < 0.01 for pair in pairs)


def test_sign_flip_test():
    for differences in ([3, -1, 0, 2, 2, 5], [1] * 6, [0] * 7, [-4, 1, 1, 1, 1, 1, 1]):
        sums = [
            sum(s * d for s, d in zip(signs, differences, strict=True))
            for signs in itertools.product((1, -1), repeat=len(differences))
        ]
        far = sum(abs(total) >= abs(sum(differences)) for total in sums)
        assert ev.sign_flip_test(differences) == far / len(sums)


def test_power_of_mcnemar():
    n, only_a, only_b = 12, 0.05, 0.5
    exact = sum(
        comb(n, a) * comb(n - a, b) * only_a**a * only_b**b * (1 - only_a - only_b) ** (n - a - b)
        for a in range(n + 1)
        for b in range(n + 1 - a)
        if ev.mcnemar_exact(a, b) < 0.05 and b > a
    )
    assert ev.mcnemar_power(n, only_a + only_b, only_b - only_a) == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize(
    ("n", "discordant", "least"),
    [
        (5, 5, None),  # 5 of 5 has p = 0.0625
        (6, 0, 0.964),  # all six must fall to one side: 0.8 ** (1 / 6)
        (
            1000,
            360,
            0.054,
        ),  # (1.96 sqrt(p) + 0.84 sqrt(p - d^2)) / sqrt(n) = 0.053 (Connor, Biometrics 43, 1987, 207-211)
    ],
)
def test_detectable_difference(n, discordant, least):
    assert ev.detectable_difference(n, discordant) == least


# --- reference lines and warnings ------------------------------------------------------------------------------------


def test_reference_lines():
    pairs = [("a", "yes"), ("a", "no"), ("b", "left"), ("b", "left"), ("b", "down")]
    assert ev.majority_answers(pairs) == {"a": "no", "b": "left"}  # ties go to the first in the alphabet
    rows = [make_row(n, "scope_motion", short) for n, short in enumerate(["yes", "yes", "no"])]
    rows += [make_row(9, "lighting_mode", "NBI"), make_row(10, "lesion_site", "sigma")]
    lines = ev.reference_lines(scored(rows, ["x"] * 5), {"scope_motion": "no", "lighting_mode": "nbi"})
    assert lines == {
        "chance": pytest.approx((3 * 1 / 2 + 1 + 1) / 5),
        "train_majority": pytest.approx((1 + 1 + 0) / 5),  # lesion_site is not in the training file: wrong
        "test_majority": pytest.approx((2 + 1 + 1) / 5),
    }
    assert ev.reference_lines(scored(rows, ["x"] * 5), None)["train_majority"] is None
    assert ev.reference_lines([], {}) == {"chance": None, "train_majority": None, "test_majority": None}


def balanced_rows(n, shorts=("yes", "no"), kind="scope_motion"):
    return [make_row(i, kind, shorts[i % len(shorts)], video=f"v{i % 2}") for i in range(n)]


def balanced_videos(n):
    return [make_row(i, video=f"v{i}") for i in range(n)]


def test_one_answer_for_a_balanced_type_is_mode_collapse():
    """Not where gold is lopsided, constant or rare."""
    nineteen = ["The scope is moving."] * 10 + ["Yes."] * 9 + ["no"]
    (warning,) = ev.collapse_warnings(scored(balanced_rows(20), nineteen))
    assert warning.startswith("mode collapse in 1 of 1 question types: scope_motion 'yes' in 19 of 20 rows")
    assert ev.collapse_warnings(scored(balanced_rows(20), ["yes"] * 18 + ["no"] * 2)) == []  # 90 % is not over 90 %
    for rows in (balanced_rows(20, ("yes", "yes", "yes", "no")), balanced_rows(20, ("yes",)), balanced_rows(9)):
        assert ev.collapse_warnings(scored(rows, ["yes"] * len(rows))) == []


def test_fewer_than_half_of_the_options_is_mode_collapse():
    rows = balanced_rows(20, ("left", "right", "up", "down", "stable"), "lesion_motion_direction")
    (warning,) = ev.collapse_warnings(scored(rows, ["left", "up"] * 10))
    assert "lesion_motion_direction 2 of 5 gold answers" in warning
    assert ev.collapse_warnings(scored(rows, ["left", "up", "down", "left"] * 5)) == []


def test_families_are_rows_of_the_table_and_of_the_summary():
    kinds = ("scope_motion", "nbi_status", "scope_motion_type", "blue_dye_presence", "scope_motion")
    shorts = ("yes", "no", "advancing", "no", "no")
    rows = [make_row(i, kind, short) for i, (kind, short) in enumerate(zip(kinds, shorts, strict=True))]
    training = {"majority": {"scope_motion": "no", "scope_motion_type": "advancing"}, "warnings": []}
    found = scored(rows, ["yes", "no", "advancing", "yes", "yes"])
    summary = ev.summarise(rows, found, manifest={"training": training})
    assert list(summary["by_family"]) == ["static scene", "motion", "other"]
    motion = summary["by_family"]["motion"]
    assert (motion["types"], motion["n"]) == (["scope_motion", "scope_motion_type"], 3)
    assert motion["choice"] == ev.accuracy([found[i] for i in (0, 2, 4)], "choice") and motion["choice"]["correct"] == 2
    assert [motion[line] for line in ev.REFERENCES] == [pytest.approx(share) for share in (2 / 3, 2 / 3, 2 / 3)]
    _, cells = ev.types_table(summary["by_type"], summary["by_family"])
    assert [row[0] for row in cells[-3:]] == ["[static scene]", "[motion]", "[other]"]
    assert cells[-2] == ("[motion]", 3, 2 / 3, "21-94", "", *(motion[line] for line in ev.REFERENCES))
    assert "\n[motion]" in ev.render_summary(summary)
    assert {kind for kinds in ev.FAMILIES.values() for kind in kinds} < set(ev.CLOSED_ANSWERS)


def test_constant_answers_are_one_warning_and_none_where_gold_is_lopsided():
    kinds = ("scope_motion", "flush_action", "scope_outside")
    rows = [row for kind in kinds for row in balanced_rows(20, kind=kind)]
    lopsided = balanced_rows(20, ("left",) * 6 + ("right", "up", "down", "stable"), "lesion_motion_direction")
    found = scored(rows + lopsided, ["yes"] * len(rows) + ["left"] * len(lopsided))
    (warning,) = ev.collapse_warnings(found)
    assert warning.startswith("mode collapse in 3 of 4 question types") and all(kind in warning for kind in kinds)
    assert "lesion_motion_direction" not in warning
    header, cells = ev.types_table(ev.summarise(rows + lopsided, found)["by_type"], {})
    distinct = {row[0]: row[header.index("distinct")] for row in cells}
    assert distinct == {"lesion_motion_direction": "1/5", **dict.fromkeys(kinds, "1/2")}


def test_answer_warnings():
    rows = balanced_rows(4)
    answers = {
        ev.row_key(rows[0]): {"predicted_answer": "ab" * 8, "finish_reason": "length"},
        ev.row_key(rows[1]): {"predicted_answer": None, "finish_reason": "error", "error": "half a JPEG"},
        ev.row_key(rows[2]): {"predicted_answer": "yes", "finish_reason": "eos"},
    }
    found = ev.score_rows(rows, answers)
    assert ev.finish_counts(found) == {"eos": 1, "length": 1, "error": 1, "missing": 1, "unknown": 0, "loops": 1}
    warnings = ev.answer_warnings(found)[:4]
    assert all(warning.startswith("1 of 4 ") for warning in warnings)
    nouns = ("length limit", "repetition loops", "failed", "no prediction")
    assert [noun in warning for noun, warning in zip(nouns, warnings, strict=True)] == [True] * 4
    few, six = (ev.answer_warnings(scored(part, ["yes"] * len(part))) for part in (rows, balanced_videos(6)))
    assert "2 patients (one video each: v0, v1)" in few[0] and six == []


def test_overlap_counts_frames_and_ids_within_a_video():
    train = [make_row(1, video="v1"), make_row(2, video="v2", frames=["v2_7", "v2_8"])]
    rows = [
        make_row(1, video="v1"),  # same id and frame
        make_row(2, video="v3"),  # same id in another video: another sample
        make_row(5, video="v2", kind="x", frames=["v2_8", "v2_9"]),
    ]
    frames, ids = ev.overlap_warnings(rows, train)
    assert frames.startswith("not held out: 2 of 3 rows") and "frame" in frames
    assert ids.startswith("not held out: 1 of 3 rows") and "id" in ids
    assert ev.overlap_warnings(rows[1:2], train) == []


# --- summary ---------------------------------------------------------------------------------------------------------


def test_summary_of_two_types():
    rows = [make_row(n, "scope_motion", short) for n, short in enumerate(["yes", "no", "no"])]
    rows.append(make_row(3, "lighting_mode", "NBI"))
    train = [make_row(n, "scope_motion", "no", video="t") for n in range(2)]
    predictions = {
        ev.row_key(rows[0]): {"predicted_answer": "The scope is moving.", "finish_reason": "eos"},
        ev.row_key(rows[1]): {"predicted_answer": "normal", "finish_reason": "length"},
        ev.row_key(rows[3]): {"predicted_answer": None},
    }
    manifest = {"device": "cpu", "training": ev.compare_with_training(rows, train)}
    summary = ev.summarise(rows, ev.score_rows(rows, predictions), manifest=manifest)
    assert (summary["schema_version"], summary["manifest"]) == (1, manifest)
    assert (summary["n_total"], summary["n_scored"], summary["n_errors"], summary["n_missing"]) == (4, 2, 1, 1)
    assert summary["missing"] == ["v1/q2/scope_motion"]
    assert summary["failed"] == ["v1/q3/lighting_mode"]
    assert set(summary["metrics"]) == {"contains", "token", "strict", "choice"} and "arms" in summary
    choice = summary["metrics"]["choice"]
    assert (choice["accuracy"], choice["correct"], choice["n"]) == (1 / 4, 1, 4)
    assert (choice["ci95"], choice["ci95_videos"]) == (list(ev.wilson_interval(1, 4)), None)
    assert choice["macro"] == pytest.approx((1 / 3 + 0) / 2)
    assert summary["metrics"]["strict"]["accuracy"] == 0
    assert summary["metrics"]["contains"]["accuracy"] == 1 / 4  # "no" in "normal"; "yes" is not in the first answer

    def of(right):
        return {"accuracy": right / 3, "ci95": list(ev.wilson_interval(right, 3)), "n": 3, "correct": right}

    assert summary["by_type"]["scope_motion"] == {
        **{"n": 3, "choice": of(1), "strict": of(0), "token": of(0), "contains": of(1), "chance": 0.5},
        **{"train_majority": pytest.approx(2 / 3), "test_majority": pytest.approx(2 / 3)},
        **{"n_gold_answers": 2, "n_given_answers": 2},
    }
    assert summary["by_type"]["lighting_mode"]["train_majority"] is None  # the training file has no such type
    assert summary["baselines"] == {"chance": 2.5 / 4, "train_majority": 2 / 4, "test_majority": 3 / 4}
    part = summary["discriminative"]
    assert (part["n"], part["types"], part["types_excluded"]) == (3, ["scope_motion"], ["lighting_mode"])
    assert part["baselines"]["chance"] == 0.5
    assert summary["finish"] == {"eos": 1, "length": 1, "error": 1, "missing": 1, "unknown": 0, "loops": 0}
    everywhere, discriminative = summary["warnings"][:2]
    assert everywhere.startswith("below the training majority") and "50.0 %" in everywhere and "25.0 %" in everywhere
    assert "discriminative" in discriminative and "66.7 %" in discriminative and "33.3 %" in discriminative


def test_what_the_file_does_not_say_of_endings_is_not_counted():
    rows = balanced_rows(4)
    report = ev.render_summary(ev.summarise(rows, scored(rows, ["yes"] * 4)))
    assert "stopped by themselves" not in report and "4 of 4 answers the file does not say" in report
    answers = {ev.row_key(row): {"predicted_answer": "yes"} for row in rows}
    answers[ev.row_key(rows[0])]["finish_reason"] = "eos"
    report = ev.render_summary(ev.summarise(rows, ev.score_rows(rows, answers)))
    assert "1/1 stopped by themselves = 100.0 %; for 3 of 4 answers the file" in report


def test_without_discriminative_types_their_figures_are_null():
    rows = [make_row(1), make_row(2)]
    part = ev.summarise(rows, scored(rows, ["yes", "no"]))["discriminative"]
    figures = dict.fromkeys(("accuracy", "ci95", "macro", "ci95_videos")) | {"n": 0, "correct": 0}
    assert (part["n"], part["metrics"]["choice"]) == (0, figures)
    assert part["baselines"] == {"chance": None, "train_majority": None, "test_majority": None}


def test_report_fits_80_columns_and_names_the_baseline_beside_its_clips_alone(monkeypatch):
    kinds = [(kind, short, answer) for kind, short, answer in GOLD_ANSWERS for _ in range(3)]
    rows = [make_row(10**5 + n, kind, short, answer) for n, (kind, short, answer) in enumerate(kinds)]
    found = scored(rows, [row["answer"] for row in rows], finish_reason="eos")
    arms = ev.summarise_arms("audio", {"audio": found, "mismatched_audio": scored(rows, ["x"] * len(rows))}, FILES)
    manifest = {"training": ev.compare_with_training(rows, rows)}
    report = ev.render_summary(ev.summarise(rows, found, arms=arms, manifest=manifest))
    assert "46 %" not in report
    monkeypatch.setattr(ev, "ORIGINAL_CLIPS", ev.clips_digest(map(ev.row_key, rows[::-1])))
    report = ev.render_summary(ev.summarise(rows, found, arms=arms, manifest=manifest))
    assert max(map(len, report.splitlines())) <= 80
    for figure in ("135/135 correct = 100.0 %", "135/135 stopped by themselves = 100.0 %", "46 % baseline"):
        assert figure in report


# --- arms ------------------------------------------------------------------------------------------------------------

FILES = dict.fromkeys(ev.ARMS, "x.jsonl")


def arms_of(n, **right):
    """Arms over n rows, of which the first `right[arm]` are right, and their summary as text."""
    rows = balanced_rows(n)
    rows_of = {
        arm: scored(rows, [row["answer"] if i < k else "x" for i, row in enumerate(rows)]) for arm, k in right.items()
    }
    return ev.summarise_arms("audio", rows_of, FILES)


def test_arms_compare_with_the_main_arm():
    arms = arms_of(20, audio=20, black_frames=10)
    assert arms["audio"]["versus"] is None
    pair = arms["black_frames"]["versus"]["choice"]
    assert (pair["difference"], pair["only_a"], pair["only_b"], pair["p"]) == (-0.5, 10, 0, 2 / 2**10)


def test_arm_sentences():
    hear, see = ev.arm_sentences(arms_of(20, audio=20, mismatched_audio=10, silent_audio=0, black_frames=20))
    assert hear == (
        "Does it hear? Yes: with another question's speech, choice goes from 100.0 % to 50.0 % "
        "(difference -50.0 points, 95 % -70.1 to -24.3; p = 0.002; n 20); with silence in place of speech, choice goes "
        "from 100.0 % to 0.0 % (difference -100.0 points, 95 % -100.0 to -77.2; p < 0.001; n 20)."
    )
    assert see.startswith("Does it see? There is no sign of it: with black frames, choice goes from 100.0 % to 100.0 %")
    hear, see = ev.arm_sentences(arms_of(5, audio=5, mismatched_audio=2))
    assert hear.startswith("Does it hear? It may, but these rows are too few to tell: ")
    assert "p = 0.250; n 5" in hear
    assert see == "Does it see? Not tested: add mismatched_frames and black_frames to --arms."


@pytest.mark.parametrize(
    ("right", "verdict"),
    [
        ({"mismatched_audio": 0}, "It may, and silent_audio would tell: add it to --arms: with another question's"),
        ({"silent_audio": 0}, "It may, and mismatched_audio would tell: add it to --arms: with silence"),
        ({"mismatched_audio": 0, "silent_audio": 20}, "There is no sign of it: with another question's speech"),
        ({"mismatched_audio": 20, "silent_audio": 0}, "There is no sign of it: with another question's speech"),
        ({"mismatched_audio": 0, "silent_audio": 18}, "It may, but these rows are too few to tell: "),
        ({}, "Not tested: add mismatched_audio and silent_audio to --arms."),
    ],
)
def test_hearing_takes_a_loss_by_other_speech_and_by_silence(right, verdict):
    assert ev.arm_sentences(arms_of(20, audio=20, **right))[0].startswith(f"Does it hear? {verdict}")


@pytest.mark.parametrize(
    ("right", "verdict"),
    [
        ({"mismatched_frames": 20, "black_frames": 0}, "There is no sign of it: "),  # it says "I cannot tell" to black
        ({"black_frames": 0}, "It may, and mismatched_frames would tell: add it to --arms: with black frames"),
        ({"mismatched_frames": 0}, "It may, and black_frames would tell: add it to --arms: with the frames of another"),
        ({"mismatched_frames": 18, "black_frames": 0}, "It may, but these rows are too few to tell: "),
        ({"mismatched_frames": 0, "black_frames": 10}, "Yes: with the frames of another answer, choice goes from 100"),
        ({"shuffled_frames": 0, "first_frame": 0}, "Not tested: "),
    ],
)
def test_seeing_takes_a_loss_by_frames_of_another_answer_and_by_black_ones(right, verdict):
    assert ev.arm_sentences(arms_of(20, audio=20, **right))[1].startswith(f"Does it see? {verdict}")


def test_rows_that_borrow_no_frames_are_left_out_of_the_comparison_and_counted():
    rows = balanced_rows(20)
    texts = [row["answer"] for row in rows]
    rows_of = {"audio": scored(rows, texts), "mismatched_frames": scored(rows[:15], ["x"] * 15)}
    arms = ev.summarise_arms("audio", rows_of, FILES)
    part = arms["mismatched_frames"]
    assert sorted(part["left_out"]) == sorted(ev.key_text(ev.row_key(row)) for row in rows[15:])
    assert (part["versus"]["choice"]["n"], part["versus"]["choice"]["only_a"]) == (15, 15)
    assert arms["audio"]["left_out"] == []
    assert "In mismatched_frames 5 of 20 rows are left out" in " ".join(ev.render_arms(arms).split())


def test_what_was_done_to_borrowed_speech_is_told():
    rows = [{"audio_padded_samples": by} for by in (-1600, -320, 0, 800, -3200)] + [{"audio_file": "own.wav"}]
    borrowed = ev.summarise_borrowing(rows)
    assert borrowed == {
        "n": 5, "cut": {"n": 3, "seconds": [0.02, 0.1, 0.2]}, "padded": {"n": 1, "seconds": [0.05, 0.05, 0.05]}
    }  # fmt: skip
    arms = arms_of(20, audio=20, mismatched_audio=10)
    arms["mismatched_audio"]["borrowed"] = borrowed
    report = " ".join(ev.render_arms(arms).split())
    assert "Of 5 borrowed recordings 3 were cut by 0.02 to 0.20 s (median 0.10), 1 was padded by 0.05 to" in report


@pytest.mark.parametrize(
    ("gates", "warned"),
    [
        ({"speech": 0.0099, "frames": 1.0}, True),
        ({"speech": 0.011, "frames": 1.0}, False),
        ({"speech": None, "frames": 1.0}, False),
        (None, False),
    ],
)
def test_speech_that_moves_next_to_nothing_is_a_warning(gates, warned):
    rows = [make_row(1), make_row(2)]
    warnings = ev.summarise(rows, scored(rows, ["yes", "no"]), manifest=gates and {"gates": gates})["warnings"]
    assert any("speech hardly reaches" in line for line in warnings) == warned


def test_arms_table():
    table = [line.split() for line in ev.render_arms(arms_of(20, audio=20, mismatched_audio=10)).splitlines()]
    assert table[0] == ["arm", "choice", "%", "95", "%", "diff", "95", "%", "interval", "p"]
    assert table[1] == ["audio", "20/20", "100.0", "84-100"]
    assert table[2][:5] == ["mismatched_audio", "10/20", "50.0", "30-70", "-50.0"]


def test_mismatched_audio_borrows_from_another_type_whatever_the_order():
    rows = [make_row(n, kind) for n, kind in enumerate(["scope_motion", "scope_motion", "lesion_site", "nbi_status"])]
    samples = {ev.row_key(row): 16_000 for row in rows}
    contents = {key: key for key in samples}
    pairs = ev.pair_mismatched_audio(rows, samples, contents, seed=0)
    assert set(pairs) == {ev.row_key(row) for row in rows}
    assert all(key[2] != other[2] for key, other in pairs.items())
    assert ev.pair_mismatched_audio(rows[::-1], samples, contents, seed=0) == pairs
    assert any(ev.pair_mismatched_audio(rows, samples, contents, seed=seed) != pairs for seed in range(1, 9))
    same = ("Is it moving?", "is it moving", "Where?")  # and not the same words
    kinds = ("scope_motion", "flush_action", "lesion_site")
    rows = [make_row(n, kind, question=words) for n, (kind, words) in enumerate(zip(kinds, same, strict=True))]
    samples = {ev.row_key(row): 1000 * n + 1 for n, row in enumerate(rows)}
    contents = {key: key for key in samples}
    assert ev.pair_mismatched_audio(rows, samples, contents)[ev.row_key(rows[0])] == ev.row_key(rows[2])
    rows = [make_row(1), make_row(2)]
    with pytest.raises(ev.InputError, match="v1/q1/scope_motion"):  # which has nowhere to borrow from
        ev.pair_mismatched_audio(rows, dict.fromkeys(map(ev.row_key, rows), 1), contents)


def test_borrowed_speech_differs_least_in_length():
    kinds = ["scope_motion", "scope_motion", "lesion_site", "nbi_status", "flush_action"]
    rows = [make_row(n, kind) for n, kind in enumerate(kinds)]
    keys = [ev.row_key(row) for row in rows]
    contents = {key: key for key in keys}
    samples = dict(zip(keys, (1000, 1001, 900, 1101, None), strict=True))  # None: speech that cannot be read
    for seed in range(9):
        pairs = ev.pair_mismatched_audio(rows, samples, contents, seed)
        assert list(map(pairs.get, keys)) == [keys[2], keys[3], keys[0], keys[1], None]
    samples[keys[2]] = 899  # as far as the other
    drawn = {ev.pair_mismatched_audio(rows, samples, contents, seed)[keys[0]] for seed in range(20)}
    assert drawn == {keys[2], keys[3]}
    contents[keys[2]] = contents[keys[0]]  # its own recording under another name
    assert {ev.pair_mismatched_audio(rows, samples, contents, seed)[keys[0]] for seed in range(9)} == {keys[3]}
    contents |= {keys[3]: keys[0], keys[4]: keys[0]}
    with pytest.raises(ev.InputError, match=r"--arms mismatched_audio: v1/q0/scope_motion .* another recording"):
        ev.pair_mismatched_audio(rows, samples, contents)


def test_borrowed_frames_are_of_another_answer_of_the_nearest_size_whatever_the_order():
    golds = ["yes", "no", "no", "no", "no", "yes"]
    rows = [make_row(n, "scope_motion", gold) for n, gold in enumerate(golds)]
    rows += [make_row(6, "lighting_mode", "NBI"), make_row(7, "lighting_mode", "NBI"), make_row(8, "flush_action")]
    keys = [ev.row_key(row) for row in rows]
    clips = {key: (key, 8, (64, 48)) for key in keys[:-1]}  # the last has frames that cannot be read
    clips[keys[1]] = clips[keys[0]]  # the same clip, of another answer: it shows nothing else
    clips[keys[2]] = (keys[2], 6, (64, 48))
    clips[keys[3]] = (keys[3], 8, (64, 40))
    clips[keys[4]] = (keys[4], 8, (48, 48))
    pairs = ev.pair_mismatched_frames(rows, clips)
    assert (pairs[keys[0]], pairs[keys[1]]) == (keys[3], keys[5])
    assert pairs.keys() == {keys[n] for n in (0, 1, 3, 4, 5)}  # one answer a type, or no clip of its length: none
    assert ev.pair_mismatched_frames(rows[::-1], clips) == pairs
    clips[keys[4]] = (keys[4], 8, (72, 48))  # as far as the other
    assert {ev.pair_mismatched_frames(rows, clips, seed)[keys[0]] for seed in range(20)} == {keys[3], keys[4]}


@pytest.mark.parametrize(
    ("words", "leaked"),
    [
        ("<|audio_pad|>\n", []),
        ("Is the scope moving?\n", ["is", "moving", "scope", "the"]),
        ("MOVING\n", ["moving"]),
        ("removing\n", []),
    ],
)
def test_leaked_words(words, leaked):
    rest = "Answer the question concisely based on the visual and audio evidence.<|im_end|>"
    prompt, constant = f"<|im_start|>user\n{words}{rest}", f"<|im_start|>user\n{rest}"
    assert ev.leaked_words(prompt, "Is the scope moving?", constant) == leaked


# --- output rows -----------------------------------------------------------------------------------------------------


def test_answer_row():
    given = {"finish_reason": "eos", "n_tokens": 2, "input_mode": "audio", "audio_file": "q1.mp3"}
    given["audio_of"] = "v1/q2/lesion_site"
    row = ev.answer_row(make_row(1, "scope_motion", "no", "No, it rests."), "normal", **given)
    assert list(row.items()) == [
        *(("id", "q1"), ("video_id", "v1"), ("question_type", "scope_motion"), ("question", "About scope_motion?")),
        *(("ground_truth", "No, it rests."), ("short_answer", "no"), ("predicted_answer", "normal")),
        *(
            ("question_id", "q1"),
            ("exact_match", 1),
        ),  # as in the files of the public scripts, where it is by `contains`
        *(("correct", True), ("strict_correct", False), ("choice_correct", False), ("token_correct", False)),
        *given.items(),
    ]
