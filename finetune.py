"""Proceso de entrenamiento: fine tuning, modelos instruct: from a language model to one that converses.

A conversation is one text, in which special tokens say who speaks and where a turn ends (ChatML):

    <|im_start|>user
    What does shutil.copyfile do?<|im_end|>
    <|im_start|>assistant
    Copy data from src to dst.<|im_end|>

Fine-tuning adapts a trained model to a use by training it further. Here the texts are conversations, the loss is that
of train.py, and a loss mask counts only the assistant's tokens and the one that ends its turn (Touvron et al. 2023,
section 3.1): so it learns to answer and not to ask, and when to stop. To talk to it is to let it continue behind
"assistant". What a user types is encoded as plain text, in which the name of a special token is just letters, so that
nobody can end a turn and go on as somebody else.

The change that fine-tuning makes to a weight matrix is, by hypothesis, of low rank, so it may be learned as a product
of two matrices of rank r (LoRA, Hu et al. 2021, section 4.1):

    W' = W + (α/r) B A        W (out, in) stays as it is;  B (out, r) and A (r, in) are learned;  α is a constant

    python finetune.py                                          a conversation as the model sees it
    python finetune.py --init runs/book --out runs/assistant    an assistant, for questions about Python's library
    python finetune.py --init DIR --data CHAT.jsonl --lora 8    your own conversations, with low-rank adapters, r = 8
    python model.py --load runs/assistant --chat                talk to it

A line of CHAT.jsonl is a conversation: {"messages": [{"role": "user", "content": "…"}, …]}
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

# the first token of a turn: (the turn's header, the token that ends it, what stands between turns)
FORMATS = {
    "<|im_start|>": ("<|im_start|>{role}\n", "<|im_end|>", "\n"),  # ChatML: Qwen, SmolLM
    "<|start_header_id|>": ("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", ""),  # Llama 3
}
IM_START = "<|im_start|>"


def has_format(tokenizer):
    """Whether the tokenizer has the special tokens of a chat."""
    return any({first, end} <= tokenizer.special.keys() for first, (_, end, _) in FORMATS.items())


def chat_format(tokenizer):
    """(header, end, after) of the format of a tokenizer's special tokens. ValueError where there is none."""
    for first, (header, end, after) in FORMATS.items():
        if {first, end} <= tokenizer.special.keys():
            return header, end, after
    raise ValueError("the tokenizer has no tokens for a chat: fine-tune its model first, with finetune.py")


def encode(tokenizer, messages):
    """One conversation as tokens.

    messages: a list of {"role": "system", "user" or "assistant", "content": text}.
    Returns ids, a list, and loss_mask, booleans: True where the assistant speaks or ends its turn.
    """
    header, end, after = chat_format(tokenizer)
    ids, loss_mask = list(tokenizer.bos), [False] * len(tokenizer.bos)
    for message in messages:
        before = tokenizer.encode(header.format(role=message["role"]), allow_special=True)
        said = tokenizer.encode(message["content"]) + [tokenizer.special[end]]
        between = tokenizer.encode(after)
        ids += before + said + between
        own = message["role"] == "assistant"
        loss_mask += [False] * len(before) + [own] * len(said) + [False] * len(between)
    return ids, loss_mask


def prompt(tokenizer, messages):
    """The ids of the conversation so far and of the header of the assistant's next turn, a list."""
    header = chat_format(tokenizer)[0].format(role="assistant")
    return encode(tokenizer, messages)[0] + tokenizer.encode(header, allow_special=True)


def end_token(tokenizer):
    """The id of the token that ends a turn."""
    return tokenizer.special[chat_format(tokenizer)[1]]


def pack(conversations, context):
    """Conversations one after another in rows of one length, a new row where the next does not fit: where they are
    short, little is padding.

    conversations: a list of (ids, loss_mask), as of `encode`. One of more than context + 1 ids is cut (n ids make n - 1
    pairs of an input and its target), and left out if no answer begins before the cut.
    Returns inputs, targets and document ids, (rows, context) integers: targets are IGNORE where the assistant does not
    speak; document ids are 1, 2, … for a row's conversations and 0 for padding, and attention stays within one id
    (masks.same_document). Positions run on from one to the next, as RoPE knows distances only.
    """
    rows, lengths = [], []
    for ids, loss_mask in conversations:
        length = min(len(ids), context + 1) - 1  # pairs
        if not any(loss_mask[1 : length + 1]):  # nothing to learn: cut off before the assistant speaks
            continue
        if not lengths or lengths[-1] + length > context:
            rows.append([])
            lengths.append(0)
        rows[-1].append((ids[: length + 1], loss_mask[: length + 1]))
        lengths[-1] += length
    inputs, documents = np.zeros((len(rows), context), np.int64), np.zeros((len(rows), context), np.int64)
    targets = np.full((len(rows), context), IGNORE)
    for i, row in enumerate(rows):
        start = 0
        for number, (ids, loss_mask) in enumerate(row, 1):
            place = slice(start, start + len(ids) - 1)
            inputs[i, place], documents[i, place] = ids[:-1], number
            targets[i, place] = np.where(loss_mask[1:], ids[1:], IGNORE)
            start = place.stop
    return inputs, targets, documents


# -------------------------------------------------------------------------------------------------- LoRA


def low_rank(w, a, b, alpha=16.0):
    """W' = W + (α/r) B A. The division by r makes it less necessary to tune the learning rate again for another rank
    (Hu et al. 2021, section 4.1); for large r it is too strong, and √r would do (Kalajdzievski 2023).

    w: (out, in); a: (r, in); b: (out, r). Returns W' and backward(dW') -> (da, db); W is not trained.
    """
    scale = alpha / len(a)

    def backward(dw):  # dW' = (α/r) (dB A + B dA)
        return b.T @ (scale * dw), (scale * dw) @ a.T

    return w + scale * (b @ a), backward


LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


def adapters(params, rank, seed=0):
    """Adapters for every matrix of params, the embeddings too, so that new tokens can be learned. A is normal with
    variance 1/in and B is 0, so that training begins at W.

    params: {name.weight: array}. Returns {name.lora_A.weight: (rank, in), name.lora_B.weight: (out, rank)}.
    """
    rng, new = np.random.default_rng(seed), {}
    for name, w in params.items():
        if w.ndim == 2:
            base, (rows, columns) = name.removesuffix(".weight"), w.shape
            new[base + LORA_A] = xp.asarray((rng.standard_normal((rank, columns)) * columns**-0.5).astype(w.dtype))
            new[base + LORA_B] = xp.zeros((rows, rank), w.dtype)
    return new


def merge(params, alpha=16.0):
    """`low_rank` of every matrix that has adapters, and whatever has none as it is. A merged matrix is one like any
    other, so a tuned model is saved and used like the one it came from.

    W' is formed before each forward pass, and its whole gradient after it, so gradients take as much memory as ever.
    What takes less is the optimiser's state: r (in + out) numbers for each of its moments instead of in · out. (The
    paper never forms W': it adds (α/r) B (A x) to W x.)
    params: weights and adapters together, by name. Returns the weights and backward(dweights) -> the gradients of what
    is trained: of the adapters, or of all weights where there are no adapters.
    """
    adapted = [name.removesuffix(LORA_A) for name in params if name.endswith(LORA_A)]
    if not adapted:
        return params, lambda dweights: dweights
    weights, backwards = {name: w for name, w in params.items() if not name.endswith((LORA_A, LORA_B))}, {}
    for name in adapted:
        w, a, b = (params[name + suffix] for suffix in (".weight", LORA_A, LORA_B))
        weights[f"{name}.weight"], backwards[name] = low_rank(w, a, b, alpha)

    def backward(dweights):
        grads = {}
        for name in adapted:
            grads[name + LORA_A], grads[name + LORA_B] = backwards[name](dweights[f"{name}.weight"])
        return grads

    return weights, backward


# ------------------------------------------------------------------- a model that learns to converse


def jinja(tokenizer):
    """The format as the template that transformers wants in tokenizer_config.json. There, unlike in `encode`, a user
    can spell a special token."""
    begin, end, after = (part.replace("\n", "\\n") for part in chat_format(tokenizer))
    turn = "{{ '" + begin.replace("{role}", "' + message['role'] + '") + f"' + message['content'] + '{end}{after}' }}}}"
    answer = "{% if add_generation_prompt %}{{ '" + begin.format(role="assistant") + "' }}{% endif %}"
    return tokenizer.decode(tokenizer.bos) + "{% for message in messages %}" + turn + "{% endfor %}" + answer


def with_chat_tokens(params, config, tokenizer):
    """Params, config and tokenizer of a model that can be trained to converse: its own, if the tokenizer has a chat
    format, else with the tokens of ChatML added. The row of a new token is the mean of the others, so that the model's
    predictions hardly change (Hewitt 2021). The token that ends a turn joins config.eos_token_id: there an answer ends.
    """
    if not has_format(tokenizer):
        known = tokenizer.config.get("added_tokens") or []
        new = [text for text in (IM_START, FORMATS[IM_START][1]) if text not in tokenizer.special]
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


# --------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Settings(train.Training):
    """The options of finetune.py, beside those of train.py."""

    data: list | None = option(None, "JSONL conversations; none: questions about Python's library", **cli.FILES)
    lora: int | None = option(None, "rank of adapters, trained instead of the weights and merged in the end", least=1)


def complete(settings):
    """The settings with a value for each; ValueError where no model to begin with is named."""
    if not settings.init:
        raise ValueError("fine-tuning needs the model to begin with: --init DIR")
    return train.complete(settings, minutes=1.0)


class Conversations:
    """What `train.train` needs to fine-tune (its `task`): packed conversations, and the model of --init, given chat
    tokens if it has none. run: an engine.runs.Run; run.start is the folder with the weights to begin with.
    """

    merge = staticmethod(merge)
    test_text, tested, talk = None, "", "--chat"  # no text for compressors; how to talk to it at the end

    def __init__(self, run):
        self.settings = s = run.settings
        parts = corpus.conversations(s.data)
        run.check_data(["\0".join(json.dumps(messages) for part in parts for messages in part).encode()])
        self.params, self.config, self.tokenizer = with_chat_tokens(*train.begun(run.start, s))
        encoded = [[encode(self.tokenizer, messages) for messages in part] for part in parts]
        np.random.default_rng(s.seed).shuffle(encoded[0])
        self.packed, *held_out = (pack(part, s.context) for part in encoded)
        for purpose, rows in zip(("train", "validate", "test"), (self.packed, *held_out)):
            if not len(rows[0]):
                where = f"within --context {s.context} in the conversations to {purpose} on"
                raise ValueError(f"no answer of the assistant begins {where}")
        self.rows = len(self.packed[0])
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
