"""What a start leaves out: no test of time, but of what a process has loaded and is told to do."""

import subprocess
import sys

from flows.local import serve
from flows.local.supervisor import Supervisor
from tasks.settings import Settings

NOT_NEEDED = {
    "transformers",  # what reads and computes with models: with the first that does
    "torch.distributed.fsdp",
    "scipy.stats",
    "datasketch",
    "evalica",
    "peft",  # comes with the first adapter
    "matplotlib",  # with the first figure
    "prefect.server.api",  # the server is another process
    "mlflow.server",
    "mlflow.pyfunc",
    "openai",
    "sklearn",
    "datasets",
}


def test_the_pipeline_loads_without_what_its_start_does_not_need():
    code = (
        "import sys; from rlhf_core.machine.imports import importing\n"
        "with importing(): import flows.rlhf, rlhf_core.stages.prepare\n"
        f"print(sorted({NOT_NEEDED} & {{*sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_the_server_of_a_run_has_no_pages_and_registers_no_blocks(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(Supervisor, "start", lambda self, service: started.append(service))
    for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
        monkeypatch.setenv(name, "")
    with serve.prefect_server(Settings.model_validate({"RLHF_HOME": tmp_path})):
        pass
    (server,) = started
    code = (
        "from prefect.settings import get_current_settings as s; "
        "print(s().server.ui.enabled, s().server.register_blocks_on_start)"
    )
    environment = {**server.environment, "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "False False\n", done.stderr


def test_rlhf_up_keeps_both(tmp_path):
    service = serve._prefect(Settings.model_validate({"RLHF_HOME": tmp_path}), "http://127.0.0.1:1")
    assert not serve.WITHOUT_PAGES.keys() & service.environment.keys()
