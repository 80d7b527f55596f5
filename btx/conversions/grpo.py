"""GRPO (arXiv 2402.03300) on the dense seed: answers to items are sampled, judged, rewarded and compared.

The result is an ordinary checkpoint of the seed's shape. Beside it lie the answers to held-out items along the run
(policy.parquet; policy.json in numbers: accuracy, formats, degeneracy, calibration of stated confidence), and the marks
that the policy gave items on the way. Killed at any step, it goes on from its last saved state to the same bytes.
"""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationError

from btx.conversions.contract import Conversion
from btx.conversions.experts import Experts
from btx.conversions.planned import Config, Training
from btx.conversions.sources import Branch, Model, Sources, Start
from btx.conversions.tasks import items_file
from btx.data import corpus
from btx.errors import RecipeError
from btx.events import Emit, Note
from btx.graph.artifact import LOGS, write_json
from btx.recipe.fields import NAME, environment, execution
from btx.recipe.makers import Maker
from btx.recipe.messages import sentences
from btx.recipe.paths import expanded
from btx.recipe.recipe import Recipe, Section
from btx.recipe.settings import steps_of, torch_dtype
from btx.rl.passrate import chosen, read_marks, require_same
from btx.rl.policy import STATE, Policy, held_out
from btx.rl.sampling import Asker
from btx.rl.settings import PolicySettings
from btx.steps.branch import VerifySeed, require_positions
from btx.steps.model import ModelStep
from btx.steps.train import memory_of, require_finite
from btx.tasks.items import Item, read_items


class GrpoSettings(PolicySettings, Section):
    """Reinforcement learning of the seed on items with verifiable answers (needs the extra `rl`)."""

    variants: dict[Annotated[str, Field(pattern=f"^{NAME}$")], dict[str, Any]] = Field(
        default_factory=dict,
        description="further runs by name, each with what it changes, {calibrated: {reward: calibrated}}; models "
        "grpo-NAME of the same report",
    )

    def fits(self, recipe: Recipe, name: str) -> None:
        """Each variant is a run of its own, and none has a domain's name, which labels the domain's expert."""
        found = {variant: self.variant(variant) for variant in self.variants}
        for variant, settings in found.items():
            if variant in recipe.domain_of:
                raise ValueError(f"{name}.variants: {variant} is also the name of an expert; choose another")
            same = next((other for other, one in found.items() if other != variant and one == settings), "")
            if same or settings == self.plain:
                raise ValueError(
                    f"{name}.variants: {variant} and {same or name} are the same in everything; change one"
                )

    @property
    def plain(self) -> PolicySettings:
        """The run itself, without the variants."""
        return PolicySettings(**{name: getattr(self, name) for name in PolicySettings.model_fields})

    def variant(self, name: str) -> PolicySettings:
        """The settings of a variant; what it does not say of the task is as here. ValueError for wrong ones."""
        said, own = self.model_dump(exclude_unset=True, exclude={"variants"}), self.variants[name]
        task = own.get("task", {})
        changed = {**said, **own, "task": {**said["task"], **task} if isinstance(task, dict) else task}
        try:
            return PolicySettings.model_validate(changed)
        except ValidationError as error:
            raise ValueError(f"grpo.variants.{name}: {' '.join(sentences(error, PolicySettings, NAME))}") from error


class Grpo(ModelStep):
    """A dense checkpoint of the seed's shape, with policy.parquet and policy.json beside it."""

    kind: ClassVar[str] = "grpo"
    trains: ClassVar[bool] = True
    branch: VerifySeed
    policy: PolicySettings
    content: list[str]  # digests of the items' file, of the examples' and of the marks', if there are any
    file: str = execution("")
    examples: str | None = execution(None)
    passrate: str | None = execution(None)
    date: str | None = None  # for a chat template that asks for today's
    batch_tokens: int = environment(8192)  # of prompts and completions that are generated at once

    @property
    def needs(self) -> int:
        """That of a training of the seed's shape, and once more its weights for the KL term."""
        from btx.checkpoints.reader import Checkpoint

        folder = self.branch.seed.folder
        reference = 4 * sum(entry.count for entry in Checkpoint(folder).entries.values()) if self.policy.kl else 0
        return memory_of(folder, self.policy.training, self.where) + reference

    def check(self, asked: int) -> None:
        """Read the items and marks; RecipeError for what cannot be used, ResourceError without trl."""
        from btx.models.model import device_of
        from btx.rl.trainer import require_trl

        require_trl()
        if self.where.launch:
            raise RecipeError("grpo trains in one process, and run.launch may start several. Leave one of them out.")
        if self.policy.precision == "bf16" and device_of(self.where).type == "cpu":
            raise RecipeError("grpo.precision is bf16, which needs a GPU, and run.device is a CPU. Set fp32.")
        require_positions(self.branch.seed, "grpo.sequence_length", self.policy.sequence_length)
        if self.policy.task.kind == "code":
            from btx.tasks.canaries import require

            require()
        items = self.items()
        if (self.branch.seed.folder / "config.json").is_file():
            self._made(items)

    def items(self) -> list[Item]:
        """All items, in the file's order; RecipeError for a bad one."""
        from btx.tasks.answers import require_answers

        found = read_items(self.policy.task, self.file, self.examples)
        require_answers(self.policy.task, found)
        return found

    def run(self, out: Path, work: Path, emit: Emit) -> dict[str, Any]:
        """Train, look at the policy on the way, and save."""
        import torch

        from btx.checkpoints.reader import Checkpoint
        from btx.data.encoder import load_tokenizer
        from btx.models import flops, model
        from btx.rl.trainer import METRICS, require_trl, train

        require_trl()
        model.set_threads(self.where)
        torch.manual_seed(self.policy.seed)
        seed = self.branch.seed.folder
        net = model.load(seed, where=self.where)
        config = deepcopy(net.config)  # trl sets the pad token on the model's own
        made = self._made(self.items())
        emit(Note(self.label, f"asks {len(made.pool)} items of {len(made.items)}, and holds {len(made.held)} out"))
        facts = train(net, load_tokenizer(seed), made, where=self.where, work=work, label=self.label, emit=emit)
        state, dtype = net.state_dict(), torch_dtype(self.policy.dtype, Checkpoint(seed).dtype)
        require_finite(self.label, facts["loss"], state, dtype)
        model.save(out, config=config, state=state, dtype=dtype, like=seed)
        write_json(out / STATE, made.numbers)
        made.write(out)
        (out / LOGS).mkdir()
        shutil.copyfile(work / METRICS, out / LOGS / METRICS)
        passes = 3 + 1 + bool(self.policy.kl)  # forward and twice that backward; sampling; the reference
        spent = flops.training_flops(config.to_dict(), facts["tokens"]) * passes / 3
        said = {"reward": self.policy.reward, "kl": self.policy.kl}
        return {
            **facts,
            "policy": said,
            "trl": version("trl"),
            "training_flops": spent,
            "parameters": model.count_parameters(net),
        }

    def numbers(self) -> dict[str, dict[str, float]]:
        """What was seen of the held-out items, by step."""
        found: dict[str, dict[str, float]] = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        return found

    def _asker(self) -> Asker:
        said = self.policy
        return Asker(self.branch.seed.folder, said.task, said.confidence, said.formats, said.temperature,
                     self.batch_tokens, self.date)  # fmt: skip

    def _made(self, items: list[Item]) -> Policy:
        """The run before its first step; RecipeError for prompts that are too long, or marks that do not fit."""
        trained, held = held_out(items, self.policy.held_out)
        asker = self._asker()
        if asker.tokenizer.eos_token_id is None:
            raise RecipeError("grpo: the tokenizer has no end token, by which an answer ends. Give it an eos_token.")
        ids = asker.prompts(items, self.policy.sequence_length, self.label)
        prompts = {item.digest: one for item, one in zip(items, ids, strict=True)}
        return Policy(self.policy, asker, trained, held, prompts, self._pool(trained))

    def _pool(self, items: list[Item]) -> list[int]:
        """The numbers of the items to begin with."""
        from btx.checkpoints.reader import Checkpoint

        if self.passrate is None:
            return list(range(len(items)))
        marks = read_marks(Path(self.passrate))
        if not self.policy.other_marks:
            asked = {"temperature": self.policy.temperature, "max_new_tokens": self.policy.task.max_new_tokens,
                     "chat": self.policy.task.chat}  # fmt: skip
            require_same(marks, Checkpoint(self.branch.seed.folder).digest(), asked)
        return chosen(items, {one["prompt_sha256"]: one for one in marks}, self.policy.bands)


def expert(sources: Sources, start: Start, branch: Branch, settings: GrpoSettings) -> ModelStep:
    """A domain's expert: the seed, trained by GRPO for as many steps as its tokens suffice for."""
    steps = steps_of(branch.tokens, settings.training)
    return _trained(sources, start, branch.name, settings.plain.model_copy(update={"steps": steps}))


def expert_plan(settings: GrpoSettings, seed: Config, name: str, tokens: int) -> Training:
    """The training, as if every prompt and completion were as long as they may be."""
    return Training(f"grpo:{name}", seed, tokens, settings.training)


def _trained(sources: Sources, start: Start, name: str | None, settings: PolicySettings) -> ModelStep:
    """The seed, trained by GRPO; `name` is the step's."""
    task, recipe = settings.task, sources.recipe
    file = items_file(sources, "grpo.task.file", task.file)
    examples = None if task.examples is None else items_file(sources, "grpo.task.examples", task.examples)
    marks = None
    if settings.passrate is not None:
        marks = str(sources.texts.base / expanded(settings.passrate, "grpo.passrate"))
    content = [corpus.digest(path, sources.digests) for path in (file, examples, marks) if path is not None]
    _require_unasked(sources, file, content[0])
    return sources.add(Grpo(
        branch=start.branch, policy=settings, content=content, file=file, examples=examples, passrate=marks,
        date=recipe.data.date, batch_tokens=recipe.evaluate.batch_tokens, **sources.place(name),
    ))  # fmt: skip


def _require_unasked(sources: Sources, file: str, content: str) -> None:
    """RecipeError for a task that asks the items which are trained on."""
    for name, task in sources.recipe.tasks.items():
        asked = items_file(sources, f"tasks.{name}.file", task.file)
        if corpus.digest(asked, sources.digests) == content:
            raise RecipeError(
                f"tasks.{name} asks the items of {file}, which grpo trains on, so its score would be no measure of "
                "ability. Give them different items; those that grpo holds out are asked along its run."
            )


def build(sources: Sources, start: Start, _experts: Experts, settings: GrpoSettings) -> dict[str, Model]:
    """The trained policy, and those of the variants."""
    others = {
        f"grpo-{name}": Model(_trained(sources, start, name, settings.variant(name))) for name in settings.variants
    }
    return {**others, "grpo": Model(_trained(sources, start, None, settings.plain))}


def plan(_recipe: Recipe, settings: GrpoSettings, seed: Config) -> list[Training]:
    """The trainings, as if every prompt and completion were as long as they may be."""
    runs = {**{f"grpo:{name}": settings.variant(name) for name in settings.variants}, "grpo": settings.plain}
    return [Training(label, seed, one.steps * one.training.batch_tokens, one.training) for label, one in runs.items()]


CONVERSION = Conversion(
    build,
    models=("grpo",),
    section=GrpoSettings,
    plan=plan,
    maker=Maker(section=GrpoSettings, build=expert, plan=expert_plan, apart=("steps", "variants")),
)
