from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from lockstep.errors import OptionError
from lockstep.rewards.boxed import last_boxed
from lockstep.rewards.deepscaler import after_thinking
from lockstep.rewards.outcome import InvalidRewardError, checked_reward
from lockstep.rewards.registry import BUILTIN_REWARDS, RewardName, check_reward_options, load_reward, reward_name
from lockstep.types import Sample


def options(**values):
    defaults = {"rm_type": None, "rm_url": None, "custom_rm_path": None, "group_rm": False, "rollout_seed": 42}
    return SimpleNamespace(**defaults | values)


def judge(rm_type, response, label, *, index=0, seed=42, **metadata):
    sample = Sample(index=index, response=response, label=label, metadata=metadata)
    return load_reward(RewardName("--rm-type", rm_type))(options(rollout_seed=seed), sample)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{12", None),
        (r"\boxed{1} and \boxed{2", None),
        ("no box", None),
        ("", None),
    ],
)
def test_the_last_box_is_read_with_its_braces_matched(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("response", "label", "expected"),
    [
        (r"\boxed{34}", "34", 1.0),
        (r"\boxed{34}", 34, 1.0),
        (r"\boxed{34.}", "34", 1.0),
        (r"\boxed{35}", "34", 0.0),
        (r"\boxed{34} no, \boxed{35}", "34", 0.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{\frac{2}{4}}", "1/2", 1.0),
        (r"\boxed{2\sqrt{2}}", r"$\sqrt{8}$", 1.0),
        (r"\boxed{1+x^2}", "x^2 + 1", 1.0),
        (r"\boxed{x^2 - 1}", "x^2 + 1", 0.0),
        (r"\boxed{1,234}", "1234", 1.0),
        (r"\boxed{5\text{ cm}}", "5", 1.0),
        (r"\boxed{x = 5}", "5", 1.0),
        (r"\boxed{[0, 1]}", "(0, 1)", 0.0),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", 1.0),
        (r"\boxed{34}", r"We find $x = \boxed{34}$.", 1.0),
        (r"\boxed{East}", r"\text{east}", 1.0),
        (r"\boxed{sate}", "east", 0.0),
        (r"\boxed{\text{(A)}}", "(A)", 1.0),
        ("The final answer is 42.", "42", 1.0),
        ("The final answer is $42$. Not 17.", "17", 0.0),
        ("step 42", "43", 0.0),
        ("no number here", "42", 0.0),
        (r"the answer is 42, \boxed{4", "42", 0.0),
        (r"\boxed{}", "42", 0.0),
        ("", "42", 0.0),
    ],
)
def test_math_accepts_equal_mathematics_and_nothing_else(response, label, expected):
    assert judge("math", response, label) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"hm</think> \boxed{5}", 1.0),
        (r"hm</think> \boxed{\frac{10}{2}}", 1.0),
        (r"hm</think> \boxed{6}", 0.0),
        (r"\boxed{5}</think> so \boxed{6}", 0.0),
        (r"\boxed{5}</think> done", 0.0),
        (r"a</think>\boxed{6}</think>\boxed{5}", 1.0),
        (r"###Response \boxed{5}", 1.0),
        (r"###Response \boxed{6} ###Response \boxed{5}", 0.0),
        (r"\boxed{5}", 0.0),
        ("hm</think> the answer is 5", 0.0),
    ],
)
def test_deepscaler_judges_the_box_after_the_thinking(response, expected):
    assert judge("deepscaler", response, "5") == expected


def test_a_response_that_never_ends_its_thinking_is_recognised():
    assert after_thinking(r"still thinking \boxed{5}") is None
    assert after_thinking("thought</think>") == ""


@pytest.mark.parametrize(
    ("response", "label", "prediction", "is_correct"),
    [
        ("Answer: 34", "34", "34", True),
        ("answer :  $34$", "34", "34", True),
        ("Answer: 17\nAnswer: 34", "34", "34", True),
        ("Answer: 34\nAnswer: 17", "34", "17", False),
        (r"Answer: \boxed{34}", "34", "34", True),
        ("Answer: x = 34", "34", "34", True),
        ("Answer: 1,234", "1234", "1234", True),
        ("Answer: 34 dollars", "34", "34", True),
        (r"Answer: $34^\circ$<|im_end|>", "34.0", "34", True),
        ("Answer: thirty-four", "34", "thirty-four", False),
        (r"Answer: \frac12", r"\frac{1}{2}", r"\frac{1}{2}", True),
        (r"Answer: \sqrt2", r"\sqrt{2}", r"\sqrt{2}", True),
        ("Answer: 3", "3.5", "3", False),
        ("34", "34", "[INVALID]", False),
        ("Answer: 34" + 300 * ".", "34", "[INVALID]", False),
    ],
)
def test_dapo_compares_the_last_answer_line_as_a_normalised_string(response, label, prediction, is_correct):
    expected = {"score": 1.0 if is_correct else -1.0, "acc": is_correct, "pred": prediction}
    assert judge("dapo", response, label) == expected


@pytest.mark.parametrize(
    ("response", "label", "expected"),
    [
        ("The Eiffel Tower", "Eiffel tower!", 1.0),
        ("in Paris, France", "Paris", 0.5),  # precision 1/3, recall 1
        ("red red blue", "red green", 0.4),  # one common word: 2 * (1/3) * (1/2) / (5/6)
        ("London", "Paris", 0.0),
        ("yes", "Yes.", 1.0),
        ("yes", "yes it is", 0.0),
        ("yes it is", "yes", 0.0),
        ("", "Paris", 0.0),
    ],
)
def test_f1_is_the_harmonic_mean_over_common_words(response, label, expected):
    assert judge("f1", response, label) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("response", "label", "metadata", "expected"),
    [
        ("The answer is B", "B", {}, 1.0),
        ("The answer is C", "B", {}, 0.0),
        ("Answer: (B)", "B", {}, 1.0),
        (r"so the answer is \boxed{\text{B}}", "B", {}, 1.0),
        ("answer: b", "B", {}, 1.0),
        ("the answer is **D**.", "B", {}, 0.0),
        ("B is correct", "B", {}, 1.0),
        ("(B) is the correct one", "B", {}, 1.0),
        ("It depends. B", "B", {}, 1.0),
        ("the answer depends on B", "D", {}, 0.0),
        ("Option A is wrong. The answer is B.", "B", {}, 1.0),
        ("the answer is A</think>The answer is B", "B", {}, 1.0),
        ("The answer is B", "anything", {"correct_letter": "b"}, 1.0),
        ("The answer is B", "A", {"correct_letter": "B"}, 1.0),
        ("The answer is B", 1, {}, 1.0),
        ("The answer is B", "iron", {"choices": ["lead", "iron"]}, 1.0),
        ("The answer is A", "iron", {"choices": {"A": "lead", "B": "iron"}}, 0.0),
        ("it must be iron.", "B", {"choices": ["lead", "iron"]}, 1.0),
        ("it must be lead.", "B", {"choices": ["lead", "iron"]}, 0.0),
        ("it must be Iron", "B", {"answer_text": "iron"}, 1.0),
        ("The answer is E", "B", {"choices": ["lead", "iron"]}, 0.0),
        ("The answer is Z", "Z", {"valid_letters": ["Y", "Z"]}, 1.0),
        ("", "B", {}, 0.0),
    ],
)
def test_gpqa_compares_the_chosen_option(response, label, metadata, expected):
    assert judge("gpqa", response, label, **metadata) == expected


@pytest.mark.parametrize(
    ("response", "label", "expected"),
    [
        (" 42\n", "42", 1.0),
        ("42<|im_end|>", "42", 1.0),
        ("42 <|endoftext|>\n", "42", 1.0),
        ("42<|im_end|><|im_end|>", "42", 0.0),
        ("42.", "42", 0.0),
        ("a b", "a  b", 0.0),
        ("Yes", "yes", 0.0),
        ("42", 42, 1.0),
    ],
)
def test_exact_wants_the_label_and_nothing_more(response, label, expected):
    assert judge("exact", response, label) == expected


def test_random_rewards_depend_on_seed_and_index_only():
    tosses = [judge("random", "x", None, index=i) for i in range(400)]
    assert tosses == [judge("random", "other", "label", index=i) for i in range(400)]
    assert tosses != [judge("random", "x", None, index=i, seed=43) for i in range(400)]
    assert set(tosses) == {0.0, 1.0}
    assert abs(sum(tosses) / 400 - 0.5) < 0.1  # four standard deviations of a fair coin


def test_boxed_rewards_see_the_content_of_the_last_box_only():
    assert judge("boxed_exact", r"I think \boxed{ 42 }!", "42") == 1.0
    assert judge("exact", r"I think \boxed{ 42 }!", "42") == 0.0
    assert judge("boxed_exact", "42", "42") == 0.0
    assert judge("boxed_math", r"\boxed{\frac{1}{2}}", "0.5") == 1.0
    assert judge("boxed_f1", r"Paris \boxed{London}", "Paris") == 0.0


@pytest.mark.parametrize("rm_type", ["math", "deepscaler", "dapo", "f1", "exact"])
def test_a_sample_without_label_is_an_error_and_not_a_zero(rm_type):
    with pytest.raises(ValueError, match="sample 0 has no label"):
        judge(rm_type, r"</think>Answer: \boxed{1}", None)


def test_the_most_specific_choice_of_reward_wins():
    sample = Sample(metadata={"rm_type": "f1"})
    both = options(rm_type="math", custom_rm_path="pkg.reward")
    assert reward_name(options(rm_type="math"), Sample()) == RewardName("--rm-type", "math")
    assert reward_name(options(rm_type="math"), sample) == RewardName("--rm-type", "f1")
    assert reward_name(both, sample) == RewardName("--custom-rm-path", "pkg.reward")
    sample.custom_rm_path = "pkg.own"
    assert reward_name(both, sample) == RewardName("--custom-rm-path", "pkg.own")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rm_type": "mth"}, "The closest is math"),
        ({"rm_type": "boxed_exct"}, "The closest is boxed_exact"),
        ({"rm_type": "ifbench"}, "comes in a later version"),
        ({"rm_type": "remote_rm"}, "--rm-url: --rm-type remote_rm has no address"),
        ({"rm_type": "math", "group_rm": True}, "--group-rm is True"),
    ],
)
def test_a_reward_that_cannot_work_is_refused_at_once(values, message):
    with pytest.raises(OptionError, match=message):
        check_reward_options(options(**values))


def test_a_sample_without_any_reward_is_refused():
    with pytest.raises(OptionError, match="sample 5 has no reward"):
        reward_name(options(), Sample(index=5))


@pytest.mark.parametrize("value", [True, 1, 1.0, __import__("numpy").float32(1), __import__("numpy").ones(1)])
def test_numbers_of_every_kind_become_floats(value):
    reward = checked_reward(value, None)
    assert reward == 1.0
    assert type(reward) is float


@pytest.mark.parametrize(
    ("value", "key", "message"),
    [
        (float("nan"), None, "nan, not a finite number"),
        (None, None, "None, a NoneType"),
        ("1", None, "'1', a str"),
        ([1.0], None, r"\[1.0\], a list"),
        (1.0, "score", "not a dict with the entry 'score'"),
        ({"acc": 1}, "score", r"\['acc'\], without 'score'"),
        ({"score": float("inf")}, "score", "inf, not a finite number"),
    ],
)
def test_what_cannot_be_trained_on_is_not_a_reward(value, key, message):
    with pytest.raises(InvalidRewardError, match=message):
        checked_reward(value, key)


def test_rewards_import_neither_torch_nor_transformers():
    modules = [f"lockstep.rewards.{name}" for name in (*BUILTIN_REWARDS, "pool", "worker")]
    code = (
        f"import sys, importlib; [importlib.import_module(name) for name in {modules!r}]; "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
