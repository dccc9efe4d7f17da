"""The command line of checkpoint.py: a model for llama.cpp."""

import os
from dataclasses import dataclass

import bpe
import checkpoint
import posenc
from engine import chat_template, cli, gguf_file
from engine.cli import option


@dataclass(frozen=True)
class Settings:
    """What is written, and how."""

    folder: str | None = option(None, "checkpoint folder", metavar="DIR", positional=True)
    gguf: str | None = option(None, "the file to write, which llama.cpp reads", metavar="FILE")
    type: str = option("f32", "format of the matrices", choices=list(gguf_file.TYPES))


def main(argv=None):
    s = cli.settings(Settings, argv, "Write a model folder as the one file that llama.cpp reads.")
    if s.gguf is None:
        raise ValueError("name the file to write: --gguf FILE")
    params, config = checkpoint.load(s.folder)
    tokenizer = bpe.load(os.path.join(s.folder, "tokenizer.json"))
    template = chat_template.published(s.folder)
    speeds, factor = posenc.rope_frequencies(
        config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings
    )
    stretch = posenc.pair_frequencies(config.head_dim, config.rope_theta) / speeds
    gguf_file.write(s.gguf, params, config, tokenizer, template and template.source, (stretch, factor), s.type)
    print(f"{s.gguf}: {os.path.getsize(s.gguf) / 2**20:,.1f} MiB")
    if told := " ".join(gguf_file.to_be_told(config)):
        print(f"llama.cpp does not read all of that file: tell it {told}")
