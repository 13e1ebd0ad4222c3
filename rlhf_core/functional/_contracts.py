"""The shape check with which every function here begins."""

from torch import Tensor


def check_shapes(**named: tuple[Tensor, str]) -> None:
    """Require one dimension per letter, and the same size wherever a letter occurs.

    `check_shapes(logits=(logits, "BRV"), tokens=(tokens, "BR"))` binds B and R across both.

    Raises:
        ValueError: naming the first tensor that does not fit, and the shape that it must have.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, letters) in named.items():
        shape = tuple(tensor.shape)
        if len(shape) == len(letters):
            for letter, size in zip(letters, shape, strict=True):
                sizes.setdefault(letter, size)
        if shape != tuple(sizes.get(letter) for letter in letters):
            wanted = ", ".join(f"{letter}={sizes.get(letter, 'any')}" for letter in letters)
            raise ValueError(f"{name} must have shape ({wanted}), got {shape}.")
