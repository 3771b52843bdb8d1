"""FSDP2 between two processes: the gradient of one, LayerDrop, and what is refused."""

import os
import socket
import time

import pytest
import torch
from conftest import utterances
from pytorch_lightning.strategies import ModelParallelStrategy
from test_schedules import CONTRASTIVE, ROWS, assert_same_gradients, batch_of, fit, quiet_model
from test_train import nano
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from w2v2 import recipes
from w2v2.errors import UsageError
from w2v2.training.health import describe
from w2v2.training.run import check_device
from w2v2.training.sharding import whole, whole_weights
from w2v2.training.task import MicroBatch


def run_rank(rank, port, folder):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
    }  # fmt: skip
    torch.set_num_threads(1)
    batches = [batch_of(*row) for row in ROWS[2 * rank : 2 * rank + 2]]
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    task = fit(quiet_model(), batches, CONTRASTIVE, accumulate=2, strategy=strategy, devices=2)
    model = task.model
    parts = [p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)]
    found = {"gradients": {name: whole(gradient) for name, gradient in task.gradients[0].items()}}
    found |= {"parts": parts, "kept": model.draw(utterances([6_000]), (11, 0)).keep_layers}
    found["weights"] = whole_weights(model)
    if rank == 0:
        with torch.no_grad():
            model.transformer[1].mlp.fc_1.weight.to_local()[0] = torch.nan
    found["fault"] = describe([MicroBatch(["u"], {"a": torch.tensor(1.0)}, torch.tensor([True]))], model)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.spawn(run_rank, args=(port, folder), nprocs=2, join=False)
    deadline = time.monotonic() + 300
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the processes wait for each other")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone():
    return fit(quiet_model(), [batch_of(*row) for row in ROWS], CONTRASTIVE, accumulate=4)


def test_two_sharded_processes_give_the_gradient_of_one(ranks, alone):
    """With a dropped layer, whose gradients are zero and not missing."""
    for rank in ranks:
        assert False in rank["kept"]
        assert_same_gradients(rank["gradients"], alone.gradients[0])


def test_each_keeps_about_half(ranks, alone):
    total = sum(p.numel() for p in alone.model.parameters())
    halves = [sum(rank["parts"]) for rank in ranks]
    assert sum(halves) == total
    assert all(0.45 < half / total < 0.55 for half in halves)


def test_the_first_process_gets_the_weights_whole(ranks, alone):
    expected = alone.model.state_dict()
    assert ranks[1]["weights"] == {}
    assert ranks[0]["weights"].keys() == expected.keys()
    for name, tensor in ranks[0]["weights"].items():
        assert not isinstance(tensor, DTensor)
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_a_part_that_is_not_finite_on_one_process_is_named_by_both(ranks):
    for rank in ranks:
        assert rank["fault"].startswith("weights that are not finite: transformer.1.mlp.fc_1.weight; ")


def test_on_one_process_nothing_is_sharded_and_everything_is_whole():
    model = quiet_model()
    assert not isinstance(model, FSDPModule)
    assert whole_weights(model).keys() == model.state_dict().keys()


def test_what_sharding_cannot_do_is_refused_in_a_line():
    config = recipes.tiny_ctc()
    config.train.shard, config.freeze_encoder_steps = True, 10
    with pytest.raises(UsageError, match=r"`train\.shard` cannot freeze.*got 10"):
        config.check()
    with pytest.raises(UsageError, match="16-mixed"):
        check_device(nano(shard=True, precision="16-mixed").train)
    with pytest.raises(UsageError, match=r"`train\.bf16_gradients` works between GPUs, without `train\.shard`"):
        check_device(nano(bf16_gradients=True).train)
