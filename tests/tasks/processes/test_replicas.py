"""What is recorded of servers: keys for their owner alone, shares of live replicas, and errors of a failed start."""

import os
import socket
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest

from anything.keys import list_keys, read_key_file, revoke_key
from base import storage
from base.errors import USER_EXIT_CODES, CherryError, ConfigError, PortInUseError, StorageError
from tasks.processes.replicas import GATEWAY, Server, ServingDirectory, stop_serving


@pytest.fixture
def serving(tmp_path):
    made = ServingDirectory(str(tmp_path))
    made.prepare()
    return made


@pytest.fixture
def alive():
    """A process that ends when it is told to, recorded as a server."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    created = psutil.Process(process.pid).create_time()
    yield Server("net-v1", process.pid, created, "http://127.0.0.1:1", "/weights", "net-v1")
    process.communicate(b"\n")


def test_keys_are_for_this_user_alone_and_made_once(serving):
    files = [serving.client_key, serving.internal_key, serving.client_keys, serving.internal_keys]
    assert [oct(path.stat().st_mode & 0o777) for path in files] == ["0o600"] * 4
    assert oct(serving.path.stat().st_mode & 0o777) == "0o700"
    keys = [read_key_file(str(path)) for path in files[:2]]
    assert keys[0] != keys[1]
    serving.prepare()
    assert [read_key_file(str(path)) for path in files[:2]] == keys
    for plain, hashed in zip(keys, files[2:], strict=True):
        assert plain not in hashed.read_text()


def test_shares_count_for_live_replicas_only_and_the_salt_stays(serving, alive):
    gone = replace(alive, name="net-v0", created=alive.created - 100.0)
    for server in (alive, gone):
        storage.write_json(str(serving.path / f"server-{server.name}.json"), vars(server))
    serving.write_routes({"net-v0": 75.0, "net-v1": 25.0})
    assert serving.weights() == {"net-v1": 25.0}
    assert (serving.find("net-v1"), serving.find("net-v0"), serving.find("other")) == (alive, None, None)
    salt = storage.read_json(str(serving.routes))["salt"]
    serving.write_routes({"net-v1": 100.0})
    routes = storage.read_json(str(serving.routes))
    assert (routes["salt"], [one["name"] for one in routes["replicas"]]) == (salt, ["net-v1"])
    assert routes["replicas"][0]["api_key_file"] == str(serving.internal_key)


def test_a_replica_of_other_weights_of_a_version_has_a_name_of_its_own(serving, alive):
    assert serving.unused_name("net-v1") == "net-v1"
    storage.write_json(str(serving.path / "server-net-v1.json"), vars(alive))
    assert serving.find_replica("net-v1", "/weights", alive.kind) == alive
    assert serving.find_replica("net-v1", "/other", alive.kind) is None
    assert serving.find_replica("net-v1", "/weights", "other") is None
    assert serving.unused_name("net-v1") == "net-v1-2", "its record would be lost, and its process with it"
    assert serving.unused_name("net-v2") == "net-v2"
    storage.write_json(str(serving.path / "server-net-v1-2.json"), vars(replace(alive, name="net-v1-2")))
    assert serving.unused_name("net-v1") == "net-v1-3"


def test_a_pid_that_another_process_has_now_is_left_alone(serving, alive):
    reused = replace(alive, created=alive.created - 100.0)
    storage.write_json(str(serving.path / "server-net-v1.json"), vars(reused))
    assert stop_serving(str(serving.path.parent)) == []
    assert psutil.Process(alive.pid).is_running()
    assert serving.servers() == []


@pytest.mark.slow
def test_a_server_that_cannot_start_leaves_its_own_error_and_no_record(serving):
    missing = str(serving.path / "no-weights")
    config = serving.path / "serve.yaml"
    config.write_text("{}")
    with pytest.raises(CherryError, match="no-weights") as caught:
        serving.start_replica(
            "net-v9", "embedded", model=missing, version="net-v9", config_path=str(config), timeout_s=120.0
        )
    assert caught.value.exit_code in USER_EXIT_CODES
    assert serving.servers() == []
    alive = [one for one in psutil.process_iter(["status", "cmdline"]) if one.info["status"] != psutil.STATUS_ZOMBIE]
    assert not [one for one in alive if missing in (one.info["cmdline"] or [])]


def test_a_release_is_refused_before_it_begins_where_its_records_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file cannot be written, and a release keeps"):
        ServingDirectory(str(tmp_path / "file" / "runs")).check("127.0.0.1", 0)
    new = ServingDirectory(str(tmp_path / "new" / "runs"))
    new.check("127.0.0.1", 0)
    assert not (tmp_path / "new").exists()


def test_a_key_that_no_server_would_take_is_told_with_the_way_to_a_new_one(serving):
    serving.check("127.0.0.1", 0)
    [record] = list_keys(str(serving.client_keys))
    revoke_key(str(serving.client_keys), record.key_id)
    with pytest.raises(ConfigError, match=r"its key was revoked\. Remove .*serving/key: the release makes a new key"):
        serving.check("127.0.0.1", 0)
    serving.client_keys.unlink()
    with pytest.raises(ConfigError, match=r"its key is not one of .*keys\.json.* Remove .*serving/key"):
        serving.check("127.0.0.1", 0)
    serving.client_key.unlink()
    serving.prepare()
    serving.check("127.0.0.1", 0)
    os.chmod(serving.internal_keys, 0o644)
    with pytest.raises(ConfigError, match=r"internal\.json can be read by others .* chmod 600"):
        serving.check("127.0.0.1", 0)


def test_the_gateways_own_port_is_no_obstacle_and_another_process_s_is(serving, alive):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=rf"serve\.port: port {port} "):
            serving.check("127.0.0.1", port)
        gateway = replace(alive, name=GATEWAY, url=f"http://127.0.0.1:{port}")
        storage.write_json(str(serving.path / f"server-{GATEWAY}.json"), vars(gateway))
        serving.check("127.0.0.1", port)


def test_a_gateway_whose_port_was_taken_meanwhile_names_the_config_s_key(serving):
    storage.write_json(str(serving.routes), {"salt": "", "replicas": []})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = serving.path / "release.yaml"
        config.write_text(f"serve: {{port: {port}}}\n")
        with pytest.raises(PortInUseError, match=rf"serve\.port: port {port} .*serve\.port="):
            serving.start_gateway(str(config), host="127.0.0.1", port=port, timeout_s=60)
    assert serving.servers() == []
