"""Greedy decoding at batch 1 of a checkpoint folder, against transformers, both in float32 with a KV cache.

    python benchmarks/decode.py FOLDER [--prompt TEXT] [--tokens 64] [--turns 7]

The two have to choose the same tokens. They take turns, and the ratio of a turn is transformers' time over
ours, prompt included: above 1, ours is faster.
"""

import argparse
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    text = args.prompt
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text)["input_ids"]
    network = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    network.generation_config.eos_token_id = None  # neither side stops early
    params, config = model.load(args.folder)

    def theirs():
        ids = network.generate(torch.tensor([prompt]), max_new_tokens=args.tokens, do_sample=False)
        return ids[0, len(prompt) :].tolist()

    def ours():
        answer = model.generate(params, config, prompt, max_new_tokens=args.tokens, temperature=0, stop=[])
        return [int(token) for token in answer]

    if ours() != theirs():
        sys.exit("the two sides choose different tokens, so times say nothing")
    times = {ours: [], theirs: []}
    for turn in range(args.turns):
        for side in (ours, theirs) if turn % 2 else (theirs, ours):
            # the threads of the other side's pool spin for some milliseconds before they sleep
            time.sleep(0.1)
            start = time.perf_counter()
            side()
            times[side].append(time.perf_counter() - start)
    ratio = statistics.median(t / o for t, o in zip(times[theirs], times[ours], strict=True))
    speed = lambda side: args.tokens / statistics.median(times[side])
    print(
        f"the same {args.tokens} tokens after a prompt of {len(prompt)}: ours {speed(ours):.1f} tokens/s, "
        f"transformers {speed(theirs):.1f} tokens/s, {ratio:.2f} times as fast"
    )


if __name__ == "__main__":
    main()
