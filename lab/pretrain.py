"""The command line of train.py: a model, new or one to go on with, and a text in three parts to learn from."""

import math
from dataclasses import dataclass, fields

import bpe
import checkpoint
import model
from architectures import ARCHITECTURES, sibling
from engine import cli, corpus, np, runs, spans
from engine.cli import option
from train import END, MASK, OBJECTIVES, SPECIAL, Training, begun, check_clip, complete, train, windows, windows_of


@dataclass(frozen=True)
class Settings(Training):
    """What pre-training is told besides: the objective, and the size of a new model."""

    objective: str = option("causal", "continue the text, or fill the gaps", choices=list(OBJECTIVES))
    arch: str = option("qwen3", "published architecture to train a small sibling of", choices=list(ARCHITECTURES))
    layers: int = option(4, "number of blocks", least=1)
    hidden: int = option(128, "size of the hidden states", least=1)
    heads: int = option(2, "query heads", least=1)
    kv_heads: int = option(1, "key-value heads", least=1)
    feed_forward: int | None = option(None, "size inside the feed-forward layer; 8/3 of --hidden if not given", least=1)
    vocab: int = option(1024, "tokens in the vocabulary", least=256 + len(SPECIAL))
    attention: str | None = option(None, "of every other layer", choices=["sliding", "strided", "fixed", "bigbird"])
    experts: int = option(8, "experts per layer, for an --arch that has some", least=1)
    experts_per_token: int = option(2, "experts that compute a token", least=1)


TOKENIZER_TEXT = 1 << 24  # bytes that a new tokenizer is trained on, at most
TEST_TOKENS = 1 << 18  # that are tested, at most
SIZES = {field.name for field in fields(Settings)} - {field.name for field in fields(Training)} - {"objective"}


def check(s):
    """ValueError, with one sentence, for a new model that cannot be."""
    times = 4 if ARCHITECTURES[s.arch].kv_lora_rank else 2  # latent attention rotates half of a head
    if s.hidden % (times * s.heads):
        raise ValueError(f"--hidden must be a multiple of {times} times --heads, as RoPE rotates pairs")
    if s.heads % s.kv_heads:
        raise ValueError("--heads must be a multiple of --kv-heads")
    if s.mtp and s.objective != "causal":
        raise ValueError("--mtp predicts the token after the next, which only --objective causal has")


class Texts:
    """What pre-training learns: windows of texts, by a new model or by one that goes on."""

    tokenizer_notes = {}

    def __init__(self, run):
        self.settings = s = run.settings
        is_causal = s.objective == "causal"
        parts = corpus.texts(s.data)  # to train on, to validate on, to test on
        run.check_data(spans.traits([text for part in parts for text in part]))
        if run.start:
            self.params, config, self.tokenizer = begun(run.start, s, is_causal)
        else:
            check(s)
            sizes = {name: getattr(s, name) for name in SIZES - {"arch", "vocab"}} | {"context": s.context}
            sizes |= {"causal": is_causal, "num_nextn_predict_layers": int(s.mtp > 0)}
            some = spans.sample(parts[0], TOKENIZER_TEXT)
            self.tokenizer = bpe.train((piece.text() for piece in some), s.vocab, special=SPECIAL)
            config = sibling(s.arch, self.tokenizer.vocab_size, **sizes, bos_token_id=END, eos_token_id=END)
            checkpoint.check(config)
            check_clip(s, config)
            self.params = model.init(config, s.seed)
        ends = self.tokenizer.special.get(SPECIAL[END]), *np.atleast_1d(config.eos_token_id), config.bos_token_id
        self.tokens, per_byte = corpus.as_tokens(run, parts, self.tokenizer, ends)
        self.rows = len(self.tokens[0]) // s.context
        self.config, self.held_out, self.test_text = config, {}, b"\n".join(text.data() for text in parts[2])
        for i, part, most in (1, "val", 32), (2, "test", math.ceil(TEST_TOKENS / s.context)):
            rows = corpus.evenly((*windows_of(self.tokens[i], s.context, s.objective, config.vocab_size), None), most)
            # no bits per byte for gaps: only 15 % of the tokens are predicted, from both sides
            self.held_out[part] = rows, per_byte[i] if is_causal else None
        asked, there = self.held_out["test"][0][0].size, len(self.tokens[2])
        self.tested = f" ({asked:,} of its {there:,} tokens, evenly spaced)" if asked < there - 1 else ""
        self.talk = '--prompt "The"' if is_causal else '--prompt "The <mask> of the list"'

    @staticmethod
    def merge(params):
        return params, lambda grads: grads

    def batch(self, step):
        s, rng = self.settings, np.random.default_rng((self.settings.seed, step))
        return *windows(self.tokens[0], s.objective, s.context, s.batch, rng, self.config.vocab_size), None

    def sample(self, step, length=64):
        """What the model makes of the beginning of the validation part, or of gaps in it."""
        decode, window = self.tokenizer.decode, self.config.max_position_embeddings
        tokens = self.tokens[1][: 1 + window].tolist()
        if not self.config.causal:
            gaps = [MASK if i % 7 == 3 else token for i, token in enumerate(tokens[1 : 1 + min(length, window)])]
            return f"{decode(gaps)}\n→ {decode(model.fill(self.params, self.config, gaps, MASK))}"
        start = tokens[: min(12, window // 2)]
        drawing = {"temperature": 0.8, "top_p": 0.95, "stop": []}
        more = model.generate(self.params, self.config, start, min(length, window - len(start)), **drawing)
        return f"{decode(start[1:])} … {decode(more)}"


def pretrain(given):
    """A run from options, {name: value of Settings, out or resume}, to the last line of its metrics.jsonl."""
    if "init" in given and SIZES & given.keys():
        raise ValueError(f"--{min(SIZES & given.keys()).replace('_', '-')} is for a new model, and --init has one")
    run = runs.Run("train.py", Settings, complete, given)
    return train(Texts(run), run)


def main(argv=None):
    pretrain(cli.given(argv, "Train a small language model.", Settings, runs.Place))
