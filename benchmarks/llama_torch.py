"""The model of train_step.py in PyTorch, its weights under the published names, and its training step."""

import torch
import torch.nn.functional as F
from torch import nn


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
        dim, time = config.hidden_size // config.num_attention_heads, config.max_position_embeddings
        angle = torch.outer(torch.arange(time), config.rope_theta ** (-torch.arange(0, dim, 2) / dim)).repeat(1, 2)
        self.cos, self.sin = angle.cos(), angle.sin()

    def forward(self, tokens, targets):
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.model.norm(x), self.model.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gradient_and_step(params, config, tokens, targets, threads, compiled, lr, betas, eps, decay, clip):
    """gradient() -> (loss, {name: array}), and step(), which trains the network made of params and returns the loss."""
    torch.set_num_threads(threads)
    network = Llama(config)
    network.load_state_dict({name: torch.tensor(w) for name, w in params.items()})
    tokens, targets = torch.tensor(tokens), torch.tensor(targets)
    loss_of = torch.compile(network) if compiled else network
    parameters = list(network.parameters())
    matrices, norms = ([w for w in parameters if (w.ndim > 1) == big] for big in (True, False))
    groups = [{"params": matrices, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr, betas, eps, fused=True)

    def gradient():
        adamw.zero_grad(set_to_none=True)
        loss = loss_of(tokens, targets)
        loss.backward()
        return loss.item(), {name: w.grad.numpy() for name, w in network.named_parameters()}

    def step():
        adamw.zero_grad(set_to_none=True)
        loss = loss_of(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        adamw.step()
        return loss.item()

    return gradient, step
