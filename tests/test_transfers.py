"""Nothing of a training step waits for the device: no copy from memory that is not pinned, no read of the device.

The device is ``meta``: it computes nothing, and what has to look at a value there fails.
"""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from w2v2 import recipes
from w2v2.data.batch import Batch
from w2v2.data.config import DataConfig
from w2v2.data.corpora import read_corpus
from w2v2.model.ctc import Wav2Vec2ForCTC
from w2v2.text.vocabulary import Vocabulary
from w2v2.training.ctc_task import FinetuneTask
from w2v2.training.data import SpeechDataModule
from w2v2.training.pretrain import PretrainTask

META = torch.device("meta")
SAMPLES = {"equal": [32_000] * 3, "unequal": [32_000, 20_000, 26_000]}


@pytest.fixture(autouse=True)
def autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch knows of no autocast there."""
    enabled, kind = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": device != "meta" and enabled(device))
    monkeypatch.setattr(torch, "autocast", lambda device, **o: nullcontext() if device == "meta" else kind(device, **o))


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What was pinned, where there is no device to pin memory for."""
    tensors: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor.clone())
        return tensors[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return tensors


class Transfers(TorchDispatchMode):
    """The copies to the device; refuses what would wait for one, or for a value of the device."""

    def __init__(self, pinned: list[torch.Tensor]) -> None:
        super().__init__()
        self.pinned, self.copies = pinned, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        out = ctc(name, *args) if name.startswith("_ctc_loss") else func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        assert name not in ("_local_scalar_dense", "nonzero", "equal") or tensors[0].device != META, f"{name} reads"
        if name in ("_to_copy", "copy_"):
            source = tensors[1] if name == "copy_" else tensors[0]
            if source.device != META and results[0].device == META:
                self.copies.append(source)
                assert any(source is tensor for tensor in self.pinned), f"{tuple(source.shape)} is not pinned"
                assert kwargs.get("non_blocking") or args[2:] == (True,), f"{tuple(source.shape)} is waited for"
            assert source.device != META or results[0].device == META, f"{tuple(source.shape)} is read"
        return out


class Constants(TorchFunctionMode):
    """Refuses numbers of the host as a tensor of the device, which are copied as they are; no operator shows it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert func not in (torch.tensor, torch.as_tensor) or out.device != META, "a number is not pinned"
        return out


def ctc(name: str, *args):
    """Torch's CTC loss has no shapes there; it takes lengths from the host, and the rest from the device."""
    log_probs, targets, *lengths = args[1:] if name.endswith("backward") else args
    assert log_probs.device == targets.device == META and all(n.device.type == "cpu" for n in lengths[:2])
    if name.endswith("backward"):
        return torch.empty_like(log_probs)
    return log_probs.new_empty(len(targets)), log_probs.new_empty(
        len(targets), len(log_probs), 2 * targets.shape[1] + 1
    )


def batch_of(samples: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    zeros = torch.zeros(len(samples), dtype=torch.long)
    return Batch(
        torch.randn(len(samples), max(samples), generator=generator), torch.tensor(samples), zeros,
        [f"u{i}" for i in range(len(samples))], [0] * len(samples),
        targets=torch.ones(len(samples), 4, dtype=torch.long), target_lengths=torch.tensor([4] * len(samples)),
        texts=["AB"] * len(samples),
    )  # fmt: skip


def task_of(kind: str):
    recipe = (recipes.tiny if kind == "pretraining" else recipes.tiny_ctc)()
    if kind == "pretraining":
        task = PretrainTask(recipe.model.build(), recipe.optim, recipe.loss_weights, 0)
    else:
        recipe.model.mask_prob, recipe.channel_mask_prob, recipe.freeze_encoder_steps = 0.65, 0.5, 0
        vocabulary = Vocabulary.from_texts(["ABC"])
        task = FinetuneTask(Wav2Vec2ForCTC(recipe.model, len(vocabulary.labels)), vocabulary, recipe)
    task.trainer = SimpleNamespace(
        accumulate_grad_batches=2, global_step=3, global_rank=0, world_size=1, training=True, strategy=None
    )
    return task


def step_of(task, samples: list[int], pinned: list[torch.Tensor], micro_batches: int = 2) -> Transfers:
    """What goes to the device in an optimiser step, up to the fused optimiser, of which torch has no shapes there."""
    task.to(META).train()
    optimizer = task.configure_optimizers()
    batches = []
    for number in range(micro_batches):  # as a worker and the loader do
        batch = batch_of(samples)
        batch.place = (0, number)
        batch.draws = task.draw(batch, training=True)
        batches.append(batch.pin_memory())
    with Constants(), Transfers(pinned) as transfers:
        for i, batch in enumerate(batches):
            task.on_before_batch_transfer(batch, 0)
            task.training_step(task.transfer_batch_to_device(batch, META, 0), i).backward()
        task.on_before_optimizer_step(optimizer)
        task.configure_gradient_clipping(optimizer, 1.0, "norm")
    return transfers


@pytest.mark.parametrize("lengths", SAMPLES)
@pytest.mark.parametrize("kind", ["pretraining", "ctc"])
def test_a_step_copies_from_pinned_memory_alone_and_reads_nothing(kind, lengths, pinned) -> None:
    transfers = step_of(task_of(kind), SAMPLES[lengths], pinned)
    assert len({id(tensor) for tensor in transfers.copies}) == len(transfers.copies) > 0  # nothing twice


@pytest.mark.parametrize(("kind", "copies"), [("pretraining", 3), ("ctc", 4)])
def test_a_batch_takes_a_copy_for_each_tensor(kind, copies, pinned) -> None:
    """Audio, masked frames (covered ones are the same), distractors; audio, masked frames, channels, labels."""
    task, batch = task_of(kind), batch_of(SAMPLES["equal"])
    batch.draws = task.draw(batch, training=True)
    batch = batch.pin_memory()
    with Transfers(pinned) as transfers:
        task.transfer_batch_to_device(batch, META, 0)
    assert len(transfers.copies) == copies


def plant(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "pageable batch":
        monkeypatch.setattr(Batch, "pin_memory", lambda batch: batch)
    hook = PretrainTask.on_before_optimizer_step
    faults = {
        "number copied": lambda task: torch.tensor(1.0, device=META),
        "value read": lambda task: task.sums.values["total"].item(),
        "value shown": lambda task: task.sums.values["total"].cpu(),
        "condition": lambda task: bool(task.sums.values["total"] > 0),
    }
    if fault in faults:
        monkeypatch.setattr(
            PretrainTask, "on_before_optimizer_step", lambda task, opt: (faults[fault](task), hook(task, opt))
        )


@pytest.mark.parametrize("fault", ["pageable batch", "number copied", "value read", "value shown", "condition"])
def test_what_waits_is_noticed(fault, pinned, monkeypatch) -> None:
    plant(fault, monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError), match=r"pinned|reads|is read|[mM]eta"):
        step_of(task_of("pretraining"), SAMPLES["equal"], pinned)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_worker_draws_what_the_task_would(corpus: Path, workers: int) -> None:
    task = task_of("pretraining")
    task.model.config.layer_drop = 0.5
    config = DataConfig(batch_seconds=4.0, max_seconds=2.0, num_workers=workers)
    data = SpeechDataModule(read_corpus(corpus), config)
    data.trainer = SimpleNamespace(lightning_module=task, current_epoch=3, accumulate_grad_batches=2)
    loader = data.train_dataloader()
    layers = []
    for number, batch in enumerate(loader):
        again = task.draw(batch, training=True)
        assert batch.place == (3, number) and batch.draws.covered is batch.draws.masked
        for name in ("masked", "distractors"):
            assert torch.equal(getattr(batch.draws, name), getattr(again, name))
        layers.append(batch.draws.keep_layers)
        assert layers[-1] == again.keep_layers
    assert layers[::2] == layers[1::2] and len(set(layers)) > 1  # two micro-batches are a step
