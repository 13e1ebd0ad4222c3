"""The second implementation: each text alone on plain transformers, nothing packed or padded."""

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_core.backbone.directory import read_card
from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.sampling import respond
from rlhf_core.data.encoding import encode_prompt
from rlhf_core.data.prepared import read_table
from rlhf_core.seeding import generator


def first_roll_out(stage, sft, data, sampling, n, group=1):
    """The prompts and responses of the first iteration, drawn again from the same streams."""
    policy, tokenizer = Policy.load(sft, "cpu")
    prompts = read_table(data, "prompts", "train")["prompt"]
    rows = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    order = torch.randperm(len(rows), generator=generator(0, f"{stage}/prompts")).tolist()
    asked = [rows[i] for i in order[: n // group] for _ in range(group)]
    whole = sampling.model_copy(update={"batch_size": n})
    draws = generator(0, f"{stage}/sampling")
    ((_, said),) = respond(policy, asked, whole, generator=draws)
    responses = [t[m].tolist() for t, m in zip(said.tokens, said.mask, strict=True)]
    return list(zip(asked, responses, strict=True)), said.finished


def plain_policy(directory):
    """A causal language model, straight from its files."""
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def plain_logprobs(model, prompt, said, temperature=1.0):
    """(R,) log-probability of each token of a response."""
    logits = model(torch.tensor([prompt + said])).logits[0] / temperature
    places = torch.arange(len(prompt) - 1, len(prompt) + len(said) - 1)
    return logits.log_softmax(-1)[places, torch.tensor(said)]


def plain_values(directory):
    """A function from (1, T) ids to (T,) normalised values of a scalar model."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    card = read_card(directory)

    @torch.no_grad()
    def values(ids):
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        return (model.score(hidden).squeeze(-1) - card["reward_mean"]) / card["reward_std"]

    return values


def plain_scores(directory, texts):
    """(B,) normalised score of prompts with their responses, as token ids."""
    values = plain_values(directory)
    return torch.stack([values(torch.tensor([prompt + said]))[-1] for prompt, said in texts])
