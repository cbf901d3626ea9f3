"""What `@definition` promises: which of formula and kernel runs, and what may be registered."""

import pytest

from minigemma.definition import DEFINITIONS, definition, formulas_only, runs_formulas


@pytest.fixture
def scaled():
    @definition
    def scaled(x, factor):
        """x · factor"""
        return ("formula", x * factor)

    yield scaled
    del DEFINITIONS["scaled"]


def test_a_definition_without_kernel_runs_its_formula(scaled):
    assert scaled(3, factor=2) == ("formula", 6)
    assert scaled.__name__ == "scaled" and scaled.__doc__ == "x · factor" and DEFINITIONS["scaled"] is scaled


def test_the_kernel_runs_unless_formulas_only(scaled):
    scaled.kernel(lambda x, factor: ("kernel", x * factor))
    assert scaled(3, 2) == ("kernel", 6)
    with formulas_only(False):
        assert scaled(3, 2) == ("kernel", 6) and not runs_formulas()
    with formulas_only():
        assert scaled(3, 2) == ("formula", 6) and runs_formulas()
        with formulas_only(False):
            assert scaled(3, 2) == ("formula", 6)


def test_the_formula_runs_where_the_kernel_returns_not_implemented(scaled):
    scaled.kernel(lambda x, factor: NotImplemented if x > 16 else ("kernel", x * factor))
    assert scaled(16, 2) == ("kernel", 32) and scaled(17, 2) == ("formula", 34)


def test_a_gradient_is_kept_and_takes_dy_before_the_arguments(scaled):
    @scaled.gradient
    def scaled_gradient(dy, x, factor):
        return dy * factor

    assert scaled.backward is scaled_gradient and scaled_gradient(1.0, 3, 2) == 2
    for other in (lambda x, factor: 0, lambda dy, x: 0, lambda dy, factor, x: 0, lambda y, x, factor: 0):
        with pytest.raises(TypeError, match="gradient of scaled"):
            scaled.gradient(other)
    scaled.gradient(lambda dh, dlast, x, factor: 0)  # of two results
