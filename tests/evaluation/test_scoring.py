"""Scores are what one row at a time gives, batches change nothing, finished batches are kept, rows are checked."""

import json
from dataclasses import astuple

import pytest
import torch

from stagecraft import generation
from stagecraft.errors import UserError
from stagecraft.evaluation.kept import Kept, key_of
from stagecraft.evaluation.sets import read_eval_sets
from stagecraft.generation import Reply

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
    assert len({reply.text for reply in single}) == len(single)
    # Control: with the padding between a prompt and its reply, the replies change.
    assert generation.generate_replies(model, tokenizer, PROMPTS, 16, padding_side="right") != single


def test_rows_that_have_ended_leave_the_batch_and_change_nothing(model, tokenizer, monkeypatch):
    together = generation.generate_replies(model, tokenizer, PROMPTS, 40, batch_size=4)
    words = [tokenizer(reply.text, add_special_tokens=False)["input_ids"] for reply in together]
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [words[0][6], words[2][20]]  # so that some rows end early
    try:
        ended = generation.generate_replies(model, tokenizer, PROMPTS, 40, batch_size=4)
        monkeypatch.setattr(generation, "TOGETHER", 3)
        shapes = []
        forward = model.forward
        monkeypatch.setattr(
            model, "forward", lambda *a, **k: shapes.append(len(k["input_ids"])) or forward(*a, **k)
        )
        assert generation.generate_replies(model, tokenizer, PROMPTS, 40, batch_size=4) == ended
    finally:
        model.generation_config.eos_token_id = own
    assert shapes[0] == 4 and min(shapes) < 4
    assert len(shapes) == 40  # no token is computed twice
    assert ended != together  # control
    assert {reply.stopped for reply in ended} == {True, False}


def test_replies_are_greedy_whatever_the_folder_says(model, tokenizer):
    plain = generation.generate_replies(model, tokenizer, PROMPTS, 16)
    own = model.generation_config
    model.generation_config = type(own)(do_sample=True, temperature=5.0, top_k=50, repetition_penalty=9.0)
    try:
        assert generation.generate_replies(model, tokenizer, PROMPTS, 16) == plain
        assert model.generation_config.repetition_penalty == 9.0
        torch.manual_seed(0)
        sampled = generation.stream_reply(model, tokenizer, PROMPTS[1], 16, temperature=5.0)
        assert sampled != plain[1].text  # a temperature brings the folder's settings back
    finally:
        model.generation_config = own
    assert generation.stream_reply(model, tokenizer, PROMPTS[1], 16) == plain[1].text


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
    assert stopped == Reply(tokenizer.decode(words[: stop + 1]).strip(), stop, True)
    # Control: without it the reply goes on to the limit.
    whole = generation.generate_replies(model, tokenizer, PROMPTS[:1], 16)[0]
    assert whole == Reply(tokenizer.decode(words).strip(), 16, False)


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
        ids = ids_of(tokenizer, prompt + reply + "<|im_end|>")
        *words, end = direct_logprobs(model, ids, len(ids_of(tokenizer, prompt)))
        expected.append((sum(words), len(words), end))
    for size in (1, 3, 4):
        found = generation.reply_logprobs(model, tokenizer, pairs, size)
        assert flat(found) == pytest.approx(sum(expected, ()), abs=1e-3)
    swapped = generation.reply_logprobs(model, tokenizer, list(zip(PROMPTS, REPLIES[::-1], strict=True)))
    assert flat(swapped) != pytest.approx(sum(expected, ()), abs=1e-1)


def flat(likelihoods):
    return sum((astuple(row) for row in likelihoods), ())


def test_small_logit_budget_changes_nothing(model, tokenizer, monkeypatch):
    pairs = list(zip(PROMPTS, REPLIES, strict=True))
    whole = generation.reply_logprobs(model, tokenizer, pairs)
    monkeypatch.setattr(generation, "MAX_LOGITS", 1)
    assert flat(generation.reply_logprobs(model, tokenizer, pairs)) == pytest.approx(flat(whole), abs=1e-3)


def test_document_losses_equal_the_definition_and_windows_score_every_token_once(
    model, tokenizer, monkeypatch
):
    documents = [TEXT, "rest", TEXT[:40]]
    scored = generation.document_logprobs(model, tokenizer, documents)
    for text, row in zip(documents, scored, strict=True):
        ids = [*ids_of(tokenizer, text), tokenizer.eos_token_id]
        assert row.tokens == len(ids) - 1
        assert row.nats == pytest.approx(sum(direct_logprobs(model, ids, 1)), rel=1e-4)
    monkeypatch.setattr(generation, "MAX_WINDOW", 8)
    windowed = generation.document_logprobs(model, tokenizer, documents)
    assert [row.tokens for row in windowed] == [row.tokens for row in scored]
    assert windowed[0].nats != pytest.approx(scored[0].nats, rel=1e-4)  # less context, other losses


def test_reward_scores_equal_single_rows_read_at_the_end_of_turn(reward, tokenizer):
    pairs = list(zip(PROMPTS, REPLIES, strict=True))
    batched = generation.reward_scores(reward, tokenizer, pairs, 4)
    for (messages, reply), score in zip(pairs, batched, strict=True):
        ids = ids_of(tokenizer, prompt_of(tokenizer, messages) + reply + "<|im_end|>")
        with torch.inference_mode():
            assert score == pytest.approx(float(reward(input_ids=torch.tensor([ids])).logits), abs=1e-4)
            assert score != pytest.approx(float(reward(input_ids=torch.tensor([ids[:-1]])).logits), abs=1e-4)


# ---- What is kept of an interrupted evaluation


def batches_of(rows):
    return [rows[i : i + 2] for i in range(0, len(rows), 2)]


def computed(kept, log, stop_after=None):
    """A task of five rows in batches of two; `log` gets the rows that were computed."""

    def compute(rows):
        if stop_after is not None and len(log) == stop_after:
            raise KeyboardInterrupt
        log.append(rows)
        return [row / 3 for row in rows]

    return kept.task(
        "answers", lambda keep: generation.in_batches(batches_of(list(range(5))), compute, keep=keep)
    )


def test_a_task_goes_on_with_the_first_batch_that_is_not_kept(tmp_path):
    plain, log = computed(Kept(tmp_path / "plain", "k"), []), []
    kept = Kept(tmp_path / "out", "k")
    with pytest.raises(KeyboardInterrupt):
        computed(kept, log, stop_after=2)
    with (tmp_path / "out/kept/k/answers.jsonl").open("ab") as stream:
        stream.write(b'{"rows": [4], "resul')  # a kill in the middle of a line
    again = []
    done = computed(kept, again)
    assert (log, again) == ([[0, 1], [2, 3]], [[4]])
    assert done.results == plain.results == [row / 3 for row in range(5)]
    assert (plain.kept, done.kept) == (0, 2)
    assert [batch.rows for batch in done.batches] == [batch.rows for batch in plain.batches]
    # Finished, it is not computed at all; under another key it is, from its beginning.
    assert computed(kept, untouched := []).results == plain.results and untouched == []
    assert computed(Kept(tmp_path / "out", "other"), fresh := []).kept == 0 and len(fresh) == 3


def test_a_key_stands_for_everything_that_numbers_depend_on():
    settings = {"max_new_tokens": 4, "seed": 1}
    assert key_of(settings, ["a"]) == key_of(dict(reversed(settings.items())), ["a"])
    assert len({key_of(settings, ["a"]), key_of(settings | {"seed": 2}, ["a"]), key_of(settings, ["b"])}) == 3


# ---- The rows


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
