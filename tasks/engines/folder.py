"""Writes the folder that a vLLM server is started with.

    python -m tasks.engines.folder --model models:/demo-sft/1 --to FOLDER

It has the architecture and size of what the training will send, and a head of its own: where the
head shares the weights of the embeddings, vLLM does not renew it with them on a CPU, and would draw
from a mixture of two policies.
"""

import argparse
from pathlib import Path

from rlhf_core.errors import ModelError, UserError
from tasks.serving.generation import load_writer
from tasks.settings import Settings, apply_environment, read_settings


def write_folder(model: str, to: Path, settings: Settings) -> None:
    """Write a policy, from wherever `rlhf generate` takes one, to a folder that is not there yet.

    Raises: ModelError when there is no such policy, or the folder exists.
    """
    if to.exists():
        raise ModelError(f"{to} exists; name a new folder")
    writer = load_writer(model, settings)
    part = to.with_name(f"{to.name}.part")
    writer.policy.save(writer.tokenizer, part, {}, untied=True)
    part.rename(to)


def main() -> None:
    """The command."""
    about = str(__doc__).partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tasks.engines.folder", description=about)
    parser.add_argument(
        "--model", required=True, help="models:/NAME/VERSION, a folder of a policy, or a hub id"
    )
    parser.add_argument("--to", type=Path, required=True, help="the folder to write")
    given = parser.parse_args()
    try:
        settings = read_settings()
        apply_environment(settings)
        write_folder(given.model, given.to, settings)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
