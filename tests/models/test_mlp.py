from __future__ import annotations

import pytest
import torch

from simplexfix.models import FeatureMLP


def test_layers_have_the_given_widths() -> None:
    features = torch.randn(5, 7)
    same = FeatureMLP(7)
    assert same.out_features == 7
    assert torch.equal(same(features), features)
    assert not list(same.parameters())
    deep = FeatureMLP(7, (9, 4))
    assert deep.out_features == 4
    expected = features
    for i in (0, 3):
        expected = torch.relu(torch.nn.functional.batch_norm(deep.layers[i](expected), None, None, training=True))
    torch.testing.assert_close(deep(features), expected)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"in_features and hidden must be positive, got 3 and \[0\]"):
        FeatureMLP(3, (0,))
