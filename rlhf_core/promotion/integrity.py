"""The rules about what the comparison rests on: files, held-out prompts, leaks."""

from rlhf_core.evaluation.scorecard import PromptLeaks, Scorecard
from rlhf_core.promotion.claims import absent
from rlhf_core.promotion.decision import Rule
from rlhf_core.promotion.facts import Files
from rlhf_core.settings.promotion import PromotionConfig

_SHOWN = 12  # characters of a digest


def integrity(config: PromotionConfig, scorecard: Scorecard, files: Files | None) -> list[Rule]:
    """Files, prompts and leaks."""
    leaks = scorecard.leaks
    return [
        *_files(files),
        *(
            [absent("evaluation prompts in training", "integrity", "not measured")]
            if leaks is None
            else [_equal(leaks, config.max_equal_prompts), _near(leaks, config.max_near_prompts)]
        ),
        _prompts(scorecard, config.min_prompts),
    ]


def _files(files: Files | None) -> list[Rule]:
    if files is None:
        return [absent("files of the candidate", "integrity", "not looked at")]
    stored = Rule(
        name="files of the candidate",
        family="integrity",
        measured=files.problem or f"have the digest {files.digest[:_SHOWN] or 'none'}",
        required="the digest in the registry",
        passed=not files.problem,
    )
    if files.evaluated is None:
        unknown = absent("loads and answers", "integrity", "no evaluation of this run is known")
        return [stored, unknown]
    return [
        stored,
        Rule(
            name="loads and answers",
            family="integrity",
            measured=f"the evaluation {files.evaluation[:_SHOWN]} loaded and asked the files "
            f"{files.evaluated[:_SHOWN]}",
            required="the digest of the candidate",
            passed=files.evaluated == files.digest,
        ),
    ]


def _equal(leaks: PromptLeaks, most: float) -> Rule:
    return Rule(
        name="evaluation prompts in training",
        family="integrity",
        measured=f"{leaks.equal} of {leaks.prompts}",
        required=f"at most {most:.0%} (promotion.max_equal_prompts)",
        passed=leaks.equal <= most * leaks.prompts,
    )


def _near(leaks: PromptLeaks, most: float) -> Rule:
    part = "" if leaks.compared >= leaks.of else f", of which {leaks.compared} were searched"
    return Rule(
        name="evaluation prompts that nearly equal one of training",
        family="integrity",
        measured=f"{leaks.near} of {leaks.prompts}, among {leaks.of} prompts{part}",
        required=f"at most {most:.0%} (promotion.max_near_prompts; raise it for prompts from one "
        "template)",
        passed=leaks.near <= most * leaks.prompts,
    )


def _prompts(scorecard: Scorecard, least: int) -> Rule:
    fewest = min((match.prompts for match in scorecard.comparisons), default=0)
    return Rule(
        name="held-out prompts",
        family="integrity",
        measured=str(fewest),
        required=f"at least {least} (promotion.min_prompts)",
        passed=fewest >= least,
    )
