"""``train.compile``: few graphs for all batches, with the numbers of the model as it is."""

import functools

import pytest
import torch
from conftest import utterances
from test_step import rand, randomize, shrunk

from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.training.config import TrainConfig
from w2v2.training.run import tune

SIZES = [3, 5, 1, 2, 8, 4, 7, 6, 9, 12, 10, 14, 11, 13]


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that ``torch.compile`` makes, run as they are."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield made
    torch._dynamo.reset()


def batches():
    """Fourteen numbers of utterances, lengths of every kind."""
    for i, n in enumerate(SIZES):
        yield [4_000 + 640 * i] * n
        yield [4_000 + 640 * ((i + 3 * k) % 11) for k in range(n)]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(model, twin, loss):
    expected, got = loss(twin), loss(model)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(gradients(model, got), gradients(twin, expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["base", "paper_base"])
def test_pretraining_needs_three_graphs_for_any_number_and_length_of_utterances(preset, precision, graphs):
    model, twin = (randomize(shrunk(preset).build()).train() for _ in range(2))
    tune(model, TrainConfig(compile=True))
    for lengths in batches():
        draws, audio = model.draw(utterances(lengths)), rand(len(lengths), max(lengths))

        def loss(side, draws=draws, audio=audio, lengths=lengths):
            torch.manual_seed(7)  # Gumbel noise
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                return side(audio, draws, lengths).losses["contrastive"]

        assert_same(model, twin, loss)
    assert len(graphs) == 3  # before attention, of all frames or of those that are wanted, and after it


def test_fine_tuning_needs_two_and_a_dropped_or_recomputed_block_none(graphs):
    model, twin = (randomize(Wav2Vec2ForCTC(shrunk("base"), 9)).train() for _ in range(2))
    tune(model, TrainConfig(compile=True, activation_checkpointing=True))
    for lengths in batches():
        audio = rand(len(lengths), max(lengths))
        assert_same(model, twin, lambda side, audio=audio, lengths=lengths: side(audio, lengths)[0].square().mean())
    x, kept = rand(2, 9, 48), [True, False]
    torch.testing.assert_close(model.contextualize(x, keep_layers=kept), twin.contextualize(x, keep_layers=kept))
    assert len(graphs) == 2
