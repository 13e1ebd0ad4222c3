"""Nothing that comes out of the registry runs code or leaves its folder."""

import ast
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rlhf_core.errors import DataError, ModelError, UserError
from tasks.record.describe import ensure_experiment
from tasks.record.tracking import connect
from tasks.registry.datasets import fetch_dataset
from tasks.registry.model_store import MlflowModelStore
from tasks.registry.refs import DatasetRef, ModelRef

ROOT = Path(__file__).parents[3]
PACKAGES = ("rlhf_core", "tasks", "flows")


@pytest.fixture
def client(settings) -> MlflowClient:
    return connect(settings)


@pytest.fixture
def run_id(client, settings):
    return client.create_run(ensure_experiment(client, "demo", settings)).info.run_id


# ---- the code ----


def calls():
    """Every call in the packages: the file, the dotted name, the keyword arguments."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    yield str(file.relative_to(ROOT)), ast.unparse(node.func), keywords


CALLS = list(calls())


def test_nothing_unpickles_what_others_may_have_written():
    """Exceptions: the report that a process of ours has just put into its own folder, and rows that
    a preparation has put into its own and takes out again."""
    unpickling = {
        *("pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "dill.load"),
        *("joblib.load", "read_pickle", "pd.read_pickle", "marshal.loads", "shelve.open"),
        *("eval", "exec", "yaml.load", "yaml.unsafe_load", "mlflow.pyfunc.load_model"),
        *(
            "mlflow.transformers.load_model",
            "mlflow.pytorch.load_model",
            "mlflow.sklearn.load_model",
        ),
    }
    found = {(file, name) for file, name, _ in CALLS if name in unpickling}
    assert found == {
        ("rlhf_core/launch.py", "pickle.loads"),
        ("rlhf_core/data/shards/parts.py", "pickle.load"),
        ("rlhf_core/data/shards/spill.py", "pickle.load"),
    }


def test_torch_reads_weights_only():
    found = [keywords for _, name, keywords in CALLS if name == "torch.load"]
    assert found
    assert all(keywords["weights_only"] == "True" for keywords in found)


def test_weights_are_safetensors_and_no_code_comes_with_a_model():
    models = [
        (file, keywords)
        for file, name, keywords in CALLS
        if name.startswith("AutoModel") and name.endswith(".from_pretrained")
    ]
    assert models
    for file, keywords in models:
        assert keywords["use_safetensors"] == "True", file
    for file, _, keywords in CALLS:
        assert keywords.get("trust_remote_code", "False") == "False", file
        assert keywords.get("allow_pickle", "False") == "False", file


# ---- a poisoned registry ----


def register(client, run_id, location) -> ModelRef:
    """What anybody with the password of MLflow can do, past `publish`."""
    client.create_registered_model("demo-sft")
    made = client.create_model_version("demo-sft", str(location), run_id=run_id)
    return ModelRef(name="demo-sft", version=int(made.version))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "python_model.pkl", "deep/state.PT", "x.Bin"]
)
def test_a_version_with_a_pickle_is_refused(client, run_id, settings, policy_dir, tmp_path, name):
    import pickle
    import shutil

    location = settings.home / "mlflow" / "artifacts" / "poisoned"
    shutil.copytree(policy_dir, location)
    (location / name).parent.mkdir(exist_ok=True)
    (location / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    ref = register(client, run_id, location)
    with pytest.raises(ModelError, match=f"{Path(name).name} is a file that can run code"):
        MlflowModelStore(client).fetch(ref, tmp_path / "work" / "model")
    assert not (tmp_path / "exploded").exists()
    assert list((tmp_path / "work").iterdir()) == []


class Hostile(BaseHTTPRequestHandler):
    """An artifact server that lists a path and has a file for whatever it is asked."""

    path_listed = ""

    def do_GET(self):
        listing = {"files": [{"path": self.path_listed, "is_dir": False, "file_size": 4}]}
        body = json.dumps(listing).encode() if "path=" in self.path else b"evil"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture(params=["../../evil", "/tmp/evil-of-a-test", "a/../../evil", "..%2f..%2fevil"])
def hostile(request):
    handler = type("Handler", (Hostile,), {"path_listed": request.param})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api/2.0/mlflow-artifacts/artifacts/x"
        server.shutdown()


def files_of(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def test_a_model_cannot_write_beside_its_folder(client, run_id, hostile, tmp_path):
    ref = register(client, run_id, hostile)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match="models:/demo-sft/1"):
        MlflowModelStore(client).fetch(ref, tmp_path / "work" / "model")
    assert files_of(tmp_path) == before
    assert not Path("/tmp/evil-of-a-test").exists()


def test_data_cannot_be_written_beside_their_folder(client, settings, hostile, tmp_path):
    experiment = client.create_experiment("poisoned", artifact_location=hostile)
    ref = DatasetRef(run_id=client.create_run(experiment).info.run_id, digest="0" * 16)
    before = files_of(tmp_path)
    with pytest.raises(DataError, match="there is no prepared data at runs:/"):
        fetch_dataset(client, ref, tmp_path / "work" / "data")
    assert files_of(tmp_path) == before
    assert not Path("/tmp/evil-of-a-test").exists()


def test_a_link_in_the_store_is_no_way_to_files_of_this_machine(
    client, run_id, settings, policy_dir, tmp_path
):
    import shutil

    secret = tmp_path / "secret"
    secret.write_text("of this machine")
    location = settings.home / "mlflow" / "artifacts" / "poisoned"
    shutil.copytree(policy_dir, location)
    (location / "notes.txt").symlink_to(secret)
    ref = register(client, run_id, location)
    with pytest.raises(ModelError, match=r"notes\.txt"):
        MlflowModelStore(client).fetch(ref, tmp_path / "work" / "model")
