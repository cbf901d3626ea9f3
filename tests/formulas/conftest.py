"""What the tests of formulas share."""

import pytest

from minigemma.definition import formulas_only


@pytest.fixture(params=["numpy", "numba"])
def backend(request):
    """The test runs twice: on definitions, and on kernels."""
    with formulas_only(request.param == "numpy"):
        yield request.param
