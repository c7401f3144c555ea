"""A run file that follows a recommendation: ``plan: plan.json``, or ``cpt train RUN.yaml plan=plan.json``.

Owns what the recommendation replaces in the run file: its stages become ``data.stages``, their sum ``train.tokens``,
and ``replay.share_general`` goes. All of it is written out in the resolved config, so the file is never needed again;
what the run file said before is kept in ``plan.replaced``. Refuses overrides that say something else than the
recommendation: somebody who types both ``plan=`` and ``train.tokens=`` would be surprised whichever won. Also refuses
weights that do not name exactly the sources of ``data.stores``, and a recommendation other than the one that
``plan.fingerprint`` names.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpt.problems import ConfigError, Problem
from cpt.recommendation import Recommendation, RecommendedStage, read_recommendation
from cpt.rundir import DataError
from cpt.schedule_fields import whole_number

WITHOUT = "plan=null trains with the mixture that the run file states"


def follow_plan(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Replace in place what the recommendation decides; nothing without ``plan``, or where sections are malformed.

    Raises:
        ConfigError: the file cannot be read, its sources are not those of the run, or an override contradicts it.
    """
    given = raw.get("plan")
    plan: dict[str, Any] = given if isinstance(given, dict) else {"path": given}
    if not isinstance(plan.get("path"), str):
        return
    data, train, replay = (raw.setdefault(name, {}) for name in ("data", "train", "replay"))
    if not all(isinstance(section, dict) for section in (data, train, replay)):
        return  # validation says what is wrong
    path = Path.cwd() / Path(plan["path"]).expanduser()
    recommendation = _read(path, plan.get("fingerprint"))
    stages = [_stage(stage) for stage in recommendation.stages]
    decided: dict[str, Any] = {"train.tokens": recommendation.tokens, "data.stages": stages}
    decided["replay.share_general"] = recommendation.share_general if len(stages) == 1 else None
    tokens = train.get("tokens")
    stated = {
        "train.tokens": tokens if isinstance(tokens, bool) else whole_number(tokens),
        "data.stages": data.get("stages"),
        "replay.share_general": replay.get("share_general"),
    }
    replaced = {name: value for name, value in stated.items() if value not in (None, [], decided[name])}
    typed = {text.partition("=")[0] for text in overrides}
    problems = [_contradiction(name, replaced[name], plan["path"], decided[name]) for name in replaced if name in typed]
    problems += _foreign_sources(recommendation, data.get("stores"))
    if problems:
        raise ConfigError(*problems)
    data["stages"], train["tokens"], replay["share_general"] = stages, recommendation.tokens, None
    raw["plan"] = {"path": str(path), "fingerprint": recommendation.fingerprint, "replaced": replaced}


def _read(path: Path, fingerprint: object) -> Recommendation:
    try:
        recommendation = read_recommendation(path)
    except DataError as error:
        raise ConfigError(Problem("plan", None, str(error), WITHOUT)) from None
    if fingerprint not in (None, recommendation.fingerprint):
        rule = f"{path} is another recommendation now, {recommendation.fingerprint}"
        raise ConfigError(Problem("plan.fingerprint", fingerprint, rule, "plan.fingerprint=null follows that one"))
    return recommendation


def _stage(stage: RecommendedStage) -> dict[str, Any]:
    """As ``data.stages`` states it. With weights the stores' labels decide what is general, not the recommendation."""
    if stage.weights:
        return {"tokens": stage.tokens, "weights": dict(stage.weights)}
    return {"tokens": stage.tokens, "share_general": stage.share_general}


def _contradiction(name: str, value: object, path: str, decided: object) -> Problem:
    rule = f"contradicts plan={path}, which says {'several stages' if decided is None else decided}"
    fix = "leave it out, or ask cpt plan recommend for another budget" if name == "train.tokens" else "leave it out"
    return Problem(name, value, rule, f"{fix}; {WITHOUT}")


def _foreign_sources(recommendation: Recommendation, stores: object) -> list[Problem]:
    if not isinstance(stores, Mapping):
        return []
    problems = []
    for index, stage in enumerate(recommendation.stages):
        unknown, missing = sorted(stage.weights.keys() - stores.keys()), sorted(stores.keys() - stage.weights.keys())
        parts = [f"names {', '.join(unknown)}, not in data.stores"] if unknown else []
        parts += [f"misses {', '.join(map(str, missing))} of data.stores"] if missing else []
        if stage.weights and parts:
            fix = "name the stores as the observations name their sources, or measure pilots with these sources"
            problems.append(Problem(f"plan.stages[{index}].weights", None, " and ".join(parts), fix))
    return problems
