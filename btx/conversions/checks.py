"""All input of the steps that are still to be done, looked at before anything is written.

What the recipe alone can tell is settled in `recipe`; here is what takes a look at checkpoints, data and machine.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from btx.errors import RecipeError, ResourceError, nearest
from btx.graph.step import Step
from btx.models.native import native_config
from btx.recipe.paths import expanded
from btx.recipe.recipe import Recipe
from btx.recipe.settings import RunSettings
from btx.steps.adapted import Adapted
from btx.steps.branch import Branch, Descent
from btx.steps.dense import Dense
from btx.steps.evaluate import Evaluate
from btx.steps.export import Export
from btx.steps.finetune import Finetune
from btx.steps.given import Given
from btx.steps.merge import Merge
from btx.steps.pretrain import Pretrain
from btx.steps.tokens import TokensStep
from btx.steps.train import Train

ALONE = ("NO", "MULTI_CPU")  # kinds of accelerate's launch files under which it starts one process, without MPI


def check_inputs(steps: list[Step], merge: Merge, recipe: Recipe, root: Path) -> None:
    """Raise what is wrong with the input of these steps, whose folders will lie under `root`; nothing is written.

    A merge that cannot be had is told before experts are trained for it.
    """
    check_place(recipe.run, root)
    for seed in {s.folder: s for step in steps if (s := seed_of(step)) and isinstance(s, Given)}:
        check_lengths(seed, recipe)
    for step in steps:
        if isinstance(step, (Branch, Descent, Adapted)) and isinstance(step.seed, Given):
            step.examine()
        if isinstance(step, Finetune) and step.merge.settings.attention:
            check_attention_experts(recipe)
        if isinstance(step, Merge):
            check_memory(step)
        if isinstance(step, Export) and recipe.finetune.soft_first_layer:
            raise RecipeError(
                "finetune.soft_first_layer: no stock class can hold a layer that visits all experts beside others that "
                "visit one, so the export would be another model than the one measured. Leave it out, or stop before "
                "the export: --until evaluate."
            )
    if any(isinstance(step, (Train, Merge)) for step in steps):
        check_layout(merge, recipe.seed.builtin.config)
    for tokens, length in sequence_lengths(steps):
        check_documents(tokens, length)


def seed_of(step: Step) -> Step | None:
    """The seed under a step that reads sequences, or that verifies the seed."""
    if isinstance(step, (Branch, Descent)):
        return step.seed
    if isinstance(step, (Train, Dense)):
        return step.branch.seed
    if isinstance(step, Finetune):
        return step.merge.branch.seed
    return step.average.branch.seed if isinstance(step, Evaluate) else None


def check_lengths(seed: Path, recipe: Recipe) -> None:
    """RecipeError when a sequence is longer than the positions that the seed was made for."""
    from btx.checkpoints.validate import read_config

    most = native_config(read_config(seed), str(seed)).max_position_embeddings
    asked = {
        "train": recipe.train.sequence_length,
        "finetune": recipe.finetuning.sequence_length,
        "dense": recipe.continuing.sequence_length if recipe.continuing else 0,
        "evaluate": recipe.evaluate.sequence_length or 0,
    }
    for name, length in asked.items():
        if length > most:
            raise RecipeError(
                f"{name}.sequence_length is {length}, the seed {seed} has max_position_embeddings "
                f"{most}. Choose at most that."
            )


def check_layout(merge: Merge, builtin: dict[str, Any]) -> None:
    """RecipeError when experts cannot be made of the seed's feed-forward blocks as the recipe says."""
    from btx.checkpoints.token_map import require_carried
    from btx.checkpoints.validate import read_config
    from btx.merge.layout import layout
    from btx.models.families import WITH_ATTENTION

    seed, config = merge.branch.seed, builtin
    if isinstance(seed, Given):
        config = {**read_config(seed.folder), "intermediate_size": width_of(seed.folder)}
    width = config["intermediate_size"]
    layout(merge.settings, list(merge.models), config, str(seed.folder))
    if merge.settings.attention and isinstance(seed, Given):
        require_carried(seed.folder, WITH_ATTENTION.moe)
    for name, step in merge.models.items():
        if merge.settings.experts in ("split", "blend") and isinstance(step, Given) and width_of(step.folder) != width:
            raise RecipeError(
                f"merge.experts: {merge.settings.experts} cuts feed-forward blocks of one width; that of {name} is "
                f"{width_of(step.folder)}, the seed's {width}. Use experts: one, or leave that domain out."
            )


def check_memory(merge: Merge) -> None:
    """ResourceError when averaging takes more memory than the recipe gives it."""
    from btx.checkpoints.reader import opened
    from btx.merge.averaging import require_memory

    seed = merge.branch.seed
    if isinstance(seed, Given):
        with opened(seed.folder) as found:
            require_memory(found, merge.settings.shared, models=len(merge.models), limit=merge.where.max_memory)


def check_attention_experts(recipe: Recipe) -> None:
    """RecipeError for what the class with attention experts cannot do in the finetuning."""
    why = f"merge.experts: {recipe.merge.experts} makes a model whose class"
    if recipe.finetuning.gradient_checkpointing:
        raise RecipeError(f"{why} has no gradient checkpointing. Set finetune.gradient_checkpointing: false.")
    if recipe.run.kernel not in ("auto", "eager"):
        raise RecipeError(f"{why} computes its experts by loops of its own. Set run.kernel: auto.")


def width_of(folder: Path) -> int:
    """The feed-forward width of a dense checkpoint."""
    from btx.checkpoints.validate import read_config

    return int(native_config(read_config(folder), str(folder)).intermediate_size)


def check_place(run: RunSettings, root: Path) -> None:
    """RecipeError or ResourceError when what `run` names is not there: a kernel, a device, a launch file, a folder."""
    from btx.models.kernels import choose
    from btx.models.model import device_of

    choose(run.kernel, device_of(run))
    if run.launch:
        check_launch(expanded(run.launch, "run.launch").absolute())
    check_trackers(run.report_to)
    above = next(p for p in (root, *root.parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ResourceError(f"run.directory: {above} is no folder that can be written to. Choose another one.")


def check_launch(path: Path) -> None:
    """RecipeError unless `accelerate launch` takes the file, and will start as many processes as it says."""
    if not path.is_file():
        raise RecipeError(
            f"run.launch: there is no file {path}. `accelerate config` writes one; relative paths start at the "
            "working directory."
        )
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        about = load_config_from_file(str(path))
    except Exception as error:  # it checks little itself, so that wrong content ends in any of several kinds
        why = " ".join(str(error).split())
        raise RecipeError(f"run.launch: {path} is no file that accelerate takes ({why}). Write it anew.") from error
    kind = str(getattr(about.distributed_type, "value", about.distributed_type))
    if kind in ALONE and int(about.num_processes or 1) > 1:
        raise RecipeError(
            f"run.launch: {path} asks for {about.num_processes} processes, of which accelerate starts one alone "
            f"under distributed_type: {kind}. Set MULTI_GPU (on CPUs with use_cpu: true) or FSDP."
        )


def check_trackers(names: list[str]) -> None:
    """RecipeError for a tracker that accelerate does not know, or whose package is not installed (it would skip it)."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    at_hand = [str(t) for t in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise RecipeError(f"run.report_to: there is no tracker {name!r}; {nearest(name, LOGGER_TYPE_TO_CLASS)}")
        if name not in at_hand:
            raise RecipeError(f"run.report_to: the package of the tracker {name} is not installed. Install it first.")


def sequence_lengths(steps: list[Step]) -> list[tuple[TokensStep, int]]:
    """Every tokens step that is still to be done or trained on, with how long a text is asked of it: a sequence for
    each training among which its sequences are dealt."""
    found: dict[str, tuple[TokensStep, int]] = {s.label: (s, 0) for s in steps if isinstance(s, TokensStep)}
    for step in steps:
        if isinstance(step, (Train, Pretrain)):
            wanted = [(step.tokens, step.train.sequence_length * (step.part[1] if isinstance(step, Train) else 1))]
        elif isinstance(step, (Finetune, Dense)):
            length = (step.settings if isinstance(step, Finetune) else step.train).sequence_length
            wanted = [(t, length) for n, t in step.tokens.items() if step.weights[n]]
        else:
            continue
        for tokens, length in wanted:
            found[tokens.label] = tokens, max(length, found.get(tokens.label, (tokens, 0))[1])
    return list(found.values())


def check_documents(step: TokensStep, length: int) -> None:
    """Read all documents of a domain once; RecipeError, with counts, when one is bad or they are too few.

    `length` is what they must fill: the longest sequence, or one for each of several experts. Where the tokenizer is
    yet to be made, bytes stand for tokens, of which there are never more.
    """
    from btx.data.packed import survey, train_tokens

    if step.done:
        tokens, counts = train_tokens(step.folder), ""
    else:
        split = step.split()
        tokens = survey(split, step.encoder() if step.tokenizer.folder.is_dir() else None, enough=length + 1)
        counts = f" ({split.summary(len(step.sources), len(step.valid))})"
        if split.counts.documents and not split.test and (step.data.holdout or step.valid):
            raise RecipeError(
                f"{step.label}: there is no document to hold out{counts}. Name `valid` files that have some."
            )
    if not tokens:
        raise RecipeError(f"{step.label}: too little data, there is no document to train on{counts}. Give it more.")
    if tokens <= length:
        raise RecipeError(
            f"{step.label}: too little data, {tokens} tokens to train on{counts}, where one sequence for each training "
            f"takes {length + 1}. Give it more, or a shorter sequence_length."
        )
