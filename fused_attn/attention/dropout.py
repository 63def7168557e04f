"""Dropout whose decision for an entry (batch, head, query, key) depends on the seed and the position alone.

So every backend drops the same entries, whatever its tiles and threads are. The random numbers come from Philox4x32-7
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):

- Its key is ``(seed & 0xffffffff, seed >> 32)``.
- Its counter is ``(key_position // 8, query_position, head, batch)``.
- One call yields four words of 32 bits, which are eight numbers of 16 bits. Number ``key_position % 8`` belongs to the
  entry: the halves of the first word, the low one first, then those of the second word, and so on.

An entry survives if its number is at least ``threshold(dropout_p)``. So a probability is rounded to a multiple of
1 / 65536. Entries that survive are multiplied by 1 / (1 - the rounded probability), so that dropout changes no mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fused_attn.attention.masks import Positions
from fused_attn.attention.problem import NO_ORIGIN, DropoutOrigin

#: The largest word of 32 bits, which is also the mask that takes the low 32 bits of an integer.
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
#: The fewest with which the words pass all tests of BigCrush (table 2 of the paper). Each bit of a word then depends on
#: each bit of the key and of the counter.
_ROUNDS = 7

#: One call of Philox makes numbers for this many neighbouring keys.
GROUP = 8


def threshold(dropout_p: float) -> int:
    """The dropout_threshold: entries whose number is below this one are dropped."""
    return min(round(dropout_p * 2**16), 2**16 - 1)


def scale(dropout_p: float) -> float:
    """The factor for entries that survive. It is 0 for ``dropout_p == 1``, where one number of 65536 still survives."""
    return 0.0 if dropout_p == 1.0 else 2**16 / (2**16 - threshold(dropout_p))


def draw_seed(device: torch.device, groups: Sequence[dist.ProcessGroup] = ()) -> Tensor:
    """A seed from torch's default generator, a 0-d int64 tensor on the device. The host does not wait.

    groups: process groups that need the same seed. The first rank of each broadcasts its seed, group after group.
    """
    seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    for group in groups:
        dist.broadcast(seed, dist.get_global_rank(group, 0), group=group)
    return seed


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """A seed that `checks.check_dropout_seed` has let pass, as a 0-d int64 tensor on the device."""
    if isinstance(seed, Tensor):
        return seed.to(device)
    # torch.tensor would copy from host memory. The host would wait for the GPU, and a CUDA graph cannot capture such a
    # copy.
    return torch.full((), int(seed), dtype=torch.int64, device=device)


def keep_mask(
    seed: Tensor,
    dropout_p: float,
    batch: int,
    num_heads: int,
    rows: Positions,
    columns: Positions,
    origin: DropoutOrigin = NO_ORIGIN,
) -> Tensor:
    """(B, H, L, S) bool: True = the prob survives dropout.

    A packed problem has batch 1. There, the number of the row's sequence takes the place of the index of the batch
    entry.

    rows, columns: the positions of the queries and of the keys
    """
    device = seed.device
    # Philox makes the numbers of eight neighbouring keys. There are groups for as many keys as there are columns. Fewer
    # may be enough for packed keys, but finding the largest position would take reading it from the device.
    first_key = origin.key % GROUP
    group = torch.arange(-(-(columns.position.shape[0] + first_key) // GROUP), device=device) + origin.key // GROUP
    query = (rows.position + origin.query)[None, None, :, None]
    head = (torch.arange(num_heads, device=device) + origin.head)[None, :, None, None]
    sequence = torch.arange(batch, device=device)[:, None, None, None] + rows.sequence[None, None, :, None]
    counter = (group[None, None, None, :], query, head, sequence + origin.batch)
    found = numbers(counter, seed).flatten(-2)  # (B, H, L, groups * 8)
    return found[..., columns.position + first_key] >= threshold(dropout_p)


def numbers(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> Tensor:
    """The eight 16-bit numbers of Philox for a counter: (..., 8) int64, after the counter's broadcast shape."""
    words = torch.stack(philox(counter, seed), dim=-1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(-2)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> list[Tensor]:
    """The four 32-bit words of Philox4x32-7 for a counter, each an int64 tensor of the counter's broadcast shape.

    The dtype is int64 because torch has few operators for uint32.
    """
    words = list(torch.broadcast_tensors(*counter))
    keys = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(words[0], _MULTIPLIERS[0])
        high1, low1 = _multiply(words[2], _MULTIPLIERS[1])
        words = [high1 ^ words[1] ^ keys[0], low1, high0 ^ words[3] ^ keys[1], low0]
        keys = [(key + step) & _WORD for key, step in zip(keys, _KEY_STEPS, strict=True)]
    return words


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of the product of two 32-bit numbers.

    The multiplier is split into halves of 16 bits, because the whole product could overflow int64.
    """
    low_part = word * (multiplier & 0xFFFF)
    high_part = word * (multiplier >> 16) + (low_part >> 16)
    return high_part >> 16, ((high_part << 16) | (low_part & 0xFFFF)) & _WORD
