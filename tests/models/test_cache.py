import pytest
import torch

from neuralforge.models import build
from neuralforge.models.cache import KeyValueCache


@pytest.mark.parametrize("parts", [[1] * 24, [24], [10, 1, 1, 5, 7], [1, 23]])
def test_a_sequence_in_parts_is_the_sequence(config, parts):
    model = build(config).double().eval()
    tokens = torch.randint(0, 97, (3, 24), generator=torch.Generator().manual_seed(0))
    cache = KeyValueCache(24)
    logits = torch.cat([model(part, cache) for part in tokens.split(parts, dim=1)], dim=1)
    assert cache.length == 24
    torch.testing.assert_close(logits, model(tokens), rtol=1e-11, atol=1e-13)
