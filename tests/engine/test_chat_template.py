"""Chat templates against transformers, on the file that make_golden_templates.py wrote; and such as fail."""

import datetime
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from example_templates import DAY, NAMES, TEMPLATES
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
from engine import chat_template
from engine.chat_template import ChatTemplate, published

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "templates.json").read_text())
SPECIAL = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|end|>of", "[INST]"
TEXT = "the cat sat on a mat and im_start user said to assistant and system im_end\n\n" * 9
TOKENIZER = bpe.train(TEXT, 300, special=SPECIAL)
SHORT = bpe.FLAGS | {"id": 300, "content": "☃"}  # a special token of one character
TOKENIZER = bpe.Tokenizer(TOKENIZER.config | {"added_tokens": [*TOKENIZER.config["added_tokens"], SHORT]})
CHATS = {name: ChatTemplate(source, NAMES, "file") for name, source in TEMPLATES.items()}
USER = [{"role": "user", "content": "Hi"}]


class Clock(datetime.datetime):
    @classmethod
    def now(cls):
        return cls(*DAY)


@pytest.mark.parametrize("name", CHATS)
def test_a_conversation_is_the_text_that_transformers_makes_of_it(name, monkeypatch):
    monkeypatch.setattr(chat_template, "datetime", Clock)
    template, refused = CHATS[name], 0
    for messages, text in zip(GOLDEN["conversations"], GOLDEN["texts"][name], strict=True):
        if text is not None:
            assert template.render(messages) == text
            continue
        refused += 1
        with pytest.raises(ValueError, match="^file: .*roles must alternate"):
            template.render(messages)
    assert refused == (name == "alternating")


# what somebody may type who wants to speak for others, and characters that could serve as marks
part = st.sampled_from(
    [*SPECIAL, "☃", "<|im_", "|>", "\U000f0000", "\U000f0001", " ", "\n", "the cat", "</think>", "é"]
)
content = st.lists(part | st.text(max_size=5), max_size=6).map("".join)
turns = st.lists(content, min_size=1, max_size=5).map(
    lambda said: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(CHATS)), turns)
def test_what_somebody_says_is_text_and_all_of_it(name, messages):
    """The special tokens are those that the template wrote, and the text is what it makes of the conversation."""
    template, special = CHATS[name], {*TOKENIZER.special.values()}
    ids = template.encode(TOKENIZER, messages)
    if name != "the rest":  # which looks into what was said, and changes it
        assert TOKENIZER.decode(ids) == TOKENIZER.decode(TOKENIZER.encode(template.render(messages)))
    empty = template.encode(TOKENIZER, [message | {"content": ""} for message in messages])
    assert [i for i in ids if i in special] == [i for i in empty if i in special]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(CHATS)), turns)
def test_where_nobody_says_a_special_token_the_ids_are_those_of_the_text(name, messages):
    template = CHATS[name]
    clean = [m | {"content": m["content"].translate(dict.fromkeys(map(ord, "<|[☃")))} for m in messages]
    assert template.encode(TOKENIZER, clean) == TOKENIZER.encode(template.render(clean), allow_special=True)


def test_a_tokenizer_without_special_tokens_encodes_too():
    plain = bpe.train("user said", 260, special=())
    assert plain.decode(ChatTemplate("{{ messages[0].content }}~", {}, "").encode(plain, USER)) == "Hi~"


@pytest.mark.parametrize(
    "source, said",
    [
        ("{% if %}", "file, line 1: .*Expected an expression"),
        ("\n{% endfor %}", "file, line 2: .*unknown tag"),
        ("{{ raise_exception('no system,\nplease') }}", "file: .*no system, please"),
        ("{{ messages[7].content }}", "file: .*has no"),
        ("{{ messages[0].content + 1 }}", "file: .*TypeError"),
        ("{{ 1 / 0 }}", "file: .*division by zero"),
        ("{{ ''.__class__.__mro__ }}", "file: .*unsafe"),
        ("{{ messages.append(1) }}", "file: .*safely callable|file: .*unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "file: .*RecursionError"),
        ("{% for i in range(10**9) %}{% endfor %}", "file: .*OverflowError"),
        ("{{ '" + "(" * 5000, "file.*"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "file: .*RecursionError"),
    ],
)
def test_one_that_fails_is_one_sentence(source, said):
    with pytest.raises(ValueError, match=said) as caught:
        ChatTemplate(source, {}, "file").render(USER)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_one_that_never_ends_is_one_sentence(monkeypatch):
    endless = "{% set many = range(99999) | list %}{% for i in many %}{% for j in many %}{% endfor %}{% endfor %}"
    template, began = ChatTemplate(endless, {}, "file"), time.perf_counter()
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    with pytest.raises(ValueError, match="file: .*not done after 0.2 seconds"):
        template.render(USER)
    assert time.perf_counter() - began < 20
    time.sleep(0.3)  # the timer is off again
    with ThreadPoolExecutor() as pool:  # whose threads have no timers
        assert pool.submit(CHATS["ChatML"].render, USER).result().startswith("<|im_start|>user")


# --- where a template stands ---


def write(folder, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_template_stands_in_either_file_with_the_names_it_may_say(tmp_path):
    assert published(tmp_path) is None
    write(tmp_path, bos_token="<s>", eos_token={"content": "</s>", "lstrip": False}, pad_token=None)
    assert published(tmp_path) is None
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token }}"
    write(tmp_path, bos_token="<s>", eos_token={"content": "</s>"}, pad_token=None, chat_template=source)
    assert published(tmp_path).render(USER) == "<s>Hi</s>" and published(tmp_path).source == source
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}!")  # the newer of the two
    assert published(tmp_path).render(USER) == "<s>!"


def test_of_several_templates_it_is_the_default(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "chat"}]
    write(tmp_path, chat_template=named)
    assert published(tmp_path).render(USER) == "chat"
    write(tmp_path, chat_template=named[:1])
    with pytest.raises(ValueError, match="tokenizer_config.json .*default"):
        published(tmp_path)


@pytest.mark.parametrize("what", [7, {"a": 1}, [{"name": "default"}], [{"name": "default", "template": 1}, 3]])
def test_what_is_no_template_is_refused(what, tmp_path):
    write(tmp_path, chat_template=what)
    if what == [{"name": "default"}]:  # nothing, as a null is
        assert published(tmp_path) is None
        return
    with pytest.raises(ValueError, match="tokenizer_config.json cannot have chat_template"):
        published(tmp_path)
