"""On-policy distillation: what the student writes, that it follows its own distribution, and that a run resumes."""

import numpy as np
import pytest
from support.runs import toy, write_teacher, write_text

import minigemma as mg
from minigemma.formulas.attention import softmax
from minigemma.formulas.divergence import Toward, divergence
from minigemma.train.onpolicy import write_on

rng = np.random.default_rng(4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def begin(folder, teacher, out=None, *, kind="gemma3", init=None, **told):
    settings = {"steps": 4, "batch_tokens": 96, "seq": 32, "eval_every": 9, "threads": 2, "held_out": 0}
    wanted = mg.Distillation(teacher=teacher, **told)
    return mg.Training(toy(kind), write_text(folder), out, distillation=wanted, init=init, **settings)


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_divergences_are_zero_where_nothing_differs_and_positive_elsewhere(beta):
    z = rng.standard_normal((6, 30)).astype(np.float32) * 3
    assert abs(divergence(z, Toward(softmax(z), beta))).max() < 1e-6
    assert divergence(z, Toward(softmax(z[::-1]), beta)).min() > 0.05


def test_what_is_written_follows_the_students_distribution(teacher):
    model, count = mg.load(teacher), 400
    ids = np.tile(np.array([2, 70, 80, 9, 9, 9], np.int32), count)
    before, banned = ids.copy(), (0, 1, 2)
    write_on(model, ids, [(6 * i, 6 * i + 2, 6 * i + 6) for i in range(count)], banned, np.random.default_rng(0))
    rows = ids.reshape(count, 6)
    np.testing.assert_array_equal(rows[:, :3], before.reshape(count, 6)[:, :3])
    assert not np.isin(rows[:, 3:], banned).any()
    z = model.forward([2, 70, 80])[-1]
    z[list(banned)] = -np.inf
    p, seen = softmax(z[None])[0], np.bincount(rows[:, 3], minlength=len(z)) / count
    assert (abs(seen - p) <= 5 * np.sqrt(p * (1 - p) / count) + 1e-3).all()
    first = np.bincount(rows[:, 3]).argmax()
    some = rows[rows[:, 3] == first]
    p, seen = softmax(model.forward([2, 70, 80, first])[-1:])[0], np.bincount(some[:, 4], minlength=len(z)) / len(some)
    assert (abs(seen - p) <= 5 * np.sqrt(p * (1 - p) / len(some)) + 5e-3).all()


@pytest.mark.parametrize("beta", [None, 0.5, 1.0])
def test_a_student_like_its_teacher_has_nothing_to_learn(tmp_path, teacher, beta):
    step = begin(tmp_path, teacher, init=teacher, on_policy=1.0, beta=beta).step()
    assert abs(step.loss) < 1e-5 and step.norm < 1e-2 and step.kl == step.loss


def test_forward_kl_on_the_text_is_distillation_by_the_whole_distribution(tmp_path, teacher):
    one, whole = begin(tmp_path, teacher, beta=0.0).step(), begin(tmp_path, teacher, draws="all").step()
    eos = 1 / 20  # tokens that end a document have no divergence, and the next token as target
    assert one.loss == pytest.approx(whole.kl, rel=eos) and one.norm == pytest.approx(whole.norm, rel=2 * eos)


@pytest.mark.parametrize("kind", ["gemma3", "recurrentgemma"])
def test_a_run_resumes_bit_for_bit(tmp_path, teacher, kind):
    told = {"kind": kind, "on_policy": 0.5, "beta": 1.0}
    whole, half = (begin(tmp_path, teacher, tmp_path / name, **told) for name in ("whole", "half"))
    list(whole)
    half.step()
    half.save()
    again = mg.Training.resume(tmp_path / "half")
    list(again)
    np.testing.assert_array_equal(again.adam.weights, whole.adam.weights)


@pytest.mark.parametrize(
    "told", [{"on_policy": 1.5}, {"beta": -0.1}, {"beta": 0.5, "draws": "64"}, {"on_policy": 1, "soft": 0.5}]
)
def test_wrong_words_are_refused(told):
    with pytest.raises(ValueError, match="on_policy"):
        mg.Distillation(teacher="a", **told)
