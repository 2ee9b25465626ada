"""The effective rank of features."""

from __future__ import annotations

import numpy as np
import pytest

from mmmilan.evaluation.probes import rankme


def test_rankme():
    rng = np.random.default_rng(0)
    orthogonal = np.linalg.qr(rng.standard_normal((100, 8)))[0]
    assert rankme(orthogonal) == pytest.approx(8, abs=1e-2)
    assert rankme(np.outer(rng.random(100), rng.random(8))) == pytest.approx(1, abs=1e-2)
    assert 1 < rankme(orthogonal * np.array([5, 5, 5, 1, 1, 1, 1, 1])) < 8
