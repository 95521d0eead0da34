"""Scores are what one row at a time gives, batches change nothing, intervals are known ones, faults are told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stagecraft import generation
from stagecraft.data.rows import Document, Preference
from stagecraft.errors import UserError
from stagecraft.evaluation import metrics
from stagecraft.evaluation.sets import Choice, read_eval_sets

ROOT = Path(__file__).resolve().parents[2]
TEXT = (
    "rest at home, drink water, see a doctor when fever lasts. 发烧时多喝水，注意休息。高烧三天不退要去医院。"
)
PROMPTS = [
    [{"role": "user", "content": "rest"}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "发烧时怎么办？drink water or rest?"},
    ],
    [
        {"role": "user", "content": "doctor"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "why"},
    ],
    [{"role": "user", "content": "see a doctor when fever lasts, rest at home, drink water " * 3}],
]
REPLIES = ["drink water", "多喝水，注意休息。", "rest", "高烧三天不退要去医院。 see a doctor at home"]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT] * 20, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=special[0], eos_token=special[1])
    made.add_special_tokens({"additional_special_tokens": special[2:]})
    made.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return made


@pytest.fixture(scope="module")
def config(tokenizer):
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        num_labels=1,
        initializer_range=0.3,  # wide enough that replies vary from prompt to prompt
    )


@pytest.fixture(scope="module")
def model(config):
    from transformers import Qwen3ForCausalLM, set_seed

    set_seed(0)
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def reward(config):
    from transformers import Qwen3ForSequenceClassification, set_seed

    set_seed(1)
    return Qwen3ForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def direct_logprobs(model, ids, start):
    """The definition: one row, whole log-softmax, the tokens from `start` on."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [float(logits[i - 1, ids[i]]) for i in range(start, len(ids))]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_of(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def test_batched_replies_equal_single_ones(model, tokenizer):
    single = [generation.generate_replies(model, tokenizer, [p], 16)[0] for p in PROMPTS]
    assert generation.generate_replies(model, tokenizer, PROMPTS, 16, batch_size=4) == single
    assert generation.generate_replies(model, tokenizer, PROMPTS, 16, batch_size=3) == single
    assert len(set(single)) == len(single)
    # Control: with the padding between a prompt and its reply, the replies change.
    assert generation.generate_replies(model, tokenizer, PROMPTS, 16, padding_side="right") != single


def test_replies_are_greedy_whatever_the_folder_says(model, tokenizer):
    plain = generation.generate_replies(model, tokenizer, PROMPTS, 16)
    own = model.generation_config
    model.generation_config = type(own)(do_sample=True, temperature=5.0, top_k=50, repetition_penalty=9.0)
    try:
        assert generation.generate_replies(model, tokenizer, PROMPTS, 16) == plain
        assert model.generation_config.repetition_penalty == 9.0
        torch.manual_seed(0)
        sampled = generation.stream_reply(model, tokenizer, PROMPTS[1], 16, temperature=5.0)
        assert sampled != plain[1]  # a temperature brings the folder's settings back
    finally:
        model.generation_config = own
    assert generation.stream_reply(model, tokenizer, PROMPTS[1], 16) == plain[1]


def test_a_reply_ends_at_the_end_of_turn(model, tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert generation.end_of_turn(tokenizer) == [end]
    assert generation.stop_ids(model, tokenizer) == [end, tokenizer.eos_token_id]
    prompt = torch.tensor([ids_of(tokenizer, prompt_of(tokenizer, PROMPTS[0]))])
    words = model.generate(prompt, do_sample=False, max_new_tokens=16)[0, prompt.shape[1] :].tolist()
    stop = words.index(words[5])
    own, model.generation_config.eos_token_id = model.generation_config.eos_token_id, [words[5]]
    try:
        stopped = generation.generate_replies(model, tokenizer, PROMPTS[:1], 16)[0]
    finally:
        model.generation_config.eos_token_id = own
    assert stopped == tokenizer.decode(words[: stop + 1]).strip()
    assert stopped != generation.generate_replies(model, tokenizer, PROMPTS[:1], 16)[0]


def test_history_that_does_not_fit_loses_its_oldest_turns(model, tokenizer):
    long = [m for _ in range(40) for m in PROMPTS[2][:2]] + PROMPTS[2][2:]
    system = [{"role": "system", "content": "be brief"}]
    fitting = generation._fit(model, tokenizer, system + long, 32)
    assert len(fitting) + 32 <= 256
    text = tokenizer.decode(fitting)
    assert "be brief" in text and text.count("doctor") > 1 and text.endswith(prompt_of(tokenizer, long[-1:]))
    with pytest.raises(UserError, match="shorten it"):
        generation.stream_reply(model, tokenizer, [{"role": "user", "content": TEXT * 9}], 32)


def test_reply_logprobs_equal_the_definition(model, tokenizer):
    pairs = list(zip(PROMPTS, REPLIES, strict=True))
    expected = []
    for messages, reply in pairs:
        prompt = prompt_of(tokenizer, messages)
        values = direct_logprobs(model, ids_of(tokenizer, prompt + reply), len(ids_of(tokenizer, prompt)))
        expected.append(sum(values) / len(values))
    for size in (1, 3, 4):
        assert generation.reply_logprobs(model, tokenizer, pairs, size) == pytest.approx(expected, abs=1e-4)
    swapped = generation.reply_logprobs(model, tokenizer, list(zip(PROMPTS, REPLIES[::-1], strict=True)))
    assert swapped != pytest.approx(expected, abs=1e-2)


def test_small_logit_budget_changes_nothing(model, tokenizer, monkeypatch):
    pairs = list(zip(PROMPTS, REPLIES, strict=True))
    whole = generation.reply_logprobs(model, tokenizer, pairs)
    monkeypatch.setattr(generation, "MAX_LOGITS", 1)
    assert generation.reply_logprobs(model, tokenizer, pairs) == pytest.approx(whole, abs=1e-4)


def test_document_losses_equal_the_definition_and_windows_score_every_token_once(
    model, tokenizer, monkeypatch
):
    documents = [Document(TEXT, "a:1"), Document("rest", "a:2"), Document(TEXT[:40], "a:3")]
    scored = metrics.score_documents(model, tokenizer, documents)
    for document, (nats, count) in zip(documents, scored, strict=True):
        ids = [*ids_of(tokenizer, document.text), tokenizer.eos_token_id]
        assert count == len(ids) - 1
        assert nats == pytest.approx(-sum(direct_logprobs(model, ids, 1)), rel=1e-4)
    monkeypatch.setattr(generation, "MAX_WINDOW", 8)
    windowed = metrics.score_documents(model, tokenizer, documents)
    assert [count for _, count in windowed] == [count for _, count in scored]
    assert windowed[0][0] != pytest.approx(scored[0][0], rel=1e-4)  # less context, other losses


def test_choices_and_preferences_go_to_the_likelier_reply(model, tokenizer):
    scores = generation.reply_logprobs(model, tokenizer, [(PROMPTS[0], reply) for reply in REPLIES])
    best = scores.index(max(scores))
    choices = [Choice(PROMPTS[0], REPLIES, right, "fact", "c:1") for right in range(4)]
    [result] = metrics.choice_accuracy("m", choices, metrics.score_choices(model, tokenizer, choices))
    assert (result.value, result.n, result.chance, result.split) == (0.25, 4, 0.25, "fact")
    worst = scores.index(min(scores))
    pairs = [Preference(PROMPTS[0], REPLIES[best], REPLIES[worst], "p:1")] * 2
    pairs.append(Preference(PROMPTS[0], REPLIES[worst], REPLIES[best], "p:3"))
    scored = metrics.score_preferences(model, tokenizer, pairs)
    assert metrics.pair_accuracy("preference_accuracy", "m", scored).value == pytest.approx(2 / 3)


def test_reward_scores_equal_single_rows_read_at_the_end_of_turn(reward, tokenizer):
    pairs = list(zip(PROMPTS, REPLIES, strict=True))
    batched = generation.reward_scores(reward, tokenizer, pairs, 4)
    for (messages, reply), score in zip(pairs, batched, strict=True):
        ids = ids_of(tokenizer, prompt_of(tokenizer, messages) + reply + "<|im_end|>")
        with torch.inference_mode():
            assert score == pytest.approx(float(reward(input_ids=torch.tensor([ids])).logits), abs=1e-4)
            assert score != pytest.approx(float(reward(input_ids=torch.tensor([ids[:-1]])).logits), abs=1e-4)


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def test_eval_sets_are_read_and_sampled_by_seed(tmp_path):
    write_rows(
        tmp_path / "answers.jsonl",
        *[{"split": "fact", "question": f"q{i}", "answer": "a", "system": "s"} for i in range(9)],
    )
    write_rows(tmp_path / "questions.jsonl", *[{"question": f"q{i}"} for i in range(8)])
    sets = read_eval_sets(str(tmp_path), at_most=4, seed=7)
    assert sets.missing == ["documents", "choices", "preferences"]
    assert len(sets.answers) == 4 and len(sets.questions) == 8
    assert sets.answers == read_eval_sets(str(tmp_path), at_most=4, seed=7).answers
    assert sets.answers != read_eval_sets(str(tmp_path), at_most=4, seed=8).answers
    assert sets.answers[0].prompt[0] == {"role": "system", "content": "s"}


def test_every_bad_row_of_every_file_is_told(tmp_path):
    (tmp_path / "answers.jsonl").write_text(
        '{"question": "q", "answer": "a"}\n{"question": "q"\n{"question": "q"}\n'
    )
    write_rows(tmp_path / "choices.jsonl", {"question": "q", "answer": "a", "options": ["b", "c"]})
    write_rows(tmp_path / "questions.jsonl", {"text": "q"})
    with pytest.raises(UserError) as error:
        read_eval_sets(str(tmp_path))
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0].rpartition("/")[2] for line in lines] == [
        "answers.jsonl:2",
        "answers.jsonl:3",
        "choices.jsonl:1",
        "questions.jsonl:1",
    ]
    assert "not JSON" in lines[0] and 'no "answer"' in lines[1] and '"options"' in lines[2]


def run_script(name, *arguments, text=None):
    command = [sys.executable, str(ROOT / "python" / name), *map(str, arguments)]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )


def test_all_faults_of_a_start_at_once(folder, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "DONE").write_text("eval\n")
    done = run_script(
        "evaluate_model.py",
        *("--models", f"a={folder}", f"a={folder}", f"b={tmp_path}/adapter", f"c={tmp_path}/none", "junk"),
        *("--reward_model", folder, "--eval_dir", tmp_path, "--output_dir", tmp_path, "--batch_size", 0),
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    for part in (
        "--batch_size must be at least 1",
        'the name "a" is taken',
        "merge it first",
        "c " + str(tmp_path / "none") + ": no such folder",
        '--models "junk": write name=folder',
        "not a reward model",
        "none of documents.jsonl",
        "--overwrite_output_dir replaces it",
    ):
        assert part in done.stderr, part
    assert (tmp_path / "DONE").exists()


def test_unusable_folders_are_told_from_usable_ones(folder, tmp_path):
    import shutil

    generation.require_usable(str(folder), "--model")
    plain = shutil.copytree(folder, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        generation.require_usable(str(plain), "--model")
    sharded = shutil.copytree(folder, tmp_path / "sharded")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (sharded / generation.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors missing"):
        generation.require_usable(str(sharded), "--model")
    with pytest.raises(UserError, match="not a reward model"):
        generation.require_usable(str(folder), "--reward_model", reward=True)


def test_a_piped_question_gets_the_answer_alone(model, tokenizer, folder):
    done = run_script("chat.py", "--model", folder, "--max_new_tokens", 8, text="drink water or rest?\n")
    messages = [{"role": "user", "content": "drink water or rest?"}]
    assert (done.returncode, done.stdout) == (
        0,
        generation.stream_reply(model, tokenizer, messages, 8) + "\n",
    )
    empty = run_script("chat.py", "--model", folder, text=" \n")
    assert empty.returncode == 2 and empty.stdout == "" and "standard input is empty" in empty.stderr


def test_an_evaluation_from_start_to_end(folder, tmp_path):
    data = tmp_path / "eval"
    data.mkdir()
    write_rows(data / "documents.jsonl", {"text": TEXT}, {"text": TEXT[:30]})
    write_rows(data / "answers.jsonl", {"split": "fact", "question": "rest", "answer": "water"})
    write_rows(data / "questions.jsonl", {"question": "why?"})
    out = tmp_path / "out"
    arguments = ["--models", f"base={folder}", f"sft={folder}", "--eval_dir", data, "--output_dir", out]
    done = run_script("evaluate_model.py", *arguments, "--max_new_tokens", 4, "--recipe", "tiny")
    assert done.returncode == 0, done.stderr
    assert "choices.jsonl is not there" in done.stdout and "make chat RECIPE=tiny" in done.stdout
    value = json.loads((out / "report.json").read_text())
    assert [m["name"] for m in value["models"]] == ["base", "sft"]
    of = {(m["metric"], m["model"]): {**m, "model": ""} for m in value["metrics"]}
    assert {metric for metric, _ in of} == {"perplexity", "answer_accuracy"}
    assert of["perplexity", "base"] == of["perplexity", "sft"]  # the same model twice
    assert (out / "DONE").exists() and "why?" in (out / "report.md").read_text()
