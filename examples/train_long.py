"""Train a small language model on one long text that several processes share.

    pip install -e '.[examples]'
    torchrun --nproc-per-node 2 examples/train_long.py

Each process holds a part of the sequence. The losses are those of one process, which `python examples/train_long.py`
shows. A run that was stopped or killed goes on from its newest checkpoint with `--resume`, also on another number of
processes.

The text is Python's own language reference, byte by byte. Every step sees a sequence of --length bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.nn.functional as F
from example_utils import make_folder, positive_float, positive_int, progress_bar, quick_option
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fused_attn import alibi_bias
from fused_attn.distributed import context_parallel_attention, shard_sequence

WIDTH, HEADS, LAYERS, BYTES = 128, 4, 2, 256


class Block(nn.Module):
    """A pre-norm Transformer layer, whose attention sees the rows of all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.in_proj, self.out_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, bias: Tensor, mesh: DeviceMesh, length: int, dropout_seed: int) -> Tensor:
        """(N, rows of this rank, WIDTH) -> the same shape. bias: ALiBi of the whole sequence; length: its rows."""
        projected = self.in_proj(self.norms[0](x)).unflatten(2, (3, HEADS, WIDTH // HEADS))
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # each (N, HEADS, rows, WIDTH / HEADS)
        out = context_parallel_attention(
            query, key, value, mesh=mesh, seqlens=(length, length), is_causal=True, relative_bias=bias,
            dropout_p=0.1 if self.training else 0.0, dropout_seed=dropout_seed,
        )  # fmt: skip
        x = x + self.out_proj(out.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norms[1](x))


class LanguageModel(nn.Module):
    """Predicts each byte from those before it.

    length: the rows of a whole sequence
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        slopes = 2.0 ** (-8.0 * torch.arange(1, HEADS + 1) / HEADS)  # those of the ALiBi paper
        self.length = length
        self.register_buffer("bias", alibi_bias(slopes, length, length), persistent=False)
        self.embedding = nn.Embedding(BYTES, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, BYTES)

    def forward(self, tokens: Tensor, mesh: DeviceMesh, step: int) -> Tensor:
        """Logits (N, rows of this rank, BYTES) of the bytes (N, rows of this rank)."""
        x = self.embedding(tokens)
        for number, block in enumerate(self.blocks):
            x = block(x, self.bias, mesh, self.length, dropout_seed=step * LAYERS + number)
        return self.head(self.norm(x))


def load_text() -> Tensor:
    """All bytes of the text, (bytes,) uint8."""
    return torch.frombuffer(bytearray("\n".join(topics[name] for name in sorted(topics)).encode()), dtype=torch.uint8)


def loss_of(model: LanguageModel, mesh: DeviceMesh, text: Tensor, step: int) -> Tensor:
    """The part of this rank of the mean loss of a step. The sum over all ranks is the mean."""
    start = step * model.length
    positions = torch.arange(start, start + model.length + 1, device=text.device) % len(text)
    tokens = text[positions].long()[None]
    inputs, targets = (shard_sequence(x, mesh, 1) for x in (tokens[:, :-1], tokens[:, 1:]))
    logits = model(inputs, mesh, step)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / model.length


def train(args: argparse.Namespace) -> list[float]:
    """The loss of every step, also of those before a checkpoint."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    is_first = dist.get_rank() == 0
    torch.manual_seed(0)  # the same weights on every rank
    model, text = LanguageModel(args.length).to(device), load_text().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate)
    checkpoint, losses = args.output / "long.pt", []
    if args.resume:
        saved = torch.load(checkpoint, map_location=device)
        for name, value in saved.get("settings", {}).items():  # older checkpoints have none
            if getattr(args, name) != value:
                raise SystemExit(f"--{name}: expected {value}, as in {checkpoint}, got {getattr(args, name)}")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses = saved["losses"]
    bar = progress_bar() if is_first else contextlib.nullcontext()
    with bar:
        task = bar.add_task("", total=args.steps, completed=len(losses), text="") if is_first else None
        for step in range(len(losses), args.steps):
            loss = loss_of(model, mesh, text, step)
            optimizer.zero_grad()
            loss.backward()
            loss = loss.detach()
            for x in (loss, *(parameter.grad for parameter in model.parameters())):
                dist.all_reduce(x)
            optimizer.step()
            losses.append(loss.item())
            if is_first:
                bar.update(task, completed=step + 1, text=f"step {step + 1}  loss {losses[-1]:.4f}")
                if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
                    state["settings"] = {"length": args.length, "rate": args.rate}
                    # The file is complete at every moment, also if the process ends while it writes.
                    torch.save(state, checkpoint.with_suffix(".new"))
                    checkpoint.with_suffix(".new").replace(checkpoint)
    return losses


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=positive_int, default=8192, help="bytes of a sequence (%(default)s)")
    parser.add_argument("--steps", type=positive_int, default=200, help="steps of the whole training (%(default)s)")
    parser.add_argument("--rate", type=positive_float, default=1e-3, help="learning rate (%(default)s)")
    parser.add_argument("--save-every", type=positive_int, default=10, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--quick", **quick_option(length=1024, steps=10))
    parser.add_argument(
        "--output", type=Path, default=Path("runs/long"), help="folder for the checkpoint (%(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[float]:
    args = arguments(argv)
    if args.resume and not (args.output / "long.pt").exists():
        raise SystemExit(f"--resume: {args.output / 'long.pt'} does not exist; train first, without --resume")
    make_folder(args.output)
    is_alone = "RANK" not in os.environ  # started without torchrun
    if is_alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group()
    try:
        losses = train(args)
        if dist.get_rank() == 0:
            print(f"loss {losses[-1]:.4f} after {len(losses)} steps")
            print(f"checkpoint: {args.output / 'long.pt'}")
        return losses
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
