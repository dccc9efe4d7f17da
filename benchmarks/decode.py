"""Greedy decoding at batch 1 of a checkpoint folder, against transformers, both in float32 with a KV cache.

    python benchmarks/decode.py FOLDER [--prompt TEXT] [--tokens 64] [--turns 7]

Each side runs in a process of its own, and the two have to choose the same tokens. They take turns, and the ratio of
a turn is transformers' time over ours, prompt included: above 1, ours is faster.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import model

try:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError:
    print("Skipped: transformers and PyTorch are not installed (pip install -r benchmarks/requirements.txt).")
    sys.exit()


def prompt_of(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer(text)["input_ids"]


def side(pipe, name, args):
    """For each True it receives, sends the tokens it chose and the seconds it took."""
    prompt = prompt_of(args.folder, args.prompt)
    if name == "ours":
        params, config = model.load(args.folder)
        answer = lambda: list(model.generate(params, config, prompt, max_new_tokens=args.tokens, stop=[]))
    else:
        network = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
        network.generation_config.eos_token_id = None  # a fixed number of tokens
        ids = torch.tensor([prompt])
        generate = lambda: network.generate(ids, max_new_tokens=args.tokens, do_sample=False)
        answer = lambda: generate()[0, len(prompt) :].tolist()
    while pipe.recv():
        start = time.perf_counter()
        tokens = answer()
        pipe.send((tokens, time.perf_counter() - start))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in "ours", "transformers":
        pipes[name], far_end = context.Pipe()
        context.Process(target=side, args=(far_end, name, args), daemon=True).start()

    def turn(name):
        pipes[name].send(True)
        return pipes[name].recv()

    if turn("ours")[0] != turn("transformers")[0]:
        sys.exit("the two sides choose different tokens, so times say nothing")
    times = {name: [] for name in pipes}
    for i in range(args.turns):
        for name in sorted(pipes, reverse=i % 2):
            times[name].append(turn(name)[1])
    ratio = statistics.median(t / o for t, o in zip(times["transformers"], times["ours"]))
    speed = {name: args.tokens / statistics.median(each) for name, each in times.items()}
    print(
        f"the same {args.tokens} tokens: ours {speed['ours']:.1f} tokens/s, "
        f"transformers {speed['transformers']:.1f} tokens/s, {ratio:.2f} times as fast"
    )


if __name__ == "__main__":
    main()
