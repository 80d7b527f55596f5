"""The saved state of a training: weights, optimiser, random states and the step, as safetensors and JSON.

Everything that decides the rest of the run is here, so that a resumed run ends with the same bytes on one device. A
state is published like any other artifact; the newest one that verifies is taken, a damaged one is set aside.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from btx.errors import ArtifactError
from btx.graph.artifact import STATES, publish, verify, write_json

ASIDE = "quarantine"


def _options(*, load: bool = False) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=not load, strict=True)


def save_state(work: Path, accelerator: Any, model: nn.Module, optimizer: Any, step: int) -> None:
    """Publish the state before step `step` under `work`, verify it, then drop the older ones."""
    from accelerate.utils import gather_object
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights: Any
    moments: Any
    weights, moments = get_state_dict(model, optimizer.optimizer, options=_options())
    random = gather_object([_random_state()])
    if accelerator.is_main_process:

        def produce(out: Path) -> None:
            save_file(_own(weights), out / "model.safetensors")
            save_file(_own(_flat(moments["state"])), out / "optimizer.safetensors")
            for rank, states in enumerate(random):
                save_file(states, out / f"random-{rank}.safetensors")
            write_json(out / "state.json", {"step": step, "processes": len(random)})

        final = work / STATES / f"step-{step:09d}"
        publish(final, produce, {"step": step})
        verify(final)
        for older in sorted((work / STATES).iterdir()):
            if older.name != final.name:
                shutil.rmtree(older)
    accelerator.wait_for_everyone()


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them (tied weights are stored twice)."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _flat(state: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    return {f"{name}|{key}": torch.as_tensor(v) for name, entry in state.items() for key, v in entry.items()}


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def newest(work: Path) -> Path | None:
    """The newest saved state that verifies; damaged ones are moved to `quarantine` on the way."""
    folders = sorted(p for p in (work / STATES).glob("step-*") if p.is_dir())
    for folder in reversed(folders):
        try:
            verify(folder)
        except ArtifactError:
            aside = work / ASIDE / folder.name
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        else:
            return folder
    return None


def load_state(work: Path, accelerator: Any, model: nn.Module, optimizer: Any) -> int:
    """Restore the newest saved state in place; returns the step to go on from, 0 when there is none."""
    folder = newest(work) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    folder = folder or newest(work)
    if folder is None:
        return 0
    about = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if about["processes"] != accelerator.num_processes:
        raise ArtifactError(
            f"{folder} was saved by {about['processes']} processes and is resumed by "
            f"{accelerator.num_processes}. Use as many as before, or remove {work} to start over."
        )
    _restore(folder, model, optimizer)
    random = load_file(folder / f"random-{accelerator.process_index}.safetensors")
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    return int(about["step"])


def _restore(folder: Path, model: nn.Module, optimizer: Any) -> None:
    from accelerate.utils import broadcast_object_list
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_state_dict

    flat = load_file(folder / "optimizer.safetensors")
    state: Any = {}
    for name, tensor in flat.items():
        parameter, key = name.rsplit("|", 1)
        state.setdefault(parameter, {})[key] = tensor
    # Only the first process has the full groups, so it sends them to the others.
    current = get_optimizer_state_dict(model, optimizer.optimizer, options=_options())
    groups = broadcast_object_list([current.get("param_groups")])[0]
    set_state_dict(
        model, optimizer.optimizer,
        model_state_dict=load_file(folder / "model.safetensors"),
        optim_state_dict={"state": state, "param_groups": groups},
        options=_options(load=True),
    )  # fmt: skip
