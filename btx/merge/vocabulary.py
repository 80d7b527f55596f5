"""One vocabulary for models some of which added tokens after the seed's: embedding rows aligned by token.

Added tokens are read from tokenizer.json: entries of `added_tokens` that the seed's lacks, with ids above all of the
seed's. A row of the embedding or the head is averaged over the models that have its token; rows without a token (an
embedding padded to a round number) over the models that have the row and no token for it. Any other difference (another
vocabulary, other merges, a token of the seed renamed) is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from btx.checkpoints.names import BY_TOKEN, EMBEDDING
from btx.checkpoints.reader import Checkpoint
from btx.checkpoints.token_map import carry_dense, difference, same_files, token_map
from btx.checkpoints.validate import read_config
from btx.data.packed import load_tokenizer
from btx.errors import ArtifactError
from btx.graph.artifact import write_json
from btx.recipe.merge_settings import AveragingSettings

FILE = "vocabulary.json"
JSON, CONFIG = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True)
class Vocabulary:
    """The seed's tokens and those that experts added."""

    common: int  # ids below are the seed's own
    tokens: dict[str, int]  # added token -> its id in the merged model
    ids: dict[str, dict[str, int]]  # by the expert's name: added token -> its id there

    @classmethod
    def read(cls, folder: Path) -> Vocabulary:
        """The vocabulary that `write_joint` wrote."""
        return cls(**json.loads((folder / FILE).read_text(encoding="utf-8")))


def is_extended(seed: Path, other: Path) -> bool:
    """Whether a checkpoint adds tokens after the seed's, or has another vocab_size; False if anything else differs."""
    try:
        return bool(added_tokens(seed, other, "") or _rows(seed) != _rows(other))
    except (ArtifactError, OSError, ValueError, KeyError, TypeError):
        return False  # the error is raised where the checkpoint is verified


def added_tokens(seed: Path, other: Path, who: str) -> list[dict[str, Any]]:
    """The tokens that a tokenizer adds to the seed's, as in tokenizer.json; ArtifactError for any other difference."""
    if same_files(seed, other):
        return []
    ours, its = token_map(seed), token_map(other)
    if ours == its:
        return []
    refusal = f"{who} has another tokenizer than the seed ({seed}): "
    remedy = "Only tokens added after the seed's can be aligned. Train it with the seed's tokenizer."
    if not all((folder / JSON).is_file() for folder in (seed, other)):
        raise ArtifactError(f"{refusal}the same ids mean other tokens, as far as can be seen without {JSON}. {remedy}")
    if parts := difference(ours, its):
        raise ArtifactError(
            f"{refusal}its {parts} differ, so the same ids mean other tokens, or the same text has other ids. {remedy}"
        )
    mine, theirs = _parts(seed)[1], _parts(other)[1]
    common, known = common_ids(seed), {t["id"]: t["content"] for t in theirs}
    for token in mine:
        if known.get(token["id"]) != token["content"]:
            found = repr(known[token["id"]]) if token["id"] in known else "missing"
            raise ArtifactError(f"{refusal}id {token['id']} is {token['content']!r} there and {found} here. {remedy}")
    old = {t["id"] for t in mine}
    added = sorted((t for t in theirs if t["id"] not in old), key=lambda t: t["id"])
    for token in added:
        if token["id"] < common:
            raise ArtifactError(
                f"{refusal}it adds {token['content']!r} as id {token['id']}, one of the seed's. {remedy}"
            )
    if len({t["content"] for t in theirs}) < len(theirs):
        raise ArtifactError(f"{refusal}a token is added twice. {remedy}")
    loaded, own = ({t["content"]: {**t, "id": 0} for t in one["added_tokens"]} for one in (ours, its))
    wrong = [text for text in (t["content"] for t in mine) if loaded.get(text) != own.get(text)]
    if wrong or not added:
        what = ", ".join(map(repr, wrong or sorted(loaded.keys() ^ own.keys())))
        raise ArtifactError(f"{refusal}it treats {what} differently (flags, or the class that loads it). {remedy}")
    return added


def common_ids(seed: Path) -> int:
    """One more than the seed's highest id."""
    (vocab, _), added = _parts(seed)
    own = range(len(vocab)) if isinstance(vocab, list) else vocab.values()  # a unigram's is a list
    return 1 + int(max((*own, *(t["id"] for t in added))))


def _parts(folder: Path) -> tuple[tuple[Any, list[str]], list[dict[str, Any]]]:
    """The tokenizer's model (vocabulary, merges), and its added tokens; ArtifactError for a damaged file."""
    if not (folder / JSON).is_file():
        raise ArtifactError(
            f"{folder} has no {JSON}, which aligning embedding rows needs. Write one: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    data = json.loads((folder / JSON).read_text(encoding="utf-8"))
    model = data["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
    added: list[dict[str, Any]] = data.get("added_tokens", [])
    for token in added:
        if type(token["id"]) is not int or not isinstance(token["content"], str) or not token["content"]:
            raise ArtifactError(
                f"{folder / JSON} is damaged: {token!r:.80} is not a token. Fetch the checkpoint again."
            )
    if not isinstance(model.get("vocab"), (dict, list)):
        raise ArtifactError(f"{folder / JSON} is damaged: it has no vocabulary. Fetch the checkpoint again.")
    return (model["vocab"], merges), added


def require_ids_as_stated(folder: Path, added: list[dict[str, Any]], who: str) -> None:
    """ArtifactError unless the loaded tokenizer gives its added tokens the ids that tokenizer.json states."""
    known = load_tokenizer(folder).get_vocab()
    for token in added:
        if known.get(token["content"]) != token["id"]:
            raise ArtifactError(
                f"{who}: {JSON} states the id {token['id']} for {token['content']!r}, but the loaded tokenizer gives "
                f"{known.get(token['content'])}. Save it again: AutoTokenizer.from_pretrained(folder)"
                ".save_pretrained(folder)."
            )


def _rows(folder: Path) -> Any:
    return read_config(folder)["vocab_size"]


def join(seed: Path, experts: Mapping[str, Path]) -> tuple[Vocabulary, list[dict[str, Any]]]:
    """The joint vocabulary, with added tokens in the experts' order, and the tokenizer.json entries of those.

    A token that several experts added becomes one, with the flags of the first.
    """
    added = {name: added_tokens(seed, folder, f"the expert {name} ({folder})") for name, folder in experts.items()}
    common = common_ids(seed)
    tokens: dict[str, int] = {}
    entries: list[dict[str, Any]] = []
    for entry in (entry for some in added.values() for entry in some):
        if entry["content"] not in tokens:
            tokens[entry["content"]] = common + len(tokens)
            entries.append({**entry, "id": tokens[entry["content"]]})
    return Vocabulary(common, tokens, {n: {e["content"]: e["id"] for e in some} for n, some in added.items()}), entries


def write_joint(out: Path, seed: Path, experts: Mapping[str, Path]) -> Vocabulary:
    """Write the seed's tokenizer with all tokens that experts added, and the map from tokens to rows.

    BOS, EOS and the chat template stay the seed's.
    """
    found, entries = join(seed, experts)
    write_json(out / "config.json", {"model_type": read_config(seed)["model_type"]})  # AutoTokenizer chooses by it
    carry_dense(seed, out)
    data = json.loads((out / JSON).read_text(encoding="utf-8"))
    data["added_tokens"] = [*data.get("added_tokens", []), *entries]
    (out / JSON).write_text(json.dumps(data, ensure_ascii=False, indent=2), encoding="utf-8")
    if (out / CONFIG).is_file():
        config = json.loads((out / CONFIG).read_text(encoding="utf-8"))
        if "added_tokens_decoder" in config:
            flags = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in entries}
            config["added_tokens_decoder"] = {**config["added_tokens_decoder"], **flags}
            (out / CONFIG).write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")
    write_json(out / FILE, asdict(found))
    return found


class TruncatedView(Checkpoint):
    """A view of an open checkpoint with embedding and head cut to the seed's tokens; nothing is copied."""

    def __init__(self, whole: Checkpoint, rows: int, vocab_size: int) -> None:
        self.folder, self.whole = whole.folder, whole
        self.config = {**whole.config, "vocab_size": vocab_size}
        if "vocab_size_per_layer_input" in self.config:
            self.config["vocab_size_per_layer_input"] = vocab_size
        self.entries = {
            name: replace(entry, shape=(rows, *entry.shape[1:])) if name in BY_TOKEN else entry
            for name, entry in whole.entries.items()
        }

    def flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a tensor in row-major order."""
        return self.whole.flat(name, start, stop)

    def close(self) -> None:
        """Close the open files."""
        self.whole.close()


class JointVocabulary:
    """Embedding and head rows after the seed's tokens, of open models brought to one vocabulary."""

    def __init__(self, vocabulary: Vocabulary, models: Mapping[str, Checkpoint], base: Checkpoint) -> None:
        self.vocabulary, self._models, self._base = vocabulary, models, base
        self.size = max(base.entries[EMBEDDING].shape[0], vocabulary.common + len(vocabulary.tokens))
        for name, model in (*models.items(), ("the seed", base)):
            require_rows(model, vocabulary.common, name)

    def trimmed(self, model: Checkpoint) -> TruncatedView:
        """A model cut to the rows that all models have; its config states the merged vocabulary's size."""
        return TruncatedView(model, self.vocabulary.common, self.size)

    def rows(self, name: str, how: AveragingSettings) -> Iterator[torch.Tensor]:
        """The rows (D,) of the embedding or the head after the seed's tokens, in fp32, in order.

        Whatever the method, each is the mean over the models that have it, weighted where the method is linear.
        """
        tokens = {number: token for token, number in self.vocabulary.tokens.items()}
        for row in range(self.vocabulary.common, self.size):
            found = self._having(tokens.get(row), row, name)
            weights = [how.weight(model, 0.0) if how.method == "linear" else 1.0 for model in found]
            if not any(weights):
                weights = [1.0] * len(found)
            total = sum(w * v for w, v in zip(weights, found.values(), strict=True))
            yield torch.as_tensor(total) / sum(weights)

    def _having(self, token: str | None, row: int, name: str) -> dict[str, torch.Tensor]:
        """A token's row, or row `row` for no token, in every model that has it, by the model's name."""
        found = {}
        for model, checkpoint in self._models.items():
            own = self.vocabulary.ids.get(model, {})
            place = own.get(token) if token is not None else row if row not in own.values() else None
            count, width = checkpoint.entries[name].shape
            if place is not None and place < count:
                found[model] = checkpoint.flat(name, place * width, (place + 1) * width).float()
        if not found:  # a row without a token that only the seed has, where the seed is not an expert
            width = self._base.entries[name].shape[1]
            found["seed"] = self._base.flat(name, row * width, (row + 1) * width).float()
        return found


def require_rows(model: Checkpoint, common: int, who: str) -> None:
    """ArtifactError unless a model's embedding has a row for every token of the seed."""
    rows = model.entries[EMBEDDING].shape[0]
    if rows < common:
        raise ArtifactError(
            f"{who} ({model.folder}) has an embedding of {rows} rows, fewer than the seed's {common} tokens. "
            "Use a checkpoint that has them all."
        )
