"""Expert dropout: in training, hidden units of experts that are left out for a token (2101.03961
§2.4), whichever rank computes them.

Which ones is drawn by a key of the token, which travels with its row: as columns that hold a byte
each, a number that every dtype can hold. All experts of a token leave out the same units.

Shape suffixes: T tokens, D model width, F expert hidden width, Y columns of a key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.keyed import fold

KEY_COLUMNS = 8
LEVELS = 1 << 16
"""Chances are multiples of one over this: a hash decides about four units."""


def with_keys(x_TD: Tensor, key_T: Tensor) -> Tensor:
    """Tokens with the columns of their keys (int64) after them: (T, D + Y)."""
    shift_Y = 8 * torch.arange(KEY_COLUMNS, device=key_T.device)
    byte_TY = (key_T[:, None] >> shift_Y) & 0xFF
    return torch.cat([x_TD, byte_TY.to(x_TD.dtype)], dim=1)


def split_keys(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., D + Y) as they were (..., D), and the key of each, int64 (...)."""
    rows, byte_Y = rows.split([rows.shape[-1] - KEY_COLUMNS, KEY_COLUMNS], dim=-1)
    shift_Y = 8 * torch.arange(KEY_COLUMNS, device=rows.device)
    # The sum of bytes at different places is their union, and wraps around as the key did.
    return rows.contiguous(), (byte_Y.detach().to(torch.int64) << shift_Y).sum(dim=-1)


def drop_units(hidden: Tensor, key: Tensor, share: float) -> Tensor:
    """The hidden units (..., F) of rows with such keys (...), `share` of them 0 and the others
    scaled, so that the mean stays as it is."""
    least = round(share * LEVELS)
    drawn = fold(key[..., None], torch.arange(-(-hidden.shape[-1] // 4), device=key.device))
    stays = torch.empty_like(hidden, dtype=torch.bool)
    for place in range(4):  # one quarter of the hash after the other, to hold few of them at a time
        quarter = stays[..., place::4]
        quarter.copy_(((drawn >> 16 * place) & (LEVELS - 1))[..., : quarter.shape[-1]] >= least)
    return hidden.where(stays, 0) * (LEVELS / (LEVELS - least))
