"""The settings of a task: items with answers that are judged, and how a model is asked."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from btx.recipe.fields import NAME, Count, Positive, Text, Whole, execution, later
from btx.recipe.settings import Settings

Template = Annotated[str, Field(min_length=1)]
GSM8K = {"prompt": "Question: {question}\nAnswer:", "answer": "{answer}", "joint": " ", "stop": ("Question:",)}
MBPP = {
    "prompt": "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:"
    "\n\n{test_list}\n[BEGIN]\n",
    "answer": "{code}\n[DONE]", "joint": "", "stop": ("[DONE]",),
}  # fmt: skip
LABEL = {"prompt": "{input}", "answer": "{output}", "joint": " ", "stop": ("\n",)}
CODE_ONLY = ("setup", "tests", "seconds")
IDLE = {  # settings that do not belong to a kind
    "exact_match": (*CODE_ONLY, "control"),
    "code": ("read", "control"),
    "label": (*CODE_ONLY, "read", "prompt", "answer", "examples", "few_shot"),
}
Control = Literal["original", "simplified", "delusive", "empty", "shuffled"]


class TaskSettings(Settings):
    """A task: a file of items, how each is written as a prompt, and how a completion is judged.

    In `prompt`, `answer`, `setup` and `tests`, {name} stands for a column of the item, and a list for its lines.
    """

    file: Text = execution(
        ..., description="items, a .jsonl, .json or .parquet file; relative paths start as data's do"
    )
    kind: Literal["exact_match", "code", "label"] = Field(
        description="exact_match: the answer is read from the completion and compared, as in GSM8K; code: the "
        "completion is run with the item's tests, in a sandbox, as in MBPP; label: an instruction with a label space, "
        "as `sft` reads them, judged by compliance too"
    )
    prompt: Template | None = Field(None, description="default: as lm-eval writes GSM8K, or MBPP, by the kind")
    answer: Template | None = Field(
        None, description="the right answer, after the prompt of an example, and compared under exact_match"
    )
    read: Literal["number", "text"] = Field(
        "number", description="exact_match: a number, after #### or the last one; or the completion's first line"
    )
    setup: str = Field("{test_setup_code}", description="code: what runs before the completion")
    tests: Template = Field("{test_list}", description="code: what runs after the completion, and must not raise")
    examples: Text | None = execution(None, description="a file of examples, whose first `few_shot` precede each item")
    few_shot: Whole = 0
    limit: Count | None = Field(None, description="the first so many items; default: all")
    max_new_tokens: Count = 256
    stop: list[Template] | None = Field(None, description="texts that end a completion, and are not part of it")
    chat: bool = Field(False, description="ask in the tokenizer's chat template, as one message of a user")
    seconds: Positive = Field(10.0, description="code: time that a program may take")
    control: Control = later("original", description="label: how the instruction is changed, as in sft.control")

    @model_validator(mode="after")
    def _used(self) -> TaskSettings:
        if self.few_shot and self.examples is None:
            raise ValueError("`few_shot` needs a file of `examples`, other items than those that are scored")
        if self.examples is not None and not self.few_shot:
            raise ValueError("`examples` are used if `few_shot` says how many; set it, or leave the file out")
        for name in IDLE[self.kind]:
            if name in self.model_fields_set:
                raise ValueError(f"`{name}` does not belong to kind {self.kind}; leave it out")
        return self

    @property
    def prompt_template(self) -> str:
        """The prompt's template."""
        return self.prompt or str(self._defaults["prompt"])

    @property
    def answer_template(self) -> str:
        """The answer's template."""
        return self.answer or str(self._defaults["answer"])

    @property
    def joint(self) -> str:
        """What stands between an example's prompt and its answer."""
        return str(self._defaults["joint"])

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end a completion."""
        return tuple(self._defaults["stop"] if self.stop is None else self.stop)

    @property
    def _defaults(self) -> dict[str, Any]:
        return {"exact_match": GSM8K, "code": MBPP, "label": LABEL}[self.kind]


def _told_apart(tasks: dict[str, TaskSettings]) -> dict[str, TaskSettings]:
    if len({name.lower() for name in tasks}) < len(tasks):
        raise ValueError("two names of tasks differ in case only; choose clearer names")
    return tasks


Tasks = Annotated[
    dict[Annotated[str, Field(pattern=f"^{NAME}$")], TaskSettings], AfterValidator(_told_apart)
]  # by name
