"""Arguments of another type are named in a sentence, by every public function."""

import numpy as np
import pytest

import minigemma as mg


@pytest.fixture(scope="module")
def model():
    return mg.load("tiny-gemma-3")


NAMED = {
    "images": lambda m: mg.generate(m, "a", images=5),
    "progress": lambda m: mg.score(m, "a b", progress=3),
    "answers": lambda m: mg.choose(m, "a", 5),
    "max_together": lambda m: mg.generate_batch(m, ["a"], max_together=None),
    "seed": lambda m: mg.generate_batch(m, ["a"], seed=1.5),
    "max_tokens": lambda m: m.new_cache(None),
    "tokens": lambda m: m.new_cache(5).copy("all"),
    "path": lambda m: mg.load_cache(m, 3),
    "ids": lambda m: m.tokenizer.decode(1.5),
    "the argument": lambda m: m.with_weights([("blocks.0.attention.o", 1)]),
    "adapter": lambda m: mg.load("tiny-gemma-3", adapter=5),
    "data": lambda m: mg.Training("tiny-gemma-3", None, steps=1),
    "steps": lambda m: mg.Training("tiny-gemma-3", "x.txt", steps="1"),
    "lr": lambda m: mg.Training("tiny-gemma-3", "x.txt", steps=1, lr="fast"),
    "distillation": lambda m: mg.Training("tiny-gemma-3", "x.txt", steps=1, distillation="gemma-3-270m"),
    "lora": lambda m: mg.FineTuning("tiny-gemma-3", "x.txt", steps=1, lora=8),
    "rank": lambda m: mg.Lora(rank="8"),
    "draws": lambda m: mg.Distillation(teacher="gemma-3-270m", draws=256),
}


@pytest.mark.parametrize("name", NAMED)
def test_an_argument_of_another_type_is_named(name, model):
    with pytest.raises(ValueError, match=f"^{name} is of type ") as raised:
        NAMED[name](model)
    assert "; give " in str(raised.value)


def test_what_users_mean_is_taken(model):
    assert model.tokenizer.decode(300) == model.tokenizer.decode([300]) == model.tokenizer.decode(np.array([300]))
    assert mg.load("tiny-gemma-3", adapter=None).name == model.name
    assert mg.generate(model, "a", images=None, temperature=np.float32(0), max_new_tokens=np.int64(1)) is not None
