"""Whether the arms of a comparison can be compared: told from their graphs, before anything runs.

An arm may set any setting of the recipe. What matters is what comes of it: that it starts from the same seed and is
scored on the same text in the same way, that each setting has an effect, and that no two arms are one.
"""

from __future__ import annotations

from collections.abc import Iterator

from btx.compare.arms import Trial, dotted
from btx.compare.rounds import Rounds
from btx.errors import RecipeError
from btx.recipe.compare_settings import Arm
from btx.steps.merge import SEED


def check_arms(rounds: Rounds) -> None:
    """RecipeError for an arm that cannot be compared, a setting without effect, or two arms that are one."""
    trials = {trial.arm: trial for trial in _trials(rounds)}
    control = trials[rounds.settings.control]
    seen: dict[str, str] = {}
    for name, trial in trials.items():
        _same_seed_and_text(rounds, trial, control)
        _effective(rounds, trial)
        other = seen.setdefault(rounds.measure(trial).key, name)
        if other != name:
            raise RecipeError(
                f"compare.arms: {other} and {name} are the same in everything, so they cannot differ. Leave one "
                f"out, or give it other draws, such as set: {{{_draws(rounds, name)}: 100}}."
            )


def _trials(rounds: Rounds) -> Iterator[Trial]:
    for arm, tokens in rounds.budgets[0].items():
        rates = rounds.arms.grid(arm).together(rounds.settings.rates[0])
        yield Trial(arm, rounds.settings.seeds[0], tokens, rates, "select")


def _draws(rounds: Rounds, name: str) -> str:
    rate = rounds.arms.conversion(name).rates[0]
    return f"{rate.partition('.')[0]}.seed"


def _same_seed_and_text(rounds: Rounds, trial: Trial, control: Trial) -> None:
    """The seed is scored by the same step in every arm, or by none that could be compared."""
    name = trial.arm
    if rounds.arms.conversion(name).finishing == "" and rounds.arms.arm(name).after_merge is not None:
        raise RecipeError(
            f"compare.arms.{name}: after_merge is the share of a training after a merge, and "
            f"{rounds.settings.conversion_of(name)} has none. Leave it out."
        )
    if _starts_alike(rounds, trial, control):
        return
    said = dotted(rounds.arms.arm(name).set)
    guilty = [path for path, value in said.items() if not _alike_alone(rounds, trial, control, {path: value})]
    raise RecipeError(
        f"compare.arms.{name}.set: {', '.join(guilty or said)} changes the seed, the text, how models are scored, "
        "or the folder of the run, so this arm could not be compared. Change that for all arms, in the recipe itself."
    )


def _alike_alone(rounds: Rounds, trial: Trial, control: Trial, said: dict[str, object]) -> bool:
    try:
        return _starts_alike(_with(rounds, trial.arm, said), trial, control)
    except RecipeError:  # no recipe without the others
        return False


def _starts_alike(rounds: Rounds, trial: Trial, control: Trial) -> bool:
    own, other = rounds.measure(trial, SEED), rounds.measure(control, SEED)
    return (own.key, own.root) == (other.key, other.root)


def _with(rounds: Rounds, name: str, said: dict[str, object]) -> Rounds:
    """The same comparison, with these settings alone set by an arm."""
    compare = rounds.settings
    arms: dict[str, Arm] = {**compare.arms, name: compare.arms[name].model_copy(update={"set": said})}
    changed = rounds.recipe.model_copy(update={"compare": compare.model_copy(update={"arms": arms})})
    found = Rounds(changed, rounds.base)
    found.digests = rounds.digests
    return found


def _effective(rounds: Rounds, trial: Trial) -> None:
    """Without any one of its settings an arm would be another."""
    name = trial.arm
    said, key = dotted(rounds.arms.arm(name).set), rounds.measure(trial).key
    for path in said:
        less = _with(rounds, name, {other: value for other, value in said.items() if other != path})
        try:
            same = next(less.measure(one).key == key for one in _trials(less) if one.arm == name)
        except RecipeError:  # the others cannot do without it
            continue
        if same:
            raise RecipeError(
                f"compare.arms.{name}.set: {path} changes nothing in this arm: the recipe says so already, the "
                f"comparison sets it itself, or {rounds.settings.conversion_of(name)} does not read it. Leave it out."
            )
