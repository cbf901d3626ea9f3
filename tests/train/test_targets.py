"""Distillation: what is kept of a teacher, where it is believed, what loss is possible, and what is refused."""

import json

import numpy as np
import pytest
from support.runs import toy, write_teacher, write_text

from minigemma.errors import FileError
from minigemma.formulas.cross_entropy import Targets, cross_entropy, cross_entropy_gradient
from minigemma.train import targets as kept_targets
from minigemma.train.targets import Distillation
from minigemma.train.teacher import Teacher, keep, least_loss
from minigemma.train.trainer import Training

random = np.random.default_rng(8)


def distributions(rows, vocabulary, spread=3.0):
    p = np.exp(random.standard_normal((rows, vocabulary)) * spread)
    return (p / p.sum(axis=1, keepdims=True)).astype(np.float32)


def dense(kept, vocabulary):
    """The targets as [T, V]."""
    t = np.zeros((len(kept.counts), vocabulary))
    np.add.at(t, (np.repeat(np.arange(len(kept.counts)), kept.counts), kept.ids), kept.weights)
    return t


def test_the_mean_of_counts_is_the_distribution():
    p = np.repeat(distributions(1, 50), 4000, axis=0)
    kept = keep(p, np.zeros(4000, np.int32), ("counts", 64), np.random.default_rng(1))
    t = dense(kept, 50)
    np.testing.assert_allclose(t.sum(axis=1), 1, rtol=1e-6)
    error = 5 * np.sqrt(p[0] * (1 - p[0]) / (64 * 4000)) + 1e-7
    assert (abs(t.mean(axis=0) - p[0]) < error).all()
    assert np.allclose(t * 64, np.round(t * 64), atol=1e-4)


def test_the_mean_gradient_of_counts_is_that_of_the_whole_distribution():
    p, z = distributions(1, 20), random.standard_normal((1, 20)).astype(np.float32)
    kept = keep(np.repeat(p, 1000, axis=0), np.zeros(1000, np.int32), ("counts", 16), np.random.default_rng(2))
    ids, one = np.arange(20, dtype=np.int32)[None], np.ones(1, np.float32)
    whole = Targets(ids, p)
    sampled = Targets(ids, dense(kept, 20).mean(axis=0, keepdims=True).astype(np.float32))
    np.testing.assert_allclose(cross_entropy(z, sampled), cross_entropy(z, whole), rtol=0.02)
    np.testing.assert_allclose(
        cross_entropy_gradient(one, z, sampled), cross_entropy_gradient(one, z, whole), rtol=0, atol=0.02
    )


@pytest.mark.parametrize("reading", [("set", 40), ("top", 7)])
def test_biased_readings_are_the_distribution_restricted_to_their_ids(reading):
    p = distributions(30, 60)
    kept = keep(p, np.zeros(30, np.int32), reading, np.random.default_rng(3))
    t = dense(kept, 60)
    inside = np.where(t > 0, p, 0)
    np.testing.assert_allclose(t, inside / inside.sum(axis=1, keepdims=True), rtol=1e-5)
    if reading[0] == "top":
        assert (kept.counts == 7).all() and (np.sort(p, axis=1)[:, -7] <= np.where(t > 0, p, 9).min(axis=1)).all()
    np.testing.assert_allclose(kept.entropy, -(t * np.log(np.maximum(t, 1e-30))).sum(axis=1), rtol=1e-5)


def test_more_ids_than_there_are_keep_the_whole_distribution():
    p = distributions(5, 12)
    kept = keep(p, np.zeros(5, np.int32), ("top", 100), np.random.default_rng(3))
    np.testing.assert_allclose(dense(kept, 12), p, rtol=1e-5)


@pytest.mark.parametrize("soft", [0.0, 0.3, 1.0])
def test_the_least_loss_is_the_entropy_of_the_mixture(soft):
    p, following = distributions(9, 15), random.integers(0, 15, 9)
    mixed = soft * p.astype(np.float64)
    mixed[np.arange(9), following] += 1 - soft
    expected = -(mixed * np.log(np.maximum(mixed, 1e-30))).sum(axis=1)
    entropy = -(p * np.log(p)).sum(axis=1)
    found = least_loss(entropy, p[np.arange(9), following], soft)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def begin(folder, teacher, out=None, *, draws="32", soft=1.0, targets="targets", **more):
    settings = {"steps": 6, "batch_tokens": 128, "seq": 32, "eval_every": 3, "threads": 2} | more
    told = Distillation(teacher=teacher, draws=draws, soft=soft, targets=targets and str(folder / targets))
    return Training(toy("recurrentgemma"), write_text(folder), out, distillation=told, **settings)


def test_probabilities_are_the_teachers(tmp_path, teacher):
    run = begin(tmp_path, teacher)
    asked = Teacher(teacher, run.tokenizer)
    windows = run.order.take(0, 80)
    p, first = asked.probabilities(run.corpus, windows), 0
    for begins, ends in windows:
        ids = [run.tokenizer.bos, *run.corpus.ids[begins : ends - 1]]
        z = asked.model.forward(ids)
        np.testing.assert_allclose(p[first : first + len(ids)], np.exp(z) / np.exp(z).sum(1, keepdims=True), atol=1e-5)
        first += len(ids)


@pytest.mark.parametrize("soft", [1.0, 0.5])
def test_many_draws_are_the_whole_distribution(tmp_path, teacher, soft):
    """Loss, KL and gradient of the first step agree, as the expected ones are the same."""
    draws, whole = (begin(tmp_path, teacher, draws=n, targets=n, soft=soft) for n in ("3000", "all"))
    first, second = draws.step(), whole.step()
    assert first.loss == pytest.approx(second.loss, rel=3e-3) and first.kl == pytest.approx(second.kl, rel=2e-2)
    assert first.norm == pytest.approx(second.norm, rel=3e-2)
    assert 0 < second.kl < second.loss


def test_a_student_like_its_teacher_has_no_divergence(tmp_path, teacher):
    told = Distillation(teacher=teacher, draws="all")
    run = Training(
        toy(), write_text(tmp_path), init=teacher, distillation=told, steps=2, batch_tokens=128, seq=32, held_out=0
    )
    run.prepare()
    assert run.source.native[: run.order.take(0, 128).max()].all()
    step = run.step()
    assert abs(step.kl) < 1e-3 and step.norm < 1e-2


def test_targets_are_made_once_and_serve_other_students(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(kept_targets, "SHARD", 16)
    done = []
    first = begin(tmp_path, teacher, tmp_path / "a")
    first.prepare(lambda *counts: done.append(counts))
    shards = sorted((tmp_path / "targets").glob("*.safetensors"))
    assert len(shards) == len(done) == -(-len(first.order.windows) // 16) > 1
    before = shards[0].read_bytes()
    shards[0].unlink()
    steps = list(begin(tmp_path, teacher, tmp_path / "b"))
    assert shards[0].read_bytes() == before
    monkeypatch.setattr(kept_targets, "Teacher", None)  # not asked again
    again = list(begin(tmp_path, teacher, tmp_path / "c"))
    assert [step.loss for step in again] == [step.loss for step in steps]
    row = json.loads((tmp_path / "c/log.jsonl").read_text().splitlines()[-1])
    assert row["kl"] == steps[-1].kl < row["loss"]


def test_a_distilled_run_resumes_bit_for_bit(tmp_path, teacher):
    whole = begin(tmp_path, teacher, tmp_path / "whole", targets=None)
    list(whole)
    half = begin(tmp_path, teacher, tmp_path / "half", targets=None)
    half.step()
    half.save()
    again = Training.resume(tmp_path / "half")
    list(again)
    np.testing.assert_array_equal(again.adam.weights, whole.adam.weights)
    assert (tmp_path / "half/targets/targets.json").exists()


def test_only_native_tokens_are_soft(tmp_path, teacher, monkeypatch):
    """Where the teacher's tokenization has other spans, the next token is the only target."""
    run = begin(tmp_path, teacher)
    asked = Teacher(teacher, run.tokenizer)
    ids = run.corpus.ids[: run.corpus.tokens]
    np.testing.assert_array_equal(asked.native(run.corpus), ids != run.tokenizer.eos)
    the = run.tokenizer.id_of("\u2581the")

    def splitting(tokenizer, text):
        for token in run.tokenizer.encode(text):
            yield from [run.tokenizer.id_of(piece) for piece in ("\u2581", "the")] if token == the else [token]
        yield tokenizer.eos

    monkeypatch.setattr("minigemma.train.teacher.encoded", splitting)
    np.testing.assert_array_equal(asked.native(run.corpus), (ids != the) & (ids != run.tokenizer.eos))
    run.prepare()
    windows = run.order.take(0, 128)
    following = np.concatenate([ids[a:b] for a, b in windows]).astype(np.int32)
    found = run.source.of(windows, following).targets
    hard = (following == the) | (following == run.tokenizer.eos)
    assert hard.any() and (found.weights[hard, -1] == 1).all() and (found.weights[~hard, -1] == 0).all()
    np.testing.assert_allclose(found.weights.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "told, said",
    [
        ({"draws": "0"}, "draws is '0'; it must be a number"),
        ({"draws": "some"}, "draws is 'some'"),
        ({"draws": "best:3"}, "draws is 'best:3'"),
        ({"draws": "top:-1"}, "draws is 'top:-1'"),
        ({"soft": 1.5}, r"soft is 1\.5; it is the teacher's share"),
        ({"targets": None}, "need a folder to be kept in"),
    ],
)
def test_wrong_words_are_refused(tmp_path, teacher, told, said):
    with pytest.raises(ValueError, match=said):
        begin(tmp_path, teacher, **told)


def test_targets_of_something_else_are_refused(tmp_path, teacher):
    begin(tmp_path, teacher).prepare()
    for changed, said in (
        ({"draws": "16"}, "made with draws 32, not 16"),
        ({"seq": 16}, "made with seq 32, not 16"),
        ({"held_out": 0.3}, "of another text"),
    ):
        with pytest.raises(FileError, match=f"holds targets {said}; name another folder"):
            begin(tmp_path, teacher, tmp_path / "run", **changed)
        assert not (tmp_path / "run").exists()
    shard = tmp_path / "targets/targets-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(FileError, match="delete it, and it is made again"):
        begin(tmp_path, teacher).step()


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path, demo_file):
    with pytest.raises(FileError, match=r"lacks .* of the student's .* pieces, such as .*minigemma vocab --from"):
        Teacher(demo_file, toy_with_an_own_piece())


def toy_with_an_own_piece():
    from support.runs import WORDS, tokenizer

    return tokenizer((*WORDS, "\u2581Humpty\u2581Dumpty"))
