"""The only reader of environment variables: where things are kept, and which device computes."""

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

# What keeps each dependency from calling home, and from filling the terminal. The names are those
# that the installed packages read; a test looks them up there.
QUIET: Mapping[str, str] = MappingProxyType(
    {
        "DO_NOT_TRACK": "true",  # MLflow, Prefect and the Hugging Face hub; MLflow wants "true"
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
        "PREFECT_SERVER_UI_V2_ENABLED": "false",  # its pages make the browser ask amplitude.com
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_VERBOSITY": "error",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "TOKENIZERS_PARALLELISM": "false",
        # A `tasks.py` in the folder that a process works in must not be taken for this package's.
        "PYTHONSAFEPATH": "1",
        # A tracking server that restarts is waited for: the pauses double, four minutes in all.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "7",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
        # In files and not in memory: a server that restarts would forget who holds a place under a
        # concurrency limit, and those places would be taken for ever.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": f"{_LEASES}.filesystem",
        # A first start on a slow machine takes longer than the 20 seconds that Prefect allows.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    }
)


ACCOUNT = "rlhf"  # the user of both servers, where a password is set
PASSWORD_LENGTH = 12  # characters at least: it signs the sessions of browsers too


class Settings(BaseSettings):
    """Where this installation keeps things. Each field is read from the variable in its alias.

    What is given by hand, as in `Settings.model_validate({"RLHF_HOME": path})`, comes before the
    environment.
    """

    model_config = SettingsConfigDict(frozen=True, extra="ignore", case_sensitive=True)

    home: Path = Field(
        Path(".rlhf"),
        validation_alias="RLHF_HOME",
        description="Folder of everything that is kept between runs",
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
        description="API of the Prefect server; empty = one is started for the length of the run",
    )
    mlflow_public_url: str = Field(
        "http://127.0.0.1:5000",
        validation_alias="RLHF_MLFLOW_URL",
        description="MLflow's address as a browser sees it, for links",
    )
    prefect_public_url: str = Field(
        "http://127.0.0.1:4200",
        validation_alias="RLHF_PREFECT_URL",
        description="Prefect's address as a browser sees it, for links",
    )
    password: SecretStr = Field(
        SecretStr(""),
        validation_alias="RLHF_PASSWORD",
        description="Password of the user `rlhf` at Prefect and MLflow; empty = none is asked for",
    )
    device_name: str = Field(
        "auto",
        validation_alias="RLHF_DEVICE",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto, cpu, cuda or cuda:N; auto = cuda where there is one",
    )
    processes: int = Field(
        1,
        validation_alias="RLHF_PROCESSES",
        ge=1,
        description="Processes that share the work of a training; on GPUs each has one of its own",
    )
    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp",
        validation_alias="RLHF_STRATEGY",
        description="Each of several processes has all weights (ddp), or a part of them (fsdp)",
    )
    checkpoint_seconds: float = Field(
        60.0,
        validation_alias="RLHF_CHECKPOINT_SECONDS",
        ge=0,
        description="Least time between two checkpoints of a training (s); 0 = at every step",
    )
    notify_webhook: SecretStr = Field(
        SecretStr(""),
        validation_alias="RLHF_NOTIFY_WEBHOOK",
        description="URL to which Prefect posts news as JSON with a `text`; empty = to none",
    )
    outage_seconds: float = Field(
        300.0,
        validation_alias="RLHF_OUTAGE_SECONDS",
        ge=0,
        description="How long a run waits for an MLflow server that does not answer (s)",
    )
    keep_work_days: float = Field(
        7.0,
        validation_alias="RLHF_KEEP_WORK_DAYS",
        gt=0,
        description="How long the checkpoints of a run that was stopped wait for it to go on",
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
        """Whether Prefect's pages outlive the run: its address is given, as by `rlhf up`.

        The server that `rlhf run` starts for itself has none.
        """
        return "prefect_public_url" in self.model_fields_set

    @property
    def mlflow_uri(self) -> str:
        """`tracking_uri`, or the SQLite file under `home`."""
        return self.tracking_uri or f"sqlite:///{self.home / 'mlflow' / 'mlflow.db'}"

    @property
    def artifact_root(self) -> Path | None:
        """Where artifacts lie when MLflow is a local database; None when a server decides."""
        local = urlsplit(self.mlflow_uri).scheme.startswith("sqlite")
        return self.home / "mlflow" / "artifacts" if local else None

    @property
    def device(self) -> str:
        """The torch device to compute on; `auto` is decided here, when it is asked for.

        Raises: ConfigError when a CUDA device is named that this machine does not have.
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
        """`device`, for a training: with several processes `cuda` is a GPU for each.

        Raises: ConfigError when one GPU is named for several processes, or there are too few.
        """
        device = self.device
        if self.processes == 1 or device == "cpu":
            return device
        import torch

        found = torch.cuda.device_count()
        if device != "cuda" or found < self.processes:
            raise ConfigError(
                f"RLHF_PROCESSES is {self.processes}, which takes a GPU each, but RLHF_DEVICE is "
                f"'{self.device_name}' and torch finds {found} CUDA device(s) here; set "
                "RLHF_PROCESSES to 1, or RLHF_DEVICE to cpu, or to cuda where there are enough"
            )
        return device

    def environment(self) -> dict[str, str]:
        """What this process and those it starts should find in their environment."""
        return {
            **QUIET,
            **self._credentials(),
            "RLHF_HOME": str(self.home),
            "PREFECT_HOME": str(self.home / "prefect"),
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
        }

    @property
    def account(self) -> str:
        """`user:password` of the servers; empty where no password is set."""
        password = self.password.get_secret_value()
        return f"{ACCOUNT}:{password}" if password else ""

    def prefect_credentials(self) -> dict[str, str]:
        """The account under the name that Prefect's client reads."""
        return {"PREFECT_API_AUTH_STRING": self.account} if self.account else {}

    def mlflow_credentials(self) -> dict[str, str]:
        """The account under the names that MLflow's client reads."""
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
    """What docker-compose.yml takes from `.env` and has checked before anything starts."""

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
        """The secrets in the clear, by the variable that each comes from."""
        fields = type(self).model_fields
        return {
            str(fields[name].validation_alias): value.get_secret_value()
            for name, value in self
            if isinstance(value, SecretStr)
        }


class StoreSettings(BaseSettings):
    """What is behind the servers of the stack, under the names that they read; empty = no stack."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", case_sensitive=True)

    prefect_database: str = Field("", validation_alias="PREFECT_SERVER_DATABASE_CONNECTION_URL")
    mlflow_database: str = Field("", validation_alias="MLFLOW_BACKEND_STORE_URI")
    feedback_database: str = Field("", validation_alias="RLHF_FEEDBACK_DATABASE")
    artifacts: str = Field("", validation_alias="MLFLOW_ARTIFACTS_DESTINATION")


def read_settings() -> Settings:
    """The settings that the environment gives.

    Raises: ConfigError that names the variable which cannot be used.
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
    """Put `settings.environment()` into `os.environ`; what the user has set stays as it is.

    To be called before MLflow, Prefect or transformers is imported: they read it at import.
    """
    for name, value in settings.environment().items():
        os.environ.setdefault(name, value)
