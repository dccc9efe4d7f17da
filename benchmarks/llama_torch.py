"""The model of train_step.py in PyTorch, as a function of weights by their published names, and its training step."""

import torch
import torch.nn.functional as F


def llama(config, time, device):
    """Returns loss(w, tokens, targets): the mean cross-entropy by the weights w; tokens, targets (batch, time)."""
    dim, eps = config.hidden_size // config.num_attention_heads, config.rms_norm_eps
    angle = torch.outer(torch.arange(time), config.rope_theta ** (-torch.arange(0, dim, 2) / dim)).repeat(1, 2)
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    split = lambda y: y.unflatten(-1, (-1, dim)).transpose(1, 2)
    rotate = lambda y: y * cos + torch.cat([-y[..., dim // 2 :], y[..., : dim // 2]], -1) * sin

    def loss(w, tokens, targets):
        norm = lambda x, name: F.rms_norm(x, x.shape[-1:], w[f"model.{name}.weight"], eps)
        project = lambda x, name: F.linear(x, w[f"model.layers.{name}_proj.weight"])
        x = F.embedding(tokens, w["model.embed_tokens.weight"])
        for i in range(config.num_hidden_layers):
            h = norm(x, f"layers.{i}.input_layernorm")
            q, k, v = (split(project(h, f"{i}.self_attn.{name}")) for name in "qkv")
            y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
            x = x + project(y.transpose(1, 2).flatten(2), f"{i}.self_attn.o")
            h = norm(x, f"layers.{i}.post_attention_layernorm")
            x = x + project(F.silu(project(h, f"{i}.mlp.gate")) * project(h, f"{i}.mlp.up"), f"{i}.mlp.down")
        logits = F.linear(norm(x, "norm"), w["model.embed_tokens.weight"])
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return loss


def gradient_and_update(params, config, tokens, targets, threads, compiled, lr, betas, eps, decay, clip, device, tf32):
    """gradient() -> (loss, {name: tensor}), and update(), which changes the weights made of params by that gradient."""
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    weights = {name: torch.tensor(w, requires_grad=True, device=device) for name, w in params.items()}
    tokens, targets = torch.tensor(tokens, device=device), torch.tensor(targets, device=device)
    loss_of = llama(config, tokens.shape[1], device)
    loss_of = torch.compile(loss_of) if compiled else loss_of
    matrices, norms = ([w for w in weights.values() if (w.ndim > 1) == big] for big in (True, False))
    groups = [{"params": matrices, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr, betas, eps, fused=True)

    def gradient():
        adamw.zero_grad(set_to_none=True)
        loss = loss_of(weights, tokens, targets)
        loss.backward()
        return loss.item(), {name: w.grad for name, w in weights.items()}

    def update(_):
        torch.nn.utils.clip_grad_norm_(weights.values(), clip)
        adamw.step()

    return gradient, update
