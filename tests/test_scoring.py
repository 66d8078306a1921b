"""The scoring rules, stated by literal cases: how models really phrase answers to the 20 question types."""

from fractions import Fraction
from math import comb

import pytest

import evaluate_checkpoint as ev

RIGHT, WRONG = True, False

# prediction, option asked for, right or wrong by `choice`. "\n" is where a generation ran past the end of its turn.
CHOICE_CASES = {
    "blue_dye_presence": [
        ("No, contrast is not visible on the mucosal surface.", "no", RIGHT),
        ('The word "mucosal" is mentioned in the first image.', "no", WRONG),
        ("normal mucosa", "no", WRONG),
        ("No blue dye.", "no", RIGHT),
        ("Blue dye is present", "no", WRONG),
        ("There is no blue dye visible.", "no", RIGHT),
        ("Not visible.", "no", RIGHT),
        ("The mucosa is stained blue", "no", WRONG),
        ("The mucosa is stained blue", "yes", RIGHT),
    ],
    "endoscope_visibility": [
        ("The endoscope is not visible", "no", RIGHT),
        ("The endoscope body is clearly visible in the frame", "yes", RIGHT),
        ("Normal mucosa is visible", "no", WRONG),
        ("Normal mucosa is visible", "yes", WRONG),
        ("no endoscope is seen", "no", RIGHT),
        ("No endoscope", "no", RIGHT),
        ("I don't see the endoscope.", "no", RIGHT),
        ("Cannot see any endoscope", "no", RIGHT),
    ],
    "fluid_occlusion_level": [
        ("not completely blocking", "complete", WRONG),
        ("not completely blocking", "absent", WRONG),
        ("The fluid is not completely blocking the view.", "absent", WRONG),
        ("incomplete", "complete", WRONG),
        ("Fluid completely covers the lens.", "complete", RIGHT),
        ("Complete.", "complete", RIGHT),
        ("No fluid.", "absent", RIGHT),
        ("none", "absent", RIGHT),
        ("There is no fluid occlusion.", "absent", RIGHT),
        ("The view is completely clear.", "absent", RIGHT),
        ("The view is completely clear.", "complete", WRONG),
        ("almost completely blocked", "complete", WRONG),
        ("not absent", "absent", WRONG),
        ("completely absent", "absent", RIGHT),
        ("completely absent", "complete", WRONG),
        ("Severe.", "complete", WRONG),
        ("absent or complete", "absent", WRONG),
        ("Partially blocked, not completely.", "complete", WRONG),
        ("Fluid does not obscure the view", "absent", RIGHT),
        ("The view is free of fluid.", "absent", RIGHT),
        ("The view is clear of fluid.", "absent", RIGHT),
        ("The view is fully obscured by fluid.", "complete", RIGHT),
        ("Clean mucosa stays visible without any fluid.", "absent", RIGHT),
        ("Fluid completely obscures the clean mucosa.", "complete", RIGHT),
        ("Fluid covers the whole view.", "complete", RIGHT),
        ("The mucosa is completely visible.", "complete", WRONG),
        ("There is a full view.", "complete", WRONG),
    ],
    "flush_action": [
        ("There is no flushing observed.", "no", RIGHT),
        ("There is no flushing", "no", RIGHT),
        ("Is the endoscope flushing the scene in these frames", "yes", WRONG),
        ("The Endoscope is flushing the scene in these frames.", "yes", RIGHT),
        ("Yes, the endoscopist appears to be flushing the scene in these frames.", "yes", RIGHT),
        ("No flushing", "no", RIGHT),
        ("The endoscopist isn’t flushing", "no", RIGHT),
    ],
    "lesion_histology_extended": [
        ("adenomatous", "adenoma", RIGHT),
        ("Tubular adenoma", "adenoma", RIGHT),
        ("adenocarcinoma", "adenoma", WRONG),
        ("non-adenomatous", "adenoma", WRONG),
        ("Sessile serrated adenoma", "adenoma", WRONG),
        ("Hyperplastic polyp", "hyperplastic", RIGHT),
        ("Not adenoma, hyperplastic.", "hyperplastic", RIGHT),
        ("hyperplastic or adenoma", "hyperplastic", WRONG),
        ("not hyperplastic", "hyperplastic", WRONG),
        ("Histology corresponds to adenoma.", "hyperplastic", WRONG),
    ],
    "lesion_motion_direction": [
        ("The lesion moves toward the upper-left.", "left", WRONG),
        ("upper-left", "left", WRONG),
        ("The lesion drifts to the left over the frames.", "left", RIGHT),
        ("Downward.", "down", RIGHT),
        ("downwards", "down", RIGHT),
        ("up and to the left", "up", WRONG),
        ("from left to right", "right", RIGHT),
        ("from left to right", "left", WRONG),
        ("The lesion does not move.", "stable", RIGHT),
        ("The lesion does not move left.", "stable", WRONG),
        ("The lesion does not move left.", "left", WRONG),
        ("not stable", "stable", WRONG),
        ("No drift", "stable", RIGHT),
        ("It shows a close-up of the lesion", "up", WRONG),
        ("The lesion shifts upwards", "up", RIGHT),
        ("Leftward", "left", RIGHT),
        ("bright", "right", WRONG),
        ("The lesion moves left or right", "left", WRONG),
        ("The lesion is still drifting left.", "left", RIGHT),
        ("Still.", "stable", RIGHT),
    ],
    "lesion_screen_position": [
        ("upper left", "upper-left", RIGHT),
        ("top-left corner", "upper-left", RIGHT),
        ("Right upper quadrant", "upper-right", RIGHT),
        ("left", "upper-left", WRONG),
        ("The lesion appears in the right screen quadrant.", "lower-left", WRONG),
        ("The lesion appears in the lower left quadrant.", "lower-left", RIGHT),
        ("bottom‑left", "lower-left", RIGHT),
        ("lower left or lower right", "lower-left", WRONG),
        ("lower-left/right", "lower-left", WRONG),
        ("center", "lower-left", WRONG),
        ("Not the upper-left but the lower-right quadrant.", "lower-right", RIGHT),
    ],
    "lesion_site": [
        ("sigmoid colon", "sigma", RIGHT),
        ("rectosigmoid", "sigma", WRONG),
        ("Recto-sigmoid junction", "sigma", WRONG),
        ("The descending colon", "ascending", WRONG),
        ("descending colon", "descending", RIGHT),
        ("rectal", "rectum", RIGHT),
        ("Cecum", "rectum", WRONG),
        ("the sigma and the rectum", "rectum", WRONG),
        ("ascending colon", "ascending", RIGHT),
    ],
    "lesion_size_range": [
        ("<5 mm", "<5", RIGHT),
        ("< 5mm", "<5", RIGHT),
        ("less than 5 mm", "<5", RIGHT),
        ("smaller than 5 millimetres", "<5", RIGHT),
        ("less than five millimeters", "<5", RIGHT),
        ("＜5 mm", "<5", RIGHT),
        ("5-10 mm", "<5", WRONG),
        ("The lesion size falls into the 5 to 9.9 millimeter bracket.", "<5", WRONG),
        ("10-20 mm.", "<5", WRONG),
        ("<50 mm", "<5", WRONG),
        ("<5 cm", "<5", WRONG),
        ("<5.5 mm", "<5", WRONG),
        (">5 mm", "<5", WRONG),
        ("<5 or 5-10", "<5", WRONG),
        ("not less than 5 mm", "<5", WRONG),
        ("3 mm", "<5", WRONG),
        ("≤5 mm", "<5", WRONG),
        ("5 mm", "<5", WRONG),
        ("5–10 mm", "<5", WRONG),
        ("less than or equal to 5 mm", "<5", WRONG),
        ("Into which millimeter bracket does the lesion size fall", "<5", WRONG),
    ],
    "lighting_mode": [
        (
            "The sequence is illuminated by Narrow Band Imaging (NBI), as indicated by the 'NBI' label in the corner.",
            "NBI",
            RIGHT,
        ),
        ("White light.", "NBI", WRONG),
        ("NBI or white light", "NBI", WRONG),
        ("NBI/WL", "NBI", WRONG),
        ("NBI light is off", "NBI", WRONG),
        ("not WL but NBI", "NBI", RIGHT),
    ],
    "mucosa_visibility": [
        ("The mucosa is obscured.", "no", RIGHT),
        ("Clean mucosa is visible", "yes", RIGHT),
        ("Clean mucosa is not visible", "no", RIGHT),
        ("Clean mucosa is not obscured", "no", WRONG),
        ("The mucosa cannot be seen clearly", "no", RIGHT),
        ("normal mucosa", "no", WRONG),
        ("Yes, you can clearly observe clean mucosa in these frames.", "yes", RIGHT),
        ("You can clearly see clean mucosa.", "yes", RIGHT),
        ("No, clean mucosa is visible", "no", WRONG),
        ("No — clean mucosa is not visible", "no", RIGHT),
        ("Yes, nothing blocks the view of the mucosa.", "yes", RIGHT),
        ("Is clean mucosa visible in this sequence?", "no", WRONG),
    ],
    "nbi_status": [
        ("white light", "no", RIGHT),
        ("NBI is off.", "no", RIGHT),
        ("The frames were captured using NBI mode.", "yes", RIGHT),
        ("The frames were captured using MBI mode.", "yes", WRONG),
        ("No, these frames are not captured using NBI mode.", "no", RIGHT),
        ("No, white light instead of NBI.", "no", RIGHT),
        ("WL rather than NBI", "no", RIGHT),
        ("Yes, WL light is on.", "no", WRONG),
        ("No, NBI light is on.", "yes", WRONG),
        ("Narrow-band imaging", "yes", RIGHT),
        ("No NBI light.", "no", RIGHT),
    ],
    "occlusion_check": [
        ("No, it does not.", "no", RIGHT),
        ("No, there is no obstruction blocking the field of view.", "no", RIGHT),
        ("Yes, a close up obstruction blocks the field of view.", "yes", RIGHT),
        ("The view is clear.", "no", RIGHT),
        ("The view is not blocked", "no", RIGHT),
        ("The view is not completely blocked", "no", WRONG),
        ("The view is unobstructed", "yes", WRONG),
        ("The view is unobstructed", "no", RIGHT),
        ("The view is obstructed", "yes", RIGHT),
        ("Nothing blocks the view.", "no", RIGHT),
    ],
    "scope_backward_motion": [
        ("Yes, the scope is withdrawing.", "yes", RIGHT),
        ("The scope is moving forward.", "no", RIGHT),
        ("The scope is pulled back.", "yes", RIGHT),
        ("The scope is advancing and withdrawing.", "yes", WRONG),
    ],
    "scope_forward_motion": [
        ("The scope is advancing.", "yes", RIGHT),
        ("The scope is not moving.", "no", RIGHT),
        ("The scope is not withdrawing.", "no", WRONG),
        ("The scope is not withdrawing.", "yes", WRONG),
        ("No, the scope is advancing.", "no", WRONG),
        ("No the scope is withdrawing", "no", RIGHT),
        ("The scope moves neither forward nor backward.", "no", RIGHT),
    ],
    "scope_motion": [
        ("The scope is actively moving throughout this clip.", "yes", RIGHT),
        ("Yes, the scope is not moving", "no", WRONG),
        ("Yes, the scope is not moving", "yes", WRONG),
        ("The scope is stationary", "no", RIGHT),
        ("There is no motion.", "no", RIGHT),
        ("no", "no", RIGHT),
        ("NO.", "no", RIGHT),
        ("The scope isn't moving.", "no", RIGHT),
        ("The scope is still moving.", "yes", RIGHT),
        ("The scope is still.", "no", RIGHT),
        ("The scope is not advancing.", "no", WRONG),
        ("Yes or no", "yes", WRONG),
        ("Yes or no", "no", WRONG),
        ("Yes/No", "no", WRONG),
        ("No, it is not.", "no", RIGHT),
        ("It is not.", "no", RIGHT),
        ("It is.", "yes", RIGHT),
        ("Yes. No.", "yes", WRONG),
        ("Is the scope moving? Yes.", "yes", RIGHT),
        ("The answer is yes", "yes", RIGHT),
        ("The answer is: no.", "no", RIGHT),
        ("No\nassistant\nYes", "no", WRONG),
        ("Yes yes", "yes", RIGHT),
        ("I can't tell if the scope is moving.", "no", WRONG),
        ("It is difficult to see if the scope is moving.", "yes", WRONG),
        ("The scope isnt moving", "no", RIGHT),
        ("The scope doesn't move.", "no", RIGHT),
    ],
    "scope_motion_type": [
        ("The scope is primarily advancing or withdrawing in this sequence.", "advancing", WRONG),
        ("Not advancing but withdrawing.", "withdrawing", RIGHT),
        ("not advancing", "withdrawing", WRONG),
        ("Withdrawing", "withdrawing", RIGHT),
        ("The scope is being withdrawn.", "withdrawing", RIGHT),
        ("moving forward", "advancing", RIGHT),
        ("not only advancing but also withdrawing", "advancing", WRONG),
    ],
    "scope_outside": [
        ("Yes", "no", WRONG),
        ("The scope is positioned outside the patient here.", "yes", RIGHT),
        ("IS THE SCOPE POSITIONED OUTSIDE THE PATIENT", "yes", WRONG),
        ("No, the scope is positioned inside the patient.", "no", RIGHT),
        ("The scope is not outside the patient.", "no", RIGHT),
        ("normal", "no", WRONG),
        ("Nothing unusual is going on", "no", WRONG),
        ("I cannot tell whether the scope is outside.", "no", WRONG),
        ("The scope remains in the patient", "no", RIGHT),
        ("Yes, no longer inside the patient.", "yes", RIGHT),
        ("The scope is out of the body.", "yes", RIGHT),
        ("**No**", "no", RIGHT),
        ("It is inside, not outside.", "no", RIGHT),
        ("Unknown", "no", WRONG),
    ],
    "tool_catheter_check": [
        ("The tool is a forceps", "no", RIGHT),
        ("It is a catheter", "yes", RIGHT),
        ("Not a catheter", "no", RIGHT),
        ("not a catheter but a snare", "no", RIGHT),
        ("Yes, the tool is a snare", "yes", WRONG),
        ("There is no tool visible", "no", RIGHT),
        ("Yes, the catheter is visible; no forceps.", "yes", RIGHT),
        ("The tool cannot be identified.", "no", WRONG),
    ],
    "tool_identification": [
        ("Endoscopic biopsy forceps", "forceps", RIGHT),
        ("Forcep", "forceps", RIGHT),
        ("An endoscope is present in this clip.", "forceps", WRONG),
        ("Snare or forceps", "snare", WRONG),
        ("Not a snare.", "snare", WRONG),
        ("no forceps, a snare", "snare", RIGHT),
        ("Catheters are visible", "catheter", RIGHT),
    ],
}

# Every wording of a gold answer in REAL-Colon-VQA: question type, short answer, full answer.
GOLD_ANSWERS = [
    ("blue_dye_presence", "no", "No, no dye is visible on the mucosa."),
    ("endoscope_visibility", "no", "No, the endoscope body is not visible."),
    ("endoscope_visibility", "yes", "Yes, the endoscope body is visible in the frames."),
    ("fluid_occlusion_level", "absent", "Fluid occlusion is absent and clean mucosa stays visible."),
    ("fluid_occlusion_level", "complete", "Fluid occlusion completely obscures the view."),
    ("flush_action", "no", "No, there is no flushing observed."),
    ("flush_action", "yes", "Yes, the endoscopist is flushing the scene."),
    ("lesion_histology_extended", "adenoma", "Histology corresponds to adenoma."),
    ("lesion_histology_extended", "hyperplastic", "Histology corresponds to hyperplastic."),
    ("lesion_motion_direction", "down", "The lesion shifts downward across the frames."),
    ("lesion_motion_direction", "left", "The lesion drifts toward the left side of the screen."),
    ("lesion_motion_direction", "right", "The lesion drifts toward the right side of the screen."),
    ("lesion_motion_direction", "stable", "The lesion stays stable without noticeable movement."),
    ("lesion_motion_direction", "up", "The lesion shifts upward across the frames."),
    ("lesion_screen_position", "lower-left", "The lesion appears in the lower-left quadrant of the screen."),
    ("lesion_screen_position", "lower-right", "The lesion appears in the lower-right quadrant of the screen."),
    ("lesion_screen_position", "upper-left", "The lesion appears in the upper-left quadrant of the screen."),
    ("lesion_screen_position", "upper-right", "The lesion appears in the upper-right quadrant of the screen."),
    ("lesion_site", "ascending", "The lesion is located in the ascending."),
    ("lesion_site", "descending", "The lesion is located in the descending."),
    ("lesion_site", "rectum", "The lesion is located in the rectum."),
    ("lesion_site", "sigma", "The lesion is located in the sigma."),
    ("lesion_size_range", "<5", "The lesion is <5 mm."),
    ("lighting_mode", "NBI", "NBI light is on in this sequence."),
    ("mucosa_visibility", "no", "No, clean mucosa is not consistently visible."),
    ("mucosa_visibility", "yes", "Yes, clean mucosa is visible across frames."),
    ("nbi_status", "no", "No, WL light is on instead."),
    ("nbi_status", "yes", "Yes, NBI light is on in these frames."),
    ("occlusion_check", "no", "No, clean mucosa stays visible without obstruction."),
    ("occlusion_check", "yes", "Yes, a close-up obstruction blocks the view."),
    ("scope_backward_motion", "no", "No, the scope is advancing."),
    ("scope_backward_motion", "yes", "Yes, the scope is withdrawing."),
    ("scope_forward_motion", "no", "No, the scope is withdrawing."),
    ("scope_forward_motion", "yes", "Yes, the scope is advancing."),
    ("scope_motion", "no", "No, the scope is not moving in these frames."),
    ("scope_motion", "yes", "Yes, the scope is moving across the frames."),
    ("scope_motion_type", "advancing", "The scope is primarily advancing."),
    ("scope_motion_type", "withdrawing", "The scope is primarily withdrawing."),
    ("scope_outside", "no", "No, the scope stays within the patient."),
    ("scope_outside", "yes", "Yes, the scope is outside the patient."),
    ("tool_catheter_check", "no", "No, the visible tool is not a catheter."),
    ("tool_catheter_check", "yes", "Yes, the visible tool is a catheter."),
    ("tool_identification", "catheter", "Catheter is visible on screen."),
    ("tool_identification", "forceps", "Forceps are visible on screen."),
    ("tool_identification", "snare", "Snare is visible on screen."),
]


def make_row(number, kind="scope_motion", short="yes", answer=None, video="v1", question=None, **more):
    """An annotation row with the id q{number}."""
    return {
        "id": f"q{number}",
        "video_id": video,
        "question_type": kind,
        "question": question or f"About {kind}?",
        "answer": answer or short,
        "short_answer": short,
        "frames": [f"{video}_{number}"],
        **more,
    }


def scored(rows, texts, **fields):
    """Score `rows` with one text each."""
    pairs = zip(rows, texts, strict=True)
    return ev.score_rows(rows, {ev.row_key(row): {"predicted_answer": text, **fields} for row, text in pairs})


# --- choice ----------------------------------------------------------------------------------------------------------


def test_the_table_has_the_20_types():
    assert sorted(ev.CLOSED_ANSWERS) == sorted({kind for kind, _, _ in GOLD_ANSWERS})
    assert len(ev.CLOSED_ANSWERS) == 20


@pytest.mark.parametrize("kind", CHOICE_CASES)
def test_choice_on_literal_predictions(kind):
    found = [(text, gold, ev.judge(text, kind, gold, "-")["choice"]) for text, gold, _ in CHOICE_CASES[kind]]
    assert found == CHOICE_CASES[kind]


@pytest.mark.parametrize(("kind", "short", "answer"), GOLD_ANSWERS)
def test_gold_answers_are_right_on_every_metric(kind, short, answer):
    everything = dict.fromkeys(ev.METRICS, True)
    for text in (answer, short, answer.upper(), f" {answer}\n", short.rstrip(".") + "."):
        assert ev.judge(text, kind, short, answer) == everything


@pytest.mark.parametrize(("kind", "short", "answer"), GOLD_ANSWERS)
def test_gold_answers_are_wrong_for_every_other_answer_of_their_type(kind, short, answer):
    for other in {gold for of, gold, _ in GOLD_ANSWERS if of == kind} - {short}:
        assert not ev.judge(answer, kind, other, "-")["choice"]


def test_choice_is_strict_where_the_table_does_not_know_the_type_or_the_answer():
    assert ev.judge("Two.", "polyp_count", "two", "There are two.")["choice"]
    assert not ev.judge("I see two", "polyp_count", "two", "There are two.")["choice"]
    assert ev.judge("ileum", "lesion_site", "ileum", "-")["choice"]
    rows = [make_row(1, "polyp_count", "two"), make_row(2, "lesion_site", "ileum"), make_row(3)]
    summary = ev.summarise(rows, scored(rows, ["two", "ileum", "yes"]))
    assert summary["types_without_options"] == ["lesion_site", "polyp_count"]


# --- contains and strict ---------------------------------------------------------------------------------------------


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
    ("text", "right"),
    [
        ("upper-left", True),
        ("Upper left.", True),
        ("the lesion appears in the upper-left quadrant", True),
        ("It is upper-left", False),
        ("upper-left upper-left", False),
        ("left", False),
    ],
)
def test_strict_allows_case_punctuation_and_hyphens_only(text, right):
    answer = "The lesion appears in the upper-left quadrant."
    assert ev.judge(text, "lesion_screen_position", "upper-left", answer)["strict"] is right


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Upper-Left.", "upper left"),
        ("It isn’t; it can't.", "it is not it can not"),
        ("5–10mm / < 5 MM", "5 to 10 mm or <5 mm"),
        ("9.9 mm.", "9.9 mm"),
        ("  two\nlines ", "two lines"),
        ("No — never", "no never"),
    ],
)
def test_normalise(text, normal):
    assert ev.normalise(text) == normal


# --- loops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "looping"),
    [
        ("ForCanBeConverted" * 4, True),
        ("ForCanBeConverted" * 3, False),
        ("no no no no", True),
        ("no no no", False),
        ("Yes, the scope is moving. " * 4, True),
        ("!" * 10, True),
        ("!" * 9, False),
        ("No, the endoscope body is not visible.", False),
        ("", False),
    ],
)
def test_loops(text, looping):
    assert ev.loops(text) is looping


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


def test_wilson_interval_ends_exactly_at_0_and_1():
    assert ev.wilson_interval(0, 7)[0] == 0.0
    assert ev.wilson_interval(7, 7)[1] == 1.0


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (0, 3, 0.25),  # 2 * 1/8
        (5, 5, 1.0),
        (2, 12, 2 * (1 + 14 + 91) / 2**14),
        (12, 2, 2 * (1 + 14 + 91) / 2**14),
    ],
)
def test_mcnemar_exact(only_a, only_b, p):
    assert ev.mcnemar_exact(only_a, only_b) == p


def test_mcnemar_with_thousands_of_rows():
    exact = Fraction(2 * sum(comb(5000, k) for k in range(2401)), 2**5000)
    assert ev.mcnemar_exact(2400, 2600) == float(exact)
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


def test_video_interval_needs_two_videos():
    rows = [make_row(n, video=f"v{n % 2}") for n in range(20)]
    texts = ["yes" if row["video_id"] == "v0" else "no" for row in rows]
    assert ev.video_interval(scored(rows[::2], texts[::2]), "choice") is None
    # of two videos, one all right and one all wrong, a draw holds 0, 1 or 2 of the right one
    assert ev.video_interval(scored(rows, texts), "choice") == [0.0, 1.0]
    assert ev.video_interval(scored(rows, ["yes"] * 20), "choice") == [1.0, 1.0]


# --- reference lines -------------------------------------------------------------------------------------------------


def test_majority_ties_go_to_the_first_in_the_alphabet():
    pairs = [("a", "yes"), ("a", "no"), ("b", "left"), ("b", "left"), ("b", "down")]
    assert ev.majority_answers(pairs) == {"a": "no", "b": "left"}


def test_reference_lines():
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


# --- warnings --------------------------------------------------------------------------------------------------------


def balanced_rows(n, shorts=("yes", "no"), kind="scope_motion"):
    return [make_row(i, kind, shorts[i % len(shorts)], video=f"v{i % 2}") for i in range(n)]


def test_one_answer_for_a_balanced_type_is_mode_collapse():
    rows = balanced_rows(20)
    nineteen = ["The scope is moving."] * 10 + ["Yes."] * 9 + ["no"]
    eighteen = ["yes"] * 18 + ["no"] * 2
    assert ev.collapse_warnings(scored(rows, nineteen)) == [
        "mode collapse: scope_motion is answered 'yes' in 19 of 20 rows"
    ]
    assert ev.collapse_warnings(scored(rows, eighteen)) == []  # exactly 90 % is not over 90 %


def test_one_answer_is_no_collapse_where_gold_is_lopsided_constant_or_rare():
    lopsided = balanced_rows(20, ("yes", "yes", "yes", "no"))
    assert ev.collapse_warnings(scored(lopsided, ["yes"] * 20)) == []
    assert ev.collapse_warnings(scored(balanced_rows(20, ("yes",)), ["yes"] * 20)) == []
    assert ev.collapse_warnings(scored(balanced_rows(9), ["yes"] * 9)) == []


def test_fewer_than_half_of_the_options_is_mode_collapse():
    rows = balanced_rows(20, ("left", "right", "up", "down", "stable"), "lesion_motion_direction")
    assert ev.collapse_warnings(scored(rows, ["left", "up"] * 10)) == [
        "mode collapse: lesion_motion_direction has 5 gold answers, of which 2 are ever given"
    ]
    assert ev.collapse_warnings(scored(rows, ["left", "up", "down", "left"] * 5)) == []


def test_answer_warnings():
    rows = balanced_rows(4)
    answers = {
        ev.row_key(rows[0]): {"predicted_answer": "ab" * 8, "finish_reason": "length"},
        ev.row_key(rows[1]): {"predicted_answer": None, "finish_reason": "error", "error": "half a JPEG"},
        ev.row_key(rows[2]): {"predicted_answer": "yes", "finish_reason": "eos"},
    }
    found = ev.score_rows(rows, answers)
    assert ev.finish_counts(found) == {"eos": 1, "length": 1, "error": 1, "missing": 1, "unknown": 0, "loops": 1}
    assert ev.answer_warnings(found) == [
        "1 of 4 answers were cut at the length limit (--max_new_tokens)",
        "1 of 4 answers are repetition loops",
        "1 of 4 rows failed; they count as wrong",
        "1 of 4 rows have no prediction; they count as wrong",
    ]
    assert ev.answer_warnings(ev.score_rows(rows[:1], answers))[-1].startswith("one video only")


def test_overlap_counts_frames_and_ids_within_a_video():
    train = [make_row(1, video="v1"), make_row(2, video="v2")]
    train[1]["frames"] = ["v2_7", "v2_8"]
    rows = [
        make_row(1, video="v1"),  # same id and frame
        make_row(2, video="v3"),  # same id in another video: another sample
        make_row(5, video="v2", question_type="x") | {"frames": ["v2_8", "v2_9"]},
    ]
    assert ev.overlap_warnings(rows, train) == [
        "not held out: 2 of 3 rows use a frame that training also used",
        "not held out: 1 of 3 rows have a video and id that training also had",
    ]
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
    summary = ev.summarise(rows, ev.score_rows(rows, predictions), train_rows=train, manifest={"device": "cpu"})

    assert (summary["n_total"], summary["n_scored"], summary["n_errors"], summary["n_missing"]) == (4, 2, 1, 1)
    assert summary["missing"] == ["v1/q2/scope_motion"]
    assert summary["failed"] == ["v1/q3/lighting_mode"]
    choice = summary["metrics"]["choice"]
    assert (choice["accuracy"], choice["correct"], choice["n"]) == (1 / 4, 1, 4)
    assert choice["ci95"] == list(ev.wilson_interval(1, 4))
    assert choice["macro"] == pytest.approx((1 / 3 + 0) / 2)
    assert choice["ci95_videos"] is None
    assert summary["metrics"]["strict"]["accuracy"] == 0
    assert (
        summary["metrics"]["contains"]["accuracy"] == 1 / 4
    )  # "no" in "normal"; "yes" is not in "The scope is moving."
    assert summary["by_type"]["scope_motion"] == {
        "n": 3,
        "choice": {"accuracy": 1 / 3, "ci95": list(ev.wilson_interval(1, 3)), "n": 3, "correct": 1},
        "strict": {"accuracy": 0.0, "ci95": list(ev.wilson_interval(0, 3)), "n": 3, "correct": 0},
        "contains": {"accuracy": 1 / 3, "ci95": list(ev.wilson_interval(1, 3)), "n": 3, "correct": 1},
        "chance": 0.5,
        "train_majority": pytest.approx(2 / 3),
        "test_majority": pytest.approx(2 / 3),
    }
    assert summary["by_type"]["lighting_mode"]["train_majority"] is None  # the training file has no such type
    assert summary["baselines"] == {"chance": 2.5 / 4, "train_majority": 2 / 4, "test_majority": 3 / 4}
    assert summary["discriminative"]["n"] == 3
    assert summary["discriminative"]["types"] == ["scope_motion"]
    assert summary["discriminative"]["types_excluded"] == ["lighting_mode"]
    assert summary["discriminative"]["baselines"]["chance"] == 0.5
    assert summary["finish"] == {"eos": 1, "length": 1, "error": 1, "missing": 1, "unknown": 0, "loops": 0}
    assert summary["manifest"] == {"device": "cpu"}
    assert summary["warnings"][:2] == [
        "below the training majority on all rows: one constant answer per question type scores 50.0 %, "
        "this model 25.0 %",
        "below the training majority on the discriminative rows: one constant answer per question type scores "
        "66.7 %, this model 33.3 %",
    ]


def test_without_discriminative_types_their_figures_are_null():
    rows = [make_row(1), make_row(2)]
    part = ev.summarise(rows, scored(rows, ["yes", "no"]))["discriminative"]
    assert part["n"] == 0
    assert part["metrics"]["choice"] == {
        "accuracy": None, "ci95": None, "n": 0, "correct": 0, "macro": None, "ci95_videos": None
    }  # fmt: skip
    assert part["baselines"] == {"chance": None, "train_majority": None, "test_majority": None}


def test_summary_has_the_promised_fields():
    rows = [make_row(1)]
    summary = ev.summarise(rows, scored(rows, ["yes"]))
    promised = "schema_version n_total n_scored n_errors metrics by_type baselines discriminative finish arms manifest"
    assert set(promised.split()) <= summary.keys()
    assert summary["schema_version"] == 1
    assert set(summary["metrics"]) == {"contains", "strict", "choice"}


def test_report_fits_80_columns_and_names_the_baseline():
    kinds = [(kind, short, answer) for kind, short, answer in GOLD_ANSWERS for _ in range(3)]
    rows = [make_row(10**5 + n, kind, short, answer) for n, (kind, short, answer) in enumerate(kinds)]
    found = scored(rows, [row["answer"] for row in rows], finish_reason="eos")
    arms = ev.summarise_arms("audio", {"audio": found, "mismatched_audio": scored(rows, ["x"] * len(rows))}, FILES)
    report = ev.render_summary(ev.summarise(rows, found, train_rows=rows, arms=arms))
    assert max(map(len, report.splitlines())) <= 80
    assert "135/135 correct = 100.0 %" in report
    assert "135/135 stopped by themselves = 100.0 %" in report
    assert "46 % baseline" in report


# --- arms ------------------------------------------------------------------------------------------------------------

FILES = dict.fromkeys(ev.ARMS, "x.jsonl")


def arms_of(n, **right):
    """Arms over n rows, of which the first `right[arm]` are right."""
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
    hear, see = ev.arm_sentences(arms_of(20, audio=20, mismatched_audio=10, black_frames=20))
    assert hear == (
        "Does it hear? Yes: with another question's speech, choice goes from 100.0 % to 50.0 % "
        "(difference -50.0 points, 95 % -70.1 to -24.3; p = 0.002; n 20)."
    )
    assert see.startswith("Does it see? There is no sign of it: with black frames, choice goes from 100.0 % to 100.0 %")


def test_arm_sentences_with_few_rows_or_without_the_arm():
    hear, see = ev.arm_sentences(arms_of(5, audio=5, mismatched_audio=2))
    assert hear.startswith("Does it hear? It may, but these rows are too few to tell: ")
    assert "p = 0.250; n 5" in hear
    assert see == "Does it see? Not tested: add one of black_frames, shuffled_frames, first_frame to --arms."


def test_arms_table():
    table = ev.render_arms(arms_of(20, audio=20, mismatched_audio=10)).splitlines()
    assert table[0].split() == ["arm", "choice", "%", "95", "%", "diff", "95", "%", "interval", "p"]
    assert table[1].split() == ["audio", "20/20", "100.0", "84-100"]
    assert table[2].split()[:5] == ["mismatched_audio", "10/20", "50.0", "30-70", "-50.0"]


def test_mismatched_audio_borrows_from_another_type_whatever_the_order():
    rows = [make_row(n, kind) for n, kind in enumerate(["scope_motion", "scope_motion", "lesion_site", "nbi_status"])]
    pairs = ev.pair_mismatched_audio(rows, seed=0)
    assert set(pairs) == {ev.row_key(row) for row in rows}
    assert all(key[2] != other[2] for key, other in pairs.items())
    assert ev.pair_mismatched_audio(rows[::-1], seed=0) == pairs
    assert any(ev.pair_mismatched_audio(rows, seed=seed) != pairs for seed in range(1, 9))


def test_mismatched_audio_does_not_borrow_the_same_words():
    rows = [
        make_row(1, "scope_motion", question="Is it moving?"),
        make_row(2, "flush_action", question="is it moving"),
        make_row(3, "lesion_site", question="Where?"),
    ]
    assert ev.pair_mismatched_audio(rows)[ev.row_key(rows[0])] == ev.row_key(rows[2])


def test_mismatched_audio_needs_two_types():
    with pytest.raises(ev.InputError, match="v1/q1/scope_motion has no row of another question type"):
        ev.pair_mismatched_audio([make_row(1), make_row(2)])


# --- leak gate -------------------------------------------------------------------------------------------------------

INSTRUCTION = "Answer the question concisely based on the visual and audio evidence."


@pytest.mark.parametrize(
    ("prompt", "leaked"),
    [
        (f"<|im_start|>user\n<|audio_pad|>\n{INSTRUCTION}<|im_end|>", []),
        (f"<|im_start|>user\nIs the scope moving?\n{INSTRUCTION}<|im_end|>", ["is", "moving", "scope", "the"]),
        (f"<|im_start|>user\nMOVING\n{INSTRUCTION}<|im_end|>", ["moving"]),
        (f"<|im_start|>user\nremoving\n{INSTRUCTION}<|im_end|>", []),
    ],
)
def test_leaked_words(prompt, leaked):
    constant = f"<|im_start|>user\n{INSTRUCTION}<|im_end|>"
    assert ev.leaked_words(prompt, "Is the scope moving?", constant) == leaked


# --- output rows -----------------------------------------------------------------------------------------------------


def test_answer_row():
    row = ev.answer_row(
        make_row(1, "scope_motion", "no", "No, it rests."),
        "normal",
        finish_reason="eos",
        n_tokens=2,
        input_mode="audio",
        audio_file="q1.mp3",
        audio_of="v1/q2/lesion_site",
    )
    assert row == {
        "id": "q1",
        "video_id": "v1",
        "question_type": "scope_motion",
        "question": "About scope_motion?",
        "ground_truth": "No, it rests.",
        "short_answer": "no",
        "predicted_answer": "normal",
        "correct": True,
        "strict_correct": False,
        "choice_correct": False,
        "finish_reason": "eos",
        "n_tokens": 2,
        "input_mode": "audio",
        "audio_file": "q1.mp3",
        "audio_of": "v1/q2/lesion_site",
    }
