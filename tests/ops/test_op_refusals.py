"""What the functional forms refuse, and that the message says which argument, what is allowed and what to do."""

import pytest
import torch

from normfuse.ops import PowerNormState, UnifiedNormState, power_norm, unified_norm

C = 4


def unified(x, **options):
    state = UnifiedNormState(*torch.ones(2, C), *torch.ones(2, 3, C), *torch.zeros(2, 1, dtype=torch.int64))
    return unified_norm(x, None, None, state, **{"training": True, **options})


def power(x, **options):
    state = PowerNormState(*torch.ones(2, C), torch.zeros(1, dtype=torch.int64))
    return power_norm(x, None, None, state, **{"training": True, **options})


MASK = torch.zeros(2, 3, dtype=torch.bool)
REFUSALS = [
    (torch.zeros(2, C, dtype=torch.int32), {}, TypeError, r"x has dtype torch.int32; allowed are .*x\.to"),
    (torch.zeros(2, C, dtype=torch.float64), {}, TypeError, r"statistics have dtype torch.float32.*double"),
    (torch.zeros(2, 5), {}, ValueError, r"\(2, 5\) has 5 channels along channel_dim=-1; expected 4.*num_feat"),
    (torch.zeros(2, C), {"channel_dim": 2}, ValueError, r"channel_dim=2 does not exist.*from -2 to 1"),
    (torch.zeros(()), {}, ValueError, r"channel_dim=-1 does not exist"),
    (torch.zeros(2, 3, C), {"pad_mask": MASK.float()}, TypeError, r"pad_mask has dtype .*pad_mask.bool\(\)"),
    (torch.zeros(2, 3, C), {"pad_mask": MASK.T}, ValueError, r"pad_mask has shape \(3, 2\); expected \(2, 3\)"),
    (torch.zeros(2, C, 3), {"pad_mask": MASK.T, "channel_dim": 1}, ValueError, r"expected \(2, 3\)"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("function", [unified, power])
@pytest.mark.parametrize(("x", "options", "error", "message"), REFUSALS)
def test_refusal(x, options, error, message, function, training):
    with pytest.raises(error, match=message):
        function(x, training=training, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_num": 3}, r"group_num=3 is not allowed with 4 channels; give a positive divisor"),
        ({"group_num": -1}, r"group_num=-1 is not allowed"),
        ({"backward": "exact"}, r"backward='exact' is unknown; give \"reference\" or \"paper\""),
    ],
)
def test_refusal_of_power_norm(options, message):
    with pytest.raises(ValueError, match=message):
        power(torch.zeros(2, C), **options)
