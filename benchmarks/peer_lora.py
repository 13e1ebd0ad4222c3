"""The adapters that our side trains, in the peer's format."""

from argparse import Namespace

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def adapters(model: PreTrainedModel, arguments: Namespace) -> LoraConfig | None:
    """Beside every linear layer of the last --lora-layers blocks (0: of all); None: all weights."""
    if not arguments.lora_rank:
        return None
    number = model.config.num_hidden_layers
    stack = next(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number
    )
    blocks = range(number - (arguments.lora_layers or number), number)
    return LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=[
            name
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
            and any(name.startswith(f"{stack}{block}.") for block in blocks)
        ],
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
    )
