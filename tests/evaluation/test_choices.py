"""Multiple choice: an answer's choice, and not another option that it mentions."""

import time

import pytest

from thinksafe.evaluation.answers import is_correct
from thinksafe.evaluation.choices import chosen_option, option_letter

BOXES = {
    r"\boxed{C}": "C",
    r"$\boxed{B}$": "B",
    r"\boxed{ (C) }": "C",
    r"\boxed{c}": "C",
    r"\boxed{\text{C}}": "C",
    r"\boxed{\textbf{C}}": "C",
    r"\boxed{\mathbf{(C)}}": "C",
    r"\boxed{\mathrm{C}}": "C",
    r"\boxed{\textbf{(C) }12}": "C",
    r"\boxed{\text{C. Plane}}": "C",
    r"\boxed{\text{Option C}}": "C",
    r"\boxed{C \text{ (Plane)}}": "C",
    r"\boxed{C: 12 V}": "C",
    r"\boxed{C\ 12}": "C",
    r"\boxed{(C)\ 12\text{ V}}": "C",
    r"\fbox{C}": "C",
    r"\boxed{C}. This is A good one": "C",
    r"First \boxed{A}, then \boxed{B}": "B",
    r"I put it in \boxed{}: \boxed{D}": "D",
    r"The answer is A. \boxed{B}": "B",
    r"\boxed{B}. Let me verify A: the answer is not A.": "B",
    r"\boxed{42}": None,
    r"\boxed{AB}": None,
    r"\boxed{A, B}": None,
    r"\boxed{A \text{ or } B}": None,
    r"\boxed{CO_2}": None,
    r"\boxed{Carbon}": None,
    r"\boxed{A dog}": None,
}
STATEMENTS = {
    "The answer is B. Note that A is a trap.": "B",
    "The answer is (D).": "D",
    "The answer is b.": "B",
    "The answer is (b).": "B",
    "The answer is a) Line": "A",
    "The answer is A.": "A",
    "The answer is A because B is not.": "A",
    "The answer is A, because B is wrong.": "A",
    "The answer is C, since A and B fail. I hope this helps.": "C",
    "The answer is C: 12 V": "C",
    "The answer is C (12 V)": "C",
    "The answer is C - 12 V": "C",
    "The answer is **C**.": "C",
    "The answer is **B) Circle**.": "B",
    "The answer is “C”.": "C",
    "The answer is 'C'.": "C",
    "The answer is `C`.": "C",
    "The answer is [C].": "C",
    r"The answer is $\textbf{(B)}$.": "B",
    r"The answer is \(B\).": "B",
    "The answer is\n\nB) Circle": "B",
    "The answer is option b).": "B",
    "The answer is option A: I and II only.": "A",
    "The answer to question A is B.": "B",
    "Answer: **C**": "C",
    "**Answer: C**": "C",
    "**Final Answer:**\n\n(B) Circle": "B",
    "Answer: C\n\nI hope this helps. A tip: read B again.": "C",
    "Answer = C": "C",
    "answer: I": "I",
    "The answer is: I.": "I",
    "The correct choice is (B) because A is wrong": "B",
    "The correct answer is (A) and not (B).": "A",
    "So the best option would be D. Let me know if I can help!": "D",
    "Thus, the correct statement is D.": "D",
    "My choice: D": "D",
    "Option A: it grows. Option B: it dies. The answer is B.": "B",
    "The answer is B.\n\nWait, the answer is C.": "C",
    "The answer is not A but B": "B",
    "Not A but C": "C",
    "The answer isn't A. It's B.": "B",
    "The answer cannot be A. Therefore B is correct.": "B",
    "Option C is correct; option A is not correct.": "C",
    "A is correct. B is not.": "A",
    "It is C.": "C",
    "I would go with (C).": "C",
    "Therefore, C.": "C",
    "Let me check. A is 5, B is 6, so B.": "B",
    "Statements I and II are true. The answer is C.": "C",
    "The answer is A or B.": None,
    "The answer is A and B": None,
    "The answers are A and C.": None,
    "The answer is A dog": None,
    "The answer is a line.": None,
    "The answer is I think unclear": None,
    "The answer is A-flat": None,
    "A good answer is hard": None,
    "The choice is yours. I can't say.": None,
}
LINES = {
    "C": "C",
    "(C)": "C",
    "C)": "C",
    "C.": "C",
    "**B**": "B",
    "- B": "B",
    "I": "I",
    "# Answer\nB": "B",
    "Option C": "C",
    "**B**. I hope this helps.": "B",
    "B. I hope this helps": "B",
    "C) 12 V": "C",
    "A. Line\nB. Circle\nC. Plane": None,
    "I think so": None,
    "I am sure.": None,
    "Plan B is no good, I like vitamin C.": None,
    "Both A and B are fine": None,
    "A is wrong because of C.": None,
    "CAB": None,
    "no letter": None,
}


@pytest.mark.parametrize("answer, letter", [*BOXES.items(), *STATEMENTS.items(), *LINES.items()])
def test_option_is_the_one_given_as_the_answer(answer, letter):
    assert chosen_option(answer) == letter


@pytest.mark.parametrize(
    "text, letter",
    [
        ("C", "C"),
        ("c", "C"),
        ("(C)", "C"),
        ("[C]", "C"),
        ("C.", "C"),
        ("C) 12 V", "C"),
        (r"\text{(C)}", "C"),
        ("Option C", "C"),
        ("answer: D", "D"),
        ("A line", None),
        ("Cat", None),
        ("", None),
        ("3", None),
        ("AB", None),
        ("A, B", None),
    ],
)
def test_gold_option_is_read_in_every_usual_form(text, letter):
    assert option_letter(text) == letter


def test_choice_compares_letters_without_case():
    response = "<think>\nA or B?\n</think>\n\nThe answer is (b)."
    assert is_correct(response, "B", "choice") and is_correct(response, "(b)", "choice")
    assert not is_correct(response, "A", "choice") and not is_correct(response, "2", "choice")


def test_answer_without_an_option_equals_no_gold():
    assert not is_correct("<think>\na\n</think>\n\nI do not know.", "no letter", "choice")


@pytest.mark.parametrize("piece", ["answer is ", "option A ", "*", "\n\\", "A or ", "not A but ", "\\boxed{"])
def test_long_answer_is_read_quickly(piece):
    start = time.perf_counter()
    chosen_option(piece * 5000)
    assert time.perf_counter() - start < 2
