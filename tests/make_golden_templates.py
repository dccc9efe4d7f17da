"""Write golden/templates.json: what Hugging Face transformers makes of conversations, by templates and tokens.

python tests/make_golden_templates.py        (needs transformers; run it only to renew the file)
"""

import datetime
import json
import pathlib
import random

from example_templates import DAY, NAMES, TEMPLATES
from jinja2.exceptions import TemplateError
from transformers.utils import chat_template_utils

PARTS = [
    "Hi",
    " ",
    "\n",
    "  2+2? ",
    "<|im_end|>",
    "</think>",
    "é😀",
    "\t",
    "{{ x }}",
    "'a\"b'",
    "日本",
    "\r\n",
    "the cat",
    "&<>",
]


def conversations(rng, count=8):
    """With and without a system message, of one to three questions; the last breaks the rule that roles alternate."""
    said = lambda: "".join(rng.choice(PARTS) for _ in range(rng.randint(0, 6)))
    for i in range(count):
        roles = ["system"] * (i % 2) + ["user", "assistant"] * rng.randint(0, 2) + ["user"] * (1 + (i == count - 1))
        yield [{"role": role, "content": said()} for role in roles]


def rendered(source, messages):
    """The text, or None where the template refuses the messages."""
    options = {"chat_template": source, "add_generation_prompt": True, **NAMES}
    try:
        return chat_template_utils.render_jinja_template([messages], **options)[0][0]
    except TemplateError:
        return None


class Clock(datetime.datetime):
    @classmethod
    def now(cls):
        return cls(*DAY)


def main():
    chat_template_utils.datetime = Clock
    chats = list(conversations(random.Random(0)))
    texts = {name: [rendered(source, messages) for messages in chats] for name, source in TEMPLATES.items()}
    path = pathlib.Path(__file__).parent / "golden" / "templates.json"
    path.write_text(json.dumps({"conversations": chats, "texts": texts}, indent=0) + "\n")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
