"""The only reader of environment variables: where data are kept, and which device computes."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

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


class Settings(BaseSettings):
    """Settings of this installation. Each field is read from the variable in its alias.

    Explicit values, as in `Settings.model_validate({"RLHF_HOME": path})`, override the environment.
    """

    model_config = SettingsConfigDict(frozen=True, extra="ignore", case_sensitive=True)

    home: Path = Field(
        Path(".rlhf"),
        validation_alias="RLHF_HOME",
        description="Folder for everything that is kept between runs",
        validate_default=True,
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

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().resolve()

    @field_validator("mlflow_public_url", "prefect_public_url")
    @classmethod
    def _without_slash(cls, url: str) -> str:
        return url.rstrip("/")

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

        Raises: ConfigError if one GPU is set for several processes, or there are too few GPUs.
        """
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
        frozen=True, extra="ignore", case_sensitive=True, hide_input_in_errors=True
    )

    bind: str = Field("127.0.0.1", validation_alias="RLHF_BIND")
    prefect_url: str = Field("http://127.0.0.1:4200", validation_alias="RLHF_PREFECT_URL")
    mlflow_url: str = Field("http://127.0.0.1:5000", validation_alias="RLHF_MLFLOW_URL")
    mlflow_host: str = Field("127.0.0.1:5000", validation_alias="RLHF_MLFLOW_HOST")
    password: SecretStr = Field(validation_alias="RLHF_PASSWORD")
    postgres_password: SecretStr = Field(validation_alias="POSTGRES_PASSWORD")
    prefect_database: SecretStr = Field(validation_alias="POSTGRES_PREFECT_PASSWORD")
    mlflow_database: SecretStr = Field(validation_alias="POSTGRES_MLFLOW_PASSWORD")
    feedback_database: SecretStr = Field(validation_alias="POSTGRES_FEEDBACK_PASSWORD")
    s3_access_key: SecretStr = Field(validation_alias="S3_ACCESS_KEY")
    s3_secret_key: SecretStr = Field(validation_alias="S3_SECRET_KEY")

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

    model_config = SettingsConfigDict(frozen=True, extra="ignore", case_sensitive=True)

    prefect_database: str = Field("", validation_alias="PREFECT_SERVER_DATABASE_CONNECTION_URL")
    mlflow_database: str = Field("", validation_alias="MLFLOW_BACKEND_STORE_URI")
    feedback_database: str = Field("", validation_alias="RLHF_FEEDBACK_DATABASE")
    artifacts: str = Field("", validation_alias="MLFLOW_ARTIFACTS_DESTINATION")


def read_settings() -> Settings:
    """The settings from the environment.

    Raises: ConfigError that names the invalid variable.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"the environment variable {first['loc'][0]} is '{first['input']}': {first['msg']}; "
            "correct it or unset it"
        ) from error


def apply_environment(settings: Settings) -> None:
    """Put `settings.environment()` into `os.environ`; variables that are set already are kept.

    Call this before importing MLflow, Prefect or transformers, which read it at import.
    """
    for name, value in settings.environment().items():
        os.environ.setdefault(name, value)
