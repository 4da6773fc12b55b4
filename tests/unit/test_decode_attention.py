"""Attention over shared prompts and own tokens, compared with each row alone."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from app.engines.transformers.cache_layers import ContextLayer
from app.engines.transformers.decode_attention import ContextKeys, SharedKeys, decode_attention
from app.engines.transformers.shared_cache import places_of_rows

SHARED, REPEATS, WIDTH, WRITTEN = 2, 3, 4, 5
CONTEXT_OF_ROW = np.array([1, 0, 2, 1, 1, 0])
WITHIN = np.array([0, 0, 0, 1, 2, 1])


def states(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def alone(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return one row's output `[heads, WIDTH]`: attention of `[heads, WIDTH]` over `[heads, seen, WIDTH]`."""
    weights = (torch.einsum("hd,htd->ht", query, key) * scale).softmax(1)
    return torch.einsum("ht,htd->hd", weights, value)


@pytest.mark.parametrize("masked", [False, True])
def test_rows_attend_to_their_context_and_to_themselves(masked: bool) -> None:
    torch.manual_seed(0)
    n, longest = len(CONTEXT_OF_ROW), 7
    lengths = np.array([7, 3, 5, 6]) if masked else np.full(4, longest)  # nobody reads the last one
    unwritten = np.array([0, 3, 0, 4, 1, 0]) if masked else np.zeros(n, dtype=int)
    read_keys, read_values = states(2, 4, SHARED, longest, WIDTH)
    key, value = states(2, n, SHARED, WRITTEN, WIDTH)
    query = states(n, SHARED * REPEATS, 1, WIDTH)
    seen = np.concatenate(
        [np.arange(longest) < lengths[CONTEXT_OF_ROW][:, None], np.arange(WRITTEN) >= unwritten[:, None]], axis=1
    )
    bias = torch.from_numpy(np.where(seen, 0.0, -np.inf)[:, None]) if masked else None
    rows, places = places_of_rows(CONTEXT_OF_ROW, WITHIN, SHARED, 4)
    layout = SharedKeys([read_keys], [read_values], torch.from_numpy(rows), torch.from_numpy(places), bias)
    output = layout.attend(0, query, key, value, scale=0.3)
    for row, context in enumerate(CONTEXT_OF_ROW):
        both = (
            torch.cat([read[context], written[row]], dim=1)[:, seen[row]].repeat_interleave(REPEATS, 0)
            for read, written in ((read_keys, key), (read_values, value))
        )
        torch.testing.assert_close(output[row, 0], alone(query[row, :, 0], *both, scale=0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("places", [[2, 0], [1, 2], [3]])
def test_tokens_attend_to_their_context_up_to_themselves(places: list[int]) -> None:
    """The last three tokens of contexts of unlike lengths, whose keys and values are written on the way."""
    torch.manual_seed(0)
    new, columns, lengths = 3, 9, np.array([9, 3, 7, 8])[places]
    held = states(2, 4, SHARED, columns, WIDTH)
    prefilled = DynamicLayer()
    prefilled.update(*held)
    layer = ContextLayer(4, prefilled)
    layer.admit(prefilled, 0, np.full(4, columns))
    positions = lengths[:, None] - new + np.arange(new)
    layout = ContextKeys([layer], np.array(places), positions)
    query = states(len(places), SHARED * REPEATS, new, WIDTH)
    key, value = states(2, len(places), SHARED, new, WIDTH)
    layout.past.update(key, value, 0)
    output = layout.attend(0, query, key, value, scale=0.3)
    for row, (place, length) in enumerate(zip(places, lengths, strict=True)):
        both = [
            torch.cat([one[place, :, : length - new], its[row]], dim=1).repeat_interleave(REPEATS, 0)
            for one, its in zip(held, (key, value), strict=True)
        ]
        for token in range(new):
            seen = (one[:, : length - new + token + 1] for one in both)
            expected = alone(query[row, :, token], *seen, scale=0.3)
            torch.testing.assert_close(output[row, token], expected, rtol=1e-12, atol=1e-12)
    untouched = [place for place in range(4) if place not in places]
    assert torch.equal(layer.keys[untouched], held[0][untouched])


def test_a_context_keeps_its_columns_when_it_grows_and_moves() -> None:
    prefilled = DynamicLayer()
    left_padded = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]).view(2, 1, 3, 1)
    prefilled.update(left_padded, -left_padded)
    layer = ContextLayer(3, prefilled)
    layer.admit(prefilled, 1, np.array([2, 3]))
    layer.fit(5)
    layer.write(torch.tensor([1]), torch.tensor([[2, 3]]), *2 * [torch.tensor([8.0, 9.0]).view(1, 1, 2, 1)])
    layer.copy(torch.tensor([0]), torch.tensor([2]), 3)
    assert layer.keys[:, 0, :, 0].tolist() == [[3, 4, 5, 0, 0], [1, 2, 8, 9, 0], [3, 4, 5, 0, 0]]
    assert layer.values[:, 0, :, 0].tolist() == [[-3, -4, -5, 0, 0], [-1, -2, 8, 9, 0], [-3, -4, -5, 0, 0]]


def test_places_by_hand() -> None:
    # Context 0 has rows 1 and 2, context 1 has row 0 and a place that repeats it; two heads. Nobody reads the last.
    rows, places = places_of_rows(np.array([1, 0, 0]), np.array([0, 0, 1]), heads=2, contexts=3)
    assert rows.reshape(3, 2, 2).tolist() == [[[2, 4], [3, 5]], [[0, 0], [1, 0]], [[0, 0], [0, 0]]]
    assert places.reshape(3, 2).tolist() == [[4, 6], [0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("wanted", "given"),
    [("layout is missing", {}), ("softcap is not supported", {"layout": object(), "softcap": 30.0})],
)
def test_what_it_does_not_do_is_refused(wanted: str, given: dict[str, object]) -> None:
    query = states(1, 1, 1, WIDTH)
    with pytest.raises(ValueError, match=rf"Linear: {wanted}; set .*share_prompts to false"):
        decode_attention(torch.nn.Linear(1, 1), query, query, query, None, **given)  # type: ignore[arg-type]
