"""The chat template of a published model: a program in Jinja that writes a conversation as one text.

It is part of a folder, as chat_template.jinja or in tokenizer_config.json, and is run in Jinja's sandbox as Hugging
Face transformers runs it. What tools a model may call is left aside: templates are told that there are none.
"""

import json
import os
import re
import signal
import threading
from contextlib import contextmanager
from datetime import datetime

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.files import read_object, read_text, refuse, regular, shown

SECONDS = 5.0  # for a template that does not come to its end
PRIVATE = range(0xF0000, 0xFFFFE)  # characters without a meaning


class Generation(Extension):
    """{% generation %} … {% endgeneration %}, around what the assistant says: a loss mask, for training."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def environment():
    """Jinja as transformers sets it up."""

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, **options)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


@contextmanager
def within(seconds):
    """TimeoutError for what takes longer. In the main thread, where the system has timers."""

    def stop(number, frame):
        raise TimeoutError(f"it is not done after {seconds:g} seconds")

    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class ChatTemplate:
    """source: the template's text. names: what else it may say, such as {"bos_token": "<s>"}. path: its file, for
    messages. ValueError, with one sentence, for a source that is no template.
    """

    def __init__(self, source, names, path):
        self.source, self.names, self.path = source, names, path
        with self.failing():
            self.template = environment().from_string(source)

    @contextmanager
    def failing(self):
        """What others wrote may fail in any way: all of them are one sentence."""
        try:
            with within(SECONDS):
                yield
        except Exception as error:
            said = str(error) if isinstance(error, (TemplateError, TimeoutError)) else repr(error)
            where = f"{self.path}, line {error.lineno}" if isinstance(error, TemplateSyntaxError) else self.path
            raise ValueError(f"{where}: the chat template stops with {' '.join(said.split())!r:.200}") from None

    def render(self, messages):
        """The text of a conversation up to where the assistant begins to speak.

        messages: a list of {"role": "system", "user" or "assistant", "content": text}. ValueError, with one sentence,
        where the template refuses them, fails or does not come to an end.
        """
        around = {"tools": None, "documents": None, "add_generation_prompt": True}
        with self.failing():
            return self.template.render(messages=messages, **around | self.names)

    def encode(self, tokenizer, messages):
        """The same as token ids. A special token is one where the template wrote it; what somebody said is text.

        So that the two can be told apart, and the template still sees all that was said, the special tokens in there
        are marked, each character by one that has no meaning.
        """
        said = "".join(message["content"] for message in messages)
        mark = next(char for char in map(chr, PRIVATE) if char not in said)
        longest_first = "|".join(map(re.escape, sorted(tokenizer.special, key=len, reverse=True))) or "(?!)"
        find, cut = re.compile(longest_first), re.compile(f"((?:{longest_first})(?!{mark}))")
        marked = lambda text: find.sub(lambda found: "".join(char + mark for char in found[0]), text)
        text = self.render([message | {"content": marked(message["content"])} for message in messages])
        ids = []
        for i, part in enumerate(cut.split(text)):
            ids += [tokenizer.special[part]] if i % 2 else tokenizer.encode(part.replace(mark, ""))
        return ids


def published(folder):
    """The ChatTemplate of a checkpoint folder, or None. Of several it is the one named default. ValueError as above."""
    path, settings = os.path.join(folder, "tokenizer_config.json"), {}
    if os.path.exists(path):
        settings = read_object(path)
    names = {name: entry.get("content") if isinstance(entry, dict) else entry for name, entry in settings.items()}
    names = {name: text for name, text in names.items() if name.endswith("_token") and isinstance(text, str)}
    source = settings.get("chat_template")
    if isinstance(source, list):
        sources = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        refuse("default" not in sources, f"{path} has several chat templates, and none is named default")
        source = sources["default"]
    if os.path.exists(file := os.path.join(folder, "chat_template.jinja")):
        path, source = file, read_text(regular(file))
    if source is None:
        return None
    refuse(not isinstance(source, str), f"{path} cannot have chat_template = {shown(source)}")
    return ChatTemplate(source, names, path)
