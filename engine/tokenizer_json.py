"""tokenizer.json, the published file of a tokenizer: read, written, refused by name for what is not here."""

import json
import os
import re
import unicodedata
from itertools import product

from engine.files import read_object, replace, shown, write_text

# The file writes a byte as a printable character: itself where Latin-1 has one, else one from U+0100 on.
_others = [*range(33), *range(127, 161), 173]
BYTE_CHARS = [chr(256 + _others.index(byte)) if byte in _others else chr(byte) for byte in range(256)]
CHAR_BYTES = {char: byte for byte, char in enumerate(BYTE_CHARS)}
HALVES = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # of surrogate pairs, but for bytes that Python keeps as one

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
REFUSED = """truncation padding dropout continuing_subword_prefix end_of_word_suffix byte_fallback fuse_unk
    single_word lstrip rstrip""".split()
KINDS = {dict: "an object", list: "a list", str: "a string", int: "an integer"}


def refuse(condition, what):
    if condition:
        raise ValueError(f"tokenizer.json asks for {what}, which bpe.py does not have")


def field(part, name, kind, optional=False):
    """What a part of the file has under a name, of the kind that it must be; None if it is optional and missing."""
    value = part.get(name) if type(part) is dict else part
    if type(part) is not dict or type(value) is not kind and not (optional and value is None):
        raise ValueError(f"tokenizer.json has {shown(value)} where {shown(name)} must be {KINDS[kind]}")
    return value


def parts(component, key, *kinds):
    """The parts of a component of these kinds: none, itself, or those of a Sequence, which it holds under `key`."""
    if component is None:
        return []
    if (kind := field(component, "type", str)) == "Sequence":
        return [part for inner in field(component, key, list) for part in parts(inner, key, *kinds)]
    refuse(kind not in kinds, f"{shown(kind)} as one of the {key}")
    return [component]


def template(post_processor):
    """(bos, eos): the ids that a post_processor puts before and after one text."""
    bos, eos = [], []
    for part in parts(post_processor, "processors", "ByteLevel", "TemplateProcessing"):
        side, tokens = bos, field(part, "special_tokens", dict, optional=True)
        for item in field(part, "single", list, optional=True) or ():
            if token := field(item, "SpecialToken", dict, optional=True):
                side += field(field(tokens, field(token, "id", str), dict), "ids", list)
            else:
                side = eos
    return bos, eos


class Content:
    """What a tokenizer.json of byte-level BPE says, in ids; `config` is all of it.

    vocab_size: one more than the largest id. token_bytes: of each id. special: {text: id} of the special tokens. bos,
    eos: ids before and after a text. byte_ids: of each byte. ranks: {(left, right): rank} of the merges; results: the
    id that each makes. whole: {bytes: id} of words that are tokens, merged or not. ValueError for what is not here.
    """

    def __init__(self, config):
        self.config, model = config, field(config, "model", dict)
        refuse((kind := model.get("type", "BPE")) != "BPE", f"the model {shown(kind)}")
        vocab, merges = field(model, "vocab", dict), field(model, "merges", list)
        for token in vocab:
            field(vocab, token, int)
        added = [t for t in field(config, "added_tokens", list, optional=True) or () if field(t, "content", str)]
        for part, option in product((model, config, *added), REFUSED):
            refuse(part.get(option), option)
        parts(config.get("decoder"), "decoders", "ByteLevel")
        nfc = parts(config.get("normalizer"), "normalizers", "NFC")
        self.normalize = (lambda text: unicodedata.normalize("NFC", text)) if nfc else str

        self.added = {token["content"]: token for token in added}
        self.ids = {text: vocab.get(text, field(token, "id", int)) for text, token in self.added.items()}
        self.special = {token["content"]: self.ids[token["content"]] for token in added if token.get("special")}
        # what is not spelled in byte characters is an added token, which stands for its own text
        spelled = {i: text.encode() for text, i in self.ids.items()} | {
            i: bytes(map(CHAR_BYTES.get, token)) if CHAR_BYTES.keys() >= set(token) else token.encode()
            for token, i in vocab.items()
        }
        if not spelled or not 0 <= min(spelled) <= max(spelled) < 1 << 24:
            raise ValueError("tokenizer.json has no tokens, or ids that are not from 0 to 2**24")
        self.vocab_size = 1 + max(spelled)
        self.token_bytes = [spelled.get(i, b"") for i in range(self.vocab_size)]
        # a byte that the vocabulary lacks becomes the unknown token or, where there is none, vanishes
        unknown = vocab.get(field(model, "unk_token", str, optional=True))
        self.byte_ids = [vocab.get(char, unknown) for char in BYTE_CHARS]
        self.bos, self.eos = template(config.get("post_processor"))
        if not all(type(i) is int and 0 <= i < self.vocab_size for i in self.bos + self.eos):
            raise ValueError("tokenizer.json puts an id before or after a text that is no token")

        self.results, self.ranks = [], {}
        forged = {*self.special.values()}  # no merge may make a special token out of text
        for merge in merges:
            pair = merge.split(" ") if isinstance(merge, str) else merge
            good = isinstance(pair, list) and [*map(type, pair)] == [str, str]
            if not good or not vocab.keys() >= {*pair, "".join(pair)}:
                raise ValueError(f"tokenizer.json has a merge that is not of two tokens into a third, {shown(pair)}")
            if (result := vocab["".join(pair)]) not in forged:
                self.ranks[vocab[pair[0]], vocab[pair[1]]] = len(self.results)
            self.results.append(result)
        whole = vocab.values() if model.get("ignore_merges") else ()
        self.whole = {self.token_bytes[i]: i for i in whole if i not in forged}

    def __reduce__(self):  # as which it goes to another process
        return type(self), (self.config,)

    def added_tokens(self, normalized, allow_special):
        """{text: id} of the added tokens that are cut out of a text before it is normalised, or after."""
        return {
            self.normalize(text) if normalized else text: self.ids[text]
            for text, token in self.added.items()
            if bool(token.get("normalized")) == normalized and (allow_special or not token.get("special"))
        }

    def save(self, path, **further):
        """Writes tokenizer.json, atomically: to `path` if that ends in .json, else into the folder `path`, beside the
        tokenizer_config.json that AutoTokenizer of transformers wants; further: entries of that, such as chat_template.
        """
        files = {os.fspath(path): self.config}
        if not os.fspath(path).endswith(".json"):
            os.makedirs(path, exist_ok=True)
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
            end = {"eos_token": "<|endoftext|>"} if "<|endoftext|>" in self.special else {}
            files = {f"{path}/tokenizer_config.json": settings | end | further, f"{path}/tokenizer.json": self.config}
        for path, content in files.items():
            replace(path, lambda part: write_text(part, json.dumps(content, ensure_ascii=False, indent=2)))


def content(tokens, merges, special, pre_tokenizer):
    """A tokenizer.json of byte-level BPE. tokens: in order of id, the special ones first; merges: pairs of tokens."""
    return dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")) | {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token} | FLAGS for i, token in enumerate(special)],
        "pre_tokenizer": pre_tokenizer,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": [*map(list, merges)]},
    }


def read(path, build):
    """What `build` makes of the content of a tokenizer.json. ValueError for a file that is not one."""
    config = read_object(path)
    try:
        return build(config)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
