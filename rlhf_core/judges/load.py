"""Build the judge that a config names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import Tensor

from rlhf_core.data.encoding import Prompt
from rlhf_core.errors import ConfigError
from rlhf_core.judges.function import FunctionJudge, JudgeFunction
from rlhf_core.judges.judge import Judge, Judging, Pair, Verdict, Winner
from rlhf_core.judges.orders import BothOrders
from rlhf_core.rewards.canaries import Score
from rlhf_core.rewards.functions import RewardPlaces, code_digest, load_function
from rlhf_core.settings.judge import PEOPLE, REWARD_MODEL, JudgeConfig
from rlhf_core.settings.model import Precision
from rlhf_core.settings.rewards import MEAN, MemberSection

JUDGE = "judge"  # the role of a registered reward model among the inputs of a stage


def load_judge(
    config: JudgeConfig,
    *,
    registered: Path | None = None,
    max_length: int,
    device: str = "cpu",
    precision: Precision = "float32",
    members: MemberSection = MEAN,
    places: RewardPlaces | None = None,
    judging: Judging | None = None,
    reward: Score | None = None,
) -> Judge | None:
    """The judge, which sees both orders of each pair if the order can matter to it.

    None when the known truth or the pipeline's own reward model decides: whoever compares has
    their scores already. Verdicts of an endpoint and of a function are remembered; those of a
    function as long as the Python files of its folder, or of its package, stay the same.

    Args:
        registered: directory of the reward model, when `config.source` is another in the registry.
        max_length: tokens of the longest prompt and answer.
        places: where a function may come from; None = anywhere.
        judging: reaches an endpoint and remembers verdicts.
        reward: the pipeline's reward model, where a truth would decide in its place: then
            `reward_model` is a judge like another.

    Raises: ConfigError when there is no such judge.
    """
    if config.source == REWARD_MODEL and reward is not None:
        return ScoreJudge(REWARD_MODEL, reward)
    if config.source in ("", REWARD_MODEL):
        return None
    if config.is_registered:
        from rlhf_core.rewards.models import load_reward_model, score_texts  # with transformers

        assert registered is not None, "the stage has the input judge"
        model, tokenizer = load_reward_model(registered, device, precision, members=members)

        def score(prompts: Sequence[Prompt], texts: Sequence[str]) -> Tensor:
            return score_texts(model, tokenizer, prompts, texts, max_length=max_length).mean(0)

        return ScoreJudge(config.source.removeprefix("models:/").replace("/", "-"), score)
    if config.is_function:
        found = load_function(config.source, setting="judge.source", places=places)
        function = FunctionJudge(config.source, cast(JudgeFunction, found))
        code = code_digest(config.source.partition(":")[0], places)
        if judging is None or code is None:
            return BothOrders(function)
        return BothOrders(judging.remembered(function, f"{config.source} {code}"))
    if judging is None:
        raise ConfigError(
            f"judge.source is {config.source}, which only a task reaches; run the stage as one, or "
            "choose another judge"
        )
    if config.source == PEOPLE:
        return judging.people(config.people)
    endpoint = config.endpoint
    identity = endpoint.model_dump_json(include={"model", "template", "temperature", "max_tokens"})
    return BothOrders(judging.remembered(judging.endpoint(endpoint), identity))


@dataclass(frozen=True)
class ScoreJudge:
    """Prefers the answer with the higher score; equal scores are a tie."""

    name: str
    score: Score

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict for each pair."""
        prompts = [pair.prompt for pair in pairs]
        ours = self.score(prompts, [pair.a for pair in pairs])
        return by_score(ours, self.score(prompts, [pair.b for pair in pairs]))


def by_score(ours: Tensor, theirs: Tensor) -> list[Verdict]:
    """The verdicts of a score; shapes (N,)."""
    words: dict[int, Winner] = {1: "a", 0: "tie", -1: "b"}
    return [Verdict(words[int(sign)]) for sign in (ours - theirs).sign().tolist()]
