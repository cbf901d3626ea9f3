"""GeGLU: known points, definition and kernel."""

import numpy as np
import pytest

from minigemma.formulas.geglu import gated_gelu

pytestmark = pytest.mark.usefixtures("backend")


def test_gelu_at_known_points():
    z = np.array([[0.0, 1.0, -1.0, 3.0, 50.0, -50.0]], np.float32)
    y = gated_gelu(z, np.full_like(z, 2))[0]
    np.testing.assert_allclose(y, [0, 2 * 0.841192, 2 * -0.158808, 2 * 2.996363, 100, 0], atol=2e-6)
