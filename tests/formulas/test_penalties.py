"""Penalties against a loop over the tokens, and against transformers' own processors."""

import numpy as np
import pytest

from minigemma.formulas.penalties import frequency_penalty, logit_bias, presence_penalty, repetition_penalty

IDS = np.array([3, 5, 3, 0, 3, 99], np.int32)  # 99 is an image's token: it has no logit
LOGITS = np.array([-2.0, 1, 0, 4, 5, -0.5, 0.25, 7], np.float32)


def test_each_penalty_is_its_equation():
    count = [1, 0, 0, 3, 0, 1, 0, 0]
    repeated = [z if not c else z / 1.5 if z > 0 else z * 1.5 for z, c in zip(LOGITS, count, strict=True)]
    often = [z - 0.5 * c for z, c in zip(LOGITS, count, strict=True)]
    once = [z - 0.5 * (c > 0) for z, c in zip(LOGITS, count, strict=True)]
    np.testing.assert_allclose(repetition_penalty(LOGITS.copy(), IDS, 1.5), repeated, rtol=1e-6)
    np.testing.assert_array_equal(frequency_penalty(LOGITS.copy(), IDS, 0.5), np.float32(often))
    np.testing.assert_array_equal(presence_penalty(LOGITS.copy(), IDS, 0.5), np.float32(once))
    biased = logit_bias(LOGITS.copy(), {1: 2.5, 7: -np.inf})
    np.testing.assert_array_equal(biased, [-2, 3.5, 0, 4, 5, -0.5, 0.25, -np.inf])


def test_no_ids_change_nothing():
    for penalty in (repetition_penalty, frequency_penalty, presence_penalty):
        np.testing.assert_array_equal(penalty(LOGITS.copy(), IDS[:0], 2.0), LOGITS)


@pytest.mark.oracle
def test_the_repetition_penalty_is_that_of_transformers():
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([IDS[:5].tolist()]), torch.tensor(LOGITS)[None])
    np.testing.assert_array_equal(repetition_penalty(LOGITS.copy(), IDS, 1.3), theirs[0].numpy())
