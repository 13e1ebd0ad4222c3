"""What the service `check` of docker-compose.yml runs; the others start once it has ended well.

On one machine the example's secrets do. As soon as the ports are open to others, or the pages have
a name that others can use, each secret has to be one of your own.
"""

import re
import sys
from ipaddress import ip_address
from urllib.parse import urlsplit

from rlhf_core.errors import ConfigError
from tasks.settings import PASSWORD_LENGTH, StackSettings

EXAMPLE = "change-me"  # how the secrets of .env.example begin
LEAST_LENGTH = 16  # characters of a secret


def check(stack: StackSettings) -> None:
    """Hold the settings of the stack against each other.

    Raises: ConfigError that names the first variable to change.
    """
    for name, secret in stack.secrets().items():
        if not re.fullmatch(r"[A-Za-z0-9._~-]+", secret):
            raise ConfigError(
                f"{name} becomes a part of addresses: use letters, digits and . _ ~ - alone"
            )
    if len(stack.password.get_secret_value()) < PASSWORD_LENGTH:
        raise ConfigError(f"RLHF_PASSWORD needs {PASSWORD_LENGTH} characters at least")
    if urlsplit(stack.mlflow_url).netloc != stack.mlflow_host:
        raise ConfigError(
            f"RLHF_MLFLOW_HOST is '{stack.mlflow_host}' and RLHF_MLFLOW_URL '{stack.mlflow_url}': "
            "they are one address, with and without http://"
        )
    ways_in = {
        "RLHF_BIND": stack.bind,
        "RLHF_PREFECT_URL": urlsplit(stack.prefect_url).hostname or "",
        "RLHF_MLFLOW_URL": urlsplit(stack.mlflow_url).hostname or "",
    }
    for variable, host in ways_in.items():
        if not _is_loopback(host):
            _require_own_secrets(stack, f"{variable} lets others reach the stack ({host})")


def _require_own_secrets(stack: StackSettings, why: str) -> None:
    for name, secret in stack.secrets().items():
        if secret.startswith(EXAMPLE) or len(secret) < LEAST_LENGTH:
            what = "the example's" if secret.startswith(EXAMPLE) else f"under {LEAST_LENGTH} long"
            raise ConfigError(
                f"{why}, but {name} is {what}: put a secret of your own into .env, for example "
                "from `openssl rand -hex 24`, or keep to 127.0.0.1"
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
