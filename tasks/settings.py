"""The only reader of environment variables: where data are kept, and which device computes."""

import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from rlhf_core import redaction
from rlhf_core.errors import ConfigError

_LEASES = "prefect.server.concurrency.lease_storage"

# Keeps dependencies from sending telemetry and from filling the terminal. A test checks that the
# installed packages read these names.
QUIET: Mapping[str, str] = MappingProxyType(
    {
        "DO_NOT_TRACK": "true",  # MLflow, Prefect and the Hugging Face hub; MLflow wants "true"
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
        "PREFECT_SERVER_UI_V2_ENABLED": "false",  # its pages send requests to amplitude.com
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_VERBOSITY": "error",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Do not import a `tasks.py` in the working folder instead of this package.
        "PYTHONSAFEPATH": "1",
        # Retry while a tracking server restarts: the pauses double, four minutes in all.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "7",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
        # In files, not in memory: a server that restarts would forget who holds the slots of a
        # concurrency limit, and they would never be released.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": f"{_LEASES}.filesystem",
        # A first start on a slow machine takes longer than the 20 seconds that Prefect allows.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    }
)


ACCOUNT = "rlhf"  # the user of both servers, if a password is set
PASSWORD_LENGTH = 12  # minimum: it also signs browser sessions


HOME = ".rlhf"
# Variables whose values never reach a message, a log or a report. A test checks that every secret
# of the settings below is one of them.
SECRETS = (
    "RLHF_PASSWORD",
    "RLHF_NOTIFY_WEBHOOK",
    "RLHF_JUDGE_KEY",
    "RLHF_FEEDBACK_DATABASE",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PREFECT_API_KEY",
    "PREFECT_API_AUTH_STRING",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "POSTGRES_PASSWORD",
    "POSTGRES_PREFECT_PASSWORD",
    "POSTGRES_MLFLOW_PASSWORD",
    "POSTGRES_FEEDBACK_PASSWORD",
    "S3_ACCESS_KEY",
    "S3_SECRET_KEY",
    "RAY_AUTH_TOKEN",
)


def find_home() -> Path:
    """The folder `.rlhf` of the working folder or of the nearest folder above it, as git looks for
    `.git`; else the one to be made in the working folder.

    A folder of another user is passed over: it would decide about models and results.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        found = folder / HOME
        try:
            if found.is_dir() and found.stat().st_uid == os.getuid():
                return found
        except OSError:  # a folder above that may not be read
            continue
    return here / HOME


class Settings(BaseSettings):
    """Settings of this installation. Each field is read from the variable in its alias.

    An empty variable is one that is not set. Explicit values, as in
    `Settings.model_validate({"RLHF_HOME": path})`, override the environment.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="ignore",
        case_sensitive=True,
        env_ignore_empty=True,
        allow_inf_nan=False,
    )

    home: Path = Field(
        Path(HOME),
        validation_alias="RLHF_HOME",
        description="Folder for everything that is kept between runs; `.rlhf` is looked for in "
        "the working folder and in those above it",
    )
    tracking_uri: str = Field(
        "",
        validation_alias="MLFLOW_TRACKING_URI",
        description="MLflow server or database; empty = a SQLite file under `home`",
    )
    prefect_api_url: str = Field(
        "",
        validation_alias="PREFECT_API_URL",
        description="API of the Prefect server; empty = start one for the duration of the run",
    )
    mlflow_public_url: str = Field(
        "http://127.0.0.1:5000",
        validation_alias="RLHF_MLFLOW_URL",
        description="Address of MLflow for browsers, used in links",
    )
    prefect_public_url: str = Field(
        "http://127.0.0.1:4200",
        validation_alias="RLHF_PREFECT_URL",
        description="Address of Prefect for browsers, used in links",
    )
    password: SecretStr = Field(
        SecretStr(""),
        validation_alias="RLHF_PASSWORD",
        description="Password of the user `rlhf` at Prefect and MLflow; empty = no password",
    )
    device_name: str = Field(
        "auto",
        validation_alias="RLHF_DEVICE",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto, cpu, cuda or cuda:N; auto = cuda if available",
    )
    processes: int = Field(
        1,
        validation_alias="RLHF_PROCESSES",
        ge=1,
        description="Processes that share a training; on GPUs each process has its own GPU",
    )
    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp",
        validation_alias="RLHF_STRATEGY",
        description="With several processes: each holds all weights (ddp) or a shard (fsdp)",
    )
    cluster_open: bool = Field(
        False,
        validation_alias="RLHF_CLUSTER_OPEN",
        description="Use a cluster without RAY_AUTH_MODE=token on another machine: whoever reaches "
        "its ports runs code there, so nobody else may reach them",
    )
    cluster: str = Field(
        "",
        validation_alias="RLHF_CLUSTER",
        description="HOST:PORT of a Ray cluster's head, whose machines run the stages that compute "
        "with models; empty = this machine. RLHF_HOME has to be on a disk that they share",
    )
    cluster_retries: int = Field(
        3,
        validation_alias="RLHF_CLUSTER_RETRIES",
        ge=0,
        description="How often the processes of a stage are started again on the cluster after one "
        "of them, or its machine, was lost",
    )
    cluster_cpus: int = Field(
        1,
        validation_alias="RLHF_CLUSTER_CPUS",
        ge=1,
        description="CPU cores that each process takes on the cluster, which are its threads too",
    )
    reward_packages: str = Field(
        "",
        validation_alias="RLHF_REWARD_PACKAGES",
        description="Python packages whose functions may be a reward, separated by commas; those "
        "of the config's folder may be one without",
    )
    config_folder: str = Field(
        "",
        validation_alias="RLHF_CONFIG_FOLDER",
        description="The folder of the config, whose modules may be rewards. `rlhf run` and the "
        "like set it themselves, and so does `rlhf up` for its worker; another worker has none",
    )
    judge_url: str = Field(
        "",
        validation_alias="RLHF_JUDGE_URL",
        description="Address of the OpenAI-compatible endpoint of a judge, as "
        "http://127.0.0.1:8000/v1. No config has it, for none may choose where the key goes",
    )
    judge_key: SecretStr = Field(
        SecretStr(""),
        validation_alias="RLHF_JUDGE_KEY",
        description="Key of that endpoint; empty = it asks for none",
    )
    vllm_urls: str = Field(
        "",
        validation_alias="RLHF_VLLM_URLS",
        description="Addresses of the vLLM servers that sample roll-outs if sampling.engine is "
        "vllm, separated by commas, as http://10.0.0.7:8000. They read weights below `home`, so "
        "they have to see it under the same path",
    )
    feedback_database: SecretStr = Field(
        SecretStr(""),
        validation_alias="RLHF_FEEDBACK_DATABASE",
        description="Database of the preference store, as "
        "postgresql+psycopg2://USER:PASSWORD@HOST:5432/feedback; empty = SQLite under `home`",
    )
    label_public_url: str = Field(
        "http://127.0.0.1:4300",
        validation_alias="RLHF_LABEL_URL",
        description="Address of the page for annotators, used in invitation links",
    )
    checkpoint_seconds: float = Field(
        60.0,
        validation_alias="RLHF_CHECKPOINT_SECONDS",
        ge=0,
        description="Minimum time between two checkpoints of a training (s); 0 = at every step",
    )
    notify_webhook: SecretStr = Field(
        SecretStr(""),
        validation_alias="RLHF_NOTIFY_WEBHOOK",
        description="URL to which Prefect posts notifications as JSON with a `text`; empty = none",
    )
    outage_seconds: float = Field(
        300.0,
        validation_alias="RLHF_OUTAGE_SECONDS",
        ge=0,
        description="How long a run waits for an MLflow server that does not respond (s)",
    )
    keep_work_days: float = Field(
        7.0,
        validation_alias="RLHF_KEEP_WORK_DAYS",
        gt=0,
        description="How long the checkpoints of a stopped run are kept for resuming (days)",
    )

    backup_days: float = Field(
        0.0,
        validation_alias="RLHF_BACKUP_DAYS",
        ge=0,
        le=36_500,
        description="How long you keep back-ups (days), which the certificate of an erasure tells; "
        "0 = not said. Nothing deletes a back-up by itself",
    )

    @model_validator(mode="before")
    @classmethod
    def _home_above(cls, given: Any) -> Any:
        return {"RLHF_HOME": find_home(), **given} if isinstance(given, dict) else given

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        try:
            return home.expanduser().resolve()
        except (OSError, RuntimeError) as error:  # RuntimeError: ~nosuch
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"it cannot be used as a folder ({reason})") from None

    @field_validator("tracking_uri", "prefect_api_url")
    @classmethod
    def _address(cls, address: str) -> str:
        try:
            urlsplit(address)
        except ValueError as error:
            raise ValueError(f"it is not an address ({error})") from None
        return address

    @field_validator("cluster")
    @classmethod
    def _closed_cluster(cls, address: str, others: ValidationInfo) -> str:
        """HOST:PORT, of this machine or of a cluster that not everybody may use."""
        if not address:
            return address
        try:
            parts = urlsplit(f"//{address}")
            whole = bool(parts.hostname and parts.port) and "@" not in address
        except ValueError:
            whole = False
        if not whole or parts.netloc != address:
            raise ValueError("it is not HOST:PORT, as 10.0.0.5:6379")
        host = str(parts.hostname)
        here = host in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", host)
        if here or others.data.get("cluster_open") or os.environ.get("RAY_AUTH_MODE") == "token":
            return address
        raise ValueError(
            "whoever reaches the ports of a cluster without RAY_AUTH_MODE=token runs code on it; "
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN on all its machines, or "
            "RLHF_CLUSTER_OPEN=1 if nobody else reaches them"
        )

    @field_validator("judge_url")
    @classmethod
    def _endpoint(cls, address: str) -> str:
        """An address without a user or a query: whatever is secret belongs in the key."""
        parts = urlsplit(address)
        if address and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ValueError("it is not an address that begins with http:// or https://")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("it has a user or a query; put the key in RLHF_JUDGE_KEY")
        return address.rstrip("/")

    @field_validator("vllm_urls")
    @classmethod
    def _servers(cls, addresses: str) -> str:
        """Addresses of servers, not of a path in one, and without a user or a query."""
        for address in (found := _listed(addresses)):
            parts = urlsplit(address)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"{address} does not begin with http:// or https:// and a host")
            if "@" in parts.netloc or parts.query or parts.fragment:
                raise ValueError("an address has a user or a query; vLLM's has neither")
            if parts.path not in ("", "/"):
                raise ValueError(f"{address} has a path; leave out what follows host and port")
        if len(set(found)) < len(found):
            raise ValueError("an address is there twice")
        return ",".join(found)

    @field_validator("mlflow_public_url", "prefect_public_url", "label_public_url")
    @classmethod
    def _for_browsers(cls, url: str) -> str:
        """A link is kept in MLflow and Prefect, so it carries neither user nor password."""
        parts = urlsplit(url.rstrip("/"))
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

    @property
    def prefect_stays(self) -> bool:
        """Whether Prefect's pages outlive the run: its public address is set, as by `rlhf up`.

        The server that `rlhf run` starts for itself has none.
        """
        return "prefect_public_url" in self.model_fields_set

    @property
    def mlflow_uri(self) -> str:
        """`tracking_uri`, or the SQLite file under `home`."""
        return self.tracking_uri or f"sqlite:///{self.home / 'mlflow' / 'mlflow.db'}"

    @property
    def feedback_uri(self) -> str:
        """The database of the preference store, or the SQLite file under `home`."""
        given = self.feedback_database.get_secret_value()
        return given or f"sqlite:///{self.home / 'feedback' / 'feedback.db'}"

    @property
    def artifact_root(self) -> Path | None:
        """The artifact folder if MLflow is a local database; None if a server decides."""
        local = urlsplit(self.mlflow_uri).scheme.startswith("sqlite")
        return self.home / "mlflow" / "artifacts" if local else None

    @property
    def device(self) -> str:
        """The torch device to compute on; `auto` is resolved at each access.

        Raises: ConfigError if this machine does not have the CUDA device.
        """
        if self.device_name == "cpu":
            return "cpu"
        import torch

        found = torch.cuda.device_count()
        if self.device_name == "auto":
            return "cuda" if found else "cpu"
        if int(self.device_name.partition(":")[2] or 0) >= found:
            raise ConfigError(
                f"RLHF_DEVICE is '{self.device_name}', but torch finds {found} CUDA device(s) "
                "here; set it to auto or cpu, or install a torch build with CUDA"
            )
        return self.device_name

    @property
    def training_device(self) -> str:
        """The device of a training: with several processes, `cuda` means one GPU for each.

        On a cluster it is one of its machines, so `auto` stays `auto`: the cluster decides.

        Raises: ConfigError if one GPU is set for several processes, or there are too few GPUs.
        """
        if self.cluster:
            if ":" in self.device_name:
                raise ConfigError(
                    f"RLHF_DEVICE is '{self.device_name}', a GPU of this machine, but RLHF_CLUSTER "
                    "is set; set RLHF_DEVICE to auto, cpu or cuda"
                )
            return self.device_name
        device = self.device
        if self.processes == 1 or device == "cpu":
            return device
        import torch

        found = torch.cuda.device_count()
        if device != "cuda" or found < self.processes:
            raise ConfigError(
                f"RLHF_PROCESSES is {self.processes}, and each process needs a GPU, but "
                f"RLHF_DEVICE is '{self.device_name}' and torch finds {found} CUDA device(s) here; "
                "set RLHF_PROCESSES to 1, or RLHF_DEVICE to cpu, or to cuda with enough GPUs"
            )
        return device

    @property
    def judge_address(self) -> str:
        """`judge_url`, for a config whose judge is an endpoint.

        Raises: ConfigError if it is not set.
        """
        if not self.judge_url:
            raise ConfigError(
                "judge.source is endpoint, but RLHF_JUDGE_URL is not set where the stage runs; set "
                "it to the address of the endpoint, as http://127.0.0.1:8000/v1, and "
                "RLHF_JUDGE_KEY to its key, if it asks for one"
            )
        return self.judge_url

    @property
    def vllm_addresses(self) -> tuple[str, ...]:
        """`vllm_urls` one by one, for a config whose roll-outs they sample.

        Raises: ConfigError if there are none.
        """
        if not self.vllm_urls:
            raise ConfigError(
                "sampling.engine is vllm, but RLHF_VLLM_URLS is not set where the stage runs; set "
                "it to the addresses of the servers, as http://10.0.0.7:8000, or set "
                "sampling.engine to builtin"
            )
        return _listed(self.vllm_urls)

    def environment(self) -> dict[str, str]:
        """The environment variables for this process and those that it starts."""
        return {
            **QUIET,
            **self._credentials(),
            "RLHF_HOME": str(self.home),
            "PREFECT_HOME": str(self.home / "prefect"),
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
        }

    @property
    def account(self) -> str:
        """`user:password` of the servers; empty if no password is set."""
        password = self.password.get_secret_value()
        return f"{ACCOUNT}:{password}" if password else ""

    def prefect_credentials(self) -> dict[str, str]:
        """The account in the variable that Prefect's client reads."""
        return {"PREFECT_API_AUTH_STRING": self.account} if self.account else {}

    def mlflow_credentials(self) -> dict[str, str]:
        """The account in the variables that MLflow's client reads."""
        if not self.account:
            return {}
        return {
            "MLFLOW_TRACKING_USERNAME": ACCOUNT,
            "MLFLOW_TRACKING_PASSWORD": self.password.get_secret_value(),
        }

    def _credentials(self) -> dict[str, str]:
        if not self.account:
            return {}
        own = {"RLHF_PASSWORD": self.password.get_secret_value()}
        return own | self.prefect_credentials() | self.mlflow_credentials()


class StackSettings(BaseSettings):
    """Settings of docker-compose.yml from `.env`, which are validated before anything starts."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="ignore",
        case_sensitive=True,
        env_ignore_empty=True,
        hide_input_in_errors=True,
    )

    bind: str = Field("127.0.0.1", validation_alias="RLHF_BIND")
    prefect_url: str = Field("http://127.0.0.1:4200", validation_alias="RLHF_PREFECT_URL")
    mlflow_url: str = Field("http://127.0.0.1:5000", validation_alias="RLHF_MLFLOW_URL")
    mlflow_host: str = Field("127.0.0.1:5000", validation_alias="RLHF_MLFLOW_HOST")
    label_url: str = Field("http://127.0.0.1:4300", validation_alias="RLHF_LABEL_URL")
    password: SecretStr = Field(validation_alias="RLHF_PASSWORD")
    postgres_password: SecretStr = Field(validation_alias="POSTGRES_PASSWORD")
    prefect_database: SecretStr = Field(validation_alias="POSTGRES_PREFECT_PASSWORD")
    mlflow_database: SecretStr = Field(validation_alias="POSTGRES_MLFLOW_PASSWORD")
    feedback_database: SecretStr = Field(validation_alias="POSTGRES_FEEDBACK_PASSWORD")
    s3_access_key: SecretStr = Field(validation_alias="S3_ACCESS_KEY")
    s3_secret_key: SecretStr = Field(validation_alias="S3_SECRET_KEY")
    ray_token: SecretStr = Field(validation_alias="RAY_AUTH_TOKEN")

    def secrets(self) -> dict[str, str]:
        """The secrets in plain text, by variable."""
        fields = type(self).model_fields
        return {
            str(fields[name].validation_alias): value.get_secret_value()
            for name, value in self
            if isinstance(value, SecretStr)
        }


class StoreSettings(BaseSettings):
    """Databases and bucket of the stack, in the variables of its servers; empty = no stack."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", case_sensitive=True, env_ignore_empty=True
    )

    prefect_database: str = Field("", validation_alias="PREFECT_SERVER_DATABASE_CONNECTION_URL")
    mlflow_database: str = Field("", validation_alias="MLFLOW_BACKEND_STORE_URI")
    feedback_database: str = Field("", validation_alias="RLHF_FEEDBACK_DATABASE")
    artifacts: str = Field("", validation_alias="MLFLOW_ARTIFACTS_DESTINATION")


def _listed(addresses: str) -> tuple[str, ...]:
    return tuple(part.strip().rstrip("/") for part in addresses.split(",") if part.strip())


def read_settings() -> Settings:
    """The settings from the environment, whose secrets are masked in every message from now on.

    Raises: ConfigError that names the invalid variable.
    """
    redaction.remember(value for name in SECRETS if (value := os.environ.get(name)))
    redaction.mask_logs()
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        value = reprlib.repr(redaction.masked(str(first["input"])))
        raise ConfigError(
            f"the environment variable {first['loc'][0]} is {value}: "
            f"{first['msg'].removeprefix('Value error, ')}; correct it or unset it"
        ) from error


def apply_environment(settings: Settings) -> None:
    """Put `settings.environment()` into `os.environ`; variables with a value are kept.

    Call this before importing MLflow, Prefect or transformers, which read it at import.
    """
    set_defaults(settings.environment())


def set_defaults(variables: Mapping[str, str]) -> None:
    """Set the environment variables that are unset or empty."""
    for name, value in variables.items():
        if not os.environ.get(name):
            os.environ[name] = value
