"""Expert parallelism by transformers' own plan, on our kernels: the loss and gradients of one process."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from transformers.distributed import DistributedConfig

from btx.models.kernels import absent, use_kernel
from tests.support.moe_models import build

WORLD = 2


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def ids() -> torch.Tensor:
    """Two sequences for each process."""
    return torch.randint(0, 31, (2 * WORLD, 9), generator=torch.Generator().manual_seed(5))


def loss_and_gradients(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean loss of some tokens, and the gradient of every parameter, whole."""
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    grads = {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in model.named_parameters()}
    return loss.detach(), grads


def work(rank: int, folder: str, kernel: str, port: int) -> None:
    """One of the processes: its experts, its sequences."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    from transformers import AutoModelForCausalLM

    plan = DistributedConfig(fsdp_size=WORLD, ep_size=WORLD)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=plan)
    use_kernel(model, kernel)
    experts: Any = next(m for m in model.modules() if hasattr(m, "gate_up_proj"))
    assert experts.num_experts == 4 // WORLD
    loss, grads = loss_and_gradients(model, ids()[rank * 2 : rank * 2 + 2])
    dist.all_reduce(loss)
    if rank == 0:
        torch.save((loss / WORLD, grads), f"{folder}/found.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort the process when Python shuts down; that is not under test


@pytest.mark.parametrize(("family", "kernel"), [("mixtral", "sorted"), ("qwen3_moe", "triton")])
def test_two_processes_with_half_the_experts_each_have_the_loss_and_gradients_of_one(
    tmp_path: Path, family: str, kernel: str
) -> None:
    if why := absent(kernel, torch.device("cpu")):
        pytest.skip(why)
    if "ep_size" not in DistributedConfig.__dataclass_fields__:
        pytest.skip("this transformers has no plan of experts and data parallelism together")
    model = build(family, num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    wanted, gradients = loss_and_gradients(model, ids())
    spawn(work, args=(str(tmp_path), kernel, free_port()), nprocs=WORLD)
    found, theirs = torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert theirs.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, atol=2e-6, rtol=1e-4, msg=name)
