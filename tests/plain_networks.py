"""State dicts by the exact names of plain DiT, SiT and JiT checkpoints, and these networks as functions of them."""

import math

import torch
import torch.nn.functional as F


def dit_state(
    width=32, depth=2, patch=2, channels=4, rows=5, times=0, outputs=None, head="final_layer", tokens=16, device="cpu"
) -> dict:
    """Of a DiT or SiT, a discriminator (`head="dis_embed"`) or a classifier (`"cls_embed"`)."""
    random, linear = _makers(device)
    state = {"pos_embed": random(1, tokens, width)}
    state |= {"x_embedder.proj.weight": random(width, channels, patch, patch), "x_embedder.proj.bias": random(width)}
    for embedder in ("t_embedder", "t_tgt_embedder")[:times]:
        state |= linear(f"{embedder}.mlp.0", width, 256) | linear(f"{embedder}.mlp.2", width, width)
    if head != "cls_embed":
        state["y_embedder.embedding_table.weight"] = random(rows, width)
    for i in range(depth):
        block = f"blocks.{i}"
        state |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(f"{block}.attn.proj", width, width)
        state |= linear(f"{block}.mlp.fc1", 4 * width, width) | linear(f"{block}.mlp.fc2", width, 4 * width)
        state |= linear(f"{block}.adaLN_modulation.1", 6 * width, width)
    if head == "final_layer":
        state |= linear("final_layer.linear", patch**2 * (outputs or channels), width)
        return state | linear("final_layer.adaLN_modulation.1", 2 * width, width)
    state[head] = random(width)
    return state | linear("final_layer.1", rows if head == "cls_embed" else 1, width, bias=head == "cls_embed")


def jit_state(
    width=32, depth=3, heads=2, patch=2, rows=6, bottleneck=8, context=3, tokens=16, discriminator=False, device="cpu"
) -> dict:
    random, linear = _makers(device)
    inner = int(4 * width * 2 / 3)
    state = {"pos_embed": random(1, tokens, width), "in_context_posemb": random(1, context, width)}
    state |= {"x_embedder.proj1.weight": random(bottleneck, 3, patch, patch)}
    state |= {"x_embedder.proj2.weight": random(width, bottleneck, 1, 1), "x_embedder.proj2.bias": random(width)}
    state |= {"y_embedder.embedding_table.weight": random(rows, width)}
    state |= linear("t_embedder.mlp.0", width, 256) | linear("t_embedder.mlp.2", width, width)
    for i in range(depth):
        block = f"blocks.{i}"
        state |= {f"{block}.{norm}.weight": random(width) + 1 for norm in ("norm1", "norm2")}
        state |= {f"{block}.attn.{norm}.weight": random(width // heads) + 1 for norm in ("q_norm", "k_norm")}
        state |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(f"{block}.attn.proj", width, width)
        state |= linear(f"{block}.mlp.w12", 2 * inner, width) | linear(f"{block}.mlp.w3", width, inner)
        state |= linear(f"{block}.adaLN_modulation.1", 6 * width, width)
    if discriminator:
        return state | linear("proj_out.1", 1, width)
    state["final_layer.norm_final.weight"] = random(width) + 1
    state |= linear("final_layer.linear", patch**2 * 3, width)
    return state | linear("final_layer.adaLN_modulation.1", 2 * width, width)


def _makers(device: str):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        if device == "meta":
            return torch.empty(shape, device="meta")
        return torch.randn(shape, generator=generator) * 0.1

    def linear(name, rows, columns, bias=True):
        return {f"{name}.weight": random(rows, columns)} | ({f"{name}.bias": random(rows)} if bias else {})

    return random, linear


def _linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def _time(state, name, t):
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    hidden = _linear(state, f"{name}.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1))
    return _linear(state, f"{name}.mlp.2", F.silu(hidden))


def _attention(state, block, x, heads, change=lambda q, k: (q, k)):
    q, k, v = _linear(state, f"{block}.attn.qkv", x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = change(q, k)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
    return _linear(state, f"{block}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))


def _rms(x, weight=None, eps=1e-6):
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight


def _unpatchify(x, patch, channels):
    grid = math.isqrt(x.shape[1])
    x = x.reshape(len(x), grid, grid, patch, patch, channels)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), channels, grid * patch, grid * patch)


def plain_dit(state, x, c, heads, norm=lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-6)):
    """A DiT or SiT at the conditioning c, the sum of its embeddings; logits of a discriminator or classifier."""
    weight = state["x_embedder.proj.weight"]
    patch, depth = weight.shape[-1], len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    x = F.conv2d(x, weight, state["x_embedder.proj.bias"], stride=patch).flatten(2).transpose(1, 2)
    x = x + state["pos_embed"]
    head = next((name for name in ("dis_embed", "cls_embed") if name in state), None)
    if head is not None:
        x = torch.cat([state[head].expand(len(x), 1, -1), x], dim=1)
    for i in range(depth):
        block = f"blocks.{i}"
        chunks = _linear(state, f"{block}.adaLN_modulation.1", F.silu(c))[:, None].chunk(6, -1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = chunks
        x = x + gate * _attention(state, block, norm(x) * (1 + scale) + shift, heads)
        hidden = _linear(state, f"{block}.mlp.fc1", norm(x) * (1 + scale_mlp) + shift_mlp)
        x = x + gate_mlp * _linear(state, f"{block}.mlp.fc2", F.gelu(hidden, approximate="tanh"))
    if head is not None:
        return _linear(state, "final_layer.1", norm(x[:, 0]))
    shift, scale = _linear(state, "final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, -1)
    x = _linear(state, "final_layer.linear", norm(x) * (1 + scale) + shift)
    return _unpatchify(x, patch, x.shape[-1] // patch**2)


def plain_jit(state, x, t, labels, heads, start):
    """A JiT at its own times (1 = data): the predicted image; or the logit of its discriminator."""
    weight = state["x_embedder.proj1.weight"]
    patch, depth = weight.shape[-1], len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    x = F.conv2d(x, weight, stride=patch)
    x = F.conv2d(x, state["x_embedder.proj2.weight"], state["x_embedder.proj2.bias"]).flatten(2).transpose(1, 2)
    x = x + state["pos_embed"]
    label = state["y_embedder.embedding_table.weight"][labels]
    c, grid = _time(state, "t_embedder", t) + label, math.isqrt(x.shape[1])
    size = state["blocks.0.attn.q_norm.weight"].shape[0]
    rates = 10000.0 ** (-torch.arange(0, size // 2, 2) / (size // 2))
    angles = torch.arange(grid)[:, None] * rates  # (grid, size / 4)
    rows = angles.repeat_interleave(2, 1)[:, None].expand(-1, grid, -1)
    columns = angles.repeat_interleave(2, 1)[None].expand(grid, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (grid^2, size)
    for i in range(depth):
        if i == start:
            x = torch.cat([label[:, None] + state["in_context_posemb"], x], dim=1)
            angles = torch.cat([torch.zeros(state["in_context_posemb"].shape[1], size), angles])
        block = f"blocks.{i}"

        def turn(h, angles=angles):
            half = torch.stack([-h[..., 1::2], h[..., ::2]], dim=-1).flatten(-2)
            return h * angles.cos() + half * angles.sin()

        def change(q, k, block=block, turn=turn):
            return tuple(turn(_rms(h, state[f"{block}.attn.{n}.weight"])) for h, n in ((q, "q_norm"), (k, "k_norm")))

        chunks = _linear(state, f"{block}.adaLN_modulation.1", F.silu(c))[:, None].chunk(6, -1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = chunks
        hidden = _rms(x, state[f"{block}.norm1.weight"]) * (1 + scale) + shift
        x = x + gate * _attention(state, block, hidden, heads, change)
        hidden = _rms(x, state[f"{block}.norm2.weight"]) * (1 + scale_mlp) + shift_mlp
        first, second = _linear(state, f"{block}.mlp.w12", hidden).chunk(2, -1)
        x = x + gate_mlp * _linear(state, f"{block}.mlp.w3", F.silu(first) * second)
    if "proj_out.1.weight" in state:
        return _linear(state, "proj_out.1", _rms(x[:, 0], eps=torch.finfo(x.dtype).eps))[:, 0]
    x = x[:, state["in_context_posemb"].shape[1] :]
    shift, scale = _linear(state, "final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, -1)
    x = _linear(state, "final_layer.linear", _rms(x, state["final_layer.norm_final.weight"]) * (1 + scale) + shift)
    return _unpatchify(x, patch, 3)


def embed(state, labels=None, **times):
    """The conditioning of a DiT: its class embedding and the embeddings of the (scaled) times."""
    c = torch.zeros(1, state["pos_embed"].shape[-1]) if labels is None else None
    c = state["y_embedder.embedding_table.weight"][labels] if c is None else c
    return c + sum(_time(state, name, t) for name, t in times.items())
