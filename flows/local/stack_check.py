"""The service `check` of docker-compose.yml; the other services start once it succeeds.

On one machine the secrets of the example are enough. If the ports are open to others, or the pages
have a name that others can use, each secret has to be your own.
"""

import re
import sys
from ipaddress import ip_address
from urllib.parse import urlsplit

from rlhf_core.errors import ConfigError
from tasks.settings import PASSWORD_LENGTH, StackSettings

EXAMPLE = "change-me"  # prefix of the secrets in .env.example
MIN_LENGTH = 16  # minimum number of characters of a secret


def check(stack: StackSettings) -> None:
    """Validate the settings of the stack.

    Raises: ConfigError that names the first variable to change.
    """
    for name, secret in stack.secrets().items():
        if not re.fullmatch(r"[A-Za-z0-9._~-]+", secret):
            raise ConfigError(
                f"{name} becomes part of addresses: use only letters, digits and . _ ~ -"
            )
    if len(stack.password.get_secret_value()) < PASSWORD_LENGTH:
        raise ConfigError(f"RLHF_PASSWORD needs at least {PASSWORD_LENGTH} characters")
    if urlsplit(stack.mlflow_url).netloc != stack.mlflow_host:
        raise ConfigError(
            f"RLHF_MLFLOW_HOST is '{stack.mlflow_host}' and RLHF_MLFLOW_URL '{stack.mlflow_url}': "
            "they must be the same address, without and with http://"
        )
    exposed = {
        "RLHF_BIND": stack.bind,
        "RLHF_PREFECT_URL": urlsplit(stack.prefect_url).hostname or "",
        "RLHF_MLFLOW_URL": urlsplit(stack.mlflow_url).hostname or "",
        "RLHF_LABEL_URL": urlsplit(stack.label_url).hostname or "",
    }
    for variable, host in exposed.items():
        if not _is_loopback(host):
            _require_own_secrets(stack, f"{variable} lets others reach the stack ({host})")


def _require_own_secrets(stack: StackSettings, why: str) -> None:
    for name, secret in stack.secrets().items():
        if secret.startswith(EXAMPLE) or len(secret) < MIN_LENGTH:
            what = (
                "that of the example"
                if secret.startswith(EXAMPLE)
                else f"shorter than {MIN_LENGTH} characters"
            )
            raise ConfigError(
                f"{why}, but {name} is {what}: put a secret of your own into .env, for example "
                "from `openssl rand -hex 24`, or use only 127.0.0.1"
            )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    try:
        check(StackSettings())
    except ConfigError as error:
        sys.exit(f"rlhf: {error}")
