"""Check the answer checker. It decides every reward and every printed number."""

import time
from fractions import Fraction

import pytest

import common

READ = {
    "18": 18, "-18": -18, "\u221218": -18, "+18": 18, "$18": 18, "-$18": -18, "$-18": -18,
    "$\u221218": -18, "\u2212$18": -18,
    "1,234": 1234, "1,234,567": 1234567, "$1,234.50": Fraction(2469, 2), "0.5": Fraction(1, 2),
    ".5": Fraction(1, 2),
    "18.0": 18, "18.": 18, "3/4": Fraction(3, 4), "-3/4": Fraction(-3, 4), "**18**": 18,
    "**18.**": 18, "**$18**": 18, "50%": 50,
    "18 apples": 18, "18 apples.": 18, "18 dollars per hour": 18, "18/hour": 18,
    "18 miles/hour": 18, "x = 18": 18, "18kg": 18,
    "18 (18 apples)": 18, "1000": 1000, "007": 7, "$ 18": 18, "18$": 18, "18, which is all": 18,
    "\\boxed{18}": 18,
    "-\u20ac5": -5, "\u00a35": 5, "-(18)": -18, "(-18)": -18, "$\u00a05": 5,
    "-\\$18": -18, "\\$-18": -18, "-$\\$18$": -18, "$-\\$5$": -5, "-\\boxed{18}": -18,
    "\\boxed{-18}": -18, "\\$18": 18,
    "Rs.350": 350, "Rs. 350": 350, "Rs.1,350.50": Fraction(2701, 2), "No.7": 7, "$.5": Fraction(1, 2),
    "is .5": Fraction(1, 2), "5km": 5, "5kg": 5, "5 m": 5, "5 kittens": 5, "5 Ks": 5,
    "18. Millions watched": 18,
}  # fmt: skip
UNREAD = ["", " ", "none", "18/", "/18", "1,8", "12,34", "1234,567", "1,2345", "1.2.3", "1/0",
          "1/2/3", "1.5/2", "18 or 19",
          "18-20", "18 - 20", "18 / 2", "- 18", "--18", "1e5", "10:30", "2^3", "1 000", "1_000",
          "1 001", "1_001", "1e1", "2^2", "3*3", "10:10", "18 18", "\u0661\u0668", "\uff11\uff18",
          "5\u00b2",
          "\u00bd", "18\u0661", "nan", "inf", "9" * 65, "1\x002", "\\frac{1}{2}", "5, 6",
          "\u4e94 5", "-\u00a05", "\u20135", "\u2014 5", "-(-5)",
          "$1.5 million", "1.5 Million", "**1.5** million", "1.5-million", "5k", "5K", "$5k.", "$2M", "2bn",
          "5 K", "5 M", "5 bn", "$5 bn", "$5m", "\u20ac5m", "5 mln", "5 Mio", "5 lacs", "3 gross", "minus 5", "negative 5",
          "5 and a half", "3 dozen", "2 hundred", "4 thousandths", "5 lakh rupees", "Rs.5 crore", "3 * 3", "3 x 3", "3 + 3", "2^{2}",
          "\\sqrt{16}"]  # fmt: skip


@pytest.mark.parametrize("space", ["", " "])
@pytest.mark.parametrize("written", READ)
def test_every_form_of_a_number_is_read(written, space):
    assert common.extract_answer(f"2+2=4\n####{space}{written}") == READ[written]


@pytest.mark.parametrize("written", UNREAD)
def test_text_that_is_not_one_clear_number_is_no_answer(written):
    assert common.extract_answer(f"2+2=4\n#### {written}") is None


def test_only_the_first_solution_of_a_run_on_text_counts():
    """Trap: reading the last answer of a text that continues with the next question."""
    assert common.extract_answer("#### 3\n\nQuestion: and now?\nAnswer:\n#### 4") == 3
    assert common.extract_answer("#### 3\n#### 4") == 3
    assert common.extract_answer("I do not know.\nQuestion: and now?\nAnswer:\n#### 4") is None
    assert common.extract_answer("Question: another one?\nAnswer:\n#### 4") is None
    assert (
        common.first_solution("\n2+2=4\nQuestion: x") == "\n2+2=4"
        and common.first_solution("2+2") == "2+2"
    )
    assert common.extract_answer("so it is 4") is None
    assert common.extract_answer("####\n4") is None


def test_a_sample_that_was_truncated_within_its_answer_line_has_no_answer():
    """ "#### 1" may be the start of "#### 18"."""
    problem = common.Problem("p", "?", Fraction(1))
    assert common.Sample(problem, 0, "#### 1", finished=True).correct
    assert not common.Sample(problem, 0, "#### 1", finished=False).correct
    assert common.Sample(problem, 0, "#### 1\n\nQuestion: and", finished=False).correct
    # The text may continue with " or 2".
    for rest in ("", " o", " or"):
        assert (
            common.Sample(problem, 0, f"4-3=<<4-3=1>>1\n#### 1{rest}", finished=False).answer
            is None
        )
    assert common.extract_answer("#### 1.0") == 1 and common.extract_answer("1") != 1


def test_only_the_lenient_reader_takes_the_last_number():
    assert common.extract_answer("so 3 and 4, that is $7.", lenient=True) == 7
    assert common.extract_answer("so 3 and 4, that is $7.") is None
    assert common.extract_answer("7 is wrong\n#### 8", lenient=True) == 8
    assert common.extract_answer("no number", lenient=True) is None
    assert common.extract_answer("3 pens for $1.5 million", lenient=True) is None
    heading = "#### Solution\n10+8=18\n\nThe answer is 18.\nQuestion: 5?"
    assert (
        common.extract_answer(heading, lenient=True) == 18
        and common.extract_answer(heading) is None
    )
    unended = common.Sample(
        common.Problem("p", "?", Fraction(1)), 0, "#### Solution\n3+5=8 and then 1", finished=False
    )
    unended.grade(lenient=True)
    # The last number may be the start of 18.
    assert unended.answer == 8
    cut = common.Sample(
        common.Problem("p", "?", Fraction(1)), 0, "half of 2 is 1 and 3 less 2 is 1", finished=False
    )
    # Without a character after it, "1" may be the start of "18".
    for text, answer in (
        (cut.text, 2),
        (cut.text + ",", 2),
        (cut.text + " pen", 1),
        ("1", None),
    ):
        cut.text = text
        cut.grade(lenient=True)
        assert cut.answer == answer


def test_equal_numbers_are_one_vote_in_every_notation():
    """Trap: voting over strings splits "18", "18.0" and "18." into three answers."""
    assert (
        len(
            {
                common.extract_answer(f"#### {text}")
                for text in ("18", "18.0", "18.", "$18", "36/2", "**18**")
            }
        )
        == 1
    )


HOSTILE = {
    "digits": "9", "commas": ",", "marks": "#", "dots": ".", "slashes": "/", "NUL": "\x00",
    "groups": "1,234,", "equals": "1+1=",
    "numbers": "1 ", "Arabic digits": "\u0661", "minus": "-", "annotations": "<<", "lines": "\n",
    "dollars": "-$", "stars": "*5*",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_takes_linear_time_and_raises_no_exception(name):
    """300 kB take a second or two on any machine. Quadratic code would need minutes."""
    for prefix in ("", "#### ", "#### 18 ", "<<"):
        text = prefix + HOSTILE[name] * (300_000 // len(HOSTILE[name]))
        started = time.process_time()
        for lenient in (False, True):
            assert (
                common.extract_answer(text, lenient) is None
                or len(str(common.extract_answer(text, lenient))) < 130
            )
        common.equations(text)
        assert time.process_time() - started < 6
    if name in ("digits", "Arabic digits", "NUL"):
        assert common.extract_answer("#### " + HOSTILE[name] * 1_000_000) is None


def test_equations_are_read_from_annotations_and_from_text():
    assert common.equations("14+6=<<14+6=20>>20\n20 * 2 = <<20*2=40>>40\n#### 40") == (
        "14+6",
        "20*2",
    )
    assert common.equations("She has 14 + 6 = 20 and then 20 x 2 = $40.\n#### 40") == (
        "14+6",
        "20*2",
    )
    assert common.equations("x = 5\n#### 5") == ()
    # A sign is no operation.
    assert common.equations("<<-5=-5>>") == () and common.equations("<<-5+7=2>>") == ("-5+7",)
    for written in ("6 \u00d7 3 = 18", "<<6\u00d73=18>>", "6 x 3 = 18", "<<$6*3=$18>>"):
        assert common.equations(written) == ("6*3",)
    assert (
        common.equations("<<1,200\u00f73=400>>")
        == common.equations("1,200 \u00f7 3 = 400")
        == ("1200/3",)
    )
    assert common.equations("<<.5*20=10>>") == common.equations("<<0.5*20=10>>") == ("0.5*20",)
    assert common.equations("<<20%*50=10>>") != common.equations("<<20*50=1000>>")
    assert common.equations("3 pens. 5 * 3 = 15 x 1.5 = 22.5") == ("5*3", "15*1.5")
    assert common.equations("<<1+1=2>>2\n#### 2\nQuestion: <<3+3=6>>") == ("1+1",)


def test_every_answer_of_gsm8k_and_svamp_is_read_correctly(data_folder, monkeypatch):
    monkeypatch.chdir(data_folder)
    sizes = {}
    for dataset in ("gsm8k", "svamp"):
        for split in ("train", "dev", "test"):
            problems = common.load_problems(dataset, split)
            sizes[dataset, split] = len(problems)
            for p in problems:
                assert common.extract_answer(f"#### {p.answer}") == p.answer
                assert common.extract_answer(f"#### {float(p.answer)}") == p.answer
                if p.solution:
                    plain = p.solution.rpartition("####")[2].strip().replace(",", "")
                    assert common.extract_answer(p.solution) == p.answer == Fraction(plain)
                    assert common.first_solution(p.solution) == p.solution
    assert sizes == {
        ("gsm8k", "train"): 7217, ("gsm8k", "dev"): 256, ("gsm8k", "test"): 1319,
        ("svamp", "train"): 630, ("svamp", "dev"): 70, ("svamp", "test"): 300,
    }  # fmt: skip


def test_a_latex_fraction_without_braces_is_no_answer():
    assert common.extract_answer("#### \\frac12") is None
