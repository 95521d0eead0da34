"""Every metric is what its definition gives by hand, stands on the right rows, and is compared as its kind asks."""

import json
import math
import random
from dataclasses import replace

import pytest

from stagecraft.data.rows import Document, Preference
from stagecraft.errors import UserError
from stagecraft.evaluation import metrics, statistics, text
from stagecraft.evaluation.results import MEASURES, Scores
from stagecraft.evaluation.sets import Choice, EvalSets, Question, read_eval_sets
from stagecraft.generation import Likelihood, Reply

ASKED = [{"role": "user", "content": "why?"}]
SETS = EvalSets(
    documents=[Document("发烧", "d:1"), Document("rest", "d:2")],
    answers=[
        Question(ASKED, "喝水", "fact", "a:1", "发烧时多喝水。"),
        Question(ASKED, "rest", "phrasing", "a:2", "You should rest at home."),
        Question(ASKED, "看医生", "fact", "a:3", "去看医生。"),
        Question(ASKED, "no", "fact", "a:4"),  # a row without a reference: its answer is it
    ],
    choices=[
        Choice(ASKED, ["ab", "abcdefgh"], 1, "fact", "c:1"),
        Choice(ASKED, ["ab", "cd", "ef", "gh"], 0, "fact", "c:2"),
    ],
    preferences=[Preference(ASKED, "good", "bad", "p:1"), Preference(ASKED, "fine", "awful", "p:2")],
)


def likely(nats, tokens=1, end=0.0):
    return Likelihood(nats, tokens, end)


def all_scores():
    return Scores(
        documents=[likely(-6.0, 3), likely(-2.0, 2)],
        answers=[
            Reply("发烧时多喝水", 6, True),
            Reply("Rest and rest and rest and rest.", 10, False),
            Reply("挂号。", 2, True),
            Reply("No!", 2, True),
        ],
        choices=[
            [likely(-4.0, 1), likely(-8.0, 8)],
            [likely(-1.0), likely(-1.0), likely(-2.0), likely(-2.0)],
        ],
        preferences=[
            (likely(-4.0, 4, -1.0), likely(-2.0, 1, -2.0)),
            (likely(-3.0, 1, -0.5), likely(-4.0, 2, -0.5)),
        ],
        pair_replies=[Reply("x", 1, True)] * 2,
        rewards=[0.5, 1.0],
        batches=[(12, 0.5), (8, 0.5)],
    )


def earlier_scores():
    scores = all_scores()
    scores.preferences = [(likely(-5.0, 4, -1.0), likely(-2.0, 1, -1.0)), (likely(-4.0, 1), likely(-4.0, 2))]
    scores.rewards = [0.5, 0.0]
    return scores


def by_name(found):
    return {(one.metric, one.split): one for one in found}


def test_every_metric_by_hand():
    found = metrics.measured("sft", all_scores(), SETS, earlier_scores(), beta=0.1)
    values = {name: (one.value, one.n, one.chance) for name, one in by_name(found).items()}
    replies = [reply.text for reply in all_scores().answers]
    references = ["发烧时多喝水。", "You should rest at home.", "去看医生。", "no"]
    corpus = text.corpus_metrics(references)
    rouge = [text.rouge_l(*pair) for pair in zip(replies, references, strict=True)]
    expected = {
        ("perplexity", None): (math.exp(8 / 5), 2, None),
        ("bits_per_byte", None): (8 / math.log(2) / (6 + 4), 2, None),  # a Chinese character is 3 bytes
        ("answer_accuracy", "fact"): (2 / 3, 3, None),
        ("answer_accuracy", "phrasing"): (1.0, 1, None),
        ("answer_exact", None): (2 / 4, 4, None),
        ("rouge_l", None): (sum(rouge) / 4, 4, None),
        ("bleu", None): (corpus["bleu"].corpus_score(replies, None).score, 4, None),
        ("chrf", None): (corpus["chrf"].corpus_score(replies, None).score, 4, None),
        # Right by characters (-2 and -1), though not by sums (-4 and -8); the second row is a tie.
        ("choice_accuracy", "fact"): (1 / 2, 2, (1 / 2 + 1 / 4) / 2),
        ("preference_accuracy", None): (1 / 2, 2, 0.5),
        ("implicit_margin", None): (0.1 * ((-1 - -3) + (1 - 0)) / 2, 2, None),
        ("reward_win_rate", None): (0.75, 2, 0.5),  # a tie and a win
        ("stops_by_itself", None): (3 / 4, 4, None),
        ("end_of_turn", None): ((math.exp(-1.0) + math.exp(-0.5)) / 2, 2, None),
        ("repetition", None): ((2 / 4) / 4, 4, None),  # rest and rest and, and rest and rest, each twice
        ("reply_tokens", None): (5.0, 4, None),
        ("tokens_per_second", None): (20.0, 2, None),
    }
    assert list(values) == list(expected)
    for name, (value, n, chance) in expected.items():
        assert values[name] == (pytest.approx(value), n, chance), name
    assert [one.metric for one in found] == sorted((one.metric for one in found), key=list(MEASURES).index)
    assert all(one.model == "sft" and one.low <= one.value <= one.high for one in found)


def test_only_what_was_scored_is_told():
    assert metrics.measured("m", Scores(), SETS) == []
    assert metrics.compared("m", Scores(), "base", Scores(), SETS) == []
    scores = Scores(preferences=all_scores().preferences, rewards=[1.0, 2.0])
    of_pairs = {"preference_accuracy", "end_of_turn"}
    assert {one.metric for one in metrics.measured("m", scores, SETS)} == of_pairs
    assert {one.metric for one in metrics.measured("m", scores, SETS, Scores())} == of_pairs
    endless = Scores(
        preferences=[(likely(-4.0, 4), likely(-2.0, 1))] * 2
    )  # a template without an end of turn
    assert {one.metric for one in metrics.measured("m", endless, SETS)} == {"preference_accuracy"}
    server = Scores(answers=all_scores().answers)
    assert "perplexity" not in {one.metric for one in metrics.measured("m", server, SETS, all_scores())}
    assert "tokens_per_second" not in {one.metric for one in metrics.measured("m", server, SETS)}
    assert metrics.signatures(EvalSets()) == {} and "tok:zh" in metrics.signatures(SETS)["bleu"]


def test_options_count_by_characters():
    right, wrong = likely(-8.0, 2), likely(-4.0, 2)
    choice = EvalSets(choices=[Choice(ASKED, ["abcdefghi", "abc"], 0, None, "c:1")])
    [one] = metrics.measured("m", Scores(choices=[[right, wrong]]), choice)
    assert one.value == 1.0  # -8/9 against -4/3; by tokens (-4, -2) or by sums it would be wrong
    same = EvalSets(choices=[Choice(ASKED, ["abcdef", "abc"], 0, None, "c:1")])
    [tie] = metrics.measured("m", Scores(choices=[[right, wrong]]), same)
    assert tie.value == 0.0


def test_the_margin_takes_the_end_of_turn_and_the_beta():
    def margin(scores, beta=0.1):
        return by_name(metrics.measured("m", scores, SETS, earlier_scores(), beta))[
            "implicit_margin", None
        ].value

    changed = all_scores()
    chosen, rejected = changed.preferences[0]
    changed.preferences[0] = (Likelihood(chosen.nats, chosen.tokens, chosen.end + 2), rejected)
    assert margin(changed) == pytest.approx(margin(all_scores()) + 0.1 * 2 / 2)
    assert margin(all_scores(), 0.5) == pytest.approx(5 * margin(all_scores()))
    assert margin(earlier_scores()) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["perplexity", "choice_accuracy", "preference_accuracy", "reward_win_rate"])
def test_what_is_no_number_is_refused(name, value):
    scores = all_scores()
    if name == "perplexity":
        scores.documents[1] = likely(value)
    elif name == "choice_accuracy":
        scores.choices[1][2] = likely(value)
    elif name == "preference_accuracy":
        scores.preferences[0] = (scores.preferences[0][0], likely(value))
    else:
        scores.rewards[1] = value
    with pytest.raises(UserError, match=rf"m: {name}.*: the model gives NaN or infinite scores"):
        metrics.measured("m", scores, SETS, earlier_scores())


def test_a_perplexity_beyond_all_numbers_is_refused_too():
    scores = Scores(documents=[likely(-2000.0), likely(-2000.0)])
    with pytest.raises(UserError, match="m: perplexity"):
        metrics.measured("m", scores, SETS)


def test_a_batch_too_fast_for_the_clock_is_no_speed():
    [one] = metrics.measured("m", Scores(batches=[(5, 0.0), (30, 1.5)]), SETS)
    assert (one.value, one.n) == (20.0, 1)
    assert metrics.measured("m", Scores(batches=[(5, 0.0)]), SETS) == []


def test_reward_accuracy():
    one = metrics.reward_accuracy("rm", [(1.0, 1.0), (2.0, 1.0)])
    assert (one.metric, one.model, one.value, one.n, one.chance) == ("reward_accuracy", "rm", 0.5, 2, 0.5)
    with pytest.raises(UserError, match="rm: reward_accuracy: the model gives NaN"):
        metrics.reward_accuracy("rm", [(math.nan, 1.0)])


# Many rows


def many(seed, skill, n=200, tokens=5):
    """A model's scores on the sets of many(): more of them right with more skill."""
    rng = random.Random(seed)

    def likelihood(mean):
        return likely(mean + rng.gauss(0, 1), tokens, rng.gauss(0, 0.1))

    def reply():
        words = rng.choices(["rest", "at", "home", "drink", "water"], k=5)
        return Reply(
            "rest at home and drink" if rng.random() < skill else " ".join(words),
            rng.randint(3, 9),
            rng.random() < skill,
        )

    return Scores(
        documents=[likelihood(-20 + 5 * skill) for _ in range(n)],
        answers=[reply() for _ in range(n)],
        choices=[[likelihood(-10 + 3 * skill), likelihood(-10)] for _ in range(n)],
        preferences=[(likelihood(-10 + 3 * skill), likelihood(-10)) for _ in range(n)],
        rewards=[rng.gauss(skill, 0.5) for _ in range(n)],
        batches=[(100, 1.0 + rng.random()) for _ in range(9)],
    )


def many_sets(n=200):
    return EvalSets(
        documents=[Document("a document", f"d:{i}") for i in range(n)],
        answers=[
            Question(ASKED, "rest at home", "fact", f"a:{i}", "rest at home and drink") for i in range(n)
        ],
        choices=[Choice(ASKED, ["abc", "def"], 0, "fact", f"c:{i}") for i in range(n)],
        preferences=[Preference(ASKED, "good", "bad", f"p:{i}") for i in range(n)],
    )


def test_a_better_model_is_told_from_noise():
    sets, weak, strong = many_sets(), many(1, 0.3), many(2, 0.8)
    found = by_name(metrics.compared("sft", strong, "base", weak, sets))
    assert [name for name, _ in found] == [
        name for name in MEASURES if name not in ("reward_accuracy", "tokens_per_second")
    ]
    silent = {"reply_tokens", "repetition", "end_of_turn"}
    assert {one.verdict for (name, _), one in found.items() if name not in silent} == {"better"}
    values = [by_name(metrics.measured("m", scores, sets, weak)) for scores in (strong, weak)]
    for name, one in found.items():
        assert (one.model, one.before, one.n) == ("sft", "base", 200)
        assert one.low <= one.difference <= one.high and 0 < one.p <= 1, name
        assert (one.p < 0.05) == (one.verdict != "unclear")
        no_difference = {"implicit_margin": 0.0, "reward_win_rate": 0.5}.get(name[0])
        old = values[1][name].value if no_difference is None else no_difference
        assert one.difference == pytest.approx(values[0][name].value - old)
    # The other way round it is worse; and against itself, or by chance alone, nothing is clear.
    worse = metrics.compared("sft", weak, "base", strong, sets)
    assert {one.verdict for one in worse if one.metric not in silent} == {"worse"}
    same = metrics.compared("copy", strong, "sft", strong, sets)
    assert {(one.verdict, one.difference, one.p) for one in same} == {("unclear", 0.0, 1.0)}
    again = metrics.compared("sft", many(9, 0.8), "base", strong, sets)
    assert sum(one.verdict == "unclear" for one in again) >= len(again) - 2


@pytest.mark.parametrize(("size", "clear"), [(1e-6, set()), (1e-3, {"better"})])  # the second is the control
def test_rounding_is_no_difference(size, clear):
    """One model computed twice, in sums of another order; every row a little higher the second time."""
    first = many(2, 0.8)

    def shifted(row):
        return Likelihood(row.nats * (1 - size), row.tokens, row.end)

    second = replace(
        first,
        documents=[shifted(row) for row in first.documents],
        preferences=[(shifted(chosen), rejected) for chosen, rejected in first.preferences],
        rewards=[reward + size * abs(reward) for reward in first.rewards],
    )
    found = metrics.compared("again", second, "once", first, many_sets())
    assert {one.verdict for one in found} - {"unclear"} == clear
    assert all(one.difference == 0 for one in found) == (not clear)


def test_which_test_a_comparison_is():
    sets, weak, strong = many_sets(), many(1, 0.4), many(2, 0.5)
    found = by_name(metrics.compared("sft", strong, "base", weak, sets))
    right = [[text.contains(reply.text, "rest at home") for reply in s.answers] for s in (strong, weak)]
    gained, lost = (sum(a > b for a, b in zip(*pair, strict=True)) for pair in (right, right[::-1]))
    assert found["answer_accuracy", "fact"].p == statistics.mcnemar(gained, lost)
    wins = sum(a > b for a, b in zip(strong.rewards, weak.rewards, strict=True))
    assert found["reward_win_rate", None].p == statistics.mcnemar(wins, 200 - wins)


def test_bleu_is_tested_as_sacrebleu_does():
    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.significance import PairedTest

    sets, weak, strong = many_sets(60), many(1, 0.5, 60), many(2, 0.6, 60)
    replies = [[reply.text for reply in scores.answers] for scores in (weak, strong)]
    theirs = PairedTest(
        [("base", replies[0]), ("sft", replies[1])],
        {"BLEU": BLEU(), "chrF2": CHRF()},
        [[row.reference for row in sets.answers]],
        test_type="ar",
        n_samples=10_000,
    )()[1]
    found = by_name(metrics.compared("sft", strong, "base", weak, sets))
    for ours, name in (("bleu", "BLEU"), ("chrf", "chrF2")):
        base, sft = theirs[name]
        assert found[ours, None].difference == pytest.approx(sft.score - base.score)
        assert found[ours, None].p == pytest.approx(sft.p_value, abs=0.02)
        assert 0.02 < sft.p_value < 0.98


def test_perplexity_is_compared_between_equal_tokens_only():
    sets = many_sets()
    names = {one.metric for one in metrics.compared("b", many(1, 0.5), "a", many(2, 0.5, tokens=4), sets)}
    assert "perplexity" not in names and "bits_per_byte" in names


def test_a_metric_without_a_good_side_is_higher_or_lower():
    sets, long, short = many_sets(), many(1, 0.5), many(2, 0.5)
    long.answers = [Reply(reply.text, reply.tokens + 5, reply.stopped) for reply in long.answers]
    assert by_name(metrics.compared("b", long, "a", short, sets))["reply_tokens", None].verdict == "higher"
    assert by_name(metrics.compared("b", short, "a", long, sets))["reply_tokens", None].verdict == "lower"


def test_numbers_depend_on_the_seed_alone():
    sets, weak, strong = many_sets(), many(1, 0.4), many(2, 0.5)
    first = metrics.measured("m", strong, sets, weak, seed=1)
    assert first == metrics.measured("m", strong, sets, weak, seed=1)
    other = metrics.measured("m", strong, sets, weak, seed=2)
    assert [one.value for one in first] == [one.value for one in other] and first != other
    assert metrics.compared("m", strong, "a", weak, sets, seed=1) == metrics.compared(
        "m", strong, "a", weak, sets, seed=1
    )


def test_distributions_are_the_rows_of_the_metrics():
    sets = many_sets()
    models = {"base": many(1, 0.3), "sft": many(2, 0.5), "server": Scores(answers=many(3, 0.5).answers)}
    found = metrics.distributions(models, sets)
    assert {name: list(each) for name, each in found.items()} == {
        "bits_per_byte": ["base", "sft"],
        "rouge_l": ["base", "sft", "server"],
        "implicit_margin": ["sft"],
        "reply_tokens": ["base", "sft", "server"],
    }
    told = by_name(metrics.measured("sft", models["sft"], sets, models["base"]))
    for name, each in found.items():
        assert len(each["sft"]) == 200 and sum(each["sft"]) / 200 == pytest.approx(told[name, None].value)
    json.dumps(found)


# The reference of a row


def test_a_row_may_give_a_whole_reply_to_compare_with(tmp_path):
    rows = [{"question": "q", "answer": "a", "reference": "a is it"}, {"question": "q", "answer": "a"}]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.reference for row in read_eval_sets(str(tmp_path)).answers] == ["a is it", "a"]
    bad = [5, "", " ?! ", None, "\ud800"]
    file.write_text("".join(json.dumps({**rows[0], "reference": value}) + "\n" for value in bad))
    with pytest.raises(UserError) as error:
        read_eval_sets(str(tmp_path))
    lines = str(error.value).splitlines()
    assert len(lines) == 5 and all('"reference" must be' in line for line in lines[:4])
    assert "answers.jsonl:5: holds half of a surrogate pair" in lines[4]
