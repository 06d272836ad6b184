"""From `routing.tls` in a configuration to the processes that use it, without an engine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from expertmesh.deployments.attention.settings import dispatch_settings
from expertmesh.deployments.runtime import mesh_tls
from expertmesh.errors import ConfigError
from expertmesh.platform.cli.shared import WRONG_USE
from expertmesh.platform.config import MeshConfig, load_config
from expertmesh.routing.dispatch import DispatchSettings
from expertmesh.routing.transport import TlsSettings
from expertmesh.routing.vllm_plugin import MeshSettings, Role
from expertmesh.routing.wire import Limits
from tests.routing.certificates import Authority, write
from tests.support.command import expertmesh


@pytest.fixture
def config(tmp_path: Path) -> MeshConfig:
    write(tmp_path / "tls", Authority())
    file = tmp_path / "mesh.yaml"
    names = "cert_file: tls/cert.pem, key_file: tls/key.pem, ca_file: tls/ca.pem, renew_after_s: 600"
    file.write_text(f"routing: {{tls: {{{names}}}, max_frame_rows: 128, max_frame_mib: 2}}\n")
    return load_config(file)


def test_the_engines_dispatcher_is_told_by_json(config: MeshConfig, tmp_path: Path) -> None:
    """As `additional_config` carries it: paths, and neither keys nor certificates."""
    sent = MeshSettings(Role.ATTENTION, dispatch=dispatch_settings(config, "node-1", "rev-1"))
    text = json.dumps(sent.to_additional_config())
    assert "BEGIN" not in text
    received = MeshSettings.of(json.loads(text))
    assert received is not None
    settings = DispatchSettings.of_json(received.dispatch)
    files = [str(tmp_path / "tls" / name) for name in ("cert.pem", "key.pem", "ca.pem")]
    assert settings.tls == TlsSettings(*files, renew_after_s=600.0)
    assert (settings.node, settings.revision, settings.limits) == ("node-1", "rev-1", Limits(128, 2 << 20))


def test_without_the_section_there_is_no_tls() -> None:
    config = load_config({})
    assert mesh_tls(config) is None
    settings = DispatchSettings.of_json(json.loads(json.dumps(dispatch_settings(config, "n", "r"))))
    assert settings.tls is None


def test_shards_and_feeds_get_what_the_files_hold(config: MeshConfig) -> None:
    tls = mesh_tls(config)
    assert tls is not None
    assert tls.settings.renew_after_s == 600.0
    assert len(tls.current().fingerprint) == 32


def test_a_broken_file_is_found_before_anything_starts(config: MeshConfig, tmp_path: Path) -> None:
    check = ("config", "check", str(tmp_path / "mesh.yaml"))
    assert expertmesh(*check) == (0, f"ok: {tmp_path / 'mesh.yaml'}\n", "")
    (tmp_path / "tls" / "key.pem").chmod(0o604)
    bad = expertmesh(*check)
    assert bad.code == WRONG_USE
    assert bad.err.startswith("error: routing.tls.key_file: ")
    with pytest.raises(ConfigError, match=r"^routing.tls.key_file: .*mode 0604"):
        mesh_tls(config)


@pytest.mark.parametrize("missing", ["cert_file", "key_file", "ca_file"])
def test_all_three_files_are_needed(missing: str) -> None:
    files = {name: "/x" for name in ("cert_file", "key_file", "ca_file") if name != missing}
    with pytest.raises(ConfigError, match=rf"routing.tls.{missing}"):
        load_config({"routing": {"tls": files}})


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_commands_of_the_documentation_make_certificates_and_rotate_them(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()
    section = page.split("## Certificates between nodes\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
    assert [language for language, _ in blocks] == ["sh", "sh", "yaml", "sh"]
    authority, leaf, config, second_authority = (text for _, text in blocks)

    def run(script: str) -> bytes:
        done = subprocess.run(["sh", "-e"], input=script, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return mesh_tls_of(tmp_path / "mesh.yaml") if script is not authority else b""

    (tmp_path / "mesh.yaml").write_text(config)
    run(authority)
    first = run(leaf)
    second = run(leaf)
    assert first != second, "another certificate"
    assert run(second_authority) == second, "the same, and two authorities"
    assert (tmp_path / "tls" / "ca.pem").read_text().count("BEGIN CERTIFICATE") == 2
    third = run(leaf.replace("authority/ca.", "next-authority/ca.").replace("cp next-authority/ca.pem tls/ca.pem", ""))
    assert third not in (first, second), "of the new authority, and the file still trusts both"
    run("cp next-authority/ca.pem tls/ca.pem")
    with pytest.raises(ConfigError, match="would refuse"):
        run("cp authority/ca.pem tls/ca.pem")


def mesh_tls_of(config: Path) -> bytes:
    """The fingerprint of the certificate that a configuration names."""
    tls = mesh_tls(load_config(config))
    assert tls is not None
    return tls.current().fingerprint
