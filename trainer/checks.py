"""What configurations refuse; without torch, so that a mistake is told before it is loaded."""

from features.errors import UserError

_BELOW = 2**31  # what tables and tensors count with; also keeps infinities out
_LEAST_TEMPERATURE = 1e-4
_MOST_LAYERS = 1000  # each is a module: to build more takes hours before memory ends


def check_positive(config: object, *names: str) -> None:
    """Refuse hyper-parameters that are not above zero, or not finite.

    Raises:
        UserError: Names the first one and its value.
    """
    for name in names:
        if name == "layers" and getattr(config, name) > _MOST_LAYERS:
            raise UserError(f"layers={getattr(config, name)} must be at most {_MOST_LAYERS}")
        if not 0 < getattr(config, name) < _BELOW:  # NaN is in no range
            raise UserError(f"{name}={getattr(config, name)} must be above 0 and below 2**31")


def check_not_negative(config: object, *names: str) -> None:
    """Refuse hyper-parameters that are below zero, or not finite.

    Raises:
        UserError: Names the first one and its value.
    """
    for name in names:
        if not 0 <= getattr(config, name) < _BELOW:
            raise UserError(f"{name}={getattr(config, name)} must be at least 0 and below 2**31")


def check_probability(config: object, *names: str) -> None:
    """Refuse what is no probability in [0, 1).

    Raises:
        UserError: Names the first one and its value.
    """
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be in [0, 1)")


def check_temperature(config: object, *names: str) -> None:
    """Refuse what scores cannot be divided by.

    Raises:
        UserError: Names the first one and its value.
    """
    check_positive(config, *names)
    for name in names:
        if getattr(config, name) < _LEAST_TEMPERATURE:
            raise UserError(
                f"{name}={getattr(config, name)} must be at least {_LEAST_TEMPERATURE}:"
                " float32 scores are too coarse for less"
            )


def check_heads(dim: int, heads: int) -> None:
    """Refuse a width that the heads cannot share.

    Raises:
        UserError: ``dim`` is not a multiple of ``heads``.
    """
    if dim % heads:
        raise UserError(f"dim={dim} is not a multiple of heads={heads}; change one of them")
