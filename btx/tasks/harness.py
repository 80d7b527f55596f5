"""lm-eval over any opened model, also a composed one: an adapter class, and a run of local tasks without a network.

Needs the extra `lm-eval`, and imports it at once, so whoever imports this module does so where it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from btx.errors import ArtifactError, RecipeError, nearest
from btx.models.opened import Opened
from btx.tasks.solve import complete, end_ids

POSITIONS = 2048  # lm-eval's default for a model that states none


class OpenedLM(TemplateLM):  # type: ignore[misc]
    """An opened model, with the tokenizer in its folder; each rule is that of lm-eval's own `hf` model."""

    def __init__(self, model: Opened, tokenizer: Any, folder: Path, *, batch_tokens: int = 8192) -> None:
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise ArtifactError(
                f"the tokenizer in {folder} has no end token, which lm-eval needs. Give it an eos_token."
            )
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.end = end_ids(folder, tokenizer)
        self.max_length = model.positions or POSITIONS

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the start token, or else the end token."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        """For the cache of lm-eval's requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_more: Any) -> list[int]:
        """Ids of a text, with the special tokens that the tokenizer adds, unless its start token is there already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text."""
        return str(self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        ))  # fmt: skip

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_more: Any
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation (nats), and whether each of its tokens is the likeliest."""
        found = []
        for asked, context, wanted in requests:
            if not 0 < len(wanted) <= self.max_length:
                raise RecipeError(
                    f"a task asks for a continuation of {len(wanted)} tokens, and the model has {self.max_length} "
                    "positions. Leave such items out."
                )
            ids = torch.tensor((context + wanted)[-(self.max_length + 1) :], device=self.model.device)
            log_p_SV = self.model.log_probs(ids[None, :-1])[0, -len(wanted) :]
            wanted_S = ids[-len(wanted) :]
            total = float(log_p_SV.gather(-1, wanted_S[:, None]).sum())
            found.append((total, bool((log_p_SV.argmax(-1) == wanted_S).all())))
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text (nats), in windows without overlap, each token scored once."""
        found = []
        for (text,) in [request.args for request in requests]:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                context_len=1,
            )  # fmt: skip
            parts = [(None, *utils.make_disjoint_window(window)) for window in windows]
            found.append(sum(total for total, _ in self._loglikelihood_tokens(parts)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy completions up to a stop; contexts that are too long lose their beginning, as in lm-eval."""
        found: dict[int, str] = {}
        asked: dict[tuple[Any, ...], list[int]] = {}
        for n, request in enumerate(requests):
            kwargs = normalize_gen_kwargs(request.args[1], 256)
            if kwargs.get("do_sample") or kwargs.get("temperature"):
                raise RecipeError("a task samples (do_sample or temperature), and only greedy generation is done here. "
                                  "Set do_sample: false in its generation_kwargs.")  # fmt: skip
            stops = handle_stop_sequences(
                list(kwargs.get("until") or []), eos=self.tokenizer.decode([self.eot_token_id])
            )
            asked.setdefault((kwargs["max_gen_toks"], *stops), []).append(n)
        for (most, *stops), numbers in asked.items():
            room = self.max_length - most
            if room < 1:
                raise RecipeError(f"a task generates {most} tokens, and the model has {self.max_length} positions. "
                                  "Set a smaller max_gen_toks in its generation_kwargs.")  # fmt: skip
            contexts = [self.tok_encode(requests[n].args[0])[-room:] for n in numbers]
            made = complete(
                self.model, self.tokenizer, contexts, most=most, stops=[stop for stop in stops if stop], end=self.end,
                batch_tokens=self.batch_tokens,
            )  # fmt: skip
            for n, one in zip(numbers, made, strict=True):
                found[n] = one.text
                self.cache_hook.add_partial("generate_until", requests[n].args, one.text)
        return [found[n] for n in range(len(requests))]


def evaluate(
    scorer: OpenedLM, tasks: Sequence[str], include: Path, *, limit: int | None = None, chat: bool = False
) -> dict[str, Any]:
    """lm-eval's results of tasks that YAML files below `include` define; RecipeError for a task that is not there."""
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    if not include.is_dir():
        raise RecipeError(f"there is no folder {include}. Name the folder with the tasks' YAML files.")
    manager = TaskManager(include_path=str(include), include_defaults=False)
    for name in tasks:
        if name not in manager.all_tasks:
            known = (
                nearest(name, manager.all_tasks) if manager.all_tasks else "it has no task's YAML file. Name another."
            )
            raise RecipeError(f"{include} defines no task {name!r}; {known}")
        _require_loadable(manager, name)
    found: dict[str, Any] = simple_evaluate(
        model=scorer, tasks=list(tasks), task_manager=manager, limit=limit, apply_chat_template=chat,
        bootstrap_iters=1000,
    )  # fmt: skip
    return found


def _require_loadable(manager: Any, name: str) -> None:
    """RecipeError for a task whose file or data cannot be loaded here; libraries raise any of a dozen types."""
    try:
        manager.load([name])
    except Exception as error:
        why = (str(error).strip().splitlines() or [repr(error)])[0]
        raise RecipeError(
            f"the task {name} cannot be loaded: {why:.300}. Its data must lie here: `dataset_path: json`, and a path "
            "under `dataset_kwargs: data_files`, relative to the working directory."
        ) from error


def table(results: dict[str, Any]) -> str:
    """The results in Markdown: a line per task, metric and filter."""
    lines = ["| task | metric | filter | value | standard error |", "|---|---|---|---|---|"]
    for task, numbers in results["results"].items():
        for key, value in numbers.items():
            metric, comma, how = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = numbers.get(f"{metric}_stderr,{how}")
                said = f"{error:.4f}" if isinstance(error, float) else ""
                lines.append(f"| {task} | {metric} | {how} | {value:.4f} | {said} |")
    return "\n".join(lines)


def as_json(value: Any) -> Any:
    """How lm-eval writes what JSON has no form for."""
    return utils.handle_non_serializable(value)
