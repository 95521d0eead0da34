"""Chat templates: tool calls and their results, and thinking."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from families import (
    ARGUMENTS,
    CALLING,
    END,
    NAMES,
    TOOLS,
    WITH_TOOLS,
    calls,
    decoded,
    result,
    thinking,
    tokenizer_of,
    turns,
    words,
)
from stagecraft.chat import templates
from stagecraft.chat.templates import TemplateFault, encode, load_template, render

MANY_CALLS = ("qwen", "qwen3", "chatml", "mistral")
NOTHING = "<think>\n\n</think>\n\n"


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def tokenizer(name):
    return tokenizer_of(name)


@pytest.fixture
def template(name, tokenizer) -> templates.ChatTemplate:
    return load_template(tokenizer, name)


# Tools


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tool_calls_carry_loss_and_results_do_not(name, template, tokenizer):
    [encoded] = encode(template, tokenizer, [CALLING], [TOOLS])
    first, answer, second, last = decoded(tokenizer, encoded)
    for call, function in ((first, "weather"), (second, "time")):
        assert call.endswith("<|observation|>" if name == "glm4" else END[name])
        assert function in call and json.dumps(ARGUMENTS, ensure_ascii=False) in call
    assert answer == words(name, {"content": "No rain."}) and last == words(name, {"content": "Noon."})
    text = render(template.text, CALLING, tokenizer, tools=TOOLS)
    assert text.index("weather") < text.index(json.dumps(ARGUMENTS, ensure_ascii=False))
    assert encode(template, tokenizer, [CALLING])[0].input_ids != encoded.input_ids  # control: the tools show


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_two_calls_in_a_turn(name, template, tokenizer):
    row = [*turns("q"), calls("weather", "time"), result("r1"), result("r2"), *turns("x", "a")[1:]]
    if name in MANY_CALLS:
        [encoded] = encode(template, tokenizer, [row], [TOOLS])
        assert decoded(tokenizer, encoded)[0].count(json.dumps(ARGUMENTS, ensure_ascii=False)) == 2
    else:
        with pytest.raises(TemplateFault, match="makes one tool call in a turn"):
            encode(template, tokenizer, [row], [TOOLS])


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_words_beside_a_call_are_kept_or_refused(name, template, tokenizer):
    row = [*turns("q"), {**calls("time"), "content": "Let me see."}, result("r"), *turns("x", "a")[1:]]
    if name in ("qwen", "qwen3", "chatml"):
        assert decoded(tokenizer, encode(template, tokenizer, [row], [TOOLS])[0])[0].startswith(
            "Let me see.\n"
        )
    else:
        with pytest.raises(
            TemplateFault, match=r"where the assistant says 'Let me see\.|without words beside it"
        ):
            encode(template, tokenizer, [row], [TOOLS])


@pytest.mark.parametrize("name", ["qwen"])
def test_calls_that_are_left_out_are_told(template, tokenizer):
    deaf = replace(template, text=template.text.replace("message['tool_calls'] or []", "[]"))
    encode(deaf, tokenizer, [turns("q", "a")])
    with pytest.raises(TemplateFault, match="it does not render the call of weather with its arguments: ''"):
        encode(deaf, tokenizer, [CALLING])


def test_templates_without_a_form_for_tools_say_so(name, template, tokenizer):
    for row, tools in ((turns("q", "a"), TOOLS), (CALLING[1:], None)):
        if name in WITH_TOOLS:
            encode(template, tokenizer, [row], [tools])
        else:
            with pytest.raises(TemplateFault, match="it fails: .* has no form for tools"):
                encode(template, tokenizer, [row], [tools])


@pytest.mark.parametrize("name", ["mistral"])
def test_calls_without_an_id_are_numbered(template, tokenizer):
    text = render(template.text, CALLING, tokenizer, tools=TOOLS)
    assert text.count('"id": "call00001"') == text.count('"call_id": "call00001"') == 1
    assert text.count('"id": "call00002"') == text.count('"call_id": "call00002"') == 1


# Thinking


@pytest.mark.parametrize("name", ["qwen3"])
def test_earlier_thoughts_are_dropped_and_the_last_is_learned(template, tokenizer):
    row = turns("q1", thinking("t1", "a1"), "q2", thinking("t2", "a2"))
    [encoded] = encode(template, tokenizer, [row])
    assert decoded(tokenizer, encoded) == ["a1<|im_end|>", thinking("t2", "a2<|im_end|>")]
    assert "t1" not in tokenizer.decode(encoded.input_ids)
    # Line ends are the template's own.
    [loose] = encode(template, tokenizer, [turns("q1", "<think>t1</think>a1", "q2", "<think>t2</think>a2")])
    assert loose == encoded
    # A control that keeps every thought.
    plain = load_template(tokenizer, "chatml")
    assert decoded(tokenizer, encode(plain, tokenizer, [row])[0])[0] == thinking("t1", "a1<|im_end|>")


@pytest.mark.parametrize("name", ["qwen3"])
def test_an_empty_thought_stands_outside_what_is_learned(template, tokenizer):
    for answer in ("a2", NOTHING + "a2"):
        [encoded] = encode(template, tokenizer, [turns("q1", thinking("t1", "a1"), "q2", answer)])
        assert decoded(tokenizer, encoded) == ["a1<|im_end|>", "a2<|im_end|>"]
        start = encoded.spans[-1][0]
        assert tokenizer.decode(encoded.input_ids[:start]).endswith("<|im_start|>assistant\n" + NOTHING)


@pytest.mark.parametrize("name", ["qwen3"])
def test_thoughts_around_calls_belong_to_the_last_exchange(template, tokenizer):
    row = [
        *turns("q"),
        {**calls("time"), "content": thinking("t1", "")},
        result("r"),
        *turns("x", thinking("t2", "a"))[1:],
    ]
    first, last = decoded(tokenizer, encode(template, tokenizer, [row], [TOOLS])[0])
    assert first.startswith(thinking("t1", "<tool_call>\n")) and last == thinking("t2", "a<|im_end|>")


@pytest.mark.parametrize("name", ["qwen3"])
def test_thinking_is_asked_for_or_not(template, tokenizer):
    asked = {
        on: render(template.text, turns("q"), tokenizer, prompt=True, thinking=on)
        for on in (None, True, False)
    }
    assert asked[None] == asked[True] != asked[False] == asked[True] + NOTHING


@pytest.mark.parametrize("answer", ["a", NOTHING + "a", thinking("t", "a")], ids=["none", "empty", "thought"])
def test_the_saved_template_asks_as_it_was_trained(name, template, tokenizer, answer):
    """Whoever asks the model, with no flag: the prompt is what stood before the answers in training."""
    row = turns("q1", "a1", "q2", answer)
    [encoded] = encode(template, tokenizer, [row])
    asked = {}
    for thoughts in (0, int(templates.has_thought(answer))):
        tokenizer.chat_template = template.as_trained(thoughts)
        again = load_template(tokenizer, None)
        assert (again.name, again.text) == (template.name, template.text)  # the next stage knows it again
        asked[thoughts] = tokenizer.apply_chat_template(row[:-1], add_generation_prompt=True)["input_ids"]
        assert tokenizer.apply_chat_template(row, tokenize=False) == render(template.text, row, tokenizer)
    assert asked[thoughts] == encoded.input_ids[: encoded.spans[-1][0]]
    assert (asked[0] == asked[thoughts]) == (name != "qwen3" or not templates.has_thought(answer))  # control
    wanted = tokenizer.apply_chat_template(
        row[:-1], add_generation_prompt=True, tokenize=False, enable_thinking=True
    )
    assert wanted == render(
        template.text, row[:-1], tokenizer, prompt=True
    )  # who asks for a thought gets one


@pytest.mark.parametrize("answer", ["a", NOTHING + "a", thinking("t", "a")], ids=["none", "empty", "thought"])
def test_which_prompt_stands_before_an_answer_is_known(name, template, tokenizer, answer):
    for row in (turns("q", answer), turns("q", "a1", "q2", answer, system="s")):
        [encoded] = encode(template, tokenizer, [row])
        start = encoded.spans[-1][0]
        asked = render(
            template.text, row[:-1], tokenizer, prompt=True, thinking=template.thinking_for(answer)
        )
        assert tokenizer(asked, add_special_tokens=False)["input_ids"] == encoded.input_ids[:start]
    plain = render(template.text, row[:-1], tokenizer, prompt=True)
    assert (asked == plain) == (name != "qwen3" or "t" in answer.split("</think>")[0][7:])  # control


@pytest.mark.parametrize("name", ["deepseek"])
def test_deepseek_drops_earlier_thoughts(template, tokenizer):
    row = turns("q1", thinking("t1", "a1"), "q2", thinking("t2", "a2"))
    [encoded] = encode(template, tokenizer, [row])
    assert decoded(tokenizer, encoded) == [f"\n\na1{END['deepseek']}", thinking("t2", f"a2{END['deepseek']}")]
    asked = render(template.text, row[:-1], tokenizer, prompt=True)
    assert asked == tokenizer.decode(encoded.input_ids[: encoded.spans[-1][0]])


def test_a_thought_that_would_be_lost_is_refused(name, template, tokenizer):
    """Two blocks in one answer: a template that splits at </think> loses what stands between them."""
    row = turns("q", thinking("t1", "a") + thinking("t2", "b"), "q2", "a2")
    if name in ("qwen3", "deepseek"):
        with pytest.raises(TemplateFault, match="where the assistant says"):
            encode(template, tokenizer, [row])
    else:
        assert thinking("t1", "a") in decoded(tokenizer, encode(template, tokenizer, [row])[0])[0]
