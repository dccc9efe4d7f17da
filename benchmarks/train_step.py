"""Training step against PyTorch eager: the same Llama-style model, weights, batch, clipping and AdamW.

    python benchmarks/train_step.py [--sizes 1 3 6 12] [--batch 16] [--turns 9] [--compile]

Each side runs in a process of its own, so that neither's threads or memory settings touch the other's. Both first
have to give the same loss and gradients. Then they take turns of a few steps each, and the ratio of a turn is
torch's time over ours: above 1, ours is faster.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import model
import train
from optim import Optimizer, clip

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError:
    print("Skipped: PyTorch is not installed (pip install -r benchmarks/requirements.txt).")
    sys.exit()

CONTEXT = 256
LEARNING_RATE, BETAS, EPS, DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
SIZES = {  # millions of parameters: (hidden, intermediate, layers, heads, kv_heads, vocab)
    1: (128, 352, 4, 4, 2, 2048),
    3: (192, 512, 6, 6, 3, 3072),
    6: (256, 704, 7, 8, 4, 3072),
    12: (384, 1088, 6, 6, 2, 4096),
}


def config_of(size):
    keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    shape = dict(zip(keys.split(), SIZES[size], strict=True))
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    fixed = {"model_type": "llama", "max_position_embeddings": CONTEXT, "tie_word_embeddings": True}
    return model.Config.from_dict(shape | fixed | {"rope_parameters": rope, "rms_norm_eps": 1e-6})


# --- ours


def ours(params, config, tokens, targets, micro_batch, pool):
    """Returns step(), which trains `params` in place."""
    optimizer = Optimizer("adamw", LEARNING_RATE, DECAY)

    def step():
        _, grads = train.gradient(params, config, tokens, targets, micro_batch, pool.map)
        clip(grads, CLIP)
        optimizer.step(params, grads, parallel_map=pool.map)

    return step


# --- PyTorch's, its weights under the published names


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, self.dim = config.hidden_size, config.hidden_size // config.num_attention_heads
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden // self.group, bias=False)
        self.v_proj = nn.Linear(hidden, hidden // self.group, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x, cos, sin):
        split = lambda y: y.unflatten(-1, (-1, self.dim)).transpose(1, 2)
        rotate = lambda y: y * cos + torch.cat([-y[..., self.dim // 2 :], y[..., : self.dim // 2]], -1) * sin
        q, k, v = rotate(split(self.q_proj(x))), rotate(split(self.k_proj(x))), split(self.v_proj(x))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.group > 1)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        dim = config.hidden_size // config.num_attention_heads
        angle = torch.outer(torch.arange(CONTEXT), 10000.0 ** (-torch.arange(0, dim, 2) / dim)).repeat(1, 2)
        self.cos, self.sin = angle.cos(), angle.sin()

    def forward(self, tokens, targets):
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.model.norm(x), self.model.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def theirs(network, tokens, targets, compiled=False):
    """Returns step(), which trains `network`."""
    tokens, targets = torch.tensor(tokens), torch.tensor(targets)
    loss_of = torch.compile(network) if compiled else network
    parameters = list(network.parameters())
    matrices, norms = ([w for w in parameters if (w.ndim > 1) == big] for big in (True, False))
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, LEARNING_RATE, BETAS, EPS, fused=True)

    def step():
        adamw.zero_grad(set_to_none=True)
        loss_of(tokens, targets).backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        adamw.step()

    return step


# --- each side in a process of its own


def side(pipe, name, size, args):
    """Sends (loss, gradients) of the first batch; then, for each number it receives, seconds per step of so many."""
    config = config_of(size)
    params = model.init(config, 0)
    tokens, targets = np.random.default_rng(0).integers(config.vocab_size, size=(2, args.batch, CONTEXT))
    with train.thread_pool(args.threads) if name == "ours" else nullcontext() as pool:
        if name == "ours":
            pipe.send(train.gradient(params, config, tokens, targets, args.micro_batch, pool.map))
            step = ours(params, config, tokens, targets, args.micro_batch, pool)
        else:
            torch.set_num_threads(args.threads)
            network = Llama(config)
            network.load_state_dict({name: torch.tensor(w) for name, w in params.items()})
            loss = network(torch.tensor(tokens), torch.tensor(targets))
            loss.backward()
            pipe.send((loss.item(), {name: w.grad.numpy() for name, w in network.named_parameters()}))
            step = theirs(network, tokens, targets, compiled=name == "torch.compile")
        while count := pipe.recv():
            start = time.perf_counter()
            for _ in range(count):
                step()
            pipe.send((time.perf_counter() - start) / count)


def largest_difference(one, other):
    """Of the losses and of each weight's gradient, relative to its largest entry."""
    (loss, grads), (other_loss, other_grads) = one, other
    worst = max(np.abs(grads[name] - g).max() / np.abs(g).max() for name, g in other_grads.items())
    return max(worst, abs(loss / other_loss - 1))


def compare(size, args):
    """Alternates the sides and prints a line."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in ["ours", "torch"] + ["torch.compile"] * args.compile:
        pipes[name], theirs_end = context.Pipe()
        processes.append(context.Process(target=side, args=(theirs_end, name, size, args)))
        processes[-1].start()
    first = {name: pipe.recv() for name, pipe in pipes.items()}
    difference = largest_difference(first["ours"], first["torch"])
    if difference > 1e-3:
        sys.exit(f"{size} M: the two sides differ by {difference:.1e} in a gradient, so times say nothing")

    def turn(name, count):
        pipes[name].send(count)
        return pipes[name].recv()

    counts = {}
    for name in pipes:
        turn(name, 1)  # warm up, and compile
        counts[name] = max(1, round(args.seconds / turn(name, 1)))
    times = {name: [] for name in pipes}
    for i in range(args.turns):
        for name in sorted(pipes, reverse=i % 2):
            times[name].append(turn(name, counts[name]))
    parameters = sum(g.size for g in first["ours"][1].values()) / 1e6
    line = [f"{parameters:5.2f} M parameters, largest difference {difference:.0e}"]
    for name, each in times.items():
        speed = f"{name} {args.batch * CONTEXT / statistics.median(each):,.0f} tokens/s"
        if name != "ours":
            ratio = statistics.median(t / o for t, o in zip(each, times["ours"]))
            speed += f" (ours is {ratio:.2f} times as fast)"
        line.append(speed)
    print(" | ".join(line), flush=True)
    for pipe in pipes.values():
        pipe.send(0)
    for process in processes:
        process.join()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--batch", type=int, default=16, help="sequences of 256 tokens")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences that one of our threads takes at a time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of either side")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long a turn takes")
    parser.add_argument("--compile", action="store_true", help="also torch.compile")
    args = parser.parse_args()
    for size in args.sizes:
        compare(size, args)


if __name__ == "__main__":
    main()
