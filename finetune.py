"""Proceso de entrenamiento: fine tuning, modelos instruct: from a language model to one that converses.

A conversation is one text, in which special tokens say who speaks and where a turn ends (ChatML):

    <|im_start|>user
    What does shutil.copyfile do?<|im_end|>
    <|im_start|>assistant
    Copy data from src to dst.<|im_end|>

To fine-tune a model into an assistant is to train it on such texts as ever (train.py), but with a loss on what the
assistant says only (Touvron et al. 2023, section 3.1): it learns to answer and not to ask, and from the token that ends
a turn it learns to stop. To talk to it is to let it continue behind "assistant". What a user types is encoded as plain
text, in which the name of a special token is just letters, so that nobody can end a turn and go on as somebody else.

What fine-tuning adds to a weight matrix is simple compared with the matrix itself, so it may be learned as a product of
two thin ones, of r columns and r rows (LoRA, Hu et al. 2021, section 4.1):

    W' = W + (α/r) B A        W (out, in) stays as it is;  B (out, r) and A (r, in) are learned

    python finetune.py                                          a conversation as the model sees it
    python finetune.py --init runs/book --out runs/assistant    an assistant, for questions about Python's library
    python finetune.py --init DIR --data CHAT.jsonl --lora 8    your own conversations, with low-rank adapters
    python model.py --load runs/assistant --chat                talk to it
"""

import json
import sys
from dataclasses import dataclass, replace
from itertools import takewhile

import bpe
import model
import train
from engine import cli, corpus, np, ranks, runs, xp
from engine.cli import option
from layers import IGNORE

# ------------------------------------------------------------------------------ chat format and loss mask

# the token that begins a turn: the turn's beginning, the token that ends it, and what follows that
FORMATS = {
    "<|im_start|>": ("<|im_start|>{role}\n", "<|im_end|>", "\n"),  # ChatML: Qwen, SmolLM
    "<|start_header_id|>": ("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", ""),  # Llama 3
}
CHATML = "<|im_start|>"


def has_format(tokenizer):
    """Whether the tokenizer has the special tokens of a chat."""
    return any({begin, end} <= tokenizer.special.keys() for begin, (_, end, _) in FORMATS.items())


def chat_format(tokenizer):
    """The format that a tokenizer's special tokens belong to. ValueError for one that has never been in a chat."""
    for begin, (turn, end, after) in FORMATS.items():
        if {begin, end} <= tokenizer.special.keys():
            return turn, end, after
    raise ValueError("the tokenizer has no tokens for a chat: fine-tune its model first, with finetune.py")


def encode(tokenizer, messages):
    """One conversation as tokens.

    messages: a list of {"role": "system", "user" or "assistant", "content": text}.
    Returns ids, a list, and spoken, the loss mask: booleans, True where the assistant speaks or ends its turn.
    """
    begin, end, after = chat_format(tokenizer)
    ids, spoken = list(tokenizer.bos), [False] * len(tokenizer.bos)
    for message in messages:
        header = tokenizer.encode(begin.format(role=message["role"]), allow_special=True)
        turn = tokenizer.encode(message["content"]) + [tokenizer.special[end]]
        rest = tokenizer.encode(after)
        ids += header + turn + rest
        own = message["role"] == "assistant"
        spoken += [False] * len(header) + [own] * len(turn) + [False] * len(rest)
    return ids, spoken


def prompt(tokenizer, messages):
    """The conversation so far, as tokens, up to where the assistant begins to speak."""
    begin = chat_format(tokenizer)[0].format(role="assistant")
    return encode(tokenizer, messages)[0] + tokenizer.encode(begin, allow_special=True)


def end_token(tokenizer):
    """The id of the token that ends a turn."""
    return tokenizer.special[chat_format(tokenizer)[1]]


def pack(conversations, context):
    """Conversations side by side in rows of one length, so that hardly any computation is spent on padding.

    conversations: a list of (ids, spoken), as of `encode`; what exceeds the context is cut off.
    Returns inputs, targets and document ids, (rows, context) integers: targets are IGNORE where the assistant does not
    speak; document ids number the conversations of a row from 1 on, which must not see each other, and are 0 for
    padding. Positions run on from one to the next, as RoPE knows distances only.
    """
    rows, lengths = [], []
    for ids, spoken in conversations:
        length = min(len(ids), context + 1) - 1
        if not any(spoken[1 : length + 1]):  # nothing to learn: cut off before the assistant speaks
            continue
        if not lengths or lengths[-1] + length > context:
            rows.append([])
            lengths.append(0)
        rows[-1].append((ids[: length + 1], spoken[: length + 1]))
        lengths[-1] += length
    inputs, documents = np.zeros((len(rows), context), np.int64), np.zeros((len(rows), context), np.int64)
    targets = np.full((len(rows), context), IGNORE)
    for i, row in enumerate(rows):
        start = 0
        for number, (ids, spoken) in enumerate(row, 1):
            place = slice(start, start + len(ids) - 1)
            inputs[i, place], documents[i, place] = ids[:-1], number
            targets[i, place] = np.where(spoken[1:], ids[1:], IGNORE)
            start = place.stop
    return inputs, targets, documents


def jinja(tokenizer):
    """The format as the template that transformers wants in tokenizer_config.json. There, unlike in `encode`, a user
    can spell a special token."""
    begin, end, after = (part.replace("\n", "\\n") for part in chat_format(tokenizer))
    turn = "{{ '" + begin.replace("{role}", "' + message['role'] + '") + f"' + message['content'] + '{end}{after}' }}}}"
    answer = "{% if add_generation_prompt %}{{ '" + begin.format(role="assistant") + "' }}{% endif %}"
    return tokenizer.decode(tokenizer.bos) + "{% for message in messages %}" + turn + "{% endfor %}" + answer


def with_chat_tokens(params, config, tokenizer):
    """Params, config and tokenizer of a model that can be trained to converse: its own, if the tokenizer has a chat
    format, else with the tokens of ChatML added. A new token begins as the mean of all, so that it is neither likely
    nor strange (Hewitt 2021), and its end-of-turn token joins those that end an answer.
    """
    if not has_format(tokenizer):
        known = tokenizer.config.get("added_tokens") or []
        new = [text for text in (CHATML, FORMATS[CHATML][1]) if text not in tokenizer.special]
        added = [bpe.FLAGS | {"id": tokenizer.vocab_size + i, "content": text} for i, text in enumerate(new)]
        ids = [token["id"] for token in added]
        tokenizer = bpe.Tokenizer(tokenizer.config | {"added_tokens": known + added})
        size = max(config.vocab_size, tokenizer.vocab_size)  # published tables are often larger than the vocabulary
        params, config = dict(params), replace(config, vocab_size=size)
        for name in {"model.embed_tokens.weight", "lm_head.weight"} & params.keys():
            table = params[name]
            params[name] = xp.concatenate([table, xp.zeros((size - len(table), table.shape[1]), table.dtype)])
            params[name][ids] = table[: ids[0]].mean(axis=0)
    ends = [end_token(tokenizer), *np.atleast_1d([] if config.eos_token_id is None else config.eos_token_id).tolist()]
    return params, replace(config, eos_token_id=tuple(dict.fromkeys(ends))), tokenizer


# -------------------------------------------------------------------------------------------------- LoRA

A, B = ".lora_A.weight", ".lora_B.weight"


def adapters(params, rank, seed=0):
    """Adapters for every matrix of params, the embeddings too, so that new tokens can be learned. A is normal with
    variance 1/in and B is 0, so that training begins at W.

    params: {name.weight: array}. Returns {name.lora_A.weight: (rank, in), name.lora_B.weight: (out, rank)}.
    """
    rng, new = np.random.default_rng(seed), {}
    for name, w in params.items():
        if w.ndim == 2:
            base, (rows, columns) = name.removesuffix(".weight"), w.shape
            new[base + A] = xp.asarray((rng.standard_normal((rank, columns)) * columns**-0.5).astype(w.dtype))
            new[base + B] = xp.zeros((rows, rank), w.dtype)
    return new


def merge(params, alpha=16.0):
    """W + (α/r) B A for every matrix with adapters, and whatever has none as it is. The division by r makes it less
    necessary to tune the learning rate again for another rank (Hu et al. 2021, section 4.1); for large r it is too
    strong, and √r would do (Kalajdzievski 2023).

    The sum is a matrix like any other, so a tuned model is saved and used like the one it came from. It is computed
    before each forward pass, and its whole gradient after it: what is saved is the memory of the optimiser's state, of
    r (in + out) numbers instead of in · out, not that of gradients.
    params: weights and adapters together, by name. Returns the weights and backward(dweights) -> the gradients of what
    is trained: of the adapters, or of all weights where there are no adapters.
    """
    adapted = [name.removesuffix(A) for name in params if name.endswith(A)]
    if not adapted:
        return params, lambda dweights: dweights
    weights = {name: w for name, w in params.items() if not name.endswith((A, B))}
    scale = {name: alpha / len(params[name + A]) for name in adapted}
    for name in adapted:
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + scale[name] * (params[name + B] @ params[name + A])

    def backward(dweights):
        grads = {}
        for name in adapted:
            dw = scale[name] * dweights[f"{name}.weight"]
            grads[name + A] = params[name + B].T @ dw
            grads[name + B] = dw @ params[name + A].T
        return grads

    return weights, backward


# --------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Settings(train.Training):
    """What fine-tuning is told."""

    data: list | None = option(None, "JSONL conversations; none: questions about Python's library", **cli.FILES)
    lora: int | None = option(None, "rank of adapters, trained instead of the weights and merged in the end", least=1)


def complete(settings):
    if not settings.init:
        raise ValueError("fine-tuning needs the model to begin with: --init DIR")
    return train.complete(settings, minutes=1.0)


class Conversations:
    """What fine-tuning learns, as a task of `train.train`: packed conversations, by a model that has or gets a chat."""

    merge, test_text, talk = staticmethod(merge), None, "--chat"

    def __init__(self, run):
        self.settings = s = run.settings
        parts = corpus.conversations(s.data)
        run.check_data([json.dumps(messages) for part in parts for messages in part])
        self.params, self.config, self.tokenizer = with_chat_tokens(*train.begun(run.start, s))
        encoded = [[encode(self.tokenizer, messages) for messages in part] for part in parts]
        np.random.default_rng(s.seed).shuffle(encoded[0])
        self.packed, *held_out = (pack(part, s.context) for part in encoded)
        for purpose, rows in zip(("train", "validate", "test"), (self.packed, *held_out)):
            if not len(rows[0]):
                what = f"to {purpose} on, no answer of the assistant begins"
                raise ValueError(f"of the conversations {what} within a --context of {s.context} tokens")
        self.held_out = {"val": (corpus.evenly(held_out[0], 32), None), "test": (held_out[1], None)}
        self.tokenizer_notes = {"eos_token": chat_format(self.tokenizer)[1], "chat_template": jinja(self.tokenizer)}
        self.asked = [list(takewhile(lambda message: message["role"] != "assistant", said)) for said in parts[1]]
        if s.lora:
            self.params |= adapters(self.params, s.lora, s.seed)
        counts = " for validation, ".join(f"{len(part):,}" for part in parts[1:])
        print(f"data       {len(parts[0]):,} conversations to train on, {counts} for the test")

    def batch(self, step):
        """Packed rows, each once before any comes again: inputs, targets, document ids (batch, context)."""
        chosen = corpus.epochs(len(self.packed[0]), self.settings.batch, step, self.settings.seed)
        return [array[chosen] for array in self.packed]

    def sample(self, step, length=64):
        """A question of the validation part, and what the model answers."""
        question, window = self.asked[step % len(self.asked)], self.config.max_position_embeddings
        ids = prompt(self.tokenizer, question)[-window // 2 :]
        weights, length = merge(self.params)[0], min(length, window - len(ids))
        answer = model.generate(weights, self.config, ids, length, temperature=0.8, top_p=0.95)
        said = self.tokenizer.decode(token for token in answer if token not in self.config.eos_token_id)
        return f"{question[-1]['content'] if question else ''} … {said}"  # sometimes the assistant speaks first


def finetune(given):
    """A run from options, {name: value of Settings, out or resume}, to the last line of its metrics.jsonl."""
    run = runs.Run("finetune.py", Settings, complete, given)
    return train.train(Conversations(run), run)


def main(argv=None):
    finetune(cli.given(argv, "Make an assistant of a language model.", Settings, runs.Place))


if __name__ == "__main__":
    if sys.argv[1:]:
        cli.run(lambda: ranks.lead(main))
    else:
        from lab.demo_finetune import demo

        cli.run_demo(demo)
