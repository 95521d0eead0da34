"""What carries loss is exactly what the assistant says; a template that can't show that is refused."""

from __future__ import annotations

import copy

import pytest

from stagecraft import templates
from stagecraft.errors import UserError
from stagecraft.templates import ChatTemplate, TemplateFault, encode, load_template, render

NAMES = sorted(path.stem for path in templates.FOLDER.glob("*.jinja"))


def turns(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant by turns, after a system turn if there is one."""
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [*([] if system is None else [{"role": "system", "content": system}]), *said]


CONVERSATIONS = {
    "single": turns("What helps against fever?", "Drink water and rest."),
    "multi-turn": turns(
        "发烧怎么办？", "多喝水。", "What else?", "Rest.\n\n- sleep\n- tea", "谢谢", "不客气 🙂"
    ),
    "system": turns("Cough?", "See a doctor when it lasts.", system="You are brief."),
    "system, multi-turn": turns("a", "b", "c", "d", system="规则：\n1. 简短"),
    "same words from both": turns("yes", "yes", "yes", "yes"),
    "spaces at the edges": turns("  q  ", " an answer with spaces at its edges  "),
    "marks in the text": turns("{% generation %}{{ x }}", "{{ y }}{% endgeneration %}"),
}


@pytest.fixture(params=NAMES)
def template(request, tokenizer) -> ChatTemplate:
    return load_template(tokenizer, request.param)


def test_the_files_are_known():
    assert {"chatml", "qwen"} <= set(NAMES)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_loss_is_on_the_assistants_words_and_end_of_turn_only(template, tokenizer, messages):
    [encoded] = encode(template, tokenizer, [messages])
    wanted = [m["content"] + template.end_of_turn for m in messages if m["role"] == "assistant"]
    assert [tokenizer.decode(encoded.input_ids[start:end]) for start, end in encoded.spans] == wanted
    learned = [token for token in encoded.labels if token != -100]
    assert tokenizer.decode(learned) == "".join(wanted)
    assert len(encoded.labels) == len(encoded.input_ids)
    assert all(label in (-100, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))
    # The whole of it is the rendering, so nothing was lost between template and tokens.
    assert tokenizer.decode(encoded.input_ids) == render(template.text, messages, tokenizer)


def test_a_batch_gives_what_its_rows_give_alone(template, tokenizer):
    together = encode(template, tokenizer, list(CONVERSATIONS.values()))
    alone = [encode(template, tokenizer, [messages])[0] for messages in CONVERSATIONS.values()]
    assert together == alone
    assert together[0] != together[1]  # control


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_the_saved_template_renders_the_same_without_marks(template, tokenizer, messages):
    assert "generation %}" in template.text and "generation %}" not in template.saved_text
    assert render(template.saved_text, messages, tokenizer) == render(template.text, messages, tokenizer)
    tokenizer.chat_template = template.saved_text
    assert tokenizer.apply_chat_template(messages, tokenize=False) == render(
        template.text, messages, tokenizer
    )


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_prompt_is_what_stands_before_the_answer_in_training(template, tokenizer, messages):
    """Text and tokens: what the model is asked with is what it was trained to go on from."""
    whole = render(template.text, messages, tokenizer)
    [encoded] = encode(template, tokenizer, [messages])
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for number, i in enumerate(answers):
        for text in (template.text, template.saved_text):
            prompt = render(text, messages[:i], tokenizer, prompt=True)
            assert whole.startswith(prompt + messages[i]["content"])
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert ids == encoded.input_ids[: encoded.spans[number][0]]
    # Control: without the generation prompt the assistant's turn has not begun.
    assert not whole.startswith(render(template.text, messages[:i], tokenizer) + messages[i]["content"])


def test_templates_differ_where_they_should(tokenizer):
    rendered = {
        name: render(load_template(tokenizer, name).text, turns("q", "a"), tokenizer) for name in NAMES
    }
    assert len(set(rendered.values())) == len(NAMES)


# Which template is used


def test_the_tokenizers_own_template_is_recognised_without_marks(template, tokenizer):
    tokenizer.chat_template = template.saved_text
    assert load_template(tokenizer, None) == template


def test_the_tokenizers_own_template_is_used_when_it_has_marks(template, tokenizer):
    tokenizer.chat_template = template.text
    own = load_template(tokenizer, None)
    assert (own.name, own.text, own.end_of_turn) == (
        "the tokenizer's own",
        template.text,
        template.end_of_turn,
    )


def test_another_template_is_recognised_by_its_rendering_not_its_text(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
    )
    assert load_template(tokenizer, None).name == "chatml"


def told(tokenizer, name: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_template(tokenizer, name)
    return str(caught.value)


def test_a_template_nobody_knows_is_told(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    )
    assert told(tokenizer) == (
        f"the chat template of {tokenizer.name_or_path} does not mark what the assistant says "
        "({% generation %}), "
        f"and no file in templates/ renders as it does; name one with --template_name ({', '.join(NAMES)})"
    )


def test_no_template_is_told(tokenizer):
    tokenizer.chat_template = None
    assert told(tokenizer) == (
        f"{tokenizer.name_or_path} has no chat template; name one with --template_name ({', '.join(NAMES)})"
    )


def test_a_wrong_name_is_told_with_the_nearest(tokenizer):
    assert told(tokenizer, "chatlm") == (
        f'--template_name chatlm: no such template; known: {", ".join(NAMES)}; did you mean "chatml"?'
    )
    assert "did you mean" not in told(tokenizer, "zzz")


def test_an_end_of_turn_the_tokenizer_does_not_know_is_told(tokenizer):
    """The same file with a tokenizer that spells <|im_end|> in several tokens."""
    bare = copy.deepcopy(tokenizer)
    tokenizer.chat_template = bare.chat_template = load_template(tokenizer, "chatml").text.replace(
        "im_end", "over"
    )
    assert told(bare) == (
        f"template the tokenizer's own can't be used with {tokenizer.name_or_path}: "
        "its end of turn '<|over|>' is not one token of this tokenizer"
    )


# Templates that mark wrongly. Each is ChatML with other marks.

HEAD = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
TAIL = "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
SAY = "{{ m['content'] + '<|im_end|>' }}"
ONLY_ASSISTANT = "{% if m['role'] == 'assistant' %}BODY{% else %}" + SAY + "{% endif %}"


def marked(body: str) -> str:
    return HEAD + ONLY_ASSISTANT.replace("BODY", body) + TAIL


WRONG = {
    "everything": (
        HEAD + "{% generation %}" + SAY + "{% endgeneration %}" + TAIL,
        "it marks no assistant text with {% generation %}",
    ),
    "header": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ '<|im_start|>assistant\n' }}"
        + SAY
        + "{% endgeneration %}{% else %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        + SAY
        + "{% endif %}"
        + TAIL,
        "its end of turn '<|im_start|>assistant\\na1<|im_end|>' is not one token of this tokenizer",
    ),
    "newline after the end of turn": (
        HEAD
        + "{% if m['role'] == 'assistant' %}{% generation %}"
        + SAY
        + "{{ '\n' }}{% endgeneration %}{% else %}"
        + SAY
        + "{{ '\n' }}{% endif %}{% endfor %}",
        "its end of turn '<|im_end|>\\n' is not one token of this tokenizer",
    ),
    "no end of turn": (
        marked("{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}"),
        "its end of turn '' is not one token of this tokenizer",
    ),
    "end of turn only": (
        marked("{{ m['content'] }}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}"),
        "it marks '<|im_end|>' where the assistant says 'a1<|im_end|>'",
    ),
    "last turn only": (
        marked(
            "{% if loop.last %}{% generation %}" + SAY + "{% endgeneration %}{% else %}" + SAY + "{% endif %}"
        ),
        "it marks 'a2<|im_end|>' where the assistant says 'a1<|im_end|>'",
    ),
    "first turn only": (
        marked(
            "{% if loop.index < 3 %}{% generation %}"
            + SAY
            + "{% endgeneration %}{% else %}"
            + SAY
            + "{% endif %}"
        ),
        "it marks",
    ),
    "nothing": (
        marked("{% generation %}{% endgeneration %}" + SAY),
        "its end of turn '' is not one token of this tokenizer",
    ),
    "never": (
        marked("{% if false %}{% generation %}x{% endgeneration %}{% endif %}" + SAY),
        "it marks no assistant text with {% generation %}",
    ),
    "marks that trim": (
        marked("{% generation %}" + SAY + "{% endgeneration %}").replace(
            "'\n' }}{% if m", "'\n' }}  {%- generation %}{% endgeneration -%}  {% if m"
        ),
        "it marks",
    ),
}


@pytest.mark.parametrize(("text", "reason"), WRONG.values(), ids=WRONG)
def test_a_template_that_marks_wrongly_is_refused_with_its_reason(tokenizer, text, reason):
    tokenizer.chat_template = text
    expected = f"template the tokenizer's own can't be used with {tokenizer.name_or_path}: {reason}"
    said = told(tokenizer)
    assert said == expected or (reason == "it marks" and said.startswith(expected))


def test_the_same_template_marked_rightly_is_taken(tokenizer):
    """Control of the test above."""
    tokenizer.chat_template = marked("{% generation %}" + SAY + "{% endgeneration %}")
    assert load_template(tokenizer, None).end_of_turn == "<|im_end|>"


def test_marks_that_trim_space_change_the_saved_text_and_are_refused(tokenizer):
    tokenizer.chat_template = marked("  {%- generation %}" + SAY + "{% endgeneration %}")
    assert "without its {% generation %} marks it renders another text" in told(tokenizer)


def test_a_template_that_does_not_parse_is_told(tokenizer):
    tokenizer.chat_template = "{% generation %}{% for m in messages %}"
    assert told(tokenizer).startswith("template the tokenizer's own can't be used with ")


@pytest.mark.parametrize("marks", [True, False], ids=["with marks", "without"])
def test_a_template_that_refuses_a_conversation_is_told(tokenizer, marks):
    """Some models' templates raise where a conversation has a system turn."""
    refusal = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    )
    body = "{% generation %}" + SAY + "{% endgeneration %}" if marks else SAY
    tokenizer.chat_template = refusal + marked(body)
    assert ("no system role here" if marks else "name one with --template_name") in told(tokenizer)


def test_a_row_whose_answer_the_template_changes_is_refused(tokenizer):
    """The probes have no white space at their edges; the check of each row finds what they can't."""
    text = marked("{% generation %}{{ m['content'].strip() + '<|im_end|>' }}{% endgeneration %}")
    tokenizer.chat_template = text
    template = load_template(tokenizer, None)
    encode(template, tokenizer, [turns("q", "a")])
    with pytest.raises(TemplateFault, match=r"it marks 'a<\|im_end\|>' where the assistant says ' a<"):
        encode(template, tokenizer, [turns("q", " a")])


def test_a_token_across_the_edge_is_refused(tokenizer):
    """Line ends before and in the answer are one token: it can neither carry loss nor not."""
    template = load_template(tokenizer, "chatml")
    with pytest.raises(TemplateFault, match="a token crosses the edge of what the assistant says, near "):
        encode(template, tokenizer, [turns("q", "\na")])
