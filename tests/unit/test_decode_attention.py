"""Attention over shared prompts and own tokens, compared with each row alone."""

import numpy as np
import pytest
import torch
from torch import Tensor

from app.engines.transformers.decode_attention import SharedKeys, decode_attention
from app.engines.transformers.shared_cache import places_of_rows

SHARED, REPEATS, WIDTH, WRITTEN = 2, 3, 4, 5
PROMPT_OF_ROW = np.array([1, 0, 2, 1, 1, 0])
WITHIN = np.array([0, 0, 0, 1, 2, 1])


def states(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def alone(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return one row's output `[heads, WIDTH]`: attention of `[heads, WIDTH]` over `[heads, seen, WIDTH]`."""
    weights = (torch.einsum("hd,htd->ht", query, key) * scale).softmax(1)
    return torch.einsum("ht,htd->hd", weights, value)


@pytest.mark.parametrize("masked", [False, True])
def test_rows_attend_to_their_prompt_and_to_themselves(masked: bool) -> None:
    torch.manual_seed(0)
    n, longest = len(PROMPT_OF_ROW), 7
    unread = np.array([0, 4, 2]) if masked else np.zeros(3, dtype=int)  # columns on the left of each prompt
    unwritten = np.array([0, 3, 0, 4, 1, 0]) if masked else np.zeros(n, dtype=int)
    read_keys, read_values = states(2, 3, SHARED, longest, WIDTH)
    key, value = states(2, n, SHARED, WRITTEN, WIDTH)
    query = states(n, SHARED * REPEATS, 1, WIDTH)
    seen = np.concatenate(
        [np.arange(longest) >= unread[PROMPT_OF_ROW][:, None], np.arange(WRITTEN) >= unwritten[:, None]], axis=1
    )
    bias = torch.from_numpy(np.where(seen, 0.0, -np.inf)[:, None]) if masked else None
    rows, places = places_of_rows(PROMPT_OF_ROW, WITHIN, SHARED)
    layout = SharedKeys([read_keys], [read_values], torch.from_numpy(rows), torch.from_numpy(places), bias)
    output = layout.attend(0, query, key, value, scale=0.3)
    for row, prompt in enumerate(PROMPT_OF_ROW):
        both = (
            torch.cat([read[prompt], written[row]], dim=1)[:, seen[row]].repeat_interleave(REPEATS, 0)
            for read, written in ((read_keys, key), (read_values, value))
        )
        torch.testing.assert_close(output[row, 0], alone(query[row, :, 0], *both, scale=0.3), rtol=1e-12, atol=1e-12)


def test_places_by_hand() -> None:
    # Prompt 0 has rows 1 and 2, prompt 1 has row 0 and a place that repeats row 0; two heads each.
    rows, places = places_of_rows(np.array([1, 0, 0]), np.array([0, 0, 1]), heads=2)
    assert rows.reshape(2, 2, 2).tolist() == [[[2, 4], [3, 5]], [[0, 0], [1, 0]]]
    assert places.reshape(3, 2).tolist() == [[4, 6], [0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("wanted", "given"),
    [("layout is missing", {}), ("softcap is not supported", {"layout": object(), "softcap": 30.0})],
)
def test_what_it_does_not_do_is_refused(wanted: str, given: dict[str, object]) -> None:
    query = states(1, 1, 1, WIDTH)
    with pytest.raises(ValueError, match=rf"Linear: {wanted}; set .*share_prompts to false"):
        decode_attention(torch.nn.Linear(1, 1), query, query, query, None, **given)  # type: ignore[arg-type]
