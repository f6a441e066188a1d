r"""Mathematical answers: every usual way to write an answer equals its gold, and a wrong one does not.

The oracles are pairs written by hand. GOLDS has the forms of MATH-500's gold column, which is bare LaTeX.
"""

import random
import signal
import time

import pytest

from thinksafe.evaluation import mathematics
from thinksafe.evaluation.mathematics import is_equal, is_readable, normalized

GOLDS = r"""
7 ; -50 ; 0 ; 58,500 ; 1.25 ; .0000672 ; .375 ; \frac{14}{5} ; \frac43 ; \frac 58 ; \frac9{17} ; \dfrac{17}{40}
-\frac{35}{8} ; 11\sqrt2 ; 3 \sqrt{5} ; -\sqrt{3} ; \sqrt{51} ; \frac{3\sqrt{3}}{4} ; 1+2\sqrt{3} ; 11 \sqrt{5} + 11
7\pi ; 288 \pi ; \frac{20000}{\pi} ; 90^\circ ; 145^{\circ} ; \frac{270}7\text{ degrees} ; 5.4 \text{ cents}
864 \mbox{ inches}^2 ; 15\mbox{ cm}^2 ; \$36 ; \$18.90 ; \$32,\!348 ; 10,\!080 ; 11,\! 111,\! 111,\! 100 ; 10\,080
1\frac{4}{5} ; 137 \frac{1}{2} ; 5\frac14 ; 11 5/6 ; 0.\overline{3} ; 12.5\% ; 2\cdot 10^7 ; 52_8 ; 2516_8
4210_{5} ; 6 - 5i ; 1+274i ; -2 + 7i ; p - q ; 2k+2 ; x^3+3x-6 ; 6r^2-4r-24 ; (a+5)(b+2) ; \frac{11+9a}{20} ; 5r^5
3R^2 ; x^5 - x^4 + x^3 - x^2 + x - 1 ; 8n^2 + 4n + 1 ; \cot x ; x=5 ; y = 2x + 3 ; y = -2x ; 5x - 7y + 11z + 4 = 0
f(n) = 3n ; 1,-2 ; 3, 5, 7 ; -2,1 ; 1 \pm \sqrt{19} ; 3 \pm 2 \sqrt{2} ; \{1\pm\sqrt{5},-2\} ; (15,-29) ; (6,31,-1)
(1,-16,-4,43) ; \left( 3, \frac{\pi}{2} \right) ; \left( \frac{3}{2}, -13 \right) ; (3,4] ; (2,\infty)
(-\infty, 0] ; (-\sqrt{3}, \sqrt{3}) ; [-2,7] ; \left(\frac{3}{5},\frac{8}{3}\right]
\left[ \frac{\pi^2}{8}, \frac{5 \pi^2}{4} \right] ; x \in [-2,7] ; (0,9) \cup (9,36) ; (-\infty, 2) \cup (3, \infty)
\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix} ; \begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}
\begin{bmatrix} 1 & 2 \end{bmatrix} ; \text{Ulla} ; \text{east} ; \text{even} ; \text{ellipse} ; \text{no solution}
Monday ; \text{(C)} ; (E) ; 8:00 ; 3:4 ; \emptyset ; x < 5 ; |x|
"""
GOLDS = [gold.strip() for line in GOLDS.strip().splitlines() for gold in line.split(" ; ")]

RIGHT = {  # gold: other ways to write it
    "18": [
        r"\$18",
        "18.",
        "18.00",
        "[18]",
        "18 dollars",
        r"18\text{ eggs}",
        "18 miles per hour",
        "18°",
        "+18",
        "3 × 6",
        "3⋅6",
    ],
    "-5": ["−5", "–5", "minus 5", "-5.0"],
    "10080": [r"10\,080", r"10\ 080", "10{,}080", r"10,\!080", "10 080", "10,080", "10~080", "10 080"],
    r"11,\! 111,\! 111,\! 100": ["11111111100", "11,111,111,100"],
    "1200000": ["1.2 million", r"1.2\text{ million}", r"1.2 \times 10^6", "1,200,000"],
    "11 5/6": [r"11\frac{5}{6}", r"11\frac56", r"\frac{71}{6}", "71/6", r"11 \tfrac{5}{6}"],
    r"5\frac14": ["5.25", "5 1/4", r"\frac{21}{4}", "5¼"],
    "-1.5": [r"-1\frac12", "-1 1/2", r"-\frac32"],
    r"0.\overline{3}": [r"\frac{1}{3}", "1/3", r"0.\bar{3}", r".\overline{3}", "0.333333"],
    r"\frac16": [r"0.1\overline{6}", r"\dfrac{1}{6}", "⅙"],
    r"11\sqrt2": [r"11\sqrt{2}", "11√2", "11*sqrt(2)", r"\sqrt{242}", r"\sqrt{2}\cdot 11"],
    ".0000672": ["0.0000672", r"6.72 \times 10^{-5}", "6.72e-5"],
    r"12\pi": ["12π", "12 pi", r"12\pi \text{ inches per second}", r"12\pi\text{ cm}"],
    r"90^\circ": ["90", "90°", "90 degrees", r"90^{\circ}"],
    r"\frac{270}7\text{ degrees}": [r"\frac{270}{7}", "270/7", r"\frac{270}{7}^\circ"],
    r"864 \mbox{ inches}^2": ["864", "864 in²", "864 in^2", "864 square inches", r"864\text{ in}^2"],
    r"\$18.90": ["18.9", "18.90", "18.90 dollars", r"\text{\$18.90}"],
    r"\frac{17}{50}": [r"34\%", "0.34", "34 percent"],
    "12.5": [r"12.5\%", "12.5%"],
    "2516_8": ["2516_{8}", "2516₈", r"2516_{\text{eight}}", r"2516\text{ (base 8)}", "(2516)_8", r"101_2 = 2516_8"],
    "x=5": ["5", "x = 5"],
    "y = 2x+3": ["y=3+2x", "2x+3", "y-2x=3"],
    "1,-2": ["-2, 1", r"\{1,-2\}", "x=1, x=-2", r"1 \text{ and } -2", "1 or -2"],
    r"1 \pm \sqrt{19}": [r"1+\sqrt{19}, 1-\sqrt{19}", "1 ± √19"],
    r"x \in [-2,7]": ["[-2,7]", r"-2 \le x \le 7", r"x\in[-2, 7]", "-2 ≤ x ≤ 7"],
    r"(-\infty, 2) \cup (3, \infty)": ["(-∞,2)∪(3,∞)"],
    r"\left( 3, \frac{\pi}{2} \right)": [r"(3, \pi/2)", "(3, π/2)"],
    r"\begin{pmatrix} -1/3 \\ 5/3 \end{pmatrix}": [
        r"\begin{bmatrix} -\frac13 \\ \frac53 \end{bmatrix}",
        r"\begin{pmatrix} -\dfrac{1}{3} \\[4pt] \dfrac{5}{3} \end{pmatrix}",
    ],
    "(a+5)(b+2)": ["ab+2a+5b+10"],
    r"\frac12": [".5", r"\sin 30^\circ", r"\frac{1}{2}", "½", r"$\frac{1}{2}$", r"\(\frac12\)"],
    r"x^{12}": ["x¹²", r"x^{12}"],
    r"\text{Ulla}": ["Ulla", "ulla", r"\textbf{Ulla}", r"\text{Ulla }"],
    r"\text{no solution}": ["No solution", r"\text{No solution.}"],
    r"\text{(C)}": ["C", "(C)", r"\text{C}", r"\mathrm{(C)}", r"\text{(C) Plane}"],
    r"8:00 \text{ p.m.}": ["8:00 PM", "8:00 p.m."],
}
WRONG = {  # gold: answers that differ
    "18": ["19", "1", "8", "18000", "18 million", "-18", ""],
    "-5": ["5"],
    "5": ["1,5", "(1,5)", "5 and 6", r"5\text{ or }6"],
    "4": [r"\frac{1}{", r"\frac{1}{0}", "2√2", "no"],
    "10080": ["90", "10", "80", "10.080"],
    "11": [r"11\sqrt2"],
    r"11\sqrt2": ["11", "15.556", r"11\sqrt{3}", r"\sqrt{22}"],
    "11 5/6": ["55/6", "8/3", "11", r"\frac56"],
    r"0.\overline{3}": ["0", "0.3", r"0.\overline{6}"],
    ".0000672": ["0.000067", "0.0000673", "0"],
    "2516_8": ["2516_9", "2517_8", "2516", "1358", "314.5"],
    r"12\pi": ["12", "37.699", r"12\pi^2"],
    r"\frac{270}7\text{ degrees}": ["270"],
    "58,500": ["58", "500", "(58,500)"],
    r"11,\! 111,\! 111,\! 100": ["11"],
    r"\$32,\!348": ["32", "348"],
    "x=5": ["x=-5", "y=5"],
    "y = 2x+3": ["y=2x-3", "2x"],
    "1,-2": ["1", "-2", "(-2,1)", "1,2"],
    "(8,-2)": ["(-2,8)", "8"],
    "(3,4]": ["(3,4)", "[3,4]", "[3,4)"],
    r"x \in [-2,7]": ["(-2,7)", "[-2,7)", "-2 < x < 7"],
    r"\begin{pmatrix} -1/3 \\ 5/3 \end{pmatrix}": [r"\begin{pmatrix} 1/3 \\ 5/3 \end{pmatrix}"],
    "6 - 5i": ["6+5i", "6", "-5i"],
    "p - q": ["q-p", "p"],
    r"\text{east}": [r"\text{west}", "seat", r"\text{north}"],
    r"\text{(C)}": ["B", r"\text{(D)}"],
    "8:30": ["8:00", "4:15"],
    r"8:00 \text{ p.m.}": ["8:00 a.m."],
    "Yes": ["no"],
}
PROSE = [
    ("The final answer is [18].", "18"),
    ("The final answer is [$18].", "18"),
    ("The final answer is [\\$18].", "18"),
    ("The final answer is [18 eggs].", "18"),
    ("The final answer is [70,000].", "70000"),
    ("The final answer is [1/2].", "0.5"),
    ("The final answer is [-2,7].", "[-2,7]"),
    ("**The final answer is [18].**", "18"),
    ("The final answer is **[18]**. I hope it is correct.", "18"),
    ("The final answer is \\[18\\].", "18"),
    ("The answer is \\$18.", "18"),
    ("The answer is $18.", "18"),
    ("The answer is −5.", "-5"),
    ("The answer is 3 × 4.", "12"),
    ("The answer is 11 5/6.", "71/6"),
    ("The answer is 11 5/6 miles.", r"11\frac{5}{6}"),
    ("The answer is $10\\,080$.", "10080"),
    ("The answer is 2516_8.", "2516_8"),
    ("The answer is $1$ and $-2$.", "1,-2"),
    ("The answer is 1 and -2.", "1,-2"),
    ("The answer is x = 5, since 5+1 = 6.", "5"),
    ("The answer is 18 because 20 - 2 = 18 and 5 is wrong.", "18"),
    ("The answer is 18.\n\nNote that 5 is wrong.", "18"),
    ("The answer is $\\frac{1}{2}$ of the cake.", "1/2"),
    ("The answer is 50%.", "50"),
    ("The answer is 18 million.", "18,000,000"),
    ("The answer is Ulla.", r"\text{Ulla}"),
    ("The answer is the **ellipse**.", r"\text{ellipse}"),
    ("The answer is (C).", r"\text{(C)}"),
    ("The answer is:\n\n\\[ 18 \\]", "18"),
    ("**Answer:** 18", "18"),
    ("#### 18", "18"),
    ("So she has 18 eggs left.", "18"),
    (r"\boxed{3} and \boxed{5}", "5"),
    (r"$\boxed{3}$, $\boxed{5}$", "5"),
    (r"I use \boxed{}: \boxed{5}. The answer is 4.", "5"),
    (r"\boxed{\{1, 2\}}", "1,2"),
    (r"\boxed 42", "42"),
]


def boxed(answer: str) -> str:
    return rf"So the answer is $\boxed{{{answer}}}$."


@pytest.mark.parametrize("gold", GOLDS)
def test_gold_equals_itself(gold):
    assert is_equal(boxed(gold), gold) and is_readable(gold)


def test_gold_equals_no_other_gold(fresh_seed):
    rng = random.Random(fresh_seed)
    alike = [
        {"1,-2", "-2,1"},
        {"[-2,7]", r"x \in [-2,7]"},
        {r"10,\!080", r"10\,080"},
        {"0", "5x - 7y + 11z + 4 = 0"},  # an equation equals its right side
    ]
    for _ in range(60):
        gold, other = rng.sample(GOLDS, 2)
        if not any({gold, other} <= same for same in alike):
            assert not is_equal(boxed(other), gold), (gold, other)


@pytest.mark.parametrize("gold, answer", [(gold, answer) for gold, answers in RIGHT.items() for answer in answers])
def test_answer_equals_gold_however_it_is_written(gold, answer):
    assert is_equal(boxed(answer), gold)


@pytest.mark.parametrize("gold, answer", [(gold, answer) for gold, answers in WRONG.items() for answer in answers])
def test_other_answer_differs(gold, answer):
    assert not is_equal(boxed(answer), gold)


@pytest.mark.parametrize("answer, gold", PROSE)
def test_final_answer_is_found(answer, gold):
    assert is_equal(answer, gold)
    assert not is_equal(answer, "977")


@pytest.mark.parametrize(
    "answer, gold",
    [
        (r"\boxed{3} and \boxed{5}", "3"),
        (r"\boxed{3}, \boxed{5}", "3"),
        ("The final answer is [1].", "18"),
        ("The answer is not Ulla.", r"\text{Ulla}"),
        ("The answer is 18 million.", "18"),
        ("I do not know.", "4"),
        ("", "4"),
    ],
)
def test_wrong_final_answer_is_not_accepted(answer, gold):
    assert not is_equal(answer, gold)


@pytest.mark.parametrize(
    "gold", [r"\frac{1}{", "5 ?", "8/0", "(0,1", "", "x^2 +", "see the solution on page 5", "二十"]
)
def test_unreadable_gold_equals_no_number(gold):
    assert not is_readable(gold)
    assert not any(is_equal(boxed(answer), gold) for answer in ("5", "1", "0", "8", "x^2", r"\infty"))


@pytest.mark.slow
@pytest.mark.parametrize("answer", [r"9^{9^{9^{9}}}", "1000000000!", r"\sum_{n=1}^{10^{9}} \frac{1}{n^3}"])
def test_endless_comparison_counts_as_wrong(answer):
    assert not is_equal(boxed(answer), "4")
    assert is_equal(boxed(r"2^2"), "4"), "the next comparison works"


def test_comparison_leaves_signals_alone_and_works_in_threads():
    from concurrent.futures import ThreadPoolExecutor

    handler = signal.getsignal(signal.SIGALRM)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda number: is_equal(boxed(rf"\frac{{{number}}}{{2}}"), str(number / 2)), range(20)))
    assert all(results) and signal.getsignal(signal.SIGALRM) is handler


def test_killed_process_of_math_verify_is_replaced():
    assert is_equal(boxed(r"\frac{4}{2}"), "2")
    mathematics._MATH_VERIFY._process.kill()
    mathematics._MATH_VERIFY._process.wait()
    assert is_equal(boxed(r"\frac{4}{2}"), "2")


@pytest.mark.parametrize(
    "piece", ["1", "23", "(", "\\text{", "5 aaa ", "\\overline{", "[", "5 cm ", "1 1/2 ", "and ", "√", "="]
)
def test_long_answer_is_rewritten_quickly(piece):
    start = time.perf_counter()
    normalized((piece * 2000)[:2000])
    assert time.perf_counter() - start < 3
