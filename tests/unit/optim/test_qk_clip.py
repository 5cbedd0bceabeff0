"""QK clip: no tokens can have a larger logit than the limit, heads below it stay, and it is refused without scales."""

import pytest
import torch

from megachat.errors import UserError
from megachat.kernels.channel_norm import norm
from megachat.optim.qk_clip import clip_factors
from megachat.planning.dimensions import Dimensions
from megachat.planning.plan import resolve_plan
from tests.training import SMALL_VOCAB, small_config

DIMS = Dimensions(1, 96, 6, 2, 16, 160, 97, (160,))  # 3 heads share a key
LIMIT = 8.0


def scales():
    generator = torch.Generator().manual_seed(0)
    query = 1 + 0.3 * torch.randn(6, 16, generator=generator, dtype=torch.float64)
    key = 1 + 0.3 * torch.randn(2, 16, generator=generator, dtype=torch.float64)
    query[1] *= 0.5  # beside heads that are clipped
    return query, key


def test_the_bound_is_reached_by_some_tokens_and_exceeded_by_none():
    query, key = scales()
    factors = clip_factors(query, key, DIMS.largest_logit, LIMIT)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.cat((torch.randn(500, 16, generator=generator), 1e6 * torch.eye(16))).double()
    for clipped in (False, True):
        q, k = (query * factors[0], key * factors[1]) if clipped else (query, key)
        for head in range(6):
            logits = (
                1.2 * norm(tokens, DIMS.norm_epsilon, q[head]) @ (1.2 * norm(tokens, DIMS.norm_epsilon, k[head // 3])).T
            ) / 4
            bound = DIMS.largest_logit * (q[head] * k[head // 3]).abs().max().item()
            assert logits.abs().max().item() == pytest.approx(bound, rel=1e-6)
            assert bound == pytest.approx(LIMIT, rel=1e-6) if clipped and head != 1 else bound < LIMIT + 9 * (head != 1)


def test_heads_below_the_limit_keep_their_logits():
    query, key = scales()
    of_query, of_key = clip_factors(query, key, DIMS.largest_logit, LIMIT)
    product = (of_query.view(2, 3) * of_key).flatten()
    assert product[1] == pytest.approx(1, rel=1e-12) and (product[[0, 2, 3, 4, 5]] < 1).all()
    assert all((each == 1).all() for each in clip_factors(query, key, DIMS.largest_logit, 1e3))
    alone = clip_factors(query, query, DIMS.largest_logit, LIMIT)
    assert torch.allclose(*alone, rtol=1e-12) and (alone[0] <= 1).all()


@pytest.mark.parametrize("norms", [(), ("query", "mlp"), ("key",)])
def test_it_is_refused_where_it_could_change_nothing(norms):
    config = small_config(model={"norm_scales": norms}, optimizer={"qk_clip": 9.0})
    with pytest.raises(UserError, match=r"optimizer.qk_clip is 9.*no attention logit exceeds .* = 5.76.*norm_scales"):
        resolve_plan(config, 1, SMALL_VOCAB)
