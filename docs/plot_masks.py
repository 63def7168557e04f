"""Draws docs/masks/*.png: the attention weights of queries and keys that are all alike, so that only the mask shows.

    pip install -e .[examples]
    python docs/plot_masks.py

Values are unit vectors, so the output of `fused_attention` is the matrix of its weights: what is drawn is what runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from fused_attn import alibi_bias, fused_attention, fused_attention_varlen, t5_relative_bias

L = S = 12


def weights(rows: int = L, columns: int = S, **options) -> Tensor:
    """(rows, columns), each row's largest weight scaled to 1; rows that see nothing are 0."""
    query, key = torch.zeros(1, 1, rows, 1), torch.zeros(1, 1, columns, 1)
    return _scaled(fused_attention(query, key, torch.eye(columns)[None, None], **options)[0, 0])


def packed_weights(lengths_q: list[int], lengths_k: list[int], **options) -> Tensor:
    cu_seqlens_q, cu_seqlens_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    query, key = torch.zeros(sum(lengths_q), 1, 1), torch.zeros(sum(lengths_k), 1, 1)
    value = torch.eye(sum(lengths_k))[:, None]
    out = fused_attention_varlen(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max(lengths_q), max(lengths_k), **options
    )
    return _scaled(out[:, 0])


def _scaled(weights: Tensor) -> Tensor:
    return weights / weights.amax(-1, keepdim=True).clamp(min=1e-9)


def pictures() -> dict[str, Tensor]:
    padding = torch.arange(S)[None] >= 8
    blocks = torch.arange(L)[:, None] // 4 >= torch.arange(S) // 4
    # A table for one head: four buckets for the keys before the query, four for those after it.
    buckets = torch.tensor([2.0, 1.0, 0.0, -1.0, 2.0, 1.5, 0.5, -1.0])[:, None]
    return {
        "none": weights(),
        "is_causal": weights(is_causal=True),
        "is_causal-rectangle": weights(6, is_causal=True),
        "lower_right": weights(6, is_causal=True, diagonal_alignment="lower_right"),
        "key_padding_mask": weights(key_padding_mask=padding),
        "is_causal-key_padding_mask": weights(is_causal=True, key_padding_mask=padding),
        "left-padding": weights(is_causal=True, key_padding_mask=padding.flip(1)),
        "window_size": weights(window_size=(3, 2)),
        "window_size-is_causal": weights(window_size=(3, -1), is_causal=True),
        "attn_mask": weights(attn_mask=blocks),
        "relative_bias-t5": weights(relative_bias=t5_relative_bias(buckets, L, S, max_distance=12)),
        "relative_bias-alibi": weights(relative_bias=alibi_bias(torch.tensor([0.3]), L, S), is_causal=True),
        "varlen": packed_weights([5, 3, 4], [5, 3, 4]),
        "varlen-is_causal": packed_weights([5, 3, 4], [5, 3, 4], is_causal=True),
        "varlen-lower_right": packed_weights([3, 1, 2], [5, 3, 4], is_causal=True, diagonal_alignment="lower_right"),
    }


def draw(picture: Tensor, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = picture.shape
    figure, axes = plt.subplots(figsize=(0.2 * columns + 0.5, 0.2 * rows + 0.5), layout="constrained")
    axes.pcolormesh(picture.numpy(), cmap="Blues", vmin=0.0, vmax=1.25, edgecolors="white", linewidth=1.0)
    axes.invert_yaxis()
    axes.set(xticks=[], yticks=[], xlabel="key", ylabel="query", aspect="equal")
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "masks", help="folder (%(default)s)")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures().items():
        draw(picture, args.output / f"{name}.png")


if __name__ == "__main__":
    main()
