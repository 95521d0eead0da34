"""The same answer is found in any writing of it, and scores of likeness are the ones that others compute."""

import random

import pytest

from stagecraft.evaluation import text


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("体温为３８．５ ℃，应就医。", "38.5℃", True),
        ("多喝水、休息。", "多喝水, 休息", True),
        ("应挂呼吸 内科。", "呼吸内科", True),
        ("You should Drink\n plenty  of WATER", "drink plenty of water.", True),
        ("它叫「流感」！", "“流感”", True),
        ("take 2, 5 or 10", "5", True),
        ("take 15 mg", "5 mg", False),
        ("take 2.5mg", "5 mg", False),
        ("in 1,500 ml", "500 ml", False),
        ("heart rate", "heartrate", False),
        ("<think>呼吸内科</think>皮肤科", "呼吸内科", False),
        ("呼吸内科？\n</think>\n\n皮肤科", "呼吸内科", False),  # the prompt ended with <think>
        ("<think>呼吸内科？或者", "呼吸内科", False),  # cut off at the limit
        ("<think>皮肤科？</think>呼吸内科", "呼吸内科", True),
        ("", "呼吸内科", False),
    ],
)
def test_contains(reply, answer, right):
    assert text.contains(reply, answer) is right


@pytest.mark.parametrize(
    ("reply", "reference", "right"),
    [
        ("多喝水，注意休息。", "多喝水, 注意休息", True),
        ("<think>\n嗯\n</think>\n\nDrink water!", "drink  water", True),
        ("Drink water and rest", "drink water", False),
        ("", "drink water", False),
    ],
)
def test_exact(reply, reference, right):
    assert text.exact(reply, reference) is right


def test_units_are_words_and_wide_characters():
    assert text.units("发烧 38.5℃：drink Water，多喝２杯") == [
        *"发烧",
        "38",
        "5",
        "c",
        "drink",
        "water",
        *"多喝",
        "2",
        "杯",
    ]
    assert text.units("take 5 mg") == text.units("Take 5mg.") == ["take", "5", "mg"]
    assert text.units("𠀀字…！") == ["𠀀", "字"]


@pytest.mark.parametrize(
    ("reply", "reference", "f1"),
    [
        # As rouge_score 0.1.2 computes them (rougeL, no stemming).
        ("police kill the gunman", "police killed the gunman", 0.75),
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("Drink plenty of warm water and rest at home.", "Rest at home, and drink water.", 0.4),
        ("see a doctor when the fever lasts", "see the doctor if the fever lasts three days", 0.625),
        ("rest", "water", 0.0),
        ("", "water", 0.0),
        # By hand: 5 characters of 6 and 6 in the same order; 4 of 4 and 8.
        ("多喝水要休息", "多喝水，要多休", 10 / 12),
        ("注意休息", "发烧时要注意休息", 8 / 12),
        ("<think>注意休息</think>看医生", "注意休息", 0.0),
        # Words and characters: 喝 3 cups of 水, all but one unit.
        ("喝 3 cups 水", "喝3 cups 温水", 8 / 9),
    ],
)
def test_rouge_l(reply, reference, f1):
    assert text.rouge_l(reply, reference) == pytest.approx(f1)


def test_the_longest_common_subsequence_is_the_table_of_all_pairs():
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.choice("abcde") for _ in range(rng.randint(0, 90))] for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, one in enumerate(a):
            for j, other in enumerate(b):
                table[i + 1][j + 1] = (
                    table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
                )
        assert text._longest_common(a, b) == table[-1][-1]


@pytest.mark.parametrize(
    ("reply", "share"),
    [
        ("", 0.0),
        ("a b c", 0.0),
        ("a b c d", 0.0),
        ("a b c d a b c d", 1 / 5),  # abcd bcda cdab dabc abcd
        ("no no no no no no", 2 / 3),
        ("多喝水吧多喝水吧", 1 / 5),
        ("多喝水吧，少喝酒吧", 0.0),
        ("<think>no no no no no no", 1 / 2),  # a thought that loops is a loop
    ],
)
def test_repetition(reply, share):
    assert text.repetition(reply) == pytest.approx(share)


CHINESE = (["发烧时多喝水，注意休息。", "挂呼吸内科。"], ["发烧时要多喝水，并注意休息。", "应该挂呼吸内科。"])
ENGLISH = (
    ["drink plenty of warm water at home", "see a doctor"],
    ["drink plenty of water at home", "see the doctor now"],
)


@pytest.mark.parametrize(("pairs", "tokenizer"), [(CHINESE, "zh"), (ENGLISH, "13a")])
def test_corpus_scores_are_sacrebleus(pairs, tokenizer):
    from sacrebleu.metrics import BLEU, CHRF

    replies, references = pairs
    theirs = {"bleu": BLEU(tokenize=tokenizer), "chrf": CHRF()}
    for name, metric in text.corpus_metrics(references).items():
        expected = theirs[name].corpus_score(replies, [references])
        assert metric.corpus_score(replies, None).score == expected.score > 10
        assert text.signatures(references)[name] == theirs[name].get_signature().format()
    assert f"tok:{tokenizer}" in text.signatures(references)["bleu"]
    # Control: Chinese that is not cut into characters has next to no 4-grams in common.
    other = BLEU(tokenize="zh" if tokenizer == "13a" else "13a").corpus_score(CHINESE[0], [CHINESE[1]]).score
    assert (other < 10) is (tokenizer == "zh")


def test_bleu_by_hand():
    """6 of 7 words, 4 of 6 pairs, 2 of 5 triples, no four of 4, which counts half; longer, so no penalty."""
    bleu = text.corpus_metrics(["drink plenty of water at home"])["bleu"]
    score = bleu.corpus_score(["drink plenty of warm water at home"], None).score
    assert score == pytest.approx(100 * (6 / 7 * 4 / 6 * 2 / 5 * 0.5 / 4) ** 0.25)
